//! A changing call is carried out once, however often it is sent: its id is claimed here, and repeats get what came of it.

use std::{
    collections::{HashMap, hash_map::Entry},
    sync::{Arc, Mutex, PoisonError},
};

use tokio::{
    sync::{Semaphore, watch},
    time::{Instant, timeout_at},
};
use xman_common::protocol::{Code, Fault};

use crate::{
    caller::Outcome,
    store::{Begun, CallKey, Store, StoreError},
};

/// Changes of one principal under way, also those that it let go of: no one fills the host with calls that wait for a libvirt that hangs.
const MAX_UNDER_WAY: usize = 256;
/// Repeats that wait for one call, for the same reason.
const MAX_WAITING: usize = 16;

type Running = HashMap<CallKey, UnderWay>;

#[derive(Clone, Debug)]
struct UnderWay {
    digest: [u8; 32],
    outcome: watch::Receiver<Option<Outcome>>,
    room: Arc<Semaphore>,
}

/// The changes under way in this process; those that have ended are in the store.
#[derive(Clone, Debug, Default)]
pub(crate) struct Repeats(Arc<Mutex<Running>>);

/// Whose the call is.
pub(crate) enum Claim {
    /// Ours to carry out.
    Mine(Mine),
    /// Somebody else's, with what came of it.
    Answered(Box<Outcome>),
}

/// The right, and the duty, to carry a call out.
pub(crate) struct Mine {
    running: Repeats,
    key: CallKey,
    outcome: watch::Sender<Option<Outcome>>,
    is_kept: bool,
}

impl Repeats {
    /// Claims a call; one that is under way is waited for until `deadline`.
    pub(crate) async fn claim(
        &self,
        store: &Store,
        key: CallKey,
        verb: &'static str,
        digest: [u8; 32],
        deadline: Instant,
    ) -> Claim {
        let (outcome, watched) = watch::channel(None);
        let under_way = {
            let mut running = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let is_crowded = of(&running, &key.principal) >= MAX_UNDER_WAY;
            match running.entry(key.clone()) {
                Entry::Occupied(entry) => Some(entry.get().clone()),
                Entry::Vacant(_) if is_crowded => return Claim::Answered(Box::new(Err(crowded()))),
                Entry::Vacant(entry) => {
                    entry.insert(UnderWay {
                        digest,
                        outcome: watched,
                        room: Arc::new(Semaphore::new(MAX_WAITING)),
                    });
                    None
                }
            }
        };
        match under_way {
            Some(call) => Claim::Answered(Box::new(call.wait(digest, deadline).await)),
            None => {
                let mine = Mine {
                    running: self.clone(),
                    key: key.clone(),
                    outcome,
                    is_kept: false,
                };
                match remembered(store.begin(key, verb, digest).await) {
                    None => Claim::Mine(mine),
                    Some(outcome) => mine.known(outcome),
                }
            }
        }
    }

    /// Tells what came of a call that was claimed before; one that is under way is waited for until `deadline`.
    pub(crate) async fn recall(
        &self,
        store: &Store,
        key: CallKey,
        digest: [u8; 32],
        deadline: Instant,
    ) -> Option<Outcome> {
        let under_way = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .get(&key)
            .cloned();
        match under_way {
            Some(call) => Some(call.wait(digest, deadline).await),
            None => remembered(store.recall(key, digest).await),
        }
    }
}

/// The outcome that the store's word on a call comes to; none where the call is new.
fn remembered(begun: Result<Begun, StoreError>) -> Option<Outcome> {
    match begun {
        Ok(Begun::Fresh) => None,
        Ok(Begun::Repeated(outcome)) => Some(*outcome),
        Ok(Begun::Interrupted) => Some(Err(interrupted())),
        Ok(Begun::OtherRequest) => Some(Err(other_request())),
        Err(error) => Some(Err(error.before())),
    }
}

impl Mine {
    /// There is nothing to carry out; whoever waits hears so too.
    fn known(self, outcome: Outcome) -> Claim {
        self.outcome.send_replace(Some(outcome.clone()));
        Claim::Answered(Box::new(outcome))
    }

    /// Remembers what came of the call and tells those who wait for it. What never began is forgotten, so that it can be tried again.
    pub(crate) async fn settle(mut self, store: &Store, outcome: &Outcome) {
        let never_began = matches!(
            outcome,
            Err(Fault {
                code: Code::Busy | Code::Unavailable,
                ..
            })
        );
        let kept = if never_began {
            store.withdraw(self.key.clone()).await
        } else {
            store.finish(self.key.clone(), outcome).await
        };
        if let Err(error) = kept {
            tracing::error!(%error, call = %self.key.id, "the outcome of a call could not be written down; it is kept in memory");
            self.is_kept = !never_began;
        }
        self.outcome.send_replace(Some(outcome.clone()));
    }
}

impl Drop for Mine {
    fn drop(&mut self) {
        if !self.is_kept {
            self.running
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .remove(&self.key);
        }
    }
}

impl UnderWay {
    async fn wait(mut self, digest: [u8; 32], deadline: Instant) -> Outcome {
        if self.digest != digest {
            return Err(other_request());
        }
        let Ok(_place) = self.room.try_acquire() else {
            return Err(still_under_way());
        };
        match timeout_at(deadline, self.outcome.wait_for(Option::is_some)).await {
            Ok(Ok(outcome)) => outcome.clone().unwrap_or_else(|| Err(still_under_way())),
            Ok(Err(_)) => Err(Fault::new(
                Code::Internal,
                "the call that this one repeats failed in the middle; look at the domain",
            )),
            Err(_) => Err(still_under_way()),
        }
    }
}

/// The number of a principal's calls without an outcome.
fn of(running: &Running, principal: &str) -> usize {
    let has_none = |call: &UnderWay| call.outcome.borrow().is_none();
    running
        .iter()
        .filter(|(key, call)| key.principal == principal && has_none(call))
        .count()
}

fn crowded() -> Fault {
    Fault::new(
        Code::Busy,
        format!(
            "{MAX_UNDER_WAY} of your changes are under way on this host; nothing has begun, ask again when some have ended"
        ),
    )
}

fn still_under_way() -> Fault {
    Fault::new(
        Code::Unknown,
        "the call that this one repeats is still under way; ask again later with the same id",
    )
}

fn interrupted() -> Fault {
    let words = "xmand ended in the middle of this call and does not know what came of it; look at the domain, then decide anew";
    Fault {
        retry: false,
        ..Fault::new(Code::Unknown, words)
    }
}

fn other_request() -> Fault {
    Fault::new(
        Code::Conflict,
        "the id of this call belongs to another request; every new request takes a new id",
    )
}
