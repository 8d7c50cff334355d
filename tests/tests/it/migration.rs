//! A running guest moves to another host and never misses a number; where it cannot, it stays at home.

use std::time::Duration;

use xman_tests::{Guest, Host, Hosts, Realm, Records, User, eventually};

struct Site {
    alice: User,
    alpha: Host,
    beta: Host,
    hosts: Hosts,
    _realm: Realm,
}

impl Site {
    /// Two hosts whose libvirtds listen on no network.
    #[track_caller]
    fn new() -> Self {
        Self::of(Hosts::quiet_pair)
    }

    /// Two hosts whose libvirtds reach each other over TCP.
    #[track_caller]
    fn direct() -> Self {
        Self::of(Hosts::pair)
    }

    #[track_caller]
    fn of(pair: fn(&Realm) -> Hosts) -> Self {
        let realm = Realm::new();
        let hosts = pair(&realm);
        let config = "[migration]\npeers = ['alpha', 'beta', '10.77.0.1', '10.77.0.2', '10.77.0.99']\nuri = 'qemu+tcp://{host}/system'";
        let host = |libvirtd| {
            Host::builder()
                .k5login(["alice"])
                .beside(libvirtd)
                .config_extra(config)
                .start(&realm)
        };
        let (alpha, beta) = (host(&hosts.alpha), host(&hosts.beta));
        let site = Self {
            alice: realm.user("alice"),
            alpha,
            beta,
            hosts,
            _realm: realm,
        };
        for host in [&site.alpha, &site.beta] {
            eventually("xmand has reached libvirt", Duration::from_secs(30), || {
                site.alice
                    .rxm(host, ["info"])
                    .stdout()
                    .contains("QEMU")
                    .then_some(())
            });
        }
        site
    }

    #[track_caller]
    fn wait_listed(&self, host: &Host, name: &str, state: &str) {
        eventually(
            &format!("{name} is listed as {state}"),
            Duration::from_secs(20),
            || {
                let rows = self
                    .alice
                    .rxm(host, ["-o", "json", "list", name])
                    .success()
                    .json();
                (rows.get(0)?.get("state")? == state).then_some(())
            },
        );
    }
}

#[test]
fn a_counting_guest_moves_there_and_back_without_missing_a_number() {
    let site = Site::new();
    let guest = Guest::booted("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    for (from, to) in [(&site.alpha, "beta"), (&site.beta, "alpha")] {
        site.wait_listed(from, "nomad", "running");
        site.alice
            .rxm_call(from, ["migrate", "nomad", to])
            .limit(Duration::from_secs(120))
            .run()
            .success();
        guest.keeps_counting();
    }
    assert_eq!(site.hosts.alpha.state("nomad"), "running");
    assert_eq!(site.hosts.beta.state("nomad"), "");
    guest.missed_no_number();
    let permit = ["verb=\"migrate-in\"", "alice@", "outcome=\"ok\""];
    site.beta.audit().contains(&permit);
    site.beta.audit().contains(&[
        "principal=\"xman/alpha@",
        "verb=\"carry\"",
        "permit of alice@",
        "for nomad",
    ]);
    site.alpha
        .audit()
        .contains(&["alice@", "verb=\"migrate\"", "to=beta", "outcome=\"ok\""]);
}

#[test]
fn libvirts_may_move_a_guest_directly_where_the_network_is_trusted() {
    let site = Site::direct();
    let guest = Guest::booted("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    site.alice
        .rxm_call(&site.alpha, ["migrate", "nomad", "10.77.0.2", "--direct"])
        .limit(Duration::from_secs(120))
        .run()
        .success();
    assert_eq!(site.hosts.beta.state("nomad"), "running");
    assert_eq!(
        site.hosts.alpha.state("nomad"),
        "",
        "it is no longer defined at home"
    );
    guest.keeps_counting();
    site.wait_listed(&site.beta, "nomad", "running");
    site.alice
        .rxm_call(&site.beta, ["migrate", "nomad", "10.77.0.1", "--direct"])
        .limit(Duration::from_secs(120))
        .run()
        .success();
    assert_eq!(site.hosts.alpha.state("nomad"), "running");
    guest.keeps_counting();
    let jobs = site
        .alice
        .rxm(&site.alpha, ["-o", "json", "job", "list"])
        .success()
        .json();
    assert_eq!(jobs[0]["state"], "done", "{jobs}");
    site.alpha
        .audit()
        .contains(&["verb=\"migrate\"", "to=10.77.0.2", "outcome=\"ok\""]);
}

#[test]
fn a_migration_goes_on_without_its_caller_and_is_found_again_and_given_up() {
    let site = Site::new();
    let guest = Guest::booted("slow");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "slow", "running");
    let words = [
        "migrate",
        "slow",
        "beta",
        "--bandwidth",
        "1MiB",
        "--detach",
    ];
    site.alice
        .rxm_call(&site.alpha, words)
        .limit(Duration::from_secs(60))
        .run()
        .success();
    let job = eventually(
        "the job is listed as running",
        Duration::from_secs(20),
        || {
            let jobs = site
                .alice
                .rxm(&site.alpha, ["-o", "json", "job", "list"])
                .success()
                .json();
            let job = jobs.get(0)?;
            (job.get("state")? == "running").then(|| job["id"].as_str().unwrap().to_owned())
        },
    );
    let mut follower = site
        .alice
        .rxm_call(&site.alpha, ["job", "wait", &job])
        .limit(Duration::from_secs(60))
        .spawn();
    site.alice
        .rxm(&site.alpha, ["job", "cancel", &job])
        .success();
    let outcome = follower.wait(Duration::from_secs(60));
    assert_eq!(outcome.exit_code(), 1, "{}", outcome.stderr());
    assert_eq!(
        site.hosts.alpha.state("slow"),
        "running",
        "it still runs at home"
    );
    assert_eq!(site.hosts.beta.state("slow"), "");
    guest.keeps_counting();
    let jobs = site
        .alice
        .rxm(&site.alpha, ["-o", "json", "job", "list"])
        .success()
        .json();
    assert_eq!(jobs[0]["state"], "failed", "{jobs}");
}

#[test]
fn a_migration_is_aborted_by_the_domains_name() {
    let site = Site::new();
    let guest = Guest::booted("wavering");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "wavering", "running");
    let words = ["migrate", "wavering", "beta", "--bandwidth", "1MiB"];
    let mut migration = site
        .alice
        .rxm_call(&site.alpha, words)
        .limit(Duration::from_secs(120))
        .spawn();
    eventually("it is under way", Duration::from_secs(20), || {
        let jobs = site
            .alice
            .rxm(&site.alpha, ["-o", "json", "job", "list"])
            .success()
            .json();
        jobs.get(0)?.get("progress")?.is_object().then_some(())
    });
    site.alice
        .rxm(&site.alpha, ["migrate", "--abort", "wavering"])
        .success();
    let outcome = migration.wait(Duration::from_secs(60));
    assert_eq!(outcome.exit_code(), 1);
    assert!(
        outcome.stderr().contains("still runs here"),
        "{}",
        outcome.stderr()
    );
    guest.keeps_counting();
}

#[test]
fn a_destination_that_is_down_a_stranger_or_full_leaves_the_guest_at_home() {
    let mut site = Site::new();
    let guest = Guest::booted("homely");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "homely", "running");
    let outcome = site
        .alice
        .rxm(&site.alpha, ["migrate", "homely", "stranger"])
        .code(1);
    assert!(outcome.stderr().contains("peer"), "{}", outcome.stderr());
    // The same name lives there already.
    site.hosts.beta.define(&Guest::tiny("homely"));
    let words = ["migrate", "homely", "beta"];
    let outcome = site
        .alice
        .rxm_call(&site.alpha, words)
        .limit(Duration::from_secs(120))
        .run()
        .code(1);
    assert!(
        outcome.stderr().contains("still runs here"),
        "{}",
        outcome.stderr()
    );
    site.hosts.beta.kill9();
    let outcome = site
        .alice
        .rxm_call(&site.alpha, words)
        .limit(Duration::from_secs(120))
        .run()
        .code(1);
    assert!(
        outcome.stderr().contains("still runs here"),
        "{}",
        outcome.stderr()
    );
    assert_eq!(site.hosts.alpha.state("homely"), "running");
    guest.keeps_counting();
}
