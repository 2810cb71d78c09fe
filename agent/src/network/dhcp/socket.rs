//! A socket that sends whole frames to taps.
#![allow(unsafe_code)]

use godwit_ebpf_common::filter::ANSWER_MARK;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, setsockopt, socket, sockopt};
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

/// A packet socket that receives nothing (its protocol is zero) and whose frames the filter knows by their mark.
pub(super) struct AnswerSocket(OwnedFd);

impl AnswerSocket {
    pub(super) fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let socket = socket(AddressFamily::Packet, SockType::Raw, flags, None)?;
        setsockopt(&socket, sockopt::Mark, &ANSWER_MARK)?;
        Ok(Self(socket))
    }

    /// Sends a frame out of a link: to the guest, if it is a tap.
    pub(super) fn send(&self, link: u32, frame: &[u8]) -> io::Result<()> {
        // SAFETY: all zeroes is a value of this structure of integers.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex =
            i32::try_from(link).map_err(|_| io::Error::from(io::ErrorKind::InvalidInput))?;
        // SAFETY: frame and address are valid for the call, with the lengths that are given; the kernel copies both.
        let sent = unsafe {
            libc::sendto(
                self.0.as_raw_fd(),
                frame.as_ptr().cast(),
                frame.len(),
                0,
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
