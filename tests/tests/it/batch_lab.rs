//! The lab's batch systems: what the tests of making room for their jobs rest on.

use std::fs;
use std::thread;
use std::time::{Duration, Instant};

use xman_tests::{GridEngine, Host, Node, PATIENCE, Realm, Site, Slurm, built, eventually};

/// More than a job of these tests ever counts to.
const FOR_EVER: u32 = 1_000_000;

#[test]
fn slurm_calls_a_node_down_whose_domain_is_suspended_for_longer_than_it_waits() {
    let site = Site::new(Realm::shared());
    let slurm = Slurm::builder()
        .slurmd_timeout(10)
        .node(Node::new("grid1"))
        .node(Node::new("grid2"))
        .start(&site);
    let job = slurm.count_on("grid1", "low", FOR_EVER);
    slurm.wait_job(job, "RUNNING", PATIENCE);
    let grid1 = slurm.node("grid1").guest();
    grid1.keeps_counting();

    site.alpha.virsh(&["suspend", "grid1"]).success();
    slurm.wait_node("grid1", "DOWN", PATIENCE);
    assert_eq!(slurm.node_state("grid2"), "IDLE");
    slurm.wait_job(job, "PENDING", PATIENCE);
    assert_eq!(slurm.job(job, "Restarts"), "1");
}

#[test]
fn slurm_runs_its_hooks_and_what_they_refuse_it_begins_again() {
    let site = Site::new(Realm::shared());
    let slurm = Slurm::builder()
        .node(Node::new("grid1"))
        .hook_in_nodes(
            "Prolog",
            "#!/bin/sh\necho prolog $SLURM_JOB_ID $SLURM_JOB_USER >> /run/hooks\n",
        )
        .hook_in_nodes(
            "Epilog",
            "#!/bin/sh\necho epilog $SLURM_JOB_ID $SLURM_JOB_USER >> /run/hooks\n",
        )
        .hook_at_desk("PrologSlurmctld", "#!/bin/sh\nexit 1\n")
        .hook_at_desk("EpilogSlurmctld", "#!/bin/sh\nexit 0\n")
        // So long a job waits that was refused: as long as the credentials of its first beginning are good for.
        .config("AuthInfo=cred_expire=15")
        .start(&site);
    let job = slurm.sbatch(&["-p", "high", "-w", "grid1"], "#!/bin/sh\ntrue\n");
    eventually("the job was refused and begun again", PATIENCE, || {
        (slurm.job(job, "Restarts") != "0").then_some(())
    });
    assert!(!slurm.node_state("grid1").contains("DRAIN"));

    let seen = slurm.folder().join("test-seen");
    let script = format!(
        "#!/bin/sh\necho $SLURM_SCRIPT_CONTEXT $SLURM_JOB_ID $SLURM_JOB_USER $SLURM_JOB_NODELIST >> {}\n",
        seen.display()
    );
    slurm.rewrite_hook("PrologSlurmctld", &script);
    slurm.rewrite_hook("EpilogSlurmctld", &script);
    slurm.wait_job(job, "COMPLETED", 3 * PATIENCE);
    let wanted =
        format!("prolog_slurmctld {job} alice grid1\nepilog_slurmctld {job} alice grid1\n");
    eventually("both hooks ran at the desk", PATIENCE, || {
        (fs::read_to_string(&seen).ok()? == wanted).then_some(())
    });
    let wanted = format!("prolog {job} alice\nepilog {job} alice\n");
    eventually("both hooks ran in the node", PATIENCE, || {
        (slurm.node("grid1").sh(&site.alpha, "cat /run/hooks") == wanted).then_some(())
    });
}

#[test]
fn job_in_a_node_goes_on_when_its_domain_was_starved_shrunk_and_saved_and_its_controller_killed() {
    let site = Site::new(Realm::shared());
    let mut slurm = Slurm::builder().node(Node::new("grid1")).start(&site);
    let job = slurm.count_on("grid1", "low", FOR_EVER);
    slurm.node("grid1").guest().keeps_counting();
    let virsh = |args: &[&str]| site.alpha.virsh(args).success();

    virsh(&["schedinfo", "grid1", "--live", "vcpu_quota=5000"]);
    let guest = slurm.node("grid1").guest();
    guest.keeps_counting();
    let used = |site: &Site| -> u64 {
        let time = site.alpha.virsh(&["domstats", "--cpu-total", "grid1"]);
        let time = time.success().stdout();
        let line = time
            .lines()
            .find_map(|line| line.trim().strip_prefix("cpu.time="));
        line.unwrap().parse().unwrap()
    };
    let (before, begun) = (used(&site), Instant::now());
    thread::sleep(Duration::from_secs(4));
    let share = (used(&site) - before) as f64 / begun.elapsed().as_nanos() as f64;
    assert!(share < 0.3, "a starved domain took {share} of a processor");
    virsh(&["schedinfo", "grid1", "--live", "vcpu_quota=-1"]);

    virsh(&["setmem", "grid1", "160M", "--live"]);
    eventually("the domain has given up memory", PATIENCE, || {
        (site.alpha.dominfo("grid1", "Used memory") == "163840 KiB").then_some(())
    });
    virsh(&["managedsave", "grid1"]);
    slurm.kill9();
    virsh(&["start", "grid1"]);
    slurm.start();
    slurm.wait_job(job, "RUNNING", PATIENCE);
    let guest = slurm.node("grid1").guest();
    guest.keeps_counting();
    guest.missed_no_number();
    // What was saved does not know how late it is.
    virsh(&["domtime", "grid1", "--sync"]);
    let time = slurm.node("grid1").sh(&site.alpha, "date +%s");
    let ours = std::time::UNIX_EPOCH.elapsed().unwrap().as_secs();
    assert!(ours.abs_diff(time.trim().parse().unwrap()) < 10);
    slurm.scancel(job);
    slurm.wait_node("grid1", "IDLE", PATIENCE);
}

#[test]
fn slurm_has_a_domain_started_for_a_job_and_shut_down_when_it_is_idle() {
    let site = Site::new(Realm::shared());
    let slurm = Slurm::builder()
        .cloud_node(Node::new("grid1"))
        .hook_at_desk("ResumeProgram", "#!/bin/sh\nexit 1\n")
        .hook_at_desk("SuspendProgram", "#!/bin/sh\nexit 1\n")
        .config("SuspendTime=10\nSuspendTimeout=10\nResumeTimeout=120\nTreeWidth=1")
        .start(&site);
    let power = |verb: &str| {
        let uri = site.alpha.outside_uri();
        format!("#!/bin/sh\nexec /usr/bin/virsh -q -c '{uri}' {verb} $1\n")
    };
    slurm.rewrite_hook("ResumeProgram", &power("start"));
    slurm.rewrite_hook("SuspendProgram", &power("shutdown"));
    let job = slurm.count_on("grid1", "low", 10);
    slurm.wait_job(job, "COMPLETED", 2 * PATIENCE);
    slurm.node("grid1").guest().missed_no_number();
    site.alpha.wait_state("grid1", "shut off");
}

#[test]
fn program_in_a_node_speaks_to_the_nodes_own_host_with_the_nodes_key() {
    let realm = Realm::shared();
    let site = Site::new(realm);
    let host = Host::builder()
        .beside(&site.alpha)
        .k5login(["host/grid1.xman.test"])
        .start(realm);
    let keytab = fs::read(realm.keytab(&["host/grid1.xman.test"])).unwrap();
    let slurm = Slurm::builder()
        .node(
            Node::new("grid1")
                .program(&built("rxm"), "/usr/bin/rxm")
                .file("/etc/krb5.keytab", 0o600, keytab),
        )
        .start(&site);
    let script = format!(
        "KRB5_CLIENT_KTNAME=/etc/krb5.keytab KRB5CCNAME=MEMORY: rxm -H {} list",
        host.target()
    );
    let said = slurm.node("grid1").sh(&site.alpha, &script);
    assert!(said.contains("grid1"), "{said}");
}

#[test]
fn grid_engine_runs_its_methods_in_the_node_as_the_jobs_owner() {
    let site = Site::new(Realm::shared());
    let tell =
        |what: &str| format!("#!/bin/sh\numask 0\necho {what} $(id -un) \"$@\" >> /tmp/methods\n");
    let grid1 = Node::new("grid1")
        .file("/etc/lab/prolog", 0o755, tell("prolog"))
        .file("/etc/lab/epilog", 0o755, tell("epilog"))
        .file("/etc/lab/suspend", 0o755, tell("suspend"))
        .file("/etc/lab/resume", 0o755, tell("resume"))
        .at_boot("(umask 0; echo boot > /tmp/methods) &");
    let engine = GridEngine::builder()
        .node(grid1)
        .queue("prolog", "root@/etc/lab/prolog $job_id")
        .queue("epilog", "root@/etc/lab/epilog $job_id")
        .queue("suspend_method", "/etc/lab/suspend $job_id $job_owner")
        .queue("resume_method", "/etc/lab/resume $job_id $job_owner")
        .start(&site);
    let job = engine.count_on("grid1", "low.q", 1_000_000);
    engine.wait_job(job, "r", PATIENCE);
    engine.node("grid1").guest().keeps_counting();
    let methods = |lines: &str| {
        eventually(&format!("the methods say {lines}"), PATIENCE, || {
            (engine.node("grid1").sh(&site.alpha, "cat /tmp/methods") == lines).then_some(())
        });
    };
    let mut wanted = format!("boot\nprolog root {job}\n");
    methods(&wanted);
    let number = job.to_string();
    engine.administer("qmod", &["-sj", &number]).success();
    wanted.push_str(&format!("suspend alice {job} alice\n"));
    methods(&wanted);
    engine.wait_job(job, "s", PATIENCE);
    engine.administer("qmod", &["-usj", &number]).success();
    wanted.push_str(&format!("resume alice {job} alice\n"));
    methods(&wanted);
    engine.wait_job(job, "r", PATIENCE);
    engine.administer("qdel", &[&number]).success();
    wanted.push_str(&format!("epilog root {job}\n"));
    methods(&wanted);
    engine.wait_job(job, "", PATIENCE);
}

#[test]
fn starved_domain_answers_slurm_for_longer_than_it_waits() {
    let site = Site::new(Realm::shared());
    let slurm = Slurm::builder()
        .slurmd_timeout(10)
        .node(Node::new("grid1"))
        .start(&site);
    let job = slurm.count_on("grid1", "low", FOR_EVER);
    let grid1 = slurm.node("grid1").guest();
    grid1.keeps_counting();
    let starve = ["schedinfo", "grid1", "--live", "vcpu_quota=2000"];
    site.alpha.virsh(&starve).success();
    let begun = Instant::now();
    // Long enough for Slurm to have given up a silent node twice.
    while begun.elapsed() < Duration::from_secs(60) {
        assert!(slurm.node_state("grid1").starts_with("ALLOCATED"));
        thread::sleep(Duration::from_secs(1));
    }
    slurm.wait_job(job, "RUNNING", PATIENCE);
    assert_eq!(slurm.job(job, "Restarts"), "0");
    grid1.keeps_counting();
    grid1.missed_no_number();
}

#[test]
fn saved_domain_keeps_its_job_while_slurm_waits_for_ever() {
    let site = Site::new(Realm::shared());
    let slurm = Slurm::builder()
        .slurmd_timeout(10)
        .config("DebugFlags=NO_CONF_HASH")
        .node(Node::new("grid1"))
        .start(&site);
    let job = slurm.count_on("grid1", "low", FOR_EVER);
    let grid1 = slurm.node("grid1").guest();
    grid1.keeps_counting();
    slurm.set_slurmd_timeout(0);
    site.alpha.virsh(&["managedsave", "grid1"]).success();
    // Long enough for Slurm to have given up a silent node, had it not been told to wait.
    thread::sleep(Duration::from_secs(50));
    assert_eq!(slurm.job_state(job), "RUNNING");
    site.alpha.virsh(&["start", "grid1"]).success();
    grid1.keeps_counting();
    eventually("the node answers again", PATIENCE, || {
        (slurm.node_state("grid1") == "ALLOCATED").then_some(())
    });
    slurm.set_slurmd_timeout(10);
    grid1.keeps_counting();
    assert_eq!(slurm.job_state(job), "RUNNING");
    assert_eq!(slurm.job(job, "Restarts"), "0");
    grid1.missed_no_number();
}
