//! A guest's memory goes to a disk and comes back, and a guest that was never there never runs.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use serde_json::{Value, json};
use xman_tests::{
    Guest, Host, HostBuilder, Outcome, Records, Signal, User, eventually, signal_pid,
};

use crate::authorization::{FAILED, Site};

/// Longer than anything takes here, also on a busy machine.
const LONG: Duration = Duration::from_secs(240);

/// What operators may not, whatever else lets them.
const NEVER: &str = r#"
@id("operators-never-destroy")
forbid (principal in Group::"operators", action == Action::"destroy", resource);
"#;

/// Carol manages what is called test-*, and may call it dark-*, which she does not see.
const NAMES: &str = r#"
@id("carol-tests")
permit (principal == User::"carol@XMAN.TEST", action in [Action::"view", Action::"manage"], resource is Domain)
when { resource.name like "test-*" };

@id("carol-dark")
permit (principal == User::"carol@XMAN.TEST", action == Action::"rename", resource is Domain)
when { resource.name like "dark-*" };
"#;

/// Who may begin a job may give it up.
const JOBS: &str = r#"
@id("everybody-gives-up-jobs")
permit (principal, action == Action::"job-cancel", resource is Host)
when { principal.realm == "XMAN.TEST" };
"#;

fn plain(host: HostBuilder) -> HostBuilder {
    host
}

impl Site {
    #[track_caller]
    fn says(&self, user: &User, words: &[&str]) -> Outcome {
        user.rxm_call(&self.host, words).limit(LONG).run()
    }

    #[track_caller]
    fn shows(&self, name: &str) -> Value {
        let rows = self.does(&["-o", "json", "list", name]).json();
        rows[0].clone()
    }

    #[track_caller]
    fn images(&self, user: &User) -> Vec<String> {
        let names = user.rxm(&self.host, ["-o", "name", "images"]).success();
        names.stdout().lines().map(str::to_owned).collect()
    }

    /// The image that libvirt keeps for a domain, seen from outside of the cell.
    fn kept_image(&self, name: &str) -> PathBuf {
        let path = format!("/var/lib/libvirt/qemu/save/{name}.save");
        self.libvirtd.cell().outside(&path)
    }

    /// All that is in the folder of named images.
    fn left(&self) -> Vec<PathBuf> {
        let folder = fs::read_dir(self.host.state_dir().join("images")).unwrap();
        folder.map(|entry| entry.unwrap().path()).collect()
    }

    /// Begins to save, and returns the job's id once libvirt is at it.
    #[track_caller]
    fn begins(&self, user: &User, words: &[&str]) -> String {
        let words = [words, &["--detach"]].concat();
        let id = self.says(user, &words).success().stdout().trim().to_owned();
        eventually("libvirt writes", LONG, || {
            let jobs = user.rxm(&self.host, ["-o", "json", "job", "list"]).json();
            let jobs = jobs.as_array()?.clone();
            let job = jobs.into_iter().find(|job| job["id"] == json!(id))?;
            assert_eq!(job["state"], "running", "{job}");
            (job["progress"]["done_bytes"].as_u64()? > 0).then_some(())
        });
        id
    }
}

/// A guest whose QEMU gets a twentieth of its time only, until this is dropped: long enough a save to look at. (libvirt's own way to make one long,
/// compression, is none: version 9.0 may crash when a compressed save is given up.)
struct Slowed {
    pid: u32,
    is_wanted: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slowed {
    #[track_caller]
    fn new(guest: &Guest) -> Self {
        let pid = qemu_of(guest);
        let is_wanted = Arc::new(AtomicBool::new(true));
        let goes_on = Arc::clone(&is_wanted);
        let thread = thread::spawn(move || {
            let mut rest = Duration::from_millis(38);
            while goes_on.load(Ordering::Relaxed) {
                signal_pid(pid, Signal::STOP);
                thread::sleep(rest);
                let began = Instant::now();
                signal_pid(pid, Signal::CONT);
                thread::sleep(Duration::from_millis(2));
                // On a busy machine we come back later, and QEMU has had more.
                rest = 19 * began.elapsed();
            }
        });
        Self {
            pid,
            is_wanted,
            thread: Some(thread),
        }
    }

    /// Lets it have no time at all any more; nobody may ask it anything until this is dropped.
    fn stop(&mut self) {
        self.end();
        signal_pid(self.pid, Signal::STOP);
    }

    fn end(&mut self) {
        self.is_wanted.store(false, Ordering::Relaxed);
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Drop for Slowed {
    fn drop(&mut self) {
        self.end();
        signal_pid(self.pid, Signal::CONT);
    }
}

/// The process id of a guest's QEMU, seen from outside of its cell.
#[track_caller]
fn qemu_of(guest: &Guest) -> u32 {
    let uuid = guest.uuid().to_string();
    let processes = fs::read_dir("/proc").unwrap();
    let is_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line);
        line.contains("qemu-system") && line.contains(&uuid)
    };
    let mut pids = processes.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.find(is_it).expect("the guest runs")
}

#[test]
fn a_saved_guest_goes_on_counting_where_it_was() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let alice = site.user("alice");
    site.says(&alice, &["save", "web", "--dry-run"])
        .success()
        .says("would save");
    site.says(&alice, &["save", "web"])
        .success()
        .says("web: saved");
    assert_eq!(site.libvirtd.state("web"), "shut off");
    guest.stands_still();
    let row = site.shows("web");
    assert_eq!(
        (&row["saved"], &row["state"]),
        (&json!(true), &json!("off"))
    );
    assert!(
        row["since_ms"].as_u64().unwrap() > 1_700_000_000_000,
        "{row}"
    );
    let wide = site.does(&["-o", "wide", "list", "web"]).stdout();
    assert!(wide.contains("SAVED") && wide.contains("SINCE"), "{wide}");

    site.says(&alice, &["restore", "web"])
        .success()
        .says("web: restored");
    assert_eq!(site.libvirtd.state("web"), "running");
    guest.keeps_counting();
    assert_eq!(site.shows("web")["saved"], false);
    site.says(&alice, &["restore", "web"])
        .code(FAILED)
        .complains("running already");

    site.says(&alice, &["save", "web", "-q"]).success();
    site.says(&alice, &["restore", "--paused", "web"])
        .success()
        .says("restored, paused");
    assert_eq!(site.libvirtd.state("web"), "paused");
    guest.stands_still();
    site.says(&alice, &["unpause", "web"]).success();
    guest.keeps_counting();
    let jobs = alice
        .rxm(&site.host, ["-o", "json", "job", "list"])
        .success()
        .json();
    let is_done = |job: &Value| job["verb"] == "save" && job["state"] == "done";
    assert_eq!(jobs.as_array().unwrap().len(), 2, "{jobs}");
    assert!(jobs.as_array().unwrap().iter().all(is_done), "{jobs}");
    for verb in ["verb=\"save\"", "verb=\"restore\""] {
        site.host.audit().contains(&[
            verb,
            "principal=\"alice@XMAN.TEST\"",
            "domain=\"web\"",
            "rule=\"cedar:site.cedar:owners-use\"",
            "outcome=\"ok\"",
        ]);
    }
}

#[test]
fn without_saved_memory_nothing_is_restored_and_what_is_discarded_is_gone() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let (alice, oscar, bob) = (site.user("alice"), site.user("oscar"), site.user("bob"));
    let uuid = guest.uuid().to_string();
    for verb in ["save", "restore", "discard"] {
        site.says(&bob, &[verb, &uuid]).denied();
    }
    site.says(&oscar, &["discard", "web"])
        .code(FAILED)
        .complains("no saved image");
    site.says(&alice, &["save", "web"]).success();
    site.says(&alice, &["save", "web"])
        .code(FAILED)
        .complains("no memory to save");
    // To use is not to manage.
    site.says(&alice, &["discard", &uuid]).denied();
    site.says(&oscar, &["discard", "web"])
        .success()
        .says("thrown away");
    assert!(!site.kept_image("web").exists());
    let before = guest.said();
    site.says(&alice, &["restore", "web"])
        .code(FAILED)
        .complains("`rxm start web` boots it");
    assert_eq!(site.libvirtd.state("web"), "shut off");
    assert_eq!(guest.said(), before);
    site.says(&alice, &["start", "web"]).success();
    eventually("it boots afresh", LONG, || {
        let fresh = guest.said();
        let fresh = fresh.strip_prefix(before.as_str())?;
        fresh.contains("count 1\r").then_some(())
    });
}

#[test]
fn a_damaged_image_is_refused_and_nothing_of_it_runs() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    site.does(&["save", "web"]);
    let image = site.kept_image("web");
    let whole = fs::read(&image).unwrap();
    let before = guest.said();
    // Of the first two libvirt alone would say that all went well, and boot the guest.
    let mut partial = whole.clone();
    partial[..16].copy_from_slice(b"LibvirtQemudPart");
    let mut other = whole.clone();
    other[..16].fill(b'x');
    for damaged in [&whole[..50], &partial, &other, &whole[..100]] {
        fs::write(&image, damaged).unwrap();
        site.says(&site.admin, &["restore", "web"])
            .code(FAILED)
            .complains("damaged, and nothing of it ran");
        assert_eq!(site.libvirtd.state("web"), "shut off");
        assert!(image.exists(), "it is not thrown away");
        assert_eq!(guest.said(), before);
    }
    // What libvirt finds out itself while it reads.
    fs::write(&image, &whole[..whole.len() / 2]).unwrap();
    site.says(&site.admin, &["restore", "web"]).code(FAILED);
    assert_eq!(site.libvirtd.state("web"), "shut off");
    assert_eq!(guest.said(), before);
    fs::write(&image, &whole).unwrap();
    site.does(&["restore", "web"]);
    guest.keeps_counting();
}

#[test]
fn a_save_that_is_given_up_leaves_the_guest_running() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], |host| host.policy("jobs.cedar", JOBS));
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let (alice, bob) = (site.user("alice"), site.user("bob"));
    let slowed = Slowed::new(&guest);
    let job = site.begins(&alice, &["save", "web"]);
    bob.rxm(&site.host, ["job", "cancel", &job]).code(FAILED);
    alice.rxm(&site.host, ["job", "cancel", &job]).success();
    drop(slowed);
    site.says(&alice, &["job", "wait", &job])
        .code(FAILED)
        .complains("runs on");
    assert_eq!(site.libvirtd.state("web"), "running");
    guest.keeps_counting();
    assert_eq!(site.shows("web")["saved"], false);
    assert!(!site.kept_image("web").exists());

    let slowed = Slowed::new(&guest);
    let job = site.begins(&site.admin, &["save", "web", "--to", "slow"]);
    site.does(&["job", "cancel", &job]);
    drop(slowed);
    site.says(&site.admin, &["job", "wait", &job]).code(FAILED);
    guest.keeps_counting();
    assert!(site.images(&site.admin).is_empty() && site.left().is_empty());
    site.says(&site.admin, &["job", "cancel", &job])
        .code(FAILED);
    let words = ["verb=\"job-cancel\"", "outcome=\"ok\""];
    site.host.audit().contains(&words);
}

#[test]
fn a_transient_guest_is_saved_to_a_named_image_only() {
    let guest = Guest::booted("web");
    let site = Site::with(&[], plain);
    site.libvirtd.virsh(&["create", &guest.file()]).success();
    guest.wait_until_up();
    eventually("xmand has seen it", LONG, || {
        let names = site.does(&["-o", "name", "list"]).stdout();
        names.contains("web").then_some(())
    });
    for (words, advice) in [
        (["save", "web", "-q"], "rxm save --to IMAGE web"),
        (["autostart", "on", "web"], "no definition"),
    ] {
        site.says(&site.admin, &words)
            .code(FAILED)
            .complains(advice);
    }
    guest.keeps_counting();
    site.does(&["save", "web", "--to", "kept"]);
    assert_eq!(site.libvirtd.state("web"), "");
    guest.stands_still();
    site.says(&site.admin, &["restore", "--from", "kept"])
        .success()
        .says("web: restored from kept");
    guest.keeps_counting();
    assert!(site.left().is_empty());
}

#[test]
fn a_named_image_is_used_once_and_brings_no_owner_back() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let (alice, bob, oscar) = (site.user("alice"), site.user("bob"), site.user("oscar"));
    let uuid = guest.uuid().to_string();
    site.says(&alice, &["save", &uuid, "--to", "before"])
        .denied();
    site.says(&oscar, &["save", "web", "--to", "before"])
        .success()
        .says("web: saved to before");
    assert_eq!(site.libvirtd.state("web"), "shut off");
    assert_eq!(site.shows("web")["saved"], false);
    site.host.audit().contains(&[
        "verb=\"save-to\"",
        "principal=\"oscar@XMAN.TEST\"",
        "domain=\"web\"",
        "before",
        "outcome=\"ok\"",
    ]);
    let rows = site.does(&["-o", "json", "images"]).json();
    let row = &rows[0];
    assert_eq!(row["image"], "before");
    assert_eq!(
        (&row["domain"], &row["uuid"]),
        (&json!("web"), &json!(uuid))
    );
    assert_eq!(row["hypervisor"], "qemu:///system");
    assert!(row["bytes"].as_u64().unwrap() > 1_000_000, "{row}");
    assert_eq!(site.images(&alice), ["before"], "it is of her domain");
    assert_eq!(site.images(&oscar), ["before"]);
    assert!(site.images(&bob).is_empty());
    for words in [
        &["restore", "--from", "before"][..],
        &["discard", "--image", "before"],
    ] {
        site.says(&alice, words).denied();
        site.says(&oscar, words).denied();
        site.says(&bob, words).denied();
    }

    site.does(&["owner", "web", "-alice@XMAN.TEST", "+bob@XMAN.TEST"]);
    assert!(site.images(&alice).is_empty());
    site.says(&site.admin, &["restore", "--from", "before", "--paused"])
        .success()
        .says("web: restored, paused from before");
    assert_eq!(site.libvirtd.state("web"), "paused");
    assert_eq!(site.shows("web")["owners"], json!(["bob@XMAN.TEST"]));
    let live = site.libvirtd.virsh(&["dumpxml", "web"]).stdout();
    assert!(!live.contains("alice@XMAN.TEST"), "{live}");
    site.says(&alice, &["unpause", &uuid]).denied();
    site.says(&bob, &["unpause", "web"]).success();
    guest.keeps_counting();
    assert!(site.images(&site.admin).is_empty() && site.left().is_empty());
    site.says(&site.admin, &["restore", "--from", "before"])
        .code(FAILED)
        .complains("no image 'before'");

    // Nothing is left of it but the image: whoever restores it, bob has no more to say.
    site.does(&["save", "web", "--to", "again"]);
    site.does(&["undefine", "web"]);
    assert!(site.images(&bob).is_empty(), "of what is gone");
    assert_eq!(site.images(&site.admin), ["again"]);
    site.does(&["restore", "--from", "again"]);
    guest.keeps_counting();
    let row = site.shows("web");
    assert_eq!(row["persistent"], false);
    assert!(!row["owners"].to_string().contains("bob"), "{row}");
    site.says(&bob, &["pause", &uuid]).denied();
    site.host.audit().contains(&[
        "verb=\"restore-from\"",
        "domain=\"web\"",
        "again",
        "outcome=\"ok\"",
    ]);
}

#[test]
fn an_image_stays_where_it_cannot_be_restored() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    site.does(&["save", "web", "--to", "one"]);
    site.does(&["start", "web"]);
    site.says(&site.admin, &["restore", "--from", "one"])
        .code(FAILED)
        .complains("running already");
    site.says(&site.admin, &["save", "web", "--to", "one"])
        .code(FAILED)
        .complains("an image 'one' already");
    site.does(&["save", "web"]);
    site.says(&site.admin, &["restore", "--from", "one"])
        .code(FAILED)
        .complains("has a saved image of its own");
    site.says(&site.admin, &["rename", "web", "other"])
        .code(FAILED)
        .complains("has a saved image");
    site.does(&["discard", "web"]);
    site.does(&["rename", "web", "other"]);
    site.says(&site.admin, &["restore", "--from", "one"])
        .code(FAILED)
        .complains("belongs to 'other'");
    site.does(&["rename", "other", "web"]);
    let memory = site.host.state_dir().join("images/one/memory");
    let whole = fs::read(&memory).unwrap();
    fs::write(&memory, &whole[..60]).unwrap();
    site.says(&site.admin, &["restore", "--from", "one"])
        .code(FAILED)
        .complains("damaged");
    fs::write(&memory, &whole[..whole.len() / 2]).unwrap();
    site.says(&site.admin, &["restore", "--from", "one"])
        .code(FAILED);
    assert_eq!(site.libvirtd.state("web"), "shut off");
    assert_eq!(site.images(&site.admin), ["one"]);
    fs::write(&memory, &whole).unwrap();
    site.does(&["restore", "--from", "one"]);
    assert_eq!(site.libvirtd.state("web"), "running");
    site.does(&["save", "web", "--to", "two"]);
    site.says(&site.admin, &["discard", "--image", "two", "--dry-run"])
        .success();
    site.does(&["discard", "--image", "two"]);
    assert!(site.left().is_empty());
}

#[test]
fn a_disk_that_is_full_or_becomes_it_leaves_the_guest_running_and_no_half_image() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], plain);
    let images = site.host.state_dir().join("images");
    let images = images.to_str().unwrap();
    let disk = |size: &str| {
        let mut mount = site.libvirtd.cell().command("mount");
        mount.args([
            "-t",
            "tmpfs",
            "-o",
            &format!("size={size}"),
            "tmpfs",
            images,
        ]);
        xman_tests::run(mount, b"", LONG).success();
    };
    disk("64m");
    site.says(&site.admin, &["save", "web", "--to", "big"])
        .code(FAILED)
        .complains("MiB free; nothing was begun");
    guest.keeps_counting();

    disk("230m");
    let mut slowed = Slowed::new(&guest);
    let job = site.begins(&site.admin, &["save", "web", "--to", "big"]);
    slowed.stop();
    let mut fill = site.libvirtd.cell().command("dd");
    fill.args(["if=/dev/zero", &format!("of={images}/full"), "bs=64k"]);
    xman_tests::run(fill, b"", LONG).code(1);
    drop(slowed);
    site.says(&site.admin, &["job", "wait", &job])
        .code(FAILED)
        .complains("runs on");
    assert_eq!(site.libvirtd.state("web"), "running");
    guest.keeps_counting();
    assert!(site.images(&site.admin).is_empty());
    let mut list = site.libvirtd.cell().command("ls");
    list.args(["-A", images]);
    let left = xman_tests::run(list, b"", LONG).success().stdout();
    assert_eq!(left.trim(), "full");
}

#[test]
fn a_half_image_that_xmand_lost_sight_of_is_never_listed_and_cleared_away() {
    let guest = Guest::booted("web");
    let mut site = Site::with(&[&guest], plain);
    let slowed = Slowed::new(&guest);
    site.begins(&site.admin, &["save", "web", "--to", "half"]);
    site.host.kill9();
    site.host.start();
    assert!(site.images(&site.admin).is_empty(), "it is not whole");
    site.says(&site.admin, &["save", "web", "--to", "half"])
        .code(FAILED);
    assert_eq!(site.left().len(), 1, "libvirt still writes");
    site.libvirtd.virsh(&["domjobabort", "web"]).success();
    drop(slowed);
    site.libvirtd.wait_state("web", "running");
    guest.keeps_counting();
    eventually("it is cleared away", LONG, || {
        site.left().is_empty().then_some(())
    });
    let jobs = site.does(&["-o", "json", "job", "list"]).json();
    assert_eq!(jobs[0]["state"], "unknown", "{jobs}");
}

#[test]
fn an_image_that_libvirt_finished_without_xmand_is_found_whole() {
    let guest = Guest::booted("web");
    let mut site = Site::with(&[&guest], plain);
    let mut slowed = Slowed::new(&guest);
    site.begins(&site.admin, &["save", "web", "--to", "whole"]);
    slowed.stop();
    site.host.kill9();
    assert!(site.left()[0].ends_with(".whole.part"), "too late to tell");
    drop(slowed);
    eventually("libvirt has saved it", LONG, || {
        (site.libvirtd.state("web") == "shut off").then_some(())
    });
    site.host.start();
    eventually("the image is found", LONG, || {
        (site.images(&site.admin) == ["whole"]).then_some(())
    });
    eventually("xmand has read libvirt", LONG, || {
        let restored = site.says(&site.admin, &["restore", "--from", "whole"]);
        restored.is_success().then_some(())
    });
    guest.keeps_counting();
}

#[test]
fn a_rename_is_judged_on_the_old_name_and_on_the_new() {
    let names = ["test-a", "test-c", "prod", "dark-1"];
    let guests = names.map(Guest::tiny);
    let site = Site::with(&[], |host| host.policy("names.cedar", NAMES));
    for guest in &guests {
        site.libvirtd.define(guest);
    }
    eventually("xmand has seen them", LONG, || {
        let seen = site.does(&["-o", "name", "list"]).stdout();
        names.iter().all(|name| seen.contains(name)).then_some(())
    });
    let carol = site.user("carol");
    site.says(&carol, &["rename", "test-a", "test-b"])
        .success()
        .says("test-b");
    let seen = carol.rxm(&site.host, ["-o", "name", "list"]).stdout();
    assert_eq!(seen.lines().collect::<Vec<_>>(), ["test-b", "test-c"]);
    assert_eq!(site.libvirtd.state("test-b"), "shut off");
    assert_eq!(site.libvirtd.state("test-a"), "");
    site.host.audit().contains(&[
        "verb=\"rename\"",
        "principal=\"carol@XMAN.TEST\"",
        "domain=\"test-a\"",
        "test-b",
        "outcome=\"ok\"",
    ]);
    let prod = guests[2].uuid().to_string();
    site.says(&carol, &["rename", &prod, "test-d"]).denied();
    site.says(&carol, &["rename", "test-b", "prod-2"]).denied();
    // Taken by one that she may not see, and by one that she may.
    site.says(&carol, &["rename", "test-b", "dark-1"]).denied();
    site.says(&carol, &["rename", "test-b", "test-c"])
        .code(FAILED)
        .complains("a domain 'test-c' already");
    site.says(&carol, &["rename", "test-b", "test-b"])
        .code(FAILED)
        .complains("called that already");
    assert_eq!(site.libvirtd.state("test-b"), "shut off");
    site.says(&carol, &["rename", "test-b", "dark-2"]).success();
    assert_eq!(site.libvirtd.state("dark-2"), "shut off");
    let seen = carol.rxm(&site.host, ["-o", "name", "list"]).stdout();
    assert_eq!(seen.trim(), "test-c");
    site.libvirtd.virsh(&["start", "dark-2"]).success();
    site.says(&site.admin, &["rename", "dark-2", "x"])
        .code(FAILED)
        .complains("only what is off");
}

#[test]
fn a_reset_takes_the_right_to_destroy_as_well() {
    let guest = Guest::booted("web");
    let site = Site::with(&[&guest], |host| host.policy("never.cedar", NEVER));
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let (alice, oscar) = (site.user("alice"), site.user("oscar"));
    site.says(&oscar, &["reset", &guest.uuid().to_string()])
        .denied();
    site.says(&oscar, &["reset", "web", "--dry-run"])
        .code(FAILED);
    guest.keeps_counting();
    site.host.audit().contains(&[
        "verb=\"reset\"",
        "principal=\"oscar@XMAN.TEST\"",
        "operators-never-destroy",
        "outcome=\"denied\"",
    ]);
    let before = guest.said();
    site.says(&alice, &["reset", "web"])
        .success()
        .says("web: reset");
    eventually("it boots again", LONG, || {
        let fresh = guest.said();
        let fresh = fresh.strip_prefix(before.as_str())?;
        fresh.contains("count 1\r").then_some(())
    });
    site.libvirtd.virsh(&["destroy", "web"]).success();
    eventually("xmand has seen that", LONG, || {
        (site.shows("web")["state"] == "off").then_some(())
    });
    site.says(&alice, &["reset", "web"])
        .code(FAILED)
        .complains("is off");
}

#[test]
fn a_domain_starts_with_its_host_where_that_is_wanted() {
    let guest = Guest::tiny("web");
    let site = Site::with(&[&guest], plain);
    let oscar = site.user("oscar");
    site.says(&oscar, &["autostart", "on", "web"])
        .success()
        .says("starts with its host");
    assert_eq!(site.libvirtd.dominfo("web", "Autostart"), "enable");
    assert_eq!(site.shows("web")["autostart"], true);
    site.says(&oscar, &["autostart", "off", "web"]).success();
    assert_eq!(site.libvirtd.dominfo("web", "Autostart"), "disable");
    assert_eq!(site.shows("web")["autostart"], false);
    site.does(&["owner", "web", "+alice@XMAN.TEST"]);
    let uuid = guest.uuid().to_string();
    let alice = site.user("alice");
    site.says(&alice, &["autostart", "on", &uuid]).denied();
}

#[test]
fn a_device_that_cannot_be_saved_is_named_and_the_guest_runs_on() {
    let shared = "<devices><shmem name='x'><model type='ivshmem-plain'/><size unit='M'>1</size></shmem></devices>";
    let guest = Guest::booted("web").xml_extra(shared);
    let site = Site::with(&[&guest], plain);
    site.says(&site.admin, &["save", "web"])
        .code(FAILED)
        .complains("a device that cannot be saved");
    assert_eq!(site.libvirtd.state("web"), "running");
    guest.keeps_counting();
    site.says(&site.admin, &["save", "web", "--to", "x"])
        .code(FAILED);
    assert!(site.left().is_empty());
}

#[test]
fn several_domains_are_saved_and_restored_by_a_pattern() {
    let guests = ["grid-1", "grid-2", "grid-3", "grid-4", "grid-5"].map(Guest::tiny);
    let site = Site::with(&guests.each_ref(), plain);
    site.says(&site.admin, &["save", "grid-*"])
        .code(2)
        .complains("about to save 5 domains");
    site.says(&site.admin, &["save", "grid-*", "--to", "x"])
        .code(2)
        .complains("of one domain");
    site.does(&["save", "grid-*", "--yes", "--retries", "20"]);
    for guest in &guests {
        assert_eq!(site.libvirtd.state(guest.name()), "shut off");
    }
    let restored = site
        .does(&["-o", "json", "restore", "grid-*", "--yes"])
        .json();
    assert_eq!(restored.as_array().unwrap().len(), 5, "{restored}");
    for guest in &guests {
        assert_eq!(site.libvirtd.state(guest.name()), "running");
    }
}

#[test]
fn an_image_is_found_on_the_only_host_that_has_it() {
    let (one, two) = (Guest::tiny("one"), Guest::tiny("two"));
    let site = Site::with(&[&one], plain);
    let other = Site::with(&[&two], plain);
    site.does(&["save", "one", "--to", "only"]);
    for (site, name) in [(&site, "a"), (&other, "b")] {
        assert!(!site.images(&site.admin).contains(&name.to_owned()));
    }
    let both: [&Host; 2] = [&site.host, &other.host];
    let restored = site.admin.rxm(&both, ["restore", "--from", "only"]);
    restored.success().says("one: restored from only");
    assert_eq!(site.libvirtd.state("one"), "running");
    site.does(&["save", "one", "--to", "same"]);
    other.does(&["save", "two", "--to", "same"]);
    let doubtful = site.admin.rxm(&both, ["discard", "--image", "same"]);
    doubtful.code(FAILED).complains("several hosts");
    let at = format!("{}/same", other.host.target());
    site.admin.rxm(&both, ["discard", "--image", &at]).success();
    let left = site.admin.rxm(&both, ["-o", "name", "images"]).success();
    assert_eq!(left.stdout().trim(), format!("{}/same", site.host.target()));
    let nowhere = site.admin.rxm(&both, ["discard", "--image", "none"]);
    nowhere.code(FAILED).complains("no host that answered");
}
