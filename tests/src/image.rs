//! What compute nodes boot: a small Debian in the guest's memory, put together from the distribution's packages.
//!
//! ```text
//! apt-get --simulate, as if nothing were installed    which packages there must be
//!   minus what only maintainer scripts need           perl, debconf, dpkg ...
//! apt-get download, dpkg-deb                          one tree; nothing is installed here
//!   plus busybox, the kernel's modules, INIT          and accounts
//! cpio                                                the initial RAM disk, kept in the lab's cache
//! ```
//! What belongs to one node alone (its name, its configuration, files that a test gives it) is a second archive, appended to the
//! first: the kernel unpacks both, the later over the earlier.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::child::{Outcome, PATIENCE, command, program, run};
use crate::container::is_static;
use crate::guest::{
    Kernel, MODULES, add_module, apt_get_in, lab_cache, pack, update_package_lists,
};

/// An image's name and the packages it is made for; what they need comes along.
#[derive(Debug, Hash)]
pub(crate) struct Recipe {
    pub(crate) name: &'static str,
    pub(crate) packages: &'static [&'static str],
    /// What no node needs of them: the beginnings of paths.
    pub(crate) unneeded: &'static [&'static str],
}

/// What a node of any batch system has besides. Its shell is dash, as everywhere in Debian: Grid Engine calls /bin/sh by the name of what
/// it is to run, which busybox takes for the name of an applet.
const COMMON: [&str; 3] = ["bash", "dash", "qemu-guest-agent"];

/// Packages, by the beginning of their names, that dependencies bring and no node needs: for installing, for mail, for compiling.
const UNNEEDED: [&str; 38] = [
    "adduser",
    "bsd-mailx",
    "cpp",
    "cron",
    "debconf",
    "dpkg",
    "exim4",
    "gcc-",
    "init-system-helpers",
    "libdebconf",
    "libevent",
    "libfile-find-rule-perl",
    "libgdbm",
    "libgmp",
    "libgnutls",
    "libhogweed",
    "libidn",
    "libisl",
    "liblockfile",
    "libmpc",
    "libmpfr",
    "libnettle",
    "libnumber-compare-perl",
    "libpam-modules",
    "libpam-runtime",
    "libperl",
    "libsemanage",
    "libsepol",
    "libtext-glob-perl",
    "libunbound",
    "libunistring",
    "lsb-base",
    "openssl",
    "passwd",
    "perl",
    "sensible-utils",
    "sysvinit-utils",
    "usrmerge",
];

/// Folders that are for people to read.
const UNREAD: [&str; 8] = [
    "usr/share/bug",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/lintian",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/mime",
    "usr/share/perl5",
];

/// Further modules of the kernel: the guest agent's line.
const MORE_MODULES: [&str; 1] = ["virtio_console"];

/// The folder of a node's own files in it.
const LAB: &str = "etc/lab";

/// The node's first process. What the batch system wants is started by /etc/lab/start. The serial line is everybody's: there jobs count.
const INIT: &str = r#"#!/bin/busybox sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2> /dev/null
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
mount -t tmpfs -o mode=1777 tmpfs /dev/shm
chmod 666 /dev/ttyS0
exec < /dev/null > /dev/ttyS0 2>&1
for module in $(cat /modules/order); do insmod /modules/$module; done
hostname "$(cat /etc/hostname)"
ip link set lo up
ip address add "$(cat /etc/lab/address)" dev eth0
ip link set eth0 up
for event in /sys/class/input/event*; do
    if [ "$(cat $event/device/name)" = "Power Button" ]; then
        exec 5< /dev/input/${event##*/}
        (head -c 1 <&5 > /dev/null && echo "power button" && poweroff -f) &
    fi
done
for port in /sys/class/virtio-ports/*; do
    if [ "$(cat $port/name)" = org.qemu.guest_agent.0 ]; then
        qemu-ga --method=virtio-serial --path=/dev/${port##*/} --statedir=/run --daemonize --pidfile=/run/qemu-ga.pid
    fi
done
echo "node $(hostname) is up"
. /etc/lab/at-boot
. /etc/lab/start
while :; do sleep 100000 & wait; done
"#;

/// Accounts of every node and of the cells: jobs are those of alice and bob.
pub(crate) const PEOPLE: &str = "alice:x:1001:1001::/tmp:/bin/sh
bob:x:1002:1002::/tmp:/bin/sh
";
/// Their groups.
pub(crate) const GROUPS: &str = "alice:x:1001:
bob:x:1002:
";

const ACCOUNTS: &str = "root:x:0:0:root:/root:/bin/sh
munge:x:902:902::/nonexistent:/bin/false
sgeadmin:x:903:903::/nonexistent:/bin/false
nobody:x:65534:65534::/nonexistent:/bin/false
";
const ACCOUNT_GROUPS: &str = "root:x:0:
tty:x:5:
munge:x:902:
sgeadmin:x:903:
nogroup:x:65534:
";

/// An image in the lab's cache.
#[derive(Debug)]
pub(crate) struct Image {
    folder: PathBuf,
}

impl Image {
    /// Returns an image, building it if the cache has none of this recipe.
    #[track_caller]
    pub(crate) fn cached(recipe: &Recipe) -> Self {
        let name = format!("{}-{:016x}", recipe.name, fingerprint(recipe));
        let image = Self {
            folder: lab_cache().join("images").join(&name),
        };
        fs::create_dir_all(&image.folder).expect("the cache can be written");
        // Test binaries may run side by side; the lock is released with the file, however we end.
        let turn = File::create(image.folder.with_extension("lock"));
        let turn = turn.expect("the cache can be written");
        turn.lock().expect("a file can be locked");
        if !image.folder.join("complete").exists() {
            forget_older(&image.folder, recipe.name);
            fs::create_dir_all(image.root()).expect("the cache can be written");
            image.build(recipe);
            fs::write(image.folder.join("complete"), "").expect("the cache can be written");
        }
        image
    }

    /// Returns the tree that the image was made of.
    pub(crate) fn root(&self) -> PathBuf {
        self.folder.join("root")
    }

    /// Writes an initial RAM disk: the image, and over it these files. Paths are those of the node, modes in octal as usual.
    #[track_caller]
    pub(crate) fn write_initrd(&self, initrd: &Path, files: &[(String, u32, Vec<u8>)]) {
        let tree = initrd.with_extension("files");
        for (path, mode, bytes) in files {
            let path = tree.join(merged(path.trim_start_matches('/')));
            let folder = path.parent().expect("a file lies in a folder");
            fs::create_dir_all(folder).expect("our own folder");
            fs::write(&path, bytes).expect("our own folder");
            fs::set_permissions(&path, fs::Permissions::from_mode(*mode)).expect("our own file");
        }
        let more = initrd.with_extension("more");
        pack(&tree, &more);
        fs::copy(self.folder.join("initrd"), initrd).expect("our own folder");
        let mut whole = File::options()
            .append(true)
            .open(initrd)
            .expect("our own file");
        let mut more = File::open(&more).expect("our own file");
        std::io::copy(&mut more, &mut whole).expect("our own file");
    }

    #[track_caller]
    fn build(&self, recipe: &Recipe) {
        let root = self.root();
        // Packages of older releases have files in /bin and /lib, which are the same as /usr/bin and /usr/lib.
        for place in ["bin", "sbin", "lib", "lib64"] {
            fs::create_dir_all(root.join("usr").join(place)).expect("our own folder");
            symlink(format!("usr/{place}"), root.join(place)).expect("our own folder");
        }
        self.unpack(&self.packages(recipe));
        for folder in UNREAD {
            let _ = fs::remove_dir_all(root.join(folder));
        }
        for path in recipe.unneeded {
            remove_all(&root, path);
        }
        // No program in a node speaks another character set.
        for folder in library_folders(&root) {
            let _ = fs::remove_dir_all(folder.join("gconv"));
        }
        for folder in ["dev", "modules", "proc", "root", "run", "sys", "tmp", LAB] {
            fs::create_dir_all(root.join(folder)).expect("our own folder");
        }
        for folder in ["tmp", "var/tmp"] {
            fs::create_dir_all(root.join(folder)).expect("our own folder");
            let everybody = fs::Permissions::from_mode(0o1777);
            fs::set_permissions(root.join(folder), everybody).expect("our own folder");
        }
        add_busybox(&root);
        let kernel = Kernel::cached();
        let order: String = MODULES
            .iter()
            .chain(&MORE_MODULES)
            .filter(|name| add_module(&kernel.unpacked, name, &root))
            .map(|name| format!("{name}.ko\n"))
            .collect();
        let write = |name: &str, text: &str| {
            fs::write(root.join(name), text).expect("our own folder");
        };
        write("modules/order", &order);
        write("init", INIT);
        write("etc/passwd", &format!("{ACCOUNTS}{PEOPLE}"));
        write("etc/group", &format!("{ACCOUNT_GROUPS}{GROUPS}"));
        write("etc/nsswitch.conf", "hosts: files\n");
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(root.join("init"), executable).expect("our own file");
        pack(&root, &self.folder.join("initrd"));
    }

    /// Returns the packages of an image with their versions, as apt-get wants to be told.
    #[track_caller]
    fn packages(&self, recipe: &Recipe) -> Vec<String> {
        let nothing = self.folder.join("nothing-installed");
        fs::write(&nothing, "").expect("our own folder");
        let simulate = || {
            let mut apt_get = command("apt-get");
            apt_get
                .args(["-q", "--simulate", "--no-install-recommends", "-o"])
                .arg(format!("Dir::State::status={}", nothing.display()))
                .arg("install")
                .args(recipe.packages)
                .args(COMMON);
            run(apt_get_in(apt_get, &self.folder), b"", PATIENCE)
        };
        let mut asked = simulate();
        if !asked.is_success() {
            update_package_lists();
            asked = simulate().success();
        }
        let packages: Vec<_> = asked.stdout().lines().filter_map(package).collect();
        assert!(
            !packages.is_empty(),
            "apt-get would install nothing: {asked}"
        );
        packages
    }

    /// Downloads packages and unpacks them into the tree.
    #[track_caller]
    fn unpack(&self, packages: &[String]) {
        let download = || -> Outcome {
            let mut apt_get = command("apt-get");
            apt_get
                .args(["-q", "-o", "APT::Sandbox::User=root", "download"])
                .args(packages);
            run(apt_get_in(apt_get, &self.folder), b"", 5 * PATIENCE)
        };
        if !download().is_success() {
            // The lists may name versions that the archive has replaced.
            update_package_lists();
            download().success();
        }
        for file in fs::read_dir(&self.folder)
            .expect("our own folder")
            .flatten()
        {
            if file.path().extension().is_some_and(|end| end == "deb") {
                let mut unpack = command("sh");
                unpack
                    .args([
                        "-c",
                        "dpkg-deb --fsys-tarfile \"$1\" | tar -x --keep-directory-symlink -C \"$2\"",
                        "sh",
                    ])
                    .arg(file.path())
                    .arg(self.root());
                run(unpack, b"", PATIENCE).success();
                fs::remove_file(file.path()).expect("our own file");
            }
        }
    }
}

/// Removes what an earlier recipe of this name has left in the cache, and what was never completed.
fn forget_older(image: &Path, name: &str) {
    let images = image.parent().expect("images lie in a folder");
    for entry in fs::read_dir(images).into_iter().flatten().flatten() {
        let file = entry.file_name();
        let is_one = file
            .to_string_lossy()
            .strip_prefix(name)
            .is_some_and(|rest| rest.starts_with('-'));
        if is_one && entry.path().is_dir() {
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Returns a number that is another one for every other recipe, kernel and release.
fn fingerprint(recipe: &Recipe) -> u64 {
    let mut hasher = DefaultHasher::new();
    recipe.hash(&mut hasher);
    include_str!("image.rs").hash(&mut hasher);
    MODULES.hash(&mut hasher);
    Kernel::cached().vmlinuz.file_name().hash(&mut hasher);
    let release = fs::read_to_string("/etc/os-release").unwrap_or_default();
    release.hash(&mut hasher);
    hasher.finish()
}

/// Returns `NAME=VERSION` of a line `Inst NAME (VERSION ...)` of a simulation, unless the package is not needed.
fn package(line: &str) -> Option<String> {
    let mut words = line.strip_prefix("Inst ")?.split(' ');
    let name = words.next()?;
    let version = words.next()?.strip_prefix('(')?;
    let unneeded = UNNEEDED.iter().any(|begin| name.starts_with(begin));
    (!unneeded).then(|| format!("{name}={version}"))
}

/// Removes everything in a tree whose path begins like this.
fn remove_all(root: &Path, begin: &str) {
    let (folder, begin) = begin.rsplit_once('/').unwrap_or(("", begin));
    let entries = fs::read_dir(root.join(folder)).into_iter().flatten();
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(begin) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// Returns the folders of a tree in which libraries lie.
pub(crate) fn library_folders(root: &Path) -> Vec<PathBuf> {
    let libraries = root.join("usr/lib");
    let kinds = fs::read_dir(&libraries).into_iter().flatten().flatten();
    let mut folders: Vec<_> = kinds
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().ends_with("-linux-gnu"))
        .collect();
    folders.push(libraries);
    folders
}

/// Returns a path without the links from /bin and the like into /usr: an archive with a folder in their place would remove them.
fn merged(path: &str) -> String {
    let first = path.split('/').next().unwrap_or_default();
    if ["bin", "sbin", "lib", "lib64"].contains(&first) {
        format!("usr/{path}")
    } else {
        path.to_owned()
    }
}

/// Adds busybox for everything that no package has brought.
#[track_caller]
fn add_busybox(root: &Path) {
    let busybox = program("busybox");
    assert!(
        is_static(&busybox),
        "{} is not static: install busybox-static",
        busybox.display()
    );
    fs::copy(&busybox, root.join("usr/bin/busybox")).expect("our own folder");
    // In some releases the package's installation makes this link.
    let shell = root.join("usr/bin/sh");
    if !shell.exists() {
        symlink("dash", shell).expect("our own folder");
    }
    // By this very path the guest agent sets the clock.
    symlink("../bin/busybox", root.join("usr/sbin/hwclock")).expect("our own folder");
    let mut list = command("busybox");
    list.arg("--list");
    for name in run(list, b"", PATIENCE).success().stdout().lines() {
        let place = root.join("usr/bin").join(name);
        if !place.exists() && !root.join("usr/sbin").join(name).exists() {
            symlink("busybox", place).expect("our own folder");
        }
    }
}
