//! A folder for libvirt's embedded QEMU driver.

use std::fs;

use rustix::process::Signal;

use crate::capabilities;
use crate::child::signal_pid;
use crate::libvirtd::QEMU_CONF;
use crate::scratch::Scratch;

/// Where the embedded driver keeps what it found out about QEMU.
const CACHE: &str = "cache/qemu/capabilities";

/// A place for `qemu:///embed`: real guests, no libvirtd. Guests that outlive xmand are ended with it.
#[derive(Debug)]
pub struct Embed(Scratch);

impl Embed {
    /// Makes the folder, with a configuration that needs no virtlogd.
    #[must_use]
    pub fn new() -> Self {
        let scratch = Scratch::new("embed");
        scratch.write(
            "etc/qemu.conf",
            format!("{QEMU_CONF}stdio_handler = \"file\"\n"),
        );
        capabilities::lend(&scratch.path().join(CACHE));
        Self(scratch)
    }

    /// Returns the URI for one process at a time.
    #[must_use]
    pub fn uri(&self) -> String {
        format!("qemu:///embed?root={}", self.0.path().display())
    }

    /// Returns the process ids of the guests' QEMUs.
    #[must_use]
    pub fn guests(&self) -> Vec<u32> {
        let root = format!("{}/", self.0.path().display());
        let Ok(processes) = fs::read_dir("/proc") else {
            return Vec::new();
        };
        processes
            .flatten()
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .filter(|pid: &u32| {
                let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                let line = String::from_utf8_lossy(&line);
                line.contains("qemu-system") && line.contains(&root)
            })
            .collect()
    }
}

impl Default for Embed {
    fn default() -> Self {
        Self::new()
    }
}

impl Drop for Embed {
    fn drop(&mut self) {
        capabilities::keep(&self.0.path().join(CACHE));
        for guest in self.guests() {
            signal_pid(guest, Signal::KILL);
        }
    }
}
