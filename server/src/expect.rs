//! `xmand policy test`: a site's table of expected decisions, held against the rules that are configured.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt, fs, io,
    net::{IpAddr, Ipv4Addr},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Deserializer, de::Error as _};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, LabelValue, Principal, Tag},
    protocol::{DomainState, Metadata},
};
use xman_policy::{Action, Chain, DomainFacts, Lease, Person, Query, Subject, UnixGroups};

/// Why a table cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TableError {
    /// No file to read.
    #[error("{}: {source}", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// Not TOML, or keys and values that mean nothing here.
    #[error("{}: {source}", path.display())]
    Malformed {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    /// Nothing in it: a test that tests nothing would pass for ever.
    #[error("{} expects nothing; write [[expect]] tables into it", .0.display())]
    Empty(PathBuf),
    /// An entry about two things at once.
    #[error("{}: entry {number} is about more than one of domain, new-domain, unknown-domain and person", path.display())]
    Ambiguous { path: PathBuf, number: usize },
}

/// What a site expects.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Table {
    #[serde(default)]
    expect: Vec<Expectation>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Expectation {
    principal: Principal,
    /// Of the principal's local account; the name service is not asked.
    unix_groups: Option<Vec<String>>,
    acting: Option<Principal>,
    address: Option<IpAddr>,
    #[serde(deserialize_with = "action")]
    action: Action,
    domain: Option<Domain>,
    new_domain: Option<NewDomain>,
    #[serde(default)]
    unknown_domain: bool,
    person: Option<Principal>,
    decision: Decision,
    /// The rule that must be behind an allow.
    rule: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Decision {
    Allow,
    Deny,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Domain {
    name: DomainName,
    uuid: Option<Uuid>,
    hypervisor: Option<String>,
    #[serde(default, deserialize_with = "state")]
    state: Option<DomainState>,
    #[serde(default)]
    owners: BTreeSet<Principal>,
    class: Option<Tag>,
    #[serde(default)]
    labels: BTreeMap<Tag, LabelValue>,
    lease: Option<LeaseOf>,
    #[serde(default)]
    stale: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct NewDomain {
    name: DomainName,
    uuid: Option<Uuid>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct LeaseOf {
    user: Principal,
    #[serde(default)]
    job: String,
}

fn action<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Action, D::Error> {
    String::deserialize(deserializer)?
        .parse()
        .map_err(D::Error::custom)
}

fn state<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<DomainState>, D::Error> {
    let text = String::deserialize(deserializer)?;
    let known = DomainState::ALL.iter().find(|state| state.name() == text);
    known
        .copied()
        .map(Some)
        .ok_or_else(|| D::Error::custom(format!("there is no state '{text}'")))
}

/// How one entry came out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The question.
    question: String,
    /// The rule or reason; where it is not what was expected, what was.
    came_out: Result<String, String>,
}

impl Finding {
    /// Whether it came out as expected.
    pub(crate) fn is_well(&self) -> bool {
        self.came_out.is_ok()
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.came_out {
            Ok(rule) => write!(f, "ok    {}: {rule}", self.question),
            Err(wrong) => write!(f, "WRONG {}: {wrong}", self.question),
        }
    }
}

impl Table {
    /// Reads a table.
    ///
    /// # Errors
    /// What is wrong with it, and where.
    pub(crate) fn read(path: &Path) -> Result<Self, TableError> {
        let text = fs::read_to_string(path).map_err(|source| TableError::Unreadable {
            path: path.into(),
            source,
        })?;
        let table: Self = toml::from_str(&text).map_err(|source| TableError::Malformed {
            path: path.into(),
            source: Box::new(source),
        })?;
        if table.expect.is_empty() {
            return Err(TableError::Empty(path.into()));
        }
        match table.expect.iter().position(Expectation::is_ambiguous) {
            Some(at) => Err(TableError::Ambiguous {
                path: path.into(),
                number: at + 1,
            }),
            None => Ok(table),
        }
    }

    /// Asks everything. With `unix_groups` who is said to be in none is in none, as on a host that looks them up.
    pub(crate) fn hold_against(&self, chain: &Chain, unix_groups: bool) -> Vec<Finding> {
        self.expect
            .iter()
            .map(|expectation| expectation.hold_against(chain, unix_groups))
            .collect()
    }
}

impl Expectation {
    fn is_ambiguous(&self) -> bool {
        let named = [
            self.domain.is_some(),
            self.new_domain.is_some(),
            self.unknown_domain,
            self.person.is_some(),
        ];
        named.into_iter().filter(|named| *named).count() > 1
    }

    fn hold_against(&self, chain: &Chain, unix_groups: bool) -> Finding {
        let person = |principal: &Principal, groups: &Option<Vec<String>>| Person {
            principal: principal.clone(),
            unix_groups: match groups {
                Some(groups) => UnixGroups::Known(groups.clone()),
                None if unix_groups => UnixGroups::Known(Vec::new()),
                None => UnixGroups::Unasked,
            },
        };
        let asked = person(&self.principal, &self.unix_groups);
        let other = self.person.as_ref().map(|other| person(other, &None));
        let metadata = self
            .domain
            .as_ref()
            .map(Domain::metadata)
            .unwrap_or_default();
        let lease = self.domain.as_ref().and_then(Domain::lease);
        let on = match (&self.domain, &self.new_domain, &other) {
            (Some(domain), _, _) => Subject::Domain(domain.facts(&metadata, lease.as_ref())),
            (None, Some(new), _) => Subject::NewDomain {
                name: &new.name,
                uuid: new.uuid,
            },
            (None, None, Some(other)) => Subject::Person(other),
            (None, None, None) if self.unknown_domain => Subject::UnknownDomain,
            (None, None, None) => Subject::Host,
        };
        let named = self.named();
        let explanation = chain.explain(
            &Query {
                person: &asked,
                action: self.action,
                on,
                peer: self.address.unwrap_or(Ipv4Addr::LOCALHOST.into()),
                acting: self.acting.as_ref(),
            },
            &named,
        );
        let decision = if explanation.allowed {
            Decision::Allow
        } else {
            Decision::Deny
        };
        let rule = explanation.rule;
        let came_out = match &self.rule {
            _ if decision != self.decision && explanation.allowed => {
                Err(format!("should be denied, and is allowed by {rule}"))
            }
            _ if decision != self.decision => Err(format!("should be allowed, and is not: {rule}")),
            Some(wanted) if *wanted != rule => {
                Err(format!("should be decided by {wanted}, and is by {rule}"))
            }
            Some(_) | None => Ok(rule),
        };
        Finding {
            question: format!("{} {} {named}", self.principal, self.action),
            came_out,
        }
    }

    fn named(&self) -> String {
        match (&self.domain, &self.new_domain, &self.person) {
            (Some(domain), _, _) => domain.name.to_string(),
            (None, Some(new), _) => format!("{} (new)", new.name),
            (None, None, Some(person)) => person.to_string(),
            (None, None, None) if self.unknown_domain => "(an unknown domain)".to_owned(),
            (None, None, None) => "(the host)".to_owned(),
        }
    }
}

impl Domain {
    fn metadata(&self) -> Metadata {
        Metadata {
            owners: self.owners.clone(),
            class: self.class.clone(),
            labels: self.labels.clone(),
        }
    }

    fn lease(&self) -> Option<Lease> {
        let lease = self.lease.as_ref()?;
        Some(Lease {
            user: lease.user.clone(),
            job: lease.job.clone(),
        })
    }

    fn facts<'a>(&'a self, metadata: &'a Metadata, lease: Option<&'a Lease>) -> DomainFacts<'a> {
        DomainFacts {
            uuid: self.uuid.unwrap_or_else(Uuid::new_v4),
            name: &self.name,
            hypervisor: self.hypervisor.as_deref().unwrap_or("qemu:///system"),
            state: self.state.unwrap_or(DomainState::Running),
            metadata: Ok(metadata),
            lease,
            revision: 1,
            stale: self.stale,
        }
    }
}
