//! Ways around rights per domain that somebody might try: force, a name that changes hands, a twin on another hypervisor, a time of trouble.

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use xman_tests::{Guest, Host, HostBuilder, Libvirtd, PATIENCE, Realm, Records, eventually};

use crate::authorization::{FAILED, Site, TEST_DOMAIN, site_of};

/// What operators may not, whatever else lets them.
const NEVER: &str = r#"
@id("operators-never-destroy")
forbid (principal in Group::"operators", action == Action::"destroy", resource);
"#;
fn guarded(host: HostBuilder) -> HostBuilder {
    host.policy("never.cedar", NEVER)
}

#[test]
fn a_log_is_followed_no_longer_than_its_name_is_the_domains() {
    let hers = Guest::tiny("web");
    let site = Site::with(&[&hers], guarded);
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let alice = site.user("alice");
    let mut following = alice.rxm_call(&site.host, ["dmesg", "-f", "web"]).spawn();
    following.stdout().wait_for(PATIENCE, "qemu");
    site.libvirtd.virsh(&["destroy", "web"]).success();
    site.libvirtd.virsh(&["domrename", "web", "old"]).success();
    let ended = following.wait(PATIENCE);
    ended.code(FAILED).complains("'web' is now called 'old'");
    site.does(&["list", "old"]);
}

#[test]
fn a_twin_on_another_hypervisor_gives_no_right_to_the_other() {
    let realm = Realm::shared();
    let libvirtd = Libvirtd::new();
    let guest = Guest::tiny("twin");
    let xml = guest.xml().replace(&guest.uuid().to_string(), TEST_DOMAIN);
    let file = libvirtd.cell().folder().join("twin.xml");
    fs::write(&file, xml).unwrap();
    let file = file.to_str().unwrap();
    libvirtd.virsh(&["create", file]).success();
    let host = guarded(site_of(Host::builder()))
        .beside(&libvirtd)
        .config_extra("hypervisors = ['test:///default', 'qemu:///system']")
        .start(realm);
    let (admin, alice) = (realm.user("root/admin"), realm.user("alice"));
    eventually("xmand has read libvirt", PATIENCE, || {
        let names = admin.rxm(&host, ["-o", "name", "list"]).stdout();
        names.contains("twin").then_some(())
    });
    let on_qemu =
        |words: [&'static str; 3]| ["--hypervisor", "qemu:///system"].into_iter().chain(words);
    admin
        .rxm(&host, ["owner", "test", "+alice@XMAN.TEST"])
        .success();
    admin
        .rxm(&host, on_qemu(["owner", "twin", "+alice@XMAN.TEST"]))
        .success();
    let mut following = alice
        .rxm_call(&host, on_qemu(["dmesg", "-f", "twin"]))
        .spawn();
    following.stdout().wait_for(PATIENCE, "qemu");
    admin
        .rxm(&host, on_qemu(["owner", "twin", "-alice@XMAN.TEST"]))
        .success();
    following.wait(PATIENCE).denied();
    alice.rxm(&host, ["pause", "test"]).success();
}

#[test]
fn trouble_with_libvirt_tells_nobody_which_domains_there_are() {
    let (mine, secret) = (Guest::tiny("mine"), Guest::tiny("secret"));
    let site = Site::with(&[&mine, &secret], guarded);
    site.does(&["owner", "mine", "+alice@XMAN.TEST"]);
    let alice = site.user("alice");
    site.libvirtd.freeze();
    eventually("libvirt is known to be silent", PATIENCE, || {
        let rows = alice.rxm(&site.host, ["-o", "json", "list", "mine"]).json();
        (rows[0]["stale"] == true).then_some(())
    });
    let nowhere = "00000000-0000-4000-8000-000000000001".to_owned();
    let answers = [secret.uuid().to_string(), nowhere].map(|uuid| {
        ["pause", "describe", "shutdown"].map(|verb| {
            let domain = format!("localhost/{uuid}");
            let words = ["--timeout", "20s", "--retries", "1", verb, &domain];
            let outcome = alice.rxm(&site.host, words);
            let said = without_age(&outcome.stderr()).replace(&uuid, "X");
            (outcome.exit_code(), said)
        })
    });
    site.libvirtd.thaw();
    let [hidden, missing] = answers;
    assert_eq!(hidden, missing);
    assert!(
        hidden
            .iter()
            .all(|(code, said)| *code == FAILED && said.contains("nothing is known")),
        "{hidden:?}"
    );
}

/// What was said, whenever it was: for how many seconds libvirt has been silent is another number each time.
fn without_age(said: &str) -> String {
    let words = said.split(' ').collect::<Vec<_>>();
    let mut kept = words.clone();
    for (at, pair) in words.windows(2).enumerate() {
        if pair[1].starts_with('s') && pair[0].parse::<u64>().is_ok() {
            kept[at] = "N";
        }
    }
    kept.join(" ")
}

#[test]
fn who_may_not_pull_the_plug_does_not_by_force() {
    let guest = Guest::tiny("plug");
    let site = Site::with(&[&guest], guarded);
    let oscar = site.user("oscar");
    let uuid = guest.uuid().to_string();
    let id = || site.libvirtd.virsh(&["domid", "plug"]).stdout();
    let before = id();
    for words in [
        ["destroy", &uuid].as_slice(),
        &["shutdown", "--force", &uuid],
        &["reboot", "--force", &uuid],
    ] {
        let words = ["--timeout", "20s"].iter().chain(words);
        oscar.rxm(&site.host, words).denied();
    }
    oscar
        .rxm(&site.host, ["shutdown", "--dry-run", "--force", "plug"])
        .code(FAILED)
        .says("you may not");
    assert_eq!(id(), before, "it runs as it did");
    site.host.audit().contains(&[
        "verb=\"shutdown\"",
        "verdict=\"deny\"",
        "operators-never-destroy",
    ]);
    // Without force it is the guest's own decision.
    oscar.rxm(&site.host, ["reboot", &uuid]).success();
}

#[test]
fn whoever_acts_for_somebody_is_told_what_would_come_of_it() {
    let realm = Realm::shared();
    let host = guarded(site_of(Host::builder()))
        .config_extra("[authorization]\nact-for = ['portal/web@XMAN.TEST']")
        .policy(
            "portal.cedar",
            "@id(\"portals-look\")\nforbid (principal, action == Action::\"pause\", resource is Domain) when { context has acting };\n",
        )
        .start(realm);
    let (admin, portal) = (realm.user("root/admin"), realm.user("portal/web"));
    admin
        .rxm(&host, ["owner", "test", "+alice@XMAN.TEST"])
        .success();
    let for_alice = |words: &[&str]| {
        let words = ["--on-behalf-of", "alice@XMAN.TEST"].iter().chain(words);
        portal.rxm(&host, words)
    };
    for_alice(&["pause", "test"]).denied();
    for_alice(&["can", "pause", "test"]).code(FAILED);
    for_alice(&["explain", "pause", "test"])
        .success()
        .says("portals-look");
    for_alice(&["can", "shutdown", "test"]).success();
}

#[test]
fn a_table_of_expectations_is_decided_as_on_the_host_with_unix_groups() {
    let policy = "@id(\"unix\")\npermit (principal in Group::\"unix:daemon\", action == Action::\"pause\", resource is Domain);\n\
                  @id(\"portal\")\npermit (principal == User::\"portal/web@XMAN.TEST\", action == Action::\"act-for\", resource is User)\n\
                  unless { resource in Group::\"unix:wheel\" };\n";
    let host = Host::builder()
        .policy("unix.cedar", policy)
        .config_extra("[authorization]\nunix-groups = true")
        .prepare(Realm::shared());
    let table = |groups: &str| {
        format!(
            "[[expect]]\nprincipal = \"portal/web@XMAN.TEST\"\naction = \"act-for\"\nperson = \"alice@XMAN.TEST\"\ndecision = \"allow\"\n\
             [[expect]]\nprincipal = \"alice@XMAN.TEST\"\n{groups}action = \"pause\"\ndomain = {{ name = \"web\" }}\ndecision = \"allow\"\n"
        )
    };
    host.test_policy(&table("unix-groups = [\"daemon\"]\n"))
        .success();
    host.test_policy(&table(""))
        .code(FAILED)
        .says("WRONG alice@XMAN.TEST pause web: should be allowed, and is not: no rule allows it")
        .says("2 expectations, 1 wrong");
}

#[test]
fn a_group_that_nobody_defines_is_no_empty_group() {
    let realm = Realm::shared();
    let host = guarded(site_of(Host::builder())).start(realm);
    let (admin, oscar) = (realm.user("root/admin"), realm.user("oscar"));
    admin
        .rxm(&host, ["owner", "test", "+oscar@XMAN.TEST"])
        .success();
    oscar.rxm(&host, ["destroy", TEST_DOMAIN]).denied();
    // Without the group nobody would be in it, and what its members are forbidden would be allowed.
    fs::remove_file(host.policy().join("groups.toml")).unwrap();
    oscar.rxm(&host, ["destroy", TEST_DOMAIN]).denied();
    host.stderr()
        .wait_for(PATIENCE, "THE OLD POLICIES STAY IN FORCE");
    let checked = host.check().code(FAILED);
    assert!(
        checked
            .stdout()
            .contains("Group::\"operators\" is not defined in groups.toml"),
        "{checked}"
    );
}

#[test]
fn a_saved_image_brings_no_owner_back_whoever_restores_it() {
    let guest = Guest::booted("saved");
    let site = Site::with(&[&guest], guarded);
    let (alice, bob) = (site.user("alice"), site.user("bob"));
    let is = |state: &str| {
        eventually(state, PATIENCE, || {
            let words = ["-o", "json", "list", "saved"];
            let rows = site.admin.rxm(&site.host, words).json();
            (rows[0]["state"] == state).then_some(())
        });
    };
    site.does(&["owner", "saved", "+alice@XMAN.TEST"]);
    site.libvirtd.virsh(&["managedsave", "saved"]).success();
    is("off");
    site.does(&["owner", "saved", "-alice@XMAN.TEST", "+bob@XMAN.TEST"]);
    site.does(&["label", "saved", "tier=prod"]);
    site.libvirtd.virsh(&["start", "saved"]).success();
    is("running");
    let uuid = guest.uuid().to_string();
    for user in [&alice, &bob] {
        user.rxm(&site.host, ["pause", &uuid]).denied();
    }
    let rows = site.does(&["-o", "json", "list", "saved"]).json();
    assert_eq!(rows[0]["owners"], serde_json::json!([]));
    assert_eq!(rows[0]["labels"]["tier"], "prod", "as it is defined");
    site.does(&["owner", "saved", "+bob@XMAN.TEST"]);
    bob.rxm(&site.host, ["pause", &uuid]).success();
    alice.rxm(&site.host, ["unpause", &uuid]).denied();
}

/// An authority that allows two verbs, a tenth of a second after it was asked. Returns how often it has found questions to read.
fn slow_authority(socket: &Path) -> Arc<AtomicUsize> {
    let listener = UnixListener::bind(socket).unwrap();
    let readings = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&readings);
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let counted = Arc::clone(&counted);
            thread::spawn(move || answer_slowly(stream, &counted));
        }
    });
    readings
}

fn answer_slowly(mut stream: UnixStream, readings: &AtomicUsize) {
    let (mut waiting, mut bytes) = (Vec::new(), [0; 64 * 1024]);
    while let Ok(count @ 1..) = stream.read(&mut bytes) {
        readings.fetch_add(1, Ordering::SeqCst);
        waiting.extend_from_slice(&bytes[..count]);
        thread::sleep(Duration::from_millis(100));
        let whole = waiting
            .iter()
            .rposition(|byte| *byte == b'\n')
            .map_or(0, |at| at + 1);
        let mut said = String::new();
        for line in waiting
            .drain(..whole)
            .collect::<Vec<_>>()
            .split(|byte| *byte == b'\n')
        {
            let Ok(question) = serde_json::from_slice::<serde_json::Value>(line) else {
                continue;
            };
            let opinion = if ["whoami", "pause"].contains(&question["action"].as_str().unwrap()) {
                r#""allow","rule":"two""#
            } else {
                r#""none""#
            };
            said += &format!(
                "{{\"xman\":1,\"id\":{},\"opinion\":{opinion}}}\n",
                question["id"]
            );
        }
        if stream.write_all(said.as_bytes()).is_err() {
            return;
        }
    }
}

#[test]
fn a_slow_authority_is_asked_once_and_not_for_each_verb() {
    let realm = Realm::shared();
    let mut host = Host::builder().prepare(realm);
    let socket = host.folder().join("slow.sock");
    let readings = slow_authority(&socket);
    host.configure(&format!(
        "[authorization]\nbackends = ['external']\nexternal = '{}'\nexternal-timeout = '20s'",
        socket.display()
    ));
    host.start();
    let alice = realm.user("alice");
    let whoami = alice.rxm(&host, ["-o", "json", "whoami"]).success().json();
    assert_eq!(whoami[0]["verbs"], serde_json::json!(["whoami", "pause"]));
    // Of the call and of all verbs together, of which a part may come a moment later; there are dozens of verbs.
    let readings = readings.load(Ordering::SeqCst);
    assert!((1..10).contains(&readings), "asked {readings} times");
}
