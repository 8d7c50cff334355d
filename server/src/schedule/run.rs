//! Brings libvirt to what shall be: one driver for each domain that somebody holds back, or from which something was taken.
//!
//! ```text
//!        .--------------- look <----------------.
//!        v                                      |
//!      Done: tell, wait for a change      a step, or a note
//!        |                                      ^
//!        '-- nothing held, nothing taken: end   '-- failed: what was never so is taken back, the rest is tried again
//! ```

use std::{
    sync::Arc,
    time::{Duration, Instant as Moment},
};

use tokio::{
    sync::watch,
    time::{Instant, interval, sleep, timeout},
};
use uuid::Uuid;
use xman_common::{
    name::DomainRef,
    protocol::{Code, Depth, DomainState, Fault, Holder},
};

use super::{
    REMEMBERED, Scheduler,
    drive::{SLACK_KIB, Step, Wants, next, stands_still},
    ledger::FLOOR_KIB,
    record::{Given, Hold, LeaseId, Record, Stage},
    standing,
};
use crate::{
    Host,
    hypervisor::{Balloon, Clock, Facts, Seen, Target},
};

/// For one call to libvirt.
const CALL: Duration = Duration::from_secs(30);
/// A start from an image reads all of it.
const THAW: Duration = Duration::from_secs(900);
/// Who has never given way and cannot be reached for that long does not: the job that waits for it may go elsewhere.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest that a guest may take to give memory: who waits for it is better off elsewhere.
const SHRINK: Duration = Duration::from_secs(600);
/// A guest takes memory back at once or not at all.
const GROWTH: Duration = Duration::from_secs(10);
/// What failed is tried again after that, and then after ever longer,
const FIRST_PAUSE: Duration = Duration::from_millis(500);
/// up to this.
const LAST_PAUSE: Duration = Duration::from_secs(60);
/// How often a domain that is as it shall be is looked at, in memory: somebody may have changed it by hand.
const LOOK: Duration = Duration::from_secs(2);
/// How often libvirt is asked as well: not all that can be changed by hand is in memory.
const CLOSE_LOOK: Duration = Duration::from_secs(30);
/// How often what passes by itself is looked at.
const TICK: Duration = Duration::from_millis(500);
/// How often what has passed meanwhile is written down.
const WRITTEN: Duration = Duration::from_secs(60);

/// What a driver has seen.
#[derive(Clone, Debug, Default)]
pub(super) struct Driver {
    pub(super) given: Given,
    /// How deep it was wanted then.
    deepest: Option<Depth>,
    /// What it does, or what is in its way.
    pub(super) doing: String,
    /// How deep the domain was seen, as far as its state tells.
    halted: Option<Depth>,
}

impl Driver {
    /// How deep the domain was seen.
    pub(super) fn depth(&self) -> Option<Depth> {
        let all = self.deepest.filter(|_| self.given == Given::All);
        self.halted.or(all)
    }
}

/// What came of one look.
enum Turned {
    /// There is nothing left to drive.
    Over,
    /// It is as it shall be.
    Done,
    /// It is nearer.
    Nearer,
}

/// Starts a domain's driver where none runs.
pub(super) fn ensure(host: &Arc<Host>, uuid: Uuid) {
    let mut live = host.schedule.live();
    let record = host.schedule.record();
    if live.drivers.contains_key(&uuid) || is_over(&record, uuid) {
        return;
    }
    live.drivers.insert(uuid, Driver::default());
    drop(live);
    tokio::spawn(drive(Arc::clone(host), uuid));
}

fn is_over(record: &Record, uuid: Uuid) -> bool {
    let kept = record.domains.get(&uuid);
    kept.is_none_or(|kept| kept.holds.is_empty() && kept.taken.is_nothing())
}

async fn drive(host: Arc<Host>, uuid: Uuid) {
    let scheduler = &host.schedule;
    let mut changed = scheduler.changed.subscribe();
    let (mut pause, mut trouble_since) = (FIRST_PAUSE, None);
    loop {
        changed.borrow_and_update();
        if host.stopping.is_cancelled() {
            return;
        }
        let looked_at = mine(&host, uuid);
        match turn(&host, uuid).await {
            Ok(Turned::Over) => {
                if leaves(scheduler, uuid) {
                    told(&host).await;
                    return;
                }
            }
            Ok(Turned::Nearer) => (pause, trouble_since) = (FIRST_PAUSE, None),
            Ok(Turned::Done) => {
                (pause, trouble_since) = (FIRST_PAUSE, None);
                told(&host).await;
                wait(&host, uuid, &looked_at, &mut changed).await;
            }
            Err(fault) => {
                let since = *trouble_since.get_or_insert_with(Moment::now);
                if stumble(&host, uuid, &fault, since).await {
                    trouble_since = None;
                    continue;
                }
                let goal = scheduler.record().goal(uuid);
                let anew = async {
                    while changed.changed().await.is_ok() && scheduler.record().goal(uuid) == goal {
                    }
                };
                let _ = timeout(pause, anew).await;
                pause = (pause * 2).min(LAST_PAUSE);
            }
        }
    }
}

/// Ends a driver's work, unless somebody has come to hold its domain in this moment.
fn leaves(scheduler: &Scheduler, uuid: Uuid) -> bool {
    let mut live = scheduler.live();
    let over = is_over(&scheduler.record(), uuid);
    if over {
        live.drivers.remove(&uuid);
    }
    over
}

/// Looks once, and does what that calls for.
async fn turn(host: &Arc<Host>, uuid: Uuid) -> Result<Turned, Fault> {
    let scheduler = &host.schedule;
    let record = scheduler.record();
    let Some(kept) = record
        .domains
        .get(&uuid)
        .filter(|_| !is_over(&record, uuid))
    else {
        return Ok(Turned::Over);
    };
    let named = DomainRef::Uuid(uuid);
    let found = host.hypervisors.find(&named, Some(&kept.hypervisor));
    let Some(facts) = found.or_else(|| host.hypervisors.last_known(uuid, &kept.hypervisor)) else {
        let ails = !host.hypervisors.ailing(Some(&kept.hypervisor)).is_empty();
        if ails || !host.config.hypervisors.contains(&kept.hypervisor) {
            return Err(Fault::new(
                Code::Unavailable,
                format!("{} does not say how '{}' is", kept.hypervisor, kept.name),
            ));
        }
        return forget(host, uuid).await;
    };
    let wants = record.wants(uuid);
    let floor = scheduler.class_of(&facts).map(|(_, class)| class.floor_kib);
    let floor = floor.unwrap_or(FLOOR_KIB);
    let target = target(facts);
    let by = || Instant::now() + CALL;
    let hypervisors = &host.hypervisors;
    let seen = match hypervisors.seen(target.clone(), by()).await {
        Err(fault) if fault.code == Code::NotFound => return forget(host, uuid).await,
        seen => seen?,
    };
    if seen.state == DomainState::Unknown {
        return Err(Fault::new(
            Code::Unavailable,
            format!("libvirt does not know the state of '{}'", kept.name),
        ));
    }
    note_seen(scheduler, uuid, &kept.holds, wants, &seen);
    let doing = |what: &str| note_doing(scheduler, uuid, what);
    match next(wants, floor, &kept.taken, &seen) {
        Step::Done => {
            let mut live = scheduler.live();
            if let Some(driver) = live.drivers.get_mut(&uuid) {
                // What it was held for meanwhile was not looked at.
                let is_same = scheduler.record().wants(uuid) == wants;
                driver.given = if is_same { Given::All } else { Given::Nothing };
                driver.doing.clear();
            }
            return Ok(Turned::Done);
        }
        Step::Note(taken) => {
            if kept.taken.is_nothing() && !taken.is_nothing() {
                can(host, &target, wants).await?;
            }
            scheduler
                .decide(host, |record, _| record.note(uuid, taken))
                .await?;
        }
        Step::Halt => {
            hypervisors.halt(target, by()).await?;
        }
        Step::RunOn => {
            hypervisors.run_on(target.clone(), by()).await?;
            scheduler.live().came_back.insert(uuid, Moment::now());
            tokio::spawn(set_clock(Arc::clone(host), target));
        }
        Step::Starve(had) => {
            hypervisors.starve(target, &had, by()).await?;
        }
        Step::CannotStarve => {
            hypervisors.can_starve(target, by()).await?;
        }
        Step::Feed(had) => {
            hypervisors.feed(target, &had, by()).await?;
            scheduler.live().came_back.insert(uuid, Moment::now());
        }
        Step::Shrink(kib) => {
            doing("its guest gives memory");
            shrink(host, target, kib, uuid).await?;
        }
        Step::Grow(kib) => {
            doing("its guest takes its memory back");
            grow(host, target, kib, uuid).await?;
        }
        Step::Freeze => {
            doing("its memory goes to the disk");
            // It is halted: a job that needs no more than its CPUs does not wait for the disk.
            told(host).await;
            freeze(host, target, uuid).await?;
        }
        Step::Thaw => {
            doing("it comes back from its image");
            hypervisors.thaw(target, Instant::now() + THAW).await?;
        }
    }
    Ok(Turned::Nearer)
}

/// Nothing can be taken any more from a domain that libvirt does not know, and nothing given back.
async fn forget(host: &Arc<Host>, uuid: Uuid) -> Result<Turned, Fault> {
    let forgetting = host
        .schedule
        .decide(host, |record, _| record.domains.remove(&uuid));
    forgetting.await.map(|_| Turned::Over)
}

/// Finds what would stand against a depth before anything is taken.
async fn can(host: &Arc<Host>, target: &Target, wants: Wants) -> Result<(), Fault> {
    let by = || Instant::now() + CALL;
    let hypervisors = &host.hypervisors;
    if wants.starved {
        hypervisors.can_starve(target.clone(), by()).await?;
    }
    if wants.shrunk {
        hypervisors.can_shrink(target.clone(), by()).await?;
    }
    if wants.frozen {
        hypervisors.can_freeze(target.clone(), by()).await?;
    }
    Ok(())
}

/// Waits for a guest's memory as long as it moves and is still wanted, and no longer than that: how it moves is the guest's own word.
async fn shrink(host: &Arc<Host>, target: Target, kib: u64, uuid: Uuid) -> Result<(), Fault> {
    let until = Moment::now() + SHRINK;
    let hypervisors = &host.hypervisors;
    hypervisors
        .shrink(target.clone(), kib, Instant::now() + CALL)
        .await?;
    while host.schedule.record().wants(uuid).shrunk {
        match hypervisors
            .balloon(&target, kib, Instant::now() + CALL)
            .await?
        {
            Balloon::Reached(_) => return Ok(()),
            Balloon::Moving(_) if Moment::now() < until => {}
            Balloon::Still(now) if now <= kib.saturating_add(SLACK_KIB) => return Ok(()),
            Balloon::Still(now) | Balloon::Moving(now) => {
                return Err(Fault::new(
                    Code::Refused,
                    format!(
                        "the guest of '{}' was asked to go down to {} MiB and stands at {} MiB",
                        target.facts.name,
                        kib >> 10,
                        now >> 10
                    ),
                ));
            }
        }
    }
    Ok(())
}

/// Gives a guest its memory back. It may take it or not: it is its own again.
async fn grow(host: &Arc<Host>, target: Target, kib: u64, uuid: Uuid) -> Result<(), Fault> {
    let hypervisors = &host.hypervisors;
    hypervisors
        .grow(target.clone(), kib, Instant::now() + CALL)
        .await?;
    let grown = hypervisors
        .balloon(&target, kib, Instant::now() + GROWTH)
        .await;
    if let Err(fault) = grown {
        tracing::debug!(domain = %target.facts.name, "{fault}");
    }
    host.schedule
        .decide(host, |record, _| {
            if let Some(kept) = record.domains.get_mut(&uuid) {
                kept.taken.memory_kib = None;
            }
        })
        .await
}

/// Writes a domain's memory to its image; gives that up where nobody wants it any more.
async fn freeze(host: &Arc<Host>, target: Target, uuid: Uuid) -> Result<(), Fault> {
    let (progress, _) = watch::channel(None);
    let mut changed = host.schedule.changed.subscribe();
    let unwanted = async {
        while host.schedule.record().wants(uuid).frozen {
            if changed.changed().await.is_err() {
                break;
            }
        }
    };
    let freezing = host.hypervisors.freeze(target.clone(), progress);
    tokio::pin!(freezing, unwanted);
    tokio::select! {
        frozen = &mut freezing => return frozen.map(drop),
        () = &mut unwanted => {}
    }
    // It may not have begun yet, and be done in this moment: the next look tells.
    loop {
        let by = Instant::now() + CALL;
        if let Err(fault) = host.hypervisors.give_up(target.clone(), by).await {
            tracing::debug!("{fault}");
        }
        if timeout(LOOK, &mut freezing).await.is_ok() {
            return Ok(());
        }
    }
}

async fn set_clock(host: Arc<Host>, target: Target) {
    let name = target.facts.name.clone();
    match host.hypervisors.set_clock(target).await {
        Clock::Set | Clock::NoAgent => {}
        Clock::Failed(why) => {
            tracing::info!(domain = %name, "its guest's clock could not be set: {why}");
        }
    }
}

fn note_seen(scheduler: &Scheduler, uuid: Uuid, holds: &[Hold], wants: Wants, seen: &Seen) {
    let mut live = scheduler.live();
    let Some(driver) = live.drivers.get_mut(&uuid) else {
        return;
    };
    let halted = stands_still(seen.state);
    driver.given = if wants.paused && halted {
        Given::Cpus
    } else {
        Given::Nothing
    };
    let paused = (seen.state == DomainState::Paused).then_some(Depth::Pause);
    driver.halted = if seen.is_frozen() {
        Some(Depth::Freeze)
    } else {
        paused
    };
    driver.deepest = holds.iter().map(|hold| hold.depth).max();
}

fn note_doing(scheduler: &Scheduler, uuid: Uuid, what: &str) {
    if let Some(driver) = scheduler.live().drivers.get_mut(&uuid) {
        what.clone_into(&mut driver.doing);
    }
}

/// Tells who waits what was seen.
async fn told(host: &Arc<Host>) {
    if let Err(fault) = host.schedule.advance(host).await {
        tracing::error!("the schedule does not go on: {fault}");
    }
    host.schedule.ring();
}

/// Waits until something else is wanted, or somebody has changed the domain by hand.
async fn wait(
    host: &Arc<Host>,
    uuid: Uuid,
    looked_at: &Option<Mine>,
    changed: &mut watch::Receiver<u64>,
) {
    let since = Moment::now();
    // What has changed since it was looked at may have changed before this.
    while since.elapsed() < CLOSE_LOOK
        && !host.stopping.is_cancelled()
        && mine(host, uuid) == *looked_at
    {
        let _ = timeout(LOOK, changed.changed()).await;
    }
}

/// What a driver goes by, as memory has it.
#[derive(PartialEq)]
struct Mine {
    holds: Vec<Hold>,
    is_owed: bool,
    state: Option<DomainState>,
    /// A guest that has begun anew has what it began with.
    life: Option<u32>,
}

fn mine(host: &Arc<Host>, uuid: Uuid) -> Option<Mine> {
    let record = host.schedule.record();
    let kept = record.domains.get(&uuid)?;
    let facts = host
        .hypervisors
        .find(&DomainRef::Uuid(uuid), Some(&kept.hypervisor));
    Some(Mine {
        holds: kept.holds.clone(),
        is_owed: !kept.taken.is_nothing(),
        life: facts
            .as_ref()
            .and_then(|facts| host.hypervisors.row(facts)?.id),
        state: facts.map(|facts| facts.state),
    })
}

/// Takes back what cannot be, and says whether it did; else the driver tries again.
async fn stumble(host: &Arc<Host>, uuid: Uuid, fault: &Fault, since: Moment) -> bool {
    let scheduler = &host.schedule;
    if let Some(driver) = scheduler.live().drivers.get_mut(&uuid) {
        fault.message.clone_into(&mut driver.doing);
    }
    let record = scheduler.record();
    let kept = record.domains.get(&uuid);
    let is_unproven = kept.is_some_and(|kept| kept.holds.iter().any(|hold| !hold.is_proven));
    let is_winner = kept.is_some_and(|kept| kept.holds.is_empty())
        && record
            .leases_of(uuid)
            .any(|lease| lease.stage == Stage::Preparing);
    // Who waits for its turn is not in trouble.
    let patience = if fault.code == Code::Busy {
        SHRINK
    } else {
        PATIENCE
    };
    let is_final = !fault.retry || since.elapsed() > patience;
    tracing::warn!(domain = %kept.map(|kept| kept.name.to_string()).unwrap_or_default(), "the schedule: {fault}");
    if !(is_final && (is_unproven || is_winner)) {
        return false;
    }
    match scheduler.give_up(host, uuid, fault).await {
        Ok(()) => true,
        Err(fault) => {
            tracing::error!("the schedule cannot take back what was not done: {fault}");
            false
        }
    }
}

/// What the schedule does needs nobody's right but that of who asked for it.
fn target(facts: Facts) -> Target {
    Target {
        facts,
        judge: Arc::new(|_| Ok(())),
    }
}

/// Ends leases whose time is over, lets come back whom there is room for now, and tells how domains stand.
pub(super) async fn look_after(host: Arc<Host>) {
    let scheduler = &host.schedule;
    let (mut tick, mut written) = (interval(TICK), Moment::now());
    while !host.stopping.is_cancelled() {
        tick.tick().await;
        let record = scheduler.record();
        if !scheduler.rules.is_on() && *record == Record::default() {
            sleep(LOOK).await;
            continue;
        }
        if Scheduler::sees_all(&host).is_err() {
            continue;
        }
        clear(scheduler);
        let over = over(scheduler);
        let flush = written.elapsed() > WRITTEN;
        let prepares = record
            .leases
            .values()
            .any(|lease| lease.stage == Stage::Preparing);
        if prepares && let Err(fault) = scheduler.advance(&host).await {
            tracing::error!("the schedule does not go on: {fault}");
        }
        if !flush && over.is_empty() && !waits_for_room(&record) && !scheduler.has_news(&host) {
            standing::tell(&host);
            continue;
        }
        let passed = scheduler
            .decide(&host, |record, world| {
                record.expire(world, &over);
                if flush {
                    record.tidy(world);
                    scheduler.write_times(record);
                }
            })
            .await;
        if let Err(fault) = passed {
            tracing::error!("the schedule does not go on: {fault}");
        }
        if flush {
            written = Moment::now();
        }
        standing::tell(&host);
    }
}

fn waits_for_room(record: &Record) -> bool {
    let mut holds = record.domains.values().flat_map(|kept| &kept.holds);
    holds.any(|hold| matches!(hold.holder, Holder::Room(_)))
}

fn over(scheduler: &Scheduler) -> Vec<LeaseId> {
    let (now, live) = (Moment::now(), scheduler.live());
    let ends = live.ends.iter().filter(|(_, end)| **end <= now);
    ends.map(|(id, _)| id.clone()).collect()
}

fn clear(scheduler: &Scheduler) {
    let (record, mut live) = (scheduler.record(), scheduler.live());
    live.ends.retain(|id, _| record.leases.contains_key(id));
    live.begun.retain(|id, _| record.leases.contains_key(id));
    live.refused.retain(|_, (at, _)| at.elapsed() < REMEMBERED);
    live.undone.retain(|_, (at, _)| at.elapsed() < REMEMBERED);
}

impl Scheduler {
    /// Writes down what is left of leases' times, and how long domains have been held back.
    fn write_times(&self, record: &mut Record) {
        let (now, mut live) = (Moment::now(), self.live());
        for (id, lease) in &mut record.leases {
            if let Some(end) = live.ends.get(id) {
                lease.ends_in_ms = Some(super::millis(end.saturating_duration_since(now)));
            }
        }
        for (uuid, since) in &mut live.spells {
            if let Some(kept) = record.domains.get_mut(uuid) {
                kept.preempted_ms += super::millis(now.saturating_duration_since(*since));
                *since = now;
            }
        }
    }
}
