//! What Grid Engine, PBS and Torque say of a job, by argument. Reading alone.
//!
//! Grid Engine and Torque do not tell one run of a job from the next. There a run's number is the second in which it began: the end of a run is later than
//! its begin, so an end names all runs up to then and none that comes after.

use std::ffi::OsString;

use crate::intent::{BadCall, Job, number};

/// What Grid Engine writes where a job is no array.
const NO_TASK: &str = "undefined";

/// Returns a job of Grid Engine's.
pub(crate) fn sge(
    host: &str,
    owner: Option<&str>,
    job: &str,
    task: Option<&str>,
    run: u32,
) -> Result<Job, BadCall> {
    Ok(Job {
        id: sge_id(job, task)?,
        run,
        nodes: host.to_owned(),
        user: owner.map(str::to_owned),
        cluster: None,
    })
}

/// Returns what leases call a job of Grid Engine's: `4711`, or `4711.3` for a task of an array.
pub(crate) fn sge_id(job: &str, task: Option<&str>) -> Result<String, BadCall> {
    number("the job's id", job)?;
    match task {
        None | Some(NO_TASK | "" | "0") => Ok(job.to_owned()),
        Some(task) => {
            number("the task's id", task)?;
            Ok(format!("{job}.{task}"))
        }
    }
}

/// Returns a job of Torque's: the arguments of prologue and epilogue begin with its id, its user and the user's group.
pub(crate) fn torque(arguments: &[OsString], node: &str, run: u32) -> Result<Job, BadCall> {
    let word = |at: usize, what: &'static str| {
        let word = arguments
            .get(at)
            .ok_or(BadCall::Missing(what, "a prologue or epilogue of Torque"))?;
        word.to_str()
            .map(str::to_owned)
            .ok_or_else(|| BadCall::Other(format!("{what} is not UTF-8")))
    };
    Ok(Job {
        id: word(0, "argument 1, the job's id,")?,
        run,
        nodes: node.to_owned(),
        user: Some(word(1, "argument 2, the user,")?),
        cluster: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grid_engine_names_jobs_and_tasks() {
        for (job, task, id) in [
            ("4711", None, "4711"),
            ("4711", Some("undefined"), "4711"),
            ("4711", Some("3"), "4711.3"),
        ] {
            let found = sge("grid-1", Some("alice"), job, task, 17).unwrap();
            assert_eq!((found.id.as_str(), found.run), (id, 17));
        }
        for (job, task) in [("", None), ("x", None), ("4711", Some("x")), ("1/2", None)] {
            assert!(sge("grid-1", None, job, task, 0).is_err(), "{job} {task:?}");
        }
    }

    #[test]
    fn torque_names_jobs_by_position_and_whatever_else_it_says_is_not_looked_at() {
        let words = |words: &[&str]| words.iter().map(OsString::from).collect::<Vec<_>>();
        let said = words(&[
            "12.pbs01", "alice", "users", "--help", "nodes=1", "batch", "x",
        ]);
        let job = torque(&said, "grid-1", 5).unwrap();
        assert_eq!(
            (job.id.as_str(), job.user.as_deref()),
            ("12.pbs01", Some("alice"))
        );
        assert!(torque(&words(&[]), "n", 0).is_err());
        assert!(torque(&words(&["12.pbs01"]), "n", 0).is_err());
        use std::os::unix::ffi::OsStringExt as _;
        let bytes = vec![OsString::from("1"), OsString::from_vec(vec![0xff])];
        assert!(torque(&bytes, "n", 0).is_err());
    }
}
