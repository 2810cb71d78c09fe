//! Every series that a daemon exposes stands in docs/metrics.md, and whatever docs, dashboards and alert rules name is
//! a series that a daemon exposes.
//!
//! A series' name is one string literal in its daemon's source: it can be looked for, and is found here.

use std::collections::BTreeSet;

use super::Finding;

/// The reference, relative to the workspace.
pub(super) const REFERENCE: &str = "docs/metrics.md";

/// What a histogram adds to its name.
const SUFFIXES: [&str; 3] = ["_bucket", "_sum", "_count"];

/// Whether a file is one of a daemon's, where series are made.
pub(super) fn makes_series(path: &str) -> bool {
    let is_test = path.ends_with("/tests.rs") || path.contains("/tests/");
    path.ends_with(".rs")
        && !is_test
        && ["agent/src/", "coordinator/src/"].iter().any(|f| path.starts_with(f))
}

/// Whether a file names series for people or for Prometheus.
pub(super) fn names_series(path: &str) -> bool {
    let folders = ["docs/grafana/", "docs/alerts/", "tests/promtool/"];
    path == REFERENCE || folders.iter().any(|folder| path.starts_with(folder))
}

/// The names in a daemon's source: string literals that are nothing else.
pub(super) fn made(text: &str) -> BTreeSet<String> {
    let code = text.split("#[cfg(test)]").next().unwrap_or_default();
    let lines = code.lines().filter(|line| !line.trim_start().starts_with("//"));
    // A text's opening and closing quotes are on one line where it is a name.
    let literals = lines.flat_map(|line| line.split('"').skip(1).step_by(2));
    literals.filter(|literal| is_name(literal)).map(str::to_owned).collect()
}

/// What a file names that is not made, and for the reference what is made and not named.
pub(super) fn check(path: &str, text: &str, made: &BTreeSet<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut named = BTreeSet::new();
    for (line, words) in (1..).zip(text.lines().map(words)) {
        for word in words {
            let base = SUFFIXES.iter().find_map(|suffix| word.strip_suffix(suffix)).unwrap_or(word);
            if ![word, base].iter().any(|name| made.contains(*name)) {
                let advice = format!("names the series {word}, which no daemon exposes");
                findings.push(Finding { file: path.to_owned(), line, advice });
            }
            named.insert(word);
        }
    }
    if path == REFERENCE {
        for name in made.iter().filter(|name| !named.contains(name.as_str())) {
            let advice = format!("does not tell of the series {name}; say what it is");
            findings.push(Finding { file: path.to_owned(), line: 0, advice });
        }
    }
    findings
}

/// The names of series in a line; a name that ends in an underscore is the beginning of several.
fn words(line: &str) -> impl Iterator<Item = &str> {
    let words = line.split(|c: char| c != '_' && !c.is_ascii_alphanumeric());
    words.filter(|word| is_name(word) && !word.ends_with('_'))
}

fn is_name(word: &str) -> bool {
    let allowed = |c: char| c == '_' || c.is_ascii_lowercase() || c.is_ascii_digit();
    word.strip_prefix("godwit_").is_some_and(|rest| !rest.is_empty() && rest.chars().all(allowed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_series_that_is_not_made_and_one_that_is_not_told_of_are_found() {
        let code = "//! A file of `{\"godwit_digests\":1}`.\nIntGauge::new(\"godwit_up\", \"Up.\"); h(\"godwit_api_seconds\"); \
                    #[cfg(test)] mod tests { \"godwit_fake\" }";
        let made = made(code);
        assert_eq!(made.iter().map(String::as_str).collect::<Vec<_>>(), ["godwit_api_seconds", "godwit_up"]);
        assert!(check("docs/alerts/x.yml", "expr: godwit_up == 0\n", &made).is_empty());
        assert!(check("docs/grafana/x.json", "rate(godwit_api_seconds_bucket[5m])", &made).is_empty());
        let gone = check("docs/alerts/x.yml", "one\nexpr: godwit_gone > 0\n", &made);
        assert_eq!(gone.iter().map(|finding| finding.line).collect::<Vec<_>>(), [2]);
        let untold = check(REFERENCE, "| `godwit_up` | the `godwit_up_` series |\n", &made);
        assert_eq!(untold.len(), 1);
        assert!(untold[0].advice.contains("godwit_api_seconds"), "{untold:?}");
    }
}
