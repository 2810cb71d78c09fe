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
    /// It is encrypted with a key that nobody gives.
    #[error("the image is encrypted, which is not supported")]
    Encrypted,
    /// A figure is outside what QEMU takes.
    #[error("the image's header contradicts itself")]
    Nonsense,
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
        Ok(Self { version, virtual_size_bytes })
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
        assert_eq!(Header::parse(&header(7 << 20)), Ok(Header { version: 3, virtual_size_bytes: 7 << 20 }));
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

    proptest! {
        #[test]
        fn no_bytes_make_the_parser_panic(tail in proptest::collection::vec(any::<u8>(), 0..128)) {
            let mut bytes = b"QFI\xfb\0\0\0\x03".to_vec();
            bytes.extend(tail);
            let _ = Header::parse(&bytes);
        }
    }
}
