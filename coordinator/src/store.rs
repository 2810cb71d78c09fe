//! The store: rows that outlive the process. One writer thread owns it and commits together what waits together.

pub mod sqlite;

use crate::fleet::{Change, Fleet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use tokio::sync::oneshot;

/// Why the store did not take or give something.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite said no.
    #[error("the state database failed")]
    Database(#[from] rusqlite::Error),
    /// A record does not read or write.
    #[error("a record of the state database does not read")]
    Record(#[from] serde_json::Error),
    /// The database was written by a newer version.
    #[error("the state database has schema {found}; this version knows up to {known}: run the newer version")]
    TooNew {
        /// In the file.
        found: i64,
        /// Here.
        known: i64,
    },
    /// The writer is gone.
    #[error("the state database's writer has stopped")]
    Stopped,
}

/// A row as it is written: kind, key, body or none when it goes.
pub type Row = (&'static str, String, Option<String>);

struct Commit {
    rows: Vec<Row>,
    done: oneshot::Sender<()>,
}

/// Handle on the writer thread.
#[derive(Clone)]
pub struct Store {
    commits: mpsc::SyncSender<Commit>,
    committed: Arc<AtomicU64>,
}

/// Commits waiting at most; more make their callers wait.
const QUEUE: usize = 4096;

impl Store {
    /// Opens (or makes) the database and reads all of it.
    ///
    /// # Errors
    /// When it does not open, read, or is too new.
    pub fn open(path: &Path) -> Result<(Self, Fleet), StoreError> {
        let mut database = sqlite::Database::open(path)?;
        let fleet = database.load()?;
        let committed = Arc::new(AtomicU64::new(0));
        let counter = committed.clone();
        let (commits, queue) = mpsc::sync_channel::<Commit>(QUEUE);
        std::thread::Builder::new()
            .name("store".into())
            .spawn(move || write(&mut database, &queue, &counter))
            .map_err(|_| StoreError::Stopped)?;
        Ok((Self { commits, committed }, fleet))
    }

    /// Queues changes in the order of the calls; the receiver resolves when they are durable.
    ///
    /// # Errors
    /// When a record does not serialize or the writer has stopped.
    pub fn queue(&self, changes: &[Change]) -> Result<oneshot::Receiver<()>, StoreError> {
        let rows = changes.iter().map(Change::row).collect::<Result<_, _>>()?;
        let (done, receiver) = oneshot::channel();
        self.commits.send(Commit { rows, done }).map_err(|_| StoreError::Stopped)?;
        Ok(receiver)
    }

    /// Transactions committed in this process's life.
    pub fn commits(&self) -> u64 {
        self.committed.load(Ordering::Relaxed)
    }
}

/// The writer's life. A commit that fails ends the process: memory already holds what the disk refused, and an
/// answer that is not durable must never be given.
fn write(database: &mut sqlite::Database, queue: &mpsc::Receiver<Commit>, committed: &AtomicU64) {
    while let Ok(first) = queue.recv() {
        let batch: Vec<Commit> = std::iter::once(first).chain(queue.try_iter().take(QUEUE)).collect();
        if let Err(error) = database.commit(batch.iter().flat_map(|c| &c.rows)) {
            eprintln!(
                "godwit-coordinator: the state database failed: {error}; stopping so that nothing is answered that is not durable"
            );
            std::process::exit(74);
        }
        committed.fetch_add(1, Ordering::Relaxed);
        for commit in batch {
            let _ = commit.done.send(());
        }
    }
}
