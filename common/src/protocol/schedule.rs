//! Making room for jobs: what its verbs take, and what comes back.

use std::{collections::BTreeMap, fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::name::{BadName, DomainName, DomainRef, JobId, LabelValue, Principal, Tag};

/// The most jobs that one `reconcile` can name: with ids of ordinary length they fit a sealed frame.
pub const MAX_RUNNING: usize = 4096;

/// What a batch system calls one run of one job. It is shown and typed as `SYSTEM/CLUSTER/JOB/RUN`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LeaseKey {
    /// The job,
    pub job: JobKey,
    /// and how often it was begun before: what tells a requeued job from itself.
    pub run: u32,
}

/// What a batch system calls a job.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct JobKey {
    /// The batch system, as xmand.toml names it.
    pub system: Tag,
    /// Its cluster, cell or server.
    pub cluster: Tag,
    /// The job's id there.
    pub id: JobId,
}

impl fmt::Display for JobKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}/{}", self.system, self.cluster, self.id)
    }
}

impl fmt::Display for LeaseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.job, self.run)
    }
}

impl FromStr for LeaseKey {
    type Err = BadLeaseKey;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let shape = || BadLeaseKey::Shape(text.to_owned());
        let mut parts = text.split('/');
        let mut part = || parts.next().ok_or_else(shape);
        let (system, cluster, id, run) = (part()?, part()?, part()?, part()?);
        if parts.next().is_some() {
            return Err(shape());
        }
        Ok(Self {
            job: JobKey {
                system: system.parse()?,
                cluster: cluster.parse()?,
                id: id.parse()?,
            },
            run: run.parse().map_err(|_| shape())?,
        })
    }
}

/// What is no lease's key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadLeaseKey {
    /// Not four parts, or no number at the end.
    #[error(
        "'{0}' is no lease; one is written SYSTEM/CLUSTER/JOB/RUN, as slurm/grid/4711/0; `rxm lease list` shows them"
    )]
    Shape(String),
    /// A part that cannot be one.
    #[error(transparent)]
    Name(#[from] BadName),
}

/// How deep a domain goes to make room. None of them turns into another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Depth {
    /// A trickle of CPU: the guest stays alive and answers.
    Starve,
    /// Starved, and its memory ballooned down to a floor.
    Shrink,
    /// Its virtual CPUs are stopped.
    Pause,
    /// Its memory is written to its image, and given back.
    Freeze,
}

impl Depth {
    /// All of them.
    pub const ALL: &'static [Depth] = &[Self::Starve, Self::Shrink, Self::Pause, Self::Freeze];

    /// Returns the depth as it is shown and typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Starve => "starve",
            Self::Shrink => "shrink",
            Self::Pause => "pause",
            Self::Freeze => "freeze",
        }
    }
}

impl fmt::Display for Depth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Arguments of `lease-begin`. The same key again gets the same lease, and is told how it stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseBegin {
    /// The job.
    pub key: LeaseKey,
    /// The domain that it needs.
    pub domain: DomainRef,
    /// Whose job it is; while it lasts, policies know it as the domain's `lease.user`.
    pub user: Option<Principal>,
    /// Whether the job may be preempted; as its domain's class says where absent. A job of a class that never gives way cannot offer it.
    pub preemptible: Option<bool>,
    /// The lease ends by itself after so many milliseconds; only with its `lease-end` where absent.
    pub ends_in_ms: Option<u64>,
    /// Only keep the room, for the time in `ends_in_ms`, until the same key begins in earnest: nobody is preempted meanwhile.
    pub reserve: bool,
    /// Whether to wait until the domain has its room, at most until the call's deadline.
    pub wait: bool,
}

/// Arguments of `lease-end`. A lease that is not there has ended well.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseEnd {
    /// The job: this run of it, and any before.
    pub key: LeaseKey,
    /// Only in this domain, where a job has several of a host; in all where absent.
    pub domain: Option<DomainRef>,
}

/// Arguments of `lease-list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseList {
    /// Only of this batch system.
    pub system: Option<Tag>,
    /// Only this one.
    pub key: Option<LeaseKey>,
}

/// Arguments of `preempt` and `freeze`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Preempt {
    /// The domain.
    pub domain: DomainRef,
    /// How deep; as its class says where absent. `freeze` takes none but that.
    pub depth: Option<Depth>,
    /// Of which job, where a batch system suspends one: it is then the job that holds the domain, and not who asks.
    pub lease: Option<LeaseKey>,
    /// Why, for those who find it preempted.
    pub reason: Option<LabelValue>,
    /// Whether to wait until it is done, at most until the call's deadline.
    pub wait: bool,
}

/// Arguments of `resume` and `thaw`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Resume {
    /// The domain.
    pub domain: DomainRef,
    /// Of which job, where a batch system resumes one.
    pub lease: Option<LeaseKey>,
    /// Also let go of what other people hold; never of what a job needs. It takes the right to `destroy` as well.
    pub force: bool,
    /// Whether to wait until it runs, at most until the call's deadline.
    pub wait: bool,
}

/// Arguments of `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Shell patterns or UUIDs, any of which must match; all domains of classes where empty.
    pub patterns: Vec<String>,
}

/// Arguments of `reconcile`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reconcile {
    /// The batch system.
    pub system: Tag,
    /// Its cluster.
    pub cluster: Tag,
    /// The jobs that it has, each with the number of its run.
    pub running: BTreeMap<JobId, u32>,
    /// How old the list is, in milliseconds: leases that were begun since then are left alone.
    pub age_ms: u64,
}

/// Arguments of `maintenance`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetMaintenance {
    /// Why the host takes no new leases and starts nothing; where absent, it does again.
    pub reason: Option<LabelValue>,
}

/// How a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum LeaseState {
    /// Its room is kept.
    Reserved,
    /// Others give way.
    Preparing,
    /// Its domain has what it needs.
    Active,
    /// Its domain has given way in turn.
    Preempted,
}

impl LeaseState {
    /// All of them.
    pub const ALL: &'static [LeaseState] = &[
        Self::Reserved,
        Self::Preparing,
        Self::Active,
        Self::Preempted,
    ];

    /// Returns the state as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Reserved => "reserved",
            Self::Preparing => "preparing",
            Self::Active => "active",
            Self::Preempted => "preempted",
        }
    }
}

impl fmt::Display for LeaseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// A job's hold on a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseRow {
    /// The job.
    pub key: LeaseKey,
    /// The domain's name when it began.
    pub domain: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// Whose job it is.
    pub user: Option<Principal>,
    /// Who said so.
    pub principal: Principal,
    /// How it stands.
    pub state: LeaseState,
    /// Whether it may be preempted.
    pub preemptible: bool,
    /// The domains that give way for it.
    pub victims: Vec<DomainName>,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// Milliseconds until it ends by itself.
    pub ends_in_ms: Option<u64>,
}

/// What came of a `lease-begin`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum LeaseAnswer {
    /// The lease is [`Active`](LeaseState::Active) or [`Reserved`](LeaseState::Reserved), and libvirt was seen to agree.
    Granted(LeaseRow),
    /// It is under way: the same call again tells more.
    Pending(LeaseRow),
    /// There is no lease, and nobody gave way.
    Refused {
        /// Why, in words.
        why: String,
        /// What to do about it.
        then: Then,
    },
}

/// What who was refused may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Then {
    /// Ask again later.
    Later,
    /// Ask another host: this one has not got that much, or does not want to.
    Elsewhere,
    /// Ask no more: this run has ended, or was never right.
    Never,
}

impl Then {
    /// Returns the advice as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Later => "later",
            Self::Elsewhere => "elsewhere",
            Self::Never => "never",
        }
    }
}

/// How a domain stands towards jobs; the names are Magrathea's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Standing {
    /// Off.
    Down,
    /// Started a short while ago.
    Booting,
    /// Could take a job.
    Free,
    /// Could take a job, and another's job would be preempted by that.
    OccupiedWouldPreempt,
    /// Its room is with another.
    Occupied,
    /// Has a job, which gives way to a better one.
    RunningPreemptible,
    /// Has a job, which does not give way.
    Running,
    /// Its room was taken away; it may have a job.
    Preempted,
    /// Its memory is on the disk.
    Frozen,
}

impl Standing {
    /// All of them.
    pub const ALL: &'static [Standing] = &[
        Self::Down,
        Self::Booting,
        Self::Free,
        Self::OccupiedWouldPreempt,
        Self::Occupied,
        Self::RunningPreemptible,
        Self::Running,
        Self::Preempted,
        Self::Frozen,
    ];

    /// Returns the standing as it is shown.
    pub fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Booting => "booting",
            Self::Free => "free",
            Self::OccupiedWouldPreempt => "occupied-would-preempt",
            Self::Occupied => "occupied",
            Self::RunningPreemptible => "running-preemptible",
            Self::Running => "running",
            Self::Preempted => "preempted",
            Self::Frozen => "frozen",
        }
    }
}

impl fmt::Display for Standing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// Who holds a domain back.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Holder {
    /// There is no room for it; the job that has it, where it is one.
    Room(Option<LeaseKey>),
    /// The batch system, which has suspended this job of the domain's own.
    Job(LeaseKey),
    /// Somebody who asked for it.
    Person(Principal),
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Room(Some(key)) => write!(f, "{key} (needs its room)"),
            Self::Room(None) => f.write_str("nobody (there is no room for it)"),
            Self::Job(key) => write!(f, "{key} (suspended by its batch system)"),
            Self::Person(principal) => principal.fmt(f),
        }
    }
}

/// One hold on a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HoldRow {
    /// Who.
    pub holder: Holder,
    /// How deep.
    pub depth: Depth,
    /// Why, in words; empty where nothing was said.
    pub reason: String,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

/// Of `status`: a domain, as far as jobs are concerned.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusRow {
    /// Its name.
    pub name: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// The hypervisor that has it, as libvirt URI.
    pub hypervisor: String,
    /// How it stands.
    pub standing: Standing,
    /// Since when, in milliseconds since 1970; nothing where it was so before xmand came to look.
    pub since_ms: Option<u64>,
    /// Its class; none where it takes no part.
    pub class: Option<Tag>,
    /// Virtual CPUs that jobs have here now.
    pub used_cpus: u32,
    /// Virtual CPUs that a job could have here now.
    pub available_cpus: u32,
    /// Milliseconds that it has spent preempted so far while it had a job.
    pub preempted_ms: u64,
    /// How deep it is now, as libvirt was seen to have it.
    pub depth: Option<Depth>,
    /// What is being done to it, or what keeps that from being done; empty where it is as it should be.
    pub doing: String,
    /// Who holds it back.
    pub holds: Vec<HoldRow>,
    /// Its leases.
    pub leases: Vec<LeaseKey>,
}

impl fmt::Display for StatusRow {
    /// Writes Magrathea's status of one line: `STATE[:USED:AVAILABLE];PREEMPTED-SECONDS;changed=SECONDS-SINCE-1970`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.standing)?;
        match self.standing {
            Standing::Down | Standing::Booting => {}
            Standing::Free
            | Standing::OccupiedWouldPreempt
            | Standing::Occupied
            | Standing::RunningPreemptible
            | Standing::Running
            | Standing::Preempted
            | Standing::Frozen => write!(f, ":{}:{}", self.used_cpus, self.available_cpus)?,
        }
        write!(f, ";{}", self.preempted_ms / 1000)?;
        match self.since_ms {
            Some(since) => write!(f, ";changed={}", since / 1000),
            None => Ok(()),
        }
    }
}

/// The answer to `status` and `maintenance`: the host's room.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Room {
    /// CPUs for jobs.
    pub cpus: u32,
    /// Of which so many are with jobs.
    pub used_cpus: u32,
    /// Memory for domains, in KiB.
    pub memory_kib: u64,
    /// Of which domains have so much.
    pub used_memory_kib: u64,
    /// Why nothing new begins here, where that is so.
    pub maintenance: Option<Maintenance>,
}

/// Why a host takes nothing new.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Maintenance {
    /// Why.
    pub reason: LabelValue,
    /// Who said so.
    pub principal: Principal,
    /// Since when, in milliseconds since 1970.
    pub since_ms: u64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lease_is_typed_as_it_is_shown() {
        for text in ["slurm/grid/4711/0", "pbs/main/12[3].pbs01/17"] {
            assert_eq!(text.parse::<LeaseKey>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "slurm/grid/4711",
            "slurm/grid/4711/0/0",
            "slurm/grid/4711/x",
            "slurm/grid/4711/-1",
            "slurm//4711/0",
            "Slurm/grid/4711/0",
            "slurm/grid/47 11/0",
            "slurm/grid/47\n11/0",
        ] {
            assert!(bad.parse::<LeaseKey>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_status_of_one_line_is_magratheas() {
        let row = |standing, since_ms| StatusRow {
            name: "a".parse().unwrap(),
            uuid: Uuid::nil(),
            hypervisor: String::new(),
            standing,
            since_ms,
            class: None,
            used_cpus: 2,
            available_cpus: 1,
            preempted_ms: 2_385_999,
            depth: None,
            doing: String::new(),
            holds: Vec::new(),
            leases: Vec::new(),
        };
        let line = row(Standing::RunningPreemptible, Some(1_206_436_366_123)).to_string();
        assert_eq!(line, "running-preemptible:2:1;2385;changed=1206436366");
        assert_eq!(row(Standing::Down, None).to_string(), "down;2385");
    }
}
