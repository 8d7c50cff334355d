//! A site's folder of policies as it lies on the disk: which files count, whether somebody else could have written them, and their text.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{self, Read},
    os::unix::{ffi::OsStrExt, fs::MetadataExt},
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use rustix::{
    fs::{Dir, Mode, OFlags},
    io::Errno,
};

use crate::stamp::Stamp;

/// The longest file, in bytes: a database put there by mistake must not be taken for policies.
pub const MAX_FILE: u64 = 256 * 1024;
/// The most files. Each is looked at before each request.
pub const MAX_FILES: usize = 200;
/// The longest name of a file, in bytes: it is a part of every rule that the audit shows.
pub const MAX_FILE_NAME: usize = 64;
/// The file of groups.
pub const GROUPS: &str = "groups.toml";
/// How often a folder that changes under the reader's eyes is read again before that is called trouble.
const READINGS: usize = 5;
/// How long whoever writes there is let to come to an end before that. Callers wait for it, so it is short.
const PAUSE: Duration = Duration::from_millis(10);

const SUFFIX: &str = ".cedar";
const OTHERS_MAY_WRITE: u32 = 0o022;

/// What tells one version of the folder from the next, the replacement of the whole folder included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    folder: Stamp,
    files: Vec<(PathBuf, Stamp)>,
}

impl Look {
    /// Returns whether all is as it was, without listing the folder: what comes or goes there changes its stamp.
    pub(crate) fn is_current(&self, folder: &Path) -> bool {
        let same = |metadata: io::Result<fs::Metadata>, known: &Stamp| {
            metadata.is_ok_and(|metadata| Stamp::from(&metadata) == *known)
        };
        same(fs::metadata(folder), &self.folder)
            && self
                .files
                .iter()
                .all(|(path, known)| same(fs::symlink_metadata(path), known))
    }

    /// Returns whether an open folder still holds what it held. One that was only moved away is whole.
    fn holds_the_same(&self, before: &Self) -> bool {
        self.folder.holds_the_same(&before.folder) && self.files == before.files
    }
}

/// A file's name and its text.
pub(crate) type Text = (String, String);

/// What came of reading a folder.
pub(crate) struct Reading {
    /// The version that was read; nothing where there is none, or none that stayed.
    pub(crate) look: Option<Look>,
    /// Its files, or all that is wrong with the folder and the files as such.
    pub(crate) texts: Result<Vec<Text>, Vec<String>>,
}

/// Reads all files of one version of the folder, which is root's or the account's with the given uid like everything in it.
pub(crate) fn read(path: &Path, account: u32) -> Reading {
    let failed = |defects| Reading {
        look: None,
        texts: Err(defects),
    };
    for attempt in 0..READINGS {
        if attempt > 0 {
            thread::sleep(PAUSE);
        }
        let (folder, before) = match Folder::open(path).and_then(|folder| {
            let look = folder.look()?;
            Ok((folder, look))
        }) {
            Ok(both) => both,
            Err(error) => return failed(vec![error]),
        };
        let texts = folder.texts(account, &before);
        if folder
            .look()
            .is_ok_and(|after| after.holds_the_same(&before))
        {
            let texts = match texts {
                Ok(texts) => Ok(texts),
                Err(Wrong::Defects(defects)) => Err(defects),
                Err(Wrong::Changing) => continue,
            };
            return Reading {
                look: Some(before),
                texts,
            };
        }
    }
    failed(vec![format!(
        "{} was being written while it was read: replace files by renaming, or the whole folder by a link",
        path.display()
    )])
}

/// A folder that stays the one it is while it is read, whatever its name comes to mean.
struct Folder<'a> {
    path: &'a Path,
    opened: File,
}

impl<'a> Folder<'a> {
    fn open(path: &'a Path) -> Result<Self, String> {
        // it may be a link, so that a site can put a whole new one in its place at once
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match rustix::fs::open(path, flags, Mode::empty()) {
            Ok(opened) => Ok(Self {
                path,
                opened: opened.into(),
            }),
            Err(Errno::NOENT) => Err(format!(
                "there is no folder {}: make it, with at least one *{SUFFIX} file",
                path.display()
            )),
            Err(errno) => Err(unreadable(path, errno)),
        }
    }

    /// Lists the folder.
    ///
    /// # Errors
    /// Why it cannot be listed.
    fn look(&self) -> Result<Look, String> {
        let folder = Stamp::from(&self.metadata()?);
        let mut files = Vec::new();
        for entry in Dir::read_from(&self.opened).map_err(|errno| unreadable(self.path, errno))? {
            let entry = entry.map_err(|errno| unreadable(self.path, errno))?;
            let name = entry.file_name().to_bytes();
            if !counts(name) {
                continue;
            }
            if files.len() == MAX_FILES {
                return Err(format!(
                    "{} has more than {MAX_FILES} files of policies; put them together",
                    self.path.display()
                ));
            }
            let path = self.path.join(OsStr::from_bytes(name));
            // looks at the name itself, which may be a link, and opens nothing
            let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let metadata = match self.open_in(&path, flags) {
                Ok(file) => file.metadata(),
                // it went away meanwhile, so the folder's stamp is another at the next look
                Err(Errno::NOENT) => continue,
                Err(errno) => Err(errno.into()),
            };
            let metadata = metadata.map_err(|error| unreadable(&path, error))?;
            files.push((path, Stamp::from(&metadata)));
        }
        files.sort();
        Ok(Look { folder, files })
    }

    fn texts(&self, account: u32, look: &Look) -> Result<Vec<Text>, Wrong> {
        let of_folder = self.metadata().map_err(|what| Wrong::Defects(vec![what]))?;
        let mut defects: Vec<String> = unsafe_to_trust(self.path, account, &of_folder).collect();
        let mut texts = Vec::new();
        for (path, stamp) in &look.files {
            match self.text(path, account, stamp) {
                Ok(text) => texts.push(text),
                Err(Wrong::Defects(found)) => defects.extend(found),
                Err(Wrong::Changing) => return Err(Wrong::Changing),
            }
        }
        if !look.files.iter().any(|(path, _)| holds_policies(path)) {
            defects.push(format!(
                "{} holds no *{SUFFIX} file: copy an example of deploy/policy there, or take cedar out of authorization.backends",
                self.path.display()
            ));
        }
        if defects.is_empty() {
            Ok(texts)
        } else {
            Err(Wrong::Defects(defects))
        }
    }

    fn text(&self, path: &Path, account: u32, expected: &Stamp) -> Result<Text, Wrong> {
        let wrong = |what: String| Wrong::Defects(vec![what]);
        let name = path
            .file_name()
            .and_then(|name| name.to_str())
            .filter(|name| is_plain(name));
        let Some(name) = name else {
            return Err(wrong(format!(
                "{}: a file's name stands in the audit, so it is made of at most {MAX_FILE_NAME} letters, digits, '.', '-' and '_'; rename it",
                path.to_string_lossy().escape_debug()
            )));
        };
        // neither follows a link nor waits for the other end of a pipe
        let flags =
            OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let mut file = match self.open_in(path, flags) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Err(Wrong::Changing),
            Err(Errno::LOOP) => {
                return Err(wrong(format!(
                    "{} is a symbolic link: put the file itself there (the folder as a whole may be a link)",
                    path.display()
                )));
            }
            Err(Errno::NXIO) => {
                return Err(wrong(format!("{} is not a regular file", path.display())));
            }
            Err(errno) => return Err(wrong(unreadable(path, errno))),
        };
        let unreadable = |error: io::Error| wrong(unreadable(path, error));
        let metadata = file.metadata().map_err(unreadable)?;
        if Stamp::from(&metadata) != *expected {
            return Err(Wrong::Changing);
        }
        if !metadata.is_file() {
            return Err(wrong(format!("{} is not a regular file", path.display())));
        }
        let mut defects: Vec<String> = unsafe_to_trust(path, account, &metadata).collect();
        if metadata.len() > MAX_FILE {
            defects.push(format!("{} has more than {MAX_FILE} bytes", path.display()));
        }
        if !defects.is_empty() {
            return Err(Wrong::Defects(defects));
        }
        let mut bytes = Vec::new();
        let read = Read::by_ref(&mut file)
            .take(MAX_FILE + 1)
            .read_to_end(&mut bytes);
        read.map_err(unreadable)?;
        let after = file.metadata().map_err(unreadable)?;
        if Stamp::from(&after) != *expected || bytes.len() as u64 != expected.size {
            return Err(Wrong::Changing);
        }
        match String::from_utf8(bytes) {
            Ok(text) => Ok((name.to_owned(), text)),
            Err(_) => Err(wrong(format!(
                "{} is not UTF-8; convert it",
                path.display()
            ))),
        }
    }

    fn metadata(&self) -> Result<fs::Metadata, String> {
        let metadata = self.opened.metadata();
        metadata.map_err(|error| unreadable(self.path, error))
    }

    /// Opens a file of the folder, whatever the folder's path has come to mean.
    fn open_in(&self, path: &Path, flags: OFlags) -> Result<File, Errno> {
        let name = path.file_name().unwrap_or_default();
        rustix::fs::openat(&self.opened, name, flags, Mode::empty()).map(File::from)
    }
}

enum Wrong {
    Defects(Vec<String>),
    Changing,
}

fn unreadable(path: &Path, error: impl Into<io::Error>) -> String {
    format!("{} cannot be read: {}", path.display(), error.into())
}

/// Whether a name is one of a file that counts; names with a dot in front are editors' and installers'.
fn counts(name: &[u8]) -> bool {
    !name.starts_with(b".") && (name.ends_with(SUFFIX.as_bytes()) || name == GROUPS.as_bytes())
}

fn holds_policies(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension == "cedar")
}

fn is_plain(name: &str) -> bool {
    name.len() <= MAX_FILE_NAME
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
}

/// What lets somebody else write there.
fn unsafe_to_trust(
    path: &Path,
    account: u32,
    metadata: &fs::Metadata,
) -> impl Iterator<Item = String> {
    let path = path.display();
    let owner = metadata.uid();
    let foreign = (owner != 0 && owner != account).then(|| {
        format!(
            "{path} belongs to uid {owner}, neither to root nor to xmand's account (uid {account}): chown {account} {path}"
        )
    });
    let writable = (metadata.mode() & OTHERS_MAY_WRITE != 0)
        .then(|| format!("{path} is writable by its group or by everybody: chmod go-w {path}"));
    foreign.into_iter().chain(writable)
}
