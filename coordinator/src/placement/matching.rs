//! Which guest cell goes to which host cell, when each guest cell says which host cells could hold it alone.
//!
//! A maximum matching by augmenting paths over bitmasks. Host cells are offered one by one in an order of preference,
//! and one that was taken is never given up again, only passed on: such greed is exact, for the sets of host cells
//! that can be matched form a matroid. So the cells taken are the best ones by that order, and there is no guest that
//! fits and is not found.

use smallvec::SmallVec;

/// Guest cells that one matching takes at most.
pub(super) const MAX_CELLS: usize = 128;

/// For each guest cell the host cell that it gets.
pub(super) type HostOf = SmallVec<[Option<usize>; 8]>;

/// Guest cells and the host cells that could hold them.
pub(super) struct Matching {
    /// For each host cell, the guest cells that it could hold, one bit each.
    guests_of: SmallVec<[u128; 8]>,
    guests: usize,
}

impl Matching {
    /// For `guests` guest cells, at most [`MAX_CELLS`], and `hosts` host cells, of which none fits yet.
    pub(super) fn new(guests: usize, hosts: usize) -> Self {
        Self { guests_of: SmallVec::from_elem(0, hosts), guests }
    }

    /// That the host cell could hold the guest cell.
    pub(super) fn allow(&mut self, guest: usize, host: usize) {
        self.guests_of[host] |= 1 << guest;
    }

    /// That `guest` could be held wherever `twin` could be.
    pub(super) fn allow_as(&mut self, twin: usize, guest: usize) {
        for guests in &mut self.guests_of {
            *guests |= u128::from(*guests & (1 << twin) != 0) << guest;
        }
    }

    /// Whether the host cell could hold the guest cell.
    pub(super) fn is_allowed(&self, guest: usize, host: usize) -> bool {
        self.guests_of[host] & (1 << guest) != 0
    }

    /// Whether the host cell could hold any guest cell.
    pub(super) fn is_useful(&self, host: usize) -> bool {
        self.guests_of[host] != 0
    }

    /// For each guest cell the host cell it gets, when host cells are preferred in this order. As many guest cells
    /// as can have one get one; the order decides which host cells they are.
    pub(super) fn solve(&self, order: impl IntoIterator<Item = usize>) -> HostOf {
        let mut host_of = HostOf::from_elem(None, self.guests);
        let mut matched = 0;
        for host in order {
            if matched == self.guests {
                break;
            }
            let mut untried = u128::MAX;
            matched += usize::from(self.take(host, &mut untried, &mut host_of));
        }
        host_of
    }

    /// Gives the host cell to a guest cell, whose own then goes to another if need be. `untried` holds the guest
    /// cells that were not tried yet, so the depth is bounded by their number.
    fn take(&self, host: usize, untried: &mut u128, host_of: &mut [Option<usize>]) -> bool {
        loop {
            let open = self.guests_of[host] & *untried;
            if open == 0 {
                return false;
            }
            let guest = open.trailing_zeros() as usize;
            *untried &= !(1 << guest);
            if host_of[guest].is_none_or(|other| self.take(other, untried, host_of)) {
                host_of[guest] = Some(host);
                return true;
            }
        }
    }
}
