//! Which programs are on a side of a link, asked in one call of the kernel. (BPF_PROG_QUERY; aya opens each program too, and
//! a host has thousands of taps.)
#![allow(unsafe_code)]

use aya::programs::tc::TcAttachType;
use std::io;

/// `BPF_PROG_QUERY`, `BPF_TCX_INGRESS` and `BPF_TCX_EGRESS` (linux/bpf.h).
const PROG_QUERY: libc::c_long = 16;
const TCX_INGRESS: u32 = 46;
const TCX_EGRESS: u32 = 47;

/// Most programs on a side of a link (`BPF_MPROG_MAX`).
const MOST: usize = 64;

/// What the kernel takes of `union bpf_attr` for it.
#[repr(C)]
struct Attributes {
    target_ifindex: u32,
    attach_type: u32,
    query_flags: u32,
    attach_flags: u32,
    prog_ids: u64,
    count: u32,
    reserved: u32,
    prog_attach_flags: u64,
    link_ids: u64,
    link_attach_flags: u64,
    revision: u64,
}

/// Whether a link, by its index, has this program on a side; not where the link is gone.
///
/// # Errors
/// The kernel does not tell.
pub(super) fn has(link: u32, side: TcAttachType, program: u32) -> io::Result<bool> {
    let mut ids = [0_u32; MOST];
    let mut attributes = Attributes {
        target_ifindex: link,
        attach_type: if matches!(side, TcAttachType::Ingress) { TCX_INGRESS } else { TCX_EGRESS },
        query_flags: 0,
        attach_flags: 0,
        prog_ids: ids.as_mut_ptr() as u64,
        count: MOST as u32,
        reserved: 0,
        prog_attach_flags: 0,
        link_ids: 0,
        link_attach_flags: 0,
        revision: 0,
    };
    // SAFETY: the attributes are valid for the call, and their list has room for `count` numbers.
    let done =
        unsafe { libc::syscall(libc::SYS_bpf, PROG_QUERY, &raw mut attributes, size_of::<Attributes>()) };
    if done < 0 {
        let error = io::Error::last_os_error();
        // ENOENT: there is none on either side of the link.
        let is_none = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV));
        return if is_none { Ok(false) } else { Err(error) };
    }
    Ok(ids[..MOST.min(attributes.count as usize)].contains(&program))
}
