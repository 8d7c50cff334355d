//! Compute nodes: guests on the machines' wire, in which a batch system's daemon waits for jobs.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use crate::child::{PATIENCE, command, eventually, run};
use crate::guest::Guest;
use crate::image::{Image, library_folders};
use crate::libvirtd::Libvirtd;

/// Where a node's wire is plugged in on its machine.
pub(crate) const BRIDGE: &str = "guests";

/// Where libraries are looked for besides the places of the processor's own kind.
const LIBRARIES: &str = "/usr/lib";

/// A compute node: a guest whose name is its hostname, and what lies in it.
///
/// It boots a small Debian in memory in some seconds. Its clock, its balloon and its guest agent are as elsewhere. A job that writes `count N` to
/// /dev/ttyS0 makes [`Guest::count`], [`Guest::keeps_counting`] and [`Guest::missed_no_number`] speak of the job.
#[derive(Debug)]
pub struct Node {
    guest: Guest,
    files: Vec<(String, u32, Vec<u8>)>,
    programs: Vec<(PathBuf, String)>,
    at_boot: String,
}

impl Node {
    /// Returns a node with 256 MiB, which has no memory to spare but can give away half of it.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            guest: Guest::tiny(name).memory(256, 256),
            files: Vec::new(),
            programs: Vec::new(),
            at_boot: String::new(),
        }
    }

    /// Gives the node's domain memory, in MiB.
    #[must_use]
    pub fn memory(mut self, mib: u32) -> Self {
        self.guest = self.guest.memory(mib, mib);
        self
    }

    /// Adds XML at the top level of the node's domain, e.g. `<metadata>`.
    #[must_use]
    pub fn xml_extra(mut self, xml: &str) -> Self {
        self.guest = self.guest.xml_extra(xml);
        self
    }

    /// Puts a file into the node. It belongs to root.
    #[must_use]
    pub fn file(mut self, path: &str, mode: u32, content: impl AsRef<[u8]>) -> Self {
        self.put(path, mode, content);
        self
    }

    /// Puts an executable of this machine into the node, without what is for debuggers, with the libraries that it needs and the node does
    /// not have.
    #[must_use]
    pub fn program(mut self, executable: &Path, path: &str) -> Self {
        self.programs.push((executable.to_owned(), path.to_owned()));
        self
    }

    /// Lets the node run this shell's command, as root, before it starts the batch system's daemon; what shall go on is sent to the background.
    #[must_use]
    pub fn at_boot(mut self, command: &str) -> Self {
        self.at_boot.push_str(command);
        self.at_boot.push('\n');
        self
    }

    /// Returns the node's guest.
    #[must_use]
    pub fn guest(&self) -> &Guest {
        &self.guest
    }

    /// Returns the name of the node, of its domain and of its host.
    #[must_use]
    pub fn name(&self) -> &str {
        self.guest.name()
    }

    /// Runs a shell's command in the node, as root, by its guest agent on this libvirt; returns what it wrote to standard output.
    #[track_caller]
    pub fn sh(&self, libvirtd: &Libvirtd, script: &str) -> String {
        let ask = |request: &serde_json::Value| {
            let request = request.to_string();
            let asked = libvirtd.virsh(&["qemu-agent-command", self.name(), &request]);
            asked.success().json()["return"].clone()
        };
        let arguments = serde_json::json!({
            "path": "/bin/sh", "arg": ["-c", script], "capture-output": true
        });
        let begun = ask(&serde_json::json!({ "execute": "guest-exec", "arguments": arguments }));
        let pid = serde_json::json!({ "pid": begun["pid"] });
        let what = format!("{script:?} ends in {}", self.name());
        let ended = eventually(&what, PATIENCE, || {
            let status =
                ask(&serde_json::json!({ "execute": "guest-exec-status", "arguments": pid }));
            (status["exited"] == true).then_some(status)
        });
        let text = |key: &str| {
            let coded = ended[key].as_str().unwrap_or_default();
            let mut base64 = command("base64");
            base64.arg("-d");
            run(base64, coded.as_bytes(), PATIENCE).success().stdout()
        };
        assert!(
            ended["exitcode"] == 0,
            "{script:?} in {}: {ended}\nstdout: {}\nstderr: {}",
            self.name(),
            text("out-data"),
            text("err-data")
        );
        text("out-data")
    }

    /// Waits until the node has booted so far that the batch system's daemon is started.
    #[track_caller]
    pub fn wait_until_up(&self) {
        self.guest
            .wait_until_said(&format!("node {} is up", self.name()));
    }

    pub(crate) fn put(&mut self, path: &str, mode: u32, content: impl AsRef<[u8]>) {
        self.files
            .push((path.to_owned(), mode, content.as_ref().to_owned()));
    }

    /// Makes the node one that can be defined: the `number`th on the wire, from this image.
    #[track_caller]
    pub(crate) fn complete(&mut self, image: &Image, number: u8) {
        let name = self.name().to_owned();
        self.put("/etc/hostname", 0o644, format!("{name}\n"));
        self.put("/etc/lab/address", 0o644, format!("10.77.0.{number}/24\n"));
        let at_boot = self.at_boot.clone();
        self.put("/etc/lab/at-boot", 0o644, at_boot);
        for (executable, path) in std::mem::take(&mut self.programs) {
            self.put_program(&executable, &path, &image.root());
        }
        let initrd = self.guest.scratch().path().join("initrd");
        image.write_initrd(&initrd, &self.files);
        let devices = format!(
            "<interface type='bridge'>
      <mac address='52:54:00:10:77:{number:02x}'/><source bridge='{BRIDGE}'/><model type='virtio'/><rom enabled='no'/>
    </interface>
    <controller type='virtio-serial' index='0'/>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>"
        );
        self.guest.boots_node(initrd, &devices);
    }

    #[track_caller]
    fn put_program(&mut self, executable: &Path, path: &str, root: &Path) {
        let stripped = self.guest.scratch().path().join("stripped");
        let mut strip = command("strip");
        strip.arg("-o").arg(&stripped).arg(executable);
        run(strip, b"", PATIENCE).success();
        self.put(path, 0o755, fs::read(&stripped).expect("our own file"));
        let mut ldd = command("ldd");
        ldd.arg(executable);
        let needs = run(ldd, b"", PATIENCE).success().stdout();
        for line in needs.lines() {
            // `NAME => PATH (ADDRESS)`
            let Some((name, found)) = line.trim().split_once(" => ") else {
                continue;
            };
            let found = Path::new(found.split(" (").next().unwrap_or_default());
            let name = name.trim();
            let there = library_folders(root)
                .iter()
                .any(|folder| folder.join(name).exists());
            if !there && !self.has(name) {
                let bytes = fs::read(found).unwrap_or_else(|e| panic!("{}: {e}", found.display()));
                self.put(&format!("{LIBRARIES}/{name}"), 0o755, bytes);
            }
        }
    }

    fn has(&self, library: &str) -> bool {
        let path = format!("{LIBRARIES}/{library}");
        self.files.iter().any(|(there, _, _)| *there == path)
    }
}

/// Returns a job that counts to `last`, ten times a second, on the serial line of its node.
pub(crate) fn counting(last: u32) -> String {
    format!(
        "#!/bin/sh
number=0
while [ $number -lt {last} ]; do
    number=$((number + 1))
    echo \"count $number\" > /dev/ttyS0
    usleep 100000
done
"
    )
}

/// Makes a file executable for everybody.
#[track_caller]
pub(crate) fn make_executable(path: &Path) {
    let executable = fs::Permissions::from_mode(0o755);
    fs::set_permissions(path, executable).expect("our own file");
}
