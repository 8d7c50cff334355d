//! The whole configuration.

use std::{
    collections::BTreeMap,
    fs, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    time::Duration,
};

use glob::Pattern;
use jiff::SignedDuration;
use serde::{Deserialize, Deserializer, de::Error as _};
use xman_common::{
    name::{DomainName, HostName, LinkName, Tag},
    protocol::{Depth, PORT},
};
use xman_policy::{
    external::External,
    groups::PrincipalPattern,
    systems::{NodePattern, System, Systems},
};

use crate::ROOT;

/// Why the configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    /// No file to read.
    #[error("{}: {source}; `--config FILE` names another", path.display())]
    Unreadable { path: PathBuf, source: io::Error },
    /// Not TOML, or keys and values that mean nothing here.
    #[error("{}: {source}", path.display())]
    Malformed {
        path: PathBuf,
        source: Box<toml::de::Error>,
    },
    /// Values that do not go together.
    #[error("{}: {what}", path.display())]
    Senseless { path: PathBuf, what: String },
}

/// `/etc/xman/xmand.toml`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Config {
    /// Where to listen; port 0 takes a free one.
    pub(crate) listen: Vec<SocketAddr>,
    /// Holds the keys of `xman/<host>`.
    pub(crate) keytab: PathBuf,
    /// libvirt URIs; the first takes `create` and `define`.
    pub(crate) hypervisors: Vec<String>,
    /// The store's folder.
    pub(crate) state_dir: PathBuf,
    /// The local syslog's socket.
    pub(crate) syslog: PathBuf,
    /// Whether a change may go on unrecorded.
    pub(crate) audit: AuditNeed,
    /// How long SIGTERM waits for work in flight.
    #[serde(deserialize_with = "span")]
    pub(crate) shutdown_grace: Duration,
    /// Who decides.
    pub(crate) authorization: Authorization,
    /// Where guests may go.
    pub(crate) migration: Migration,
    /// What may be attached to domains.
    pub(crate) devices: Devices,
    /// How room is made for jobs.
    pub(crate) schedule: Schedule,
    /// What callers may use up.
    pub(crate) limits: Limits,
}

/// What a change needs of the audit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum AuditNeed {
    /// What cannot be recorded is not begun.
    Required,
    /// It goes on, and the record is sent when syslog is back.
    BestEffort,
}

/// `[authorization]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Authorization {
    /// Asked in this order; the first opinion decides.
    pub(crate) backends: Vec<Backend>,
    /// The administrators of this machine.
    pub(crate) k5login: PathBuf,
    /// A folder of `*.cedar` and `groups.toml`.
    pub(crate) cedar: PathBuf,
    /// Whether policies see the Unix groups of a principal's local account, as `unix:NAME`.
    pub(crate) unix_groups: bool,
    /// The socket of the site's own authority.
    pub(crate) external: PathBuf,
    /// How long it may take for one question, or for those of one list.
    #[serde(deserialize_with = "span")]
    pub(crate) external_timeout: Duration,
    /// Principals that may act for others where a policy allows `act-for`.
    #[serde(deserialize_with = "patterns")]
    pub(crate) act_for: Vec<PrincipalPattern>,
}

/// A way to decide.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Backend {
    /// One principal a line.
    K5login,
    /// Site policies in the Cedar language.
    Cedar,
    /// Another program decides.
    External,
}

/// `[migration]`
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Migration {
    /// The hosts that this one exchanges guests with. They are root on each other.
    pub(crate) peers: Vec<HostName>,
    /// How this host's libvirt reaches the other's; `{host}` stands for its name.
    pub(crate) uri: String,
}

/// `[devices]`: what of the host a domain may get by `attach`.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Devices {
    /// Folders below which images and block devices lie.
    pub(crate) disks: Vec<PathBuf>,
    /// libvirt's networks.
    pub(crate) networks: Vec<LinkName>,
    /// The host's bridges.
    pub(crate) bridges: Vec<LinkName>,
}

/// `[schedule]`: in force where a class is named.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Schedule {
    /// Memory that is for the host itself, in KiB.
    #[serde(rename = "reserve-memory", deserialize_with = "kib")]
    pub(crate) reserve_kib: u64,
    /// CPUs that are for the host itself, and for the domains of no class.
    pub(crate) reserve_cpus: u32,
    /// How long a domain runs after it has come back before it is preempted again.
    #[serde(deserialize_with = "span")]
    pub(crate) min_run: Duration,
    /// By name.
    pub(crate) class: BTreeMap<Tag, ClassRule>,
    /// The batch systems, by name.
    pub(crate) system: BTreeMap<Tag, SystemRule>,
}

/// `[schedule.class.NAME]`: domains that take part alike.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct ClassRule {
    /// Domains of these names are of this class where their metadata say no other.
    #[serde(default, deserialize_with = "globs")]
    pub(crate) domains: Vec<Pattern>,
    /// A higher one preempts a lower one.
    #[serde(default)]
    pub(crate) rank: i32,
    /// How its domains give way.
    #[serde(default)]
    pub(crate) preempt: Yield,
    /// Memory that is left to a domain that is shrunk, in KiB.
    #[serde(default = "default_floor", rename = "floor", deserialize_with = "kib")]
    pub(crate) floor_kib: u64,
    /// For how long a domain that was started is shown as booting.
    #[serde(default)]
    pub(crate) boot: SignedDuration,
}

/// Whether the domains of a class give way while they have jobs, and how deep.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Yield {
    /// A trickle of CPU.
    #[default]
    Starve,
    /// And their memory down to a floor.
    Shrink,
    /// Their virtual CPUs stop.
    Pause,
    /// Their memory goes to the disk.
    Freeze,
    /// Never.
    Never,
}

impl Yield {
    /// Returns how deep; nothing where never.
    pub(crate) fn depth(self) -> Option<Depth> {
        match self {
            Self::Starve => Some(Depth::Starve),
            Self::Shrink => Some(Depth::Shrink),
            Self::Pause => Some(Depth::Pause),
            Self::Freeze => Some(Depth::Freeze),
            Self::Never => None,
        }
    }
}

/// `[schedule.system.NAME]`: a batch system, and whose word is its own.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct SystemRule {
    /// Who speaks for it.
    #[serde(default, deserialize_with = "patterns")]
    pub(crate) principals: Vec<PrincipalPattern>,
    /// The keys of its nodes, each of which speaks for its own domain.
    #[serde(default, deserialize_with = "nodes")]
    pub(crate) nodes: Vec<NodePattern>,
    /// The domains that it may touch.
    #[serde(deserialize_with = "globs")]
    pub(crate) domains: Vec<Pattern>,
}

impl Schedule {
    /// Returns whether anything is scheduled here.
    pub(crate) fn is_on(&self) -> bool {
        !self.class.is_empty()
    }

    /// Returns the class that a domain takes part in, where it takes part: its metadata's, or else the first whose patterns have its name.
    pub(crate) fn class_of(
        &self,
        own: Option<&Tag>,
        name: &DomainName,
    ) -> Option<(&Tag, &ClassRule)> {
        match own {
            Some(tag) => self.class.get_key_value(tag),
            None => self.class.iter().find(|(_, class)| {
                let mut patterns = class.domains.iter();
                patterns.any(|pattern| pattern.matches(name.as_str()))
            }),
        }
    }

    /// Returns who speaks for the batch systems.
    pub(crate) fn systems(&self) -> Systems {
        let systems = self.system.iter().map(|(name, rule)| System {
            name: name.clone(),
            principals: rule.principals.clone(),
            nodes: rule.nodes.clone(),
            domains: rule.domains.clone(),
        });
        Systems::new(systems.collect())
    }
}

/// `[limits]`: each answers an attack that its docs name.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Connections that have not proved who they are: strangers cannot use up descriptors.
    pub(crate) max_unauthenticated: usize,
    /// The same from one address: one machine cannot keep the others out.
    pub(crate) max_unauthenticated_per_address: usize,
    /// Sessions of one principal: a runaway script cannot keep the others out.
    pub(crate) max_per_principal: usize,
    /// Sessions in all.
    pub(crate) max_sessions: usize,
    /// For the whole handshake: who says nothing holds nothing.
    #[serde(deserialize_with = "span")]
    pub(crate) handshake: Duration,
    /// Without a call: forgotten connections end.
    #[serde(deserialize_with = "span")]
    pub(crate) idle: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            listen: vec![SocketAddr::from(([0; 16], PORT))],
            keytab: "/etc/xman/xman.keytab".into(),
            hypervisors: vec!["qemu:///system".to_owned()],
            state_dir: "/var/lib/xman".into(),
            syslog: "/dev/log".into(),
            audit: AuditNeed::Required,
            shutdown_grace: Duration::from_secs(20),
            authorization: Authorization::default(),
            migration: Migration::default(),
            devices: Devices::default(),
            schedule: Schedule::default(),
            limits: Limits::default(),
        }
    }
}

impl Default for Authorization {
    fn default() -> Self {
        Self {
            backends: vec![Backend::K5login],
            k5login: "/root/.k5login".into(),
            cedar: "/etc/xman/policy".into(),
            unix_groups: false,
            external: "/run/xman/authz.sock".into(),
            external_timeout: Duration::from_secs(2),
            act_for: Vec::new(),
        }
    }
}

impl Authorization {
    /// Returns the backend that asks the site's own authority, as the host of this name.
    pub(crate) fn authority(&self, host: String) -> External {
        External::new(self.external.clone(), ROOT, host, self.external_timeout)
    }
}

impl Default for Migration {
    fn default() -> Self {
        Self {
            peers: Vec::new(),
            uri: "qemu+tls://{host}/system".to_owned(),
        }
    }
}

impl Default for Devices {
    fn default() -> Self {
        Self {
            disks: vec!["/var/lib/libvirt/images".into()],
            networks: "default".parse().into_iter().collect(),
            bridges: Vec::new(),
        }
    }
}

impl Default for Schedule {
    fn default() -> Self {
        Self {
            reserve_kib: 2 * 1024 * 1024,
            reserve_cpus: 0,
            min_run: Duration::from_secs(60),
            class: BTreeMap::new(),
            system: BTreeMap::new(),
        }
    }
}

/// A guest of today's kernels lives on that.
fn default_floor() -> u64 {
    256 * 1024
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            max_unauthenticated: 64,
            max_unauthenticated_per_address: 16,
            max_per_principal: 64,
            max_sessions: 1024,
            handshake: Duration::from_secs(10),
            idle: Duration::from_secs(600),
        }
    }
}

fn span<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let span = SignedDuration::deserialize(deserializer)?;
    Duration::try_from(span)
        .ok()
        .filter(|span| !span.is_zero())
        .ok_or_else(|| D::Error::custom("a time span above zero, as \"10s\""))
}

/// Memory as people write it, `512MiB`; in KiB.
fn kib<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let text = String::deserialize(deserializer)?;
    let units = [
        ("KiB", 1),
        ("MiB", 1 << 10),
        ("GiB", 1 << 20),
        ("TiB", 1_u64 << 30),
    ];
    units
        .into_iter()
        .find_map(|(unit, kib)| {
            let number: u64 = text.strip_suffix(unit)?.trim_end().parse().ok()?;
            number.checked_mul(kib)
        })
        .ok_or_else(|| {
            D::Error::custom(format!(
                "'{text}' is no amount of memory, as \"512MiB\" or \"2GiB\""
            ))
        })
}

fn globs<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Pattern>, D::Error> {
    Vec::<String>::deserialize(deserializer)?
        .iter()
        .map(|text| Pattern::new(text).map_err(D::Error::custom))
        .collect()
}

fn nodes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<NodePattern>, D::Error> {
    Vec::<String>::deserialize(deserializer)?
        .iter()
        .map(|text| text.parse().map_err(D::Error::custom))
        .collect()
}

fn patterns<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<PrincipalPattern>, D::Error> {
    Vec::<String>::deserialize(deserializer)?
        .iter()
        .map(|text| text.parse().map_err(D::Error::custom))
        .collect()
}

impl Config {
    /// Reads a file and refuses what it does not know.
    pub(crate) fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = fs::read_to_string(path).map_err(|source| ConfigError::Unreadable {
            path: path.into(),
            source,
        })?;
        let config: Self = toml::from_str(&text).map_err(|source| ConfigError::Malformed {
            path: path.into(),
            source: Box::new(source),
        })?;
        match config.nonsense() {
            Some(what) => Err(ConfigError::Senseless {
                path: path.into(),
                what,
            }),
            None => Ok(config),
        }
    }

    fn nonsense(&self) -> Option<String> {
        let limits = &self.limits;
        if self.listen.is_empty() {
            Some("`listen` names no address, so nobody could connect".to_owned())
        } else if self.hypervisors.is_empty() {
            Some("`hypervisors` names no libvirt URI".to_owned())
        } else if is_twice(&self.hypervisors) {
            Some("`hypervisors` names a libvirt URI twice".to_owned())
        } else if self
            .hypervisors
            .iter()
            .any(|uri| uri.contains('\0') || uri.is_empty())
        {
            Some("`hypervisors` holds an empty URI, or one with a NUL".to_owned())
        } else if self.authorization.backends.is_empty() {
            Some("`authorization.backends` is empty, so everybody would be refused; name at least \"k5login\"".to_owned())
        } else if is_twice(&self.authorization.backends) {
            Some("`authorization.backends` names a backend twice".to_owned())
        } else if !self.migration.uri.contains("{host}") {
            Some("`migration.uri` lacks {host}, where the destination's name goes".to_owned())
        } else if self
            .devices
            .disks
            .iter()
            .any(|folder| !folder.is_absolute() || folder.parent().is_none())
        {
            Some(
                "`devices.disks` names folders from the root on, and never the root itself"
                    .to_owned(),
            )
        } else if [
            limits.max_unauthenticated,
            limits.max_unauthenticated_per_address,
            limits.max_per_principal,
            limits.max_sessions,
        ]
        .contains(&0)
        {
            Some("a limit of 0 in `limits` would refuse everybody".to_owned())
        } else if let Some((name, _)) = self
            .schedule
            .system
            .iter()
            .find(|(_, system)| system.principals.is_empty() && system.nodes.is_empty())
        {
            Some(format!(
                "nobody speaks for `schedule.system.{name}`; name its `principals`, or its `nodes`"
            ))
        } else if !self.schedule.system.is_empty() && !self.schedule.is_on() {
            Some("`schedule.system` is there and no `schedule.class`, so no domain would take part; name a class".to_owned())
        } else if self
            .schedule
            .class
            .values()
            .any(|class| class.boot.is_negative())
        {
            Some("`boot` of a class is no time span".to_owned())
        } else {
            None
        }
    }

    /// Returns the URI under which this host's libvirt reaches the one on `destination`, one of the peers.
    pub(crate) fn migration_uri(&self, destination: &HostName) -> Option<String> {
        self.migration.peers.contains(destination).then(|| {
            let host = destination.as_str();
            let host = if host.contains(':') {
                format!("[{host}]")
            } else {
                host.to_owned()
            };
            self.migration.uri.replace("{host}", &host)
        })
    }
}

fn is_twice<T: PartialEq>(values: &[T]) -> bool {
    let mut rest = values;
    while let [first, others @ ..] = rest {
        if others.contains(first) {
            return true;
        }
        rest = others;
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Config, String> {
        let config: Config = toml::from_str(text).map_err(|e| e.to_string())?;
        config.nonsense().map_or(Ok(config), Err)
    }

    #[test]
    fn an_empty_file_is_the_default() {
        let config = parse("").unwrap();
        assert_eq!(config.listen, ["[::]:9626".parse().unwrap()]);
        assert_eq!(config.limits.handshake, Duration::from_secs(10));
        assert_eq!(config.devices.disks, [Path::new("/var/lib/libvirt/images")]);
        assert!(config.devices.networks == ["default".parse().unwrap()]);
    }

    #[test]
    fn unknown_keys_and_senseless_values_are_refused() {
        for bad in [
            "listne = []",
            "listen = []",
            "hypervisors = []",
            "hypervisors = ['test:///default', 'test:///default']",
            "shutdown-grace = '0s'",
            "shutdown-grace = '-5s'",
            "audit = 'sometimes'",
            "[authorization]\nbackends = []",
            "[authorization]\nbackends = ['allow-all']",
            "[authorization]\nbackends = ['cedar', 'cedar']",
            "[authorization]\nact-for = ['portal']",
            "[authorization]\nexternal-timeout = '0s'",
            "[migration]\nuri = 'qemu+tls://host/system'",
            "[migration]\npeers = ['a/b']",
            "[devices]\ndisks = ['images']",
            "[devices]\ndisks = ['/']",
            "[devices]\nbridges = ['a/b']",
            "[devices]\ndisk = []",
            "[limits]\nmax-sessions = 0",
            "[limits]\nmax-session = 5",
            "[schedule]\nreserve-memory = '2 elephants'",
            "[schedule]\nreserve-memory = '99999999999TiB'",
            "[schedule]\nmin-run = '0s'",
            "[schedule.class.grid]\npreempt = 'sometimes'",
            "[schedule.class.grid]\ndomains = ['[']",
            "[schedule.class.Grid]\nrank = 1",
            "[schedule.system.slurm]\nprincipals = ['slurm@EX.ORG']\ndomains = ['*']",
            "[schedule.class.grid]\n[schedule.system.slurm]\ndomains = ['*']",
            "[schedule.class.grid]\n[schedule.system.slurm]\nnodes = ['host/*@EX.ORG']\ndomains = ['*']",
        ] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_domain_is_of_the_class_that_its_metadata_say_or_its_name() {
        let config = parse(
            "[schedule]\nreserve-memory = '512MiB'\n\
             [schedule.class.grid]\ndomains = ['grid-*']\nrank = 10\n\
             [schedule.class.vip]\ndomains = ['vip-*']\nrank = 20\npreempt = 'never'\n\
             [schedule.system.slurm]\nprincipals = ['slurm/*@EX.ORG']\nnodes = ['host/{domain}@EX.ORG']\ndomains = ['grid-*']",
        )
        .unwrap();
        let schedule = &config.schedule;
        assert!(schedule.is_on() && schedule.reserve_kib == 512 * 1024);
        let class = |own: Option<&str>, name: &str| {
            let own: Option<Tag> = own.map(|own| own.parse().unwrap());
            let found = schedule.class_of(own.as_ref(), &name.parse().unwrap());
            found.map(|(tag, class)| (tag.to_string(), class.preempt.depth()))
        };
        let starve = Some(Depth::Starve);
        assert_eq!(class(None, "grid-1"), Some(("grid".to_owned(), starve)));
        assert_eq!(class(Some("vip"), "grid-1"), Some(("vip".to_owned(), None)));
        assert_eq!(class(Some("web"), "grid-1"), None);
        assert_eq!(class(None, "web"), None);
    }

    #[test]
    fn only_peers_have_a_migration_uri() {
        let config =
            parse("[migration]\npeers = ['b', 'fd00::2']\nuri = 'qemu+tcp://{host}/system'")
                .unwrap();
        assert_eq!(
            config.migration_uri(&"b".parse().unwrap()).unwrap(),
            "qemu+tcp://b/system"
        );
        assert_eq!(
            config.migration_uri(&"fd00::2".parse().unwrap()).unwrap(),
            "qemu+tcp://[fd00::2]/system"
        );
        assert_eq!(config.migration_uri(&"c".parse().unwrap()), None);
    }
}
