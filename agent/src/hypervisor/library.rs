//! libvirt's client library, loaded at its first call. It brings sixty libraries with it: loaded at each start of the
//! program they would take longer than a clone of a disk, or than the answer of a worker.
//!
//! The linker finds the functions here and so has no need of the library. A function that is missing in the list
//! below still works: then the library is loaded at the start, as it is on other processors than amd64.

#[cfg(target_arch = "x86_64")]
pub(super) use amd64::load;

/// Nothing to do: the library is linked.
#[cfg(not(target_arch = "x86_64"))]
pub(super) fn load() {}

#[cfg(target_arch = "x86_64")]
mod amd64 {
    use std::arch::global_asm;
    use std::ffi::{CStr, c_char, c_void};
    use std::ptr::NonNull;
    use std::sync::OnceLock;

    /// The name that its makers keep for as long as its functions stay compatible.
    const NAME: &CStr = c"libvirt.so.0";

    /// What dlopen(3) gave.
    struct Library(NonNull<c_void>);

    // SAFETY: the handle is only given to dlsym(3), which any thread may call, and never closed.
    unsafe impl Send for Library {}
    // SAFETY: as above.
    unsafe impl Sync for Library {}

    /// Loads the library, or ends the process with the reason: as the system's loader would have done at its start.
    pub(in super::super) fn load() {
        library();
    }

    fn library() -> &'static Library {
        static LIBRARY: OnceLock<Library> = OnceLock::new();
        LIBRARY.get_or_init(|| {
            // SAFETY: the name ends with a zero. The library's own start-up code runs, as it would at our start.
            let handle = unsafe { libc::dlopen(NAME.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
            NonNull::new(handle).map(Library).unwrap_or_else(|| give_up(NAME))
        })
    }

    fn give_up(what: &CStr) -> ! {
        // SAFETY: dlerror(3) gives null or a string that lives until this thread's next call of its family.
        let why = unsafe { libc::dlerror().cast_const().as_ref().map(|why| CStr::from_ptr(why)) };
        let why = why.unwrap_or_default().to_string_lossy();
        eprintln!("godwit-agent: {} cannot be used, is libvirt installed? {why}", what.to_string_lossy());
        std::process::exit(1)
    }

    /// Where the function of that name is. Called by the code below.
    extern "C" fn find(name: *const c_char) -> *const c_void {
        // SAFETY: the code below gives names that it holds, each with a zero at its end.
        let name = unsafe { CStr::from_ptr(name) };
        // SAFETY: the handle is never closed.
        let function = unsafe { libc::dlsym(library().0.as_ptr(), name.as_ptr()) };
        if function.is_null() { give_up(name) } else { function }
    }

    // The first call of a function goes to `godwit_libvirt_find` with its name (r11) and the slot for its address (r10);
    // the arguments' registers are kept, and the call goes on as if it had gone to the library. Later calls go there by
    // the slot. Two threads at once write the same address.
    global_asm!(
        ".pushsection .text.godwit_libvirt, \"ax\", @progbits",
        "godwit_libvirt_find:",
        "push rdi",
        "push rsi",
        "push rdx",
        "push rcx",
        "push r8",
        "push r9",
        "push r10",
        "mov rdi, r11",
        "call {find}",
        "pop r10",
        "mov qword ptr [r10], rax",
        "mov r11, rax",
        "pop r9",
        "pop r8",
        "pop rcx",
        "pop rdx",
        "pop rsi",
        "pop rdi",
        "jmp r11",
        ".popsection",
        find = sym find,
    );

    macro_rules! forward {
        ($($name:literal)*) => {
            $(global_asm!(
                ".pushsection .text.godwit_libvirt, \"ax\", @progbits",
                concat!(".globl ", $name),
                concat!(".hidden ", $name),
                concat!(".type ", $name, ", @function"),
                concat!($name, ":"),
                "jmp qword ptr [rip + 22f]",
                "33:",
                "lea r11, [rip + 44f]",
                "lea r10, [rip + 22f]",
                "jmp godwit_libvirt_find",
                ".popsection",
                ".pushsection .data.godwit_libvirt, \"aw\", @progbits",
                ".balign 8",
                "22: .quad 33b",
                ".popsection",
                ".pushsection .rodata.godwit_libvirt, \"a\", @progbits",
                concat!("44: .asciz \"", $name, "\""),
                ".popsection",
            );)*
        };
    }

    forward! {
        "virConnectClose"
        "virConnectDomainEventDeregisterAny"
        "virConnectDomainEventRegisterAny"
        "virConnectGetDomainCapabilities"
        "virConnectGetLibVersion"
        "virConnectGetVersion"
        "virConnectIsAlive"
        "virConnectListAllDomains"
        "virConnectOpen"
        "virConnectRef"
        "virConnectSetKeepAlive"
        "virDomainAbortJob"
        "virDomainCreate"
        "virDomainDefineXMLFlags"
        "virDomainDestroy"
        "virDomainFree"
        "virDomainGetJobStats"
        "virDomainGetName"
        "virDomainGetState"
        "virDomainGetUUID"
        "virDomainGetXMLDesc"
        "virDomainIsActive"
        "virDomainIsPersistent"
        "virDomainLookupByUUID"
        "virDomainMigrateSetMaxDowntime"
        "virDomainMigrateToURI3"
        "virDomainReset"
        "virDomainResume"
        "virDomainShutdown"
        "virDomainSuspend"
        "virDomainUndefineFlags"
        "virEventRegisterDefaultImpl"
        "virEventRunDefaultImpl"
        "virGetLastError"
        "virSetErrorFunc"
        "virTypedParamsFree"
        "virTypedParamsGetULLong"
    }
}
