//! By which way the bytes go, and why. Pure.

use super::mounts::Mount;
use serde::{Deserialize, Serialize};

/// How the bytes come over.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "snake_case")]
#[value(rename_all = "snake_case")]
pub enum Method {
    /// Blocks are shared; nothing is read or written
    Reflink,
    /// The file server copies by itself (NFS 4.2, SMB, Ceph)
    ServerSide,
    /// io_uring on one thread, with registered buffers
    #[value(alias = "io-uring")]
    IoUring,
    /// A few threads that read and write
    Threads,
}

impl Method {
    /// Its name in reports and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reflink => "reflink",
            Self::ServerSide => "server_side",
            Self::IoUring => "io_uring",
            Self::Threads => "threads",
        }
    }
}

/// A loop and how many chunks it has under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Loop {
    pub(super) method: Method,
    pub(super) depth: usize,
}

/// For io_uring where nothing was measured. More chunks under way make no local disk quicker, and the kernel zeroes their
/// memory first (docs/decisions/0016).
pub(super) const RING: Loop = Loop { method: Method::IoUring, depth: 4 };

/// For threads where nothing was measured.
pub(super) const THREADS: Loop = Loop { method: Method::Threads, depth: 4 };

/// The deepest that is measured: what is far away may want more under way.
const DEEP_RING: Loop = Loop { method: Method::IoUring, depth: 16 };

/// What is measured against each other.
pub(super) const CANDIDATES: [Loop; 4] =
    [RING, DEEP_RING, THREADS, Loop { method: Method::Threads, depth: 2 }];

/// Most chunks that a loop which is measured has under way.
pub(super) const MOST_UNDER_WAY: usize = DEEP_RING.depth;

/// Data that each candidate moves in a probe, in bytes.
const PROBE_BYTES: u64 = 64 << 20;

/// The same for a copy of so many bytes of data: half of it at least goes by the best.
pub(super) fn probe_bytes(data_bytes: u64) -> u64 {
    PROBE_BYTES.min(data_bytes / (2 * CANDIDATES.len() as u64))
}

/// A smaller copy is not worth a ring.
pub(super) const SMALL_BYTES: u64 = 16 << 20;

/// A smaller copy is over before a probe has told anything.
const WORTH_A_PROBE_BYTES: u64 = 8 * PROBE_BYTES;

/// What the choice goes by.
#[derive(Clone, Debug)]
pub(super) struct Facts<'a> {
    /// What the user demands.
    pub(super) forced: Option<Method>,
    /// A probe is asked for, however few the bytes.
    pub(super) probe: bool,
    /// Digests of the whole are wanted.
    pub(super) ordered: bool,
    /// Parts of the source must be decoded.
    pub(super) encoded: bool,
    /// Each chunk is digested or summed as it passes.
    pub(super) summed: bool,
    /// The source's mount.
    pub(super) source: &'a Mount,
    /// The destination's mount.
    pub(super) target: &'a Mount,
    /// Bytes that the source's file takes on its disk.
    pub(super) data_bytes: u64,
    /// CPUs that this process may use.
    pub(super) cpus: usize,
    /// What an earlier probe of these mounts found.
    pub(super) known: Option<Loop>,
}

/// Which loop is to move the bytes, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Choice {
    /// This one.
    Use(Loop, &'static str),
    /// The one that a probe finds best.
    Probe,
}

/// The loop for bytes that must pass through this process.
pub(super) fn choose(facts: &Facts<'_>) -> Choice {
    let few = Loop { depth: facts.cpus.clamp(1, 4), ..THREADS };
    match facts.forced {
        Some(Method::IoUring) => {
            return Choice::Use(
                facts.known.filter(|known| known.method == RING.method).unwrap_or(RING),
                "asked for",
            );
        }
        Some(_) => {
            let known = facts.known.filter(|known| known.method == THREADS.method);
            return Choice::Use(known.unwrap_or(THREADS), "asked for");
        }
        None => {}
    }
    if facts.ordered {
        return Choice::Use(
            THREADS,
            "digests of the whole want the bytes in order, which a ring does not give",
        );
    }
    if facts.encoded {
        return Choice::Use(few, "compressed clusters are work for CPUs, not for the disk");
    }
    if facts.source.is_memory() && facts.target.is_memory() {
        if facts.summed {
            return Choice::Use(few, "both files are in memory, where there is no queue to fill");
        }
        let one = Loop { depth: 1, ..THREADS };
        return Choice::Use(
            one,
            "both files are in memory, where one thread is as quick and takes least CPU",
        );
    }
    if facts.data_bytes < SMALL_BYTES {
        return Choice::Use(Loop { depth: 1, ..THREADS }, "so few bytes are not worth a ring");
    }
    if let Some(known) = facts.known {
        return Choice::Use(known, "the best in an earlier probe of these mounts");
    }
    if facts.probe || facts.data_bytes >= WORTH_A_PROBE_BYTES {
        return Choice::Probe;
    }
    match facts.source.write_bytes().is_some() || facts.target.write_bytes().is_some() {
        true => Choice::Use(
            THREADS,
            "a network file system that was not probed yet, and too few bytes for a probe",
        ),
        false => Choice::Use(RING, "a local disk that was not probed yet, and too few bytes for a probe"),
    }
}

/// What a candidate needed for the same number of bytes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Measured {
    pub(super) candidate: Loop,
    pub(super) wall_s: f64,
    pub(super) cpu_s: f64,
}

/// Within this much of the quickest, the one that leaves most CPU to guests is the best.
const AS_QUICK: f64 = 1.1;

/// The best of a probe; none of nothing.
pub(super) fn best(measured: &[Measured]) -> Option<Loop> {
    let quickest = measured.iter().map(|one| one.wall_s).fold(f64::INFINITY, f64::min);
    let quick = measured.iter().filter(|one| one.wall_s <= quickest * AS_QUICK);
    quick.min_by(|a, b| a.cpu_s.total_cmp(&b.cpu_s)).map(|one| one.candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mount(kind: &str, options: &str) -> Mount {
        Mount::for_test(kind, options)
    }

    fn facts<'a>(source: &'a Mount, target: &'a Mount) -> Facts<'a> {
        Facts {
            forced: None,
            probe: false,
            ordered: false,
            encoded: false,
            summed: false,
            source,
            target,
            data_bytes: 10 << 30,
            cpus: 2,
            known: None,
        }
    }

    fn method(choice: &Choice) -> Option<Method> {
        match choice {
            Choice::Use(used, _) => Some(used.method),
            Choice::Probe => None,
        }
    }

    #[test]
    fn disks_and_shares_are_probed_once_and_memory_never() {
        let (disk, memory) = (mount("ext4", "rw"), mount("tmpfs", "rw"));
        assert_eq!(choose(&facts(&disk, &disk)), Choice::Probe);
        let plain = choose(&facts(&memory, &memory));
        assert!(matches!(plain, Choice::Use(Loop { method: Method::Threads, depth: 1 }, _)));
        let summed = choose(&Facts { summed: true, ..facts(&memory, &memory) });
        assert!(matches!(summed, Choice::Use(Loop { method: Method::Threads, depth: 2 }, _)));
        let known = DEEP_RING;
        let again = choose(&Facts { known: Some(known), ..facts(&disk, &disk) });
        assert!(matches!(again, Choice::Use(used, why) if used == known && why.contains("earlier")));
    }

    #[test]
    fn few_bytes_go_by_what_is_usual_for_the_mount() {
        let (disk, share) = (mount("xfs", "rw"), mount("nfs4", "rw,vers=4.2,wsize=1048576"));
        let some = |source, target| choose(&Facts { data_bytes: 100 << 20, ..facts(source, target) });
        assert_eq!(method(&some(&disk, &disk)), Some(Method::IoUring));
        assert_eq!(method(&some(&disk, &share)), Some(Method::Threads));
        let tiny = choose(&Facts { data_bytes: 1 << 20, ..facts(&disk, &disk) });
        assert!(matches!(tiny, Choice::Use(Loop { method: Method::Threads, depth: 1 }, _)));
    }

    #[test]
    fn a_probe_that_is_asked_for_is_made_of_what_there_is() {
        let share = mount("nfs4", "rw,vers=4.1,wsize=1048576");
        let asked = |data_bytes| choose(&Facts { probe: true, data_bytes, ..facts(&share, &share) });
        assert_eq!(asked(SMALL_BYTES), Choice::Probe);
        assert!(matches!(asked(SMALL_BYTES - 1), Choice::Use(_, why) if why.contains("so few bytes")));
        assert_eq!(probe_bytes(WORTH_A_PROBE_BYTES), PROBE_BYTES);
        assert_eq!(probe_bytes(1 << 40), PROBE_BYTES);
        assert_eq!(probe_bytes(SMALL_BYTES), 2 << 20);
    }

    #[test]
    fn what_is_asked_for_is_used_whatever_is_known() {
        let disk = mount("ext4", "rw");
        let known = DEEP_RING;
        let forced =
            |forced| choose(&Facts { forced: Some(forced), known: Some(known), ..facts(&disk, &disk) });
        assert_eq!(forced(Method::Threads), Choice::Use(THREADS, "asked for"));
        assert_eq!(forced(Method::IoUring), Choice::Use(known, "asked for"));
    }

    #[test]
    fn among_those_as_quick_the_one_that_takes_least_cpu_wins() {
        let one =
            |method, depth, wall_s, cpu_s| Measured { candidate: Loop { method, depth }, wall_s, cpu_s };
        let measured = [
            one(Method::IoUring, 4, 1.05, 0.1),
            one(Method::Threads, 4, 1.0, 0.4),
            one(Method::IoUring, 16, 1.5, 0.05),
        ];
        assert_eq!(best(&measured), Some(RING));
        assert_eq!(best(&[]), None);
    }
}
