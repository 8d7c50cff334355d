//! Keeps the inventory true: one thread for each hypervisor, with a connection of its own, that reconnects for ever.
//!
//! ```text
//! connect --> full reading --> wait for events, the next full reading, or the next sign of life
//!    ^                                       |
//!    '---- pause, growing to 5 s <-- connection lost
//! ```

use std::{
    sync::{Arc, Once},
    thread,
    time::{Duration, Instant},
};

use uuid::Uuid;
use virt::{
    connect::Connect,
    error::Error,
    event::{event_add_timeout, event_register_default_impl, event_run_default_impl},
};
use virt_sys as sys;

use super::{
    connections::Hypervisor,
    faults,
    ffi::{Event, Sink, Subscription},
    readings::{self, Survey},
};

/// From the beginning of one full reading to the next; events bring what happens in between.
const REFRESH: Duration = Duration::from_secs(10);
/// Full readings take at most one part in so many of the time: a host with very many domains is read less often.
const SHARE: u32 = 20;
/// How often libvirt is asked for a sign of life between readings.
const PROBE: Duration = Duration::from_secs(2);
/// The pause after the first failure to connect, which doubles up to the longest.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// The event loop wakes at least so often, in milliseconds.
const EVENT_TICK: i32 = 1000;

/// Starts libvirt's event loop, once for the process and before the first connection.
pub(super) fn start_events() {
    static STARTED: Once = Once::new();
    STARTED.call_once(|| {
        // libvirt would print every error to stderr besides returning it.
        virt::error::clear_error_callback();
        if let Err(error) = event_register_default_impl() {
            tracing::error!(
                "libvirt's event loop cannot be set up, changes are seen late: {}",
                error.message()
            );
            return;
        }
        if let Err(error) = event_add_timeout(EVENT_TICK, |_, _| {}, std::ptr::null_mut()) {
            tracing::warn!("libvirt's event loop has no tick: {}", error.message());
        }
        let run = || loop {
            if let Err(error) = event_run_default_impl() {
                tracing::error!("libvirt's event loop: {}", error.message());
                thread::sleep(Duration::from_millis(100));
            }
        };
        if let Err(error) = thread::Builder::new()
            .name("libvirt-events".to_owned())
            .spawn(run)
        {
            tracing::error!("no thread for libvirt's event loop, changes are seen late: {error}");
        }
    });
}

/// Starts the thread that keeps a hypervisor's part of the inventory.
pub(super) fn start(hypervisor: &Arc<Hypervisor>) {
    let reader = Reader {
        hypervisor: Arc::clone(hypervisor),
        survey: Survey::default(),
    };
    let name = format!("inventory-{}", hypervisor.index);
    if let Err(error) = thread::Builder::new()
        .name(name)
        .spawn(move || reader.keep())
    {
        hypervisor
            .inventory
            .lost(hypervisor.index, format!("no thread for it: {error}"));
    }
}

struct Reader {
    hypervisor: Arc<Hypervisor>,
    survey: Survey,
}

impl Reader {
    fn keep(mut self) {
        let hypervisor = Arc::clone(&self.hypervisor);
        let mut pause = FIRST_PAUSE;
        loop {
            let begin = Instant::now();
            let trouble = match hypervisor.open_for_reader() {
                Err(error) => faults::unreachable(&error),
                Ok(connection) => match self.attend(&connection) {
                    None => return,
                    Some(error) => {
                        format!(
                            "the connection to libvirt is lost, reconnecting ({})",
                            faults::tidy(error.message())
                        )
                    }
                },
            };
            if hypervisor.inventory.trouble(hypervisor.index).as_deref() != Some(trouble.as_str()) {
                tracing::warn!("{}: {trouble}", hypervisor.uri);
            }
            hypervisor.inventory.lost(hypervisor.index, trouble);
            if begin.elapsed() > LONGEST_PAUSE {
                pause = FIRST_PAUSE;
            }
            if self.stopped_within(pause) {
                return;
            }
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    fn stopped_within(&self, length: Duration) -> bool {
        let until = Instant::now() + length;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            if self.hypervisor.bell.listen(left).stop {
                return true;
            }
            if left.is_zero() {
                return false;
            }
        }
    }

    /// Serves one connection until it breaks, and returns why; nothing where the reader should end.
    fn attend(&mut self, connection: &Connect) -> Option<Error> {
        let hypervisor = Arc::clone(&self.hypervisor);
        let alive = || connection.is_alive().unwrap_or(false);
        let software = match self.ask(|| readings::software(connection)) {
            Ok(software) => software,
            Err(error) => return Some(error),
        };
        tracing::info!(
            "{}: connected to {} {}, libvirt {}",
            hypervisor.uri,
            software.driver,
            software.version,
            software.libvirt
        );
        let _events = match self.ask(|| Subscription::new(connection, &self.sink())) {
            Ok(subscription) => Some(subscription),
            Err(error) if !alive() => return Some(error),
            Err(error) => {
                tracing::warn!(
                    "{}: no events, changes are seen late: {}",
                    hypervisor.uri,
                    error.message()
                );
                None
            }
        };
        hypervisor.inventory.connected(hypervisor.index, software);
        let mut due = Instant::now();
        let mut earliest = due;
        loop {
            let now = Instant::now();
            let asked = if now >= due {
                let read = self.read_all(connection);
                let rest = now.elapsed() * SHARE;
                (earliest, due) = (now + rest, now + REFRESH.max(rest));
                let trouble = read
                    .as_ref()
                    .err()
                    .map(|error| faults::tidy(error.message()));
                hypervisor
                    .inventory
                    .troubled(hypervisor.index, trouble.unwrap_or_default());
                read
            } else {
                self.ask(|| connection.lib_version().map(drop))
            };
            if let Err(error) = asked
                && !alive()
            {
                return Some(error);
            }
            let until = (Instant::now() + PROBE).min(due);
            loop {
                let left = until.min(due).saturating_duration_since(Instant::now());
                let news = hypervisor.bell.listen(left);
                if news.stop {
                    return None;
                }
                if news.all {
                    due = due.min(earliest);
                }
                let followed = news
                    .changed
                    .iter()
                    .try_for_each(|uuid| self.read_one(connection, *uuid));
                // The next sign of life, asked for at once, tells a broken connection from a broken domain.
                if left.is_zero() || news.closed || followed.is_err() {
                    break;
                }
            }
        }
    }

    fn sink(&self) -> Sink {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let bell = Arc::clone(&self.hypervisor.bell);
        Arc::new(move |event| match event {
            Event::Changed(uuid) => bell.changed(uuid),
            Event::Rebooted(uuid) => {
                inventory.rebooted(index, uuid);
                bell.changed(uuid);
            }
            Event::Balloon(uuid, kib) => inventory.balloon(index, uuid, kib),
            Event::Closed => bell.closed(),
        })
    }

    fn read_all(&mut self, connection: &Connect) -> Result<(), Error> {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let began = Instant::now();
        let read = self
            .survey
            .all(connection, (&inventory, index), &|| inventory.asking(index));
        inventory.answered(index);
        let readings = read?;
        let count = readings.len();
        let period = REFRESH.max(began.elapsed() * SHARE);
        inventory.replace(index, readings, began, period);
        tracing::debug!(
            "{}: {count} domains read in {:?}",
            self.hypervisor.uri,
            began.elapsed()
        );
        let node = self.ask(|| readings::node(connection))?;
        inventory.node(index, node);
        Ok(())
    }

    fn read_one(&mut self, connection: &Connect, uuid: Uuid) -> Result<(), Error> {
        let (inventory, index) = (
            Arc::clone(&self.hypervisor.inventory),
            self.hypervisor.index,
        );
        let began = Instant::now();
        inventory.asking(index);
        let read = match readings::find(connection, uuid) {
            Ok(Some(domain)) => readings::one(&domain, (&inventory, index)),
            Ok(None) => Ok(None),
            Err(error) => Err(error),
        };
        inventory.answered(index);
        match read {
            Ok(Some(reading)) => drop(inventory.put(index, reading, began)),
            Ok(None) => inventory.gone(index, uuid, began),
            Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => {
                inventory.gone(index, uuid, began)
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn ask<T>(&self, question: impl FnOnce() -> Result<T, Error>) -> Result<T, Error> {
        self.hypervisor.inventory.asking(self.hypervisor.index);
        let answer = question();
        self.hypervisor.inventory.answered(self.hypervisor.index);
        answer
    }
}
