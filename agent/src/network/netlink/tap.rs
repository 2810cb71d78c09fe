//! Taps of guests. They are made before QEMU opens them, so that a guest's first packet finds everything in its place.
#![allow(unsafe_code)]

use super::kernel;
use super::socket::KernelError;
use crate::network::NetworkError;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

/// What makes and opens taps.
const DEVICE: &str = "/dev/net/tun";

nix::ioctl_write_ptr_bad!(attach, libc::TUNSETIFF, libc::ifreq);
nix::ioctl_write_int_bad!(set_persistent, libc::TUNSETPERSIST);

/// Makes a tap that stays when nobody has it open, and is down (Documentation/networking/tuntap.rst).
pub(super) fn make(name: &str) -> Result<(), NetworkError> {
    let made = open(name).and_then(|tap| {
        // SAFETY: the descriptor is open and attached; the argument is no pointer.
        unsafe { set_persistent(tap.as_raw_fd(), 1) }?;
        Ok(())
    });
    made.map_err(|error| kernel(format!("make the tap {name}"), KernelError::from(error)))
}

/// Opens a tap, which is made if it is not there. Packets have the header that virtio wants, as QEMU has them.
pub(super) fn open(name: &str) -> io::Result<File> {
    let device = File::options().read(true).write(true).open(DEVICE)?;
    // SAFETY: integers and a union of plain data, for which zeroes are a value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // One byte stays zero: the kernel wants the name ended.
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::from(io::ErrorKind::InvalidInput));
    }
    for (place, byte) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *place = byte as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR) as libc::c_short;
    // SAFETY: the descriptor is open, and the request is a whole ifreq that outlives the call.
    unsafe { attach(device.as_raw_fd(), &raw const request) }?;
    Ok(device)
}
