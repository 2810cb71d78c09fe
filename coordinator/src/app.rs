//! All parts of a running coordinator, as API handlers and operations get them.

use crate::agents::Agents;
use crate::ca::Ca;
use crate::config::Config;
use crate::drain;
use crate::events::Events;
use crate::images::{self, Images};
use crate::l2;
use crate::ledger::Ledger;
use crate::operations::{self, Operations};
use crate::tokens::Tokens;
use godwit_protocol::id::NetworkId;
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
    /// Networks whose hosts are to be told.
    pub l2: l2::Queue,
    /// What hosts told of rare things.
    pub events: Events,
    /// The images' bytes on the pool.
    pub images: Images,
    /// Users' tokens.
    pub tokens: Tokens,
    /// Certificates for joining hosts.
    pub ca: Ca,
}

/// How everybody holds it.
pub type Shared = Arc<App>;

impl App {
    /// That hosts must be told about a network.
    pub fn l2_changed(&self, network: NetworkId) {
        self.l2.push(network);
    }
}

/// Starts what runs by itself: forwarding, drains of hosts, the removal of images' copies, the operations that an earlier life left unfinished, and the
/// confirmation of resizes that nobody decides about.
pub fn start(app: &Shared) {
    app.ledger.observe(|fleet| fleet.set_limits(operations::place::limits(&app.config)));
    tokio::spawn(l2::run(app.clone()));
    tokio::spawn(drain::run(app.clone()));
    tokio::spawn(images::copies::run(app.clone()));
    operations::resume(app);
    tokio::spawn(operations::confirm_resize::run_window(app.clone()));
}
