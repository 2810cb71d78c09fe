//! `godwit-agent copy`: the copy engine as a command, without a daemon. What the agent's workers run is the same.

use super::choice::Method;
use super::copy::{self, CopyOrder, CopyReport, Options};
use super::image;
use super::kernel::IoClass;
use super::known;
use super::ordered::Checksum;
use super::worker::Reporter;
use godwit_protocol::error::RequestError;
use godwit_protocol::image::DiskFormat;
use std::fmt;
use std::io::{self, IsTerminal, Write};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

/// Exit statuses and the file's names, for `--help`.
pub const AFTER_HELP: &str = "\
The copy grows as DESTINATION.partial and gets its name when it is whole and on stable storage; a file that has the
name stays whole until then. A copy that was killed goes on where it was when the same command is given again.

The way is chosen for each pair of mounts: shared blocks (reflink) where the file system has them, else the file
server's own copy (NFS 4.2, SMB, Ceph), else io_uring or threads, whichever a short probe finds better. The report says
which it was and why.

Exit status: 0 copied, 1 failed, 2 wrong command line, 3 the bytes are not what they should be (a digest does not
match), 4 no space, 5 another copy to the same name is under way.

Examples:
  godwit-agent copy disk.raw /mnt/pool/disk.raw
  godwit-agent copy --to qcow2 --verify disk.raw disk.qcow2
  godwit-agent copy --from qcow2 --to raw --size 20G image.qcow2 disk.raw
  godwit-agent copy --digests --bandwidth 200M --polite disk.raw /mnt/backup/disk.raw";

/// What to copy, and how.
#[derive(Clone, Debug, clap::Args)]
pub struct CopyArgs {
    /// Regular file to copy
    pub(super) source: PathBuf,
    /// Name of the copy
    pub(super) destination: PathBuf,
    /// Format of the source, where it matters. Without it, a source that begins as qcow2 does is qcow2 when --to asks
    /// for a format
    #[arg(short = 'f', long, alias = "format", value_name = "FORMAT", value_parser = parse_format)]
    from: Option<DiskFormat>,
    /// Format of the copy: raw or qcow2. Without it the file's bytes are copied as they are. Backing files and external
    /// data files are refused, never followed
    #[arg(short = 'O', long, value_name = "FORMAT", value_parser = parse_format)]
    to: Option<DiskFormat>,
    /// Grow the disk to this size, such as 20G
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    size: Option<u64>,
    /// Take this way, or fail, instead of the best
    #[arg(long, value_enum, value_name = "METHOD")]
    method: Option<Method>,
    /// Read the copy again from its disk and compare it with what passed
    #[arg(long)]
    verify: bool,
    /// Leave the BLAKE3 digests of the copy's chunks in DESTINATION.blake3. Nothing is digested unless it is asked for,
    /// here or by --verify, --expect or a fresh list beside the source
    #[arg(long)]
    digests: bool,
    /// Compare the source with this list of digests; without it, with SOURCE.blake3 if that is about the file as it is
    #[arg(long, value_name = "FILE")]
    expect: Option<PathBuf>,
    /// Make these digests of the whole as the bytes pass: sha512, md5
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    checksum: Vec<Checksum>,
    /// Most bytes a second, such as 200M
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    bandwidth: Option<u64>,
    /// I/O priority of the copy
    #[arg(long, value_enum, value_name = "CLASS")]
    io_class: Option<IoClass>,
    /// Work on fewer chunks at a time while other work slows the mount down
    #[arg(long)]
    polite: bool,
    /// Fail where DESTINATION is there already
    #[arg(short = 'n', long)]
    no_clobber: bool,
    /// Begin anew whatever an earlier attempt left, and leave nothing to a later one
    #[arg(long)]
    no_resume: bool,
    /// Find the best loop for these mounts anew, with as few bytes as this copy has, whatever an earlier probe found
    #[arg(long, conflicts_with = "method")]
    probe: bool,
    /// Remember in FILE what probes of mounts found [default: copy.json under ~/.cache/godwit]
    #[arg(long, value_name = "FILE")]
    probes: Option<PathBuf>,
    /// Write progress and the result as JSON lines to this file descriptor
    #[arg(long, value_name = "FD")]
    pub(super) progress_fd: Option<u32>,
    /// Print the report as JSON
    #[arg(long)]
    pub(super) json: bool,
    /// Show no progress and print no report
    #[arg(short, long)]
    quiet: bool,
}

fn parse_format(text: &str) -> Result<DiskFormat, String> {
    [DiskFormat::Raw, DiskFormat::Qcow2]
        .into_iter()
        .find(|format| format.as_str() == text)
        .ok_or_else(|| "neither raw nor qcow2".to_owned())
}

/// A number of bytes, at least one: `4096`, `64K`, `1.5G`, `20GiB`.
pub(super) fn parse_bytes(text: &str) -> Result<u64, String> {
    let wrong = || "a number of bytes such as 4096, 64K, 200M or 1.5G".to_owned();
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let unit = unit.to_ascii_uppercase();
    let unit = unit.strip_suffix("IB").unwrap_or(unit.strip_suffix('B').unwrap_or(&unit));
    let shift = ["", "K", "M", "G", "T", "P"].iter().position(|known| *known == unit).ok_or_else(wrong)?;
    let factor = 1_u64 << (10 * shift);
    let bytes = match number.parse::<u64>() {
        Ok(whole) => whole.checked_mul(factor).ok_or_else(wrong)?,
        Err(_) => {
            let value = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
            if !value.is_finite() || value >= u64::MAX as f64 {
                return Err(wrong());
            }
            value as u64
        }
    };
    if bytes == 0 { Err(wrong()) } else { Ok(bytes) }
}

impl CopyArgs {
    /// What is asked for.
    pub(super) fn order(&self) -> CopyOrder {
        let guess = || {
            let qcow2 =
                self.to.is_some() && copy::open_source(&self.source).is_ok_and(|file| image::is_qcow2(&file));
            if qcow2 { DiskFormat::Qcow2 } else { DiskFormat::Raw }
        };
        let mode = std::fs::metadata(&self.source).map(|source| source.mode() & 0o777).ok();
        CopyOrder {
            source: self.source.clone(),
            destination: self.destination.clone(),
            format: self.from.unwrap_or_else(guess),
            size_bytes: self.size,
            options: Options {
                to: self.to,
                method: self.method,
                verify: self.verify,
                digests: self.digests,
                expect: self.expect.clone(),
                checksums: self.checksum.clone(),
                bandwidth_bytes: self.bandwidth,
                probe: self.probe,
                io_class: self.io_class,
                polite: self.polite,
                overwrite: !self.no_clobber,
                no_resume: self.no_resume,
                keep_partial: true,
                mode,
                known: self.probes.clone().or_else(known::user_file),
            },
        }
    }
}

/// Copies as a person asked on the command line.
pub fn run(args: &CopyArgs) -> ExitCode {
    let mut reporter = match Reporter::open(args.progress_fd) {
        Ok(reporter) => reporter,
        Err(error) => {
            eprintln!("godwit-agent: the descriptor of --progress-fd cannot be written: {error}");
            return ExitCode::from(2);
        }
    };
    let mut bar = Bar::new(!args.quiet && !args.json && args.progress_fd.is_none());
    let begun = Instant::now();
    let outcome = copy::copy(&args.order(), &mut |done, total| {
        reporter.progress(done, total);
        bar.show(done, total);
    });
    bar.clear();
    let code = outcome.as_ref().map_or_else(copy::CopyError::exit_code, |_| 0);
    let outcome = outcome.map_err(RequestError::from);
    match &outcome {
        Ok(report) if args.json => say(&serde_json::json!(report)),
        Ok(report) if !args.quiet => say(&sentence(report, begun.elapsed())),
        Ok(_) => {}
        Err(error) => {
            if args.json {
                say(&serde_json::json!({ "error": error }));
            }
            eprintln!("godwit-agent: {error}");
        }
    }
    reporter.finish(outcome);
    ExitCode::from(code)
}

/// Prints a line. Who was to read it may be gone; what was done is done.
pub fn say(line: &dyn fmt::Display) {
    let _ = writeln!(io::stdout(), "{line}");
}

/// A report for people.
fn sentence(report: &CopyReport, took: Duration) -> String {
    let mut text = format!("copied {} in {:.2} s", size(report.size_bytes), took.as_secs_f64());
    if report.method != Method::Reflink {
        text += &format!(", {} of it data", size(report.data_bytes));
    }
    if report.resumed_bytes > 0 {
        text += &format!(" beside {} of an earlier attempt", size(report.resumed_bytes));
    }
    text += &format!(", by {}: {}", report.method.as_str(), report.reason);
    if report.checked {
        text += "; the source has the digests that were known";
    }
    if report.verified {
        text += "; verified";
    }
    for (name, digest) in [("sha512", &report.sha512), ("md5", &report.md5)] {
        if let Some(digest) = digest {
            text += &format!("\n{name} {digest}");
        }
    }
    text
}

/// Bytes as people write them.
pub(super) fn size(bytes: u64) -> String {
    let units = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} bytes") } else { format!("{value:.1} {}", units[unit]) }
}

/// Least time between two pictures of the bar.
const SHOW_EVERY: Duration = Duration::from_millis(100);

/// A bar on the terminal that stderr is.
pub(super) struct Bar {
    begun: Instant,
    shown: Option<Instant>,
    active: bool,
}

impl Bar {
    /// A bar, where one is wanted and can be seen.
    pub(super) fn new(wanted: bool) -> Self {
        Self { begun: Instant::now(), shown: None, active: wanted && std::io::stderr().is_terminal() }
    }

    /// Shows how far it is, if that was not shown just now.
    pub(super) fn show(&mut self, done: u64, total: u64) {
        if !self.active || self.shown.is_some_and(|shown| shown.elapsed() < SHOW_EVERY) {
            return;
        }
        self.shown = Some(Instant::now());
        eprint!("\r{}\x1b[K", picture(done, total, self.begun.elapsed()));
    }

    /// Takes it away.
    pub(super) fn clear(&self) {
        if self.shown.is_some() {
            eprint!("\r\x1b[K");
        }
    }
}

/// The bar as text.
fn picture(done: u64, total: u64, elapsed: Duration) -> String {
    const WIDTH: usize = 30;
    let part = if total == 0 { 1.0 } else { done as f64 / total as f64 };
    let filled = (part * WIDTH as f64) as usize;
    let rate = done as f64 / elapsed.as_secs_f64().max(0.001);
    let left =
        if done == 0 { String::new() } else { format!(", {:.0} s left", (total - done) as f64 / rate) };
    format!(
        "[{}{}] {:>3.0} % of {}, {}/s{left}",
        "#".repeat(filled),
        "-".repeat(WIDTH - filled.min(WIDTH)),
        part * 100.0,
        size(total),
        size(rate as u64)
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("1", 1),
            ("4096", 4096),
            ("64K", 65_536),
            ("1.5G", 3 << 29),
            ("20GiB", 20 << 30),
            ("2mb", 2 << 20),
        ] {
            assert_eq!(parse_bytes(text), Ok(bytes), "{text}");
        }
        for text in ["", "0", "-1", "1X", "1.2.3", "G", "99999999999T", "1e9", "nan", "0.1"] {
            assert!(parse_bytes(text).is_err(), "{text}");
        }
    }

    #[test]
    fn the_bar_is_of_one_length_from_nothing_to_all() {
        let at = |done, total| picture(done, total, Duration::from_secs(2));
        for (done, total) in [(0, 0), (0, 9), (5, 9), (9, 9)] {
            assert_eq!(at(done, total).find(']'), Some(31), "{}", at(done, total));
        }
        assert!(at(1 << 20, 4 << 20).contains(" 25 % of 4.0 MiB, 512.0 KiB/s, 6 s left"));
    }
}
