//! Real batch systems make room for a job by `xman-hook`: a domain gives way for longer than its batch system waits for silent nodes, comes back, and its
//! own job ends as if nothing had been.
//!
//! ```text
//! desk                        alpha                    high-b                 low-a
//! slurmctld: a better job
//!   prolog-controller ──────> lease begin ───────────────────────────────────> starved, paused, frozen
//!   <──────────────────────── granted
//!   the job ───────────────────────────────────────> slurm prolog; it runs
//!   slurm watch ────────────> status: low-a is away
//!     scontrol suspend
//!   epilog-controller ──────> lease end ──────────────────────────────────────> back
//!     scontrol resume
//! ```

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::Value;
use xman_tests::{
    GridEngine, Guest, Host, HostBuilder, Libvirtd, Node, Outcome, PATIENCE, Process, Realm,
    Records as _, Scratch, Site, Slurm, SlurmBuilder, Syslog, User, bare_command, built, command,
    eventually, run,
};

/// Longer than any of these stories lasts, also on a busy machine.
const LONG: Duration = Duration::from_secs(300);
/// After so long a silent node is called lost here: by Slurm itself, or by `slurm watch` where Slurm is told to wait for ever.
const TIMEOUT: u32 = 10;
/// So long a domain gives way at least. Slurm calls a node down some 20 s after it fell silent when its time-out is [`TIMEOUT`].
const BEYOND: Duration = Duration::from_secs(35);
/// The better job counts so far: ten numbers a second at most.
const HIGH: u32 = 380;
/// The other job counts so far: longer than it has before the better one begins.
const LOW: u32 = 400;
/// A starved job, which goes on counting, counts so far: longer than the better one.
const STARVED: u32 = 900;
/// And under Grid Engine. Its prolog runs in the better job's own guest, which starves until then, having no job: it takes most of a minute.
const IN_GRID: u32 = 1100;

/// What Slurm needs for nodes that are paused or frozen, by docs/batch/slurm.md; only that here a node's silence is found out sooner.
const WAITS: &str = "HealthCheckProgram=/bin/true\nHealthCheckInterval=5\nHealthCheckNodeState=ANY";

/// A Slurm whose jobs make room for themselves.
struct Story {
    host: Host,
    slurm: Slurm,
    /// So far the lower job counts.
    low: u32,
    watch: Process,
    admin: User,
    scratch: Scratch,
    _syslog: Syslog,
    site: Site,
}

/// A host with one CPU for jobs, where what is called `low-*` gives way like this to what is called `high-*`.
fn one_cpu(libvirtd: &Libvirtd, system: &str, preempt: &str) -> HostBuilder {
    let nodeinfo = libvirtd.virsh(&["nodeinfo"]).success().stdout();
    let line = nodeinfo
        .lines()
        .find_map(|line| line.strip_prefix("CPU(s):"));
    let cpus: u32 = line.unwrap().trim().parse().unwrap();
    let rules = format!(
        r#"
        [schedule]
        reserve-cpus = {}
        reserve-memory = "1GiB"
        min-run = "1ms"
        [schedule.class.low]
        domains = ["low-*"]
        rank = 10
        preempt = "{preempt}"
        [schedule.class.high]
        domains = ["high-*"]
        rank = 20
        preempt = "never"
        [schedule.system.{system}]
        principals = ["{system}/*@XMAN.TEST"]
        nodes = ["host/{{domain}}.xman.test@XMAN.TEST"]
        domains = ["low-*", "high-*"]
        "#,
        cpus - Site::CPUS
    );
    Host::builder()
        .k5login(["root/admin@XMAN.TEST"])
        .config_extra(&rules)
        .beside(libvirtd)
}

/// hook.toml of a machine, by deploy/hook.toml.
fn hook_toml(system: &str, host: &Host, files: &[(&str, &str)], more: &str) -> String {
    let mut text =
        format!("system = \"{system}\"\ncluster = \"lab\"\nuser-realm = \"XMAN.TEST\"\n");
    for (key, path) in files {
        text.push_str(&format!("{key} = \"{path}\"\n"));
    }
    for node in ["low-a", "high-b"] {
        text.push_str(&format!(
            "[[map]]\nnodes = \"{node}\"\nhost = \"{}\"\ndomain = \"{{node}}\"\n",
            host.target()
        ));
    }
    text + more
}

/// A node that has xman-hook, its configuration and the node's key.
fn node(name: &str, system: &str, host: &Host) -> Node {
    let realm = Realm::shared();
    let key = realm.keytab(&[&format!("host/{name}.xman.test")]);
    let config = hook_toml(system, host, &[("keytab", "/etc/xman/hook.keytab")], "");
    Node::new(name)
        .program(&built("xman-hook"), "/usr/local/sbin/xman-hook")
        .file("/etc/xman/hook.toml", 0o644, config)
        .file("/etc/xman/hook.keytab", 0o400, fs::read(key).unwrap())
}

impl Story {
    #[track_caller]
    fn new(preempt: &str, configure: impl FnOnce(SlurmBuilder) -> SlurmBuilder) -> Self {
        let realm = Realm::shared();
        let site = Site::new(realm);
        let host = one_cpu(&site.alpha, "slurm", preempt).start(realm);
        let (scratch, syslog) = (Scratch::new("hook"), Syslog::new());
        let config = scratch.path().join("hook.toml");
        let at_desk = |hook: &str| {
            format!(
                "#!/bin/sh\nexec {} --config {} slurm {hook}\n",
                built("xman-hook").display(),
                config.display()
            )
        };
        let in_node =
            |hook: &str| format!("#!/bin/sh\nexec /usr/local/sbin/xman-hook slurm {hook}\n");
        let builder = Slurm::builder()
            .node(node("low-a", "slurm", &host))
            .node(node("high-b", "slurm", &host))
            .hook_at_desk("PrologSlurmctld", &at_desk("prolog-controller"))
            .hook_at_desk("EpilogSlurmctld", &at_desk("epilog-controller"))
            .hook_in_nodes("Prolog", &in_node("prolog"))
            .hook_in_nodes("Epilog", &in_node("epilog"));
        let slurm = configure(builder).start(&site);
        let paths = [
            ("keytab", realm.keytab(&["slurm/ctl"])),
            ("krb5-conf", realm.krb5_conf()),
            ("queue-dir", scratch.path().join("queue")),
            ("syslog", syslog.path()),
        ];
        let paths = paths.map(|(key, path)| (key, path.display().to_string()));
        let paths: Vec<_> = paths
            .iter()
            .map(|(key, path)| (*key, path.as_str()))
            .collect();
        let more = format!(
            "[slurm]\nconf = \"{}\"\ninterval = \"1s\"\ndown-after = \"{TIMEOUT}s\"\n",
            slurm.conf().display()
        );
        scratch.write("hook.toml", hook_toml("slurm", &host, &paths, &more));
        let hook = |words: &[&str]| {
            let mut command = site.desk().command_bare(&built("xman-hook"));
            command.arg("--config").arg(&config).args(words);
            command
        };
        run(hook(&["check"]), b"", PATIENCE).success();
        let watch = Process::start(hook(&["slurm", "watch"]));
        watch
            .stderr()
            .wait_for(PATIENCE, "follows the cluster 'lab'");
        Self {
            admin: realm.user("root/admin"),
            host,
            slurm,
            low: if preempt == "starve" { STARVED } else { LOW },
            watch,
            scratch,
            _syslog: syslog,
            site,
        }
    }

    /// Slurm has its own time-out, as short as can be.
    #[track_caller]
    fn with_timeout(preempt: &str) -> Self {
        Self::new(preempt, |slurm| slurm.slurmd_timeout(TIMEOUT))
    }

    /// Slurm waits for ever, and `slurm watch` says which silent nodes are lost.
    #[track_caller]
    fn watched(preempt: &str) -> Self {
        Self::new(preempt, |slurm| slurm.slurmd_timeout(0).config(WAITS))
    }

    #[track_caller]
    fn status(&self, domain: &str) -> Value {
        status(&self.admin, &self.host, domain)
    }

    /// What to show when something is not as it should be.
    fn said(&self) -> String {
        format!(
            "slurmctld said\n{}\nslurm watch said\n{}",
            self.slurm.log(),
            self.watch.stderr().text()
        )
    }

    /// Requires that neither of the jobs was put back and that Slurm has given up no node.
    #[track_caller]
    fn is_well(&self, jobs: &[u32]) {
        for job in jobs {
            let (state, restarts) = (self.slurm.job_state(*job), self.slurm.job(*job, "Restarts"));
            assert!(
                [
                    "PENDING",
                    "CONFIGURING",
                    "RUNNING",
                    "SUSPENDED",
                    "COMPLETING",
                    "COMPLETED"
                ]
                .contains(&state.as_str())
                    && restarts == "0",
                "job {job} is {state} after {restarts} restarts; {}",
                self.said()
            );
        }
        for node in ["low-a", "high-b"] {
            let state = self.slurm.node_state(node);
            assert!(
                !state.contains("DOWN") && !state.contains("DRAIN") && !state.contains("FAIL"),
                "{node} is {state}; {}",
                self.said()
            );
        }
    }

    /// Submits the lower job and waits until it counts.
    #[track_caller]
    fn begin_low(&self) -> u32 {
        let job = self.slurm.count_on("low-a", "low", self.low);
        self.slurm.wait_job(job, "RUNNING", PATIENCE);
        self.slurm.node("low-a").guest().keeps_counting();
        assert_eq!(self.status("low-a")["standing"], "running-preemptible");
        job
    }

    /// Submits the better job and waits until it counts: then the other has given way.
    #[track_caller]
    fn begin_high(&self, low: u32, standing: &str, depth: &str) -> u32 {
        let job = self.slurm.count_on("high-b", "high", HIGH);
        let guest = self.slurm.node("high-b").guest();
        eventually("the better job counts", LONG, || {
            self.is_well(&[low, job]);
            (guest.count() > 0).then_some(())
        });
        let row = self.status("low-a");
        assert_eq!(row["depth"], depth, "{row}");
        assert_eq!(
            row["holds"][0]["lease"],
            format!("slurm/lab/{job}/0"),
            "{row}"
        );
        eventually(&format!("low-a is {standing}"), LONG, || {
            (self.status("low-a")["standing"] == standing).then_some(())
        });
        job
    }

    /// Waits until a job has ended well, and all is well the whole time.
    #[track_caller]
    fn ends(&self, job: u32, jobs: &[u32]) {
        let begun = Instant::now();
        while self.slurm.job_state(job) != "COMPLETED" {
            self.is_well(jobs);
            assert!(
                begun.elapsed() < LONG,
                "job {job} is {}; {}",
                self.slurm.job_state(job),
                self.said()
            );
            std::thread::sleep(Duration::from_millis(200));
        }
        self.is_well(jobs);
    }

    /// Requires that both jobs ran from the first number to the last, and that nothing is left of them anywhere.
    #[track_caller]
    fn all_is_as_before(&self, low: u32, high: u32) {
        self.ends(low, &[low, high]);
        for (name, last) in [("low-a", self.low), ("high-b", HIGH)] {
            let guest = self.slurm.node(name).guest();
            eventually(
                &format!("{name} has said its last number"),
                PATIENCE,
                || (guest.count() == u64::from(last)).then_some(()),
            );
            guest.missed_no_number();
            eventually(
                &format!("{name} is idle; {}", self.said()),
                PATIENCE,
                || (self.slurm.node_state(name) == "IDLE").then_some(()),
            );
            eventually(&format!("{name} is free"), PATIENCE, || {
                (self.status(name)["standing"] == "free").then_some(())
            });
            assert_eq!(self.status(name)["holds"].as_array().unwrap().len(), 0);
            assert_eq!(self.site.alpha.state(name), "running");
        }
        let suspended = fs::read_dir(self.scratch.path().join("queue/suspended"));
        assert_eq!(suspended.map_or(0, Iterator::count), 0);
        nothing_is_left(&self.admin, &self.host);
    }
}

/// How a domain stands, by xmand.
#[track_caller]
fn status(admin: &User, host: &Host, domain: &str) -> Value {
    let rows = admin.rxm_call(host, ["-o", "json", "status", domain]).run();
    let rows = rows.success().json();
    let row = rows
        .as_array()
        .unwrap()
        .iter()
        .find(|row| row["name"] == domain);
    row.unwrap_or_else(|| panic!("no status of {domain}: {rows}"))
        .clone()
}

/// Requires that the host has no lease any more, and nothing to complain about.
#[track_caller]
fn nothing_is_left(admin: &User, host: &Host) {
    let leases = admin.rxm_call(host, ["-o", "json", "lease", "list"]).run();
    let leases = leases.success().json();
    assert_eq!(leases.as_array().unwrap().len(), 0, "{leases}");
    let checked = host.check().success();
    let said = format!("{}{}", checked.stdout(), checked.stderr());
    for word in ["error", "warning", "WRONG"] {
        assert!(!said.contains(word), "{said}");
    }
}

#[test]
fn slurm_starves_a_domain_for_a_better_job_and_its_own_counts_on() {
    let story = Story::with_timeout("starve");
    let low = story.begin_low();
    let high = story.begin_high(low, "preempted", "starve");
    let since = Instant::now();
    // A trickle is enough to count, and to answer Slurm.
    story.slurm.node("low-a").guest().keeps_counting();
    story.ends(high, &[low, high]);
    assert!(since.elapsed() > BEYOND, "{:?}", since.elapsed());
    assert_eq!(story.slurm.job_state(low), "RUNNING", "{}", story.said());
    story.all_is_as_before(low, high);
}

#[test]
fn slurm_pauses_a_domain_for_longer_than_a_node_may_be_silent_and_loses_nothing() {
    let story = Story::watched("pause");
    silenced(&story, "preempted", "pause");
}

#[test]
fn slurm_freezes_a_domain_for_longer_than_a_node_may_be_silent_and_loses_nothing() {
    let story = Story::watched("freeze");
    silenced(&story, "frozen", "freeze");
}

/// The story of a domain that does not answer while it gives way.
#[track_caller]
fn silenced(story: &Story, standing: &str, depth: &str) {
    let low = story.begin_low();
    let high = story.begin_high(low, standing, depth);
    let since = Instant::now();
    story.slurm.wait_job(low, "SUSPENDED", PATIENCE);
    let guest = story.slurm.node("low-a").guest();
    guest.stands_still();
    let at = guest.count();
    assert!(at < u64::from(LOW), "it had ended before");
    // Slurm knows that it is silent, which is what it would call it DOWN for.
    eventually("Slurm misses low-a", PATIENCE, || {
        story
            .slurm
            .node_state("low-a")
            .contains("NOT_RESPONDING")
            .then_some(())
    });
    story.ends(high, &[low, high]);
    assert!(since.elapsed() > BEYOND, "{:?}", since.elapsed());
    story.all_is_as_before(low, high);
}

#[test]
fn an_xmand_that_dies_in_the_middle_and_one_that_is_away_at_the_end_lose_neither_job() {
    let mut story = Story::watched("pause");
    let low = story.begin_low();
    let high = story.begin_high(low, "preempted", "pause");
    story.slurm.wait_job(low, "SUSPENDED", PATIENCE);
    let at = story.slurm.node("low-a").guest().count();
    story.host.kill9();
    // Slurm goes on alone for a while, and nobody calls a node lost that may be held back.
    let since = Instant::now();
    let better = || story.slurm.node("high-b").guest().count();
    let begun = better();
    eventually("the better job counts on without xmand", LONG, || {
        story.is_well(&[low, high]);
        (since.elapsed() > Duration::from_secs(2 * u64::from(TIMEOUT)) && better() > begun)
            .then_some(())
    });
    story.host.start();
    assert_eq!(story.site.alpha.state("low-a"), "paused");
    eventually("xmand holds low-a back still", PATIENCE, || {
        let row = story.status("low-a");
        (row["standing"] == "preempted" && row["depth"] == "pause").then_some(())
    });
    assert_eq!(story.slurm.node("low-a").guest().count(), at);

    // The better job's end finds no xmand: it is kept, and told later.
    story.host.kill9();
    story.ends(high, &[low, high]);
    let ends = story.scratch.path().join("queue/ends");
    let kept = || {
        let all = fs::read_dir(&ends).into_iter().flatten().flatten();
        let names = all.map(|one| one.file_name().into_string().unwrap());
        names.filter(|name| !name.contains('.')).count()
    };
    eventually("the end is kept at the controller", PATIENCE, || {
        (kept() > 0).then_some(())
    });
    assert_eq!(story.site.alpha.state("low-a"), "paused");
    story.host.start();
    story.site.alpha.wait_state("low-a", "running");
    story.all_is_as_before(low, high);
    eventually("nothing is left to tell", PATIENCE, || {
        (kept() == 0).then_some(())
    });
}

#[test]
fn a_node_that_is_silent_though_nobody_holds_it_back_is_set_down() {
    let story = Story::watched("pause");
    let low = story.begin_low();
    // Its wire is cut; its domain runs.
    let virsh = |words: &[&str]| story.site.alpha.virsh(words).success();
    let mut unplug = story.site.alpha.cell().command("ip");
    let port = virsh(&["domiflist", "low-a"]).stdout();
    let port = port.lines().find_map(|line| {
        line.split_whitespace()
            .next()
            .filter(|name| name.starts_with("vnet"))
    });
    unplug.args(["link", "set", port.unwrap(), "down"]);
    run(unplug, b"", PATIENCE).success();
    story.slurm.wait_node("low-a", "DOWN", LONG);
    story.watch.stderr().wait_for(
        PATIENCE,
        "low-a does not answer and nobody holds its domain back",
    );
    story.slurm.wait_job(low, "PENDING", PATIENCE);
}

/// A Grid Engine whose jobs make room for themselves.
struct Grid {
    host: Host,
    engine: GridEngine,
    admin: User,
    site: Site,
}

impl Grid {
    #[track_caller]
    fn new(preempt: &str) -> Self {
        let realm = Realm::shared();
        let site = Site::new(realm);
        let host = one_cpu(&site.alpha, "sge", preempt).start(realm);
        let hook = "/usr/local/sbin/xman-hook sge";
        let of_job = "$host $job_owner $job_id $ja_task_id";
        let of_process = "$job_pid $job_id $ja_task_id";
        let engine = GridEngine::builder()
            .node(node("low-a", "sge", &host))
            .node(node("high-b", "sge", &host))
            .queue("prolog", &format!("root@{hook} prolog {of_job}"))
            .queue("epilog", &format!("root@{hook} epilog {of_job}"))
            .queue("suspend_method", &format!("{hook} suspend {of_process}"))
            .queue("resume_method", &format!("{hook} resume {of_process}"))
            .config("max_unheard", &format!("00:00:{TIMEOUT}"))
            .start(&site);
        for name in ["low-a", "high-b"] {
            let node = engine.node(name);
            node.sh(
                &site.alpha,
                "/usr/local/sbin/xman-hook serve > /run/serve 2>&1 &",
            );
            eventually(&format!("serve listens in {name}"), PATIENCE, || {
                let said = node.sh(&site.alpha, "cat /run/serve");
                said.contains("listens at").then_some(())
            });
        }
        Self {
            admin: realm.user("root/admin"),
            host,
            engine,
            site,
        }
    }

    #[track_caller]
    fn status(&self, domain: &str) -> Value {
        status(&self.admin, &self.host, domain)
    }

    /// What to show when something is not as it should be.
    fn said(&self) -> String {
        let mut said = format!("sge_qmaster said\n{}\nxmand wrote\n", self.engine.log());
        let audit = self.host.audit().records();
        for record in audit.iter().filter(|record| record.contains("lease")) {
            said.push_str(record);
            said.push('\n');
        }
        for name in ["low-a", "high-b"] {
            let row = self.status(name);
            said.push_str(&format!("\n{name}: {row}\n"));
            if row["depth"].is_null() || row["depth"] == "starve" {
                let script = "cat /run/serve /var/spool/gridengine/execd/*/messages";
                said.push_str(&self.engine.node(name).sh(&self.site.alpha, script));
            }
        }
        said
    }

    #[track_caller]
    fn wait_standing(&self, standing: &str, depth: Option<&str>) {
        let begun = Instant::now();
        loop {
            let row = self.status("low-a");
            if row["standing"] == standing && row["depth"].as_str() == depth {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "{}", self.said());
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// Requires that the job is neither in error nor put back, and that the other's queues take jobs.
    #[track_caller]
    fn is_well(&self, job: u32, ended: &str) {
        let state = self.engine.job_state(job);
        assert!(
            [ended, "r", "t", "qw", "s"].contains(&state.as_str()),
            "job {job} is {state}; sge_qmaster said\n{}",
            self.engine.log()
        );
        for queue in ["low.q", "high.q"] {
            for name in ["low-a", "high-b"] {
                let state = self.engine.queue_state(queue, name);
                assert!(!state.contains(['E', 'd']), "{queue}@{name} is {state}");
            }
        }
    }

    #[track_caller]
    fn begin_low(&self) -> u32 {
        let job = self.engine.count_on("low-a", "low.q", IN_GRID);
        // Grid Engine itself hears of it only later.
        self.engine.node("low-a").guest().keeps_counting();
        assert_eq!(self.status("low-a")["standing"], "running-preemptible");
        job
    }

    /// Runs a better job while the other gives way, for longer than a node may be silent, and requires that both end well.
    #[track_caller]
    fn make_room(&self, standing: &str, depth: &str) {
        let low = self.begin_low();
        let high = self.engine.count_on("high-b", "high.q", HIGH);
        let better = self.engine.node("high-b").guest();
        eventually("the better job counts", LONG, || {
            self.is_well(low, "");
            self.is_well(high, "");
            (better.count() > 0).then_some(())
        });
        let since = Instant::now();
        self.wait_standing(standing, Some(depth));
        let guest = self.engine.node("low-a").guest();
        if depth == "starve" {
            guest.keeps_counting();
        } else {
            guest.stands_still();
            assert!(guest.count() < u64::from(IN_GRID), "it had ended before");
            self.engine.wait_queue("low.q", "low-a", "u", PATIENCE);
        }
        eventually("the better job has ended", LONG, || {
            self.is_well(low, "");
            self.engine.job_state(high).is_empty().then_some(())
        });
        assert!(since.elapsed() > BEYOND, "{:?}", since.elapsed());
        assert!(!self.engine.job_state(low).is_empty(), "it ended meanwhile");
        self.all_is_as_before(low, &[("low-a", IN_GRID), ("high-b", HIGH)]);
    }

    #[track_caller]
    fn all_is_as_before(&self, low: u32, counts: &[(&str, u32)]) {
        self.engine.wait_job(low, "", LONG);
        for (name, last) in counts {
            let guest = self.engine.node(name).guest();
            eventually(
                &format!("{name} has said its last number"),
                PATIENCE,
                || (guest.count() == u64::from(*last)).then_some(()),
            );
            guest.missed_no_number();
            for queue in ["low.q", "high.q"] {
                self.engine.wait_queue(queue, name, "", PATIENCE);
            }
            eventually(&format!("{name} is free"), PATIENCE, || {
                (self.status(name)["standing"] == "free").then_some(())
            });
            assert_eq!(self.site.alpha.state(name), "running");
        }
        nothing_is_left(&self.admin, &self.host);
    }
}

#[test]
fn grid_engine_starves_a_domain_for_a_better_job_and_its_own_counts_on() {
    Grid::new("starve").make_room("preempted", "starve");
}

#[test]
fn grid_engine_pauses_a_domain_for_longer_than_a_node_may_be_silent_and_loses_nothing() {
    Grid::new("pause").make_room("preempted", "pause");
}

#[test]
fn grid_engine_freezes_a_domain_for_longer_than_a_node_may_be_silent_and_loses_nothing() {
    Grid::new("freeze").make_room("frozen", "freeze");
}

#[test]
fn a_job_that_grid_engine_suspends_gives_its_domain_away_and_has_it_back() {
    let grid = Grid::new("pause");
    let low = grid.begin_low();
    let number = low.to_string();
    let guest = grid.engine.node("low-a").guest();
    grid.engine.administer("qmod", &["-sj", &number]).success();
    // Its guest stays alive, or it could not come back by itself; its processes stand still.
    grid.wait_standing("preempted", Some("starve"));
    guest.stands_still();
    grid.engine.wait_job(low, "s", PATIENCE);
    grid.engine.administer("qmod", &["-usj", &number]).success();
    grid.wait_standing("running-preemptible", None);
    guest.keeps_counting();
    grid.all_is_as_before(low, &[("low-a", IN_GRID)]);
}

/// Two guests on a host with room for one, and what a batch system's daemon calls in each: the programs of deploy/, with the guest's own key.
struct Daemons {
    libvirtd: Libvirtd,
    host: Host,
    admin: User,
    low: Guest,
    _high: Guest,
    machines: [Scratch; 2],
    _syslog: Syslog,
}

impl Daemons {
    /// Machines with these programs of deploy/.
    #[track_caller]
    fn new(system: &str, programs: &[&str]) -> Self {
        let realm = Realm::shared();
        let (low, high) = (Guest::booted("low-a"), Guest::booted("high-b"));
        let libvirtd = Libvirtd::with_cpu_groups();
        for guest in [&low, &high] {
            libvirtd.run(guest);
        }
        let host = one_cpu(&libvirtd, system, "pause").start(realm);
        low.wait_until_up();
        let syslog = Syslog::new();
        let machines = ["low-a", "high-b"].map(|name| {
            let scratch = Scratch::new("machine");
            let key = realm.keytab(&[&format!("host/{name}.xman.test")]);
            let text = format!(
                "system = \"{system}\"\ncluster = \"lab\"\nuser-realm = \"XMAN.TEST\"\nkeytab = \"{}\"\nkrb5-conf = \"{}\"\n\
                 queue-dir = \"{}\"\nsyslog = \"{}\"\n[[map]]\npattern = \"*\"\nhost = \"{}\"\ndomain = \"{name}\"\n",
                key.display(),
                realm.krb5_conf().display(),
                scratch.path().join("queue").display(),
                syslog.path().display(),
                host.target(),
            );
            let config = scratch.write("hook.toml", text);
            let hook = format!(
                "#!/bin/sh\nexec {} --config {} \"$@\"\n",
                built("xman-hook").display(),
                config.display()
            );
            let hook = executable(&scratch, "xman-hook", &hook);
            for program in programs {
                let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(program);
                let text = fs::read_to_string(source).unwrap();
                let text = text.replace("/usr/local/sbin/xman-hook", hook.to_str().unwrap());
                let name = program.rsplit('/').next().unwrap();
                executable(&scratch, name, &text);
            }
            scratch
        });
        Self {
            admin: realm.user("root/admin"),
            host,
            libvirtd,
            low,
            _high: high,
            machines,
            _syslog: syslog,
        }
    }

    #[track_caller]
    fn stands(&self, domain: &str, standing: &str) {
        eventually(&format!("{domain} is {standing}"), PATIENCE, || {
            (status(&self.admin, &self.host, domain)["standing"] == standing).then_some(())
        });
    }

    /// Runs a job in low-a and a better one in high-b, whose begin and end are what the batch system calls there.
    #[track_caller]
    fn make_room(&self, begin: impl Fn(&Scratch, &str), end: impl Fn(&Scratch, &str)) {
        let [low, high] = &self.machines;
        begin(low, "1.pbs01");
        self.stands("low-a", "running-preemptible");
        begin(high, "2.pbs01");
        assert_eq!(self.libvirtd.state("low-a"), "paused");
        self.stands("low-a", "preempted");
        self.stands("high-b", "running");
        self.low.stands_still();
        end(high, "2.pbs01");
        self.libvirtd.wait_state("low-a", "running");
        self.stands("low-a", "running-preemptible");
        self.low.keeps_counting();
    }

    /// Ends the job in low-a, which has missed nothing.
    #[track_caller]
    fn all_is_as_before(&self, end: impl Fn(&Scratch, &str)) {
        end(&self.machines[0], "1.pbs01");
        self.low.missed_no_number();
        self.stands("low-a", "free");
        self.stands("high-b", "free");
        nothing_is_left(&self.admin, &self.host);
    }
}

fn executable(scratch: &Scratch, name: &str, text: &str) -> PathBuf {
    let path = scratch.write(name, text);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

/// The arguments are those of Torque's administrator's guide: a prologue has seven, an epilogue ten.
#[test]
fn what_torque_calls_makes_room_and_gives_it_back() {
    let daemons = Daemons::new("torque", &["torque/prologue", "torque/epilogue"]);
    let call = |machine: &Scratch, name: &str, words: &[&str]| {
        let mut script = bare_command(&machine.path().join(name));
        script.args(words);
        run(script, b"", PATIENCE).success();
    };
    let limits = "neednodes=1,nodes=1,walltime=01:00:00";
    let begin = |machine: &Scratch, job: &str| {
        call(
            machine,
            "prologue",
            &[job, "alice", "users", "STDIN", limits, "batch", ""],
        );
    };
    let end = |machine: &Scratch, job: &str| {
        let used = "cput=00:00:01,mem=1kb,vmem=1kb,walltime=00:00:02";
        let words = [
            job, "alice", "users", "STDIN", "4711", limits, used, "batch", "", "0",
        ];
        call(machine, "epilogue", &words);
    };
    daemons.make_room(begin, end);
    daemons.all_is_as_before(end);
}

/// What PBS's reference of hooks says of its module, as far as the hook speaks to it: accept and reject end the hook.
const PBS: &str = r#"
import os, sys
EXECJOB_BEGIN, EXECJOB_END, EXECJOB_ABORT, EXECJOB_POSTSUSPEND, EXECJOB_PRERESUME = range(5)
class Job: id = os.environ["JOB"]; euser = "alice"; run_version = 1
class Event:
    type = globals()[os.environ["EVENT"]]; job = Job()
    def accept(self): print("accept"); sys.exit(0)
    def reject(self, why=""): print("reject", why); sys.exit(0)
def event(): return Event()
def get_local_nodename(): return "node"
"#;

#[test]
fn what_openpbs_calls_makes_room_and_gives_it_back_and_follows_a_suspended_job() {
    let daemons = Daemons::new("pbs", &["pbs/xman_hook.py"]);
    let call = |machine: &Scratch, event: &str, job: &str| -> Outcome {
        machine.write("pbs.py", PBS);
        let mut python = command("python3");
        python
            .arg("-B")
            .arg(machine.path().join("xman_hook.py"))
            .env("PYTHONPATH", machine.path())
            .env("EVENT", event)
            .env("JOB", job);
        run(python, b"", PATIENCE).says("accept")
    };
    let end = |machine: &Scratch, job: &str| {
        call(machine, "EXECJOB_END", job).success();
    };
    let begin = |machine: &Scratch, job: &str| {
        call(machine, "EXECJOB_BEGIN", job).success();
    };
    daemons.make_room(begin, end);

    // PBS suspends the job itself: its domain stays alive, or it could not come back.
    call(&daemons.machines[0], "EXECJOB_POSTSUSPEND", "1.pbs01").success();
    daemons.stands("low-a", "preempted");
    eventually("low-a starves", PATIENCE, || {
        (status(&daemons.admin, &daemons.host, "low-a")["depth"] == "starve").then_some(())
    });
    daemons.low.keeps_counting();
    call(&daemons.machines[0], "EXECJOB_PRERESUME", "1.pbs01").success();
    daemons.stands("low-a", "running-preemptible");
    daemons.all_is_as_before(end);
}
