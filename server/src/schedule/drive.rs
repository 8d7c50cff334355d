//! From what shall be to the next step that brings libvirt there. Pure.
//!
//! ```text
//! look --> next() --> Note(what is about to be taken) --> written down --> look
//!             |--> a step on the domain --> done, or refused --> look
//!             '--> Done
//! ```
//! What is taken is written down before it is, so that after a crash nothing is given back that was not ours, and nothing that was ours is kept.
//! A step whose outcome is not known is taken again: each does nothing where it is done already.

use serde::{Deserialize, Serialize};
use xman_common::protocol::{Depth, DomainState};

use crate::hypervisor::{CpuShare, Life, Seen};

/// As near to a floor as that is there, in KiB: a guest keeps some pages.
pub(crate) const SLACK_KIB: u64 = 8 * 1024;

/// What was taken from a domain, and is to be given back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Taken {
    /// From which of its lives: the next owes nothing.
    pub(crate) life: Option<Life>,
    /// Its CPUs: what it had of them.
    pub(crate) cpu: Option<CpuShare>,
    /// Its memory: what it had, in KiB.
    pub(crate) memory_kib: Option<u64>,
    /// Whether we stopped its virtual CPUs.
    pub(crate) paused: bool,
    /// Whether we wrote its memory to its image.
    pub(crate) frozen: bool,
}

impl Taken {
    pub(crate) fn is_nothing(&self) -> bool {
        let Self {
            life: _,
            cpu,
            memory_kib,
            paused,
            frozen,
        } = self;
        cpu.is_none() && memory_kib.is_none() && !paused && !frozen
    }
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// Nothing: it is as it shall be.
    Done,
    /// Write this down.
    Note(Taken),
    Halt,
    RunOn,
    /// Leave it a trickle of what it had.
    Starve(CpuShare),
    /// libvirt does not say what it has, so it must be asked why.
    CannotStarve,
    Feed(CpuShare),
    /// Down to so much memory, in KiB.
    Shrink(u64),
    Grow(u64),
    Freeze,
    Thaw,
}

/// What those who hold a domain want of it, together.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Wants {
    pub(crate) starved: bool,
    pub(crate) shrunk: bool,
    pub(crate) paused: bool,
    pub(crate) frozen: bool,
}

impl Wants {
    pub(crate) fn of(depths: impl IntoIterator<Item = Depth>) -> Self {
        let (mut starved, mut shrunk, mut paused, mut frozen) = (false, false, false, false);
        for depth in depths {
            match depth {
                Depth::Starve => starved = true,
                Depth::Shrink => (starved, shrunk) = (true, true),
                Depth::Pause => paused = true,
                Depth::Freeze => (paused, frozen) = (true, true),
            }
        }
        Self {
            // Whose CPUs stand still needs no bound on them.
            starved: starved && !paused,
            shrunk: shrunk && !frozen,
            paused,
            frozen,
        }
    }
}

/// Returns the next step of a domain on its way to a depth, or back to having all.
pub(crate) fn next(wants: Wants, floor_kib: u64, taken: &Taken, seen: &Seen) -> Step {
    if seen.state.is_active() {
        alive(wants, floor_kib, taken, seen)
    } else if wants.frozen {
        // With its image, or switched off by somebody: it gives everything either way.
        Step::Done
    } else if taken.frozen && seen.saved {
        Step::Thaw
    } else if taken.is_nothing() || (seen.saved && !taken.frozen) {
        // What somebody else has saved comes back as it was, and is owed what it is owed then.
        Step::Done
    } else {
        Step::Note(Taken::default())
    }
}

/// Whether a domain's virtual CPUs stand still.
pub(crate) fn stands_still(state: DomainState) -> bool {
    match state {
        DomainState::Running | DomainState::Blocked | DomainState::ShuttingDown => false,
        DomainState::Paused
        | DomainState::Sleeping
        | DomainState::Off
        | DomainState::Crashed
        | DomainState::Unknown => true,
    }
}

fn alive(wants: Wants, floor_kib: u64, taken: &Taken, seen: &Seen) -> Step {
    let note = |change: &dyn Fn(&mut Taken)| {
        let mut next = taken.clone();
        next.life = seen.life;
        change(&mut next);
        Step::Note(next)
    };
    let runs = !stands_still(seen.state);
    if !taken.is_nothing() && taken.life != seen.life {
        // It has come back from its image, as we left it or as somebody else saved it, or somebody has started it.
        let paused = taken.frozen && taken.paused && seen.state == DomainState::Paused;
        let is_short = taken.memory_kib.is_some_and(|had| seen.memory_kib < had);
        return Step::Note(Taken {
            life: seen.life,
            paused,
            memory_kib: taken.memory_kib.filter(|_| is_short),
            cpu: taken.cpu.clone().filter(|had| {
                let trickle = had.trickle(seen.vcpus);
                seen.cpu.as_ref() == Some(&trickle)
            }),
            frozen: false,
        });
    }
    // Before anything is given back: what is held does not run in between.
    if wants.paused && runs {
        return if taken.paused {
            Step::Halt
        } else {
            note(&|taken| taken.paused = true)
        };
    }
    // A starved emulator neither grows nor saves in time: it is fed first.
    if let Some(had) = taken.cpu.as_ref().filter(|_| !wants.starved) {
        return match &seen.cpu {
            Some(now) if now != had => Step::Feed(had.clone()),
            Some(_) | None => note(&|taken| taken.cpu = None),
        };
    }
    if let Some(had) = taken.memory_kib.filter(|_| !wants.shrunk && !wants.frozen) {
        return if seen.memory_kib < had {
            Step::Grow(had)
        } else {
            note(&|taken| taken.memory_kib = None)
        };
    }
    // A guest that we have stopped gives nothing; what it has given it keeps giving.
    if wants.shrunk && !wants.paused && seen.memory_kib > floor_kib.saturating_add(SLACK_KIB) {
        return match taken.memory_kib {
            None => note(&|taken| taken.memory_kib = Some(seen.memory_kib)),
            Some(_) => Step::Shrink(floor_kib),
        };
    }
    if wants.starved {
        match (&taken.cpu, &seen.cpu) {
            (_, None) => return Step::CannotStarve,
            (None, Some(now)) => return note(&|taken| taken.cpu = Some(now.clone())),
            (Some(had), Some(now)) if had.trickle(seen.vcpus) != *now => {
                return Step::Starve(had.clone());
            }
            (Some(_), Some(_)) => {}
        }
    }
    if wants.frozen {
        return if taken.frozen {
            Step::Freeze
        } else {
            note(&|taken| {
                taken.frozen = true;
                taken.memory_kib.get_or_insert(seen.memory_kib);
            })
        };
    }
    if taken.frozen {
        return note(&|taken| taken.frozen = false);
    }
    if taken.paused && !wants.paused {
        return if seen.state == DomainState::Paused {
            Step::RunOn
        } else {
            note(&|taken| taken.paused = false)
        };
    }
    Step::Done
}
