//! One connection from handshake to close. Whoever audits xmand begins here and goes on with [`call`], a call's life.
//!
//! ```text
//!            handshake, seat, Hello            calls, one after another
//! stranger ------------------------> session ---------------------------> Items, Progress, Done
//!                                       |
//!                                       +--> ends: closed by the caller, ticket's end, idle, host stopping, broken protocol
//! ```

use std::{
    collections::VecDeque,
    net::IpAddr,
    pin::Pin,
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use tokio::{
    net::TcpStream,
    sync::mpsc,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until, timeout},
};
use uuid::Uuid;
use xman_common::{
    channel::{Channel, ChannelError, Prefaces},
    gss::{Acceptor, Context, GssError, Step, Trouble},
    name::Principal,
    protocol::{
        Call, Code, Effect, Fault, FromCaller, FromHost, Hello, MAX_CALLS_AHEAD, Verb, Welcome,
    },
};
use xman_policy::UnixGroups;

use crate::{
    Host, SOFTWARE,
    audit::{Kind, Record, quoted},
    call,
    caller::{Caller, Outcome, Piece},
    clock::seconds,
    door::{Entrance, Seat},
    input::{self, Feed},
};

/// A sign of life while a call takes long.
const ALIVE: Duration = Duration::from_secs(5);
/// A caller hears so long before its ticket ends.
const EXPIRY_WARNING: Duration = Duration::from_secs(120);
/// Messages of the running call that wait for the connection: a caller that does not read stops its own call, not the host.
const OUTBOX: usize = 16;

/// A connection's life.
pub(crate) async fn run(
    stream: TcpStream,
    address: IpAddr,
    port: u16,
    mut entrance: Entrance,
    host: Arc<Host>,
) {
    let _ = stream.set_nodelay(true);
    let handshake = timeout(host.config.limits.handshake, greet(stream, &host));
    let greeted = tokio::select! {
        greeted = handshake => greeted.unwrap_or(Err(ChannelError::Broken("the handshake took too long"))),
        () = entrance.wanted() => Err(ChannelError::Broken("its place was wanted while it was silent")),
        () = host.stopping.cancelled() => return,
    };
    let (mut channel, hello) = match greeted {
        Ok(greeted) => greeted,
        Err(error) => return refused(&error, address, &host),
    };
    let principal = channel.peer().clone();
    let Ok(seat) = entrance.prove(&principal, &host.config.limits) else {
        host.audit.note(
            Record::new(
                Kind::Refused,
                format!(
                    "{} from {address} refused: it has all the sessions it may have",
                    quoted(principal.as_str())
                ),
            )
            .with("principal", principal.as_str())
            .with("address", address.to_string()),
        );
        let fault = Fault::new(
            Code::Busy,
            "you have as many sessions open as one principal may have; close some",
        );
        let _ = channel.send(&FromHost::Closing(fault)).await;
        return;
    };
    let until = sooner(channel.until(), hello.until);
    let session = Uuid::new_v4()
        .simple()
        .to_string()
        .get(..12)
        .unwrap_or_default()
        .to_owned();
    let proven = Arc::new(host.people.find(&principal).await);
    if let UnixGroups::Unknown(why) = &proven.unix_groups {
        tracing::warn!(%principal, "its Unix groups are not known in this session: {why}");
    }
    let caller = Caller {
        person: Arc::clone(&proven),
        proven,
        address,
        called: channel.own().clone(),
        session,
        until,
    };
    host.audit.note(
        caller
            .record(
                Kind::Opened,
                format!(
                    "{} connected from {address}",
                    quoted(caller.proven.principal.as_str())
                ),
            )
            .with("port", port.to_string())
            .with("software", &hello.software)
            .with("until", seconds(until).to_string()),
    );
    let why = Session::new(channel, caller.clone(), seat, Arc::clone(&host))
        .serve()
        .await;
    host.audit.note(caller.record(
        Kind::Closed,
        format!(
            "{} from {address} left: {why}",
            quoted(caller.proven.principal.as_str())
        ),
    ));
}

/// Handshake and the first sealed message, which must repeat what was said in clear.
async fn greet(
    stream: TcpStream,
    host: &Host,
) -> Result<(Channel<TcpStream>, Hello), ChannelError> {
    let mut channel = Channel::accept(stream, &host.keys).await?;
    let Some(FromCaller::Hello(hello)) = channel.receive().await? else {
        return Err(ChannelError::Broken("the first message was no Hello"));
    };
    let Prefaces { caller, host } = channel.prefaces();
    if hello.preface != *caller || hello.answer != *host {
        return Err(ChannelError::Tampered);
    }
    Ok((channel, hello))
}

/// A port probe that says nothing is no event; everything else is.
fn refused(error: &ChannelError, address: IpAddr, host: &Host) {
    if matches!(error, ChannelError::Closed) {
        tracing::debug!(%address, "a connection was closed before it said anything");
        return;
    }
    host.audit.note(
        Record::new(
            Kind::Refused,
            format!("handshake from {address} failed: {error}"),
        )
        .with("address", address.to_string())
        .with("error", error.to_string()),
    );
}

struct Running {
    id: Uuid,
    verb: Option<Verb>,
    work: Pin<Box<dyn Future<Output = Outcome> + Send>>,
    /// What came of it, while there is no room to say so.
    ended: Option<Outcome>,
    outbox: mpsc::Receiver<Piece>,
    /// Of a stream.
    feed: Feed,
}

impl Running {
    fn effect(&self) -> Option<Effect> {
        self.verb.map(Verb::effect)
    }
}

enum Next {
    Received(Result<Option<FromCaller>, ChannelError>),
    Piece(Piece),
    Done(Outcome),
    Room(u32),
    Ended,
    /// The caller has read what it kept waiting.
    Sent,
    Tick,
    Deadline,
    Stopping,
}

struct Session {
    channel: Channel<TcpStream>,
    caller: Caller,
    host: Arc<Host>,
    waiting: VecDeque<Call>,
    running: Option<Running>,
    warned: bool,
    /// Whoever waits or follows here has been told that the host stops.
    stopped: bool,
    last_call: Instant,
    _seat: Seat,
}

impl Session {
    fn new(channel: Channel<TcpStream>, caller: Caller, seat: Seat, host: Arc<Host>) -> Self {
        Self {
            channel,
            caller,
            host,
            waiting: VecDeque::new(),
            running: None,
            warned: false,
            stopped: false,
            last_call: Instant::now(),
            _seat: seat,
        }
    }

    /// Serves until the session ends, and says why it ended.
    async fn serve(mut self) -> String {
        if let Err(error) = self.welcome().await {
            return error.to_string();
        }
        match self.converse().await {
            Ok(farewell) => {
                let why = farewell
                    .as_ref()
                    .map_or_else(|| "done".to_owned(), |fault| fault.message.clone());
                if let Some(fault) = farewell {
                    let _ = self.channel.send(&FromHost::Closing(fault)).await;
                }
                why
            }
            Err(error) => error.to_string(),
        }
    }

    async fn welcome(&mut self) -> Result<(), ChannelError> {
        let Prefaces { caller, host } = self.channel.prefaces().clone();
        let welcome = Welcome {
            preface: caller,
            answer: host,
            software: SOFTWARE.to_owned(),
            principal: self.caller.proven.principal.clone(),
            until: seconds(self.caller.until),
            session: self.caller.session.clone(),
        };
        self.channel.send(&FromHost::Welcome(welcome)).await
    }

    async fn converse(&mut self) -> Result<Option<Fault>, ChannelError> {
        let mut alive = interval_at(Instant::now() + ALIVE, ALIVE);
        alive.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.start_next();
            let stopping = self.host.stopping.clone();
            let stopped = self.stopped;
            if stopped && self.running.is_none() {
                return Ok(Some(Fault::new(Code::Unavailable, "xmand is stopping")));
            }
            let deadline = self.next_deadline();
            let next = {
                let (channel, running) = (&mut self.channel, &mut self.running);
                let has_room = channel.has_room();
                tokio::select! {
                    biased; // no flood, in or out, puts off the ticket's end
                    () = sleep_until(deadline) => Next::Deadline,
                    () = stopping.cancelled(), if !stopped => Next::Stopping,
                    next = next(running, has_room) => next,
                    received = channel.receive_or_room() => match received.transpose() {
                        Some(received) => Next::Received(received),
                        None => Next::Sent,
                    },
                    _ = alive.tick() => Next::Tick,
                }
            };
            match next {
                Next::Received(Ok(None)) => return Ok(None),
                Next::Received(Ok(Some(message))) => self.take(message).await?,
                Next::Received(Err(error)) => return Err(error),
                Next::Piece(piece) => self.pass_on(piece).await?,
                Next::Done(outcome) => self.finish(outcome).await?,
                Next::Room(bytes) => self.make_room(bytes).await?,
                Next::Ended | Next::Sent => {}
                // Who has not read what was sent so far needs no sign of life.
                Next::Tick if self.running.is_some() && self.channel.has_room() => {
                    self.channel.feed(&FromHost::Alive).await?;
                }
                Next::Tick => {}
                Next::Stopping => self.stop().await?,
                Next::Deadline => {
                    if let Some(farewell) = self.overdue().await? {
                        return Ok(Some(farewell));
                    }
                }
            }
        }
    }

    fn start_next(&mut self) {
        if self.running.is_some() || self.host.stopping.is_cancelled() {
            return;
        }
        if let Some(call) = self.waiting.pop_front() {
            let (sender, outbox) = mpsc::channel(OUTBOX);
            let (feed, input) = input::pair();
            let verb = Verb::ALL
                .iter()
                .copied()
                .find(|verb| verb.code() == call.header.verb);
            let id = call.header.id;
            let work = call::start(
                call,
                self.caller.clone(),
                sender,
                input,
                Arc::clone(&self.host),
            );
            self.running = Some(Running {
                id,
                verb,
                work,
                ended: None,
                outbox,
                feed,
            });
        }
    }

    async fn take(&mut self, message: FromCaller) -> Result<(), ChannelError> {
        match message {
            FromCaller::Call(call) if self.waiting.len() >= MAX_CALLS_AHEAD => {
                let fault = Fault::new(
                    Code::Busy,
                    format!("more than {MAX_CALLS_AHEAD} calls sent ahead on one connection"),
                );
                self.channel
                    .feed(&FromHost::Done {
                        call: call.header.id,
                        outcome: Err(fault),
                    })
                    .await
            }
            FromCaller::Call(call) => {
                self.last_call = Instant::now();
                self.waiting.push_back(call);
                Ok(())
            }
            FromCaller::Cancel { call } => self.cancel(call).await,
            FromCaller::Renew { token, until } => self.renew(token, until).await,
            FromCaller::Hello(_) => Err(ChannelError::Broken("a second Hello")),
            FromCaller::Input { call, bytes } => self.put(call, bytes),
        }
    }

    fn put(&mut self, call: Uuid, bytes: Vec<u8>) -> Result<(), ChannelError> {
        match &mut self.running {
            Some(running) if running.id == call && running.effect() == Some(Effect::Stream) => {
                running.feed.put(bytes).map_err(ChannelError::Broken)
            }
            Some(running) if running.id == call => {
                Err(ChannelError::Broken("input for a call that takes none"))
            }
            Some(_) | None if self.waiting.iter().any(|waiting| waiting.header.id == call) => {
                Err(ChannelError::Broken("input for a call that has not begun"))
            }
            Some(_) | None => Ok(()), // its outcome is on its way already
        }
    }

    async fn make_room(&mut self, bytes: u32) -> Result<(), ChannelError> {
        match &self.running {
            Some(Running { id: call, .. }) => {
                self.channel
                    .feed(&FromHost::Room { call: *call, bytes })
                    .await
            }
            None => Ok(()),
        }
    }

    async fn pass_on(&mut self, first: Piece) -> Result<(), ChannelError> {
        let Some(running) = &mut self.running else {
            return Ok(());
        };
        let call = running.id;
        let mut piece = first;
        // So many a turn: what refills as fast as it is sent does not put off the ticket's end.
        for left in (0..OUTBOX).rev() {
            let message = match piece {
                Piece::Items(items) => FromHost::Items { call, items },
                Piece::Progress(progress) => FromHost::Progress { call, progress },
            };
            self.channel.feed(&message).await?;
            // Without room feeding would wait for the peer, and the whole session with it.
            if left == 0 || !self.channel.has_room() {
                break;
            }
            match running.outbox.try_recv() {
                Ok(more) => piece = more,
                Err(_) => break,
            }
        }
        Ok(())
    }

    async fn finish(&mut self, outcome: Outcome) -> Result<(), ChannelError> {
        self.last_call = Instant::now();
        match self.running.take() {
            Some(running) => {
                self.channel
                    .feed(&FromHost::Done {
                        call: running.id,
                        outcome,
                    })
                    .await
            }
            None => Ok(()),
        }
    }

    /// A read ends; a change that has begun goes on without its caller; a call that waits never begins.
    async fn cancel(&mut self, call: Uuid) -> Result<(), ChannelError> {
        if let Some(at) = self
            .waiting
            .iter()
            .position(|waiting| waiting.header.id == call)
        {
            self.waiting.remove(at);
            let fault = Fault::new(Code::Busy, "cancelled before it began");
            return self
                .channel
                .feed(&FromHost::Done {
                    call,
                    outcome: Err(fault),
                })
                .await;
        }
        let Some(running) = self.running.as_ref().filter(|running| running.id == call) else {
            return Ok(()); // its outcome is on its way already
        };
        let fault = match running.effect() {
            Some(Effect::Change) => Fault::new(
                Code::Unknown,
                "let go: what has begun goes on; the same id asks what came of it",
            ),
            Some(Effect::Read | Effect::Stream) | None => Fault::new(Code::Busy, "cancelled"),
        };
        self.finish(Err(fault)).await
    }

    async fn renew(&mut self, token: Vec<u8>, until: u64) -> Result<(), ChannelError> {
        let acceptor = Acceptor::new(&self.host.keys);
        let step = tokio::task::spawn_blocking(move || acceptor.step(&token))
            .await
            .map_err(|_| ChannelError::Broken("the GSSAPI library failed"))?;
        let (context, token) = same_caller(step, &self.caller.proven.principal)?;
        self.caller.until = sooner(context.until(), until);
        self.warned = false;
        self.channel
            .feed(&FromHost::Renewed {
                token,
                until: seconds(self.caller.until),
            })
            .await
    }

    /// Whoever waits or follows is told; what is being carried out may end within the grace that the host gives it.
    async fn stop(&mut self) -> Result<(), ChannelError> {
        self.stopped = true;
        let fault = || Fault::new(Code::Unavailable, "nothing was begun: xmand is stopping");
        for call in std::mem::take(&mut self.waiting) {
            self.channel
                .feed(&FromHost::Done {
                    call: call.header.id,
                    outcome: Err(fault()),
                })
                .await?;
        }
        // What is carried for another host is part of a change there.
        let goes_on = self.running.as_ref().is_none_or(|running| {
            running.effect() == Some(Effect::Change) || running.verb == Some(Verb::Carry)
        });
        if !goes_on {
            self.finish(Err(Fault::new(Code::Unavailable, "xmand is stopping")))
                .await?;
        }
        Ok(())
    }

    fn next_deadline(&self) -> Instant {
        let left = self.left();
        let ticket = if self.warned {
            left
        } else {
            left.saturating_sub(warning(left))
        };
        let idle = (self.last_call + self.host.config.limits.idle)
            .saturating_duration_since(Instant::now());
        Instant::now()
            + if self.running.is_some() {
                ticket
            } else {
                ticket.min(idle)
            }
    }

    async fn overdue(&mut self) -> Result<Option<Fault>, ChannelError> {
        let left = self.left();
        if left.is_zero() {
            return Ok(Some(Fault::new(
                Code::Expired,
                "your ticket has ended, and the session with it; run kinit",
            )));
        }
        if !self.warned && left <= EXPIRY_WARNING {
            self.warned = true;
            let seconds = u32::try_from(left.as_secs()).unwrap_or(u32::MAX);
            self.channel.feed(&FromHost::Expiring { seconds }).await?;
        }
        if self.running.is_none() && self.last_call.elapsed() >= self.host.config.limits.idle {
            return Ok(Some(Fault::new(
                Code::Unavailable,
                "no call for a long time; connect again",
            )));
        }
        Ok(None)
    }

    fn left(&self) -> Duration {
        self.caller
            .until
            .duration_since(SystemTime::now())
            .unwrap_or(Duration::ZERO)
    }
}

/// How long before the end the caller is warned: at once where little is left.
fn warning(left: Duration) -> Duration {
    EXPIRY_WARNING.min(left)
}

/// Who does not read gets nothing more, and yet his call goes on: it ends when the right to it does, or its own patience.
async fn next(running: &mut Option<Running>, has_room: bool) -> Next {
    let Some(running) = running else {
        return std::future::pending().await;
    };
    // Pieces sent just before the end come first.
    if has_room
        && running.outbox.is_empty()
        && let Some(outcome) = running.ended.take()
    {
        return Next::Done(outcome);
    }
    tokio::select! {
        biased;
        bytes = running.feed.room(), if has_room => Next::Room(bytes),
        Some(piece) = running.outbox.recv(), if has_room => Next::Piece(piece),
        outcome = &mut running.work, if running.ended.is_none() => {
            running.ended = Some(outcome);
            Next::Ended
        }
        else => std::future::pending().await,
    }
}

fn same_caller(
    step: Result<Step<Acceptor>, GssError>,
    principal: &Principal,
) -> Result<(Context, Vec<u8>), ChannelError> {
    match step? {
        Step::Done(context, token) if context.peer() == principal => {
            Ok((context, token.unwrap_or_default()))
        }
        Step::Done(..) => Err(ChannelError::Broken(
            "a session is renewed by its own principal only",
        )),
        Step::Continue(..) => Err(GssError {
            trouble: Trouble::BadToken,
            text: "a renewal takes one token".to_owned(),
        }
        .into()),
    }
}

/// The caller's account of its ticket's end, in seconds since 1970, can only shorten what the library says.
fn sooner(library: SystemTime, caller: u64) -> SystemTime {
    match UNIX_EPOCH.checked_add(Duration::from_secs(caller)) {
        Some(until) => library.min(until),
        None => library,
    }
}
