//! Ends that were not delivered yet, one file each: no host that is away and no hook that is killed makes a job keep its room.
//!
//! A hook writes its end down, delivers it, and then removes the file. What is left is delivered by the next hook, by `xman-hook deliver` and by
//! `slurm watch` and `serve`, those of one host in their order.

use std::{
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;
use xman_client::{BadHosts, name::BadName, protocol::BadLeaseKey};

use crate::{
    folder::{BadFolder, Folder},
    intent::Spot,
    nodes::Place,
};

/// The most ends that are kept: ten thousand jobs ended while a host was away. What is beyond is found by `reconcile`.
const MAX_ENDS: usize = 10_000;
/// After so long a host is not coming back, or has long reconciled.
pub(crate) const TOO_OLD: Duration = Duration::from_secs(7 * 24 * 3600);

/// An end as it is kept.
#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    lease: String,
    host: String,
    domain: String,
    at_ms: u64,
}

/// An end that waits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct End {
    pub(crate) name: String,
    pub(crate) spot: Spot,
    pub(crate) at_ms: u64,
}

impl End {
    pub(crate) fn age(&self) -> Duration {
        Duration::from_millis(now_ms().saturating_sub(self.at_ms))
    }
}

/// The queue.
#[derive(Clone, Debug)]
pub(crate) struct Queue {
    folder: Folder,
}

/// What is in the queue.
#[derive(Debug, Default)]
pub(crate) struct Content {
    pub(crate) ends: Vec<End>,
    /// What was put aside, and why.
    pub(crate) spoilt: Vec<String>,
}

impl Queue {
    pub(crate) fn open(dir: &Path) -> Result<Self, BadFolder> {
        let folder = Folder::open(&dir.join("ends"), MAX_ENDS)?;
        Ok(Self { folder })
    }

    /// Keeps an end.
    pub(crate) fn keep(&self, spot: &Spot) -> std::io::Result<End> {
        let at_ms = now_ms();
        let end = End {
            name: format!("{at_ms:015}-{}", Uuid::new_v4()),
            spot: spot.clone(),
            at_ms,
        };
        let written = Written {
            lease: spot.key.to_string(),
            host: spot.place.host.to_string(),
            domain: spot.place.domain.to_string(),
            at_ms,
        };
        let text = serde_json::to_string(&written).map_err(std::io::Error::other)?;
        self.folder.write(&end.name, &text)?;
        Ok(end)
    }

    /// Forgets an end that was delivered.
    pub(crate) fn forget(&self, end: &End) -> std::io::Result<()> {
        self.folder.remove(&end.name)
    }

    /// Puts one aside that no host will ever take.
    pub(crate) fn put_aside(&self, end: &End) -> std::io::Result<()> {
        self.folder.put_aside(&end.name)
    }

    /// Returns all ends, the oldest first. What cannot be read is put aside and stands in nobody's way.
    pub(crate) fn content(&self) -> std::io::Result<Content> {
        let mut content = Content::default();
        for name in self.folder.names()? {
            let read = match self.folder.read(&name) {
                Ok(Some(text)) => read(&name, &text),
                // Somebody else has delivered it.
                Ok(None) => continue,
                Err(error) => Err(error.to_string()),
            };
            match read {
                Ok(end) => content.ends.push(end),
                Err(why) => {
                    let aside = self.folder.put_aside(&name);
                    let how = aside.map_or_else(
                        |error| format!(", and cannot be put aside: {error}"),
                        |()| String::new(),
                    );
                    content.spoilt.push(format!("{name}: {why}{how}"));
                }
            }
        }
        Ok(content)
    }

    /// Takes the queue for oneself; nothing where somebody else delivers it already.
    pub(crate) fn take(&self) -> std::io::Result<Option<std::fs::File>> {
        self.folder.take()
    }
}

fn read(name: &str, text: &str) -> Result<End, String> {
    let written: Written = serde_json::from_str(text).map_err(|error| error.to_string())?;
    let words = |error: &dyn std::error::Error| error.to_string();
    let (host, domain) = (&written.host, &written.domain);
    Ok(End {
        name: name.to_owned(),
        spot: Spot {
            key: written
                .lease
                .parse()
                .map_err(|error| words(&error as &BadLeaseKey))?,
            place: Place {
                host: host.parse().map_err(|error| words(&error as &BadHosts))?,
                domain: domain.parse().map_err(|error| words(&error as &BadName))?,
            },
        },
        at_ms: written.at_ms,
    })
}

/// Returns milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .ok()
        .and_then(|since| u64::try_from(since.as_millis()).ok())
        .unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn spot(key: &str) -> Spot {
        Spot {
            key: key.parse().unwrap(),
            place: Place {
                host: "skirit80:7000".parse().unwrap(),
                domain: "grid-1".parse().unwrap(),
            },
        }
    }

    #[test]
    fn ends_are_kept_in_their_order_until_they_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path()).unwrap();
        let first = queue.keep(&spot("slurm/grid/1/0")).unwrap();
        std::thread::sleep(Duration::from_millis(2));
        let second = queue.keep(&spot("slurm/grid/1/1")).unwrap();
        let again = Queue::open(dir.path()).unwrap();
        assert_eq!(
            again.content().unwrap().ends,
            [first.clone(), second.clone()]
        );
        again.forget(&first).unwrap();
        again.forget(&first).unwrap();
        assert_eq!(queue.content().unwrap().ends, [second]);
    }

    #[test]
    fn what_is_spoilt_is_told_once_and_stands_in_nobodys_way() {
        let dir = tempfile::tempdir().unwrap();
        let queue = Queue::open(dir.path()).unwrap();
        let folder = dir.path().join("ends");
        for (name, bytes) in [
            ("000000000000001-a", &b""[..]),
            (
                "000000000000002-b",
                b"{\"lease\":\"x\",\"host\":\"h\",\"domain\":\"d\",\"at-ms\":1}",
            ),
            (
                "000000000000003-c",
                b"{\"lease\":\"slurm/grid/1/0\",\"host\":\"../h\",\"domain\":\"d\",\"at-ms\":1}",
            ),
            ("000000000000004-d", b"\xff\xfe"),
            ("000000000000005-e", &[b'x'; 20_000]),
        ] {
            fs::write(folder.join(name), bytes).unwrap();
        }
        let end = queue.keep(&spot("slurm/grid/1/0")).unwrap();
        let content = queue.content().unwrap();
        assert_eq!(content.ends, [end]);
        assert_eq!(content.spoilt.len(), 5, "{:?}", content.spoilt);
        assert!(queue.content().unwrap().spoilt.is_empty());
        assert!(folder.join("000000000000001-a.bad").exists());
    }
}
