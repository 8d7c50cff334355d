//! Questions to the person at the terminal.

use std::io::{self, BufRead, IsTerminal, Write};

use tokio::task;

use crate::{
    clean,
    exit::INTERRUPTED,
    setting::{Setting, Stop},
};

/// Returns whether there is somebody to ask.
pub(crate) fn is_possible() -> bool {
    io::stdin().is_terminal() && io::stderr().is_terminal()
}

/// Asks and returns the answer, trimmed and in small letters; empty at the end of input.
pub(crate) async fn ask(setting: &Setting, question: &str) -> Result<String, Stop> {
    let _ = write!(io::stderr().lock(), "rxm: {} ", clean::line(question));
    let _ = io::stderr().flush();
    let read = task::spawn_blocking(|| {
        let mut line = String::new();
        io::stdin().lock().read_line(&mut line).map(|_| line)
    });
    tokio::select! {
        read = read => match read {
            Ok(Ok(line)) => Ok(line.trim().to_lowercase()),
            Ok(Err(_)) | Err(_) => Ok(String::new()),
        },
        () = setting.patience.interrupt.raised() => {
            let _ = writeln!(io::stderr());
            Err(Stop::Code(INTERRUPTED))
        }
    }
}
