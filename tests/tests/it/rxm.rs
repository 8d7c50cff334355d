//! `rxm` as people and scripts meet it: many hosts, formats, exit codes, patience, questions, help and completion.

use std::{
    collections::BTreeSet,
    fs, io,
    net::TcpListener,
    path::Path,
    process::Stdio,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use serde_json::Value;
use xman_tests::{
    Call, Host, HostBuilder, PATIENCE, Process, Reach, Realm, Scratch, Signal, Terminal, User,
    built, command, eventually, program, run,
};

/// Nothing listens there, and nothing in the lab ever will.
const NOBODY: &str = "localhost:1";
/// The domain that every `test:///default` has.
const TEST: &str = "6695eb01-f6a4-8304-79aa-97f2502e193f";
const SOON: Duration = PATIENCE;

fn builder() -> HostBuilder {
    Host::builder().k5login(["alice"]).uri("test:///default")
}

fn host() -> Host {
    builder().start(Realm::shared())
}

fn alice() -> User {
    Realm::shared().user("alice")
}

/// A host that takes connections and says nothing.
fn mute() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let target = format!("localhost:{}", listener.local_addr().unwrap().port());
    (listener, target)
}

#[track_caller]
fn state(alice: &User, host: &Host, name: &str) -> String {
    let listed = alice.rxm(host, ["-o", "json", "list", name]).success();
    listed.json()[0]["state"].as_str().unwrap().to_owned()
}

fn first_words(text: &str) -> Vec<&str> {
    text.lines()
        .filter_map(|line| line.split_whitespace().next())
        .collect()
}

/// A call on a terminal of so many columns.
fn in_columns(
    alice: &User,
    hosts: &(impl Reach + ?Sized),
    words: &[&str],
    columns: u16,
) -> Terminal {
    let script = format!(
        "{} cols {columns} && exec \"$@\"",
        program("stty").display()
    );
    shell_call(alice, &script, hosts, words).in_terminal()
}

/// A shell script whose arguments are a call of rxm.
fn shell_call(alice: &User, script: &str, hosts: &(impl Reach + ?Sized), words: &[&str]) -> Call {
    let mut args: Vec<_> = ["-c", script, "bash"].map(Into::into).to_vec();
    args.push(built("rxm").into());
    args.extend(["-H".into(), hosts.nodes().into()]);
    args.extend(words.iter().map(Into::into));
    alice
        .program_call(&[], &program("bash"), args)
        .env("PATH", "/usr/bin:/bin")
}

/// What a call shows on a terminal until it ends.
#[track_caller]
fn screen(mut terminal: Terminal) -> String {
    assert_eq!(terminal.wait(SOON), 0, "{}", terminal.screen().text());
    terminal.screen().text()
}

#[test]
fn several_hosts_are_listed_with_their_names_in_the_order_in_which_they_were_named() {
    let (alice, a, b) = (alice(), host(), host());
    for hosts in [[&a, &b], [&b, &a], [&a, &b]] {
        let table = alice.rxm(&hosts, ["list"]).success().stdout();
        let [first, second] = hosts.map(Host::target);
        assert_eq!(first_words(&table), ["HOST", &first, &second], "{table}");
        let json = alice.rxm(&hosts, ["-o", "json", "list"]).success().json();
        assert_eq!(json[0]["host"], first.as_str(), "{json}");
        assert_eq!(json[1]["host"], second.as_str(), "{json}");
        let names = alice.rxm(&hosts, ["-o", "name", "list"]).success().stdout();
        assert_eq!(names, format!("{first}/test\n{second}/test\n"));
    }
    let alone = alice.rxm(&a, ["list"]).success().stdout();
    assert_eq!(first_words(&alone), ["NAME", "test"], "{alone}");
    let bare = alice.rxm(&a, ["--no-headers", "list"]).success().stdout();
    assert_eq!(first_words(&bare), ["test"], "{bare}");
}

#[test]
fn an_unreachable_host_is_a_row_and_an_object_and_the_others_are_listed() {
    let (alice, host) = (alice(), host());
    let hosts = format!("{NOBODY},{}", host.target());
    let list = |format: &str| alice.rxm(hosts.as_str(), ["--retries", "1", "-o", format, "list"]);
    let table = list("table")
        .code(5)
        .complains(&format!("rxm: {NOBODY}: unreachable"));
    let rows: Vec<_> = table.stdout().lines().skip(1).map(str::to_owned).collect();
    assert!(
        rows[0].starts_with(NOBODY) && rows[0].contains("unreachable"),
        "{table}"
    );
    assert!(
        rows[1].starts_with(&host.target()) && rows[1].contains("running"),
        "{table}"
    );

    let json = list("json").code(5).json();
    let silent = json[0].as_object().unwrap();
    assert_eq!(silent.len(), 2, "{json}");
    assert_eq!(silent["host"], NOBODY);
    assert_eq!(silent["error"]["code"], "unreachable");
    assert!(
        silent["error"]["message"]
            .as_str()
            .unwrap()
            .contains("refused"),
        "{json}"
    );
    assert_eq!(json[1]["name"], "test");

    let all = format!("{NOBODY},localhost:2");
    let json = alice
        .rxm(all.as_str(), ["--retries", "1", "-o", "json", "list"])
        .code(3)
        .json();
    assert_eq!(json.as_array().unwrap().len(), 2, "{json}");
}

#[test]
fn a_host_that_says_nothing_costs_no_more_than_the_timeout() {
    let (alice, host) = (alice(), host());
    let (_listener, silent) = mute();
    let hosts = format!("{silent},{}", host.target());
    alice.fetch_ticket("xman@localhost");
    let began = Instant::now();
    let outcome = alice
        .rxm(hosts.as_str(), ["--timeout", "8s", "-o", "json", "list"])
        .code(5);
    let took = began.elapsed();
    assert!(
        took >= Duration::from_secs(8) && took < Duration::from_secs(16),
        "{took:?}"
    );
    let json = outcome.json();
    assert_eq!(json[0]["error"]["code"], "timeout", "{json}");
    assert_eq!(json[1]["name"], "test", "{json}");
    alice
        .rxm(silent.as_str(), ["--timeout", "1s", "list"])
        .code(3)
        .complains("--timeout");
}

#[test]
fn a_host_that_says_nothing_delays_no_other() {
    let (alice, host) = (alice(), host());
    let (_listener, silent) = mute();
    let domains = [
        format!("{silent}/{TEST}"),
        format!("{}/{TEST}", host.target()),
    ];
    let mut pause = alice
        .rxm_alone(
            ["--timeout", "5m", "pause"]
                .iter()
                .map(ToString::to_string)
                .chain(domains),
        )
        .spawn();
    eventually("the other is paused", SOON, || {
        (state(&alice, &host, "test") == "paused").then_some(())
    });
    assert!(pause.is_running(), "it waits for the silent one still");
    pause.signal(Signal::INT);
    pause.wait(SOON).code(130);
}

#[test]
fn node_sets_groups_configuration_and_environment_name_hosts() {
    // To the KDC of all other tests these names are unknown.
    let realm = Realm::new();
    let alice = realm.user("alice");
    let names: Vec<_> = (1..=3).map(|n| format!("xman/127.0.0.{n}")).collect();
    let services: Vec<_> = names.iter().map(String::as_str).collect();
    let host = builder()
        .services(&services)
        .config_extra("listen = ['0.0.0.0:0']")
        .start(&realm);
    let port = host.addr().port();
    let named = |call: Call, expected: &[u8]| {
        let listed = call.run().success().stdout();
        let expected: String = expected
            .iter()
            .map(|n| match expected {
                [_] => "test\n".to_owned(),
                _ => format!("127.0.0.{n}:{port}/test\n"),
            })
            .collect();
        assert_eq!(listed, expected);
    };
    let list = ["-o", "name", "list"];
    let set = format!("127.0.0.[1-3]:{port}");
    named(alice.rxm_call(set.as_str(), list), &[1, 2, 3]);
    named(
        alice.rxm_call(format!("127.0.0.[3,1]:{port}").as_str(), list),
        &[3, 1],
    );
    named(alice.rxm_alone(list).env("XMAN_HOSTS", &set), &[1, 2, 3]);

    let folder = alice.home().join(".config/xman");
    fs::create_dir_all(&folder).unwrap();
    let config =
        format!("hosts = '@two'\n[groups]\nall = '{set}'\ntwo = ['@all!127.0.0.2:{port}']\n");
    fs::write(folder.join("rxm.toml"), &config).unwrap();
    named(alice.rxm_alone(list), &[1, 3]);
    named(alice.rxm_call("@all!@two", list), &[2]);
    // No [domain_realm] line names these hosts: their KDC says whose realm they are in.
    let whoami = alice.rxm(set.as_str(), ["-o", "json", "whoami"]).success();
    assert_eq!(whoami.json()[2]["service"], "xman/127.0.0.3", "{whoami}");
}

#[test]
fn a_configuration_that_is_wrong_is_refused_and_none_at_all_teaches() {
    let alice = alice();
    let none = alice.rxm_alone(["list"]).run().code(2);
    for lesson in ["-H", "XMAN_HOSTS", "rxm.toml"] {
        assert!(none.stderr().contains(lesson), "{none}");
    }
    let folder = alice.home().join(".config/xman");
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("rxm.toml"), "host = 'localhost'\n").unwrap();
    let wrong = alice
        .rxm_alone(["list"])
        .run()
        .code(2)
        .complains("rxm.toml");
    assert!(
        wrong.stderr().contains("`host`") && wrong.stderr().contains("hosts"),
        "{wrong}"
    );
    alice.rxm(NOBODY, ["list"]).code(2);

    fs::write(folder.join("rxm.toml"), "hosts = '@nobody'\n").unwrap();
    alice.rxm_alone(["list"]).run().code(2).complains("@nobody");
    alice.rxm("a[1-", ["list"]).code(2).complains("bracket");
}

#[test]
fn a_bare_name_that_two_hosts_have_changes_nothing() {
    let (alice, a, b) = (alice(), host(), host());
    let refused = alice.rxm(&[&a, &b], ["pause", "test"]).code(1);
    for host in [&a, &b] {
        assert!(
            refused
                .stderr()
                .contains(&format!("{}/test", host.target())),
            "{refused}"
        );
        assert_eq!(state(&alice, host, "test"), "running");
    }
    let second = format!("{}/test", b.target());
    alice.rxm(&[&a, &b], ["pause", &second]).success();
    assert_eq!(state(&alice, &a, "test"), "running");
    assert_eq!(state(&alice, &b, "test"), "paused");
}

#[test]
fn a_bare_name_is_not_guessed_while_a_host_is_silent() {
    let (alice, host) = (alice(), host());
    let hosts = format!("{},{NOBODY}", host.target());
    let label = format!("{}/test", host.target());
    let outcome = alice.rxm(hosts.as_str(), ["--retries", "1", "pause", "test"]);
    let refused = outcome.code(3).complains("nothing was changed");
    assert!(
        refused.stderr().contains(NOBODY) && refused.stderr().contains(&label),
        "{refused}"
    );
    assert_eq!(state(&alice, &host, "test"), "running");
    alice.rxm(hosts.as_str(), ["pause", &label]).success();
    assert_eq!(state(&alice, &host, "test"), "paused");
}

#[test]
fn json_is_one_array_of_the_documented_fields_and_yaml_says_the_same() {
    let (alice, a, b) = (alice(), host(), host());
    let help = alice.rxm_alone(["help", "list"]).run().success().stdout();
    let (_, documented) = help.split_once("JSON:").expect("help tells the fields");
    let documented: BTreeSet<_> = documented
        .split(['.', ','])
        .filter_map(|field| field.split_whitespace().next())
        .collect();
    let json = alice
        .rxm(&[&a, &b], ["-o", "json", "list"])
        .success()
        .json();
    let rows = json.as_array().unwrap();
    assert_eq!(rows.len(), 2);
    for row in rows {
        let fields: BTreeSet<_> = row
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect();
        assert_eq!(fields, documented);
        assert_eq!(
            (&row["name"], &row["uuid"]),
            (&Value::from("test"), &Value::from(TEST))
        );
        assert!(
            row["memory_kib"].is_u64() && row["stale"].is_boolean(),
            "{row}"
        );
    }
    let yaml = alice
        .rxm(&[&a, &b], ["-o", "yaml", "list"])
        .success()
        .stdout();
    assert_eq!(yaml.matches("\n  name: test\n").count(), 2, "{yaml}");
    assert_eq!(
        yaml.lines().filter(|line| line.starts_with("- ")).count(),
        2,
        "{yaml}"
    );
    for field in documented.iter().filter(|field| **field != "host") {
        assert_eq!(
            yaml.matches(&format!("\n  {field}: ")).count(),
            2,
            "{field}: {yaml}"
        );
    }
    for stable in ["memory_kib", "max_vcpus"] {
        assert!(
            yaml.contains(&format!("  {stable}: {}\n", rows[0][stable])),
            "{yaml}"
        );
    }
    let wide = alice.rxm(&a, ["-o", "wide", "list"]).success().stdout();
    assert!(
        wide.contains(TEST) && wide.contains("test:///default"),
        "{wide}"
    );

    let changed = alice
        .rxm(&a, ["-o", "json", "pause", "test"])
        .success()
        .json();
    assert_eq!(
        (&changed[0]["verb"], &changed[0]["state"]),
        (&"pause".into(), &"paused".into())
    );
    assert_eq!(
        alice.rxm(&a, ["-q", "unpause", "test"]).success().stdout(),
        ""
    );
    let named = alice
        .rxm(&a, ["-o", "name", "pause", "test"])
        .success()
        .stdout();
    assert_eq!(named, "test\n");
}

#[test]
fn colours_are_for_terminals_and_for_whom_asks_for_them() {
    let (alice, host) = (alice(), host());
    let on_terminal = |words: &[&str], no_color: bool| {
        let mut call = alice.rxm_call(&host, words);
        if no_color {
            call = call.env("NO_COLOR", "1");
        }
        screen(call.in_terminal())
    };
    let plain = |shown: &str| !shown.contains('\x1b') && shown.contains("running");
    let colored = |shown: &str| shown.contains("\x1b[") && shown.contains("running");
    assert!(colored(&on_terminal(&["list"], false)));
    assert!(plain(&on_terminal(&["list"], true)));
    assert!(colored(&on_terminal(&["--color", "always", "list"], true)));
    assert!(plain(&on_terminal(&["--color", "never", "list"], false)));
    assert!(plain(&on_terminal(&["-o", "json", "list"], false)));
    assert!(plain(&alice.rxm(&host, ["list"]).success().stdout()));
    assert!(plain(
        &alice.rxm(&host, ["-o", "wide", "list"]).success().stdout()
    ));
    assert!(colored(
        &alice
            .rxm(&host, ["--color", "always", "list"])
            .success()
            .stdout()
    ));
    for help in [
        &["help"][..],
        &["help", "list"],
        &["list", "-h"],
        &["nonsense"],
    ] {
        let said = alice.rxm_alone(help).run();
        assert!(!said.to_string().contains('\x1b'), "{said}");
    }
}

#[test]
fn a_table_fits_a_narrow_terminal() {
    let (alice, host) = (alice(), host());
    for (hosts, words, columns) in [
        (host.target(), vec!["list"], 60),
        (
            format!("{},{NOBODY}", host.target()),
            vec!["--retries", "1", "list"],
            80,
        ),
        (host.target(), vec!["info"], 60),
        (host.target(), vec!["whoami"], 60),
    ] {
        let mut terminal = in_columns(&alice, hosts.as_str(), &words, columns);
        terminal.wait(SOON);
        let shown = terminal.screen().text();
        assert!(shown.lines().count() >= 2, "{shown}");
        for line in shown.lines().filter(|line| !line.starts_with("rxm: ")) {
            let plain = without_colour(line);
            let width = plain.trim_end().chars().count();
            assert!(
                width <= usize::from(columns),
                "{width} columns: {plain}\n{shown}"
            );
        }
    }
    let wide = alice.rxm(&host, ["-o", "wide", "list"]).success().stdout();
    assert_eq!(wide.lines().count(), 2, "a pipe has no width: {wide}");
}

/// Colours begin with ESC [ and end with m.
fn without_colour(line: &str) -> String {
    let mut parts = line.split("\x1b[");
    let mut plain = parts.next().unwrap_or_default().to_owned();
    parts.for_each(|part| plain.push_str(part.split_once('m').map_or(part, |(_, rest)| rest)));
    plain
}

#[test]
fn what_a_host_sends_commands_no_terminal() {
    let (alice, host) = (alice(), host());
    let nasty = "<description>a\u{9b}2Jb\u{202e}c</description>";
    let xml = test_domain("nasty").replace("<os>", &format!("{nasty}<os>"));
    alice
        .rxm_call(&host, ["define", "-"])
        .stdin(&xml)
        .run()
        .success();
    let piped = alice.rxm(&host, ["describe", "nasty"]).success().stdout();
    assert!(
        piped.contains("a\u{9b}2Jb\u{202e}c"),
        "programs get it as it is: {piped}"
    );
    for format in ["table", "json", "yaml"] {
        let words = ["-o", format, "describe", "nasty"];
        let shown = screen(alice.rxm_call(&host, words).in_terminal());
        assert!(shown.contains("u{9b}2Jb"), "{format}: {shown}");
        assert!(
            !shown.contains(['\u{9b}', '\u{202e}', '\x1b']),
            "{format}: {shown}"
        );
    }
}

#[test]
fn exit_codes_tell_scripts_what_to_do() {
    let (alice, host) = (alice(), host());
    let both = format!("{},{NOBODY}", host.target());
    alice.rxm(&host, ["list"]).code(0);
    alice
        .rxm(&host, ["pause", "nonesuch"])
        .code(1)
        .complains("nonesuch");
    alice
        .rxm(&host, ["list", "--nonesuch"])
        .code(2)
        .complains("--nonesuch");
    alice
        .rxm(NOBODY, ["--retries", "1", "list"])
        .code(3)
        .complains("xmand");
    let nobody = Realm::shared().user_without_ticket("nobody");
    nobody.rxm(&host, ["list"]).code(4).complains("kinit");
    alice.rxm(both.as_str(), ["--retries", "1", "list"]).code(5);
    let mallory = Realm::shared().user("mallory");
    mallory.rxm(&host, ["pause", "test"]).denied();
}

#[test]
fn a_host_that_comes_up_while_it_is_tried_is_served() {
    let (alice, mut host) = (alice(), host());
    host.stop();
    let stand_in = TcpListener::bind(host.addr()).unwrap();
    let mut list = alice
        .rxm_call(&host, ["--timeout", "30s", "--retries", "50", "list"])
        .spawn();
    // It has been there, and was sent away.
    drop(stand_in.accept().unwrap());
    drop(stand_in);
    host.start();
    list.wait(SOON).success().says("running");
}

#[test]
fn a_host_is_tried_as_often_as_asked_for_and_no_more() {
    let alice = alice();
    for tries in [1, 3] {
        let (listener, target) = mute();
        let count = Arc::new(AtomicUsize::new(0));
        let counter = Arc::clone(&count);
        thread::spawn(move || {
            for caller in listener.incoming() {
                counter.fetch_add(1, Ordering::SeqCst);
                drop(caller);
            }
        });
        let retries = tries.to_string();
        alice
            .rxm(target.as_str(), ["--retries", &retries, "list"])
            .code(3);
        assert_eq!(count.load(Ordering::SeqCst), tries);
    }
}

fn test_domain(name: &str) -> String {
    let memory = "<memory>8192</memory><os><type>hvm</type></os>";
    format!("<domain type='test'><name>{name}</name>{memory}</domain>")
}

#[test]
fn a_pattern_on_a_terminal_asks_before_it_changes_several_domains() {
    let (alice, host) = (alice(), host());
    for name in ["grid-1", "grid-2", "other"] {
        let define = alice.rxm_call(&host, ["define", "-"]);
        define.stdin(test_domain(name)).run().success();
    }
    let states = || ["grid-1", "grid-2", "other"].map(|name| state(&alice, &host, name));
    let answer = |keys: &str| {
        let mut terminal = alice.rxm_call(&host, ["start", "grid-*"]).in_terminal();
        terminal.wait_for(SOON, "[y/N]");
        let question = terminal.screen().text();
        assert!(
            question.contains("grid-1") && question.contains("grid-2"),
            "{question}"
        );
        assert!(!question.contains("other"), "{question}");
        terminal.types(keys);
        terminal.wait(SOON)
    };
    assert_eq!(answer("n\r"), 1);
    assert_eq!(answer("\r"), 1);
    assert_eq!(answer("\x03"), 130);
    assert_eq!(states(), ["off", "off", "off"]);
    alice
        .rxm(&host, ["start", "grid-*"])
        .code(2)
        .complains("--yes");
    assert_eq!(states(), ["off", "off", "off"]);
    assert_eq!(answer("y\r"), 0);
    assert_eq!(states(), ["running", "running", "off"]);
    // One domain is no reason to ask.
    let mut one = alice.rxm_call(&host, ["start", "oth*"]).in_terminal();
    assert_eq!(one.wait(SOON), 0);
    assert_eq!(states(), ["running", "running", "running"]);
}

#[test]
fn whoami_tells_who_one_is_and_what_one_may() {
    let (alice, host) = (alice(), host());
    alice
        .rxm(&host, ["whoami"])
        .success()
        .says(alice.principal());
    let json = alice.rxm(&host, ["-o", "json", "whoami"]).success().json();
    assert_eq!(json[0]["principal"], alice.principal(), "{json}");
    assert!(json[0].to_string().contains("\"destroy\""), "{json}");
    let mallory = Realm::shared().user("mallory");
    mallory
        .rxm(&host, ["whoami"])
        .code(1)
        .complains(mallory.principal());
}

#[test]
fn help_needs_neither_ticket_nor_host() {
    let nobody = Realm::shared().user_without_ticket("nobody");
    let said = |words: &[&str]| nobody.rxm_alone(words).run().success().stdout();
    let version = said(&["--version"]);
    assert!(
        version.starts_with("rxm ") && version.contains('.'),
        "{version}"
    );
    let help = said(&["help"]);
    for verb in "list create destroy reboot shutdown pause unpause mem-set vcpu-set describe migrate dmesg info".split(' ') {
        assert!(help.contains(&format!("\n  {verb}")), "{verb}: {help}");
        let page = said(&["help", verb]);
        assert!(page.contains("Examples:") && page.contains(&format!("rxm {verb}")) || page.contains(verb), "{page}");
        assert_eq!(page, said(&[verb, "--help"]));
    }
    assert!(help.contains("Exit codes:"), "{help}");
    let bare = nobody.rxm_alone::<&str>([]).run().code(2);
    assert!(bare.stderr().contains("Usage:"), "{bare}");
    nobody.rxm_alone(["lst"]).run().code(2).complains("list");
}

/// What `rxm completion` says for a shell, in a file.
fn completion(scratch: &Scratch, shell: &str, file: &str) -> String {
    let script = alice()
        .rxm_alone(["completion", shell])
        .run()
        .success()
        .stdout();
    scratch.write(file, script).display().to_string()
}

/// Completes `rxm li` in an interactive shell, which then runs what it has made of it.
#[track_caller]
fn completes_list(shell: &str, options: &[&str], prepare: &str) {
    let folder = built("rxm").parent().unwrap().display().to_string();
    let words = options.iter().map(Into::into).collect();
    let mut terminal = alice()
        .program_call(&[], &program(shell), words)
        .env("PATH", format!("{folder}:/usr/bin:/bin"))
        .env("LC_ALL", "C.UTF-8")
        .in_terminal();
    terminal.types(&format!("{prepare}; PS1='REA''DY> '\r"));
    terminal.wait_for(SOON, "READY> ");
    terminal.types("rxm li\t");
    terminal.types("\r");
    // Nobody names a host here, and only the command `list` says so.
    terminal.wait_for(SOON, "no host is named");
}

#[test]
fn bash_completes_commands() {
    let scratch = Scratch::new("bash");
    let script = completion(&scratch, "bash", "rxm");
    let loads = format!("source {script} && complete -p rxm");
    let mut bash = command("bash");
    bash.args(["--norc", "--noprofile", "-c", &loads]);
    let loaded = run(bash, b"", SOON).success().says("-F _rxm rxm");
    assert_eq!(loaded.stderr(), "");
    completes_list(
        "bash",
        &["--norc", "--noprofile", "-i"],
        &format!("source {script}"),
    );
}

#[test]
fn zsh_completes_commands() {
    let scratch = Scratch::new("zsh");
    completion(&scratch, "zsh", "functions/_rxm");
    let functions = scratch.path().join("functions");
    let dump = scratch.path().join("dump");
    let (functions, dump) = (functions.display(), dump.display());
    let loads = format!("fpath=({functions} $fpath); autoload -Uz compinit; compinit -u -d {dump}");
    let mut zsh = command("zsh");
    zsh.args([
        "-f",
        "-c",
        &format!("{loads}; print -r -- $_comps[rxm]; autoload +X _rxm"),
    ]);
    let loaded = run(zsh, b"", SOON).success();
    assert_eq!(
        (loaded.stdout().as_str(), loaded.stderr().as_str()),
        ("_rxm\n", "")
    );
    completes_list("zsh", &["-f", "-i"], &loads);
}

#[test]
fn fish_completes_commands() {
    let scratch = Scratch::new("fish");
    let script = completion(&scratch, "fish", "rxm.fish");
    let folder = built("rxm").parent().unwrap().display().to_string();
    let mut fish = command("fish");
    fish.env("HOME", scratch.path())
        .env("PATH", format!("{folder}:/usr/bin:/bin"))
        .args([
            "-N",
            "-c",
            &format!("source {script}; complete -C 'rxm li'; complete -C 'rxm list -o j'"),
        ]);
    let offered = run(fish, b"", SOON).success().stdout();
    assert_eq!(first_words(&offered), ["list", "json"], "{offered}");
}

/// Every page of a folder is read by man without a word of complaint.
#[track_caller]
pub(crate) fn man_reads(folder: &Path) -> usize {
    let mut pages = 0;
    for page in fs::read_dir(folder).unwrap() {
        let page = page.unwrap().path();
        let mut man = command("man");
        man.args(["--warnings", "-E", "UTF-8", "-l"]).arg(&page);
        let read = run(man, b"", SOON).success();
        assert_eq!(read.stderr(), "", "{}", page.display());
        assert!(read.stdout().contains("NAME"), "{}: {read}", page.display());
        pages += 1;
    }
    pages
}

#[test]
fn every_command_has_a_man_page_that_man_can_read() {
    let scratch = Scratch::new("man");
    let folder = scratch.path().join("man1");
    alice()
        .rxm_alone(["man".as_ref(), folder.as_os_str()])
        .run()
        .success();
    let commands = Verbs::of_help();
    for verb in &commands.0 {
        let page = folder.join(format!("rxm-{verb}.1"));
        assert!(page.is_file(), "{}", page.display());
    }
    assert!(man_reads(&folder) > commands.0.len());
}

/// The commands that `rxm help` lists.
struct Verbs(Vec<String>);

impl Verbs {
    fn of_help() -> Self {
        let help = alice().rxm_alone(["-h"]).run().success().stdout();
        let commands = help.lines().skip_while(|line| *line != "Commands:").skip(1);
        let listed = commands.take_while(|line| line.starts_with("  "));
        let names = listed.filter_map(|line| line.split_whitespace().next());
        Self(
            names
                .filter(|name| *name != "help")
                .map(str::to_owned)
                .collect(),
        )
    }
}

#[test]
fn whoever_closes_the_pipe_has_seen_enough() {
    let (alice, host) = (alice(), host());
    for words in [
        &["list"][..],
        &["-o", "json", "list"],
        &["describe", "test"],
        &["whoami"],
        &["info"],
        &["completion", "zsh"],
        &["help"],
    ] {
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        let mut call = alice.rxm_call(&host, words).command();
        call.stdout(Stdio::from(writer));
        let ended = Process::start(call).wait(SOON).success();
        assert_eq!(ended.stderr(), "", "{words:?}");
    }
    let script = "\"$@\" | head -1; exit ${PIPESTATUS[0]}";
    let first = shell_call(&alice, script, &host, &["describe", "test"])
        .run()
        .success();
    assert_eq!(first.stdout().lines().count(), 1, "{first}");
    // What was done is done, whether or not anybody reads of it.
    let (reader, writer) = io::pipe().unwrap();
    drop(reader);
    let mut pause = alice.rxm_call(&host, ["pause", "test"]).command();
    pause.stdout(Stdio::from(writer));
    Process::start(pause).wait(SOON).success();
    assert_eq!(state(&alice, &host, "test"), "paused");
}

#[test]
fn a_full_disk_under_stdout_is_a_failure() {
    let (alice, host) = (alice(), host());
    let full = fs::OpenOptions::new()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut list = alice.rxm_call(&host, ["list"]).command();
    list.stdout(Stdio::from(full));
    Process::start(list)
        .wait(SOON)
        .code(1)
        .complains("No space");
}

#[test]
fn control_c_ends_what_is_followed_and_leaves_the_terminal_as_it_was() {
    let (alice, host) = (alice(), host());
    let script = "trap : INT; stty -g; \"$@\"; code=$?; stty -g; echo \"ended $code\"";
    let mut terminal = shell_call(&alice, script, &host, &["dmesg", "-f"]).in_terminal();
    terminal.wait_for(SOON, "] ");
    let began = Instant::now();
    terminal.types("\x03");
    terminal.wait_for(SOON, "ended ");
    let took = began.elapsed();
    terminal.wait(SOON);
    let shown = terminal.screen().text();
    assert!(took < Duration::from_secs(10), "{took:?}");
    assert!(shown.contains("ended 130"), "{shown}");
    let lines: Vec<_> = shown.lines().collect();
    let before = lines[0];
    assert!(before.matches(':').count() > 10, "{before}");
    // What it was showing may end in the middle of a line.
    assert!(lines[lines.len() - 2].ends_with(before), "{shown}");
    assert!(!shown.contains("\x1b[?25l"), "the cursor is there: {shown}");
}

#[test]
fn control_c_ends_what_waits_for_a_silent_host() {
    let alice = alice();
    let (listener, silent) = mute();
    let list = alice.rxm_call(silent.as_str(), ["--timeout", "1m", "list"]);
    let mut terminal = list.in_terminal();
    let _open = listener.accept().unwrap();
    let began = Instant::now();
    terminal.types("\x03");
    assert_eq!(terminal.wait(SOON), 130, "{}", terminal.screen().text());
    assert!(
        began.elapsed() < Duration::from_secs(10),
        "{:?}",
        began.elapsed()
    );
}
