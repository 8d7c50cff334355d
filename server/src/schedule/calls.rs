//! The verbs: whose word counts, what is decided, and waiting until libvirt was seen to agree.

use std::{
    collections::BTreeSet,
    sync::Arc,
    time::{Duration, Instant as Moment},
};

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, DomainRef, Principal, Tag},
    protocol::{
        Code, Depth, Fault, HoldRow, Holder, Item, LeaseAnswer, LeaseBegin, LeaseEnd, LeaseKey,
        LeaseList, LeaseRow, Preempt, Reconcile, Reply, Resume, Room, SetMaintenance, Status,
        StatusRow, Then, Verb,
    },
};
use xman_policy::Grant;

use super::{
    Scheduler, millis,
    record::{Hold, Lease, LeaseId, Record, Stage},
    standing::{self, Standings},
};
use crate::{
    Host,
    answers::{Named, ROWS_A_FRAME},
    caller::{Outcome, Piece},
    clock::now_ms,
    hypervisor::Facts,
    work::Work,
};

/// What is left between the end of a wait and the caller's deadline, so that the answer arrives in time.
const ANSWER_TIME: Duration = Duration::from_millis(200);

/// Begins a lease, and waits until its domain has its room.
pub(crate) async fn begin(work: &Work, asked: LeaseBegin) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let facts = about(work)?;
    is_one(work, facts)?;
    is_on(scheduler)?;
    heard(work, &asked.key, facts)?;
    // Nothing that moves between hosts gets a job.
    work.target(Verb::LeaseBegin)?;
    Scheduler::sees_all(host)?;
    let lease = Lease {
        key: asked.key.clone(),
        uuid: facts.uuid,
        name: facts.name.clone(),
        hypervisor: facts.uri.to_string(),
        user: asked.user,
        principal: work.caller.person.principal.clone(),
        preemptible: scheduler
            .class_of(facts)
            .is_some_and(|(_, class)| class.depth.is_some())
            && asked.preemptible.unwrap_or(true),
        stage: if asked.reserve {
            Stage::Reserved
        } else {
            Stage::Preparing
        },
        needs_memory: false,
        after: BTreeSet::new(),
        began_ms: now_ms(),
        ends_in_ms: asked.ends_in_ms,
    };
    let id = lease.id();
    let principal = &work.caller.person.principal;
    let speaks_for_all = scheduler
        .systems
        .hears_all(principal, &asked.key.job.system);
    let begun = scheduler
        .decide(host, |record, world| {
            let mut after = record.clone();
            let was = record.leases.get(&id).map(|lease| lease.stage);
            after.begin(world, lease, speaks_for_all).map(|()| {
                after.advance(world, |_| super::record::Given::Nothing);
                *record = after;
                if was.is_none_or(|was| was == Stage::Reserved) {
                    scheduler.set_time(&id, asked.ends_in_ms);
                }
            })
        })
        .await?;
    if let Err(refusal) = begun {
        return Ok(Reply::Lease(LeaseAnswer::Refused {
            why: refusal.why,
            then: refusal.then,
        }));
    }
    let until = if asked.wait {
        answer_by(work)
    } else {
        Instant::now()
    };
    Ok(Reply::Lease(outcome(scheduler, &id, until).await))
}

/// Waits until it is told what comes of a lease.
async fn outcome(scheduler: &Scheduler, id: &LeaseId, until: Instant) -> LeaseAnswer {
    let mut changed = scheduler.changed.subscribe();
    loop {
        changed.borrow_and_update();
        let record = scheduler.record();
        let Some(lease) = record.leases.get(id) else {
            let refused = scheduler.live().refused.get(id).cloned();
            return match refused {
                Some((_, refusal)) => LeaseAnswer::Refused {
                    why: refusal.why,
                    then: refusal.then,
                },
                None if record.has_ended(id) => LeaseAnswer::Refused {
                    why: "it was ended meanwhile".to_owned(),
                    then: Then::Never,
                },
                None => LeaseAnswer::Refused {
                    why: "its domain was switched off meanwhile".to_owned(),
                    then: Then::Later,
                },
            };
        };
        let row = lease_row(scheduler, &record, lease);
        if lease.stage != Stage::Preparing {
            return LeaseAnswer::Granted(row);
        }
        if timeout_at(until, changed.changed()).await.is_err() {
            return LeaseAnswer::Pending(row);
        }
    }
}

/// Ends a run of a job, and those before it. Others come back by themselves.
pub(crate) async fn end(work: &Work, asked: LeaseEnd) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let (system, principal) = (&asked.key.job.system, &work.caller.person.principal);
    let record = scheduler.record();
    let hears = |name: &DomainName| scheduler.systems.hears(principal, system, name);
    // Where: in all domains of the job, of which a node only speaks for its own.
    let places: Vec<Option<Uuid>> = match &asked.domain {
        Some(domain) => match known(host, &record, domain) {
            Some((_, name)) if !hears(&name) => return Err(not_heard(principal, system)),
            Some((uuid, _)) => vec![Some(uuid)],
            // A job cannot have a domain that nobody knows.
            None => Vec::new(),
        },
        None if scheduler.systems.hears_all(principal, system) => vec![None],
        None => {
            let mut places = Vec::new();
            for lease in record.leases.values() {
                if lease.key.job == asked.key.job {
                    if !hears(&lease.name) {
                        return Err(not_heard(principal, system));
                    }
                    places.push(Some(lease.uuid));
                }
            }
            places
        }
    };
    let ended = scheduler
        .decide(host, |record, world| {
            let places = places.iter();
            let ended = places.flat_map(|place| record.end(world, &asked.key, *place, now_ms()));
            ended.collect()
        })
        .await?;
    Ok(Reply::Ended(keys(ended)))
}

/// Ends the leases of jobs that a batch system has no more.
pub(crate) async fn reconcile(work: &Work, asked: Reconcile) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let principal = &work.caller.person.principal;
    if !scheduler.systems.hears_all(principal, &asked.system) {
        return Err(not_heard(principal, &asked.system));
    }
    let ended = scheduler
        .decide(host, |record, world| {
            let may = |lease: &Lease| {
                let systems = &scheduler.systems;
                systems.hears(principal, &asked.system, &lease.name)
                    && scheduler.is_older(lease, asked.age_ms)
            };
            record.reconcile(world, &asked, may)
        })
        .await?;
    Ok(Reply::Ended(keys(ended)))
}

/// Sends the leases of domains that the caller may see, of those that it speaks for, and of its own jobs.
pub(crate) async fn leases(grant: &Grant, work: &Work, asked: LeaseList) -> Outcome {
    let scheduler = &work.host.schedule;
    let record = scheduler.record();
    let seen: BTreeSet<Uuid> = work
        .host
        .visible(&work.caller)
        .into_iter()
        .map(|(facts, _)| facts.uuid)
        .collect();
    let caller = &work.caller.person.principal;
    let may_see = |lease: &Lease| {
        // A domain that libvirt has not shown yet is hidden from nobody whose job is in it.
        let system = &lease.key.job.system;
        grant.administrator()
            || seen.contains(&lease.uuid)
            || lease.user.as_ref() == Some(caller)
            || scheduler.systems.speaks(caller, system, &lease.name)
    };
    let rows: Vec<Item> = record
        .leases
        .values()
        .filter(|lease| {
            let job = &lease.key.job;
            let is_asked = asked.system.as_ref().is_none_or(|it| *it == job.system)
                && asked.key.as_ref().is_none_or(|it| *it == lease.key);
            is_asked && may_see(lease)
        })
        .map(|lease| Item::Lease(lease_row(scheduler, &record, lease)))
        .collect();
    for piece in rows.chunks(ROWS_A_FRAME) {
        work.send(Piece::Items(piece.to_vec())).await?;
    }
    Ok(Reply::Done)
}

/// Holds a domain back, and waits until libvirt was seen to have it so.
pub(crate) async fn hold(work: &Work, verb: Verb, asked: Preempt) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let facts = about(work)?;
    is_one(work, facts)?;
    work.target(verb)?;
    let holder = whose(work, asked.lease.as_ref(), facts)?;
    let class = scheduler.class_of(facts).and_then(|(_, class)| class.depth);
    let depth = if verb == Verb::Freeze {
        Some(Depth::Freeze)
    } else {
        asked.depth.or(class)
    };
    let depth = depth.ok_or_else(|| {
        Fault::new(
            Code::Conflict,
            format!(
                "'{}' is of no class that says how deep it may go; `--depth` does",
                facts.name
            ),
        )
    })?;
    let hold = Hold {
        holder: holder.clone(),
        depth,
        reason: asked.reason.map(|why| why.to_string()).unwrap_or_default(),
        since_ms: now_ms(),
        for_whom: None,
        after: BTreeSet::new(),
        is_proven: false,
    };
    scheduler.live().undone.remove(&facts.uuid);
    let held = scheduler
        .decide(host, |record, world| {
            let has = |key: &LeaseKey| record.leases_of(facts.uuid).any(|lease| lease.key == *key);
            match &asked.lease {
                Some(key) if !has(key) => Err(Fault::new(
                    Code::Conflict,
                    format!(
                        "{key} has no lease of '{}', so there is nothing to hold back; `rxm lease list` shows what there is",
                        facts.name
                    ),
                )),
                Some(_) | None => {
                    record.hold(world, facts.uuid, hold);
                    Ok(())
                }
            }
        })
        .await?;
    held?;
    let until = if asked.wait {
        answer_by(work)
    } else {
        Instant::now()
    };
    let mut changed = scheduler.changed.subscribe();
    loop {
        changed.borrow_and_update();
        let record = scheduler.record();
        let holds = record.domains.get(&facts.uuid).map(|kept| &kept.holds);
        let mine = holds.and_then(|holds| {
            let mut holds = holds.iter();
            holds.find(|hold| hold.holder == holder && hold.depth == depth)
        });
        match mine {
            Some(hold) if !hold.is_proven => {}
            Some(_) => break,
            None => {
                let undone = scheduler.live().undone.get(&facts.uuid).cloned();
                return Err(undone.map_or_else(
                    || Fault::new(Code::Conflict, "somebody has let go of it meanwhile"),
                    |(_, fault)| fault,
                ));
            }
        }
        if timeout_at(until, changed.changed()).await.is_err() {
            break;
        }
    }
    shown(host, facts)
}

/// Lets go of a domain, and waits until it runs, or it is clear for what it waits.
pub(crate) async fn let_go(work: &Work, verb: Verb, asked: Resume) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let facts = about(work)?;
    let holder = whose(work, asked.lease.as_ref(), facts)?;
    work.target_by(verb, asked.force)?;
    let force = asked.force;
    let is_meant = move |hold: &Hold| {
        let is_kind = verb != Verb::Thaw || hold.depth == Depth::Freeze;
        let is_whose = hold.holder == holder || (force && matches!(hold.holder, Holder::Person(_)));
        is_kind && is_whose
    };
    scheduler
        .decide(host, |record, world| {
            record.let_go(world, facts.uuid, &is_meant);
        })
        .await?;
    let until = if asked.wait {
        answer_by(work)
    } else {
        Instant::now()
    };
    let mut changed = scheduler.changed.subscribe();
    loop {
        changed.borrow_and_update();
        let record = scheduler.record();
        let kept = record.domains.get(&facts.uuid);
        let runs = kept.is_none_or(|kept| kept.holds.is_empty() && kept.taken.is_nothing());
        let waits = kept.is_some_and(|kept| {
            let mut holds = kept.holds.iter();
            holds.any(|hold| hold.after.is_empty())
        });
        if runs || waits || timeout_at(until, changed.changed()).await.is_err() {
            return shown(host, facts);
        }
    }
}

/// Sends how domains stand towards jobs, and answers with the host's room.
pub(crate) async fn status(_: &Grant, work: &Work, asked: Status) -> Outcome {
    let host = &work.host;
    let named = Named::new(&asked.patterns)?;
    let standings = Standings::new(host);
    let rows: Vec<Item> = host
        .visible(&work.caller)
        .into_iter()
        .filter(|(facts, _)| named.takes(&facts.name, facts.uuid))
        .filter_map(|(facts, _)| status_row(host, &standings, &facts))
        .filter(|row| row.class.is_some() || !asked.patterns.is_empty() || !row.holds.is_empty())
        .map(Item::Status)
        .collect();
    for piece in rows.chunks(ROWS_A_FRAME) {
        work.send(Piece::Items(piece.to_vec())).await?;
    }
    Ok(Reply::Room(room(host, &standings)))
}

/// Lets the host take nothing new, or all again.
pub(crate) async fn maintain(work: &Work, asked: SetMaintenance) -> Outcome {
    let (host, scheduler) = (&work.host, &work.host.schedule);
    let maintenance = asked
        .reason
        .map(|reason| xman_common::protocol::Maintenance {
            reason,
            principal: work.caller.person.principal.clone(),
            since_ms: now_ms(),
        });
    scheduler
        .decide(host, |record, _| record.maintenance = maintenance)
        .await?;
    Ok(Reply::Room(room(host, &Standings::new(host))))
}

/// Refuses a domain whose UUID another hypervisor of the host has as well: what is held is held by its UUID.
fn is_one(work: &Work, facts: &Facts) -> Result<(), Fault> {
    let uuid = DomainRef::Uuid(facts.uuid);
    if work.host.hypervisors.candidates(&uuid, None).len() < 2 {
        return Ok(());
    }
    Err(Fault::new(
        Code::Conflict,
        format!(
            "two hypervisors of this host have a domain with the UUID of '{}'; give one of them another",
            facts.name
        ),
    ))
}

fn about(work: &Work) -> Result<&Facts, Fault> {
    work.facts
        .as_ref()
        .ok_or_else(|| Fault::new(Code::Internal, "a verb on a domain came without one"))
}

fn is_on(scheduler: &Scheduler) -> Result<(), Fault> {
    if scheduler.rules.is_on() {
        return Ok(());
    }
    Err(Fault::new(
        Code::Unsupported,
        "this host makes no room for jobs: xmand.toml names no `[schedule.class]`",
    ))
}

/// Refuses a word on a job or a domain that is not the speaker's.
fn heard(work: &Work, key: &LeaseKey, facts: &Facts) -> Result<(), Fault> {
    let (system, principal) = (&key.job.system, &work.caller.person.principal);
    let systems = &work.host.schedule.systems;
    if systems.hears(principal, system, &facts.name) {
        return Ok(());
    }
    Err(not_heard(principal, system))
}

fn not_heard(principal: &Principal, system: &Tag) -> Fault {
    Fault::new(
        Code::Denied,
        format!(
            "{principal} does not speak for '{system}' here; `schedule.system` of xmand.toml says who does, and for which domains"
        ),
    )
}

/// Who holds a domain by this call: a job where a batch system speaks of one, and else who calls.
fn whose(work: &Work, lease: Option<&LeaseKey>, facts: &Facts) -> Result<Holder, Fault> {
    match lease {
        Some(key) => {
            heard(work, key, facts)?;
            Ok(Holder::Job(key.clone()))
        }
        None => Ok(Holder::Person(work.caller.person.principal.clone())),
    }
}

impl Scheduler {
    /// Notes when a lease began, and when it ends by itself.
    fn set_time(&self, id: &LeaseId, ends_in_ms: Option<u64>) {
        let (now, mut live) = (Moment::now(), self.live());
        live.begun.insert(id.clone(), now);
        match ends_in_ms {
            None => drop(live.ends.remove(id)),
            Some(ms) => drop(
                live.ends
                    .insert(id.clone(), now + Duration::from_millis(ms)),
            ),
        }
    }

    /// Whether a lease began before a list was made. The host's clock may jump; only of what began before this xmand did it is all there is.
    fn is_older(&self, lease: &Lease, age_ms: u64) -> bool {
        match self.live().begun.get(&lease.id()) {
            Some(begun) => begun.elapsed() > Duration::from_millis(age_ms),
            None => lease.began_ms < now_ms().saturating_sub(age_ms),
        }
    }
}

fn answer_by(work: &Work) -> Instant {
    work.deadline
        .checked_sub(ANSWER_TIME)
        .unwrap_or(work.deadline)
}

fn known(host: &Host, record: &Record, domain: &DomainRef) -> Option<(Uuid, DomainName)> {
    if let Some(facts) = host.hypervisors.find(domain, None) {
        return Some((facts.uuid, facts.name));
    }
    let lease = record.leases.values().find(|lease| match domain {
        DomainRef::Uuid(uuid) => lease.uuid == *uuid,
        DomainRef::Name(name) => lease.name == *name,
    })?;
    Some((lease.uuid, lease.name.clone()))
}

fn keys(ids: Vec<LeaseId>) -> Vec<LeaseKey> {
    let mut keys: Vec<LeaseKey> = ids.into_iter().map(|id| id.key).collect();
    keys.dedup();
    keys
}

fn lease_row(scheduler: &Scheduler, record: &Record, lease: &Lease) -> LeaseRow {
    let live = scheduler.live();
    let end = live.ends.get(&lease.id()).copied();
    drop(live);
    LeaseRow {
        key: lease.key.clone(),
        domain: lease.name.clone(),
        uuid: lease.uuid,
        user: lease.user.clone(),
        principal: lease.principal.clone(),
        state: record.state(lease),
        preemptible: lease.preemptible,
        victims: record
            .victims(lease)
            .map(|(_, kept)| kept.name.clone())
            .collect(),
        began_ms: lease.began_ms,
        ends_in_ms: end.map(|end| millis(end.saturating_duration_since(Moment::now()))),
    }
}

/// How a domain stands now.
fn shown(host: &Arc<Host>, facts: &Facts) -> Outcome {
    let facts = host.hypervisors.now(facts.clone());
    let row = status_row(host, &Standings::new(host), &facts);
    row.map(Reply::Standing).ok_or_else(|| {
        Fault::new(
            Code::NotFound,
            format!("'{}' is not there any more", facts.name),
        )
    })
}

fn status_row(host: &Host, standings: &Standings, facts: &Facts) -> Option<StatusRow> {
    let scheduler = &host.schedule;
    let seen = standings.of(facts.uuid)?;
    let record = &standings.record;
    let kept = record.domains.get(&facts.uuid);
    let live = scheduler.live();
    let driver = live.drivers.get(&facts.uuid);
    Some(StatusRow {
        name: facts.name.clone(),
        uuid: facts.uuid,
        hypervisor: facts.uri.to_string(),
        standing: seen.standing,
        since_ms: live.shown.since(facts.uuid, seen.standing),
        class: seen.class,
        used_cpus: seen.used_cpus,
        available_cpus: seen.available_cpus,
        preempted_ms: standings.preempted_ms(&live, facts.uuid),
        depth: driver.and_then(|driver| driver.depth()),
        doing: driver
            .map(|driver| driver.doing.clone())
            .unwrap_or_default(),
        holds: kept
            .into_iter()
            .flat_map(|kept| &kept.holds)
            .map(|hold| HoldRow {
                holder: hold.holder.clone(),
                depth: hold.depth,
                reason: hold.reason.clone(),
                since_ms: hold.since_ms,
            })
            .collect(),
        leases: record
            .leases_of(facts.uuid)
            .map(|lease| lease.key.clone())
            .collect(),
    })
}

fn room(host: &Host, standings: &Standings) -> Room {
    let (capacity, used) = (standings.ledger.capacity, standings.ledger.used());
    Room {
        cpus: standing::count(capacity.cpus),
        used_cpus: standing::count(used.cpus),
        memory_kib: capacity.kib,
        used_memory_kib: used.kib,
        maintenance: host.schedule.record().maintenance.clone(),
    }
}
