//! Sees to it that a domain has the metadata that it shall have, whatever else came to libvirt in XML or a saved image.

use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::protocol::{Code, Fault, Metadata};

use super::{Facts, NewDomain, connections::Call, metadata, readings, sense::conflict, xml};

/// What a domain's metadata shall be.
pub(super) struct Kept {
    metadata: Result<Metadata, String>,
    /// The element without its namespace; none where there is nothing to say.
    bare: Option<String>,
}

impl Kept {
    pub(super) fn new(metadata: Metadata) -> Self {
        Self {
            bare: (metadata != Metadata::default()).then(|| metadata::write_bare(&metadata)),
            metadata: Ok(metadata),
        }
    }

    /// What a domain has now, as judged; what cannot be read is kept as it is.
    ///
    /// # Errors
    /// `Conflict` where it has changed since, libvirt's.
    pub(super) fn present(call: &Call, domain: &Domain, facts: &Facts) -> Result<Self, Fault> {
        if let Ok(metadata) = facts.metadata.as_ref() {
            return Ok(Self::new(metadata.clone()));
        }
        let failed = |error: Error| call.fault(&error);
        for form in readings::forms(domain).map_err(failed)? {
            let bare = readings::element(domain, form).map_err(failed)?;
            let metadata = readings::understood(bare.as_deref());
            if metadata == *facts.metadata {
                return Ok(Self { metadata, bare });
            }
        }
        Err(conflict(format!(
            "the metadata of '{}' have just been changed; look at them and ask again",
            facts.name
        )))
    }

    /// Returns an XML with these metadata in the place of those that it brings.
    ///
    /// # Errors
    /// `BadRequest`, `Conflict` where what cannot be read cannot be kept either, `Internal` where the result is not what it should be.
    pub(super) fn put_into(&self, new: &NewDomain, xml: &str) -> Result<String, Fault> {
        let element = match (&self.metadata, &self.bare) {
            (_, None) => None,
            (Ok(metadata), Some(_)) => Some(metadata::write(metadata)),
            (Err(_), Some(bare)) => Some(
                metadata::dress(bare).map_err(|why| conflict(format!("'{}': {why}", new.name)))?,
            ),
        };
        let written = xml::with_element(xml, element.as_deref())?;
        match xml::read(&written) {
            Ok((again, metadata)) if again == *new && metadata == self.metadata => Ok(written),
            _ => Err(Fault::new(
                Code::Internal,
                "the XML with its owners put in is not read as what was meant; nothing has begun",
            )),
        }
    }

    /// Makes these the metadata of all that there is of a domain, what runs and what is defined. Writes nothing where they are already.
    ///
    /// # Errors
    /// libvirt's, and `Refused` where it shows others afterwards.
    pub(super) fn see_to(&self, call: &Call, domain: &Domain) -> Result<(), Fault> {
        if self.are_of(domain).map_err(|error| call.fault(&error))? {
            return Ok(());
        }
        call.begin()?;
        readings::set_element(domain, self.bare.as_deref()).map_err(|error| call.fault(&error))?;
        if self.are_of(domain).map_err(|error| call.fault(&error))? {
            return Ok(());
        }
        Err(Fault::new(
            Code::Refused,
            "libvirt took the owners, class and labels, and shows others; look at `virsh metadata` on the host",
        ))
    }

    /// Whether all that there is of a domain has them; nothing is left to see to of one that is gone.
    fn are_of(&self, domain: &Domain) -> Result<bool, Error> {
        let look = || -> Result<bool, Error> {
            for form in readings::forms(domain)? {
                let element = readings::element(domain, form)?;
                if readings::understood(element.as_deref()) != self.metadata {
                    return Ok(false);
                }
            }
            Ok(true)
        };
        match look() {
            Err(error) if error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN => Ok(true),
            seen => seen,
        }
    }
}
