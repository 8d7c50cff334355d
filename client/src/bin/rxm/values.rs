//! Domains and jobs as JSON has them.

use serde_json::{Value, json};
use xman_client::Address;
use xman_common::protocol::{DomainRow, JobRow, Progress, Standing};

/// A domain as JSON has it.
pub(crate) fn domain_value(address: &Address, row: &DomainRow) -> Value {
    json!({
        "host": address,
        "name": row.name,
        "uuid": row.uuid,
        "hypervisor": row.hypervisor,
        "id": row.id,
        "state": row.state.name(),
        "reason": row.reason,
        "memory_kib": row.memory_kib,
        "max_memory_kib": row.max_memory_kib,
        "vcpus": row.vcpus,
        "max_vcpus": row.max_vcpus,
        "cpu_time_ns": row.cpu_time_ns,
        "autostart": row.autostart,
        "persistent": row.persistent,
        "saved": row.saved,
        "since_ms": row.since_ms,
        "standing": row.standing.map(Standing::name),
        "preempted_ms": row.preempted_ms,
        "owners": row.metadata.owners,
        "class": row.metadata.class,
        "labels": row.metadata.labels,
        "metadata_trouble": row.metadata_trouble,
        "age_ms": row.age_ms,
        "stale": row.stale,
    })
}

/// A job as JSON has it.
pub(crate) fn job_value(address: &Address, job: &JobRow) -> Value {
    json!({
        "host": address,
        "id": job.id,
        "principal": job.principal,
        "verb": job.verb,
        "domain": job.domain,
        "uuid": job.uuid,
        "detail": job.detail,
        "state": job.state.to_string(),
        "result": job.result,
        "began_ms": job.began_ms,
        "ended_ms": job.ended_ms,
        "progress": job.progress.as_ref().map(progress_value),
    })
}

fn progress_value(progress: &Progress) -> Value {
    json!({
        "phase": progress.phase,
        "percent": progress.percent.min(100),
        "done_bytes": progress.done_bytes,
        "remaining_bytes": progress.remaining_bytes,
        "total_bytes": progress.total_bytes,
        "rate_bytes_per_s": progress.rate,
        "elapsed_ms": progress.elapsed_ms,
        "eta_ms": progress.eta_ms,
    })
}
