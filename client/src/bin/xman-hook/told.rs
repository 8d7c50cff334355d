//! What a hook has to say: on stderr, which some batch systems keep, and in the local syslog, where people look.

use std::{
    collections::HashMap,
    fmt::Write as _,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// The longest sentence, in bytes: what fits a line of every syslog.
const MAX_LINE: usize = 1000;
/// How long a syslog that does not read may keep a hook.
const LIMIT: Duration = Duration::from_millis(200);
/// For so long a service does not say the same again.
const SPARE: Duration = Duration::from_secs(600);
/// The most sentences that are remembered for that.
const MAX_SAID: usize = 1000;
/// Facility `daemon`, as syslog numbers it.
const DAEMON: u8 = 3 << 3;

/// How grave something is, as syslog numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Level {
    /// Somebody has to do something.
    Error = 3,
    /// It was not as it should be, and is taken care of.
    Warning = 4,
    /// As it should be.
    Info = 6,
}

/// Where sentences go.
#[derive(Debug)]
pub(crate) struct Told {
    syslog: PathBuf,
    /// `slurm prolog`
    speaker: String,
    /// When what was last said: a host that is away is no news every ten seconds.
    said: Mutex<HashMap<String, Instant>>,
}

impl Told {
    pub(crate) fn new(syslog: &Path, speaker: &str) -> Self {
        Self {
            syslog: syslog.to_owned(),
            speaker: speaker.to_owned(),
            said: Mutex::default(),
        }
    }

    pub(crate) fn error(&self, sentence: impl AsRef<str>) {
        self.say(Level::Error, sentence.as_ref());
    }

    pub(crate) fn warning(&self, sentence: impl AsRef<str>) {
        self.say(Level::Warning, sentence.as_ref());
    }

    pub(crate) fn info(&self, sentence: impl AsRef<str>) {
        self.say(Level::Info, sentence.as_ref());
    }

    /// Says it. Nobody being there to hear it is no reason to fail.
    pub(crate) fn say(&self, level: Level, sentence: &str) {
        let sentence = one_line(sentence);
        if level != Level::Info && !self.is_news(&sentence) {
            return;
        }
        let text = format!("{}: {sentence}", self.speaker);
        let _ = std::io::Write::write_all(&mut std::io::stderr(), format!("{text}\n").as_bytes());
        let _ = self.send(level, &text);
    }

    fn is_news(&self, sentence: &str) -> bool {
        let mut said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        said.retain(|_, at| now.duration_since(*at) < SPARE);
        if said.contains_key(sentence) {
            return false;
        }
        if said.len() < MAX_SAID {
            said.insert(sentence.to_owned(), now);
        }
        true
    }

    fn send(&self, level: Level, text: &str) -> std::io::Result<()> {
        let socket = UnixDatagram::unbound()?;
        socket.set_write_timeout(Some(LIMIT))?;
        socket.send_to(record(level, &now(), text).as_bytes(), &self.syslog)?;
        Ok(())
    }
}

fn now() -> String {
    jiff::Zoned::now().strftime("%b %e %H:%M:%S").to_string()
}

/// One record as every local syslog takes it (RFC 3164).
fn record(level: Level, time: &str, text: &str) -> String {
    format!(
        "<{}>{time} xman-hook[{}]: {text}",
        DAEMON | level as u8,
        std::process::id()
    )
}

/// Returns one line of anything: names of jobs and nodes come from people.
pub(crate) fn one_line(text: &str) -> String {
    let mut line = String::with_capacity(text.len().min(MAX_LINE));
    for c in text.chars() {
        if line.len() >= MAX_LINE {
            line.push_str("...");
            break;
        }
        if c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
        {
            let _ = write!(line, "{}", c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sentence_stays_one_line_of_bounded_length() {
        assert_eq!(
            one_line("Bücher\n<0>forged\x1b[2J"),
            "Bücher\\n<0>forged\\u{1b}[2J"
        );
        assert!(one_line(&"ü".repeat(10_000)).len() < MAX_LINE + 8);
    }

    #[test]
    fn trouble_is_said_once_for_a_while() {
        let told = Told::new("/nonexistent".as_ref(), "x");
        assert!(told.is_news("a") && told.is_news("b"));
        assert!(!told.is_news("a"));
        for number in 0..2 * MAX_SAID {
            told.is_news(&number.to_string());
        }
        assert!(told.said.lock().unwrap().len() <= MAX_SAID);
    }

    #[test]
    fn a_record_has_facility_daemon_and_the_programs_name() {
        let record = record(Level::Error, "Nov  3 04:05:06", "slurm prolog: x");
        assert!(
            record.starts_with("<27>Nov  3 04:05:06 xman-hook["),
            "{record}"
        );
        assert!(record.ends_with("]: slurm prolog: x"), "{record}");
    }
}
