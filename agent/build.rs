//! Builds the eBPF programs in `ebpf/`, a workspace of its own, and leaves their objects in `OUT_DIR`.

use object::build::elf::{Builder, SectionData};
use object::elf::SHT_STRTAB;
use std::env;
use std::ffi::OsString;
use std::fmt::Display;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The programs: each is one binary of `ebpf/programs`.
const PROGRAMS: [&str; 3] = ["filter", "port", "underlay"];

/// What would otherwise leak from the outer build into the inner one: another target, other flags, a wrapper
/// (clippy is one), and a target folder for each profile, in which `core` would be built anew.
const FOREIGN: [&str; 10] = [
    "CARGO_BUILD_RUSTC",
    "CARGO_BUILD_RUSTC_WRAPPER",
    "CARGO_BUILD_RUSTFLAGS",
    "CARGO_BUILD_TARGET",
    "CARGO_BUILD_TARGET_DIR",
    "CARGO_TARGET_DIR",
    "RUSTC_WORKSPACE_WRAPPER",
    "RUSTC_WRAPPER",
    "RUSTFLAGS",
    "RUSTUP_TOOLCHAIN",
];

fn main() {
    // The functions of hypervisor/library.rs are for us. libvirt's own calls must not come to them.
    println!("cargo::rustc-link-arg-bins=-Wl,--exclude-libs,ALL");
    if let Err(reason) = build() {
        println!("cargo::error=the eBPF programs were not built: {reason}");
        println!("cargo::error=run `cargo xtask setup`: it installs what their build needs");
    }
}

fn build() -> Result<(), String> {
    let agent = PathBuf::from(variable("CARGO_MANIFEST_DIR")?);
    let root = agent.parent().ok_or("the agent's folder has no parent")?;
    let workspace = root.join("ebpf");
    for source in ["Cargo.toml", "Cargo.lock", "common", "programs"] {
        println!("cargo::rerun-if-changed={}", workspace.join(source).display());
    }
    println!("cargo::rerun-if-env-changed=EBPF_RUSTC");

    let rustc = find_rustc()?;
    let linker = find_linker(root)?;
    let (target, arch) = target()?;
    let flags = [
        "-Cdebuginfo=2".into(),
        "-Clink-arg=--btf".into(),
        format!("-Clinker={}", linker.display()),
        format!("--cfg=bpf_target_arch=\"{arch}\""),
    ];
    let target_folder = workspace.join("target");
    let mut cargo = Command::new(variable("CARGO")?);
    cargo
        .current_dir(&workspace)
        .args(["build", "--quiet", "--locked", "--release", "--package", "godwit-ebpf-programs"])
        .args(["-Z", "build-std=core", "--target", &target, "--target-dir"])
        .arg(&target_folder)
        .env("RUSTC", &rustc)
        // build-std is not stable yet; the compiler that has its library's source may be a stable one.
        .env("RUSTC_BOOTSTRAP", "1")
        .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
        // A build script of aya-ebpf looks for the linker too.
        .env("PATH", with_folder_first(linker.parent())?);
    for name in FOREIGN {
        cargo.env_remove(name);
    }
    let output = cargo.output().map_err(|error| format!("cargo did not start: {error}"))?;
    if !output.status.success() {
        eprintln!("{}", String::from_utf8_lossy(&output.stderr));
        return Err(format!("their build with {} and {} failed", rustc.display(), linker.display()));
    }
    let objects = target_folder.join(&target).join("release");
    let destination = PathBuf::from(variable("OUT_DIR")?);
    for program in PROGRAMS {
        let told = |error: &dyn Display| format!("cannot copy the object of {program}: {error}");
        let object = fs::read(objects.join(program)).map_err(|error| told(&error))?;
        let object = without_dwarf(&object).map_err(|error| told(&error))?;
        fs::write(destination.join(program), object).map_err(|error| told(&error))?;
    }
    Ok(())
}

/// Three quarters of an object tell debuggers what BTF tells the kernel; every start of the agent would read them
/// (docs/decisions/0020).
fn without_dwarf(object: &[u8]) -> object::build::Result<Vec<u8>> {
    let mut object = Builder::read(object)?;
    for section in &mut object.sections {
        let of = section.name.strip_prefix(b".rel").unwrap_or(&section.name);
        section.delete = of.starts_with(b".debug_");
    }
    object.delete_orphans();
    // The linker keeps the names of sections and symbols in one table, this library in two.
    let names = object.sections.add();
    names.name = b".shstrtab".as_slice().into();
    names.sh_type = SHT_STRTAB;
    names.sh_addralign = 1;
    names.data = SectionData::SectionString;
    let mut small = Vec::new();
    object.write(&mut small)?;
    Ok(small)
}

fn variable(name: &str) -> Result<OsString, String> {
    env::var_os(name).ok_or_else(|| format!("cargo has not set {name}"))
}

/// The BPF target of the host's byte order, and the architecture whose register layout programs may assume.
fn target() -> Result<(String, String), String> {
    let text = |name| variable(name).map(|value| value.to_string_lossy().into_owned());
    let order = if text("CARGO_CFG_TARGET_ENDIAN")? == "big" { "bpfeb" } else { "bpfel" };
    Ok((format!("{order}-unknown-none"), text("CARGO_CFG_TARGET_ARCH")?))
}

/// The first compiler that has the source of its `core`, which no toolchain brings built for BPF.
fn find_rustc() -> Result<PathBuf, String> {
    let candidates = [
        env::var_os("EBPF_RUSTC").map(PathBuf::from),
        rustup("nightly"),
        rustup("stable"),
        Some(PathBuf::from("/usr/bin/rustc")),
    ];
    let found = candidates.into_iter().flatten().find(|rustc| {
        output(Command::new(rustc).env_remove("RUSTUP_TOOLCHAIN").args(["--print", "sysroot"]))
            .is_some_and(|root| Path::new(&root).join("lib/rustlib/src/rust/library/core").is_dir())
    });
    found.ok_or_else(|| {
        "no rustc with the source of its library: EBPF_RUSTC, rustup's nightly and stable, and \
         /usr/bin/rustc were tried"
            .into()
    })
}

fn rustup(toolchain: &str) -> Option<PathBuf> {
    output(Command::new("rustup").args(["which", "--toolchain", toolchain, "rustc"])).map(PathBuf::from)
}

fn find_linker(root: &Path) -> Result<PathBuf, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let cargo_home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    env::split_paths(&path)
        .chain(cargo_home.or(home).map(|folder| folder.join("bin")))
        .chain([root.join("target/tools/bin")])
        .map(|folder| folder.join("bpf-linker"))
        .find(|linker| linker.is_file())
        .ok_or_else(|| "bpf-linker is not in PATH, ~/.cargo/bin or target/tools/bin".into())
}

fn with_folder_first(folder: Option<&Path>) -> Result<OsString, String> {
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = folder.map(Path::to_owned).into_iter().chain(env::split_paths(&path));
    env::join_paths(folders).map_err(|error| error.to_string())
}

/// What a command prints, without the line's end, if it succeeds.
fn output(command: &mut Command) -> Option<String> {
    let output = command.output().ok().filter(|output| output.status.success())?;
    let text = String::from_utf8(output.stdout).ok()?;
    Some(text.trim_end().to_owned()).filter(|text| !text.is_empty())
}
