//! `events`: what happens to domains on many hosts, as it happens, without a gap that is not told.
//!
//! ```text
//! host --call from its last cursor--> Items --> printed, one line each --> the cursor goes on
//!   ^                                                                           |
//!   '-- pause <-- connection broken, host busy or away            --cursor-file, once a second
//! ```
//! A cursor goes on when its event is printed, never before: whoever starts again from it sees the next one.

use std::{
    cell::RefCell,
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    ops::ControlFlow,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{Notify, watch},
    time::{Instant, MissedTickBehavior, interval, sleep},
};
use uuid::Uuid;
use xman_client::{
    Address, CallError, ConnectError, Event, Explanation, Failure, Kind, Wait, fleet,
};
use xman_common::{
    channel::ChannelError,
    gss::Trouble,
    protocol::{Code, Cursor, EventRow, Events, Gap, Item, MAX_PATTERNS, Request},
};

use crate::{
    clean,
    exit::Tally,
    heard::conclude,
    options::Format,
    output::{Unprinted, error_value},
    setting::{Setting, Stop, misfit},
    target::list_questions,
    units::moment,
};

/// What `rxm help events` says after the options.
pub(crate) const HELP: &str = "\
Prints a line for each event: when, where, to which domain, what, why (in libvirt's words), and the domain's state when the host had looked. \
    It goes on until Ctrl-C, which is no failure; a host that breaks away is called again and gone on with where it was.

A host keeps its last events, so that nothing is missed in between: a cursor is a place among them. What a host cannot tell any more, \
    or could not see, is said in a line of its own ('gap'): look with 'rxm list' then. \
    With --cursor-file a program that is started again goes on where it ended; after a crash it may see the last second twice.

Examples:
  rxm -H skirit80 events
  rxm -H @grid events 'grid-*' -o json
  rxm -H @grid -o json events --cursor-file /var/lib/mine/cursors
  rxm -H skirit80 events --all --no-follow        what the host still knows
  rxm -H skirit80 events --since 67e5504410b1426f9247bb680e5fe0c8.17

JSON is one object a line: host, time (UTC), domain, uuid, hypervisor, event (defined, undefined, renamed, started, paused, resumed, \
    shutting-down, stopped, sleeping, crashed, rebooted, labelled, found, standing (towards jobs)), detail, state, cursor; what is missing has gap (why) in place of \
    domain, uuid, event, detail and state, and a hypervisor that is null where all are meant. A host that is given up has error.";

/// Arguments of `events`.
#[derive(Debug, Args)]
pub(crate) struct EventsArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// First what has happened since that cursor; of several hosts each has its own
    #[arg(
        long,
        value_name = "[HOST=]CURSOR",
        conflicts_with_all = ["cursor_file", "all"]
    )]
    pub(crate) since: Vec<String>,
    /// Go on from the cursors in this file where it has them, and keep it up to date
    #[arg(long, value_name = "FILE")]
    pub(crate) cursor_file: Option<PathBuf>,
    /// First all that the hosts still know of, where there is no cursor
    #[arg(long)]
    pub(crate) all: bool,
    /// End with what has happened up to now
    #[arg(long)]
    pub(crate) no_follow: bool,
    /// End after so many events
    #[arg(short = 'n', long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub(crate) count: Option<u64>,
}

/// The pause after a first try that failed, which doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// A connection that held so long was a good one: the pauses begin anew.
const GOOD_CONNECTION: Duration = Duration::from_secs(60);
/// How often cursors are written to their file.
const SAVE: Duration = Duration::from_secs(1);
/// How long whoever reads our output may keep us from ending when we are told to.
const LAST_LINE: Duration = Duration::from_secs(2);
/// A file of cursors has no reason to be longer, in bytes.
const MAX_FILE: u64 = 1024 * 1024;
/// Columns of the table, in characters; what is longer moves the rest.
const TIME_WIDTH: usize = 19;
const DOMAIN_WIDTH: usize = 20;
const EVENT_WIDTH: usize = 13;
const DETAIL_WIDTH: usize = 16;
const STATE_WIDTH: usize = 13;

/// The cursor before all that a host still knows.
const OLDEST: Cursor = Cursor {
    book: Uuid::nil(),
    number: 0,
};

/// `rxm events`
pub(crate) async fn events(setting: &Setting, args: EventsArgs) -> Result<Tally, Stop> {
    match setting.output.format {
        Format::Yaml => {
            return Err(Stop::Usage(
                "what is followed has no end and so is no YAML; -o json writes one object a line"
                    .to_owned(),
            ));
        }
        Format::Table | Format::Wide | Format::Json | Format::Name => {}
    }
    let questions = list_questions(setting, &args.patterns)?;
    if let Some((host, patterns)) = questions
        .iter()
        .find(|(_, patterns)| patterns.len() > MAX_PATTERNS)
    {
        return Err(Stop::Usage(format!(
            "{} patterns for {host}; one host takes at most {MAX_PATTERNS}",
            patterns.len()
        )));
    }
    let hosts: Vec<_> = questions.iter().map(|(host, _)| host.clone()).collect();
    let record = Record::open(args.cursor_file.clone())?;
    let mut begin: BTreeMap<String, Cursor> = BTreeMap::new();
    for since in &args.since {
        let (host, cursor) = since_of(setting, since, &hosts)?;
        begin.insert(host.to_string(), cursor);
    }
    for host in hosts.iter().map(Address::to_string) {
        let known = record.known(&host);
        if let Some(cursor) = known.or_else(|| args.all.then_some(OLDEST)) {
            begin.entry(host).or_insert(cursor);
        }
    }
    setting.check_ticket().await?;
    let follower = Follower {
        setting,
        follow: !args.no_follow,
        printer: Printer::new(setting, &hosts, args.count),
        record: RefCell::new(record),
        begin,
    };
    follower.run(questions).await
}

/// Reads `CURSOR`, which is enough for one host, or `HOST=CURSOR`.
fn since_of(setting: &Setting, text: &str, hosts: &[Address]) -> Result<(Address, Cursor), Stop> {
    let (host, cursor) = match (text.rsplit_once('='), hosts) {
        (None, [host]) => (host.clone(), text),
        (None, _) => {
            return Err(Stop::Usage(format!(
                "--since {text}: {} hosts are asked; say which one's cursor it is, as HOST={text}",
                hosts.len()
            )));
        }
        (Some((host, cursor)), _) => match setting.hosts_before_slash(host)?.as_slice() {
            [host] if hosts.contains(host) => (host.clone(), cursor),
            [host] => {
                return Err(Stop::Usage(format!(
                    "--since {text}: {host} is not among the hosts that are asked"
                )));
            }
            _ => {
                return Err(Stop::Usage(format!(
                    "--since {text}: a cursor is one host's"
                )));
            }
        },
    };
    let cursor = cursor
        .parse()
        .map_err(|error| Stop::Usage(format!("--since {text}: {error}")))?;
    Ok((host, cursor))
}

type Heard = (Address, Result<(), Explanation>);

struct Follower<'a> {
    setting: &'a Setting,
    follow: bool,
    printer: Printer<'a>,
    record: RefCell<Record>,
    begin: BTreeMap<String, Cursor>,
}

impl Follower<'_> {
    /// Follows all hosts at once until somebody has enough, and ends with the last cursors written down.
    async fn run(&self, questions: Vec<(Address, Vec<String>)>) -> Result<Tally, Stop> {
        self.save()?;
        let heard = RefCell::new(Vec::new());
        let width = questions.len();
        let all = fleet::each(
            questions,
            width,
            |(address, patterns)| async move {
                let ended = self.host(&address, patterns).await;
                if let Err(error) = &ended {
                    self.printer.error(&address, error);
                }
                (address, ended)
            },
            |ended: Heard| {
                heard.borrow_mut().push(ended);
                ControlFlow::Continue(())
            },
        );
        let told = told_to_end(self.setting)?;
        let mut due = interval(SAVE);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        tokio::pin!(all, told);
        let unsaved = loop {
            tokio::select! {
                biased;
                () = &mut told => break Ok(()),
                () = self.printer.enough.notified() => break Ok(()),
                _ = due.tick() => if let Err(error) = self.save() {
                    break Err(error);
                },
                () = &mut all => break Ok(()),
            }
        };
        unsaved.and_then(|()| self.save())?;
        if let Some(unprinted) = self.printer.unprinted() {
            return Err(unprinted.into());
        }
        Ok(conclude(self.setting, &heard.take()))
    }

    fn save(&self) -> Result<(), Stop> {
        self.record.borrow_mut().save()
    }

    /// Follows one host through whatever passes; ends with what does not, or with the last event where nothing is followed.
    async fn host(&self, address: &Address, patterns: Vec<String>) -> Result<(), Explanation> {
        let mut at = self.begin.get(&address.to_string()).copied();
        let (mut pause, mut tried, mut met, mut is_away) = (FIRST_PAUSE, 0, false, false);
        let begun = Instant::now();
        loop {
            let request = Request::Events(Events {
                patterns: patterns.clone(),
                since: at,
                follow: self.follow,
            });
            let tries = Instant::now();
            let mut unheard = None;
            let ended = self
                .setting
                .caller_once(address)
                .call(&request, Uuid::new_v4(), self.wait(), |event| {
                    let Event::Items(items) = event else {
                        if let Event::Expiring(seconds) = event {
                            self.setting.warn_of_expiry(seconds);
                        }
                        return ControlFlow::Continue(());
                    };
                    if std::mem::take(&mut is_away) {
                        let note = format!("{address}: it answers again");
                        self.setting.output.note(&note);
                    }
                    met = true;
                    for item in items {
                        match self.take(address, item) {
                            Ok(cursor) => at = Some(cursor),
                            Err(why) => {
                                unheard = Some(why);
                                return ControlFlow::Break(());
                            }
                        }
                    }
                    ControlFlow::Continue(())
                })
                .await;
            let failure = match (unheard, ended) {
                (Some(Unheard::Misfit), _) => return Err(misfit()),
                (Some(Unheard::Enough), _) | (None, Ok(_)) => return Ok(()),
                (None, Err(failure)) => failure,
            };
            // Whoever pressed Ctrl-C has heard enough, whether the call or the follower learns of it first.
            if self.setting.patience.interrupt.is_raised() {
                return Ok(());
            }
            let explanation = self.setting.explain(&failure, address);
            tried += 1;
            let is_last = !self.follow
                && (tried >= self.setting.patience.tries
                    || begun.elapsed() >= self.setting.patience.timeout);
            if is_last || !passes(&failure, met) {
                return Err(self.setting.of_denial(explanation, &request));
            }
            if !std::mem::replace(&mut is_away, true) {
                let note = format!("{address}: {}; trying again", explanation.what);
                self.setting.output.note(&note);
            }
            if tries.elapsed() > GOOD_CONNECTION {
                pause = FIRST_PAUSE;
            }
            sleep(spread(pause, chance())).await;
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn wait(&self) -> Wait {
        if self.follow {
            Wait::Follow
        } else {
            Wait::Deadline
        }
    }

    /// Prints an item and returns where it leads.
    fn take(&self, address: &Address, item: Item) -> Result<Cursor, Unheard> {
        let cursor = match item {
            Item::Cursor(cursor) => Ok(cursor),
            Item::Event(row) => self.printer.event(address, &row).map(|()| row.cursor),
            Item::Gap(gap) => self.printer.gap(address, &gap).map(|()| gap.cursor),
            Item::Domain(_)
            | Item::Text(_)
            | Item::Job(_)
            | Item::Trouble(_)
            | Item::Image(_)
            | Item::Bytes(_)
            | Item::Console(_)
            | Item::Lease(_)
            | Item::Status(_) => Err(Unheard::Misfit),
        }?;
        self.record.borrow_mut().note(address, cursor);
        self.printer.look_for_the_end()?;
        Ok(cursor)
    }
}

/// Why an item leads nowhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Unheard {
    /// It belongs to another question.
    Misfit,
    /// Nobody wants to hear more.
    Enough,
}

/// Returns whether a failure may be gone later; a name that leads nowhere, or a KDC that is silent, may for a host that was met before.
fn passes(failure: &Failure, met: bool) -> bool {
    let of_fault = |code: Code| matches!(code, Code::Busy | Code::Unavailable | Code::Unknown);
    match failure {
        Failure::Connect(error) => match error {
            ConnectError::Unreachable { .. } | ConnectError::Timeout { .. } => true,
            ConnectError::Closing(fault) => of_fault(fault.code),
            ConnectError::Lookup(_) => met,
            ConnectError::Channel(error) => match error {
                ChannelError::Wire(_) | ChannelError::NoRoom | ChannelError::Closed => true,
                ChannelError::Gss(error) => met && error.trouble == Trouble::KdcUnreachable,
                ChannelError::Refused { .. }
                | ChannelError::NotXman
                | ChannelError::Version
                | ChannelError::Tampered
                | ChannelError::Broken(_)
                | ChannelError::Codec(_) => false,
            },
        },
        Failure::Call(CallError::Fault(fault)) => of_fault(fault.code),
        Failure::Call(CallError::Lost(_) | CallError::Unsent(_)) => true,
        Failure::Call(CallError::TooLarge { .. } | CallError::Cancelled(_))
        | Failure::Interrupted => false,
    }
}

/// Shortens a pause by up to a half, so that many who were cut off at once do not come back at once.
fn spread(pause: Duration, chance: u8) -> Duration {
    pause - pause * u32::from(chance) / 512
}

fn chance() -> u8 {
    let [byte, ..] = *Uuid::new_v4().as_bytes();
    byte
}

/// Returns when Ctrl-C or SIGTERM says so. Whoever blocks our output does not keep us for ever.
fn told_to_end(setting: &Setting) -> Result<impl Future<Output = ()>, Stop> {
    let mut terminate = signal(SignalKind::terminate())
        .map_err(|error| Stop::Failed(Kind::Refused, format!("cannot catch signals: {error}")))?;
    let interrupt = setting.patience.interrupt.clone();
    let (tell, mut told) = watch::channel(false);
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            () = interrupt.raised() => {}
        }
        let _ = tell.send(true);
        sleep(LAST_LINE).await;
        std::process::exit(0);
    });
    Ok(async move {
        let _ = told.wait_for(|told| *told).await;
    })
}

/// Prints lines as they come, of all hosts.
struct Printer<'a> {
    setting: &'a Setting,
    host_width: usize,
    /// Wakes the follower when nobody wants to hear more.
    enough: Notify,
    state: RefCell<Printed>,
}

#[derive(Debug, Default)]
struct Printed {
    has_header: bool,
    /// Events that are still wanted; all without.
    left: Option<u64>,
    unprinted: Option<Unprinted>,
}

impl<'a> Printer<'a> {
    fn new(setting: &'a Setting, hosts: &[Address], count: Option<u64>) -> Self {
        let widths = hosts.iter().map(|host| host.to_string().chars().count());
        Self {
            setting,
            host_width: widths.max().unwrap_or_default().max("HOST".len()),
            enough: Notify::new(),
            state: RefCell::new(Printed {
                left: count,
                ..Printed::default()
            }),
        }
    }

    fn event(&self, address: &Address, row: &EventRow) -> Result<(), Unheard> {
        let host = address.to_string();
        match self.setting.output.format {
            Format::Json | Format::Yaml => self.value(event_value(&host, row)),
            Format::Name => self.line(&format!("{host}/{}", row.name)),
            format @ (Format::Table | Format::Wide) => {
                let line = self.columns([
                    &moment(row.at_ms / 1000),
                    &host,
                    row.name.as_str(),
                    row.what.name(),
                    &row.detail,
                    row.state.name(),
                ]);
                let more = format!("  {}  {}  {}", row.uuid, row.hypervisor, row.cursor);
                self.table_line(&line, &more, format)
            }
        }?;
        let mut state = self.state.borrow_mut();
        state.left = state.left.map(|left| left.saturating_sub(1));
        Ok(())
    }

    /// What is missing is no event: it is told whatever is counted, and by names it cannot be.
    fn gap(&self, address: &Address, gap: &Gap) -> Result<(), Unheard> {
        let host = address.to_string();
        let about = match gap.hypervisor.as_str() {
            "" => String::new(),
            uri => format!("{uri}: "),
        };
        let said = format!("{about}{}", gap.why);
        match self.setting.output.format {
            Format::Json | Format::Yaml => self.value(gap_value(&host, gap)),
            Format::Name => {
                self.setting.output.say(&format!("{host}: gap: {said}"));
                Ok(())
            }
            format @ (Format::Table | Format::Wide) => {
                let line = format!(
                    "{:TIME_WIDTH$}  {host:width$}  gap: {said}",
                    moment(gap.at_ms / 1000),
                    width = self.host_width
                );
                self.table_line(&line, &format!("  {}", gap.cursor), format)
            }
        }
    }

    /// Programs hear of a host that is given up where they hear of everything.
    fn error(&self, address: &Address, error: &Explanation) {
        if self.setting.output.is_structured() {
            let _ = self.value(error_value(address, error));
        }
    }

    fn columns(&self, cells: [&str; 6]) -> String {
        let [time, host, domain, what, detail, state] = cells;
        let width = self.host_width;
        let detail = if detail.is_empty() { "-" } else { detail };
        format!(
            "{time:TIME_WIDTH$}  {host:width$}  {domain:DOMAIN_WIDTH$}  {what:EVENT_WIDTH$}  {detail:DETAIL_WIDTH$}  {state:STATE_WIDTH$}"
        )
    }

    fn table_line(&self, line: &str, more: &str, format: Format) -> Result<(), Unheard> {
        let is_wide = format == Format::Wide;
        if !std::mem::replace(&mut self.state.borrow_mut().has_header, true)
            && self.setting.output.has_headers
        {
            let header = self.columns(["TIME", "HOST", "DOMAIN", "EVENT", "DETAIL", "STATE"]);
            let more = if is_wide {
                "  UUID  HYPERVISOR  CURSOR"
            } else {
                ""
            };
            self.line(&format!("{header}{more}"))?;
        }
        let more = if is_wide { more } else { "" };
        self.line(&format!("{line}{more}"))
    }

    fn line(&self, line: &str) -> Result<(), Unheard> {
        self.done(self.setting.output.line(line.trim_end()))
    }

    fn value(&self, mut value: Value) -> Result<(), Unheard> {
        if self.setting.output.is_terminal
            && let Value::Object(fields) = &mut value
        {
            for text in fields.values_mut() {
                if let Value::String(text) = text {
                    *text = clean::line(text).into_owned();
                }
            }
        }
        self.done(self.setting.output.raw(&format!("{value}\n")))
    }

    fn done(&self, printed: Result<(), Unprinted>) -> Result<(), Unheard> {
        printed.map_err(|error| {
            self.state.borrow_mut().unprinted.get_or_insert(error);
            self.enough.notify_one();
            Unheard::Enough
        })
    }

    fn look_for_the_end(&self) -> Result<(), Unheard> {
        if self.state.borrow().left != Some(0) {
            return Ok(());
        }
        self.enough.notify_one();
        Err(Unheard::Enough)
    }

    fn unprinted(&self) -> Option<Unprinted> {
        self.state.borrow_mut().unprinted.take()
    }
}

/// An event as JSON has it.
fn event_value(host: &str, row: &EventRow) -> Value {
    json!({
        "host": host,
        "time": timestamp(row.at_ms),
        "domain": row.name,
        "uuid": row.uuid,
        "hypervisor": row.hypervisor,
        "event": row.what.name(),
        "detail": row.detail,
        "state": row.state.name(),
        "cursor": row.cursor.to_string(),
    })
}

/// What is missing, as JSON has it.
fn gap_value(host: &str, gap: &Gap) -> Value {
    let hypervisor = Some(&gap.hypervisor).filter(|uri| !uri.is_empty());
    json!({
        "host": host,
        "time": timestamp(gap.at_ms),
        "hypervisor": hypervisor,
        "gap": gap.why,
        "cursor": gap.cursor.to_string(),
    })
}

/// A point in time as programs read it, in UTC.
fn timestamp(at_ms: u64) -> Option<String> {
    let at = i64::try_from(at_ms).ok()?;
    let at = Timestamp::from_millisecond(at).ok()?;
    Some(format!("{at:.3}"))
}

/// How far each host was followed, and the file that keeps it.
#[derive(Debug, Default)]
struct Record {
    path: Option<PathBuf>,
    cursors: BTreeMap<String, Cursor>,
    is_saved: bool,
}

impl Record {
    /// Reads the file; one that is not there yet is empty.
    fn open(path: Option<PathBuf>) -> Result<Self, Stop> {
        let cursors = match &path {
            None => BTreeMap::new(),
            Some(path) => read(path)
                .map_err(|error| format!("cannot be read: {error}"))
                .and_then(|text| cursors(&text))
                .map_err(|why| Stop::Usage(format!("--cursor-file {}: {why}", path.display())))?,
        };
        Ok(Self {
            path,
            cursors,
            is_saved: false,
        })
    }

    fn known(&self, host: &str) -> Option<Cursor> {
        self.cursors.get(host).copied()
    }

    fn note(&mut self, address: &Address, cursor: Cursor) {
        let before = self.cursors.insert(address.to_string(), cursor);
        self.is_saved &= before == Some(cursor);
    }

    /// Writes the file where it is not what it should be: whole, and by renaming.
    fn save(&mut self) -> Result<(), Stop> {
        let Some(path) = self.path.as_ref().filter(|_| !self.is_saved) else {
            return Ok(());
        };
        write(path, &self.cursors).map_err(|error| {
            Stop::Failed(
                Kind::Refused,
                format!(
                    "--cursor-file {}: cannot be written: {error}; what was printed since it was last written will be printed again",
                    path.display()
                ),
            )
        })?;
        self.is_saved = true;
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<String> {
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    file.take(MAX_FILE + 1).read_to_string(&mut text)?;
    if text.len() as u64 > MAX_FILE {
        return Err(io::Error::other("it is no file of cursors: too long"));
    }
    Ok(text)
}

/// Reads lines of `HOST=CURSOR`.
fn cursors(text: &str) -> Result<BTreeMap<String, Cursor>, String> {
    let line = |(number, line): (usize, &str)| {
        let wrong = || {
            format!(
                "line {number} is not HOST=CURSOR; what cannot be read is not guessed, and without the file all begins anew"
            )
        };
        let (host, cursor) = line.rsplit_once('=').ok_or_else(wrong)?;
        let cursor = cursor.parse().map_err(|_| wrong())?;
        Ok((host.to_owned(), cursor))
    };
    (1..)
        .zip(text.lines())
        .filter(|(_, text)| !text.is_empty())
        .map(line)
        .collect()
}

fn write(path: &Path, cursors: &BTreeMap<String, Cursor>) -> io::Result<()> {
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        Some(_) | None => Path::new("."),
    };
    let mut file = tempfile::NamedTempFile::new_in(folder)?;
    for (host, cursor) in cursors {
        writeln!(file, "{host}={cursor}")?;
    }
    file.as_file().sync_data()?;
    file.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use xman_client::session::{Loss, Stage};
    use xman_common::{
        gss::GssError,
        protocol::{DomainState, Fault, Happening},
    };

    use super::*;

    fn cursor(number: u64) -> Cursor {
        Cursor {
            book: Uuid::from_u128(7),
            number,
        }
    }

    #[test]
    fn json_has_stable_names() {
        let row = EventRow {
            cursor: cursor(3),
            at_ms: 1_700_000_000_123,
            hypervisor: "qemu:///system".to_owned(),
            name: "web".parse().unwrap(),
            uuid: Uuid::from_u128(1),
            what: Happening::ShuttingDown,
            detail: "guest".to_owned(),
            state: DomainState::Off,
        };
        assert_eq!(
            event_value("h", &row).to_string(),
            r#"{"host":"h","time":"2023-11-14T22:13:20.123Z","domain":"web","uuid":"00000000-0000-0000-0000-000000000001","hypervisor":"qemu:///system","event":"shutting-down","detail":"guest","state":"off","cursor":"00000000000000000000000000000007.3"}"#
        );
        let gap = Gap {
            cursor: cursor(4),
            at_ms: 0,
            hypervisor: String::new(),
            why: "a\nb".to_owned(),
        };
        assert_eq!(
            gap_value("h", &gap).to_string(),
            r#"{"host":"h","time":"1970-01-01T00:00:00.000Z","hypervisor":null,"gap":"a\nb","cursor":"00000000000000000000000000000007.4"}"#
        );
    }

    #[test]
    fn cursors_are_kept_for_all_hosts_and_nothing_is_guessed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cursors");
        let mut record = Record::open(Some(path.clone())).unwrap();
        record.note(&"a".parse().unwrap(), cursor(1));
        record.note(&"[::1]:7".parse().unwrap(), cursor(2));
        record.save().unwrap();
        let mut record = Record::open(Some(path.clone())).unwrap();
        assert_eq!(record.known("[::1]:7"), Some(cursor(2)));
        record.note(&"a".parse().unwrap(), cursor(9));
        record.save().unwrap();
        let record = Record::open(Some(path.clone())).unwrap();
        assert_eq!(
            (record.known("a"), record.known("[::1]:7")),
            (Some(cursor(9)), Some(cursor(2)))
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
        for wrong in ["a", "a=b", "a=1.2\n", "\u{0}"] {
            fs::write(&path, wrong).unwrap();
            assert!(Record::open(Some(path.clone())).is_err(), "{wrong}");
        }
        let mut record = Record::open(Some(folder.path().join("no/such/folder"))).unwrap();
        assert!(record.save().is_err());
        assert!(Record::open(None).unwrap().save().is_ok());
    }

    #[test]
    fn what_may_pass_is_tried_again_and_nothing_else() {
        let fault = |code| Failure::Call(CallError::Fault(Fault::new(code, "")));
        for code in [Code::Busy, Code::Unavailable] {
            assert!(passes(&fault(code), false));
        }
        for code in [
            Code::Denied,
            Code::BadRequest,
            Code::Unsupported,
            Code::Internal,
        ] {
            assert!(!passes(&fault(code), true));
        }
        assert!(passes(&CallError::Lost(Loss::Closed).into(), false));
        assert!(!passes(&CallError::Cancelled(None).into(), true));
        let late = ConnectError::Timeout {
            stage: Stage::Dial,
            after: Duration::ZERO,
        };
        assert!(passes(&late.into(), false));
        let unknown = || Failure::from(ConnectError::Lookup(io::ErrorKind::NotFound.into()));
        assert!(!passes(&unknown(), false) && passes(&unknown(), true));
        let gss = |trouble| {
            let text = String::new();
            let error = GssError { trouble, text };
            Failure::from(ConnectError::Channel(error.into()))
        };
        assert!(passes(&gss(Trouble::KdcUnreachable), true));
        assert!(!passes(&gss(Trouble::KdcUnreachable), false));
        assert!(!passes(&gss(Trouble::NoTicket), true));
    }

    #[test]
    fn pauses_are_spread() {
        let pause = Duration::from_secs(4);
        assert_eq!(spread(pause, 0), pause);
        assert!(spread(pause, 255) >= pause / 2 && spread(pause, 255) < pause);
    }
}
