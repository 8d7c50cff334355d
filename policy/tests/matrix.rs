//! Who may do what by each policy that is shipped, as tables in tests/matrix.
//!
//! Who changes an example, the schema or the chain sees here whose rights change. `XMAN_MATRIX=write cargo test -p xman-policy --test matrix` writes
//! the tables anew; the review of their diff is the review of the change.
//!
//! A letter is what comes of a question through the whole chain, k5login before cedar: `A` an administrator may, `y` a policy allows, `n` a policy
//! forbids or cannot tell, `.` nobody says anything, which denies.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    env, fs,
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
};

use tempfile::TempDir;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Metadata},
};
use xman_policy::{
    Action, Chain, DomainFacts, Lease, Person, Query, Subject, UnixGroups, Verdict, cedar::Cedar,
    k5login::K5login,
};

const EXAMPLES: [&str; 5] = [
    "administrators-only",
    "owners",
    "jobs",
    "operators",
    "auditors",
];

/// Goes by the Unix groups of the local account; no example does, since most sites have none.
const UNIX: &str = "@id(\"wheel\")\npermit (principal in Group::\"unix:wheel\", action in Action::\"use\", resource);\n";

fn folder_of_examples() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/policy")
}

fn principal(text: &str) -> Principal {
    text.parse().unwrap()
}

/// Who asks, and what the table calls him.
fn people() -> Vec<(&'static str, Person)> {
    let person = |name, who: &str, unix: &[&str]| {
        let unix_groups = UnixGroups::Known(unix.iter().map(|group| (*group).to_owned()).collect());
        let principal = principal(who);
        (
            name,
            Person {
                principal,
                unix_groups,
            },
        )
    };
    let mut people = vec![
        person("administrator in .k5login", "root@EXAMPLE.ORG", &[]),
        person("owner", "alice@EXAMPLE.ORG", &[]),
        person(
            "owner's name with an instance",
            "alice/web@EXAMPLE.ORG",
            &[],
        ),
        person("owner's name in another realm", "alice@OTHER.ORG", &[]),
        person("user of the job", "bob@EXAMPLE.ORG", &[]),
        person("somebody else", "mallory@EXAMPLE.ORG", &[]),
        person("in group admins", "alice/admin@EXAMPLE.ORG", &[]),
        person("in group operators", "carol@EXAMPLE.ORG", &[]),
        person("in group helpers", "dave@EXAMPLE.ORG", &[]),
        person("in group auditors", "audit/night@EXAMPLE.ORG", &[]),
        person("in Unix group wheel", "mallory@EXAMPLE.ORG", &["wheel"]),
    ];
    people.push((
        "owner whose Unix groups are unknown",
        Person {
            principal: principal("alice@EXAMPLE.ORG"),
            unix_groups: UnixGroups::Unknown("the name service is silent".to_owned()),
        },
    ));
    people
}

struct Domain {
    name: DomainName,
    metadata: Result<Metadata, String>,
    lease: Option<Lease>,
    stale: bool,
}

impl Domain {
    fn of(owner: &str) -> Self {
        Self {
            name: "web".parse().unwrap(),
            metadata: Ok(Metadata {
                owners: [principal(owner)].into(),
                ..Metadata::default()
            }),
            lease: None,
            stale: false,
        }
    }

    fn on(&self) -> Subject<'_> {
        Subject::Domain(DomainFacts {
            uuid: Uuid::from_u128(7),
            name: &self.name,
            hypervisor: "test:///default",
            state: DomainState::Running,
            metadata: self.metadata.as_ref().map_err(String::as_str),
            lease: self.lease.as_ref(),
            revision: 1,
            stale: self.stale,
        })
    }
}

/// A chain over some files, in a folder that lives as long as it.
fn chain(files: &[(String, String)]) -> (TempDir, Chain) {
    let place = tempfile::tempdir().unwrap();
    let folder = place.path().join("policy");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
    let write = |path: PathBuf, text: &str| {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    };
    for (name, text) in files {
        write(folder.join(name), text);
    }
    let k5login = place.path().join(".k5login");
    write(k5login.clone(), "root@EXAMPLE.ORG\n");
    let account = place.path().metadata().unwrap().uid();
    let cedar = Cedar::open(&folder, "skirit.example.org", account).unwrap();
    let warnings = cedar.summary().warnings;
    assert!(warnings.is_empty(), "{warnings:?}");
    let chain = Chain::new(vec![
        Box::new(K5login::new(k5login, account)),
        Box::new(cedar),
    ]);
    chain.refresh();
    (place, chain)
}

fn example(name: &str) -> (String, String) {
    let text = fs::read_to_string(folder_of_examples().join(name)).unwrap();
    (name.to_owned(), text)
}

fn table(chain: &Chain, heading: &str) -> String {
    let owned = Domain::of("alice@EXAMPLE.ORG");
    let others = Domain::of("dave@OTHER.ORG");
    let leased = Domain {
        lease: Some(Lease {
            user: principal("bob@EXAMPLE.ORG"),
            job: "slurm/4711".to_owned(),
        }),
        ..Domain::of("dave@OTHER.ORG")
    };
    let mut labelled = Domain::of("alice@EXAMPLE.ORG");
    if let Ok(metadata) = &mut labelled.metadata {
        let label = ("tier".parse().unwrap(), "prod".parse().unwrap());
        metadata.labels = [label].into();
    }
    let broken = Domain {
        metadata: Err("two elements 'owners'".to_owned()),
        ..Domain::of("alice@EXAMPLE.ORG")
    };
    let stale = Domain {
        stale: true,
        ..Domain::of("alice@EXAMPLE.ORG")
    };
    let name: DomainName = "new".parse().unwrap();
    let other = Person {
        principal: principal("alice@EXAMPLE.ORG"),
        unix_groups: UnixGroups::Known(Vec::new()),
    };
    let subjects: [(&str, Subject<'_>); 10] = [
        ("host", Subject::Host),
        ("alice's", owned.on()),
        ("another's", others.on()),
        ("leased", leased.on()),
        ("tier=prod", labelled.on()),
        ("stale", stale.on()),
        ("broken", broken.on()),
        ("unknown", Subject::UnknownDomain),
        (
            "new",
            Subject::NewDomain {
                name: &name,
                uuid: None,
            },
        ),
        ("alice", Subject::Person(&other)),
    ];
    let mut table = format!("{heading}\n");
    for (called, person) in people() {
        table += &format!("\n{called}: {}\n", person.principal);
        table += &format!("{:<20}", "");
        for (name, _) in &subjects {
            table += &format!("{name:<11}");
        }
        table = table.trim_end().to_owned() + "\n";
        for action in Action::all() {
            let mut line = format!("  {action:<18}");
            for (_, on) in &subjects {
                let query = Query {
                    person: &person,
                    action,
                    on: *on,
                    peer: Ipv4Addr::new(10, 1, 2, 3).into(),
                    acting: None,
                };
                let letter = match chain.decide(&query) {
                    Verdict::Allow(grant) if grant.administrator() => 'A',
                    Verdict::Allow(_) => 'y',
                    Verdict::Deny(reason) if reason.to_string() == "no rule allows it" => '.',
                    Verdict::Deny(_) => 'n',
                };
                line += &format!("{letter:<11}");
            }
            table += line.trim_end();
            table += "\n";
        }
    }
    table
}

#[test]
fn rights_by_each_example_are_as_its_table_says() {
    let groups = || example("groups.toml");
    let mut cases: Vec<(String, Vec<(String, String)>)> = EXAMPLES
        .iter()
        .map(|name| {
            let file = example(&format!("{name}.cedar"));
            ((*name).to_owned(), vec![file, groups()])
        })
        .collect();
    let all = cases
        .iter()
        .flat_map(|(_, files)| files.iter().take(1).cloned())
        .chain([groups()])
        .collect();
    cases.push(("all-together".to_owned(), all));
    cases.push((
        "unix-groups".to_owned(),
        vec![("unix.cedar".to_owned(), UNIX.to_owned())],
    ));
    let write = env::var_os("XMAN_MATRIX").is_some_and(|value| value == "write");
    let tables = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/matrix");
    let mut differing = Vec::new();
    for (name, files) in &cases {
        let (_place, chain) = chain(files);
        let heading = format!(
            "Rights by deploy/policy: {name}. A administrator, y allowed, n denied with a reason, . denied since nothing allows it."
        );
        let table = table(&chain, &heading);
        let path = tables.join(format!("{name}.txt"));
        if write {
            fs::create_dir_all(&tables).unwrap();
            fs::write(&path, &table).unwrap();
        } else if !fs::read_to_string(&path).is_ok_and(|known| known == table) {
            differing.push(name);
        }
    }
    assert!(
        differing.is_empty(),
        "rights have changed by {differing:?}; look at the diff after XMAN_MATRIX=write cargo test -p xman-policy --test matrix"
    );
    let kept: Vec<_> = fs::read_dir(&tables).unwrap().collect();
    assert_eq!(kept.len(), cases.len(), "a table without its example");
}

#[test]
fn every_example_is_in_the_matrix() {
    let mut files: Vec<String> = fs::read_dir(folder_of_examples())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter_map(|name| name.strip_suffix(".cedar").map(str::to_owned))
        .collect();
    files.sort();
    let mut known = EXAMPLES;
    known.sort_unstable();
    assert_eq!(files, known);
}
