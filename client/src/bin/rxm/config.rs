//! `rxm.toml`: which hosts are meant when none are named, and what groups of them are called.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{self, Read},
    path::{Path, PathBuf},
};

use serde::Deserialize;

const SYSTEM: &str = "/etc/xman/rxm.toml";
/// A list of hosts has no reason to be longer, in bytes.
const MAX_LENGTH: u64 = 1024 * 1024;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadConfig {
    #[error("{path} cannot be read: {error}")]
    Unreadable { path: String, error: io::Error },
    #[error("{0} has more than {MAX_LENGTH} bytes; it is no list of hosts")]
    TooLong(String),
    #[error("{path} is wrong: {reason}")]
    Wrong { path: String, reason: String },
}

/// One file.
#[derive(Debug, Default, Deserialize, PartialEq)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Config {
    /// Stands in for -H.
    #[serde(default)]
    hosts: Option<Hosts>,
    /// What `@name` stands for.
    #[serde(default)]
    groups: BTreeMap<String, Hosts>,
}

/// A set of hosts, or a list of sets.
#[derive(Debug, Deserialize, PartialEq)]
#[serde(
    untagged,
    expecting = "expected a list of hosts such as \"skirit[80-84],skurut68\""
)]
enum Hosts {
    One(String),
    Many(Vec<String>),
}

impl Hosts {
    fn text(&self) -> String {
        match self {
            Self::One(set) => set.clone(),
            Self::Many(sets) => sets.join(","),
        }
    }
}

impl Config {
    /// Reads the person's file over the system's; either may be absent.
    pub(crate) fn read() -> Result<Self, BadConfig> {
        let mut config = Self::default();
        for path in [Some(PathBuf::from(SYSTEM)), own_path()]
            .into_iter()
            .flatten()
        {
            let Some(text) = read(&path)? else { continue };
            let wrong = |error: toml::de::Error| BadConfig::Wrong {
                path: path.display().to_string(),
                reason: error.to_string().trim_end().to_owned(),
            };
            let over: Self = toml::from_str(&text).map_err(wrong)?;
            config.hosts = over.hosts.or(config.hosts);
            config.groups.extend(over.groups);
        }
        Ok(config)
    }

    /// Returns the hosts that stand in for -H.
    pub(crate) fn hosts(&self) -> Option<String> {
        self.hosts.as_ref().map(Hosts::text)
    }

    /// Returns the names of all groups.
    pub(crate) fn group_names(&self) -> impl Iterator<Item = &str> {
        self.groups.keys().map(String::as_str)
    }

    /// Returns what a group stands for.
    pub(crate) fn group(&self, name: &str) -> Option<String> {
        self.groups.get(name).map(Hosts::text)
    }
}

fn own_path() -> Option<PathBuf> {
    let absolute = |name: &str| {
        env::var_os(name)
            .map(PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    let folder = absolute("XDG_CONFIG_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".config")))?;
    Some(folder.join("xman/rxm.toml"))
}

fn read(path: &Path) -> Result<Option<String>, BadConfig> {
    let shown = || path.display().to_string();
    let unreadable = |error| BadConfig::Unreadable {
        path: shown(),
        error,
    };
    let file = match fs::File::open(path) {
        Ok(file) => file,
        Err(error)
            if matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(None);
        }
        Err(error) => return Err(unreadable(error)),
    };
    let mut text = String::new();
    file.take(MAX_LENGTH + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_LENGTH {
        Err(BadConfig::TooLong(shown()))
    } else {
        Ok(Some(text))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_groups_are_sets_or_lists_of_sets() {
        let config: Config =
            toml::from_str("hosts = \"@g\"\n[groups]\ng = [\"a[1-2]\", \"b\"]\n").unwrap();
        assert_eq!(config.hosts().as_deref(), Some("@g"));
        assert_eq!(config.group("g").as_deref(), Some("a[1-2],b"));
        assert_eq!(config.group("x"), None);
    }

    #[test]
    fn unknown_keys_and_other_types_are_refused() {
        for bad in [
            "host = \"a\"",
            "hosts = 7",
            "[groups]\ng = { a = 1 }",
            "[group]\ng = \"a\"",
            "hosts = [",
        ] {
            assert!(toml::from_str::<Config>(bad).is_err(), "{bad}");
        }
    }
}
