//! xmand: controls a host's domains through libvirt for those who prove with Kerberos who they are.
//!
//! A request's way: [`listen`] -> [`session`] -> [`call`] -> policy -> [`perform`] -> [`hypervisor`]. This file starts and stops.

mod audit;
mod call;
mod caller;
mod clock;
mod config;
mod dmesg;
mod door;
mod hypervisor;
mod jobs;
mod listen;
mod perform;
mod repeat;
mod session;
mod store;

use std::{
    ffi::OsStr,
    io,
    os::unix::process::CommandExt,
    path::PathBuf,
    process::{self, ExitCode},
    sync::Arc,
    time::Duration,
};

use clap::Parser;
use sd_notify::NotifyState;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    task::block_in_place,
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tracing_subscriber::EnvFilter;
use xman_common::gss::Keys;
use xman_policy::{Authorizer, Chain, Query, Verdict, k5login::K5login};

use crate::{
    audit::Audit,
    config::{Backend, Config},
    door::Door,
    hypervisor::Hypervisors,
    jobs::Jobs,
    repeat::Repeats,
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
}

/// A machine running xmand: what its sessions share.
struct Host {
    config: Config,
    keys: Keys,
    policy: Chain,
    audit: Audit,
    store: Store,
    hypervisors: Hypervisors,
    repeats: Repeats,
    jobs: Jobs,
    door: Arc<Door>,
    sessions: TaskTracker,
    changes: TaskTracker,
    stopping: CancellationToken,
}

impl Host {
    /// Answers a question. Where that means to ask outside of this process, the thread's other tasks go elsewhere meanwhile.
    fn decide(&self, query: &Query<'_>) -> Verdict {
        if self.policy.waits() {
            block_in_place(|| self.policy.decide(query))
        } else {
            self.policy.decide(query)
        }
    }

    /// Answers questions that belong together, by one version of the rules.
    fn decide_all(&self, queries: &[Query<'_>]) -> Vec<Verdict> {
        block_in_place(|| self.policy.decide_all(queries))
    }

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

/// GSSAPI takes the keytab from the environment only, which is safely set at exec alone: so xmand executes itself once with it.
fn adopt_keytab(config: &Config) -> Result<(), String> {
    const VARIABLE: &str = "KRB5_KTNAME";
    if std::env::var_os(VARIABLE).as_deref() == Some(config.keytab.as_os_str()) {
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
        .env(VARIABLE, &config.keytab)
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

async fn check(config: &Config) -> Result<ExitCode, String> {
    let keys = open_keys(config).map(|_| "has a key of the service xman".to_owned());
    let findings = config::check(config, keys).await;
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
    let listeners = listen::bind(&config.listen).await?;
    let host = Arc::new(Host {
        keys,
        policy: policy(&config),
        audit: Audit::start(&config.syslog)
            .map_err(|error| format!("cannot start the audit log: {error}"))?,
        store,
        hypervisors: Hypervisors::start(config.hypervisors.clone()),
        repeats: Repeats::default(),
        jobs: Jobs::default(),
        door: Arc::default(),
        sessions: TaskTracker::new(),
        changes: TaskTracker::new(),
        stopping: CancellationToken::new(),
        config,
    });
    host.reread_policy();
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

fn policy(config: &Config) -> Chain {
    let backends = config
        .authorization
        .backends
        .iter()
        .map(|backend| -> Box<dyn Authorizer> {
            match backend {
                Backend::K5login => {
                    Box::new(K5login::new(config.authorization.k5login.clone(), ROOT))
                }
            }
        });
    Chain::new(backends.collect())
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
