//! What only virt-sys offers: domain events, a job's figures, aborting a job. All of this crate's unsafe code that
//! concerns libvirt is here and in [`super::library`], behind safe functions.

use std::ffi::{CStr, c_int, c_uint, c_ulonglong, c_void};
use std::ptr;
use uuid::Uuid;
use virt::connect::Connect;
use virt::domain::Domain;
use virt::error::Error;
use virt_sys as sys;

/// Figures of a migration job. What QEMU does not tell is 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct JobFigures {
    pub(super) memory_total_bytes: u64,
    pub(super) memory_processed_bytes: u64,
    pub(super) memory_remaining_bytes: u64,
    pub(super) iterations: u64,
    pub(super) elapsed_ms: u64,
    pub(super) downtime_ms: u64,
}

/// A registered callback; dropping it takes the callback back.
pub(super) struct Subscription {
    connection: Connect,
    id: c_int,
}

impl Drop for Subscription {
    fn drop(&mut self) {
        // SAFETY: the connection is open while we hold our reference, and the id came from it. libvirt frees the
        // callback's data itself once no call of it is under way. The error of a dead connection is of no use.
        unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), self.id) };
    }
}

type OnLifecycle = Box<dyn Fn(Uuid) + Send + Sync>;
type OnJobCompleted = Box<dyn Fn(JobFigures) + Send + Sync>;

/// Calls `callback` with a domain's UUID whenever its life takes a turn, from the event loop's thread.
pub(super) fn on_lifecycle(connection: &Connect, callback: OnLifecycle) -> Result<Subscription, Error> {
    unsafe extern "C" fn call(
        _connection: sys::virConnectPtr,
        domain: sys::virDomainPtr,
        _event: c_int,
        _detail: c_int,
        data: *mut c_void,
    ) -> c_int {
        let mut bytes = [0; 16];
        // SAFETY: libvirt hands a valid domain for the length of the call; a UUID has 16 bytes. `data` is what was
        // registered below, alive until `free` is called.
        unsafe {
            if sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) == 0 {
                (*data.cast::<OnLifecycle>())(Uuid::from_bytes(bytes));
            }
        }
        0
    }
    // SAFETY: virConnectDomainEventRegisterAny takes every kind of callback as this type and calls it as the type
    // that belongs to the event id, which for LIFECYCLE is that of `call` (virConnectDomainEventCallback).
    let generic = unsafe {
        std::mem::transmute::<
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int,
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(call)
    };
    register(connection, ptr::null_mut(), sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, generic, callback)
}

/// Calls `callback` with the last figures of each job of `domain` that ends, from the event loop's thread.
pub(super) fn on_job_completed(
    connection: &Connect,
    domain: &Domain,
    callback: OnJobCompleted,
) -> Result<Subscription, Error> {
    unsafe extern "C" fn call(
        _connection: sys::virConnectPtr,
        _domain: sys::virDomainPtr,
        params: sys::virTypedParameterPtr,
        count: c_int,
        data: *mut c_void,
    ) {
        // SAFETY: libvirt hands `count` valid parameters for the length of the call. `data` is what was registered
        // below, alive until `free` is called.
        unsafe { (*data.cast::<OnJobCompleted>())(read_figures(params, count)) }
    }
    // SAFETY: as in `on_lifecycle`; for JOB_COMPLETED the type is virConnectDomainEventJobCompletedCallback.
    let generic = unsafe {
        std::mem::transmute::<
            unsafe extern "C" fn(
                sys::virConnectPtr,
                sys::virDomainPtr,
                sys::virTypedParameterPtr,
                c_int,
                *mut c_void,
            ),
            unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
        >(call)
    };
    // SAFETY: the pointer is used during the call only; `domain` outlives it.
    let of_domain = unsafe { domain.as_ptr() };
    register(connection, of_domain, sys::VIR_DOMAIN_EVENT_ID_JOB_COMPLETED, generic, callback)
}

fn register<F>(
    connection: &Connect,
    domain: sys::virDomainPtr,
    event: sys::virDomainEventID,
    call: unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void),
    callback: F,
) -> Result<Subscription, Error> {
    unsafe extern "C" fn free<F>(data: *mut c_void) {
        // SAFETY: libvirt calls this once, with the box that was registered below.
        drop(unsafe { Box::from_raw(data.cast::<F>()) });
    }
    let data = Box::into_raw(Box::new(callback)).cast::<c_void>();
    // SAFETY: the connection is open, `domain` is null or one of its domains, and `data` is a box of what `call`
    // expects, which libvirt owns from here on if it answers with an id.
    let id = unsafe {
        sys::virConnectDomainEventRegisterAny(
            connection.as_ptr(),
            domain,
            event as c_int,
            Some(call),
            data,
            Some(free::<F>),
        )
    };
    if id < 0 {
        let error = Error::last_error();
        // SAFETY: libvirt did not take the box.
        unsafe { free::<F>(data) };
        return Err(error);
    }
    Ok(Subscription { connection: connection.clone(), id })
}

/// The figures of the job that runs; all 0 when there is none. (`Domain::job_stats` of virt 0.5.0 makes a `Vec` of
/// libvirt's null pointer then, which aborts a debug build.)
pub(super) fn job_figures(domain: &Domain) -> Result<JobFigures, Error> {
    let (mut kind, mut count): (c_int, c_int) = (0, 0);
    let mut params: sys::virTypedParameterPtr = ptr::null_mut();
    // SAFETY: the domain is valid, and all out parameters live on this stack.
    let answer = unsafe {
        sys::virDomainGetJobStats(domain.as_ptr(), &mut kind, &mut params, &mut count, 0 as c_uint)
    };
    if answer < 0 {
        return Err(Error::last_error());
    }
    // SAFETY: after a success `params` are `count` parameters (null and 0 when there is no job) that we own.
    unsafe {
        let figures = read_figures(params, count);
        sys::virTypedParamsFree(params, count);
        Ok(figures)
    }
}

/// Asks libvirt to end the job that runs on `domain`, a migration for example.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is valid for the length of the call.
    match unsafe { sys::virDomainAbortJob(domain.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// # Safety
/// `params` must point to `count` valid parameters, or be null with a count of 0.
unsafe fn read_figures(params: sys::virTypedParameterPtr, count: c_int) -> JobFigures {
    let read = |name: &CStr| {
        let mut value: c_ulonglong = 0;
        // SAFETY: the caller vouches for `params`; the name ends in a zero, and `value` outlives the call. What is
        // missing or of another type leaves `value` as it is.
        unsafe { sys::virTypedParamsGetULLong(params, count, name.as_ptr(), &mut value) };
        value
    };
    JobFigures {
        memory_total_bytes: read(sys::VIR_DOMAIN_JOB_MEMORY_TOTAL),
        memory_processed_bytes: read(sys::VIR_DOMAIN_JOB_MEMORY_PROCESSED),
        memory_remaining_bytes: read(sys::VIR_DOMAIN_JOB_MEMORY_REMAINING),
        iterations: read(sys::VIR_DOMAIN_JOB_MEMORY_ITERATION),
        elapsed_ms: read(sys::VIR_DOMAIN_JOB_TIME_ELAPSED),
        downtime_ms: read(sys::VIR_DOMAIN_JOB_DOWNTIME),
    }
}
