//! A guest's way to another host through the Kerberos channel between the two xmands, and the word on where it runs in the end.
//!
//! ```text
//! person -- migrate-in --> destination: a permit
//! person -- migrate -----> source -- carry --> destination --> its libvirt      a connection for the source's libvirt
//!
//!   the two libvirts move the guest; it arrives with its virtual CPUs stopped
//!
//!   source looks at its own libvirt:   gone    -- settle run  --> it runs there
//!                                      here    -- settle drop --> what arrived is removed; it runs on here
//! ```
//! Laws: what has arrived runs only by the source's word, and the source says "run" only when its own libvirt has the guest no more. libvirt
//! alone lets both run when the connection breaks between the guest's start there and the word of it here. The word is decided once, written
//! down, and given until it is heard, also after a restart; until then nobody lets the domain run, keeps it or moves it on, on either host.
//! So wherever it breaks, the guest runs on one host at most, and on one in the end. A domain comes once at a time: a word never falls on what
//! arrived later.
//!
//! A connection to libvirt is root on the machine that it reaches: hosts that exchange guests are root on each other.

use std::{sync::Arc, time::Duration};

use uuid::Uuid;
use xman_common::{
    name::HostName,
    protocol::{Code, Fault},
};

use crate::{Host, store::StoreError};

mod arriving;
mod door;
mod leaving;

pub(crate) use arriving::{carry, permit, settle};
pub(crate) use leaving::leave;

/// How long one look at libvirt, or one change by the other host's word, may take.
const STEP: Duration = Duration::from_secs(20);

/// Takes up what an earlier xmand left.
pub(crate) async fn take_up(host: &Arc<Host>) -> Result<(), StoreError> {
    for (permit, arrival, is_settled) in host.store.arrivals().await? {
        host.permits
            .restore(permit, arrival, is_settled, std::time::Instant::now());
    }
    leaving::take_up(host).await
}

/// Lets go of a domain whose other host is lost. Who says so knows that it does not run there.
pub(crate) async fn claim(host: &Host, uuid: Uuid) -> Result<(), Fault> {
    arriving::claim(host, uuid).await?;
    host.leaving.claim(uuid)
}

/// What is said of a destination that the configuration does not name.
pub(crate) fn no_peer(destination: &HostName) -> Fault {
    Fault::new(
        Code::Refused,
        format!(
            "{destination} is no migration peer of this host; its administrator lists peers in [migration] of xmand.toml"
        ),
    )
}
