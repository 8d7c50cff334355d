//! xmand: controls a host's domains through libvirt for those who prove with Kerberos who they are.
//!
//! A request's way: [`listen`] -> [`session`] -> [`call`] -> policy -> [`perform`] -> [`hypervisor`]. This file starts and stops.

mod answers;
mod asked;
mod audit;
mod call;
mod caller;
mod check;
mod clock;
mod config;
mod console;
mod dmesg;
mod door;
mod events;
mod expect;
mod hypervisor;
mod images;
mod input;
mod jobs;
mod journeys;
mod listen;
mod meant;
mod moving;
mod peer;
mod people;
mod perform;
mod repeat;
mod rights;
mod schedule;
mod session;
mod store;
mod work;

use std::{
    ffi::OsStr,
    io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{self, ExitCode},
    sync::Arc,
    time::Duration,
};

use clap::{Parser, Subcommand};
use sd_notify::NotifyState;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::Notify,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing_subscriber::EnvFilter;
use xman_common::gss::Keys;
use xman_policy::{Authorizer, Chain, cedar::Cedar, k5login::K5login, permit::Permits};

use crate::{
    audit::Audit,
    config::{Backend, Config},
    console::Consoles,
    door::Door,
    expect::Table,
    hypervisor::Hypervisors,
    images::Images,
    jobs::Jobs,
    people::People,
    repeat::Repeats,
    schedule::Scheduler,
    store::Store,
};

/// The account whose `.k5login` names the administrators, and whose files are trusted.
const ROOT: u32 = 0;
/// What this program calls itself on the wire.
const SOFTWARE: &str = concat!("xmand ", env!("CARGO_PKG_VERSION"));
/// How long the last audit records may take when xmand ends.
const LAST_RECORDS: Duration = Duration::from_secs(2);
/// How long threads may take to end once xmand has nothing left to do.
const LAST_THREADS: Duration = Duration::from_secs(1);
/// sysexits.h: something in the configuration is wrong.
const EX_CONFIG: u8 = 78;

/// Controls this host's domains through libvirt for those who prove with Kerberos who they are.
#[derive(Debug, Parser)]
#[command(
    name = "xmand",
    version,
    about,
    after_help = "SIGTERM finishes what is under way and ends; SIGHUP reads the authorization files again."
)]
struct Arguments {
    /// The configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/xman/xmand.toml")]
    config: PathBuf,
    /// Opens everything that the configuration names, says what is wrong and what to do, and ends.
    #[arg(long)]
    check: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// What concerns the rules by which is decided.
    #[command(subcommand)]
    Policy(PolicyCommand),
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// Holds the configured rules against a table of expected decisions; exits with 1 where one comes out otherwise.
    #[command(after_help = "\
FILE holds tables like this one:

    [[expect]]
    principal = \"alice@EXAMPLE.ORG\"
    action = \"pause\"
    domain = { name = \"web\", owners = [\"alice@EXAMPLE.ORG\"] }
    decision = \"allow\"

xmand.toml(5) has all the keys.")]
    Test {
        /// The table.
        file: PathBuf,
    },
}

/// A machine running xmand: what its sessions share.
struct Host {
    config: Config,
    keys: Keys,
    policy: Chain,
    permits: Permits,
    /// Rings whenever one of them is settled.
    settled: Notify,
    leaving: journeys::Leaving,
    carries: journeys::Carries,
    people: People,
    audit: Audit,
    store: Store,
    hypervisors: Hypervisors,
    repeats: Repeats,
    images: Images,
    jobs: Jobs,
    schedule: Scheduler,
    consoles: Consoles,
    door: Arc<Door>,
    sessions: TaskTracker,
    changes: TaskTracker,
    stopping: CancellationToken,
}

impl Host {
    /// Takes authorization files that have changed, and says so.
    fn reread_policy(&self) {
        for (backend, reload) in self.policy.refresh() {
            if reload.usable {
                tracing::info!(backend, "{}", reload.summary);
            } else {
                tracing::error!(backend, "{}", reload.summary);
            }
            for warning in reload.warnings {
                tracing::warn!(backend, "{warning}");
            }
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    tracing_subscriber::fmt()
        .with_writer(io::stderr)
        .with_ansi(false)
        .with_env_filter(
            EnvFilter::try_from_env("XMAND_LOG").unwrap_or_else(|_| EnvFilter::new("info")),
        )
        .init();
    let config = match Config::read(&arguments.config) {
        Ok(config) => config,
        Err(error) => return complain(&error.to_string()),
    };
    if let Some(Command::Policy(PolicyCommand::Test { file })) = &arguments.command {
        return test_policy(&config, file).unwrap_or_else(|error| complain(&error));
    }
    if let Err(error) = adopt_keytab(&config) {
        return complain(&error);
    }
    let runtime = match Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return complain(&format!("cannot start: {error}")),
    };
    let ended = if arguments.check {
        runtime.block_on(check(&config))
    } else {
        runtime.block_on(serve(config))
    };
    // Whoever still holds a credential lets go of it now: libkrb5 aborts in whom it meets after `exit` took its locks away.
    // A libvirt call that never returns must not keep the process.
    runtime.shutdown_timeout(LAST_THREADS);
    ended.unwrap_or_else(|error| complain(&error))
}

fn complain(error: &str) -> ExitCode {
    eprintln!("xmand: {error}");
    ExitCode::from(EX_CONFIG)
}

/// GSSAPI takes keytab and credential cache from the environment only, which is safely set at exec alone: so xmand executes itself once with them.
fn adopt_keytab(config: &Config) -> Result<(), String> {
    let keytab = config.keytab.as_os_str();
    // Its keys are our identity towards callers, and towards other hosts; tickets for those stay in memory, and nobody else's are used.
    let ours = [
        ("KRB5_KTNAME", keytab),
        ("KRB5_CLIENT_KTNAME", keytab),
        ("KRB5CCNAME", OsStr::new("MEMORY:xmand")),
    ];
    let is_ours =
        |(name, value): &(&str, &OsStr)| std::env::var_os(name).as_deref() == Some(*value);
    if ours.iter().all(is_ours) {
        return Ok(());
    }
    let mut arguments = std::env::args_os();
    let name = arguments
        .next()
        .unwrap_or_else(|| OsStr::new("xmand").to_owned());
    // In a mount namespace whose /proc is another's there is no /proc/self; the name we were called by does as well.
    let program = std::env::current_exe().unwrap_or_else(|_| PathBuf::from(&name));
    let error = process::Command::new(program)
        .arg0(name)
        .args(arguments)
        .envs(ours)
        .exec();
    Err(format!("cannot execute myself with the keytab: {error}"))
}

/// The library tells a missing file, an unreadable one and a missing key in the same words; so look first.
fn open_keys(config: &Config) -> Result<Keys, String> {
    let keytab = &config.keytab;
    std::fs::File::open(keytab).map_err(|error| {
        format!(
            "keytab {}: {error}; make it with `kadmin ktadd -k {} xman/HOST`",
            keytab.display(),
            keytab.display()
        )
    })?;
    Keys::open().map_err(|error| {
        format!(
            "keytab {}: {error}; it needs a key of xman/HOST: `klist -k {}`",
            keytab.display(),
            keytab.display()
        )
    })
}

fn test_policy(config: &Config, file: &Path) -> Result<ExitCode, String> {
    let table = Table::read(file).map_err(|error| error.to_string())?;
    let chain = policy(config)?;
    for (backend, reload) in chain.refresh() {
        if !reload.usable {
            return Err(format!("{backend}: {}", reload.summary));
        }
    }
    let findings = table.hold_against(&chain, config.authorization.unix_groups);
    for finding in &findings {
        println!("{finding}");
    }
    let wrong = findings.iter().filter(|finding| !finding.is_well()).count();
    println!("{} expectations, {wrong} wrong", findings.len());
    Ok(if wrong == 0 {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn check(config: &Config) -> Result<ExitCode, String> {
    let keys = open_keys(config).map(|_| "has a key of the service xman".to_owned());
    let findings = check::check(config, keys).await;
    for finding in &findings {
        match &finding.how {
            Ok(well) => println!("ok    {}: {well}", finding.what),
            Err(wrong) => println!("WRONG {}: {wrong}", finding.what),
        }
    }
    let is_well = findings.iter().all(|finding| finding.how.is_ok());
    Ok(if is_well {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn serve(config: Config) -> Result<ExitCode, String> {
    let keys = open_keys(&config)?;
    let store =
        Store::open(&config.state_dir).map_err(|error| format!("state directory: {error}"))?;
    let left = store
        .settle_jobs(jobs::LEFT_BEHIND)
        .await
        .map_err(|error| format!("state directory: {error}"))?;
    if left > 0 {
        tracing::warn!(
            left,
            "jobs were under way when xmand last ended; `rxm job list` shows them"
        );
    }
    let schedule = Scheduler::open(config.schedule.clone(), &store)
        .await
        .map_err(|error| format!("state directory: {error}"))?;
    let (images, drafts) =
        Images::open(&config.state_dir).map_err(|error| format!("state directory: {error}"))?;
    let listeners = listen::bind(&config.listen).await?;
    let host = Arc::new(Host {
        keys,
        policy: policy(&config)?,
        permits: Permits::default(),
        settled: Notify::new(),
        leaving: journeys::Leaving::default(),
        carries: journeys::Carries::new(),
        people: People::new(config.authorization.unix_groups),
        audit: Audit::start(&config.syslog)
            .map_err(|error| format!("cannot start the audit log: {error}"))?,
        store,
        hypervisors: Hypervisors::start(config.hypervisors.clone()),
        repeats: Repeats::default(),
        images,
        jobs: Jobs::default(),
        schedule,
        consoles: Consoles::default(),
        door: Arc::default(),
        sessions: TaskTracker::new(),
        changes: TaskTracker::new(),
        stopping: CancellationToken::new(),
        config,
    });
    host.hypervisors.find_out(drafts);
    host.reread_policy();
    moving::take_up(&host)
        .await
        .map_err(|error| format!("state directory: {error}"))?;
    schedule::take_up(&host).await;
    // Before anybody hears that xmand is ready: whoever does may send a signal at once.
    let signals = Signals::catch().map_err(|error| format!("cannot catch signals: {error}"))?;
    for listener in listeners {
        let address = listener.local_addr().map_err(|error| error.to_string())?;
        eprintln!("listening on {address}");
        tokio::spawn(listen::run(listener, Arc::clone(&host)));
    }
    let _ = sd_notify::notify(&[NotifyState::Ready]);
    wait_for_the_end(&host, signals).await;
    stop(&host).await;
    Ok(ExitCode::SUCCESS)
}

/// Makes the configured chain. Site policies that cannot be used stop the start: nobody shall believe that they are in force.
fn policy(config: &Config) -> Result<Chain, String> {
    let authorization = &config.authorization;
    let systems = config.schedule.systems();
    // Whose word counts for a batch system is said in xmand.toml itself, and no rule is needed for it.
    let systems: Option<Box<dyn Authorizer>> = match systems.is_empty() {
        true => None,
        false => Some(Box::new(systems)),
    };
    let backends = authorization.backends.iter().map(|backend| {
        Ok::<Box<dyn Authorizer>, String>(match backend {
            Backend::K5login => Box::new(K5login::new(authorization.k5login.clone(), ROOT)),
            Backend::Cedar => Box::new(
                Cedar::open(&authorization.cedar, hypervisor::hostname(), ROOT)
                    .map_err(|error| error.to_string())?,
            ),
            Backend::External => Box::new(authorization.authority(hypervisor::hostname())),
        })
    });
    let backends = systems.into_iter().map(Ok).chain(backends);
    backends.collect::<Result<_, _>>().map(Chain::new)
}

struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    fn catch() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }
}

async fn wait_for_the_end(host: &Host, mut signals: Signals) {
    loop {
        tokio::select! {
            _ = signals.terminate.recv() => return,
            _ = signals.interrupt.recv() => return,
            _ = signals.hangup.recv() => {
                host.reread_policy();
                tracing::info!("authorization read again; everything else in xmand.toml takes a restart");
            }
        }
    }
}

/// Takes nothing new, lets what is under way end within the grace, tells who waits, and goes.
async fn stop(host: &Host) {
    let _ = sd_notify::notify(&[NotifyState::Stopping]);
    eprintln!("stopping");
    host.stopping.cancel();
    host.sessions.close();
    host.changes.close();
    let all_done = async {
        host.changes.wait().await;
        host.sessions.wait().await;
    };
    if timeout(host.config.shutdown_grace, all_done).await.is_err() {
        tracing::warn!(
            changes = host.changes.len(),
            sessions = host.sessions.len(),
            "the grace is over; these are left"
        );
    }
    host.audit.flush(LAST_RECORDS).await;
}
