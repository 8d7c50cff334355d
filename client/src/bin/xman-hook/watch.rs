//! `slurm watch`: Slurm has no hook for a job that is suspended, and does not know that a silent node is one that gave way. This service brings each side
//! what the other does.
//!
//! ```text
//! squeue: SUSPENDED, nothing else runs there    -> preempt, held by that job
//! squeue: no longer                             -> resume
//! xmand:  a domain paused or frozen by others   -> scontrol suspend its jobs (their time stands still)
//! xmand:  no longer                             -> scontrol resume those
//! squeue: RUNNING, and no lease of it           -> lease-begin; refused: scontrol requeue
//! squeue: all jobs of a host                    -> reconcile
//! sinfo:  silent, and its domain is not held    -> after down-after: scontrol update state=down
//! ```
//!
//! It remembers one thing, in files: which jobs it suspended in Slurm itself, and no administrator. All else is looked up anew each time, so a restart
//! changes nothing. What cannot be read, from either side, is not acted upon.

use std::{
    collections::{BTreeMap, BTreeSet},
    ops::ControlFlow,
    time::Duration,
};

use tokio::time::{Instant, MissedTickBehavior, interval};
use xman_client::{
    Address, Event, fleet,
    name::{DomainRef, JobId, Tag},
    protocol::{
        Depth, Holder, Item, LeaseKey, MAX_RUNNING, Reconcile, Reply, Request, Status, StatusRow,
    },
};

use crate::{
    act::{Actor, failed, forget_silence},
    begun::Written,
    config::{Config, Unmapped},
    folder::Folder,
    hook::Hook,
    intent::{Intent, Spot, lease_id, user},
    nodes::{NoPlace, Place},
    slurm::{self, Queued, SINFO, SQUEUE, State},
    slurm_command::{run, scontrol},
    verdict::{Class, Outcome},
};

/// Hosts asked at once.
const WIDTH: usize = 64;
/// How long one host's answer is waited for: one that is away does not keep the others.
const HOST_LIMIT: Duration = Duration::from_secs(15);
/// How long one preempt, resume or begin may take.
const STEP_LIMIT: Duration = Duration::from_secs(60);
/// The most jobs that are suspended on behalf of hosts.
const MAX_OURS: usize = 20_000;
/// A lease may be begun while the queue is being read: so much younger ones are left alone.
const MARGIN: Duration = Duration::from_secs(30);
/// How often a job must be seen without its lease before it is given one: its prolog may be under way.
const SEEN_WITHOUT: u32 = 2;

/// A job as leases and files know it.
type Run = (u32, u32);

/// A node that a job has.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Part {
    job: Run,
    state: State,
    user: String,
    spot: Spot,
}

/// One thing to do.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    /// A host is told that Slurm suspended a job.
    Preempt(Spot),
    /// A host is told that a job goes on, or is gone.
    Resume(Spot),
    /// Slurm is told that a job stands still.
    SuspendJob(Run),
    /// Slurm is told that it goes on.
    ResumeJob(Run),
    /// Somebody else made it go on, or it is gone: it is not ours any more.
    ForgetJob(Run),
    /// A job runs that has no lease.
    Begin(Spot, String),
}

/// What hosts say of their domains; only of hosts that answered.
type Views = BTreeMap<String, Vec<StatusRow>>;

fn row<'v>(views: &'v Views, place: &Place) -> Option<&'v StatusRow> {
    let rows = views.get(&place.host.to_string())?;
    rows.iter().find(|row| match &place.domain {
        DomainRef::Name(name) => row.name == *name,
        DomainRef::Uuid(uuid) => row.uuid == *uuid,
    })
}

/// Returns the jobs of this cluster that hold a domain, as Slurm's own suspension.
fn held_by_jobs<'r>(
    row: &'r StatusRow,
    system: &'r Tag,
    cluster: &'r Tag,
) -> impl Iterator<Item = &'r LeaseKey> {
    row.holds.iter().filter_map(move |hold| match &hold.holder {
        Holder::Job(key) if key.job.system == *system && key.job.cluster == *cluster => Some(key),
        Holder::Job(_) | Holder::Room(_) | Holder::Person(_) => None,
    })
}

/// Returns whether a guest does not answer that is so deep.
fn is_deep(depth: Depth) -> bool {
    match depth {
        Depth::Pause | Depth::Freeze => true,
        Depth::Starve | Depth::Shrink => false,
    }
}

/// Returns whether others than this cluster's suspended jobs keep a domain so deep that its guest does not answer.
fn is_silenced(row: &StatusRow, system: &Tag, cluster: &Tag) -> bool {
    row.holds.iter().any(|hold| {
        is_deep(hold.depth)
            && match &hold.holder {
                Holder::Job(key) => key.job.system != *system || key.job.cluster != *cluster,
                Holder::Room(_) | Holder::Person(_) => true,
            }
    })
}

/// Returns what is to be done so that both sides agree.
fn plan(
    parts: &[Part],
    views: &Views,
    ours: &BTreeSet<Run>,
    system: &Tag,
    cluster: &Tag,
    suspend_jobs: bool,
) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut by_place: BTreeMap<(String, String), Vec<&Part>> = BTreeMap::new();
    for part in parts {
        let place = &part.spot.place;
        by_place
            .entry((place.host.to_string(), place.domain.to_string()))
            .or_default()
            .push(part);
    }
    let mut silenced: BTreeSet<Run> = BTreeSet::new();
    // Of which not all is known to be back: what Slurm sends to a guest that does not run is lost.
    let mut away: BTreeSet<Run> = BTreeSet::new();
    for here in by_place.values() {
        let Some(place) = here.first().map(|part| &part.spot.place) else {
            continue;
        };
        let Some(row) = row(views, place) else {
            away.extend(here.iter().map(|part| part.job));
            continue;
        };
        let is_silent = is_silenced(row, system, cluster);
        if is_silent {
            silenced.extend(here.iter().map(|part| part.job));
        }
        if is_silent || row.depth.is_some_and(is_deep) {
            away.extend(here.iter().map(|part| part.job));
        }
        // One that is suspended on behalf of its domain alone is about to run.
        let runs_another = here
            .iter()
            .any(|part| part.state != State::Suspended || (ours.contains(&part.job) && !is_silent));
        let suspended = |part: &&&Part| {
            part.state == State::Suspended && !ours.contains(&part.job) && !runs_another
        };
        let holding: BTreeSet<_> = held_by_jobs(row, system, cluster).collect();
        for part in here.iter().filter(suspended) {
            if !holding.contains(&part.spot.key) {
                steps.push(Step::Preempt(part.spot.clone()));
            }
        }
        for key in holding {
            let still = here
                .iter()
                .filter(suspended)
                .any(|part| part.spot.key == *key);
            if !still {
                steps.push(Step::Resume(Spot {
                    key: key.clone(),
                    place: place.clone(),
                }));
            }
        }
        for part in here {
            if part.state == State::Running && !row.leases.contains(&part.spot.key) {
                steps.push(Step::Begin(part.spot.clone(), part.user.clone()));
            }
        }
    }
    // A hold of a job that is in the queue no more, on a domain that has no other.
    for (host, rows) in views {
        for row in rows {
            let is_known = |part: &Part| {
                part.spot.place.host.to_string() == *host
                    && (part.spot.place.domain == DomainRef::Name(row.name.clone())
                        || part.spot.place.domain == DomainRef::Uuid(row.uuid))
            };
            if parts.iter().any(is_known) {
                continue;
            }
            let Ok(address) = host.parse::<Address>() else {
                continue;
            };
            for key in held_by_jobs(row, system, cluster) {
                steps.push(Step::Resume(Spot {
                    key: key.clone(),
                    place: Place {
                        host: address.clone(),
                        domain: DomainRef::Uuid(row.uuid),
                    },
                }));
            }
        }
    }
    let states: BTreeMap<Run, State> = parts.iter().map(|part| (part.job, part.state)).collect();
    if suspend_jobs {
        for (job, state) in &states {
            if *state == State::Running && silenced.contains(job) {
                steps.push(Step::SuspendJob(*job));
            }
        }
    }
    for job in ours {
        match states.get(job) {
            Some(State::Suspended) if away.contains(job) => {}
            Some(State::Suspended) => steps.push(Step::ResumeJob(*job)),
            // It is being suspended anew, and stays ours.
            Some(State::Running) if suspend_jobs && silenced.contains(job) => {}
            Some(State::Running | State::Between | State::Pending) | None => {
                steps.push(Step::ForgetJob(*job));
            }
        }
    }
    steps
}

/// Returns the jobs of a host as `reconcile` takes them.
fn running(parts: &[Part], host: &Address) -> Result<BTreeMap<JobId, u32>, String> {
    let running: BTreeMap<_, _> = parts
        .iter()
        .filter(|part| part.spot.place.host == *host)
        .map(|part| (part.spot.key.job.id.clone(), part.spot.key.run))
        .collect();
    if running.len() > MAX_RUNNING {
        return Err(format!(
            "{host}: it has {} jobs; a list names at most {MAX_RUNNING}",
            running.len()
        ));
    }
    Ok(running)
}

/// Returns the parts of all jobs that have nodes of xman's.
fn parts(jobs: &[Queued], config: &Config, cluster: &Tag) -> Result<Vec<Part>, String> {
    let mut parts = Vec::new();
    for job in jobs {
        for node in &job.nodes {
            let place = match config.nodes.place(node.as_str()) {
                Ok(place) => place,
                Err(NoPlace::Unknown(_)) if config.unmapped == Unmapped::Ignore => continue,
                Err(error) => return Err(format!("job {}: {error}", job.id)),
            };
            let id = lease_id(&job.id.to_string()).map_err(|error| error.to_string())?;
            parts.push(Part {
                job: (job.id, job.run),
                state: job.state,
                user: job.user.clone(),
                spot: Spot {
                    key: LeaseKey {
                        job: xman_client::protocol::JobKey {
                            system: config.system.clone(),
                            cluster: cluster.clone(),
                            id,
                        },
                        run: job.run,
                    },
                    place,
                },
            });
        }
    }
    Ok(parts)
}

/// Which jobs this service suspended in Slurm.
struct Ours {
    folder: Folder,
}

impl Ours {
    fn open(config: &Config) -> Result<Self, String> {
        let folder = Folder::open(&config.queue_dir.join("suspended"), MAX_OURS)
            .map_err(|error| format!("queue-dir: {error}"))?;
        Ok(Self { folder })
    }

    fn all(&self) -> Result<BTreeSet<Run>, String> {
        let names = self.folder.names().map_err(|error| error.to_string())?;
        Ok(names
            .iter()
            .filter_map(|name| {
                let (job, run) = name.split_once('-')?;
                Some((job.parse().ok()?, run.parse().ok()?))
            })
            .collect())
    }

    fn name((job, run): Run) -> String {
        format!("{job}-{run}")
    }
}

/// What is remembered between two looks, and need not outlive the service.
#[derive(Default)]
struct Memory {
    /// How often a running job was seen without its lease.
    without: BTreeMap<String, u32>,
    /// Since when a node is silent whose domain nobody holds back.
    silent: BTreeMap<String, Instant>,
    /// What was last wrong, so that it is said once.
    trouble: String,
}

/// Watches until it is stopped.
pub(crate) async fn watch(actor: &Actor<'_>) -> Result<Outcome, String> {
    let config = actor.config;
    let cluster = config
        .cluster
        .clone()
        .ok_or("hook.toml names no cluster; `slurm watch` needs it: scontrol show config shows ClusterName")?;
    let ours = Ours::open(config)?;
    let mut memory = Memory::default();
    let mut ticks = interval(config.slurm.interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    actor.told.info(format!(
        "follows the cluster '{cluster}' every {} s",
        config.slurm.interval.as_secs_f32()
    ));
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = actor.interrupt.raised() => return Ok(Outcome::new(Class::Done, "stopped")),
        }
        forget_silence(&actor.kdc_is_silent);
        let trouble = match look(actor, &cluster, &ours, &mut memory).await {
            Ok(()) => String::new(),
            Err(error) => error,
        };
        if trouble != memory.trouble {
            if trouble.is_empty() {
                actor.told.info("all is read again");
            } else {
                actor
                    .told
                    .error(format!("{trouble}; nothing is done until that is over"));
            }
            memory.trouble = trouble;
        }
    }
}

async fn look(
    actor: &Actor<'_>,
    cluster: &Tag,
    ours: &Ours,
    memory: &mut Memory,
) -> Result<(), String> {
    let config = actor.config;
    let slurm = &config.slurm;
    let began = Instant::now();
    actor.deliver(None, HOST_LIMIT).await;
    let text = run(slurm, &slurm.squeue, &SQUEUE).await?;
    let mut jobs = slurm::queue(&text).map_err(|error| format!("squeue: {error}"))?;
    let written = Written::open(config)?;
    for job in jobs.iter_mut().filter(|job| job.state == State::Between) {
        job.run = written.run(job.id, job.run);
    }
    let parts = parts(&jobs, config, cluster)?;
    let hosts = hosts(config, &parts);
    let views = views(actor, &hosts).await;
    let known = ours.all()?;
    let steps = plan(
        &parts,
        &views,
        &known,
        &config.system,
        cluster,
        slurm.suspend_jobs,
    );
    memory.without.retain(|key, _| {
        steps
            .iter()
            .any(|step| matches!(step, Step::Begin(spot, _) if spot_name(spot) == *key))
    });
    for step in steps {
        if actor.interrupt.is_raised() {
            return Ok(());
        }
        if let Err(error) = take(actor, ours, memory, step).await {
            actor.told.warning(error);
        }
    }
    if slurm.reconcile {
        reconcile(actor, &parts, &hosts, cluster, began).await;
    }
    if slurm.down_after.is_some() {
        lost_nodes(actor, &views, memory).await?;
    }
    Ok(())
}

/// Returns the hosts of all nodes that are known by name or have jobs.
fn hosts(config: &Config, parts: &[Part]) -> Vec<Address> {
    let mut hosts: BTreeMap<String, Address> = BTreeMap::new();
    let named = config
        .nodes
        .names()
        .filter_map(|node| config.nodes.place(node).ok())
        .map(|place| place.host);
    for host in named.chain(parts.iter().map(|part| part.spot.place.host.clone())) {
        hosts.insert(host.to_string(), host);
    }
    hosts.into_values().collect()
}

async fn views(actor: &Actor<'_>, hosts: &[Address]) -> Views {
    let answers = fleet::all(hosts, WIDTH, |host| async move {
        let rows = status(actor, host, Vec::new(), HOST_LIMIT).await;
        (host.to_string(), rows)
    })
    .await;
    let mut views = Views::new();
    for (host, rows) in answers {
        match rows {
            Ok(rows) => {
                views.insert(host, rows);
            }
            Err(outcome) => actor.told.warning(outcome.sentence),
        }
    }
    views
}

/// Asks a host how its domains stand.
pub(crate) async fn status(
    actor: &Actor<'_>,
    host: &Address,
    patterns: Vec<String>,
    limit: Duration,
) -> Result<Vec<StatusRow>, Outcome> {
    let mut rows = Vec::new();
    let request = Request::Status(Status { patterns });
    let answer = actor
        .caller(host, limit, 2)
        .ask(&request, |event| {
            match event {
                Event::Again => rows.clear(),
                Event::Items(items) => rows.extend(items.into_iter().filter_map(status_row)),
                Event::Progress(_) | Event::Alive | Event::Expiring(_) => {}
            }
            ControlFlow::Continue(())
        })
        .await;
    match answer {
        Ok(_) => Ok(rows),
        Err(failure) => Err(failed(&failure, host)),
    }
}

fn status_row(item: Item) -> Option<StatusRow> {
    match item {
        Item::Status(row) => Some(row),
        Item::Domain(_)
        | Item::Text(_)
        | Item::Job(_)
        | Item::Trouble(_)
        | Item::Image(_)
        | Item::Bytes(_)
        | Item::Console(_)
        | Item::Event(_)
        | Item::Cursor(_)
        | Item::Gap(_)
        | Item::Lease(_) => None,
    }
}

async fn take(
    actor: &Actor<'_>,
    ours: &Ours,
    memory: &mut Memory,
    step: Step,
) -> Result<(), String> {
    let slurm = &actor.config.slurm;
    let told = |outcome: Outcome| match outcome.class {
        Class::Done => {
            actor.told.info(outcome.sentence);
            Ok(())
        }
        Class::Kept
        | Class::Later
        | Class::Elsewhere
        | Class::Never
        | Class::Silent
        | Class::Forbidden
        | Class::Broken
        | Class::Stopped => Err(outcome.sentence),
    };
    match step {
        Step::Preempt(spot) => {
            let intent = Intent::Preempt {
                spots: vec![spot],
                depth: None,
                reason: "Slurm suspended the job".parse().ok(),
            };
            told(
                actor
                    .carry_out(Hook::GenericPreempt, &intent, STEP_LIMIT)
                    .await,
            )
        }
        Step::Resume(spot) => {
            let intent = Intent::Resume { spots: vec![spot] };
            told(
                actor
                    .carry_out(Hook::GenericResume, &intent, STEP_LIMIT)
                    .await,
            )
        }
        Step::SuspendJob(job) => {
            // Written down first: a job that is suspended and nobody's would stay so.
            ours.folder
                .write(&Ours::name(job), "")
                .map_err(|error| error.to_string())?;
            actor.told.info(format!(
                "job {}: its domain gave way; it is suspended in Slurm",
                job.0
            ));
            scontrol(slurm, &["suspend", &job.0.to_string()]).await
        }
        Step::ResumeJob(job) => {
            scontrol(slurm, &["resume", &job.0.to_string()]).await?;
            actor.told.info(format!(
                "job {}: its domain is back; it goes on in Slurm",
                job.0
            ));
            forget(ours, job)
        }
        Step::ForgetJob(job) => forget(ours, job),
        Step::Begin(spot, user) => begin(actor, memory, spot, &user).await,
    }
}

fn forget(ours: &Ours, job: Run) -> Result<(), String> {
    ours.folder
        .remove(&Ours::name(job))
        .map_err(|error| error.to_string())
}

fn spot_name(spot: &Spot) -> String {
    format!("{} {} {}", spot.key, spot.place.host, spot.place.domain)
}

/// Gives a job its lease that runs without; where it is refused, the job goes back into the queue.
async fn begin(
    actor: &Actor<'_>,
    memory: &mut Memory,
    spot: Spot,
    name: &str,
) -> Result<(), String> {
    let key = spot_name(&spot);
    let seen = memory.without.entry(key.clone()).or_default();
    *seen += 1;
    if *seen < SEEN_WITHOUT {
        return Ok(());
    }
    let number = spot.key.job.id.to_string();
    let intent = Intent::Begin {
        spots: vec![spot],
        user: user(Some(name), actor.config).unwrap_or_default(),
        preemptible: None,
        ends_in_ms: None,
    };
    let outcome = actor
        .carry_out(Hook::SlurmProlog, &intent, STEP_LIMIT)
        .await;
    match outcome.class {
        Class::Done => {
            actor.told.warning(format!(
                "job {number} ran without a lease; now: {}",
                outcome.sentence
            ));
            Ok(())
        }
        Class::Later | Class::Elsewhere | Class::Never if actor.config.slurm.requeue => {
            actor.told.warning(format!(
                "job {number} runs without its room and is requeued: {}",
                outcome.sentence
            ));
            scontrol(&actor.config.slurm, &["requeue", &number]).await
        }
        Class::Later
        | Class::Elsewhere
        | Class::Never
        | Class::Kept
        | Class::Silent
        | Class::Forbidden
        | Class::Broken
        | Class::Stopped => Err(format!(
            "job {number} runs without a lease: {}",
            outcome.sentence
        )),
    }
}

async fn reconcile(
    actor: &Actor<'_>,
    parts: &[Part],
    hosts: &[Address],
    cluster: &Tag,
    began: Instant,
) {
    let answers = fleet::all(hosts, WIDTH, |host| async move {
        let running = running(parts, host)?;
        let age = began.elapsed() + MARGIN;
        let request = Request::Reconcile(Reconcile {
            system: actor.config.system.clone(),
            cluster: cluster.clone(),
            running,
            age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
        });
        let answer = actor
            .caller(host, HOST_LIMIT, 2)
            .ask(&request, |_| ControlFlow::Continue(()))
            .await;
        match answer {
            Ok(Reply::Ended(ended)) => Ok((host, ended)),
            Ok(_) => Err(format!("{host}: that was no answer to reconcile")),
            Err(failure) => Err(failed(&failure, host).sentence),
        }
    })
    .await;
    for answer in answers {
        match answer {
            Ok((host, ended)) => {
                for key in ended {
                    actor.told.warning(format!(
                        "{host}: {key} was of a job that is gone, and has ended"
                    ));
                }
            }
            Err(error) => actor.told.warning(error),
        }
    }
}

/// Sets nodes DOWN that are silent although their domain runs, since with SlurmdTimeout=0 Slurm does not.
async fn lost_nodes(actor: &Actor<'_>, views: &Views, memory: &mut Memory) -> Result<(), String> {
    let config = actor.config;
    let slurm = &config.slurm;
    let Some(after) = slurm.down_after else {
        return Ok(());
    };
    let text = run(slurm, &slurm.sinfo, &SINFO).await?;
    let silent = slurm::silent_nodes(&text).map_err(|error| format!("sinfo: {error}"))?;
    let lost: BTreeSet<_> = silent
        .into_iter()
        .filter(|node| {
            let place = config.nodes.place(node).ok();
            place.is_some_and(|place| row(views, &place).is_some_and(|row| row.holds.is_empty()))
        })
        .collect();
    memory.silent.retain(|node, _| lost.contains(node));
    for node in lost {
        let since = *memory
            .silent
            .entry(node.clone())
            .or_insert_with(Instant::now);
        if since.elapsed() < after {
            continue;
        }
        actor.told.error(format!(
            "{node} does not answer and nobody holds its domain back: it is set DOWN"
        ));
        let name = format!("nodename={node}");
        let words = [
            "update",
            &name,
            "state=down",
            "reason=xman-hook: not responding",
        ];
        scontrol(slurm, &words).await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use xman_client::protocol::{HoldRow, Standing};

    fn system() -> Tag {
        "slurm".parse().unwrap()
    }

    fn cluster() -> Tag {
        "grid".parse().unwrap()
    }

    fn key(job: u32) -> LeaseKey {
        format!("slurm/grid/{job}/0").parse().unwrap()
    }

    fn part(job: u32, state: State) -> Part {
        Part {
            job: (job, 0),
            state,
            user: "alice".to_owned(),
            spot: Spot {
                key: key(job),
                place: Place {
                    host: "h".parse().unwrap(),
                    domain: "a".parse().unwrap(),
                },
            },
        }
    }

    fn hold(holder: Holder, depth: Depth) -> HoldRow {
        HoldRow {
            holder,
            depth,
            reason: String::new(),
            since_ms: 0,
        }
    }

    fn views(holds: Vec<HoldRow>, leases: &[u32]) -> Views {
        let row = StatusRow {
            name: "a".parse().unwrap(),
            uuid: uuid::Uuid::nil(),
            hypervisor: String::new(),
            standing: Standing::Running,
            since_ms: None,
            class: None,
            used_cpus: 0,
            available_cpus: 0,
            preempted_ms: 0,
            depth: holds.iter().map(|hold| hold.depth).max(),
            doing: String::new(),
            holds,
            leases: leases.iter().map(|job| key(*job)).collect(),
        };
        Views::from([("h".to_owned(), vec![row])])
    }

    #[track_caller]
    fn check(parts: &[Part], views: &Views, ours: &[u32], expected: &[&str]) {
        let ours: BTreeSet<Run> = ours.iter().map(|job| (*job, 0)).collect();
        let steps = plan(parts, views, &ours, &system(), &cluster(), true);
        let found: Vec<_> = steps
            .iter()
            .map(|step| match step {
                Step::Preempt(spot) => format!("preempt {}", spot.key.job.id),
                Step::Resume(spot) => format!("resume {}", spot.key.job.id),
                Step::SuspendJob((job, _)) => format!("suspend-job {job}"),
                Step::ResumeJob((job, _)) => format!("resume-job {job}"),
                Step::ForgetJob((job, _)) => format!("forget-job {job}"),
                Step::Begin(spot, _) => format!("begin {}", spot.key.job.id),
            })
            .collect();
        assert_eq!(found, expected);
    }

    fn room() -> Holder {
        Holder::Room(Some("slurm/grid/99/0".parse().unwrap()))
    }

    #[test]
    fn what_slurm_suspends_gives_way_and_comes_back() {
        use State::{Running, Suspended};
        let none = views(vec![], &[1]);
        check(&[part(1, Running)], &none, &[], &[]);
        check(&[part(1, Suspended)], &none, &[], &["preempt 1"]);
        let held = views(vec![hold(Holder::Job(key(1)), Depth::Pause)], &[1]);
        check(&[part(1, Suspended)], &held, &[], &[]);
        check(&[part(1, Running)], &held, &[], &["resume 1"]);
        // It is gone, and nobody else is there.
        check(&[], &held, &[], &["resume 1"]);
    }

    #[test]
    fn a_domain_in_which_another_job_runs_does_not_give_way() {
        use State::{Running, Suspended};
        let both = [part(1, Suspended), part(2, Running)];
        check(&both, &views(vec![], &[1, 2]), &[], &[]);
        let held = views(vec![hold(Holder::Job(key(1)), Depth::Pause)], &[1, 2]);
        check(&both, &held, &[], &["resume 1"]);
    }

    #[test]
    fn a_job_whose_domain_gave_way_stands_still_in_slurm_until_it_is_back() {
        use State::{Running, Suspended};
        let frozen = views(vec![hold(room(), Depth::Freeze)], &[1]);
        check(&[part(1, Running)], &frozen, &[], &["suspend-job 1"]);
        // Ours is no suspension of Slurm's own.
        check(&[part(1, Suspended)], &frozen, &[1], &[]);
        let back = views(vec![], &[1]);
        check(&[part(1, Suspended)], &back, &[1], &["resume-job 1"]);
        check(&[part(1, Running)], &back, &[1], &["forget-job 1"]);
        check(&[], &back, &[1], &["forget-job 1"]);
        // The host is away: what it would say is not known.
        check(&[part(1, Suspended)], &Views::new(), &[1], &[]);
        // A starved guest answers.
        let starved = views(vec![hold(room(), Depth::Starve)], &[1]);
        check(&[part(1, Running)], &starved, &[], &[]);
    }

    #[test]
    fn a_job_goes_on_in_slurm_only_when_its_guest_was_seen_to_run() {
        let mut thawing = views(vec![], &[1]);
        for row in thawing.values_mut().flatten() {
            row.depth = Some(Depth::Freeze);
        }
        check(&[part(1, State::Suspended)], &thawing, &[1], &[]);
    }

    #[test]
    fn what_slurm_suspended_keeps_nobody_from_coming_back() {
        let both = [part(1, State::Suspended), part(2, State::Suspended)];
        let held = views(vec![hold(Holder::Job(key(2)), Depth::Pause)], &[1, 2]);
        check(&both, &held, &[1], &["resume 2"]);
        check(&both, &views(vec![], &[1, 2]), &[1], &["resume-job 1"]);
    }

    #[test]
    fn a_job_without_its_lease_is_given_one() {
        let without = views(vec![], &[]);
        check(&[part(1, State::Running)], &without, &[], &["begin 1"]);
        check(&[part(1, State::Between)], &without, &[], &[]);
        check(&[part(1, State::Running)], &Views::new(), &[], &[]);
    }

    #[test]
    fn a_hold_of_somebody_else_is_left_alone() {
        let alice = Holder::Person("alice@EX.ORG".parse().unwrap());
        let other: LeaseKey = "pbs/main/1/0".parse().unwrap();
        let held = views(
            vec![
                hold(alice, Depth::Starve),
                hold(Holder::Job(other), Depth::Starve),
            ],
            &[1],
        );
        check(&[part(1, State::Running)], &held, &[], &[]);
        check(&[], &held, &[], &[]);
    }

    fn states() -> impl Strategy<Value = State> {
        prop_oneof![
            Just(State::Running),
            Just(State::Suspended),
            Just(State::Between)
        ]
    }

    proptest! {
        /// Carries steps out in a model of both sides: after a few looks nothing is left to do.
        #[test]
        fn both_sides_come_to_agree(
            given in proptest::collection::vec((1u32..4, states()), 0..4),
            holds in proptest::collection::vec(1u32..4, 0..3),
            is_room in any::<bool>(),
            was_ours in proptest::collection::btree_set(1u32..4, 0..3),
        ) {
            let mut parts: Vec<Part> = Vec::new();
            for (job, state) in given {
                if parts.iter().all(|part| part.job.0 != job) {
                    parts.push(part(job, state));
                }
            }
            let mut ours: BTreeSet<Run> = was_ours.iter().map(|job| (*job, 0)).collect();
            let mut held: Vec<HoldRow> = Vec::new();
            for job in holds {
                held.push(hold(Holder::Job(key(job)), Depth::Pause));
            }
            if is_room {
                held.push(hold(room(), Depth::Freeze));
            }
            let mut leases: Vec<u32> = Vec::new();
            for round in 0.. {
                let seen = views(held.clone(), &leases);
                let steps = plan(&parts, &seen, &ours, &system(), &cluster(), true);
                if steps.is_empty() {
                    break;
                }
                prop_assert!(round < 6, "{steps:?}");
                for step in steps {
                    match step {
                        Step::Preempt(spot) => held.push(hold(Holder::Job(spot.key), Depth::Pause)),
                        Step::Resume(spot) => held.retain(|hold| hold.holder != Holder::Job(spot.key.clone())),
                        Step::SuspendJob(job) => {
                            ours.insert(job);
                            for part in parts.iter_mut().filter(|part| part.job == job) {
                                part.state = State::Suspended;
                            }
                        }
                        Step::ResumeJob(job) => {
                            ours.remove(&job);
                            for part in parts.iter_mut().filter(|part| part.job == job) {
                                part.state = State::Running;
                            }
                        }
                        Step::ForgetJob(job) => { ours.remove(&job); }
                        Step::Begin(spot, _) => {
                            let job = spot.key.job.id.as_str().split('@').next().unwrap().parse().unwrap();
                            leases.push(job);
                        }
                    }
                }
            }
        }
    }
}
