//! Connections to one libvirt, and the one hop from a caller's task into a thread that may block.
//!
//! ```text
//! inventory and events   1 connection   the reader's (reader.rs)
//! work                   4 connections  at most 5 calls each: what libvirtd serves of one client at a time
//! urgent                 1 connection   destroy and abort, which libvirtd's priority workers carry out even if all others hang
//! consoles               1 each         libvirtd reads no more of a connection while a guest does not take what is typed (console.rs)
//! ```
//! A driver inside this process (`test:///`, `qemu:///embed`) has one connection for everything.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicU8, Ordering},
};

use tokio::{
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use virt::{connect::Connect, error::Error};
use xman_common::protocol::{Code, Fault};

use super::{
    bell::Bell,
    console::Consoles,
    faults,
    inventory::Inventory,
    lanes::{Held, Lanes},
};

/// Calls of one connection that libvirtd serves at a time (its max_client_requests); more would wait in it, behind a hung one.
const CALLS_PER_CONNECTION: usize = 5;
/// Work connections.
const WORK_CONNECTIONS: usize = 4;
/// Changes in flight. All bounds together stay below the 20 workers of libvirtd: callers who make many hang must leave some to the
/// inventory and to those who come to look.
const MAX_CHANGES: usize = 10;
/// Readings in flight, for the same reason.
const MAX_READS: usize = 4;
/// Migrations in flight, for the same reason; each copies memory as fast as the network can.
const MAX_MOVES: usize = 3;
const _: () =
    assert!(MAX_CHANGES + MAX_READS + MAX_MOVES <= CALLS_PER_CONNECTION * WORK_CONNECTIONS);
/// Destroys, aborts and looks at progress in flight.
const MAX_URGENT: usize = CALLS_PER_CONNECTION;
/// A libvirtd that gives no sign of life for some 20 s is given up, and calls on it end.
const KEEPALIVE_SECONDS: i32 = 5;
const KEEPALIVE_COUNT: u32 = 3;

/// How a call is bounded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Read,
    Change,
    Move,
    Urgent,
}

/// One configured libvirt URI.
pub(super) struct Hypervisor {
    pub(super) index: usize,
    pub(super) uri: String,
    pub(super) inventory: Arc<Inventory>,
    pub(super) lanes: Arc<Lanes>,
    pub(super) bell: Arc<Bell>,
    /// The reader's connection, where the driver lives in this process.
    shared: Option<Mutex<Option<Connect>>>,
    work: Pool,
    urgent: Pool,
    changes: Arc<Semaphore>,
    reads: Arc<Semaphore>,
    moves: Arc<Semaphore>,
    urgents: Arc<Semaphore>,
    pub(super) consoles: Consoles,
}

/// A call in the thread that carries it out.
pub(super) struct Call {
    pub(super) connection: Connect,
    begun: Arc<Begun>,
    _seat: Option<Seat>,
}

/// Decides between a call that begins and a caller who gives up waiting: exactly one of them wins.
#[derive(Default)]
struct Begun(AtomicU8);

const WAITING: u8 = 0;
const BEGUN: u8 = 1;
const GIVEN_UP: u8 = 2;

impl Begun {
    fn begin(&self) -> bool {
        self.0
            .compare_exchange(WAITING, BEGUN, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
            || self.has_begun()
    }

    fn give_up(&self) -> bool {
        self.0
            .compare_exchange(WAITING, GIVEN_UP, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    fn has_begun(&self) -> bool {
        self.0.load(Ordering::SeqCst) == BEGUN
    }
}

impl Call {
    /// From here on something changes. To be called after all that may be refused has been looked at.
    ///
    /// # Errors
    /// `Unavailable` where the caller has gone on without it.
    pub(super) fn begin(&self) -> Result<(), Fault> {
        if self.begun.begin() {
            Ok(())
        } else {
            Err(silent())
        }
    }

    pub(super) fn fault(&self, error: &Error) -> Fault {
        faults::fault(error, &self.connection, self.begun.has_begun())
    }
}

impl Hypervisor {
    pub(super) fn new(index: usize, uri: String, inventory: Arc<Inventory>) -> Self {
        Self {
            index,
            shared: is_in_process(&uri).then(Mutex::default),
            work: Pool::new(&uri, WORK_CONNECTIONS),
            urgent: Pool::new(&uri, 1),
            uri,
            inventory,
            lanes: Arc::default(),
            bell: Arc::default(),
            changes: Arc::new(Semaphore::new(MAX_CHANGES)),
            reads: Arc::new(Semaphore::new(MAX_READS)),
            moves: Arc::new(Semaphore::new(MAX_MOVES)),
            urgents: Arc::new(Semaphore::new(MAX_URGENT)),
            consoles: Consoles::default(),
        }
    }

    /// Carries out work in a thread of its own, holding the lanes until it returns, however long that takes and whether or not the
    /// caller is still there.
    ///
    /// # Errors
    /// What the work says, also after the deadline if it had begun; `Busy` where it did not get its turn by the deadline, `Unavailable`
    /// where libvirt did not answer and nothing had begun.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        class: Class,
        lanes: Vec<Held>,
        deadline: Option<Instant>,
        work: impl FnOnce(&Call) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        // Without a deadline nobody waits for a turn.
        let turn = Arc::clone(self.semaphore(class)).acquire_owned();
        let permit = timeout_at(deadline.unwrap_or_else(Instant::now), turn)
            .await
            .map_err(|_| {
                Fault::new(
                    Code::Busy,
                    "too many calls are under way on this host; nothing has begun, ask again later",
                )
            })?;
        let begun = Arc::new(Begun::default());
        let hypervisor = Arc::clone(self);
        let mut task = spawn_blocking({
            let begun = Arc::clone(&begun);
            move || {
                let _held = (permit, lanes);
                let call = hypervisor.call(class, begun)?;
                work(&call)
            }
        });
        let outcome = match deadline {
            Some(deadline) => match timeout_at(deadline, &mut task).await {
                Ok(outcome) => outcome,
                Err(_) if class == Class::Read || begun.give_up() => return Err(silent()),
                // Whoever asked has stopped waiting; what comes of it is still wanted, for the record and for repeats.
                Err(_) => task.await,
            },
            None => task.await,
        };
        match outcome {
            Ok(result) => result,
            Err(_) if begun.has_begun() => Err(faults::unknown("a defect of xmand ended it")),
            Err(_) => Err(Fault::new(
                Code::Internal,
                "a defect of xmand ended the call; nothing has begun",
            )),
        }
    }

    /// Opens the reader's connection, which an in-process driver's calls share.
    pub(super) fn open_for_reader(&self) -> Result<Connect, Error> {
        let connection = open(&self.uri)?;
        if let Some(shared) = &self.shared {
            *lock(shared) = Some(connection.clone());
        }
        Ok(connection)
    }

    /// Opens a connection for one console. It gets no keep-alive: while a guest does not take what is typed, libvirtd is silent on it.
    ///
    /// # Errors
    /// `Unavailable` where libvirt cannot be reached.
    pub(super) fn call_for_console(&self) -> Result<Call, Fault> {
        let begun = Arc::<Begun>::default();
        if self.shared.is_some() {
            return self.call(Class::Read, begun);
        }
        let connection = Connect::open(Some(&self.uri))
            .map_err(|error| self.unreachable(&faults::unreachable(&error)))?;
        Ok(Call {
            connection,
            begun,
            _seat: None,
        })
    }

    fn semaphore(&self, class: Class) -> &Arc<Semaphore> {
        match class {
            Class::Read => &self.reads,
            Class::Change => &self.changes,
            Class::Move => &self.moves,
            Class::Urgent => &self.urgents,
        }
    }

    fn call(&self, class: Class, begun: Arc<Begun>) -> Result<Call, Fault> {
        if let Some(shared) = &self.shared {
            let connection = lock(shared).clone().ok_or_else(|| {
                self.unreachable(
                    &self
                        .inventory
                        .trouble(self.index)
                        .unwrap_or_else(|| "not connected yet".to_owned()),
                )
            })?;
            return Ok(Call {
                connection,
                begun,
                _seat: None,
            });
        }
        let pool = if class == Class::Urgent {
            &self.urgent
        } else {
            &self.work
        };
        let (connection, seat) = pool
            .seat()
            .map_err(|error| self.unreachable(&faults::unreachable(&error)))?;
        Ok(Call {
            connection,
            begun,
            _seat: Some(seat),
        })
    }

    fn unreachable(&self, why: &str) -> Fault {
        Fault::new(Code::Unavailable, format!("{}: {why}", self.uri))
    }
}

fn silent() -> Fault {
    Fault::new(
        Code::Unavailable,
        "libvirt has not answered in time; nothing has begun, ask again later",
    )
}

/// Some connections, opened when they are needed and again when they are broken.
struct Pool {
    uri: String,
    slots: Arc<Mutex<Vec<Slot>>>,
}

#[derive(Clone, Default)]
struct Slot {
    connection: Option<Connect>,
    calls: usize,
}

/// A place for one call on a connection, until it is dropped.
struct Seat {
    slots: Arc<Mutex<Vec<Slot>>>,
    slot: usize,
}

impl Pool {
    fn new(uri: &str, connections: usize) -> Self {
        Self {
            uri: uri.to_owned(),
            slots: Arc::new(Mutex::new(vec![Slot::default(); connections])),
        }
    }

    /// Takes the connection with the fewest calls, an open one first; the semaphores keep callers below what all can hold.
    fn seat(&self) -> Result<(Connect, Seat), Error> {
        let (connection, seat) = {
            let mut slots = lock(&self.slots);
            let best = slots
                .iter_mut()
                .enumerate()
                .min_by_key(|(_, slot)| (slot.calls, slot.connection.is_none()))
                .map(|(at, slot)| {
                    slot.calls += 1;
                    (at, slot.connection.clone())
                });
            let (slot, connection) = best.unwrap_or_default();
            (
                connection,
                Seat {
                    slots: Arc::clone(&self.slots),
                    slot,
                },
            )
        };
        if let Some(connection) = connection
            && connection.is_alive().unwrap_or(false)
        {
            return Ok((connection, seat));
        }
        let connection = open(&self.uri)?;
        if let Some(slot) = lock(&self.slots).get_mut(seat.slot) {
            slot.connection = Some(connection.clone());
        }
        Ok((connection, seat))
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        if let Some(slot) = lock(&self.slots).get_mut(self.slot) {
            slot.calls = slot.calls.saturating_sub(1);
        }
    }
}

pub(super) fn open(uri: &str) -> Result<Connect, Error> {
    let connection = Connect::open(Some(uri))?;
    // Drivers inside this process have nobody to keep alive and say so.
    if !is_in_process(uri)
        && let Err(error) = connection.set_keep_alive(KEEPALIVE_SECONDS, KEEPALIVE_COUNT)
    {
        tracing::debug!("{uri}: no keep-alive: {}", error.message());
    }
    Ok(connection)
}

/// Returns whether the driver of a URI runs in the calling process, where a second connection is another world or refused.
fn is_in_process(uri: &str) -> bool {
    let uri = uri.split(['?', '#']).next().unwrap_or_default();
    match uri.split_once("://") {
        Some(("test", rest)) => rest.starts_with('/'),
        Some(("qemu", rest)) => rest.trim_end_matches('/') == "/embed",
        _ => false,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn drivers_inside_this_process_are_known_by_their_uri() {
        for inside in [
            "test:///default",
            "test:///etc/x.xml",
            "qemu:///embed?root=/tmp/x",
            "qemu:///embed/",
        ] {
            assert!(is_in_process(inside), "{inside}");
        }
        for outside in [
            "qemu:///system",
            "qemu:///session",
            "test+tcp://h/default",
            "test://h/default",
            "lxc:///system",
            "xen:///system",
            "qemu+unix:///embed",
            "x",
        ] {
            assert!(!is_in_process(outside), "{outside}");
        }
    }

    #[test]
    fn either_the_call_begins_or_the_caller_gives_up() {
        let begun = Begun::default();
        assert!(begun.begin() && begun.begin() && !begun.give_up() && begun.has_begun());
        let begun = Begun::default();
        assert!(begun.give_up() && !begun.begin() && !begun.has_begun());
    }
}
