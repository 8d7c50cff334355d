//! SIGTERM: what is under way ends, who waits is told, and the end comes in a bounded time.

use std::{
    os::unix::net::UnixDatagram,
    path::Path,
    time::{Duration, Instant},
};

use xman_tests::{Host, Process, Realm, Records, Scratch, User, built};

const SOON: Duration = Duration::from_secs(60);

fn host() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("shutdown-grace = '20s'")
        .start(Realm::shared())
}

fn probe(user: &User, host: &Host, act: &str) -> Process {
    let words = vec![host.addr().to_string().into(), act.into()];
    user.program_call(&[], Path::new(&built("xman-probe")), words)
        .spawn()
}

#[track_caller]
fn ends_cleanly(host: &mut Host) {
    let began = Instant::now();
    host.sigterm();
    host.wait(SOON).success();
    // Nobody is waited for until the grace is over.
    assert!(
        began.elapsed() < Duration::from_secs(15),
        "{:?}",
        began.elapsed()
    );
    host.audit().contains(&["xmand has stopped"]);
}

#[test]
fn an_idle_session_hears_that_the_host_stops() {
    let (alice, mut host) = (Realm::shared().user("alice"), host());
    let mut session = probe(&alice, &host, "idle");
    session.stdout().wait_for(SOON, "ready");
    ends_cleanly(&mut host);
    let said = session.wait(SOON).stdout();
    assert!(
        said.contains("closing unavailable: xmand is stopping"),
        "{said}"
    );
}

#[test]
fn a_call_that_follows_is_ended_with_a_word() {
    let (alice, mut host) = (Realm::shared().user("alice"), host());
    let mut session = probe(&alice, &host, "follow-kernel");
    session.stdout().wait_for(SOON, "ready");
    host.audit().contains(&["connected"]);
    ends_cleanly(&mut host);
    let said = session.wait(SOON).stdout();
    assert!(said.contains("unavailable: xmand is stopping"), "{said}");
}

#[test]
fn many_that_are_being_told_something_hear_that_the_host_stops() {
    let (alice, mut host) = (Realm::shared().user("alice"), host());
    let mut sessions: Vec<_> = (0..24)
        .map(|_| probe(&alice, &host, "follow-kernel"))
        .collect();
    for session in &mut sessions {
        session.stdout().wait_for(SOON, "ready");
    }
    ends_cleanly(&mut host);
    for mut session in sessions {
        let said = session.wait(SOON).stdout();
        assert!(said.contains("unavailable: xmand is stopping"), "{said}");
    }
}

#[test]
fn half_a_handshake_does_not_keep_the_host() {
    let mut host = host();
    let _half = host.connect();
    ends_cleanly(&mut host);
}

#[test]
fn it_starts_again_at_once_on_the_same_port() {
    let (alice, mut host) = (Realm::shared().user("alice"), host());
    let _silent = host.connect();
    alice.rxm(&host, ["list"]).success();
    host.restart();
    alice.rxm(&host, ["list"]).success();
}

#[test]
fn systemd_hears_that_it_is_ready_and_that_it_stops() {
    let scratch = Scratch::new("notify");
    let path = scratch.path().join("notify");
    let systemd = UnixDatagram::bind(&path).unwrap();
    systemd.set_read_timeout(Some(SOON)).unwrap();
    let mut host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .env("NOTIFY_SOCKET", &path.display().to_string())
        .start(Realm::shared());
    let heard = || {
        let mut words = [0; 256];
        let length = systemd.recv(&mut words).unwrap();
        String::from_utf8_lossy(&words[..length]).into_owned()
    };
    assert!(heard().contains("READY=1"));
    host.sigterm();
    assert!(heard().contains("STOPPING=1"));
    host.wait(SOON).success();
}

#[test]
fn several_addresses_are_listened_on() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra("listen = ['127.0.0.1:0', '[::1]:0']")
        .start(realm);
    assert_eq!(host.addresses().len(), 2);
    for address in host.addresses() {
        let words = vec![address.to_string().into(), "renew".into()];
        let outcome = alice
            .program_call(&[], Path::new(&built("xman-probe")), words)
            .run()
            .success();
        assert!(
            outcome.stdout().contains("done ok"),
            "{address}: {}",
            outcome.stdout()
        );
    }
}
