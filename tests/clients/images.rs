//! Images: both clients' uploads arrive whole in the pool, come back whole, and vanish when deleted.

use std::path::Path;

use crate::guests;
use crate::stage::{Stage, sha512};

#[test]
fn images_of_both_clients_lie_whole_in_the_pool_and_come_back_whole() {
    let stage = Stage::start(1);
    let image = guests::image();
    let file = image.path.to_string_lossy().into_owned();
    let digest = sha512(&image.path);
    let bytes = std::fs::metadata(&image.path).expect("is there").len();

    // openstack declares the length of what it sends; glance sends it in chunks.
    let upload = ["--disk-format", "qcow2", "--container-format", "bare", "--file", &file];
    let created = stage.json(&[&["image", "create"], &upload[..], &["--public", "declared"]].concat());
    assert_eq!(
        (&created["name"], &created["visibility"]),
        (&"declared".into(), &"public".into()),
        "{created}"
    );
    let printed = stage.run(&[&["glance", "image-create", "--name", "chunked"], &upload[..]].concat());
    assert!(printed.contains("| active "), "{printed}");
    let listed = stage.json(&["image", "list", "--long"]);
    let names: Vec<&str> =
        listed.as_array().into_iter().flatten().filter_map(|row| row["Name"].as_str()).collect();
    assert!(names.len() == 2 && names.contains(&"declared") && names.contains(&"chunked"), "{listed}");
    assert!(stage.run(&["glance", "image-list"]).contains("chunked"));

    for name in ["declared", "chunked"] {
        let shown = stage.json(&["image", "show", name]);
        assert_eq!(shown["status"], "active", "{shown}");
        assert_eq!(shown["size"], bytes, "{shown}");
        assert_eq!(shown["virtual_size"], image.virtual_bytes, "{shown}");
        let known = (&shown["properties"]["os_hash_algo"], &shown["properties"]["os_hash_value"]);
        assert_eq!(known, (&"sha512".into(), &digest.as_str().into()), "{shown}");
        let id = shown["id"].as_str().expect("has an id");
        let kept = stage.lab().pool().join("images").join(id);
        assert_eq!(sha512(&kept), digest, "{}", kept.display());

        // glance compares with the digest that the service told; openstack with the MD5.
        let (saved, downloaded) = (format!("/run/{name}-saved"), format!("/run/{name}-downloaded"));
        stage.run(&["openstack", "image", "save", "--file", &saved, name]);
        stage.run(&["glance", "image-download", "--file", &downloaded, id]);
        for path in [&saved, &downloaded] {
            let seen = stage.lab().coordinator().host().file(path.trim_start_matches('/'));
            assert_eq!(sha512(&seen), digest, "{path}");
        }

        stage.run(&["openstack", "image", "set", "--property", "hw_disk_bus=virtio", name]);
        assert_eq!(stage.json(&["image", "show", name])["properties"]["hw_disk_bus"], "virtio");
        let shown = stage.run(&["glance", "image-update", "--property", "os_type=linux", id]);
        assert!(shown.contains("os_type") && shown.contains("linux"), "{shown}");
        assert!(stage.run(&["glance", "image-show", id]).contains("hw_disk_bus"));
    }

    let id = stage.run(&["openstack", "image", "show", "chunked", "-f", "value", "-c", "id"]);
    a_damaged_image_comes_down_to_nobody_and_is_told_of_until_it_is_whole(&stage, id.trim());
    stage.run(&["glance", "image-delete", id.trim()]);
    stage.run(&["openstack", "image", "delete", "declared"]);
    assert_eq!(stage.json(&["image", "list"]), serde_json::json!([]));
    stage.is_clean();
}

fn a_damaged_image_comes_down_to_nobody_and_is_told_of_until_it_is_whole(stage: &Stage, id: &str) {
    let path = stage.lab().pool().join("images").join(id);
    let flip = || {
        let mut bytes = std::fs::read(&path).expect("is there");
        bytes[5 << 20] ^= 1;
        std::fs::write(&path, bytes).expect("is ours");
    };
    flip();
    let said = stage.refused(&["openstack", "image", "save", "--file", "/run/damaged", id]);
    assert!(!said.trim().is_empty());
    // It is known for longer than the coordinator's life.
    let coordinator = stage.lab().coordinator();
    coordinator.kill(9).expect("it is killed");
    coordinator.start().expect("it starts");
    let is_told = || {
        let status = coordinator.cli_json(&["status"]).expect("godwit answers");
        status["problems"].to_string().contains(&format!("image {id} is damaged"))
    };
    assert!(is_told());
    flip();
    coordinator.cli(&["image", "save", id, "--file", "/run/whole"]).expect("it is what it was");
    assert!(!is_told());
}

#[test]
fn a_file_that_is_no_qcow2_or_leads_to_another_is_refused_and_leaves_nothing() {
    let stage = Stage::start(1);
    let folder = stage.lab().coordinator().host().file("run");
    std::fs::write(folder.join("corrupt"), [0x51; 70_000]).expect("is writable");
    let leads = folder.join("leads");
    let arguments = ["create", "-q", "-f", "qcow2", "-u", "-b", "/etc/passwd", "-F", "raw"];
    let made = std::process::Command::new("qemu-img").args(arguments).arg(&leads).arg("1M").status();
    assert!(made.expect("qemu-img starts").success());

    for (name, reason) in [("corrupt", "qcow2"), ("leads", "backing file")] {
        let file = Path::new("/run").join(name).to_string_lossy().into_owned();
        let upload = ["--disk-format", "qcow2", "--container-format", "bare", "--file", &file];
        let said = stage.refused(&[&["openstack", "image", "create"], &upload[..], &[name]].concat());
        assert!(said.contains(reason), "{said}");
        let said = stage.refused(&[&["glance", "image-create", "--name", name], &upload[..]].concat());
        assert!(said.contains(reason), "{said}");
        // openstack takes its image back by itself; glance leaves the empty one to its user.
        let left = stage.json(&["image", "list"]);
        for row in left.as_array().into_iter().flatten() {
            assert_ne!(row["Status"], "active", "{left}");
            stage.run(&["openstack", "image", "delete", row["ID"].as_str().expect("has an id")]);
        }
        stage.is_clean();
    }
}
