//! A program on a pseudo-terminal, as a person would use it.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::process::{Child, ExitStatus, Stdio};
use std::time::Duration;

use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::child::{Transcript, bare_command, eventually, program, spawn};

/// A program on a terminal; what it shows is in [`Terminal::screen`], control sequences included.
#[derive(Debug)]
pub struct Terminal {
    child: Child,
    keyboard: File,
    screen: Transcript,
}

impl Terminal {
    #[track_caller]
    pub(crate) fn open(words: &[OsString], env: &[(OsString, OsString)]) -> Self {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)
            .expect("the kernel has pseudo-terminals");
        grantpt(&master)
            .and_then(|()| unlockpt(&master))
            .expect("the terminal is ours");
        let name = ptsname(&master, Vec::new()).expect("a terminal has a name");
        let name = name.to_str().expect("/dev/pts/N").to_owned();
        let slave = OpenOptions::new()
            .read(true)
            .write(true)
            .open(name)
            .expect("the terminal is ours");
        set_size(&slave, 120, 40);

        let mut command = bare_command(&program("setsid"));
        command.arg("--ctty").args(words).envs(env.iter().cloned());
        let end = || Stdio::from(slave.try_clone().expect("a terminal can be duplicated"));
        command.stdin(end()).stdout(end()).stderr(end());
        let child = spawn(command);
        let keyboard = File::from(master);
        let screen = Transcript::of(keyboard.try_clone().expect("a terminal can be duplicated"));
        Self {
            child,
            keyboard,
            screen,
        }
    }

    /// Returns what the program has shown so far.
    #[must_use]
    pub fn screen(&self) -> &Transcript {
        &self.screen
    }

    /// Returns the process id of the program.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Types; the enter key is `\r`, control-C is `\x03`.
    #[track_caller]
    pub fn types(&mut self, keys: &str) {
        self.keyboard
            .write_all(keys.as_bytes())
            .expect("the terminal takes keys");
    }

    /// Waits until `text` is shown; fails the test, showing the screen, when `limit` has passed.
    #[track_caller]
    pub fn wait_for(&self, limit: Duration, text: &str) {
        self.screen.wait_for(limit, text);
    }

    /// Returns whether the terminal shows what is typed, as it does unless a program has made it raw.
    #[track_caller]
    #[must_use]
    pub fn echoes(&self) -> bool {
        let now = tcgetattr(&self.keyboard).expect("a terminal has attributes");
        now.local_modes.contains(LocalModes::ECHO)
    }

    /// Gives the terminal another size.
    pub fn resize(&self, columns: u16, rows: u16) {
        set_size(&self.keyboard, columns, rows);
    }

    /// Waits for the end of the program and returns its exit code; fails the test when `limit` has passed.
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> i32 {
        let status: ExitStatus = eventually("the program on the terminal ends", limit, || {
            self.child.try_wait().expect("a child can be waited for")
        });
        // The rest of the output comes right after the end; the reader then sees the terminal closed.
        let _ = self.screen.find(Duration::from_secs(10), |_| None::<()>);
        status.code().unwrap_or(-1)
    }
}

fn set_size(terminal: &File, columns: u16, rows: u16) {
    let size = Winsize {
        ws_row: rows,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    let _ = tcsetwinsize(terminal, size);
}

impl Drop for Terminal {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
