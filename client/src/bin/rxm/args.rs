//! The command line: help, completion and man pages are made of it.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum, builder::styling};
use uuid::Uuid;
use xman_common::name::HostName;
use xman_common::protocol::DomainState;

use crate::units::{bandwidth, duration, memory_kib, milliseconds};

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

Output:
  table and wide are for people.
  json and yaml are one array of objects with `host` in each; a host that could
  not be asked is {\"host\": ..., \"error\": {\"code\": ..., \"message\": ...}}.
  Field names are stable; numbers carry their unit in the name (memory_kib).
  What changes domains prints for each the fields of list, and `verb`.
  name prints one HOST/NAME a line (NAME alone where there is one host).

Exit codes:
  0    all done
  1    refused or failed
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

/// What holds for every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of all commands")]
pub(crate) struct Options {
    /// The hosts to ask: a list such as 'skirit[80-84],skurut68' or '@group'
    #[arg(
        short = 'H',
        long,
        global = true,
        value_name = "HOSTS",
        env = "XMAN_HOSTS",
        hide_env_values = true
    )]
    pub(crate) hosts: Option<String>,
    /// How the answer is written
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,
    /// How long each host may take, as 10s or 2m; a bare number means seconds
    #[arg(long, global = true, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// How often at most a host that is busy or unreachable is tried
    #[arg(long, global = true, value_name = "TRIES", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) retries: u32,
    /// The host's hypervisor, where it has several, by libvirt URI (rxm info lists them)
    #[arg(long, global = true, value_name = "URI")]
    pub(crate) hypervisor: Option<String>,
    /// Do not ask before a pattern changes several domains
    #[arg(short, long, global = true)]
    pub(crate) yes: bool,
    /// Show what would be done to what, and whether one may; change nothing
    #[arg(long, global = true)]
    pub(crate) dry_run: bool,
    /// Say nothing of what went well
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Tables without their first line
    #[arg(long, global = true)]
    pub(crate) no_headers: bool,
    /// Colours; auto means on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t = When::Auto, value_name = "WHEN")]
    pub(crate) color: When,
}

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table for people
    Table,
    /// A table with more columns
    Wide,
    /// One array of objects
    Json,
    /// The same as YAML
    Yaml,
    /// One name a line
    Name,
}

/// When colours are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// List domains
    #[command(
        visible_alias = "ls",
        after_help = "\
Examples:
  rxm -H skirit80 list
  rxm list 'grid-*' --state running,paused
  rxm list skirit80/web -o wide
  rxm -H @grid -o name list --state off

A row that is marked stale is what xmand last heard from a libvirt that is silent.

JSON: host, name, uuid, hypervisor, id (null when off), state, reason, memory_kib, max_memory_kib, vcpus, max_vcpus, cpu_time_ns, \
    autostart, persistent, age_ms, stale."
    )]
    List(ListArgs),
    /// Show a host: processors, memory, hypervisors, load
    #[command(after_help = "\
Examples:
  rxm -H skirit80 info
  rxm -H @grid info

JSON: host, hostname, xmand, hypervisors (uri, driver, version, libvirt, trouble, age_ms), cpu_model, cpus, mhz, memory_kib, \
    free_memory_kib, load (three numbers), active, domains, used_vcpus, used_memory_kib, stuck_lanes.")]
    Info,
    /// Show the hypervisor's messages, or the hypervisor's log of one domain
    #[command(after_help = "\
Examples:
  rxm -H skirit80 dmesg
  rxm dmesg skirit80/web
  rxm -H skirit80 dmesg -f")]
    Dmesg(DmesgArgs),
    /// Make a domain from libvirt XML and start it
    #[command(after_help = "\
Without --define the domain is gone when it ends.

Examples:
  rxm -H skirit80 create web.xml
  rxm -H skirit80 create --define web.xml
  virsh dumpxml web | rxm -H skirit80 create --paused -")]
    Create(CreateArgs),
    /// Start defined domains
    #[command(after_help = "\
Examples:
  rxm start skirit80/web
  rxm -H skirit80 start web db
  rxm -H @grid start 'grid-*' --dry-run")]
    Start(StartArgs),
    /// Store a domain's definition from libvirt XML
    #[command(after_help = "\
Examples:
  rxm -H skirit80 define web.xml
  rxm -H skirit80 define - < web.xml")]
    Define(DefineArgs),
    /// Remove definitions
    #[command(after_help = "\
A running domain goes on until it ends. Disks are never touched.

Examples:
  rxm undefine skirit80/web
  rxm undefine --discard-saved --discard-nvram skirit80/web")]
    Undefine(UndefineArgs),
    /// Stop domains at once, as if the plug was pulled
    #[command(after_help = "\
The guest is not asked and may lose data; 'rxm shutdown' asks it.

Examples:
  rxm destroy skirit80/web
  rxm -H @grid destroy 'grid-*' --yes")]
    Destroy(DomainsArgs),
    /// Ask guests to reboot
    #[command(after_help = "\
Examples:
  rxm reboot skirit80/web
  rxm reboot --wait --timeout 2m skirit80/web
  rxm reboot --force skirit80/web        reset at once, without asking the guest")]
    Reboot(AskArgs),
    /// Ask guests to shut down
    #[command(after_help = "\
Examples:
  rxm shutdown skirit80/web
  rxm shutdown --wait --timeout 5m skirit80/web
  rxm shutdown --force --timeout 1m skirit80/web        pull the plug if it has not gone after a minute")]
    Shutdown(AskArgs),
    /// Stop the virtual CPUs of domains; memory stays
    #[command(after_help = "\
Examples:
  rxm pause skirit80/web
  rxm -H skirit80 pause 'grid-*' --yes")]
    Pause(DomainsArgs),
    /// Let paused domains run on
    #[command(after_help = "\
Examples:
  rxm unpause skirit80/web")]
    Unpause(DomainsArgs),
    /// Show a domain's libvirt XML
    #[command(after_help = "\
Examples:
  rxm describe skirit80/web
  rxm describe --inactive skirit80/web > web.xml
  rxm describe --secrets skirit80/web        with passwords, for whom may see them")]
    Describe(DescribeArgs),
    /// Edit a domain's definition in an editor
    #[command(after_help = "\
VISUAL, EDITOR or vi opens the definition. What cannot be stored is offered again, and never lost. \
    A running domain takes the change over when it is started next.

Examples:
  rxm edit skirit80/web
  EDITOR=nano rxm edit skirit80/web")]
    Edit(EditArgs),
    /// Set a domain's memory
    #[command(after_help = "\
Sizes: K, M, G and T are powers of 1024 as for xm (2G = 2GiB = 2048M); a bare number means MiB. \
    The guest gives memory back by and by, and only if it has a balloon driver.

Examples:
  rxm mem-set skirit80/web 2G
  rxm mem-set skirit80/web 512MiB --config        in the definition too
  rxm mem-set skirit80/web 8G --max               the most it can have, from its next start on")]
    MemSet(MemSetArgs),
    /// Set the number of a domain's virtual CPUs
    #[command(after_help = "\
Examples:
  rxm vcpu-set skirit80/web 4
  rxm vcpu-set skirit80/web 4 --config
  rxm vcpu-set skirit80/web 8 --max        the most it can have, from its next start on")]
    VcpuSet(VcpuSetArgs),
    /// Move a running domain to another host
    #[command(after_help = "\
The domain runs on while it moves; on any failure it stays where it was. The migration is a job: it goes on \
    when you interrupt rxm, and 'rxm job' finds it again.

Examples:
  rxm migrate skirit80/web skirit81
  rxm migrate skirit80/web skirit81 --bandwidth 100MiB --downtime 300ms
  rxm migrate skirit80/web skirit81 --detach
  rxm migrate skirit80/web --abort")]
    Migrate(MigrateArgs),
    /// Long work: list it, wait for it, give it up
    #[command(
        subcommand,
        after_help = "\
Examples:
  rxm -H @grid job list
  rxm -H @grid job wait 2c8c1f0e-4a56-4f0c-9d0b-0f4f6f0f3c11
  rxm job cancel skirit80/2c8c1f0e-4a56-4f0c-9d0b-0f4f6f0f3c11"
    )]
    Job(Job),
    /// Show who you are to each host, until when, and what you may do there
    #[command(after_help = "\
Examples:
  rxm -H skirit80 whoami
  rxm -H @grid -o json whoami

JSON: host, principal, service (the host's principal that was really used), until_s (seconds since 1970), rule, verbs, session, xmand.")]
    Whoami,
    /// Write the completion script of a shell
    #[command(after_help = "\
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

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// Only domains in these states, as running,paused
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = state)]
    pub(crate) state: Vec<DomainState>,
}

/// Arguments of `dmesg`.
#[derive(Debug, Args)]
pub(crate) struct DmesgArgs {
    /// NAME, UUID or HOST/NAME: its hypervisor log instead of the hypervisor's messages
    pub(crate) domain: Option<String>,
    /// Go on with what comes
    #[arg(short, long)]
    pub(crate) follow: bool,
}

/// Arguments of `create`.
#[derive(Debug, Args)]
pub(crate) struct CreateArgs {
    /// The XML; - means standard input
    pub(crate) file: PathBuf,
    /// Keep the definition when the domain ends
    #[arg(long)]
    pub(crate) define: bool,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `define`.
#[derive(Debug, Args)]
pub(crate) struct DefineArgs {
    /// The XML; - means standard input
    pub(crate) file: PathBuf,
}

/// Arguments of `undefine`.
#[derive(Debug, Args)]
pub(crate) struct UndefineArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Also throw away the saved image of a saved domain
    #[arg(long)]
    pub(crate) discard_saved: bool,
    /// Also throw away the firmware's variables
    #[arg(long)]
    pub(crate) discard_nvram: bool,
}

/// One domain or several.
#[derive(Debug, Args)]
pub(crate) struct DomainsArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    #[arg(value_name = "DOMAIN", required = true)]
    pub(crate) domains: Vec<String>,
}

/// Arguments of `shutdown` and `reboot`.
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Wait until the guest has done it, as long as --timeout allows
    #[arg(long)]
    pub(crate) wait: bool,
    /// shutdown: pull the plug if the guest has not gone by --timeout; reboot: reset at once without asking the guest
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `describe`.
#[derive(Debug, Args)]
pub(crate) struct DescribeArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The definition rather than what runs
    #[arg(long)]
    pub(crate) inactive: bool,
    /// With passwords and other secrets
    #[arg(long)]
    pub(crate) secrets: bool,
}

/// Arguments of `edit`.
#[derive(Debug, Args)]
pub(crate) struct EditArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
}

/// Arguments of `mem-set`.
#[derive(Debug, Args)]
pub(crate) struct MemSetArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// As 2G or 512MiB; a bare number means MiB
    #[arg(value_name = "SIZE", value_parser = memory_kib)]
    pub(crate) kib: u64,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
    /// The most it can have, in the definition, rather than what it has now
    #[arg(long)]
    pub(crate) max: bool,
}

/// Arguments of `vcpu-set`.
#[derive(Debug, Args)]
pub(crate) struct VcpuSetArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// How many
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) count: u32,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
    /// The most it can have, in the definition, rather than what it has now
    #[arg(long)]
    pub(crate) max: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The host to move it to, as the source host knows it
    #[arg(value_name = "DEST", required_unless_present = "abort")]
    pub(crate) destination: Option<HostName>,
    /// At most so much a second, as 100MiB
    #[arg(long, value_name = "SIZE", value_parser = bandwidth, conflicts_with = "abort")]
    pub(crate) bandwidth: Option<u64>,
    /// At most so long a silence when it changes over, as 300ms
    #[arg(long, value_name = "TIME", value_parser = milliseconds, conflicts_with = "abort")]
    pub(crate) downtime: Option<u64>,
    /// Return as soon as it is under way, and print the job's id
    #[arg(long, conflicts_with = "abort")]
    pub(crate) detach: bool,
    /// Give up the migration that is under way
    #[arg(long, conflicts_with = "destination")]
    pub(crate) abort: bool,
}

/// What to do with jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// List the jobs that hosts remember
    #[command(after_help = "\
JSON: host, id, principal, verb, domain, uuid, detail, state, result, began_ms, ended_ms, progress (phase, percent, done_bytes, remaining_bytes, \
    total_bytes, rate_bytes_per_s, elapsed_ms, eta_ms) or null.")]
    List,
    /// Wait for a job and show how far it is
    Wait {
        /// ID or HOST/ID
        #[arg(value_name = "ID")]
        job: String,
    },
    /// Give up a job
    Cancel {
        /// ID or HOST/ID
        #[arg(value_name = "ID")]
        job: String,
    },
}

fn state(text: &str) -> Result<DomainState, String> {
    let found = DomainState::ALL
        .iter()
        .copied()
        .find(|state| state.name() == text);
    found.ok_or_else(|| {
        let names: Vec<_> = DomainState::ALL.iter().map(|state| state.name()).collect();
        format!("states are {}", names.join(", "))
    })
}

/// Reads the id of a job.
pub(crate) fn job_id(text: &str) -> Result<Uuid, String> {
    Uuid::try_parse(text).map_err(|_| format!("'{text}' is no job id; `rxm job list` shows them"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn resume_belongs_to_the_batch_side() {
        for reserved in [
            "resume", "suspend", "freeze", "thaw", "save", "restore", "preempt",
        ] {
            assert!(
                Cli::try_parse_from(["rxm", reserved, "x"]).is_err(),
                "{reserved}"
            );
        }
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
    }
}
