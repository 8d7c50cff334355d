//! Consoles of real guests: one person, several, terminals that are given back, floods, and everything that can end one.

use std::{
    fs,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use xman_tests::{
    Call, Container, Embed, Guest, Host, LXC, Libvirtd, PATIENCE, Process, QEMU, Realm, Records,
    Scratch, Signal, Terminal, User, command, eventually, program, run, signal_pid,
};

use crate::authorization::{FAILED, Site, site_of};

const SOON: Duration = PATIENCE;
/// What keeps nobody waiting takes no longer, also on a busy machine.
const AT_ONCE: Duration = Duration::from_secs(20);
/// After how long what was typed is taken for lost.
const LOST: Duration = Duration::from_secs(10);
const LEAVE: &str = "\x1d";
/// How a shell asks where the cursor is, once it has shown its prompt.
const CURSOR: &str = "\x1b[6n";

/// What others ask meanwhile.
const OTHERS: [&[&str]; 2] = [&["list"], &["describe", "localhost/web"]];

/// A host with one guest or container called `web`, which bob owns.
struct Desk {
    host: Host,
    libvirtd: Libvirtd,
    admin: User,
    bob: User,
    /// Its files live as long as it does.
    _guest: Option<Guest>,
    container: Option<Container>,
}

impl Desk {
    /// The guest asks who is there.
    #[track_caller]
    fn new() -> Self {
        let guest = Guest::with_login("web");
        let libvirtd = Libvirtd::new();
        libvirtd.run(&guest);
        Self {
            _guest: Some(guest),
            ..Self::beside(libvirtd, &[QEMU])
        }
    }

    /// The container has a shell on its console, and a speed that no emulated serial line has.
    #[track_caller]
    fn with_container() -> Self {
        let container = Container::with_shell("web");
        let libvirtd = Libvirtd::with_containers();
        libvirtd.run_container(&container);
        Self {
            container: Some(container),
            ..Self::beside(libvirtd, &[QEMU, LXC])
        }
    }

    #[track_caller]
    fn beside(libvirtd: Libvirtd, uris: &[&str]) -> Self {
        let realm = Realm::shared();
        let host = site_of(Host::builder().beside(&libvirtd).uris(uris)).start(realm);
        let desk = Self {
            host,
            libvirtd,
            admin: realm.user("root/admin"),
            bob: realm.user("bob"),
            _guest: None,
            container: None,
        };
        desk.wait_known();
        desk.own("+bob@XMAN.TEST");
        desk
    }

    #[track_caller]
    fn wait_known(&self) {
        eventually("xmand has read libvirt", SOON, || {
            let listed = self.admin.rxm(&self.host, ["-o", "name", "list"]);
            listed.stdout().contains("web").then_some(())
        });
    }

    #[track_caller]
    fn own(&self, change: &str) {
        let owner = ["owner", "localhost/web", change];
        self.admin.rxm(&self.host, owner).success();
    }

    /// What the container has written down.
    fn said(&self) -> String {
        self.container
            .as_ref()
            .map(Container::said)
            .unwrap_or_default()
    }

    fn console(&self, who: &User, more: &[&str]) -> Call {
        let words = ["console", "localhost/web"].iter().chain(more);
        who.rxm_call(&self.host, words)
    }

    /// Opens the console on a terminal and waits until one is attached.
    #[track_caller]
    fn sit_down(&self, who: &User, more: &[&str]) -> Terminal {
        let terminal = self.console(who, more).in_terminal();
        terminal.wait_for(SOON, "connected to localhost");
        wait_raw(&terminal);
        terminal
    }

    /// Pipes a console, and waits until one is attached.
    #[track_caller]
    fn pipe(&self, who: &User, more: &[&str]) -> Process {
        let more: Vec<_> = ["--timeout", "15m"].iter().chain(more).copied().collect();
        let piped = self.console(who, &more).spawn();
        piped.stderr().wait_for(SOON, "connected to localhost");
        piped
    }

    /// The resident memory of xmand, in KiB.
    fn memory(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.host.pid())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        line.unwrap()
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .unwrap()
    }

    /// Open files and threads of xmand.
    fn files_and_threads(&self) -> (usize, usize) {
        let count = |what| {
            fs::read_dir(format!("/proc/{}/{what}", self.host.pid()))
                .unwrap()
                .count()
        };
        (count("fd"), count("task"))
    }

    /// Requires that somebody else's call is answered in time.
    #[track_caller]
    fn answers_others(&self) {
        for words in OTHERS {
            self.answers(words);
        }
    }

    #[track_caller]
    fn answers(&self, words: &[&str]) {
        let began = Instant::now();
        self.admin.rxm(&self.host, words).success();
        let took = began.elapsed();
        assert!(took < AT_ONCE, "{words:?} took {took:?}");
    }
}

#[track_caller]
fn wait_raw(terminal: &Terminal) {
    eventually("the terminal is raw", SOON, || {
        (!terminal.echoes()).then_some(())
    });
}

/// Logs in at a prompt that may be anywhere, and leaves no echo of what it looks for.
#[track_caller]
fn log_in(terminal: &mut Terminal) {
    let screen = terminal.screen().clone();
    log_in_where(
        || screen.text(),
        |line| terminal.types(&format!("{line}\r")),
    );
    answers(terminal, "in");
}

/// Answers what is asked for until a shell asks for more. What is typed before somebody reads it is lost now and then, so where nothing new is
/// asked for it is typed again.
#[track_caller]
fn log_in_where(said: impl Fn() -> String, mut types: impl FnMut(&str)) {
    let (mut before, mut typed, end) = (said(), Instant::now(), Instant::now() + SOON);
    types("");
    loop {
        let now = said();
        let is_new = now != before;
        let shown = now.trim_end().trim_end_matches(CURSOR).trim_end();
        if is_new && shown.ends_with('#') {
            return;
        }
        let answer = [("login:", "root"), ("Password:", Guest::PASSWORD)]
            .into_iter()
            .find_map(|(question, answer)| shown.ends_with(question).then_some(answer));
        if (is_new && answer.is_some()) || typed.elapsed() > LOST {
            before.clone_from(&now);
            typed = Instant::now();
            types(answer.unwrap_or_default());
        }
        assert!(Instant::now() < end, "nobody is logged in:\n{now}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Has the shell say something that was not typed. What is typed while it makes its prompt is lost now and then, so it is typed again.
#[track_caller]
fn answers(terminal: &mut Terminal, word: &str) {
    let answer = format!("{word}-2");
    eventually(&format!("the shell says {answer}"), SOON, || {
        terminal.types(&format!("echo {word}-$((1 + 1))\r"));
        let is_said = |said: &str| said.contains(&answer).then_some(());
        terminal.screen().find(Duration::from_secs(3), is_said)
    });
}

/// As [`log_in`], in a pipe.
#[track_caller]
fn log_in_by_pipe(piped: &mut Process) {
    let stdout = piped.stdout().clone();
    log_in_where(|| stdout.text(), |line| piped.say(format!("{line}\r")));
    answers_by_pipe(piped, "echo in-$((40 + 2))\r", "in-42");
    at_prompt(piped);
}

/// As [`answers`], in a pipe.
#[track_caller]
fn answers_by_pipe(piped: &mut Process, line: &str, answer: &str) {
    eventually(&format!("the shell says {answer}"), SOON, || {
        piped.say(line);
        let is_said = |said: &str| said.contains(answer).then_some(());
        piped.stdout().find(LOST, is_said)
    });
}

/// Waits until the shell has asked for more, and then, as it does, where the cursor is.
#[track_caller]
fn at_prompt(piped: &Process) {
    let is_asked = |said: &str| said.ends_with(&format!("# {CURSOR}")).then_some(());
    let asked = piped.stdout().find(SOON, is_asked);
    assert!(asked.is_some(), "{}", piped.stdout().text());
}

#[track_caller]
fn leaves(terminal: &mut Terminal) {
    terminal.types(LEAVE);
    assert_eq!(terminal.wait(SOON), 0, "{}", terminal.screen().text());
    assert!(terminal.echoes(), "the terminal is given back");
}

/// A shell that notes how the terminal is before and after what it runs, and ends as that did.
fn between_notes(call: &Call, folder: &Path) -> (Vec<std::ffi::OsString>, PathBuf, PathBuf) {
    let (before, after) = (folder.join("before"), folder.join("after"));
    let script = format!(
        "stty -a > {}; \"$@\"; code=$?; stty -a > {}; exit $code",
        before.display(),
        after.display()
    );
    let called = call.command();
    let mut words: Vec<std::ffi::OsString> = vec!["-c".into(), script.into(), "bash".into()];
    // Without setpriv, which the lab's commands begin with.
    words.extend(called.get_args().skip(3).map(Into::into));
    (words, before, after)
}

/// A console in a shell on a terminal, and the process id of its rxm.
#[track_caller]
fn in_a_shell(desk: &Desk, folder: &Path) -> (Terminal, u32, PathBuf, PathBuf) {
    let call = desk.console(&desk.bob, &[]);
    let (words, before, after) = between_notes(&call, folder);
    let terminal = desk
        .bob
        .program_call(&[], &program("bash"), words)
        .env("PATH", "/usr/bin:/bin")
        .in_terminal();
    terminal.wait_for(SOON, "connected to localhost");
    wait_raw(&terminal);
    let shell = terminal.pid();
    let rxm = fs::read_to_string(format!("/proc/{shell}/task/{shell}/children")).unwrap();
    (terminal, rxm.trim().parse().unwrap(), before, after)
}

#[track_caller]
fn same(before: &Path, after: &Path) {
    let (before, after) = (
        fs::read_to_string(before).unwrap(),
        fs::read_to_string(after).unwrap(),
    );
    assert!(before.contains("icanon"), "{before}");
    assert_eq!(before, after);
}

#[test]
fn an_owner_logs_in_types_and_leaves_his_terminal_as_it_was() {
    let desk = Desk::new();
    let scratch = Scratch::new("notes");
    let (mut terminal, _, before, after) = in_a_shell(&desk, scratch.path());
    terminal.wait_for(SOON, "Ctrl-] leaves");
    terminal.wait_for(SOON, "stty rows 40 cols 120");
    log_in(&mut terminal);
    // Ctrl-C is the guest's.
    terminal.types("cat\r");
    // What is typed while the shell makes room for cat is lost in between.
    eventually("cat answers", SOON, || {
        terminal.types("heard\r");
        let is_heard = |said: &str| said.contains("heard\r\nheard\r\n").then_some(());
        terminal.screen().find(Duration::from_secs(1), is_heard)
    });
    terminal.types("\x03");
    terminal.wait_for(SOON, "^C");
    answers(&mut terminal, "still");
    terminal.wait_for(SOON, "still-2");
    leaves(&mut terminal);
    same(&before, &after);
    let screen = terminal.screen().text();
    assert!(
        screen.ends_with(
            "rxm: left localhost:PORT/web\r\n"
                .replace("PORT", &desk.host.addr().port().to_string())
                .as_str()
        ),
        "{screen}"
    );
    for ending in ["; begins", "the caller left"] {
        desk.host.audit().contains(&[
            "principal=\"bob@XMAN.TEST\"",
            "verb=\"console\"",
            "domain=\"web\"",
            "verdict=\"allow\"",
            ending,
        ]);
    }
}

#[test]
fn in_tmux_it_works_as_anywhere_and_the_window_is_as_it_was() {
    let desk = Desk::new();
    let scratch = Scratch::new("tmux");
    let tmux = Tmux::new(&scratch, &desk.bob);
    let (words, before, after) = between_notes(&desk.console(&desk.bob, &[]), scratch.path());
    let quoted: Vec<_> = words
        .iter()
        .map(|word| format!("'{}'", word.to_string_lossy().replace('\'', "'\\''")))
        .collect();
    let script = scratch.write("run", format!("bash {} \"$@\"\n", quoted.join(" ")));
    tmux.types(&format!(". {}", script.display()));
    tmux.wait_for("connected to localhost");
    log_in_where(|| tmux.shown(), |line| tmux.types(line));
    tmux.answers("echo in-$((40 + 2))", "in-42");
    tmux.run(&["send-keys", "C-]"]);
    tmux.wait_for("left localhost");
    eventually("the shell goes on", SOON, || after.exists().then_some(()));
    // What is typed while the shell takes its terminal back may be lost.
    tmux.answers("echo back-$((1 + 1))", "\nback-2");
    same(&before, &after);
    // The guest learns the window's size when it is told to.
    tmux.run(&["send-keys", "-R"]);
    tmux.run(&["clear-history"]);
    tmux.types(&format!(". {} --size", script.display()));
    tmux.wait_for("stty rows 30 cols 100");
    tmux.answers("echo $(stty size)", "\n30 100");
    tmux.run(&["send-keys", "C-]"]);
    tmux.wait_for("left localhost");
}

/// A terminal multiplexer with one window of 100 columns and 30 rows.
struct Tmux {
    socket: PathBuf,
}

impl Tmux {
    #[track_caller]
    fn new(scratch: &Scratch, user: &User) -> Self {
        let tmux = Self {
            socket: scratch.path().join("tmux"),
        };
        let mut start = tmux.command();
        start.args([
            "-f",
            "/dev/null",
            "new-session",
            "-d",
            "-x",
            "100",
            "-y",
            "30",
            "bash --norc",
        ]);
        start.envs(user.env()).env("TERM", "xterm");
        run(start, b"", SOON).success();
        tmux
    }

    fn command(&self) -> std::process::Command {
        let mut tmux = command("tmux");
        tmux.arg("-S").arg(&self.socket);
        tmux
    }

    #[track_caller]
    fn run(&self, args: &[&str]) -> String {
        let mut tmux = self.command();
        tmux.args(args);
        run(tmux, b"", SOON).success().stdout()
    }

    /// Types a line.
    #[track_caller]
    fn types(&self, line: &str) {
        self.run(&["send-keys", "-l", line]);
        self.run(&["send-keys", "Enter"]);
    }

    fn shown(&self) -> String {
        self.run(&["capture-pane", "-p", "-S", "-"])
    }

    /// Types a line until it is answered, since what is typed while a shell makes its prompt may be lost.
    #[track_caller]
    fn answers(&self, line: &str, answer: &str) {
        let end = Instant::now() + SOON;
        let mut typed: Option<Instant> = None;
        while !self.shown().contains(answer) {
            if typed.is_none_or(|at| at.elapsed() > LOST) {
                self.types(line);
                typed = Some(Instant::now());
            }
            assert!(Instant::now() < end, "no {answer:?} in:\n{}", self.shown());
        }
    }

    /// Waits for a text without blanks at the end of a line, which tmux leaves out.
    #[track_caller]
    fn wait_for(&self, text: &str) {
        let end = Instant::now() + SOON;
        while !self.shown().contains(text) {
            assert!(Instant::now() < end, "no {text:?} in:\n{}", self.shown());
        }
    }
}

impl Drop for Tmux {
    fn drop(&mut self) {
        let mut kill = self.command();
        kill.arg("kill-server");
        let _ = run(kill, b"", SOON);
    }
}

#[test]
fn the_second_reads_along_force_takes_the_keyboard_and_everybody_is_told() {
    let desk = Desk::new();
    let mut bob = desk.sit_down(&desk.bob, &[]);
    log_in(&mut bob);
    let mut admin = desk.sit_down(&desk.admin, &[]);
    admin.wait_for(SOON, "bob@XMAN.TEST has the keyboard");
    bob.wait_for(SOON, "root/admin@XMAN.TEST reads along now");
    answers(&mut bob, "both");
    admin.wait_for(SOON, "both-2");
    // What a reader types goes nowhere, which is told once.
    admin.types("echo reader-$((1 + 1))\r");
    admin.wait_for(SOON, "what you type goes nowhere");
    admin.types("more\r");
    answers(&mut bob, "again");
    admin.wait_for(SOON, "again-2");
    let seen = admin.screen().text();
    assert!(!seen.contains("reader-2"), "{seen}");
    assert_eq!(seen.matches("goes nowhere").count(), 1, "{seen}");

    let mut third = desk.sit_down(&desk.admin, &["--force"]);
    bob.wait_for(SOON, "root/admin@XMAN.TEST has the keyboard now");
    admin.wait_for(SOON, "root/admin@XMAN.TEST has the keyboard now");
    third.wait_for(SOON, "reading along: root/admin@XMAN.TEST, bob@XMAN.TEST");
    answers(&mut third, "third");
    bob.wait_for(SOON, "third-2");
    leaves(&mut third);
    admin.wait_for(SOON, "the keyboard is yours now");
    bob.wait_for(SOON, "root/admin@XMAN.TEST has left");
    answers(&mut admin, "admin");
    bob.wait_for(SOON, "admin-2");

    // A seat is free however its session ends.
    signal_pid(admin.pid(), Signal::KILL);
    bob.wait_for(SOON, "the keyboard is yours now");
    answers(&mut bob, "bob");
    bob.wait_for(SOON, "bob-2");
    leaves(&mut bob);
}

#[test]
fn what_is_not_there_to_look_at_is_refused_with_its_reason() {
    let (deaf, off) = (Guest::tiny("deaf"), Guest::tiny("off"));
    let site = Site::with(&[], |host| host);
    let scratch = Scratch::new("deaf");
    let without: String = deaf
        .xml()
        .lines()
        .filter(|line| !line.contains("<serial") && !line.contains("<console"))
        .collect();
    let file = scratch.write("deaf.xml", without);
    site.libvirtd
        .virsh(&["create", &file.display().to_string()])
        .success();
    site.libvirtd.define(&off);
    let listed = || site.admin.rxm(&site.host, ["-o", "name", "list"]).stdout();
    eventually("both are known", SOON, || {
        (listed().contains("deaf") && listed().contains("off")).then_some(())
    });
    let console = |name: &str| site.admin.rxm(&site.host, ["console", name]).code(FAILED);
    console("localhost/deaf").complains("has no console that can be reached");
    console("localhost/off").complains("rxm start off");
    Realm::shared()
        .user("mallory")
        .rxm(&site.host, ["console", &deaf.uuid().to_string()])
        .denied();
    site.admin
        .rxm(&site.host, ["-o", "json", "console", "localhost/deaf"])
        .code(2)
        .complains("no JSON");
    let dry = site
        .admin
        .rxm(&site.host, ["--dry-run", "console", "localhost/deaf"]);
    dry.success().says("deaf");
}

#[test]
fn a_console_ends_with_its_guest_with_libvirt_and_with_the_right_to_it() {
    let mut desk = Desk::new();
    // The right is taken away: its seat is free at once for others.
    let mut cut = desk.sit_down(&desk.bob, &[]);
    let mut admin = desk.sit_down(&desk.admin, &[]);
    desk.own("-bob@XMAN.TEST");
    cut.wait_for(SOON, "denied");
    assert_eq!(cut.wait(SOON), FAILED);
    assert!(cut.echoes());
    admin.wait_for(SOON, "the keyboard is yours now");
    let refused = desk.console(&desk.bob, &["--force"]).run();
    refused.code(FAILED).complains("you may not see it");
    desk.host.audit().contains(&[
        "principal=\"bob@XMAN.TEST\"",
        "verb=\"console\"",
        "outcome=\"denied\"",
    ]);

    // Another program on the host has it.
    leaves(&mut admin);
    let virsh = || {
        let mut virsh = desk.libvirtd.cell().command("script");
        let line = "virsh -c qemu:///system console --force web";
        virsh.args(["-q", "-e", "-c", line, "/dev/null"]);
        virsh.stdin(std::process::Stdio::piped());
        let virsh = Process::start(virsh);
        virsh.stdout().wait_for(SOON, "Escape character");
        virsh
    };
    let mut other = virsh();
    let conflict = desk.console(&desk.admin, &[]).run();
    conflict
        .code(FAILED)
        .complains("another program on the host");
    let mut admin = desk.sit_down(&desk.admin, &["--force"]);
    admin.types("\r");
    admin.wait_for(SOON, "login: ");
    other.wait(SOON);
    let _other = virsh();
    // libvirtd forgets to say so while output is on its way to us; the next key brings it out.
    eventually("the end is told", SOON, || {
        admin.types("\r");
        let is_told = |said: &str| said.contains("was taken by another program").then_some(());
        admin.screen().find(Duration::from_secs(1), is_told)
    });
    assert_eq!(admin.wait(SOON), FAILED);

    // libvirtd is killed.
    let mut admin = desk.sit_down(&desk.admin, &["--force"]);
    desk.libvirtd.kill9();
    admin.wait_for(SOON, "the connection to libvirt broke");
    assert_eq!(admin.wait(SOON), FAILED);
    assert!(admin.echoes());
    desk.libvirtd.start();
    let again = || desk.console(&desk.admin, &[]).in_terminal();
    let mut admin = eventually("libvirt is found again", SOON, || {
        let terminal = again();
        let text = |said: &str| said.contains("connected to").then_some(());
        terminal.screen().find(SOON, text).map(|()| terminal)
    });

    // The guest ends.
    desk.libvirtd.virsh(&["destroy", "web"]).success();
    admin.wait_for(SOON, "the guest has ended");
    assert_eq!(admin.wait(SOON), 0);
    assert!(admin.echoes());
}

#[test]
fn signals_give_the_terminal_back_and_a_stop_lends_it() {
    let desk = Desk::new();
    for (signal, code) in [(Signal::TERM, 143), (Signal::HUP, 129), (Signal::INT, 130)] {
        let scratch = Scratch::new("signal");
        let (mut terminal, rxm, before, after) = in_a_shell(&desk, scratch.path());
        signal_pid(rxm, signal);
        assert_eq!(terminal.wait(SOON), code, "{}", terminal.screen().text());
        same(&before, &after);
    }
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    signal_pid(terminal.pid(), Signal::TSTP);
    let stat = format!("/proc/{}/stat", terminal.pid());
    eventually("it is stopped, and the terminal lent", SOON, || {
        let is_stopped = fs::read_to_string(&stat).unwrap().contains(") T ");
        (is_stopped && terminal.echoes()).then_some(())
    });
    signal_pid(terminal.pid(), Signal::CONT);
    wait_raw(&terminal);
    log_in(&mut terminal);
    leaves(&mut terminal);
}

#[test]
fn a_host_that_dies_leaves_the_terminal_as_it_was() {
    let mut desk = Desk::new();
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    desk.host.kill9();
    assert_eq!(terminal.wait(SOON), 3, "{}", terminal.screen().text());
    assert!(terminal.echoes());
    desk.host.start();
    desk.wait_known();
    // A host that stops says so.
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    desk.host.stop();
    terminal.wait_for(SOON, "xmand is stopping");
    assert_eq!(terminal.wait(SOON), FAILED);
}

#[test]
fn noise_passes_unchanged_both_ways_and_into_the_log() {
    let desk = Desk::new();
    let scratch = Scratch::new("log");
    let log = scratch.path().join("log");
    let link = scratch.path().join("link");
    symlink("log", &link).unwrap();
    let outcome = desk
        .console(&desk.bob, &["--log", link.to_str().unwrap()])
        .run();
    outcome.code(FAILED).complains("link");

    let mut piped = desk.pipe(&desk.bob, &["--log", log.to_str().unwrap()]);
    log_in_by_pipe(&mut piped);
    // Nothing between this line and ours changes a byte; then all 256, three times over.
    let noise: Vec<u8> = (0..=255).cycle().take(3 * 256).collect();
    piped.say("stty raw -echo; echo rea''dy; head -c 768 > /noise; stty sane; echo don''e; md5sum < /noise\r");
    piped.stdout().wait_for(SOON, "ready");
    piped.say(&noise);
    piped.stdout().wait_for(SOON, "done");
    let mut md5 = command("md5sum");
    md5.arg("-");
    let sum = run(md5, &noise, SOON).success().stdout();
    let (sum, _) = sum.split_once(' ').unwrap();
    piped.stdout().wait_for(SOON, sum);
    at_prompt(&piped);
    piped.say("stty raw; cat /noise; stty sane; echo en''d\r");
    piped.stdout().wait_for(SOON, "end");
    let shown = piped.stdout().bytes();
    assert!(
        shown.windows(noise.len()).any(|window| window == noise),
        "{}",
        String::from_utf8_lossy(&shown)
    );
    desk.libvirtd.virsh(&["destroy", "web"]).success();
    let ended = piped.wait(SOON).success();
    ended.complains("the guest has ended");
    let (kept, shown) = (fs::read(&log).unwrap(), piped.stdout().bytes());
    assert_eq!(kept, shown, "the log has what was shown");
    assert_eq!(
        fs::metadata(&log).unwrap().permissions().mode() & 0o777,
        0o600
    );
}

#[test]
fn what_is_piped_is_typed_or_refused_and_time_ends_it() {
    let desk = Desk::new();
    let call = desk.console(&desk.bob, &["--timeout", "15s"]);
    let outcome = call.stdin("\r").run().success();
    outcome.says("login: ").complains("left localhost");

    let holder = desk.sit_down(&desk.admin, &[]);
    let call = desk.console(&desk.bob, &[]).stdin("reboot -f\r");
    let outcome = call.run().code(FAILED);
    outcome.complains("root/admin@XMAN.TEST has the keyboard");
    let call = desk.console(&desk.bob, &["--timeout", "15s"]);
    call.run().success().complains("you read along");
    drop(holder);
}

/// A shell in a pipe that echoes nothing.
#[track_caller]
fn shell(desk: &Desk, who: &User) -> Process {
    let mut piped = desk.pipe(who, &[]);
    answers_by_pipe(&mut piped, "stty -echo\necho in-$((40 + 2))\n", "in-42");
    // A shell that echoes nothing edits no line, so it does not ask where the cursor is.
    let is_asked = |said: &str| said.ends_with("# ").then_some(());
    let asked = piped.stdout().find(SOON, is_asked);
    assert!(asked.is_some(), "{}", piped.stdout().text());
    piped
}

#[test]
fn a_paste_of_a_megabyte_arrives_whole_and_disturbs_nobody() {
    let desk = Desk::with_container();
    let mut piped = shell(&desk, &desk.bob);
    let paste: Vec<u8> = (b'a'..=b'z').cycle().take(1 << 20).collect();
    let mut md5 = command("md5sum");
    md5.arg("-");
    let sum = run(md5, &paste, SOON).success().stdout();
    let (sum, _) = sum.split_once(' ').unwrap();
    let before = desk.memory();
    // The guest takes it when it is told to; until then it waits in its place.
    piped.say(
        "stty raw; echo rea''dy; until [ -e /go ]; do sleep 0.1; done; head -c 1048576 | md5sum\n",
    );
    piped.stdout().wait_for(SOON, "ready");
    piped.say(&paste);
    desk.answers_others();
    fs::write(desk.container.as_ref().unwrap().root().join("go"), "").unwrap();
    piped.stdout().wait_for(SOON, sum);
    let grown = desk.memory().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
}

#[test]
fn a_guest_that_takes_nothing_keeps_nobody_and_the_escape_is_seen_behind_a_paste() {
    let desk = Desk::new();
    let before = desk.memory();
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    desk.libvirtd.virsh(&["suspend", "web"]).success();
    terminal.types(&"nobody takes this ".repeat((1 << 20) / 18));
    desk.answers_others();
    let began = Instant::now();
    leaves(&mut terminal);
    let took = began.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    // What libvirt still holds of it is in nobody's way.
    let mut again = desk.sit_down(&desk.bob, &[]);
    desk.libvirtd.virsh(&["resume", "web"]).success();
    // A part of the paste is a strange name.
    again.types("\r");
    again.wait_for(SOON, "Password: ");
    leaves(&mut again);
    let grown = desk.memory().saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
}

#[test]
fn a_guest_that_takes_nothing_for_long_is_given_up_with_a_word() {
    let desk = Desk::new();
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    desk.libvirtd.virsh(&["suspend", "web"]).success();
    terminal.types(&"nobody takes this ".repeat(10_000));
    let limit = 2 * SOON;
    terminal.wait_for(limit, "its guest took no input for half a minute");
    assert_eq!(terminal.wait(SOON), FAILED);
    assert!(terminal.echoes());
    let mut again = desk.sit_down(&desk.bob, &[]);
    desk.libvirtd.virsh(&["resume", "web"]).success();
    again.types("\r");
    again.wait_for(SOON, "Password: ");
    leaves(&mut again);
}

/// A command for a container's shell that writes this line until there is a file /stop.
fn flood(line: &str) -> String {
    format!("until [ -e /stop ]; do yes '{line}' | head -n 5000; done")
}

#[test]
fn the_escape_leaves_also_when_nobody_takes_what_is_shown() {
    let desk = Desk::with_container();
    let scratch = Scratch::new("held");
    let (words, before, after) = between_notes(&desk.console(&desk.bob, &[]), scratch.path());
    let script = "mkfifo \"$0/held\"; exec 3<> \"$0/held\"; bash \"$@\" >&3";
    let folder = scratch.path().as_os_str().to_owned();
    let words = ["-c".into(), script.into(), folder]
        .into_iter()
        .chain(words);
    let mut terminal = desk
        .bob
        .program_call(&[], &program("bash"), words.collect())
        .env("PATH", "/usr/bin:/bin")
        .in_terminal();
    terminal.wait_for(SOON, "connected to localhost");
    wait_raw(&terminal);
    terminal.types(&format!("echo flooding >> /said; {}\r", flood("y")));
    eventually("the flood begins", SOON, || {
        desk.said().contains("flooding").then_some(())
    });
    let began = Instant::now();
    leaves(&mut terminal);
    let took = began.elapsed();
    assert!(took < AT_ONCE, "{took:?}");
    same(&before, &after);
}

#[test]
fn a_flood_is_told_where_it_was_too_much_and_costs_neither_time_nor_memory() {
    let desk = Desk::with_container();
    let mut typist = shell(&desk, &desk.bob);
    // Who reads along and does not read: stopped, as behind a connection that is.
    let slow = desk.pipe(&desk.admin, &[]);
    let before = desk.memory();
    let line = "line after line after line after line after line after line after line";
    slow.signal(Signal::STOP);
    typist.say(format!("{}; echo flooded >> /said\n", flood(line)));
    // Lets who reads along read a little, since who takes nothing for 20 s is sent away.
    let breathe = || {
        let seen = slow.stdout().length();
        slow.signal(Signal::CONT);
        eventually("it reads on", SOON, || {
            (slow.stdout().length() > seen).then_some(())
        });
        slow.signal(Signal::STOP);
    };
    for words in [OTHERS; 3].iter().flatten() {
        desk.answers(words);
        breathe();
    }
    let mut most = desk.memory();
    eventually("what was too much is told, of a flood", 3 * SOON, || {
        slow.signal(Signal::STOP);
        // More than the kernel holds for it.
        let enough = typist.stdout().length() + (16 << 20);
        let until = Instant::now() + LOST;
        while Instant::now() < until && typist.stdout().length() < enough {
            thread::sleep(Duration::from_millis(50));
        }
        most = most.max(desk.memory());
        slow.signal(Signal::CONT);
        let is_told = |said: &str| said.contains("bytes are missing here").then_some(());
        slow.stderr().find(LOST, is_told)?;
        (typist.stdout().length() > 10 * 10_000 * line.len()).then_some(())
    });
    assert!(!desk.said().contains("flooded"), "that was while it lasted");
    fs::write(desk.container.as_ref().unwrap().root().join("stop"), "").unwrap();
    eventually("the flood ends", SOON, || {
        desk.said().contains("flooded").then_some(())
    });
    let grown = most.max(desk.memory()).saturating_sub(before);
    assert!(grown < 32 * 1024, "{grown} KiB more");
    // It is missing as well where there was still too much before it.
    eventually("both see the end", SOON, || {
        typist.say("echo flood-$((1 + 1))\n");
        let is_seen = |said: &str| {
            let mut tail = said.lines().rev().take(20);
            tail.any(|line| line.ends_with("flood-2")).then_some(())
        };
        slow.stdout().find(LOST, is_seen)?;
        typist.stdout().find(LOST, is_seen)
    });
    let (most, least) = (typist.stdout().length(), slow.stdout().length());
    assert!(least < most, "{least} of {most}");
}

#[test]
fn a_containers_console_is_as_any_other() {
    let desk = Desk::with_container();
    let mut bob = desk.sit_down(&desk.bob, &[]);
    answers(&mut bob, "bob");
    bob.wait_for(SOON, "bob-2");
    let mut admin = desk.sit_down(&desk.admin, &["--force"]);
    bob.wait_for(SOON, "root/admin@XMAN.TEST has the keyboard now");
    answers(&mut admin, "admin");
    bob.wait_for(SOON, "admin-2");
    leaves(&mut admin);
    bob.wait_for(SOON, "the keyboard is yours now");
    desk.libvirtd.virsh_on(LXC, &["destroy", "web"]).success();
    bob.wait_for(SOON, "the guest has ended");
    assert_eq!(bob.wait(SOON), 0);
    assert!(bob.echoes());
    let off = desk.console(&desk.bob, &[]).run().code(FAILED);
    off.complains("rxm start web");
}

#[test]
fn a_guest_inside_xmand_has_a_console_that_waits_for_nobody_either() {
    let realm = Realm::shared();
    let alice = realm.user("alice");
    let embed = Embed::new();
    let host = Host::builder()
        .k5login(["alice"])
        .uri(&embed.uri())
        .start(realm);
    let guest = Guest::with_login("inner");
    for words in [&["define", &guest.file()][..], &["start", "inner"]] {
        alice.rxm(&host, words).success();
    }
    guest.wait_until_up();
    let sit_down = || {
        let terminal = alice.rxm_call(&host, ["console", "inner"]).in_terminal();
        terminal.wait_for(SOON, "connected to localhost");
        wait_raw(&terminal);
        terminal
    };
    let mut terminal = sit_down();
    log_in(&mut terminal);
    alice.rxm(&host, ["pause", "inner"]).success();
    terminal.types(&"nobody takes this ".repeat(10_000));
    alice.rxm(&host, ["list"]).success().says("inner");
    leaves(&mut terminal);
    let mut again = sit_down();
    alice.rxm(&host, ["unpause", "inner"]).success();
    again.types("\x03");
    answers(&mut again, "again");
    alice.rxm(&host, ["destroy", "inner"]).success();
    again.wait_for(SOON, "the guest has ended");
    assert_eq!(again.wait(SOON), 0);
}

#[test]
fn coming_and_going_leaves_nothing_behind() {
    let desk = Desk::new();
    let visit = || {
        let mut terminal = desk.sit_down(&desk.bob, &[]);
        leaves(&mut terminal);
    };
    for _ in 0..3 {
        visit();
    }
    let (files, _) = desk.files_and_threads();
    for _ in 0..20 {
        visit();
    }
    eventually("no file is left open", SOON, || {
        (desk.files_and_threads().0 <= files + 2).then_some(())
    });
    let (_, threads) = desk.files_and_threads();
    assert!(threads < 64, "{threads} threads");
}

#[test]
fn a_libvirtd_that_hangs_keeps_its_consoles_and_nothing_else() {
    let desk = Desk::new();
    let mut terminal = desk.sit_down(&desk.bob, &[]);
    log_in(&mut terminal);
    desk.libvirtd.freeze();
    terminal.types("echo thawed-$((1 + 1))\r");
    let began = Instant::now();
    desk.admin.rxm(&desk.host, ["list"]).success().says("web");
    assert!(began.elapsed() < AT_ONCE);
    let mut other = desk.console(&desk.admin, &[]).in_terminal();
    other.wait_for(SOON, "bob@XMAN.TEST has the keyboard");
    wait_raw(&other);
    leaves(&mut other);
    desk.libvirtd.thaw();
    terminal.wait_for(SOON, "thawed-2");
    leaves(&mut terminal);
}
