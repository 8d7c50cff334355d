//! A domain's memory goes to the image that libvirt keeps for it, and comes back from that and from nothing else.
//!
//! ```text
//! freeze   can it be saved? room? -> libvirt writes, as of a paused domain -> off, the image whole and on the disk
//! thaw     image readable? -> a second name for it -> started paused -> from the image? -> owners as they are -> the second name goes
//!                                                           '-- no, or not at all: nothing ran, the image is there as before
//! ```
//! libvirt takes the image away as soon as a start from it has succeeded, and also where it only believes so; hence the second name. Where xmand
//! ends before that goes, the next thaw lets it go, if what libvirt shows of the domain says that it came from the image. A second name
//! alone is never started from: the domain may have run on since, and its disks with it.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant as Moment},
};

use roxmltree::Node;
use tokio::{sync::watch, time::Instant};
use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{Code, DomainState, Fault, Progress},
};

use super::{Seen, is_active, live_xml, now};
use crate::hypervisor::{
    Hypervisors, Target,
    connections::{Call, Class},
    faults, ffi, progress,
    saved::{
        Origin, enough, free_kib, image_kib, is_unsupported, not_seen, origin, restore_paused,
        save_folder, stayed,
    },
    sense::conflict,
    verbs::{CONTAINERS, Visit},
    xml,
};

/// How long it may take to look at a domain before and after.
const LOOK_LIMIT: Duration = Duration::from_secs(10);
/// How long a start may take that somebody else has begun, and how often is looked meanwhile.
const START_TIME: Duration = Duration::from_secs(10);
const START_LOOK: Duration = Duration::from_millis(100);

impl Hypervisors {
    /// Whether a domain can be frozen now, and how many bytes that may take on the disk; none where it is frozen already.
    ///
    /// # Errors
    /// `Refused` and `Unsupported` with what stands in the way, `Conflict` where it is off.
    pub(crate) async fn can_freeze(&self, target: Target, deadline: Instant) -> Result<u64, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let host = Arc::clone(&hypervisor);
        let home = self.shared.cache.clone();
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            if now(&visit)?.is_frozen() {
                return Ok(0);
            }
            is_active(&visit)?;
            room(&visit, home.as_deref())
        };
        hypervisor
            .run(Class::Read, Vec::new(), Some(deadline), work)
            .await
    }

    /// Writes the memory of a domain, paused or not, to the image that libvirt keeps for it. Nothing to do where that is so already.
    ///
    /// # Errors
    /// As [`Hypervisors::can_freeze`]; with the domain going on as it was what a save can be refused for; `Unknown` where it is not known.
    pub(crate) async fn freeze(
        &self,
        target: Target,
        progress: watch::Sender<Option<Progress>>,
    ) -> Result<Seen, Fault> {
        let look = || self.seen(target.clone(), Instant::now() + LOOK_LIMIT);
        let before = look().await?;
        if before.is_frozen() {
            return Ok(before);
        }
        let home = self.shared.cache.clone();
        let written = self.put_away(target.clone(), progress, move |visit| {
            let name = &visit.facts.name;
            room(visit, home.as_deref())?;
            is_let_alone(visit)?;
            visit.call.begin()?;
            let mut saved = save(&visit.domain);
            if let Err(error) = &saved
                && is_spent(error, visit.state)
            {
                tracing::warn!("'{name}' was left behind by a save that libvirt did not live to end, and is stirred");
                saved = stirred(&visit.domain).and_then(|()| save(&visit.domain));
            }
            if let Err(error) = saved {
                return Err(stayed(visit, &error));
            }
            if let Some(image) = image(visit, home.as_deref())
                && let Err(error) = to_disk(&image)
            {
                tracing::warn!("{}: {error}", image.display());
            }
            match visit.look() {
                Ok(Some(reading)) if reading.saved && !reading.state.is_active() => Ok(()),
                seen => Err(not_seen(name, seen)),
            }
        });
        let written = written.await;
        match (written, look().await) {
            (_, Ok(seen)) if seen.is_frozen() => Ok(seen),
            (Err(fault), _) | (Ok(()), Err(fault)) => Err(fault),
            (Ok(()), Ok(seen)) => Err(faults::unknown(&format!(
                "'{}' was saved, and is {} now",
                target.facts.name, seen.state
            ))),
        }
    }

    /// Starts a domain from its image, paused. Nothing to do where it is there already.
    ///
    /// # Errors
    /// With nothing running and the image as it was: `Conflict` where there is none, `Refused` where it is damaged, libvirt's. `Unknown` where it
    /// is not known.
    pub(crate) async fn thaw(&self, target: Target, deadline: Instant) -> Result<Seen, Fault> {
        let home = self.shared.cache.clone();
        let seen = self
            .step(target, deadline, move |visit| {
                let image = image(visit, home.as_deref());
                let is_stuck = visit.state.is_active() && !has_started(visit)?;
                if visit.state.is_active() && !is_stuck {
                    // An image beside it stays: where libvirt ended in the middle of a restore, it may yet end the domain.
                    return image.map_or(Ok(()), |image| let_go(visit, &Spare::of(&image)));
                }
                if let Some(image) = &image {
                    is_not_lost(&visit.facts.name, &Spare::of(image))?;
                }
                let spare = image.and_then(|image| Spare::make(&image));
                let restored = if is_stuck {
                    start_over(visit, spare.as_ref())
                } else {
                    restore_paused(visit)
                };
                match (restored, spare) {
                    (Ok(()), None) => Ok(()),
                    (Ok(()), Some(spare)) => {
                        spare.let_go();
                        Ok(())
                    }
                    (Err(fault), spare) => Err(still_there(&visit.facts.name, spare, fault)),
                }
            })
            .await?;
        match seen {
            (_, seen) if seen.state.is_active() => Ok(seen),
            (name, seen) => Err(Fault {
                retry: true,
                ..Fault::new(
                    Code::Refused,
                    format!(
                        "'{name}' was there, and went {} ({})",
                        seen.state, seen.reason
                    ),
                )
            }),
        }
    }
}

/// Refuses what cannot be saved, or for which there is no room; returns how many bytes it may take.
fn room(visit: &Visit<'_>, home: Option<&Path>) -> Result<u64, Fault> {
    let name = &visit.facts.name;
    if !visit.ok(visit.domain.is_persistent())? {
        return Err(conflict(format!(
            "'{name}' has no definition: once it is off, nothing knows of its image; `rxm define` gives it one"
        )));
    }
    let keeps_images = match visit.domain.has_managed_save(0) {
        // That of containers says that there is none, as if there could be one.
        Ok(_) => visit.host.inventory.driver(visit.host.index) != CONTAINERS,
        Err(error) if is_unsupported(&error) => false,
        Err(error) => return Err(visit.call.fault(&error)),
    };
    if !keeps_images {
        return Err(Fault::new(
            Code::Unsupported,
            format!(
                "'{name}' cannot be frozen: {} keeps no image of a domain's memory; choose `preempt = \"starve\"` or \"pause\" for its class",
                visit.host.uri
            ),
        ));
    }
    let shown = live_xml(visit)?;
    let document = xml::document(&shown)?;
    if let Some(what) = unsavable(document.root_element()) {
        return Err(Fault::new(
            Code::Refused,
            format!(
                "'{name}' cannot be frozen: {what} cannot be saved with its memory; take that away, or choose `preempt = \"pause\"` for its class"
            ),
        ));
    }
    let memory_kib = visit.ok(visit.domain.info())?.memory;
    if let Some(folder) = save_folder(&visit.host.uri, home) {
        match free_kib(&folder) {
            Ok(free) => enough(name, memory_kib, free, &folder)?,
            // libvirt makes its folder itself, and knows best what is wrong with it.
            Err(error) => tracing::debug!("{}: {error}", folder.display()),
        }
    }
    Ok(image_kib(memory_kib).saturating_mul(1024))
}

/// Finds in a running domain's XML what its hypervisor cannot save: libvirt says so too, some of it only after all memory was written.
fn unsavable(domain: Node<'_, '_>) -> Option<String> {
    let child = |node: Node<'_, '_>, name: &str| {
        node.children()
            .find(|child| child.has_tag_name(name))
            .and_then(|child| child.attribute("type").or_else(|| child.attribute("model")))
            .map(str::to_owned)
    };
    let tsc_is_fixed = domain.descendants().any(|node| {
        node.has_tag_name("timer")
            && node.attribute("name") == Some("tsc")
            && node.has_attribute("frequency")
    });
    domain
        .descendants()
        .filter(Node::is_element)
        .find_map(|node| {
            let kind = node.attribute("type").unwrap_or_default();
            let is_device = node
                .parent_element()
                .is_some_and(|parent| parent.has_tag_name("devices"));
            match (node.tag_name().name(), kind) {
                // What hangs on the host's USB, and a SCSI disk, keep no memory of their own that would be lost.
                ("hostdev", "usb" | "scsi") => None,
                ("hostdev", kind) if is_device => {
                    Some(format!("a device of the host (hostdev, {kind})"))
                }
                ("interface", "hostdev" | "vdpa") if is_device => {
                    Some(format!("a network interface of the host ({kind})"))
                }
                ("disk", "nvme" | "vhostvdpa") if is_device => {
                    Some(format!("a disk of the host ({kind})"))
                }
                ("filesystem", _) if is_device => {
                    Some("a folder of the host (filesystem)".to_owned())
                }
                ("shmem", _) if is_device => {
                    Some("memory that it shares with others (shmem)".to_owned())
                }
                ("tpm", _)
                    if is_device && child(node, "backend").as_deref() == Some("passthrough") =>
                {
                    Some("the host's TPM".to_owned())
                }
                ("launchSecurity", kind) => Some(format!(
                    "memory that the host cannot read (launchSecurity, {kind})"
                )),
                ("cpu", _) if node.attribute("migratable") == Some("off") => {
                    Some("a CPU that is marked so (migratable='off')".to_owned())
                }
                ("feature", _)
                    if node.attribute("name") == Some("invtsc")
                        && matches!(node.attribute("policy"), Some("require" | "force"))
                        && !tsc_is_fixed =>
                {
                    Some("a CPU with invtsc and no fixed frequency".to_owned())
                }
                ("arg", _)
                    if node
                        .attribute("value")
                        .is_some_and(|value| value.contains("vfio")) =>
                {
                    Some("a device of the host (vfio)".to_owned())
                }
                _ => None,
            }
        })
}

/// Refuses while libvirt works on the domain already: xmand may have begun that, and ended since.
fn is_let_alone(visit: &Visit<'_>) -> Result<(), Fault> {
    match ffi::job(&visit.domain) {
        Ok(job) if progress::is_under_way(&job) => Err(Fault {
            retry: true,
            ..Fault::new(
                Code::Busy,
                format!(
                    "libvirt works on '{}' already: it is being saved or moved; nothing has begun, ask again later",
                    visit.facts.name
                ),
            )
        }),
        _ => Ok(()),
    }
}

/// Whoever starts it from its image, libvirt at the start of the host among them, gets it paused.
fn save(domain: &Domain) -> Result<(), Error> {
    match domain.managed_save(sys::VIR_DOMAIN_SAVE_PAUSED) {
        Err(error)
            if error.code().to_raw() == sys::VIR_ERR_INVALID_ARG
                && error.message().contains("unsupported flags") =>
        {
            domain.managed_save(0)
        }
        saved => saved,
    }
}

/// Whether QEMU has written all memory to a libvirt that ended meanwhile: then it takes itself for one that has moved away, and writes no more.
fn is_spent(error: &Error, state: DomainState) -> bool {
    state == DomainState::Paused && error.message().contains("paused due to previous migration")
}

/// QEMU forgets that when it runs, for a moment that no guest needs to notice; nothing else makes it forget.
fn stirred(domain: &Domain) -> Result<(), Error> {
    domain.resume()?;
    domain.suspend()
}

/// Where libvirt keeps a domain's image, where that is on this machine.
fn image(visit: &Visit<'_>, home: Option<&Path>) -> Option<PathBuf> {
    let folder = save_folder(&visit.host.uri, home)?;
    Some(folder.join(format!("{}.save", visit.facts.name)))
}

/// A power loss must find the image that was told of.
fn to_disk(image: &Path) -> io::Result<()> {
    File::open(image)?.sync_all()?;
    image
        .parent()
        .map_or(Ok(()), |folder| File::open(folder)?.sync_all())
}

/// A second name of an image.
struct Spare {
    image: PathBuf,
    kept: PathBuf,
}

impl Spare {
    fn of(image: &Path) -> Self {
        let mut name = std::ffi::OsString::from(".");
        name.push(image.file_name().unwrap_or_default());
        // libvirt takes for an image what ends in `.save`.
        name.push(".kept");
        Self {
            image: image.to_owned(),
            kept: image.with_file_name(name),
        }
    }

    /// Gives an image a second name. Without one its only safety is that it was looked at; that must do where its folder has no such thing.
    fn make(image: &Path) -> Option<Self> {
        let spare = Self::of(image);
        let inode = |path: &Path| fs::metadata(path).map(|found| (found.dev(), found.ino()));
        let made = match (inode(&spare.image), inode(&spare.kept)) {
            (Err(error), _) => Err(error),
            (Ok(image), Ok(kept)) if image == kept => Ok(()),
            (Ok(_), Ok(_)) => {
                fs::remove_file(&spare.kept).and_then(|()| fs::hard_link(&spare.image, &spare.kept))
            }
            (Ok(_), Err(_)) => fs::hard_link(&spare.image, &spare.kept),
        };
        match made {
            Ok(()) => Some(spare),
            Err(error) => {
                tracing::warn!(
                    "{} gets no second name while its domain is restored: {error}",
                    spare.image.display()
                );
                None
            }
        }
    }

    fn is_left(&self) -> bool {
        self.kept.exists()
    }

    fn let_go(&self) {
        if let Err(error) = fs::remove_file(&self.kept)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!("{}: {error}", self.kept.display());
        }
    }

    /// Gives the image back the name under which libvirt looks for it, where it has lost that.
    fn put_back(&self) -> io::Result<()> {
        if self.image.exists() {
            self.let_go();
            return Ok(());
        }
        fs::rename(&self.kept, &self.image)
    }
}

/// Refuses while libvirt still starts a domain: where it ended in between, it may yet find that nothing came of that.
pub(super) fn is_there(visit: &Visit<'_>) -> Result<(), Fault> {
    if is_starting(visit)? {
        return Err(still_starting(visit));
    }
    Ok(())
}

fn is_starting(visit: &Visit<'_>) -> Result<bool, Fault> {
    let (state, reason) = visit.ok(ffi::state(&visit.domain))?;
    let is = |number: i32, known: u32| u32::try_from(number).is_ok_and(|number| number == known);
    Ok(is(state, sys::VIR_DOMAIN_PAUSED) && is(reason, sys::VIR_DOMAIN_PAUSED_STARTING_UP))
}

/// Waits a while for a start that somebody else has begun. One whose libvirt ended in the middle is never done.
fn has_started(visit: &Visit<'_>) -> Result<bool, Fault> {
    let until = Moment::now() + START_TIME;
    while is_starting(visit)? {
        if Moment::now() >= until {
            return Ok(false);
        }
        thread::sleep(START_LOOK);
    }
    Ok(true)
}

/// Ends a start that is never done, and starts again. Nothing of the domain has run, and its image has a second name, whatever libvirt does to
/// the first.
fn start_over(visit: &Visit<'_>, spare: Option<&Spare>) -> Result<(), Fault> {
    if spare.is_none() || ffi::managed_save_xml(&visit.domain).is_err() {
        return Err(still_starting(visit));
    }
    visit.call.begin()?;
    tracing::warn!(
        "the start of '{}' from its image has stopped in the middle, and is begun again",
        visit.facts.name
    );
    visit.ok(visit.domain.destroy())?;
    restore_paused(&visit.again()?)
}

fn still_starting(visit: &Visit<'_>) -> Fault {
    Fault {
        retry: true,
        ..Fault::new(
            Code::Busy,
            format!(
                "libvirt is still starting '{0}'; ask again later. Where that goes on, libvirt was ended in the middle of it: `rxm destroy {0}` or restart \
                 libvirt; nothing of it has run, and its image is there",
                visit.facts.name
            ),
        )
    }
}

/// Takes the image away from beside a domain that runs: it is left of a save or a restore whose libvirt ended in the middle, and of yesterday by now;
/// a later start from it would spoil the disks. It keeps its second name until the next visit, for the case that the domain ends at once.
pub(super) fn put_aside(visit: &Visit<'_>, home: Option<&Path>) -> Result<(), Fault> {
    if !visit.domain.has_managed_save(0).unwrap_or(false) {
        return Ok(());
    }
    let _kept = image(visit, home).and_then(|image| Spare::make(&image));
    visit.call.begin()?;
    visit.ok(visit.domain.managed_save_remove(0))
}

/// A second name that was left behind goes once the domain is seen to have come from the image, or to run: then its memory is of yesterday.
fn let_go(visit: &Visit<'_>, spare: &Spare) -> Result<(), Fault> {
    if !spare.is_left() {
        return Ok(());
    }
    let driver = visit.ok(visit.call.connection.driver_type())?;
    let pair = visit.ok(ffi::state(&visit.domain))?;
    let is_sure = origin(&driver, pair) == Origin::Image
        || matches!(visit.state, DomainState::Running | DomainState::Blocked)
        || spare.image.exists();
    if is_sure {
        spare.let_go();
        return Ok(());
    }
    Err(conflict(format!(
        "'{}' is {} and was about to be restored when xmand ended: nobody knows whether it came from its image, which is kept as {}; look at it, \
         then `rxm unpause` it, or `rxm destroy` it and give the image its name back",
        visit.facts.name,
        visit.state,
        spare.kept.display()
    )))
}

/// Says where the memory of a domain is that is off and whose image only has its second name: that happens where the host ends within the
/// moment between a restore and what follows.
fn is_not_lost(name: &DomainName, spare: &Spare) -> Result<(), Fault> {
    if spare.image.exists() || !spare.is_left() {
        return Ok(());
    }
    Err(conflict(format!(
        "'{name}' was restored from its image when its host or its libvirt ended, and is off: its memory is kept as {}. If it has not run since, give \
         that file the name {} and restart libvirt; otherwise remove it and `rxm start {name}`",
        spare.kept.display(),
        spare.image.display()
    )))
}

/// Says that an image is as it was, after its domain could not be started from it.
fn still_there(name: &DomainName, spare: Option<Spare>, fault: Fault) -> Fault {
    // Nobody knows what of it runs.
    if fault.code == Code::Unknown {
        return fault;
    }
    let Some(spare) = spare else {
        return fault;
    };
    let message = match spare.put_back() {
        Ok(()) => format!(
            "'{name}' stays frozen, and its image is there as before: {}",
            fault.message
        ),
        Err(error) => format!(
            "'{name}' stays frozen, its image is kept as {} ({error}): {}",
            spare.kept.display(),
            fault.message
        ),
    };
    Fault { message, ..fault }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(inside: &str, expected: Option<&str>) {
        let xml = format!("<domain type='kvm' xmlns:qemu='x'>{inside}</domain>");
        let document = xml::document(&xml).unwrap();
        let found = unsavable(document.root_element());
        match expected {
            None => assert_eq!(found, None, "{inside}"),
            Some(part) => assert!(
                found.as_deref().is_some_and(|found| found.contains(part)),
                "{inside}: {found:?}"
            ),
        }
    }

    #[test]
    fn what_the_host_lends_cannot_be_saved() {
        let device =
            |device: &str, expected| check(&format!("<devices>{device}</devices>"), expected);
        device(
            "<disk type='file'/><interface type='bridge'/><memballoon model='virtio'/>",
            None,
        );
        device("<hostdev mode='subsystem' type='usb'/>", None);
        device("<hostdev mode='subsystem' type='scsi'/>", None);
        device(
            "<hostdev mode='subsystem' type='pci'/>",
            Some("hostdev, pci"),
        );
        device(
            "<hostdev mode='subsystem' type='mdev'/>",
            Some("hostdev, mdev"),
        );
        device("<interface type='hostdev'/>", Some("network interface"));
        device("<interface type='vdpa'/>", Some("vdpa"));
        device("<disk type='nvme'/>", Some("nvme"));
        device(
            "<filesystem type='mount'><driver type='virtiofs'/></filesystem>",
            Some("filesystem"),
        );
        device("<shmem name='x'/>", Some("shmem"));
        device("<tpm><backend type='passthrough'/></tpm>", Some("TPM"));
        device("<tpm><backend type='emulator'/></tpm>", None);
        check("<launchSecurity type='sev'/>", Some("sev"));
        check(
            "<cpu mode='host-passthrough' migratable='off'/>",
            Some("migratable"),
        );
        check("<cpu mode='host-passthrough' migratable='on'/>", None);
        let invtsc = "<cpu><feature policy='require' name='invtsc'/></cpu>";
        check(invtsc, Some("invtsc"));
        check("<cpu><feature policy='disable' name='invtsc'/></cpu>", None);
        check(
            &format!("{invtsc}<clock><timer name='tsc' frequency='2'/></clock>"),
            None,
        );
        check(
            "<qemu:commandline><qemu:arg value='vfio-pci,host=1'/></qemu:commandline>",
            Some("vfio"),
        );
        check("<metadata><hostdev type='pci'/></metadata>", None);
    }

    #[test]
    fn a_second_name_saves_an_image_that_lost_its_own_and_is_never_left() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("web.save");
        assert!(Spare::make(&image).is_none(), "there is no image");
        fs::write(&image, "memory").unwrap();
        let spare = Spare::make(&image).unwrap();
        assert!(spare.is_left() && !spare.kept.to_string_lossy().ends_with(".save"));
        assert!(
            Spare::make(&image).unwrap().is_left(),
            "made before xmand ended"
        );
        spare.put_back().unwrap();
        assert!(!spare.is_left() && image.exists());
        let spare = Spare::make(&image).unwrap();
        fs::remove_file(&image).unwrap();
        let fault = Fault::new(Code::Refused, "it was damaged");
        let said = still_there(&"web".parse().unwrap(), Some(spare), fault);
        assert!(said.message.contains("as before: it was damaged"), "{said}");
        assert_eq!(fs::read_to_string(&image).unwrap(), "memory");
        let old = Spare::make(&image).unwrap();
        fs::remove_file(&image).unwrap();
        fs::write(&image, "newer").unwrap();
        assert!(Spare::make(&image).is_some(), "in the place of the older");
        assert_eq!(fs::read_to_string(&old.kept).unwrap(), "newer");
        old.let_go();
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
