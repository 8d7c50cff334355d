//! The client in clients/python was written from docs/PROTOCOL.md alone: what it can do, the page says.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use xman_tests::{Call, Host, Outcome, Realm, Records, User, command, program, run};

/// Debian's package is for Debian's Python; another one may come first in PATH.
const PYTHON: &str = "/usr/bin/python3";
/// For one class of tests.
const LIMIT: Duration = Duration::from_secs(600);
/// Long enough to begin on a busy machine, short enough to wait for.
const SHORT: Duration = Duration::from_secs(40);

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../clients/python")
}

fn source(name: &str) -> String {
    fs::read_to_string(folder().join("tests").join(name)).unwrap()
}

/// Returns Python in the client's folder, for this person; what it compiles is not left in the sources.
fn python(user: &User, words: &[&str]) -> Call {
    let mut all = vec!["-C".into(), folder().into(), PYTHON.into(), "-B".into()];
    all.extend(words.iter().map(Into::into));
    user.program_call(&[], &program("env"), all).limit(LIMIT)
}

/// Returns the tests in a piece of Python.
fn tests_in(text: &str) -> usize {
    text.matches("\n    def test_").count()
}

/// Returns the tests of one class.
fn tests_of(text: &str, class: &str) -> usize {
    let (_, class) = text.split_once(&format!("\nclass {class}(")).unwrap();
    tests_in(class.split("\nclass ").next().unwrap())
}

/// Requires that so many tests ran, that all passed and none was skipped.
#[track_caller]
fn all_passed(outcome: Outcome, tests: usize) {
    let outcome = outcome.success();
    let said = outcome.stderr();
    assert!(tests > 0, "no tests were counted");
    assert!(
        said.contains(&format!("\nRan {tests} test")) && said.trim_end().ends_with("\nOK"),
        "wanted {tests} tests, all of them passed, but {outcome}"
    );
}

/// Fails with the package's name where the client cannot run.
#[track_caller]
fn need_gssapi() {
    let mut python = command("env");
    python.args([PYTHON, "-c", "import gssapi"]);
    assert!(
        run(python, b"", LIMIT).is_success(),
        "{PYTHON} has no gssapi: install python3-gssapi, or run deploy/setup.sh"
    );
}

fn host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(Realm::shared())
}

/// Returns a run of tests of the client against this host.
fn live(user: &User, host: &Host, what: &str) -> Call {
    need_gssapi();
    python(user, &["-m", "unittest", what])
        .env("XMAN_TEST_HOST", host.name())
        .env("XMAN_TEST_PORT", host.addr().port().to_string())
        .env("XMAN_TEST_DOMAIN", "test")
}

#[test]
fn what_needs_no_host_needs_no_package_of_others_and_passes() {
    let nobody = Realm::shared().user_without_ticket("nobody");
    let tests = fs::read_dir(folder().join("tests"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with("test_") && name.ends_with(".py"))
        .map(|name| tests_in(&source(&name)))
        .sum();
    // Without the folders where packages of others lie.
    let words = [
        "-I", "-S", "-m", "unittest", "discover", "-s", "tests", "-t", ".",
    ];
    all_passed(python(&nobody, &words).run(), tests);
}

#[test]
fn it_lists_pauses_and_changes_once_and_only_once() {
    let realm = Realm::shared();
    let (alice, mallory, host) = (realm.user("alice"), realm.user("mallory"), host());
    let text = source("live.py");
    for class in ["Calls", "Wire", "Examples"] {
        let call = live(&alice, &host, &format!("tests.live.{class}"))
            .env("XMAN_TEST_STRANGER", mallory.ccache());
        all_passed(call.run(), tests_of(&text, class));
    }
    host.audit()
        .contains(&["mallory@XMAN.TEST", "pause", "deny"]);
    // Who changed a preface is on record on the host as well.
    host.audit().contains(&["preface"]);
}

#[test]
fn it_follows_events_across_lost_connections() {
    let realm = Realm::shared();
    let (alice, mallory, host) = (realm.user("alice"), realm.user("mallory"), host());
    let call =
        live(&alice, &host, "tests.live.Happenings").env("XMAN_TEST_STRANGER", mallory.ccache());
    all_passed(call.run(), tests_of(&source("live.py"), "Happenings"));
}

#[test]
fn what_it_pauses_others_see_paused() {
    need_gssapi();
    let (alice, host) = (Realm::shared().user("alice"), host());
    python(&alice, &["-m", "xman", &host.target(), "pause", "test"])
        .run()
        .success()
        .says("paused");
    let listed = alice.rxm(&host, ["list", "-o", "json"]).success().json();
    assert_eq!(listed[0]["state"], "paused", "{listed}");
    host.audit()
        .contains(&["alice@XMAN.TEST", "pause", "allow", "test"]);
}

#[test]
fn its_sessions_are_renewed_or_end_with_their_tickets() {
    let realm = Realm::shared();
    let (fresh, mallory, host) = (realm.user("alice"), realm.user("mallory"), host());
    let text = source("live.py");
    let (_, class) = text.split_once("\nclass Tickets(").unwrap();
    let class = class.split("\nclass ").next().unwrap();
    let names: Vec<&str> = class
        .split("\n    def test_")
        .skip(1)
        .map(|rest| rest.split('(').next().unwrap())
        .collect();
    assert!(names.len() >= 4, "{names:?}");
    // Each begins with a ticket that has just been issued; all wait at the same time.
    let running: Vec<_> = names
        .iter()
        .map(|name| {
            let alice = realm.user_with_lifetime("alice", SHORT);
            let call = live(&alice, &host, &format!("tests.live.Tickets.test_{name}"))
                .env("XMAN_TEST_FRESH", fresh.ccache())
                .env("XMAN_TEST_STRANGER", mallory.ccache());
            (call.spawn(), alice)
        })
        .collect();
    for (mut process, _alice) in running {
        all_passed(process.wait(LIMIT), 1);
    }
    host.audit()
        .contains(&["a session is renewed by its own principal only"]);
}

#[test]
fn it_believes_no_host_that_lies() {
    need_gssapi();
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let tests = tests_in(&source("hostile.py"));
    let call = python(&alice, &["-m", "unittest", "tests.hostile"])
        .env("KRB5_KTNAME", realm.keytab(&["xman/localhost"]))
        .env("KRB5RCACHEDIR", alice.home());
    all_passed(call.run(), tests);
}
