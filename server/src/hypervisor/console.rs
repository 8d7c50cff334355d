//! libvirt's stream to a domain's console: what the guest writes comes on libvirt's event thread, what is typed goes out in a thread of the
//! console's own.
//!
//! ```text
//! open -> attend --typed--> send, which may block for as long as the guest takes nothing
//!            |---over or broken--> is the domain off? the guest has ended : taken over or libvirt lost
//!            '---left------------> closed
//! ```
//! libvirtd queues what a guest does not take, and from the fifth message on reads no more of that connection; so each console has a
//! connection of its own, and a guest that takes nothing, or a libvirtd that hangs, holds up that console and nothing else.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant as Moment},
};

use tokio::{
    runtime::Handle,
    sync::{Notify, Semaphore, mpsc, oneshot},
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};
use uuid::Uuid;
use virt::{connect::Connect, error::Error, stream::Stream};
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{Code, Fault},
};

use super::{
    Hypervisors, Target,
    connections::Hypervisor,
    faults,
    ffi::{Attendant, Attended, Ready},
    readings,
    sense::{Act, conflict, sense},
    verbs::Visit,
};

/// Consoles open on one hypervisor, those that hang included: each costs a thread, a connection and one of libvirtd's clients. More are
/// answered `Busy`.
const MAX_CONSOLES: usize = 16;
/// How long libvirt may take to open one.
const OPEN_LIMIT: Duration = Duration::from_secs(20);
/// How often is looked whether the connection lives: libvirt does not say so to who only waits.
const PROBE: Duration = Duration::from_secs(1);
/// The pause before a driver that says so is asked again whether the guest takes more.
const FULL: Duration = Duration::from_millis(20);
/// How long after a stream's end libvirt may take to notice that the guest has ended.
const SETTLE: Duration = Duration::from_secs(5);
const SETTLE_LOOK: Duration = Duration::from_millis(50);
/// Bytes taken from libvirt at a time, and how often in one callback: other events of libvirt's want their turn.
const GULP: usize = 64 * 1024;
const GULPS: usize = 64;

/// Takes what a guest writes. On libvirt's event thread: must not block.
pub(crate) type Screen = Arc<dyn Fn(&[u8]) + Send + Sync>;

/// A console that is open, until `keys` is dropped.
pub(crate) struct OpenConsole {
    /// Takes what is typed, as fast as the guest does.
    pub(crate) keys: mpsc::Sender<Vec<u8>>,
    /// Why it is over: the guest has ended, or the fault.
    pub(crate) ended: oneshot::Receiver<Result<(), Fault>>,
}

/// The consoles of one hypervisor.
pub(super) struct Consoles {
    seats: Arc<Semaphore>,
    /// How many threads have a domain's console, those that are about to close it included.
    held: Mutex<HashMap<Uuid, usize>>,
}

impl Default for Consoles {
    fn default() -> Self {
        Self {
            seats: Arc::new(Semaphore::new(MAX_CONSOLES)),
            held: Mutex::default(),
        }
    }
}

impl Consoles {
    fn held(&self) -> MutexGuard<'_, HashMap<Uuid, usize>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts one more thread that has a domain's console; returns it with whether there is another.
    fn hold(&self, uuid: Uuid) -> (Hold<'_>, bool) {
        let mut held = self.held();
        let count = held.entry(uuid).or_default();
        *count += 1;
        let hold = Hold {
            consoles: self,
            uuid,
        };
        (hold, *count > 1)
    }
}

struct Hold<'a> {
    consoles: &'a Consoles,
    uuid: Uuid,
}

impl Drop for Hold<'_> {
    fn drop(&mut self) {
        let mut held = self.consoles.held();
        if let Some(count) = held.get_mut(&self.uuid) {
            *count -= 1;
            if *count == 0 {
                held.remove(&self.uuid);
            }
        }
    }
}

impl Hypervisors {
    /// Opens a domain's console; with `force` also one that another program on the host has.
    pub(crate) async fn open_console(
        &self,
        target: Target,
        force: bool,
        screen: Screen,
        deadline: Instant,
    ) -> Result<OpenConsole, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let seat = Arc::clone(&hypervisor.consoles.seats)
            .try_acquire_owned()
            .map_err(|_| {
                Fault::new(
                    Code::Busy,
                    format!("{MAX_CONSOLES} consoles are open on this host, and no more are opened until one is left"),
                )
            })?;
        let (keys, typed) = mpsc::channel(1);
        let (opened, opening) = oneshot::channel();
        let (end, ended) = oneshot::channel();
        let runtime = Handle::current();
        spawn_blocking(move || {
            let _seat = seat;
            let (_hold, is_ours) = hypervisor.consoles.hold(target.facts.uuid);
            match Console::open(&hypervisor, &target, force || is_ours, screen) {
                Err(fault) => drop(opened.send(Err(fault))),
                // Whoever asked may have given up.
                Ok(console) if opened.send(Ok(())).is_ok() => {
                    let _ = end.send(console.attend(typed, &runtime));
                }
                Ok(_) => {}
            }
        });
        let limit = deadline.min(Instant::now() + OPEN_LIMIT);
        match timeout_at(limit, opening).await {
            Ok(Ok(Ok(()))) => Ok(OpenConsole { keys, ended }),
            Ok(Ok(Err(fault))) => Err(fault),
            Ok(Err(_)) => Err(Fault::new(
                Code::Internal,
                "a defect of xmand kept the console shut; look at the host's log",
            )),
            Err(_) => Err(Fault::new(
                Code::Unavailable,
                "libvirt has not opened the console in time; ask again later",
            )),
        }
    }
}

/// An open console in its thread.
struct Console {
    // Dropped in this order: the stream ends while its connection lives.
    stream: Attended,
    connection: Connect,
    name: DomainName,
    uuid: Uuid,
    /// The domain's number while it runs: another is another run.
    id: Option<u32>,
    over: Arc<Notify>,
}

enum Next {
    Over,
    Typed(Vec<u8>),
    Left,
    Probe,
}

impl Console {
    fn open(
        hypervisor: &Hypervisor,
        target: &Target,
        force: bool,
        screen: Screen,
    ) -> Result<Self, Fault> {
        let call = hypervisor.call_for_console()?;
        let visit = Visit::new(&call, hypervisor, target)?;
        let name = visit.facts.name.clone();
        sense(Act::Console, &name, visit.state)?;
        let stream = open_stream(&visit, force)
            .map_err(|error| refusal(&error, &name).unwrap_or_else(|| call.fault(&error)))?;
        let over = Arc::new(Notify::new());
        let attendant = attendant(screen, Arc::clone(&over));
        let stream = visit.ok(Attended::new(stream, attendant))?;
        Ok(Self {
            stream,
            connection: call.connection.clone(),
            name,
            uuid: visit.facts.uuid,
            id: visit.domain.id(),
            over,
        })
    }

    /// Types what comes until nobody is there any more, and says why it is over.
    fn attend(&self, mut typed: mpsc::Receiver<Vec<u8>>, runtime: &Handle) -> Result<(), Fault> {
        loop {
            let next = runtime.block_on(async {
                tokio::select! {
                    biased;
                    () = self.over.notified() => Next::Over,
                    bytes = typed.recv() => bytes.map_or(Next::Left, Next::Typed),
                    () = sleep(PROBE) => Next::Probe,
                }
            });
            match next {
                Next::Left => return Ok(()),
                Next::Typed(bytes) if self.send(&bytes, &typed) => {}
                Next::Probe if self.lives() => {}
                Next::Over | Next::Typed(_) | Next::Probe => return self.why(),
            }
        }
    }

    fn lives(&self) -> bool {
        self.connection.is_alive().unwrap_or(false)
    }

    /// Returns whether all was sent, or nobody is there to care.
    fn send(&self, bytes: &[u8], typed: &mpsc::Receiver<Vec<u8>>) -> bool {
        let mut rest = bytes;
        while !rest.is_empty() {
            match self.stream.send(rest) {
                Ok(Some(sent)) => rest = rest.get(sent..).unwrap_or_default(),
                Ok(None) if typed.is_closed() => return true,
                Ok(None) => thread::sleep(FULL),
                Err(_) => return false,
            }
        }
        true
    }

    /// Tells the end of the guest from other ends of its console.
    fn why(&self) -> Result<(), Fault> {
        let until = Moment::now() + SETTLE;
        loop {
            match readings::find(&self.connection, self.uuid) {
                Ok(None) => return Ok(()),
                // One that is off has no number.
                Ok(Some(domain)) if domain.id() != self.id => return Ok(()),
                Err(_) if !self.lives() => return Err(lost()),
                Ok(Some(_)) | Err(_) if Moment::now() >= until => return Err(taken(&self.name)),
                Ok(Some(_)) | Err(_) => thread::sleep(SETTLE_LOOK),
            }
        }
    }
}

/// Hands on what has come, and says when nothing will.
fn attendant(screen: Screen, over: Arc<Notify>) -> Attendant {
    let buffer = Mutex::new(vec![0; GULP]);
    Arc::new(move |ready: Ready<'_>| {
        let mut buffer = buffer.lock().unwrap_or_else(PoisonError::into_inner);
        for _ in 0..GULPS {
            match ready.receive(&mut buffer) {
                Ok(None) => return,
                Ok(Some(length)) if length > 0 => screen(buffer.get(..length).unwrap_or_default()),
                Ok(Some(_)) | Err(_) => {
                    ready.hush();
                    over.notify_one();
                    return;
                }
            }
        }
    })
}

/// LXC's driver knows no flags, and Xen's no SAFE. A stream that failed to open is not used again.
fn open_stream(visit: &Visit<'_>, force: bool) -> Result<Stream, Error> {
    let wanted = if force {
        sys::VIR_DOMAIN_CONSOLE_FORCE
    } else {
        0
    };
    let open = |flags| {
        let stream = Stream::new(&visit.call.connection, sys::VIR_STREAM_NONBLOCK)?;
        visit.domain.open_console(None, &stream, flags)?;
        Ok(stream)
    };
    let mut opened = open(wanted | sys::VIR_DOMAIN_CONSOLE_SAFE);
    for flags in [wanted, 0] {
        match opened {
            Err(error) if knows_no_such_flag(&error) => opened = open(flags),
            Ok(_) | Err(_) => break,
        }
    }
    opened
}

fn knows_no_such_flag(error: &Error) -> bool {
    error.code().to_raw() == sys::VIR_ERR_INVALID_ARG
        && error.message().contains("unsupported flags")
}

/// What has its own words where a console does not open; all else is in the one table.
fn refusal(error: &Error, name: &DomainName) -> Option<Fault> {
    refusal_of(error.code().to_raw(), error.message(), name)
}

fn refusal_of(code: sys::virErrorNumber, text: &str, name: &DomainName) -> Option<Fault> {
    let has = |piece: &str| text.contains(piece);
    if has("Active console session exists") {
        return Some(conflict(format!(
            "another program on the host has the console of '{name}', as `virsh console` does; `rxm console --force {name}` takes it over"
        )));
    }
    if has("locked by lock file") {
        return Some(conflict(format!(
            "another program on the host uses the terminal of '{name}' ({}); end it first",
            faults::tidy(text)
        )));
    }
    if has("cannot find character device")
        || has("cannot find console device")
        || has("not using a PTY")
        || has("not using a UNIX socket")
        || has("No console")
        || has("no console")
    {
        return Some(Fault::new(
            Code::Refused,
            format!(
                "'{name}' has no console that can be reached: its definition needs <serial type='pty'/> and <console type='pty'/> ({})",
                faults::tidy(text)
            ),
        ));
    }
    (code == sys::VIR_ERR_NO_SUPPORT).then(|| {
        Fault::new(
            Code::Unsupported,
            format!("the hypervisor of '{name}' has no consoles"),
        )
    })
}

fn lost() -> Fault {
    Fault::new(
        Code::Unavailable,
        "the connection to libvirt broke: libvirtd has ended, or gave the console up since its guest took no input for half a minute; open it again",
    )
}

fn taken(name: &DomainName) -> Fault {
    conflict(format!(
        "the console of '{name}' was taken by another program on the host, as `virsh console --force` does; `rxm console --force {name}` takes it back"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(code: sys::virErrorNumber, text: &str, expected: Option<Code>) {
        let fault = refusal_of(code, text, &"web".parse().unwrap());
        assert_eq!(fault.map(|fault| fault.code), expected, "{text}");
    }

    #[test]
    fn a_console_that_does_not_open_says_why() {
        let (internal, failed) = (sys::VIR_ERR_INTERNAL_ERROR, sys::VIR_ERR_OPERATION_FAILED);
        check(
            failed,
            "operation failed: Active console session exists for this domain",
            Some(Code::Conflict),
        );
        check(
            failed,
            "operation failed: Requested device '/dev/pts/0' is locked by lock file '/var/lock/LCK.._pts_0' held by process 7",
            Some(Code::Conflict),
        );
        check(
            internal,
            "internal error: cannot find character device (null)",
            Some(Code::Refused),
        );
        check(
            internal,
            "internal error: character device serial0 is not using a PTY",
            Some(Code::Refused),
        );
        check(
            sys::VIR_ERR_NO_SUPPORT,
            "this function is not supported by the connection driver: virDomainOpenConsole",
            Some(Code::Unsupported),
        );
        check(internal, "internal error: client socket is closed", None);
    }

    #[test]
    fn a_console_that_is_about_to_close_is_known_until_it_has() {
        let consoles = Consoles::default();
        let (first, second) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let (closing, is_ours) = consoles.hold(first);
        assert!(!is_ours);
        let (again, is_ours) = consoles.hold(first);
        assert!(is_ours && !consoles.hold(second).1);
        drop(closing);
        assert!(consoles.hold(first).1);
        drop(again);
        assert!(!consoles.hold(first).1 && consoles.held().is_empty());
    }
}
