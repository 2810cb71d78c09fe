//! `cargo xtask setup`: what a fresh Debian 12 needs to build Godwit and to run its demo and tests.
//!
//! Idempotent: it looks first and installs only what is missing, so that `demo` and `test` may call it
//! every time. It says what it installs and why.

mod linker;
pub(crate) mod nova;
mod packages;
mod promtool;
mod sources;

use std::time::Instant;

use crate::command::{self, CommandError};
use packages::Package;

/// `cargo xtask setup`.
#[derive(Debug, Default, clap::Args)]
pub(crate) struct Arguments {
    /// Only report what is missing; exit code 1 if anything is
    #[arg(long)]
    pub(crate) check: bool,
    /// Also what the benchmarks compare Godwit with
    #[arg(long)]
    pub(crate) bench: bool,
}

/// Why this machine could not be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SetupError {
    #[error(
        "this machine runs {found}, and setup knows Debian 12 (bookworm) on amd64; install by hand:\n{list}"
    )]
    OtherSystem { found: String, list: String },
    #[error(
        "setup installs packages and needs root; run `sudo cargo xtask setup`, or `cargo xtask setup --check` to see what is missing"
    )]
    NotRoot,
    #[error("{count} of {total} parts are missing; `cargo xtask setup` installs them")]
    Missing { count: usize, total: usize },
    #[error("after the installation these are still missing: {names}")]
    StillMissing { names: String },
    #[error("cannot read or write apt's sources at {path}")]
    Sources { path: String, source: std::io::Error },
    #[error(
        "no apt source of this machine offers the suite `{suite}`, so its backports cannot be derived from one"
    )]
    NoSource { suite: String },
    #[error("LLVM 22's shared library is not at {path}, where the package rustc-web should have brought it")]
    NoLlvm { path: String },
    #[error("cannot prepare {path}")]
    Folder { path: String, source: std::io::Error },
    #[error(transparent)]
    Command(#[from] CommandError),
}

/// Looks for what is missing and installs it, or only reports it with `--check`.
pub(crate) fn run(arguments: &Arguments) -> Result<(), SetupError> {
    let started = Instant::now();
    let wanted = packages::wanted(arguments.bench);
    let system = System::of_this_machine();
    if !system.is_supported() {
        return Err(SetupError::OtherSystem { found: system.name, list: packages::list(&wanted) });
    }

    let missing = packages::missing(&wanted)?;
    let linker_missing = !linker::is_installed();
    let nova_missing = arguments.bench && !nova::is_installed();
    let components = missing_components();
    let promtool_missing = !promtool::is_installed();
    let built = [linker_missing, nova_missing, promtool_missing].map(usize::from).iter().sum::<usize>();
    let count = missing.len() + built + components.len();
    let total = wanted.len() + 2 + usize::from(arguments.bench) + COMPONENTS.len();
    if count == 0 {
        println!("setup: all {total} parts are here ({} ms)", started.elapsed().as_millis());
        return Ok(());
    }
    report(&missing, &components);
    if linker_missing {
        println!("  {:<24} links the eBPF programs (built by cargo, a minute)", "bpf-linker");
    }
    if promtool_missing {
        println!("  {:<24} checks metrics and alert rules (Debian's, unpacked only)", "promtool");
    }
    if nova_missing {
        println!("  {:<24} the peer of placement's benchmark (Python packages of its own)", "nova 34");
    }
    if arguments.check {
        return Err(SetupError::Missing { count, total });
    }

    if !missing.is_empty() {
        if !nix::unistd::geteuid().is_root() {
            return Err(SetupError::NotRoot);
        }
        sources::ensure_backports(&system.codename)?;
        packages::install(&missing, &system.codename)?;
    }
    for (component, _) in &components {
        command::run(std::process::Command::new("rustup").args(["component", "add", component]))?;
    }
    if linker_missing {
        linker::install()?;
    }
    if nova_missing {
        nova::install()?;
    }
    if promtool_missing {
        promtool::install()?;
    }
    let names: Vec<&str> = packages::missing(&wanted)?.iter().map(|package| package.name).collect();
    if !names.is_empty() {
        return Err(SetupError::StillMissing { names: names.join(", ") });
    }
    println!("setup: {count} of {total} parts installed in {} s", started.elapsed().as_secs());
    Ok(())
}

fn report(missing: &[&Package], components: &[(&str, &str)]) {
    println!("setup: missing");
    for package in missing {
        println!("  {:<24} {}", package.name, package.why);
    }
    for (component, why) in components {
        println!("  {component:<24} {why} (a component of the Rust toolchain)");
    }
}

/// Parts of the Rust toolchain that the checks use, and why.
const COMPONENTS: [(&str, &str); 2] = [("clippy", "lints"), ("rustfmt", "formatting")];

fn missing_components() -> Vec<(&'static str, &'static str)> {
    COMPONENTS
        .into_iter()
        .filter(|(name, _)| {
            let subcommand = if *name == "rustfmt" { "fmt" } else { name };
            !command::succeeds(command::cargo().args([subcommand, "--version"]))
        })
        .collect()
}

/// What /etc/os-release says.
struct System {
    id: String,
    codename: String,
    name: String,
}

impl System {
    fn of_this_machine() -> System {
        System::parse(&std::fs::read_to_string("/etc/os-release").unwrap_or_default())
    }

    fn parse(text: &str) -> System {
        let field = |key: &str| {
            text.lines()
                .find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
                .map(|value| value.trim_matches('"').to_owned())
                .unwrap_or_default()
        };
        let name = field("PRETTY_NAME");
        let name = if name.is_empty() { "an unknown system".to_owned() } else { name };
        System { id: field("ID"), codename: field("VERSION_CODENAME"), name }
    }

    fn is_supported(&self) -> bool {
        self.id == "debian" && self.codename == "bookworm" && cfg!(target_arch = "x86_64")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_debian_12_is_set_up_automatically() {
        let debian = System::parse(
            "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\nVERSION_CODENAME=bookworm\n",
        );
        assert!(debian.is_supported());
        let ubuntu = System::parse(
            "PRETTY_NAME=\"Ubuntu 24.04\"\nID=ubuntu\nID_LIKE=debian\nVERSION_CODENAME=noble\n",
        );
        assert!(!ubuntu.is_supported());
        assert_eq!(ubuntu.name, "Ubuntu 24.04");
        assert!(!System::parse("").is_supported());
    }
}
