//! The folder of pinned maps and attachments on a BPF file system.

use super::TelemetryError;
use aya::maps::{MapData, MapError, MapInfo, MapType};
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// What the name of a map that is set aside ends with.
const ASIDE: &str = "_aside";

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

    /// Makes way for a map of this layout, if the pinned one is of another. One that differs in nothing but its
    /// number of entries is set aside for [`Self::take_aside`]; of any other the content is lost, so it says why.
    pub(super) fn make_way(&self, pin: &str, wanted: &Layout) -> Result<(), TelemetryError> {
        let Some(found) = self.find(pin, wanted.name)? else { return Ok(()) };
        let Some(mismatch) = wanted.mismatch(&found) else { return Ok(()) };
        let aside = format!("{pin}{ASIDE}");
        let path = self.path(pin);
        if matches!(mismatch, Mismatch::Entries(_)) && self.find(&aside, wanted.name)?.is_none() {
            tracing::info!(path = %path.display(), reason = %mismatch, "a pinned map is made anew, with its content");
            return fs::rename(&path, self.path(&aside)).map_err(|error| pin_error(&path, error));
        }
        tracing::warn!(path = %path.display(), reason = %mismatch, "a pinned map is made anew, its content is lost");
        self.remove(pin)
    }

    /// The map that [`Self::make_way`] has set aside, if there is one. [`Self::remove_aside`] ends it.
    pub(super) fn take_aside(
        &self,
        pin: &str,
        name: &'static str,
    ) -> Result<Option<MapData>, TelemetryError> {
        let aside = format!("{pin}{ASIDE}");
        if self.find(&aside, name)?.is_none() {
            return Ok(None);
        }
        MapData::from_pin(self.path(&aside))
            .map(Some)
            .map_err(|source| TelemetryError::Map { map: name, source: Box::new(source) })
    }

    pub(super) fn remove_aside(&self, pin: &str) -> Result<(), TelemetryError> {
        self.remove(&format!("{pin}{ASIDE}"))
    }

    fn find(&self, pin: &str, name: &'static str) -> Result<Option<MapInfo>, TelemetryError> {
        match MapInfo::from_pin(self.path(pin)) {
            Ok(found) => Ok(Some(found)),
            Err(MapError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::NotFound => {
                Ok(None)
            }
            Err(source) => Err(TelemetryError::Map { map: name, source: Box::new(source) }),
        }
    }

    /// The names of all pins that begin with `prefix`, in order.
    pub(super) fn list(&self, prefix: &str) -> Result<Vec<String>, TelemetryError> {
        let entries = fs::read_dir(&self.folder).map_err(|error| pin_error(&self.folder, error))?;
        let names = entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let mut names: Vec<String> = names.filter(|name| name.starts_with(prefix)).collect();
        names.sort_unstable();
        Ok(names)
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

/// How a map differs.
#[derive(Debug, thiserror::Error)]
enum Mismatch {
    #[error("{0}")]
    Layout(String),
    #[error("{0}")]
    Entries(String),
}

impl Layout {
    fn mismatch(&self, found: &MapInfo) -> Option<Mismatch> {
        let differs = |text: String| Some(Mismatch::Layout(text));
        let name = found.name_as_str().unwrap_or_default();
        // The kernel keeps fifteen characters.
        if name != &self.name[..self.name.len().min(15)] {
            return differs(format!("it is {name}, wanted is {}", self.name));
        }
        match found.map_type() {
            Ok(kind) if kind == self.kind => {}
            kind => return differs(format!("its type is {kind:?}, wanted is {:?}", self.kind)),
        }
        let sizes = [
            ("keys", found.key_size() as usize, self.key_bytes),
            ("values", found.value_size() as usize, self.value_bytes),
        ];
        if let Some((what, is, wanted)) = sizes.into_iter().find(|(_, is, wanted)| is != wanted) {
            return differs(format!("its {what} have {is} bytes, wanted are {wanted}"));
        }
        let entries = found.max_entries();
        (entries != self.entries)
            .then(|| Mismatch::Entries(format!("it has {entries} entries, wanted are {}", self.entries)))
    }
}

fn pin_error(path: &Path, source: io::Error) -> TelemetryError {
    TelemetryError::Pin { path: path.to_owned(), source }
}
