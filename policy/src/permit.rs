//! Permits: what a host gives to who may bring a domain there, and what the host that the domain comes from shows for it.
//!
//! ```text
//! give() --> given --carry()--> carried --settled()--> settled
//!              |                   |
//!              '-- a minute        '-- settle() as often as it takes, also after a restart
//! ```
//! A permit is good for one domain and one other host, whose key must be proven; the person who asked for it is named in every record.

use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, HostName, Principal},
    protocol::{Carry, Permit, SERVICE, Verb},
};

use crate::{Action, Grant, Reason, Scope, Verdict};

/// How long what has been settled is remembered, for those who say it again.
const MEMORY: Duration = Duration::from_secs(24 * 3600);
/// How long a permit may wait for its use.
const LIFE: Duration = Duration::from_secs(60);
/// Permits that are not settled: who asks for many fills nobody's memory,
const MAX_GIVEN: usize = 256;
/// and leaves room for others.
const MAX_A_PERSON: usize = 32;
/// Settled ones that are remembered: a busy day's.
const MAX_SETTLED: usize = 4096;

/// A domain that may come.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Arrival {
    /// Its identity.
    pub uuid: Uuid,
    /// Its name.
    pub name: DomainName,
    /// The host that it comes from.
    pub source: HostName,
    /// The hypervisor that takes it, as libvirt URI.
    pub hypervisor: String,
    /// Who asked for it.
    pub person: Principal,
    /// By which rule.
    pub rule: String,
}

/// The permits that a host has given.
#[derive(Debug, Default)]
pub struct Permits(Mutex<HashMap<Permit, Given>>);

#[derive(Debug)]
struct Given {
    arrival: Arrival,
    /// How long it may wait for its use, and once it is settled, how long it is remembered.
    until: Instant,
    stage: Stage,
}

/// How far a permit has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// It waits for its use.
    Given,
    /// Something may have arrived by it.
    Carried,
    /// What arrived has come to its end.
    Settled,
}

/// All permits that can be out at once are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{MAX_GIVEN} permits wait for their use or their end already")]
pub struct TooMany;

impl Permits {
    /// Gives a permit for what was granted.
    ///
    /// # Errors
    /// Where too many wait already.
    pub fn give(&self, arrival: Arrival, now: Instant) -> Result<Permit, TooMany> {
        let mut permits = self.permits();
        permits.retain(|_, given| given.stage == Stage::Carried || now < given.until);
        let open = || {
            permits
                .values()
                .filter(|given| given.stage != Stage::Settled)
        };
        let is_theirs =
            |given: &&Given| given.stage == Stage::Given && given.arrival.person == arrival.person;
        if open().count() >= MAX_GIVEN || open().filter(is_theirs).count() >= MAX_A_PERSON {
            return Err(TooMany);
        }
        let permit = random();
        let given = Given {
            arrival,
            until: now + LIFE,
            stage: Stage::Given,
        };
        permits.insert(permit.clone(), given);
        Ok(permit)
    }

    /// Brings back a permit that was carried, or settled, before a restart.
    pub fn restore(&self, permit: Permit, arrival: Arrival, is_settled: bool, now: Instant) {
        let stage = if is_settled {
            Stage::Settled
        } else {
            Stage::Carried
        };
        let given = Given {
            arrival,
            until: now + MEMORY,
            stage,
        };
        self.permits().insert(permit, given);
    }

    /// Answers whether another host may carry a domain by a permit, which is used up by that.
    pub fn carry(&self, carry: &Carry, realm: &str, peer: &Principal, now: Instant) -> Verdict {
        let Carry { permit, uuid, name } = carry;
        let mut permits = self.permits();
        let is_unsettled = permits.values().any(|other| other.is_arriving(*uuid));
        match permits.get_mut(permit) {
            Some(given) if !given.is_of(realm, peer) => deny("the permit is for another host"),
            Some(given) if (given.arrival.uuid, &given.arrival.name) != (*uuid, name) => {
                deny("the permit is for another domain")
            }
            Some(given) => match given.stage {
                Stage::Carried | Stage::Settled => deny("the permit was used before"),
                // Else the word on what arrived before would be taken for one on what arrives now.
                Stage::Given if is_unsettled => deny("what arrived before is not settled"),
                Stage::Given if now < given.until => {
                    given.stage = Stage::Carried;
                    given.allow(Verb::Carry)
                }
                Stage::Given => deny("the permit has expired"),
            },
            None => deny("there is no such permit"),
        }
    }

    /// Answers whether another host may settle by a permit.
    pub fn settle(&self, permit: &Permit, realm: &str, peer: &Principal) -> Verdict {
        match self.permits().get(permit) {
            Some(given) if !given.is_of(realm, peer) => deny("the permit is for another host"),
            Some(given) => given.allow(Verb::Settle),
            None => deny("there is no such permit"),
        }
    }

    /// Returns what a permit is for, and how far it has come.
    pub fn find(&self, permit: &Permit) -> Option<(Arrival, Stage)> {
        let permits = self.permits();
        let given = permits.get(permit)?;
        Some((given.arrival.clone(), given.stage))
    }

    /// Notes that what a permit was for has come to its end; who says so again is told the same.
    pub fn settled(&self, permit: &Permit, now: Instant) {
        let mut permits = self.permits();
        if let Some(given) = permits.get_mut(permit) {
            given.stage = Stage::Settled;
            given.until = now + MEMORY;
        }
        let settled = || {
            permits
                .iter()
                .filter(|(_, given)| given.stage == Stage::Settled)
        };
        if settled().count() > MAX_SETTLED {
            let oldest = settled().min_by_key(|(_, given)| given.until);
            if let Some(oldest) = oldest.map(|(permit, _)| permit.clone()) {
                permits.remove(&oldest);
            }
        }
    }

    /// Returns the arrival of a domain that was carried and not yet settled, with its permit.
    pub fn carried(&self, uuid: Uuid) -> Option<(Permit, Arrival)> {
        let permits = self.permits();
        let (permit, given) = permits.iter().find(|(_, given)| given.is_arriving(uuid))?;
        Some((permit.clone(), given.arrival.clone()))
    }

    /// Returns the arrival of a domain that was carried and not yet settled.
    pub fn arriving(&self, uuid: Uuid) -> Option<Arrival> {
        self.carried(uuid).map(|(_, arrival)| arrival)
    }

    fn permits(&self) -> MutexGuard<'_, HashMap<Permit, Given>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Given {
    fn is_arriving(&self, uuid: Uuid) -> bool {
        self.stage == Stage::Carried && self.arrival.uuid == uuid
    }

    fn is_of(&self, realm: &str, peer: &Principal) -> bool {
        is_host(peer, &self.arrival.source, realm)
    }

    fn allow(&self, verb: Verb) -> Verdict {
        let Arrival {
            name, person, rule, ..
        } = &self.arrival;
        Verdict::Allow(Grant {
            action: Action::Verb(verb),
            scope: Scope::Host,
            rule: format!("permit of {person} for {name} ({rule})"),
            administrator: false,
        })
    }
}

/// Returns whether a principal is the xmand of a host in a realm.
pub fn is_host(principal: &Principal, host: &HostName, realm: &str) -> bool {
    !realm.is_empty() && principal.as_str() == format!("{SERVICE}/{host}@{realm}")
}

fn deny(reason: &str) -> Verdict {
    Verdict::Deny(Reason(reason.to_owned()))
}

/// 244 bits that nobody can guess.
fn random() -> Permit {
    let mut bytes = [0; 32];
    let (first, second) = bytes.split_at_mut(16);
    first.copy_from_slice(Uuid::new_v4().as_bytes());
    second.copy_from_slice(Uuid::new_v4().as_bytes());
    Permit(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const REALM: &str = "EX.ORG";

    fn arrival() -> Arrival {
        Arrival {
            uuid: Uuid::from_u128(7),
            name: "web".parse().unwrap(),
            source: "alpha".parse().unwrap(),
            hypervisor: "qemu:///system".to_owned(),
            person: "alice@EX.ORG".parse().unwrap(),
            rule: "k5login:1".to_owned(),
        }
    }

    fn alpha() -> Principal {
        "xman/alpha@EX.ORG".parse().unwrap()
    }

    fn coming(permit: &Permit) -> Carry {
        Carry {
            permit: permit.clone(),
            uuid: Uuid::from_u128(7),
            name: "web".parse().unwrap(),
        }
    }

    #[track_caller]
    fn denied(verdict: Verdict) -> String {
        match verdict {
            Verdict::Deny(reason) => reason.to_string(),
            Verdict::Allow(grant) => panic!("{grant:?}"),
        }
    }

    #[track_caller]
    fn granted(verdict: Verdict) -> Grant {
        match verdict {
            Verdict::Allow(grant) => grant,
            Verdict::Deny(reason) => panic!("{reason}"),
        }
    }

    #[test]
    fn a_permit_is_good_for_one_host_once_and_soon() {
        let (permits, now) = (Permits::default(), Instant::now());
        let permit = permits.give(arrival(), now).unwrap();
        for stranger in [
            "xman/beta@EX.ORG",
            "xman/alpha@EVIL.ORG",
            "alpha@EX.ORG",
            "host/alpha@EX.ORG",
            "xman/alpha/x@EX.ORG",
        ] {
            let stranger = stranger.parse().unwrap();
            denied(permits.carry(&coming(&permit), REALM, &stranger, now));
            denied(permits.settle(&permit, REALM, &stranger));
        }
        denied(permits.carry(&coming(&permit), "", &alpha(), now));
        denied(permits.carry(&coming(&Permit([0; 32])), REALM, &alpha(), now));
        denied(permits.carry(&coming(&permit), REALM, &alpha(), now + LIFE));
        let grant = granted(permits.carry(&coming(&permit), REALM, &alpha(), now));
        assert_eq!(grant.action(), Action::Verb(Verb::Carry));
        assert_eq!(grant.rule(), "permit of alice@EX.ORG for web (k5login:1)");
        denied(permits.carry(&coming(&permit), REALM, &alpha(), now));
        assert_eq!(permits.arriving(Uuid::from_u128(7)), Some(arrival()));
    }

    #[test]
    fn a_permit_is_for_the_domain_that_really_comes() {
        let (permits, now) = (Permits::default(), Instant::now());
        let permit = permits.give(arrival(), now).unwrap();
        for other in [
            Carry {
                uuid: Uuid::from_u128(8),
                ..coming(&permit)
            },
            Carry {
                name: "victim".parse().unwrap(),
                ..coming(&permit)
            },
        ] {
            let why = denied(permits.carry(&other, REALM, &alpha(), now));
            assert!(why.contains("another domain"), "{why}");
        }
        drop(granted(permits.carry(
            &coming(&permit),
            REALM,
            &alpha(),
            now,
        )));
    }

    #[test]
    fn a_domain_does_not_come_twice_before_its_first_journey_is_settled() {
        let (permits, now) = (Permits::default(), Instant::now());
        let first = permits.give(arrival(), now).unwrap();
        let second = permits.give(arrival(), now).unwrap();
        drop(granted(permits.carry(
            &coming(&first),
            REALM,
            &alpha(),
            now,
        )));
        let why = denied(permits.carry(&coming(&second), REALM, &alpha(), now));
        assert!(why.contains("not settled"), "{why}");
        permits.settled(&first, now);
        drop(granted(permits.carry(
            &coming(&second),
            REALM,
            &alpha(),
            now,
        )));
    }

    #[test]
    fn what_was_carried_can_be_settled_again_and_again_also_after_a_restart() {
        let permits = Permits::default();
        let permit = Permit([7; 32]);
        let now = Instant::now();
        permits.restore(permit.clone(), arrival(), false, now);
        let grant = granted(permits.settle(&permit, REALM, &alpha()));
        assert_eq!(grant.action(), Action::Verb(Verb::Settle));
        permits.settled(&permit, now);
        assert_eq!(permits.arriving(Uuid::from_u128(7)), None);
        assert_eq!(permits.find(&permit), Some((arrival(), Stage::Settled)));
        drop(granted(permits.settle(&permit, REALM, &alpha())));
        denied(permits.carry(&coming(&permit), REALM, &alpha(), now));
        permits.give(arrival(), now + MEMORY).unwrap();
        assert_eq!(permits.find(&permit), None);
    }

    #[test]
    fn only_so_many_permits_wait_and_those_that_expired_make_room() {
        let (permits, now) = (Permits::default(), Instant::now());
        let of = |person: usize| Arrival {
            person: format!("user{person}@EX.ORG").parse().unwrap(),
            ..arrival()
        };
        for person in 0..MAX_GIVEN / MAX_A_PERSON {
            for _ in 0..MAX_A_PERSON {
                permits.give(of(person), now).unwrap();
            }
            assert_eq!(permits.give(of(person), now), Err(TooMany));
        }
        assert_eq!(permits.give(of(99), now), Err(TooMany));
        assert!(permits.give(of(99), now + LIFE).is_ok());
    }
}
