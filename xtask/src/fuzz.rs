//! `cargo xtask fuzz`: random bytes into what reads the bytes of strangers, by cargo-fuzz.

use std::path::{Path, PathBuf};
use std::process::Command;

use clap::ValueEnum;

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};

const VERSION: &str = "0.13.1";

/// Most memory that a target may take. Nothing that it reads may make it take as much.
const MEMORY_MIB: u32 = 512;

/// `cargo xtask fuzz`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// What is to read the bytes; all when none is named
    targets: Vec<Target>,
    /// Seconds for each target
    #[arg(long, default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..=604_800))]
    seconds: u32,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Target {
    /// A file that claims to be a qcow2 image
    Qcow2,
    /// A connection that carries a disk
    DiskStream,
    /// Frames between coordinator and agent
    Channel,
}

/// Why there was no fuzzing, or that it found something.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FuzzError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error("cannot prepare {path}")]
    Folder { path: PathBuf, source: std::io::Error },
    #[error("cargo-fuzz needs the nightly toolchain: `rustup toolchain install nightly`")]
    NoNightly,
    #[error(
        "{target} fails on the bytes that are named above; the file in tests/fuzz/artifacts/{target} repeats it"
    )]
    Found { target: String, source: CommandError },
}

/// Installs what is missing, builds, and lets each target run for its time.
pub(crate) fn run(arguments: &Arguments) -> Result<(), FuzzError> {
    setup::run(&setup::Arguments::default())?;
    install()?;
    let targets = if arguments.targets.is_empty() { Target::value_variants() } else { &arguments.targets };
    for target in targets {
        let name = target.to_possible_value().map(|value| value.get_name().to_owned()).unwrap_or_default();
        let corpus = command::target_folder().join("fuzz/corpus").join(&name);
        let failed = |source| FuzzError::Folder { path: corpus.clone(), source };
        std::fs::create_dir_all(&corpus).map_err(failed)?;
        target.sow(&corpus)?;
        fuzz(&["build", &name])?;
        println!("fuzz: {name} for {} s", arguments.seconds);
        let limits = [
            format!("-max_total_time={}", arguments.seconds),
            format!("-rss_limit_mb={MEMORY_MIB}"),
            "-timeout=10".to_owned(),
            "-print_final_stats=1".to_owned(),
        ];
        let corpus = corpus.display().to_string();
        let mut line = vec!["run", &name, &corpus, "--"];
        line.extend(limits.iter().map(String::as_str));
        fuzz(&line).map_err(|source| FuzzError::Found { target: name.clone(), source })?;
    }
    Ok(())
}

fn install() -> Result<(), FuzzError> {
    if !command::succeeds(Command::new("rustup").args(["run", "nightly", "rustc", "--version"])) {
        return Err(FuzzError::NoNightly);
    }
    if command::succeeds(command::cargo().args(["fuzz", "--version"])) {
        return Ok(());
    }
    println!("fuzz: building cargo-fuzz {VERSION}");
    let mut cargo = command::cargo();
    cargo.args(["install", "cargo-fuzz", "--version", VERSION, "--locked", "--quiet"]);
    // Settings meant for the workspace's own build must not leak into this one.
    Ok(command::run(cargo.env_remove("CARGO_TARGET_DIR").env_remove("RUSTFLAGS"))?)
}

fn fuzz(line: &[&str]) -> Result<(), CommandError> {
    let (verb, rest) = line.split_first().unwrap_or((&"list", &[]));
    let mut rustup = Command::new("rustup");
    rustup.current_dir(command::workspace()).args(["run", "nightly", "cargo", "fuzz", verb]);
    rustup.args(["--fuzz-dir", "tests/fuzz", "--target-dir"]);
    rustup.arg(command::target_folder().join("fuzz/build"));
    for name in ["CARGO", "RUSTUP_TOOLCHAIN"] {
        rustup.env_remove(name);
    }
    command::run(rustup.args(rest))
}

impl Target {
    /// Puts good bytes into the corpus: without them the random ones rarely come past the first check.
    fn sow(self, corpus: &Path) -> Result<(), FuzzError> {
        match self {
            Self::Qcow2 => sow_images(corpus),
            Self::DiskStream => sow_frames(
                corpus,
                &[
                    r#"{"token":"t","connection":0,"connections":1,"source":{"device":1,"inode":1,"size_bytes":1,"modified_ns":1}}"#,
                    r#"{"ready":{"has":true}}"#,
                    r#"{"whole":"00"}"#,
                    r#""published""#,
                ],
            ),
            Self::Channel => sow_frames(
                corpus,
                &[
                    r#"{"versions":[1],"host":"3f0c0a4e-0000-4000-8000-000000000001"}"#,
                    r#"{"stop_instance":{"instance":"3f0c0a4e-0000-4000-8000-000000000001","grace_ms":1}}"#,
                    r#"{"remove_network":{"network":"3f0c0a4e-0000-4000-8000-000000000001","vni":1,"generation":2}}"#,
                ],
            ),
        }
    }
}

fn sow_images(corpus: &Path) -> Result<(), FuzzError> {
    for (name, options) in [
        ("small-clusters", "cluster_size=512"),
        ("v2", "compat=0.10,cluster_size=4096"),
        ("usual", "preallocation=metadata"),
        ("subclusters", "extended_l2=on,cluster_size=16384"),
    ] {
        let image = corpus.join(name);
        if image.exists() {
            continue;
        }
        let mut qemu_img = Command::new("qemu-img");
        qemu_img.args(["create", "-q", "-f", "qcow2", "-o", options]).arg(&image).arg("192k");
        command::run(&mut qemu_img)?;
    }
    Ok(())
}

fn sow_frames(corpus: &Path, bodies: &[&str]) -> Result<(), FuzzError> {
    for (number, body) in bodies.iter().enumerate() {
        let path = corpus.join(format!("frame-{number}"));
        let mut bytes = (body.len() as u32).to_be_bytes().to_vec();
        bytes.extend(body.bytes());
        std::fs::write(&path, bytes).map_err(|source| FuzzError::Folder { path, source })?;
    }
    Ok(())
}
