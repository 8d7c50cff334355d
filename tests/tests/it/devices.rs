//! Disks and network interfaces come and go, seen by the guest and by `virsh`; and what must not come does not.

use std::{fs, os::unix::fs::symlink, path::PathBuf};

use xman_tests::{
    Container, Guest, Host, Hosts, LXC, Libvirtd, PATIENCE, Realm, Records, Scratch, User,
    eventually, shell,
};

/// Where images lie by default, in the cell.
const IMAGES: &str = "/var/lib/libvirt/images";
/// The owner's rights, and those that a site could give to somebody who is no administrator.
const POLICY: &str = r#"
@id("ask") permit (principal, action in Action::"ask", resource is Host);
@id("owners")
permit (principal, action in [Action::"view", Action::"use", Action::"manage"], resource is Domain)
when { resource.owners.contains(principal) };
@id("half") permit (principal == User::"carol@XMAN.TEST", action == Action::"attach", resource is Domain);
@id("half-seen") permit (principal == User::"carol@XMAN.TEST", action == Action::"list", resource is Domain);
@id("whole") permit (principal == User::"eve@XMAN.TEST", action == Action::"attach", resource);
@id("whole-seen")
permit (principal == User::"eve@XMAN.TEST", action == Action::"list", resource is Domain) when { resource.name != "secret" };
"#;

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
            .policy("site.cedar", POLICY)
            .beside(&libvirtd)
            .start(realm);
        let site = Self {
            alice: realm.user("alice"),
            host,
            libvirtd,
        };
        fs::create_dir_all(site.outside("")).unwrap();
        wait_for_libvirt(&site.alice, &site.host);
        site
    }

    /// Where an image lies for the test.
    fn outside(&self, name: &str) -> PathBuf {
        self.libvirtd.cell().outside(&format!("{IMAGES}/{name}"))
    }

    /// Makes a raw image; returns its path in the cell.
    #[track_caller]
    fn image(&self, name: &str) -> String {
        fs::write(self.outside(name), [0; 1 << 20]).unwrap();
        format!("{IMAGES}/{name}")
    }

    /// Makes a qcow2 image with this backing file, which need not be there; returns its path in the cell.
    #[track_caller]
    fn overlay(&self, name: &str, backing: &str, format: &str) -> String {
        let path = self.outside(name).display().to_string();
        let words = [
            "create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", format, &path, "1M",
        ];
        shell("qemu-img", &words).success();
        format!("{IMAGES}/{name}")
    }

    #[track_caller]
    fn does(&self, words: &[&str]) -> String {
        self.alice.rxm(&self.host, words).success().stdout()
    }

    /// The host refuses, with these words.
    #[track_caller]
    fn refuses(&self, words: &[&str], because: &str) {
        let outcome = self.alice.rxm(&self.host, words).code(1);
        assert!(
            outcome.stderr().contains(because),
            "{words:?}: {}",
            outcome.stderr()
        );
    }

    #[track_caller]
    fn defined(&self, name: &str) -> Guest {
        let guest = Guest::tiny(name);
        self.libvirtd.define(&guest);
        self.wait_listed(name);
        guest
    }

    #[track_caller]
    fn wait_listed(&self, name: &str) {
        eventually(&format!("{name} is listed"), PATIENCE, || {
            self.alice
                .rxm(&self.host, ["list", name])
                .is_success()
                .then_some(())
        });
    }

    /// What runs, or the definition, in virsh's words.
    #[track_caller]
    fn xml(&self, name: &str, inactive: bool) -> String {
        let words: &[&str] = if inactive {
            &["dumpxml", "--inactive", name]
        } else {
            &["dumpxml", name]
        };
        self.libvirtd.virsh(words).success().stdout()
    }

    /// `TARGET PATH` of each disk that runs, or of each that is defined.
    #[track_caller]
    fn disks(&self, name: &str, inactive: bool) -> Vec<String> {
        let words: &[&str] = if inactive {
            &["domblklist", "--inactive", name]
        } else {
            &["domblklist", name]
        };
        let list = self.libvirtd.virsh(words).success().stdout();
        list.lines()
            .filter(|line| !line.trim().is_empty())
            .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
            .collect()
    }
}

#[track_caller]
fn wait_for_libvirt(alice: &User, host: &Host) {
    eventually("xmand has reached libvirt", PATIENCE, || {
        alice
            .rxm(host, ["info"])
            .stdout()
            .contains("QEMU")
            .then_some(())
    });
}

#[test]
fn a_running_guest_gets_disks_and_lets_go_of_them() {
    let site = Site::new();
    let guest = Guest::booted("plug");
    site.libvirtd.run(&guest);
    site.wait_listed("plug");
    guest.wait_until_said("devices lo.");
    let (data, more) = (site.image("data.raw"), site.image("more.raw"));
    let said = site.does(&["attach", "disk", "plug", &data]);
    assert!(said.contains(&format!("has {data} as vda")), "{said}");
    guest.wait_until_said("devices vda lo.");
    assert_eq!(site.disks("plug", false), [format!("vda {data}")]);
    assert!(site.disks("plug", true).is_empty());

    let words = [
        "-o",
        "json",
        "attach",
        "disk",
        "plug",
        &more,
        "--target",
        "vdc",
        "--read-only",
        "--config",
    ];
    let done = site.alice.rxm(&site.host, words).success().json();
    assert_eq!(
        (&done[0]["device"], &done[0]["verb"]),
        (&"vdc".into(), &"attach".into())
    );
    guest.wait_until_said("devices vda vdb lo.");
    assert_eq!(
        site.disks("plug", false),
        [format!("vda {data}"), format!("vdc {more}")]
    );
    assert_eq!(site.disks("plug", true), [format!("vdc {more}")]);
    assert!(site.xml("plug", true).contains("<readonly/>"));

    site.does(&["detach", "disk", "plug", "vda"]);
    assert_eq!(site.disks("plug", false), [format!("vdc {more}")]);
    guest.wait_until_said("devices vdb lo.");
    site.does(&["detach", "disk", "plug", "vdc", "--config"]);
    assert!(site.disks("plug", false).is_empty() && site.disks("plug", true).is_empty());
    guest.keeps_counting();
    for words in [
        ["verb=\"attach\"", &format!("disk={data}"), "outcome=\"ok\""],
        ["verb=\"detach\"", "disk=vda", "outcome=\"ok\""],
    ] {
        site.host.audit().contains(&words);
    }
    site.refuses(
        &["detach", "disk", "plug", "vda"],
        "no such device: the disk 'vda'",
    );
}

#[test]
fn of_a_domain_that_is_off_the_definition_changes() {
    let site = Site::new();
    let _off = site.defined("off");
    let (data, more) = (site.image("data.raw"), site.image("more.raw"));
    site.does(&["attach", "disk", "off", &data, "--dry-run"]);
    assert!(
        site.disks("off", true).is_empty(),
        "a rehearsal changes nothing"
    );
    site.does(&["attach", "disk", "off", &data]);
    site.does(&["attach", "disk", "off", &more, "--cdrom", "--config"]);
    assert_eq!(
        site.disks("off", true),
        [format!("vda {data}"), format!("sda {more}")]
    );
    site.refuses(&["attach", "disk", "off", &data], "already, as vda");
    let other = site.image("other.raw");
    site.refuses(
        &["attach", "disk", "off", &other, "--target", "vda"],
        "'vda' already",
    );
    for (target, because) in [
        ("fda", "no name for a disk"),
        ("vda1", "no name for a disk"),
    ] {
        site.refuses(
            &["attach", "disk", "off", &other, "--target", target],
            because,
        );
    }
    site.refuses(
        &[
            "attach", "disk", "off", &other, "--target", "vdb", "--cdrom",
        ],
        "no such CD-ROM",
    );
    site.does(&["start", "off"]);
    assert_eq!(site.disks("off", false).len(), 2);
    site.does(&["destroy", "off"]);
    site.does(&["detach", "disk", "off", "vda"]);
    assert_eq!(site.disks("off", true), [format!("sda {more}")]);
    site.refuses(&["detach", "disk", "off", "vda"], "no such device");
    // Of what runs and has no definition there is nothing else.
    let passing = Guest::tiny("passing");
    site.does(&["create", &passing.file()]);
    site.refuses(
        &["attach", "disk", "passing", &data, "--config"],
        "no definition",
    );
    site.does(&["attach", "disk", "passing", &data]);
    assert_eq!(site.disks("passing", false), [format!("vda {data}")]);
}

#[test]
fn only_what_lies_below_an_allowed_folder_comes_whatever_it_is_called() {
    let site = Site::new();
    let _web = site.defined("web");
    let odd = "a 'b' \"c\" <d> & ]]> ü.raw";
    let path = site.image(odd);
    site.does(&["attach", "disk", "web", &path]);
    assert!(site.xml("web", true).contains("ü.raw"));
    site.does(&["start", "web"]);
    site.does(&["destroy", "web"]);

    let outside = site.libvirtd.cell().outside("/var/lib/libvirt/outside.raw");
    fs::write(&outside, "secret").unwrap();
    symlink("../outside.raw", site.outside("out")).unwrap();
    symlink("/etc/shadow", site.outside("shadow")).unwrap();
    symlink("/dev/null", site.outside("null")).unwrap();
    fs::create_dir(site.outside("folder")).unwrap();
    shell("mkfifo", &[&site.outside("pipe").display().to_string()]).success();
    for (name, because) in [
        ("/var/lib/libvirt/outside.raw", "[devices]"),
        ("/etc/shadow", "[devices]"),
        ("/nonexistent", "[devices]"),
        ("/var/lib/libvirt/images", "[devices]"),
        ("/var/lib/libvirt/images-too/x", "[devices]"),
        ("/var/lib/libvirt/images/out", "[devices]"),
        ("/var/lib/libvirt/images/shadow", "[devices]"),
        ("/var/lib/libvirt/images/null", "no image"),
        ("/var/lib/libvirt/images/pipe", "no image"),
        ("/var/lib/libvirt/images/folder", "a folder"),
        ("/var/lib/libvirt/images/none", "there is no"),
        ("/var/lib/libvirt/images/../outside.raw", "'..'"),
        ("/var/lib/libvirt/images/a\nb", "character"),
        ("images/x", "absolute"),
        ("", "absolute"),
        (
            "/var/lib/libvirt/images/x'/><source file='/etc/shadow",
            "there is no",
        ),
    ] {
        site.refuses(&["attach", "disk", "web", name], because);
    }
    site.alice
        .rxm(&site.host, ["attach", "disk", "web", &"/x".repeat(4000)])
        .code(1)
        .complains("bytes");
    assert_eq!(site.disks("web", true).len(), 1);
    site.host
        .audit()
        .contains(&["verb=\"attach\"", "disk=/etc/shadow", "outcome=\"refused\""]);
}

#[test]
fn a_disk_that_another_domain_has_is_a_conflict_unless_both_share_it_or_only_read_it() {
    let site = Site::new();
    let _guests = ["secret", "db", "shop"].map(|name| site.defined(name));
    let data = site.image("data.raw");
    symlink("data.raw", site.outside("link")).unwrap();
    fs::hard_link(site.outside("data.raw"), site.outside("hard")).unwrap();
    let (link, hard) = (format!("{IMAGES}/link"), format!("{IMAGES}/hard"));
    site.does(&["attach", "disk", "secret", &data]);
    for path in [&data, &link, &hard] {
        site.refuses(
            &["attach", "disk", "db", path],
            "a disk of 'secret' already",
        );
        site.refuses(
            &["attach", "disk", "db", path, "--read-only"],
            "a disk of 'secret' already",
        );
    }
    // Who does not see that domain does not learn its name.
    let eve = Realm::shared().user("eve");
    let told = eve
        .rxm(&site.host, ["attach", "disk", "db", &data])
        .code(1)
        .stderr();
    assert!(
        told.contains("of another domain") && !told.contains("secret"),
        "{told}"
    );

    let shared = site.image("shared.raw");
    site.does(&["attach", "disk", "db", &shared, "--shareable"]);
    site.refuses(&["attach", "disk", "shop", &shared], "of 'db'");
    site.does(&["attach", "disk", "shop", &shared, "--shareable"]);
    let media = site.image("media.iso");
    site.does(&["attach", "disk", "db", &media, "--cdrom"]);
    site.does(&["attach", "disk", "shop", &media, "--read-only"]);
    site.refuses(&["attach", "disk", "secret", &media], "already");
    // What runs and is not defined counts as well.
    let passing = Guest::tiny("passing");
    site.does(&["create", &passing.file()]);
    let live = site.image("live.raw");
    site.does(&["attach", "disk", "passing", &live]);
    site.refuses(&["attach", "disk", "db", &live], "of 'passing'");
}

#[test]
fn two_who_ask_for_one_disk_at_once_do_not_both_get_it() {
    let site = Site::new();
    let names: Vec<_> = (0..4).map(|number| format!("g{number}")).collect();
    let _guests: Vec<_> = names.iter().map(|name| site.defined(name)).collect();
    for round in 0..3 {
        let path = site.image(&format!("{round}.raw"));
        let calls: Vec<_> = names
            .iter()
            .map(|name| {
                let words = ["attach", "disk", name.as_str(), path.as_str()];
                site.alice.rxm_call(&site.host, words).spawn()
            })
            .collect();
        let codes: Vec<_> = calls
            .into_iter()
            .map(|mut call| call.wait(PATIENCE).exit_code())
            .collect();
        assert_eq!(
            codes.iter().filter(|code| **code == 0).count(),
            1,
            "{codes:?}"
        );
        let users: Vec<_> = names
            .iter()
            .filter(|name| site.xml(name, true).contains(&path))
            .collect();
        assert_eq!(users.len(), 1, "{users:?}");
    }
}

#[test]
fn an_image_brings_nothing_that_may_not_come() {
    let site = Site::new();
    let _web = site.defined("web");
    site.image("base.raw");
    let good = site.overlay("good", "base.raw", "raw");
    site.does(&["start", "web"]);
    site.does(&["attach", "disk", "web", &good, "--format", "qcow2"]);
    let live = site.xml("web", false);
    assert!(
        live.contains("<backingStore type='file'") && live.contains("/base.raw"),
        "{live}"
    );
    // Another overlay of the same base only reads it; who would write it is refused.
    let _db = site.defined("db");
    let second = site.overlay("second", "base.raw", "raw");
    site.does(&["attach", "disk", "db", &second, "--format", "qcow2"]);
    let _shop = site.defined("shop");
    site.refuses(
        &["attach", "disk", "shop", &format!("{IMAGES}/base.raw")],
        "two domains can have it only if",
    );
    // One that is off would read it when it is started.
    let other = site.image("other.raw");
    let third = site.overlay("third", "other.raw", "raw");
    let words = ["attach-disk", "shop", &third, "vdb", "--config"];
    let driver = ["--driver", "qemu", "--subdriver", "qcow2"];
    site.libvirtd
        .virsh(&[&words[..], &driver].concat())
        .success();
    let shop = site.xml("shop", true);
    assert!(!shop.contains("<backingStore"), "{shop}");
    site.refuses(
        &["attach", "disk", "db", &other],
        "two domains can have it only if",
    );
    fs::write(
        site.libvirtd.cell().outside("/var/lib/libvirt/foreign.raw"),
        "x",
    )
    .unwrap();
    let data = site.outside("elsewhere.qcow2").display().to_string();
    let option = format!(
        "data_file={},data_file_raw=on",
        site.outside("bytes").display()
    );
    shell(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", &option, &data, "1M"],
    )
    .success();
    for (path, because) in [
        (site.overlay("a", "/etc/shadow", "raw"), "[devices]"),
        (site.overlay("b", "../foreign.raw", "raw"), "[devices]"),
        (
            site.overlay("c", "nbd://10.77.0.1/x", "raw"),
            "no file of this host",
        ),
        (site.overlay("d", "base.raw", "vmdk"), "format"),
        (format!("{IMAGES}/elsewhere.qcow2"), "another file"),
        (format!("{IMAGES}/base.raw"), "no qcow2 image"),
    ] {
        site.refuses(
            &["attach", "disk", "web", &path, "--format", "qcow2"],
            because,
        );
    }
    site.refuses(
        &[
            "attach",
            "disk",
            "db",
            &site.overlay("e", "base.raw", "raw"),
            "--format",
            "qcow2",
            "--shareable",
        ],
        "only a raw one can be shared",
    );
    // As raw it is bytes: what they say is the guest's own affair.
    site.does(&["attach", "disk", "web", &format!("{IMAGES}/a")]);
    let live = site.xml("web", false);
    assert!(!live.contains("/etc/shadow"), "{live}");
}

#[test]
fn a_guest_that_does_not_let_go_keeps_its_disk_everywhere() {
    let site = Site::new();
    let _deaf = site.defined("deaf");
    let data = site.image("data.raw");
    site.does(&["attach", "disk", "deaf", &data]);
    site.does(&["start", "deaf"]);
    let words = [
        "detach",
        "disk",
        "deaf",
        "vda",
        "--config",
        "--timeout",
        "9s",
        "--retries",
        "1",
    ];
    site.refuses(&words, "has not let go of it");
    assert_eq!(site.disks("deaf", true), [format!("vda {data}")]);
    // Asked again it is waited for again.
    site.refuses(&words, "has not let go of it");
    site.does(&["pause", "deaf"]);
    site.refuses(&["detach", "disk", "deaf", "vda"], "hears nothing");
    site.does(&["destroy", "deaf"]);
    site.does(&["detach", "disk", "deaf", "vda"]);
    assert!(site.disks("deaf", true).is_empty());
}

#[test]
fn what_cannot_be_put_into_the_definition_does_not_stay_in_what_runs() {
    let site = Site::new();
    let guest = Guest::booted("half");
    site.libvirtd.run(&guest);
    site.wait_listed("half");
    let data = site.image("data.raw");
    // libvirt writes definitions to a folder that has become read-only.
    let folder = "/etc/libvirt/qemu";
    for words in [
        vec!["--bind", folder, folder],
        vec!["-o", "remount,bind,ro", folder],
    ] {
        let mut mount = site.libvirtd.cell().command("mount");
        mount.args(words);
        xman_tests::run(mount, b"", PATIENCE).success();
    }
    site.refuses(
        &["attach", "disk", "half", &data, "--config"],
        "taken away again",
    );
    assert!(site.disks("half", false).is_empty());
    assert!(site.disks("half", true).is_empty());
    site.does(&["attach", "disk", "half", &data]);
    assert_eq!(site.disks("half", false), [format!("vda {data}")]);
}

#[test]
fn attaching_takes_the_right_on_the_host_and_on_the_domain() {
    let site = Site::new();
    let _web = site.defined("web");
    let data = site.image("data.raw");
    let realm = Realm::shared();
    let (bob, carol, eve) = (realm.user("bob"), realm.user("carol"), realm.user("eve"));
    site.does(&["owner", "web", &format!("+{}", bob.principal())]);
    let attach = ["attach", "disk", "web", data.as_str()];
    for person in [&bob, &carol] {
        person.rxm(&site.host, attach).denied();
        let rehearsed = person
            .rxm(&site.host, ["attach", "disk", "web", &data, "--dry-run"])
            .code(1);
        assert!(rehearsed.stdout().contains("you may not"), "{rehearsed}");
        site.host
            .audit()
            .contains(&[person.principal(), "verb=\"attach\"", "verdict=\"deny\""]);
    }
    assert!(site.disks("web", true).is_empty());
    eve.rxm(&site.host, attach).success();
    // What it has its owner may take away.
    eve.rxm(&site.host, ["detach", "disk", "web", "vda"])
        .denied();
    bob.rxm(&site.host, ["detach", "disk", "web", "vda"])
        .success();
    // Whether a domain is there is nobody's business who may not see it.
    let _secret = site.defined("secret");
    let hidden = eve.rxm(&site.host, ["attach", "disk", "secret", &data]);
    let missing = eve.rxm(&site.host, ["attach", "disk", "nothing", &data]);
    assert_eq!(hidden.exit_code(), missing.exit_code());
    assert_eq!(
        hidden.stderr().replace("secret", "nothing"),
        missing.stderr()
    );
}

#[test]
fn interfaces_come_and_go_on_the_networks_and_bridges_that_are_named() {
    let realm = Realm::new();
    let hosts = Hosts::pair(&realm);
    let alice = realm.user("alice");
    let cell = hosts.alpha.cell();
    cell.ip(&["link", "add", "labbr", "type", "bridge"]);
    cell.ip(&["link", "set", "labbr", "up"]);
    let network = cell.outside("/var/lib/libvirt/network.xml");
    fs::write(
        network,
        "<network><name>lab</name><forward mode='bridge'/><bridge name='labbr'/></network>",
    )
    .unwrap();
    for words in [
        ["net-define", "/var/lib/libvirt/network.xml"],
        ["net-start", "lab"],
    ] {
        hosts.alpha.virsh(&words).success();
    }
    let host = Host::builder()
        .k5login(["alice"])
        .beside(&hosts.alpha)
        .config_extra("[devices]\nnetworks = ['lab', 'none']\nbridges = ['labbr']")
        .start(&realm);
    wait_for_libvirt(&alice, &host);
    let guest = Guest::booted("net");
    hosts.alpha.run(&guest);
    eventually("net is listed", PATIENCE, || {
        alice.rxm(&host, ["list", "net"]).is_success().then_some(())
    });
    let does = |words: &[&str]| alice.rxm(&host, words).success().stdout();
    let refuses = |words: &[&str], because: &str| {
        alice.rxm(&host, words).code(1).complains(because);
    };
    let plugged = || hosts.alpha.virsh(&["domiflist", "net"]).success().stdout();
    let kept = || {
        hosts
            .alpha
            .virsh(&["domiflist", "--inactive", "net"])
            .success()
            .stdout()
    };

    let mac = "52:54:00:12:34:56";
    let said = does(&[
        "attach",
        "interface",
        "net",
        "--network",
        "lab",
        "--mac",
        "52-54-00-12-34-56",
        "--model",
        "virtio",
    ]);
    assert!(
        said.contains(&format!("is on the network lab as {mac}")),
        "{said}"
    );
    guest.wait_until_said("devices eth0 lo.");
    assert!(plugged().contains(mac) && !kept().contains(mac));
    refuses(
        &[
            "attach",
            "interface",
            "net",
            "--bridge",
            "labbr",
            "--mac",
            mac,
        ],
        "has an interface 52:54:00:12:34:56 already",
    );
    let words = [
        "-o",
        "json",
        "attach",
        "interface",
        "net",
        "--bridge",
        "labbr",
        "--config",
    ];
    let done = alice.rxm(&host, words).success().json();
    let second = done[0]["device"].as_str().unwrap().to_owned();
    assert!(second.starts_with("52:54:00:"), "{done}");
    assert!(plugged().contains(&second) && kept().contains(&second));

    for (words, because) in [
        (["--network", "default"], "`networks` in [devices]"),
        (["--network", "labbr"], "`networks` in [devices]"),
        (["--bridge", "lab"], "`bridges` in [devices]"),
        (["--bridge", "lo"], "`bridges` in [devices]"),
        (["--network", "none"], "no such network"),
    ] {
        refuses(
            &[&["attach", "interface", "net"][..], &words].concat(),
            because,
        );
    }
    does(&["detach", "interface", "net", mac]);
    assert!(!plugged().contains(mac));
    does(&["detach", "interface", "net", &second, "--config"]);
    assert!(!plugged().contains(&second) && !kept().contains(&second));
    refuses(&["detach", "interface", "net", mac], "no such device");
    guest.keeps_counting();
}

#[test]
fn a_hypervisor_that_cannot_says_so() {
    let realm = Realm::shared();
    let libvirtd = Libvirtd::with_containers();
    let images = libvirtd.cell().outside(IMAGES);
    fs::create_dir_all(&images).unwrap();
    fs::write(images.join("data.raw"), [0; 1 << 20]).unwrap();
    let host = Host::builder()
        .k5login(["alice"])
        .inside(libvirtd.cell())
        .uri(LXC)
        .start(realm);
    let alice = realm.user("alice");
    let container = Container::new("cell");
    libvirtd.run_container(&container);
    eventually("the container is listed", PATIENCE, || {
        alice
            .rxm(&host, ["list", "cell"])
            .is_success()
            .then_some(())
    });
    let words = ["attach", "disk", "cell", "/var/lib/libvirt/images/data.raw"];
    let outcome = alice.rxm(&host, words).code(1);
    assert!(outcome.stderr().contains("no way to attach"), "{outcome}");
    container.keeps_counting();
}

#[test]
fn a_folder_that_others_may_write_is_told_of_by_check_and_gives_no_disks() {
    let site = Site::new();
    let _web = site.defined("web");
    let data = site.image("data.raw");
    site.host
        .check()
        .success()
        .says("its images may be attached");
    shell("chmod", &["g+w", &site.outside("").display().to_string()]).success();
    let checked = site.host.check();
    assert!(!checked.is_success(), "{checked}");
    assert!(
        checked.stdout().contains("root's") || checked.stderr().contains("root's"),
        "{checked}"
    );
    site.refuses(
        &["attach", "disk", "web", &data],
        "root's and writable by nobody else",
    );
}

#[test]
fn what_a_domain_of_another_hypervisor_has_is_taken_and_what_is_not_known_is_not_free() {
    let realm = Realm::shared();
    let libvirtd = Libvirtd::new();
    let images = libvirtd.cell().outside(IMAGES);
    fs::create_dir_all(&images).unwrap();
    for name in ["data.raw", "free.raw"] {
        fs::write(images.join(name), [0; 1 << 20]).unwrap();
    }
    let guest = Guest::tiny("web");
    libvirtd.define(&guest);
    let scratch = Scratch::new("node");
    let node = scratch.write(
        "node.xml",
        format!(
            "<node><domain type='test'><name>other</name><memory>65536</memory><os><type>hvm</type></os><devices>\
             <disk type='file' device='disk'><source file='{IMAGES}/data.raw'/><target dev='vda' bus='virtio'/></disk>\
             </devices></domain></node>"
        ),
    );
    let alice = realm.user("alice");
    let host = |second: &str| {
        let host = Host::builder()
            .k5login(["alice"])
            .inside(libvirtd.cell())
            .uris(&["qemu:///system", second])
            .start(realm);
        wait_for_libvirt(&alice, &host);
        eventually("web is listed", PATIENCE, || {
            let listed = alice.rxm(&host, ["-o", "name", "list", "web"]);
            listed.stdout().contains("web").then_some(())
        });
        host
    };
    let both = host(&format!("test://{}", node.display()));
    eventually("other is listed", PATIENCE, || {
        alice
            .rxm(&both, ["list", "other"])
            .is_success()
            .then_some(())
    });
    let attach = |host: &Host, name: &str| {
        let path = format!("{IMAGES}/{name}");
        alice.rxm(host, ["attach", "disk", "web", &path, "--retries", "1"])
    };
    attach(&both, "data.raw")
        .code(1)
        .complains("a disk of 'other' already");
    attach(&both, "free.raw").success();
    drop(both);
    let half = host("test:///nonexistent/node.xml");
    let refused = attach(&half, "data.raw");
    assert!(!refused.is_success(), "{refused}");
    refused.complains("cannot be known");
}
