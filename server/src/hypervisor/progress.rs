//! libvirt's long work on a domain: how far it is, and how it is given up. A migration and a save are the same to both.

use std::{
    convert::Infallible,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::protocol::{Code, Fault, Progress};

use super::{
    Hypervisors, Target,
    connections::{Call, Class, Hypervisor},
    faults,
    ffi::{self, Job},
    readings,
    verbs::Visit,
};

/// How often libvirt is asked how far it is.
const LOOK: Duration = Duration::from_millis(500);
/// How long an answer to that may take.
const LOOK_LIMIT: Duration = Duration::from_secs(5);

impl Hypervisors {
    /// Gives up a migration or a save under way; it then ends as failed, and the domain goes on where it was.
    pub(crate) async fn give_up(&self, target: Target, deadline: Instant) -> Result<(), Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            let can_end = match ffi::job(&visit.domain) {
                Ok(job) => is_under_way(&job) && can_be_given_up(job.operation),
                Err(error) => matches!(error.code().to_raw(), sys::VIR_ERR_NO_SUPPORT),
            };
            if !can_end {
                return Err(Fault::new(
                    Code::Conflict,
                    format!(
                        "'{}' is neither on its way to another host nor being saved at this moment; `rxm job list` shows what is under way",
                        visit.facts.name
                    ),
                ));
            }
            call.begin()?;
            visit.ok(ffi::abort_job(&visit.domain))
        };
        hypervisor
            .run(Class::Urgent, Vec::new(), Some(deadline), work)
            .await
    }
}

/// Says how far libvirt's work on a domain is, until it is dropped. While it is under way, `also` gets the domain at each look.
pub(super) async fn report(
    hypervisor: &Arc<Hypervisor>,
    target: &Target,
    also: impl FnMut(&Domain) + Send + 'static,
    progress: &watch::Sender<Option<Progress>>,
) -> Infallible {
    let uuid = target.facts.uuid;
    let also = Arc::new(Mutex::new(also));
    let mut percent = 0;
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let also = Arc::clone(&also);
        let look = move |call: &Call| {
            let failed = |error: Error| call.fault(&error);
            let Some(domain) = readings::find(&call.connection, uuid).map_err(failed)? else {
                return Err(faults::vanished());
            };
            let job = ffi::job(&domain).map_err(failed)?;
            if is_under_way(&job) {
                also.lock().unwrap_or_else(PoisonError::into_inner)(&domain);
            }
            Ok(job)
        };
        let limit = Some(Instant::now() + LOOK_LIMIT);
        let looked = hypervisor.run(Class::Urgent, Vec::new(), limit, look);
        if let Ok(job) = looked.await
            && is_under_way(&job)
        {
            let now = describe(&job, percent);
            percent = now.percent;
            progress.send_replace(Some(now));
        }
    }
}

/// Whether libvirt works on it now, rather than having done so.
pub(super) fn is_under_way(job: &Job) -> bool {
    matches!(
        u32::try_from(job.kind),
        Ok(sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED)
    )
}

/// Whether it is work that somebody asked xmand for: a backup or a snapshot of somebody else's is not ours to end.
fn can_be_given_up(operation: u64) -> bool {
    [
        sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
        sys::VIR_DOMAIN_JOB_OPERATION_SAVE,
    ]
    .iter()
    .any(|known| u64::from(*known) == operation)
}

/// Progress as people see it. A guest that writes makes more to do, but the percentage never goes back.
fn describe(job: &Job, percent_before: u8) -> Progress {
    let dirtied = job.dirty_rate.saturating_mul(job.page_size);
    // Not by what was processed: empty pages need no copying, and what has changed is copied twice.
    let gone = u128::from(job.total.saturating_sub(job.remaining));
    let percent = u8::try_from(gone * 100 / u128::from(job.total.max(1))).unwrap_or(100);
    let saves = job.operation == u64::from(sys::VIR_DOMAIN_JOB_OPERATION_SAVE);
    let phase = match (job.total, job.iteration) {
        (0, _) => "setting up".to_owned(),
        (_, _) if saves => "writing memory".to_owned(),
        (_, 0 | 1) => "copying memory".to_owned(),
        (_, pass) => format!("copying what has changed, pass {pass}"),
    };
    Progress {
        phase,
        percent: percent.min(99).max(percent_before),
        done_bytes: job.processed,
        remaining_bytes: job.remaining,
        total_bytes: job.total,
        rate: job.rate,
        elapsed_ms: job.elapsed_ms,
        // A guest that writes as fast as it is copied is never done; no time is better than a wrong one.
        eta_ms: job
            .rate
            .checked_sub(dirtied)
            .filter(|gain| *gain > 0)
            .map(|gain| job.remaining.saturating_mul(1000) / gain),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_never_goes_back_and_promises_no_end_that_does_not_come() {
        let job = Job {
            kind: 2,
            total: 1000,
            processed: 400,
            remaining: 600,
            rate: 100,
            dirty_rate: 1,
            page_size: 40,
            iteration: 1,
            elapsed_ms: 5,
            operation: 5,
        };
        let first = describe(&job, 0);
        assert_eq!(
            (first.percent, first.phase.as_str(), first.eta_ms),
            (40, "copying memory", Some(10_000))
        );
        let busy = describe(
            &Job {
                remaining: 900,
                iteration: 3,
                dirty_rate: 3,
                ..job
            },
            first.percent,
        );
        assert_eq!(
            (busy.percent, busy.phase.as_str(), busy.eta_ms),
            (40, "copying what has changed, pass 3", None)
        );
        assert_eq!(
            describe(
                &Job {
                    remaining: 0,
                    ..job
                },
                0
            )
            .percent,
            99
        );
        assert_eq!(describe(&Job::default(), 0).phase, "setting up");
        let operation = u64::from(sys::VIR_DOMAIN_JOB_OPERATION_SAVE);
        assert_eq!(
            describe(&Job { operation, ..job }, 0).phase,
            "writing memory"
        );
    }

    #[test]
    fn only_moves_and_saves_are_ours_to_give_up() {
        for ours in [
            sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT,
            sys::VIR_DOMAIN_JOB_OPERATION_SAVE,
        ] {
            assert!(can_be_given_up(ours.into()));
        }
        for other in [
            sys::VIR_DOMAIN_JOB_OPERATION_UNKNOWN,
            sys::VIR_DOMAIN_JOB_OPERATION_BACKUP,
            sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_IN,
            sys::VIR_DOMAIN_JOB_OPERATION_SNAPSHOT,
        ] {
            assert!(!can_be_given_up(other.into()));
        }
    }
}
