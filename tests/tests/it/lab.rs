//! The lab itself: what every other test rests on.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use xman_tests::{
    Embed, Guest, Host, Hosts, Libvirtd, PATIENCE, Process, Realm, Records, Rsyslog, Scratch,
    Syslog, bare_command, eventually, program, shell,
};

#[test]
fn realm_issues_tickets_and_service_keys() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    assert!(alice.has_valid_ticket());
    let keytab = realm.keytab(&["xman/localhost"]);
    assert!(keytab.is_file());
    alice.fetch_ticket("xman@localhost");
}

#[test]
fn a_realm_of_another_name_has_people_of_its_own() {
    let stranger = Realm::named("STRANGER.TEST");
    assert_eq!(stranger.user("alice").principal(), "alice@STRANGER.TEST");
}

#[test]
fn short_ticket_ends_and_can_be_renewed_by_kinit() {
    let bob = Realm::shared().user_with_expired_ticket("bob");
    assert!(!bob.has_valid_ticket());
    bob.kinit();
    assert!(bob.has_valid_ticket());
    bob.kdestroy();
    assert!(!bob.has_valid_ticket());
}

#[test]
fn stopped_kdc_is_gone_and_comes_back_on_the_same_port() {
    let realm = Realm::new();
    let carol = realm.user("carol");
    let _ = realm.keytab(&["xman/localhost"]);
    realm.stop_kdc();
    let kvno = || {
        let mut kvno = xman_tests::command("kvno");
        kvno.envs(carol.env()).args(["-S", "xman", "localhost"]);
        xman_tests::run(kvno, b"", PATIENCE)
    };
    assert!(!kvno().is_success());
    realm.restart_kdc();
    kvno().success();
}

#[test]
fn syslog_that_stops_reading_fills_up_and_one_that_vanished_comes_back() {
    let syslog = Syslog::new();
    let sender = UnixDatagram::unbound().unwrap();
    sender.set_nonblocking(true).unwrap();
    sender.send_to(b"first", syslog.path()).unwrap();
    syslog.contains(&["first"]);

    syslog.stop_reading();
    let sent = (0..1000)
        .take_while(|_| sender.send_to(b"more", syslog.path()).is_ok())
        .count();
    assert!(sent < 1000, "the socket never filled up");
    syslog.resume_reading();
    xman_tests::eventually("everything sent is read", PATIENCE, || {
        (syslog.records().len() == sent + 1).then_some(())
    });

    syslog.vanish();
    assert!(sender.send_to(b"lost", syslog.path()).is_err());
    syslog.come_back();
    sender.send_to(b"again", syslog.path()).unwrap();
    syslog.contains(&["again"]);
}

#[test]
fn rsyslogd_keeps_structured_data() {
    let rsyslog = Rsyslog::new();
    let sender = UnixDatagram::unbound().unwrap();
    let line = "<86>1 2026-01-02T03:04:05.678Z host xmand 42 audit [xman@1 verb=\"list\"] words";
    sender.send_to(line.as_bytes(), rsyslog.path()).unwrap();
    let record = rsyslog.wait_for(PATIENCE, |record| record.contains("words"));
    assert!(record.contains("[xman@1 verb=\"list\"]"), "{record}");
}

#[test]
fn shell_reports_what_a_program_said() {
    shell("sh", &["-c", "echo well"]).success().says("well");
    let _ = shell("sh", &["-c", "echo denied >&2; exit 1"]).denied();
}

#[test]
fn tiny_guest_runs_under_a_private_libvirtd_that_can_hang_crash_and_come_back() {
    let mut libvirtd = Libvirtd::new();
    let guest = Guest::tiny("tiny");
    libvirtd.run(&guest);
    assert_eq!(libvirtd.state("tiny"), "running");

    libvirtd.freeze();
    let mut virsh = libvirtd.cell().command("virsh");
    virsh.args(["-c", "qemu:///system", "list"]);
    let mut hanging = xman_tests::Process::start(virsh);
    std::thread::sleep(Duration::from_millis(500));
    assert!(hanging.is_running(), "a stopped libvirtd answered");
    libvirtd.thaw();
    hanging.wait(PATIENCE).success().says("tiny");

    libvirtd.kill9();
    assert!(!libvirtd.virsh(&["list"]).is_success());
    libvirtd.start();
    assert_eq!(libvirtd.state("tiny"), "running");
    libvirtd.virsh(&["destroy", "tiny"]).success();
    assert_eq!(libvirtd.state("tiny"), "shut off");
    libvirtd.stop();
    libvirtd.start();

    let uri = libvirtd.outside_uri();
    shell("virsh", &["-c", &uri, "list", "--all"])
        .success()
        .says("tiny");
}

#[test]
fn booted_guest_counts_balloons_takes_vcpus_and_obeys_the_power_button() {
    let libvirtd = Libvirtd::new();
    let guest = Guest::booted("linux").vcpus(1, 2);
    libvirtd.run(&guest);
    guest.keeps_counting();

    libvirtd
        .virsh(&["setmem", "linux", "96M", "--live"])
        .success();
    eventually("the balloon has taken memory", PATIENCE, || {
        (libvirtd.dominfo("linux", "Used memory") == "98304 KiB").then_some(())
    });
    libvirtd
        .virsh(&["setvcpus", "linux", "2", "--live"])
        .success();
    guest.wait_until_said("online cpu1");

    libvirtd.virsh(&["suspend", "linux"]).success();
    guest.stands_still();
    libvirtd.virsh(&["resume", "linux"]).success();
    guest.keeps_counting();

    libvirtd.virsh(&["managedsave", "linux"]).success();
    guest.stands_still();
    libvirtd.virsh(&["start", "linux"]).success();
    guest.keeps_counting();

    libvirtd
        .virsh(&["reboot", "linux", "--mode", "acpi"])
        .success();
    guest.wait_until_said("power button");
    eventually("the guest counts from one again", PATIENCE, || {
        (guest.said().matches("count 1\r").count() == 2).then_some(())
    });
    libvirtd
        .virsh(&["shutdown", "linux", "--mode", "acpi"])
        .success();
    libvirtd.wait_state("linux", "shut off");
}

#[test]
fn guest_keeps_counting_while_it_migrates_between_the_pair() {
    let realm = Realm::shared();
    let hosts = Hosts::pair(realm);
    let guest = Guest::booted("nomad");
    hosts.alpha.run(&guest);
    let before = guest.count();

    hosts
        .alpha
        .virsh(&["migrate", "--live", "nomad", "qemu+tcp://beta/system"])
        .success();
    assert_eq!(hosts.beta.state("nomad"), "running");
    assert_eq!(hosts.alpha.state("nomad"), "shut off");
    guest.keeps_counting();
    assert!(guest.count() > before);

    // People at the desk get tickets there, and reach the hosts by name.
    let dave = realm.user("dave");
    let _ = realm.keytab(&["xman/alpha"]);
    let mut kvno = hosts.desk().command("kvno");
    kvno.envs(dave.env()).args(["-S", "xman", "alpha"]);
    xman_tests::run(kvno, b"", PATIENCE).success();
    let mut virsh = hosts.desk().command("virsh");
    virsh.args(["-c", "qemu+tcp://beta/system", "list"]);
    xman_tests::run(virsh, b"", PATIENCE)
        .success()
        .says("nomad");
}

#[test]
fn host_starts_answers_restarts_on_its_port_and_ends_cleanly() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let mut host = Host::builder().k5login(["alice"]).start(realm);
    let listed = alice.rxm(&host, ["list", "-o", "json"]).success().json();
    assert_eq!(listed[0]["name"], "test");
    host.audit().contains(&["alice@XMAN.TEST", "list"]);
    let address = host.addr();
    host.restart();
    assert_eq!(host.addr(), address);
    host.kill9();
    host.start();
    alice.rxm(&host, ["list"]).success().says("test");
    realm.user("mallory").rxm(&host, ["pause", "test"]).denied();
    host.stop();
}

#[test]
fn host_that_cannot_start_says_why() {
    let mut host = Host::builder().prepare(Realm::shared());
    host.configure("no-such-key = 1");
    assert!(!host.check().is_success());
    let outcome = host.try_start().unwrap_err();
    outcome.complains("no-such-key");
}

#[test]
fn terminal_is_one_that_can_be_typed_at() {
    let alice = Realm::shared().user("alice");
    let script =
        "test -t 0 && test -t 1 && stty size && read -r word && echo \"got $word\"; exit 7";
    let call = alice.program_call(&[], &program("sh"), vec!["-c".into(), script.into()]);
    let mut terminal = call.env("PATH", "/usr/bin:/bin").in_terminal();
    terminal.wait_for(PATIENCE, "40 120");
    terminal.types("hello\r");
    terminal.wait_for(PATIENCE, "got hello");
    assert_eq!(terminal.wait(PATIENCE), 7);
}

#[test]
fn embedded_guest_ends_with_its_folder() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let embed = Embed::new();
    let mut host = Host::builder()
        .k5login(["alice"])
        .uri(&embed.uri())
        .start(realm);
    let guest = Guest::tiny("inner");
    alice.rxm(&host, ["define", &guest.file()]).success();
    alice.rxm(&host, ["start", "inner"]).success();
    let pids = embed.guests();
    assert_eq!(pids.len(), 1);
    host.kill9();
    drop(embed);
    eventually("the guest is gone", PATIENCE, || {
        command_line(pids[0]).is_empty().then_some(())
    });
}

#[test]
fn host_beside_a_private_libvirtd_sees_its_guests() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let libvirtd = Libvirtd::new();
    libvirtd.run(&Guest::tiny("tiny"));
    let host = Host::builder()
        .k5login(["alice"])
        .beside(&libvirtd)
        .start(realm);
    eventually("tiny is listed", PATIENCE, || {
        alice
            .rxm(&host, ["list"])
            .stdout()
            .contains("tiny")
            .then_some(())
    });
    alice.rxm(&host, ["pause", "tiny"]).success();
    assert_eq!(libvirtd.state("tiny"), "paused");
}

#[test]
fn hosts_of_a_pair_are_called_from_their_desk_by_name() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let hosts = Hosts::pair(realm);
    let alpha = Host::builder()
        .k5login(["alice"])
        .beside(&hosts.alpha)
        .start(realm);
    let beta = Host::builder()
        .k5login(["alice"])
        .beside(&hosts.beta)
        .start(realm);
    let listed = alice
        .rxm(&[&alpha, &beta], ["info", "-o", "json"])
        .success()
        .json();
    let names: Vec<_> = listed
        .as_array()
        .unwrap()
        .iter()
        .map(|host| host["host"].clone())
        .collect();
    assert_eq!(names.len(), 2, "{listed}");
}

/// The victim is one of the tests above, in a process of its own whose lab lies in a folder that we know.
#[test]
fn killed_test_binary_leaves_no_process_and_no_file_behind() {
    let nest = Scratch::new("nest");
    let mut victim = bare_command(&std::env::current_exe().unwrap());
    victim.args([
        "--exact",
        "lab::guest_keeps_counting_while_it_migrates_between_the_pair",
    ]);
    victim.env("TMPDIR", nest.path());
    if let Some(cache) = std::env::var_os("XMAN_LAB_CACHE") {
        victim.env("XMAN_LAB_CACHE", cache);
    }
    let mut victim = Process::start(victim);
    let family = eventually("the victim runs a guest", Duration::from_secs(180), || {
        assert!(victim.is_running(), "the victim ended too early");
        let family = descendants(victim.pid());
        family
            .iter()
            .any(|(_, line)| line.contains("qemu-system"))
            .then_some(family)
    });
    victim.kill();
    for (pid, line) in family.into_iter().filter(|(_, line)| !line.is_empty()) {
        eventually(&format!("{line} ends"), PATIENCE, || {
            (command_line(pid) != line).then_some(())
        });
    }
    eventually("all files are gone", PATIENCE, || {
        std::fs::read_dir(nest.path())
            .unwrap()
            .next()
            .is_none()
            .then_some(())
    });
}

/// Returns the processes that a process has started, and those that they have, with their command lines.
fn descendants(pid: u32) -> Vec<(u32, String)> {
    let children = shell("pgrep", &["-P", &pid.to_string()]).stdout();
    let children = children.lines().filter_map(|line| line.parse().ok());
    children
        .flat_map(|child| {
            descendants(child)
                .into_iter()
                .chain([(child, command_line(child))])
        })
        .collect()
}

/// Returns the command line of a process, nothing when it has ended.
fn command_line(pid: u32) -> String {
    let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    String::from_utf8_lossy(&line).replace('\0', " ")
}

#[test]
fn guest_with_cpu_groups_gets_no_more_than_its_quota_and_counts_on() {
    let libvirtd = Libvirtd::with_cpu_groups();
    let guest = Guest::booted("slow");
    libvirtd.run(&guest);
    let told = ["schedinfo", "slow", "--live", "--set", "global_quota=5000"];
    libvirtd.virsh(&told).success();
    let used = || -> f64 {
        let said = libvirtd.virsh(&["domstats", "--cpu-total", "slow"]);
        let said = said.success().stdout();
        let line = said
            .lines()
            .find_map(|line| line.trim().strip_prefix("cpu.time="));
        line.and_then(|time| time.parse().ok()).expect("its time")
    };
    let (before, began) = (used(), Instant::now());
    guest.keeps_counting();
    eventually("some seconds pass", PATIENCE, || {
        (began.elapsed() > Duration::from_secs(5)).then_some(())
    });
    let share = (used() - before) / began.elapsed().as_nanos() as f64;
    assert!((0.01..0.08).contains(&share), "a twentieth, not {share}");
    guest.keeps_counting();
}
