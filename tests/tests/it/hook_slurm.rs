//! `xman-hook slurm watch` under a real Slurm, whose nodes are real guests: Slurm has no hook for a job that it suspends.

use std::{fmt::Write as _, fs, path::Path, time::Duration};

use xman_tests::{
    Host, Node, PATIENCE, Process, Realm, Scratch, Site, Slurm, built, command, eventually, run,
};

/// More than a job of these tests ever counts to.
const FOR_EVER: u32 = 1_000_000;
/// Booting, preempting and scheduling on a busy machine.
const LONG: Duration = Duration::from_secs(240);

fn cpus() -> u32 {
    let said = run(command("nproc"), b"", PATIENCE).success().stdout();
    said.trim().parse().unwrap()
}

fn script(config: &Path, hook: &str) -> String {
    format!(
        "#!/bin/sh\nexec {} --config {} slurm {hook}\n",
        built("xman-hook").display(),
        config.display()
    )
}

/// Two nodes on one machine that has room for one: what runs in grid1 gives way to what runs in grid2.
struct Farm {
    site: Site,
    slurm: Slurm,
    _host: Host,
    _watch: Process,
    _scratch: Scratch,
}

impl Farm {
    fn new() -> Self {
        let realm = Realm::shared();
        let site = Site::new(realm);
        let host = Host::builder()
            .beside(&site.alpha)
            .k5login(["alice"])
            .config_extra(&format!(
                r#"
                [schedule]
                reserve-cpus = {}
                reserve-memory = "64MiB"
                min-run = "1s"
                [schedule.class.low]
                domains = ["grid1"]
                rank = 10
                preempt = "pause"
                [schedule.class.high]
                domains = ["grid2"]
                rank = 20
                preempt = "never"
                [schedule.system.slurm]
                principals = ["slurm/*@XMAN.TEST"]
                domains = ["grid*"]
                "#,
                cpus() - 1
            ))
            .start(realm);
        let scratch = Scratch::new("hook");
        let mut text = format!(
            "system = \"slurm\"\ncluster = \"lab\"\nkeytab = \"{}\"\nkrb5-conf = \"{}\"\nuser-realm = \"{}\"\nqueue-dir = \"{}\"\n\
             [[map]]\nnodes = \"grid[1-2]\"\nhost = \"{}\"\ndomain = \"{{node}}\"\n",
            realm.keytab(&["slurm/ctl"]).display(),
            realm.krb5_conf().display(),
            realm.name(),
            scratch.path().join("queue").display(),
            host.target(),
        );
        let config = scratch.write("hook.toml", &text);
        let slurm = Slurm::builder()
            .slurmd_timeout(0)
            .config(
                "HealthCheckProgram=/bin/true\nHealthCheckInterval=5\nHealthCheckNodeState=ANY\nAuthInfo=cred_expire=15",
            )
            .hook_at_desk("PrologSlurmctld", &script(&config, "prolog-controller"))
            .hook_at_desk("EpilogSlurmctld", &script(&config, "epilog-controller"))
            .node(Node::new("grid1"))
            .node(Node::new("grid2"))
            .start(&site);
        let _ = write!(
            text,
            "[slurm]\nconf = \"{}\"\ninterval = \"1s\"\ndown-after = \"10s\"\n",
            slurm.conf().display()
        );
        fs::write(&config, text).unwrap();
        let mut watch = site.desk().command_bare(&built("xman-hook"));
        watch.arg("--config").arg(&config).args(["slurm", "watch"]);
        let watch = Process::start(watch);
        watch
            .stderr()
            .wait_for(PATIENCE, "follows the cluster 'lab'");
        Self {
            site,
            slurm,
            _host: host,
            _watch: watch,
            _scratch: scratch,
        }
    }

    fn guest_state(&self, name: &str) -> String {
        self.site
            .alpha
            .virsh(&["domstate", name])
            .success()
            .stdout()
            .trim()
            .to_owned()
    }

    fn wait_guest(&self, name: &str, state: &str) {
        eventually(&format!("{name} is {state}"), LONG, || {
            (self.guest_state(name) == state).then_some(())
        });
    }
}

#[test]
fn a_job_that_slurm_suspends_lets_its_domain_give_way_until_it_goes_on() {
    let farm = Farm::new();
    let job = farm.slurm.count_on("grid1", "low", FOR_EVER);
    farm.slurm.wait_job(job, "RUNNING", LONG);
    farm.slurm.node("grid1").guest().keeps_counting();
    farm.slurm
        .scontrol(&["suspend", &job.to_string()])
        .success();
    farm.wait_guest("grid1", "paused");
    farm.slurm.scontrol(&["resume", &job.to_string()]).success();
    farm.wait_guest("grid1", "running");
    farm.slurm.node("grid1").guest().keeps_counting();
    farm.slurm.node("grid1").guest().missed_no_number();
    assert_eq!(farm.slurm.job(job, "Restarts"), "0");
}
