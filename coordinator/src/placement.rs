//! Placement: which host takes an instance, and exactly which cells, CPUs and pages of it.
//!
//! Pure: everything it knows comes in as arguments, the same arguments give the same answer, and nothing happens.
//! A placement is an answer; the reservation on the host is the fact.
//!
//! [`request`] resolves a flavor and an image, [`fit`] maps a guest's cells to a host's, [`roster`] keeps the hosts
//! so that [`search`] finds the best without a look at each, [`terms`] are what is wanted beside room, and
//! [`explain`] says why not. The rules are those of OpenStack Nova's hardware model (release 34).
//!
//! An instance without a NUMA topology floats: its [`Placement`] has no cells, its vCPUs float over all the
//! host's shared CPUs and its memory lies in any cell. It is counted against the host as a whole.

mod bits;
pub mod cell;
pub mod cores;
pub mod cpu_set;
pub mod described;
pub mod distances;
pub mod explain;
pub mod fit;
pub mod guest;
pub mod host_view;
pub mod labels;
mod matching;
mod needs;
mod pairs;
mod pinning;
mod prefer;
mod reach;
pub mod request;
pub mod roster;
pub mod search;
pub mod simulate;
pub mod spec;
pub mod suggest;
pub mod terms;
pub mod topology;
mod values;

pub use explain::{HostRefusal, Refusal, Rule};
pub use fit::{Limits, Order};
pub use host_view::{HostState, HostView};
pub use pinning::{Pinning, Pins};
pub use request::Request;
pub use roster::Roster;
pub use search::{Choice, Placement, find, place};
pub use terms::{GroupPolicy, GroupTerms, Processor, Terms};

#[cfg(test)]
mod tests;
