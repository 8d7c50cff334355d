//! The socket, a few connections to it, and the conversation on one of them.

use std::{
    fs,
    io::{self, Read, Write},
    os::unix::{
        fs::{FileTypeExt, MetadataExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    event::{PollFd, PollFlags, Timespec},
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, sockopt},
};

use super::{
    MAX_CONNECTIONS, MAX_IN_FLIGHT, MAX_LINE, Trouble,
    wire::{self, Answer},
};

/// How much is read at once.
const CHUNK: usize = 16 * 1024;
/// The shortest time that is given to the kernel: none at all would mean forever.
const SHORTEST: Duration = Duration::from_millis(1);

/// The next question's number; none is ever given twice, so that an answer that comes late is nobody's.
static NEXT: AtomicU64 = AtomicU64::new(1);

/// What tells one socket from the next at the same path. Its change time is among it, since a file system may give an inode's number again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    owner: u32,
    changed: (i64, i64),
}

/// Looks at the socket without following a link, and refuses one that somebody else could have made.
pub(super) fn look(path: &Path, account: u32) -> Result<Identity, Trouble> {
    let metadata = fs::symlink_metadata(path).map_err(|error| {
        if error.kind() == io::ErrorKind::NotFound {
            return Trouble::Missing(path.to_owned());
        }
        Trouble::Unreachable {
            path: path.to_owned(),
            text: error.to_string(),
        }
    })?;
    if metadata.is_symlink() {
        return Err(Trouble::Link(path.to_owned()));
    }
    if !metadata.file_type().is_socket() {
        return Err(Trouble::NoSocket(path.to_owned()));
    }
    let owner = metadata.uid();
    if owner != 0 && owner != account {
        return Err(Trouble::Owner {
            path: path.to_owned(),
            owner,
            account,
        });
    }
    Ok(Identity {
        device: metadata.dev(),
        inode: metadata.ino(),
        owner,
        changed: (metadata.ctime(), metadata.ctime_nsec()),
    })
}

/// When an answer is too late.
#[derive(Clone, Copy, Debug)]
pub(super) struct Deadline {
    end: Instant,
    limit: Duration,
}

impl Deadline {
    pub(super) fn after(limit: Duration) -> Self {
        Self {
            end: Instant::now() + limit,
            limit,
        }
    }

    fn remaining(&self) -> Result<Duration, Trouble> {
        match self.end.checked_duration_since(Instant::now()) {
            Some(left) if !left.is_zero() => Ok(left),
            Some(_) | None => Err(Trouble::Late(self.limit)),
        }
    }
}

/// A few connections, and who waits for one of them.
#[derive(Debug)]
pub(super) struct Pool {
    path: PathBuf,
    account: u32,
    seats: Mutex<Seats>,
    freed: Condvar,
}

#[derive(Debug, Default)]
struct Seats {
    taken: usize,
    /// Connections on which every question was answered once and nothing else was said.
    idle: Vec<Connection>,
}

#[derive(Debug)]
struct Connection {
    stream: UnixStream,
    identity: Identity,
}

impl Pool {
    pub(super) fn new(path: PathBuf, account: u32) -> Self {
        Self {
            path,
            account,
            seats: Mutex::default(),
            freed: Condvar::new(),
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn look(&self) -> Result<Identity, Trouble> {
        look(&self.path, self.account)
    }

    /// Asks all questions on one connection to the socket of that identity; returns as many answers, in the same order.
    pub(super) fn ask(
        &self,
        identity: Identity,
        bodies: &[&str],
        deadline: Deadline,
    ) -> Vec<Result<Answer, Trouble>> {
        self.converse(identity, bodies, deadline)
            .unwrap_or_else(|trouble| bodies.iter().map(|_| Err(trouble.clone())).collect())
    }

    fn converse(
        &self,
        identity: Identity,
        bodies: &[&str],
        deadline: Deadline,
    ) -> Result<Vec<Result<Answer, Trouble>>, Trouble> {
        let seat = self.seat(deadline)?;
        let (mut connection, kept) = match seat.idle(identity) {
            Some(connection) => (connection, true),
            None => (self.connect(identity, deadline)?, false),
        };
        let mut exchange = Exchange::new(bodies, deadline);
        exchange.run(&mut connection.stream);
        // An authority that was started again closed the connection we had kept. Not a byte came, so asking once more can mix up nothing; what
        // is new and closes is trouble.
        if kept && exchange.found_it_closed() {
            connection = self.connect(identity, deadline)?;
            exchange = Exchange::new(bodies, deadline);
            exchange.run(&mut connection.stream);
        }
        if exchange.is_clean() {
            seat.keep(connection);
        }
        Ok(exchange.answers())
    }

    /// Waits for one's turn.
    fn seat(&self, deadline: Deadline) -> Result<Seat<'_>, Trouble> {
        let seats = self.seats();
        let left = deadline.remaining()?;
        let (mut seats, _) = self
            .freed
            .wait_timeout_while(seats, left, |seats| seats.taken >= MAX_CONNECTIONS)
            .unwrap_or_else(PoisonError::into_inner);
        if seats.taken >= MAX_CONNECTIONS {
            return Err(Trouble::Busy(deadline.limit));
        }
        seats.taken += 1;
        Ok(Seat(self))
    }

    fn seats(&self) -> MutexGuard<'_, Seats> {
        // counted and listed without a panic in between
        self.seats.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects to the socket of that identity and to a process of somebody whom it may belong to.
    fn connect(&self, identity: Identity, deadline: Deadline) -> Result<Connection, Trouble> {
        let trouble = |errno: rustix::io::Errno| Trouble::Unreachable {
            path: self.path.clone(),
            text: io::Error::from(errno).to_string(),
        };
        let socket = rustix::net::socket_with(
            AddressFamily::UNIX,
            SocketType::STREAM,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(trouble)?;
        let address = SocketAddrUnix::new(&self.path).map_err(trouble)?;
        loop {
            // where the authority does not accept and its queue is full, connecting waits for as long as sending would
            let left = deadline.remaining()?.max(SHORTEST);
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Send, Some(left))
                .map_err(trouble)?;
            match rustix::net::connect(&socket, &address) {
                Ok(()) => break,
                Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
                Err(errno) => return Err(trouble(errno)),
            }
        }
        // The path can be another's between a look and the connection. So the peer counts, and the second look says whose answers these are.
        let peer = sockopt::socket_peercred(&socket)
            .map_err(trouble)?
            .uid
            .as_raw();
        if peer != 0 && peer != self.account {
            return Err(Trouble::Peer {
                path: self.path.clone(),
                peer,
                account: self.account,
            });
        }
        if self.look()? != identity {
            return Err(Trouble::Replaced(self.path.clone()));
        }
        let stream = UnixStream::from(socket);
        stream
            .set_nonblocking(true)
            .map_err(|error| Trouble::Broken(error.to_string()))?;
        Ok(Connection { stream, identity })
    }
}

/// The right to have one connection; given back when dropped.
struct Seat<'a>(&'a Pool);

impl Seat<'_> {
    /// Returns a connection to that socket on which nothing has happened since. The others are closed.
    fn idle(&self, identity: Identity) -> Option<Connection> {
        let mut seats = self.0.seats();
        while let Some(connection) = seats.idle.pop() {
            if connection.identity == identity && is_quiet(&connection.stream) {
                return Some(connection);
            }
        }
        None
    }

    fn keep(&self, connection: Connection) {
        self.0.seats().idle.push(connection);
    }
}

impl Drop for Seat<'_> {
    fn drop(&mut self) {
        self.0.seats().taken -= 1;
        self.0.freed.notify_one();
    }
}

/// A kept connection that says something unasked, or is closed, is good for nothing any more.
fn is_quiet(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::IN)];
    let now = Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut polled, Some(&now)) == Ok(0)
}

/// Questions on one connection, and what came back.
struct Exchange<'a> {
    bodies: &'a [&'a str],
    deadline: Deadline,
    /// The first question's number; the others follow.
    first: u64,
    slots: Vec<Slot>,
    answered: usize,
    outgoing: Outgoing,
    incoming: Incoming,
    /// What ended the conversation before its time.
    trouble: Option<Trouble>,
}

/// What is known of one question.
#[derive(Clone, Debug)]
enum Slot {
    Open,
    Answered(Answer),
    /// Answered twice: nobody knows which was meant.
    Void(u64),
}

impl<'a> Exchange<'a> {
    fn new(bodies: &'a [&'a str], deadline: Deadline) -> Self {
        Self {
            bodies,
            deadline,
            first: NEXT.fetch_add(bodies.len() as u64, Ordering::Relaxed),
            slots: vec![Slot::Open; bodies.len()],
            answered: 0,
            outgoing: Outgoing::default(),
            incoming: Incoming::default(),
            trouble: None,
        }
    }

    fn run(&mut self, stream: &mut UnixStream) {
        self.trouble = self.talk(stream).err();
    }

    /// Writes and reads in turns, whichever the socket is ready for: a peer that answers before it has read all cannot make both wait.
    fn talk(&mut self, stream: &mut UnixStream) -> Result<(), Trouble> {
        while self.answered < self.slots.len() {
            self.fill();
            let ready = self.wait(stream)?;
            if ready.intersects(PollFlags::IN | PollFlags::HUP | PollFlags::ERR) {
                self.incoming.read(stream)?;
                // what came after the deadline was not said
                self.deadline.remaining()?;
                while let Some(line) = self.incoming.line()? {
                    let answer = Answer::read(&line)?;
                    self.take(answer)?;
                }
            }
            if ready.contains(PollFlags::OUT) {
                self.outgoing.write(stream)?;
            }
        }
        self.incoming.is_empty().then_some(()).ok_or_else(|| {
            Trouble::Garbage("more than an answer to each question was said".to_owned())
        })
    }

    /// Puts more questions up when the last ones are written, as many as may be in flight.
    fn fill(&mut self) {
        if self.outgoing.shut || self.outgoing.has_more() {
            return;
        }
        let asked = self.outgoing.complete();
        let room = MAX_IN_FLIGHT.saturating_sub(asked - self.answered);
        let first = self.first + asked as u64;
        for (id, body) in (first..).zip(self.bodies.iter().skip(asked).take(room)) {
            self.outgoing.push(&wire::line(id, body));
        }
    }

    fn wait(&self, stream: &UnixStream) -> Result<PollFlags, Trouble> {
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, self.outgoing.has_more());
        loop {
            let left = Timespec::try_from(self.deadline.remaining()?)
                .map_err(|_| Trouble::Late(self.deadline.limit))?;
            let mut polled = [PollFd::new(stream, events)];
            match rustix::event::poll(&mut polled, Some(&left)) {
                Ok(0) | Err(rustix::io::Errno::INTR) => {}
                Ok(_) => {
                    let [polled] = polled;
                    return Ok(polled.revents());
                }
                Err(errno) => return Err(Trouble::Broken(io::Error::from(errno).to_string())),
            }
        }
    }

    /// Files an answer under its question, which must have been asked to its last byte.
    fn take(&mut self, (id, answer): (u64, Answer)) -> Result<(), Trouble> {
        let asked = self.outgoing.complete();
        let slot = id
            .checked_sub(self.first)
            .and_then(|at| usize::try_from(at).ok())
            .filter(|at| *at < asked)
            .and_then(|at| self.slots.get_mut(at));
        match slot {
            Some(slot @ Slot::Open) => {
                *slot = Slot::Answered(answer);
                self.answered += 1;
                Ok(())
            }
            Some(slot @ (Slot::Answered(_) | Slot::Void(_))) => {
                *slot = Slot::Void(id);
                Err(Trouble::Twice(id))
            }
            None => Err(Trouble::Unasked(id)),
        }
    }

    fn found_it_closed(&self) -> bool {
        matches!(self.trouble, Some(Trouble::Closed)) && !self.incoming.heard
    }

    fn is_clean(&self) -> bool {
        self.trouble.is_none()
    }

    fn answers(self) -> Vec<Result<Answer, Trouble>> {
        let trouble = self.trouble.unwrap_or(Trouble::Closed);
        let settled = self.slots.into_iter().map(|slot| match slot {
            Slot::Answered(answer) => Ok(answer),
            Slot::Void(id) => Err(Trouble::Twice(id)),
            Slot::Open => Err(trouble.clone()),
        });
        settled.collect()
    }
}

/// Lines on their way out.
#[derive(Debug, Default)]
struct Outgoing {
    bytes: Vec<u8>,
    written: usize,
    /// Where each line in `bytes` ends.
    ends: Vec<usize>,
    /// How many lines went before those.
    before: usize,
    /// Whether the peer reads no more; it may still have something to say.
    shut: bool,
}

impl Outgoing {
    fn push(&mut self, line: &str) {
        if self.written == self.bytes.len() {
            self.before += self.ends.len();
            self.bytes.clear();
            self.ends.clear();
            self.written = 0;
        }
        self.bytes.extend_from_slice(line.as_bytes());
        self.ends.push(self.bytes.len());
    }

    fn has_more(&self) -> bool {
        !self.shut && self.written < self.bytes.len()
    }

    /// Returns how many lines are written to the last byte.
    fn complete(&self) -> usize {
        self.before + self.ends.partition_point(|end| *end <= self.written)
    }

    fn write(&mut self, stream: &mut UnixStream) -> Result<(), Trouble> {
        match stream.write(self.bytes.get(self.written..).unwrap_or_default()) {
            Ok(count) => self.written += count,
            Err(error) if is_passing(&error) => {}
            Err(error) if is_closed(&error) => self.shut = true,
            Err(error) => return Err(Trouble::Broken(error.to_string())),
        }
        Ok(())
    }
}

/// Bytes on their way in, at most one line and a chunk of them.
#[derive(Debug, Default)]
struct Incoming {
    bytes: Vec<u8>,
    /// Where the next line begins.
    begin: usize,
    /// Up to where there is no end of it.
    scanned: usize,
    /// Whether anything ever came.
    heard: bool,
}

impl Incoming {
    fn is_empty(&self) -> bool {
        self.begin == self.bytes.len()
    }

    fn read(&mut self, stream: &mut UnixStream) -> Result<(), Trouble> {
        let mut chunk = [0; CHUNK];
        match stream.read(&mut chunk) {
            Ok(0) => Err(Trouble::Closed),
            Ok(count) => {
                self.heard = true;
                self.bytes.drain(..self.begin);
                self.scanned -= self.begin;
                self.begin = 0;
                self.bytes
                    .extend_from_slice(chunk.get(..count).unwrap_or_default());
                Ok(())
            }
            Err(error) if is_passing(&error) => Ok(()),
            Err(error) if is_closed(&error) => Err(Trouble::Closed),
            Err(error) => Err(Trouble::Broken(error.to_string())),
        }
    }

    /// Returns the next whole line without its end.
    fn line(&mut self) -> Result<Option<Vec<u8>>, Trouble> {
        let unseen = self.bytes.get(self.scanned..).unwrap_or_default();
        let end = unseen.iter().position(|byte| *byte == b'\n');
        self.scanned += end.unwrap_or(unseen.len());
        let line = self.bytes.get(self.begin..self.scanned).unwrap_or_default();
        if line.len() > MAX_LINE {
            return Err(Trouble::LongLine);
        }
        if end.is_none() {
            return Ok(None);
        }
        let line = line.to_vec();
        self.scanned += 1;
        self.begin = self.scanned;
        Ok(Some(line))
    }
}

fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
    )
}

fn is_closed(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
    )
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    #[test]
    fn waiting_for_a_connection_ends_at_the_deadline_and_when_one_is_given_back() {
        let pool = Pool::new("/nowhere".into(), 0);
        let ample = Deadline::after(Duration::from_secs(20));
        let mut seats: Vec<Seat<'_>> = (0..MAX_CONNECTIONS)
            .map(|_| pool.seat(ample).ok().unwrap())
            .collect();
        let limit = Duration::from_millis(50);
        let began = Instant::now();
        assert_eq!(
            pool.seat(Deadline::after(limit)).err(),
            Some(Trouble::Busy(limit))
        );
        assert!(began.elapsed() >= limit);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| pool.seat(ample).is_ok());
            seats.pop();
            assert!(waiting.join().unwrap());
        });
    }

    #[test]
    fn a_socket_that_takes_anothers_place_on_the_way_is_not_asked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let account = folder.path().metadata().unwrap().uid();
        let pool = Pool::new(path.clone(), account);
        let _old = UnixListener::bind(&path).unwrap();
        let before = pool.look().unwrap();
        fs::remove_file(&path).unwrap();
        let _new = UnixListener::bind(&path).unwrap();
        let ample = Deadline::after(Duration::from_secs(20));
        let replaced = Trouble::Replaced(path);
        assert_eq!(pool.connect(before, ample).err(), Some(replaced.clone()));
        assert_eq!(pool.ask(before, &["}"], ample), [Err(replaced)]);
        assert!(pool.connect(pool.look().unwrap(), ample).is_ok());
    }

    #[test]
    fn lines_are_whole_only_when_all_of_them_is_written() {
        let mut outgoing = Outgoing::default();
        outgoing.push("one\n");
        outgoing.push("two\n");
        for (written, complete) in [(0, 0), (3, 0), (4, 1), (7, 1), (8, 2)] {
            outgoing.written = written;
            assert_eq!(outgoing.complete(), complete, "{written}");
        }
        outgoing.push("three\n");
        assert_eq!((outgoing.complete(), outgoing.has_more()), (2, true));
    }
}
