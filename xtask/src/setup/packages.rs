//! The Debian packages, each with its reason, and how they are found missing and installed.

use std::collections::BTreeMap;
use std::process::Command;

use super::SetupError;
use crate::command;

/// One Debian package that Godwit wants.
pub(crate) struct Package {
    /// Debian's name of it.
    pub(crate) name: &'static str,
    /// The oldest version that will do; empty: any.
    minimum: &'static str,
    /// Why it is wanted, as shown to the user.
    pub(crate) why: &'static str,
}

const fn package(name: &'static str, minimum: &'static str, why: &'static str) -> Package {
    Package { name, minimum, why }
}

const BASE: &[Package] = &[
    package("gcc", "", "compiles SQLite and links"),
    package("libc6-dev", "", "compiles SQLite and links"),
    package("pkg-config", "", "finds libvirt while building the agent"),
    package("libvirt-dev", "11", "libvirt's headers, for the agent"),
    package("libvirt-daemon-system", "11", "libvirtd: runs the guests of each host"),
    package("libvirt-clients", "11", "virsh: the tests' second opinion on each host"),
    package("qemu-system-x86", "1:10", "QEMU: the guests"),
    package("qemu-system-common", "1:10", "QEMU: the guests"),
    package("qemu-utils", "1:10", "qemu-img: looks into images, and a benchmark's peer"),
    package("qemu-block-extra", "1:10", "QEMU's network block drivers"),
    package("linux-image-cloud-amd64", "6.12", "the guest image's kernel, and the kernel of test VMs"),
    package("rustc-web", "1.90", "a compiler with LLVM 22, for the eBPF programs"),
    package("rust-web-src", "1.90", "core's source, for the eBPF programs"),
    package("bpftool", "", "the tests' second opinion on programs and maps"),
    package("iproute2", "", "links of the lab's hosts"),
    package("ethtool", "", "offloads of links, which tests set"),
    package("iputils-ping", "", "pings guests"),
    package("curl", "", "reads metrics as a scrape does"),
    package("tcpdump", "", "the tests' second opinion on packets"),
    package("util-linux", "", "enters a lab host by hand (nsenter)"),
    package("busybox-static", "", "the guest image's user space, and a DHCP client of the tests"),
    package("isc-dhcp-client", "", "a DHCPv6 client of the tests"),
    package("dropbear-bin", "", "the guest image's SSH server"),
    package("openssh-client", "", "logs into guests"),
    package("syslinux", "", "the guest image's boot loader"),
    package("syslinux-common", "", "the guest image's boot loader"),
    package("fdisk", "", "the guest image's partition table"),
    package("dosfstools", "", "the guest image's file system"),
    package("mtools", "", "the guest image's files, without a mount"),
    package("xz-utils", "", "unpacks the guest image's kernel modules"),
    package("mmdebstrap", "", "fills the root image of test VMs"),
    package("e2fsprogs", "", "the file system of test VMs, without a mount"),
    package("xorriso", "", "reads and writes config drives in tests"),
    package("libnbd-bin", "", "nbdfuse: files that do not read, for tests; nbdcopy: a benchmark's peer"),
    package("nbdkit", "", "disks that fail, for tests, and NBD servers for benchmarks"),
    package("python3", "", "runs the unmodified OpenStack clients"),
];

const BENCH: &[Package] = &[
    package("fio", "", "disk peers and limits"),
    package("rsync", "", "a peer of copies and streams"),
    package("xfsprogs", "", "a file system with reflinks to copy on"),
    package("openssh-server", "", "scp and rsync between two hosts, peers of streams"),
    package("openssl", "", "certificates for peers of streams"),
    package("socat", "", "a peer of the migration relay"),
    package("iperf3", "", "a peer and limit of the overlay"),
    package("openvswitch-switch", "", "a peer of the overlay, in user space; its service need not run"),
];

const VENV: Package = package("python3-venv", "", "makes the environment of the OpenStack clients");

/// What this machine should carry. python3-venv is asked for only where the machine's python lacks it: a
/// machine with its own build of Python needs no second one.
pub(crate) fn wanted(bench: bool) -> Vec<&'static Package> {
    let mut wanted: Vec<&Package> = BASE.iter().collect();
    if !command::succeeds(Command::new("python3").args(["-c", "import ensurepip, venv"])) {
        wanted.push(&VENV);
    }
    if bench {
        wanted.extend(BENCH);
    }
    wanted
}

/// A list to install from by hand.
pub(crate) fn list(wanted: &[&Package]) -> String {
    wanted
        .iter()
        .map(|package| format!("  {:<24} {}", package.name, package.why))
        .collect::<Vec<_>>()
        .join("\n")
}

/// Those of `wanted` that are absent, half installed, or too old.
pub(crate) fn missing<'a>(wanted: &[&'a Package]) -> Result<Vec<&'a Package>, SetupError> {
    let listed = command::capture(Command::new("dpkg-query").args([
        "-W",
        "-f",
        "${Package} ${Version} ${db:Status-Status}\n",
    ]))?;
    let installed = parse_installed(&listed);
    let mut missing = Vec::new();
    for &package in wanted {
        let fits = match installed.get(package.name) {
            None => false,
            Some(_) if package.minimum.is_empty() => true,
            Some(version) => command::succeeds(Command::new("dpkg").args([
                "--compare-versions",
                version,
                "ge",
                package.minimum,
            ])),
        };
        if !fits {
            missing.push(package);
        }
    }
    Ok(missing)
}

/// Package name to version, of what is wholly installed.
fn parse_installed(listed: &str) -> BTreeMap<&str, &str> {
    listed
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_whitespace();
            let (name, version, status) = (fields.next()?, fields.next()?, fields.next()?);
            (status == "installed").then_some((name, version))
        })
        .collect()
}

/// Installs `missing`, backports preferred: QEMU, libvirt and the kernel must come from there, and their
/// dependencies with them.
pub(crate) fn install(missing: &[&Package], codename: &str) -> Result<(), SetupError> {
    // An installation that was interrupted leaves packages unpacked; apt refuses to go on until they are done.
    command::run(apt_environment(&mut Command::new("dpkg")).args(["--force-confold", "--configure", "-a"]))?;
    println!("setup: reading the package lists");
    command::run(apt().args(["update", "-q=2"]))?;
    println!("setup: installing {} packages", missing.len());
    command::run(
        apt()
            .args(["install", "-y", "-q=2", "--no-install-recommends", "--fix-broken", "-t"])
            .arg(format!("{codename}-backports"))
            .args(missing.iter().map(|package| package.name)),
    )?;
    Ok(())
}

fn apt() -> Command {
    let mut command = Command::new("apt-get");
    // Another apt may be at work, and a mirror may hiccup.
    command.args(["-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]);
    command.args(["-o", "Dpkg::Options::=--force-confold", "-o", "Dpkg::Use-Pty=0"]);
    apt_environment(&mut command);
    command
}

fn apt_environment(command: &mut Command) -> &mut Command {
    command.env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_half_installed_package_counts_as_missing() {
        let installed =
            parse_installed("qemu-utils 1:10.0.2 installed\ngcc 12 half-configured\nfdisk  not-installed\n");
        assert_eq!(installed.get("qemu-utils"), Some(&"1:10.0.2"));
        assert!(!installed.contains_key("gcc"));
        assert!(!installed.contains_key("fdisk"));
    }

    #[test]
    fn every_package_is_named_once_and_says_why() {
        let mut seen = std::collections::BTreeSet::new();
        for package in BASE.iter().chain(BENCH) {
            assert!(seen.insert(package.name), "{} is listed twice", package.name);
            assert!(!package.why.is_empty(), "{} has no reason", package.name);
        }
    }
}
