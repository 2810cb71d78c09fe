//! Mounting, by the agent's own helper and by the agent: which version, what is refused, when it ends.

use crate::fleet::{self, godwit, value};
use crate::nfs::{Client, NfsLab, PATIENCE, SERVER, big_file, ok};

/// A server that has only these versions; `rpc.nfsd` is told which it has not.
fn versions(lab: &NfsLab, not: &str) {
    let restart = format!("rpc.nfsd 0; exportfs -ra; rpc.nfsd {not} -G 10 -L 10 4");
    ok(lab.server.shell(&restart));
}

/// Has the agent's helper mount, and returns what it says.
fn mount(client: &Client, folder: &str, share: &str) -> String {
    ok(client.helper(folder, &format!("{{\"mount\":{{\"server\":\"{SERVER}\",{share}}}}}")))
}

fn unmount(client: &Client, folder: &str) {
    assert!(ok(client.helper(folder, "\"unmount\"")).contains("\"already\":true"));
}

fn mounted(client: &Client, folder: &str) -> String {
    client.shell(&format!("grep ' {folder} ' /proc/self/mounts || true"))
}

#[test]
fn a_share_is_mounted_once_in_the_best_version_that_its_server_has() {
    let lab = NfsLab::start();
    let client = lab.client(1);
    lab.serve();
    client.shell("mkdir -p /mnt/pool");
    big_file(&client.vm, "/tmp/image", 24);

    let share = "\"export\":\"/export/xfs\"";
    for (not, version) in [("-N 3", "vers=4.2"), ("-N 3 -N 4.2", "vers=4.1")] {
        versions(&lab, not);
        let said = mount(&client, "/mnt/pool", share);
        assert!(said.contains("\"already\":false"), "{said}");
        assert!(mount(&client, "/mnt/pool", share).contains("\"already\":true"), "once");
        let mounts = mounted(&client, "/mnt/pool");
        assert!(mounts.lines().count() == 1 && mounts.contains(version), "{mounts}");
        match version {
            "vers=4.2" => the_server_shares_or_copies(&client),
            _ => the_bytes_pass_by_the_best_loop(&client, version),
        }
        unmount(&client, "/mnt/pool");
    }
    let said = mount(&client, "/mnt/pool", &format!("{share},\"version\":\"4.2\""));
    assert!(said.contains("version 4.2: ") && said.contains("rotocol not supported"), "{said}");

    // Version 3 has other daemons beside it.
    ok(lab.server.shell("rpc.nfsd 0; rpcbind; pkill rpc.mountd; rpc.mountd -V 3"));
    client.shell("rpcbind");
    versions(&lab, "-V 3 -N 4");
    let said = mount(&client, "/mnt/pool", share);
    assert!(said.contains("\"already\":false") && mounted(&client, "/mnt/pool").contains("vers=3"), "{said}");
    the_bytes_pass_by_the_best_loop(&client, "vers=3");
    unmount(&client, "/mnt/pool");
    versions(&lab, "-N 3 -V 4 -V 4.2");

    // What is not exported, and what is somebody else's.
    let said = mount(&client, "/mnt/pool", "\"export\":\"/export/nothing\"");
    assert!(said.contains("cannot mount 10.9.0.1:/export/nothing: version 4.2: "), "{said}");
    assert_eq!(mounted(&client, "/mnt/pool"), "");
    client.mount("/export/ext4", "softerr");
    let said = mount(&client, "/mnt/ext4", share);
    assert!(
        said.contains("10.9.0.1:/export/ext4 is mounted at /mnt/ext4, not 10.9.0.1:/export/xfs"),
        "{said}"
    );
    assert_eq!(mounted(&client, "/mnt/ext4").lines().count(), 1, "it is left alone");
}

/// With version 4.2 the server clones, or copies where its file system could not; no loop is asked for.
fn the_server_shares_or_copies(client: &Client) {
    client.copy("/tmp/image /mnt/pool/image");
    for (option, method, operation) in
        [("", "reflink", "CLONE"), ("--method server_side", "server_side", "COPY")]
    {
        let count = |operation| client.sent("/mnt/pool", operation);
        let before = (count(operation), count("READ"));
        let report = client.copy(&format!("--probes /tmp/probes {option} /mnt/pool/image /mnt/pool/copy"));
        assert_eq!(report["method"], method, "{report}");
        // A clone is one request; of a copy the server does as much at a time as it likes.
        assert!(count(operation) > before.0, "no {operation} was sent: {report}");
        assert_eq!(count("READ"), before.1, "no byte passed the client: {report}");
        client.shell("cmp /tmp/image /mnt/pool/copy");
    }
    client.shell("test ! -e /tmp/probes");
}

/// With older versions the client moves the bytes, by the loop that a probe found for this mount and kernel.
fn the_bytes_pass_by_the_best_loop(client: &Client, version: &str) {
    let count = |operation| client.sent("/mnt/pool", operation);
    let copy = |options: &str| {
        client.copy(&format!("--probes /tmp/probes {options} /mnt/pool/image /mnt/pool/copy"))
    };
    let few = copy("");
    assert_eq!(few["method"], "threads", "{few}");
    assert!(few["reason"].as_str().is_some_and(|why| why.contains("was not probed yet")), "{few}");
    let before = count("READ");
    let probed = copy("--probe");
    assert!(count("READ") - before >= 24, "each MiB was asked for: {probed}");
    assert_eq!(probed["reason"], "the best in a probe of these mounts", "{probed}");
    let again = copy("");
    assert_eq!(again["reason"], "the best in an earlier probe of these mounts", "{again}");
    assert_eq!((&again["method"], &again["depth"]), (&probed["method"], &probed["depth"]));
    assert_eq!((count("CLONE"), count("COPY")), (0, 0));
    client.shell("cmp /tmp/image /mnt/pool/copy");
    let known = client.shell("cat /tmp/probes");
    let kernel = client.shell("uname -r");
    assert!(known.contains(version) && known.contains(kernel.trim()), "{known}");
    eprintln!("{version}: {probed}");
}

#[test]
fn an_agents_share_comes_back_after_its_server_and_goes_when_nobody_uses_it() {
    let lab = NfsLab::start();
    let client = lab.fleet_client(1);
    let vm = &client.vm;
    lab.serve();
    let share = format!("[nfs]\nserver = \"{SERVER}\"\nexport = \"/export/small\"\nidle_seconds = 0");
    // The coordinator has a folder of its own, so that nothing but the agent uses the share.
    fleet::start(vm, "10.9.0.11", &format!("pool = \"/mnt/pool\"\n{share}"));
    let reachable = |is: f64| move |vm: &_| Ok(value(vm, "godwit_pool_reachable")? == Some(is));
    ok(vm.until("the first mount", PATIENCE, reachable(1.0)));
    assert_eq!(mounted(&client, "/mnt/pool").lines().count(), 1);

    // Another file system under the same export: a new mount sees it.
    ok(lab.server.shell(
        "exportfs -ua; umount /export/small; mkfs.ext4 -q -F -m 0 -N 1000 /dev/vde; mount /dev/vde /export/small; \
         exportfs -ra",
    ));
    let total = "godwit_pool_inodes{pool=\"/mnt/pool\",what=\"total\"}";
    let other = |vm: &_| Ok(value(vm, total)?.is_some_and(|inodes| inodes < 2000.0));
    ok(vm.until("the new file system", PATIENCE, other));
    ok(vm.until("its being reached", PATIENCE, reachable(1.0)));
    assert_eq!(mounted(&client, "/mnt/pool").lines().count(), 1);

    // A server that is away while the agent wants to mount.
    ok(vm.shell("pkill -9 -x godwit-agent; umount -l /mnt/pool"));
    lab.wire.cut(true);
    let run = "sed -i 's/idle_seconds = 0/idle_seconds = 3/' /var/lib/godwit/agent.toml; godwit-agent run >> /var/log/agent 2>&1 &";
    ok(vm.shell(run));
    ok(vm.until("an attempt", PATIENCE, |vm| Ok(vm.output(&["pgrep", "-x", "mount.nfs"])?.success())));
    ok(vm.until("the host's report meanwhile", PATIENCE, |vm| {
        Ok(godwit(vm, "host list")?[0]["state"] == "up" && value(vm, "godwit_agent_connected")? == Some(1.0))
    }));
    lab.wire.cut(false);
    ok(vm.until("the mount", PATIENCE, |vm| Ok(vm.output(&["mountpoint", "-q", "/mnt/pool"])?.success())));
    assert_eq!(mounted(&client, "/mnt/pool").lines().count(), 1, "whoever tried before tries no more");

    // Nobody uses it; what was last seen of it is still told.
    ok(vm.until("the idle share's end", PATIENCE, |vm| {
        Ok(!vm.output(&["mountpoint", "-q", "/mnt/pool"])?.success())
    }));
    let pools = ok(godwit(vm, "pool list"));
    assert_eq!(pools[0]["hosts"][0]["reachable"], true, "{pools}");
    assert!(pools[0]["total_bytes"].as_u64() > Some(30 << 20), "{pools}");
}
