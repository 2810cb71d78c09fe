//! The root image of VMs: Debian's user space with what an NFS server and client need, as an ext4 file system,
//! without mounting anything on this machine.
//!
//! mmdebstrap fills a folder from the machine's own apt sources, `mkfs.ext4 -d` makes a file system of it. The
//! image's name carries a hash of all that goes into it; it appears whole or not at all, and is shared by all VMs,
//! which write to a copy that QEMU throws away.

use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::{Hash, Hasher};
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::fcntl::{Flock, FlockArg};

use super::VmError;
use crate::guest_image::cpio::Archive;
use crate::guest_image::{self, BUSYBOX, Kernel};

/// Raised when an image is to be made differently of the same parts.
const RECIPE: u32 = 2;

/// What is installed. The rest of Debian's user space comes with it.
const PACKAGES: [&str; 20] = [
    "attr",
    "e2fsprogs",
    "iproute2",
    "iputils-ping",
    "kmod",
    "libvirt-clients",
    "libvirt-daemon",
    "libvirt-daemon-driver-qemu",
    // The agent is linked with it.
    "libvirt0",
    // The release's own kernel, an older one than this machine's from the backports.
    "linux-image-cloud-amd64",
    "mount",
    "nfs-common",
    "nfs-kernel-server",
    "numactl",
    "procps",
    "qemu-system-x86",
    "qemu-utils",
    "util-linux",
    "xfsprogs",
    "xorriso",
];

/// What nobody reads in a VM.
const LEFT_OUT: [&str; 3] = ["/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*"];

/// Bytes of the root file system; the file is sparse.
const ROOT_BYTES: u64 = 2 << 30;

/// What the root file system is reached by, where it is not in the kernel itself.
const STORAGE: [&str; 3] = ["virtio_pci", "virtio_blk", "virtio_console"];

const INIT: &str = include_str!("init.sh");

/// What a VM boots from.
#[derive(Debug, Clone)]
pub struct VmImage {
    /// Debian's cloud kernel.
    pub kernel: PathBuf,
    /// Finds the root file system and goes on there.
    pub initramfs: PathBuf,
    /// The release's own kernel, which is older, and its initramfs.
    pub release: [PathBuf; 2],
    /// An ext4 file system; shared by all, not to be written to.
    pub root: PathBuf,
}

impl VmImage {
    /// The image, from `cache` or newly built into it (a minute, once). Safe to call from several processes: the
    /// second one waits. An older image is removed.
    ///
    /// # Errors
    /// [`VmError::NotRoot`] when it is to be built by somebody else; what a tool said.
    pub fn ensure(cache: &Path) -> Result<VmImage, VmError> {
        let kernel = Kernel::newest()?;
        fs::create_dir_all(cache).map_err(VmError::io(format!("cannot create {}", cache.display())))?;
        let lock = File::create(cache.join("lock")).map_err(VmError::io("cannot make the image's lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive)
            .map_err(|(_, error)| VmError::io("cannot wait for the image")(error.into()))?;
        let name = format!("{:016x}", hash(&kernel)?);
        let image = VmImage {
            kernel: kernel.image.clone(),
            initramfs: cache.join(format!("{name}.cpio")),
            release: [".vmlinuz", ".release.cpio"].map(|end| cache.join(format!("{name}{end}"))),
            root: cache.join(format!("{name}.ext4")),
        };
        if !image.root.is_file() {
            if !nix::unistd::geteuid().is_root() {
                return Err(VmError::NotRoot);
            }
            clear(cache).map_err(VmError::io(format!("cannot clear {}", cache.display())))?;
            eprintln!("vm: building the root image of test VMs, once (about a minute)");
            build_root(cache, &kernel, &image)?;
        }
        if !image.initramfs.is_file() {
            let partial = cache.join("initramfs.partial");
            fs::write(&partial, initramfs(&kernel)?)
                .and_then(|()| fs::rename(&partial, &image.initramfs))
                .map_err(VmError::io("cannot write the initramfs"))?;
        }
        Ok(image)
    }
}

/// Of all that goes into an image. Packages are named, not hashed: a newer one of the same release changes nothing
/// that a test looks at.
fn hash(kernel: &Kernel) -> Result<u64, VmError> {
    let mut hasher = DefaultHasher::new();
    (RECIPE, ROOT_BYTES, PACKAGES, LEFT_OUT, STORAGE, INIT, &kernel.release).hash(&mut hasher);
    // A kernel may be built anew under the same release.
    let size = fs::metadata(&kernel.image).map_err(VmError::io("cannot look at the kernel"))?.len();
    size.hash(&mut hasher);
    guest_image::read(Path::new(BUSYBOX))?.hash(&mut hasher);
    Ok(hasher.finish())
}

/// Removes older images, and what an interrupted build left.
fn clear(cache: &Path) -> io::Result<()> {
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        if path.ends_with("lock") {
            continue;
        }
        if path.is_dir() { fs::remove_dir_all(&path)? } else { fs::remove_file(&path)? }
    }
    Ok(())
}

fn build_root(cache: &Path, kernel: &Kernel, image: &VmImage) -> Result<(), VmError> {
    let tree = cache.join("root.partial");
    let partial = cache.join("ext4.partial");
    let built = install(&tree).and_then(|()| take_kernel(&tree, &image.release));
    let built = built.and_then(|()| add_modules(&tree, kernel)).and_then(|()| {
        let file = File::create(&partial).and_then(|file| file.set_len(ROOT_BYTES));
        file.map_err(VmError::io("cannot create the root image"))?;
        // A root that is thrown away needs no journal.
        let options = ["-q", "-F", "-O", "^has_journal", "-E", "lazy_itable_init=1,root_owner=0:0", "-d"];
        guest_image::output(Command::new("mkfs.ext4").args(options).arg(&tree).arg(&partial))?;
        fs::rename(&partial, &image.root).map_err(VmError::io("cannot rename the root image"))
    });
    let removed = fs::remove_dir_all(&tree);
    built.and(removed.map_err(VmError::io(format!("cannot remove {}", tree.display()))))
}

/// Fills a folder with Debian. In namespaces of its own, so that what it mounts in there goes with it, however it
/// ends.
fn install(tree: &Path) -> Result<(), VmError> {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child", "mmdebstrap", "--mode=root", "--quiet"]);
    command.args(["--variant=apt", "--architectures=amd64", "--dpkgopt=force-unsafe-io"]);
    command.arg("--aptopt=APT::Install-Recommends \"false\"").arg("--aptopt=Acquire::Retries \"3\"");
    command.arg("--aptopt=Acquire::Languages \"none\"");
    command.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--include={}", PACKAGES.join(",")));
    command.arg("bookworm").arg(tree).args(sources()?);
    command.env("LC_ALL", "C.UTF-8");
    guest_image::output(&mut command)?;
    Ok(())
}

/// The machine's own sources of the release, without its backports: a VM wants nothing newer.
fn sources() -> Result<Vec<PathBuf>, VmError> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    let entries = fs::read_dir("/etc/apt/sources.list.d").into_iter().flatten().flatten();
    files.extend(entries.map(|entry| entry.path()));
    files.retain(|path| {
        let kind = path.extension().is_some_and(|extension| extension == "list" || extension == "sources");
        kind && fs::read_to_string(path).is_ok_and(|text| offers_release(&text))
    });
    files.sort();
    if files.is_empty() {
        let source = io::Error::from(io::ErrorKind::NotFound);
        return Err(VmError::io("no apt source of this machine offers bookworm")(source));
    }
    Ok(files)
}

/// Whether an apt source names the release itself.
fn offers_release(text: &str) -> bool {
    let lines = text.lines().filter(|line| !line.trim_start().starts_with('#'));
    lines.flat_map(str::split_whitespace).any(|word| word == "bookworm" || word == "bookworm-security")
}

/// Takes the release's kernel out of a tree. Its modules stay.
fn take_kernel(tree: &Path, [image, rest]: &[PathBuf; 2]) -> Result<(), VmError> {
    let kernel = Kernel::newest_in(tree)?;
    fs::copy(&kernel.image, image)
        .and_then(|_| fs::remove_dir_all(tree.join("boot")))
        .map_err(VmError::io("cannot take the release's kernel"))?;
    fs::write(rest, initramfs(&kernel)?).map_err(VmError::io("cannot write the release's initramfs"))
}

/// The modules of this machine's cloud kernel, which is the VM's.
fn add_modules(tree: &Path, kernel: &Kernel) -> Result<(), VmError> {
    // /lib is a link to usr/lib in a tree of this release.
    let folder = tree.join("usr/lib/modules");
    fs::create_dir_all(&folder).map_err(VmError::io("cannot create the folder of modules"))?;
    let source = Path::new("/lib/modules").join(&kernel.release);
    guest_image::output(Command::new("cp").arg("-a").arg(source).arg(&folder))?;
    Ok(())
}

/// busybox, the disks' drivers, and a script that goes on from the root file system.
fn initramfs(kernel: &Kernel) -> Result<Vec<u8>, VmError> {
    let mut archive = Archive::default();
    for folder in ["dev", "proc", "sys", "newroot", "modules"] {
        archive.folder(folder, 0o755);
    }
    archive.character_device("dev/console", 5, 1);
    archive.file("bin/busybox", 0o755, &guest_image::read(Path::new(BUSYBOX))?);
    let mut order = String::new();
    for path in kernel.modules(&STORAGE)? {
        let name = path.file_name().unwrap_or_default().to_string_lossy().replace(".xz", "");
        let module = guest_image::read(&path)?;
        // A kernel of the release has its modules as they are.
        let is_packed = path.extension().is_some_and(|extension| extension == "xz");
        let module = if is_packed { guest_image::filter("xz", &["-dc"], &module)? } else { module };
        archive.file(&format!("modules/{name}"), 0o644, &module);
        order.push_str(&name);
        order.push('\n');
    }
    archive.file("modules/order", 0o644, order.as_bytes());
    archive.file("init", 0o755, INIT.as_bytes());
    Ok(archive.finish())
}

/// Makes an ext4 file system of `folder` in `image`: the job files of one VM.
pub(super) fn make_disk(folder: &Path, image: &Path, bytes: u64) -> Result<(), VmError> {
    let file = File::create(image).and_then(|file| file.set_len(bytes));
    file.map_err(VmError::io(format!("cannot create {}", image.display())))?;
    let options = ["-q", "-F", "-O", "^has_journal", "-m", "0", "-E", "lazy_itable_init=1,root_owner=0:0"];
    guest_image::output(Command::new("mkfs.ext4").args(options).arg("-d").arg(folder).arg(image))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_of_backports_only_is_not_the_releases() {
        assert!(offers_release("Types: deb\nURIs: http://m.invalid/\nSuites: bookworm bookworm-updates\n"));
        assert!(offers_release("deb http://m.invalid/ bookworm main\n"));
        assert!(!offers_release("Types: deb\nSuites: bookworm-backports\n"));
        assert!(!offers_release("# deb http://m.invalid/ bookworm main\n"));
    }
}
