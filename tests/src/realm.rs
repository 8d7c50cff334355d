//! A throwaway MIT Kerberos realm.

use std::fs;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use std::time::Duration;

use crate::cell::Cell;
use crate::child::{
    Outcome, PATIENCE, Process, bare_command, command, eventually, lock, program, run,
};
use crate::scratch::Scratch;
use crate::user::User;

/// A realm with its own KDC on a loopback port; its KDC dies and its files vanish with it.
#[derive(Debug)]
pub struct Realm {
    name: String,
    scratch: Scratch,
    port: u16,
    /// Nothing while it is stopped.
    kdc: Mutex<Option<Process>>,
    /// kadmin.local is one at a time: two at once may find the database locked.
    admin: Mutex<()>,
}

impl Realm {
    /// Opens a realm `XMAN.TEST` of its own; takes less than a second.
    #[must_use]
    pub fn new() -> Self {
        Self::named("XMAN.TEST")
    }

    /// Opens a realm of another name, whose principals are strangers to everybody else's hosts.
    #[track_caller]
    #[must_use]
    pub fn named(name: &str) -> Self {
        let mut realm = Self {
            name: name.to_owned(),
            scratch: Scratch::new("realm"),
            port: 0,
            kdc: Mutex::new(None),
            admin: Mutex::new(()),
        };
        for attempt in 0.. {
            realm.port = free_port();
            realm.write_config();
            if attempt == 0 {
                let create = ["create", "-s", "-P", "throwaway", "-r", name];
                let mut kdb5_util = realm.server_command("kdb5_util");
                kdb5_util.args(create);
                run(kdb5_util, b"", PATIENCE).success();
            }
            let kdc = realm.start_kdc(realm.server_command("krb5kdc"));
            match kdc {
                Ok(process) => {
                    *lock(&realm.kdc) = Some(process);
                    break;
                }
                // Somebody else took the port in between.
                Err(outcome) => assert!(attempt < 5, "the KDC does not start: {outcome}"),
            }
        }
        realm
    }

    /// Returns the realm that the tests of one binary share. Principals of one name are one principal.
    #[must_use]
    pub fn shared() -> &'static Self {
        static SHARED: OnceLock<Realm> = OnceLock::new();
        SHARED.get_or_init(Self::new)
    }

    /// Returns the realm's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the path of the krb5.conf with which programs find this realm.
    #[must_use]
    pub fn krb5_conf(&self) -> PathBuf {
        self.scratch.path().join("krb5.conf")
    }

    /// Returns `name@REALM`.
    #[must_use]
    pub fn principal(&self, name: &str) -> String {
        format!("{name}@{}", self.name)
    }

    /// Returns a person with a fresh ticket for a day.
    #[track_caller]
    #[must_use]
    pub fn user(&self, name: &str) -> User {
        let user = self.user_without_ticket(name);
        user.kinit();
        user
    }

    /// Returns a person whose ticket ends soon. The KDC counts in whole seconds.
    #[track_caller]
    #[must_use]
    pub fn user_with_lifetime(&self, name: &str, lifetime: Duration) -> User {
        let user = self.user_without_ticket(name);
        user.kinit_for(lifetime);
        user
    }

    /// Returns a person whose ticket has just ended; takes two seconds.
    #[track_caller]
    #[must_use]
    pub fn user_with_expired_ticket(&self, name: &str) -> User {
        let user = self.user_with_lifetime(name, Duration::from_secs(1));
        user.wait_until_expired();
        user
    }

    /// Returns a person with a principal who has not asked for a ticket yet.
    #[track_caller]
    #[must_use]
    pub fn user_without_ticket(&self, name: &str) -> User {
        let password = format!("secret of {name}");
        let add = format!("addprinc -pw \"{password}\" {name}");
        self.add_principal(&add);
        User::new(&self.principal(name), &password, &self.krb5_conf())
    }

    /// Returns the path of a new keytab with the keys of these principals, e.g. `xman/localhost`.
    /// Keytabs of one principal have the same key.
    #[track_caller]
    #[must_use]
    pub fn keytab(&self, principals: &[&str]) -> PathBuf {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let file = format!("keytab{}", COUNT.fetch_add(1, Ordering::Relaxed));
        let path = self.scratch.path().join(file);
        for principal in principals {
            self.add_principal(&format!("addprinc -randkey {principal}"));
            let add = format!("ktadd -q -norandkey -k {} {principal}", path.display());
            let done = self.admin(&add);
            assert!(
                path.is_file(),
                "no keytab was written for {principal}: {done}"
            );
        }
        path
    }

    /// Gives a principal a new key, so that keytabs written before are outdated.
    #[track_caller]
    pub fn change_key(&self, principal: &str) {
        self.admin(&format!("cpw -randkey {principal}")).success();
    }

    /// Runs one command of kadmin.local.
    #[track_caller]
    pub fn admin(&self, query: &str) -> Outcome {
        let _turn = lock(&self.admin);
        let mut kadmin = self.server_command("kadmin.local");
        kadmin.args(["-r", &self.name, "-q", query]);
        run(kadmin, b"", PATIENCE).success()
    }

    /// Stops the KDC: from now on nobody gets a new ticket.
    pub fn stop_kdc(&self) {
        *lock(&self.kdc) = None;
    }

    /// Starts the KDC again, on the same port.
    #[track_caller]
    pub fn restart_kdc(&self) {
        self.stop_kdc();
        let kdc = eventually("the KDC starts again", PATIENCE, || {
            self.start_kdc(self.server_command("krb5kdc")).ok()
        });
        *lock(&self.kdc) = Some(kdc);
    }

    /// Lets programs inside a cell with its own network reach a KDC of this realm, at the same address as outside,
    /// for as long as the returned process is kept.
    #[track_caller]
    #[must_use]
    pub fn serve_in(&self, cell: &Cell) -> Process {
        self.serve(cell, "kdc.conf")
    }

    /// Does what [`Realm::serve_in`] does, on all addresses of the cell, so that guests on its network reach the KDC as well: by the
    /// krb5.conf of [`Realm::krb5_conf_by`].
    #[track_caller]
    #[must_use]
    pub fn serve_around(&self, cell: &Cell) -> Process {
        let conf = read_or_empty(&self.scratch.path().join("kdc.conf"));
        let wide = conf.replace("kdc_tcp_listen = 127.0.0.1:", "kdc_tcp_listen = 0.0.0.0:");
        self.scratch.write("kdc-wide.conf", wide);
        self.serve(cell, "kdc-wide.conf")
    }

    /// Returns the text of a krb5.conf with which programs find this realm's KDC at this address.
    #[must_use]
    pub fn krb5_conf_by(&self, address: &str) -> String {
        let conf = read_or_empty(&self.krb5_conf());
        conf.replace("kdc = 127.0.0.1:", &format!("kdc = {address}:"))
    }

    #[track_caller]
    fn serve(&self, cell: &Cell, conf: &str) -> Process {
        let mut kdc = cell.command_bare(&program("krb5kdc"));
        self.serve_env(&mut kdc);
        kdc.env("KRB5_KDC_PROFILE", self.scratch.path().join(conf));
        kdc.arg("-n");
        let process = Process::start(kdc);
        process.stderr().wait_for(PATIENCE, "commencing operation");
        process
    }

    fn add_principal(&self, add: &str) {
        let done = self.admin(add);
        let said = format!("{}{}", done.stdout(), done.stderr());
        let there = said.contains("created") || said.contains("already exists");
        assert!(there, "the KDC's database refused `{add}`: {done}");
    }

    fn start_kdc(&self, mut kdc: Command) -> Result<Process, Outcome> {
        kdc.arg("-n");
        let mut process = Process::start(kdc);
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        eventually("the KDC accepts connections or gives up", PATIENCE, || {
            if let Some(outcome) = process.outcome() {
                return Some(Err(outcome));
            }
            let ready = process.stderr().text().contains("commencing operation");
            (ready && TcpStream::connect(address).is_ok()).then_some(Ok(()))
        })
        .map(|()| process)
    }

    fn server_command(&self, program: &str) -> Command {
        let mut command = command(program);
        self.serve_env(&mut command);
        command
    }

    fn serve_env(&self, command: &mut Command) {
        let folder = self.scratch.path();
        command.env("KRB5_CONFIG", self.krb5_conf());
        command.env("KRB5_KDC_PROFILE", folder.join("kdc.conf"));
        command.env("KRB5RCACHEDIR", folder).env("TMPDIR", folder);
    }

    fn write_config(&self) {
        let Self { name, port, .. } = self;
        let folder = self.scratch.path().display();
        self.scratch.write(
            "krb5.conf",
            format!(
                "[libdefaults]
    default_realm = {name}
    dns_lookup_kdc = false
    dns_lookup_realm = false
    dns_canonicalize_hostname = false
    rdns = false
    udp_preference_limit = 1
[realms]
    {name} = {{
        kdc = 127.0.0.1:{port}
    }}
[domain_realm]
    localhost = {name}
    alpha = {name}
    beta = {name}
    gamma = {name}
    .xman.test = {name}
"
            ),
        );
        self.scratch.write(
            "kdc.conf",
            format!(
                "[kdcdefaults]
    kdc_listen = \"\"
    kdc_tcp_listen = 127.0.0.1:{port}
[realms]
    {name} = {{
        database_name = {folder}/principal
        key_stash_file = {folder}/stash
        acl_file = {folder}/kadm5.acl
        max_life = 24h
    }}
[dbmodules]
    {name} = {{
        db_library = db2
        disable_last_success = true
        disable_lockout = true
    }}
[logging]
    kdc = STDERR
    admin_server = STDERR
    default = STDERR
"
            ),
        );
    }
}

impl Default for Realm {
    fn default() -> Self {
        Self::new()
    }
}

/// Returns a port below the range from which the kernel serves outgoing connections, so that it stays free
/// while its daemon is stopped.
pub(crate) fn free_port() -> u16 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    loop {
        let step = NEXT.fetch_add(1, Ordering::Relaxed).wrapping_mul(97);
        let spread = std::process::id().wrapping_mul(7).wrapping_add(step) % 12_000;
        let port = 20_000 + u16::try_from(spread).unwrap_or_default();
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// Returns a command of the Kerberos tools as seen by somebody with this krb5.conf and credential cache.
pub(crate) fn client_command(tool: &Path, krb5_conf: &Path, ccache: &str) -> Command {
    let mut command = bare_command(tool);
    command
        .env("KRB5_CONFIG", krb5_conf)
        .env("KRB5CCNAME", ccache);
    command.env("LC_ALL", "C");
    command
}

/// Reads a file, or returns nothing while it is not there.
pub(crate) fn read_or_empty(path: &Path) -> String {
    String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned()
}
