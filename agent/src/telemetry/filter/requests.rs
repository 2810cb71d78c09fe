//! Guests' questions by DHCP, out of the ring that the filter writes them to.

use super::TelemetryError;
use crate::telemetry::pins::Pins;
use crate::telemetry::shared::map_error;
use aya::maps::{Map, MapData, RingBuf};
use godwit_ebpf_common::filter::{REQUESTS_MAP, Request};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use std::mem::offset_of;
use std::os::fd::AsFd;
use std::path::Path;

/// The ring's pin.
pub(super) const PIN: &str = "dhcp_requests";

/// A guest's question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// The tap that it came by, by index.
    pub link: u32,
    /// The frame, from the Ethernet header on.
    pub frame: Vec<u8>,
}

/// Takes questions out of the ring. There is one ring on a host, and one reader.
pub struct Requests {
    ring: RingBuf<MapData>,
}

impl Requests {
    /// The ring that the programs under `<bpffs>/godwit` write to.
    ///
    /// # Errors
    /// There is none, or the kernel does not let it be read.
    pub fn open(bpffs: &Path) -> Result<Self, TelemetryError> {
        let pins = Pins::open(bpffs)?;
        let data = MapData::from_pin(pins.path(PIN)).map_err(|error| map_error(REQUESTS_MAP, error))?;
        let ring = RingBuf::try_from(Map::RingBuf(data)).map_err(|error| map_error(REQUESTS_MAP, error))?;
        Ok(Self { ring })
    }

    /// Waits until a guest asks, or `patience_ms` is over; then there may be none.
    pub fn wait(&mut self, patience_ms: u16) -> Vec<Question> {
        let mut polled = [PollFd::new(self.ring.as_fd(), PollFlags::POLLIN)];
        // An interrupted wait is a short one.
        let _ = poll(&mut polled, PollTimeout::from(patience_ms));
        let mut questions = Vec::new();
        while let Some(item) = self.ring.next() {
            questions.extend(read(&item));
        }
        questions
    }
}

fn read(item: &[u8]) -> Option<Question> {
    let number = |at: usize| Some(u32::from_ne_bytes(item.get(at..at + 4)?.try_into().ok()?));
    let length = number(offset_of!(Request, length))? as usize;
    let start = offset_of!(Request, frame);
    let frame = item.get(start..start + length.min(Request::BYTES))?.to_vec();
    Some(Question { link: number(offset_of!(Request, link))?, frame })
}
