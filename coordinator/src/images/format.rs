//! What an image's first bytes say it is. This gate is pure and comes before any tool opens the file: image tools
//! follow what a header names (a backing file, a data file), and a user could have it name any file of the host.

use godwit_protocol::image::DiskFormat;

/// Bytes from the start of a file that [`inspect`] wants to see; fewer when the file is shorter.
pub(super) const HEADER_BYTES: usize = 64 << 10;

const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
/// Incompatible features that QEMU knows: dirty, corrupt, external data file, compression type, extended L2.
const KNOWN_FEATURES: u64 = 0b1_1111;
const CORRUPT: u64 = 1 << 1;
const EXTERNAL_DATA_FILE: u64 = 1 << 2;
/// The header extension that names an external data file.
const DATA_FILE_EXTENSION: u32 = 0x4441_5441;

/// Other formats by what is where in the file. A guest disk whose own first sector looked like one of these could
/// not be told from it, by us or by the tools.
const OTHERS: [(&str, usize, &[u8]); 11] = [
    ("qcow2", 0, QCOW2_MAGIC),
    ("qed", 0, b"QED\0"),
    ("vmdk", 0, b"KDMV"),
    ("vmdk", 0, b"COWD"),
    ("vmdk", 0, b"# Disk DescriptorFile"),
    ("vhdx", 0, b"vhdxfile"),
    ("vhd", 0, b"conectix"),
    ("vdi", 64, b"\x7f\x10\xda\xbe"),
    ("parallels", 0, b"WithoutFreeSpace"),
    ("parallels", 0, b"WithouFreSpacExt"),
    ("luks", 0, b"LUKS\xba\xbe"),
];

/// Why a file is not taken. The text is the user's.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum FormatError {
    #[error("the file is empty")]
    Empty,
    #[error("it is declared qcow2 but does not begin like one")]
    NotQcow2,
    #[error(
        "it is declared raw but its content is {0}; declare it as that if it is supported, else convert it with \
         `qemu-img convert -O qcow2`"
    )]
    NotRaw(&'static str),
    #[error("its qcow2 header is cut off")]
    Truncated,
    #[error("it is qcow2 version {0}; 2 and 3 are supported")]
    Version(u32),
    #[error("it has a backing file; flatten it with `qemu-img convert -O qcow2`")]
    BackingFile,
    #[error("it keeps its data in an external file; convert it with `qemu-img convert -O qcow2`")]
    ExternalDataFile,
    #[error("it is marked corrupt; repair it with `qemu-img check -r all`")]
    MarkedCorrupt,
    #[error("it needs qcow2 features that are not known here (mask {0:#x})")]
    UnknownFeatures(u64),
    #[error("it is encrypted")]
    Encrypted,
    #[error("its qcow2 header is not valid: {0}")]
    Invalid(&'static str),
}

/// Size of the disk inside a file, in bytes, after making sure that the file is what it is declared to be and refers
/// to nothing outside itself. `head` holds the file's first [`HEADER_BYTES`], `size_bytes` is its whole size.
///
/// # Errors
/// [`FormatError`].
pub(super) fn inspect(head: &[u8], size_bytes: u64, declared: DiskFormat) -> Result<u64, FormatError> {
    if size_bytes == 0 {
        return Err(FormatError::Empty);
    }
    match declared {
        DiskFormat::Qcow2 => qcow2(head),
        DiskFormat::Raw => {
            match OTHERS.iter().find(|(_, at, magic)| bytes(head, *at, magic.len()) == Some(magic)) {
                Some((name, ..)) => Err(FormatError::NotRaw(name)),
                None => Ok(size_bytes),
            }
        }
    }
}

/// The header as QEMU's docs/interop/qcow2.rst has it.
fn qcow2(head: &[u8]) -> Result<u64, FormatError> {
    if !head.starts_with(QCOW2_MAGIC) {
        return Err(FormatError::NotQcow2);
    }
    let version = u32_at(head, 4)?;
    if !(2..=3).contains(&version) {
        return Err(FormatError::Version(version));
    }
    if u64_at(head, 8)? != 0 || u32_at(head, 16)? != 0 {
        return Err(FormatError::BackingFile);
    }
    let cluster_bits = u32_at(head, 20)?;
    if !(9..=21).contains(&cluster_bits) {
        return Err(FormatError::Invalid("cluster size"));
    }
    let virtual_size = u64_at(head, 24)?;
    if virtual_size == 0 || virtual_size > i64::MAX as u64 {
        return Err(FormatError::Invalid("size of the disk"));
    }
    if u32_at(head, 32)? != 0 {
        return Err(FormatError::Encrypted);
    }
    u64_at(head, 64)?; // version 2's last field
    if version == 2 {
        return extensions(head, 72, cluster_bits).map(|()| virtual_size);
    }
    let features = u64_at(head, 72)?;
    if features & EXTERNAL_DATA_FILE != 0 {
        return Err(FormatError::ExternalDataFile);
    }
    if features & CORRUPT != 0 {
        return Err(FormatError::MarkedCorrupt);
    }
    if features & !KNOWN_FEATURES != 0 {
        return Err(FormatError::UnknownFeatures(features & !KNOWN_FEATURES));
    }
    let length = u32_at(head, 100)?;
    if length < 104 || length % 8 != 0 || u64::from(length) > 1 << cluster_bits {
        return Err(FormatError::Invalid("header length"));
    }
    extensions(head, length as usize, cluster_bits).map(|()| virtual_size)
}

/// Walks the header extensions, which end with a zero type or the first cluster.
fn extensions(head: &[u8], mut at: usize, cluster_bits: u32) -> Result<(), FormatError> {
    let end = head.len().min(1 << cluster_bits);
    while at + 8 <= end {
        let (kind, length) = (u32_at(head, at)?, u32_at(head, at + 4)? as usize);
        match kind {
            0 => return Ok(()),
            DATA_FILE_EXTENSION => return Err(FormatError::ExternalDataFile),
            _ => {}
        }
        at = at.saturating_add(8).saturating_add(length.saturating_add(7) & !7);
        if at > 1 << cluster_bits {
            return Err(FormatError::Invalid("a header extension reaches past the first cluster"));
        }
    }
    Ok(())
}

fn bytes(head: &[u8], at: usize, length: usize) -> Option<&[u8]> {
    head.get(at..at.checked_add(length)?)
}

fn u32_at(head: &[u8], at: usize) -> Result<u32, FormatError> {
    let field = bytes(head, at, 4).and_then(|b| b.try_into().ok());
    field.map(u32::from_be_bytes).ok_or(FormatError::Truncated)
}

fn u64_at(head: &[u8], at: usize) -> Result<u64, FormatError> {
    let field = bytes(head, at, 8).and_then(|b| b.try_into().ok());
    field.map(u64::from_be_bytes).ok_or(FormatError::Truncated)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A version 3 header of a disk of `virtual_size` bytes, with no extensions.
    pub(in crate::images) fn header(virtual_size: u64) -> Vec<u8> {
        let mut head = vec![0; 512];
        head[..4].copy_from_slice(QCOW2_MAGIC);
        put(&mut head, 4, &3_u32.to_be_bytes());
        put(&mut head, 20, &16_u32.to_be_bytes());
        put(&mut head, 24, &virtual_size.to_be_bytes());
        put(&mut head, 100, &104_u32.to_be_bytes());
        head
    }

    fn put(head: &mut [u8], at: usize, field: &[u8]) {
        head[at..at + field.len()].copy_from_slice(field);
    }

    fn with(at: usize, field: &[u8]) -> Result<u64, FormatError> {
        let mut head = header(1 << 30);
        put(&mut head, at, field);
        inspect(&head, 1 << 20, DiskFormat::Qcow2)
    }

    #[test]
    fn a_plain_qcow2_says_its_virtual_size() {
        assert_eq!(inspect(&header(1 << 30), 1 << 20, DiskFormat::Qcow2), Ok(1 << 30));
        let mut old = header(5 << 20);
        put(&mut old, 4, &2_u32.to_be_bytes());
        put(&mut old, 72, &[0; 40]);
        assert_eq!(inspect(&old, 1 << 20, DiskFormat::Qcow2), Ok(5 << 20));
    }

    #[test]
    fn what_refers_outside_the_file_is_refused() {
        assert_eq!(with(8, &512_u64.to_be_bytes()), Err(FormatError::BackingFile));
        assert_eq!(with(16, &11_u32.to_be_bytes()), Err(FormatError::BackingFile));
        assert_eq!(with(72, &EXTERNAL_DATA_FILE.to_be_bytes()), Err(FormatError::ExternalDataFile));
        let extension = [DATA_FILE_EXTENSION.to_be_bytes(), 11_u32.to_be_bytes()].concat();
        assert_eq!(with(104, &extension), Err(FormatError::ExternalDataFile));
        let behind_another =
            [&0x6803_f857_u32.to_be_bytes()[..], &3_u32.to_be_bytes(), &[0; 8], &extension].concat();
        assert_eq!(with(104, &behind_another), Err(FormatError::ExternalDataFile));
    }

    #[test]
    fn what_cannot_be_read_here_is_refused() {
        assert_eq!(with(4, &4_u32.to_be_bytes()), Err(FormatError::Version(4)));
        assert_eq!(with(32, &2_u32.to_be_bytes()), Err(FormatError::Encrypted));
        assert_eq!(with(72, &CORRUPT.to_be_bytes()), Err(FormatError::MarkedCorrupt));
        assert_eq!(with(72, &(1_u64 << 5).to_be_bytes()), Err(FormatError::UnknownFeatures(1 << 5)));
        assert_eq!(with(20, &22_u32.to_be_bytes()), Err(FormatError::Invalid("cluster size")));
        assert_eq!(with(24, &u64::MAX.to_be_bytes()), Err(FormatError::Invalid("size of the disk")));
        assert_eq!(with(100, &96_u32.to_be_bytes()), Err(FormatError::Invalid("header length")));
        let endless = [1_u32.to_be_bytes(), u32::MAX.to_be_bytes()].concat();
        assert!(matches!(with(104, &endless), Err(FormatError::Invalid(_))));
        assert_eq!(inspect(&header(1)[..90], 90, DiskFormat::Qcow2), Err(FormatError::Truncated));
        assert_eq!(inspect(b"hello", 5, DiskFormat::Qcow2), Err(FormatError::NotQcow2));
        assert_eq!(inspect(b"", 0, DiskFormat::Raw), Err(FormatError::Empty));
    }

    #[test]
    fn raw_is_not_taken_when_a_tool_would_read_it_as_something_else() {
        for (name, at, magic) in OTHERS {
            let mut head = vec![0; 512];
            put(&mut head, at, magic);
            assert_eq!(inspect(&head, 512, DiskFormat::Raw), Err(FormatError::NotRaw(name)));
        }
        assert_eq!(inspect(&[0; 512], 700, DiskFormat::Raw), Ok(700));
        assert_eq!(inspect(b"x", 1, DiskFormat::Raw), Ok(1));
    }

    proptest! {
        #[test]
        fn no_header_makes_the_gate_panic(tail in proptest::collection::vec(any::<u8>(), 0..300), size in 1_u64..) {
            let head = [QCOW2_MAGIC, &tail].concat();
            let _ = inspect(&head, size, DiskFormat::Qcow2);
            let _ = inspect(&tail, size, DiskFormat::Raw);
        }

        #[test]
        fn no_qcow2_with_a_backing_file_passes(offset in 1_u64.., tail in proptest::collection::vec(any::<u8>(), 96..300)) {
            let mut head = header(1 << 30);
            head.splice(16..16 + tail.len(), tail);
            put(&mut head, 8, &offset.to_be_bytes());
            prop_assert!(inspect(&head, 1 << 20, DiskFormat::Qcow2).is_err());
        }
    }
}
