//! The libvirt calls that `virt` lacks or gets wrong, and the only unsafe code: events, statistics in bulk, a domain's
//! state, job statistics and the end of a job, and what a stream brings. Everything here is a thin call; what it means is decided elsewhere.
#![allow(
    unsafe_code,
    reason = "libvirt is a C library; every block says why it is sound"
)]

use std::{
    collections::BTreeMap,
    ffi::{CStr, c_char, c_int, c_uint, c_ulonglong, c_void},
    marker::PhantomData,
    panic::{AssertUnwindSafe, catch_unwind},
    ptr, slice,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, error::Error, stream::Stream};
use virt_sys as sys;

/// What libvirt reports by itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Event {
    /// A domain came, went or changed its state.
    Lifecycle {
        of: Named,
        /// libvirt's virDomainEventType.
        event: c_int,
        /// What it means depends on the event.
        detail: c_int,
    },
    /// Something about a domain was changed.
    Metadata {
        of: Named,
        /// The namespace, where it was an element.
        uri: Option<String>,
    },
    /// A guest has rebooted or was reset.
    Rebooted(Named),
    /// A guest has this much memory now, in KiB.
    Balloon(Uuid, u64),
    /// The connection has ended.
    Closed,
}

/// A domain as an event names it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) uuid: Uuid,
    /// Its name when it happened; empty where that is no text.
    pub(super) name: String,
}

/// Takes events on libvirt's event thread: must not block, and must not call libvirt.
pub(super) type Sink = Arc<dyn Fn(Event) + Send + Sync>;

/// Events of one connection, until it is dropped.
pub(super) struct Subscription {
    connection: Connect,
    callbacks: Vec<c_int>,
    closing: bool,
}

type Generic = unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, *mut c_void);
type Lifecycle =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, c_int, *mut c_void) -> c_int;
type Balloon =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_ulonglong, *mut c_void);
type Metadata =
    unsafe extern "C" fn(sys::virConnectPtr, sys::virDomainPtr, c_int, *const c_char, *mut c_void);

impl Subscription {
    /// Asks for the events of all domains of a connection and for its end.
    ///
    /// # Errors
    /// libvirt's, where the driver reports no domain's coming and going. Other events that a driver does not have are done without.
    pub(super) fn new(connection: &Connect, sink: &Sink) -> Result<Self, Error> {
        let mut subscription = Self {
            connection: connection.clone(),
            callbacks: Vec::new(),
            closing: false,
        };
        // SAFETY: libvirt calls a callback with the arguments that belong to the event it was registered for, and takes all
        // kinds through the one generic type; this is what its own macro VIR_DOMAIN_EVENT_CALLBACK does.
        let (lifecycle, balloon, metadata) = unsafe {
            (
                std::mem::transmute::<Lifecycle, Generic>(on_lifecycle),
                std::mem::transmute::<Balloon, Generic>(on_balloon),
                std::mem::transmute::<Metadata, Generic>(on_metadata),
            )
        };
        subscription.add(sys::VIR_DOMAIN_EVENT_ID_LIFECYCLE, lifecycle, sink)?;
        let others: [(_, Generic); 3] = [
            (sys::VIR_DOMAIN_EVENT_ID_REBOOT, on_reboot),
            (sys::VIR_DOMAIN_EVENT_ID_BALLOON_CHANGE, balloon),
            (sys::VIR_DOMAIN_EVENT_ID_METADATA_CHANGE, metadata),
        ];
        for (event, callback) in others {
            if let Err(error) = subscription.add(event, callback, sink) {
                tracing::debug!("this driver has no event {event}: {}", error.message());
            }
        }
        let opaque = boxed(sink);
        // SAFETY: the connection is alive; `opaque` is a boxed Sink, which is what the callback reads and `drop_sink` frees, once.
        let registered = unsafe {
            sys::virConnectRegisterCloseCallback(
                connection.as_ptr(),
                Some(on_close),
                opaque,
                Some(drop_sink),
            )
        };
        match registered {
            0 => subscription.closing = true,
            // SAFETY: libvirt did not take the box, so it is still ours, and nobody else has it.
            _ => unsafe { drop_sink(opaque) },
        }
        Ok(subscription)
    }

    fn add(
        &mut self,
        event: sys::virDomainEventID,
        callback: Generic,
        sink: &Sink,
    ) -> Result<(), Error> {
        let opaque = boxed(sink);
        let event = c_int::try_from(event).unwrap_or(c_int::MAX);
        // SAFETY: the connection is alive; a null domain means all of them; `opaque` is a boxed Sink, which is what the callbacks read
        // and `drop_sink` frees; libvirt keeps it until the callback is deregistered and then frees it once.
        let id = unsafe {
            sys::virConnectDomainEventRegisterAny(
                self.connection.as_ptr(),
                ptr::null_mut(),
                event,
                Some(callback),
                opaque,
                Some(drop_sink),
            )
        };
        if id < 0 {
            let error = Error::last_error();
            // SAFETY: libvirt did not take the box, so it is still ours, and nobody else has it.
            unsafe { drop_sink(opaque) };
            return Err(error);
        }
        self.callbacks.push(id);
        Ok(())
    }
}

impl Drop for Subscription {
    /// Without this libvirt's reference to the connection would keep it open for ever.
    fn drop(&mut self) {
        for callback in &self.callbacks {
            // SAFETY: the connection is alive as long as we hold it, and the id is one that it gave. A failure, as on a broken
            // connection, still takes the callback out of the list on this side.
            unsafe { sys::virConnectDomainEventDeregisterAny(self.connection.as_ptr(), *callback) };
        }
        if self.closing {
            // SAFETY: as above, with the callback that was registered.
            unsafe {
                sys::virConnectUnregisterCloseCallback(self.connection.as_ptr(), Some(on_close))
            };
        }
    }
}

fn boxed(sink: &Sink) -> *mut c_void {
    Box::into_raw(Box::new(Arc::clone(sink))).cast()
}

/// # Safety
/// `opaque` came from [`boxed`] and is not used afterwards.
unsafe extern "C" fn drop_sink(opaque: *mut c_void) {
    let sink = opaque.cast::<Sink>();
    if sink.is_null() {
        return;
    }
    // SAFETY: by the contract, the pointer is a Box<Sink> that nobody else frees.
    let sink = unsafe { Box::from_raw(sink) };
    let _ = catch_unwind(AssertUnwindSafe(|| drop(sink)));
}

/// Hands an event on. Nothing may unwind into C.
///
/// # Safety
/// `opaque` is null or a Box<Sink> that is alive.
unsafe fn deliver(opaque: *mut c_void, event: Option<Event>) {
    // SAFETY: by the contract; libvirt frees the box only when the callback can no longer run.
    let sink = unsafe { opaque.cast::<Sink>().as_ref() };
    if let (Some(sink), Some(event)) = (sink, event) {
        let _ = catch_unwind(AssertUnwindSafe(|| sink(event)));
    }
}

/// # Safety
/// `domain` is null or alive.
unsafe fn uuid(domain: sys::virDomainPtr) -> Option<Uuid> {
    let mut bytes = [0_u8; 16];
    if domain.is_null() {
        return None;
    }
    // SAFETY: the domain is alive, and the buffer has the VIR_UUID_BUFLEN = 16 bytes that are written.
    (unsafe { sys::virDomainGetUUID(domain, bytes.as_mut_ptr()) } == 0)
        .then(|| Uuid::from_bytes(bytes))
}

/// Reads what the object holds by itself: libvirt is not asked.
///
/// # Safety
/// `domain` is null or alive.
unsafe fn named(domain: sys::virDomainPtr) -> Option<Named> {
    // SAFETY: by the contract.
    let uuid = unsafe { uuid(domain) }?;
    // SAFETY: the domain is not null, or it would have no UUID; the name belongs to it and lives as long.
    let name = unsafe { text(sys::virDomainGetName(domain)) };
    Some(Named {
        uuid,
        name: name.unwrap_or_default(),
    })
}

/// # Safety
/// `text` is null or ends with a NUL, and is alive.
unsafe fn text(text: *const c_char) -> Option<String> {
    if text.is_null() {
        return None;
    }
    // SAFETY: by the contract.
    let text = unsafe { CStr::from_ptr(text) };
    text.to_str().ok().map(str::to_owned)
}

unsafe extern "C" fn on_lifecycle(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    event: c_int,
    detail: c_int,
    opaque: *mut c_void,
) -> c_int {
    // SAFETY: libvirt passes a domain that is alive during the call, and the box given at registration.
    unsafe {
        let of = named(domain);
        deliver(opaque, of.map(|of| Event::Lifecycle { of, event, detail }));
    };
    0
}

unsafe extern "C" fn on_reboot(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a domain that is alive during the call, and the box given at registration.
    unsafe { deliver(opaque, named(domain).map(Event::Rebooted)) };
}

unsafe extern "C" fn on_balloon(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    actual: c_ulonglong,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a domain that is alive during the call, and the box given at registration.
    unsafe {
        deliver(
            opaque,
            uuid(domain).map(|uuid| Event::Balloon(uuid, actual)),
        )
    };
}

unsafe extern "C" fn on_metadata(
    _: sys::virConnectPtr,
    domain: sys::virDomainPtr,
    _kind: c_int,
    uri: *const c_char,
    opaque: *mut c_void,
) {
    // SAFETY: libvirt passes a domain and a text or null that are alive during the call, and the box given at registration.
    unsafe {
        let uri = text(uri);
        deliver(opaque, named(domain).map(|of| Event::Metadata { of, uri }));
    };
}

unsafe extern "C" fn on_close(_: sys::virConnectPtr, _reason: c_int, opaque: *mut c_void) {
    // SAFETY: libvirt passes the box given at registration.
    unsafe { deliver(opaque, Some(Event::Closed)) };
}

/// A domain in an answer of bulk statistics, and the groups of figures that were asked for as far as the driver has them.
pub(super) struct Stats {
    pub(super) domain: Domain,
    pub(super) state: Option<c_int>,
    pub(super) reason: Option<c_int>,
    pub(super) memory_kib: Option<u64>,
    pub(super) max_memory_kib: Option<u64>,
    pub(super) vcpus: Option<u64>,
    pub(super) max_vcpus: Option<u64>,
}

/// Reads statistics of all domains, or of those that `filter` leaves, in one call.
///
/// # Errors
/// libvirt's; VIR_ERR_NO_SUPPORT where the driver has no bulk statistics.
pub(super) fn bulk_stats(
    connection: &Connect,
    groups: sys::virDomainStatsTypes,
    filter: sys::virConnectGetAllDomainStatsFlags,
) -> Result<Vec<Stats>, Error> {
    let mut records: *mut sys::virDomainStatsRecordPtr = ptr::null_mut();
    // SAFETY: the connection is alive, and `records` takes the array that libvirt allocates.
    let count = unsafe {
        sys::virConnectGetAllDomainStats(connection.as_ptr(), groups, &raw mut records, filter)
    };
    let count = usize::try_from(count).map_err(|_| Error::last_error())?;
    if records.is_null() {
        return Ok(Vec::new());
    }
    // SAFETY: libvirt returned `count` pointers at `records`, and a null one behind them.
    let pointers = unsafe { slice::from_raw_parts(records, count) };
    // SAFETY: each pointer is null or a record that is alive until the list is freed below.
    let stats = pointers
        .iter()
        .filter_map(|record| unsafe { record.as_ref() })
        .filter_map(stats)
        .collect();
    // SAFETY: the list came from libvirt and is freed once; what `stats` took out holds references of its own.
    unsafe { sys::virDomainStatsRecordListFree(records) };
    Ok(stats)
}

fn stats(record: &sys::virDomainStatsRecord) -> Option<Stats> {
    // SAFETY: a record's domain is null or alive as long as the record; the reference taken here belongs to the Domain, which gives it back.
    if record.dom.is_null() || unsafe { sys::virDomainRef(record.dom) } != 0 {
        return None;
    }
    let mut stats = Stats {
        // SAFETY: see above: alive, and with a reference for the Domain.
        domain: unsafe { Domain::from_ptr(record.dom) },
        state: None,
        reason: None,
        memory_kib: None,
        max_memory_kib: None,
        vcpus: None,
        max_vcpus: None,
    };
    // SAFETY: a record's parameters are an array of the length that it gives.
    unsafe {
        each_number(record.params, record.nparams, |name, value| match name {
            b"state.state" => stats.state = c_int::try_from(value).ok(),
            b"state.reason" => stats.reason = c_int::try_from(value).ok(),
            b"balloon.current" => stats.memory_kib = Some(value),
            b"balloon.maximum" => stats.max_memory_kib = Some(value),
            b"vcpu.current" => stats.vcpus = Some(value),
            b"vcpu.maximum" => stats.max_vcpus = Some(value),
            _ => {}
        });
    }
    Some(stats)
}

/// Calls `take` with each whole, not negative number among typed parameters.
///
/// # Safety
/// `parameters` is null or an array of `count` elements.
unsafe fn each_number(
    parameters: sys::virTypedParameterPtr,
    count: c_int,
    mut take: impl FnMut(&[u8], u64),
) {
    let count = usize::try_from(count).unwrap_or_default();
    if parameters.is_null() {
        return;
    }
    // SAFETY: by the contract.
    for parameter in unsafe { slice::from_raw_parts(parameters, count) } {
        // SAFETY: the name is an array of 80 bytes inside the element, c_char and u8 have one layout, and the search for its end
        // does not leave it.
        let name = unsafe {
            slice::from_raw_parts(parameter.field.as_ptr().cast::<u8>(), parameter.field.len())
        };
        let Ok(name) = CStr::from_bytes_until_nul(name) else {
            continue;
        };
        let value = parameter.value;
        // SAFETY: the type says which field of the union libvirt has written.
        let number = unsafe {
            match c_uint::try_from(parameter.type_).unwrap_or_default() {
                sys::VIR_TYPED_PARAM_INT => u64::try_from(value.i).ok(),
                sys::VIR_TYPED_PARAM_UINT => Some(u64::from(value.ui)),
                sys::VIR_TYPED_PARAM_LLONG => u64::try_from(value.l).ok(),
                sys::VIR_TYPED_PARAM_ULLONG => Some(value.ul),
                _ => None,
            }
        };
        if let Some(number) = number {
            take(name.to_bytes(), number);
        }
    }
}

/// Returns a domain's state and the reason for it, in libvirt's numbers.
///
/// # Errors
/// libvirt's.
pub(super) fn state(domain: &Domain) -> Result<(c_int, c_int), Error> {
    let (mut state, mut reason) = (0, 0);
    // SAFETY: the domain is alive, and both places can be written.
    match unsafe { sys::virDomainGetState(domain.as_ptr(), &raw mut state, &raw mut reason, 0) } {
        0 => Ok((state, reason)),
        _ => Err(Error::last_error()),
    }
}

/// A domain's job under way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Job {
    /// libvirt's virDomainJobType; 0 where there is no job.
    pub(super) kind: c_int,
    /// libvirt's virDomainJobOperation.
    pub(super) operation: u64,
    /// Milliseconds since it began.
    pub(super) elapsed_ms: u64,
    /// Bytes in all.
    pub(super) total: u64,
    /// Bytes done.
    pub(super) processed: u64,
    /// Bytes to do.
    pub(super) remaining: u64,
    /// Bytes a second, memory and disks.
    pub(super) rate: u64,
    /// Memory pages that the guest writes in a second.
    pub(super) dirty_rate: u64,
    /// Bytes in a page.
    pub(super) page_size: u64,
    /// How many times memory has been gone through.
    pub(super) iteration: u64,
}

/// Reads how far a domain's job is. `virt`'s own call makes a Vec of memory that C allocated, or of none.
///
/// # Errors
/// libvirt's; VIR_ERR_NO_SUPPORT where the driver does not say.
pub(super) fn job(domain: &Domain) -> Result<Job, Error> {
    let (mut kind, mut count) = (0, 0);
    let mut parameters: sys::virTypedParameterPtr = ptr::null_mut();
    // SAFETY: the domain is alive, and the places take what libvirt writes and allocates.
    let done = unsafe {
        sys::virDomainGetJobStats(
            domain.as_ptr(),
            &raw mut kind,
            &raw mut parameters,
            &raw mut count,
            0,
        )
    };
    if done != 0 {
        return Err(Error::last_error());
    }
    let mut job = Job {
        kind,
        ..Job::default()
    };
    // SAFETY: libvirt returned an array of `count` elements, or null.
    unsafe {
        each_number(parameters, count, |name, value| match name {
            b"operation" => job.operation = value,
            b"time_elapsed" => job.elapsed_ms = value,
            b"data_total" => job.total = value,
            b"data_processed" => job.processed = value,
            b"data_remaining" => job.remaining = value,
            b"memory_bps" | b"disk_bps" => job.rate = job.rate.saturating_add(value),
            b"memory_dirty_rate" => job.dirty_rate = value,
            b"memory_page_size" => job.page_size = value,
            b"memory_iteration" => job.iteration = value,
            _ => {}
        });
    }
    // SAFETY: the array came from libvirt with this count and is freed once; null is allowed.
    unsafe { sys::virTypedParamsFree(parameters, count) };
    Ok(job)
}

/// Writes a domain's memory to a file and stops it.
///
/// # Errors
/// libvirt's; also where the path holds a NUL.
pub(super) fn save(domain: &Domain, path: &str) -> Result<(), Error> {
    let path = std::ffi::CString::new(path)?;
    // SAFETY: the domain and the path are alive during the call; a null XML means the domain's own.
    match unsafe { sys::virDomainSaveFlags(domain.as_ptr(), path.as_ptr(), ptr::null(), 0) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// Returns the XML in the image that libvirt keeps for a domain, without secrets.
///
/// # Errors
/// libvirt's: VIR_ERR_NO_SUPPORT where the driver shows none, VIR_ERR_OPERATION_FAILED where the image is damaged.
pub(super) fn managed_save_xml(domain: &Domain) -> Result<String, Error> {
    // SAFETY: the domain is alive.
    let xml = unsafe { sys::virDomainManagedSaveGetXMLDesc(domain.as_ptr(), 0) };
    if xml.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: libvirt returned a string that ends with a NUL and is ours.
    let text = unsafe { CStr::from_ptr(xml) }
        .to_string_lossy()
        .into_owned();
    // SAFETY: it was allocated by libvirt with malloc, is freed once, and nothing points into it any more.
    unsafe { nix::libc::free(xml.cast()) };
    Ok(text)
}

/// Ends a domain's job.
///
/// # Errors
/// libvirt's; VIR_ERR_OPERATION_INVALID where there is no job.
pub(super) fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is alive.
    match unsafe { sys::virDomainAbortJob(domain.as_ptr()) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// Says how many seconds libvirt waits for the answers of a guest's agent from now on.
///
/// # Errors
/// libvirt's; VIR_ERR_NO_SUPPORT where the driver knows no agents.
pub(super) fn set_agent_patience(domain: &Domain, seconds: c_int) -> Result<(), Error> {
    // SAFETY: the domain is alive.
    match unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) } {
        0 => Ok(()),
        _ => Err(Error::last_error()),
    }
}

/// Is told that a stream has something, or that it is over. On libvirt's event thread: must not block.
pub(super) type Attendant = Arc<dyn Fn(Ready<'_>) + Send + Sync>;

/// Attendants by their number. libvirt is given the number instead of a pointer: some of its versions never free what they were given, and
/// none says when a callback has run for the last time.
static ATTENDANTS: Mutex<BTreeMap<usize, Attendant>> = Mutex::new(BTreeMap::new());
static NEXT_ATTENDANT: AtomicUsize = AtomicUsize::new(1);

/// A stream that is looked after until it is dropped, and then aborted: a stream that is neither aborted nor finished is never freed.
/// `virt`'s own callback keeps a pointer to a `Stream` that may have moved.
pub(super) struct Attended {
    stream: Stream,
    number: usize,
}

impl Attended {
    /// Looks after a stream that is open and does not block.
    ///
    /// # Errors
    /// libvirt's.
    pub(super) fn new(stream: Stream, attendant: Attendant) -> Result<Self, Error> {
        let number = NEXT_ATTENDANT.fetch_add(1, Ordering::Relaxed);
        attendants().insert(number, attendant);
        let attended = Self { stream, number };
        let events = sys::VIR_STREAM_EVENT_READABLE
            | sys::VIR_STREAM_EVENT_ERROR
            | sys::VIR_STREAM_EVENT_HANGUP;
        // SAFETY: the stream is alive; the callback takes the opaque value as a number and never as a pointer, so it needs no freeing
        // and may come at any time.
        let added = unsafe {
            sys::virStreamEventAddCallback(
                attended.stream.as_ptr(),
                c_int::try_from(events).unwrap_or(c_int::MAX),
                Some(on_stream),
                ptr::without_provenance_mut(number),
                None,
            )
        };
        if added == 0 {
            Ok(attended)
        } else {
            Err(Error::last_error())
        }
    }

    /// Sends as much as the stream takes; nothing where that would block and the driver says so. libvirt's remote driver blocks nevertheless.
    ///
    /// # Errors
    /// libvirt's.
    pub(super) fn send(&self, bytes: &[u8]) -> Result<Option<usize>, Error> {
        self.stream
            .send(bytes)
            .map(|sent| usize::try_from(sent).ok())
    }
}

impl Drop for Attended {
    fn drop(&mut self) {
        // SAFETY: the stream is alive. Neither call does harm where there is no callback or the stream is over.
        unsafe {
            sys::virStreamEventRemoveCallback(self.stream.as_ptr());
            sys::virStreamAbort(self.stream.as_ptr());
        }
        attendants().remove(&self.number);
    }
}

/// A stream inside its callback.
pub(super) struct Ready<'a> {
    stream: sys::virStreamPtr,
    _callback: PhantomData<&'a ()>,
}

impl Ready<'_> {
    /// Takes what has come, and returns its length: `None` where nothing has, 0 where nothing will.
    ///
    /// # Errors
    /// libvirt's: the stream is over.
    pub(super) fn receive(&self, buffer: &mut [u8]) -> Result<Option<usize>, Error> {
        // SAFETY: the stream is alive during the callback, and the buffer has the length that is given.
        let received =
            unsafe { sys::virStreamRecv(self.stream, buffer.as_mut_ptr().cast(), buffer.len()) };
        match received {
            -1 => Err(Error::last_error()),
            received => Ok(usize::try_from(received).ok()),
        }
    }

    /// Asks for no more callbacks: a stream that is over would bring one after the other.
    pub(super) fn hush(&self) {
        // SAFETY: the stream is alive during the callback, from which its events may be changed.
        unsafe { sys::virStreamEventUpdateCallback(self.stream, 0) };
    }
}

fn attendants() -> MutexGuard<'static, BTreeMap<usize, Attendant>> {
    ATTENDANTS.lock().unwrap_or_else(PoisonError::into_inner)
}

unsafe extern "C" fn on_stream(stream: sys::virStreamPtr, _events: c_int, opaque: *mut c_void) {
    let attendant = attendants().get(&opaque.addr()).cloned();
    let ready = Ready {
        stream,
        _callback: PhantomData,
    };
    if let Some(attendant) = attendant {
        let _ = catch_unwind(AssertUnwindSafe(|| attendant(ready)));
    }
}
