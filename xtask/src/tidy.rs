//! `cargo xtask tidy`: the rules of docs/architecture.md that a compiler does not check.
//!
//! Crate arrows, where outside crates may be named, module docs, file length, words that have no place in the
//! project, promises without their test, and series that no daemon exposes or no page tells of.

mod arrows;
mod metrics;
mod promises;
mod sources;

use std::collections::{BTreeSet, HashSet};
use std::path::{Path, PathBuf};

use crate::command::{self, CommandError};

/// `cargo xtask tidy`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {}

/// Why the tree is not tidy.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TidyError {
    #[error("tidy: {0} findings, listed above")]
    Untidy(usize),
    #[error("tidy: cannot read {path}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("tidy: cargo metadata of {manifest} does not parse")]
    Metadata { manifest: PathBuf, source: serde_json::Error },
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// One breach of a rule, with what to do about it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    file: String,
    /// From 1; 0 where it is the file as a whole.
    line: usize,
    advice: String,
}

/// Checks the whole tree, prints what it finds, and fails if that is anything.
pub(crate) fn run(_: &Arguments) -> Result<(), TidyError> {
    let root = command::workspace();
    let mut findings = arrows::check(root)?;
    let files = files(root)?;
    let mut functions = HashSet::new();
    let mut series = BTreeSet::new();
    for path in &files {
        let Ok(text) = std::fs::read_to_string(root.join(path)) else { continue };
        findings.extend(sources::check(path, &text));
        if path.ends_with(".rs") {
            functions.extend(promises::functions(&text));
        }
        if metrics::makes_series(path) {
            series.extend(metrics::made(&text));
        }
    }
    if let Ok(text) = std::fs::read_to_string(root.join(promises::FILE)) {
        findings.extend(promises::check(&text, &functions));
    }
    for path in files.iter().filter(|path| metrics::names_series(path)) {
        if let Ok(text) = std::fs::read_to_string(root.join(path)) {
            findings.extend(metrics::check(path, &text, &series));
        }
    }
    for Finding { file, line, advice } in &findings {
        match line {
            0 => println!("{file}: {advice}"),
            _ => println!("{file}:{line}: {advice}"),
        }
    }
    if findings.is_empty() {
        println!("tidy: {} files are tidy", files.len());
        return Ok(());
    }
    Err(TidyError::Untidy(findings.len()))
}

/// All files that are the project's own, relative to `root`, in order.
fn files(root: &Path) -> Result<Vec<String>, TidyError> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let failed = |source| TidyError::Read { path: folder.clone(), source };
        for entry in std::fs::read_dir(&folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            if path.is_dir() {
                if !["target", ".git", "__pycache__"].contains(&&*name) {
                    folders.push(path);
                }
            } else if name != "Cargo.lock" {
                files.push(path.strip_prefix(root).unwrap_or(&path).to_string_lossy().into_owned());
            }
        }
    }
    files.sort();
    Ok(files)
}

#[cfg(test)]
mod tests {
    #[test]
    fn this_tree_is_walked_without_what_was_built() {
        let files = super::files(crate::command::workspace()).expect("is readable");
        assert!(files.iter().any(|file| file == "xtask/src/tidy.rs"));
        assert!(!files.iter().any(|file| file.starts_with("target/") || file.starts_with(".git/")));
    }
}
