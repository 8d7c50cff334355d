//! Live migration, peer to peer: the two libvirts move the guest, this host watches and says where it is in the end.

use std::{
    convert::Infallible,
    sync::Arc,
    thread,
    time::{Duration, Instant as Moment},
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval},
};
use virt::{domain::MigrateParameters, error::Error};
use virt_sys as sys;
use xman_common::protocol::{Code, DomainState, Fault, Progress};

use super::{
    Hypervisors, Target,
    connections::{Call, Class, Hypervisor},
    faults,
    ffi::{self, Job},
    lanes::Key,
    readings,
    sense::{Act, sense},
    verbs::Visit,
};

/// How long a migration waits for its domain's lane.
const LANE_WAIT: Duration = Duration::from_secs(30);
/// How often libvirt is asked how far it is.
const LOOK: Duration = Duration::from_millis(500);
/// How long an answer to that may take.
const LOOK_LIMIT: Duration = Duration::from_secs(5);
/// How often the limit on downtime is tried: libvirt takes it only once the migration is under way.
const DOWNTIME_TRIES: u32 = 10;
/// After a failure libvirt lets the guest run on by itself; this long it is given.
const RESUME_TIME: Duration = Duration::from_secs(3);
const RESUME_LOOK: Duration = Duration::from_millis(200);

impl Hypervisors {
    /// Moves a running domain to the libvirt at `uri`, which this host's libvirt dials, and ends when that has ended.
    /// `bandwidth` is in MiB/s, `downtime_ms` in milliseconds.
    ///
    /// # Errors
    /// With the domain still at home: `Refused`, and what a change can be refused for. `Unknown` where it is not known where it runs.
    pub(crate) async fn migrate(
        &self,
        target: Target,
        uri: String,
        bandwidth: Option<u64>,
        downtime_ms: Option<u64>,
        progress: watch::Sender<Option<Progress>>,
    ) -> Result<(), Fault> {
        if uri.contains('\0') {
            return Err(Fault::new(
                Code::BadRequest,
                "the destination's URI holds a NUL",
            ));
        }
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let lane = hypervisor
            .lanes
            .take(Key::Domain(target.facts.uuid), Instant::now() + LANE_WAIT)
            .await?;
        lane.without_deadline();
        let (host, mover) = (Arc::clone(&hypervisor), target.clone());
        let running = hypervisor.run(Class::Move, vec![lane], None, move |call| {
            leave(call, &host, &mover, &uri, bandwidth)
        });
        tokio::select! {
            outcome = running => outcome,
            never = report(&hypervisor, &target, downtime_ms, &progress) => match never {},
        }
    }

    /// Gives up a migration under way; it then ends as failed, with the domain at home.
    pub(crate) async fn migrate_abort(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<(), Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            let outgoing = match ffi::job(&visit.domain) {
                Ok(job) => {
                    is_under_way(&job)
                        && job.operation == u64::from(sys::VIR_DOMAIN_JOB_OPERATION_MIGRATION_OUT)
                }
                Err(error) => matches!(error.code().to_raw(), sys::VIR_ERR_NO_SUPPORT),
            };
            if !outgoing {
                return Err(Fault::new(
                    Code::Conflict,
                    format!("'{}' is not on its way to another host", visit.facts.name),
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

fn leave(
    call: &Call,
    host: &Hypervisor,
    target: &Target,
    uri: &str,
    bandwidth: Option<u64>,
) -> Result<(), Fault> {
    let visit = Visit::new(call, host, target)?;
    let name = visit.facts.name.clone();
    sense(Act::Migrate, &name, visit.state)?;
    let hostname = visit.ok(call.connection.hostname())?;
    if uri == host.uri || is_here(uri, &hostname) {
        return Err(Fault::new(
            Code::Conflict,
            format!("'{name}' is on {hostname} already; choose another host"),
        ));
    }
    let persistent = visit.ok(visit.domain.is_persistent())?;
    let flags = flags(persistent, &visit.ok(call.connection.driver_type())?);
    call.begin()?;
    let parameters = MigrateParameters {
        bandwidth,
        ..MigrateParameters::default()
    };
    match visit.domain.migrate_to_uri3(Some(uri), parameters, flags) {
        Ok(()) => match visit.look() {
            Ok(Some(reading)) if reading.state.is_active() => Err(faults::unknown(&format!(
                "libvirt reports that '{name}' was moved, and it is {} here: look at both hosts",
                reading.state
            ))),
            Ok(_) => Ok(()),
            Err(error) => Err(faults::unknown(&format!(
                "libvirt reports that '{name}' was moved, and cannot be asked again ({})",
                faults::tidy(error.message())
            ))),
        },
        Err(error) => Err(stayed(&visit, call.fault(&error), &error)),
    }
}

/// Looks where a domain is after its migration failed, and says so.
fn stayed(visit: &Visit<'_>, fault: Fault, error: &Error) -> Fault {
    let name = &visit.facts.name;
    if !visit.call.connection.is_alive().unwrap_or(false) {
        return fault;
    }
    let until = Moment::now() + RESUME_TIME;
    let seen = loop {
        match visit.look() {
            Ok(Some(reading))
                if reading.state == DomainState::Paused
                    && visit.state != DomainState::Paused
                    && Moment::now() < until =>
            {
                thread::sleep(RESUME_LOOK);
            }
            seen => break seen,
        }
    };
    let why = faults::tidy(error.message());
    let code = if fault.code == Code::Unsupported {
        Code::Unsupported
    } else {
        Code::Refused
    };
    match seen {
        Ok(Some(reading))
            if reading.state == DomainState::Paused && visit.state != DomainState::Paused =>
        {
            Fault::new(
                code,
                format!(
                    "the migration failed ({why}); '{name}' is still here, but paused ({}): `rxm unpause {name}` once it is certain that \
                 it does not run at the destination",
                    reading.reason
                ),
            )
        }
        Ok(Some(reading)) if reading.state.is_active() => {
            let still = if reading.state == DomainState::Paused {
                "is still here, paused as before"
            } else {
                "still runs here"
            };
            Fault::new(
                code,
                format!("the migration failed; '{name}' {still}: {}", fault.message),
            )
        }
        Ok(_) => faults::unknown(&format!(
            "the migration failed ({why}), and '{name}' does not run here any more: look at the destination before starting it"
        )),
        Err(_) => faults::unknown(&format!(
            "the migration failed ({why}), and libvirt cannot be asked where '{name}' is"
        )),
    }
}

/// Says how far a migration is, until it is dropped.
async fn report(
    hypervisor: &Arc<Hypervisor>,
    target: &Target,
    downtime_ms: Option<u64>,
    progress: &watch::Sender<Option<Progress>>,
) -> Infallible {
    let uuid = target.facts.uuid;
    let mut wanted = downtime_ms;
    let mut tries = 0;
    let mut percent = 0;
    let mut looks = interval(LOOK);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        looks.tick().await;
        let downtime = wanted;
        let look = move |call: &Call| {
            let failed = |error: Error| call.fault(&error);
            let Some(domain) = readings::find(&call.connection, uuid).map_err(failed)? else {
                return Err(faults::vanished());
            };
            let job = ffi::job(&domain).map_err(failed)?;
            let limited = match downtime {
                Some(limit) if is_under_way(&job) => {
                    Some(domain.migrate_set_max_downtime(limit, 0).map_err(failed))
                }
                _ => None,
            };
            Ok((job, limited))
        };
        let Ok((job, limited)) = hypervisor
            .run(
                Class::Urgent,
                Vec::new(),
                Some(Instant::now() + LOOK_LIMIT),
                look,
            )
            .await
        else {
            continue;
        };
        match limited {
            Some(Ok(())) => wanted = None,
            Some(Err(fault)) => {
                tries += 1;
                if tries == DOWNTIME_TRIES {
                    tracing::warn!(
                        "'{}' migrates without its limit on downtime: {fault}",
                        target.facts.name
                    );
                    wanted = None;
                }
            }
            None => {}
        }
        if is_under_way(&job) {
            let now = describe(&job, percent);
            percent = now.percent;
            progress.send_replace(Some(now));
        }
    }
}

fn is_under_way(job: &Job) -> bool {
    matches!(
        u32::try_from(job.kind),
        Ok(sys::VIR_DOMAIN_JOB_BOUNDED | sys::VIR_DOMAIN_JOB_UNBOUNDED)
    )
}

/// Progress as people see it. A guest that writes makes more to do, but the percentage never goes back.
fn describe(job: &Job, percent_before: u8) -> Progress {
    let dirtied = job.dirty_rate.saturating_mul(job.page_size);
    // Not by what was processed: empty pages need no copying, and what has changed is copied twice.
    let gone = u128::from(job.total.saturating_sub(job.remaining));
    let percent = u8::try_from(gone * 100 / u128::from(job.total.max(1))).unwrap_or(100);
    let phase = match (job.total, job.iteration) {
        (0, _) => "setting up".to_owned(),
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

fn flags(persistent: bool, driver: &str) -> u32 {
    let mut flags = sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER;
    if persistent {
        flags |= sys::VIR_MIGRATE_PERSIST_DEST | sys::VIR_MIGRATE_UNDEFINE_SOURCE;
    }
    if driver == "QEMU" {
        // A disk that fails meanwhile: better to stay than to arrive with what was never written.
        flags |= sys::VIR_MIGRATE_ABORT_ON_ERROR;
    }
    flags
}

/// Whether the host in a libvirt URI is this one, as far as names tell; libvirt itself compares more.
fn is_here(uri: &str, hostname: &str) -> bool {
    let authority = uri.split_once("://").map_or("", |(_, rest)| {
        rest.split(['/', '?', '#']).next().unwrap_or_default()
    });
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(bracketed) => bracketed.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let own = hostname.trim_end_matches('.').to_ascii_lowercase();
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let loopback = host == "localhost" || host == "::1" || host.starts_with("127.");
    let named =
        host == own || (!(host.contains('.') && own.contains('.')) && short(&host) == short(&own));
    loopback || (!host.is_empty() && named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_known_by_its_names() {
        for here in [
            "qemu+tls://skirit80/system",
            "qemu+tls://root@Skirit80.ics.muni.cz.:16514/system",
            "qemu+tcp://localhost/system",
            "qemu+tcp://[::1]:1/system",
            "qemu+tcp://127.0.0.2/system",
        ] {
            assert!(is_here(here, "skirit80.ics.muni.cz"), "{here}");
        }
        for there in [
            "qemu+tls://skirit81/system",
            "qemu+tls://skirit80.cesnet.cz/system",
            "qemu+unix:///system?socket=/x",
            "qemu+tcp://10.77.0.2/system",
        ] {
            assert!(!is_here(there, "skirit80.ics.muni.cz"), "{there}");
        }
    }

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
    }

    #[test]
    fn only_a_persistent_domain_takes_its_definition_along() {
        assert_eq!(
            flags(false, "Xen"),
            sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER
        );
        assert_ne!(flags(true, "QEMU") & sys::VIR_MIGRATE_UNDEFINE_SOURCE, 0);
        assert_ne!(flags(true, "QEMU") & sys::VIR_MIGRATE_ABORT_ON_ERROR, 0);
    }
}
