//! A job begins in one domain and another gives way; the job ends and the other comes back.

use std::time::Duration;

use serde_json::{Value, json};
use xman_tests::{Guest, Host, HostBuilder, Libvirtd, Outcome, PATIENCE, Realm, User, eventually};

/// Longer than anything takes here, also on a busy machine.
pub(crate) const LONG: Duration = Duration::from_secs(240);

/// A host with one CPU for jobs, where what is called `low-*` gives way to what is called `high-*`.
pub(crate) struct Farm {
    pub(crate) libvirtd: Libvirtd,
    pub(crate) host: Host,
    pub(crate) admin: User,
    pub(crate) slurm: User,
}

impl Farm {
    /// Runs guests on a host whose lower class gives way like this.
    #[track_caller]
    pub(crate) fn new(preempt: &str, guests: &[&Guest]) -> Self {
        Self::with(preempt, "1GiB", guests, |host| host)
    }

    #[track_caller]
    pub(crate) fn with(
        preempt: &str,
        reserve: &str,
        guests: &[&Guest],
        configure: impl FnOnce(HostBuilder) -> HostBuilder,
    ) -> Self {
        let realm = Realm::shared();
        let libvirtd = Libvirtd::with_cpu_groups();
        for guest in guests {
            libvirtd.run(guest);
        }
        let cpus = libvirtd.virsh(&["nodeinfo"]).success().stdout();
        let line = cpus.lines().find_map(|line| line.strip_prefix("CPU(s):"));
        let cpus: u32 = line.unwrap().trim().parse().unwrap();
        let rules = format!(
            r#"
            [schedule]
            reserve-cpus = {}
            reserve-memory = "{reserve}"
            min-run = "1ms"
            [schedule.class.low]
            domains = ["low-*"]
            rank = 10
            preempt = "{preempt}"
            floor = "128MiB"
            [schedule.class.high]
            domains = ["high-*"]
            rank = 20
            preempt = "never"
            [schedule.system.slurm]
            principals = ["slurm/*@XMAN.TEST"]
            nodes = ["host/{{domain}}@XMAN.TEST"]
            domains = ["low-*", "high-*"]
            [schedule.system.pbs]
            principals = ["pbs/*@XMAN.TEST"]
            domains = ["pbs-*"]
            "#,
            cpus - 1
        );
        let builder = Host::builder()
            .k5login(["root/admin@XMAN.TEST"])
            .config_extra(&rules);
        let host = configure(builder).beside(&libvirtd).start(realm);
        let farm = Self {
            admin: realm.user("root/admin"),
            slurm: realm.user("slurm/farm"),
            host,
            libvirtd,
        };
        eventually("xmand has read libvirt", PATIENCE, || {
            let names = farm.admin.rxm(&farm.host, ["-o", "name", "list"]).stdout();
            let mut guests = guests.iter();
            guests
                .all(|guest| names.contains(guest.name()))
                .then_some(())
        });
        farm
    }

    #[track_caller]
    pub(crate) fn says(&self, user: &User, words: &[&str]) -> Outcome {
        user.rxm_call(&self.host, words).limit(LONG).run()
    }

    #[track_caller]
    pub(crate) fn begins(&self, key: &str, domain: &str) -> Outcome {
        self.says(
            &self.slurm,
            &["lease", "begin", key, domain, "--timeout", "120s"],
        )
    }

    #[track_caller]
    pub(crate) fn ends(&self, key: &str) {
        self.says(&self.slurm, &["lease", "end", key]).success();
    }

    #[track_caller]
    pub(crate) fn status(&self, domain: &str) -> Value {
        let rows = self
            .says(&self.admin, &["-o", "json", "status", domain])
            .json();
        let rows = rows.as_array().unwrap().clone();
        let row = rows.iter().find(|row| row["name"] == domain);
        row.unwrap_or_else(|| panic!("no status of {domain}: {rows:?}"))
            .clone()
    }

    fn stands(&self, domain: &str) -> String {
        self.status(domain)["standing"].as_str().unwrap().to_owned()
    }

    #[track_caller]
    pub(crate) fn wait_standing(&self, domain: &str, standing: &str) {
        eventually(&format!("'{domain}' is {standing}"), LONG, || {
            (self.stands(domain) == standing).then_some(())
        });
    }

    /// Leaves libvirt's folder of images next to no room.
    #[track_caller]
    pub(crate) fn small_save_folder(&self) {
        let folder = "/var/lib/libvirt/qemu/save";
        let mut mount = self.libvirtd.cell().command("mount");
        mount.args(["-t", "tmpfs", "-o", "size=8m", "none", folder]);
        let mounted = mount.status().unwrap();
        assert!(mounted.success());
    }

    /// libvirt's bound on a domain's CPU time; -1 is none.
    pub(crate) fn quota(&self, domain: &str) -> i64 {
        let info = self
            .libvirtd
            .virsh(&["schedinfo", domain])
            .success()
            .stdout();
        let line = info.lines().find(|line| line.starts_with("global_quota"));
        let value = line.and_then(|line| line.split(':').nth(1)).unwrap();
        match value.trim().parse::<u64>().map(u64::cast_signed) {
            Ok(17_592_186_044_415) => -1,
            Ok(quota) => quota,
            Err(_) => value.trim().parse().unwrap(),
        }
    }
}

#[test]
fn a_better_job_starves_another_which_lives_on_and_has_all_back_when_it_ends() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let farm = Farm::new("starve", &[&low, &high]);
    low.wait_until_up();
    assert_eq!(farm.stands("low-a"), "free");
    farm.begins("slurm/lab/1/0", "low-a").success();
    assert_eq!(farm.stands("low-a"), "running-preemptible");
    assert_eq!(farm.stands("high-b"), "occupied-would-preempt");
    assert_eq!(farm.quota("low-a"), -1);

    farm.begins("slurm/lab/2/0", "high-b").success();
    assert_eq!(farm.stands("high-b"), "running");
    let row = farm.status("low-a");
    assert_eq!(row["standing"], "preempted", "{row}");
    assert_eq!(row["depth"], "starve", "{row}");
    assert_eq!(row["holds"][0]["lease"], "slurm/lab/2/0", "{row}");
    assert!(farm.quota("low-a") > 0);
    low.keeps_counting();

    farm.ends("slurm/lab/2/0");
    farm.wait_standing("low-a", "running-preemptible");
    assert_eq!(farm.quota("low-a"), -1);
    low.keeps_counting();
    low.missed_no_number();
    assert!(farm.status("low-a")["preempted_ms"].as_u64().unwrap() > 0);
    farm.ends("slurm/lab/1/0");
    farm.wait_standing("low-a", "free");
}

#[test]
fn a_better_job_pauses_another_whose_count_is_unbroken() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let farm = Farm::new("pause", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    low.stands_still();
    farm.ends("slurm/lab/2/0");
    farm.libvirtd.wait_state("low-a", "running");
    low.keeps_counting();
    low.missed_no_number();
}

#[test]
fn a_better_job_freezes_another_and_it_comes_back_from_its_image() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let farm = Farm::new("freeze", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    farm.wait_standing("low-a", "frozen");
    assert_eq!(farm.libvirtd.state("low-a"), "shut off");
    farm.ends("slurm/lab/2/0");
    farm.wait_standing("low-a", "running-preemptible");
    low.keeps_counting();
    low.missed_no_number();
    assert_eq!(farm.libvirtd.state("low-a"), "running");
}

#[test]
fn a_better_job_shrinks_another_and_it_gets_its_memory_back() {
    let low = Guest::booted("low-a").memory(256, 256);
    let high = Guest::booted("high-b");
    let farm = Farm::new("shrink", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    let now = || {
        let rows = farm
            .says(&farm.admin, &["-o", "json", "list", "low-a"])
            .json();
        rows[0]["memory_kib"].as_u64().unwrap()
    };
    assert!(now() <= 136 * 1024, "{}", now());
    farm.ends("slurm/lab/2/0");
    farm.wait_standing("low-a", "running-preemptible");
    eventually("the guest has its memory back", LONG, || {
        (now() == 256 * 1024).then_some(())
    });
    low.keeps_counting();
    low.missed_no_number();
}

#[test]
fn a_lease_begun_twice_is_one_and_an_older_run_ends_no_newer_one() {
    let low = Guest::tiny("low-a");
    let farm = Farm::new("pause", &[&low]);
    farm.begins("slurm/lab/1/1", "low-a").success();
    farm.begins("slurm/lab/1/1", "low-a").success();
    let leases = || {
        let rows = farm
            .says(&farm.slurm, &["-o", "json", "lease", "list"])
            .json();
        let rows = rows.as_array().unwrap().clone();
        rows.iter()
            .map(|row| row["lease"].as_str().unwrap().to_owned())
            .collect::<Vec<_>>()
    };
    assert_eq!(leases(), ["slurm/lab/1/1"]);
    let late = farm.begins("slurm/lab/1/0", "low-a");
    late.code(1).complains("slurm/lab/1/1");
    farm.ends("slurm/lab/1/0");
    assert_eq!(leases(), ["slurm/lab/1/1"]);
    farm.begins("slurm/lab/1/2", "low-a").success();
    assert_eq!(leases(), ["slurm/lab/1/2"]);
    farm.ends("slurm/lab/1/7");
    assert!(leases().is_empty());
    let late = farm.begins("slurm/lab/1/6", "low-a");
    late.code(1).complains("has ended already");
    farm.ends("slurm/lab/never-there/0");
}

#[test]
fn nobody_gets_around_a_hold() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    for words in [
        &["unpause", "low-a"][..],
        &["mem-set", "low-a", "16MiB"],
        &["vcpu-set", "low-a", "1"],
        &["class", "low-a", "high"],
    ] {
        let refused = farm.says(&farm.admin, words);
        refused.code(1).complains("slurm/lab/2/0");
    }
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    // Somebody does it by hand, past xmand.
    farm.libvirtd.virsh(&["resume", "low-a"]).success();
    farm.libvirtd.wait_state("low-a", "paused");
    farm.ends("slurm/lab/2/0");
    farm.libvirtd.wait_state("low-a", "running");
}

#[test]
fn what_an_administrator_paused_is_not_resumed_by_a_jobs_end() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.says(&farm.admin, &["pause", "low-a"]).success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    farm.ends("slurm/lab/2/0");
    farm.wait_standing("low-a", "running-preemptible");
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    farm.says(&farm.admin, &["unpause", "low-a"]).success();
    assert_eq!(farm.libvirtd.state("low-a"), "running");
}

#[test]
fn an_xmand_that_is_killed_in_the_middle_goes_on_where_it_was() {
    let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
    let mut farm = Farm::new("pause", &[&low, &high]);
    low.wait_until_up();
    farm.begins("slurm/lab/1/0", "low-a").success();
    let begun = farm.says(
        &farm.slurm,
        &["lease", "begin", "slurm/lab/2/0", "high-b", "--no-wait"],
    );
    begun.success();
    farm.host.kill9();
    farm.host.start();
    farm.libvirtd.wait_state("low-a", "paused");
    farm.begins("slurm/lab/2/0", "high-b").success();
    farm.host.kill9();
    farm.host.start();
    farm.ends("slurm/lab/2/0");
    farm.host.kill9();
    farm.host.start();
    farm.libvirtd.wait_state("low-a", "running");
    low.keeps_counting();
    low.missed_no_number();
    assert_eq!(farm.stands("low-a"), "running-preemptible");
}

#[test]
fn no_system_speaks_for_anothers_jobs_and_no_node_for_anothers_domain() {
    let (low, other) = (Guest::tiny("low-a"), Guest::tiny("low-b"));
    let farm = Farm::new("pause", &[&low, &other]);
    let realm = Realm::shared();
    let begin =
        |user: &User, key: &str, domain: &str| farm.says(user, &["lease", "begin", key, domain]);
    begin(&farm.slurm, "pbs/lab/1/0", "low-a").code(1);
    begin(&realm.user("pbs/farm"), "pbs/lab/1/0", "low-a").code(1);
    let node = realm.user("host/low-a");
    begin(&node, "slurm/lab/2/0", "low-b").code(1);
    begin(&farm.slurm, "slurm/lab/3/0", "low-b").success();
    farm.says(&node, &["lease", "end", "slurm/lab/3/0"]).code(1);
    farm.ends("slurm/lab/3/0");
    begin(&node, "slurm/lab/1/0", "low-a").success();
    farm.says(&node, &["lease", "end", "slurm/lab/1/0"])
        .success();
    let eve = realm.user("eve");
    for words in [
        &["lease", "begin", "slurm/lab/1/0", "low-a"][..],
        &["lease", "end", "slurm/lab/1/0"],
        &["preempt", "low-a", "--depth", "pause"],
        &["maintenance", "on", "--reason", "mine"],
    ] {
        farm.says(&eve, words).code(1);
    }
}

#[test]
fn a_person_holds_a_domain_back_and_lets_go_of_what_is_his_own() {
    let low = Guest::tiny("low-a");
    let farm = Farm::new("pause", &[&low]);
    farm.says(&farm.admin, &["preempt", "low-a", "--reason", "cleaning"])
        .success();
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    let refused = farm.begins("slurm/lab/1/0", "low-a");
    refused.code(1).complains("root/admin@XMAN.TEST");
    farm.says(&farm.slurm, &["resume", "low-a"]).success();
    assert_eq!(farm.libvirtd.state("low-a"), "paused");
    farm.says(&farm.admin, &["resume", "low-a"]).success();
    assert_eq!(farm.libvirtd.state("low-a"), "running");
    farm.says(&farm.admin, &["freeze", "low-a"]).success();
    assert_eq!(farm.libvirtd.state("low-a"), "shut off");
    assert_eq!(farm.stands("low-a"), "frozen");
    let refused = farm.says(&farm.admin, &["start", "low-a"]);
    refused.code(1);
    farm.says(&farm.admin, &["thaw", "low-a"]).success();
    assert_eq!(farm.libvirtd.state("low-a"), "running");
}

#[test]
fn a_host_in_maintenance_takes_nothing_new() {
    let (low, off) = (Guest::tiny("low-a"), Guest::tiny("low-b"));
    let farm = Farm::new("pause", &[&low]);
    farm.libvirtd.define(&off);
    farm.says(&farm.admin, &["maintenance", "on", "--reason", "new disks"])
        .success();
    let refused = farm.begins("slurm/lab/1/0", "low-a");
    refused.code(1).complains("new disks");
    let refused = farm.says(&farm.admin, &["start", "low-b"]);
    refused.code(1).complains("new disks");
    farm.says(&farm.admin, &["maintenance", "off"]).success();
    farm.begins("slurm/lab/1/0", "low-a").success();
}

#[test]
fn a_reconciliation_ends_what_the_batch_system_has_no_more() {
    let (low, high) = (Guest::tiny("low-a"), Guest::tiny("high-b"));
    let farm = Farm::new("pause", &[&low, &high]);
    farm.begins("slurm/lab/1/0", "low-a").success();
    farm.begins("slurm/lab/2/0", "high-b").success();
    let list = xman_tests::Scratch::new("jobs");
    let path = list.path().join("running");
    std::fs::write(&path, "1 0\n").unwrap();
    let path = path.to_str().unwrap();
    farm.says(
        &farm.slurm,
        &["reconcile", "slurm/lab", path, "--age", "1ms"],
    )
    .success();
    farm.libvirtd.wait_state("low-a", "running");
    let rows = farm
        .says(&farm.slurm, &["-o", "json", "lease", "list"])
        .json();
    assert_eq!(rows.as_array().unwrap().len(), 1, "{rows}");
    assert_eq!(rows[0]["lease"], json!("slurm/lab/1/0"));
}
