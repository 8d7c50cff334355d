//! A frame: u32 big-endian length and that many bytes. The length is checked before anything is allocated, and a clean close
//! is told apart from a torn frame.

use std::{io, time::Duration};

use bytes::{Buf, BufMut, Bytes, BytesMut};
use futures_util::{SinkExt, StreamExt};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::codec::{Decoder, Encoder, Framed};

/// The longest frame before authentication, in bytes: a Kerberos token with a large PAC fits, a flood does not.
pub const MAX_HANDSHAKE: usize = 64 * 1024;
/// The longest sealed frame, in bytes: bounds what an authenticated caller can make the host hold.
pub const MAX_SEALED: usize = 128 * 1024;
/// How long a peer that does not read may keep a frame from leaving.
pub const WRITE_LIMIT: Duration = Duration::from_secs(20);

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
}

impl<S: AsyncRead + AsyncWrite + Unpin> Frames<S> {
    /// Cuts a stream into frames of at most [`MAX_HANDSHAKE`] bytes.
    pub fn new(stream: S) -> Self {
        let codec = Cut {
            limit: MAX_HANDSHAKE,
        };
        Self {
            framed: Framed::new(stream, codec),
        }
    }

    /// Allows frames of [`MAX_SEALED`] bytes from now on: the peer is known.
    pub fn admit(&mut self) {
        self.framed.codec_mut().limit = MAX_SEALED;
    }

    /// Waits for the next frame; `None` is a clean close. Losing the future loses no byte.
    pub async fn read(&mut self) -> Result<Option<BytesMut>, WireError> {
        self.framed
            .next()
            .await
            .transpose()
            .map_err(WireError::from)
    }

    /// Adds a frame to what the next [`flush`](Self::flush) sends; sends by itself once much has gathered.
    pub async fn feed(&mut self, frame: Bytes) -> Result<(), WireError> {
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
