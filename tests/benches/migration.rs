//! How long a guest full of memory is on its way: through the Kerberos channel, and from libvirt to libvirt in clear, in turns.
//!
//! The direct way is the floor of libvirt and QEMU themselves; what the channel adds is GSSAPI's sealing and four more copies.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a bench has nobody to report to but its user"
)]

use std::{
    fs::{self, File},
    io::{self, Read, Seek, SeekFrom},
    path::PathBuf,
    time::{Duration, Instant},
};

use xman_tests::{Guest, Host, Hosts, Libvirtd, Realm, User, eventually};

const MEMORY_MIB: u32 = 1024;
/// The firmware's own, at the beginning; the rest is filled with what no two pages have in common.
const SPARED_MIB: u64 = 64;
/// Guests' memory lies in files here, where the bench can fill it.
const BACKING: &str = "<memoryBacking><source type='file'/><access mode='shared'/></memoryBacking>";
const PATIENCE: Duration = Duration::from_secs(300);

fn main() {
    let realm = Realm::new();
    let hosts = Hosts::pair(&realm);
    let config = "[migration]\npeers = ['alpha', 'beta', '10.77.0.1', '10.77.0.2']\nuri = 'qemu+tcp://{host}/system'";
    let host = |libvirtd| {
        Host::builder()
            .k5login(["alice"])
            .beside(libvirtd)
            .config_extra(config)
            .start(&realm)
    };
    let (alpha, beta) = (host(&hosts.alpha), host(&hosts.beta));
    let alice = realm.user("alice");
    let guest = Guest::tiny("big")
        .memory(MEMORY_MIB, MEMORY_MIB)
        .xml_extra(BACKING);
    hosts.alpha.run(&guest);
    fill(&hosts.alpha);
    let rounds = [(); 3].map(|()| {
        let channel = journey(&alice, &alpha, "beta", &[]);
        let direct = journey(&alice, &beta, "10.77.0.1", &["--direct"]);
        (channel, direct)
    });
    let (channel, direct) = (
        rounds.map(|(channel, _)| channel),
        rounds.map(|(_, direct)| direct),
    );
    let floor = report("libvirt to libvirt, in clear", direct, None);
    report("through the channel, sealed", channel, Some(floor));
}

/// Moves the guest, and returns the seconds that rxm took.
fn journey(alice: &User, from: &Host, to: &str, how: &[&str]) -> f64 {
    eventually("the guest is known", PATIENCE, || {
        let rows = alice.rxm(from, ["-o", "json", "list", "big"]);
        (rows.is_success() && rows.json().get(0)?.get("state")? == "running").then_some(())
    });
    let words: Vec<_> = ["migrate", "big", to]
        .into_iter()
        .chain(how.iter().copied())
        .collect();
    let began = Instant::now();
    alice.rxm_call(from, words).limit(PATIENCE).run().success();
    began.elapsed().as_secs_f64()
}

/// Prints a row, and returns the median in MiB/s.
fn report(what: &str, seconds: [f64; 3], floor: Option<f64>) -> f64 {
    let mut rates = seconds.map(|seconds| f64::from(MEMORY_MIB) / seconds);
    rates.sort_by(f64::total_cmp);
    let [least, median, most] = rates;
    let ratio = floor.map_or(String::new(), |floor| {
        format!(", {:.2} of the floor", median / floor)
    });
    println!("{what:<30} {median:6.1} MiB/s ({least:.1} to {most:.1}){ratio}");
    median
}

/// Fills the guest's memory.
fn fill(libvirtd: &Libvirtd) {
    let memory = memory_file(libvirtd.cell().outside("/var/lib/libvirt/qemu/ram"));
    let mut memory = File::options()
        .write(true)
        .open(memory)
        .expect("the guest's memory is a file");
    let spared = SPARED_MIB << 20;
    memory
        .seek(SeekFrom::Start(spared))
        .expect("it is longer than what is spared");
    let noise = File::open("/dev/urandom").expect("the kernel has noise");
    let filled = io::copy(
        &mut noise.take((u64::from(MEMORY_MIB) << 20) - spared),
        &mut memory,
    );
    filled.expect("the guest's memory can be written");
}

fn memory_file(folder: PathBuf) -> PathBuf {
    let mut folders = vec![folder];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("libvirt keeps memory there") {
            let path = entry.expect("a folder can be read").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                return path;
            }
        }
    }
    panic!("no guest's memory is a file");
}
