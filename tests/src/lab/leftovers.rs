//! What a lab still carries of its users' things: to show that deleting leaves nothing.

use std::collections::BTreeSet;
use std::path::Path;

use super::host::Host;
use super::{Lab, LabError};

/// Everything there is, as lines such as "h1: domain instance-0a1b2c3d".
pub(super) fn everything(lab: &Lab) -> Result<BTreeSet<String>, LabError> {
    let mut found = BTreeSet::new();
    for host in lab.hosts() {
        if host.init_process().is_err() {
            continue;
        }
        let mut note = |kind: &str, name: &str| {
            found.insert(format!("{}: {kind} {name}", host.name()));
        };
        // libvirtd may be held down; then its guests still show as processes.
        if let Ok(list) = host.exec(&["virsh", "--connect", "qemu:///system", "list", "--all", "--name"]) {
            list.lines().filter(|line| !line.is_empty()).for_each(|name| note("domain", name));
        }
        for name in links(host)? {
            note("link", &name);
        }
        for process in guest_processes(host)? {
            note("process", &process);
        }
        let pins = Path::new("/proc").join(host.init_process()?.to_string()).join("root/sys/fs/bpf");
        for path in files_below(&pins) {
            note("pin", &path);
        }
    }
    for path in files_below(&lab.folder().join("srv/godwit")) {
        found.insert(format!("pool: file {path}"));
    }
    Ok(found)
}

fn links(host: &Host) -> Result<Vec<String>, LabError> {
    let listed = host.exec(&["ip", "-o", "link", "show"])?;
    let names = listed.lines().filter_map(|line| line.split(": ").nth(1)).map(|name| {
        // A veth's name is followed by its peer's.
        name.split('@').next().unwrap_or(name).to_owned()
    });
    Ok(names.filter(|name| !["lo", "eth0"].contains(&name.as_str())).collect())
}

/// QEMU and copy workers, by the name of what they work on.
fn guest_processes(host: &Host) -> Result<Vec<String>, LabError> {
    let listed = host.exec(&["ps", "-eo", "args="])?;
    let ours = |line: &&str| line.starts_with("/usr/bin/qemu-system") || line.contains("godwit-agent worker");
    Ok(listed
        .lines()
        .filter(ours)
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = words.iter().find_map(|word| word.strip_prefix("guest=")).unwrap_or(words[0]);
            name.split(',').next().unwrap_or(name).to_owned()
        })
        .collect())
}

/// All files below a folder, relative to it.
fn files_below(root: &Path) -> Vec<String> {
    let mut files = Vec::new();
    let mut folders = vec![root.to_path_buf()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                folders.push(path.clone());
                // An instance's empty folder is a leftover too.
                if path.parent().is_some_and(|parent| parent == root) {
                    continue;
                }
            }
            files.push(path.strip_prefix(root).unwrap_or(&path).display().to_string());
        }
    }
    files
}
