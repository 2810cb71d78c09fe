//! The copy engine against a real file server and its faults.

use crate::nfs::{Client, NfsLab, PATIENCE, big_file, ok};
use godwit_tests::vm::control::Output;

/// Copies to whatever end.
fn try_copy(client: &Client, words: &str) -> Output {
    ok(client.vm.output(&["sh", "-c", &format!("godwit-agent copy {words}")]))
}

/// Of a file as the server has it on its disk.
fn on_server(lab: &NfsLab, path: &str) -> String {
    ok(lab.server.shell(&format!("sync; echo 3 > /proc/sys/vm/drop_caches; sha256sum < {path}")))
}

#[test]
fn copies_on_a_share_are_right_and_what_its_server_refuses_is_told() {
    let mut lab = NfsLab::start();
    let client = lab.client(1);
    lab.serve();
    for export in ["/export/xfs", "/export/ext4", "/export/small"] {
        client.mount(export, "softerr");
    }
    big_file(&client.vm, "/tmp/image", 64);
    let digest = client.shell("sha256sum < /tmp/image");
    the_server_copies_by_itself(&lab, &client, &digest);
    a_full_and_a_read_only_export_are_told(&lab, &client);
    a_killed_copy_goes_on(&lab, &client, &digest);
    a_far_server_is_worked_with(&lab, &client, &digest);
    a_server_whose_daemon_is_stopped_is_waited_for(&lab, &client, &digest);
    a_server_that_lost_its_power_is_waited_for(&mut lab, &client, &digest);
}

/// A clone where the server's file system has reflinks, else the server's own copy; by the client's counters.
fn the_server_copies_by_itself(lab: &NfsLab, client: &Client, digest: &str) {
    for (folder, method, operation, why) in [
        ("xfs", "reflink", "CLONE", "the blocks are shared"),
        ("ext4", "server_side", "COPY", "the server of 10.9.0.1:/export/ext4 copies by itself"),
    ] {
        let mount = format!("/mnt/{folder}");
        client.copy(&format!("/tmp/image {mount}/image"));
        let count = |operation| client.sent(&mount, operation);
        let before = (count(operation), count("READ"), count("WRITE"));
        let report = client.copy(&format!("{mount}/image {mount}/copy"));
        assert_eq!(report["method"], method, "{report}");
        assert_eq!(report["reason"], why, "{report}");
        assert!(count(operation) > before.0, "no {operation} was sent: {report}");
        // 64 MiB would be 64 requests of each; a journal has one or two.
        assert!(count("READ") <= before.1 + 4 && count("WRITE") <= before.2 + 4, "no byte passed the client");
        assert_eq!(&on_server(lab, &format!("/export/{folder}/copy")), digest);
        client.shell(&format!("rm {mount}/copy"));
    }
    holes_stay_holes_when_the_server_copies(lab, client);
}

/// A server fills the holes of a range that it copies: it is asked for each part that holds data.
fn holes_stay_holes_when_the_server_copies(lab: &NfsLab, client: &Client) {
    client.shell(
        "for at in 1 9 40; do
           dd if=/tmp/image of=/mnt/ext4/sparse bs=1M count=2 skip=$at seek=$at conv=notrunc status=none
         done; truncate -s 64M /mnt/ext4/sparse; sync",
    );
    let before = client.sent("/mnt/ext4", "COPY");
    let report = client.copy("/mnt/ext4/sparse /mnt/ext4/thin");
    assert_eq!(report["method"], "server_side", "{report}");
    assert_eq!(report["data_bytes"], 6 << 20, "{report}");
    assert!(client.sent("/mnt/ext4", "COPY") >= before + 3, "at least one for each part");
    let compare =
        "cmp /export/ext4/sparse /export/ext4/thin; du --block-size=1M --apparent-size /export/ext4/thin";
    assert!(ok(lab.server.shell(compare)).starts_with("64"));
    let used = ok(lab.server.shell("du --block-size=1M /export/ext4/thin"));
    assert!(used.starts_with("6\t") || used.starts_with("7\t"), "{used}");
    client.shell("rm /mnt/ext4/sparse /mnt/ext4/thin");
}

fn a_full_and_a_read_only_export_are_told(lab: &NfsLab, client: &Client) {
    let refused = |words: &str, code: i32, says: &str| {
        let output = try_copy(client, words);
        assert_eq!(output.code, Some(code), "{output:?}");
        assert!(output.stderr.contains(says), "{output:?}");
    };
    // 64 MiB into 48.
    for method in ["", "--method io_uring", "--method threads"] {
        refused(&format!("{method} /tmp/image /mnt/small/image"), 4, "No space left on device");
        assert_eq!(ok(lab.server.shell("ls -A /export/small | grep -v lost+found || true")), "");
    }
    let exported = |options: &str| {
        let options = format!("{options},sync,no_root_squash,no_subtree_check,insecure");
        ok(lab
            .server
            .shell(&format!("exportfs -u '*:/export/small'; exportfs -o {options} '*:/export/small'")));
    };
    exported("ro");
    refused("/tmp/image /mnt/small/image", 1, "Read-only file system");
    assert_eq!(ok(lab.server.shell("ls -A /export/small | grep -v lost+found || true")), "");
    exported("rw");
}

/// What is done stays done, and the lock of a dead copy keeps nobody away.
fn a_killed_copy_goes_on(lab: &NfsLab, client: &Client, digest: &str) {
    let words = "/tmp/image /mnt/ext4/killed";
    let mut killed =
        ok(client.vm.spawn(&["sh", "-c", &format!("exec godwit-agent copy -q --bandwidth 8M {words}")]));
    grown(lab, "/export/ext4/killed.partial", 16);
    ok(killed.signal(9));
    let output = ok(killed.wait(PATIENCE));
    assert_eq!(output.signal, Some(9), "{output:?}");
    assert!(!ok(lab.server.output(&["test", "-e", "/export/ext4/killed"])).success());
    let report = client.copy(words);
    assert!(report["resumed_bytes"].as_u64() > Some(4 << 20), "{report}");
    assert_eq!(&on_server(lab, "/export/ext4/killed"), digest);
}

fn a_far_server_is_worked_with(lab: &NfsLab, client: &Client, digest: &str) {
    ok(lab.server.shell("modprobe sch_netem; tc qdisc add dev eth0 root netem delay 20ms limit 10000"));
    let report = client.copy("--probes /tmp/probes /tmp/image /mnt/xfs/far");
    eprintln!("at 20 ms: {report}");
    assert!(report["reason"].as_str().is_some_and(|reason| !reason.is_empty()), "{report}");
    assert_eq!(&on_server(lab, "/export/xfs/far"), digest);
    ok(lab.server.shell("tc qdisc del dev eth0 root"));
}

/// As `systemctl stop nfs-server` does: the machine answers, and refuses to be connected to.
fn a_server_whose_daemon_is_stopped_is_waited_for(lab: &NfsLab, client: &Client, digest: &str) {
    let words = "/tmp/image /mnt/ext4/stopped";
    let mut copying =
        ok(client.vm.spawn(&["sh", "-c", &format!("exec godwit-agent copy -q --bandwidth 8M {words}")]));
    grown(lab, "/export/ext4/stopped.partial", 16);
    ok(lab.server.shell("rpc.nfsd 0"));
    let refused = "while timeout 5 bash -c ': < /dev/tcp/10.9.0.1/2049' 2>/dev/null; do sleep 0.2; done";
    ok(client.vm.exec(&["timeout", "60", "bash", "-c", refused]));
    assert!(!ok(lab.server.output(&["test", "-e", "/export/ext4/stopped"])).success());
    lab.start_daemon();
    let output = ok(copying.wait(PATIENCE));
    assert!(output.success(), "{output:?}");
    assert_eq!(&on_server(lab, "/export/ext4/stopped"), digest);
    client.shell("rm /mnt/ext4/stopped");
}

/// The client claims its locks again, and what the server had not yet on its disk is sent anew.
fn a_server_that_lost_its_power_is_waited_for(lab: &mut NfsLab, client: &Client, digest: &str) {
    let words = "/tmp/image /mnt/ext4/cut";
    let mut copying =
        ok(client.vm.spawn(&["sh", "-c", &format!("exec godwit-agent copy -q --bandwidth 8M {words}")]));
    grown(lab, "/export/ext4/cut.partial", 16);
    ok(lab.server.cut_power());
    ok(lab.server.power_on());
    lab.serve();
    let output = ok(copying.wait(PATIENCE));
    assert!(output.success(), "{output:?}");
    assert_eq!(&on_server(lab, "/export/ext4/cut"), digest);
}

/// Waits until a file of the server's takes so many MiB of its disk.
fn grown(lab: &NfsLab, path: &str, mib: u32) {
    let what = format!("{path} of {mib} MiB");
    ok(lab.server.until(&what, PATIENCE, |server| {
        let used = server.output(&["du", "-m", path])?.stdout;
        Ok(used
            .split_whitespace()
            .next()
            .and_then(|used| used.parse().ok())
            .is_some_and(|used: u32| used >= mib))
    }));
}
