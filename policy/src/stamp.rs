//! What tells one version of a file from the next.

use std::{fs::Metadata, os::unix::fs::MetadataExt};

/// A version of a file, its replacement included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Stamp {
    device: u64,
    inode: u64,
    pub(crate) size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl Stamp {
    /// Returns whether an open file still holds what it held at the other stamp. Being replaced, which changes only its count of links, leaves it whole.
    pub(crate) fn holds_the_same(&self, other: &Self) -> bool {
        Self {
            changed: other.changed,
            ..*self
        } == *other
    }
}

impl From<&Metadata> for Stamp {
    fn from(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.size(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, io::Write};

    use super::*;

    #[test]
    fn an_open_file_that_is_replaced_is_whole_and_one_that_is_written_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (path, new) = (folder.path().join("list"), folder.path().join("new"));
        fs::write(&path, "alice").unwrap();
        fs::write(&new, "carol").unwrap();
        let file = fs::File::options().append(true).open(&path).unwrap();
        let stamp = || Stamp::from(&file.metadata().unwrap());
        let before = stamp();
        fs::rename(&new, &path).unwrap();
        assert!(stamp().holds_the_same(&before));
        assert_ne!(Stamp::from(&fs::metadata(&path).unwrap()), before);
        (&file).write_all(b" and carol").unwrap();
        assert!(!stamp().holds_the_same(&before));
    }
}
