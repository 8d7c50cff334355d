//! The message buffers of the kernel and of Xen, and hypervisors' log files, as text in pieces until the receiver is dropped.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read, Seek, SeekFrom},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    process::Command,
    sync::mpsc::Sender,
    task::spawn_blocking,
    time::{sleep, timeout},
};
use xman_common::protocol::{Code, Fault};

/// The longest piece, in bytes: several fit one frame.
const PIECE: usize = 32 * 1024;
/// How much of a log file's end is shown first, in bytes: a log of gigabytes would keep the host busy.
const TAIL: u64 = 1024 * 1024;
/// How often a followed buffer or file is looked at.
const LOOK: Duration = Duration::from_millis(300);
/// How often Xen's buffer is looked at, which costs a process.
const XEN_LOOK: Duration = Duration::from_secs(2);
/// How long Xen's tool may take.
const XEN_LIMIT: Duration = Duration::from_secs(10);
/// The most that is taken from Xen's tool, in bytes; Xen's buffer is far smaller.
const MAX_XEN: usize = 16 * 1024 * 1024;
/// The longest record of the kernel, in bytes; the kernel cuts them at 8 KiB.
const MAX_RECORD: usize = 16 * 1024;
const KERNEL: &str = "/dev/kmsg";
/// Linux's O_NONBLOCK on every architecture that it and libvirt's drivers share (x86, ARM, POWER, s390, RISC-V).
const O_NONBLOCK: i32 = 0o4000;

/// Where the pieces go.
pub(crate) type Pieces = Sender<Result<String, Fault>>;

/// Sends the kernel's ring buffer; with `follow` also what comes.
pub(crate) async fn kernel(out: Pieces, follow: bool) {
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(KERNEL);
    match opened {
        Ok(file) => {
            let buffer = KernelBuffer { file, lost: false };
            send(buffer, KernelBuffer::piece, KERNEL.into(), out, follow).await;
        }
        Err(error) => fail(&out, unreadable(Path::new(KERNEL), &error)).await,
    }
}

/// Sends Xen's ring buffer; with `follow` also what comes.
pub(crate) async fn xen(out: Pieces, follow: bool) {
    let mut before = String::new();
    loop {
        let now = match xen_buffer().await {
            Ok(text) => text,
            Err(fault) => return fail(&out, fault).await,
        };
        for piece in pieces(news(&before, &now)) {
            if out.send(Ok(piece.to_owned())).await.is_err() {
                return;
            }
        }
        if !follow || rest(&out, XEN_LOOK).await {
            return;
        }
        before = now;
    }
}

/// Sends the end of a log file; with `follow` also what is written to it, through rotation and truncation.
pub(crate) async fn file(path: PathBuf, out: Pieces, follow: bool) {
    let log = Log {
        path: path.clone(),
        open: None,
        carry: Vec::new(),
    };
    send(log, move |log| log.piece(follow), path, out, follow).await;
}

/// Sends what `next` reads of a source, piece by piece, until there is no more, or with `follow` until nobody listens.
async fn send<S: Send + 'static>(
    mut source: S,
    next: impl Fn(&mut S) -> io::Result<String> + Copy + Send + 'static,
    path: PathBuf,
    out: Pieces,
    follow: bool,
) {
    loop {
        let reading = spawn_blocking(move || {
            let read = next(&mut source);
            (source, read)
        });
        let Ok((back, read)) = reading.await else {
            return;
        };
        source = back;
        let is_over = match read {
            Ok(text) if !text.is_empty() => out.send(Ok(text)).await.is_err(),
            Ok(_) => !follow || rest(&out, LOOK).await,
            Err(error) => return fail(&out, unreadable(&path, &error)).await,
        };
        if is_over {
            return;
        }
    }
}

/// Waits a moment; returns whether nobody listens any more.
async fn rest(out: &Pieces, moment: Duration) -> bool {
    tokio::select! {
        () = out.closed() => true,
        () = sleep(moment) => false,
    }
}

async fn fail(out: &Pieces, fault: Fault) {
    // Whom it would concern is gone.
    let _ = out.send(Err(fault)).await;
}

fn unreadable(path: &Path, error: &io::Error) -> Fault {
    let advice = if error.kind() == ErrorKind::NotFound {
        "there is none: the domain was never started here, or this machine has no such buffer"
    } else if error.kind() == ErrorKind::PermissionDenied {
        "xmand may not read it; it must run as root"
    } else {
        "look at it on the host"
    };
    Fault::new(
        Code::Unavailable,
        format!("{}: {error}; {advice}", path.display()),
    )
}

struct KernelBuffer {
    file: File,
    lost: bool,
}

impl KernelBuffer {
    /// Returns what is there, up to a piece; nothing where all has been read.
    fn piece(&mut self) -> io::Result<String> {
        let mut text = String::new();
        let mut record = vec![0; MAX_RECORD];
        while text.len() < PIECE - MAX_RECORD {
            match self.file.read(&mut record) {
                Ok(length) => {
                    if self.lost {
                        text.push_str(
                            "[... messages were overwritten before they could be read ...]\n",
                        );
                        self.lost = false;
                    }
                    text.push_str(&kernel_line(record.get(..length).unwrap_or_default()));
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                // The ring has gone round; the next read goes on at its oldest record.
                Err(error) if error.kind() == ErrorKind::BrokenPipe => self.lost = true,
                Err(error) => return Err(error),
            }
        }
        Ok(text)
    }
}

/// Turns a record, `priority,sequence,microseconds,flags;text` and perhaps further lines about devices, into a line as dmesg shows it.
fn kernel_line(record: &[u8]) -> String {
    let record = String::from_utf8_lossy(record);
    let first = record.split('\n').next().unwrap_or_default();
    let (prefix, text) = first.split_once(';').unwrap_or(("", first));
    let micros: u64 = prefix
        .split(',')
        .nth(2)
        .and_then(|time| time.parse().ok())
        .unwrap_or_default();
    format!(
        "[{:5}.{:06}] {}\n",
        micros / 1_000_000,
        micros % 1_000_000,
        unescaped(text)
    )
}

/// The kernel writes what is not printable as `\xNN`: characters come back, control codes stay as they are written.
fn unescaped(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("\\x") {
        let (before, escape) = rest.split_at(at);
        bytes.extend_from_slice(before.as_bytes());
        match escape
            .get(2..4)
            .filter(|_| escape.is_ascii() || escape.is_char_boundary(4))
        {
            Some(digits) if digits.bytes().all(|digit| digit.is_ascii_hexdigit()) => {
                bytes.extend(u8::from_str_radix(digits, 16));
                rest = escape.get(4..).unwrap_or_default();
            }
            _ => {
                bytes.extend_from_slice(b"\\x");
                rest = escape.get(2..).unwrap_or_default();
            }
        }
    }
    bytes.extend_from_slice(rest.as_bytes());
    let mut line = String::with_capacity(bytes.len());
    for c in String::from_utf8_lossy(&bytes).chars() {
        if c.is_control() && c != '\t' {
            line.push_str(&format!("\\x{:02x}", u32::from(c)));
        } else {
            line.push(c);
        }
    }
    line
}

async fn xen_buffer() -> Result<String, Fault> {
    let fault = |why: String| Fault::new(Code::Unavailable, format!("`xl dmesg`: {why}"));
    let mut tool = Command::new("xl");
    tool.arg("dmesg").stdin(Stdio::null()).kill_on_drop(true);
    let run = timeout(XEN_LIMIT, tool.output());
    let output = match run.await {
        Err(_) => return Err(fault(format!("no answer in {} s", XEN_LIMIT.as_secs()))),
        Ok(Err(error)) => return Err(fault(format!("{error}; install xen-utils"))),
        Ok(Ok(output)) => output,
    };
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(fault(
            said.lines().next().unwrap_or("it failed").trim().to_owned(),
        ));
    }
    let text = output
        .stdout
        .get(..output.stdout.len().min(MAX_XEN))
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(text).into_owned())
}

/// Returns what a ring buffer has got since it was read before: what follows the last line read then, or all where that has gone.
fn news<'a>(before: &str, now: &'a str) -> &'a str {
    if let Some(more) = now.strip_prefix(before) {
        return more;
    }
    // The ring has lost its beginning: the longest end of what was read that is still there marks the place.
    let mut known = before;
    while !known.is_empty() {
        if let Some(more) = now.strip_prefix(known) {
            return more;
        }
        known = known.split_once('\n').map_or("", |(_, rest)| rest);
    }
    now
}

fn pieces(text: &str) -> impl Iterator<Item = &str> {
    let mut rest = text;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let end = (0..=rest.len().min(PIECE))
            .rev()
            .find(|at| rest.is_char_boundary(*at))
            .unwrap_or_default();
        let (piece, more) = rest.split_at(end);
        rest = more;
        Some(piece)
    })
}

/// A log file as far as it has been read.
struct Log {
    path: PathBuf,
    open: Option<File>,
    /// The beginning of a character whose rest is not there yet.
    carry: Vec<u8>,
}

impl Log {
    /// Returns what is there, up to a piece; nothing where all has been read.
    fn piece(&mut self, follow: bool) -> io::Result<String> {
        let mut file = match self.open.take() {
            Some(file) => file,
            None => begin(&self.path)?,
        };
        let mut bytes = std::mem::take(&mut self.carry);
        let mut read = fill(&mut file, &mut bytes)?;
        if read == 0
            && follow
            && let Some(next) = moved_on(&mut file, &self.path)?
        {
            // What was written to the old file up to its rotation is not lost.
            read = fill(&mut file, &mut bytes)?;
            if read == 0 {
                file = next;
                read = fill(&mut file, &mut bytes)?;
            }
        }
        self.open = Some(file);
        if read > 0 {
            self.carry = split_character(&mut bytes);
        } else if follow {
            self.carry = bytes;
            return Ok(String::new());
        }
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }
}

/// Reads up to a piece, less what a carried character can take.
fn fill(file: &mut File, bytes: &mut Vec<u8>) -> io::Result<usize> {
    file.take((PIECE - 4) as u64).read_to_end(bytes)
}

/// Opens a log at most [`TAIL`] before its end, at the beginning of a line. No link is followed, and nothing but a regular file opened,
/// whoever may write to the folder.
fn begin(path: &Path) -> io::Result<File> {
    let mut file = open_regular(path)?;
    let length = file.metadata()?.len();
    if length > TAIL {
        file.seek(SeekFrom::Start(length - TAIL))?;
        let mut byte = [0; 1];
        while file.read(&mut byte)? == 1 && byte != *b"\n" {}
    }
    Ok(file)
}

fn open_regular(path: &Path) -> io::Result<File> {
    let named = fs::symlink_metadata(path)?;
    if !named.is_file() {
        return Err(io::Error::other("not a regular file"));
    }
    let file = fs::OpenOptions::new()
        .read(true)
        .custom_flags(O_NONBLOCK)
        .open(path)?;
    let opened = file.metadata()?;
    if (opened.dev(), opened.ino()) != (named.dev(), named.ino()) || !opened.is_file() {
        return Err(io::Error::other("it was exchanged while it was opened"));
    }
    Ok(file)
}

/// Returns the file to go on with where the log was rotated, and goes back to the beginning of one that was cut.
fn moved_on(file: &mut File, path: &Path) -> io::Result<Option<File>> {
    let opened = file.metadata()?;
    if opened.len() < file.stream_position()? {
        file.seek(SeekFrom::Start(0))?;
        return Ok(None);
    }
    match fs::symlink_metadata(path) {
        Ok(named) if (named.dev(), named.ino()) != (opened.dev(), opened.ino()) => {
            open_regular(path).map(Some)
        }
        Ok(_) => Ok(None),
        // Between the two halves of a rotation there is none.
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Cuts off the beginning of a character at the end and returns it.
fn split_character(bytes: &mut Vec<u8>) -> Vec<u8> {
    match std::str::from_utf8(bytes) {
        Err(error) if error.error_len().is_none() => bytes.split_off(error.valid_up_to()),
        _ => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::{io::Write, os::unix::fs::symlink};

    use tokio::{sync::mpsc, time::timeout};

    use super::*;

    #[test]
    fn kernel_records_become_lines_as_dmesg_shows_them() {
        let line = |record: &str| kernel_line(record.as_bytes());
        assert_eq!(
            line("5,0,0,-;Linux version 6.1\n"),
            "[    0.000000] Linux version 6.1\n"
        );
        assert_eq!(
            line("6,339,5140900,-;NET: family\n SUBSYSTEM=net\n DEVICE=x\n"),
            "[    5.140900] NET: family\n"
        );
        assert_eq!(
            line("6,1,123456789012,c,caller=T1;a;b"),
            "[123456.789012] a;b\n"
        );
        assert_eq!(line("nonsense"), "[    0.000000] nonsense\n");
    }

    #[test]
    fn escapes_come_back_as_characters_but_never_as_control_codes() {
        assert_eq!(unescaped(r"B\xc3\xbccher"), "Bücher");
        assert_eq!(unescaped(r"\x1b[31mred\x0a\x07"), r"\x1b[31mred\x0a\x07");
        assert_eq!(unescaped(r"back\x5cslash \xzz \x4"), r"back\slash \xzz \x4");
        assert_eq!(unescaped(r"\xü"), r"\xü");
        assert_eq!(unescaped(r"\xff"), "\u{fffd}");
    }

    #[test]
    fn a_ring_buffer_is_gone_on_with_where_it_was_left() {
        assert_eq!(news("", "a\nb\n"), "a\nb\n");
        assert_eq!(news("a\nb\n", "a\nb\nc\n"), "c\n");
        assert_eq!(news("a\nb\nc\n", "c\nd\n"), "d\n");
        assert_eq!(news("a\nb\n", "x\ny\n"), "x\ny\n");
        assert_eq!(news("a\n", "a\n"), "");
    }

    #[test]
    fn pieces_are_bounded_and_cut_between_characters() {
        let text = "ü".repeat(PIECE);
        let cut: Vec<_> = pieces(&text).collect();
        assert!(cut.iter().all(|piece| piece.len() <= PIECE));
        assert_eq!(cut.concat(), text);
        let mut bytes = "aü".as_bytes().get(..2).unwrap().to_vec();
        assert_eq!(
            (split_character(&mut bytes), bytes),
            (vec![0xc3], b"a".to_vec())
        );
        let mut bytes = b"a\xff".to_vec();
        assert!(split_character(&mut bytes).is_empty());
    }

    async fn next(
        pieces: &mut mpsc::Receiver<Result<String, Fault>>,
    ) -> Option<Result<String, Fault>> {
        timeout(Duration::from_secs(60), pieces.recv())
            .await
            .expect("a piece or the end")
    }

    async fn all(path: &Path) -> Result<String, Fault> {
        let (out, mut pieces) = mpsc::channel(2);
        tokio::spawn(file(path.to_owned(), out, false));
        let mut text = String::new();
        while let Some(piece) = next(&mut pieces).await {
            let piece = piece?;
            assert!(piece.len() <= PIECE);
            text.push_str(&piece);
        }
        Ok(text)
    }

    #[tokio::test]
    async fn of_a_long_log_only_the_end_is_shown_from_a_lines_beginning() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        fs::write(&path, "first\nsecond ü\n").unwrap();
        assert_eq!(all(&path).await.unwrap(), "first\nsecond ü\n");
        let line = format!("{}\n", "ü".repeat(500));
        fs::write(&path, line.repeat(3000)).unwrap();
        let text = all(&path).await.unwrap();
        assert!(text.len() as u64 <= TAIL && text.len() as u64 > TAIL - 2 * line.len() as u64);
        assert!(text.lines().all(|shown| shown == line.trim_end()));
    }

    #[tokio::test]
    async fn only_regular_files_are_read() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link.log");
        symlink("/etc/passwd", &link).unwrap();
        for bad in [
            &link,
            folder.path(),
            Path::new("/dev/null"),
            &folder.path().join("absent.log"),
        ] {
            assert_eq!(
                all(bad).await.unwrap_err().code,
                Code::Unavailable,
                "{}",
                bad.display()
            );
        }
    }

    #[tokio::test]
    async fn a_followed_log_goes_on_through_rotation_and_truncation_until_nobody_listens() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("web.log");
        fs::write(&path, "one\n").unwrap();
        let (out, mut pieces) = mpsc::channel(2);
        let following = tokio::spawn(file(path.clone(), out, true));
        assert_eq!(next(&mut pieces).await.unwrap().unwrap(), "one\n");
        let mut log = fs::OpenOptions::new().append(true).open(&path).unwrap();
        log.write_all(b"tw\xc3").unwrap();
        assert_eq!(next(&mut pieces).await.unwrap().unwrap(), "tw");
        // A look at the idle file in between must not tear the character.
        sleep(LOOK * 2).await;
        log.write_all(b"\xbc\n").unwrap();
        assert_eq!(next(&mut pieces).await.unwrap().unwrap(), "ü\n");
        fs::rename(&path, folder.path().join("web.log.1")).unwrap();
        log.write_all(b"last of the old\n").unwrap();
        fs::write(&path, "first of the new\n").unwrap();
        let mut text = String::new();
        while !text.ends_with("new\n") {
            text.push_str(&next(&mut pieces).await.unwrap().unwrap());
        }
        assert_eq!(text, "last of the old\nfirst of the new\n");
        fs::OpenOptions::new()
            .write(true)
            .truncate(true)
            .open(&path)
            .unwrap();
        fs::OpenOptions::new()
            .append(true)
            .open(&path)
            .unwrap()
            .write_all(b"cut\n")
            .unwrap();
        assert_eq!(next(&mut pieces).await.unwrap().unwrap(), "cut\n");
        drop(pieces);
        timeout(Duration::from_secs(60), following)
            .await
            .unwrap()
            .unwrap();
    }

    #[tokio::test]
    async fn the_kernels_buffer_ends_unless_it_is_followed() {
        let (out, mut pieces) = mpsc::channel(2);
        tokio::spawn(kernel(out, false));
        let mut got = false;
        while let Some(piece) = next(&mut pieces).await {
            match piece {
                Ok(text) => got |= text.starts_with('['),
                // A container may have none.
                Err(fault) => {
                    assert_eq!(fault.code, Code::Unavailable);
                    got = true;
                }
            }
        }
        assert!(got);
    }
}
