//! From what came of each host and domain to one exit code.

use std::collections::HashSet;

use xman_client::Kind;

/// 1: refused or failed.
pub(crate) const FAILED: u8 = 1;
/// 2: the command line or the configuration is wrong.
pub(crate) const USAGE: u8 = 2;
const UNREACHABLE: u8 = 3;
const UNAUTHENTICATED: u8 = 4;
const PARTLY: u8 = 5;
/// 128 + SIGINT, as shells have it.
pub(crate) const INTERRUPTED: u8 = 130;

/// Counts what came of everything that was asked.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    done: usize,
    failed: HashSet<Kind>,
}

impl Tally {
    /// One more that is done.
    pub(crate) fn done(&mut self) {
        self.done += 1;
    }

    /// One more that failed.
    pub(crate) fn failed(&mut self, kind: Kind) {
        self.failed.insert(kind);
    }

    /// Counts in what came of something else.
    pub(crate) fn add(&mut self, other: Self) {
        self.done += other.done;
        self.failed.extend(other.failed);
    }

    /// Returns the exit code.
    pub(crate) fn code(&self) -> u8 {
        if self.failed.contains(&Kind::Interrupted) {
            return INTERRUPTED;
        }
        match (self.done, self.failed.len(), self.failed.iter().next()) {
            (_, 0, _) => 0,
            (0, 1, Some(Kind::Unreachable)) => UNREACHABLE,
            (0, 1, Some(Kind::Unauthenticated)) => UNAUTHENTICATED,
            (0, _, _) => FAILED,
            (_, _, _) => PARTLY,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(done: usize, failed: &[Kind], code: u8) {
        let tally = Tally {
            done,
            failed: failed.iter().copied().collect(),
        };
        assert_eq!(tally.code(), code, "{tally:?}");
    }

    #[test]
    fn exit_codes_tell_scripts_what_to_do() {
        use Kind::{Interrupted, Refused, Unauthenticated, Unreachable};
        check(0, &[], 0);
        check(3, &[], 0);
        check(0, &[Refused], 1);
        check(0, &[Unreachable], 3);
        check(0, &[Unauthenticated], 4);
        check(0, &[Unreachable, Unauthenticated], 1);
        check(0, &[Unreachable, Refused], 1);
        check(2, &[Unreachable], 5);
        check(2, &[Refused], 5);
        check(2, &[Refused, Interrupted], 130);
    }
}
