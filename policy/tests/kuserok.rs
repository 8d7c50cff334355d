//! Our reader of `.k5login` beside MIT's own, krb5_kuserok: where they agree, where they differ, and why.
//!
//! Runs as root: it changes owners. Needs a C compiler and MIT's headers.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    fs,
    net::Ipv4Addr,
    os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink},
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use proptest::prelude::*;
use tempfile::TempDir;
use xman_common::{name::Principal, protocol::Verb};
use xman_policy::{
    Authorizer, Opinion, Person, Query, Subject, UnixGroups,
    k5login::{self, K5login},
};

const ROOT: u32 = 0;
/// The local user who is neither root nor the one whose account is asked about.
const STRANGER: u32 = 12345;

/// Who lets the principal in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LetIn {
    Both,
    Neither,
    /// MIT does, and we do not, on purpose.
    OnlyMit(&'static str),
    /// We do, and MIT does not, and no harm is in it.
    OnlyUs(&'static str),
}

use LetIn::{Both, Neither, OnlyMit, OnlyUs};

/// What it is about, the file, the principal, and who lets it in as root.
type Case = (&'static str, File, &'static str, LetIn);

enum File {
    Absent,
    Holding(&'static [u8]),
    Mode(u32),
    Owner(u32),
    Link,
    DanglingLink,
    Folder,
}
use File::{Absent, DanglingLink, Folder, Holding, Link, Mode, Owner};

const ALICE: &str = "alice@EX.ORG";
const LINE: &[u8] = b"alice@EX.ORG\n";

const MODE_BITS: &str =
    "MIT looks at no mode bits, so whoever may write the file makes administrators";
const NO_FILE: &str = "without a file MIT goes by names: the realm's root is the host's root; here absence means nobody";
const STOPS_AT_NUL: &str = "MIT compares up to a NUL; a line is what it holds to its end";

const LOSES_A_LINE: &str = "MIT looks for a line's end before the NUL, finds none, and skips the next line; here each line stands for itself";

const CASES: &[Case] = &[
    // what is listed
    ("listed", Holding(LINE), ALICE, Both),
    (
        "no newline at the end",
        Holding(b"alice@EX.ORG"),
        ALICE,
        Both,
    ),
    (
        "second line",
        Holding(b"bob@EX.ORG\nalice@EX.ORG\n"),
        ALICE,
        Both,
    ),
    (
        "after an empty line",
        Holding(b"\n\nalice@EX.ORG\n"),
        ALICE,
        Both,
    ),
    (
        "after a line that is too long",
        Holding(&too_long_then_alice()),
        ALICE,
        Both,
    ),
    (
        "after a line that is not UTF-8",
        Holding(b"\xff\xfe\nalice@EX.ORG\n"),
        ALICE,
        Both,
    ),
    (
        "listed twice",
        Holding(b"alice@EX.ORG\nalice@EX.ORG\n"),
        ALICE,
        Both,
    ),
    (
        "an instance",
        Holding(b"alice/admin@EX.ORG\n"),
        "alice/admin@EX.ORG",
        Both,
    ),
    (
        "many components",
        Holding(b"a/b/c/d@EX.ORG\n"),
        "a/b/c/d@EX.ORG",
        Both,
    ),
    (
        "an empty component",
        Holding(b"alice/@EX.ORG\n"),
        "alice/@EX.ORG",
        Both,
    ),
    (
        "a foreign realm, listed",
        Holding(b"alice@EX.COM\n"),
        "alice@EX.COM",
        Both,
    ),
    (
        "letters beyond ASCII",
        Holding("zoë@EX.ORG\n".as_bytes()),
        "zoë@EX.ORG",
        Both,
    ),
    (
        "an escaped slash",
        Holding(b"al\\/ice@EX.ORG\n"),
        "al\\/ice@EX.ORG",
        Both,
    ),
    (
        "an escaped at sign",
        Holding(b"al\\@EX.COM@EX.ORG\n"),
        "al\\@EX.COM@EX.ORG",
        Both,
    ),
    (
        "an escaped backslash",
        Holding(b"al\\\\ice@EX.ORG\n"),
        "al\\\\ice@EX.ORG",
        Both,
    ),
    (
        "an escaped tab",
        Holding(b"al\\tice@EX.ORG\n"),
        "al\\tice@EX.ORG",
        Both,
    ),
    (
        "an escaped newline",
        Holding(b"al\\nice@EX.ORG\n"),
        "al\\nice@EX.ORG",
        Both,
    ),
    (
        "an escaped NUL",
        Holding(b"al\\0ice@EX.ORG\n"),
        "al\\0ice@EX.ORG",
        Both,
    ),
    (
        "a slash in the realm, as the library writes it",
        Holding(b"alice@EX\\/ORG\n"),
        "alice@EX\\/ORG",
        Both,
    ),
    (
        "a blank within the name",
        Holding(b"al ice@EX.ORG\n"),
        "al ice@EX.ORG",
        Both,
    ),
    // what is not
    ("somebody else", Holding(LINE), "mallory@EX.ORG", Neither),
    (
        "the realm's root, not listed",
        Holding(LINE),
        "root@EX.ORG",
        Neither,
    ),
    (
        "an empty file, for the realm's root",
        Holding(b""),
        "root@EX.ORG",
        Neither,
    ),
    ("an empty file", Holding(b""), ALICE, Neither),
    ("an empty line", Holding(b"\n"), ALICE, Neither),
    ("another realm", Holding(LINE), "alice@EX.COM", Neither),
    (
        "the realm in small letters",
        Holding(b"alice@ex.org\n"),
        ALICE,
        Neither,
    ),
    (
        "the name in capitals",
        Holding(b"Alice@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "an instance of whom is listed",
        Holding(LINE),
        "alice/admin@EX.ORG",
        Neither,
    ),
    (
        "whose instance is listed",
        Holding(b"alice/admin@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "an empty instance of whom is listed",
        Holding(LINE),
        "alice/@EX.ORG",
        Neither,
    ),
    (
        "a line without its realm",
        Holding(b"alice\n"),
        ALICE,
        Neither,
    ),
    (
        "a line with an empty realm",
        Holding(b"alice@\n"),
        ALICE,
        Neither,
    ),
    ("a realm alone", Holding(b"@EX.ORG\n"), ALICE, Neither),
    (
        "a blank at the end",
        Holding(b"alice@EX.ORG \n"),
        ALICE,
        Neither,
    ),
    (
        "a blank in front",
        Holding(b" alice@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "a tab at the end",
        Holding(b"alice@EX.ORG\t\n"),
        ALICE,
        Neither,
    ),
    (
        "Windows line ends",
        Holding(b"alice@EX.ORG\r\n"),
        ALICE,
        Neither,
    ),
    (
        "old Macintosh line ends",
        Holding(b"bob@EX.ORG\ralice@EX.ORG\r"),
        ALICE,
        Neither,
    ),
    (
        "a byte order mark",
        Holding(b"\xef\xbb\xbfalice@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    ("a comment", Holding(b"#alice@EX.ORG\n"), ALICE, Neither),
    (
        "a comment behind",
        Holding(b"alice@EX.ORG # she\n"),
        ALICE,
        Neither,
    ),
    ("a wildcard", Holding(b"*@EX.ORG\n"), ALICE, Neither),
    (
        "two on one line",
        Holding(b"alice@EX.ORG bob@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "quotation marks",
        Holding(b"\"alice@EX.ORG\"\n"),
        ALICE,
        Neither,
    ),
    (
        "an escape that nobody needs",
        Holding(b"al\\ice@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "an instance whose slash is escaped",
        Holding(b"alice\\/admin@EX.ORG\n"),
        "alice/admin@EX.ORG",
        Neither,
    ),
    (
        "a slash in the realm as it is",
        Holding(b"alice@EX/ORG\n"),
        "alice@EX\\/ORG",
        Neither,
    ),
    (
        "a real tab for an escaped one",
        Holding(b"al\tice@EX.ORG\n"),
        "al\\tice@EX.ORG",
        Neither,
    ),
    (
        "a NUL in front",
        Holding(b"\0alice@EX.ORG\n"),
        ALICE,
        Neither,
    ),
    (
        "the end of a line that is too long",
        Holding(&alice_at_the_end_of_too_long()),
        ALICE,
        Neither,
    ),
    ("a folder in its place", Folder, ALICE, Neither),
    // whose the file is
    ("root's file", Owner(ROOT), ALICE, Both),
    ("somebody else's file", Owner(STRANGER), ALICE, Neither),
    ("for its owner alone", Mode(0o600), ALICE, Both),
    ("for all to read", Mode(0o644), ALICE, Both),
    ("for its owner to run", Mode(0o755), ALICE, Both),
    // where we are stricter on purpose
    (
        "writable by its group",
        Mode(0o620),
        ALICE,
        OnlyMit(MODE_BITS),
    ),
    (
        "writable by everybody",
        Mode(0o602),
        ALICE,
        OnlyMit(MODE_BITS),
    ),
    (
        "a symbolic link",
        Link,
        ALICE,
        OnlyMit("who may change what a link leads to is not seen at the file"),
    ),
    (
        "a link to nothing, for the realm's root",
        DanglingLink,
        "root@EX.ORG",
        OnlyMit(NO_FILE),
    ),
    (
        "no file, for the realm's root",
        Absent,
        "root@EX.ORG",
        OnlyMit(NO_FILE),
    ),
    ("no file", Absent, ALICE, Neither),
    (
        "no file, for another realm's root",
        Absent,
        "root@EX.COM",
        Neither,
    ),
    (
        "a NUL at the end",
        Holding(b"alice@EX.ORG\0\n"),
        ALICE,
        OnlyMit(STOPS_AT_NUL),
    ),
    (
        "a NUL and more",
        Holding(b"alice@EX.ORG\0bob@EX.ORG\n"),
        ALICE,
        OnlyMit(STOPS_AT_NUL),
    ),
    (
        "after a line with a NUL",
        Holding(b"bob@EX.ORG\0\nalice@EX.ORG\n"),
        ALICE,
        OnlyUs(LOSES_A_LINE),
    ),
    (
        "a wildcard that is a name",
        Holding(b"*@EX.ORG\n"),
        "*@EX.ORG",
        OnlyMit("whoever writes a star means everybody; it shall not look as if it did"),
    ),
    (
        "a name that begins like a comment",
        Holding(b"#alice@EX.ORG\n"),
        "#alice@EX.ORG",
        OnlyMit("whoever strikes somebody off with a '#' shall not make an administrator"),
    ),
    (
        "a name that begins with a blank",
        Holding(b" alice@EX.ORG\n"),
        " alice@EX.ORG",
        OnlyMit("a blank that nobody sees is a mistake, and warned about"),
    ),
    (
        "a realm that ends in a blank",
        Holding(b"alice@EX.ORG \n"),
        "alice@EX.ORG ",
        OnlyMit("a blank that nobody sees is a mistake, and warned about"),
    ),
];

const TOO_LONG: usize = 10_000;

const fn too_long_then_alice() -> [u8; TOO_LONG + LINE.len()] {
    let mut file = [b'a'; TOO_LONG + LINE.len()];
    file[TOO_LONG - 1] = b'\n';
    with_alice_at_the_end(file)
}

const fn alice_at_the_end_of_too_long() -> [u8; TOO_LONG + LINE.len()] {
    with_alice_at_the_end([b'a'; TOO_LONG + LINE.len()])
}

const fn with_alice_at_the_end<const N: usize>(mut file: [u8; N]) -> [u8; N] {
    let mut at = 0;
    while at < LINE.len() {
        file[N - LINE.len() + at] = LINE[at];
        at += 1;
    }
    file
}

#[test]
fn our_reader_agrees_with_mits_where_it_should() {
    let mut differences = 0;
    for (what, file, principal, by) in CASES {
        let place = Place::new("root");
        place.put(file);
        let [(mit, name)] = place.mit(&[*principal]).try_into().unwrap();
        let ours = place.ours(&name, ROOT);
        let expected = match by {
            Both => (true, true),
            Neither => (false, false),
            OnlyMit(why) => {
                differences += 1;
                println!("{}: {why}", what);
                (true, false)
            }
            OnlyUs(why) => {
                differences += 1;
                println!("{}: {why}", what);
                (false, true)
            }
        };
        assert_eq!((mit, ours), expected, "{}: (MIT's verdict, ours)", what);
    }
    assert!(differences < CASES.len() / 4);
}

/// The account need not be root's: then its own files count, and root's.
#[test]
fn an_account_goes_by_its_own_file_and_by_roots_in_both_readers() {
    let account = "nobody";
    let uid = Command::new("id").args(["-u", account]).output().unwrap();
    let uid: u32 = String::from_utf8(uid.stdout)
        .unwrap()
        .trim()
        .parse()
        .unwrap();
    for (owner, lets_in) in [(ROOT, true), (uid, true), (STRANGER, false)] {
        let place = Place::new(account);
        place.put(&Owner(owner));
        let [(mit, name)] = place.mit(&[ALICE]).try_into().unwrap();
        assert_eq!((mit, place.ours(&name, uid)), (lets_in, lets_in), "{owner}");
    }
}

/// Files of pieces that mean something to one reader or the other.
#[test]
fn over_many_files_the_readers_differ_only_as_the_table_says() {
    let pieces = vec![
        "alice", "bob", "@", "@EX.ORG", "@EX.ORG", "@EX.COM", "/", "admin", "\\", "\\/", "\\@",
        "\\t", "\\n", "\\0", "\\b", " ", "\t", "\r", "#", "*", "ü", "\0", "\u{feff}", "\u{2028}",
    ];
    let line =
        prop::collection::vec(prop::sample::select(pieces), 1..6).prop_map(|line| line.concat());
    let config = ProptestConfig {
        cases: 150,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    let place = Place::new("root");
    let (both, only_mit) = (std::cell::Cell::new(0), std::cell::Cell::new(0));
    proptest!(config, |(lines in prop::collection::vec(line, 1..40))| {
        place.put_bytes(lines.join("\n").as_bytes());
        // whoever is named in a line or in a part of it, and whose name the library writes as it stands there or otherwise
        let names: Vec<&str> = lines
            .iter()
            .flat_map(|line| [line.as_str(), line.trim(), line.split('\0').next().unwrap_or_default(), line.trim_start_matches('#')])
            .filter(|name| name.parse::<Principal>().is_ok())
            .chain([ALICE, "bob@EX.ORG", "root@EX.ORG"])
            .collect();
        for (mit, name) in place.mit(&names) {
            let ours = place.ours(&name, ROOT);
            let text = lines.join("\n");
            if ours && !mit {
                let lost = |at: usize| lines[..at].iter().any(|line| line.contains('\0'));
                let listed = lines.iter().position(|line| *line == name).unwrap();
                prop_assert!(lost(listed), "{name:?} is let in by us alone: {text:?}");
            }
            if mit && !ours {
                let blank = name.trim() != name;
                let strange = name.contains('*') || name.starts_with(['#', '\u{feff}']);
                let nul = lines.iter().any(|line| line.starts_with(&format!("{name}\0")));
                prop_assert!(blank || strange || nul, "{name:?} is let in by MIT alone: {text:?}");
                only_mit.set(only_mit.get() + 1);
            }
            both.set(both.get() + usize::from(mit && ours));
        }
    });
    assert!(
        both.get() > 100 && only_mit.get() > 10,
        "{} by both, {} by MIT alone",
        both.get(),
        only_mit.get()
    );
}

/// A folder with the file of one account, and a Kerberos configuration that leads MIT's library there.
struct Place {
    folder: TempDir,
    account: &'static str,
}

impl Place {
    fn new(account: &'static str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let owner = fs::metadata(folder.path()).unwrap().uid();
        assert_eq!(owner, ROOT, "this test changes owners, so it runs as root");
        let files = folder.path().join("k5login");
        fs::create_dir(&files).unwrap();
        let config = format!(
            "[libdefaults]\ndefault_realm = EX.ORG\nk5login_directory = {}\n",
            files.display()
        );
        fs::write(folder.path().join("krb5.conf"), config).unwrap();
        Self { folder, account }
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("k5login").join(self.account)
    }

    fn put(&self, file: &File) {
        let path = self.file();
        let elsewhere = self.folder.path().join("elsewhere");
        match file {
            Absent => {}
            Holding(bytes) => self.put_bytes(bytes),
            Mode(mode) => {
                self.put_bytes(LINE);
                fs::set_permissions(path, fs::Permissions::from_mode(*mode)).unwrap();
            }
            Owner(owner) => {
                self.put_bytes(LINE);
                chown(path, Some(*owner), None).unwrap();
            }
            Link => {
                fs::write(&elsewhere, LINE).unwrap();
                symlink(elsewhere, path).unwrap();
            }
            DanglingLink => symlink(elsewhere, path).unwrap(),
            Folder => fs::create_dir(path).unwrap(),
        }
    }

    fn put_bytes(&self, bytes: &[u8]) {
        fs::write(self.file(), bytes).unwrap();
        fs::set_permissions(self.file(), fs::Permissions::from_mode(0o600)).unwrap();
    }

    /// Returns MIT's verdicts, and the names as its library writes them: as we get them from it. What it takes for no principal is left out.
    fn mit(&self, principals: &[&str]) -> Vec<(bool, String)> {
        let mut command = Command::new(kuserok());
        command
            .env_clear()
            .env("KRB5_CONFIG", self.folder.path().join("krb5.conf"));
        let output = command.arg(self.account).args(principals).output().unwrap();
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && problem.is_empty(), "{problem}");
        let said = String::from_utf8(output.stdout).unwrap();
        let verdicts: Vec<(bool, String)> = said
            .split_terminator('\n')
            .filter_map(|line| match line.split_once(' ').unwrap() {
                ("yes", name) => Some((true, name.to_owned())),
                ("no", name) => Some((false, name.to_owned())),
                ("malformed", _) => None,
                other => panic!("{other:?}"),
            })
            .collect();
        verdicts
    }

    /// Returns our verdict, of the reader and of the backend above it.
    fn ours(&self, principal: &str, account: u32) -> bool {
        let principal: Principal = principal.parse().unwrap();
        let listed =
            k5login::load(&self.file(), account).is_ok_and(|list| list.line(&principal).is_some());
        let backend = K5login::new(self.file(), account);
        backend.refresh();
        let opinion = backend.judge(&Query {
            person: &Person {
                principal,
                unix_groups: UnixGroups::Unasked,
            },
            action: Verb::Destroy.into(),
            on: Subject::Host,
            peer: Ipv4Addr::LOCALHOST.into(),
            acting: None,
        });
        assert_eq!(
            listed,
            matches!(opinion, Opinion::Allow { .. }),
            "{opinion:?}"
        );
        listed
    }
}

/// Returns the compiled kuserok.c.
fn kuserok() -> &'static Path {
    static PROGRAM: OnceLock<(TempDir, PathBuf)> = OnceLock::new();
    let (_folder, program) = PROGRAM.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("kuserok");
        let mut cc = Command::new("cc");
        cc.args(["-O1", "-Wall", "-Wextra", "-Werror", "-o"])
            .arg(&program);
        cc.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/kuserok.c"))
            .arg("-lkrb5");
        let output = cc
            .output()
            .expect("a C compiler is needed: apt install gcc");
        let problem = String::from_utf8_lossy(&output.stderr);
        assert!(
            !problem.contains("krb5.h: No such file"),
            "MIT's headers are needed: apt install libkrb5-dev"
        );
        assert!(output.status.success(), "{problem}");
        (folder, program)
    });
    program
}
