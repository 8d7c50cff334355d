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
    /// Whether it is decided what the host is to hear; until then libvirt may still be at work.
    pub(crate) is_decided: bool,
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

    /// Notes that it is decided where the domain is, and that the host has not heard it yet.
    pub(crate) fn decided(&self, uuid: Uuid) {
        if let Some(way) = self.ways().get_mut(&uuid) {
            way.is_decided = true;
        }
    }

    /// Lets go of a domain: whoever does so knows that it runs nowhere else.
    ///
    /// # Errors
    /// `Busy` while its journey is under way.
    pub(crate) fn claim(&self, uuid: Uuid) -> Result<(), Fault> {
        let mut ways = self.ways();
        if ways.get(&uuid).is_some_and(|way| !way.is_decided) {
            return Err(Fault::new(
                Code::Busy,
                "its journey is under way; `rxm job list` shows it, and `rxm job cancel` gives it up",
            ));
        }
        ways.remove(&uuid);
        Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_domain_makes_one_journey_at_a_time_and_nobody_claims_it_before_its_end() {
        let leaving = Leaving::default();
        let (domain, first, second) = (Uuid::from_u128(7), Uuid::from_u128(1), Uuid::from_u128(2));
        let way = |job| Way {
            job,
            destination: "beta".parse().unwrap(),
            is_decided: false,
        };
        assert!(leaving.begin(domain, way(first)));
        assert!(!leaving.begin(domain, way(second)));
        leaving.end(domain, second);
        assert_eq!(leaving.claim(domain).unwrap_err().code, Code::Busy);
        assert_eq!(leaving.destination(domain).unwrap().as_str(), "beta");
        leaving.decided(domain);
        leaving.claim(domain).unwrap();
        assert_eq!(leaving.destination(domain), None);
        assert!(leaving.begin(domain, way(second)));
        leaving.end(domain, second);
        leaving.claim(domain).unwrap();
    }
}
