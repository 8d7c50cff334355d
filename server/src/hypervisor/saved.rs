//! A domain's memory goes to an image, and a domain starts from one: libvirt's own image of it, or a named one.
//!
//! ```text
//! save, save-to      lane -> room on the disk? -> libvirt writes -> off, and the image whole
//!                                                      '-- failed, given up: the domain runs on, nothing is left of the image
//! restore            lane -> image whole? -> started paused -> from the image? -> owners as they are -> let run
//!                                                                   '-- afresh: destroyed before anything ran
//! restore-from       host-wide lane -> whose XML? -> judge -> as restore, and used up before it runs
//! ```
//! libvirt starts a domain afresh, and says that all went well, where its own image is cut; so an image is looked at before, and the domain after.
//! A save goes on in libvirt when xmand ends: what became of a named image that was being written is found out later, and memory that is
//! nowhere else is never thrown away.

use std::{
    io,
    path::{Path, PathBuf},
    sync::Arc,
    thread,
    time::{Duration, Instant as Moment},
};

use nix::sys::statvfs::statvfs;
use tokio::{sync::watch, time::Instant};
use virt::{domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::{
    name::{DomainName, Tag},
    protocol::{Code, DomainRow, DomainState, Fault, MAX_XML, Progress},
};

use super::{
    Hypervisors, Judge, NewDomain, Target, XmlJudge,
    connections::{Call, Class, Hypervisor},
    faults, ffi,
    inventory::Reading,
    kept::Kept,
    lanes::Key,
    making::{self, Found},
    percent_decoded, progress, readings,
    sense::{Act, conflict, in_words, sense},
    verbs::Visit,
    xml,
};
use crate::images::{Draft, Images, Note, Taken};

/// How long a save waits for its domain's lane, and then for its turn: disks are not faster for many at a time.
const TURN_WAIT: Duration = Duration::from_secs(30);
/// What an image takes beside the memory that a guest has now: its devices and its screen, in KiB, and a share of the memory.
const MARGIN_KIB: u64 = 64 * 1024;
const MARGIN_SHARE: u64 = 20;
/// After a failure libvirt lets the guest run on by itself; this long it is given.
const RESUME_TIME: Duration = Duration::from_secs(3);
const RESUME_LOOK: Duration = Duration::from_millis(200);
/// How often is looked what libvirt made of an image that was being written when xmand lost sight of it.
const SETTLE_LOOK: Duration = Duration::from_secs(3);
/// How long an answer to that may take.
const SETTLE_LIMIT: Duration = Duration::from_secs(10);

impl Hypervisors {
    /// Writes a domain's memory to the image that libvirt keeps for it, and ends when that has ended.
    ///
    /// # Errors
    /// With the domain going on as it was: `Conflict`, `Refused`, and what a change can be refused for. `Unknown` where it is not known.
    pub(crate) async fn save(
        &self,
        target: Target,
        progress: watch::Sender<Option<Progress>>,
    ) -> Result<(), Fault> {
        let home = self.shared.cache.clone();
        self.put_away(target, progress, move |visit| {
            let name = &visit.facts.name;
            if !visit.ok(visit.domain.is_persistent())? {
                return Err(conflict(format!(
                    "'{name}' has no definition: once it is off, nothing knows of its image; `rxm save --to IMAGE {name}` writes it to a named one"
                )));
            }
            if let Some(folder) = save_folder(&visit.host.uri, home.as_deref()) {
                room(visit, &folder)?;
            }
            visit.call.begin()?;
            if let Err(error) = visit.domain.managed_save(0) {
                return Err(stayed(visit, &error));
            }
            match visit.look() {
                Ok(Some(reading)) if reading.saved && !reading.state.is_active() => Ok(()),
                seen => Err(not_seen(name, seen)),
            }
        })
        .await
    }

    /// As [`Hypervisors::save`], to a named image.
    pub(crate) async fn save_to(
        &self,
        target: Target,
        images: &Images,
        name: &Tag,
        progress: watch::Sender<Option<Progress>>,
    ) -> Result<(), Fault> {
        is_on_this_machine(&target.facts.uri)?;
        let draft = Arc::new(images.begin(name, Note::of(&target.facts))?);
        let written = Arc::clone(&draft);
        let saved = self
            .put_away(target, progress, move |visit| {
                room(visit, written.folder())?;
                let memory = written.memory();
                let memory = as_text(&memory)?;
                visit.call.begin()?;
                if let Err(error) = ffi::save(&visit.domain, memory) {
                    return Err(stayed(visit, &error));
                }
                match visit.look() {
                    Ok(Some(reading)) if reading.state.is_active() => {
                        return Err(not_seen(&visit.facts.name, Ok(Some(reading))));
                    }
                    Ok(_) => {}
                    // It is off: libvirt has said so. The rest of what there is to know comes with the next reading.
                    Err(_) => visit.host.bell.changed(visit.facts.uuid),
                }
                written.keep().map_err(|error| {
                    faults::unknown(&format!(
                        "'{}' is saved and off, and its image could not be given its name yet ({error}); xmand tries again",
                        visit.facts.name
                    ))
                })
            })
            .await;
        match &saved {
            Ok(()) => {}
            Err(fault) if fault.code == Code::Unknown => {
                if let Some(draft) = Arc::into_inner(draft) {
                    self.find_out(vec![draft]);
                }
            }
            Err(_) => {
                if let Err(error) = draft.discard() {
                    tracing::warn!("{}: {error}", draft.folder().display());
                }
            }
        }
        saved
    }

    /// What both saves do around that which libvirt does.
    pub(super) async fn put_away(
        &self,
        target: Target,
        progress: watch::Sender<Option<Progress>>,
        work: impl FnOnce(&Visit<'_>) -> Result<(), Fault> + Send + 'static,
    ) -> Result<(), Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        let lane = hypervisor
            .lanes
            .take(Key::Domain(target.facts.uuid), Instant::now() + TURN_WAIT)
            .await?;
        lane.without_deadline();
        let (host, saved) = (Arc::clone(&hypervisor), target.clone());
        let turn = Some(Instant::now() + TURN_WAIT);
        let running = hypervisor.run(Class::Move, vec![lane], turn, move |call| {
            let visit = Visit::new(call, &host, &saved)?;
            sense(Act::Save, &visit.facts.name, visit.state)?;
            work(&visit)
        });
        tokio::select! {
            outcome = running => outcome,
            never = progress::report(&hypervisor, &target, |_| {}, &progress) => match never {},
        }
    }

    /// Starts a domain from the image that libvirt keeps for it, and from nothing else.
    ///
    /// # Errors
    /// `Conflict` where there is none, `Refused` where it is damaged; nothing has run then.
    pub(crate) async fn restore(
        &self,
        target: Target,
        paused: bool,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            let name = &visit.facts.name;
            restore_paused(visit)?;
            if !paused {
                let_run(visit.call, &visit.domain, name)?;
            }
            Ok(visit.settle())
        })
        .await
    }

    /// Throws the image away that libvirt keeps for a domain.
    pub(crate) async fn discard_saved(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        self.in_lane(target, deadline, move |visit| {
            if !visit.ok(visit.domain.has_managed_save(0))? {
                return Err(no_image(&visit.facts.name));
            }
            visit.call.begin()?;
            visit.ok(visit.domain.managed_save_remove(0))?;
            Ok(visit.settle())
        })
        .await
    }

    /// Starts a domain from a named image, which is used up by that; on any failure it stays.
    ///
    /// # Errors
    /// What the judge says, `Conflict` where the domain runs or is not what was saved, `Refused` where the image is damaged.
    pub(crate) async fn restore_from(
        &self,
        image: Taken,
        asked: Option<&str>,
        paused: bool,
        judge: XmlJudge,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let uri = image.note().hypervisor.as_str();
        if asked.is_some_and(|asked| asked != uri) {
            return Err(conflict(format!(
                "the image '{}' is for the hypervisor {uri}; leave out --hypervisor",
                image.name()
            )));
        }
        let hypervisor = self.chosen(Some(uri))?;
        is_on_this_machine(uri)?;
        let uuid = image.note().uuid;
        // In the order of everybody who takes two.
        let lanes = vec![
            hypervisor.lanes.take(Key::New, deadline).await?,
            hypervisor.lanes.take(Key::Domain(uuid), deadline).await?,
        ];
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| bring_back(call, &host, &image, paused, &judge);
        hypervisor
            .run(Class::Change, lanes, Some(deadline), work)
            .await
    }

    /// Gives a domain that is off another name, which no other has. What stands in the way is only named to who may see it.
    pub(crate) async fn rename(
        &self,
        target: Target,
        name: DomainName,
        may_see: Judge,
        deadline: Instant,
    ) -> Result<DomainRow, Fault> {
        let hypervisor = self.by_index(target.facts.hypervisor)?;
        // In the order of everybody who takes two: names stay as they were judged.
        let lanes = vec![
            hypervisor.lanes.take(Key::New, deadline).await?,
            hypervisor
                .lanes
                .take(Key::Domain(target.facts.uuid), deadline)
                .await?,
        ];
        let host = Arc::clone(&hypervisor);
        let work = move |call: &Call| {
            let visit = Visit::new(call, &host, &target)?;
            let old = &visit.facts.name;
            if *old == name {
                return Err(conflict(format!("'{old}' is called that already")));
            }
            sense(Act::Rename, old, visit.state)?;
            if let Some(other) = visit.ok(readings::find_by_name(&call.connection, &name))? {
                let uuid = visit.ok(other.uuid())?;
                if let Some(facts) = super::verbs::present(call, &host, &other, uuid)? {
                    may_see(&facts)?;
                }
                return Err(conflict(format!(
                    "there is a domain '{name}' already; choose another name"
                )));
            }
            if visit.domain.has_managed_save(0).unwrap_or(false) {
                return Err(conflict(format!(
                    "'{old}' has a saved image, which goes by its name; `rxm restore {old}` uses it, `rxm discard {old}` throws it away"
                )));
            }
            call.begin()?;
            visit.ok(visit.domain.rename(name.as_str(), 0))?;
            Ok(visit.settle())
        };
        hypervisor
            .run(Class::Change, lanes, Some(deadline), work)
            .await
    }

    /// Finds out what libvirt made of images that were being written when xmand lost sight of them, for as long as it takes.
    pub(crate) fn find_out(&self, drafts: Vec<Draft>) {
        for draft in drafts {
            let hypervisors = self.clone();
            tokio::spawn(async move { hypervisors.find_out_one(draft).await });
        }
    }

    async fn find_out_one(&self, draft: Draft) {
        let draft = Arc::new(draft);
        let Ok(hypervisor) = self.chosen(Some(&draft.note().hypervisor)) else {
            tracing::warn!(
                "{}: its hypervisor {} is not configured any more; it is left as it is",
                draft.folder().display(),
                draft.note().hypervisor
            );
            return;
        };
        let mut before = None;
        loop {
            let looked = Arc::clone(&draft);
            let fate = hypervisor
                .run(
                    Class::Read,
                    Vec::new(),
                    Some(Instant::now() + SETTLE_LIMIT),
                    move |call| fate_of(call, &looked),
                )
                .await;
            // Twice the same: libvirt may have been about to begin.
            match (&fate, &before) {
                (Ok(Fate::Whole), _) => match draft.keep() {
                    Ok(()) => {
                        tracing::warn!(
                            "the image '{}' of '{}' was whole when it was looked for again",
                            draft.name(),
                            draft.note().domain
                        );
                        return;
                    }
                    Err(error) => tracing::error!("{}: {error}", draft.folder().display()),
                },
                (Ok(Fate::Lost), Some(Fate::Lost)) => match draft.discard() {
                    Ok(()) => {
                        tracing::warn!(
                            "the image '{}' of '{}' was never whole, and is cleared away",
                            draft.name(),
                            draft.note().domain
                        );
                        return;
                    }
                    Err(error) => tracing::error!("{}: {error}", draft.folder().display()),
                },
                (Ok(Fate::Lost | Fate::Open) | Err(_), _) => {}
            }
            before = fate.ok();
            tokio::time::sleep(SETTLE_LOOK).await;
        }
    }
}

/// What became of an image that was being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// libvirt has written all of it.
    Whole,
    /// It will never be whole, or its domain has gone on without it.
    Lost,
    /// libvirt still writes, or does not say.
    Open,
}

fn fate_of(call: &Call, draft: &Draft) -> Result<Fate, Fault> {
    let failed = |error: Error| call.fault(&error);
    let found = readings::find(&call.connection, draft.note().uuid).map_err(failed)?;
    let saves = match &found {
        None => None,
        Some(domain) => match ffi::job(domain) {
            Ok(job) => Some(progress::is_under_way(&job)),
            Err(error) if is_unsupported(&error) => Some(false),
            Err(error) if error.code().to_raw() == sys::VIR_ERR_OPERATION_INVALID => Some(false),
            Err(error) => return Err(failed(error)),
        },
    };
    let is_active = match &found {
        None => false,
        Some(domain) => readings::state(domain).map_err(failed)?.is_active(),
    };
    let memory = draft.memory();
    let whole = match call.connection.save_image_xml_desc(as_text(&memory)?, 0) {
        Ok(_) => Some(true),
        // libvirt's Xen does not read images for anybody.
        Err(error) if is_unsupported(&error) => None,
        Err(_) if call.connection.is_alive().unwrap_or(false) => Some(false),
        Err(error) => return Err(failed(error)),
    };
    let is_empty = std::fs::metadata(&memory).map_or(true, |memory| memory.len() == 0);
    Ok(fate(saves.unwrap_or(false), is_active, whole, is_empty))
}

/// Decides what became of an image. Where nobody can say whether it is whole, memory that is nowhere else is kept.
fn fate(is_worked_on: bool, is_active: bool, whole: Option<bool>, is_empty: bool) -> Fate {
    match (is_worked_on, is_active, whole) {
        (true, _, _) => Fate::Open,
        (false, true, _) | (false, false, Some(false)) => Fate::Lost,
        (false, false, None) if is_empty => Fate::Lost,
        (false, false, Some(true) | None) => Fate::Whole,
    }
}

/// Starts a domain from its image with its virtual CPUs stopped and the owners that it has now.
///
/// # Errors
/// With nothing running: `Conflict` where there is no image, `Refused` where it is damaged, libvirt's. `Unknown` where it is not known.
pub(super) fn restore_paused(visit: &Visit<'_>) -> Result<(), Fault> {
    let name = &visit.facts.name;
    sense(Act::Restore, name, visit.state)?;
    if !visit.ok(visit.domain.has_managed_save(0))? {
        return Err(no_image(name));
    }
    let kept = Kept::present(visit.call, &visit.domain, &visit.facts)?;
    match ffi::managed_save_xml(&visit.domain) {
        Ok(_) => {}
        Err(error) if is_unsupported(&error) => {}
        Err(error) if visit.call.connection.is_alive().unwrap_or(false) => {
            return Err(damaged(name, &error));
        }
        Err(error) => return Err(visit.call.fault(&error)),
    }
    visit.call.begin()?;
    start_from_image(visit)?;
    kept.see_to(visit.call, &visit.domain).map_err(|fault| {
        faults::unknown(&format!(
            "'{name}' is restored and paused, and it is not certain that its owners are those that it had: {}",
            fault.message
        ))
    })
}

/// Starts a domain from its image with its virtual CPUs stopped, and makes sure that it was that.
fn start_from_image(visit: &Visit<'_>) -> Result<(), Fault> {
    let name = &visit.facts.name;
    visit.ok(start_paused(visit))?;
    let seen = visit
        .call
        .connection
        .driver_type()
        .and_then(|driver| Ok(origin(&driver, ffi::state(&visit.domain)?)));
    match seen {
        Ok(Origin::Image) => Ok(()),
        Ok(Origin::Afresh) => Err(match visit.domain.destroy() {
            Ok(()) => {
                visit.settle();
                Fault::new(
                    Code::Refused,
                    format!(
                        "the saved image of '{name}' was damaged: libvirt threw it away and began to boot the guest afresh; that was ended before anything of it ran. \
                         `rxm start {name}` boots it"
                    ),
                )
            }
            Err(error) => faults::unknown(&format!(
                "the saved image of '{name}' was damaged, libvirt began to boot the guest afresh, and it is paused ({}); `rxm destroy {name}` ends it",
                faults::tidy(error.message())
            )),
        }),
        Ok(Origin::Unsaid) => Err(faults::unknown(&format!(
            "'{name}' is started and paused, and libvirt does not say whether from its image; look at it, then `rxm unpause {name}` or `rxm destroy {name}`"
        ))),
        Err(error) => Err(faults::unknown(&format!(
            "'{name}' is started and paused, and libvirt cannot be asked whether from its image ({})",
            faults::tidy(error.message())
        ))),
    }
}

fn start_paused(visit: &Visit<'_>) -> Result<(), Error> {
    match visit.domain.create_with_flags(sys::VIR_DOMAIN_START_PAUSED) {
        // libvirt's test driver has no such start. Nothing runs in its domains, so that a pause thereafter is the same.
        Err(error)
            if error.code().to_raw() == sys::VIR_ERR_INVALID_ARG
                && visit
                    .call
                    .connection
                    .driver_type()
                    .is_ok_and(|driver| driver.eq_ignore_ascii_case("test")) =>
        {
            visit.domain.create()?;
            visit.domain.suspend()
        }
        started => started,
    }
}

/// Where a domain comes from that was started paused while it had a saved image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Origin {
    Image,
    Afresh,
    Unsaid,
}

/// libvirt's QEMU driver restores by an incoming migration, and says so while the domain is paused; one that boots is paused by its user. Its other
/// drivers say the same of both, and never boot where an image is.
pub(super) fn origin(driver: &str, (state, reason): (i32, i32)) -> Origin {
    let pair = (
        u32::try_from(state).unwrap_or_default(),
        u32::try_from(reason).unwrap_or_default(),
    );
    match pair {
        (sys::VIR_DOMAIN_RUNNING, sys::VIR_DOMAIN_RUNNING_RESTORED)
        | (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_MIGRATION) => Origin::Image,
        (sys::VIR_DOMAIN_PAUSED, _) if driver != "QEMU" => Origin::Image,
        (sys::VIR_DOMAIN_PAUSED, sys::VIR_DOMAIN_PAUSED_USER)
        | (sys::VIR_DOMAIN_RUNNING, sys::VIR_DOMAIN_RUNNING_BOOTED) => Origin::Afresh,
        _ => Origin::Unsaid,
    }
}

fn let_run(call: &Call, domain: &Domain, name: &DomainName) -> Result<(), Fault> {
    domain.resume().map_err(|error| {
        if !call.connection.is_alive().unwrap_or(false) {
            return call.fault(&error);
        }
        faults::unknown(&format!(
            "'{name}' is restored and paused, and libvirt does not let it run on ({}); `rxm unpause {name}` tries again",
            faults::tidy(error.message())
        ))
    })
}

/// Judges what an image holds, starts it paused, and lets it run once the image is no image any more.
fn bring_back(
    call: &Call,
    host: &Hypervisor,
    image: &Taken,
    paused: bool,
    judge: &XmlJudge,
) -> Result<DomainRow, Fault> {
    let memory = image.memory();
    let memory = as_text(&memory)?;
    let (new, held) = described(call, image, memory)?;
    let found = making::find(call, host, &new, judge)?;
    if let Found::One(domain, facts) = &found {
        if facts.name != new.name || Some(facts.uuid) != new.uuid {
            return Err(making::taken(&new, facts));
        }
        sense(Act::Restore, &facts.name, facts.state)?;
        if domain.has_managed_save(0).unwrap_or(false) {
            return Err(conflict(format!(
                "'{}' has a saved image of its own, which would be out of date by that; `rxm restore {0}` uses it, `rxm discard {0}` throws it away",
                facts.name
            )));
        }
    }
    let kept = found.kept(call)?;
    let held = held.map(|xml| kept.put_into(&new, &xml)).transpose()?;
    call.begin()?;
    call.connection
        .restore_domain_flags(memory, held.as_deref(), sys::VIR_DOMAIN_SAVE_PAUSED)
        .map_err(|error| call.fault(&error))?;
    let domain = restored(call, host, image)?;
    // Its disks are as they were saved until it runs: up to there it can be taken away again, and the image stays good.
    let undone = |why: Fault| {
        host.bell.changed(image.note().uuid);
        making::undone(&why, domain.destroy())
    };
    kept.see_to(call, &domain).map_err(undone)?;
    let used = image.use_up().map_err(|error| {
        undone(Fault::new(
            Code::Refused,
            format!("the image cannot be marked as used up: {error}"),
        ))
    })?;
    if let Err(error) = used.remove() {
        tracing::warn!(
            "the image '{}' is used up, and its room not free yet: {error}",
            image.name()
        );
    }
    if !paused {
        let_run(call, &domain, &new.name)?;
    }
    making::made(call, host, &domain)
}

/// Whose memory an image holds, and its XML where the driver shows it. The XML must be of the domain that was saved.
fn described(
    call: &Call,
    image: &Taken,
    memory: &str,
) -> Result<(NewDomain, Option<String>), Fault> {
    let note = image.note();
    let noted = NewDomain {
        name: note.domain.clone(),
        uuid: Some(note.uuid),
        memory_kib: 0,
        vcpus: 0,
    };
    let secure = sys::VIR_DOMAIN_SAVE_IMAGE_XML_SECURE;
    let held = match call.connection.save_image_xml_desc(memory, secure) {
        Ok(held) => held,
        // libvirt's Xen does not read images for anybody; we wrote the note, where nobody else writes.
        Err(error) if is_unsupported(&error) => return Ok((noted, None)),
        Err(error) if call.connection.is_alive().unwrap_or(false) => {
            return Err(Fault::new(
                Code::Refused,
                format!(
                    "the image '{}' is damaged and cannot be read; nothing of it ran ({})",
                    image.name(),
                    faults::tidy(error.message())
                ),
            ));
        }
        Err(error) => return Err(call.fault(&error)),
    };
    if held.len() > MAX_XML {
        return Err(Fault::new(
            Code::TooLarge,
            format!(
                "the XML in the image '{}' has {} bytes, and {MAX_XML} are allowed",
                image.name(),
                held.len()
            ),
        ));
    }
    let (new, _) = xml::read(&held)?;
    if (&new.name, new.uuid) != (&noted.name, noted.uuid) {
        return Err(Fault::new(
            Code::Refused,
            format!(
                "the image '{}' is not of '{}', as its note says; the host's administrator has to look",
                image.name(),
                note.domain
            ),
        ));
    }
    Ok((new, Some(held)))
}

/// The domain that has just been restored.
fn restored(call: &Call, host: &Hypervisor, image: &Taken) -> Result<Domain, Fault> {
    let uuid = image.note().uuid;
    match readings::find(&call.connection, uuid) {
        Ok(Some(domain)) => Ok(domain),
        seen => {
            host.bell.changed(uuid);
            let why = seen.err().map_or_else(
                || "libvirt does not know it".to_owned(),
                |error| faults::tidy(error.message()),
            );
            Err(faults::unknown(&format!(
                "'{}' was restored and cannot be found ({why})",
                image.note().domain
            )))
        }
    }
}

/// Refuses a save for which there is no room: a full disk would end it after a long silence of the guest.
fn room(visit: &Visit<'_>, folder: &Path) -> Result<(), Fault> {
    let memory_kib = visit.ok(visit.domain.info())?.memory;
    match free_kib(folder) {
        Ok(free) => enough(&visit.facts.name, memory_kib, free, folder),
        // libvirt makes its folder itself, and knows best what is wrong with it.
        Err(error) => {
            tracing::debug!("{}: {error}", folder.display());
            Ok(())
        }
    }
}

/// What the image of a guest with so much memory can take, in KiB.
pub(super) fn image_kib(memory_kib: u64) -> u64 {
    memory_kib
        .saturating_add(memory_kib / MARGIN_SHARE)
        .saturating_add(MARGIN_KIB)
}

pub(super) fn enough(
    name: &DomainName,
    memory_kib: u64,
    free: u64,
    folder: &Path,
) -> Result<(), Fault> {
    let needed = image_kib(memory_kib);
    if needed <= free {
        return Ok(());
    }
    Err(Fault::new(
        Code::Refused,
        format!(
            "the image of '{name}' can take {}, and {} has {} free; nothing was begun, make room there",
            in_words(needed.div_ceil(1024).saturating_mul(1024)),
            folder.display(),
            in_words(free / 1024 * 1024),
        ),
    ))
}

/// Room in the file system of a folder, or of that in which it will be made.
pub(super) fn free_kib(folder: &Path) -> io::Result<u64> {
    let there = folder.ancestors().find(|folder| folder.is_dir());
    let there = there.ok_or(io::ErrorKind::NotFound)?;
    let system = statvfs(there)?;
    let bytes = system
        .blocks_available()
        .saturating_mul(system.fragment_size());
    Ok(bytes / 1024)
}

/// The folder in which libvirt keeps the images of a hypervisor on this machine; `cache` is where a session libvirt keeps its cache.
pub(super) fn save_folder(uri: &str, cache: Option<&Path>) -> Option<PathBuf> {
    let (scheme, rest) = uri.split_once("://")?;
    let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
    match (scheme.split('+').next()?, path.trim_end_matches('/')) {
        ("qemu", "/system") => Some("/var/lib/libvirt/qemu/save".into()),
        ("qemu", "/session") => Some(cache?.with_file_name(".config").join("libvirt/qemu/save")),
        ("qemu", "/embed") => {
            let mut pairs = query.split('&');
            let root = pairs.find_map(|pair| pair.strip_prefix("root="))?;
            Some(PathBuf::from(percent_decoded(root)?).join("lib/qemu/save"))
        }
        ("xen", "/system" | "") => Some("/var/lib/libvirt/libxl/save".into()),
        _ => None,
    }
}

/// A libvirt elsewhere would write an image there.
fn is_on_this_machine(uri: &str) -> Result<(), Fault> {
    match uri.split_once("://") {
        Some((_, rest)) if rest.starts_with('/') => Ok(()),
        _ => Err(Fault::new(
            Code::Unsupported,
            format!("{uri} is on another machine, which does not have this host's state directory"),
        )),
    }
}

/// Looks how a domain is after its save failed, and says so.
pub(super) fn stayed(visit: &Visit<'_>, error: &Error) -> Fault {
    let fault = visit.call.fault(error);
    let name = &visit.facts.name;
    if fault.code == Code::Unknown || !visit.call.connection.is_alive().unwrap_or(false) {
        return fault;
    }
    let until = Moment::now() + RESUME_TIME;
    let was_paused = visit.state == DomainState::Paused;
    let seen = loop {
        match visit.look() {
            Ok(Some(reading))
                if reading.state == DomainState::Paused && !was_paused && Moment::now() < until =>
            {
                thread::sleep(RESUME_LOOK);
            }
            seen => break seen,
        }
    };
    let why = &fault.message;
    match seen {
        Ok(Some(reading)) if reading.state == DomainState::Paused && !was_paused => Fault::new(
            fault.code,
            format!(
                "'{name}' was not saved ({why}); it is paused, `rxm unpause {name}` lets it run on"
            ),
        ),
        Ok(Some(reading)) if reading.state.is_active() => {
            let how = if was_paused {
                "is paused as before"
            } else {
                "runs on"
            };
            Fault {
                retry: fault.retry,
                ..Fault::new(
                    fault.code,
                    format!("'{name}' was not saved and {how}: {why}"),
                )
            }
        }
        seen => not_seen(name, seen),
    }
}

/// The fault for a domain that is not as libvirt's word lets expect.
pub(super) fn not_seen(name: &DomainName, seen: Result<Option<Reading>, Error>) -> Fault {
    let how = match seen {
        Ok(Some(reading)) if reading.saved => {
            format!("it is {} and has a saved image", reading.state)
        }
        Ok(Some(reading)) => format!("it is {} without a saved image", reading.state),
        Ok(None) => "it is gone".to_owned(),
        Err(error) => format!(
            "libvirt cannot be asked how it is ({})",
            faults::tidy(error.message())
        ),
    };
    faults::unknown(&format!("'{name}' was being saved, and {how}"))
}

fn no_image(name: &DomainName) -> Fault {
    conflict(format!(
        "'{name}' has no saved image; `rxm start {name}` boots it, `rxm images` shows named ones"
    ))
}

fn damaged(name: &DomainName, error: &Error) -> Fault {
    Fault::new(
        Code::Refused,
        format!(
            "the saved image of '{name}' is damaged, and nothing of it ran ({}); `rxm discard {name}` throws it away, then `rxm start {name}` boots it",
            faults::tidy(error.message())
        ),
    )
}

pub(super) fn is_unsupported(error: &Error) -> bool {
    error.code().to_raw() == sys::VIR_ERR_NO_SUPPORT
}

fn as_text(path: &Path) -> Result<&str, Fault> {
    path.to_str().ok_or_else(|| {
        Fault::new(
            Code::Unsupported,
            format!(
                "the path of the state directory is no text ({}), and libvirt takes no other",
                path.display()
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_libvirt_says_came_from_the_image_is_believed() {
        let check = |driver, pair: (u32, u32), expected| {
            let pair = (
                i32::try_from(pair.0).unwrap(),
                i32::try_from(pair.1).unwrap(),
            );
            assert_eq!(origin(driver, pair), expected, "{driver} {pair:?}");
        };
        let (running, paused) = (sys::VIR_DOMAIN_RUNNING, sys::VIR_DOMAIN_PAUSED);
        check(
            "QEMU",
            (paused, sys::VIR_DOMAIN_PAUSED_MIGRATION),
            Origin::Image,
        );
        check(
            "QEMU",
            (running, sys::VIR_DOMAIN_RUNNING_RESTORED),
            Origin::Image,
        );
        check(
            "QEMU",
            (paused, sys::VIR_DOMAIN_PAUSED_USER),
            Origin::Afresh,
        );
        check(
            "QEMU",
            (running, sys::VIR_DOMAIN_RUNNING_BOOTED),
            Origin::Afresh,
        );
        check(
            "QEMU",
            (paused, sys::VIR_DOMAIN_PAUSED_IOERROR),
            Origin::Unsaid,
        );
        check(
            "QEMU",
            (running, sys::VIR_DOMAIN_RUNNING_UNPAUSED),
            Origin::Unsaid,
        );
        check("QEMU", (sys::VIR_DOMAIN_SHUTOFF, 0), Origin::Unsaid);
        check("Xen", (paused, sys::VIR_DOMAIN_PAUSED_USER), Origin::Image);
        check(
            "Xen",
            (running, sys::VIR_DOMAIN_RUNNING_BOOTED),
            Origin::Afresh,
        );
    }

    #[test]
    fn memory_that_is_nowhere_else_is_never_thrown_away() {
        for whole in [Some(true), Some(false), None] {
            for is_empty in [true, false] {
                assert_eq!(fate(true, true, whole, is_empty), Fate::Open);
                assert_eq!(fate(true, false, whole, is_empty), Fate::Open);
                assert_eq!(
                    fate(false, true, whole, is_empty),
                    Fate::Lost,
                    "its disks have gone on"
                );
            }
        }
        assert_eq!(fate(false, false, Some(true), false), Fate::Whole);
        assert_eq!(fate(false, false, Some(false), false), Fate::Lost);
        assert_eq!(fate(false, false, None, false), Fate::Whole);
        assert_eq!(fate(false, false, None, true), Fate::Lost);
    }

    #[test]
    fn a_save_that_might_fill_the_disk_is_not_begun_and_the_sizes_are_said() {
        let name = "web".parse().unwrap();
        let gib = 1024 * 1024;
        let folder = Path::new("/var/lib/x");
        assert!(enough(&name, gib, 2 * gib, folder).is_ok());
        assert!(enough(&name, 10 * gib, 10 * gib, folder).is_err());
        assert!(enough(&name, u64::MAX, u64::MAX - 1, folder).is_err());
        let fault = enough(&name, gib, gib + 512, folder).unwrap_err();
        assert_eq!(fault.code, Code::Refused);
        for part in ["'web'", "1140 MiB", "/var/lib/x", "1024 MiB free"] {
            assert!(fault.message.contains(part), "{fault}");
        }
    }

    #[test]
    fn room_is_found_in_the_folder_that_will_be_made() {
        let there = tempfile::tempdir().unwrap();
        let (now, later) = (there.path().to_owned(), there.path().join("a/b"));
        let (now, later) = (free_kib(&now).unwrap(), free_kib(&later).unwrap());
        assert!(now > 0 && now.abs_diff(later) < now / 10);
    }

    #[test]
    fn each_driver_keeps_its_images_in_its_folder() {
        for (uri, expected) in [
            ("qemu:///system", Some("/var/lib/libvirt/qemu/save")),
            (
                "qemu+unix:///system?socket=/x",
                Some("/var/lib/libvirt/qemu/save"),
            ),
            ("qemu:///session", Some("/root/.config/libvirt/qemu/save")),
            (
                "qemu:///embed?root=/tmp/x%20y",
                Some("/tmp/x y/lib/qemu/save"),
            ),
            ("xen:///system", Some("/var/lib/libvirt/libxl/save")),
            ("lxc:///system", None),
            ("qemu+tls://other/system", None),
        ] {
            let found = save_folder(uri, Some(Path::new("/root/.cache")));
            assert_eq!(found.as_deref(), expected.map(Path::new), "{uri}");
        }
        assert!(is_on_this_machine("qemu+unix:///system?socket=/x").is_ok());
        for elsewhere in ["qemu+tls://other/system", "qemu+ssh://root@x/system", "x"] {
            let fault = is_on_this_machine(elsewhere).unwrap_err();
            assert_eq!(fault.code, Code::Unsupported);
        }
    }
}
