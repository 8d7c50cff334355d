//! Guests: one that sits in its firmware and costs nothing, and one that boots Linux and counts.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use crate::child::{Outcome, PATIENCE, command, eventually, profile_folder, program, run};
use crate::container::is_static;
use crate::realm::read_or_empty;
use crate::scratch::Scratch;

/// A guest as XML for libvirt, and what it says on its serial line.
#[derive(Debug)]
pub struct Guest {
    name: String,
    uuid: uuid::Uuid,
    memory_mib: u32,
    max_memory_mib: u32,
    vcpus: u32,
    max_vcpus: u32,
    boots: bool,
    has_login: bool,
    travels: bool,
    emulator: Option<String>,
    extra: String,
    /// What it boots, where that is not the lab's own counter.
    initrd: Option<PathBuf>,
    devices: String,
    scratch: Scratch,
}

impl Guest {
    /// Returns a guest with 32 MiB and no disk that stays in its firmware for ever.
    #[must_use]
    pub fn tiny(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            uuid: uuid::Uuid::new_v4(),
            memory_mib: 32,
            max_memory_mib: 32,
            vcpus: 1,
            max_vcpus: 1,
            boots: false,
            has_login: false,
            travels: false,
            emulator: None,
            extra: String::new(),
            initrd: None,
            devices: String::new(),
            scratch: Scratch::new("guest"),
        }
    }

    /// Returns a guest that boots Linux in two or three seconds, writes `count N` to its serial line ten times a
    /// second, answers `heard WORD` to a line there, balloons, brings new vcpus online, names its disks and network interfaces there
    /// whenever they change (`devices vda lo.`), and obeys the power button. To a channel for an agent it holds one that is silent.
    #[must_use]
    pub fn booted(name: &str) -> Self {
        Self {
            memory_mib: 128,
            max_memory_mib: 128,
            boots: true,
            ..Self::tiny(name)
        }
    }

    /// Returns a guest that boots Linux and asks on its serial line who is there: `root`, whose password is [`Guest::PASSWORD`], gets a
    /// shell. It counts nothing.
    #[must_use]
    pub fn with_login(name: &str) -> Self {
        Self {
            has_login: true,
            ..Self::booted(name)
        }
    }

    /// Returns a guest that boots and may be moved while it runs: 128 MiB and 8 KiB.
    ///
    /// QEMU before 9.0 forgets what an emulated guest writes while it is moved: where a block of memory is a multiple of 256 KiB, it clears the
    /// marks of written pages and lets the emulation go on writing without setting them again. Of ten such moves under load two lost
    /// the guest, without libvirt and xman; of a hundred with a block of another size, none. libvirt rounds sizes, hence the arguments.
    #[must_use]
    pub fn traveller(name: &str) -> Self {
        Self {
            travels: true,
            ..Self::booted(name)
        }
    }

    /// The password of `root` in [`Guest::with_login`].
    pub const PASSWORD: &str = "secret";

    /// Gives the guest memory, in MiB, now and at most.
    #[must_use]
    pub fn memory(mut self, now: u32, at_most: u32) -> Self {
        (self.memory_mib, self.max_memory_mib) = (now, at_most);
        self
    }

    /// Gives the guest virtual CPUs, now and at most.
    #[must_use]
    pub fn vcpus(mut self, now: u32, at_most: u32) -> Self {
        (self.vcpus, self.max_vcpus) = (now, at_most);
        self
    }

    /// Lets this program emulate the guest, rather than the one that libvirt chooses.
    #[must_use]
    pub fn emulator(mut self, path: &str) -> Self {
        self.emulator = Some(path.to_owned());
        self
    }

    /// Adds XML at the top level of the domain, e.g. `<metadata>`.
    #[must_use]
    pub fn xml_extra(mut self, xml: &str) -> Self {
        self.extra.push_str(xml);
        self
    }

    /// Lets the guest boot this instead of the lab's counter, and adds devices. Whether it is up, others know.
    pub(crate) fn boots_node(&mut self, initrd: PathBuf, devices: &str) {
        self.boots = true;
        self.initrd = Some(initrd);
        devices.clone_into(&mut self.devices);
    }

    /// Returns the folder of the guest's files.
    pub(crate) fn scratch(&self) -> &Scratch {
        &self.scratch
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
    #[track_caller]
    #[must_use]
    pub fn xml(&self) -> String {
        let Self {
            name,
            uuid,
            memory_mib,
            max_memory_mib,
            vcpus,
            max_vcpus,
            extra,
            devices,
            ..
        } = self;
        let kernel = if let Some(initrd) = &self.initrd {
            // A busy machine may keep the timer from the guest just while it looks whether there is one.
            Kernel::cached().xml(initrd, "no_timer_check")
        } else if self.boots {
            let kernel = Kernel::cached();
            kernel.xml(&kernel.initrd, if self.has_login { "login" } else { "" })
        } else {
            String::new()
        };
        let serial = self.serial_log().display().to_string();
        let (smbios, hypervisor) = if self.boots && max_vcpus > vcpus {
            HOTPLUG
        } else {
            ("", "")
        };
        let emulator = self
            .emulator
            .as_ref()
            .map_or(String::new(), |path| format!("<emulator>{path}</emulator>"));
        let (namespace, arguments) = if self.travels { ODD } else { ("", "") };
        format!(
            "<domain type='qemu'{namespace}>
  <name>{name}</name>
  <uuid>{uuid}</uuid>
  {extra}
  <memory unit='MiB'>{max_memory_mib}</memory>
  <currentMemory unit='MiB'>{memory_mib}</currentMemory>
  <vcpu placement='static' current='{vcpus}'>{max_vcpus}</vcpu>
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    {kernel}
    {smbios}
  </os>
  {hypervisor}
  <features><acpi/><apic/></features>
  <clock offset='utc'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    {emulator}
    <controller type='usb' model='none'/>
    <serial type='pty'><log file='{serial}' append='on'/><target port='0'/></serial>
    <console type='pty'><target type='serial' port='0'/></console>
    <memballoon model='virtio'><stats period='1'/></memballoon>
    {devices}
  </devices>
  {arguments}
</domain>
"
        )
    }

    /// Writes the XML to a file and returns its path.
    #[track_caller]
    #[must_use]
    pub fn file(&self) -> String {
        self.scratch
            .write("domain.xml", self.xml())
            .display()
            .to_string()
    }

    /// Returns the file with all that the guest has written to its serial line, on whatever host it was.
    #[must_use]
    pub fn serial_log(&self) -> PathBuf {
        self.scratch.path().join("serial.log")
    }

    /// Returns what the guest has written to its serial line.
    #[must_use]
    pub fn said(&self) -> String {
        read_or_empty(&self.serial_log())
    }

    /// Returns the last number that the guest has counted to since its last boot, 0 before the first.
    #[must_use]
    pub fn count(&self) -> u64 {
        let said = self.said();
        let whole = said.rfind('\n').map_or("", |end| &said[..end]);
        let last = whole
            .lines()
            .rev()
            .find_map(|line| line.trim().strip_prefix("count ")?.parse().ok());
        last.unwrap_or(0)
    }

    /// Waits until a guest that boots has counted to one, or asks who is there; returns at once for one that does not boot.
    #[track_caller]
    pub fn wait_until_up(&self) {
        if self.has_login {
            self.wait_until_said("login: ");
        } else if self.boots {
            self.wait_until_said("count 1\r");
        }
    }

    /// Waits until the guest has written this to its serial line.
    #[track_caller]
    pub fn wait_until_said(&self, text: &str) {
        let end = Instant::now() + PATIENCE;
        while !self.said().contains(text) {
            assert!(
                Instant::now() < end,
                "{} did not say {text:?} within {PATIENCE:?}, but last:\n{}",
                self.name,
                self.last_words()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Returns the end of what the guest has written to its serial line.
    #[must_use]
    pub fn last_words(&self) -> String {
        let said = self.said();
        let lines: Vec<_> = said.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }

    /// Requires that the guest goes on counting from where it was: it runs, and it was not started afresh.
    #[track_caller]
    pub fn keeps_counting(&self) {
        let before = self.count();
        let after = eventually(&format!("{} counts on", self.name), PATIENCE, || {
            Some(self.count()).filter(|now| *now != before)
        });
        assert!(
            after > before,
            "{} counts from {after} again, after {before}; it said last:\n{}",
            self.name,
            self.last_words()
        );
    }

    /// Requires that the guest was started afresh and counts.
    #[track_caller]
    pub fn keeps_counting_anew(&self) {
        let what = format!("{} counts from one again", self.name);
        eventually(&what, PATIENCE, || {
            (self.said().matches("count 1\r").count() > 1).then_some(())
        });
        self.keeps_counting();
    }

    /// Requires that the guest has counted from one on without missing a number or counting one twice.
    #[track_caller]
    pub fn missed_no_number(&self) {
        let said = self.said();
        let whole = said.rfind('\n').map_or("", |end| &said[..end]);
        let numbers = whole
            .lines()
            .filter_map(|line| line.trim().strip_prefix("count ")?.parse::<u64>().ok());
        for (expected, number) in (1..).zip(numbers) {
            assert_eq!(number, expected, "{} does not count on", self.name);
        }
    }

    /// Requires that the guest does not count for a second: it is paused, saved or gone.
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
}

/// Memory of an odd size.
const ODD: (&str, &str) = (
    " xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'",
    "<qemu:commandline>
    <qemu:arg value='-object'/><qemu:arg value='memory-backend-ram,id=odd,size=134225920'/>
    <qemu:arg value='-machine'/><qemu:arg value='memory-backend=odd'/>
    <qemu:arg value='-m'/><qemu:arg value='131080k'/>
  </qemu:commandline>",
);

/// Returns the folder for what is costly to make and the same for every test.
pub(crate) fn lab_cache() -> PathBuf {
    let folder = match std::env::var_os("XMAN_LAB_CACHE") {
        Some(folder) => PathBuf::from(folder),
        None => profile_folder()
            .parent()
            .unwrap_or(Path::new("/"))
            .join("lab-cache"),
    };
    fs::create_dir_all(&folder).unwrap_or_else(|e| panic!("cannot make {}: {e}", folder.display()));
    folder
}

/// From 6.9 on, Linux takes more vcpus than it booted with only where it sees a hypervisor. It does not recognise
/// QEMU's emulation as one, but asks for VMware's when the serial number says so, and QEMU answers.
const HOTPLUG: (&str, &str) = (
    "<smbios mode='sysinfo'/>",
    "<sysinfo type='smbios'><system><entry name='serial'>VMware-1</entry></system></sysinfo>
  <cpu mode='custom' match='exact'><model>qemu64</model><feature policy='disable' name='hypervisor'/></cpu>",
);

/// A Linux kernel of the distribution, and an initial RAM disk with busybox and the modules it needs.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) vmlinuz: PathBuf,
    /// The distribution's packages, unpacked: there the modules are.
    pub(crate) unpacked: PathBuf,
    initrd: PathBuf,
}

/// Modules in the order of their dependencies; those built into a kernel are not there as files.
pub(crate) const MODULES: [&str; 13] = [
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "virtio_balloon",
    "virtio_blk",
    "failover",
    "net_failover",
    "virtio_net",
    "virtio_console",
    "button",
    "evdev",
];

/// The guest's first process. New vcpus appear offline; ACPI's power button is an input device, opened before the
/// count begins: what is pressed before would be lost.
const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev 2> /dev/null
case " $(cat /proc/cmdline) " in
*" login "*)
    mkdir -p /etc
    echo "root:$(mkpasswd -m md5 -S saltsalt secret):0:0:root:/:/bin/sh" > /etc/passwd
    while :; do setsid getty -L ttyS0 115200 vt100; done
    ;;
esac
exec < /dev/ttyS0 > /dev/ttyS0 2>&1
stty -echo
for module in $(cat /modules/order); do insmod /modules/$module; done
for event in /sys/class/input/event*; do
    if [ "$(cat $event/device/name)" = "Power Button" ]; then
        exec 5< /dev/input/${event##*/}
        (head -c 1 <&5 > /dev/null && echo "power button" && poweroff -f) &
    fi
done
(while :; do
    for cpu in /sys/devices/system/cpu/cpu[1-9]*; do
        if [ "$(cat $cpu/online 2> /dev/null)" = 0 ] && echo 1 > $cpu/online; then
            echo "online ${cpu##*/}"
        fi
    done
    sleep 0.3
done) &
# An agent that is there, takes what it is asked, and never answers.
for port in /dev/vport*; do
    if [ -e $port ]; then exec 6<>$port; echo "silent agent"; fi
done
(known=; while :; do
    now=$(echo $(ls /sys/block /sys/class/net | grep -v :))
    if [ "$now" != "$known" ]; then echo "devices $now."; known=$now; fi
    sleep 0.3
done) &
(number=0; while :; do number=$((number + 1)); echo "count $number"; usleep 100000; done) &
while :; do
    if read -r words; then echo "heard $words"; else sleep 1; fi
done
"#;

impl Kernel {
    /// Returns the kernel, fetching and building what is not in the lab's cache.
    #[track_caller]
    pub(crate) fn cached() -> &'static Self {
        static KERNEL: OnceLock<Kernel> = OnceLock::new();
        KERNEL.get_or_init(|| {
            let folder = lab_cache().join("kernel");
            // Test binaries may run side by side; the lock is released with the file, however we end.
            let turn =
                File::create(lab_cache().join("kernel.lock")).expect("the cache can be written");
            turn.lock().expect("a file can be locked");
            let unpacked = folder.join("unpacked");
            if !folder.join("complete").exists() {
                let _ = fs::remove_dir_all(&folder);
                fs::create_dir_all(&unpacked).expect("the cache can be written");
                unpack_kernel(&folder, &unpacked);
                fs::write(folder.join("complete"), "").expect("the cache can be written");
            }
            // Cheap, and so never older than this program.
            let initrd = build_initrd(&unpacked);
            Self {
                vmlinuz: entry(&unpacked.join("boot"), "vmlinuz"),
                unpacked,
                initrd,
            }
        })
    }

    fn xml(&self, initrd: &Path, more: &str) -> String {
        format!(
            "<kernel>{}</kernel><initrd>{}</initrd><cmdline>console=ttyS0 quiet panic=-1 {more}</cmdline>",
            self.vmlinuz.display(),
            initrd.display()
        )
    }
}

/// Downloads the distribution's kernel for virtual machines and unpacks it; nothing is installed.
#[track_caller]
fn unpack_kernel(folder: &Path, unpacked: &Path) {
    let packages = kernel_packages().or_else(|| {
        update_package_lists();
        kernel_packages()
    });
    for package in packages.expect("apt knows linux-image-cloud-amd64 or linux-image-virtual") {
        let download = || {
            let mut apt_get = command("apt-get");
            apt_get.args(["-q", "-o", "APT::Sandbox::User=root", "download", &package]);
            run(apt_get_in(apt_get, folder), b"", 5 * PATIENCE)
        };
        if !download().is_success() {
            // The lists may name a version that the archive has replaced.
            update_package_lists();
            download().success();
        }
    }
    for file in fs::read_dir(folder).expect("our own folder").flatten() {
        if file.path().extension().is_some_and(|end| end == "deb") {
            let mut dpkg = command("dpkg");
            dpkg.arg("-x").arg(file.path()).arg(unpacked);
            run(dpkg, b"", PATIENCE).success();
            fs::remove_file(file.path()).expect("our own file");
        }
    }
}

pub(crate) fn update_package_lists() {
    let mut update = command("apt-get");
    update.args(["-q", "update"]);
    // Whether it was enough, the next step tells.
    let _ = run(with_proxies(update), b"", 5 * PATIENCE);
}

pub(crate) fn apt_get_in(mut apt_get: Command, folder: &Path) -> Command {
    apt_get.current_dir(folder);
    with_proxies(apt_get)
}

/// Hands the way to the archive on to apt, whose commands otherwise start with an empty environment.
fn with_proxies(mut command: Command) -> Command {
    for name in ["http_proxy", "https_proxy", "no_proxy", "APT_CONFIG"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command
}

/// Returns the packages that make up the kernel: Debian has one for clouds, Ubuntu one for virtual machines
/// with modules in a second package. Nothing when apt has no lists of packages.
#[track_caller]
fn kernel_packages() -> Option<Vec<String>> {
    let depends = |package: &str| -> Option<Outcome> {
        let mut apt_cache = command("apt-cache");
        apt_cache.args(["depends", "--important", package]);
        Some(run(apt_cache, b"", PATIENCE)).filter(Outcome::is_success)
    };
    for meta in ["linux-image-cloud-amd64", "linux-image-virtual"] {
        let Some(answer) = depends(meta) else {
            continue;
        };
        let answer = answer.stdout();
        let names = answer
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        let image = names
            .filter(|name| name.starts_with("linux-image-"))
            .map(str::to_owned)
            .next();
        if let Some(image) = image {
            let modules = image.replacen("linux-image-", "linux-modules-", 1);
            let split = depends(&modules).is_some();
            return Some(
                std::iter::once(image)
                    .chain(split.then_some(modules))
                    .collect(),
            );
        }
    }
    None
}

#[track_caller]
fn build_initrd(unpacked: &Path) -> PathBuf {
    let busybox = program("busybox");
    assert!(
        is_static(&busybox),
        "{} is not static: install busybox-static",
        busybox.display()
    );
    let scratch = Scratch::new("initrd");
    for folder in ["bin", "modules", "proc", "sys", "dev"] {
        fs::create_dir_all(scratch.path().join("root").join(folder)).expect("our own folder");
    }
    let root = scratch.path().join("root");
    fs::copy(&busybox, root.join("bin/busybox")).expect("our own folder");
    let init = scratch.write("root/init", INIT);
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    fs::set_permissions(init, executable).expect("our own file");
    let order: Vec<_> = MODULES
        .iter()
        .filter(|name| add_module(unpacked, name, &root))
        .collect();
    let order: String = order.iter().map(|name| format!("{name}.ko\n")).collect();
    scratch.write("root/modules/order", order);

    let initrd = unpacked.with_file_name("initrd");
    let draft = unpacked.with_file_name("initrd.draft");
    pack(&root, &draft);
    fs::rename(draft, &initrd).expect("our own folder");
    initrd
}

/// Packs a tree into an archive from which Linux starts.
#[track_caller]
pub(crate) fn pack(tree: &Path, archive: &Path) {
    let mut cpio = command("sh");
    cpio.args([
        "-c",
        "cd \"$1\" && find . | cpio -o -H newc --quiet > \"$2\"",
        "sh",
    ])
    .arg(tree)
    .arg(archive);
    let _ = program("cpio");
    run(cpio, b"", PATIENCE).success();
}

/// Adds a module, unpacked, if the kernel has it as a file.
#[track_caller]
pub(crate) fn add_module(unpacked: &Path, name: &str, root: &Path) -> bool {
    let mut find = command("find");
    find.arg(unpacked).args(["-name", &format!("{name}.ko*")]);
    let found = run(find, b"", PATIENCE).success().stdout();
    let Some(path) = found.lines().next() else {
        return false;
    };
    let tool = match Path::new(path).extension().and_then(|end| end.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => "cat",
    };
    let target = root.join("modules").join(format!("{name}.ko"));
    let mut unpack = command("sh");
    let flag = if tool == "cat" { "" } else { "-dc" };
    unpack
        .args([
            "-c",
            &format!("{tool} {flag} < \"$1\" > \"$2\""),
            "sh",
            path,
        ])
        .arg(target);
    let _ = program(tool);
    run(unpack, b"", PATIENCE).success();
    true
}

/// Returns the file in a folder whose name begins like this.
#[track_caller]
fn entry(folder: &Path, begin: &str) -> PathBuf {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
    let found = entries
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(begin));
    found
        .unwrap_or_else(|| panic!("no {begin}* in {}", folder.display()))
        .path()
}
