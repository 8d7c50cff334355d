//! What must survive a crash: outcomes of changing calls by their id, jobs, guests on their way, and the schedule. SQLite, write-ahead log, full sync, one writer.
//!
//! ```text
//! a change:   begin() -> Fresh -> (carried out) -> finish()
//!             begin() -> Repeated(outcome)     the same id and request: answered from here
//!             begin() -> Interrupted           begun by an xmand that ended in the middle: outcome not known
//!             begin() -> OtherRequest          the id belongs to another request
//! ```
//! Orders that wait together are committed together, and none is answered before its commit.

use std::{
    fs::{self, File, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt},
    path::{Path, PathBuf},
    sync::Arc,
    sync::mpsc::{self, Receiver, Sender},
    thread,
    time::Duration,
};

use rusqlite::{Connection, ErrorCode, OpenFlags, OptionalExtension, params};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;
use uuid::Uuid;
use xman_common::{
    codec,
    name::{DomainName, HostName},
    protocol::{Code, Fault, JobRow, JobState, Permit, Reply, Settlement},
};
use xman_policy::permit::Arrival;

use crate::{ROOT, clock::now_ms};

pub(crate) use schedule::{Row, look as look_at_schedule};

mod schedule;

/// The layout of the tables; an older one is brought up to date when it is opened, a newer one refused.
const SCHEMA: u32 = 3;
/// How long outcomes and ended jobs are remembered.
const MEMORY: Duration = Duration::from_secs(24 * 3600);
/// Outcomes kept for one principal: a script that never repeats an id cannot fill the disk.
const MAX_OUTCOMES: u32 = 10_000;
/// Jobs kept in all.
const MAX_JOBS: u32 = 10_000;
/// Orders committed in one go.
const BATCH: usize = 256;
const FILE: &str = "xmand.sqlite";

/// What was asked by whom, as far as a repeat must agree.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CallKey {
    pub(crate) principal: String,
    pub(crate) on_behalf_of: String,
    pub(crate) id: Uuid,
}

/// What the store knows of a call that is about to begin.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Begun {
    /// Nothing: it is written down as begun.
    Fresh,
    /// It ended before, so.
    Repeated(Box<Result<Reply, Fault>>),
    /// It began, and no end was written.
    Interrupted,
    /// The id stands for another request.
    OtherRequest,
}

/// A guest that leaves, kept until the destination has heard where it is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Departure {
    /// The job.
    pub(crate) job: Uuid,
    /// The domain.
    pub(crate) uuid: Uuid,
    /// Its name.
    pub(crate) name: DomainName,
    /// The hypervisor that has it, as libvirt URI.
    pub(crate) hypervisor: String,
    /// Where to.
    pub(crate) destination: HostName,
    /// The destination's port.
    pub(crate) port: u16,
    /// The destination's permit.
    pub(crate) permit: Permit,
    /// Whether it ran when it left.
    pub(crate) ran: bool,
    /// What the destination is to hear, once that is decided.
    pub(crate) word: Option<Settlement>,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// SQLite's word.
    #[error("{0}")]
    Database(Arc<rusqlite::Error>),
    /// The folder or file.
    #[error("{}: {source}", path.display())]
    File { path: PathBuf, source: io::Error },
    /// Made by a newer xmand.
    #[error("the store has layout {found}, this xmand knows {SCHEMA}; run the newer xmand again")]
    Newer { found: u32 },
    /// A second xmand would take the first one's work for left behind.
    #[error("another xmand works in {}; stop it, or give this one a `state-dir` of its own", .0.display())]
    Taken(PathBuf),
    /// Others could read or change it.
    #[error("{} is open to others; run `chown root: DIR; chmod 0700 DIR`", .0.display())]
    Exposed(PathBuf),
    /// The writing thread is gone.
    #[error("the store has stopped")]
    Stopped,
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(Arc::new(error))
    }
}

impl StoreError {
    /// Returns the fault for a change that could not be written down before it began.
    pub(crate) fn before(&self) -> Fault {
        let is_full = match self {
            Self::Database(error) => error.sqlite_error_code() == Some(ErrorCode::DiskFull),
            Self::File { .. }
            | Self::Newer { .. }
            | Self::Exposed(_)
            | Self::Taken(_)
            | Self::Stopped => false,
        };
        let advice = if is_full {
            "; make room on the disk of the state directory"
        } else {
            ""
        };
        Fault::new(
            Code::Unavailable,
            format!("nothing was begun: the host cannot write it down ({self}){advice}"),
        )
    }
}

type Answer = Box<dyn FnOnce(Result<(), StoreError>) + Send>;
type Order = Box<dyn FnOnce(&Connection) -> (Result<(), rusqlite::Error>, Answer) + Send>;

/// The way to the writing thread.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    orders: Sender<Order>,
    _own: Arc<File>,
}

impl Store {
    /// Opens the store of a state directory, which is made if it is missing.
    pub(crate) fn open(directory: &Path) -> Result<Self, StoreError> {
        let own = own(directory)?;
        let connection = connect(directory)?;
        let (orders, incoming) = mpsc::channel();
        thread::Builder::new()
            .name("store".to_owned())
            .spawn(move || write(connection, &incoming))
            .map_err(|source| StoreError::File {
                path: directory.into(),
                source,
            })?;
        Ok(Self {
            orders,
            _own: Arc::new(own),
        })
    }

    /// Tells whether the store is whole and can be written, for `--check`. Makes nothing.
    pub(crate) fn check(directory: &Path) -> Result<&'static str, String> {
        let file = directory.join(FILE);
        if !directory.exists() {
            return Ok("is not there yet; xmand makes it when it starts");
        }
        guarded(directory).map_err(|error| error.to_string())?;
        tempfile::tempfile_in(directory)
            .map_err(|error| format!("{error}; xmand must be able to write there"))?;
        if !file.exists() {
            return Ok("is empty and can be written");
        }
        let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)
            .map_err(|error| error.to_string())?;
        let verdict: String = connection
            .query_row("PRAGMA quick_check(1)", [], |row| row.get(0))
            .map_err(|error| error.to_string())?;
        if verdict == "ok" {
            Ok("is whole and can be written")
        } else {
            Err(format!(
                "{verdict}; restore {FILE} from a copy, or move it away"
            ))
        }
    }

    /// Writes down that a call begins, or tells what is known of it.
    pub(crate) async fn begin(
        &self,
        key: CallKey,
        verb: &'static str,
        digest: [u8; 32],
    ) -> Result<Begun, StoreError> {
        self.order(move |connection| begin(connection, &key, verb, &digest))
            .await
    }

    /// Tells what is known of a call, and writes nothing; `Fresh` where that is nothing.
    pub(crate) async fn recall(&self, key: CallKey, digest: [u8; 32]) -> Result<Begun, StoreError> {
        self.order(move |connection| known(connection, &key, &digest))
            .await
    }

    /// Writes down what came of a call.
    pub(crate) async fn finish(
        &self,
        key: CallKey,
        outcome: &Result<Reply, Fault>,
    ) -> Result<(), StoreError> {
        let outcome = codec::encode(outcome).unwrap_or_default();
        self.order(move |connection| {
            connection
                .prepare_cached("UPDATE calls SET outcome = ?4, ended_ms = ?5 WHERE principal = ?1 AND behalf = ?2 AND id = ?3")?
                .execute(params![key.principal, key.on_behalf_of, key.id.as_bytes(), outcome, stamp()])?;
            Ok(())
        })
        .await
    }

    /// Forgets that a call began: nothing came of it, and the same call may come again.
    pub(crate) async fn withdraw(&self, key: CallKey) -> Result<(), StoreError> {
        self.order(move |connection| {
            connection
                .prepare_cached("DELETE FROM calls WHERE principal = ?1 AND behalf = ?2 AND id = ?3 AND outcome IS NULL")?
                .execute(params![key.principal, key.on_behalf_of, key.id.as_bytes()])?;
            Ok(())
        })
        .await
    }

    /// Writes a job down, or anew. Returns whether it did: a job that is another principal's is left alone, since callers choose ids.
    pub(crate) async fn put_job(&self, job: &JobRow) -> Result<bool, StoreError> {
        let (id, principal, ended) = (
            job.id,
            job.principal.clone(),
            job.ended_ms.map(|ms| i64::try_from(ms).unwrap_or(i64::MAX)),
        );
        let row = codec::encode(&JobRow {
            progress: None,
            ..job.clone()
        })
        .unwrap_or_default();
        self.order(move |connection| {
            let known = connection
                .prepare_cached("SELECT row FROM jobs WHERE id = ?1")?
                .query_row([id.as_bytes()], |row| row.get::<_, Vec<u8>>(0))
                .optional()?
                .and_then(|row| codec::decode::<JobRow>(&row).ok());
            if known.is_some_and(|job| job.principal != principal) {
                return Ok(false);
            }
            connection
                .prepare_cached(
                    "INSERT OR REPLACE INTO jobs (id, row, ended_ms) VALUES (?1, ?2, ?3)",
                )?
                .execute(params![id.as_bytes(), row, ended])?;
            Ok(true)
        })
        .await
    }

    /// Returns all jobs, the oldest first.
    pub(crate) async fn jobs(&self) -> Result<Vec<JobRow>, StoreError> {
        self.order(|connection| {
            let mut statement = connection.prepare_cached("SELECT row FROM jobs ORDER BY rowid")?;
            let rows = statement.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
            Ok(rows
                .filter_map(Result::ok)
                .filter_map(|row| codec::decode(&row).ok())
                .collect())
        })
        .await
    }

    /// Ends the jobs that an earlier xmand left running: nobody watches them any more. Returns how many.
    pub(crate) async fn settle_jobs(&self, result: &'static str) -> Result<usize, StoreError> {
        let left: Vec<JobRow> = self
            .jobs()
            .await?
            .into_iter()
            .filter(|job| job.ended_ms.is_none())
            .collect();
        for job in &left {
            let ended_ms = Some(now_ms());
            self.put_job(&JobRow {
                state: JobState::Unknown,
                result: result.to_owned(),
                ended_ms,
                ..job.clone()
            })
            .await?;
        }
        Ok(left.len())
    }

    /// Writes down that a domain may arrive by a permit, before any of it does.
    pub(crate) async fn put_arrival(
        &self,
        permit: &Permit,
        arrival: &Arrival,
    ) -> Result<(), StoreError> {
        let (permit, row) = (permit.0, codec::encode(arrival).unwrap_or_default());
        self.order(move |connection| {
            connection
                .prepare_cached("INSERT OR REPLACE INTO arrivals (permit, row) VALUES (?1, ?2)")?
                .execute(params![permit, row])?;
            Ok(())
        })
        .await
    }

    /// Writes down that an arrival has come to its end.
    pub(crate) async fn settle_arrival(&self, permit: &Permit) -> Result<(), StoreError> {
        let permit = permit.0;
        self.order(move |connection| {
            connection
                .prepare_cached("UPDATE arrivals SET settled_ms = ?2 WHERE permit = ?1")?
                .execute(params![permit, stamp()])?;
            forget_arrivals(connection)
        })
        .await
    }

    /// Returns all arrivals that are remembered, and whether they have come to their end.
    pub(crate) async fn arrivals(&self) -> Result<Vec<(Permit, Arrival, bool)>, StoreError> {
        self.order(|connection| {
            let mut statement =
                connection.prepare_cached("SELECT permit, row, settled_ms FROM arrivals")?;
            let rows = statement.query_map([], |row| {
                Ok((
                    row.get::<_, [u8; 32]>(0)?,
                    row.get::<_, Vec<u8>>(1)?,
                    row.get::<_, Option<i64>>(2)?,
                ))
            })?;
            Ok(rows
                .filter_map(Result::ok)
                .filter_map(|(permit, row, settled)| {
                    let arrival = codec::decode(&row).ok()?;
                    Some((Permit(permit), arrival, settled.is_some()))
                })
                .collect())
        })
        .await
    }

    /// Writes down that a domain may leave, before any of it does, and what the word on it is, before that is given.
    pub(crate) async fn put_departure(&self, departure: &Departure) -> Result<(), StoreError> {
        let (job, row) = (departure.job, codec::encode(departure).unwrap_or_default());
        self.order(move |connection| {
            connection
                .prepare_cached("INSERT OR REPLACE INTO departures (job, row) VALUES (?1, ?2)")?
                .execute(params![job.as_bytes(), row])?;
            Ok(())
        })
        .await
    }

    /// Forgets a departure: the other host has heard where the domain is.
    pub(crate) async fn drop_departure(&self, job: Uuid) -> Result<(), StoreError> {
        self.order(move |connection| {
            connection
                .prepare_cached("DELETE FROM departures WHERE job = ?1")?
                .execute([job.as_bytes()])?;
            Ok(())
        })
        .await
    }

    /// Returns the departures of which the other host has not heard the end.
    pub(crate) async fn departures(&self) -> Result<Vec<Departure>, StoreError> {
        self.order(|connection| {
            let mut statement = connection.prepare_cached("SELECT row FROM departures")?;
            let rows = statement.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
            Ok(rows
                .filter_map(Result::ok)
                .filter_map(|row| codec::decode(&row).ok())
                .collect())
        })
        .await
    }

    async fn order<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T, rusqlite::Error> + Send + 'static,
    ) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.orders
            .send(Box::new(move |connection| {
                let (status, value) = match work(connection) {
                    Ok(value) => (Ok(()), Some(value)),
                    Err(error) => (Err(error), None),
                };
                let reply: Answer = Box::new(move |committed| {
                    let _ = answer.send(committed.and_then(|()| value.ok_or(StoreError::Stopped)));
                });
                (status, reply)
            }))
            .map_err(|_| StoreError::Stopped)?;
        answered.await.unwrap_or(Err(StoreError::Stopped))
    }
}

fn write(mut connection: Connection, incoming: &Receiver<Order>) {
    while let Ok(first) = incoming.recv() {
        let orders = std::iter::once(first)
            .chain(incoming.try_iter().take(BATCH - 1))
            .collect();
        write_together(&mut connection, orders);
    }
}

fn write_together(connection: &mut Connection, orders: Vec<Order>) {
    let mut answers: Vec<Answer> = Vec::with_capacity(orders.len());
    let committed = connection.transaction().and_then(|mut transaction| {
        for order in orders {
            let savepoint = transaction.savepoint()?;
            match order(&savepoint) {
                (Ok(()), answer) => {
                    savepoint.commit()?;
                    answers.push(answer);
                }
                (Err(error), answer) => {
                    drop(savepoint); // undone
                    answer(Err(error.into()));
                }
            }
        }
        transaction.commit()
    });
    let failure = committed.err().map(Arc::new);
    if let Some(error) = &failure {
        tracing::error!(%error, "the store could not be written");
    }
    for answer in answers {
        answer(match &failure {
            None => Ok(()),
            Some(error) => Err(StoreError::Database(Arc::clone(error))),
        });
    }
}

fn begin(
    connection: &Connection,
    key: &CallKey,
    verb: &str,
    digest: &[u8; 32],
) -> Result<Begun, rusqlite::Error> {
    let begun = known(connection, key, digest)?;
    if begun == Begun::Fresh {
        forget(connection, key)?;
        connection
            .prepare_cached("INSERT INTO calls (principal, behalf, id, digest, verb, began_ms) VALUES (?1, ?2, ?3, ?4, ?5, ?6)")?
            .execute(params![key.principal, key.on_behalf_of, key.id.as_bytes(), digest, verb, stamp()])?;
    }
    Ok(begun)
}

fn known(
    connection: &Connection,
    key: &CallKey,
    digest: &[u8; 32],
) -> Result<Begun, rusqlite::Error> {
    let row = connection
        .prepare_cached(
            "SELECT digest, outcome FROM calls WHERE principal = ?1 AND behalf = ?2 AND id = ?3",
        )?
        .query_row(
            params![key.principal, key.on_behalf_of, key.id.as_bytes()],
            |row| Ok((row.get::<_, Vec<u8>>(0)?, row.get::<_, Option<Vec<u8>>>(1)?)),
        )
        .optional()?;
    Ok(match row {
        None => Begun::Fresh,
        Some((other, _)) if other != digest => Begun::OtherRequest,
        Some((_, Some(outcome))) => codec::decode(&outcome).map_or(Begun::Interrupted, |outcome| {
            Begun::Repeated(Box::new(outcome))
        }),
        Some((_, None)) => Begun::Interrupted,
    })
}

/// Drops what ended more than a day ago, and of one principal's outcomes the oldest over the limit. A call under way is kept, however
/// long it takes and wherever the clock jumps: its outcome must find it.
fn forget(connection: &Connection, key: &CallKey) -> Result<(), rusqlite::Error> {
    let before = stamp().saturating_sub(memory_ms());
    connection
        .prepare_cached("DELETE FROM calls WHERE began_ms < ?1 AND ended_ms < ?1")?
        .execute([before])?;
    connection
        .prepare_cached("DELETE FROM jobs WHERE ended_ms < ?1")?
        .execute([before])?;
    connection
        .prepare_cached(
            "DELETE FROM calls WHERE rowid IN (SELECT rowid FROM calls WHERE principal = ?1 AND outcome IS NOT NULL
             ORDER BY began_ms DESC LIMIT -1 OFFSET ?2)",
        )?
        .execute(params![key.principal, MAX_OUTCOMES])?;
    connection
        .prepare_cached(
            "DELETE FROM jobs WHERE rowid IN (SELECT rowid FROM jobs WHERE ended_ms IS NOT NULL ORDER BY ended_ms DESC LIMIT -1 OFFSET ?1)",
        )?
        .execute([MAX_JOBS])?;
    Ok(())
}

fn forget_arrivals(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection
        .prepare_cached("DELETE FROM arrivals WHERE settled_ms < ?1")?
        .execute([stamp().saturating_sub(memory_ms())])?;
    Ok(())
}

/// Makes the folder where it is missing, and locks it until the process ends, however it ends.
fn own(directory: &Path) -> Result<File, StoreError> {
    let file = |source| StoreError::File {
        path: directory.into(),
        source,
    };
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(directory)
        .map_err(file)?;
    guarded(directory)?;
    let folder = File::open(directory).map_err(file)?;
    match folder.try_lock() {
        Ok(()) => Ok(folder),
        Err(TryLockError::WouldBlock) => Err(StoreError::Taken(directory.into())),
        Err(TryLockError::Error(source)) => Err(file(source)),
    }
}

fn connect(directory: &Path) -> Result<Connection, StoreError> {
    let connection = Connection::open(directory.join(FILE))?;
    connection.busy_timeout(Duration::from_secs(5))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    let found = connection.pragma_query_value(None, "user_version", |row| row.get::<_, u32>(0))?;
    if found > SCHEMA {
        return Err(StoreError::Newer { found });
    }
    if found < 1 {
        connection.execute_batch(
            "BEGIN;
             CREATE TABLE calls (principal TEXT NOT NULL, behalf TEXT NOT NULL, id BLOB NOT NULL, digest BLOB NOT NULL,
                 verb TEXT NOT NULL, began_ms INTEGER NOT NULL, ended_ms INTEGER, outcome BLOB, UNIQUE (principal, behalf, id));
             CREATE INDEX calls_age ON calls (began_ms);
             CREATE INDEX calls_principal ON calls (principal, began_ms);
             CREATE TABLE jobs (id BLOB NOT NULL UNIQUE, row BLOB NOT NULL, ended_ms INTEGER);
             CREATE INDEX jobs_age ON jobs (ended_ms);
             PRAGMA user_version = 1;
             COMMIT;",
        )?;
    }
    if found < 2 {
        connection.execute_batch(
            "BEGIN;
             CREATE TABLE arrivals (permit BLOB NOT NULL UNIQUE, row BLOB NOT NULL, settled_ms INTEGER);
             CREATE TABLE departures (job BLOB NOT NULL UNIQUE, row BLOB NOT NULL);
             PRAGMA user_version = 2;
             COMMIT;",
        )?;
    }
    if found < 3 {
        schedule::make(&connection)?;
    }
    forget_arrivals(&connection)?;
    // Nothing is under way yet: these were interrupted, and had their day.
    connection.execute(
        "DELETE FROM calls WHERE began_ms < ?1 AND ended_ms IS NULL",
        [stamp().saturating_sub(memory_ms())],
    )?;
    Ok(connection)
}

/// Refuses a folder that others could write in, or make so.
fn guarded(directory: &Path) -> Result<(), StoreError> {
    let metadata = fs::symlink_metadata(directory).map_err(|source| StoreError::File {
        path: directory.into(),
        source,
    })?;
    let us = fs::metadata("/proc/self").map_or(ROOT, |process| process.uid());
    let is_ours = [ROOT, us].contains(&metadata.uid());
    if metadata.is_dir() && metadata.mode() & 0o022 == 0 && is_ours {
        Ok(())
    } else {
        Err(StoreError::Exposed(directory.into()))
    }
}

fn memory_ms() -> i64 {
    i64::try_from(MEMORY.as_millis()).unwrap_or(i64::MAX)
}

/// Now, as SQLite has integers.
fn stamp() -> i64 {
    i64::try_from(now_ms()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(principal: &str, id: u128) -> CallKey {
        CallKey {
            principal: principal.to_owned(),
            on_behalf_of: String::new(),
            id: Uuid::from_u128(id),
        }
    }

    #[tokio::test]
    async fn a_repeated_call_is_answered_from_the_store_also_after_a_restart() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Fresh
        );
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Interrupted
        );
        store
            .finish(key("alice@EX", 1), &Ok(Reply::Done))
            .await
            .unwrap();
        drop(store);

        let store = Store::open(directory.path()).unwrap();
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Repeated(Box::new(Ok(Reply::Done)))
        );
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [2; 32])
                .await
                .unwrap(),
            Begun::OtherRequest
        );
        assert_eq!(
            store
                .begin(key("bob@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Fresh
        );
    }

    #[tokio::test]
    async fn a_call_of_which_nothing_came_may_come_again() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Fresh
        );
        store.withdraw(key("alice@EX", 1)).await.unwrap();
        assert_eq!(
            store
                .begin(key("alice@EX", 1), "pause", [1; 32])
                .await
                .unwrap(),
            Begun::Fresh
        );
    }

    #[tokio::test]
    async fn a_call_that_takes_longer_than_a_day_is_not_forgotten_before_its_end() {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path()).unwrap();
        let begin = |id| store.begin(key("alice@EX", id), "migrate", [1; 32]);
        assert_eq!(begin(1).await.unwrap(), Begun::Fresh);
        let clock = Connection::open(directory.path().join(FILE)).unwrap();
        clock.execute("UPDATE calls SET began_ms = 0", []).unwrap();
        assert_eq!(begin(2).await.unwrap(), Begun::Fresh);
        store
            .finish(key("alice@EX", 1), &Ok(Reply::Done))
            .await
            .unwrap();
        assert_eq!(
            begin(1).await.unwrap(),
            Begun::Repeated(Box::new(Ok(Reply::Done)))
        );
        clock.execute("UPDATE calls SET ended_ms = 0", []).unwrap();
        assert_eq!(begin(3).await.unwrap(), Begun::Fresh);
        assert_eq!(begin(1).await.unwrap(), Begun::Fresh);
    }

    #[test]
    fn a_folder_belongs_to_one_xmand_at_a_time() {
        let directory = tempfile::tempdir().unwrap();
        let first = Store::open(directory.path()).unwrap();
        assert!(matches!(
            Store::open(directory.path()),
            Err(StoreError::Taken(_))
        ));
        drop(first);
        assert!(Store::open(directory.path()).is_ok());
    }

    #[test]
    fn a_folder_that_others_can_write_is_refused() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            Store::open(directory.path()),
            Err(StoreError::Exposed(_))
        ));
    }

    #[test]
    fn the_store_of_a_newer_xmand_is_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        let connection = connect(directory.path()).unwrap();
        connection.pragma_update(None, "user_version", 99).unwrap();
        drop(connection);
        assert!(matches!(
            Store::open(directory.path()),
            Err(StoreError::Newer { found: 99 })
        ));
    }
}
