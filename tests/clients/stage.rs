//! The clients in an environment of their own, and a lab to run them against.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use godwit_tests::lab::{Host, Lab, LabOptions, STATE_FOLDER, URL, until};
use serde_json::Value;

/// What the environment holds, as on PyPI: the newest releases when this was written.
const CLIENTS: [(&str, &str); 5] = [
    ("python-openstackclient", "10.5.0"),
    ("openstacksdk", "4.22.0"),
    ("python-glanceclient", "4.13.0"),
    ("python-novaclient", "18.13.1"),
    ("osc-placement", "4.9.1"),
];

/// A lab whose hosts have joined, and the clients.
pub(crate) struct Stage {
    lab: Lab,
    programs: PathBuf,
}

impl Stage {
    /// A lab of `hosts` hosts, ready for servers.
    pub(crate) fn start(hosts: usize) -> Stage {
        Stage::with(LabOptions { hosts, ..LabOptions::default() })
    }

    /// A lab like this, ready for servers.
    pub(crate) fn with(options: LabOptions) -> Stage {
        let programs = clients();
        // A lab that a person holds, or that another checkout tests with, will end.
        let patience = Duration::from_secs(600);
        let lab = Lab::start(LabOptions { patience, ..options }).expect("the lab starts");
        lab.join_all().expect("the hosts join");
        Stage { lab, programs }
    }

    pub(crate) fn lab(&self) -> &Lab {
        &self.lab
    }

    /// The host of this name.
    pub(crate) fn host(&self, name: &str) -> &Host {
        self.lab.hosts().iter().find(|host| host.name() == name).unwrap_or_else(|| panic!("no host {name}"))
    }

    /// Nothing is left of what the users made.
    pub(crate) fn is_clean(&self) {
        // A host takes a moment to let a network's devices go.
        let left = || self.lab.leftovers().expect("is listed");
        until("the lab", "its being clean", Duration::from_secs(20), || Ok(left().is_empty()))
            .unwrap_or_else(|error| panic!("{error}: {:#?}", left()));
    }

    /// A command on the coordinator's host, with the admin's cloud in its environment and the clients in its path.
    pub(crate) fn command(&self, words: &[&str]) -> Command {
        let coordinator = self.lab.coordinator();
        let mut command = coordinator.client(words).expect("c0 is on");
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("{}:{path}", self.programs.display()));
        if words[0] != "openstack" {
            // The older clients do not read clouds.yaml.
            let clouds = coordinator.host().file("lib/godwit/clouds.yaml");
            let clouds = std::fs::read_to_string(clouds).expect("init wrote it");
            let password = clouds.lines().find_map(|line| line.trim().strip_prefix("password:"));
            let password = password.expect("it holds the password").trim().trim_matches(['"', '\'']);
            command.env("OS_AUTH_URL", format!("{URL}/identity/v3")).env("OS_PASSWORD", password);
            command.env("OS_CACERT", format!("{STATE_FOLDER}/ca.pem")).env("OS_REGION_NAME", "RegionOne");
            for name in ["OS_USERNAME", "OS_PROJECT_NAME"] {
                command.env(name, "admin");
            }
            for name in ["OS_USER_DOMAIN_NAME", "OS_PROJECT_DOMAIN_NAME"] {
                command.env(name, "Default");
            }
        }
        command
    }

    /// Runs clients that do not depend on each other, as many at once as there are CPUs: most of the time goes
    /// into starting them.
    pub(crate) fn outputs(&self, lines: &[Vec<&str>]) -> Vec<Output> {
        let next = AtomicUsize::new(0);
        let work = || {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                match lines.get(number) {
                    Some(words) => done.push((number, self.output(words))),
                    None => return done,
                }
            }
        };
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let mut outputs: Vec<(usize, Output)> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
            threads.into_iter().flat_map(|thread| thread.join().expect("no client panics")).collect()
        });
        outputs.sort_by_key(|(number, _)| *number);
        outputs.into_iter().map(|(_, output)| output).collect()
    }

    /// Runs clients that do not depend on each other and must succeed; returns what each printed.
    pub(crate) fn run_all(&self, lines: &[Vec<&str>]) -> Vec<String> {
        let outputs = self.outputs(lines).into_iter().zip(lines);
        outputs.map(|(output, words)| printed(&output, words)).collect()
    }

    /// Runs a client to its end, whatever its end.
    pub(crate) fn output(&self, words: &[&str]) -> Output {
        self.command(words).output().expect("the client starts")
    }

    /// Runs a client that must succeed; returns what it printed.
    pub(crate) fn run(&self, words: &[&str]) -> String {
        printed(&self.output(words), words)
    }

    /// `openstack … -f json`.
    pub(crate) fn json(&self, words: &[&str]) -> Value {
        let words: Vec<&str> = ["openstack"].iter().chain(words).chain(&["-f", "json"]).copied().collect();
        let printed = self.run(&words);
        serde_json::from_str(&printed).unwrap_or_else(|_| panic!("{} printed {printed}", words.join(" ")))
    }

    /// Runs a client that must fail, by a refusal and not by a defect of its own; returns what it said.
    pub(crate) fn refused(&self, words: &[&str]) -> String {
        let output = self.output(words);
        let said = [output.stdout, output.stderr].concat();
        let said = String::from_utf8_lossy(&said).into_owned();
        assert!(!output.status.success(), "{} was to be refused: {said}", words.join(" "));
        assert!(!said.contains("Traceback"), "{} broke down: {said}", words.join(" "));
        said
    }
}

/// What a client that must have succeeded printed.
fn printed(output: &Output, words: &[&str]) -> String {
    let printed = String::from_utf8_lossy(&output.stdout).into_owned();
    let complaint = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{} failed: {complaint}{printed}", words.join(" "));
    printed
}

/// The folder of the clients' programs, made where it is not there yet.
fn clients() -> PathBuf {
    let versions = CLIENTS.map(|(_, version)| version).join("-");
    let environment = godwit_tests::target_folder().join(format!("venv-{versions}"));
    let complete = environment.join("complete");
    let programs = environment.join("bin");
    if !complete.is_file() {
        // --clear: what an interrupted run left is of no use.
        succeed(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&environment));
        let wanted = CLIENTS.map(|(name, version)| format!("{name}=={version}"));
        let mut install = Command::new(programs.join("pip"));
        succeed(install.args(["install", "--quiet", "--disable-pip-version-check"]).args(wanted));
        std::fs::write(&complete, "").expect("the environment's folder is writable");
    }
    programs
}

/// The digest that the image service tells, as an independent program computes it.
pub(crate) fn sha512(file: &Path) -> String {
    let output = Command::new("sha512sum").arg(file).output().expect("sha512sum starts");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).split(' ').next().unwrap_or_default().to_owned()
}

fn succeed(command: &mut Command) {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}
