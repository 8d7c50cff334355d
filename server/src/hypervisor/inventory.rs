//! The picture of all domains in memory. Nothing here calls libvirt or waits for more than a short lock.
//!
//! ```text
//! reader (bulk reads, events) --.
//! verbs (what they changed)   --+--> Inventory --> find, rows, info, and those who wait for a change
//! ```
//! A reading takes the place of another only if it *began* later: a slow bulk read never hides what a verb has just seen.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    fs,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::watch;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, DomainRef},
    protocol::{DomainRow, DomainState, HostInfo, HypervisorInfo, Metadata},
};
use xman_policy::Lease;

use super::{Ailing, Facts, happenings::Looks, hostname, metadata};
use crate::clock::now_ms;

/// How long libvirt may owe an answer before its rows are marked.
pub(super) const SILENCE: Duration = Duration::from_secs(5);
/// After so many refreshes that did not come, rows are marked even if nothing is known to be wrong.
const MISSED_REFRESHES: u32 = 3;
/// Domains that have gone and whose last facts are remembered, for the events that tell of it.
const MAX_DEPARTED: usize = 20_000;

/// A domain as libvirt has just described it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Reading {
    pub(super) uuid: Uuid,
    pub(super) name: DomainName,
    pub(super) id: Option<u32>,
    pub(super) state: DomainState,
    pub(super) reason: &'static str,
    pub(super) memory_kib: u64,
    pub(super) max_memory_kib: u64,
    pub(super) vcpus: u32,
    pub(super) max_vcpus: u32,
    pub(super) cpu_time_ns: u64,
    pub(super) autostart: bool,
    pub(super) persistent: bool,
    /// Whether libvirt keeps an image of its memory.
    pub(super) saved: bool,
    /// Its owners, class and labels, or why they cannot be read.
    pub(super) metadata: Arc<Result<Metadata, String>>,
}

/// What those who wait for a guest look at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Glimpse {
    pub(super) state: DomainState,
    pub(super) id: Option<u32>,
    /// Reboots that libvirt has reported since the record was made.
    pub(super) reboots: u64,
    pub(super) memory_kib: u64,
}

/// The physical machine as one hypervisor sees it.
#[derive(Clone, Debug, Default)]
pub(super) struct Node {
    pub(super) cpu_model: String,
    pub(super) cpus: u32,
    pub(super) mhz: u32,
    pub(super) memory_kib: u64,
    pub(super) free_kib: u64,
}

/// Who answers on a connection.
#[derive(Clone, Debug, Default)]
pub(super) struct Software {
    pub(super) driver: String,
    pub(super) version: String,
    pub(super) libvirt: String,
}

pub(super) struct Inventory {
    uris: Vec<Arc<str>>,
    memory: Mutex<Memory>,
    changed: watch::Sender<u64>,
}

#[derive(Default)]
struct Memory {
    /// Ordered as `list` shows them.
    records: BTreeMap<Key, Record>,
    names: HashMap<(usize, Uuid), DomainName>,
    hosts: Vec<Host>,
    revisions: u64,
    departed: HashMap<(usize, Uuid), Facts>,
    /// In the order in which they went.
    departures: VecDeque<(usize, Uuid)>,
    /// The jobs that hold domains.
    jobs: HashMap<(usize, Uuid), Arc<Lease>>,
}

type Key = (DomainName, usize, Uuid);

struct Record {
    reading: Reading,
    lease: Option<Arc<Lease>>,
    /// Since when it is in its state, in milliseconds since 1970, where that was seen.
    since_ms: Option<u64>,
    /// When the reading began.
    began: Instant,
    revision: u64,
    reboots: u64,
}

/// One hypervisor.
#[derive(Default)]
struct Host {
    connected: bool,
    trouble: String,
    /// Since when libvirt owes the reader an answer.
    asked: Option<Instant>,
    /// When the last full reading began.
    read: Option<Instant>,
    /// How long after it the next one is due.
    period: Duration,
    node: Option<Node>,
    software: Software,
}

impl Host {
    fn is_stale(&self, now: Instant) -> bool {
        let silent = self
            .asked
            .is_some_and(|since| now.duration_since(since) > SILENCE);
        let late = self
            .read
            .is_none_or(|at| now.duration_since(at) > self.period * MISSED_REFRESHES);
        !self.connected || silent || late
    }

    fn trouble(&self, now: Instant) -> Option<String> {
        if !self.connected {
            return Some(if self.trouble.is_empty() {
                "not connected yet".to_owned()
            } else {
                self.trouble.clone()
            });
        }
        match self.asked.map(|since| now.duration_since(since)) {
            Some(waiting) if waiting > SILENCE => Some(format!(
                "libvirt has not answered for {} s",
                waiting.as_secs()
            )),
            _ if self.trouble.is_empty() => None,
            _ => Some(self.trouble.clone()),
        }
    }

    /// What is wrong, also where that is only that its domains were never read, or not for long.
    fn ails(&self, now: Instant) -> Option<String> {
        match (self.trouble(now), self.read) {
            (Some(why), _) => Some(why),
            (None, None) => Some("its domains are being read for the first time".to_owned()),
            (None, Some(_)) if !self.is_stale(now) => None,
            (None, Some(at)) => Some(format!(
                "its domains were last read {} s ago",
                now.duration_since(at).as_secs()
            )),
        }
    }
}

impl Inventory {
    pub(super) fn new(uris: &[String]) -> Self {
        let hosts = uris.iter().map(|_| Host::default()).collect();
        Self {
            uris: uris.iter().map(|uri| Arc::from(uri.as_str())).collect(),
            memory: Mutex::new(Memory {
                hosts,
                ..Memory::default()
            }),
            changed: watch::Sender::new(0),
        }
    }

    /// Finds a domain, on one hypervisor or the first that has it.
    pub(super) fn find(&self, domain: &DomainRef, hypervisor: Option<usize>) -> Option<Facts> {
        self.candidates(domain, hypervisor).into_iter().next()
    }

    /// Returns the domains of a name or UUID in the order of the hypervisors, one a hypervisor at most, of all or one.
    pub(super) fn candidates(&self, domain: &DomainRef, hypervisor: Option<usize>) -> Vec<Facts> {
        let memory = self.memory();
        let now = Instant::now();
        let here = |host: usize| hypervisor.is_none_or(|wanted| wanted == host);
        let mut found: Vec<(&Key, &Record)> = Vec::new();
        match domain {
            DomainRef::Uuid(uuid) => {
                let hosts = (0..memory.hosts.len()).filter(|host| here(*host));
                found.extend(hosts.filter_map(|host| memory.entry(host, *uuid)));
            }
            DomainRef::Name(name) => {
                let named =
                    (name.clone(), 0, Uuid::nil())..=(name.clone(), usize::MAX, Uuid::max());
                for (key, record) in memory.records.range(named).filter(|(key, _)| here(key.1)) {
                    // Two of one name on one hypervisor: the older record is a ghost that is about to go.
                    match found.last_mut() {
                        Some((other, older)) if other.1 == key.1 => {
                            if older.began < record.began {
                                (*other, *older) = (key, record);
                            }
                        }
                        _ => found.push((key, record)),
                    }
                }
            }
        }
        found
            .into_iter()
            .map(|(key, record)| memory.facts(key, record, self.shared_uri(key.1), now))
            .collect()
    }

    /// All domains, sorted by name.
    pub(super) fn rows(&self) -> Vec<(Facts, DomainRow)> {
        let memory = self.memory();
        let now = Instant::now();
        let stale: Vec<bool> = memory.hosts.iter().map(|host| host.is_stale(now)).collect();
        memory
            .records
            .iter()
            .map(|(key, record)| {
                let stale = stale.get(key.1).copied().unwrap_or(true);
                (
                    record.facts(key.1, self.shared_uri(key.1), stale),
                    record.row(self.uri(key.1), stale, now),
                )
            })
            .collect()
    }

    pub(super) fn row(&self, hypervisor: usize, uuid: Uuid) -> Option<DomainRow> {
        let memory = self.memory();
        let now = Instant::now();
        let stale = memory
            .hosts
            .get(hypervisor)
            .is_none_or(|host| host.is_stale(now));
        memory
            .entry(hypervisor, uuid)
            .map(|(_, record)| record.row(self.uri(hypervisor), stale, now))
    }

    pub(super) fn glimpse(&self, hypervisor: usize, uuid: Uuid) -> Option<Glimpse> {
        let memory = self.memory();
        memory.entry(hypervisor, uuid).map(|(_, record)| Glimpse {
            state: record.reading.state,
            id: record.reading.id,
            reboots: record.reboots,
            memory_kib: record.reading.memory_kib,
        })
    }

    /// The facts of a domain, or the last that were known of one that has gone.
    pub(super) fn last_known(&self, hypervisor: usize, uuid: Uuid) -> Option<Facts> {
        let memory = self.memory();
        match memory.entry(hypervisor, uuid) {
            Some((key, record)) => {
                Some(memory.facts(key, record, self.shared_uri(hypervisor), Instant::now()))
            }
            None => memory.departed.get(&(hypervisor, uuid)).cloned(),
        }
    }

    /// Whether what is known of a domain, or that it is not there, was read after a moment.
    pub(super) fn is_read_since(&self, hypervisor: usize, uuid: Uuid, moment: Instant) -> bool {
        let memory = self.memory();
        let whole = memory.hosts.get(hypervisor).and_then(|host| host.read);
        let alone = memory.entry(hypervisor, uuid);
        whole.is_some_and(|began| began >= moment)
            || alone.is_some_and(|(_, record)| record.began >= moment)
    }

    /// How the domains of a hypervisor look; nothing before they were read for the first time.
    pub(super) fn looks(&self, hypervisor: usize) -> Option<Looks> {
        let memory = self.memory();
        memory.hosts.get(hypervisor)?.read?;
        let here = memory.records.iter().filter(|(key, _)| key.1 == hypervisor);
        let look = |((name, _, uuid), record): (&Key, &Record)| {
            (*uuid, (name.clone(), record.reading.state))
        };
        Some(here.map(look).collect())
    }

    /// The most that an active domain's virtual CPUs were last known to be: it does not change while a domain runs.
    pub(super) fn max_vcpus(&self, hypervisor: usize, uuid: Uuid, id: Option<u32>) -> Option<u32> {
        let memory = self.memory();
        let (_, record) = memory.entry(hypervisor, uuid)?;
        (id.is_some() && record.reading.id == id).then_some(record.reading.max_vcpus)
    }

    /// The domains, so that each change wakes who waits for one.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    /// What `info` says, from memory and /proc; `stuck` is the number of stuck lanes.
    pub(super) fn info(&self, stuck: usize) -> HostInfo {
        let memory = self.memory();
        let now = Instant::now();
        let active = || {
            memory
                .records
                .values()
                .map(|record| &record.reading)
                .filter(|reading| reading.state.is_active())
        };
        let node = memory
            .hosts
            .iter()
            .find_map(|host| host.node.clone())
            .unwrap_or_default();
        let hypervisors = self
            .uris
            .iter()
            .zip(&memory.hosts)
            .map(|(uri, host)| HypervisorInfo {
                uri: uri.to_string(),
                driver: host.software.driver.clone(),
                version: host.software.version.clone(),
                libvirt: host.software.libvirt.clone(),
                trouble: host.trouble(now).unwrap_or_default(),
                age_ms: host
                    .read
                    .map_or(0, |at| milliseconds(now.duration_since(at))),
            });
        let mut info = HostInfo {
            hostname: String::new(),
            xmand: env!("CARGO_PKG_VERSION").to_owned(),
            hypervisors: hypervisors.collect(),
            cpu_model: node.cpu_model,
            cpus: node.cpus,
            mhz: node.mhz,
            memory_kib: node.memory_kib,
            free_memory_kib: node.free_kib,
            load: [0.0; 3],
            active: count(active().count()),
            domains: count(memory.records.len()),
            used_vcpus: active().fold(0, |sum, reading| sum.saturating_add(reading.vcpus)),
            used_memory_kib: active()
                .fold(0, |sum, reading| sum.saturating_add(reading.memory_kib)),
            stuck_lanes: count(stuck),
        };
        drop(memory);
        info.hostname = hostname();
        info.load = load(&fs::read_to_string("/proc/loadavg").unwrap_or_default());
        info
    }

    pub(super) fn trouble(&self, hypervisor: usize) -> Option<String> {
        self.memory().hosts.get(hypervisor)?.trouble(Instant::now())
    }

    /// The hypervisors, of all or one, with which something is wrong: what is known of their domains is old, or nothing is.
    pub(super) fn ailing(&self, hypervisor: Option<usize>) -> Vec<Ailing> {
        let memory = self.memory();
        let now = Instant::now();
        let asked = |index: &usize| hypervisor.is_none_or(|asked| asked == *index);
        let hosts = self.uris.iter().zip(&memory.hosts).enumerate();
        hosts
            .filter(|(index, _)| asked(index))
            .filter_map(|(_, (uri, host))| {
                Some(Ailing {
                    uri: Arc::clone(uri),
                    why: host.ails(now)?,
                    unread: host.read.is_none(),
                })
            })
            .collect()
    }

    /// The driver that answers, as libvirt calls it; empty before the first connection.
    pub(super) fn driver(&self, hypervisor: usize) -> String {
        self.memory()
            .hosts
            .get(hypervisor)
            .map(|host| host.software.driver.clone())
            .unwrap_or_default()
    }

    /// Takes in one domain and returns its facts as they are now.
    pub(super) fn put(&self, hypervisor: usize, reading: Reading, began: Instant) -> Facts {
        let mut memory = self.memory();
        let uuid = reading.uuid;
        let broken = memory.store(hypervisor, reading.clone(), began);
        let now = Instant::now();
        let facts = match memory.entry(hypervisor, uuid) {
            Some((key, record)) => memory.facts(key, record, self.shared_uri(hypervisor), now),
            // Cannot be, since it was stored; revision 0 is nobody's, so whoever goes by it asks again.
            None => {
                Record::new(reading, began).facts(hypervisor, self.shared_uri(hypervisor), true)
            }
        };
        drop(memory);
        broken.iter().for_each(warn);
        self.wake();
        facts
    }

    /// Takes the jobs that hold domains now, in the place of those that did.
    pub(super) fn hold_jobs(&self, jobs: HashMap<(usize, Uuid), Arc<Lease>>) {
        let mut memory = self.memory();
        if memory.jobs == jobs {
            return;
        }
        memory.jobs = jobs;
        let Memory {
            records,
            jobs,
            revisions,
            ..
        } = &mut *memory;
        for ((_, hypervisor, uuid), record) in records {
            let job = jobs.get(&(*hypervisor, *uuid)).cloned().or_else(|| {
                let metadata = record.reading.metadata.as_ref().as_ref();
                metadata.ok().and_then(metadata::lease).map(Arc::new)
            });
            if record.lease != job {
                record.lease = job;
                *revisions += 1;
                record.revision = *revisions;
            }
        }
        drop(memory);
        self.wake();
    }

    /// Gives a domain's facts a new revision.
    pub(super) fn touch(&self, hypervisor: usize, uuid: Uuid) {
        let mut memory = self.memory();
        memory.revisions += 1;
        let revision = memory.revisions;
        if let Some(record) = memory.entry_mut(hypervisor, uuid) {
            record.revision = revision;
        }
    }

    /// Takes out one domain that libvirt did not know any more.
    pub(super) fn gone(&self, hypervisor: usize, uuid: Uuid, began: Instant) {
        let uri = self.shared_uri(hypervisor);
        self.memory().forget(hypervisor, uuid, began, uri);
        self.wake();
    }

    /// A domain has been destroyed, and has not been read since.
    pub(super) fn destroyed(&self, hypervisor: usize, uuid: Uuid, began: Instant) {
        let known = self
            .memory()
            .entry(hypervisor, uuid)
            .map(|(_, record)| record.reading.clone());
        if let Some(reading) = known {
            self.put(
                hypervisor,
                Reading {
                    id: None,
                    state: DomainState::Off,
                    reason: "destroyed",
                    ..reading
                },
                began,
            );
        }
    }

    /// Takes in a reading of all domains; those not in it are gone, unless they were read since it began.
    pub(super) fn replace(
        &self,
        hypervisor: usize,
        readings: Vec<Reading>,
        began: Instant,
        period: Duration,
    ) {
        let mut memory = self.memory();
        let present: HashSet<Uuid> = readings.iter().map(|reading| reading.uuid).collect();
        let mut broken = Vec::new();
        for reading in readings {
            broken.extend(memory.store(hypervisor, reading, began));
        }
        let absent: Vec<Uuid> = memory
            .names
            .keys()
            .filter(|(host, uuid)| *host == hypervisor && !present.contains(uuid))
            .map(|(_, uuid)| *uuid)
            .collect();
        for uuid in absent {
            memory.forget(hypervisor, uuid, began, self.shared_uri(hypervisor));
        }
        if let Some(host) = memory.hosts.get_mut(hypervisor) {
            host.read = Some(began);
            host.period = period;
        }
        drop(memory);
        broken.iter().for_each(warn);
        self.wake();
    }

    /// A guest has rebooted.
    pub(super) fn rebooted(&self, hypervisor: usize, uuid: Uuid) {
        if let Some(record) = self.memory().entry_mut(hypervisor, uuid) {
            record.reboots += 1;
        }
        self.wake();
    }

    /// A guest's balloon has changed.
    pub(super) fn balloon(&self, hypervisor: usize, uuid: Uuid, kib: u64) {
        if let Some(record) = self.memory().entry_mut(hypervisor, uuid) {
            record.reading.memory_kib = kib;
        }
        self.wake();
    }

    /// libvirt now owes an answer.
    pub(super) fn asking(&self, hypervisor: usize) {
        self.host(hypervisor, |host| host.asked = Some(Instant::now()));
    }

    /// libvirt has answered.
    pub(super) fn answered(&self, hypervisor: usize) {
        self.host(hypervisor, |host| host.asked = None);
    }

    pub(super) fn connected(&self, hypervisor: usize, software: Software) {
        self.host(hypervisor, |host| {
            host.connected = true;
            host.trouble.clear();
            host.software = software;
        });
    }

    pub(super) fn lost(&self, hypervisor: usize, why: String) {
        self.host(hypervisor, |host| {
            host.connected = false;
            host.asked = None;
            host.trouble = why;
        });
        self.wake();
    }

    /// Connected, and yet something is wrong; nothing where `why` is empty.
    pub(super) fn troubled(&self, hypervisor: usize, why: String) {
        self.host(hypervisor, |host| host.trouble = why);
    }

    pub(super) fn node(&self, hypervisor: usize, node: Node) {
        self.host(hypervisor, |host| host.node = Some(node));
    }

    pub(super) fn uri(&self, hypervisor: usize) -> &str {
        self.uris
            .get(hypervisor)
            .map(AsRef::as_ref)
            .unwrap_or_default()
    }

    fn shared_uri(&self, hypervisor: usize) -> Arc<str> {
        self.uris
            .get(hypervisor)
            .map_or_else(|| Arc::from(""), Arc::clone)
    }

    fn host(&self, hypervisor: usize, change: impl FnOnce(&mut Host)) {
        if let Some(host) = self.memory().hosts.get_mut(hypervisor) {
            change(host);
        }
    }

    /// A panic under the lock leaves records that the next reading puts right.
    fn memory(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.changed
            .send_modify(|count| *count = count.wrapping_add(1));
    }
}

impl Memory {
    fn entry(&self, hypervisor: usize, uuid: Uuid) -> Option<(&Key, &Record)> {
        let name = self.names.get(&(hypervisor, uuid))?;
        self.records
            .get_key_value(&(name.clone(), hypervisor, uuid))
    }

    fn entry_mut(&mut self, hypervisor: usize, uuid: Uuid) -> Option<&mut Record> {
        let name = self.names.get(&(hypervisor, uuid))?;
        self.records.get_mut(&(name.clone(), hypervisor, uuid))
    }

    fn facts(&self, key: &Key, record: &Record, uri: Arc<str>, now: Instant) -> Facts {
        record.facts(
            key.1,
            uri,
            self.hosts.get(key.1).is_none_or(|host| host.is_stale(now)),
        )
    }

    /// Returns the domain whose metadata have become unreadable by this.
    fn store(&mut self, hypervisor: usize, reading: Reading, began: Instant) -> Option<Broken> {
        let (uuid, name) = (reading.uuid, reading.name.clone());
        let mut broken = reading.metadata.as_ref().as_ref().err().map(|why| Broken {
            name: name.clone(),
            why: why.clone(),
        });
        let old = self.names.get(&(hypervisor, uuid)).cloned();
        let mut record = Record::new(reading, began);
        if let Some(job) = self.jobs.get(&(hypervisor, uuid)) {
            record.lease = Some(Arc::clone(job));
        }
        let is_new = self
            .hosts
            .get(hypervisor)
            .is_some_and(|host| host.read.is_some());
        record.since_ms = is_new.then(now_ms);
        if let Some(old_name) = old {
            let old_key = (old_name, hypervisor, uuid);
            match self.records.remove(&old_key) {
                Some(newer) if newer.began > began => {
                    self.records.insert(old_key, newer);
                    return None;
                }
                Some(older) => {
                    record.reboots = older.reboots;
                    record.since_ms = if older.reading.state == record.reading.state {
                        older.since_ms
                    } else {
                        Some(now_ms())
                    };
                    if record.is_to_a_verdict_as(&older) {
                        record.revision = older.revision;
                    }
                    broken = broken.filter(|_| older.reading.metadata != record.reading.metadata);
                }
                None => {}
            }
        }
        if record.revision == 0 {
            self.revisions += 1;
            record.revision = self.revisions;
        }
        self.names.insert((hypervisor, uuid), name.clone());
        self.records.insert((name, hypervisor, uuid), record);
        broken
    }

    fn forget(&mut self, hypervisor: usize, uuid: Uuid, began: Instant, uri: Arc<str>) {
        let Some((key, record)) = self.entry(hypervisor, uuid) else {
            return;
        };
        if record.began <= began {
            let (key, facts) = (key.clone(), record.facts(hypervisor, uri, false));
            self.records.remove(&key);
            self.names.remove(&(hypervisor, uuid));
            self.remember((hypervisor, uuid), facts);
        }
    }

    fn remember(&mut self, domain: (usize, Uuid), facts: Facts) {
        if self.departed.insert(domain, facts).is_none() {
            self.departures.push_back(domain);
        }
        if self.departures.len() > MAX_DEPARTED
            && let Some(oldest) = self.departures.pop_front()
        {
            self.departed.remove(&oldest);
        }
    }
}

impl Record {
    fn new(reading: Reading, began: Instant) -> Self {
        let readable = reading.metadata.as_ref().as_ref().ok();
        Self {
            lease: readable.and_then(metadata::lease).map(Arc::new),
            reading,
            since_ms: None,
            began,
            revision: 0,
            reboots: 0,
        }
    }

    /// Whether a verdict that rested on the other still stands.
    fn is_to_a_verdict_as(&self, other: &Self) -> bool {
        self.reading.name == other.reading.name
            && self.lease == other.lease
            && self.reading.state == other.reading.state
            && self.reading.metadata == other.reading.metadata
    }

    fn facts(&self, hypervisor: usize, uri: Arc<str>, stale: bool) -> Facts {
        Facts {
            uuid: self.reading.uuid,
            name: self.reading.name.clone(),
            hypervisor,
            uri,
            state: self.reading.state,
            metadata: Arc::clone(&self.reading.metadata),
            lease: self.lease.clone(),
            revision: self.revision,
            stale,
        }
    }

    fn row(&self, uri: &str, stale: bool, now: Instant) -> DomainRow {
        let age_ms = milliseconds(now.saturating_duration_since(self.began));
        DomainRow {
            since_ms: self.since_ms,
            ..row(&self.reading, uri, age_ms, stale)
        }
    }
}

/// A domain whose metadata cannot be read, and why.
struct Broken {
    name: DomainName,
    why: String,
}

fn warn(broken: &Broken) {
    tracing::warn!("'{}': {}", broken.name, broken.why);
}

/// A reading as callers see it.
pub(super) fn row(reading: &Reading, uri: &str, age_ms: u64, stale: bool) -> DomainRow {
    DomainRow {
        name: reading.name.clone(),
        uuid: reading.uuid,
        hypervisor: uri.to_owned(),
        id: reading.id,
        state: reading.state,
        reason: reading.reason.to_owned(),
        memory_kib: reading.memory_kib,
        max_memory_kib: reading.max_memory_kib,
        vcpus: reading.vcpus,
        max_vcpus: reading.max_vcpus,
        cpu_time_ns: reading.cpu_time_ns,
        autostart: reading.autostart,
        persistent: reading.persistent,
        saved: reading.saved,
        since_ms: None,
        standing: None,
        preempted_ms: 0,
        metadata: reading.metadata.as_ref().clone().unwrap_or_default(),
        metadata_trouble: reading
            .metadata
            .as_ref()
            .as_ref()
            .err()
            .cloned()
            .unwrap_or_default(),
        age_ms,
        stale,
    }
}

fn milliseconds(span: Duration) -> u64 {
    u64::try_from(span.as_millis()).unwrap_or(u64::MAX)
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

fn load(text: &str) -> [f64; 3] {
    let mut figures = text
        .split_whitespace()
        .map(|figure| figure.parse().unwrap_or(0.0));
    std::array::from_fn(|_| figures.next().unwrap_or(0.0))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reading(name: &str, uuid: u128) -> Reading {
        Reading {
            uuid: Uuid::from_u128(uuid),
            name: name.parse().unwrap(),
            id: None,
            state: DomainState::Off,
            reason: "",
            memory_kib: 1024,
            max_memory_kib: 2048,
            vcpus: 1,
            max_vcpus: 2,
            cpu_time_ns: 0,
            autostart: false,
            persistent: true,
            saved: false,
            metadata: Arc::new(Ok(Metadata::default())),
        }
    }

    fn inventory() -> Inventory {
        Inventory::new(&["a:///".to_owned(), "b:///".to_owned()])
    }

    fn by_name(
        inventory: &Inventory,
        name: &str,
        hypervisor: Option<usize>,
    ) -> Option<(usize, u128)> {
        let facts = inventory.find(&DomainRef::Name(name.parse().unwrap()), hypervisor)?;
        Some((facts.hypervisor, facts.uuid.as_u128()))
    }

    #[test]
    fn a_bare_name_means_the_first_hypervisor_that_has_it() {
        let inventory = inventory();
        let now = Instant::now();
        inventory.put(1, reading("web", 1), now);
        assert_eq!(by_name(&inventory, "web", None), Some((1, 1)));
        inventory.put(0, reading("web", 2), now);
        assert_eq!(by_name(&inventory, "web", None), Some((0, 2)));
        assert_eq!(by_name(&inventory, "web", Some(1)), Some((1, 1)));
        assert_eq!(by_name(&inventory, "we", None), None);
        assert_eq!(by_name(&inventory, "webb", None), None);
        inventory.put(0, reading("web", 9), now + Duration::from_secs(1));
        assert_eq!(
            by_name(&inventory, "web", None),
            Some((0, 9)),
            "the newer of two that cannot both be"
        );
    }

    #[test]
    fn the_revision_changes_with_whatever_a_verdict_rests_on() {
        let inventory = inventory();
        let start = Instant::now();
        let owned = |owner: &str| Metadata {
            owners: [owner.parse().unwrap()].into(),
            labels: [("lease-user".parse().unwrap(), owner.parse().unwrap())].into(),
            ..Metadata::default()
        };
        let with = |metadata| Reading {
            metadata: Arc::new(metadata),
            ..reading("web", 1)
        };
        let steps = [
            (reading("web", 1), None),
            (with(Ok(owned("alice@EX.ORG"))), Some("alice@EX.ORG")),
            (with(Ok(owned("bob@EX.ORG"))), Some("bob@EX.ORG")),
            (with(Err("broken".to_owned())), None),
            (with(Err("broken otherwise".to_owned())), None),
            (
                Reading {
                    state: DomainState::Paused,
                    ..reading("web", 1)
                },
                None,
            ),
        ];
        let mut seen = HashSet::new();
        for (at, (reading, holder)) in (0..).zip(steps) {
            let began = start + Duration::from_secs(at);
            let facts = inventory.put(0, reading.clone(), began);
            assert!(seen.insert(facts.revision), "{facts:?}");
            let lease = facts.lease.as_ref().map(|lease| lease.user.as_str());
            assert_eq!(lease, holder);
            let again = inventory.put(0, reading, began + Duration::from_millis(1));
            assert_eq!(again, facts);
        }
    }

    #[test]
    fn broken_metadata_are_told_of_once_a_change() {
        let mut memory = Memory::default();
        let start = Instant::now();
        let mut store = |at, metadata: Result<Metadata, &str>| {
            let reading = Reading {
                metadata: Arc::new(metadata.map_err(str::to_owned)),
                ..reading("web", 1)
            };
            let told = memory.store(0, reading, start + Duration::from_secs(at));
            told.map(|broken| broken.why)
        };
        assert_eq!(store(0, Ok(Metadata::default())), None);
        assert_eq!(store(1, Err("a")).as_deref(), Some("a"));
        assert_eq!(store(2, Err("a")), None);
        assert_eq!(store(3, Err("b")).as_deref(), Some("b"));
        assert_eq!(store(1, Err("a")), None, "older than what is known");
        assert_eq!(store(4, Ok(Metadata::default())), None);
        assert_eq!(store(5, Err("b")).as_deref(), Some("b"));
    }

    #[test]
    fn the_revision_changes_with_the_name_and_is_never_used_twice() {
        let inventory = inventory();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let first = inventory.put(0, reading("web", 1), later(0)).revision;
        assert_eq!(
            inventory
                .put(
                    0,
                    Reading {
                        memory_kib: 5,
                        ..reading("web", 1)
                    },
                    later(1)
                )
                .revision,
            first
        );
        let renamed = inventory.put(0, reading("db", 1), later(2)).revision;
        assert_ne!(renamed, first);
        assert_eq!(by_name(&inventory, "web", None), None);
        inventory.gone(0, Uuid::from_u128(1), later(3));
        let again = inventory.put(0, reading("web", 1), later(4)).revision;
        assert!(again != first && again != renamed);
    }

    #[test]
    fn an_older_reading_never_hides_a_newer_one() {
        let inventory = inventory();
        let began = Instant::now();
        let later = began + Duration::from_secs(1);
        inventory.put(
            0,
            Reading {
                state: DomainState::Paused,
                ..reading("web", 1)
            },
            later,
        );
        inventory.replace(
            0,
            vec![reading("old-name", 1), reading("db", 2)],
            began,
            Duration::from_secs(10),
        );
        assert_eq!(
            inventory.glimpse(0, Uuid::from_u128(1)).unwrap().state,
            DomainState::Paused
        );
        assert_eq!(by_name(&inventory, "old-name", None), None);
        inventory.replace(0, vec![], began, Duration::from_secs(10));
        assert_eq!(
            by_name(&inventory, "web", None),
            Some((0, 1)),
            "read since that bulk read began"
        );
        assert_eq!(by_name(&inventory, "db", None), None);
        inventory.replace(0, vec![], later, Duration::from_secs(10));
        assert!(inventory.rows().is_empty());
    }

    #[test]
    fn what_was_known_of_a_domain_that_has_gone_is_remembered_for_its_events() {
        let inventory = inventory();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let uuid = Uuid::from_u128(1);
        assert_eq!(inventory.last_known(0, uuid), None);
        let facts = inventory.put(0, reading("web", 1), later(1));
        inventory.gone(0, uuid, later(2));
        let known = inventory.last_known(0, uuid).unwrap();
        assert_eq!((known.revision, known.name), (facts.revision, facts.name));
        assert_eq!(inventory.last_known(1, uuid), None);
        let again = inventory.put(0, reading("db", 1), later(3));
        assert_eq!(inventory.last_known(0, uuid), Some(again));
        let mut memory = inventory.memory();
        for number in 0..MAX_DEPARTED as u128 + 9 {
            memory.store(0, reading("x", number), later(4));
            memory.forget(0, Uuid::from_u128(number), later(5), "a:///".into());
        }
        assert_eq!(
            (memory.departed.len(), memory.departures.len()),
            (MAX_DEPARTED, MAX_DEPARTED)
        );
    }

    #[test]
    fn what_was_read_before_an_event_is_told_from_what_was_read_since() {
        let inventory = inventory();
        let start = Instant::now();
        let later = |seconds| start + Duration::from_secs(seconds);
        let uuid = Uuid::from_u128(1);
        assert!(!inventory.is_read_since(0, uuid, start));
        assert_eq!(inventory.looks(0), None);
        inventory.put(0, reading("web", 1), later(1));
        assert!(inventory.is_read_since(0, uuid, later(1)));
        assert!(!inventory.is_read_since(0, uuid, later(2)));
        inventory.replace(0, Vec::new(), later(3), Duration::from_secs(10));
        assert!(inventory.is_read_since(0, uuid, later(3)));
        assert_eq!(inventory.looks(0), Some(Looks::new()));
    }

    #[test]
    fn rows_are_sorted_and_those_of_a_silent_hypervisor_marked() {
        let inventory = inventory();
        let now = Instant::now();
        for host in [0, 1] {
            inventory.connected(host, Software::default());
        }
        inventory.replace(
            0,
            vec![reading("b", 1), reading("a", 2)],
            now,
            Duration::from_secs(10),
        );
        inventory.replace(1, vec![reading("aa", 3)], now, Duration::from_secs(10));
        inventory.lost(1, "gone".to_owned());
        let rows: Vec<_> = inventory
            .rows()
            .into_iter()
            .map(|(facts, row)| (row.name.to_string(), row.stale, facts.stale))
            .collect();
        let expected = [("a", false), ("aa", true), ("b", false)];
        assert_eq!(
            rows,
            expected.map(|(name, stale)| (name.to_owned(), stale, stale))
        );
        assert_eq!(inventory.trouble(1).as_deref(), Some("gone"));
        assert_eq!(inventory.trouble(0), None);
    }

    #[test]
    fn silence_and_missed_refreshes_make_facts_stale() {
        let now = Instant::now();
        let fresh = || Host {
            connected: true,
            read: Some(now),
            period: Duration::from_secs(10),
            ..Host::default()
        };
        let late = now + Duration::from_secs(31);
        assert!(!fresh().is_stale(now + Duration::from_secs(29)) && fresh().is_stale(late));
        let asked = Host {
            asked: Some(now),
            ..fresh()
        };
        assert!(
            !asked.is_stale(now + Duration::from_secs(4))
                && asked.is_stale(now + Duration::from_secs(6))
        );
        assert!(
            Host {
                connected: false,
                ..fresh()
            }
            .is_stale(now)
        );
        assert!(
            Host {
                read: None,
                ..fresh()
            }
            .is_stale(now)
        );
    }

    #[test]
    fn a_thousand_rows_cost_little() {
        let inventory = inventory();
        let readings = (0..1000)
            .map(|n| reading(&format!("grid-{n:04}"), n + 1))
            .collect();
        inventory.replace(0, readings, Instant::now(), Duration::from_secs(10));
        // Many times what it takes, on a machine where others compute as well.
        let took = (0..10).map(|_| {
            let begin = Instant::now();
            assert_eq!(inventory.rows().len(), 1000);
            begin.elapsed()
        });
        let best = took.min().unwrap();
        assert!(best < Duration::from_millis(250), "{best:?}");
    }

    #[test]
    fn load_averages_are_the_first_three_figures() {
        assert_eq!(load("0.51 1.25 2.00 1/123 4567\n"), [0.51, 1.25, 2.0]);
        assert_eq!(load(""), [0.0; 3]);
    }
}
