//! `xman-hook`: what batch systems call when jobs begin, end, are suspended and go on.
//!
//! ```text
//! environment, argv -> slurm, others -> intent -> act -> verdict -> exit code
//!                                          |        |
//!                                 config, nodes   queue (ends that wait)
//! ```
//!
//! What is decided is decided in functions without input and output: [`slurm`] and [`others`] read what the batch system says, [`intent`] makes of it what
//! is to be brought about, [`verdict`] makes of what came of it an exit code. [`act`] speaks to the hosts.

mod act;
mod args;
mod begun;
mod check;
mod config;
mod folder;
mod hook;
mod intent;
mod nodes;
mod others;
mod power;
mod queue;
mod runs;
mod serve;
mod slurm;
mod slurm_command;
mod told;
mod verdict;
mod watch;

use std::{
    collections::BTreeMap,
    env,
    ffi::{OsStr, OsString},
    fs,
    io::{self, Write as _},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::Arc,
    time::Duration,
};

use clap::{CommandFactory, Parser};
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::watch as channel,
};
use xman_client::{Interrupt, fleet};

use crate::{
    act::Actor,
    args::{Cli, Codes, Command, Generic, GenericJob, Pbs, Run, Sge, Slurm, Torque, YesNo},
    begun::Begun,
    config::Config,
    hook::{Hook, Kind, System},
    intent::{BadCall, Intent, Job, Spot},
    queue::{Queue, now_ms},
    runs::Runs,
    told::{Level, Told},
    verdict::{Class, Outcome, verdict},
};

/// What of the batch system's environment is read. Some of them run root's hooks with variables that a job's owner chose: nothing else goes on, neither
/// to Kerberos's library nor anywhere.
const READ: &str = "SLURM";

fn main() -> ExitCode {
    let words: Vec<_> = env::args_os().collect();
    let cli = Cli::parse_from(args::unfolded(words.clone()));
    if let Some(system) = codes_asked(&cli.command) {
        let printed = io::stdout().write_all(verdict::table(system).as_bytes());
        return ExitCode::from(u8::from(printed.is_err()));
    }
    if let Command::Man { dir } = &cli.command {
        return match man_pages(dir) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                let _ = writeln!(io::stderr(), "xman-hook: {}: {error}", dir.display());
                ExitCode::FAILURE
            }
        };
    }
    let speaker = speaker(&cli.command);
    let config = match Config::read(&cli.config) {
        Ok(config) => config,
        Err(error) => {
            let told = Told::new("/dev/log".as_ref(), &speaker);
            return end(
                &told,
                hook_of(&cli.command),
                Outcome::new(Class::Broken, error.to_string()),
            );
        }
    };
    let told = Told::new(&config.syslog, &speaker);
    let hook = hook_of(&cli.command);
    // The methods run as a job's owner, who has no key: `serve` speaks for them.
    if let Command::Sge {
        hook: Some(method @ (Sge::Suspend { .. } | Sge::Resume { .. })),
        ..
    } = &cli.command
    {
        let outcome = serve::ask(&config, method);
        return end(&told, hook, outcome);
    }
    if let Err(error) = adopt_keytab(&config, &words) {
        return end(&told, hook, Outcome::new(Class::Broken, error));
    }
    let runtime = runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .max_blocking_threads(fleet::BLOCKING_THREADS)
        .enable_all()
        .build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => {
            return end(
                &told,
                hook,
                Outcome::new(Class::Broken, format!("no threads: {error}")),
            );
        }
    };
    let ended = runtime.block_on(work(&config, &told, cli.command));
    // Kerberos may still be waiting for a KDC.
    runtime.shutdown_background();
    end(&told, hook, ended)
}

fn man_pages(dir: &Path) -> io::Result<()> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    fs::create_dir_all(dir)?;
    man_page(&command, dir)
}

/// Writes the page of a command and those of its subcommands.
fn man_page(command: &clap::Command, dir: &Path) -> io::Result<()> {
    let man = clap_mangen::Man::new(command.clone()).section("8");
    let mut page = Vec::new();
    man.render(&mut page)?;
    let page = String::from_utf8_lossy(&page).replace(".SH EXTRA", ".SH NOTES");
    fs::write(dir.join(man.get_filename()), page)?;
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| man_page(sub, dir))
}

/// Says what came of it and returns the exit code.
fn end(told: &Told, hook: Option<Hook>, outcome: Outcome) -> ExitCode {
    let Outcome { class, sentence } = outcome;
    let code = match hook {
        Some(hook) => verdict(hook, class).code,
        None => verdict::plain(class),
    };
    let level = match class {
        Class::Done => Level::Info,
        Class::Kept | Class::Later | Class::Elsewhere | Class::Never | Class::Stopped => {
            Level::Warning
        }
        Class::Silent | Class::Forbidden | Class::Broken => Level::Error,
    };
    let then = match hook {
        Some(hook) if class != Class::Done => {
            format!(" [{}: {}]", class.name(), verdict(hook, class).then)
        }
        Some(_) | None => String::new(),
    };
    if !sentence.is_empty() {
        told.say(level, &format!("{sentence}{then}"));
    }
    ExitCode::from(code)
}

fn codes_asked(command: &Command) -> Option<System> {
    match command {
        Command::Slurm {
            codes: Codes { exit_codes: true },
            ..
        } => Some(System::Slurm),
        Command::Sge {
            codes: Codes { exit_codes: true },
            ..
        } => Some(System::Sge),
        Command::Pbs {
            codes: Codes { exit_codes: true },
            ..
        } => Some(System::Pbs),
        Command::Torque {
            codes: Codes { exit_codes: true },
            ..
        } => Some(System::Torque),
        Command::Generic {
            codes: Codes { exit_codes: true },
            ..
        } => Some(System::Generic),
        Command::Slurm { .. }
        | Command::Sge { .. }
        | Command::Pbs { .. }
        | Command::Torque { .. }
        | Command::Generic { .. }
        | Command::Serve
        | Command::Deliver { .. }
        | Command::Check
        | Command::Man { .. } => None,
    }
}

/// Returns the hook that a command is, where it is one whose end the batch system looks at.
fn hook_of(command: &Command) -> Option<Hook> {
    Some(match command {
        Command::Slurm { hook, .. } => match hook.as_ref()? {
            Slurm::Prolog => Hook::SlurmProlog,
            Slurm::Epilog => Hook::SlurmEpilog,
            Slurm::PrologController => Hook::SlurmPrologController,
            Slurm::EpilogController => Hook::SlurmEpilogController,
            Slurm::Resume { .. } => Hook::SlurmResume,
            Slurm::Suspend { .. } => Hook::SlurmSuspend,
            Slurm::Watch => return None,
        },
        Command::Sge { hook, .. } => match hook.as_ref()? {
            Sge::Prolog { .. } => Hook::SgeProlog,
            Sge::Epilog { .. } => Hook::SgeEpilog,
            Sge::Suspend { .. } => Hook::SgeSuspend,
            Sge::Resume { .. } => Hook::SgeResume,
        },
        Command::Pbs { hook, .. } => match hook.as_ref()? {
            Pbs::Begin(_) => Hook::PbsBegin,
            Pbs::End(_) => Hook::PbsEnd,
            Pbs::Abort(_) => Hook::PbsAbort,
            Pbs::Suspend(_) => Hook::PbsSuspend,
            Pbs::Resume(_) => Hook::PbsResume,
        },
        Command::Torque { hook, .. } => match hook.as_ref()? {
            Torque::Prologue { .. } => Hook::TorquePrologue,
            Torque::Epilogue { .. } => Hook::TorqueEpilogue,
        },
        Command::Generic { hook, .. } => match hook.as_ref()? {
            Generic::Begin { .. } => Hook::GenericBegin,
            Generic::End { .. } => Hook::GenericEnd,
            Generic::Preempt { .. } => Hook::GenericPreempt,
            Generic::Resume { .. } => Hook::GenericResume,
            Generic::Status { .. } => return None,
        },
        Command::Serve | Command::Deliver { .. } | Command::Check | Command::Man { .. } => {
            return None;
        }
    })
}

fn speaker(command: &Command) -> String {
    if let Some(hook) = hook_of(command) {
        return format!("{} {}", hook.system().name(), hook.name());
    }
    match command {
        Command::Slurm { .. } => "slurm watch",
        Command::Generic { .. } => "generic status",
        Command::Serve => "serve",
        Command::Deliver { .. } => "deliver",
        Command::Check
        | Command::Man { .. }
        | Command::Sge { .. }
        | Command::Pbs { .. }
        | Command::Torque { .. } => "check",
    }
    .to_owned()
}

/// GSSAPI takes keytab and credential cache from the environment only, which is safely set at exec alone: so xman-hook executes itself once with them, and with
/// nothing of the environment that it was called with but what it reads.
fn adopt_keytab(config: &Config, words: &[OsString]) -> Result<(), String> {
    let mut wanted: BTreeMap<OsString, OsString> = env::vars_os()
        .filter(|(name, _)| name.to_str().is_some_and(|name| name.starts_with(READ)))
        .collect();
    let mut set = |name: &str, value: &OsStr| {
        wanted.insert(name.into(), value.to_owned());
    };
    set("KRB5_CLIENT_KTNAME", config.keytab.as_os_str());
    set("KRB5_KTNAME", config.keytab.as_os_str());
    set("KRB5CCNAME", OsStr::new("MEMORY:xman-hook"));
    if let Some(krb5_conf) = &config.krb5_conf {
        set("KRB5_CONFIG", krb5_conf.as_os_str());
    }
    if env::vars_os().collect::<BTreeMap<_, _>>() == wanted {
        return Ok(());
    }
    let name = words
        .first()
        .cloned()
        .unwrap_or_else(|| OsString::from("xman-hook"));
    // In a mount namespace whose /proc is another's there is no /proc/self; the name we were called by does as well.
    let program = env::current_exe().unwrap_or_else(|_| PathBuf::from(&name));
    let error = process::Command::new(program)
        .arg0(name)
        .args(words.iter().skip(1))
        .env_clear()
        .envs(wanted)
        .exec();
    Err(format!("cannot execute myself with the keytab: {error}"))
}

/// The library tells a missing file, an unreadable one and a missing key in the same words; so look first.
fn look_at_keytab(config: &Config) -> Result<(), String> {
    fs::File::open(&config.keytab).map(drop).map_err(|error| {
        format!(
            "keytab {}: {error}; make it with `kadmin ktadd -k {} PRINCIPAL`, readable for who runs this hook alone",
            config.keytab.display(),
            config.keytab.display()
        )
    })
}

async fn work(config: &Config, told: &Told, command: Command) -> Outcome {
    let (raise, interrupt) = Interrupt::new();
    // Before anything is begun: a signal that comes sooner would leave it half-done.
    match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(term), Ok(int)) => drop(tokio::spawn(watch_for_signals(raise, term, int))),
        (Err(error), _) | (_, Err(error)) => {
            return Outcome::new(Class::Broken, format!("no signals: {error}"));
        }
    }
    match attempt(config, told, interrupt, command).await {
        Ok(outcome) => outcome,
        Err(error) => Outcome::new(Class::Broken, error),
    }
}

async fn attempt(
    config: &Config,
    told: &Told,
    interrupt: Interrupt,
    command: Command,
) -> Result<Outcome, String> {
    if let Command::Check = command {
        return Ok(check::check(config, told, interrupt).await);
    }
    let queue = Queue::open(&config.queue_dir).map_err(|error| format!("queue-dir: {error}"))?;
    let actor = Actor {
        config,
        told,
        interrupt,
        queue,
        kdc_is_silent: Arc::default(),
    };
    let hook = hook_of(&command);
    let began = now();
    match prepared(config, &command, began)? {
        Prepared::Job(mut intent, deadline) => {
            let Some(hook) = hook else {
                return Err("this is no hook".to_owned());
            };
            let begun = match (hook.system(), hook.kind()) {
                (System::Slurm, Kind::Begin) => Begun::note(config, told, hook, &intent),
                (System::Slurm, Kind::End) => Begun::recall(config, told, hook, &mut intent),
                (_, _) => None,
            };
            let limit = deadline.unwrap_or_else(|| config.deadline(hook));
            // An end can be written down without any key.
            if !matches!(intent, Intent::End { .. }) {
                look_at_keytab(config)?;
            }
            let record = record(config, &command, &intent)?;
            let outcome = actor.carry_out(hook, &intent, limit).await;
            record.settle(hook, outcome.class);
            if counts_seconds(&command) && outcome.class != Class::Stopped {
                let_the_second_pass(began).await;
            }
            if let Some(begun) = begun {
                begun.settle(hook, outcome.class);
            }
            Ok(outcome)
        }
        Prepared::Other => {
            look_at_keytab(config)?;
            other(&actor, command).await
        }
    }
}

async fn other(actor: &Actor<'_>, command: Command) -> Result<Outcome, String> {
    let config = actor.config;
    match command {
        Command::Slurm {
            hook: Some(Slurm::Resume { nodes }),
            ..
        } => {
            let file = env::var_os("SLURM_RESUME_FILE").map(PathBuf::from);
            let text = match file {
                Some(file) => power::resume_file(&file).await,
                None => None,
            };
            let nodes = slurm::nodes_to_resume(text.as_deref(), &nodes)
                .map_err(|error| error.to_string())?;
            Ok(power::up(actor, &nodes, config.deadline(Hook::SlurmResume)).await)
        }
        Command::Slurm {
            hook: Some(Slurm::Suspend { nodes }),
            ..
        } => {
            let nodes = slurm::nodes_to_resume(None, &nodes).map_err(|error| error.to_string())?;
            Ok(power::down(actor, &nodes, config.deadline(Hook::SlurmSuspend)).await)
        }
        Command::Slurm {
            hook: Some(Slurm::Watch),
            ..
        } => watch::watch(actor).await,
        Command::Generic {
            hook: Some(Generic::Status { at, deadline }),
            ..
        } => check::status(actor, &at, deadline).await,
        Command::Serve => serve::serve(actor).await,
        Command::Deliver { deadline } => {
            let delivered = actor.deliver(None, deadline).await;
            let class = if delivered.left == 0 {
                Class::Done
            } else {
                Class::Later
            };
            Ok(Outcome::new(
                class,
                format!("{} delivered, {} left", delivered.done, delivered.left),
            ))
        }
        Command::Slurm { .. }
        | Command::Sge { .. }
        | Command::Pbs { .. }
        | Command::Torque { .. }
        | Command::Generic { .. }
        | Command::Check
        | Command::Man { .. } => Err("this is no hook".to_owned()),
    }
}

/// What a command comes to.
enum Prepared {
    /// An intent, and the deadline that the caller gave.
    Job(Intent, Option<Duration>),
    Other,
}

/// Returns seconds since 1970, as the number of a run.
fn now() -> u32 {
    u32::try_from(now_ms() / 1000).unwrap_or(u32::MAX)
}

/// Returns whether a run is named by the second in which it began.
fn counts_seconds(command: &Command) -> bool {
    match command {
        Command::Sge { .. } | Command::Torque { .. } => true,
        Command::Pbs {
            hook:
                Some(
                    Pbs::Begin(job)
                    | Pbs::End(job)
                    | Pbs::Abort(job)
                    | Pbs::Suspend(job)
                    | Pbs::Resume(job),
                ),
            ..
        } => job.run == Run::Now,
        Command::Generic {
            hook:
                Some(
                    Generic::Begin { job, .. }
                    | Generic::End { job }
                    | Generic::Preempt { job, .. }
                    | Generic::Resume { job },
                ),
            ..
        } => job.run == Run::Now,
        Command::Slurm { .. }
        | Command::Pbs { .. }
        | Command::Generic { .. }
        | Command::Serve
        | Command::Deliver { .. }
        | Command::Check
        | Command::Man { .. } => false,
    }
}

/// A job that is put back at once must not begin in the second that was just ended for good.
async fn let_the_second_pass(second: u32) {
    let over = (u64::from(second) + 1).saturating_mul(1000);
    let left = over.saturating_sub(now_ms()).min(1000);
    tokio::time::sleep(Duration::from_millis(left)).await;
}

fn prepared(config: &Config, command: &Command, now: u32) -> Result<Prepared, String> {
    let Some(hook) = hook_of(command) else {
        return Ok(Prepared::Other);
    };
    let words = |error: BadCall| error.to_string();
    let job = match command {
        Command::Slurm {
            hook: Some(Slurm::Resume { .. } | Slurm::Suspend { .. }),
            ..
        } => return Ok(Prepared::Other),
        Command::Slurm { .. } => slurm::job(hook, &variables()).map_err(words)?,
        Command::Sge {
            hook:
                Some(
                    Sge::Prolog {
                        host,
                        owner,
                        job,
                        task,
                    }
                    | Sge::Epilog {
                        host,
                        owner,
                        job,
                        task,
                    },
                ),
            ..
        } => others::sge(host, Some(owner), job, task.as_deref(), now).map_err(words)?,
        Command::Pbs {
            hook:
                Some(
                    Pbs::Begin(job)
                    | Pbs::End(job)
                    | Pbs::Abort(job)
                    | Pbs::Suspend(job)
                    | Pbs::Resume(job),
                ),
            ..
        } => Job {
            id: job.job.clone(),
            run: job.run.number(now),
            nodes: job.node.clone(),
            user: job.user.clone(),
            cluster: None,
        },
        Command::Torque {
            hook: Some(Torque::Prologue { arguments } | Torque::Epilogue { arguments }),
            ..
        } => {
            let uname = rustix::system::uname();
            let node = uname.nodename().to_string_lossy().into_owned();
            others::torque(arguments, &node, now).map_err(words)?
        }
        Command::Generic {
            hook: Some(generic),
            ..
        } => {
            return self::generic(config, generic, now).map_err(words);
        }
        Command::Sge { .. }
        | Command::Pbs { .. }
        | Command::Torque { .. }
        | Command::Generic { .. }
        | Command::Serve
        | Command::Deliver { .. }
        | Command::Check
        | Command::Man { .. } => return Ok(Prepared::Other),
    };
    let intent = intent::intent(hook, &job, config).map_err(words)?;
    Ok(Prepared::Job(intent, None))
}

fn variables() -> BTreeMap<String, String> {
    env::vars_os()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
        .collect()
}

fn generic(config: &Config, generic: &Generic, now: u32) -> Result<Prepared, BadCall> {
    let job = match generic {
        Generic::Begin { job, .. }
        | Generic::End { job }
        | Generic::Preempt { job, .. }
        | Generic::Resume { job } => job,
        Generic::Status { .. } => return Ok(Prepared::Other),
    };
    let spots = spots(config, job, now)?;
    let intent = match generic {
        Generic::Begin {
            user,
            principal,
            preemptible,
            ends_in,
            ..
        } => Intent::Begin {
            spots,
            user: match principal {
                Some(principal) => Some(principal.clone()),
                None => intent::user(user.as_deref(), config)?,
            },
            preemptible: preemptible.map(|answer| answer == YesNo::Yes),
            ends_in_ms: ends_in.and_then(|time| u64::try_from(time.as_millis()).ok()),
        },
        Generic::End { .. } => Intent::End { spots },
        Generic::Preempt { depth, reason, .. } => Intent::Preempt {
            spots,
            depth: *depth,
            reason: reason.clone(),
        },
        Generic::Resume { .. } => Intent::Resume { spots },
        Generic::Status { .. } => Intent::Nothing,
    };
    Ok(Prepared::Job(intent, job.deadline))
}

fn spots(config: &Config, job: &GenericJob, now: u32) -> Result<Vec<Spot>, BadCall> {
    let run = job.run.number(now);
    let told = Job {
        id: job.job.clone(),
        run,
        nodes: job.at.node.clone().unwrap_or_default(),
        user: None,
        cluster: job.cluster.as_ref().map(ToString::to_string),
    };
    let system = job.system.as_ref().unwrap_or(&config.system);
    let cluster = job.cluster.as_ref().or(config.cluster.as_ref());
    let mut spots = match (&job.at.host, &job.at.domain) {
        (Some(host), Some(domain)) => vec![Spot {
            key: xman_client::protocol::LeaseKey {
                job: xman_client::protocol::JobKey {
                    system: system.clone(),
                    cluster: cluster.ok_or(BadCall::NoCluster)?.clone(),
                    id: job.job.parse().map_err(BadCall::JobId)?,
                },
                run,
            },
            place: nodes::Place {
                host: host.clone(),
                domain: domain.clone(),
            },
        }],
        (Some(_) | None, Some(_) | None) => intent::spots(&told, config)?,
    };
    for spot in &mut spots {
        spot.key.job.system = system.clone();
        if let Some(cluster) = cluster {
            spot.key.job.cluster = cluster.clone();
        }
    }
    Ok(spots)
}

/// What Grid Engine's methods need to know of a job later, kept while it lasts.
struct Record {
    kept: Option<(Runs, String)>,
}

impl Record {
    /// A job that does not start, and one that has ended, is nobody's.
    fn settle(self, hook: Hook, class: Class) {
        let is_over = matches!(hook, Hook::SgeEpilog)
            || (matches!(hook, Hook::SgeProlog) && class != Class::Done);
        if let (true, Some((runs, id))) = (is_over, &self.kept) {
            let _ = runs.forget(id);
        }
    }
}

fn record(config: &Config, command: &Command, intent: &Intent) -> Result<Record, String> {
    let (owner, job, task, begins) = match command {
        Command::Sge {
            hook: Some(Sge::Prolog {
                owner, job, task, ..
            }),
            ..
        } => (owner, job, task, true),
        Command::Sge {
            hook: Some(Sge::Epilog {
                owner, job, task, ..
            }),
            ..
        } => (owner, job, task, false),
        Command::Slurm { .. }
        | Command::Sge { .. }
        | Command::Pbs { .. }
        | Command::Torque { .. }
        | Command::Generic { .. }
        | Command::Serve
        | Command::Deliver { .. }
        | Command::Check
        | Command::Man { .. } => return Ok(Record { kept: None }),
    };
    let runs = Runs::open(&config.queue_dir).map_err(|error| format!("queue-dir: {error}"))?;
    let id = others::sge_id(job, task.as_deref()).map_err(|error| error.to_string())?;
    if let (true, Intent::Begin { spots, .. }) = (begins, intent)
        && let [spot, ..] = spots.as_slice()
    {
        runs.keep(&id, owner, spot)?;
    }
    Ok(Record {
        kept: Some((runs, id)),
    })
}

/// The first signal asks everything under way to end, the second does not ask.
async fn watch_for_signals(raise: channel::Sender<bool>, mut term: Signal, mut int: Signal) {
    loop {
        tokio::select! {
            Some(()) = term.recv() => {}
            Some(()) = int.recv() => {}
            else => return,
        }
        if raise.send_replace(true) {
            process::exit(i32::from(verdict::plain(Class::Stopped)));
        }
    }
}
