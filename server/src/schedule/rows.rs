//! The record as rows of the store.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;
use xman_common::protocol::{JobKey, Maintenance};

use super::record::{Ended, Kept, Lease, Record};
use crate::store::Row;

const MAINTENANCE: &str = "maintenance";
const HAD: &str = "had-kib";

#[derive(Serialize, Deserialize)]
struct EndedRow {
    job: JobKey,
    domain: Option<Uuid>,
    #[serde(flatten)]
    ended: Ended,
}

/// Returns the rows by which one record differs from another.
pub(super) fn changes(before: &Record, after: &Record) -> Vec<Row> {
    let mut rows = Vec::new();
    differ(&before.leases, &after.leases, &mut rows, |id, lease| {
        (format!("lease {} {}", id.key, id.uuid), text(lease))
    });
    differ(&before.domains, &after.domains, &mut rows, |uuid, kept| {
        (format!("domain {uuid}"), text(kept))
    });
    differ(&before.ended, &after.ended, &mut rows, |place, ended| {
        let (job, domain) = place;
        let name = domain.map_or_else(|| "*".to_owned(), |uuid| uuid.to_string());
        let row = EndedRow {
            job: job.clone(),
            domain: *domain,
            ended: *ended,
        };
        (format!("ended {job} {name}"), text(&row))
    });
    if before.maintenance != after.maintenance {
        let row = after.maintenance.as_ref().map(text);
        rows.push((MAINTENANCE.to_owned(), row));
    }
    if before.had_kib != after.had_kib {
        rows.push((HAD.to_owned(), Some(after.had_kib.to_string())));
    }
    rows
}

/// Reads a record from its rows.
///
/// # Errors
/// Which row means nothing: leases and holds that are there and not understood must not be forgotten.
pub(super) fn read(rows: Vec<(String, String)>) -> Result<Record, String> {
    let mut record = Record::default();
    for (place, row) in rows {
        match place.split(' ').next() {
            Some("lease") => {
                let lease: Lease = parse(&place, &row)?;
                record.leases.insert(lease.id(), lease);
            }
            Some("domain") => {
                let kept: Kept = parse(&place, &row)?;
                let uuid = place.split(' ').nth(1).and_then(|uuid| uuid.parse().ok());
                let uuid =
                    uuid.ok_or_else(|| format!("the schedule's row '{place}' names no domain"))?;
                record.domains.insert(uuid, kept);
            }
            Some("ended") => {
                let EndedRow { job, domain, ended } = parse(&place, &row)?;
                record.ended.insert((job, domain), ended);
            }
            Some(MAINTENANCE) => {
                let maintenance: Maintenance = parse(&place, &row)?;
                record.maintenance = Some(maintenance);
            }
            Some(HAD) => record.had_kib = parse(&place, &row)?,
            Some(_) | None => {
                return Err(format!(
                    "the schedule has a row '{place}', which means nothing to this xmand"
                ));
            }
        }
    }
    Ok(record)
}

/// Adds the rows of what has changed, and of what has gone.
fn differ<K: Ord, V: PartialEq>(
    before: &BTreeMap<K, V>,
    after: &BTreeMap<K, V>,
    rows: &mut Vec<Row>,
    row: impl Fn(&K, &V) -> (String, String),
) {
    let gone = before.iter().filter(|(key, _)| !after.contains_key(key));
    rows.extend(gone.map(|(key, value)| (row(key, value).0, None)));
    let new = after
        .iter()
        .filter(|(key, value)| before.get(key) != Some(value));
    rows.extend(new.map(|(key, value)| {
        let (place, row) = row(key, value);
        (place, Some(row))
    }));
}

fn text<T: Serialize>(value: &T) -> String {
    serde_json::to_string(value).unwrap_or_default()
}

fn parse<T: DeserializeOwned>(place: &str, row: &str) -> Result<T, String> {
    serde_json::from_str(row).map_err(|error| {
        format!(
            "the schedule's row '{place}' cannot be read: {error}; restore the store from a copy"
        )
    })
}
