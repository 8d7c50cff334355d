//! Whose jobs run in this guest: written down by Grid Engine's prolog, which root runs, for `serve`, which is asked by the jobs' owners.

use std::path::Path;

use nix::unistd::User;
use serde::{Deserialize, Serialize};
use xman_client::{Address, name::DomainRef, protocol::LeaseKey};

use crate::{
    folder::{BadFolder, Folder},
    intent::Spot,
    nodes::Place,
};

/// The most jobs that a guest has at once.
const MAX_RUNS: usize = 4096;

#[derive(Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Written {
    uid: u32,
    lease: String,
    host: String,
    domain: String,
}

/// A job that runs here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Known {
    pub(crate) uid: u32,
    pub(crate) spot: Spot,
}

/// The jobs.
#[derive(Clone, Debug)]
pub(crate) struct Runs {
    folder: Folder,
}

impl Runs {
    pub(crate) fn open(dir: &Path) -> Result<Self, BadFolder> {
        Ok(Self {
            folder: Folder::open(&dir.join("runs"), MAX_RUNS)?,
        })
    }

    /// Writes down whose job it is. Only root can: what anybody could write would prove nothing.
    pub(crate) fn keep(&self, id: &str, owner: &str, spot: &Spot) -> Result<(), String> {
        if !rustix::process::geteuid().is_root() {
            return Err(
                "this prolog does not run as root; the queue's `prolog` begins with root@"
                    .to_owned(),
            );
        }
        let user = User::from_name(owner)
            .map_err(|error| format!("the user '{owner}': {error}"))?
            .ok_or_else(|| format!("there is no user '{owner}' here"))?;
        self.write(id, user.uid.as_raw(), spot)
    }

    fn write(&self, id: &str, uid: u32, spot: &Spot) -> Result<(), String> {
        let written = Written {
            uid,
            lease: spot.key.to_string(),
            host: spot.place.host.to_string(),
            domain: spot.place.domain.to_string(),
        };
        let text = serde_json::to_string(&written).map_err(|error| error.to_string())?;
        self.folder
            .write(id, &text)
            .map_err(|error| format!("the job cannot be written down: {error}"))
    }

    /// Returns a job; nothing where none of that name runs here.
    pub(crate) fn find(&self, id: &str) -> Result<Option<Known>, String> {
        let Some(text) = self.folder.read(id).map_err(|error| error.to_string())? else {
            return Ok(None);
        };
        let written: Written = serde_json::from_str(&text).map_err(|error| error.to_string())?;
        let host: Address = written
            .host
            .parse()
            .map_err(|error: xman_client::BadHosts| error.to_string())?;
        let domain: DomainRef = written
            .domain
            .parse()
            .map_err(|error: xman_client::name::BadName| error.to_string())?;
        let key: LeaseKey = written
            .lease
            .parse()
            .map_err(|error: xman_client::protocol::BadLeaseKey| error.to_string())?;
        Ok(Some(Known {
            uid: written.uid,
            spot: Spot {
                key,
                place: Place { host, domain },
            },
        }))
    }

    /// Forgets a job that has ended.
    pub(crate) fn forget(&self, id: &str) -> std::io::Result<()> {
        self.folder.remove(id)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn spot() -> Spot {
        Spot {
            key: "sge/cell/4711.3/17".parse().unwrap(),
            place: Place {
                host: "skirit80:7000".parse().unwrap(),
                domain: "grid-1".parse().unwrap(),
            },
        }
    }

    #[test]
    fn a_job_is_found_as_it_was_written_down_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let runs = Runs::open(dir.path()).unwrap();
        runs.write("4711.3", 1000, &spot()).unwrap();
        let known = runs.find("4711.3").unwrap().unwrap();
        assert_eq!(
            known,
            Known {
                uid: 1000,
                spot: spot()
            }
        );
        runs.forget("4711.3").unwrap();
        assert_eq!(runs.find("4711.3").unwrap(), None);
    }
}
