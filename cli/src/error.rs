//! What can go wrong, said so that the reader knows what to do next, and the exit code that goes with it.

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// The crate's result.
pub(crate) type Result<T> = std::result::Result<T, Error>;

/// Every way in which a command ends without success.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    /// The command line cannot mean anything.
    #[error("{0}")]
    Usage(String),
    /// A file that the command line names cannot be read or written.
    #[error("{path}: {source}", path = .path.display())]
    File {
        /// Which one.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Nothing has this id or name.
    #[error("there is no {noun} with the id or name '{name}' (see: godwit {noun} list)")]
    NotFound {
        /// `server`, `image`, …
        noun: &'static str,
        /// What was asked for.
        name: String,
    },
    /// Several things have this name.
    #[error("the name '{name}' belongs to {count} {noun}s; give one of their ids:\n  {list}",
        count = .ids.len(), list = .ids.join("\n  "))]
    Ambiguous {
        /// `server`, `image`, …
        noun: &'static str,
        /// What was asked for.
        name: String,
        /// All that have it.
        ids: Vec<String>,
    },
    /// Nothing says which cloud to talk to, or what says it is wrong.
    #[error("{0}")]
    Cloud(String),
    /// No answer from the service, or no trust in it.
    #[error("cannot reach {url} ({origin}): {reason}\n{advice}")]
    Unreachable {
        /// The request's URL.
        url: String,
        /// Where its address comes from.
        origin: String,
        /// What happened.
        reason: String,
        /// What to do.
        advice: String,
    },
    /// The identity service refused us.
    #[error("{url} refused {who}: {message}\nCheck {origin}.")]
    Unauthorized {
        /// The identity URL.
        url: String,
        /// The user and project.
        who: String,
        /// The service's words.
        message: String,
        /// Which file or variables the user and password come from.
        origin: String,
    },
    /// The service refused or failed a request.
    #[error("{message}{}", request_suffix(.request_id))]
    Api {
        /// HTTP status.
        status: u16,
        /// The service's words, whole.
        message: String,
        /// The service's id for the request, for its log.
        request_id: Option<String>,
    },
    /// An answer that no such service gives.
    #[error("{url} answered what cannot be understood: {reason}")]
    Answer {
        /// The request's URL.
        url: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A request was accepted and then failed.
    #[error("{0}")]
    Failed(String),
    /// It may still happen; the wait is over.
    #[error("{what}: not after {} s{}; it goes on by itself: wait longer with --timeout, or look with `{look}`",
        .after.as_secs(), state_suffix(.state))]
    TimedOut {
        /// What was waited for.
        what: String,
        /// How long.
        after: Duration,
        /// What was last seen, may be empty.
        state: String,
        /// The command that shows how it goes on.
        look: String,
    },
    /// Standard output is gone or full.
    #[error("cannot write the output: {0}")]
    Output(#[from] io::Error),
}

fn request_suffix(id: &Option<String>) -> String {
    id.as_ref().map(|id| format!(" ({id})")).unwrap_or_default()
}

fn state_suffix(state: &str) -> String {
    if state.is_empty() { String::new() } else { format!(" (now: {state})") }
}

impl Error {
    /// 1 failed, 2 usage, 3 not found, 4 cannot reach or authenticate, 5 timed out.
    pub(crate) fn exit_code(&self) -> ExitCode {
        ExitCode::from(match self {
            Error::Usage(_) | Error::File { .. } | Error::Ambiguous { .. } => 2,
            Error::NotFound { .. } | Error::Api { status: 404, .. } => 3,
            Error::Cloud(_) | Error::Unreachable { .. } | Error::Unauthorized { .. } => 4,
            Error::Api { status: 401, .. } => 4,
            Error::TimedOut { .. } => 5,
            Error::Api { .. } | Error::Answer { .. } | Error::Failed(_) | Error::Output(_) => 1,
        })
    }

    /// Whether the reader of our output went away, which is not worth a word.
    pub(crate) fn is_broken_pipe(&self) -> bool {
        matches!(self, Error::Output(source) if source.kind() == io::ErrorKind::BrokenPipe)
    }

    /// Whether the resource is not there.
    pub(crate) fn is_not_found(&self) -> bool {
        matches!(self, Error::NotFound { .. } | Error::Api { status: 404, .. })
    }

    /// Whether the same question may be answered a moment later, as when the coordinator restarts.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Error::Unreachable { .. } | Error::Api { status: 502..=504, .. })
    }

    /// An error for a file.
    pub(crate) fn file(path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Error {
        let path = path.into();
        move |source| Error::File { path, source }
    }
}
