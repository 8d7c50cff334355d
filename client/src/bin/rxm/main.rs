//! `rxm`: the command line of xman.

mod args;
mod ask;
mod change;
mod clean;
mod complete;
mod config;
mod console;
mod devices;
mod drain;
mod edit;
mod events;
mod exit;
mod files;
mod heard;
mod holds;
mod info;
mod job;
mod lease;
mod list;
mod maintenance;
mod messages;
mod metadata;
mod migrate;
mod options;
mod output;
mod reconcile;
mod rights;
mod saved;
mod setting;
mod status;
mod tags;
mod target;
mod terminal;
mod told;
mod units;
mod values;
mod verbs;
mod whoami;

use std::{env, fs, io, path::Path, process::ExitCode, sync::atomic::Ordering};

use clap::{CommandFactory, Parser};
use clap_complete::generate;
use tokio::{runtime, sync::watch};
use xman_client::{Interrupt, Kind, fleet};

use crate::{
    args::{Cli, Command, Shell, owners_behind_dashes},
    complete::COMPLETE,
    exit::{FAILED, INTERRUPTED, Tally, USAGE},
    job::Job,
    options::Options,
    output::Unprinted,
    setting::{Setting, Stop, code_of},
};

fn main() -> ExitCode {
    if env::args_os().nth(1).is_some_and(|word| word == COMPLETE) {
        return complete_silently();
    }
    let Cli { options, command } = Cli::parse_from(owners_behind_dashes(env::args_os()));
    let ended = match threads().build() {
        Ok(runtime) => {
            let ended = runtime.block_on(work(options, command));
            // Kerberos may still be waiting for a KDC.
            runtime.shutdown_background();
            ended
        }
        Err(error) => Err(Stop::Failed(Kind::Refused, format!("no threads: {error}"))),
    };
    ExitCode::from(match ended {
        Ok(tally) => tally.code(),
        Err(stop) => tell(stop),
    })
}

/// Whatever comes of it, a shell that asks is told no error.
fn complete_silently() -> ExitCode {
    if let Ok(runtime) = threads().build() {
        runtime.block_on(complete::complete(env::args_os().skip(2).collect()));
        runtime.shutdown_background();
    }
    ExitCode::SUCCESS
}

fn threads() -> runtime::Builder {
    let mut builder = runtime::Builder::new_multi_thread();
    builder
        .worker_threads(2)
        .max_blocking_threads(fleet::BLOCKING_THREADS)
        .enable_all();
    builder
}

fn tell(stop: Stop) -> u8 {
    let (code, text) = match stop {
        Stop::Usage(text) => (USAGE, text),
        Stop::Failed(kind, text) => (code_of(kind), text),
        Stop::Code(code) => return code,
        Stop::Unprinted(Unprinted::Closed) => return 0,
        Stop::Unprinted(Unprinted::Broken(error)) => (FAILED, format!("standard output: {error}")),
    };
    let _ = io::Write::write_all(
        &mut io::stderr(),
        format!("rxm: {}\n", clean::text(&text)).as_bytes(),
    );
    code
}

async fn work(options: Options, command: Command) -> Result<Tally, Stop> {
    let (raise, interrupt) = Interrupt::new();
    tokio::spawn(watch_for_interrupt(raise));
    let setting = &Setting::new(options, interrupt)?;
    match command {
        Command::List(args) => list::list(setting, args).await,
        Command::Info => info::info(setting).await,
        Command::Whoami => whoami::whoami(setting).await,
        Command::Dmesg(args) => messages::dmesg(setting, args).await,
        Command::Events(args) => events::events(setting, args).await,
        Command::Describe(args) => messages::describe(setting, args).await,
        Command::Create(args) => files::create(setting, args).await,
        Command::Define(args) => files::define(setting, args).await,
        Command::Start(args) => verbs::start(setting, args).await,
        Command::Undefine(args) => verbs::undefine(setting, args).await,
        Command::Destroy(args) => verbs::destroy(setting, args).await,
        Command::Reboot(args) => verbs::reboot(setting, args).await,
        Command::Shutdown(args) => verbs::shutdown(setting, args).await,
        Command::Pause(args) => verbs::pause(setting, args).await,
        Command::Unpause(args) => verbs::unpause(setting, args).await,
        Command::MemSet(args) => verbs::mem_set(setting, args).await,
        Command::VcpuSet(args) => verbs::vcpu_set(setting, args).await,
        Command::Attach(device) => devices::attach(setting, device).await,
        Command::Detach(device) => devices::detach(setting, device).await,
        Command::Console(args) => console::console(setting, args).await,
        Command::Edit(args) => edit::edit(setting, args).await,
        Command::Migrate(args) => migrate::migrate(setting, args).await,
        Command::Save(args) => saved::save(setting, args).await,
        Command::Restore(args) => saved::restore(setting, args).await,
        Command::Images => saved::images(setting).await,
        Command::Discard(args) => saved::discard(setting, args).await,
        Command::Autostart(args) => verbs::autostart(setting, args).await,
        Command::Reset(args) => verbs::reset(setting, args).await,
        Command::Rename(args) => verbs::rename(setting, args).await,
        Command::Lease(command) => lease::lease(setting, command).await,
        Command::Preempt(args) => holds::preempt(setting, args).await,
        Command::Resume(args) => holds::resume(setting, args).await,
        Command::Freeze(args) => holds::freeze(setting, args).await,
        Command::Thaw(args) => holds::thaw(setting, args).await,
        Command::Status(args) => status::status(setting, args).await,
        Command::Reconcile(args) => reconcile::reconcile(setting, args).await,
        Command::Maintenance(command) => maintenance::maintenance(setting, command).await,
        Command::Drain(args) => drain::drain(setting, args).await,
        Command::Owner(args) => metadata::owner(setting, args).await,
        Command::Label(args) => metadata::label(setting, args).await,
        Command::Class(args) => metadata::class(setting, args).await,
        Command::Explain(args) => rights::explain(setting, args).await,
        Command::Can(args) => rights::can(setting, args).await,
        Command::Job(Job::List) => job::list(setting).await,
        Command::Job(Job::Wait { job }) => job::wait(setting, &job).await,
        Command::Job(Job::Cancel { job }) => job::cancel(setting, &job).await,
        Command::Completion { shell } => completion(shell),
        Command::Man { dir } => man_pages(&dir),
    }
}

/// The first Ctrl-C asks everything under way to end, the second does not ask.
async fn watch_for_interrupt(raise: watch::Sender<bool>) {
    while tokio::signal::ctrl_c().await.is_ok() {
        if terminal::EDITOR_RUNS.load(Ordering::Relaxed) {
            continue;
        }
        if raise.send_replace(true) {
            terminal::restore();
            std::process::exit(INTERRUPTED.into());
        }
    }
}

fn completion(asked: Shell) -> Result<Tally, Stop> {
    let shell = match asked {
        Shell::Bash => clap_complete::Shell::Bash,
        Shell::Zsh => clap_complete::Shell::Zsh,
        Shell::Fish => clap_complete::Shell::Fish,
    };
    let mut script = Vec::new();
    generate(shell, &mut Cli::command(), "rxm", &mut script);
    let script = String::from_utf8_lossy(&script);
    let script = match asked {
        Shell::Bash => complete::for_bash(&script),
        Shell::Zsh => complete::for_zsh(&script),
        Shell::Fish => complete::for_fish(&script),
    };
    io::Write::write_all(&mut io::stdout(), script.as_bytes()).map_err(Unprinted::from)?;
    Ok(Tally::default())
}

fn man_pages(dir: &Path) -> Result<Tally, Stop> {
    let mut command = Cli::command().disable_help_subcommand(true);
    command.build();
    match fs::create_dir_all(dir).and_then(|()| man_page(&command, dir)) {
        Ok(()) => Ok(Tally::default()),
        Err(error) => Err(Stop::Failed(
            Kind::Refused,
            format!("{}: {error}", dir.display()),
        )),
    }
}

/// Writes the page of a command and those of its subcommands.
fn man_page(command: &clap::Command, dir: &Path) -> io::Result<()> {
    let man = clap_mangen::Man::new(command.clone());
    let mut page = Vec::new();
    man.render(&mut page)?;
    // What stands after the help of a command is no extra: it is examples and notes.
    let page = String::from_utf8_lossy(&page).replace(".SH EXTRA", ".SH NOTES");
    fs::write(dir.join(man.get_filename()), page)?;
    command
        .get_subcommands()
        .filter(|sub| !sub.is_hide_set())
        .try_for_each(|sub| man_page(sub, dir))
}
