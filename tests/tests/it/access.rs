//! Who gets in: tickets, `.k5login`, and what a stranger learns.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::Path,
    time::Duration,
};

use xman_tests::{Host, PATIENCE, Realm, Records, built, eventually};

const UNAUTHENTICATED: i32 = 4;
const FAILED: i32 = 1;

fn host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(Realm::shared())
}

#[test]
fn a_caller_without_a_ticket_is_told_to_run_kinit() {
    let outcome = Realm::shared()
        .user_without_ticket("nobody")
        .rxm(&host(), ["list"]);
    outcome.code(UNAUTHENTICATED).complains("kinit");
}

#[test]
fn a_caller_whose_ticket_has_ended_is_told_so() {
    let outcome = Realm::shared()
        .user_with_expired_ticket("late")
        .rxm(&host(), ["list"]);
    outcome.code(UNAUTHENTICATED).complains("expired");
}

#[test]
fn a_caller_from_a_realm_without_trust_is_refused() {
    let elsewhere = Realm::named("ELSEWHERE.TEST");
    let outcome = elsewhere.user("alice").rxm(&host(), ["list"]);
    assert_eq!(outcome.exit_code(), UNAUTHENTICATED, "{}", outcome.stderr());
}

#[test]
fn a_host_that_the_kdc_does_not_know_is_named_as_the_caller_typed_it() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = host();
    let strange = format!("127.0.0.1:{}", host.addr().port());
    let outcome = alice.rxm(strange.as_str(), ["list"]);
    outcome.code(UNAUTHENTICATED).complains("xman/127.0.0.1");
}

#[test]
fn a_ticket_for_another_service_opens_nothing() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = Host::builder()
        .services(&["host/localhost"])
        .k5login(["alice"])
        .uri("test:///default")
        .prepare(realm);
    let outcome = host.check();
    assert_eq!(outcome.exit_code(), FAILED);
    assert!(
        outcome.stdout().contains("xman/HOST"),
        "{}",
        outcome.stdout()
    );
    drop(alice);
}

#[test]
fn a_kdc_that_is_gone_is_said_once_and_not_for_each_host() {
    let realm = Realm::new();
    let alice = realm.user("alice");
    let (one, two) = (
        Host::builder()
            .k5login(["alice"])
            .uri("test:///default")
            .start(&realm),
        Host::builder()
            .k5login(["alice"])
            .uri("test:///default")
            .start(&realm),
    );
    realm.stop_kdc();
    let outcome = alice.rxm(&[&one, &two], ["list"]);
    assert_eq!(outcome.exit_code(), UNAUTHENTICATED, "{}", outcome.stderr());
    let said = outcome.stderr().to_lowercase();
    assert_eq!(
        said.lines().filter(|line| line.contains("kdc")).count(),
        1,
        "{said}"
    );
}

#[test]
fn a_key_that_was_changed_is_told_apart_from_a_missing_right() {
    let realm = Realm::new();
    let alice = realm.user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(&realm);
    realm.change_key("xman/localhost");
    let outcome = alice.rxm(&host, ["list"]);
    assert_eq!(outcome.exit_code(), UNAUTHENTICATED, "{}", outcome.stderr());
    assert!(outcome.stderr().contains("key"), "{}", outcome.stderr());
    host.audit().contains(&["handshake from 127.0.0.1 failed"]);
}

#[test]
fn a_clock_that_is_wrong_is_named_as_the_cause() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    alice.fetch_ticket("xman@localhost");
    // The credential cache holds how far the KDC's clock is from ours, and libkrb5 stamps what it sends accordingly: seven minutes off,
    // beyond the five that Kerberos allows. File format 4: version, header length, tag 1, length 8, seconds, microseconds.
    let path = alice.ccache().strip_prefix("FILE:").unwrap().to_owned();
    let mut ccache = fs::read(&path).unwrap();
    assert_eq!(
        ccache[..8],
        [5, 4, 0, 12, 0, 1, 0, 8],
        "a credential cache with a time offset"
    );
    ccache[8..12].copy_from_slice(&420_i32.to_be_bytes());
    fs::write(&path, ccache).unwrap();
    let outcome = alice.rxm(&host, ["list"]).code(UNAUTHENTICATED);
    assert!(outcome.stderr().contains("clock"), "{}", outcome.stderr());
    host.audit()
        .contains(&["handshake from 127.0.0.1 failed", "Clock skew"]);
}

#[test]
fn a_session_ends_with_its_ticket_and_is_warned_before() {
    let realm = Realm::shared();
    // The ticket's life begins only when the host is there.
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(realm);
    let alice = realm.user_with_lifetime("alice", Duration::from_secs(20));
    let words = vec![host.addr().to_string().into(), "idle".into()];
    let mut session = alice
        .program_call(&[], Path::new(&built("xman-probe")), words)
        .spawn();
    session.stdout().wait_for(PATIENCE, "ready");
    session.stdout().wait_for(PATIENCE, "expiring");
    session.stdout().wait_for(PATIENCE, "closing expired");
    let outcome = session.wait(PATIENCE);
    assert!(
        outcome.stdout().ends_with("closed\n"),
        "{}",
        outcome.stdout()
    );
    host.audit()
        .contains(&["alice@XMAN.TEST", "ticket has ended"]);
}

#[test]
fn a_session_is_renewed_with_a_fresh_ticket_of_the_same_principal() {
    let realm = Realm::shared();
    let (alice, host) = (realm.user("alice"), host());
    let words = vec![host.addr().to_string().into(), "renew".into()];
    let outcome = alice
        .program_call(&[], Path::new(&built("xman-probe")), words)
        .run()
        .success();
    assert!(
        outcome.stdout().contains("renewed\ndone ok"),
        "{}",
        outcome.stdout()
    );
}

#[test]
fn an_administrator_may_and_a_stranger_learns_nothing() {
    let realm = Realm::shared();
    let (alice, mallory) = (realm.user("alice"), realm.user("mallory"));
    let host = host();
    alice.rxm(&host, ["pause", "test"]).success();
    let known = mallory.rxm(&host, ["describe", "localhost/test"]).denied();
    let unknown = mallory
        .rxm(&host, ["describe", "localhost/no-such-domain"])
        .denied();
    assert_eq!(
        known.stderr().replace("test", "X"),
        unknown.stderr().replace("no-such-domain", "X"),
        "a stranger cannot tell a domain that exists from one that does not"
    );
    mallory.rxm(&host, ["list"]).denied();
    mallory.rxm(&host, ["info"]).denied();
    mallory.rxm(&host, ["dmesg"]).denied();
    host.audit().contains(&[
        "principal=\"mallory@XMAN.TEST\"",
        "verb=\"describe\"",
        "verdict=\"deny\"",
    ]);
}

#[test]
fn a_principal_of_the_same_name_in_another_form_is_somebody_else() {
    let realm = Realm::shared();
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(realm);
    realm.user("alice/admin").rxm(&host, ["list"]).denied();
    realm.user("Alice").rxm(&host, ["list"]).denied();
}

#[test]
fn k5login_is_read_anew_when_it_is_replaced() {
    let realm = Realm::shared();
    let (alice, bob) = (realm.user("alice"), realm.user("bob"));
    let host = host();
    bob.rxm(&host, ["list"]).denied();
    let fresh = host.k5login().with_extension("new");
    fs::write(&fresh, "bob@XMAN.TEST\n").unwrap();
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&fresh, host.k5login()).unwrap();
    bob.rxm(&host, ["list"]).success();
    alice.rxm(&host, ["list"]).denied();
    fs::write(host.k5login(), "alice@XMAN.TEST\n").unwrap();
    alice.rxm(&host, ["list"]).success();
    bob.rxm(&host, ["list"]).denied();
}

/// Whatever is wrong with the file, nobody gets in, and the audit says what is wrong.
#[track_caller]
fn lets_nobody_in(spoil: impl FnOnce(&Path), audit: &str) {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = host();
    alice.rxm(&host, ["list"]).success();
    spoil(&host.k5login());
    alice.rxm(&host, ["list"]).denied();
    host.audit()
        .contains(&["verb=\"list\"", "verdict=\"deny\"", audit]);
}

#[test]
fn without_k5login_nobody_gets_in() {
    lets_nobody_in(|path| fs::remove_file(path).unwrap(), "k5login");
}

#[test]
fn a_k5login_that_its_group_can_write_lets_nobody_in() {
    lets_nobody_in(
        |path| fs::set_permissions(path, fs::Permissions::from_mode(0o660)).unwrap(),
        "group",
    );
}

#[test]
fn a_k5login_of_another_owner_lets_nobody_in() {
    lets_nobody_in(
        |path| std::os::unix::fs::chown(path, Some(12_345), None).unwrap(),
        "own",
    );
}

#[test]
fn a_k5login_that_is_a_link_lets_nobody_in() {
    lets_nobody_in(
        |path| {
            let real = path.with_extension("real");
            fs::rename(path, &real).unwrap();
            symlink(&real, path).unwrap();
        },
        "k5login",
    );
}

#[test]
fn a_k5login_that_is_a_directory_lets_nobody_in() {
    lets_nobody_in(
        |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        },
        "k5login",
    );
}

#[test]
fn lines_that_can_never_match_are_told_and_match_nobody() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let text = "alice@XMAN.TEST\r\nalice@XMAN.TEST \nalice\n# alice@XMAN.TEST\n";
    let host = Host::builder()
        .k5login_text(text)
        .uri("test:///default")
        .start(realm);
    alice.rxm(&host, ["list"]).denied();
    let said = host.check().stdout();
    for line in 1..=4 {
        assert!(said.contains(&format!("line {line}")), "{said}");
    }
    eventually("the log has the warnings too", PATIENCE, || {
        host.stderr().text().contains("line 1").then_some(())
    });
}

#[test]
fn check_says_for_each_thing_what_is_wrong_and_what_to_do() {
    let realm = Realm::shared();
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .prepare(realm);
    host.check().success();
    let broken = Host::builder()
        .no_k5login()
        .uris(&["test:///default", "nonsense:///x"])
        .config_extra("keytab = '/nonexistent/keytab'\nsyslog = '/nonexistent/log'")
        .prepare(realm);
    let outcome = broken.check().code(FAILED);
    for what in [
        "WRONG keytab",
        "WRONG syslog",
        "WRONG .k5login",
        "WRONG hypervisor nonsense:///x",
        "ok    hypervisor test:///default",
    ] {
        assert!(
            outcome.stdout().contains(what),
            "{what}: {}",
            outcome.stdout()
        );
    }
}

#[test]
fn a_configuration_with_an_unknown_key_is_refused() {
    let realm = Realm::shared();
    let mut host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("hypervisor = 'x'")
        .prepare(realm);
    let outcome = host.try_start().unwrap_err();
    assert_eq!(outcome.exit_code(), 78);
    assert!(
        outcome.stderr().contains("hypervisor"),
        "{}",
        outcome.stderr()
    );
}
