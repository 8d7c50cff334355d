//! No way around: what takes CPU or memory, or lets run what somebody holds, asks here first.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;
use xman_common::protocol::{Code, DomainRow, Fault, Request, Verb};

use super::{
    Scheduler,
    leases::words,
    ledger::Amount,
    plan::{Why, admits},
    record::World,
};
use crate::{
    Host,
    hypervisor::{Facts, NewDomain},
};

/// For how long room is kept for a guest that may come from another host: as long as its permit is good, and a way of ordinary length.
const COMES_WITHIN: Duration = Duration::from_secs(120);

/// Refuses what would let a domain run, grow or go that somebody holds back, and what there is no room for.
///
/// # Errors
/// `Conflict` with who stands against it.
pub(crate) fn may(host: &Host, verb: Verb, facts: &Facts) -> Result<(), Fault> {
    let record = host.schedule.record();
    let kept = record.domains.get(&facts.uuid);
    let held = kept.and_then(|kept| kept.holds.iter().max_by_key(|hold| hold.depth));
    let is_taken = kept.is_some_and(|kept| !kept.taken.is_nothing());
    if would_undo(verb) {
        if let Some(hold) = held {
            return Err(Fault::new(
                Code::Conflict,
                format!(
                    "'{}' is held back ({}) by {}{}; it runs again by itself, and `rxm status {}` shows more",
                    facts.name,
                    hold.depth,
                    hold.holder,
                    if hold.reason.is_empty() {
                        String::new()
                    } else {
                        format!(": {}", hold.reason)
                    },
                    facts.name,
                ),
            ));
        }
        // One that comes back from an image that is damaged may never: whoever may can throw it away.
        if is_taken && !ends_a_wait(verb) {
            return Err(Fault {
                retry: true,
                ..Fault::new(
                    Code::Conflict,
                    format!(
                        "'{}' is just being given back what was taken from it; ask again in a moment",
                        facts.name
                    ),
                )
            });
        }
    }
    if matches!(
        verb,
        Verb::Class | Verb::Rename | Verb::Undefine | Verb::Migrate
    ) && let Some(lease) = record.leases_of(facts.uuid).next()
    {
        return Err(Fault::new(
            Code::Conflict,
            format!(
                "'{}' is leased to {}; what and where it is does not change under a job",
                facts.name, lease.key
            ),
        ));
    }
    if switches_on(verb) {
        host.schedule.is_open()?;
    }
    Ok(())
}

impl Scheduler {
    /// Refuses everything new while the host is in maintenance.
    fn is_open(&self) -> Result<(), Fault> {
        match &self.record().maintenance {
            None => Ok(()),
            Some(maintenance) => Err(Fault::new(
                Code::Conflict,
                format!(
                    "the host is in maintenance, and starts nothing: {} ({}); `rxm maintenance off` ends it",
                    maintenance.reason, maintenance.principal
                ),
            )),
        }
    }
}

/// What was let in, and counts as taken until this is dropped.
pub(crate) struct Admitted {
    host: Arc<Host>,
    number: u64,
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.host.schedule.live().admitted.remove(&self.number);
    }
}

/// Refuses what a call would take where there is no room for it, and counts it until the call has returned.
///
/// # Errors
/// `Conflict` where there is not that much room, with who has it or for whom it is kept.
pub(crate) fn admit(
    host: &Arc<Host>,
    request: &Request,
    facts: Option<&Facts>,
) -> Result<Option<Admitted>, Fault> {
    if let Request::MigrateIn(coming) = request {
        host.schedule.is_open()?;
        // It comes without a job: only its memory is asked for.
        let more = Amount {
            cpus: 0,
            kib: coming.memory_kib,
        };
        let admitted = let_in(host, coming.uuid, more)?;
        if let Some(admitted) = admitted {
            tokio::spawn(async move {
                tokio::time::sleep(COMES_WITHIN).await;
                drop(admitted);
            });
        }
        return Ok(None);
    }
    let row = facts.and_then(|facts| host.hypervisors.row(facts));
    let has_job = |uuid| host.schedule.record().leases_of(uuid).next().is_some();
    match row.and_then(|row| Some((row.uuid, takes(request, &row, has_job(row.uuid))?))) {
        Some((uuid, more)) => let_in(host, uuid, more),
        None => Ok(None),
    }
}

/// The same for a domain that an XML describes.
///
/// # Errors
/// As [`admit`].
pub(crate) fn admit_new(
    host: &Arc<Host>,
    verb: Verb,
    new: &NewDomain,
) -> Result<Option<Admitted>, Fault> {
    if !switches_on(verb) {
        return Ok(None);
    }
    host.schedule.is_open()?;
    let more = Amount {
        cpus: 0,
        kib: new.memory_kib,
    };
    let_in(host, new.uuid.unwrap_or_default(), more)
}

/// What a request takes of the host, beside what its domain has.
fn takes(request: &Request, row: &DomainRow, has_job: bool) -> Option<Amount> {
    let all = Amount {
        // Without a job they are nobody's: where jobs have them all, it gives way at once.
        cpus: if has_job { u64::from(row.vcpus) } else { 0 },
        kib: row.memory_kib,
    };
    let is_on = row.state.is_active();
    let more = if let Request::Start(_) | Request::Restore(_) = request
        && !is_on
    {
        all
    } else if let Request::MemSet(set) = request
        && is_on
        && !set.maximum
    {
        Amount {
            cpus: 0,
            kib: set.kib.saturating_sub(row.memory_kib),
        }
    } else if let Request::VcpuSet(set) = request
        && is_on
        && !set.maximum
        && has_job
    {
        Amount {
            cpus: u64::from(set.count.saturating_sub(row.vcpus)),
            kib: 0,
        }
    } else {
        Amount::default()
    };
    (!more.is_nothing()).then_some(more)
}

/// Looks and counts at once: two are not let in to the same room.
fn let_in(host: &Arc<Host>, uuid: Uuid, more: Amount) -> Result<Option<Admitted>, Fault> {
    let scheduler = &host.schedule;
    if !scheduler.rules.is_on() || more.is_nothing() {
        return Ok(None);
    }
    let mut world = scheduler.world(host);
    let record = scheduler.record();
    let mut live = scheduler.live();
    world.capacity = world.capacity.without(live.coming());
    admits(&record.ledger(&world), uuid, more).map_err(|why| refusal(&world, &why, more))?;
    live.admissions += 1;
    let number = live.admissions;
    live.admitted.insert(number, more);
    drop(live);
    Ok(Some(Admitted {
        host: Arc::clone(host),
        number,
    }))
}

fn refusal(world: &World, why: &Why, needs: Amount) -> Fault {
    let name = |uuid: &Uuid| {
        let known = world.domains.get(uuid);
        known.map_or_else(String::new, |known| format!("'{}'", known.name))
    };
    let who = match why {
        Why::Taken { by: Some(by), .. } => format!("; {} has most of what is taken", name(by)),
        Why::Kept { for_whom } => format!(
            "; what is free is kept for {}, which has given way and must be able to come back",
            name(for_whom)
        ),
        Why::Taken { by: None, .. } | Why::NoPart | Why::Off | Why::Never { .. } => String::new(),
    };
    Fault {
        retry: true,
        ..Fault::new(
            Code::Conflict,
            format!(
                "the host has no room for {} more{who}; `rxm status` shows who has what",
                words(needs)
            ),
        )
    }
}

/// What would give a held domain what was taken from it, or take it from where its holders find it.
fn would_undo(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::Start
            | Verb::Unpause
            | Verb::Create
            | Verb::Define
            | Verb::Restore
            | Verb::RestoreFrom
            | Verb::MemSet
            | Verb::VcpuSet
            | Verb::Migrate
            | Verb::Save
            | Verb::SaveTo
            | Verb::DiscardSaved
            | Verb::Undefine
            | Verb::Rename
            | Verb::Class
    )
}

/// What ends the wait of a domain that does not come back by itself.
fn ends_a_wait(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::Start | Verb::Restore | Verb::Unpause | Verb::DiscardSaved | Verb::Undefine
    )
}

/// What switches a domain on.
fn switches_on(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::Start | Verb::Create | Verb::Restore | Verb::RestoreFrom | Verb::MigrateIn
    )
}
