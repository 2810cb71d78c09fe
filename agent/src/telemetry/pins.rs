//! The folder of pinned maps and attachments on a BPF file system.

use super::TelemetryError;
use aya::maps::{MapError, MapInfo, MapType};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// `<bpffs>/godwit`.
#[derive(Clone, Debug)]
pub(super) struct Pins {
    folder: PathBuf,
}

/// What a map must be to be adopted.
#[derive(Debug)]
pub(super) struct Layout {
    /// The kernel's name of it, which holds the layout's version.
    pub(super) name: &'static str,
    pub(super) kind: MapType,
    pub(super) key_bytes: usize,
    pub(super) value_bytes: usize,
    pub(super) entries: u32,
}

impl Pins {
    /// The folder on the BPF file system at `bpffs`, made if it is not there.
    pub(super) fn open(bpffs: &Path) -> Result<Self, TelemetryError> {
        let mounted = statfs(bpffs).is_ok_and(|status| status.filesystem_type() == BPF_FS_MAGIC);
        if !mounted {
            return Err(TelemetryError::NoBpffs { path: bpffs.to_owned() });
        }
        let folder = bpffs.join("godwit");
        match fs::create_dir(&folder) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(pin_error(&folder, error)),
            _ => Ok(Self { folder }),
        }
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// Unpins a map that is not of this layout, so that the loader makes a new one. Its counts are lost, so
    /// it says why.
    pub(super) fn discard_unless(&self, pin: &str, wanted: &Layout) -> Result<(), TelemetryError> {
        let path = self.path(pin);
        let found = match MapInfo::from_pin(&path) {
            Ok(found) => found,
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                return Ok(());
            }
            Err(source) => return Err(TelemetryError::Map { map: wanted.name, source: Box::new(source) }),
        };
        if let Some(reason) = wanted.mismatch(&found) {
            tracing::warn!(
                path = %path.display(),
                reason,
                "a pinned map is made anew, its counts start from zero"
            );
            self.remove(pin)?;
        }
        Ok(())
    }

    /// Unpins; not being there is a success.
    pub(super) fn remove(&self, pin: &str) -> Result<(), TelemetryError> {
        let path = self.path(pin);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(pin_error(&path, error)),
            _ => Ok(()),
        }
    }

    /// Removes the folder, unless something else is pinned in it.
    pub(super) fn remove_folder(&self) -> Result<(), TelemetryError> {
        let gone = [io::ErrorKind::NotFound, io::ErrorKind::DirectoryNotEmpty];
        match fs::remove_dir(&self.folder) {
            Err(error) if !gone.contains(&error.kind()) => Err(pin_error(&self.folder, error)),
            _ => Ok(()),
        }
    }
}

impl Layout {
    /// How a map differs, in words.
    fn mismatch(&self, found: &MapInfo) -> Option<String> {
        let name = found.name_as_str().unwrap_or_default();
        if name != self.name {
            return Some(format!("it is {name}, wanted is {}", self.name));
        }
        match found.map_type() {
            Ok(kind) if kind == self.kind => {}
            kind => return Some(format!("its type is {kind:?}, wanted is {:?}", self.kind)),
        }
        let sizes = [
            ("keys", found.key_size() as usize, self.key_bytes),
            ("values", found.value_size() as usize, self.value_bytes),
        ];
        if let Some((what, is, wanted)) = sizes.into_iter().find(|(_, is, wanted)| is != wanted) {
            return Some(format!("its {what} have {is} bytes, wanted are {wanted}"));
        }
        let entries = found.max_entries();
        (entries != self.entries).then(|| format!("it has {entries} entries, wanted are {}", self.entries))
    }
}

fn pin_error(path: &Path, source: io::Error) -> TelemetryError {
    TelemetryError::Pin { path: path.to_owned(), source }
}
