//! The tab key knows domains, hosts and groups where they can be known, and says nothing where they cannot.

use std::{fmt::Write as _, fs, time::Duration};

use xman_tests::{
    Call, Host, Outcome, PATIENCE, Realm, Scratch, Signal, User, built, eventually, program,
    signal_pid,
};

/// A shell must not hang: what takes longer than a second in all is let go. Far less than a caller waits otherwise.
const AT_ONCE: Duration = Duration::from_secs(15);
/// Everything that a shell could take for something else.
const ODD: &str = r#"odd b's "$x" & (ü); `y`"#;

struct Site {
    alice: User,
    host: Host,
    scratch: Scratch,
}

impl Site {
    /// A host with domains of these names, all of which run.
    #[track_caller]
    fn of(realm: &Realm, names: &[&str]) -> Self {
        let scratch = Scratch::new("completion");
        let mut node = String::from("<node>");
        for (number, name) in names.iter().enumerate() {
            let name = name.replace('&', "&amp;").replace('<', "&lt;");
            write!(
                node,
                "<domain type='test'><name>{name}</name><uuid>6695eb01-f6a4-8304-79aa-97f2502e19{number:02}</uuid>\
                 <memory>65536</memory><vcpu>1</vcpu><os><type>hvm</type></os></domain>"
            )
            .unwrap();
        }
        let node = scratch.write("node.xml", node + "</node>");
        let host = Host::builder()
            .k5login(["alice"])
            .uri(&format!("test://{}", node.display()))
            .start(realm);
        let alice = realm.user("alice");
        eventually("the domains are known", PATIENCE, || {
            let listed = alice.rxm(&host, ["-o", "name", "list"]).stdout();
            (listed.lines().count() == names.len()).then_some(())
        });
        Self {
            alice,
            host,
            scratch,
        }
    }

    fn new() -> Self {
        Self::of(Realm::shared(), &["web-1", "web-2", "wiki", ODD])
    }

    /// What the words could become, as zsh asks.
    #[track_caller]
    fn asked(&self, words: &[&str]) -> Vec<String> {
        let outcome = asked(&self.alice, words)
            .env("XMAN_HOSTS", self.host.target())
            .run();
        lines(&silent(outcome))
    }

    /// As [`Site::asked`], where there is something. On a busy machine an answer may take longer than a shell waits, and nothing comes of it.
    #[track_caller]
    fn completed(&self, words: &[&str]) -> Vec<String> {
        eventually(&format!("{words:?} become something"), PATIENCE, || {
            Some(self.asked(words)).filter(|candidates| !candidates.is_empty())
        })
    }

    /// A shell with the script of `rxm completion`, for alice and her host.
    #[track_caller]
    fn shell(&self, shell: &str, options: &[&str]) -> Call {
        let folder = built("rxm").parent().unwrap().display().to_string();
        self.alice
            .program_call(
                &[],
                &program(shell),
                options.iter().map(Into::into).collect(),
            )
            .env("PATH", format!("{folder}:/usr/bin:/bin"))
            .env("LC_ALL", "C.UTF-8")
            .env("XMAN_HOSTS", self.host.target())
    }

    #[track_caller]
    fn script(&self, shell: &str, file: &str) -> String {
        let script = self.alice.rxm_alone(["completion", shell]).run().success();
        self.scratch
            .write(file, script.stdout())
            .display()
            .to_string()
    }
}

fn asked(person: &User, words: &[&str]) -> Call {
    person
        .rxm_alone([&["complete", "zsh", "rxm"][..], words].concat())
        .limit(AT_ONCE)
}

/// Whatever came of it, it is no error and nothing is said of one.
#[track_caller]
fn silent(outcome: Outcome) -> String {
    let outcome = outcome.success();
    assert_eq!(outcome.stderr(), "");
    outcome.stdout()
}

fn lines(text: &str) -> Vec<String> {
    text.lines().map(str::to_owned).collect()
}

#[test]
fn names_are_those_that_make_sense_and_that_one_may_see() {
    let site = Site::new();
    assert_eq!(
        site.completed(&["describe", "w"]),
        ["web-1", "web-2", "wiki"]
    );
    assert_eq!(site.completed(&["describe", ""]).len(), 4);
    assert_eq!(site.completed(&["describe", "wik"]), ["wiki"]);
    assert_eq!(site.completed(&["describe", "o"]), [ODD]);
    assert!(site.asked(&["describe", "w*"]).is_empty());
    site.alice.rxm(&site.host, ["pause", "web-1"]).success();
    assert_eq!(site.completed(&["unpause", ""]), ["web-1"]);
    assert_eq!(site.completed(&["pause", "web"]), ["web-2"]);
    assert!(site.asked(&["start", ""]).is_empty());
    assert_eq!(site.completed(&["can", "pause", "wi"]), ["wiki"]);
    assert!(
        site.completed(&["explain", "pau"])
            .contains(&"pause".to_owned())
    );
    let slashed = format!("{}/wi", site.host.target());
    assert_eq!(
        site.completed(&["describe", &slashed]),
        [format!("{slashed}ki")]
    );
    // The hosts that stand on the line count, and nobody else's.
    assert_eq!(
        site.completed(&["-H", &site.host.target(), "describe", "wi"]),
        ["wiki"]
    );
    assert!(
        site.asked(&["-H", "localhost:1", "describe", "wi"])
            .is_empty()
    );
    for words in [
        &["create", "w"][..],
        &["mem-set", "wiki", ""],
        &["--timeout", ""],
        &[""],
        &["describe", "-"],
    ] {
        assert!(site.asked(words).is_empty(), "{words:?}");
    }
    let stranger = Realm::shared().user("bob");
    let seen = asked(&stranger, &["describe", ""])
        .env("XMAN_HOSTS", site.host.target())
        .run();
    assert_eq!(silent(seen), "");
    let hypervisors = site.completed(&["--hypervisor", ""]);
    assert!(hypervisors.contains(&"test".to_owned()), "{hypervisors:?}");
}

#[test]
fn hosts_and_groups_come_from_the_configuration_without_any_ticket() {
    let realm = Realm::shared();
    let nobody = realm.user_without_ticket("alice");
    let folder = nobody.home().join(".config/xman");
    fs::create_dir_all(&folder).unwrap();
    let config =
        "hosts = '@grid'\n[groups]\ngrid = 'skirit[80-81],skurut68:7000'\ngrid-old = 'old[1-2]'\n";
    fs::write(folder.join("rxm.toml"), config).unwrap();
    let become_of = |words: &[&str]| lines(&silent(asked(&nobody, words).run()));
    assert_eq!(become_of(&["-H", "@"]), ["@grid", "@grid-old"]);
    assert_eq!(
        become_of(&["--hosts", "sk"]),
        ["skirit80", "skirit81", "skurut68:7000"]
    );
    assert_eq!(
        become_of(&["-H", "skirit80,ol"]),
        ["skirit80,old1", "skirit80,old2"]
    );
    assert_eq!(become_of(&["-H", "@grid!@grid-"]), ["@grid!@grid-old"]);
    assert_eq!(become_of(&["migrate", "web", "old"]), ["old1", "old2"]);
    assert!(become_of(&["-H", "skirit[80,"]).is_empty());
    fs::write(folder.join("rxm.toml"), "hosts = [").unwrap();
    assert!(become_of(&["-H", ""]).is_empty());
    assert!(become_of(&["describe", ""]).is_empty());
}

#[test]
fn without_ticket_kdc_or_host_there_is_silence_and_nobody_waits() {
    let site = Site::new();
    let realm = Realm::shared();
    for person in [
        realm.user_without_ticket("alice"),
        realm.user_with_expired_ticket("alice"),
    ] {
        let call = asked(&person, &["describe", ""]).env("XMAN_HOSTS", site.host.target());
        assert_eq!(silent(call.run()), "");
    }
    for hosts in [
        "localhost:1",
        "nowhere.invalid",
        "192.0.2.1",
        "192.0.2.[1-200]",
        "@none",
        "a b[",
        "",
    ] {
        let call = asked(&site.alice, &["describe", ""]).env("XMAN_HOSTS", hosts);
        assert_eq!(silent(call.run()), "", "{hosts}");
    }
    let alone = Realm::new();
    let lonely = Site::of(&alone, &["web"]);
    let carol = alone.user("alice");
    alone.stop_kdc();
    let call = asked(&carol, &["describe", ""]).env("XMAN_HOSTS", lonely.host.target());
    assert_eq!(silent(call.run()), "");
}

#[test]
fn a_silent_host_keeps_nobody_waiting_and_hides_no_other() {
    let (site, other) = (Site::new(), Site::of(Realm::shared(), &["wanda", "wiki"]));
    signal_pid(site.host.pid(), Signal::STOP);
    let alone = asked(&site.alice, &["describe", "w"]).env("XMAN_HOSTS", site.host.target());
    let alone = silent(alone.run());
    let both = format!("{},{}", site.host.target(), other.host.target());
    let both_become = |word: &str, is_all: &dyn Fn(&str) -> bool| {
        eventually(&format!("all of {word:?}"), PATIENCE, || {
            let call = asked(&site.alice, &["describe", word]).env("XMAN_HOSTS", &both);
            Some(silent(call.run())).filter(|all| is_all(all))
        })
    };
    let with = both_become("w", &|all| !all.is_empty());
    signal_pid(site.host.pid(), Signal::CONT);
    assert_eq!(alone, "");
    assert_eq!(lines(&with), ["wanda", "wiki"]);
    // What two hosts have is told apart.
    let wiki = both_become("wi", &|all| !all.is_empty());
    assert_eq!(lines(&wiki), ["wiki"]);
    both_become("", &|all| {
        [site.host.target(), other.host.target()]
            .iter()
            .all(|target| all.contains(&format!("{target}/wiki\n")))
    });
}

/// Types a piece of a command and the tab key in an interactive shell, which then runs what it has made of it.
#[track_caller]
fn types(site: &Site, shell: &str, options: &[&str], prepare: &str, pieces: &[(&str, &str)]) {
    let mut terminal = site.shell(shell, options).in_terminal();
    terminal.types(&format!("{prepare}; PS1='REA''DY> '\r"));
    terminal.wait_for(PATIENCE, "READY> ");
    for (number, (piece, shown)) in pieces.iter().enumerate() {
        let done = format!("done-{number}");
        let mut attempts = 0..;
        // What takes too long on a busy machine is let go of, and the words stay as they were.
        eventually(&format!("{piece} is completed"), PATIENCE, || {
            let tried = format!("{number}-{}", attempts.next()?);
            terminal.types(&format!("{piece}\t"));
            terminal.types(&format!(" && echo do''ne-{number}; echo tri''ed-{tried}\r"));
            let tried = format!("tried-{tried}");
            let is_over = |said: &str| said.contains(&tried).then_some(said.contains(&done));
            let is_done = terminal.screen().find(AT_ONCE, is_over);
            if is_done != Some(true) {
                // A quotation mark may still be open.
                terminal.types("\x03");
            }
            is_done?.then_some(())
        });
        terminal.wait_for(PATIENCE, shown);
    }
}

const UUID_OF_ODD: &str = "6695eb01-f6a4-8304-79aa-97f2502e1903";
const UUID_OF_WIKI: &str = "6695eb01-f6a4-8304-79aa-97f2502e1902";

#[test]
fn bash_completes_names_and_quotes_them_as_the_word_has_begun() {
    let site = Site::new();
    let script = site.script("bash", "rxm");
    let slashed = format!("rxm describe {}/wi", site.host.target());
    let pieces = [
        ("rxm describe odd", UUID_OF_ODD),
        ("rxm describe odd\\ b", UUID_OF_ODD),
        ("rxm describe 'odd b", UUID_OF_ODD),
        ("rxm describe \"odd b", UUID_OF_ODD),
        ("rxm -o json describe wi", UUID_OF_WIKI),
        (&slashed, UUID_OF_WIKI),
    ];
    for (piece, shown) in pieces {
        types(
            &site,
            "bash",
            &["--norc", "--noprofile", "-i"],
            &format!("source {script}"),
            &[(piece, shown)],
        );
    }
}

#[test]
fn zsh_completes_names_and_quotes_them() {
    let site = Site::new();
    site.script("zsh", "functions/_rxm");
    let functions = site.scratch.path().join("functions");
    let dump = site.scratch.path().join("dump");
    let loads = format!(
        "fpath=({} $fpath); autoload -Uz compinit; compinit -u -d {}",
        functions.display(),
        dump.display()
    );
    let slashed = format!("rxm describe {}/wi", site.host.target());
    for (piece, shown) in [
        ("rxm describe odd", UUID_OF_ODD),
        ("rxm describe odd\\ b", UUID_OF_ODD),
        ("rxm describe 'odd b", UUID_OF_ODD),
        ("rxm -o json describe wi", UUID_OF_WIKI),
        ("rxm -o json explain describe wi", "\"domain\": \"wiki\""),
        (&slashed, UUID_OF_WIKI),
    ] {
        types(&site, "zsh", &["-f", "-i"], &loads, &[(piece, shown)]);
    }
}

#[test]
fn fish_completes_names_and_offers_no_files_in_their_place() {
    let site = Site::new();
    let script = site.script("fish", "rxm.fish");
    let folder = site.scratch.path().join("here");
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("wfile"), "").unwrap();
    let ask = |line: &str| {
        let words = format!(
            "cd {}; source {script}; complete -C \"{line}\"",
            folder.display()
        );
        let outcome = site
            .shell("fish", &["-N", "-c", &words])
            .limit(PATIENCE)
            .run()
            .success();
        assert_eq!(outcome.stderr(), "");
        let mut offered: Vec<_> = outcome
            .stdout()
            .lines()
            .map(|line| line.split('\t').next().unwrap_or_default().to_owned())
            .collect();
        offered.sort();
        offered
    };
    let offered = |line: &str| {
        eventually(&format!("{line} becomes something"), PATIENCE, || {
            Some(ask(line)).filter(|offered| !offered.is_empty())
        })
    };
    assert_eq!(offered("rxm describe w"), ["web-1", "web-2", "wiki"]);
    assert_eq!(offered("rxm describe od"), [ODD]);
    assert_eq!(offered("rxm -H local"), [site.host.target()]);
    assert_eq!(offered("rxm create w"), ["wfile"]);
}
