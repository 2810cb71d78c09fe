//! What the programs of security groups count.

/// Counters of a port and direction, of one CPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Counts {
    /// Packets that no rule lets pass, as they would be on a wire.
    pub dropped: u64,
    /// Packets with cut or contradictory headers, which no rule can be about.
    pub malformed: u64,
    /// Connections that a rule let be opened.
    pub opened: u64,
    /// Questions by DHCP that the ring had no room for.
    pub lost: u64,
}

/// More counters of a port and direction, of one CPU: what connections without an entry have met.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[repr(C)]
pub struct Strays {
    /// Segments of TCP under way, as they would be on a wire, whose connection is not known: it was never allowed, or
    /// had to make place for others.
    pub segments: u64,
    /// Connections that could not be remembered.
    pub full: u64,
}

/// What became of entries of maps. Of connections, those that had to make place for others are [`Self::Opened`] and
/// [`Self::Carried`] without [`Self::Closed`], [`Self::Forgotten`] and those that are there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Entries {
    /// Connections that came.
    Opened = 0,
    /// Connections that programs removed.
    Closed = 1,
    /// First fragments that were remembered.
    Fragments = 2,
    /// Those that could not be.
    FragmentsFull = 3,
    /// Packets whose [`Counts`] had no room.
    CountsFull = 4,
    /// Packets whose [`Strays`] had no room.
    StraysFull = 5,
    /// Connections that the agent removed. Programs do not write this and what follows.
    Forgotten = 6,
    /// Connections that the agent brought from another table, or found when it began to count.
    Carried = 7,
    /// Connections that had made place for others when the agent last looked.
    Evicted = 8,
}

impl Entries {
    /// How many kinds there are.
    pub const KINDS: u32 = 9;
}
