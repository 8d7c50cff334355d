//! One session with one host: connect, then call after call.

use std::{
    io,
    net::SocketAddr,
    ops::ControlFlow,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    net::{TcpStream, lookup_host},
    sync::mpsc,
    task,
    time::{Instant, sleep_until, timeout, timeout_at},
};
use uuid::Uuid;
use xman_common::{
    channel::{Channel, ChannelError, since_1970},
    gss::{self, GssError, Initiator, Step},
    name::{HostName, Principal},
    protocol::{
        Call, CallHeader, Code, Fault, FromCaller, FromHost, INPUT_WINDOW, Item, MAX_INPUT,
        Progress, Reply, Request, Welcome,
    },
    wire::MAX_SEALED,
};

use crate::{hosts::Address, interrupt::Interrupt};

/// How long one of a host's addresses may take to accept a connection: one that is dead must not use up the time of the next.
const DIAL_LIMIT: Duration = Duration::from_secs(5);
/// A host sends a sign of life every five seconds while a call takes long; after this much silence it is given up.
pub const SILENCE: Duration = Duration::from_secs(20);
/// How long after a call's deadline the host's word on it is waited for: it waits up to 1.5 s itself for a change that has begun.
const LAST_WORD: Duration = Duration::from_secs(3);
/// How long the host's word on a cancelled call is waited for.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often a fresh ticket is looked for once the host has said that the old one ends.
const TICKET_WATCH: Duration = Duration::from_secs(5);
/// By how much a ticket must end later to be a newer one: readings of one and the same differ by seconds.
const NEWER: Duration = Duration::from_secs(30);
/// How long Kerberos may take for a fresh ticket while a call waits.
const RENEWAL_LIMIT: Duration = Duration::from_secs(10);
/// What a call's header may take of a sealed frame, in bytes.
const HEADER_ROOM: usize = 2 * 1024;

/// [`MAX_INPUT`], as the window counts.
const WHOLE_INPUT: u32 = 64 * 1024;
const _: () = assert!(WHOLE_INPUT as usize == MAX_INPUT);

/// What a connection may cost.
#[derive(Clone, Debug)]
pub struct ConnectOptions {
    /// How long name look-up, connection and handshake may take together.
    pub timeout: Duration,
    /// The program and its version, for the host's log.
    pub software: String,
}

impl Default for ConnectOptions {
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(30),
            software: concat!("xman-client ", env!("CARGO_PKG_VERSION")).to_owned(),
        }
    }
}

/// How far a connection came before its time was over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Asking for the host's addresses.
    Lookup,
    /// Opening a TCP connection.
    Dial,
    /// Proving who is who: the host or the KDC is silent.
    Handshake,
}

/// Why there is no session. Nothing has happened on the host.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The host's name leads nowhere.
    #[error("the name cannot be resolved: {0}")]
    Lookup(io::Error),
    /// No address accepts a connection; the error of the last one.
    #[error("{address}: {error}")]
    Unreachable {
        /// The address.
        address: SocketAddr,
        /// What the system says.
        error: io::Error,
    },
    /// The time was over.
    #[error("no answer in {:.1} s", after.as_secs_f32())]
    Timeout {
        /// Where it was lost.
        stage: Stage,
        /// How long was waited.
        after: Duration,
    },
    /// There was a connection, but there is no channel.
    #[error(transparent)]
    Channel(#[from] ChannelError),
    /// The host ended the session before it began.
    #[error(transparent)]
    Closing(Fault),
}

/// How a call is made.
#[derive(Clone, Debug)]
pub struct CallOptions {
    /// Names the call; the same id with the same request is carried out once.
    pub id: Uuid,
    /// When the outcome must be there; where absent, as long as the host shows signs of life.
    pub deadline: Option<Instant>,
    /// Which of the host's hypervisors is meant.
    pub hypervisor: Option<String>,
    /// For whom the call is made, where not for the caller itself.
    pub on_behalf_of: Option<Principal>,
    /// Ends the call when it is raised.
    pub interrupt: Interrupt,
}

impl CallOptions {
    /// Returns the options of a call with a fresh id, no deadline and nothing that interrupts it.
    pub fn fresh() -> Self {
        Self {
            id: Uuid::new_v4(),
            deadline: None,
            hypervisor: None,
            on_behalf_of: None,
            interrupt: Interrupt::never(),
        }
    }
}

/// What is told of a call before its outcome.
#[derive(Debug)]
pub enum Event {
    /// The call is sent once more: forget the items it brought so far.
    Again,
    /// A part of the answer.
    Items(Vec<Item>),
    /// How far it is.
    Progress(Progress),
    /// A sign of life: it is under way.
    Alive,
    /// The ticket ends in so many seconds and there is no newer one yet. Said once.
    Expiring(u32),
}

/// Why a call has no reply.
#[derive(Debug, thiserror::Error)]
pub enum CallError {
    /// The host's answer.
    #[error(transparent)]
    Fault(Fault),
    /// The request is too long for a frame; nothing was sent.
    #[error("the request has {bytes} bytes; one call carries at most {limit}")]
    TooLarge {
        /// Its length in bytes.
        bytes: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// It could not be sent whole, so it was not carried out.
    #[error("the call could not be sent: {0}")]
    Unsent(ChannelError),
    /// It was sent, and what came of it is not known: ask again with the same id, never with a new one.
    #[error("{0}")]
    Lost(Loss),
    /// It was cancelled. The host's fault says whether it goes on (`Unknown`) or never began; without one that is not known.
    #[error("cancelled")]
    Cancelled(Option<Fault>),
}

/// How a call was lost.
#[derive(Debug, thiserror::Error)]
pub enum Loss {
    /// No sign of life.
    #[error("the host has been silent for {} s", SILENCE.as_secs())]
    Silent,
    /// Its deadline has passed.
    #[error("no answer before the deadline")]
    Late,
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broken(ChannelError),
    /// The host closed the connection.
    #[error("the host closed the connection")]
    Closed,
    /// The host ended the session and said why.
    #[error("the host ended the session: {0}")]
    Ended(Fault),
}

/// A session with a host.
#[derive(Debug)]
pub struct Client {
    channel: Channel<TcpStream>,
    host: HostName,
    welcome: Welcome,
    ticket: Ticket,
}

/// Our side's view of the ticket that bounds the session.
#[derive(Debug)]
struct Ticket {
    until: SystemTime,
    /// When a fresh one is looked for next; set once the host has said that this one ends.
    watch: Option<Instant>,
    /// Not before: a service's ticket can be shorter than ours, and its renewal would bring the same end again at once.
    rested: Instant,
    warned: bool,
    renewing: Option<(Initiator, SystemTime)>,
}

impl Client {
    /// Opens a session with a host.
    pub async fn connect(
        address: &Address,
        options: &ConnectOptions,
    ) -> Result<Self, ConnectError> {
        let began = Instant::now();
        let deadline = began + options.timeout;
        let late = |stage| ConnectError::Timeout {
            stage,
            after: options.timeout,
        };

        let lookup = lookup_host((address.host.as_str(), address.port));
        let found = timeout_at(deadline, lookup)
            .await
            .map_err(|_| late(Stage::Lookup))?;
        let addresses: Vec<_> = found.map_err(ConnectError::Lookup)?.collect();
        let dialled = dial(&addresses, deadline).await;
        let stream = dialled.map_err(|error| error.unwrap_or_else(|| late(Stage::Dial)))?;
        let _ = stream.set_nodelay(true);
        let greeting = greet(stream, &address.host, &options.software);
        timeout_at(deadline, greeting)
            .await
            .map_err(|_| late(Stage::Handshake))?
    }

    /// Returns the host's principal that was really used.
    pub fn service(&self) -> &Principal {
        self.channel.peer()
    }

    /// Returns what the host said first: who it takes us for, its software, the session's name.
    pub fn welcome(&self) -> &Welcome {
        &self.welcome
    }

    /// Makes a call and waits for its outcome. `events` hears what comes before it; with `Break` it ends the call.
    ///
    /// A call that was cancelled, by `events` or by the interrupt, is [`Cancelled`](CallError::Cancelled) unless it had come to an end.
    pub async fn call(
        &mut self,
        request: &Request,
        options: &CallOptions,
        events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, CallError> {
        self.converse(request, options, &mut None, events).await
    }

    /// Makes a call that is a stream, as [`call`](Self::call) does, and sends what comes through `input`, in pieces of at most [`MAX_INPUT`]
    /// bytes, as fast as the host takes it; once `input` is closed the host is told that no more will come.
    pub async fn converse(
        &mut self,
        request: &Request,
        options: &CallOptions,
        input: &mut Option<mpsc::Receiver<Vec<u8>>>,
        mut events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, CallError> {
        self.send(request, options).await?;
        let mut window = INPUT_WINDOW;
        let mut heard = Instant::now();
        let mut cancelled: Option<Instant> = None;
        loop {
            let silence = heard + SILENCE;
            let patience = match (cancelled, options.deadline) {
                (Some(at), _) => at + FAREWELL,
                (None, Some(deadline)) => silence.min(deadline + LAST_WORD),
                (None, None) => silence,
            };
            let wake = self
                .ticket
                .watch
                .map_or(patience, |watch| watch.min(patience));
            let may_send = window >= WHOLE_INPUT && self.channel.has_room();
            let message = tokio::select! {
                message = self.channel.receive_or_room::<FromHost>() => match message.transpose() {
                    Some(message) => message,
                    None => continue, // the host has read, so there may be more input
                },
                bytes = next(input), if may_send => {
                    let bytes = bytes.unwrap_or_default();
                    if bytes.is_empty() {
                        *input = None;
                    }
                    window = window.saturating_sub(u32::try_from(bytes.len()).unwrap_or(u32::MAX));
                    let message = FromCaller::Input { call: options.id, bytes };
                    let fed = self.channel.feed(&message).await;
                    fed.map_err(|error| CallError::Lost(Loss::Broken(error)))?;
                    continue;
                }
                () = options.interrupt.raised(), if cancelled.is_none() => {
                    cancelled = Some(self.cancel(options.id).await?);
                    continue;
                }
                () = sleep_until(wake) => {
                    if Instant::now() < patience {
                        self.look_for_ticket(&mut events).await?;
                        continue;
                    }
                    return Err(match cancelled {
                        Some(_) => CallError::Cancelled(None),
                        None if Instant::now() < silence => CallError::Lost(Loss::Late),
                        None => CallError::Lost(Loss::Silent),
                    });
                }
            };
            heard = Instant::now();
            let flow = match message.map_err(|error| CallError::Lost(Loss::Broken(error)))? {
                None => return Err(CallError::Lost(Loss::Closed)),
                Some(FromHost::Done { call, outcome }) if call == options.id => {
                    let is_over = |fault: &Fault| {
                        cancelled.is_some() && matches!(fault.code, Code::Busy | Code::Unknown)
                    };
                    return match outcome {
                        Err(fault) if is_over(&fault) => Err(CallError::Cancelled(Some(fault))),
                        outcome => outcome.map_err(CallError::Fault),
                    };
                }
                Some(FromHost::Items { call, items }) if call == options.id => {
                    events(Event::Items(items))
                }
                Some(FromHost::Progress { call, progress }) if call == options.id => {
                    events(Event::Progress(progress))
                }
                Some(FromHost::Room { call, bytes }) => {
                    if call == options.id {
                        window = window.saturating_add(bytes);
                    }
                    ControlFlow::Continue(())
                }
                Some(FromHost::Alive) => events(Event::Alive),
                // Of a call that was let go.
                Some(
                    FromHost::Done { .. } | FromHost::Items { .. } | FromHost::Progress { .. },
                ) => ControlFlow::Continue(()),
                Some(FromHost::Expiring { seconds }) => {
                    let end = SystemTime::now() + Duration::from_secs(seconds.into());
                    self.ticket.until = self.ticket.until.min(end);
                    self.ticket.watch = Some(Instant::now().max(self.ticket.rested));
                    ControlFlow::Continue(())
                }
                Some(FromHost::Renewed { token, until }) => {
                    self.renewed(token, until).await?;
                    ControlFlow::Continue(())
                }
                Some(FromHost::Closing(fault)) => return Err(CallError::Lost(Loss::Ended(fault))),
                Some(FromHost::Welcome(_)) => {
                    return Err(CallError::Lost(Loss::Broken(ChannelError::Broken(
                        "a second Welcome",
                    ))));
                }
            };
            if flow.is_break() && cancelled.is_none() {
                cancelled = Some(self.cancel(options.id).await?);
            }
        }
    }

    async fn send(&mut self, request: &Request, options: &CallOptions) -> Result<(), CallError> {
        let body = request
            .body()
            .map_err(|error| CallError::Unsent(error.into()))?;
        let limit = MAX_SEALED - HEADER_ROOM;
        if body.len() > limit {
            return Err(CallError::TooLarge {
                bytes: body.len(),
                limit,
            });
        }
        let deadline_ms = options.deadline.map(|deadline| {
            u32::try_from(
                deadline
                    .saturating_duration_since(Instant::now())
                    .as_millis(),
            )
            .unwrap_or(u32::MAX)
        });
        let header = CallHeader {
            id: options.id,
            deadline_ms,
            verb: request.verb().code(),
            hypervisor: options.hypervisor.clone(),
            on_behalf_of: options.on_behalf_of.clone(),
        };
        self.channel
            .send(&FromCaller::Call(Call { header, body }))
            .await
            .map_err(CallError::Unsent)
    }

    async fn cancel(&mut self, call: Uuid) -> Result<Instant, CallError> {
        let sent = self.channel.send(&FromCaller::Cancel { call }).await;
        sent.map_err(|error| CallError::Lost(Loss::Broken(error)))?;
        Ok(Instant::now())
    }

    /// Renews the session if there is a newer ticket, else warns once and goes on looking.
    async fn look_for_ticket(
        &mut self,
        events: &mut impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<(), CallError> {
        self.ticket.watch = Some(Instant::now() + TICKET_WATCH);
        if self.ticket.renewing.is_some() {
            return Ok(());
        }
        let (host, until) = (self.host.clone(), self.ticket.until);
        let fresh = task::spawn_blocking(move || fresh_context(&host, until));
        if let Ok(Ok(Ok(Some((pending, token, until))))) = timeout(RENEWAL_LIMIT, fresh).await {
            self.ticket.renewing = Some((pending, until));
            let renew = FromCaller::Renew {
                token,
                until: since_1970(until),
            };
            return self
                .channel
                .send(&renew)
                .await
                .map_err(|error| CallError::Lost(Loss::Broken(error)));
        }
        if !self.ticket.warned {
            self.ticket.warned = true;
            let left = until
                .duration_since(SystemTime::now())
                .unwrap_or(Duration::ZERO)
                .as_secs();
            let _ = events(Event::Expiring(u32::try_from(left).unwrap_or(u32::MAX)));
        }
        Ok(())
    }

    /// Proves the host once more by its token; the channel goes on with its first context.
    async fn renewed(&mut self, token: Vec<u8>, until: u64) -> Result<(), CallError> {
        let Some((pending, ours)) = self.ticket.renewing.take() else {
            return Err(CallError::Lost(Loss::Broken(ChannelError::Broken(
                "a renewal that nobody asked for",
            ))));
        };
        let step = task::spawn_blocking(move || pending.step(Some(&token))).await;
        let proven = match step {
            Ok(Ok(Step::Done(context, _))) if context.peer() == self.channel.peer() => Ok(()),
            Ok(Ok(Step::Done(..) | Step::Continue(..))) => {
                Err(ChannelError::Broken("a renewal by somebody else"))
            }
            Ok(Err(error)) => Err(ChannelError::Gss(error)),
            Err(_) => Err(ChannelError::Broken("the GSSAPI library failed")),
        };
        proven.map_err(|error| CallError::Lost(Loss::Broken(error)))?;
        let theirs = UNIX_EPOCH.checked_add(Duration::from_secs(until));
        self.ticket.until = theirs.map_or(ours, |theirs| ours.min(theirs));
        self.ticket.watch = None;
        self.ticket.rested = Instant::now() + TICKET_WATCH;
        self.ticket.warned = false;
        Ok(())
    }
}

async fn next(input: &mut Option<mpsc::Receiver<Vec<u8>>>) -> Option<Vec<u8>> {
    match input {
        Some(input) => input.recv().await,
        None => std::future::pending().await,
    }
}

/// Tries one address after the other; `None` where the time was over.
async fn dial(
    addresses: &[SocketAddr],
    deadline: Instant,
) -> Result<TcpStream, Option<ConnectError>> {
    let mut last = None;
    for address in addresses {
        let limit = deadline.min(Instant::now() + DIAL_LIMIT);
        let error = match timeout_at(limit, TcpStream::connect(address)).await {
            Ok(Ok(stream)) => return Ok(stream),
            Ok(Err(error)) => error,
            Err(_) if limit >= deadline => return Err(last),
            Err(_) => io::ErrorKind::TimedOut.into(),
        };
        last = Some(ConnectError::Unreachable {
            address: *address,
            error,
        });
    }
    let nowhere =
        || ConnectError::Lookup(io::Error::new(io::ErrorKind::NotFound, "it has no address"));
    Err(Some(last.unwrap_or_else(nowhere)))
}

async fn greet(stream: TcpStream, host: &HostName, software: &str) -> Result<Client, ConnectError> {
    let mut channel = Channel::initiate(stream, host).await?;
    let welcome = channel.introduce(software).await?;
    let ticket = Ticket {
        until: channel.until(),
        watch: None,
        rested: Instant::now(),
        warned: false,
        renewing: None,
    };
    Ok(Client {
        channel,
        host: host.clone(),
        welcome: welcome.map_err(ConnectError::Closing)?,
        ticket,
    })
}

/// Begins a fresh context if the ticket at hand ends later than `until`. Blocks.
fn fresh_context(
    host: &HostName,
    until: SystemTime,
) -> Result<Option<(Initiator, Vec<u8>, SystemTime)>, GssError> {
    let (_, life) = gss::own_ticket()?;
    let end = SystemTime::now() + life;
    if end < until + NEWER {
        return Ok(None);
    }
    match Initiator::new(host)?.step(None)? {
        Step::Continue(pending, token) => Ok(Some((pending, token, end))),
        Step::Done(..) => Ok(None),
    }
}
