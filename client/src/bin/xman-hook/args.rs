//! The command line.

use std::{ffi::OsString, path::PathBuf, time::Duration};

use clap::{Args, Parser, Subcommand, ValueEnum};
use jiff::SignedDuration;
use xman_client::{
    Address,
    name::{DomainRef, LabelValue, Principal, Tag},
    protocol::Depth,
};

/// Tells hosts that run xmand what a batch system does with its jobs: one subcommand a batch system.
#[derive(Debug, Parser)]
#[command(
    name = "xman-hook",
    version,
    about,
    after_help = "\
A batch system that calls programs without arguments calls links to this one: xman-slurm-prolog is `xman-hook slurm prolog`, and so on for
every hook. `xman-hook SYSTEM --exit-codes` shows what each ends with, and what the batch system makes of it.

SIGTERM ends a hook at once: what it may have begun is ended later by the next one, or by `xman-hook deliver`."
)]
pub(crate) struct Cli {
    /// The configuration.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        default_value = "/etc/xman/hook.toml"
    )]
    pub(crate) config: PathBuf,
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Slurm's prologs and epilogs, its power saving, and a service that follows its suspended jobs.
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Slurm {
        #[command(flatten)]
        codes: Codes,
        #[command(subcommand)]
        hook: Option<Slurm>,
    },
    /// Grid Engine's prolog, epilog and methods.
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Sge {
        #[command(flatten)]
        codes: Codes,
        #[command(subcommand)]
        hook: Option<Sge>,
    },
    /// What the hook of OpenPBS's MoM calls.
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Pbs {
        #[command(flatten)]
        codes: Codes,
        #[command(subcommand)]
        hook: Option<Pbs>,
    },
    /// Torque's prologue and epilogue, with Torque's own arguments.
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Torque {
        #[command(flatten)]
        codes: Codes,
        #[command(subcommand)]
        hook: Option<Torque>,
    },
    /// Any other batch system: everything by argument.
    #[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
    Generic {
        #[command(flatten)]
        codes: Codes,
        #[command(subcommand)]
        hook: Option<Generic>,
    },
    /// Listens inside a guest for hooks that run as a job's owner, and speaks to the host for them.
    Serve,
    /// Delivers the ends of jobs that could not be delivered; exits with 75 where some are left.
    Deliver {
        /// How long it may take.
        #[arg(long, value_name = "TIME", default_value = "60s", value_parser = time)]
        deadline: Duration,
    },
    /// Says what is wrong with the configuration: reads it, gets a ticket, and asks every host that it names.
    Check,
    /// Writes man pages into a folder.
    #[command(hide = true)]
    Man {
        /// The folder; it is made if there is none.
        dir: PathBuf,
    },
}

#[derive(Debug, Args)]
pub(crate) struct Codes {
    /// Shows what each hook ends with, and what the batch system makes of it.
    #[arg(long)]
    pub(crate) exit_codes: bool,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Slurm {
    /// Prolog: on the node, by its environment. Waits for the room that was asked for on the controller.
    Prolog,
    /// Epilog: on the node.
    Epilog,
    /// PrologSlurmctld: room on all nodes of the job, or the job is requeued.
    PrologController,
    /// EpilogSlurmctld.
    EpilogController,
    /// ResumeProgram: starts or thaws the domains of these nodes.
    Resume {
        /// As Slurm writes them: cloud[1-3,7].
        nodes: String,
    },
    /// SuspendProgram: shuts the domains of these nodes down, or freezes them.
    Suspend {
        /// As Slurm writes them: cloud[1-3,7].
        nodes: String,
    },
    /// A service beside slurmctld: follows suspended jobs and frozen nodes, each to the other's side, and reconciles.
    Watch,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Sge {
    /// prolog, as root: `root@/usr/local/sbin/xman-hook sge prolog $host $job_owner $job_id $ja_task_id`.
    Prolog {
        host: String,
        owner: String,
        job: String,
        task: Option<String>,
    },
    /// epilog, as root, with the same arguments.
    Epilog {
        host: String,
        owner: String,
        job: String,
        task: Option<String>,
    },
    /// suspend_method: stops the job's processes, and lets its domain give way.
    Suspend {
        /// $job_pid
        pid: i32,
        /// $job_id
        job: String,
        /// $ja_task_id
        task: Option<String>,
    },
    /// resume_method, with the same arguments.
    Resume {
        pid: i32,
        job: String,
        task: Option<String>,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Pbs {
    /// execjob_begin.
    Begin(PbsJob),
    /// execjob_end.
    End(PbsJob),
    /// execjob_abort.
    Abort(PbsJob),
    /// execjob_postsuspend.
    Suspend(PbsJob),
    /// execjob_preresume.
    Resume(PbsJob),
}

#[derive(Clone, Debug, Args)]
pub(crate) struct PbsJob {
    /// The job's id, as 4711.pbs01 or 12[3].pbs01.
    #[arg(long)]
    pub(crate) job: String,
    /// How often it was begun before (its run_version or run_count), or `now` where PBS does not say.
    #[arg(long, value_parser = run)]
    pub(crate) run: Run,
    /// The node.
    #[arg(long)]
    pub(crate) node: String,
    /// Whose job it is.
    #[arg(long)]
    pub(crate) user: Option<String>,
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Torque {
    /// prologue and prologue.parallel.
    Prologue {
        /// As Torque gives them.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
    /// epilogue and epilogue.parallel.
    Epilogue {
        /// As Torque gives them.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        arguments: Vec<OsString>,
    },
}

#[derive(Clone, Debug, Subcommand)]
pub(crate) enum Generic {
    /// Room for a job.
    Begin {
        #[command(flatten)]
        job: GenericJob,
        /// Whose job it is.
        #[arg(long, conflicts_with = "principal")]
        user: Option<String>,
        /// The same as a full principal.
        #[arg(long)]
        principal: Option<Principal>,
        /// Whether the job may be preempted; as its domain's class says where absent.
        #[arg(long, value_name = "YES|NO")]
        preemptible: Option<YesNo>,
        /// The lease ends by itself after so long.
        #[arg(long, value_name = "TIME", value_parser = time)]
        ends_in: Option<Duration>,
    },
    /// No room any more.
    End {
        #[command(flatten)]
        job: GenericJob,
    },
    /// The job is suspended.
    Preempt {
        #[command(flatten)]
        job: GenericJob,
        /// How deep; as its domain's class says where absent.
        #[arg(long, value_parser = depth)]
        depth: Option<Depth>,
        /// Why, for those who find the domain preempted.
        #[arg(long)]
        reason: Option<LabelValue>,
    },
    /// It goes on.
    Resume {
        #[command(flatten)]
        job: GenericJob,
    },
    /// How the domain stands, in one line: STATE[:USED:AVAILABLE];PREEMPTED-SECONDS;changed=SECONDS-SINCE-1970.
    Status {
        #[command(flatten)]
        at: At,
        /// How long it may take.
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = time)]
        deadline: Duration,
    },
}

#[derive(Clone, Debug, Args)]
pub(crate) struct GenericJob {
    /// The job's id in the batch system.
    #[arg(long)]
    pub(crate) job: String,
    /// How often it was begun before; a job that comes back needs a higher one. `now` is the second in which it begins, for systems that do not count.
    #[arg(long, value_parser = run)]
    pub(crate) run: Run,
    /// The batch system, where it is not hook.toml's.
    #[arg(long)]
    pub(crate) system: Option<Tag>,
    /// Its cluster, where it is not hook.toml's.
    #[arg(long)]
    pub(crate) cluster: Option<Tag>,
    #[command(flatten)]
    pub(crate) at: At,
    /// How long it may take.
    #[arg(long, value_name = "TIME", value_parser = time)]
    pub(crate) deadline: Option<Duration>,
}

#[derive(Clone, Debug, Args)]
#[group(required = true, multiple = true)]
pub(crate) struct At {
    /// The node, which hook.toml maps; several as a set.
    #[arg(long, conflicts_with_all = ["host", "domain"])]
    pub(crate) node: Option<String>,
    /// The host, where no map is used.
    #[arg(long, requires = "domain", value_parser = str::parse::<Address>)]
    pub(crate) host: Option<Address>,
    /// The domain there.
    #[arg(long, requires = "host", value_parser = str::parse::<DomainRef>)]
    pub(crate) domain: Option<DomainRef>,
}

/// The number of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Run {
    Number(u32),
    Now,
}

impl Run {
    /// Returns the number; `now` in seconds since 1970.
    pub(crate) fn number(self, now: u32) -> u32 {
        match self {
            Self::Number(number) => number,
            Self::Now => now,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum YesNo {
    Yes,
    No,
}

fn run(text: &str) -> Result<Run, String> {
    if text == "now" {
        return Ok(Run::Now);
    }
    crate::intent::number("the run", text)
        .map(Run::Number)
        .map_err(|error| error.to_string())
}

fn depth(text: &str) -> Result<Depth, String> {
    Depth::ALL
        .iter()
        .find(|depth| depth.name() == text)
        .copied()
        .ok_or_else(|| {
            let names: Vec<_> = Depth::ALL.iter().map(|depth| depth.name()).collect();
            format!("there are {}", names.join(", "))
        })
}

fn time(text: &str) -> Result<Duration, String> {
    let span = if text.bytes().all(|b| b.is_ascii_digit()) {
        format!("{text}s").parse::<SignedDuration>()
    } else {
        text.parse::<SignedDuration>()
    };
    match span.map(Duration::try_from) {
        Ok(Ok(span)) if !span.is_zero() && span <= Duration::from_secs(24 * 3600) => Ok(span),
        _ => Err("a time is more than nothing and at most a day, as 30s or 5m".to_owned()),
    }
}

/// Returns what a link to this program stands for: `xman-slurm-prolog` for `xman-hook slurm prolog`.
pub(crate) fn unfolded(mut words: Vec<OsString>) -> Vec<OsString> {
    let meant = words
        .first()
        .and_then(|name| std::path::Path::new(name).file_name()?.to_str())
        .and_then(|name| name.strip_prefix("xman-")?.split_once('-'))
        .map(|(system, hook)| [OsString::from(system), OsString::from(hook)]);
    if let Some(meant) = meant {
        words.splice(0..1, [OsString::from("xman-hook")].into_iter().chain(meant));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hook::Hook;
    use clap::CommandFactory;

    fn parse(words: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(words.split(' '))
    }

    #[test]
    fn every_hook_has_its_subcommand() {
        let mut command = Cli::command();
        command.build();
        for hook in Hook::ALL {
            let system = command.find_subcommand(hook.system().name()).unwrap();
            assert!(
                system.find_subcommand(hook.name()).is_some(),
                "{}",
                hook.full_name()
            );
        }
        command.debug_assert();
    }

    #[test]
    fn links_stand_for_hooks() {
        let unfolded = |words: &str| {
            unfolded(words.split(' ').map(OsString::from).collect())
                .into_iter()
                .map(|word| word.into_string().unwrap())
                .collect::<Vec<_>>()
                .join(" ")
        };
        for (link, meant) in [
            (
                "/etc/slurm/prolog.d/xman-slurm-prolog",
                "xman-hook slurm prolog",
            ),
            (
                "xman-slurm-prolog-controller",
                "xman-hook slurm prolog-controller",
            ),
            (
                "xman-slurm-resume cloud[1-3]",
                "xman-hook slurm resume cloud[1-3]",
            ),
            (
                "xman-torque-prologue 1 alice g",
                "xman-hook torque prologue 1 alice g",
            ),
            ("/usr/sbin/xman-hook check", "/usr/sbin/xman-hook check"),
            ("rxm list", "rxm list"),
        ] {
            assert_eq!(unfolded(link), meant, "{link}");
        }
    }

    #[test]
    fn what_users_choose_is_no_option() {
        let cli = parse("xman-hook torque prologue 1.pbs alice users --config /tmp/x -h").unwrap();
        assert_eq!(cli.config, PathBuf::from("/etc/xman/hook.toml"));
        let Command::Torque {
            hook: Some(Torque::Prologue { arguments }),
            ..
        } = cli.command
        else {
            panic!("{:?}", cli.command);
        };
        assert_eq!(arguments.len(), 6);
    }

    #[test]
    fn a_generic_job_is_on_a_node_or_in_a_domain() {
        for good in [
            "xman-hook generic begin --job 1 --run 0 --node cloud1",
            "xman-hook generic begin --job 1 --run now --host skirit80:7000 --domain grid-1 --preemptible no --ends-in 1h",
            "xman-hook generic status --node cloud1",
            "xman-hook slurm --exit-codes",
        ] {
            assert!(parse(good).is_ok(), "{good}: {:?}", parse(good).err());
        }
        for bad in [
            "xman-hook generic begin --job 1 --run 0",
            "xman-hook generic begin --job 1 --run 0 --host h",
            "xman-hook generic begin --job 1 --run 0 --node a --host h --domain d",
            "xman-hook generic begin --job 1 --run -1 --node a",
            "xman-hook generic begin --job 1 --run 0 --node a --deadline 0s",
            "xman-hook slurm",
            "xman-hook",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
