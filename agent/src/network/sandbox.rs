//! Namespaces for tests: a network and file systems of their own, which end with the thread that has them.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use std::fs::File;
use std::process::{Command, Output};
use std::thread;

/// Runs `body` in a new network namespace (with `lo` up) and a new mount namespace, in which /sys shows that
/// network, /sys/fs/bpf is an empty BPF file system and /run/netns is empty.
///
/// Nothing is left behind, however it ends: the namespaces go with the thread.
pub(crate) fn in_sandbox<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    run_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS)
            .expect("tests of the host's network need root: run them with sudo");
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("mounts become private");
        for (kind, folder) in [("sysfs", "/sys"), ("bpf", "/sys/fs/bpf"), ("tmpfs", "/run")] {
            mount(Some(kind), folder, Some(kind), MsFlags::empty(), None::<&str>)
                .unwrap_or_else(|error| panic!("{kind} on {folder}: {error}"));
        }
        run("ip link set lo up");
        body()
    })
}

/// Runs `body` in a thread of its own, and panics as it does.
fn run_thread<R: Send>(body: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(body).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs a command line (no quoting) in this thread's namespaces, and returns what it printed.
///
/// It is iproute2 mostly: what our netlink code did is judged by somebody else's.
pub(crate) fn run(line: &str) -> String {
    let output = try_run(line);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "`{line}` failed: {stderr}");
    String::from_utf8(output.stdout).expect("UTF-8")
}

/// As [`run`], for a command that may fail.
pub(crate) fn try_run(line: &str) -> Output {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a command");
    Command::new(program).args(words).output().unwrap_or_else(|error| panic!("`{line}`: {error}"))
}

/// Runs `body` in the network namespace that `ip netns add` made with this name.
pub(crate) fn in_namespace<R: Send>(name: &str, body: impl FnOnce() -> R + Send) -> R {
    let namespace = File::open(format!("/run/netns/{name}")).expect("the namespace is there");
    run_thread(|| {
        setns(namespace, CloneFlags::CLONE_NEWNET).expect("the namespace is entered");
        body()
    })
}

/// Joins the host `name` to the underlay bridge of the sandbox: a namespace with the link `eth0` of this
/// address.
pub(crate) fn add_host(name: &str, address: &str) {
    if !try_run("ip link show underlay").status.success() {
        run("ip link add underlay mtu 1600 type bridge");
        run("ip link set underlay up");
    }
    run(&format!("ip netns add {name}"));
    run(&format!("ip link add {name} mtu 1600 type veth peer name eth0 mtu 1600 netns {name}"));
    run(&format!("ip link set {name} master underlay up"));
    for line in ["link set lo up", "link set eth0 up", &format!("address add {address}/24 dev eth0")] {
        run(&format!("ip -n {name} {line}"));
    }
}

/// A guest: a namespace whose link eth0 has its other end, called `tap`, on the bridge `br`.
pub(crate) fn add_guest(name: &str, tap: &str) {
    if !try_run("ip link show dev br").status.success() {
        run("ip link add name br type bridge");
        run("ip link set dev br up");
    }
    run(&format!("ip netns add {name}"));
    run(&format!("ip link add {tap} type veth peer name eth0 netns {name}"));
    run(&format!("ip link set {tap} master br up"));
    run(&format!("ip -n {name} link set eth0 up"));
}
