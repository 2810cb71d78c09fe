//! The proof that an image which came from another host is the one that was uploaded: a worker process reads it once,
//! with all digests in the same pass, and then gives it its list of digests and its name. The connection has proved
//! each chunk to be what the sender read; this proves that the sender had the right image.

use super::copy::partial;
use super::digests::{self, Digest, Whole, beside, digest};
use super::ordered::{Checksum, Ordered};
use super::worker::{Lines, Next, live_with, reap};
use crate::hypervisor::Cancel;
use godwit_protocol::error::{ErrorKind, RequestError, chain};
use serde::{Deserialize, Serialize};
use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

/// Least time between two reports of progress.
const REPORT_EVERY: Duration = Duration::from_millis(250);

/// What is to be proved.
#[derive(Clone, Debug, clap::Args)]
pub struct Proof {
    /// What has come
    pub arrived: PathBuf,
    /// The name that it is to have
    pub image: PathBuf,
    /// Its size in bytes
    #[arg(long = "size")]
    pub size_bytes: u64,
    /// SHA-512 of the file, hexadecimal
    #[arg(long)]
    pub sha512: Option<String>,
    /// MD5 of the file, hexadecimal, to be noted beside it
    #[arg(long)]
    pub md5: Option<String>,
}

/// `worker prove`.
#[derive(Clone, Debug, clap::Args)]
pub struct WorkerArgs {
    #[command(flatten)]
    proof: Proof,
    /// Die with this process, which started the worker
    #[arg(long)]
    parent: u32,
}

/// A line of the worker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Said {
    /// It goes on.
    Progress { done_bytes: u64, total_bytes: u64 },
    /// The end.
    Finished(Result<(), RequestError>),
}

impl Said {
    fn say(&self) {
        // Nobody listens any more: the agent is gone, and this process goes with it.
        let _ = io::stdout().write_all(format!("{}\n", serde_json::json!(self)).as_bytes());
    }
}

/// Why an image does not get its name.
#[derive(Debug, thiserror::Error)]
enum ProofError {
    /// Nothing has come.
    #[error("the image has not come yet")]
    Away,
    /// It is another one. It is removed.
    #[error("what has come is not the image that was uploaded: {0}")]
    Wrong(String),
    /// The file system said no.
    #[error("cannot {action} {path}")]
    Io {
        action: &'static str,
        path: PathBuf,
        #[source]
        source: io::Error,
    },
}

impl From<ProofError> for RequestError {
    fn from(error: ProofError) -> Self {
        let kind = match &error {
            ProofError::Away => ErrorKind::Unavailable,
            ProofError::Wrong(_) => ErrorKind::Damaged,
            ProofError::Io { source, .. } if crate::storage::is_full(source) => ErrorKind::NoSpace,
            ProofError::Io { .. } => ErrorKind::Internal,
        };
        RequestError::new(kind, chain(&error))
    }
}

fn io_error(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ProofError {
    let path = path.to_owned();
    move |source| ProofError::Io { action, path, source }
}

/// The worker's side.
pub(super) fn run(args: &WorkerArgs) -> ExitCode {
    if !live_with(args.parent) {
        return ExitCode::FAILURE;
    }
    let mut last: Option<Instant> = None;
    let outcome = args.proof.prove(&mut |done_bytes, total_bytes| {
        if last.is_none_or(|last| last.elapsed() >= REPORT_EVERY) {
            last = Some(Instant::now());
            Said::Progress { done_bytes, total_bytes }.say();
        }
    });
    let proved = outcome.is_ok();
    Said::Finished(outcome.map_err(RequestError::from)).say();
    if proved { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

impl Proof {
    /// Proves in a worker of that program, and waits for it. Cancelled or killed, it is as if it had not begun.
    ///
    /// # Errors
    /// The worker's own; [`ErrorKind::Cancelled`]; [`ErrorKind::Internal`] when it does not start or dies.
    pub fn run(
        &self,
        program: &Path,
        progress: &mut dyn FnMut(u64, u64),
        cancel: &Cancel,
    ) -> Result<(), RequestError> {
        let mut command = Command::new(program);
        command.args(["worker", "prove", "--parent"]).arg(std::process::id().to_string());
        command.arg("--size").arg(self.size_bytes.to_string());
        for (name, value) in [("--sha512", &self.sha512), ("--md5", &self.md5)] {
            if let Some(value) = value {
                command.args([name, value]);
            }
        }
        command.arg("--").arg(&self.arrived).arg(&self.image);
        let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().map_err(internal)?;
        let Some(pipe) = child.stdout.take() else { return Err(internal("it has no output")) };
        let mut lines = Lines { pipe, pending: Vec::new() };
        let outcome = loop {
            if cancel.is_cancelled() {
                // It fails only when the worker is gone already.
                let _ = child.kill();
                break Some(Err(RequestError::new(ErrorKind::Cancelled, "the proof was cancelled")));
            }
            match lines.next() {
                Next::Nothing => {}
                Next::Line(Said::Progress { done_bytes, total_bytes }) => progress(done_bytes, total_bytes),
                Next::Line(Said::Finished(outcome)) => break Some(outcome),
                Next::End => break None,
            }
        };
        let status = reap(child, None, None);
        outcome.unwrap_or_else(|| Err(internal(format!("it died ({status})"))))
    }

    fn prove(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<(), ProofError> {
        let arrived = &self.arrived;
        let mut options = OpenOptions::new();
        let mut file = match options.read(true).custom_flags(libc::O_NOFOLLOW).open(arrived) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(ProofError::Away),
            Err(error) => return Err(io_error("open", arrived)(error)),
        };
        let chunks = self.read(&mut file, progress).inspect_err(|error| {
            if matches!(error, ProofError::Wrong(_)) {
                // The error itself is what is to be told; what stays is the older copy for the next attempt.
                let _ = fs::remove_file(arrived);
            }
        })?;
        file.set_permissions(Permissions::from_mode(0o644)).map_err(io_error("protect", arrived))?;
        file.sync_all().map_err(io_error("sync", arrived))?;
        self.publish(&file, &chunks)
    }

    /// The digests of all chunks, once the whole is what it should be.
    fn read(&self, file: &mut File, progress: &mut dyn FnMut(u64, u64)) -> Result<Vec<Digest>, ProofError> {
        let failed = |error| io_error("read", &self.arrived)(error);
        let is_bytes = file.metadata().map_err(failed)?.len();
        if is_bytes != self.size_bytes {
            return Err(ProofError::Wrong(format!("it has {is_bytes} bytes of {}", self.size_bytes)));
        }
        let wanted: &[Checksum] = if self.sha512.is_some() { &[Checksum::Sha512] } else { &[] };
        let whole = Ordered::new(wanted);
        let mut chunks = Vec::new();
        let mut chunk = vec![0; digests::DIGEST_CHUNK_BYTES];
        let mut at = 0;
        while at < self.size_bytes {
            let length = (self.size_bytes - at).min(chunk.len() as u64) as usize;
            let bytes = &mut chunk[..length];
            file.read_exact(bytes).map_err(failed)?;
            whole.pass(chunks.len() as u64, at, bytes);
            chunks.push(digest(bytes));
            at += length as u64;
            progress(at, self.size_bytes);
        }
        match whole.finish(self.size_bytes).sha512 == self.sha512 {
            true => Ok(chunks),
            false => Err(ProofError::Wrong("it does not have the image's sha512".to_owned())),
        }
    }

    /// The list first: an image without one is not checked where it is read.
    fn publish(&self, file: &File, chunks: &[Digest]) -> Result<(), ProofError> {
        let list = beside(&self.image);
        let growing = partial(&list);
        match fs::remove_file(&growing) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(io_error("remove", &growing)(error));
            }
            _ => {}
        }
        let about = file.metadata().map_err(io_error("look at", &self.arrived))?;
        let whole = Whole { sha512: self.sha512.clone(), md5: self.md5.clone() };
        let each = |offset: u64| {
            let chunk = chunks.get((offset / digests::DIGEST_CHUNK_BYTES as u64) as usize);
            chunk.copied().ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
        };
        digests::write(&growing, &about, &whole, each).map_err(io_error("write", &growing))?;
        fs::rename(&growing, &list).map_err(io_error("rename", &growing))?;
        fs::rename(&self.arrived, &self.image).map_err(io_error("rename", &self.arrived))?;
        let folder = self.image.parent().unwrap_or(Path::new("."));
        File::open(folder).and_then(|folder| folder.sync_all()).map_err(io_error("sync", folder))
    }
}

fn internal(why: impl std::fmt::Display) -> RequestError {
    RequestError::new(ErrorKind::Internal, format!("the worker that proves an image: {why}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datapath::digests::Digests;
    use sha2::{Digest as _, Sha512};

    fn arrived(folder: &Path, bytes: &[u8]) -> Proof {
        let proof = Proof {
            arrived: folder.join("image.incoming"),
            image: folder.join("image"),
            size_bytes: bytes.len() as u64,
            sha512: Some(hex::encode(Sha512::digest(bytes))),
            md5: Some("ab".into()),
        };
        fs::write(&proof.arrived, bytes).unwrap();
        proof
    }

    #[test]
    fn an_image_that_is_what_was_uploaded_gets_its_name_and_a_list_that_proves_it() {
        let folder = tempfile::tempdir().unwrap();
        for length in [0, 5, 1 << 20, (2 << 20) + 7] {
            let bytes: Vec<u8> = (0..length).map(|index| (index / 3) as u8).collect();
            let proof = arrived(folder.path(), &bytes);
            proof.prove(&mut |_, _| {}).unwrap();
            assert!(fs::read(&proof.image).unwrap() == bytes);
            let list = Digests::of_file(&proof.image, &File::open(&proof.image).unwrap()).unwrap();
            assert_eq!((&list.head.sha512, &list.head.md5), (&proof.sha512, &proof.md5));
            for (index, chunk) in bytes.chunks(1 << 20).enumerate() {
                assert_eq!(list.at((index as u64) << 20).unwrap(), digest(chunk));
            }
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 2, "the image and its list");
            assert!(matches!(proof.prove(&mut |_, _| {}), Err(ProofError::Away)));
        }
    }

    #[test]
    fn an_image_with_another_byte_or_end_gets_no_name_and_goes() {
        let folder = tempfile::tempdir().unwrap();
        let bytes = vec![7; (1 << 20) + 9];
        let mut flipped = bytes.clone();
        flipped[1 << 20] ^= 1;
        for wrong in [&flipped[..], &bytes[..1 << 20], &[&bytes[..], &[7]].concat()] {
            let proof = arrived(folder.path(), &bytes);
            fs::write(&proof.arrived, wrong).unwrap();
            assert!(matches!(proof.prove(&mut |_, _| {}), Err(ProofError::Wrong(_))));
            assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
        }
    }
}
