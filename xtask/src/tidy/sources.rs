//! Rules for single files.

use super::Finding;

/// A file with more lines is to be split.
const MAX_LINES: usize = 600;

/// Outside crates that stand for an effect, and the only places that may name them: a file, or a folder with the
/// module that heads it.
const CONFINED: [(&str, &[&str]); 12] = [
    ("aya", &["agent/src/telemetry", "ebpf/common/src"]),
    ("aya_ebpf", &["ebpf/programs/src"]),
    ("axum", &["coordinator/src/api", "coordinator/src/metrics"]),
    ("io_uring", &["agent/src/datapath"]),
    ("netlink_packet_route", &["agent/src/network"]),
    ("quinn", &["protocol/src/quic", "agent/src/uplink", "coordinator/src/agents", "tests/sim"]),
    ("rtnetlink", &["agent/src/network"]),
    ("rusqlite", &["coordinator/src/store"]),
    ("tokio_uring", &["agent/src/datapath"]),
    ("ureq", &["cli/src"]),
    ("virt", &["agent/src/hypervisor"]),
    ("virt_sys", &["agent/src/hypervisor"]),
];

/// Words that have no place in any file, in two halves so that they are not in this one, and what to do instead.
const FORBIDDEN: [(&str, &str, &str); 10] = [
    (
        "crates",
        ".io",
        "names a registry's host; the machine's own configuration decides where packages come from",
    ),
    (
        "pypi",
        ".org",
        "names a registry's host; the machine's own configuration decides where packages come from",
    ),
    ("deb.deb", "ian.org", "names a mirror; derive it from the machine's own apt sources"),
    ("ftp.deb", "ian.org", "names a mirror; derive it from the machine's own apt sources"),
    (
        "registry.",
        "npm",
        "names a registry's host; the machine's own configuration decides where packages come from",
    ),
    ("#[ig", "nore", "a test that does not run proves nothing; put what needs more into its own suite"),
    ("TO", "DO", "finish it, or write down in docs/ what is left out and why"),
    ("FIX", "ME", "fix it, or write down in docs/ what falls short and why"),
    ("<<<<", "<<< ", "is a merge that was not finished"),
    ("any", "how::", "is an untyped error; use a thiserror enum"),
];

/// Checks one text file; `path` is relative to the workspace.
pub(super) fn check(path: &str, text: &str) -> Vec<Finding> {
    let mut findings = Vec::new();
    let mut note = |line, advice: String| findings.push(Finding { file: path.to_owned(), line, advice });
    for (number, line) in (1..).zip(text.lines()) {
        for (first, second, advice) in FORBIDDEN {
            if line.find(first).is_some_and(|at| line[at + first.len()..].starts_with(second)) {
                note(number, format!("\"{first}{second}\" {advice}"));
            }
        }
    }
    if path.ends_with(".rs") {
        let lines = text.lines().count();
        if lines > MAX_LINES {
            note(0, format!("has {lines} lines, more than {MAX_LINES}; split it"));
        }
        if !text.trim_start().starts_with("//!") {
            note(1, "has no module docs; begin it with `//!` and what it is for".to_owned());
        }
        for (number, line) in (1..).zip(text.lines()) {
            let code = line.split("//").next().unwrap_or_default();
            for (name, places) in CONFINED {
                if names_crate(code, name) && !places.iter().any(|place| lies_in(path, place)) {
                    note(number, format!("names the crate {name}, which belongs to {}", places.join(", ")));
                }
            }
        }
    }
    findings
}

/// Whether `path` is the module `place` or lies below it.
fn lies_in(path: &str, place: &str) -> bool {
    path.strip_prefix(place).is_some_and(|rest| rest.starts_with('/') || rest == ".rs")
}

/// Whether a line names the crate: as the head of a path, or imported whole.
fn names_crate(code: &str, name: &str) -> bool {
    let word = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(name).any(|(at, _)| {
        let before = &code[..at];
        let after = &code[at + name.len()..];
        let heads = !before.ends_with(word) && !before.ends_with("::") && !before.ends_with(['"', '.', '/']);
        heads && (after.starts_with("::") || before.trim_end().ends_with("use") && !after.starts_with(word))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_crate_is_named_by_a_path_or_an_import() {
        for line in
            ["use far::domain::Domain;", "    far::init()?;", "pub use far;", "let a: b::C = d(far::x);"]
        {
            assert!(names_crate(line, "far"), "{line}");
        }
        for line in
            ["use crate::far::X;", "far_sys::init();", "so_far::x()", "\"far::text\"", "self.far::<u8>()"]
        {
            assert!(!names_crate(line, "far"), "{line}");
        }
    }

    #[test]
    fn a_confined_crate_is_found_outside_its_place() {
        let text = "//! Docs.\nuse quinn::Endpoint; // aya::x\n";
        assert!(check("agent/src/uplink.rs", text).is_empty());
        assert!(check("agent/src/uplink/session.rs", text).is_empty());
        let findings = check("agent/src/uplinks.rs", text);
        assert_eq!(findings.len(), 1);
        assert_eq!(findings[0].line, 2);
    }

    #[test]
    fn docs_and_length_are_asked_for() {
        assert_eq!(check("a.rs", "fn main() {}\n").len(), 1);
        assert!(check("a.sh", "echo\n").is_empty());
        let long = format!("//! Docs.\n{}", "\n".repeat(MAX_LINES));
        assert_eq!(check("a.rs", &long).len(), 1);
    }

    #[test]
    fn forbidden_words_are_found_in_every_file() {
        for (first, second, _) in FORBIDDEN {
            let findings = check("docs/a.md", &format!("one\nx {first}{second} y\n"));
            assert_eq!(findings.iter().map(|finding| finding.line).collect::<Vec<_>>(), [2]);
        }
    }
}
