//! The test guest: a bootable qcow2 image made of Debian's packages, without mounting anything.
//!
//! Debian's cloud kernel and an initramfs of busybox and dropbear lie on a FAT partition that syslinux boots.
//! The guest takes its host name, addresses, SSH keys and user data from an OpenStack config drive, prints one
//! line `GODWIT-GUEST ready hostname=… address=… uptime=…` to its serial console, and answers ping and SSH. It
//! powers off when its power button is pressed. Nothing it writes is kept: its root lies in memory.

pub(crate) mod cpio;
mod kernel;

use std::collections::hash_map::DefaultHasher;
use std::hash::Hasher;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cpio::Archive;
pub use kernel::Kernel;

/// The beginning of the line that a guest prints when it is up.
pub const READY: &str = "GODWIT-GUEST ready ";

/// Bytes of the disk that a guest sees; what the partition holds is about half of it.
const DISK_BYTES: u64 = 40 << 20;
const PARTITION_OFFSET: u64 = 1 << 20;

const RC: &str = include_str!("guest_image/rc.sh");
const JSON_AWK: &str = include_str!("guest_image/json.awk");
const NETWORK_AWK: &str = include_str!("guest_image/network.awk");
/// The console waits for Enter before it starts a shell, so that a console log stays quiet.
const INITTAB: &str = "::sysinit:/etc/rc\nttyS0::askfirst:-/bin/sh\n";
/// Nothing is worth waiting for: the root lies in memory.
const POWER_OFF: &str = "#!/bin/sh\nsync\nexec /bin/busybox poweroff -f\n";
const REBOOT: &str = "#!/bin/sh\nsync\nexec /bin/busybox reboot -f\n";
const SYSLINUX: &str = "SERIAL 0 115200\nDEFAULT guest\nPROMPT 0\nLABEL guest\n KERNEL vmlinuz\n INITRD initrd\n \
                        APPEND console=ttyS0 quiet panic=1 mitigations=off random.trust_cpu=on\n";
const MODULES: [&str; 8] =
    ["virtio_blk", "virtio_net", "virtio_rng", "ahci", "sr_mod", "isofs", "button", "evdev"];
pub(crate) const BUSYBOX: &str = "/usr/bin/busybox";
const DROPBEAR: &str = "/usr/sbin/dropbear";
const MBR: &str = "/usr/lib/syslinux/mbr/mbr.bin";

/// An image that is ready to be uploaded or booted.
#[derive(Debug, Clone)]
pub struct GuestImage {
    /// A qcow2 file; shared by all, not to be written to.
    pub path: PathBuf,
    /// The disk's size as a guest sees it.
    pub virtual_bytes: u64,
}

/// Why there is no guest image.
#[derive(Debug, thiserror::Error)]
pub enum GuestImageError {
    /// The package linux-image-cloud-amd64 is not installed.
    #[error("no Debian cloud kernel under /boot and /lib/modules; run `cargo xtask setup`")]
    NoKernel,
    /// A part of the image cannot be read.
    #[error("cannot read {path}; run `cargo xtask setup`")]
    Read {
        /// The part.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The image cannot be written.
    #[error("cannot write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A tool cannot be started.
    #[error("cannot start `{program}`; run `cargo xtask setup`")]
    Start {
        /// The tool.
        program: String,
        /// What the system said.
        source: io::Error,
    },
    /// A tool failed.
    #[error("`{program}` failed: {message}")]
    Tool {
        /// The tool.
        program: String,
        /// What it said.
        message: String,
    },
}

/// The image, from `cache` or newly built into it (a few seconds). The file's name carries a hash of all that
/// went into it, so that a newer kernel or script makes a newer image. Safe to call from several processes.
pub fn ensure(cache: &Path) -> Result<GuestImage, GuestImageError> {
    let parts = Parts::collect()?;
    let path = cache.join(format!("guest-{:016x}.qcow2", parts.hash()));
    if !path.is_file() {
        std::fs::create_dir_all(cache)
            .map_err(|source| GuestImageError::Write { path: cache.into(), source })?;
        let raw = cache.join(format!("guest-{}.raw.partial", std::process::id()));
        let built = build(&parts, &raw, &path);
        let _ = std::fs::remove_file(&raw);
        built?;
    }
    Ok(GuestImage { path, virtual_bytes: DISK_BYTES })
}

/// All that goes into an image, as files of this machine.
struct Parts {
    kernel: Vec<u8>,
    /// Compressed, in load order.
    modules: Vec<(PathBuf, Vec<u8>)>,
    /// Where each goes, and its content.
    programs: Vec<(PathBuf, Vec<u8>)>,
    mbr: Vec<u8>,
    applets: String,
}

impl Parts {
    fn collect() -> Result<Parts, GuestImageError> {
        let kernel = Kernel::newest()?;
        let with_content = |path: PathBuf| read(&path).map(|content| (path, content));
        let mut programs = vec![with_content(DROPBEAR.into())?];
        for library in libraries(&output(Command::new("ldd").arg(DROPBEAR))?) {
            programs.push(with_content(library)?);
        }
        programs.push((PathBuf::from("/bin/busybox"), read(Path::new(BUSYBOX))?));
        Ok(Parts {
            kernel: read(&kernel.image)?,
            modules: kernel.modules(&MODULES)?.into_iter().map(with_content).collect::<Result<_, _>>()?,
            programs,
            mbr: read(Path::new(MBR))?,
            applets: output(Command::new(BUSYBOX).arg("--list"))?,
        })
    }

    fn hash(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        for text in [RC, JSON_AWK, NETWORK_AWK, INITTAB, POWER_OFF, REBOOT, SYSLINUX, &self.applets] {
            hasher.write(text.as_bytes());
        }
        hasher.write_u64(DISK_BYTES);
        hasher.write(&self.kernel);
        hasher.write(&self.mbr);
        for (path, content) in self.modules.iter().chain(&self.programs) {
            hasher.write(path.as_os_str().as_encoded_bytes());
            hasher.write(content);
        }
        hasher.finish()
    }

    fn initramfs(&self) -> Result<Vec<u8>, GuestImageError> {
        let mut archive = Archive::default();
        for folder in ["dev", "proc", "sys", "run", "etc/dropbear", "usr/sbin", "bin"] {
            archive.folder(folder, 0o755);
        }
        archive.folder("tmp", 0o1777);
        archive.folder("root", 0o700);
        archive.folder("root/.ssh", 0o700);
        archive.character_device("dev/console", 5, 1);
        archive.character_device("dev/null", 1, 3);
        for (path, content) in &self.programs {
            archive.file(path.to_string_lossy().trim_start_matches('/'), 0o755, content);
        }
        for applet in
            self.applets.lines().filter(|applet| !["busybox", "poweroff", "reboot"].contains(applet))
        {
            archive.link(&format!("bin/{applet}"), "busybox");
        }
        archive.link("init", "bin/busybox");
        let mut order = String::new();
        for (path, content) in &self.modules {
            let name = path.file_name().unwrap_or_default().to_string_lossy().replace(".xz", "");
            archive.file(&format!("lib/modules/{name}"), 0o644, &filter("xz", &["-dc"], content)?);
            order.push_str(&name);
            order.push('\n');
        }
        archive.file("lib/modules/order", 0o644, order.as_bytes());
        archive.file("lib/json.awk", 0o644, JSON_AWK.as_bytes());
        archive.file("lib/network.awk", 0o644, NETWORK_AWK.as_bytes());
        archive.file("etc/rc", 0o755, RC.as_bytes());
        archive.file("etc/inittab", 0o644, INITTAB.as_bytes());
        archive.file("etc/passwd", 0o644, b"root:*:0:0:root:/root:/bin/sh\n");
        archive.file("etc/group", 0o644, b"root:x:0:\n");
        archive.file("etc/shells", 0o644, b"/bin/sh\n");
        archive.file("bin/poweroff", 0o755, POWER_OFF.as_bytes());
        archive.file("bin/reboot", 0o755, REBOOT.as_bytes());
        archive.file("etc/acpi/PWRF/00000080", 0o755, POWER_OFF.as_bytes());
        filter("gzip", &["-6", "-n"], &archive.finish())
    }
}

fn build(parts: &Parts, raw: &Path, image: &Path) -> Result<(), GuestImageError> {
    let write_error = |source| GuestImageError::Write { path: raw.to_path_buf(), source };
    let disk = std::fs::File::create(raw).map_err(write_error)?;
    disk.set_len(DISK_BYTES).map_err(write_error)?;

    let table = format!("label: dos\nstart={}, type=e, bootable\n", PARTITION_OFFSET / 512);
    feed(Command::new("sfdisk").arg("--quiet").arg(raw), table.as_bytes())?;
    // The boot code goes before the table, which begins at byte 440 with the disk's signature.
    disk.write_all_at(&parts.mbr[..parts.mbr.len().min(440)], 0).map_err(write_error)?;
    let sectors = (PARTITION_OFFSET / 512).to_string();
    let kibibytes = ((DISK_BYTES - PARTITION_OFFSET) / 1024).to_string();
    output(
        Command::new("mkfs.vfat")
            .args(["-F", "16", "-h", &sectors, "--offset", &sectors])
            .arg(raw)
            .arg(kibibytes),
    )?;
    let drive = format!("{}@@{PARTITION_OFFSET}", raw.display());
    for (name, content) in [
        ("vmlinuz", &parts.kernel[..]),
        ("initrd", &parts.initramfs()?),
        ("syslinux.cfg", SYSLINUX.as_bytes()),
    ] {
        feed(Command::new("mcopy").args(["-i", &drive, "-", &format!("::{name}")]), content)?;
    }
    output(Command::new("syslinux").args(["--install", "-t", &PARTITION_OFFSET.to_string()]).arg(raw))?;

    let partial = image.with_extension(format!("{}.partial", std::process::id()));
    output(
        Command::new("qemu-img").args(["convert", "-c", "-f", "raw", "-O", "qcow2"]).arg(raw).arg(&partial),
    )?;
    std::fs::rename(&partial, image)
        .map_err(|source| GuestImageError::Write { path: image.to_path_buf(), source })
}

/// The files that ldd(1) names: "libz.so.1 => /lib/…/libz.so.1 (0x…)" or "/lib64/ld-linux… (0x…)".
fn libraries(ldd: &str) -> Vec<PathBuf> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(PathBuf::from)
        .collect()
}

pub(crate) fn read(path: &Path) -> Result<Vec<u8>, GuestImageError> {
    std::fs::read(path).map_err(|source| GuestImageError::Read { path: path.to_path_buf(), source })
}

pub(crate) fn output(command: &mut Command) -> Result<String, GuestImageError> {
    feed(command, &[]).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

pub(crate) fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>, GuestImageError> {
    feed(Command::new(program).args(arguments), input)
}

/// Runs a tool with `input` on stdin and returns its stdout.
fn feed(command: &mut Command, input: &[u8]) -> Result<Vec<u8>, GuestImageError> {
    let program = command.get_program().to_string_lossy().into_owned();
    let start_error = |source| GuestImageError::Start { program: program.clone(), source };
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().map_err(start_error)?;
    let stdin = child.stdin.take();
    let output = std::thread::scope(|scope| {
        scope.spawn(move || {
            // A tool that ends early says why on stderr; the broken pipe adds nothing.
            let _ = stdin.map(|mut stdin| stdin.write_all(input));
        });
        child.wait_with_output()
    })
    .map_err(start_error)?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    Err(GuestImageError::Tool { program, message: String::from_utf8_lossy(&output.stderr).trim().to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn awk(script: &str, input: &[u8]) -> String {
        let lines = feed(Command::new(BUSYBOX).args(["awk", script]), input).expect("busybox awk runs");
        String::from_utf8(lines).expect("is text")
    }

    #[test]
    fn the_guests_json_reader_takes_compact_and_pretty_text() {
        let compact = br#"{"a":[{"b":"x\"y\\n\n"},2,null],"public_keys":{"k/1":"ssh-ed25519 AA\/+= me"},"e":{},"f":[]}"#;
        let pretty: serde_json::Value = serde_json::from_slice(compact).expect("is JSON");
        let pretty = serde_json::to_vec_pretty(&pretty).expect("is JSON");
        let flat = "/a/0/b\tx\"y\\n \n/a/1\t2\n/a/2\tnull\n/public_keys/k/1\tssh-ed25519 AA/+= me\n";
        assert_eq!(awk(JSON_AWK, compact), flat);
        let mut lines: Vec<&str> = flat.lines().collect();
        lines.sort_unstable();
        let sorted = awk(JSON_AWK, &pretty);
        let mut sorted: Vec<&str> = sorted.lines().collect();
        sorted.sort_unstable();
        assert_eq!(sorted, lines);
    }

    #[test]
    fn the_guests_network_reader_joins_links_and_networks() {
        let data = br#"{"links":[{"id":"tap1","type":"ovs","mtu":1450,"ethernet_mac_address":"FA:16:3E:00:00:01"},
            {"id":"tap2","mtu":null,"ethernet_mac_address":"fa:16:3e:00:00:02"}],
            "networks":[{"id":"network0","type":"ipv4","link":"tap1","ip_address":"10.0.0.5","netmask":"255.255.255.0",
              "routes":[{"network":"0.0.0.0","netmask":"0.0.0.0","gateway":"10.0.0.1"}],"services":[]},
             {"id":"network1","type":"ipv4_dhcp","link":"tap2"},
             {"id":"network2","type":"ipv6","link":"tap2","ip_address":"fd00::5","netmask":"ffff:ffff:ffff:ffff::"}],
            "services":[{"type":"dns","address":"10.0.0.1"}]}"#;
        assert_eq!(
            awk(NETWORK_AWK, awk(JSON_AWK, data).as_bytes()),
            "link fa:16:3e:00:00:01 1450\nlink fa:16:3e:00:00:02 0\n\
             address fa:16:3e:00:00:01 4 10.0.0.5 255.255.255.0\nroute fa:16:3e:00:00:01 4 0.0.0.0 0.0.0.0 10.0.0.1\n\
             address fa:16:3e:00:00:02 6 fd00::5 ffff:ffff:ffff:ffff::\n"
        );
    }

    #[test]
    fn ldd_names_libraries_and_the_loader() {
        let text = "\tlinux-vdso.so.1 (0x1)\n\tlibz.so.1 => /lib/libz.so.1 (0x2)\n\t/lib64/ld-linux-x86-64.so.2 (0x3)\n";
        assert_eq!(
            libraries(text),
            [PathBuf::from("/lib/libz.so.1"), PathBuf::from("/lib64/ld-linux-x86-64.so.2")]
        );
    }
}
