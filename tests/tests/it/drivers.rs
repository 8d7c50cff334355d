//! Several hypervisors under one xmand: guests and containers in one list, and one driver's trouble that is nobody else's.

use std::time::{Duration, Instant};

use serde_json::Value;
use xman_tests::{
    Container, Guest, Host, HostBuilder, LXC, Libvirtd, Outcome, PATIENCE, QEMU, Realm, Records,
    User, eventually, shell,
};

use crate::authorization::site_of;

/// What rxm ends with when something was refused.
const FAILED: i32 = 1;
/// What rxm ends with when it brings only a part.
const PARTLY: i32 = 5;
/// What a call may take while another hypervisor hangs: far less than its own deadline.
const IN_TIME: Duration = Duration::from_secs(15);

/// A host with several hypervisors, and its administrator.
struct Site {
    admin: User,
    host: Host,
}

impl Site {
    /// A host whose guests and containers are one libvirtd's.
    #[track_caller]
    fn beside(libvirtd: &Libvirtd) -> Self {
        let site = Self::of(Host::builder().beside(libvirtd).uris(&[QEMU, LXC]));
        site.wait_well(&[QEMU, LXC]);
        site
    }

    #[track_caller]
    fn of(host: HostBuilder) -> Self {
        let realm = Realm::shared();
        Self {
            host: site_of(host).start(realm),
            admin: realm.user("root/admin"),
        }
    }

    #[track_caller]
    fn rxm(&self, words: &[&str]) -> Outcome {
        self.admin.rxm(&self.host, words)
    }

    #[track_caller]
    fn does(&self, words: &[&str]) -> String {
        self.rxm(words).success().stdout()
    }

    /// The host does it, and does not wait for another hypervisor.
    #[track_caller]
    fn does_at_once(&self, words: &[&str]) {
        let began = Instant::now();
        self.does(words);
        let took = began.elapsed();
        assert!(took < IN_TIME, "{words:?} took {took:?}");
    }

    /// The host refuses, with all of these words.
    #[track_caller]
    fn refuses(&self, words: &[&str], because: &[&str]) {
        let outcome = self.rxm(words).code(FAILED);
        for because in because {
            assert!(
                outcome.stderr().contains(because),
                "{words:?}: {}",
                outcome.stderr()
            );
        }
    }

    /// The rows of `list -o json`, and the objects that tell of trouble.
    #[track_caller]
    fn list(&self) -> (Vec<Value>, Vec<Value>) {
        let listed = self.rxm(&["-o", "json", "list"]).json();
        let all = listed.as_array().expect("a list is a list").clone();
        all.into_iter().partition(|row| row.get("error").is_none())
    }

    #[track_caller]
    fn wait_well(&self, uris: &[&str]) {
        eventually("xmand reaches its hypervisors", PATIENCE, || {
            let info = self.rxm(&["-o", "json", "info"]).success().json();
            let is_well = |uri: &&str| {
                let all = info[0]["hypervisors"].as_array().unwrap();
                all.iter()
                    .any(|one| one["uri"] == **uri && one["trouble"] == "" && one["driver"] != "")
            };
            (uris.iter().all(is_well) && self.list().1.is_empty()).then_some(())
        });
    }

    /// Waits until a domain is listed in a state.
    #[track_caller]
    fn wait_listed(&self, name: &str, state: &str) {
        eventually(&format!("{name} is listed as {state}"), PATIENCE, || {
            let (rows, _) = self.list();
            rows.iter()
                .any(|row| row["name"] == name && row["state"] == state)
                .then_some(())
        });
    }
}

fn row<'a>(rows: &'a [Value], name: &str) -> &'a Value {
    rows.iter()
        .find(|row| row["name"] == name)
        .unwrap_or_else(|| panic!("{name} is not in {rows:?}"))
}

#[test]
fn container_counts_pauses_reboots_and_goes_down_under_a_private_libvirtd() {
    let libvirtd = Libvirtd::with_containers();
    let (container, other) = (Container::new("cell"), Container::new("other"));
    libvirtd.run_container(&container);
    libvirtd.run_container(&other);
    container.keeps_counting();
    libvirtd.virsh_on(LXC, &["suspend", "cell"]).success();
    container.stands_still();
    libvirtd.virsh_on(LXC, &["resume", "cell"]).success();
    container.keeps_counting();
    // libvirt 9.0 says that it has told a container's initctl, also where there is none, and then sends no signal.
    libvirtd
        .virsh_on(LXC, &["reboot", "other", "--mode", "signal"])
        .success();
    other.wait_until_up_again(2);
    libvirtd
        .virsh_on(LXC, &["shutdown", "cell", "--mode", "signal"])
        .success();
    libvirtd.wait_state_on(LXC, "cell", "shut off");
    assert!(container.said().ends_with("down\n"), "{}", container.said());
}

#[test]
fn a_paused_container_goes_with_its_cell_and_leaves_no_group() {
    let libvirtd = Libvirtd::with_containers();
    let container = Container::new("cell");
    libvirtd.run_container(&container);
    libvirtd.virsh_on(LXC, &["suspend", "cell"]).success();
    let parts: Vec<_> = libvirtd.cell().folder().iter().rev().take(2).collect();
    let [cell, lab] = parts.as_slice() else {
        panic!("{parts:?}")
    };
    let group = format!("{}-{}", lab.to_string_lossy(), cell.to_string_lossy());
    let left = || {
        let words = ["/sys/fs/cgroup", "-maxdepth", "2", "-name", &group];
        shell("find", &words).stdout()
    };
    assert!(left().contains("/freezer/"), "{}", left());
    drop(libvirtd);
    eventually("its groups are gone", PATIENCE, || {
        left().is_empty().then_some(())
    });
}

#[test]
fn guests_and_containers_stand_in_one_list_and_obey_the_same_commands() {
    let libvirtd = Libvirtd::with_containers();
    let (guest, container) = (Guest::tiny("guest"), Container::new("cell"));
    libvirtd.run(&guest);
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);

    let table = site.does(&["list"]);
    let header = table.lines().next().unwrap();
    assert!(header.trim_end().ends_with("HYPERVISOR"), "{table}");
    for (name, driver) in [("cell", "lxc"), ("guest", "qemu")] {
        let is_its_row = |line: &str| line.starts_with(name) && line.trim_end().ends_with(driver);
        assert!(table.lines().any(is_its_row), "{table}");
    }
    assert!(site.does(&["-o", "wide", "list"]).contains(LXC));
    let (rows, troubles) = site.list();
    assert!(rows.len() == 2 && troubles.is_empty(), "{troubles:?}");
    assert_eq!(row(&rows, "cell")["hypervisor"], LXC);
    assert_eq!(row(&rows, "guest")["hypervisor"], QEMU);
    let only = site.does(&["--hypervisor", "lxc", "-o", "name", "list"]);
    assert_eq!(only.trim(), "cell");
    assert!(
        !site
            .does(&["--hypervisor", "lxc", "list"])
            .contains("HYPERVISOR")
    );

    site.does(&["pause", "guest", "cell"]);
    assert_eq!(libvirtd.state("guest"), "paused");
    assert_eq!(libvirtd.state_on(LXC, "cell"), "paused");
    container.stands_still();
    site.does(&["unpause", "cell", "guest"]);
    assert_eq!(libvirtd.state("guest"), "running");
    container.keeps_counting();

    site.does(&["mem-set", "cell", "48M"]);
    let xml = libvirtd.virsh_on(LXC, &["dumpxml", "cell"]).stdout();
    assert!(xml.contains("<currentMemory unit='KiB'>49152<"), "{xml}");
    let xml = site.does(&["describe", "cell"]);
    assert!(xml.contains("<domain type='lxc'") && xml.contains("<init>/bin/init</init>"));
    let log = site.does(&["dmesg", "cell"]);
    assert!(log.contains("LIBVIRT_LXC_NAME=cell"), "{log}");

    site.does(&["--timeout", "110s", "shutdown", "--wait", "cell"]);
    assert_eq!(libvirtd.state_on(LXC, "cell"), "shut off");
    assert!(container.said().ends_with("down\n"), "{}", container.said());
    site.does(&["start", "cell"]);
    container.wait_until_up_again(2);
    let again = Container::new("again");
    libvirtd.run_container(&again);
    site.wait_listed("again", "running");
    site.does(&["--timeout", "110s", "reboot", "--wait", "again"]);
    again.wait_until_up_again(2);
    site.does(&["destroy", "guest", "cell"]);
    assert_eq!(libvirtd.state_on(LXC, "cell"), "shut off");
    assert_eq!(libvirtd.state("guest"), "shut off");
    site.does(&["undefine", "cell"]);
    assert_eq!(libvirtd.state_on(LXC, "cell"), "");
    let record = [
        "verb=\"pause\"",
        "domain=\"cell\"",
        &format!("hypervisor=\"{LXC}\""),
    ];
    site.host.audit().contains(&record);
}

#[test]
fn containers_have_owners_class_and_labels_as_guests_have() {
    let libvirtd = Libvirtd::with_containers();
    let container = Container::new("hers");
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);
    let alice = Realm::shared().user("alice");
    alice.rxm(&site.host, ["pause", "hers"]).code(FAILED);
    site.does(&["owner", "hers", "+alice@XMAN.TEST"]);
    site.does(&["class", "hers", "grid"]);
    site.does(&["label", "hers", "rack=b12"]);
    let (rows, _) = site.list();
    let hers = row(&rows, "hers");
    assert_eq!(hers["owners"], serde_json::json!(["alice@XMAN.TEST"]));
    assert!(
        hers["class"] == "grid" && hers["labels"]["rack"] == "b12",
        "{hers}"
    );
    alice.rxm(&site.host, ["pause", "hers"]).success();
    container.stands_still();
    alice.rxm(&site.host, ["destroy", "hers"]).success();
    site.does(&["start", "hers"]);
    let (rows, _) = site.list();
    assert_eq!(
        row(&rows, "hers")["class"],
        "grid",
        "what is defined has it as well"
    );
}

#[test]
fn containers_are_made_where_they_are_told_to_be() {
    let libvirtd = Libvirtd::with_containers();
    let container = Container::new("made");
    let site = Site::beside(&libvirtd);
    let file = container.file();
    let misplaced = ["define", &file];
    site.refuses(
        &misplaced,
        &["the XML is for another hypervisor", "--hypervisor"],
    );
    site.refuses(
        &["--hypervisor", "xen", "define", &file],
        &["no hypervisor 'xen'", LXC],
    );
    site.does(&["--hypervisor", "lxc", "define", &file]);
    assert_eq!(libvirtd.state_on(LXC, "made"), "shut off");
    site.does(&["start", "made"]);
    container.wait_until_up();
}

#[test]
fn what_containers_cannot_do_is_said_with_what_they_can() {
    let libvirtd = Libvirtd::with_containers();
    let container = Container::new("cell");
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);
    site.refuses(
        &["vcpu-set", "cell", "1"],
        &["number of virtual CPUs", "rxm edit"],
    );
    site.refuses(&["reboot", "--force", "cell"], &["no reset", "rxm destroy"]);
    site.refuses(&["mem-set", "cell", "1G"], &["at most 64 MiB"]);
    container.keeps_counting();
    site.does(&["destroy", "cell"]);
    site.refuses(&["start", "--paused", "cell"], &["leave out `--paused`"]);
}

#[test]
fn a_name_on_both_is_ambiguous_and_a_hypervisor_chooses() {
    let libvirtd = Libvirtd::with_containers();
    let (guest, container) = (Guest::tiny("twin"), Container::new("twin"));
    libvirtd.run(&guest);
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);
    let both = [
        "2 domains",
        "twin (qemu)",
        "twin (lxc)",
        "--hypervisor qemu",
    ];
    site.refuses(&["pause", "twin"], &both);
    site.refuses(
        &["describe", "twin"],
        &["2 hypervisors", QEMU, LXC, "--hypervisor"],
    );
    site.refuses(&["explain", "pause", "twin"], &["2 hypervisors"]);
    assert_eq!(libvirtd.state("twin"), "running");
    assert_eq!(libvirtd.state_on(LXC, "twin"), "running");

    site.does(&["--hypervisor", "lxc", "pause", "twin"]);
    assert_eq!(libvirtd.state_on(LXC, "twin"), "paused");
    assert_eq!(libvirtd.state("twin"), "running");
    site.does(&["--hypervisor", QEMU, "pause", "twin"]);
    assert_eq!(libvirtd.state("twin"), "paused");
    let uuid = container.uuid().to_string();
    site.does(&["unpause", &uuid]);
    container.keeps_counting();
    site.does(&["--yes", "destroy", "tw*"]);
    assert_eq!(libvirtd.state("twin"), "shut off");
    assert_eq!(libvirtd.state_on(LXC, "twin"), "shut off");
}

#[test]
fn one_uuid_on_both_hits_the_one_that_was_meant() {
    let libvirtd = Libvirtd::with_containers();
    let guest = Guest::tiny("body");
    let container = Container::new("soul").with_uuid(guest.uuid());
    libvirtd.run(&guest);
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);
    let uuid = guest.uuid().to_string();
    site.refuses(&["pause", &uuid], &["2 hypervisors", QEMU, LXC]);
    site.does(&["pause", "soul"]);
    assert_eq!(libvirtd.state("body"), "running");
    container.stands_still();
    site.does(&["unpause", "soul"]);
    site.does(&["pause", "body"]);
    assert_eq!(libvirtd.state("body"), "paused");
    container.keeps_counting();
}

#[test]
fn who_sees_one_of_two_means_that_one_and_learns_nothing_of_the_other() {
    let libvirtd = Libvirtd::with_containers();
    let (guest, container) = (Guest::tiny("twin"), Container::new("twin"));
    libvirtd.run(&guest);
    libvirtd.run_container(&container);
    let site = Site::beside(&libvirtd);
    site.does(&["--hypervisor", "lxc", "owner", "twin", "+alice@XMAN.TEST"]);
    let realm = Realm::shared();
    let (alice, bob) = (realm.user("alice"), realm.user("bob"));
    let twin = alice.rxm(&site.host, ["describe", "twin"]).success();
    assert!(twin.stdout().contains("type='lxc'"));
    alice.rxm(&site.host, ["pause", "twin"]).success();
    container.stands_still();
    assert_eq!(libvirtd.state("twin"), "running");
    let forbidden = alice.rxm(&site.host, ["--hypervisor", "qemu", "describe", "twin"]);
    let missing = alice.rxm(&site.host, ["--hypervisor", "qemu", "describe", "none"]);
    let said = |outcome: Outcome, name: &str| outcome.denied().stderr().replace(name, "X");
    assert_eq!(said(forbidden, "twin"), said(missing, "none"));
    let two = bob.rxm(&site.host, ["describe", "twin"]);
    let none = bob.rxm(&site.host, ["describe", "none"]);
    assert_eq!(said(two, "twin"), said(none, "none"));
}

#[test]
fn a_hypervisor_that_never_answers_disturbs_no_other_and_comes_by_itself() {
    let (libvirtd, containers) = (Libvirtd::new(), Libvirtd::with_containers());
    let (guest, container) = (Guest::tiny("guest"), Container::new("cell"));
    libvirtd.run(&guest);
    containers.run_container(&container);
    containers.freeze();
    let (qemu, lxc) = (libvirtd.outside_uri(), containers.outside_uri_of("lxc"));
    let nowhere = "xen+unix:///system?socket=/nonexistent/socket";
    let site = Site::of(Host::builder().uris(&[&lxc, &qemu, nowhere]));
    site.wait_listed("guest", "running");

    let began = Instant::now();
    let listed = site.rxm(&["list"]).code(PARTLY);
    assert!(began.elapsed() < IN_TIME, "{:?}", began.elapsed());
    assert!(listed.stdout().contains("guest"), "{}", listed.stdout());
    for (uri, why) in [
        (lxc.as_str(), "not connected yet"),
        (nowhere, "is libvirtd"),
    ] {
        let told = format!("rxm: {}: {uri}: ", site.host.target());
        let stderr = listed.stderr();
        let line = stderr.lines().find(|line| line.starts_with(&told));
        let line = line.unwrap_or_else(|| panic!("{told:?} in {stderr}"));
        assert!(line.contains(why) && line.contains("; "), "{line}");
    }
    let (rows, troubles) = site.list();
    assert!(rows.len() == 1 && troubles.len() == 2, "{troubles:?}");
    assert!(
        troubles
            .iter()
            .all(|one| one["error"]["code"] == "unavailable")
    );
    assert!(troubles.iter().any(|one| one["hypervisor"] == lxc.as_str()));
    site.does_at_once(&["pause", "guest"]);
    assert_eq!(libvirtd.state("guest"), "paused");
    site.does_at_once(&["unpause", "guest"]);

    // It could be there.
    site.rxm(&["pause", "cell"]).complains(&lxc);
    site.rxm(&["--retries", "1", "describe", "cell"])
        .complains("nothing is known of 'cell'");
    let only = ["--retries", "1", "--hypervisor", "lxc", "list"];
    site.rxm(&only)
        .complains("nothing is known of the domains yet");
    site.refuses(
        &["--hypervisor", "qemu", "describe", "cell"],
        &["no domain 'cell'"],
    );

    containers.thaw();
    site.wait_listed("cell", "running");
    site.does(&["pause", "cell"]);
    container.stands_still();
}

#[test]
fn a_hypervisor_that_hangs_or_dies_delays_nobody_and_comes_back_by_itself() {
    let libvirtd = Libvirtd::new();
    let mut containers = Libvirtd::with_containers();
    let (guest, container) = (Guest::tiny("guest"), Container::new("soul"));
    libvirtd.run(&guest);
    containers.run_container(&container);
    let (qemu, lxc) = (libvirtd.outside_uri(), containers.outside_uri_of("lxc"));
    let site = Site::of(Host::builder().uris(&[&qemu, &lxc]));
    site.wait_well(&[&qemu, &lxc]);

    containers.freeze();
    // As many as it could take to use up what xmand has for all: none of them is the other hypervisor's.
    let hanging: Vec<_> = (0..12)
        .map(|_| {
            let words = ["--timeout", "5m", "--retries", "1", "describe", "soul"];
            site.admin.rxm_call(&site.host, words).spawn()
        })
        .collect();
    for verb in ["pause", "unpause", "describe", "pause", "unpause"] {
        site.does_at_once(&[verb, "guest"]);
    }
    eventually("the silence is told", PATIENCE, || {
        let (rows, troubles) = site.list();
        let is_told = troubles.len() == 1 && troubles[0]["hypervisor"] == lxc.as_str();
        let is_stale = row(&rows, "soul")["stale"] == true;
        (is_told && is_stale && row(&rows, "guest")["stale"] == false).then_some(())
    });
    let alice = Realm::shared().user("alice");
    let told = alice.rxm(&site.host, ["list"]);
    assert!(
        told.stderr().contains(&lxc) && !told.stderr().contains("soul"),
        "who may list hears of it, and of no domain: {}",
        told.stderr()
    );
    drop(hanging);

    containers.thaw();
    site.wait_well(&[&qemu, &lxc]);
    containers.kill9();
    eventually("the end is told", PATIENCE, || {
        let (rows, troubles) = site.list();
        (rows.len() == 2 && troubles.len() == 1).then_some(())
    });
    site.does(&["pause", "guest"]);
    assert_eq!(libvirtd.state("guest"), "paused");
    container.keeps_counting();
    containers.start();
    site.wait_well(&[&qemu, &lxc]);
    site.does(&["pause", "soul"]);
    container.stands_still();
}
