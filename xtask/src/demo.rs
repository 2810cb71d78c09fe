//! `cargo xtask demo`: Godwit's main job on real hosts, each command printed before it runs.

mod facts;
mod stage;

use crate::command::{self, CommandError};
use crate::setup::{self, SetupError};
use facts::Facts;
use godwit_tests::guest_image::{self, GuestImageError};
use godwit_tests::lab::{Lab, LabError, LabOptions};
use stage::Stage;
use std::path::PathBuf;
use std::time::Instant;

/// `cargo xtask demo`.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Leave the hosts up at the end, and print how to use them; Ctrl-C ends them
    #[arg(long)]
    keep: bool,
    /// Write what happened to this file, as JSON
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Why the demo did not get to its end.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DemoError {
    #[error(transparent)]
    Setup(#[from] SetupError),
    #[error(transparent)]
    Command(#[from] CommandError),
    #[error(transparent)]
    Image(#[from] GuestImageError),
    #[error(transparent)]
    Lab(#[from] LabError),
    #[error("{0}")]
    Unexpected(String),
    #[error("cannot write {path}")]
    Write { path: PathBuf, source: std::io::Error },
    #[error("cannot wait for Ctrl-C")]
    Wait(#[source] std::io::Error),
}

/// Builds, shows, cleans up.
pub(crate) fn run(arguments: &Arguments) -> Result<(), DemoError> {
    setup::run(&setup::Arguments::default())?;
    println!("demo: building the daemons, the client and the lab");
    command::run(command::cargo().args([
        "build",
        "--quiet",
        "-p",
        "godwit-agent",
        "-p",
        "godwit-coordinator",
        "-p",
        "godwit",
        "-p",
        "godwit-tests",
        "--bins",
    ]))?;
    let image = guest_image::ensure(&command::target_folder().join("guest"))?;

    let started = Instant::now();
    let lab = Lab::start(LabOptions::default())?;
    let result = show(&lab, &image.path, started);
    if let Err(error) = &result {
        eprintln!("{}\nthe demo stopped: {error}", lab.logs());
    }
    let mut facts = result?;
    facts.seconds = started.elapsed().as_secs_f64();
    if let Some(path) = &arguments.json {
        let text = facts.to_json();
        std::fs::write(path, text).map_err(|source| DemoError::Write { path: path.clone(), source })?;
    }
    println!("\n{}", facts.summary());
    if arguments.keep {
        keep(&lab)?;
    }
    drop(lab);
    facts.verdict()
}

/// The story, act by act.
fn show(lab: &Lab, image: &std::path::Path, started: Instant) -> Result<Facts, DemoError> {
    let stage = Stage::new(lab, started);
    let mut facts = Facts::new(lab.hosts().len());

    stage.act("Three hosts join a coordinator: each makes its own key and gets its certificate for a one-time token");
    stage.say("godwit-coordinator init, run; on each host: godwit-agent join URL TOKEN, run");
    lab.join_all()?;
    facts.at("hosts_joined", started);
    stage.run(&["host", "list"])?;
    stage.run(&["host", "show", "h1"])?;

    stage.act("An image, a size with a NUMA cell and a CPU of its own, a key, a network");
    let image = image.to_string_lossy().into_owned();
    stage.run(&["image", "create", "tiny-linux", "--file", &image, "--disk-format", "qcow2", "--public"])?;
    facts.at("image_uploaded", started);
    stage.run(&[
        "flavor",
        "create",
        "pinned",
        "--vcpus",
        "1",
        "--memory",
        "256M",
        "--disk",
        "1G",
        "--property",
        "hw:numa_nodes=1",
        "--property",
        "hw:cpu_policy=dedicated",
    ])?;
    let key = stage.ssh_key()?;
    stage.run(&["keypair", "create", "demo", "--public-key", &format!("{key}.pub")])?;
    stage.run(&["network", "create", "blue", "--subnet", "10.77.0.0/24"])?;

    stage.act("Two servers: placed by NUMA, each holds its cell and CPU on its host before anything starts");
    for name in ["one", "two"] {
        stage.run(&[
            "server",
            "create",
            name,
            "--flavor",
            "pinned",
            "--image",
            "tiny-linux",
            "--network",
            "blue",
            "--key-name",
            "demo",
            "--wait",
        ])?;
    }
    facts.at("servers_active", started);
    stage.run(&["server", "list"])?;
    let (one, two) = (stage.server("one")?, stage.server("two")?);
    if one.host == two.host {
        return Err(DemoError::Unexpected(format!("both servers are on {}, not spread", one.host)));
    }
    facts.servers_on_two_hosts = true;

    stage.act("The guests ping each other across VXLAN: asked over SSH, from a port on h3");
    let probe = stage.probe("h3")?;
    stage.wait_for_ssh(&probe, &key, &one)?;
    stage.wait_for_ssh(&probe, &key, &two)?;
    facts.at("guests_answer", started);
    stage.ssh(&probe, &key, &one, &format!("ping -c 3 {}", two.address))?;
    facts.guests_ping = true;
    stage.metrics(&one.host)?;

    stage.act("Server one moves to the other server's host while h3 pings it every 10 ms");
    let pings = stage.pings(&probe, &one)?;
    let migration = stage.migrate("one", &two.host);
    // The pings run on for a moment, so that what the move left behind would show.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let heard = pings.finish()?;
    facts.migrated(&migration?, heard);
    facts.at("migrated", started);
    println!("{}", facts.migration_line());
    let moved = stage.server("one")?;
    if moved.host != two.host || moved.address != one.address {
        return Err(DemoError::Unexpected(format!("server one is on {} at {}", moved.host, moved.address)));
    }
    stage.run(&["server", "list"])?;
    stage.run(&["network", "l2", "blue"])?;
    stage.ssh(&probe, &key, &moved, &format!("ping -c 3 {}", two.address))?;
    stage.metrics(&moved.host)?;

    stage.act("A size that fits nowhere is refused, host by host with the rule that failed");
    stage.run(&[
        "flavor",
        "create",
        "impossible",
        "--vcpus",
        "8",
        "--memory",
        "512M",
        "--disk",
        "1G",
        "--property",
        "hw:numa_nodes=4",
        "--property",
        "hw:cpu_policy=dedicated",
    ])?;
    facts.hosts_explained = stage.explain("impossible")?;
    stage.expect_failure(&[
        "server",
        "create",
        "too-big",
        "--flavor",
        "impossible",
        "--image",
        "tiny-linux",
        "--network",
        "blue",
        "--wait",
    ])?;

    stage.act("Everything is deleted, and the hosts are searched for what is left");
    drop(probe);
    stage.run(&["server", "delete", "one", "two", "too-big", "--wait"])?;
    stage.delete_probe_port()?;
    stage.run(&["network", "delete", "blue"])?;
    stage.run(&["image", "delete", "tiny-linux"])?;
    stage.run(&["flavor", "delete", "pinned", "impossible"])?;
    stage.run(&["keypair", "delete", "demo"])?;
    facts.left_behind = stage.leftovers()?;
    Ok(facts)
}

/// Prints how to use the lab, and waits for Ctrl-C.
fn keep(lab: &Lab) -> Result<(), DemoError> {
    let coordinator = godwit_tests::lab::shell_command(lab.coordinator().host())?;
    println!("The lab stays up until Ctrl-C. In other shells:");
    println!("  a shell on the coordinator's host:   {coordinator}");
    println!("    export OS_CLIENT_CONFIG_FILE=/var/lib/godwit/clouds.yaml OS_CLOUD=godwit");
    println!(
        "    {}/godwit status         (or `openstack server list`, from a venv with python-openstackclient)",
        godwit_tests::programs_folder().display()
    );
    println!("    curl http://127.0.0.1:9178/metrics");
    for host in lab.hosts() {
        println!(
            "  a shell on {}:                       {}",
            host.name(),
            godwit_tests::lab::shell_command(host)?
        );
    }
    println!("    virsh list; virsh console instance-…; curl http://127.0.0.1:9177/metrics; bpftool net");
    println!("  the pool:                            {}", lab.pool().display());
    stage::wait_for_interrupt().map_err(DemoError::Wait)
}
