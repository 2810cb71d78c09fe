//! Sizes as people write and read them.

/// Memory in MiB: a plain number is MiB; `512M`, `512MiB`, `2G`, `2GiB` and `1T` say their unit. Binary units
/// only, whole numbers only, at least 1.
pub(crate) fn memory_mib(text: &str) -> Result<u64, String> {
    size(text, 1, "MiB")
}

/// Disk in GiB: a plain number is GiB; `10G`, `10GiB`, `1T` say their unit. 0 is allowed: the image's own size.
pub(crate) fn disk_gib(text: &str) -> Result<u64, String> {
    if text == "0" { Ok(0) } else { size(text, 1024, "GiB") }
}

/// Parses into multiples of `unit_mib` MiB.
fn size(text: &str, unit_mib: u64, unit: &str) -> Result<u64, String> {
    let wrong = || format!("'{text}' is not a size: write {unit} as a number, or 512M, 2G, 1T");
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let factor_mib = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" => unit_mib,
        "m" | "mib" => 1,
        "g" | "gib" => 1024,
        "t" | "tib" => 1024 * 1024,
        _ => return Err(wrong()),
    };
    let mib = number.checked_mul(factor_mib).ok_or_else(wrong)?;
    if mib == 0 || mib % unit_mib != 0 {
        return Err(format!("'{text}' is not a whole number of {unit}, 1 or more"));
    }
    Ok(mib / unit_mib)
}

/// `key=value`; the key is not empty, the value may be.
pub(crate) fn property(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("'{text}' is not key=value")),
    }
}

/// Bytes with a binary unit, at most one decimal.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = count as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 || value.fract() < 0.05 {
        format!("{value:.0} {}", UNITS[unit])
    } else {
        format!("{value:.1} {}", UNITS[unit])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plain_number_has_the_options_own_unit() {
        assert_eq!(memory_mib("512"), Ok(512));
        assert_eq!(disk_gib("10"), Ok(10));
    }

    #[test]
    fn a_unit_is_obeyed() {
        assert_eq!(memory_mib("512M"), Ok(512));
        assert_eq!(memory_mib("2GiB"), Ok(2048));
        assert_eq!(disk_gib("1T"), Ok(1024));
        assert_eq!(disk_gib("2048m"), Ok(2));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in ["", "0", "-1", "1.5G", "2GB", "G", "99999999999999999999", "18446744073709551615T"] {
            assert!(memory_mib(text).is_err(), "{text}");
        }
        assert!(disk_gib("100M").is_err());
        assert_eq!(disk_gib("0"), Ok(0));
    }

    #[test]
    fn a_property_needs_a_key() {
        assert_eq!(property("hw:numa_nodes=2"), Ok(("hw:numa_nodes".into(), "2".into())));
        assert_eq!(property("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(property("=x").is_err());
        assert!(property("x").is_err());
    }

    #[test]
    fn bytes_read_well() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1024), "1 KiB");
        assert_eq!(bytes(13_147_648), "12.5 MiB");
        assert_eq!(bytes(256 << 20), "256 MiB");
    }
}
