//! A Grid Engine: sge_qmaster at the desk of a site, sge_execd in its nodes.

use std::fmt::Write as _;
use std::fs;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use rustix::process::Signal;

use crate::cell::Cell;
use crate::child::{Outcome, PATIENCE, Process, eventually, eventually_or, run, signal_pid};
use crate::image::{Image, Recipe};
use crate::node::{Node, counting};
use crate::scratch::Scratch;
use crate::site::Site;

const IMAGE: Recipe = Recipe {
    name: "gridengine",
    packages: &["gridengine-exec", "netbase"],
    // What people and sge_qmaster run.
    unneeded: &[
        "usr/lib/gridengine/libspoolb",
        "usr/lib/gridengine/q",
        "usr/lib/gridengine/sge_share_mon",
        "usr/lib/gridengine/spool",
        "usr/lib/gridengine/work",
    ],
};

/// Where the packages have put everything.
const ROOT: &str = "/var/lib/gridengine";

/// What a node does when it is up.
const START: &str = "export SGE_ROOT=/var/lib/gridengine SGE_CELL=default
mkdir -p /run/gridengine /var/spool/gridengine/execd
chown -R sgeadmin:sgeadmin /run/gridengine /var/spool/gridengine $SGE_ROOT/default
sge_execd
";

/// Makes a cell of Grid Engine's at the desk: nothing of it is the machine's but programs.
const PREPARE: &str = r#"
set -e
ours=$1
mkdir -p "$ours/lib" "$ours/spool/qmaster/job_scripts" "$ours/spool/spooldb" /run/gridengine
cp -a /var/lib/gridengine/. "$ours/lib"
rm -rf "$ours/lib/default"
mkdir -p "$ours/lib/default/common"
cp /usr/share/gridengine/default-bootstrap "$ours/lib/default/common/bootstrap"
echo desk > "$ours/lib/default/common/act_qmaster"
chown -R sgeadmin:sgeadmin "$ours/lib" "$ours/spool" /run/gridengine
mkdir -p /var/spool/gridengine
mount --bind "$ours/lib" /var/lib/gridengine
mount --bind "$ours/spool" /var/spool/gridengine
exec setpriv --reuid=sgeadmin --regid=sgeadmin --clear-groups \
    /usr/share/gridengine/scripts/init_cluster /var/lib/gridengine default /var/spool/gridengine/spooldb sgeadmin
"#;

/// A queue; `qname` and `hostlist` come before it, and what a test has set takes the place of what is here.
const QUEUE: &str = "seq_no                0
load_thresholds       NONE
suspend_thresholds    NONE
nsuspend              1
suspend_interval      00:05:00
priority              0
min_cpu_interval      00:05:00
processors            UNDEFINED
qtype                 BATCH
ckpt_list             NONE
pe_list               NONE
rerun                 TRUE
slots                 1
tmpdir                /tmp
shell                 /bin/sh
prolog                NONE
epilog                NONE
shell_start_mode      unix_behavior
starter_method        NONE
suspend_method        NONE
resume_method         NONE
terminate_method      NONE
notify                00:00:60
owner_list            NONE
user_lists            NONE
xuser_lists           NONE
subordinate_list      NONE
complex_values        NONE
projects              NONE
xprojects             NONE
calendar              NONE
initial_state         default
s_rt                  INFINITY
h_rt                  INFINITY
s_cpu                 INFINITY
h_cpu                 INFINITY
s_fsize               INFINITY
h_fsize               INFINITY
s_data                INFINITY
h_data                INFINITY
s_stack               INFINITY
h_stack               INFINITY
s_core                INFINITY
h_core                INFINITY
s_rss                 INFINITY
h_rss                 INFINITY
s_vmem                INFINITY
h_vmem                INFINITY
";

/// The queues, on all nodes.
const QUEUES: [&str; 2] = ["low.q", "high.q"];

/// A Grid Engine on a site.
#[derive(Debug)]
pub struct GridEngine {
    nodes: Vec<Node>,
    master: Option<(Process, u32)>,
    desk: Arc<Cell>,
    scratch: Scratch,
}

/// A Grid Engine that is being prepared.
#[derive(Debug)]
#[must_use]
pub struct GridEngineBuilder {
    nodes: Vec<Node>,
    queue: Vec<(String, String)>,
    config: Vec<(String, String)>,
}

impl GridEngine {
    /// Begins a Grid Engine without nodes and methods. Its queues are `low.q` and `high.q`, each with one slot on each node.
    pub fn builder() -> GridEngineBuilder {
        let config = [("load_report_time", "00:00:02"), ("mailer", "/bin/true")];
        GridEngineBuilder {
            nodes: Vec::new(),
            queue: Vec::new(),
            config: config.map(|(key, value)| (key.into(), value.into())).into(),
        }
    }

    /// Returns a node.
    #[track_caller]
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        let found = self.nodes.iter().find(|node| node.name() == name);
        found.unwrap_or_else(|| panic!("there is no node {name}"))
    }

    /// Returns a command of Grid Engine's at the desk, run by somebody who has an account there.
    #[track_caller]
    #[must_use]
    pub fn command_as(&self, account: &str, name: &str) -> Command {
        let mut command = self.desk.command("setpriv");
        command
            .args(["--reuid", account, "--regid", account, "--clear-groups"])
            .arg(name)
            .env("SGE_ROOT", ROOT)
            .env("SGE_CELL", "default")
            .env("HOME", "/tmp");
        command
    }

    /// Runs `qsub` as alice, with this script as the job, and returns the job's number.
    #[track_caller]
    pub fn qsub(&self, args: &[&str], script: &str) -> u32 {
        let said = self.try_qsub(args, script).success().stdout();
        said.trim()
            .parse()
            .unwrap_or_else(|e| panic!("qsub said {said:?}: {e}"))
    }

    /// Runs `qsub` as alice.
    #[track_caller]
    pub fn try_qsub(&self, args: &[&str], script: &str) -> Outcome {
        let mut qsub = self.command_as("alice", "qsub");
        qsub.args(["-terse", "-wd", "/tmp", "-j", "y"]).args(args);
        run(qsub, script.as_bytes(), PATIENCE)
    }

    /// Submits a job of alice's that counts to `last`, ten times a second, on the serial line of this node, in this queue.
    #[track_caller]
    pub fn count_on(&self, node: &str, queue: &str, last: u32) -> u32 {
        let place = format!("{queue}@{node}");
        self.qsub(&["-q", &place], &counting(last))
    }

    /// Runs a command as Grid Engine's administrator.
    #[track_caller]
    pub fn administer(&self, name: &str, args: &[&str]) -> Outcome {
        let mut command = self.command_as("sgeadmin", name);
        command.args(args);
        run(command, b"", PATIENCE)
    }

    /// Returns the letters of a job's state in `qstat`, e.g. `qw`, `r`, `s`, `Eqw`; empty when it has ended.
    #[track_caller]
    #[must_use]
    pub fn job_state(&self, job: u32) -> String {
        let listed = self.administer("qstat", &["-u", "*"]).success().stdout();
        let job = job.to_string();
        let line = listed
            .lines()
            .map(|line| line.split_whitespace().collect::<Vec<_>>())
            .find(|words| words.first() == Some(&job.as_str()));
        let state = line.and_then(|words| words.get(4).copied());
        state.unwrap_or_default().to_owned()
    }

    /// Returns the letters of the state of a queue on a node in `qstat -f`: empty when all is well, `au` for a silent node, `S` for one
    /// that gives way, `E` for one whose prolog has failed.
    #[track_caller]
    #[must_use]
    pub fn queue_state(&self, queue: &str, node: &str) -> String {
        let place = format!("{queue}@{node}");
        let listed = self.administer("qstat", &["-f", "-q", &place]);
        let listed = listed.success().stdout();
        let line = listed.lines().find(|line| line.starts_with(&place));
        let line = line.unwrap_or_else(|| panic!("no {place} in:\n{listed}"));
        line.split_whitespace()
            .nth(5)
            .unwrap_or_default()
            .to_owned()
    }

    /// Waits until a job is in this state.
    #[track_caller]
    pub fn wait_job(&self, job: u32, state: &str, limit: Duration) {
        let what = || {
            let (is, log) = (self.job_state(job), self.log());
            format!("job {job} is {state:?}, not {is:?}, in qstat; sge_qmaster said\n{log}")
        };
        eventually_or(what, limit, || self.job_state(job) == state);
    }

    /// Waits until a queue on a node is in this state.
    #[track_caller]
    pub fn wait_queue(&self, queue: &str, node: &str, state: &str, limit: Duration) {
        let what = || {
            let (is, log) = (self.queue_state(queue, node), self.log());
            let said = self.node(node).guest().last_words();
            format!(
                "{queue}@{node} is {state:?}, not {is:?}, in qstat; sge_qmaster said\n{log}\n{node} said\n{said}"
            )
        };
        eventually_or(what, limit, || self.queue_state(queue, node) == state);
    }

    /// Kills sge_qmaster as a crash does.
    #[track_caller]
    pub fn kill9(&mut self) {
        let (mut process, pid) = self.master.take().expect("sge_qmaster was started");
        signal_pid(pid, Signal::KILL);
        let _ = process.wait(PATIENCE);
    }

    /// Starts sge_qmaster again after [`GridEngine::kill9`], and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        let root = format!("SGE_ROOT={ROOT}");
        let words = [
            &root,
            "SGE_CELL=default",
            "SGE_ND=1",
            "setpriv",
            "--reuid=sgeadmin",
            "--regid=sgeadmin",
            "--clear-groups",
            "sge_qmaster",
        ];
        self.master = Some(self.desk.start_within("env", &words));
        eventually("sge_qmaster answers", PATIENCE, || {
            let (process, _) = self.master.as_mut().expect("just started");
            if let Some(outcome) = process.outcome() {
                panic!("sge_qmaster gave up: {outcome}\n{}", self.log());
            }
            self.administer("qconf", &["-sm"])
                .is_success()
                .then_some(())
        });
    }

    /// Returns what sge_qmaster has written to its log.
    #[must_use]
    pub fn log(&self) -> String {
        let log = self.scratch.path().join("spool/qmaster/messages");
        fs::read_to_string(log).unwrap_or_default()
    }

    /// Writes a file for qconf and lets it read that.
    #[track_caller]
    fn configure(&self, option: &str, name: &str, text: &str) {
        // qconf takes the file's name for that of the thing.
        let file = self.scratch.write(name, text);
        let file = file.display().to_string();
        self.administer("qconf", &[option, &file]).success();
    }
}

impl Drop for GridEngine {
    fn drop(&mut self) {
        // It would go on in the desk's cell.
        if let Some((_, pid)) = self.master {
            signal_pid(pid, Signal::KILL);
        }
    }
}

impl GridEngineBuilder {
    /// Adds a node.
    pub fn node(mut self, node: Node) -> Self {
        self.nodes.push(node);
        self
    }

    /// Sets an attribute of both queues (queue_conf(5)), e.g. `suspend_method` to the path of a [`Node::file`] with its arguments.
    pub fn queue(mut self, attribute: &str, value: &str) -> Self {
        self.queue.push((attribute.to_owned(), value.to_owned()));
        self
    }

    /// Sets a parameter of the whole cluster (sge_conf(5)), e.g. `max_unheard`, after which a silent node is unknown.
    pub fn config(mut self, parameter: &str, value: &str) -> Self {
        self.config.push((parameter.to_owned(), value.to_owned()));
        self
    }

    /// Starts all nodes and daemons, and waits until all queues take jobs.
    #[track_caller]
    #[must_use]
    pub fn start(self, site: &Site) -> GridEngine {
        let mut nodes = self.nodes;
        let numbers = site.introduce(&mut nodes);
        let image = Image::cached(&IMAGE);
        let desk = Arc::clone(site.desk());
        let scratch = Scratch::new("gridengine");
        let mut prepare = desk.command("sh");
        prepare.args(["-c", PREPARE, "sh"]).arg(scratch.path());
        run(prepare, b"", PATIENCE).success();
        let common = scratch.path().join("lib/default/common");
        let bootstrap = fs::read(common.join("bootstrap")).expect("just prepared");
        for (node, number) in nodes.iter_mut().zip(numbers) {
            node.put("/etc/lab/start", 0o644, START);
            let common = format!("{ROOT}/default/common");
            node.put(&format!("{common}/act_qmaster"), 0o644, "desk\n");
            node.put(&format!("{common}/bootstrap"), 0o644, &bootstrap);
            node.complete(&image, number);
        }
        let mut engine = GridEngine {
            nodes,
            master: None,
            desk,
            scratch,
        };
        engine.start();
        engine.prepare(&self.config, &self.queue);
        site.run_nodes(&engine.nodes.iter().collect::<Vec<_>>());
        for node in &engine.nodes {
            for queue in QUEUES {
                engine.wait_queue(queue, node.name(), "", PATIENCE);
            }
        }
        engine
    }
}

impl GridEngine {
    /// Tells sge_qmaster about hosts, queues and all that is set.
    #[track_caller]
    fn prepare(&self, config: &[(String, String)], queue: &[(String, String)]) {
        let shown = self.administer("qconf", &["-sconf", "global"]).success();
        self.configure("-Mconf", "global", &with(&shown.stdout(), config));
        let shown = self.administer("qconf", &["-ssconf"]).success();
        // At once, rather than at the next turn.
        let quick = [
            ("schedule_interval", "0:0:1"),
            ("flush_submit_sec", "1"),
            ("flush_finish_sec", "1"),
        ];
        let quick = quick.map(|(key, value)| (key.to_owned(), value.to_owned()));
        self.configure("-Msconf", "scheduler", &with(&shown.stdout(), &quick));
        let names: Vec<_> = self.nodes.iter().map(Node::name).collect();
        for name in &names {
            self.administer("qconf", &["-ah", name]).success();
        }
        self.administer("qconf", &["-as", "desk"]).success();
        for name in QUEUES {
            let mut text = format!("qname {name}\nhostlist {}\n", names.join(" "));
            text.push_str(&with(QUEUE, queue));
            self.configure("-Aq", name, &text);
        }
    }
}

/// Returns a configuration in which these parameters have these values.
fn with(text: &str, set: &[(String, String)]) -> String {
    let is_set = |line: &&str| {
        let key = line.split_whitespace().next().unwrap_or_default();
        set.iter().any(|(name, _)| name == key)
    };
    let mut changed: String = text
        .lines()
        .filter(|line| !is_set(line) && !line.starts_with('#'))
        .fold(String::new(), |all, line| all + line + "\n");
    for (name, value) in set {
        writeln!(changed, "{name} {value}").expect("a string takes everything");
    }
    changed
}
