//! libvirt's client library, loaded at its first call. It brings sixty libraries with it: loaded at each start of the
//! program they would take longer than a clone of a disk, or than the answer of a worker.
//!
//! The linker finds the functions here and so has no need of the library. A function that is missing in the list below
//! still works: then the library is loaded at the start.

use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uchar, c_uint, c_ulong, c_ulonglong, c_void};
use std::sync::OnceLock;
use virt_sys::{
    virConnectDomainEventGenericCallback, virConnectPtr, virDomainPtr, virErrorFunc, virErrorPtr,
    virFreeCallback, virTypedParameterPtr,
};

/// The name that its makers keep for as long as its functions stay compatible.
const NAME: &str = "libvirt.so.0";

/// Loads the library, or ends the process with the reason, as the system's loader would have done at its start.
pub(super) fn load() -> &'static Library {
    static LIBRARY: OnceLock<Library> = OnceLock::new();
    // SAFETY: the library's own start-up code runs, as it would at our start.
    LIBRARY.get_or_init(|| unsafe { Library::new(NAME) }.unwrap_or_else(|error| give_up(&error)))
}

fn give_up(error: &libloading::Error) -> ! {
    eprintln!("godwit-agent: {NAME} cannot be used, is libvirt installed? {error}");
    std::process::exit(1)
}

/// A function of the library.
///
/// # Safety
/// `F` must be its type.
unsafe fn find<F: Copy>(name: &CStr) -> F {
    // SAFETY: the caller's; the library is never closed.
    unsafe { load().get(name.to_bytes_with_nul()) }.map_or_else(|error| give_up(&error), |function| *function)
}

/// Functions that go on to those of the same name in the library. That their types are right is what virt-sys says.
macro_rules! forward {
    ($(fn $name:ident($($argument:ident: $kind:ty),*) -> $answer:ty;)*) => { $(
        // SAFETY: nobody else defines this name, as the library itself is not linked.
        #[unsafe(no_mangle)]
        unsafe extern "C" fn $name($($argument: $kind),*) -> $answer {
            type Function = unsafe extern "C" fn($($kind),*) -> $answer;
            const _: Function = virt_sys::$name;
            static FOUND: OnceLock<Function> = OnceLock::new();
            let name = const {
                match CStr::from_bytes_with_nul(concat!(stringify!($name), "\0").as_bytes()) {
                    Ok(name) => name,
                    Err(_) => panic!(),
                }
            };
            // SAFETY: the type is right, and the caller keeps to what the function asks for.
            unsafe { FOUND.get_or_init(|| find(name))($($argument),*) }
        }
    )* };
}

forward! {
    fn virConnectClose(connection: virConnectPtr) -> c_int;
    fn virConnectDomainEventDeregisterAny(connection: virConnectPtr, id: c_int) -> c_int;
    fn virConnectDomainEventRegisterAny(connection: virConnectPtr, domain: virDomainPtr, event: c_int, cb: virConnectDomainEventGenericCallback, opaque: *mut c_void, freecb: virFreeCallback) -> c_int;
    fn virConnectGetDomainCapabilities(connection: virConnectPtr, emulator: *const c_char, arch: *const c_char, machine: *const c_char, kind: *const c_char, flags: c_uint) -> *mut c_char;
    fn virConnectGetLibVersion(connection: virConnectPtr, version: *mut c_ulong) -> c_int;
    fn virConnectGetVersion(connection: virConnectPtr, version: *mut c_ulong) -> c_int;
    fn virConnectIsAlive(connection: virConnectPtr) -> c_int;
    fn virConnectListAllDomains(connection: virConnectPtr, domains: *mut *mut virDomainPtr, flags: c_uint) -> c_int;
    fn virConnectOpen(name: *const c_char) -> virConnectPtr;
    fn virConnectRef(connection: virConnectPtr) -> c_int;
    fn virConnectSetKeepAlive(connection: virConnectPtr, interval: c_int, count: c_uint) -> c_int;
    fn virDomainAbortJob(domain: virDomainPtr) -> c_int;
    fn virDomainCreate(domain: virDomainPtr) -> c_int;
    fn virDomainDefineXMLFlags(connection: virConnectPtr, xml: *const c_char, flags: c_uint) -> virDomainPtr;
    fn virDomainDestroy(domain: virDomainPtr) -> c_int;
    fn virDomainFree(domain: virDomainPtr) -> c_int;
    fn virDomainGetJobStats(domain: virDomainPtr, kind: *mut c_int, params: *mut virTypedParameterPtr, count: *mut c_int, flags: c_uint) -> c_int;
    fn virDomainGetName(domain: virDomainPtr) -> *const c_char;
    fn virDomainGetState(domain: virDomainPtr, state: *mut c_int, reason: *mut c_int, flags: c_uint) -> c_int;
    fn virDomainGetUUID(domain: virDomainPtr, uuid: *mut c_uchar) -> c_int;
    fn virDomainGetXMLDesc(domain: virDomainPtr, flags: c_uint) -> *mut c_char;
    fn virDomainIsActive(domain: virDomainPtr) -> c_int;
    fn virDomainIsPersistent(domain: virDomainPtr) -> c_int;
    fn virDomainLookupByUUID(connection: virConnectPtr, uuid: *const c_uchar) -> virDomainPtr;
    fn virDomainMigrateSetMaxDowntime(domain: virDomainPtr, downtime: c_ulonglong, flags: c_uint) -> c_int;
    fn virDomainMigrateToURI3(domain: virDomainPtr, uri: *const c_char, params: virTypedParameterPtr, count: c_uint, flags: c_uint) -> c_int;
    fn virDomainReset(domain: virDomainPtr, flags: c_uint) -> c_int;
    fn virDomainResume(domain: virDomainPtr) -> c_int;
    fn virDomainShutdown(domain: virDomainPtr) -> c_int;
    fn virDomainSuspend(domain: virDomainPtr) -> c_int;
    fn virDomainUndefineFlags(domain: virDomainPtr, flags: c_uint) -> c_int;
    fn virEventRegisterDefaultImpl() -> c_int;
    fn virEventRunDefaultImpl() -> c_int;
    fn virGetLastError() -> virErrorPtr;
    fn virSetErrorFunc(data: *mut c_void, handler: virErrorFunc) -> ();
    fn virTypedParamsFree(params: virTypedParameterPtr, count: c_int) -> ();
    fn virTypedParamsGetULLong(params: virTypedParameterPtr, count: c_int, name: *const c_char, value: *mut c_ulonglong) -> c_int;
}
