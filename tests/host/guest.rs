//! The guest image boots and takes its settings from a config drive.

use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use godwit_tests::guest_image;

const META_DATA: &str = r#"{"uuid":"9d2f0c9e-3f8c-4c7a-8f8e-6f1d1a3f0b11","name":"falcon","hostname":"falcon.example",
"public_keys":{"me":"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDq3 me@there\n"},"keys":[{"name":"me","type":"ssh","data":"x"}]}"#;
const NETWORK_DATA: &str = r#"{"links":[
{"id":"tap1","vif_id":"1","type":"ovs","mtu":1450,"ethernet_mac_address":"fa:16:3e:00:00:01"},
{"id":"tap2","vif_id":"2","type":"ovs","mtu":1400,"ethernet_mac_address":"fa:16:3e:00:00:02"}],
"networks":[{"id":"network0","type":"ipv4","link":"tap2","ip_address":"10.9.0.5","netmask":"255.255.240.0",
"routes":[{"network":"0.0.0.0","netmask":"0.0.0.0","gateway":"10.9.0.1"}],"network_id":"n"}],"services":[]}"#;
const USER_DATA: &str = "#!/bin/sh\nip -o addr show\nip route\ncat /root/.ssh/authorized_keys\necho MTU $(cat /sys/class/net/eth*/mtu)\n\
                         pidof dropbear >/dev/null && echo SSH-IS-UP\necho USER-DATA-END\n";

/// A QEMU of our own, killed when dropped.
struct Guest {
    child: Child,
    stdin: ChildStdin,
    lines: Receiver<String>,
    seen: Vec<String>,
}

impl Guest {
    fn boot(image: &Path, config_drive: Option<&Path>) -> Guest {
        let mut command = Command::new("qemu-system-x86_64");
        command.args([
            "-M",
            "q35",
            "-accel",
            "tcg",
            "-m",
            "256",
            "-nodefaults",
            "-display",
            "none",
            "-no-reboot",
        ]);
        command.args(["-drive", &format!("if=virtio,format=qcow2,snapshot=on,file={}", image.display())]);
        for number in 1..=2 {
            command.args(["-netdev", &format!("hubport,id=n{number},hubid={number}")]);
            command
                .args(["-device", &format!("virtio-net-pci,netdev=n{number},mac=fa:16:3e:00:00:0{number}")]);
        }
        if let Some(path) = config_drive {
            command.args([
                "-drive",
                &format!("if=none,id=c,media=cdrom,format=raw,readonly=on,file={}", path.display()),
            ]);
            command.args(["-device", "ide-cd,drive=c"]);
        }
        // The monitor and the serial console share stdin and stdout; Ctrl-A C switches between them.
        command.args(["-serial", "mon:stdio"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("QEMU starts");
        let stdin = child.stdin.take().expect("is piped");
        let output = BufReader::new(child.stdout.take().expect("is piped"));
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in output.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim().to_owned()).is_err() {
                    break;
                }
            }
        });
        Guest { child, stdin, lines, seen: Vec::new() }
    }

    /// The first line from now on that contains `text`.
    fn wait_for(&mut self, text: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(90);
        while let Ok(line) = self.lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            self.seen.push(line.clone());
            if line.contains(text) {
                return line;
            }
        }
        panic!("the guest never printed {text:?}; its console said:\n{}", self.seen.join("\n"));
    }

    fn press_power_button(&mut self) {
        self.stdin.write_all(b"\x01csystem_powerdown\n").expect("the monitor listens");
        self.stdin.flush().expect("the monitor listens");
    }

    fn wait_for_exit(&mut self) {
        let deadline = Instant::now() + Duration::from_secs(60);
        while self.child.try_wait().expect("is our child").is_none() {
            assert!(Instant::now() < deadline, "the guest did not power off:\n{}", self.seen.join("\n"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn image() -> PathBuf {
    guest_image::ensure(&godwit_tests::target_folder().join("guest")).expect("the image is built").path
}

fn config_drive(folder: &Path) -> PathBuf {
    let latest = folder.join("tree/openstack/latest");
    std::fs::create_dir_all(&latest).expect("is writable");
    std::fs::write(latest.join("meta_data.json"), META_DATA).expect("is writable");
    std::fs::write(latest.join("network_data.json"), NETWORK_DATA).expect("is writable");
    std::fs::write(latest.join("user_data"), USER_DATA).expect("is writable");
    let iso = folder.join("config.iso");
    let made = Command::new("xorriso")
        .args(["-as", "mkisofs", "-quiet", "-V", "config-2", "-J", "-r", "-o"])
        .arg(&iso)
        .arg(folder.join("tree"))
        .status();
    assert!(made.expect("xorriso starts").success());
    iso
}

#[test]
fn a_guest_takes_name_address_keys_and_user_data_from_its_config_drive() {
    let folder = tempfile::tempdir().expect("a folder of our own");
    let mut guest = Guest::boot(&image(), Some(&config_drive(folder.path())));
    let ready = guest.wait_for(guest_image::READY);
    assert!(ready.contains("hostname=falcon.example address=10.9.0.5 uptime="), "{ready}");
    guest.wait_for("USER-DATA-END");
    let console = guest.seen.join("\n");
    assert!(console.contains("inet 10.9.0.5/20"), "{console}");
    assert!(console.contains("default via 10.9.0.1 dev eth1"), "the second link has the address:\n{console}");
    assert!(console.contains("MTU 1450 1400"), "{console}");
    assert!(console.contains("ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIDq3 me@there"), "{console}");
    assert!(console.contains("SSH-IS-UP"), "{console}");
    guest.press_power_button();
    guest.wait_for_exit();
}

#[test]
fn a_guest_without_a_config_drive_is_up_all_the_same() {
    let mut guest = Guest::boot(&image(), None);
    let ready = guest.wait_for(guest_image::READY);
    assert!(ready.contains("hostname=guest address=none"), "{ready}");
    guest.press_power_button();
    guest.wait_for_exit();
}

#[test]
fn the_image_is_built_once_and_small() {
    let folder = tempfile::tempdir().expect("a folder of our own");
    let first = guest_image::ensure(folder.path()).expect("the image is built").path;
    let built = first.metadata().expect("is there");
    assert!(built.len() < 25 << 20, "{} bytes", built.len());
    let second = guest_image::ensure(folder.path()).expect("the image is found").path;
    assert_eq!(first, second);
    assert_eq!(
        built.modified().expect("has a time"),
        second.metadata().expect("is there").modified().expect("has a time")
    );
    let files = std::fs::read_dir(folder.path()).expect("is there").count();
    assert_eq!(files, 1, "the build left something behind");
}
