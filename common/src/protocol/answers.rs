//! What comes back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::{Attached, Cursor, LeaseAnswer, LeaseKey, LeaseRow, Permit, Room, Standing, StatusRow};
use crate::name::{DomainName, LabelValue, Principal, Tag};

/// A call's answer when it succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// All was said in the items, or there is nothing to say.
    Done,
    /// To `whoami`.
    Whoami(Identity),
    /// To `info`.
    Info(HostInfo),
    /// To what changed a domain: how it is now.
    Domain(DomainRow),
    /// To what removed one.
    Gone {
        /// Its name.
        name: DomainName,
        /// Its identity.
        uuid: Uuid,
    },
    /// To `mem-set`: what was asked of the guest and what it has done so far.
    Memory {
        /// How the domain is now.
        domain: DomainRow,
        /// What was asked, in KiB.
        asked_kib: u64,
    },
    /// To what began or followed a job.
    Job(JobRow),
    /// To `explain` and `explain-other`.
    Explained(Explanation),
    /// To `migrate-in`.
    Permitted(Permit),
    /// To `attach`: how the domain is now, and what the new device is called.
    Attached {
        /// How the domain is now.
        domain: DomainRow,
        /// The disk's name in the guest, or the interface's address: also where the host chose it.
        device: Attached,
    },
    /// To `lease-begin`.
    Lease(LeaseAnswer),
    /// To `lease-end` and `reconcile`: the leases that there were and are no more.
    Ended(Vec<LeaseKey>),
    /// To what holds a domain back or lets it go.
    Standing(StatusRow),
    /// To `status` and `maintenance`.
    Room(Room),
}

/// A part of an answer that can be long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Item {
    /// Of `list`.
    Domain(DomainRow),
    /// Of `dmesg` and `describe`: a piece of text, not cut at lines.
    Text(String),
    /// Of `job-list`.
    Job(JobRow),
    /// Of `list`: a hypervisor whose domains are not known, or not known any more.
    Trouble(HypervisorTrouble),
    /// Of `images`.
    Image(ImageRow),
    /// Of `console` and `carry`: at most [`MAX_INPUT`] bytes.
    Bytes(Vec<u8>),
    /// Of `console`.
    Console(ConsoleNews),
    /// Of `events`.
    Event(EventRow),
    /// Of `events`: where it begins, first, and how far it is where what happens may not be heard.
    Cursor(Cursor),
    /// Of `events`: something is missing here.
    Gap(Gap),
    /// Of `lease-list`.
    Lease(LeaseRow),
    /// Of `status`.
    Status(StatusRow),
}

/// A hypervisor that is not well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorTrouble {
    /// The libvirt URI.
    pub hypervisor: String,
    /// What is wrong with it.
    pub why: String,
}

/// A named image of a domain's memory in the host's state directory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRow {
    /// Its name.
    pub image: Tag,
    /// The domain that was saved.
    pub domain: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// The hypervisor that it is for, as libvirt URI.
    pub hypervisor: String,
    /// How large it is.
    pub bytes: u64,
    /// When it was saved, in milliseconds since 1970.
    pub saved_ms: u64,
}

/// What who looks at a console is told beside what the guest writes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsoleNews {
    /// First: who types, and who else reads along.
    Attached {
        /// Who types; oneself, unless somebody was there before.
        keyboard: Principal,
        /// Whether that is this very call.
        is_mine: bool,
        /// Who else is there.
        others: Vec<Principal>,
    },
    /// Somebody came to read along.
    Joined(Principal),
    /// Somebody left.
    Left(Principal),
    /// Somebody has the keyboard now; `is_mine` where it is this very call.
    Keyboard {
        /// Who.
        principal: Principal,
        /// Whether that is this very call.
        is_mine: bool,
    },
    /// So many bytes of output were dropped, since they were not taken fast enough.
    Lost(u64),
}

/// Something that happened to a domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EventRow {
    /// What comes after it.
    pub cursor: Cursor,
    /// When, in milliseconds since 1970.
    pub at_ms: u64,
    /// The hypervisor, as libvirt URI.
    pub hypervisor: String,
    /// The domain.
    pub name: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// What.
    pub what: Happening,
    /// Why, in libvirt's words, or how it was before; empty where nothing is said.
    pub detail: String,
    /// The domain's state when xmand had looked; `Unknown` where there is none any more.
    pub state: DomainState,
}

/// A kind of event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Happening {
    /// It has a definition now, or another one.
    Defined,
    /// It has none any more.
    Undefined,
    /// It has got another name.
    Renamed,
    /// It runs.
    Started,
    /// Its virtual CPUs are stopped.
    Paused,
    /// They run on.
    Resumed,
    /// Its guest goes down.
    ShuttingDown,
    /// It is off.
    Stopped,
    /// Its guest sleeps.
    Sleeping,
    /// Its guest has crashed.
    Crashed,
    /// Its guest has rebooted.
    Rebooted,
    /// Its owners, class or labels have changed.
    Labelled,
    /// It was found like this, after libvirt had been silent or without a word from it.
    Found,
    /// It stands otherwise towards jobs: the detail says how, and for whom.
    Standing,
}

impl Happening {
    /// All of them.
    pub const ALL: &'static [Happening] = &[
        Self::Defined,
        Self::Undefined,
        Self::Renamed,
        Self::Started,
        Self::Paused,
        Self::Resumed,
        Self::ShuttingDown,
        Self::Stopped,
        Self::Sleeping,
        Self::Crashed,
        Self::Rebooted,
        Self::Labelled,
        Self::Found,
        Self::Standing,
    ];

    /// Returns the kind as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Defined => "defined",
            Self::Undefined => "undefined",
            Self::Renamed => "renamed",
            Self::Started => "started",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::ShuttingDown => "shutting-down",
            Self::Stopped => "stopped",
            Self::Sleeping => "sleeping",
            Self::Crashed => "crashed",
            Self::Rebooted => "rebooted",
            Self::Labelled => "labelled",
            Self::Found => "found",
            Self::Standing => "standing",
        }
    }
}

impl fmt::Display for Happening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Something that is missing among the events.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Gap {
    /// What comes after it.
    pub cursor: Cursor,
    /// When it was noticed, in milliseconds since 1970.
    pub at_ms: u64,
    /// The hypervisor that it concerns, as libvirt URI; empty where all.
    pub hypervisor: String,
    /// Why, and what to do.
    pub why: String,
}

/// libvirt's states of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DomainState {
    /// Nothing known.
    Unknown,
    /// Running.
    Running,
    /// Waiting for a resource (Xen).
    Blocked,
    /// Its virtual CPUs are stopped.
    Paused,
    /// Going down.
    ShuttingDown,
    /// Off.
    Off,
    /// Crashed.
    Crashed,
    /// Sleeping by its own power management.
    Sleeping,
}

impl DomainState {
    /// All of them.
    pub const ALL: &'static [DomainState] = &[
        Self::Unknown,
        Self::Running,
        Self::Blocked,
        Self::Paused,
        Self::ShuttingDown,
        Self::Off,
        Self::Crashed,
        Self::Sleeping,
    ];

    /// Returns the state as it is shown and typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting-down",
            Self::Off => "off",
            Self::Crashed => "crashed",
            Self::Sleeping => "sleeping",
        }
    }

    /// Returns whether a hypervisor holds the domain now.
    pub fn is_active(self) -> bool {
        match self {
            Self::Running | Self::Blocked | Self::Paused | Self::ShuttingDown | Self::Sleeping => {
                true
            }
            Self::Unknown | Self::Off | Self::Crashed => false,
        }
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What belongs to a domain and libvirt has no word for. It is kept in libvirt's own metadata of the domain, so it moves with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Whose it is.
    pub owners: BTreeSet<Principal>,
    /// What kind of work it is for.
    pub class: Option<Tag>,
    /// What else rules and people go by.
    pub labels: BTreeMap<Tag, LabelValue>,
}

impl Metadata {
    /// Returns the bytes of all its text, of which [`MAX_METADATA`] are allowed.
    pub fn size(&self) -> usize {
        let owners = self.owners.iter().map(|owner| owner.as_str().len());
        let class = self.class.iter().map(|class| class.as_str().len());
        let labels = self
            .labels
            .iter()
            .map(|(name, value)| name.as_str().len() + value.as_str().len());
        owners.chain(class).chain(labels).sum()
    }
}

/// What the inventory knows of a domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRow {
    /// Its name.
    pub name: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// The hypervisor that has it, as libvirt URI.
    pub hypervisor: String,
    /// The number of its running incarnation.
    pub id: Option<u32>,
    /// Its state.
    pub state: DomainState,
    /// Why it is in that state, in libvirt's words; empty where libvirt says nothing.
    pub reason: String,
    /// Memory it has now, in KiB.
    pub memory_kib: u64,
    /// Memory it can have, in KiB.
    pub max_memory_kib: u64,
    /// Virtual CPUs it has now.
    pub vcpus: u32,
    /// Virtual CPUs it can have.
    pub max_vcpus: u32,
    /// CPU time used since it was started, in nanoseconds.
    pub cpu_time_ns: u64,
    /// Whether it starts with the host.
    pub autostart: bool,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// Whether libvirt keeps an image of its memory, from which its next start goes on.
    pub saved: bool,
    /// Since when it is in this state, in milliseconds since 1970; nothing where it was so before xmand came to look.
    pub since_ms: Option<u64>,
    /// How it stands towards jobs, where it has a class that takes part.
    pub standing: Option<Standing>,
    /// Milliseconds that it has spent preempted so far while it had a job.
    pub preempted_ms: u64,
    /// Its owners, class and labels; nothing where `metadata_trouble` is set.
    pub metadata: Metadata,
    /// Why they cannot be read: then nobody but administrators may do anything with it.
    pub metadata_trouble: String,
    /// How old this knowledge is, in milliseconds.
    pub age_ms: u64,
    /// Whether libvirt has been silent for so long that it may be wrong.
    pub stale: bool,
}

/// The answer to `info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The host's own name for itself.
    pub hostname: String,
    /// xmand's version.
    pub xmand: String,
    /// One for each configured libvirt URI.
    pub hypervisors: Vec<HypervisorInfo>,
    /// The processors' model as libvirt calls it.
    pub cpu_model: String,
    /// Logical processors.
    pub cpus: u32,
    /// Their clock, in MHz; 0 where unknown.
    pub mhz: u32,
    /// Memory, in KiB.
    pub memory_kib: u64,
    /// Memory free, in KiB.
    pub free_memory_kib: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Active domains.
    pub active: u32,
    /// All domains.
    pub domains: u32,
    /// Virtual CPUs that active domains hold.
    pub used_vcpus: u32,
    /// Memory that active domains hold, in KiB.
    pub used_memory_kib: u64,
    /// Lanes whose work libvirt has not returned in time.
    pub stuck_lanes: u32,
}

/// One libvirt connection as `info` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorInfo {
    /// The libvirt URI.
    pub uri: String,
    /// The driver, as libvirt calls it (`QEMU`, `Xen`, `LXC`, `TEST`).
    pub driver: String,
    /// The hypervisor's version, `10.0.2`; empty where unknown.
    pub version: String,
    /// libvirt's version.
    pub libvirt: String,
    /// What is wrong with it now; empty where nothing is.
    pub trouble: String,
    /// How old the inventory's last full reading is, in milliseconds.
    pub age_ms: u64,
}

/// The answer to `whoami`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Who the host takes the caller for.
    pub principal: Principal,
    /// When the session ends, in seconds since 1970.
    pub until: u64,
    /// The verbs that the caller may use on the host, or on any domain.
    pub verbs: Vec<String>,
    /// The rule that lets the caller in; empty where none does.
    pub rule: String,
    /// The Unix groups of the caller's local account, where policies may go by them.
    pub groups: Vec<String>,
    /// Who acts for the principal, where somebody does.
    pub acting: Option<Principal>,
    /// The session's name in the audit.
    pub session: String,
}

/// The answer to `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Whose right it is about.
    pub principal: Principal,
    /// To do what.
    pub action: String,
    /// To which domain or for whom, as it was asked about; empty where to the host.
    pub domain: String,
    /// Whether the principal may.
    pub allowed: bool,
    /// The rule that allows it, or the reason why not, as the audit would show it.
    pub rule: String,
    /// What each backend says, in the order in which they are asked.
    pub steps: Vec<ExplainStep>,
}

/// What one backend says to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainStep {
    /// The backend, as the configuration has it.
    pub backend: String,
    /// `allow`, `deny`, `none`, or `not-asked` where an earlier one has decided.
    pub opinion: String,
    /// The rule or the reason.
    pub because: String,
    /// What would have to be true for it to allow this, one way a line.
    pub wants: Vec<String>,
}

/// How a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// Under way.
    Running,
    /// It did what it should.
    Done,
    /// It did not, and what was before still is.
    Failed,
    /// xmand or libvirt ended in the middle: look at the domain.
    Unknown,
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        })
    }
}

/// A piece of work that outlives its caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRow {
    /// The id of the call that began it.
    pub id: Uuid,
    /// Who began it.
    pub principal: Principal,
    /// What it does.
    pub verb: String,
    /// To which domain.
    pub domain: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// What else matters, as `to skirit81`.
    pub detail: String,
    /// How it stands.
    pub state: JobState,
    /// What came of it, in words; empty while it runs.
    pub result: String,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended, in milliseconds since 1970.
    pub ended_ms: Option<u64>,
    /// How far it is, while it runs.
    pub progress: Option<Progress>,
}

/// How far something is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, as `copying memory`.
    pub phase: String,
    /// Of a hundred.
    pub percent: u8,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do, as far as known: a busy guest makes more.
    pub remaining_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes a second; 0 where unknown.
    pub rate: u64,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Milliseconds it may still take, where that can be told.
    pub eta_ms: Option<u64>,
}
