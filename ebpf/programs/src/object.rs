//! What every object file of programs has besides its programs.

/// There is nothing in these programs that panics; the compiler wants to be told what would happen.
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

/// The kernel reads this: helpers reserved to GPL-compatible programs are open to this licence.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
