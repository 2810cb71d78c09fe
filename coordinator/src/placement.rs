//! Placement: which host takes an instance, and exactly which cells, CPUs and pages of it.
//!
//! Pure: everything it knows comes in as arguments, the same arguments give the same answer, and nothing happens.
//! A placement is an answer; the reservation on the host is the fact.
//!
//! [`request`] resolves a flavor and an image, [`fit`] maps a guest's cells to a host's, [`search`] orders the
//! hosts, [`explain`] says why not. The rules are those of OpenStack Nova's hardware model (release 34).
//!
//! An instance without a NUMA topology floats: its [`Placement`] has no cells, its vCPUs float over all the
//! host's shared CPUs and its memory lies in any cell. It is counted against the host as a whole.

pub mod cell;
pub mod cpu_set;
pub mod explain;
pub mod fit;
pub mod guest;
pub mod host_view;
mod matching;
mod pinning;
mod prefer;
pub mod request;
pub mod search;
pub mod spec;
pub mod topology;

pub use explain::{HostRefusal, Refusal, Rule};
pub use fit::{Limits, Order};
pub use host_view::{HostState, HostView};
pub use pinning::Pinning;
pub use request::Request;
pub use search::{Placement, place};

#[cfg(test)]
mod tests;
