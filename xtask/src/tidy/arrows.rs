//! Which of Godwit's crates may depend on which.

use std::path::Path;

use serde::Deserialize;

use super::{Finding, TidyError};
use crate::command;

/// Crate, and those it may import. A crate that is not listed may not exist.
const ARROWS: [(&str, &[&str]); 9] = [
    ("godwit-protocol", &[]),
    ("godwit", &[]),
    ("godwit-agent", &["godwit-protocol", "godwit-ebpf-common"]),
    ("godwit-coordinator", &["godwit-protocol"]),
    ("godwit-ebpf-common", &[]),
    ("godwit-ebpf-programs", &["godwit-ebpf-common"]),
    ("godwit-tests", &[]),
    ("godwit-fuzz", &["godwit-agent", "godwit-protocol"]),
    ("xtask", &["godwit-tests"]),
];

/// What the suites test. Their library stays free of it, so that the project's commands build on a machine that
/// `setup` has not prepared: these are dev-dependencies, or optional.
const TESTED: [&str; 3] = ["godwit-protocol", "godwit-agent", "godwit-coordinator"];

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
}

#[derive(Deserialize)]
struct Package {
    name: String,
    dependencies: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    name: String,
    kind: Option<String>,
    optional: bool,
    path: Option<String>,
}

/// Checks all workspaces: the main one, that of the eBPF programs and that of the fuzz targets.
pub(super) fn check(root: &Path) -> Result<Vec<Finding>, TidyError> {
    let mut findings = Vec::new();
    for manifest in ["Cargo.toml", "ebpf/Cargo.toml", "tests/fuzz/Cargo.toml"].map(|path| root.join(path)) {
        let arguments = ["metadata", "--no-deps", "--format-version", "1", "--manifest-path"];
        let text = command::capture(command::cargo().args(arguments).arg(&manifest))?;
        let metadata: Metadata =
            serde_json::from_str(&text).map_err(|source| TidyError::Metadata { manifest, source })?;
        findings.extend(metadata.packages.iter().flat_map(check_package));
    }
    Ok(findings)
}

fn check_package(package: &Package) -> Vec<Finding> {
    let finding = |advice: String| Finding { file: format!("crate {}", package.name), line: 0, advice };
    let Some((_, allowed)) = ARROWS.iter().find(|(name, _)| *name == package.name) else {
        return vec![finding("is not in xtask/src/tidy/arrows.rs; say there what it may import".to_owned())];
    };
    let ours = package.dependencies.iter().filter(|dependency| dependency.path.is_some());
    ours.filter(|dependency| {
        let guarded = dependency.optional || dependency.kind.as_deref() == Some("dev");
        let tests_it = package.name == "godwit-tests" && guarded && TESTED.contains(&&*dependency.name);
        !(tests_it || allowed.contains(&&*dependency.name))
    })
    .map(|dependency| finding(format!("must not import {} (docs/architecture.md, arrows)", dependency.name)))
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn package(name: &str, imports: &str, kind: Option<&str>, optional: bool) -> Package {
        let dependency = Dependency {
            name: imports.to_owned(),
            kind: kind.map(str::to_owned),
            optional,
            path: Some("/x".to_owned()),
        };
        Package { name: name.to_owned(), dependencies: vec![dependency] }
    }

    #[test]
    fn the_command_line_imports_nothing_of_ours() {
        assert_eq!(check_package(&package("godwit", "godwit-protocol", None, false)).len(), 1);
        assert!(check_package(&package("godwit-agent", "godwit-protocol", None, false)).is_empty());
    }

    #[test]
    fn suites_import_what_they_test_and_the_library_does_not() {
        assert!(check_package(&package("godwit-tests", "godwit-agent", Some("dev"), false)).is_empty());
        assert!(check_package(&package("godwit-tests", "godwit-agent", None, true)).is_empty());
        assert_eq!(check_package(&package("godwit-tests", "godwit-agent", None, false)).len(), 1);
        assert_eq!(check_package(&package("xtask", "godwit-agent", Some("dev"), false)).len(), 1);
    }

    #[test]
    fn a_new_crate_must_be_declared() {
        assert_eq!(check_package(&package("godwit-utils", "x", None, false)).len(), 1);
    }
}
