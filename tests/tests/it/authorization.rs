//! Users control what is theirs: site policies, owners, labels and classes, acting for others, and why.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, symlink},
        net::{UnixListener, UnixStream},
    },
    path::Path,
};

use xman_tests::{
    Guest, Host, HostBuilder, Hosts, Libvirtd, Outcome, PATIENCE, Process, Realm, Records, Signal,
    User, command, eventually,
};

/// Who may do what at the site of these tests.
const SITE: &str = r#"
@id("everybody-asks")
permit (principal, action in Action::"ask", resource is Host)
when { principal.realm == "XMAN.TEST" };

@id("owners-use")
permit (principal, action in [Action::"view", Action::"use"], resource is Domain)
when { resource.owners.contains(principal) };

@id("job-users-use")
permit (principal, action in [Action::"view", Action::"use"], resource is Domain)
when { resource has lease && resource.lease.user == principal };

@id("operators")
permit (principal in Group::"operators", action in [Action::"view", Action::"use", Action::"manage", Action::"schedule"], resource is Domain);

@id("creators")
permit (principal in Group::"creators", action in [Action::"create", Action::"define"], resource);

@id("creators-own")
permit (principal in Group::"creators", action == Action::"own", resource is Domain);

@id("portal")
permit (principal == User::"portal/web@XMAN.TEST", action == Action::"act-for", resource is User);
"#;

const GROUPS: &str = r#"
[groups]
operators = ["oscar@XMAN.TEST"]
creators = ["carol@XMAN.TEST"]
"#;

/// The domain that libvirt's test driver is born with.
pub(crate) const TEST_DOMAIN: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
pub(crate) const FAILED: i32 = 1;
const PARTLY: i32 = 5;
const CONFIG: i32 = 78;

/// A host with these rules, and `root/admin` as its administrator.
pub(crate) fn site_of(host: HostBuilder) -> HostBuilder {
    host.k5login(["root/admin"])
        .policy("site.cedar", SITE)
        .policy("groups.toml", GROUPS)
}

/// A host with real guests, an administrator, and users with rights on some of them.
pub(crate) struct Site {
    realm: &'static Realm,
    pub(crate) admin: User,
    pub(crate) host: Host,
    pub(crate) libvirtd: Libvirtd,
}

impl Site {
    #[track_caller]
    fn new(guests: &[&Guest]) -> Self {
        Self::with(guests, |host| host)
    }

    #[track_caller]
    pub(crate) fn with(
        guests: &[&Guest],
        configure: impl FnOnce(HostBuilder) -> HostBuilder,
    ) -> Self {
        let realm = Realm::shared();
        let libvirtd = Libvirtd::new();
        for guest in guests {
            libvirtd.run(guest);
        }
        let host = configure(site_of(Host::builder()))
            .beside(&libvirtd)
            .start(realm);
        let site = Self {
            realm,
            admin: realm.user("root/admin"),
            host,
            libvirtd,
        };
        site.wait_for(guests);
        site
    }

    #[track_caller]
    fn wait_for(&self, guests: &[&Guest]) {
        eventually("xmand has read libvirt", PATIENCE, || {
            let names = self.admin.rxm(&self.host, ["-o", "name", "list"]).stdout();
            guests
                .iter()
                .all(|guest| names.contains(guest.name()))
                .then_some(())
        });
    }

    #[track_caller]
    pub(crate) fn does(&self, words: &[&str]) -> Outcome {
        self.admin.rxm(&self.host, words).success()
    }

    pub(crate) fn user(&self, name: &str) -> User {
        self.realm.user(name)
    }

    /// What a caller sees, by name.
    #[track_caller]
    fn seen_by(&self, user: &User) -> Vec<String> {
        let rows = user
            .rxm(&self.host, ["-o", "json", "list"])
            .success()
            .json();
        rows.as_array()
            .unwrap()
            .iter()
            .map(|row| row["name"].as_str().unwrap().to_owned())
            .collect()
    }

    #[track_caller]
    fn row(&self, name: &str) -> serde_json::Value {
        row(&self.admin, &self.host, name)
    }
}

#[track_caller]
fn row(admin: &User, host: &Host, name: &str) -> serde_json::Value {
    let listed = admin.rxm(host, ["-o", "json", "list", name]);
    let rows = listed.json();
    // The row of a silent libvirt is shown, and that it is silent is told.
    let is_whole = rows.get(1).is_none();
    listed.code(if is_whole { 0 } else { PARTLY });
    rows.get(0)
        .unwrap_or_else(|| panic!("{name} is not listed: {rows}"))
        .clone()
}

fn site_on_test_driver() -> (User, Host) {
    let realm = Realm::shared();
    let host = site_of(Host::builder()).start(realm);
    (realm.user("root/admin"), host)
}

#[test]
fn users_control_what_is_theirs_and_see_nothing_else() {
    let (hers, his) = (Guest::tiny("hers"), Guest::tiny("his"));
    let site = Site::new(&[&hers, &his]);
    let (alice, bob) = (site.user("alice"), site.user("bob"));
    assert!(site.seen_by(&alice).is_empty());
    site.does(&["owner", "hers", "+alice@XMAN.TEST"]);
    site.does(&["owner", "his", "+bob@XMAN.TEST"]);
    assert_eq!(site.seen_by(&alice), ["hers"]);
    assert_eq!(site.seen_by(&bob), ["his"]);

    alice.rxm(&site.host, ["pause", "hers"]).success();
    assert_eq!(site.libvirtd.state("hers"), "paused");
    alice.rxm(&site.host, ["unpause", "hers"]).success();
    site.host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "verb=\"pause\"",
        "domain=\"hers\"",
        "verdict=\"allow\"",
        "rule=\"cedar:site.cedar:owners-use\"",
        "outcome=\"ok\"",
    ]);

    let uuid = his.uuid().to_string();
    alice.rxm(&site.host, ["pause", &uuid]).denied();
    assert_eq!(site.libvirtd.state("his"), "running");
    site.host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "verb=\"pause\"",
        "domain=\"his\"",
        "verdict=\"deny\"",
        "outcome=\"denied\"",
    ]);
    // To use is not to manage.
    alice.rxm(&site.host, ["mem-set", "hers", "16MiB"]).denied();
    alice
        .rxm(&site.host, ["owner", "hers", "+bob@XMAN.TEST"])
        .denied();
    alice.rxm(&site.host, ["class", "hers", "grid"]).denied();

    site.does(&["owner", "hers", "-alice@XMAN.TEST", "+bob@XMAN.TEST"]);
    alice
        .rxm(&site.host, ["pause", &hers.uuid().to_string()])
        .denied();
    assert_eq!(site.seen_by(&bob), ["hers", "his"]);
}

#[test]
fn a_jobs_user_uses_its_domain_until_the_lease_ends() {
    let node = Guest::tiny("node");
    let site = Site::new(&[&node]);
    let alice = site.user("alice");
    let uuid = node.uuid().to_string();
    alice.rxm(&site.host, ["pause", &uuid]).denied();
    site.does(&[
        "label",
        "node",
        "lease-user=alice@XMAN.TEST",
        "lease-job=slurm/4711",
    ]);
    alice.rxm(&site.host, ["pause", "node"]).success();
    site.host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "verb=\"pause\"",
        "rule=\"cedar:site.cedar:job-users-use\"",
        "outcome=\"ok\"",
    ]);
    site.does(&["label", "node", "lease-user-", "lease-job-"]);
    alice.rxm(&site.host, ["unpause", &uuid]).denied();
    assert!(site.seen_by(&alice).is_empty());
    assert_eq!(site.libvirtd.state("node"), "paused");
}

#[test]
fn a_domain_that_is_not_there_looks_like_a_forbidden_one() {
    let (mine, secret) = (Guest::tiny("mine"), Guest::tiny("secret"));
    let site = Site::new(&[&mine, &secret]);
    site.does(&["owner", "mine", "+alice@XMAN.TEST"]);
    // The operator may do everything to every domain by a policy that one domain is excepted from.
    site.host.write_policy(
        "except.cedar",
        "@id(\"not-secret\")\nforbid (principal, action, resource is Domain) when { resource.name == \"secret\" };\n",
    );
    let (alice, oscar) = (site.user("alice"), site.user("oscar"));
    for user in [&alice, &oscar] {
        for verb in ["describe", "pause", "destroy", "dmesg"] {
            let forbidden = user
                .rxm(&site.host, [verb, &format!("localhost/{}", secret.uuid())])
                .denied();
            let missing = user
                .rxm(
                    &site.host,
                    [verb, "localhost/00000000-0000-4000-8000-000000000001"],
                )
                .denied();
            let plain = |outcome: &Outcome, uuid: &str| outcome.stderr().replace(uuid, "X");
            assert_eq!(
                plain(&forbidden, &secret.uuid().to_string()),
                plain(&missing, "00000000-0000-4000-8000-000000000001"),
                "{verb}"
            );
        }
        let forbidden = user.rxm(&site.host, ["describe", "localhost/secret"]);
        let missing = user.rxm(&site.host, ["describe", "localhost/nobodys"]);
        assert_eq!(
            forbidden.stderr().replace("secret", "X"),
            missing.stderr().replace("nobodys", "X")
        );
    }
    let info = alice.rxm(&site.host, ["-o", "json", "info"]);
    info.denied();
    site.host.write_policy(
        "info.cedar",
        "@id(\"info\")\npermit (principal, action == Action::\"info\", resource is Host);\n",
    );
    let info = alice
        .rxm(&site.host, ["-o", "json", "info"])
        .success()
        .json();
    assert_eq!(
        info[0]["domains"], 1,
        "only what she may see counts: {info}"
    );
    assert_eq!(site.does(&["-o", "json", "info"]).json()[0]["domains"], 2);
}

#[test]
fn completion_and_whoami_tell_what_the_caller_may_and_no_more() {
    let (mine, other) = (Guest::tiny("mine"), Guest::tiny("other"));
    let site = Site::new(&[&mine, &other]);
    let alice = site.user("alice");
    let verbs = |user: &User| -> Vec<String> {
        let whoami = user
            .rxm(&site.host, ["-o", "json", "whoami"])
            .success()
            .json();
        serde_json::from_value(whoami[0]["verbs"].clone()).unwrap()
    };
    assert!(!verbs(&alice).contains(&"pause".to_owned()));
    site.does(&["owner", "mine", "+alice@XMAN.TEST"]);
    let may = verbs(&alice);
    assert!(
        may.contains(&"pause".to_owned()) && may.contains(&"list".to_owned()),
        "{may:?}"
    );
    for forbidden in [
        "create",
        "owner",
        "info",
        "describe-secrets",
        "explain-other",
    ] {
        assert!(!may.contains(&forbidden.to_owned()), "{forbidden}: {may:?}");
    }
    let names = alice
        .rxm(&site.host, ["-o", "name", "list"])
        .success()
        .stdout();
    assert!(
        names.contains("mine") && !names.contains("other"),
        "{names}"
    );
}

#[test]
fn owners_class_and_labels_survive_restart_edit_and_redefinition() {
    let guest = Guest::tiny("kept");
    let mut site = Site::new(&[]);
    site.does(&["define", &guest.file()]);
    site.does(&[
        "owner",
        "kept",
        "+alice@XMAN.TEST",
        "+we\\/ird\\@x/inst@XMAN.TEST",
    ]);
    site.does(&["class", "kept", "grid"]);
    site.does(&["label", "kept", "tier=prod", "note=a <b> & \"c\""]);
    let expected = |row: &serde_json::Value| {
        assert_eq!(
            row["owners"],
            serde_json::json!(["alice@XMAN.TEST", "we\\/ird\\@x/inst@XMAN.TEST"])
        );
        assert_eq!(row["class"], "grid");
        assert_eq!(
            row["labels"],
            serde_json::json!({"note": "a <b> & \"c\"", "tier": "prod"})
        );
    };
    expected(&site.row("kept"));
    site.does(&["start", "kept"]);
    expected(&site.row("kept"));
    site.does(&["define", &guest.file()]);
    expected(&site.row("kept"));
    site.does(&["destroy", "kept"]);
    expected(&site.row("kept"));
    let edited = site
        .admin
        .rxm_call(&site.host, ["edit", "kept"])
        .env(
            "EDITOR",
            "sed -i 's/<memory.*/<memory unit=\"MiB\">48<\\/memory>/'",
        )
        .run();
    edited.success();
    expected(&site.row("kept"));
    site.libvirtd.stop();
    site.libvirtd.start();
    site.host.restart();
    site.wait_for(&[&guest]);
    expected(&site.row("kept"));
    let xml = site.libvirtd.virsh(&["dumpxml", "kept"]).stdout();
    assert_eq!(xml.matches("urn:xman:domain:1").count(), 1, "{xml}");
}

#[test]
fn owners_class_and_labels_move_with_the_domain() {
    let realm = Realm::new();
    let hosts = Hosts::quiet_pair(&realm);
    let config = "[migration]\npeers = ['alpha', 'beta']";
    let start = |libvirtd| {
        site_of(Host::builder())
            .beside(libvirtd)
            .config_extra(config)
            .start(&realm)
    };
    let guest = Guest::booted("nomad");
    hosts.alpha.run(&guest);
    let (alpha, beta) = (start(&hosts.alpha), start(&hosts.beta));
    let (admin, alice) = (realm.user("root/admin"), realm.user("alice"));
    eventually("xmand has read libvirt", PATIENCE, || {
        let reached = |host: &Host| admin.rxm(host, ["-o", "name", "list"]).is_success();
        (reached(&beta)
            && admin
                .rxm(&alpha, ["-o", "name", "list"])
                .stdout()
                .contains("nomad"))
        .then_some(())
    });
    admin
        .rxm(&alpha, ["owner", "nomad", "+alice@XMAN.TEST"])
        .success();
    admin.rxm(&alpha, ["class", "nomad", "grid"]).success();
    admin
        .rxm_call(&alpha, ["migrate", "nomad", "beta"])
        .limit(PATIENCE)
        .run()
        .success();
    eventually("it is listed there as hers", PATIENCE, || {
        let rows = alice.rxm(&beta, ["-o", "json", "list"]).success().json();
        (rows.get(0)?.get("class")? == "grid").then_some(())
    });
    alice.rxm(&beta, ["pause", "nomad"]).success();
    assert_eq!(hosts.beta.state("nomad"), "paused");
}

#[test]
fn nobody_gives_himself_a_domain_by_its_xml() {
    let forged = "<metadata><x:domain xmlns:x='urn:xman:domain:1'><x:owner>mallory@XMAN.TEST</x:owner>\
                  <x:class>vip</x:class></x:domain><y:z xmlns:y='urn:other'>stays</y:z></metadata>";
    let site = Site::new(&[]);
    let (carol, mallory) = (site.user("carol"), site.user("mallory"));
    let guest = Guest::tiny("bait").xml_extra(forged);
    carol
        .rxm(&site.host, ["create", "--define", &guest.file()])
        .success();
    let row = site.row("bait");
    assert_eq!(
        row["owners"],
        serde_json::json!(["carol@XMAN.TEST"]),
        "the creator owns"
    );
    assert!(row["class"].is_null(), "{row}");
    assert!(
        site.libvirtd
            .virsh(&["dumpxml", "bait"])
            .stdout()
            .contains("stays")
    );
    mallory
        .rxm(&site.host, ["pause", &guest.uuid().to_string()])
        .denied();
    carol.rxm(&site.host, ["pause", "bait"]).success();
    // A creator redefines: owners stay what they are.
    site.does(&["owner", "bait", "-carol@XMAN.TEST", "+alice@XMAN.TEST"]);
    carol.rxm(&site.host, ["define", &guest.file()]).success();
    assert_eq!(
        site.row("bait")["owners"],
        serde_json::json!(["alice@XMAN.TEST"])
    );
    // What an administrator creates is nobody's: to administer is not to own.
    let plain = Guest::tiny("plain");
    site.does(&["create", &plain.file()]);
    assert_eq!(site.row("plain")["owners"], serde_json::json!([]));
}

#[test]
fn whoever_may_not_create_cannot_even_have_xml_read() {
    let site = Site::new(&[]);
    let alice = site.user("alice");
    let guest = Guest::tiny("new");
    let whole = alice.rxm(&site.host, ["create", &guest.file()]).denied();
    let broken = alice
        .rxm_call(&site.host, ["create", "-"])
        .stdin("<domain><name>x</name></domain>")
        .run()
        .denied();
    assert_eq!(whole.stderr(), broken.stderr());
}

#[test]
fn metadata_that_is_broken_by_hand_is_nobodys() {
    let guest = Guest::tiny("spoilt");
    let site = Site::new(&[&guest]);
    let (alice, oscar) = (site.user("alice"), site.user("oscar"));
    site.does(&["owner", "spoilt", "+alice@XMAN.TEST"]);
    alice.rxm(&site.host, ["pause", "spoilt"]).success();
    let uuid = guest.uuid().to_string();
    site.libvirtd
        .virsh(&[
            "metadata",
            "spoilt",
            "urn:xman:domain:1",
            "--key",
            "xman",
            "--set",
            "<domain><owner>alice@XMAN.TEST</owner><rank>1</rank></domain>",
        ])
        .success();
    alice.rxm(&site.host, ["unpause", &uuid]).denied();
    oscar.rxm(&site.host, ["unpause", &uuid]).denied();
    let row = site.row("spoilt");
    assert!(
        row["metadata_trouble"]
            .as_str()
            .is_some_and(|why| !why.is_empty()),
        "{row}"
    );
    let refused = site
        .admin
        .rxm(&site.host, ["owner", "spoilt", "+bob@XMAN.TEST"]);
    refused.code(FAILED).complains("metadata");
    site.does(&["unpause", "spoilt"]);
    site.libvirtd
        .virsh(&["metadata", "spoilt", "urn:xman:domain:1", "--remove"])
        .success();
    site.does(&["owner", "spoilt", "+alice@XMAN.TEST"]);
    alice.rxm(&site.host, ["pause", "spoilt"]).success();
}

#[test]
fn what_is_changed_by_hand_counts_in_the_next_action() {
    let guest = Guest::tiny("hand");
    let site = Site::new(&[&guest]);
    let alice = site.user("alice");
    site.does(&["owner", "hand", "+alice@XMAN.TEST"]);
    for _ in 0..5 {
        alice.rxm(&site.host, ["pause", "hand"]).success();
        site.libvirtd
            .virsh(&["metadata", "hand", "urn:xman:domain:1", "--remove"])
            .success();
        // At once, before any event can have arrived for certain: the lane reads the owners again.
        alice
            .rxm(&site.host, ["unpause", &guest.uuid().to_string()])
            .denied();
        assert_eq!(site.libvirtd.state("hand"), "paused");
        site.does(&["owner", "hand", "+alice@XMAN.TEST"]);
        alice.rxm(&site.host, ["unpause", "hand"]).success();
    }
}

#[test]
fn with_libvirt_silent_only_administrators_change_anything() {
    let guest = Guest::tiny("frozen");
    let site = Site::new(&[&guest]);
    let alice = site.user("alice");
    site.does(&["owner", "frozen", "+alice@XMAN.TEST"]);
    site.libvirtd.freeze();
    eventually("the row is stale", PATIENCE, || {
        (row(&alice, &site.host, "frozen")["stale"] == true).then_some(())
    });
    alice.rxm(&site.host, ["pause", "frozen"]).denied();
    site.host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "verdict=\"deny\"",
        "libvirt has been silent",
    ]);
    let asked = ["--timeout", "10s", "--retries", "1", "pause", "frozen"];
    let administrator = site.admin.rxm(&site.host, asked);
    assert!(
        !administrator.stderr().contains("denied"),
        "{}",
        administrator.stderr()
    );
    site.libvirtd.thaw();
}

#[test]
fn what_is_followed_is_cut_when_the_right_ends() {
    let guest = Guest::tiny("log");
    let site = Site::new(&[&guest]);
    let alice = site.user("alice");
    site.does(&["owner", "log", "+alice@XMAN.TEST"]);
    let mut following = alice.rxm_call(&site.host, ["dmesg", "-f", "log"]).spawn();
    following.stdout().wait_for(PATIENCE, "qemu");
    site.does(&["owner", "log", "-alice@XMAN.TEST"]);
    following.wait(PATIENCE).denied();

    site.does(&["owner", "log", "+alice@XMAN.TEST"]);
    let mut following = alice.rxm_call(&site.host, ["dmesg", "-f", "log"]).spawn();
    following.stdout().wait_for(PATIENCE, "qemu");
    site.host.write_policy(
        "lock.cedar",
        "@id(\"lock\")\nforbid (principal, action, resource);\n",
    );
    following.wait(PATIENCE).denied();
}

#[test]
fn a_portal_acts_for_others_with_their_rights_and_no_more() {
    let (hers, ports) = (Guest::tiny("hers"), Guest::tiny("ports"));
    let site = Site::with(&[&hers, &ports], |host| {
        host.config_extra("[authorization]\nact-for = ['portal/*@XMAN.TEST']")
    });
    let (portal, alice, gate) = (
        site.user("portal/web"),
        site.user("alice"),
        site.user("portal/other"),
    );
    site.does(&["owner", "hers", "+alice@XMAN.TEST"]);
    site.does(&["owner", "ports", "+portal/web@XMAN.TEST"]);
    let for_alice = |words: &[&str]| {
        let words: Vec<&str> = ["--on-behalf-of", "alice@XMAN.TEST"]
            .iter()
            .chain(words)
            .copied()
            .collect();
        portal.rxm(&site.host, words)
    };
    for_alice(&["pause", "hers"]).success();
    site.host.audit().contains(&[
        "principal=\"portal/web@XMAN.TEST\"",
        "on-behalf-of=\"alice@XMAN.TEST\"",
        "verb=\"pause\"",
        "rule=\"cedar:site.cedar:owners-use\"",
        "act-for-rule=\"cedar:site.cedar:portal\"",
        "outcome=\"ok\"",
    ]);
    let whoami = for_alice(&["-o", "json", "whoami"]).success().json();
    assert_eq!(whoami[0]["principal"], "alice@XMAN.TEST", "{whoami}");
    assert_eq!(whoami[0]["acting"], "portal/web@XMAN.TEST", "{whoami}");
    // Never the union: what is the portal's own is not alice's.
    for_alice(&["pause", &ports.uuid().to_string()]).denied();
    portal.rxm(&site.host, ["pause", "ports"]).success();
    portal
        .rxm(&site.host, ["unpause", &hers.uuid().to_string()])
        .denied();
    // Nobody acts for an administrator, and nobody who is not named, or not allowed, for anybody.
    let uuid = hers.uuid().to_string();
    let tries: [(&User, &str); 3] = [
        (&portal, "root/admin@XMAN.TEST"),
        (&alice, "root/admin@XMAN.TEST"),
        (&gate, "alice@XMAN.TEST"),
    ];
    for (user, other) in tries {
        user.rxm(&site.host, ["--on-behalf-of", other, "unpause", &uuid])
            .denied();
        site.host.audit().contains(&[
            &format!("principal=\"{}\"", user.principal()),
            &format!("on-behalf-of=\"{other}\""),
            "verdict=\"deny\"",
        ]);
    }
    assert_eq!(site.libvirtd.state("hers"), "paused");
}

#[test]
fn everybody_can_ask_why_and_administrators_for_anybody() {
    let (hers, his) = (Guest::tiny("hers"), Guest::tiny("his"));
    let site = Site::new(&[&hers, &his]);
    let alice = site.user("alice");
    site.does(&["owner", "hers", "+alice@XMAN.TEST"]);
    let why = alice
        .rxm(&site.host, ["explain", "pause", "hers"])
        .success();
    why.says("owners-use");
    let why = alice
        .rxm(&site.host, ["-o", "json", "explain", "mem-set", "hers"])
        .success()
        .json();
    assert_eq!(why[0]["allowed"], false, "{why}");
    assert!(
        why.to_string().contains("operators"),
        "what would have to be true: {why}"
    );
    // Another's domain and none at all explain themselves alike.
    let plain = |name: &str| {
        let why = alice.rxm(
            &site.host,
            [
                "-o",
                "json",
                "explain",
                "pause",
                &format!("localhost/{name}"),
            ],
        );
        why.success().stdout().replace(name, "X")
    };
    assert_eq!(plain("his"), plain("nobodys"));
    alice
        .rxm(&site.host, ["explain", "bob@XMAN.TEST", "pause", "hers"])
        .denied();

    let words = ["-o", "json", "explain", "alice@XMAN.TEST", "pause", "his"];
    let why = site.does(&words).json();
    assert_eq!(why[0]["allowed"], false, "{why}");
    site.does(&["explain", "alice@ELSEWHERE.TEST", "pause", "hers"])
        .says("no");
    site.does(&["explain", "oscar@XMAN.TEST", "destroy", "his"])
        .says("site.cedar:operators");

    alice.rxm(&site.host, ["can", "pause", "hers"]).code(0);
    alice
        .rxm(&site.host, ["can", "mem-set", "hers"])
        .code(FAILED);
    alice.rxm(&site.host, ["can", "info"]).code(FAILED);
    alice.rxm(&site.host, ["can", "fly", "hers"]).code(2);
    site.admin
        .rxm(&site.host, ["can", "bob@XMAN.TEST", "pause", "hers"])
        .code(FAILED);
    alice.rxm("localhost:1", ["can", "whoami"]).code(3);
    // To ask is not to do.
    assert_eq!(site.libvirtd.state("hers"), "running");
}

#[test]
fn jobs_are_seen_by_who_began_them_and_by_who_may_see_their_domain() {
    let realm = Realm::shared();
    let host = site_of(Host::builder()).start(realm);
    let (admin, alice) = (realm.user("root/admin"), realm.user("alice"));
    let id = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let refused = admin.rxm(
        &host,
        ["migrate", "test", "nowhere.example.org", "--direct"],
    );
    assert!(!refused.is_success());
    let rows = alice
        .rxm(&host, ["-o", "json", "job", "list"])
        .success()
        .json();
    assert_eq!(rows.as_array().map(Vec::len), Some(0), "{rows}");
    alice
        .rxm(&host, ["job", "wait", id])
        .code(FAILED)
        .complains("no job");
}

#[test]
fn policies_that_cannot_be_used_stop_the_start_and_say_where() {
    let bad = [
        ("permit (principal, action, resource", "site.cedar"),
        (
            "permit (principal, action == Action::\"fly\", resource);",
            "fly",
        ),
        (
            "permit (principal, action == Action::\"pause\", resource) when { resource.owners == 1 };",
            "site.cedar",
        ),
        (
            "permit (principal, action == Action::\"pause\", resource) when { resource.colour == \"red\" };",
            "colour",
        ),
    ];
    for (text, word) in bad {
        let mut host = Host::builder()
            .k5login(["alice"])
            .policy("site.cedar", text)
            .prepare(Realm::shared());
        let outcome = host.try_start().unwrap_err();
        assert_eq!(outcome.exit_code(), CONFIG, "{outcome}");
        assert!(outcome.stderr().contains(word), "{text}: {outcome}");
        let checked = host.check().code(FAILED);
        assert!(
            checked.stdout().contains("WRONG") && checked.stdout().contains(word),
            "{checked}"
        );
    }
    type Spoil = fn(&Host);
    let spoilt: [(&str, Spoil); 4] = [
        ("policy", |host| fs::remove_dir_all(host.policy()).unwrap()),
        ("policy", |host| {
            fs::remove_file(host.policy().join("site.cedar")).unwrap()
        }),
        ("writable", |host| {
            let file = host.policy().join("site.cedar");
            fs::set_permissions(file, fs::Permissions::from_mode(0o666)).unwrap();
        }),
        ("groups.toml", |host| {
            host.write_policy("groups.toml", "[groups]\na = [\"@b\"]\nb = [\"@a\"]\n");
        }),
    ];
    for (word, spoil) in spoilt {
        let mut host = site_of(Host::builder()).prepare(Realm::shared());
        spoil(&host);
        let outcome = host.try_start().unwrap_err();
        assert_eq!(outcome.exit_code(), CONFIG, "{outcome}");
        assert!(outcome.stderr().contains(word), "{word}: {outcome}");
    }
}

#[test]
fn a_change_that_cannot_be_used_leaves_the_old_rules_in_force_and_says_so() {
    let (_, host) = site_on_test_driver();
    let realm = Realm::shared();
    let (alice, oscar) = (realm.user("alice"), realm.user("oscar"));
    oscar.rxm(&host, ["pause", "test"]).success();
    host.write_policy("broken.cedar", "permit (principal, action, resource");
    oscar.rxm(&host, ["unpause", "test"]).success();
    host.stderr().wait_for(PATIENCE, "broken.cedar");
    alice
        .rxm(&host, ["can", "pause", "localhost/test"])
        .code(FAILED);
    fs::remove_file(host.policy().join("broken.cedar")).unwrap();
    host.write_policy(
        "site.cedar",
        &SITE.replace("Group::\"operators\"", "User::\"alice@XMAN.TEST\""),
    );
    oscar.rxm(&host, ["pause", TEST_DOMAIN]).denied();
    alice.rxm(&host, ["pause", TEST_DOMAIN]).success();
    host.write_policy("groups.toml", &GROUPS.replace("oscar", "\u{0}"));
    host.sighup();
    host.stderr().wait_for(PATIENCE, "groups.toml");
    alice.rxm(&host, ["unpause", TEST_DOMAIN]).success();
}

#[test]
fn no_request_sees_half_a_policy_while_the_folder_is_swapped() {
    let realm = Realm::shared();
    let host = site_of(Host::builder()).prepare(realm);
    // Each set lets one of them pause and the other not; both or neither would be half of one and half of the other.
    let folder = host.folder().to_owned();
    for (set, who) in [("one", "alice"), ("two", "bob")] {
        let place = folder.join(set);
        fs::create_dir(&place).unwrap();
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).unwrap();
        let rule = |verb: &str| {
            format!(
                "permit (principal == User::\"{who}@XMAN.TEST\", action in [Action::\"ask\", Action::\"{verb}\"], resource);"
            )
        };
        fs::write(place.join("a.cedar"), rule("pause")).unwrap();
        fs::write(place.join("b.cedar"), rule("unpause")).unwrap();
    }
    fs::remove_dir_all(host.policy()).unwrap();
    symlink(folder.join("one"), host.policy()).unwrap();
    let mut host = host;
    host.start();
    let swap = |set: &str| {
        let fresh = folder.join("fresh");
        symlink(folder.join(set), &fresh).unwrap();
        fs::rename(&fresh, host.policy()).unwrap();
    };
    let (alice, bob) = (realm.user("alice"), realm.user("bob"));
    let may = |user: &User| -> Vec<String> {
        let whoami = user.rxm(&host, ["-o", "json", "whoami"]);
        if !whoami.is_success() {
            return Vec::new();
        }
        let verbs: Vec<String> = serde_json::from_value(whoami.json()[0]["verbs"].clone()).unwrap();
        verbs
            .into_iter()
            .filter(|verb| verb.ends_with("pause"))
            .collect()
    };
    for round in 0..10 {
        let set = if round % 2 == 0 { "two" } else { "one" };
        swap(set);
        let (hers, his) = (may(&alice), may(&bob));
        let (lucky, other) = if set == "one" {
            (hers, his)
        } else {
            (his, hers)
        };
        assert_eq!(lucky, ["pause", "unpause"], "{set}");
        assert!(other.is_empty(), "{set}: {other:?}");
    }
}

#[test]
fn a_site_holds_its_policies_against_a_table_of_its_own() {
    let host = site_of(Host::builder()).prepare(Realm::shared());
    let table = r#"
[[expect]]
principal = "alice@XMAN.TEST"
action = "pause"
domain = { name = "web", owners = ["alice@XMAN.TEST"], class = "grid", labels = { tier = "prod" } }
decision = "allow"
rule = "cedar:site.cedar:owners-use"

[[expect]]
principal = "alice@ELSEWHERE.TEST"
action = "pause"
domain = { name = "web", owners = ["alice@XMAN.TEST"] }
decision = "deny"

[[expect]]
principal = "bob@XMAN.TEST"
action = "shutdown"
domain = { name = "node", lease = { user = "bob@XMAN.TEST", job = "slurm/1" } }
decision = "allow"

[[expect]]
principal = "portal/web@XMAN.TEST"
action = "act-for"
person = "root/admin@XMAN.TEST"
decision = "deny"
"#;
    let outcome = host.test_policy(table).success();
    outcome.says("4 expectations, 0 wrong");
    let wrong = table.replace("decision = \"deny\"", "decision = \"allow\"");
    let outcome = host.test_policy(&wrong).code(FAILED);
    assert!(
        outcome
            .stdout()
            .contains("WRONG alice@ELSEWHERE.TEST pause web"),
        "{outcome}"
    );
    for (bad, word) in [
        ("", "expects nothing"),
        (
            "[[expect]]\nprincipal = \"alice\"\naction = \"pause\"\ndecision = \"allow\"",
            "realm",
        ),
        (
            "[[expect]]\nprincipal = \"a@B\"\naction = \"fly\"\ndecision = \"allow\"",
            "fly",
        ),
        (
            "[[expect]]\nprincipal = \"a@B\"\naction = \"pause\"\ndecision = \"maybe\"",
            "maybe",
        ),
        (
            "[[expect]]\nprincipal = \"a@B\"\naction = \"pause\"\ndecision = \"deny\"\nunknown-domain = true\nperson = \"c@D\"",
            "more than one",
        ),
    ] {
        let outcome = host.test_policy(bad).code(CONFIG);
        assert!(outcome.stderr().contains(word), "{bad}: {outcome}");
    }
}

#[test]
fn policies_go_by_unix_groups_of_the_mapped_account() {
    let realm = Realm::shared();
    let host = Host::builder()
        .k5login(["root/admin"])
        .policy(
            "unix.cedar",
            "@id(\"unix\")\npermit (principal in Group::\"unix:daemon\", action, resource);\n",
        )
        .config_extra("[authorization]\nunix-groups = true")
        .start(realm);
    realm.user("daemon").rxm(&host, ["pause", "test"]).success();
    realm
        .user("daemon/x")
        .rxm(&host, ["unpause", "test"])
        .denied();
    realm.user("alice").rxm(&host, ["unpause", "test"]).denied();
    let whoami = realm
        .user("daemon")
        .rxm(&host, ["-o", "json", "whoami"])
        .success()
        .json();
    assert_eq!(
        whoami[0]["groups"],
        serde_json::json!(["daemon"]),
        "{whoami}"
    );
}

#[test]
fn a_name_service_that_hangs_denies_whoever_is_judged_by_groups() {
    let realm = Realm::shared();
    let cell = xman_tests::Cell::new("nscd");
    let folder = cell.outside("/run/nscd");
    fs::create_dir_all(&folder).unwrap();
    // glibc asks the name service cache daemon first; this one takes the question and never answers.
    let _silent = UnixListener::bind(folder.join("socket")).unwrap();
    let host = Host::builder()
        .k5login(["root/admin"])
        .policy(
            "unix.cedar",
            "@id(\"unix\")\npermit (principal in Group::\"unix:daemon\", action, resource);\n",
        )
        .config_extra("[authorization]\nunix-groups = true")
        .inside(&cell)
        .start(realm);
    realm.user("daemon").rxm(&host, ["pause", "test"]).denied();
    host.audit().contains(&[
        "principal=\"daemon@XMAN.TEST\"",
        "verdict=\"deny\"",
        "name service",
    ]);
    realm
        .user("root/admin")
        .rxm(&host, ["pause", "test"])
        .success();
}

/// The reference authority of `deploy/`, with rules of the test's own.
fn authority(host: &Host, rules: &str) -> Process {
    let place = |name: &str| host.folder().join(name).display().to_string();
    let rules_file = place("authority.toml");
    fs::write(&rules_file, rules).unwrap();
    let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/xman-authority.py");
    let mut python = command("python3");
    python
        .arg(program)
        .args(["--rules", &rules_file, "--socket", &place("authz.sock")]);
    let process = Process::start(python);
    eventually("the authority listens", PATIENCE, || {
        UnixStream::connect(place("authz.sock")).ok()
    });
    process
}

#[test]
fn another_program_decides_and_without_its_answer_nobody_may() {
    let realm = Realm::shared();
    let mut host = Host::builder().k5login(["root/admin"]).prepare(realm);
    host.configure(&format!(
        "[authorization]\nbackends = ['k5login', 'external']\nexternal = '{}'\nexternal-timeout = '5s'",
        host.folder().join("authz.sock").display()
    ));
    let rules = r#"
[[rule]]
name = "realm-asks"
opinion = "allow"
actions = ["whoami", "list", "explain"]
principals = ["*@XMAN.TEST"]

[[rule]]
name = "alice-pauses"
opinion = "allow"
actions = ["pause", "unpause"]
principals = ["alice@XMAN.TEST"]
domains = ["test"]
"#;
    let mut running = authority(&host, rules);
    host.start();
    let (admin, alice, bob) = (
        realm.user("root/admin"),
        realm.user("alice"),
        realm.user("bob"),
    );
    assert!(host.check().stdout().contains("authority"));
    alice.rxm(&host, ["pause", "test"]).success();
    host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "rule=\"external:alice-pauses\"",
        "outcome=\"ok\"",
    ]);
    bob.rxm(&host, ["unpause", "test"]).denied();
    alice
        .rxm(&host, ["explain", "unpause", "test"])
        .success()
        .says("alice-pauses");
    // Stopped, it holds its connection and says nothing.
    running.signal(Signal::STOP);
    alice.rxm(&host, ["unpause", TEST_DOMAIN]).denied();
    admin.rxm(&host, ["unpause", "test"]).success();
    running.signal(Signal::CONT);
    eventually("it is asked again", PATIENCE, || {
        alice
            .rxm(&host, ["pause", "test"])
            .is_success()
            .then_some(())
    });
    running.kill();
    alice.rxm(&host, ["unpause", TEST_DOMAIN]).denied();
    host.audit().contains(&[
        "principal=\"alice@XMAN.TEST\"",
        "verdict=\"deny\"",
        "external:",
        "authority",
    ]);
    let _running = authority(&host, rules);
    alice.rxm(&host, ["unpause", "test"]).success();
}

#[test]
fn acting_for_others_is_explained_as_it_is_decided() {
    let realm = Realm::shared();
    let host = site_of(Host::builder())
        .config_extra("[authorization]\nact-for = ['portal/web@XMAN.TEST']")
        .start(realm);
    let admin = realm.user("root/admin");
    let may = |who: &str, other: &str| {
        let why = admin
            .rxm(&host, ["-o", "json", "explain", who, "act-for", other])
            .success()
            .json();
        why[0]["allowed"] == true
    };
    assert!(may("portal/web@XMAN.TEST", "alice@XMAN.TEST"));
    assert!(may("portal/web@XMAN.TEST", "we\\/ird/inst@XMAN.TEST"));
    assert!(!may("portal/web@XMAN.TEST", "root/admin@XMAN.TEST"));
    assert!(!may("portal/other@XMAN.TEST", "alice@XMAN.TEST"));
    assert!(!may("alice@XMAN.TEST", "bob@XMAN.TEST"));
}
