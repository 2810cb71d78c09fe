//! An instance as a server, in the fields of each microversion.

use super::{Asked, fraction_text};
use crate::api::attributes::time_text;
use crate::app::App;
use crate::fleet::Fleet;
use crate::fleet::host::Host;
use crate::fleet::instance::{Flavor, Instance, InstanceStatus, Task};
use crate::fleet::operation::Phase;
use crate::ledger::now;
use crate::liveness::{Liveness, judge};
use crate::operations::create_instance::hostname;
use godwit_protocol::id::HostId;
use godwit_protocol::instance::InstanceState;
use godwit_protocol::operation::Progress;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha224};
use std::time::Duration;

/// How much of a server is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// In a detailed list.
    Listed,
    /// By itself.
    Shown,
    /// In the answer to a change, which tells less before 2.75.
    Changed,
}

/// A host's state by its last sign of life.
pub(super) fn liveness(app: &App, fleet: &Fleet, host: HostId) -> Liveness {
    let seen_at = fleet.observed.get(&host).map(|o| o.seen_at);
    judge(now(), seen_at, Duration::from_millis(app.config.heartbeat_ms))
}

/// The zone that an instance is in, or is to be in.
pub(super) fn zone<'a>(fleet: &'a Fleet, instance: &'a Instance) -> &'a str {
    match instance.host {
        Some(host) => fleet.zone_of(host),
        None => instance.wanted_zone.as_deref().unwrap_or_default(),
    }
}

/// The status that users see.
pub(super) fn status(instance: &Instance) -> &'static str {
    match (instance.status, instance.task) {
        (InstanceStatus::Error, _) => "ERROR",
        (InstanceStatus::Building, _) => "BUILD",
        (_, Some(Task::Resetting)) => "HARD_REBOOT",
        (_, Some(Task::Rebooting)) => "REBOOT",
        (InstanceStatus::Active | InstanceStatus::Paused, Some(Task::Migrating)) => "MIGRATING",
        (_, Some(Task::ResizeReverting)) => "REVERT_RESIZE",
        (InstanceStatus::Resized, _) => "VERIFY_RESIZE",
        (_, Some(task)) if is_resizing(task) => "RESIZE",
        (InstanceStatus::Active, _) => "ACTIVE",
        (InstanceStatus::Paused, _) => "PAUSED",
        (InstanceStatus::Stopped, _) => "SHUTOFF",
    }
}

fn is_resizing(task: Task) -> bool {
    matches!(
        task,
        Task::ResizePreparing | Task::ResizeMigrating | Task::ResizeMigrated | Task::ResizeFinishing
    )
}

/// The state of the machine apart from what is being done with it.
pub(super) fn vm_state(instance: &Instance) -> &'static str {
    match instance.status {
        InstanceStatus::Building => "building",
        InstanceStatus::Active => "active",
        InstanceStatus::Paused => "paused",
        InstanceStatus::Stopped => "stopped",
        InstanceStatus::Resized => "resized",
        InstanceStatus::Error => "error",
    }
}

/// What is being done with it.
pub(super) fn task_state(instance: &Instance) -> Option<&'static str> {
    instance.task.map(|task| match task {
        Task::Placing => "scheduling",
        Task::Copying => "block_device_mapping",
        Task::Networking => "networking",
        Task::Spawning => "spawning",
        Task::Starting => "powering-on",
        Task::Stopping => "powering-off",
        Task::Rebooting => "rebooting",
        Task::Resetting => "rebooting_hard",
        Task::Pausing => "pausing",
        Task::Resuming => "unpausing",
        Task::Migrating => "migrating",
        Task::ResizePreparing => "resize_prep",
        Task::ResizeMigrating => "resize_migrating",
        Task::ResizeMigrated => "resize_migrated",
        Task::ResizeFinishing => "resize_finish",
        Task::ResizeReverting => "resize_reverting",
        Task::Deleting => "deleting",
    })
}

/// libvirt's state as a number.
pub(super) fn power_state(instance: &Instance) -> u8 {
    match instance.power {
        None | Some(InstanceState::Incoming) => 0,
        Some(InstanceState::Running) => 1,
        Some(InstanceState::Paused) => 3,
        Some(InstanceState::Stopped) => 4,
        Some(InstanceState::Crashed) => 6,
    }
}

/// A host for a project, so that users see which of their servers are together and nothing else.
pub(super) fn host_id(instance: &Instance, host: Option<&Host>) -> String {
    host.map(|host| hex::encode(Sha224::digest(format!("{}{}", instance.project, host.name))))
        .unwrap_or_default()
}

/// A server's own links.
pub(super) fn links(asked: &Asked, instance: &Instance) -> Value {
    json!([
        { "rel": "self", "href": asked.links.to(&format!("/compute/v2.1/servers/{}", instance.id)) },
        { "rel": "bookmark", "href": asked.links.to(&format!("/compute/servers/{}", instance.id)) },
    ])
}

/// A server in a short list.
pub(super) fn brief(asked: &Asked, instance: &Instance) -> Value {
    json!({ "id": instance.id, "name": instance.name, "links": links(asked, instance) })
}

/// Addresses by network; with their kind and MAC, or without.
pub(super) fn addresses(fleet: &Fleet, instance: &Instance, extended: bool) -> Value {
    let mut networks: Map<String, Value> = Map::new();
    for port in fleet.ports_of(instance.id) {
        let Some(network) = fleet.networks.get(&port.network) else { continue };
        let list = networks.entry(network.name.clone()).or_insert_with(|| json!([]));
        let Some(list) = list.as_array_mut() else { continue };
        list.extend(port.fixed_ips.iter().map(|ip| {
            let mut view = json!({ "addr": ip.address, "version": if ip.address.is_ipv4() { 4 } else { 6 } });
            if extended {
                view["OS-EXT-IPS:type"] = "fixed".into();
                view["OS-EXT-IPS-MAC:mac_addr"] = port.mac.to_string().into();
            }
            view
        }));
    }
    Value::Object(networks)
}

fn flavor(asked: &Asked, flavor: &Flavor) -> Value {
    if !asked.since(47) {
        let href = asked.links.to(&format!("/compute/flavors/{}", flavor.id));
        return json!({ "id": flavor.id, "links": [{ "rel": "bookmark", "href": href }] });
    }
    json!({
        "original_name": flavor.name,
        "vcpus": flavor.vcpus,
        "ram": flavor.memory_mib,
        "disk": flavor.disk_gib,
        "ephemeral": 0,
        "swap": 0,
        "extra_specs": flavor.extra_specs,
    })
}

/// How far it is with what is being done, in percent.
fn percent(app: &App, instance: &Instance) -> u64 {
    let (done, total) = match app.operations.progress(instance.id) {
        None => return 0,
        Some(Progress::Copy { done_bytes, total_bytes }) => (done_bytes, total_bytes),
        Some(Progress::Migration(p)) => {
            (p.memory_total_bytes.saturating_sub(p.memory_remaining_bytes), p.memory_total_bytes)
        }
    };
    (done.saturating_mul(100).checked_div(total)).unwrap_or(0).min(100)
}

fn fault(asked: &Asked, fleet: &Fleet, instance: &Instance) -> Option<Value> {
    let fault = instance.fault.as_ref().filter(|_| instance.status == InstanceStatus::Error)?;
    let mut view = json!({ "code": 500, "message": fault.message, "created": time_text(fault.at) });
    if asked.caller.is_admin() {
        let failed =
            fleet.operations.values().filter(|o| o.instance == instance.id && o.phase == Phase::Failed);
        let last = failed.max_by_key(|o| o.updated_at);
        let details = last.map(|o| format!("Operation {} ({}) failed and was undone.", o.id, o.verb.name()));
        view["details"] = details.unwrap_or_default().into();
    }
    Some(view)
}

/// A server in full.
pub(super) fn server(app: &App, fleet: &Fleet, asked: &Asked, instance: &Instance, kind: Kind) -> Value {
    let host = instance.host.and_then(|id| fleet.hosts.get(&id));
    let status = status(instance);
    let partly = kind == Kind::Changed && !asked.since(75);
    let image = instance.image.image;
    let image_href = asked.links.to(&format!("/compute/images/{image}"));
    let mut view = json!({
        "id": instance.id,
        "name": instance.name,
        "status": status,
        "tenant_id": instance.project,
        "user_id": instance.user,
        "metadata": instance.metadata,
        "hostId": host_id(instance, host),
        "image": { "id": image, "links": [{ "rel": "bookmark", "href": image_href }] },
        "flavor": flavor(asked, &instance.flavor),
        "created": time_text(instance.created_at),
        "updated": time_text(instance.updated_at),
        "addresses": addresses(fleet, instance, !partly),
        "accessIPv4": "",
        "accessIPv6": "",
        "links": links(asked, instance),
        "OS-DCF:diskConfig": "MANUAL",
    });
    let mut set = |key: &str, value: Value| view[key] = value;
    if matches!(status, "ACTIVE" | "BUILD" | "MIGRATING" | "RESIZE" | "VERIFY_RESIZE") {
        set("progress", percent(app, instance).into());
    }
    if let Some(fault) = fault(asked, fleet, instance) {
        set("fault", fault);
    }
    if asked.since(9) {
        set("locked", false.into());
    }
    if asked.since(19) {
        set("description", json!(instance.description));
    }
    if asked.since(26) {
        set("tags", json!([]));
    }
    if asked.since(63) {
        set("trusted_image_certificates", Value::Null);
    }
    if asked.since(71) && kind != Kind::Listed {
        set(
            "server_groups",
            json!(
                instance
                    .hints
                    .group
                    .filter(|g| fleet.server_groups.contains_key(g))
                    .into_iter()
                    .collect::<Vec<_>>()
            ),
        );
    }
    if asked.since(73) {
        set("locked_reason", Value::Null);
    }
    if partly {
        return view;
    }
    set("key_name", json!(instance.key.as_ref().map(|(name, _)| name)));
    set("config_drive", "True".into());
    set("os-extended-volumes:volumes_attached", json!([]));
    let groups = security_groups(fleet, instance);
    if !groups.is_empty() {
        set("security_groups", groups.into());
    }
    set("OS-EXT-AZ:availability_zone", zone(fleet, instance).into());
    set("OS-EXT-STS:vm_state", vm_state(instance).into());
    set("OS-EXT-STS:task_state", json!(task_state(instance)));
    set("OS-EXT-STS:power_state", power_state(instance).into());
    set("OS-SRV-USG:launched_at", json!(instance.launched_at.map(fraction_text)));
    set("OS-SRV-USG:terminated_at", Value::Null);
    if asked.caller.is_admin() {
        administrators_view(app, fleet, asked, instance, host, &mut view);
    }
    view
}

/// Names of the security groups of the instance's ports.
fn security_groups(fleet: &Fleet, instance: &Instance) -> Vec<Value> {
    let ports = fleet.ports_of(instance.id);
    let ids: std::collections::BTreeSet<_> =
        ports.into_iter().flat_map(|p| p.security_groups.iter().flatten()).collect();
    let groups = ids.into_iter().filter_map(|id| fleet.security_groups.get(id));
    groups.map(|group| json!({ "name": group.name })).collect()
}

fn administrators_view(
    app: &App,
    fleet: &Fleet,
    asked: &Asked,
    instance: &Instance,
    host: Option<&Host>,
    view: &mut Value,
) {
    let mut set = |key: &str, value: Value| view[key] = value;
    let name = host.map(|h| h.name.as_str());
    set("OS-EXT-SRV-ATTR:host", json!(name));
    set("OS-EXT-SRV-ATTR:hypervisor_hostname", json!(name));
    set("OS-EXT-SRV-ATTR:instance_name", format!("instance-{}", instance.id.short()).into());
    if asked.since(3) {
        set("OS-EXT-SRV-ATTR:hostname", hostname(&instance.name).into());
        set("OS-EXT-SRV-ATTR:reservation_id", Value::Null);
        set("OS-EXT-SRV-ATTR:launch_index", 0.into());
        set("OS-EXT-SRV-ATTR:kernel_id", "".into());
        set("OS-EXT-SRV-ATTR:ramdisk_id", "".into());
        set("OS-EXT-SRV-ATTR:root_device_name", "/dev/vda".into());
        set("OS-EXT-SRV-ATTR:user_data", json!(instance.user_data));
    }
    if asked.since(16) {
        let status = host.map_or("", |h| match (liveness(app, fleet, h.id), h.is_open()) {
            (Liveness::Up, true) => "UP",
            (Liveness::Up, false) => "MAINTENANCE",
            (Liveness::Late, _) => "UNKNOWN",
            (Liveness::Lost, _) => "DOWN",
        });
        set("host_status", status.into());
    }
}
