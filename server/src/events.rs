//! What happens to domains, told to whoever may hear it.
//!
//! ```text
//! Book (one for the host) --page--> wanted? --> may the caller hear it now? --> items --> the caller
//!   ^                                                                             |
//!   '------------- wait for the next line <-- all told <--------------------------'
//! ```
//! Each event is judged when it is handed out, by what is known of its domain then; of one that is gone, by what was known last. Who reads
//! slowly is overtaken by the book and told so; who does not read at all is sent away with a word. Nobody waits for him.

use std::{
    collections::{HashMap, HashSet},
    time::Duration,
};

use tokio::time::{Instant, timeout};
use uuid::Uuid;
use xman_common::{
    codec,
    protocol::{Code, Events, Fault, Gap, Item, Reply},
};

use crate::{
    answers::{Named, ROWS_A_FRAME},
    caller::{Outcome, Piece},
    clock::now_ms,
    hypervisor::{EVENTS_KEPT, Entry, Facts, Page},
    work::Work,
};

/// Lines of the book that are looked at in one go: a caller who catches up leaves the others their turn.
const PAGE: usize = 500;
/// Bytes of events in one frame, which long names could make longer than it can be.
const BYTES_A_FRAME: usize = 64 * 1024;
/// How long a caller may leave what was sent to it unread, beyond what the connection holds. Shorter than what the connection itself allows, so that
/// there is time for a word.
const UNREAD: Duration = Duration::from_secs(10);
/// How often a caller is told where the book is that hears nothing else: what it may not hear moves the book on as well.
const REMIND: Duration = Duration::from_secs(60);
/// Lines after which it is told in any case, long before the book forgets the last place that it knows.
const REMIND_LINES: u64 = EVENTS_KEPT as u64 / 4;

/// Tells what has happened since a cursor, and what happens.
pub(crate) async fn follow(asked: &Events, work: &Work) -> Outcome {
    let hypervisors = &work.host.hypervisors;
    let hypervisor = work.hypervisor.as_deref();
    let listener = Listener {
        named: Named::new(&asked.patterns)?,
        hypervisor: hypervisor.map(|it| hypervisors.named(it)).transpose()?,
        work,
    };
    let book = hypervisors.book();
    // Before the first page is read, so that no line comes unnoticed between them.
    let mut end = book.end();
    let begin = book.begin(asked.since);
    let mut at = begin.number;
    let mut first = vec![Item::Cursor(book.cursor(at))];
    let is_new = asked.since.is_none() || begin.missing.is_some();
    let gap = |hypervisor: String, why: String| {
        let cursor = book.cursor(at);
        let at_ms = now_ms();
        Item::Gap(Gap {
            cursor,
            at_ms,
            hypervisor,
            why,
        })
    };
    first.extend(begin.missing.map(|why| gap(String::new(), why)));
    if is_new {
        // Who comes back has read of it in the book.
        first.extend(hypervisors.ailing(hypervisor).into_iter().map(|ailing| {
            let why = format!("{}; what happens there is not seen now", ailing.why);
            gap(ailing.uri.to_string(), why)
        }));
    }
    listener.tell(first).await?;
    let mut told = (at, Instant::now());
    loop {
        end.borrow_and_update();
        let page = book.page(at, PAGE);
        let is_last = page.lines.is_empty();
        let next = page.next;
        let mut items = Vec::new();
        if page.is_torn {
            let first = next - page.lines.len() as u64;
            items.push(Item::Gap(Gap {
                cursor: book.cursor(first),
                at_ms: now_ms(),
                hypervisor: String::new(),
                why: format!(
                    "you read so slowly that more than {EVENTS_KEPT} events went by; `rxm list` shows how things are"
                ),
            }));
        }
        items.extend(listener.heard(page));
        at = next;
        let is_unsure = at - told.0 >= REMIND_LINES || told.1.elapsed() >= REMIND;
        if items.is_empty() && at != told.0 && (is_unsure || (is_last && !asked.follow)) {
            items.push(Item::Cursor(book.cursor(at)));
        }
        if !items.is_empty() {
            told = (at, Instant::now());
            listener.tell(items).await?;
        }
        if !is_last {
            continue;
        }
        if !asked.follow {
            return Ok(Reply::Done);
        }
        if end.changed().await.is_err() {
            return Err(Fault::new(Code::Internal, "the record of events has ended"));
        }
    }
}

struct Listener<'a> {
    named: Named,
    /// The libvirt URI of the one hypervisor that it is about; all without.
    hypervisor: Option<&'a str>,
    work: &'a Work,
}

impl Listener<'_> {
    fn is_about(&self, hypervisor: &str) -> bool {
        self.hypervisor.is_none_or(|asked| asked == hypervisor)
    }

    /// Returns what the caller wants and may hear of a page.
    fn heard(&self, page: Page) -> Vec<Item> {
        let book = self.work.host.hypervisors.book();
        let wanted: Vec<_> = page
            .lines
            .into_iter()
            .filter(|(_, entry, _)| self.is_about(entry.hypervisor()) && self.wants(entry))
            .collect();
        let may_hear = self.may_hear(wanted.iter().filter_map(|(.., facts)| facts.clone()));
        let heard = wanted.into_iter().filter_map(|(after, entry, facts)| {
            let cursor = book.cursor(after);
            match (entry.as_ref(), facts) {
                (Entry::Hole(hole), _) => Some(Item::Gap(hole.gap(cursor))),
                (Entry::Event(event), Some(facts)) => may_hear
                    .contains(&(facts.hypervisor, facts.uuid))
                    .then(|| Item::Event(event.row(cursor))),
                (Entry::Event(_), None) => None,
            }
        });
        heard.collect()
    }

    fn wants(&self, entry: &Entry) -> bool {
        match entry {
            Entry::Hole(_) => true,
            Entry::Event(event) => event
                .names()
                .any(|name| self.named.takes(name, event.uuid())),
        }
    }

    /// Judges each domain once, by what is known of it now.
    fn may_hear(&self, of: impl Iterator<Item = Facts>) -> HashSet<(usize, Uuid)> {
        let host = &self.work.host;
        let domains: HashMap<_, _> = of
            .map(|facts| ((facts.hypervisor, facts.uuid), facts))
            .collect();
        if domains.is_empty() {
            return HashSet::new();
        }
        let (keys, known): (Vec<_>, Vec<_>) = domains
            .into_iter()
            .map(|(key, facts)| (key, host.hypervisors.now(facts)))
            .unzip();
        host.reread_policy();
        let verdicts = host.may_hear(&self.work.caller, &known);
        keys.into_iter()
            .zip(verdicts)
            .filter(|(_, may)| *may)
            .map(|(key, _)| key)
            .collect()
    }

    /// Sends items in frames.
    async fn tell(&self, items: Vec<Item>) -> Result<(), Fault> {
        for frame in frames(items) {
            let sent = timeout(UNREAD, self.work.send(Piece::Items(frame))).await;
            sent.unwrap_or_else(|_| Err(unread()))?;
        }
        Ok(())
    }
}

fn unread() -> Fault {
    Fault::new(
        Code::Busy,
        format!(
            "you have not read what was sent to you for {} s; go on later from the last cursor that you have",
            UNREAD.as_secs()
        ),
    )
}

/// Cuts items into frames, none of them too long or empty.
fn frames(items: Vec<Item>) -> Vec<Vec<Item>> {
    let mut frames: Vec<Vec<Item>> = Vec::new();
    let mut bytes = BYTES_A_FRAME;
    for item in items {
        let length = codec::encode(&item).map_or(0, |encoded| encoded.len());
        bytes += length;
        match frames.last_mut() {
            Some(frame) if frame.len() < ROWS_A_FRAME && bytes <= BYTES_A_FRAME => frame.push(item),
            Some(_) | None => {
                bytes = length;
                frames.push(vec![item]);
            }
        }
    }
    frames
}

#[cfg(test)]
mod tests {
    use xman_common::{protocol::Cursor, wire::MAX_SEALED};

    use super::*;

    fn gap(number: u64, length: usize) -> Item {
        Item::Gap(Gap {
            cursor: Cursor {
                book: Uuid::nil(),
                number,
            },
            at_ms: 0,
            hypervisor: String::new(),
            why: "x".repeat(length),
        })
    }

    #[test]
    fn frames_hold_all_in_order_and_none_is_too_long() {
        for length in [0, 100, 5000, BYTES_A_FRAME] {
            let items: Vec<_> = (0..1000).map(|number| gap(number, length)).collect();
            let cut = frames(items.clone());
            for frame in &cut {
                assert!((1..=ROWS_A_FRAME).contains(&frame.len()));
                assert!(codec::encode(frame).unwrap().len() < MAX_SEALED - 1024);
            }
            assert_eq!(cut.concat(), items);
        }
        assert!(frames(Vec::new()).is_empty());
    }
}
