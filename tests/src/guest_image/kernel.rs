//! Finds Debian's cloud kernel and the modules that a guest needs of it.

use std::path::{Path, PathBuf};

use super::GuestImageError;

/// A kernel whose image and modules are both installed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kernel {
    /// As `uname -r` says it.
    pub release: String,
    /// The bootable image.
    pub image: PathBuf,
    modules: PathBuf,
}

impl Kernel {
    /// The newest cloud kernel of this machine.
    pub fn newest() -> Result<Kernel, GuestImageError> {
        Self::newest_in(Path::new("/"))
    }

    /// The newest one of the system under this folder.
    pub fn newest_in(root: &Path) -> Result<Kernel, GuestImageError> {
        let modules = root.join("lib/modules");
        let found = std::fs::read_dir(&modules).into_iter().flatten().flatten();
        found
            .filter_map(|entry| entry.file_name().into_string().ok())
            .filter(|release| release.ends_with("-cloud-amd64"))
            .map(|release| Kernel {
                image: root.join("boot").join(format!("vmlinuz-{release}")),
                modules: modules.join(&release),
                release,
            })
            .filter(|kernel| kernel.image.is_file() && kernel.modules.join("modules.dep").is_file())
            .max_by_key(|kernel| numbers(&kernel.release))
            .ok_or(GuestImageError::NoKernel)
    }

    /// The files of `wanted` modules and of those that they depend on, in the order in which they load. A
    /// module that is built into the kernel, or that it does not have, is left out.
    pub fn modules(&self, wanted: &[&str]) -> Result<Vec<PathBuf>, GuestImageError> {
        let path = self.modules.join("modules.dep");
        let text = std::fs::read_to_string(&path).map_err(|source| GuestImageError::Read { path, source })?;
        Ok(load_order(&text, wanted).into_iter().map(|file| self.modules.join(file)).collect())
    }
}

/// "6.12.95+deb12-cloud-amd64" to [6, 12, 95, 12, 64], so that 6.12 is newer than 6.9.
fn numbers(release: &str) -> Vec<u64> {
    release.split(|c: char| !c.is_ascii_digit()).filter_map(|digits| digits.parse().ok()).collect()
}

/// `modules.dep` lists after each module what it needs, the deepest last (modules.dep(5)).
fn load_order<'a>(dependencies: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut order = Vec::new();
    for name in wanted {
        let line = dependencies.lines().find_map(|line| {
            let (file, needs) = line.split_once(':')?;
            (module_name(file) == *name).then_some((file, needs))
        });
        let Some((file, needs)) = line else { continue };
        for file in needs.split_whitespace().rev().chain([file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    order
}

/// "kernel/drivers/char/hw_random/virtio-rng.ko.xz" to "virtio_rng".
fn module_name(file: &str) -> String {
    let name = file.rsplit('/').next().unwrap_or(file);
    name.split(".ko").next().unwrap_or(name).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_is_loaded_before_it() {
        let text = "k/sr_mod.ko.xz: k/scsi_mod.ko.xz k/scsi_common.ko.xz k/cdrom.ko.xz\n\
                    k/ahci.ko.xz: k/libahci.ko.xz k/libata.ko.xz k/scsi_mod.ko.xz k/scsi_common.ko.xz\n\
                    k/virtio-rng.ko.xz:\n";
        assert_eq!(
            load_order(text, &["virtio_rng", "absent", "ahci", "sr_mod"]),
            [
                "k/virtio-rng.ko.xz",
                "k/scsi_common.ko.xz",
                "k/scsi_mod.ko.xz",
                "k/libata.ko.xz",
                "k/libahci.ko.xz",
                "k/ahci.ko.xz",
                "k/cdrom.ko.xz",
                "k/sr_mod.ko.xz",
            ]
        );
    }

    #[test]
    fn six_twelve_is_newer_than_six_nine() {
        assert!(numbers("6.12.1+deb12-cloud-amd64") > numbers("6.9.80-cloud-amd64"));
    }
}
