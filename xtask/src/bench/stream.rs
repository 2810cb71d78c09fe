//! A disk from one host to another: `godwit-agent stream` against scp, rsync, nbdcopy over TLS and socat, with iperf3 as
//! the link's limit. The hosts are two network namespaces with a link between them; the files are in memory, so that no
//! disk is the limit.
//!
//! The time goes from the sender's start to the moment at which the receiver has ended; each copy is compared with its
//! source before its time counts.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use super::record::{Metric, Record, cost};
use super::report::Report;
use super::scratch::{Scratch, Undo};
use super::{BenchError, Effort, children_cpu_s};
use crate::command;

const THROUGHPUT: Metric = Metric { name: "throughput_mib_s", less_is_better: false };
const CPU: Metric = cost("cpu_s");
const TOTAL: Metric = cost("total_ms");

/// The receiver's address in its namespace, and the sender's.
const ADDRESSES: [&str; 2] = ["198.18.255.1", "198.18.255.2"];
const PORT: u16 = 8777;
/// The receiver as a host of the fleet.
const HOST: &str = "6a8f1c1e-97d4-4c57-8f0a-2d5b3c1e9a70";

/// Data and holes take turns in steps of this size.
const EXTENT_BYTES: usize = 4 << 20;

/// How long a receiver may take to listen.
const LISTEN_WITHIN: Duration = Duration::from_secs(10);

/// What sends: lines of sh for both ends. $D: the folder of keys; $S: the source; $T: the copy; $A, $P: the receiver's
/// address and port; $N: connections; $B: bytes of the source.
struct Tool {
    name: &'static str,
    receiver: String,
    sender: String,
    is_limit: bool,
}

fn tool(name: &'static str, receiver: &str, sender: &str) -> Tool {
    Tool {
        name,
        receiver: receiver.to_owned(),
        sender: sender.to_owned(),
        is_limit: name.starts_with("limit:"),
    }
}

fn ours(programs: &Path) -> Tool {
    let agent = programs.join("godwit-agent");
    let agent = agent.display();
    Tool {
        name: "godwit",
        receiver: format!("'{agent}' stream receive -q --dir \"$D\" --token bench --listen $A:$P \"$T\""),
        sender: format!(
            "'{agent}' stream send -q --dir \"$D\" --token bench --to $A:$P --host {HOST} --connections $N \"$S\""
        ),
        is_limit: false,
    }
}

/// Encrypted ones first.
fn peers() -> Vec<Tool> {
    let ssh = "-i \"$D/ssh\" -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR";
    let sshd = "exec /usr/sbin/sshd -D -e -f /dev/null -p $P -h \"$D/ssh\" -o ListenAddress=$A -o PidFile=none \
                -o AuthorizedKeysFile=\"$D/ssh.pub\" -o StrictModes=no -o PermitRootLogin=yes -o UsePAM=no \
                -o Subsystem='sftp internal-sftp'";
    let tls = "cert=$D/identity/host.pem,key=$D/identity/host.key,cafile=$D/identity/ca.pem";
    vec![
        tool("scp", sshd, &format!("scp -q -P $P {ssh} \"$S\" root@$A:\"$T\"")),
        tool(
            "rsync over ssh",
            sshd,
            &format!("rsync --sparse --whole-file -e \"ssh -p $P {ssh}\" \"$S\" root@$A:\"$T\""),
        ),
        tool(
            "nbdcopy TLS",
            "truncate -s $B \"$T\" && exec nbdkit -f -i $A -p $P --tls=require --tls-verify-peer \
             --tls-certificates=\"$D/nbd\" file \"$T\"",
            "nbdcopy --flush --connections=$N \"$S\" \"nbds://$A:$P/?tls-certificates=$D/nbd\"",
        ),
        tool(
            "socat OpenSSL",
            &format!(
                "exec socat -u -b 1048576 OPENSSL-LISTEN:$P,bind=$A,reuseaddr,{tls} OPEN:\"$T\",creat,trunc"
            ),
            &format!("socat -u -b 1048576 FILE:\"$S\" OPENSSL:$A:$P,{tls}"),
        ),
        tool(
            "socat plain",
            "exec socat -u -b 1048576 TCP-LISTEN:$P,bind=$A,reuseaddr OPEN:\"$T\",creat,trunc",
            "socat -u -b 1048576 FILE:\"$S\" TCP:$A:$P",
        ),
        tool("limit:iperf3", "exec iperf3 -s -1 -B $A -p $P", "iperf3 -c $A -p $P -n $B -P $N"),
    ]
}

/// Ends what runs in two namespaces, and removes them.
const REMOVE_HOSTS: &str = "for name in \"$1\" \"$2\"; do \
    kill -9 $(ip netns pids \"$name\"); ip netns delete \"$name\"; \
done 2>/dev/null";

/// The two hosts. They go with it.
struct Hosts {
    names: [String; 2],
    _undo: Undo,
    /// Goes after them.
    scratch: Scratch,
}

impl Hosts {
    fn set_up() -> Result<Hosts, BenchError> {
        let id = std::process::id();
        let scratch = Scratch::new(format!("/dev/shm/godwit-bench-stream-{id}").into())?;
        let names = [format!("gwbench-{id}-a"), format!("gwbench-{id}-b")];
        let undo = Undo::by(REMOVE_HOSTS, &names)?;
        let hosts = Hosts { names, _undo: undo, scratch };
        let [sender, receiver] = &hosts.names;
        let ip = |line: &str| command::run(Command::new("ip").args(line.split(' ')));
        for name in &hosts.names {
            ip(&format!("netns add {name}"))?;
            ip(&format!("-n {name} link set lo up"))?;
        }
        ip(&format!("-n {sender} link add up0 type veth peer name up0 netns {receiver}"))?;
        for (name, address) in hosts.names.iter().zip(ADDRESSES) {
            ip(&format!("-n {name} address add {address}/30 dev up0"))?;
            ip(&format!("-n {name} link set up0 up"))?;
        }
        hosts.make_keys()?;
        Ok(hosts)
    }

    /// One CA for all who speak TLS, and a key for those who speak SSH.
    fn make_keys(&self) -> Result<(), BenchError> {
        let script = format!(
            "set -e; cd \"$1\"; mkdir identity nbd; cd identity
             openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout ../ca.key -out ca.pem \
                 -days 2 -subj /CN=bench -addext basicConstraints=critical,CA:TRUE
             openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -keyout host.key -out ../host.csr \
                 -subj /CN={receiver}
             printf 'subjectAltName=DNS:{HOST}.host.godwit,IP:{receiver},IP:{sender}\nbasicConstraints=CA:FALSE\n' > ../ext
             openssl x509 -req -in ../host.csr -CA ca.pem -CAkey ../ca.key -CAcreateserial -out host.pem -days 2 \
                 -extfile ../ext
             printf {HOST} > host.id
             for end in server client; do cp host.pem ../nbd/$end-cert.pem; cp host.key ../nbd/$end-key.pem; done
             cp ca.pem ../nbd/ca-cert.pem
             ssh-keygen -q -t ed25519 -N '' -f ../ssh; mkdir -p /run/sshd",
            sender = ADDRESSES[0],
            receiver = ADDRESSES[1],
        );
        let mut sh = Command::new("sh");
        sh.args(["-c", &script, "keys"])
            .arg(&self.scratch.folder)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        Ok(command::run(&mut sh)?)
    }

    fn inside(&self, host: usize, line: &str, run: &Run<'_>) -> Command {
        let mut inside = Command::new("ip");
        inside.args(["netns", "exec", &self.names[host], "sh", "-c", line]);
        inside
            .env("D", &self.scratch.folder)
            .env("S", run.source)
            .env("T", run.target)
            .env("A", ADDRESSES[1]);
        inside
            .env("P", PORT.to_string())
            .env("N", run.connections.to_string())
            .env("B", run.bytes.to_string());
        inside.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        inside
    }

    fn listens(&self) -> bool {
        let mut ss = Command::new("ip");
        ss.args(["netns", "exec", &self.names[1], "ss", "-Hltn", "sport", "=", &format!(":{PORT}")]);
        command::capture(&mut ss).is_ok_and(|text| !text.trim().is_empty())
    }
}

struct Run<'a> {
    case: &'a str,
    source: &'a Path,
    target: &'a Path,
    connections: usize,
    bytes: u64,
}

#[derive(Clone, Copy)]
struct Cost {
    wall_s: f64,
    cpu_s: f64,
}

/// A receiver, which ends with it.
struct Receiver(Child);

impl Drop for Receiver {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Receiver {
    /// Waits until it has ended, or ends it: servers of many do not end by themselves.
    fn end(mut self, by_itself: bool) -> Result<(), BenchError> {
        let failed = || BenchError::io("cannot end a receiver");
        let deadline = Instant::now() + LISTEN_WITHIN;
        while by_itself && Instant::now() < deadline {
            if self.0.try_wait().map_err(failed())?.is_some() {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

pub(super) fn measure(programs: &Path, effort: Effort<'_>, report: &mut Report) -> Result<(), BenchError> {
    let hosts = Hosts::set_up()?;
    let bytes: u64 = if effort.quick { 512 << 20 } else { 2 << 30 };
    for (task, step) in [("full", EXTENT_BYTES), ("sparse", 2 * EXTENT_BYTES)] {
        let (source, target) = (hosts.scratch.folder.join("source"), hosts.scratch.folder.join("copy"));
        let cases = [1, 4].map(|connections| (connections, format!("{task}-{connections}")));
        if !cases.iter().any(|(_, case)| effort.wants(case)) {
            continue;
        }
        write_source(&source, bytes, step)?;
        for (connections, case) in cases.into_iter().filter(|(_, case)| effort.wants(case)) {
            let run = Run { case: &case, source: &source, target: &target, connections, bytes };
            report.add(measure_case(&hosts, programs, effort, &run)?)?;
        }
        fs::remove_file(&source).map_err(BenchError::io("cannot remove the source"))?;
    }
    Ok(())
}

fn measure_case(
    hosts: &Hosts,
    programs: &Path,
    effort: Effort<'_>,
    run: &Run<'_>,
) -> Result<Vec<Record>, BenchError> {
    println!("bench: stream {}", run.case);
    let ours = ours(programs);
    let peers = peers();
    once(hosts, &ours, run)?;
    let mut records = Vec::new();
    let mut runs: Vec<(&Tool, Vec<Cost>)> = vec![(&ours, Vec::new())];
    for peer in &peers {
        match once(hosts, peer, run) {
            Ok(_) => runs.push((peer, Vec::new())),
            Err(error) => {
                let why = error.to_string();
                let skip = |metric| Record::skipped("stream", run.case, metric, peer.name, &why);
                records.extend([THROUGHPUT, CPU, TOTAL].map(skip));
            }
        }
    }
    for round in 0..effort.pairs() {
        let count = runs.len();
        for turn in 0..count {
            let (tool, costs) = &mut runs[(turn + round) % count];
            costs.push(once(hosts, tool, run)?);
        }
    }
    let mib = run.bytes as f64 / f64::from(1 << 20);
    let (_, mine) = &runs[0];
    for (peer, theirs) in &runs[1..] {
        let pairs = |value: &dyn Fn(&Cost) -> f64| -> Vec<(f64, f64)> {
            mine.iter().zip(theirs).map(|(mine, theirs)| (value(mine), value(theirs))).collect()
        };
        for (metric, pairs) in [
            (THROUGHPUT, pairs(&|cost| mib / cost.wall_s)),
            (CPU, pairs(&|cost| cost.cpu_s)),
            (TOTAL, pairs(&|cost| cost.wall_s * 1e3)),
        ] {
            records.push(Record::measured("stream", run.case, metric, peer.name, &pairs));
        }
    }
    Ok(records)
}

/// One disk, from one host to the other; compared, and removed.
fn once(hosts: &Hosts, tool: &Tool, run: &Run<'_>) -> Result<Cost, BenchError> {
    let failed = || BenchError::io(format!("{} does not start", tool.name));
    let before = children_cpu_s()?;
    let receiver = Receiver(hosts.inside(1, &tool.receiver, run).spawn().map_err(failed())?);
    let deadline = Instant::now() + LISTEN_WITHIN;
    while !hosts.listens() {
        if Instant::now() > deadline {
            let why = std::io::Error::other("nothing listens");
            return Err(failed()(why));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    let started = Instant::now();
    let sent = command::run(&mut hosts.inside(0, &tool.sender, run));
    let serves_many = tool.receiver.contains("sshd") || tool.receiver.contains("nbdkit");
    if sent.is_ok() && !serves_many {
        receiver.end(true)?;
    } else {
        drop(receiver);
    }
    let wall_s = started.elapsed().as_secs_f64();
    let cpu_s = children_cpu_s()? - before;
    let same = tool.is_limit
        || (sent.is_ok() && command::succeeds(Command::new("cmp").arg(run.source).arg(run.target)));
    for left in ["copy", "copy.partial", "copy.partial.journal"] {
        match fs::remove_file(hosts.scratch.folder.join(left)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(BenchError::io("cannot remove a copy")(error));
            }
            _ => {}
        }
    }
    sent?;
    match same {
        true => Ok(Cost { wall_s, cpu_s }),
        false => Err(BenchError::Wrong { case: run.case.to_owned(), tool: tool.name.to_owned() }),
    }
}

/// Random data, with holes in turns where `step` is more than an extent.
fn write_source(path: &Path, bytes: u64, step: usize) -> Result<(), BenchError> {
    let failed = || BenchError::io(format!("cannot write {}", path.display()));
    let mut random = File::open("/dev/urandom").map_err(failed())?;
    let mut file = File::create(path).map_err(failed())?;
    file.set_len(bytes).map_err(failed())?;
    let mut data = vec![0; EXTENT_BYTES];
    for offset in (0..bytes).step_by(step) {
        random.read_exact(&mut data).map_err(failed())?;
        file.write_all_at(&data, offset).map_err(failed())?;
    }
    file.flush().map_err(failed())
}
