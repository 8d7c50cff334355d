//! A site's folder of policies as it lies on the disk: which files count, whether somebody else could have written them, and their text.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags};

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

const SUFFIX: &str = ".cedar";
const OTHERS_MAY_WRITE: u32 = 0o022;

/// What tells one version of the folder from the next, the replacement of the whole folder included.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Look {
    folder: Stamp,
    files: Vec<(PathBuf, Stamp)>,
}

impl Look {
    /// Lists the folder.
    ///
    /// # Errors
    /// Why it cannot be listed.
    pub(crate) fn at(folder: &Path) -> Result<Self, String> {
        let unreadable = |error: io::Error| {
            let path = folder.display();
            if error.kind() == io::ErrorKind::NotFound {
                format!("there is no folder {path}: make it, with at least one *{SUFFIX} file")
            } else {
                format!("{path} cannot be read: {error}")
            }
        };
        // the folder itself may be a link, so that a site can put a whole new one in its place at once
        let before = Stamp::from(&fs::metadata(folder).map_err(unreadable)?);
        let mut files = Vec::new();
        for entry in fs::read_dir(folder).map_err(unreadable)? {
            let name = entry.map_err(unreadable)?.file_name();
            if !counts(name.as_encoded_bytes()) {
                continue;
            }
            if files.len() == MAX_FILES {
                return Err(format!(
                    "{} has more than {MAX_FILES} files of policies; put them together",
                    folder.display()
                ));
            }
            let path = folder.join(name);
            match fs::symlink_metadata(&path) {
                Ok(metadata) => files.push((path, Stamp::from(&metadata))),
                // it went away meanwhile, so the folder's stamp is another at the next look
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(format!("{} cannot be read: {error}", path.display())),
            }
        }
        files.sort();
        Ok(Self {
            folder: before,
            files,
        })
    }

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
}

/// A file's name and its text.
pub(crate) type Text = (String, String);

/// Reads all files of one version of the folder, which is root's or the account's with the given uid like everything in it.
///
/// # Errors
/// All that is wrong with the folder and the files as such.
pub(crate) fn read(folder: &Path, account: u32) -> Result<Vec<Text>, Vec<String>> {
    for _ in 0..READINGS {
        let before = Look::at(folder).map_err(|error| vec![error])?;
        let texts = texts(folder, account, &before);
        if Look::at(folder).is_ok_and(|after| after == before) {
            return match texts {
                Ok(texts) => Ok(texts),
                Err(Wrong::Defects(defects)) => Err(defects),
                Err(Wrong::Changing) => continue,
            };
        }
    }
    Err(vec![format!(
        "{} was being written while it was read: replace files by renaming, or the whole folder by a link",
        folder.display()
    )])
}

enum Wrong {
    Defects(Vec<String>),
    Changing,
}

fn texts(folder: &Path, account: u32, look: &Look) -> Result<Vec<Text>, Wrong> {
    let mut defects = Vec::new();
    let of_folder = fs::metadata(folder).map_err(|_| Wrong::Changing)?;
    if !of_folder.is_dir() {
        return Err(Wrong::Defects(vec![format!(
            "{} is no folder",
            folder.display()
        )]));
    }
    defects.extend(unsafe_to_trust(folder, account, &of_folder));
    let mut texts = Vec::new();
    for (path, stamp) in &look.files {
        match text(path, account, stamp) {
            Ok(text) => texts.push(text),
            Err(Wrong::Defects(found)) => defects.extend(found),
            Err(Wrong::Changing) => return Err(Wrong::Changing),
        }
    }
    if !look.files.iter().any(|(path, _)| holds_policies(path)) {
        defects.push(format!(
            "{} holds no *{SUFFIX} file: copy an example of deploy/policy there, or take cedar out of authorization.backends",
            folder.display()
        ));
    }
    if defects.is_empty() {
        Ok(texts)
    } else {
        Err(Wrong::Defects(defects))
    }
}

fn text(path: &Path, account: u32, expected: &Stamp) -> Result<Text, Wrong> {
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
    let mut file = match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => File::from(file),
        Err(rustix::io::Errno::NOENT) => return Err(Wrong::Changing),
        Err(rustix::io::Errno::LOOP) => {
            return Err(wrong(format!(
                "{} is a symbolic link: put the file itself there (the folder as a whole may be a link)",
                path.display()
            )));
        }
        Err(rustix::io::Errno::NXIO) => {
            return Err(wrong(format!("{} is not a regular file", path.display())));
        }
        Err(errno) => {
            return Err(wrong(format!(
                "{} cannot be read: {}",
                path.display(),
                io::Error::from(errno)
            )));
        }
    };
    let unreadable =
        |error: io::Error| wrong(format!("{} cannot be read: {error}", path.display()));
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
