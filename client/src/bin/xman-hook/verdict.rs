//! From what came of a hook's work to its exit code, and what the batch system makes of that. One table a system, which `--exit-codes` prints.

use std::fmt::Write as _;

use xman_client::{
    CallError, Failure, Kind,
    explain::Explanation,
    protocol::{Code, Then},
};

use crate::hook::{Hook, System};

/// What came of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Class {
    /// It is done.
    Done,
    /// An end that could not be delivered yet, and will be.
    Kept,
    /// No room now.
    Later,
    /// No room here, whenever.
    Elsewhere,
    /// This run is over, or was never right.
    Never,
    /// No host, no KDC, or none that answers in time.
    Silent,
    /// The host does not let us, or does not know how.
    Forbidden,
    /// The hook itself is not set up: configuration, keytab, environment. Nothing that a host says comes to this.
    Broken,
    /// SIGTERM.
    Stopped,
}

impl Class {
    /// All of them.
    pub(crate) const ALL: [Self; 9] = [
        Self::Done,
        Self::Kept,
        Self::Later,
        Self::Elsewhere,
        Self::Never,
        Self::Silent,
        Self::Forbidden,
        Self::Broken,
        Self::Stopped,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Done => "done",
            Self::Kept => "kept",
            Self::Later => "later",
            Self::Elsewhere => "elsewhere",
            Self::Never => "never",
            Self::Silent => "silent",
            Self::Forbidden => "forbidden",
            Self::Broken => "broken",
            Self::Stopped => "stopped",
        }
    }

    fn meaning(self) -> &'static str {
        match self {
            Self::Done => "it is done",
            Self::Kept => "an end that could not be delivered is kept and delivered later",
            Self::Later => "there is no room now",
            Self::Elsewhere => "there is no room here, or the host does not want to",
            Self::Never => "this run of the job has ended, or was never right",
            Self::Silent => "no host, no KDC, or none that answers in time",
            Self::Forbidden => "the host does not let the hook do that, or does not know how",
            Self::Broken => "here: configuration, keytab or environment of the hook are wrong",
            Self::Stopped => "SIGTERM",
        }
    }

    /// Returns the class of a refusal.
    pub(crate) fn refused(then: Then) -> Self {
        match then {
            Then::Later => Self::Later,
            Then::Elsewhere => Self::Elsewhere,
            Then::Never => Self::Never,
        }
    }

    /// Returns the class of a call that brought no reply, with what `explain` makes of it.
    pub(crate) fn failed(failure: &Failure, explanation: &Explanation) -> Self {
        if let Failure::Call(CallError::Fault(fault)) = failure {
            return Self::of_code(fault.code);
        }
        match explanation.kind {
            Kind::Unreachable => Self::Silent,
            Kind::Interrupted => Self::Stopped,
            Kind::Refused => match explanation.code {
                "busy" | "unavailable" | "unknown" => Self::Silent,
                _ => Self::Forbidden,
            },
            Kind::Unauthenticated => match explanation.code {
                "kdc-unreachable" | "clock-skew" | "ticket-expired" => Self::Silent,
                _ => Self::Forbidden,
            },
        }
    }

    fn of_code(code: Code) -> Self {
        match code {
            // Transient by their own account.
            Code::Busy | Code::Unavailable | Code::Unknown | Code::Expired => Self::Silent,
            Code::Conflict => Self::Later,
            Code::Refused => Self::Elsewhere,
            // None of these is this machine's fault, and none mends itself.
            Code::Denied
            | Code::NotFound
            | Code::BadRequest
            | Code::Unsupported
            | Code::TooLarge
            | Code::Internal => Self::Forbidden,
        }
    }
}

/// What came of it, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) class: Class,
    pub(crate) sentence: String,
}

impl Outcome {
    pub(crate) fn new(class: Class, sentence: impl Into<String>) -> Self {
        Self {
            class,
            sentence: sentence.into(),
        }
    }
}

/// An exit code and what the batch system does about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) code: u8,
    pub(crate) then: &'static str,
}

const fn exit(code: u8, then: &'static str) -> Exit {
    Exit { code, then }
}

/// sysexits.h, where they have a word for it, and 128 + SIGTERM.
const LATER: u8 = 75;
const ELSEWHERE: u8 = 73;
const NEVER: u8 = 65;
const SILENT: u8 = 69;
const FORBIDDEN: u8 = 77;
/// What a command line or configuration that is wrong ends with.
const BROKEN: u8 = 78;
const STOPPED: u8 = 143;

/// Returns the code that says nothing but the class.
pub(crate) fn plain(class: Class) -> u8 {
    match class {
        Class::Done | Class::Kept => 0,
        Class::Later => LATER,
        Class::Elsewhere => ELSEWHERE,
        Class::Never => NEVER,
        Class::Silent => SILENT,
        Class::Forbidden => FORBIDDEN,
        Class::Broken => BROKEN,
        Class::Stopped => STOPPED,
    }
}

/// Returns how a hook ends.
pub(crate) fn verdict(hook: Hook, class: Class) -> Exit {
    match hook {
        Hook::SlurmProlog => match class {
            Class::Done | Class::Kept => exit(0, "the job starts"),
            Class::Later
            | Class::Elsewhere
            | Class::Never
            | Class::Silent
            | Class::Forbidden
            | Class::Stopped => exit(
                0,
                "the job starts, its domain gives way to others; any other code would drain the node",
            ),
            Class::Broken => exit(
                BROKEN,
                "the node is drained, the job requeued and held: xman-hook check",
            ),
        },
        Hook::SlurmEpilog => exit(0, "the node goes on; any other code would drain it"),
        Hook::SlurmPrologController => Exit {
            code: plain(class),
            then: match class {
                Class::Done | Class::Kept => "the job starts",
                Class::Later
                | Class::Elsewhere
                | Class::Never
                | Class::Silent
                | Class::Forbidden
                | Class::Broken
                | Class::Stopped => {
                    "a batch job is requeued, salloc and srun are told; no node is drained"
                }
            },
        },
        Hook::SlurmEpilogController => Exit {
            code: plain(class),
            then: "slurmctld logs it",
        },
        Hook::SlurmResume => Exit {
            code: plain(class),
            then: match class {
                Class::Done | Class::Kept => "the nodes boot",
                Class::Later
                | Class::Elsewhere
                | Class::Never
                | Class::Silent
                | Class::Forbidden
                | Class::Broken
                | Class::Stopped => {
                    "slurmctld logs it; nodes that did not come are powered down again, not DOWN, where scontrol is configured"
                }
            },
        },
        Hook::SlurmSuspend => Exit {
            code: plain(class),
            then: "slurmctld logs it",
        },
        Hook::SgeProlog => match class {
            Class::Done | Class::Kept => exit(0, "the job starts"),
            Class::Later | Class::Elsewhere | Class::Silent | Class::Stopped => {
                exit(99, "the job is requeued")
            }
            Class::Never => exit(100, "the job goes into its error state; qmod -cj clears it"),
            Class::Forbidden | Class::Broken => exit(
                1,
                "the job is requeued, the queue instance goes into its error state; qmod -cq clears it",
            ),
        },
        Hook::SgeEpilog => exit(
            0,
            "the queue goes on; any other code would put it into its error state",
        ),
        Hook::SgeSuspend | Hook::SgeResume => exit(0, "Grid Engine looks at no code here"),
        Hook::PbsBegin => match class {
            Class::Done | Class::Kept => exit(0, "accepted: the job starts"),
            Class::Later | Class::Elsewhere | Class::Never | Class::Silent | Class::Stopped => {
                exit(2, "rejected: the job is requeued, and held after 20 tries")
            }
            Class::Forbidden | Class::Broken => exit(
                BROKEN,
                "the hook fails: the job is requeued and its fail_action takes the vnode offline",
            ),
        },
        Hook::PbsEnd | Hook::PbsAbort => exit(0, "accepted"),
        Hook::PbsSuspend => Exit {
            code: plain(class),
            then: match class {
                Class::Done | Class::Kept => "accepted",
                Class::Later
                | Class::Elsewhere
                | Class::Never
                | Class::Silent
                | Class::Forbidden
                | Class::Broken
                | Class::Stopped => "rejected: the MoM logs it, the job stays suspended",
            },
        },
        Hook::PbsResume => match class {
            Class::Done | Class::Kept => exit(0, "accepted: the job goes on"),
            Class::Later
            | Class::Elsewhere
            | Class::Never
            | Class::Silent
            | Class::Forbidden
            | Class::Broken
            | Class::Stopped => exit(2, "rejected: the job stays suspended and is resumed later"),
        },
        Hook::TorquePrologue => match class {
            Class::Done | Class::Kept => exit(0, "the job starts"),
            Class::Never => exit(1, "the job is aborted"),
            Class::Later
            | Class::Elsewhere
            | Class::Silent
            | Class::Forbidden
            | Class::Broken
            | Class::Stopped => exit(2, "the job is requeued; an interactive one is aborted"),
        },
        Hook::TorqueEpilogue => exit(0, "the node goes on"),
        Hook::GenericBegin | Hook::GenericEnd | Hook::GenericPreempt | Hook::GenericResume => {
            Exit {
                code: plain(class),
                then: match class {
                    Class::Done | Class::Kept => "go on",
                    Class::Later => "try again later",
                    Class::Elsewhere => "try another host",
                    Class::Never => "give up this run",
                    Class::Silent => "try again later, or another host",
                    Class::Forbidden | Class::Broken => "call an administrator: xman-hook check",
                    Class::Stopped => "as you like: nothing was left half-done",
                },
            }
        }
    }
}

/// Returns the table of a system as `--exit-codes` prints it and the documents show it.
pub(crate) fn table(system: System) -> String {
    let mut text = String::new();
    for hook in Hook::ALL.iter().filter(|hook| hook.system() == system) {
        let _ = writeln!(text, "{} {}", system.name(), hook.name());
        for class in Class::ALL {
            let Exit { code, then } = verdict(*hook, class);
            let _ = writeln!(text, "  {code:>3}  {:<9}  {then}", class.name());
        }
    }
    text.push('\n');
    for class in Class::ALL {
        let _ = writeln!(text, "{:<9}  {}", class.name(), class.meaning());
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use xman_client::protocol::Fault;

    /// What the batch systems do with a code, by their documentation and sources.
    #[test]
    fn no_refusal_drains_a_node_and_no_epilog_fails() {
        for class in Class::ALL {
            for hook in [
                Hook::SlurmEpilog,
                Hook::SgeEpilog,
                Hook::SgeSuspend,
                Hook::SgeResume,
                Hook::PbsEnd,
                Hook::PbsAbort,
                Hook::TorqueEpilogue,
            ] {
                assert_eq!(verdict(hook, class).code, 0, "{hook:?} {class:?}");
            }
            // Anything but 0 drains the node.
            let drains = verdict(Hook::SlurmProlog, class).code != 0;
            assert_eq!(drains, class == Class::Broken, "{class:?}");
        }
    }

    #[test]
    fn a_job_without_room_does_not_start_where_the_system_can_put_it_back() {
        for class in [
            Class::Later,
            Class::Elsewhere,
            Class::Never,
            Class::Silent,
            Class::Forbidden,
            Class::Broken,
            Class::Stopped,
        ] {
            for hook in Hook::ALL {
                let code = verdict(*hook, class).code;
                match hook {
                    Hook::SlurmPrologController | Hook::PbsBegin | Hook::GenericBegin => {
                        assert_ne!(code, 0, "{hook:?} {class:?}");
                    }
                    // 99 requeues, 100 is the job's error state, anything else the queue's.
                    Hook::SgeProlog => {
                        let expected = match class {
                            Class::Never => 100,
                            Class::Forbidden | Class::Broken => 1,
                            Class::Done | Class::Kept => 0,
                            Class::Later | Class::Elsewhere | Class::Silent | Class::Stopped => 99,
                        };
                        assert_eq!(code, expected, "{class:?}");
                    }
                    // 1 aborts, anything else requeues.
                    Hook::TorquePrologue => {
                        assert_eq!(code, if class == Class::Never { 1 } else { 2 }, "{class:?}");
                    }
                    Hook::PbsResume | Hook::PbsSuspend => {
                        assert_ne!(code, 0, "{hook:?} {class:?}");
                    }
                    Hook::SlurmProlog
                    | Hook::SlurmEpilog
                    | Hook::SlurmEpilogController
                    | Hook::SlurmResume
                    | Hook::SlurmSuspend
                    | Hook::SgeEpilog
                    | Hook::SgeSuspend
                    | Hook::SgeResume
                    | Hook::PbsEnd
                    | Hook::PbsAbort
                    | Hook::TorqueEpilogue
                    | Hook::GenericEnd
                    | Hook::GenericPreempt
                    | Hook::GenericResume => {}
                }
            }
        }
        for hook in Hook::ALL {
            assert_eq!(verdict(*hook, Class::Done).code, 0, "{hook:?}");
            assert_eq!(verdict(*hook, Class::Kept).code, 0, "{hook:?}");
        }
    }

    #[test]
    fn every_fault_has_its_class() {
        let class = |code| {
            let failure = Failure::from(CallError::Fault(Fault::new(code, "")));
            let address = "skirit80".parse().unwrap();
            let explanation = xman_client::explain::failure(&failure, &address, None);
            Class::failed(&failure, &explanation)
        };
        for (code, expected) in [
            (Code::Busy, Class::Silent),
            (Code::Unavailable, Class::Silent),
            (Code::Unknown, Class::Silent),
            (Code::Expired, Class::Silent),
            (Code::Denied, Class::Forbidden),
            (Code::Conflict, Class::Later),
            (Code::Refused, Class::Elsewhere),
            (Code::NotFound, Class::Forbidden),
            (Code::BadRequest, Class::Forbidden),
            (Code::Unsupported, Class::Forbidden),
            (Code::TooLarge, Class::Forbidden),
            (Code::Internal, Class::Forbidden),
        ] {
            assert_eq!(class(code), expected, "{code:?}");
        }
    }

    #[test]
    fn the_documents_show_the_tables_as_they_are() {
        let docs = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/batch");
        for system in System::ALL {
            let path = format!("{docs}/{}.md", system.name());
            let page =
                std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
            let table = table(system);
            assert!(
                page.contains(&format!("```text\n{table}```")),
                "{path} does not show what `xman-hook {} --exit-codes` prints:\n{table}",
                system.name()
            );
        }
    }
}
