//! The compute API through the router: the fields of each microversion against lists written by hand from the
//! published API reference, and what is made of requests.

mod fields;
mod groups;
mod requests;
mod resizes;

use crate::api::testing::{Answer, Api, As};
use crate::error::Error;
use crate::fleet::host::Host;
use crate::fleet::image::{Image, ImageStatus, Visibility};
use crate::fleet::instance::{Flavor, Instance, InstanceStatus};
use crate::fleet::migration::{Migration, MigrationKind, MigrationStatus};
use crate::fleet::network::{FixedIp, Network, Port, Subnet};
use crate::fleet::operation::{Operation, Phase, Verb};
use crate::fleet::{Change, Time};
use axum::http::Method;
use godwit_protocol::host::{Cell, Cpu, HypervisorInfo, Inventory, PoolReport, Underlay};
use godwit_protocol::id::{
    HostId, ImageId, InstanceId, MigrationId, NetworkId, OperationId, PortId, SubnetId,
};
use godwit_protocol::image::{DiskFormat, ImageSource};
use godwit_protocol::instance::InstanceState;
use serde_json::Value;
use std::collections::BTreeMap;

const GIB: u64 = 1 << 30;

/// One host with one active instance of the administrator's, in a network with a port.
pub(in crate::api) struct Scene {
    pub(in crate::api) api: Api,
    pub(in crate::api) host: HostId,
    pub(in crate::api) image: ImageId,
    pub(in crate::api) network: NetworkId,
    pub(in crate::api) subnet: SubnetId,
    pub(in crate::api) instance: InstanceId,
}

impl Scene {
    pub(in crate::api) async fn new() -> Self {
        let api = Api::new().await;
        let scene = Self {
            host: HostId::random(),
            image: ImageId::random(),
            network: NetworkId::random(),
            subnet: SubnetId::random(),
            instance: InstanceId::random(),
            api,
        };
        let changes = vec![
            scene.a_host().into(),
            scene.an_image().into(),
            a_flavor().into(),
            scene.a_network().into(),
            scene.a_subnet().into(),
            scene.a_port().into(),
            scene.an_instance().into(),
        ];
        scene.apply(changes).await;
        scene
    }

    pub(in crate::api) async fn apply(&self, changes: Vec<Change>) {
        self.api.app.ledger.change::<_, Error>(|_| Ok((changes, ()))).await.unwrap();
    }

    /// A request as the administrator in a microversion.
    async fn ask(&self, minor: u32, method: Method, path: &str, body: Value) -> Answer {
        self.ask_as(As::Admin, minor, method, path, body).await
    }

    async fn ask_as(&self, who: As, minor: u32, method: Method, path: &str, body: Value) -> Answer {
        let version = format!("compute 2.{minor}");
        let path = format!("/compute/v2.1{path}");
        self.api.ask(who, method, &path, &[("openstack-api-version", &version)], body).await
    }

    /// GET as the administrator; the answer's JSON.
    async fn get(&self, minor: u32, path: &str) -> Value {
        let answer = self.ask(minor, Method::GET, path, Value::Null).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json()
    }

    async fn post(&self, minor: u32, path: &str, body: Value) -> Answer {
        self.ask(minor, Method::POST, path, body).await
    }

    fn a_host(&self) -> Host {
        let cpu = |id: u32| Cpu {
            id,
            package: 0,
            die: 0,
            core: i64::from(id / 2),
            siblings: vec![id & !1, id | 1],
            ..Cpu::default()
        };
        let cell = Cell {
            id: 0,
            cpus: (0..4).map(cpu).collect(),
            memory_bytes: 8 * GIB,
            page_pools: vec![],
            distances: BTreeMap::new(),
            shared_cpus: vec![0, 1],
            dedicated_cpus: vec![2, 3],
        };
        let inventory = Inventory {
            hostname: "h1".into(),
            agent_version: "0.1.0".into(),
            kernel: "6.12".into(),
            architecture: "x86_64".into(),
            cpu_model: "Some CPU".into(),
            hypervisor: HypervisorInfo {
                kind: "QEMU".into(),
                libvirt_version: "11.3.0".into(),
                version: "10.0.2".into(),
                kvm: false,
            },
            cells: vec![cell],
            reserved_memory_bytes: GIB / 2,
            links: vec![],
            underlay: Underlay { link: "eth0".into(), address: "198.18.0.11".parse().unwrap(), mtu: 1500 },
            migration_address: None,
            physical_networks: vec![],
            pools: vec![PoolReport {
                name: "pool".into(),
                path: "/srv/godwit".into(),
                total_bytes: 100 * GIB,
                free_bytes: 60 * GIB,
                reachable: true,
                ..PoolReport::default()
            }],
        };
        Host {
            id: self.host,
            number: 1,
            name: "h1".into(),
            enabled: true,
            disabled_reason: None,
            drain: None,
            inventory: Some(inventory),
            joined_at: Time::UNIX_EPOCH,
            key_digest: String::new(),
        }
    }

    fn an_image(&self) -> Image {
        Image {
            id: self.image,
            name: Some("cirros".into()),
            project: self.api.admin.1,
            status: ImageStatus::Active,
            visibility: Visibility::Public,
            protected: false,
            hidden: false,
            disk_format: Some(DiskFormat::Qcow2),
            container_format: Some("bare".into()),
            size_bytes: Some(1 << 20),
            virtual_size_bytes: Some(1 << 24),
            md5: None,
            sha512: None,
            min_disk_gib: 0,
            min_memory_mib: 0,
            tags: vec![],
            properties: BTreeMap::new(),
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn a_network(&self) -> Network {
        Network {
            id: self.network,
            name: "net1".into(),
            description: String::new(),
            project: self.api.admin.1,
            vni: 1001,
            port_security: true,
            segment: Default::default(),
            mtu: 1450,
            shared: false,
            admin_state_up: true,
            tags: vec![],
            generation: 1,
            revision: 1,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn a_subnet(&self) -> Subnet {
        let ip = |text: &str| text.parse().unwrap();
        Subnet {
            id: self.subnet,
            network: self.network,
            name: "sub1".into(),
            description: String::new(),
            project: self.api.admin.1,
            cidr: "10.0.0.0/24".parse().unwrap(),
            gateway: Some(ip("10.0.0.1")),
            pools: vec![(ip("10.0.0.2"), ip("10.0.0.254"))],
            dns: vec![],
            routes: vec![],
            dhcp: false,
            tags: vec![],
            revision: 1,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn a_port(&self) -> Port {
        Port {
            id: PortId::random(),
            network: self.network,
            name: String::new(),
            description: String::new(),
            project: self.api.admin.1,
            mac: "fa:16:3e:00:00:05".parse().unwrap(),
            fixed_ips: vec![FixedIp { subnet: self.subnet, address: "10.0.0.5".parse().unwrap() }],
            instance: Some(self.instance),
            device_id: self.instance.to_string(),
            device_owner: "compute:nova".into(),
            index: 0,
            owned_by_instance: true,
            host: Some(self.host),
            target_host: None,
            admin_state_up: true,
            port_security: true,
            allowed_pairs: Vec::new(),
            security_groups: None,
            tags: vec![],
            revision: 1,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn an_instance(&self) -> Instance {
        Instance {
            id: self.instance,
            name: "web".into(),
            description: None,
            project: self.api.admin.1,
            user: self.api.admin.0,
            flavor: a_flavor().into(),
            image: ImageSource {
                image: self.image,
                format: DiskFormat::Qcow2,
                size_bytes: 1 << 20,
                virtual_size_bytes: 1 << 24,
            },
            image_properties: BTreeMap::new(),
            disk_bytes: GIB,
            disk_format: None,
            topology: None,
            nics: vec![],
            security_groups: vec![],
            key: None,
            metadata: BTreeMap::new(),
            user_data: None,
            wanted_host: None,
            wanted_zone: None,
            hints: Default::default(),
            refused_by: vec![],
            status: InstanceStatus::Active,
            task: None,
            fault: None,
            host: Some(self.host),
            reservation: None,
            power: Some(InstanceState::Running),
            delete_wanted: false,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
            launched_at: Some(Time::UNIX_EPOCH),
        }
    }

    fn a_migration(&self, number: u64, status: MigrationStatus) -> Migration {
        Migration {
            id: MigrationId::random(),
            number,
            kind: MigrationKind::Live,
            resize: None,
            instance: self.instance,
            project: self.api.admin.1,
            user: self.api.admin.0,
            source: self.host,
            wanted_target: None,
            refused_by: vec![],
            target: None,
            reservation: None,
            ready: None,
            disk_moves: false,
            status,
            outcome: None,
            switched_at: None,
            error: None,
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }

    fn an_operation(&self, verb: Verb, phase: Phase, error: Option<&str>) -> Operation {
        Operation {
            id: OperationId::random(),
            verb,
            instance: self.instance,
            phase,
            cursor: 0,
            step: String::new(),
            cancel: false,
            error: error.map(str::to_owned),
            created_at: Time::UNIX_EPOCH,
            updated_at: Time::UNIX_EPOCH,
        }
    }
}

fn a_flavor() -> Flavor {
    Flavor {
        id: "1".into(),
        name: "m1.tiny".into(),
        vcpus: 1,
        memory_mib: 512,
        disk_gib: 1,
        public: true,
        extra_specs: BTreeMap::from([("hw:numa_nodes".to_owned(), "1".to_owned())]),
        description: None,
    }
}
