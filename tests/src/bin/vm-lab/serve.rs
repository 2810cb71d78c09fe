//! Inside the VM: runs commands for the test.
//!
//! What a command writes goes to files, so that a daemon which keeps its stdout open does not keep the test waiting.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, BufRead as _, BufReader, Write as _};
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use godwit_tests::vm::control::{Answer, Ask, Output, PORT, Reply, Request};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;

pub(crate) const PATH: &str = "/job:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const FOLDER: &str = "/run/vm-lab";

/// Most of what a command wrote that is told, in bytes; the end counts.
const MAX_OUTPUT_BYTES: usize = 4 << 20;

/// Serves until the VM is off.
pub(crate) fn run() -> io::Result<()> {
    fs::create_dir_all(FOLDER)?;
    let device = port()?;
    let port = File::options().read(true).write(true).open(&device)?;
    let server = Server { port: Arc::new(Mutex::new(port.try_clone()?)), running: Arc::default() };
    server.reply(0, Answer::Ready)?;
    let mut lines = BufReader::new(port);
    loop {
        let mut line = String::new();
        if lines.read_line(&mut line)? == 0 {
            // Nobody is connected outside.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        }
        server.handle(serde_json::from_str(&line)?)?;
    }
}

/// The port's device, such as /dev/vport1p1.
fn port() -> io::Result<PathBuf> {
    for entry in fs::read_dir("/sys/class/virtio-ports")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("name"))?.trim() == PORT {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::other(format!("there is no port {PORT}")))
}

#[derive(Clone)]
struct Server {
    port: Arc<Mutex<File>>,
    /// Commands to their process groups.
    running: Arc<Mutex<HashMap<u64, i32>>>,
}

impl Server {
    fn handle(&self, request: Request) -> io::Result<()> {
        let command = request.command;
        match request.ask {
            Ask::Start { words, environment, stdin } => {
                let server = self.clone();
                // Registered before the next request is read, so that a signal finds it.
                match start(command, &words, &environment, &stdin) {
                    Ok(child) => {
                        locked(&self.running).insert(command, child.id() as i32);
                        std::thread::spawn(move || server.wait(command, child));
                    }
                    Err(error) => self.reply(command, Answer::NotStarted(error.to_string()))?,
                }
            }
            Ask::Look => self.reply(command, Answer::Written(output(command, None)))?,
            Ask::Signal(signal) => {
                if let (Some(group), Ok(signal)) =
                    (locked(&self.running).get(&command), Signal::try_from(signal))
                {
                    // It may have ended just now.
                    let _ = killpg(Pid::from_raw(*group), signal);
                }
            }
            Ask::PowerOff => super::init::power_off()?,
        }
        Ok(())
    }

    fn wait(&self, command: u64, mut child: std::process::Child) {
        let status = child.wait();
        locked(&self.running).remove(&command);
        let answer = match status {
            Ok(status) => Answer::Ended(output(command, Some(status))),
            Err(error) => Answer::NotStarted(error.to_string()),
        };
        // An error ends the VM: the serving loop meets it too.
        let _ = self.reply(command, answer);
        for name in ["in", "out", "err"] {
            let _ = fs::remove_file(file(command, name));
        }
    }

    fn reply(&self, command: u64, answer: Answer) -> io::Result<()> {
        let mut line = serde_json::to_vec(&Reply { command, answer })?;
        line.push(b'\n');
        locked(&self.port).write_all(&line)
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn file(command: u64, name: &str) -> PathBuf {
    Path::new(FOLDER).join(format!("{command}.{name}"))
}

fn start(
    number: u64,
    words: &[String],
    environment: &BTreeMap<String, String>,
    stdin: &str,
) -> io::Result<std::process::Child> {
    let (program, arguments) = words.split_first().ok_or(io::ErrorKind::InvalidInput)?;
    fs::write(file(number, "in"), stdin)?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").process_group(0);
    command.env("PATH", PATH).env("HOME", "/root").env("LC_ALL", "C.UTF-8").envs(environment);
    command.stdin(File::open(file(number, "in"))?);
    command.stdout(File::create(file(number, "out"))?).stderr(File::create(file(number, "err"))?);
    command.spawn()
}

fn output(command: u64, status: Option<ExitStatus>) -> Output {
    let text = |name| {
        let bytes = fs::read(file(command, name)).unwrap_or_default();
        let start = bytes.len().saturating_sub(MAX_OUTPUT_BYTES);
        String::from_utf8_lossy(&bytes[start..]).into_owned()
    };
    Output {
        code: status.and_then(|status| status.code()),
        signal: status.and_then(|status| status.signal()),
        stdout: text("out"),
        stderr: text("err"),
    }
}
