//! What the schedule does to a domain: less CPU, less memory, a halt, its memory to the disk, and all of it back.
//!
//! ```text
//!            starve         shrink           halt           freeze
//! runs <---------------> <------------> <------------> <--------------> off, with its image
//!             feed           grow           run_on        thaw, halted
//! ```
//! The schedule decides, and looks with [`Hypervisors::seen`] before it does; each step here is one visit in the domain's lane, says what libvirt
//! shows afterwards, and does nothing where that is so already. So a step whose outcome is not known is taken again.
//!
//! A starved guest's QEMU is starved with it: what needs QEMU's own work goes before, or after it has been fed. Shrink a guest first, then starve
//! it; feed it first, then let it grow, or freeze it.

use std::{fs, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use uuid::Uuid;
use virt_sys as sys;
use xman_common::protocol::{Code, DomainState, Fault};

use super::{
    Hypervisors, Target,
    connections::{Call, Class},
    faults, ffi,
    inventory::Reading,
    sense::{Act, conflict, sense},
    verbs::Visit,
    xml,
};

pub(crate) use balloon::Balloon;
pub(crate) use cpu::CpuShare;

mod balloon;
mod cpu;
mod freeze;

/// How long libvirt waits for a guest's agent to take the time. One that answers at all does so in a fraction of that.
const AGENT_TIME: i32 = 5;
/// How long is waited for all that libvirt does around it: the same time again for the agent to show that it is there.
const CLOCK_LIMIT: Duration = Duration::from_secs(12);

/// What libvirt says a domain has and does: the ground for whatever the schedule decides.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Seen {
    /// Its state.
    pub(crate) state: DomainState,
    /// libvirt's words for why it is in that; `user` where somebody paused it.
    pub(crate) reason: &'static str,
    /// From which start to which end it is: absent where it is off.
    pub(crate) life: Option<Life>,
    /// What it has of the CPUs; absent where it is off, and where libvirt does not bound it.
    pub(crate) cpu: Option<CpuShare>,
    /// Its virtual CPUs.
    pub(crate) vcpus: u32,
    /// Its memory now, in KiB.
    pub(crate) memory_kib: u64,
    /// The most memory that it can have while it runs, in KiB.
    pub(crate) max_memory_kib: u64,
    /// Whether libvirt keeps an image of its memory.
    pub(crate) saved: bool,
}

/// One life of a domain: another number, or another start of the host, is another life. What was taken from one is not owed to the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Life {
    /// The kernel's identity of the host's own start.
    host: Uuid,
    /// libvirt's number.
    id: u32,
}

#[cfg(test)]
impl Life {
    pub(crate) fn of_test(id: u32) -> Self {
        Self {
            host: Uuid::nil(),
            id,
        }
    }
}

impl Seen {
    /// Whether it is off and goes on from its image.
    pub(crate) fn is_frozen(&self) -> bool {
        !self.state.is_active() && self.saved
    }

    fn of(visit: &Visit<'_>, reading: &Reading) -> Self {
        let cpu = reading
            .state
            .is_active()
            .then(|| cpu::share(visit))
            .and_then(Result::ok);
        Self {
            state: reading.state,
            reason: reading.reason,
            life: reading.id.map(|id| Life {
                host: host_life(),
                id,
            }),
            cpu,
            vcpus: reading.vcpus,
            memory_kib: reading.memory_kib,
            max_memory_kib: reading.max_memory_kib,
            saved: reading.saved,
        }
    }
}

/// What came of setting a guest's clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Clock {
    /// It shows the host's time.
    Set,
    /// Nobody in the guest could be asked.
    NoAgent,
    /// The agent is there and did not do it.
    Failed(String),
}

impl Hypervisors {
    /// Looks at a domain, also while other work on it goes on.
    ///
    /// # Errors
    /// `NotFound`, what the judge says, libvirt's.
    pub(crate) async fn seen(&self, target: Target, deadline: Instant) -> Result<Seen, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            now(&visit)
        };
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), work)
            .await
    }

    /// Stops a domain's virtual CPUs; nothing to do where it is paused, whoever did that.
    ///
    /// # Errors
    /// `Conflict` where it is off or sleeps, libvirt's; `Refused` where libvirt shows it running afterwards.
    pub(crate) async fn halt(&self, target: Target, deadline: Instant) -> Result<Seen, Fault> {
        self.step(target, deadline, |visit| {
            if visit.state == DomainState::Paused {
                return Ok(());
            }
            sense(Act::Pause, &visit.facts.name, visit.state)?;
            visit.call.begin()?;
            visit.ok(visit.domain.suspend())
        })
        .await
        .and_then(|(name, seen)| is(&name, seen, DomainState::Paused))
    }

    /// Lets a paused domain run on; nothing to do where it runs.
    ///
    /// # Errors
    /// `Conflict` where it is off or sleeps, libvirt's; `Refused` where libvirt shows it paused afterwards.
    pub(crate) async fn run_on(&self, target: Target, deadline: Instant) -> Result<Seen, Fault> {
        let home = self.shared.cache.clone();
        self.step(target, deadline, move |visit| {
            if matches!(visit.state, DomainState::Running | DomainState::Blocked) {
                return freeze::put_aside(visit, home.as_deref());
            }
            sense(Act::Unpause, &visit.facts.name, visit.state)?;
            freeze::is_there(visit)?;
            visit.call.begin()?;
            visit.ok(visit.domain.resume())?;
            freeze::put_aside(visit, home.as_deref())
        })
        .await
        .and_then(|(name, seen)| is(&name, seen, DomainState::Running))
    }

    /// Sets a guest's clock by its agent, where one is there: a guest that stood still believes that no time has passed. It is not worth a failure,
    /// and not the domain's lane: an agent may be silent.
    pub(crate) async fn set_clock(&self, target: Target) -> Clock {
        let limit = Instant::now() + CLOCK_LIMIT;
        let asked = async {
            let hypervisor = self.by_index(target.facts.hypervisor)?;
            let host = Arc::clone(&hypervisor);
            let work = move |call: &Call| {
                let visit = Visit::new(call, &host, &target)?;
                if visit.state != DomainState::Running || !has_agent(&visit)? {
                    return Ok(Clock::NoAgent);
                }
                call.begin()?;
                // Otherwise libvirt waits for ever, and a thread with it.
                visit.ok(ffi::set_agent_patience(&visit.domain, AGENT_TIME))?;
                let set = visit.domain.set_time(0, 0, sys::VIR_DOMAIN_TIME_SYNC);
                let before = sys::VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK;
                if let Err(error) = ffi::set_agent_patience(&visit.domain, before) {
                    tracing::debug!("'{}': {}", visit.facts.name, error.message());
                }
                Ok(match set {
                    Ok(()) => Clock::Set,
                    Err(error) => Clock::Failed(faults::tidy(error.message())),
                })
            };
            hypervisor
                .run(Class::Change, Vec::new(), Some(limit), work)
                .await
        };
        // A call that has begun is waited for by `run` as long as it takes; nobody here has to.
        match tokio::time::timeout_at(limit, asked).await {
            Ok(Ok(clock)) => clock,
            Ok(Err(fault)) => Clock::Failed(fault.message),
            Err(_) => Clock::Failed("the guest's agent is silent".to_owned()),
        }
    }

    /// A visit in the domain's lane, and what is seen after it.
    async fn step(
        &self,
        target: Target,
        deadline: Instant,
        work: impl FnOnce(&Visit<'_>) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(String, Seen), Fault> {
        self.in_lane(target, deadline, move |visit| {
            work(visit)?;
            Ok((visit.facts.name.to_string(), now(visit)?))
        })
        .await
    }
}

/// Reads a domain anew, into memory too.
fn now(visit: &Visit<'_>) -> Result<Seen, Fault> {
    match visit.ok(visit.look())? {
        Some(reading) => Ok(Seen::of(visit, &reading)),
        None => Err(faults::vanished()),
    }
}

/// Believes that it is done where libvirt shows it.
fn is(name: &str, seen: Seen, wished: DomainState) -> Result<Seen, Fault> {
    let is_so = seen.state == wished
        || (wished == DomainState::Running && seen.state == DomainState::Blocked);
    if is_so {
        return Ok(seen);
    }
    Err(Fault {
        retry: true,
        ..Fault::new(
            Code::Refused,
            format!(
                "libvirt took it that '{name}' be {wished}, and shows it {}{}",
                seen.state,
                if seen.reason.is_empty() {
                    String::new()
                } else {
                    format!(" ({})", seen.reason)
                }
            ),
        )
    })
}

/// Refuses what only a domain that is there in memory can be asked for.
fn is_active(visit: &Visit<'_>) -> Result<(), Fault> {
    if visit.state.is_active() {
        return Ok(());
    }
    let name = &visit.facts.name;
    Err(conflict(format!(
        "'{name}' is {}; there is nothing to take from it or to give it",
        visit.state
    )))
}

/// What libvirt shows of a running domain.
fn live_xml(visit: &Visit<'_>) -> Result<String, Fault> {
    visit.ok(visit.domain.xml_desc(0))
}

fn has_agent(visit: &Visit<'_>) -> Result<bool, Fault> {
    let xml = live_xml(visit)?;
    let document = xml::document(&xml)?;
    let mut targets = document
        .descendants()
        .filter(|node| node.has_tag_name("target"));
    Ok(targets.any(|target| {
        target.attribute("name") == Some("org.qemu.guest_agent.0")
            && target.attribute("state") == Some("connected")
    }))
}

/// The kernel's identity of this start of the host; the same for all where it does not say.
fn host_life() -> Uuid {
    let said = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    said.trim().parse().unwrap_or_default()
}
