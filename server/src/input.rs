//! What a caller sends to the stream that runs: bounded by a window, so that a stream which takes its time holds up nothing else.
//!
//! ```text
//! session: Input message --> Feed (refuses what is over the window) --> queue --> Input --> the stream
//! session: Room message  <-- once much of it was taken  <---------------------------'
//! ```

use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use tokio::sync::Notify;
use xman_common::protocol::{INPUT_WINDOW, MAX_INPUT};

/// So much is taken before the caller is told: a key a time needs no answer a time.
const ROOM: u32 = INPUT_WINDOW / 4;
/// Pieces are put together up to this length: a caller who sends byte by byte takes no more memory than another.
const PIECE: usize = 4 * 1024;

/// The session's end.
#[derive(Debug)]
pub(crate) struct Feed {
    /// What the caller may still send.
    window: u32,
    queue: Arc<Queue>,
}

/// The stream's end.
#[derive(Debug)]
pub(crate) struct Input(Arc<Queue>);

#[derive(Debug, Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    /// More waits, or the end has come.
    more: Notify,
    /// Bytes that were taken and of which the caller does not know yet.
    taken: AtomicU32,
    much: Notify,
}

#[derive(Debug, Default)]
struct Waiting {
    pieces: VecDeque<Vec<u8>>,
    has_ended: bool,
}

/// Makes both ends.
pub(crate) fn pair() -> (Feed, Input) {
    let queue = Arc::<Queue>::default();
    let feed = Feed {
        window: INPUT_WINDOW,
        queue: Arc::clone(&queue),
    };
    (feed, Input(queue))
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first piece that waits, and whether no other will come.
    fn first(&self) -> (Option<Vec<u8>>, bool) {
        let mut waiting = self.waiting();
        (waiting.pieces.pop_front(), waiting.has_ended)
    }

    fn end(&self) {
        self.waiting().has_ended = true;
        self.more.notify_one();
    }
}

impl Feed {
    /// Hands on what the caller sent; nothing at all is the end of its input.
    ///
    /// # Errors
    /// What the caller broke.
    pub(crate) fn put(&mut self, bytes: Vec<u8>) -> Result<(), &'static str> {
        if bytes.is_empty() {
            self.queue.end();
            return Ok(());
        }
        if bytes.len() > MAX_INPUT {
            return Err("more input in one message than one holds");
        }
        let left = u32::try_from(bytes.len())
            .ok()
            .and_then(|length| self.window.checked_sub(length));
        self.window = left.ok_or("more input than there was room for")?;
        let mut waiting = self.queue.waiting();
        if waiting.has_ended {
            return Err("input after its end");
        }
        match waiting.pieces.back_mut() {
            Some(last) if last.len() + bytes.len() <= PIECE => last.extend(bytes),
            Some(_) | None => waiting.pieces.push_back(bytes),
        }
        drop(waiting);
        self.queue.more.notify_one();
        Ok(())
    }

    /// Waits until there is much room again, and gives it to the caller. Losing the future loses no room.
    pub(crate) async fn room(&mut self) -> u32 {
        self.queue.much.notified().await;
        let bytes = self.queue.taken.swap(0, Ordering::AcqRel);
        self.window = self.window.saturating_add(bytes);
        bytes
    }
}

impl Drop for Feed {
    fn drop(&mut self) {
        self.queue.end();
    }
}

impl Input {
    /// Waits for the next bytes; nothing where no more will come. Losing the future loses no byte.
    pub(crate) async fn next(&mut self) -> Option<Vec<u8>> {
        loop {
            let (piece, has_ended) = self.0.first();
            if let Some(bytes) = piece {
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                if self.0.taken.fetch_add(length, Ordering::AcqRel) + length >= ROOM {
                    self.0.much.notify_one();
                }
                return Some(bytes);
            }
            if has_ended {
                return None;
            }
            self.0.more.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WHOLE: u32 = 64 * 1024;
    const _: () = assert!(WHOLE as usize == MAX_INPUT);

    #[tokio::test]
    async fn what_is_taken_makes_room_and_nothing_else_does() {
        let (mut feed, mut input) = pair();
        for _ in 0..INPUT_WINDOW / WHOLE {
            feed.put(vec![7; MAX_INPUT]).unwrap();
        }
        assert!(feed.put(vec![7]).is_err());
        for _ in 0..ROOM / WHOLE {
            assert_eq!(input.next().await.unwrap().len(), MAX_INPUT);
        }
        assert_eq!(feed.room().await, ROOM);
        for _ in 0..ROOM / WHOLE {
            feed.put(vec![7; MAX_INPUT]).unwrap();
        }
        assert!(feed.put(vec![7]).is_err());
    }

    #[tokio::test]
    async fn byte_by_byte_is_put_together() {
        let (mut feed, mut input) = pair();
        for _ in 0..PIECE {
            feed.put(vec![7]).unwrap();
        }
        feed.put(vec![8]).unwrap();
        assert_eq!(input.next().await, Some(vec![7; PIECE]));
        assert_eq!(input.next().await, Some(vec![8]));
        drop(feed);
        assert_eq!(input.next().await, None);
    }

    #[tokio::test]
    async fn input_ends_where_the_caller_says_so() {
        let (mut feed, mut input) = pair();
        feed.put(b"last".to_vec()).unwrap();
        feed.put(Vec::new()).unwrap();
        assert!(feed.put(b"late".to_vec()).is_err());
        assert_eq!(input.next().await.as_deref(), Some(b"last".as_slice()));
        assert_eq!(input.next().await, None);
        assert!(feed.put(vec![0; MAX_INPUT + 1]).is_err());
    }
}
