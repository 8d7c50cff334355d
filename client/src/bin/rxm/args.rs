//! The command line: help, completion and man pages are made of it.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{PossibleValue, StringValueParser, TypedValueParser, styling},
};
use uuid::Uuid;
use xman_client::Address;
use xman_common::{
    name::{DomainName, LinkName, Mac, Principal, Tag},
    protocol::{DomainState, Verb},
};

use crate::{
    console::Escape,
    drain, holds, lease, maintenance, reconcile, status,
    units::{bandwidth, duration, memory_kib, milliseconds},
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

const CONSOLE_HELP: &str = "\
The first who comes has the keyboard; who comes later reads along. --force takes the keyboard over, and everybody \
    there is told. When who types leaves, the keyboard goes to who has waited longest.

Ctrl-] leaves at once, also in the middle of a paste; the guest stays as it is, logged in or not. Every other key goes to the guest, \
    Ctrl-C and Ctrl-Z too. --escape chooses another key, for a guest that needs Ctrl-].

A guest can write anything to your terminal, as with virsh console or a serial line: `reset` mends a terminal that it \
    left in disorder. The window's size is not told to the guest unless you tell it, and resizing types nothing.

Without a terminal on standard input, what is piped is typed, and what the guest writes is printed until it ends or \
    --timeout is over.

Examples:
  rxm console skirit80/web
  rxm console --force skirit80/web
  rxm console --log web.log skirit80/web
  echo uptime | rxm console --timeout 5s skirit80/web";

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
    /// Act for somebody else, with that person's rights alone, where the host lets you
    #[arg(
        long,
        visible_alias = "as",
        global = true,
        value_name = "PRINCIPAL",
        env = "XMAN_ON_BEHALF_OF",
        hide_env_values = true
    )]
    pub(crate) on_behalf_of: Option<Principal>,
    /// The host's hypervisor, where it has several: libvirt URI or driver, as lxc (rxm info lists them)
    #[arg(long, global = true, value_name = "URI|DRIVER")]
    pub(crate) hypervisor: Option<String>,
    /// Do not ask before a pattern changes several domains, or several hosts are changed
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
  rxm -H @grid list --owner me
  rxm -H @grid list --class grid --label project=alpha

A row that is marked stale is what xmand last heard from a libvirt that is silent. One whose owners are marked unreadable is nobody's until an \
    administrator has mended its metadata; a line on stderr says how.

Where the rows come from several hypervisors a column names the driver of each (-o wide: the URI). One that is broken or silent is told of on \
    stderr, with exit code 5, and hides nothing of the others; in JSON it is an object of host, hypervisor and error (code, message).

JSON: host, name, uuid, hypervisor, id (null when off), state, reason, memory_kib, max_memory_kib, vcpus, max_vcpus, cpu_time_ns, \
    autostart, persistent, saved (whether a saved memory waits for its next start), since_ms (when this state began in milliseconds since 1970; null \
    where it was before xmand came to look), standing (towards jobs; null where it takes no part), preempted_ms, owners (a list), class (or null), labels (an object), metadata_trouble (why these three cannot be read; \
    usually empty), age_ms, stale."
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
    /// Follow what happens to domains
    #[command(after_help = "\
Prints a line for each event: when, where, to which domain, what, why (in libvirt's words), and the domain's state when the host had looked. \
    It goes on until Ctrl-C, which is no failure; a host that breaks away is called again and gone on with where it was.

A host keeps its last events, so that nothing is missed in between: a cursor is a place among them. What a host cannot tell any more, \
    or could not see, is said in a line of its own ('gap'): look with 'rxm list' then. \
    With --cursor-file a program that is started again goes on where it ended; after a crash it may see the last second twice.

Examples:
  rxm -H skirit80 events
  rxm -H @grid events 'grid-*' -o json
  rxm -H @grid -o json events --cursor-file /var/lib/mine/cursors
  rxm -H skirit80 events --all --no-follow        what the host still knows
  rxm -H skirit80 events --since 67e5504410b1426f9247bb680e5fe0c8.17

JSON is one object a line: host, time (UTC), domain, uuid, hypervisor, event (defined, undefined, renamed, started, paused, resumed, \
    shutting-down, stopped, sleeping, crashed, rebooted, labelled, found, standing (towards jobs)), detail, state, cursor; what is missing has gap (why) in place of \
    domain, uuid, event, detail and state, and a hypervisor that is null where all are meant. A host that is given up has error.")]
    Events(EventsArgs),
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
  rxm unpause skirit80/web
  rxm unpause --force skirit81/web        it came from a host that is lost before it could say that web was gone there")]
    Unpause(UnpauseArgs),
    /// Write the memory of domains to disk and stop them
    #[command(after_help = "\
The next 'rxm start' or 'rxm restore' goes on from where the guest was. Without --to the memory is in the image that libvirt keeps with the domain; \
    --to makes a named one, which stays until it is used, and is used once. Saving is a job: it goes on when you interrupt rxm, 'rxm job cancel' gives \
    it up, and the guest runs on then.

Examples:
  rxm save skirit80/web
  rxm -H @grid save 'grid-*' --yes
  rxm save --to before-upgrade skirit80/web
  rxm save --detach skirit80/web")]
    Save(SaveArgs),
    /// Start domains from their saved memory, and from nothing else
    #[command(after_help = "\
Where there is no saved memory, or it is damaged, nothing is started: 'rxm start' boots. A guest that was paused when it was saved runs on as well, \
    unless you say --paused. --from takes a named image, which is used up by that.

Examples:
  rxm restore skirit80/web
  rxm -H skirit80 restore 'grid-*' --yes
  rxm restore --from skirit80/before-upgrade")]
    Restore(RestoreArgs),
    /// List the named images of saved domains
    #[command(after_help = "\
You see the images of the domains that you may see; those of domains that are gone only administrators see.

Examples:
  rxm -H skirit80 images
  rxm -H @grid images -o wide

JSON: host, image, domain, uuid, hypervisor, bytes, saved_ms (when it was saved, milliseconds since 1970).")]
    Images,
    /// Throw saved memory away
    #[command(after_help = "\
What the guest had in its memory is lost; its disks are not touched.

Examples:
  rxm discard skirit80/web
  rxm discard --image skirit80/before-upgrade")]
    Discard(DiscardArgs),
    /// Let domains start with their host, or not
    #[command(after_help = "\
Examples:
  rxm autostart on skirit80/web
  rxm -H @grid autostart off 'grid-*' --yes")]
    Autostart(AutostartArgs),
    /// Reset guests as their reset button would
    #[command(after_help = "\
The guest is not asked and may lose data; 'rxm reboot' asks it. This takes the right to destroy as well.

Examples:
  rxm reset skirit80/web")]
    Reset(DomainsArgs),
    /// Give a domain that is off another name
    #[command(after_help = "\
One must be allowed to rename the domain as it is called, and as it would be called.

Examples:
  rxm rename skirit80/web web-old")]
    Rename(RenameArgs),
    /// Show a domain's libvirt XML
    #[command(after_help = "\
Examples:
  rxm describe skirit80/web
  rxm describe --inactive skirit80/web > web.xml
  rxm describe --secrets skirit80/web        with passwords, for whom may see them")]
    Describe(DescribeArgs),
    /// Open a guest's serial console on this terminal
    #[command(after_help = CONSOLE_HELP)]
    Console(ConsoleArgs),
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
    /// Give domains a disk or a network interface
    #[command(
        subcommand,
        after_help = "\
Disks lie below folders that the host's administrator has named ([devices] in xmand.toml), and interfaces go to networks and bridges named there.

Examples:
  rxm attach disk skirit80/web /var/lib/libvirt/images/data.raw
  rxm attach disk skirit80/web /var/lib/libvirt/images/data.qcow2 --format qcow2 --target vdc --config
  rxm attach disk skirit80/web /var/lib/libvirt/images/debian.iso --cdrom --config
  rxm attach interface skirit80/web --network default
  rxm attach interface skirit80/web --bridge br0 --mac 52:54:00:12:34:56 --model virtio --config

JSON: the fields of list, verb, and device: the disk's name in the guest, or the interface's address."
    )]
    Attach(NewDevice),
    /// Take a disk or a network interface from domains
    #[command(
        subcommand,
        after_help = "\
A guest that runs is asked to let go of it, and waited for as long as --timeout allows.

Examples:
  rxm detach disk skirit80/web vdb
  rxm detach disk skirit80/web vdb --config        from the definition too
  rxm detach interface skirit80/web 52:54:00:12:34:56"
    )]
    Detach(OldDevice),
    /// Move a running domain to another host
    #[command(after_help = "\
The domain runs on while it moves; on any failure it stays where it was. Its memory travels through the Kerberos channel between the two hosts: you need \
    the right to 'migrate' on the one and to 'migrate-in' on the other, and the hosts must be peers of each other. The migration is a job: it goes on \
    when you interrupt rxm, and 'rxm job' finds it again.

Examples:
  rxm migrate skirit80/web skirit81
  rxm migrate skirit80/web skirit81 --bandwidth 100MiB --downtime 300ms
  rxm migrate skirit80/web skirit81 --detach
  rxm migrate skirit80/web skirit81 --direct
  rxm migrate skirit80/web --abort")]
    Migrate(MigrateArgs),
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
    #[command(after_help = "\
What an owner may do is up to each host's rules. An owner's name is a full Kerberos principal, as klist shows it; + adds it and - takes it away. \
    A name that begins with H and could be read as -H stands after --.

Examples:
  rxm owner skirit80/web
  rxm owner skirit80/web +alice@EXAMPLE.ORG -bob@EXAMPLE.ORG
  rxm owner 'grid-*' +alice@EXAMPLE.ORG --dry-run")]
    Owner(OwnerArgs),
    /// Show the labels of domains, or change them
    #[command(after_help = "\
KEY=VALUE sets a label, KEY- takes it away. Keys are small letters, digits, '.', '-' and '_'.

Examples:
  rxm label skirit80/web
  rxm label skirit80/web project=alpha tier=front
  rxm label skirit80/web tier-
  rxm label 'grid-*' project=alpha --yes")]
    Label(LabelArgs),
    /// Show the class of domains, or change it
    #[command(after_help = "\
A class says what kind of work a domain is for; hosts have rules for their classes.

Examples:
  rxm class skirit80/web
  rxm class skirit80/web grid
  rxm class skirit80/web --none")]
    Class(ClassArgs),
    /// Say why somebody may do something, or why not
    #[command(
        override_usage = "rxm explain [OPTIONS] [PRINCIPAL] ACTION [DOMAIN]",
        after_help = "\
Tells the decision, the rule behind it, what each of the host's backends says, and what would have to be true. Without a domain it is about the host, or about a domain \
    that nobody owns. \
    'own' asks whether one owns what one creates; 'act-for' takes a principal in the domain's place. \
    With one host, a name is asked about as typed: so you learn why you may not, even if you may not see whether it is there. \
    The question that was answered ends with 0, whatever the answer.

Examples:
  rxm explain pause skirit80/web
  rxm explain bob@EXAMPLE.ORG destroy skirit80/web        as far as you may ask about others
  rxm -H @grid explain create
  rxm -H skirit80 explain act-for carol@EXAMPLE.ORG

JSON: host, principal, action, domain (null for the host), allowed, backend (that decided, or null), rule, \
    steps (backend, opinion: allow, deny, none or not-asked, because, wants)."
    )]
    Explain(QuestionArgs),
    /// Say yes or no: may one do something? For scripts
    #[command(
        override_usage = "rxm can [OPTIONS] [PRINCIPAL] ACTION [DOMAIN]",
        after_help = "\
Prints yes or no (nothing with --quiet) and ends with 0 or 1. Of several hosts all must allow it. \
    Where a host does not answer and no other says no, it ends as always: 3, 4 or 5.

Examples:
  rxm can pause skirit80/web
  rxm -H skirit80 can -q create && rxm -H skirit80 create web.xml
  rxm can bob@EXAMPLE.ORG start skirit80/web

JSON is that of explain."
    )]
    Can(QuestionArgs),
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
  rxm -H skirit80 --on-behalf-of bob@EXAMPLE.ORG whoami

JSON: host, principal, service (the host's principal that was really used), until_s (seconds since 1970), rule, verbs, groups (your \
    Unix groups there, where rules may go by them), acting (who acts for the principal, or null), session, xmand.")]
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

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// Only domains in these states, as running,paused
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = state)]
    pub(crate) state: Vec<DomainState>,
    /// Only domains that this principal owns; 'me' is who you are
    #[arg(long, value_name = "PRINCIPAL", value_parser = owner)]
    pub(crate) owner: Option<Owner>,
    /// Only domains of this class
    #[arg(long)]
    pub(crate) class: Option<Tag>,
    /// Only domains with this label, or with this value of it; all of several
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = label)]
    pub(crate) label: Vec<(Tag, Option<String>)>,
}

/// Whose domains are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The caller's, or whose the caller acts for.
    Me,
    /// Somebody's.
    One(Principal),
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

/// Arguments of `events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// First what has happened since that cursor; of several hosts each has its own
    #[arg(
        long,
        value_name = "[HOST=]CURSOR",
        conflicts_with_all = ["cursor_file", "all"]
    )]
    pub(crate) since: Vec<String>,
    /// Go on from the cursors in this file where it has them, and keep it up to date
    #[arg(long, value_name = "FILE")]
    pub(crate) cursor_file: Option<PathBuf>,
    /// First all that the hosts still know of, where there is no cursor
    #[arg(long)]
    pub(crate) all: bool,
    /// End with what has happened up to now
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// End after so many events
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
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

/// Arguments of `unpause`.
#[derive(Debug, Args)]
pub(crate) struct UnpauseArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Also where the other host of its last journey has not said where it runs: only for a host that is lost, with the right to destroy
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `save`.
#[derive(Debug, Args)]
pub(crate) struct SaveArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// To this named image in the host's state directory, rather than to the one that libvirt keeps with the domain
    #[arg(long, value_name = "IMAGE")]
    pub(crate) to: Option<Tag>,
    /// Return as soon as it is under way, and print the job's id
    #[arg(long)]
    pub(crate) detach: bool,
}

/// Arguments of `restore`.
#[derive(Debug, Args)]
pub(crate) struct RestoreArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    #[arg(value_name = "DOMAIN", required_unless_present = "from")]
    pub(crate) domains: Vec<String>,
    /// From a named image, as IMAGE or HOST/IMAGE
    #[arg(long, value_name = "IMAGE", conflicts_with = "domains")]
    pub(crate) from: Option<String>,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `discard`.
#[derive(Debug, Args)]
pub(crate) struct DiscardArgs {
    /// NAME, UUID, HOST/NAME or shell pattern: the memory that libvirt keeps for it
    #[arg(value_name = "DOMAIN", required_unless_present = "image")]
    pub(crate) domains: Vec<String>,
    /// A named image, as IMAGE or HOST/IMAGE
    #[arg(long, value_name = "IMAGE", conflicts_with = "domains")]
    pub(crate) image: Option<String>,
}

/// Arguments of `autostart`.
#[derive(Debug, Args)]
pub(crate) struct AutostartArgs {
    /// Whether they start with their host from now on
    #[arg(value_enum)]
    pub(crate) switch: Switch,
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// They do
    On,
    /// They do not
    Off,
}

/// Arguments of `rename`.
#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// Its new name
    #[arg(value_name = "NEWNAME")]
    pub(crate) name: DomainName,
}

/// Arguments of `shutdown` and `reboot`.
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Wait until the guest has done it, as long as --timeout allows
    #[arg(long)]
    pub(crate) wait: bool,
    /// shutdown: pull the plug if the guest has not gone by --timeout; reboot: reset at once without asking the guest. Takes the right to destroy
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

/// Arguments of `console`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// Take the keyboard over from whoever has it, also from another program on the host
    #[arg(long)]
    pub(crate) force: bool,
    /// Append all that the guest writes to a file, as it comes
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// The key that leaves: ^] or another ^X, one character, or none
    #[arg(short, long, value_name = "KEY", default_value = "^]", value_parser = Escape::parse)]
    pub(crate) escape: Escape,
    /// Type `stty rows R cols C` with this window's size at the beginning: for a guest that is at a shell's prompt
    #[arg(long)]
    pub(crate) size: bool,
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

/// What domains get.
#[derive(Debug, Subcommand)]
pub(crate) enum NewDevice {
    /// A disk: an image or a block device of the host
    Disk(NewDisk),
    /// A network interface
    Interface(NewInterface),
}

/// What domains lose.
#[derive(Debug, Subcommand)]
pub(crate) enum OldDevice {
    /// A disk
    Disk {
        /// NAME, UUID or HOST/NAME
        domain: String,
        /// Its name in the guest, as vdb
        #[arg(value_name = "TARGET")]
        target: Tag,
        /// From the definition too (of a domain that is off: from there only)
        #[arg(long)]
        config: bool,
    },
    /// A network interface
    Interface {
        /// NAME, UUID or HOST/NAME
        domain: String,
        /// Its address, as 52:54:00:12:34:56
        #[arg(value_name = "MAC")]
        mac: Mac,
        /// From the definition too (of a domain that is off: from there only)
        #[arg(long)]
        config: bool,
    },
}

/// Arguments of `attach disk`.
#[derive(Debug, Args)]
pub(crate) struct NewDisk {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The image or block device, by its absolute path on the host
    #[arg(value_name = "PATH")]
    pub(crate) path: String,
    /// Its name in the guest: vdb is a virtio disk, sdb SCSI, hdb IDE, xvdb Xen's [default: the next free one]
    #[arg(long)]
    pub(crate) target: Option<Tag>,
    /// The format of the image; it is never guessed
    #[arg(long, value_enum, default_value_t = ImageFormat::Raw)]
    pub(crate) format: ImageFormat,
    /// The guest may only read it
    #[arg(long)]
    pub(crate) read_only: bool,
    /// Other domains may have it as well, each of them with this option; only raw images
    #[arg(long)]
    pub(crate) shareable: bool,
    /// It is a CD-ROM
    #[arg(long)]
    pub(crate) cdrom: bool,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
}

/// Formats of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum ImageFormat {
    /// Bytes as they are
    Raw,
    /// QEMU's own
    Qcow2,
}

/// Arguments of `attach interface`.
#[derive(Debug, Args)]
pub(crate) struct NewInterface {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// One of libvirt's networks that it is plugged into
    #[arg(long, value_name = "NAME", required_unless_present = "bridge")]
    pub(crate) network: Option<LinkName>,
    /// A bridge of the host that it is plugged into
    #[arg(long, value_name = "NAME", conflicts_with = "network")]
    pub(crate) bridge: Option<LinkName>,
    /// Its address [default: the host makes one up]
    #[arg(long)]
    pub(crate) mac: Option<Mac>,
    /// The kind of card that the guest sees, as virtio or e1000 [default: the hypervisor's own]
    #[arg(long)]
    pub(crate) model: Option<Tag>,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
}

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The host to move it to, HOST or HOST:PORT, as both you and the source host know it
    #[arg(value_name = "DEST", required_unless_present = "abort")]
    pub(crate) destination: Option<Address>,
    /// Let the two libvirts talk directly, over the network that the source host's configuration trusts
    #[arg(long, conflicts_with = "abort")]
    pub(crate) direct: bool,
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

/// Arguments of `owner`.
#[derive(Debug, Args)]
pub(crate) struct OwnerArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// +PRINCIPAL makes an owner, -PRINCIPAL takes one away; without any, shows who owns it
    #[arg(value_name = "+PRINCIPAL|-PRINCIPAL")]
    pub(crate) changes: Vec<String>,
}

/// Arguments of `label`.
#[derive(Debug, Args)]
pub(crate) struct LabelArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// KEY=VALUE sets a label, KEY- takes it away; without any, shows them
    #[arg(value_name = "KEY=VALUE|KEY-")]
    pub(crate) changes: Vec<String>,
}

/// Arguments of `class`.
#[derive(Debug, Args)]
pub(crate) struct ClassArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// The class it gets; without, shows which it has
    #[arg(conflicts_with = "none")]
    pub(crate) class: Option<Tag>,
    /// Take it out of its class
    #[arg(long)]
    pub(crate) none: bool,
}

/// Arguments of `explain` and `can`.
#[derive(Debug, Args)]
pub(crate) struct QuestionArgs {
    /// The words of the question.
    #[arg(
        value_name = "QUESTION",
        required = true,
        num_args = 1..=3,
        value_parser = WordParser,
        help = "[PRINCIPAL] ACTION [DOMAIN]: whose right (a full principal; your own without), to do what, to which domain (NAME, UUID or HOST/NAME)"
    )]
    pub(crate) words: Vec<String>,
}

/// Takes any word, and offers the actions to shells.
#[derive(Clone)]
struct WordParser;

impl TypedValueParser for WordParser {
    type Value = String;

    fn parse_ref(
        &self,
        command: &clap::Command,
        arg: Option<&clap::Arg>,
        value: &std::ffi::OsStr,
    ) -> Result<String, clap::Error> {
        StringValueParser::new().parse_ref(command, arg, value)
    }

    fn possible_values(&self) -> Option<Box<dyn Iterator<Item = PossibleValue> + '_>> {
        Some(Box::new(actions().map(PossibleValue::new)))
    }
}

/// Returns all that policies decide about: the verbs, and what is no call.
pub(crate) fn actions() -> impl Iterator<Item = &'static str> {
    let verbs = Verb::ALL.iter().map(|verb| verb.name());
    verbs.chain([OWN, ACT_FOR])
}

/// To own what one creates.
const OWN: &str = "own";
/// To act for somebody else, who is named in the domain's place.
pub(crate) const ACT_FOR: &str = "act-for";

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

fn owner(text: &str) -> Result<Owner, String> {
    match text {
        "me" => Ok(Owner::Me),
        _ => text
            .parse()
            .map(Owner::One)
            .map_err(|error: xman_common::name::BadName| error.to_string()),
    }
}

fn label(text: &str) -> Result<(Tag, Option<String>), String> {
    let (key, value) = text
        .split_once('=')
        .map_or((text, None), |(key, value)| (key, Some(value.to_owned())));
    let key = key
        .parse()
        .map_err(|error: xman_common::name::BadName| error.to_string())?;
    Ok((key, value))
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
