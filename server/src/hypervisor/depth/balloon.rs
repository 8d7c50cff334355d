//! Less memory for a running guest, and more again: it gives and takes by its balloon, at its own pace or not at all.

use std::time::Duration;

use tokio::time::Instant;
use virt::domain::MemoryStat;
use virt_sys as sys;
use xman_common::{
    name::DomainRef,
    protocol::{Code, DomainState, Fault, MemSet},
};

use super::{Seen, is_active, live_xml};
use crate::hypervisor::{
    Facts, Hypervisors, Target,
    connections::{Call, Class},
    faults,
    inventory::Glimpse,
    readings,
    sense::{conflict, memory_flags},
    verbs::{CONTAINERS, Visit},
    xml,
};

/// A guest that has a balloon's driver begins within that, also a starved one; one that has none never does.
const BEGINS_WITHIN: Duration = Duration::from_secs(8);
/// One that has begun may have to write to its disk what it gives; without a sign for that long it has given up.
const STANDS_AFTER: Duration = Duration::from_secs(20);
/// libvirt is asked so often meanwhile: it tells of a balloon by itself at most once in a second, and not with every driver.
const LOOK: Duration = Duration::from_millis(200);
/// How long an answer to that may take: a hung QEMU must not hold up who waits.
const LOOK_LIMIT: Duration = Duration::from_secs(2);
/// What is left between the end of a wait and the caller's deadline, so that the answer arrives in time.
const ANSWER_TIME: Duration = Duration::from_millis(100);
/// As near as that is there, in KiB: Xen counts a guest's screen to its memory or not.
const SLACK_KIB: u64 = 1024;

/// How far a guest has come with its memory, in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Balloon {
    /// It has what was asked for.
    Reached(u64),
    /// It is on the way.
    Moving(u64),
    /// It does not move: it is paused, has no driver for the balloon, or can give no more.
    Still(u64),
}

impl Hypervisors {
    /// Whether the memory of a running domain can be changed at all.
    ///
    /// # Errors
    /// `Unsupported` with what to choose instead, `Conflict` where it is off.
    pub(crate) async fn can_shrink(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<Seen, Fault> {
        let seen = self.step(target, deadline, has_balloon).await?;
        Ok(seen.1)
    }

    /// Asks a guest to give memory until it has so much, and does not wait for it.
    ///
    /// # Errors
    /// As [`Hypervisors::can_shrink`], and what libvirt says.
    pub(crate) async fn shrink(
        &self,
        target: Target,
        kib: u64,
        deadline: Instant,
    ) -> Result<Seen, Fault> {
        self.resize(target, deadline, move |now| now.min(kib)).await
    }

    /// Lets a guest take memory until it has so much, and does not wait for it.
    ///
    /// # Errors
    /// As [`Hypervisors::shrink`].
    pub(crate) async fn grow(
        &self,
        target: Target,
        kib: u64,
        deadline: Instant,
    ) -> Result<Seen, Fault> {
        self.resize(target, deadline, move |now| now.max(kib)).await
    }

    async fn resize(
        &self,
        target: Target,
        deadline: Instant,
        wanted: impl FnOnce(u64) -> u64 + Send + 'static,
    ) -> Result<Seen, Fault> {
        let seen = self
            .step(target, deadline, move |visit| {
                has_balloon(visit)?;
                let info = visit.ok(visit.domain.info())?;
                let kib = wanted(info.memory).min(info.max_mem);
                let set = MemSet {
                    domain: DomainRef::Uuid(visit.facts.uuid),
                    kib,
                    config: false,
                    maximum: false,
                };
                let flags = memory_flags(&set, &visit.sizes())?;
                // Also where it has so much now: it may be on its way to somewhere else.
                visit.call.begin()?;
                visit.ok(visit.domain.set_memory_flags(kib, flags))
            })
            .await?;
        Ok(seen.1)
    }

    /// Watches a guest that was asked to give or take memory until it has so much, stands still, or the deadline comes.
    ///
    /// # Errors
    /// `NotFound` and `Conflict` where it is gone or off meanwhile.
    pub(crate) async fn balloon(
        &self,
        target: &Target,
        kib: u64,
        deadline: Instant,
    ) -> Result<Balloon, Fault> {
        let facts = &target.facts;
        let limit = deadline.checked_sub(ANSWER_TIME).unwrap_or(deadline);
        let glimpse = || self.shared.inventory.glimpse(facts.hypervisor, facts.uuid);
        let first = glimpse().ok_or_else(faults::vanished)?;
        let (mut last, mut moved, mut patience) = (first.memory_kib, Instant::now(), BEGINS_WITHIN);
        loop {
            let now = glimpse().ok_or_else(faults::vanished)?;
            if !now.state.is_active() || now.id != first.id {
                return Err(conflict(format!(
                    "'{}' went {} while it was watched",
                    facts.name, now.state
                )));
            }
            if now.memory_kib != last {
                (last, moved, patience) = (now.memory_kib, Instant::now(), STANDS_AFTER);
            }
            if last.abs_diff(kib) <= SLACK_KIB {
                return Ok(Balloon::Reached(last));
            }
            if now.state != DomainState::Running && now.state != DomainState::Blocked
                || moved.elapsed() >= patience
            {
                return Ok(Balloon::Still(last));
            }
            if Instant::now() >= limit {
                return Ok(Balloon::Moving(last));
            }
            let other = |seen: Option<Glimpse>| seen != Some(now);
            let look = (Instant::now() + LOOK).min(limit);
            if !self.until(facts, look, other).await {
                self.look_into_balloon(facts, limit).await?;
            }
        }
    }

    /// Asks the hypervisor how much memory a guest has at this moment, into what is known of it.
    async fn look_into_balloon(&self, facts: &Facts, limit: Instant) -> Result<(), Fault> {
        let hypervisor = self.by_index(facts.hypervisor)?;
        let uuid = facts.uuid;
        let work = move |call: &Call| {
            let stats = match readings::find(&call.connection, uuid) {
                Ok(Some(domain)) => domain.memory_stats(0),
                Ok(None) => return Err(faults::vanished()),
                Err(error) => Err(error),
            };
            let stats = stats.map_err(|error| call.fault(&error))?;
            let actual =
                |stat: &&MemoryStat| stat.tag == sys::VIR_DOMAIN_MEMORY_STAT_ACTUAL_BALLOON;
            Ok(stats.iter().find(actual).map(|stat| stat.val))
        };
        let limit = limit.min(Instant::now() + LOOK_LIMIT);
        match hypervisor
            .run(Class::Read, Vec::new(), Some(limit), work)
            .await
        {
            Ok(Some(kib)) => hypervisor.inventory.balloon(hypervisor.index, uuid, kib),
            // It is read again as everything is, and that it has gone is seen by that too.
            Ok(None) | Err(_) => hypervisor.bell.changed(uuid),
        }
        Ok(())
    }
}

/// Refuses what has no balloon. Whether the guest's system has a driver for it only its moving tells.
fn has_balloon(visit: &Visit<'_>) -> Result<(), Fault> {
    is_active(visit)?;
    let (inventory, index) = (&visit.host.inventory, visit.host.index);
    let lacks = if inventory.driver(index) == CONTAINERS {
        "a container has no balloon"
    } else {
        let xml = live_xml(visit)?;
        let document = xml::document(&xml)?;
        let mut balloons = document
            .descendants()
            .filter(|node| node.has_tag_name("memballoon"));
        if !balloons.any(|balloon| balloon.attribute("model") == Some("none")) {
            return Ok(());
        }
        "it has no balloon: `<memballoon model='none'/>`"
    };
    Err(Fault::new(
        Code::Unsupported,
        format!(
            "'{}' cannot be shrunk: {lacks}; choose `preempt = \"starve\"` or \"pause\" for its class",
            visit.facts.name
        ),
    ))
}
