//! Which domains are between two hosts, and what waits for that.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use uuid::Uuid;
use xman_common::{
    name::HostName,
    protocol::{Code, Fault, Permit, Verb},
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

/// The connections to libvirt that are carried for other hosts, and those that have ended, until what came by them is settled.
#[derive(Debug)]
pub(crate) struct Carries {
    known: Mutex<HashMap<Permit, Carrying>>,
    /// Those of an earlier xmand ended with it.
    began: Instant,
}

#[derive(Debug)]
enum Carrying {
    On(CancellationToken),
    Ended(Instant),
}

/// One that is carried. Dropped, it has ended.
#[derive(Debug)]
pub(crate) struct Carried<'a> {
    carries: &'a Carries,
    permit: Permit,
    /// Cancelled once nobody needs it any more.
    pub(crate) given_up: CancellationToken,
}

impl Carries {
    pub(crate) fn new() -> Self {
        Self {
            known: Mutex::default(),
            began: Instant::now(),
        }
    }

    /// Notes that one is carried by a permit.
    pub(crate) fn begin(&self, permit: &Permit) -> Carried<'_> {
        let given_up = CancellationToken::new();
        self.known()
            .insert(permit.clone(), Carrying::On(given_up.clone()));
        Carried {
            carries: self,
            permit: permit.clone(),
            given_up,
        }
    }

    /// Returns for how long the one by this permit has ended; one that is still carried is given up, and `None` comes back.
    pub(crate) fn ended(&self, permit: &Permit) -> Option<Duration> {
        match self.known().get(permit) {
            Some(Carrying::On(given_up)) => {
                given_up.cancel();
                None
            }
            Some(Carrying::Ended(at)) => Some(at.elapsed()),
            None => Some(self.began.elapsed()),
        }
    }

    /// Forgets the one by this permit.
    pub(crate) fn forget(&self, permit: &Permit) {
        self.known().remove(permit);
    }

    fn known(&self) -> MutexGuard<'_, HashMap<Permit, Carrying>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Carried<'_> {
    fn drop(&mut self) {
        if let Some(known) = self.carries.known().get_mut(&self.permit) {
            *known = Carrying::Ended(Instant::now());
        }
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
            | Verb::LeaseBegin
            | Verb::Preempt
            | Verb::Freeze
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
    fn what_is_carried_is_given_up_by_who_asks_for_its_end() {
        let carries = Carries::new();
        let permit = Permit([7; 32]);
        assert!(
            carries.ended(&permit).is_some(),
            "an earlier xmand's has ended"
        );
        let carried = carries.begin(&permit);
        assert!(!carried.given_up.is_cancelled());
        assert_eq!(carries.ended(&permit), None);
        assert!(carried.given_up.is_cancelled());
        drop(carried);
        assert!(carries.ended(&permit).is_some());
        carries.forget(&permit);
        assert!(carries.known().is_empty());
    }

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
