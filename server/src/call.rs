//! A call from its bytes to its outcome.
//!
//! ```text
//! parse -> find -> decide --deny--> record -> Denied
//!                    |
//!                  Grant, for a read: -----------------------------> perform -> record -> outcome
//!                         for a change: claim the id -> record -> perform -> remember -> record -> outcome
//! ```
//! Before the verdict only memory is looked at. Reads belong to the session and end with it. A change, once begun, goes on to its
//! end in a task of its own, and what came of it is written down whether or not the caller is still there.

use std::{pin::Pin, sync::Arc, time::Duration};

use sha2::{Digest, Sha256};
use tokio::{
    sync::mpsc,
    time::{Instant, timeout_at},
};
use uuid::Uuid;
use xman_common::{
    name::DomainRef,
    protocol::{Call, CallHeader, Code, Effect, Fault, Reply, Request, Verb},
};
use xman_policy::{Grant, Subject, Verdict};

use crate::{
    Host,
    audit::{Kind, Record, quoted},
    caller::{Caller, Outcome, Piece},
    config::AuditNeed,
    hypervisor::Facts,
    perform::{self, Work},
    repeat::Claim,
    store::CallKey,
};

/// How long a call may take that names no deadline.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a call may take whatever it names.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// How long after its deadline a change that has begun is waited for: verbs that wait for a guest use the deadline up.
const LAST_WORD: Duration = Duration::from_millis(500);

/// Sets a call going. A read is polled by its session and ends with it; a change runs by itself from now on, and its session waits for it
/// no longer than its deadline.
pub(crate) fn start(
    call: Call,
    caller: Caller,
    outbox: mpsc::Sender<Piece>,
    host: Arc<Host>,
) -> Pin<Box<dyn Future<Output = Outcome> + Send>> {
    let verb = Verb::ALL
        .iter()
        .find(|verb| verb.code() == call.header.verb);
    match verb.map(|verb| verb.effect()) {
        Some(Effect::Read) | None => Box::pin(answer(call, caller, outbox, host)),
        Some(Effect::Change) => {
            let deadline = deadline(&call.header) + LAST_WORD;
            let is_job = verb == Some(&Verb::Migrate);
            let changes = host.changes.clone();
            let change = changes.spawn(answer(call, caller, outbox, host));
            Box::pin(async move {
                let change = async { change.await.unwrap_or_else(|_| Err(failed_in_the_middle())) };
                if is_job {
                    return change.await;
                }
                timeout_at(deadline, change)
                    .await
                    .unwrap_or_else(|_| Err(not_back_in_time()))
            })
        }
    }
}

/// A call's life; whatever happens, there is one record at least and one outcome.
async fn answer(
    call: Call,
    caller: Caller,
    outbox: mpsc::Sender<Piece>,
    host: Arc<Host>,
) -> Outcome {
    let began = Instant::now();
    let Call { header, body } = call;
    let asked = Asked::new(&caller, &header, began);
    let request = match Request::parse(header.verb, &body) {
        Ok(request) => request,
        Err(fault) => return asked.turned_down(&host, fault),
    };
    let facts = request
        .domain()
        .and_then(|domain| host.hypervisors.find(domain, header.hypervisor.as_deref()));
    let asked = asked.about(&request, facts.as_ref());
    host.reread_policy();
    let (caller, asked) = match &header.on_behalf_of {
        None => (caller, asked),
        Some(other) => match host.act_for(&caller, other).await {
            Ok((caller, rule)) => (caller.clone(), asked.acting(caller, rule)),
            Err(reason) => return asked.denied(reason).turned_down(&host, Fault::denied()),
        },
    };
    let on = match (request.domain(), facts.as_ref()) {
        (None, _) => Subject::Host,
        (Some(_), None) => Subject::UnknownDomain,
        (Some(_), Some(facts)) => Subject::Domain(facts.into()),
    };
    let mut verdict = host.may(&caller, request.verb(), on);
    if matches!(verdict, Verdict::Allow(_))
        && perform::is_forced(&request)
        && let plug @ Verdict::Deny(_) = host.may(&caller, Verb::Destroy, on)
    {
        verdict = plug;
    }
    let deadline = deadline(&header);
    if let (Some(domain), None) = (request.domain(), &facts) {
        let missing = Missing {
            verdict,
            domain,
            caller: &caller,
        };
        let digest = digest(&header, &body);
        return missing
            .answer(&request, asked, digest, deadline, &host)
            .await;
    }
    let grant = match verdict {
        Verdict::Allow(grant) => grant,
        Verdict::Deny(reason) => {
            let fault = match (request.domain(), &facts) {
                (Some(domain), Some(facts)) if !host.sees(&caller, facts) => {
                    host.hidden(&caller, nothing_known(&host, domain))
                }
                _ => Fault::denied(),
            };
            return asked.denied(reason.to_string()).turned_down(&host, fault);
        }
    };
    let asked = asked.allowed(&grant);
    if let Some(fault) = no_such_hypervisor(&host, &header) {
        return asked.turned_down(&host, fault);
    }

    let work = Work {
        caller,
        facts,
        deadline,
        id: header.id,
        hypervisor: header.hypervisor.clone(),
        outbox,
        host,
    };
    match request.verb().effect() {
        Effect::Read => {
            let host = Arc::clone(&work.host);
            let caller = work.caller.clone();
            let (verb, judged) = (request.verb(), work.facts.clone());
            let outcome = tokio::select! {
                outcome = perform::perform(grant, request, work) => outcome,
                why = host.right_ends(&caller, verb, judged.as_ref()) => Err(why),
            };
            host.audit.note(asked.ended(Kind::Call, &outcome));
            outcome
        }
        Effect::Change => {
            let digest = digest(&header, &body);
            change(grant, request, asked, digest, work).await
        }
    }
}

/// A change's life: claimed by its id, recorded, carried out to its end, remembered, recorded.
async fn change(
    grant: Grant,
    request: Request,
    asked: Asked,
    digest: [u8; 32],
    work: Work,
) -> Outcome {
    let host = Arc::clone(&work.host);
    let claim = match host
        .repeats
        .claim(
            &host.store,
            asked.key(),
            request.verb().name(),
            digest,
            work.deadline,
        )
        .await
    {
        Claim::Mine(claim) => claim,
        Claim::Answered(outcome) => return asked.repeated(&host, outcome),
    };
    if let Err(unrecorded) = host.audit.write(asked.record(Kind::Begin, "begins")).await {
        if host.config.audit == AuditNeed::Required {
            let outcome = Err(Fault::new(
                Code::Unavailable,
                format!("nothing was begun: {unrecorded}; tell the host's administrator"),
            ));
            claim.settle(&host.store, &outcome).await;
            host.audit.note(asked.ended(Kind::End, &outcome));
            return outcome;
        }
        tracing::error!(error = %unrecorded, "a change goes on unrecorded, as configured");
    }
    let outcome = perform::perform(grant, request, work).await;
    claim.settle(&host.store, &outcome).await;
    host.audit.note(asked.ended(Kind::End, &outcome));
    outcome
}

/// A call about a domain that is not here, which must look as if it were here and forbidden.
struct Missing<'a> {
    verdict: Verdict,
    domain: &'a DomainRef,
    caller: &'a Caller,
}

impl Missing<'_> {
    /// Whoever repeats a call that removed the domain gets what came of it: it was judged when it was carried out, and nothing is carried out
    /// now. Administrators are told that it is not there, whoever may ask at all that nothing is known yet, and all others nothing.
    async fn answer(
        self,
        request: &Request,
        asked: Asked,
        digest: [u8; 32],
        deadline: Instant,
        host: &Host,
    ) -> Outcome {
        let (asked, is_administrator) = match self.verdict {
            Verdict::Allow(grant) => (asked.allowed(&grant), grant.administrator()),
            Verdict::Deny(reason) => (asked.denied(reason.to_string()), false),
        };
        if request.verb().effect() == Effect::Change {
            let known = host
                .repeats
                .recall(&host.store, asked.key(), digest, deadline);
            if let Some(outcome) = known.await {
                return asked.repeated(host, outcome);
            }
        }
        let trouble = nothing_known(host, self.domain);
        if is_administrator {
            let fault = trouble.unwrap_or_else(|| no_such_domain(self.domain));
            return asked.turned_down(host, fault);
        }
        let fault = host.hidden(self.caller, trouble);
        asked
            .denied("there is no such domain here".to_owned())
            .turned_down(host, fault)
    }
}

fn no_such_hypervisor(host: &Host, header: &CallHeader) -> Option<Fault> {
    let uri = header.hypervisor.as_ref()?;
    (!host.hypervisors.has(uri)).then(|| {
        Fault::new(
            Code::NotFound,
            format!("this host has no hypervisor '{uri}'; `rxm info` lists them"),
        )
    })
}

/// That nothing is known of a domain, where something is wrong with a hypervisor that may have it.
fn nothing_known(host: &Host, domain: &DomainRef) -> Option<Fault> {
    let trouble = || {
        (0..host.config.hypervisors.len())
            .find_map(|hypervisor| host.hypervisors.trouble(hypervisor))
    };
    let why = host.hypervisors.unread(None).or_else(trouble)?;
    Some(Fault::new(
        Code::Unavailable,
        format!("nothing is known of '{domain}': {why}; try again later"),
    ))
}

fn no_such_domain(domain: &DomainRef) -> Fault {
    Fault::new(
        Code::NotFound,
        format!("there is no domain '{domain}' here; `rxm list` shows those there are"),
    )
}

fn deadline(header: &CallHeader) -> Instant {
    Instant::now()
        + header
            .deadline_ms
            .map_or(DEFAULT_DEADLINE, |ms| Duration::from_millis(ms.into()))
            .min(MAX_DEADLINE)
}

fn failed_in_the_middle() -> Fault {
    Fault::new(
        Code::Internal,
        "xmand failed in the middle of it; look at the domain with `rxm list`, then at the host's log",
    )
}

fn not_back_in_time() -> Fault {
    Fault::new(
        Code::Unknown,
        "it began, and libvirt has not come back from it in time; the same call again (same id) tells what came of it",
    )
}

/// The request's digest: a repeat must ask for the same.
fn digest(header: &CallHeader, body: &[u8]) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update(header.verb.to_be_bytes());
    digest.update(header.hypervisor.as_deref().unwrap_or_default());
    digest.update([0]);
    digest.update(body);
    digest.finalize().into()
}

/// What was asked by whom and what was decided, as the audit shows it.
#[derive(Clone)]
struct Asked {
    caller: Caller,
    on_behalf_of: String,
    act_for_rule: String,
    id: Uuid,
    began: Instant,
    hypervisor: String,
    verb: String,
    domain: String,
    uuid: String,
    arguments: String,
    verdict: &'static str,
    rule: String,
}

impl Asked {
    fn new(caller: &Caller, header: &CallHeader, began: Instant) -> Self {
        Self {
            caller: caller.clone(),
            on_behalf_of: header
                .on_behalf_of
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            act_for_rule: String::new(),
            id: header.id,
            began,
            hypervisor: header.hypervisor.clone().unwrap_or_default(),
            verb: format!("#{}", header.verb),
            domain: String::new(),
            uuid: String::new(),
            arguments: String::new(),
            verdict: "none",
            rule: String::new(),
        }
    }

    fn about(self, request: &Request, facts: Option<&Facts>) -> Self {
        let named = || {
            request
                .domain()
                .map(ToString::to_string)
                .unwrap_or_default()
        };
        Self {
            verb: request.verb().name().to_owned(),
            domain: facts.map_or_else(named, |facts| facts.name.to_string()),
            uuid: facts
                .map(|facts| facts.uuid.to_string())
                .unwrap_or_default(),
            arguments: perform::arguments(request),
            ..self
        }
    }

    /// From here on the caller acts for somebody else, by this rule.
    fn acting(self, caller: Caller, act_for_rule: String) -> Self {
        Self {
            caller,
            act_for_rule,
            ..self
        }
    }

    fn allowed(self, grant: &Grant) -> Self {
        Self {
            verdict: "allow",
            rule: grant.rule().to_owned(),
            ..self
        }
    }

    fn denied(self, reason: String) -> Self {
        Self {
            verdict: "deny",
            rule: reason,
            ..self
        }
    }

    fn turned_down(self, host: &Host, fault: Fault) -> Outcome {
        let outcome = Err(fault);
        host.audit.note(self.ended(Kind::Call, &outcome));
        outcome
    }

    fn repeated(self, host: &Host, outcome: Outcome) -> Outcome {
        host.audit
            .note(self.ended(Kind::Call, &outcome).with("repeated", "yes"));
        outcome
    }

    fn key(&self) -> CallKey {
        CallKey {
            principal: self.caller.proven.principal.to_string(),
            on_behalf_of: self.on_behalf_of.clone(),
            id: self.id,
        }
    }

    fn record(&self, kind: Kind, what: &str) -> Record {
        let on = if self.domain.is_empty() {
            String::new()
        } else {
            format!(" {}", quoted(&self.domain))
        };
        let rule = match (self.verdict, self.rule.as_str()) {
            (_, "") => String::new(),
            ("deny", reason) => format!(" ({reason})"),
            (_, rule) => format!(" by {rule}"),
        };
        let Self {
            caller,
            verb,
            verdict,
            ..
        } = self;
        let behalf = match self.on_behalf_of.as_str() {
            "" => String::new(),
            other => format!(" for {}", quoted(other)),
        };
        let sentence = format!(
            "{}{behalf} {verb}{on} from {}: {verdict}{rule}; {what}",
            quoted(caller.proven.principal.as_str()),
            caller.address
        );
        caller
            .record(kind, sentence)
            .with("call", self.id.to_string())
            .with("verb", verb)
            .with("domain", &self.domain)
            .with("uuid", &self.uuid)
            .with("hypervisor", &self.hypervisor)
            .with("args", &self.arguments)
            .with("verdict", verdict)
            .with("rule", &self.rule)
            .with("on-behalf-of", &self.on_behalf_of)
            .with("act-for-rule", &self.act_for_rule)
    }

    fn ended(&self, kind: Kind, outcome: &Outcome) -> Record {
        let ms = self.began.elapsed().as_millis();
        let (word, error) = match outcome {
            Ok(_) => ("ok", ""),
            Err(fault) => (fault.code.name(), fault.message.as_str()),
        };
        let what = format!("{word} in {ms} ms");
        let record = match outcome {
            // What came with its XML has its name only now.
            Ok(Reply::Domain(row)) if self.domain.is_empty() => Self {
                domain: row.name.to_string(),
                uuid: row.uuid.to_string(),
                ..self.clone()
            }
            .record(kind, &what),
            _ => self.record(kind, &what),
        };
        record
            .with("outcome", word)
            .with("ms", ms.to_string())
            .with("error", error)
    }
}
