//! The host as it reports itself: sysfs, libvirt, links and the pool put together.

use crate::config::Config;
use crate::drift::Drifts;
use crate::huge_pages::HugePages;
use crate::instances::Instances;
use crate::inventory::{assign_cpus, cpu_model, read_cells};
use crate::network::HostNetwork;
use crate::network::keeper::Keeper;
use crate::reservations::{Capacity, Reservations};
use crate::storage::Pool;
use godwit_protocol::error::{ErrorKind, RequestError};
use godwit_protocol::host::{Cell, Inventory};
use godwit_protocol::id::HostId;
use godwit_protocol::request::HostReport;
use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// How long a report waits for the pool's folder. The mount may be dead; the report must not be.
const POOL_PATIENCE: Duration = Duration::from_secs(2);

/// Everything a report is made of.
pub struct Host {
    /// Who.
    pub id: HostId,
    /// What the operator says of it.
    pub config: Config,
    /// Where streams of migrations are accepted.
    pub migration_listen: SocketAddr,
    /// What runs on it.
    pub instances: Instances,
    /// What is held on it.
    pub reservations: Arc<Reservations>,
    /// What is not where its reservation says.
    pub drifts: Arc<Drifts>,
    /// Who holds its huge pages.
    pub huge_pages: Arc<HugePages>,
    /// Its overlay.
    pub network: Arc<dyn HostNetwork>,
    /// What keeps it as it is wanted.
    pub keeper: Arc<Keeper>,
    /// Its storage.
    pub pool: Pool,
}

impl Host {
    /// What there is to hold, read anew.
    ///
    /// # Errors
    /// `Unavailable` when sysfs does not read.
    pub fn capacity(&self) -> Result<Capacity, RequestError> {
        let (mut cells, _) = configured_cells(&self.config)?;
        self.huge_pages.leave_guests_out(&mut cells);
        Ok(Capacity { cells, reserved_memory_bytes: self.config.reserved_memory_bytes })
    }

    /// The whole report; its generation is 0. It blocks, on a mount no longer than [`POOL_PATIENCE`].
    ///
    /// # Errors
    /// `Unavailable` while the host cannot be read whole.
    pub fn report(&self) -> Result<HostReport, RequestError> {
        let (hypervisor, instances) = self.instances.read()?;
        let Capacity { cells, reserved_memory_bytes } = self.capacity()?;
        let kernel = |name: &str| {
            let text = std::fs::read_to_string(format!("/proc/sys/kernel/{name}")).unwrap_or_default();
            text.trim().to_owned()
        };
        let inventory = Inventory {
            hostname: kernel("hostname"),
            agent_version: env!("CARGO_PKG_VERSION").to_owned(),
            kernel: kernel("osrelease"),
            architecture: std::env::consts::ARCH.to_owned(),
            cpu_model: cpu_model(Path::new("/")).map_err(unreadable)?,
            hypervisor,
            cells,
            reserved_memory_bytes,
            links: self.network.links()?,
            underlay: self.network.underlay()?,
            migration_address: Some(self.migration_listen),
            pools: vec![self.pool.report(POOL_PATIENCE)],
            physical_networks: self.network.physical_networks()?,
        };
        Ok(HostReport {
            host: self.id,
            generation: 0,
            inventory,
            instances,
            reservations: self.reservations.list(),
            beside: self.reservations.list_beside(),
            drifts: [self.drifts.list(), self.huge_pages.list()].concat(),
            networks: self.keeper.report()?,
        })
    }
}

/// The cells with the CPUs that the operator shares and dedicates, and those he named that are not online here.
///
/// # Errors
/// `Unavailable` when sysfs does not read.
pub fn configured_cells(config: &Config) -> Result<(Vec<Cell>, BTreeSet<u32>), RequestError> {
    let mut cells = read_cells(Path::new("/"), page_kib()).map_err(unreadable)?;
    let shared = config.shared_cpus.as_ref().map(|set| set.0.as_slice());
    let missing = assign_cpus(&mut cells, shared, &config.dedicated_cpus.0);
    Ok((cells, missing))
}

/// The kernel's ordinary page size in KiB.
pub fn page_kib() -> u64 {
    let bytes = nix::unistd::sysconf(nix::unistd::SysconfVar::PAGE_SIZE).ok().flatten();
    bytes.and_then(|b| u64::try_from(b).ok()).map_or(4, |b| b / 1024)
}

fn unreadable(error: crate::inventory::InventoryError) -> RequestError {
    RequestError::new(ErrorKind::Unavailable, godwit_protocol::error::chain(&error))
}
