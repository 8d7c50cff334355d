//! Whatever fails, in any combination and order, nobody gets in who would not have got in by what is healthy before it.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    panic,
    path::Path,
    sync::{Once, OnceLock},
};

use proptest::{prelude::*, sample::select};
use tempfile::TempDir;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Effect, Metadata},
};
use xman_policy::{
    Action, Authorizer, Chain, DomainFacts, Lease, Opinion, Person, Query, Reload, Subject,
    UnixGroups, Verdict, cedar::Cedar, k5login::K5login,
};

/// What a place in the chain is taken by: what works, and what fails in each way there is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Link {
    K5login,
    Cedar,
    Silent,
    Panics,
    AnswersTooFew,
    AnswersTooMany,
    Denies,
    K5loginWithoutFile,
    K5loginUnread,
    K5loginOfOthers,
    CedarThatErrs,
    CedarThatForbids,
    CedarOfUnaskedGroups,
}

const LINKS: [Link; 13] = [
    Link::K5login,
    Link::Cedar,
    Link::Silent,
    Link::Panics,
    Link::AnswersTooFew,
    Link::AnswersTooMany,
    Link::Denies,
    Link::K5loginWithoutFile,
    Link::K5loginUnread,
    Link::K5loginOfOthers,
    Link::CedarThatErrs,
    Link::CedarThatForbids,
    Link::CedarOfUnaskedGroups,
];

impl Link {
    /// What lets nobody in, whoever asks for whatever.
    fn never_allows(self) -> bool {
        match self {
            Self::K5login | Self::Cedar => false,
            Self::Silent
            | Self::Panics
            | Self::AnswersTooFew
            | Self::AnswersTooMany
            | Self::Denies
            | Self::K5loginWithoutFile
            | Self::K5loginUnread
            | Self::K5loginOfOthers
            | Self::CedarThatErrs
            | Self::CedarThatForbids
            | Self::CedarOfUnaskedGroups => true,
        }
    }

    /// Whether those behind it are asked.
    fn lets_others_speak(self) -> bool {
        matches!(self, Self::K5login | Self::Cedar | Self::Silent)
    }

    fn backend(self) -> Box<dyn Authorizer> {
        let place = place();
        let k5login = |name: &str| K5login::new(place.path().join(name), account(place.path()));
        let cedar = |name: &str| {
            Cedar::open(
                place.path().join(name),
                "skirit.ex.org",
                account(place.path()),
            )
            .unwrap()
        };
        let read = |backend: K5login| {
            backend.refresh();
            backend
        };
        match self {
            Self::K5login => Box::new(read(k5login("k5login"))),
            Self::K5loginWithoutFile => Box::new(read(k5login("none"))),
            Self::K5loginUnread => Box::new(k5login("k5login")),
            Self::K5loginOfOthers => Box::new(read(k5login("writable"))),
            Self::Cedar => Box::new(cedar("good")),
            Self::CedarThatErrs => Box::new(cedar("errs")),
            Self::CedarThatForbids => Box::new(cedar("forbids")),
            Self::CedarOfUnaskedGroups => Box::new(cedar("unix")),
            Self::Silent
            | Self::Panics
            | Self::AnswersTooFew
            | Self::AnswersTooMany
            | Self::Denies => Box::new(Broken(self)),
        }
    }
}

/// Fails, as its link says.
struct Broken(Link);

impl Authorizer for Broken {
    fn name(&self) -> &'static str {
        "broken"
    }

    fn judge(&self, _: &Query<'_>) -> Opinion {
        match self.0 {
            Link::Silent => Opinion::None,
            Link::Denies => Opinion::Deny {
                reason: "so it says".to_owned(),
            },
            _ => panic!("broken on purpose"),
        }
    }

    fn judge_all(&self, queries: &[Query<'_>]) -> Vec<Opinion> {
        let allow = Opinion::Allow {
            rule: "broken".to_owned(),
            administrator: true,
        };
        match self.0 {
            Link::AnswersTooFew => vec![allow; queries.len() - 1],
            Link::AnswersTooMany => vec![allow; queries.len() + 1],
            _ => queries.iter().map(|query| self.judge(query)).collect(),
        }
    }

    fn wants(&self, _: &Query<'_>) -> Vec<String> {
        panic!("broken on purpose")
    }

    fn refresh(&self) -> Option<Reload> {
        None
    }
}

const GOOD: &str = r#"
permit (principal, action in [Action::"view", Action::"use", Action::"own"], resource is Domain) when { resource.owners.contains(principal) };
permit (principal, action in Action::"ask", resource is Host) when { principal.realm == "EX.ORG" };
permit (principal == User::"portal@EX.ORG", action == Action::"act-for", resource) when { resource.realm == "EX.ORG" };
forbid (principal, action, resource is Domain) when { resource has lease && resource.lease.user != principal };
"#;
const ERRS: &str = "permit (principal, action, resource);\nforbid (principal, action, resource) when { 9223372036854775807 + 1 == 0 };\n";
const FORBIDS: &str =
    "permit (principal, action, resource);\nforbid (principal, action, resource);\n";
const BY_UNIX_GROUPS: &str = "permit (principal, action, resource);\nforbid (principal in Group::\"unix:guests\", action, resource);\n";

fn place() -> &'static TempDir {
    static PLACE: OnceLock<TempDir> = OnceLock::new();
    PLACE.get_or_init(|| {
        let place = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str, mode| {
            let path = place.path().join(name);
            fs::write(&path, text).unwrap();
            fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
        };
        write("k5login", "root@EX.ORG\n", 0o600);
        write("writable", "root@EX.ORG\nalice@EX.ORG\n", 0o666);
        for (name, text) in [
            ("good", GOOD),
            ("errs", ERRS),
            ("forbids", FORBIDS),
            ("unix", BY_UNIX_GROUPS),
        ] {
            fs::create_dir(place.path().join(name)).unwrap();
            write(&format!("{name}/site.cedar"), text, 0o600);
        }
        place
    })
}

fn account(path: &Path) -> u32 {
    path.metadata().unwrap().uid()
}

/// Panics on purpose need not be seen; others are.
fn quietly() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let usual = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            if info.payload().downcast_ref() != Some(&"broken on purpose") {
                usual(info);
            }
        }));
    });
}

#[derive(Clone, Debug)]
struct Asked {
    person: Person,
    action: Action,
    on: On,
}

#[derive(Clone, Copy, Debug)]
enum On {
    Host,
    Unknown,
    New,
    Person,
    Domain {
        owned: bool,
        leased: bool,
        broken: bool,
        stale: bool,
    },
}

fn asked() -> impl Strategy<Value = Asked> {
    let unix_groups = prop_oneof![
        3 => Just(UnixGroups::Unasked),
        1 => Just(UnixGroups::Unknown("the name service is silent".to_owned())),
    ];
    let who = select(vec![
        "root@EX.ORG",
        "alice@EX.ORG",
        "alice@OTHER.ORG",
        "alice/admin@EX.ORG",
        "portal@EX.ORG",
    ]);
    let domain =
        any::<(bool, bool, bool, bool)>().prop_map(|(owned, leased, broken, stale)| On::Domain {
            owned,
            leased,
            broken,
            stale,
        });
    let on = prop_oneof![
        2 => Just(On::Host),
        1 => Just(On::Unknown),
        1 => Just(On::New),
        1 => Just(On::Person),
        5 => domain,
    ];
    let action = select(Action::all().collect::<Vec<_>>());
    (who, unix_groups, action, on).prop_map(|(who, unix_groups, action, on)| Asked {
        person: Person {
            principal: who.parse().unwrap(),
            unix_groups,
        },
        action,
        on,
    })
}

/// What questions point to.
struct World {
    name: DomainName,
    owned: Metadata,
    others: Metadata,
    lease: Lease,
    alice: Person,
}

impl World {
    fn new() -> Self {
        let owners = |who: &str| Metadata {
            owners: [who.parse::<Principal>().unwrap()].into(),
            ..Metadata::default()
        };
        Self {
            name: "web".parse().unwrap(),
            owned: owners("alice@EX.ORG"),
            others: owners("bob@EX.ORG"),
            lease: Lease {
                user: "bob@EX.ORG".parse().unwrap(),
                job: "slurm/4711".to_owned(),
            },
            alice: Person {
                principal: "alice@EX.ORG".parse().unwrap(),
                unix_groups: UnixGroups::Unasked,
            },
        }
    }

    fn query<'a>(&'a self, asked: &'a Asked) -> Query<'a> {
        let on = match asked.on {
            On::Host => Subject::Host,
            On::Unknown => Subject::UnknownDomain,
            On::New => Subject::NewDomain {
                name: &self.name,
                uuid: None,
            },
            On::Person => Subject::Person(&self.alice),
            On::Domain {
                owned,
                leased,
                broken,
                stale,
            } => Subject::Domain(DomainFacts {
                uuid: Uuid::from_u128(7),
                name: &self.name,
                hypervisor: "test:///default",
                state: DomainState::Running,
                metadata: match (broken, owned) {
                    (true, _) => Err("two elements 'owners'"),
                    (false, true) => Ok(&self.owned),
                    (false, false) => Ok(&self.others),
                },
                lease: leased.then_some(&self.lease),
                revision: 1,
                stale,
            }),
        };
        Query {
            person: &asked.person,
            action: asked.action,
            on,
            peer: Ipv4Addr::LOCALHOST.into(),
            acting: None,
        }
    }
}

fn chain(links: &[Link]) -> Chain {
    Chain::new(links.iter().map(|link| link.backend()).collect())
}

fn allows(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Allow(_))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, ..ProptestConfig::default() })]

    #[test]
    fn what_fails_allows_nothing_that_the_healthy_before_it_did_not(
        links in proptest::collection::vec(select(LINKS.to_vec()), 0..5),
        all in proptest::collection::vec(asked(), 1..24),
    ) {
        quietly();
        let world = World::new();
        let whole = chain(&links);
        // policies have no opinion on what the schema does not put together, as to start a host
        let forbids_all = Link::CedarThatForbids.backend();
        let befores: Vec<Chain> = (0..=links.len()).map(|end| chain(&links[..end])).collect();
        for asked in &all {
            let query = world.query(asked);
            let unasked = forbids_all.judge(&query) == Opinion::None;
            let is_healthy = |link: &Link| link.lets_others_speak()
                || (unasked && matches!(link, Link::CedarThatErrs | Link::CedarThatForbids));
            let before = &befores[links.iter().take_while(|link| is_healthy(link)).count()];
            prop_assert_eq!(allows(&whole.decide(&query)), allows(&before.decide(&query)), "{:?}", asked);
        }
        if links.iter().all(|link| link.never_allows()) {
            for asked in &all {
                prop_assert!(!allows(&whole.decide(&world.query(asked))), "{:?}", asked);
            }
        }
    }

    #[test]
    fn one_question_many_and_an_explanation_come_to_the_same(
        links in proptest::collection::vec(select(LINKS.to_vec()), 0..5),
        all in proptest::collection::vec(asked(), 1..24),
    ) {
        quietly();
        let world = World::new();
        let chain = chain(&links);
        let queries: Vec<Query<'_>> = all.iter().map(|asked| world.query(asked)).collect();
        for (query, together) in queries.iter().zip(chain.decide_all(&queries)) {
            let alone = chain.decide(query);
            let explained = chain.explain(query, "web");
            prop_assert_eq!(allows(&alone), explained.allowed);
            prop_assert_eq!(allows(&alone), allows(&together), "{:?}", query);
            if let (Verdict::Allow(alone), Verdict::Allow(together)) = (alone, together) {
                prop_assert_eq!(alone.rule(), together.rule());
                prop_assert_eq!(alone.rule(), explained.rule);
            }
        }
    }

    /// Neither unknown groups nor unreadable metadata nor old facts let anybody do more; nor do they stop an administrator.
    #[test]
    fn what_is_not_known_of_a_person_or_a_domain_never_helps(asked in asked()) {
        let world = World::new();
        let chain = chain(&[Link::K5login, Link::Cedar]);
        let verdict = chain.decide(&world.query(&asked));
        let Verdict::Allow(grant) = verdict else { return Ok(()); };
        if grant.administrator() {
            return Ok(());
        }
        prop_assert!(!matches!(asked.person.unix_groups, UnixGroups::Unknown(_)));
        if let On::Domain { broken, stale, owned, leased } = asked.on {
            prop_assert!(owned && !leased && !broken);
            prop_assert!(!stale || asked.action.effect() == Effect::Read);
        }
    }
}

#[test]
fn policies_that_do_not_load_make_no_backend() {
    for folder in ["none", "k5login"] {
        let path = place().path().join(folder);
        assert!(Cedar::open(path, "skirit.ex.org", account(place().path())).is_err());
    }
}
