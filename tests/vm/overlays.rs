//! Disks as overlays, on a share without reflinks.

use crate::fleet::{self, godwit};
use crate::nfs::{NfsLab, PATIENCE, SERVER, ok};
use godwit_tests::guest_image;
use godwit_tests::vm::Vm;

#[test]
fn a_guest_runs_on_an_overlay_over_nfs_whose_base_stays_while_it_is_used() {
    let lab = NfsLab::start();
    let guest = guest_image::ensure(&godwit_tests::target_folder()).expect("the test guest's image");
    let client = lab.fleet_client_with(1, &[(&guest.path, "guest.qcow2")]);
    let vm = &client.vm;
    lab.serve();
    let share = format!("[nfs]\nserver = \"{SERVER}\"\nexport = \"/export/ext4\"\nidle_seconds = 0");
    fleet::start(vm, "10.9.0.11", &format!("disks = \"overlay\"\nimage_cache_mib = 0\n{share}"));
    let image = ok(godwit(vm, "image create guest --file /job/guest.qcow2 --disk-format qcow2"));
    let image = image["id"].as_str().expect("an id");
    ok(godwit(vm, "flavor create small --vcpus 1 --memory 160M --disk 0"));
    for name in ["one", "two"] {
        ok(godwit(vm, &format!("server create {name} --flavor small --image guest --no-network --wait")));
    }
    let folders = ok(lab.server.shell("ls -d /export/ext4/instances/*"));
    assert_eq!(folders.lines().count(), 2);
    for folder in folders.lines() {
        let disk =
            ok(vm.shell(&format!("qemu-img info -U {}/disk", folder.replace("/export/ext4", "/srv/godwit"))));
        assert!(disk.contains("file format: qcow2") && disk.contains("backing file: base.qcow2"), "{disk}");
    }
    // The image, the cache and two instances: one file of four names.
    let links = |path: &str| ok(lab.server.shell(&format!("stat -c %h {path}"))).trim().to_owned();
    assert_eq!(links(&format!("/export/ext4/images/{image}")), "4");
    ok(godwit(vm, "image delete guest"));
    let entry = format!("/export/ext4/cache/{image}.qcow2");
    assert_eq!(links(&entry), "3", "the image is gone, its bytes are in use");

    // A whole boot takes minutes under emulation in emulation; that its loader reads the kernel shows as much.
    let reads = |vm: &Vm| {
        let stats = vm.shell("virsh domblkstat $(virsh -q list --name | head -n 1) vda")?;
        let read = stats.lines().find_map(|line| line.split_once(" rd_bytes ")?.1.trim().parse::<u64>().ok());
        Ok(read > Some(1 << 20))
    };
    ok(vm.until("the guest's kernel", PATIENCE, reads));
    for name in ["one", "two"] {
        ok(godwit(vm, &format!("server delete {name} --wait")));
    }
    assert_eq!(ok(lab.server.shell("ls -A /export/ext4/instances")), "");
    // The cache has room for nothing; who makes the next overlay clears it.
    assert_eq!(links(&entry), "1");
    ok(vm.until("that nothing else is left", PATIENCE, |_| {
        Ok(lab.server.shell("ls -A /export/ext4/images")?.is_empty())
    }));
}
