//! The first process of a namespace: sets it up, starts services, reaps orphans, and ends with the lab.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use godwit_tests::lab::control::{Channel, Mount, Reply, Request, Service, Setup};
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MsFlags, mount};
use nix::sys::prctl;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid, waitpid};
use nix::unistd::Pid;

/// How long a service that ended stays down before it is started again.
const RESTART_DELAY: Duration = Duration::from_millis(200);

enum Event {
    Asked(Request),
    LabIsGone,
    Exited(Pid),
}

/// Runs until the lab's end of stdin closes.
pub(crate) fn run() -> io::Result<ExitCode> {
    prctl::set_pdeathsig(Signal::SIGKILL)?;
    let mut lifeline = Channel::new(UnixStream::from(io::stdin().as_fd().try_clone_to_owned()?));
    let Some(setup) = lifeline.receive::<Setup>()? else { return Ok(ExitCode::SUCCESS) };
    let mut replies = lifeline.sender()?;
    if let Err(error) = prepare(&setup) {
        replies.send(&Reply::Failed(error.to_string()))?;
        return Err(error);
    }
    replies.send(&Reply::Done)?;

    let (sender, events) = channel();
    let spawning = Arc::new(Mutex::new(()));
    let (started, wake) = channel();
    let exits = sender.clone();
    let guard = Arc::clone(&spawning);
    std::thread::spawn(move || reap(&exits, &guard, &wake));
    std::thread::spawn(move || {
        while let Ok(Some(request)) = lifeline.receive() {
            if sender.send(Event::Asked(request)).is_err() {
                return;
            }
        }
        let _ = sender.send(Event::LabIsGone);
    });
    let mut services = Services { running: BTreeMap::new(), spawning, started };
    services.serve(&events, &mut replies)?;
    if let Some(folder) = &setup.remove_at_end {
        // The others hold a shared lock until all their processes have ended.
        let file = File::open(folder.join("lock"))?;
        let _lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| error)?;
        std::fs::remove_dir_all(folder)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn prepare(setup: &Setup) -> io::Result<()> {
    for wanted in &setup.mounts {
        let (source, target, kind, flags) = match wanted {
            Mount::Bind { source, target } => (source.clone(), target, None, MsFlags::MS_BIND),
            Mount::Kernel { kind, target } => (kind.into(), target, Some(kind.as_str()), MsFlags::empty()),
        };
        mount(Some(&source), target, kind, flags, None::<&str>)
            .map_err(|error| io::Error::other(format!("cannot mount {wanted:?}: {error}")))?;
    }
    if let Some(name) = &setup.host_name {
        std::fs::write("/proc/sys/kernel/hostname", name)?;
    }
    Ok(())
}

/// Waits for children, own and adopted, and reports which ended.
///
/// `spawning` is held while a child is started: `Command::spawn` waits by itself for a child whose program could
/// not be started, and must find it.
fn reap(exits: &Sender<Event>, spawning: &Mutex<()>, started: &Receiver<()>) {
    loop {
        match waitid(Id::All, WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT) {
            Err(Errno::ECHILD) => {
                // Adopted processes are descendants of children, so nothing can end before something starts.
                if started.recv().is_err() {
                    return;
                }
            }
            Err(_) => {}
            Ok(status) => {
                let _guard = spawning.lock().unwrap_or_else(PoisonError::into_inner);
                let Some(process) = status.pid() else { continue };
                if let Ok(WaitStatus::Exited(..) | WaitStatus::Signaled(..)) = waitpid(process, None)
                    && exits.send(Event::Exited(process)).is_err()
                {
                    return;
                }
            }
        }
    }
}

struct Running {
    service: Service,
    process: Option<Pid>,
    restart_at: Option<Instant>,
}

struct Services {
    running: BTreeMap<String, Running>,
    spawning: Arc<Mutex<()>>,
    started: Sender<()>,
}

impl Services {
    fn serve(&mut self, events: &Receiver<Event>, replies: &mut Channel) -> io::Result<()> {
        loop {
            let due = self.running.values().filter_map(|running| running.restart_at).min();
            let patience = due.map_or(Duration::MAX, |due| due.saturating_duration_since(Instant::now()));
            match events.recv_timeout(patience) {
                Ok(Event::Asked(request)) => {
                    let reply = self.answer(request).unwrap_or_else(|error| Reply::Failed(error.to_string()));
                    replies.send(&reply)?;
                }
                Ok(Event::Exited(process)) => self.note_exit(process),
                Err(RecvTimeoutError::Timeout) => self.restart_due(),
                Ok(Event::LabIsGone) | Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    fn answer(&mut self, request: Request) -> io::Result<Reply> {
        match request {
            Request::Start(service) => {
                if self.running.get(&service.name).is_some_and(|running| running.process.is_some()) {
                    return Err(io::Error::other(format!("{} is running already", service.name)));
                }
                let process = self.start(&service)?;
                let name = service.name.clone();
                self.running.insert(name, Running { service, process: Some(process), restart_at: None });
                Ok(Reply::Done)
            }
            Request::Stop { name, signal } => {
                let running = self.find(&name)?;
                running.service.restart = false;
                running.restart_at = None;
                running.signal(signal)
            }
            Request::Signal { name, signal } => self.find(&name)?.signal(signal),
            Request::Status { name } => {
                let process = self.running.get(&name).and_then(|running| running.process);
                Ok(Reply::Process(process.map(Pid::as_raw)))
            }
        }
    }

    fn find(&mut self, name: &str) -> io::Result<&mut Running> {
        self.running.get_mut(name).ok_or_else(|| io::Error::other(format!("{name} was never started")))
    }

    fn start(&self, service: &Service) -> io::Result<Pid> {
        let log = OpenOptions::new().create(true).append(true).open(&service.log)?;
        let mut command = Command::new(&service.program);
        command.args(&service.arguments).envs(&service.environment);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).current_dir("/");
        let _guard = self.spawning.lock().unwrap_or_else(PoisonError::into_inner);
        let child = command.spawn().map_err(|error| {
            io::Error::new(error.kind(), format!("cannot start {}: {error}", service.program.display()))
        })?;
        let _ = self.started.send(());
        Ok(Pid::from_raw(child.id() as i32))
    }

    fn note_exit(&mut self, process: Pid) {
        if let Some(running) = self.running.values_mut().find(|running| running.process == Some(process)) {
            running.process = None;
            running.restart_at = running.service.restart.then(|| Instant::now() + RESTART_DELAY);
        }
    }

    fn restart_due(&mut self) {
        let now = Instant::now();
        let due: Vec<Service> = self
            .running
            .values()
            .filter(|running| running.restart_at.is_some_and(|at| at <= now))
            .map(|running| running.service.clone())
            .collect();
        for service in due {
            let process = self.start(&service).ok();
            if let Some(running) = self.running.get_mut(&service.name) {
                running.process = process;
                running.restart_at = process.is_none().then(|| now + RESTART_DELAY);
            }
        }
    }
}

impl Running {
    fn signal(&self, signal: i32) -> io::Result<Reply> {
        let signal = if signal == 0 { None } else { Some(Signal::try_from(signal)?) };
        if let Some(process) = self.process {
            kill(process, signal)?;
        }
        Ok(Reply::Done)
    }
}
