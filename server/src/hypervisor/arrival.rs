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
    verbs::undefine,
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

    /// Asks libvirt whether it has neither a domain of this identity nor one of this name.
    ///
    /// # Errors
    /// `Conflict` where it has, `Unavailable` where libvirt does not say.
    pub(crate) async fn is_absent(
        &self,
        uri: &str,
        uuid: Uuid,
        name: &DomainName,
        deadline: Instant,
    ) -> Result<(), Fault> {
        if let Some(there) = self.in_the_way(uuid, name) {
            self.look_again(&there, deadline).await?;
        }
        let there = self.in_the_way(uuid, name).map(|there| there.name);
        let (hypervisor, name) = (self.chosen(Some(uri))?, name.clone());
        let look = move |call: &Call| {
            let found = found(call, uuid)?.map(|_| name);
            match found.or(there) {
                None => Ok(()),
                Some(name) => Err(Fault::new(
                    Code::Conflict,
                    format!("the destination has '{name}' already"),
                )),
            }
        };
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), look)
            .await
    }

    /// Asks libvirt whether it has a domain.
    ///
    /// # Errors
    /// `NotFound` where it has not, `Unavailable` where it does not say.
    pub(crate) async fn is_here(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<(), Fault> {
        let look = move |call: &Call| found(call, uuid)?.map(drop).ok_or_else(faults::vanished);
        self.chosen(Some(uri))?
            .run(Class::Read, Vec::new(), Some(deadline), look)
            .await
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
        self.alone_with(uri, uuid, deadline, move |call, found| {
            at_rest(found.as_ref())?;
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

    /// Removes what has arrived of a domain that is still where it came from, whole or not; nobody brings more of it any more. Returns whether
    /// there was something. Its firmware's variables stay: on a shared file system they are the same file on both hosts.
    ///
    /// # Errors
    /// `Busy` where libvirt has only begun to make room for it, `Conflict` where it is not as it arrived: then it is somebody's.
    pub(crate) async fn drop_arrived(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<bool, Fault> {
        self.alone_with(uri, uuid, deadline, move |call, found| {
            let Some((domain, state)) = found else {
                return Ok(false);
            };
            let failed = |error| call.fault(&error);
            let is_persistent = domain.is_persistent().map_err(failed)?;
            if state != DomainState::Paused && !is_persistent && !state.is_active() {
                return Err(busy("libvirt is making room for it at this moment"));
            }
            if state != DomainState::Paused {
                return Err(Fault::new(
                    Code::Conflict,
                    format!("it is {state} at the destination as well, which is not how it arrived: look at both hosts"),
                ));
            }
            call.begin()?;
            // In this order nothing that could be taken for somebody's own definition is ever left behind.
            if is_persistent {
                undefine(&domain, false, false).map_err(failed)?;
            }
            domain.destroy().map_err(failed)?;
            Ok(true)
        })
        .await
    }

    /// Asks libvirt whether nothing is under way with a domain.
    ///
    /// # Errors
    /// `Busy` while it is, `Unavailable` where libvirt does not say.
    pub(crate) async fn is_at_rest(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<(), Fault> {
        self.alone_with(uri, uuid, deadline, |_, found| at_rest(found.as_ref()))
            .await
    }

    /// Removes the definition of a domain that runs on another host by now.
    ///
    /// # Errors
    /// `Unavailable` where libvirt does not say.
    pub(crate) async fn undefine_departed(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
    ) -> Result<(), Fault> {
        self.alone_with(uri, uuid, deadline, move |call, found| match found {
            Some((domain, DomainState::Off)) => {
                call.begin()?;
                undefine(&domain, false, false).map_err(|error| call.fault(&error))
            }
            Some(_) | None => Ok(()),
        })
        .await
    }

    /// Returns the state in which a domain is left once nothing is done with it any more; nothing where libvirt has none. With `ran`, one that
    /// stands still only because it was on its way is let go on first.
    ///
    /// # Errors
    /// `Busy` while libvirt still works on it, which can be the last step of its way; `Unavailable` where libvirt does not say.
    pub(crate) async fn come_to_rest(
        &self,
        uri: &str,
        uuid: Uuid,
        ran: bool,
        deadline: Instant,
    ) -> Result<Option<DomainState>, Fault> {
        self.alone_with(uri, uuid, deadline, move |call, found| {
            at_rest(found.as_ref())?;
            let Some((domain, state)) = found else {
                return Ok(None);
            };
            if !ran || state != DomainState::Paused || !stands_still(&domain) {
                return Ok(Some(state));
            }
            call.begin()?;
            domain.resume().map_err(|error| call.fault(&error))?;
            Ok(Some(DomainState::Running))
        })
        .await
    }

    /// Brings memory up to date with what libvirt has of a domain.
    ///
    /// # Errors
    /// `Unavailable` where libvirt does not say.
    pub(crate) async fn look_again(&self, facts: &Facts, deadline: Instant) -> Result<(), Fault> {
        let hypervisor = self.by_index(facts.hypervisor)?;
        let (host, uuid) = (Arc::clone(&hypervisor), facts.uuid);
        let look = move |call: &Call| {
            see(call, &host, uuid);
            Ok(())
        };
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), look)
            .await
    }

    /// Works on a domain in its lane, and brings memory up to date afterwards.
    async fn alone_with<T: Send + 'static>(
        &self,
        uri: &str,
        uuid: Uuid,
        deadline: Instant,
        work: impl FnOnce(&Call, Option<(Domain, DomainState)>) -> Result<T, Fault> + Send + 'static,
    ) -> Result<T, Fault> {
        let hypervisor = self.chosen(Some(uri))?;
        let lane = hypervisor.lanes.take(Key::Domain(uuid), deadline).await?;
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let found = found(call, uuid)?;
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

fn at_rest(found: Option<&(Domain, DomainState)>) -> Result<(), Fault> {
    match found {
        Some((domain, state)) if state.is_active() && is_worked_on(domain) => {
            Err(busy("libvirt is still at work on it"))
        }
        Some(_) | None => Ok(()),
    }
}

fn busy(why: &str) -> Fault {
    Fault::new(Code::Busy, why)
}

/// Whether libvirt has not done with it. What is still arriving has no statistics: libvirt says so by an error.
fn is_worked_on(domain: &Domain) -> bool {
    match ffi::job(domain) {
        Ok(job) => is_under_way(&job),
        Err(error) => error.code().to_raw() != sys::VIR_ERR_NO_SUPPORT,
    }
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
