//! Work that outlives its caller: found again by its id, followed by whoever may, given up on request.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use tokio::sync::watch;
use uuid::Uuid;
use xman_common::protocol::{Code, Fault, JobRow, JobState, Progress};

use crate::{
    clock::now_ms,
    hypervisor::Facts,
    store::{Store, StoreError},
};

/// What the store says of jobs that an xmand left behind when it ended.
pub(crate) const LEFT_BEHIND: &str = "xmand ended in the middle and does not know what came of it; look for the domain on both hosts";

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
