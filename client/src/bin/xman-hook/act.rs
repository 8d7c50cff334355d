//! Brings an intent about: asks the hosts, waits for what they have under way, and leaves nothing half-done.

use std::{
    ops::ControlFlow,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tokio::time::{Instant, sleep};
use uuid::Uuid;
use xman_client::{
    Address, CallError, Caller, Failure, Interrupt, Patience,
    caller::may_have_happened,
    explain, fleet,
    protocol::{
        Code, LeaseAnswer, LeaseBegin, LeaseEnd, Preempt, Reply, Request, Resume, StatusRow,
    },
};

use crate::{
    config::Config,
    hook::Hook,
    intent::{Intent, Spot},
    nodes::Place,
    queue::{End, Queue, TOO_OLD},
    told::Told,
    verdict::{Class, Outcome},
};

/// What this program calls itself on the wire.
pub(crate) const SOFTWARE: &str = concat!("xman-hook ", env!("CARGO_PKG_VERSION"));
/// A host that is asked again and again is asked for as long as the deadline allows.
const TRIES: u32 = 10_000;
/// How often an end is tried within its hook: it is kept anyway.
const END_TRIES: u32 = 3;
/// The pauses between two questions for room.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long what was granted in vain may take to be given back at once; it is kept anyway.
const GIVE_BACK: Duration = Duration::from_secs(3);
/// How long a hook delivers other jobs' ends.
const OTHERS: Duration = Duration::from_secs(2);
/// How long no KDC or host is tried for one end.
const ONE_END: Duration = Duration::from_secs(10);
/// Hosts asked at once.
const WIDTH: usize = 64;

/// Who acts.
#[derive(Debug)]
pub(crate) struct Actor<'a> {
    pub(crate) config: &'a Config,
    pub(crate) told: &'a Told,
    pub(crate) interrupt: Interrupt,
    pub(crate) queue: Queue,
    pub(crate) kdc_is_silent: Arc<AtomicBool>,
}

/// How far it came on one node.
struct Begun<'a> {
    spot: &'a Spot,
    outcome: Outcome,
    /// Whether the host may have a lease of it.
    may_be_there: bool,
}

/// What came of delivering.
#[derive(Debug, Default)]
pub(crate) struct Delivered {
    pub(crate) done: usize,
    pub(crate) left: usize,
}

impl Actor<'_> {
    /// Brings it about within `limit`.
    pub(crate) async fn carry_out(&self, hook: Hook, intent: &Intent, limit: Duration) -> Outcome {
        let deadline = Instant::now() + limit;
        let outcome = match intent {
            Intent::Nothing => Outcome::new(Class::Done, "none of the nodes is xman's"),
            Intent::Begin { spots, .. } => {
                // A job that ended here before may still have the room.
                let hosts: Vec<_> = spots.iter().map(|spot| spot.place.host.clone()).collect();
                self.deliver(Some(&hosts), limit / 4).await;
                self.begin(hook, intent, spots, deadline).await
            }
            Intent::End { spots } => self.end(spots, deadline).await,
            Intent::Preempt {
                spots,
                depth,
                reason,
            } => {
                let request = |spot: &Spot| {
                    Request::Preempt(Preempt {
                        domain: spot.place.domain.clone(),
                        depth: *depth,
                        lease: Some(spot.key.clone()),
                        reason: reason.clone(),
                        // Who is inside would wait for its own end.
                        wait: !hook.is_inside(),
                    })
                };
                self.each(spots, deadline, request, |_| None).await
            }
            Intent::Resume { spots } => {
                let request = |spot: &Spot| {
                    Request::Resume(Resume {
                        domain: spot.place.domain.clone(),
                        lease: Some(spot.key.clone()),
                        force: false,
                        wait: true,
                    })
                };
                self.each(spots, deadline, request, still_held).await
            }
        };
        if outcome.class != Class::Stopped {
            let left = deadline.saturating_duration_since(Instant::now());
            self.deliver(None, left.min(OTHERS)).await;
        }
        outcome
    }

    pub(crate) fn caller(&self, host: &Address, limit: Duration, tries: u32) -> Caller {
        let patience = Patience {
            timeout: limit,
            tries,
            interrupt: self.interrupt.clone(),
            kdc_is_silent: Arc::clone(&self.kdc_is_silent),
            software: SOFTWARE.to_owned(),
        };
        Caller::new(host.clone(), patience, None)
    }

    /// Asks all nodes for one thing.
    async fn each(
        &self,
        spots: &[Spot],
        deadline: Instant,
        request: impl Fn(&Spot) -> Request,
        judge: impl Fn(&StatusRow) -> Option<String>,
    ) -> Outcome {
        let (request, judge) = (&request, &judge);
        let outcomes = fleet::all(spots, WIDTH, |spot| async move {
            let host = &spot.place.host;
            let left = deadline.saturating_duration_since(Instant::now());
            let mut caller = self.caller(host, left, TRIES);
            match caller
                .ask(&request(spot), |_| ControlFlow::Continue(()))
                .await
            {
                Ok(Reply::Standing(row)) => match judge(&row) {
                    None => Outcome::new(
                        Class::Done,
                        format!("{host}: {} is {}", row.name, row.standing),
                    ),
                    Some(why) => Outcome::new(Class::Later, format!("{host}: {why}")),
                },
                Ok(other) => strange(host, &other),
                Err(failure) => failed(&failure, host),
            }
        })
        .await;
        worst(outcomes)
    }

    /// Makes room on all nodes, or on none.
    async fn begin(
        &self,
        hook: Hook,
        intent: &Intent,
        spots: &[Spot],
        deadline: Instant,
    ) -> Outcome {
        let begun = fleet::all(spots, WIDTH, |spot| {
            self.begin_one(hook, intent, spot, deadline)
        })
        .await;
        let in_vain: Vec<_> = begun
            .iter()
            .filter(|begun| begun.may_be_there)
            .map(|begun| begun.spot.clone())
            .collect();
        let outcome = worst(begun.into_iter().map(|begun| begun.outcome).collect());
        if outcome.class == Class::Done || hook.job_runs_anyway() {
            return outcome;
        }
        let limit = if outcome.class == Class::Stopped {
            Duration::ZERO
        } else {
            GIVE_BACK
        };
        let given_back = self.end(&in_vain, Instant::now() + limit).await;
        if given_back.class == Class::Done {
            return outcome;
        }
        Outcome::new(
            outcome.class,
            format!("{}; {}", outcome.sentence, given_back.sentence),
        )
    }

    async fn begin_one<'s>(
        &self,
        hook: Hook,
        intent: &Intent,
        spot: &'s Spot,
        deadline: Instant,
    ) -> Begun<'s> {
        let host = &spot.place.host;
        let mut begun = Begun {
            spot,
            outcome: Outcome::new(Class::Silent, format!("{host}: no time was left")),
            may_be_there: false,
        };
        let Some(request) = begin_request(intent, spot) else {
            return begun;
        };
        let mut caller = self.caller(
            host,
            deadline.saturating_duration_since(Instant::now()),
            TRIES,
        );
        for asked in 0u32.. {
            match caller.ask(&request, |_| ControlFlow::Continue(())).await {
                Ok(Reply::Lease(LeaseAnswer::Granted(row))) => {
                    begun.may_be_there = true;
                    begun.outcome = Outcome::new(
                        Class::Done,
                        format!("{host}: {} has its room in {}", row.key, row.domain),
                    );
                    return begun;
                }
                Ok(Reply::Lease(LeaseAnswer::Pending(row))) => {
                    begun.may_be_there = true;
                    let victims: Vec<_> = row.victims.iter().map(ToString::to_string).collect();
                    begun.outcome = Outcome::new(
                        Class::Later,
                        format!(
                            "{host}: room is still being made for {} by {}",
                            row.key,
                            victims.join(", ")
                        ),
                    );
                }
                Ok(Reply::Lease(LeaseAnswer::Refused { why, then })) => {
                    begun.may_be_there = false;
                    let class = Class::refused(then);
                    begun.outcome = Outcome::new(class, format!("{host}: {why}"));
                    if class != Class::Later || !hook.waits_for_room() {
                        return begun;
                    }
                }
                Ok(other) => {
                    begun.outcome = strange(host, &other);
                    return begun;
                }
                Err(failure) => {
                    begun.may_be_there |= may_have_happened(&failure);
                    begun.outcome = failed(&failure, host);
                    return begun;
                }
            }
            let pause = pause(asked);
            if Instant::now() + pause >= deadline {
                return begun;
            }
            tokio::select! {
                () = sleep(pause) => {}
                () = self.interrupt.raised() => {
                    begun.outcome = Outcome::new(Class::Stopped, "stopped while it waited for room");
                    return begun;
                }
            }
        }
        begun
    }

    /// Ends leases: what cannot be delivered is kept.
    pub(crate) async fn end(&self, spots: &[Spot], deadline: Instant) -> Outcome {
        // All are written down before the first is delivered.
        let kept: Vec<_> = spots
            .iter()
            .map(|spot| (spot, self.queue.keep(spot)))
            .collect();
        let outcomes = fleet::all(kept, WIDTH, |(spot, kept)| async move {
            let host = &spot.place.host;
            let left = deadline.saturating_duration_since(Instant::now());
            let said = if left.is_zero() {
                Err(Outcome::new(Class::Silent, format!("{host}: not tried yet")))
            } else {
                self.say_end(spot, left).await
            };
            match (said, kept) {
                (Ok(sentence), kept) => {
                    if let Ok(end) = kept {
                        let _ = self.queue.forget(&end);
                    }
                    Outcome::new(Class::Done, sentence)
                }
                (Err(why), Ok(_)) => Outcome::new(
                    Class::Kept,
                    format!("{} has ended, which is kept and told later: {}", spot.key, why.sentence),
                ),
                (Err(why), Err(error)) => Outcome::new(
                    why.class,
                    format!(
                        "{} has ended, which could be neither told ({}) nor kept ({error}); `rxm lease end` ends it, and so does the next reconciliation",
                        spot.key, why.sentence
                    ),
                ),
            }
        })
        .await;
        worst(outcomes)
    }

    async fn say_end(&self, spot: &Spot, limit: Duration) -> Result<String, Outcome> {
        let Spot {
            key,
            place: Place { host, domain },
        } = spot;
        let request = Request::LeaseEnd(LeaseEnd {
            key: key.clone(),
            domain: Some(domain.clone()),
        });
        let mut caller = self.caller(host, limit, END_TRIES);
        match caller.ask(&request, |_| ControlFlow::Continue(())).await {
            Ok(Reply::Ended(ended)) if ended.is_empty() => {
                Ok(format!("{host}: there was no lease {key}"))
            }
            Ok(Reply::Ended(_)) => Ok(format!("{host}: {key} has ended")),
            Ok(other) => Err(strange(host, &other)),
            Err(failure) => Err(failed(&failure, host)),
        }
    }

    /// Delivers ends that were kept, of these hosts or of all, within `limit`.
    pub(crate) async fn deliver(&self, hosts: Option<&[Address]>, limit: Duration) -> Delivered {
        let deadline = Instant::now() + limit;
        let taken = match self.queue.take() {
            Ok(Some(taken)) => taken,
            Ok(None) => return Delivered::default(),
            Err(error) => {
                self.told.error(format!("the queue of ends: {error}"));
                return Delivered::default();
            }
        };
        let content = match self.queue.content() {
            Ok(content) => content,
            Err(error) => {
                self.told.error(format!("the queue of ends: {error}"));
                return Delivered::default();
            }
        };
        for spoilt in &content.spoilt {
            self.told
                .error(format!("an end cannot be read and was put aside: {spoilt}"));
        }
        let mut by_host: Vec<(Address, Vec<End>)> = Vec::new();
        let mut delivered = Delivered::default();
        for end in content.ends {
            if hosts.is_some_and(|hosts| !hosts.contains(&end.spot.place.host)) {
                continue;
            }
            if end.age() > TOO_OLD {
                self.give_up(&end, "for a week nobody has taken it");
                continue;
            }
            match by_host
                .iter_mut()
                .find(|(host, _)| *host == end.spot.place.host)
            {
                Some((_, ends)) => ends.push(end),
                None => by_host.push((end.spot.place.host.clone(), vec![end])),
            }
        }
        let each = fleet::all(by_host, WIDTH, |(_, ends)| {
            self.deliver_to_one(ends, deadline)
        })
        .await;
        for one in each {
            delivered.done += one.done;
            delivered.left += one.left;
        }
        drop(taken);
        delivered
    }

    /// Delivers a host's ends in their order; where one fails because the host is away, the others wait.
    async fn deliver_to_one(&self, ends: Vec<End>, deadline: Instant) -> Delivered {
        let mut delivered = Delivered::default();
        let mut is_away = false;
        for end in &ends {
            let left = deadline.saturating_duration_since(Instant::now());
            if is_away || left.is_zero() || self.interrupt.is_raised() {
                delivered.left += 1;
                continue;
            }
            match self.say_end(&end.spot, left.min(ONE_END)).await {
                Ok(sentence) => {
                    self.told.info(format!("delivered late: {sentence}"));
                    if let Err(error) = self.queue.forget(end) {
                        self.told.error(format!("the queue of ends: {error}"));
                    }
                    delivered.done += 1;
                }
                Err(why) => {
                    is_away = true;
                    delivered.left += 1;
                    self.told.warning(format!(
                        "the end of {} waits: {}",
                        end.spot.key, why.sentence
                    ));
                }
            }
        }
        delivered
    }

    fn give_up(&self, end: &End, why: &str) {
        self.told.error(format!(
            "the end of {} for {} is put aside: {why}",
            end.spot.key, end.spot.place.host
        ));
        if let Err(error) = self.queue.put_aside(end) {
            self.told.error(format!("the queue of ends: {error}"));
        }
    }
}

fn begin_request(intent: &Intent, spot: &Spot) -> Option<Request> {
    match intent {
        Intent::Begin {
            user,
            preemptible,
            ends_in_ms,
            ..
        } => Some(Request::LeaseBegin(LeaseBegin {
            key: spot.key.clone(),
            domain: spot.place.domain.clone(),
            user: user.clone(),
            preemptible: *preemptible,
            ends_in_ms: *ends_in_ms,
            reserve: false,
            wait: true,
        })),
        Intent::End { .. } | Intent::Preempt { .. } | Intent::Resume { .. } | Intent::Nothing => {
            None
        }
    }
}

/// Returns why a domain does not run although its job may; nothing where it does.
fn still_held(row: &StatusRow) -> Option<String> {
    let hold = row.holds.first()?;
    Some(format!(
        "{} is still held back by {}{}",
        row.name,
        hold.holder,
        if hold.reason.is_empty() {
            String::new()
        } else {
            format!(": {}", hold.reason)
        }
    ))
}

fn strange(host: &Address, reply: &Reply) -> Outcome {
    let kind = format!("{reply:?}");
    let kind = kind.split(['(', ' ', '{']).next().unwrap_or_default();
    Outcome::new(
        Class::Forbidden,
        format!(
            "{host}: its answer ({kind}) is to another question; its xmand and this hook do not fit together"
        ),
    )
}

/// Returns what a failed call means, in words.
pub(crate) fn failed(failure: &Failure, host: &Address) -> Outcome {
    let explanation = explain::failure(failure, host, None);
    let class = Class::failed(failure, &explanation);
    let words = match failure {
        Failure::Call(CallError::Fault(fault)) if fault.code == Code::Unsupported => {
            format!("{}; it needs an xmand with leases", explanation)
        }
        Failure::Call(_) | Failure::Connect(_) | Failure::Interrupted => explanation.to_string(),
    };
    let words = words
        .strip_prefix(&format!("{host}: "))
        .unwrap_or(&words)
        .to_owned();
    Outcome::new(class, format!("{host}: {words}"))
}

/// Of several, what is worst; who has to act upon it needs its words alone.
fn worst(outcomes: Vec<Outcome>) -> Outcome {
    let class = outcomes
        .iter()
        .map(|outcome| outcome.class)
        .max()
        .unwrap_or(Class::Done);
    let sentences: Vec<_> = outcomes
        .into_iter()
        .filter(|outcome| outcome.class == class)
        .map(|outcome| outcome.sentence)
        .collect();
    Outcome::new(class, sentences.join("; "))
}

/// Returns the pause after so many questions, shortened by up to a half so that many hooks spread.
fn pause(asked: u32) -> Duration {
    let full = FIRST_PAUSE
        .saturating_mul(1 << asked.min(6))
        .min(LONGEST_PAUSE);
    let [chance, ..] = *Uuid::new_v4().as_bytes();
    full - full * u32::from(chance) / 512
}

/// Returns whether a KDC was silent, for who asks many hosts in turn.
pub(crate) fn forget_silence(silence: &AtomicBool) {
    silence.store(false, Ordering::Relaxed);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_nodes_the_worst_decides() {
        let outcome = |class, words: &str| Outcome::new(class, words);
        let found = worst(vec![
            outcome(Class::Done, "a"),
            outcome(Class::Later, "b"),
            outcome(Class::Later, "c"),
        ]);
        assert_eq!(found, outcome(Class::Later, "b; c"));
        assert_eq!(worst(Vec::new()).class, Class::Done);
    }

    #[test]
    fn pauses_grow_and_stay_bounded() {
        for asked in [0, 1, 5, 6, 100, u32::MAX] {
            let pause = pause(asked);
            assert!(
                pause >= FIRST_PAUSE / 2 && pause <= LONGEST_PAUSE,
                "{asked}"
            );
        }
    }
}
