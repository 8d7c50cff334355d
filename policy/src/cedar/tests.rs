use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::{IpAddr, Ipv4Addr},
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    str::FromStr,
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
};

use cedar_policy::{Authorizer as CedarAuthorizer, Decision, Schema};
use proptest::{prelude::*, sample::select};
use tempfile::TempDir;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Metadata, Verb},
};

use super::*;
use crate::{Action, DomainFacts, Lease, Person, groups::UNIX};

const HOST: &str = "skirit.ex.org";

/// The account that runs the tests stands for root where they do not run as root.
fn account() -> u32 {
    let folder = tempfile::tempdir().unwrap();
    folder.path().metadata().unwrap().uid()
}

struct Place {
    above: TempDir,
    folder: PathBuf,
}

impl Place {
    fn empty() -> Self {
        let above = tempfile::tempdir().unwrap();
        let folder = above.path().join("policy");
        fs::create_dir(&folder).unwrap();
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o700)).unwrap();
        Self { above, folder }
    }

    fn holding(files: &[(&str, &str)]) -> Self {
        let place = Self::empty();
        for (name, text) in files {
            place.write(name, text);
        }
        place
    }

    fn site(text: &str) -> Self {
        Self::holding(&[("site.cedar", text)])
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.folder.join(name), text).unwrap();
        self.mode(name, 0o600);
    }

    fn mode(&self, name: &str, mode: u32) {
        fs::set_permissions(self.folder.join(name), fs::Permissions::from_mode(mode)).unwrap();
    }

    fn open(&self) -> Result<Cedar, Trouble> {
        Cedar::open(&self.folder, HOST, account())
    }

    #[track_caller]
    fn cedar(&self) -> Cedar {
        self.open().unwrap()
    }

    #[track_caller]
    fn defects(&self) -> Vec<String> {
        self.open()
            .map(|cedar| cedar.summary())
            .unwrap_err()
            .defects
    }
}

fn principal(text: &str) -> Principal {
    text.parse().unwrap()
}

fn person(who: &str) -> Person {
    Person {
        principal: principal(who),
        unix_groups: UnixGroups::Unasked,
    }
}

fn in_unix_groups(who: &str, groups: &[&str]) -> Person {
    Person {
        unix_groups: UnixGroups::Known(groups.iter().map(|group| (*group).to_owned()).collect()),
        ..person(who)
    }
}

struct Domain {
    uuid: Uuid,
    name: DomainName,
    metadata: Result<Metadata, String>,
    lease: Option<Lease>,
    state: DomainState,
}

impl Domain {
    fn of(owners: &[&str]) -> Self {
        Self {
            uuid: Uuid::from_u128(7),
            name: "web".parse().unwrap(),
            metadata: Ok(Metadata {
                owners: owners.iter().map(|owner| principal(owner)).collect(),
                ..Metadata::default()
            }),
            lease: None,
            state: DomainState::Running,
        }
    }

    fn labelled(mut self, name: &str, value: &str) -> Self {
        let metadata = self.metadata.as_mut().unwrap();
        metadata
            .labels
            .insert(name.parse().unwrap(), value.parse().unwrap());
        self
    }

    fn leased(self, user: &str) -> Self {
        let lease = Lease {
            user: principal(user),
            job: "slurm/4711".to_owned(),
        };
        Self {
            lease: Some(lease),
            ..self
        }
    }

    fn on(&self) -> Subject<'_> {
        Subject::Domain(DomainFacts {
            uuid: self.uuid,
            name: &self.name,
            hypervisor: "test:///default",
            state: self.state,
            metadata: self.metadata.as_ref().map_err(String::as_str),
            lease: self.lease.as_ref(),
            revision: 1,
            stale: false,
        })
    }
}

fn query<'a>(person: &'a Person, action: impl Into<Action>, on: Subject<'a>) -> Query<'a> {
    Query {
        person,
        action: action.into(),
        on,
        peer: Ipv4Addr::LOCALHOST.into(),
        acting: None,
    }
}

fn ask(cedar: &Cedar, who: &str, action: impl Into<Action>, on: Subject<'_>) -> Opinion {
    cedar.judge(&query(&person(who), action, on))
}

fn allowed(rule: &str) -> Opinion {
    Opinion::Allow {
        rule: format!("cedar:{rule}"),
        administrator: false,
    }
}

#[track_caller]
fn denied(opinion: Opinion, why: &str) {
    match opinion {
        Opinion::Deny { reason } => {
            assert!(reason.contains(why), "{reason:?} does not say {why:?}")
        }
        other @ (Opinion::Allow { .. } | Opinion::None) => panic!("{other:?}"),
    }
}

#[test]
fn the_schema_knows_each_action_and_no_other_and_each_is_in_a_group() {
    let schema = Schema::from_str(SCHEMA).unwrap();
    let entities = schema.action_entities().unwrap();
    let groups: BTreeSet<String> = schema
        .action_groups()
        .map(|uid| AsRef::<str>::as_ref(uid.id()).to_owned())
        .collect();
    let expected = ["ask", "view", "use", "manage", "schedule", "host", "admin"];
    assert_eq!(groups, expected.map(str::to_owned).into());
    let mut known = BTreeSet::new();
    for uid in schema.actions() {
        let name: &str = uid.id().as_ref();
        if groups.contains(name) {
            continue;
        }
        known.insert(name.to_owned());
        let above = entities.ancestors(uid).unwrap().count();
        assert!(above > 0, "{name} is in no group");
    }
    let all: BTreeSet<String> = Action::all()
        .map(|action| action.name().to_owned())
        .collect();
    assert_eq!(known, all);
}

#[test]
fn the_schema_puts_each_action_to_what_the_server_asks_it_about() {
    let schema = Schema::from_str(SCHEMA).unwrap();
    let names = scene::Names::new(&schema, HOST, scene::Used::default()).unwrap();
    let mut together: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (action, kind) in names.questions(&schema) {
        together
            .entry(action.name().to_owned())
            .or_default()
            .push(kind.name());
    }
    for action in Action::all() {
        let expected: &[&str] = match action {
            Action::Own => &["Domain"],
            Action::ActFor => &["User"],
            Action::Verb(verb) => match verb {
                Verb::Whoami
                | Verb::Info
                | Verb::Explain
                | Verb::ExplainOther
                | Verb::DiscardImage
                | Verb::MigrateIn
                | Verb::LeaseEnd
                | Verb::Reconcile
                | Verb::Maintenance => &["Host"],
                // on the host first, then for each row, job, or domain of the XML; the hypervisor's messages, and a domain's
                Verb::List
                | Verb::JobList
                | Verb::JobWait
                | Verb::JobCancel
                | Verb::Dmesg
                | Verb::Create
                | Verb::Define
                | Verb::Attach
                | Verb::RestoreFrom
                | Verb::Images
                | Verb::Events
                | Verb::Status
                | Verb::LeaseList => &["Host", "Domain"],
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
                | Verb::Thaw => &["Domain"],
                Verb::Carry | Verb::Settle => unreachable!("they go by a permit"),
            },
        };
        assert_eq!(together[action.name()], expected, "{action}");
    }
}

#[test]
fn the_schema_says_its_version_first() {
    let first = SCHEMA.lines().next().unwrap();
    assert_eq!(
        first,
        format!("// xman policy schema, version {SCHEMA_VERSION}")
    );
}

#[test]
fn a_permit_allows_by_its_name_and_nothing_else_does() {
    let place = Place::site(
        r#"
@id("owners-use")
permit (principal, action in Action::"use", resource is Domain) when { resource.owners.contains(principal) };

permit (principal == User::"dave@EX.ORG", action == Action::"info", resource);
"#,
    );
    let cedar = place.cedar();
    let web = Domain::of(&["alice@EX.ORG", "bob/admin@EX.ORG"]);
    assert_eq!(
        ask(&cedar, "alice@EX.ORG", Verb::Start, web.on()),
        allowed("site.cedar:owners-use")
    );
    assert_eq!(
        ask(&cedar, "bob/admin@EX.ORG", Verb::Destroy, web.on()),
        allowed("site.cedar:owners-use")
    );
    assert_eq!(
        ask(&cedar, "dave@EX.ORG", Verb::Info, Subject::Host),
        allowed("site.cedar:5")
    );
    for (who, action) in [
        ("alice@EX.ORG", Verb::Describe),
        ("bob@EX.ORG", Verb::Start),
        ("alice@OTHER.ORG", Verb::Start),
        ("alice/admin@EX.ORG", Verb::Start),
        ("Alice@EX.ORG", Verb::Start),
    ] {
        assert_eq!(
            ask(&cedar, who, action, web.on()),
            Opinion::None,
            "{who} {action}"
        );
    }
    for on in [Subject::UnknownDomain, Subject::Host] {
        assert_eq!(ask(&cedar, "alice@EX.ORG", Verb::Start, on), Opinion::None);
    }
}

#[test]
fn a_forbid_denies_whatever_permits_and_is_named() {
    let place = Place::site(
        r#"
permit (principal, action, resource);
@id("not-production")
forbid (principal, action in Action::"use", resource) when { resource.hasTag("tier") && resource.getTag("tier") == "prod" };
"#,
    );
    let cedar = place.cedar();
    let alice = "alice@EX.ORG";
    let plain = Domain::of(&[alice]);
    let production = Domain::of(&[alice]).labelled("tier", "prod");
    assert_eq!(
        ask(&cedar, alice, Verb::Start, plain.on()),
        allowed("site.cedar:2")
    );
    denied(
        ask(&cedar, alice, Verb::Start, production.on()),
        "forbidden by site.cedar:not-production",
    );
    assert_eq!(
        ask(&cedar, alice, Verb::List, production.on()),
        allowed("site.cedar:2")
    );
}

/// Cedar passes over a policy that fails; with a forbid that would be a hole.
#[test]
fn a_policy_that_cannot_be_evaluated_denies_and_is_named() {
    let place = Place::site(
        r#"
permit (principal, action, resource);
@id("overflow")
forbid (principal, action == Action::"start", resource) when { 9223372036854775807 + 1 == 0 };
"#,
    );
    let cedar = place.cedar();
    let web = Domain::of(&[]);
    denied(
        ask(&cedar, "alice@EX.ORG", Verb::Start, web.on()),
        "policy site.cedar:overflow cannot be evaluated: ",
    );
    assert_eq!(
        ask(&cedar, "alice@EX.ORG", Verb::Pause, web.on()),
        allowed("site.cedar:2")
    );
}

#[test]
fn every_attribute_of_the_schema_is_there_to_be_compared() {
    let alice = "alice/admin@EX.ORG";
    let web = Domain {
        state: DomainState::Paused,
        ..Domain::of(&["bob@EX.ORG"])
            .labelled("tier", "prod")
            .leased("carol@OTHER.ORG")
    };
    let with_class = Domain {
        metadata: Ok(Metadata {
            class: Some("grid".parse().unwrap()),
            ..Metadata::default()
        }),
        ..Domain::of(&[])
    };
    let new_name: DomainName = "new".parse().unwrap();
    let new = |uuid| Subject::NewDomain {
        name: &new_name,
        uuid,
    };
    for (condition, on, expected) in [
        (
            r#"principal.primary == "alice" && principal.instance == "admin" && principal.realm == "EX.ORG""#,
            web.on(),
            true,
        ),
        (
            r#"resource.name == "web" && resource.state == "paused" && resource.class == """#,
            web.on(),
            true,
        ),
        (r#"resource.class == "grid""#, with_class.on(), true),
        (
            r#"resource.host.name == "skirit.ex.org" && resource.host == Host::"skirit.ex.org""#,
            web.on(),
            true,
        ),
        (
            r#"resource.hypervisor == "test:///default""#,
            web.on(),
            true,
        ),
        (
            r#"resource == Domain::"00000000-0000-0000-0000-000000000007""#,
            web.on(),
            true,
        ),
        (
            r#"resource.owners.contains(User::"bob@EX.ORG")"#,
            web.on(),
            true,
        ),
        (r#"resource.owners == [User::"bob@EX.ORG"]"#, web.on(), true),
        (r#"resource.owners.isEmpty()"#, with_class.on(), true),
        (
            r#"resource.hasTag("tier") && resource.getTag("tier") == "prod""#,
            web.on(),
            true,
        ),
        (r#"resource.hasTag("rack")"#, web.on(), false),
        (r#"resource has lease"#, with_class.on(), false),
        (
            r#"resource has lease && resource.lease.job like "slurm/*""#,
            web.on(),
            true,
        ),
        (
            r#"resource has lease && resource.lease.user.realm == "OTHER.ORG""#,
            web.on(),
            true,
        ),
        (
            r#"resource has lease && resource.lease.user in Group::"guests""#,
            web.on(),
            true,
        ),
        (
            r#"context.address.isLoopback() && !(context has acting)"#,
            web.on(),
            true,
        ),
        (
            r#"action in Action::"view" && action == Action::"dmesg""#,
            web.on(),
            true,
        ),
        (r#"Action::"start" in Action::"use""#, web.on(), true),
        (
            r#"resource.state == "unknown" && resource.name == "" && resource == Domain::"00000000-0000-0000-0000-000000000000""#,
            Subject::UnknownDomain,
            true,
        ),
        (
            r#"resource.state == "new" && resource.name == "new" && resource.owners.isEmpty()"#,
            new(None),
            true,
        ),
        (
            r#"resource == Domain::"00000000-0000-0000-0000-000000000009""#,
            new(Some(Uuid::from_u128(9))),
            true,
        ),
        (
            r#"resource == Domain::"00000000-0000-0000-0000-000000000000""#,
            new(None),
            true,
        ),
    ] {
        let text =
            format!("permit (principal, action, resource is Domain) when {{ {condition} }};");
        let place = Place::holding(&[
            ("site.cedar", &text),
            ("groups.toml", "[groups]\nguests = [\"*@OTHER.ORG\"]\n"),
        ]);
        let opinion = ask(&place.cedar(), alice, Verb::Dmesg, on);
        let expected = if expected {
            allowed("site.cedar:1")
        } else {
            Opinion::None
        };
        assert_eq!(opinion, expected, "{condition}");
    }
}

#[test]
fn an_address_of_the_old_kind_is_the_same_through_a_socket_for_both_kinds() {
    let place = Place::site(
        r#"permit (principal, action, resource) when { context.address.isInRange(ip("10.0.0.0/8")) };"#,
    );
    let cedar = place.cedar();
    let alice = person("alice@EX.ORG");
    for (peer, expected) in [
        ("10.1.2.3", allowed("site.cedar:1")),
        ("::ffff:10.1.2.3", allowed("site.cedar:1")),
        ("11.1.2.3", Opinion::None),
        ("fe80::1", Opinion::None),
    ] {
        let peer: IpAddr = peer.parse().unwrap();
        let asked = Query {
            peer,
            ..query(&alice, Verb::Info, Subject::Host)
        };
        assert_eq!(cedar.judge(&asked), expected, "{peer}");
    }
}

#[test]
fn who_acts_is_known_with_the_groups_of_the_file() {
    let place = Place::holding(&[
        (
            "site.cedar",
            r#"
permit (principal, action == Action::"act-for", resource) when { principal in Group::"portals" && resource.realm == "EX.ORG" };
permit (principal, action, resource is Host) when { context has acting && context.acting in Group::"portals" };
forbid (principal, action == Action::"act-for", resource in Group::"staff");
"#,
        ),
        (
            "groups.toml",
            "[groups]\nportals = [\"portal/web@EX.ORG\"]\nstaff = [\"carol@EX.ORG\"]\n",
        ),
    ]);
    let cedar = place.cedar();
    let (portal, alice, carol) = (
        person("portal/web@EX.ORG"),
        person("alice@EX.ORG"),
        person("carol@EX.ORG"),
    );
    let act_for = |who, other| cedar.judge(&query(who, Action::ActFor, Subject::Person(other)));
    assert_eq!(act_for(&portal, &alice), allowed("site.cedar:2"));
    assert_eq!(act_for(&alice, &portal), Opinion::None);
    denied(act_for(&portal, &carol), "forbidden by site.cedar:4");
    let behalf = Query {
        acting: Some(&portal.principal),
        ..query(&alice, Verb::Info, Subject::Host)
    };
    assert_eq!(cedar.judge(&behalf), allowed("site.cedar:3"));
    assert_eq!(
        ask(&cedar, "alice@EX.ORG", Verb::Info, Subject::Host),
        Opinion::None
    );
}

#[test]
fn unix_groups_count_where_they_are_known_and_deny_where_they_are_not() {
    let place = Place::site(r#"permit (principal in Group::"unix:wheel", action, resource);"#);
    let cedar = place.cedar();
    assert!(cedar.summary().unix_groups);
    let judge = |person: &Person| cedar.judge(&query(person, Verb::Info, Subject::Host));
    let alice = "alice@EX.ORG";
    assert_eq!(
        judge(&in_unix_groups(alice, &["users", "wheel"])),
        allowed("site.cedar:1")
    );
    assert_eq!(judge(&in_unix_groups(alice, &["users"])), Opinion::None);
    denied(judge(&person(alice)), "set unix-groups = true");
    let unknown = Person {
        unix_groups: UnixGroups::Unknown("the name service is silent".to_owned()),
        ..person(alice)
    };
    denied(judge(&unknown), "the name service is silent");
    let act_for = query(&unknown, Action::ActFor, Subject::Person(&unknown));
    denied(cedar.judge(&act_for), "the name service is silent");

    let other = Place::site("permit (principal, action, resource);").cedar();
    denied(
        other.judge(&query(&unknown, Verb::Info, Subject::Host)),
        "the name service is silent",
    );
    assert!(!other.summary().unix_groups);
}

#[test]
fn a_domain_whose_owners_cannot_be_read_is_denied_to_all() {
    let cedar = Place::site("permit (principal, action, resource);").cedar();
    let broken = Domain {
        metadata: Err("two elements 'owners'".to_owned()),
        ..Domain::of(&[])
    };
    for action in Action::all() {
        denied(
            ask(&cedar, "alice@EX.ORG", action, broken.on()),
            "cannot be read: two elements 'owners'",
        );
    }
}

#[test]
fn two_domains_of_one_uuid_in_one_list_are_told_apart() {
    let cedar = Place::site(
        r#"permit (principal, action == Action::"list", resource is Domain) when { resource.owners.contains(principal) };"#,
    )
    .cedar();
    let alice = person("alice@EX.ORG");
    let (mine, bobs) = (Domain::of(&["alice@EX.ORG"]), Domain::of(&["bob@EX.ORG"]));
    let queries = [
        mine.on(),
        bobs.on(),
        mine.on(),
        Subject::UnknownDomain,
        bobs.on(),
    ]
    .map(|on| query(&alice, Verb::List, on));
    let yes = allowed("site.cedar:1");
    assert_eq!(
        cedar.judge_all(&queries),
        [
            yes.clone(),
            Opinion::None,
            yes,
            Opinion::None,
            Opinion::None
        ]
    );
}

#[test]
fn what_would_have_to_be_true_is_told_for_each_way() {
    let place = Place::holding(&[
        (
            "site.cedar",
            r#"
@id("owners")
permit (principal, action in Action::"use", resource is Domain)
when { resource.state == "running" && resource.owners.contains(principal) };
@id("admins")
permit (principal in Group::"admins", action in [Action::"use", Action::"view"], resource)
unless { resource.hasTag("tier") };
@id("hosts")
permit (principal, action in Action::"host", resource is Host);
@id("mondays")
forbid (principal, action == Action::"start", resource) when { resource.name == "web" };
"#,
        ),
        ("groups.toml", "[groups]\nadmins = [\"carol@EX.ORG\"]\n"),
    ]);
    let cedar = place.cedar();
    let web = Domain::of(&["alice@EX.ORG"]).labelled("tier", "prod");
    let wants = |who: &str, verb: Verb| cedar.wants(&query(&person(who), verb, web.on()));
    assert_eq!(
        wants("bob@EX.ORG", Verb::Start),
        [
            "site.cedar:owners: resource.owners.contains(principal)",
            "site.cedar:admins: principal in Group::\"admins\", and !(resource.hasTag(\"tier\"))",
            "the forbid of site.cedar:mondays does not hold: resource.name == \"web\"",
        ]
    );
    assert_eq!(
        wants("alice@EX.ORG", Verb::Start)[1..],
        wants("bob@EX.ORG", Verb::Start)[2..]
    );
    assert_eq!(
        wants("carol@EX.ORG", Verb::List),
        ["site.cedar:admins: !(resource.hasTag(\"tier\"))"]
    );
    let info = cedar.wants(&query(&person("bob@EX.ORG"), Verb::Migrate, web.on()));
    assert_eq!(info, Vec::<String>::new());
}

#[test]
fn what_does_not_load_is_refused_with_its_place() {
    let good = "permit (principal, action, resource);";
    for (files, expected) in [
        (vec![], "holds no *.cedar file"),
        (vec![("groups.toml", "[groups]\n")], "holds no *.cedar file"),
        (vec![("notes.txt", good)], "holds no *.cedar file"),
        (vec![(".hidden.cedar", good)], "holds no *.cedar file"),
        (vec![("a.cedar", "")], "a.cedar:1:1: holds no policy"),
        (
            vec![("a.cedar", "// nothing\n")],
            "a.cedar:1:1: holds no policy",
        ),
        (
            vec![("a.cedar", "\n  permit (principal, action resource);")],
            "a.cedar:2:29: unexpected token",
        ),
        (
            vec![("a.cedar", "permit (principal, action, resource)")],
            "a.cedar:1:37: unexpected end of input",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action == Action::\"strat\", resource);",
            )],
            "a.cedar:1:30: for policy `a.cedar:1`, unrecognized action `Action::\"strat\"`",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource is Machine);",
            )],
            "unrecognized entity type `Machine`",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal is Host, action, resource);\npermit (principal, action, resource is Domain) when { resource.colour == \"red\" };",
            )],
            "a.cedar:2:55: for policy `a.cedar:2`, attribute `colour` on entity type `Domain` not found",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource is Domain) when { resource.class == 3 };",
            )],
            "a.cedar:1:55: the types ",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource is Domain) when { resource.lease.user == principal };",
            )],
            "unable to guarantee safety of access to optional attribute `lease`",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource is Domain) when { resource.getTag(\"x\") == \"y\" };",
            )],
            "a.cedar:1:55: for policy `a.cedar:1`",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal == ?principal, action, resource);",
            )],
            "a.cedar:1:1: a template",
        ),
        (
            vec![(
                "a.cedar",
                "@id(\"x\") permit (principal, action, resource);\n@id(\"x\") permit (principal, action, resource);",
            )],
            "a.cedar:2:1: @id(\"x\") stands at a.cedar:1 as well",
        ),
        (
            vec![
                (
                    "a.cedar",
                    "@id(\"x\") permit (principal, action, resource);",
                ),
                (
                    "b.cedar",
                    "@id(\"x\") permit (principal, action, resource);",
                ),
            ],
            "b.cedar:1:1: @id(\"x\") stands at a.cedar:1 as well",
        ),
        (
            vec![(
                "a.cedar",
                "@id(\"a b\") permit (principal, action, resource);",
            )],
            "a.cedar:1:1: @id(\"a b\") stands in the audit",
        ),
        (
            vec![(
                "a.cedar",
                "@id(\"a\\nb\") permit (principal, action, resource);",
            )],
            "a.cedar:1:1: @id(\"a\\nb\") stands in the audit",
        ),
        (
            vec![("a.cedar", "@id permit (principal, action, resource);")],
            "@id(\"\") stands in the audit",
        ),
        (
            vec![(
                "a.cedar",
                "@id(\"12\") permit (principal, action, resource);",
            )],
            "looks like a line's number",
        ),
        (
            vec![(
                "a.cedar",
                "@id(\"aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa\") permit (principal, action, resource);",
            )],
            "at most 64 letters",
        ),
        (
            vec![("a b.cedar", good)],
            "a b.cedar: a file's name stands in the audit",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource) when { context has acting && context.acting in Group::\"unix:wheel\" };",
            )],
            "a.cedar:1:1: asks for a Unix group (unix:...) of somebody else",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource is Domain) when { resource has lease && resource.lease.user in [Group::\"unix:v\", Group::\"unix:w\"] };",
            )],
            "asks for a Unix group",
        ),
        (
            vec![(
                "a.cedar",
                "\nforbid (principal == User::\"alice\", action, resource);",
            )],
            "a.cedar:2:1: User::\"alice\" is no full principal",
        ),
        (
            vec![(
                "a.cedar",
                "permit (principal, action, resource) unless { principal in Group::\"wheel\" };",
            )],
            "a.cedar:1:1: Group::\"wheel\" is not defined in groups.toml",
        ),
        (
            vec![(
                "a.cedar",
                "forbid (principal, action, resource == Domain::\"web\");",
            )],
            "a.cedar:1:1: Domain::\"web\" is no UUID",
        ),
        (
            vec![
                ("a.cedar", good),
                ("groups.toml", "[groups]\na = [\"alice\"]\n"),
            ],
            "groups.toml:2:6: 'alice' names no realm",
        ),
        (
            vec![
                ("a.cedar", good),
                ("groups.toml", "[groups]\na = [\"@a\"]\n"),
            ],
            "in a circle",
        ),
        (
            vec![("a.cedar", good), ("groups.toml", "nonsense")],
            "groups.toml:1:",
        ),
    ] {
        let defects = Place::holding(&files).defects();
        assert!(
            defects.iter().any(|defect| defect.contains(expected)),
            "{files:?}: {defects:?}"
        );
        for defect in &defects {
            assert!(!defect.contains('\n') && defect.len() < 1000, "{defect:?}");
        }
    }
}

#[test]
fn all_that_is_wrong_is_told_at_once() {
    let place = Place::holding(&[
        (
            "a.cedar",
            "permit (principal, action, resource) when { 1 };\npermit (principal, action == Action::\"strat\", resource);",
        ),
        ("b.cedar", "permit (;"),
        ("groups.toml", "[groups]\na = [\"alice\", \"@b\"]\n"),
    ]);
    let defects = place.defects();
    let places: Vec<&str> = defects
        .iter()
        .map(|defect| defect.split(": ").next().unwrap())
        .collect();
    assert_eq!(
        places,
        [
            "a.cedar:1:45",
            "a.cedar:2:30",
            "b.cedar:1:9",
            "groups.toml:2:6",
            "groups.toml:2:15"
        ]
    );

    let many = "permit (principal, action == Action::\"strat\", resource);\n".repeat(300);
    let defects = Place::site(&many).defects();
    assert_eq!(defects.len(), MAX_TOLD + 1);
    assert_eq!(defects.last().unwrap(), "and 200 more");
}

#[test]
fn what_others_could_have_written_is_refused() {
    let place = Place::site("permit (principal, action, resource);");
    for (name, mode) in [
        ("site.cedar", 0o620),
        ("site.cedar", 0o602),
        ("", 0o720),
        ("", 0o702),
    ] {
        place.mode(name, mode);
        let defects = place.defects();
        assert!(
            defects[0].contains("writable by its group or by everybody: chmod go-w"),
            "{defects:?}"
        );
        place.mode(name, if name.is_empty() { 0o755 } else { 0o644 });
        place.cedar();
    }
}

#[test]
fn folder_and_files_are_roots_or_the_accounts() {
    assert_eq!(account(), 0, "this test changes owners, so it runs as root");
    let place = Place::site("permit (principal, action, resource);");
    for path in [place.folder.clone(), place.folder.join("site.cedar")] {
        chown(&path, Some(12345), None).unwrap();
        let defects = place.defects();
        assert!(
            defects[0].contains("belongs to uid 12345, neither to root"),
            "{defects:?}"
        );
        assert!(Cedar::open(&place.folder, HOST, 12345).is_ok());
        chown(&path, Some(0), None).unwrap();
    }
}

#[test]
fn only_regular_files_will_do_and_none_makes_the_reader_wait() {
    let place = Place::site("permit (principal, action, resource);");
    let path = place.folder.join("b.cedar");
    symlink(place.folder.join("site.cedar"), &path).unwrap();
    assert!(place.defects()[0].contains("is a symbolic link"));
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    assert!(place.defects()[0].contains("is not a regular file"));
    fs::remove_dir(&path).unwrap();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mkfifoat(rustix::fs::CWD, &path, mode).unwrap();
    assert!(place.defects()[0].contains("is not a regular file"));
    fs::remove_file(&path).unwrap();
    let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    assert!(place.defects()[0].contains("is not a regular file"));
}

#[test]
fn folders_that_are_none_too_long_or_too_many_are_refused() {
    let place = Place::site("permit (principal, action, resource);");
    let missing = Cedar::open(place.folder.join("none"), HOST, account()).unwrap_err();
    assert!(
        missing.to_string().contains("there is no folder"),
        "{missing}"
    );
    let file = Cedar::open(place.folder.join("site.cedar"), HOST, account()).unwrap_err();
    assert!(
        file.to_string().contains("cannot be read: Not a directory"),
        "{file}"
    );

    place.write(
        "long.cedar",
        " ".repeat(usize::try_from(MAX_FILE).unwrap() + 1),
    );
    assert!(place.defects()[0].contains("has more than 262144 bytes"));
    place.write("long.cedar", b"// \xff\n");
    assert!(place.defects()[0].contains("is not UTF-8"));
    fs::remove_file(place.folder.join("long.cedar")).unwrap();
    for n in 0..MAX_FILES {
        place.write(&format!("f{n}.cedar"), "");
    }
    assert!(place.defects()[0].contains("more than 200 files"));

    let many = Place::site(&"permit (principal, action, resource);\n".repeat(MAX_POLICIES + 1));
    assert!(many.defects()[0].contains("at most 2000 policies"));
}

/// What nests must not end the process by the end of its stack, neither when it is read nor when it is asked.
#[test]
fn what_nests_too_deep_or_is_too_long_is_refused_and_the_rest_is_judged() {
    let policy =
        |condition: &str| format!("permit (principal, action, resource) when {{ {condition} }};");
    for (condition, why) in [
        (
            format!("{}true{}", "(".repeat(20_000), ")".repeat(20_000)),
            "nest deeper than 32",
        ),
        (format!("{}true", "(".repeat(20_000)), "nest deeper than 32"),
        (
            format!("true{}", " && true".repeat(20_000)),
            "more than 8192 bytes",
        ),
        (format!("{}true", "!".repeat(8_000)), "too many"),
        (format!("1{} == 0", "+1".repeat(3_900)), ""),
        (format!("true{}", "&&1==1".repeat(1_300)), ""),
        (format!("{}true", "if true then true else ".repeat(340)), ""),
        (format!("context{}", ".a".repeat(4_000)), ""),
        (format!("[{}].contains(1)", "1,".repeat(4_000)), ""),
    ] {
        let shown: String = condition.chars().take(40).collect();
        match Place::site(&policy(&condition)).open() {
            Ok(cedar) => {
                let opinion = ask(&cedar, "alice@EX.ORG", Verb::Info, Subject::Host);
                println!("{shown}: {opinion:?}");
                let asked = person("alice@EX.ORG");
                cedar.wants(&query(&asked, Verb::Info, Subject::Host));
                assert!(why.is_empty(), "{shown}");
            }
            Err(trouble) => assert!(trouble.to_string().contains(why), "{shown}: {trouble}"),
        }
    }
    let strings = policy(
        "\"(((((((((((((((((((((((((((((((((((((((((((\\\";\" == \"\" // ((((((((((((((((((((((((((((((((((((((((((\n",
    );
    Place::site(&strings).cedar();
}

#[test]
fn what_is_hardly_meant_is_warned_about() {
    for (text, expected) in [
        (
            r#"permit (principal, action == Action::"info", resource is Domain);"#,
            "unable to find an applicable action",
        ),
        (
            r#"permit (principal, action, resource) when { false };"#,
            "impossible",
        ),
        (
            r#"permit (principal, action in Action::"ask", resource);"#,
            "reaches each domain as well; write `resource is Host`",
        ),
        (
            r#"permit (principal, action in [Action::"host"], resource);"#,
            "reaches each domain as well",
        ),
    ] {
        let warnings = Place::site(text).cedar().summary().warnings;
        assert!(
            warnings.iter().any(|warning| warning.contains(expected)),
            "{text}: {warnings:?}"
        );
    }
    for text in [
        r#"permit (principal, action in Action::"ask", resource is Host);"#,
        r#"permit (principal, action in [Action::"ask", Action::"view"], resource);"#,
        r#"permit (principal == User::"alice@EX.ORG", action, resource == Domain::"123e4567-e89b-12d3-a456-426614174000");"#,
        r#"permit (principal in Group::"unix:wheel", action, resource);"#,
    ] {
        assert_eq!(
            Place::site(text).cedar().summary().warnings,
            Vec::<String>::new(),
            "{text}"
        );
    }
}

fn ask_anew(cedar: &Cedar, action: Verb) -> Opinion {
    cedar.refresh();
    ask(cedar, "alice@EX.ORG", action, Subject::Host)
}

fn site_of(action: &str) -> String {
    format!("permit (principal, action == Action::\"{action}\", resource);")
}

#[test]
fn changes_count_at_once_however_they_are_made() {
    let place = Place::site(&site_of("info"));
    let cedar = place.cedar();
    assert_eq!(ask_anew(&cedar, Verb::Info), allowed("site.cedar:1"));
    place.write("site.cedar", site_of("list"));
    assert_eq!(ask_anew(&cedar, Verb::Info), Opinion::None);
    assert_eq!(ask_anew(&cedar, Verb::List), allowed("site.cedar:1"));
    place.write("other.cedar", site_of("info"));
    assert_eq!(ask_anew(&cedar, Verb::Info), allowed("other.cedar:1"));
    fs::remove_file(place.folder.join("other.cedar")).unwrap();
    assert_eq!(ask_anew(&cedar, Verb::Info), Opinion::None);
    place.write("groups.toml", "[groups]\n");
    assert_eq!(
        cedar.refresh().unwrap().summary,
        format!(
            "policies in {}: 1 policies in 1 files, 0 groups",
            place.folder.display()
        )
    );
}

#[test]
fn a_group_that_changes_counts_at_once() {
    let place = Place::holding(&[
        (
            "site.cedar",
            r#"permit (principal in Group::"staff", action, resource);"#,
        ),
        ("groups.toml", "[groups]\nstaff = [\"alice@EX.ORG\"]\n"),
    ]);
    let cedar = place.cedar();
    assert_eq!(ask_anew(&cedar, Verb::Info), allowed("site.cedar:1"));
    place.write("groups.toml", "[groups]\nstaff = [\"carol@EX.ORG\"]\n");
    assert_eq!(ask_anew(&cedar, Verb::Info), Opinion::None);
}

/// Same length, and as many changes as fit into one step of the file system's clock.
#[test]
fn quick_changes_that_leave_the_same_time_stamp_are_not_missed() {
    let place = Place::site(&site_of("info"));
    let cedar = place.cedar();
    for round in 0..100 {
        let verb = if round % 2 == 0 { "list" } else { "info" };
        fs::write(place.folder.join("site.cedar"), site_of(verb)).unwrap();
        let expected = if round % 2 == 0 {
            Opinion::None
        } else {
            allowed("site.cedar:1")
        };
        assert_eq!(ask_anew(&cedar, Verb::Info), expected, "round {round}");
    }
}

#[test]
fn what_does_not_load_leaves_the_old_rules_in_force_and_is_told_once() {
    let place = Place::site(&site_of("info"));
    let cedar = place.cedar();
    let breakages: [(&str, &dyn Fn()); 4] = [
        ("unexpected", &|| place.write("site.cedar", "permit (")),
        ("names no realm", &|| {
            place.write("site.cedar", site_of("list"));
            place.write("groups.toml", "[groups]\na = [\"alice\"]\n");
        }),
        ("chmod go-w", &|| place.mode("site.cedar", 0o666)),
        ("there is no folder", &|| {
            fs::rename(&place.folder, place.above.path().join("gone")).unwrap()
        }),
    ];
    for (why, break_it) in breakages {
        break_it();
        let reload = cedar.refresh().unwrap();
        assert!(
            !reload.usable && reload.summary.starts_with("THE OLD POLICIES STAY IN FORCE"),
            "{reload:?}"
        );
        assert!(
            reload.warnings.iter().any(|warning| warning.contains(why)),
            "{reload:?}"
        );
        assert_eq!(cedar.refresh(), None, "{why}");
        assert_eq!(
            ask_anew(&cedar, Verb::Info),
            allowed("site.cedar:1"),
            "{why}"
        );
        assert_eq!(ask_anew(&cedar, Verb::List), Opinion::None, "{why}");
    }
    fs::rename(place.above.path().join("gone"), &place.folder).unwrap();
    place.mode("site.cedar", 0o600);
    fs::remove_file(place.folder.join("groups.toml")).unwrap();
    assert!(cedar.refresh().unwrap().summary.starts_with("policies in "));
    assert_eq!(ask_anew(&cedar, Verb::Info), Opinion::None);
    assert_eq!(ask_anew(&cedar, Verb::List), allowed("site.cedar:1"));
}

#[test]
fn what_was_broken_and_is_as_before_is_told_as_well() {
    let place = Place::site(&site_of("info"));
    let cedar = place.cedar();
    place.mode("site.cedar", 0o666);
    assert!(cedar.refresh().unwrap().summary.starts_with("THE OLD"));
    place.mode("site.cedar", 0o600);
    assert!(cedar.refresh().unwrap().summary.starts_with("policies in "));
    assert_eq!(cedar.refresh(), None);
}

/// Refreshes until the backend trusts the folder's stamps.
fn settle(cedar: &Cedar) {
    let end = Instant::now() + 3 * SETTLING;
    while !cedar.is_fresh() {
        assert!(Instant::now() < end, "the folder never settles");
        std::thread::sleep(Duration::from_millis(50));
        cedar.refresh();
    }
}

#[test]
fn a_folder_that_rests_is_read_no_more_and_every_change_wakes_it() {
    let place = Place::site(&site_of("info"));
    let cedar = place.cedar();
    settle(&cedar);
    let before = cedar.current();
    assert_eq!(cedar.refresh(), None);
    assert!(Arc::ptr_eq(&before, &cedar.current()), "it was read again");

    let file = place.folder.join("site.cedar");
    let times = fs::metadata(&file).unwrap().modified().unwrap();
    fs::write(&file, site_of("list")).unwrap();
    File::options()
        .write(true)
        .open(&file)
        .unwrap()
        .set_modified(times)
        .unwrap();
    assert_eq!(ask_anew(&cedar, Verb::Info), Opinion::None);
    settle(&cedar);
    place.write("new.cedar", site_of("info"));
    assert_eq!(ask_anew(&cedar, Verb::Info), allowed("new.cedar:1"));
}

/// Each of two folders is complete: `lead` permits what `follow` of the other would forbid. A set of half of each would deny or say nothing.
#[test]
fn a_folder_that_is_swapped_under_many_deciders_is_always_one_or_the_other() {
    let above = tempfile::tempdir().unwrap();
    for (name, action, other) in [("one", "info", "list"), ("two", "list", "info")] {
        let folder = above.path().join(name);
        fs::create_dir(&folder).unwrap();
        let write = |file: &str, text: String| fs::write(folder.join(file), text).unwrap();
        write(
            "a.cedar",
            format!(
                "permit (principal in Group::\"{name}\", action == Action::\"{action}\", resource);"
            ),
        );
        write(
            "b.cedar",
            format!("forbid (principal, action == Action::\"{other}\", resource);"),
        );
        write(
            "groups.toml",
            format!("[groups]\n{name} = [\"alice@EX.ORG\"]\n"),
        );
    }
    let link = above.path().join("policy");
    let swap = |to: &str| {
        let new = above.path().join("link");
        symlink(above.path().join(to), &new).unwrap();
        fs::rename(&new, &link).unwrap();
    };
    swap("one");
    let cedar = Cedar::open(&link, HOST, account()).unwrap();
    let done = AtomicBool::new(false);
    let alice = person("alice@EX.ORG");
    // How often each of the two was seen.
    let seen = [AtomicUsize::new(0), AtomicUsize::new(0)];
    std::thread::scope(|scope| {
        let _ends = Ends(&done);
        for _ in 0..4 {
            scope.spawn(|| {
                while !done.load(Ordering::Relaxed) {
                    let reload = cedar.refresh();
                    assert!(
                        reload.as_ref().is_none_or(|reload| reload.usable),
                        "{reload:?}"
                    );
                    let both =
                        [Verb::Info, Verb::List].map(|verb| query(&alice, verb, Subject::Host));
                    let which = match cedar.judge_all(&both).as_slice() {
                        [Opinion::Allow { .. }, Opinion::Deny { .. }] => 0,
                        [Opinion::Deny { .. }, Opinion::Allow { .. }] => 1,
                        other => panic!("half of each: {other:?}"),
                    };
                    seen[which].fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        for round in 0..200 {
            let (name, seen) = if round % 2 == 0 {
                ("two", &seen[1])
            } else {
                ("one", &seen[0])
            };
            let before = seen.load(Ordering::Relaxed);
            swap(name);
            let end = Instant::now() + Duration::from_secs(60);
            while seen.load(Ordering::Relaxed) == before {
                assert!(Instant::now() < end, "{name} was not seen");
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    });
    assert_eq!(cedar.current().trouble, None);
}

/// Lets the threads of a test end, also where it fails.
struct Ends<'a>(&'a AtomicBool);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Policies of which some match, some do not, and some fail when they are evaluated.
fn some_policies() -> impl Strategy<Value = String> {
    let principal = select(vec![
        "principal",
        "principal == User::\"alice@EX.ORG\"",
        "principal in Group::\"staff\"",
        "principal in User::\"bob/admin@EX.ORG\"",
        "principal is User",
        "principal is User in Group::\"outer\"",
        "principal in Group::\"unix:wheel\"",
        "principal is Host",
    ]);
    let action = select(vec![
        "action",
        "action == Action::\"list\"",
        "action in Action::\"view\"",
        "action in [Action::\"use\", Action::\"admin\"]",
        "action in [Action::\"act-for\", Action::\"info\"]",
        "action in [Action::\"list\"]",
    ]);
    let resource = select(vec![
        "resource",
        "resource is Domain",
        "resource is Host",
        "resource == Domain::\"00000000-0000-0000-0000-000000000007\"",
        "resource in Domain::\"00000000-0000-0000-0000-000000000000\"",
        "resource is User",
        "resource in Group::\"staff\"",
        "resource is User in Group::\"unix:wheel\"",
        "resource == Host::\"skirit.ex.org\"",
        "resource is Domain in Host::\"skirit.ex.org\"",
    ]);
    let condition = select(vec![
        "",
        "when { true }",
        "unless { true }",
        "when { 9223372036854775807 + 1 == 0 }",
        "unless { principal.realm == \"EX.ORG\" }",
        "when { principal.instance == \"admin\" || 9223372036854775807 + 1 == 0 }",
        "when { context.address.isLoopback() }",
        "when { context has acting && context.acting.realm == \"EX.ORG\" } unless { context.acting == principal }",
        "when { action in Action::\"view\" }",
        "when { Action::\"start\" in Action::\"use\" && action == Action::\"list\" }",
        "when { principal in [Group::\"outer\", User::\"alice@EX.ORG\"] }",
        "when { resource is Domain && resource.owners.contains(principal) }",
        "when { resource is Domain && resource has lease && resource.lease.user == principal && resource.lease.job like \"sl*\" }",
        "when { resource is Domain && resource.hasTag(\"a\\\"b\\u{1F600}\") }",
        "when { resource is Domain && (if resource.hasTag(\"tier\") then resource.getTag(\"tier\") == \"prod\" else resource.class == \"\") }",
        "when { resource is Domain && resource.name like \"w\\*\" } unless { resource.state == \"off\" && principal.primary != \"bob\" }",
        "when { {\"a\": -1, \"b c\": [1, 2]}.a < 0 && [1, 2].containsAny([2]) && !(1 * 2 > 3 - -4) }",
    ]);
    let effect = select(vec!["permit", "permit", "forbid"]);
    let policy = (effect, principal, action, resource, condition).prop_map(
        |(effect, principal, action, resource, condition)| {
            format!("{effect} ({principal}, {action}, {resource}) {condition};\n")
        },
    );
    proptest::collection::vec(policy, 1..12).prop_map(|policies| policies.concat())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    /// What is compared here and what Cedar evaluates come to what Cedar's own authorizer says about all policies, for each question alone and for
    /// many at once.
    #[test]
    fn opinions_are_those_of_cedars_own_authorizer(
        policies in some_policies(),
        whos in proptest::collection::vec((select(vec!["alice@EX.ORG", "bob/admin@EX.ORG", "carol@OTHER.ORG"]), any::<bool>()), 1..3),
        owner in select(vec!["alice@EX.ORG", "bob/admin@EX.ORG"]),
        tier in select(vec!["", "prod", "test"]),
        leased in any::<bool>(),
        acting in any::<bool>(),
    ) {
        let texts = [
            ("groups.toml".to_owned(), "[groups]\nstaff = [\"*/admin@EX.ORG\"]\nouter = [\"@staff\"]\n".to_owned()),
            ("site.cedar".to_owned(), policies),
        ];
        let rules = match Rules::new(&texts, HOST) {
            Ok(rules) => Arc::new(rules),
            // a condition that does not fit its head; what is refused is not asked
            Err(_) => return Ok(()),
        };
        let cedar = Cedar {
            folder: PathBuf::new(),
            host: HOST.to_owned(),
            account: 0,
            current: RwLock::new(Arc::new(Reading { rules: Arc::clone(&rules), texts: None, trouble: None, version: None, settled: false })),
            reading: Mutex::new(()),
        };
        let people: Vec<Person> = whos.iter().map(|(who, wheel)| in_unix_groups(who, if *wheel { &["wheel"] } else { &[] })).collect();
        let mut web = Domain::of(&[owner]);
        if !tier.is_empty() {
            web = web.labelled("tier", tier);
        }
        if leased {
            web = web.leased("alice@EX.ORG");
        }
        let name: DomainName = "new".parse().unwrap();
        let subjects = [web.on(), Subject::Host, Subject::UnknownDomain, Subject::NewDomain { name: &name, uuid: Some(web.uuid) }, Subject::Person(&people[0])];
        let portal = principal("portal@EX.ORG");
        let actions = [Verb::List.into(), Verb::Dmesg.into(), Verb::Start.into(), Verb::Info.into(), Action::ActFor];
        let queries: Vec<Query<'_>> = people.iter()
            .flat_map(|person| actions.iter().flat_map(move |action| subjects.map(|on| (person, *action, on))))
            .map(|(person, action, on)| Query { acting: acting.then_some(&portal), ..query(person, action, on) })
            .collect();
        let schema = Schema::from_str(SCHEMA).unwrap();
        let everything = scene::Used {
            attributes: ["primary", "instance", "realm", "name", "owners", "class", "state", "host", "hypervisor", "lease", "address"].map(str::to_owned).into(),
            tags: true,
            actions: true,
        };
        let names = scene::Names::new(&schema, HOST, everything).unwrap();
        let together = cedar.judge_all(&queries);
        for (asked, at_once) in queries.iter().zip(together) {
            prop_assert_eq!(&cedar.judge(asked), &at_once);
            let expected = by_the_book(&rules, &names, &schema, asked);
            let word = match at_once {
                Opinion::Allow { .. } => "allow",
                Opinion::Deny { ref reason } if reason.contains("cannot be evaluated") => "error",
                Opinion::Deny { .. } => "forbid",
                Opinion::None => "none",
            };
            prop_assert_eq!(word, expected, "{:?}", asked);
        }
    }
}

/// What Cedar says to a question about all policies and with all entities, for what the schema puts together.
fn by_the_book(
    rules: &Rules,
    names: &scene::Names,
    schema: &Schema,
    asked: &Query<'_>,
) -> &'static str {
    if rules.about(asked.action, Kind::of(&asked.on)).is_none() {
        return "none";
    }
    let asker = Asker::new(asked, names, &rules.groups).unwrap();
    let scene = Scene::new(&asker, &[*asked], names, &rules.groups).unwrap();
    let (_, _, request) = scene.requests().next().unwrap();
    let all = scene.entities().clone();
    let checked = Request::new(
        request.principal().unwrap().clone(),
        request.action().unwrap().clone(),
        request.resource().unwrap().clone(),
        request.context().unwrap().clone(),
        Some(schema),
    );
    let conforming =
        cedar_policy::Entities::from_entities(all.iter().cloned(), Some(schema)).unwrap();
    let answer = CedarAuthorizer::new().is_authorized(&checked.unwrap(), &rules.whole, &conforming);
    let diagnostics = answer.diagnostics();
    match answer.decision() {
        _ if diagnostics.errors().next().is_some() => "error",
        Decision::Allow => "allow",
        Decision::Deny if diagnostics.reason().next().is_some() => "forbid",
        Decision::Deny => "none",
    }
}

#[test]
fn names_with_the_prefix_of_unix_groups_cannot_come_from_the_file() {
    let place = Place::holding(&[
        ("site.cedar", "permit (principal, action, resource);"),
        (
            "groups.toml",
            &format!("[groups]\n\"{UNIX}wheel\" = [\"mallory@EX.ORG\"]\n"),
        ),
    ]);
    assert!(place.defects()[0].contains("names with 'unix:' in front"));
}
