//! What has happened since the reader last looked: events leave it here, and it never grows.

use std::{
    collections::HashSet,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use uuid::Uuid;

/// Events of one domain that come close together cost one reading.
const GATHER: Duration = Duration::from_millis(10);
/// Domains read one by one after events; beyond that all are read, and the list stays short whatever libvirt sends.
const MAX_CHANGED: usize = 64;

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
}

impl News {
    fn is_quiet(&self) -> bool {
        self.changed.is_empty() && !self.all && !self.closed && !self.stop
    }
}

impl Bell {
    /// A domain should be read again.
    pub(super) fn changed(&self, uuid: Uuid) {
        let mut news = self.news();
        if news.changed.len() < MAX_CHANGED {
            news.changed.insert(uuid);
        } else if !news.changed.contains(&uuid) {
            news.all = true;
        }
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

    /// Waits for news, at most so long, gathers for a moment what comes with it, and takes it. `stop` stays.
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
        let stop = news.stop;
        std::mem::replace(
            &mut *news,
            News {
                stop,
                ..News::default()
            },
        )
    }

    fn news(&self) -> MutexGuard<'_, News> {
        self.news.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
