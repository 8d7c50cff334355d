//! What libvirt says of domains, turned into readings.
//!
//! A bulk read asks nothing that makes libvirt talk to a guest's QEMU: one hung QEMU would hold up the figures of all. So the bulk
//! call brings states, and for domains that are off their sizes; the sizes of active ones come from virDomainGetInfo, which answers
//! from libvirt's own memory, as do metadata.

use std::{
    collections::{HashMap, HashSet},
    ffi::c_int,
    sync::Arc,
};

use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{DomainState, Metadata},
};

use super::{
    ffi::{self, Stats},
    inventory::{Inventory, Node, Reading, Software},
    metadata,
};

/// Domains with impossible names that are remembered, so that each is told of once.
const MAX_UNNAMABLE: usize = 1024;
/// The kind of metadata that is XML.
const ELEMENT: i32 = sys::VIR_DOMAIN_METADATA_ELEMENT as i32;

/// Reads all domains of one hypervisor again and again, and learns what its driver has.
pub(super) struct Survey {
    unnamable: HashSet<Uuid>,
    bulk: bool,
}

impl Default for Survey {
    fn default() -> Self {
        Self {
            unnamable: HashSet::new(),
            bulk: true,
        }
    }
}

impl Survey {
    /// Reads all domains. Calls `pulse` before each call that libvirt has to answer.
    ///
    /// # Errors
    /// libvirt's, where the whole cannot be read; a single domain that cannot is left out.
    pub(super) fn all(
        &mut self,
        connection: &Connect,
        memory: (&Inventory, usize),
        pulse: &dyn Fn(),
    ) -> Result<Vec<Reading>, Error> {
        if self.bulk {
            match self.in_bulk(connection, memory, pulse) {
                Err(error) if connection.is_alive().unwrap_or(false) => {
                    tracing::debug!(
                        "no bulk statistics, domains are read one by one: {}",
                        error.message()
                    );
                    // Not tried again where the driver lacks them; another reason, as too many domains for one answer, may pass.
                    self.bulk = error.code().to_raw() != sys::VIR_ERR_NO_SUPPORT;
                }
                read => return read,
            }
        }
        pulse();
        let domains = connection.list_all_domains(0)?;
        let marks = Marks::read(connection, pulse)?;
        let mut readings = Vec::with_capacity(domains.len());
        for domain in domains {
            pulse();
            let read = ffi::state(&domain)
                .and_then(|state| self.read(&domain, state, None, &marks, memory));
            keep(&mut readings, read, connection)?;
        }
        Ok(readings)
    }

    fn in_bulk(
        &mut self,
        connection: &Connect,
        memory: (&Inventory, usize),
        pulse: &dyn Fn(),
    ) -> Result<Vec<Reading>, Error> {
        pulse();
        let all = ffi::bulk_stats(connection, sys::VIR_DOMAIN_STATS_STATE, 0)?;
        pulse();
        let sizes = ffi::bulk_stats(
            connection,
            sys::VIR_DOMAIN_STATS_BALLOON | sys::VIR_DOMAIN_STATS_VCPU,
            sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_INACTIVE
                | sys::VIR_CONNECT_GET_ALL_DOMAINS_STATS_NOWAIT,
        )?;
        let sizes: HashMap<Uuid, Sizes> = sizes
            .iter()
            .filter_map(|stats| Some((stats.domain.uuid().ok()?, Sizes::of(stats)?)))
            .collect();
        let marks = Marks::read(connection, pulse)?;
        let mut readings = Vec::with_capacity(all.len());
        for stats in all {
            let state = (
                stats.state.unwrap_or_default(),
                stats.reason.unwrap_or_default(),
            );
            let off = !state_of(state.0).is_active();
            let known = stats
                .domain
                .uuid()
                .ok()
                .and_then(|uuid| sizes.get(&uuid))
                .filter(|_| off);
            pulse();
            keep(
                &mut readings,
                self.read(&stats.domain, state, known.copied(), &marks, memory),
                connection,
            )?;
        }
        Ok(readings)
    }

    /// A domain whose name could not be typed, logged or told apart is not ours to control; that is said once.
    fn read(
        &mut self,
        domain: &Domain,
        state: (c_int, c_int),
        sizes: Option<Sizes>,
        marks: &Marks,
        memory: (&Inventory, usize),
    ) -> Result<Option<Reading>, Error> {
        let uuid = domain.uuid()?;
        match domain.name()?.parse() {
            Ok(name) => read(domain, (uuid, name), state, sizes, marks, memory).map(Some),
            Err(error) => {
                if self.unnamable.len() < MAX_UNNAMABLE && self.unnamable.insert(uuid) {
                    tracing::warn!(
                        "the domain {uuid} is left out: {error}; `virsh domrename` gives it another name"
                    );
                }
                Ok(None)
            }
        }
    }
}

/// Reads one domain; `None` where its name cannot be one of ours.
///
/// # Errors
/// libvirt's; VIR_ERR_NO_DOMAIN where it is gone.
pub(super) fn one(domain: &Domain, memory: (&Inventory, usize)) -> Result<Option<Reading>, Error> {
    let uuid = domain.uuid()?;
    let Ok(name) = domain.name()?.parse() else {
        return Ok(None);
    };
    let mut marks = Marks::default();
    if !domain.is_persistent()? {
        marks.transient.insert(uuid);
    }
    if domain.autostart().unwrap_or(false) {
        marks.autostart.insert(uuid);
    }
    if domain.has_managed_save(0).unwrap_or(false) {
        marks.saved.insert(uuid);
    }
    read(
        domain,
        (uuid, name),
        ffi::state(domain)?,
        None,
        &marks,
        memory,
    )
    .map(Some)
}

fn read(
    domain: &Domain,
    (uuid, name): (Uuid, DomainName),
    (state, reason): (c_int, c_int),
    sizes: Option<Sizes>,
    marks: &Marks,
    memory: (&Inventory, usize),
) -> Result<Reading, Error> {
    let id = domain.id();
    let sizes = match sizes {
        Some(sizes) => sizes,
        None => Sizes::ask(domain, memory.0.max_vcpus(memory.1, uuid, id))?,
    };
    let state = state_of(state);
    let metadata = owned(domain, !marks.transient.contains(&uuid))?;
    Ok(Reading {
        uuid,
        name,
        // It was looked up before the state was, and may have ended in between.
        id: id.filter(|_| state != DomainState::Off),
        state,
        reason: reason_of(state, reason),
        memory_kib: sizes.memory_kib,
        max_memory_kib: sizes.max_memory_kib,
        vcpus: sizes.vcpus,
        max_vcpus: sizes.max_vcpus,
        cpu_time_ns: if state.is_active() {
            sizes.cpu_time_ns
        } else {
            0
        },
        autostart: marks.autostart.contains(&uuid),
        persistent: !marks.transient.contains(&uuid),
        saved: marks.saved.contains(&uuid),
        metadata: Arc::new(metadata),
    })
}

/// Reads a domain's owners, class and labels as they are in force: what is defined, else what runs. Where there is both, only who stands in
/// both owns it: whoever restores a saved image, libvirt itself among them, brings back the owners of its time.
///
/// # Errors
/// libvirt's. What it has and what cannot be understood is in the result.
pub(super) fn owned(domain: &Domain, persistent: bool) -> Result<Result<Metadata, String>, Error> {
    let current = element(domain, sys::VIR_DOMAIN_AFFECT_CURRENT)?;
    let current = understood(current.as_deref());
    if !persistent || domain.id().is_none() {
        return Ok(current);
    }
    let defined = match element(domain, sys::VIR_DOMAIN_AFFECT_CONFIG) {
        Ok(element) => understood(element.as_deref()),
        // Its definition went away meanwhile.
        Err(error) if error.code().to_raw() == sys::VIR_ERR_OPERATION_INVALID => {
            return Ok(current);
        }
        Err(error) => return Err(error),
    };
    Ok(current.and_then(|runs| {
        let defined = defined?;
        Ok(Metadata {
            owners: &runs.owners & &defined.owners,
            ..defined
        })
    }))
}

/// What an element says, or why it cannot be read; none says nothing.
pub(super) fn understood(element: Option<&str>) -> Result<Metadata, String> {
    element.map_or_else(|| Ok(Metadata::default()), metadata::read)
}

/// Reads the element among a domain's metadata that is ours, without its namespace; none also where the driver keeps none.
///
/// # Errors
/// libvirt's.
pub(super) fn element(
    domain: &Domain,
    of: sys::virDomainModificationImpact,
) -> Result<Option<String>, Error> {
    match domain.metadata(ELEMENT, Some(metadata::NAMESPACE), of) {
        Ok(element) => Ok(Some(element)),
        Err(error)
            if matches!(
                error.code().to_raw(),
                sys::VIR_ERR_NO_DOMAIN_METADATA | sys::VIR_ERR_NO_SUPPORT
            ) =>
        {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}

/// Puts the element in the place of the one that is there, in what runs and in what is defined as each exists; none takes it away.
///
/// # Errors
/// libvirt's.
pub(super) fn set_element(domain: &Domain, element: Option<&str>) -> Result<(), Error> {
    let impact = forms(domain)?.into_iter().fold(0, |all, of| all | of);
    domain.set_metadata(
        ELEMENT,
        element,
        Some(metadata::PREFIX),
        Some(metadata::NAMESPACE),
        impact,
    )
}

/// What there is of a domain: what runs, what is defined, or both.
///
/// # Errors
/// libvirt's.
pub(super) fn forms(domain: &Domain) -> Result<Vec<sys::virDomainModificationImpact>, Error> {
    let mut forms = Vec::with_capacity(2);
    if domain.is_active()? {
        forms.push(sys::VIR_DOMAIN_AFFECT_LIVE);
    }
    if domain.is_persistent()? {
        forms.push(sys::VIR_DOMAIN_AFFECT_CONFIG);
    }
    Ok(forms)
}

/// A domain that vanished, or that alone cannot be read, does not spoil the reading of the others.
fn keep(
    readings: &mut Vec<Reading>,
    read: Result<Option<Reading>, Error>,
    connection: &Connect,
) -> Result<(), Error> {
    match read {
        Ok(reading) => readings.extend(reading),
        Err(error) if !connection.is_alive().unwrap_or(false) => return Err(error),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => {}
        Err(error) => tracing::warn!("a domain cannot be read: {}", error.message()),
    }
    Ok(())
}

#[derive(Clone, Copy)]
struct Sizes {
    memory_kib: u64,
    max_memory_kib: u64,
    vcpus: u32,
    max_vcpus: u32,
    cpu_time_ns: u64,
}

impl Sizes {
    fn of(stats: &Stats) -> Option<Self> {
        Some(Self {
            memory_kib: stats.memory_kib?,
            max_memory_kib: stats.max_memory_kib?,
            vcpus: u32::try_from(stats.vcpus?).ok()?,
            max_vcpus: u32::try_from(stats.max_vcpus?).ok()?,
            cpu_time_ns: 0,
        })
    }

    fn ask(domain: &Domain, max_vcpus: Option<u32>) -> Result<Self, Error> {
        let info = domain.info()?;
        let flags = sys::VIR_DOMAIN_VCPU_MAXIMUM
            | if domain.id().is_some() {
                sys::VIR_DOMAIN_VCPU_LIVE
            } else {
                sys::VIR_DOMAIN_VCPU_CONFIG
            };
        // Drivers that cannot say (LXC) cannot change it either.
        let max_vcpus =
            max_vcpus.unwrap_or_else(|| domain.vcpus_flags(flags).unwrap_or(info.nr_virt_cpu));
        Ok(Self {
            memory_kib: info.memory,
            max_memory_kib: info.max_mem,
            vcpus: info.nr_virt_cpu,
            max_vcpus,
            cpu_time_ns: info.cpu_time,
        })
    }
}

/// What is asked of all domains at once rather than of each.
#[derive(Default)]
struct Marks {
    transient: HashSet<Uuid>,
    autostart: HashSet<Uuid>,
    saved: HashSet<Uuid>,
}

impl Marks {
    fn read(connection: &Connect, pulse: &dyn Fn()) -> Result<Self, Error> {
        let list = |filter| -> Result<HashSet<Uuid>, Error> {
            pulse();
            connection
                .list_all_domains(filter)?
                .iter()
                .map(Domain::uuid)
                .collect()
        };
        Ok(Self {
            transient: list(sys::VIR_CONNECT_LIST_DOMAINS_TRANSIENT)?,
            autostart: list(sys::VIR_CONNECT_LIST_DOMAINS_AUTOSTART)?,
            saved: list(sys::VIR_CONNECT_LIST_DOMAINS_MANAGEDSAVE)?,
        })
    }
}

/// Looks a domain up.
///
/// # Errors
/// libvirt's, except that it knows no such domain.
pub(super) fn find(connection: &Connect, uuid: Uuid) -> Result<Option<Domain>, Error> {
    none_if_unknown(connection.lookup_domain_by_uuid(uuid))
}

/// As [`find`], by name.
///
/// # Errors
/// libvirt's, except that it knows no such domain.
pub(super) fn find_by_name(
    connection: &Connect,
    name: &DomainName,
) -> Result<Option<Domain>, Error> {
    none_if_unknown(connection.lookup_domain_by_name(name.as_str()))
}

fn none_if_unknown(found: Result<Domain, Error>) -> Result<Option<Domain>, Error> {
    match found {
        Ok(domain) => Ok(Some(domain)),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => Ok(None),
        Err(error) => Err(error),
    }
}

/// Who answers on a connection.
pub(super) fn software(connection: &Connect) -> Result<Software, Error> {
    Ok(Software {
        driver: connection.driver_type()?,
        version: connection.hyp_version().map(version).unwrap_or_default(),
        libvirt: version(connection.lib_version()?),
    })
}

/// The machine as the driver describes it; what it cannot say is zero.
pub(super) fn node(connection: &Connect) -> Result<Node, Error> {
    let info = connection.node_info()?;
    Ok(Node {
        cpu_model: info.model,
        cpus: info.cpus,
        mhz: info.mhz,
        memory_kib: info.memory,
        free_kib: connection.free_memory().unwrap_or_default() / 1024,
    })
}

fn version(number: u32) -> String {
    match number {
        0 => String::new(),
        _ => format!(
            "{}.{}.{}",
            number / 1_000_000,
            number / 1000 % 1000,
            number % 1000
        ),
    }
}

/// A domain's state.
///
/// # Errors
/// libvirt's.
pub(super) fn state(domain: &Domain) -> Result<DomainState, Error> {
    Ok(state_of(ffi::state(domain)?.0))
}

fn state_of(state: c_int) -> DomainState {
    match u32::try_from(state) {
        Ok(sys::VIR_DOMAIN_RUNNING) => DomainState::Running,
        Ok(sys::VIR_DOMAIN_BLOCKED) => DomainState::Blocked,
        Ok(sys::VIR_DOMAIN_PAUSED) => DomainState::Paused,
        Ok(sys::VIR_DOMAIN_SHUTDOWN) => DomainState::ShuttingDown,
        Ok(sys::VIR_DOMAIN_SHUTOFF) => DomainState::Off,
        Ok(sys::VIR_DOMAIN_CRASHED) => DomainState::Crashed,
        Ok(sys::VIR_DOMAIN_PMSUSPENDED) => DomainState::Sleeping,
        _ => DomainState::Unknown,
    }
}

/// libvirt's words for why a domain is in a state; empty where it gives none.
fn reason_of(state: DomainState, reason: c_int) -> &'static str {
    let words: &[&'static str] = match state {
        DomainState::Running => &[
            "",
            "booted",
            "migrated",
            "restored",
            "from snapshot",
            "unpaused",
            "migration canceled",
            "save canceled",
            "event wakeup",
            "crashed",
            "post-copy",
            "post-copy failed",
        ],
        DomainState::Paused => &[
            "",
            "user",
            "migrating",
            "saving",
            "dumping",
            "I/O error",
            "watchdog",
            "from snapshot",
            "shutting down",
            "creating snapshot",
            "crashed",
            "starting up",
            "post-copy",
            "post-copy failed",
            "api error",
        ],
        DomainState::ShuttingDown => &["", "user"],
        DomainState::Off => &[
            "",
            "shutdown",
            "destroyed",
            "crashed",
            "migrated",
            "saved",
            "failed",
            "from snapshot",
            "daemon",
        ],
        DomainState::Crashed => &["", "panicked"],
        DomainState::Unknown | DomainState::Blocked | DomainState::Sleeping => &[],
    };
    usize::try_from(reason)
        .ok()
        .and_then(|at| words.get(at))
        .copied()
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_reasons_are_libvirts() {
        let state = |raw: u32| state_of(c_int::try_from(raw).unwrap());
        let reason = |state, raw: u32| reason_of(state, c_int::try_from(raw).unwrap());
        assert_eq!(state(sys::VIR_DOMAIN_PAUSED), DomainState::Paused);
        assert_eq!(state_of(-1), DomainState::Unknown);
        assert_eq!(
            reason(
                DomainState::Running,
                sys::VIR_DOMAIN_RUNNING_POSTCOPY_FAILED
            ),
            "post-copy failed"
        );
        assert_eq!(
            reason(DomainState::Running, sys::VIR_DOMAIN_RUNNING_BOOTED),
            "booted"
        );
        assert_eq!(
            reason(DomainState::Paused, sys::VIR_DOMAIN_PAUSED_API_ERROR),
            "api error"
        );
        assert_eq!(
            reason(DomainState::Paused, sys::VIR_DOMAIN_PAUSED_MIGRATION),
            "migrating"
        );
        assert_eq!(
            reason(DomainState::Off, sys::VIR_DOMAIN_SHUTOFF_DAEMON),
            "daemon"
        );
        assert_eq!(
            reason(DomainState::Off, sys::VIR_DOMAIN_SHUTOFF_SAVED),
            "saved"
        );
        assert_eq!(
            reason(DomainState::Crashed, sys::VIR_DOMAIN_CRASHED_PANICKED),
            "panicked"
        );
        assert_eq!(reason_of(DomainState::Off, 99), "");
        assert_eq!(reason_of(DomainState::Off, -1), "");
    }

    #[test]
    fn versions_are_three_numbers() {
        assert_eq!(version(11_003_000), "11.3.0");
        assert_eq!(version(0), "");
    }
}
