//! May this caller? Every question to the policy goes through here: at a call's beginning, again in a lane, for each row of a list, and again
//! and again while something goes on.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use tokio::{task::block_in_place, time::sleep};
use xman_common::{
    name::{DomainRef, Principal},
    protocol::{Code, DomainRow, ExplainStep, Explanation, Fault, Request, Settle, Verb},
};
use xman_policy::{Action, DomainFacts, Person, Query, Subject, Verdict};

use crate::{Host, caller::Caller, hypervisor::Facts};

/// How often what goes on (a log that is followed, a job that is waited for) is judged anew.
const REVIEW: Duration = Duration::from_secs(1);

impl Host {
    /// Answers one question. Where that means to ask outside of this process, the thread's other tasks go elsewhere meanwhile.
    fn decide(&self, query: &Query<'_>) -> Verdict {
        if self.policy.waits() {
            block_in_place(|| self.policy.decide(query))
        } else {
            self.policy.decide(query)
        }
    }

    /// Answers what a caller may do to a subject; who acts for somebody must still be allowed to.
    pub(crate) fn may(
        &self,
        caller: &Caller,
        action: impl Into<Action>,
        on: Subject<'_>,
    ) -> Verdict {
        match self.may_act(caller) {
            Some(Verdict::Deny(reason)) => Verdict::Deny(reason),
            Some(Verdict::Allow(_)) | None => self.decide(&caller.query(action, on)),
        }
    }

    /// Answers what a call asks for: by the rules, or where another host shows a permit for it, by that.
    pub(crate) fn judge(&self, caller: &Caller, request: &Request, on: Subject<'_>) -> Verdict {
        let (realm, peer) = (caller.called.realm(), &caller.proven.principal);
        if let Request::Carry(carry) = request {
            self.permits.carry(carry, realm, peer, Instant::now())
        } else if let Request::Settle(Settle { permit, .. }) = request {
            self.permits.settle(permit, realm, peer)
        } else {
            self.may(caller, request.verb(), on)
        }
    }

    /// Answers whether a caller may act for whom it acts for; nothing where it acts for itself.
    fn may_act(&self, caller: &Caller) -> Option<Verdict> {
        caller.acting()?;
        let asked = Caller {
            person: Arc::clone(&caller.proven),
            ..caller.clone()
        };
        Some(self.decide(&asked.query(Action::ActFor, Subject::Person(&caller.person))))
    }

    /// Returns which verbs a caller may do to some of the subjects at least. All is asked at once, since each question to another program takes
    /// its time.
    pub(crate) fn may_some(
        &self,
        caller: &Caller,
        verbs: &[Verb],
        on: &[Subject<'_>],
    ) -> Vec<Verb> {
        if let Some(Verdict::Deny(_)) = self.may_act(caller) {
            return Vec::new();
        }
        let asked = verbs
            .iter()
            .flat_map(|verb| on.iter().map(|on| (*verb, *on)));
        let (asked, queries): (Vec<Verb>, Vec<_>) = asked
            .map(|(verb, on)| (verb, caller.query(verb, on)))
            .unzip();
        let verdicts = block_in_place(|| self.policy.decide_all(&queries));
        let mut may: Vec<Verb> = asked
            .into_iter()
            .zip(verdicts)
            .filter(|(_, verdict)| matches!(verdict, Verdict::Allow(_)))
            .map(|(verb, _)| verb)
            .collect();
        may.dedup();
        may
    }

    /// Returns the domains that a caller may see, from memory, sorted by name.
    pub(crate) fn visible(&self, caller: &Caller) -> Vec<(Facts, DomainRow)> {
        let rows = self.hypervisors.rows();
        let queries: Vec<_> = rows
            .iter()
            .map(|(facts, _)| caller.query(Verb::List, Subject::Domain(facts.into())))
            .collect();
        let verdicts = block_in_place(|| self.policy.decide_all(&queries));
        drop(queries);
        rows.into_iter()
            .zip(verdicts)
            .filter(|(_, verdict)| matches!(verdict, Verdict::Allow(_)))
            .map(|(row, _)| row)
            .collect()
    }

    /// Returns for each domain whether a caller may hear what happens to it. All is asked at once, as for a list.
    pub(crate) fn may_hear(&self, caller: &Caller, of: &[Facts]) -> Vec<bool> {
        if let Some(Verdict::Deny(_)) = self.may_act(caller) {
            return vec![false; of.len()];
        }
        let queries: Vec<_> = of
            .iter()
            .map(|facts| caller.query(Verb::Events, Subject::Domain(facts.into())))
            .collect();
        let verdicts = block_in_place(|| self.policy.decide_all(&queries));
        verdicts
            .iter()
            .map(|verdict| matches!(verdict, Verdict::Allow(_)))
            .collect()
    }

    /// Puts somebody else's rights in the place of a caller's, where configuration and policy let it act for them. Returns the rule as well.
    ///
    /// # Errors
    /// Why it may not, for the log.
    pub(crate) async fn act_for(
        &self,
        caller: &Caller,
        other: &Principal,
    ) -> Result<(Caller, String), String> {
        let proven = &caller.proven.principal;
        if other == proven {
            return Ok((caller.clone(), String::new()));
        }
        if !self.is_listed(proven) {
            return Err(unlisted(proven));
        }
        let acting = Caller {
            person: Arc::new(self.people.find(other).await),
            ..caller.clone()
        };
        match self.may_act(&acting) {
            Some(Verdict::Allow(grant)) => {
                let rule = grant.rule().to_owned();
                Ok((acting, rule))
            }
            Some(Verdict::Deny(reason)) => Err(reason.to_string()),
            None => Ok((acting, String::new())),
        }
    }

    /// Explains what a person may do to a subject that `named` stands for, asked from where the asker is.
    pub(crate) fn explain(
        &self,
        person: &Arc<Person>,
        action: Action,
        on: Subject<'_>,
        named: &str,
        asker: &Caller,
    ) -> Explanation {
        // Who acts for somebody is told what would come of that, not what would without him.
        let asked = if person.principal == asker.person.principal {
            asker.clone()
        } else {
            Caller {
                proven: Arc::clone(person),
                person: Arc::clone(person),
                ..asker.clone()
            }
        };
        let explained = block_in_place(|| self.policy.explain(&asked.query(action, on), named));
        if action != Action::ActFor || self.is_listed(&person.principal) {
            return explained;
        }
        let unlisted = ExplainStep {
            backend: "xmand.toml".to_owned(),
            opinion: "deny".to_owned(),
            because: unlisted(&person.principal),
            wants: Vec::new(),
        };
        Explanation {
            allowed: false,
            rule: unlisted.because.clone(),
            steps: vec![unlisted],
            ..explained
        }
    }

    /// Whether the configuration lets a principal act for others at all.
    fn is_listed(&self, principal: &Principal) -> bool {
        let listed = &self.config.authorization.act_for;
        listed.iter().any(|pattern| pattern.matches(principal))
    }

    /// Returns when a caller may not go on any more with what it was allowed, and why: rules, facts and leases change under it.
    pub(crate) async fn right_ends(
        &self,
        caller: &Caller,
        verb: Verb,
        judged: Option<&Facts>,
    ) -> Fault {
        loop {
            sleep(REVIEW).await;
            self.reread_policy();
            // Another hypervisor may have a domain of the same UUID.
            let now = judged.map(|facts| {
                let uuid = DomainRef::Uuid(facts.uuid);
                self.hypervisors.find(&uuid, Some(&facts.uri))
            });
            let on = match &now {
                None => Subject::Host,
                Some(None) => Subject::UnknownDomain,
                Some(Some(facts)) => Subject::Domain(facts.into()),
            };
            let Verdict::Allow(grant) = self.may(caller, verb, on) else {
                return Fault::denied();
            };
            match (judged, now) {
                // What is there under its name now may be a domain that the caller may not see.
                (Some(_), Some(None)) if !grant.administrator() => return Fault::denied(),
                // A log is a name's: somebody else's may go on under the old one.
                (Some(then), Some(Some(now))) if verb == Verb::Dmesg && then.name != now.name => {
                    return Fault::new(
                        Code::Conflict,
                        format!(
                            "'{}' is now called '{}', and its log with it",
                            then.name, now.name
                        ),
                    );
                }
                _ => {}
            }
        }
    }

    /// What a caller who may not is told of a domain that is not here or that he may not see, in the same words: that nothing is known of
    /// it while something is wrong, if he may ask at all, and else no more than that he may not.
    pub(crate) fn hidden(&self, caller: &Caller, trouble: Option<Fault>) -> Fault {
        let may_ask = || {
            let verdict = self.may(caller, Verb::List, Subject::Host);
            matches!(verdict, Verdict::Allow(_))
        };
        match trouble {
            Some(trouble) if may_ask() => trouble,
            Some(_) | None => Fault::denied(),
        }
    }

    /// Whether a caller may see a domain.
    pub(crate) fn sees(&self, caller: &Caller, facts: &Facts) -> bool {
        let verdict = self.may(caller, Verb::List, Subject::Domain(facts.into()));
        matches!(verdict, Verdict::Allow(_))
    }
}

fn unlisted(principal: &Principal) -> String {
    format!("authorization.act-for of xmand.toml does not name {principal}")
}

impl<'a> From<&'a Facts> for DomainFacts<'a> {
    fn from(facts: &'a Facts) -> Self {
        Self {
            uuid: facts.uuid,
            name: &facts.name,
            hypervisor: &facts.uri,
            state: facts.state,
            metadata: facts.metadata.as_ref().as_ref().map_err(String::as_str),
            lease: facts.lease.as_deref(),
            revision: facts.revision,
            stale: facts.stale,
        }
    }
}
