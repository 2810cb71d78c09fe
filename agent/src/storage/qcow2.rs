//! The head of a qcow2 file, as far as it can lead QEMU astray
//! (<https://qemu.readthedocs.io/en/latest/interop/qcow2.html>). Pure.

/// Bytes of a file that [`Header::parse`] wants; a shorter file gives what it has.
pub const HEADER_BYTES: usize = 104;

/// What a qcow2 file says of itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Size of the disk that a guest sees, in bytes.
    pub virtual_size_bytes: u64,
    /// The unit in which its data lies, in bytes.
    pub cluster_bytes: u64,
}

/// Why a file is not taken for a qcow2 disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    /// No qcow2 at all.
    #[error("the file is not a qcow2 image")]
    NotQcow2,
    /// Of another version.
    #[error("qcow2 version {0} is not known, only 2 and 3 are")]
    Version(u32),
    /// It names another file to be read.
    #[error("the image has a backing file, which is refused: flatten it with `qemu-img convert`")]
    BackingFile,
    /// Its data lies in another file.
    #[error("the image keeps its data in an external file, which is refused")]
    DataFile,
    /// It says it is broken.
    #[error("the image is marked corrupt: repair it with `qemu-img check -r all`")]
    Corrupt,
    /// Its counts of references may be off.
    #[error("the image was not closed cleanly: repair it with `qemu-img check -r all`")]
    Dirty,
    /// It is encrypted with a key that nobody gives.
    #[error("the image is encrypted, which is not supported")]
    Encrypted,
    /// A figure is outside what QEMU takes.
    #[error("the image's header contradicts itself")]
    Nonsense,
    /// It uses what we cannot read.
    #[error("the image uses {0}, which is not read here: rewrite it with `qemu-img convert -O qcow2`")]
    Feature(&'static str),
    /// A table is larger than any image needs, or lies outside the file.
    #[error("the image's {0} is larger than any image needs, or lies outside of the file")]
    Table(&'static str),
}

impl Header {
    /// Reads the first bytes of a file.
    ///
    /// # Errors
    /// [`HeaderError`]: anything but a self-contained, healthy, unencrypted image.
    pub fn parse(bytes: &[u8]) -> Result<Self, HeaderError> {
        if bytes.get(..4) != Some(b"QFI\xfb") {
            return Err(HeaderError::NotQcow2);
        }
        let version = u32_at(bytes, 4)?;
        if !(2..=3).contains(&version) {
            return Err(HeaderError::Version(version));
        }
        if u64_at(bytes, 8)? != 0 || u32_at(bytes, 16)? != 0 {
            return Err(HeaderError::BackingFile);
        }
        let cluster_bits = u32_at(bytes, 20)?;
        let virtual_size_bytes = u64_at(bytes, 24)?;
        if !(9..=21).contains(&cluster_bits) || virtual_size_bytes > i64::MAX as u64 {
            return Err(HeaderError::Nonsense);
        }
        if u32_at(bytes, 32)? != 0 {
            return Err(HeaderError::Encrypted);
        }
        if version == 3 {
            let incompatible = u64_at(bytes, 72)?;
            if incompatible & 0b10 != 0 {
                return Err(HeaderError::Corrupt);
            }
            if incompatible & 0b100 != 0 {
                return Err(HeaderError::DataFile);
            }
        }
        Ok(Self { version, virtual_size_bytes, cluster_bytes: 1 << cluster_bits })
    }
}

/// Most bytes of a first-level table, as in QEMU.
const MAX_L1_BYTES: u64 = 32 << 20;

/// Most bytes of a table of reference counts, as in QEMU.
const MAX_REFCOUNT_TABLE_BYTES: u64 = 8 << 20;

/// Most snapshots, as in QEMU.
const MAX_SNAPSHOTS: u32 = 65_536;

/// Looks at what a reader of the tables would have to hold, before anything of that size is read. `bytes` is a head
/// that [`Header::parse`] took, of a file of `file_bytes`.
///
/// # Errors
/// [`HeaderError::Feature`] for what only QEMU reads, [`HeaderError::Dirty`], [`HeaderError::Table`] for tables that cannot be.
pub fn check_tables(bytes: &[u8], file_bytes: u64) -> Result<(), HeaderError> {
    let version = u32_at(bytes, 4)?;
    let cluster_bits = u32_at(bytes, 20)?;
    let virtual_size_bytes = u64_at(bytes, 24)?;
    let l1_bytes = u64::from(u32_at(bytes, 36)?) * 8;
    let l1_offset = u64_at(bytes, 40)?;
    if version == 3 {
        match u64_at(bytes, 72)? {
            0 => {}
            bits if bits & 0b1000 != 0 => {
                return Err(HeaderError::Feature("a compression other than deflate"));
            }
            bits if bits & 0b1_0000 != 0 => return Err(HeaderError::Feature("subclusters")),
            1 => return Err(HeaderError::Dirty),
            _ => return Err(HeaderError::Feature("a feature that is not known")),
        }
    }
    // One entry of the first table stands for a cluster of 8-byte entries, each of which is a cluster.
    let spans_bits = cluster_bits + cluster_bits - 3;
    let needed = virtual_size_bytes.div_ceil(1 << spans_bits) * 8;
    let within = l1_offset.checked_add(l1_bytes).is_some_and(|end| end <= file_bytes);
    if l1_bytes > MAX_L1_BYTES || l1_bytes < needed || (l1_bytes > 0 && !within) {
        return Err(HeaderError::Table("first-level table"));
    }
    let refcounts = u64::from(u32_at(bytes, 56)?) << cluster_bits;
    if refcounts > MAX_REFCOUNT_TABLE_BYTES || u64_at(bytes, 48)? > file_bytes {
        return Err(HeaderError::Table("table of reference counts"));
    }
    if u32_at(bytes, 60)? > MAX_SNAPSHOTS {
        return Err(HeaderError::Table("list of snapshots"));
    }
    Ok(())
}

/// Bytes of one entry in a table of feature names.
const FEATURE_NAME_BYTES: usize = 48;

/// Looks at the extensions behind a head of version 3, which lie in the first cluster: a table of feature names that
/// ends within an entry makes its reader panic. `cluster` is as much of that cluster as the file has.
///
/// # Errors
/// [`HeaderError::Nonsense`].
pub fn check_extensions(cluster: &[u8]) -> Result<(), HeaderError> {
    const FEATURE_NAMES: u32 = 0x6803_f857;
    let mut offset = u32_at(cluster, 100)? as usize;
    loop {
        // The reader takes what is behind the file's end for zeros, and type 0 for the last.
        let Ok(kind) = u32_at(cluster, offset) else { return Ok(()) };
        let length = u32_at(cluster, offset + 4)? as usize;
        match kind {
            0 => return Ok(()),
            FEATURE_NAMES if !length.is_multiple_of(FEATURE_NAME_BYTES) => return Err(HeaderError::Nonsense),
            _ => offset += 8 + length.next_multiple_of(8),
        }
    }
}

fn u32_at(bytes: &[u8], offset: usize) -> Result<u32, HeaderError> {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk()).ok_or(HeaderError::Nonsense)?;
    Ok(u32::from_be_bytes(*field))
}

fn u64_at(bytes: &[u8], offset: usize) -> Result<u64, HeaderError> {
    let field = bytes.get(offset..).and_then(|rest| rest.first_chunk()).ok_or(HeaderError::Nonsense)?;
    Ok(u64::from_be_bytes(*field))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 3 header of a disk of that size.
    pub(crate) fn header(virtual_size_bytes: u64) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        bytes[..4].copy_from_slice(b"QFI\xfb");
        bytes[4..8].copy_from_slice(&3_u32.to_be_bytes());
        bytes[20..24].copy_from_slice(&16_u32.to_be_bytes());
        bytes[24..32].copy_from_slice(&virtual_size_bytes.to_be_bytes());
        bytes
    }

    #[test]
    fn a_self_contained_image_tells_its_size() {
        assert_eq!(
            Header::parse(&header(7 << 20)),
            Ok(Header { version: 3, virtual_size_bytes: 7 << 20, cluster_bytes: 65_536 })
        );
    }

    #[test]
    fn an_image_that_leads_to_another_file_is_refused() {
        let mut backing = header(1 << 20);
        backing[15] = 200;
        assert_eq!(Header::parse(&backing), Err(HeaderError::BackingFile));
        let mut data_file = header(1 << 20);
        data_file[79] = 0b100;
        assert_eq!(Header::parse(&data_file), Err(HeaderError::DataFile));
    }

    #[test]
    fn a_damaged_or_foreign_file_is_refused_with_its_reason() {
        let mut corrupt = header(1 << 20);
        corrupt[79] = 0b10;
        assert_eq!(Header::parse(&corrupt), Err(HeaderError::Corrupt));
        let mut encrypted = header(1 << 20);
        encrypted[35] = 1;
        assert_eq!(Header::parse(&encrypted), Err(HeaderError::Encrypted));
        assert_eq!(Header::parse(&header(u64::MAX)), Err(HeaderError::Nonsense));
        assert_eq!(Header::parse(&header(1 << 20)[..40]), Err(HeaderError::Nonsense));
        assert_eq!(Header::parse(b"\x7fELF"), Err(HeaderError::NotQcow2));
    }

    #[test]
    fn tables_that_no_image_needs_are_refused_before_they_are_read() {
        let mut good = header(1 << 30);
        good[36..40].copy_from_slice(&2_u32.to_be_bytes());
        good[40..48].copy_from_slice(&65_536_u64.to_be_bytes());
        assert_eq!(check_tables(&good, 1 << 20), Ok(()));
        assert_eq!(check_tables(&good, 65_537), Err(HeaderError::Table("first-level table")), "outside");
        let with = |at: usize, bytes: &[u8]| {
            let mut head = good.clone();
            head[at..at + bytes.len()].copy_from_slice(bytes);
            check_tables(&head, 1 << 20)
        };
        assert_eq!(with(36, &u32::MAX.to_be_bytes()), Err(HeaderError::Table("first-level table")));
        assert_eq!(with(36, &1_u32.to_be_bytes()), Err(HeaderError::Table("first-level table")));
        assert_eq!(with(40, &u64::MAX.to_be_bytes()), Err(HeaderError::Table("first-level table")));
        assert_eq!(with(56, &u32::MAX.to_be_bytes()), Err(HeaderError::Table("table of reference counts")));
        assert_eq!(with(60, &u32::MAX.to_be_bytes()), Err(HeaderError::Table("list of snapshots")));
        assert_eq!(with(79, &[1]), Err(HeaderError::Dirty));
        for bits in [8, 16, 32] {
            assert!(matches!(with(79, &[bits]), Err(HeaderError::Feature(_))), "{bits}");
        }
    }

    #[test]
    fn a_table_of_feature_names_that_ends_within_a_name_is_refused() {
        let with = |extensions: &[(u32, u32)]| {
            let mut cluster = header(1 << 20);
            cluster[100..104].copy_from_slice(&104_u32.to_be_bytes());
            for (kind, length) in extensions {
                cluster.extend(kind.to_be_bytes());
                cluster.extend(length.to_be_bytes());
                cluster.resize(cluster.len() + length.next_multiple_of(8) as usize, 0);
            }
            check_extensions(&cluster)
        };
        assert_eq!(with(&[(1, 5), (0x6803_f857, 96), (0, 0)]), Ok(()));
        assert_eq!(with(&[(1, 5), (0x6803_f857, 49), (0, 0)]), Err(HeaderError::Nonsense));
        assert_eq!(with(&[(0, 0), (0x6803_f857, 49)]), Ok(()), "behind the last");
        assert_eq!(with(&[]), Ok(()));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(tail in proptest::collection::vec(any::<u8>(), 0..128)) {
            let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
            bytes.extend(tail);
            if Header::parse(&bytes).is_ok() {
                let _ = check_tables(&bytes, 1 << 20);
                let _ = check_extensions(&bytes);
            }
        }
    }
}
