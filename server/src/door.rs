//! The door: how many may be inside, and who has to go when strangers crowd it.

use std::{
    collections::{HashMap, VecDeque},
    net::IpAddr,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::sync::oneshot;
use xman_common::name::Principal;

use crate::config::Limits;

/// There is no room.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Crowded;

/// Counts who is inside. When strangers crowd the door the one who has been silent longest goes, not the newcomer: an honest
/// caller proves itself in milliseconds and so is never the oldest for long.
#[derive(Debug, Default)]
pub(crate) struct Door(Mutex<Inside>);

#[derive(Debug, Default)]
struct Inside {
    strangers: VecDeque<Stranger>,
    next: u64,
    sessions: usize,
    principals: HashMap<Principal, usize>,
}

#[derive(Debug)]
struct Stranger {
    number: u64,
    address: IpAddr,
    /// Dropped to send it away.
    _stay: oneshot::Sender<()>,
}

impl Door {
    /// Gives a stranger a place.
    pub(crate) fn enter(
        self: &Arc<Self>,
        address: IpAddr,
        limits: &Limits,
    ) -> Result<Entrance, Crowded> {
        let mut inside = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inside.sessions >= limits.max_sessions {
            return Err(Crowded);
        }
        let from_there = inside
            .strangers
            .iter()
            .filter(|s| s.address == address)
            .count();
        if from_there >= limits.max_unauthenticated_per_address {
            if let Some(oldest) = inside.strangers.iter().position(|s| s.address == address) {
                inside.strangers.remove(oldest);
            }
        } else if inside.strangers.len() >= limits.max_unauthenticated {
            inside.strangers.pop_front();
        }
        let (stay, leave) = oneshot::channel();
        let number = inside.next;
        inside.next += 1;
        inside.strangers.push_back(Stranger {
            number,
            address,
            _stay: stay,
        });
        Ok(Entrance {
            door: Arc::clone(self),
            number,
            leave,
        })
    }
}

/// One stranger's place.
#[derive(Debug)]
pub(crate) struct Entrance {
    door: Arc<Door>,
    number: u64,
    leave: oneshot::Receiver<()>,
}

impl Entrance {
    /// Returns when the place is wanted for somebody else.
    pub(crate) async fn wanted(&mut self) {
        let _ = (&mut self.leave).await;
    }

    /// Makes the stranger a session of `principal`.
    pub(crate) fn prove(self, principal: &Principal, limits: &Limits) -> Result<Seat, Crowded> {
        let mut inside = self.door.0.lock().unwrap_or_else(PoisonError::into_inner);
        let held = inside.principals.get(principal).copied().unwrap_or(0);
        if held >= limits.max_per_principal || inside.sessions >= limits.max_sessions {
            return Err(Crowded);
        }
        inside.principals.insert(principal.clone(), held + 1);
        inside.sessions += 1;
        drop(inside);
        Ok(Seat {
            door: Arc::clone(&self.door),
            principal: principal.clone(),
        })
    }
}

impl Drop for Entrance {
    fn drop(&mut self) {
        let mut inside = self.door.0.lock().unwrap_or_else(PoisonError::into_inner);
        inside.strangers.retain(|s| s.number != self.number);
    }
}

/// One session's place.
#[derive(Debug)]
pub(crate) struct Seat {
    door: Arc<Door>,
    principal: Principal,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut inside = self.door.0.lock().unwrap_or_else(PoisonError::into_inner);
        inside.sessions = inside.sessions.saturating_sub(1);
        match inside.principals.get_mut(&self.principal) {
            Some(held) if *held > 1 => *held -= 1,
            _ => {
                inside.principals.remove(&self.principal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    const HERE: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
    const THERE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));

    fn limits() -> Limits {
        Limits {
            max_unauthenticated: 3,
            max_unauthenticated_per_address: 2,
            max_per_principal: 2,
            max_sessions: 3,
            ..Limits::default()
        }
    }

    fn is_wanted(entrance: &mut Entrance) -> bool {
        matches!(
            entrance.leave.try_recv(),
            Err(oneshot::error::TryRecvError::Closed)
        )
    }

    #[test]
    fn the_oldest_stranger_of_a_crowding_address_goes_and_nobody_elses() {
        let door = Arc::new(Door::default());
        let mut other = door.enter(THERE, &limits()).unwrap();
        let mut first = door.enter(HERE, &limits()).unwrap();
        let mut second = door.enter(HERE, &limits()).unwrap();
        let mut third = door.enter(HERE, &limits()).unwrap();
        assert!(is_wanted(&mut first));
        assert!(!is_wanted(&mut other) && !is_wanted(&mut second) && !is_wanted(&mut third));
    }

    #[test]
    fn a_principal_has_its_seats_and_gives_them_back() {
        let door = Arc::new(Door::default());
        let alice: Principal = "alice@EX".parse().unwrap();
        let bob: Principal = "bob@EX".parse().unwrap();
        let seat = |who: &Principal| door.enter(HERE, &limits()).unwrap().prove(who, &limits());
        let first = seat(&alice).unwrap();
        let _second = seat(&alice).unwrap();
        assert_eq!(seat(&alice).err(), Some(Crowded));
        let _bobs = seat(&bob).unwrap();
        assert_eq!(door.enter(HERE, &limits()).err(), Some(Crowded));
        drop(first);
        assert!(seat(&alice).is_ok());
    }
}
