//! Another host's xmand, called with this host's own key.

use std::time::{Duration, SystemTime};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    sync::mpsc,
    task::spawn_blocking,
    time::{Instant, sleep_until, timeout},
};
use uuid::Uuid;
use xman_common::{
    channel::{Channel, ChannelError, since_1970},
    gss::{GssError, Initiator, Step, own_ticket},
    name::HostName,
    protocol::{
        Call, CallHeader, Carry, Code, Fault, FromCaller, FromHost, INPUT_WINDOW, Item, MAX_INPUT,
        Reply, Request, Settle,
    },
};

use crate::{SOFTWARE, caller::Outcome};

/// How long look-up, connection and handshake may take together.
const DIAL_LIMIT: Duration = Duration::from_secs(20);
/// How long a word may take.
const WORD_LIMIT: Duration = Duration::from_secs(30);
/// A peer sends a sign of life every five seconds; after this much silence it is given up.
const SILENCE: Duration = Duration::from_secs(20);
/// How often it is looked whether the keytab has given a ticket that ends later: the library fetches one once half the old one's life is over.
const RENEWAL_LOOK: Duration = Duration::from_secs(2);
/// How long this host's libvirt may take to read what the other said last.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Pieces on their way between the channel and a socket.
const AHEAD: usize = 16;

/// A session with another xmand.
pub(crate) struct Peer {
    host: HostName,
    channel: Channel<TcpStream>,
    /// When the session ends with its ticket, once the host has said so.
    end: Option<Instant>,
}

impl Peer {
    /// Opens a session. The key of the keytab proves who we are, and the peer proves to be the host that was named.
    ///
    /// # Errors
    /// `Unavailable`, with what to do.
    pub(crate) async fn dial(host: &HostName, port: u16) -> Result<Self, Fault> {
        let dial = async {
            let stream = TcpStream::connect((host.as_str(), port)).await;
            let stream = stream.map_err(|error| unreachable(host, &error.to_string()))?;
            let _ = stream.set_nodelay(true);
            let mut channel = Channel::initiate(stream, host)
                .await
                .map_err(|error| unreachable(host, &explained(&error)))?;
            channel
                .introduce(SOFTWARE)
                .await
                .map_err(|error| unreachable(host, &explained(&error)))??;
            Ok(Self {
                host: host.clone(),
                channel,
                end: None,
            })
        };
        let late = || unreachable(host, &format!("no answer in {} s", DIAL_LIMIT.as_secs()));
        timeout(DIAL_LIMIT, dial)
            .await
            .unwrap_or_else(|_| Err(late()))
    }

    /// Gives the word on where a domain is in the end.
    ///
    /// # Errors
    /// The peer's; `Unavailable` where it did not answer.
    pub(crate) async fn settle(mut self, settle: Settle) -> Result<(), Fault> {
        match self.ask(Uuid::new_v4(), &Request::Settle(settle)).await? {
            First::Done(outcome) => outcome,
            First::Items => Err(unreachable(&self.host, "it answered something else")),
        }
    }

    /// Opens libvirt's connection by a permit, and returns once it stands.
    ///
    /// # Errors
    /// The peer's; `Unavailable` where it did not answer.
    pub(crate) async fn carry(mut self, carry: Carry) -> Result<Carrier, Fault> {
        let id = Uuid::new_v4();
        let asked = self.ask(id, &Request::Carry(carry)).await;
        match asked {
            Ok(First::Items) => {}
            Ok(First::Done(Ok(()))) => {
                return Err(unreachable(&self.host, "it ended the connection"));
            }
            Ok(First::Done(Err(fault))) => return Err(self.about_the_permit(fault)),
            Err(fault) => return Err(fault),
        }
        Ok(Carrier {
            peer: self,
            id,
            window: INPUT_WINDOW,
            look: Instant::now(),
            renewing: None,
        })
    }

    /// A denial is this host's, not the caller's.
    fn about_the_permit(&self, fault: Fault) -> Fault {
        let host = &self.host;
        if fault.code == Code::Denied {
            return Fault::new(
                Code::Refused,
                format!(
                    "{host} does not take the permit: it was used or has expired, or this host is no peer of {host} under the name that its keytab gives it"
                ),
            );
        }
        Fault {
            message: format!("{host}: {}", fault.message),
            ..fault
        }
    }

    /// Makes a call and waits for the first that comes of it.
    async fn ask(&mut self, id: Uuid, request: &Request) -> Result<First, Fault> {
        let first = async {
            self.call(id, request).await?;
            loop {
                match self.hear().await? {
                    FromHost::Items { call, .. } if call == id => return Ok(First::Items),
                    FromHost::Done { call, outcome } if call == id => {
                        return Ok(First::Done(outcome.map(drop)));
                    }
                    FromHost::Closing(fault) => return Err(fault),
                    FromHost::Welcome(_)
                    | FromHost::Items { .. }
                    | FromHost::Progress { .. }
                    | FromHost::Done { .. }
                    | FromHost::Alive
                    | FromHost::Expiring { .. }
                    | FromHost::Renewed { .. }
                    | FromHost::Room { .. } => {}
                }
            }
        };
        match timeout(WORD_LIMIT, first).await {
            Ok(first) => first,
            Err(_) => Err(unreachable(&self.host, "it has not answered")),
        }
    }

    async fn call(&mut self, id: Uuid, request: &Request) -> Result<(), Fault> {
        let header = CallHeader {
            id,
            deadline_ms: None,
            verb: request.verb().code(),
            hypervisor: None,
            on_behalf_of: None,
        };
        let body = request
            .body()
            .map_err(|error| Fault::new(Code::Internal, error.to_string()))?;
        let call = FromCaller::Call(Call { header, body });
        let sent = self.channel.send(&call).await;
        sent.map_err(|error| unreachable(&self.host, &error.to_string()))
    }

    async fn hear(&mut self) -> Result<FromHost, Fault> {
        let heard = self.channel.receive().await;
        self.said(heard)
    }

    fn said(&mut self, heard: Result<Option<FromHost>, ChannelError>) -> Result<FromHost, Fault> {
        match heard {
            Ok(Some(message)) => {
                if let FromHost::Expiring { seconds } = message {
                    self.end = Some(Instant::now() + Duration::from_secs(seconds.into()));
                }
                Ok(message)
            }
            Ok(None) => Err(unreachable(&self.host, "it closed the connection")),
            Err(error) => Err(unreachable(&self.host, &error.to_string())),
        }
    }
}

/// What comes first of a call.
enum First {
    Items,
    Done(Result<(), Fault>),
}

/// libvirt's connection to the peer's libvirt, which stands and carries nothing yet.
pub(crate) struct Carrier {
    peer: Peer,
    id: Uuid,
    window: u32,
    /// When it is looked again for another ticket.
    look: Instant,
    renewing: Option<Initiator>,
}

enum Next {
    Heard(Box<FromHost>),
    Read(Vec<u8>),
    Renew(Instant),
    Silent,
}

impl Carrier {
    /// Carries bytes both ways between the peer and a socket, until either ends.
    ///
    /// # Errors
    /// Why it ended, where neither side simply closed.
    pub(crate) async fn run(mut self, local: UnixStream) -> Result<(), Fault> {
        let (mut from_local, mut to_local) = local.into_split();
        let (sender, mut outgoing) = mpsc::channel(AHEAD);
        let reading = async move {
            while let Ok(piece) = read(&mut from_local).await {
                let is_over = piece.is_empty();
                if sender.send(piece).await.is_err() || is_over {
                    return;
                }
            }
        };
        let (incoming, mut arrived) = mpsc::channel::<Vec<u8>>(AHEAD);
        let writing = async move {
            while let Some(piece) = arrived.recv().await {
                if to_local.write_all(&piece).await.is_err() {
                    return;
                }
            }
        };
        tokio::pin!(writing);
        // The end of reading is told to the peer, which then ends the call.
        let reading = async {
            reading.await;
            std::future::pending().await
        };
        let ended = tokio::select! {
            ended = self.relay(&mut outgoing, incoming) => ended,
            () = &mut writing => return Ok(()),
            ended = reading => ended,
        };
        // What the peer's libvirt said last says why it ended.
        let _ = timeout(LAST_WORDS, writing).await;
        ended
    }

    async fn relay(
        &mut self,
        outgoing: &mut mpsc::Receiver<Vec<u8>>,
        incoming: mpsc::Sender<Vec<u8>>,
    ) -> Result<(), Fault> {
        loop {
            let may_send = self.window as usize >= MAX_INPUT && self.peer.channel.has_room();
            let end = self.peer.end.filter(|_| self.renewing.is_none());
            let next = tokio::select! {
                () = sleep_until(self.look), if end.is_some() => match end {
                    Some(end) => Next::Renew(end),
                    None => continue,
                },
                heard = timeout(SILENCE, self.peer.channel.receive_or_room()) => match heard {
                    Ok(heard) => match heard.transpose() {
                        Some(heard) => Next::Heard(Box::new(self.peer.said(heard)?)),
                        None => continue, // it has read, so there may be more
                    },
                    Err(_) => Next::Silent,
                },
                piece = outgoing.recv(), if may_send => Next::Read(piece.unwrap_or_default()),
            };
            match next {
                Next::Renew(end) => self.renew(end).await?,
                Next::Silent => return Err(unreachable(&self.peer.host, "it fell silent")),
                Next::Read(bytes) => {
                    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                    self.window = self.window.saturating_sub(length);
                    let is_over = bytes.is_empty();
                    let call = self.id;
                    self.say(&FromCaller::Input { call, bytes }).await?;
                    if is_over {
                        return self.wait_for_the_end(incoming).await;
                    }
                }
                Next::Heard(message) => {
                    if let Some(outcome) = self.take(*message, &incoming).await? {
                        return outcome.map(drop);
                    }
                }
            }
        }
    }

    /// Our side has closed: what still comes goes where it belongs, and the peer ends the call.
    async fn wait_for_the_end(&mut self, incoming: mpsc::Sender<Vec<u8>>) -> Result<(), Fault> {
        loop {
            let heard = timeout(SILENCE, self.peer.hear()).await;
            let heard = heard.map_err(|_| unreachable(&self.peer.host, "it fell silent"))??;
            if let Some(outcome) = self.take(heard, &incoming).await? {
                return outcome.map(drop);
            }
        }
    }

    /// Takes what the peer says; its last word on the call comes back.
    async fn take(
        &mut self,
        message: FromHost,
        incoming: &mpsc::Sender<Vec<u8>>,
    ) -> Result<Option<Outcome>, Fault> {
        match message {
            FromHost::Items { items, .. } => {
                for item in items {
                    if let Item::Bytes(bytes) = item
                        && incoming.send(bytes).await.is_err()
                    {
                        return Ok(Some(Ok(Reply::Done)));
                    }
                }
            }
            FromHost::Room { bytes, .. } => self.window = self.window.saturating_add(bytes),
            FromHost::Done { outcome, .. } => return Ok(Some(outcome)),
            FromHost::Closing(fault) => return Err(fault),
            FromHost::Renewed { token, .. } => self.renewed(token).await?,
            FromHost::Welcome(_)
            | FromHost::Progress { .. }
            | FromHost::Alive
            | FromHost::Expiring { .. } => {}
        }
        Ok(None)
    }

    /// A guest's way can take longer than a ticket: the keytab gives another.
    async fn renew(&mut self, end: Instant) -> Result<(), Fault> {
        self.look = Instant::now() + RENEWAL_LOOK;
        let host = self.peer.host.clone();
        let left = end.saturating_duration_since(Instant::now());
        let (pending, token, until) = match spawn_blocking(move || later(&host, left)).await {
            Ok(Ok(Some(later))) => later,
            Ok(Ok(None)) | Err(_) => return Ok(()),
            Ok(Err(error)) => {
                tracing::warn!(host = %self.peer.host, %error, "this host's ticket ends, and there is no other");
                return Ok(());
            }
        };
        self.renewing = Some(pending);
        let until = since_1970(until);
        self.say(&FromCaller::Renew { token, until }).await
    }

    async fn renewed(&mut self, token: Vec<u8>) -> Result<(), Fault> {
        let Some(pending) = self.renewing.take() else {
            return Err(unreachable(
                &self.peer.host,
                "a renewal that nobody asked for",
            ));
        };
        match spawn_blocking(move || pending.step(Some(&token))).await {
            Ok(Ok(Step::Done(context, _))) if context.peer() == self.peer.channel.peer() => {
                // The host says anew when that one ends.
                self.peer.end = None;
                Ok(())
            }
            Ok(Ok(Step::Done(..) | Step::Continue(..))) | Ok(Err(_)) | Err(_) => Err(unreachable(
                &self.peer.host,
                "it did not prove itself again",
            )),
        }
    }

    async fn say(&mut self, message: &FromCaller) -> Result<(), Fault> {
        let fed = self.peer.channel.feed(message).await;
        fed.map_err(|error| unreachable(&self.peer.host, &error.to_string()))
    }
}

/// Begins to prove ourselves anew, where there is a ticket that ends later.
fn later(
    host: &HostName,
    left: Duration,
) -> Result<Option<(Initiator, Vec<u8>, SystemTime)>, GssError> {
    let (_, life) = own_ticket()?;
    if life <= left + RENEWAL_LOOK {
        return Ok(None);
    }
    let step = Initiator::new(host)?.step(None)?;
    match step {
        Step::Continue(pending, token) => Ok(Some((pending, token, SystemTime::now() + life))),
        Step::Done(..) => Ok(None),
    }
}

/// Reads a piece of a stream; an empty one is its end.
pub(crate) async fn read(stream: &mut (impl AsyncReadExt + Unpin)) -> std::io::Result<Vec<u8>> {
    let mut piece = Vec::with_capacity(MAX_INPUT);
    stream.take(MAX_INPUT as u64).read_buf(&mut piece).await?;
    Ok(piece)
}

fn explained(error: &ChannelError) -> String {
    if let ChannelError::Gss(error) = error {
        return format!(
            "{error}; the first key of this host's keytab must be its own of xman/HOST, and the KDC must answer"
        );
    }
    error.to_string()
}

fn unreachable(host: &HostName, why: &str) -> Fault {
    Fault::new(Code::Unavailable, format!("{host}: {why}"))
}
