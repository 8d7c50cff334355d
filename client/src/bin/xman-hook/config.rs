//! `/etc/xman/hook.toml`: which batch system this is, with whose key it speaks, and which domain of which host each of its nodes is.

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::Duration,
};

use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, de::Error as _};
use xman_client::name::{Principal, Tag};

use crate::{
    hook::Hook,
    nodes::{BadMap, Map, Nodes},
};

/// A configuration or a map has no reason to be longer, in bytes.
const MAX_LENGTH: u64 = 4 * 1024 * 1024;
/// The longest deadline: hosts take none longer.
const LONGEST: Duration = Duration::from_secs(24 * 3600);

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadConfig {
    #[error("{}: {error}; `--config FILE` names another", path.display())]
    Unreadable { path: PathBuf, error: io::Error },
    #[error("{}: it has more than {MAX_LENGTH} bytes", .0.display())]
    TooLong(PathBuf),
    #[error("{}: {reason}", path.display())]
    Wrong { path: PathBuf, reason: String },
}

/// The file as it is written.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct File {
    system: Tag,
    cluster: Option<Tag>,
    keytab: PathBuf,
    principal: Option<Principal>,
    krb5_conf: Option<PathBuf>,
    user_realm: Option<String>,
    #[serde(default = "queue_dir")]
    queue_dir: PathBuf,
    #[serde(default = "syslog")]
    syslog: PathBuf,
    #[serde(default)]
    unmapped: Unmapped,
    map_file: Option<PathBuf>,
    #[serde(default)]
    map: Vec<Map>,
    #[serde(default)]
    deadline: BTreeMap<String, SignedDuration>,
    #[serde(default)]
    slurm: Slurm,
    #[serde(default)]
    inside: Inside,
    #[serde(default)]
    serve: Serve,
}

/// What to do about a node of which nothing is known.
#[derive(Clone, Copy, Debug, Default, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Unmapped {
    /// It is a mistake.
    #[default]
    Refuse,
    /// It is none of xman's.
    Ignore,
}

/// `[slurm]`: what concerns `slurm watch`, `slurm resume` and `slurm suspend`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Slurm {
    /// Absolute paths: hooks have no PATH.
    pub(crate) squeue: PathBuf,
    pub(crate) sinfo: PathBuf,
    pub(crate) scontrol: PathBuf,
    /// slurm.conf, where it is not where Slurm looks for it.
    pub(crate) conf: Option<PathBuf>,
    /// How often `slurm watch` looks.
    #[serde(deserialize_with = "span")]
    pub(crate) interval: Duration,
    /// How long one of Slurm's commands may take.
    #[serde(deserialize_with = "span")]
    pub(crate) command_timeout: Duration,
    /// How `slurm suspend` takes a node's domain away.
    pub(crate) power_down: PowerDown,
    /// Whether `slurm watch` suspends in Slurm the jobs of a node that is paused or frozen.
    pub(crate) suspend_jobs: bool,
    /// Whether `slurm watch` requeues a job that runs without its room.
    pub(crate) requeue: bool,
    /// After how long `slurm watch` sets a silent node DOWN whose domain nobody holds back; never where absent.
    #[serde(deserialize_with = "some_span")]
    pub(crate) down_after: Option<Duration>,
    /// Whether `slurm watch` tells hosts which jobs there are, so that leases of others end.
    pub(crate) reconcile: bool,
}

impl Default for Slurm {
    fn default() -> Self {
        Self {
            squeue: "/usr/bin/squeue".into(),
            sinfo: "/usr/bin/sinfo".into(),
            scontrol: "/usr/bin/scontrol".into(),
            conf: None,
            interval: Duration::from_secs(10),
            command_timeout: Duration::from_secs(30),
            power_down: PowerDown::Shutdown,
            suspend_jobs: true,
            requeue: true,
            down_after: None,
            reconcile: true,
        }
    }
}

/// How a node that Slurm has no work for goes.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PowerDown {
    /// The guest is asked to shut down.
    Shutdown,
    /// Its memory is written to disk.
    Freeze,
}

/// `[inside]`: how deep a domain goes whose own batch daemon suspends a job; only what leaves the guest alive can be undone from inside.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Inside {
    pub(crate) depth: InsideDepth,
}

impl Default for Inside {
    fn default() -> Self {
        Self {
            depth: InsideDepth::Starve,
        }
    }
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum InsideDepth {
    Starve,
    Shrink,
}

/// `[serve]`: the socket for hooks that run as a job's owner.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Serve {
    pub(crate) socket: PathBuf,
}

impl Default for Serve {
    fn default() -> Self {
        Self {
            socket: "/run/xman-hook/socket".into(),
        }
    }
}

/// The whole configuration.
#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) path: PathBuf,
    pub(crate) system: Tag,
    pub(crate) cluster: Option<Tag>,
    pub(crate) keytab: PathBuf,
    pub(crate) principal: Option<Principal>,
    pub(crate) krb5_conf: Option<PathBuf>,
    pub(crate) user_realm: Option<String>,
    pub(crate) queue_dir: PathBuf,
    pub(crate) syslog: PathBuf,
    pub(crate) unmapped: Unmapped,
    pub(crate) nodes: Nodes,
    pub(crate) slurm: Slurm,
    pub(crate) inside: InsideDepth,
    pub(crate) socket: PathBuf,
    deadlines: BTreeMap<String, Duration>,
}

fn queue_dir() -> PathBuf {
    "/var/lib/xman/hook".into()
}

fn syslog() -> PathBuf {
    "/dev/log".into()
}

fn span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    bounded(SignedDuration::deserialize(deserializer)?).map_err(D::Error::custom)
}

fn some_span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    span(deserializer).map(Some)
}

fn bounded(span: SignedDuration) -> Result<Duration, String> {
    match Duration::try_from(span) {
        Ok(span) if !span.is_zero() && span <= LONGEST => Ok(span),
        Ok(_) | Err(_) => Err(format!(
            "'{span:#}' is no time to wait; it is more than nothing and at most a day, as \"30s\""
        )),
    }
}

impl Config {
    /// Reads the file, and the map that it names.
    pub(crate) fn read(path: &Path) -> Result<Self, BadConfig> {
        let text = read(path)?;
        let wrong = |reason: String| BadConfig::Wrong {
            path: path.to_owned(),
            reason,
        };
        let file: File = toml::from_str(&text)
            .map_err(|error| wrong(error.to_string().trim_end().to_owned()))?;
        let mut nodes = Nodes::new(file.map).map_err(|error| wrong(error.to_string()))?;
        if let Some(map) = &file.map_file {
            let lines = read(map)?;
            nodes
                .take_lines(&lines)
                .map_err(|error: BadMap| BadConfig::Wrong {
                    path: map.clone(),
                    reason: error.to_string(),
                })?;
        }
        for path in [
            &file.keytab,
            &file.queue_dir,
            &file.syslog,
            &file.serve.socket,
        ]
        .into_iter()
        .chain([&file.slurm.squeue, &file.slurm.sinfo, &file.slurm.scontrol])
        {
            if !path.is_absolute() {
                return Err(wrong(format!(
                    "'{}' is no absolute path; hooks run anywhere",
                    path.display()
                )));
            }
        }
        if let Some(realm) = &file.user_realm {
            format!("x@{realm}")
                .parse::<Principal>()
                .map_err(|error| wrong(format!("user-realm: {error}")))?;
        }
        let mut deadlines = BTreeMap::new();
        for (name, span) in file.deadline {
            if !Hook::ALL.iter().any(|hook| hook.full_name() == name) {
                let names: Vec<_> = Hook::ALL.iter().map(|hook| hook.full_name()).collect();
                return Err(wrong(format!(
                    "[deadline] there is no hook '{name}'; there are {}",
                    names.join(", ")
                )));
            }
            let span = bounded(span).map_err(|why| wrong(format!("[deadline] {name}: {why}")))?;
            deadlines.insert(name, span);
        }
        Ok(Self {
            path: path.to_owned(),
            system: file.system,
            cluster: file.cluster,
            keytab: file.keytab,
            principal: file.principal,
            krb5_conf: file.krb5_conf,
            user_realm: file.user_realm,
            queue_dir: file.queue_dir,
            syslog: file.syslog,
            unmapped: file.unmapped,
            nodes,
            slurm: file.slurm,
            inside: file.inside.depth,
            socket: file.serve.socket,
            deadlines,
        })
    }

    /// Returns how long a hook may take.
    pub(crate) fn deadline(&self, hook: Hook) -> Duration {
        self.deadlines
            .get(&hook.full_name())
            .copied()
            .unwrap_or_else(|| hook.deadline())
    }
}

fn read(path: &Path) -> Result<String, BadConfig> {
    let unreadable = |error| BadConfig::Unreadable {
        path: path.to_owned(),
        error,
    };
    let file = fs::File::open(path).map_err(unreadable)?;
    let mut text = String::new();
    file.take(MAX_LENGTH + 1)
        .read_to_string(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > MAX_LENGTH {
        return Err(BadConfig::TooLong(path.to_owned()));
    }
    Ok(text)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A configuration of these lines beside the least that there must be.
    pub(crate) fn config(lines: &str) -> Result<Config, BadConfig> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hook.toml");
        let least = "system = \"slurm\"\nkeytab = \"/etc/xman/hook.keytab\"\n";
        fs::write(&path, format!("{least}{lines}")).unwrap();
        Config::read(&path)
    }

    #[test]
    fn little_is_enough_and_all_can_be_said() {
        let least = config("").unwrap();
        assert_eq!(least.deadline(Hook::SlurmProlog), Duration::from_secs(8));
        let all = config(
            r#"
cluster = "grid"
principal = "slurm/ctl.example.org@EXAMPLE.ORG"
user-realm = "EXAMPLE.ORG"
queue-dir = "/var/lib/xman/q"
syslog = "/run/log"
unmapped = "ignore"
[[map]]
nodes = "cloud[1-40]"
domain = "{node}"
host = "skirit{n}"
[deadline]
slurm-prolog = "5s"
[slurm]
squeue = "/opt/slurm/bin/squeue"
interval = "2s"
power-down = "freeze"
down-after = "5m"
[inside]
depth = "shrink"
[serve]
socket = "/run/x"
"#,
        )
        .unwrap();
        assert_eq!(all.deadline(Hook::SlurmProlog), Duration::from_secs(5));
        assert_eq!(all.slurm.down_after, Some(Duration::from_secs(300)));
        assert_eq!(all.inside, InsideDepth::Shrink);
    }

    #[test]
    fn what_means_nothing_is_refused() {
        for bad in [
            "clustr = \"x\"",
            "cluster = \"Not A Tag\"",
            "queue-dir = \"relative\"",
            "user-realm = \"a@b\"",
            "unmapped = \"perhaps\"",
            "[deadline]\nslurm-prologue = \"5s\"",
            "[deadline]\nslurm-prolog = \"0s\"",
            "[deadline]\nslurm-prolog = \"-5s\"",
            "[deadline]\nslurm-prolog = \"48h\"",
            "[slurm]\nsqueue = \"squeue\"",
            "[slurm]\nsquee = \"/usr/bin/squeue\"",
            "[inside]\ndepth = \"pause\"",
            "[[map]]\nnodes = \"a[1-\"\nhost = \"h\"\ndomain = \"d\"",
            "[[map]]\nhost = \"h\"\ndomain = \"d\"",
            "map-file = \"/nonexistent/map\"",
            "[[map]]\nnodes = \"a\"\nhost = \"h\"\ndomain = \"{what}\"",
        ] {
            let error = config(bad).map(drop);
            assert!(error.is_err(), "{bad}");
        }
    }
}
