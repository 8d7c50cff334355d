//! Keeps the inventory true: one thread for each hypervisor, with a connection of its own, that reconnects for ever.
//!
//! ```text
//! connect --> full reading --> wait for events, the next full reading, or the next sign of life
//!    ^                                       |
//!    '---- pause, growing to 5 s <-- connection lost
//! ```
//! What libvirt's events tell goes into the book in the order in which it came, each after its domain was read anew. After a time without a
//! connection the book says so, and in what state the domains were found that are not as they were; so it does where a domain is found otherwise
//! without an event, since drivers do not tell everything.

use std::{
    borrow::Cow,
    cell::Cell,
    collections::{HashMap, VecDeque},
    sync::{Arc, Once},
    thread,
    time::{Duration, Instant},
};

use jiff::Timestamp;
use uuid::Uuid;
use virt::{
    connect::Connect,
    error::Error,
    event::{event_add_timeout, event_register_default_impl, event_run_default_impl},
};
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{DomainState, Happening},
};

use super::{
    Facts,
    bell::{Bell, Dropped, MAX_CHANGED, Tiding},
    book::{self, Book, Hole, Line},
    connections::Hypervisor,
    faults,
    ffi::{Event, Named, Sink, Subscription},
    happenings::{Look, Looks, Meaning, differences, lifecycle},
    metadata,
    readings::{self, Survey},
};
use crate::clock::now_ms;

/// From the beginning of one full reading to the next; events bring what happens in between.
const REFRESH: Duration = Duration::from_secs(10);
/// Full readings take at most one part in so many of the time: a host with very many domains is read less often.
const SHARE: u32 = 20;
/// How often libvirt is asked for a sign of life between readings.
const PROBE: Duration = Duration::from_secs(2);
/// The pause after the first failure to connect, which doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// Old names of domains whose new ones are not known yet; libvirt tells the new one at once.
const MAX_UNNAMED: usize = 64;
/// The event loop wakes at least so often, in milliseconds.
const EVENT_TICK: i32 = 1000;

/// Starts libvirt's event loop, once for the process and before the first connection.
pub(super) fn start_events() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // libvirt would print every error to stderr besides returning it.
        virt::error::clear_error_callback();
        if let Err(error) = event_register_default_impl() {
            tracing::error!(
                "libvirt's event loop cannot be set up, changes are seen late: {}",
                error.message()
            );
            return;
        }
        if let Err(error) = event_add_timeout(EVENT_TICK, |_, _| {}, std::ptr::null_mut()) {
            tracing::warn!("libvirt's event loop has no tick: {}", error.message());
        }
        let run = || loop {
            if let Err(error) = event_run_default_impl() {
                tracing::error!("libvirt's event loop: {}", error.message());
                thread::sleep(Duration::from_millis(100));
            }
        };
        if let Err(error) = thread::Builder::new()
            .name("libvirt-events".to_owned())
            .spawn(run)
        {
            tracing::error!("no thread for libvirt's event loop, changes are seen late: {error}");
        }
    });
}

/// Starts the thread that keeps a hypervisor's part of the inventory.
pub(super) fn start(hypervisor: &Arc<Hypervisor>, book: &Arc<Book>) {
    let reader = Reader {
        hypervisor: Arc::clone(hypervisor),
        book: Arc::clone(book),
        survey: Survey::default(),
        waiting: VecDeque::new(),
        dropped: None,
        looked: HashMap::new(),
        unnamed: HashMap::new(),
        told: None,
        doubtful: HashMap::new(),
        left_ms: None,
        heard_ms: Cell::new(now_ms()),
    };
    let name = format!("inventory-{}", hypervisor.index);
    if let Err(error) = thread::Builder::new()
        .name(name)
        .spawn(move || reader.keep())
    {
        hypervisor
            .inventory
            .lost(hypervisor.index, format!("no thread for it: {error}"));
    }
}

struct Reader {
    hypervisor: Arc<Hypervisor>,
    book: Arc<Book>,
    survey: Survey,
    /// Events that are not in the book yet.
    waiting: VecDeque<Tiding>,
    /// What was lost after them.
    dropped: Option<Dropped>,
    /// When domains of theirs were last looked at.
    looked: HashMap<Uuid, Instant>,
    /// Old names of domains that are being renamed.
    unnamed: HashMap<Uuid, DomainName>,
    /// How the domains look to who reads the book; nothing before they were read for the first time.
    told: Option<Looks>,
    /// Those that the last full reading found otherwise, without an event that says so.
    doubtful: HashMap<Uuid, Option<Look>>,
    /// Since when libvirt was silent, in milliseconds since 1970, when the connection was lost.
    left_ms: Option<u64>,
    /// When libvirt last gave a sign of life, in milliseconds since 1970.
    heard_ms: Cell<u64>,
}

impl Reader {
    fn keep(mut self) {
        let hypervisor = Arc::clone(&self.hypervisor);
        let mut pause = FIRST_PAUSE;
        loop {
            let begin = Instant::now();
            // What everybody hears who may list says nothing of domains; libvirt's own words about a reading could, and go to the log.
            let (trouble, detail) = match hypervisor.open_for_reader() {
                Err(error) => (faults::unreachable(&error), String::new()),
                Ok(connection) => match self.attend(&connection) {
                    None => return,
                    Some(error) => (
                        "the connection to libvirt is lost, reconnecting".to_owned(),
                        format!(" ({})", faults::tidy(error.message())),
                    ),
                },
            };
            if hypervisor.inventory.trouble(hypervisor.index).as_deref() != Some(trouble.as_str()) {
                tracing::warn!("{}: {trouble}{detail}", hypervisor.uri);
            }
            self.leave(&trouble);
            hypervisor.inventory.lost(hypervisor.index, trouble);
            if begin.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            if self.stopped_within(pause) {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn stopped_within(&mut self, length: Duration) -> bool {
        let until = Instant::now() + length;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Late ones of the connection that is lost.
            let _ = self.publish(None);
            if self.hypervisor.bell.listen(left).stop {
                return true;
            }
            if left.is_zero() {
                return false;
            }
        }
    }

    /// Serves one connection until it breaks, and returns why; nothing where the reader should end.
    fn attend(&mut self, connection: &Connect) -> Option<Error> {
        let hypervisor = Arc::clone(&self.hypervisor);
        let alive = || connection.is_alive().unwrap_or(false);
        let software = match self.ask(|| readings::software(connection)) {
            Ok(software) => software,
            Err(error) => return Some(error),
        };
        tracing::info!(
            "{}: connected to {} {}, libvirt {}",
            hypervisor.uri,
            software.driver,
            software.version,
            software.libvirt
        );
        let _events = match self.ask(|| Subscription::new(connection, &self.sink())) {
            Ok(subscription) => Some(subscription),
            Err(error) if !alive() => return Some(error),
            Err(error) => {
                tracing::warn!(
                    "{}: no events, changes are seen late: {}",
                    hypervisor.uri,
                    error.message()
                );
                None
            }
        };
        hypervisor.inventory.connected(hypervisor.index, software);
        let mut due = Instant::now();
        let mut earliest = due;
        loop {
            let now = Instant::now();
            let asked = if now >= due {
                let read = self.read_all(connection);
                if read.is_ok() {
                    self.compare();
                }
                let rest = now.elapsed() * SHARE;
                (earliest, due) = (now + rest, now + REFRESH.max(rest));
                let trouble = match &read {
                    Ok(()) => String::new(),
                    Err(error) => {
                        tracing::warn!(
                            "{}: the domains cannot be read: {}",
                            hypervisor.uri,
                            faults::tidy(error.message())
                        );
                        "libvirt does not tell its domains; xmand's log has its words".to_owned()
                    }
                };
                hypervisor.inventory.troubled(hypervisor.index, trouble);
                read
            } else {
                self.ask(|| connection.lib_version().map(drop))
            };
            if let Err(error) = asked
                && !alive()
            {
                return Some(error);
            }
            let until = (Instant::now() + PROBE).min(due);
            loop {
                let left = until.min(due).saturating_duration_since(Instant::now());
                let is_behind = !self.waiting.is_empty();
                let news = hypervisor
                    .bell
                    .listen(if is_behind { Duration::ZERO } else { left });
                if news.stop {
                    return None;
                }
                if news.all {
                    due = due.min(earliest);
                }
                let mut changed = news.changed.iter();
                let followed = changed
                    .try_for_each(|uuid| self.read_one(connection, *uuid))
                    .and(self.publish(Some(connection)));
                // The next sign of life, asked for at once, tells a broken connection from a broken domain.
                if left.is_zero() || news.closed || followed.is_err() {
                    break;
                }
            }
        }
    }

    fn sink(&self) -> Sink {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let bell = Arc::clone(&self.hypervisor.bell);
        Arc::new(move |event| match event {
            Event::Lifecycle { of, event, detail } => match lifecycle(event, detail) {
                Meaning::Happened(what, why) => ring(&bell, &of, Some((what, why))),
                Meaning::Unnamed => ring(&bell, &of, None),
                Meaning::Unknown => bell.changed(of.uuid),
            },
            Event::Metadata { of, uri } if uri.as_deref() == Some(metadata::NAMESPACE) => {
                ring(&bell, &of, Some((Happening::Labelled, "")));
            }
            Event::Metadata { of, .. } => bell.changed(of.uuid),
            Event::Rebooted(of) => {
                inventory.rebooted(index, of.uuid);
                ring(&bell, &of, Some((Happening::Rebooted, "")));
            }
            Event::Balloon(uuid, kib) => inventory.balloon(index, uuid, kib),
            Event::Closed => bell.closed(),
        })
    }

    /// Writes into the book what has happened, in order. A domain that was not read since is read first, so that who may know of it is judged by
    /// what is true now; so many domains are read a turn, and the rest waits for the next. Without a connection what is known has to do.
    ///
    /// # Errors
    /// libvirt's, where a domain cannot be read; its event is written down nevertheless.
    fn publish(&mut self, connection: Option<&Connect>) -> Result<(), Error> {
        if self.waiting.is_empty() {
            (self.waiting, self.dropped) = self.hypervisor.bell.take();
        }
        let (mut lines, mut reads, mut read) = (Vec::new(), 0, Ok(()));
        while let Some(tiding) = self.waiting.front() {
            let uuid = tiding.uuid;
            if let Some(connection) = connection
                && read.is_ok()
                && !self.is_read_since(uuid, tiding.came)
            {
                if reads == MAX_CHANGED {
                    break;
                }
                reads += 1;
                read = self.read_one(connection, uuid);
            }
            if let Some(tiding) = self.waiting.pop_front() {
                lines.extend(self.line(tiding));
            }
        }
        if self.waiting.is_empty() {
            self.looked.clear();
            let dropped = self.dropped.take();
            lines.extend(dropped.map(|dropped| Line::Hole(self.hole(lost(dropped)))));
        }
        if !lines.is_empty() {
            self.heard_ms.set(now_ms());
            self.book.add(lines);
        }
        read
    }

    fn is_read_since(&self, uuid: Uuid, moment: Instant) -> bool {
        let Hypervisor {
            inventory, index, ..
        } = self.hypervisor.as_ref();
        let looked = self.looked.get(&uuid);
        looked.is_some_and(|began| *began >= moment)
            || inventory.is_read_since(*index, uuid, moment)
    }

    fn line(&mut self, tiding: Tiding) -> Option<Line> {
        let Some((what, why)) = tiding.what else {
            if self.unnamed.len() < MAX_UNNAMED {
                self.unnamed.insert(tiding.uuid, tiding.name);
            }
            return None;
        };
        let formerly = (what == Happening::Renamed)
            .then(|| self.unnamed.remove(&tiding.uuid))
            .flatten();
        let detail = match &formerly {
            Some(old) => Cow::Owned(format!("it was called '{old}'")),
            None => Cow::Borrowed(why),
        };
        Some(self.event(
            tiding.uuid,
            tiding.name,
            what,
            detail,
            (tiding.at_ms, formerly),
        ))
    }

    fn event(
        &mut self,
        uuid: Uuid,
        name: DomainName,
        what: Happening,
        detail: Cow<'static, str>,
        (at_ms, formerly): (u64, Option<DomainName>),
    ) -> Line {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let glimpse = inventory.glimpse(index, uuid);
        let state = glimpse.map_or(DomainState::Unknown, |glimpse| glimpse.state);
        if let Some(told) = &mut self.told {
            match glimpse {
                Some(_) => drop(told.insert(uuid, (name.clone(), state))),
                None => drop(told.remove(&uuid)),
            }
        }
        let known = inventory.last_known(index, uuid);
        let facts = known.unwrap_or_else(|| self.nothing_known(uuid, name.clone()));
        let event = book::Event {
            at_ms,
            hypervisor: index,
            uri: Arc::clone(&facts.uri),
            name,
            formerly,
            uuid,
            what,
            detail,
            state,
        };
        Line::Event(event, facts)
    }

    /// The facts of a domain that went before anybody could look at it: nobody is known to own it.
    fn nothing_known(&self, uuid: Uuid, name: DomainName) -> Facts {
        Facts {
            uuid,
            name,
            hypervisor: self.hypervisor.index,
            uri: Arc::from(self.hypervisor.uri.as_str()),
            state: DomainState::Unknown,
            metadata: Arc::new(Err("it was gone before it could be read".to_owned())),
            lease: None,
            revision: 0,
            stale: false,
        }
    }

    fn hole(&self, why: String) -> Hole {
        Hole {
            at_ms: now_ms(),
            uri: Arc::from(self.hypervisor.uri.as_str()),
            why,
        }
    }

    /// The connection is lost: what is there is written down, and that more is not seen.
    fn leave(&mut self, trouble: &str) {
        let _ = self.publish(None);
        self.doubtful.clear();
        if self.left_ms.is_none() && self.told.is_some() {
            self.left_ms = Some(self.heard_ms.get());
            let hole = self.hole(format!(
                "{trouble}; what happens to its domains is not seen until it is back"
            ));
            self.book.add([Line::Hole(hole)]);
        }
    }

    /// All domains were read: what is not as the book has it is told. After a time without a connection at once; else only if the reading before
    /// found it as well, since an event that says so may be on its way.
    fn compare(&mut self) {
        let looks = self.hypervisor.inventory.looks(self.hypervisor.index);
        let now = looks.unwrap_or_default();
        let Some(told) = &self.told else {
            self.told = Some(now);
            return;
        };
        // What waits to be written down would be told twice.
        if self.left_ms.is_none() && !self.waiting.is_empty() {
            return;
        }
        let mut found = differences(told, &now);
        let mut lines = Vec::new();
        match self.left_ms.take() {
            Some(since_ms) => lines.push(Line::Hole(self.hole(format!(
                "libvirt was silent from {} to {}; what happened meanwhile is not known, and domains that are not as they were follow",
                clock(since_ms),
                clock(now_ms())
            )))),
            None => {
                let before = std::mem::take(&mut self.doubtful);
                let look = |uuid: &Uuid| now.get(uuid).cloned();
                self.doubtful = found
                    .iter()
                    .map(|found| (found.uuid, look(&found.uuid)))
                    .collect();
                found.retain(|found| before.get(&found.uuid) == Some(&look(&found.uuid)));
            }
        }
        lines.extend(found.into_iter().map(|found| {
            self.doubtful.remove(&found.uuid);
            let detail = Cow::Owned(found.detail);
            let at = (now_ms(), None);
            self.event(found.uuid, found.name, Happening::Found, detail, at)
        }));
        if !lines.is_empty() {
            self.book.add(lines);
        }
    }

    fn read_all(&mut self, connection: &Connect) -> Result<(), Error> {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let began = Instant::now();
        let read = self
            .survey
            .all(connection, (&inventory, index), &|| inventory.asking(index));
        inventory.answered(index);
        let readings = read?;
        self.heard_ms.set(now_ms());
        let count = readings.len();
        let period = REFRESH.max(began.elapsed() * SHARE);
        inventory.replace(index, readings, began, period);
        tracing::debug!(
            "{}: {count} domains read in {:?}",
            self.hypervisor.uri,
            began.elapsed()
        );
        let node = self.ask(|| readings::node(connection))?;
        inventory.node(index, node);
        Ok(())
    }

    fn read_one(&mut self, connection: &Connect, uuid: Uuid) -> Result<(), Error> {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let began = Instant::now();
        if !self.waiting.is_empty() || self.looked.len() < MAX_CHANGED {
            self.looked.insert(uuid, began);
        }
        inventory.asking(index);
        let read = match readings::find(connection, uuid) {
            Ok(Some(domain)) => readings::one(&domain, (&inventory, index)),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        inventory.answered(index);
        match read {
            Ok(Some(reading)) => drop(inventory.put(index, reading, began)),
            Ok(None) => inventory.gone(index, uuid, began),
            Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => {
                inventory.gone(index, uuid, began)
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn ask<T>(&self, question: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.hypervisor.inventory.asking(self.hypervisor.index);
        let answer = question();
        self.hypervisor.inventory.answered(self.hypervisor.index);
        if answer.is_ok() {
            self.heard_ms.set(now_ms());
        }
        answer
    }
}

/// Leaves an event where the reader finds it: this is libvirt's thread. Domains with impossible names are not ours.
fn ring(bell: &Bell, of: &Named, what: Option<(Happening, &'static str)>) {
    match of.name.parse() {
        Ok(name) => bell.happened(Tiding::now(of.uuid, name, what)),
        Err(_) => bell.changed(of.uuid),
    }
}

fn lost(dropped: Dropped) -> String {
    format!(
        "more happened at once than xmand could follow: {} events since {} are not known, `rxm list` shows how things are",
        dropped.count,
        clock(dropped.since_ms)
    )
}

/// A point in time in words, in UTC.
fn clock(at_ms: u64) -> String {
    let at = i64::try_from(at_ms).ok();
    at.and_then(|at| Timestamp::from_millisecond(at).ok())
        .map_or_else(|| format!("{at_ms} ms"), |at| format!("{at:.0}"))
}
