//! What probes found, by mounts and kernel, in a small file. It is only ever a hint: whatever is wrong with it, the
//! next copy probes anew.

use super::choice::Loop;
use super::mounts::Mount;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Most mounts that are remembered; the oldest go first.
const MAX_ENTRIES: usize = 64;

/// A larger file is none of ours.
const MAX_BYTES: u64 = 64 << 10;

/// Age from which a finding is looked at anew, in seconds: a month.
const TOO_OLD_S: u64 = 30 * 24 * 3600;

#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    key: String,
    found: Loop,
    at_s: u64,
}

/// Where findings of an ordinary user are: `$XDG_CACHE_HOME/godwit/copy.json`, or under `~/.cache`.
pub fn user_file() -> Option<PathBuf> {
    let absolute = |path: PathBuf| path.is_absolute().then_some(path);
    let base = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from).and_then(absolute);
    let base = base.or_else(|| Some(absolute(std::env::var_os("HOME")?.into())?.join(".cache")))?;
    Some(base.join("godwit").join("copy.json"))
}

/// The name under which a pair of mounts is remembered. `passes` says what else decides: the page cache, for example.
pub(super) fn key(source: &Mount, target: &Mount, passes: &str) -> String {
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    format!("{}|{}|{}|{passes}", kernel.trim(), source.name(), target.name())
}

/// What a probe found for `key`, unless that is too long ago.
pub(super) fn find(file: &Path, key: &str) -> Option<Loop> {
    let now = now_s();
    let fresh = |entry: &Entry| entry.at_s <= now && now - entry.at_s < TOO_OLD_S;
    let found = read(file).into_iter().find(|entry| entry.key == key).filter(fresh)?.found;
    // Somebody may have written into it.
    (1..=256).contains(&found.depth).then_some(found)
}

/// Remembers what a probe found. A file that cannot be written is only a probe more the next time.
pub(super) fn remember(file: &Path, key: String, found: Loop) {
    let mut entries = read(file);
    entries.retain(|entry| entry.key != key);
    entries.push(Entry { key, found, at_s: now_s() });
    entries.sort_by_key(|entry| entry.at_s);
    let surplus = entries.len().saturating_sub(MAX_ENTRIES);
    entries.drain(..surplus);
    if let Err(error) = write(file, &entries) {
        tracing::debug!("what a probe found is not remembered in {}: {error}", file.display());
    }
}

fn read(file: &Path) -> Vec<Entry> {
    let small = fs::metadata(file).is_ok_and(|metadata| metadata.is_file() && metadata.len() <= MAX_BYTES);
    let text = if small { fs::read(file).unwrap_or_default() } else { Vec::new() };
    serde_json::from_slice(&text).unwrap_or_default()
}

fn write(file: &Path, entries: &[Entry]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(file);
    fs::create_dir_all(folder)?;
    let mut growing = tempfile::NamedTempFile::new_in(folder)?;
    growing.write_all(&serde_json::to_vec(entries)?)?;
    growing.persist(file)?;
    Ok(())
}

fn now_s() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use super::super::choice::{RING, THREADS};
    use super::*;

    #[test]
    fn findings_are_kept_by_key_and_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/copy.json");
        assert_eq!(find(&file, "k"), None);
        remember(&file, "k".into(), RING);
        remember(&file, "k".into(), THREADS);
        assert_eq!(find(&file, "k"), Some(THREADS));
        for number in 0..200 {
            remember(&file, format!("{number}"), RING);
        }
        assert_eq!(read(&file).len(), MAX_ENTRIES);
        assert_eq!(find(&file, "199"), Some(RING));
    }

    #[test]
    fn what_is_old_or_nonsense_is_as_if_it_were_not_there() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("copy.json");
        write(&file, &[Entry { key: "k".into(), found: RING, at_s: 5 }]).unwrap();
        assert_eq!(find(&file, "k"), None);
        let wild = Loop { depth: 1 << 40, ..RING };
        write(&file, &[Entry { key: "k".into(), found: wild, at_s: now_s() }]).unwrap();
        assert_eq!(find(&file, "k"), None);
        for text in [&b"\xff"[..], b"{}", b"[{}]", &[b' '; MAX_BYTES as usize + 1]] {
            fs::write(&file, text).unwrap();
            assert_eq!(find(&file, "k"), None);
            remember(&file, "k".into(), RING);
            assert_eq!(find(&file, "k"), Some(RING));
        }
    }
}
