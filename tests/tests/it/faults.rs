//! When libvirt hangs, dies, or is not there: xmand answers, nothing is lost, and it finds back by itself.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use xman_tests::{
    Guest, Host, Libvirtd, PATIENCE, Realm, Records, Scratch, User, eventually, shell, took,
};

struct Site {
    alice: User,
    host: Host,
    libvirtd: Libvirtd,
}

impl Site {
    #[track_caller]
    fn with(prepare: impl FnOnce(&Libvirtd)) -> Self {
        let realm = Realm::shared();
        let libvirtd = Libvirtd::new();
        prepare(&libvirtd);
        let host = Host::builder()
            .k5login(["alice", "bob"])
            .beside(&libvirtd)
            .start(realm);
        let site = Self {
            alice: realm.user("alice"),
            host,
            libvirtd,
        };
        site.wait_reached();
        site
    }

    #[track_caller]
    fn wait_reached(&self) {
        eventually("xmand reaches libvirt", PATIENCE, || {
            let info = self
                .alice
                .rxm(&self.host, ["-o", "json", "info"])
                .success()
                .json();
            let hypervisor = info.get(0)?.get("hypervisors")?.get(0)?;
            let is_reached = hypervisor.get("trouble")?.as_str()?.is_empty()
                && hypervisor.get("driver")?.as_str()? == "QEMU";
            // Its domains may be read for the first time only then.
            (is_reached && self.alice.rxm(&self.host, ["list"]).is_success()).then_some(())
        });
    }

    /// The rows of a list, beside which the trouble with a silent libvirt is told.
    #[track_caller]
    fn rows(&self) -> Vec<serde_json::Value> {
        let listed = self.alice.rxm(&self.host, ["-o", "json", "list"]);
        let all = listed.json().as_array().unwrap().clone();
        let (rows, troubles): (Vec<_>, Vec<_>) =
            all.into_iter().partition(|row| row.get("error").is_none());
        listed.code(if troubles.is_empty() { 0 } else { PARTLY });
        rows
    }
}

/// What rxm ends with when it brings only a part, as where a hypervisor is silent.
const PARTLY: i32 = 5;

#[test]
fn a_thousand_domains_are_listed_in_milliseconds_also_while_libvirtd_is_stopped() {
    let scratch = Scratch::new("thousand");
    let mut commands = String::new();
    let site = Site::with(|libvirtd| {
        for number in 0..1000 {
            let guest = Guest::tiny(&format!("d{number:03}"));
            let file = scratch.write(&format!("{number}.xml"), guest.xml());
            writeln!(commands, "define {}", file.display()).unwrap();
        }
        let script = scratch.write("commands", &commands);
        let shell = format!("virsh -q -c qemu:///system < {}", script.display());
        let mut virsh = libvirtd.cell().command("sh");
        virsh.args(["-c", &shell]);
        xman_tests::run(virsh, b"", Duration::from_secs(120)).success();
    });
    eventually("all are listed", PATIENCE, || {
        (site.rows().len() == 1000).then_some(())
    });
    site.libvirtd.freeze();
    // Nobody else is bob, so the audit says how long that one list took.
    let bob = Realm::shared().user("bob");
    let listed = bob.rxm(&site.host, ["-o", "name", "list"]).stdout();
    assert_eq!(listed.lines().count(), 1000);
    let by_bob = ["principal=\"bob@XMAN.TEST\"", "verb=\"list\""];
    let took = took(&site.host.audit().contains(&by_bob));
    assert!(
        took < Duration::from_secs(2),
        "a list that waits for nobody took {took:?}"
    );
    eventually(
        "the rows are marked as stale, with their age",
        PATIENCE,
        || {
            let rows = site.rows();
            rows.iter()
                .all(|row| row["stale"] == true && row["age_ms"].as_u64() > Some(0))
                .then_some(())
        },
    );
    site.libvirtd.thaw();
    site.wait_reached();
    eventually("the rows are fresh again", PATIENCE, || {
        site.rows()
            .iter()
            .all(|row| row["stale"] == false)
            .then_some(())
    });
}

#[test]
fn a_stopped_libvirtd_delays_a_change_until_its_deadline_and_not_longer() {
    let guest = Guest::tiny("stuck");
    let site = Site::with(|libvirtd| libvirtd.run(&guest));
    site.libvirtd.freeze();
    let began = Instant::now();
    let outcome = site.alice.rxm(
        &site.host,
        ["--timeout", "3s", "--retries", "1", "pause", "stuck"],
    );
    assert!(!outcome.is_success());
    assert!(
        began.elapsed() < Duration::from_secs(20),
        "{:?}",
        began.elapsed()
    );
    assert_eq!(site.rows()[0]["name"], "stuck");
    site.libvirtd.thaw();
    site.wait_reached();
    // From then on nothing comes of it any more.
    site.host.audit().wait_for(PATIENCE, |record| {
        record.contains("verb=\"pause\"") && record.contains("outcome=\"")
    });
    let state = site.libvirtd.state("stuck");
    eventually("what came of it can be seen", PATIENCE, || {
        (site.rows()[0]["state"] == state.as_str()).then_some(())
    });
    let verb = if state == "paused" {
        "unpause"
    } else {
        "pause"
    };
    site.alice.rxm(&site.host, [verb, "stuck"]).success();
}

#[test]
fn a_killed_libvirtd_is_found_again_and_events_come_again() {
    let guest = Guest::tiny("survivor");
    let mut site = Site::with(|libvirtd| libvirtd.run(&guest));
    site.libvirtd.kill9();
    eventually("the trouble is told", PATIENCE, || {
        let info = site
            .alice
            .rxm(&site.host, ["-o", "json", "info"])
            .success()
            .json();
        (!info[0]["hypervisors"][0]["trouble"].as_str()?.is_empty()).then_some(())
    });
    // Callers hear the newest cause, which soon is that it cannot be reached.
    let lost = "the connection to libvirt is lost";
    site.host.stderr().wait_for(PATIENCE, lost);
    site.alice
        .rxm(&site.host, ["list"])
        .code(PARTLY)
        .complains("qemu:///system: ")
        .says("survivor");
    let outcome = site.alice.rxm(
        &site.host,
        ["--timeout", "20s", "--retries", "1", "pause", "survivor"],
    );
    assert!(
        !outcome.is_success() && outcome.stderr().contains("libvirt"),
        "{}",
        outcome.stderr()
    );
    site.libvirtd.start();
    site.wait_reached();
    site.alice.rxm(&site.host, ["pause", "survivor"]).success();
    assert_eq!(site.libvirtd.state("survivor"), "paused");
    site.libvirtd.virsh(&["resume", "survivor"]).success();
    eventually("events come again", Duration::from_secs(8), || {
        (site.rows()[0]["state"] == "running").then_some(())
    });
}

#[test]
fn xmand_starts_and_answers_while_libvirtd_is_down() {
    let realm = Realm::shared();
    let mut libvirtd = Libvirtd::new();
    libvirtd.kill9();
    let alice = realm.user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .beside(&libvirtd)
        .start(realm);
    alice.rxm(&host, ["whoami"]).success();
    for words in [vec!["list"], vec!["start", "localhost/x"]] {
        let words = ["--retries", "1"].into_iter().chain(words);
        let outcome = alice.rxm(&host, words);
        assert!(
            !outcome.is_success() && outcome.stderr().contains("libvirt"),
            "{}",
            outcome.stderr()
        );
    }
    assert!(host.check().stdout().contains("WRONG hypervisor"));
    libvirtd.start();
    libvirtd.define(&Guest::tiny("late"));
    eventually("it finds libvirt by itself", PATIENCE, || {
        alice
            .rxm(&host, ["list"])
            .stdout()
            .contains("late")
            .then_some(())
    });
}

#[test]
fn a_domain_that_vanishes_is_not_found_and_not_something_else() {
    let guest = Guest::tiny("fleeting");
    let site = Site::with(|libvirtd| libvirtd.define(&guest));
    site.libvirtd.virsh(&["undefine", "fleeting"]).success();
    let outcome = site
        .alice
        .rxm(&site.host, ["start", &guest.uuid().to_string()])
        .code(1);
    assert!(
        outcome.stderr().contains("fleeting")
            || outcome.stderr().contains(&guest.uuid().to_string()),
        "{}",
        outcome.stderr()
    );
    site.alice.rxm(&site.host, ["list"]).success();
}

#[test]
fn one_action_twice_at_once_happens_once() {
    let guest = Guest::tiny("race");
    let site = Site::with(|libvirtd| libvirtd.define(&guest));
    let mut both: Vec<_> = (0..2)
        .map(|_| {
            site.alice
                .rxm_call(&site.host, ["--retries", "1", "start", "race"])
                .spawn()
        })
        .collect();
    let codes: Vec<i32> = both
        .iter_mut()
        .map(|start| start.wait(PATIENCE).exit_code())
        .collect();
    assert!(codes.contains(&0) && codes.contains(&1), "{codes:?}");
    assert_eq!(site.libvirtd.state("race"), "running");
}

#[test]
fn a_full_disk_stops_changes_before_they_begin_and_reads_go_on() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let scratch = Scratch::new("full");
    let disk = scratch.path().join("disk");
    std::fs::create_dir(&disk).unwrap();
    let path = disk.display().to_string();
    shell(
        "mount",
        &["-t", "tmpfs", "-o", "size=1m,mode=0700", "tmpfs", &path],
    )
    .success();
    let _mounted = Unmount(path.clone());
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra(&format!("state-dir = '{path}/state'"))
        .start(realm);
    alice.rxm(&host, ["pause", "test"]).success();
    let _ = std::fs::write(disk.join("ballast"), vec![0; 2 << 20]);
    let mut refused = false;
    for verb in [
        "unpause", "pause", "unpause", "pause", "unpause", "pause", "unpause", "pause",
    ] {
        let outcome = alice.rxm(&host, ["--retries", "1", verb, "test"]);
        refused |= !outcome.is_success() && outcome.stderr().contains("nothing was begun");
    }
    assert!(
        refused,
        "a change went on though it could not be written down"
    );
    alice.rxm(&host, ["list"]).success();
    std::fs::remove_file(disk.join("ballast")).unwrap();
    let state = alice.rxm(&host, ["list"]).stdout();
    let verb = if state.contains("paused") {
        "unpause"
    } else {
        "pause"
    };
    alice.rxm(&host, [verb, "test"]).success();
    host.audit()
        .contains(&["outcome=\"unavailable\"", "nothing was begun"]);
}

struct Unmount(String);

impl Drop for Unmount {
    fn drop(&mut self) {
        let _ = shell("umount", &["-l", &self.0]);
    }
}
