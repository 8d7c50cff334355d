//! A cell: namespaces of mounts, hostname, processes and (if wanted) network that live as long as one child
//! process does. When the cell goes, so do all processes in it, also those that daemonized themselves, and
//! all interfaces.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::Duration;

use crate::child::{PATIENCE, Process, bare_command, command, eventually, program, run};
use crate::scratch::Scratch;

/// The first process of a cell. It inherits every orphan there and must reap them: libvirt waits until
/// a guest that it ended is really gone.
const INIT: &str = r#"
set -e
name=$1 folder=$2
hostname "$name"
for path in /etc/libvirt /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /run; do
    if [ -d "$path" ]; then
        mkdir -p "$folder$path"
        mount --bind "$folder$path" "$path"
    fi
done
# There libvirt locks the terminal of a console.
mkdir -p /run/lock
mount --bind "$folder/etc/hosts" /etc/hosts
if [ "$3" = network ]; then ip link set lo up; fi
if [ -n "$4" ]; then
    # libvirt looks at what is mounted: the cell's own groups, and nothing besides. Nothing is removed here but mounts:
    # the folders under them are the machine's.
    mkdir "$folder/cgroup"
    mount -t tmpfs -o mode=755 none "$folder/cgroup"
    for hierarchy in /sys/fs/cgroup/*/; do
        if [ -e "${hierarchy}tasks" ] && [ ! -L "${hierarchy%/}" ]; then
            place=$folder/cgroup/$(basename "$hierarchy")
            mkdir "$place"
            mount --bind "$hierarchy$4" "$place"
        fi
    done
    umount -R /sys/fs/cgroup
    mount --move "$folder/cgroup" /sys/fs/cgroup
fi
echo ready
set +e
trap : CHLD
while :; do
    sleep 100000 &
    wait $!
    kill $! 2> /dev/null
done
"#;

/// What comes before [`INIT`] in a cell for containers: a group of its own in each of the machine's hierarchies, which
/// is the root of what the cell sees.
const GROUPS: &str = r#"
set -e
group=$1
shift
for hierarchy in /sys/fs/cgroup/*/; do
    if [ -e "${hierarchy}tasks" ] && [ ! -L "${hierarchy%/}" ]; then
        mkdir "$hierarchy$group"
        if [ -e "$hierarchy$group/cpuset.cpus" ]; then
            cat "${hierarchy}cpuset.cpus" > "$hierarchy$group/cpuset.cpus"
            cat "${hierarchy}cpuset.mems" > "$hierarchy$group/cpuset.mems"
        fi
        echo 0 > "$hierarchy$group/cgroup.procs"
    fi
done
exec unshare --cgroup -- "$@"
"#;

/// Makes a process one of the cell's groups: who enters namespaces stays in the groups that he was in.
const JOIN: &str = r#"
for hierarchy in /sys/fs/cgroup/*/; do echo 0 > "${hierarchy}cgroup.procs"; done
exec "$@"
"#;

/// Where the kernel's control groups are mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// How long the groups of a cell may still be busy after its last process is gone.
const GROUPS_LINGER: Duration = Duration::from_secs(60);

/// The names that cells on one wire have; number 254 is the desk, from which people call them.
const HOSTS: &str = "127.0.0.1 localhost
10.77.0.1 alpha alpha.xman.test
10.77.0.2 beta beta.xman.test
10.77.0.3 gamma gamma.xman.test
10.77.0.254 desk desk.xman.test
";

/// A machine inside the machine: own hostname, own process ids, and private folders for libvirt.
#[derive(Debug)]
pub struct Cell {
    name: String,
    init: u32,
    network: bool,
    /// Whether libvirt is to use control groups in it.
    groups: bool,
    /// The name of the cell's control groups, where it has some.
    group: Option<String>,
    unshare: Process,
    folder: PathBuf,
    /// There until the cell is dropped.
    scratch: Option<Scratch>,
}

impl Cell {
    /// Opens a cell that shares the machine's network.
    #[track_caller]
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self::open(name, false, false)
    }

    /// Opens a cell that shares the machine's network, and in which libvirt can run containers: with control groups of
    /// its own.
    ///
    /// libvirt's LXC driver wants the memory, cpuacct and devices controllers. Where the machine has hierarchies of version 1
    /// for them, alone or beside the unified one (which disturbs libvirt, and which the cell does not see), the cell gets a part of
    /// each. Where all is version 2, libvirt takes that, and the cell sees it as the machine does.
    #[track_caller]
    #[must_use]
    pub fn with_containers(name: &str) -> Self {
        Self::open(name, false, true)
    }

    /// Opens a cell with a network of its own, of which so far only loopback is up.
    #[track_caller]
    #[must_use]
    pub fn with_network(name: &str) -> Self {
        Self::open(name, true, false)
    }

    /// Opens a cell with a network and control groups of its own: in it libvirt can slow a guest down.
    #[track_caller]
    #[must_use]
    pub fn with_network_and_groups(name: &str) -> Self {
        Self::open(name, true, true)
    }

    #[track_caller]
    fn open(name: &str, network: bool, containers: bool) -> Self {
        assert!(
            rustix::process::geteuid().is_root(),
            "cells need root: run the tests as root"
        );
        let scratch = Scratch::new("cell");
        scratch.write("etc/hosts", HOSTS);
        let group = (containers && has_hierarchies()).then(|| group_name(scratch.path()));
        let mut unshare = command("unshare");
        unshare.args([
            "--mount",
            "--uts",
            "--pid",
            "--mount-proc",
            "--fork",
            "--kill-child=KILL",
        ]);
        if network {
            unshare.arg("--net");
        }
        if let Some(group) = &group {
            unshare
                .arg(program("bash"))
                .args(["-c", GROUPS, "groups", group]);
        }
        unshare
            .arg(program("bash"))
            .args(["-c", INIT, "init", name])
            .arg(scratch.path());
        unshare.arg(if network { "network" } else { "" });
        unshare.arg(group.as_deref().unwrap_or_default());
        let mut unshare = Process::start(unshare);
        let ready = unshare
            .stdout()
            .find(PATIENCE, |said| said.contains("ready").then_some(()));
        if ready.is_none() {
            panic!(
                "the cell {name} does not open: {:?} {}",
                unshare.outcome(),
                unshare.stderr().text()
            );
        }
        let init = only_child(unshare.pid()).expect("unshare has forked the cell's first process");
        let folder = scratch.path().to_owned();
        Self {
            name: name.to_owned(),
            init,
            network,
            groups: containers,
            group,
            unshare,
            folder,
            scratch: Some(scratch),
        }
    }

    /// Returns the cell's hostname.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns whether the cell has a network of its own.
    #[must_use]
    pub fn has_network(&self) -> bool {
        self.network
    }

    /// Returns whether libvirt can use control groups in the cell.
    #[must_use]
    pub fn has_groups(&self) -> bool {
        self.groups
    }

    /// Returns the folder, seen from outside, under which the cell's private folders lie.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Returns where a path like `/run/...` or `/etc/libvirt/...` of the cell lies, seen from outside.
    #[must_use]
    pub fn outside(&self, path: &str) -> PathBuf {
        self.folder.join(path.trim_start_matches('/'))
    }

    /// Returns the words that, before a command, make it run in the cell: its files, hostname and network. The
    /// command keeps the process id it has outside, and dies with the test binary.
    #[must_use]
    pub fn entrance(&self) -> Vec<String> {
        let mut words = vec![program("nsenter").display().to_string()];
        words.extend([
            format!("--target={}", self.init),
            "--mount".into(),
            "--uts".into(),
        ]);
        if self.network {
            words.push("--net".into());
        }
        words.push("--".into());
        words
    }

    /// Returns a command that runs an installed program in the cell.
    #[track_caller]
    #[must_use]
    pub fn command(&self, name: &str) -> Command {
        let mut command = self.command_bare(&program(name));
        command
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C");
        command
    }

    /// Returns a command that runs an executable in the cell with an empty environment.
    #[track_caller]
    #[must_use]
    pub fn command_bare(&self, executable: &Path) -> Command {
        let mut words = self.entrance().into_iter();
        let mut command = bare_command(Path::new(&words.next().unwrap_or_default()));
        command.args(words).arg(executable);
        command
    }

    /// Starts an installed program as a process of the cell, so that all it ever forks dies with the cell.
    /// Returns the handle on its output and the process id outside.
    #[track_caller]
    #[must_use]
    pub fn start_within(&self, name: &str, args: &[&str]) -> (Process, u32) {
        let mut nsenter = command("nsenter");
        nsenter
            .arg(format!("--target={}", self.init))
            .args(["--mount", "--uts", "--pid"]);
        if self.network {
            nsenter.arg("--net");
        }
        if self.group.is_some() {
            nsenter.arg("--cgroup");
        }
        nsenter.arg("--");
        if self.group.is_some() {
            nsenter.arg(program("sh")).args(["-c", JOIN, "join"]);
        }
        nsenter.arg(program(name)).args(args);
        nsenter.env("HOME", &self.folder);
        let mut process = Process::start(nsenter);
        let pid = eventually("nsenter forks into the cell", PATIENCE, || {
            if let Some(outcome) = process.outcome() {
                panic!("{name} gave up: {outcome}");
            }
            only_child(process.pid())
        });
        (process, pid)
    }

    /// Returns the process ids, seen from outside, of those in the cell who were given these words one after the other.
    #[must_use]
    pub fn processes_given(&self, words: [&str; 2]) -> Vec<u32> {
        let home = |pid: &str| std::fs::read_link(format!("/proc/{pid}/ns/pid")).ok();
        let own = home(&self.init.to_string());
        let all = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        all.filter_map(|entry| {
            let pid = entry.file_name().into_string().ok()?;
            let number = pid.parse().ok()?;
            // Nobody has to be there any more; who is a zombie has no words.
            let line = std::fs::read(entry.path().join("cmdline")).ok()?;
            let line = String::from_utf8_lossy(&line);
            let given: Vec<_> = line.split('\0').collect();
            let is_it = given.windows(2).any(|pair| pair == words) && home(&pid) == own;
            is_it.then_some(number)
        })
        .collect()
    }

    /// Plugs the cell into a wire with the address 10.77.0.`number`.
    #[track_caller]
    pub(crate) fn plug_into(&self, wire: &Self, number: u8) {
        let link = format!("port{number}");
        let host = self.init.to_string();
        wire.ip(&[
            "link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &host,
        ]);
        wire.ip(&["link", "set", &link, "master", "labbr"]);
        wire.ip(&["link", "set", &link, "up"]);
        self.ip(&[
            "address",
            "add",
            &format!("10.77.0.{number}/24"),
            "dev",
            "eth0",
        ]);
        self.ip(&["link", "set", "eth0", "up"]);
    }

    /// Runs iproute2's `ip` on the cell's network.
    #[track_caller]
    pub fn ip(&self, args: &[&str]) {
        // Not in the cell's files: its /proc does not know the process ids by which cells are plugged together.
        let mut nsenter = command("nsenter");
        nsenter
            .arg(format!("--target={}", self.init))
            .args(["--net", "--"]);
        nsenter.arg(program("ip")).args(args);
        run(nsenter, b"", PATIENCE).success();
    }
}

impl Drop for Cell {
    fn drop(&mut self) {
        self.unshare.kill();
        let Some(scratch) = self.scratch.take() else {
            return;
        };
        let init = PathBuf::from(format!("/proc/{}", self.init));
        let group = self.group.take();
        // A container that is paused dies only when its group is thawed.
        if let Some(group) = &group {
            thaw(&Path::new(CGROUPS).join("freezer").join(group));
        }
        // Everything in the cell is killed by now, but the kernel takes a second or two over libvirtd's sockets.
        // Nobody has to wait for that: the folder goes when the processes are gone.
        thread::spawn(move || {
            let gone = || {
                let state = std::fs::read_to_string(init.join("stat")).unwrap_or_default();
                state.is_empty() || state.contains(") Z ")
            };
            while !gone() {
                thread::sleep(Duration::from_millis(50));
            }
            if let Some(group) = group {
                remove_groups(&group);
            }
            drop(scratch);
        });
    }
}

/// Returns whether the machine has version 1 of the control groups that containers need.
#[track_caller]
fn has_hierarchies() -> bool {
    let missing: Vec<_> = ["memory", "cpuacct", "devices"]
        .into_iter()
        .filter(|controller| {
            let mounted = Path::new(CGROUPS).join(controller).join("tasks");
            !mounted.exists()
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    let unified = std::fs::read_to_string(Path::new(CGROUPS).join("cgroup.controllers"));
    assert!(
        unified.is_ok_and(|has| has.split_whitespace().any(|one| one == "memory")),
        "containers need control groups: mount those of {missing:?} under {CGROUPS} (mount -t cgroup -o NAME none {CGROUPS}/NAME), \
         or the unified hierarchy with its memory controller at {CGROUPS}"
    );
    false
}

/// Returns the name of a cell's groups: the janitor knows the folder's name in it.
fn group_name(folder: &Path) -> String {
    let parts: Vec<_> = folder.iter().rev().take(2).collect();
    let words: Vec<_> = parts
        .iter()
        .rev()
        .map(|part| part.to_string_lossy())
        .collect();
    words.join("-")
}

/// Removes a cell's groups; what is still busy after a while is left to the janitor.
fn remove_groups(group: &str) {
    let deadline = std::time::Instant::now() + GROUPS_LINGER;
    let hierarchies = || std::fs::read_dir(CGROUPS).into_iter().flatten().flatten();
    for hierarchy in hierarchies() {
        let folder = hierarchy.path().join(group);
        while !remove_tree(&folder) && std::time::Instant::now() < deadline {
            thread::sleep(Duration::from_millis(50));
        }
    }
}

/// Lets go on what is frozen in a group and those in it.
fn thaw(folder: &Path) {
    let inside = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in inside.filter(|entry| entry.path().is_dir()) {
        thaw(&entry.path());
    }
    // The group of a container that has just ended is gone.
    let _ = std::fs::write(folder.join("freezer.state"), "THAWED");
}

/// Removes a folder of groups, whose files cannot be; returns whether it is gone.
fn remove_tree(folder: &Path) -> bool {
    let inside = std::fs::read_dir(folder).into_iter().flatten().flatten();
    for entry in inside.filter(|entry| entry.path().is_dir()) {
        remove_tree(&entry.path());
    }
    let _ = std::fs::remove_dir(folder);
    !folder.exists()
}

/// Returns the only child of a process.
fn only_child(pid: u32) -> Option<u32> {
    let children = std::fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).ok()?;
    children.split_whitespace().next()?.parse().ok()
}
