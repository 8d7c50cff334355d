//! A guest that has arrived from another host waits, with its virtual CPUs stopped, for that host's word.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::Instant as Moment,
};

use tokio::{net::UnixStream, time::Instant};
use uuid::Uuid;
use virt::domain::Domain;
use virt_sys as sys;
use xman_common::{
    name::{DomainName, DomainRef},
    protocol::{Code, DomainState, Fault},
};

use super::{
    Facts, Hypervisors,
    connections::{Call, Class, Hypervisor},
    faults, ffi,
    lanes::Key,
    progress::is_under_way,
    readings,
};

impl Hypervisors {
    /// Returns the hypervisor that takes what arrives: the one of this URI, or the first.
    ///
    /// # Errors
    /// `BadRequest` where there is none of that URI, `Unsupported` where its libvirt takes no connection on this machine.
    pub(crate) fn that_takes(&self, uri: Option<&str>) -> Result<String, Fault> {
        let hypervisor = self.chosen(uri)?;
        sockets(&hypervisor.uri).map(|_| hypervisor.uri.clone())
    }

    /// Returns a domain that has this identity or this name on any hypervisor, from memory.
    pub(crate) fn in_the_way(&self, uuid: Uuid, name: &DomainName) -> Option<Facts> {
        let by_uuid = self.find(&DomainRef::Uuid(uuid), None);
        by_uuid.or_else(|| self.find(&DomainRef::Name(name.clone()), None))
    }

    /// Opens a connection to libvirt's daemon for another host's libvirt. Whoever has it is root on this machine.
    ///
    /// # Errors
    /// `Unavailable` where none of its sockets answers, `Unsupported` where it has none on this machine.
    pub(crate) async fn daemon(&self, uri: &str) -> Result<UnixStream, Fault> {
        let mut why = String::new();
        for socket in sockets(uri)? {
            match UnixStream::connect(&socket).await {
                Ok(stream) => return Ok(stream),
                Err(error) => why = format!("{}: {error}", socket.display()),
            }
        }
        Err(Fault::new(
            Code::Unavailable,
            format!("libvirt does not answer at the destination: {why}"),
        ))
    }

    /// Lets a domain run that has arrived.
    ///
    /// # Errors
    /// `NotFound` where it is not there, `Busy` where it is still arriving, `Conflict` where it has ended.
    pub(crate) async fn run_arrived(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<(), Fault> {
        self.settle(uri, uuid, deadline, move |call, found| {
            let (domain, state) = found.ok_or_else(faults::vanished)?;
            match state {
                DomainState::Running | DomainState::Blocked => return Ok(()),
                DomainState::Paused => {}
                DomainState::ShuttingDown
                | DomainState::Off
                | DomainState::Crashed
                | DomainState::Sleeping
                | DomainState::Unknown => {
                    return Err(Fault::new(
                        Code::Conflict,
                        format!("it has arrived and is {state} now"),
                    ));
                }
            }
            call.begin()?;
            domain.resume().map_err(|error| call.fault(&error))
        })
        .await
    }

    /// Removes what has arrived of a domain that is still where it came from.
    ///
    /// # Errors
    /// `Busy` where it is still arriving, `Conflict` where it runs: then somebody has let it.
    pub(crate) async fn drop_arrived(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<(), Fault> {
        self.settle(uri, uuid, deadline, move |call, found| {
            let Some((domain, state)) = found else {
                return Ok(());
            };
            let failed = |error| call.fault(&error);
            match state {
                DomainState::Off | DomainState::Crashed => {}
                DomainState::Paused => {
                    call.begin()?;
                    domain.destroy().map_err(failed)?;
                }
                DomainState::Running
                | DomainState::Blocked
                | DomainState::ShuttingDown
                | DomainState::Sleeping
                | DomainState::Unknown => {
                    return Err(Fault::new(
                        Code::Conflict,
                        format!(
                            "it is {state} at the destination as well: somebody has let it run there, so look at both hosts"
                        ),
                    ));
                }
            }
            match readings::find(&call.connection, uuid).map_err(failed)? {
                Some(left) => {
                    call.begin()?;
                    left.undefine_flags(sys::VIR_DOMAIN_UNDEFINE_NVRAM)
                        .map_err(failed)
                }
                None => Ok(()),
            }
        })
        .await
    }

    /// Returns the state in which libvirt has a domain now; nothing where it has none.
    ///
    /// # Errors
    /// `Unavailable` where libvirt does not say.
    pub(crate) async fn whereabouts(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<Option<DomainState>, Fault> {
        let hypervisor = self.chosen(Some(uri))?;
        let look = move |call: &Call| Ok(found(call, uuid)?.map(|(_, state)| state));
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), look)
            .await
    }

    /// Returns as [`whereabouts`](Self::whereabouts) does; a domain that stands still only because it was on its way is let go on first.
    ///
    /// # Errors
    /// `Unavailable` where libvirt does not say.
    pub(crate) async fn go_on(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<Option<DomainState>, Fault> {
        let hypervisor = self.chosen(Some(uri))?;
        let lane = hypervisor.lanes.take(Key::Domain(uuid), deadline).await?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let Some((domain, state)) = found(call, uuid)? else {
                return Ok(None);
            };
            if state != DomainState::Paused || !stands_still(&domain) {
                return Ok(Some(state));
            }
            call.begin()?;
            domain.resume().map_err(|error| call.fault(&error))?;
            see(call, &host, uuid);
            Ok(found(call, uuid)?.map(|(_, state)| state))
        };
        hypervisor
            .run(Class::Change, vec![lane], Some(deadline), work)
            .await
    }

    async fn settle(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
        work: impl FnOnce(&Call, Option<(Domain, DomainState)>) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), Fault> {
        let hypervisor = self.chosen(Some(uri))?;
        let lane = hypervisor.lanes.take(Key::Domain(uuid), deadline).await?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let found = found(call, uuid)?;
            if let Some((domain, _)) = &found
                && ffi::job(domain).is_ok_and(|job| is_under_way(&job))
            {
                return Err(Fault::new(Code::Busy, "it is still arriving"));
            }
            let settled = work(call, found);
            see(call, &host, uuid);
            settled
        };
        hypervisor
            .run(Class::Change, vec![lane], Some(deadline), work)
            .await
    }
}

fn found(call: &Call, uuid: Uuid) -> Result<Option<(Domain, DomainState)>, Fault> {
    let failed = |error| call.fault(&error);
    let Some(domain) = readings::find(&call.connection, uuid).map_err(failed)? else {
        return Ok(None);
    };
    let state = readings::state(&domain).map_err(failed)?;
    Ok(Some((domain, state)))
}

/// Whether a paused domain was stopped by its migration, and not by somebody or by its disk.
fn stands_still(domain: &Domain) -> bool {
    let reason = ffi::state(domain)
        .ok()
        .and_then(|(_, reason)| u32::try_from(reason).ok());
    matches!(
        reason,
        Some(
            sys::VIR_DOMAIN_PAUSED_MIGRATION
                | sys::VIR_DOMAIN_PAUSED_UNKNOWN
                | sys::VIR_DOMAIN_PAUSED_STARTING_UP
                | sys::VIR_DOMAIN_PAUSED_POSTCOPY_FAILED
        )
    )
}

/// Brings the inventory up to date with one domain.
fn see(call: &Call, host: &Hypervisor, uuid: Uuid) {
    let began = Moment::now();
    let reading = readings::find(&call.connection, uuid).and_then(|domain| match domain {
        Some(domain) => readings::one(&domain, (&host.inventory, host.index)),
        None => Ok(None),
    });
    match reading {
        Ok(Some(reading)) => drop(host.inventory.put(host.index, reading, began)),
        Ok(None) => host.inventory.gone(host.index, uuid, began),
        Err(_) => host.bell.changed(uuid),
    }
}

/// The sockets at which the daemon of a libvirt URI may listen on this machine: that of the one driver first, then that of all.
fn sockets(uri: &str) -> Result<Vec<PathBuf>, Fault> {
    let none = || {
        Fault::new(
            Code::Unsupported,
            format!("{uri} takes no guests from other hosts through the channel"),
        )
    };
    let (scheme, rest) = uri.split_once("://").ok_or_else(none)?;
    let (driver, transport) = match scheme.split_once('+') {
        Some((driver, transport)) => (driver, Some(transport)),
        None => (scheme, None),
    };
    let (place, query) = rest.split_once('?').unwrap_or((rest, ""));
    let named = query
        .split('&')
        .find_map(|pair| pair.strip_prefix("socket="));
    match (transport, named, place.trim_end_matches('/')) {
        (Some("unix"), Some(socket), _) => {
            let socket = super::percent_decoded(socket).ok_or_else(none)?;
            Ok(vec![PathBuf::from(socket)])
        }
        (None | Some("unix"), None, "/system") if matches!(driver, "qemu" | "xen") => {
            let own = format!("virt{driver}d-sock");
            let folder = Path::new("/run/libvirt");
            Ok(vec![folder.join(own), folder.join("libvirt-sock")])
        }
        _ => Err(none()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_uri_has_its_daemons_sockets_on_this_machine_or_none() {
        let check = |uri: &str, expected: &[&str]| {
            let found = sockets(uri).unwrap_or_default();
            let expected: Vec<_> = expected.iter().map(PathBuf::from).collect();
            assert_eq!(found, expected, "{uri}");
        };
        let qemu = ["/run/libvirt/virtqemud-sock", "/run/libvirt/libvirt-sock"];
        check("qemu:///system", &qemu);
        check("qemu+unix:///system", &qemu);
        check("qemu+unix:///system?socket=/a%20b/x", &["/a b/x"]);
        check(
            "xen:///system",
            &["/run/libvirt/virtxend-sock", "/run/libvirt/libvirt-sock"],
        );
        for uri in [
            "lxc:///system",
            "qemu:///session",
            "qemu:///embed?root=/x",
            "test:///default",
            "qemu+tls://beta/system",
            "qemu+tcp:///system",
            "x",
        ] {
            check(uri, &[]);
        }
    }
}
