//! What is wrong or not built is refused by words that a user can act on, and leaves nothing.

use crate::guests::{self, Guest};
use crate::stage::Stage;

/// A command, and what its refusal must say.
type Case<'a> = (&'a str, &'a str);

fn all_refused(stage: &Stage, cases: &[Case]) {
    let lines: Vec<Vec<&str>> = cases.iter().map(|(line, _)| line.split(' ').collect()).collect();
    let mut wrong = Vec::new();
    for (output, (line, reason)) in stage.outputs(&lines).into_iter().zip(cases) {
        let said = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if output.status.success() || said.contains("Traceback") || !said.contains(reason) {
            wrong.push(format!("{line}: {}, wanted `{reason}`: {}", output.status, said.trim()));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn wrong_input_is_refused_by_its_name_and_leaves_nothing() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    let create = |flavor: &str, image: &str, network: &str| {
        format!("openstack server create --flavor {flavor} --image {image} --network {network} bad")
    };
    let unknown = "11111111-2222-4333-8444-555555555555";
    let boot = format!("nova boot --flavor small --image guest --nic net-id={unknown} bad");
    let cases = [
        (&*create("small", "nope", "net"), "nope"),
        (&create("nope", "guest", "net"), "nope"),
        (&create("small", "guest", "nope"), "nope"),
        (&boot, unknown),
        ("nova boot --flavor small --image guest --nic net-id=net bad", "net"),
        ("nova boot --flavor nope --image guest --nic none bad", "nope"),
        ("openstack server show nope", "nope"),
        ("openstack server delete nope", "nope"),
        ("openstack image show nope", "nope"),
        ("openstack flavor delete nope", "nope"),
        ("openstack network delete nope", "nope"),
        ("openstack port create --network nope bad", "nope"),
        ("openstack flavor set --property hw:cpu_policy=sometimes small", "hw:cpu_policy"),
        ("openstack flavor set --property hw:numa_nodes=none small", "hw:numa_nodes"),
        ("openstack subnet create --network net --subnet-range 10.9.0.0/99 bad", "10.9.0.0/99"),
        ("openstack subnet create --network net --subnet-range 10.9.0.0/24 bad", "10.9.0.0/24"),
        ("openstack keypair create --public-key /etc/hostname bad", "Keypair data is invalid"),
        ("openstack --os-password wrong token issue", "password is wrong"),
    ];
    all_refused(&stage, &cases);
    assert_eq!(stage.json(&["server", "list", "--all-projects"]), serde_json::json!([]));

    // A disk that is smaller than the image's, and a host that is none.
    stage.run(&["openstack", "image", "set", "--min-disk", "20", "guest"]);
    all_refused(&stage, &[(&*create("small", "guest", "net"), "disk is too small")]);
    stage.run(&["openstack", "image", "set", "--min-disk", "0", "guest"]);
    let placed = format!("{} --availability-zone nova:h9", create("small", "guest", "net"));
    all_refused(&stage, &[(&*placed, "h9")]);

    // What fits nowhere is accepted, as its place is sought later; then the server says why, host by host.
    let size = ["--ram", "256", "--vcpus", "8", "--disk", "1", "--property", "hw:cpu_policy=dedicated"];
    stage.run(&[&["openstack", "flavor", "create"], &size[..], &["huge"]].concat());
    let words = create("huge", "guest", "net") + " --wait";
    let said = stage.refused(&words.split(' ').collect::<Vec<_>>());
    assert!(said.contains("Error creating server: bad"), "the client says no more than that: {said}");
    let fault = stage.json(&["server", "show", "bad"])["fault"].to_string();
    assert!(fault.contains("h1") && fault.contains("h2"), "{fault}");
    stage.run(&["openstack", "server", "delete", "--wait", "bad"]);
    stage.run(&["openstack", "flavor", "delete", "huge"]);
    guests::clear(&stage);
}

#[test]
fn what_is_not_built_is_refused_with_what_to_do_instead() {
    let stage = Stage::start(2);
    guests::prepare(&stage);
    let guest = Guest::create(&stage, "one", "h1");
    let cases = [
        ("openstack volume list", "not found"),
        ("openstack volume create --size 5 bad", "not found"),
        ("openstack volume snapshot list", "not found"),
        ("openstack volume backup list", "not found"),
        ("openstack server create --flavor small --volume bad --network net bad", "not available"),
        (
            "openstack server create --flavor small --image guest --boot-from-volume 6 --network net bad",
            "Volumes are not supported here",
        ),
        ("openstack server image create --name bad one", "not supported here"),
        ("openstack console url show one", "not supported here"),
        ("openstack server suspend one", "not supported here"),
        ("openstack server migrate --host h1 one", "where the server exists"),
        ("openstack server migrate --host h9 one", "h9"),
        ("openstack server resize --flavor small one", "must change flavor"),
        ("openstack server resize confirm one", "vm_state active"),
        ("openstack server lock one", "not supported here"),
        ("openstack server migrate --live-migration --host h9 one", "h9"),
        ("openstack server migrate --live-migration --host h1 one", "h1"),
        ("openstack server migration abort one 1", "1"),
        ("nova image-create one bad", "not supported here"),
        ("nova get-vnc-console one novnc", "not supported here"),
        ("nova live-migration-abort one 1", "1"),
    ];
    all_refused(&stage, &cases);
    guest.is_carried_by(&stage, "h1");
    assert_eq!(stage.json(&["server", "list", "--all-projects"]).as_array().map(Vec::len), Some(1));
    guest.delete(&stage);
    guests::clear(&stage);
}
