//! Every operation, by `rxm` on real guests, verified from outside by `virsh`.

use std::fs;

use xman_tests::{Guest, Host, Libvirtd, PATIENCE, Realm, Records, Scratch, User, eventually};

struct Site {
    alice: User,
    host: Host,
    libvirtd: Libvirtd,
}

impl Site {
    #[track_caller]
    fn new() -> Self {
        let realm = Realm::shared();
        let libvirtd = Libvirtd::new();
        let host = Host::builder()
            .k5login(["alice"])
            .beside(&libvirtd)
            .start(realm);
        let site = Self {
            alice: realm.user("alice"),
            host,
            libvirtd,
        };
        eventually("xmand has read libvirt", PATIENCE, || {
            let listed = site.alice.rxm(&site.host, ["list"]);
            listed.is_success().then_some(())
        });
        site
    }

    #[track_caller]
    fn does(&self, words: &[&str]) -> String {
        self.alice.rxm(&self.host, words).success().stdout()
    }

    /// The host refuses, with these words, and says what to do.
    #[track_caller]
    fn refuses(&self, words: &[&str], because: &str) {
        let outcome = self.alice.rxm(&self.host, words).code(1);
        assert!(
            outcome.stderr().contains(because),
            "{words:?}: {}",
            outcome.stderr()
        );
    }

    /// One domain as `list -o json` shows it.
    #[track_caller]
    fn listed(&self, name: &str) -> serde_json::Value {
        let rows = self
            .alice
            .rxm(&self.host, ["-o", "json", "list", name])
            .success()
            .json();
        rows.as_array()
            .and_then(|rows| rows.first())
            .unwrap_or_else(|| panic!("{name} is not listed: {rows}"))
            .clone()
    }

    #[track_caller]
    fn wait_listed(&self, name: &str, key: &str, value: &str) {
        eventually(
            &format!("{name} is listed with {key}={value}"),
            PATIENCE,
            || {
                let rows = self
                    .alice
                    .rxm(&self.host, ["-o", "json", "list", name])
                    .success()
                    .json();
                (rows.get(0)?.get(key)?.to_string().trim_matches('"') == value).then_some(())
            },
        );
    }
}

#[test]
fn a_domain_is_defined_started_paused_unpaused_destroyed_and_undefined() {
    let site = Site::new();
    let guest = Guest::tiny("life");
    site.does(&["define", &guest.file()]);
    assert_eq!(site.libvirtd.state("life"), "shut off");
    site.does(&["start", "life"]);
    assert_eq!(site.libvirtd.state("life"), "running");
    site.does(&["pause", "life"]);
    assert_eq!(site.libvirtd.state("life"), "paused");
    assert_eq!(site.listed("life")["state"], "paused");
    site.does(&["unpause", "life"]);
    assert_eq!(site.libvirtd.state("life"), "running");
    site.does(&["destroy", "life"]);
    assert_eq!(site.libvirtd.state("life"), "shut off");
    site.does(&["start", "--paused", &guest.uuid().to_string()]);
    assert_eq!(site.libvirtd.state("life"), "paused");
    site.does(&["destroy", "localhost/life"]);
    site.does(&["undefine", "life"]);
    assert_eq!(site.libvirtd.state("life"), "");
    site.refuses(&["undefine", "life"], "life");
}

#[test]
fn what_makes_no_sense_is_refused_with_its_own_words() {
    let site = Site::new();
    let guest = Guest::tiny("odd");
    site.does(&["define", &guest.file()]);
    for (words, because) in [
        (vec!["pause", "odd"], "is off"),
        (vec!["unpause", "odd"], "is off"),
        (vec!["destroy", "odd"], "off already"),
        (vec!["shutdown", "odd"], "off already"),
        (vec!["reboot", "odd"], "is off"),
        (vec!["mem-set", "odd", "16MiB"], "--config"),
        (vec!["mem-set", "odd", "64MiB", "--config"], "32 MiB"),
        (vec!["vcpu-set", "odd", "4", "--config"], "at most 1"),
    ] {
        site.refuses(&words, because);
    }
    site.does(&["start", "odd"]);
    for (words, because) in [
        (vec!["start", "odd"], "running already"),
        (vec!["unpause", "odd"], "not paused"),
        (vec!["undefine", "odd"], "running"),
        (vec!["create", guest.file().as_str()], "odd"),
        (vec!["migrate", "odd", "elsewhere", "--direct"], "peer"),
    ] {
        site.refuses(&words, because);
    }
    site.does(&["pause", "odd"]);
    site.refuses(&["pause", "odd"], "paused already");
    assert_eq!(site.libvirtd.state("odd"), "paused");
}

#[test]
fn a_created_domain_runs_and_is_kept_only_when_asked_to() {
    let site = Site::new();
    let passing = Guest::tiny("passing");
    let kept = Guest::tiny("kept");
    site.does(&["create", &passing.file()]);
    assert_eq!(site.libvirtd.dominfo("passing", "Persistent"), "no");
    let xml = kept.xml();
    let words = ["create", "--define", "--paused", "-"];
    site.alice
        .rxm_call(&site.host, words)
        .stdin(&xml)
        .run()
        .success();
    assert_eq!(site.libvirtd.dominfo("kept", "Persistent"), "yes");
    assert_eq!(site.libvirtd.state("kept"), "paused");
    site.host
        .audit()
        .contains(&["verb=\"create\"", "domain=\"kept\"", "outcome=\"ok\""]);
    site.does(&["destroy", "--yes", "passing", "kept"]);
    assert_eq!(site.libvirtd.state("passing"), "");
    assert_eq!(site.libvirtd.state("kept"), "shut off");
}

#[test]
fn a_create_that_fails_leaves_nothing_behind() {
    let site = Site::new();
    let guest = Guest::tiny("broken");
    let broken = guest.xml().replace("<devices>", "<devices><disk type='file' device='disk'><source file='/nonexistent/disk'/><target dev='vda' bus='virtio'/></disk>");
    let outcome = site
        .alice
        .rxm_call(&site.host, ["create", "--define", "-"])
        .stdin(&broken)
        .run()
        .code(1);
    assert!(
        outcome.stderr().contains("/nonexistent/disk"),
        "{}",
        outcome.stderr()
    );
    assert_eq!(site.libvirtd.state("broken"), "", "no definition is left");
}

#[test]
fn xml_that_is_wrong_is_refused_and_xmand_lives() {
    let site = Site::new();
    let bomb = "<!DOCTYPE x [<!ENTITY a 'aaaaaaaaaa'><!ENTITY b '&a;&a;&a;&a;&a;&a;'>]><domain><name>&b;</name></domain>";
    let deep = format!(
        "<domain>{}{}</domain>",
        "<a>".repeat(15_000),
        "</a>".repeat(15_000)
    );
    let uuid_name = Guest::tiny("x").xml().replace(
        "<name>x</name>",
        "<name>123e4567-e89b-12d3-a456-426614174000</name>",
    );
    let long_name = Guest::tiny("x").xml().replace(
        "<name>x</name>",
        &format!("<name>{}</name>", "n".repeat(10_000)),
    );
    let path_name = Guest::tiny("x")
        .xml()
        .replace("<name>x</name>", "<name>../x</name>");
    for xml in [
        "",
        "no xml at all",
        "<domain>",
        "<network/>",
        "<domain/>",
        bomb,
        &deep,
        &uuid_name,
        &long_name,
        &path_name,
        "\0",
    ] {
        let outcome = site
            .alice
            .rxm_call(&site.host, ["define", "-"])
            .stdin(xml)
            .run();
        assert!(
            (1..=2).contains(&outcome.exit_code()),
            "{}: {}",
            xml.get(..40).unwrap_or(xml),
            outcome.stderr()
        );
        assert!(!outcome.stderr().is_empty());
    }
    let huge = format!(
        "<domain><name>huge</name><description>{}</description></domain>",
        "x".repeat(10_000_000)
    );
    let outcome = site
        .alice
        .rxm_call(&site.host, ["define", "-"])
        .stdin(&huge)
        .run();
    assert!(
        !outcome.is_success() && outcome.stderr().contains("bytes"),
        "{}",
        outcome.stderr()
    );
    let umlauts = Guest::tiny("Bücher-Käse");
    site.does(&["define", &umlauts.file()]);
    assert_eq!(site.libvirtd.state("Bücher-Käse"), "shut off");
    assert_eq!(site.listed("Bücher-Käse")["name"], "Bücher-Käse");
}

#[test]
fn a_name_taken_by_another_uuid_is_a_conflict() {
    let site = Site::new();
    site.does(&["define", &Guest::tiny("taken").file()]);
    site.refuses(&["define", &Guest::tiny("taken").file()], "taken");
}

#[test]
fn describe_shows_the_xml_and_secrets_only_on_request() {
    let site = Site::new();
    let graphics = "<devices><graphics type='vnc' port='-1' autoport='yes' passwd='s3cret'/>";
    let xml = Guest::tiny("closed").xml().replace("<devices>", graphics);
    site.alice
        .rxm_call(&site.host, ["define", "-"])
        .stdin(&xml)
        .run()
        .success();
    let plain = site.does(&["describe", "closed"]);
    assert!(
        plain.contains("<name>closed</name>") && !plain.contains("s3cret"),
        "{plain}"
    );
    assert!(
        site.does(&["describe", "--inactive", "--secrets", "closed"])
            .contains("s3cret")
    );
    site.host
        .audit()
        .contains(&["verb=\"describe-secrets\"", "domain=\"closed\""]);
}

#[test]
fn memory_is_set_live_through_the_balloon_and_in_the_definition() {
    let site = Site::new();
    let guest = Guest::booted("balloon").memory(192, 256);
    site.does(&["define", &guest.file()]);
    site.does(&["start", "balloon"]);
    guest.wait_until_up();
    site.does(&["mem-set", "balloon", "160MiB"]);
    eventually("the guest has given memory back", PATIENCE, || {
        (site.libvirtd.dominfo("balloon", "Used memory") == "163840 KiB").then_some(())
    });
    site.wait_listed("balloon", "memory_kib", "163840");
    let definition = site
        .libvirtd
        .virsh(&["dumpxml", "--inactive", "balloon"])
        .success()
        .stdout();
    assert!(
        definition.contains("<currentMemory unit='KiB'>196608</currentMemory>"),
        "{definition}"
    );
    site.does(&["mem-set", "balloon", "128MiB", "--config"]);
    let definition = site
        .libvirtd
        .virsh(&["dumpxml", "--inactive", "balloon"])
        .success()
        .stdout();
    assert!(
        definition.contains("<currentMemory unit='KiB'>131072</currentMemory>"),
        "{definition}"
    );
    site.refuses(&["mem-set", "balloon", "1G"], "256 MiB");
    site.alice
        .rxm(&site.host, ["mem-set", "balloon", "much"])
        .code(2);
    site.does(&["mem-set", "balloon", "512MiB", "--config", "--max"]);
    let definition = site
        .libvirtd
        .virsh(&["dumpxml", "--inactive", "balloon"])
        .success()
        .stdout();
    assert!(
        definition.contains("<memory unit='KiB'>524288</memory>"),
        "{definition}"
    );
    guest.keeps_counting();
}

#[test]
fn vcpus_are_set_live_and_in_the_definition() {
    let site = Site::new();
    let guest = Guest::booted("cpus").vcpus(1, 3);
    site.does(&["define", &guest.file()]);
    site.does(&["start", "cpus"]);
    guest.wait_until_up();
    site.does(&["vcpu-set", "cpus", "2"]);
    assert_eq!(site.libvirtd.dominfo("cpus", "CPU(s)"), "2");
    assert_eq!(site.listed("cpus")["vcpus"], 2);
    site.does(&["vcpu-set", "cpus", "3", "--config"]);
    assert_eq!(
        site.libvirtd
            .virsh(&["vcpucount", "cpus", "--current", "--config"])
            .stdout()
            .trim(),
        "3"
    );
    site.refuses(&["vcpu-set", "cpus", "9"], "at most 3");
}

#[test]
fn a_guest_is_asked_to_shut_down_and_waited_for() {
    let site = Site::new();
    let guest = Guest::booted("polite");
    site.does(&["define", &guest.file()]);
    site.does(&["start", "polite"]);
    guest.wait_until_up();
    site.does(&["--timeout", "110s", "shutdown", "--wait", "polite"]);
    assert_eq!(site.libvirtd.state("polite"), "shut off");
}

#[test]
fn a_guest_that_does_not_listen_is_told_of_and_destroyed_only_by_force() {
    let site = Site::new();
    let deaf = Guest::tiny("deaf");
    site.does(&["define", &deaf.file()]);
    site.does(&["start", "deaf"]);
    let outcome = site
        .alice
        .rxm(
            &site.host,
            ["--timeout", "10s", "shutdown", "--wait", "deaf"],
        )
        .code(1);
    assert!(outcome.stderr().contains("--force"), "{}", outcome.stderr());
    assert_eq!(site.libvirtd.state("deaf"), "running");
    site.alice
        .rxm(
            &site.host,
            ["--timeout", "30s", "shutdown", "--force", "--yes", "deaf"],
        )
        .success();
    assert_eq!(site.libvirtd.state("deaf"), "shut off");
}

#[test]
fn a_guest_reboots_when_asked_and_when_forced() {
    let site = Site::new();
    let guest = Guest::booted("again");
    site.does(&["define", &guest.file()]);
    site.does(&["start", "again"]);
    guest.wait_until_up();
    let boots = |n: usize| {
        eventually(&format!("boot number {n}"), PATIENCE, || {
            (guest.said().matches("count 1\r").count() == n).then_some(())
        });
    };
    boots(1);
    site.does(&["--timeout", "110s", "reboot", "--wait", "again"]);
    boots(2);
    site.does(&["reboot", "--force", "--yes", "again"]);
    boots(3);
    assert_eq!(site.libvirtd.state("again"), "running");
}

#[test]
fn info_tells_of_the_host_and_list_of_the_domains() {
    let site = Site::new();
    let guest = Guest::tiny("wide");
    site.does(&["define", &guest.file()]);
    site.does(&["start", "wide"]);
    let info = site
        .alice
        .rxm(&site.host, ["-o", "json", "info"])
        .success()
        .json();
    let nodeinfo = site.libvirtd.virsh(&["nodeinfo"]).success().stdout();
    let cpus = nodeinfo
        .lines()
        .find_map(|line| line.strip_prefix("CPU(s):"))
        .unwrap()
        .trim();
    assert_eq!(info[0]["cpus"].to_string(), cpus, "{info}");
    assert_eq!(info[0]["active"], 1, "{info}");
    let listed = site.listed("wide");
    assert_eq!(listed["uuid"], guest.uuid().to_string());
    assert_eq!(listed["memory_kib"], 32 * 1024);
    assert_eq!(listed["vcpus"], 1);
    assert_eq!(listed["persistent"], true);
    assert_eq!(listed["autostart"], false);
    site.libvirtd.virsh(&["autostart", "wide"]).success();
    site.wait_listed("wide", "autostart", "true");
    assert!(
        site.does(&["-o", "wide", "list"])
            .contains(&guest.uuid().to_string())
    );
    assert_eq!(
        site.does(&["list", "--state", "off"])
            .matches("wide")
            .count(),
        0
    );
    assert_eq!(site.does(&["-o", "name", "list", "w*"]).trim(), "wide");
    let used: u64 = listed["cpu_time_ns"].to_string().parse().unwrap();
    eventually("its CPU time grows", PATIENCE, || {
        (site.listed("wide")["cpu_time_ns"]
            .to_string()
            .parse::<u64>()
            .ok()?
            > used)
            .then_some(())
    });
}

#[test]
fn what_happens_behind_xmands_back_is_listed_soon() {
    let site = Site::new();
    let guest = Guest::tiny("behind");
    site.libvirtd.run(&guest);
    site.wait_listed("behind", "state", "running");
    site.libvirtd.virsh(&["suspend", "behind"]).success();
    site.wait_listed("behind", "state", "paused");
    site.libvirtd.virsh(&["destroy", "behind"]).success();
    site.wait_listed("behind", "state", "off");
    site.libvirtd.virsh(&["undefine", "behind"]).success();
    eventually("it is gone from the list", PATIENCE, || {
        (!site.does(&["list"]).contains("behind")).then_some(())
    });
}

#[test]
fn dmesg_shows_a_domains_hypervisor_log_and_follows_it() {
    let site = Site::new();
    let guest = Guest::tiny("logged");
    site.does(&["define", &guest.file()]);
    site.does(&["start", "logged"]);
    assert!(
        site.does(&["dmesg", "logged"]).contains("qemu-system"),
        "QEMU's command line is in its log"
    );
    let mut follow = site
        .alice
        .rxm_call(&site.host, ["dmesg", "-f", "logged"])
        .spawn();
    follow.stdout().wait_for(PATIENCE, "qemu-system");
    site.does(&["destroy", "logged"]);
    follow.stdout().wait_for(PATIENCE, "shutting down");
    follow.kill();
    site.does(&["list"]);
}

#[test]
fn dmesg_shows_the_kernels_ring_buffer() {
    let site = Site::new();
    let said = site.alice.rxm(&site.host, ["dmesg"]);
    assert!(
        said.is_success() || said.stderr().contains("kernel"),
        "{}",
        said.stderr()
    );
    if said.is_success() {
        assert!(said.stdout().contains("] "), "{}", said.stdout());
    }
}

#[test]
fn edit_stores_what_the_editor_made_and_offers_errors_again() {
    let site = Site::new();
    let guest = Guest::tiny("edited");
    site.does(&["define", &guest.file()]);
    let scratch = Scratch::new("editor");
    let editor = scratch.write(
        "editor",
        "#!/bin/sh\nsed -i 's,<vcpu[^>]*>1<,<vcpu>2<,' \"$1\"\n",
    );
    fs::set_permissions(&editor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    site.alice
        .rxm_call(&site.host, ["edit", "edited"])
        .env("EDITOR", &editor)
        .run()
        .success();
    assert_eq!(
        site.libvirtd
            .virsh(&["vcpucount", "edited", "--maximum", "--config"])
            .stdout()
            .trim(),
        "2"
    );
    let breaker = scratch.write("breaker", "#!/bin/sh\nsed -i 's,</domain>,,' \"$1\"\n");
    fs::set_permissions(
        &breaker,
        std::os::unix::fs::PermissionsExt::from_mode(0o755),
    )
    .unwrap();
    let outcome = site
        .alice
        .rxm_call(&site.host, ["edit", "edited"])
        .env("EDITOR", &breaker)
        .run();
    assert!(!outcome.is_success());
    let kept = outcome
        .stderr()
        .split_whitespace()
        .any(|word| fs::metadata(word.trim_matches(|c| "'\",;:.".contains(c))).is_ok());
    assert!(
        kept,
        "the text is kept in a file that is named: {}",
        outcome.stderr()
    );
}

#[test]
fn a_pattern_that_would_change_several_domains_wants_to_be_sure() {
    let site = Site::new();
    for name in ["grid-1", "grid-2", "other"] {
        site.libvirtd.run(&Guest::tiny(name));
        site.wait_listed(name, "state", "running");
    }
    let outcome = site.alice.rxm(&site.host, ["pause", "grid-*"]);
    assert!(
        !outcome.is_success() && outcome.stderr().contains("--yes"),
        "{}",
        outcome.stderr()
    );
    assert_eq!(site.libvirtd.state("grid-1"), "running");
    let would = site.does(&["--dry-run", "pause", "grid-*"]);
    assert!(
        would.contains("grid-1") && would.contains("grid-2") && !would.contains("other"),
        "{would}"
    );
    assert_eq!(site.libvirtd.state("grid-1"), "running");
    site.does(&["--yes", "pause", "grid-*"]);
    for (name, state) in [
        ("grid-1", "paused"),
        ("grid-2", "paused"),
        ("other", "running"),
    ] {
        assert_eq!(site.libvirtd.state(name), state, "{name}");
    }
}
