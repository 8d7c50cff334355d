//! How long a job waits for its room: with nothing to move, and while another gives way by each depth, beside what libvirt alone needs for
//! the same steps.
//!
//! Whole processes are timed, `rxm lease begin` in turns with `virsh`; the last column is the call in xmand by its own audit, where nothing moves
//! that is its own share.

#![allow(
    clippy::expect_used,
    clippy::panic,
    reason = "a bench has nobody to report to but its user"
)]

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use xman_tests::{Guest, Host, Libvirtd, Outcome, Realm, Records, User, eventually, took};

const ROUNDS: usize = 7;
/// The guest that gives way.
const MEMORY_MIB: u32 = 1024;
const FLOOR_MIB: u32 = 256;
const PATIENCE: Duration = Duration::from_secs(300);

/// A depth, and virsh's words there and back.
struct Row {
    depth: &'static str,
    there: &'static [&'static str],
    back: &'static [&'static str],
}

const ROWS: [Row; 4] = [
    Row {
        depth: "starve",
        there: &["schedinfo", "low-a", "--live", "global_quota=5000"],
        back: &["schedinfo", "low-a", "--live", "global_quota=-1"],
    },
    Row {
        depth: "shrink",
        there: &["setmem", "low-a", "256M", "--live"],
        back: &["setmem", "low-a", "1024M", "--live"],
    },
    Row {
        depth: "pause",
        there: &["suspend", "low-a"],
        back: &["resume", "low-a"],
    },
    Row {
        depth: "freeze",
        there: &["managedsave", "low-a", "--paused"],
        back: &["start", "low-a"],
    },
];

fn main() {
    let realm = Realm::new();
    let libvirtd = Libvirtd::with_cpu_groups();
    let low = Guest::booted("low-a").memory(MEMORY_MIB, MEMORY_MIB);
    let high = Guest::tiny("high-b");
    libvirtd.run(&low);
    libvirtd.run(&high);
    low.wait_until_up();
    let slurm = realm.user("slurm/bench");
    println!(
        "{:<22} {:>24} {:>24} {:>12}",
        "lease begin", "rxm (ms)", "virsh (ms)", "xmand (ms)"
    );
    // Here there is room for both.
    let host = host(&realm, &libvirtd, "pause", 2);
    let (mut begun, mut own) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let (time, inside) = begin(&slurm, &host, round, "low-a");
        begun.push(time);
        own.push(inside);
        end(&slurm, &host, round);
    }
    report("nothing to move", begun, None, own);
    drop(host);
    for row in ROWS {
        let host = self::host(&realm, &libvirtd, row.depth, 1);
        let (mut begun, mut alone, mut own) = (Vec::new(), Vec::new(), Vec::new());
        run(
            &slurm,
            &host,
            &["lease", "begin", "slurm/bench/low/0", "low-a"],
        );
        for round in 0..ROUNDS {
            let (time, inside) = begin(&slurm, &host, round, "high-b");
            begun.push(time);
            own.push(inside);
            end(&slurm, &host, round);
            settled(&slurm, &host);
            alone.push(by_hand(&libvirtd, &row));
        }
        run(&slurm, &host, &["lease", "end", "slurm/bench/low/0"]);
        report(row.depth, begun, Some(alone), own);
    }
}

/// A host with so many CPUs for jobs.
fn host(realm: &Realm, libvirtd: &Libvirtd, preempt: &str, for_jobs: usize) -> Host {
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let mut rules = format!(
        "[schedule]\nreserve-cpus = {}\n",
        cpus.saturating_sub(for_jobs)
    );
    let classes = format!(
        "reserve-memory = \"512MiB\"\nmin-run = \"1ms\"\n\
         [schedule.class.low]\ndomains = [\"low-*\"]\nrank = 10\npreempt = \"{preempt}\"\nfloor = \"{FLOOR_MIB}MiB\"\n\
         [schedule.class.high]\ndomains = [\"high-*\"]\nrank = 20\npreempt = \"never\"\n\
         [schedule.system.slurm]\nprincipals = [\"slurm/*@{}\"]\ndomains = [\"*\"]\n",
        realm.name()
    );
    rules.write_str(&classes).expect("a string grows");
    let host = Host::builder()
        .beside(libvirtd)
        .config_extra(&rules)
        .start(realm);
    let slurm = realm.user("slurm/bench");
    eventually("xmand has read libvirt", PATIENCE, || {
        let names = slurm.rxm(&host, ["-o", "name", "list"]).stdout();
        (names.contains("low-a") && names.contains("high-b")).then_some(())
    });
    host
}

/// Begins a lease; returns the milliseconds that the whole process took, and those in xmand.
fn begin(slurm: &User, host: &Host, round: usize, domain: &str) -> (f64, f64) {
    let key = format!("slurm/bench/{round}/{round}");
    let began = Instant::now();
    run(slurm, host, &["lease", "begin", &key, domain]);
    let time = millis(began.elapsed());
    let record = host.audit().contains(&["lease-begin", &key, "ok in"]);
    (time, millis(took(&record)))
}

fn end(slurm: &User, host: &Host, round: usize) {
    run(
        slurm,
        host,
        &["lease", "end", &format!("slurm/bench/{round}/{round}")],
    );
}

fn settled(slurm: &User, host: &Host) {
    eventually("all is given back", PATIENCE, || {
        let rows = slurm.rxm(host, ["-o", "json", "status", "low-a"]).json();
        (rows.get(0)?.get("standing")? == "running-preemptible").then_some(())
    });
}

/// What libvirt needs for the same; the guest's memory is waited for as xmand does.
fn by_hand(libvirtd: &Libvirtd, row: &Row) -> f64 {
    let began = Instant::now();
    libvirtd.virsh(row.there).success();
    if row.depth == "shrink" {
        eventually("the guest has given its memory", PATIENCE, || {
            (libvirtd.dominfo("low-a", "Used memory") == format!("{} KiB", FLOOR_MIB << 10))
                .then_some(())
        });
    }
    let time = millis(began.elapsed());
    libvirtd.virsh(row.back).success();
    if row.depth == "freeze" {
        libvirtd.virsh(&["resume", "low-a"]).success();
    }
    if row.depth == "shrink" {
        eventually("the guest has its memory", PATIENCE, || {
            (libvirtd.dominfo("low-a", "Used memory") == format!("{} KiB", MEMORY_MIB << 10))
                .then_some(())
        });
    }
    time
}

fn run(user: &User, host: &Host, words: &[&str]) -> Outcome {
    user.rxm_call(host, words).limit(PATIENCE).run().success()
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

fn report(what: &str, rxm: Vec<f64>, virsh: Option<Vec<f64>>, xmand: Vec<f64>) {
    let words = |times: Vec<f64>| {
        let (least, median, most) = spread(times);
        format!("{median:.0} ({least:.0} to {most:.0})")
    };
    let (_, own, _) = spread(xmand);
    println!(
        "{what:<22} {:>24} {:>24} {own:>12.0}",
        words(rxm),
        virsh.map_or("-".to_owned(), words)
    );
}

fn spread(mut times: Vec<f64>) -> (f64, f64, f64) {
    times.sort_by(f64::total_cmp);
    let at = |part: usize| times.get(part).copied().unwrap_or(f64::NAN);
    (
        at(0),
        at(times.len() / 2),
        at(times.len().saturating_sub(1)),
    )
}
