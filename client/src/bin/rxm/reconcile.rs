//! `reconcile`: the leases of jobs that a batch system has no more are ended.
//!
//! What is not in the list ends, so a list that was cut or never came must not pass for one that is short: an empty one is not believed,
//! nor is one whose last line has no end.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fs,
    io::{self, Read},
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use clap::Args;
use serde_json::json;
use xman_client::{Explanation, Kind, fleet};
use xman_common::{
    name::{JobId, Tag},
    protocol::{LeaseKey, LeaseList, LeaseRow, MAX_RUNNING, Reconcile, Reply, Request, Verb},
};

use crate::{
    change::{change, may},
    exit::Tally,
    lease::{ended_lines, leases},
    setting::{Setting, Stop, misfit},
    status::keys,
    told::Told,
    units::duration,
};

/// What `rxm help reconcile` says after the options.
pub(crate) const HELP: &str = "\
The list has one running job a line, JOB or JOB RUN, where RUN says how often it was begun before (0 where it is left away). All hosts that are named get the \
    whole list, and end the leases of that batch system and cluster whose jobs are not in it, or are in it with a later run. \
    Leases that began while the list was made are left alone: --age says how old it is.

A list that is empty is not believed, since it is what a batch system prints that could not be asked: --none says that there really are no jobs. \
    Nor is one whose last line has no end.

Examples:
  squeue -h -t running,suspended -o '%A' | rxm -H @grid reconcile slurm/grid
  rxm -H @grid reconcile pbs/main jobs.txt
  rxm -H @grid reconcile slurm/grid jobs.txt --dry-run
  rxm -H @grid reconcile slurm/grid --none

JSON: host, system, cluster, ended (a list of SYSTEM/CLUSTER/JOB/RUN), verb; with --dry-run would_end and allowed in the place of ended.";

/// The most of a list that is read, in bytes: as many jobs as one call takes, with the longest ids and runs.
const MAX_LIST: u64 = MAX_RUNNING as u64 * 144;

/// Arguments of `reconcile`.
#[derive(Debug, Args)]
pub(crate) struct ReconcileArgs {
    /// SYSTEM/CLUSTER, as slurm/grid
    #[arg(value_name = "SYSTEM/CLUSTER", value_parser = cluster)]
    pub(crate) cluster: (Tag, Tag),
    /// The list of running jobs; - means standard input
    #[arg(default_value = "-")]
    pub(crate) file: PathBuf,
    /// How old the list is at most; leases that began since then are left alone [default: 1m, or the age of FILE where it is older]
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub(crate) age: Option<Duration>,
    /// The batch system has no job at all; no list is read
    #[arg(long, conflicts_with = "file")]
    pub(crate) none: bool,
}

/// How old a list counts that does not say it: batch systems take their time to answer.
const AGE: Duration = Duration::from_secs(60);

fn cluster(text: &str) -> Result<(Tag, Tag), String> {
    let (system, cluster) = text
        .split_once('/')
        .ok_or_else(|| format!("'{text}' is no SYSTEM/CLUSTER; one is slurm/grid"))?;
    let tag = |text: &str| {
        text.parse()
            .map_err(|error: xman_common::name::BadName| error.to_string())
    };
    Ok((tag(system)?, tag(cluster)?))
}

/// `rxm reconcile`
pub(crate) async fn reconcile(setting: &Setting, args: ReconcileArgs) -> Result<Tally, Stop> {
    let ReconcileArgs {
        cluster: (system, cluster),
        file,
        age,
        none,
    } = args;
    let hosts = setting.hosts()?;
    let begun = Instant::now();
    let (running, read_age) = if none {
        (BTreeMap::new(), AGE)
    } else {
        let (text, written) = read(&file)?;
        let name = source(&file);
        let running =
            running(&text).map_err(|why| Stop::Failed(Kind::Refused, format!("{name}: {why}")))?;
        (running, written.max(AGE))
    };
    setting.check_ticket().await?;
    let age = age.unwrap_or(read_age).saturating_add(begun.elapsed());
    let reconcile = Reconcile {
        system,
        cluster,
        running,
        age_ms: u64::try_from(age.as_millis()).unwrap_or(u64::MAX),
    };
    let several = hosts.len() > 1;
    let mut told = Told::new(setting, Verb::Reconcile, several);
    if setting.dry_run {
        let reconcile = &reconcile;
        let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
            let mut caller = setting.caller(&address);
            let would = rehearse(setting, &mut caller, reconcile).await;
            (address, would)
        });
        for (address, would) in heard.await {
            match would {
                Ok((ended, allowed)) => {
                    let value = json!({
                        "host": address,
                        "system": reconcile.system,
                        "cluster": reconcile.cluster,
                        "would_end": keys(&ended),
                        "dry_run": true,
                        "allowed": allowed,
                    });
                    let (_, names) = ended_lines(&address, &ended, several);
                    let permission = setting.permission(allowed);
                    let said: Vec<_> = match ended.as_slice() {
                        [] => vec![format!("would end nothing on {address}: {permission}")],
                        some => some
                            .iter()
                            .map(|key| format!("would end {key} on {address}: {permission}"))
                            .collect(),
                    };
                    if allowed {
                        told.done_with(value, &said, &names);
                    } else {
                        told.failed_with(value, address.to_string(), &denied());
                    }
                }
                Err(error) => told.failed_on(&address, error),
            }
        }
        return told.finish();
    }
    let request = &Request::Reconcile(reconcile.clone());
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let ended = match change(setting, &mut caller, request).await {
            Ok(Reply::Ended(keys)) => Ok(keys),
            Ok(_) => Err(misfit()),
            Err(error) => Err(error),
        };
        (address, ended)
    });
    for (address, ended) in heard.await {
        match ended {
            Ok(ended) => {
                let value = json!({
                    "host": address,
                    "system": reconcile.system,
                    "cluster": reconcile.cluster,
                    "ended": keys(&ended),
                });
                let (said, names) = ended_lines(&address, &ended, several);
                told.done_with(value, &said, &names);
            }
            Err(error) => told.failed_on(&address, error),
        }
    }
    told.finish()
}

fn denied() -> Explanation {
    Explanation {
        kind: Kind::Refused,
        code: "denied",
        what: "denied: you may not reconcile here".to_owned(),
        advice: "`rxm explain reconcile` says why".to_owned(),
        is_common: false,
    }
}

async fn rehearse(
    setting: &Setting,
    caller: &mut xman_client::Caller,
    reconcile: &Reconcile,
) -> Result<(Vec<LeaseKey>, bool), Explanation> {
    let allowed = may(setting, caller, Verb::Reconcile, None).await?;
    let list = LeaseList {
        system: Some(reconcile.system.clone()),
        key: None,
    };
    let rows = leases(setting, caller, list).await?;
    let now = u64::try_from(jiff::Timestamp::now().as_millisecond()).unwrap_or_default();
    Ok((gone(reconcile, &rows, now), allowed))
}

/// Returns the leases whose jobs are gone, by the list and by our clock.
fn gone(reconcile: &Reconcile, rows: &[LeaseRow], now_ms: u64) -> Vec<LeaseKey> {
    let is_gone = |row: &&LeaseRow| {
        let LeaseKey { job, run } = &row.key;
        job.system == reconcile.system
            && job.cluster == reconcile.cluster
            && row.began_ms < now_ms.saturating_sub(reconcile.age_ms)
            && reconcile.running.get(&job.id).is_none_or(|now| run < now)
    };
    let gone = rows.iter().filter(is_gone);
    gone.map(|row| row.key.clone()).collect()
}

fn source(file: &Path) -> String {
    if file == Path::new("-") {
        "standard input".to_owned()
    } else {
        file.display().to_string()
    }
}

/// Reads a list, and how long ago it was written.
fn read(file: &Path) -> Result<(String, Duration), Stop> {
    let failed = |text: String| Stop::Failed(Kind::Refused, format!("{}: {text}", source(file)));
    let mut bytes = Vec::new();
    let read = if file == Path::new("-") {
        let read = io::stdin()
            .lock()
            .take(MAX_LIST + 1)
            .read_to_end(&mut bytes);
        read.map(|_| Duration::ZERO)
    } else {
        fs::File::open(file).and_then(|opened| {
            let written = opened.metadata()?.modified()?;
            opened.take(MAX_LIST + 1).read_to_end(&mut bytes)?;
            // What was written in the future was written now.
            Ok(written.elapsed().unwrap_or_default())
        })
    };
    let age = read.map_err(|error| failed(error.to_string()))?;
    if bytes.len() as u64 > MAX_LIST {
        return Err(failed(too_many()));
    }
    let text = String::from_utf8(bytes).map_err(|_| failed("it is no text".to_owned()))?;
    Ok((text, age))
}

fn too_many() -> String {
    format!("more than {MAX_RUNNING} jobs, which is the most that one call takes; nothing was sent")
}

/// Reads one job a line, `JOB` or `JOB RUN`.
fn running(text: &str) -> Result<BTreeMap<JobId, u32>, String> {
    if text.trim().is_empty() {
        return Err(
            "no job in it, and then all leases would end; --none says that there really are no jobs"
                .to_owned(),
        );
    }
    if !text.ends_with('\n') {
        return Err(
            "its last line has no end, so it may have been cut; nothing was sent".to_owned(),
        );
    }
    let mut running = BTreeMap::new();
    for (number, line) in (1..).zip(text.lines()) {
        let at = |why: String| format!("line {number}: {why}");
        let mut words = line.split_whitespace();
        let (job, run) = match (words.next(), words.next(), words.next()) {
            (None, ..) => continue,
            (Some(job), run, None) => (job, run.unwrap_or("0")),
            (Some(_), _, Some(_)) => {
                return Err(at(format!("'{line}' is no JOB or JOB RUN")));
            }
        };
        let job: JobId = job
            .parse()
            .map_err(|error: xman_common::name::BadName| at(error.to_string()))?;
        let run: u32 = run
            .parse()
            .map_err(|_| at(format!("'{run}' is no number of a run")))?;
        match running.entry(job) {
            Entry::Vacant(place) => {
                place.insert(run);
            }
            Entry::Occupied(known) if *known.get() == run => {}
            Entry::Occupied(known) => {
                return Err(at(format!(
                    "job {} is there twice, with run {} and run {run}",
                    known.key(),
                    known.get()
                )));
            }
        }
        if running.len() > MAX_RUNNING {
            return Err(too_many());
        }
    }
    Ok(running)
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use xman_common::protocol::LeaseState;

    use super::*;
    use crate::{
        args::{Cli, Command},
        lease::tests::lease_in,
    };

    fn jobs(jobs: &[(&str, u32)]) -> BTreeMap<JobId, u32> {
        let pairs = jobs.iter().map(|(job, run)| (job.parse().unwrap(), *run));
        pairs.collect()
    }

    #[test]
    fn a_list_has_one_job_a_line() {
        assert_eq!(running("4711\n"), Ok(jobs(&[("4711", 0)])));
        assert_eq!(
            running("4711 2\n\n  12[3].pbs01\t7 \n4711 2\r\n"),
            Ok(jobs(&[("4711", 2), ("12[3].pbs01", 7)]))
        );
    }

    #[test]
    fn a_list_that_could_be_another_one_is_not_believed() {
        for (text, word) in [
            ("", "--none"),
            (" \n\n", "--none"),
            ("4711\n47", "cut"),
            ("4711", "cut"),
            ("1\n4711 a\n", "line 2: 'a' is no number"),
            ("4711 -1\n", "no number"),
            ("4711 4294967296\n", "no number"),
            ("4711 0 RUNNING\n", "no JOB or JOB RUN"),
            ("a/b\n", "cannot hold '/'"),
            ("ř\n", "cannot hold"),
            ("4711 0\n4711 1\n", "line 2: job 4711 is there twice"),
        ] {
            let error = running(text).unwrap_err();
            assert!(error.contains(word), "{text:?}: {error}");
        }
        let most: String = (0..MAX_RUNNING).map(|n| format!("{n}\n")).collect();
        assert_eq!(running(&most).unwrap().len(), MAX_RUNNING);
        assert!(running(&format!("{most}x\n")).is_err());
    }

    #[test]
    fn only_leases_of_this_cluster_older_than_the_list_and_not_in_it_are_gone() {
        let row = |key: &str, began_ms| LeaseRow {
            key: key.parse().unwrap(),
            began_ms,
            ..lease_in("web", LeaseState::Active)
        };
        let reconcile = Reconcile {
            system: "slurm".parse().unwrap(),
            cluster: "grid".parse().unwrap(),
            running: jobs(&[("1", 0), ("2", 1), ("3", 1)]),
            age_ms: 100,
        };
        let rows = [
            row("slurm/grid/1/0", 0),
            row("slurm/grid/2/0", 0),
            row("slurm/grid/3/2", 0),
            row("slurm/grid/4/0", 0),
            row("slurm/grid/5/0", 900),
            row("slurm/grid/6/0", 899),
            row("slurm/other/4/0", 0),
            row("pbs/grid/4/0", 0),
        ];
        assert_eq!(
            keys(&gone(&reconcile, &rows, 1000)),
            ["slurm/grid/2/0", "slurm/grid/4/0", "slurm/grid/6/0"]
        );
    }

    #[test]
    fn a_file_is_as_old_as_it_is() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "4711\n").unwrap();
        let hour = Duration::from_secs(3600);
        let then = std::time::SystemTime::now() - hour;
        file.as_file().set_modified(then).unwrap();
        let (text, age) = read(file.path()).unwrap();
        assert_eq!(text, "4711\n");
        assert!(age >= hour && age < hour * 2, "{age:?}");
        let later = std::time::SystemTime::now() + hour;
        file.as_file().set_modified(later).unwrap();
        assert_eq!(read(file.path()).unwrap().1, Duration::ZERO);
        assert!(read(Path::new("/nonexistent/x")).is_err());
        assert!(read(Path::new("/")).is_err());
        assert!(matches!(
            read(Path::new("/dev/zero")),
            Err(Stop::Failed(Kind::Refused, why)) if why.contains("more than")
        ));
    }

    #[test]
    fn the_cluster_and_the_list_are_read() {
        let read = |line: &[&str]| {
            let words = [&["rxm", "reconcile"], line].concat();
            let Command::Reconcile(args) = Cli::try_parse_from(words).ok()?.command else {
                panic!("no reconcile")
            };
            Some(args)
        };
        let args = read(&["slurm/grid"]).unwrap();
        assert_eq!(args.cluster.0, "slurm".parse().unwrap());
        assert_eq!(args.cluster.1, "grid".parse().unwrap());
        assert_eq!(args.file, Path::new("-"));
        assert!(!args.none);
        assert!(read(&["slurm/grid", "--none"]).unwrap().none);
        assert_eq!(
            read(&["slurm/grid", "x", "--age", "2m"]).unwrap().age,
            Some(Duration::from_secs(120))
        );
        for bad in [
            &[][..],
            &["slurm"],
            &["slurm/"],
            &["slurm/grid/1"],
            &["Slurm/grid"],
            &["slurm/grid", "x", "--none"],
        ] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }
}
