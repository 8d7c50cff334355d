//! Making room for jobs: who holds which domain, who gives way, and how they come back.
//!
//! ```text
//! verbs --> decide: ledger, plan (pure) --> record of what shall be --> store, then memory
//!                                                  |
//!            drivers, one a domain held back: look --> next step (pure) --> libvirt --> look ...
//!                                                  |
//!            what they have seen --> decide: who waited for it goes on
//! ```
//! Only one thing is decided at a time, and nothing counts before it is in the store. So a crash needs no cure of its own: xmand starts, reads what
//! shall be, and the drivers go on.

use std::{
    collections::{BTreeMap, HashMap},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::{Mutex as Turn, watch};
use uuid::Uuid;
use xman_common::protocol::{Code, DomainState, Fault, Then};
use xman_policy::{Lease as Held, systems::Systems};

use ledger::{Amount, Class};
use record::{Known, LeaseId, Record, Refusal, Stage, World};

use crate::{
    Host,
    clock::now_ms,
    config::Schedule as Rules,
    hypervisor::Facts,
    store::{Store, StoreError, look_at_schedule},
};

pub(crate) use admission::{admit, admit_new, may};
pub(crate) use calls::{begin, end, hold, leases, let_go, maintain, reconcile, status};
pub(crate) use standing::mark;

mod admission;
mod calls;
mod drive;
mod holds;
mod leases;
mod ledger;
#[cfg(test)]
mod model;
mod plan;
mod record;
mod rows;
mod run;
mod standing;

/// For how long a domain that could not give way is not tried again.
const BALKS_FOR: Duration = Duration::from_secs(300);
/// For how long it is remembered, for who asked, why something was taken back.
const REMEMBERED: Duration = Duration::from_secs(120);

/// The host's schedule.
pub(crate) struct Scheduler {
    rules: Rules,
    systems: Systems,
    record: Mutex<Arc<Record>>,
    /// One decision at a time, from what it rests on to the store.
    turn: Turn<()>,
    live: Mutex<Live>,
    /// Rings with each change of the record, and of what drivers have seen.
    changed: watch::Sender<u64>,
}

/// What is known while this process lives.
#[derive(Default)]
struct Live {
    drivers: HashMap<Uuid, run::Driver>,
    came_back: HashMap<Uuid, Instant>,
    balks: HashMap<Uuid, Instant>,
    /// When leases end by themselves.
    ends: HashMap<LeaseId, Instant>,
    /// Since when domains with jobs are held back.
    spells: HashMap<Uuid, Instant>,
    /// Why leases that were begun are no more,
    refused: HashMap<LeaseId, (Instant, Refusal)>,
    /// and holds.
    undone: HashMap<Uuid, (Instant, Fault)>,
    /// When leases began here.
    begun: HashMap<LeaseId, Instant>,
    /// What was let in and does not show yet.
    admitted: HashMap<u64, Amount>,
    admissions: u64,
    /// How far the inventory was when it was last looked at.
    looked_at: u64,
    shown: standing::Shown,
}

impl Live {
    /// All that was let in and does not show yet.
    fn coming(&self) -> Amount {
        let admitted = self.admitted.values();
        admitted.fold(Amount::default(), |sum, it| sum.and(*it))
    }
}

impl Scheduler {
    /// Takes up what the store says.
    ///
    /// # Errors
    /// What cannot be read.
    pub(crate) async fn open(rules: Rules, store: &Store) -> Result<Self, String> {
        let rows = store.schedule().await.map_err(|error| error.to_string())?;
        let record = rows::read(rows)?;
        let now = Instant::now();
        let ends = record.leases.iter().filter_map(|(id, lease)| {
            let left = Duration::from_millis(lease.ends_in_ms?);
            Some((id.clone(), now + left))
        });
        Ok(Self {
            systems: rules.systems(),
            rules,
            live: Mutex::new(Live {
                ends: ends.collect(),
                ..Live::default()
            }),
            record: Mutex::new(Arc::new(record)),
            turn: Turn::new(()),
            changed: watch::Sender::new(0),
        })
    }

    /// What shall be, as it is in the store.
    fn record(&self) -> Arc<Record> {
        Arc::clone(&self.record.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Changes what shall be: first in the store, then here, then the drivers hear of it.
    ///
    /// # Errors
    /// `Unavailable` where it cannot be written down: then nothing has changed.
    async fn decide<T>(
        &self,
        host: &Arc<Host>,
        change: impl FnOnce(&mut Record, &World) -> T,
    ) -> Result<T, Fault> {
        let _turn = self.turn.lock().await;
        let mut world = self.world(host);
        world.capacity = world.capacity.without(self.live().coming());
        let before = self.record();
        let mut after = Record::clone(&before);
        after.watch(&world);
        let answer = change(&mut after, &world);
        let spells = self.count_spells(&before, &mut after);
        if after != *before {
            let rows = rows::changes(&before, &after);
            let written = host.store.put_schedule(rows).await;
            written.map_err(|error: StoreError| error.before())?;
            self.take(host, after);
        }
        self.live().spells = spells;
        Ok(answer)
    }

    fn take(&self, host: &Arc<Host>, record: Record) {
        // The first that began: a policy sees one.
        let mut active: Vec<_> = record
            .leases
            .values()
            .filter(|lease| lease.stage == Stage::Active)
            .collect();
        active.sort_by_key(|lease| std::cmp::Reverse(lease.began_ms));
        let jobs = active.into_iter().filter_map(|lease| {
            let held = Held {
                user: lease.user.clone()?,
                job: lease.key.job.to_string(),
            };
            Some((lease.uuid, lease.hypervisor.clone(), Arc::new(held)))
        });
        host.hypervisors.hold_jobs(jobs.collect());
        let before = self.record();
        let wanted = |record: &Record, uuid: Uuid| {
            let kept = record.domains.get(&uuid);
            kept.map(|kept| {
                let holds = kept.holds.iter();
                holds
                    .map(|hold| (hold.holder.clone(), hold.depth))
                    .collect::<Vec<_>>()
            })
        };
        let open: Vec<(Uuid, String, bool)> = record
            .domains
            .iter()
            .map(|(uuid, kept)| {
                let is_new = wanted(&before, *uuid) != wanted(&record, *uuid);
                (*uuid, kept.hypervisor.clone(), is_new)
            })
            .collect();
        *self.record.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(record);
        for (uuid, hypervisor, is_new) in open {
            if is_new {
                // What was seen before was not seen for these, and what was granted before is judged again.
                if let Some(driver) = self.live().drivers.get_mut(&uuid) {
                    driver.given = record::Given::Nothing;
                }
                host.hypervisors.touch(uuid, &hypervisor);
            }
            run::ensure(host, uuid);
        }
        self.ring();
    }

    /// Adds up how long domains with jobs have been held back. Returns since when those are that still are.
    fn count_spells(&self, before: &Record, after: &mut Record) -> HashMap<Uuid, Instant> {
        let mut spells = self.live().spells.clone();
        let now = Instant::now();
        let is_preempted = |record: &Record, uuid: Uuid| {
            record.goal(uuid).is_some() && record.leases_of(uuid).next().is_some()
        };
        let uuids: Vec<Uuid> = after.domains.keys().copied().collect();
        for uuid in uuids {
            match (is_preempted(before, uuid), is_preempted(after, uuid)) {
                (_, true) => {
                    spells.entry(uuid).or_insert(now);
                }
                (_, false) => {
                    let spell = spells.remove(&uuid).map(|since| since.elapsed());
                    if let (Some(spell), Some(kept)) = (spell, after.domains.get_mut(&uuid)) {
                        kept.preempted_ms += millis(spell);
                    }
                }
            }
        }
        spells.retain(|uuid, _| after.domains.contains_key(uuid));
        spells
    }

    /// The host as it is known at this moment.
    fn world(&self, host: &Host) -> World {
        let info = host.hypervisors.info();
        let capacity = Amount {
            cpus: u64::from(info.cpus.saturating_sub(self.rules.reserve_cpus)),
            kib: info.memory_kib.saturating_sub(self.rules.reserve_kib),
        };
        let now = Instant::now();
        let rows = host.hypervisors.rows();
        let mut live = self.live();
        live.came_back
            .retain(|_, at| now.duration_since(*at) < self.rules.min_run);
        live.balks
            .retain(|_, at| now.duration_since(*at) < BALKS_FOR);
        let mut twice: HashMap<Uuid, usize> = HashMap::new();
        for (facts, _) in &rows {
            *twice.entry(facts.uuid).or_default() += 1;
        }
        let domains = rows.into_iter().map(|(facts, row)| {
            let moves = host.leaving.destination(facts.uuid).is_some()
                || host.permits.arriving(facts.uuid).is_some();
            // Of two that one UUID stands for nobody can be meant.
            let is_one = twice.get(&facts.uuid).is_none_or(|times| *times == 1);
            let known = Known {
                class: self.class_of(&facts).filter(|_| is_one),
                boots: self.boots(&facts, row.since_ms),
                name: facts.name,
                hypervisor: facts.uri.to_string(),
                state: facts.state,
                saved: row.saved,
                memory_kib: row.memory_kib,
                vcpus: row.vcpus,
                is_fresh: live.came_back.contains_key(&facts.uuid),
                balks: moves || live.balks.contains_key(&facts.uuid),
            };
            (facts.uuid, known)
        });
        World {
            capacity,
            domains: domains.collect(),
        }
    }

    /// The class that a domain takes part in. One whose metadata cannot be read takes none.
    fn class_of(&self, facts: &Facts) -> Option<(xman_common::name::Tag, Class)> {
        let metadata = facts.metadata.as_ref().as_ref().ok()?;
        let (tag, rule) = self.rules.class_of(metadata.class.as_ref(), &facts.name)?;
        let class = Class {
            rank: rule.rank,
            depth: rule.preempt.depth(),
            floor_kib: rule.floor_kib,
        };
        Some((tag.clone(), class))
    }

    /// Whether a domain was switched on so short a while ago that its class lets it boot.
    fn boots(&self, facts: &Facts, since_ms: Option<u64>) -> bool {
        let metadata = facts.metadata.as_ref().as_ref().ok();
        let own = metadata.and_then(|metadata| metadata.class.as_ref());
        let boot = self
            .rules
            .class_of(own, &facts.name)
            .map(|(_, rule)| rule.boot);
        let boot = boot.map_or(0, |boot| u64::try_from(boot.as_millis()).unwrap_or(0));
        facts.state == DomainState::Running
            && since_ms.is_some_and(|since| now_ms().saturating_sub(since) < boot)
    }

    /// Whether domains have come that nobody has looked at: those without a job may have no room.
    fn has_news(&self, host: &Host) -> bool {
        let changes = host.hypervisors.changes();
        let mut live = self.live();
        let is_new = live.looked_at != changes;
        live.looked_at = changes;
        is_new
    }

    /// Refuses to decide on half a picture.
    fn sees_all(host: &Host) -> Result<(), Fault> {
        let unread = host.hypervisors.ailing(None);
        match unread.into_iter().find(|ailing| ailing.unread) {
            None if host.hypervisors.info().cpus == 0 => Err(Fault::new(
                Code::Unavailable,
                "libvirt has not said yet what the host has",
            )),
            None => Ok(()),
            Some(ailing) => Err(Fault::new(
                Code::Unavailable,
                format!(
                    "the domains of {} are not known yet, so nobody can tell what room there is: {}",
                    ailing.uri, ailing.why
                ),
            )),
        }
    }

    /// Goes on with what waited for what the drivers have seen.
    async fn advance(&self, host: &Arc<Host>) -> Result<(), Fault> {
        let given: BTreeMap<Uuid, record::Given> = {
            let live = self.live();
            let drivers = live.drivers.iter();
            drivers.map(|(uuid, it)| (*uuid, it.given)).collect()
        };
        let look = |uuid: Uuid| given.get(&uuid).copied().unwrap_or_default();
        self.decide(host, |record, world| record.advance(world, look))
            .await
            .map(drop)
    }

    /// Takes back what a domain could not do, and says so to who waits for it.
    async fn give_up(&self, host: &Arc<Host>, uuid: Uuid, fault: &Fault) -> Result<(), Fault> {
        let now = Instant::now();
        let name = self
            .record()
            .domains
            .get(&uuid)
            .map_or_else(|| uuid.to_string(), |kept| kept.name.to_string());
        self.decide(host, |record, world| {
            let mut world = world.clone();
            let kept = record.domains.get(&uuid);
            let balks = kept.is_some_and(|kept| {
                let mut holds = kept.holds.iter();
                holds.any(|hold| hold.is_room() && !hold.is_proven)
            });
            if let Some(known) = world.domains.get_mut(&uuid).filter(|_| balks) {
                known.balks = true;
            }
            let lost = record.give_up(&world, uuid);
            // Before anybody who waits is woken.
            let mut live = self.live();
            if balks {
                live.balks.insert(uuid, now);
            }
            live.undone.insert(uuid, (now, fault.clone()));
            for id in lost {
                let refusal = Refusal::new(
                    Then::Later,
                    format!(
                        "'{name}' would have given way, and could not: {}",
                        fault.message
                    ),
                );
                live.refused.insert(id, (now, refusal));
            }
        })
        .await
    }
}

/// Says what a state directory holds of leases and holds, for `--check`.
///
/// # Errors
/// What cannot be understood, or does not go together.
pub(crate) fn check(directory: &Path) -> Result<String, String> {
    let record = rows::read(look_at_schedule(directory)?)?;
    let lost = record.leases.values().find(|lease| {
        let mut victims = record.victims(lease);
        lease.stage == Stage::Reserved && victims.next().is_some()
    });
    if let Some(lease) = lost {
        return Err(format!(
            "domains give way for {}, which is only reserved; `rxm lease end {}` lets them come back",
            lease.key, lease.key
        ));
    }
    let held = record
        .domains
        .values()
        .filter(|kept| !kept.holds.is_empty());
    let owed = record
        .domains
        .values()
        .filter(|kept| !kept.taken.is_nothing());
    Ok(format!(
        "{} leases, {} domains held back, {} that are owed something",
        record.leases.len(),
        held.count(),
        owed.count()
    ))
}

/// Goes on with what an earlier xmand began, and looks after what passes by itself.
pub(crate) async fn take_up(host: &Arc<Host>) {
    let scheduler = &host.schedule;
    let record = Record::clone(&scheduler.record());
    let preempted =
        record.domains.keys().copied().filter(|uuid| {
            record.goal(*uuid).is_some() && record.leases_of(*uuid).next().is_some()
        });
    scheduler.live().spells = preempted.map(|uuid| (uuid, Instant::now())).collect();
    scheduler.take(host, record);
    tokio::spawn(run::look_after(Arc::clone(host)));
}

fn millis(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}
