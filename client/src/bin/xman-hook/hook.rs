//! Every hook of every batch system, and what the system's own time-outs leave it.

use std::time::Duration;

/// A batch system that this program speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum System {
    Slurm,
    Sge,
    Pbs,
    Torque,
    Generic,
}

impl System {
    /// All of them.
    #[cfg(test)]
    pub(crate) const ALL: [Self; 5] = [
        Self::Slurm,
        Self::Sge,
        Self::Pbs,
        Self::Torque,
        Self::Generic,
    ];

    /// Returns the name of its subcommand.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Slurm => "slurm",
            Self::Sge => "sge",
            Self::Pbs => "pbs",
            Self::Torque => "torque",
            Self::Generic => "generic",
        }
    }
}

macro_rules! hooks {
    ($($(#[$doc:meta])* $hook:ident $system:ident $name:literal $kind:ident $seconds:literal;)*) => {
        /// A hook: what a batch system calls at one point of a job's or a node's life.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub(crate) enum Hook {
            $($(#[$doc])* $hook,)*
        }

        impl Hook {
            /// All of them.
            pub(crate) const ALL: &'static [Self] = &[$(Self::$hook,)*];

            /// Returns its batch system.
            pub(crate) fn system(self) -> System {
                match self { $(Self::$hook => System::$system,)* }
            }

            /// Returns the name of its subcommand.
            pub(crate) fn name(self) -> &'static str {
                match self { $(Self::$hook => $name,)* }
            }

            /// Returns what it is for.
            pub(crate) fn kind(self) -> Kind {
                match self { $(Self::$hook => Kind::$kind,)* }
            }

            /// Returns how long it may take where hook.toml does not say; each is shorter than what the batch system allows by default.
            pub(crate) fn deadline(self) -> Duration {
                Duration::from_secs(match self { $(Self::$hook => $seconds,)* })
            }
        }
    };
}

/// What a hook is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Begin,
    End,
    Suspend,
    Resume,
    PowerUp,
    PowerDown,
}

hooks! {
    /// On the node. Slurm wants it to be done within its MessageTimeout of 10 s.
    SlurmProlog Slurm "prolog" Begin 8;
    /// On the node.
    SlurmEpilog Slurm "epilog" End 8;
    /// On the controller; nothing there ends it, and a victim may have to be written to disk.
    SlurmPrologController Slurm "prolog-controller" Begin 120;
    /// On the controller.
    SlurmEpilogController Slurm "epilog-controller" End 20;
    /// ResumeProgram: ResumeTimeout is 60 s, and Slurm kills what takes longer.
    SlurmResume Slurm "resume" PowerUp 50;
    /// SuspendProgram: SuspendTimeout is 30 s.
    SlurmSuspend Slurm "suspend" PowerDown 25;
    /// Nothing ends it.
    SgeProlog Sge "prolog" Begin 60;
    /// Nothing ends it.
    SgeEpilog Sge "epilog" End 20;
    /// Nothing ends it, but as long as it runs a further suspension is left out.
    SgeSuspend Sge "suspend" Suspend 20;
    /// Nothing ends it.
    SgeResume Sge "resume" Resume 30;
    /// A hook's alarm is 30 s.
    PbsBegin Pbs "begin" Begin 25;
    /// A hook's alarm is 30 s.
    PbsEnd Pbs "end" End 20;
    /// A hook's alarm is 30 s.
    PbsAbort Pbs "abort" End 20;
    /// A hook's alarm is 30 s, and the MoM does nothing else meanwhile.
    PbsSuspend Pbs "suspend" Suspend 20;
    /// A hook's alarm is 30 s.
    PbsResume Pbs "resume" Resume 25;
    /// $prologalarm is 300 s.
    TorquePrologue Torque "prologue" Begin 120;
    /// $prologalarm is 300 s.
    TorqueEpilogue Torque "epilogue" End 20;
    /// As its caller says.
    GenericBegin Generic "begin" Begin 60;
    /// HTCondor ends its hook for a job's exit after 30 s.
    GenericEnd Generic "end" End 20;
    /// As its caller says.
    GenericPreempt Generic "preempt" Suspend 30;
    /// As its caller says.
    GenericResume Generic "resume" Resume 30;
}

impl Hook {
    /// Returns how people and hook.toml name it: `slurm-prolog`.
    pub(crate) fn full_name(self) -> String {
        format!("{}-{}", self.system().name(), self.name())
    }

    /// Returns whether it asks again while there is no room: only where a wait costs neither a node nor a batch system's daemon.
    pub(crate) fn waits_for_room(self) -> bool {
        matches!(self, Self::SlurmPrologController | Self::GenericBegin)
    }

    /// Returns whether the job runs whatever the hook says: then what it was granted stays.
    pub(crate) fn job_runs_anyway(self) -> bool {
        matches!(self, Self::SlurmProlog)
    }

    /// Returns whether it runs inside the domain that it speaks of. Who stops itself cannot start itself again.
    pub(crate) fn is_inside(self) -> bool {
        matches!(
            self,
            Self::SgeSuspend | Self::SgeResume | Self::PbsSuspend | Self::PbsResume
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the systems allow by default, in seconds (PrologEpilogTimeout and the like are not limited where none is given).
    #[test]
    fn deadlines_are_shorter_than_the_systems_own() {
        for hook in Hook::ALL {
            let limit = match hook {
                Hook::SlurmProlog | Hook::SlurmEpilog => 10,
                Hook::SlurmResume => 60,
                Hook::SlurmSuspend => 30,
                Hook::PbsBegin | Hook::PbsEnd | Hook::PbsAbort => 30,
                Hook::PbsSuspend | Hook::PbsResume => 30,
                Hook::TorquePrologue | Hook::TorqueEpilogue => 300,
                Hook::GenericEnd => 30,
                Hook::SlurmPrologController
                | Hook::SlurmEpilogController
                | Hook::SgeProlog
                | Hook::SgeEpilog
                | Hook::SgeSuspend
                | Hook::SgeResume
                | Hook::GenericBegin
                | Hook::GenericPreempt
                | Hook::GenericResume => u64::MAX,
            };
            assert!(hook.deadline().as_secs() < limit, "{hook:?}");
        }
    }

    #[test]
    fn names_are_told_apart() {
        let names: std::collections::HashSet<_> =
            Hook::ALL.iter().map(|hook| hook.full_name()).collect();
        assert_eq!(names.len(), Hook::ALL.len());
    }
}
