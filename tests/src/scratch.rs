//! One folder per test binary, and who removes it.
//!
//! Statics are never dropped and a killed process drops nothing, so the folder is removed by a
//! janitor: a shell that sleeps on a pipe from us and wakes when we are gone, however we went.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::child::{program, spawn};

/// First it ends what still names the folder on its command line: guests of an embedded hypervisor outlive the
/// process that started them. Then the folder goes, and the cgroups named after it.
const JANITOR: &str = r#"
cat > /dev/null
for attempt in 1 2 3 4 5 6 7 8 9 10; do
    for line in $(grep -l -s -a -F "$1/" /proc/[0-9]*/cmdline); do
        pid=${line#/proc/}
        kill -9 "${pid%/cmdline}" 2> /dev/null
    done
    rm -rf "$1" && break
    sleep 0.2
done
# Who is frozen in his group dies only when it is thawed, and a group is free only when the kernel has closed what its processes had open.
for attempt in $(seq 100); do
    for state in $(find /sys/fs/cgroup -path "*/${1##*/}*" -name freezer.state 2> /dev/null); do
        echo THAWED > "$state"
    done 2> /dev/null
    find /sys/fs/cgroup -depth -type d -path "*/${1##*/}*" -exec rmdir {} + 2> /dev/null && break
    sleep 0.2
done
"#;

/// A folder of one part of the lab; removed when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// Makes a folder whose path is short enough for sockets in it.
    #[must_use]
    pub fn new(name: &str) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = lab_folder().join(format!("{name}{number}"));
        fs::create_dir(&path).expect("the lab's folder can be written");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our own folder");
        Self(path)
    }

    /// Returns the folder's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Writes a file in the folder, making folders on the way, and returns its path.
    #[track_caller]
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.0.join(name);
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder).expect("the lab's folder can be written");
        }
        fs::write(&path, content).expect("the lab's folder can be written");
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What cannot be removed now (a dying process still writes) the janitor removes.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// Returns the folder of this test binary, in which everything of the lab lies.
pub(crate) fn lab_folder() -> &'static Path {
    static LAB: OnceLock<(PathBuf, Child)> = OnceLock::new();
    let (path, _) = LAB.get_or_init(|| {
        let path = tempfile::Builder::new()
            .prefix("xl-")
            .rand_bytes(6)
            .tempdir()
            .expect("the folder for temporary files can be written")
            .keep();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).expect("our own folder");
        assert!(
            path.as_os_str().len() < 50,
            "TMPDIR is too long a path for sockets in it: {}",
            path.display()
        );
        // Not through setpriv: this child must outlive us by a moment.
        let mut janitor = Command::new(program("setsid"));
        janitor
            .arg(program("sh"))
            .args(["-c", JANITOR, "janitor"])
            .arg(&path);
        janitor
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        (path, spawn(janitor))
    });
    path
}
