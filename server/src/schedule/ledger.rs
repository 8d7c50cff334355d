//! What a host has for its domains, and what each of them has of it. Pure.
//!
//! CPUs are claimed by domains that have jobs and that nobody holds back. Domains of classes without a job run beside them, and give way to any
//! job. Memory is what a domain has of it, job or none; what is held back counts as if it had given already, since no two jobs may be promised it.

use uuid::Uuid;
use xman_common::protocol::Depth;

/// What is left to a guest that is shrunk and whose class says nothing, in KiB: a guest of today's kernels lives on that.
pub(crate) const FLOOR_KIB: u64 = 256 * 1024;

/// An amount of what domains share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Amount {
    pub(crate) cpus: u64,
    pub(crate) kib: u64,
}

impl Amount {
    pub(crate) fn is_nothing(self) -> bool {
        self == Self::default()
    }

    /// What is left of it without the other; nothing where that is more.
    pub(crate) fn without(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_sub(other.cpus),
            kib: self.kib.saturating_sub(other.kib),
        }
    }

    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            cpus: self.cpus.saturating_add(other.cpus),
            kib: self.kib.saturating_add(other.kib),
        }
    }

    /// Whether the other is no more than this, in everything.
    pub(crate) fn covers(self, other: Self) -> bool {
        other.without(self).is_nothing()
    }

    /// The part of it that is of use where so much is missing.
    fn within(self, missing: Self) -> Self {
        Self {
            cpus: self.cpus.min(missing.cpus),
            kib: self.kib.min(missing.kib),
        }
    }

    /// How much of what is missing this is, in thousandths of each kind together.
    pub(super) fn share_of(self, missing: Self) -> u64 {
        let part = self.within(missing);
        let share = |part: u64, whole: u64| part.saturating_mul(1000).checked_div(whole);
        share(part.cpus, missing.cpus).unwrap_or(0) + share(part.kib, missing.kib).unwrap_or(0)
    }
}

/// A domain, as far as room is concerned.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Domain {
    pub(crate) uuid: Uuid,
    /// Of its class; nothing where it takes no part and only its memory counts.
    pub(crate) class: Option<Class>,
    /// What it has when nobody holds it back.
    pub(crate) full: Amount,
    /// Whether it is switched on, or lies frozen by us.
    pub(crate) is_on: bool,
    /// How deep those who hold it back want it,
    pub(crate) held: Option<Depth>,
    /// and whether one of them wants its memory beside that.
    pub(crate) is_shrunk: bool,
    pub(crate) job: Option<Job>,
    /// Whether it could not give way when it was last tried.
    pub(crate) balks: bool,
    pub(crate) preempted_ms: u64,
}

/// What a domain's class says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Class {
    pub(crate) rank: i32,
    /// How deep it goes; nothing where it never does while it has a job.
    pub(crate) depth: Option<Depth>,
    pub(crate) floor_kib: u64,
}

/// What is known of the jobs in a domain together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    /// Whether one of them must not be preempted.
    pub(crate) is_firm: bool,
    /// Whether it has come back only just now, or is on its way.
    pub(crate) is_fresh: bool,
    /// Whether its room is only kept.
    pub(crate) is_reserved: bool,
}

impl Domain {
    pub(crate) fn rank(&self) -> i32 {
        self.class.map_or(i32::MAX, |class| class.rank)
    }

    /// CPUs that it has by right.
    pub(crate) fn claim(&self) -> u64 {
        match (self.job, self.held) {
            // One that is off asks for them anew when it is switched on.
            (Some(_), None) if self.is_on => self.full.cpus,
            _ => 0,
        }
    }

    /// CPUs that it has because nobody minded.
    pub(crate) fn idle(&self) -> u64 {
        // Who cannot be made to give way is not counted on: without a job it does little.
        let takes_part = self.class.is_some() && self.is_on && !self.balks;
        match (self.job, self.held) {
            (None, None) if takes_part => self.full.cpus,
            _ => 0,
        }
    }

    /// Memory that it has, or will have once it has given what it must.
    pub(crate) fn memory(&self) -> u64 {
        if !self.is_on {
            return 0;
        }
        let shrunk = self.is_shrunk.then(|| self.gives(Some(Depth::Shrink)).kib);
        self.full.kib - self.gives(self.held).kib.max(shrunk.unwrap_or(0))
    }

    /// What it gives at a depth.
    fn gives(&self, depth: Option<Depth>) -> Amount {
        let cpus = self.full.cpus;
        let floor = self.class.map_or(FLOOR_KIB, |class| class.floor_kib);
        match depth {
            None => Amount::default(),
            Some(Depth::Starve | Depth::Pause) => Amount { cpus, kib: 0 },
            Some(Depth::Shrink) => Amount {
                cpus,
                kib: self.full.kib.saturating_sub(floor),
            },
            Some(Depth::Freeze) => Amount {
                cpus,
                kib: self.full.kib,
            },
        }
    }

    /// How deep it goes where it must: without a job at least as deep as leaves it alive.
    pub(super) fn depth(&self) -> Option<Depth> {
        let depth = self.class?.depth;
        match self.job {
            Some(_) => depth,
            None => depth.or(Some(Depth::Starve)),
        }
    }

    /// What it would give.
    pub(super) fn could_give(&self) -> Amount {
        self.gives(self.depth())
    }

    /// What it needs to have all that is its own.
    pub(super) fn needs(&self) -> Amount {
        Amount {
            cpus: self.full.cpus,
            kib: self.full.kib - self.memory(),
        }
    }
}

/// All of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Ledger {
    /// What there is for domains.
    pub(crate) capacity: Amount,
    /// How much memory domains have had at once, in KiB: where a host has promised more than it has, those who gave way come back to no less.
    pub(crate) had_kib: u64,
    /// In the order of their UUIDs.
    pub(crate) domains: Vec<Domain>,
}

impl Ledger {
    pub(crate) fn find(&self, uuid: Uuid) -> Option<&Domain> {
        let at = self.at(uuid)?;
        self.domains.get(at)
    }

    pub(crate) fn find_mut(&mut self, uuid: Uuid) -> Option<&mut Domain> {
        let at = self.at(uuid)?;
        self.domains.get_mut(at)
    }

    fn at(&self, uuid: Uuid) -> Option<usize> {
        let found = self
            .domains
            .binary_search_by_key(&uuid, |domain| domain.uuid);
        found.ok()
    }

    /// CPUs that jobs have by right, and memory that domains have.
    pub(crate) fn used(&self) -> Amount {
        Amount {
            cpus: self.domains.iter().map(Domain::claim).sum(),
            kib: self.domains.iter().map(Domain::memory).sum(),
        }
    }
}
