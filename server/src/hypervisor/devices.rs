//! Disks and network interfaces come and go, in what runs and in the definition.
//!
//! ```text
//! attach: allowed? --> sources.rs --> claimed, and nobody else's? --> what it is called --> libvirt: both or neither
//! detach: there? --> libvirt asks the guest --> gone from what runs? --> the definition
//!                                         '--> deadline: Refused, and the definition stays as it was
//! ```
//! No XML comes in: it is written here, from values that have been read. A device that could be put into one of the two places only is
//! taken out of it again.

use std::{
    collections::BTreeSet,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use roxmltree::{Document, Node};
use tokio::time::Instant;
use uuid::Uuid;
use virt::{connect::Connect, domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::{DomainName, DomainRef, Mac, Tag},
    protocol::{
        Attach, Attached, Code, Detach, Device, Disk, DiskFormat, DomainRow, DomainState, Fault,
        Interface, Link,
    },
};

use super::{
    Facts, Hypervisors, Target,
    connections::{Call, Class},
    faults,
    sense::conflict,
    sources::{self, Id, Layer, Rules, Source},
    verbs::{Visit, xml_flags},
};
use crate::{ROOT, config::Devices};

/// How often it is looked whether a guest has let go of a device.
const LOOK: Duration = Duration::from_millis(200);
/// Left between the end of a wait and the caller's deadline, so that the answer arrives in time.
const ANSWER_TIME: Duration = Duration::from_millis(300);
/// How long a guest is waited for, whatever the deadline: the domain's lane and a thread wait with the caller.
const LET_GO: Duration = Duration::from_secs(60);
/// The most names that one kind of disk can have here: `vda` to `vdzz`.
const MAX_NAMES: usize = 26 * 27;

/// Whether a caller may see a domain.
pub(crate) type Eyes = Arc<dyn Fn(&Facts) -> bool + Send + Sync>;

impl Hypervisors {
    /// Gives a domain one more disk or network interface; returns what that is called.
    pub(crate) async fn attach(
        &self,
        target: Target,
        attach: Attach,
        allowed: Devices,
        eyes: Eyes,
        deadline: Instant,
    ) -> Result<(DomainRow, Attached), Fault> {
        let elsewhere = match &attach.device {
            Device::Interface(interface) => {
                may_plug(&interface.link, &allowed)?;
                Vec::new()
            }
            Device::Disk(disk) => {
                sense_of_disk(disk)?;
                self.used_by_others(target.facts.hypervisor, deadline)
                    .await?
            }
        };
        let driver = self.shared.inventory.driver(target.facts.hypervisor);
        let claims = self.shared.claims.clone();
        self.in_lane(target, deadline, move |visit| {
            let scene = Scene::read(visit)?;
            let forms = forms(attach.config, &visit.facts.name, scene.active(), persistent(visit)?)?;
            let (device, xml, _claim) = match &attach.device {
                Device::Disk(disk) => {
                    let device = free_target(disk, &driver, &scene.targets())?;
                    let source = found(disk, &allowed)?;
                    let claim = claims.claim(&source, disk)?;
                    scene.has_not(&source, forms, &visit.facts)?;
                    let mine = Claimant { visit, eyes: &eyes, source: &source, disk };
                    mine.is_free(&elsewhere)?;
                    let xml = disk_xml(disk, &source, &device);
                    (Attached::Disk(device), xml, Some(claim))
                }
                Device::Interface(interface) => {
                    let mac = interface.mac.clone().map_or_else(new_mac, Ok)?;
                    if scene.holds(&Attached::Interface(mac.clone())) {
                        return Err(conflict(format!(
                            "'{}' has an interface {mac} already; choose another address, or leave it out",
                            visit.facts.name
                        )));
                    }
                    let xml = interface_xml(interface, &mac);
                    (Attached::Interface(mac), xml, None)
                }
            };
            visit.call.begin()?;
            if let Err(error) = visit.domain.attach_device_flags(&xml, forms.flags()) {
                return Err(undone(visit, &device, &fault(visit.call, &error), deadline));
            }
            Ok((visit.settle(), device))
        })
        .await
    }

    /// Takes a disk or network interface from a domain. A guest that runs is asked for it, and is waited for.
    pub(crate) async fn detach(
        &self,
        target: Target,
        detach: Detach,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            let (name, device) = (&visit.facts.name, &detach.device);
            let scene = Scene::read(visit)?;
            let wanted = forms(detach.config, name, scene.active(), persistent(visit)?)?;
            let live = scene.live.as_ref().and_then(|live| live.xml_of(device)).filter(|_| wanted.live);
            let defined = scene.defined.as_ref().and_then(|defined| defined.xml_of(device));
            if live.is_none() && (defined.is_none() || !wanted.config) {
                return Err(not_there(visit, device, defined.is_some()));
            }
            if live.is_some() && matches!(visit.state, DomainState::Paused | DomainState::Sleeping) {
                return Err(conflict(format!(
                    "the guest of '{name}' must let go of it, and hears nothing while it is {}; let it run first",
                    visit.state
                )));
            }
            let removed = live.is_some();
            if let Some(xml) = live {
                visit.call.begin()?;
                release(visit, device, &xml, deadline)?;
            }
            if let Some(xml) = defined.filter(|_| wanted.config) {
                visit.call.begin()?;
                let flags = sys::VIR_DOMAIN_AFFECT_CONFIG;
                if let Err(error) = visit.domain.detach_device_flags(&xml, flags) {
                    let why = fault(visit.call, &error);
                    if !removed {
                        return Err(why);
                    }
                    visit.settle();
                    // To give it back would be one more surprise for a guest that has just let go of it.
                    return Err(Fault::new(
                        why.code,
                        format!("{} is gone from what runs, and still in the definition of '{name}': {}", called(device), why.message),
                    ));
                }
            }
            Ok(visit.settle())
        })
        .await
    }

    /// What the domains of the other hypervisors have as disks.
    async fn used_by_others(&self, but: usize, deadline: Instant) -> Result<Vec<Used>, Fault> {
        let mut used = Vec::new();
        for hypervisor in self
            .shared
            .hypervisors
            .iter()
            .filter(|other| other.index != but)
        {
            let index = hypervisor.index;
            let work = move |call: &Call| disks_in_use(call, index, None);
            let theirs = hypervisor
                .run(Class::Read, Vec::new(), Some(deadline), work)
                .await
                .map_err(|fault| {
                    let why = format!(
                        "whether a domain of {} uses it cannot be known: {}",
                        hypervisor.uri, fault.message
                    );
                    Fault {
                        message: why,
                        ..fault
                    }
                })?;
            used.extend(theirs);
        }
        Ok(used)
    }
}

/// In which forms of a domain a device comes or goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Forms {
    live: bool,
    config: bool,
}

impl Forms {
    fn flags(self) -> u32 {
        let live = if self.live {
            sys::VIR_DOMAIN_AFFECT_LIVE
        } else {
            0
        };
        let config = if self.config {
            sys::VIR_DOMAIN_AFFECT_CONFIG
        } else {
            0
        };
        live | config
    }
}

/// Of what runs, and where it was asked for of the definition; of a domain that is off there is nothing else.
fn forms(config: bool, name: &DomainName, active: bool, persistent: bool) -> Result<Forms, Fault> {
    if config && !persistent {
        return Err(conflict(format!(
            "'{name}' has no definition: it ends when it is off; leave out --config"
        )));
    }
    Ok(Forms {
        live: active,
        config: config || !active,
    })
}

fn may_plug(link: &Link, allowed: &Devices) -> Result<(), Fault> {
    let (kind, name, names, key) = match link {
        Link::Network(name) => ("network", name, &allowed.networks, "networks"),
        Link::Bridge(name) => ("bridge", name, &allowed.bridges, "bridges"),
    };
    if names.contains(name) {
        return Ok(());
    }
    let names: Vec<_> = names.iter().map(|name| name.as_str()).collect();
    Err(Fault::new(
        Code::Refused,
        format!(
            "the {kind} '{name}' is not one that this host allows ({}); its administrator lists them as `{key}` in [devices] of xmand.toml",
            if names.is_empty() {
                "none".to_owned()
            } else {
                names.join(", ")
            }
        ),
    ))
}

fn sense_of_disk(disk: &Disk) -> Result<(), Fault> {
    let bad = |what: &str| Err(Fault::new(Code::BadRequest, what.to_owned()));
    if disk.shareable && disk.format != DiskFormat::Raw {
        return bad(
            "a qcow2 image has one user, since each keeps its own map of it; only a raw one can be shared",
        );
    }
    match &disk.target {
        Some(target) => bus(target, disk.cdrom).map(|_| ()),
        None => Ok(()),
    }
}

/// Returns the bus that a disk's name in the guest chooses.
fn bus(target: &Tag, cdrom: bool) -> Result<&'static str, Fault> {
    let bad = |what: String| Fault::new(Code::BadRequest, what);
    let letters =
        |rest: &str| matches!(rest.len(), 1 | 2) && rest.bytes().all(|b| b.is_ascii_lowercase());
    let bus = BUSES
        .iter()
        .find(|(prefix, _)| target.as_str().strip_prefix(prefix).is_some_and(letters));
    match bus {
        Some((_, "virtio")) if cdrom => Err(bad(format!(
            "'{target}' would be a virtio disk, and there is no such CD-ROM; call it sda or hda"
        ))),
        Some((_, bus)) => Ok(bus),
        None => Err(bad(format!(
            "'{target}' is no name for a disk; they are vda (virtio), sda (SCSI), hda (IDE), xvda (Xen) and so on"
        ))),
    }
}

const BUSES: [(&str, &str); 4] = [
    ("vd", "virtio"),
    ("sd", "scsi"),
    ("hd", "ide"),
    ("xvd", "xen"),
];

/// Returns the name that a disk gets: the one that is asked for, or the next free one.
fn free_target(disk: &Disk, driver: &str, taken: &BTreeSet<String>) -> Result<Tag, Fault> {
    if let Some(target) = &disk.target {
        return match taken.contains(target.as_str()) {
            true => Err(conflict(format!(
                "there is a disk '{target}' already; choose another name, or leave it out"
            ))),
            false => Ok(target.clone()),
        };
    }
    let prefix = match (driver, disk.cdrom) {
        ("Xen" | "xenlight", _) => "xvd",
        (_, true) => "sd",
        (_, false) => "vd",
    };
    (0..MAX_NAMES)
        .map(|number| format!("{prefix}{}", letters(number)))
        .find(|name| !taken.contains(name))
        .and_then(|name| name.parse().ok())
        .ok_or_else(|| conflict(format!("all names that begin with '{prefix}' are taken")))
}

/// a to z, aa to zz.
fn letters(number: usize) -> String {
    let letter = |n: usize| char::from(b'a' + u8::try_from(n % 26).unwrap_or_default());
    match number.checked_sub(26) {
        None => letter(number).to_string(),
        Some(rest) => [letter(rest / 26), letter(rest)].iter().collect(),
    }
}

/// An address of QEMU's and Xen's range for those that are made up, as libvirt does it.
fn new_mac() -> Result<Mac, Fault> {
    let [a, b, c, ..] = *Uuid::new_v4().as_bytes();
    format!("52:54:00:{a:02x}:{b:02x}:{c:02x}")
        .parse()
        .map_err(|_| Fault::new(Code::Internal, "a new address is none"))
}

fn found(disk: &Disk, allowed: &Devices) -> Result<Source, Fault> {
    let rules = Rules {
        folders: &allowed.disks,
        account: ROOT,
    };
    sources::find(&disk.source, disk.format, rules)
}

fn disk_xml(disk: &Disk, source: &Source, target: &Tag) -> String {
    let bus = bus(target, disk.cdrom).unwrap_or("virtio");
    let device = if disk.cdrom { "cdrom" } else { "disk" };
    let read_only = if disk.read_only || disk.cdrom {
        "<readonly/>"
    } else {
        ""
    };
    let shareable = if disk.shareable { "<shareable/>" } else { "" };
    // A chain that is written down is not read from the images' headers.
    let backing = match disk.format {
        DiskFormat::Raw => String::new(),
        DiskFormat::Qcow2 => backing_xml(&source.backing),
    };
    let Layer { path, format, id } = &source.top;
    let (kind, attribute) = kind(*id);
    format!(
        "<disk type='{kind}' device='{device}'><driver name='qemu' type='{}'/><source {attribute}='{}'/>{backing}\
         <target dev='{target}' bus='{bus}'/>{read_only}{shareable}</disk>",
        word(*format),
        escaped(path)
    )
}

fn backing_xml(backing: &[Layer]) -> String {
    let Some((nearest, rest)) = backing.split_first() else {
        return "<backingStore/>".to_owned();
    };
    let (kind, attribute) = kind(nearest.id);
    format!(
        "<backingStore type='{kind}'><format type='{}'/><source {attribute}='{}'/>{}</backingStore>",
        word(nearest.format),
        escaped(&nearest.path),
        backing_xml(rest)
    )
}

fn kind(id: Id) -> (&'static str, &'static str) {
    match id {
        Id::File { .. } => ("file", "file"),
        Id::Block(_) => ("block", "dev"),
    }
}

fn word(format: DiskFormat) -> &'static str {
    match format {
        DiskFormat::Raw => "raw",
        DiskFormat::Qcow2 => "qcow2",
    }
}

fn interface_xml(interface: &Interface, mac: &Mac) -> String {
    let (kind, name) = match &interface.link {
        Link::Network(name) => ("network", name),
        Link::Bridge(name) => ("bridge", name),
    };
    let model = interface
        .model
        .as_ref()
        .map(|model| format!("<model type='{model}'/>"));
    format!(
        "<interface type='{kind}'><mac address='{mac}'/><source {kind}='{}'/>{}</interface>",
        escaped(name.as_str()),
        model.unwrap_or_default()
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('\'', "&apos;")
        .replace('"', "&quot;")
}

/// The disks and interfaces that an XML of libvirt's shows.
#[derive(Debug, Default)]
struct Hardware {
    disks: Vec<DiskSeen>,
    /// Address and element.
    interfaces: Vec<(String, String)>,
}

#[derive(Debug)]
struct DiskSeen {
    target: String,
    element: String,
    sources: Vec<(Place, Sharing)>,
    /// Whether it is an image that may be based on others which are not shown, as in most definitions.
    hides_backing: bool,
}

/// Where the bytes of a disk lie.
#[derive(Clone, Debug, PartialEq)]
enum Place {
    Path(String),
    Volume { pool: String, volume: String },
}

/// Who else may have it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Sharing {
    read_only: bool,
    shareable: bool,
}

impl Sharing {
    fn of(disk: &Disk) -> Self {
        Self {
            read_only: disk.read_only || disk.cdrom,
            shareable: disk.shareable,
        }
    }

    /// Of a backing file: QEMU only reads it, and so may everybody else who only does that.
    const BENEATH: Self = Self {
        read_only: true,
        shareable: false,
    };

    /// Whether two users stand in each other's way.
    fn clashes(self, other: Self) -> bool {
        !(self.read_only && other.read_only || self.shareable && other.shareable)
    }
}

impl Hardware {
    fn read(xml: &str) -> Result<Self, Fault> {
        let document = Document::parse(xml).map_err(|error| {
            Fault::new(
                Code::Refused,
                format!("libvirt shows XML of a domain that cannot be read: {error}"),
            )
        })?;
        let mut hardware = Self::default();
        let devices = document
            .root_element()
            .children()
            .filter(|node| node.has_tag_name("devices"));
        for node in devices.flat_map(|devices| devices.children()) {
            let element = || xml.get(node.range()).unwrap_or_default().to_owned();
            if node.has_tag_name("disk") {
                hardware.disks.push(DiskSeen {
                    target: attribute(node, "target", "dev").unwrap_or_default(),
                    element: element(),
                    sources: sources_of(node),
                    hides_backing: attribute(node, "driver", "type").as_deref() == Some("qcow2")
                        && !node
                            .descendants()
                            .any(|node| node.has_tag_name("backingStore")),
                });
            } else if node.has_tag_name("interface") {
                let mac = attribute(node, "mac", "address").unwrap_or_default();
                hardware
                    .interfaces
                    .push((mac.to_ascii_lowercase(), element()));
            }
        }
        Ok(hardware)
    }

    /// The element of a device.
    fn xml_of(&self, device: &Attached) -> Option<String> {
        match device {
            Attached::Disk(target) => {
                let disk = self
                    .disks
                    .iter()
                    .find(|disk| disk.target == target.as_str());
                disk.map(|disk| disk.element.clone())
            }
            Attached::Interface(mac) => {
                let interface = self
                    .interfaces
                    .iter()
                    .find(|(known, _)| known == mac.as_str());
                interface.map(|(_, element)| element.clone())
            }
        }
    }
}

fn attribute(node: Node<'_, '_>, child: &str, name: &str) -> Option<String> {
    let child = node.children().find(|node| node.has_tag_name(child))?;
    child.attribute(name).map(ToOwned::to_owned)
}

/// All that QEMU opens for a disk. What lies below another image is only read, and so is what a copy is taken from; a copy itself is written.
fn sources_of(disk: Node<'_, '_>) -> Vec<(Place, Sharing)> {
    let has = |name: &str| disk.children().any(|node| node.has_tag_name(name));
    let own = Sharing {
        read_only: has("readonly") || disk.attribute("device") == Some("cdrom"),
        shareable: has("shareable"),
    };
    let sources = disk
        .descendants()
        .filter(|node| node.has_tag_name("source"));
    sources
        .filter_map(|source| {
            let is_beneath = source
                .ancestors()
                .any(|node| node.has_tag_name("backingStore"));
            let place = match (source.attribute("pool"), source.attribute("volume")) {
                (Some(pool), Some(volume)) => Place::Volume {
                    pool: pool.to_owned(),
                    volume: volume.to_owned(),
                },
                _ => Place::Path(
                    source
                        .attribute("file")
                        .or(source.attribute("dev"))?
                        .to_owned(),
                ),
            };
            Some((place, if is_beneath { Sharing::BENEATH } else { own }))
        })
        .collect()
}

/// What a domain has, before anything is changed.
struct Scene {
    /// Of one that runs.
    live: Option<Hardware>,
    /// Of one that has a definition.
    defined: Option<Hardware>,
}

impl Scene {
    fn read(visit: &Visit<'_>) -> Result<Self, Fault> {
        let show = |inactive| visit.ok(visit.domain.xml_desc(xml_flags(inactive, false)));
        let live = visit
            .state
            .is_active()
            .then(|| show(false).and_then(|xml| Hardware::read(&xml)));
        let defined = persistent(visit)?.then(|| show(true).and_then(|xml| Hardware::read(&xml)));
        Ok(Self {
            live: live.transpose()?,
            defined: defined.transpose()?,
        })
    }

    fn active(&self) -> bool {
        self.live.is_some()
    }

    fn both(&self) -> impl Iterator<Item = &Hardware> {
        self.live.iter().chain(&self.defined)
    }

    /// A name that is taken in one of the two is taken: else the next start would change what is called how.
    fn targets(&self) -> BTreeSet<String> {
        self.both()
            .flat_map(|hardware| &hardware.disks)
            .map(|disk| disk.target.clone())
            .collect()
    }

    fn holds(&self, device: &Attached) -> bool {
        self.both()
            .any(|hardware| hardware.xml_of(device).is_some())
    }

    /// Refuses a source that the domain itself has, where it is to get it.
    fn has_not(&self, source: &Source, forms: Forms, facts: &Facts) -> Result<(), Fault> {
        let places = self
            .live
            .iter()
            .filter(|_| forms.live)
            .chain(self.defined.iter().filter(|_| forms.config));
        for disk in places.flat_map(|hardware| &hardware.disks) {
            let same = |(place, _): &(Place, Sharing)| matches!(place, Place::Path(path) if is_same(path, &source.top));
            if disk.sources.iter().any(same) {
                return Err(conflict(format!(
                    "'{}' has '{}' already, as {}",
                    facts.name, source.top.path, disk.target
                )));
            }
        }
        Ok(())
    }
}

fn persistent(visit: &Visit<'_>) -> Result<bool, Fault> {
    visit.ok(visit.domain.is_persistent())
}

fn is_same(path: &str, layer: &Layer) -> bool {
    path == layer.path || Id::at(path) == Some(layer.id)
}

/// A disk's source of some domain.
#[derive(Clone)]
struct Used {
    hypervisor: usize,
    uuid: Uuid,
    path: String,
    sharing: Sharing,
}

/// What the domains of one hypervisor have as disks, in what runs and in what is defined.
fn disks_in_use(call: &Call, hypervisor: usize, but: Option<Uuid>) -> Result<Vec<Used>, Fault> {
    let mut used: Vec<Used> = Vec::new();
    let domains = call
        .connection
        .list_all_domains(0)
        .map_err(|error| call.fault(&error))?;
    for domain in domains {
        let uuid = domain.uuid().map_err(|error| call.fault(&error))?;
        if Some(uuid) == but {
            continue;
        }
        for inactive in [false, true] {
            let Some(xml) = shown(&domain, inactive).map_err(|error| call.fault(&error))? else {
                continue;
            };
            for disk in Hardware::read(&xml)?.disks {
                let one = |path, sharing| Used {
                    hypervisor,
                    uuid,
                    path,
                    sharing,
                };
                for (place, sharing) in disk.sources {
                    let Some(path) = path_of(&call.connection, place) else {
                        continue;
                    };
                    if disk.hides_backing {
                        let behind = sources::behind(&path, DiskFormat::Qcow2);
                        used.extend(behind.into_iter().map(|path| one(path, Sharing::BENEATH)));
                    }
                    used.push(one(path, sharing));
                }
            }
        }
    }
    Ok(used)
}

/// `None` of a domain that has gone, or has no definition.
fn shown(domain: &Domain, inactive: bool) -> Result<Option<String>, Error> {
    let gone = |error: &Error| error.code().to_raw() == sys::VIR_ERR_NO_DOMAIN;
    match domain.xml_desc(xml_flags(inactive, false)) {
        Err(error) if gone(&error) => Ok(None),
        xml => xml.map(Some),
    }
}

/// A volume that its pool does not know has no bytes that anybody could use.
fn path_of(connection: &Connect, place: Place) -> Option<String> {
    match place {
        Place::Path(path) => Some(path),
        Place::Volume { pool, volume } => {
            let pool = connection.lookup_storage_pool_by_name(&pool).ok()?;
            pool.lookup_storage_vol_by_name(&volume).ok()?.path().ok()
        }
    }
}

/// A domain that is about to get a disk.
struct Claimant<'a> {
    visit: &'a Visit<'a>,
    eyes: &'a Eyes,
    source: &'a Source,
    disk: &'a Disk,
}

impl Claimant<'_> {
    /// Refuses a source that another domain has in a way that stands against this one.
    fn is_free(&self, elsewhere: &[Used]) -> Result<(), Fault> {
        let Self { visit, .. } = self;
        let here = disks_in_use(visit.call, visit.host.index, Some(visit.facts.uuid))?;
        for other in here.iter().chain(elsewhere) {
            let clashes = |(layer, sharing): &(&Layer, Sharing)| {
                sharing.clashes(other.sharing) && is_same(&other.path, layer)
            };
            if let Some((layer, _)) = users(self.source, self.disk).find(clashes) {
                return Err(self.taken(layer, other));
            }
        }
        Ok(())
    }

    fn taken(&self, layer: &Layer, other: &Used) -> Fault {
        let known = self
            .visit
            .host
            .inventory
            .find(&DomainRef::Uuid(other.uuid), Some(other.hypervisor));
        let by = known
            .filter(|facts| (self.eyes)(facts))
            .map(|facts| format!(" of '{}'", facts.name));
        conflict(format!(
            "'{}' is a disk{} already; two domains can have it only if both share it or both only read it",
            layer.path,
            by.unwrap_or_else(|| " of another domain".to_owned())
        ))
    }
}

/// What QEMU opens for a disk, and how.
fn users<'a>(source: &'a Source, disk: &Disk) -> impl Iterator<Item = (&'a Layer, Sharing)> {
    let beneath = source.backing.iter().map(|layer| (layer, Sharing::BENEATH));
    std::iter::once((&source.top, Sharing::of(disk))).chain(beneath)
}

/// What is being attached at this moment, so that two domains that ask for one disk at once do not both find it free.
#[derive(Clone, Default)]
pub(super) struct Claims(Arc<Mutex<Vec<(Id, Sharing)>>>);

/// Stands until it is dropped: until libvirt has it in its own books, or has refused.
struct Claim {
    claims: Claims,
    mine: Vec<(Id, Sharing)>,
}

impl Claims {
    fn claim(&self, source: &Source, disk: &Disk) -> Result<Claim, Fault> {
        let mine: Vec<_> = users(source, disk)
            .map(|(layer, sharing)| (layer.id, sharing))
            .collect();
        let mut table = self.table();
        let clashes = |(id, sharing): &(Id, Sharing)| {
            table
                .iter()
                .any(|(known, theirs)| known == id && sharing.clashes(*theirs))
        };
        if mine.iter().any(clashes) {
            return Err(Fault::new(
                Code::Busy,
                format!(
                    "'{}' is being attached to another domain at this moment; nothing has begun, ask again later",
                    source.top.path
                ),
            ));
        }
        table.extend(mine.iter().copied());
        drop(table);
        Ok(Claim {
            claims: self.clone(),
            mine,
        })
    }

    fn table(&self) -> MutexGuard<'_, Vec<(Id, Sharing)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut table = self.claims.table();
        for mine in &self.mine {
            if let Some(at) = table.iter().position(|known| known == mine) {
                table.swap_remove(at);
            }
        }
    }
}

/// Takes a device out of what runs, and waits until the guest has let go of it.
fn release(
    visit: &Visit<'_>,
    device: &Attached,
    xml: &str,
    deadline: Instant,
) -> Result<(), Fault> {
    let began = Instant::now();
    if let Err(error) = visit.domain.detach_device_flags(xml, sys::VIR_DOMAIN_AFFECT_LIVE)
        // Asked before, and the guest has not done it yet.
        && !error.message().contains("already in the process of unplug")
    {
        return Err(fault(visit.call, &error));
    }
    let until = deadline.checked_sub(ANSWER_TIME).unwrap_or(deadline);
    let until = until.min(began + LET_GO);
    loop {
        if !visit.ok(visit.domain.is_active())? {
            return Ok(());
        }
        let now = visit.ok(visit.domain.xml_desc(xml_flags(false, false)))?;
        if Hardware::read(&now)?.xml_of(device).is_none() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(Fault {
                retry: true,
                ..Fault::new(
                    Code::Refused,
                    format!(
                        "the guest of '{}' has been asked for {} and has not let go of it in {:.0} s; it may still do so, and nothing else was changed",
                        visit.facts.name,
                        called(device),
                        began.elapsed().as_secs_f64()
                    ),
                )
            });
        }
        thread::sleep(LOOK);
    }
}

/// The fault of a device that could not be attached, after what there may be of it has been taken away again.
fn undone(visit: &Visit<'_>, device: &Attached, why: &Fault, deadline: Instant) -> Fault {
    if why.code == Code::Unknown {
        return why.clone();
    }
    let Ok(scene) = Scene::read(visit) else {
        return faults::unknown(&why.message);
    };
    if !scene.holds(device) {
        return why.clone();
    }
    let live = scene.live.as_ref().and_then(|live| live.xml_of(device));
    let defined = scene
        .defined
        .as_ref()
        .and_then(|defined| defined.xml_of(device));
    let released = live.map_or(Ok(()), |xml| release(visit, device, &xml, deadline));
    let undefined = defined.map_or(Ok(()), |xml| {
        visit.ok(visit
            .domain
            .detach_device_flags(&xml, sys::VIR_DOMAIN_AFFECT_CONFIG))
    });
    visit.settle();
    match released.and(undefined) {
        Ok(()) => Fault::new(
            why.code,
            format!(
                "it was taken away again, since it could not be put everywhere: {}",
                why.message
            ),
        ),
        Err(left) => faults::unknown(&format!(
            "{} is in a part of '{}' only ({}), and could not be taken away again ({})",
            called(device),
            visit.facts.name,
            why.message,
            left.message
        )),
    }
}

fn called(device: &Attached) -> String {
    match device {
        Attached::Disk(target) => format!("the disk '{target}'"),
        Attached::Interface(mac) => format!("the interface {mac}"),
    }
}

fn not_there(visit: &Visit<'_>, device: &Attached, is_defined: bool) -> Fault {
    let (name, what) = (&visit.facts.name, called(device));
    let message = if is_defined {
        format!(
            "{what} is only in the definition of '{name}', not in what runs; --config takes it from there"
        )
    } else {
        format!("'{name}' has no such device: {what}; `rxm describe {name}` shows those it has")
    };
    Fault::new(Code::NotFound, message)
}

/// libvirt's refusals that are about devices here, and about definitions elsewhere.
fn fault(call: &Call, error: &Error) -> Fault {
    match error.code().to_raw() {
        sys::VIR_ERR_NO_SUPPORT
        | sys::VIR_ERR_OPERATION_UNSUPPORTED
        | sys::VIR_ERR_CONFIG_UNSUPPORTED
        | sys::VIR_ERR_ARGUMENT_UNSUPPORTED => Fault::new(
            Code::Unsupported,
            format!(
                "this hypervisor, or this domain's machine, has no way to attach or detach that; `rxm edit` changes the definition ({})",
                faults::tidy(error.message())
            ),
        ),
        sys::VIR_ERR_NO_NETWORK => Fault::new(
            Code::Refused,
            format!(
                "libvirt has no such network, or it does not run; `virsh net-list --all` on the host shows them ({})",
                faults::tidy(error.message())
            ),
        ),
        _ => call.fault(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn disk(target: Option<&str>) -> Disk {
        Disk {
            source: "/images/a".to_owned(),
            target: target.map(|target| target.parse().unwrap()),
            format: DiskFormat::Raw,
            read_only: false,
            shareable: false,
            cdrom: false,
        }
    }

    fn layer(path: &str, inode: u64) -> Layer {
        Layer {
            path: path.to_owned(),
            format: DiskFormat::Raw,
            id: Id::File { device: 1, inode },
        }
    }

    fn source(path: &str) -> Source {
        Source {
            top: layer(path, 1),
            backing: Vec::new(),
        }
    }

    #[test]
    fn a_device_goes_where_the_domain_is() {
        let name = "web".parse().unwrap();
        let put = |config, active, persistent| forms(config, &name, active, persistent);
        let both = |live, config| Ok(Forms { live, config });
        assert_eq!(put(false, true, true), both(true, false));
        assert_eq!(put(true, true, true), both(true, true));
        assert_eq!(put(false, false, true), both(false, true));
        assert_eq!(put(true, false, true), both(false, true));
        assert_eq!(put(false, true, false), both(true, false));
        assert_eq!(put(true, true, false).unwrap_err().code, Code::Conflict);
    }

    #[test]
    fn the_next_free_name_is_taken_and_a_taken_one_refused() {
        let taken = |names: &[&str]| names.iter().map(|&name| name.to_owned()).collect();
        let free = |disk: &Disk, driver, names: &[&str]| free_target(disk, driver, &taken(names));
        let plain = disk(None);
        assert_eq!(free(&plain, "QEMU", &[]).unwrap().as_str(), "vda");
        assert_eq!(
            free(&plain, "QEMU", &["vda", "hdb"]).unwrap().as_str(),
            "vdb"
        );
        assert_eq!(free(&plain, "Xen", &["xvda"]).unwrap().as_str(), "xvdb");
        let cdrom = Disk {
            cdrom: true,
            ..disk(None)
        };
        assert_eq!(free(&cdrom, "QEMU", &["sda"]).unwrap().as_str(), "sdb");
        assert_eq!(
            free(&disk(Some("vdc")), "QEMU", &[]).unwrap().as_str(),
            "vdc"
        );
        let fault = free(&disk(Some("vda")), "QEMU", &["vda"]).unwrap_err();
        assert_eq!(fault.code, Code::Conflict);
        let all: Vec<_> = (0..MAX_NAMES)
            .map(|number| format!("vd{}", letters(number)))
            .collect();
        assert_eq!(
            (all.get(26).unwrap().as_str(), all.last().unwrap().as_str()),
            ("vdaa", "vdzz")
        );
        assert!(free_target(&plain, "QEMU", &all.into_iter().collect()).is_err());
    }

    #[test]
    fn a_name_chooses_its_bus_and_others_are_none() {
        for (name, expected) in [
            ("vda", "virtio"),
            ("sdzz", "scsi"),
            ("hdc", "ide"),
            ("xvdb", "xen"),
        ] {
            assert_eq!(bus(&name.parse().unwrap(), false), Ok(expected));
        }
        for (name, cdrom) in [
            ("vd", false),
            ("vdabc", false),
            ("vda1", false),
            ("fda", false),
            ("vda", true),
        ] {
            let fault = bus(&name.parse().unwrap(), cdrom).unwrap_err();
            assert_eq!(fault.code, Code::BadRequest, "{name}");
        }
    }

    #[test]
    fn what_is_written_is_read_as_what_was_meant() {
        let path = "/images/a 'b' \"c\" <d/> & ]]> &amp; ü";
        let request = Disk {
            read_only: true,
            ..disk(None)
        };
        let xml = disk_xml(&request, &source(path), &"vdb".parse().unwrap());
        let domain = format!("<domain><devices>{xml}</devices></domain>");
        let hardware = Hardware::read(&domain).unwrap();
        let [seen] = hardware.disks.as_slice() else {
            panic!("{hardware:?}")
        };
        let sharing = Sharing {
            read_only: true,
            shareable: false,
        };
        assert_eq!(seen.sources, [(Place::Path(path.to_owned()), sharing)]);
        assert_eq!((seen.target.as_str(), &seen.element), ("vdb", &xml));

        let interface = Interface {
            link: Link::Network("a'/><x b='\"&".replace('/', "").parse().unwrap()),
            mac: None,
            model: Some("e1000".parse().unwrap()),
        };
        let mac = new_mac().unwrap();
        let xml = interface_xml(&interface, &mac);
        let document = Document::parse(&xml).unwrap();
        let element = document.root_element();
        assert_eq!(
            attribute(element, "source", "network").as_deref(),
            Some("a'><x b='\"&")
        );
        assert_eq!(element.children().count(), 3, "{xml}");
        let domain = format!("<domain><devices>{xml}</devices></domain>");
        let hardware = Hardware::read(&domain).unwrap();
        assert_eq!(hardware.xml_of(&Attached::Interface(mac)), Some(xml));
    }

    #[test]
    fn an_image_is_attached_with_its_whole_chain_and_nothing_is_left_to_its_header() {
        let request = Disk {
            format: DiskFormat::Qcow2,
            ..disk(None)
        };
        let with = |backing: Vec<Layer>| {
            let source = Source {
                top: layer("/images/top", 1),
                backing,
            };
            disk_xml(&request, &source, &"vdb".parse().unwrap())
        };
        assert!(with(Vec::new()).contains("<source file='/images/top'/><backingStore/>"));
        let chain = with(vec![layer("/images/a", 2), layer("/images/b", 3)]);
        assert!(chain.contains("<source file='/images/a'/><backingStore type='file'><format type='raw'/><source file='/images/b'/><backingStore/></backingStore></backingStore>"), "{chain}");
        let hardware =
            Hardware::read(&format!("<domain><devices>{chain}</devices></domain>")).unwrap();
        let sharing: Vec<_> = hardware
            .disks
            .iter()
            .flat_map(|disk| &disk.sources)
            .map(|(_, sharing)| *sharing)
            .collect();
        assert_eq!(
            sharing.get(1..),
            Some([Sharing::BENEATH, Sharing::BENEATH].as_slice())
        );
    }

    #[test]
    fn two_may_have_a_disk_if_both_share_it_or_both_only_read_it() {
        let sharing = |read_only, shareable| Sharing {
            read_only,
            shareable,
        };
        let (alone, reads) = (sharing(false, false), sharing(true, false));
        let (shares, both) = (sharing(false, true), sharing(true, true));
        for (one, other, clash) in [
            (alone, alone, true),
            (alone, reads, true),
            (alone, shares, true),
            (alone, both, true),
            (reads, reads, false),
            (reads, shares, true),
            (reads, both, false),
            (shares, shares, false),
            (shares, both, false),
        ] {
            assert_eq!(one.clashes(other), clash, "{one:?} {other:?}");
            assert_eq!(other.clashes(one), clash, "{other:?} {one:?}");
        }
    }

    #[test]
    fn who_asks_for_the_same_disk_at_once_is_told_to_wait() {
        let claims = Claims::default();
        let held = claims.claim(&source("/images/a"), &disk(None)).unwrap();
        let fault = claims
            .claim(&source("/images/link"), &disk(None))
            .err()
            .unwrap();
        assert_eq!(fault.code, Code::Busy);
        let other = Source {
            top: layer("/images/b", 2),
            backing: Vec::new(),
        };
        assert!(claims.claim(&other, &disk(None)).is_ok());
        drop(held);
        assert!(claims.claim(&source("/images/a"), &disk(None)).is_ok());
        assert!(claims.table().is_empty());
    }

    #[test]
    fn only_what_the_configuration_names_can_be_plugged_into() {
        let allowed = Devices {
            networks: vec!["default".parse().unwrap()],
            bridges: Vec::new(),
            disks: Vec::new(),
        };
        assert!(may_plug(&Link::Network("default".parse().unwrap()), &allowed).is_ok());
        for (link, key) in [
            (Link::Network("other".parse().unwrap()), "`networks`"),
            (Link::Bridge("default".parse().unwrap()), "`bridges`"),
        ] {
            let fault = may_plug(&link, &allowed).unwrap_err();
            assert_eq!(fault.code, Code::Refused);
            assert!(fault.message.contains(key), "{fault}");
        }
    }
}
