//! What a run has measured: kept case by case, so that a run that ends early has not run for nothing.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use super::BenchError;
use super::record::{Record, print_table};

/// The records of a run.
#[derive(Debug)]
pub(super) struct Report {
    /// Where they are written to, a line each, as soon as they are there.
    json: Option<(File, PathBuf)>,
    /// Those that were not printed yet.
    rest: Vec<Record>,
    /// Whether there were any.
    is_empty: bool,
}

impl Report {
    /// Begins one, in an empty file if any.
    pub(super) fn open(json: Option<&Path>) -> Result<Self, BenchError> {
        let open = |path: &Path| match File::create(path) {
            Ok(file) => Ok((file, path.to_owned())),
            Err(error) => Err(BenchError::io(format!("cannot write {}", path.display()))(error)),
        };
        Ok(Self { json: json.map(open).transpose()?, rest: Vec::new(), is_empty: true })
    }

    /// Keeps what was measured.
    pub(super) fn add(&mut self, records: Vec<Record>) -> Result<(), BenchError> {
        if let Some((file, path)) = &mut self.json {
            let lines: String = records.iter().map(|record| format!("{}\n", record.to_json())).collect();
            file.write_all(lines.as_bytes())
                .map_err(BenchError::io(format!("cannot write {}", path.display())))?;
        }
        self.is_empty &= records.is_empty();
        self.rest.extend(records);
        Ok(())
    }

    /// Whether nothing was measured, nor told to be impossible.
    pub(super) fn is_empty(&self) -> bool {
        self.is_empty
    }

    /// Prints what was not printed yet.
    pub(super) fn print_rest(&mut self) {
        print_table(&std::mem::take(&mut self.rest));
    }
}
