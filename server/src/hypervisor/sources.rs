//! A disk's image or block device as it really is on this host: below a folder that the configuration allows, with nothing else behind it.
//!
//! ```text
//! typed --> below a folder as written? --> links resolved --> still below? --> folders root's? --> file or block device
//!                     ^                                                                                   |
//!                     '------------------- its backing file <-- header of a qcow2 image <-----------------'
//! ```
//! What is not written as below a folder is not looked at: whoever may attach disks learns nothing of the rest of the host. Between this
//! look and QEMU's own nobody can put something else there, since the folders all the way up belong to root. What stands in an image can
//! be changed by the guest that has it; so the format is never guessed, and libvirt is told the whole chain of backing files as it was
//! found here: what a header says later counts for nothing.

use std::{
    fs::{self, File, Metadata},
    io::{self, ErrorKind, Read},
    os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt},
    path::{Component, Path, PathBuf},
};

use xman_common::protocol::{Code, DiskFormat, Fault};

/// The most backing files behind an image: QEMU opens each of them, and a chain can be made as long as one likes.
const MAX_BACKING: usize = 16;
/// How much of an image is read, in bytes: what it says of itself lies in its first cluster, and none is larger.
const MAX_HEADER: u64 = 2 * 1024 * 1024;
/// The longest name of a backing file, in bytes: QEMU takes none longer.
const MAX_BACKING_NAME: usize = 1023;
/// Linux's O_NONBLOCK on every architecture that it and libvirt's drivers share (x86, ARM, POWER, s390, RISC-V).
const O_NONBLOCK: i32 = 0o4000;
/// Where a name that leads to a device was put by the system itself.
const DEVICES: &str = "/dev";
const WRITABLE_BY_OTHERS: u32 = 0o022;
const STICKY: u32 = 0o1000;

/// What the host's configuration allows.
#[derive(Clone, Copy)]
pub(super) struct Rules<'a> {
    /// Below one of these it lies.
    pub(super) folders: &'a [PathBuf],
    /// Whose folders are, beside root.
    pub(super) account: u32,
}

/// A disk's source, with all that QEMU opens behind it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) top: Layer,
    /// What it is based on, the nearest first.
    pub(super) backing: Vec<Layer>,
}

/// A file or block device.
#[derive(Debug, PartialEq)]
pub(super) struct Layer {
    /// The path that libvirt is told.
    pub(super) path: String,
    pub(super) format: DiskFormat,
    pub(super) id: Id,
}

/// What tells one file or device from all others, whatever it is called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Id {
    File { device: u64, inode: u64 },
    Block(u64),
}

impl Id {
    /// Returns what is at the end of a path now; `None` where that is no disk.
    pub(super) fn at(path: &str) -> Option<Self> {
        Self::of(&fs::metadata(path).ok()?)
    }

    fn of(metadata: &Metadata) -> Option<Self> {
        let kind = metadata.file_type();
        if kind.is_file() {
            Some(Self::File {
                device: metadata.dev(),
                inode: metadata.ino(),
            })
        } else if kind.is_block_device() {
            Some(Self::Block(metadata.rdev()))
        } else {
            None
        }
    }
}

/// Finds what a path leads to, and what is behind that.
///
/// # Errors
/// `BadRequest`, `NotFound` and `Refused`, with what to do.
pub(super) fn find(typed: &str, format: DiskFormat, rules: Rules<'_>) -> Result<Source, Fault> {
    let top = layer(&written(typed, rules.folders)?, format, rules)?;
    let mut backing: Vec<Layer> = Vec::new();
    loop {
        let above = backing.last().unwrap_or(&top);
        let Some((path, format)) = beneath(above)? else {
            return Ok(Source { top, backing });
        };
        let based_on = |what: &str| refused(format!("'{}' is based on {what}", above.path));
        if backing.len() == MAX_BACKING {
            return Err(based_on(&format!(
                "more than {MAX_BACKING} images; `qemu-img rebase` shortens the chain"
            )));
        }
        let next = written(&path, rules.folders)
            .and_then(|path| layer(&path, format, rules))
            .map_err(|fault| based_on(&format!("another image: {}", fault.message)))?;
        if next.id == top.id || backing.iter().any(|known| known.id == next.id) {
            return Err(based_on("itself"));
        }
        backing.push(next);
    }
}

/// Looks at a folder of images as [`find`] does, for `--check`.
///
/// # Errors
/// What is wrong, and what to do.
pub(crate) fn check(folder: &Path, account: u32) -> Result<String, String> {
    match fs::canonicalize(folder) {
        Ok(real) if real.is_dir() => settled(&real.join("image"), account)
            .map(|()| "its images may be attached".to_owned())
            .map_err(|fault| fault.message),
        Ok(_) => Err("is no folder".to_owned()),
        Err(error) if error.kind() == ErrorKind::NotFound => {
            Ok("is not there, so nothing can be attached from it".to_owned())
        }
        Err(error) => Err(error.to_string()),
    }
}

/// Reads a path, and refuses one that is not below any folder before anything is looked at.
fn written(typed: &str, folders: &[PathBuf]) -> Result<PathBuf, Fault> {
    let bad = |what: &str| Err(Fault::new(Code::BadRequest, what.to_owned()));
    let path: PathBuf = Path::new(typed).components().collect();
    if !path.is_absolute() {
        return bad("a disk's path is absolute: it begins with '/'");
    }
    if !is_plain(typed) {
        return bad("a disk's path holds a character that no XML or log can show");
    }
    if path
        .components()
        .any(|part| matches!(part, Component::ParentDir))
    {
        return bad("a disk's path leads straight to it, without '..'");
    }
    let canonical = folders.iter().filter_map(|f| fs::canonicalize(f).ok());
    if !folders
        .iter()
        .cloned()
        .chain(canonical)
        .any(|folder| is_below(&path, &folder))
    {
        return Err(outside(typed, folders));
    }
    Ok(path)
}

fn is_plain(path: &str) -> bool {
    !path
        .chars()
        .any(|c| c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}'))
}

fn is_below(path: &Path, folder: &Path) -> bool {
    path != folder && path.starts_with(folder)
}

fn outside(typed: &str, folders: &[PathBuf]) -> Fault {
    let folders: Vec<_> = folders.iter().map(|f| f.display().to_string()).collect();
    refused(format!(
        "'{typed}' is not below a folder that this host allows ({}); its administrator lists them as `disks` in [devices] of xmand.toml",
        if folders.is_empty() {
            "none".to_owned()
        } else {
            folders.join(", ")
        }
    ))
}

/// Looks at what a path leads to.
fn layer(path: &Path, format: DiskFormat, rules: Rules<'_>) -> Result<Layer, Fault> {
    let typed = path.display();
    let real = fs::canonicalize(path).map_err(|error| unseen(path, &error))?;
    let metadata = fs::symlink_metadata(&real).map_err(|error| unseen(path, &error))?;
    let Some(id) = Id::of(&metadata) else {
        return Err(refused(format!(
            "'{typed}' is {}, and no image or block device",
            if metadata.is_dir() {
                "a folder"
            } else {
                "a pipe, a socket or the like"
            }
        )));
    };
    let folders: Vec<_> = rules
        .folders
        .iter()
        .filter_map(|folder| fs::canonicalize(folder).ok())
        .collect();
    let place = match id {
        _ if folders.iter().any(|folder| is_below(&real, folder)) => real,
        // A volume's name is a link of the system's, and lasts where the device's own number does not.
        Id::Block(_) => named_by_the_system(path, &folders)
            .ok_or_else(|| outside(&typed.to_string(), rules.folders))?,
        Id::File { .. } => return Err(outside(&typed.to_string(), rules.folders)),
    };
    settled(&place, rules.account)?;
    let Some(path) = place.to_str().filter(|path| is_plain(path)) else {
        return Err(refused(format!(
            "'{typed}' leads to a name that no XML or log can show; rename it"
        )));
    };
    Ok(Layer {
        path: path.to_owned(),
        format,
        id,
    })
}

/// Returns the path of a link below an allowed folder of devices.
fn named_by_the_system(path: &Path, folders: &[PathBuf]) -> Option<PathBuf> {
    let folder = fs::canonicalize(path.parent()?).ok()?;
    let place = folder.join(path.file_name()?);
    let allowed = |allowed: &PathBuf| allowed.starts_with(DEVICES) && is_below(&place, allowed);
    folders.iter().any(allowed).then_some(place)
}

/// Refuses what somebody else could put another file in the place of.
fn settled(place: &Path, account: u32) -> Result<(), Fault> {
    for (height, folder) in place.ancestors().skip(1).enumerate() {
        let metadata = fs::metadata(folder).map_err(|error| unseen(folder, &error))?;
        let owner = metadata.uid();
        // In a sticky folder only its owner moves what is not his; what is in the lowest can be anybody's.
        let sticky = height > 0 && metadata.mode() & STICKY != 0;
        let open = metadata.mode() & WRITABLE_BY_OTHERS != 0 && !sticky;
        if (owner != 0 && owner != account) || open {
            return Err(refused(format!(
                "others than root could put something else in the place of '{}': the folder '{}' must be root's and writable by nobody else",
                place.display(),
                folder.display()
            )));
        }
    }
    Ok(())
}

fn unseen(path: &Path, error: &io::Error) -> Fault {
    let path = path.display();
    if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) {
        return Fault::new(Code::NotFound, format!("there is no '{path}' on this host"));
    }
    refused(format!("'{path}' cannot be looked at: {error}"))
}

fn refused(what: String) -> Fault {
    Fault::new(Code::Refused, what)
}

/// Returns what an image is based on that some domain has already. What cannot be read is passed over: its domain does not start with it either.
pub(super) fn behind(path: &str, format: DiskFormat) -> Vec<String> {
    let mut behind: Vec<String> = Vec::new();
    let mut above = Some((path.to_owned(), format));
    while let Some((path, format)) = above
        && behind.len() < MAX_BACKING
    {
        above = Id::at(&path).and_then(|id| beneath(&Layer { path, format, id }).ok()?);
        behind.extend(above.iter().map(|(path, _)| path.clone()));
    }
    behind
}

/// Returns what an image is based on.
fn beneath(layer: &Layer) -> Result<Option<(String, DiskFormat)>, Fault> {
    match layer.format {
        DiskFormat::Raw => return Ok(None),
        DiskFormat::Qcow2 => {}
    }
    let path = Path::new(&layer.path);
    let mut header = Vec::new();
    open(layer)?
        .take(MAX_HEADER)
        .read_to_end(&mut header)
        .map_err(|error| unseen(path, &error))?;
    let unfit = |why: Unfit| refused(format!("'{}' {why}", layer.path));
    let Some(backing) = based_on(&header).map_err(unfit)? else {
        return Ok(None);
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    let joined = straight(&folder.join(&backing.name));
    match joined.to_str() {
        Some(joined) => Ok(Some((joined.to_owned(), backing.format))),
        None => Err(unfit(Unfit::Name)),
    }
}

/// Opens what was looked at, and nothing else.
fn open(layer: &Layer) -> Result<File, Fault> {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(&layer.path)
        .and_then(|file| file.metadata().map(|metadata| (file, metadata)));
    match opened {
        Ok((file, metadata)) if Id::of(&metadata) == Some(layer.id) => Ok(file),
        Ok(_) => Err(refused(format!(
            "'{}' is being replaced at this moment; ask again",
            layer.path
        ))),
        Err(error) => Err(unseen(Path::new(&layer.path), &error)),
    }
}

/// A path without `.` and `..`. What it leads to is what libvirt is told, so it need not be where QEMU would have gone through links.
fn straight(path: &Path) -> PathBuf {
    let mut straight = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => {
                straight.pop();
            }
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) | Component::Normal(_) => straight.push(part),
        }
    }
    straight
}

/// What an image is based on, as its header says.
#[derive(Debug, PartialEq)]
struct Backing {
    name: String,
    format: DiskFormat,
}

/// Why an image cannot be attached.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
enum Unfit {
    #[error("is no qcow2 image; is it raw?")]
    Other,
    #[error("has a header that makes no sense; `qemu-img check` looks at it")]
    Senseless,
    #[error("keeps its data in another file; `qemu-img convert` makes one image of it")]
    DataElsewhere,
    #[error("is based on something that is no file of this host, or has no plain name")]
    Name,
    #[error(
        "is based on an image whose format it does not name as raw or qcow2; `qemu-img rebase -u -F FORMAT -b FILE` writes it down"
    )]
    Format,
}

const MAGIC: &[u8] = b"QFI\xfb";
const DATA_ELSEWHERE: u64 = 1 << 2;
const BACKING_FORMAT: u32 = 0xe279_2aca;
/// The length of a version 2 header, which does not say it.
const OLD_HEADER: u32 = 72;

/// Reads from the beginning of a qcow2 image what it is based on. The numbers are anybody's: nothing is taken that is not there.
fn based_on(header: &[u8]) -> Result<Option<Backing>, Unfit> {
    if header.get(..MAGIC.len()) != Some(MAGIC) {
        return Err(Unfit::Other);
    }
    let word = |at| word(header, at).ok_or(Unfit::Senseless);
    let long = |at| long(header, at).ok_or(Unfit::Senseless);
    let length = match word(4)? {
        2 => OLD_HEADER,
        3 if long(72)? & DATA_ELSEWHERE != 0 => return Err(Unfit::DataElsewhere),
        3 => word(100)?,
        _ => return Err(Unfit::Senseless),
    };
    let (offset, size) = (long(8)?, word(16)?);
    if offset == 0 || size == 0 {
        return Ok(None);
    }
    let start = usize::try_from(offset).map_err(|_| Unfit::Senseless)?;
    let size = usize::try_from(size).map_err(|_| Unfit::Senseless)?;
    if size > MAX_BACKING_NAME {
        return Err(Unfit::Senseless);
    }
    let name = start
        .checked_add(size)
        .and_then(|end| header.get(start..end))
        .ok_or(Unfit::Senseless)?;
    let name = std::str::from_utf8(name).map_err(|_| Unfit::Name)?;
    let first = name.split('/').next().unwrap_or_default();
    if first.contains(':') || !is_plain(name) {
        return Err(Unfit::Name);
    }
    let extensions = usize::try_from(length)
        .ok()
        .and_then(|length| header.get(length..start))
        .ok_or(Unfit::Senseless)?;
    Ok(Some(Backing {
        name: name.to_owned(),
        format: backing_format(extensions)?,
    }))
}

fn backing_format(mut extensions: &[u8]) -> Result<DiskFormat, Unfit> {
    while let (Some(kind), Some(length)) = (word(extensions, 0), word(extensions, 4)) {
        let length = usize::try_from(length).map_err(|_| Unfit::Senseless)?;
        let data = length.checked_add(8).and_then(|end| extensions.get(8..end));
        let data = data.ok_or(Unfit::Senseless)?;
        match (kind, data) {
            (0, _) => break,
            (BACKING_FORMAT, b"raw") => return Ok(DiskFormat::Raw),
            (BACKING_FORMAT, b"qcow2") => return Ok(DiskFormat::Qcow2),
            (BACKING_FORMAT, _) => return Err(Unfit::Format),
            _ => {}
        }
        let whole = length.next_multiple_of(8).saturating_add(8);
        extensions = extensions.get(whole..).unwrap_or_default();
    }
    Err(Unfit::Format)
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    let bytes = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_be_bytes(bytes.try_into().ok()?))
}

fn long(bytes: &[u8], at: usize) -> Option<u64> {
    let bytes = bytes.get(at..at.checked_add(8)?)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use std::os::unix::{
        fs::{PermissionsExt, symlink},
        net::UnixListener,
    };

    use proptest::prelude::*;
    use tempfile::TempDir;

    use super::*;

    struct Place {
        folder: TempDir,
        allowed: Vec<PathBuf>,
    }

    impl Place {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let images = fs::canonicalize(folder.path()).unwrap().join("images");
            fs::create_dir(&images).unwrap();
            fs::set_permissions(&images, fs::Permissions::from_mode(0o755)).unwrap();
            Self {
                folder,
                allowed: vec![images],
            }
        }

        fn path(&self, name: &str) -> String {
            self.allowed
                .first()
                .unwrap()
                .join(name)
                .display()
                .to_string()
        }

        fn write(&self, name: &str, bytes: &[u8]) -> String {
            let path = self.path(name);
            fs::write(&path, bytes).unwrap();
            path
        }

        fn find(&self, typed: &str, format: DiskFormat) -> Result<Source, Fault> {
            let rules = Rules {
                folders: &self.allowed,
                account: fs::metadata("/proc/self").unwrap().uid(),
            };
            find(typed, format, rules)
        }

        #[track_caller]
        fn refuses(&self, typed: &str, format: DiskFormat, code: Code, because: &str) {
            let fault = self.find(typed, format).unwrap_err();
            assert_eq!(fault.code, code, "{typed:?}: {fault}");
            assert!(fault.message.contains(because), "{typed:?}: {fault}");
        }
    }

    /// A qcow2 image as far as this reader looks.
    fn image(version: u32, features: u64, backing: Option<(&str, &str)>) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        let mut put = |at: usize, what: &[u8]| {
            bytes
                .get_mut(at..at + what.len())
                .unwrap()
                .copy_from_slice(what);
        };
        put(0, MAGIC);
        put(4, &version.to_be_bytes());
        let length = if version == 2 { 72 } else { 104 };
        if version == 3 {
            put(72, &features.to_be_bytes());
            put(100, &104u32.to_be_bytes());
        }
        if let Some((name, format)) = backing {
            put(length, &0x6803_f857_u32.to_be_bytes());
            put(length + 4, &3u32.to_be_bytes());
            put(length + 16, &BACKING_FORMAT.to_be_bytes());
            put(
                length + 20,
                &u32::try_from(format.len()).unwrap().to_be_bytes(),
            );
            put(length + 24, format.as_bytes());
            put(8, &1024u64.to_be_bytes());
            put(16, &u32::try_from(name.len()).unwrap().to_be_bytes());
            put(1024, name.as_bytes());
        }
        bytes
    }

    #[test]
    fn only_what_lies_below_a_folder_is_found_whatever_it_is_called() {
        let place = Place::new();
        let odd = place.write("a 'b' \"c\" <d> & ü.raw", b"x");
        let found = place.find(&odd, DiskFormat::Raw).unwrap();
        assert_eq!(
            (found.top.path.as_str(), found.backing.len()),
            (odd.as_str(), 0)
        );
        let long_way = odd.replace("/images/", "//images/./");
        assert_eq!(
            place.find(&long_way, DiskFormat::Raw).unwrap().top,
            found.top
        );
        symlink(&odd, place.path("link")).unwrap();
        assert_eq!(
            place
                .find(&place.path("link"), DiskFormat::Raw)
                .unwrap()
                .top,
            found.top
        );
        let outside = place.folder.path().join("outside.raw");
        fs::write(&outside, b"x").unwrap();
        symlink(&outside, place.path("out")).unwrap();
        symlink("/dev/null", place.path("null")).unwrap();
        symlink("nowhere", place.path("dangling")).unwrap();
        symlink("loop", place.path("loop")).unwrap();
        fs::create_dir(place.path("folder")).unwrap();
        let _socket = UnixListener::bind(place.path("socket")).unwrap();
        let folder = place.path("");
        for (typed, code, because) in [
            (outside.to_str().unwrap(), Code::Refused, "[devices]"),
            ("/etc/shadow", Code::Refused, "[devices]"),
            ("/nonexistent/x", Code::Refused, "[devices]"),
            (folder.as_str(), Code::Refused, "[devices]"),
            (&place.path("out"), Code::Refused, "[devices]"),
            (&place.path("null"), Code::Refused, "no image"),
            (&place.path("folder"), Code::Refused, "a folder"),
            (&place.path("socket"), Code::Refused, "a socket"),
            (&place.path("loop"), Code::Refused, "cannot be looked at"),
            (&place.path("dangling"), Code::NotFound, "there is no"),
            (&place.path("none"), Code::NotFound, "there is no"),
            (&format!("{odd}/x"), Code::NotFound, "there is no"),
            (&place.path("../outside.raw"), Code::BadRequest, "'..'"),
            (&place.path("a\nb"), Code::BadRequest, "character"),
            (&place.path("a\0b"), Code::BadRequest, "character"),
            ("images/x", Code::BadRequest, "absolute"),
            ("", Code::BadRequest, "absolute"),
        ] {
            place.refuses(typed, DiskFormat::Raw, code, because);
        }
    }

    #[test]
    fn what_others_could_swap_is_not_attached() {
        let place = Place::new();
        let disk = place.write("disk", b"x");
        for mode in [0o775, 0o757, 0o1777] {
            fs::set_permissions(place.path(""), fs::Permissions::from_mode(mode)).unwrap();
            place.refuses(&disk, DiskFormat::Raw, Code::Refused, "root's");
        }
    }

    #[test]
    fn a_device_is_found_by_the_systems_name_for_it_and_nowhere_else() {
        let device = fs::read_dir(DEVICES)
            .unwrap()
            .flatten()
            .find(|entry| entry.file_type().is_ok_and(|kind| kind.is_block_device()))
            .expect("a machine has a block device in /dev")
            .path();
        let mut place = Place::new();
        let device = device.to_str().unwrap();
        symlink(device, place.path("device")).unwrap();
        place.refuses(device, DiskFormat::Raw, Code::Refused, "[devices]");
        place.refuses(
            &place.path("device"),
            DiskFormat::Raw,
            Code::Refused,
            "[devices]",
        );
        place.allowed.push(DEVICES.into());
        let found = place.find(device, DiskFormat::Raw).unwrap();
        assert!(matches!(found.top.id, Id::Block(_)));
        assert_eq!(found.top.path, device);
    }

    #[test]
    fn backing_files_are_followed_as_far_as_they_are_allowed() {
        let place = Place::new();
        let base = place.write("base.raw", b"base");
        let middle = place.write("middle", &image(3, 0, Some(("../images/base.raw", "raw"))));
        let top = place.write("top", &image(2, 0, Some((&middle, "qcow2"))));
        let found = place.find(&top, DiskFormat::Qcow2).unwrap();
        let paths: Vec<_> = found
            .backing
            .iter()
            .map(|layer| layer.path.as_str())
            .collect();
        assert_eq!(paths, [middle.as_str(), base.as_str()]);
        // Read as raw it is bytes, whatever they say.
        assert!(
            place
                .find(&top, DiskFormat::Raw)
                .unwrap()
                .backing
                .is_empty()
        );
        let alone = place.write("alone", &image(3, 0, None));
        assert!(
            place
                .find(&alone, DiskFormat::Qcow2)
                .unwrap()
                .backing
                .is_empty()
        );

        let outside = place.folder.path().join("outside");
        fs::write(&outside, b"x").unwrap();
        let outside = outside.to_str().unwrap();
        for (name, header, because) in [
            ("a", image(3, 0, Some((outside, "raw"))), "[devices]"),
            ("b", image(3, 0, Some(("../outside", "raw"))), "[devices]"),
            ("c", image(3, 0, Some(("/etc/shadow", "raw"))), "[devices]"),
            ("d", image(3, 0, Some(("gone", "raw"))), "there is no"),
            ("e", image(3, 0, Some(("nbd://h/x", "raw"))), "no file"),
            ("f", image(3, 0, Some(("json:{}", "raw"))), "no file"),
            ("g", image(3, 0, Some(("base.raw", "vmdk"))), "format"),
            ("h", image(3, 0, Some(("h", "qcow2"))), "itself"),
            ("i", image(3, DATA_ELSEWHERE, None), "another file"),
            ("j", image(4, 0, None), "no sense"),
            ("k", b"raw after all".to_vec(), "no qcow2"),
            ("l", MAGIC.to_vec(), "no sense"),
        ] {
            let path = place.write(name, &header);
            place.refuses(&path, DiskFormat::Qcow2, Code::Refused, because);
        }
        let mut last = base;
        for number in 0..=MAX_BACKING {
            let format = if number == 0 { "raw" } else { "qcow2" };
            last = place.write(&format!("n{number}"), &image(3, 0, Some((&last, format))));
        }
        place.refuses(&last, DiskFormat::Qcow2, Code::Refused, "more than 16");
    }

    #[test]
    fn the_header_of_a_real_image_is_read() {
        let place = Place::new();
        place.write("base.raw", &[0; 65_536]);
        let made = std::process::Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw"])
            .arg(place.path("top"))
            .status()
            .expect("qemu-img is installed: qemu-utils");
        assert!(made.success());
        let found = place.find(&place.path("top"), DiskFormat::Qcow2).unwrap();
        let [base] = found.backing.as_slice() else {
            panic!("{found:?}")
        };
        assert_eq!(
            (base.path.as_str(), base.format),
            (place.path("base.raw").as_str(), DiskFormat::Raw)
        );
    }

    proptest! {
        #[test]
        fn no_header_makes_the_reader_fail(
            bytes in prop::collection::vec(any::<u8>(), 0..300),
            version in 2u32..5,
            offset in prop_oneof![0u64..400, any::<u64>()],
            size in prop_oneof![0u32..400, any::<u32>()],
        ) {
            let mut header = image(version, 0, None);
            header.truncate(104);
            header.extend(bytes);
            header.splice(8..16, offset.to_be_bytes());
            header.splice(16..20, size.to_be_bytes());
            if let Ok(Some(backing)) = based_on(&header) {
                prop_assert!(!backing.name.is_empty() && backing.name.len() <= MAX_BACKING_NAME);
            }
        }
    }
}
