//! A frame: u32 big-endian length and that many bytes. The length is checked before anything is allocated, and a clean close
//! is told apart from a torn frame.

use std::{future::poll_fn, io, pin::Pin, task::Poll, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{Sink, SinkExt, Stream};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    time::{Instant, Sleep, sleep_until},
};
use tokio_util::codec::{Decoder, Encoder, Framed};

/// The longest frame before authentication, in bytes: a Kerberos token with a large PAC fits, a flood does not.
pub const MAX_HANDSHAKE: usize = 64 * 1024;
/// The longest sealed frame, in bytes: bounds what an authenticated caller can make the host hold.
pub const MAX_SEALED: usize = 128 * 1024;
/// How long a peer that does not read may keep a frame from leaving.
pub const WRITE_LIMIT: Duration = Duration::from_secs(20);

/// Bytes that may wait for a peer to read before no more should be fed: [`Frames::has_room`].
const OUTGOING: usize = 256 * 1024;

/// Why the next frame did not come or did not go.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The connection broke, or ended in the middle of a frame.
    #[error("the connection broke: {0}")]
    Broken(io::Error),
    /// The peer announced more than is allowed.
    #[error("the peer announced a frame over the limit")]
    TooLarge,
    /// The peer does not read.
    #[error("the peer has not read for {} s", WRITE_LIMIT.as_secs())]
    Unread,
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::InvalidData {
            Self::TooLarge
        } else {
            Self::Broken(error)
        }
    }
}

/// A stream cut into frames.
#[derive(Debug)]
pub struct Frames<S> {
    framed: Framed<S, Cut>,
    /// Bytes fed since the beginning.
    fed: usize,
    /// How many of them had gone when some were left, and until when more have to.
    waiting: Option<(usize, Pin<Box<Sleep>>)>,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Frames<S> {
    /// Cuts a stream into frames of at most [`MAX_HANDSHAKE`] bytes.
    pub fn new(stream: S) -> Self {
        let codec = Cut {
            limit: MAX_HANDSHAKE,
        };
        let mut framed = Framed::new(stream, codec);
        // Who feeds looks at `has_room` first, so feeding itself never waits for a peer that does not read.
        framed.set_backpressure_boundary(2 * OUTGOING);
        Self {
            framed,
            fed: 0,
            waiting: None,
        }
    }

    /// Allows frames of [`MAX_SEALED`] bytes from now on: the peer is known.
    pub fn admit(&mut self) {
        self.framed.codec_mut().limit = MAX_SEALED;
    }

    /// Waits for the next frame and meanwhile sends what was fed, so that two who both send much do not wait for each other; `None` is a clean
    /// close. Losing the future loses no byte in either direction.
    pub async fn read(&mut self) -> Result<Option<BytesMut>, WireError> {
        loop {
            if let Some(read) = self.read_or_room().await? {
                return Ok(read);
            }
        }
    }

    /// As [`read`](Self::read), but ends with nothing as well once there is [room](Self::has_room) where there was none.
    pub async fn read_or_room(&mut self) -> Result<Option<Option<BytesMut>>, WireError> {
        let was_full = !self.has_room();
        poll_fn(|context| {
            if let Poll::Ready(sent) = Pin::new(&mut self.framed).poll_flush(context) {
                sent?;
                self.waiting = None;
            } else {
                let gone = self.fed.wrapping_sub(self.framed.write_buffer().len());
                let limit = match &mut self.waiting {
                    Some((before, limit)) if *before == gone => limit,
                    waiting => {
                        let limit = Box::pin(sleep_until(Instant::now() + WRITE_LIMIT));
                        &mut waiting.insert((gone, limit)).1
                    }
                };
                if limit.as_mut().poll(context).is_ready() {
                    return Poll::Ready(Err(WireError::Unread));
                }
            }
            match Pin::new(&mut self.framed).poll_next(context) {
                Poll::Ready(next) => {
                    Poll::Ready(next.transpose().map(Some).map_err(WireError::from))
                }
                Poll::Pending if was_full && self.has_room() => Poll::Ready(Ok(None)),
                Poll::Pending => Poll::Pending,
            }
        })
        .await
    }

    /// Returns whether the peer reads fast enough for more to be fed; [`read`](Self::read) and [`flush`](Self::flush) make room.
    pub fn has_room(&self) -> bool {
        self.framed.write_buffer().len() < OUTGOING
    }

    /// Adds a frame to what the next [`flush`](Self::flush) or [`read`](Self::read) sends.
    pub async fn feed(&mut self, frame: Bytes) -> Result<(), WireError> {
        self.fed = self.fed.wrapping_add(size_of::<u32>() + frame.len());
        bounded(self.framed.feed(frame)).await
    }

    /// Sends what was fed.
    pub async fn flush(&mut self) -> Result<(), WireError> {
        bounded(SinkExt::<Bytes>::flush(&mut self.framed)).await
    }
}

async fn bounded(write: impl Future<Output = io::Result<()>>) -> Result<(), WireError> {
    match tokio::time::timeout(WRITE_LIMIT, write).await {
        Ok(written) => Ok(written?),
        Err(_) => Err(WireError::Unread),
    }
}

/// Where frames begin and end. tokio-util's own codec takes a stream that ends right after a length for one that was closed.
#[derive(Debug)]
struct Cut {
    limit: usize,
}

impl Cut {
    fn allow(&self, length: usize) -> io::Result<()> {
        if length > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a frame over the limit",
            ));
        }
        Ok(())
    }
}

impl Decoder for Cut {
    type Item = BytesMut;
    type Error = io::Error;

    fn decode(&mut self, bytes: &mut BytesMut) -> io::Result<Option<BytesMut>> {
        let Some(length) = bytes
            .first_chunk()
            .map(|length| u32::from_be_bytes(*length) as usize)
        else {
            return Ok(None);
        };
        self.allow(length)?;
        let whole = size_of::<u32>() + length;
        if bytes.len() < whole {
            bytes.reserve(whole - bytes.len());
            return Ok(None);
        }
        bytes.advance(size_of::<u32>());
        Ok(Some(bytes.split_to(length)))
    }
}

impl Encoder<Bytes> for Cut {
    type Error = io::Error;

    fn encode(&mut self, frame: Bytes, bytes: &mut BytesMut) -> io::Result<()> {
        self.allow(frame.len())?;
        let length = u32::try_from(frame.len()).map_err(io::Error::other)?;
        bytes.reserve(size_of::<u32>() + frame.len());
        bytes.put_u32(length);
        bytes.put(frame);
        Ok(())
    }
}
