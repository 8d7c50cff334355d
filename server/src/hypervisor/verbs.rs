//! The verbs: what makes no sense is refused with its own message, the rest is one visit to the domain in its lane.

use std::{
    sync::Arc,
    time::{Duration, Instant as Moment},
};

use tokio::time::{Instant, timeout_at};
use uuid::Uuid;
use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::DomainRef,
    protocol::{Code, DomainRow, DomainState, Fault, MemSet, VcpuSet},
};

use super::{
    Change, Facts, Hypervisors, Target,
    connections::{Call, Class, Hypervisor},
    faults,
    inventory::{self, Glimpse, Reading},
    kept::Kept,
    lanes::Key,
    metadata, readings,
    sense::{Act, Sizes, conflict, memory_flags, sense, vcpu_flags},
};

/// How long a guest is watched while it gives memory back or takes it.
const BALLOON_WATCH: Duration = Duration::from_secs(3);
/// Drivers without balloon events are asked so often meanwhile.
const BALLOON_LOOK: Duration = Duration::from_millis(500);
/// Left between the end of a wait and the caller's deadline, so that the answer arrives in time.
const ANSWER_TIME: Duration = Duration::from_millis(100);
/// The most that `shutdown --force` leaves itself to pull the plug before the deadline: libvirt lets a QEMU that does not end at once
/// some seconds before it kills it.
const FORCE_TIME: Duration = Duration::from_secs(10);

/// What the driver of containers calls itself.
pub(super) const CONTAINERS: &str = "LXC";

/// A way to ask a guest for something, and by which flags a container hears of it.
struct Plea {
    ask: fn(&Domain, u32) -> Result<(), Error>,
    initctl: u32,
    signal: u32,
}

const SHUTDOWN: Plea = Plea {
    ask: |domain, flags| domain.shutdown_flags(flags),
    initctl: sys::VIR_DOMAIN_SHUTDOWN_INITCTL,
    signal: sys::VIR_DOMAIN_SHUTDOWN_SIGNAL,
};
const REBOOT: Plea = Plea {
    ask: |domain, flags| domain.reboot(flags),
    initctl: sys::VIR_DOMAIN_REBOOT_INITCTL,
    signal: sys::VIR_DOMAIN_REBOOT_SIGNAL,
};

impl Hypervisors {
    /// Returns a domain's XML.
    pub(crate) async fn describe(
        &self,
        target: Target,
        inactive: bool,
        secrets: bool,
        deadline: Instant,
    ) -> Result<String, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            visit.ok(visit.domain.xml_desc(xml_flags(inactive, secrets)))
        };
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), work)
            .await
    }

    /// Starts a defined domain, from its saved image where it has one.
    pub(crate) async fn start_domain(
        &self,
        target: Target,
        paused: bool,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let flags = if paused {
            sys::VIR_DOMAIN_START_PAUSED
        } else {
            sys::VIR_DOMAIN_NONE
        };
        self.in_lane(target, deadline, move |visit| {
            sense(Act::Start, &visit.facts.name, visit.state)?;
            let kept = Kept::present(visit.call, &visit.domain, &visit.facts)?;
            visit.call.begin()?;
            visit.ok(visit.domain.create_with_flags(flags))?;
            // A saved image brings back the metadata of its time, with owners who are none any more.
            if let Err(fault) = kept.see_to(visit.call, &visit.domain) {
                return Err(faults::unknown(&format!(
                    "'{}' was started, and it is not certain that its owners are those that it had: {}",
                    visit.facts.name, fault.message
                )));
            }
            Ok(visit.settle())
        })
        .await
    }

    /// Pulls the plug, even while other work on the domain hangs. Where nothing remains of the domain, its last row is returned.
    pub(crate) async fn destroy(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let lane = hypervisor
            .lanes
            .try_take(Key::Domain(target.facts.uuid), deadline);
        let host = Arc::clone(&hypervisor);
        let emergency = lane.is_none();
        let work = move |call: &Call| {
            let visit = if emergency {
                Visit::past_the_lane(call, &host, &target)?
            } else {
                Visit::new(call, &host, &target)?
            };
            sense(Act::Destroy, &visit.facts.name, visit.state)?;
            call.begin()?;
            visit.ok(visit.domain.destroy())?;
            if emergency {
                // libvirt's ordinary workers may all hang, and a reading with them.
                host.inventory
                    .destroyed(host.index, visit.facts.uuid, Moment::now());
                host.bell.changed(visit.facts.uuid);
                return Ok(off(visit.before.clone()));
            }
            Ok(visit.settle())
        };
        hypervisor
            .run(
                Class::Urgent,
                lane.into_iter().collect(),
                Some(deadline),
                work,
            )
            .await
    }

    /// Stops a domain's virtual CPUs.
    pub(crate) async fn pause(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.act(target, Act::Pause, deadline, Domain::suspend)
            .await
    }

    /// Lets a paused domain run on.
    pub(crate) async fn unpause(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.act(target, Act::Unpause, deadline, Domain::resume)
            .await
    }

    /// Resets the guest as its button would.
    pub(crate) async fn reset(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.act(target, Act::Reset, deadline, Domain::reset).await
    }

    /// Lets a domain start with its host, or not.
    pub(crate) async fn autostart(
        &self,
        target: Target,
        on: bool,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            let name = &visit.facts.name;
            if !visit.ok(visit.domain.is_persistent())? {
                return Err(conflict(format!(
                    "'{name}' has no definition, so nothing is left of it that could start with the host; `rxm define` gives it one"
                )));
            }
            visit.call.begin()?;
            visit.ok(visit.domain.set_autostart(on))?;
            Ok(visit.settle())
        })
        .await
    }

    /// Asks the guest to shut down; waits until it has, and with `force` pulls the plug shortly before the deadline.
    pub(crate) async fn shutdown(
        &self,
        target: Target,
        wait: bool,
        force: bool,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let begin = Instant::now();
        let asked = self
            .in_lane(target.clone(), deadline, move |visit| {
                let deaf = matches!(visit.state, DomainState::Paused | DomainState::Sleeping);
                if force && deaf {
                    return Ok(None);
                }
                sense(Act::Shutdown, &visit.facts.name, visit.state)?;
                visit.call.begin()?;
                let refused = match visit.ok(visit.ask(&SHUTDOWN)) {
                    Err(fault)
                        if force && matches!(fault.code, Code::Refused | Code::Unsupported) =>
                    {
                        true
                    }
                    asked => asked.map(|()| false)?,
                };
                Ok((!refused).then(|| (visit.domain.id(), visit.settle())))
            })
            .await?;
        let Some((id, row)) = asked else {
            return self.destroy(target, deadline).await;
        };
        if !wait && !force {
            return Ok(row);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let until = deadline
            - if force {
                FORCE_TIME.min(left / 2)
            } else {
                ANSWER_TIME.min(left)
            };
        let facts = &target.facts;
        let down = |glimpse: Option<Glimpse>| {
            glimpse.is_none_or(|now| !now.state.is_active() || now.id != id)
        };
        if self.until(facts, until, down).await {
            return Ok(self.row(facts).unwrap_or_else(|| off(row)));
        }
        if !force {
            return Err(not_in_time(&format!(
                "the guest of '{}' has not gone down in {:.0} s; `--force` pulls the plug",
                facts.name,
                begin.elapsed().as_secs_f64()
            )));
        }
        match self.destroy(target.clone(), deadline).await {
            Err(fault) if matches!(fault.code, Code::Conflict | Code::NotFound) => {
                Ok(self.row(&target.facts).unwrap_or_else(|| off(row)))
            }
            // The guest has been asked, so it is not true any more that nothing has begun.
            Err(fault) if matches!(fault.code, Code::Busy | Code::Unavailable) => {
                let name = &target.facts.name;
                Err(not_in_time(&format!(
                    "the guest of '{name}' was asked and has not gone down, and libvirt had no time to pull the plug; `rxm destroy {name}` does"
                )))
            }
            destroyed => destroyed,
        }
    }

    /// Asks the guest to reboot, and waits until it has; with `force` resets it without asking.
    pub(crate) async fn reboot(
        &self,
        target: Target,
        wait: bool,
        force: bool,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let begin = Instant::now();
        let act = if force { Act::Reset } else { Act::Reboot };
        let (reboots, id, row) = self
            .in_lane(target.clone(), deadline, move |visit| {
                sense(act, &visit.facts.name, visit.state)?;
                let reboots = visit
                    .host
                    .inventory
                    .glimpse(visit.host.index, visit.facts.uuid)
                    .map_or(0, |now| now.reboots);
                visit.call.begin()?;
                visit.ok(if force {
                    visit.domain.reset()
                } else {
                    visit.ask(&REBOOT)
                })?;
                Ok((reboots, visit.domain.id(), visit.settle()))
            })
            .await?;
        if !wait || force {
            return Ok(row);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        let facts = &target.facts;
        let rebooted = |glimpse: Option<Glimpse>| {
            glimpse
                .is_some_and(|now| now.reboots > reboots || (now.state.is_active() && now.id != id))
        };
        if self
            .until(facts, deadline - ANSWER_TIME.min(left), rebooted)
            .await
        {
            return Ok(self.row(facts).unwrap_or(row));
        }
        Err(not_in_time(&format!(
            "the guest of '{}' has not rebooted in {:.0} s; `--force` resets it",
            facts.name,
            begin.elapsed().as_secs_f64()
        )))
    }

    /// Sets a domain's memory; of a running one the balloon, which is then watched for a while.
    pub(crate) async fn mem_set(
        &self,
        target: Target,
        set: &MemSet,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let asked = set.clone();
        let (live, row) = self
            .in_lane(target.clone(), deadline, move |visit| {
                let flags = memory_flags(&asked, &visit.sizes())?;
                visit.call.begin()?;
                visit.ok(visit.domain.set_memory_flags(asked.kib, flags))?;
                Ok((flags & sys::VIR_DOMAIN_AFFECT_LIVE != 0, visit.settle()))
            })
            .await?;
        // A container has no balloon: its limit holds at once, and what libvirt reports is what it uses.
        let container = self.shared.inventory.driver(target.facts.hypervisor) == CONTAINERS;
        if !live || container || row.state != DomainState::Running {
            return Ok(row);
        }
        let (kib, facts) = (set.kib, &target.facts);
        let watched_until = (Instant::now() + BALLOON_WATCH)
            .min(deadline.checked_sub(ANSWER_TIME).unwrap_or(deadline));
        let reached = |glimpse: Option<Glimpse>| glimpse.is_none_or(|now| now.memory_kib == kib);
        while !self
            .until(
                facts,
                (Instant::now() + BALLOON_LOOK).min(watched_until),
                reached,
            )
            .await
            && Instant::now() < watched_until
        {
            self.by_index(facts.hypervisor)?.bell.changed(facts.uuid);
        }
        Ok(self.row(facts).unwrap_or(row))
    }

    /// Sets the number of a domain's virtual CPUs.
    pub(crate) async fn vcpu_set(
        &self,
        target: Target,
        set: &VcpuSet,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let asked = set.clone();
        self.in_lane(target, deadline, move |visit| {
            let flags = vcpu_flags(&asked, &visit.sizes())?;
            visit.call.begin()?;
            visit.ok(visit.domain.set_vcpus_flags(asked.count, flags))?;
            Ok(visit.settle())
        })
        .await
    }

    /// Changes a domain's owners, labels or class, in what runs and in what is defined.
    pub(crate) async fn set_metadata(
        &self,
        target: Target,
        change: Change,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            let present = visit.facts.metadata.as_ref().as_ref();
            let present =
                present.map_err(|why| conflict(format!("'{}': {why}", visit.facts.name)))?;
            let wanted = metadata::change(present, &change);
            if wanted != *present {
                metadata::fit(&wanted)?;
            }
            Kept::new(wanted).see_to(visit.call, &visit.domain)?;
            Ok(visit.settle())
        })
        .await
    }

    /// Removes a domain's definition; keeps its firmware variables unless told otherwise.
    pub(crate) async fn undefine(
        &self,
        target: Target,
        discard_saved: bool,
        discard_nvram: bool,
        deadline: Instant,
    ) -> Result<(), Fault> {
        self.in_lane(target, deadline, move |visit| {
            let name = &visit.facts.name;
            sense(Act::Undefine, name, visit.state)?;
            if !discard_saved && visit.domain.has_managed_save(0).unwrap_or(false) {
                return Err(conflict(format!(
                    "'{name}' has a saved image; `rxm start {name}` goes on from it, `--discard-saved` throws it away"
                )));
            }
            visit.call.begin()?;
            visit.ok(undefine(&visit.domain, discard_saved, discard_nvram))?;
            visit.host.inventory.gone(visit.host.index, visit.facts.uuid, Moment::now());
            Ok(())
        })
        .await
    }

    /// A visit that does one thing.
    async fn act(
        &self,
        target: Target,
        act: Act,
        deadline: Instant,
        change: impl FnOnce(&Domain) -> Result<(), Error> + Send + 'static,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            sense(act, &visit.facts.name, visit.state)?;
            visit.call.begin()?;
            visit.ok(change(&visit.domain))?;
            Ok(visit.settle())
        })
        .await
    }

    pub(super) async fn in_lane<T: Send + 'static>(
        &self,
        target: Target,
        deadline: Instant,
        work: impl FnOnce(&Visit<'_>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let lane = hypervisor
            .lanes
            .take(Key::Domain(target.facts.uuid), deadline)
            .await?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| work(&Visit::new(call, &host, &target)?);
        hypervisor
            .run(Class::Change, vec![lane], Some(deadline), work)
            .await
    }

    /// Waits until a domain looks as wished; returns whether it does.
    pub(super) async fn until(
        &self,
        facts: &Facts,
        limit: Instant,
        wished: impl Fn(Option<Glimpse>) -> bool,
    ) -> bool {
        let inventory = &self.shared.inventory;
        let mut changes = inventory.changes();
        loop {
            if wished(inventory.glimpse(facts.hypervisor, facts.uuid)) {
                return true;
            }
            if !matches!(timeout_at(limit, changes.changed()).await, Ok(Ok(()))) {
                return wished(inventory.glimpse(facts.hypervisor, facts.uuid));
            }
        }
    }

    /// What `list` shows of a domain, from memory.
    pub(crate) fn row(&self, facts: &Facts) -> Option<DomainRow> {
        self.shared.inventory.row(facts.hypervisor, facts.uuid)
    }
}

/// A domain looked up again in the thread that acts on it: it is there, and the verdict still holds.
pub(super) struct Visit<'a> {
    pub(super) call: &'a Call,
    pub(super) host: &'a Hypervisor,
    pub(super) domain: Domain,
    pub(super) facts: Facts,
    pub(super) state: DomainState,
    before: DomainRow,
}

impl<'a> Visit<'a> {
    /// # Errors
    /// `NotFound` where the domain has vanished, what the judge says where its facts have changed, libvirt's.
    pub(super) fn new(
        call: &'a Call,
        host: &'a Hypervisor,
        target: &Target,
    ) -> Result<Self, Fault> {
        Self::with(call, host, target, present)
    }

    /// Asks the guest. A container hears of it by its initctl or by a signal to its first process; libvirt 9.0 says that it has used the one
    /// also where there is none, and then sends no signal. So both are used: what knows initctl does no harm at the signal.
    fn ask(&self, plea: &Plea) -> Result<(), Error> {
        if self.host.inventory.driver(self.host.index) != CONTAINERS {
            return (plea.ask)(&self.domain, 0);
        }
        let told = (plea.ask)(&self.domain, plea.initctl);
        match (plea.ask)(&self.domain, plea.signal) {
            // It has gone down already.
            Err(_) if told.is_ok() && !self.domain.is_active().unwrap_or(true) => Ok(()),
            signalled => signalled,
        }
    }

    /// As [`Visit::new`], with the metadata that events have brought: libvirt reads them with its ordinary workers, which may all hang.
    fn past_the_lane(call: &'a Call, host: &'a Hypervisor, target: &Target) -> Result<Self, Fault> {
        Self::with(call, host, target, remembered)
    }

    fn with(
        call: &'a Call,
        host: &'a Hypervisor,
        target: &Target,
        look: impl FnOnce(&Call, &Hypervisor, &Domain, Uuid) -> Result<Option<Facts>, Fault>,
    ) -> Result<Self, Fault> {
        let uuid = target.facts.uuid;
        let began = Moment::now();
        let Some(domain) =
            readings::find(&call.connection, uuid).map_err(|error| call.fault(&error))?
        else {
            host.inventory.gone(host.index, uuid, began);
            return Err(faults::vanished());
        };
        let facts = look(call, host, &domain, uuid)?.ok_or_else(faults::vanished)?;
        if facts.revision != target.facts.revision {
            (target.judge)(&facts)?;
        }
        let before = host
            .inventory
            .row(host.index, uuid)
            .ok_or_else(faults::vanished)?;
        Ok(Self {
            call,
            host,
            domain,
            state: facts.state,
            facts,
            before,
        })
    }

    /// Looks at the domain again, where the visit itself has changed its state.
    pub(super) fn again(&self) -> Result<Self, Fault> {
        let state = self.ok(readings::state(&self.domain))?;
        Ok(Self {
            call: self.call,
            host: self.host,
            domain: self.domain.clone(),
            facts: self.facts.clone(),
            state,
            before: self.before.clone(),
        })
    }

    pub(super) fn ok<T>(&self, result: Result<T, Error>) -> Result<T, Fault> {
        result.map_err(|error| self.call.fault(&error))
    }

    /// Reads the domain again after a change, so that the next look at memory shows it.
    pub(super) fn settle(&self) -> DomainRow {
        let (inventory, index, uuid) = (&self.host.inventory, self.host.index, self.facts.uuid);
        match self.look() {
            Ok(Some(reading)) => inventory::row(&reading, &self.host.uri, 0, false),
            Ok(None) => off(self.before.clone()),
            Err(error) => {
                tracing::warn!(
                    "'{}' has been changed and cannot be read: {}",
                    self.facts.name,
                    error.message()
                );
                self.host.bell.changed(uuid);
                inventory
                    .row(index, uuid)
                    .unwrap_or_else(|| self.before.clone())
            }
        }
    }

    /// Reads the domain into memory; `None` where it is gone.
    pub(super) fn look(&self) -> Result<Option<Reading>, Error> {
        let (inventory, index, uuid) = (&self.host.inventory, self.host.index, self.facts.uuid);
        let began = Moment::now();
        let reading = match readings::find(&self.call.connection, uuid)? {
            Some(domain) => match readings::one(&domain, (inventory, index)) {
                Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => None,
                read => read?,
            },
            None => None,
        };
        match &reading {
            Some(reading) => drop(inventory.put(index, reading.clone(), began)),
            None => inventory.gone(index, uuid, began),
        }
        Ok(reading)
    }

    pub(super) fn sizes(&self) -> Sizes<'_> {
        Sizes {
            name: &self.facts.name,
            active: self.state.is_active(),
            persistent: self.before.persistent,
            max_memory_kib: self
                .domain
                .info()
                .map_or(self.before.max_memory_kib, |info| info.max_mem),
            max_vcpus: self.before.max_vcpus,
        }
    }
}

/// Returns the facts of a domain as libvirt shows them now, and puts them in memory where they are news; `None` where its name is none
/// of ours.
pub(super) fn present(
    call: &Call,
    host: &Hypervisor,
    domain: &Domain,
    uuid: Uuid,
) -> Result<Option<Facts>, Fault> {
    let failed = |error: Error| call.fault(&error);
    let name = domain.name().map_err(failed)?;
    let persistent = domain.is_persistent().map_err(failed)?;
    let metadata = readings::owned(domain, persistent).map_err(failed)?;
    let state = readings::state(domain).map_err(failed)?;
    let known = host
        .inventory
        .find(&DomainRef::Uuid(uuid), Some(host.index));
    if let Some(facts) = known
        && facts.name.as_str() == name
        && facts.state == state
        && *facts.metadata == metadata
    {
        return Ok(Some(facts));
    }
    read_anew(call, host, domain)
}

/// As [`present`], but for the metadata, which are those in memory.
fn remembered(
    call: &Call,
    host: &Hypervisor,
    domain: &Domain,
    uuid: Uuid,
) -> Result<Option<Facts>, Fault> {
    let name = domain.name().map_err(|error| call.fault(&error))?;
    let state = readings::state(domain).map_err(|error| call.fault(&error))?;
    let known = host
        .inventory
        .find(&DomainRef::Uuid(uuid), Some(host.index));
    match known {
        Some(facts) if facts.name.as_str() == name => Ok(Some(Facts {
            // Revision 0 is nobody's: the judge is asked again.
            revision: if facts.state == state {
                facts.revision
            } else {
                0
            },
            state,
            ..facts
        })),
        _ => read_anew(call, host, domain),
    }
}

fn read_anew(call: &Call, host: &Hypervisor, domain: &Domain) -> Result<Option<Facts>, Fault> {
    let began = Moment::now();
    let reading =
        readings::one(domain, (&host.inventory, host.index)).map_err(|error| call.fault(&error))?;
    Ok(reading.map(|reading| host.inventory.put(host.index, reading, began)))
}

/// KEEP_NVRAM is not known to drivers that have no such thing.
pub(super) fn undefine(
    domain: &Domain,
    discard_saved: bool,
    discard_nvram: bool,
) -> Result<(), Error> {
    let saved = if discard_saved {
        sys::VIR_DOMAIN_UNDEFINE_MANAGED_SAVE
    } else {
        0
    };
    let nvram = if discard_nvram {
        sys::VIR_DOMAIN_UNDEFINE_NVRAM
    } else {
        sys::VIR_DOMAIN_UNDEFINE_KEEP_NVRAM
    };
    match domain.undefine_flags(saved | nvram) {
        Err(error)
            if matches!(
                error.code().to_raw(),
                sys::VIR_ERR_INVALID_ARG | sys::VIR_ERR_NO_SUPPORT
            ) =>
        {
            if saved == 0 {
                domain.undefine()
            } else {
                domain.undefine_flags(saved)
            }
        }
        undefined => undefined,
    }
}

pub(super) fn xml_flags(inactive: bool, secrets: bool) -> sys::virDomainXMLFlags {
    let inactive = if inactive {
        sys::VIR_DOMAIN_XML_INACTIVE
    } else {
        0
    };
    inactive
        | if secrets {
            sys::VIR_DOMAIN_XML_SECURE
        } else {
            0
        }
}

/// How a domain that is gone was last seen.
fn off(row: DomainRow) -> DomainRow {
    DomainRow {
        id: None,
        state: DomainState::Off,
        reason: String::new(),
        cpu_time_ns: 0,
        ..row
    }
}

fn not_in_time(message: &str) -> Fault {
    Fault {
        retry: true,
        ..Fault::new(Code::Refused, message)
    }
}
