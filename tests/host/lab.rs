//! The lab itself: its hosts are real and apart, and it leaves nothing behind.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use godwit_tests::guest_image;
use godwit_tests::lab::{Lab, LabError, LabOptions, ProbePort, until};

fn lab(hosts: usize) -> Lab {
    // A lab that a person holds, or that another checkout tests with, will end.
    let patience = Duration::from_secs(300);
    Lab::start(LabOptions { hosts, patience, ..LabOptions::default() }).expect("the lab starts")
}

/// What a lab could leave behind, as the machine shows it.
fn traces() -> Vec<String> {
    let mut traces = Vec::new();
    for (program, arguments) in
        [("ip", &["-o", "link"][..]), ("ip", &["netns", "list"]), ("ps", &["-eo", "args="])]
    {
        let output = Command::new(program).args(arguments).output().expect("starts");
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let ours = |line: &&str| {
            let foreign = line.contains("cargo") || line.contains("nextest") || line.contains("deps/host");
            let words = ["lab-host", "libvirtd", "qemu-system", "underlay", "eth0@", "gw"];
            !foreign && words.iter().any(|word| line.contains(word))
        };
        traces.extend(text.lines().filter(ours).map(str::to_owned));
    }
    let mounts = std::fs::read_to_string("/proc/self/mounts").expect("is there");
    traces.extend(mounts.lines().filter(|line| line.contains("godwit-lab")).map(str::to_owned));
    let folders = std::fs::read_dir("/var/tmp").expect("is there").flatten();
    traces.extend(
        folders.map(|entry| entry.path().display().to_string()).filter(|path| path.contains("godwit-lab")),
    );
    traces
}

fn new_since(before: &[String]) -> Vec<String> {
    traces().into_iter().filter(|trace| !before.contains(trace)).collect()
}

fn holder(hosts: &str) -> Child {
    let mut child = Command::new(env!("CARGO_BIN_EXE_lab-host"))
        .args(["hold", hosts])
        .stdout(Stdio::piped())
        .spawn()
        .expect("lab-host starts");
    let mut line = String::new();
    BufReader::new(child.stdout.take().expect("is piped")).read_line(&mut line).expect("is readable");
    assert!(line.starts_with("the lab is up"), "{line}");
    child
}

#[test]
fn hosts_are_apart_and_reach_each_other() {
    let before = traces();
    let lab = lab(3);
    for host in lab.hosts() {
        assert_eq!(host.exec(&["hostname"]).expect("runs").trim(), host.name());
        let links = host.exec(&["ip", "-o", "link"]).expect("runs");
        assert_eq!(links.lines().count(), 2, "{links}");
        // libvirtd asks programs such as mdevctl for the host's devices when it starts: they end by themselves.
        let alone = || {
            let processes = host.exec(&["ps", "-eo", "comm="])?;
            let mut processes: Vec<&str> = processes.lines().collect();
            processes.sort_unstable();
            Ok(processes == ["lab-host", "libvirtd", "ps"])
        };
        host.wait("its own processes and no others", alone).expect("nobody else is there");
        for other in lab.hosts().iter().chain([lab.coordinator().host()]) {
            host.exec(&["ping", "-c", "1", "-W", "2", other.address()]).expect("the underlay carries a ping");
        }
        let capabilities = Command::new("virsh").args(["-c", &host.libvirt_uri(), "capabilities"]).output();
        let capabilities = String::from_utf8(capabilities.expect("virsh starts").stdout).expect("is text");
        assert!(capabilities.contains("<cells num='2'>"), "{capabilities}");
    }
    lab.host(1).exec(&["touch", "/srv/godwit/shared"]).expect("the pool is writable");
    lab.host(2).exec(&["stat", "/srv/godwit/shared"]).expect("the pool is shared");
    lab.host(1).exec(&["touch", "/var/lib/godwit/private"]).expect("the state folder is writable");
    lab.host(2).exec(&["stat", "/var/lib/godwit/private"]).expect_err("the state folder is private");
    drop(lab);
    assert_eq!(new_since(&before), [""; 0]);
}

#[test]
fn a_second_lab_is_refused_by_the_first_ones_process() {
    let _first = lab(1);
    match Lab::start(LabOptions { hosts: 1, ..LabOptions::default() }) {
        Err(LabError::AlreadyRunning { process }) => assert_eq!(process, std::process::id() as i32),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_lab_whose_process_is_killed_leaves_nothing() {
    let before = traces();
    let mut holder = holder("2");
    assert!(!new_since(&before).is_empty());
    holder.kill().expect("is our child");
    holder.wait().expect("is our child");
    until("the machine", "the end of the lab", Duration::from_secs(20), || Ok(new_since(&before).is_empty()))
        .unwrap_or_else(|error| panic!("{error}: {:#?}", new_since(&before)));
}

#[test]
fn a_lab_takes_over_where_one_was_killed_a_moment_ago() {
    let mut holder = holder("1");
    holder.kill().expect("is our child");
    holder.wait().expect("is our child");
    let lab = lab(1);
    let folders = std::fs::read_dir("/var/tmp").expect("is there").flatten();
    let folders: Vec<_> = folders
        .map(|entry| entry.path())
        .filter(|path| path.to_string_lossy().contains("godwit-lab"))
        .collect();
    assert_eq!(folders, [lab.folder()]);
}

#[test]
fn a_host_without_power_is_gone_and_comes_back_with_its_disks() {
    let lab = lab(2);
    let host = lab.host(1);
    host.exec(&["sh", "-c", "echo kept >/var/lib/godwit/kept; sync; echo lost >/run/lost"]).expect("runs");
    let mut sleeper = host.spawn(&["sleep", "1000"]).expect("starts");
    let init = host.init_process().expect("is on");
    host.power_off().expect("goes off");
    assert!(!Path::new(&format!("/proc/{init}")).exists());
    let status = sleeper.child().expect("is there").wait().expect("is our child");
    assert!(!status.success(), "what ran in the host ended with it");
    assert!(matches!(host.exec(&["true"]), Err(LabError::PoweredOff { .. })));
    // The kernel takes a namespace's links down a moment after its last process.
    let silent =
        || Ok(!lab.host(2).output(&["ping", "-c", "1", "-W", "1", host.address()])?.status.success());
    until("h2", "nobody's answering", Duration::from_secs(20), silent).expect("nobody answers");

    lab.power_on(host).expect("comes back");
    assert_eq!(host.exec(&["cat", "/var/lib/godwit/kept"]).expect("is there").trim(), "kept");
    host.exec(&["cat", "/run/lost"]).expect_err("/run is empty after a boot");
    lab.host(2).exec(&["ping", "-c", "1", "-W", "5", host.address()]).expect("the host answers again");
}

#[test]
fn a_cut_link_carries_nothing_until_it_is_healed() {
    let lab = lab(2);
    let ping =
        |seconds| lab.host(2).output(&["ping", "-c", "1", "-W", seconds, "198.18.0.11"]).expect("runs");
    assert!(ping("5").status.success());
    lab.cut_link(lab.host(1)).expect("is cut");
    assert!(!ping("1").status.success());
    lab.heal_link(lab.host(1)).expect("is healed");
    // The kernel tells of a carrier up to a second late, and a packet before that is lost.
    lab.host(2).wait("an answer over the healed link", || Ok(ping("1").status.success())).expect("it comes");
}

#[test]
fn a_killed_libvirtd_comes_back_and_a_held_one_does_not() {
    let lab = lab(1);
    let host = lab.host(1);
    let virsh =
        || Command::new("virsh").args(["-c", &host.libvirt_uri(), "list"]).output().expect("starts").status;
    host.kill_libvirtd().expect("is killed");
    until("h1", "libvirtd's return", Duration::from_secs(20), || Ok(virsh().success())).expect("comes back");
    host.hold_libvirtd_down().expect("is held");
    assert!(!virsh().success());
    host.release_libvirtd().expect("is released");
    assert!(virsh().success());
}

#[test]
fn a_guest_boots_in_a_host_and_answers_a_probe_by_ping_and_is_named_as_left_over() {
    let image =
        guest_image::ensure(&godwit_tests::target_folder().join("guest")).expect("the image is built");
    let lab = lab(1);
    let host = lab.host(1);
    lab.set_baseline().expect("is listed");
    let disk = lab.pool().join("instances/one/disk");
    std::fs::create_dir_all(disk.parent().expect("has one")).expect("is writable");
    std::fs::copy(&image.path, &disk).expect("is copied");
    host.exec(&["ip", "link", "add", "gwb1001", "mtu", "1450", "type", "bridge"]).expect("is made");
    host.exec(&["ip", "link", "set", "gwb1001", "up"]).expect("is up");
    let folder = lab.pool().join("instances/one/drive/openstack/latest");
    std::fs::create_dir_all(&folder).expect("is writable");
    let network = r#"{"links":[{"id":"t","ethernet_mac_address":"fa:16:3e:00:00:01","mtu":1450}],"networks":[
        {"id":"n","type":"ipv4","link":"t","ip_address":"10.1.0.5","netmask":"255.255.255.0","routes":[]}]}"#;
    std::fs::write(folder.join("network_data.json"), network).expect("is writable");
    std::fs::write(folder.join("meta_data.json"), r#"{"hostname":"one"}"#).expect("is writable");
    let iso = "cd /srv/godwit/instances/one && xorriso -as mkisofs -quiet -V config-2 -J -r -o config.iso drive 2>&1";
    host.exec(&["sh", "-c", iso]).expect("is made");
    let xml = lab.folder().join("one.xml");
    std::fs::write(&xml, DOMAIN).expect("is writable");
    host.exec(&["virsh", "-q", "create", &xml.to_string_lossy()]).expect("the guest starts");

    let port = ProbePort {
        id: "00000000-1111-2222-3333-444444444444".into(),
        mac: "fa:16:3e:00:00:99".into(),
        address: "10.1.0.9/24".into(),
        vni: 1001,
        mtu: 1450,
    };
    let probe = lab.probe(host, &port).expect("is attached");
    let console = lab.pool().join("instances/one/console.log");
    let ready = || std::fs::read_to_string(&console).is_ok_and(|text| text.contains(guest_image::READY));
    until("h1", "the guest's ready line", Duration::from_secs(60), || Ok(ready()))
        .unwrap_or_else(|error| panic!("{error}: {:?}", std::fs::read_to_string(&console)));
    probe.exec(&["ping", "-c", "3", "-i", "0.2", "-W", "5", "10.1.0.5"]).expect("the guest answers");
    let ssh = probe.output(&["sh", "-c", "ssh-keyscan -T 10 -t ed25519 10.1.0.5"]).expect("runs");
    assert!(String::from_utf8_lossy(&ssh.stdout).contains("ssh-ed25519"), "{ssh:?}");

    let left = lab.leftovers().expect("is listed");
    for name in [
        "h1: domain one",
        "h1: process one",
        "h1: link gwb1001",
        "h1: link gwt00000000111",
        "pool: file instances/one/disk",
    ] {
        assert!(left.iter().any(|line| line == name), "{name} is missing in {left:#?}");
    }
    drop(probe);
    let left = lab.leftovers().expect("is listed");
    assert!(
        !left.iter().any(|line| line.ends_with("gwt00000000111")),
        "a probe takes its link along: {left:#?}"
    );
}

const DOMAIN: &str = "<domain type='qemu'><name>one</name><memory unit='MiB'>256</memory><vcpu>1</vcpu>
<os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features>
<cpu mode='custom' match='exact'><model>qemu64</model></cpu>
<devices><emulator>/usr/bin/qemu-system-x86_64</emulator>
<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='none'/>
<source file='/srv/godwit/instances/one/disk'/><target dev='vda' bus='virtio'/></disk>
<disk type='file' device='cdrom'><driver name='qemu' type='raw'/>
<source file='/srv/godwit/instances/one/config.iso'/><target dev='sda' bus='sata'/><readonly/></disk>
<interface type='bridge'><source bridge='gwb1001'/><mac address='fa:16:3e:00:00:01'/><model type='virtio'/>
<target dev='gwt99999999999'/></interface>
<serial type='file'><source path='/srv/godwit/instances/one/console.log'/><target port='0'/></serial>
<controller type='usb' model='none'/><memballoon model='none'/></devices></domain>";
