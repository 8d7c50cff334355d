//! `serve`: a local socket for hooks that run as a job's owner, who has no key for the host.
//!
//! One line in, one line out: `suspend JOB [TASK]` or `resume JOB [TASK]`, answered with `ok ...` or `no ...`. Who asks is what the kernel says of the
//! socket's other end; whose job it is was written down by the prolog, which root ran. Anybody else is told that there is no such job.

use std::{
    fs,
    io::{self, Read as _, Write as _},
    os::unix::{
        fs::{FileTypeExt as _, PermissionsExt as _},
        net::UnixStream as StdStream,
    },
    path::Path,
    sync::Arc,
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{UnixListener, UnixStream},
    sync::Semaphore,
    time::{Instant, interval_at, timeout},
};
use xman_client::protocol::Depth;

use crate::{
    act::Actor,
    args::Sge,
    config::{Config, InsideDepth},
    hook::Hook,
    intent::Intent,
    others::sge_id,
    runs::{Known, Runs},
    told::one_line,
    verdict::{Class, Outcome},
};

/// Callers at once: a guest has a few jobs. More wait; who never says anything is gone after [`SAY`].
const CALLERS: usize = 32;
/// The longest line, in bytes: a verb and two numbers.
const MAX_LINE: usize = 128;
/// How long a caller may take for its line, and for taking the answer.
const SAY: Duration = Duration::from_secs(5);
/// How often kept ends are delivered.
const DELIVER: Duration = Duration::from_secs(30);
/// How long one delivery may take.
const DELIVERY: Duration = Duration::from_secs(20);

/// What is asked.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Asked {
    Suspend(String),
    Resume(String),
}

impl Asked {
    fn job(&self) -> &str {
        match self {
            Self::Suspend(job) | Self::Resume(job) => job,
        }
    }
}

fn parse(line: &str) -> Result<Asked, String> {
    let mut words = line.split_ascii_whitespace();
    let (verb, job, task) = (words.next(), words.next(), words.next());
    let (Some(verb), Some(job), None) = (verb, job, words.next()) else {
        return Err("say suspend or resume, a job and perhaps its task".to_owned());
    };
    let id = sge_id(job, task).map_err(|error| error.to_string())?;
    match verb {
        "suspend" => Ok(Asked::Suspend(id)),
        "resume" => Ok(Asked::Resume(id)),
        other => Err(format!("'{other}' is neither suspend nor resume")),
    }
}

/// Returns the job, where it is the caller's. Who may not is told the same as who asks for one that is not there.
fn allowed(known: Option<Known>, uid: u32) -> Option<Known> {
    known.filter(|known| uid == 0 || uid == known.uid)
}

/// Serves until it is stopped.
pub(crate) async fn serve(actor: &Actor<'_>) -> Result<Outcome, String> {
    let path = &actor.config.socket;
    let listener = bind(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let runs =
        Runs::open(&actor.config.queue_dir).map_err(|error| format!("queue-dir: {error}"))?;
    actor.told.info(format!("listens at {}", path.display()));
    tokio::join!(accept(actor, &listener, &runs), deliver(actor),);
    let _ = fs::remove_file(path);
    Ok(Outcome::new(Class::Done, "stopped"))
}

async fn deliver(actor: &Actor<'_>) {
    let mut ticks = interval_at(Instant::now() + Duration::from_secs(1), DELIVER);
    loop {
        tokio::select! {
            _ = ticks.tick() => {}
            () = actor.interrupt.raised() => return,
        }
        crate::act::forget_silence(&actor.kdc_is_silent);
        actor.deliver(None, DELIVERY).await;
    }
}

async fn accept(actor: &Actor<'_>, listener: &UnixListener, runs: &Runs) {
    use futures_util::{StreamExt as _, stream::FuturesUnordered};
    let seats = Arc::new(Semaphore::new(CALLERS));
    let mut callers = FuturesUnordered::new();
    loop {
        let seat = Arc::clone(&seats).try_acquire_owned().ok();
        tokio::select! {
            accepted = listener.accept(), if seat.is_some() => match accepted {
                Ok((stream, _)) => callers.push(async move {
                    attend(actor, runs, stream).await;
                    drop(seat);
                }),
                Err(error) => {
                    actor.told.error(format!("the socket: {error}"));
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            },
            Some(()) = callers.next() => {}
            () = actor.interrupt.raised() => break,
        }
    }
    while callers.next().await.is_some() {}
}

async fn attend(actor: &Actor<'_>, runs: &Runs, mut stream: UnixStream) {
    let Ok(peer) = stream.peer_cred() else {
        return;
    };
    let line = match timeout(SAY, read_line(&mut stream)).await {
        Ok(Ok(line)) => line,
        Ok(Err(_)) | Err(_) => return,
    };
    let answer = match answer(actor, runs, &line, peer.uid()).await {
        Ok(sentence) => format!("ok {}\n", one_line(&sentence)),
        Err(sentence) => format!("no {}\n", one_line(&sentence)),
    };
    let _ = timeout(SAY, stream.write_all(answer.as_bytes())).await;
}

async fn answer(actor: &Actor<'_>, runs: &Runs, line: &str, uid: u32) -> Result<String, String> {
    let asked = parse(line)?;
    let known = runs.find(asked.job())?;
    let known = allowed(known, uid).ok_or_else(|| {
        actor.told.warning(format!(
            "uid {uid} asked for the job {}, which is not its",
            asked.job()
        ));
        format!("you have no job {} here", asked.job())
    })?;
    let spots = vec![known.spot];
    let (hook, intent) = match asked {
        Asked::Suspend(_) => (
            Hook::SgeSuspend,
            Intent::Preempt {
                spots,
                depth: Some(match actor.config.inside {
                    InsideDepth::Starve => Depth::Starve,
                    InsideDepth::Shrink => Depth::Shrink,
                }),
                reason: "Grid Engine suspended the job".parse().ok(),
            },
        ),
        Asked::Resume(_) => (Hook::SgeResume, Intent::Resume { spots }),
    };
    crate::act::forget_silence(&actor.kdc_is_silent);
    let limit = actor.config.deadline(hook);
    let outcome = actor.carry_out(hook, &intent, limit).await;
    match outcome.class {
        Class::Done => {
            actor.told.info(&outcome.sentence);
            Ok(outcome.sentence)
        }
        Class::Kept
        | Class::Later
        | Class::Elsewhere
        | Class::Never
        | Class::Silent
        | Class::Forbidden
        | Class::Broken
        | Class::Stopped => {
            actor.told.warning(&outcome.sentence);
            Err(outcome.sentence)
        }
    }
}

async fn read_line(stream: &mut UnixStream) -> io::Result<String> {
    let mut line = Vec::new();
    loop {
        let byte = stream.read_u8().await?;
        if byte == b'\n' {
            return String::from_utf8(line).map_err(io::Error::other);
        }
        if line.len() >= MAX_LINE {
            return Err(io::Error::other("too long"));
        }
        line.push(byte);
    }
}

/// Opens the socket; one that a dead `serve` left is replaced, one that is answered is not.
fn bind(path: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = path.parent().filter(|folder| !folder.exists()) {
        fs::create_dir_all(folder)?;
        // Whatever the umask is: those who ask have to get there.
        fs::set_permissions(folder, fs::Permissions::from_mode(0o755))?;
    }
    match fs::symlink_metadata(path) {
        Ok(about) if about.file_type().is_socket() => {
            if StdStream::connect(path).is_ok() {
                return Err(io::Error::new(
                    io::ErrorKind::AddrInUse,
                    "another `xman-hook serve` listens there",
                ));
            }
            fs::remove_file(path)?;
        }
        Ok(_) => {
            return Err(io::Error::other("something that is no socket is there"));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    let listener = UnixListener::bind(path)?;
    // Anybody may ask; who is told something is decided by whose job it is.
    fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// A method of Grid Engine's, as the job's owner: stops or continues the job's processes, and has its domain give way or come back.
///
/// The processes are what the owner has a right to whatever the host says: a suspended job does not run on, and a resumed one does not stay stopped.
pub(crate) fn ask(config: &Config, method: &Sge) -> Outcome {
    let (verb, hook, pid, job, task) = match method {
        Sge::Suspend { pid, job, task } => ("suspend", Hook::SgeSuspend, *pid, job, task),
        Sge::Resume { pid, job, task } => ("resume", Hook::SgeResume, *pid, job, task),
        Sge::Prolog { .. } | Sge::Epilog { .. } => {
            return Outcome::new(Class::Broken, "this is no method");
        }
    };
    let Some(group) = Pid::from_raw(pid).filter(|_| pid > 1) else {
        return Outcome::new(Class::Broken, format!("{pid} is no job's process"));
    };
    if let Err(error) = sge_id(job, task.as_deref()) {
        return Outcome::new(Class::Broken, error.to_string());
    }
    let signal = |signal| match kill_process_group(group, signal) {
        Ok(()) => String::new(),
        Err(error) => format!("; its processes ({pid}): {error}"),
    };
    let mut said = String::new();
    if hook == Hook::SgeSuspend {
        said = signal(Signal::STOP);
    }
    let line = match task {
        Some(task) => format!("{verb} {job} {task}\n"),
        None => format!("{verb} {job}\n"),
    };
    let answer = converse(&config.socket, &line, config.deadline(hook));
    if hook == Hook::SgeResume {
        said = signal(Signal::CONT);
    }
    match answer {
        Ok(answer) => match (answer.strip_prefix("ok "), answer.strip_prefix("no ")) {
            (Some(sentence), _) => Outcome::new(Class::Done, format!("{sentence}{said}")),
            (None, Some(sentence)) => Outcome::new(Class::Later, format!("{sentence}{said}")),
            (None, None) => Outcome::new(Class::Broken, format!("serve says nothing{said}")),
        },
        Err(error) => Outcome::new(
            Class::Silent,
            format!(
                "{}: {error}; is `xman-hook serve` running here?{said}",
                config.socket.display()
            ),
        ),
    }
}

fn converse(socket: &Path, line: &str, limit: Duration) -> io::Result<String> {
    let mut stream = StdStream::connect(socket)?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(line.as_bytes())?;
    let mut answer = String::new();
    stream.take(4096).read_to_string(&mut answer)?;
    Ok(answer.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runs::tests::spot;
    use proptest::prelude::*;

    #[test]
    fn a_line_is_a_verb_a_job_and_perhaps_a_task() {
        assert_eq!(parse("suspend 7"), Ok(Asked::Suspend("7".to_owned())));
        assert_eq!(
            parse("resume 7 undefined"),
            Ok(Asked::Resume("7".to_owned()))
        );
        assert_eq!(parse("resume 7 3"), Ok(Asked::Resume("7.3".to_owned())));
        for bad in [
            "",
            "suspend",
            "end 7",
            "suspend ../x",
            "suspend 7 3 1",
            "suspend 7/3",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_job_is_its_owners_and_roots() {
        let known = || {
            Some(Known {
                uid: 1000,
                spot: spot(),
            })
        };
        assert!(allowed(known(), 1000).is_some());
        assert!(allowed(known(), 0).is_some());
        assert!(allowed(known(), 1001).is_none());
        assert!(allowed(None, 1000).is_none());
        assert!(allowed(None, 0).is_none());
    }

    proptest! {
        #[test]
        fn no_line_names_a_file_elsewhere(line in "(suspend|resume) .{0,40}") {
            if let Ok(asked) = parse(&line) {
                prop_assert!(asked.job().bytes().all(|b| b.is_ascii_digit() || b == b'.'));
                prop_assert!(!asked.job().starts_with('.'));
            }
        }
    }
}
