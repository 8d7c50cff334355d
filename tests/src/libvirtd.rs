//! A private libvirtd with its virtlogd, alone or two of them on one wire.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use crate::capabilities;
use crate::cell::Cell;
use crate::child::{Outcome, PATIENCE, Process, eventually, run, signal_pid};
use crate::container::Container;
use crate::guest::Guest;
use crate::realm::Realm;

/// A libvirtd in a cell of its own: it shares nothing with the machine's libvirt, and all its guests die with it.
#[derive(Debug)]
pub struct Libvirtd {
    daemon: Option<(Process, u32)>,
    _virtlogd: (Process, u32),
    desk: Option<Arc<Cell>>,
    cell: Cell,
    listens: bool,
}

/// The driver of guests.
pub const QEMU: &str = "qemu:///system";
/// The driver of containers.
pub const LXC: &str = "lxc:///system";

/// How often a container is started until libvirt knows its first process.
const STARTS: u32 = 5;
/// How long libvirt may take to hear of it.
const HEARS_WITHIN: Duration = Duration::from_secs(8);

impl Libvirtd {
    /// Starts one without network and waits until it answers.
    #[track_caller]
    #[must_use]
    pub fn new() -> Self {
        Self::inside(Cell::new("solo"), false, None)
    }

    /// Starts one whose guests have control groups for their CPU time, so that quotas and shares are the kernel's.
    ///
    /// The cell is one with groups of its own, as for containers; guests of all other libvirtds here have none.
    #[track_caller]
    #[must_use]
    pub fn with_cpu_groups() -> Self {
        let cell = Cell::with_containers("solo");
        Self::inside(cell, false, None)
    }

    /// Starts one that runs containers as well, on [`LXC`].
    #[track_caller]
    #[must_use]
    pub fn with_containers() -> Self {
        let libvirtd = Self::inside(Cell::with_containers("solo"), false, None);
        let asked = libvirtd.virsh_on(LXC, &["uri"]);
        assert!(
            asked.is_success(),
            "libvirtd has no driver for containers: install libvirt-daemon-driver-lxc ({asked})"
        );
        libvirtd
    }

    /// Starts one in a cell with a network, which people call from a desk, and which slows guests down by control groups where the
    /// cell has its own.
    #[track_caller]
    pub(crate) fn inside(cell: Cell, listens: bool, desk: Option<Arc<Cell>>) -> Self {
        write_config(&cell, listens);
        let cache = cell.outside("/var/cache/libvirt/qemu/capabilities");
        let known = capabilities::lend(&cache);
        let virtlogd = cell.start_within("virtlogd", &[]);
        let mut libvirtd = Self {
            daemon: None,
            _virtlogd: virtlogd,
            desk,
            cell,
            listens,
        };
        libvirtd.start();
        if !known {
            // libvirt probes when first asked, not when it starts.
            libvirtd.virsh(&["capabilities"]).success();
            capabilities::keep(&cache);
        }
        libvirtd
    }

    /// Runs virsh in the cell, on [`QEMU`].
    #[track_caller]
    pub fn virsh(&self, args: &[&str]) -> Outcome {
        self.virsh_on(QEMU, args)
    }

    /// Runs virsh in the cell, on one of libvirtd's drivers.
    #[track_caller]
    pub fn virsh_on(&self, uri: &str, args: &[&str]) -> Outcome {
        let mut virsh = self.cell.command("virsh");
        virsh
            .args(["-q", "-c", uri])
            .args(args)
            .env("HOME", self.cell.folder());
        run(virsh, b"", PATIENCE)
    }

    /// Defines a guest.
    #[track_caller]
    pub fn define(&self, guest: &Guest) {
        self.virsh(&["define", &guest.file()]).success();
    }

    /// Defines a guest, starts it, and waits until it counts if it is one that boots.
    #[track_caller]
    pub fn run(&self, guest: &Guest) {
        self.define(guest);
        self.virsh(&["start", guest.name()]).success();
        guest.wait_until_up();
    }

    /// Defines a container.
    #[track_caller]
    pub fn define_container(&self, container: &Container) {
        self.virsh_on(LXC, &["define", &container.file()]).success();
    }

    /// Defines a container, starts it, and waits until it counts and libvirt can send it signals.
    ///
    /// libvirt 9.0 asks a container for its first process before it is ready to hear the answer, misses it now and then on a busy
    /// machine, and knows it never afterwards. Such a container is started afresh.
    #[track_caller]
    pub fn run_container(&self, container: &Container) {
        self.define_container(container);
        let name = container.name();
        for _ in 0..STARTS {
            self.virsh_on(LXC, &["start", name]).success();
            container.wait_until_up();
            let heard = Instant::now() + HEARS_WITHIN;
            while Instant::now() < heard {
                let probe = ["send-process-signal", name, "1", "nop"];
                if self.virsh_on(LXC, &probe).is_success() {
                    return;
                }
                thread::sleep(Duration::from_millis(100));
            }
            self.virsh_on(LXC, &["destroy", name]).success();
            container.forget();
        }
        panic!("libvirt has not heard of the first process of {name} in {STARTS} starts");
    }

    /// Returns virsh's word for the state of a domain: `running`, `paused`, `shut off`; empty without the domain.
    #[track_caller]
    #[must_use]
    pub fn state(&self, name: &str) -> String {
        self.state_on(QEMU, name)
    }

    /// Returns virsh's word for the state of a domain of one of libvirtd's drivers.
    #[track_caller]
    #[must_use]
    pub fn state_on(&self, uri: &str, name: &str) -> String {
        let asked = self.virsh_on(uri, &["domstate", name]);
        asked.stdout().trim().to_owned()
    }

    /// Waits until a domain is in this state, in virsh's words.
    #[track_caller]
    pub fn wait_state(&self, name: &str, state: &str) {
        self.wait_state_on(QEMU, name, state);
    }

    /// Waits until a domain of one of libvirtd's drivers is in this state, in virsh's words.
    #[track_caller]
    pub fn wait_state_on(&self, uri: &str, name: &str, state: &str) {
        eventually(&format!("{name} is {state}"), PATIENCE, || {
            (self.state_on(uri, name) == state).then_some(())
        });
    }

    /// Returns one line of `virsh dominfo`, e.g. `Used memory` or `CPU(s)`.
    #[track_caller]
    #[must_use]
    pub fn dominfo(&self, name: &str, key: &str) -> String {
        let info = self.virsh(&["dominfo", name]).success().stdout();
        let line = info
            .lines()
            .find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("no {key:?} in:\n{info}"))
            .trim()
            .to_owned()
    }

    /// Returns the URI by which a process outside of the cell reaches this libvirtd.
    #[must_use]
    pub fn outside_uri(&self) -> String {
        self.outside_uri_of("qemu")
    }

    /// Returns the URI by which a process outside of the cell reaches one of this libvirtd's drivers, `qemu` or `lxc`.
    #[must_use]
    pub fn outside_uri_of(&self, driver: &str) -> String {
        let socket = self.cell.outside("/run/libvirt/libvirt-sock");
        format!("{driver}+unix:///system?socket={}", socket.display())
    }

    /// Returns the process ids, seen from outside, of the emulators that have a guest here, whatever libvirt says of it.
    #[must_use]
    pub fn emulators_of(&self, guest: &Guest) -> Vec<u32> {
        let uuid = guest.uuid().to_string();
        self.cell.processes_given(["-uuid", &uuid])
    }

    /// Returns what QEMU and libvirt have written to a guest's log.
    #[must_use]
    pub fn log_of(&self, name: &str) -> String {
        let log = format!("/var/log/libvirt/qemu/{name}.log");
        fs::read_to_string(self.cell.outside(&log)).unwrap_or_default()
    }

    /// Returns the cell.
    #[must_use]
    pub fn cell(&self) -> &Cell {
        &self.cell
    }

    /// Returns the cell in which callers of this host sit, if it has a network of its own.
    #[must_use]
    pub fn desk(&self) -> Option<&Cell> {
        self.desk.as_deref()
    }

    /// Returns the process id of libvirtd.
    #[track_caller]
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.daemon.as_ref().expect("libvirtd was started").1
    }

    /// Makes libvirtd hang (SIGSTOP): it accepts connections and never answers. Guests go on.
    pub fn freeze(&self) {
        signal_pid(self.pid(), Signal::STOP);
    }

    /// Lets libvirtd go on (SIGCONT).
    pub fn thaw(&self) {
        signal_pid(self.pid(), Signal::CONT);
        self.thaw_nsenter();
    }

    /// nsenter stops itself when its child is stopped, and would not notice the child's end.
    fn thaw_nsenter(&self) {
        if let Some((process, _)) = &self.daemon {
            process.signal(Signal::CONT);
        }
    }

    /// Kills libvirtd as a crash does; guests go on.
    #[track_caller]
    pub fn kill9(&mut self) {
        self.thaw_nsenter();
        let (mut process, pid) = self.daemon.take().expect("libvirtd was started");
        signal_pid(pid, Signal::KILL);
        let _ = process.wait(PATIENCE);
    }

    /// Stops libvirtd as an administrator does; guests go on.
    #[track_caller]
    pub fn stop(&mut self) {
        let (mut process, pid) = self.daemon.take().expect("libvirtd was started");
        signal_pid(pid, Signal::TERM);
        let _ = process.wait(PATIENCE);
    }

    /// Starts libvirtd again after [`Libvirtd::stop`] or [`Libvirtd::kill9`] and waits until it answers.
    #[track_caller]
    pub fn start(&mut self) {
        let args: &[&str] = if self.listens { &["--listen"] } else { &[] };
        assert!(self.daemon.is_none(), "libvirtd runs already");
        self.daemon = Some(self.cell.start_within("libvirtd", args));
        let socket = self.cell.outside("/run/libvirt/libvirt-sock");
        eventually("libvirtd answers", PATIENCE, || {
            let (process, _) = self.daemon.as_mut().expect("just started");
            if let Some(outcome) = process.outcome() {
                panic!("libvirtd gave up: {outcome}");
            }
            (socket.exists() && self.virsh(&["uri"]).is_success()).then_some(())
        });
    }
}

impl Default for Libvirtd {
    fn default() -> Self {
        Self::new()
    }
}

/// Two machines on one wire, each with its libvirtd, and a desk from which people call them.
#[derive(Debug)]
pub struct Hosts {
    /// 10.77.0.1
    pub alpha: Libvirtd,
    /// 10.77.0.2
    pub beta: Libvirtd,
    _kdcs: [Process; 3],
    desk: Arc<Cell>,
}

impl Hosts {
    /// Opens both machines, whose libvirtds reach each other over TCP without authentication, and lets them and the
    /// desk reach the realm's KDC.
    #[track_caller]
    #[must_use]
    pub fn pair(realm: &Realm) -> Self {
        Self::open(realm, true)
    }

    /// Opens both machines as [`Hosts::pair`] does, with libvirtds that listen on no network.
    #[track_caller]
    #[must_use]
    pub fn quiet_pair(realm: &Realm) -> Self {
        Self::open(realm, false)
    }

    #[track_caller]
    fn open(realm: &Realm, listen: bool) -> Self {
        let desk = Arc::new(Cell::with_network("desk"));
        desk.ip(&["link", "add", "labbr", "type", "bridge"]);
        desk.ip(&["address", "add", "10.77.0.254/24", "dev", "labbr"]);
        desk.ip(&["link", "set", "labbr", "up"]);
        let machine = |name: &str, number: u8| {
            let cell = Cell::with_network(name);
            cell.plug_into(&desk, number);
            Libvirtd::inside(cell, listen, Some(Arc::clone(&desk)))
        };
        let (alpha, beta) = (machine("alpha", 1), machine("beta", 2));
        let cells = [&*desk, alpha.cell(), beta.cell()];
        Self {
            _kdcs: cells.map(|cell| realm.serve_in(cell)),
            alpha,
            beta,
            desk: Arc::clone(&desk),
        }
    }

    /// Returns the cell at which people sit, with a network interface on the wire.
    #[must_use]
    pub fn desk(&self) -> &Cell {
        &self.desk
    }
}

fn write_config(cell: &Cell, listens: bool) {
    let write = |path: &str, text: &str| {
        let path = cell.outside(path);
        fs::create_dir_all(path.parent().unwrap_or(Path::new("/"))).expect("our own folder");
        fs::write(path, text).expect("our own folder");
    };
    let uuid = uuid::Uuid::new_v4();
    write(
        "/etc/libvirt/libvirtd.conf",
        &format!(
            "host_uuid = \"{uuid}\"
unix_sock_group = \"root\"
auth_unix_ro = \"none\"
auth_unix_rw = \"none\"
listen_tls = 0
listen_tcp = {}
auth_tcp = \"none\"
",
            u8::from(listens)
        ),
    );
    // Guests elsewhere have none: they would be the machine's, and stay behind.
    let controllers = if cell.has_groups() {
        "[\"cpu\", \"cpuacct\"]"
    } else {
        "[]"
    };
    let conf = QEMU_CONF.replace(
        "cgroup_controllers = []",
        &format!("cgroup_controllers = {controllers}"),
    );
    write("/etc/libvirt/qemu.conf", &conf);
}

/// Guests run as root and unconfined: their files lie in folders that only the lab knows.
pub(crate) const QEMU_CONF: &str = "user = \"root\"
group = \"root\"
dynamic_ownership = 0
remember_owner = 0
security_driver = \"none\"
namespaces = []
cgroup_controllers = []
";
