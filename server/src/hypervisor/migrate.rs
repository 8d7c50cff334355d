//! Live migration, peer to peer: the two libvirts move the guest, this host watches and says where it is in the end.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant as Moment},
};

use tokio::{sync::watch, time::Instant};
use virt::{
    domain::{Domain, MigrateParameters},
    error::Error,
};
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{Code, DomainState, Fault, Progress},
};

use super::{
    Facts, Hypervisors, Target,
    connections::{Call, Class, Hypervisor},
    faults,
    lanes::{Held, Key},
    progress,
    sense::{Act, sense},
    verbs::Visit,
};

/// How long a migration waits for its domain's lane.
const LANE_WAIT: Duration = Duration::from_secs(30);
/// How often the limit on downtime is tried: libvirt takes it only once the migration is under way.
const DOWNTIME_TRIES: u32 = 10;
/// After a failure libvirt lets the guest run on by itself; this long it is given.
const RESUME_TIME: Duration = Duration::from_secs(3);
const RESUME_LOOK: Duration = Duration::from_millis(200);

/// How a guest gets to another host.
#[derive(Clone, Debug)]
pub(crate) enum Route {
    /// This host's libvirt dials the other's at this URI. The guest runs there as soon as it has arrived.
    Direct(String),
    /// This host's libvirt finds the other's at this socket. The guest waits there for our word.
    Channel(PathBuf),
}

impl Route {
    /// Returns the URI that a libvirt at `own` dials, and whether the guest waits there.
    fn of(self, own: &str) -> Result<Way, Fault> {
        match self {
            Self::Direct(uri) if uri.contains('\0') => Err(Fault::new(
                Code::BadRequest,
                "the destination's URI holds a NUL",
            )),
            Self::Direct(uri) => Ok(Way { uri, waits: false }),
            Self::Channel(socket) => match by_socket(own, &socket) {
                Some(uri) => Ok(Way { uri, waits: true }),
                None => Err(Fault::new(
                    Code::Unsupported,
                    format!("{own} moves no guests through the channel"),
                )),
            },
        }
    }
}

struct Way {
    uri: String,
    waits: bool,
}

/// A domain that is about to leave: its lane is held, and it is active.
pub(crate) struct Departing {
    hypervisor: Arc<Hypervisor>,
    target: Target,
    lane: Held,
    ran: bool,
}

impl Departing {
    /// What is known of it.
    pub(crate) fn facts(&self) -> &Facts {
        &self.target.facts
    }

    /// Whether its virtual CPUs run.
    pub(crate) fn ran(&self) -> bool {
        self.ran
    }
}

impl Hypervisors {
    /// Holds a domain that is to move: from here on nobody else's work on it comes between.
    ///
    /// # Errors
    /// `Busy` where other work on it does not end, and what a change can be refused for.
    pub(crate) async fn depart(&self, target: Target) -> Result<Departing, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let deadline = Instant::now() + LANE_WAIT;
        let key = Key::Domain(target.facts.uuid);
        let lane = hypervisor.lanes.take(key, deadline).await?;
        lane.without_deadline();
        let (host, mover) = (Arc::clone(&hypervisor), target.clone());
        let look = move |call: &Call| {
            let visit = Visit::new(call, &host, &mover)?;
            sense(Act::Migrate, &visit.facts.name, visit.state)?;
            Ok((visit.facts, visit.state))
        };
        let limit = Some(Instant::now() + LANE_WAIT);
        let (facts, state) = hypervisor.run(Class::Read, Vec::new(), limit, look).await?;
        Ok(Departing {
            hypervisor,
            target: Target { facts, ..target },
            lane,
            ran: state != DomainState::Paused,
        })
    }

    /// Moves a domain to another libvirt, which this host's libvirt dials, and ends when that has ended.
    /// `bandwidth` is in MiB/s, `downtime_ms` in milliseconds.
    ///
    /// # Errors
    /// With the domain still at home: `Refused`, and what a change can be refused for. `Unknown` where it is not known where it runs.
    pub(crate) async fn migrate(
        &self,
        departing: Departing,
        route: Route,
        bandwidth: Option<u64>,
        downtime_ms: Option<u64>,
        progress: watch::Sender<Option<Progress>>,
    ) -> Result<(), Fault> {
        let Departing {
            hypervisor,
            target,
            lane,
            ran,
        } = departing;
        let route = route.of(&hypervisor.uri)?;
        let (host, mover) = (Arc::clone(&hypervisor), target.clone());
        let running = hypervisor.run(Class::Move, vec![lane], None, move |call| {
            leave(call, &host, &mover, &route, ran, bandwidth)
        });
        let mut limit = Downtime::new(downtime_ms, target.facts.name.clone());
        let limited = move |domain: &Domain| limit.set(domain);
        tokio::select! {
            outcome = running => outcome,
            never = progress::report(&hypervisor, &target, limited, &progress) => match never {},
        }
    }
}

/// The limit on a guest's silence when it changes over, which libvirt takes only once its migration is under way.
struct Downtime {
    wanted: Option<u64>,
    tries: u32,
    name: DomainName,
}

impl Downtime {
    fn new(wanted: Option<u64>, name: DomainName) -> Self {
        Self {
            wanted,
            tries: 0,
            name,
        }
    }

    fn set(&mut self, domain: &Domain) {
        let Some(limit) = self.wanted else { return };
        let Err(error) = domain.migrate_set_max_downtime(limit, 0) else {
            self.wanted = None;
            return;
        };
        self.tries += 1;
        if self.tries == DOWNTIME_TRIES {
            tracing::warn!(
                "'{}' migrates without its limit on downtime: {}",
                self.name,
                error.message()
            );
            self.wanted = None;
        }
    }
}

fn leave(
    call: &Call,
    host: &Hypervisor,
    target: &Target,
    route: &Way,
    ran: bool,
    bandwidth: Option<u64>,
) -> Result<(), Fault> {
    let visit = Visit::new(call, host, target)?;
    let name = visit.facts.name.clone();
    sense(Act::Migrate, &name, visit.state)?;
    if ran == (visit.state == DomainState::Paused) {
        return Err(Fault::new(
            Code::Busy,
            format!("'{name}' was paused or unpaused at this moment; nothing has begun, ask again"),
        ));
    }
    let hostname = visit.ok(call.connection.hostname())?;
    if !route.waits && (route.uri == host.uri || is_here(&route.uri, &hostname)) {
        return Err(Fault::new(
            Code::Conflict,
            format!("'{name}' is on {hostname} already; choose another host"),
        ));
    }
    let persistent = visit.ok(visit.domain.is_persistent())?;
    let driver = visit.ok(call.connection.driver_type())?;
    let flags = flags(persistent, &driver, route.waits);
    call.begin()?;
    let parameters = MigrateParameters {
        bandwidth,
        ..MigrateParameters::default()
    };
    match visit
        .domain
        .migrate_to_uri3(Some(&route.uri), parameters, flags)
    {
        Ok(()) => match visit.look() {
            Ok(Some(reading)) if reading.state.is_active() => Err(faults::unknown(&format!(
                "libvirt reports that '{name}' was moved, and it is {} here: look at both hosts",
                reading.state
            ))),
            Ok(_) => Ok(()),
            Err(error) => Err(faults::unknown(&format!(
                "libvirt reports that '{name}' was moved, and cannot be asked again ({})",
                faults::tidy(error.message())
            ))),
        },
        Err(error) => Err(stayed(&visit, call.fault(&error), &error, route.waits)),
    }
}

/// Looks where a domain is after its migration failed, and says so.
fn stayed(visit: &Visit<'_>, fault: Fault, error: &Error, waits: bool) -> Fault {
    let name = &visit.facts.name;
    if !visit.call.connection.is_alive().unwrap_or(false) {
        return fault;
    }
    let until = Moment::now() + RESUME_TIME;
    let seen = loop {
        match visit.look() {
            Ok(Some(reading))
                if reading.state == DomainState::Paused
                    && visit.state != DomainState::Paused
                    && Moment::now() < until =>
            {
                thread::sleep(RESUME_LOOK);
            }
            seen => break seen,
        }
    };
    let why = faults::tidy(error.message());
    let code = if fault.code == Code::Unsupported {
        Code::Unsupported
    } else {
        Code::Refused
    };
    match seen {
        Ok(Some(reading))
            if reading.state == DomainState::Paused && visit.state != DomainState::Paused =>
        {
            if waits {
                return faults::unknown(&why);
            }
            Fault::new(
                code,
                format!(
                    "the migration failed ({why}); '{name}' is still here, but paused ({}): `rxm unpause {name}` once it is certain that \
                 it does not run at the destination",
                    reading.reason
                ),
            )
        }
        Ok(Some(reading)) if reading.state.is_active() => {
            let still = if reading.state == DomainState::Paused {
                "is still here, paused as before"
            } else {
                "still runs here"
            };
            Fault::new(
                code,
                format!("the migration failed; '{name}' {still}: {}", fault.message),
            )
        }
        Ok(_) => faults::unknown(&format!(
            "the migration failed ({why}), and '{name}' does not run here any more: look at the destination before starting it"
        )),
        Err(_) => faults::unknown(&format!(
            "the migration failed ({why}), and libvirt cannot be asked where '{name}' is"
        )),
    }
}

fn flags(persistent: bool, driver: &str, waits: bool) -> u32 {
    let mut flags = sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER;
    if waits {
        // Everything goes through the one connection, and what arrives waits for our word.
        flags |= sys::VIR_MIGRATE_TUNNELLED | sys::VIR_MIGRATE_PAUSED;
    }
    if persistent {
        flags |= sys::VIR_MIGRATE_PERSIST_DEST | sys::VIR_MIGRATE_UNDEFINE_SOURCE;
    }
    if driver == "QEMU" {
        // A disk that fails meanwhile: better to stay than to arrive with what was never written.
        flags |= sys::VIR_MIGRATE_ABORT_ON_ERROR;
    }
    flags
}

/// Returns the URI by which libvirt reaches the libvirt of another host through a socket of ours, as this host reaches its own.
fn by_socket(uri: &str, socket: &Path) -> Option<String> {
    let (scheme, rest) = uri.split_once("://")?;
    let driver = scheme.split('+').next()?;
    let place = rest.split(['?', '#']).next()?;
    let mut escaped = String::new();
    for byte in socket.as_os_str().as_encoded_bytes() {
        if byte.is_ascii_alphanumeric() || b"/-_.".contains(byte) {
            escaped.push(char::from(*byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    place
        .starts_with('/')
        .then(|| format!("{driver}+unix://{place}?socket={escaped}"))
}

/// Whether the host in a libvirt URI is this one, as far as names tell; libvirt itself compares more.
fn is_here(uri: &str, hostname: &str) -> bool {
    let authority = uri.split_once("://").map_or("", |(_, rest)| {
        rest.split(['/', '?', '#']).next().unwrap_or_default()
    });
    let host = authority.rsplit('@').next().unwrap_or_default();
    let host = match host.strip_prefix('[') {
        Some(bracketed) => bracketed.split(']').next().unwrap_or_default(),
        None => host.split(':').next().unwrap_or_default(),
    };
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let own = hostname.trim_end_matches('.').to_ascii_lowercase();
    let short = |name: &str| name.split('.').next().unwrap_or_default().to_owned();
    let loopback = host == "localhost" || host == "::1" || host.starts_with("127.");
    let named =
        host == own || (!(host.contains('.') && own.contains('.')) && short(&host) == short(&own));
    loopback || (!host.is_empty() && named)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_is_known_by_its_names() {
        for here in [
            "qemu+tls://skirit80/system",
            "qemu+tls://root@Skirit80.ics.muni.cz.:16514/system",
            "qemu+tcp://localhost/system",
            "qemu+tcp://[::1]:1/system",
            "qemu+tcp://127.0.0.2/system",
        ] {
            assert!(is_here(here, "skirit80.ics.muni.cz"), "{here}");
        }
        for there in [
            "qemu+tls://skirit81/system",
            "qemu+tls://skirit80.cesnet.cz/system",
            "qemu+unix:///system?socket=/x",
            "qemu+tcp://10.77.0.2/system",
        ] {
            assert!(!is_here(there, "skirit80.ics.muni.cz"), "{there}");
        }
    }

    #[test]
    fn only_a_persistent_domain_takes_its_definition_along() {
        assert_eq!(
            flags(false, "Xen", false),
            sys::VIR_MIGRATE_LIVE | sys::VIR_MIGRATE_PEER2PEER
        );
        let waiting = flags(true, "QEMU", true);
        for flag in [
            sys::VIR_MIGRATE_UNDEFINE_SOURCE,
            sys::VIR_MIGRATE_ABORT_ON_ERROR,
            sys::VIR_MIGRATE_PAUSED,
            sys::VIR_MIGRATE_TUNNELLED,
        ] {
            assert_ne!(waiting & flag, 0);
        }
    }

    #[test]
    fn a_socket_stands_in_the_uri_as_libvirt_reads_it() {
        let check = |uri: &str, socket: &str, expected: Option<&str>| {
            let found = by_socket(uri, Path::new(socket));
            assert_eq!(found.as_deref(), expected, "{uri}");
        };
        check(
            "qemu:///system",
            "/var/lib/xman/carry/1f",
            Some("qemu+unix:///system?socket=/var/lib/xman/carry/1f"),
        );
        check(
            "qemu+unix:///system?socket=/x",
            "/a b&c",
            Some("qemu+unix:///system?socket=/a%20b%26c"),
        );
        check("qemu+tls://beta/system", "/x", None);
    }
}
