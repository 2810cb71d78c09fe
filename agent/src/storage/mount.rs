//! A share of an NFS server, mounted by the agent. Runs in a helper process: each call here may hang with the server.

use super::{StorageError, io_error};
use serde::{Deserialize, Serialize};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Versions from the best on. 4.2 copies on the server and knows holes; 4.1 has locks of its own; 3 has neither.
const VERSIONS: [&str; 3] = ["4.2", "4.1", "3"];

/// Options that this module decides, or that would undo what it checks.
const OURS: [&str; 14] = [
    "addr",
    "bg",
    "clientaddr",
    "hard",
    "minorversion",
    "mountaddr",
    "nfsvers",
    "nolock",
    "remount",
    "ro",
    "soft",
    "softerr",
    "v3",
    "vers",
];

/// What a mount does when the server does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Outage {
    /// Requests are tried for as long as `timeo` and `retrans` say (three minutes, unless they are set), then fail
    /// with "timed out". The default: a copy that a dead server holds ends some day, and with an error that is told
    /// apart from a broken disk (`soft` says EIO for both). A guest's disk is stopped at such an error, not failed.
    #[default]
    Softerr,
    /// Requests are tried for ever. A process that waits so cannot even be killed until the server is back.
    Hard,
}

/// A share, as `[nfs]` in agent.toml says it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// Name or address; an IPv6 address without brackets.
    pub server: String,
    /// The exported folder, absolute.
    pub export: String,
    /// "4.2", "4.1" or "3"; none: the best that the server has.
    #[serde(default)]
    pub version: Option<String>,
    /// What happens when the server does not answer.
    #[serde(default)]
    pub on_outage: Outage,
    /// More mount options (nfs(5)), such as "nconnect=4".
    #[serde(default)]
    pub options: Vec<String>,
    /// Unmount after so many seconds without use; 0: never.
    #[serde(default = "ten_minutes")]
    pub idle_seconds: u64,
}

fn ten_minutes() -> u64 {
    600
}

impl fmt::Display for Share {
    /// As mount(8) and /proc/self/mountinfo write it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.server.contains(':') {
            true => write!(f, "[{}]:{}", self.server, self.export),
            false => write!(f, "{}:{}", self.server, self.export),
        }
    }
}

impl Share {
    /// What is wrong with it, for the person who wrote it.
    ///
    /// # Errors
    /// The key and the reason.
    pub fn check(&self) -> Result<(), String> {
        let odd = |text: &str| text.is_empty() || text.chars().any(|c| c.is_whitespace() || c.is_control());
        let server = self.server.chars().all(|c| c.is_ascii_alphanumeric() || "-._:".contains(c));
        if odd(&self.server) || !server || self.server.starts_with('-') {
            return Err(format!("server = {:?} is no name or address", self.server));
        }
        let climbs = self.export.split('/').any(|part| part == "..");
        if odd(&self.export) || !self.export.starts_with('/') || climbs {
            return Err(format!("export = {:?} is no absolute path", self.export));
        }
        if let Some(version) = self.version.as_deref().filter(|version| !VERSIONS.contains(version)) {
            return Err(format!("version = {version:?} is none of {}", VERSIONS.join(", ")));
        }
        for option in &self.options {
            let name = option.split('=').next().unwrap_or_default();
            if odd(option) || option.contains(',') || option.starts_with('-') {
                return Err(format!("options: {option:?} is no mount option; write one to each string"));
            }
            if OURS.contains(&name) {
                return Err(format!("options: {option:?} is decided by the agent (version, on_outage)"));
            }
        }
        Ok(())
    }

    /// Options for one version.
    fn mount_options(&self, version: &str) -> String {
        let outage = match self.on_outage {
            Outage::Softerr => "softerr",
            Outage::Hard => "hard",
        };
        let ours = [format!("vers={version}"), "proto=tcp".to_owned(), outage.to_owned()];
        // noatime saves a request; nosuid, nodev: nothing on a pool is a program.
        let fixed = ["noatime", "nosuid", "nodev"].map(str::to_owned);
        ours.iter().chain(&fixed).chain(&self.options).cloned().collect::<Vec<_>>().join(",")
    }
}

/// What is mounted at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mounted {
    /// `nfs4`, `ext4`, …
    pub kind: String,
    /// `server:/export`, or a disk.
    pub source: String,
    /// Of the file system, as text: `vers=4.2,…`.
    pub options: String,
}

/// What is mounted at `path`, from /proc alone: the mount itself is not touched.
pub fn mounted_at(path: &Path) -> Option<Mounted> {
    find(&fs::read_to_string("/proc/self/mountinfo").ok()?, path)
}

/// The last line of a mountinfo table (proc_pid_mountinfo(5)) for that path: later ones cover earlier ones.
fn find(table: &str, path: &Path) -> Option<Mounted> {
    table.lines().rev().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if Path::new(&unescape(before.split(' ').nth(4)?)) != path {
            return None;
        }
        let mut fields = after.split(' ');
        let (kind, source, options) = (fields.next()?, fields.next()?, fields.next().unwrap_or_default());
        Some(Mounted { kind: kind.to_owned(), source: unescape(source), options: options.to_owned() })
    })
}

/// The kernel writes blanks, line ends and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        let digits = rest.get(at + 1..at + 4).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match digits {
            Some(byte) => out.push(char::from(byte)),
            None => out.push_str(rest.get(at..at + 4).unwrap_or(&rest[at..])),
        }
        rest = rest.get(at + 4..).unwrap_or_default();
    }
    out + rest
}

/// Whether `share` is mounted at `path`.
///
/// # Errors
/// [`StorageError::WrongMount`] when something else is.
pub fn is_mounted(share: &Share, path: &Path) -> Result<bool, StorageError> {
    match mounted_at(path) {
        None => Ok(false),
        Some(mounted) if mounted.kind.starts_with("nfs") && same_export(&mounted.source, share) => Ok(true),
        Some(mounted) => Err(StorageError::WrongMount {
            path: path.to_owned(),
            found: mounted.source,
            wanted: share.to_string(),
        }),
    }
}

/// A trailing slash is the same folder.
fn same_export(source: &str, share: &Share) -> bool {
    let bare = |text: &str| text.trim_end_matches('/').to_owned();
    bare(source) == bare(&share.to_string())
}

/// Mounts `share` at `path`, which is made; true when it was there already.
///
/// # Errors
/// [`StorageError::WrongMount`]; [`StorageError::Mount`] with what mount(8) said of each version.
pub(super) fn ensure(share: &Share, path: &Path) -> Result<bool, StorageError> {
    if is_mounted(share, path)? {
        return Ok(true);
    }
    fs::create_dir_all(path).map_err(io_error("create", path))?;
    let all = VERSIONS.map(str::to_owned).to_vec();
    let versions = share.version.clone().map_or(all, |version| vec![version]);
    let mut said = String::new();
    for version in versions {
        let options = share.mount_options(&version);
        let mut command = Command::new("mount");
        command.args(["-t", "nfs", "-o", &options, "--"]).arg(share.to_string()).arg(path);
        let output = command.env("LC_ALL", "C").output().map_err(io_error("mount", path))?;
        if output.status.success() {
            return is_mounted(share, path).map(|_| false);
        }
        let text = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
        said.push_str(&format!("{}version {version}: {text}", if said.is_empty() { "" } else { ". " }));
        if !speaks_of_the_version(&text) {
            break;
        }
    }
    Err(StorageError::Mount { share: share.to_string(), said })
}

/// Whether mount.nfs(8) failed for want of the version: only then is an older one worth a try.
fn speaks_of_the_version(said: &str) -> bool {
    [
        "rotocol not supported",
        "version or transport protocol is not supported",
        "NFS version",
        "Protocol family",
    ]
    .iter()
    .any(|words| said.contains(words))
}

/// Unmounts what is at `path`; false when somebody uses it.
///
/// # Errors
/// What umount(8) said.
pub(super) fn unmount(path: &Path) -> Result<bool, StorageError> {
    if mounted_at(path).is_none() {
        return Ok(true);
    }
    let output = Command::new("umount").arg("--").arg(path).env("LC_ALL", "C").output();
    let output = output.map_err(io_error("unmount", path))?;
    let said = String::from_utf8_lossy(&output.stderr);
    if output.status.success() || mounted_at(path).is_none() {
        return Ok(true);
    }
    if said.contains("busy") {
        return Ok(false);
    }
    Err(StorageError::Mount {
        share: PathBuf::from(path).display().to_string(),
        said: said.trim().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn share() -> Share {
        Share {
            server: "198.51.100.7".into(),
            export: "/srv/godwit".into(),
            version: None,
            on_outage: Outage::default(),
            options: vec![],
            idle_seconds: 600,
        }
    }

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
40 22 0:47 / /srv/godwit rw,noatime shared:20 - nfs4 198.51.100.7:/srv/godwit rw,vers=4.2,softerr
41 22 0:48 / /srv/a\\040b rw - nfs4 [fd00::1]:/x rw,vers=4.1
42 22 0:49 / /srv/twice rw - tmpfs one rw
43 42 0:50 / /srv/twice rw - tmpfs two rw
";

    #[test]
    fn a_mount_is_found_by_its_path_and_the_last_one_counts() {
        let found = find(TABLE, Path::new("/srv/godwit")).unwrap();
        assert_eq!((&*found.kind, &*found.options), ("nfs4", "rw,vers=4.2,softerr"));
        assert!(same_export(&found.source, &share()));
        assert!(same_export("198.51.100.7:/srv/godwit/", &share()));
        assert!(!same_export("198.51.100.7:/srv/godwit2", &share()));
        let six = Share { server: "fd00::1".into(), export: "/x".into(), ..share() };
        assert!(same_export(&find(TABLE, Path::new("/srv/a b")).unwrap().source, &six));
        assert_eq!(find(TABLE, Path::new("/srv/twice")).unwrap().source, "two");
        assert_eq!(find(TABLE, Path::new("/srv")), None);
    }

    #[test]
    fn escapes_of_any_kind_are_read_without_panic() {
        assert_eq!(unescape("a\\040b\\134c"), "a b\\c");
        for odd in ["\\", "a\\9", "a\\999z", "\\04", "\\é1", "x\\é"] {
            let _ = unescape(odd);
        }
    }

    #[test]
    fn a_share_is_mounted_softly_unless_said_otherwise() {
        let options = share().mount_options("4.2");
        assert_eq!(options, "vers=4.2,proto=tcp,softerr,noatime,nosuid,nodev");
        let hard = Share { on_outage: Outage::Hard, options: vec!["nconnect=4".into()], ..share() };
        assert!(hard.mount_options("3").starts_with("vers=3,proto=tcp,hard,"));
        assert!(hard.mount_options("3").ends_with(",nconnect=4"));
    }

    #[test]
    fn a_wrong_share_is_refused_with_its_key() {
        for (wrong, key) in [
            (Share { server: "a b".into(), ..share() }, "server"),
            (Share { server: "-o".into(), ..share() }, "server"),
            (Share { server: String::new(), ..share() }, "server"),
            (Share { export: "srv".into(), ..share() }, "export"),
            (Share { export: "/a/../b".into(), ..share() }, "export"),
            (Share { export: "/a\nb".into(), ..share() }, "export"),
            (Share { version: Some("4".into()), ..share() }, "version"),
            (Share { options: vec!["a,b".into()], ..share() }, "options"),
            (Share { options: vec!["vers=3".into()], ..share() }, "options"),
            (Share { options: vec!["soft".into()], ..share() }, "options"),
        ] {
            let said = wrong.check().unwrap_err();
            assert!(said.contains(key), "{said}");
        }
        share().check().unwrap();
        Share { server: "nfs.example".into(), version: Some("4.1".into()), ..share() }.check().unwrap();
    }

    #[test]
    fn something_else_at_the_path_is_refused_and_left_alone() {
        let error = is_mounted(&share(), Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("proc") && error.contains("198.51.100.7:/srv/godwit"), "{error}");
        assert!(!is_mounted(&share(), Path::new("/nonexistent/x")).unwrap());
    }
}
