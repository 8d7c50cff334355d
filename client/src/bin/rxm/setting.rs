//! Everything a command needs to know besides its own arguments.

use std::{
    ops::ControlFlow,
    sync::{Arc, Mutex, OnceLock, PoisonError, atomic::AtomicBool},
    time::Duration,
};

use tokio::{task, time::timeout};
use xman_client::{
    Address, BadHosts, CallError, Caller, Event, Explanation, Failure, HostSet, Interrupt, Kind,
    Patience, caller::may_have_happened, explain,
};
use xman_common::{
    gss::{self, Trouble},
    name::Principal,
    protocol::{Code, Item, PORT, Reply, Request, Verb},
};

use crate::{
    config::{BadConfig, Config},
    exit,
    options::Options,
    output::{Output, Unprinted},
};

/// What one host may say in answer to one call, in bytes or so: a host gone mad must not fill this machine's memory.
pub(crate) const MAX_ANSWER: usize = 256 * 1024 * 1024;
/// How long a look at the ticket at hand may take: with a keytab instead of a ticket a KDC is asked.
const TICKET_LIMIT: Duration = Duration::from_secs(10);
/// What a row of a list takes in memory, in bytes or so.
const ROW: usize = 512;

/// Why a command ends before its end.
#[derive(Debug)]
pub(crate) enum Stop {
    /// The command line or the configuration is wrong: what, and what to do.
    Usage(String),
    /// It cannot be done, for one reason.
    Failed(Kind, String),
    /// What was to be said is said; this is the exit code.
    Code(u8),
    /// stdout.
    Unprinted(Unprinted),
}

impl From<Unprinted> for Stop {
    fn from(unprinted: Unprinted) -> Self {
        Self::Unprinted(unprinted)
    }
}

impl From<BadHosts> for Stop {
    fn from(bad: BadHosts) -> Self {
        Self::Usage(format!("{bad}; see 'Hosts' in `rxm help`"))
    }
}

impl From<BadConfig> for Stop {
    fn from(bad: BadConfig) -> Self {
        Self::Usage(bad.to_string())
    }
}

/// The options, read and resolved.
#[derive(Debug)]
pub(crate) struct Setting {
    pub(crate) output: Output,
    pub(crate) patience: Patience,
    pub(crate) yes: bool,
    pub(crate) dry_run: bool,
    /// For whom the person acts.
    pub(crate) on_behalf_of: Option<Principal>,
    hosts: Option<String>,
    named: OnceLock<Vec<Address>>,
    /// The one that is meant where a host has several, by URI or driver.
    pub(crate) hypervisor: Option<String>,
    config: Config,
    own: OnceLock<Principal>,
    warned: Mutex<bool>,
}

impl Setting {
    pub(crate) fn new(options: Options, interrupt: Interrupt) -> Result<Self, Stop> {
        let output = Output::new(&options);
        let config = Config::read()?;
        let patience = Patience {
            timeout: options.timeout,
            tries: options.retries.max(1),
            interrupt,
            kdc_is_silent: Arc::new(AtomicBool::new(false)),
            software: concat!("rxm ", env!("CARGO_PKG_VERSION")).to_owned(),
        };
        let hosts = options
            .hosts
            .filter(|hosts| !hosts.trim().is_empty())
            .or_else(|| config.hosts());
        Ok(Self {
            output,
            patience,
            yes: options.yes,
            dry_run: options.dry_run,
            on_behalf_of: options.on_behalf_of,
            hosts,
            named: OnceLock::new(),
            hypervisor: options.hypervisor,
            config,
            own: OnceLock::new(),
            warned: Mutex::new(false),
        })
    }

    /// Looks at the ticket at hand before any host is asked, so that its absence is said once.
    pub(crate) async fn check_ticket(&self) -> Result<(), Stop> {
        let limit = self.patience.timeout.min(TICKET_LIMIT);
        // Anything but these two is told better by whoever needs the ticket.
        let looked = tokio::select! {
            looked = timeout(limit, task::spawn_blocking(gss::own_ticket)) => looked,
            () = self.patience.interrupt.raised() => return Err(Stop::Code(exit::INTERRUPTED)),
        };
        match looked {
            Ok(Ok(Ok((own, life)))) if !life.is_zero() => {
                let _ = self.own.set(own);
                Ok(())
            }
            Ok(Ok(Ok((own, _)))) => {
                let error = gss::GssError {
                    trouble: Trouble::Expired,
                    text: String::new(),
                };
                Err(without_ticket(&explain::ticket(&error, Some(&own))))
            }
            Ok(Ok(Err(error))) if matches!(error.trouble, Trouble::NoTicket | Trouble::Expired) => {
                Err(without_ticket(&explain::ticket(&error, None)))
            }
            Ok(Ok(Err(_)) | Err(_)) | Err(_) => Ok(()),
        }
    }

    /// Returns the hosts that -H, the environment or the configuration name.
    pub(crate) fn hosts(&self) -> Result<Vec<Address>, Stop> {
        let Some(text) = &self.hosts else {
            return Err(Stop::Usage(
                "no host is named; say which: rxm -H skirit80 ..., or set XMAN_HOSTS, or put hosts = \"skirit80\" into ~/.config/xman/rxm.toml"
                    .to_owned(),
            ));
        };
        if let Some(hosts) = self.named.get() {
            return Ok(hosts.clone());
        }
        match self.host_set(text)? {
            hosts if hosts.is_empty() => Err(Stop::Usage(format!("'{text}' names no host at all"))),
            hosts => Ok(self.named.get_or_init(|| hosts).clone()),
        }
    }

    /// Reads the hosts before a slash. One that -H names with a port need not repeat it.
    pub(crate) fn hosts_before_slash(&self, text: &str) -> Result<Vec<Address>, Stop> {
        let named = match &self.hosts {
            Some(_) => self.hosts()?,
            None => Vec::new(),
        };
        let mut hosts = Vec::new();
        for host in self.host_set(text)? {
            let same =
                |known: &&Address| known.host.as_str().eq_ignore_ascii_case(host.host.as_str());
            let with_port: Vec<_> = named.iter().filter(same).cloned().collect();
            if host.port == PORT && !with_port.is_empty() {
                hosts.extend(with_port);
            } else {
                hosts.push(host);
            }
        }
        Ok(hosts)
    }

    /// Returns the one host that a command needs.
    pub(crate) fn one_host(&self, command: &str) -> Result<Address, Stop> {
        let hosts = self.hosts()?;
        match <[Address; 1]>::try_from(hosts) {
            Ok([host]) => Ok(host),
            Err(hosts) => Err(Stop::Usage(format!(
                "'{command}' works on one host, and {} are named; say which: rxm -H HOST {command} ...",
                hosts.len()
            ))),
        }
    }

    /// Reads a set of hosts.
    pub(crate) fn host_set(&self, text: &str) -> Result<Vec<Address>, Stop> {
        Ok(HostSet::parse(text, &|name| self.config.group(name))?.into_addresses())
    }

    /// Begins to be patient with a host.
    pub(crate) fn caller(&self, address: &Address) -> Caller {
        Caller::new(
            address.clone(),
            self.patience.clone(),
            self.hypervisor.clone(),
        )
        .acting_for(self.on_behalf_of.clone())
    }

    /// Begins to be patient with a host, for one try only: who goes on after that says from where.
    pub(crate) fn caller_once(&self, address: &Address) -> Caller {
        let patience = Patience {
            tries: 1,
            kdc_is_silent: Arc::default(),
            ..self.patience.clone()
        };
        Caller::new(address.clone(), patience, self.hypervisor.clone())
            .acting_for(self.on_behalf_of.clone())
    }

    /// Explains why a call brought no reply.
    pub(crate) fn explain(&self, failure: &Failure, address: &Address) -> Explanation {
        match self.is_interruption(failure) {
            true => explain::failure(&Failure::Interrupted, address, None),
            false => explain::failure(failure, address, self.own.get()),
        }
    }

    /// Explains why a change brought no reply, and whether it may have happened.
    pub(crate) fn explain_change(&self, failure: &Failure, address: &Address) -> Explanation {
        if !self.is_interruption(failure) {
            return explain::change(failure, address, self.own.get());
        }
        let interrupted = explain::failure(&Failure::Interrupted, address, None);
        if !may_have_happened(failure) {
            return interrupted;
        }
        Explanation {
            what: "interrupted while it was under way: it goes on there".to_owned(),
            advice: "`rxm list` shows what comes of it".to_owned(),
            ..interrupted
        }
    }

    fn is_interruption(&self, failure: &Failure) -> bool {
        self.patience.interrupt.is_raised()
            && matches!(
                failure,
                Failure::Interrupted | Failure::Call(CallError::Cancelled(_))
            )
    }

    /// Makes a call and gathers its items.
    pub(crate) async fn ask(
        &self,
        caller: &mut Caller,
        request: &Request,
    ) -> Result<(Reply, Vec<Item>), Explanation> {
        let mut items = Vec::new();
        let mut taken = 0usize;
        let reply = caller
            .ask(request, |event| {
                match event {
                    Event::Again => {
                        items.clear();
                        taken = 0;
                    }
                    Event::Items(more) => {
                        taken = more.iter().map(weight).fold(taken, usize::saturating_add);
                        items.extend(more);
                    }
                    Event::Progress(_) | Event::Alive => {}
                    Event::Expiring(seconds) => self.warn_of_expiry(seconds),
                }
                if taken > MAX_ANSWER {
                    ControlFlow::Break(())
                } else {
                    ControlFlow::Continue(())
                }
            })
            .await;
        if taken > MAX_ANSWER {
            return Err(too_much());
        }
        match reply {
            Ok(reply) => Ok((reply, items)),
            Err(failure) => {
                let explanation = self.explain(&failure, caller.address());
                Err(self.of_denial(explanation, request))
            }
        }
    }

    /// Says of a denial what the host could not know to say.
    pub(crate) fn of_denial(&self, explanation: Explanation, request: &Request) -> Explanation {
        if explanation.code == Code::Denied.name() {
            denial(explanation, request, self.on_behalf_of.as_ref())
        } else {
            explanation
        }
    }

    /// Returns whether one may, in words; whoever acts for somebody asks about that person's rights.
    pub(crate) fn permission(&self, allowed: bool) -> String {
        let may = if allowed { "may" } else { "may not" };
        match &self.on_behalf_of {
            None => format!("you {may}"),
            Some(other) => format!("{other} {may}"),
        }
    }

    /// Warns, once for all hosts, that the ticket ends while there is work.
    pub(crate) fn warn_of_expiry(&self, seconds: u32) {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        if !std::mem::replace(&mut *warned, true) {
            self.output.say(&format!(
                "your ticket ends in {seconds} s, and the session with it; run kinit in another window and rxm goes on"
            ));
        }
    }
}

/// The host's own words are about a domain; here no domain may be in question, or the rights of two persons.
fn denial(
    explanation: Explanation,
    request: &Request,
    on_behalf_of: Option<&Principal>,
) -> Explanation {
    let verb = request.verb();
    let (what, advice) = match (on_behalf_of, request.domain()) {
        (None, Some(_)) => return explanation,
        (None, None) if matches!(verb, Verb::Whoami | Verb::Explain | Verb::ExplainOther) => (
            format!("denied: you may not {verb} here"),
            "its administrators can give you a right".to_owned(),
        ),
        (None, None) => (
            format!("denied: you may not {verb} here"),
            format!("`rxm explain {verb}` says why"),
        ),
        (Some(other), domain) => {
            let that = domain.map_or("", |_| " that, or there is no such domain");
            (
                format!(
                    "denied: you may not act for {other} here, or {other} may not {verb}{that}"
                ),
                format!("`rxm explain act-for {other}`, without --on-behalf-of, says which"),
            )
        }
    };
    Explanation {
        what,
        advice,
        ..explanation
    }
}

fn weight(item: &Item) -> usize {
    match item {
        Item::Text(text) => text.len(),
        Item::Bytes(bytes) => bytes.len(),
        Item::Domain(_)
        | Item::Job(_)
        | Item::Trouble(_)
        | Item::Image(_)
        | Item::Console(_)
        | Item::Event(_)
        | Item::Cursor(_)
        | Item::Gap(_)
        | Item::Lease(_)
        | Item::Status(_) => ROW,
    }
}

/// What is said of a host whose answer has no end.
pub(crate) fn too_much() -> Explanation {
    Explanation {
        kind: Kind::Refused,
        code: "too-large",
        what: format!("the host's answer is longer than {} MiB", MAX_ANSWER >> 20),
        advice: "its administrator should look at it".to_owned(),
        is_common: false,
    }
}

/// What is said of a host whose answer belongs to another question.
pub(crate) fn misfit() -> Explanation {
    Explanation {
        kind: Kind::Refused,
        code: "protocol",
        what: "the host's answer does not fit the question".to_owned(),
        advice: "update the older side".to_owned(),
        is_common: false,
    }
}

fn without_ticket(explanation: &Explanation) -> Stop {
    Stop::Failed(explanation.kind, explanation.to_string())
}

/// Returns the exit code of a command that ends early.
pub(crate) fn code_of(kind: Kind) -> u8 {
    let mut tally = exit::Tally::default();
    tally.failed(kind);
    tally.code()
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use xman_common::{
        name::DomainRef,
        protocol::{Fault, List, OnDomain, Whoami},
    };

    use super::*;

    fn said(request: &Request, on_behalf_of: Option<&str>) -> String {
        let other = on_behalf_of.map(|name| name.parse().unwrap());
        denial(explain::of_fault(&Fault::denied()), request, other.as_ref()).to_string()
    }

    #[test]
    fn a_denial_fits_what_was_asked_and_for_whom() {
        let list = Request::List(List::default());
        let whoami = Request::Whoami(Whoami::default());
        let pause = Request::Pause(OnDomain {
            domain: DomainRef::Uuid(Uuid::nil()),
        });
        assert_eq!(said(&pause, None), Fault::denied().to_string());
        assert_eq!(
            said(&list, None),
            "denied: you may not list here; `rxm explain list` says why"
        );
        assert!(said(&whoami, None).contains("administrators"));
        for (request, rest) in [(&list, "may not list;"), (&pause, "no such domain;")] {
            let said = said(request, Some("bob@R"));
            assert!(
                said.starts_with("denied: you may not act for bob@R"),
                "{said}"
            );
            assert!(
                said.contains(rest) && said.contains("act-for bob@R"),
                "{said}"
            );
        }
    }
}
