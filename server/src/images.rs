//! Named images of domains' memory: each a folder in the state directory, with the memory as the hypervisor wrote it and a note of whose it is.
//!
//! ```text
//! begin() -> Draft, .NAME.part --libvirt writes--> keep() --> NAME --take()--> Taken --use_up()--> .NAME.used --> gone
//!              |                                                                 '-- dropped: still there
//!              |-- discard(): gone
//!              '-- dropped, or xmand ends: left behind, until it is known what libvirt made of it (hypervisor/saved.rs)
//! ```
//! A name that begins with a dot is nobody's image: no tag does. What is moved has been written to the disk before, and what is used up is never an
//! image again, since its disks go on without it.

use std::{
    collections::HashSet,
    fs::{self, DirBuilder, File, Permissions},
    io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Deserialize, Serialize};
use tokio::task::{block_in_place, spawn_blocking};
use uuid::Uuid;
use xman_common::{
    name::{DomainName, DomainRef, Tag},
    protocol::{Code, Fault, ImageRow, Item, Reply, Verb},
};
use xman_policy::{Grant, Subject, Verdict};

use crate::{
    answers::ROWS_A_FRAME,
    caller::{Outcome, Piece},
    clock::now_ms,
    hypervisor::Facts,
    work::Work,
};

/// Images on one host, those that are being written included: whoever may save cannot fill the folder with more than anybody can look through.
const MAX_IMAGES: usize = 256;
/// The longest note that is read, in bytes; ours are far shorter.
const MAX_NOTE: u64 = 16 * 1024;
const FOLDER: &str = "images";
const MEMORY: &str = "memory";
const NOTE: &str = "note.toml";
const PART: &str = ".part";
const USED: &str = ".used";

/// Whose memory an image holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Note {
    /// The domain.
    pub(crate) domain: DomainName,
    /// Its identity.
    pub(crate) uuid: Uuid,
    /// The hypervisor, as libvirt URI.
    pub(crate) hypervisor: String,
    /// When the saving began, in milliseconds since 1970.
    pub(crate) saved_ms: u64,
}

impl Note {
    pub(crate) fn of(facts: &Facts) -> Self {
        Self {
            domain: facts.name.clone(),
            uuid: facts.uuid,
            hypervisor: facts.uri.to_string(),
            saved_ms: now_ms(),
        }
    }
}

/// The images of this host.
#[derive(Clone, Debug)]
pub(crate) struct Images {
    folder: PathBuf,
    busy: Arc<Mutex<HashSet<Tag>>>,
}

/// A name that nobody else works on, until this is dropped.
#[derive(Debug)]
struct Hold {
    images: Images,
    name: Tag,
}

/// An image that is being written. Dropped, it stays, since what libvirt does with it may not be known.
#[derive(Debug)]
pub(crate) struct Draft {
    note: Note,
    folder: PathBuf,
    hold: Hold,
}

/// An image that somebody restores or throws away. Dropped, it stays.
#[derive(Debug)]
pub(crate) struct Taken {
    note: Note,
    folder: PathBuf,
    hold: Hold,
}

/// What is left of an image that was used up.
#[derive(Debug)]
pub(crate) struct Used(PathBuf);

impl Images {
    /// Opens the folder in a state directory that is guarded already, and clears away what is used up. Returns what was being written when xmand
    /// last ended as well.
    ///
    /// # Errors
    /// What is wrong with the folder.
    pub(crate) fn open(state_dir: &Path) -> io::Result<(Self, Vec<Draft>)> {
        let folder = state_dir.join(FOLDER);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)?;
        fs::set_permissions(&folder, Permissions::from_mode(0o700))?;
        let images = Self {
            folder,
            busy: Arc::default(),
        };
        let mut drafts = Vec::new();
        for entry in fs::read_dir(&images.folder)? {
            let path = entry?.path();
            match images.left(&path) {
                Left::Image => {}
                // Somebody's memory is not thrown away for a note that a newer xmand wrote, or a disk that hiccups.
                Left::Riddle(error) => tracing::error!(
                    %error,
                    "{} holds a guest's memory and no note that can be read; look at it, and remove it by hand",
                    path.display()
                ),
                Left::Draft(draft) => drafts.push(draft),
                Left::Rubbish => fs::remove_dir_all(&path)?,
            }
        }
        Ok((images, drafts))
    }

    /// What xmand left behind under a path when it last ended.
    fn left(&self, path: &Path) -> Left {
        let name = path.file_name().and_then(|name| name.to_str());
        let Some(hidden) = name.and_then(|name| name.strip_prefix('.')) else {
            return Left::Image;
        };
        let name = hidden.strip_suffix(PART).and_then(|name| name.parse().ok());
        let Some(name) = name else {
            return Left::Rubbish;
        };
        // The note is written before libvirt hears of the draft.
        let note = match read_note(path) {
            Ok(note) => note,
            Err(error) if memory_of(path).is_ok() => return Left::Riddle(error),
            Err(_) => return Left::Rubbish,
        };
        match self.hold(&name) {
            Some(hold) => Left::Draft(Draft {
                note,
                folder: path.to_owned(),
                hold,
            }),
            None => Left::Rubbish,
        }
    }

    /// Begins a new image.
    ///
    /// # Errors
    /// `Conflict` where the name is taken, `TooLarge` where there are too many, `Unavailable` where the folder cannot be written.
    pub(crate) fn begin(&self, name: &Tag, note: Note) -> Result<Draft, Fault> {
        let hold = self.hold(name).ok_or_else(|| under_way(name))?;
        if self.folder.join(name.as_str()).exists() {
            return Err(Fault::new(
                Code::Conflict,
                format!(
                    "there is an image '{name}' already; choose another name, or `rxm discard --image {name}` throws it away"
                ),
            ));
        }
        let unwritten = |error: io::Error| {
            Fault::new(
                Code::Unavailable,
                format!(
                    "nothing was begun: {}: {error}; tell the host's administrator",
                    self.folder.display()
                ),
            )
        };
        let many = fs::read_dir(&self.folder).map_err(unwritten)?.count();
        if many >= MAX_IMAGES {
            return Err(Fault::new(
                Code::TooLarge,
                format!(
                    "this host has {many} images, and {MAX_IMAGES} are allowed; `rxm discard --image` throws one away"
                ),
            ));
        }
        let folder = self.folder.join(format!(".{name}{PART}"));
        write_note(&folder, &note).map_err(|error| {
            let _ = fs::remove_dir_all(&folder);
            unwritten(error)
        })?;
        Ok(Draft { note, folder, hold })
    }

    /// Returns what `images` shows, sorted by name; an image whose note cannot be read is told of in the log.
    fn rows(&self) -> io::Result<Vec<ImageRow>> {
        let mut rows = Vec::new();
        for entry in fs::read_dir(&self.folder)?.take(2 * MAX_IMAGES) {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let Some(image) = name.and_then(|name| name.parse::<Tag>().ok()) else {
                continue;
            };
            match read_note(&path).and_then(|note| Ok((note, memory_of(&path)?))) {
                Ok((note, bytes)) => rows.push(ImageRow {
                    image,
                    domain: note.domain,
                    uuid: note.uuid,
                    hypervisor: note.hypervisor,
                    bytes,
                    saved_ms: note.saved_ms,
                }),
                Err(error) => tracing::warn!("{}: {error}", path.display()),
            }
        }
        rows.sort_by(|a, b| a.image.cmp(&b.image));
        Ok(rows)
    }

    /// Takes an image to restore it or throw it away.
    ///
    /// # Errors
    /// `NotFound`, `Conflict` where somebody else works on it, `Refused` where its note cannot be read.
    pub(crate) fn take(&self, name: &Tag) -> Result<Taken, Fault> {
        let hold = self.hold(name).ok_or_else(|| under_way(name))?;
        let folder = self.folder.join(name.as_str());
        if !folder.exists() {
            return Err(Fault::new(
                Code::NotFound,
                format!("there is no image '{name}' here; `rxm images` shows those there are"),
            ));
        }
        let note = read_note(&folder).map_err(|error| {
            Fault::new(
                Code::Refused,
                format!(
                    "it is not known whose image '{name}' is: {}: {error}; the host's administrator has to look",
                    folder.display()
                ),
            )
        })?;
        Ok(Taken { note, folder, hold })
    }

    /// Throws an image away, also one whose note cannot be read.
    ///
    /// # Errors
    /// `NotFound`, `Conflict` where somebody else works on it, `Refused` where the folder cannot be changed.
    pub(crate) fn discard(&self, name: &Tag) -> Result<(), Fault> {
        let hold = self.hold(name).ok_or_else(|| under_way(name))?;
        let folder = self.folder.join(name.as_str());
        if !folder.exists() {
            return Err(Fault::new(
                Code::NotFound,
                format!("there is no image '{name}' here; `rxm images` shows those there are"),
            ));
        }
        let gone = self.put_aside(&hold.name, &folder).and_then(Used::remove);
        gone.map_err(|error| {
            Fault::new(
                Code::Refused,
                format!(
                    "the image '{name}' could not be thrown away: {}: {error}",
                    folder.display()
                ),
            )
        })
    }

    fn put_aside(&self, name: &Tag, folder: &Path) -> io::Result<Used> {
        let aside = self.folder.join(format!(".{name}{USED}"));
        if aside.exists() {
            fs::remove_dir_all(&aside)?;
        }
        fs::rename(folder, &aside)?;
        sync(&self.folder)?;
        Ok(Used(aside))
    }

    fn hold(&self, name: &Tag) -> Option<Hold> {
        self.held().insert(name.clone()).then(|| Hold {
            images: self.clone(),
            name: name.clone(),
        })
    }

    fn held(&self) -> MutexGuard<'_, HashSet<Tag>> {
        self.busy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What stands under a path when xmand starts.
enum Left {
    Image,
    Draft(Draft),
    Riddle(io::Error),
    Rubbish,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.images.held().remove(&self.name);
    }
}

impl Draft {
    pub(crate) fn name(&self) -> &Tag {
        &self.hold.name
    }

    pub(crate) fn note(&self) -> &Note {
        &self.note
    }

    /// The file that libvirt writes.
    pub(crate) fn memory(&self) -> PathBuf {
        self.folder.join(MEMORY)
    }

    /// The folder on whose file system it is written.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// Makes it an image, once all of it is on the disk.
    ///
    /// # Errors
    /// Where that fails; it stays what it was.
    pub(crate) fn keep(&self) -> io::Result<()> {
        File::open(self.memory())?.sync_all()?;
        sync(&self.folder)?;
        let images = &self.hold.images.folder;
        fs::rename(&self.folder, images.join(self.hold.name.as_str()))?;
        sync(images)
    }

    /// Throws it away.
    ///
    /// # Errors
    /// Where that fails; the next start of xmand tries again.
    pub(crate) fn discard(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.folder)
    }
}

impl Taken {
    pub(crate) fn name(&self) -> &Tag {
        &self.hold.name
    }

    pub(crate) fn note(&self) -> &Note {
        &self.note
    }

    /// The file that libvirt reads.
    pub(crate) fn memory(&self) -> PathBuf {
        self.folder.join(MEMORY)
    }

    /// From here on it is no image any more, also if xmand ends at once.
    ///
    /// # Errors
    /// Where that fails; it still is one.
    pub(crate) fn use_up(&self) -> io::Result<Used> {
        let Hold { images, name } = &self.hold;
        images.put_aside(name, &self.folder)
    }
}

impl Used {
    /// Gives its room back.
    ///
    /// # Errors
    /// Where that fails; the next start of xmand tries again.
    pub(crate) fn remove(self) -> io::Result<()> {
        fs::remove_dir_all(self.0)
    }
}

/// Sends the images that the caller may see: administrators all, others those of domains on which they may do that.
pub(crate) async fn send_rows(grant: &Grant, work: &Work) -> Outcome {
    let rows = block_in_place(|| work.host.images.rows()).map_err(|error| {
        Fault::new(
            Code::Unavailable,
            format!("the folder of images cannot be read: {error}"),
        )
    })?;
    let rows: Vec<_> = rows
        .into_iter()
        .filter(|row| {
            let is_asked = work.hypervisor.as_ref();
            is_asked.is_none_or(|uri| *uri == row.hypervisor) && may_see(grant, work, row)
        })
        .map(Item::Image)
        .collect();
    for piece in rows.chunks(ROWS_A_FRAME) {
        work.send(Piece::Items(piece.to_vec())).await?;
    }
    Ok(Reply::Done)
}

/// The image of a domain that is gone is the administrators' alone: nothing says any more whose it was.
fn may_see(grant: &Grant, work: &Work, row: &ImageRow) -> bool {
    let may = || {
        let domain = DomainRef::Uuid(row.uuid);
        let facts = work.host.hypervisors.find(&domain, Some(&row.hypervisor))?;
        let on = Subject::Domain((&facts).into());
        matches!(
            work.host.may(&work.caller, Verb::Images, on),
            Verdict::Allow(_)
        )
        .then_some(())
    };
    grant.administrator() || may().is_some()
}

/// Throws an image away for a caller; a large one takes its time.
pub(crate) async fn discard(image: Tag, work: &Work) -> Outcome {
    let images = work.host.images.clone();
    spawn_blocking(move || images.discard(&image))
        .await
        .unwrap_or_else(|_| {
            Err(Fault::new(
                Code::Internal,
                "a defect of xmand ended the call; look at `rxm images`",
            ))
        })?;
    Ok(Reply::Done)
}

fn under_way(name: &Tag) -> Fault {
    Fault::new(
        Code::Conflict,
        format!(
            "somebody writes, restores or discards the image '{name}' at this moment; `rxm job list` shows what is under way"
        ),
    )
}

fn memory_of(folder: &Path) -> io::Result<u64> {
    Ok(fs::metadata(folder.join(MEMORY))?.len())
}

fn read_note(folder: &Path) -> io::Result<Note> {
    let path = folder.join(NOTE);
    if fs::symlink_metadata(&path)?.len() > MAX_NOTE {
        return Err(io::Error::other("the note is too long to be ours"));
    }
    toml::from_str(&fs::read_to_string(path)?).map_err(io::Error::other)
}

fn write_note(folder: &Path, note: &Note) -> io::Result<()> {
    let text = toml::to_string(note).map_err(io::Error::other)?;
    DirBuilder::new().mode(0o700).create(folder)?;
    let path = folder.join(NOTE);
    fs::write(&path, text)?;
    File::open(path)?.sync_all()?;
    sync(folder)
}

/// Writes a folder's entries to the disk.
fn sync(folder: &Path) -> io::Result<()> {
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note() -> Note {
        Note {
            domain: "web".parse().unwrap(),
            uuid: Uuid::from_u128(7),
            hypervisor: "qemu:///system".to_owned(),
            saved_ms: 1_700_000_000_000,
        }
    }

    fn tag(text: &str) -> Tag {
        text.parse().unwrap()
    }

    fn names(images: &Images) -> Vec<String> {
        let rows = images.rows().unwrap().into_iter();
        rows.map(|row| row.image.to_string()).collect()
    }

    fn open(state: &Path) -> (Images, Vec<Draft>) {
        Images::open(state).unwrap()
    }

    fn entries(state: &Path) -> usize {
        fs::read_dir(state.join(FOLDER)).unwrap().count()
    }

    #[track_caller]
    fn written(images: &Images, name: &str) -> Draft {
        let draft = images.begin(&tag(name), note()).unwrap();
        fs::write(draft.memory(), "memory").unwrap();
        draft
    }

    #[test]
    fn an_image_is_there_when_it_is_whole_and_not_before() {
        let state = tempfile::tempdir().unwrap();
        let (images, drafts) = open(state.path());
        assert!(drafts.is_empty());
        let draft = written(&images, "a.part");
        assert!(names(&images).is_empty());
        draft.keep().unwrap();
        drop(draft);
        let rows = images.rows().unwrap();
        assert_eq!(rows.len(), 1);
        assert_eq!(rows[0].image, tag("a.part"));
        assert_eq!((rows[0].bytes, rows[0].saved_ms), (6, note().saved_ms));
        assert_eq!(rows[0].uuid, note().uuid);
        let mode = |path: &str| fs::metadata(state.path().join(path)).unwrap().permissions();
        assert_eq!(mode(FOLDER).mode() & 0o777, 0o700);
        assert_eq!(mode("images/a.part").mode() & 0o777, 0o700);
    }

    #[test]
    fn a_name_is_anothers_while_it_is_worked_on_and_once_it_is_taken() {
        let state = tempfile::tempdir().unwrap();
        let (images, _) = open(state.path());
        let draft = written(&images, "a");
        for fault in [
            images.begin(&tag("a"), note()).unwrap_err(),
            images.take(&tag("a")).unwrap_err(),
            images.discard(&tag("a")).unwrap_err(),
        ] {
            assert_eq!(fault.code, Code::Conflict, "{fault}");
        }
        draft.keep().unwrap();
        drop(draft);
        let fault = images.begin(&tag("a"), note()).unwrap_err();
        assert!(fault.message.contains("discard --image a"), "{fault}");
        let taken = images.take(&tag("a")).unwrap();
        assert_eq!(
            images.discard(&tag("a")).unwrap_err().code,
            Code::Conflict,
            "while it is restored"
        );
        drop(taken);
        images.discard(&tag("a")).unwrap();
        for fault in [
            images.discard(&tag("a")).unwrap_err(),
            images.take(&tag("a")).unwrap_err(),
        ] {
            assert_eq!(fault.code, Code::NotFound);
        }
        assert_eq!(entries(state.path()), 0);
    }

    #[test]
    fn what_xmand_left_behind_is_a_draft_still_and_what_was_used_up_goes() {
        let state = tempfile::tempdir().unwrap();
        let (images, _) = open(state.path());
        drop(written(&images, "half"));
        written(&images, "whole").keep().unwrap();
        written(&images, "used").keep().unwrap();
        images.take(&tag("used")).unwrap().use_up().unwrap();
        // Ended before its note was written: libvirt has never heard of it.
        fs::create_dir(state.path().join("images/.early.part")).unwrap();
        assert_eq!(names(&images), ["whole"]);
        let (images, drafts) = open(state.path());
        assert_eq!(names(&images), ["whole"]);
        assert_eq!(drafts.len(), 1);
        assert_eq!(
            (drafts[0].name(), drafts[0].note()),
            (&tag("half"), &note())
        );
        assert_eq!(entries(state.path()), 2);
        let fault = images.begin(&tag("half"), note()).unwrap_err();
        assert_eq!(fault.code, Code::Conflict, "until that is settled");
        drafts[0].discard().unwrap();
        drop(drafts);
        written(&images, "half").discard().unwrap();
        assert_eq!(entries(state.path()), 1);
    }

    #[test]
    fn memory_with_a_note_that_cannot_be_read_is_left_alone() {
        let state = tempfile::tempdir().unwrap();
        let (images, _) = open(state.path());
        drop(written(&images, "half"));
        let folder = state.path().join("images/.half.part");
        fs::write(folder.join(NOTE), "written-by = 'a newer one'").unwrap();
        let (_, drafts) = open(state.path());
        assert!(drafts.is_empty());
        assert!(memory_of(&folder).is_ok());
    }

    #[test]
    fn no_host_has_more_images_than_can_be_looked_through() {
        let state = tempfile::tempdir().unwrap();
        let (images, _) = open(state.path());
        for number in 0..MAX_IMAGES {
            fs::create_dir(state.path().join(format!("images/i{number}"))).unwrap();
        }
        let fault = images.begin(&tag("one-more"), note()).unwrap_err();
        assert_eq!(fault.code, Code::TooLarge, "{fault}");
        images.discard(&tag("i0")).unwrap();
        images.begin(&tag("one-more"), note()).unwrap();
    }

    #[test]
    fn an_image_with_a_note_that_is_not_ours_is_never_restored_and_can_be_discarded() {
        let state = tempfile::tempdir().unwrap();
        let (images, _) = open(state.path());
        for (name, text) in [("a", "domain = 'x'".to_owned()), ("b", "#".repeat(20_000))] {
            written(&images, name).keep().unwrap();
            fs::write(state.path().join("images").join(name).join(NOTE), text).unwrap();
            assert_eq!(images.take(&tag(name)).unwrap_err().code, Code::Refused);
            assert!(names(&images).is_empty());
            images.discard(&tag(name)).unwrap();
        }
    }
}
