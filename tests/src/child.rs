//! Child processes that never outlive the test binary, not even when it is killed.
//!
//! The kernel ends a child when the *thread* that started it ends (`PR_SET_PDEATHSIG`), and every
//! test has a thread of its own. So all children are started by one thread that lives as long as
//! the process: the nursery.

use std::ffi::OsStr;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

/// How long anything in the lab may take before the test fails, unless said otherwise.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// Pause between two looks at a thing that can only be polled.
const POLL: Duration = Duration::from_millis(10);

/// Returns the path of an installed program; fails the test with the package's name if it is missing.
#[track_caller]
#[must_use]
pub fn program(name: &str) -> PathBuf {
    const FOLDERS: [&str; 6] = [
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
        "/sbin",
        "/bin",
    ];
    FOLDERS
        .iter()
        .map(|folder| Path::new(folder).join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| {
            panic!(
                "{name} is missing: install {}, or run deploy/setup.sh",
                package_of(name)
            )
        })
}

fn package_of(program: &str) -> &str {
    match program {
        "krb5kdc" | "kdb5_util" => "krb5-kdc",
        "kadmin.local" => "krb5-admin-server",
        "kinit" | "klist" | "kvno" | "kdestroy" => "krb5-user",
        "man" => "man-db",
        "pgrep" => "procps",
        "stty" => "coreutils",
        "systemd-analyze" => "systemd",
        "libvirtd" => "libvirt-daemon (and libvirt-daemon-system)",
        "virtlogd" => "libvirt-daemon-log (libvirt-daemon in older suites)",
        "virsh" => "libvirt-clients",
        "qemu-system-x86_64" => "qemu-system-x86",
        "busybox" => "busybox-static",
        "ip" => "iproute2",
        "dpkg" | "apt-get" | "apt-cache" => "apt (the lab needs Debian or a child of it)",
        "script" | "setpriv" | "setsid" | "unshare" | "nsenter" | "mount" => "util-linux",
        "sbatch" | "scancel" | "scontrol" | "sinfo" | "squeue" => "slurm-client",
        "ldd" => "libc-bin",
        "munged" => "munge",
        "strip" => "binutils",
        "sge_qmaster" => "gridengine-master",
        "qconf" | "qdel" | "qhost" | "qmod" | "qstat" | "qsub" => "gridengine-client",
        other => other,
    }
}

/// Returns a command for an installed program with an empty environment but for `PATH` and a plain locale.
/// The program dies with the test binary.
#[track_caller]
#[must_use]
pub fn command(name: &str) -> Command {
    let mut command = bare_command(&program(name));
    command
        .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
        .env("LC_ALL", "C");
    command
}

/// Returns a command for an executable with an empty environment.
/// The program dies with the test binary.
#[track_caller]
#[must_use]
pub fn bare_command(executable: &Path) -> Command {
    let mut command = Command::new(program("setpriv"));
    command
        .args(["--pdeathsig", "KILL", "--"])
        .arg(executable)
        .env_clear();
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    command
}

/// Returns the path of a program of this workspace, as built in the profile of the running test.
#[track_caller]
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let path = profile_folder().join(name);
    assert!(
        path.is_file(),
        "{} is missing: run `make build` first",
        path.display()
    );
    path
}

/// Returns `target/<profile>`, where the running test binary was built.
pub(crate) fn profile_folder() -> PathBuf {
    let exe = std::env::current_exe().expect("a running program has a path");
    let folder = exe.parent().expect("a program lies in a folder");
    if folder.ends_with("deps") || folder.ends_with("examples") {
        folder
            .parent()
            .expect("deps lies in a profile's folder")
            .to_owned()
    } else {
        folder.to_owned()
    }
}

type Birth = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a child from the nursery thread.
#[track_caller]
pub(crate) fn spawn(command: Command) -> Child {
    static NURSERY: OnceLock<Mutex<mpsc::Sender<Birth>>> = OnceLock::new();
    let nursery = NURSERY.get_or_init(|| {
        let (births, orders) = mpsc::channel::<Birth>();
        thread::spawn(move || {
            for (mut command, reply) in orders {
                let _ = reply.send(command.spawn());
            }
        });
        Mutex::new(births)
    });
    let what = format!("{command:?}");
    let (reply, born) = mpsc::channel();
    lock(nursery)
        .send((command, reply))
        .expect("the nursery lives as long as the process");
    born.recv()
        .expect("the nursery answers")
        .unwrap_or_else(|e| panic!("cannot start {what}: {e}"))
}

/// Locks, also after another test has panicked while it held the lock.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until `look` finds something; fails the test when `limit` has passed.
#[track_caller]
pub fn eventually<T>(what: &str, limit: Duration, mut look: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + limit;
    loop {
        if let Some(found) = look() {
            return found;
        }
        assert!(
            Instant::now() < end,
            "did not happen within {limit:?}: {what}"
        );
        thread::sleep(POLL);
    }
}

/// Waits until something is so, and describes only when it did not come true what should have.
#[track_caller]
pub(crate) fn eventually_or(
    what: impl Fn() -> String,
    limit: Duration,
    mut is_so: impl FnMut() -> bool,
) {
    let end = Instant::now() + limit;
    while !is_so() {
        if Instant::now() >= end {
            panic!("did not happen within {limit:?}: {}", what());
        }
        thread::sleep(10 * POLL);
    }
}

/// Everything that a stream has said so far; grows on its own until the stream ends.
#[derive(Clone, Debug)]
pub struct Transcript(Arc<(Mutex<Said>, Condvar)>);

#[derive(Debug, Default)]
struct Said {
    bytes: Vec<u8>,
    ended: bool,
}

impl Transcript {
    pub(crate) fn of(mut stream: impl Read + Send + 'static) -> Self {
        let transcript = Self(Arc::new((Mutex::new(Said::default()), Condvar::new())));
        let writer = transcript.clone();
        thread::spawn(move || {
            let mut buffer = [0; 8192];
            loop {
                let got = stream.read(&mut buffer);
                let mut said = lock(&writer.0.0);
                match got {
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Ok(0) | Err(_) => said.ended = true,
                    Ok(n) => said.bytes.extend_from_slice(&buffer[..n]),
                }
                writer.0.1.notify_all();
                if said.ended {
                    return;
                }
            }
        });
        transcript
    }

    /// Returns what was said so far.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&lock(&self.0.0).bytes).into_owned()
    }

    /// Returns the bytes said so far.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        lock(&self.0.0).bytes.clone()
    }

    /// Returns how many bytes were said so far.
    #[must_use]
    pub fn length(&self) -> usize {
        lock(&self.0.0).bytes.len()
    }

    /// Waits until `look` finds something in the text; `None` when the stream ended or `limit` passed before.
    pub fn find<T>(&self, limit: Duration, mut look: impl FnMut(&str) -> Option<T>) -> Option<T> {
        let end = Instant::now() + limit;
        let mut said = lock(&self.0.0);
        loop {
            if let Some(found) = look(&String::from_utf8_lossy(&said.bytes)) {
                return Some(found);
            }
            let left = end.saturating_duration_since(Instant::now());
            if said.ended || left.is_zero() {
                return None;
            }
            said = self
                .0
                .1
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits until `text` was said; fails the test, showing what was said instead, when `limit` has passed.
    #[track_caller]
    pub fn wait_for(&self, limit: Duration, text: &str) {
        let found = self.find(limit, |said| said.contains(text).then_some(()));
        assert!(
            found.is_some(),
            "{text:?} was not said within {limit:?}, but:\n{}",
            self.text()
        );
    }

    fn wait_end(&self, limit: Duration) {
        let end = Instant::now() + limit;
        let mut said = lock(&self.0.0);
        while !said.ended {
            let left = end.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            said = self
                .0
                .1
                .wait_timeout(said, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }
}

/// A child process that goes on by itself, and is killed when this value is dropped.
#[derive(Debug)]
pub struct Process {
    what: String,
    child: Child,
    stdout: Transcript,
    stderr: Transcript,
    stdin: Option<std::process::ChildStdin>,
}

impl Process {
    /// Starts `command`, which came from [`command`] or [`bare_command`].
    #[track_caller]
    #[must_use]
    pub fn start(command: Command) -> Self {
        let what = spelled(&command);
        let mut child = spawn(command);
        let stdout = match child.stdout.take() {
            Some(stream) => Transcript::of(stream),
            None => Transcript::of(io::empty()),
        };
        let stderr = match child.stderr.take() {
            Some(stream) => Transcript::of(stream),
            None => Transcript::of(io::empty()),
        };
        let stdin = child.stdin.take();
        Self {
            what,
            child,
            stdout,
            stderr,
            stdin,
        }
    }

    /// Returns the process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns what the process has written to its standard output.
    #[must_use]
    pub fn stdout(&self) -> &Transcript {
        &self.stdout
    }

    /// Returns what the process has written to its standard error.
    #[must_use]
    pub fn stderr(&self) -> &Transcript {
        &self.stderr
    }

    /// Writes to the process's standard input, which must have been piped.
    #[track_caller]
    pub fn say(&mut self, text: impl AsRef<[u8]>) {
        let stdin = self.stdin.as_mut().expect("standard input is piped");
        stdin
            .write_all(text.as_ref())
            .and_then(|()| stdin.flush())
            .expect("the process reads its input");
    }

    /// Closes the process's standard input.
    pub fn hush(&mut self) {
        self.stdin = None;
    }

    /// Sends a signal; does nothing when the process has ended.
    pub fn signal(&self, signal: Signal) {
        signal_pid(self.pid(), signal);
    }

    /// Returns whether the process still runs.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for the end of the process; fails the test when `limit` has passed.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> Outcome {
        let end = Instant::now() + limit;
        loop {
            if let Some(outcome) = self.outcome() {
                return outcome;
            }
            if Instant::now() >= end {
                let _ = self.child.kill();
                let _ = self.child.wait();
                panic!(
                    "{} did not end within {limit:?}\nstdout: {}\nstderr: {}",
                    self.what,
                    self.stdout.text(),
                    self.stderr.text()
                );
            }
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Returns the outcome if the process has ended.
    pub fn outcome(&mut self) -> Option<Outcome> {
        let status = self.child.try_wait().expect("a child can be waited for")?;
        // A grandchild may hold the pipes open; what the child itself wrote is here by then.
        self.stdout.wait_end(Duration::from_secs(10));
        self.stderr.wait_end(Duration::from_secs(10));
        Some(Outcome {
            what: self.what.clone(),
            status,
            stdout: self.stdout.bytes(),
            stderr: self.stderr.bytes(),
        })
    }

    /// Kills the process and waits until it is gone.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

fn spelled(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(OsStr::to_string_lossy)
        .collect();
    let line = words.join(" ");
    match line.split_once("--pdeathsig KILL -- ") {
        Some((_, rest)) => rest.to_owned(),
        None => line,
    }
}

/// Sends a signal to a process of the lab; does nothing when it has ended.
pub fn signal_pid(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Runs a command to its end, feeding it `input`; fails the test when `limit` has passed.
#[track_caller]
pub fn run(mut command: Command, input: &[u8], limit: Duration) -> Outcome {
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut process = Process::start(command);
    if let Some(mut stdin) = process.stdin.take() {
        let input = input.to_owned();
        // A program that does not read its input must not stop the test; its outcome tells.
        thread::spawn(move || stdin.write_all(&input));
    }
    process.wait(limit)
}

/// What a finished program left: its exit code and what it said.
#[derive(Clone, Debug)]
pub struct Outcome {
    what: String,
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Outcome {
    /// Returns the exit code; a program that died of a signal has 128 plus the signal's number, as in a shell.
    #[must_use]
    pub fn exit_code(&self) -> i32 {
        self.status
            .code()
            .unwrap_or_else(|| 128 + self.status.signal().unwrap_or(0))
    }

    /// Returns the standard output.
    #[must_use]
    pub fn stdout(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Returns the standard error.
    #[must_use]
    pub fn stderr(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// Returns whether the program ended with code 0.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.status.success()
    }

    /// Requires that the program ended with code 0.
    #[track_caller]
    pub fn success(self) -> Self {
        self.code(0)
    }

    /// Requires that the program ended with this code.
    #[track_caller]
    pub fn code(self, code: i32) -> Self {
        assert!(
            self.exit_code() == code,
            "wanted exit code {code}, but {self}"
        );
        self
    }

    /// Requires a refusal for want of right: exit code 1 and the word `denied` on stderr.
    #[track_caller]
    pub fn denied(self) -> Self {
        let denied = self.exit_code() == 1 && self.stderr().to_lowercase().contains("denied");
        assert!(
            denied,
            "wanted a denial (code 1, `denied` on stderr), but {self}"
        );
        self
    }

    /// Requires that stdout contains `text`.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(
            self.stdout().contains(text),
            "wanted {text:?} on stdout, but {self}"
        );
        self
    }

    /// Requires that stderr contains `text`.
    #[track_caller]
    pub fn complains(self, text: &str) -> Self {
        assert!(
            self.stderr().contains(text),
            "wanted {text:?} on stderr, but {self}"
        );
        self
    }

    /// Returns stdout read as JSON.
    #[track_caller]
    #[must_use]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.stdout)
            .unwrap_or_else(|e| panic!("wanted JSON ({e}), but {self}"))
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` ended with {}\nstdout: {}\nstderr: {}",
            self.what,
            self.status,
            self.stdout(),
            self.stderr()
        )
    }
}
