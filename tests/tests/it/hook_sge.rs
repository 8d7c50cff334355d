//! `xman-hook` under a real Grid Engine: prolog and epilog as root in the guest, methods as the job's owner, who has no key.

use std::{fs, time::Duration};

use xman_tests::{GridEngine, Host, Node, Realm, Site, built, command, eventually, run};

/// More than a job of these tests ever counts to.
const FOR_EVER: u32 = 1_000_000;
/// Guests are emulated, and the machine is busy.
const LONG: Duration = Duration::from_secs(240);

#[test]
fn a_job_of_grid_engine_has_its_room_gives_way_when_it_is_suspended_and_comes_back() {
    let realm = Realm::shared();
    let site = Site::new(realm);
    let cpus = run(command("nproc"), b"", LONG).success().stdout();
    let cpus: u32 = cpus.trim().parse().unwrap();
    let host = Host::builder()
        .beside(&site.alpha)
        .k5login(["alice"])
        .config_extra(&format!(
            r#"
            [schedule]
            reserve-cpus = {}
            reserve-memory = "64MiB"
            min-run = "1s"
            [schedule.class.grid]
            domains = ["grid*"]
            rank = 10
            preempt = "pause"
            [schedule.system.sge]
            principals = ["sge/*@XMAN.TEST"]
            nodes = ["host/{{domain}}.xman.test@XMAN.TEST"]
            domains = ["grid*"]
            "#,
            cpus - 1
        ))
        .start(realm);
    let keytab = fs::read(realm.keytab(&["host/grid1.xman.test"])).unwrap();
    let config = format!(
        "system = \"sge\"\ncluster = \"cell\"\nkeytab = \"/etc/xman/hook.keytab\"\nuser-realm = \"{}\"\n\
         [[map]]\npattern = \"grid*\"\nhost = \"{}\"\ndomain = \"{{short}}\"\n",
        realm.name(),
        host.target()
    );
    let hook = "/usr/local/sbin/xman-hook sge";
    let engine = GridEngine::builder()
        .node(
            Node::new("grid1")
                .program(&built("xman-hook"), "/usr/local/sbin/xman-hook")
                .file("/etc/xman/hook.toml", 0o644, config)
                .file("/etc/xman/hook.keytab", 0o600, keytab),
        )
        .queue(
            "prolog",
            &format!("root@{hook} prolog $host $job_owner $job_id $ja_task_id"),
        )
        .queue(
            "epilog",
            &format!("root@{hook} epilog $host $job_owner $job_id $ja_task_id"),
        )
        .queue(
            "suspend_method",
            &format!("{hook} suspend $job_pid $job_id $ja_task_id"),
        )
        .queue(
            "resume_method",
            &format!("{hook} resume $job_pid $job_id $ja_task_id"),
        )
        .start(&site);
    let node = engine.node("grid1");
    node.sh(
        &site.alpha,
        "setsid /usr/local/sbin/xman-hook serve >/run/serve 2>&1 </dev/null & sleep 1",
    );
    let alice = realm.user("alice");
    let row = || {
        let rows = alice
            .rxm(&host, ["-o", "json", "status", "grid1"])
            .success();
        rows.json()[0].clone()
    };
    let stands = |standing: &str| {
        eventually(&format!("grid1 is {standing}"), LONG, || {
            (row()["standing"] == standing).then_some(())
        });
    };
    let job = engine.count_on("grid1", "low.q", FOR_EVER);
    engine.wait_job(job, "r", LONG);
    node.guest().keeps_counting();
    stands("running-preemptible");
    let listed = alice
        .rxm(&host, ["-o", "json", "lease", "list"])
        .success()
        .json();
    let lease = listed[0]["lease"].as_str().unwrap();
    assert!(lease.starts_with(&format!("sge/cell/{job}/")), "{lease}");
    assert_eq!(listed[0]["user"], realm.principal("alice"));

    engine
        .administer("qmod", &["-sj", &job.to_string()])
        .success();
    engine.wait_job(job, "s", LONG);
    stands("preempted");
    eventually("grid1 was seen to starve", LONG, || {
        (row()["depth"] == "starve").then_some(())
    });

    engine
        .administer("qmod", &["-usj", &job.to_string()])
        .success();
    engine.wait_job(job, "r", LONG);
    stands("running-preemptible");
    node.guest().keeps_counting();
    node.guest().missed_no_number();

    engine.administer("qdel", &[&job.to_string()]).success();
    engine.wait_job(job, "", LONG);
    stands("free");
    assert_eq!(engine.queue_state("low.q", "grid1"), "");
}
