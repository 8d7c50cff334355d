//! From a bare connection to a channel: preface, handshake, and then one sealed message a frame.
//!
//! ```text
//! caller                                  host
//!   "XMAN" lowest highest        ->                    in clear
//!                                <-  "XMAN" version clock
//!   token                        ->                    frames of one kind byte and a GSSAPI token
//!                                <-  token | refusal
//!   Hello(both prefaces)         ->                    sealed from here on
//!                                <-  Welcome(both prefaces)
//! ```

use std::{
    io,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task,
};

use crate::{
    codec::{self, CodecError},
    gss::{Acceptor, Context, GssError, Initiator, Keys, OVERHEAD, Step, Trouble},
    name::{HostName, Principal},
    protocol::{Fault, FromCaller, FromHost, Hello, VERSION, Welcome},
    wire::{Frames, MAX_SEALED, WireError},
};

/// What both sides begin with.
pub const MAGIC: &[u8; 4] = b"XMAN";
/// The length of the caller's preface, in bytes: magic, lowest and highest version.
pub const CALLER_PREFACE: usize = 8;
/// The length of the host's preface, in bytes: magic, version, clock.
pub const HOST_PREFACE: usize = 14;
/// The host's version when it speaks none of the caller's.
const NO_COMMON_VERSION: u16 = 0;
/// The host's version when it has no room for one more connection.
const NO_ROOM: u16 = u16::MAX;
/// Kerberos needs one token each way; more than this is no handshake but a way to keep the host busy.
const MAX_TOKENS: usize = 6;

const TOKEN: u8 = 0;
const REFUSAL: u8 = 1;

/// Why there is no channel, or no longer.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The connection.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// Our side of Kerberos.
    #[error(transparent)]
    Gss(#[from] GssError),
    /// The host refused our ticket; its reason is not authenticated.
    #[error("the host refused the ticket: {}", reason.text())]
    Refused {
        /// What it said.
        reason: Refusal,
        /// How far its clock is ahead of ours, in seconds.
        skew: i64,
    },
    /// The peer does not speak this protocol.
    #[error("the peer does not speak the xman protocol")]
    NotXman,
    /// No version in common.
    #[error("the peer speaks no version of the protocol that this program speaks ({VERSION})")]
    Version,
    /// The host has all the connections it takes.
    #[error("the host has no room for one more connection")]
    NoRoom,
    /// The connection ended in the middle of the handshake.
    #[error("the peer closed the connection during the handshake")]
    Closed,
    /// What was said in clear arrived changed.
    #[error("the preface was changed on its way: somebody is in between")]
    Tampered,
    /// The peer sent what the protocol does not allow here.
    #[error("the peer broke the protocol: {0}")]
    Broken(&'static str),
    /// A message that is none.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl From<io::Error> for ChannelError {
    fn from(error: io::Error) -> Self {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            Self::Closed
        } else {
            Self::Wire(WireError::Broken(error))
        }
    }
}

/// Why a host refuses a ticket, as far as it tells a stranger.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// The clocks are too far apart.
    ClockSkew,
    /// The host has no key for the ticket.
    NoKey,
    /// The ticket has expired.
    Expired,
    /// This handshake was seen before.
    Replay,
    /// Anything else; its log says what.
    Other,
}

impl Refusal {
    const ALL: [Self; 5] = [
        Self::ClockSkew,
        Self::NoKey,
        Self::Expired,
        Self::Replay,
        Self::Other,
    ];

    fn code(self) -> u8 {
        match self {
            Self::ClockSkew => 1,
            Self::NoKey => 2,
            Self::Expired => 3,
            Self::Replay => 4,
            Self::Other => 255,
        }
    }

    /// Returns the refusal in words.
    pub fn text(self) -> &'static str {
        match self {
            Self::ClockSkew => "the clocks differ too much",
            Self::NoKey => "it has no key for that ticket",
            Self::Expired => "the ticket has expired",
            Self::Replay => "the same handshake was seen before",
            Self::Other => "its log says why",
        }
    }
}

impl From<Trouble> for Refusal {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::ClockSkew => Self::ClockSkew,
            Trouble::NoKey => Self::NoKey,
            Trouble::Expired => Self::Expired,
            Trouble::Replay => Self::Replay,
            Trouble::NoTicket
            | Trouble::UnknownService
            | Trouble::KdcUnreachable
            | Trouble::UnknownRealm
            | Trouble::WeakContext
            | Trouble::BadToken
            | Trouble::Other => Self::Other,
        }
    }
}

/// What both sides said in clear.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Prefaces {
    /// The caller's.
    pub caller: Vec<u8>,
    /// The host's.
    pub host: Vec<u8>,
}

/// An authenticated, sealed stream of messages.
#[derive(Debug)]
pub struct Channel<S> {
    frames: Frames<S>,
    context: Context,
    prefaces: Prefaces,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Channel<S> {
    /// Opens a channel to `host` over a fresh connection. Has no deadline of its own.
    pub async fn initiate(mut stream: S, host: &HostName) -> Result<Self, ChannelError> {
        let mut caller = Vec::with_capacity(CALLER_PREFACE);
        caller.put_slice(MAGIC);
        caller.put_u16(VERSION);
        caller.put_u16(VERSION);
        stream.write_all(&caller).await?;
        let mut answer = [0; HOST_PREFACE];
        stream.read_exact(&mut answer).await?;
        let skew = read_answer(&answer)?;
        let prefaces = Prefaces {
            caller,
            host: answer.to_vec(),
        };

        let mut frames = Frames::new(stream);
        let mut pending = Initiator::new(host)?;
        let mut incoming: Option<BytesMut> = None;
        for _ in 0..MAX_TOKENS {
            match blocking(move || pending.step(incoming.as_deref())).await? {
                Step::Done(context, token) => {
                    if let Some(token) = token {
                        send_handshake(&mut frames, TOKEN, &token).await?;
                    }
                    frames.admit();
                    return Ok(Self {
                        frames,
                        context,
                        prefaces,
                    });
                }
                Step::Continue(next, token) => {
                    send_handshake(&mut frames, TOKEN, &token).await?;
                    pending = next;
                    incoming = Some(receive_token(&mut frames, skew).await?);
                }
            }
        }
        Err(ChannelError::Broken("too many tokens"))
    }

    /// Lets a caller prove who it is. Has no deadline of its own.
    pub async fn accept(mut stream: S, keys: &Keys) -> Result<Self, ChannelError> {
        let mut caller = [0; CALLER_PREFACE];
        stream.read_exact(&mut caller).await?;
        let version = choose_version(&caller)?;
        let host = host_preface(version.unwrap_or(NO_COMMON_VERSION));
        stream.write_all(&host).await?;
        if version.is_none() {
            return Err(ChannelError::Version);
        }

        let mut frames = Frames::new(stream);
        let mut pending = Acceptor::new(keys);
        for _ in 0..MAX_TOKENS {
            let token = receive_token(&mut frames, 0).await?;
            match blocking(move || pending.step(&token)).await {
                Ok(Step::Done(context, token)) => {
                    if let Some(token) = token {
                        send_handshake(&mut frames, TOKEN, &token).await?;
                    }
                    frames.admit();
                    return Ok(Self {
                        frames,
                        context,
                        prefaces: Prefaces {
                            caller: caller.to_vec(),
                            host,
                        },
                    });
                }
                Ok(Step::Continue(next, token)) => {
                    send_handshake(&mut frames, TOKEN, &token).await?;
                    pending = next;
                }
                Err(ChannelError::Gss(error)) => {
                    send_handshake(&mut frames, REFUSAL, &[Refusal::from(error.trouble).code()])
                        .await?;
                    return Err(error.into());
                }
                Err(other) => return Err(other),
            }
        }
        Err(ChannelError::Broken("too many tokens"))
    }

    /// Returns who is at the other end.
    pub fn peer(&self) -> &Principal {
        self.context.peer()
    }

    /// Returns who we are to the other end: of a host the name that it was called by.
    pub fn own(&self) -> &Principal {
        self.context.own()
    }

    /// Introduces the program that called, and waits for the host's welcome, or for its word why there is none.
    pub async fn introduce(
        &mut self,
        software: &str,
    ) -> Result<Result<Welcome, Fault>, ChannelError> {
        let Prefaces { caller, host } = self.prefaces.clone();
        let hello = Hello {
            preface: caller.clone(),
            answer: host.clone(),
            software: software.to_owned(),
            until: since_1970(self.until()),
        };
        self.send(&FromCaller::Hello(hello)).await?;
        match self.receive().await? {
            Some(FromHost::Welcome(welcome))
                if welcome.preface == caller && welcome.answer == host =>
            {
                Ok(Ok(welcome))
            }
            Some(FromHost::Welcome(_)) => Err(ChannelError::Tampered),
            Some(FromHost::Closing(fault)) => Ok(Err(fault)),
            Some(_) => Err(ChannelError::Broken("the first message was no Welcome")),
            None => Err(ChannelError::Closed),
        }
    }

    /// Returns when the ticket ends by the GSSAPI library's account.
    pub fn until(&self) -> SystemTime {
        self.context.until()
    }

    /// Returns what was said in clear, to be confirmed in the first sealed messages.
    pub fn prefaces(&self) -> &Prefaces {
        &self.prefaces
    }

    /// Waits for the next message and meanwhile sends what was fed; `None` is a clean close. Losing the future loses no message.
    pub async fn receive<M: DeserializeOwned>(&mut self) -> Result<Option<M>, ChannelError> {
        let frame = self.frames.read().await?;
        self.open(frame)
    }

    /// As [`receive`](Self::receive), for who has more to feed: ends with nothing as well once there is [room](Self::has_room) where there was
    /// none.
    pub async fn receive_or_room<M: DeserializeOwned>(
        &mut self,
    ) -> Result<Option<Option<M>>, ChannelError> {
        match self.frames.read_or_room().await? {
            Some(frame) => self.open(frame).map(Some),
            None => Ok(None),
        }
    }

    fn open<M: DeserializeOwned>(
        &mut self,
        frame: Option<BytesMut>,
    ) -> Result<Option<M>, ChannelError> {
        let Some(frame) = frame else { return Ok(None) };
        let opened = self.context.unwrap(&frame)?;
        Ok(Some(codec::decode(opened.as_ref())?))
    }

    /// Returns whether the peer reads fast enough for more to be fed; [`receive`](Self::receive) makes room.
    pub fn has_room(&self) -> bool {
        self.frames.has_room()
    }

    /// Seals a message and adds it to what the next [`flush`](Self::flush) or [`receive`](Self::receive) sends.
    pub async fn feed<M: Serialize>(&mut self, message: &M) -> Result<(), ChannelError> {
        let bytes = codec::encode(message)?;
        if bytes.len() + OVERHEAD > MAX_SEALED {
            return Err(ChannelError::Broken("a message over the frame limit"));
        }
        let token = self.context.wrap(&bytes)?;
        Ok(self.frames.feed(token).await?)
    }

    /// Sends what was fed.
    pub async fn flush(&mut self) -> Result<(), ChannelError> {
        Ok(self.frames.flush().await?)
    }

    /// Seals and sends one message.
    pub async fn send<M: Serialize>(&mut self, message: &M) -> Result<(), ChannelError> {
        self.feed(message).await?;
        self.flush().await
    }
}

/// Returns a point in time as the protocol has it, in seconds since 1970.
pub fn since_1970(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_secs()
}

/// Tells a caller, before it has said anything, that there is no room for it.
pub async fn turn_away<S: AsyncWrite + Unpin>(mut stream: S) -> io::Result<()> {
    stream.write_all(&host_preface(NO_ROOM)).await?;
    stream.shutdown().await
}

fn host_preface(version: u16) -> Vec<u8> {
    let clock = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_millis();
    let mut preface = Vec::with_capacity(HOST_PREFACE);
    preface.put_slice(MAGIC);
    preface.put_u16(version);
    preface.put_i64(i64::try_from(clock).unwrap_or(i64::MAX));
    preface
}

/// Returns how many seconds the host's clock is ahead of ours.
fn read_answer(answer: &[u8; HOST_PREFACE]) -> Result<i64, ChannelError> {
    let [m0, m1, m2, m3, v0, v1, clock @ ..] = *answer;
    if [m0, m1, m2, m3] != *MAGIC {
        return Err(ChannelError::NotXman);
    }
    match u16::from_be_bytes([v0, v1]) {
        VERSION => {}
        NO_ROOM => return Err(ChannelError::NoRoom),
        _ => return Err(ChannelError::Version),
    }
    let ours = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or(Duration::ZERO)
        .as_millis();
    let ours = i64::try_from(ours).unwrap_or(i64::MAX);
    Ok(i64::from_be_bytes(clock).saturating_sub(ours) / 1000)
}

fn choose_version(caller: &[u8; CALLER_PREFACE]) -> Result<Option<u16>, ChannelError> {
    let [m0, m1, m2, m3, l0, l1, h0, h1] = *caller;
    if [m0, m1, m2, m3] != *MAGIC {
        return Err(ChannelError::NotXman);
    }
    let spoken = u16::from_be_bytes([l0, l1])..=u16::from_be_bytes([h0, h1]);
    Ok(spoken.contains(&VERSION).then_some(VERSION))
}

async fn send_handshake<S: AsyncRead + AsyncWrite + Unpin>(
    frames: &mut Frames<S>,
    kind: u8,
    payload: &[u8],
) -> Result<(), ChannelError> {
    let mut frame = BytesMut::with_capacity(payload.len() + 1);
    frame.put_u8(kind);
    frame.put_slice(payload);
    frames.feed(Bytes::from(frame)).await?;
    Ok(frames.flush().await?)
}

async fn receive_token<S: AsyncRead + AsyncWrite + Unpin>(
    frames: &mut Frames<S>,
    skew: i64,
) -> Result<BytesMut, ChannelError> {
    let mut frame = frames.read().await?.ok_or(ChannelError::Closed)?;
    match frame.first().copied() {
        Some(TOKEN) => Ok(frame.split_off(1)),
        Some(REFUSAL) => {
            let code = frame.get(1).copied().unwrap_or(Refusal::Other.code());
            let reason = Refusal::ALL
                .into_iter()
                .find(|r| r.code() == code)
                .unwrap_or(Refusal::Other);
            Err(ChannelError::Refused { reason, skew })
        }
        Some(_) | None => Err(ChannelError::Broken("neither token nor refusal")),
    }
}

/// GSSAPI waits for KDCs, files and the replay cache.
async fn blocking<T: Send + 'static>(
    step: impl FnOnce() -> Result<T, GssError> + Send + 'static,
) -> Result<T, ChannelError> {
    match task::spawn_blocking(step).await {
        Ok(done) => Ok(done?),
        Err(_) => Err(ChannelError::Broken("the GSSAPI library failed")),
    }
}

/// A clock offset in words, as `412 s ahead of`.
pub fn skew_in_words(skew: i64) -> String {
    match skew {
        0 => "in step with".to_owned(),
        ahead if ahead > 0 => format!("{ahead} s ahead of"),
        behind => format!("{} s behind", behind.unsigned_abs()),
    }
}
