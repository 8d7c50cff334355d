//! A running guest moves to another host and never misses a number; where it cannot, it stays at home.

use std::{
    fs::Permissions,
    os::unix::fs::PermissionsExt,
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use xman_tests::{Guest, Host, Hosts, Libvirtd, Realm, Records, User, eventually};

/// Two emulated guests, four daemons and their channel are as much as two cores do at a time.
static TURN: Mutex<()> = Mutex::new(());

struct Site {
    alice: User,
    alpha: Host,
    beta: Host,
    hosts: Hosts,
    realm: Realm,
    _turn: MutexGuard<'static, ()>,
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
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
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
            realm,
            _turn: turn,
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
        wait_listed(&self.alice, host, name, state);
    }
}

#[track_caller]
fn wait_listed(alice: &User, host: &Host, name: &str, state: &str) {
    eventually(
        &format!("{name} is listed as {state}"),
        Duration::from_secs(30),
        || {
            let rows = alice.rxm(host, ["-o", "json", "list", name]);
            (rows.is_success() && rows.json().get(0)?.get("state")? == state).then_some(())
        },
    );
}

#[test]
fn a_counting_guest_moves_there_and_back_without_missing_a_number() {
    let site = Site::new();
    let guest = Guest::traveller("nomad");
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
    let guest = Guest::traveller("nomad");
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
    let guest = Guest::traveller("slow");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "slow", "running");
    let words = ["migrate", "slow", "beta", "--bandwidth", "1MiB", "--detach"];
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
    eventually("what had arrived is gone", Duration::from_secs(60), || {
        site.hosts.beta.state("slow").is_empty().then_some(())
    });
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
    let guest = Guest::traveller("wavering");
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
fn a_destination_that_is_down_a_stranger_full_or_taken_leaves_the_guest_at_home() {
    let mut site = Site::new();
    let guest = Guest::traveller("homely");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "homely", "running");
    let refused = |site: &Site, to: &str, code: i32, why: &str| {
        let outcome = site
            .alice
            .rxm_call(&site.alpha, ["migrate", "homely", to])
            .limit(Duration::from_secs(120))
            .run()
            .code(code);
        assert!(outcome.stderr().contains(why), "{}", outcome.stderr());
    };
    refused(&site, "stranger", 3, "cannot be resolved");
    refused(&site, "alpha", 1, "has this very domain already");
    // The name of another lives there, and then the very domain.
    let namesake = Guest::tiny("homely");
    site.hosts.beta.define(&namesake);
    site.wait_listed(&site.beta, "homely", "off");
    refused(&site, "beta", 1, "another domain of that name");
    site.hosts.beta.virsh(&["undefine", "homely"]).success();
    site.hosts.beta.define(&guest);
    eventually("beta knows the other", Duration::from_secs(20), || {
        let rows = site.alice.rxm(&site.beta, ["-o", "json", "list"]).json();
        (rows.get(0)?.get("uuid")?.as_str()? == guest.uuid().to_string()).then_some(())
    });
    refused(&site, "beta", 1, "has this very domain already");
    site.hosts.beta.virsh(&["undefine", "homely"]).success();
    eventually("beta has none", Duration::from_secs(20), || {
        let rows = site.alice.rxm(&site.beta, ["-o", "json", "list"]).json();
        rows.as_array()?.is_empty().then_some(())
    });
    site.hosts.beta.kill9();
    refused(&site, "beta", 1, "libvirt");
    site.beta.kill9();
    refused(&site, "beta", 3, "beta");
    assert_eq!(site.hosts.alpha.state("homely"), "running");
    guest.keeps_counting();
    guest.missed_no_number();
}

#[test]
fn who_may_not_bring_a_domain_there_gets_no_permit_and_no_host_that_is_no_peer_does() {
    let mut site = Site::new();
    site.hosts.alpha.define(&Guest::tiny("seed"));
    let bob = site.realm.user("bob");
    let admins = site.alpha.k5login();
    std::fs::write(
        &admins,
        format!("{}\n{}\n", site.alice.principal(), bob.principal()),
    )
    .unwrap();
    site.wait_listed(&site.alpha, "seed", "off");
    let denied = bob.rxm(&site.alpha, ["migrate", "seed", "beta"]).code(1);
    assert!(
        denied.stderr().contains("rxm: beta: denied"),
        "{}",
        denied.stderr()
    );
    let rehearsed = bob
        .rxm(&site.alpha, ["--dry-run", "migrate", "seed", "beta"])
        .code(5);
    assert!(
        rehearsed.stderr().contains("may not bring"),
        "{}",
        rehearsed.stderr()
    );
    site.beta
        .audit()
        .contains(&["bob@", "verb=\"migrate-in\"", "verdict=\"deny\""]);
    // A host that beta does not list as its peer gets nothing, whoever asks.
    site.beta.configure("[migration]\npeers = ['gamma']");
    site.beta.restart();
    let refused = site
        .alice
        .rxm(&site.alpha, ["migrate", "seed", "beta"])
        .code(1);
    assert!(
        refused.stderr().contains("no migration peer"),
        "{}",
        refused.stderr()
    );
}

/// What is done to a migration under way.
#[derive(Clone, Copy, Debug)]
enum Mishap {
    Cut,
    SourceXmand,
    DestinationXmand,
    SourceLibvirtd,
    DestinationLibvirtd,
    Abort,
}

impl Mishap {
    const ALL: [Self; 6] = [
        Self::Cut,
        Self::SourceXmand,
        Self::DestinationXmand,
        Self::SourceLibvirtd,
        Self::DestinationLibvirtd,
        Self::Abort,
    ];

    fn befall(self, from: &mut Side<'_>, to: &mut Side<'_>, alice: &User) {
        match self {
            Self::Cut => {
                let there = if from.host.name() == "alpha" {
                    "10.77.0.2"
                } else {
                    "10.77.0.1"
                };
                let mut ss = from.libvirtd.cell().command("ss");
                ss.args(["-H", "-K", "dst", there, "dport", "=", "9626"]);
                xman_tests::run(ss, b"", Duration::from_secs(10)).success();
            }
            Self::SourceXmand => {
                from.host.kill9();
                from.host.start();
            }
            Self::DestinationXmand => {
                to.host.kill9();
                to.host.start();
            }
            Self::SourceLibvirtd => {
                from.libvirtd.kill9();
                from.libvirtd.start();
            }
            Self::DestinationLibvirtd => {
                to.libvirtd.kill9();
                to.libvirtd.start();
            }
            // It may have arrived already.
            Self::Abort => drop(alice.rxm(from.host, ["migrate", "--abort", "nomad"])),
        }
    }
}

struct Side<'a> {
    host: &'a mut Host,
    libvirtd: &'a mut Libvirtd,
}

/// How far the job is that runs on a host, of a hundred; nothing where none runs.
fn percent(alice: &User, host: &Host) -> Option<u64> {
    let jobs = alice.rxm(host, ["-o", "json", "job", "list"]).json();
    let jobs = jobs.as_array()?;
    let running = jobs.iter().find(|job| job["state"] == "running")?;
    Some(running["progress"]["percent"].as_u64().unwrap_or(0))
}

/// When a mishap befalls a migration.
#[derive(Clone, Copy, Debug)]
enum When {
    /// So far it is, of a hundred.
    Percent(u64),
    /// The destination's libvirt has written down that it starts an emulator for the guest, and has not yet done so.
    Starting,
    /// It has.
    Started,
    /// The guest stands still at the source, to go on at the destination.
    ChangingOver,
    /// The source has no emulator for it any more, and it may not run at the destination yet.
    Gone,
}

impl When {
    fn has_come(self, from: &Side<'_>, to: &Side<'_>, guest: &Guest, alice: &User) -> bool {
        match self {
            Self::Percent(percent) => {
                self::percent(alice, from.host).is_some_and(|far| far >= percent)
            }
            Self::Starting => status_of(to.libvirtd, guest).exists(),
            Self::ChangingOver => from.libvirtd.state(guest.name()) != "running",
            Self::Gone => from.libvirtd.emulators_of(guest).is_empty(),
            Self::Started => !to.libvirtd.emulators_of(guest).is_empty(),
        }
    }
}

/// Moves the guest to the other host, with a mishap on the way, and requires that one emulator has it afterwards and that the next journey goes.
#[track_caller]
fn journey(site: &mut Site, guest: &Guest, mishap: Mishap, when: When) {
    let is_out = site.hosts.alpha.state(guest.name()) == "running";
    let Site {
        alice,
        alpha,
        beta,
        hosts,
        ..
    } = site;
    let here = Side {
        host: alpha,
        libvirtd: &mut hosts.alpha,
    };
    let there = Side {
        host: beta,
        libvirtd: &mut hosts.beta,
    };
    let (mut from, mut to) = if is_out { (here, there) } else { (there, here) };
    let destination = to.host.name().to_owned();
    wait_listed(alice, from.host, guest.name(), "running");
    let words = [
        "migrate",
        guest.name(),
        &destination,
        "--bandwidth",
        "24MiB",
    ];
    let mut rxm = alice
        .rxm_call(from.host, words)
        .limit(Duration::from_secs(180))
        .spawn();
    // Some moments are too short for `eventually`.
    let deadline = Instant::now() + Duration::from_secs(60);
    while rxm.outcome().is_none() && !when.has_come(&from, &to, guest, alice) {
        assert!(Instant::now() < deadline, "the migration is not there");
        std::thread::yield_now();
    }
    mishap.befall(&mut from, &mut to, alice);
    // What was cut early may have been begun again, and go well.
    let said = rxm.wait(Duration::from_secs(180));
    let what = format!("{mishap:?} at {when:?}");
    let left = match rests(&from, &to, guest, &what, true) {
        Rest::There => true,
        Rest::Here => false,
        Rest::Phantom => {
            println!("{what}: {destination} has a phantom");
            // libvirt takes half a minute to say so.
            let said = |said: &str| said.lines().any(is_told_of_phantom).then_some(());
            let told = to.host.stderr().find(Duration::from_secs(90), said);
            assert!(told.is_some(), "{}", to.host.stderr().text());
            lay_to_rest(to.libvirtd, guest);
            rests(&from, &to, guest, &what, false) == Rest::There
        }
    };
    println!("{what}, left {left}: {}", said.stderr());
    guest.keeps_counting();
    guest.missed_no_number();
    if !left {
        wait_listed(alice, from.host, guest.name(), "running");
        let again = alice
            .rxm_call(from.host, ["migrate", guest.name(), &destination])
            .limit(Duration::from_secs(120))
            .run();
        if !again.is_success() {
            println!("{}", to.libvirtd.log_of(guest.name()));
        }
        again.success();
        guest.keeps_counting();
    }
}

/// What a mishap leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rest {
    /// The guest where it was.
    Here,
    /// The guest where it went.
    There,
    /// The guest where it was, and a domain without an emulator where it went.
    Phantom,
}

/// So long libvirt may take between writing down that it starts an emulator, and its process.
const STARTS_WITHIN: Duration = Duration::from_secs(10);

/// Waits until one emulator has the guest and the libvirts know it, or until there is a phantom, where there may be one.
#[track_caller]
fn rests(from: &Side<'_>, to: &Side<'_>, guest: &Guest, what: &str, may_haunt: bool) -> Rest {
    let what = format!("{what}: the guest runs on one host and is not on the other");
    let began = Instant::now();
    let mut seen = None;
    eventually(&what, Duration::from_secs(120), || {
        let both = [&from.libvirtd, &to.libvirtd];
        let emulators = both.map(|libvirtd| libvirtd.emulators_of(guest).len());
        let states = both.map(|libvirtd| libvirtd.state(guest.name()));
        let now = (emulators, states);
        if seen.as_ref() != Some(&now) {
            println!("{what}: {now:?}");
            seen = Some(now.clone());
        }
        let (emulators, states) = now;
        match (emulators, states.each_ref().map(String::as_str)) {
            ([1, 0], ["running", ""]) => Some(Rest::Here),
            ([0, 1], ["", "running"]) => Some(Rest::There),
            ([1, 0], ["running", "paused"]) if may_haunt && began.elapsed() > STARTS_WITHIN => {
                is_phantom(to.libvirtd, guest).then_some(Rest::Phantom)
            }
            _ => None,
        }
    })
}

/// Where libvirt writes down what it needs to find a guest again after its own end.
fn status_of(libvirtd: &Libvirtd, guest: &Guest) -> PathBuf {
    let status = format!("/run/libvirt/qemu/{}.xml", guest.name());
    libvirtd.cell().outside(&status)
}

/// Whether libvirt has the guest starting up without a process: libvirt 9.0 that is killed in that moment keeps it so for ever, also when it is
/// started once more, and its own `destroy` waits in vain.
fn is_phantom(libvirtd: &Libvirtd, guest: &Guest) -> bool {
    let status = std::fs::read_to_string(status_of(libvirtd, guest)).unwrap_or_default();
    status.contains("<domstatus state='paused' reason='starting up' pid='0'>")
        && libvirtd.emulators_of(guest).is_empty()
}

/// Whether a line of xmand's tells what docs/OPERATING.md quotes.
fn is_told_of_phantom(line: &str) -> bool {
    line.contains("what had arrived of it is still here") && line.contains("state change lock")
}

/// Does what docs/OPERATING.md tells an administrator who has a phantom.
#[track_caller]
fn lay_to_rest(libvirtd: &mut Libvirtd, guest: &Guest) {
    libvirtd.stop();
    std::fs::remove_file(status_of(libvirtd, guest)).unwrap();
    libvirtd.start();
}

#[test]
fn a_destinations_libvirt_that_ends_while_it_starts_the_guest_leaves_one_that_runs() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    for when in [When::Starting, When::Started, When::Percent(0)] {
        for _ in 0..2 {
            journey(&mut site, &guest, Mishap::DestinationLibvirtd, when);
        }
    }
    guest.missed_no_number();
}

#[test]
fn a_mishap_while_the_guest_changes_over_leaves_one_that_runs() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    for mishap in Mishap::ALL {
        journey(&mut site, &guest, mishap, When::ChangingOver);
    }
    guest.missed_no_number();
}

#[test]
fn a_mishap_once_the_source_has_the_guest_no_more_leaves_one_that_runs() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    for mishap in Mishap::ALL {
        journey(&mut site, &guest, mishap, When::Gone);
    }
    guest.missed_no_number();
}

#[test]
fn twenty_journeys_with_a_mishap_on_each_and_never_two_that_run_nor_a_number_missed() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    for number in 0..20 {
        let mishap = Mishap::ALL[number % Mishap::ALL.len()];
        let moment = [0, 5, 20, 35, 50, 65, 80, 90, 97, 99][number % 10];
        println!("journey {number}");
        journey(&mut site, &guest, mishap, When::Percent(moment));
    }
    guest.missed_no_number();
    for libvirtd in [&site.hosts.alpha, &site.hosts.beta] {
        let listening = xman_tests::run(
            {
                let mut ss = libvirtd.cell().command("ss");
                ss.args(["-H", "-l", "-t", "-n", "sport", "!=", "9626"]);
                ss
            },
            b"",
            Duration::from_secs(10),
        );
        let others: Vec<_> = listening
            .stdout()
            .lines()
            .filter(|line| !line.contains("127.0.0.1:"))
            .map(ToOwned::to_owned)
            .collect();
        assert!(others.is_empty(), "{others:?}");
    }
}

/// Begins to move the guest slowly, and returns once its memory is on the way.
#[track_caller]
fn under_way(site: &Site, name: &str, bandwidth: &str) -> xman_tests::Process {
    let words = ["migrate", name, "beta", "--bandwidth", bandwidth];
    let migration = site
        .alice
        .rxm_call(&site.alpha, words)
        .limit(Duration::from_secs(180))
        .spawn();
    eventually("it is under way", Duration::from_secs(60), || {
        percent(&site.alice, &site.alpha).filter(|far| *far > 0)
    });
    migration
}

#[test]
fn two_who_move_a_guest_at_once_move_it_once() {
    let site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    site.alice.rxm(&site.alpha, ["pause", "nomad"]).success();
    let mut both = [(); 2].map(|()| {
        site.alice
            .rxm_call(&site.alpha, ["migrate", "nomad", "beta"])
            .limit(Duration::from_secs(180))
            .spawn()
    });
    let ends = both
        .each_mut()
        .map(|rxm| rxm.wait(Duration::from_secs(180)));
    let moved = ends.iter().filter(|end| end.is_success()).count();
    assert_eq!(moved, 1, "{ends:?}");
    assert_eq!(site.hosts.alpha.state("nomad"), "");
    assert_eq!(site.hosts.beta.state("nomad"), "paused");
    site.wait_listed(&site.beta, "nomad", "paused");
    site.alice.rxm(&site.beta, ["unpause", "nomad"]).success();
    guest.keeps_counting();
    guest.missed_no_number();
}

#[test]
fn a_guest_that_ends_on_its_way_keeps_its_definition_and_comes_again() {
    let site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    let mut migration = under_way(&site, "nomad", "1MiB");
    // It is on its way: nothing that could make two of it is begun.
    let refused = site.alice.rxm(&site.alpha, ["save", "nomad"]).code(1);
    assert!(
        refused.stderr().contains("on its way to beta"),
        "{}",
        refused.stderr()
    );
    site.alice.rxm(&site.alpha, ["destroy", "nomad"]).success();
    let end = migration.wait(Duration::from_secs(120));
    assert!(!end.is_success(), "{end:?}");
    eventually("it is off at home", Duration::from_secs(60), || {
        let states = [&site.hosts.alpha, &site.hosts.beta].map(|host| host.state("nomad"));
        (states == ["shut off", ""]).then_some(())
    });
    eventually("it is settled", Duration::from_secs(60), || {
        site.alice
            .rxm(&site.alpha, ["start", "nomad"])
            .is_success()
            .then_some(())
    });
    guest.keeps_counting_anew();
    site.alice
        .rxm_call(&site.alpha, ["migrate", "nomad", "beta"])
        .limit(Duration::from_secs(120))
        .run()
        .success();
    site.wait_listed(&site.beta, "nomad", "running");
    site.alice.rxm(&site.beta, ["pause", "nomad"]).success();
    site.alice.rxm(&site.beta, ["unpause", "nomad"]).success();
    guest.keeps_counting();
}

#[test]
fn the_word_on_one_journey_never_falls_on_the_next() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    let mut migration = under_way(&site, "nomad", "1MiB");
    site.beta.kill9();
    let end = migration.wait(Duration::from_secs(120));
    assert!(end.stderr().contains("still runs here"), "{end:?}");
    // alpha says again and again that what has arrived goes, and beta does not hear it.
    site.alpha
        .stderr()
        .wait_for(Duration::from_secs(60), "has not heard yet where");
    site.beta.start();
    site.alice
        .rxm_call(&site.alpha, ["migrate", "nomad", "beta"])
        .limit(Duration::from_secs(120))
        .run()
        .success();
    guest.keeps_counting();
    guest.missed_no_number();
    assert_eq!(site.hosts.alpha.state("nomad"), "");
    assert_eq!(site.hosts.beta.state("nomad"), "running");
}

#[test]
fn a_guest_whose_source_is_lost_is_let_go_of_by_who_says_so_and_by_nobody_else() {
    let mut site = Site::new();
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    let mut migration = under_way(&site, "nomad", "1MiB");
    site.alpha.kill9();
    migration.kill();
    eventually("what has arrived is gone", Duration::from_secs(60), || {
        (site.hosts.beta.state("nomad").is_empty()).then_some(())
    });
    site.hosts.alpha.virsh(&["destroy", "nomad"]).success();
    site.hosts.beta.define(&guest);
    site.wait_listed(&site.beta, "nomad", "off");
    let refused = site.alice.rxm(&site.beta, ["start", "nomad"]).code(1);
    assert!(
        refused.stderr().contains("comes from alpha") && refused.stderr().contains("--force"),
        "{}",
        refused.stderr()
    );
    // It is off, and it is let go of.
    site.alice
        .rxm(&site.beta, ["unpause", "--force", "nomad"])
        .code(1);
    site.alice.rxm(&site.beta, ["start", "nomad"]).success();
    guest.keeps_counting_anew();
    site.beta
        .audit()
        .contains(&["verb=\"unpause\"", "alice@", "force"]);
}

#[test]
fn a_destination_without_room_for_its_memory_gives_no_permit() {
    let site = Site::new();
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap();
    let total = meminfo
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u32>()
        .unwrap();
    // All that the machine has: the kernel and the lab alone take more than is left.
    let mib = total / 1024 - 64;
    let guest = Guest::tiny("giant").memory(mib, mib);
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "giant", "running");
    let full = site
        .alice
        .rxm(&site.alpha, ["migrate", "giant", "beta"])
        .code(1);
    assert!(
        full.stderr().contains(&format!("{mib} MiB of memory"))
            && full.stderr().contains("MiB left"),
        "{}",
        full.stderr()
    );
    assert_eq!(site.hosts.alpha.state("giant"), "running");
    assert_eq!(site.hosts.beta.state("giant"), "");
}

#[test]
fn what_the_destination_cannot_run_stays_at_home() {
    let site = Site::new();
    // An emulator that is on one host alone, as a processor could be.
    let emulator = "/var/lib/libvirt/special-qemu";
    std::os::unix::fs::symlink(
        xman_tests::program("qemu-system-x86_64"),
        site.hosts.alpha.cell().outside(emulator),
    )
    .unwrap();
    let guest = Guest::traveller("homely").emulator(emulator);
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "homely", "running");
    let refused = site
        .alice
        .rxm_call(&site.alpha, ["migrate", "homely", "beta"])
        .limit(Duration::from_secs(120))
        .run()
        .code(1);
    assert!(
        refused.stderr().contains("still runs here") && refused.stderr().contains(emulator),
        "{}",
        refused.stderr()
    );
    guest.keeps_counting();
    guest.missed_no_number();
    eventually("nothing of it is there", Duration::from_secs(60), || {
        site.hosts.beta.state("homely").is_empty().then_some(())
    });
}

#[test]
fn a_guest_whose_cpu_the_destination_does_not_have_stays_at_home() {
    let site = Site::new();
    // Two hosts of one machine have one processor. What an emulated guest gets is its emulator's, and that of beta has no AES.
    let emulator = "/var/lib/libvirt/its-qemu";
    let real = xman_tests::program("qemu-system-x86_64");
    let [here, there] =
        [&site.hosts.alpha, &site.hosts.beta].map(|host| host.cell().outside(emulator));
    std::os::unix::fs::symlink(&real, here).unwrap();
    std::fs::write(
        &there,
        WITHOUT_AES.replace("REAL", &real.display().to_string()),
    )
    .unwrap();
    std::fs::set_permissions(&there, Permissions::from_mode(0o755)).unwrap();
    let guest = Guest::traveller("choosy").emulator(emulator).xml_extra(
        "<cpu mode='custom' match='exact' check='partial'>
           <model fallback='forbid'>qemu64</model><feature policy='require' name='aes'/>
         </cpu>",
    );
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "choosy", "running");
    let migrate = || {
        site.alice
            .rxm_call(&site.alpha, ["migrate", "choosy", "beta"])
            .limit(Duration::from_secs(120))
            .run()
    };
    let refused = migrate().code(1);
    let why = "guest CPU doesn't match specification: missing features: aes";
    assert!(
        refused.stderr().contains("still runs here") && refused.stderr().contains(why),
        "{}",
        refused.stderr()
    );
    guest.keeps_counting();
    guest.missed_no_number();
    eventually("nothing of it is there", Duration::from_secs(60), || {
        let is_gone = site.hosts.beta.state("choosy").is_empty();
        (is_gone && site.hosts.beta.emulators_of(&guest).is_empty()).then_some(())
    });
    let jobs = site
        .alice
        .rxm(&site.alpha, ["-o", "json", "job", "list"])
        .success()
        .json();
    assert_eq!(jobs[0]["state"], "failed", "{jobs}");
    assert!(jobs[0]["result"].as_str().unwrap().contains(why), "{jobs}");
    // Nothing else was in its way, and nothing of the failure is.
    std::fs::remove_file(&there).unwrap();
    std::os::unix::fs::symlink(&real, &there).unwrap();
    migrate().success();
    assert_eq!(site.hosts.alpha.state("choosy"), "");
    assert_eq!(site.hosts.beta.state("choosy"), "running");
    guest.keeps_counting();
    guest.missed_no_number();
}

/// QEMU that emulates no processor with AES.
const WITHOUT_AES: &str = r#"#!/bin/sh
for word; do
    shift
    if [ "$last" = -cpu ]; then set -- "$@" "$word,aes=off"; else set -- "$@" "$word"; fi
    last=$word
done
exec REAL "$@"
"#;

#[test]
fn a_journey_outlasts_the_tickets_of_the_person_and_of_the_host() {
    let brief = Duration::from_secs(12);
    let site = Site::new();
    site.realm.admin("modprinc -maxlife 12seconds xman/alpha");
    let guest = Guest::traveller("nomad");
    site.hosts.alpha.run(&guest);
    site.wait_listed(&site.alpha, "nomad", "running");
    // One that writes nothing is done after one pass, however slow.
    site.alice.rxm(&site.alpha, ["pause", "nomad"]).success();
    site.alice.kinit_for(brief);
    let began = Instant::now();
    let mut migration = under_way(&site, "nomad", "3MiB");
    let end = migration.wait(Duration::from_secs(120));
    assert_eq!(end.exit_code(), 4, "{end:?}");
    eventually("it has moved", Duration::from_secs(180), || {
        let states = [&site.hosts.alpha, &site.hosts.beta].map(|host| host.state("nomad"));
        assert!(
            !site.alpha.stderr().text().contains("connection has ended"),
            "{}",
            site.alpha.stderr().text()
        );
        (states == ["", "paused"]).then_some(())
    });
    assert!(
        began.elapsed() > 2 * brief,
        "the tickets would have sufficed: {:?}",
        began.elapsed()
    );
    site.hosts.beta.virsh(&["resume", "nomad"]).success();
    guest.keeps_counting();
    guest.missed_no_number();
}
