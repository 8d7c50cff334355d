//! Which domains are between two hosts, and what waits for that.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use uuid::Uuid;
use xman_common::{
    name::HostName,
    protocol::{Code, Fault, Verb},
};
use xman_policy::permit::Arrival;

use crate::Host;

/// The domains of which it is open whether they run here or where they went.
#[derive(Debug, Default)]
pub(crate) struct Leaving(Mutex<HashMap<Uuid, Way>>);

/// Where a domain goes.
#[derive(Debug)]
pub(crate) struct Way {
    /// The job that moves it.
    pub(crate) job: Uuid,
    /// The host.
    pub(crate) destination: HostName,
}

impl Leaving {
    /// Returns where a domain is on its way to.
    pub(crate) fn destination(&self, uuid: Uuid) -> Option<HostName> {
        Some(self.ways().get(&uuid)?.destination.clone())
    }

    /// Returns whether nobody else moves the domain.
    pub(crate) fn begin(&self, uuid: Uuid, way: Way) -> bool {
        let mut ways = self.ways();
        let is_free = !ways.contains_key(&uuid);
        if is_free {
            ways.insert(uuid, way);
        }
        is_free
    }

    /// Notes that it is settled where the domain is that this job has moved.
    pub(crate) fn end(&self, uuid: Uuid, job: Uuid) {
        let mut ways = self.ways();
        if ways.get(&uuid).is_some_and(|way| way.job == job) {
            ways.remove(&uuid);
        }
    }

    /// Lets go of a domain: whoever does so knows that it runs nowhere else.
    pub(crate) fn claim(&self, uuid: Uuid) {
        self.ways().remove(&uuid);
    }

    fn ways(&self) -> MutexGuard<'_, HashMap<Uuid, Way>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Refuses what would let a domain run on two hosts: it has arrived, or has left, and its source has not said yet where it is.
pub(crate) fn may(host: &Host, verb: Verb, uuid: Uuid) -> Result<(), Fault> {
    let lets_run = matches!(
        verb,
        Verb::Create
            | Verb::Start
            | Verb::Unpause
            | Verb::Restore
            | Verb::RestoreFrom
            | Verb::Save
            | Verb::SaveTo
    );
    if !lets_run && verb != Verb::Migrate {
        return Ok(());
    }
    if let Some(Arrival { name, source, .. }) = host.permits.arriving(uuid) {
        return Err(Fault::new(
            Code::Conflict,
            format!(
                "'{name}' comes from {source}, which has not said yet that it is gone there; it runs by itself once {source} does. \
                 If {source} is lost for ever: `rxm unpause --force`"
            ),
        ));
    }
    // Its own journey asks this as well.
    match host.leaving.destination(uuid) {
        Some(destination) if lets_run => Err(Fault::new(
            Code::Conflict,
            format!(
                "it is on its way to {destination}, or has just been, and it is not settled yet where it runs; `rxm job list` shows its journey. \
                 If {destination} is lost for ever: `rxm unpause --force`"
            ),
        )),
        Some(_) | None => Ok(()),
    }
}
