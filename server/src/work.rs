//! What a granted call has to work with: who asked, what was judged, how to judge again, and where answers go.

use std::sync::Arc;

use tokio::{sync::mpsc, time::Instant};
use uuid::Uuid;
use xman_common::{
    name::DomainName,
    protocol::{Code, Fault, Item, Reply, Verb},
};
use xman_policy::{Action, Subject, Verdict};

use crate::{
    Host,
    caller::{Caller, Outcome, Piece},
    hypervisor::{Eyes, Facts, Judge, NewDomain, Target, XmlJudge},
    input::Input,
    journeys, schedule,
};

/// Bytes of text in one frame.
const TEXT_A_FRAME: usize = 32 * 1024;

/// What a call has to work with.
pub(crate) struct Work {
    pub(crate) caller: Caller,
    /// What the verdict rested on, where the request is about a domain.
    pub(crate) facts: Option<Facts>,
    pub(crate) deadline: Instant,
    pub(crate) id: Uuid,
    pub(crate) hypervisor: Option<String>,
    pub(crate) outbox: mpsc::Sender<Piece>,
    /// Of a stream.
    pub(crate) input: Input,
    pub(crate) host: Arc<Host>,
}

impl Work {
    /// The domain that was judged, with the question to ask again in its lane if it is no longer what it was.
    pub(crate) fn target(&self, verb: Verb) -> Result<Target, Fault> {
        match &self.facts {
            Some(facts) => {
                journeys::may(&self.host, verb, facts.uuid)?;
                schedule::may(&self.host, verb, facts)?;
                Ok(Target {
                    facts: facts.clone(),
                    judge: self.judge(verb),
                })
            }
            None => Err(Fault::new(
                Code::Internal,
                "a verb on a domain came without one",
            )),
        }
    }

    /// As [`Work::target`], for a verb that with force also does what `destroy` does.
    pub(crate) fn target_by(&self, verb: Verb, force: bool) -> Result<Target, Fault> {
        let target = self.target(verb)?;
        if !force {
            return Ok(target);
        }
        let (asked, plug) = (target.judge, self.judge(Verb::Destroy));
        Ok(Target {
            judge: Arc::new(move |facts| asked(facts).and_then(|()| plug(facts))),
            ..target
        })
    }

    /// As [`Work::target`], for a verb that brings something of the host's and so is judged on the host too.
    pub(crate) fn target_with_host(&self, verb: Verb) -> Result<Target, Fault> {
        let target = self.target(verb)?;
        let (host, caller, judge) = (Arc::clone(&self.host), self.caller.clone(), target.judge);
        Ok(Target {
            judge: Arc::new(move |facts| {
                ask_again(&host, &caller, verb, Subject::Host).and_then(|()| judge(facts))
            }),
            ..target
        })
    }

    /// Which domains the caller may see.
    pub(crate) fn eyes(&self) -> Eyes {
        let (host, caller) = (Arc::clone(&self.host), self.caller.clone());
        Arc::new(move |facts| host.sees(&caller, facts))
    }

    pub(crate) fn judge(&self, verb: Verb) -> Judge {
        let (host, caller) = (Arc::clone(&self.host), self.caller.clone());
        Arc::new(move |facts| {
            ask_again(&host, &caller, verb, Subject::Domain(facts.into()))?;
            journeys::may(&host, verb, facts.uuid)?;
            schedule::may(&host, verb, facts)
        })
    }

    pub(crate) fn xml_judge(&self, verb: Verb) -> XmlJudge {
        let (host, caller) = (Arc::clone(&self.host), self.caller.clone());
        Arc::new(move |new: &NewDomain, existing: Option<&Facts>| {
            let made = Subject::NewDomain {
                name: &new.name,
                uuid: new.uuid,
            };
            ask_again(&host, &caller, verb, made)?;
            if let Some(facts) = existing {
                ask_again(&host, &caller, verb, Subject::Domain(facts.into()))?;
                journeys::may(&host, verb, facts.uuid)?;
                schedule::may(&host, verb, facts)?;
                schedule::admit_new(&host, verb, new)?;
                return Ok(None);
            }
            schedule::admit_new(&host, verb, new)?;
            let owns = matches!(host.may(&caller, Action::Own, made), Verdict::Allow(_));
            Ok(owns.then(|| caller.person.principal.clone()))
        })
    }

    /// As [`Work::target`], for a verb that gives the domain another name: judged as it would be called as well, at once and again.
    pub(crate) fn target_called(&self, verb: Verb, name: &DomainName) -> Result<Target, Fault> {
        let target = self.target(verb)?;
        let (asked, name) = (target.judge, name.clone());
        let as_called = move |facts: &Facts| Facts {
            name: name.clone(),
            ..facts.clone()
        };
        asked(&as_called(&target.facts))?;
        Ok(Target {
            judge: Arc::new(move |facts| asked(facts).and_then(|()| asked(&as_called(facts)))),
            ..target
        })
    }

    pub(crate) async fn send(&self, piece: Piece) -> Result<(), Fault> {
        self.outbox
            .send(piece)
            .await
            .map_err(|_| Fault::new(Code::Unavailable, "the caller is gone"))
    }

    pub(crate) async fn send_text(&self, text: &str) -> Outcome {
        let mut rest = text;
        while !rest.is_empty() {
            let mut end = rest.len().min(TEXT_A_FRAME);
            while !rest.is_char_boundary(end) {
                end -= 1;
            }
            let (piece, tail) = rest.split_at(end);
            self.send(Piece::Items(vec![Item::Text(piece.to_owned())]))
                .await?;
            rest = tail;
        }
        Ok(Reply::Done)
    }
}

fn ask_again(
    host: &Host,
    caller: &Caller,
    action: impl Into<Action>,
    on: Subject<'_>,
) -> Result<(), Fault> {
    host.reread_policy();
    match host.may(caller, action, on) {
        Verdict::Allow(_) => Ok(()),
        Verdict::Deny(_) => Err(Fault::denied()),
    }
}
