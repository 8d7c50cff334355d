//! A guest's way to another host through the Kerberos channel between the two xmands, and the word on where it runs in the end.
//!
//! ```text
//! person -- migrate-in --> destination: a permit
//! person -- migrate -----> source -- carry --> destination --> its libvirt      a connection for the source's libvirt
//!
//!   the two libvirts move the guest; it arrives with its virtual CPUs stopped
//!
//!   source looks at its own libvirt:   gone    -- settle run  --> it runs there
//!                                      here    -- settle drop --> what arrived is removed; it runs on here
//! ```
//! Law: what has arrived runs only by the source's word, and the source says "run" only when its own libvirt has the guest no more. libvirt
//! alone lets both run when the connection breaks between the guest's start there and the word of it here. The word is written down in both
//! stores before anything moves, and given until it is heard, also after a restart: wherever it breaks, the guest runs on one host at most, and on
//! one in the end.
//!
//! A connection to libvirt is root on the machine that it reaches: hosts that exchange guests are root on each other.

use std::{
    convert::Infallible,
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::AsyncWriteExt,
    net::{UnixListener, UnixStream, unix::UCred},
    sync::watch,
    time::{Instant, sleep, timeout},
};
use uuid::Uuid;
use xman_common::{
    name::HostName,
    protocol::{
        Code, DomainState, Fault, Item, JobRow, JobState, Migrate, MigrateIn, Permit, Progress,
        Reply, Settle, Settlement, Verb,
    },
};
use xman_policy::{Grant, permit::Arrival};

use crate::{
    Host, ROOT,
    caller::{Outcome, Piece},
    clock::now_ms,
    hypervisor::{Route, Target, cause},
    jobs,
    peer::{self, Carrier, Peer},
    store::{Departure, StoreError},
    work::Work,
};

/// How long this host's libvirt may take to come for its connection.
const COME: Duration = Duration::from_secs(30);
/// How long one look at libvirt, or one change by the other host's word, may take.
const STEP: Duration = Duration::from_secs(20);
/// The pause after a word that was not heard; it doubles up to `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);
/// Where the private sockets are, below the state directory.
const FOLDER: &str = "carry";
/// The longest path of a socket, in bytes (unix(7)).
const MAX_SOCKET: usize = 107;

/// Gives a permit to bring a domain here.
pub(crate) fn permit(grant: &Grant, work: &Work, coming: MigrateIn) -> Outcome {
    let (host, caller) = (&work.host, &work.caller);
    let MigrateIn {
        uuid,
        name,
        source,
        memory_kib,
    } = coming;
    if !host.config.migration.peers.contains(&source) {
        return Err(Fault::new(
            Code::Refused,
            format!(
                "{source} is no migration peer of this host; its administrator lists peers in [migration] of xmand.toml"
            ),
        ));
    }
    let hypervisor = host.hypervisors.that_takes(work.hypervisor.as_deref())?;
    if let Some(there) = host.hypervisors.in_the_way(uuid, &name) {
        if !host.sees(caller, &there) {
            return Err(Fault::denied());
        }
        let what = if there.uuid == uuid {
            "this very domain"
        } else {
            "another domain of that name"
        };
        return Err(Fault::new(
            Code::Conflict,
            format!("the destination has {what} already, '{}'", there.name),
        ));
    }
    if let Some(free) = available_kib()
        && memory_kib > free
    {
        return Err(Fault::new(
            Code::Refused,
            format!(
                "'{name}' can have {} MiB of memory, and the destination has {} MiB left",
                memory_kib / 1024,
                free / 1024
            ),
        ));
    }
    let arrival = Arrival {
        uuid,
        name,
        source,
        hypervisor,
        person: caller.person.principal.clone(),
        rule: grant.rule().to_owned(),
    };
    match host.permits.give(arrival, std::time::Instant::now()) {
        Ok(permit) => Ok(Reply::Permitted(permit)),
        Err(many) => Err(Fault::new(Code::Busy, format!("{many}; ask again later"))),
    }
}

/// Carries libvirt's connection for the host that a domain comes from.
pub(crate) async fn carry(work: Work, permit: Permit) -> Outcome {
    let host = Arc::clone(&work.host);
    let Some((arrival, _)) = host.permits.find(&permit) else {
        return Err(Fault::denied());
    };
    let opened = open(&host, &permit, &arrival).await;
    let daemon = opened.inspect_err(|_| host.permits.unused(&permit))?;
    // The word that the connection stands.
    work.send(Piece::Items(vec![Item::Bytes(Vec::new())]))
        .await?;
    let (mut from_daemon, mut to_daemon) = daemon.into_split();
    let Work {
        mut input, outbox, ..
    } = work;
    let there = async {
        while let Some(bytes) = input.next().await {
            if to_daemon.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to_daemon.shutdown().await;
        std::future::pending().await
    };
    let back = async {
        while let Ok(bytes) = peer::read(&mut from_daemon).await {
            let piece = Piece::Items(vec![Item::Bytes(bytes.clone())]);
            if bytes.is_empty() || outbox.send(piece).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        () = back => {}
    }
    Ok(Reply::Done)
}

async fn open(host: &Host, permit: &Permit, arrival: &Arrival) -> Result<UnixStream, Fault> {
    if let Some(there) = host.hypervisors.in_the_way(arrival.uuid, &arrival.name) {
        return Err(Fault::new(
            Code::Conflict,
            format!("the destination has '{}' already", there.name),
        ));
    }
    let daemon = host.hypervisors.daemon(&arrival.hypervisor).await?;
    let written = host.store.put_arrival(permit, arrival).await;
    written.map_err(|error| error.before())?;
    Ok(daemon)
}

/// Does what the host that a domain came from says of it. Said again, it is done already.
pub(crate) async fn settle(work: &Work, settle: Settle) -> Outcome {
    let host = &work.host;
    let Settle { permit, settlement } = settle;
    let Some((arrival, is_settled)) = host.permits.find(&permit) else {
        return Err(Fault::denied());
    };
    if is_settled {
        return Ok(Reply::Done);
    }
    let (hypervisors, uri, uuid) = (&host.hypervisors, &arrival.hypervisor, arrival.uuid);
    let deadline = work.deadline.min(Instant::now() + STEP);
    match settlement {
        Settlement::Run => hypervisors.run_arrived(uri, uuid, deadline).await?,
        Settlement::Keep => {}
        Settlement::Drop => hypervisors.drop_arrived(uri, uuid, deadline).await?,
    }
    host.store
        .settle_arrival(&permit)
        .await
        .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
    host.permits.settled(&permit);
    Ok(Reply::Done)
}

/// Refuses to let a domain run that has arrived and of which its source has not yet said that it is gone there.
pub(crate) fn may_run(host: &Host, uuid: Uuid) -> Result<(), Fault> {
    match host.permits.arriving(uuid) {
        None => Ok(()),
        Some(Arrival { name, source, .. }) => Err(Fault::new(
            Code::Conflict,
            format!(
                "'{name}' comes from {source}, which has not said yet that it is gone there; it runs by itself once {source} does"
            ),
        )),
    }
}

/// Moves a domain to another host, as a job.
pub(crate) async fn leave(
    work: &Work,
    migrate: &Migrate,
    port: u16,
    permit: Permit,
) -> Result<JobRow, Fault> {
    let host = &work.host;
    let Migrate {
        destination,
        bandwidth,
        downtime_ms,
        ..
    } = migrate.clone();
    if !host.config.migration.peers.contains(&destination) {
        return Err(no_peer(&destination));
    }
    let detail = format!("to {destination}");
    let moving = |target: Target, progress: watch::Sender<Option<Progress>>| async move {
        let departure = Departure {
            job: work.id,
            uuid: target.facts.uuid,
            name: target.facts.name.clone(),
            hypervisor: target.facts.uri.to_string(),
            destination,
            port,
            permit,
            ran: target.facts.state != DomainState::Paused,
        };
        let peer = Peer::dial(&departure.destination, port).await?;
        let carrier = peer.carry(departure.permit.clone()).await?;
        let door = PrivateDoor::open(&host.config.state_dir)?;
        let written = host.store.put_departure(&departure).await;
        written.map_err(|error| error.before())?;
        let route = Route::Channel(door.path.clone());
        let moved = {
            let moving =
                host.hypervisors
                    .migrate(target, route, bandwidth, downtime_ms, progress.clone());
            tokio::select! {
                moved = moving => moved,
                never = door.serve(carrier) => match never {},
            }
        };
        conclude(host, departure, moved, &progress).await
    };
    jobs::begin(work, Verb::Migrate, detail, moving).await
}

/// What is said of a destination that the configuration does not name.
pub(crate) fn no_peer(destination: &HostName) -> Fault {
    Fault::new(
        Code::Refused,
        format!(
            "{destination} is no migration peer of this host; its administrator lists peers in [migration] of xmand.toml"
        ),
    )
}

/// Takes up what an earlier xmand left: words that were not heard, and permits that were carried.
pub(crate) async fn take_up(host: &Arc<Host>) -> Result<(), StoreError> {
    for (permit, arrival, is_settled) in host.store.arrivals().await? {
        host.permits.restore(permit, arrival, is_settled);
    }
    for departure in host.store.departures().await? {
        let host = Arc::clone(host);
        tokio::spawn(async move {
            let job = departure.job;
            let name = departure.name.clone();
            let (silent, _) = watch::channel(None);
            let open = Fault::new(Code::Unknown, "xmand ended in the middle");
            let outcome = conclude(&host, departure, Err(open), &silent).await;
            tracing::info!(
                "'{name}' was on its way when xmand last ended: {}",
                words(&outcome)
            );
            amend(&host, job, &outcome).await;
        });
    }
    Ok(())
}

/// Finds out where a domain is and lets the destination know. What comes back is said once the guest runs on one of both.
async fn conclude(
    host: &Arc<Host>,
    departure: Departure,
    moved: Result<(), Fault>,
    progress: &watch::Sender<Option<Progress>>,
) -> Result<(), Fault> {
    let failure = match moved {
        Ok(()) => None,
        Err(fault) if fault.code == Code::Unknown => match found(host, &departure).await {
            Some(state) => {
                let Departure { name, .. } = &departure;
                let still = if state == DomainState::Paused {
                    "is still here, paused"
                } else {
                    "still runs here"
                };
                Some(Fault::new(
                    Code::Refused,
                    format!("the migration failed; '{name}' {still}: {}", cause(&fault)),
                ))
            }
            None => None,
        },
        Err(fault) => Some(fault),
    };
    if let Some(fault) = failure {
        // Nobody has to wait for that: what has arrived does not run.
        let host = Arc::clone(host);
        host.changes.clone().spawn(async move {
            if let Err(fault) = tell(&host, &departure, Settlement::Drop).await {
                let there = &departure.destination;
                tracing::error!(
                    "what has arrived of '{}' at {there} is still there: {fault}",
                    departure.name
                );
            }
        });
        return Err(fault);
    }
    let last = progress.borrow().clone();
    if let Some(last) = last {
        progress.send_replace(Some(Progress {
            phase: format!("waiting until it runs on {}", departure.destination),
            percent: 99,
            ..last
        }));
    }
    let settlement = if departure.ran {
        Settlement::Run
    } else {
        Settlement::Keep
    };
    tell(host, &departure, settlement).await.map_err(|fault| {
        let Departure {
            name, destination, ..
        } = &departure;
        Fault {
            retry: false,
            ..Fault::new(
                Code::Unknown,
                format!(
                    "'{name}' has left this host, and {destination} says: {}; look there",
                    fault.message
                ),
            )
        }
    })
}

/// Looks where a domain is until libvirt says so; one that stands still only because it was on its way goes on. Nothing where it is not here.
async fn found(host: &Host, departure: &Departure) -> Option<DomainState> {
    let (hypervisors, uri) = (&host.hypervisors, departure.hypervisor.as_str());
    let mut pause = FIRST_PAUSE;
    loop {
        let deadline = Instant::now() + STEP;
        let seen = if departure.ran {
            hypervisors.go_on(uri, departure.uuid, deadline).await
        } else {
            hypervisors.whereabouts(uri, departure.uuid, deadline).await
        };
        match seen {
            Ok(state) => return state.filter(|state| state.is_active()),
            Err(fault) => {
                tracing::warn!("it is not known yet where '{}' is: {fault}", departure.name);
                rest(&mut pause).await;
            }
        }
    }
}

/// Gives the destination a word until it is heard.
///
/// # Errors
/// What the destination says that no repeat changes.
async fn tell(host: &Host, departure: &Departure, settlement: Settlement) -> Result<(), Fault> {
    let Departure {
        destination,
        port,
        permit,
        name,
        ..
    } = departure;
    let mut pause = FIRST_PAUSE;
    loop {
        let settle = Settle {
            permit: permit.clone(),
            settlement,
        };
        let told = match Peer::dial(destination, *port).await {
            Ok(peer) => peer.settle(settle).await,
            Err(fault) => Err(fault),
        };
        match told {
            Err(fault) if fault.retry => {
                tracing::warn!("{destination} has not heard yet where '{name}' is: {fault}");
                rest(&mut pause).await;
            }
            told => {
                if let Err(error) = host.store.drop_departure(departure.job).await {
                    tracing::error!(%error, "a departure that is over could not be forgotten");
                }
                return told;
            }
        }
    }
}

async fn rest(pause: &mut Duration) {
    sleep(*pause).await;
    *pause = (*pause * 2).min(LONGEST_PAUSE);
}

/// Says in a job that an earlier xmand began what came of it.
async fn amend(host: &Host, job: Uuid, outcome: &Result<(), Fault>) {
    let rows = host.store.jobs().await.unwrap_or_default();
    let Some(row) = rows.into_iter().find(|row| row.id == job) else {
        return;
    };
    let state = match outcome {
        Ok(()) => JobState::Done,
        Err(fault) if fault.code == Code::Unknown => JobState::Unknown,
        Err(_) => JobState::Failed,
    };
    let row = JobRow {
        state,
        result: words(outcome),
        ended_ms: Some(now_ms()),
        ..row
    };
    if let Err(error) = host.store.put_job(&row).await {
        tracing::error!(%error, %job, "a job's end could not be written down");
    }
}

fn words(outcome: &Result<(), Fault>) -> String {
    match outcome {
        Ok(()) => "done".to_owned(),
        Err(fault) => fault.message.clone(),
    }
}

/// A socket for this host's libvirt alone, and for one connection.
struct PrivateDoor {
    path: PathBuf,
    listener: UnixListener,
}

impl PrivateDoor {
    fn open(state_dir: &Path) -> Result<Self, Fault> {
        let failed = |error: io::Error| {
            Fault::new(
                Code::Unavailable,
                format!(
                    "nothing was begun: no socket for libvirt below the state directory: {error}"
                ),
            )
        };
        let folder = state_dir.join(FOLDER);
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(failed)?;
        let name = Uuid::new_v4().simple().to_string();
        let path = folder.join(name.get(..12).unwrap_or_default());
        if path.as_os_str().len() > MAX_SOCKET {
            return Err(Fault::new(
                Code::Unavailable,
                format!(
                    "nothing was begun: the path of a socket below the state directory has more than {MAX_SOCKET} bytes; choose a shorter `state-dir`"
                ),
            ));
        }
        let listener = UnixListener::bind(&path).map_err(failed)?;
        let door = Self { path, listener };
        fs::set_permissions(&door.path, fs::Permissions::from_mode(0o600)).map_err(failed)?;
        Ok(door)
    }

    /// Lets libvirt in, once, and carries what it says. Its end shows in libvirt, which then ends the migration.
    async fn serve(&self, carrier: Carrier) -> Infallible {
        match timeout(COME, self.accept()).await {
            Ok(Ok(stream)) => {
                let _ = fs::remove_file(&self.path);
                if let Err(fault) = carrier.run(stream).await {
                    tracing::warn!("a migration's connection has ended: {fault}");
                }
            }
            Ok(Err(error)) => tracing::warn!(%error, "libvirt could not come for its connection"),
            Err(_) => tracing::warn!("libvirt did not come for its connection"),
        }
        std::future::pending().await
    }

    async fn accept(&self) -> io::Result<UnixStream> {
        loop {
            let (stream, _) = self.listener.accept().await?;
            let who = stream.peer_cred()?;
            if is_ours(&who) {
                return Ok(stream);
            }
            tracing::warn!(
                uid = who.uid(),
                "somebody else came for libvirt's connection"
            );
        }
    }
}

impl Drop for PrivateDoor {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn is_ours(who: &UCred) -> bool {
    who.uid() == ROOT
}

/// Memory that new guests can have, in KiB; nothing where the kernel does not say.
fn available_kib() -> Option<u64> {
    available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_the_kernel_says() {
        let meminfo = "MemTotal:       24032444 kB\nMemFree:          531244 kB\nMemAvailable:   20130816 kB\n";
        assert_eq!(available(meminfo), Some(20_130_816));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }

    #[tokio::test]
    async fn the_socket_for_libvirt_is_nobody_elses_and_goes_with_its_migration() {
        let state = tempfile::tempdir().unwrap();
        let door = PrivateDoor::open(state.path()).unwrap();
        let path = door.path.clone();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        drop(door);
        assert!(!path.exists());
        let deep = state.path().join("x".repeat(MAX_SOCKET));
        let refused = PrivateDoor::open(&deep).err().unwrap();
        assert!(refused.message.contains("shorter"), "{refused}");
    }
}
