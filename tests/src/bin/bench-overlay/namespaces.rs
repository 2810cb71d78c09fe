//! Namespaces of this process alone. Whatever ends it, all that is in them ends with it: processes, links, programs,
//! mounts.

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::Read;
use std::process::{Child, Command, ExitCode, Output, Stdio};
use std::thread;

/// Runs this program again, as the first process of a PID namespace, with these arguments behind `inside`; its end
/// is that of everything it started.
pub(crate) fn run_inside(inside: &str, arguments: &[String]) -> ExitCode {
    set_pdeathsig(Signal::SIGKILL).expect("the kernel knows it");
    unshare(CloneFlags::CLONE_NEWPID).expect("this needs root: run it with sudo");
    let program = std::env::current_exe().expect("has a path");
    // It ends when the pipe does, which is when this process ends.
    let mut child =
        Command::new(program).arg(inside).args(arguments).stdin(Stdio::piped()).spawn().expect("starts");
    // Waiting would close it.
    let pipe = child.stdin.take();
    let status = child.wait().expect("is our child");
    drop(pipe);
    ExitCode::from(u8::try_from(status.code().unwrap_or(1)).unwrap_or(1))
}

/// Makes this first process of its PID namespace ready: networks, mounts and /proc of its own.
pub(crate) fn settle() {
    thread::spawn(|| {
        let _ = std::io::stdin().read(&mut [0]);
        std::process::exit(1);
    });
    unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("this needs root: run it with sudo");
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(None::<&str>, "/", None::<&str>, private, None::<&str>).expect("mounts become private");
    for (kind, folder) in
        [("proc", "/proc"), ("sysfs", "/sys"), ("bpf", "/sys/fs/bpf"), ("tmpfs", "/run"), ("tmpfs", "/tmp")]
    {
        mount(Some(kind), folder, Some(kind), MsFlags::empty(), None::<&str>)
            .unwrap_or_else(|error| panic!("{kind} on {folder}: {error}"));
    }
    silence_ipv6();
    run("ip link set lo up");
}

/// No link of this namespace says anything of itself: what is counted is what was sent on purpose.
fn silence_ipv6() {
    for which in ["all", "default"] {
        std::fs::write(format!("/proc/sys/net/ipv6/conf/{which}/disable_ipv6"), "1").expect("is writable");
    }
}

/// Runs a command line (no quoting), and returns what it printed.
pub(crate) fn run(line: &str) -> String {
    let output = try_run(line);
    let said = String::from_utf8_lossy(&output.stderr);
    let printed = String::from_utf8(output.stdout).expect("is text");
    assert!(output.status.success(), "`{line}` failed: {said}{printed}");
    printed
}

/// As [`run`], for a command that may fail.
pub(crate) fn try_run(line: &str) -> Output {
    let mut words = line.split_whitespace();
    let program = words.next().expect("a command");
    Command::new(program).args(words).output().unwrap_or_else(|error| panic!("`{line}`: {error}"))
}

/// Starts a command line in a namespace; it runs until it is killed, or until this process ends.
pub(crate) fn spawn(namespace: &str, line: &str) -> Child {
    let words = format!("netns exec {namespace} {line}");
    let mut command = Command::new("ip");
    command.args(words.split_whitespace()).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.spawn().unwrap_or_else(|error| panic!("`{line}`: {error}"))
}

/// Runs many lines of `ip` at once.
pub(crate) fn batch(namespace: &str, lines: &[String]) {
    let path = format!("/run/{namespace}.batch");
    std::fs::write(&path, lines.join("\n")).expect("is writable");
    run(&format!("ip -n {namespace} -batch {path}"));
}

/// Runs `body` in a network namespace, in a thread of its own, and panics as it does.
pub(crate) fn within<R: Send>(namespace: &str, body: impl FnOnce() -> R + Send) -> R {
    thread::scope(|scope| scope.spawn(|| join(namespace, body)).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

/// Runs `body` in a network namespace, which the calling thread stays in.
pub(crate) fn join<R>(namespace: &str, body: impl FnOnce() -> R) -> R {
    let file = File::open(format!("/run/netns/{namespace}")).expect("the namespace is there");
    setns(file, CloneFlags::CLONE_NEWNET).expect("the namespace is entered");
    body()
}

/// A namespace without IPv6 of its own.
pub(crate) fn add(name: &str) {
    run(&format!("ip netns add {name}"));
    within(name, silence_ipv6);
    run(&format!("ip -n {name} link set lo up"));
}
