//! Answers in a neighbour's place.

/// Bytes of an answer to ARP.
pub const ARP_ANSWER_BYTES: usize = 42;

/// Bytes of a neighbour advertisement with its one option.
pub const ND_ANSWER_BYTES: usize = 86;

/// R, S and O of a neighbour advertisement (RFC 4861, 4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// Writes `bytes` into `frame` at `at`, which is known when this is compiled.
#[inline(always)]
fn put<const N: usize>(frame: &mut [u8], at: usize, bytes: [u8; N]) {
    if let Some(place) = frame.get_mut(at..at + N) {
        place.copy_from_slice(&bytes);
    }
}

/// The reply that `owner`, who has `target`, would give to the guest `mac` with the address `sender` (RFC 826).
#[inline(always)]
pub fn arp(
    frame: &mut [u8; ARP_ANSWER_BYTES],
    owner: [u8; 6],
    target: [u8; 4],
    mac: [u8; 6],
    sender: [u8; 4],
) {
    put(frame, 0, mac);
    put(frame, 6, owner);
    put(frame, 12, [0x08, 0x06, 0, 1, 8, 0, 6, 4, 0, 2]);
    put(frame, 22, owner);
    put(frame, 28, target);
    put(frame, 32, mac);
    put(frame, 38, sender);
}

/// The advertisement that `owner`, who has `target`, would give to the guest `mac` with the address `sender` (RFC
/// 4861, 7.2.4): solicited, and overriding, since what the coordinator has told is newer than any cache.
#[inline(always)]
pub fn nd(
    frame: &mut [u8; ND_ANSWER_BYTES],
    owner: [u8; 6],
    target: &[u8; 16],
    is_router: bool,
    mac: [u8; 6],
    sender: &[u8; 16],
) {
    let router = if is_router { ROUTER } else { 0 };
    put(frame, 0, mac);
    put(frame, 6, owner);
    put(frame, 12, [0x86, 0xdd, 0x60, 0, 0, 0, 0, 32, 58, 255]);
    put(frame, 22, *target);
    put(frame, 38, *sender);
    put(frame, 54, [136, 0, 0, 0, router | SOLICITED | OVERRIDE, 0, 0, 0]);
    put(frame, 62, *target);
    put(frame, 78, [2, 1]);
    put(frame, 80, owner);
    // Over both addresses, length and protocol, then the message itself (RFC 8200, 8.1).
    let mut sum = 32 + 58;
    let mut at = 22;
    while at < ND_ANSWER_BYTES {
        sum += u32::from(frame[at]) << 8 | u32::from(frame[at + 1]);
        at += 2;
    }
    sum = (sum & 0xffff) + (sum >> 16);
    sum = (sum & 0xffff) + (sum >> 16);
    put(frame, 56, (!(sum as u16)).to_be_bytes());
}
