//! A Slurm: slurmctld at the desk of a site, slurmd in its nodes, munge in both.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;

use crate::cell::Cell;
use crate::child::{Outcome, PATIENCE, Process, eventually, eventually_or, run, signal_pid};
use crate::image::{Image, Recipe};
use crate::node::{Node, counting, make_executable};
use crate::scratch::Scratch;
use crate::site::Site;

const IMAGE: Recipe = Recipe {
    name: "slurm",
    packages: &["munge", "slurmd"],
    unneeded: &[],
};

/// What a node does when it is up.
///
/// Older packages have two kinds of slurmd, between which their installation decides. slurmd looks at how groups of processes are mounted, though it is not
/// to use them.
const START: &str = "mkdir -p /var/lib/munge /var/log/munge /var/spool/slurmd
for name in slurmd slurmstepd; do [ -e /usr/sbin/$name ] || ln -s $name-wlm /usr/sbin/$name; done
mount -t tmpfs tmpfs /sys/fs/cgroup
mkdir /sys/fs/cgroup/systemd
mount -t cgroup -o none,name=systemd systemd /sys/fs/cgroup/systemd
chown munge:munge /run/munge /run/munge/key /var/lib/munge /var/log/munge
start-stop-daemon --start --chuid munge --exec /usr/sbin/munged -- \\
    --key-file=/run/munge/key --seed-file=/run/munge/seed --log-file=/run/munge/log --pid-file=/run/munge/pid
slurmd -f /etc/slurm/slurm.conf -L /var/log/slurmd.log
";

/// Where munge's own files are, at the desk and in the nodes.
const MUNGE: &str = "/run/munge";

/// How long a Slurm may take from the start of its nodes until they take jobs.
const BOOTS_WITHIN: Duration = PATIENCE;

/// A Slurm on a site.
#[derive(Debug)]
pub struct Slurm {
    nodes: Vec<Node>,
    munged: (Process, u32),
    controller: Option<(Process, u32)>,
    desk: Arc<Cell>,
    scratch: Scratch,
}

/// A Slurm that is being prepared.
#[derive(Debug)]
#[must_use]
pub struct SlurmBuilder {
    nodes: Vec<Node>,
    /// The names of those that are off.
    cloud: Vec<String>,
    slurmd_timeout: u32,
    config: String,
    node_hooks: Vec<(&'static str, String)>,
    controller_hooks: Vec<(&'static str, String)>,
}

impl Slurm {
    /// Begins a Slurm without nodes and hooks, which calls a node down that has been silent for five minutes. Its partitions are `low`
    /// and, with the higher priority, `high`.
    pub fn builder() -> SlurmBuilder {
        SlurmBuilder {
            nodes: Vec::new(),
            cloud: Vec::new(),
            slurmd_timeout: 300,
            config: String::new(),
            node_hooks: Vec::new(),
            controller_hooks: Vec::new(),
        }
    }

    /// Returns a node.
    #[track_caller]
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.unwrap_or_else(|| panic!("there is no node {name}"))
    }

    /// Returns a command of Slurm's at the desk, as root.
    #[track_caller]
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let mut command = self.desk.command(name);
        command.env("SLURM_CONF", self.conf());
        command
    }

    /// Runs `sbatch` as alice, with this script as the job, and returns the job's number.
    #[track_caller]
    pub fn sbatch(&self, args: &[&str], script: &str) -> u32 {
        let said = self.try_sbatch(args, script).success().stdout();
        let number = said.trim().split(';').next().unwrap_or_default();
        number
            .parse()
            .unwrap_or_else(|e| panic!("sbatch said {said:?}: {e}"))
    }

    /// Runs `sbatch` as alice.
    #[track_caller]
    pub fn try_sbatch(&self, args: &[&str], script: &str) -> Outcome {
        let mut sbatch = self.desk.command("setpriv");
        sbatch
            .args(["--reuid=alice", "--regid=alice", "--clear-groups", "sbatch"])
            .args(["--parsable", "--chdir=/tmp"])
            .args(args)
            .env("SLURM_CONF", self.conf())
            .env("HOME", "/tmp");
        run(sbatch, script.as_bytes(), PATIENCE)
    }

    /// Submits a job of alice's that counts to `last`, ten times a second, on the serial line of this node, in this partition.
    #[track_caller]
    pub fn count_on(&self, node: &str, partition: &str, last: u32) -> u32 {
        let script = counting(last);
        self.sbatch(&["-p", partition, "-w", node], &script)
    }

    /// Runs `scontrol` as root.
    #[track_caller]
    pub fn scontrol(&self, args: &[&str]) -> Outcome {
        self.ask("scontrol", args)
    }

    /// Runs `squeue` as root, without its heading.
    #[track_caller]
    pub fn squeue(&self, args: &[&str]) -> Outcome {
        self.ask("squeue", &[&["-h"], args].concat())
    }

    /// Runs `sinfo` as root, without its heading.
    #[track_caller]
    pub fn sinfo(&self, args: &[&str]) -> Outcome {
        self.ask("sinfo", &[&["-h"], args].concat())
    }

    /// Runs `scancel` as root.
    #[track_caller]
    pub fn scancel(&self, job: u32) {
        self.ask("scancel", &[&job.to_string()]).success();
    }

    /// Returns the state of a job, e.g. `PENDING`, `RUNNING` or `COMPLETED`.
    #[track_caller]
    #[must_use]
    pub fn job_state(&self, job: u32) -> String {
        self.job(job, "JobState")
    }

    /// Returns a word that `scontrol show job` has for a job, e.g. `Restarts` or `Reason`; empty where it has none.
    #[track_caller]
    #[must_use]
    pub fn job(&self, job: u32, key: &str) -> String {
        let shown = self.scontrol(&["show", "job", &job.to_string()]);
        word(&shown.success().stdout(), key)
    }

    /// Returns the state of a node in Slurm's words, e.g. `IDLE`, `ALLOCATED`, `DOWN*+DRAIN`.
    #[track_caller]
    #[must_use]
    pub fn node_state(&self, node: &str) -> String {
        let shown = self.scontrol(&["show", "node", node]);
        word(&shown.success().stdout(), "State")
    }

    /// Waits until a job is in this state.
    #[track_caller]
    pub fn wait_job(&self, job: u32, state: &str, limit: Duration) {
        let what = || format!("job {job} is {state}; slurmctld said\n{}", self.log());
        eventually_or(what, limit, || self.job_state(job) == state);
    }

    /// Waits until a node's state begins with this word.
    #[track_caller]
    pub fn wait_node(&self, node: &str, state: &str, limit: Duration) {
        let what = || {
            let (is, log) = (self.node_state(node), self.log());
            let said = self.node(node).guest().last_words();
            format!("{node} is {state}, not {is}; slurmctld said\n{log}\n{node} said\n{said}")
        };
        eventually_or(what, limit, || self.node_state(node).starts_with(state));
    }

    /// Makes slurmctld wait so many seconds for silent nodes from now on, for ever with 0, by its own slurm.conf and `scontrol reconfigure`.
    #[track_caller]
    pub fn set_slurmd_timeout(&self, seconds: u32) {
        let conf = fs::read_to_string(self.conf()).expect("our own file");
        let lines: String = conf
            .lines()
            .filter(|line| !line.starts_with("SlurmdTimeout="))
            .fold(String::new(), |all, line| all + line + "\n");
        let conf = format!("SlurmdTimeout={seconds}\n{lines}");
        self.scratch.write("slurm.conf", conf);
        self.scontrol(&["reconfigure"]).success();
    }

    /// Replaces a program that slurmctld runs at the desk, with which it must have been built.
    #[track_caller]
    pub fn rewrite_hook(&self, name: &str, script: &str) {
        let path = self.scratch.write(&format!("{name}.new"), script);
        make_executable(&path);
        fs::rename(path, self.scratch.path().join(name)).expect("our own folder");
    }

    /// Returns what slurmctld has said since its last start.
    #[must_use]
    pub fn log(&self) -> String {
        let said = self.controller.as_ref();
        said.map_or(String::new(), |(process, _)| process.stderr().text())
    }

    /// Returns the folder of the controller's files, with its hooks in it. Nothing else writes there a file whose name begins with
    /// `test-`.
    #[must_use]
    pub fn folder(&self) -> &std::path::Path {
        self.scratch.path()
    }

    /// Returns the path of slurm.conf.
    #[must_use]
    pub fn conf(&self) -> PathBuf {
        self.scratch.path().join("slurm.conf")
    }

    /// Kills slurmctld as a crash does.
    #[track_caller]
    pub fn kill9(&mut self) {
        let (mut process, pid) = self.controller.take().expect("slurmctld was started");
        signal_pid(pid, Signal::KILL);
        let _ = process.wait(PATIENCE);
    }

    /// Starts slurmctld again after [`Slurm::kill9`], from the state that it had saved, and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        let conf = self.conf().display().to_string();
        let controller = self
            .desk
            .start_within("slurmctld", &["-D", "-i", "-f", &conf]);
        self.controller = Some(controller);
        eventually("slurmctld answers", PATIENCE, || {
            let (process, _) = self.controller.as_mut().expect("just started");
            if let Some(outcome) = process.outcome() {
                panic!("slurmctld gave up: {outcome}");
            }
            self.scontrol(&["ping"])
                .stdout()
                .contains(" is UP")
                .then_some(())
        });
    }

    #[track_caller]
    fn ask(&self, name: &str, args: &[&str]) -> Outcome {
        let mut command = self.command(name);
        command.args(args);
        run(command, b"", PATIENCE)
    }
}

impl Drop for Slurm {
    fn drop(&mut self) {
        // They would go on in the desk's cell.
        for (_, pid) in self.controller.iter().chain([&self.munged]) {
            signal_pid(*pid, Signal::KILL);
        }
    }
}

impl SlurmBuilder {
    /// Adds a node.
    pub fn node(mut self, node: Node) -> Self {
        self.nodes.push(node);
        self
    }

    /// Adds a node that is defined and off: Slurm's power saving has it started by `ResumeProgram` when a job needs it, and waits until
    /// slurmd there answers.
    pub fn cloud_node(mut self, node: Node) -> Self {
        self.cloud.push(node.name().to_owned());
        self.node(node)
    }

    /// Makes Slurm call a node down that has been silent for so many seconds.
    pub fn slurmd_timeout(mut self, seconds: u32) -> Self {
        self.slurmd_timeout = seconds;
        self
    }

    /// Adds lines to slurm.conf, on all nodes and at the desk.
    pub fn config(mut self, lines: &str) -> Self {
        self.config.push_str(lines);
        self.config.push('\n');
        self
    }

    /// Makes this script one of the programs that slurmd runs in the nodes, as root: `Prolog`, `Epilog`, `HealthCheckProgram`. A prolog runs at
    /// once when a job gets the node.
    pub fn hook_in_nodes(mut self, name: &'static str, script: &str) -> Self {
        self.node_hooks.push((name, script.to_owned()));
        if name == "Prolog" {
            self.config("PrologFlags=Alloc")
        } else {
            self
        }
    }

    /// Makes this script one of the programs that slurmctld runs at the desk, as root: `PrologSlurmctld`, `EpilogSlurmctld`, `ResumeProgram`,
    /// `SuspendProgram`. [`Slurm::rewrite_hook`] replaces it.
    pub fn hook_at_desk(mut self, name: &'static str, script: &str) -> Self {
        self.controller_hooks.push((name, script.to_owned()));
        self
    }

    /// Starts all nodes and daemons, and waits until all nodes are idle.
    #[track_caller]
    #[must_use]
    pub fn start(self, site: &Site) -> Slurm {
        let scratch = Scratch::new("slurm");
        let mut nodes = self.nodes;
        let numbers = site.introduce(&mut nodes);
        let mut conf = format!(
            "ClusterName=lab
SlurmctldHost=desk(10.77.0.254)
SlurmUser=root
AuthType=auth/munge
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir=/var/spool/slurmd
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
SlurmdTimeout={timeout}
{config}
",
            folder = scratch.path().display(),
            timeout = self.slurmd_timeout,
            config = self.config,
        );
        for (name, script) in &self.controller_hooks {
            let path = scratch.write(name, script);
            make_executable(&path);
            conf.push_str(&format!("{name}={}\n", path.display()));
        }
        for (name, _) in &self.node_hooks {
            conf.push_str(&format!("{name}=/etc/slurm/{name}\n"));
        }
        for (node, number) in nodes.iter().zip(&numbers) {
            let name = node.name();
            let state = if self.cloud.iter().any(|off| off == name) {
                "CLOUD"
            } else {
                "UNKNOWN"
            };
            conf.push_str(&format!(
                "NodeName={name} NodeAddr=10.77.0.{number} CPUs={} RealMemory=64 State={state}\n",
                Site::CPUS
            ));
        }
        for (partition, priority, default) in [("low", 10, "YES"), ("high", 20, "NO")] {
            conf.push_str(&format!(
                "PartitionName={partition} Nodes=ALL PriorityTier={priority} Default={default}\n"
            ));
        }
        scratch.write("slurm.conf", &conf);
        fs::create_dir(scratch.path().join("state")).expect("our own folder");

        let image = Image::cached(&IMAGE);
        let key: Vec<u8> = (0..8)
            .flat_map(|_| uuid::Uuid::new_v4().into_bytes())
            .collect();
        for (node, number) in nodes.iter_mut().zip(numbers) {
            node.put("/etc/lab/start", 0o644, START);
            node.put("/etc/slurm/slurm.conf", 0o644, &conf);
            node.put("/run/munge/key", 0o400, &key);
            for (name, script) in &self.node_hooks {
                node.put(&format!("/etc/slurm/{name}"), 0o755, script);
            }
            node.complete(&image, number);
        }
        let desk = Arc::clone(site.desk());
        let mut slurm = Slurm {
            nodes,
            munged: start_munged(&desk, &key),
            controller: None,
            desk,
            scratch,
        };
        slurm.start();
        let (off, on): (Vec<_>, Vec<_>) = slurm
            .nodes
            .iter()
            .partition(|node| self.cloud.iter().any(|off| off == node.name()));
        for node in off {
            site.alpha.define(node.guest());
        }
        site.run_nodes(&on);
        for node in on {
            slurm.wait_node(node.name(), "IDLE", BOOTS_WITHIN);
        }
        slurm
    }
}

/// Starts munged at the desk, and waits until it answers.
#[track_caller]
fn start_munged(desk: &Cell, key: &[u8]) -> (Process, u32) {
    let folder = desk.outside(MUNGE);
    fs::create_dir_all(&folder).expect("our own folder");
    fs::write(folder.join("key"), key).expect("our own folder");
    let mut own = desk.command("sh");
    own.args([
        "-c",
        "chmod 400 /run/munge/key && chown -R munge:munge /run/munge",
    ]);
    run(own, b"", PATIENCE).success();
    let munged = [
        "--reuid=munge",
        "--regid=munge",
        "--clear-groups",
        "munged",
        "--foreground",
        "--key-file=/run/munge/key",
        "--seed-file=/run/munge/seed",
        "--pid-file=/run/munge/pid",
    ];
    let mut daemon = desk.start_within("setpriv", &munged);
    let socket = folder.join("munge.socket.2");
    eventually("munged answers", PATIENCE, || {
        if let Some(outcome) = daemon.0.outcome() {
            panic!("munged gave up: {outcome}");
        }
        socket.exists().then_some(())
    });
    daemon
}

/// Returns the word behind `KEY=` in what scontrol shows.
fn word(shown: &str, key: &str) -> String {
    let begin = format!("{key}=");
    let found = shown
        .split_whitespace()
        .find_map(|word| word.strip_prefix(&begin));
    found.unwrap_or_default().to_owned()
}
