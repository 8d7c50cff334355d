//! Work on one domain happens one piece after another, in the domain's lane; a lane that hangs delays no other.
//!
//! ```text
//! take(): waiting --> held --> (work returns, guard dropped) --> free
//!            |          '--> well past its deadline: stuck, counted, still held
//!            '--> deadline: Busy, nothing has begun
//! ```

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Mutex as Gate, OwnedMutexGuard},
    time::{Instant, timeout_at},
};
use uuid::Uuid;
use xman_common::protocol::{Code, Fault};

/// Stuck lanes beyond which a hypervisor takes no new changes: callers that repeat calls on hung domains would use up the workers
/// that libvirt has for everybody.
pub(super) const MAX_STUCK: usize = 6;
/// How long past its deadline work counts as stuck: a caller that names a very short one makes nobody else wait.
const STUCK_AFTER: Duration = Duration::from_secs(2);
/// Callers that wait in one lane; more are told at once that it is busy, so a hung domain does not collect every retry.
const MAX_WAITING: usize = 16;

/// What a lane is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) enum Key {
    /// Making new domains: names and UUIDs stay as they were judged.
    New,
    /// One domain.
    Domain(Uuid),
}

/// The lanes of one hypervisor; there is one only for what somebody holds or waits for.
#[derive(Default)]
pub(super) struct Lanes {
    lanes: Mutex<HashMap<Key, Lane>>,
}

#[derive(Default)]
struct Lane {
    gate: Arc<Gate<()>>,
    interested: usize,
    /// Until when who holds it hopes to be done.
    deadline: Option<Instant>,
}

/// A lane that is held, until this is dropped.
pub(super) struct Held {
    _guard: OwnedMutexGuard<()>,
    interest: Interest,
}

/// Keeps a lane in the table.
struct Interest {
    lanes: Arc<Lanes>,
    key: Key,
}

impl Lanes {
    /// Waits for a lane.
    ///
    /// # Errors
    /// `Busy` where it is not free by the deadline, too many wait already, or too many lanes are stuck.
    pub(super) async fn take(self: &Arc<Self>, key: Key, deadline: Instant) -> Result<Held, Fault> {
        let stuck = self.stuck();
        if stuck >= MAX_STUCK {
            return Err(busy(format!(
                "{stuck} earlier calls hang in libvirt, and no more are begun until some return"
            )));
        }
        let (gate, interest) = self
            .enter(key)
            .ok_or_else(|| busy(format!("{MAX_WAITING} calls wait for it already")))?;
        let guard = timeout_at(deadline, gate.lock_owned())
            .await
            .map_err(|_| busy("an earlier call on it has not ended".to_owned()))?;
        Ok(self.hold(guard, interest, Some(deadline)))
    }

    /// Takes a lane that is free at this moment.
    pub(super) fn try_take(self: &Arc<Self>, key: Key, deadline: Instant) -> Option<Held> {
        let (gate, interest) = self.enter(key)?;
        let guard = gate.try_lock_owned().ok()?;
        Some(self.hold(guard, interest, Some(deadline)))
    }

    /// The number of lanes whose work has not returned well after its deadline.
    pub(super) fn stuck(&self) -> usize {
        let now = Instant::now();
        self.table()
            .values()
            .filter(|lane| {
                lane.deadline
                    .is_some_and(|deadline| deadline + STUCK_AFTER < now)
            })
            .count()
    }

    fn enter(self: &Arc<Self>, key: Key) -> Option<(Arc<Gate<()>>, Interest)> {
        let mut table = self.table();
        let lane = table.entry(key).or_default();
        if lane.interested > MAX_WAITING {
            return None;
        }
        lane.interested += 1;
        Some((
            Arc::clone(&lane.gate),
            Interest {
                lanes: Arc::clone(self),
                key,
            },
        ))
    }

    fn hold(
        &self,
        guard: OwnedMutexGuard<()>,
        interest: Interest,
        deadline: Option<Instant>,
    ) -> Held {
        if let Some(lane) = self.table().get_mut(&interest.key) {
            lane.deadline = deadline;
        }
        Held {
            _guard: guard,
            interest,
        }
    }

    fn table(&self) -> MutexGuard<'_, HashMap<Key, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Held {
    /// From now on the work in the lane has no deadline, and does not count as stuck: a migration takes as long as it takes.
    pub(super) fn without_deadline(&self) {
        if let Some(lane) = self.interest.lanes.table().get_mut(&self.interest.key) {
            lane.deadline = None;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.without_deadline();
    }
}

impl Drop for Interest {
    fn drop(&mut self) {
        let mut table = self.lanes.table();
        if let Some(lane) = table.get_mut(&self.key) {
            lane.interested -= 1;
            if lane.interested == 0 {
                table.remove(&self.key);
            }
        }
    }
}

fn busy(why: String) -> Fault {
    Fault::new(
        Code::Busy,
        format!("{why}; nothing has begun, ask again later"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(50)
    }

    fn key(number: u128) -> Key {
        Key::Domain(Uuid::from_u128(number))
    }

    #[tokio::test]
    async fn a_held_lane_is_busy_and_others_are_free() {
        let lanes = Arc::new(Lanes::default());
        let held = lanes.take(key(1), soon()).await.unwrap();
        assert_eq!(
            lanes.take(key(1), soon()).await.err().unwrap().code,
            Code::Busy
        );
        assert!(lanes.try_take(key(1), soon()).is_none());
        assert!(lanes.take(key(2), soon()).await.is_ok());
        drop(held);
        assert!(lanes.take(key(1), soon()).await.is_ok());
        assert!(lanes.table().is_empty(), "idle lanes are dropped");
    }

    #[tokio::test]
    async fn a_caller_who_goes_away_leaves_no_lane_behind() {
        let lanes = Arc::new(Lanes::default());
        let held = lanes.take(key(1), soon()).await.unwrap();
        let waiting = tokio::spawn({
            let lanes = Arc::clone(&lanes);
            async move {
                lanes
                    .take(key(1), Instant::now() + Duration::from_secs(60))
                    .await
                    .is_ok()
            }
        });
        while lanes.table().get(&key(1)).unwrap().interested < 2 {
            tokio::task::yield_now().await;
        }
        waiting.abort();
        assert!(waiting.await.is_err());
        drop(held);
        assert!(lanes.table().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn stuck_lanes_are_counted_and_bounded() {
        let lanes = Arc::new(Lanes::default());
        let mut held = Vec::new();
        for number in 0..MAX_STUCK {
            held.push(lanes.take(key(number as u128), soon()).await.unwrap());
        }
        assert_eq!(lanes.stuck(), 0);
        while lanes.stuck() < MAX_STUCK {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let refused = lanes.take(key(99), soon()).await.err().unwrap();
        assert!(
            refused.code == Code::Busy && refused.message.contains("hang in libvirt"),
            "{refused}"
        );
        if let Some(migrating) = held.first() {
            migrating.without_deadline();
        }
        assert_eq!(lanes.stuck(), MAX_STUCK - 1);
        assert!(lanes.take(key(99), soon()).await.is_ok());
        held.clear();
        assert_eq!(lanes.stuck(), 0);
        assert!(lanes.table().is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn only_so_many_wait_in_one_lane() {
        let lanes = Arc::new(Lanes::default());
        let _held = lanes.take(key(1), soon()).await.unwrap();
        let waiting: Vec<_> = (0..MAX_WAITING + 5)
            .map(|_| {
                let lanes = Arc::clone(&lanes);
                tokio::spawn(async move {
                    lanes
                        .take(key(1), Instant::now() + Duration::from_secs(1))
                        .await
                        .err()
                })
            })
            .collect();
        let mut at_once = 0;
        for caller in waiting {
            let fault = caller.await.unwrap().unwrap();
            assert_eq!(fault.code, Code::Busy);
            at_once += usize::from(fault.message.contains("wait for it already"));
        }
        assert_eq!(at_once, 5);
    }
}
