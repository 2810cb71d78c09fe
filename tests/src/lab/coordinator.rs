//! The coordinator's host, and the users' command line.

use std::ffi::OsStr;
use std::process::{Command, Output};

use serde_json::Value;

use super::LabError;
use super::host::{Host, STATE_FOLDER};
use super::namespace::line;

/// Where users and agents reach the coordinator.
pub const URL: &str = "https://198.18.0.1:8774";

const DAEMON: &str = "godwit-coordinator";
/// Where it listens for users.
const PORT: u16 = 8774;

/// The coordinator on its host c0.
#[derive(Debug)]
pub struct Coordinator {
    host: Host,
    programs: std::path::PathBuf,
}

impl Coordinator {
    pub(super) fn new(host: Host, programs: std::path::PathBuf) -> Coordinator {
        Coordinator { host, programs }
    }

    /// The host it runs on: c0, at 198.18.0.1.
    pub fn host(&self) -> &Host {
        &self.host
    }

    /// Makes a new installation in [`STATE_FOLDER`]; returns what `init` printed, the password among it.
    pub fn init(&self) -> Result<String, LabError> {
        let program = self.program(DAEMON)?;
        self.host.exec(&[
            program.as_str(),
            "init",
            "--dir",
            STATE_FOLDER,
            "--url",
            URL,
            "--pool",
            super::POOL,
        ])
    }

    /// Puts `lines` before all others of its settings, instead of those of the same keys; keys of tables cannot be set.
    pub fn set(&self, lines: &str) -> Result<(), LabError> {
        let path = self.host.file("lib/godwit/coordinator.toml");
        let text = std::fs::read_to_string(&path).map_err(LabError::io(format!("cannot read {path:?}")))?;
        let key = |line: &str| line.split_once('=').map(|(key, _)| key.trim().to_owned());
        let set: Vec<_> = lines.lines().filter_map(key).collect();
        let kept = text.lines().filter(|line| !key(line).is_some_and(|key| set.contains(&key)));
        let text: Vec<&str> = lines.lines().chain(kept).collect();
        super::folder::write(&path, &text.join("\n"))
    }

    /// Starts it and waits until it listens for users.
    pub fn start(&self) -> Result<(), LabError> {
        self.host.start_daemon(DAEMON, &["run", "--dir", STATE_FOLDER])?;
        self.wait_until_listening()
    }

    /// Waits until it listens for users; fails at once when it has ended.
    pub fn wait_until_listening(&self) -> Result<(), LabError> {
        self.host.until("the coordinator's listening", 30, || {
            if self.process()?.is_none() {
                let message = format!("{DAEMON} ended:\n{}", self.host.log_tail(DAEMON, 20));
                return Err(LabError::Host { host: self.host.name().to_owned(), message });
            }
            self.host.listens(PORT)
        })
    }

    /// Sends it a signal; returns when it is gone, if the signal is one to end by.
    pub fn kill(&self, signal: i32) -> Result<(), LabError> {
        self.host.stop(DAEMON, signal)
    }

    /// Its process as seen from inside c0; none when it does not run.
    pub fn process(&self) -> Result<Option<i32>, LabError> {
        self.host.process_of(DAEMON)
    }

    /// Sets a variable of the environment in which it will be started; none removes it.
    pub fn set_environment(&self, key: &str, value: Option<&str>) {
        self.host.set_environment(key, value);
    }

    /// Runs `godwit` with `arguments` as the admin; anything but exit code 0 is an error. Returns stdout.
    pub fn cli<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<String, LabError> {
        let output = self.cli_output(arguments)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(LabError::Command {
            host: self.host.name().to_owned(),
            command: format!("godwit {}", line(arguments)),
            status: output.status,
            stderr: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Runs `godwit --json` with `arguments` and parses its answer.
    pub fn cli_json<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Value, LabError> {
        let mut words = vec![OsStr::new("--json")];
        words.extend(arguments.iter().map(AsRef::as_ref));
        let output = self.cli(&words)?;
        serde_json::from_str(&output).map_err(|_| LabError::Answer {
            host: self.host.name().to_owned(),
            command: format!("godwit {}", line(&words)),
            output,
        })
    }

    /// Runs `godwit` with `arguments` to its end, whatever its end.
    pub fn cli_output<S: AsRef<OsStr>>(&self, arguments: &[S]) -> Result<Output, LabError> {
        let mut words = vec![std::ffi::OsString::from(self.program("godwit")?)];
        words.extend(arguments.iter().map(|argument| argument.as_ref().to_owned()));
        self.client(&words)?.output().map_err(LabError::io("cannot start godwit"))
    }

    /// A command inside c0 with the cloud's settings in its environment, as the admin's clients want them: for
    /// `godwit`, `openstack` and whatever reads clouds.yaml.
    pub fn client<S: AsRef<OsStr>>(&self, words: &[S]) -> Result<Command, LabError> {
        let mut command = self.host.command(words)?;
        command.env("OS_CLIENT_CONFIG_FILE", format!("{STATE_FOLDER}/clouds.yaml")).env("OS_CLOUD", "godwit");
        command.stdin(std::process::Stdio::null());
        Ok(command)
    }

    /// A new token for one host to join.
    pub fn join_token(&self) -> Result<String, LabError> {
        let answer = self.cli_json(&["host", "token"])?;
        answer["token"].as_str().map(str::to_owned).ok_or_else(|| LabError::Answer {
            host: self.host.name().to_owned(),
            command: "godwit --json host token".to_owned(),
            output: answer.to_string(),
        })
    }

    /// The names of the hosts that are up and have said what they have, so that servers can be placed on them.
    pub fn hosts_ready(&self) -> Result<Vec<String>, LabError> {
        let hosts = self.cli_json(&["host", "list"])?;
        let hosts = hosts.as_array().into_iter().flatten();
        let ready = hosts
            .filter(|host| host["state"] == "up" && host["vcpus"].as_u64().is_some_and(|vcpus| vcpus > 0));
        Ok(ready.filter_map(|host| host["name"].as_str().map(str::to_owned)).collect())
    }

    fn program(&self, name: &str) -> Result<String, LabError> {
        let path = self.programs.join(name);
        if path.is_file() {
            Ok(path.to_string_lossy().into_owned())
        } else {
            Err(LabError::NotBuilt { path })
        }
    }
}
