//! `godwit-coordinator init | run | version`.
//!
//! The only unsafe code of the crate is here: a call that keeps the idle process small.

use clap::{Parser, Subcommand};
use godwit_coordinator::agents::{self, Agents};
use godwit_coordinator::api::frame::Requests;
use godwit_coordinator::api::server::{ListenError, Server};
use godwit_coordinator::app::{self, App, Shared};
use godwit_coordinator::ca::{Ca, CaError};
use godwit_coordinator::config::{Config, ConfigError};
use godwit_coordinator::error::Error;
use godwit_coordinator::images::Images;
use godwit_coordinator::init::{self, InitError};
use godwit_coordinator::l2;
use godwit_coordinator::ledger::Ledger;
use godwit_coordinator::operations::Operations;
use godwit_coordinator::renewal::{self, RenewalError};
use godwit_coordinator::store::StoreError;
use godwit_coordinator::tokens::{KeyError, Tokens};
use godwit_coordinator::{api, metrics};
use godwit_protocol::error::chain;
use godwit_protocol::quic::ChannelError;
use nix::fcntl::{Flock, FlockArg};
use std::io::{self, Write};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{SignalKind, signal};

/// Threads that may block at the same time: uploads, passwords, checks of images.
const BLOCKING_THREADS: usize = 32;

/// Godwit's coordinator: knows what is wanted, places it, drives the hosts' agents.
#[derive(Parser)]
#[command(version, disable_version_flag = true)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Makes a new installation: certificates, the administrator, flavors, clouds.yaml.
    Init {
        /// Folder for settings, keys and state.
        #[arg(long, default_value = "/var/lib/godwit-coordinator")]
        dir: PathBuf,
        /// How users and hosts reach the API: https://ADDR:PORT.
        #[arg(long)]
        url: String,
        /// Where the API listens [default: the URL's address and port].
        #[arg(long, value_name = "ADDR:PORT")]
        listen: Option<SocketAddr>,
        /// Where agents connect, UDP [default: the URL's address, port 8775].
        #[arg(long, value_name = "ADDR:PORT")]
        agents_listen: Option<SocketAddr>,
        /// Shared folder for images and disks; the same path on the coordinator and all hosts.
        #[arg(long, default_value = "/srv/godwit")]
        pool: PathBuf,
        /// Replace the installation in the folder, with its state and certificates.
        #[arg(long)]
        force: bool,
    },
    /// Serves the API and the agents until it is told to stop (SIGTERM, SIGINT).
    Run {
        /// The installation's folder.
        #[arg(long, default_value = "/var/lib/godwit-coordinator")]
        dir: PathBuf,
    },
    /// Prints the version.
    Version,
}

/// Why the process ends early.
#[derive(Debug, thiserror::Error)]
enum MainError {
    #[error(transparent)]
    Init(#[from] InitError),
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error("{0} cannot be read")]
    Read(PathBuf, #[source] std::io::Error),
    #[error("another coordinator runs with {0}")]
    Locked(PathBuf),
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Key(#[from] KeyError),
    #[error(transparent)]
    Ca(#[from] CaError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error(transparent)]
    Agents(#[from] agents::ServeError),
    #[error(transparent)]
    Listen(#[from] ListenError),
    #[error(transparent)]
    State(#[from] Error),
    #[error(transparent)]
    Renewal(#[from] RenewalError),
    #[error("the metrics do not register")]
    Metrics(#[from] prometheus::Error),
    #[error("the runtime does not start")]
    Runtime(#[source] std::io::Error),
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    return_memory();
    let filter = tracing_subscriber::EnvFilter::try_from_default_env().unwrap_or_else(|_| "info".into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_writer(std::io::stderr)
        .init();
    match execute(arguments.command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("godwit-coordinator: {}", chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn execute(command: Command) -> Result<(), MainError> {
    let workers = std::thread::available_parallelism().map_or(2, |n| n.get().clamp(2, 4));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(workers)
        .max_blocking_threads(BLOCKING_THREADS)
        .enable_all()
        .build()
        .map_err(MainError::Runtime)?;
    match command {
        Command::Init { dir, url, listen, agents_listen, pool, force } => {
            // State and keys are the owner's alone, also those that SQLite makes.
            nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o077));
            let plan = init::Plan { dir: dir.clone(), url, listen, agents_listen, pool, force };
            let made = runtime.block_on(init::init(plan))?;
            let told = format!(
                "The installation is in {}.\nUser admin has the password {} (shown only now, and kept in \
                 clouds.yaml).\nServe it:  godwit-coordinator run --dir {}\nUse it:    \
                 OS_CLIENT_CONFIG_FILE={} godwit status",
                dir.display(),
                made.password,
                dir.display(),
                made.clouds.display()
            );
            // It is made, whoever hears of it.
            let _ = writeln!(io::stdout(), "{told}");
            Ok(())
        }
        Command::Run { dir } => {
            let result = runtime.block_on(run(&dir));
            // An upload's thread may hang on the pool: it must not keep the process.
            runtime.shutdown_timeout(Duration::from_secs(1));
            result
        }
        Command::Version => {
            println!("godwit-coordinator {}", env!("CARGO_PKG_VERSION"));
            Ok(())
        }
    }
}

async fn run(dir: &Path) -> Result<(), MainError> {
    // Before anything can be seen from outside: who sees it may also end it.
    let mut terminate = signal(SignalKind::terminate()).map_err(MainError::Runtime)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(MainError::Runtime)?;
    let config = Config::read(dir)?;
    let _lock = lock(dir)?;
    let ca = Ca::open(dir)?;
    let identity = Arc::new(renewal::own_identity(dir, &ca, &config)?);
    let app: Shared = Arc::new(App {
        ledger: Ledger::open(&dir.join("state.db"))?,
        agents: Agents::default(),
        operations: Operations::default(),
        l2: l2::Queue::default(),
        events: Default::default(),
        images: Images::new(&config.pool),
        tokens: Tokens::open(&dir.join("token.key"), Duration::from_secs(config.token_seconds))?,
        ca,
        config,
    });
    app.images.recover(&app.ledger).await?;
    let registry = prometheus::Registry::new();
    metrics::register(&app, &registry)?;
    renewal::start(&app, dir.to_owned(), identity.clone(), &registry)?;
    let router = api::router(app.clone(), Requests::new(&registry)?);
    let mut server = Server::default();
    server.serve_tls(router.clone(), app.config.listen, identity.tls_public(HTTP)?).await?;
    if let Some(address) = &app.config.plain_listen {
        server.serve_plain(router, address).await?;
    }
    server.serve_plain(metrics::router(registry), &app.config.metrics_listen).await?;
    agents::serve(&app, &identity)?;
    app::start(&app);
    tracing::info!(url = app.config.url, agents = %app.config.agents_listen, "the coordinator serves");
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    tracing::info!("the coordinator stops");
    server.stop().await;
    Ok(())
}

/// The installation is this process's until it ends.
fn lock(dir: &Path) -> Result<Flock<std::fs::File>, MainError> {
    let path = dir.join("lock");
    let file = std::fs::File::create(&path).map_err(|source| MainError::Read(path, source))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|_| MainError::Locked(dir.to_owned()))
}

/// Protocol of the API's connections.
const HTTP: &[u8] = b"http/1.1";

/// Makes glibc give freed memory back. By default it learns from the first freed block of a password's hash to keep
/// blocks of that size, and holds an arena a thread: megabytes for nothing in a process that mostly waits.
fn return_memory() {
    // SAFETY: mallopt only sets parameters of the allocator; no other thread runs yet.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 256 << 10);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 256 << 10);
        libc::mallopt(libc::M_ARENA_MAX, 2);
    }
}
