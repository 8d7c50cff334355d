//! What a caller sends to the stream that runs: bounded by a window, so that a stream which takes its time holds up nothing else.
//!
//! ```text
//! session: Input message --> Feed (refuses what is over the window) --> queue --> Input --> the stream
//! session: Room message  <-- once much of it was taken  <---------------------------'
//! ```

use std::sync::{
    Arc,
    atomic::{AtomicU32, Ordering},
};

use tokio::sync::{Notify, mpsc};
use xman_common::protocol::{INPUT_WINDOW, MAX_INPUT};

/// So much is taken before the caller is told: a key a time needs no answer a time.
const ROOM: u32 = INPUT_WINDOW / 4;

/// The session's end.
#[derive(Debug)]
pub(crate) struct Feed {
    queue: Option<mpsc::UnboundedSender<Vec<u8>>>,
    /// What the caller may still send.
    window: u32,
    taken: Arc<Taken>,
}

/// The stream's end.
#[derive(Debug)]
pub(crate) struct Input {
    queue: mpsc::UnboundedReceiver<Vec<u8>>,
    taken: Arc<Taken>,
}

#[derive(Debug, Default)]
struct Taken {
    bytes: AtomicU32,
    much: Notify,
}

/// Makes both ends.
pub(crate) fn pair() -> (Feed, Input) {
    let (sender, queue) = mpsc::unbounded_channel();
    let taken = Arc::<Taken>::default();
    let feed = Feed {
        queue: Some(sender),
        window: INPUT_WINDOW,
        taken: Arc::clone(&taken),
    };
    (feed, Input { queue, taken })
}

impl Feed {
    /// Hands on what the caller sent; nothing at all is the end of its input.
    ///
    /// # Errors
    /// What the caller broke.
    pub(crate) fn put(&mut self, bytes: Vec<u8>) -> Result<(), &'static str> {
        if bytes.is_empty() {
            self.queue = None;
            return Ok(());
        }
        if bytes.len() > MAX_INPUT {
            return Err("more input in one message than one holds");
        }
        let left = u32::try_from(bytes.len())
            .ok()
            .and_then(|length| self.window.checked_sub(length));
        self.window = left.ok_or("more input than there was room for")?;
        let Some(queue) = &self.queue else {
            return Err("input after its end");
        };
        // A stream that has ended has no use for it.
        let _ = queue.send(bytes);
        Ok(())
    }

    /// Waits until there is much room again, and gives it to the caller. Losing the future loses no room.
    pub(crate) async fn room(&mut self) -> u32 {
        self.taken.much.notified().await;
        let bytes = self.taken.bytes.swap(0, Ordering::AcqRel);
        self.window = self.window.saturating_add(bytes);
        bytes
    }
}

impl Input {
    /// Waits for the next bytes; nothing where no more will come. Losing the future loses no byte.
    pub(crate) async fn next(&mut self) -> Option<Vec<u8>> {
        let bytes = self.queue.recv().await?;
        let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
        if self.taken.bytes.fetch_add(length, Ordering::AcqRel) + length >= ROOM {
            self.taken.much.notify_one();
        }
        Some(bytes)
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
