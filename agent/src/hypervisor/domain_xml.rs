//! An instance as libvirt describes it. Pure: the same spec on the same host gives the same text.

use super::pins::Pins;
use super::{DomainContext, MemoryBinding};
use crate::storage::InstancePaths;
use godwit_protocol::host::Cell;
use godwit_protocol::id::InstanceId;
use godwit_protocol::instance::{CpuTopology, InstanceSpec};
use godwit_protocol::port::{GuestPort, tap_name};
use godwit_protocol::reservation::{Reservation, ReservedCell};
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Write};
use std::path::Path;

/// What emulates on this host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Emulator {
    /// Path of the QEMU binary.
    pub binary: String,
    /// Machine type with its version, so that a guest keeps its hardware over upgrades and migrations.
    pub machine: String,
    /// Whether KVM runs the vCPUs, else TCG.
    pub kvm: bool,
}

impl Default for Emulator {
    fn default() -> Self {
        Self {
            binary: "/usr/bin/qemu-system-x86_64".to_owned(),
            machine: "pc-q35-10.0".to_owned(),
            kvm: false,
        }
    }
}

/// CPU that emulated guests see: x86-64-v2, which current distributions ask for, all of it known to TCG, and the
/// same on every host. `max` would differ with QEMU's version and so could not move.
const EMULATED_CPU: &str = "Nehalem";

/// Page size in KiB that needs no reservation in the kernel.
const ORDINARY_PAGE_KIB: u64 = 4;

/// Of vCPUs that run in real time: above all ordinary threads, below the kernel's own of that kind.
const REALTIME_PRIORITY: u32 = 1;

/// Name of an instance's domain.
pub fn domain_name(instance: InstanceId) -> String {
    format!("instance-{}", instance.short())
}

/// The domain's description, as `virDomainDefineXML` takes it.
pub fn describe(spec: &InstanceSpec, context: &DomainContext, emulator: &Emulator) -> String {
    let mut xml = String::with_capacity(4096);
    write_domain(&mut xml, spec, context, emulator).expect("writing to a String cannot fail");
    xml
}

fn write_domain(
    xml: &mut String,
    spec: &InstanceSpec,
    context: &DomainContext,
    emulator: &Emulator,
) -> fmt::Result {
    let reservation = &spec.reservation;
    writeln!(xml, "<domain type='{}'>", if emulator.kvm { "kvm" } else { "qemu" })?;
    writeln!(xml, "  <name>{}</name>", domain_name(spec.instance))?;
    writeln!(xml, "  <uuid>{}</uuid>", spec.instance)?;
    writeln!(xml, "  <title>{}</title>", Escaped(&spec.name))?;
    writeln!(xml, "  <memory unit='KiB'>{}</memory>", reservation.memory_bytes / 1024)?;
    write_memory_backing(xml, spec)?;
    write_vcpus(xml, spec, &context.cells)?;
    if context.memory_binding == MemoryBinding::Strict {
        write_numatune(xml, reservation)?;
    }
    writeln!(
        xml,
        "  <os><type arch='x86_64' machine='{}'>hvm</type><boot dev='hd'/></os>",
        emulator.machine
    )?;
    // Counting performance events interrupts a vCPU that runs in real time.
    let pmu = if spec.tuning.realtime_vcpus.is_empty() { "" } else { "<pmu state='off'/>" };
    writeln!(xml, "  <features><acpi/><apic/>{pmu}</features>")?;
    write_cpu(xml, spec, &context.cells, emulator)?;
    write_clock(xml, emulator)?;
    for (event, action) in [("poweroff", "destroy"), ("reboot", "restart"), ("crash", "destroy")] {
        writeln!(xml, "  <on_{event}>{action}</on_{event}>")?;
    }
    write_devices(xml, spec, context, emulator)?;
    writeln!(xml, "</domain>")
}

fn write_memory_backing(xml: &mut String, spec: &InstanceSpec) -> fmt::Result {
    let mut guests_by_page = BTreeMap::<u64, BTreeSet<u32>>::new();
    for cell in &spec.reservation.cells {
        if let Some(size) = cell.page_size_kib.filter(|&size| size > ORDINARY_PAGE_KIB) {
            guests_by_page.entry(size).or_default().insert(cell.guest);
        }
    }
    let realtime = !spec.tuning.realtime_vcpus.is_empty();
    let locked = spec.tuning.locked_memory || realtime;
    if guests_by_page.is_empty() && !locked {
        return Ok(());
    }
    writeln!(xml, "  <memoryBacking>")?;
    if !guests_by_page.is_empty() {
        writeln!(xml, "    <hugepages>")?;
        for (size, guests) in &guests_by_page {
            writeln!(xml, "      <page size='{size}' unit='KiB' nodeset='{}'/>", List(guests))?;
        }
        writeln!(xml, "    </hugepages>")?;
    }
    if realtime {
        // A page that is shared must be copied at the first write, which takes its time.
        writeln!(xml, "    <nosharepages/>")?;
    }
    if locked {
        writeln!(xml, "    <locked/>")?;
    }
    writeln!(xml, "  </memoryBacking>")
}

fn write_vcpus(xml: &mut String, spec: &InstanceSpec, cells: &[Cell]) -> fmt::Result {
    let vcpus = spec.reservation.vcpus;
    let pins = Pins::of(&spec.reservation, &spec.tuning, cells);
    if spec.reservation.cells.is_empty() {
        return match pins.emulator.is_empty() {
            true => writeln!(xml, "  <vcpu placement='static'>{vcpus}</vcpu>"),
            false => {
                writeln!(xml, "  <vcpu placement='static' cpuset='{}'>{vcpus}</vcpu>", List(&pins.emulator))
            }
        };
    }
    writeln!(xml, "  <vcpu placement='static'>{vcpus}</vcpu>")?;
    writeln!(xml, "  <cputune>")?;
    for (vcpu, cpus) in pins.vcpus.iter().filter(|(_, cpus)| !cpus.is_empty()) {
        writeln!(xml, "    <vcpupin vcpu='{vcpu}' cpuset='{}'/>", List(cpus))?;
    }
    if !pins.emulator.is_empty() {
        writeln!(xml, "    <emulatorpin cpuset='{}'/>", List(&pins.emulator))?;
    }
    if !spec.tuning.realtime_vcpus.is_empty() {
        let vcpus = List(&spec.tuning.realtime_vcpus);
        writeln!(xml, "    <vcpusched vcpus='{vcpus}' scheduler='fifo' priority='{REALTIME_PRIORITY}'/>")?;
    }
    writeln!(xml, "  </cputune>")
}

fn write_numatune(xml: &mut String, reservation: &Reservation) -> fmt::Result {
    if reservation.cells.is_empty() {
        return Ok(());
    }
    let hosts: BTreeSet<u32> = reservation.cells.iter().map(|cell| cell.host).collect();
    writeln!(xml, "  <numatune>")?;
    writeln!(xml, "    <memory mode='strict' nodeset='{}'/>", List(&hosts))?;
    for cell in &reservation.cells {
        let (guest, host) = (cell.guest, cell.host);
        writeln!(xml, "    <memnode cellid='{guest}' mode='strict' nodeset='{host}'/>")?;
    }
    writeln!(xml, "  </numatune>")
}

fn write_cpu(xml: &mut String, spec: &InstanceSpec, cells: &[Cell], emulator: &Emulator) -> fmt::Result {
    if emulator.kvm {
        writeln!(xml, "  <cpu mode='host-model'>")?;
    } else {
        writeln!(xml, "  <cpu mode='custom' match='exact' check='none'>")?;
        writeln!(xml, "    <model fallback='forbid'>{EMULATED_CPU}</model>")?;
    }
    let one_core_a_socket = CpuTopology { sockets: spec.reservation.vcpus, cores: 1, threads: 1 };
    let CpuTopology { sockets, cores, threads } = spec.topology.unwrap_or(one_core_a_socket);
    writeln!(xml, "    <topology sockets='{sockets}' cores='{cores}' threads='{threads}'/>")?;
    write_guest_cells(xml, &spec.reservation.cells, cells)?;
    writeln!(xml, "  </cpu>")
}

fn write_guest_cells(xml: &mut String, reserved: &[ReservedCell], cells: &[Cell]) -> fmt::Result {
    if reserved.is_empty() {
        return Ok(());
    }
    let mut reserved: Vec<&ReservedCell> = reserved.iter().collect();
    reserved.sort_by_key(|cell| cell.guest);
    let distances: Option<Vec<Vec<u32>>> = reserved
        .iter()
        .map(|from| reserved.iter().map(|to| guest_distance(cells, from, to)).collect())
        .collect();
    writeln!(xml, "    <numa>")?;
    for (position, cell) in reserved.iter().enumerate() {
        let cpus: BTreeSet<u32> = cell.pinning.keys().chain(&cell.shared_vcpus).copied().collect();
        let (guest, memory) = (cell.guest, cell.memory_bytes / 1024);
        write!(xml, "      <cell id='{guest}' cpus='{}' memory='{memory}' unit='KiB'>", List(&cpus))?;
        if let Some(row) = distances.as_ref().filter(|all| all.len() > 1).map(|all| &all[position]) {
            write!(xml, "<distances>")?;
            for (to, distance) in reserved.iter().zip(row) {
                write!(xml, "<sibling id='{}' value='{distance}'/>", to.guest)?;
            }
            write!(xml, "</distances>")?;
        }
        writeln!(xml, "</cell>")?;
    }
    writeln!(xml, "    </numa>")
}

/// The ACPI SLIT distance that the guest reads between two of its cells; none when the host tells none. Linux
/// throws the whole table away when it finds 10 between two different cells.
fn guest_distance(cells: &[Cell], from: &ReservedCell, to: &ReservedCell) -> Option<u32> {
    if from.guest == to.guest {
        return Some(10);
    }
    let host = cells.iter().find(|cell| cell.id == from.host)?;
    host.distances.get(&to.host).map(|&distance| distance.clamp(11, 254))
}

fn write_clock(xml: &mut String, emulator: &Emulator) -> fmt::Result {
    if !emulator.kvm {
        return writeln!(xml, "  <clock offset='utc'/>");
    }
    writeln!(
        xml,
        "  <clock offset='utc'><timer name='rtc' tickpolicy='catchup'/>\
         <timer name='pit' tickpolicy='delay'/><timer name='hpet' present='no'/></clock>"
    )
}

fn write_devices(
    xml: &mut String,
    spec: &InstanceSpec,
    context: &DomainContext,
    emulator: &Emulator,
) -> fmt::Result {
    let paths = InstancePaths::new(&context.pool, spec.instance);
    writeln!(xml, "  <devices>")?;
    writeln!(xml, "    <emulator>{}</emulator>", Escaped(&emulator.binary))?;
    // An empty backingStore ends the chain there: libvirt then never follows what a header of the guest's says.
    let backing = match &context.base {
        None => "<backingStore/>".to_owned(),
        Some(base) => format!(
            "<backingStore type='file'><format type='{}'/><source file='{}'/><backingStore/></backingStore>",
            base.format.as_str(),
            Escaped::path(&base.path)
        ),
    };
    let policy = if context.stop_on_error { " error_policy='stop' rerror_policy='stop'" } else { "" };
    write!(
        xml,
        "    <disk type='file' device='disk'>\n      \
         <driver name='qemu' type='{}' cache='none' io='io_uring' discard='unmap'{policy}/>\n      \
         <source file='{}'/>{backing}<target dev='vda' bus='virtio'/>\n    </disk>\n    \
         <disk type='file' device='cdrom'>\n      \
         <driver name='qemu' type='raw' cache='none'/>\n      \
         <source file='{}'/><backingStore/><target dev='sda' bus='sata'/><readonly/>\n    </disk>\n",
        spec.disk_format.as_str(),
        Escaped::path(&paths.disk),
        Escaped::path(&paths.config_drive),
    )?;
    for port in &spec.ports {
        write_interface(xml, port)?;
    }
    writeln!(
        xml,
        "    <serial type='pty'><log file='{}' append='on'/><target type='isa-serial' port='0'/></serial>",
        Escaped::path(&paths.console)
    )?;
    writeln!(xml, "    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>")?;
    writeln!(xml, "    <controller type='usb' model='none'/>")?;
    writeln!(xml, "    <memballoon model='none'/>")?;
    writeln!(xml, "    <audio id='1' type='none'/>")?;
    writeln!(xml, "  </devices>")
}

fn write_interface(xml: &mut String, port: &GuestPort) -> fmt::Result {
    writeln!(
        xml,
        "    <interface type='ethernet'>\n      <mac address='{}'/>\
         <target dev='{}' managed='no'/><model type='virtio'/><mtu size='{}'/>\n    </interface>",
        port.mac,
        tap_name(port.port),
        port.mtu
    )
}

/// The taps that must be there before a domain of this description starts.
pub fn taps(description: &str) -> BTreeSet<String> {
    let targets = description.split("<target dev='").skip(1);
    let unmanaged = targets.filter_map(|target| target.split_once("' managed='no'/>"));
    unmanaged.map(|(tap, _)| tap).filter(|tap| !tap.contains('\'')).map(str::to_owned).collect()
}

/// The source's live description with the target's pinning: what the guest sees stays as it is, down to a CPU that
/// `host-model` became at its start, and where it sits is the target's to say.
pub fn merge(live: &str, target: &str) -> String {
    let mut merged = live.to_owned();
    for element in ["vcpu", "cputune", "numatune"] {
        let wanted = find_element(target, element).map(|range| &target[range]);
        match (find_element(&merged, element), wanted) {
            (Some(range), wanted) => merged.replace_range(range, wanted.unwrap_or_default()),
            (None, Some(wanted)) => {
                if let Some(vcpu) = find_element(&merged, "vcpu") {
                    merged.insert_str(vcpu.end, &format!("\n  {wanted}"));
                }
            }
            (None, None) => {}
        }
    }
    merged
}

/// Where the first element of that name is in what libvirt or [`describe`] wrote: both escape `<` everywhere else,
/// and neither nests these elements.
fn find_element(xml: &str, name: &str) -> Option<std::ops::Range<usize>> {
    let start = [' ', '>', '/'].iter().filter_map(|end| xml.find(&format!("<{name}{end}"))).min()?;
    let tag_end = start + xml[start..].find('>')? + 1;
    if xml[..tag_end].ends_with("/>") {
        return Some(start..tag_end);
    }
    let closing = format!("</{name}>");
    Some(start..tag_end + xml[tag_end..].find(&closing)? + closing.len())
}

/// Text for an element or an attribute. What XML 1.0 cannot hold at all becomes U+FFFD; line ends become spaces,
/// because libvirt refuses a title that has them.
struct Escaped<'a>(&'a str);

impl Escaped<'_> {
    fn path(path: &Path) -> String {
        Escaped(&path.to_string_lossy()).to_string()
    }
}

impl Display for Escaped<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for character in self.0.chars() {
            match character {
                '<' => f.write_str("&lt;")?,
                '>' => f.write_str("&gt;")?,
                '&' => f.write_str("&amp;")?,
                '"' => f.write_str("&quot;")?,
                '\'' => f.write_str("&apos;")?,
                '\t' | '\n' | '\r' => f.write_char(' ')?,
                '\0'..='\u{1f}' | '\u{fffe}' | '\u{ffff}' => f.write_char('\u{fffd}')?,
                other => f.write_char(other)?,
            }
        }
        Ok(())
    }
}

/// Numbers as libvirt's lists spell them: `0-3,7`.
pub(crate) struct List<'a>(pub(crate) &'a BTreeSet<u32>);

impl Display for List<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut numbers = self.0.iter().copied().peekable();
        let mut first = true;
        while let Some(start) = numbers.next() {
            let mut end = start;
            while let Some(next) = numbers.next_if(|&next| next == end + 1) {
                end = next;
            }
            f.write_str(if first { "" } else { "," })?;
            first = false;
            match end == start {
                true => write!(f, "{start}")?,
                false => write!(f, "{start}-{end}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests;
