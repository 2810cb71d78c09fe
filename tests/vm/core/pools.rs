//! Pools on NFS: of two hosts that want one disk, one gets it.

use crate::nfs::{Client, NfsLab, PATIENCE, ok};

#[test]
fn of_two_hosts_that_want_one_disk_one_gets_it() {
    let lab = NfsLab::start();
    let clients = [lab.client(1), lab.client(2)];
    lab.serve();
    clients.iter().for_each(|client| drop(client.mount("/export/xfs", "softerr")));
    clients[0].shell("mkdir -p /mnt/xfs/instances");
    let hosts = ["00000000-0000-4000-8000-00000000000a", "00000000-0000-4000-8000-00000000000b"];
    let instances: Vec<String> =
        (0..12).map(|n| format!("00000000-0000-4000-8000-0000000001{n:02}")).collect();
    for instance in &instances {
        clients[0].shell(&format!("mkdir /mnt/xfs/instances/{instance}"));
    }
    let lease = |client: &Client, instance: &str, call: &str| {
        let ask = format!("{{\"lease\":{{\"instance\":\"{instance}\",\"call\":{call}}}}}");
        ok(client.helper("/mnt/xfs", &ask))
    };
    for instance in &instances {
        let claims: Vec<String> = std::thread::scope(|scope| {
            let claim = |number: usize| {
                lease(&clients[number], instance, &format!("{{\"claim\":\"{}\"}}", hosts[number]))
            };
            let threads = [scope.spawn(move || claim(0)), scope.spawn(move || claim(1))];
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let won: Vec<bool> = claims.iter().map(|claim| claim.contains("\"Ok\"")).collect();
        assert!(won[0] != won[1], "{claims:?}");
        let (winner, loser) = if won[0] { (0, 1) } else { (1, 0) };
        assert!(
            claims[loser].contains("held for writing") && claims[loser].contains(hosts[winner]),
            "{claims:?}"
        );
        // It changes hands only by its holder.
        let over = format!("{{\"hand_over\":[\"{}\",\"{}\"]}}", hosts[winner], hosts[loser]);
        assert!(lease(&clients[winner], instance, &over).contains("\"epoch\":2"));
        let again = lease(&clients[winner], instance, &format!("{{\"claim\":\"{}\"}}", hosts[winner]));
        assert!(again.contains("held for writing"), "{again}");
        assert!(
            lease(&clients[loser], instance, &format!("{{\"claim\":\"{}\"}}", hosts[loser]))
                .contains("\"epoch\":2")
        );
    }

    // QEMU's own locks are the second line: they hold over NFS too.
    clients[0].shell("qemu-img create -q -f raw /mnt/xfs/disk 16M");
    let qemu = "qemu-system-x86_64 -M q35 -accel tcg -m 64 -nodefaults -display none -S -daemonize -pidfile /tmp/qemu \
                -drive if=virtio,format=raw,cache=none,file=/mnt/xfs/disk";
    clients[0].shell(qemu);
    let second = ok(clients[1].vm.output(&["sh", "-c", qemu]));
    assert!(!second.success() && second.stderr.contains("\"write\" lock"), "{second:?}");
    clients[0].shell("kill -9 $(cat /tmp/qemu)");
    ok(clients[1].vm.until("the lock's end", PATIENCE, |vm| Ok(vm.output(&["sh", "-c", qemu])?.success())));
}
