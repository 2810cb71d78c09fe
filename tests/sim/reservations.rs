//! The host's veto under stale plans: ten thousand of them from planners that see different pasts, while the process
//! that keeps the reservations is killed again and again. And a plan for a host that was another.

use crate::fleet::Fleet;
use godwit_agent::reservations::{Capacity, Reservations};
use godwit_coordinator::fleet::instance::InstanceStatus;
use godwit_protocol::host::{Cell, Cpu, PagePool};
use godwit_protocol::id::InstanceId;
use godwit_protocol::reservation::{Reservation, ReservedCell};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Plans in all.
const PLANS: usize = 10_000;

/// Planners, each with a view of its own.
const PLANNERS: usize = 8;

/// Cells of the host, and CPUs of each.
const CELLS: u32 = 2;
const CPUS: u32 = 16;

/// Pages of 2 MiB in each cell: fewer than the CPUs could use.
const PAGES: u64 = 24;

/// Tells the test's own program that it is to keep reservations in this folder.
const KEEPER: &str = "GODWIT_RESERVATION_KEEPER";

const THIS_TEST: &str = "reservations::stale_plans_and_kills_pin_no_cpu_twice_and_leave_nothing_held";

#[derive(Debug, Serialize, Deserialize)]
enum Ask {
    Reserve(Reservation),
    Release(InstanceId),
    List,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Answer {
    Done,
    Refused(String),
    Listed(Vec<Reservation>),
}

fn capacity() -> Capacity {
    let cpu = |id| Cpu { id, siblings: vec![id], ..Cpu::default() };
    let cell = |id: u32| Cell {
        id,
        cpus: (id * CPUS..(id + 1) * CPUS).map(cpu).collect(),
        memory_bytes: 1 << 30,
        page_pools: vec![
            PagePool { size_kib: 4, total: 1 << 17, taken: 0 },
            PagePool { size_kib: 2048, total: PAGES, taken: 0 },
        ],
        distances: BTreeMap::new(),
        shared_cpus: vec![],
        dedicated_cpus: (id * CPUS..(id + 1) * CPUS).collect(),
    };
    Capacity { cells: (0..CELLS).map(cell).collect(), reserved_memory_bytes: 0 }
}

/// The agent's store in a process of its own, which ends by being killed.
fn keep(folder: &Path) -> ! {
    set_pdeathsig(Signal::SIGKILL).unwrap();
    let reservations = Reservations::open(folder).unwrap();
    let socket = folder.join("keeper.sock");
    let _ = std::fs::remove_file(&socket);
    let listener = UnixListener::bind(&socket).unwrap();
    std::thread::scope(|scope| {
        loop {
            let (stream, _) = listener.accept().unwrap();
            let reservations = &reservations;
            scope.spawn(move || {
                let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
                while let Some(Ok(line)) = lines.next() {
                    let answer = answer(reservations, serde_json::from_str(&line).unwrap());
                    let answer = serde_json::to_string(&answer).unwrap();
                    if writeln!(&stream, "{answer}").is_err() {
                        return;
                    }
                }
            });
        }
    })
}

fn answer(reservations: &Reservations, ask: Ask) -> Answer {
    match ask {
        Ask::Reserve(reservation) => match reservations.reserve(&capacity(), reservation) {
            Ok(_) => Answer::Done,
            Err(error) => Answer::Refused(error.to_string()),
        },
        Ask::Release(instance) => {
            reservations.release(instance).unwrap();
            Answer::Done
        }
        Ask::List => Answer::Listed(reservations.list()),
    }
}

fn start_keeper(folder: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", THIS_TEST]).env(KEEPER, folder);
    command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
}

/// Numbers that look random, the same for the same seed (SplitMix64).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % bound
    }
}

/// Plans from what it last saw, and knows what it was promised.
struct Planner<'a> {
    folder: &'a Path,
    stream: Option<BufReader<UnixStream>>,
    random: Random,
    view: Vec<Reservation>,
    /// What was promised to it, and not given back.
    held: BTreeMap<InstanceId, Reservation>,
    refusals: usize,
}

impl Planner<'_> {
    /// Repeats the request until it is answered, over as many lives of the keeper as it takes; after each death it
    /// looks whether every promise was kept. `open` is the instance of the request that may have had its effect.
    fn ask(&mut self, ask: &Ask, open: Option<InstanceId>) -> Answer {
        loop {
            let connected = self.stream.is_some();
            match self.try_ask(ask) {
                Ok(answer) => return answer,
                Err(_) if !connected => std::thread::sleep(Duration::from_millis(1)),
                Err(_) => {}
            }
            self.stream = None;
            if let Ok(Answer::Listed(all)) = self.try_ask(&Ask::List) {
                self.look(&all, open);
            }
        }
    }

    fn try_ask(&mut self, ask: &Ask) -> io::Result<Answer> {
        if self.stream.is_none() {
            self.stream = Some(BufReader::new(UnixStream::connect(self.folder.join("keeper.sock"))?));
        }
        let stream = self.stream.as_mut().unwrap();
        writeln!(stream.get_mut(), "{}", serde_json::to_string(ask)?)?;
        let mut line = String::new();
        stream.read_line(&mut line)?;
        Ok(serde_json::from_str(&line)?)
    }

    /// Every promise is kept, and no CPU or page is held twice.
    fn look(&self, all: &[Reservation], open: Option<InstanceId>) {
        let mut cpus = BTreeSet::new();
        assert!(all.iter().flat_map(Reservation::pinned_cpus).all(|cpu| cpus.insert(cpu)), "{all:#?}");
        for cell in 0..CELLS {
            let here = all.iter().flat_map(|r| &r.cells).filter(|c| c.host == cell);
            let pages: u64 = here.map(|c| c.memory_bytes >> 21).sum();
            assert!(pages <= PAGES, "{pages} pages in cell {cell}");
        }
        for (instance, promised) in self.held.iter().filter(|(id, _)| Some(**id) != open) {
            let kept = all.iter().find(|r| r.instance == *instance);
            assert_eq!(kept, Some(promised), "a promise was broken");
        }
    }

    fn refresh(&mut self) {
        if let Answer::Listed(all) = self.ask(&Ask::List, None) {
            self.look(&all, None);
            self.view = all;
        }
    }

    /// One to four CPUs and pages of a cell that are free in the view.
    fn plan(&mut self) -> Option<Reservation> {
        let taken: BTreeSet<u32> = self.view.iter().flat_map(Reservation::pinned_cpus).collect();
        let host = self.random.below(u64::from(CELLS)) as u32;
        let vcpus = 1 + self.random.below(4) as u32;
        let free = (host * CPUS..(host + 1) * CPUS).filter(|cpu| !taken.contains(cpu));
        let pinning: BTreeMap<u32, u32> = (0..vcpus).zip(free).collect();
        if pinning.len() < vcpus as usize {
            return None;
        }
        let memory_bytes = (1 + self.random.below(3)) << 21;
        let cell = ReservedCell {
            guest: 0,
            host,
            shared_vcpus: vec![],
            pinning,
            memory_bytes,
            page_size_kib: Some(2048),
        };
        Some(Reservation {
            instance: InstanceId::random(),
            vcpus,
            memory_bytes,
            cells: vec![cell],
            emulator_cpus: vec![],
            idle_cpus: vec![],
        })
    }

    fn release_one(&mut self) -> bool {
        let Some(instance) = self.held.keys().next().copied() else { return false };
        assert_eq!(self.ask(&Ask::Release(instance), Some(instance)), Answer::Done);
        self.held.remove(&instance);
        true
    }

    fn run(mut self, asked: &AtomicUsize) -> usize {
        self.refresh();
        while asked.load(Ordering::Relaxed) < PLANS {
            let Some(plan) = self.plan() else {
                self.release_one();
                self.refresh();
                continue;
            };
            asked.fetch_add(1, Ordering::Relaxed);
            match self.ask(&Ask::Reserve(plan.clone()), Some(plan.instance)) {
                Answer::Done => {
                    self.view.push(plan.clone());
                    self.held.insert(plan.instance, plan);
                }
                Answer::Refused(_) => self.refusals += 1,
                Answer::Listed(_) => unreachable!("nobody asked for a list"),
            }
            // A planner looks seldom, so that most plans are made from a past.
            if self.random.below(8) == 0 {
                self.refresh();
            }
            if self.held.len() > 2 || self.random.below(3) == 0 {
                self.release_one();
            }
        }
        while self.release_one() {}
        self.refusals
    }
}

#[test]
fn stale_plans_and_kills_pin_no_cpu_twice_and_leave_nothing_held() {
    if let Some(folder) = std::env::var_os(KEEPER) {
        keep(Path::new(&folder));
    }
    let seed = u64::from(std::process::id());
    println!("seed {seed}");
    // Memory: a killed process leaves the same files there as on a disk, and sooner.
    let folder = tempfile::tempdir_in("/dev/shm").unwrap();
    let asked = AtomicUsize::new(0);
    let mut random = Random(seed);
    let mut keeper = start_keeper(folder.path());
    let mut kills = 0;
    let refusals: usize = std::thread::scope(|scope| {
        let planners: Vec<_> = (0..PLANNERS)
            .map(|number| {
                let planner = Planner {
                    folder: folder.path(),
                    stream: None,
                    random: Random(seed << 8 | number as u64),
                    view: vec![],
                    held: BTreeMap::new(),
                    refusals: 0,
                };
                let asked = &asked;
                scope.spawn(move || planner.run(asked))
            })
            .collect();
        while !planners.iter().all(std::thread::ScopedJoinHandle::is_finished) {
            std::thread::sleep(Duration::from_millis(5 + random.below(30)));
            keeper.kill().unwrap();
            keeper.wait().unwrap();
            kills += 1;
            keeper = start_keeper(folder.path());
        }
        planners.into_iter().map(|planner| planner.join().unwrap()).sum()
    });
    keeper.kill().unwrap();
    keeper.wait().unwrap();
    println!("{kills} kills, {refusals} of {} plans refused", asked.load(Ordering::Relaxed));
    assert_eq!(Reservations::open(folder.path()).unwrap().list(), [], "something is still held");
    assert!(kills > 3 && refusals > PLANS / 100, "{kills} kills, {refusals} refusals: nothing was tried");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_whose_cells_changed_refuses_the_old_plan_and_gets_a_new_one() {
    let fleet = Fleet::start(1).await;
    {
        let mut world = fleet.world.lock().unwrap();
        let next = world.generation + 1;
        world.hosts.values_mut().for_each(|held| held.cells_changed = Some(next));
    }
    let id = fleet.create(1).await;
    let instance = fleet.settled(id).await.unwrap();
    assert_eq!(instance.status, InstanceStatus::Active, "{:?}", instance.fault);
    let reserved = fleet.world.lock().unwrap().requests.iter().filter(|name| **name == "reserve").count();
    assert_eq!(reserved, 2, "the first plan was made from what is no more");
}
