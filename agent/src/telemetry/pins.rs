//! The folder of pinned maps and attachments on a BPF file system.

use super::TelemetryError;
use aya::maps::{MapData, MapError, MapInfo, MapType};
use aya::util::KernelVersion;
use nix::sys::statfs::{BPF_FS_MAGIC, statfs};
use nix::sys::utsname::uname;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The first kernel with TCX.
const OLDEST: KernelVersion = KernelVersion::new(6, 6, 0);

/// What follows a map's pin in the pin of one that is set aside.
const ASIDE: &str = "_aside";

/// What the pin of a map that is kept for a later agent ends with.
const LATER: &str = "_later";

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
    pub(super) content: Content,
}

/// What a map holds, and so what becomes of it when a map of another layout takes its place.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Content {
    /// What the agent was told, and writes again before its programs take the place of others.
    Told,
    /// Counts. Those of these earlier layouts are taken over.
    Counted(&'static [Earlier]),
    /// Nothing that anybody would miss.
    Passing,
}

/// A layout that a map had before, of the same type.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Earlier {
    name: &'static str,
    key_bytes: usize,
    value_bytes: usize,
}

impl Earlier {
    pub(super) const fn new<K, V>(name: &'static str) -> Self {
        Self { name, key_bytes: size_of::<K>(), value_bytes: size_of::<V>() }
    }

    fn is(&self, found: &MapInfo) -> bool {
        found.name_as_str().is_some_and(|name| name == self.name)
            && found.key_size() as usize == self.key_bytes
            && found.value_size() as usize == self.value_bytes
    }
}

impl Pins {
    /// The folder on the BPF file system at `bpffs`, made if it is not there.
    pub(super) fn open(bpffs: &Path) -> Result<Self, TelemetryError> {
        if KernelVersion::current().is_ok_and(|found| found < OLDEST) {
            let release = uname().map(|names| names.release().to_string_lossy().into_owned());
            return Err(TelemetryError::OldKernel { release: release.unwrap_or_default() });
        }
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

    /// Makes way for a map of this layout, if the pinned one is of another. Content that can be used is set aside
    /// for [`Self::asides`]; counts of a later agent are kept for the day when it is back.
    pub(super) fn make_way(&self, pin: &str, wanted: &Layout) -> Result<(), TelemetryError> {
        self.bring_back(pin, wanted)?;
        let Some(found) = self.find(pin, wanted.name)? else { return Ok(()) };
        let Some(mismatch) = wanted.mismatch(&found) else { return Ok(()) };
        let path = self.path(pin);
        let is_counted = matches!(wanted.content, Content::Counted(_));
        if wanted.can_use(&found) {
            tracing::info!(path = %path.display(), reason = %mismatch, "a pinned map is made anew, with its content");
            return self.set_aside(pin);
        }
        if is_counted && wanted.is_before(&found) {
            tracing::warn!(
                path = %path.display(),
                reason = %mismatch,
                "a later agent has counted here: its counts are kept for it, and this one's begin at zero"
            );
            return self.rename(pin, &format!("{pin}{LATER}"));
        }
        match wanted.content {
            Content::Counted(_) => tracing::warn!(
                path = %path.display(),
                reason = %mismatch,
                "a pinned map is made anew, its counts are lost"
            ),
            Content::Told | Content::Passing => {
                tracing::info!(path = %path.display(), reason = %mismatch, "a pinned map is made anew");
            }
        }
        self.remove(pin)
    }

    /// Puts the map that an earlier agent has kept for this one in its place. What that agent has counted meanwhile is
    /// set aside.
    fn bring_back(&self, pin: &str, wanted: &Layout) -> Result<(), TelemetryError> {
        let later = format!("{pin}{LATER}");
        let Some(kept) = self.find(&later, wanted.name)? else { return Ok(()) };
        if wanted.is_before(&kept) {
            return Ok(());
        }
        match self.find(pin, wanted.name)? {
            Some(found) if wanted.can_use(&found) => self.set_aside(pin)?,
            Some(_) => self.remove(pin)?,
            None => {}
        }
        self.rename(&later, pin)
    }

    fn set_aside(&self, pin: &str) -> Result<(), TelemetryError> {
        let mut number = self.list(&format!("{pin}{ASIDE}"))?.len();
        while self.path(&format!("{pin}{ASIDE}{number}")).exists() {
            number += 1;
        }
        self.rename(pin, &format!("{pin}{ASIDE}{number}"))
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), TelemetryError> {
        let path = self.path(from);
        fs::rename(&path, self.path(to)).map_err(|error| pin_error(&path, error))
    }

    /// The maps that [`Self::make_way`] has set aside, by their pins; [`Self::remove`] ends one.
    pub(super) fn asides(
        &self,
        pin: &str,
        name: &'static str,
    ) -> Result<Vec<(String, MapData)>, TelemetryError> {
        let open = |aside: String| {
            let map = MapData::from_pin(self.path(&aside));
            map.map(|map| (aside, map))
                .map_err(|source| TelemetryError::Map { map: name, source: Box::new(source) })
        };
        self.list(&format!("{pin}{ASIDE}"))?.into_iter().map(open).collect()
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

    /// Unpins what was set aside of a map.
    pub(super) fn remove_asides(&self, pin: &str) -> Result<(), TelemetryError> {
        self.list(&format!("{pin}{ASIDE}"))?.iter().try_for_each(|aside| self.remove(aside))
    }

    /// Unpins a map, and what was set aside or kept of it.
    pub(super) fn remove_all(&self, pin: &str) -> Result<(), TelemetryError> {
        self.remove_asides(pin)?;
        self.remove(&format!("{pin}{LATER}"))?;
        self.remove(pin)
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
    /// How a map differs; none if it does not.
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

    /// Whether a map's content can be taken over.
    fn can_use(&self, found: &MapInfo) -> bool {
        let ours = Earlier { name: self.name, key_bytes: self.key_bytes, value_bytes: self.value_bytes };
        let is_of_its_type = found.map_type().is_ok_and(|kind| kind == self.kind);
        is_of_its_type
            && match self.content {
                Content::Told => ours.is(found),
                Content::Counted(earlier) => ours.is(found) || earlier.iter().any(|layout| layout.is(found)),
                Content::Passing => false,
            }
    }

    /// Whether a map is of a later layout, by the number at the end of its name.
    fn is_before(&self, found: &MapInfo) -> bool {
        let number = |name: &str| {
            let (stem, number) = name.rsplit_once("_V")?;
            Some((stem.to_owned(), number.parse::<u32>().ok()?))
        };
        match (number(self.name), number(found.name_as_str().unwrap_or_default())) {
            (Some((ours, our)), Some((theirs, their))) => ours == theirs && our < their,
            _ => false,
        }
    }
}

fn pin_error(path: &Path, source: io::Error) -> TelemetryError {
    TelemetryError::Pin { path: path.to_owned(), source }
}
