//! Where audit records arrive: a socket that the test itself reads, and a real rsyslogd.

use std::io;
use std::net::Shutdown;
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use crate::child::{PATIENCE, Process, command, eventually, lock};
use crate::realm::read_or_empty;
use crate::scratch::Scratch;

/// Whoever keeps audit records and can be asked for them.
pub trait Records {
    /// Returns all records that arrived so far, one per datagram or line.
    fn records(&self) -> Vec<String>;

    /// Waits for a record for which `look` holds and returns it; fails the test, showing the records, when
    /// `limit` has passed.
    #[track_caller]
    fn wait_for(&self, limit: Duration, look: impl Fn(&str) -> bool) -> String {
        let end = Instant::now() + limit;
        loop {
            let records = self.records();
            if let Some(found) = records.iter().find(|record| look(record)) {
                return found.clone();
            }
            assert!(
                Instant::now() < end,
                "no such record within {limit:?}; there are:\n{}",
                records.join("\n")
            );
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits for a record with all of these words in it, and returns it.
    #[track_caller]
    fn contains(&self, words: &[&str]) -> String {
        let end = Instant::now() + PATIENCE;
        loop {
            let records = self.records();
            if let Some(found) = records
                .iter()
                .find(|r| words.iter().all(|word| r.contains(word)))
            {
                return found.clone();
            }
            assert!(
                Instant::now() < end,
                "no record with all of {words:?}; there are:\n{}",
                records.join("\n")
            );
            thread::sleep(Duration::from_millis(10));
        }
    }
}

/// Returns how long a call took, as the record of its end says.
#[track_caller]
#[must_use]
pub fn took(record: &str) -> Duration {
    let milliseconds = record
        .split_once(" ms=\"")
        .and_then(|(_, rest)| rest.split_once('"'))
        .and_then(|(number, _)| number.parse().ok());
    Duration::from_millis(milliseconds.unwrap_or_else(|| panic!("no time it took in {record}")))
}

/// A syslog socket read by the test: it can stop reading, vanish and come back.
#[derive(Debug)]
pub struct Syslog {
    scratch: Scratch,
    shared: Arc<Shared>,
    reader: Mutex<Option<Reader>>,
}

#[derive(Debug, Default)]
struct Shared {
    records: Mutex<Vec<String>>,
    reading: Mutex<bool>,
    resumed: Condvar,
    gone: AtomicBool,
}

#[derive(Debug)]
struct Reader {
    socket: UnixDatagram,
    thread: JoinHandle<()>,
}

impl Syslog {
    /// Opens the socket and starts to read.
    #[must_use]
    pub fn new() -> Self {
        let syslog = Self {
            scratch: Scratch::new("log"),
            shared: Arc::default(),
            reader: Mutex::new(None),
        };
        *lock(&syslog.shared.reading) = true;
        syslog.come_back();
        syslog
    }

    /// Returns the socket's path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("dev-log")
    }

    /// Stops reading, so that the socket fills up and senders block.
    pub fn stop_reading(&self) {
        *lock(&self.shared.reading) = false;
        // A datagram of no bytes brings the reader, which may sit in recv, to where it looks.
        if let Ok(nudge) = UnixDatagram::unbound() {
            let _ = nudge.send_to(b"", self.path());
        }
    }

    /// Reads on.
    pub fn resume_reading(&self) {
        let mut reading = lock(&self.shared.reading);
        *reading = true;
        self.shared.resumed.notify_all();
    }

    /// Closes the socket and removes its name, as a syslog does that died.
    pub fn vanish(&self) {
        let Some(reader) = lock(&self.reader).take() else {
            return;
        };
        let _ = std::fs::remove_file(self.path());
        {
            // A reader that has looked and does not wait yet would miss the call.
            let _reading = lock(&self.shared.reading);
            self.shared.gone.store(true, Ordering::SeqCst);
            self.shared.resumed.notify_all();
        }
        let _ = reader.socket.shutdown(Shutdown::Both);
        let _ = reader.thread.join();
    }

    /// Opens the socket again under the same name; records from before are kept.
    #[track_caller]
    pub fn come_back(&self) {
        let mut reader = lock(&self.reader);
        if reader.is_some() {
            return;
        }
        self.shared.gone.store(false, Ordering::SeqCst);
        let socket = UnixDatagram::bind(self.path()).expect("a new socket in our own folder");
        let listener = socket.try_clone().expect("a socket can be duplicated");
        let shared = Arc::clone(&self.shared);
        let thread = thread::spawn(move || shared.receive(&listener));
        *reader = Some(Reader { socket, thread });
    }
}

impl Shared {
    fn receive(&self, socket: &UnixDatagram) {
        let mut buffer = vec![0; 1 << 20];
        loop {
            let mut reading = lock(&self.reading);
            while !*reading && !self.gone.load(Ordering::SeqCst) {
                reading = self
                    .resumed
                    .wait(reading)
                    .unwrap_or_else(PoisonError::into_inner);
            }
            drop(reading);
            let got = socket.recv(&mut buffer);
            if self.gone.load(Ordering::SeqCst) {
                return;
            }
            match got {
                Ok(0) => {}
                Ok(n) => {
                    lock(&self.records).push(String::from_utf8_lossy(&buffer[..n]).into_owned());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }
}

impl Records for Syslog {
    fn records(&self) -> Vec<String> {
        lock(&self.shared.records).clone()
    }
}

impl Default for Syslog {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Syslog {
    fn drop(&mut self) {
        self.vanish();
    }
}

/// A real rsyslogd with a socket and a file of its own.
#[derive(Debug)]
pub struct Rsyslog {
    scratch: Scratch,
    daemon: Process,
}

impl Rsyslog {
    /// Starts rsyslogd and waits until its socket is there.
    #[track_caller]
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new("rsyslog");
        let folder = scratch.path().display();
        let conf = scratch.write(
            "rsyslog.conf",
            format!(
                r#"global(workDirectory="{folder}" maxMessageSize="64k")
module(load="imuxsock" SysSock.Use="off")
input(type="imuxsock" Socket="{folder}/dev-log" CreatePath="on" UseSpecialParser="off")
action(type="omfile" file="{folder}/records" template="RSYSLOG_SyslogProtocol23Format" fileCreateMode="0644")
"#
            ),
        );
        let mut rsyslogd = command("rsyslogd");
        rsyslogd
            .arg("-n")
            .arg("-f")
            .arg(&conf)
            .arg("-i")
            .arg(scratch.path().join("pid"));
        let mut daemon = Process::start(rsyslogd);
        let socket = scratch.path().join("dev-log");
        eventually("rsyslogd opens its socket", PATIENCE, || {
            if let Some(outcome) = daemon.outcome() {
                panic!("rsyslogd gave up: {outcome}");
            }
            let probe = UnixDatagram::unbound().ok()?;
            probe.connect(&socket).ok()
        });
        Self { scratch, daemon }
    }

    /// Returns the socket's path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.scratch.path().join("dev-log")
    }

    /// Returns the file that records are written to.
    #[must_use]
    pub fn file(&self) -> PathBuf {
        self.scratch.path().join("records")
    }

    /// Returns the daemon's process.
    #[must_use]
    pub fn process(&self) -> &Process {
        &self.daemon
    }
}

impl Records for Rsyslog {
    fn records(&self) -> Vec<String> {
        read_or_empty(Path::new(&self.file()))
            .lines()
            .map(str::to_owned)
            .collect()
    }
}

impl Default for Rsyslog {
    fn default() -> Self {
        Self::new()
    }
}
