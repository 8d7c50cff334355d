//! The messages, one line of JSON each. Nothing here reads or writes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    time::Duration,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xman_common::name::{DomainName, LabelValue, Principal, Tag, is_deceptive};

use super::{MAX_LINE, Trouble};
use crate::{DomainFacts, Opinion, Query, Subject, UnixGroups};

/// The version of the protocol, in every message both ways.
pub(super) const VERSION: u32 = 1;
/// The longest rule's name that is taken, in bytes: it goes into every audit record.
pub(super) const MAX_RULE: usize = 128;
/// The longest reason that is taken, in bytes, for the same reason.
pub(super) const MAX_REASON: usize = 1024;

/// All that a question holds but its version and its number; so questions that look alike are one question.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Question<'a> {
    pub(super) principal: &'a str,
    pub(super) unix_groups: Option<&'a [String]>,
    pub(super) acting: Option<&'a Principal>,
    pub(super) address: IpAddr,
    pub(super) action: &'static str,
    pub(super) host: &'a str,
    pub(super) subject: About<'a>,
}

/// What the question is about.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub(super) enum About<'a> {
    Host,
    Domain(Facts<'a>),
    UnknownDomain,
    NewDomain {
        name: &'a DomainName,
        uuid: Option<Uuid>,
    },
    Person {
        principal: &'a Principal,
    },
}

#[derive(Clone, Debug, Serialize)]
pub(super) struct Facts<'a> {
    uuid: Uuid,
    name: &'a DomainName,
    hypervisor: &'a str,
    state: &'static str,
    owners: &'a BTreeSet<Principal>,
    class: Option<&'a Tag>,
    labels: &'a BTreeMap<Tag, LabelValue>,
    lease: Option<Holder<'a>>,
}

#[derive(Clone, Debug, Serialize)]
struct Holder<'a> {
    user: &'a Principal,
    job: &'a str,
}

impl<'a> Facts<'a> {
    fn new(facts: DomainFacts<'a>) -> Result<Self, Trouble> {
        let metadata = facts
            .metadata
            .map_err(|why| Trouble::Metadata(why.to_owned()))?;
        Ok(Self {
            uuid: facts.uuid,
            name: facts.name,
            hypervisor: facts.hypervisor,
            state: facts.state.name(),
            owners: &metadata.owners,
            class: metadata.class.as_ref(),
            labels: &metadata.labels,
            lease: facts.lease.map(|lease| Holder {
                user: &lease.user,
                job: &lease.job,
            }),
        })
    }
}

impl<'a> Question<'a> {
    /// Puts a query into words; what is not known is not asked about.
    pub(super) fn new(query: &Query<'a>, host: &'a str) -> Result<Self, Trouble> {
        let unix_groups = match &query.person.unix_groups {
            UnixGroups::Unasked => None,
            UnixGroups::Known(names) => Some(names.as_slice()),
            UnixGroups::Unknown(why) => return Err(Trouble::Groups(why.clone())),
        };
        let subject = match query.on {
            Subject::Host => About::Host,
            Subject::Domain(facts) => About::Domain(Facts::new(facts)?),
            Subject::UnknownDomain => About::UnknownDomain,
            Subject::NewDomain { name, uuid } => About::NewDomain { name, uuid },
            Subject::Person(person) => About::Person {
                principal: &person.principal,
            },
        };
        Ok(Self {
            principal: query.person.principal.as_str(),
            unix_groups,
            acting: query.acting,
            // an IPv4 caller of an IPv6 socket is an IPv4 caller
            address: query.peer.to_canonical(),
            action: query.action.name(),
            host,
            subject,
        })
    }

    /// Returns the question as it is asked, but for what [`line`] puts in front.
    pub(super) fn body(&self) -> Result<String, Trouble> {
        let mut body =
            serde_json::to_string(self).map_err(|error| Trouble::Unspeakable(error.to_string()))?;
        if body.len() > MAX_LINE - ROOM_FOR_HEAD {
            return Err(Trouble::LongQuestion(body.len()));
        }
        body.replace_range(..1, "");
        Ok(body)
    }
}

/// What [`line`] puts in front, with the highest number.
const ROOM_FOR_HEAD: usize = 64;

/// Returns one line: the body, headed by version and number.
pub(super) fn line(id: u64, body: &str) -> String {
    format!("{{\"xman\":{VERSION},\"id\":{id},{body}\n")
}

/// What the authority said to one question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) opinion: Opinion,
    /// For how long it may be said again without asking.
    pub(super) ttl: Duration,
    /// With no opinion: what would have to be true.
    pub(super) wants: Option<String>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Line {
    xman: u32,
    id: u64,
    opinion: Said,
    rule: Option<String>,
    reason: Option<String>,
    ttl_ms: Option<u64>,
}

#[derive(Deserialize)]
#[serde(rename_all = "lowercase")]
enum Said {
    Allow,
    Deny,
    None,
}

impl Answer {
    /// Reads a line; returns which question it answers, and how.
    pub(super) fn read(line: &[u8]) -> Result<(u64, Self), Trouble> {
        let garbage = |what: String| Err(Trouble::Garbage(what));
        // serde would take an array for the same structure
        if !line.trim_ascii_start().starts_with(b"{") {
            return garbage("not a JSON object".to_owned());
        }
        let line: Line =
            serde_json::from_slice(line).map_err(|error| Trouble::Garbage(error.to_string()))?;
        if line.xman != VERSION {
            return Err(Trouble::Version(line.xman));
        }
        if let Some(rule) = &line.rule
            && !is_rule(rule)
        {
            return garbage(format!(
                "a rule's name has 1 to {MAX_RULE} printable ASCII characters"
            ));
        }
        if let Some(reason) = &line.reason
            && !is_reason(reason)
        {
            return garbage(format!(
                "a reason is one line of at most {MAX_REASON} bytes"
            ));
        }
        let mut wants = None;
        let opinion = match (line.opinion, line.rule, line.reason) {
            (Said::Allow, Some(rule), _) => Opinion::Allow {
                rule: format!("external:{rule}"),
                administrator: false,
            },
            (Said::Allow, None, _) => return garbage("\"allow\" without its rule".to_owned()),
            (Said::Deny, rule, reason) => Opinion::Deny {
                reason: match (rule, reason) {
                    (Some(rule), Some(reason)) => format!("{rule}: {reason}"),
                    (Some(text), None) | (None, Some(text)) => text,
                    (None, None) => "the authority denies it and says no more".to_owned(),
                },
            },
            (Said::None, _, reason) => {
                wants = reason;
                Opinion::None
            }
        };
        let answer = Self {
            opinion,
            ttl: Duration::from_millis(line.ttl_ms.unwrap_or(0)),
            wants,
        };
        Ok((line.id, answer))
    }
}

fn is_rule(text: &str) -> bool {
    (1..=MAX_RULE).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}

fn is_reason(text: &str) -> bool {
    text.len() <= MAX_REASON && !text.chars().any(|c| c.is_control() || is_deceptive(c))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(line: impl AsRef<[u8]>) -> Result<(u64, Answer), Trouble> {
        Answer::read(line.as_ref())
    }

    #[test]
    fn answers_are_read_as_they_are_documented() {
        let allow = read(
            r#"{"xman":1,"id":7,"opinion":"allow","rule":"owners use","reason":"hers","ttl_ms":5}"#,
        );
        assert_eq!(
            allow,
            Ok((
                7,
                Answer {
                    opinion: Opinion::Allow {
                        rule: "external:owners use".to_owned(),
                        administrator: false
                    },
                    ttl: Duration::from_millis(5),
                    wants: None,
                }
            ))
        );
        let (id, none) =
            read(" {\"reason\":\"write to bob\",\"opinion\":\"none\",\"id\":8,\"xman\":1}\r")
                .unwrap();
        assert_eq!((id, none.ttl), (8, Duration::ZERO));
        assert_eq!(
            (none.opinion, none.wants.as_deref()),
            (Opinion::None, Some("write to bob"))
        );
        for (members, expected) in [
            (
                r#","rule":"night","reason":"come by day""#,
                "night: come by day",
            ),
            (r#","rule":"night""#, "night"),
            (r#","reason":"come by day""#, "come by day"),
            ("", "the authority denies it and says no more"),
        ] {
            let (_, deny) =
                read(format!(r#"{{"xman":1,"id":9,"opinion":"deny"{members}}}"#)).unwrap();
            assert_eq!(
                deny.opinion,
                Opinion::Deny {
                    reason: expected.to_owned()
                }
            );
        }
    }

    #[test]
    fn whatever_is_not_exactly_an_answer_is_garbage() {
        let long_rule = format!(
            r#"{{"xman":1,"id":1,"opinion":"allow","rule":"{}"}}"#,
            "r".repeat(MAX_RULE + 1)
        );
        let long_reason = format!(
            r#"{{"xman":1,"id":1,"opinion":"deny","reason":"{}"}}"#,
            "r".repeat(MAX_REASON + 1)
        );
        for line in [
            "",
            " ",
            "allow",
            "null",
            "{}",
            "[]",
            r#"[1,1,"allow","r",null,null]"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r"} {}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r""#,
            r#"{"xman":1,"id":1,"opinion":"allow"}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":null}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":""}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":7}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"a\nb"}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"\u202e"}"#,
            r#"{"xman":1,"id":1,"opinion":"deny","reason":"a\nb"}"#,
            r#"{"xman":1,"id":1,"opinion":"deny","reason":"\u202e"}"#,
            r#"{"xman":1,"id":1,"opinion":"Allow","rule":"r"}"#,
            r#"{"xman":1,"id":1,"opinion":"yes","rule":"r"}"#,
            r#"{"xman":1,"id":1,"opinion":true,"rule":"r"}"#,
            r#"{"xman":1,"id":1,"rule":"r"}"#,
            r#"{"xman":1,"opinion":"allow","rule":"r"}"#,
            r#"{"id":1,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":2,"id":1,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":"1","id":1,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":"1","opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":1.0,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":-1,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":18446744073709551616,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":1,"id":1,"opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":1,"opinion":"deny","opinion":"allow","rule":"r"}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r","administrator":true}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r","ttl_ms":-1}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r","ttl_ms":"1"}"#,
            r#"{"xman":1,"id":1,"opinion":"allow","rule":"r","ttl":1}"#,
            long_rule.as_str(),
            long_reason.as_str(),
        ] {
            assert!(read(line).is_err(), "{line}");
        }
        assert!(read(b"{\"xman\":1,\"id\":1,\"opinion\":\"deny\",\"reason\":\"\xff\"}").is_err());
    }
}
