//! What copies: Godwit and its peers, as lines of sh that copy $1 to $2.

use std::path::Path;

/// What becomes of the bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// A raw disk of which half is data.
    Sparse,
    /// A raw disk that is all data.
    Full,
    /// A qcow2 image of which half is data becomes raw.
    FromQcow2,
    /// A raw disk of which half is data becomes qcow2.
    ToQcow2,
}

impl Task {
    pub(super) const ALL: [Task; 4] = [Task::Sparse, Task::Full, Task::FromQcow2, Task::ToQcow2];

    pub(super) fn name(self) -> &'static str {
        match self {
            Task::Sparse => "sparse",
            Task::Full => "full",
            Task::FromQcow2 => "qcow2-to-raw",
            Task::ToQcow2 => "raw-to-qcow2",
        }
    }

    /// Formats of source and copy.
    pub(super) fn formats(self) -> (&'static str, &'static str) {
        match self {
            Task::Sparse | Task::Full => ("raw", "raw"),
            Task::FromQcow2 => ("qcow2", "raw"),
            Task::ToQcow2 => ("raw", "qcow2"),
        }
    }
}

/// Something that copies.
#[derive(Debug, Clone)]
pub(super) struct Tool {
    pub(super) name: String,
    /// $1 is the source, $2 the copy, $3 the bytes of data.
    pub(super) line: String,
    /// It says what the disk can do, and makes no copy.
    pub(super) is_limit: bool,
}

impl Tool {
    fn new(name: &str, line: impl Into<String>) -> Self {
        Self { name: name.to_owned(), line: line.into(), is_limit: false }
    }
}

/// Godwit's own line. `extra` are options more.
pub(super) fn ours(programs: &Path, task: Task, extra: &str) -> Tool {
    let agent = programs.join("godwit-agent");
    let (from, to) = task.formats();
    let formats = if from == to { String::new() } else { format!("--from {from} --to {to}") };
    let line =
        format!("\"{}\" copy --quiet --probes \"$4\" {formats} {extra} \"$1\" \"$2\"", agent.display());
    Tool::new("godwit", line)
}

/// Whoever else can do the task. Their time ends with the copy on the disk: `sync` comes after those that do not do so
/// themselves.
pub(super) fn peers(task: Task, memory: bool) -> Vec<Tool> {
    let (from, to) = task.formats();
    let convert = format!("convert -f {from} -O {to} \"$1\" \"$2\" && sync \"$2\"");
    let mut tools = vec![
        Tool::new("qemu-img", format!("qemu-img {convert}")),
        Tool::new(
            "qemu-img -m16 -W none",
            format!(
                "qemu-img convert -m 16 -W -t none -T none -f {from} -O {to} \"$1\" \"$2\" && sync \"$2\""
            ),
        ),
    ];
    if from == "qcow2" {
        tools.push(Tool::new(
            "nbdcopy",
            "truncate -s \"$5\" \"$2\" && nbdcopy --flush -- [ qemu-nbd -r -f qcow2 \"$1\" ] \"$2\" && sync \"$2\"",
        ));
    }
    if from == to {
        tools.extend([
            Tool::new("cp --reflink=auto", "cp --reflink=auto \"$1\" \"$2\" && sync \"$2\""),
            Tool::new("cp --reflink=never", "cp --reflink=never \"$1\" \"$2\" && sync \"$2\""),
            Tool::new(
                "dd direct",
                "dd if=\"$1\" of=\"$2\" bs=1M iflag=direct oflag=direct conv=fsync,sparse status=none",
            ),
            Tool::new(
                "nbdcopy",
                "truncate -s \"$5\" \"$2\" && \
                 nbdcopy --flush -- [ nbdkit --exit-with-parent -r file \"$1\" ] \"$2\" && sync \"$2\"",
            ),
            Tool::new("rsync --sparse", "rsync --sparse --whole-file \"$1\" \"$2\" && sync \"$2\""),
        ]);
        let direct = if memory { "" } else { "--direct=1" };
        let limit = format!(
            "fio --output=/dev/null --ioengine=io_uring --iodepth=32 --bs=1M --size=\"$3\" {direct} \
             --name=read --rw=read --filename=\"$1\" --name=write --rw=write --filename=\"$2\" --end_fsync=1"
        );
        tools.push(Tool { is_limit: true, ..Tool::new("limit:fio", limit) });
    }
    tools
}
