//! docs/promises.md names tests that are there.

use super::Finding;

/// Where the promises stand, relative to the workspace.
pub(super) const FILE: &str = "docs/promises.md";

/// The tests that a text names and that no function among `functions` is.
pub(super) fn check(text: &str, functions: &std::collections::HashSet<String>) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        for name in line.split('`').skip(1).step_by(2).filter(|name| is_test(name)) {
            if !functions.contains(name) {
                findings.push(Finding {
                    file: FILE.to_owned(),
                    line: number,
                    advice: format!(
                        "names the test {name}, which is nowhere; name the one that proves it now"
                    ),
                });
            }
        }
    }
    findings
}

/// Tests are named as claims: whole sentences.
fn is_test(name: &str) -> bool {
    name.matches('_').count() > 2 && name.chars().all(|c| c == '_' || c.is_ascii_alphanumeric())
}

/// The functions that a source file defines.
pub(super) fn functions(text: &str) -> impl Iterator<Item = String> {
    text.split("fn ").skip(1).filter_map(|rest| {
        let end = rest.find(|c: char| c != '_' && !c.is_ascii_alphanumeric())?;
        rest[end..].starts_with('(').then(|| rest[..end].to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_promise_without_its_test_is_found() {
        let known = functions("#[test]\nfn a_test_that_is_there() {}\nfn helper<T>(x: T) {}\n").collect();
        assert!(check("| x | `a_test_that_is_there`, `cargo xtask` |", &known).is_empty());
        let findings = check("one\n| x | `a_test_that_is_gone` |", &known);
        assert_eq!(findings.iter().map(|finding| finding.line).collect::<Vec<_>>(), [2]);
    }
}
