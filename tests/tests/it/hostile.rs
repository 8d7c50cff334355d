//! Callers who break the protocol, on purpose. After each of them a good caller is served at once.

use std::{
    io::{Read, Write},
    path::Path,
    time::{Duration, Instant},
};

use xman_tests::{Host, PATIENCE, Process, Realm, Records, User, built};

fn host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("[limits]\nidle = '1h'")
        .start(Realm::shared())
}

/// A host that lets nobody take longer than two seconds to say who he is.
fn brisk_host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("[limits]\nhandshake = '2s'\nidle = '1h'")
        .start(Realm::shared())
}

fn probe(user: &User, host: &Host, act: &[&str]) -> Process {
    let mut words = vec![host.addr().to_string().into()];
    words.extend(act.iter().map(|word| (*word).into()));
    user.program_call(&[], Path::new(&built("xman-probe")), words)
        .spawn()
}

/// Runs a probe to its end and returns what it printed.
#[track_caller]
fn said(user: &User, host: &Host, act: &[&str]) -> String {
    let outcome = probe(user, host, act).wait(PATIENCE);
    assert!(outcome.is_success(), "{act:?}: {}", outcome.stderr());
    outcome.stdout()
}

#[track_caller]
fn still_serves(user: &User, host: &Host) {
    user.fetch_ticket("xman@localhost");
    let began = Instant::now();
    user.rxm(host, ["whoami"]).success();
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "a good caller waited {:?}",
        began.elapsed()
    );
}

/// The host closes the connection, says so in its audit, and serves the next caller.
#[track_caller]
fn is_cut_off(act: &str, audit: &[&str]) -> String {
    is_cut_off_by(&host(), act, audit)
}

#[track_caller]
fn is_cut_off_by(host: &Host, act: &str, audit: &[&str]) -> String {
    let alice = Realm::shared().user("alice");
    let said = said(&alice, host, &[act]);
    assert!(said.trim_end().ends_with("closed"), "{act}: {said}");
    host.audit().contains(audit);
    still_serves(&alice, host);
    said
}

#[test]
fn a_caller_who_says_nothing_is_cut_off() {
    is_cut_off_by(
        &brisk_host(),
        "silent",
        &["handshake from 127.0.0.1 failed", "took too long"],
    );
}

#[test]
fn a_caller_who_trickles_is_cut_off() {
    is_cut_off_by(
        &brisk_host(),
        "trickle",
        &["handshake from 127.0.0.1 failed"],
    );
}

#[test]
fn a_web_browser_is_cut_off() {
    is_cut_off("not-xman", &["does not speak the xman protocol"]);
}

#[test]
fn a_caller_of_another_version_hears_so() {
    let said = is_cut_off("other-version", &["no version of the protocol"]);
    assert!(said.contains("version 0"), "{said}");
}

#[test]
fn a_frame_of_four_gigabytes_is_refused_before_anything_is_allocated() {
    is_cut_off("giant-handshake", &["over the limit"]);
}

#[test]
fn half_a_frame_is_no_handshake() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), brisk_host());
    said(&alice, &host, &["half-frame"]);
    host.audit().contains(&["handshake from 127.0.0.1 failed"]);
    still_serves(&alice, &host);
}

#[test]
fn a_token_of_garbage_is_refused_and_the_refusal_gives_nothing_away() {
    let said = is_cut_off("garbage-token", &["handshake from 127.0.0.1 failed"]);
    assert!(said.contains("refused 255"), "{said}");
}

#[test]
fn a_replayed_handshake_is_refused() {
    let said = is_cut_off(
        "replayed-handshake",
        &["handshake from 127.0.0.1 failed", "replay"],
    );
    assert!(said.contains("refused 4"), "{said}");
}

#[test]
fn a_preface_changed_on_its_way_is_noticed() {
    is_cut_off("tampered-hello", &["changed on its way"]);
}

#[test]
fn nothing_is_done_before_the_hello() {
    is_cut_off("call-before-hello", &["no Hello"]);
}

#[test]
fn garbage_after_a_valid_ticket_ends_the_session() {
    is_cut_off("garbage-after-ticket", &["alice@XMAN.TEST", "left"]);
}

#[test]
fn a_giant_frame_after_a_valid_ticket_ends_the_session() {
    is_cut_off("giant-frame", &["alice@XMAN.TEST", "over the limit"]);
}

#[test]
fn a_sealed_message_that_is_none_ends_the_session() {
    is_cut_off("sealed-garbage", &["alice@XMAN.TEST", "not a message"]);
}

#[test]
fn a_frame_sent_again_ends_the_session() {
    let said = is_cut_off("replayed-frame", &["alice@XMAN.TEST", "left"]);
    assert_eq!(said.matches("done ok").count(), 1, "{said}");
}

#[test]
fn frames_in_the_wrong_order_end_the_session() {
    let said = is_cut_off("swapped-frames", &["alice@XMAN.TEST", "left"]);
    assert!(!said.contains("done"), "{said}");
}

#[test]
fn a_frame_sent_back_to_the_host_ends_the_session() {
    is_cut_off("reflected-frame", &["alice@XMAN.TEST", "left"]);
}

#[test]
fn a_peer_that_never_reads_is_cut_off_and_delays_nobody() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let mut deaf = probe(&alice, &host, &["never-reads"]);
    still_serves(&alice, &host);
    let outcome = deaf.wait(PATIENCE);
    assert!(outcome.stdout().contains("closed"), "{}", outcome.stdout());
    host.audit().contains(&["has not read"]);
    still_serves(&alice, &host);
}

#[test]
fn an_unknown_verb_or_body_is_unsupported_and_the_session_lives() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = said(&alice, &host, &["unknown-verb"]);
    assert_eq!(said.matches("done unsupported").count(), 2, "{said}");
    assert!(said.contains("done ok"), "{said}");
    host.audit()
        .contains(&["verb=\"#999\"", "outcome=\"unsupported\""]);
}

#[test]
fn a_name_that_is_none_is_refused_before_anything_is_looked_up() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = said(&alice, &host, &["odd-names"]);
    assert_eq!(said.matches("done unsupported").count(), 14, "{said}");
    assert!(said.trim_end().ends_with("done ok"), "{said}");
    assert!(
        host.audit()
            .records()
            .iter()
            .all(|record| record.lines().count() == 1)
    );
}

#[test]
fn acting_for_another_is_refused_and_recorded() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = said(&alice, &host, &["on-behalf-of"]);
    assert!(said.contains("done denied"), "{said}");
    host.audit()
        .contains(&["alice@XMAN.TEST", "outcome=\"denied\"", "root@XMAN.TEST"]);
}

#[test]
fn calls_sent_far_ahead_are_answered_busy_and_none_is_lost() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = said(&alice, &host, &["flood"]);
    let answered = said.matches("done ok").count() + said.matches("done busy").count();
    assert_eq!(answered, 500, "{said}");
    assert!(said.contains("done ok"), "{said}");
    still_serves(&alice, &host);
}

#[test]
fn a_call_that_waits_and_one_that_follows_can_be_cancelled() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let said = said(&alice, &host, &["cancel"]);
    assert!(
        said.contains("done busy: cancelled before it began"),
        "{said}"
    );
    assert!(said.trim_end().ends_with("done ok"), "{said}");
}

#[test]
fn strangers_who_crowd_the_door_do_not_keep_a_good_caller_out() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let mut silent: Vec<_> = (0..200).map(|_| host.connect()).collect();
    still_serves(&alice, &host);
    let mut first = silent.remove(0);
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(
        first.read(&mut [0; 16]).unwrap_or(0),
        0,
        "the oldest stranger was sent away"
    );
    host.audit().contains(&["its place was wanted"]);
}

#[test]
fn one_principal_cannot_hold_all_the_seats() {
    let realm = Realm::shared();
    let (alice, bob) = (realm.user("alice"), realm.user("bob"));
    let host = Host::builder()
        .k5login(["alice", "bob"])
        .uri("test:///default")
        .config_extra("[limits]\nmax-per-principal = 3")
        .start(realm);
    let idle: Vec<_> = (0..3).map(|_| probe(&alice, &host, &["idle"])).collect();
    for session in &idle {
        session.stdout().wait_for(PATIENCE, "ready");
    }
    let outcome = alice.rxm(&host, ["--retries", "1", "whoami"]);
    assert!(!outcome.is_success());
    host.audit().contains(&["all the sessions it may have"]);
    bob.rxm(&host, ["whoami"]).success();
}

#[test]
fn random_bytes_at_the_door_never_end_xmand() {
    let realm = Realm::shared();
    let (alice, mut host) = (realm.user("alice"), host());
    let mut state = 88_172_645_463_325_252_u64;
    for round in 0..300_usize {
        let mut stream = host.connect();
        let bytes: Vec<u8> = (0..round)
            .map(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state.to_be_bytes()[0]
            })
            .collect();
        let preface: &[u8] = if round % 2 == 0 {
            b"XMAN\0\x01\0\x01"
        } else {
            b""
        };
        let _ = stream
            .write_all(preface)
            .and_then(|()| stream.write_all(&bytes));
    }
    assert!(host.is_running());
    still_serves(&alice, &host);
}
