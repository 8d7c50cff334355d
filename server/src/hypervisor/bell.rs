//! What has happened since the reader last looked: events leave it here, and it never grows beyond its bounds.

use std::{
    collections::{HashSet, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;
use xman_common::{name::DomainName, protocol::Happening};

use crate::clock::now_ms;

/// Events of one domain that come close together cost one reading.
const GATHER: Duration = Duration::from_millis(10);
/// Domains read one by one after events; beyond that all are read, and the list stays short whatever libvirt sends.
pub(super) const MAX_CHANGED: usize = 64;
/// Events that wait for the reader: a host on which all restarts at once loses none, and a storm without end fills no memory.
const MAX_WAITING: usize = 65_536;

/// Wakes the reader.
#[derive(Default)]
pub(super) struct Bell {
    news: Mutex<News>,
    rung: Condvar,
}

/// What the reader has to look at.
#[derive(Default)]
pub(super) struct News {
    pub(super) changed: HashSet<Uuid>,
    /// More have changed than are worth naming.
    pub(super) all: bool,
    pub(super) closed: bool,
    pub(super) stop: bool,
    waiting: VecDeque<Tiding>,
    /// Events for which there was no place, and when that began.
    dropped: Option<Dropped>,
}

/// An event as libvirt's thread left it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tiding {
    pub(super) uuid: Uuid,
    /// The domain's name then.
    pub(super) name: DomainName,
    /// What happened, and why in libvirt's words; nothing where the name is given up for another.
    pub(super) what: Option<(Happening, &'static str)>,
    /// In milliseconds since 1970.
    pub(super) at_ms: u64,
    /// A reading of the domain that began later knows what came of it.
    pub(super) came: Instant,
}

impl Tiding {
    pub(super) fn now(
        uuid: Uuid,
        name: DomainName,
        what: Option<(Happening, &'static str)>,
    ) -> Self {
        Self {
            uuid,
            name,
            what,
            at_ms: now_ms(),
            came: Instant::now(),
        }
    }
}

/// Events that were lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Dropped {
    pub(super) since_ms: u64,
    pub(super) count: u64,
}

impl News {
    fn is_quiet(&self) -> bool {
        self.changed.is_empty()
            && !self.all
            && !self.closed
            && !self.stop
            && self.waiting.is_empty()
            && self.dropped.is_none()
    }

    fn change(&mut self, uuid: Uuid) {
        if self.changed.len() < MAX_CHANGED {
            self.changed.insert(uuid);
        } else if !self.changed.contains(&uuid) {
            self.all = true;
        }
    }
}

impl Bell {
    /// A domain should be read again.
    pub(super) fn changed(&self, uuid: Uuid) {
        self.news().change(uuid);
        self.rung.notify_one();
    }

    /// Something has happened to a domain, which should be read again.
    pub(super) fn happened(&self, tiding: Tiding) {
        let mut news = self.news();
        news.change(tiding.uuid);
        if let Some(dropped) = &mut news.dropped {
            dropped.count = dropped.count.saturating_add(1);
        } else if news.waiting.len() < MAX_WAITING {
            news.waiting.push_back(tiding);
        } else {
            // From here to the next look all are dropped, so that what is missing is in one place.
            news.dropped = Some(Dropped {
                since_ms: tiding.at_ms,
                count: 1,
            });
            news.all = true;
        }
        drop(news);
        self.rung.notify_one();
    }

    /// The reader should end.
    pub(super) fn stop(&self) {
        self.news().stop = true;
        self.rung.notify_one();
    }

    /// The connection has ended.
    pub(super) fn closed(&self) {
        self.news().closed = true;
        self.rung.notify_one();
    }

    /// Waits for news, at most so long, gathers for a moment what comes with it, and takes it. `stop` stays, and so does what [`take`](Self::take)
    /// takes.
    pub(super) fn listen(&self, limit: Duration) -> News {
        let waited = self
            .rung
            .wait_timeout_while(self.news(), limit, |news| news.is_quiet());
        let (mut news, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if !news.changed.is_empty() && !news.stop {
            drop(news);
            thread::sleep(GATHER);
            news = self.news();
        }
        News {
            changed: std::mem::take(&mut news.changed),
            all: std::mem::take(&mut news.all),
            closed: std::mem::take(&mut news.closed),
            stop: news.stop,
            ..News::default()
        }
    }

    /// Takes the events that wait, in order, and what was lost after them.
    pub(super) fn take(&self) -> (VecDeque<Tiding>, Option<Dropped>) {
        let mut news = self.news();
        (std::mem::take(&mut news.waiting), news.dropped.take())
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tiding(number: u128) -> Tiding {
        let what = Some((Happening::Started, "booted"));
        Tiding::now(Uuid::from_u128(number), "web".parse().unwrap(), what)
    }

    #[test]
    fn a_burst_of_events_is_gathered_and_bounded() {
        let bell = Bell::default();
        for number in 0..10_000_u128 {
            bell.changed(Uuid::from_u128(number % 40));
        }
        let news = bell.listen(Duration::ZERO);
        assert!(news.changed.len() == 40 && !news.all);
        for number in 0..10_000 {
            bell.changed(Uuid::from_u128(number));
        }
        let news = bell.listen(Duration::from_secs(60));
        assert!(news.changed.len() == MAX_CHANGED && news.all && !news.closed && !news.stop);
        assert!(bell.listen(Duration::ZERO).is_quiet());
        bell.closed();
        assert!(bell.listen(Duration::from_secs(60)).closed);
        bell.stop();
        assert!(
            bell.listen(Duration::from_secs(60)).stop && bell.listen(Duration::from_secs(60)).stop
        );
    }

    #[test]
    fn ten_thousand_events_wait_in_order_and_none_is_lost() {
        let bell = Bell::default();
        (0..10_000).for_each(|number| bell.happened(tiding(number)));
        let news = bell.listen(Duration::from_secs(60));
        assert!(news.changed.len() == MAX_CHANGED && news.all);
        let (waiting, dropped) = bell.take();
        let numbers = waiting.iter().map(|tiding| tiding.uuid.as_u128());
        assert!(numbers.eq(0..10_000));
        assert_eq!(dropped, None);
        assert!(bell.listen(Duration::ZERO).is_quiet());
    }

    #[test]
    fn what_finds_no_place_is_counted_and_what_comes_after_the_next_look_is_kept() {
        let bell = Bell::default();
        let most = MAX_WAITING as u128;
        (0..most + 7).for_each(|number| bell.happened(tiding(number)));
        let (waiting, dropped) = bell.take();
        assert_eq!(waiting.len(), MAX_WAITING);
        assert_eq!(
            waiting.back().map(|last| last.uuid.as_u128()),
            Some(most - 1)
        );
        assert_eq!(dropped.map(|dropped| dropped.count), Some(7));
        bell.happened(tiding(1));
        let (waiting, dropped) = bell.take();
        assert!(waiting.len() == 1 && dropped.is_none());
    }
}
