//! A folder of small files that survive a crash: written beside, flushed, renamed, and the folder flushed.

use std::{
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use uuid::Uuid;

/// The longest file that is read, in bytes.
const MAX_FILE: u64 = 16 * 1024;
/// What is being written carries this at its end.
const UNFINISHED: &str = ".new";
/// What is no use carries this, for people to look at.
const ASIDE: &str = ".bad";
/// The most files that are put aside: more say no more.
const MAX_ASIDE: usize = 100;
/// A file that is older was left by a program that died while it wrote.
const LEFT: Duration = Duration::from_secs(3600);

/// Why a folder cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BadFolder {
    #[error("{}: {error}", path.display())]
    Unusable { path: PathBuf, error: io::Error },
    #[error("{}: others can write there; it is to be 0700 and its owner's who runs the hook", .0.display())]
    Open(PathBuf),
}

/// The folder.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    path: PathBuf,
    limit: usize,
}

impl Folder {
    /// Opens a folder for at most `limit` files; makes it if there is none.
    pub(crate) fn open(path: &Path, limit: usize) -> Result<Self, BadFolder> {
        let unusable = |error| BadFolder::Unusable {
            path: path.to_owned(),
            error,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(path)
            .map_err(unusable)?;
        let about = fs::metadata(path).map_err(unusable)?;
        let own = rustix::process::geteuid().as_raw();
        if !about.is_dir() || about.mode() & 0o022 != 0 || ![0, own].contains(&about.uid()) {
            return Err(BadFolder::Open(path.to_owned()));
        }
        Ok(Self {
            path: path.to_owned(),
            limit,
        })
    }

    /// Writes a file, whole or not at all.
    pub(crate) fn write(&self, name: &str, text: &str) -> io::Result<()> {
        if !self.path.join(name).exists() && self.names()?.len() >= self.limit {
            return Err(io::Error::other(format!(
                "{} has {} files; there is no room for more",
                self.path.display(),
                self.limit
            )));
        }
        let beside = self.path.join(format!("{}{UNFINISHED}", Uuid::new_v4()));
        let written = write_new(&beside, text).and_then(|()| {
            fs::rename(&beside, self.path.join(name))?;
            self.flush()
        });
        if written.is_err() {
            let _ = fs::remove_file(&beside);
        }
        written
    }

    /// Returns what a file holds; nothing where there is none.
    pub(crate) fn read(&self, name: &str) -> io::Result<Option<String>> {
        let file = match File::open(self.path.join(name)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut text = String::new();
        file.take(MAX_FILE + 1).read_to_string(&mut text)?;
        if text.len() as u64 > MAX_FILE {
            return Err(io::Error::other("it is too long"));
        }
        Ok(Some(text))
    }

    /// Removes a file; one that is not there is removed well.
    pub(crate) fn remove(&self, name: &str) -> io::Result<()> {
        match fs::remove_file(self.path.join(name)) {
            Ok(()) => self.flush(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Puts a file aside that is no use, where nothing looks at it again.
    pub(crate) fn put_aside(&self, name: &str) -> io::Result<()> {
        let aside = self.all()?.filter(|name| name.ends_with(ASIDE)).count();
        if aside >= MAX_ASIDE {
            return self.remove(name);
        }
        fs::rename(
            self.path.join(name),
            self.path.join(format!("{name}{ASIDE}")),
        )
    }

    /// Returns the names of all files in their order, and sweeps up what others left unfinished.
    pub(crate) fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for name in self.all()? {
            if name.ends_with(UNFINISHED) {
                self.sweep(&name, LEFT);
            } else if !name.ends_with(ASIDE) && !name.starts_with('.') {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn all(&self) -> io::Result<impl Iterator<Item = String>> {
        Ok(fs::read_dir(&self.path)?
            .filter_map(Result::ok)
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_file()))
            .filter_map(|entry| entry.file_name().into_string().ok()))
    }

    /// Removes files that are older.
    pub(crate) fn prune(&self, age: Duration) -> io::Result<()> {
        for name in self.names()? {
            self.sweep(&name, age);
        }
        Ok(())
    }

    fn sweep(&self, name: &str, limit: Duration) {
        let path = self.path.join(name);
        let is_left = fs::metadata(&path)
            .and_then(|about| about.modified())
            .is_ok_and(|at| {
                SystemTime::now()
                    .duration_since(at)
                    .is_ok_and(|age| age > limit)
            });
        if is_left {
            let _ = fs::remove_file(path);
        }
    }

    /// Takes the folder for oneself for as long as the result is kept; nothing where somebody else has it.
    pub(crate) fn take(&self) -> io::Result<Option<File>> {
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(self.path.join(".lock"))?;
        match rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(lock)),
            Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        File::open(&self.path)?.sync_all()
    }
}

fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .create_new(true)
        .write(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn files_are_whole_bounded_and_gone_when_removed() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(&dir.path().join("a/b"), 2).unwrap();
        folder.write("2", "two").unwrap();
        folder.write("1", "one").unwrap();
        assert!(folder.write("3", "three").is_err());
        folder.write("1", "uno").unwrap();
        assert_eq!(folder.names().unwrap(), ["1", "2"]);
        assert_eq!(folder.read("1").unwrap().as_deref(), Some("uno"));
        folder.put_aside("2").unwrap();
        assert_eq!(folder.names().unwrap(), ["1"]);
        folder.remove("1").unwrap();
        folder.remove("1").unwrap();
        assert_eq!(folder.read("1").unwrap(), None);
    }

    #[test]
    fn what_was_left_unfinished_is_no_file_and_is_swept_up_when_it_is_old() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), 9).unwrap();
        let (old, young) = (dir.path().join("x.new"), dir.path().join("y.new"));
        fs::write(&old, "").unwrap();
        fs::write(&young, "").unwrap();
        let long_ago = SystemTime::now() - LEFT * 2;
        File::options()
            .write(true)
            .open(&old)
            .unwrap()
            .set_modified(long_ago)
            .unwrap();
        assert!(folder.names().unwrap().is_empty());
        assert!(!old.exists() && young.exists());
    }

    #[test]
    fn a_folder_that_others_can_write_to_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
        assert!(matches!(
            Folder::open(dir.path(), 1),
            Err(BadFolder::Open(_))
        ));
    }

    #[test]
    fn one_at_a_time_has_it() {
        let dir = tempfile::tempdir().unwrap();
        let folder = Folder::open(dir.path(), 1).unwrap();
        let mine = folder.take().unwrap();
        assert!(mine.is_some());
        assert!(folder.take().unwrap().is_none());
        drop(mine);
        assert!(folder.take().unwrap().is_some());
    }
}
