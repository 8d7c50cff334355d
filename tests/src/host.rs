//! An xmand of its own: configuration, state, keytab, `.k5login`, syslog.

use std::fs;
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use rustix::process::Signal;
use toml::{Table, Value};

use crate::cell::Cell;
use crate::child::{Outcome, PATIENCE, Process, Transcript, bare_command, built, command, run};
use crate::libvirtd::Libvirtd;
use crate::realm::{Realm, free_port};
use crate::scratch::Scratch;
use crate::syslog::Syslog;

/// How many ports are tried for a host that has none of its own.
const PORTS: u32 = 5;

/// A host that runs xmand.
#[derive(Debug)]
pub struct Host {
    /// The name callers use, with a key in the keytab.
    name: String,
    scratch: Scratch,
    config: Table,
    env: Vec<(String, String)>,
    entrance: Vec<String>,
    callers_entrance: Vec<String>,
    audit: Option<Syslog>,
    process: Option<Process>,
    addresses: Vec<SocketAddr>,
}

/// A host that is being prepared.
#[derive(Debug)]
#[must_use]
pub struct HostBuilder {
    name: String,
    k5login: K5login,
    services: Vec<String>,
    config: Table,
    env: Vec<(String, String)>,
    entrance: Vec<String>,
    callers_entrance: Vec<String>,
    own_syslog: bool,
    policy: Vec<(String, String)>,
}

#[derive(Debug)]
enum K5login {
    Absent,
    Principals(Vec<String>),
    Text(String),
}

impl Host {
    /// Begins a host `localhost` on a free loopback port, with libvirt's `test:///default`, no administrators and
    /// an audit log that the test reads.
    pub fn builder() -> HostBuilder {
        let config = "listen = ['127.0.0.1:0']\nhypervisors = ['test:///default']\n\
                      [authorization]\nbackends = ['k5login']\n";
        HostBuilder {
            name: "localhost".into(),
            k5login: K5login::Principals(Vec::new()),
            services: vec!["xman/localhost".into()],
            config: config.parse().expect("our own TOML"),
            env: Vec::new(),
            entrance: Vec::new(),
            callers_entrance: Vec::new(),
            own_syslog: true,
            policy: Vec::new(),
        }
    }

    /// Starts xmand and waits until it listens; fails the test, showing its stderr, when it does not.
    #[track_caller]
    pub fn start(&mut self) {
        if let Err(outcome) = self.try_start() {
            panic!("xmand does not start: {outcome}");
        }
    }

    /// Starts xmand and waits until it listens or has ended.
    ///
    /// # Errors
    /// What xmand said when it ended instead.
    #[track_caller]
    pub fn try_start(&mut self) -> Result<(), Outcome> {
        let configured = self.config.clone();
        for _ in 1..PORTS {
            self.pin_ports();
            match self.try_start_once() {
                // Somebody else took a port in between.
                Err(outcome) if outcome.stderr().contains("in use") => {
                    self.config.clone_from(&configured);
                }
                done => return done,
            }
        }
        self.pin_ports();
        self.try_start_once()
    }

    #[track_caller]
    fn try_start_once(&mut self) -> Result<(), Outcome> {
        let config = self.write_config();
        let mut xmand = self.command();
        xmand.arg("--config").arg(config);
        let mut process = Process::start(xmand);
        let count = self.listeners();
        let heard = process.stderr().find(PATIENCE, |said| {
            let addresses = listening(said);
            (addresses.len() >= count).then_some(addresses)
        });
        match heard {
            Some(addresses) => self.addresses = addresses,
            None => return Err(process.wait(PATIENCE)),
        }
        self.process = Some(process);
        Ok(())
    }

    /// Runs `xmand --check` on the host's configuration.
    #[track_caller]
    pub fn check(&self) -> Outcome {
        let mut xmand = self.command();
        xmand
            .arg("--config")
            .arg(self.write_config())
            .arg("--check");
        run(xmand, b"", PATIENCE)
    }

    /// Runs `xmand policy test` with this table of expected decisions.
    #[track_caller]
    pub fn test_policy(&self, table: &str) -> Outcome {
        let mut xmand = self.command();
        xmand
            .arg("--config")
            .arg(self.write_config())
            .args(["policy", "test"])
            .arg(self.scratch.write("expected.toml", table));
        run(xmand, b"", PATIENCE)
    }

    /// Asks xmand to end (SIGTERM) and returns at once.
    #[track_caller]
    pub fn sigterm(&self) {
        self.process().signal(Signal::TERM);
    }

    /// Asks xmand to read its configuration again (SIGHUP).
    #[track_caller]
    pub fn sighup(&self) {
        self.process().signal(Signal::HUP);
    }

    /// Asks xmand to end, waits for it and requires that it ended cleanly.
    #[track_caller]
    pub fn stop(&mut self) {
        self.sigterm();
        self.wait(PATIENCE).success();
    }

    /// Waits until xmand has ended by itself or after [`Host::sigterm`].
    #[track_caller]
    pub fn wait(&mut self, limit: Duration) -> Outcome {
        self.process.take().expect("xmand was started").wait(limit)
    }

    /// Stops xmand cleanly and starts it again with the same state and port.
    #[track_caller]
    pub fn restart(&mut self) {
        self.stop();
        self.start();
    }

    /// Kills xmand without warning, as a crash does; [`Host::start`] brings it back with the same state and port.
    #[track_caller]
    pub fn kill9(&mut self) {
        self.process.take().expect("xmand was started").kill();
    }

    /// Merges TOML into the configuration; it counts from the next start or check on.
    #[track_caller]
    pub fn configure(&mut self, toml: &str) {
        merge(&mut self.config, parse(toml));
    }

    /// Returns the configuration file, written anew, for tests that spoil it by hand or send SIGHUP.
    #[track_caller]
    pub fn write_config(&self) -> PathBuf {
        let text = toml::to_string(&self.config).expect("a table is TOML");
        self.scratch.write("xmand.toml", text)
    }

    /// Returns the address of the first listener.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        *self.addresses.first().expect("xmand listens")
    }

    /// Returns all addresses that xmand listens on.
    #[must_use]
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Returns `NAME:PORT`, as one would give it to `rxm -H`.
    #[must_use]
    pub fn target(&self) -> String {
        format!("{}:{}", self.name, self.addr().port())
    }

    /// Returns the host's name, the one in its service principal.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Connects to the host as any stranger can, for tests that speak in bytes.
    #[track_caller]
    #[must_use]
    pub fn connect(&self) -> TcpStream {
        TcpStream::connect(self.addr()).expect("xmand listens")
    }

    /// Returns xmand's process id.
    #[track_caller]
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.process().pid()
    }

    /// Returns whether xmand runs.
    pub fn is_running(&mut self) -> bool {
        self.process.as_mut().is_some_and(Process::is_running)
    }

    /// Returns what xmand has said on stderr since its last start.
    #[track_caller]
    #[must_use]
    pub fn stderr(&self) -> &Transcript {
        self.process().stderr()
    }

    /// Returns the audit log.
    #[track_caller]
    #[must_use]
    pub fn audit(&self) -> &Syslog {
        self.audit
            .as_ref()
            .expect("the host was built with a syslog of its own")
    }

    /// Returns the host's folder.
    #[must_use]
    pub fn folder(&self) -> &Path {
        self.scratch.path()
    }

    /// Returns the path of the host's `.k5login`.
    #[must_use]
    pub fn k5login(&self) -> PathBuf {
        self.scratch.path().join("k5login")
    }

    /// Returns the folder of the site's policies.
    #[must_use]
    pub fn policy(&self) -> PathBuf {
        self.scratch.path().join("policy")
    }

    /// Writes a file of the site's policies, as an editor does: whole, and by renaming.
    #[track_caller]
    pub fn write_policy(&self, name: &str, text: &str) {
        write_policy(&self.policy(), name, text);
    }

    /// Returns the state directory.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.scratch.path().join("state")
    }

    pub(crate) fn callers_entrance(&self) -> &[String] {
        &self.callers_entrance
    }

    #[track_caller]
    fn process(&self) -> &Process {
        self.process.as_ref().expect("xmand was started")
    }

    #[track_caller]
    fn command(&self) -> Command {
        let mut words: Vec<PathBuf> = self.entrance.iter().map(PathBuf::from).collect();
        words.push(built("xmand"));
        let (first, rest) = words.split_first().expect("xmand at least");
        let mut command = bare_command(first);
        command
            .args(rest)
            .envs(self.env.iter().map(|(name, value)| (name, value)));
        command
    }

    fn listeners(&self) -> usize {
        self.config
            .get("listen")
            .and_then(Value::as_array)
            .map_or(1, Vec::len)
    }

    /// Replaces port 0 in the configuration by one that nobody gets while xmand is down, so that a restart keeps it.
    fn pin_ports(&mut self) {
        if let Some(Value::Array(listen)) = self.config.get_mut("listen") {
            for place in listen {
                if let Some(address) = place.as_str().and_then(|text| text.strip_suffix(":0")) {
                    *place = Value::String(format!("{address}:{}", free_port()));
                }
            }
        }
    }
}

impl HostBuilder {
    /// Makes these principals the host's administrators; a name without realm gets that of the host's realm.
    pub fn k5login<P: AsRef<str>>(mut self, principals: impl IntoIterator<Item = P>) -> Self {
        let principals = principals
            .into_iter()
            .map(|principal| principal.as_ref().to_owned());
        self.k5login = K5login::Principals(principals.collect());
        self
    }

    /// Makes the bytes of `.k5login` exactly these.
    pub fn k5login_text(mut self, text: &str) -> Self {
        self.k5login = K5login::Text(text.to_owned());
        self
    }

    /// Leaves the host without a `.k5login`.
    pub fn no_k5login(mut self) -> Self {
        self.k5login = K5login::Absent;
        self
    }

    /// Gives the site a policy file, and has it asked after `.k5login`.
    pub fn policy(mut self, name: &str, text: &str) -> Self {
        self.policy.push((name.to_owned(), text.to_owned()));
        self.config_extra("[authorization]\nbackends = ['k5login', 'cedar']")
    }

    /// Makes this libvirt URI the host's only hypervisor.
    pub fn uri(self, uri: &str) -> Self {
        self.uris(&[uri])
    }

    /// Makes these libvirt URIs the host's hypervisors.
    pub fn uris(mut self, uris: &[&str]) -> Self {
        let uris = uris
            .iter()
            .map(|uri| Value::String((*uri).to_owned()))
            .collect();
        self.config.insert("hypervisors".into(), Value::Array(uris));
        self
    }

    /// Merges TOML into the configuration: tables are united, everything else is replaced.
    #[track_caller]
    pub fn config_extra(mut self, toml: &str) -> Self {
        merge(&mut self.config, parse(toml));
        self
    }

    /// Gives the host's keytab the keys of these principals instead of `xman/NAME`.
    pub fn services(mut self, principals: &[&str]) -> Self {
        self.services = principals
            .iter()
            .map(|&principal| principal.to_owned())
            .collect();
        self
    }

    /// Gives the host another name for callers, with a key of its own; it still listens on loopback.
    pub fn name(mut self, name: &str) -> Self {
        name.clone_into(&mut self.name);
        self.services(&[&format!("xman/{name}")])
    }

    /// Sends audit records to a syslog socket of the test's choice.
    pub fn syslog(mut self, socket: &Path) -> Self {
        self.own_syslog = false;
        let socket = Value::String(socket.display().to_string());
        self.config.insert("syslog".into(), socket);
        self
    }

    /// Adds a variable to xmand's environment.
    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    /// Runs xmand beside this libvirtd, in its cell, with `qemu:///system` as its hypervisor. One of
    /// [`crate::Hosts`] is called from their desk under its name, port 9626; a single one on loopback as usual.
    pub fn beside(self, libvirtd: &Libvirtd) -> Self {
        let host = self.inside(libvirtd.cell()).uri("qemu:///system");
        match libvirtd.desk() {
            Some(desk) => host.called_from(desk),
            None => host,
        }
    }

    /// Runs xmand in a cell. With a network of its own, the host has the cell's name and port 9626.
    pub fn inside(mut self, cell: &Cell) -> Self {
        self.entrance = cell.entrance();
        if cell.has_network() {
            self = self
                .name(cell.name())
                .config_extra("listen = ['0.0.0.0:9626']");
        }
        self
    }

    /// Makes the host's callers sit in a cell, e.g. at the desk of [`crate::Hosts`].
    pub fn called_from(mut self, cell: &Cell) -> Self {
        self.callers_entrance = cell.entrance();
        self
    }

    /// Starts the host and waits until it listens.
    #[track_caller]
    #[must_use]
    pub fn start(self, realm: &Realm) -> Host {
        let mut host = self.prepare(realm);
        host.start();
        host
    }

    /// Writes all the host's files without starting xmand, for tests that change them first.
    #[track_caller]
    #[must_use]
    pub fn prepare(self, realm: &Realm) -> Host {
        let scratch = Scratch::new("host");
        let folder = scratch.path();
        let audit = self.own_syslog.then(Syslog::new);
        let services: Vec<_> = self.services.iter().map(String::as_str).collect();

        let mut config = Table::new();
        let mut put = |key: &str, path: PathBuf| {
            config.insert(key.into(), Value::String(path.display().to_string()));
        };
        put("keytab", realm.keytab(&services));
        put("state-dir", folder.join("state"));
        if let Some(audit) = &audit {
            put("syslog", audit.path());
        }
        let mut authorization = Table::new();
        let k5login = folder.join("k5login");
        authorization.insert(
            "k5login".into(),
            Value::String(k5login.display().to_string()),
        );
        let policy = folder.join("policy");
        authorization.insert("cedar".into(), Value::String(policy.display().to_string()));
        if !self.policy.is_empty() {
            fs::create_dir(&policy).expect("our own folder");
            fs::set_permissions(&policy, fs::Permissions::from_mode(0o755)).expect("our own");
        }
        for (name, text) in &self.policy {
            write_policy(&policy, name, text);
        }
        config.insert("authorization".into(), Value::Table(authorization));
        merge(&mut config, self.config);

        fs::create_dir(folder.join("state")).expect("our own folder");
        if let Some(text) = self.k5login.text(realm) {
            fs::write(&k5login, text).expect("our own folder");
            fs::set_permissions(&k5login, fs::Permissions::from_mode(0o600)).expect("our own file");
        }

        let folder = folder.display().to_string();
        let mut env = vec![
            ("PATH".into(), "/usr/sbin:/usr/bin:/sbin:/bin".into()),
            ("HOME".into(), folder.clone()),
            (
                "KRB5_CONFIG".into(),
                realm.krb5_conf().display().to_string(),
            ),
            ("KRB5RCACHEDIR".into(), folder.clone()),
            ("TMPDIR".into(), folder),
        ];
        env.extend(self.env);
        Host {
            name: self.name,
            scratch,
            config,
            env,
            entrance: self.entrance,
            callers_entrance: self.callers_entrance,
            audit,
            process: None,
            addresses: Vec::new(),
        }
    }
}

#[track_caller]
fn write_policy(folder: &Path, name: &str, text: &str) {
    let fresh = folder.join(format!(".{name}.new"));
    fs::write(&fresh, text).expect("our own folder");
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o644)).expect("our own file");
    fs::rename(&fresh, folder.join(name)).expect("our own folder");
}

impl K5login {
    fn text(self, realm: &Realm) -> Option<String> {
        match self {
            Self::Absent => None,
            Self::Text(text) => Some(text),
            Self::Principals(names) => Some(
                names
                    .iter()
                    .map(|name| {
                        if name.contains('@') {
                            name.clone()
                        } else {
                            realm.principal(name)
                        }
                    })
                    .map(|principal| principal + "\n")
                    .collect(),
            ),
        }
    }
}

/// Returns the addresses in all lines `... listening on ADDRESS[, ADDRESS]...`.
fn listening(said: &str) -> Vec<SocketAddr> {
    let Some(whole) = said.rfind('\n').map(|end| &said[..end]) else {
        return Vec::new();
    };
    whole
        .lines()
        .filter_map(|line| line.split_once("listening on "))
        .flat_map(|(_, rest)| rest.split([',', ' ']))
        .filter_map(|word| word.trim().parse().ok())
        .collect()
}

#[track_caller]
fn parse(toml: &str) -> Table {
    toml.parse()
        .unwrap_or_else(|e| panic!("the test's TOML is wrong: {e}"))
}

fn merge(into: &mut Table, from: Table) {
    for (key, value) in from {
        match (into.get_mut(&key), value) {
            (Some(Value::Table(old)), Value::Table(new)) => merge(old, new),
            (_, value) => {
                into.insert(key, value);
            }
        }
    }
}

/// Runs an installed program outside of every cell, as root of the machine would.
#[track_caller]
pub fn shell(name: &str, args: &[&str]) -> Outcome {
    let mut command = command(name);
    command.args(args);
    run(command, b"", PATIENCE)
}
