//! What a scrape of guests' whereabouts costs the agent, with so many real processes in the place of guests.
//!
//!     locality-cost GUESTS SCRAPES
//!
//! Each process has four threads that are called as QEMU calls its vCPUs, and memory. One JSON line is printed: the
//! CPU time of the agent's own collectors per scrape and per look for drifts, and the share of a core that they come
//! to with a scrape each 15 seconds and a look each 10.

use godwit_agent::drift::Drifts;
use godwit_agent::guest_process::GuestProcesses;
use godwit_agent::hypervisor::MemoryBinding;
use godwit_agent::hypervisor::domain_xml::domain_name;
use godwit_agent::hypervisor::fake::Fake;
use godwit_agent::locality::Locality;
use godwit_agent::reservations::{Capacity, Reservations};
use godwit_protocol::host::Cell;
use godwit_protocol::id::InstanceId;
use godwit_protocol::reservation::Reservation;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::Signal;
use nix::sys::time::TimeValLike;
use prometheus::Registry;
use prometheus::core::Collector;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;

/// vCPUs of each guest.
const VCPUS: u32 = 4;

/// Memory of each guest in bytes.
const MEMORY: usize = 16 << 20;

/// Seconds between scrapes, and between looks for drifts.
const SCRAPE_EVERY: f64 = 15.0;
const LOOK_EVERY: f64 = 10.0;

/// Ends its processes.
struct Guests(Vec<Child>);

impl Drop for Guests {
    fn drop(&mut self) {
        for guest in &mut self.0 {
            let _ = guest.kill();
        }
        for guest in &mut self.0 {
            let _ = guest.wait();
        }
    }
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize| arguments.get(at).and_then(|text| text.parse().ok());
    match (arguments.first().map(String::as_str), number(0), number(1)) {
        (Some("guest"), ..) => guest(),
        (_, Some(guests), Some(scrapes)) if guests > 0 && scrapes > 0 => measure(guests, scrapes),
        _ => {
            eprintln!("usage: locality-cost GUESTS SCRAPES");
            std::process::exit(2);
        }
    }
}

/// Stands for QEMU: threads that sleep, and memory that was written to. Ends with its parent.
fn guest() {
    set_pdeathsig(Signal::SIGKILL).expect("the kernel knows it");
    for vcpu in 0..VCPUS {
        let sleep = || loop {
            std::thread::park()
        };
        std::thread::Builder::new().name(format!("CPU {vcpu}/TCG")).spawn(sleep).expect("starts");
    }
    let memory = vec![1_u8; MEMORY];
    println!("{}", memory.len());
    loop {
        std::thread::park();
    }
}

fn measure(guests: usize, scrapes: usize) {
    let folder = tempfile::tempdir().expect("is made");
    let cells = godwit_agent::inventory::read_cells(Path::new("/"), 4).expect("this machine reads");
    // A host that has room for all of them.
    let roomy = |cell: &Cell| Cell {
        memory_bytes: 1 << 50,
        shared_cpus: (0..guests as u32).collect(),
        ..cell.clone()
    };
    let plenty: Vec<Cell> = cells.iter().map(roomy).collect();
    let capacity = Capacity { cells: plenty, reserved_memory_bytes: 0 };
    let reservations = Arc::new(Reservations::open(folder.path()).expect("opens"));
    let mut running = Guests(Vec::new());
    for _ in 0..guests {
        let instance = InstanceId::random();
        let reservation = Reservation {
            instance,
            vcpus: 1,
            memory_bytes: MEMORY as u64,
            cells: vec![],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        };
        reservations.reserve(&capacity, reservation).expect("there is room");
        running.0.push(start(folder.path(), instance));
    }
    let processes = GuestProcesses::new(Path::new("/proc"), folder.path());
    let told = cells.clone();
    let locality = Locality::new(reservations.clone(), processes.clone(), Arc::new(move || told.clone()));
    let locality = locality.expect("the names are right");
    let fake = Arc::new(Fake::new(Arc::default()));
    let drifts = Drifts::new(fake, reservations, processes, MemoryBinding::None, &Registry::new());
    let drifts = drifts.expect("the names are right");
    let scrape_ms = per_call(scrapes, || {
        let series: usize = locality.collect().iter().map(|family| family.get_metric().len()).sum();
        assert!(series >= guests, "{series} series of {guests} guests");
    });
    let look_ms = per_call(scrapes, || {
        drifts.check_threads(&cells);
    });
    let percent = (scrape_ms / SCRAPE_EVERY + look_ms / LOOK_EVERY) / 10.0;
    println!(
        "{}",
        serde_json::json!({
            "guests": guests, "vcpus": VCPUS, "scrape_cpu_ms": scrape_ms, "look_cpu_ms": look_ms,
            "core_percent": percent,
        })
    );
}

/// A process that is that instance's, ready.
fn start(folder: &Path, instance: InstanceId) -> Child {
    let mut command = Command::new(std::env::current_exe().expect("has a path"));
    command.args(["guest", &instance.to_string()]).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut child = command.spawn().expect("starts");
    let mut line = String::new();
    let stdout = child.stdout.take().expect("is piped");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(stdout), &mut line).expect("it is ready");
    let pid = folder.join(format!("{}.pid", domain_name(instance)));
    std::fs::write(pid, child.id().to_string()).expect("is written");
    child
}

/// CPU time of this process in milliseconds for each of so many calls.
fn per_call(calls: usize, mut call: impl FnMut()) -> f64 {
    let used_ms = || {
        let usage = getrusage(UsageWho::RUSAGE_SELF).expect("the kernel counts");
        (usage.user_time().num_microseconds() + usage.system_time().num_microseconds()) as f64 / 1000.0
    };
    let before = used_ms();
    (0..calls).for_each(|_| call());
    (used_ms() - before) / calls as f64
}
