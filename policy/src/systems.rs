//! Who speaks for a batch system: the principals that the configuration names for it, and each node's own key for that node's domain.
//!
//! It is the first backend of a chain that has one, and has an opinion only on what batch systems need: to begin and end leases, to hold domains
//! back and let them go, and to see them; and, for the principals of a system, to start, shut down and switch off its domains.

use std::str::FromStr;

use glob::Pattern;
use xman_common::{
    name::{BadName, DomainName, Principal, Tag},
    protocol::Verb,
};

use crate::{
    Action, Authorizer, Opinion, Query, Reload, Subject,
    groups::{BadPattern, PrincipalPattern},
};

const PLACE: &str = "{domain}";

/// A batch system, as the configuration has it.
#[derive(Clone, Debug)]
pub struct System {
    /// Its name.
    pub name: Tag,
    /// Who speaks for it, on all its domains.
    pub principals: Vec<PrincipalPattern>,
    /// The keys of nodes, each of which speaks for its own domain.
    pub nodes: Vec<NodePattern>,
    /// The names of the domains that it may touch.
    pub domains: Vec<Pattern>,
}

impl System {
    fn has(&self, domain: &DomainName) -> bool {
        self.domains
            .iter()
            .any(|pattern| pattern.matches(domain.as_str()))
    }

    fn names(&self, principal: &Principal) -> bool {
        self.principals
            .iter()
            .any(|pattern| pattern.matches(principal))
    }

    fn is_node(&self, principal: &Principal, domain: &DomainName) -> bool {
        self.nodes
            .iter()
            .any(|node| node.domain(principal).as_ref() == Some(domain))
    }

    fn speaks(&self, principal: &Principal, domain: &DomainName) -> bool {
        self.has(domain) && (self.names(principal) || self.is_node(principal, domain))
    }

    fn lists(&self, principal: &Principal) -> bool {
        let mut nodes = self.nodes.iter();
        self.names(principal)
            || nodes.any(|node| {
                let domain = node.domain(principal);
                domain.is_some_and(|domain| self.has(&domain))
            })
    }
}

/// The principals of nodes, with `{domain}` in the place of the node's domain: `host/{domain}.example.org@EXAMPLE.ORG`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodePattern {
    before: String,
    after: String,
}

impl NodePattern {
    /// Returns the domain of which a principal is the node.
    fn domain(&self, principal: &Principal) -> Option<DomainName> {
        let rest = principal.as_str().strip_prefix(self.before.as_str())?;
        rest.strip_suffix(self.after.as_str())?.parse().ok()
    }
}

impl FromStr for NodePattern {
    type Err = BadNodePattern;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some((before, after)) = text.split_once(PLACE) else {
            return Err(BadNodePattern::Everybody(text.to_owned()));
        };
        if after.contains(PLACE) || text.contains('*') {
            return Err(BadNodePattern::Vague(text.to_owned()));
        }
        // With any name in its place it is a principal, of a realm that no name can change.
        text.replace(PLACE, "x").parse::<Principal>()?;
        if !after.contains('@') {
            return Err(BadNodePattern::Vague(text.to_owned()));
        }
        Ok(Self {
            before: before.to_owned(),
            after: after.to_owned(),
        })
    }
}

/// Why a text is no pattern of nodes' principals.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadNodePattern {
    /// Every node would speak for each domain.
    #[error("'{0}' lacks {{domain}}, which stands for the node's own domain")]
    Everybody(String),
    /// More than one place, or one in the realm.
    #[error("'{0}' can hold {{domain}} once, before the realm, and no '*'")]
    Vague(String),
    /// No principal.
    #[error(transparent)]
    Name(#[from] BadName),
    /// No principal.
    #[error(transparent)]
    Pattern(#[from] BadPattern),
}

/// The configured batch systems.
#[derive(Clone, Debug, Default)]
pub struct Systems(Vec<System>);

impl Systems {
    /// Takes them as the configuration has them.
    pub fn new(systems: Vec<System>) -> Self {
        Self(systems)
    }

    /// Returns whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns whether a principal's word on a system's job in a domain counts. Who is named for one system speaks for no other, whatever else
    /// it may do here; who is named for none needs a rule that lets him.
    pub fn hears(&self, principal: &Principal, system: &Tag, domain: &DomainName) -> bool {
        !self.is_listed(principal) || self.speaks(principal, system, domain)
    }

    /// Returns whether a principal is named for a system and a domain.
    pub fn speaks(&self, principal: &Principal, system: &Tag, domain: &DomainName) -> bool {
        let mut systems = self.0.iter();
        systems.any(|known| known.name == *system && known.speaks(principal, domain))
    }

    /// Returns whether a principal's word on all of a system's jobs counts: a node's does not.
    pub fn hears_all(&self, principal: &Principal, system: &Tag) -> bool {
        !self.is_listed(principal)
            || self
                .0
                .iter()
                .any(|known| known.name == *system && known.names(principal))
    }

    /// Returns whether a principal is named for any system.
    fn is_listed(&self, principal: &Principal) -> bool {
        self.0.iter().any(|system| system.lists(principal))
    }
}

impl Authorizer for Systems {
    fn name(&self) -> &'static str {
        "systems"
    }

    fn judge(&self, query: &Query<'_>) -> Opinion {
        let Action::Verb(verb) = query.action else {
            return Opinion::None;
        };
        let principal = &query.person.principal;
        let found = match query.on {
            Subject::Host if is_for_all(verb) || verb == Verb::LeaseEnd => {
                self.0.iter().find(|system| system.lists(principal))
            }
            Subject::Host if verb == Verb::Reconcile => {
                self.0.iter().find(|system| system.names(principal))
            }
            Subject::Domain(facts) if is_for_all(verb) || holds(verb) => self
                .0
                .iter()
                .find(|system| system.speaks(principal, facts.name)),
            Subject::Domain(facts) if switches(verb) => self
                .0
                .iter()
                .find(|system| system.has(facts.name) && system.names(principal)),
            Subject::Host
            | Subject::Domain(_)
            | Subject::UnknownDomain
            | Subject::NewDomain { .. }
            | Subject::Person(_) => None,
        };
        found.map_or(Opinion::None, |system| Opinion::Allow {
            rule: format!("xmand.toml:schedule.system.{}", system.name),
            administrator: false,
        })
    }

    fn wants(&self, query: &Query<'_>) -> Vec<String> {
        match query.action {
            Action::Verb(verb) if holds(verb) || verb == Verb::LeaseEnd => vec![
                "the principal is named in `schedule.system` of xmand.toml, for a system that may touch the domain".to_owned(),
            ],
            Action::Verb(_) | Action::Own | Action::ActFor => Vec::new(),
        }
    }

    fn refresh(&self) -> Option<Reload> {
        None
    }
}

/// What shows no more than whoever asks may see.
fn is_for_all(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::Whoami | Verb::List | Verb::Status | Verb::LeaseList | Verb::Events
    )
}

fn holds(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::LeaseBegin | Verb::Preempt | Verb::Resume | Verb::Freeze | Verb::Thaw
    )
}

fn switches(verb: Verb) -> bool {
    matches!(verb, Verb::Start | Verb::Shutdown | Verb::Destroy)
}

#[cfg(test)]
mod tests {
    use std::net::{IpAddr, Ipv4Addr};

    use uuid::Uuid;
    use xman_common::protocol::{DomainState, Metadata};

    use super::*;
    use crate::{DomainFacts, Person, UnixGroups};

    fn systems() -> Systems {
        let system = |name: &str, principal: &str, domains: &str| System {
            name: name.parse().unwrap(),
            principals: vec![principal.parse().unwrap()],
            nodes: vec![
                format!("{name}host/{{domain}}.ex.org@EX.ORG")
                    .parse()
                    .unwrap(),
            ],
            domains: vec![Pattern::new(domains).unwrap()],
        };
        Systems::new(vec![
            system("slurm", "slurm/*@EX.ORG", "grid-*"),
            system("pbs", "pbs/*@EX.ORG", "pbs-*"),
        ])
    }

    #[track_caller]
    fn check(principal: &str, verb: Verb, domain: Option<&str>, expected: bool) {
        let person = Person {
            principal: principal.parse().unwrap(),
            unix_groups: UnixGroups::Unasked,
        };
        let name: Option<DomainName> = domain.map(|name| name.parse().unwrap());
        let metadata = Metadata::default();
        let on = match &name {
            None => Subject::Host,
            Some(name) => Subject::Domain(DomainFacts {
                uuid: Uuid::nil(),
                name,
                hypervisor: "test:///default",
                state: DomainState::Running,
                metadata: Ok(&metadata),
                lease: None,
                revision: 1,
                stale: false,
            }),
        };
        let opinion = systems().judge(&Query {
            person: &person,
            acting: None,
            action: Action::Verb(verb),
            on,
            peer: IpAddr::V4(Ipv4Addr::LOCALHOST),
        });
        let allowed = matches!(opinion, Opinion::Allow { .. });
        assert_eq!(allowed, expected, "{principal} {verb} {domain:?}");
    }

    #[test]
    fn a_system_touches_its_own_domains_and_a_node_its_own() {
        let slurm = "slurm/ctl@EX.ORG";
        check(slurm, Verb::LeaseBegin, Some("grid-1"), true);
        check(slurm, Verb::LeaseBegin, Some("pbs-1"), false);
        check(slurm, Verb::LeaseBegin, Some("web"), false);
        check(
            "slurm/ctl@OTHER.ORG",
            Verb::LeaseBegin,
            Some("grid-1"),
            false,
        );
        check(slurm, Verb::Reconcile, None, true);
        check(slurm, Verb::LeaseEnd, None, true);
        check(slurm, Verb::Start, Some("grid-1"), true);
        check(slurm, Verb::Destroy, Some("grid-1"), true);
        check(slurm, Verb::Undefine, Some("grid-1"), false);
        check(slurm, Verb::Console, Some("grid-1"), false);
        check(slurm, Verb::Define, None, false);
        let node = "slurmhost/grid-1.ex.org@EX.ORG";
        check(node, Verb::LeaseBegin, Some("grid-1"), true);
        check(node, Verb::LeaseBegin, Some("grid-2"), false);
        check(node, Verb::Preempt, Some("grid-1"), true);
        check(node, Verb::LeaseEnd, None, true);
        check(node, Verb::Reconcile, None, false);
        check(node, Verb::Start, Some("grid-1"), false);
        check(
            "slurmhost/web.ex.org@EX.ORG",
            Verb::LeaseBegin,
            Some("web"),
            false,
        );
        check("slurmhost/web.ex.org@EX.ORG", Verb::LeaseEnd, None, false);
    }

    #[test]
    fn nobody_speaks_for_anothers_system() {
        let hears = |principal: &str, system: &str, domain: &str| {
            systems().hears(
                &principal.parse().unwrap(),
                &system.parse().unwrap(),
                &domain.parse().unwrap(),
            )
        };
        assert!(hears("slurm/ctl@EX.ORG", "slurm", "grid-1"));
        assert!(!hears("slurm/ctl@EX.ORG", "pbs", "grid-1"));
        assert!(!hears("slurm/ctl@EX.ORG", "pbs", "pbs-1"));
        assert!(!hears("slurmhost/grid-1.ex.org@EX.ORG", "slurm", "grid-2"));
        assert!(hears("alice@EX.ORG", "pbs", "pbs-1"), "a rule let her");
        assert!(systems().hears_all(&"pbs/x@EX.ORG".parse().unwrap(), &"pbs".parse().unwrap()));
        let node = "slurmhost/grid-1.ex.org@EX.ORG".parse().unwrap();
        assert!(!systems().hears_all(&node, &"slurm".parse().unwrap()));
    }

    #[test]
    fn a_pattern_of_nodes_leaves_nothing_open_but_the_domain() {
        for bad in [
            "host/node@EX.ORG",
            "host/{domain}@{domain}",
            "host/x@{domain}.ORG",
            "{domain}/{domain}@EX.ORG",
            "*/{domain}@EX.ORG",
            "host/{domain}",
            "",
        ] {
            assert!(bad.parse::<NodePattern>().is_err(), "{bad}");
        }
        let pattern: NodePattern = "host/{domain}.ex.org@EX.ORG".parse().unwrap();
        let domain = |principal: &str| {
            pattern
                .domain(&principal.parse().unwrap())
                .map(|domain| domain.to_string())
        };
        assert_eq!(domain("host/a.ex.org@EX.ORG").as_deref(), Some("a"));
        assert_eq!(domain("host/a.b.ex.org@EX.ORG").as_deref(), Some("a.b"));
        assert_eq!(domain("host/.ex.org@EX.ORG"), None);
        assert_eq!(domain("host/a.ex.org@OTHER.ORG"), None);
        assert_eq!(domain("host/a\\/x/b.ex.org@EX.ORG"), None);
    }
}
