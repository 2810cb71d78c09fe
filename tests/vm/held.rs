//! A disk that holds every request: who waits for it waits in the kernel, where no signal reaches. A file server's clients
//! can be killed while it stands still; these cannot.

use crate::fleet::{self, events, godwit, value};
use crate::meanwhile;
use crate::nfs::{PATIENCE, big_file, ok};
use godwit_tests::vm::{Vm, Wire};
use std::time::Duration;

const ADDRESS: &str = "10.9.0.1";

/// A pool on a disk that can be held, and whose writes take so long that a copy lasts some seconds.
const POOL: &str = r#"
modprobe -a dm-mod dm-delay
mkfs.ext4 -q /dev/vdc
dmsetup create held --table "0 $(blockdev --getsz /dev/vdc) delay /dev/vdc 0 0 /dev/vdc 0 400"
mkdir -p /srv/godwit
mount /dev/dm-0 /srv/godwit
"#;

/// Waits until a copy is under way.
const BEGUN: &str =
    r#"timeout 90 sh -c "until [ -n \"\$(find $1 -name $2.partial -size +1M)\" ]; do sleep 0.02; done""#;

/// The states of a process's threads, by the kernel; empty when it is gone.
fn states(vm: &Vm, process: u32) -> String {
    let stats = ok(vm.output(&["sh", "-c", &format!("cat /proc/{process}/task/*/stat")])).stdout;
    stats.lines().filter_map(|line| line.rsplit_once(") ")?.1.chars().next()).collect()
}

/// The one process with such a command line.
#[track_caller]
fn process(vm: &Vm, line: &str) -> u32 {
    let found = ok(vm.exec(&["pgrep", "-f", line]));
    found.trim().parse().unwrap_or_else(|_| panic!("not one process is {line}: {found:?}"))
}

/// Killed, and still there: it waits where signals do not reach.
#[track_caller]
fn is_held(vm: &Vm, process: u32, what: &str) {
    let left = states(vm, process);
    assert!(left.contains('D'), "{what} is {left:?}");
}

#[test]
fn a_worker_that_no_signal_reaches_is_left_behind_and_reaped_when_its_disk_is_back() {
    let wire = Wire::new().expect("a wire");
    let builder = fleet::builder("held").cpus(2).memory_mib(1280).disk(1 << 30);
    let builder = builder.deadline(Duration::from_secs(900)).wire(&wire, &format!("{ADDRESS}/24"));
    let vm = builder.start().expect("starts");
    ok(vm.exec(&["bash", "-euc", POOL]));
    fleet::start(&vm, ADDRESS, "");
    big_file(&vm, "/tmp/image", 96);
    ok(godwit(&vm, "image create big --file /tmp/image --disk-format raw"));
    ok(godwit(&vm, "flavor create small --vcpus 1 --memory 64M --disk 0"));

    let copy = |name: &'static str| {
        let line =
            format!("exec godwit-agent copy -q --bandwidth 1M --method {name} /tmp/image /srv/godwit/{name}");
        (name, ok(vm.spawn(&["sh", "-c", &line])))
    };
    let begun = |folder: &str, name: &str| ok(vm.exec(&["bash", "-euc", BEGUN, "begun", folder, name]));
    let (ring, mut by_ring) = copy("io_uring");
    begun("/srv/godwit", ring);
    // The agent's worker is to go the way that waits in the kernel by itself.
    ok(vm.shell("sysctl -q -w kernel.io_uring_disabled=2"));
    let (threads, by_threads) = copy("threads");
    begun("/srv/godwit", threads);
    ok(godwit(&vm, "server create one --flavor small --image big --no-network"));
    // At once, while it is at it.
    let hold = format!("{BEGUN}; dmsetup suspend --nolockfs --noflush held");
    ok(vm.exec(&["bash", "-euc", &hold, "hold", "/srv/godwit/instances", "disk"]));
    ok(vm.until("the copy's stall", PATIENCE, |vm| Ok(value(vm, "godwit_copies_stalled")? == Some(1.0))));
    ok(vm.until("the pool's stall", PATIENCE, |vm| Ok(events(vm, "pool_stalled")? == 1)));
    assert_eq!(ok(value(&vm, "godwit_pool_stalled")), Some(1.0));
    eprintln!("while the disk is held: {}", meanwhile::all_answer(&vm));

    // The workers are killed, and do not go; the operation does not wait for its own.
    let worker = process(&vm, "^/proc/self/exe worker copy ");
    ok(godwit(&vm, "server delete one"));
    let undone = |vm: &Vm| {
        let operations = godwit(vm, "operation list")?;
        Ok(operations.as_array().is_some_and(|all| all.iter().any(|one| one["phase"] == "undoing")))
    };
    ok(vm.until("the creation's being given up", PATIENCE, undone));
    is_held(&vm, worker, "the worker");
    let copier = process(&vm, "^godwit-agent copy .*/threads$");
    ok(by_threads.signal(9));
    is_held(&vm, copier, "the copy by threads");
    // Whether a process with a ring goes or not: its ring stays until the disk has answered, and the name is not free
    // before.
    ok(by_ring.signal(9));
    let busy = ok(vm.output(&[
        "godwit-agent",
        "copy",
        "-q",
        "--method",
        "threads",
        "/tmp/image",
        "/srv/godwit/io_uring",
    ]));
    assert_eq!(busy.code, Some(5), "{busy:?}");
    eprintln!("and with those that were killed: {}", meanwhile::all_answer(&vm));
    // Nobody says that it is over while the worker hangs.
    assert_eq!((ok(events(&vm, "pool_back")), ok(value(&vm, "godwit_pool_stalled"))), (0, Some(1.0)));

    ok(vm.shell("dmsetup resume held"));
    let gone = |vm: &Vm| Ok(godwit(vm, "server list")?.as_array().is_some_and(Vec::is_empty));
    ok(vm.until("the server's deletion", PATIENCE, gone));
    for process in [worker, copier] {
        ok(vm.until("the end of who was killed", PATIENCE, |vm| Ok(states(vm, process).is_empty())));
    }
    assert_eq!(ok(by_ring.wait(PATIENCE)).signal, Some(9));
    ok(vm.until("the end of the stall", PATIENCE, |vm| Ok(value(vm, "godwit_copies_stalled")? == Some(0.0))));
    ok(vm.until("the event of its end", PATIENCE, |vm| Ok(events(vm, "pool_back")? == 1)));
    assert_eq!(
        ok(vm.shell(
            "ls -A /srv/godwit/instances; cd /srv/godwit; ls -d io_uring threads 2> /dev/null || true"
        )),
        ""
    );
    let children = "ps -o stat= --ppid $(pgrep -f '^godwit-agent run') || true";
    let left_behind = |vm: &Vm| Ok(vm.shell(children)?.is_empty());
    ok(vm.until("no child is left", PATIENCE, left_behind));

    // The disk and both names are free again.
    ok(vm.shell("sysctl -q -w kernel.io_uring_disabled=0; dmsetup suspend held; dmsetup load held --table \"0 $(blockdev --getsz /dev/vdc) linear /dev/vdc 0\"; dmsetup resume held"));
    for name in ["io_uring", "threads"] {
        ok(vm.shell(&format!("godwit-agent copy -q --method {name} /tmp/image /srv/godwit/{name} && cmp /tmp/image /srv/godwit/{name}")));
    }
    assert_eq!(ok(vm.shell("find /srv/godwit -name '*.partial*'")), "");
}
