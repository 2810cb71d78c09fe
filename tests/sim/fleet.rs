//! A coordinator with model hosts, a user, an image, a flavor and a network.

use crate::model::{self, SharedWorld};
use godwit_coordinator::agents::{self, Agents, key_digest};
use godwit_coordinator::app::{self, App, Shared};
use godwit_coordinator::ca::Ca;
use godwit_coordinator::config::Config;
use godwit_coordinator::fleet::Change;
use godwit_coordinator::fleet::host::Host;
use godwit_coordinator::fleet::image::{Image, ImageStatus, Visibility};
use godwit_coordinator::fleet::instance::{Flavor, Instance, NicRequest};
use godwit_coordinator::fleet::network::{Network, Subnet};
use godwit_coordinator::images::Images;
use godwit_coordinator::l2;
use godwit_coordinator::ledger::{Ledger, now};
use godwit_coordinator::operations::Operations;
use godwit_coordinator::operations::create_instance::{self, NewInstance};
use godwit_coordinator::store::StoreError;
use godwit_coordinator::tokens::Tokens;
use godwit_protocol::id::{HostId, ImageId, InstanceId, NetworkId, ProjectId, SubnetId, UserId};
use godwit_protocol::image::DiskFormat;
use godwit_protocol::quic::{COORDINATOR_NAME, Identity};
use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longest wait for anything.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running fleet.
pub(crate) struct Fleet {
    pub(crate) app: Shared,
    pub(crate) world: SharedWorld,
    pub(crate) user: UserId,
    project: ProjectId,
    image: ImageId,
    network: NetworkId,
    _folder: TempDir,
}

impl Fleet {
    /// A coordinator with so many hosts, all up.
    pub(crate) async fn start(hosts: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "url = \"https://127.0.0.1:8774\"\nlisten = \"127.0.0.1:8774\"\nagents_listen = \"127.0.0.1:0\"\n\
             pool = \"{}\"\nheartbeat_ms = 100\n",
            folder.path().display()
        );
        let config: Config = toml::from_str(&text).unwrap();
        let (ca_pem, ca_key) = Ca::create(now()).unwrap();
        let ca = Ca::from_pem(ca_pem, &ca_key).unwrap();
        let (chain, key) = ca.sign_coordinator(&[COORDINATOR_NAME.to_owned()], now()).unwrap();
        let identity = Identity::from_pem(&chain, &key, ca.pem()).unwrap();
        let app: Shared = Arc::new(App {
            ledger: Ledger::open(&folder.path().join("state.db")).unwrap(),
            agents: Agents::default(),
            operations: Operations::default(),
            l2: l2::Queue::default(),
            events: Default::default(),
            images: Images::new(&config.pool),
            tokens: Tokens::with_key([7; 32], Duration::from_secs(60)),
            ca,
            config,
        });
        let fleet = Self {
            app: app.clone(),
            world: SharedWorld::default(),
            user: UserId::random(),
            project: ProjectId::random(),
            image: ImageId::random(),
            network: NetworkId::random(),
            _folder: folder,
        };
        fleet.change(vec![fleet.image().into(), fleet.network().into(), fleet.subnet().into()]).await;
        let address = agents::serve(&app, &identity).unwrap();
        app::start(&app);
        for number in 1..=hosts {
            fleet.join(number as u64, address).await;
        }
        fleet.until("all hosts are placed upon", |f| f.hosts.values().all(|h| h.inventory.is_some())).await;
        fleet
    }

    async fn join(&self, number: u64, coordinator: SocketAddr) {
        let id = HostId::random();
        let key = rcgen::KeyPair::generate().unwrap();
        let csr = rcgen::CertificateParams::default().serialize_request(&key).unwrap().pem().unwrap();
        let chain = self.app.ca.sign_host(id, &csr, now()).unwrap().certificate;
        let identity = Identity::from_pem(&chain, &key.serialize_pem(), self.app.ca.pem()).unwrap();
        let host = Host {
            id,
            number,
            name: format!("h{number}"),
            enabled: true,
            disabled_reason: None,
            drain: None,
            inventory: None,
            joined_at: now(),
            key_digest: key_digest(&identity.leaf()).unwrap(),
        };
        self.change(vec![host.into()]).await;
        tokio::spawn(model::serve(id, identity, coordinator, self.world.clone()));
    }

    async fn change(&self, changes: Vec<Change>) {
        self.app.ledger.change(|_| Ok::<_, StoreError>((changes, ()))).await.unwrap();
    }

    /// Asks for an instance with a CPU of its own.
    pub(crate) async fn create(&self, vcpus: u32) -> InstanceId {
        self.create_on(vcpus, None).await
    }

    /// The same on a host.
    pub(crate) async fn create_on(&self, vcpus: u32, wanted_host: Option<HostId>) -> InstanceId {
        let new = NewInstance {
            name: "one".into(),
            description: None,
            project: self.project,
            user: self.user,
            flavor: flavor(vcpus, 1),
            image: self.image,
            nics: vec![NicRequest::Network(self.network, None)],
            security_groups: vec![],
            key: None,
            metadata: BTreeMap::new(),
            user_data: None,
            wanted_host,
            wanted_zone: None,
            hints: Default::default(),
        };
        create_instance::request(&self.app, new).await.unwrap()
    }

    /// An instance's record.
    pub(crate) fn instance(&self, id: InstanceId) -> Option<Instance> {
        self.app.ledger.read(|fleet| fleet.instances.get(&id).cloned())
    }

    /// The image's record goes.
    pub(crate) async fn delete_image(&self) {
        self.change(vec![Change::gone(&self.image())]).await;
    }

    /// Waits until nothing runs on an instance, and returns its record; none: it is gone.
    pub(crate) async fn settled(&self, id: InstanceId) -> Option<Instance> {
        self.until("its operation has ended", |f| f.running_operation(id).is_none()).await;
        self.instance(id)
    }

    /// Waits until the fleet is as it should be.
    pub(crate) async fn until(&self, what: &str, holds: impl Fn(&godwit_coordinator::fleet::Fleet) -> bool) {
        let start = Instant::now();
        while !self.app.ledger.read(&holds) {
            let requests = model::lock(&self.world).requests.clone();
            assert!(start.elapsed() < PATIENCE, "never: {what}; requests so far: {requests:?}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Waits until nothing is left on any host, and checks that nothing is left in the fleet.
    pub(crate) async fn clean(&self, told: &str) {
        self.until("no port is left", |f| f.ports.is_empty() && f.instances.is_empty()).await;
        let start = Instant::now();
        loop {
            let left = model::lock(&self.world).leftovers();
            if left.is_empty() {
                break;
            }
            assert!(start.elapsed() < PATIENCE, "{told}: left behind: {left:#?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        assert!(self.app.ledger.read(|f| f.operations.values().all(|o| !o.is_running())), "{told}");
    }

    fn image(&self) -> Image {
        Image {
            id: self.image,
            name: Some("tiny".into()),
            project: self.project,
            status: ImageStatus::Active,
            visibility: Visibility::Public,
            protected: false,
            hidden: false,
            disk_format: Some(DiskFormat::Qcow2),
            container_format: Some("bare".into()),
            size_bytes: Some(1 << 20),
            virtual_size_bytes: Some(1 << 20),
            md5: None,
            sha512: None,
            min_disk_gib: 0,
            min_memory_mib: 0,
            tags: vec![],
            properties: BTreeMap::new(),
            created_at: now(),
            updated_at: now(),
        }
    }

    fn network(&self) -> Network {
        Network {
            id: self.network,
            name: "blue".into(),
            description: String::new(),
            project: self.project,
            vni: 1001,
            port_security: true,
            segment: Default::default(),
            mtu: 1450,
            shared: true,
            admin_state_up: true,
            tags: vec![],
            generation: 1,
            revision: 1,
            created_at: now(),
            updated_at: now(),
        }
    }

    fn subnet(&self) -> Subnet {
        let address = |last| Ipv4Addr::new(10, 0, 0, last).into();
        Subnet {
            id: SubnetId::random(),
            network: self.network,
            name: String::new(),
            description: String::new(),
            project: self.project,
            cidr: "10.0.0.0/24".parse().unwrap(),
            gateway: Some(address(1)),
            pools: vec![(address(2), address(254))],
            dns: vec![],
            routes: vec![],
            dhcp: false,
            tags: vec![],
            revision: 1,
            created_at: now(),
            updated_at: now(),
        }
    }
}

/// A flavor with CPUs of its own, in one cell.
pub(crate) fn flavor(vcpus: u32, disk_gib: u64) -> Flavor {
    let specs = [("hw:cpu_policy", "dedicated"), ("hw:numa_nodes", "1")];
    Flavor {
        id: format!("pinned-{vcpus}-{disk_gib}"),
        name: format!("pinned-{vcpus}-{disk_gib}"),
        vcpus,
        memory_mib: 256,
        disk_gib,
        public: true,
        extra_specs: specs.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
        description: None,
    }
}
