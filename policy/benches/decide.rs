//! What a decision costs: `cargo bench -p xman-policy`.

#![allow(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    missing_docs,
    reason = "a benchmark ends where something is not as it should be; criterion's macros make public functions"
)]

use std::{
    fs,
    hint::black_box,
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    thread,
    time::Duration,
};

use criterion::{Criterion, criterion_group, criterion_main};
use tempfile::TempDir;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Metadata, Verb},
};
use xman_policy::{
    Authorizer, Chain, DomainFacts, Lease, Person, Query, Subject, UnixGroups, Verdict,
    cedar::Cedar, k5login::K5login,
};

const DOMAINS: u128 = 1000;
const POLICIES: usize = 100;

struct Domain {
    uuid: Uuid,
    name: DomainName,
    metadata: Metadata,
    lease: Option<Lease>,
}

/// Every tenth domain is alice's, every tenth has a job of hers.
fn domains() -> Vec<Domain> {
    let domain = |n: u128| {
        let owner = if n.is_multiple_of(10) {
            principal("alice@EX.ORG")
        } else {
            principal(&format!("user{n}@EX.ORG"))
        };
        let labels = [("tier", "prod"), ("rack", "r12")]
            .map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
        Domain {
            uuid: Uuid::from_u128(n),
            name: format!("grid-{n}").parse().unwrap(),
            metadata: Metadata {
                owners: [owner].into(),
                class: Some("grid".parse().unwrap()),
                labels: labels.into(),
            },
            lease: (n % 10 == 5).then(|| Lease {
                user: principal("alice@EX.ORG"),
                job: format!("slurm/{n}"),
            }),
        }
    };
    (0..DOMAINS).map(domain).collect()
}

impl Domain {
    fn subject(&self) -> Subject<'_> {
        Subject::Domain(DomainFacts {
            uuid: self.uuid,
            name: &self.name,
            hypervisor: "qemu:///system",
            state: DomainState::Running,
            metadata: Ok(&self.metadata),
            lease: self.lease.as_ref(),
            revision: 1,
            stale: false,
        })
    }
}

fn principal(text: &str) -> Principal {
    text.parse().unwrap()
}

fn person(text: &str) -> Person {
    Person {
        principal: principal(text),
        unix_groups: UnixGroups::Unasked,
    }
}

fn query<'a>(person: &'a Person, verb: Verb, on: Subject<'a>) -> Query<'a> {
    Query {
        person,
        action: verb.into(),
        on,
        peer: Ipv4Addr::LOCALHOST.into(),
        acting: None,
    }
}

fn account(folder: &Path) -> u32 {
    folder.metadata().unwrap().uid()
}

fn folder(policies: &str, groups: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    write(&folder.path().join("site.cedar"), policies);
    write(&folder.path().join("groups.toml"), groups);
    folder
}

fn write(path: &Path, text: &str) {
    fs::write(path, text).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

fn cedar(folder: &TempDir) -> Cedar {
    Cedar::open(folder.path(), "host.ex.org", account(folder.path())).unwrap()
}

/// Until its file or folder is trusted to be at rest.
fn settle(backend: &dyn Authorizer) {
    for _ in 0..25 {
        backend.refresh();
        thread::sleep(Duration::from_millis(100));
    }
}

const FEW: &str = r#"
    permit (principal, action in Action::"view", resource is Domain) when { resource.owners.contains(principal) };
    permit (principal, action in Action::"use", resource is Domain) when { resource.owners.contains(principal) };
    permit (principal in Group::"admins", action in [Action::"view", Action::"use"], resource);
"#;

/// A hundred policies as a site has them: the owners', the jobs', and one for each of its projects.
fn many() -> (String, String) {
    let (mut policies, mut groups) = (FEW.to_owned(), "[groups]\nadmins = []\n".to_owned());
    policies += r#"
        permit (principal, action in [Action::"view", Action::"use"], resource is Domain)
        when { resource has lease && resource.lease.user == principal };
    "#;
    for n in 4..POLICIES {
        policies += &format!(
            r#"permit (principal in Group::"project{n}", action in [Action::"view", Action::"use"], resource is Domain)
            when {{ resource.hasTag("project") && resource.getTag("project") == "p{n}" }};
            "#
        );
        let member = if n % 20 == 0 { "alice" } else { "dave" };
        groups += &format!("project{n} = [\"{member}@EX.ORG\", \"user{n}@EX.ORG\"]\n");
    }
    (policies, groups)
}

/// A hundred policies of which each must be evaluated for each domain: the worst that a site can write.
fn open() -> String {
    let one = |n| {
        format!(
            r#"permit (principal, action in [Action::"view", Action::"use"], resource is Domain)
            when {{ resource.owners.contains(principal) && resource.class == "c{n}" }};
            "#
        )
    };
    (0..POLICIES).map(one).collect()
}

fn decide(criterion: &mut Criterion) {
    let alice = person("alice@EX.ORG");
    let domains = domains();
    let one = |verb| query(&alice, verb, domains[0].subject());
    let list: Vec<_> = domains
        .iter()
        .map(|domain| query(&alice, Verb::List, domain.subject()))
        .collect();

    let place = tempfile::tempdir().unwrap();
    let file = place.path().join(".k5login");
    write(&file, "root@EX.ORG\nalice@EX.ORG\n");
    let k5login = || {
        let backend = K5login::new(&file, account(place.path()));
        settle(&backend);
        backend
    };
    let (policies, groups) = many();
    let few = folder(FEW, "[groups]\nadmins = []\n");
    let many = folder(&policies, &groups);
    let open = folder(&open(), "");

    let chain = Chain::new(vec![Box::new(k5login()), Box::new(cedar(&many))]);
    criterion.bench_function("k5login, one decision", |bench| {
        let backend = k5login();
        bench.iter(|| backend.judge(black_box(&one(Verb::Start))));
    });
    criterion.bench_function("k5login before cedar, one decision", |bench| {
        bench.iter(|| allowed(&chain.decide(black_box(&one(Verb::Start)))));
    });
    criterion.bench_function("cedar, one decision over 3 policies", |bench| {
        let backend = cedar(&few);
        bench.iter(|| backend.judge(black_box(&one(Verb::Start))));
    });
    criterion.bench_function("cedar, one decision over 100 policies", |bench| {
        let backend = cedar(&many);
        bench.iter(|| backend.judge(black_box(&one(Verb::Start))));
    });
    criterion.bench_function("cedar, list of 1000 domains by 100 policies", |bench| {
        let chain = Chain::new(vec![Box::new(cedar(&many))]);
        let seen = |chain: &Chain| {
            chain
                .decide_all(&list)
                .iter()
                .filter(|v| allowed(v))
                .count()
        };
        assert_eq!(seen(&chain), 200);
        bench.iter(|| seen(black_box(&chain)));
    });
    criterion.bench_function(
        "cedar, list of 1000 domains by 100 policies for everybody",
        |bench| {
            let chain = Chain::new(vec![Box::new(cedar(&open))]);
            bench.iter(|| chain.decide_all(black_box(&list)).len());
        },
    );
    criterion.bench_function("cedar, a look at a resting folder", |bench| {
        let backend = cedar(&many);
        settle(&backend);
        bench.iter(|| backend.refresh());
    });
    criterion.bench_function("cedar, 100 policies read", |bench| {
        bench.iter(|| cedar(&many).summary().policies);
    });
}

fn allowed(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Allow(_))
}

criterion_group!(benches, decide);
criterion_main!(benches);
