//! The audit log: what it holds, what nobody can forge, and what happens when it is gone.

use std::path::Path;

use uuid::Uuid;
use xman_tests::{Host, PATIENCE, Realm, Records, Rsyslog, User, built, eventually};

/// A host that knows its domains.
#[track_caller]
fn host() -> Host {
    let realm = Realm::shared();
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(realm);
    let alice = realm.user("alice");
    eventually("the domains are known", PATIENCE, || {
        let listed = alice.rxm(&host, ["list"]);
        listed.is_success().then_some(())
    });
    host
}

fn probe(user: &User, host: &Host, act: &[&str]) -> String {
    let mut words = vec![host.addr().to_string().into()];
    words.extend(act.iter().map(|word| (*word).into()));
    user.program_call(&[], Path::new(&built("xman-probe")), words)
        .run()
        .success()
        .stdout()
}

#[test]
fn a_change_has_a_record_before_and_one_after_and_a_read_has_one() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    alice.rxm(&host, ["pause", "test"]).success();
    let end = host.audit().contains(&["verb=\"pause\"", "outcome=\"ok\""]);
    let begin = host.audit().contains(&["verb=\"pause\"", "; begins"]);
    for record in [&begin, &end] {
        for field in [
            "principal=\"alice@XMAN.TEST\"",
            "address=\"127.0.0.1\"",
            "domain=\"test\"",
            "uuid=\"",
            "verdict=\"allow\"",
            "rule=\"k5login:1\"",
            "session=\"",
            "call=\"",
        ] {
            assert!(record.contains(field), "{field} in {record}");
        }
    }
    assert!(end.contains(" ms=\""), "{end}");
    alice.rxm(&host, ["info"]).success();
    host.audit().contains(&["verb=\"info\"", "outcome=\"ok\""]);
    let infos = host
        .audit()
        .records()
        .iter()
        .filter(|r| r.contains("verb=\"info\""))
        .count();
    assert_eq!(infos, 1);
}

#[test]
fn records_have_the_form_of_rfc_5424_and_the_facility_authpriv() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    alice.rxm(&host, ["list"]).success();
    let record = host.audit().contains(&["verb=\"list\""]);
    let mut parts = record.splitn(8, ' ');
    let priority: u8 = parts
        .next()
        .unwrap()
        .strip_prefix('<')
        .and_then(|p| p.strip_suffix(">1"))
        .unwrap()
        .parse()
        .unwrap();
    assert_eq!(priority >> 3, 10, "LOG_AUTHPRIV");
    assert!(parts.next().unwrap().contains('T'), "a time stamp");
    assert_eq!(parts.nth(1), Some("xmand"));
    assert_eq!(parts.next().unwrap().parse::<u32>().unwrap(), host.pid());
}

#[test]
fn a_name_with_a_forged_field_or_line_stays_one_value_of_one_line() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let forged = "x\"] forged@1 verdict=\"allow\n<86>1 forged line\u{202e}";
    probe(&alice, &host, &["list", forged]);
    let record = host.audit().contains(&["verb=\"list\"", "forged@1"]);
    assert!(
        record.contains(r#"x\"\] forged@1 verdict=\"allow\\u{a}<86>1 forged line\\u{202e}"#),
        "{record}"
    );
    assert_eq!(record.lines().count(), 1);
}

#[test]
fn a_real_rsyslogd_keeps_every_field() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let rsyslog = Rsyslog::new();
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .syslog(&rsyslog.path())
        .start(realm);
    alice.rxm(&host, ["pause", "test"]).success();
    rsyslog.contains(&[
        "verb=\"pause\"",
        "principal=\"alice@XMAN.TEST\"",
        "outcome=\"ok\"",
    ]);
}

#[test]
fn without_syslog_nothing_is_changed_and_reads_go_on() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    alice.rxm(&host, ["list"]).success();
    host.audit().vanish();
    let outcome = alice.rxm(&host, ["--retries", "1", "pause", "test"]);
    assert_eq!(outcome.exit_code(), 1, "{}", outcome.stderr());
    assert!(outcome.stderr().contains("audit"), "{}", outcome.stderr());
    alice.rxm(&host, ["list"]).success().says("running");
    host.audit().come_back();
    alice.rxm(&host, ["pause", "test"]).success();
    host.audit()
        .contains(&["verb=\"pause\"", "outcome=\"unavailable\""]);
    host.audit().contains(&["verb=\"pause\"", "outcome=\"ok\""]);
}

#[test]
fn a_syslog_that_does_not_read_delays_a_change_for_a_bounded_time_and_stops_it() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    alice.rxm(&host, ["list"]).success();
    host.audit().stop_reading();
    // A datagram socket holds some ten messages before it is full.
    for _ in 0..20 {
        alice.rxm(&host, ["info"]).success();
    }
    let outcome = alice.rxm(&host, ["--retries", "1", "pause", "test"]);
    assert_eq!(outcome.exit_code(), 1, "{}", outcome.stderr());
    alice.rxm(&host, ["list"]).success().says("running");
    host.audit().resume_reading();
    alice
        .rxm(&host, ["--retries", "5", "pause", "test"])
        .success();
}

#[test]
fn where_the_site_says_so_a_change_goes_on_without_syslog_and_is_recorded_later() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("audit = 'best-effort'")
        .start(realm);
    host.audit().vanish();
    alice.rxm(&host, ["pause", "test"]).success();
    host.audit().come_back();
    alice.rxm(&host, ["info"]).success();
    host.audit().contains(&["verb=\"pause\"", "outcome=\"ok\""]);
}

#[test]
fn the_same_id_is_carried_out_once_and_answered_twice() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = probe(&alice, &host, &["twice", "pause", "test"]);
    assert_eq!(said.matches("done ok").count(), 2, "{said}");
    host.audit()
        .contains(&["verb=\"pause\"", "repeated=\"yes\""]);
    let begun = host
        .audit()
        .records()
        .iter()
        .filter(|r| r.contains("; begins"))
        .count();
    assert_eq!(begun, 1);
}

#[test]
fn an_id_that_stands_for_another_request_is_a_conflict() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = probe(
        &alice,
        &host,
        &["twice", "pause", "test", "unpause", "test"],
    );
    assert!(said.contains("done conflict"), "{said}");
    alice.rxm(&host, ["list"]).success().says("paused");
}

#[test]
fn an_outcome_is_remembered_over_a_restart_also_after_kill_9() {
    let realm = Realm::shared();
    let (alice, mut host) = (realm.user("alice"), host());
    let id = Uuid::new_v4().to_string();
    assert!(probe(&alice, &host, &["with-id", &id, "pause", "test"]).contains("done ok"));
    host.kill9();
    host.start();
    // The new xmand has a fresh test driver, whose domain runs; a repeat does not pause it again.
    assert!(probe(&alice, &host, &["with-id", &id, "pause", "test"]).contains("done ok"));
    alice.rxm(&host, ["list"]).success().says("running");
}

#[test]
fn a_repeat_is_judged_anew() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let id = Uuid::new_v4().to_string();
    assert!(probe(&alice, &host, &["with-id", &id, "pause", "test"]).contains("done ok"));
    std::fs::write(host.k5login(), "bob@XMAN.TEST\n").unwrap();
    assert!(probe(&alice, &host, &["with-id", &id, "pause", "test"]).contains("done denied"));
}

#[test]
fn a_change_goes_on_when_its_caller_hangs_up() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let id = Uuid::new_v4().to_string();
    probe(&alice, &host, &["hang-up", &id, "pause", "test"]);
    host.audit().wait_for(PATIENCE, |r| {
        r.contains("verb=\"pause\"") && r.contains("outcome=\"ok\"")
    });
    assert!(probe(&alice, &host, &["with-id", &id, "pause", "test"]).contains("done ok"));
}
