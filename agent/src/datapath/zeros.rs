//! Zeros within data: what need not be written to a file that reads as zeros there.

/// What is looked at first: one word of it that is not zero, and the rest need not be read.
const PROBE_BYTES: usize = 16 << 10;

/// Alignment of a run of zeros in bytes.
const BLOCK_BYTES: usize = super::BLOCK_BYTES;

/// Whether all bytes are zero.
pub(super) fn all_zero(bytes: &[u8]) -> bool {
    let (words, tail) = bytes.as_chunks::<64>();
    words.iter().all(|word| word.iter().fold(0, |all, byte| all | byte) == 0)
        && tail.iter().all(|byte| *byte == 0)
}

/// The runs of `bytes` that must be written, as ranges. Runs of zeros are left out where they are whole blocks and
/// cover at least one aligned step of 16 KiB: shorter ones cost more in requests than in room. `bytes` begins at a
/// block's begin on the disk.
pub(super) fn data_runs(bytes: &[u8], runs: &mut Vec<(usize, usize)>) {
    runs.clear();
    let mut start = 0;
    let mut position = 0;
    while position < bytes.len() {
        let end = (position + PROBE_BYTES).min(bytes.len());
        let probe = &bytes[position..end];
        if probe[0] != 0 || probe[probe.len() / 2] != 0 || !all_zero(probe) {
            position = end;
            continue;
        }
        let zeros_start = block_before(bytes, position, start);
        let zeros_end = block_after(bytes, end);
        if zeros_start > start {
            runs.push((start, zeros_start));
        }
        start = zeros_end;
        position = zeros_end;
    }
    if start < bytes.len() {
        runs.push((start, bytes.len()));
    }
}

/// How far back from `position` there are blocks of zeros, but not before `limit`.
fn block_before(bytes: &[u8], mut position: usize, limit: usize) -> usize {
    while position >= limit + BLOCK_BYTES && all_zero(&bytes[position - BLOCK_BYTES..position]) {
        position -= BLOCK_BYTES;
    }
    position
}

/// How far on from `position` there are blocks of zeros.
fn block_after(bytes: &[u8], mut position: usize) -> usize {
    while position < bytes.len() {
        let end = (position + BLOCK_BYTES).min(bytes.len());
        if !all_zero(&bytes[position..end]) {
            break;
        }
        position = end;
    }
    position
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn runs_of(bytes: &[u8]) -> Vec<(usize, usize)> {
        let mut runs = vec![(9, 9)];
        data_runs(bytes, &mut runs);
        runs
    }

    #[test]
    fn what_is_all_zero_is_not_written_and_what_has_none_is_one_run() {
        assert_eq!(runs_of(&vec![0; 100_000]), []);
        assert_eq!(runs_of(&vec![1; 100_000]), [(0, 100_000)]);
        assert_eq!(runs_of(&[]), []);
        assert_eq!(runs_of(&[0]), []);
        assert_eq!(runs_of(&[1]), [(0, 1)]);
    }

    #[test]
    fn a_long_run_of_zeros_is_left_out_to_the_block() {
        let mut bytes = vec![1; 200 << 10];
        bytes[(10 << 10)..(90 << 10) + 5].fill(0);
        // Blocks begin at 12 KiB, and the last of zeros alone ends at 88 KiB.
        assert_eq!(runs_of(&bytes), [(0, 12 << 10), (88 << 10, 200 << 10)]);
    }

    proptest! {
        #[test]
        fn runs_cover_every_byte_that_is_not_zero(
            pieces in proptest::collection::vec((any::<bool>(), 1_usize..60_000), 1..12),
        ) {
            let bytes: Vec<u8> =
                pieces.iter().flat_map(|(data, length)| vec![u8::from(*data); *length]).collect();
            let mut position = 0;
            for (start, end) in runs_of(&bytes) {
                prop_assert!(start >= position && end > start && end <= bytes.len());
                prop_assert!(start.is_multiple_of(BLOCK_BYTES));
                prop_assert!(bytes[position..start].iter().all(|byte| *byte == 0));
                position = end;
            }
            prop_assert!(bytes[position..].iter().all(|byte| *byte == 0));
        }
    }
}
