//! Rare events, from the kernel's ring to whoever tells the coordinator.

use super::collector::tap;
use crate::events::unix_ms;
use crate::telemetry::TelemetryError;
use crate::telemetry::pins::Pins;
use crate::telemetry::shared::{self, EVENTS_PIN};
use aya::maps::{MapData, RingBuf};
use godwit_ebpf_common::tables::{EVENTS_MAP, Event, Reason};
use godwit_protocol::event::{EventKind, HostEvent};
use godwit_protocol::port::Mac;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

/// Takes events out of the ring. There is one ring on a host, and one reader.
pub struct EventReader {
    ring: RingBuf<MapData>,
}

impl EventReader {
    /// The ring that the programs under `<bpffs>/godwit` write to. What it holds from before is read too.
    ///
    /// # Errors
    /// It is not there.
    pub fn open(bpffs: &Path) -> Result<Self, TelemetryError> {
        let ring = shared::open(&Pins::open(bpffs)?, EVENTS_PIN, EVENTS_MAP)?;
        Ok(Self { ring })
    }

    /// Waits for events, at most for `patience`, and takes all that are there. Their numbers are zero.
    pub fn wait(&mut self, patience: Duration) -> Vec<HostEvent> {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut polled = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is a short one.
        let _ = poll(&mut polled, timeout);
        let (now_ms, now_ns) = (unix_ms(), super::monotonic_ns());
        let mut events = Vec::new();
        while let Some(item) = self.ring.next() {
            events.extend(decode(&item, now_ms, now_ns));
        }
        events
    }
}

/// An event as the kernel wrote it, with the time of the wall for that of its clock. None for what this version
/// does not know.
fn decode(bytes: &[u8], now_ms: u64, now_ns: u64) -> Option<HostEvent> {
    if bytes.len() < size_of::<Event>() {
        return None;
    }
    let word = |at: usize| Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let long = |at: usize| Some(u64::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
    let mac = |at: usize| {
        let mac: [u8; 6] = *bytes.get(at..)?.first_chunk()?;
        (mac != [0; 6]).then_some(Mac(mac))
    };
    let address = |at: usize| -> Option<IpAddr> {
        let address: [u8; 16] = *bytes.get(at..)?.first_chunk()?;
        (address != [0; 16]).then(|| Ipv6Addr::from(address).to_canonical())
    };
    let (at_ns, port, vni) = (long(0)?, long(8)?, word(16)?);
    let kind = *EventKind::ALL.get(word(20)? as usize)?;
    let reason = Reason::ALL.get(word(36)? as usize).filter(|_| kind == EventKind::Spoof);
    Some(HostEvent {
        sequence: 0,
        at_ms: now_ms.saturating_sub(now_ns.saturating_sub(at_ns) / 1_000_000),
        kind,
        vni,
        tap: (port != 0).then(|| tap(port)),
        mac: mac(24),
        owner: mac(30),
        address: address(40),
        peer: address(56),
        reason: reason.map(|reason| reason.as_str().to_owned()),
        pool: None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn an_event_is_read_where_the_kernel_writes_it() {
        let offsets = [
            offset_of!(Event, at_ns),
            offset_of!(Event, port),
            offset_of!(Event, vni),
            offset_of!(Event, kind),
            offset_of!(Event, mac),
            offset_of!(Event, owner),
            offset_of!(Event, detail),
            offset_of!(Event, address),
            offset_of!(Event, peer),
        ];
        assert_eq!(offsets, [0, 8, 16, 20, 24, 30, 36, 40, 56]);
        assert_eq!(size_of::<Event>(), 72);
    }

    #[test]
    fn what_is_not_known_is_no_event() {
        assert_eq!(decode(&[0; 71], 0, 0), None, "too short");
        let mut bytes = [0; 72];
        bytes[20..24].copy_from_slice(&99_u32.to_ne_bytes());
        assert_eq!(decode(&bytes, 0, 0), None, "a kind of another version");
    }
}
