//! The VMs themselves: they do what a test wants, and leave nothing behind.

use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use godwit_tests::lab::until;
use godwit_tests::vm::{Cell, Vm, VmError, Wire};

/// What VMs of a process could leave behind.
fn traces(process: u32) -> Vec<String> {
    let ours = format!("-{process}-");
    let folders = std::fs::read_dir("/var/tmp").expect("is there").flatten();
    let mut traces: Vec<String> = folders.map(|entry| entry.path().display().to_string()).collect();
    let listed = Command::new("ps").args(["-eo", "args="]).output().expect("starts");
    traces.extend(String::from_utf8_lossy(&listed.stdout).lines().map(str::to_owned));
    traces.retain(|trace| {
        (trace.contains("godwit-vm-") || trace.contains("godwit-wire-")) && trace.contains(&ours)
    });
    traces
}

#[test]
fn two_vms_talk_over_a_wire_lose_power_and_come_back_with_their_disks() {
    let wire = Wire::new().expect("a wire");
    let mut one = Vm::builder("one").disk(64 << 20).wire(&wire, "10.9.0.1/24").start().expect("starts");
    let two = Vm::builder("two")
        .cell(Cell { cpus: 0..=0, memory_mib: 384 })
        .cell(Cell { cpus: 1..=1, memory_mib: 384 })
        .distance(0, 1, 31)
        .wire(&wire, "10.9.0.2/24")
        .start()
        .expect("starts");
    assert!(!traces(std::process::id()).is_empty());
    one.shell("mkfs.ext4 -q /dev/vdc; mkdir /disk; mount /dev/vdc /disk; echo kept > /disk/file; sync")
        .expect("runs");
    assert_eq!(two.exec(&["hostname"]).expect("runs"), "two\n");
    let distances = two.shell("cat /sys/devices/system/node/node*/distance").expect("there are cells");
    assert_eq!(distances, "10 31\n31 10\n");
    two.exec(&["ping", "-c", "1", "-W", "5", "10.9.0.1"]).expect("the wire carries a ping");
    wire.cut(true);
    two.exec(&["ping", "-c", "1", "-W", "1", "10.9.0.1"]).expect_err("a cut wire carries nothing");
    wire.cut(false);
    one.pause(true).expect("stands still");
    two.exec(&["ping", "-c", "1", "-W", "1", "10.9.0.1"]).expect_err("it does not answer");
    one.pause(false).expect("goes on");
    two.exec(&["ping", "-c", "1", "-W", "5", "10.9.0.1"]).expect("it answers again");

    let mut sleeping = one.spawn(&["sleep", "1000"]).expect("starts");
    one.cut_power().expect("is killed");
    assert!(matches!(sleeping.wait(Duration::from_secs(20)), Err(VmError::PoweredOff { .. })));
    assert!(matches!(one.exec(&["true"]), Err(VmError::PoweredOff { .. })));
    one.power_on().expect("starts again");
    assert_eq!(one.shell("mkdir /disk; mount /dev/vdc /disk; cat /disk/file").expect("runs"), "kept\n");
    two.exec(&["ping", "-c", "1", "-W", "5", "10.9.0.1"]).expect("it is back on the wire");

    let failed = two.exec(&["sh", "-c", "echo why >&2; exit 3"]).expect_err("it fails");
    assert_eq!(failed.to_string(), "two: `sh -c echo why >&2; exit 3` failed (exit code 3): why");
    assert!(matches!(two.exec(&["/no/such"]), Err(VmError::NotStarted { .. })));
    let mut shell = two.spawn(&["sh", "-c", "echo begun; sleep 1000"]).expect("starts");
    two.until("a word of the shell", Duration::from_secs(20), |_| Ok(shell.look()?.stdout == "begun\n"))
        .expect("it is heard while it runs");
    shell.signal(15).expect("is sent");
    assert_eq!(shell.wait(Duration::from_secs(20)).expect("ends").signal, Some(15));

    one.power_off().expect("powers off by itself");
    drop((one, two, wire));
    assert_eq!(traces(std::process::id()), [""; 0]);
}

#[test]
fn a_vm_whose_test_is_killed_leaves_nothing() {
    let mut holder = Command::new(env!("CARGO_BIN_EXE_vm-lab"))
        .arg("hold")
        .stdout(Stdio::piped())
        .spawn()
        .expect("starts");
    let mut line = String::new();
    BufReader::new(holder.stdout.take().expect("is piped")).read_line(&mut line).expect("is readable");
    assert!(!traces(holder.id()).is_empty(), "{line}");
    holder.kill().expect("is our child");
    holder.wait().expect("is our child");
    until("the machine", "the end of the VM", Duration::from_secs(20), || Ok(traces(holder.id()).is_empty()))
        .unwrap_or_else(|error| panic!("{error}: {:#?}", traces(holder.id())));
}

#[test]
fn a_vm_ends_at_its_deadline() {
    let ended =
        Vm::builder("late").deadline(Duration::from_secs(1)).start().and_then(|vm| vm.exec(&["sleep", "60"]));
    let error = ended.expect_err("its time is up").to_string();
    assert!(error.contains("deadline"), "{error}");
    assert_eq!(traces(std::process::id()), [""; 0]);
}
