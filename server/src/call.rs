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
use xman_common::{
    name::DomainRef,
    protocol::{Call, CallHeader, Code, Effect, Fault, Request, Verb},
};
use xman_policy::{Grant, Subject, Verdict};

use crate::{
    Host,
    asked::{Asked, Ending},
    audit::Kind,
    caller::{Caller, Outcome, Piece},
    hypervisor::{Ailing, Facts},
    input::Input,
    jobs,
    meant::{Meant, ambiguous},
    perform,
    repeat::Claim,
    work::Work,
};

/// How long a call may take that names no deadline.
const DEFAULT_DEADLINE: Duration = Duration::from_secs(60);
/// How long a call may take whatever it names.
const MAX_DEADLINE: Duration = Duration::from_secs(24 * 3600);
/// How long after its deadline a change that has begun is waited for: verbs that wait for a guest use the deadline up, and what came of it is
/// then written down. Clients wait longer for the host's word.
const LAST_WORD: Duration = Duration::from_millis(1500);

/// Sets a call going. A read is polled by its session and ends with it; a change runs by itself from now on, and its session waits for it
/// no longer than its deadline.
pub(crate) fn start(
    call: Call,
    caller: Caller,
    outbox: mpsc::Sender<Piece>,
    input: Input,
    host: Arc<Host>,
) -> Pin<Box<dyn Future<Output = Outcome> + Send>> {
    let deadline = deadline(&call.header);
    let verb = Verb::ALL
        .iter()
        .find(|verb| verb.code() == call.header.verb);
    match verb.map(|verb| verb.effect()) {
        Some(Effect::Read | Effect::Stream) | None => {
            Box::pin(answer(call, deadline, caller, outbox, input, host))
        }
        Some(Effect::Change) => {
            let is_job = verb.is_some_and(|verb| jobs::is_job(*verb));
            let changes = host.changes.clone();
            let change = changes.spawn(answer(call, deadline, caller, outbox, input, host));
            Box::pin(async move {
                let change = async { change.await.unwrap_or_else(|_| Err(failed_in_the_middle())) };
                if is_job {
                    return change.await;
                }
                timeout_at(deadline + LAST_WORD, change)
                    .await
                    .unwrap_or_else(|_| Err(not_back_in_time()))
            })
        }
    }
}

/// A call's life; whatever happens, there is one record at least and one outcome.
async fn answer(
    call: Call,
    deadline: Instant,
    caller: Caller,
    outbox: mpsc::Sender<Piece>,
    input: Input,
    host: Arc<Host>,
) -> Outcome {
    let began = Instant::now();
    let Call { header, body } = call;
    let asked = Asked::new(&caller, &header, began);
    let request = match Request::parse(header.verb, &body) {
        Ok(request) => request,
        Err(fault) => return asked.turned_down(&host, fault),
    };
    let named = header.hypervisor.as_deref();
    let candidates = request.domain().map_or_else(Vec::new, |domain| {
        host.hypervisors.candidates(domain, named)
    });
    let asked = match candidates.as_slice() {
        [one] => asked.about(&request, Some(one)),
        [] | [_, _, ..] => asked.about(&request, None),
    };
    host.reread_policy();
    let (caller, asked) = match &header.on_behalf_of {
        None => (caller, asked),
        Some(other) => match host.act_for(&caller, other).await {
            Ok((caller, rule)) => (caller.clone(), asked.acting(caller, rule)),
            Err(reason) => return asked.denied(reason).turned_down(&host, Fault::denied()),
        },
    };
    let (facts, asked) = match host.meant(&caller, candidates) {
        Meant::Nothing => (None, asked),
        Meant::One(one) => {
            let asked = asked.about(&request, Some(&one));
            (Some(one), asked)
        }
        Meant::Several(several) => {
            let doubt = Doubt {
                several: &several,
                caller: &caller,
            };
            let asked_for = (digest(&header, &body), deadline);
            return doubt.answer(&request, asked, asked_for, &host).await;
        }
    };
    let on = match (request.domain(), facts.as_ref()) {
        (None, _) => Subject::Host,
        (Some(_), None) => Subject::UnknownDomain,
        (Some(_), Some(facts)) => Subject::Domain(facts.into()),
    };
    let mut verdict = host.judge(&caller, &request, on);
    if matches!(verdict, Verdict::Allow(_))
        && perform::is_forced(&request)
        && let plug @ Verdict::Deny(_) = host.may(&caller, Verb::Destroy, on)
    {
        verdict = plug;
    }
    if matches!(verdict, Verdict::Allow(_))
        && perform::is_of_host(&request)
        && let on_host @ Verdict::Deny(_) = host.may(&caller, request.verb(), Subject::Host)
    {
        verdict = on_host;
    }
    if let (Some(domain), None) = (request.domain(), &facts) {
        let missing = Missing {
            verdict,
            domain,
            hypervisor: named,
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
                    host.hidden(&caller, nothing_known(&host, domain, named))
                }
                _ => Fault::denied(),
            };
            return asked.denied(reason.to_string()).turned_down(&host, fault);
        }
    };
    let asked = asked.allowed(&grant);
    let hypervisor = match named.map(|name| host.hypervisors.named(name)).transpose() {
        Ok(uri) => uri.map(str::to_owned),
        Err(fault) => return asked.turned_down(&host, fault),
    };

    let work = Work {
        caller,
        facts,
        deadline,
        id: header.id,
        hypervisor,
        outbox,
        input,
        host,
    };
    match request.verb().effect() {
        Effect::Read => {
            let ending = Ending::new(asked, Kind::Call, Arc::clone(&work.host));
            let outcome = attended(grant, request, work).await;
            ending.record(&outcome);
            outcome
        }
        Effect::Stream => {
            let host = Arc::clone(&work.host);
            asked.begins(&host).await?;
            let ending = Ending::new(asked, Kind::End, Arc::clone(&host));
            let outcome = attended(grant, request, work).await;
            ending.record(&outcome);
            outcome
        }
        Effect::Change => {
            let digest = digest(&header, &body);
            change(grant, request, asked, digest, work).await
        }
    }
}

/// Carries out what ends with its session, and ends it when the right to it does.
async fn attended(grant: Grant, request: Request, work: Work) -> Outcome {
    if request.verb().goes_by_permit() {
        return perform::perform(grant, request, work).await;
    }
    let (host, caller) = (Arc::clone(&work.host), work.caller.clone());
    let (verb, judged) = (request.verb(), work.facts.clone());
    tokio::select! {
        // First: to a caller who has not read for a while nothing is carried out, and what happened meanwhile may be none of its business any more.
        biased;
        why = host.right_ends(&caller, verb, judged.as_ref()) => Err(why),
        outcome = perform::perform(grant, request, work) => outcome,
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
        Claim::Answered(outcome) => return asked.repeated(&host, *outcome),
    };
    if let Err(unrecorded) = asked.begins(&host).await {
        let outcome = Err(unrecorded);
        claim.settle(&host.store, &outcome).await;
        return outcome;
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
    /// Where the caller named one.
    hypervisor: Option<&'a str>,
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
        let trouble = nothing_known(host, self.domain, self.hypervisor);
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

/// A call about a domain of which several hypervisors have one, all of which the caller may see.
struct Doubt<'a> {
    several: &'a [Facts],
    caller: &'a Caller,
}

impl Doubt<'_> {
    /// Nothing is guessed. Whoever repeats a call that was clear when it was carried out gets what came of it.
    async fn answer(
        self,
        request: &Request,
        asked: Asked,
        (digest, deadline): ([u8; 32], Instant),
        host: &Host,
    ) -> Outcome {
        let verdicts = self
            .several
            .iter()
            .map(|facts| host.judge(self.caller, request, Subject::Domain(facts.into())));
        let verdict = verdicts.reduce(|first, next| match (&first, &next) {
            (Verdict::Deny(_), Verdict::Allow(_)) => next,
            (Verdict::Deny(_) | Verdict::Allow(_), _) => first,
        });
        let asked = match verdict {
            Some(Verdict::Allow(grant)) => asked.allowed(&grant),
            Some(Verdict::Deny(reason)) => {
                let asked = asked.denied(reason.to_string());
                return asked.turned_down(host, Fault::denied());
            }
            None => return asked.turned_down(host, Fault::denied()),
        };
        if request.verb().effect() == Effect::Change {
            let known = host
                .repeats
                .recall(&host.store, asked.key(), digest, deadline);
            if let Some(outcome) = known.await {
                return asked.repeated(host, outcome);
            }
        }
        let fault = request
            .domain()
            .map_or_else(Fault::denied, |domain| ambiguous(domain, self.several));
        asked.turned_down(host, fault)
    }
}

/// That nothing is known of a domain, where something is wrong with a hypervisor that may have it, or there is no such hypervisor.
fn nothing_known(host: &Host, domain: &DomainRef, hypervisor: Option<&str>) -> Option<Fault> {
    if let Some(Err(fault)) = hypervisor.map(|name| host.hypervisors.named(name)) {
        return Some(fault);
    }
    let ailing = host.hypervisors.ailing(hypervisor);
    // One that was never read may have any domain at all.
    let worst = ailing.iter().find(|ailing| ailing.unread);
    let Ailing { uri, why, .. } = worst.or(ailing.first())?;
    Some(Fault::new(
        Code::Unavailable,
        format!("nothing is known of '{domain}': {uri}: {why}; try again later"),
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
