//! The rows of the schedule: what shall be, one row a lease, domain or ended run. The schedule says what stands in them.

use std::path::Path;

use rusqlite::{Connection, OpenFlags, params};

use super::{Store, StoreError};

/// A row's place, and what stands there from now on; nothing where it goes.
pub(crate) type Row = (String, Option<String>);

impl Store {
    /// Writes rows down, all or none.
    pub(crate) async fn put_schedule(&self, rows: Vec<Row>) -> Result<(), StoreError> {
        self.order(move |connection| {
            for (place, row) in &rows {
                match row {
                    Some(row) => connection
                        .prepare_cached(
                            "INSERT OR REPLACE INTO schedule (place, row) VALUES (?1, ?2)",
                        )?
                        .execute(params![place, row])?,
                    None => connection
                        .prepare_cached("DELETE FROM schedule WHERE place = ?1")?
                        .execute([place])?,
                };
            }
            Ok(())
        })
        .await
    }

    /// Returns all rows.
    pub(crate) async fn schedule(&self) -> Result<Vec<(String, String)>, StoreError> {
        self.order(|connection| {
            let mut statement = connection.prepare_cached("SELECT place, row FROM schedule")?;
            let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
            rows.collect()
        })
        .await
    }
}

/// Returns the rows that a state directory has, without being its owner; none where there are none yet.
pub(crate) fn look(directory: &Path) -> Result<Vec<(String, String)>, String> {
    let file = directory.join(super::FILE);
    if !file.exists() {
        return Ok(Vec::new());
    }
    let read = || {
        let connection = Connection::open_with_flags(file, OpenFlags::SQLITE_OPEN_READ_WRITE)?;
        if !connection.table_exists(None, "schedule")? {
            return Ok(Vec::new());
        }
        let mut statement = connection.prepare("SELECT place, row FROM schedule")?;
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        rows.collect()
    };
    read().map_err(|error: rusqlite::Error| error.to_string())
}

/// The third layout has them.
pub(super) fn make(connection: &Connection) -> Result<(), rusqlite::Error> {
    connection.execute_batch(
        "BEGIN;
         CREATE TABLE schedule (place TEXT NOT NULL PRIMARY KEY, row TEXT NOT NULL) WITHOUT ROWID;
         PRAGMA user_version = 3;
         COMMIT;",
    )
}
