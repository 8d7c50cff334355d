//! What Slurm says: the environment of its prologs and epilogs, the list of nodes to power up, the tables of squeue and sinfo.
//! Reading alone; no input or output happens here.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;
use xman_client::{HostSet, name::HostName};

use crate::{
    hook::Hook,
    intent::{BadCall, Job, number},
};

/// The most jobs that are looked at: Slurm's own MaxJobCount is 10,000.
const MAX_JOBS: usize = 200_000;
/// The most a job's name or reason adds to a line: longer ones are cut by Slurm.
const MAX_LINE: usize = 256 * 1024;

/// Returns the job that a prolog or epilog is called for.
pub(crate) fn job(hook: Hook, env: &BTreeMap<String, String>) -> Result<Job, BadCall> {
    let there = |name: &str| env.get(name).filter(|value| !value.is_empty());
    let need = |name: &'static str| {
        there(name)
            .cloned()
            .ok_or(BadCall::Missing(name, "a prolog or epilog of Slurm"))
    };
    let id = need("SLURM_JOB_ID")?;
    number("SLURM_JOB_ID", &id)?;
    let run = match there("SLURM_JOB_RESTART_COUNT") {
        Some(text) => number("SLURM_JOB_RESTART_COUNT", text)?,
        None => 0,
    };
    let is_on_node = matches!(hook, Hook::SlurmProlog | Hook::SlurmEpilog);
    let nodes = match there("SLURM_JOB_NODELIST") {
        _ if is_on_node => need("SLURMD_NODENAME")?,
        Some(nodes) => nodes.clone(),
        None => need("SLURM_NODELIST")?,
    };
    Ok(Job {
        id,
        run,
        nodes,
        user: there("SLURM_JOB_USER").cloned(),
        cluster: there("SLURM_CLUSTER_NAME").cloned(),
    })
}

/// What ResumeProgram finds in SLURM_RESUME_FILE; all that is needed of it.
#[derive(Debug, Deserialize)]
struct ResumeFile {
    all_nodes_resume: String,
}

/// Returns the nodes to power up: those of the resume file, or of the argument where there is none or it cannot be read.
pub(crate) fn nodes_to_resume(
    file: Option<&str>,
    argument: &str,
) -> Result<Vec<HostName>, BadCall> {
    let told = file
        .and_then(|text| serde_json::from_str::<ResumeFile>(text).ok())
        .map(|file| file.all_nodes_resume)
        .filter(|nodes| !nodes.is_empty());
    let nodes = HostSet::nodes(told.as_deref().unwrap_or(argument))?;
    if nodes.is_empty() {
        return Err(BadCall::NoNodes);
    }
    Ok(nodes)
}

/// What `squeue` is asked for: a field's end is `|`, which neither numbers, states, users nor node sets hold; the list of nodes is last.
/// 22.05 pads a field to its size and cuts what is longer, hence the sizes.
pub(crate) const SQUEUE: [&str; 5] = [
    "--noheader",
    "--all",
    "--states=PENDING,CONFIGURING,RUNNING,SUSPENDED,COMPLETING,STOPPED,SIGNALING,STAGE_OUT,RESIZING",
    "--array-unique",
    "--Format=JobID:20|,State:24|,RestartCnt:12|,UserName:64|,NodeList:32768|",
];
/// What `sinfo` is asked for.
pub(crate) const SINFO: [&str; 4] = ["--noheader", "--Node", "--all", "--format=%N|%T|"];

/// A job in Slurm's queue.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Queued {
    pub(crate) id: u32,
    pub(crate) state: State,
    pub(crate) run: u32,
    pub(crate) user: String,
    pub(crate) nodes: Vec<HostName>,
}

/// A job's state, as far as it matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Running,
    Suspended,
    /// It has nodes, and its prolog or epilog may be running.
    Between,
    /// It has none.
    Pending,
}

/// Why a table of Slurm's cannot be believed. Then nothing is done: half a list would end the leases of the other half.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadTable {
    #[error("line {0} has other fields than were asked for")]
    Fields(usize),
    #[error("line {line}: {reason}")]
    Wrong { line: usize, reason: String },
    #[error("that is more than {MAX_JOBS} lines")]
    TooMany,
}

fn fields<const N: usize>(at: usize, line: &str) -> Result<[&str; N], BadTable> {
    if line.len() > MAX_LINE {
        return Err(BadTable::Fields(at));
    }
    let mut parts = line.split('|').map(str::trim);
    let mut found = [""; N];
    for field in &mut found {
        *field = parts.next().ok_or(BadTable::Fields(at))?;
    }
    match (parts.next(), parts.next()) {
        (Some(""), None) => Ok(found),
        (Some(_) | None, _) => Err(BadTable::Fields(at)),
    }
}

/// Reads what `squeue` said.
pub(crate) fn queue(text: &str) -> Result<Vec<Queued>, BadTable> {
    let mut jobs = Vec::new();
    for (at, line) in text.lines().enumerate() {
        let at = at + 1;
        if line.trim().is_empty() {
            continue;
        }
        if jobs.len() >= MAX_JOBS {
            return Err(BadTable::TooMany);
        }
        let [id, state, run, user, nodes] = fields(at, line)?;
        let wrong = |reason: String| BadTable::Wrong { line: at, reason };
        let state = match state {
            "RUNNING" | "STOPPED" | "SIGNALING" => State::Running,
            "SUSPENDED" => State::Suspended,
            "PENDING" => State::Pending,
            _ => State::Between,
        };
        jobs.push(Queued {
            id: number("JobID", id).map_err(|error| wrong(error.to_string()))?,
            state,
            run: number("RestartCnt", run).map_err(|error| wrong(error.to_string()))?,
            user: user.to_owned(),
            nodes: HostSet::nodes(nodes).map_err(|error| wrong(error.to_string()))?,
        });
    }
    Ok(jobs)
}

/// Reads what `sinfo` said: the nodes that do not answer, and are not DOWN or powered down for that or another reason.
pub(crate) fn silent_nodes(text: &str) -> Result<BTreeSet<String>, BadTable> {
    let mut silent = BTreeSet::new();
    for (at, line) in text.lines().enumerate() {
        let at = at + 1;
        if line.trim().is_empty() {
            continue;
        }
        if at > MAX_JOBS {
            return Err(BadTable::TooMany);
        }
        let [node, state] = fields(at, line)?;
        // `*`: not responding; `~`, `#`, `%`, `$`, `@`, `!`, `^` are stages of power saving, reboot and maintenance.
        let answers = !state.ends_with('*');
        if answers || state.starts_with("down") {
            continue;
        }
        silent.insert(node.to_owned());
    }
    Ok(silent)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn env(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect()
    }

    /// What slurmd 22.05 sets, as far as it is read.
    const NODE: &[(&str, &str)] = &[
        ("SLURMD_NODENAME", "cloud2"),
        ("SLURM_CLUSTER_NAME", "grid"),
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_JOBID", "4711"),
        ("SLURM_JOB_USER", "alice"),
        ("SLURM_JOB_RESTART_COUNT", "3"),
        ("SLURM_NODELIST", "cloud[1-2]"),
        ("SLURM_JOB_COMMENT", "$(reboot)\n; rm -rf /"),
        ("SLURM_SCRIPT_CONTEXT", "prolog_slurmd"),
    ];
    /// And what slurmctld does.
    const CONTROLLER: &[(&str, &str)] = &[
        ("SLURM_CLUSTER_NAME", "grid"),
        ("SLURM_JOB_ID", "4711"),
        ("SLURM_JOB_USER", "alice"),
        ("SLURM_JOB_NODELIST", "cloud[1-2]"),
        ("SLURM_JOB_RESTART_COUNT", "3"),
        ("SLURM_SCRIPT_CONTEXT", "prolog_slurmctld"),
    ];

    #[test]
    fn on_a_node_the_job_is_the_nodes_and_on_the_controller_all_of_it() {
        for (hook, variables, nodes) in [
            (Hook::SlurmProlog, NODE, "cloud2"),
            (Hook::SlurmEpilog, NODE, "cloud2"),
            (Hook::SlurmPrologController, CONTROLLER, "cloud[1-2]"),
            (Hook::SlurmEpilogController, CONTROLLER, "cloud[1-2]"),
            (Hook::SlurmEpilogController, NODE, "cloud[1-2]"),
        ] {
            let job = job(hook, &env(variables)).unwrap();
            assert_eq!(
                (job.id.as_str(), job.run, job.nodes.as_str()),
                ("4711", 3, nodes),
                "{hook:?}"
            );
            assert_eq!(job.user.as_deref(), Some("alice"));
            assert_eq!(job.cluster.as_deref(), Some("grid"));
        }
    }

    #[test]
    fn an_environment_that_is_not_slurms_is_refused() {
        let without = |name: &str| {
            let mut env = env(NODE);
            env.remove(name);
            job(Hook::SlurmProlog, &env)
        };
        assert_eq!(
            without("SLURM_JOB_ID").unwrap_err(),
            BadCall::Missing("SLURM_JOB_ID", "a prolog or epilog of Slurm")
        );
        assert!(without("SLURMD_NODENAME").is_err());
        assert_eq!(without("SLURM_JOB_RESTART_COUNT").unwrap().run, 0);
        for (name, value) in [
            ("SLURM_JOB_ID", "4711/0"),
            ("SLURM_JOB_ID", ""),
            ("SLURM_JOB_RESTART_COUNT", "-1"),
        ] {
            let mut env = env(NODE);
            env.insert(name.to_owned(), value.to_owned());
            assert!(job(Hook::SlurmProlog, &env).is_err(), "{name}={value}");
        }
    }

    #[test]
    fn the_resume_file_goes_before_the_argument() {
        let names = |file, argument| {
            nodes_to_resume(file, argument).map(|nodes| {
                nodes
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(" ")
            })
        };
        let file = r#"{"all_nodes_resume": "cloud[1-2]", "jobs": [{"job_id": 7, "extra": null}]}"#;
        assert_eq!(names(Some(file), "cloud9").unwrap(), "cloud1 cloud2");
        for bad in [
            "",
            "{",
            "[]",
            r#"{"all_nodes_resume": ""}"#,
            r#"{"all_nodes_resume": 7}"#,
        ] {
            assert_eq!(names(Some(bad), "cloud9").unwrap(), "cloud9", "{bad}");
        }
        assert_eq!(names(None, "cloud[3,5]").unwrap(), "cloud3 cloud5");
        assert!(names(None, "").is_err());
        assert!(names(None, "cloud[1-999999999]").is_err());
    }

    #[test]
    fn the_queue_is_read_as_squeue_writes_it() {
        let text = "\
1                   |RUNNING                 |0           |alice                                                           |cloud[1-2]   |
2                   |SUSPENDED               |1           |bob                                                             |cloud1       |
3                   |PENDING                 |0           |bob                                                             |             |
4                   |COMPLETING              |0           |bob                                                             |cloud3       |

";
        let jobs = queue(text).unwrap();
        let short: Vec<_> = jobs
            .iter()
            .map(|job| (job.id, job.state, job.run, job.nodes.len()))
            .collect();
        assert_eq!(
            short,
            [
                (1, State::Running, 0, 2),
                (2, State::Suspended, 1, 1),
                (3, State::Pending, 0, 0),
                (4, State::Between, 0, 1),
            ]
        );
        for bad in [
            "1|RUNNING|0|alice|cloud1",
            "1|RUNNING|0|alice|cloud1|x|",
            "x|RUNNING|0|alice|cloud1|",
            "1|RUNNING||alice|cloud1|",
            "1|RUNNING|0|alice|cloud[1-|",
            "slurm_load_jobs error: Unable to contact slurm controller",
        ] {
            assert!(queue(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn silent_nodes_are_those_with_a_star_that_are_not_down() {
        let text = "cloud1   |idle*   |\ncloud2|allocated|\ncloud3|down*|\ncloud4|mixed*|\ncloud1|idle*|\ncloud5|idle~|\n";
        let silent: Vec<_> = silent_nodes(text).unwrap().into_iter().collect();
        assert_eq!(silent, ["cloud1", "cloud4"]);
        assert!(silent_nodes("cloud1").is_err());
    }

    proptest! {
        #[test]
        fn no_text_makes_the_readers_panic(text in "(?s).{0,300}") {
            let _ = queue(&text);
            let _ = silent_nodes(&text);
            let _ = nodes_to_resume(Some(&text), &text);
            let _ = job(Hook::SlurmProlog, &env(&[("SLURM_JOB_ID", &text), ("SLURMD_NODENAME", &text)]));
        }

        #[test]
        fn what_stands_in_a_row_is_found_again(id in 1u32.., run in any::<u32>(), node in "[a-z]{1,8}[0-9]{0,3}") {
            let line = format!("{id:<20}|{:<24}|{run:<12}|{:<64}|{node:<300}|\n", "RUNNING", "alice");
            let jobs = queue(&line).unwrap();
            prop_assert_eq!(jobs.len(), 1);
            prop_assert_eq!((jobs[0].id, jobs[0].run), (id, run));
            prop_assert_eq!(jobs[0].nodes[0].as_str(), node);
        }
    }
}
