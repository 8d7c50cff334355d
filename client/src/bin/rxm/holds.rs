//! `preempt`, `resume`, `freeze` and `thaw`: domains that are held back, and let go of again.

use clap::{Args, ValueEnum};
use xman_client::{Explanation, Kind};
use xman_common::{
    name::LabelValue,
    protocol::{Depth, LeaseKey, Preempt, Reply, Request, Resume, Verb},
};

use crate::{
    change::{Deed, carry_out},
    exit::Tally,
    options::DomainsArgs,
    setting::{Setting, Stop},
    status::PENDING,
    status::rest,
};

/// What `rxm help preempt` says after the options.
pub(crate) const PREEMPT_HELP: &str = "\
The domain gives way until it is resumed: as deep as its class says, or as is said here. No depth turns into another by itself:
  starve   a trickle of CPU; the guest stays alive and answers
  shrink   starved, and its memory ballooned down to the floor of its class
  pause    its virtual CPUs are stopped
  freeze   its memory is written to its image and given back

It is held by whoever asks, or with --lease by that job of its own, which its batch system suspends. It runs once nobody holds it any more.

What is not done within --timeout goes on, and rxm ends with 1. The same again changes nothing.

Examples:
  rxm preempt skirit80/grid-1
  rxm preempt skirit80/grid-1 --depth pause --reason 'a demonstration until noon'
  rxm preempt skirit80/grid-1 --lease slurm/grid/4711/0
  rxm -H @grid preempt 'grid-*' --depth starve --yes

JSON is that of status, and verb.";

/// What `rxm help resume` says after the options.
pub(crate) const RESUME_HELP: &str = "\
Lets go of what 'preempt' and 'freeze' hold: of your own hold, or with --lease of that job's. The domain runs once nobody holds it, and rxm says who still does. \
    'rxm unpause' is for a domain that was paused by hand.

--force lets go of what other people hold too, and takes the right to destroy; never of what a job needs.

Examples:
  rxm resume skirit80/grid-1
  rxm resume skirit80/grid-1 --lease slurm/grid/4711/0
  rxm resume skirit80/grid-1 --force

JSON is that of status, and verb.";

/// What `rxm help freeze` says after the options.
pub(crate) const FREEZE_HELP: &str = "\
Writes the domain's memory to its image and gives it back. What it needs to return is kept for it: 'rxm thaw' brings it back as it was. \
    ('rxm save' does not: its room is anybody's.)

Writing takes as long as the disk needs: --timeout says how long rxm waits, and what is not done by then goes on.

Examples:
  rxm freeze skirit80/grid-1 --timeout 10m
  rxm freeze skirit80/grid-1 --reason 'the weekend' --no-wait
  rxm -H @grid freeze 'grid-*' --dry-run

JSON is that of status, and verb.";

/// What `rxm help thaw` says after the options.
pub(crate) const THAW_HELP: &str = "\
Brings a domain back that was frozen, with its memory as it was. It runs once nobody holds it, and rxm says who still does.

--force lets go of what other people hold too, and takes the right to destroy; never of what a job needs.

Examples:
  rxm thaw skirit80/grid-1 --timeout 5m
  rxm thaw skirit80/grid-1 --no-wait

JSON is that of status, and verb.";

/// Arguments of `preempt`.
#[derive(Debug, Args)]
pub(crate) struct PreemptArgs {
    /// How deep [default: as its class says]
    #[arg(long, value_enum)]
    pub(crate) depth: Option<Deep>,
    #[command(flatten)]
    pub(crate) hold: HoldArgs,
}

/// Arguments of `freeze`, and what `preempt` takes as well.
#[derive(Debug, Args)]
pub(crate) struct HoldArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// The domain's job that its batch system suspends, as SYSTEM/CLUSTER/JOB/RUN: the hold is then the job's, and not yours
    #[arg(long, value_name = "KEY")]
    pub(crate) lease: Option<LeaseKey>,
    /// Why, for those who find it held back
    #[arg(long, value_name = "TEXT")]
    pub(crate) reason: Option<LabelValue>,
    /// Return as soon as it is written down: 'rxm status' shows when it is done
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// Arguments of `resume` and `thaw`.
#[derive(Debug, Args)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// The domain's job that its batch system resumes, as SYSTEM/CLUSTER/JOB/RUN
    #[arg(long, value_name = "KEY")]
    pub(crate) lease: Option<LeaseKey>,
    /// Also let go of what other people hold, never of what a job needs. Takes the right to destroy
    #[arg(long)]
    pub(crate) force: bool,
    /// Return as soon as it is written down: 'rxm status' shows when it runs
    #[arg(long)]
    pub(crate) no_wait: bool,
}

/// How deep a domain goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Deep {
    /// A trickle of CPU
    Starve,
    /// Starved, and its memory ballooned down
    Shrink,
    /// Its virtual CPUs are stopped
    Pause,
    /// Its memory is written to its image
    Freeze,
}

impl From<Deep> for Depth {
    fn from(deep: Deep) -> Self {
        match deep {
            Deep::Starve => Self::Starve,
            Deep::Shrink => Self::Shrink,
            Deep::Pause => Self::Pause,
            Deep::Freeze => Self::Freeze,
        }
    }
}

/// `rxm preempt`
pub(crate) async fn preempt(setting: &Setting, args: PreemptArgs) -> Result<Tally, Stop> {
    let depth = args.depth.map(Depth::from);
    hold(setting, Verb::Preempt, args.hold, depth).await
}

/// `rxm freeze`
pub(crate) async fn freeze(setting: &Setting, args: HoldArgs) -> Result<Tally, Stop> {
    hold(setting, Verb::Freeze, args, None).await
}

async fn hold(
    setting: &Setting,
    verb: Verb,
    args: HoldArgs,
    depth: Option<Depth>,
) -> Result<Tally, Stop> {
    let HoldArgs {
        domains,
        lease,
        reason,
        no_wait,
    } = args;
    let request = &|domain| {
        let preempt = Preempt {
            domain,
            depth,
            lease: lease.clone(),
            reason: reason.clone(),
            wait: !no_wait,
        };
        if verb == Verb::Freeze {
            Request::Freeze(preempt)
        } else {
            Request::Preempt(preempt)
        }
    };
    let deed = Deed::new(verb, "held back", request);
    let deed = if no_wait {
        deed
    } else {
        deed.judged(held_in_time)
    };
    carry_out(setting, &domains.domains, deed).await
}

/// `rxm resume`
pub(crate) async fn resume(setting: &Setting, args: ResumeArgs) -> Result<Tally, Stop> {
    let_go(setting, Verb::Resume, args).await
}

/// `rxm thaw`
pub(crate) async fn thaw(setting: &Setting, args: ResumeArgs) -> Result<Tally, Stop> {
    let_go(setting, Verb::Thaw, args).await
}

async fn let_go(setting: &Setting, verb: Verb, args: ResumeArgs) -> Result<Tally, Stop> {
    let ResumeArgs {
        domains,
        lease,
        force,
        no_wait,
    } = args;
    let warning = force.then(|| {
        "what other people hold is let go of as well; they are not asked, and find it running"
            .to_owned()
    });
    let request = &|domain| {
        let resume = Resume {
            domain,
            lease: lease.clone(),
            force,
            wait: !no_wait,
        };
        if verb == Verb::Thaw {
            Request::Thaw(resume)
        } else {
            Request::Resume(resume)
        }
    };
    let deed = Deed::new(verb, "let go of", request).warning(warning);
    let deed = if no_wait {
        deed
    } else {
        deed.judged(let_go_in_time)
    };
    let deed = deed.with(force.then_some(Verb::Destroy));
    carry_out(setting, &domains.domains, deed).await
}

/// What was waited for and is not done in time is no success, though it goes on.
fn held_in_time(reply: Reply) -> Result<Reply, Explanation> {
    in_time(false, reply)
}

fn let_go_in_time(reply: Reply) -> Result<Reply, Explanation> {
    in_time(true, reply)
}

fn in_time(lets_go: bool, reply: Reply) -> Result<Reply, Explanation> {
    if let Reply::Standing(row) = &reply
        && let Some(rest) = rest(lets_go, row)
    {
        return Err(Explanation {
            kind: Kind::Refused,
            code: PENDING,
            what: format!("it is not done within --timeout: {rest}"),
            advice: "it goes on, `rxm status` shows how it stands, and the same again waits longer"
                .to_owned(),
            is_common: false,
        });
    }
    Ok(reply)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use xman_common::protocol::{Holder, Standing, StatusRow};

    use super::*;
    use crate::{
        args::{Cli, Command},
        status::{sentence, tests::row},
    };

    fn free() -> StatusRow {
        StatusRow {
            standing: Standing::Free,
            depth: None,
            holds: Vec::new(),
            ..row("x")
        }
    }

    #[test]
    fn what_came_of_it_is_said_by_what_libvirt_was_seen_to_have() {
        let at = |depth| StatusRow {
            depth: Some(depth),
            ..row("x")
        };
        let said = |depth| sentence(Verb::Preempt, &at(depth));
        assert_eq!(said(Depth::Pause), "held back: paused");
        assert!(said(Depth::Freeze).contains("frozen"));
        assert!(said(Depth::Shrink).contains("shrunk"));
        assert!(said(Depth::Starve).contains("trickle"));
        assert!(sentence(Verb::Freeze, &free()).contains("nothing to take"));
        let busy = StatusRow {
            doing: "its memory is written, 40%".to_owned(),
            ..free()
        };
        assert_eq!(
            sentence(Verb::Freeze, &busy),
            "under way: its memory is written, 40%"
        );
    }

    #[test]
    fn who_lets_go_learns_who_still_holds_it() {
        assert_eq!(sentence(Verb::Resume, &free()), "runs");
        assert_eq!(
            sentence(Verb::Thaw, &row("x")),
            "let go of, and still held by slurm/grid/4712/0 (needs its room), bob@R"
        );
        let off = StatusRow {
            standing: Standing::Down,
            ..free()
        };
        assert_eq!(sentence(Verb::Resume, &off), "nobody holds it; it is off");
        let back = StatusRow {
            doing: "its memory is read".to_owned(),
            ..free()
        };
        assert!(sentence(Verb::Thaw, &back).starts_with("under way"));
    }

    #[test]
    fn what_is_waited_for_and_not_done_is_a_failure() {
        let busy = Reply::Standing(StatusRow {
            doing: "its memory is written".to_owned(),
            ..row("x")
        });
        let error = held_in_time(busy).unwrap_err();
        assert_eq!((error.code, error.kind), (PENDING, Kind::Refused));
        assert!(error.what.contains("its memory is written"));
        assert!(held_in_time(Reply::Standing(row("x"))).is_ok());
        assert!(held_in_time(Reply::Done).is_ok());
        let unseen = StatusRow {
            depth: None,
            ..row("x")
        };
        assert!(held_in_time(Reply::Standing(unseen.clone())).is_err());
        assert!(sentence(Verb::Preempt, &unseen).starts_with("under way"));
        let off = StatusRow {
            standing: Standing::Down,
            ..unseen
        };
        assert!(held_in_time(Reply::Standing(off.clone())).is_ok());
        assert!(sentence(Verb::Preempt, &off).contains("nothing to take"));
    }

    #[test]
    fn what_others_hold_is_no_failure_of_who_lets_go() {
        let others = StatusRow {
            doing: "its memory is written".to_owned(),
            ..row("x")
        };
        assert!(let_go_in_time(Reply::Standing(others.clone())).is_ok());
        assert!(sentence(Verb::Resume, &others).starts_with("let go of, and still held by"));
        assert!(let_go_in_time(Reply::Standing(free())).is_ok());
        let back = StatusRow {
            doing: "it comes back from its image".to_owned(),
            ..free()
        };
        assert!(let_go_in_time(Reply::Standing(back)).is_err());
        let mut waits = row("x");
        waits.holds.truncate(1);
        waits.holds[0].holder = Holder::Room(None);
        assert_eq!(
            sentence(Verb::Resume, &waits),
            "nobody holds it; it comes back when there is room"
        );
    }

    #[test]
    fn the_depth_the_job_and_the_reason_are_read() {
        let read = |line: &[&str]| Cli::try_parse_from([&["rxm"], line].concat());
        let line = [
            "preempt",
            "web",
            "db",
            "--depth",
            "shrink",
            "--lease",
            "slurm/grid/1/0",
            "--reason",
            "a b",
            "--no-wait",
        ];
        let Command::Preempt(args) = read(&line).unwrap().command else {
            panic!("no preempt")
        };
        assert_eq!(args.depth.map(Depth::from), Some(Depth::Shrink));
        assert_eq!(args.hold.lease, "slurm/grid/1/0".parse().ok());
        assert_eq!(args.hold.reason, "a b".parse().ok());
        assert!(args.hold.no_wait);
        assert_eq!(args.hold.domains.domains, ["web", "db"]);
        for bad in [
            &["preempt"][..],
            &["preempt", "web", "--depth", "deep"],
            &["preempt", "web", "--lease", "slurm/grid/1"],
            &["preempt", "web", "--reason", "a\nb"],
            &["preempt", "web", "--reason", ""],
            &["preempt", "web", "--force"],
            &["freeze", "web", "--depth", "pause"],
            &["thaw"],
            &["resume", "web", "--reason", "x"],
        ] {
            assert!(read(bad).is_err(), "{bad:?}");
        }
        assert!(read(&["resume", "web", "--force", "--no-wait"]).is_ok());
        assert!(read(&["freeze", "web", "--lease", "slurm/grid/1/0"]).is_ok());
    }

    #[test]
    fn every_depth_can_be_asked_for() {
        let names: Vec<_> = Deep::value_variants()
            .iter()
            .map(|deep| Depth::from(*deep))
            .collect();
        assert_eq!(names, Depth::ALL);
    }
}
