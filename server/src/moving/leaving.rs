//! The source's part: the journey, the look at where the guest is after it, and the word on that.

use std::{sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use uuid::Uuid;
use xman_common::protocol::{
    Carry, Code, DomainState, Fault, JobRow, JobState, Migrate, Permit, Progress, Settle,
    Settlement, Verb,
};

use super::{
    STEP,
    door::{self, PrivateDoor},
    no_peer,
};
use crate::{
    Host,
    clock::now_ms,
    hypervisor::{Route, Target, cause},
    jobs,
    journeys::Way,
    peer::Peer,
    store::{Departure, StoreError},
    work::Work,
};

/// The pause after a word that was not heard; it doubles up to `LONGEST_PAUSE`.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

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
        let peer = Peer::dial(&destination, port).await?;
        let departing = host.hypervisors.depart(target).await?;
        let facts = departing.facts();
        let departure = Departure {
            job: work.id,
            uuid: facts.uuid,
            name: facts.name.clone(),
            hypervisor: facts.uri.to_string(),
            destination,
            port,
            permit,
            ran: departing.ran(),
            word: None,
        };
        let door = PrivateDoor::open(&host.config.state_dir)?;
        if !host.leaving.begin(departure.uuid, way(&departure)) {
            return Err(open(&departure));
        }
        let written = host.store.put_departure(&departure).await;
        written.map_err(|error| {
            host.leaving.end(departure.uuid, departure.job);
            error.before()
        })?;
        let asked = Carry {
            permit: departure.permit.clone(),
            uuid: departure.uuid,
            name: departure.name.clone(),
        };
        let carrier = match peer.carry(asked).await {
            Ok(carrier) => carrier,
            Err(fault) => {
                // Whoever looks where it is takes its lane.
                drop(departing);
                return conclude(host, departure, Err(fault), &progress).await;
            }
        };
        let route = Route::Channel(door.path());
        let moved = {
            let moving = host.hypervisors.migrate(
                departing,
                route,
                bandwidth,
                downtime_ms,
                progress.clone(),
            );
            tokio::select! {
                moved = moving => moved,
                never = door.serve(carrier) => match never {},
            }
        };
        conclude(host, departure, moved, &progress).await
    };
    jobs::begin(work, Verb::Migrate, detail, moving).await
}

fn way(departure: &Departure) -> Way {
    Way {
        job: departure.job,
        destination: departure.destination.clone(),
        is_decided: departure.word.is_some(),
    }
}

fn open(departure: &Departure) -> Fault {
    Fault::new(
        Code::Busy,
        format!(
            "it is still open where '{}' runs after its last journey; ask again later",
            departure.name
        ),
    )
}

/// Takes up what an earlier xmand left: journeys of which the end is not known, and words that were not heard.
pub(super) async fn take_up(host: &Arc<Host>) -> Result<(), StoreError> {
    door::sweep(&host.config.state_dir);
    for departure in host.store.departures().await? {
        if departure.word != Some(Settlement::Drop) {
            host.leaving.begin(departure.uuid, way(&departure));
        }
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

/// What is still here of a domain that was on its way.
enum AtHome {
    /// The guest, and why it is.
    Guest(Fault),
    /// Its definition at most: libvirt may have ended before it could remove that.
    NoGuest,
}

/// Finds out where a domain is, writes that down, and lets the destination know. What comes back is said once the guest runs on one of both.
async fn conclude(
    host: &Arc<Host>,
    mut departure: Departure,
    moved: Result<(), Fault>,
    progress: &watch::Sender<Option<Progress>>,
) -> Result<(), Fault> {
    let at_home = match (departure.word, moved) {
        // Decided before xmand ended; where the domain is now says nothing any more.
        (Some(Settlement::Drop), Err(fault)) => AtHome::Guest(stays(&departure, &fault, None)),
        (Some(_), _) | (None, Ok(())) => AtHome::NoGuest,
        (None, Err(fault)) if fault.code == Code::Unknown => {
            match found(host, &departure)
                .await
                .filter(|state| state.is_active())
            {
                Some(state) => AtHome::Guest(stays(&departure, &fault, Some(state))),
                None => AtHome::NoGuest,
            }
        }
        (None, Err(fault)) => AtHome::Guest(fault),
    };
    let word = match (&at_home, departure.ran) {
        (AtHome::Guest(_), _) => Settlement::Drop,
        (AtHome::NoGuest, true) => Settlement::Run,
        (AtHome::NoGuest, false) => Settlement::Keep,
    };
    if departure.word.is_none() {
        departure.word = Some(word);
        write_down(host, &departure).await;
    }
    match at_home {
        AtHome::Guest(fault) => {
            host.leaving.end(departure.uuid, departure.job);
            // Nobody has to wait for that: what has arrived does not run.
            let host = Arc::clone(host);
            host.changes.clone().spawn(async move {
                // Who knows nothing of the permit has nothing that came by it.
                if let Err(fault) = tell(&host, &departure, word).await
                    && fault.code != Code::Denied
                {
                    let there = &departure.destination;
                    tracing::error!(
                        "what has arrived of '{}' at {there} is still there: {fault}",
                        departure.name
                    );
                }
                forget(&host, &departure).await;
            });
            // The permit is used up, so the same call again has none.
            Err(Fault {
                retry: false,
                ..fault
            })
        }
        AtHome::NoGuest => {
            let last = progress.borrow().clone();
            if let Some(last) = last {
                progress.send_replace(Some(Progress {
                    phase: format!("waiting until it runs on {}", departure.destination),
                    percent: 99,
                    ..last
                }));
            }
            host.leaving.decided(departure.uuid);
            let told = tell(host, &departure, word).await;
            if told.is_ok() {
                undefine(host, &departure).await;
            }
            forget(host, &departure).await;
            told.map_err(|fault| left(&departure, &fault))
        }
    }
}

fn stays(departure: &Departure, fault: &Fault, state: Option<DomainState>) -> Fault {
    let name = &departure.name;
    let still = match state {
        Some(DomainState::Paused) => format!("'{name}' is still here, paused"),
        Some(_) => format!("'{name}' still runs here"),
        None => format!("'{name}' has stayed here"),
    };
    Fault::new(
        Code::Refused,
        format!("the migration failed; {still}: {}", cause(fault)),
    )
}

fn left(departure: &Departure, fault: &Fault) -> Fault {
    let Departure {
        name, destination, ..
    } = departure;
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
}

/// Looks where a domain is until libvirt says so; one that stands still only because it was on its way goes on. Nothing where it is not here.
async fn found(host: &Host, departure: &Departure) -> Option<DomainState> {
    let (hypervisors, uri) = (&host.hypervisors, departure.hypervisor.as_str());
    let mut pause = FIRST_PAUSE;
    loop {
        let deadline = Instant::now() + STEP;
        let seen = hypervisors
            .come_to_rest(uri, departure.uuid, departure.ran, deadline)
            .await;
        match seen {
            Ok(state) => return state,
            Err(fault) => {
                tracing::warn!("it is not known yet where '{}' is: {fault}", departure.name);
                rest(&mut pause).await;
            }
        }
    }
}

/// A word is not said before it is written down: after a restart it must be the same.
async fn write_down(host: &Host, departure: &Departure) {
    let mut pause = FIRST_PAUSE;
    while let Err(error) = host.store.put_departure(departure).await {
        tracing::error!(%error, "where '{}' runs cannot be written down", departure.name);
        rest(&mut pause).await;
    }
}

/// Gives the destination a word until it is heard.
///
/// # Errors
/// What the destination says that no repeat changes; `Unknown` where somebody has claimed the domain meanwhile.
async fn tell(host: &Host, departure: &Departure, settlement: Settlement) -> Result<(), Fault> {
    let Departure {
        destination,
        port,
        permit,
        name,
        uuid,
        ..
    } = departure;
    let mut pause = FIRST_PAUSE;
    loop {
        if settlement != Settlement::Drop && host.leaving.destination(*uuid).is_none() {
            return Err(Fault::new(
                Code::Unknown,
                format!("nothing any more, for '{name}' was claimed here"),
            ));
        }
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
            told => return told,
        }
    }
}

/// Removes the definition of a domain that runs elsewhere.
async fn undefine(host: &Host, departure: &Departure) {
    let (uri, deadline) = (&departure.hypervisor, Instant::now() + STEP);
    let gone = host
        .hypervisors
        .undefine_departed(uri, departure.uuid, deadline);
    if let Err(fault) = gone.await {
        tracing::warn!(
            "'{}' runs on {} now, and its definition is still here: {fault}",
            departure.name,
            departure.destination
        );
    }
}

async fn forget(host: &Host, departure: &Departure) {
    let job = departure.job;
    if let Err(error) = host.store.drop_departure(job).await {
        tracing::error!(%error, %job, "a departure that is over could not be forgotten");
    }
    host.leaving.end(departure.uuid, job);
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
