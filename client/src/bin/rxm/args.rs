//! The command line: help, completion and man pages are made of it.

use std::{ffi::OsString, path::PathBuf};

use clap::{Parser, Subcommand, ValueEnum, builder::styling};
use xman_common::name::Principal;

use crate::{
    console, devices, drain, edit, events, files, holds, info, job, lease, list, maintenance,
    messages, metadata, migrate,
    options::{DomainsArgs, Options},
    reconcile, rights, saved, status, verbs, whoami,
};

const STYLES: styling::Styles = styling::Styles::styled()
    .header(styling::AnsiColor::Green.on_default().bold())
    .usage(styling::AnsiColor::Green.on_default().bold())
    .literal(styling::AnsiColor::Cyan.on_default().bold())
    .placeholder(styling::AnsiColor::Cyan.on_default());

/// Controls the virtual machines of one host or of five hundred, over Kerberos.
///
/// Every host runs xmand. You prove who you are with a Kerberos ticket (kinit), and each host decides by its own
/// rules what you may do there (rxm whoami tells you).
#[derive(Debug, Parser)]
#[command(
    name = "rxm",
    version,
    styles = STYLES,
    max_term_width = 110,
    subcommand_required = true,
    arg_required_else_help = true,
    after_long_help = AFTER_HELP,
    after_help = "'rxm help' tells about hosts, domains, output and exit codes; 'rxm help COMMAND' shows examples."
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) options: Options,
    #[command(subcommand)]
    pub(crate) command: Command,
}

const AFTER_HELP: &str = "\
Hosts:
  A list such as skirit[80-84],skurut68 or r[1-2]n[01-16].example.org.
  @NAME is a group of the configuration, '!' takes away (@grid!skirit82), and
  each element may end in :PORT (IPv6 with a port: [2001:db8::7]:9626).
  Without -H the environment's XMAN_HOSTS counts, then `hosts` in
  ~/.config/xman/rxm.toml or /etc/xman/rxm.toml:
      hosts = \"@grid\"
      [groups]
      grid = \"skirit[80-84],skurut68\"

Domains:
  NAME, UUID, HOST/NAME, or a shell pattern such as 'grid-*'.
  A bare name is looked for on all hosts and must be unique; while a host is
  silent, nothing is changed by a bare name. A pattern that changes more than
  one domain asks first, or wants --yes.

Rights:
  Each host decides by its own rules. 'rxm explain ACTION [DOMAIN]' says which
  rule lets you do something or what is missing, 'rxm can' says yes or no.
  You see only the domains that you may see; a name that you may not see looks
  like one that is not there, and nothing is changed by it.
  --on-behalf-of PRINCIPAL asks with that person's rights alone, where a host
  lets you act for others; the audit has both names.

Output:
  table and wide are for people.
  json and yaml are one array of objects with `host` in each; a host that could
  not be asked is {\"host\": ..., \"error\": {\"code\": ..., \"message\": ...}}.
  Field names are stable; numbers carry their unit in the name (memory_kib).
  What changes domains prints for each the fields of list, and `verb`.
  A table of list leaves out the hosts on which you may not list; one line on
  stderr names them.
  name prints one HOST/NAME a line (NAME alone where there is one host).

Exit codes:
  0    all done, or for can: yes; a question that explain has answered is done
  1    refused or failed, or for can: no
  2    the command line or the configuration is wrong
  3    unreachable
  4    not authenticated: no ticket, or Kerberos fails
  5    a part failed, the rest is done
  130  interrupted

Examples:
  kinit
  rxm -H skirit80 list
  rxm -H @grid list 'grid-*' --state running
  rxm start skirit80/web
  rxm -H skirit[80-84] -o json list | jq '.[] | select(.stale)'";

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List domains
    #[command(
        visible_alias = "ls",
        after_help = list::HELP
    )]
    List(list::ListArgs),
    /// Show a host: processors, memory, hypervisors, load
    #[command(after_help = info::HELP)]
    Info,
    /// Show the hypervisor's messages, or the hypervisor's log of one domain
    #[command(after_help = messages::DMESG_HELP)]
    Dmesg(messages::DmesgArgs),
    /// Follow what happens to domains
    #[command(after_help = events::HELP)]
    Events(events::EventsArgs),
    /// Make a domain from libvirt XML and start it
    #[command(after_help = files::CREATE_HELP)]
    Create(files::CreateArgs),
    /// Start defined domains
    #[command(after_help = verbs::START_HELP)]
    Start(verbs::StartArgs),
    /// Store a domain's definition from libvirt XML
    #[command(after_help = files::DEFINE_HELP)]
    Define(files::DefineArgs),
    /// Remove definitions
    #[command(after_help = verbs::UNDEFINE_HELP)]
    Undefine(verbs::UndefineArgs),
    /// Stop domains at once, as if the plug was pulled
    #[command(after_help = verbs::DESTROY_HELP)]
    Destroy(DomainsArgs),
    /// Ask guests to reboot
    #[command(after_help = verbs::REBOOT_HELP)]
    Reboot(verbs::AskArgs),
    /// Ask guests to shut down
    #[command(after_help = verbs::SHUTDOWN_HELP)]
    Shutdown(verbs::AskArgs),
    /// Stop the virtual CPUs of domains; memory stays
    #[command(after_help = verbs::PAUSE_HELP)]
    Pause(DomainsArgs),
    /// Let paused domains run on
    #[command(after_help = verbs::UNPAUSE_HELP)]
    Unpause(verbs::UnpauseArgs),
    /// Write the memory of domains to disk and stop them
    #[command(after_help = saved::SAVE_HELP)]
    Save(saved::SaveArgs),
    /// Start domains from their saved memory, and from nothing else
    #[command(after_help = saved::RESTORE_HELP)]
    Restore(saved::RestoreArgs),
    /// List the named images of saved domains
    #[command(after_help = saved::IMAGES_HELP)]
    Images,
    /// Throw saved memory away
    #[command(after_help = saved::DISCARD_HELP)]
    Discard(saved::DiscardArgs),
    /// Let domains start with their host, or not
    #[command(after_help = verbs::AUTOSTART_HELP)]
    Autostart(verbs::AutostartArgs),
    /// Reset guests as their reset button would
    #[command(after_help = verbs::RESET_HELP)]
    Reset(DomainsArgs),
    /// Give a domain that is off another name
    #[command(after_help = verbs::RENAME_HELP)]
    Rename(verbs::RenameArgs),
    /// Show a domain's libvirt XML
    #[command(after_help = messages::DESCRIBE_HELP)]
    Describe(messages::DescribeArgs),
    /// Open a guest's serial console on this terminal
    #[command(after_help = console::HELP)]
    Console(console::ConsoleArgs),
    /// Edit a domain's definition in an editor
    #[command(after_help = edit::HELP)]
    Edit(edit::EditArgs),
    /// Set a domain's memory
    #[command(after_help = verbs::MEM_SET_HELP)]
    MemSet(verbs::MemSetArgs),
    /// Set the number of a domain's virtual CPUs
    #[command(after_help = verbs::VCPU_SET_HELP)]
    VcpuSet(verbs::VcpuSetArgs),
    /// Give domains a disk or a network interface
    #[command(
        subcommand,
        after_help = devices::ATTACH_HELP
    )]
    Attach(devices::NewDevice),
    /// Take a disk or a network interface from domains
    #[command(
        subcommand,
        after_help = devices::DETACH_HELP
    )]
    Detach(devices::OldDevice),
    /// Move a running domain to another host
    #[command(after_help = migrate::HELP)]
    Migrate(migrate::MigrateArgs),
    /// Jobs of batch systems: begin them in domains, end them, list them
    #[command(subcommand, after_help = lease::HELP)]
    Lease(lease::Lease),
    /// Let domains give way, until they are resumed
    #[command(after_help = holds::PREEMPT_HELP)]
    Preempt(holds::PreemptArgs),
    /// Let go of domains that were preempted
    #[command(after_help = holds::RESUME_HELP)]
    Resume(holds::ResumeArgs),
    /// Write the memory of domains to disk and give it back, until they are thawed
    #[command(after_help = holds::FREEZE_HELP)]
    Freeze(holds::HoldArgs),
    /// Bring frozen domains back
    #[command(after_help = holds::THAW_HELP)]
    Thaw(holds::ResumeArgs),
    /// Show how domains stand towards jobs
    #[command(after_help = status::HELP)]
    Status(status::StatusArgs),
    /// End the leases of jobs that a batch system has no more
    #[command(after_help = reconcile::HELP)]
    Reconcile(reconcile::ReconcileArgs),
    /// Let hosts take nothing new, or all again
    #[command(subcommand, after_help = maintenance::HELP)]
    Maintenance(maintenance::Maintenance),
    /// Empty hosts: wait for their jobs, then move what runs or shut it down
    #[command(after_help = drain::HELP)]
    Drain(drain::DrainArgs),
    /// Show who owns domains, or change it
    #[command(after_help = metadata::OWNER_HELP)]
    Owner(metadata::OwnerArgs),
    /// Show the labels of domains, or change them
    #[command(after_help = metadata::LABEL_HELP)]
    Label(metadata::LabelArgs),
    /// Show the class of domains, or change it
    #[command(after_help = metadata::CLASS_HELP)]
    Class(metadata::ClassArgs),
    /// Say why somebody may do something, or why not
    #[command(
        override_usage = "rxm explain [OPTIONS] [PRINCIPAL] ACTION [DOMAIN]",
        after_help = rights::EXPLAIN_HELP
    )]
    Explain(rights::QuestionArgs),
    /// Say yes or no: may one do something? For scripts
    #[command(
        override_usage = "rxm can [OPTIONS] [PRINCIPAL] ACTION [DOMAIN]",
        after_help = rights::CAN_HELP
    )]
    Can(rights::QuestionArgs),
    /// Long work: list it, wait for it, give it up
    #[command(
        subcommand,
        after_help = job::HELP
    )]
    Job(job::Job),
    /// Show who you are to each host, until when, and what you may do there
    #[command(after_help = whoami::HELP)]
    Whoami,
    /// Write the completion script of a shell
    #[command(after_help = "\
The tab key then completes commands and options, hosts and groups of the configuration, and domains: those that you may see on the hosts that the line, XMAN_HOSTS or \
    the configuration name, asked for a second at most. Without a ticket there is silence.

Examples:
  rxm completion bash > /etc/bash_completion.d/rxm
  rxm completion zsh > /usr/local/share/zsh/site-functions/_rxm
  rxm completion fish > ~/.config/fish/completions/rxm.fish")]
    Completion {
        /// The shell
        #[arg(value_enum)]
        shell: Shell,
    },
    /// Write the man pages into a folder
    #[command(hide = true)]
    Man {
        /// The folder
        dir: PathBuf,
    },
}

/// Shells with completion.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Shell {
    /// GNU bash
    Bash,
    /// zsh
    Zsh,
    /// fish
    Fish,
}

/// Puts owners to be taken away behind `--`, since their hyphen makes them look like options.
pub(crate) fn owners_behind_dashes(words: impl Iterator<Item = OsString>) -> Vec<OsString> {
    let mut words: Vec<_> = words.collect();
    if !words.iter().any(|word| word == "owner") {
        return words;
    }
    let dashes = words.iter().position(|word| word == "--");
    let behind = dashes.map_or_else(|| vec!["--".into()], |at| words.split_off(at));
    let (gone, mut words): (Vec<_>, Vec<_>) = words
        .into_iter()
        .partition(|word| word.to_str().is_some_and(takes_owner_away));
    if dashes.is_some() || !gone.is_empty() {
        words.extend(behind);
        words.extend(gone);
    }
    words
}

/// Returns whether a word is a name after a hyphen: a full principal, unless it is -H with a group of hosts, and whatever begins like no option.
fn takes_owner_away(word: &str) -> bool {
    let Some(name) = word.strip_prefix('-').filter(|name| !name.starts_with('-')) else {
        return false;
    };
    // Flags without a value can stand before -H.
    let rest = name.trim_start_matches(['q', 'y']);
    let is_group = rest.strip_prefix('H').is_some_and(|hosts| {
        hosts
            .split_once('@')
            .is_some_and(|(before, _)| before.is_empty() || before.ends_with([',', '!', ' ']))
    });
    let is_option = rest.is_empty() || rest.starts_with(['H', 'o', 'h', 'V']);
    !is_option || (!is_group && name.parse::<Principal>().is_ok())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use xman_common::protocol::Verb;

    use super::*;
    use crate::{
        list::Owner,
        options::Format,
        rights::{ACT_FOR, OWN, actions},
    };

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn resume_belongs_to_the_batch_side() {
        assert!(Cli::try_parse_from(["rxm", "suspend", "x"]).is_err());
        let resume = Cli::try_parse_from(["rxm", "resume", "x"]).unwrap();
        assert!(matches!(resume.command, Command::Resume(_)));
        let unpause = Cli::try_parse_from(["rxm", "unpause", "x"]).unwrap();
        assert!(matches!(unpause.command, Command::Unpause(_)));
    }

    #[test]
    fn options_stand_before_and_after_the_command() {
        for line in [
            &["rxm", "-H", "a", "-o", "json", "list"][..],
            &["rxm", "list", "-H", "a", "-o", "json"],
        ] {
            let cli = Cli::try_parse_from(line).unwrap();
            assert_eq!(
                (cli.options.hosts.as_deref(), cli.options.output),
                (Some("a"), Format::Json)
            );
        }
    }

    fn parsed(line: &[&str]) -> Result<Cli, clap::Error> {
        let words = ["rxm"].iter().chain(line).map(OsString::from);
        Cli::try_parse_from(owners_behind_dashes(words))
    }

    #[track_caller]
    fn changes(line: &[&str], domain: &str, expected: &[&str]) -> Options {
        let Cli {
            options,
            command: Command::Owner(args),
        } = parsed(line).unwrap()
        else {
            panic!("no owner")
        };
        assert_eq!(args.domain, domain);
        assert_eq!(args.changes, expected);
        options
    }

    #[test]
    fn an_owner_is_taken_away_in_spite_of_its_hyphen() {
        changes(&["owner", "web"], "web", &[]);
        changes(&["owner", "web", "-bob@R"], "web", &["-bob@R"]);
        changes(&["owner", "web", "--", "-bob@R"], "web", &["-bob@R"]);
        changes(
            &["owner", "web", "--", "+a@R", "-Hb@R"],
            "web",
            &["+a@R", "-Hb@R"],
        );
        let all = [
            "owner",
            "web",
            "-oscar@R",
            "+a@R",
            "-h/x.org@R",
            "--yes",
            "-qo",
            "json",
        ];
        let options = changes(&all, "web", &["+a@R", "-oscar@R", "-h/x.org@R"]);
        assert!(options.yes && options.quiet && options.output == Format::Json);
    }

    #[test]
    fn a_group_of_hosts_is_no_owner() {
        for hosts in ["-H@grid", "-Ha,@grid", "-H@all!@old", "-yH@grid"] {
            let options = changes(&["owner", "web", hosts, "-bob@R"], "web", &["-bob@R"]);
            assert_eq!(
                options.hosts.as_deref(),
                hosts.split_once('H').map(|(_, set)| set)
            );
        }
        changes(&["owner", "web", "-bob", "-q"], "web", &["-bob"]);
        assert!(parsed(&["owner", "web", "-oscar"]).is_err());
        assert!(parsed(&["owner"]).is_err());
        assert!(parsed(&["pause", "web", "-bob@R"]).is_err());
    }

    #[test]
    fn whom_one_acts_for_is_named_in_full() {
        for option in ["--on-behalf-of", "--as"] {
            let cli = parsed(&["list", option, "bob@R"]).unwrap();
            assert_eq!(cli.options.on_behalf_of, "bob@R".parse().ok());
            for bad in ["", "bob"] {
                assert!(parsed(&["list", option, bad]).is_err(), "{bad}");
            }
        }
    }

    #[test]
    fn lists_are_narrowed_by_owner_class_and_label() {
        let line = [
            "list", "--owner", "me", "--class", "grid", "--label", "a=b=c", "--label", "d",
        ];
        let Command::List(args) = parsed(&line).unwrap().command else {
            panic!("no list")
        };
        assert_eq!(args.owner, Some(Owner::Me));
        assert_eq!(args.class, "grid".parse().ok());
        let labels: Vec<_> = args
            .label
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_deref()))
            .collect();
        assert_eq!(labels, [("a", Some("b=c")), ("d", None)]);
        for bad in [["--owner", "bob"], ["--class", "A"], ["--label", "=x"]] {
            assert!(parsed(&[&["list"][..], &bad].concat()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_class_is_given_or_taken_away_and_never_both() {
        assert!(parsed(&["class", "web"]).is_ok());
        assert!(parsed(&["class", "web", "grid"]).is_ok());
        assert!(parsed(&["class", "web", "--none"]).is_ok());
        assert!(parsed(&["class", "web", "grid", "--none"]).is_err());
        assert!(parsed(&["class", "web", "Grid"]).is_err());
    }

    #[test]
    fn an_interface_is_plugged_into_one_thing_and_devices_have_real_names() {
        for good in [
            &["attach", "interface", "web", "--network", "default"][..],
            &[
                "attach",
                "interface",
                "web",
                "--bridge",
                "br0",
                "--mac",
                "52-54-00-AB-00-01",
            ],
            &[
                "attach", "disk", "web", "/x", "--target", "vdb", "--format", "qcow2",
            ],
            &["detach", "disk", "web", "vdb", "--config"],
            &["detach", "interface", "web", "52:54:00:ab:00:01"],
        ] {
            assert!(parsed(good).is_ok(), "{good:?}");
        }
        for bad in [
            &["attach"][..],
            &["attach", "interface", "web"],
            &[
                "attach",
                "interface",
                "web",
                "--network",
                "a",
                "--bridge",
                "b",
            ],
            &["attach", "interface", "web", "--network", "a/b"],
            &["attach", "disk", "web"],
            &["attach", "disk", "web", "/x", "--format", "vmdk"],
            &["attach", "disk", "web", "/x", "--target", "V B"],
            &["detach", "interface", "web", "vdb"],
            &["detach", "interface", "web", "ff:ff:ff:ff:ff:ff"],
        ] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_named_image_stands_in_the_place_of_domains() {
        assert!(parsed(&["save", "web", "--to", "before"]).is_ok());
        assert!(parsed(&["restore", "web", "db", "--paused"]).is_ok());
        assert!(parsed(&["restore", "--from", "a/before", "--paused"]).is_ok());
        assert!(parsed(&["discard", "--image", "before"]).is_ok());
        assert!(parsed(&["autostart", "off", "web"]).is_ok());
        for bad in [
            &["save"][..],
            &["save", "web", "--to", "../x"],
            &["restore"],
            &["restore", "web", "--from", "before"],
            &["discard"],
            &["discard", "web", "--image", "before"],
            &["autostart", "web"],
            &["rename", "web"],
            &["rename", "web", "123e4567-e89b-12d3-a456-426614174000"],
            &["rename", "web", "a/b"],
        ] {
            assert!(parsed(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn every_action_can_be_asked_about() {
        let names: Vec<_> = actions().collect();
        assert_eq!(names.len(), Verb::ALL.len() + 2);
        assert!(names.ends_with(&[OWN, ACT_FOR]));
        assert!(parsed(&["can", "a@R", "pause", "web"]).is_ok());
        assert!(parsed(&["can", "a@R", "pause", "web", "db"]).is_err());
        assert!(parsed(&["explain"]).is_err());
    }

    #[test]
    fn every_command_teaches_by_example() {
        let mut command = Cli::command();
        command.build();
        for command in command
            .get_subcommands()
            .filter(|c| !c.is_hide_set() && c.get_name() != "help")
        {
            let help = command
                .get_after_help()
                .map(ToString::to_string)
                .unwrap_or_default();
            assert!(help.contains("Examples:"), "{}", command.get_name());
        }
        let lease = command.find_subcommand("lease").unwrap();
        for part in lease.get_subcommands().filter(|c| c.get_name() != "help") {
            let help = part.get_after_help().map(ToString::to_string);
            assert!(
                help.is_some_and(|help| help.contains("Examples:")),
                "lease {}",
                part.get_name()
            );
        }
    }
}
