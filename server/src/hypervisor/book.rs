//! The record of what happened: a ring of numbered events in memory, which forgets the oldest.
//!
//! ```text
//! libvirt's event thread --> bell --> reader: the domain read anew --> Book --> whoever follows, each at its own pace
//! ```
//! Who follows holds a number and nothing else here: one who is slow is overtaken by the ring and told so, and costs the others nothing. A book
//! lives as long as the process, and its id tells the cursors of one from those of the next.

use std::{
    borrow::Cow,
    collections::{HashMap, VecDeque},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;
use xman_common::{
    name::DomainName,
    protocol::{Cursor, DomainState, EventRow, Gap, Happening},
};

use super::Facts;

/// Events that are kept, some hundred bytes each: who was away for a while finds what it missed, and a storm of events fills no memory.
pub(crate) const LENGTH: usize = 20_000;

/// Something that happened to a domain.
#[derive(Clone, Debug)]
pub(crate) struct Event {
    /// When, in milliseconds since 1970.
    pub(super) at_ms: u64,
    /// Which hypervisor has it: an index into the configured URIs.
    pub(super) hypervisor: usize,
    /// That hypervisor's libvirt URI.
    pub(super) uri: Arc<str>,
    /// Its name then.
    pub(super) name: DomainName,
    /// Its name before, where it has got another one.
    pub(super) formerly: Option<DomainName>,
    pub(super) uuid: Uuid,
    pub(super) what: Happening,
    pub(super) detail: Cow<'static, str>,
    pub(super) state: DomainState,
}

impl Event {
    /// Returns the names it goes by.
    pub(crate) fn names(&self) -> impl Iterator<Item = &DomainName> {
        std::iter::once(&self.name).chain(&self.formerly)
    }

    /// Returns the domain's identity.
    pub(crate) fn uuid(&self) -> Uuid {
        self.uuid
    }

    /// Returns the event as callers see it.
    pub(crate) fn row(&self, cursor: Cursor) -> EventRow {
        EventRow {
            cursor,
            at_ms: self.at_ms,
            hypervisor: self.uri.to_string(),
            name: self.name.clone(),
            uuid: self.uuid,
            what: self.what,
            detail: self.detail.to_string(),
            state: self.state,
        }
    }
}

/// Something that is missing.
#[derive(Clone, Debug)]
pub(crate) struct Hole {
    /// When it was noticed, in milliseconds since 1970.
    pub(super) at_ms: u64,
    /// The hypervisor's libvirt URI.
    pub(super) uri: Arc<str>,
    /// Why, and what to do.
    pub(super) why: String,
}

impl Hole {
    /// Returns it as callers see it.
    pub(crate) fn gap(&self, cursor: Cursor) -> Gap {
        Gap {
            cursor,
            at_ms: self.at_ms,
            hypervisor: self.uri.to_string(),
            why: self.why.clone(),
        }
    }
}

/// A line of the book.
#[derive(Clone, Debug)]
pub(crate) enum Entry {
    Event(Event),
    Hole(Hole),
}

impl Entry {
    /// Returns the libvirt URI of the hypervisor that it is about.
    pub(crate) fn hypervisor(&self) -> &str {
        match self {
            Self::Event(event) => &event.uri,
            Self::Hole(hole) => &hole.uri,
        }
    }
}

/// Some lines in order.
#[derive(Debug, Default)]
pub(crate) struct Page {
    /// Each with the number after it and, of an event, the last that is known of its domain.
    pub(crate) lines: Vec<(u64, Arc<Entry>, Option<Facts>)>,
    /// What comes after it.
    pub(crate) next: u64,
    /// Whether lines before it are no longer there.
    pub(crate) is_torn: bool,
}

/// Where somebody begins to read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Beginning {
    /// The first line's number.
    pub(crate) number: u64,
    /// What is missing before it.
    pub(crate) missing: Option<String>,
}

/// The book of all hypervisors.
#[derive(Debug)]
pub(crate) struct Book {
    id: Uuid,
    ring: Mutex<Ring>,
    /// Wakes who has read to the end.
    end: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Ring {
    /// The number of the oldest line.
    first: u64,
    lines: VecDeque<Arc<Entry>>,
    /// What is last known of each domain that has an event here, and how many it has.
    domains: HashMap<(usize, Uuid), (Facts, usize)>,
}

impl Book {
    pub(super) fn new() -> Self {
        Self {
            id: Uuid::new_v4(),
            ring: Mutex::default(),
            end: watch::Sender::new(0),
        }
    }

    /// Adds lines; each event with what is known of its domain.
    pub(super) fn add(&self, lines: impl IntoIterator<Item = Line>) {
        let mut ring = self.ring();
        for line in lines {
            ring.push(line);
        }
        let end = ring.end();
        drop(ring);
        self.end.send_replace(end);
    }

    /// Returns the place after so many lines.
    pub(crate) fn cursor(&self, number: u64) -> Cursor {
        Cursor {
            book: self.id,
            number,
        }
    }

    /// Returns the number after the last line, so that each new one wakes who waits for it.
    pub(crate) fn end(&self) -> watch::Receiver<u64> {
        self.end.subscribe()
    }

    /// Returns where to begin so that all comes that happened after a cursor; without one, at the end.
    pub(crate) fn begin(&self, since: Option<Cursor>) -> Beginning {
        let ring = self.ring();
        begin(since, self.id, ring.first, ring.end())
    }

    /// Returns at most so many lines after the first `number`.
    pub(crate) fn page(&self, number: u64, most: usize) -> Page {
        let ring = self.ring();
        let from = number.clamp(ring.first, ring.end());
        let skipped = usize::try_from(from - ring.first).unwrap_or(usize::MAX);
        let numbered = (from + 1..).zip(ring.lines.iter().skip(skipped));
        let lines: Vec<_> = numbered
            .take(most)
            .map(|(after, entry)| (after, Arc::clone(entry), ring.known(entry)))
            .collect();
        Page {
            next: lines.last().map_or(from, |(after, ..)| *after),
            is_torn: number < ring.first,
            lines,
        }
    }

    /// A panic under the lock leaves whole lines behind.
    fn ring(&self) -> MutexGuard<'_, Ring> {
        self.ring.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A line to add.
#[derive(Debug)]
pub(super) enum Line {
    /// An event, and what is known of its domain.
    Event(Event, Facts),
    Hole(Hole),
}

impl Ring {
    fn end(&self) -> u64 {
        self.first + self.lines.len() as u64
    }

    fn push(&mut self, line: Line) {
        let entry = match line {
            Line::Hole(hole) => Entry::Hole(hole),
            Line::Event(event, facts) => {
                let key = (event.hypervisor, event.uuid);
                let count = self.domains.get(&key).map_or(0, |(_, count)| *count);
                self.domains.insert(key, (facts, count + 1));
                Entry::Event(event)
            }
        };
        self.lines.push_back(Arc::new(entry));
        if self.lines.len() > LENGTH
            && let Some(oldest) = self.lines.pop_front()
        {
            self.first += 1;
            self.let_go(&oldest);
        }
    }

    fn let_go(&mut self, entry: &Entry) {
        let Entry::Event(event) = entry else { return };
        let key = (event.hypervisor, event.uuid);
        match self.domains.get_mut(&key) {
            Some((_, count)) if *count > 1 => *count -= 1,
            Some(_) | None => drop(self.domains.remove(&key)),
        }
    }

    fn known(&self, entry: &Entry) -> Option<Facts> {
        let Entry::Event(event) = entry else {
            return None;
        };
        let (facts, _) = self.domains.get(&(event.hypervisor, event.uuid))?;
        Some(facts.clone())
    }
}

/// Decides where a reader begins. The nil book stands for the oldest line that there is.
fn begin(since: Option<Cursor>, book: Uuid, first: u64, end: u64) -> Beginning {
    let whole = |number| Beginning {
        number,
        missing: None,
    };
    let torn = |why: &str| Beginning {
        number: first,
        missing: Some(format!(
            "{why}; what happened before this is not known any more, `rxm list` shows how things are"
        )),
    };
    match since {
        None => whole(end),
        Some(Cursor { book, .. }) if book.is_nil() => whole(first),
        Some(since) if since.book != book => torn("xmand was started anew after that cursor"),
        Some(since) if since.number > end => torn("that cursor is ahead of this host's record"),
        Some(since) if since.number < first => torn(&format!(
            "that cursor is older than the last {LENGTH} events that a host keeps"
        )),
        Some(since) => whole(since.number),
    }
}

#[cfg(test)]
mod tests {
    use xman_common::protocol::Metadata;

    use super::*;

    fn facts(uuid: u128, revision: u64) -> Facts {
        Facts {
            uuid: Uuid::from_u128(uuid),
            name: "web".parse().unwrap(),
            hypervisor: 0,
            uri: "test:///default".into(),
            state: DomainState::Running,
            metadata: Arc::new(Ok(Metadata::default())),
            lease: None,
            revision,
            stale: false,
        }
    }

    fn event(uuid: u128, number: u64) -> Line {
        let event = Event {
            at_ms: number,
            hypervisor: 0,
            uri: "test:///default".into(),
            name: "web".parse().unwrap(),
            formerly: None,
            uuid: Uuid::from_u128(uuid),
            what: Happening::Paused,
            detail: Cow::Borrowed("paused"),
            state: DomainState::Paused,
        };
        Line::Event(event, facts(uuid, number))
    }

    fn numbers(page: &Page) -> Vec<u64> {
        let at = |(_, entry, _): &(u64, Arc<Entry>, Option<Facts>)| match entry.as_ref() {
            Entry::Event(event) => event.at_ms,
            Entry::Hole(hole) => hole.at_ms,
        };
        page.lines.iter().map(at).collect()
    }

    #[test]
    fn ten_thousand_events_are_read_in_order_and_none_is_lost() {
        let book = Book::new();
        book.add((0..10_000).map(|number| event(u128::from(number % 40), number)));
        let mut read = Vec::new();
        let mut at = 0;
        loop {
            let page = book.page(at, 97);
            assert!(!page.is_torn);
            if page.lines.is_empty() {
                break;
            }
            read.extend(numbers(&page));
            at = page.next;
        }
        assert!(read.into_iter().eq(0..10_000));
        assert_eq!(*book.end().borrow(), 10_000);
    }

    #[test]
    fn the_ring_forgets_the_oldest_and_says_so() {
        let book = Book::new();
        let more = LENGTH as u64 + 5;
        book.add((0..more).map(|number| event(u128::from(number), number)));
        let page = book.page(3, 2);
        assert!(page.is_torn);
        assert_eq!((numbers(&page), page.next), (vec![5, 6], 7));
        assert!(!book.page(5, 2).is_torn);
        assert_eq!(book.ring().domains.len(), LENGTH);
        let page = book.page(more, 10);
        assert!(page.lines.is_empty() && page.next == more && !page.is_torn);
        book.add((0..LENGTH as u64).map(|number| event(7, number)));
        assert_eq!(book.ring().domains.len(), 1);
        assert_eq!(book.ring().lines.len(), LENGTH);
    }

    #[test]
    fn all_events_of_a_domain_are_judged_by_what_is_last_known_of_it() {
        let book = Book::new();
        book.add([event(1, 1), event(2, 2), event(1, 3)]);
        let revisions: Vec<_> = book
            .page(0, 10)
            .lines
            .into_iter()
            .map(|(_, _, facts)| facts.unwrap().revision)
            .collect();
        assert_eq!(revisions, [3, 2, 3]);
    }

    #[test]
    fn a_reader_begins_where_it_left_off_or_is_told_what_is_missing() {
        let (mine, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let at = |book, number| begin(Some(Cursor { book, number }), mine, 10, 20);
        assert_eq!(begin(None, mine, 10, 20).number, 20);
        for number in [10, 15, 20] {
            assert_eq!(
                at(mine, number),
                Beginning {
                    number,
                    missing: None
                }
            );
        }
        assert_eq!(
            at(Uuid::nil(), 0),
            Beginning {
                number: 10,
                missing: None
            }
        );
        for (since, word) in [
            (at(mine, 9), "older"),
            (at(mine, 21), "ahead"),
            (at(other, 15), "anew"),
            (at(mine, u64::MAX), "ahead"),
        ] {
            assert_eq!(since.number, 10);
            assert!(since.missing.as_ref().unwrap().contains(word), "{since:?}");
        }
    }

    #[tokio::test]
    async fn what_is_added_wakes_who_waits() {
        let book = Arc::new(Book::new());
        let mut end = book.end();
        let waiting = tokio::spawn(async move { *end.wait_for(|end| *end > 0).await.unwrap() });
        book.add([event(1, 1)]);
        assert_eq!(waiting.await.unwrap(), 1);
    }
}
