//! Containers: a shell in a root of its own, which counts.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::child::{PATIENCE, eventually, program};
use crate::realm::read_or_empty;
use crate::scratch::Scratch;

/// The container's first process, whose signals are what libvirt knows of power: TERM shuts down, HUP reboots. It counts in
/// a file, from where it is again after each start, and writes each start down.
const INIT: &str = r#"
trap 'echo down >> /said; exit 0' TERM
trap 'echo again >> /said; reboot -f' HUP
echo up >> /said
number=0
while :; do
    number=$((number + 1))
    echo $number > /count.draft
    mv /count.draft /count
    usleep 100000
done
"#;

/// As [`INIT`], with a shell on the console instead of signals.
const INIT_WITH_SHELL: &str = r#"
/bin/busybox --install -s /bin
echo up >> /said
(number=0; while :; do
    number=$((number + 1))
    echo $number > /count.draft
    mv /count.draft /count
    usleep 100000
done) &
while :; do setsid cttyhack sh; done
"#;

/// Folders that the container's root must have.
const FOLDERS: [&str; 6] = ["bin", "dev", "proc", "sys", "run", "tmp"];

/// A container as XML for libvirt, and what it says in files of its own.
#[derive(Debug)]
pub struct Container {
    name: String,
    uuid: uuid::Uuid,
    memory_mib: u32,
    scratch: Scratch,
}

impl Container {
    /// Returns a container of 64 MiB that counts ten times a second, goes down when it is asked to, and reboots.
    #[track_caller]
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self::with_init(name, INIT)
    }

    /// Returns a container that counts, with a shell on its console.
    #[track_caller]
    #[must_use]
    pub fn with_shell(name: &str) -> Self {
        Self::with_init(name, INIT_WITH_SHELL)
    }

    #[track_caller]
    fn with_init(name: &str, init: &str) -> Self {
        let container = Self {
            name: name.to_owned(),
            uuid: uuid::Uuid::new_v4(),
            memory_mib: 64,
            scratch: Scratch::new("container"),
        };
        let root = container.root();
        for folder in FOLDERS {
            fs::create_dir_all(root.join(folder)).expect("our own folder");
        }
        let busybox = program("busybox");
        assert!(
            is_static(&busybox),
            "{} is not static: install busybox-static",
            busybox.display()
        );
        fs::copy(&busybox, root.join("bin/busybox")).expect("our own folder");
        for name in ["sh", "mv", "usleep", "reboot"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(name))
                .expect("our own folder");
        }
        let init = container
            .scratch
            .write("root/bin/init", format!("#!/bin/sh{init}"));
        fs::set_permissions(init, fs::Permissions::from_mode(0o755)).expect("our own file");
        container
    }

    /// Gives the container this identity, e.g. that of a guest.
    #[must_use]
    pub fn with_uuid(mut self, uuid: uuid::Uuid) -> Self {
        self.uuid = uuid;
        self
    }

    /// Returns the domain's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Returns the domain's UUID.
    #[must_use]
    pub fn uuid(&self) -> uuid::Uuid {
        self.uuid
    }

    /// Returns the domain's XML.
    #[must_use]
    pub fn xml(&self) -> String {
        let Self {
            name,
            uuid,
            memory_mib,
            ..
        } = self;
        let root = self.root().display().to_string();
        format!(
            "<domain type='lxc'>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  <memory unit='MiB'>{memory_mib}</memory>
  <vcpu>1</vcpu>
  <os><type>exe</type><init>/bin/init</init></os>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <filesystem type='mount'><source dir='{root}'/><target dir='/'/></filesystem>
    <console type='pty'/>
  </devices>
</domain>
"
        )
    }

    /// Writes the XML to a file and returns its path.
    #[track_caller]
    #[must_use]
    pub fn file(&self) -> String {
        let file = self.scratch.write("domain.xml", self.xml());
        file.display().to_string()
    }

    /// Returns what the container has written down of its life: `up`, `down`, `again`.
    #[must_use]
    pub fn said(&self) -> String {
        read_or_empty(&self.root().join("said"))
    }

    /// Returns the last number that the container has counted to since its last start, 0 before the first.
    #[must_use]
    pub fn count(&self) -> u64 {
        read_or_empty(&self.root().join("count"))
            .trim()
            .parse()
            .unwrap_or(0)
    }

    /// Waits until the container counts.
    #[track_caller]
    pub fn wait_until_up(&self) {
        eventually(&format!("{} counts", self.name), PATIENCE, || {
            (self.count() > 0).then_some(())
        });
    }

    /// Waits until the container has written down so many starts.
    #[track_caller]
    pub fn wait_until_up_again(&self, starts: usize) {
        eventually(
            &format!("{} has started {starts} times", self.name),
            PATIENCE,
            || (self.said().matches("up\n").count() >= starts).then_some(()),
        );
    }

    /// Requires that the container goes on counting from where it was: it runs, and it was not started afresh.
    #[track_caller]
    pub fn keeps_counting(&self) {
        let before = self.count();
        let after = eventually(&format!("{} counts on", self.name), PATIENCE, || {
            Some(self.count()).filter(|now| *now != before)
        });
        assert!(
            after > before,
            "{} counts from {after} again, after {before}",
            self.name
        );
    }

    /// Requires that the container does not count for a second: it is paused or gone.
    #[track_caller]
    pub fn stands_still(&self) {
        let before = self.count();
        std::thread::sleep(Duration::from_secs(1));
        assert!(
            self.count() == before,
            "{} counts on from {before}",
            self.name
        );
    }

    /// Makes the container's next start its first.
    pub(crate) fn forget(&self) {
        for file in ["said", "count"] {
            fs::remove_file(self.root().join(file)).expect("the container has begun to count");
        }
    }

    /// Returns the folder that the container has for its root, seen from outside.
    #[must_use]
    pub fn root(&self) -> PathBuf {
        self.scratch.path().join("root")
    }
}

/// Returns whether an executable needs no libraries, of which containers and small guests have none.
pub(crate) fn is_static(executable: &Path) -> bool {
    let code = fs::read(executable).expect("an installed program can be read");
    !code
        .windows(9)
        .take(4096)
        .any(|bytes| bytes == b"ld-linux-")
}
