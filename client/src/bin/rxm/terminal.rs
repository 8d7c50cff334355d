//! The terminal while a guest's console has it: every key goes to the guest, and whatever happens it is given back as it was.
//!
//! ```text
//! as it was --enter--> raw --leave, error, panic, a signal that ends rxm--> as it was
//!                       ^ '--SIGTSTP--> as it was, and stopped
//!                       '---SIGCONT--------------------'
//! ```

use std::{
    io,
    sync::{Mutex, MutexGuard, PoisonError, atomic::AtomicBool},
};

use rustix::{
    process::{Signal, getpgrp, getpid, kill_process},
    stdio::stdin,
    termios::{OptionalActions, Termios, tcgetattr, tcgetpgrp, tcgetwinsize, tcsetattr},
};

/// While an editor has the terminal, its Ctrl-C is not ours.
pub(crate) static EDITOR_RUNS: AtomicBool = AtomicBool::new(false);

/// How it was, while it is raw.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// The raw terminal, until it is dropped.
#[derive(Debug)]
pub(crate) struct Raw(());

impl Raw {
    /// Takes the terminal on standard input.
    pub(crate) fn enter() -> io::Result<Self> {
        let mut kept = before();
        let now = tcgetattr(stdin())?;
        make_raw(&now)?;
        *kept = Some(now);
        Ok(Self(()))
    }
}

impl Drop for Raw {
    fn drop(&mut self) {
        restore();
    }
}

/// Gives the terminal back as it was; does nothing where it is not raw.
pub(crate) fn restore() {
    if let Some(before) = before().take() {
        // At once: a terminal that is held up must not keep what leaves it.
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

/// Gives the terminal back for a while and stops this process, as Ctrl-Z does elsewhere.
pub(crate) fn suspend() {
    if let Some(before) = before().as_ref() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, before);
    }
    let _ = kill_process(getpid(), Signal::STOP);
}

/// Takes the terminal again after a stop, if it is ours to take: who is in the background would be stopped for it.
pub(crate) fn resume() {
    let is_ours = tcgetpgrp(stdin()).is_ok_and(|group| group == getpgrp());
    if let Some(before) = before().as_ref()
        && is_ours
    {
        let _ = make_raw(before);
    }
}

/// Returns columns and rows, where they are known.
pub(crate) fn size() -> Option<(u16, u16)> {
    let size = tcgetwinsize(stdin()).ok()?;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}

fn make_raw(before: &Termios) -> io::Result<()> {
    let mut raw = before.clone();
    raw.make_raw();
    Ok(tcsetattr(stdin(), OptionalActions::Now, &raw)?)
}

fn before() -> MutexGuard<'static, Option<Termios>> {
    BEFORE.lock().unwrap_or_else(PoisonError::into_inner)
}
