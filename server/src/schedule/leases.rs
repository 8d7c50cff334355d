//! How leases come and go. Pure.
//!
//! ```text
//!  begin --> preparing --(all seen to have given, the domain seen to have its room)--> active --> end
//!    |           '--(one cannot give)--> gone, and its holds with it
//!    '--> reserved --(begin in earnest)--> preparing | active
//! ```
//! A run that has ended begins no more, and an older one ends no newer one.

use uuid::Uuid;
use xman_common::protocol::{DomainState, Holder, LeaseKey, Reconcile, Then};

use super::{
    ledger::Amount,
    plan::{self, Asks, Plan, Why},
    record::{Ended, Lease, LeaseId, Record, Refusal, Stage, World},
};

/// Ended runs that are remembered, so that a `begin` that comes late begins nothing.
const MAX_ENDED: usize = 10_000;
/// Leases on one host: more than jobs that fit it.
const MAX_LEASES: usize = 4096;
/// Leases of one domain: what speaks for it alone leaves room for others.
const MAX_LEASES_OF_DOMAIN: usize = 1024;
/// For how long, in milliseconds: no batch system delivers later than that.
const ENDED_MS: u64 = 24 * 3600 * 1000;

impl Record {
    /// Begins a lease, or finds it begun.
    ///
    /// # Errors
    /// Why not.
    pub(crate) fn begin(
        &mut self,
        world: &World,
        asked: Lease,
        speaks_for_all: bool,
    ) -> Result<(), Refusal> {
        let id = asked.id();
        // A node's word counts for its own domain, and so does what it says of other runs of the job.
        let concerns = |uuid: Uuid| speaks_for_all || uuid == asked.uuid;
        self.fence(&asked, concerns)?;
        let known = self.leases.get(&id).map(|lease| lease.stage);
        match (known, asked.stage) {
            (None, _) | (Some(Stage::Reserved), Stage::Preparing | Stage::Active) => {}
            (Some(Stage::Reserved | Stage::Preparing | Stage::Active), _) => return Ok(()),
        }
        self.has_part(world, &asked)?;
        let older: Vec<LeaseId> = self
            .leases
            .keys()
            .filter(|it| it.key.job == asked.key.job && it.key.run < asked.key.run)
            .filter(|it| concerns(it.uuid))
            .cloned()
            .collect();
        self.drop_leases(&older);
        self.leases.remove(&id);
        let of_domain = self.leases_of(id.uuid).count();
        if self.leases.len() >= MAX_LEASES || of_domain >= MAX_LEASES_OF_DOMAIN {
            return Err(Refusal::new(
                Then::Later,
                format!(
                    "this host has {} leases, {of_domain} of them of this domain, and takes no more",
                    self.leases.len()
                ),
            ));
        }
        let mut ledger = self.ledger(world);
        let is_firm = !asked.preemptible;
        // Beside a job that has its room; one that is still to get it may not.
        let joins = self.leases_of(id.uuid).any(|it| it.stage == Stage::Active)
            && self.goal(id.uuid).is_none();
        let victims = if joins {
            Vec::new()
        } else {
            let asks = Asks {
                uuid: id.uuid,
                is_firm,
                comes_back: false,
            };
            match plan::plan(&ledger, asks) {
                Plan::Go(victims) => victims,
                Plan::No(why) => return Err(self.refusal(world, why)),
            }
        };
        if asked.stage == Stage::Reserved {
            self.leases.insert(id, asked);
            return Ok(());
        }
        let needs_memory = ledger
            .find_mut(id.uuid)
            .is_some_and(|domain| domain.needs().kib > 0);
        self.give_way(world, &victims, Some(&asked.key), id.uuid, asked.began_ms);
        let after = self.giving(id.uuid);
        self.let_come(id.uuid, after.clone());
        let lease = Lease {
            after,
            stage: Stage::Preparing,
            needs_memory,
            ..asked
        };
        self.leases.insert(id, lease);
        self.settle(world);
        Ok(())
    }

    /// Whether a run of a job has ended in a domain.
    pub(crate) fn has_ended(&self, id: &LeaseId) -> bool {
        [None, Some(id.uuid)]
            .into_iter()
            .filter_map(|uuid| self.ended.get(&(id.key.job.clone(), uuid)))
            .any(|ended| ended.run >= id.key.run)
    }

    /// Refuses a run that has ended, and one that is older than another.
    fn fence(&self, asked: &Lease, concerns: impl Fn(Uuid) -> bool) -> Result<(), Refusal> {
        let key = &asked.key;
        if self.has_ended(&asked.id()) {
            return Err(Refusal::new(
                Then::Never,
                format!("{key} has ended already; a run does not begin twice"),
            ));
        }
        let newer = self
            .leases
            .keys()
            .find(|it| it.key.job == key.job && it.key.run > key.run && concerns(it.uuid));
        match newer {
            Some(newer) => Err(Refusal::new(
                Then::Never,
                format!(
                    "{} has begun, which is a later run of the same job",
                    newer.key
                ),
            )),
            None => Ok(()),
        }
    }

    /// Refuses a domain that cannot have a job now, whatever room there is.
    fn has_part(&self, world: &World, asked: &Lease) -> Result<(), Refusal> {
        let name = &asked.name;
        if let Some(maintenance) = &self.maintenance {
            return Err(Refusal::new(
                Then::Elsewhere,
                format!(
                    "the host is in maintenance since {} said so: {}",
                    maintenance.principal, maintenance.reason
                ),
            ));
        }
        let known = world.domains.get(&asked.uuid).ok_or_else(|| {
            Refusal::new(Then::Elsewhere, format!("'{name}' is not here any more"))
        })?;
        if known.class.is_none() {
            return Err(Refusal::new(
                Then::Elsewhere,
                format!(
                    "'{name}' is of no class that takes part here; `rxm class` puts it into one of xmand.toml's"
                ),
            ));
        }
        let kept = self.domains.get(&asked.uuid);
        let is_frozen = kept.is_some_and(|kept| kept.taken.frozen) && known.saved;
        if !known.state.is_active() && !is_frozen {
            return Err(self.refusal(world, Why::Off));
        }
        let held = kept
            .into_iter()
            .flat_map(|kept| &kept.holds)
            .find(|hold| !hold.is_room());
        if let Some(hold) = held {
            return Err(Refusal::new(
                Then::Later,
                format!("'{name}' is held back by {}", hold.holder),
            ));
        }
        let is_ours = kept.is_some_and(|kept| kept.taken.paused || kept.taken.frozen);
        if known.state == DomainState::Paused && !is_ours {
            return Err(Refusal::new(
                Then::Later,
                format!("'{name}' was paused by somebody; `rxm unpause {name}` lets it run on"),
            ));
        }
        Ok(())
    }

    /// Says why there is no room.
    fn refusal(&self, world: &World, why: Why) -> Refusal {
        let name = |uuid: Uuid| {
            let known = world.domains.get(&uuid);
            known.map_or_else(|| uuid.to_string(), |known| format!("'{}'", known.name))
        };
        match why {
            Why::NoPart => Refusal::new(Then::Elsewhere, "the domain takes no part here"),
            Why::Off => Refusal::new(Then::Later, "the domain is off; `rxm start` switches it on"),
            Why::Never { needs, capacity } => Refusal::new(
                Then::Elsewhere,
                format!(
                    "it needs {}, and the host has {} for jobs",
                    words(needs),
                    words(capacity)
                ),
            ),
            Why::Taken { missing, by } => {
                let by = by.map_or_else(String::new, |uuid| {
                    let mut leases = self.leases_of(uuid);
                    let job = leases.next().map(|lease| format!(", for {}", lease.key));
                    format!(
                        "; {} has most of what is taken{}",
                        name(uuid),
                        job.unwrap_or_default()
                    )
                });
                Refusal::new(
                    Then::Later,
                    format!(
                        "{} more would be needed, and nobody gives way{by}",
                        words(missing)
                    ),
                )
            }
            Why::Kept { for_whom } => Refusal::new(
                Then::Later,
                format!(
                    "what is free is kept for {}, which has given way and must be able to come back",
                    name(for_whom)
                ),
            ),
        }
    }

    /// Ends a run of a job and those before it, in one domain or all; returns the leases that there were.
    pub(crate) fn end(
        &mut self,
        world: &World,
        key: &LeaseKey,
        uuid: Option<Uuid>,
        now_ms: u64,
    ) -> Vec<LeaseId> {
        let ending: Vec<LeaseId> = self
            .leases
            .keys()
            .filter(|it| it.key.job == key.job && it.key.run <= key.run)
            .filter(|it| uuid.is_none_or(|uuid| uuid == it.uuid))
            .cloned()
            .collect();
        let place = (key.job.clone(), uuid);
        let ended = self.ended.entry(place).or_insert(Ended {
            run: key.run,
            at_ms: now_ms,
        });
        ended.run = ended.run.max(key.run);
        ended.at_ms = now_ms;
        self.forget_ended(now_ms);
        self.drop_leases(&ending);
        self.settle(world);
        ending
    }

    /// Ends the leases of jobs that a batch system has no more, and that are older than its list.
    pub(crate) fn reconcile(
        &mut self,
        world: &World,
        list: &Reconcile,
        is_meant: impl Fn(&Lease) -> bool,
    ) -> Vec<LeaseId> {
        let gone: Vec<LeaseId> = self
            .leases
            .values()
            .filter(|lease| {
                let job = &lease.key.job;
                let is_known = list
                    .running
                    .get(&job.id)
                    .is_some_and(|run| *run <= lease.key.run);
                job.system == list.system
                    && job.cluster == list.cluster
                    && !is_known
                    && is_meant(lease)
            })
            .map(Lease::id)
            .collect();
        self.drop_leases(&gone);
        self.settle(world);
        gone
    }

    /// Ends leases whose time is over.
    pub(crate) fn expire(&mut self, world: &World, over: &[LeaseId]) {
        self.drop_leases(over);
        self.settle(world);
    }

    /// Removes leases, and what batch systems held of their jobs.
    pub(super) fn drop_leases(&mut self, ids: &[LeaseId]) {
        for id in ids {
            self.leases.remove(id);
            if let Some(kept) = self.domains.get_mut(&id.uuid) {
                kept.holds.retain(|hold| match &hold.holder {
                    Holder::Job(key) => key.job != id.key.job || key.run > id.key.run,
                    Holder::Room(_) | Holder::Person(_) => true,
                });
                // Whoever gave way so that this one could come back need not any more.
                for hold in kept.holds.iter_mut().filter(|hold| hold.is_room()) {
                    hold.after.clear();
                }
            }
        }
    }

    fn forget_ended(&mut self, now_ms: u64) {
        self.ended
            .retain(|_, ended| ended.at_ms.saturating_add(ENDED_MS) > now_ms);
        while self.ended.len() > MAX_ENDED {
            let oldest = self.ended.iter().min_by_key(|(_, ended)| ended.at_ms);
            let Some(place) = oldest.map(|(place, _)| place.clone()) else {
                return;
            };
            self.ended.remove(&place);
        }
    }
}

/// An amount as people say it.
pub(crate) fn words(amount: Amount) -> String {
    let memory = format!("{} MiB of memory", amount.kib >> 10);
    match (amount.cpus, amount.kib) {
        (0, _) => memory,
        (1, 0) => "1 CPU".to_owned(),
        (cpus, 0) => format!("{cpus} CPUs"),
        (1, _) => format!("1 CPU and {memory}"),
        (cpus, _) => format!("{cpus} CPUs and {memory}"),
    }
}
