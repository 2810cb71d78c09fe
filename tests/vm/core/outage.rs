//! A file server that stands still: what is told, what goes on meanwhile, and what becomes of the copies.

use crate::fleet::{self, events, godwit, value};
use crate::meanwhile;
use crate::nfs::{Client, NfsLab, PATIENCE, SERVER, big_file, ok};
use godwit_tests::vm::Vm;
use std::time::Instant;

/// Waits until the server has the beginning of a disk, and stops it.
fn stop_in_mid_copy(lab: &NfsLab) -> Instant {
    let begun = "timeout 90 sh -c 'until [ -n \"$(find /export/ext4/instances -name disk.partial -size +1M)\" ]; do \
                 sleep 0.1; done'";
    ok(lab.server.shell(begun));
    ok(lab.server.pause(true));
    Instant::now()
}

#[test]
fn a_file_server_that_stands_still_holds_up_its_copies_and_nothing_else() {
    let lab = NfsLab::start();
    let client = lab.fleet_client(1);
    lab.serve();
    let share = format!("[nfs]\nserver = \"{SERVER}\"\nexport = \"/export/ext4\"");
    fleet::start(&client.vm, "10.9.0.11", &share);
    the_agent_has_mounted_its_share_once(&client);
    big_file(&client.vm, "/tmp/image", 48);
    ok(godwit(&client.vm, "image create big --file /tmp/image --disk-format raw"));
    ok(godwit(&client.vm, "flavor create small --vcpus 1 --memory 64M --disk 0"));
    // So that a copy takes some seconds.
    ok(lab.server.shell("modprobe sch_netem; tc qdisc add dev eth0 root netem rate 100mbit limit 10000"));
    what_stands_still_is_told_and_can_be_given_up(&lab, &client.vm);
    a_copy_goes_on_when_the_server_is_back(&lab, &client.vm);
}

fn the_agent_has_mounted_its_share_once(client: &Client) {
    let mounts = client.shell("grep ' /srv/godwit ' /proc/self/mounts");
    assert_eq!(mounts.lines().count(), 1, "{mounts}");
    for word in ["10.9.0.1:/export/ext4 ", " nfs4 ", "vers=4.2", "softerr", "noatime", "nosuid", "nodev"] {
        assert!(mounts.contains(word), "no {word} in {mounts}");
    }
    let pools = ok(godwit(&client.vm, "pool list"));
    let pool = &pools[0];
    assert_eq!((&pool["kind"], &pool["source"]), (&"nfs".into(), &"10.9.0.1:/export/ext4".into()));
    assert_eq!(pool["hosts"][0]["reachable"], true, "{pools}");
    assert!(
        pool["total_bytes"].as_u64() > Some(500 << 20) && pool["total_inodes"].as_u64() > Some(0),
        "{pools}"
    );
}

fn what_stands_still_is_told_and_can_be_given_up(lab: &NfsLab, vm: &Vm) {
    ok(godwit(vm, "server create one --flavor small --image big --no-network"));
    let stopped = stop_in_mid_copy(lab);
    let told =
        |what: &str| eprintln!("{what}: {:.1} s after the server stopped", stopped.elapsed().as_secs_f64());
    ok(vm.until("the stall's series", PATIENCE, |vm| Ok(value(vm, "godwit_pool_stalled")? == Some(1.0))));
    told("the series");
    ok(vm.until("the stall's event", PATIENCE, |vm| Ok(events(vm, "pool_stalled")? == 1)));
    told("the event");
    let not_reached = |vm: &Vm| Ok(godwit(vm, "pool list")?[0]["hosts"][0]["reachable"] == false);
    ok(vm.until("the pool's state", PATIENCE, not_reached));
    told("the pool's state");

    let probed = meanwhile::all_answer(vm);
    eprintln!("while the server stands still: {probed}");

    // The copy hangs with its server; its operation does not.
    ok(godwit(vm, "server delete one"));
    let undone = |vm: &Vm| {
        let operations = godwit(vm, "operation list")?;
        Ok(operations.as_array().is_some_and(|all| all.iter().any(|one| one["phase"] == "undoing")))
    };
    ok(vm.until("the creation's being given up", PATIENCE, undone));
    told("the creation was given up");
    ok(lab.server.pause(false));
    let gone = |vm: &Vm| Ok(godwit(vm, "server list")?.as_array().is_some_and(Vec::is_empty));
    ok(vm.until("the server's deletion", PATIENCE, gone));
    assert_eq!(ok(lab.server.shell("ls -A /export/ext4/instances")), "", "nothing of it is left");
    let reaped = |vm: &Vm| Ok(!vm.output(&["pgrep", "-f", "worker copy"])?.success());
    ok(vm.until("the worker's end", PATIENCE, reaped));
    ok(vm.until("the end of the stall", PATIENCE, |vm| Ok(value(vm, "godwit_pool_stalled")? == Some(0.0))));
    ok(vm.until("the event of its end", PATIENCE, |vm| Ok(events(vm, "pool_back")? == 1)));
}

fn a_copy_goes_on_when_the_server_is_back(lab: &NfsLab, vm: &Vm) {
    ok(godwit(vm, "server create two --flavor small --image big --no-network"));
    stop_in_mid_copy(lab);
    ok(vm.until("the copy's stall", PATIENCE, |vm| Ok(value(vm, "godwit_copies_stalled")? == Some(1.0))));
    ok(lab.server.pause(false));
    ok(vm.until("the server's start", PATIENCE, |vm| {
        let server = godwit(vm, "server show two")?;
        assert_ne!(server["status"], "ERROR", "{server}\n{}", fleet::logs(vm));
        Ok(server["status"] == "ACTIVE")
    }));
    assert!(ok(value(vm, "godwit_copy_stalls_total")) >= Some(1.0));
    // The server's own view, and no cache of the client's.
    let image = ok(godwit(vm, "image show big"))["id"].as_str().map(str::to_owned).expect("an id");
    ok(lab.server.shell(&format!("cmp /export/ext4/images/{image} /export/ext4/instances/*/disk")));
    assert_eq!(ok(lab.server.shell("find /export/ext4 -name '*.partial*'")), "");
}
