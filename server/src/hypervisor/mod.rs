//! The only place that names libvirt: connections, lanes, the inventory and the verbs.
//!
//! ```text
//! find, rows, info <------ inventory (memory) <-- reader (one thread a hypervisor: events, bulk reads)
//!                                ^
//! verbs --> lane --> thread that may block --> libvirt, and the domain read again before the answer
//! ```
//! Laws: libvirt is never called on a task's thread; what verdicts and lists need comes from memory and never waits; a change that did
//! not begin by its deadline is `Busy` or `Unavailable` and never begins, one that did is `Unknown` and keeps its lane until libvirt
//! returns.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{task::spawn_blocking, time::timeout};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, DomainRef, LabelValue, Principal, Tag},
    protocol::{Code, DomainRow, DomainState, Fault, Happening, HostInfo, Metadata},
};
use xman_policy::Lease;

use book::{Event, Line};
use connections::Hypervisor;
use inventory::Inventory;

use crate::clock::now_ms;

pub(crate) use book::{Book, Entry, LENGTH as EVENTS_KEPT, Page};

pub(crate) use console::OpenConsole;
pub(crate) use depth::{Balloon, Clock, CpuShare, Life, Seen};
pub(crate) use devices::Eyes;
pub(crate) use sources::check as check_images;

pub(crate) use faults::cause;
pub(crate) use migrate::Route;

mod arrival;
mod bell;
mod book;
mod connections;
mod console;
mod depth;
mod devices;
mod faults;
mod ffi;
mod happenings;
mod inventory;
mod kept;
mod lanes;
mod making;
mod metadata;
mod migrate;
mod progress;
mod reader;
mod readings;
mod saved;
mod sense;
mod sources;
mod uris;
mod verbs;
mod xml;

/// How long `check` waits for libvirt.
const CHECK_LIMIT: Duration = Duration::from_secs(10);

/// What a verdict needs to know of a domain; from memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Facts {
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// Its name.
    pub(crate) name: DomainName,
    /// Which hypervisor has it: an index into the configured URIs.
    pub(crate) hypervisor: usize,
    /// That hypervisor's libvirt URI.
    pub(crate) uri: Arc<str>,
    /// Its state.
    pub(crate) state: DomainState,
    /// Its owners, class and labels, or why they cannot be read.
    pub(crate) metadata: Arc<Result<Metadata, String>>,
    /// The job that holds it.
    pub(crate) lease: Option<Arc<Lease>>,
    /// Changes whenever a fact that a verdict may rest on changes; never used twice.
    pub(crate) revision: u64,
    /// Whether libvirt has been silent for so long that the facts may be wrong.
    pub(crate) stale: bool,
}

/// A hypervisor with which something is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Ailing {
    /// Its libvirt URI.
    pub(crate) uri: Arc<str>,
    /// What is wrong.
    pub(crate) why: String,
    /// Whether its domains have never been read.
    pub(crate) unread: bool,
}

/// The domain that an XML describes, as far as a verdict needs it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NewDomain {
    /// Its name.
    pub(crate) name: DomainName,
    /// Its identity, where the XML gives one.
    pub(crate) uuid: Option<Uuid>,
    /// The memory that it begins with, in KiB.
    pub(crate) memory_kib: u64,
    /// The virtual CPUs that it begins with.
    pub(crate) vcpus: u32,
}

/// What is to become of a domain's metadata.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Change {
    /// Of its owners.
    Owners {
        /// Who owns it from now on, beside who does already.
        add: BTreeSet<Principal>,
        /// Who does not any more.
        remove: BTreeSet<Principal>,
    },
    /// Of its labels.
    Labels {
        /// Labels with their new values.
        set: BTreeMap<Tag, LabelValue>,
        /// Labels that go.
        remove: BTreeSet<Tag>,
    },
    /// Of its class; none where absent.
    Class(Option<Tag>),
}

/// Asked again in the lane when the facts are no longer those that were judged.
pub(crate) type Judge = Arc<dyn Fn(&Facts) -> Result<(), Fault> + Send + Sync>;
/// Asked in the host-wide lane, once for each existing domain of the new one's name or UUID, or once with `None`: then the answer is who
/// owns the new domain, if anybody does. An existing one keeps its owners.
pub(crate) type XmlJudge =
    Arc<dyn Fn(&NewDomain, Option<&Facts>) -> Result<Option<Principal>, Fault> + Send + Sync>;

/// The domain that a granted verb is for.
#[derive(Clone)]
pub(crate) struct Target {
    /// What was judged.
    pub(crate) facts: Facts,
    /// Who judges again.
    pub(crate) judge: Judge,
}

/// All configured hypervisors.
#[derive(Clone)]
pub(crate) struct Hypervisors {
    shared: Arc<Shared>,
}

struct Shared {
    inventory: Arc<Inventory>,
    hypervisors: Vec<Arc<Hypervisor>>,
    book: Arc<Book>,
    /// Where a session libvirt keeps its logs; read once, since no request may depend on the environment.
    cache: Option<PathBuf>,
    /// Disks that are on their way to a domain.
    claims: devices::Claims,
}

impl Hypervisors {
    /// Begins to connect to libvirt URIs, for ever, and returns at once.
    pub(crate) fn start(uris: Vec<String>) -> Self {
        reader::start_events();
        let inventory = Arc::new(Inventory::new(&uris));
        let hypervisors: Vec<_> = uris
            .into_iter()
            .enumerate()
            .map(|(index, uri)| Arc::new(Hypervisor::new(index, uri, Arc::clone(&inventory))))
            .collect();
        let book = Arc::new(Book::new());
        for hypervisor in &hypervisors {
            reader::start(hypervisor, &book);
        }
        let cache = std::env::home_dir().map(|home| home.join(".cache"));
        Self {
            shared: Arc::new(Shared {
                inventory,
                hypervisors,
                book,
                cache,
                claims: devices::Claims::default(),
            }),
        }
    }

    /// Opens a libvirt URI once and says who answers.
    ///
    /// # Errors
    /// What is wrong, and what to do.
    pub(crate) async fn check(uri: &str) -> Result<String, String> {
        reader::start_events();
        let asked = uri.to_owned();
        let opened = spawn_blocking(move || {
            let opened =
                connections::open(&asked).and_then(|connection| readings::software(&connection));
            opened.map_err(|error| format!("{asked}: {}", faults::unreachable(&error)))
        });
        match timeout(CHECK_LIMIT, opened).await {
            Ok(Ok(Ok(who))) => Ok(format!(
                "{uri}: {} {}, libvirt {}",
                who.driver, who.version, who.libvirt
            )),
            Ok(Ok(Err(why))) => Err(why),
            Ok(Err(defect)) => Err(format!("{uri}: {defect}")),
            Err(_) => Err(format!(
                "{uri}: libvirt has not answered for {} s; it hangs or is stopped, restart it",
                CHECK_LIMIT.as_secs()
            )),
        }
    }

    /// Finds a domain in memory, on one hypervisor or the first that has it: for questions to which it is all the same which.
    pub(crate) fn find(&self, domain: &DomainRef, hypervisor: Option<&str>) -> Option<Facts> {
        self.candidates(domain, hypervisor).into_iter().next()
    }

    /// Returns the domains in memory of a name or UUID: one a hypervisor at most, of all or the one that is named.
    pub(crate) fn candidates(&self, domain: &DomainRef, hypervisor: Option<&str>) -> Vec<Facts> {
        match hypervisor.map(|name| self.index(name)) {
            None => self.shared.inventory.candidates(domain, None),
            Some(Some(index)) => self.shared.inventory.candidates(domain, Some(index)),
            Some(None) => Vec::new(),
        }
    }

    /// All domains with what `list` shows, sorted by name, from memory.
    pub(crate) fn rows(&self) -> Vec<(Facts, DomainRow)> {
        self.shared.inventory.rows()
    }

    /// The record of what happened.
    pub(crate) fn book(&self) -> &Book {
        &self.shared.book
    }

    /// Takes the jobs that hold domains now, by the domains' UUIDs: verdicts go by them.
    pub(crate) fn hold_jobs(&self, jobs: Vec<(Uuid, String, Arc<Lease>)>) {
        let jobs = jobs
            .into_iter()
            .filter_map(|(uuid, hypervisor, job)| Some(((self.index(&hypervisor)?, uuid), job)));
        self.shared.inventory.hold_jobs(jobs.collect());
    }

    /// Writes into the record of what happened that a domain stands otherwise towards jobs.
    pub(crate) fn tell_standing(&self, facts: &Facts, detail: String) {
        let event = Event {
            at_ms: now_ms(),
            hypervisor: facts.hypervisor,
            uri: Arc::clone(&facts.uri),
            name: facts.name.clone(),
            formerly: None,
            uuid: facts.uuid,
            what: Happening::Standing,
            detail: detail.into(),
            state: facts.state,
        };
        self.shared.book.add([Line::Event(event, facts.clone())]);
    }

    /// Changes whenever anything in memory does.
    pub(crate) fn changes(&self) -> u64 {
        *self.shared.inventory.changes().borrow()
    }

    /// What was last known of a domain, also where it is not in memory any more.
    pub(crate) fn last_known(&self, uuid: Uuid, hypervisor: &str) -> Option<Facts> {
        let index = self.index(hypervisor)?;
        self.shared.inventory.last_known(index, uuid)
    }

    /// Lets verdicts on a domain be asked for again in its lane: something has changed that they may rest on.
    pub(crate) fn touch(&self, uuid: Uuid, hypervisor: &str) {
        if let Some(index) = self.index(hypervisor) {
            self.shared.inventory.touch(index, uuid);
        }
    }

    /// What is known now of a domain that `then` was known of, or `then` where it has gone.
    pub(crate) fn now(&self, then: Facts) -> Facts {
        let uuid = DomainRef::Uuid(then.uuid);
        let inventory = &self.shared.inventory;
        inventory.find(&uuid, Some(then.hypervisor)).unwrap_or(then)
    }

    /// Returns the URI of the hypervisor that is named, by its URI or by its driver.
    ///
    /// # Errors
    /// `NotFound` where it is none of this host's, `Conflict` where it is the driver of several.
    pub(crate) fn named(&self, hypervisor: &str) -> Result<&str, Fault> {
        self.place(hypervisor)
            .map(|index| self.shared.inventory.uri(index))
    }

    /// What `info` shows, from memory.
    pub(crate) fn info(&self) -> HostInfo {
        let stuck = self
            .shared
            .hypervisors
            .iter()
            .map(|hypervisor| hypervisor.lanes.stuck())
            .sum();
        self.shared.inventory.info(stuck)
    }

    /// What is wrong now with the hypervisors, all or the one that is named, of those with which something is. Domains are not spoken of.
    pub(crate) fn ailing(&self, hypervisor: Option<&str>) -> Vec<Ailing> {
        let index = hypervisor.and_then(|name| self.index(name));
        self.shared.inventory.ailing(index)
    }

    /// How many hypervisors are meant: all, or the one that is named.
    pub(crate) fn count(&self, hypervisor: Option<&str>) -> usize {
        hypervisor.map_or(self.shared.hypervisors.len(), |_| 1)
    }

    /// The file to which the hypervisor writes what happens to a domain, where there is one on this machine.
    pub(crate) fn log_file(&self, facts: &Facts) -> Option<PathBuf> {
        log_file(
            self.shared.inventory.uri(facts.hypervisor),
            &facts.name,
            self.shared.cache.as_deref(),
        )
    }

    fn index(&self, name: &str) -> Option<usize> {
        self.place(name).ok()
    }

    fn place(&self, name: &str) -> Result<usize, Fault> {
        let hypervisors = self.shared.hypervisors.iter();
        uris::named(hypervisors.map(|known| known.uri.as_str()), name)
    }

    fn by_index(&self, index: usize) -> Result<Arc<Hypervisor>, Fault> {
        let found = self.shared.hypervisors.get(index).cloned();
        found
            .ok_or_else(|| Fault::new(Code::Internal, "a domain of a hypervisor that is not there"))
    }

    /// Returns the hypervisor that takes what is new: the one that is named, or the first.
    fn chosen(&self, name: Option<&str>) -> Result<Arc<Hypervisor>, Fault> {
        let index = name.map_or(Ok(0), |name| self.place(name))?;
        let found = self.shared.hypervisors.get(index).cloned();
        found.ok_or_else(|| Fault::new(Code::Unsupported, "this host has no hypervisor configured"))
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        for hypervisor in &self.hypervisors {
            hypervisor.bell.stop();
        }
    }
}

/// Returns this machine's own name for itself; empty where the kernel does not say.
pub(crate) fn hostname() -> String {
    fs::read_to_string("/proc/sys/kernel/hostname")
        .unwrap_or_default()
        .trim()
        .to_owned()
}

fn log_file(uri: &str, name: &DomainName, cache: Option<&Path>) -> Option<PathBuf> {
    let (scheme, rest) = uri.split_once("://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    let folder = match (uris::driver(scheme), path.trim_end_matches('/')) {
        ("qemu", "/system") => PathBuf::from("/var/log/libvirt/qemu"),
        ("qemu", "/session") => cache?.join("libvirt/qemu/log"),
        ("qemu", "/embed") => {
            let root = query
                .split('&')
                .find_map(|pair| pair.strip_prefix("root="))?;
            PathBuf::from(percent_decoded(root)?).join("log/qemu")
        }
        ("lxc", "/system" | "") => PathBuf::from("/var/log/libvirt/lxc"),
        ("xen", "/system" | "") => PathBuf::from("/var/log/libvirt/libxl"),
        _ => return None,
    };
    Some(folder.join(format!("{name}.log")))
}

fn percent_decoded(text: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let digits = [rest.next()?, rest.next()?];
                u8::from_str_radix(std::str::from_utf8(&digits).ok()?, 16).ok()?
            }
            plain => plain,
        });
    }
    String::from_utf8(bytes).ok()
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod log_file_tests {
    use super::*;

    #[track_caller]
    fn check(uri: &str, expected: Option<&str>) {
        let found = log_file(
            uri,
            &"a b".parse().unwrap(),
            Some(Path::new("/root/.cache")),
        );
        assert_eq!(found.as_deref(), expected.map(Path::new), "{uri}");
    }

    #[test]
    fn each_driver_has_its_folder() {
        check("qemu:///system", Some("/var/log/libvirt/qemu/a b.log"));
        check(
            "qemu+unix:///system?socket=/x",
            Some("/var/log/libvirt/qemu/a b.log"),
        );
        check(
            "qemu:///session",
            Some("/root/.cache/libvirt/qemu/log/a b.log"),
        );
        check(
            "qemu:///embed?root=/tmp/x%20y",
            Some("/tmp/x y/log/qemu/a b.log"),
        );
        check("qemu:///embed", None);
        check("lxc:///system", Some("/var/log/libvirt/lxc/a b.log"));
        check("lxc:///", Some("/var/log/libvirt/lxc/a b.log"));
        check("xen:///system", Some("/var/log/libvirt/libxl/a b.log"));
        check("qemu+tls://other/system", None);
        check("test:///default", None);
    }
}
