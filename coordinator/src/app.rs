//! All parts of a running coordinator, as API handlers and operations get them.

use crate::agents::Agents;
use crate::config::Config;
use crate::images::Images;
use crate::ledger::Ledger;
use crate::operations::Operations;
use crate::tokens::Tokens;
use std::sync::Arc;

/// The running coordinator.
pub struct App {
    /// Settings.
    pub config: Config,
    /// State.
    pub ledger: Ledger,
    /// Channels to the hosts.
    pub agents: Agents,
    /// What is being done.
    pub operations: Operations,
    /// The images' bytes on the pool.
    pub images: Images,
    /// Users' tokens.
    pub tokens: Tokens,
    /// Certificates for joining hosts.
    pub ca: crate::ca::Ca,
}

/// How everybody holds it.
pub type Shared = Arc<App>;
