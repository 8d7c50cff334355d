//! Who may do what on this host.
//!
//! ```text
//! Query --> Chain: k5login, cedar, external, in the configured order
//!             Allow | Deny   the first opinion decides
//!             None           the next is asked; no opinion at all means deny
//!       --> Verdict::Allow(Grant)    the only way to get a Grant
//!           Verdict::Deny(Reason)    for the log; the caller learns nothing but "denied"
//! ```
//!
//! A backend that fails denies. With stale facts about a domain only administrators may change it. An administrator whom an early backend
//! lets in is not bound by what a later one forbids. [`Chain::explain`] shows the same way for people.

use std::{
    fmt,
    net::IpAddr,
    panic::{self, AssertUnwindSafe},
    str::FromStr,
};

use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Effect, ExplainStep, Explanation, Metadata, Verb},
};

pub mod cedar;
pub mod external;
pub mod groups;
pub mod k5login;
pub mod permit;
mod stamp;
pub mod systems;

/// What policies decide about: every verb of the protocol that people call, and two things that are no calls of their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Action {
    /// A call.
    Verb(Verb),
    /// To be the owner of what one creates or defines. Asked after that was allowed; "no" leaves the new domain without owners.
    Own,
    /// To act for somebody else, whose rights then count alone. Asked only of those whom the configuration names.
    ActFor,
}

impl Action {
    /// Returns all of them, verbs first, in the order of their codes.
    pub fn all() -> impl Iterator<Item = Self> {
        let verbs = Verb::ALL.iter().copied();
        let verbs = verbs.filter(|verb| !verb.goes_by_permit()).map(Self::Verb);
        verbs.chain([Self::Own, Self::ActFor])
    }

    /// Returns the action as people and policies write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Verb(verb) => verb.name(),
            Self::Own => "own",
            Self::ActFor => "act-for",
        }
    }

    /// Returns whether the action changes anything by itself.
    pub fn effect(self) -> Effect {
        match self {
            Self::Verb(verb) => verb.effect(),
            Self::Own => Effect::Change,
            Self::ActFor => Effect::Read,
        }
    }

    /// Returns whether the action, where no domain is named, is about the host; the others are then about a domain that is nobody's.
    pub fn is_about_the_host(self) -> bool {
        match self {
            Self::Verb(
                Verb::Whoami
                | Verb::List
                | Verb::Info
                | Verb::Dmesg
                | Verb::Create
                | Verb::Define
                | Verb::JobList
                | Verb::JobWait
                | Verb::JobCancel
                | Verb::Explain
                | Verb::ExplainOther
                | Verb::Images
                | Verb::RestoreFrom
                | Verb::DiscardImage
                | Verb::Attach
                | Verb::Events
                | Verb::MigrateIn
                | Verb::Carry
                | Verb::Settle
                | Verb::LeaseEnd
                | Verb::LeaseList
                | Verb::Status
                | Verb::Reconcile
                | Verb::Maintenance,
            ) => true,
            Self::Verb(
                Verb::Describe
                | Verb::DescribeSecrets
                | Verb::Undefine
                | Verb::Start
                | Verb::Destroy
                | Verb::Reboot
                | Verb::Shutdown
                | Verb::Pause
                | Verb::Unpause
                | Verb::MemSet
                | Verb::VcpuSet
                | Verb::Migrate
                | Verb::MigrateAbort
                | Verb::Owner
                | Verb::Label
                | Verb::Class
                | Verb::Save
                | Verb::Restore
                | Verb::DiscardSaved
                | Verb::SaveTo
                | Verb::Autostart
                | Verb::Reset
                | Verb::Rename
                | Verb::Detach
                | Verb::Console
                | Verb::LeaseBegin
                | Verb::Preempt
                | Verb::Resume
                | Verb::Freeze
                | Verb::Thaw,
            )
            | Self::Own
            | Self::ActFor => false,
        }
    }
}

impl From<Verb> for Action {
    fn from(verb: Verb) -> Self {
        Self::Verb(verb)
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// No action has this name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("there is no action '{0}'; actions are the verbs that `rxm help` lists, own and act-for")]
pub struct UnknownAction(String);

impl FromStr for Action {
    type Err = UnknownAction;

    fn from_str(text: &str) -> Result<Self, UnknownAction> {
        Self::all()
            .find(|action| action.name() == text)
            .ok_or_else(|| UnknownAction(text.to_owned()))
    }
}

/// Somebody whose rights are asked about: a principal, and what is known of him beyond his name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Person {
    /// Who it is.
    pub principal: Principal,
    /// The Unix groups of his local account.
    pub unix_groups: UnixGroups,
}

/// The Unix groups of a principal's local account, as they were when his session began.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum UnixGroups {
    /// Nobody wants to know; no policy sees any.
    Unasked,
    /// Their names; none where the principal has no account.
    Known(Vec<String>),
    /// The name service did not say, for this reason: whoever goes by groups denies.
    Unknown(String),
}

/// A question: may this principal do this to that?
#[derive(Clone, Copy, Debug)]
pub struct Query<'a> {
    /// Whose right is asked about: the caller as Kerberos proved it, or for whom the caller acts.
    pub person: &'a Person,
    /// What is to be done.
    pub action: Action,
    /// To what.
    pub on: Subject<'a>,
    /// Where the call comes from.
    pub peer: IpAddr,
    /// Who acts for the person, where somebody does.
    pub acting: Option<&'a Principal>,
}

/// What a verb would be done to.
#[derive(Clone, Copy, Debug)]
pub enum Subject<'a> {
    /// The host itself, or no domain in particular.
    Host,
    /// A domain that the inventory knows.
    Domain(DomainFacts<'a>),
    /// A domain that the inventory does not know: judged as one that nobody owns, so that it looks the same as a forbidden one.
    UnknownDomain,
    /// A domain that does not exist yet, as its XML describes it.
    NewDomain {
        /// Its name.
        name: &'a DomainName,
        /// Its identity, where the XML gives one.
        uuid: Option<Uuid>,
    },
    /// Somebody for whom the principal wants to act.
    Person(&'a Person),
}

/// What the inventory knows of a domain, as far as a verdict needs it.
#[derive(Clone, Copy, Debug)]
pub struct DomainFacts<'a> {
    /// Its identity.
    pub uuid: Uuid,
    /// Its name.
    pub name: &'a DomainName,
    /// The libvirt URI of the hypervisor that has it.
    pub hypervisor: &'a str,
    /// Its state.
    pub state: DomainState,
    /// Its owners, class and labels, or why they cannot be read: then whoever goes by them denies.
    pub metadata: Result<&'a Metadata, &'a str>,
    /// The job that holds it.
    pub lease: Option<&'a Lease>,
    /// Grows with every change of these facts.
    pub revision: u64,
    /// Whether libvirt has been silent for so long that they may be wrong.
    pub stale: bool,
}

/// A job's hold on a domain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose job it is.
    pub user: Principal,
    /// The job as its batch system calls it, as `slurm/4711`.
    pub job: String,
}

/// What one backend says to a query.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opinion {
    /// Yes.
    Allow {
        /// The rule behind it, as `k5login:3` or `cedar:owners.cedar:owners-use`.
        rule: String,
        /// Whether the principal administers the whole host.
        administrator: bool,
    },
    /// No, whatever later backends would say.
    Deny {
        /// Why, for the log.
        reason: String,
    },
    /// Nothing: the next backend is asked.
    None,
}

/// A source of opinions.
pub trait Authorizer: Send + Sync {
    /// Returns the backend's name as the configuration has it.
    fn name(&self) -> &'static str;

    /// Judges a query: from memory, or where [`waits`](Self::waits) says so by asking elsewhere within a deadline. What cannot be judged is denied.
    fn judge(&self, query: &Query<'_>) -> Opinion;

    /// Judges queries by one and the same version of the rules; returns as many opinions in the same order.
    fn judge_all(&self, queries: &[Query<'_>]) -> Vec<Opinion> {
        queries.iter().map(|query| self.judge(query)).collect()
    }

    /// Returns whether judging can wait for something outside of this process.
    fn waits(&self) -> bool {
        false
    }

    /// Returns what would have to be true for the backend to allow what it does not, one way each. For people; may be slow.
    fn wants(&self, _query: &Query<'_>) -> Vec<String> {
        Vec::new()
    }

    /// Looks whether the backend's rules have changed and takes the new ones; `None` where they are what they were. Rules that cannot be had are a
    /// change as well: from then on the backend denies.
    fn refresh(&self) -> Option<Reload>;
}

/// New rules of one backend, in words for the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reload {
    /// What the backend goes by now, or what is wrong.
    pub summary: String,
    /// Whether what was found can be used; if not, the backend denies, or goes by the rules that it has, as the summary says.
    pub usable: bool,
    /// What is wrong with it in detail, or can never apply.
    pub warnings: Vec<String>,
}

/// The answer to a query.
#[derive(Debug)]
#[must_use = "a verdict says whether to go on"]
pub enum Verdict {
    /// Go on, with this.
    Allow(Grant),
    /// Do not.
    Deny(Reason),
}

/// The right to carry out one action on one subject with one revision of its facts. Only a [`Chain`]'s decision or a [permit](permit::Permits) makes
/// one, and nothing copies it.
#[derive(Debug, PartialEq, Eq)]
#[must_use = "a grant is to be consumed by what it allows"]
pub struct Grant {
    action: Action,
    scope: Scope,
    rule: String,
    administrator: bool,
}

impl Grant {
    /// Returns the action that may be carried out.
    pub fn action(&self) -> Action {
        self.action
    }

    /// Returns what it may be carried out on.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// Returns the identity and the revision of the facts of the domain that it is for, where that exists.
    pub fn domain(&self) -> Option<(Uuid, u64)> {
        match self.scope {
            Scope::Domain { uuid, revision } => Some((uuid, revision)),
            Scope::Host | Scope::UnknownDomain | Scope::NewDomain { .. } | Scope::Person(_) => None,
        }
    }

    /// Returns the rule behind it.
    pub fn rule(&self) -> &str {
        &self.rule
    }

    /// Returns whether it was given to an administrator of the host.
    pub fn administrator(&self) -> bool {
        self.administrator
    }
}

/// What a [`Grant`] is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The host.
    Host,
    /// An existing domain.
    Domain {
        /// Its identity.
        uuid: Uuid,
        /// The revision of the facts that were judged.
        revision: u64,
    },
    /// A domain that is not there: the grant is good for saying so and for nothing else.
    UnknownDomain,
    /// A domain to be made.
    NewDomain {
        /// Its name.
        name: DomainName,
        /// Its identity, where the XML gives one.
        uuid: Option<Uuid>,
    },
    /// Somebody to act for.
    Person(Principal),
}

impl From<Subject<'_>> for Scope {
    fn from(subject: Subject<'_>) -> Self {
        match subject {
            Subject::Host => Self::Host,
            Subject::Domain(facts) => Self::Domain {
                uuid: facts.uuid,
                revision: facts.revision,
            },
            Subject::UnknownDomain => Self::UnknownDomain,
            Subject::NewDomain { name, uuid } => Self::NewDomain {
                name: name.clone(),
                uuid,
            },
            Subject::Person(person) => Self::Person(person.principal.clone()),
        }
    }
}

/// Why a query was denied. For the log: it may hold what the caller must not learn.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reason(String);

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&self.0)
    }
}

/// The configured backends in their order.
pub struct Chain {
    backends: Vec<Box<dyn Authorizer>>,
}

impl Chain {
    /// Makes a chain that has read no rules yet: until the first [`refresh`](Self::refresh) it denies.
    pub fn new(backends: Vec<Box<dyn Authorizer>>) -> Self {
        Self { backends }
    }

    /// Takes rules that have changed since the last time; to be called before each request. Looks at files, so about a microsecond where nothing has
    /// changed. Returns each change once, to one of those who call at the same time.
    pub fn refresh(&self) -> Vec<(&'static str, Reload)> {
        self.backends
            .iter()
            .filter_map(|backend| Some((backend.name(), backend.refresh()?)))
            .collect()
    }

    /// Returns whether an answer can wait for something outside of this process: then it must not be asked for on a task's thread.
    pub fn waits(&self) -> bool {
        self.backends.iter().any(|backend| backend.waits())
    }

    /// Answers a query by the first opinion.
    pub fn decide(&self, query: &Query<'_>) -> Verdict {
        self.backends
            .iter()
            .find_map(|backend| verdict(backend.as_ref(), query, ask(backend.as_ref(), query)))
            .unwrap_or_else(silence)
    }

    /// Answers queries, each by the first opinion, and each backend by one version of its rules.
    pub fn decide_all(&self, queries: &[Query<'_>]) -> Vec<Verdict> {
        let mut verdicts: Vec<Option<Verdict>> = queries.iter().map(|_| None).collect();
        for backend in &self.backends {
            let (places, open): (Vec<usize>, Vec<Query<'_>>) = verdicts
                .iter()
                .zip(queries)
                .enumerate()
                .filter(|(_, (verdict, _))| verdict.is_none())
                .map(|(place, (_, query))| (place, *query))
                .unzip();
            if open.is_empty() {
                break;
            }
            let opinions = ask_all(backend.as_ref(), &open);
            for ((place, query), opinion) in places.into_iter().zip(&open).zip(opinions) {
                if let Some(slot) = verdicts.get_mut(place) {
                    *slot = verdict(backend.as_ref(), query, opinion);
                }
            }
        }
        verdicts
            .into_iter()
            .map(|verdict| verdict.unwrap_or_else(silence))
            .collect()
    }

    /// Answers a query for people: what each backend says, and what would have to be true where the answer is no. `domain` is what the
    /// asker calls the domain, empty for the host.
    pub fn explain(&self, query: &Query<'_>, domain: &str) -> Explanation {
        let mut decided = None;
        let steps = self
            .backends
            .iter()
            .map(|backend| {
                let backend = backend.as_ref();
                let step = |opinion: &str, because: String, wants| ExplainStep {
                    backend: backend.name().to_owned(),
                    opinion: opinion.to_owned(),
                    because,
                    wants,
                };
                if decided.is_some() {
                    return step("not-asked", String::new(), Vec::new());
                }
                let opinion = ask(backend, query);
                decided = verdict(backend, query, opinion.clone());
                match (opinion, &decided) {
                    (_, Some(Verdict::Deny(reason))) => {
                        step("deny", reason.to_string(), wants(backend, query))
                    }
                    (Opinion::Allow { rule, .. }, _) => step("allow", rule, Vec::new()),
                    (Opinion::Deny { reason }, _) => step("deny", reason, wants(backend, query)),
                    (Opinion::None, _) => step("none", String::new(), wants(backend, query)),
                }
            })
            .collect();
        let verdict = decided.unwrap_or_else(silence);
        let (allowed, rule) = match verdict {
            Verdict::Allow(grant) => (true, grant.rule),
            Verdict::Deny(reason) => (false, reason.0),
        };
        Explanation {
            principal: query.person.principal.clone(),
            action: query.action.to_string(),
            domain: domain.to_owned(),
            allowed,
            rule,
            steps,
        }
    }
}

/// What a backend's opinion comes to; nothing where the next is to be asked.
fn verdict(backend: &dyn Authorizer, query: &Query<'_>, opinion: Opinion) -> Option<Verdict> {
    match opinion {
        Opinion::Allow { .. } if matches!(query.action, Action::Verb(verb) if verb.goes_by_permit()) => Some(Verdict::Deny(Reason(
            "it is for another host that shows a permit".to_owned(),
        ))),
        Opinion::Allow {
            administrator: false,
            ..
        } if changes_on_stale_facts(query) => Some(Verdict::Deny(Reason(
            "libvirt has been silent for too long to know whose the domain is; until it answers only \
             administrators may change anything"
                .to_owned(),
        ))),
        Opinion::Allow {
            rule,
            administrator,
        } => Some(Verdict::Allow(Grant {
            action: query.action,
            scope: query.on.into(),
            rule,
            administrator,
        })),
        Opinion::Deny { reason } => Some(Verdict::Deny(Reason(format!(
            "{}: {reason}",
            backend.name()
        )))),
        Opinion::None => None,
    }
}

fn silence() -> Verdict {
    Verdict::Deny(Reason("no rule allows it".to_owned()))
}

impl fmt::Debug for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list()
            .entries(self.backends.iter().map(|backend| backend.name()))
            .finish()
    }
}

/// A backend that panics has failed, and a backend that failed denies.
fn ask(backend: &dyn Authorizer, query: &Query<'_>) -> Opinion {
    panic::catch_unwind(AssertUnwindSafe(|| backend.judge(query))).unwrap_or_else(|_| failed())
}

/// The same for many; a backend that answers another number of questions than it was asked has failed as well.
fn ask_all(backend: &dyn Authorizer, queries: &[Query<'_>]) -> Vec<Opinion> {
    match panic::catch_unwind(AssertUnwindSafe(|| backend.judge_all(queries))) {
        Ok(opinions) if opinions.len() == queries.len() => opinions,
        Ok(_) | Err(_) => queries.iter().map(|_| failed()).collect(),
    }
}

fn wants(backend: &dyn Authorizer, query: &Query<'_>) -> Vec<String> {
    panic::catch_unwind(AssertUnwindSafe(|| backend.wants(query))).unwrap_or_default()
}

fn failed() -> Opinion {
    Opinion::Deny {
        reason: "the backend failed; what xmand wrote to stderr says where".to_owned(),
    }
}

fn changes_on_stale_facts(query: &Query<'_>) -> bool {
    query.action.effect() != Effect::Read
        && match query.on {
            Subject::Domain(facts) => facts.stale,
            Subject::Host
            | Subject::UnknownDomain
            | Subject::NewDomain { .. }
            | Subject::Person(_) => false,
        }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, sync::Mutex};

    use super::*;

    /// Says the same to everything and counts nothing: the chain is what is tested here, not a backend.
    struct Always(Opinion);

    impl Authorizer for Always {
        fn name(&self) -> &'static str {
            "always"
        }

        fn judge(&self, _: &Query<'_>) -> Opinion {
            self.0.clone()
        }

        fn refresh(&self) -> Option<Reload> {
            None
        }
    }

    struct Broken;

    impl Authorizer for Broken {
        fn name(&self) -> &'static str {
            "broken"
        }

        fn judge(&self, _: &Query<'_>) -> Opinion {
            panic!("broken on purpose")
        }

        fn refresh(&self) -> Option<Reload> {
            None
        }
    }

    struct Reloading(Mutex<Vec<Reload>>);

    impl Authorizer for Reloading {
        fn name(&self) -> &'static str {
            "reloading"
        }

        fn judge(&self, _: &Query<'_>) -> Opinion {
            Opinion::None
        }

        fn refresh(&self) -> Option<Reload> {
            self.0.lock().unwrap().pop()
        }
    }

    fn allow(rule: &str, administrator: bool) -> Opinion {
        Opinion::Allow {
            rule: rule.to_owned(),
            administrator,
        }
    }

    fn deny() -> Opinion {
        Opinion::Deny {
            reason: "so it says".to_owned(),
        }
    }

    fn chain(opinions: Vec<Opinion>) -> Chain {
        Chain::new(
            opinions
                .into_iter()
                .map(|opinion| Box::new(Always(opinion)) as Box<dyn Authorizer>)
                .collect(),
        )
    }

    fn decide(chain: &Chain, verb: Verb, on: Subject<'_>) -> Verdict {
        let person = Person {
            principal: "alice@EX.ORG".parse().unwrap(),
            unix_groups: UnixGroups::Unasked,
        };
        chain.decide(&Query {
            person: &person,
            action: verb.into(),
            on,
            peer: Ipv4Addr::LOCALHOST.into(),
            acting: None,
        })
    }

    #[track_caller]
    fn granted(verdict: Verdict) -> Grant {
        match verdict {
            Verdict::Allow(grant) => grant,
            Verdict::Deny(reason) => panic!("denied: {reason}"),
        }
    }

    #[track_caller]
    fn denied(verdict: Verdict) -> String {
        match verdict {
            Verdict::Allow(grant) => panic!("allowed: {grant:?}"),
            Verdict::Deny(reason) => reason.to_string(),
        }
    }

    #[test]
    fn the_first_opinion_decides_and_none_means_deny() {
        for (opinions, rule) in [
            (vec![], None),
            (vec![Opinion::None, Opinion::None], None),
            (vec![allow("a", false), deny()], Some("a")),
            (vec![deny(), allow("b", true)], None),
            (
                vec![Opinion::None, allow("c", false), allow("d", true)],
                Some("c"),
            ),
            (vec![Opinion::None, deny(), allow("e", true)], None),
        ] {
            let verdict = decide(&chain(opinions.clone()), Verb::List, Subject::Host);
            match rule {
                Some(rule) => assert_eq!(granted(verdict).rule(), rule, "{opinions:?}"),
                None => drop(denied(verdict)),
            }
        }
    }

    #[test]
    fn a_denial_names_the_backend_and_its_reason() {
        assert_eq!(
            denied(decide(&chain(vec![deny()]), Verb::List, Subject::Host)),
            "always: so it says"
        );
        assert_eq!(
            denied(decide(&chain(vec![]), Verb::List, Subject::Host)),
            "no rule allows it"
        );
    }

    #[test]
    fn a_backend_that_panics_denies_and_nobody_behind_it_is_asked() {
        let chain = Chain::new(vec![Box::new(Broken), Box::new(Always(allow("a", true)))]);
        assert!(
            denied(decide(&chain, Verb::List, Subject::Host))
                .starts_with("broken: the backend failed")
        );
    }

    #[test]
    fn what_goes_by_a_permit_is_denied_even_to_administrators() {
        for &verb in Verb::ALL.iter().filter(|verb| verb.goes_by_permit()) {
            let all = chain(vec![allow("a", true)]);
            assert!(matches!(
                decide(&all, verb, Subject::Host),
                Verdict::Deny(_)
            ));
        }
    }

    #[test]
    fn with_stale_facts_only_administrators_change_anything() {
        let name = "web".parse().unwrap();
        let metadata = Metadata::default();
        for &verb in Verb::ALL.iter().filter(|verb| !verb.goes_by_permit()) {
            for stale in [false, true] {
                for administrator in [false, true] {
                    let on = Subject::Domain(DomainFacts {
                        uuid: Uuid::nil(),
                        name: &name,
                        hypervisor: "test:///default",
                        state: DomainState::Running,
                        metadata: Ok(&metadata),
                        lease: None,
                        revision: 1,
                        stale,
                    });
                    let allowed = matches!(
                        decide(&chain(vec![allow("a", administrator)]), verb, on),
                        Verdict::Allow(_)
                    );
                    let expected = administrator || !stale || verb.effect() == Effect::Read;
                    assert_eq!(
                        allowed, expected,
                        "{verb}, stale: {stale}, administrator: {administrator}"
                    );
                }
            }
        }
    }

    #[test]
    fn a_grant_is_for_the_verb_and_the_domain_that_were_asked_about() {
        let name: DomainName = "web".parse().unwrap();
        let uuid = Uuid::from_u128(7);
        let metadata = Metadata::default();
        let chain = chain(vec![allow("a", true)]);
        let facts = DomainFacts {
            uuid,
            name: &name,
            hypervisor: "test:///default",
            state: DomainState::Running,
            metadata: Ok(&metadata),
            lease: None,
            revision: 42,
            stale: false,
        };

        let grant = granted(decide(&chain, Verb::Pause, Subject::Domain(facts)));
        assert_eq!(
            (grant.action(), grant.domain(), grant.administrator()),
            (Action::Verb(Verb::Pause), Some((uuid, 42)), true)
        );

        let new = Subject::NewDomain {
            name: &name,
            uuid: None,
        };
        let grant = granted(decide(&chain, Verb::Define, new));
        assert_eq!(
            grant.scope(),
            &Scope::NewDomain {
                name: name.clone(),
                uuid: None
            }
        );
        assert_eq!(grant.domain(), None);

        assert_eq!(
            granted(decide(&chain, Verb::Pause, Subject::UnknownDomain)).domain(),
            None
        );
        assert_eq!(
            granted(decide(&chain, Verb::Info, Subject::Host)).scope(),
            &Scope::Host
        );
    }

    #[test]
    fn each_change_of_rules_is_told_once() {
        let reload = Reload {
            summary: "new".to_owned(),
            usable: true,
            warnings: vec![],
        };
        let chain = Chain::new(vec![Box::new(Reloading(Mutex::new(vec![reload.clone()])))]);
        assert_eq!(chain.refresh(), [("reloading", reload)]);
        assert_eq!(chain.refresh(), []);
    }
}
