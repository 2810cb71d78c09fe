//! Packets as they pass a link: sent and seen by a packet socket (packet(7)).
#![allow(unsafe_code)]

use nix::libc;
use nix::net::if_::if_nametoindex;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use nix::sys::time::{TimeVal, TimeValLike as _};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// Bytes of a packet that are looked at: all headers, inner ones too.
pub(crate) const HEAD_BYTES: usize = 256;

/// `struct virtio_net_hdr` (linux/virtio_net.h), which comes before each packet.
const OFFLOAD_BYTES: usize = 10;

/// What waits to be read, at most: enough for all that is sent before somebody reads.
const QUEUE_BYTES: usize = 128 << 20;

/// A packet that passed a link.
#[derive(Clone, Copy)]
pub(crate) struct Seen {
    /// The link's index.
    pub(crate) link: u32,
    /// Whether it leaves by the link.
    pub(crate) is_outgoing: bool,
    /// Its bytes on a wire, from the Ethernet header on.
    pub(crate) length: usize,
    /// Bytes of a VLAN tag that the kernel has taken out of it.
    pub(crate) tag_bytes: usize,
    /// Payload of each of its segments, in bytes; zero if it is no such packet.
    pub(crate) segment_bytes: usize,
    /// Its first bytes.
    pub(crate) head: [u8; HEAD_BYTES],
}

/// A packet socket of the thread's network namespace.
pub(crate) struct Wire(OwnedFd);

impl Wire {
    /// On one link, or on all; a read waits so long for a packet.
    pub(crate) fn open(link: Option<&str>, patience_ms: i64) -> io::Result<Self> {
        let kind = (AddressFamily::Packet, SockType::Raw);
        let wire = Self(socket(kind.0, kind.1, SockFlag::SOCK_CLOEXEC, None)?);
        setsockopt(&wire.0, sockopt::RcvBufForce, &QUEUE_BYTES)?;
        setsockopt(&wire.0, sockopt::ReceiveTimeout, &TimeVal::milliseconds(patience_ms))?;
        for option in [libc::PACKET_VNET_HDR, libc::PACKET_AUXDATA] {
            let on: libc::c_int = 1;
            // SAFETY: an integer of the size that is given, read by the kernel during the call.
            let set = unsafe {
                libc::setsockopt(
                    wire.0.as_raw_fd(),
                    libc::SOL_PACKET,
                    option,
                    (&raw const on).cast(),
                    size_of_val(&on) as u32,
                )
            };
            if set != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        // SAFETY: all zeroes is a value of this structure of integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = match link {
            Some(link) => if_nametoindex(link)? as i32,
            None => 0,
        };
        // SAFETY: the address is valid for the call, with the length that is given.
        let bound = unsafe {
            libc::bind(wire.0.as_raw_fd(), (&raw const address).cast(), size_of_val(&address) as u32)
        };
        if bound == 0 { Ok(wire) } else { Err(io::Error::last_os_error()) }
    }

    /// Sends a frame out of the link.
    pub(crate) fn send(&self, frame: &[u8]) -> io::Result<()> {
        let mut bytes = [0; OFFLOAD_BYTES + 2048];
        let whole = &mut bytes[..OFFLOAD_BYTES + frame.len()];
        whole[OFFLOAD_BYTES..].copy_from_slice(frame);
        nix::unistd::write(&self.0, whole).map(drop).map_err(io::Error::from)
    }

    /// The next packet; none when it does not come in time.
    pub(crate) fn receive(&self) -> io::Result<Option<Seen>> {
        let mut bytes = [0_u8; OFFLOAD_BYTES + HEAD_BYTES];
        let mut auxiliary = [0_u64; 8];
        let mut buffer = libc::iovec { iov_base: bytes.as_mut_ptr().cast(), iov_len: bytes.len() };
        // SAFETY: all zeroes is a value of these structures of integers and pointers.
        let (mut address, mut message): (libc::sockaddr_ll, libc::msghdr) = unsafe { std::mem::zeroed() };
        message.msg_name = (&raw mut address).cast();
        message.msg_namelen = size_of_val(&address) as u32;
        message.msg_iov = &raw mut buffer;
        message.msg_iovlen = 1;
        message.msg_control = auxiliary.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&auxiliary);
        // SAFETY: all that the message points to is valid for the call, with the lengths that are given.
        let length = unsafe { libc::recvmsg(self.0.as_raw_fd(), &raw mut message, libc::MSG_TRUNC) };
        if length < 0 {
            let error = io::Error::last_os_error();
            let is_late = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            return if is_late { Ok(None) } else { Err(error) };
        }
        let mut head = [0; HEAD_BYTES];
        head.copy_from_slice(&bytes[OFFLOAD_BYTES..]);
        // The second byte is the kind of its offload; none: zero.
        let segment_bytes = if bytes[1] == 0 { 0 } else { u16::from_ne_bytes([bytes[4], bytes[5]]) };
        // SAFETY: the kernel has filled the message in, and what it points to is still there.
        let tag_bytes = if unsafe { is_tagged(&message) } { 4 } else { 0 };
        Ok(Some(Seen {
            link: address.sll_ifindex as u32,
            is_outgoing: address.sll_pkttype == libc::PACKET_OUTGOING,
            length: length as usize - OFFLOAD_BYTES + tag_bytes,
            tag_bytes,
            segment_bytes: usize::from(segment_bytes),
            head,
        }))
    }

    /// Packets that had no room since this was last asked.
    pub(crate) fn lost(&self) -> io::Result<u32> {
        // `struct tpacket_stats` (linux/if_packet.h): packets, and of those the dropped.
        let mut counts = [0_u32; 2];
        let mut bytes = size_of_val(&counts) as u32;
        // SAFETY: two integers of the size that is given, written by the kernel during the call.
        let read = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                counts.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        if read == 0 { Ok(counts[1]) } else { Err(io::Error::last_os_error()) }
    }
}

/// Whether the kernel has taken a VLAN tag out of the packet (`struct tpacket_auxdata`, linux/if_packet.h).
///
/// # Safety
/// `message` is one that the kernel has filled in.
unsafe fn is_tagged(message: &libc::msghdr) -> bool {
    // SAFETY: by this function's own condition.
    let header = unsafe { libc::CMSG_FIRSTHDR(message) };
    // SAFETY: null, or a header inside the message's buffer.
    let Some(found) = (unsafe { header.as_ref() }) else { return false };
    if (found.cmsg_level, found.cmsg_type) != (libc::SOL_PACKET, libc::PACKET_AUXDATA) {
        return false;
    }
    // SAFETY: behind the header are the auxiliary data, of which the status is the first word.
    let status = unsafe { libc::CMSG_DATA(header).cast::<u32>().read_unaligned() };
    status & libc::TP_STATUS_VLAN_VALID != 0
}
