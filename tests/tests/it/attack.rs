//! Callers and neighbours who look for a gap.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, chown},
    path::Path,
    time::Duration,
};

use xman_tests::{
    Guest, Host, Libvirtd, Outcome, PATIENCE, Process, Realm, Records, User, built, eventually,
};

fn host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(Realm::shared())
}

#[track_caller]
fn probe(user: &User, host: &Host, act: &[&str]) -> Outcome {
    probe_within(PATIENCE, user, host, act)
}

#[track_caller]
fn probe_within(limit: Duration, user: &User, host: &Host, act: &[&str]) -> Outcome {
    let mut words = vec![host.addr().to_string().into()];
    words.extend(act.iter().map(|word| (*word).into()));
    user.program_call(&[], Path::new(&built("xman-probe")), words)
        .spawn()
        .wait(limit)
        .success()
}

#[test]
fn a_caller_who_never_pauses_does_not_outlive_its_ticket() {
    let (alice, host) = (Realm::shared().user("alice"), host());
    let said = probe(&alice, &host, &["outlive", "4"]).stdout();
    let late = said
        .lines()
        .find_map(|line| line.strip_prefix("cut off: true, "))
        .and_then(|rest| rest.strip_suffix(" s late"))
        .and_then(|seconds| seconds.parse::<u64>().ok());
    assert!(late.is_some_and(|late| late < 5), "{said}");
    host.audit().contains(&["your ticket has ended"]);
}

#[test]
fn a_repeat_hears_that_the_domain_was_removed_and_not_that_it_is_unknown() {
    let (alice, host) = (Realm::shared().user("alice"), host());
    alice.rxm(&host, ["destroy", "test"]).success();
    let said = probe(&alice, &host, &["twice", "undefine", "test"]).stdout();
    assert_eq!(said.matches("done ok").count(), 2, "{said}");
    host.audit().contains(&["undefine", "repeated=\"yes\""]);
}

#[test]
fn a_second_xmand_leaves_the_state_of_the_first_alone() {
    let (alice, first) = (Realm::shared().user("alice"), host());
    let mut second = Host::builder()
        .uri("test:///default")
        .config_extra(&format!("state-dir = '{}'", first.state_dir().display()))
        .prepare(Realm::shared());
    let refused = second.try_start().expect_err("one state, two xmands");
    assert!(
        refused.stderr().contains("another xmand"),
        "{}",
        refused.stderr()
    );
    assert!(first.check().stdout().contains("ok    state directory"));
    alice.rxm(&first, ["pause", "test"]).success();
}

#[test]
fn changes_that_are_let_go_of_do_not_pile_up_while_libvirt_hangs() {
    let (realm, libvirtd, guest) = (Realm::shared(), Libvirtd::new(), Guest::tiny("hung"));
    libvirtd.run(&guest);
    let (alice, bob) = (realm.user("alice"), realm.user("bob"));
    let host = Host::builder()
        .k5login(["alice", "bob"])
        .beside(&libvirtd)
        .start(realm);
    eventually("the guest is known", PATIENCE, || {
        let known = alice.rxm(&host, ["list"]).stdout();
        known.contains("running").then_some(())
    });
    libvirtd.freeze();
    let said = probe(&alice, &host, &["let-go", "400", "new", "destroy", "hung"]).stdout();
    assert!(said.contains("done unknown: let go"), "{said}");
    assert!(said.contains("done busy: 256 of your changes"), "{said}");
    let said = probe(&bob, &host, &["let-go", "30", "same", "destroy", "hung"]).stdout();
    assert!(said.contains("done unknown: let go"), "{said}");
    assert!(said.contains("is still under way"), "{said}");
    libvirtd.thaw();
    eventually("changes are taken again", PATIENCE, || {
        let started = alice.rxm(&host, ["--retries", "1", "start", "hung"]);
        let state = libvirtd.state("hung");
        (started.is_success() || state == "running").then_some(())
    });
}

#[test]
fn a_plug_that_could_not_be_pulled_is_not_told_as_nothing_done() {
    let (realm, libvirtd, guest) = (Realm::shared(), Libvirtd::new(), Guest::tiny("deaf"));
    libvirtd.run(&guest);
    let alice = realm.user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .beside(&libvirtd)
        .start(realm);
    eventually("the guest is known", PATIENCE, || {
        let known = alice.rxm(&host, ["list"]).stdout();
        known.contains("running").then_some(())
    });
    // QEMU itself tells when the guest hears of it; it must be known first that we hear QEMU.
    let mut virsh = libvirtd.cell().command("stdbuf");
    let listen = ["-oL", "virsh", "-c", "qemu:///system"];
    virsh
        .args(listen)
        .args(["qemu-monitor-event", "deaf", "--loop"]);
    let heard = Process::start(virsh);
    eventually("QEMU is heard", PATIENCE, || {
        libvirtd.virsh(&["suspend", "deaf"]).success();
        libvirtd.virsh(&["resume", "deaf"]).success();
        heard.stdout().text().contains("RESUME").then_some(())
    });
    let words = [
        "--timeout",
        "40s",
        "--retries",
        "1",
        "--yes",
        "shutdown",
        "--force",
        "deaf",
    ];
    let mut asking = alice.rxm_call(&host, words).spawn();
    heard
        .stdout()
        .wait_for(Duration::from_secs(30), "POWERDOWN");
    // libvirt lets the monitor to us only when xmand's request is through; the plug is due much later.
    let monitor = ["qemu-monitor-command", "deaf", "--hmp", "info status"];
    libvirtd.virsh(&monitor).success();
    libvirtd.freeze();
    let outcome = asking.wait(2 * PATIENCE);
    libvirtd.thaw();
    assert!(
        outcome.stderr().contains("was asked and has not gone down"),
        "{}",
        outcome.stderr()
    );
    host.audit().contains(&["shutdown", "outcome=\"refused\""]);
}

#[test]
fn a_syslog_that_does_not_read_costs_no_record_that_the_backlog_could_hold() {
    let (alice, host) = (Realm::shared().user("alice"), host());
    host.audit().stop_reading();
    let limit = 10 * PATIENCE;
    let said = probe_within(limit, &alice, &host, &["many", "6000"]).stdout();
    assert_eq!(said.matches("done ok").count(), 6000);
    host.audit().resume_reading();
    eventually("all are there", PATIENCE, || {
        let records = host.audit().records();
        let reads = records
            .iter()
            .filter(|line| line.contains("verb=\"whoami\""))
            .count();
        (reads == 6000).then_some(())
    });
}

#[test]
fn a_name_that_reads_like_a_verdict_stands_in_quotes() {
    let realm = Realm::shared();
    let (mallory, host) = (realm.user("mallory"), host());
    let name = "x from 10.0.0.1: allow by k5login; ok";
    let said = probe(&mallory, &host, &["describe", name]).stdout();
    assert!(said.contains("done denied"), "{said}");
    host.audit().contains(&[
        "describe \"x from 10.0.0.1: allow by k5login; ok\" from",
        "deny",
    ]);
}

#[test]
fn a_state_folder_of_another_account_is_refused() {
    let mut host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .prepare(Realm::shared());
    let folder = host.state_dir();
    fs::create_dir_all(&folder).unwrap();
    fs::set_permissions(&folder, Permissions::from_mode(0o700)).unwrap();
    chown(&folder, Some(65_534), None).unwrap();
    let refused = host.try_start().expect_err("a folder that nobody owns");
    assert!(
        refused.stderr().contains("is open to others"),
        "{}",
        refused.stderr()
    );
    chown(&folder, Some(0), None).unwrap();
    host.start();
}
