//! Create an instance: place and reserve, ports, disk, networks on the host, define, start. A failure undoes
//! backwards, and the instance is in error with the reason; nothing else is left.

use super::reserve::{Verdict, generation, hold};
use super::{Context, StepError, bring_image, delete_instance, in_error, journal, place, spawn};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::image::{Image, ImageStatus};
use crate::fleet::instance::{Flavor, Hints, Instance, InstanceStatus, NicRequest, Task};
use crate::fleet::network::Port;
use crate::fleet::operation::{Operation, Verb};
use crate::fleet::{Change, Fleet};
use crate::images::damages;
use crate::ledger::now;
use crate::placement::guest::EmulatorPolicy;
use crate::placement::labels::DEFAULT_ZONE;
use crate::placement::request::Request;
use crate::verbs;
use crate::verbs::security_group;
use crate::{addresses, l2};
use base64::Engine;
use godwit_protocol::error::ErrorKind;
use godwit_protocol::id::{
    HostId, ImageId, InstanceId, NetworkId, PortId, ProjectId, SecurityGroupId, UserId,
};
use godwit_protocol::image::{DiskFormat, ImageSource};
use godwit_protocol::instance::{ConfigDrive, InstanceSpec, InstanceState, Tuning};
use godwit_protocol::port::GuestPort;
use godwit_protocol::request::{AgentReply, AgentRequest, DiskRequest};
use std::collections::{BTreeMap, BTreeSet};

/// In order.
pub(super) const STEPS: &[&str] = &["reserve", "disk", "ports", "network", "define", "start"];

const GIB: u64 = 1 << 30;

/// What a user asks for.
#[derive(Clone, Debug)]
pub struct NewInstance {
    /// Its name, 1 to 255 characters.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// Owner.
    pub project: ProjectId,
    /// Who asks.
    pub user: UserId,
    /// Its size.
    pub flavor: Flavor,
    /// What its disk is made from.
    pub image: ImageId,
    /// Its NICs, in order.
    pub nics: Vec<NicRequest>,
    /// Security groups of the ports that are made for it; none: the project's default group.
    pub security_groups: Vec<SecurityGroupId>,
    /// Name and text of an SSH key.
    pub key: Option<(String, String)>,
    /// The user's metadata.
    pub metadata: BTreeMap<String, String>,
    /// The user's data, base64.
    pub user_data: Option<String>,
    /// Where it must run.
    pub wanted_host: Option<HostId>,
    /// In which availability zone.
    pub wanted_zone: Option<String>,
    /// Where it must lie to others.
    pub hints: Hints,
}

/// Accepts a new instance, durably; the rest happens in the background.
///
/// # Errors
/// [`Error::Invalid`] with key, value and rule for what cannot be; not found for what is not there.
pub async fn request(app: &Shared, new: NewInstance) -> Result<InstanceId, Error> {
    let (instance, operation) = app
        .ledger
        .change(|fleet| {
            let instance = check(fleet, &new)?;
            let operation = journal(Verb::CreateInstance, instance.id);
            let ids = (instance.id, operation.id);
            let group = instance.hints.group.map(|group| verbs::group::join(fleet, group, instance.id));
            let group = group.transpose()?.map(Change::from);
            let changes = group.into_iter().chain([instance.into(), operation.into()]).collect();
            Ok::<_, Error>((changes, ids))
        })
        .await?;
    spawn(app, operation);
    Ok(instance)
}

/// The record of an instance that may be made, or why not.
fn check(fleet: &Fleet, new: &NewInstance) -> Result<Instance, Error> {
    let invalid = |text: String| Err(Error::Invalid(text));
    let image = fleet.images.get(&new.image).ok_or_else(|| Error::not_found("Image", new.image))?;
    let source = source(image)?;
    let flavor = &new.flavor;
    let request =
        Request::from_specs(flavor.vcpus, flavor.memory_mib, &flavor.extra_specs, &image.properties)
            .map_err(|e| Error::Invalid(e.to_string()))?;
    if flavor.memory_mib < image.min_memory_mib {
        return invalid(format!(
            "Flavor's memory is too small for requested image: it has {} MiB, the image wants {} MiB.",
            flavor.memory_mib, image.min_memory_mib
        ));
    }
    let disk_bytes = match flavor.disk_gib.checked_mul(GIB) {
        Some(0) => source.virtual_size_bytes,
        Some(bytes) => bytes,
        None => return invalid(format!("Flavor's disk of {} GiB is not a disk.", flavor.disk_gib)),
    };
    let least = source.virtual_size_bytes.max(image.min_disk_gib.saturating_mul(GIB));
    if disk_bytes < least {
        return invalid(format!(
            "Flavor's disk is too small for requested image. Flavor disk is {disk_bytes} bytes, image is {least} bytes."
        ));
    }
    for nic in &new.nics {
        match nic {
            NicRequest::Network(network, _) if !fleet.networks.contains_key(network) => {
                return Err(Error::not_found("Network", network));
            }
            NicRequest::Port(port) => match fleet.ports.get(port) {
                None => return Err(Error::not_found("Port", port)),
                Some(p) if p.instance.is_some() || p.host.is_some() => {
                    return Err(Error::Conflict(format!("Port {port} is still in use.")));
                }
                Some(_) => {}
            },
            NicRequest::Network(..) => {}
        }
    }
    security_group::check_groups(fleet, &new.security_groups).map_err(|e| Error::Invalid(e.to_string()))?;
    if let Some(host) = new.wanted_host.filter(|h| !fleet.hosts.contains_key(h)) {
        return Err(Error::not_found("Host", host));
    }
    let at = now();
    Ok(Instance {
        id: InstanceId::random(),
        name: new.name.clone(),
        description: new.description.clone(),
        project: new.project,
        user: new.user,
        flavor: flavor.clone().into(),
        image: source,
        image_properties: image.properties.clone(),
        disk_bytes,
        disk_format: None,
        topology: Some(request.topology),
        nics: new.nics.clone(),
        security_groups: new.security_groups.clone(),
        key: new.key.clone(),
        metadata: new.metadata.clone(),
        user_data: new.user_data.clone(),
        wanted_host: new.wanted_host,
        wanted_zone: new.wanted_zone.clone(),
        hints: new.hints.clone(),
        refused_by: vec![],
        status: InstanceStatus::Building,
        task: Some(Task::Placing),
        fault: None,
        host: None,
        reservation: None,
        power: None,
        delete_wanted: false,
        created_at: at,
        updated_at: at,
        launched_at: None,
    })
}

/// An image that disks can be made from.
fn source(image: &Image) -> Result<ImageSource, Error> {
    let whole = (image.status == ImageStatus::Active).then_some((
        image.disk_format,
        image.size_bytes,
        image.virtual_size_bytes,
    ));
    match whole {
        Some((Some(format), Some(size_bytes), Some(virtual_size_bytes))) => {
            Ok(ImageSource { image: image.id, format, size_bytes, virtual_size_bytes })
        }
        _ => Err(Error::Invalid(format!("Image {} is not active.", image.id))),
    }
}

/// One step, by its place in [`STEPS`].
pub(super) async fn run(context: &Context, step: usize) -> Result<(), StepError> {
    match STEPS[step] {
        "reserve" => reserve(context).await,
        "disk" => disk(context).await,
        "ports" => ports(context).await,
        "network" => network(context).await,
        "define" => {
            context.show(Task::Spawning).await?;
            let spec = context.app.ledger.read(|fleet| spec(context, fleet))?;
            context.ask(host(context)?, AgentRequest::DefineInstance(Box::new(spec))).await.map(drop)
        }
        _ => context.ask(host(context)?, AgentRequest::StartInstance(context.instance)).await.map(drop),
    }
}

/// Undoes one step, whether or not it got to its effect.
pub(super) async fn undo(context: &Context, step: usize) -> Result<(), StepError> {
    let instance = context.instance()?;
    let Some(host) = instance.host else { return Ok(()) };
    match STEPS[step] {
        "reserve" => {
            context.insist(host, AgentRequest::Release(instance.id)).await?;
            context.update(|i| (i.host, i.reservation) = (None, None)).await
        }
        "disk" => context.insist(host, AgentRequest::DeleteDisk(instance.id)).await,
        "ports" => delete_instance::release_ports(context).await,
        "define" => context.insist(host, AgentRequest::RemoveInstance(instance.id)).await,
        _ => Ok(()),
    }
}

/// Places, and holds the place on the host; a host that refuses is not asked again this time.
async fn reserve(context: &Context) -> Result<(), StepError> {
    let mut stale = 0;
    loop {
        let (host, reservation, generation) = context
            .place(|fleet| {
                let instance = context.in_fleet(fleet)?;
                if let (Some(host), Some(reservation)) = (instance.host, &instance.reservation) {
                    return Ok((vec![], (host, reservation.clone(), generation(fleet, host))));
                }
                let wish = place::Wish::of(instance, instance.wanted_host, &instance.refused_by);
                let (host, reservation) = place::choose(fleet, &context.app.config, &wish)?;
                let placed =
                    Instance { host: Some(host), reservation: Some(reservation.clone()), ..instance.clone() };
                Ok((vec![placed.into()], (host, reservation, generation(fleet, host))))
            })
            .await?;
        let verdict = hold(context, host, reservation, (generation, false), &mut stale).await?;
        if verdict == Verdict::Held {
            return Ok(());
        }
        context
            .update(|i| {
                (i.host, i.reservation) = (None, None);
                i.refused_by.extend((verdict == Verdict::Refused).then_some(host));
            })
            .await?;
    }
}

async fn disk(context: &Context) -> Result<(), StepError> {
    context.show(Task::Copying).await?;
    let instance = context.instance()?;
    let request =
        DiskRequest { instance: instance.id, image: instance.image.clone(), size_bytes: instance.disk_bytes };
    let host = host(context)?;
    let create = AgentRequest::CreateDisk(request);
    let made = match context.ask(host, create.clone()).await {
        // Its pool has not got the image.
        Err(StepError::Host { error, .. }) if error.kind == ErrorKind::NotFound => {
            bring_image::bring(context, host, instance.image.image, &error).await?;
            context.ask(host, create).await
        }
        made => made,
    };
    if let Err(StepError::Host { host: name, error }) = &made
        && error.kind == ErrorKind::Damaged
    {
        let how = format!("host {name}: {error}");
        damages::note_on_host(&context.app, instance.image.image, host, &how).await;
    }
    match made? {
        AgentReply::Disk { format } => context.update(|i| i.disk_format = Some(format)).await,
        _ => Ok(()),
    }
}

/// Makes the ports that are to be made, and plugs all of them in on the host.
async fn ports(context: &Context) -> Result<(), StepError> {
    context.show(Task::Networking).await?;
    let networks: BTreeSet<NetworkId> = context
        .change(|fleet| {
            let instance = context.in_fleet(fleet)?;
            if !fleet.ports_of(instance.id).is_empty() {
                return Ok((vec![], BTreeSet::new()));
            }
            let (mut changes, groups) = groups(fleet, instance);
            let mut made: Vec<Port> = Vec::new();
            for (index, nic) in instance.nics.iter().enumerate() {
                made.push(port(fleet, instance, index as u32, nic, &made, &groups)?);
            }
            let networks: BTreeSet<NetworkId> = made.iter().map(|p| p.network).collect();
            changes.extend(made.into_iter().map(Change::from));
            changes.extend(networks.iter().filter_map(|n| l2::touched(fleet, *n)));
            Ok((changes, networks))
        })
        .await?;
    networks.into_iter().for_each(|network| context.app.l2_changed(network));
    Ok(())
}

/// The security groups of the ports that are made for an instance, and the changes that make a missing default
/// group.
fn groups(fleet: &Fleet, instance: &Instance) -> (Vec<Change>, Vec<SecurityGroupId>) {
    if !instance.security_groups.is_empty() {
        return (vec![], instance.security_groups.clone());
    }
    let (changes, group) = security_group::ensure_default(fleet, instance.project, now());
    (changes, vec![group])
}

fn port(
    fleet: &Fleet,
    instance: &Instance,
    index: u32,
    nic: &NicRequest,
    made: &[Port],
    groups: &[SecurityGroupId],
) -> Result<Port, StepError> {
    let plugged = |port: Port| Port {
        instance: Some(instance.id),
        device_id: instance.id.to_string(),
        device_owner: "compute:nova".into(),
        index,
        host: instance.host,
        updated_at: now(),
        ..port
    };
    match nic {
        NicRequest::Port(id) => {
            let port = fleet.ports.get(id).ok_or_else(|| Error::not_found("Port", id))?;
            if port.instance.is_some_and(|i| i != instance.id) {
                return Err(Error::Conflict(format!("Port {id} is still in use.")).into());
            }
            Ok(plugged(Port { revision: port.revision + 1, ..port.clone() }))
        }
        NicRequest::Network(network, wanted) => {
            let network = fleet.networks.get(network).ok_or_else(|| Error::not_found("Network", network))?;
            let at = now();
            Ok(plugged(Port {
                id: PortId::random(),
                network: network.id,
                name: String::new(),
                description: String::new(),
                project: instance.project,
                mac: addresses::free_mac(fleet, made),
                fixed_ips: addresses::allocate(fleet, network.id, *wanted, made)?,
                instance: None,
                device_id: String::new(),
                device_owner: String::new(),
                index,
                owned_by_instance: true,
                host: None,
                target_host: None,
                admin_state_up: true,
                port_security: network.port_security,
                allowed_pairs: Vec::new(),
                security_groups: Some(if network.port_security { groups.to_vec() } else { vec![] }),
                tags: vec![],
                revision: 1,
                created_at: at,
                updated_at: at,
            }))
        }
    }
}

/// Builds the networks on the host; the other hosts are told in the background.
async fn network(context: &Context) -> Result<(), StepError> {
    let host = host(context)?;
    build_networks(context, host).await
}

/// Waits until all networks of the instance are built on a host.
pub(super) async fn build_networks(context: &Context, host: HostId) -> Result<(), StepError> {
    let networks: BTreeSet<NetworkId> =
        context.app.ledger.read(|fleet| fleet.ports_of(context.instance).iter().map(|p| p.network).collect());
    for network in networks {
        let wanted = context
            .app
            .ledger
            .read(|fleet| l2::wanted(fleet, fleet.networks.get(&network)?, host, &context.app.config));
        if let Some(wanted) = wanted {
            context.ask(host, AgentRequest::EnsureNetwork(wanted)).await?;
        }
    }
    Ok(())
}

/// What a host must know to define the instance, as the fleet has it.
pub(super) fn spec(context: &Context, fleet: &Fleet) -> Result<InstanceSpec, StepError> {
    let instance = context.in_fleet(fleet)?;
    let reservation = instance.reservation.clone();
    let reservation = reservation.ok_or_else(|| Error::Conflict("The instance holds no place.".into()))?;
    let user_data =
        instance.user_data.as_deref().map(|text| base64::engine::general_purpose::STANDARD.decode(text));
    Ok(InstanceSpec {
        instance: instance.id,
        name: instance.name.clone(),
        reservation,
        topology: instance.topology,
        tuning: tuning(instance)?,
        disk_format: instance.disk_format.unwrap_or(DiskFormat::Raw),
        ports: fleet.ports_of(instance.id).into_iter().filter_map(|p| guest_port(fleet, p)).collect(),
        config_drive: ConfigDrive {
            hostname: hostname(&instance.name),
            public_keys: instance.key.clone().into_iter().collect(),
            metadata: instance.metadata.clone(),
            user_data: user_data.and_then(Result::ok),
            availability_zone: instance.host.map_or(DEFAULT_ZONE, |host| fleet.zone_of(host)).to_owned(),
        },
    })
}

/// How the instance's threads and memory are to be treated, as its flavor and image say.
///
/// # Errors
/// When flavor and image contradict each other: they did not when the instance was made.
fn tuning(instance: &Instance) -> Result<Tuning, StepError> {
    let request = place::request(instance)?;
    let emulator = request.guest.as_ref().and_then(|guest| guest.emulator_policy);
    Ok(Tuning {
        emulator_shares: emulator == Some(EmulatorPolicy::Share),
        realtime_vcpus: request.realtime_vcpus.iter().collect(),
        locked_memory: request.locked_memory,
    })
}

fn guest_port(fleet: &Fleet, port: &Port) -> Option<GuestPort> {
    let network = fleet.networks.get(&port.network)?;
    Some(GuestPort {
        port: port.id,
        network: network.id,
        vni: network.vni,
        mac: port.mac,
        mtu: network.mtu,
        addresses: port.fixed_ips.iter().filter_map(|ip| l2::address(fleet, ip)).collect(),
    })
}

/// A name that DNS takes: letters, digits and hyphens, at most 63.
pub fn hostname(name: &str) -> String {
    let kept = name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' });
    let kept: String = kept.collect::<String>().trim_matches('-').chars().take(63).collect();
    if kept.is_empty() { "server".into() } else { kept.trim_end_matches('-').to_owned() }
}

fn host(context: &Context) -> Result<HostId, StepError> {
    let host = context.instance()?.host;
    host.ok_or_else(|| Error::Conflict("The instance is on no host.".into()).into())
}

pub(super) fn finish(fleet: &Fleet, operation: &Operation, error: Option<&StepError>) -> Vec<Change> {
    let Some(instance) = fleet.instances.get(&operation.instance) else { return vec![] };
    let ended = match error {
        Some(error) => Instance { refused_by: vec![], ..in_error(instance, error.to_string()) },
        None => Instance {
            status: InstanceStatus::Active,
            task: None,
            power: Some(InstanceState::Running),
            refused_by: vec![],
            launched_at: Some(now()),
            updated_at: now(),
            ..instance.clone()
        },
    };
    vec![ended.into()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_name_makes_a_host_name() {
        for (name, expected) in
            [("web-1", "web-1"), ("Väter & Söhne", "v-ter---s-hne"), ("✈", "server"), ("", "server")]
        {
            assert_eq!(hostname(name), expected);
        }
        assert_eq!(hostname(&"a".repeat(300)).len(), 63);
    }
}
