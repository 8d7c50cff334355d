//! Events: told in order, gone on with by cursor, gaps told, to nobody who may not hear them, and at nobody else's cost.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use serde_json::Value;
use xman_tests::{
    Guest, Host, Libvirtd, PATIENCE, Process, Reach, Realm, Records, Scratch, Signal, User, built,
    eventually, run, signal_pid,
};

use crate::authorization::Site;

/// How long an event may take to be told.
const SOON: Duration = PATIENCE;

/// An `rxm events` that follows.
struct Follower {
    process: Process,
    file: PathBuf,
}

impl Follower {
    /// Starts one and waits until all hosts have told it where it begins.
    #[track_caller]
    fn start<H: Reach + ?Sized>(user: &User, hosts: &H, scratch: &Scratch, more: &[&str]) -> Self {
        let count = hosts.nodes().split(',').count();
        let follower = Self::unready(user, hosts, scratch, more);
        eventually("it follows all hosts", SOON, || {
            (follower.cursors().lines().count() == count).then_some(())
        });
        follower
    }

    #[track_caller]
    fn unready<H: Reach + ?Sized>(
        user: &User,
        hosts: &H,
        scratch: &Scratch,
        more: &[&str],
    ) -> Self {
        let file = scratch.path().join("cursors");
        let path = file.display().to_string();
        let words = ["-o", "json", "events", "--cursor-file", &path];
        let words = words.into_iter().chain(more.iter().copied());
        Self {
            process: user.rxm_call(hosts, words).spawn(),
            file,
        }
    }

    fn cursors(&self) -> String {
        fs::read_to_string(&self.file).unwrap_or_default()
    }

    #[track_caller]
    fn lines(&self) -> Vec<Value> {
        lines(&self.process.stdout().text())
    }

    /// Waits for so many lines, and returns them.
    #[track_caller]
    fn wait_for(&self, count: usize) -> Vec<Value> {
        let found = self.process.stdout().find(SOON, |said| {
            let lines = lines(said);
            (lines.len() >= count).then_some(lines)
        });
        found.unwrap_or_else(|| {
            panic!(
                "not {count} lines: {}\n{}",
                self.process.stdout().text(),
                self.process.stderr().text()
            )
        })
    }

    #[track_caller]
    fn wait_for_line(&self, what: &str, is_it: impl Fn(&Value) -> bool) -> Value {
        let found = self.process.stdout().find(SOON, |said| {
            lines(said).into_iter().find(|line| is_it(line))
        });
        found.unwrap_or_else(|| {
            panic!(
                "{what} was not told: {}\n{}",
                self.process.stdout().text(),
                self.process.stderr().text()
            )
        })
    }

    /// Ends it as a service manager does.
    #[track_caller]
    fn end(mut self) -> Vec<Value> {
        self.process.signal(Signal::TERM);
        let outcome = self.process.wait(SOON).success();
        lines(&outcome.stdout())
    }
}

/// Reads whole lines, each of which is one object.
#[track_caller]
fn lines(text: &str) -> Vec<Value> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    whole
        .lines()
        .map(|line| {
            let value: Value = serde_json::from_str(line).expect("one object a line");
            assert!(value["host"].is_string(), "{line}");
            value
        })
        .collect()
}

/// As `EVENT DETAIL STATE`, or `gap`.
fn told(lines: &[Value]) -> Vec<String> {
    lines
        .iter()
        .map(|line| match line["event"].as_str() {
            Some(event) => format!(
                "{event} {} {}",
                line["detail"].as_str().unwrap(),
                line["state"].as_str().unwrap()
            ),
            None => "gap".to_owned(),
        })
        .collect()
}

fn number(line: &Value) -> u64 {
    let cursor = line["cursor"].as_str().unwrap();
    cursor.split_once('.').unwrap().1.parse().unwrap()
}

fn is_gap(line: &Value, word: &str) -> bool {
    line["gap"].as_str().is_some_and(|why| why.contains(word))
}

/// A libvirtd with its xmand, and alice who may do everything there.
struct Place {
    alice: User,
    host: Host,
    libvirtd: Libvirtd,
    scratch: Scratch,
}

impl Place {
    #[track_caller]
    fn with(guests: &[&Guest]) -> Self {
        let realm = Realm::shared();
        let libvirtd = Libvirtd::new();
        for guest in guests {
            libvirtd.define(guest);
        }
        let host = Host::builder()
            .k5login(["alice"])
            .beside(&libvirtd)
            .start(realm);
        let place = Self {
            alice: realm.user("alice"),
            host,
            libvirtd,
            scratch: Scratch::new("events"),
        };
        eventually("xmand has read libvirt", SOON, || {
            let names = place.alice.rxm(&place.host, ["-o", "name", "list"]);
            (names.is_success() && names.stdout().lines().count() == guests.len()).then_some(())
        });
        place
    }

    #[track_caller]
    fn virsh(&self, args: &[&str]) {
        self.libvirtd.virsh(args).success();
    }

    /// Gives virsh many commands at once.
    #[track_caller]
    fn script(&self, commands: &str) {
        let script = self.scratch.write("commands", commands);
        let shell = format!("virsh -q -c qemu:///system < {}", script.display());
        let mut virsh = self.libvirtd.cell().command("sh");
        virsh.args(["-c", &shell]);
        run(virsh, b"", 5 * PATIENCE).success();
    }

    #[track_caller]
    fn follow(&self, more: &[&str]) -> Follower {
        Follower::start(&self.alice, &self.host, &self.scratch, more)
    }
}

/// Returns the process of a guest that runs; its command line has the guest's UUID.
#[track_caller]
fn process_of(guest: &Guest) -> u32 {
    let uuid = guest.uuid().to_string();
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let is_it = |pid: &u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).into_owned();
        line.contains("qemu-system") && line.contains(&uuid)
    };
    pids.find(is_it).expect("the guest runs")
}

#[test]
fn a_guests_life_is_told_in_order_with_details() {
    let guest = Guest::tiny("web");
    let place = Place::with(&[&guest]);
    let follower = place.follow(&[]);
    let life = [
        ("start", "started booted running"),
        ("suspend", "paused paused paused"),
        ("resume", "resumed unpaused running"),
        ("destroy", "stopped destroyed off"),
    ];
    let mut seen = 0;
    for (command, expected) in life {
        place.virsh(&[command, "web"]);
        eventually(expected, SOON, || {
            let told = told(&follower.lines());
            let at = told.iter().skip(seen).position(|line| line == expected)?;
            // A guest that starts is resumed as well, and one that is destroyed goes down; nothing else comes between.
            let goes_by = told[seen..seen + at].iter().map(|line| {
                let (event, _) = line.split_once(' ').unwrap();
                (command, event)
            });
            for by in goes_by {
                let known = [("start", "resumed"), ("destroy", "shutting-down")];
                assert!(known.contains(&by), "{told:?}");
            }
            seen += at + 1;
            Some(())
        });
    }
    place.virsh(&["domrename", "web", "db"]);
    place.virsh(&["undefine", "db"]);
    let last = follower.wait_for_line("its end", |line| line["event"] == "undefined");
    assert_eq!(
        (last["state"].as_str(), last["domain"].as_str()),
        (Some("unknown"), Some("db"))
    );
    let all = follower.end();
    let renamed = all.iter().find(|line| line["event"] == "renamed").unwrap();
    assert_eq!(
        (renamed["domain"].as_str(), renamed["detail"].as_str()),
        (Some("db"), Some("it was called 'web'"))
    );
    for (at, line) in all.iter().enumerate() {
        assert_eq!(line["uuid"], guest.uuid().to_string());
        assert_eq!(line["host"], place.host.target());
        assert_eq!(line["hypervisor"], "qemu:///system");
        assert_eq!(
            number(line),
            number(&all[0]) + at as u64,
            "no number is left out"
        );
        assert!(line["time"].as_str().unwrap().ends_with('Z'), "{line}");
    }
}

#[test]
fn whoever_is_killed_goes_on_by_its_cursor_and_misses_nothing() {
    let guest = Guest::tiny("web");
    let place = Place::with(&[&guest]);
    let mut follower = place.follow(&[]);
    place.virsh(&["start", "web"]);
    place.virsh(&["suspend", "web"]);
    let before = follower.wait_for_line("the pause", |line| line["event"] == "paused");
    follower.process.kill();
    place.virsh(&["resume", "web"]);
    place.virsh(&["suspend", "web"]);
    place.virsh(&["undefine", "web"]);
    let since = before["cursor"].as_str().unwrap();
    eventually("what was missed is all there, once", SOON, || {
        let words = ["-o", "json", "events", "--no-follow", "--since", since];
        let after = lines(&place.alice.rxm(&place.host, words).success().stdout());
        (after.len() == 3).then(|| {
            let events = after.iter().map(|line| line["event"].as_str().unwrap());
            assert!(events.eq(["resumed", "paused", "undefined"]), "{after:?}");
            assert_eq!(number(&after[0]), number(&before) + 1);
        })
    });
    let words = ["events", "--all", "--no-follow", "--no-headers"];
    let table = place.alice.rxm(&place.host, words).success().stdout();
    assert_eq!(table.lines().count() as u64, number(&before) + 3, "{table}");
    assert!(!table.contains("gap"), "{table}");
}

#[test]
fn the_file_of_cursors_leads_on_after_an_ordinary_end() {
    let guest = Guest::tiny("web");
    let place = Place::with(&[&guest]);
    let follower = place.follow(&[]);
    place.virsh(&["start", "web"]);
    follower.wait_for_line("the start", |line| line["event"] == "started");
    place.virsh(&["suspend", "web"]);
    follower.wait_for_line("the pause", |line| line["event"] == "paused");
    let before = follower.end();
    place.virsh(&["resume", "web"]);
    let follower = Follower::unready(&place.alice, &place.host, &place.scratch, &["-n", "1"]);
    let after = follower.wait_for(1);
    assert_eq!(after[0]["event"], "resumed");
    assert_eq!(number(&after[0]), number(before.last().unwrap()) + 1);
    let Follower { mut process, .. } = follower;
    process.wait(SOON).success();
    fs::write(place.scratch.path().join("cursors"), "nonsense\n").unwrap();
    let follower = Follower::unready(&place.alice, &place.host, &place.scratch, &[]);
    let Follower { mut process, .. } = follower;
    process.wait(SOON).code(2).complains("line 1");
}

#[test]
fn a_new_start_of_xmand_is_a_gap_and_the_follower_goes_on_by_itself() {
    let guest = Guest::tiny("web");
    let mut place = Place::with(&[&guest]);
    let follower = place.follow(&[]);
    place.virsh(&["start", "web"]);
    follower.wait_for_line("the start", |line| line["event"] == "started");
    place.host.restart();
    follower.wait_for_line("the new start", |line| is_gap(line, "started anew"));
    // What happens before xmand has reached libvirt again, it finds and does not see.
    eventually("xmand has read libvirt again", SOON, || {
        let listed = place.alice.rxm(&place.host, ["list"]);
        listed.is_success().then_some(())
    });
    place.virsh(&["suspend", "web"]);
    follower.wait_for_line("what happens then", |line| line["event"] == "paused");
    let said = follower.process.stderr().text();
    assert!(
        said.contains("trying again") && said.contains("answers again"),
        "{said}"
    );
    follower.end();
}

#[test]
fn a_libvirtd_that_was_away_is_a_gap_and_what_is_different_is_told() {
    let (web, db) = (Guest::tiny("web"), Guest::tiny("db"));
    let mut place = Place::with(&[&web, &db]);
    place.virsh(&["start", "web"]);
    place.virsh(&["start", "db"]);
    eventually("both are known to run", SOON, || {
        let names = ["-o", "name", "list", "--state", "running"];
        let names = place.alice.rxm(&place.host, names).stdout();
        (names.lines().count() == 2).then_some(())
    });
    let follower = place.follow(&[]);
    place.libvirtd.kill9();
    follower.wait_for_line("the loss", |line| is_gap(line, "not seen until it is back"));
    signal_pid(process_of(&web), Signal::KILL);
    place.libvirtd.start();
    let found = follower.wait_for_line("what is different", |line| line["event"] == "found");
    assert_eq!(
        (
            found["domain"].as_str(),
            found["detail"].as_str(),
            found["state"].as_str()
        ),
        (Some("web"), Some("it was running"), Some("off"))
    );
    place.virsh(&["suspend", "db"]);
    follower.wait_for_line("events come again", |line| line["event"] == "paused");
    let all = follower.end();
    let gap = all.iter().position(|line| is_gap(line, "was silent from"));
    let place = all.iter().position(|line| line["event"] == "found");
    assert!(gap.unwrap() < place.unwrap(), "{all:?}");
    assert!(
        all.iter()
            .all(|line| line["event"] != "found" || line["domain"] == "web")
    );
}

#[test]
fn hundreds_of_changes_at_once_are_all_told_in_order() {
    const TIMES: usize = 150;
    let guests = [Guest::tiny("a"), Guest::tiny("b")];
    let place = Place::with(&[&guests[0], &guests[1]]);
    place.virsh(&["start", "a"]);
    place.virsh(&["start", "b"]);
    let follower = place.follow(&["--", "a", guests[1].uuid().to_string().as_str(), "many-*"]);
    let mut commands = String::new();
    for _ in 0..TIMES {
        commands.push_str("suspend a\nsuspend b\nresume a\nresume b\n");
    }
    for at in 0..TIMES {
        let guest = Guest::tiny(&format!("many-{at}"));
        let file = place.scratch.write(&format!("{at}.xml"), guest.xml());
        writeln!(commands, "define {}", file.display()).unwrap();
    }
    place.script(&commands);
    let last = format!("many-{}", TIMES - 1);
    follower.wait_for_line("the last", |line| line["domain"] == last.as_str());
    let all = follower.end();
    let of = |name: &str| -> Vec<String> {
        let mine = all.iter().filter(|line| line["domain"] == name);
        let words = mine.map(|line| line["event"].as_str().unwrap().to_owned());
        words
            .filter(|word| word == "paused" || word == "resumed")
            // A guest that starts is resumed as well.
            .skip_while(|word| word == "resumed")
            .collect()
    };
    for name in ["a", "b"] {
        let expected: Vec<_> = ["paused", "resumed"]
            .iter()
            .cycle()
            .take(2 * TIMES)
            .collect();
        assert_eq!(of(name).iter().collect::<Vec<_>>(), expected);
    }
    let defined: Vec<_> = all
        .iter()
        .filter(|line| line["event"] == "defined")
        .collect();
    assert_eq!(defined.len(), TIMES);
    assert!(
        defined.iter().all(|line| line["state"] == "off"),
        "each was read before it was told"
    );
    assert!(all.iter().all(|line| line.get("gap").is_none()));
}

#[test]
fn users_hear_of_what_is_theirs_and_of_nothing_once_it_is_not() {
    let (his, hers, sentinel) = (
        Guest::tiny("his"),
        Guest::tiny("hers"),
        Guest::tiny("sentinel"),
    );
    let site = Site::with(&[&his, &hers, &sentinel], |host| host);
    let (bob, carol) = (Realm::shared().user("bob"), Realm::shared().user("carol"));
    let eve = Realm::shared().user("eve");
    let own = |user: &User, guest: &str, sign: &str| {
        let change = format!("{sign}{}", user.principal());
        site.admin
            .rxm(&site.host, ["owner", guest, &change])
            .success();
    };
    own(&bob, "his", "+");
    own(&bob, "sentinel", "+");
    own(&carol, "hers", "+");
    let scratch = Scratch::new("events");
    let follower = Follower::start(&bob, &site.host, &scratch, &["--all"]);
    let blink = |name: &str| {
        site.libvirtd.virsh(&["suspend", name]).success();
        site.libvirtd.virsh(&["resume", name]).success();
    };
    blink("hers");
    blink("his");
    follower.wait_for_line("his pause", |line| line["event"] == "resumed");
    own(&bob, "his", "-");
    blink("his");
    blink("sentinel");
    let is_last = |line: &Value| line["event"] == "resumed" && line["domain"] == "sentinel";
    follower.wait_for_line("the sentinel", is_last);
    let heard = follower.end();
    assert!(
        heard.iter().all(|line| line["domain"] != "hers"),
        "{heard:?}"
    );
    let pauses = heard
        .iter()
        .filter(|line| line["domain"] == "his" && line["event"] == "paused");
    assert_eq!(pauses.count(), 1, "{heard:?}");
    // What happened while it was his is not his any more either.
    let words = ["-o", "json", "events", "--all", "--no-follow"];
    let heard = lines(&bob.rxm(&site.host, words).success().stdout());
    assert!(
        !heard.is_empty() && heard.iter().all(|line| line["domain"] == "sentinel"),
        "{heard:?}"
    );
    // Nor does its end give it back.
    site.libvirtd.virsh(&["destroy", "his"]).success();
    site.libvirtd.virsh(&["undefine", "his"]).success();
    blink("sentinel");
    eventually("the sentinel blinked again", SOON, || {
        let again = lines(&bob.rxm(&site.host, words).success().stdout());
        (again.len() == heard.len() + 2).then(|| {
            assert!(
                again.iter().all(|line| line["domain"] == "sentinel"),
                "{again:?}"
            );
        })
    });
    // A rule that is taken away ends the call itself.
    let follower = Follower::start(&bob, &site.host, &scratch, &[]);
    site.host
        .write_policy("site.cedar", "forbid (principal, action, resource);\n");
    let Follower { mut process, .. } = follower;
    process.wait(SOON).code(1).complains("denied");
    eve.rxm(&site.host, ["events"]).code(1).complains("denied");
}

#[test]
fn who_does_not_read_is_sent_away_with_a_word_and_others_go_on() {
    // A URI that is long makes each event long, so that what the kernel holds for a connection is soon full.
    let uri = format!("test:///default?pad={}", "x".repeat(8000));
    let alice = Realm::shared().user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .uri(&uri)
        .start(Realm::shared());
    let probe = |words: &[&str]| {
        let address = host.addr().to_string();
        let words = std::iter::once(address.as_str()).chain(words.iter().copied());
        let words = words.map(Into::into).collect();
        alice
            .program_call(&[], Path::new(&built("xman-probe")), words)
            .limit(5 * PATIENCE)
    };
    let many = "1000";
    let toggled = probe(&["toggle", many, "test"]).run().success().stdout();
    assert!(toggled.contains(many), "{toggled}");
    let mut deaf = probe(&["deaf-events"]).spawn();
    deaf.stdout().wait_for(SOON, "ready");
    let words = ["-o", "json", "events", "--all", "-n", many];
    let all = alice
        .rxm_call(&host, words)
        .limit(PATIENCE)
        .run()
        .success()
        .stdout();
    assert_eq!(lines(&all).len().to_string(), many);
    let sent_away = ["verb=\"events\"", "outcome=\"busy\"", "have not read"];
    host.audit().wait_for(PATIENCE, |record| {
        sent_away.iter().all(|word| record.contains(word))
    });
    deaf.say("\n");
    deaf.stdout().wait_for(SOON, "done busy: you have not read");
    alice.rxm(&host, ["list"]).success();
    deaf.kill();
}

#[test]
fn many_hosts_are_followed_at_once_and_one_that_is_away_keeps_nobody_waiting() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = || {
        Host::builder()
            .k5login(["alice"])
            .uri("test:///default")
            .start(realm)
    };
    let (first, mut second) = (host(), host());
    let scratch = Scratch::new("events");
    let follower = Follower::start(&alice, &[&first, &second], &scratch, &["test"]);
    let is = |host: &Host, event: &'static str| {
        let target = host.target();
        move |line: &Value| line["host"] == target && line["event"] == event
    };
    alice.rxm(&first, ["pause", "test"]).success();
    alice.rxm(&second, ["pause", "test"]).success();
    follower.wait_for_line("of the first", is(&first, "paused"));
    follower.wait_for_line("of the second", is(&second, "paused"));
    second.stop();
    follower.process.stderr().wait_for(SOON, "trying again");
    alice.rxm(&first, ["unpause", "test"]).success();
    follower.wait_for_line("of the first alone", is(&first, "resumed"));
    second.start();
    let target = second.target();
    let is_back = |line: &Value| line["host"] == target && is_gap(line, "started anew");
    follower.wait_for_line("the second is back", is_back);
    alice.rxm(&second, ["destroy", "test"]).success();
    follower.wait_for_line("of the second again", is(&second, "stopped"));
    let cursors = follower.cursors();
    assert!(
        cursors.contains(&first.target()) && cursors.contains(&target),
        "{cursors}"
    );
    follower.end();
    let hosts = [&first, &second];
    let since = cursors
        .lines()
        .next()
        .unwrap()
        .split_once('=')
        .unwrap()
        .1
        .to_owned();
    alice
        .rxm(&hosts, ["events", "--since", &since])
        .code(2)
        .complains("HOST=");
    let elsewhere = format!("elsewhere={since}");
    alice
        .rxm(&hosts, ["events", "--since", &elsewhere])
        .code(2)
        .complains("not among");
    alice
        .rxm(&hosts, ["events", "--since", "localhost=17"])
        .code(2);
    alice
        .rxm(&first, ["events", "--since", "17"])
        .code(2)
        .complains("a cursor is");
    alice
        .rxm(&first, ["-o", "yaml", "events"])
        .code(2)
        .complains("-o json");
    alice.rxm(&first, ["events", "["]).code(2);
    let folder = scratch.path().join("no/folder").display().to_string();
    alice
        .rxm(&first, ["events", "--cursor-file", &folder])
        .code(1)
        .complains("cannot be written");
    first
        .audit()
        .contains(&["verb=\"events\"", alice.principal()]);
}

#[test]
fn whoever_closes_the_pipe_or_presses_ctrl_c_has_heard_enough() {
    let alice = Realm::shared().user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(Realm::shared());
    alice.rxm(&host, ["pause", "test"]).success();
    let (reader, writer) = io::pipe().unwrap();
    let mut command = alice.rxm_call(&host, ["events", "--all"]).command();
    command.stdout(Stdio::from(writer));
    drop(reader);
    let mut process = Process::start(command);
    process.wait(SOON).code(0);
    let scratch = Scratch::new("events");
    let Follower { mut process, .. } = Follower::start(&alice, &host, &scratch, &[]);
    process.signal(Signal::INT);
    process.wait(SOON).code(0);
}
