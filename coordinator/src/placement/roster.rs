//! All hosts with what is held on them, so arranged that the best host for a request is found without a look at
//! each: a tree over the hosts, in which every node knows the most room that any host below it has.

use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use godwit_protocol::id::HostId;
use godwit_protocol::reservation::Reservation;

use super::cell::Cell;
use super::fit::{Limits, Order};
use super::host_view::HostView;
use super::reach::Reach;
use super::request::Request;
use super::search::{Choice, rank};

/// Kinds of hosts whose descriptions are shared; a fleet has few.
const KINDS: usize = 256;

/// The hosts of a fleet.
#[derive(Debug, Clone, Default)]
pub struct Roster {
    /// By name, then by id: a tie goes to the first.
    seats: Vec<Seat>,
    at: HashMap<HostId, usize>,
    /// A binary tree in an array: the children of node `n` are `2n` and `2n + 1`, the hosts are its last row.
    nodes: Vec<Node>,
    limits: Limits,
    kinds: Vec<Arc<[Cell]>>,
}

#[derive(Debug, Clone)]
struct Seat {
    view: HostView,
    /// The host's cells with nothing on them; hosts of one kind share them.
    empty: Arc<[Cell]>,
    /// Whether each CPU in use is held once.
    is_exact: bool,
}

impl Seat {
    fn hold(&mut self, reservation: &Reservation) {
        self.is_exact &= self.view.add(reservation);
    }

    /// Counts what is held anew.
    fn recount<'r>(&mut self, held: impl IntoIterator<Item = &'r Reservation>) {
        self.view.clear(&self.empty);
        self.is_exact = true;
        held.into_iter().for_each(|reservation| self.hold(reservation));
    }
}

/// The best of what is below.
#[derive(Debug, Clone, Copy)]
struct Node {
    reach: Reach,
    /// Lowest and highest rank for guests whose CPUs float, and for those whose CPUs are dedicated.
    floating: (u64, u64),
    pinned: (u64, u64),
}

impl Node {
    const NONE: (u64, u64) = (u64::MAX, 0);

    fn empty() -> Self {
        Self { reach: Reach::default(), floating: Self::NONE, pinned: Self::NONE }
    }

    fn of(host: &HostView, limits: &Limits) -> Self {
        let (floating, pinned) = (rank(host, false), rank(host, true));
        Self { reach: Reach::of_host(host, limits), floating: (floating, floating), pinned: (pinned, pinned) }
    }

    fn over(a: &Self, b: &Self) -> Self {
        let both = |a: (u64, u64), b: (u64, u64)| (a.0.min(b.0), a.1.max(b.1));
        Self {
            reach: a.reach.max(&b.reach),
            floating: both(a.floating, b.floating),
            pinned: both(a.pinned, b.pinned),
        }
    }

    /// The larger, the sooner it is looked at.
    fn promise(&self, pinned: bool, order: Order) -> u64 {
        let (lowest, highest) = if pinned { self.pinned } else { self.floating };
        match order {
            Order::Spread => highest,
            Order::Pack => !lowest,
        }
    }
}

impl Roster {
    /// A roster of these hosts, given with nothing counted in, and of what is held on each.
    pub fn new<'r>(
        views: impl IntoIterator<Item = (HostView, Vec<&'r Reservation>)>,
        limits: Limits,
    ) -> Self {
        let mut roster = Self { limits, ..Self::default() };
        for (view, held) in views {
            let seat = roster.seat(view, held);
            roster.seats.push(seat);
        }
        roster.seats.sort_by(|a, b| key(&a.view).cmp(&key(&b.view)));
        roster.arrange();
        roster
    }

    /// How many hosts there are.
    pub fn len(&self) -> usize {
        self.seats.len()
    }

    /// Whether there is no host.
    pub fn is_empty(&self) -> bool {
        self.seats.is_empty()
    }

    /// Every host, by name.
    pub fn views(&self) -> impl Iterator<Item = &HostView> {
        self.seats.iter().map(|seat| &seat.view)
    }

    /// The cells of each kind of host, with nothing on them; a kind may come more than once.
    pub(super) fn kinds(&self) -> impl Iterator<Item = &Arc<[Cell]>> {
        let mut last: Option<&Arc<[Cell]>> = None;
        let kinds = self.seats.iter().map(|seat| &seat.empty);
        kinds.filter(move |kind| last.replace(kind).is_none_or(|last| !Arc::ptr_eq(last, kind)))
    }

    /// One host.
    pub fn view(&self, host: HostId) -> Option<&HostView> {
        self.at.get(&host).map(|&at| &self.seats[at].view)
    }

    /// Overcommit that [`Self::find`] goes by.
    pub fn set_limits(&mut self, limits: Limits) {
        if self.limits != limits {
            self.limits = limits;
            self.arrange();
        }
    }

    /// The overcommit that it goes by.
    pub fn limits(&self) -> &Limits {
        &self.limits
    }

    /// A new host, or a changed one, with nothing counted in, and all that is held on it.
    pub fn put<'r>(&mut self, view: HostView, held: impl IntoIterator<Item = &'r Reservation>) {
        let id = view.id;
        let known = self.at.get(&id).copied().filter(|&at| self.seats[at].view.name == view.name);
        let seat = self.seat(view, held);
        match known {
            Some(at) => {
                self.seats[at] = seat;
                self.refresh(at);
            }
            None => {
                self.seats.retain(|seat| seat.view.id != id);
                let at = self.seats.partition_point(|other| key(&other.view) < key(&seat.view));
                self.seats.insert(at, seat);
                self.arrange();
            }
        }
    }

    /// A host is gone.
    pub fn remove(&mut self, host: HostId) {
        if self.at.contains_key(&host) {
            self.seats.retain(|seat| seat.view.id != host);
            self.arrange();
        }
    }

    /// Counts a reservation in.
    pub fn hold(&mut self, host: HostId, reservation: &Reservation) {
        let Some(&at) = self.at.get(&host) else { return };
        self.seats[at].hold(reservation);
        self.refresh(at);
    }

    /// A reservation that was counted in is held no more; `rest` tells all that still is. It is asked only where a CPU was
    /// held twice: to look up all of a host costs more than to place an instance.
    pub fn release<'r, I: IntoIterator<Item = &'r Reservation>>(
        &mut self,
        host: HostId,
        reservation: &Reservation,
        rest: impl FnOnce() -> I,
    ) {
        let Some(&at) = self.at.get(&host) else { return };
        let seat = &mut self.seats[at];
        if seat.is_exact {
            seat.view.take_off(reservation);
        } else {
            seat.recount(rest());
        }
        self.refresh(at);
    }

    /// Changes what is not about room: state, labels, disk.
    pub fn change(&mut self, host: HostId, change: impl FnOnce(&mut HostView)) {
        let Some(&at) = self.at.get(&host) else { return };
        change(&mut self.seats[at].view);
        self.refresh(at);
    }

    /// What `accept` makes of the first host that it accepts: hosts are offered in the order of
    /// [`place`](super::search::place), without those that cannot have room. Ties begin at a host that the seed chooses.
    pub fn find<T>(
        &self,
        request: &Request,
        choice: &Choice,
        mut accept: impl FnMut(&HostView) -> Option<T>,
    ) -> Option<T> {
        let need = Reach::of_request(request, choice.limits == self.limits);
        let pinned = request.pins();
        let row = self.nodes.len() / 2;
        let count = self.seats.len();
        let start = usize::try_from(choice.seed % (count.max(1) as u64)).unwrap_or(0);
        // How far the first host of a node lies behind the one where ties begin.
        let behind = |node: usize| {
            let depth = node.leading_zeros() - row.max(1).leading_zeros();
            let (first, width) = ((node << depth) - row, 1 << depth);
            if (first..first + width).contains(&start) {
                0
            } else {
                (first + count.max(start) - start) % count.max(1)
            }
        };
        let mut open = BinaryHeap::new();
        let offer = |open: &mut BinaryHeap<_>, node: usize| {
            if self.nodes[node].reach.covers(&need) {
                let promise = self.nodes[node].promise(pinned, choice.order);
                open.push((promise, std::cmp::Reverse((behind(node), node >= row)), node));
            }
        };
        if count > 0 {
            offer(&mut open, 1);
        }
        while let Some((_, _, node)) = open.pop() {
            if node < row {
                offer(&mut open, 2 * node);
                offer(&mut open, 2 * node + 1);
            } else if let Some(found) = accept(&self.seats[node - row].view) {
                return Some(found);
            }
        }
        None
    }

    fn seat<'r>(&mut self, view: HostView, held: impl IntoIterator<Item = &'r Reservation>) -> Seat {
        let empty = self.kind(&view.cells);
        let mut seat = Seat { view, empty, is_exact: true };
        seat.recount(held);
        seat
    }

    /// These cells as another host has them already, if one has.
    fn kind(&mut self, cells: &[Cell]) -> Arc<[Cell]> {
        if let Some(kind) = self.kinds.iter().find(|kind| kind[..] == *cells) {
            return kind.clone();
        }
        let kind: Arc<[Cell]> = cells.into();
        if self.kinds.len() < KINDS {
            self.kinds.push(kind.clone());
        }
        kind
    }

    fn arrange(&mut self) {
        self.at = self.seats.iter().enumerate().map(|(at, seat)| (seat.view.id, at)).collect();
        let row = self.seats.len().next_power_of_two();
        self.nodes = vec![Node::empty(); 2 * row];
        for (at, seat) in self.seats.iter().enumerate() {
            self.nodes[row + at] = Node::of(&seat.view, &self.limits);
        }
        for node in (1..row).rev() {
            self.nodes[node] = Node::over(&self.nodes[2 * node], &self.nodes[2 * node + 1]);
        }
    }

    fn refresh(&mut self, at: usize) {
        let mut node = self.nodes.len() / 2 + at;
        self.nodes[node] = Node::of(&self.seats[at].view, &self.limits);
        while node > 1 {
            node /= 2;
            self.nodes[node] = Node::over(&self.nodes[2 * node], &self.nodes[2 * node + 1]);
        }
    }
}

fn key(view: &HostView) -> (&str, HostId) {
    (&view.name, view.id)
}
