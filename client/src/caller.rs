//! A client with patience: it asks again where nothing can have happened, and with the same id where something may have.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::mpsc,
    time::{Instant, sleep},
};
use uuid::Uuid;
use xman_common::{
    channel::{ChannelError, Refusal},
    gss::{GssError, Trouble},
    name::Principal,
    protocol::{Code, Effect, Fault, Reply, Request, Welcome},
};

use crate::{
    hosts::Address,
    interrupt::Interrupt,
    session::{CallError, CallOptions, Client, ConnectError, ConnectOptions, Event, Loss, Stage},
};

/// The pause after the first try, in milliseconds; it doubles up to [`LONGEST_PAUSE_MS`].
const FIRST_PAUSE_MS: u64 = 200;
/// The longest pause between two tries, in milliseconds.
const LONGEST_PAUSE_MS: u64 = 3000;
/// A connection that held so long was a good one: the tries are counted anew.
const GOOD_CONNECTION: Duration = Duration::from_secs(60);
/// How long a call that follows something may take; hosts take no longer deadline.
const FOLLOW: Duration = Duration::from_secs(24 * 3600);
/// What Kerberos may take for one more host once no KDC answered for another: tickets at hand need milliseconds.
const WITHOUT_KDC: Duration = Duration::from_secs(3);

/// How long and how often a host is asked.
#[derive(Clone, Debug)]
pub struct Patience {
    /// How long all tries may take together.
    pub timeout: Duration,
    /// How often at most; at least once.
    pub tries: u32,
    /// Ends everything.
    pub interrupt: Interrupt,
    /// Shared by all hosts of one command: no KDC answered for one of them.
    pub kdc_is_silent: Arc<AtomicBool>,
    /// The program and its version, for the hosts' logs.
    pub software: String,
}

/// How long an outcome is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wait {
    /// Until the patience ends.
    Deadline,
    /// As long as the host shows signs of life: jobs, and what is followed.
    Follow,
}

/// Why there is no reply.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// There was no session; the call has not been made.
    #[error(transparent)]
    Connect(#[from] ConnectError),
    /// The call was made.
    #[error(transparent)]
    Call(#[from] CallError),
    /// Interrupted while nothing was under way.
    #[error("interrupted")]
    Interrupted,
}

/// Whether a failure may be followed by another try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// It would end the same way.
    No,
    /// Nothing has begun.
    Yes,
    /// It may have begun: only with the same id.
    SameId,
}

impl Failure {
    fn again(&self) -> Again {
        match self {
            Self::Connect(error) => match error {
                ConnectError::Unreachable { .. }
                | ConnectError::Timeout {
                    stage: Stage::Dial, ..
                } => Again::Yes,
                ConnectError::Closing(fault) => of_fault(fault),
                ConnectError::Channel(error) => of_channel(error),
                ConnectError::Lookup(_) | ConnectError::Timeout { .. } => Again::No,
            },
            Self::Call(CallError::Fault(fault)) => of_fault(fault),
            Self::Call(CallError::Lost(_)) => Again::SameId,
            Self::Call(CallError::Unsent(_)) => Again::Yes,
            Self::Call(CallError::TooLarge { .. } | CallError::Cancelled(_))
            | Self::Interrupted => Again::No,
        }
    }

    /// Returns whether the session can still be used.
    fn keeps_session(&self) -> bool {
        matches!(
            self,
            Self::Call(
                CallError::Fault(_) | CallError::TooLarge { .. } | CallError::Cancelled(Some(_))
            )
        )
    }
}

fn of_fault(fault: &Fault) -> Again {
    match fault.code {
        Code::Busy | Code::Unavailable if fault.retry => Again::Yes,
        Code::Unknown if fault.retry => Again::SameId,
        Code::Busy
        | Code::Unavailable
        | Code::Unknown
        | Code::BadRequest
        | Code::Denied
        | Code::NotFound
        | Code::Conflict
        | Code::Refused
        | Code::Unsupported
        | Code::Expired
        | Code::TooLarge
        | Code::Internal => Again::No,
    }
}

fn of_channel(error: &ChannelError) -> Again {
    match error {
        ChannelError::NoRoom | ChannelError::Closed | ChannelError::Wire(_) => Again::Yes,
        ChannelError::Refused {
            reason: Refusal::Replay,
            ..
        } => Again::Yes,
        ChannelError::Refused { .. }
        | ChannelError::Gss(_)
        | ChannelError::NotXman
        | ChannelError::Version
        | ChannelError::Tampered
        | ChannelError::Broken(_)
        | ChannelError::Codec(_) => Again::No,
    }
}

/// Returns whether the answer to a repeat tells what came of the call. Without the right or the ticket that is not told.
fn settles(failure: &Failure) -> bool {
    match failure {
        Failure::Call(CallError::Fault(fault)) => {
            of_fault(fault) == Again::No && !matches!(fault.code, Code::Denied | Code::Expired)
        }
        Failure::Call(_) | Failure::Connect(_) | Failure::Interrupted => false,
    }
}

/// Returns the pause after the `tried`th try (from 1); `chance` shortens it by up to a half, so that many callers spread.
fn pause(tried: u32, chance: u8) -> Duration {
    let doubled = FIRST_PAUSE_MS.saturating_mul(1 << tried.saturating_sub(1).min(16));
    let full = doubled.min(LONGEST_PAUSE_MS);
    Duration::from_millis(full - full * u64::from(chance) / 512)
}

fn chance() -> u8 {
    let [byte, ..] = *Uuid::new_v4().as_bytes();
    byte
}

/// A host, and the session with it while there is one.
#[derive(Debug)]
pub struct Caller {
    address: Address,
    patience: Patience,
    hypervisor: Option<String>,
    on_behalf_of: Option<Principal>,
    deadline: Instant,
    client: Option<Client>,
    met: Option<Met>,
}

/// Whom we met at the other end.
#[derive(Debug)]
pub struct Met {
    /// The host's principal that was really used.
    pub service: Principal,
    /// What it said first: whom it takes us for, and its software.
    pub welcome: Welcome,
}

impl Caller {
    /// Takes a host; the patience begins to run now.
    pub fn new(address: Address, patience: Patience, hypervisor: Option<String>) -> Self {
        let deadline = Instant::now() + patience.timeout;
        Self {
            address,
            patience,
            hypervisor,
            on_behalf_of: None,
            deadline,
            client: None,
            met: None,
        }
    }

    /// Makes every call from now on to one of the host's hypervisors, by URI or driver; to whichever it concerns without.
    pub fn aim(&mut self, hypervisor: Option<String>) {
        self.hypervisor = hypervisor;
    }

    /// Makes every call from now on in somebody's stead: the rights are then that person's alone, and the host decides whether one may.
    pub fn acting_for(self, principal: Option<Principal>) -> Self {
        Self {
            on_behalf_of: principal,
            ..self
        }
    }

    /// Returns the host.
    pub fn address(&self) -> &Address {
        &self.address
    }

    /// Returns whom we met at the other end, once there was a session.
    pub fn met(&self) -> Option<&Met> {
        self.met.as_ref()
    }

    /// Lets the patience begin anew, as after a question to a person.
    pub fn rest(&mut self) {
        self.deadline = Instant::now() + self.patience.timeout;
    }

    /// Closes the session; the next call opens another.
    pub fn hang_up(&mut self) {
        self.client = None;
    }

    /// Makes a call under a fresh id, waits for its outcome and tries again where that is right.
    pub async fn ask(
        &mut self,
        request: &Request,
        events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, Failure> {
        self.call(request, Uuid::new_v4(), Wait::Deadline, events)
            .await
    }

    /// Makes a call, waits for its outcome and tries again where that is right.
    ///
    /// # Errors
    /// `Lost`, `Cancelled` and the fault `Unknown` of a verb that changes something mean that it may have happened: the same id asks what came of it.
    pub async fn call(
        &mut self,
        request: &Request,
        id: Uuid,
        wait: Wait,
        mut events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, Failure> {
        let mut open: Option<Failure> = None;
        let mut tried = 0;
        loop {
            let began = Instant::now();
            let failure = match self.attempt(request, id, wait, &mut events).await {
                Ok(reply) => return Ok(reply),
                Err(failure) => failure,
            };
            if !failure.keeps_session() {
                self.client = None;
            }
            if wait == Wait::Follow && began.elapsed() > GOOD_CONNECTION {
                tried = 0;
                self.rest();
            }
            tried += 1;
            let again = failure.again();
            let failure = match open.take() {
                Some(earlier) if !settles(&failure) => earlier,
                Some(_) | None => failure,
            };
            let pause = pause(tried, chance());
            let is_last = tried >= self.patience.tries || Instant::now() + pause >= self.deadline;
            if is_last || again == Again::No || self.patience.interrupt.is_raised() {
                return Err(failure);
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.patience.interrupt.raised() => return Err(failure),
            }
            if request.verb().effect() == Effect::Change && may_have_happened(&failure) {
                open = Some(failure);
            }
            let _ = events(Event::Again);
        }
    }

    /// Makes a call that is a stream, whose input comes through `input`, until it ends or `interrupt` is raised. Tries again only as long as
    /// the host has brought nothing: what was sent into a stream is not sent twice.
    pub async fn converse(
        &mut self,
        request: &Request,
        input: &mut Option<mpsc::Receiver<Vec<u8>>>,
        interrupt: &Interrupt,
        mut events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, Failure> {
        let mut tried = 0;
        loop {
            let mut has_begun = false;
            let spoken = self
                .open_stream(request, input, interrupt, |event| {
                    has_begun |= matches!(event, Event::Items(_));
                    events(event)
                })
                .await;
            let failure = match spoken {
                Ok(reply) => return Ok(reply),
                Err(failure) => failure,
            };
            if !failure.keeps_session() {
                self.client = None;
            }
            tried += 1;
            let pause = pause(tried, chance());
            let is_last = tried >= self.patience.tries || Instant::now() + pause >= self.deadline;
            if has_begun || is_last || failure.again() != Again::Yes || interrupt.is_raised() {
                return Err(failure);
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = interrupt.raised() => return Err(failure),
            }
        }
    }

    async fn open_stream(
        &mut self,
        request: &Request,
        input: &mut Option<mpsc::Receiver<Vec<u8>>>,
        interrupt: &Interrupt,
        events: impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, Failure> {
        let options = CallOptions {
            hypervisor: self.hypervisor.clone(),
            on_behalf_of: self.on_behalf_of.clone(),
            interrupt: interrupt.clone(),
            ..CallOptions::fresh()
        };
        let client = self.client(interrupt).await?;
        Ok(client.converse(request, &options, input, events).await?)
    }

    async fn attempt(
        &mut self,
        request: &Request,
        id: Uuid,
        wait: Wait,
        events: &mut impl FnMut(Event) -> ControlFlow<()>,
    ) -> Result<Reply, Failure> {
        let interrupt = self.patience.interrupt.clone();
        let deadline = match wait {
            Wait::Deadline => self.deadline,
            Wait::Follow => Instant::now() + FOLLOW,
        };
        let options = CallOptions {
            id,
            deadline: Some(deadline),
            hypervisor: self.hypervisor.clone(),
            on_behalf_of: self.on_behalf_of.clone(),
            interrupt: interrupt.clone(),
        };
        let client = self.client(&interrupt).await?;
        Ok(client.call(request, &options, events).await?)
    }

    /// Returns the session, opened if there is none.
    async fn client(&mut self, interrupt: &Interrupt) -> Result<&mut Client, Failure> {
        if self.client.is_none() {
            let client = tokio::select! {
                client = self.connect() => client?,
                () = interrupt.raised() => return Err(Failure::Interrupted),
            };
            self.met = Some(Met {
                service: client.service().clone(),
                welcome: client.welcome().clone(),
            });
            self.client = Some(client);
        }
        self.client.as_mut().ok_or(Failure::Interrupted)
    }

    async fn connect(&self) -> Result<Client, ConnectError> {
        let kdc = &self.patience.kdc_is_silent;
        let left = self.deadline.saturating_duration_since(Instant::now());
        let knew = kdc.load(Ordering::Relaxed);
        let timeout = if knew { left.min(WITHOUT_KDC) } else { left };
        let options = ConnectOptions {
            timeout,
            software: self.patience.software.clone(),
        };
        match Client::connect(&self.address, &options).await {
            Err(ConnectError::Channel(ChannelError::Gss(error)))
                if error.trouble == Trouble::KdcUnreachable =>
            {
                kdc.store(true, Ordering::Relaxed);
                Err(ChannelError::Gss(error).into())
            }
            Err(ConnectError::Timeout {
                stage: Stage::Handshake,
                ..
            }) if knew => {
                let text = "no KDC has answered for another host either".to_owned();
                Err(ChannelError::Gss(GssError {
                    trouble: Trouble::KdcUnreachable,
                    text,
                })
                .into())
            }
            other => other,
        }
    }
}

/// Returns whether a failed change may have happened nevertheless.
pub fn may_have_happened(failure: &Failure) -> bool {
    match failure {
        Failure::Call(CallError::Lost(_) | CallError::Cancelled(None)) => true,
        Failure::Call(CallError::Fault(fault) | CallError::Cancelled(Some(fault))) => {
            fault.code == Code::Unknown
        }
        Failure::Call(CallError::TooLarge { .. } | CallError::Unsent(_))
        | Failure::Connect(_)
        | Failure::Interrupted => false,
    }
}

/// Returns whether the host ended the session because the ticket has.
pub(crate) fn is_expired(loss: &Loss) -> bool {
    matches!(loss, Loss::Ended(fault) if fault.code == Code::Expired)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io;

    #[test]
    fn pauses_grow_spread_and_stay_bounded() {
        let full: Vec<_> = (1..=6).map(|tried| pause(tried, 0).as_millis()).collect();
        assert_eq!(full, [200, 400, 800, 1600, 3000, 3000]);
        assert_eq!(pause(u32::MAX, 0).as_millis(), 3000);
        for tried in 1..10 {
            assert!(
                pause(tried, 255) >= pause(tried, 0) / 2 && pause(tried, 255) < pause(tried, 0)
            );
        }
    }

    fn fault(code: Code) -> Failure {
        CallError::Fault(Fault::new(code, "")).into()
    }

    #[test]
    fn only_what_cannot_have_happened_is_tried_anew_and_the_rest_under_its_id() {
        let refused: Failure = ConnectError::Unreachable {
            address: ([127, 0, 0, 1], 1).into(),
            error: io::ErrorKind::ConnectionRefused.into(),
        }
        .into();
        assert_eq!(refused.again(), Again::Yes);
        let no_room: Failure = ConnectError::Channel(ChannelError::NoRoom).into();
        assert_eq!(no_room.again(), Again::Yes);
        for code in [Code::Busy, Code::Unavailable] {
            assert_eq!(fault(code).again(), Again::Yes);
        }
        for lost in [
            fault(Code::Unknown),
            CallError::Lost(Loss::Silent).into(),
            CallError::Lost(Loss::Closed).into(),
        ] {
            assert_eq!(lost.again(), Again::SameId);
            assert!(may_have_happened(&lost));
        }
        for code in [
            Code::Denied,
            Code::NotFound,
            Code::Conflict,
            Code::Refused,
            Code::Internal,
            Code::Expired,
        ] {
            assert_eq!(fault(code).again(), Again::No);
        }
        let settled = Fault {
            retry: false,
            ..Fault::new(Code::Unknown, "")
        };
        assert_eq!(Failure::from(CallError::Fault(settled)).again(), Again::No);
        assert_eq!(Failure::from(CallError::Cancelled(None)).again(), Again::No);
        let ticket = GssError {
            trouble: Trouble::NoTicket,
            text: String::new(),
        };
        assert_eq!(
            Failure::from(ConnectError::Channel(ticket.into())).again(),
            Again::No
        );
    }
}
