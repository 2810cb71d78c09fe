//! The test's end of the conversation with a VM that is up: commands run inside, many at once.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::VmError;
use super::control::{Answer, Ask, Output, Reply, Request};
use crate::lab::control::Channel;

/// A conversation. Clones are the same one.
#[derive(Debug, Clone)]
pub(super) struct Session {
    vm: String,
    sender: Arc<Mutex<Channel>>,
    waiting: Waiting,
}

/// Who waits for an answer about which command.
type Table = HashMap<u64, Sender<Answer>>;

#[derive(Debug, Clone, Default)]
struct Waiting {
    /// None once the VM is off.
    answers: Arc<Mutex<Option<Table>>>,
    number: Arc<Mutex<u64>>,
}

impl Session {
    /// Over a connection to QEMU's end of the port. The VM may not be up yet.
    pub(super) fn new(vm: &str, stream: UnixStream) -> io::Result<(Session, Receiver<Answer>)> {
        let mut channel = Channel::new(stream);
        let sender = Arc::new(Mutex::new(channel.sender()?));
        let (ready, is_ready) = self::channel();
        let waiting = Waiting {
            answers: Arc::new(Mutex::new(Some(HashMap::from([(0, ready)])))),
            number: Arc::default(),
        };
        let table = waiting.clone();
        std::thread::spawn(move || {
            while let Ok(Some(Reply { command, answer })) = channel.receive::<Reply>() {
                let mut table = locked(&table.answers);
                let Some(table) = table.as_mut() else { return };
                let last = !matches!(answer, Answer::Written(_));
                let sender = if last { table.remove(&command) } else { table.get(&command).cloned() };
                if let Some(sender) = sender {
                    // Whoever asked may have stopped waiting.
                    let _ = sender.send(answer);
                }
            }
            // Whoever waits sees its channel close.
            *locked(&table.answers) = None;
        });
        Ok((Session { vm: vm.to_owned(), sender, waiting }, is_ready))
    }

    /// Starts a command.
    pub(super) fn start(
        &self,
        words: &[&str],
        environment: &BTreeMap<String, String>,
        stdin: &str,
    ) -> Result<Running, VmError> {
        let number = {
            let mut number = locked(&self.waiting.number);
            *number += 1;
            *number
        };
        let (sender, answers) = channel();
        let gone = || VmError::PoweredOff { vm: self.vm.clone() };
        locked(&self.waiting.answers).as_mut().ok_or_else(gone)?.insert(number, sender);
        let running = Running { session: self.clone(), number, line: words.join(" "), answers, ended: None };
        let words = words.iter().map(|&word| word.to_owned()).collect();
        self.send(number, Ask::Start { words, environment: environment.clone(), stdin: stdin.to_owned() })?;
        Ok(running)
    }

    pub(super) fn power_off(&self) -> Result<(), VmError> {
        self.send(0, Ask::PowerOff)
    }

    fn send(&self, command: u64, ask: Ask) -> Result<(), VmError> {
        let sent = locked(&self.sender).send(&Request { command, ask });
        sent.map_err(|_| VmError::PoweredOff { vm: self.vm.clone() })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A command that runs inside a VM. Dropping it leaves the command alone.
#[derive(Debug)]
pub struct Running {
    session: Session,
    number: u64,
    line: String,
    answers: Receiver<Answer>,
    ended: Option<Output>,
}

impl Running {
    /// What it has written so far.
    ///
    /// # Errors
    /// [`VmError::PoweredOff`], [`VmError::NotStarted`].
    pub fn look(&mut self) -> Result<Output, VmError> {
        if let Some(output) = &self.ended {
            return Ok(output.clone());
        }
        self.session.send(self.number, Ask::Look)?;
        match self.next(Duration::from_secs(60))? {
            Answer::Written(output) => Ok(output),
            _ => Ok(self.ended.clone().unwrap_or_default()),
        }
    }

    /// Sends it and its children a signal, as in signal(7).
    ///
    /// # Errors
    /// [`VmError::PoweredOff`].
    pub fn signal(&self, signal: i32) -> Result<(), VmError> {
        self.session.send(self.number, Ask::Signal(signal))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// [`VmError::Late`] after `patience`, and then it may be waited for again; [`VmError::PoweredOff`];
    /// [`VmError::NotStarted`].
    pub fn wait(&mut self, patience: Duration) -> Result<Output, VmError> {
        let deadline = Instant::now() + patience;
        while self.ended.is_none() {
            let left = deadline.saturating_duration_since(Instant::now());
            self.next(left).map_err(|error| match error {
                VmError::Late { vm, what, .. } => VmError::Late { vm, what, seconds: patience.as_secs() },
                other => other,
            })?;
        }
        Ok(self.ended.clone().unwrap_or_default())
    }

    /// Like [`Self::wait`]; anything but exit code 0 is an error. Returns stdout.
    ///
    /// # Errors
    /// As [`Self::wait`], and [`VmError::Command`].
    pub fn finish(&mut self, patience: Duration) -> Result<String, VmError> {
        let output = self.wait(patience)?;
        if output.success() {
            return Ok(output.stdout);
        }
        Err(VmError::Command {
            vm: self.session.vm.clone(),
            command: self.line.clone(),
            status: output.status(),
            stderr: output.stderr.trim().to_owned(),
        })
    }

    fn next(&mut self, patience: Duration) -> Result<Answer, VmError> {
        let vm = self.session.vm.clone();
        match self.answers.recv_timeout(patience) {
            Ok(Answer::Ended(output)) => {
                self.ended = Some(output.clone());
                Ok(Answer::Ended(output))
            }
            Ok(Answer::NotStarted(message)) => {
                Err(VmError::NotStarted { vm, command: self.line.clone(), message })
            }
            Ok(answer) => Ok(answer),
            Err(RecvTimeoutError::Timeout) => {
                let what = format!("the end of `{}`", self.line);
                Err(VmError::Late { vm, what, seconds: patience.as_secs() })
            }
            Err(RecvTimeoutError::Disconnected) => Err(VmError::PoweredOff { vm }),
        }
    }
}
