//! The audit log: RFC 5424 records to the local syslog, facility AUTHPRIV. The only file that writes there.
//!
//! A change gets a record before it begins, and waits until that one is written, and a record after; a read gets one. Writing happens on
//! a thread of its own with a bounded wait. What cannot be written waits in a bounded backlog and is sent when syslog is back, in
//! order; how many were lost beyond it is itself a record.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt::Write as _,
    io,
    os::unix::net::{UnixDatagram, UnixStream},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
        mpsc::{self, Receiver, RecvTimeoutError, SyncSender, TrySendError},
    },
    thread,
    time::{Duration, Instant},
};

use syslog::{Facility, Formatter5424, Logger, LoggerBackend};
use tokio::sync::oneshot;

/// Records under way to the writing thread: more means syslog is slower than we are asked.
const QUEUE: usize = 4096;
/// Records kept while syslog is away, a few megabytes.
const BACKLOG: usize = 10_000;
/// How long one record may take to leave: a syslog that does not read fills its socket after some ten messages.
const WRITE_LIMIT: Duration = Duration::from_secs(1);
/// How long a change waits for its first record.
const ACKNOWLEDGE_LIMIT: Duration = Duration::from_secs(3);
/// How often a backlog is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// The longest value in a record, in bytes; callers choose some of them.
const MAX_VALUE: usize = 512;
/// The structured data's name; the number is the one that RFC 5612 sets aside for documents.
const SD_ID: &str = "xman@32473";

/// What kind of record: the MSGID.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A connection was refused, or its handshake failed.
    Refused = 1,
    /// A session began.
    Opened = 2,
    /// A session ended.
    Closed = 3,
    /// A read, or a call that was turned down.
    Call = 4,
    /// A change is about to begin.
    Begin = 5,
    /// A change has ended.
    End = 6,
    /// About the log itself.
    Log = 7,
}

/// One record: fields for programs, a sentence for people. Values are escaped here, so no caller can break a line or forge a field.
#[derive(Clone, Debug)]
pub(crate) struct Record {
    kind: Kind,
    fields: BTreeMap<String, String>,
    sentence: String,
}

impl Record {
    pub(crate) fn new(kind: Kind, sentence: impl AsRef<str>) -> Self {
        Self {
            kind,
            fields: BTreeMap::new(),
            sentence: escape(sentence.as_ref()),
        }
    }

    /// Adds a field; an empty value is left out.
    #[must_use]
    pub(crate) fn with(mut self, name: &'static str, value: impl AsRef<str>) -> Self {
        let value = value.as_ref();
        if !value.is_empty() {
            self.fields.insert(name.to_owned(), escape(value));
        }
        self
    }
}

/// A name as it stands in a sentence: with blanks in it, it could pass for the words around it.
pub(crate) fn quoted(name: &str) -> String {
    if name.contains(|c: char| c.is_whitespace() || matches!(c, '"' | ';')) {
        format!("{name:?}")
    } else {
        name.to_owned()
    }
}

/// Makes one line of anything: control characters, line separators and marks that turn text become `\u{..}`; long values are cut.
fn escape(value: &str) -> String {
    let mut escaped = String::with_capacity(value.len());
    for c in value.chars() {
        if escaped.len() >= MAX_VALUE {
            escaped.push_str("...");
            break;
        }
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            let _ = write!(escaped, "\\u{{{:x}}}", u32::from(c));
        } else {
            escaped.push(c);
        }
    }
    escaped
}

/// Why a record was not written.
#[derive(Debug, thiserror::Error)]
#[error("the audit log cannot be written (syslog: {0})")]
pub(crate) struct Unrecorded(String);

struct Order {
    record: Record,
    written: Option<oneshot::Sender<Result<(), Unrecorded>>>,
}

/// The way to the writing thread.
#[derive(Clone, Debug)]
pub(crate) struct Audit {
    orders: SyncSender<Order>,
    lost: Arc<AtomicU64>,
}

impl Audit {
    /// Starts the writing thread; syslog may be away.
    pub(crate) fn start(socket: &Path) -> io::Result<Self> {
        let (orders, incoming) = mpsc::sync_channel(QUEUE);
        let lost = Arc::new(AtomicU64::new(0));
        let writer = Writer {
            socket: socket.to_owned(),
            logger: None,
            backlog: VecDeque::new(),
            lost: Arc::clone(&lost),
            silent_since: None,
        };
        thread::Builder::new()
            .name("audit".to_owned())
            .spawn(move || writer.run(&incoming))?;
        Ok(Self { orders, lost })
    }

    /// Sends a record on its way without waiting for it.
    pub(crate) fn note(&self, record: Record) {
        match self.orders.try_send(Order {
            record,
            written: None,
        }) {
            Ok(()) => {}
            Err(TrySendError::Full(order) | TrySendError::Disconnected(order)) => {
                self.lost.fetch_add(1, Ordering::Relaxed);
                tracing::error!(
                    sentence = order.record.sentence,
                    "an audit record was lost: syslog is too slow"
                );
            }
        }
    }

    /// Returns once a record is written; one that could not be is forgotten, since what it speaks of will not happen.
    pub(crate) async fn write(&self, record: Record) -> Result<(), Unrecorded> {
        let (written, done) = oneshot::channel();
        self.orders
            .try_send(Order {
                record,
                written: Some(written),
            })
            .map_err(|_| Unrecorded("too many records wait".to_owned()))?;
        match tokio::time::timeout(ACKNOWLEDGE_LIMIT, done).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err(Unrecorded("the writing thread has ended".to_owned())),
            Err(_) => Err(Unrecorded("it does not read".to_owned())),
        }
    }

    /// Waits, at most `limit`, until all that was noted is written.
    pub(crate) async fn flush(&self, limit: Duration) {
        let last = Record::new(Kind::Log, "xmand has stopped");
        let _ = tokio::time::timeout(limit, self.write(last)).await;
    }
}

/// Tells whether syslog takes records, for `--check`. Sends nothing.
pub(crate) fn check(socket: &Path) -> Result<(), String> {
    connect(socket).map(drop).map_err(|error| {
        format!("{error}; start a syslog that listens there, or name its socket in `syslog` (systemd-journald: /run/systemd/journal/dev-log)")
    })
}

struct Writer {
    socket: PathBuf,
    logger: Option<Logger<LoggerBackend, Formatter5424>>,
    backlog: VecDeque<Record>,
    lost: Arc<AtomicU64>,
    /// When syslog last did not read: until a while later the others join the backlog unsent, or each would wait for as long.
    silent_since: Option<Instant>,
}

impl Writer {
    fn run(mut self, incoming: &Receiver<Order>) {
        loop {
            let order = if self.backlog.is_empty() && self.lost.load(Ordering::Relaxed) == 0 {
                incoming.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                incoming.recv_timeout(RETRY)
            };
            match order {
                Ok(order) => self.carry_out(order),
                Err(RecvTimeoutError::Timeout) => {
                    let _ = self.attempt(None);
                }
                Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn carry_out(&mut self, order: Order) {
        if order
            .written
            .as_ref()
            .is_some_and(oneshot::Sender::is_closed)
        {
            return; // who asked has given up, and does not do what it would have recorded
        }
        let sent = self.attempt(Some(&order.record));
        match (sent, order.written) {
            (Ok(()), Some(written)) => {
                let _ = written.send(Ok(()));
            }
            (Ok(()), None) => {}
            (Err(error), Some(written)) => {
                let _ = written.send(Err(Unrecorded(error.to_string())));
            }
            (Err(error), None) => self.keep(order.record, &error),
        }
    }

    /// Sends what waits and then this, unless syslog has just failed to read.
    fn attempt(&mut self, record: Option<&Record>) -> io::Result<()> {
        if self
            .silent_since
            .is_some_and(|since| since.elapsed() < RETRY)
        {
            return Err(io::Error::new(
                io::ErrorKind::WouldBlock,
                "it does not read",
            ));
        }
        let sent = self
            .clear_backlog()
            .and_then(|()| record.map_or(Ok(()), |record| self.send(record)));
        self.silent_since = match &sent {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Some(Instant::now()),
            _ => None,
        };
        sent
    }

    fn keep(&mut self, record: Record, error: &io::Error) {
        if self.backlog.is_empty() {
            tracing::error!(%error, "syslog cannot be reached; audit records wait");
        }
        if self.backlog.len() == BACKLOG {
            self.backlog.pop_front();
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
        self.backlog.push_back(record);
    }

    fn clear_backlog(&mut self) -> io::Result<()> {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            self.send(&Record::new(
                Kind::Log,
                format!("{lost} audit records were lost while syslog was away"),
            ))?;
            self.lost.fetch_sub(lost, Ordering::Relaxed);
        }
        while let Some(record) = self.backlog.pop_front() {
            if let Err(error) = self.send(&record) {
                self.backlog.push_front(record);
                return Err(error);
            }
        }
        Ok(())
    }

    /// Sends one record, over a fresh connection if the old one is gone: syslog daemons restart.
    fn send(&mut self, record: &Record) -> io::Result<()> {
        if let Some(logger) = &mut self.logger {
            match log(logger, record) {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => self.logger = None,
                done => return done,
            }
        }
        let mut logger = connect(&self.socket)?;
        log(&mut logger, record)?;
        self.logger = Some(logger);
        Ok(())
    }
}

fn log(logger: &mut Logger<LoggerBackend, Formatter5424>, record: &Record) -> io::Result<()> {
    let data = BTreeMap::from([(SD_ID.to_owned(), record.fields.clone())]);
    let message = (record.kind as u32, data, &record.sentence);
    let sent = match record.kind {
        Kind::Refused | Kind::Log => logger.warning(message),
        Kind::Begin | Kind::End => logger.notice(message),
        Kind::Opened | Kind::Closed | Kind::Call => logger.info(message),
    };
    sent.map_err(|error| match error {
        syslog::Error::Io(error) | syslog::Error::Write(error) => error,
        other => io::Error::other(other),
    })
}

fn connect(socket: &Path) -> io::Result<Logger<LoggerBackend, Formatter5424>> {
    let datagram = UnixDatagram::unbound()?;
    let backend = match datagram.connect(socket) {
        Ok(()) => {
            datagram.set_write_timeout(Some(WRITE_LIMIT))?;
            LoggerBackend::Unix(datagram)
        }
        Err(error) => {
            let stream = UnixStream::connect(socket).map_err(|_| error)?;
            stream.set_write_timeout(Some(WRITE_LIMIT))?;
            LoggerBackend::UnixStream(io::BufWriter::new(stream))
        }
    };
    let formatter = Formatter5424 {
        facility: Facility::LOG_AUTHPRIV,
        process: "xmand".to_owned(),
        ..Formatter5424::default()
    };
    Ok(Logger::new(backend, formatter))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_a_caller_sends_breaks_a_line_or_turns_it_round() {
        assert_eq!(
            escape("a\nb\0c\u{1b}[2J\u{2028}\u{202e}"),
            r"a\u{a}b\u{0}c\u{1b}[2J\u{2028}\u{202e}"
        );
        assert_eq!(escape("Bücher \"]"), "Bücher \"]"); // quotes and brackets are the formatter's to escape
        assert!(escape(&"x".repeat(100_000)).len() < MAX_VALUE + 8);
    }

    #[test]
    fn a_name_with_blanks_cannot_pass_for_the_words_around_it() {
        assert_eq!(quoted("web-1.ä"), "web-1.ä");
        assert_eq!(quoted("x from ::1: allow"), r#""x from ::1: allow""#);
        assert_eq!(quoted(r#"x" y"#), r#""x\" y""#);
        assert_eq!(quoted("x\u{a0}y"), r#""x\u{a0}y""#);
    }

    #[test]
    fn a_quote_or_bracket_in_a_value_stays_inside_the_field() {
        let formatter = Formatter5424 {
            facility: Facility::LOG_AUTHPRIV,
            ..Formatter5424::default()
        };
        let record = Record::new(Kind::Call, "x").with("domain", "a\"] [forged@1 b=\"c");
        let data = BTreeMap::from([(SD_ID.to_owned(), record.fields)]);
        assert_eq!(
            formatter.format_5424_structured_data(data),
            r#"[xman@32473 domain="a\"\] [forged@1 b=\"c"]"#
        );
    }
}
