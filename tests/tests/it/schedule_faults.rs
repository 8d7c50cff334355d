//! Whatever breaks while domains give way and come back: nothing is lost, nothing runs that somebody holds, and all come back.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    time::{Duration, Instant},
};

use serde_json::Value;
use xman_tests::{Call, Guest, Host, Realm, Scratch, User, eventually};

use crate::schedule::{Farm, LONG};

/// Kills in the test of the store.
const KILLS: u32 = 200;
/// Domains of libvirt's own fake that it leases.
const NODES: u32 = 4;

/// A small generator of numbers, the same in each run.
struct Dice(u64);

impl Dice {
    fn roll(&mut self, below: u64) -> u64 {
        // Numerical Recipes' multiplier and increment; the high bits are the good ones.
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % below
    }
}

/// A node of libvirt's fake with domains that run.
fn fake_node(folder: &Scratch) -> String {
    let domains: String = (0..NODES)
        .map(|n| {
            format!(
                "<domain type='test'><name>low-{n}</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
                 <os><type>hvm</type></os></domain>"
            )
        })
        .collect();
    let node = format!(
        "<node><cpu><mhz>2000</mhz><model>i686</model><active>8</active><nodes>1</nodes><sockets>1</sockets>\
         <cores>8</cores><threads>1</threads></cpu><memory>8388608</memory>{domains}</node>"
    );
    let path = folder.path().join("node.xml");
    fs::write(&path, node).unwrap();
    format!("test://{}", path.display())
}

fn leases(user: &User, host: &Host) -> BTreeSet<String> {
    let rows = eventually("the leases are listed", LONG, || {
        let rows = user.rxm(host, ["-o", "json", "lease", "list"]);
        rows.is_success().then(|| rows.json())
    });
    let rows = rows.as_array().unwrap().clone();
    rows.iter()
        .map(|row| row["lease"].as_str().unwrap().to_owned())
        .collect()
}

#[test]
fn nothing_that_was_granted_is_lost_in_two_hundred_kills() {
    let realm = Realm::shared();
    let folder = Scratch::new("node");
    let rules = r#"
        [schedule]
        reserve-memory = "1MiB"
        [schedule.class.low]
        domains = ["low-*"]
        preempt = "pause"
        [schedule.system.slurm]
        principals = ["slurm/*@XMAN.TEST"]
        domains = ["low-*"]
        "#;
    let mut host = Host::builder()
        .k5login(["root/admin@XMAN.TEST"])
        .uri(&fake_node(&folder))
        .config_extra(rules)
        .start(realm);
    let slurm = realm.user("slurm/farm");
    let mut dice = Dice(7);
    // What was answered: true where it was granted, false where it was ended. What was not answered may be either.
    let mut known: BTreeMap<String, bool> = BTreeMap::new();
    for round in 0..KILLS {
        let key = format!("slurm/lab/{round}/0");
        let granted: Vec<String> = known
            .iter()
            .filter(|(_, is)| **is)
            .map(|(key, _)| key.clone())
            .collect();
        let ends = granted.len() > 6;
        let (key, words) = if ends {
            let key = granted[usize::try_from(dice.roll(granted.len() as u64)).unwrap()].clone();
            (key.clone(), vec!["lease".to_owned(), "end".to_owned(), key])
        } else {
            let domain = format!("low-{}", round % NODES);
            (
                key.clone(),
                vec!["lease".to_owned(), "begin".to_owned(), key, domain],
            )
        };
        let call: Call = slurm.rxm_call(&host, &words);
        let mut process = call.spawn();
        std::thread::sleep(Duration::from_millis(dice.roll(90)));
        host.kill9();
        let outcome = process.wait(LONG);
        if outcome.is_success() {
            known.insert(key, !ends);
        } else {
            known.remove(&key);
        }
        host.start();
        let there = leases(&slurm, &host);
        for (key, is_there) in &known {
            assert_eq!(
                there.contains(key),
                *is_there,
                "{key} after {round} kills: {there:?}"
            );
        }
    }
    for key in leases(&slurm, &host) {
        slurm.rxm(&host, ["lease", "end", &key]).success();
    }
    assert!(leases(&slurm, &host).is_empty());
    host.stop();
    let said = host.check().success().stdout();
    assert!(said.contains("schedule: 0 leases"), "{said}");
}

#[test]
fn a_libvirtd_that_is_killed_while_it_saves_loses_nobody() {
    let (low, high) = (
        Guest::booted("low-a").memory(256, 256),
        Guest::booted("high-b"),
    );
    let mut farm = Farm::new("freeze", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    let image = farm
        .libvirtd
        .cell()
        .outside("/var/lib/libvirt/qemu/save/low-a.save");
    eventually("libvirt writes the image", LONG, || {
        image.exists().then_some(())
    });
    farm.libvirtd.kill9();
    farm.libvirtd.start();
    farm.wait_standing("low-a", "frozen");
    farm.ends("slurm/lab/2/0");
    farm.wait_standing("low-a", "running-preemptible");
    low.keeps_counting();
    low.missed_no_number();
}

#[test]
fn a_domain_that_cannot_be_frozen_for_want_of_room_is_left_alone_and_the_job_refused() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let farm = Farm::new("freeze", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.small_save_folder();
    let refused = farm.begins("slurm/lab/2/0", "high-b").code(1);
    refused.complains("room");
    assert_eq!(farm.libvirtd.state("low-a"), "running");
    low.keeps_counting();
    low.missed_no_number();
    farm.wait_standing("low-a", "running-preemptible");
}

#[test]
fn an_image_that_is_cut_short_starts_nothing_afresh() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let farm = Farm::new("freeze", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    farm.wait_standing("low-a", "frozen");
    let image = farm
        .libvirtd
        .cell()
        .outside("/var/lib/libvirt/qemu/save/low-a.save");
    let whole = fs::read(&image).unwrap();
    fs::write(&image, &whole[..4096]).unwrap();
    farm.ends("slurm/lab/2/0");
    eventually("xmand says why it does not come back", LONG, || {
        let doing = farm.status("low-a")["doing"].as_str().unwrap().to_owned();
        doing.contains("image").then_some(())
    });
    assert_eq!(farm.libvirtd.state("low-a"), "shut off");
    let said = low.said();
    assert!(image.exists(), "the image stays");
    fs::write(&image, &whole).unwrap();
    farm.wait_standing("low-a", "running-preemptible");
    low.keeps_counting();
    low.missed_no_number();
    assert!(low.said().len() > said.len());
}

#[test]
fn a_victim_that_is_destroyed_by_hand_is_in_nobodys_way() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    farm.libvirtd.virsh(&["destroy", "low-a"]).success();
    farm.wait_standing("low-a", "down");
    farm.ends("slurm/lab/2/0");
    farm.ends("slurm/lab/1/0");
    farm.says(&farm.admin, &["start", "low-a"]).success();
    farm.wait_standing("low-a", "free");
    assert_eq!(farm.libvirtd.state("low-a"), "running");
}

#[test]
fn a_guest_that_does_not_shrink_keeps_its_memory_and_the_job_goes_elsewhere() {
    let (low, high) = (Guest::tiny("low-a").memory(256, 256), Guest::tiny("high-b"));
    let farm = Farm::new("shrink", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    let began = Instant::now();
    let refused = farm.begins("slurm/lab/2/0", "high-b").code(1);
    refused.complains("low-a");
    assert!(began.elapsed() < LONG);
    farm.wait_standing("low-a", "running-preemptible");
    assert_eq!(farm.quota("low-a"), -1);
}

#[test]
fn two_schedulers_that_ask_for_the_same_room_at_once_do_not_both_get_it() {
    let (one, other) = (Guest::tiny("high-a"), Guest::tiny("high-b"));
    let farm = Farm::new("pause", &[&one, &other]);
    for round in 0..5 {
        let keys = [
            format!("slurm/lab/a{round}/0"),
            format!("slurm/lab/b{round}/0"),
        ];
        let both = [("high-a", &keys[0]), ("high-b", &keys[1])].map(|(domain, key)| {
            let words = ["lease", "begin", key, domain];
            farm.slurm.rxm_call(&farm.host, words).spawn()
        });
        let granted = both.map(|mut process| process.wait(LONG).is_success());
        assert!(granted[0] != granted[1], "round {round}: {granted:?}");
        for key in &keys {
            farm.ends(key);
        }
    }
    // And from two sides for the same job.
    let both = [(); 2].map(|()| {
        let words = ["lease", "begin", "slurm/lab/c/0", "high-a"];
        farm.slurm.rxm_call(&farm.host, words).spawn()
    });
    for mut process in both {
        process.wait(LONG).success();
    }
    assert_eq!(leases(&farm.slurm, &farm.host).len(), 1);
}

#[test]
fn jobs_that_come_and_go_in_a_loop_do_not_keep_a_victim_from_running() {
    let (low, high) = (Guest::booted("low-a"), Guest::tiny("high-b"));
    let farm = Farm::with("pause", "1GiB", &[&low, &high], |host| {
        host.config_extra("[schedule]\nmin-run = \"3s\"")
    });
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    let (mut refused, mut granted) = (0, 0);
    let began = Instant::now();
    let before = low.count();
    let mut run = 0;
    while began.elapsed() < Duration::from_secs(12) {
        run += 1;
        let key = format!("slurm/lab/2/{run}");
        let begun = farm.says(&farm.slurm, &["lease", "begin", &key, "high-b"]);
        if begun.is_success() {
            granted += 1;
            farm.ends(&key);
        } else {
            refused += 1;
        }
    }
    assert!(
        refused > granted && granted <= 6,
        "{granted} granted, {refused} refused"
    );
    farm.wait_standing("low-a", "running-preemptible");
    low.keeps_counting();
    assert!(low.count() > before + 40, "{} after {before}", low.count());
    low.missed_no_number();
}

#[test]
fn a_thousand_leases_are_kept_listed_and_ended() {
    let low = Guest::tiny("low-a");
    let farm = Farm::new("pause", &[&low]);
    let list = Scratch::new("jobs");
    let words: Vec<String> = (0..1000).map(|job| format!("slurm/lab/{job}/0")).collect();
    for piece in words.chunks(20) {
        let calls: Vec<_> = piece
            .iter()
            .map(|key| {
                farm.slurm
                    .rxm_call(&farm.host, ["lease", "begin", key, "low-a"])
                    .spawn()
            })
            .collect();
        for mut call in calls {
            call.wait(LONG).success();
        }
    }
    assert_eq!(leases(&farm.slurm, &farm.host).len(), 1000);
    let path = list.path().join("running");
    fs::write(&path, "7 0\n").unwrap();
    farm.says(
        &farm.slurm,
        &[
            "reconcile",
            "slurm/lab",
            path.to_str().unwrap(),
            "--age",
            "1ms",
        ],
    )
    .success();
    assert_eq!(
        leases(&farm.slurm, &farm.host),
        BTreeSet::from(["slurm/lab/7/0".to_owned()])
    );
}

#[test]
fn a_store_that_was_copied_while_it_was_written_is_one_to_go_on_from() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let mut farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    let copy = Scratch::new("copy");
    let call = farm
        .slurm
        .rxm_call(&farm.host, ["lease", "begin", "slurm/lab/2/0", "high-b"]);
    let mut begun = call.spawn();
    for entry in fs::read_dir(farm.host.state_dir()).unwrap() {
        let entry = entry.unwrap();
        if entry.file_type().unwrap().is_file() {
            fs::copy(entry.path(), copy.path().join(entry.file_name())).unwrap();
        }
    }
    begun.wait(LONG).success();
    // The power goes: xmand and all guests with it.
    farm.host.kill9();
    for guest in [&low, &high] {
        farm.libvirtd.virsh(&["destroy", guest.name()]).success();
    }
    for entry in fs::read_dir(copy.path()).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), farm.host.state_dir().join(entry.file_name())).unwrap();
    }
    for guest in [&low, &high] {
        farm.libvirtd.virsh(&["start", guest.name()]).success();
    }
    farm.host.start();
    // Whether the second job was in it or not: the batch system says what it has, and all is as it says.
    farm.begins("slurm/lab/2/0", "high-b").success();
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    farm.ends("slurm/lab/2/0");
    farm.libvirtd.wait_state("low-a", "running");
}

#[test]
fn who_is_silent_about_libvirt_promises_nothing() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let mut farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.libvirtd.kill9();
    let words = [
        "lease",
        "begin",
        "slurm/lab/2/0",
        "high-b",
        "--timeout",
        "10s",
    ];
    let refused = farm.slurm.rxm_call(&farm.host, words).limit(LONG).run();
    assert!(!refused.is_success(), "{refused}");
    farm.libvirtd.start();
    let value: Value = eventually("libvirt is read again", LONG, || {
        let begun = farm.begins("slurm/lab/2/0", "high-b");
        begun.is_success().then(|| farm.status("low-a"))
    });
    assert_eq!(value["standing"], "preempted");
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    farm.ends("slurm/lab/2/0");
    farm.libvirtd.wait_state("low-a", "running");
}
