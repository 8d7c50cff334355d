//! Work that outlives its caller: found again by its id, followed by whoever may, given up on request.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::sync::{mpsc, watch};
use uuid::Uuid;
use xman_common::{
    name::DomainRef,
    protocol::{Code, Fault, JobRow, JobState, Progress, Verb},
};
use xman_policy::{Grant, Subject, Verdict};

use crate::{
    caller::Piece,
    clock::now_ms,
    hypervisor::{Facts, Target},
    store::{Store, StoreError},
    work::Work,
};

/// What the store says of jobs that an xmand left behind when it ended.
pub(crate) const LEFT_BEHIND: &str = "xmand ended in the middle and does not know what came of it; look at the domain, and for one that was moved on both hosts";

/// A job that runs in this process.
#[derive(Clone, Debug)]
pub(crate) struct Running {
    /// As it was when it began.
    pub(crate) row: JobRow,
    /// The domain it works on.
    pub(crate) facts: Facts,
    /// How far it is.
    pub(crate) progress: watch::Receiver<Option<Progress>>,
    /// How it ended.
    pub(crate) ended: watch::Receiver<Option<JobRow>>,
}

impl Running {
    /// What libvirt does to its domain before it has begun is somebody else's work, and not to be given up for this one.
    ///
    /// # Errors
    /// `Busy` where it still waits for its turn.
    pub(crate) fn has_begun(&self) -> Result<(), Fault> {
        if self.progress.borrow().is_some() {
            return Ok(());
        }
        Err(Fault::new(
            Code::Busy,
            format!(
                "the job waits for other work on '{}' and has not begun; ask again in a moment",
                self.row.domain
            ),
        ))
    }
}

/// The jobs of this process; those that have ended are in the store.
#[derive(Debug, Default)]
pub(crate) struct Jobs(Mutex<HashMap<Uuid, Running>>);

impl Jobs {
    /// Carries out `work` as the job that `row` describes, and writes down its beginning and end.
    pub(crate) async fn run<W: Future<Output = Result<(), Fault>>>(
        &self,
        store: &Store,
        row: JobRow,
        facts: Facts,
        work: impl FnOnce(watch::Sender<Option<Progress>>) -> W,
    ) -> Result<JobRow, Fault> {
        if !store.put_job(&row).await.map_err(|error| error.before())? {
            return Err(Fault::new(
                Code::Conflict,
                "the id of this call belongs to somebody else's job; every new request takes a new id",
            ));
        }
        let (progress_sender, progress) = watch::channel(None);
        let (ended_sender, ended) = watch::channel(None);
        self.running().insert(
            row.id,
            Running {
                row: row.clone(),
                facts,
                progress,
                ended,
            },
        );
        let outcome = work(progress_sender).await;
        let (state, result) = match &outcome {
            Ok(()) => (JobState::Done, "done".to_owned()),
            Err(fault) if fault.code == Code::Unknown => (JobState::Unknown, fault.message.clone()),
            Err(fault) => (JobState::Failed, fault.message.clone()),
        };
        let row = JobRow {
            state,
            result,
            ended_ms: Some(now_ms()),
            ..row
        };
        if let Err(error) = store.put_job(&row).await {
            tracing::error!(%error, job = %row.id, "a job's end could not be written down");
        }
        ended_sender.send_replace(Some(row.clone()));
        self.running().remove(&row.id);
        outcome.map(|()| row)
    }

    /// Finds a job that runs now.
    pub(crate) fn find(&self, id: Uuid) -> Option<Running> {
        self.running().get(&id).cloned()
    }

    /// Returns all jobs that are remembered, with the progress of those that run.
    pub(crate) async fn all(&self, store: &Store) -> Result<Vec<JobRow>, StoreError> {
        let mut rows = store.jobs().await?;
        let running = self.running();
        for row in &mut rows {
            row.progress = running
                .get(&row.id)
                .and_then(|job| job.progress.borrow().clone());
        }
        Ok(rows)
    }

    fn running(&self) -> std::sync::MutexGuard<'_, HashMap<Uuid, Running>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether a verb's work can take long, and is waited for as long as it takes.
pub(crate) fn is_job(verb: Verb) -> bool {
    matches!(verb, Verb::Migrate | Verb::Save | Verb::SaveTo)
}

/// Carries out a call as a job: its caller may hang up, others may follow it.
pub(crate) async fn begin<W: Future<Output = Result<(), Fault>>>(
    work: &Work,
    verb: Verb,
    detail: String,
    doing: impl FnOnce(Target, watch::Sender<Option<Progress>>) -> W,
) -> Result<JobRow, Fault> {
    let host = &work.host;
    let target = work.target(verb)?;
    let facts = target.facts.clone();
    let row = JobRow {
        id: work.id,
        principal: work.caller.person.principal.clone(),
        verb: verb.to_string(),
        domain: facts.name.clone(),
        uuid: facts.uuid,
        detail,
        state: JobState::Running,
        result: String::new(),
        began_ms: now_ms(),
        ended_ms: None,
        progress: None,
    };
    let done = host.jobs.run(&host.store, row, facts, |progress| async {
        let watched = progress.subscribe();
        let doing = doing(target, progress);
        tokio::pin!(doing);
        tokio::select! {
            done = &mut doing => done,
            () = pass_on(watched, work) => doing.await,
        }
    });
    done.await
}

/// Sends progress as long as somebody listens; a caller that hung up is not waited for.
async fn pass_on(mut progress: watch::Receiver<Option<Progress>>, work: &Work) {
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        if let Some(now) = now
            && let Err(mpsc::error::TrySendError::Closed(_)) =
                work.outbox.try_send(Piece::Progress(now))
        {
            return;
        }
    }
}

pub(crate) async fn follow(grant: &Grant, id: Uuid, work: &Work) -> Result<JobRow, Fault> {
    let host = &work.host;
    let may_see = |job: &JobRow| may_see(grant, work, Verb::JobWait, job);
    if let Some(mut job) = host.jobs.find(id).filter(|job| may_see(&job.row)) {
        let is_own = is_beginner(work, &job.row);
        let right_ends = async {
            if is_own || grant.administrator() {
                std::future::pending::<()>().await;
            }
            host.right_ends(&work.caller, Verb::JobWait, Some(&job.facts))
                .await
        };
        let ended = tokio::select! {
            ended = job.ended.wait_for(Option::is_some) => ended.ok().and_then(|row| row.clone()),
            () = async { pass_on(job.progress, work).await; std::future::pending().await } => None,
            why = right_ends => return Err(why),
        };
        if let Some(row) = ended {
            return Ok(row);
        }
    }
    let jobs = host
        .jobs
        .all(&host.store)
        .await
        .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
    jobs.into_iter()
        .find(|job| job.id == id && may_see(job))
        .ok_or_else(|| no_such_job(id))
}

/// A job is its beginner's, the administrators', and theirs who may do the verb to its domain.
pub(crate) fn may_see(grant: &Grant, work: &Work, verb: Verb, job: &JobRow) -> bool {
    // The row does not say which hypervisor has it: with two of one UUID the caller must be allowed it on both.
    let may = || {
        let domain = DomainRef::Uuid(job.uuid);
        let candidates = work.host.hypervisors.candidates(&domain, None);
        !candidates.is_empty()
            && candidates.iter().all(|facts| {
                let verdict = work
                    .host
                    .may(&work.caller, verb, Subject::Domain(facts.into()));
                matches!(verdict, Verdict::Allow(_))
            })
    };
    grant.administrator() || is_beginner(work, job) || may()
}

pub(crate) fn is_beginner(work: &Work, job: &JobRow) -> bool {
    job.principal == work.caller.person.principal
}

pub(crate) fn no_such_job(id: Uuid) -> Fault {
    Fault::new(
        Code::NotFound,
        format!("there is no job {id} here that is yours; `rxm job list` shows those there are"),
    )
}

#[cfg(test)]
mod tests {
    use xman_common::protocol::{DomainState, Metadata};

    use super::*;

    fn facts() -> Facts {
        Facts {
            uuid: Uuid::from_u128(7),
            name: "web".parse().unwrap(),
            hypervisor: 0,
            uri: "test:///default".into(),
            state: DomainState::Running,
            metadata: std::sync::Arc::new(Ok(Metadata::default())),
            lease: None,
            revision: 1,
            stale: false,
        }
    }

    fn row(principal: &str) -> JobRow {
        JobRow {
            id: Uuid::from_u128(1),
            principal: principal.parse().unwrap(),
            verb: "migrate".to_owned(),
            domain: "web".parse().unwrap(),
            uuid: Uuid::from_u128(7),
            detail: String::new(),
            state: JobState::Running,
            result: String::new(),
            began_ms: now_ms(),
            ended_ms: None,
            progress: None,
        }
    }

    #[tokio::test]
    async fn a_job_is_not_replaced_by_another_principals_of_the_same_id() {
        let directory = tempfile::tempdir().unwrap();
        let (store, jobs) = (Store::open(directory.path()).unwrap(), Jobs::default());
        let first = jobs.run(&store, row("alice@EX"), facts(), async |_| {
            let second = jobs.run(&store, row("bob@EX"), facts(), async |_| Ok(()));
            assert_eq!(second.await.unwrap_err().code, Code::Conflict);
            let running = jobs.find(Uuid::from_u128(1)).unwrap();
            assert_eq!(running.row.principal.as_str(), "alice@EX");
            Ok(())
        });
        assert_eq!(first.await.unwrap().state, JobState::Done);
        let kept = jobs.all(&store).await.unwrap();
        assert_eq!(kept.len(), 1);
        assert!(
            kept.iter()
                .all(|job| job.principal.as_str() == "alice@EX" && job.state == JobState::Done)
        );
    }
}
