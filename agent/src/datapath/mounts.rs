//! What kind of file system a file is on, from /proc alone: nothing here touches a mount.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;

/// The mount that a file is on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Mount {
    /// `st_dev` of its files.
    pub(super) device: u64,
    /// As in /proc/filesystems: `ext4`, `xfs`, `tmpfs`, `nfs4`, …
    pub(super) kind: String,
    /// The disk or share.
    pub(super) origin: String,
    /// Options of the superblock, as text.
    options: String,
}

impl Mount {
    /// Of an open file.
    ///
    /// # Errors
    /// What reading the file's metadata says; what /proc does not tell is left empty.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        let device = file.metadata()?.dev();
        let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
        Ok(find(&table, device).unwrap_or(Mount {
            device,
            kind: String::new(),
            origin: String::new(),
            options: String::new(),
        }))
    }

    /// Kept in memory: no device, so no queue.
    pub(super) fn is_memory(&self) -> bool {
        matches!(&*self.kind, "tmpfs" | "ramfs" | "hugetlbfs")
    }

    /// A copy within this mount may be left to its server: NFS from 4.2 on, SMB and Ceph.
    pub(super) fn copies_on_server(&self) -> bool {
        match &*self.kind {
            "nfs4" => self.option("vers").is_some_and(|version| version == "4.2"),
            "cifs" | "smb3" | "ceph" => true,
            _ => false,
        }
    }

    /// The most bytes that one write takes to the server; none on local file systems.
    pub(super) fn write_bytes(&self) -> Option<usize> {
        self.option("wsize")?.parse().ok().filter(|bytes| *bytes >= 4096)
    }

    /// Names the mount across boots and remounts. Of a share the protocol's version belongs to it.
    pub(super) fn name(&self) -> String {
        let version = self.option("vers").map(|version| format!(" vers={version}"));
        format!("{} {}{}", self.kind, self.origin, version.unwrap_or_default())
    }

    #[cfg(test)]
    pub(super) fn for_test(kind: &str, options: &str) -> Self {
        Self { device: 1, kind: kind.into(), origin: "origin".into(), options: options.into() }
    }

    fn option(&self, name: &str) -> Option<&str> {
        self.options.split(',').find_map(|option| option.strip_prefix(name)?.strip_prefix('='))
    }
}

/// The line of /proc/self/mountinfo (proc_pid_mountinfo(5)) of that device.
fn find(table: &str, device: u64) -> Option<Mount> {
    let wanted = format!("{}:{}", libc::major(device), libc::minor(device));
    table.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if before.split(' ').nth(2)? != wanted {
            return None;
        }
        let mut fields = after.split(' ');
        Some(Mount {
            device,
            kind: fields.next()?.to_owned(),
            origin: fields.next()?.to_owned(),
            options: fields.next().unwrap_or_default().to_owned(),
        })
    })
}

/// How many COPY operations the NFS client has sent for all its mounts, from /proc/self/mountstats: evidence that a
/// server copies by itself, where copy_file_range(2) alone would not tell.
pub(super) fn nfs_copies() -> u64 {
    copies(&fs::read_to_string("/proc/self/mountstats").unwrap_or_default())
}

fn copies(mountstats: &str) -> u64 {
    let counts = mountstats.lines().filter_map(|line| line.trim().strip_prefix("COPY:"));
    counts.filter_map(|counts| counts.split_whitespace().next()?.parse::<u64>().ok()).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw,discard
40 22 0:47 / /mnt/a rw,relatime shared:20 master:3 - nfs4 198.18.0.1:/pool rw,vers=4.2,rsize=1048576,wsize=524288
41 22 0:48 / /mnt/b\\040c rw - nfs4 198.18.0.1:/old rw,vers=4.1,wsize=1024
";

    #[test]
    fn a_device_is_found_with_what_its_mount_says() {
        let disk = find(TABLE, libc::makedev(254, 0)).unwrap();
        assert_eq!((&*disk.kind, &*disk.origin, disk.write_bytes()), ("ext4", "/dev/vda", None));
        assert!(!disk.copies_on_server() && !disk.is_memory());
        let share = find(TABLE, libc::makedev(0, 47)).unwrap();
        assert_eq!(share.write_bytes(), Some(524_288));
        assert!(share.copies_on_server());
        assert_eq!(share.name(), "nfs4 198.18.0.1:/pool vers=4.2");
        assert_eq!(disk.name(), "ext4 /dev/vda");
        let old = find(TABLE, libc::makedev(0, 48)).unwrap();
        assert!(!old.copies_on_server());
        assert_eq!(old.write_bytes(), None, "less than a block is no size to go by");
        assert_eq!(find(TABLE, libc::makedev(9, 9)), None);
    }

    #[test]
    fn this_machines_memory_is_known_as_such() {
        let file = tempfile::tempfile_in("/dev/shm").unwrap();
        assert!(Mount::of(&file).unwrap().is_memory());
    }

    #[test]
    fn copies_of_all_mounts_are_counted() {
        let text = "device a mounted on b with fstype nfs4\n\tCLONE: 1 1 0\n\tCOPY: 7 7 0 1 2 3\n  COPY: 2 2 0\nCOPY:\n";
        assert_eq!(copies(text), 9);
        assert_eq!(copies(""), 0);
    }
}
