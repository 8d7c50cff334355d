//! What libvirt's lifecycle events mean, in one table; and what is different after a time in which none came.

use std::{
    collections::{BTreeMap, HashMap},
    ffi::{c_int, c_uint},
};

use uuid::Uuid;
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{DomainState, Happening},
};

/// What a lifecycle event says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Meaning {
    /// Something has happened, and why in libvirt's words.
    Happened(Happening, &'static str),
    /// The domain gives its name up for another one, which the next event brings.
    Unnamed,
    /// A libvirt that is newer than this table speaks of something.
    Unknown,
}

/// Returns what libvirt means by an event and its detail.
pub(super) fn lifecycle(event: c_int, detail: c_int) -> Meaning {
    let Ok(event) = c_uint::try_from(event) else {
        return Meaning::Unknown;
    };
    let (what, words): (Happening, &[&'static str]) = match event {
        sys::VIR_DOMAIN_EVENT_DEFINED => match c_uint::try_from(detail) {
            Ok(sys::VIR_DOMAIN_EVENT_DEFINED_RENAMED) => (Happening::Renamed, &[]),
            Ok(_) | Err(_) => (
                Happening::Defined,
                &["added", "updated", "renamed", "from snapshot"],
            ),
        },
        sys::VIR_DOMAIN_EVENT_UNDEFINED => match c_uint::try_from(detail) {
            Ok(sys::VIR_DOMAIN_EVENT_UNDEFINED_RENAMED) => return Meaning::Unnamed,
            Ok(_) | Err(_) => (Happening::Undefined, &["removed"]),
        },
        sys::VIR_DOMAIN_EVENT_STARTED => (
            Happening::Started,
            &["booted", "migrated", "restored", "from snapshot", "wakeup"],
        ),
        sys::VIR_DOMAIN_EVENT_SUSPENDED => (
            Happening::Paused,
            &[
                "paused",
                "migrated",
                "I/O error",
                "watchdog",
                "restored",
                "from snapshot",
                "api error",
                "post-copy",
                "post-copy failed",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_RESUMED => (
            Happening::Resumed,
            &[
                "unpaused",
                "migrated",
                "from snapshot",
                "post-copy",
                "post-copy failed",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_STOPPED => (
            Happening::Stopped,
            &[
                "shutdown",
                "destroyed",
                "crashed",
                "migrated",
                "saved",
                "failed",
                "from snapshot",
            ],
        ),
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => (Happening::ShuttingDown, &["finished", "guest", "host"]),
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => (Happening::Sleeping, &["memory", "disk"]),
        sys::VIR_DOMAIN_EVENT_CRASHED => (Happening::Crashed, &["panicked", "crashloaded"]),
        _ => return Meaning::Unknown,
    };
    let why = usize::try_from(detail).ok().and_then(|at| words.get(at));
    Meaning::Happened(what, why.copied().unwrap_or_default())
}

/// How a domain looks.
pub(super) type Look = (DomainName, DomainState);
/// How all look.
pub(super) type Looks = HashMap<Uuid, Look>;

/// A domain that was found otherwise than it was left.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Difference {
    pub(super) uuid: Uuid,
    /// Its name now, or its last one.
    pub(super) name: DomainName,
    /// How it was.
    pub(super) detail: String,
}

/// Returns what is different, sorted by name.
pub(super) fn differences(before: &Looks, now: &Looks) -> Vec<Difference> {
    let mut found = BTreeMap::new();
    for (uuid, (name, state)) in now {
        let detail = match before.get(uuid) {
            None => "it was not there before".to_owned(),
            Some((old, was)) if old != name && differ(*was, *state) => {
                format!("it was called '{old}' and {was}")
            }
            Some((old, _)) if old != name => format!("it was called '{old}'"),
            Some((_, was)) if differ(*was, *state) => format!("it was {was}"),
            Some(_) => continue,
        };
        found.insert((name, uuid), detail);
    }
    for (uuid, (name, was)) in before {
        if !now.contains_key(uuid) {
            found.insert((name, uuid), format!("it was {was}, and is gone"));
        }
    }
    found
        .into_iter()
        .map(|((name, uuid), detail)| Difference {
            uuid: *uuid,
            name: name.clone(),
            detail,
        })
        .collect()
}

/// Whether two states mean that something has happened. A Xen guest that has nothing to do is blocked, from one moment to the next.
fn differ(one: DomainState, other: DomainState) -> bool {
    let awake = |state| match state {
        DomainState::Blocked => DomainState::Running,
        DomainState::Unknown
        | DomainState::Running
        | DomainState::Paused
        | DomainState::ShuttingDown
        | DomainState::Off
        | DomainState::Crashed
        | DomainState::Sleeping => state,
    };
    awake(one) != awake(other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(event: c_uint, detail: c_uint, what: Happening, why: &'static str) {
        let number = |number: c_uint| c_int::try_from(number).unwrap();
        assert_eq!(
            lifecycle(number(event), number(detail)),
            Meaning::Happened(what, why)
        );
    }

    #[test]
    fn each_event_of_libvirt_has_its_words() {
        use Happening::{
            Crashed, Defined, Paused, Renamed, Resumed, ShuttingDown, Sleeping, Started, Stopped,
            Undefined,
        };
        let defined = sys::VIR_DOMAIN_EVENT_DEFINED;
        check(
            defined,
            sys::VIR_DOMAIN_EVENT_DEFINED_ADDED,
            Defined,
            "added",
        );
        check(
            defined,
            sys::VIR_DOMAIN_EVENT_DEFINED_UPDATED,
            Defined,
            "updated",
        );
        check(defined, sys::VIR_DOMAIN_EVENT_DEFINED_RENAMED, Renamed, "");
        check(
            defined,
            sys::VIR_DOMAIN_EVENT_DEFINED_FROM_SNAPSHOT,
            Defined,
            "from snapshot",
        );
        let undefined = sys::VIR_DOMAIN_EVENT_UNDEFINED;
        check(
            undefined,
            sys::VIR_DOMAIN_EVENT_UNDEFINED_REMOVED,
            Undefined,
            "removed",
        );
        let started = sys::VIR_DOMAIN_EVENT_STARTED;
        check(
            started,
            sys::VIR_DOMAIN_EVENT_STARTED_BOOTED,
            Started,
            "booted",
        );
        check(
            started,
            sys::VIR_DOMAIN_EVENT_STARTED_MIGRATED,
            Started,
            "migrated",
        );
        check(
            started,
            sys::VIR_DOMAIN_EVENT_STARTED_RESTORED,
            Started,
            "restored",
        );
        check(
            started,
            sys::VIR_DOMAIN_EVENT_STARTED_FROM_SNAPSHOT,
            Started,
            "from snapshot",
        );
        check(
            started,
            sys::VIR_DOMAIN_EVENT_STARTED_WAKEUP,
            Started,
            "wakeup",
        );
        let paused = sys::VIR_DOMAIN_EVENT_SUSPENDED;
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED,
            Paused,
            "paused",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_MIGRATED,
            Paused,
            "migrated",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR,
            Paused,
            "I/O error",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_WATCHDOG,
            Paused,
            "watchdog",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_RESTORED,
            Paused,
            "restored",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_FROM_SNAPSHOT,
            Paused,
            "from snapshot",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_API_ERROR,
            Paused,
            "api error",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY,
            Paused,
            "post-copy",
        );
        check(
            paused,
            sys::VIR_DOMAIN_EVENT_SUSPENDED_POSTCOPY_FAILED,
            Paused,
            "post-copy failed",
        );
        let resumed = sys::VIR_DOMAIN_EVENT_RESUMED;
        check(
            resumed,
            sys::VIR_DOMAIN_EVENT_RESUMED_UNPAUSED,
            Resumed,
            "unpaused",
        );
        check(
            resumed,
            sys::VIR_DOMAIN_EVENT_RESUMED_MIGRATED,
            Resumed,
            "migrated",
        );
        check(
            resumed,
            sys::VIR_DOMAIN_EVENT_RESUMED_FROM_SNAPSHOT,
            Resumed,
            "from snapshot",
        );
        check(
            resumed,
            sys::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY,
            Resumed,
            "post-copy",
        );
        check(
            resumed,
            sys::VIR_DOMAIN_EVENT_RESUMED_POSTCOPY_FAILED,
            Resumed,
            "post-copy failed",
        );
        let stopped = sys::VIR_DOMAIN_EVENT_STOPPED;
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN,
            Stopped,
            "shutdown",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED,
            Stopped,
            "destroyed",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED,
            Stopped,
            "crashed",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_MIGRATED,
            Stopped,
            "migrated",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_SAVED,
            Stopped,
            "saved",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_FAILED,
            Stopped,
            "failed",
        );
        check(
            stopped,
            sys::VIR_DOMAIN_EVENT_STOPPED_FROM_SNAPSHOT,
            Stopped,
            "from snapshot",
        );
        let shutdown = sys::VIR_DOMAIN_EVENT_SHUTDOWN;
        check(
            shutdown,
            sys::VIR_DOMAIN_EVENT_SHUTDOWN_FINISHED,
            ShuttingDown,
            "finished",
        );
        check(
            shutdown,
            sys::VIR_DOMAIN_EVENT_SHUTDOWN_GUEST,
            ShuttingDown,
            "guest",
        );
        check(
            shutdown,
            sys::VIR_DOMAIN_EVENT_SHUTDOWN_HOST,
            ShuttingDown,
            "host",
        );
        let sleeping = sys::VIR_DOMAIN_EVENT_PMSUSPENDED;
        check(
            sleeping,
            sys::VIR_DOMAIN_EVENT_PMSUSPENDED_MEMORY,
            Sleeping,
            "memory",
        );
        check(
            sleeping,
            sys::VIR_DOMAIN_EVENT_PMSUSPENDED_DISK,
            Sleeping,
            "disk",
        );
        let crashed = sys::VIR_DOMAIN_EVENT_CRASHED;
        check(
            crashed,
            sys::VIR_DOMAIN_EVENT_CRASHED_PANICKED,
            Crashed,
            "panicked",
        );
        check(
            crashed,
            sys::VIR_DOMAIN_EVENT_CRASHED_CRASHLOADED,
            Crashed,
            "crashloaded",
        );
    }

    #[test]
    fn what_a_newer_libvirt_says_is_never_misread() {
        check(sys::VIR_DOMAIN_EVENT_STARTED, 99, Happening::Started, "");
        assert_eq!(lifecycle(2, -1), Meaning::Happened(Happening::Started, ""));
        assert_eq!(lifecycle(99, 0), Meaning::Unknown);
        assert_eq!(lifecycle(-1, 0), Meaning::Unknown);
        assert_eq!(lifecycle(1, 1), Meaning::Unnamed);
    }

    #[test]
    fn what_came_went_or_changed_unseen_is_told_and_nothing_else() {
        use DomainState::{Off, Paused, Running};
        let looks = |rows: &[(u128, &str, DomainState)]| -> Looks {
            let row = |(uuid, name, state): &(u128, &str, DomainState)| {
                (Uuid::from_u128(*uuid), (name.parse().unwrap(), *state))
            };
            rows.iter().map(row).collect()
        };
        let before = looks(&[
            (1, "same", Running),
            (2, "web", Running),
            (3, "gone", Paused),
            (4, "old", Off),
            (5, "ancient", Off),
        ]);
        let now = looks(&[
            (1, "same", DomainState::Blocked),
            (2, "web", Off),
            (4, "new", Off),
            (5, "modern", Running),
            (6, "fresh", Running),
        ]);
        let told: Vec<_> = differences(&before, &now)
            .into_iter()
            .map(|found| (found.name.to_string(), found.uuid.as_u128(), found.detail))
            .collect();
        let expected = [
            ("fresh", 6, "it was not there before"),
            ("gone", 3, "it was paused, and is gone"),
            ("modern", 5, "it was called 'ancient' and off"),
            ("new", 4, "it was called 'old'"),
            ("web", 2, "it was running"),
        ];
        let expected =
            expected.map(|(name, uuid, detail)| (name.to_owned(), uuid, detail.to_owned()));
        assert_eq!(told, expected);
        assert!(differences(&now, &now).is_empty());
    }
}
