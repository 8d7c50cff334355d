//! `xman-hook` as batch systems call it: codes, deadlines, signals, what is kept, and what of its environment it believes.

use std::{
    fs,
    io::{Read as _, Write as _},
    net::TcpListener,
    os::unix::{fs::PermissionsExt as _, net::UnixStream},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use xman_tests::{
    Host, Outcome, PATIENCE, Process, Realm, Records as _, Scratch, Signal, Syslog, bare_command,
    built, command, eventually, program, run, signal_pid,
};

/// Nothing listens there, and nothing in the lab ever will.
const NOBODY: &str = "localhost:1";

/// What slurmd 22.05 sets, and some of what a job's owner chooses.
const NODE: [(&str, &str); 8] = [
    ("SLURMD_NODENAME", "test"),
    ("SLURM_CLUSTER_NAME", "grid"),
    ("SLURM_JOB_ID", "4711"),
    ("SLURM_JOB_USER", "alice"),
    ("SLURM_JOB_RESTART_COUNT", "0"),
    ("SLURM_NODELIST", "test"),
    ("SLURM_JOB_COMMENT", "$(reboot)\nforged: line"),
    ("SLURM_SCRIPT_CONTEXT", "prolog_slurmd"),
];

/// A machine that runs hooks: its configuration, its queue, its syslog.
struct Node {
    scratch: Scratch,
    syslog: Syslog,
    config: PathBuf,
}

impl Node {
    /// Whose one node `test` is the domain `test` of the host at `target`.
    fn new(target: &str, more: &str) -> Self {
        Self::of_system("slurm", target, more)
    }

    fn of_system(system: &str, target: &str, more: &str) -> Self {
        Self::of_realm(Realm::shared(), system, target, more)
    }

    fn of_realm(realm: &Realm, system: &str, target: &str, more: &str) -> Self {
        let (scratch, syslog) = (Scratch::new("hook"), Syslog::new());
        let keytab = realm.keytab(&["slurm/ctl"]);
        let text = format!(
            "system = \"{system}\"\ncluster = \"grid\"\nkeytab = \"{}\"\nkrb5-conf = \"{}\"\nuser-realm = \"{}\"\nqueue-dir = \"{}\"\nsyslog = \"{}\"\n\
             [[map]]\nnodes = \"test\"\nhost = \"{target}\"\ndomain = \"test\"\n\
             [serve]\nsocket = \"{}\"\n{more}",
            keytab.display(),
            realm.krb5_conf().display(),
            realm.name(),
            scratch.path().join("queue").display(),
            syslog.path().display(),
            scratch.path().join("run/socket").display(),
        );
        let config = scratch.write("hook.toml", text);
        Self {
            scratch,
            syslog,
            config,
        }
    }

    fn command(&self, env: &[(&str, &str)], words: &[&str]) -> Command {
        let mut command = bare_command(&built("xman-hook"));
        command
            .arg("--config")
            .arg(&self.config)
            .args(words)
            .envs(env.iter().copied());
        command
    }

    fn call(&self, env: &[(&str, &str)], words: &[&str]) -> Outcome {
        run(self.command(env, words), b"", PATIENCE)
    }

    /// The ends that wait.
    fn kept(&self) -> Vec<PathBuf> {
        let Ok(entries) = fs::read_dir(self.scratch.path().join("queue/ends")) else {
            return Vec::new();
        };
        entries
            .map(|entry| entry.unwrap().path())
            .filter(|path| path.extension().is_none() && !path.ends_with(".lock"))
            .collect()
    }
}

fn host() -> Host {
    Host::builder()
        .k5login(["slurm/ctl", "alice"])
        .uri("test:///default")
        .start(Realm::shared())
}

/// A host that takes connections and says nothing.
fn mute() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("localhost:{}", listener.local_addr().unwrap().port());
    (listener, target)
}

const QUICK: &str = "[deadline]\nslurm-prolog = \"2s\"\nslurm-prolog-controller = \"2s\"\nslurm-epilog = \"2s\"\nslurm-epilog-controller = \"2s\"\n\
sge-prolog = \"2s\"\nsge-epilog = \"2s\"\npbs-begin = \"2s\"\npbs-end = \"2s\"\npbs-abort = \"2s\"\npbs-suspend = \"2s\"\npbs-resume = \"2s\"\n\
torque-prologue = \"2s\"\ntorque-epilogue = \"2s\"\n";

#[test]
fn a_host_that_is_away_drains_no_node_and_puts_jobs_back() {
    let node = Node::new(NOBODY, QUICK);
    for (words, code) in [
        (&["slurm", "prolog"][..], 0),
        (&["slurm", "prolog-controller"], 69),
        (&["slurm", "epilog"], 0),
        (&["slurm", "epilog-controller"], 0),
    ] {
        let outcome = node.call(&NODE, words).code(code);
        assert!(outcome.stderr().contains("unreachable"), "{outcome}");
    }
    let record = node
        .syslog
        .contains(&["xman-hook[", "slurm prolog-controller:", "requeued"]);
    assert!(record.starts_with("<27>"), "{record}");
    let pbs = ["--job=7.pbs", "--run=1", "--node=test", "--user=alice"];
    for (hook, code) in [
        ("begin", 2),
        ("end", 0),
        ("abort", 0),
        ("suspend", 69),
        ("resume", 2),
    ] {
        node.call(&[], &[&["pbs", hook][..], &pbs].concat())
            .code(code);
    }
}

#[test]
fn an_end_that_cannot_be_told_is_kept_once_for_each_job_and_tried_again() {
    let node = Node::new(NOBODY, QUICK);
    node.call(&NODE, &["slurm", "epilog"]).success();
    let kept = node.kept();
    assert_eq!(kept.len(), 1);
    let text = fs::read_to_string(&kept[0]).unwrap();
    assert!(
        text.contains("slurm/grid/4711/0") && text.contains(NOBODY),
        "{text}"
    );
    let mode = fs::metadata(node.scratch.path().join("queue/ends"))
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o077, 0);
    let tried = node.call(&[], &["deliver", "--deadline", "2s"]).code(75);
    assert!(tried.stderr().contains("0 delivered, 1 left"), "{tried}");
    assert_eq!(node.kept(), kept);
}

/// Slurm 22.05 counts a requeue before it calls the epilogs of the run that ended.
#[test]
fn the_end_of_a_requeued_job_names_the_run_that_began_and_not_the_next() {
    let node = Node::new(NOBODY, QUICK);
    let with_count = |count| {
        let mut env = NODE.to_vec();
        env.push(("SLURM_JOB_NODELIST", "test"));
        for pair in &mut env {
            if pair.0 == "SLURM_JOB_RESTART_COUNT" {
                pair.1 = count;
            }
        }
        env
    };
    for (prolog, epilog) in [
        ("prolog", "epilog"),
        ("prolog-controller", "epilog-controller"),
    ] {
        node.call(&with_count("1"), &["slurm", prolog]);
        node.call(&with_count("2"), &["slurm", epilog]).success();
    }
    assert_eq!(node.kept().len(), 2);
    for end in node.kept() {
        let text = fs::read_to_string(end).unwrap();
        assert!(text.contains("4711/1\""), "{text}");
    }
}

#[test]
fn a_hook_that_is_killed_and_hooks_that_run_at_once_lose_no_end() {
    let (_listener, target) = mute();
    let node = Node::new(&target, "[deadline]\nslurm-epilog = \"5m\"\n");
    let mut hooks: Vec<_> = (1..=20)
        .map(|job: u32| {
            let job = job.to_string();
            let mut env = NODE.to_vec();
            env.retain(|(name, _)| *name != "SLURM_JOB_ID");
            env.push(("SLURM_JOB_ID", &job));
            Process::start(node.command(&env, &["slurm", "epilog"]))
        })
        .collect();
    eventually("all ends are written down", PATIENCE, || {
        (node.kept().len() == 20).then_some(())
    });
    hooks.iter_mut().for_each(Process::kill);
    let tried = node.call(&[], &["deliver", "--deadline", "2s"]).code(75);
    assert!(tried.stderr().contains("0 delivered, 20 left"), "{tried}");
}

#[test]
fn where_a_run_is_a_second_each_end_has_its_own() {
    let node = Node::of_system("sge", NOBODY, QUICK);
    for _ in 0..3 {
        node.call(&[], &["sge", "epilog", "test", "alice", "7", "undefined"])
            .success();
    }
    let runs: std::collections::BTreeSet<_> = node
        .kept()
        .iter()
        .map(|end| fs::read_to_string(end).unwrap())
        .map(|text| text.split('"').nth(3).unwrap().to_owned())
        .collect();
    assert_eq!(runs.len(), 3, "{runs:?}");
    assert!(
        runs.iter().all(|run| run.starts_with("sge/grid/7/")),
        "{runs:?}"
    );
}

#[test]
fn a_spoilt_end_is_told_and_stands_in_nobodys_way() {
    let node = Node::new(NOBODY, QUICK);
    node.call(&NODE, &["slurm", "epilog"]).success();
    let spoilt = node.scratch.path().join("queue/ends/000000000000001-x");
    fs::write(&spoilt, "{\"lease\": \"slu").unwrap();
    let tried = node.call(&[], &["deliver", "--deadline", "2s"]).code(75);
    assert!(tried.stderr().contains("put aside"), "{tried}");
    assert!(tried.stderr().contains("1 left"), "{tried}");
    assert!(!spoilt.exists() && spoilt.with_extension("bad").exists());
    let again = node.call(&[], &["deliver", "--deadline", "2s"]).code(75);
    assert!(!again.stderr().contains("put aside"), "{again}");
}

#[test]
fn an_end_is_kept_also_without_a_key() {
    let node = Node::new(NOBODY, QUICK);
    let text = fs::read_to_string(&node.config).unwrap();
    fs::write(
        &node.config,
        text.replace("keytab = \"", "keytab = \"/nonexistent"),
    )
    .unwrap();
    node.call(&NODE, &["slurm", "epilog"]).success();
    assert_eq!(node.kept().len(), 1);
    let begun = node.call(&NODE, &["slurm", "prolog-controller"]).code(78);
    assert!(begun.stderr().contains("ktadd"), "{begun}");
}

#[test]
fn a_host_that_says_nothing_costs_a_hook_its_deadline_and_no_more() {
    let (_listener, target) = mute();
    let node = Node::new(&target, QUICK);
    for (words, code) in [
        (&["slurm", "prolog"][..], 0),
        (&["slurm", "prolog-controller"], 69),
        (&["slurm", "epilog"], 0),
    ] {
        let began = Instant::now();
        node.call(&NODE, words).code(code);
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{words:?}: {:?}",
            began.elapsed()
        );
    }
}

#[test]
fn sigterm_ends_a_hook_at_once_with_its_code() {
    let (_listener, target) = mute();
    let node = Node::new(&target, "");
    for (words, code) in [
        (&["slurm", "prolog"][..], 0),
        (&["slurm", "prolog-controller"], 143),
        (&["pbs", "begin", "--job=7", "--run=0", "--node=test"], 2),
    ] {
        let connections = std::thread::spawn({
            let listener = _listener.try_clone().unwrap();
            move || listener.accept().unwrap()
        });
        let mut hook = Process::start(node.command(&NODE, words));
        let held = connections.join().unwrap();
        let began = Instant::now();
        hook.signal(Signal::TERM);
        hook.wait(PATIENCE).code(code);
        assert!(began.elapsed() < Duration::from_secs(5), "{words:?}");
        drop(held);
    }
    // Nothing was asked of the host yet, so there is nothing to take back.
    assert!(node.kept().is_empty());
}

#[test]
fn a_kdc_that_is_away_drains_no_node_and_puts_jobs_back() {
    let realm = Realm::new();
    let host = Host::builder()
        .k5login(["slurm/ctl"])
        .uri("test:///default")
        .start(&realm);
    let node = Node::of_realm(&realm, "slurm", &host.target(), QUICK);
    node.call(&[], &["check"]).success();
    realm.stop_kdc();
    for (words, code) in [
        (&["slurm", "prolog"][..], 0),
        (&["slurm", "prolog-controller"], 69),
        (&["slurm", "epilog"], 0),
    ] {
        let outcome = node.call(&NODE, words).code(code);
        assert!(outcome.stderr().contains("KDC"), "{outcome}");
    }
    assert_eq!(node.kept().len(), 1);
}

#[test]
fn who_may_not_is_told_and_no_node_is_drained_for_it() {
    let host = Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .start(Realm::shared());
    let node = Node::new(&host.target(), QUICK);
    for (words, code) in [
        (&["slurm", "prolog"][..], 0),
        (&["slurm", "prolog-controller"], 77),
        (&["slurm", "epilog"], 0),
        (&["slurm", "suspend", "test"], 77),
    ] {
        node.call(&NODE, words).code(code);
    }
    // An end that is refused is kept: who mends the rules finds it done.
    assert_eq!(node.kept().len(), 1);
}

#[test]
fn nothing_of_the_environment_goes_on_but_what_the_batch_system_says() {
    let host = host();
    let node = Node::new(&host.target(), "");
    let trace = node.scratch.path().join("trace");
    let hostile = [
        ("KRB5_TRACE", trace.to_str().unwrap()),
        ("KRB5_CONFIG", "/nonexistent"),
        ("KRB5CCNAME", "FILE:/nonexistent"),
        ("KRB5_CLIENT_KTNAME", "/nonexistent"),
        ("GSS_MECH_CONFIG", "/nonexistent"),
        ("PATH", "/nonexistent"),
    ];
    let checked = node.call(&hostile, &["check"]).success();
    assert!(checked.stdout().contains("slurm/ctl@"), "{checked}");
    assert!(!trace.exists());
}

#[test]
fn check_says_of_each_host_whom_it_takes_us_for() {
    let host = host();
    let node = Node::new(&host.target(), "");
    let well = node.call(&[], &["check"]).success();
    assert!(
        well.stdout().contains(&format!(
            "ok    {}: it takes us for slurm/ctl@XMAN.TEST",
            host.target()
        )),
        "{well}"
    );

    let text = fs::read_to_string(&node.config).unwrap();
    fs::write(
        &node.config,
        format!("principal = \"slurm/other@XMAN.TEST\"\n{text}"),
    )
    .unwrap();
    let other = node.call(&[], &["check"]).code(78);
    assert!(
        other.stdout().contains("WRONG") && other.stdout().contains("slurm/other"),
        "{other}"
    );

    let away = Node::new(NOBODY, "").call(&[], &["check"]).code(78);
    assert!(
        away.stdout().contains("WRONG localhost:1: unreachable"),
        "{away}"
    );
}

#[test]
fn a_configuration_or_environment_that_is_wrong_is_told_and_fails_no_epilog() {
    let node = Node::new(NOBODY, QUICK);
    for (hook, code) in [("prolog", 78), ("epilog", 0), ("prolog-controller", 78)] {
        let outcome = node
            .call(&[("SLURM_JOB_ID", "4711")], &["slurm", hook])
            .code(code);
        assert!(outcome.stderr().contains("is not set"), "{outcome}");
    }
    fs::write(&node.config, "system = \"slurm\"\nkeytap = \"/x\"\n").unwrap();
    for (hook, code) in [("prolog", 78), ("epilog", 0)] {
        let outcome = node.call(&NODE, &["slurm", hook]).code(code);
        assert!(outcome.stderr().contains("keytap"), "{outcome}");
    }
}

#[test]
fn a_link_is_the_hook_that_its_name_says() {
    let node = Node::new(NOBODY, QUICK);
    let link = node.scratch.path().join("xman-slurm-epilog");
    std::os::unix::fs::symlink(built("xman-hook"), &link).unwrap();
    let mut called = bare_command(&link);
    called.envs(NODE).arg("--config").arg(&node.config);
    run(called, b"", PATIENCE).success();
    assert_eq!(node.kept().len(), 1);
}

#[test]
fn nodes_are_powered_up_and_down_and_twice_is_once() {
    let host = host();
    let node = Node::new(&host.target(), "[slurm]\nscontrol = \"/bin/false\"\n");
    let alice = Realm::shared().user("alice");
    let state = || {
        let listed = alice.rxm(&host, ["-o", "json", "list", "test"]).success();
        listed.json()[0]["state"].as_str().unwrap().to_owned()
    };
    let file = node
        .scratch
        .write("resume.json", r#"{"all_nodes_resume":"test","jobs":[]}"#);
    let with_file = [("SLURM_RESUME_FILE", file.to_str().unwrap())];
    for (env, words, expected) in [
        (&[][..], &["slurm", "resume", "test"][..], "running"),
        (&[], &["slurm", "suspend", "test"], "off"),
        (&[], &["slurm", "suspend", "test"], "off"),
        (&with_file, &["slurm", "resume", "nobody[1-3]"], "running"),
        (&[], &["slurm", "resume", "test"], "running"),
    ] {
        node.call(env, words).success();
        assert_eq!(state(), expected, "{words:?}");
    }
    let away = Node::new(
        NOBODY,
        "[slurm]\nscontrol = \"/bin/false\"\n[deadline]\nslurm-resume = \"7s\"\n",
    );
    let lost = away.call(&[], &["slurm", "resume", "test"]).code(69);
    assert!(lost.stderr().contains("cannot be handed back"), "{lost}");
}

#[test]
fn a_watch_that_cannot_read_slurm_does_nothing_and_says_so_once() {
    let host = host();
    let slurm = "[slurm]\nsqueue = \"/bin/false\"\ninterval = \"100ms\"\n";
    let node = Node::new(&host.target(), slurm);
    let mut watch = Process::start(node.command(&[], &["slurm", "watch"]));
    watch
        .stderr()
        .wait_for(PATIENCE, "nothing is done until that is over");
    watch.signal(Signal::TERM);
    watch.wait(PATIENCE).success();
    let said = watch.stderr().text();
    assert_eq!(said.matches("nothing is done").count(), 1, "{said}");
    assert!(
        !host
            .audit()
            .records()
            .iter()
            .any(|record| record.contains("reconcile"))
    );
}

#[test]
fn methods_stop_and_continue_a_jobs_processes_whatever_the_host_says() {
    let node = Node::of_system("sge", NOBODY, "");
    let mut job = command("setsid");
    job.args(["--wait", "sh", "-c", "echo $$; exec sleep 1000"]);
    let mut job = Process::start(job);
    let pid = eventually("the job says its process", PATIENCE, || {
        job.stdout().text().trim().parse::<u32>().ok()
    });
    let stopped = |expected: bool| {
        eventually("the job's process obeys", PATIENCE, || {
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
            (stat.contains(") T ") == expected).then_some(())
        });
    };
    let suspended = node
        .call(&[], &["sge", "suspend", &pid.to_string(), "7"])
        .success();
    assert!(
        suspended
            .stderr()
            .contains("is `xman-hook serve` running here?"),
        "{suspended}"
    );
    stopped(true);
    node.call(&[], &["sge", "resume", &pid.to_string(), "7", "undefined"])
        .success();
    stopped(false);
    signal_pid(pid, Signal::KILL);
    job.kill();
    // What is no job's process is none.
    for bad in ["0", "1"] {
        let refused = node.call(&[], &["sge", "suspend", bad, "7"]).success();
        assert!(
            refused.stderr().contains("is no job's process"),
            "{refused}"
        );
    }
}

fn say(socket: &Path, line: &[u8]) -> String {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(line).unwrap();
    let mut answer = String::new();
    let _ = stream.read_to_string(&mut answer);
    answer
}

#[test]
fn serve_speaks_for_a_jobs_owner_alone() {
    let node = Node::of_system("sge", NOBODY, "[deadline]\nsge-suspend = \"2s\"\n");
    let runs = node.scratch.path().join("queue/runs");
    fs::create_dir_all(&runs).unwrap();
    for folder in [node.scratch.path().join("queue"), runs.clone()] {
        fs::set_permissions(folder, fs::Permissions::from_mode(0o700)).unwrap();
    }
    for (id, uid) in [("7", 65_534), ("8", 4711)] {
        let text = format!(
            "{{\"uid\":{uid},\"lease\":\"sge/grid/{id}/1\",\"host\":\"{NOBODY}\",\"domain\":\"test\"}}"
        );
        fs::write(runs.join(id), text).unwrap();
    }
    let mut serve = Process::start(node.command(&[], &["serve"]));
    serve.stderr().wait_for(PATIENCE, "listens at");
    let socket = node.scratch.path().join("run/socket");

    // Root may ask for any job that there is; the host is away.
    assert!(say(&socket, b"suspend 7\n").starts_with("no localhost:1: unreachable"));
    assert_eq!(say(&socket, b"suspend 9\n"), "no you have no job 9 here\n");
    for bad in [
        &b"\n"[..],
        b"suspend ../x\n",
        b"end 7\n",
        b"suspend 7 1 2\n",
    ] {
        assert!(say(&socket, bad).starts_with("no "), "{bad:?}");
    }
    assert_eq!(say(&socket, &[b'x'; 1000]), "");

    // Others only for their own.
    let ask = |job: &str| {
        let script = "import socket,sys\ns=socket.socket(socket.AF_UNIX)\ns.connect(sys.argv[1])\ns.sendall(sys.argv[2].encode()+b'\\n')\nprint(s.recv(999).decode())";
        let mut nobody = command("setpriv");
        nobody
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(program("python3"))
            .args(["-c", script])
            .arg(&socket)
            .arg(format!("suspend {job}"));
        open_to_others(&socket);
        run(nobody, b"", PATIENCE).success().stdout()
    };
    assert!(ask("7").starts_with("no localhost:1: unreachable"));
    assert!(ask("8").starts_with("no you have no job 8 here"));
    node.syslog.contains(&["uid 65534", "the job 8"]);

    // A second one does not take the socket away; a dead one's is replaced.
    let second = node.call(&[], &["serve"]).code(78);
    assert!(second.stderr().contains("another"), "{second}");
    serve.kill();
    let mut next = Process::start(node.command(&[], &["serve"]));
    next.stderr().wait_for(PATIENCE, "listens at");
    next.signal(Signal::TERM);
    next.wait(PATIENCE).success();
    assert!(!socket.exists());
}

/// The lab's folders are root's alone; the guest's /run is not.
fn open_to_others(socket: &Path) {
    for folder in socket
        .ancestors()
        .skip(1)
        .take_while(|folder| folder.starts_with("/tmp/"))
    {
        let about = fs::metadata(folder).unwrap().permissions();
        fs::set_permissions(folder, fs::Permissions::from_mode(about.mode() | 0o011)).unwrap();
    }
}

/// Copies a script of deploy/, with the program of this build and the node's configuration in it.
fn deployed(node: &Node, path: &str) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../deploy")
        .join(path);
    let wrapper = node.scratch.write(
        "xman-hook",
        format!(
            "#!/bin/sh\nexec {} --config {} \"$@\"\n",
            built("xman-hook").display(),
            node.config.display()
        ),
    );
    fs::set_permissions(&wrapper, fs::Permissions::from_mode(0o755)).unwrap();
    let text = fs::read_to_string(source).unwrap();
    let text = text.replace("/usr/local/sbin/xman-hook", wrapper.to_str().unwrap());
    let name = Path::new(path).file_name().unwrap().to_str().unwrap();
    let script = node.scratch.write(name, text);
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755)).unwrap();
    script
}

#[test]
fn torques_scripts_pass_its_arguments_on() {
    let node = Node::of_system("torque", NOBODY, QUICK);
    // The node is this machine, whatever it is called.
    let text = fs::read_to_string(&node.config).unwrap();
    fs::write(
        &node.config,
        text.replace("nodes = \"test\"", "pattern = \"*\""),
    )
    .unwrap();
    let prologue = deployed(&node, "torque/prologue");
    let epilogue = deployed(&node, "torque/epilogue");
    let words = [
        "12.pbs01", "alice", "users", "--help", "nodes=1", "batch", "-x",
    ];
    let call = |script: &Path| {
        let mut call = bare_command(script);
        call.args(words);
        run(call, b"", PATIENCE)
    };
    call(&prologue).code(2);
    call(&epilogue).success();
    let kept = fs::read_to_string(&node.kept()[0]).unwrap();
    assert!(kept.contains("torque/grid/12.pbs01/"), "{kept}");
}

/// As much of PBS's module as the hook speaks to, by PBS's reference of hooks: accept and reject end the hook.
const PBS: &str = r#"
import os, sys
EXECJOB_BEGIN, EXECJOB_END, EXECJOB_ABORT, EXECJOB_POSTSUSPEND, EXECJOB_PRERESUME, PERIODIC = range(6)
class Job: id = "7.pbs01"; euser = "alice"; run_version = 3
class Event:
    type = int(os.environ["EVENT"]); job = Job()
    def accept(self): print("accept"); sys.exit(0)
    def reject(self, why=""): print("reject", why); sys.exit(0)
def event(): return Event()
def get_local_nodename(): return "test"
"#;

#[test]
fn the_hook_of_openpbs_accepts_and_rejects_as_the_table_says() {
    let node = Node::of_system("pbs", NOBODY, QUICK);
    let hook = deployed(&node, "pbs/xman_hook.py");
    node.scratch.write("pbs.py", PBS);
    let call = |event: usize| {
        let mut python = command("python3");
        python
            .arg("-B")
            .arg(&hook)
            .env("PYTHONPATH", node.scratch.path())
            .env("EVENT", event.to_string());
        run(python, b"", PATIENCE)
    };
    for (event, answer) in [
        (0, "reject pbs begin: localhost:1: unreachable"),
        (1, "accept"),
        (2, "accept"),
        (3, "reject pbs suspend: localhost:1: unreachable"),
        (4, "reject pbs resume: localhost:1: unreachable"),
        (5, "accept"),
    ] {
        let said = call(event).success().stdout();
        assert!(said.starts_with(answer), "{event}: {said}");
    }
    assert_eq!(node.kept().len(), 2);
    // Not set up: an exception, so that fail_action takes the vnode offline.
    fs::write(&node.config, "").unwrap();
    let failed = call(0);
    assert!(
        !failed.is_success() && failed.stderr().contains("RuntimeError"),
        "{failed}"
    );
}

#[test]
fn the_program_for_htcondor_tells_it_what_to_do_with_the_job() {
    let node = Node::of_system(
        "condor",
        NOBODY,
        "[deadline]\ngeneric-begin = \"2s\"\ngeneric-end = \"2s\"\n",
    );
    let text = fs::read_to_string(&node.config).unwrap();
    fs::write(
        &node.config,
        text.replace("nodes = \"test\"", "pattern = \"*\""),
    )
    .unwrap();
    let prepare = deployed(&node, "htcondor/xman_prepare_job.py");
    let exit = node.scratch.path().join("xman_job_exit");
    std::os::unix::fs::symlink(&prepare, &exit).unwrap();
    let call = |program: &Path, ad: &str| run(bare_command(program), ad.as_bytes(), PATIENCE);
    let ad = "ClusterId = 12\nProcId = 3\nOwner = \"alice\"\nArgs = \"ClusterId = 99\"\n";
    let prepared = call(&prepare, ad).code(1);
    assert!(
        prepared.stdout().contains("HookStatusCode = 369"),
        "{prepared}"
    );
    call(&exit, ad).success();
    let kept = fs::read_to_string(&node.kept()[0]).unwrap();
    assert!(kept.contains("condor/grid/12.3/"), "{kept}");
    call(&prepare, "nothing").code(1);
}

#[test]
fn the_example_of_its_configuration_is_a_good_one() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/hook.toml");
    let node = Node::new(NOBODY, "");
    // Every key that is commented out is one that there is.
    let text = fs::read_to_string(source).unwrap();
    let keys: String = text
        .lines()
        .map(|line| match line.strip_prefix('#') {
            Some(key) if !key.starts_with(' ') => key,
            _ => line,
        })
        .filter(|line| !line.starts_with("map-file"))
        .map(|line| format!("{line}\n"))
        .collect();
    fs::write(
        &node.config,
        keys.replace(
            "/var/lib/xman/hook",
            node.scratch.path().join("queue").to_str().unwrap(),
        ),
    )
    .unwrap();
    let outcome = node.call(&NODE, &["slurm", "prolog"]).code(78);
    // It gets as far as its map, which does not know this node.
    assert!(
        outcome.stderr().contains("no map knows the node 'test'"),
        "{outcome}"
    );
}

/// A host on which the domain `test` takes jobs of Slurm's.
fn farm() -> Host {
    Host::builder()
        .k5login(["alice"])
        .uri("test:///default")
        .config_extra(
            r#"
            [schedule]
            reserve-memory = "1MiB"
            min-run = "1ms"
            [schedule.class.grid]
            domains = ["test"]
            rank = 10
            preempt = "pause"
            [schedule.system.slurm]
            principals = ["slurm/*@XMAN.TEST"]
            domains = ["test"]
            "#,
        )
        .start(Realm::shared())
}

/// The leases there, as their keys.
fn leases(host: &Host) -> Vec<String> {
    let alice = Realm::shared().user("alice");
    let listed = alice
        .rxm(host, ["-o", "json", "lease", "list"])
        .success()
        .json();
    listed
        .as_array()
        .unwrap()
        .iter()
        .map(|row| row["lease"].as_str().unwrap_or_default().to_owned())
        .collect()
}

fn on_controller(job: &'static str, count: &'static str) -> Vec<(&'static str, &'static str)> {
    vec![
        ("SLURM_CLUSTER_NAME", "grid"),
        ("SLURM_JOB_ID", job),
        ("SLURM_JOB_USER", "alice"),
        ("SLURM_JOB_RESTART_COUNT", count),
        ("SLURM_JOB_NODELIST", "test"),
        ("SLURMD_NODENAME", "test"),
    ]
}

#[test]
fn a_job_has_its_room_from_its_prologs_to_its_epilogs_and_comes_back_after_a_requeue() {
    let host = farm();
    let node = Node::new(&host.target(), "");
    let first = on_controller("7", "0");
    for hook in ["prolog-controller", "prolog", "prolog-controller"] {
        let begun = node.call(&first, &["slurm", hook]).success();
        assert!(begun.stderr().contains("has its room"), "{begun}");
        assert_eq!(leases(&host), ["slurm/grid/7/0"]);
    }
    // Slurm has counted the requeue already.
    let counted = on_controller("7", "1");
    node.call(&counted, &["slurm", "epilog"]).success();
    assert!(leases(&host).is_empty());
    node.call(&counted, &["slurm", "epilog-controller"])
        .success();
    assert!(node.kept().is_empty());
    node.call(&counted, &["slurm", "prolog-controller"])
        .success();
    assert_eq!(leases(&host), ["slurm/grid/7/1"]);
    node.call(&counted, &["slurm", "epilog-controller"])
        .success();
    assert!(leases(&host).is_empty());
    // What has ended does not begin again.
    let over = node
        .call(&counted, &["slurm", "prolog-controller"])
        .code(65);
    assert!(over.stderr().contains("has ended already"), "{over}");
    assert!(leases(&host).is_empty());
    node.call(&counted, &["slurm", "prolog"]).success();
}

#[test]
fn an_end_reaches_a_host_that_was_away() {
    let mut host = farm();
    let node = Node::new(&host.target(), QUICK);
    let job = on_controller("7", "0");
    node.call(&job, &["slurm", "prolog-controller"]).success();
    host.kill9();
    node.call(&job, &["slurm", "epilog-controller"]).success();
    assert_eq!(node.kept().len(), 1);
    host.start();
    assert_eq!(leases(&host), ["slurm/grid/7/0"]);
    // The next hook on this machine tells it.
    let next = on_controller("8", "0");
    let begun = node.call(&next, &["slurm", "prolog-controller"]).success();
    assert!(begun.stderr().contains("delivered late"), "{begun}");
    assert!(node.kept().is_empty());
    assert_eq!(leases(&host), ["slurm/grid/8/0"]);
}

#[test]
fn a_host_that_takes_nothing_new_is_refused_for_and_nothing_stays_behind() {
    let host = farm();
    let node = Node::new(&host.target(), QUICK);
    let alice = Realm::shared().user("alice");
    alice
        .rxm(&host, ["maintenance", "on", "--reason", "a fan is broken"])
        .success();
    let job = on_controller("7", "0");
    let refused = node.call(&job, &["slurm", "prolog-controller"]);
    assert!([73, 75].contains(&refused.exit_code()), "{refused}");
    assert!(refused.stderr().contains("a fan is broken"), "{refused}");
    let started = node.call(&job, &["slurm", "prolog"]).success();
    assert!(
        started.stderr().contains("its domain gives way"),
        "{started}"
    );
    assert!(leases(&host).is_empty() && node.kept().is_empty());
    alice.rxm(&host, ["maintenance", "off"]).success();
    node.call(&job, &["slurm", "prolog-controller"]).success();
}

#[test]
fn a_suspended_job_gives_way_and_comes_back_and_its_status_is_one_line() {
    let host = farm();
    let node = Node::new(&host.target(), "");
    let job = ["--job=7", "--run=0", "--node=test"];
    let call = |verb: &str, more: &[&str]| {
        let words = [&["generic", verb][..], &job, more].concat();
        node.call(&[], &words)
    };
    call("begin", &["--user=alice"]).success();
    let line = || {
        let status = node
            .call(&[], &["generic", "status", "--node=test"])
            .success();
        status.stdout().trim().to_owned()
    };
    assert!(line().starts_with("running-preemptible:"), "{}", line());
    call("preempt", &["--reason=tea"]).success();
    assert!(line().starts_with("preempted:"), "{}", line());
    call("preempt", &[]).success();
    call("resume", &[]).success();
    assert!(line().starts_with("running-preemptible:"), "{}", line());
    call("end", &[]).success();
    call("end", &[]).success();
    assert!(leases(&host).is_empty());
}
