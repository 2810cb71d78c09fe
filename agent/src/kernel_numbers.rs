//! Numbers of CPUs and nodes as the kernel writes them, and lists and masks of them.

use std::collections::BTreeSet;

/// The highest CPU or node number that is believed: more than any kernel counts.
pub(crate) const MAX_NUMBER: u32 = 65_535;

/// A number: digits only.
pub(crate) fn digits<T: std::str::FromStr>(text: &str) -> Option<T> {
    let plain = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

/// A list such as `0-3,8`; nothing is the empty set.
pub(crate) fn parse_list(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for item in text.trim().split(',').map(str::trim).filter(|item| !item.is_empty()) {
        let (first, last) = item.split_once('-').unwrap_or((item, item));
        let (first, last): (u32, u32) = (digits(first)?, digits(last)?);
        if first > last || last > MAX_NUMBER {
            return None;
        }
        set.extend(first..=last);
    }
    Some(set)
}

/// A mask such as `000000ff,ffffffff`: the rightmost word holds the numbers from 0 to 31.
pub(crate) fn parse_mask(text: &str) -> Option<BTreeSet<u32>> {
    let mut set = BTreeSet::new();
    for (index, word) in text.trim().rsplit(',').enumerate() {
        let bits = u32::from_str_radix(word.trim(), 16).ok()?;
        let base = u32::try_from(index).ok()?.checked_mul(32).filter(|&base| base <= MAX_NUMBER)?;
        set.extend((0..32).filter(|bit| bits & (1 << bit) != 0).map(|bit| base + bit));
    }
    Some(set)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_read_and_what_is_none_is_refused() {
        assert_eq!(parse_list("0-2,7\n"), Some(BTreeSet::from([0, 1, 2, 7])));
        assert_eq!(parse_list("\n"), Some(BTreeSet::new()));
        for text in ["x", "3-1", "0-4294967295", "-1", "1-", "+1"] {
            assert_eq!(parse_list(text), None, "{text:?}");
        }
    }

    #[test]
    fn the_rightmost_word_of_a_mask_holds_the_first_numbers() {
        assert_eq!(parse_mask("1,80000001\n"), Some(BTreeSet::from([0, 31, 32])));
        for text in ["", "g", "1,,1"] {
            assert_eq!(parse_mask(text), None, "{text:?}");
        }
    }
}
