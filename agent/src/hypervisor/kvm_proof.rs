//! Whether KVM works on this host. That /dev/kvm opens proves nothing: under some hypervisors firmware runs and
//! every ordinary kernel dies. So one is booted for a moment, until it panics for want of a root file system.

use serde::{Deserialize, Serialize};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// How long the kernel may take; under KVM it needs about a second.
const DEADLINE: Duration = Duration::from_secs(20);

/// The last words of a kernel that came all the way up.
const ALIVE: &str = "Kernel panic - not syncing";

/// What QEMU says when the vCPU cannot go on.
const DEAD: &str = "KVM internal error";

/// A proof or its failure, as it is kept for the next start.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Verdict {
    /// Kernel, QEMU and CPU that it holds for.
    key: String,
    kvm: bool,
    reason: String,
}

/// Whether guests may use KVM; tried once for each kernel, QEMU and CPU, and kept in `state_dir`.
pub(super) fn prove(qemu: &str, qemu_version: &str, state_dir: &Path) -> bool {
    let key = key(qemu_version);
    let path = state_dir.join("kvm-proof.json");
    let kept = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice::<Verdict>(&text).ok());
    if let Some(verdict) = kept.filter(|verdict| verdict.key == key) {
        return verdict.kvm;
    }
    let outcome = attempt(qemu);
    let verdict = Verdict {
        key,
        kvm: outcome.is_ok(),
        reason: outcome.err().unwrap_or_else(|| "a kernel came up".to_owned()),
    };
    tracing::info!(kvm = verdict.kvm, reason = verdict.reason, "KVM was put to the proof");
    let text = serde_json::json!(verdict).to_string();
    if let Err(error) = std::fs::write(&path, text) {
        tracing::warn!("the proof is not kept in {}: {error}", path.display());
    }
    verdict.kvm
}

fn key(qemu_version: &str) -> String {
    let kernel = std::fs::read_to_string("/proc/version").unwrap_or_default();
    let cpus = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let model = cpus.lines().find(|line| line.starts_with("model name")).unwrap_or_default();
    format!("{} | QEMU {qemu_version} | {model}", kernel.trim())
}

fn attempt(qemu: &str) -> Result<(), String> {
    if let Err(error) = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm") {
        return Err(format!("/dev/kvm does not open: {error}"));
    }
    let kernel = find_kernel().ok_or("there is no readable /boot/vmlinuz-* to boot")?;
    let child = Command::new(qemu)
        .args(["-machine", "q35,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults", "-no-user-config"])
        .args(["-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none", "-kernel"])
        .arg(kernel)
        .args(["-append", "console=ttyS0 panic=-1"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| format!("{qemu} does not start: {error}"))?;
    watch(child)
}

/// The running kernel's file where it is there, else any.
fn find_kernel() -> Option<PathBuf> {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").ok()?;
    let own = Path::new("/boot").join(format!("vmlinuz-{}", release.trim()));
    let others = std::fs::read_dir("/boot").ok()?.flatten().map(|entry| entry.path());
    let mut others: Vec<PathBuf> = others
        .filter(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .collect();
    others.sort();
    std::iter::once(own).chain(others.into_iter().rev()).find(|path| std::fs::File::open(path).is_ok())
}

/// Reads what QEMU and the kernel say until one of them settles it.
fn watch(mut child: Child) -> Result<(), String> {
    let (sender, receiver) = mpsc::channel::<Vec<u8>>();
    let outputs: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
        child.stderr.take().map(|pipe| Box::new(pipe) as Box<dyn Read + Send>),
    ];
    for mut output in outputs.into_iter().flatten() {
        let sender = sender.clone();
        std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(length @ 1..) = output.read(&mut buffer) {
                if sender.send(buffer[..length].to_vec()).is_err() {
                    return;
                }
            }
        });
    }
    drop(sender);
    let deadline = Instant::now() + DEADLINE;
    let mut said = Vec::new();
    let verdict = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match receiver.recv_timeout(left) {
            Ok(bytes) => said.extend(bytes),
            Err(mpsc::RecvTimeoutError::Timeout) => {
                break Err("the kernel did not come up in time".to_owned());
            }
            Err(mpsc::RecvTimeoutError::Disconnected) => {
                let said = String::from_utf8_lossy(&said);
                break Err(format!("QEMU ended: {}", said.lines().last().unwrap_or("it said nothing")));
            }
        }
        let text = String::from_utf8_lossy(&said);
        if text.contains(ALIVE) {
            break Ok(());
        }
        if text.contains(DEAD) {
            break Err(DEAD.to_owned());
        }
    };
    // It fails only when QEMU is gone already.
    let _ = child.kill();
    let _ = child.wait();
    verdict
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(script: &str) -> Result<(), String> {
        let mut command = Command::new("sh");
        command.args(["-c", script]).stdout(Stdio::piped()).stderr(Stdio::piped());
        watch(command.spawn().unwrap())
    }

    #[test]
    fn only_a_kernel_that_came_up_is_a_proof() {
        assert_eq!(run("echo 'x Kernel panic - not syncing: VFS'; sleep 60"), Ok(()));
        assert_eq!(run("echo 'KVM internal error' >&2; sleep 60"), Err(DEAD.to_owned()));
        assert_eq!(run("echo no such machine >&2; exit 1"), Err("QEMU ended: no such machine".to_owned()));
    }

    #[test]
    fn a_verdict_is_kept_for_its_kernel_and_qemu_only() {
        let folder = tempfile::tempdir().unwrap();
        let keep = |key: String| {
            let verdict = Verdict { key, kvm: true, reason: String::new() };
            std::fs::write(folder.path().join("kvm-proof.json"), serde_json::json!(verdict).to_string())
                .unwrap();
        };
        keep(key("10.0.2"));
        assert!(prove("/nonexistent/qemu", "10.0.2", folder.path()));
        assert!(!prove("/nonexistent/qemu", "10.0.3", folder.path()));
    }
}
