//! SQLite: one table of records, write-ahead log, synchronous commits.

use super::{Row, StoreError};
use crate::fleet::Fleet;
use rusqlite::{Connection, params};
use std::path::Path;

/// Schema that this version writes.
const SCHEMA: i64 = 1;

/// The open database.
pub struct Database {
    connection: Connection,
}

impl Database {
    /// Opens or makes the file, readable by its owner only.
    ///
    /// # Errors
    /// When it does not open or is too new.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        let connection = Connection::open(path)?;
        connection.busy_timeout(std::time::Duration::from_secs(5))?;
        connection.pragma_update(None, "journal_mode", "wal")?;
        connection.pragma_update(None, "synchronous", "full")?;
        // Pages of 4 KiB. A checkpoint writes every page that changed and holds commits up; of random keys each row
        // changes a page of its own, so at SQLite's 1000 pages every thirtieth commit of a busy fleet would wait.
        connection.pragma_update(None, "wal_autocheckpoint", 16_384)?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > SCHEMA {
            return Err(StoreError::TooNew { found, known: SCHEMA });
        }
        connection.execute_batch(
            "CREATE TABLE IF NOT EXISTS record (
                 kind TEXT NOT NULL, key TEXT NOT NULL, body TEXT NOT NULL, PRIMARY KEY (kind, key)
             ) WITHOUT ROWID;",
        )?;
        connection.pragma_update(None, "user_version", SCHEMA)?;
        Ok(Self { connection })
    }

    /// Everything.
    ///
    /// # Errors
    /// When a record does not read.
    pub fn load(&mut self) -> Result<Fleet, StoreError> {
        let mut fleet = Fleet::default();
        let mut statement = self.connection.prepare("SELECT kind, body FROM record")?;
        let mut rows = statement.query([])?;
        while let Some(row) = rows.next()? {
            fleet.load(&row.get::<_, String>(0)?, &row.get::<_, String>(1)?)?;
        }
        fleet.seat_all();
        Ok(fleet)
    }

    /// One transaction, on disk when it returns.
    ///
    /// # Errors
    /// When it did not happen.
    pub fn commit<'a>(&mut self, rows: impl Iterator<Item = &'a Row>) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        {
            let mut put = transaction.prepare_cached(
                "INSERT INTO record (kind, key, body) VALUES (?1, ?2, ?3)
                 ON CONFLICT (kind, key) DO UPDATE SET body = excluded.body",
            )?;
            let mut gone = transaction.prepare_cached("DELETE FROM record WHERE kind = ?1 AND key = ?2")?;
            for (kind, key, body) in rows {
                match body {
                    Some(body) => put.execute(params![kind, key, body])?,
                    None => gone.execute(params![kind, key])?,
                };
            }
        }
        Ok(transaction.commit()?)
    }
}
