//! What each verb takes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::DomainState;
use crate::name::{DomainName, DomainRef, HostName, LabelValue, LinkName, Mac, Principal, Tag};

/// Arguments of `whoami`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whoami {}

/// Arguments of `list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Shell patterns or UUIDs, any of which must match; all domains where empty.
    pub patterns: Vec<String>,
    /// States, any of which must be the domain's; all where empty.
    pub states: Vec<DomainState>,
}

/// Arguments of `info`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {}

/// Arguments of `dmesg`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dmesg {
    /// The domain whose hypervisor log is meant; the hypervisor's own buffer where absent.
    pub domain: Option<DomainRef>,
    /// Whether to go on with what comes.
    pub follow: bool,
}

/// Arguments of `describe` and `describe-secrets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// The domain.
    pub domain: DomainRef,
    /// The definition rather than what runs.
    pub inactive: bool,
}

/// Arguments of `create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// libvirt's domain XML.
    pub xml: String,
    /// Keep the definition when the domain ends.
    pub define: bool,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// Arguments of `define`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Define {
    /// libvirt's domain XML.
    pub xml: String,
    /// The definition (as `describe-secrets --inactive` gave it) that this one replaces; another one there now is a `Conflict`.
    pub replaces: Option<String>,
}

/// Arguments of `undefine`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undefine {
    /// The domain.
    pub domain: DomainRef,
    /// Also throw away its saved image, without which a saved domain is not undefined.
    pub discard_saved: bool,
    /// Also throw away its firmware variables.
    pub discard_nvram: bool,
}

/// Arguments of `start` and `restore`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The domain.
    pub domain: DomainRef,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// Arguments of the verbs that need nothing but a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnDomain {
    /// The domain.
    pub domain: DomainRef,
}

/// Arguments of `unpause`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unpause {
    /// The domain.
    pub domain: DomainRef,
    /// Also where the other host of its last journey has not said that it does not run there: whoever asks knows that that host is lost.
    pub force: bool,
}

/// Arguments of `shutdown` and `reboot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The domain.
    pub domain: DomainRef,
    /// Answer only when the guest has done it; at most until the call's deadline.
    pub wait: bool,
    /// Shutdown: pull the plug if the guest has not gone by the deadline (implies waiting). Reboot: reset at once without asking the guest.
    pub force: bool,
}

/// Arguments of `mem-set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemSet {
    /// The domain.
    pub domain: DomainRef,
    /// The memory it shall have, in KiB.
    pub kib: u64,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
    /// Set the definition's maximum rather than the current memory.
    pub maximum: bool,
}

/// Arguments of `vcpu-set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuSet {
    /// The domain.
    pub domain: DomainRef,
    /// How many.
    pub count: u32,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
    /// Set the definition's maximum rather than the current number.
    pub maximum: bool,
}

/// Arguments of `migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migrate {
    /// The domain.
    pub domain: DomainRef,
    /// Where to; one of the host's configured peers.
    pub destination: HostName,
    /// At most so many MiB/s.
    pub bandwidth: Option<u64>,
    /// At most so many milliseconds of silence when it changes over.
    pub downtime_ms: Option<u64>,
    /// How.
    pub way: Way,
}

/// How a guest gets to another host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Way {
    /// Through the Kerberos channel between the two xmands.
    Channel {
        /// The destination's port.
        port: u16,
        /// What the destination's `migrate-in` gave.
        permit: Permit,
    },
    /// libvirt to libvirt, over the network that the host's configuration trusts.
    Direct,
}

/// What a destination gives to who may bring a domain there: good for one domain, from one host, once, and soon.
#[derive(Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Permit(pub [u8; 32]);

impl fmt::Debug for Permit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Permit(..)")
    }
}

/// Arguments of `migrate-in`: what comes, as its host shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrateIn {
    /// The domain.
    pub uuid: Uuid,
    /// Its name.
    pub name: DomainName,
    /// The host that it comes from, as that one's principal has it: `skirit80` of `xman/skirit80@EXAMPLE.ORG`.
    pub source: HostName,
    /// Memory it can have, in KiB.
    pub memory_kib: u64,
}

/// Arguments of `carry`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carry {
    /// What `migrate-in` gave.
    pub permit: Permit,
    /// The domain that really comes,
    pub uuid: Uuid,
    /// and its name.
    pub name: DomainName,
}

/// Arguments of `settle`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settle {
    /// What `migrate-in` gave.
    pub permit: Permit,
    /// What is to become of the domain that has arrived.
    pub settlement: Settlement,
}

/// What becomes of a domain that has arrived and whose virtual CPUs wait for the word of the host that it came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Settlement {
    /// It is nowhere else any more: it runs here.
    Run,
    /// It is nowhere else any more, and was paused there: it stays paused here.
    Keep,
    /// It is still where it came from: what is here goes.
    Drop,
}

/// Arguments of `job-list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {}

/// Arguments of `job-wait` and `job-cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnJob {
    /// The job: the id of the call that began it.
    pub job: Uuid,
}

/// Arguments of `owner`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetOwners {
    /// The domain.
    pub domain: DomainRef,
    /// Who owns it from now on, beside who does already.
    pub add: BTreeSet<Principal>,
    /// Who does not any more.
    pub remove: BTreeSet<Principal>,
}

/// Arguments of `label`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetLabels {
    /// The domain.
    pub domain: DomainRef,
    /// Labels with their new values.
    pub set: BTreeMap<Tag, LabelValue>,
    /// Labels that go.
    pub remove: BTreeSet<Tag>,
}

/// Arguments of `class`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetClass {
    /// The domain.
    pub domain: DomainRef,
    /// Its class; none where absent.
    pub class: Option<Tag>,
}

/// Arguments of `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// A verb, or what else policies decide about (`own`, `act-for`).
    pub action: String,
    /// To what.
    pub about: About,
}

/// What a question is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum About {
    /// The host.
    Host,
    /// A domain.
    Domain(DomainRef),
    /// Somebody to act for.
    Person(Principal),
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => Ok(()),
            Self::Domain(domain) => domain.fmt(f),
            Self::Person(person) => person.fmt(f),
        }
    }
}

/// Arguments of `explain-other`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainOther {
    /// Whose right is asked about.
    pub principal: Principal,
    /// A verb, or what else policies decide about (`own`, `act-for`).
    pub action: String,
    /// To what.
    pub about: About,
}

/// Arguments of `save-to`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SaveTo {
    /// The domain.
    pub domain: DomainRef,
    /// The new image's name.
    pub image: Tag,
}

/// Arguments of `images`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Images {}

/// Arguments of `restore-from`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RestoreFrom {
    /// The image.
    pub image: Tag,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// Arguments of `discard-image`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnImage {
    /// The image.
    pub image: Tag,
}

/// Arguments of `autostart`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Autostart {
    /// The domain.
    pub domain: DomainRef,
    /// Whether it starts with its host from now on.
    pub on: bool,
}

/// Arguments of `rename`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rename {
    /// The domain.
    pub domain: DomainRef,
    /// Its new name.
    pub name: DomainName,
}

/// Arguments of `attach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attach {
    /// The domain.
    pub domain: DomainRef,
    /// What it gets.
    pub device: Device,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
}

/// A device that can be attached.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// A disk.
    Disk(Disk),
    /// A network interface.
    Interface(Interface),
}

/// A disk to attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Disk {
    /// The absolute path of its image or block device on the host; below a folder that the host's configuration allows.
    pub source: String,
    /// Its name in the guest, as `vdb`, which also chooses the bus; where absent the next free `vd`, of a CD-ROM `sd`, of Xen `xvd`.
    pub target: Option<Tag>,
    /// The format of the image; never guessed, since a guest could write another's header.
    pub format: DiskFormat,
    /// Whether the guest may only read it.
    pub read_only: bool,
    /// Whether other domains may have it as well.
    pub shareable: bool,
    /// Whether it is a CD-ROM rather than a disk.
    pub cdrom: bool,
}

/// The format of a disk's image.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum DiskFormat {
    /// Bytes as they are.
    Raw,
    /// QEMU's own.
    Qcow2,
}

/// A network interface to attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// What it is plugged into.
    pub link: Link,
    /// Its address; libvirt makes one where absent.
    pub mac: Option<Mac>,
    /// The kind of card that the guest sees, as `virtio` or `e1000`; the hypervisor's own choice where absent.
    pub model: Option<Tag>,
}

/// What a network interface is plugged into.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Link {
    /// One of libvirt's networks.
    Network(LinkName),
    /// A bridge of the host.
    Bridge(LinkName),
}

/// Arguments of `detach`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Detach {
    /// The domain.
    pub domain: DomainRef,
    /// What it loses.
    pub device: Attached,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
}

/// A device that a domain has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Attached {
    /// A disk, by its name in the guest.
    Disk(Tag),
    /// A network interface, by its address.
    Interface(Mac),
}

/// Arguments of `console`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Console {
    /// The domain.
    pub domain: DomainRef,
    /// Take the keyboard over from who has it; else only the first who comes may type, and the others read along.
    pub force: bool,
}

/// Arguments of `events`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Events {
    /// Shell patterns or UUIDs, any of which must match; all domains where empty.
    pub patterns: Vec<String>,
    /// What has happened since then comes first; only what happens from now on where absent.
    pub since: Option<Cursor>,
    /// Whether to go on with what comes.
    pub follow: bool,
}

/// A place in a host's record of what happened. It is shown and typed as `BOOK.NUMBER`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Cursor {
    /// Which record: xmand begins a new one each time it starts. The nil UUID means the oldest that a host still knows.
    pub book: Uuid,
    /// How many events were before.
    pub number: u64,
}

impl fmt::Display for Cursor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.book.simple(), self.number)
    }
}

impl FromStr for Cursor {
    type Err = BadCursor;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let (book, number) = text.split_once('.').ok_or(BadCursor)?;
        Ok(Self {
            book: Uuid::try_parse(book).map_err(|_| BadCursor)?,
            number: number.parse().map_err(|_| BadCursor)?,
        })
    }
}

/// What is no cursor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a cursor is what `rxm events` shows with each event, as 67e5504410b1426f9247bb680e5fe0c8.17"
)]
pub struct BadCursor;
