//! The codec: a message is a big-endian u32 length and that many bytes of JSON. Bounded, pure.

use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest message in bytes. A report of 2,000 instances with pinning is about 1 MiB.
pub const MAX_FRAME_BYTES: usize = 8 << 20;

/// Length of the header in bytes.
pub const HEADER_BYTES: usize = 4;

/// What is wrong with a frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// Longer than [`MAX_FRAME_BYTES`].
    #[error("a message of {0} bytes is over the limit of {MAX_FRAME_BYTES}")]
    TooLong(usize),
    /// Not what was expected.
    #[error("the message does not read")]
    Malformed(#[from] serde_json::Error),
}

/// A message with its header.
///
/// # Errors
/// [`FrameError::TooLong`].
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, FrameError> {
    let mut frame = vec![0; HEADER_BYTES];
    serde_json::to_writer(&mut frame, message)?;
    let length = frame.len() - HEADER_BYTES;
    if length > MAX_FRAME_BYTES {
        return Err(FrameError::TooLong(length));
    }
    frame[..HEADER_BYTES].copy_from_slice(&(length as u32).to_be_bytes());
    Ok(frame)
}

/// How many bytes follow a header.
///
/// # Errors
/// [`FrameError::TooLong`], before anything is allocated.
pub fn body_length(header: [u8; HEADER_BYTES]) -> Result<usize, FrameError> {
    match u32::from_be_bytes(header) as usize {
        length if length > MAX_FRAME_BYTES => Err(FrameError::TooLong(length)),
        length => Ok(length),
    }
}

/// A message from its body.
///
/// # Errors
/// [`FrameError::Malformed`].
pub fn decode<T: DeserializeOwned>(body: &[u8]) -> Result<T, FrameError> {
    Ok(serde_json::from_slice(body)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::AgentRequest;
    use proptest::prelude::*;

    #[test]
    fn a_message_reads_as_it_was_written() {
        let frame = encode(&AgentRequest::Report).unwrap();
        let (header, body) = frame.split_at(HEADER_BYTES);
        assert_eq!(body_length(header.try_into().unwrap()).unwrap(), body.len());
        assert_eq!(decode::<AgentRequest>(body).unwrap(), AgentRequest::Report);
    }

    #[test]
    fn a_length_over_the_bound_is_refused_before_it_is_read() {
        assert!(matches!(body_length(u32::MAX.to_be_bytes()), Err(FrameError::TooLong(_))));
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(body in proptest::collection::vec(any::<u8>(), 0..512)) {
            let _ = decode::<AgentRequest>(&body);
        }
    }
}
