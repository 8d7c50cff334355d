//! `console`: a guest's serial console on this terminal, or in a pipe.
//!
//! ```text
//! terminal --> keyboard (a thread) --> escape? leave : what waits --> the host, as fast as the guest takes it
//! terminal <-- screen <-- items of the host, as they are
//! ```
//! Nothing is typed before the host says that one is attached, and nothing is ever typed twice: a connection that breaks ends it.

use std::{
    fs::{File, OpenOptions},
    io::{self, IsTerminal, Read, Write},
    ops::ControlFlow,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::Args;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    fs::OFlags,
    io::Errno,
    stdio::stdin,
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::{mpsc, watch},
    time::sleep,
};
use xman_client::{Event, Failure, Interrupt, Kind};
use xman_common::{
    name::Principal,
    protocol::{Console, ConsoleNews, Item, MAX_INPUT, Request, Verb},
};

use crate::{
    change::rehearse,
    clean,
    exit::Tally,
    heard::conclude,
    output::Unprinted,
    setting::{Setting, Stop, misfit},
    target::{self, Purpose},
    terminal,
};

/// What `rxm help console` says after the options.
pub(crate) const HELP: &str = "\
The first who comes has the keyboard; who comes later reads along. --force takes the keyboard over, and everybody \
    there is told. When who types leaves, the keyboard goes to who has waited longest.

Ctrl-] leaves at once, also in the middle of a paste; the guest stays as it is, logged in or not. Every other key goes to the guest, \
    Ctrl-C and Ctrl-Z too. --escape chooses another key, for a guest that needs Ctrl-].

A guest can write anything to your terminal, as with virsh console or a serial line: `reset` mends a terminal that it \
    left in disorder. The window's size is not told to the guest unless you tell it, and resizing types nothing.

Without a terminal on standard input, what is piped is typed, and what the guest writes is printed until it ends or \
    --timeout is over.

Examples:
  rxm console skirit80/web
  rxm console --force skirit80/web
  rxm console --log web.log skirit80/web
  echo uptime | rxm console --timeout 5s skirit80/web";

/// Arguments of `console`.
#[derive(Debug, Args)]
pub(crate) struct ConsoleArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// Take the keyboard over from whoever has it, also from another program on the host
    #[arg(long)]
    pub(crate) force: bool,
    /// Append all that the guest writes to a file, as it comes
    #[arg(long, value_name = "FILE")]
    pub(crate) log: Option<PathBuf>,
    /// The key that leaves: ^] or another ^X, one character, or none
    #[arg(short, long, value_name = "KEY", default_value = "^]", value_parser = Escape::parse)]
    pub(crate) escape: Escape,
    /// Type `stty rows R cols C` with this window's size at the beginning: for a guest that is at a shell's prompt
    #[arg(long)]
    pub(crate) size: bool,
}

/// Bytes that are read ahead of what the guest takes, so that the escape is seen behind a paste: beyond that the terminal itself waits.
const AHEAD: usize = 1024 * 1024;
/// Bytes of one read; a terminal gives no more at a time.
const KEYS: usize = 4096;
/// How long what waits lies before it is tried again.
const AGAIN: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 20_000_000,
};
/// What was typed right before the escape has so long to get to the guest.
const LAST_KEYS: Duration = Duration::from_millis(300);
/// After the escape rxm ends within this time even if its output is held up or the host is silent.
const LAST_WORD: Duration = Duration::from_secs(5);
/// Pieces between keyboard and connection.
const PIECES: usize = 4;

/// The key that leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Escape(Option<u8>);

impl Escape {
    /// Reads `^]`, a single character, or `none`.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let usage = || format!("'{text}' is no key; write ^] or ^A, one character, or none");
        if text == "none" {
            return Ok(Self(None));
        }
        match text.as_bytes() {
            [b'^', b'?'] => Ok(Self(Some(0x7f))),
            [b'^', letter @ (b'@'..=b'_' | b'a'..=b'z')] => Ok(Self(Some(letter & 0x1f))),
            [b'^', _] => Err(usage()),
            [key] if key.is_ascii_graphic() => Ok(Self(Some(*key))),
            _ => Err(usage()),
        }
    }

    /// Says how one leaves.
    fn advice(self) -> String {
        match self.0 {
            None => "a signal ends it".to_owned(),
            Some(0x7f) => "Ctrl-? leaves".to_owned(),
            Some(key @ 0..0x20) => format!("Ctrl-{} leaves", char::from(key | 0x40)),
            Some(key) => format!("{} leaves", char::from(key)),
        }
    }

    /// Returns what comes before the key, if it is there.
    fn before(self, keys: &[u8]) -> Option<&[u8]> {
        let at = keys.iter().position(|key| Some(*key) == self.0)?;
        keys.get(..at)
    }
}

/// Why one leaves.
#[derive(Clone, Debug)]
enum Why {
    Escape,
    /// With the number of the signal.
    Signal(u8),
    /// Without a terminal, after so long.
    Time,
    /// Somebody else has the keyboard, and what is piped goes nowhere.
    NoKeyboard(Principal),
    Unprinted(Arc<Mutex<Option<Unprinted>>>),
    Misfit,
}

/// The wish to leave, and why; the first one counts.
#[derive(Clone)]
struct Exit {
    why: Arc<OnceLock<Why>>,
    raise: Arc<watch::Sender<bool>>,
}

impl Exit {
    fn leave(&self, why: Why) {
        let _ = self.why.set(why);
        self.raise.send_replace(true);
    }

    fn is_wished(&self) -> bool {
        self.why.get().is_some()
    }
}

/// `rxm console`
pub(crate) async fn console(setting: &Setting, args: ConsoleArgs) -> Result<Tally, Stop> {
    if setting.output.is_structured() {
        return Err(Stop::Usage(
            "what a console shows is no JSON or YAML; leave -o away".to_owned(),
        ));
    }
    let log = args.log.as_deref().map(open_log).transpose()?;
    let (target, mut caller, found) =
        target::find_one(setting, &args.domain, Purpose::Change).await?;
    if setting.dry_run {
        let asked = (Verb::Console, None);
        return rehearse(setting, asked, vec![target], &found.silent).await;
    }
    let (raise, interrupt) = Interrupt::new();
    let exit = Exit {
        why: Arc::default(),
        raise: Arc::new(raise),
    };
    watch_signals(&exit, setting.patience.interrupt.clone())?;
    let (keys, typed) = mpsc::channel(PIECES);
    let mut visit = Visit {
        screen: Arc::new(Screen {
            log: Mutex::new(log),
            log_file: args.log.clone().unwrap_or_default(),
            is_raw: AtomicBool::new(false),
            is_fresh: AtomicBool::new(true),
            wants_notes: setting.output.wants_notes(),
        }),
        label: target.label(),
        escape: args.escape,
        types_size: args.size,
        timeout: setting.patience.timeout,
        keyboard: Arc::default(),
        keys: Some(keys),
        raw: None,
        exit: exit.clone(),
    };
    let request = Request::Console(Console {
        domain: target.domain.clone(),
        force: args.force,
    });
    caller.rest();
    let outcome = caller
        .converse(&request, &mut Some(typed), &interrupt, |event| {
            visit.hear(event)
        })
        .await;
    let screen = Arc::clone(&visit.screen);
    drop(visit);
    screen.leave();
    let explained = match (exit.why.get(), outcome) {
        (_, Ok(_)) => {
            screen.note(&format!("{}: the guest has ended", target.label()));
            Ok(())
        }
        (None, Err(failure)) => {
            let explanation = setting.explain(&failure, &target.address);
            Err(setting.of_denial(explanation, &request))
        }
        (Some(why), Err(failure)) => match why.clone() {
            Why::Escape => {
                screen.note(&format!("left {}", target.label()));
                Ok(())
            }
            Why::Time => {
                let after = setting.patience.timeout.as_secs_f32();
                let label = target.label();
                screen.note(&format!(
                    "left {label} after {after} s; --timeout makes that longer"
                ));
                Ok(())
            }
            Why::Signal(number) => return Err(Stop::Code(128 + number)),
            Why::NoKeyboard(holder) => {
                return Err(Stop::Failed(
                    Kind::Refused,
                    format!(
                        "{}: {holder} has the keyboard, and what is piped here goes nowhere; --force takes it over",
                        target.label()
                    ),
                ));
            }
            Why::Unprinted(error) => {
                let error = error.lock().unwrap_or_else(PoisonError::into_inner).take();
                return Err(error.unwrap_or(Unprinted::Closed).into());
            }
            Why::Misfit => {
                let _: Failure = failure;
                Err(misfit())
            }
        },
    };
    let mut heard = vec![(target.address, explained)];
    let silent = found.silent.into_iter();
    heard.extend(silent.map(|(host, error)| (host, Err(error))));
    Ok(conclude(setting, &heard))
}

/// Opens the file that keeps a copy: one's own, that nobody else reads, and no link or device.
fn open_log(path: &Path) -> Result<File, Stop> {
    let failed = |why: String| Stop::Failed(Kind::Refused, format!("{}: {why}", path.display()));
    let flags = OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let opened = OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(i32::try_from(flags.bits()).unwrap_or_default())
        .open(path);
    let file = opened.map_err(|error| failed(error.to_string()))?;
    match file.metadata() {
        Ok(about) if about.is_file() => Ok(file),
        Ok(_) => Err(failed("is no file; --log wants one".to_owned())),
        Err(error) => Err(failed(error.to_string())),
    }
}

/// Whatever ends rxm ends it with its terminal as it was; a stop gives the terminal back for a while.
fn watch_signals(exit: &Exit, interrupt: Interrupt) -> Result<(), Stop> {
    let catch = |kind| {
        signal(kind).map_err(|error| {
            Stop::Failed(Kind::Refused, format!("signals cannot be caught: {error}"))
        })
    };
    // 128 + the number, as shells have it.
    let ending = [
        (catch(SignalKind::terminate())?, 15),
        (catch(SignalKind::hangup())?, 1),
        (catch(SignalKind::quit())?, 3),
    ];
    for (mut signal, number) in ending {
        let exit = exit.clone();
        tokio::spawn(async move {
            if signal.recv().await.is_some() {
                exit.leave(Why::Signal(number));
            }
        });
    }
    let exit = exit.clone();
    tokio::spawn(async move {
        interrupt.raised().await;
        exit.leave(Why::Signal(2));
    });
    // SIGTSTP and SIGCONT have no names there.
    let number = |signal: rustix::process::Signal| SignalKind::from_raw(signal.as_raw());
    let mut stop = catch(number(rustix::process::Signal::TSTP))?;
    let mut go_on = catch(number(rustix::process::Signal::CONT))?;
    tokio::spawn(async move {
        while stop.recv().await.is_some() {
            terminal::suspend();
        }
    });
    tokio::spawn(async move {
        while go_on.recv().await.is_some() {
            terminal::resume();
        }
    });
    Ok(())
}

/// Whether the keyboard is ours, and who has it otherwise.
#[derive(Default)]
struct Holder(Mutex<Option<Principal>>);

impl Holder {
    fn set(&self, principal: Principal, is_mine: bool) {
        *self.other() = (!is_mine).then_some(principal);
    }

    fn other(&self) -> MutexGuard<'_, Option<Principal>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One look at a console, from the host's side.
struct Visit {
    screen: Arc<Screen>,
    label: String,
    escape: Escape,
    types_size: bool,
    timeout: Duration,
    keyboard: Arc<Holder>,
    /// Until the keyboard begins to read.
    keys: Option<mpsc::Sender<Vec<u8>>>,
    raw: Option<terminal::Raw>,
    exit: Exit,
}

impl Visit {
    fn hear(&mut self, event: Event) -> ControlFlow<()> {
        match event {
            Event::Items(items) => items.into_iter().try_for_each(|item| self.take(item)),
            Event::Expiring(seconds) => {
                self.screen.say(&format!(
                    "your ticket ends in {seconds} s, and the session with it; run kinit in another window and it goes on"
                ));
                ControlFlow::Continue(())
            }
            Event::Again | Event::Progress(_) | Event::Alive => ControlFlow::Continue(()),
        }
    }

    fn take(&mut self, item: Item) -> ControlFlow<()> {
        match item {
            Item::Bytes(bytes) => match self.screen.show(&bytes) {
                Ok(()) => ControlFlow::Continue(()),
                Err(error) => self.leave(Why::Unprinted(Arc::new(Mutex::new(Some(error))))),
            },
            Item::Console(news) => self.tell(news),
            Item::Domain(_)
            | Item::Text(_)
            | Item::Job(_)
            | Item::Trouble(_)
            | Item::Image(_)
            | Item::Event(_)
            | Item::Cursor(_)
            | Item::Gap(_)
            | Item::Lease(_)
            | Item::Status(_) => self.leave(Why::Misfit),
        }
    }

    fn leave(&self, why: Why) -> ControlFlow<()> {
        self.exit.leave(why);
        ControlFlow::Break(())
    }

    fn tell(&mut self, news: ConsoleNews) -> ControlFlow<()> {
        match news {
            ConsoleNews::Attached {
                keyboard,
                is_mine,
                others,
            } => {
                self.keyboard.set(keyboard.clone(), is_mine);
                self.begin(&keyboard, is_mine, &others);
            }
            ConsoleNews::Joined(principal) => {
                self.screen.note(&format!("{principal} reads along now"));
            }
            ConsoleNews::Left(principal) => self.screen.note(&format!("{principal} has left")),
            ConsoleNews::Keyboard { principal, is_mine } => {
                self.keyboard.set(principal.clone(), is_mine);
                self.screen.say(&if is_mine {
                    "the keyboard is yours now".to_owned()
                } else {
                    format!("{principal} has the keyboard now, and you read along")
                });
            }
            ConsoleNews::Lost(bytes) => self.screen.say(&format!(
                "{bytes} bytes are missing here: they came faster than they were read"
            )),
        }
        ControlFlow::Continue(())
    }

    /// One is attached: from now on keys go to the guest.
    fn begin(&mut self, keyboard: &Principal, is_mine: bool, others: &[Principal]) {
        let Some(keys) = self.keys.take() else {
            return;
        };
        let is_terminal = io::stdin().is_terminal();
        let mut banner = format!("connected to {}", self.label);
        if is_terminal {
            banner.push_str(&format!("; {}", self.escape.advice()));
        }
        self.screen.note(&banner);
        if !is_mine {
            self.screen.say(&format!(
                "{keyboard} has the keyboard, and you read along; `rxm console --force` takes it over"
            ));
        }
        let others: Vec<_> = others.iter().map(ToString::to_string).collect();
        if !others.is_empty() {
            let others = others.join(", ");
            self.screen.note(&format!("reading along: {others}"));
        }
        let pipe = Pipe {
            keys,
            keyboard: Arc::clone(&self.keyboard),
            exit: self.exit.clone(),
        };
        if !is_terminal {
            let (exit, timeout) = (self.exit.clone(), self.timeout);
            tokio::spawn(async move {
                sleep(timeout).await;
                exit.leave(Why::Time);
            });
            thread::spawn(move || pipe.pump());
            return;
        }
        let mut waiting = Vec::new();
        if let Some((columns, rows)) = terminal::size()
            && is_mine
        {
            if self.types_size {
                waiting.extend(format!("stty rows {rows} cols {columns}\r").into_bytes());
            } else {
                self.screen.note(&format!(
                    "the guest does not learn the size of this window by itself: `stty rows {rows} cols {columns}`, which --size types"
                ));
            }
        }
        match terminal::Raw::enter() {
            Ok(raw) => {
                self.raw = Some(raw);
                self.screen.is_raw.store(true, Ordering::Relaxed);
            }
            Err(error) => {
                self.screen
                    .say(&format!("this terminal cannot be made raw: {error}"));
            }
        }
        let keyboard = Keyboard {
            pipe,
            waiting,
            escape: self.escape,
            screen: Arc::clone(&self.screen),
        };
        thread::spawn(move || keyboard.read());
    }
}

/// The way of input to the host.
struct Pipe {
    keys: mpsc::Sender<Vec<u8>>,
    keyboard: Arc<Holder>,
    exit: Exit,
}

impl Pipe {
    /// Types what standard input brings until it ends; the guest goes on being shown.
    fn pump(self) {
        let mut buffer = vec![0; MAX_INPUT];
        loop {
            let length = match io::stdin().read(&mut buffer) {
                Ok(0) => return,
                Ok(length) => length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return,
            };
            if let Some(holder) = self.keyboard.other().clone() {
                return self.exit.leave(Why::NoKeyboard(holder));
            }
            let bytes = buffer.get(..length).unwrap_or_default().to_vec();
            if self.keys.blocking_send(bytes).is_err() {
                return;
            }
        }
    }
}

/// The keyboard, in a thread of its own.
struct Keyboard {
    pipe: Pipe,
    waiting: Vec<u8>,
    escape: Escape,
    screen: Arc<Screen>,
}

impl Keyboard {
    fn read(mut self) {
        let mut buffer = [0; KEYS];
        let mut told: Option<Principal> = None;
        loop {
            self.pass_on();
            let is_ready = self.wait();
            // What is typed from now on is for whoever has the terminal next.
            if self.pipe.exit.is_wished() {
                return;
            }
            if !is_ready {
                continue;
            }
            let keys = match rustix::io::read(stdin(), &mut buffer) {
                Ok(length) if length > 0 => buffer.get(..length).unwrap_or_default(),
                Err(Errno::INTR | Errno::AGAIN) => continue,
                // The terminal is gone.
                Ok(_) | Err(_) => return self.pipe.exit.leave(Why::Signal(1)),
            };
            let before = self.escape.before(keys);
            let for_guest = before.unwrap_or(keys);
            let holder = self.pipe.keyboard.other().clone();
            match &holder {
                None => self.waiting.extend_from_slice(for_guest),
                Some(other) if !for_guest.is_empty() && told != holder => {
                    self.screen.say(&format!(
                        "{other} has the keyboard: what you type goes nowhere; leave, and come back with --force to take it over"
                    ));
                }
                Some(_) => {}
            }
            told = holder;
            if before.is_some() {
                return self.leave();
            }
        }
    }

    /// Waits for a key, or until what waits may have found room.
    fn wait(&self) -> bool {
        let limit = (!self.waiting.is_empty()).then_some(&AGAIN);
        let terminal = stdin();
        let mut wanted = [PollFd::new(&terminal, PollFlags::IN)];
        let wanted = if self.waiting.len() < AHEAD {
            wanted.as_mut_slice()
        } else {
            &mut []
        };
        poll(wanted, limit).is_ok_and(|ready| ready > 0)
    }

    /// Hands on as much as finds room.
    fn pass_on(&mut self) {
        while !self.waiting.is_empty() {
            let Ok(place) = self.pipe.keys.try_reserve() else {
                return;
            };
            let rest = self.waiting.split_off(self.waiting.len().min(MAX_INPUT));
            place.send(std::mem::replace(&mut self.waiting, rest));
        }
    }

    fn leave(mut self) {
        let until = Instant::now() + LAST_KEYS;
        let is_sent = |keyboard: &Self| {
            keyboard.waiting.is_empty() && keyboard.pipe.keys.capacity() == PIECES
        };
        if !is_sent(&self) {
            while Instant::now() < until {
                self.pass_on();
                thread::sleep(Duration::from_millis(10));
            }
        }
        self.pipe.exit.leave(Why::Escape);
        thread::sleep(LAST_WORD);
        terminal::restore();
        process::exit(0);
    }
}

/// What is shown, and kept.
struct Screen {
    log: Mutex<Option<File>>,
    log_file: PathBuf,
    is_raw: AtomicBool,
    /// The cursor is at the beginning of a line.
    is_fresh: AtomicBool,
    wants_notes: bool,
}

impl Screen {
    /// Shows bytes as they are: a console is for a terminal.
    fn show(&self, bytes: &[u8]) -> Result<(), Unprinted> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(file) = log.as_mut()
            && let Err(error) = file.write_all(bytes)
        {
            *log = None;
            self.say(&format!(
                "{}: {error}; the log ends here",
                self.log_file.display()
            ));
        }
        drop(log);
        if let Some(last) = bytes.last() {
            self.is_fresh.store(*last == b'\n', Ordering::Relaxed);
        }
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        Ok(stdout.flush()?)
    }

    /// Says something that goes without saying where nobody wants to know.
    fn note(&self, text: &str) {
        if self.wants_notes {
            self.say(text);
        }
    }

    /// Says something of rxm's own, on a line of its own.
    fn say(&self, text: &str) {
        let is_raw = self.is_raw.load(Ordering::Relaxed);
        let was_fresh = self.is_fresh.swap(true, Ordering::Relaxed);
        let before = if was_fresh || !is_raw { "" } else { "\r\n" };
        let after = if is_raw { "\r\n" } else { "\n" };
        let line = format!("{before}rxm: {}{after}", clean::line(text));
        let _ = io::stderr().lock().write_all(line.as_bytes());
    }

    /// The terminal is as it was; what comes next begins on a line of its own.
    fn leave(&self) {
        if self.is_raw.swap(false, Ordering::Relaxed)
            && !self.is_fresh.swap(true, Ordering::Relaxed)
        {
            let _ = io::stderr().lock().write_all(b"\n");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_that_leave_are_read_as_people_write_them() {
        for (text, key, advice) in [
            ("^]", Some(0x1d), "Ctrl-] leaves"),
            ("^a", Some(1), "Ctrl-A leaves"),
            ("^A", Some(1), "Ctrl-A leaves"),
            ("^@", Some(0), "Ctrl-@ leaves"),
            ("^?", Some(0x7f), "Ctrl-? leaves"),
            ("~", Some(b'~'), "~ leaves"),
            ("^", Some(b'^'), "^ leaves"),
            ("none", None, "a signal ends it"),
        ] {
            let escape = Escape::parse(text).unwrap();
            assert_eq!(
                (escape.0, escape.advice().as_str()),
                (key, advice),
                "{text}"
            );
        }
        for bad in ["", "^1", "ab", "^]x", " ", "ü", "\n"] {
            assert!(Escape::parse(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_escape_is_found_wherever_it_is_typed() {
        let escape = Escape::parse("^]").unwrap();
        assert_eq!(escape.before(b"ls\r"), None);
        assert_eq!(escape.before(b"\x1d"), Some(&b""[..]));
        assert_eq!(escape.before(b"exit\r\x1dls\x1d"), Some(&b"exit\r"[..]));
        assert_eq!(Escape(None).before(b"\x1d"), None);
    }
}
