//! New domains and new definitions: XML comes in, and what it says of owners, class and labels does not count.
//!
//! ```text
//! XML --> whose name and UUID? --> judge --> our element replaced, read again --> libvirt --> read back, else undone
//! ```

use std::{sync::Arc, time::Instant as Moment};

use tokio::time::Instant;
use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::Principal,
    protocol::{Code, DomainRow, Fault, Metadata},
};

use super::{
    Facts, Hypervisors, NewDomain, XmlJudge,
    connections::{Call, Class, Hypervisor},
    faults, inventory,
    kept::Kept,
    lanes::Key,
    metadata, readings,
    sense::conflict,
    verbs::{present, undefine, xml_flags},
    xml,
};

impl Hypervisors {
    /// Stores a definition, new or in place of the one that the domain of the same name and UUID has.
    pub(crate) async fn define(
        &self,
        hypervisor: Option<&str>,
        xml: String,
        replaces: Option<String>,
        judge: XmlJudge,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.make(
            hypervisor,
            xml,
            judge,
            deadline,
            move |call, host, new, xml, found| {
                let changed =
                    "it has been changed in the meantime; describe it again and repeat the change";
                match (&found, &replaces) {
                    (Found::None(_), None) => {}
                    (Found::None(_), Some(_)) => {
                        return Err(conflict(format!(
                            "'{}' has been undefined in the meantime",
                            new.name
                        )));
                    }
                    (Found::One(domain, facts), replaces) => {
                        if facts.name != new.name || Some(facts.uuid) != new.uuid {
                            return Err(taken(new, facts));
                        }
                        if let Some(replaces) = replaces {
                            let present = domain
                                .xml_desc(xml_flags(true, true))
                                .map_err(|error| call.fault(&error))?;
                            if present != *replaces {
                                return Err(conflict(format!(
                                    "'{}' is not what it was: {changed}",
                                    new.name
                                )));
                            }
                        }
                    }
                }
                let kept = found.kept(call)?;
                let xml = kept.put_into(new, xml)?;
                call.begin()?;
                let domain = call
                    .connection
                    .define_domain_xml(&xml)
                    .map_err(|error| call.fault(&error))?;
                if let Err(fault) = kept.see_to(call, &domain) {
                    host.bell.changed(domain.uuid().unwrap_or_default());
                    return Err(match found {
                        Found::None(_) => undone(&fault, undefine(&domain, false, false)),
                        Found::One(_, facts) => faults::unknown(&format!(
                            "'{}' has its new definition, and it is not certain that its owners are those that it had: {}",
                            facts.name, fault.message
                        )),
                    });
                }
                made(call, host, &domain)
            },
        )
        .await
    }

    /// Makes a domain and starts it; with `define` it keeps a definition, unless it cannot be started.
    pub(crate) async fn create(
        &self,
        hypervisor: Option<&str>,
        xml: String,
        define: bool,
        paused: bool,
        judge: XmlJudge,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let flags = if paused {
            sys::VIR_DOMAIN_START_PAUSED
        } else {
            sys::VIR_DOMAIN_NONE
        };
        self.make(hypervisor, xml, judge, deadline, move |call, host, new, xml, found| {
            if let Found::One(_, facts) = &found {
                return Err(conflict(format!(
                    "'{}' exists already, with the UUID {}; `rxm start` starts it, or give the new one another name and UUID",
                    facts.name, facts.uuid
                )));
            }
            let kept = found.kept(call)?;
            let xml = kept.put_into(new, xml)?;
            call.begin()?;
            if !define {
                let domain = call.connection.create_domain_xml(&xml, flags).map_err(|error| call.fault(&error))?;
                if let Err(fault) = kept.see_to(call, &domain) {
                    host.bell.changed(domain.uuid().unwrap_or_default());
                    return Err(undone(&fault, domain.destroy()));
                }
                return made(call, host, &domain);
            }
            let domain = call.connection.define_domain_xml(&xml).map_err(|error| call.fault(&error))?;
            // Before it runs: nobody shall have it in between who should not.
            if let Err(fault) = kept.see_to(call, &domain) {
                host.bell.changed(domain.uuid().unwrap_or_default());
                return Err(undone(&fault, undefine(&domain, false, false)));
            }
            let Err(error) = domain.create_with_flags(flags) else {
                return made(call, host, &domain);
            };
            let fault = call.fault(&error);
            // Who started it between our two calls shall keep it.
            if fault.code != Code::Unknown && !domain.is_active().unwrap_or(true) {
                if let Err(error) = undefine(&domain, false, false) {
                    tracing::warn!("the definition of '{}', which could not be started, stays: {}", new.name, error.message());
                }
                if let Ok(uuid) = domain.uuid() {
                    host.bell.changed(uuid);
                }
            }
            Err(fault)
        })
        .await
    }

    /// Brings XML into the host-wide lane and there to its judge; the rest gets what there is of that name or UUID.
    async fn make(
        &self,
        hypervisor: Option<&str>,
        xml: String,
        judge: XmlJudge,
        deadline: Instant,
        rest: impl FnOnce(&Call, &Hypervisor, &NewDomain, &str, Found) -> Result<DomainRow, Fault>
        + Send
        + 'static,
    ) -> Result<DomainRow, Fault> {
        let hypervisor = self.chosen(hypervisor)?;
        let new = xml::parse(&xml)?;
        // Always in this order, and nobody else holds two: no deadlock.
        let mut lanes = vec![hypervisor.lanes.take(Key::New, deadline).await?];
        if let Some(uuid) = new.uuid {
            lanes.push(hypervisor.lanes.take(Key::Domain(uuid), deadline).await?);
        }
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let found = find(call, &host, &new, &judge)?;
            rest(call, &host, &new, &xml, found)
        };
        hypervisor
            .run(Class::Change, lanes, Some(deadline), work)
            .await
    }
}

/// What there is of a new domain's name or UUID.
pub(super) enum Found {
    /// Nothing yet, and who will own it.
    None(Option<Principal>),
    /// A domain, which keeps its metadata.
    One(Domain, Facts),
}

impl Found {
    pub(super) fn kept(&self, call: &Call) -> Result<Kept, Fault> {
        match self {
            Self::None(owner) => {
                let metadata = Metadata {
                    owners: owner.iter().cloned().collect(),
                    ..Metadata::default()
                };
                metadata::fit(&metadata)?;
                Ok(Kept::new(metadata))
            }
            Self::One(domain, facts) => Kept::present(call, domain, facts),
        }
    }
}

/// Finds the domains that have a new one's name or UUID, and has each of them judged before anything is said of it.
pub(super) fn find(
    call: &Call,
    host: &Hypervisor,
    new: &NewDomain,
    judge: &XmlJudge,
) -> Result<Found, Fault> {
    let failed = |error: Error| call.fault(&error);
    let mut found: Vec<Domain> = Vec::new();
    if let Some(uuid) = new.uuid {
        found.extend(readings::find(&call.connection, uuid).map_err(failed)?);
    }
    if let Some(named) = readings::find_by_name(&call.connection, &new.name).map_err(failed)? {
        let same =
            |other: &Domain| matches!((other.uuid(), named.uuid()), (Ok(a), Ok(b)) if a == b);
        if !found.iter().any(same) {
            found.push(named);
        }
    }
    if found.is_empty() {
        return judge(new, None).map(Found::None);
    }
    let mut known = None;
    for domain in found {
        let uuid = domain.uuid().map_err(failed)?;
        match present(call, host, &domain, uuid)? {
            Some(facts) => {
                judge(new, Some(&facts))?;
                known = Some(Found::One(domain, facts));
            }
            None => {
                judge(new, None)?;
                return Err(conflict(
                    "the UUID belongs to a domain whose name xmand cannot use; choose another"
                        .to_owned(),
                ));
            }
        }
    }
    // Where both are found and differ, the one that has the name says best what stands against it.
    known.ok_or_else(|| Fault::new(Code::Internal, "a domain was found and lost again"))
}

/// The fault for a domain that could not be given its owners and was taken away again.
pub(super) fn undone(why: &Fault, undone: Result<(), Error>) -> Fault {
    match undone {
        Ok(()) => Fault::new(
            why.code,
            format!(
                "it was taken away again, since its owners could not be kept with it: {}",
                why.message
            ),
        ),
        Err(error) => faults::unknown(&format!(
            "its owners could not be kept with it ({}), and it could not be taken away again ({})",
            why.message,
            faults::tidy(error.message())
        )),
    }
}

pub(super) fn made(call: &Call, host: &Hypervisor, domain: &Domain) -> Result<DomainRow, Fault> {
    let began = Moment::now();
    let found = domain
        .uuid()
        .and_then(|uuid| readings::find(&call.connection, uuid));
    let reading = match found {
        Ok(Some(domain)) => readings::one(&domain, (&host.inventory, host.index)),
        Ok(None) => Ok(None),
        Err(error) => Err(error),
    };
    match reading {
        Ok(Some(reading)) => {
            let row = inventory::row(&reading, &host.uri, 0, false);
            host.inventory.put(host.index, reading, began);
            Ok(row)
        }
        Ok(None) => Err(Fault::new(
            Code::NotFound,
            "it was made, and was gone again at once; `rxm dmesg` may say why",
        )),
        Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => Err(Fault::new(
            Code::NotFound,
            "it was made, and was gone again at once; `rxm dmesg` may say why",
        )),
        Err(error) => Err(faults::unknown(&format!(
            "it was made and cannot be read ({})",
            faults::tidy(error.message())
        ))),
    }
}

pub(super) fn taken(new: &NewDomain, existing: &Facts) -> Fault {
    let (name, uuid) = (&existing.name, existing.uuid);
    conflict(if new.name == *name {
        format!(
            "'{name}' exists already, with the UUID {uuid}; give that in the XML to change it, or choose another name"
        )
    } else {
        format!(
            "the UUID {uuid} belongs to '{name}'; leave it out of the XML, or use that name to change it"
        )
    })
}
