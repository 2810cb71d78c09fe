//! Writes a cpio archive in the "newc" format, as the kernel's early user space wants it
//! (Documentation/driver-api/early-userspace/buffer-format.rst).

use std::collections::BTreeSet;

/// An archive in the making. Folders appear by themselves, before what they hold.
#[derive(Default)]
pub(crate) struct Archive {
    bytes: Vec<u8>,
    folders: BTreeSet<String>,
    entries: u32,
}

const FOLDER: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

impl Archive {
    pub(crate) fn folder(&mut self, path: &str, mode: u32) {
        self.parents(path);
        if self.folders.insert(path.to_owned()) {
            self.entry(path, FOLDER | mode, (0, 0), &[]);
        }
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.parents(path);
        self.entry(path, FILE | mode, (0, 0), content);
    }

    pub(crate) fn link(&mut self, path: &str, to: &str) {
        self.parents(path);
        self.entry(path, LINK | 0o777, (0, 0), to.as_bytes());
    }

    pub(crate) fn character_device(&mut self, path: &str, major: u32, minor: u32) {
        self.parents(path);
        self.entry(path, CHARACTER_DEVICE | 0o600, (major, minor), &[]);
    }

    pub(crate) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn parents(&mut self, path: &str) {
        for (at, _) in path.match_indices('/') {
            let parent = &path[..at];
            if self.folders.insert(parent.to_owned()) {
                self.entry(parent, FOLDER | 0o755, (0, 0), &[]);
            }
        }
    }

    fn entry(&mut self, path: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let links = if mode & FOLDER == FOLDER { 2 } else { 1 };
        // Files of the initramfs are far below the format's 4 GiB.
        let length = content.len() as u32;
        let fields =
            [self.entries, mode, 0, 0, links, 0, length, 0, 0, device.0, device.1, path.len() as u32 + 1, 0];
        self.bytes.extend_from_slice(b"070701");
        for field in fields {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_come_before_what_they_hold_and_once() {
        let mut archive = Archive::default();
        archive.file("a/b/one", 0o644, b"1");
        archive.file("a/b/two", 0o644, b"22");
        archive.folder("a", 0o700);
        let bytes = archive.finish();
        let names: Vec<usize> = [&b"a\0"[..], b"a/b\0", b"a/b/one\0", b"a/b/two\0", b"TRAILER!!!\0"]
            .iter()
            .map(|name| {
                bytes.windows(name.len()).position(|window| window == *name).expect("is in the archive")
            })
            .collect();
        assert!(names.is_sorted());
        assert_eq!(bytes.windows(6).filter(|window| window == b"070701").count(), 5);
        assert_eq!(bytes.len() % 4, 0);
    }
}
