//! What shall be: leases, and who holds which domain back. It stands in the store; the drivers bring libvirt to it. Pure. How it changes is in `leases`
//! and `holds`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal, Tag},
    protocol::{Depth, DomainState, Holder, JobKey, LeaseKey, LeaseState, Maintenance, Then},
};

use super::{
    drive::{Taken, Wants},
    ledger::{Amount, Class, Domain, Job, Ledger},
};

/// Everything that must survive.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Record {
    pub(crate) leases: BTreeMap<LeaseId, Lease>,
    pub(crate) domains: BTreeMap<Uuid, Kept>,
    pub(crate) ended: BTreeMap<(JobKey, Option<Uuid>), Ended>,
    pub(crate) maintenance: Option<Maintenance>,
    /// How much memory domains have had at once since the first of them gave way, in KiB; nothing where no more than there is.
    pub(crate) had_kib: u64,
}

/// One lease: a job may have several domains of a host.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct LeaseId {
    pub(crate) key: LeaseKey,
    pub(crate) uuid: Uuid,
}

/// A job's hold on a domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Lease {
    pub(crate) key: LeaseKey,
    pub(crate) uuid: Uuid,
    pub(crate) name: DomainName,
    pub(crate) hypervisor: String,
    pub(crate) user: Option<Principal>,
    pub(crate) principal: Principal,
    /// Whether the job lets itself be preempted, as far as its class does.
    pub(crate) preemptible: bool,
    pub(crate) stage: Stage,
    /// Whether its domain can only have its room once memory was given.
    pub(crate) needs_memory: bool,
    /// Those who have to give before it is active.
    pub(crate) after: BTreeSet<Uuid>,
    pub(crate) began_ms: u64,
    /// What was left of its time when it was last written down.
    pub(crate) ends_in_ms: Option<u64>,
}

/// How far a lease is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Stage {
    Reserved,
    Preparing,
    Active,
}

/// What is kept of a domain that is held back, or was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Kept {
    pub(crate) name: DomainName,
    pub(crate) hypervisor: String,
    pub(crate) holds: Vec<Hold>,
    /// What was taken from it; written down before it is.
    pub(crate) taken: Taken,
    /// Milliseconds that it has spent preempted with a job.
    pub(crate) preempted_ms: u64,
}

/// Somebody holds a domain back.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Hold {
    pub(crate) holder: Holder,
    pub(crate) depth: Depth,
    pub(crate) reason: String,
    pub(crate) since_ms: u64,
    /// The domain that got the room.
    pub(crate) for_whom: Option<Uuid>,
    /// It comes back once these have given.
    pub(crate) after: BTreeSet<Uuid>,
    /// Whether libvirt was seen to have it so: until then it may turn out that it cannot be.
    pub(crate) is_proven: bool,
}

impl Hold {
    pub(super) fn is_room(&self) -> bool {
        matches!(self.holder, Holder::Room(_))
    }
}

/// A run that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Ended {
    pub(crate) run: u32,
    pub(crate) at_ms: u64,
}

/// The host as it is known at this moment.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct World {
    /// What the host has for domains, without what has been let in and does not show yet.
    pub(crate) capacity: Amount,
    pub(crate) domains: BTreeMap<Uuid, Known>,
}

impl World {
    /// The memory that all domains have together, in KiB.
    fn memory(&self) -> u64 {
        let on = self.domains.values().filter(|it| it.state.is_active());
        on.map(|it| it.memory_kib).sum()
    }
}

/// A domain as it is known.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Known {
    pub(crate) name: DomainName,
    pub(crate) hypervisor: String,
    pub(crate) class: Option<(Tag, Class)>,
    pub(crate) state: DomainState,
    pub(crate) saved: bool,
    pub(crate) memory_kib: u64,
    pub(crate) vcpus: u32,
    /// Whether it has come back only just now.
    pub(crate) is_fresh: bool,
    /// Whether it could not give way when it was last tried.
    pub(crate) balks: bool,
    /// Whether it was switched on a short while ago.
    pub(crate) boots: bool,
}

/// Why there is no lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) why: String,
    pub(crate) then: Then,
}

impl Refusal {
    pub(crate) fn new(then: Then, why: impl Into<String>) -> Self {
        Self {
            why: why.into(),
            then,
        }
    }
}

/// What a driver has seen of a domain.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Given {
    /// Nothing yet.
    #[default]
    Nothing,
    /// Its CPUs.
    Cpus,
    /// All that its holders want.
    All,
}

impl Record {
    /// How deep a domain is to be.
    pub(crate) fn goal(&self, uuid: Uuid) -> Option<Depth> {
        let kept = self.domains.get(&uuid)?;
        kept.holds.iter().map(|hold| hold.depth).max()
    }

    /// What is wanted of a domain, by all who hold it together.
    pub(crate) fn wants(&self, uuid: Uuid) -> Wants {
        let kept = self.domains.get(&uuid);
        let holds = kept.into_iter().flat_map(|kept| &kept.holds);
        Wants::of(holds.map(|hold| hold.depth))
    }

    /// The leases of a domain.
    pub(crate) fn leases_of(&self, uuid: Uuid) -> impl Iterator<Item = &Lease> {
        self.leases.values().filter(move |lease| lease.uuid == uuid)
    }

    /// How a lease stands.
    pub(crate) fn state(&self, lease: &Lease) -> LeaseState {
        match lease.stage {
            Stage::Reserved => LeaseState::Reserved,
            Stage::Preparing => LeaseState::Preparing,
            Stage::Active if self.goal(lease.uuid).is_some() => LeaseState::Preempted,
            Stage::Active => LeaseState::Active,
        }
    }

    /// The domains that give way for a lease.
    pub(crate) fn victims(&self, lease: &Lease) -> impl Iterator<Item = (&Uuid, &Kept)> {
        let holder = Holder::Room(Some(lease.key.clone()));
        self.domains.iter().filter(move |(_, kept)| {
            let mut holds = kept.holds.iter();
            holds.any(|hold| hold.holder == holder && hold.for_whom == Some(lease.uuid))
        })
    }

    /// The ledger of the host, with everything that has been promised as if it were so.
    pub(crate) fn ledger(&self, world: &World) -> Ledger {
        let mut jobs: BTreeMap<Uuid, Job> = BTreeMap::new();
        for lease in self.leases.values() {
            let known = world.domains.get(&lease.uuid);
            let kept = self.domains.get(&lease.uuid);
            // Nobody holds it any more, and it has not got all back yet: it is not preempted before it has run.
            let comes_back = kept.is_some_and(|kept| {
                let mut holds = kept.holds.iter();
                holds.all(|hold| !hold.after.is_empty()) && !kept.taken.is_nothing()
            });
            let (is_firm, is_fresh, is_reserved) = (
                !lease.preemptible,
                lease.stage == Stage::Preparing
                    || comes_back
                    || known.is_some_and(|known| known.is_fresh),
                lease.stage == Stage::Reserved,
            );
            jobs.entry(lease.uuid)
                .and_modify(|job| {
                    job.is_firm |= is_firm;
                    job.is_fresh |= is_fresh;
                    job.is_reserved &= is_reserved;
                })
                .or_insert(Job {
                    is_firm,
                    is_fresh,
                    is_reserved,
                });
        }
        let domains = world
            .domains
            .iter()
            .map(|(uuid, known)| {
                let kept = self.domains.get(uuid);
                let taken = kept.map(|kept| &kept.taken);
                let is_frozen = !known.state.is_active()
                    && known.saved
                    && taken.is_some_and(|taken| taken.frozen);
                let holds = kept.into_iter().flat_map(|kept| &kept.holds);
                // One that comes back as soon as others have given is promised its room; and what somebody wants of a domain is
                // nobody's before it is seen: a job that counts on it ends with it, others do not.
                let held: Vec<Depth> = holds
                    .filter(|hold| hold.after.is_empty())
                    .filter(|hold| hold.is_room() || hold.is_proven)
                    .map(|hold| hold.depth)
                    .collect();
                let full = Amount {
                    cpus: u64::from(known.vcpus),
                    kib: taken
                        .and_then(|taken| taken.memory_kib)
                        .unwrap_or(known.memory_kib),
                };
                Domain {
                    uuid: *uuid,
                    class: known.class.as_ref().map(|(_, class)| *class),
                    full,
                    is_on: known.state.is_active() || is_frozen,
                    is_shrunk: held.contains(&Depth::Shrink),
                    held: held.into_iter().max(),
                    job: jobs.get(uuid).copied(),
                    balks: known.balks,
                    preempted_ms: kept.map_or(0, |kept| kept.preempted_ms),
                }
            })
            .collect();
        Ledger {
            capacity: world.capacity,
            had_kib: self.had_kib,
            domains,
        }
    }

    /// Looks how much memory domains have at once: those who give way from now on can come back to that.
    pub(crate) fn watch(&mut self, world: &World) {
        let has = world.memory();
        let has = if has > world.capacity.kib { has } else { 0 };
        let is_open = |kept: &Kept| !kept.holds.is_empty() || !kept.taken.is_nothing();
        self.had_kib = if self.domains.values().any(is_open) {
            self.had_kib.max(has)
        } else {
            has
        };
    }

    /// Forgets domains of which nothing is to be remembered, and those that are not there any more.
    pub(crate) fn tidy(&mut self, world: &World) {
        self.domains.retain(|uuid, kept| {
            let is_there = world.domains.contains_key(uuid);
            let is_open = !kept.holds.is_empty() || !kept.taken.is_nothing();
            is_open || (is_there && kept.preempted_ms > 0)
        });
    }
}

impl Lease {
    pub(crate) fn id(&self) -> LeaseId {
        LeaseId {
            key: self.key.clone(),
            uuid: self.uuid,
        }
    }
}
