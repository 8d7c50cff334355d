//! Answers from memory, as far as who asks may see them: who am I, the domains, the host, the hypervisor's messages, why may I.

use std::{iter::Peekable, path::PathBuf, sync::Arc};

use glob::Pattern;
use tokio::sync::mpsc;
use uuid::Uuid;
use xman_common::{
    codec,
    name::DomainName,
    protocol::{
        About, Code, Dmesg, DomainRow, Fault, HostInfo, HypervisorTrouble, Identity, Item, List,
        Reply, Verb,
    },
};
use xman_policy::{Action, Grant, Person, Subject, UnixGroups, UnknownAction};

use crate::{
    caller::{Outcome, Piece},
    clock::seconds,
    dmesg,
    hypervisor::{Ailing, Facts},
    meant::{Meant, ambiguous},
    schedule,
    work::Work,
};

/// Rows in one frame: with the longest names they still fit it.
pub(crate) const ROWS_A_FRAME: usize = 100;
/// Bytes of domains' rows in one frame, which their owners and labels could make longer than it can be.
const ROW_BYTES_A_FRAME: usize = 64 * 1024;
/// Domains that `whoami` looks at to tell what may be done to some of them.
const LOOKED_AT: usize = 50;
/// Pieces of a log that wait for the connection.
const LOG_AHEAD: usize = 16;

/// Tells what the caller may do on the host, on any domain that it does not own, or on one of those it sees.
pub(crate) fn whoami(grant: &Grant, work: &Work) -> Identity {
    let (host, caller) = (&work.host, &work.caller);
    let mut verbs = host.may_some(caller, Verb::ALL, &[Subject::Host, Subject::UnknownDomain]);
    let others: Vec<Verb> = Verb::ALL
        .iter()
        .copied()
        .filter(|verb| !verbs.contains(verb))
        .collect();
    if !others.is_empty() {
        let seen = host.visible(caller);
        let some: Vec<_> = seen
            .iter()
            .take(LOOKED_AT)
            .map(|(facts, _)| Subject::Domain(facts.into()))
            .collect();
        verbs.extend(host.may_some(caller, &others, &some));
        verbs.sort();
    }
    Identity {
        principal: caller.person.principal.clone(),
        until: seconds(caller.until),
        verbs: verbs.iter().map(ToString::to_string).collect(),
        rule: grant.rule().to_owned(),
        groups: match &caller.person.unix_groups {
            UnixGroups::Known(groups) => groups.clone(),
            UnixGroups::Unasked | UnixGroups::Unknown(_) => Vec::new(),
        },
        acting: caller.acting().cloned(),
        session: caller.session.clone(),
    }
}

/// What is said of the host; of its domains only those count that the caller may see.
pub(crate) fn info(grant: &Grant, work: &Work) -> HostInfo {
    let info = work.host.hypervisors.info();
    if grant.administrator() {
        return info;
    }
    let seen = work.host.visible(&work.caller);
    let active = || {
        seen.iter()
            .map(|(_, row)| row)
            .filter(|row| row.state.is_active())
    };
    HostInfo {
        domains: count(seen.len()),
        active: count(active().count()),
        used_vcpus: active().fold(0, |sum, row| sum.saturating_add(row.vcpus)),
        used_memory_kib: active().fold(0, |sum, row| sum.saturating_add(row.memory_kib)),
        ..info
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

/// Sends the domains that are known, and which hypervisors are not well: one that is broken hides nothing of the others.
pub(crate) async fn send_rows(list: &List, work: &Work) -> Outcome {
    let named = Named::new(&list.patterns)?;
    let hypervisor = work.hypervisor.as_deref();
    let ailing = work.host.hypervisors.ailing(hypervisor);
    // An empty answer would be taken for a host without domains.
    let unread = ailing.iter().filter(|ailing| ailing.unread);
    if let (Some(first), true) = (
        ailing.first(),
        unread.count() == work.host.hypervisors.count(hypervisor),
    ) {
        return Err(Fault::new(
            Code::Unavailable,
            format!(
                "nothing is known of the domains yet: {}: {}",
                first.uri, first.why
            ),
        ));
    }
    let troubles = ailing.into_iter().map(|Ailing { uri, why, .. }| {
        let hypervisor = uri.to_string();
        Item::Trouble(HypervisorTrouble { hypervisor, why })
    });
    for trouble in troubles {
        work.send(Piece::Items(vec![trouble])).await?;
    }
    let mut rows: Vec<DomainRow> = work
        .host
        .visible(&work.caller)
        .into_iter()
        .map(|(_, row)| row)
        .filter(|row| {
            hypervisor.is_none_or(|uri| *uri == row.hypervisor)
                && named.takes(&row.name, row.uuid)
                && (list.states.is_empty() || list.states.contains(&row.state))
        })
        .collect();
    schedule::mark(&work.host, rows.iter_mut());
    let mut rows = rows.into_iter().peekable();
    while rows.peek().is_some() {
        let frame = next_frame(&mut rows).into_iter().map(Item::Domain);
        work.send(Piece::Items(frame.collect())).await?;
    }
    Ok(Reply::Done)
}

/// Takes as many rows as one frame holds, and at least one.
fn next_frame(rows: &mut Peekable<impl Iterator<Item = DomainRow>>) -> Vec<DomainRow> {
    let mut frame = Vec::new();
    let mut bytes = 0;
    while let Some(row) = rows.next_if(|row| {
        bytes += codec::encode(row).map_or(0, |encoded| encoded.len());
        frame.is_empty() || (frame.len() < ROWS_A_FRAME && bytes <= ROW_BYTES_A_FRAME)
    }) {
        frame.push(row);
    }
    frame
}

/// The domains that somebody named, by pattern or UUID; all where none is named.
pub(crate) struct Named {
    patterns: Vec<Pattern>,
    uuids: Vec<Uuid>,
}

impl Named {
    /// Reads patterns and UUIDs.
    ///
    /// # Errors
    /// `BadRequest` for what is neither.
    pub(crate) fn new(texts: &[String]) -> Result<Self, Fault> {
        let mut named = Self {
            patterns: Vec::new(),
            uuids: Vec::new(),
        };
        for text in texts {
            match Uuid::try_parse(text) {
                Ok(uuid) => named.uuids.push(uuid),
                Err(_) => named.patterns.push(Pattern::new(text).map_err(|error| {
                    Fault::new(Code::BadRequest, format!("'{text}' is no pattern: {error}"))
                })?),
            }
        }
        Ok(named)
    }

    /// Returns whether a domain is among them.
    pub(crate) fn takes(&self, name: &DomainName, uuid: Uuid) -> bool {
        let names_all = self.patterns.is_empty() && self.uuids.is_empty();
        let mut patterns = self.patterns.iter();
        names_all || self.uuids.contains(&uuid) || patterns.any(|it| it.matches(name.as_str()))
    }
}

pub(crate) async fn messages(asked: &Dmesg, work: &Work) -> Outcome {
    let follow = asked.follow;
    let (pieces, mut incoming) = mpsc::channel::<Result<String, Fault>>(LOG_AHEAD);
    // Owns the receiver: when the caller is gone the reader has nobody to read for, and ends.
    let sending = async move {
        while let Some(piece) = incoming.recv().await {
            let piece = piece?;
            work.send_text(&piece).await?;
        }
        Ok(Reply::Done)
    };
    let hypervisor = work
        .hypervisor
        .as_ref()
        .or(work.host.config.hypervisors.first());
    let ((), sent) = match &work.facts {
        Some(facts) => tokio::join!(dmesg::file(log_file(facts, work)?, pieces, follow), sending),
        None if hypervisor.is_some_and(|uri| uri.starts_with("xen")) => {
            tokio::join!(dmesg::xen(pieces, follow), sending)
        }
        None => tokio::join!(dmesg::kernel(pieces, follow), sending),
    };
    sent
}

fn log_file(facts: &Facts, work: &Work) -> Result<PathBuf, Fault> {
    work.host.hypervisors.log_file(facts).ok_or_else(|| {
        Fault::new(
            Code::Unsupported,
            format!(
                "the hypervisor of '{}' keeps no log of its own for it",
                facts.name
            ),
        )
    })
}

/// Explains what somebody may do, as far as who asks may see the domain.
pub(crate) async fn explained(
    action: &str,
    about: &About,
    person: Arc<Person>,
    work: &Work,
) -> Outcome {
    let action: Action = action
        .parse()
        .map_err(|error: UnknownAction| Fault::new(Code::BadRequest, error.to_string()))?;
    let host = &work.host;
    let (mut facts, mut other) = (None, None);
    match about {
        About::Host => {}
        About::Domain(domain) => {
            let candidates = host
                .hypervisors
                .candidates(domain, work.hypervisor.as_deref());
            facts = match host.meant(&work.caller, candidates) {
                Meant::Nothing => None,
                Meant::One(one) => Some(one).filter(|facts| host.sees(&work.caller, facts)),
                Meant::Several(several) => return Err(ambiguous(domain, &several)),
            };
        }
        About::Person(principal) => other = Some(host.people.find(principal).await),
    }
    let on = match (&facts, &other) {
        (Some(facts), _) => Subject::Domain(facts.into()),
        (None, Some(other)) => Subject::Person(other),
        (None, None) if *about == About::Host && action.is_about_the_host() => Subject::Host,
        (None, None) => Subject::UnknownDomain,
    };
    if (action == Action::ActFor) != other.is_some() {
        return Err(Fault::new(
            Code::BadRequest,
            "act-for is about a person, and everything else about a domain or the host",
        ));
    }
    let explanation = host.explain(&person, action, on, &about.to_string(), &work.caller);
    Ok(Reply::Explained(explanation))
}

#[cfg(test)]
mod tests {
    use xman_common::{
        protocol::{DomainState, MAX_METADATA, Metadata},
        wire::MAX_SEALED,
    };

    use super::*;

    #[test]
    fn rows_fit_their_frames_whatever_labels_they_have() {
        let heavy = Metadata {
            labels: (0..MAX_METADATA / 4)
                .map(|n| (format!("{n:03x}").parse().unwrap(), "x".parse().unwrap()))
                .collect(),
            ..Metadata::default()
        };
        assert_eq!(heavy.size(), MAX_METADATA);
        let row = |n: u128| DomainRow {
            name: format!("grid-{n}").parse().unwrap(),
            uuid: Uuid::from_u128(n),
            hypervisor: "qemu:///system".to_owned(),
            id: None,
            state: DomainState::Off,
            reason: String::new(),
            memory_kib: 0,
            max_memory_kib: 0,
            vcpus: 1,
            max_vcpus: 1,
            cpu_time_ns: 0,
            autostart: false,
            persistent: true,
            saved: false,
            since_ms: None,
            standing: None,
            preempted_ms: 0,
            metadata: if n.is_multiple_of(2) {
                heavy.clone()
            } else {
                Metadata::default()
            },
            metadata_trouble: String::new(),
            age_ms: 0,
            stale: false,
        };
        let mut rows = (0..500).map(row).peekable();
        let mut seen = 0;
        while rows.peek().is_some() {
            let frame = next_frame(&mut rows);
            seen += frame.len();
            assert!((1..=ROWS_A_FRAME).contains(&frame.len()));
            let items = frame.into_iter().map(Item::Domain).collect::<Vec<_>>();
            assert!(codec::encode(&items).unwrap().len() < MAX_SEALED / 2 + 1024);
        }
        assert_eq!(seen, 500);
        let mut light = (0..250).map(|n| row(2 * n + 1)).peekable();
        assert_eq!(next_frame(&mut light).len(), ROWS_A_FRAME);
    }
}
