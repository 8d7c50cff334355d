//! The administrators of this machine: one full principal a line, from an account's `.k5login`.
//!
//! The Kerberos libraries read this file each in its own way and fail open: MIT looks at no mode bits and lets `root@REALM` in where there is no
//! file; Heimdal by default lets in whoever maps to the account. So it is read here, strictly, and the same above both: a regular file, no link,
//! owned by root or the account, writable by nobody else; full principals compared letter by letter, nothing trimmed, nothing mapped. Whatever is
//! wrong with the file, and its absence, means nobody.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::{FileTypeExt, MetadataExt},
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use rustix::fs::{Mode, OFlags};
use xman_common::name::{BadName, Principal};

use crate::{Action, Authorizer, Opinion, Query, Reload, Subject, stamp::Stamp};

/// The longest file that is read, in bytes: ten thousand administrators fit, a log file put there by mistake does not.
pub const MAX_FILE: u64 = 1024 * 1024;
/// The most warnings kept for one file; a binary put there by mistake has one in every line.
pub const MAX_WARNINGS: usize = 100;
/// For how long a changed file is read again at each look: a second change within the granularity of the file system's clock would leave the same
/// time stamp. FAT's clock, the coarsest, steps by 2 s.
const SETTLING: Duration = Duration::from_secs(2);
/// How often a file that changes under the reader's eyes is read again before that is called trouble.
const READINGS: usize = 3;

const GROUP_MAY_WRITE: u32 = 0o020;
const OTHERS_MAY_WRITE: u32 = 0o002;

/// Who is listed, and in which line.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct List {
    lines: HashMap<Principal, usize>,
    warnings: Vec<String>,
}

impl List {
    /// Returns the first line that holds the principal, counted from 1.
    pub fn line(&self, principal: &Principal) -> Option<usize> {
        self.lines.get(principal).copied()
    }

    /// Returns how many principals are listed.
    pub fn len(&self) -> usize {
        self.lines.len()
    }

    /// Returns whether nobody is listed.
    pub fn is_empty(&self) -> bool {
        self.lines.is_empty()
    }

    /// Returns what is wrong with which line: such a line lets nobody in.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn parse(bytes: &[u8]) -> Self {
        let mut list = Self::default();
        let mut unkept = 0_usize;
        let whole = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        if whole.is_empty() {
            return list;
        }
        for (at, line) in whole.split(|byte| *byte == b'\n').enumerate() {
            match listed(line) {
                Ok(principal) => {
                    list.lines.entry(principal).or_insert(at + 1);
                }
                Err(why) if list.warnings.len() < MAX_WARNINGS => {
                    list.warnings.push(format!("line {}: {why}", at + 1))
                }
                Err(_) => unkept += 1,
            }
        }
        if unkept > 0 {
            list.warnings
                .push(format!("and {unkept} more lines that let nobody in"));
        }
        list
    }
}

/// Why the file lets nobody in.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// Nobody has looked at it yet.
    #[error("{} has not been read yet", .0.display())]
    Unread(PathBuf),
    /// It is not there.
    #[error("there is no {}, so nobody is an administrator: write one full principal a line into it", .0.display())]
    Missing(PathBuf),
    /// The system does not let us read it.
    #[error("{} cannot be read: {text}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// The system's words.
        text: String,
    },
    /// A symbolic link.
    #[error("{} is a symbolic link: put the file itself there, or configure where the link leads", .0.display())]
    Link(PathBuf),
    /// A directory, a device, a pipe, a socket.
    #[error("{} is {what}, not a regular file", path.display())]
    NotRegular {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else's.
    #[error("{} belongs to uid {owner}, neither to root nor to its account (uid {account}): chown {account} {}", path.display(), path.display())]
    Owner {
        /// The file.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it may be beside root's.
        account: u32,
    },
    /// Somebody else could write it.
    #[error("{} is writable by {by}: chmod go-w {}", path.display(), path.display())]
    Writable {
        /// The file.
        path: PathBuf,
        /// By whom.
        by: &'static str,
    },
    /// Too long to be what it should.
    #[error("{} has more than {MAX_FILE} bytes", .0.display())]
    TooLong(PathBuf),
    /// Each reading found something else.
    #[error("{} was being written while it was read: replace it as a whole, by renaming", .0.display())]
    Changing(PathBuf),
}

/// Reads the list at `path`, which is root's or the account's with the given uid. Blocks on the disk only.
///
/// # Errors
/// Every [`Trouble`] but `Unread`; each means that nobody is listed.
pub fn load(path: &Path, account: u32) -> Result<List, Trouble> {
    for _ in 0..READINGS {
        let mut file = open(path)?;
        let before = examine(path, account, &file)?;
        let mut bytes = Vec::new();
        let read = Read::by_ref(&mut file)
            .take(MAX_FILE + 1)
            .read_to_end(&mut bytes);
        read.map_err(|error| unreadable(path, &error))?;
        let after = examine(path, account, &file)?;
        if after.holds_the_same(&before) && bytes.len() as u64 == after.size {
            return Ok(List::parse(&bytes));
        }
    }
    Err(Trouble::Changing(path.to_owned()))
}

/// Opening must neither follow a link nor wait for the other end of a pipe.
fn open(path: &Path) -> Result<File, Trouble> {
    let flags =
        OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    match rustix::fs::open(path, flags, Mode::empty()) {
        Ok(file) => Ok(file.into()),
        Err(rustix::io::Errno::LOOP) => Err(Trouble::Link(path.to_owned())),
        Err(rustix::io::Errno::NOENT) => Err(Trouble::Missing(path.to_owned())),
        // a socket cannot be opened at all
        Err(rustix::io::Errno::NXIO) => Err(Trouble::NotRegular {
            path: path.to_owned(),
            what: "a socket",
        }),
        Err(errno) => Err(unreadable(path, &errno.into())),
    }
}

/// Refuses a file that somebody else could have written, and returns what tells its versions apart.
fn examine(path: &Path, account: u32, file: &File) -> Result<Stamp, Trouble> {
    let metadata = file.metadata().map_err(|error| unreadable(path, &error))?;
    if !metadata.is_file() {
        return Err(Trouble::NotRegular {
            path: path.to_owned(),
            what: kind(metadata.file_type()),
        });
    }
    let owner = metadata.uid();
    if owner != 0 && owner != account {
        return Err(Trouble::Owner {
            path: path.to_owned(),
            owner,
            account,
        });
    }
    let by = match (
        metadata.mode() & GROUP_MAY_WRITE != 0,
        metadata.mode() & OTHERS_MAY_WRITE != 0,
    ) {
        (true, true) => Some("its group and by everybody"),
        (true, false) => Some("its group"),
        (false, true) => Some("everybody"),
        (false, false) => None,
    };
    if let Some(by) = by {
        return Err(Trouble::Writable {
            path: path.to_owned(),
            by,
        });
    }
    if metadata.len() > MAX_FILE {
        return Err(Trouble::TooLong(path.to_owned()));
    }
    Ok(Stamp::from(&metadata))
}

fn kind(file_type: fs::FileType) -> &'static str {
    if file_type.is_dir() {
        "a directory"
    } else if file_type.is_fifo() {
        "a pipe"
    } else {
        "a device"
    }
}

fn unreadable(path: &Path, error: &io::Error) -> Trouble {
    Trouble::Unreadable {
        path: path.to_owned(),
        text: error.to_string(),
    }
}

/// Returns the principal that a line lists, or why the line can never let anybody in.
fn listed(line: &[u8]) -> Result<Principal, String> {
    let text = std::str::from_utf8(line)
        .map_err(|_| "not UTF-8, and no principal that is known here is".to_owned())?;
    if text.is_empty() {
        return Err("empty".to_owned());
    }
    if text.ends_with('\r') {
        return Err("ends in a carriage return, as Windows ends lines".to_owned());
    }
    if text.starts_with('\u{feff}') {
        return Err("begins with a byte order mark".to_owned());
    }
    if text.starts_with('#') {
        return Err("begins with '#', but this file has no comments".to_owned());
    }
    if text.trim() != text {
        return Err("begins or ends with a blank, and blanks count".to_owned());
    }
    if text.contains('*') {
        return Err("holds '*', but this file has no wildcards".to_owned());
    }
    text.parse().map_err(|bad: BadName| bad.to_string())
}

/// The backend: lets whoever is listed do anything, and has no opinion on anybody else.
#[derive(Debug)]
pub struct K5login {
    path: PathBuf,
    account: u32,
    current: RwLock<Arc<Reading>>,
    /// Held by the one who reads the file; the others wait for what it finds, since the old list may hold somebody who was struck off.
    reading: Mutex<()>,
}

#[derive(Debug)]
struct Reading {
    list: Result<List, Trouble>,
    /// The version that was read, and since when it has been known; none where there is nothing to compare with.
    version: Option<(Stamp, Instant)>,
    /// Whether the version was read at a time when its stamp could no longer hide a second change.
    settled: bool,
}

impl K5login {
    /// Makes a backend for the file at `path`, which must be root's or the account's with the given uid. Reads it at the first refresh.
    pub fn new(path: impl Into<PathBuf>, account: u32) -> Self {
        let path = path.into();
        let unread = Reading {
            list: Err(Trouble::Unread(path.clone())),
            version: None,
            settled: false,
        };
        Self {
            path,
            account,
            current: RwLock::new(Arc::new(unread)),
            reading: Mutex::new(()),
        }
    }

    fn current(&self) -> Arc<Reading> {
        // a reading is replaced as a whole, so a panic elsewhere leaves a good one
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn stamp(&self) -> Option<Stamp> {
        fs::symlink_metadata(&self.path)
            .ok()
            .map(|metadata| Stamp::from(&metadata))
    }

    fn is_fresh(&self) -> bool {
        let current = self.current();
        current.settled && current.version.map(|(stamp, _)| stamp) == self.stamp()
    }

    fn read(&self, before: &Reading) -> Reading {
        let now = Instant::now();
        // the stamp is taken before the content, so that a change in between is seen at the next look
        let Some(stamp) = self.stamp() else {
            return Reading {
                list: load(&self.path, self.account),
                version: None,
                settled: false,
            };
        };
        let known = match before.version {
            Some((known, since)) if known == stamp => since,
            _ => now,
        };
        Reading {
            list: load(&self.path, self.account),
            version: Some((stamp, known)),
            settled: now.duration_since(known) >= SETTLING,
        }
    }
}

impl Authorizer for K5login {
    fn name(&self) -> &'static str {
        "k5login"
    }

    fn judge(&self, query: &Query<'_>) -> Opinion {
        let current = self.current();
        let list = match &current.list {
            Ok(list) => list,
            Err(trouble) => {
                return Opinion::Deny {
                    reason: trouble.to_string(),
                };
            }
        };
        // Whoever could act for an administrator would be root here.
        if let (Action::ActFor, Subject::Person(other)) = (query.action, query.on)
            && let Some(line) = list.line(&other.principal)
        {
            return Opinion::Deny {
                reason: format!(
                    "nobody acts for an administrator (line {line} of {})",
                    self.path.display()
                ),
            };
        }
        match (query.action, list.line(&query.person.principal)) {
            // To administer is not to own: whether a creator owns is for a policy to say.
            (Action::Own, _) | (_, None) => Opinion::None,
            (Action::Verb(_) | Action::ActFor, Some(line)) => Opinion::Allow {
                rule: format!("k5login:{line}"),
                administrator: true,
            },
        }
    }

    fn wants(&self, query: &Query<'_>) -> Vec<String> {
        match query.action {
            Action::Own | Action::ActFor => Vec::new(),
            Action::Verb(_) => vec![format!(
                "{} stands in a line of {}",
                query.person.principal,
                self.path.display()
            )],
        }
    }

    fn refresh(&self) -> Option<Reload> {
        if self.is_fresh() {
            return None;
        }
        let _one_reader = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current();
        let after = self.read(&before);
        let reload = (before.list != after.list).then(|| match &after.list {
            Ok(list) => Reload {
                summary: format!("administrators in {}: {}", self.path.display(), list.len()),
                usable: true,
                warnings: list.warnings().to_vec(),
            },
            Err(trouble) => Reload {
                summary: trouble.to_string(),
                usable: false,
                warnings: Vec::new(),
            },
        });
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
        reload
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::Ipv4Addr,
        os::unix::fs::{PermissionsExt, chown, symlink},
        os::unix::net::UnixListener,
    };

    use tempfile::TempDir;
    use xman_common::protocol::Verb;

    use super::*;
    use crate::{Person, UnixGroups};

    /// The account that runs the tests stands for root where they do not run as root.
    fn account() -> u32 {
        tempfile::tempdir()
            .unwrap()
            .path()
            .metadata()
            .unwrap()
            .uid()
    }

    struct Place {
        _folder: TempDir,
        file: PathBuf,
    }

    impl Place {
        fn empty() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let file = folder.path().join(".k5login");
            Self {
                _folder: folder,
                file,
            }
        }

        fn holding(content: impl AsRef<[u8]>) -> Self {
            let place = Self::empty();
            place.write(content);
            place
        }

        fn write(&self, content: impl AsRef<[u8]>) {
            fs::write(&self.file, content).unwrap();
            self.mode(0o600);
        }

        fn replace(&self, content: impl AsRef<[u8]>) {
            let new = self.file.with_extension("new");
            fs::write(&new, content).unwrap();
            fs::set_permissions(&new, fs::Permissions::from_mode(0o600)).unwrap();
            fs::rename(&new, &self.file).unwrap();
        }

        fn mode(&self, mode: u32) {
            fs::set_permissions(&self.file, fs::Permissions::from_mode(mode)).unwrap();
        }

        fn load(&self) -> Result<List, Trouble> {
            load(&self.file, account())
        }

        fn backend(&self) -> K5login {
            let backend = K5login::new(&self.file, account());
            backend
                .refresh()
                .expect("a first refresh tells what it found");
            backend
        }
    }

    fn principal(text: &str) -> Principal {
        text.parse().unwrap()
    }

    fn ask(backend: &K5login, who: &str) -> Opinion {
        backend.judge(&query(&person(who), Verb::Destroy.into(), Subject::Host))
    }

    fn person(who: &str) -> Person {
        Person {
            principal: principal(who),
            unix_groups: UnixGroups::Unasked,
        }
    }

    fn query<'a>(person: &'a Person, action: Action, on: Subject<'a>) -> Query<'a> {
        Query {
            person,
            action,
            on,
            peer: Ipv4Addr::LOCALHOST.into(),
            acting: None,
        }
    }

    fn allowed(line: usize) -> Opinion {
        Opinion::Allow {
            rule: format!("k5login:{line}"),
            administrator: true,
        }
    }

    /// Refreshes and asks, as a session does.
    fn ask_anew(backend: &K5login, who: &str) -> Opinion {
        backend.refresh();
        ask(backend, who)
    }

    #[track_caller]
    fn nobody(backend: &K5login, why: &str) {
        match ask_anew(backend, "alice@EX.ORG") {
            Opinion::Deny { reason } => {
                assert!(reason.contains(why), "{reason:?} does not say {why:?}")
            }
            other @ (Opinion::Allow { .. } | Opinion::None) => panic!("{other:?}"),
        }
    }

    #[test]
    fn who_is_listed_may_do_anything_and_on_others_there_is_no_opinion() {
        let backend = Place::holding("alice@EX.ORG\nbob/admin@EX.ORG\nalice@EX.ORG\n").backend();
        assert_eq!(ask(&backend, "alice@EX.ORG"), allowed(1));
        assert_eq!(ask(&backend, "bob/admin@EX.ORG"), allowed(2));
        for stranger in [
            "mallory@EX.ORG",
            "alice@EX.COM",
            "alice@ex.org",
            "Alice@EX.ORG",
            "bob@EX.ORG",
            "alice/@EX.ORG",
        ] {
            assert_eq!(ask(&backend, stranger), Opinion::None, "{stranger}");
        }
    }

    #[test]
    fn root_of_the_realm_is_nobody_unless_listed() {
        let backend = Place::holding("alice@EX.ORG\n").backend();
        assert_eq!(ask(&backend, "root@EX.ORG"), Opinion::None);
    }

    #[test]
    fn the_last_line_needs_no_newline_and_an_empty_file_lists_nobody() {
        assert_eq!(
            Place::holding("alice@EX.ORG")
                .load()
                .unwrap()
                .line(&principal("alice@EX.ORG")),
            Some(1)
        );
        for content in ["", "\n"] {
            let list = Place::holding(content).load().unwrap();
            assert!(list.is_empty(), "{content:?}");
        }
    }

    #[test]
    fn lines_that_can_never_match_are_warned_about_and_let_nobody_in() {
        let long = format!("{}@EX.ORG", "a".repeat(9000));
        for (line, why) in [
            (&b"alice@EX.ORG "[..], "blank"),
            (b" alice@EX.ORG", "blank"),
            (b"\talice@EX.ORG", "blank"),
            (b"alice@EX.ORG\r", "carriage return"),
            (b"alice", "names no realm"),
            (b"alice@", "names no realm"),
            (b"@EX.ORG", "empty principal"),
            (b"# alice@EX.ORG", "comments"),
            (b"#alice@EX.ORG", "comments"),
            (b"", "empty"),
            (b" ", "blank"),
            (b"*@EX.ORG", "wildcards"),
            (b"*/admin@EX.ORG", "wildcards"),
            (b"al\\ice@EX.ORG", "escape"),
            (b"alice@EX.ORG\\", "escape"),
            (b"alice@EX@ORG", "realm cannot hold '@'"),
            (b"al\0ice@EX.ORG", "cannot hold"),
            (b"al\tice@EX.ORG", "cannot hold"),
            (b"\xef\xbb\xbfalice@EX.ORG", "byte order mark"),
            (b"al\xefce@EX.ORG", "UTF-8"),
            (long.as_bytes(), "9007 bytes"),
        ] {
            let content = [b"first@EX.ORG\n", line, b"\nlast@EX.ORG\n"].concat();
            let list = Place::holding(content).load().unwrap();
            let shown = String::from_utf8_lossy(line);
            assert_eq!(list.len(), 2, "{shown:?}");
            assert_eq!(list.line(&principal("last@EX.ORG")), Some(3), "{shown:?}");
            match list.warnings() {
                [warning] => {
                    assert!(
                        warning.starts_with("line 2: ") && warning.contains(why),
                        "{shown:?}: {warning:?}"
                    );
                }
                other => panic!("{shown:?}: {other:?}"),
            }
        }
    }

    #[test]
    fn a_file_with_windows_line_ends_lists_nobody_and_says_why() {
        let list = Place::holding("alice@EX.ORG\r\nbob@EX.ORG\r\n")
            .load()
            .unwrap();
        assert!(list.is_empty());
        assert_eq!(list.warnings().len(), 2);
    }

    #[test]
    fn a_binary_in_its_place_lists_nobody_and_warns_within_bounds() {
        let list = Place::holding(b"\xff\n".repeat(10_000)).load().unwrap();
        assert!(list.is_empty());
        assert_eq!(list.warnings().len(), MAX_WARNINGS + 1);
        assert_eq!(
            list.warnings().last().unwrap(),
            "and 9900 more lines that let nobody in"
        );
    }

    /// Every line is either listed under exactly its bytes or warned about, whatever it holds.
    #[test]
    fn every_line_is_either_listed_as_it_stands_or_warned_about() {
        let pieces = [
            "alice", "@", "EX.ORG", "/", "\\", "\\t", "\\0", " ", "\r", "#", "*", "\t", "ü", "\0",
            "@EX.ORG", "\u{feff}",
        ];
        let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |bound: usize| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            usize::try_from(seed % bound as u64).unwrap()
        };
        let mut listed_lines = 0;
        for _ in 0..20_000 {
            let line: String = (0..next(6)).map(|_| pieces[next(pieces.len())]).collect();
            let list = List::parse(format!("{line}\nlast@EX.ORG\n").as_bytes());
            assert_eq!(list.line(&principal("last@EX.ORG")), Some(2), "{line:?}");
            assert_eq!(list.len() + list.warnings().len(), 2, "{line:?}");
            if list.len() == 2 {
                assert_eq!(list.line(&principal(&line)), Some(1), "{line:?}");
                listed_lines += 1;
            }
        }
        assert!(
            listed_lines > 100,
            "the generator makes too few principals: {listed_lines}"
        );
    }

    #[test]
    fn without_the_file_there_is_nobody_until_it_comes() {
        let place = Place::empty();
        let backend = place.backend();
        nobody(&backend, "there is no ");
        place.write("alice@EX.ORG\n");
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(1));
        fs::remove_file(&place.file).unwrap();
        nobody(&backend, "there is no ");
    }

    #[test]
    fn before_the_first_reading_there_is_nobody() {
        let place = Place::holding("alice@EX.ORG\n");
        let backend = K5login::new(&place.file, account());
        assert!(matches!(
            ask(&backend, "alice@EX.ORG"),
            Opinion::Deny { .. }
        ));
    }

    #[test]
    fn a_file_that_others_may_write_lists_nobody() {
        let place = Place::holding("alice@EX.ORG\n");
        let backend = place.backend();
        for (mode, why) in [
            (0o620, "writable by its group: chmod go-w"),
            (0o602, "writable by everybody: chmod go-w"),
            (0o622, "writable by its group and by everybody"),
            (0o666, "writable by its group and by everybody"),
        ] {
            place.mode(mode);
            nobody(&backend, why);
        }
        for mode in [0o600, 0o644, 0o640, 0o400, 0o755] {
            place.mode(mode);
            assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(1), "{mode:o}");
        }
    }

    #[test]
    fn a_link_is_not_followed() {
        let place = Place::holding("alice@EX.ORG\n");
        let link = place.file.with_file_name("link");
        symlink(&place.file, &link).unwrap();
        assert_eq!(load(&link, account()), Err(Trouble::Link(link)));
    }

    #[test]
    fn only_a_regular_file_will_do_and_none_makes_the_reader_wait() {
        let place = Place::empty();
        fs::create_dir(&place.file).unwrap();
        assert!(
            place
                .load()
                .unwrap_err()
                .to_string()
                .ends_with("is a directory, not a regular file")
        );

        let place = Place::empty();
        rustix::fs::mkfifoat(rustix::fs::CWD, &place.file, Mode::RUSR | Mode::WUSR).unwrap();
        assert!(
            place
                .load()
                .unwrap_err()
                .to_string()
                .ends_with("is a pipe, not a regular file")
        );

        let place = Place::empty();
        let _listener = UnixListener::bind(&place.file).unwrap();
        assert!(
            place
                .load()
                .unwrap_err()
                .to_string()
                .ends_with("is a socket, not a regular file")
        );

        assert!(
            load(Path::new("/dev/null"), account())
                .unwrap_err()
                .to_string()
                .ends_with("is a device, not a regular file")
        );
    }

    #[test]
    fn a_file_over_the_limit_lists_nobody() {
        let line = "alice@EX.ORG\n";
        let lines = usize::try_from(MAX_FILE).unwrap() / line.len();
        assert_eq!(Place::holding(line.repeat(lines)).load().unwrap().len(), 1);
        let place = Place::holding(line.repeat(lines + 1));
        assert_eq!(place.load(), Err(Trouble::TooLong(place.file.clone())));
    }

    #[test]
    fn the_file_is_roots_or_its_accounts() {
        assert_eq!(account(), 0, "this test changes owners, so it runs as root");
        let place = Place::holding("alice@EX.ORG\n");
        chown(&place.file, Some(12345), None).unwrap();
        assert_eq!(
            load(&place.file, 0),
            Err(Trouble::Owner {
                path: place.file.clone(),
                owner: 12345,
                account: 0
            })
        );
        assert_eq!(load(&place.file, 12345).unwrap().len(), 1);
        chown(&place.file, Some(0), None).unwrap();
        assert_eq!(load(&place.file, 12345).unwrap().len(), 1);
        chown(&place.file, Some(12346), None).unwrap();
        assert!(
            load(&place.file, 12345)
                .unwrap_err()
                .to_string()
                .contains("belongs to uid 12346")
        );
    }

    #[test]
    fn a_change_of_owner_counts_at_once() {
        assert_eq!(account(), 0, "this test changes owners, so it runs as root");
        let place = Place::holding("alice@EX.ORG\n");
        let backend = place.backend();
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(1));
        chown(&place.file, Some(12345), None).unwrap();
        nobody(&backend, "belongs to uid 12345");
    }

    #[test]
    fn a_change_counts_at_once_however_it_was_made() {
        let place = Place::holding("alice@EX.ORG\n");
        let backend = place.backend();
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(1));
        place.replace("carol@EX.ORG\n");
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), Opinion::None);
        assert_eq!(ask_anew(&backend, "carol@EX.ORG"), allowed(1));
        place.write("carol@EX.ORG\nalice@EX.ORG\n");
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(2));
        place.write("");
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), Opinion::None);
    }

    /// Same length, and as many changes as fit into one step of the file system's clock.
    #[test]
    fn quick_changes_that_leave_the_same_time_stamp_are_not_missed() {
        let place = Place::holding("alice@EX.ORG\n");
        let backend = place.backend();
        for round in 0..500 {
            fs::write(
                &place.file,
                if round % 2 == 0 {
                    "carol@EX.ORG\n"
                } else {
                    "alice@EX.ORG\n"
                },
            )
            .unwrap();
            let expected = if round % 2 == 0 {
                Opinion::None
            } else {
                allowed(1)
            };
            assert_eq!(
                ask_anew(&backend, "alice@EX.ORG"),
                expected,
                "round {round}"
            );
        }
    }

    /// The same stamp again, from a file whose modification time is set back; only its change time tells.
    #[test]
    fn a_modification_time_that_is_set_back_hides_nothing() {
        let place = Place::holding("alice@EX.ORG\n");
        let backend = place.backend();
        settle(&backend);
        let times = fs::metadata(&place.file).unwrap().modified().unwrap();
        fs::write(&place.file, "carol@EX.ORG\n").unwrap();
        File::options()
            .write(true)
            .open(&place.file)
            .unwrap()
            .set_modified(times)
            .unwrap();
        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), Opinion::None);
    }

    #[test]
    fn a_file_that_rests_is_read_no_more_and_a_change_is_told_once() {
        let place = Place::holding("alice@EX.ORG\n#\n");
        let backend = K5login::new(&place.file, account());
        let reload = backend.refresh().unwrap();
        assert!(
            reload.usable && reload.summary.ends_with(".k5login: 1"),
            "{reload:?}"
        );
        assert_eq!(reload.warnings.len(), 1);
        settle(&backend);
        let before = backend.current();
        assert_eq!(backend.refresh(), None);
        assert!(
            Arc::ptr_eq(&before, &backend.current()),
            "it was read again"
        );

        place.mode(0o666);
        assert!(!backend.refresh().unwrap().usable);
        assert_eq!(backend.refresh(), None);
    }

    #[test]
    fn looking_at_a_resting_file_and_judging_are_cheap() {
        let listing: String = (0..10_000).map(|n| format!("user{n}@EX.ORG\n")).collect();
        let place = Place::holding(listing);
        let backend = place.backend();
        settle(&backend);
        let who = person("user9999@EX.ORG");
        let query = query(&who, Verb::List.into(), Subject::Host);
        // what others compute meanwhile does not count
        let computed = || {
            let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
            Duration::try_from(time).unwrap()
        };
        let began = computed();
        for _ in 0..10_000 {
            assert_eq!(backend.refresh(), None);
            assert_ne!(backend.judge(&query), Opinion::None);
        }
        let took = computed() - began;
        // many times what it takes, so that a slow machine does not fail it and reading the file or scanning the list does
        assert!(took < Duration::from_secs(5), "{took:?}");
        println!("{:?} for one look and one judgement", took / 10_000);
    }

    #[test]
    fn an_administrator_is_never_acted_for_and_does_not_own_by_being_one() {
        let place = Place::holding("root@EX.ORG\nportal/web@EX.ORG\n");
        let backend = place.backend();
        let (root, portal, alice) = (
            person("root@EX.ORG"),
            person("portal/web@EX.ORG"),
            person("alice@EX.ORG"),
        );
        let act_for =
            |who, other| backend.judge(&query(who, Action::ActFor, Subject::Person(other)));
        assert!(matches!(act_for(&portal, &root), Opinion::Deny { .. }));
        assert!(matches!(act_for(&root, &root), Opinion::Deny { .. }));
        assert_eq!(act_for(&portal, &alice), allowed(2));
        assert!(matches!(act_for(&alice, &portal), Opinion::Deny { .. }));
        let own = backend.judge(&query(&root, Action::Own, Subject::Host));
        assert_eq!(own, Opinion::None);
    }

    #[test]
    fn a_list_that_is_replaced_under_many_readers_is_always_one_or_the_other() {
        let both = "alice@EX.ORG\ncarol@EX.ORG\n";
        let one = "alice@EX.ORG\ndave@EX.ORG\n";
        let place = Place::holding(both);
        let backend = place.backend();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        assert_eq!(ask_anew(&backend, "alice@EX.ORG"), allowed(1));
                    }
                });
            }
            for round in 0..200 {
                place.replace(if round % 2 == 0 { one } else { both });
            }
        });
    }

    /// Refreshes until the backend trusts the file's stamp.
    fn settle(backend: &K5login) {
        let end = Instant::now() + 3 * SETTLING;
        while !backend.is_fresh() {
            assert!(Instant::now() < end, "the file never settles");
            std::thread::sleep(Duration::from_millis(50));
            backend.refresh();
        }
    }
}
