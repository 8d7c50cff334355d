//! The backend that asks another program, against the authority that we ship and against peers that do all they should not.
//!
//! Runs as root: it changes owners.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "a test ends where something is not as it should be"
)]

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead, BufReader, Write},
    net::{IpAddr, Ipv4Addr},
    os::unix::{
        fs::{MetadataExt, PermissionsExt, chown, symlink},
        net::{UnixListener, UnixStream},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Barrier, Mutex,
        atomic::{AtomicUsize, Ordering},
        mpsc,
    },
    thread,
    time::{Duration, Instant},
};

use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;
use uuid::Uuid;
use xman_common::{
    name::{DomainName, Principal},
    protocol::{DomainState, Metadata, Verb},
};
use xman_policy::{
    Action, Authorizer, DomainFacts, Lease, Opinion, Person, Query, Subject, UnixGroups,
    external::{
        External, MAX_CONNECTIONS, MAX_IN_FLIGHT, MAX_LINE, MAX_REMEMBERED, MAX_TTL, MAX_WAIT,
    },
};

/// A deadline that is never reached where all goes well.
const AMPLE: Duration = Duration::from_secs(20);
/// A deadline that is reached on purpose.
const SHORT: Duration = Duration::from_millis(300);
/// A deadline that is reached on purpose, after something else came in time.
const LATER: Duration = Duration::from_secs(3);
/// What a denial at a deadline may take beyond it on a busy machine.
const SLACK: Duration = Duration::from_secs(5);

const ROOT: u32 = 0;

/// A folder with a socket's name in it.
struct Place {
    folder: TempDir,
    socket: PathBuf,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let owner = fs::metadata(folder.path()).unwrap().uid();
        assert_eq!(
            owner, ROOT,
            "these tests change owners, so they run as root"
        );
        let socket = folder.path().join("authz.sock");
        Self { folder, socket }
    }

    fn backend(&self, limit: Duration) -> External {
        External::new(&self.socket, ROOT, "skirit80", limit)
    }

    /// Lets `peer` talk on each connection, in a thread of its own, and returns how many there have been.
    fn listen(&self, peer: impl Fn(Peer) + Send + Sync + 'static) -> Arc<AtomicUsize> {
        let listener = UnixListener::bind(&self.socket).unwrap();
        let count = Arc::new(AtomicUsize::new(0));
        let connections = Arc::clone(&count);
        let peer = Arc::new(peer);
        thread::spawn(move || {
            for stream in listener.incoming() {
                let number = connections.fetch_add(1, Ordering::SeqCst);
                let peer = Arc::clone(&peer);
                let lines = BufReader::new(stream.unwrap());
                thread::spawn(move || peer(Peer { number, lines }));
            }
        });
        count
    }
}

/// The authority's end of one connection.
struct Peer {
    /// How many connections there were before.
    number: usize,
    lines: BufReader<UnixStream>,
}

impl Peer {
    /// Returns the next question; nothing where the other end is closed.
    fn question(&mut self) -> Option<Value> {
        let mut line = String::new();
        match self.lines.read_line(&mut line) {
            Ok(0) | Err(_) => None,
            Ok(_) => Some(serde_json::from_str(&line).unwrap()),
        }
    }

    fn questions(&mut self, count: usize) -> Vec<Value> {
        (0..count).filter_map(|_| self.question()).collect()
    }

    /// Writes; that the other end is closed by now is its right.
    fn say(&mut self, text: impl AsRef<[u8]>) {
        let _ = self.lines.get_mut().write_all(text.as_ref());
    }

    fn answer(&mut self, answer: &Value) {
        self.say(format!("{answer}\n"));
    }

    /// Answers properly until the other end closes.
    fn serve(&mut self, judge: impl Fn(&Value) -> Value) {
        self.serve_lines(|question| format!("{}\n", judge(question)));
    }

    fn serve_lines(&mut self, line: impl Fn(&Value) -> String) {
        while let Some(question) = self.question() {
            let line = line(&question);
            self.say(line);
        }
    }

    /// Waits until the other end closes, and reads nothing before.
    fn hold(&self) {
        let stream = self.lines.get_ref();
        let flags = rustix::event::PollFlags::empty();
        let mut polled = [rustix::event::PollFd::new(stream, flags)];
        let _ = rustix::event::poll(&mut polled, None);
    }
}

fn allow(question: &Value) -> Value {
    json!({"xman": 1, "id": question["id"], "opinion": "allow", "rule": "r"})
}

fn deny(question: &Value) -> Value {
    json!({"xman": 1, "id": question["id"], "opinion": "deny", "reason": "so I say"})
}

fn allow_for(ttl: Duration) -> impl Fn(&Value) -> Value {
    let ttl = u64::try_from(ttl.as_millis()).unwrap();
    move |question| {
        let mut answer = allow(question);
        answer["ttl_ms"] = ttl.into();
        answer
    }
}

fn id(question: &Value) -> u64 {
    question["id"].as_u64().unwrap()
}

fn person(principal: &str) -> Person {
    Person {
        principal: principal.parse().unwrap(),
        unix_groups: UnixGroups::Unasked,
    }
}

fn ask<'a>(person: &'a Person, verb: Verb, on: Subject<'a>) -> Query<'a> {
    Query {
        person,
        action: verb.into(),
        on,
        peer: Ipv4Addr::new(10, 0, 0, 1).into(),
        acting: None,
    }
}

/// Asks whether alice may pause anything on the host.
fn judge(backend: &External) -> Opinion {
    backend.judge(&ask(&person("alice@EX.ORG"), Verb::Pause, Subject::Host))
}

/// Asks about so many persons at once.
fn judge_many(backend: &External, count: usize) -> Vec<Opinion> {
    let people: Vec<Person> = (0..count)
        .map(|n| person(&format!("user{n}@EX.ORG")))
        .collect();
    let queries: Vec<Query<'_>> = people
        .iter()
        .map(|one| ask(one, Verb::Pause, Subject::Host))
        .collect();
    backend.judge_all(&queries)
}

fn allowed() -> Opinion {
    Opinion::Allow {
        rule: "external:r".to_owned(),
        administrator: false,
    }
}

#[track_caller]
fn denied(opinion: &Opinion, why: &str) {
    match opinion {
        Opinion::Deny { reason } => {
            assert!(reason.contains(why), "{reason:?} does not say {why:?}");
        }
        Opinion::Allow { .. } | Opinion::None => panic!("{opinion:?} instead of denied: {why}"),
    }
}

/// Waits for something that happens elsewhere.
#[track_caller]
fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + AMPLE;
    while !is_so() {
        assert!(Instant::now() < end, "{what} never comes true");
        thread::sleep(Duration::from_millis(5));
    }
}

// --- what the socket must be ---

#[test]
fn without_the_authority_everything_is_denied() {
    let place = Place::new();
    denied(&judge(&place.backend(AMPLE)), "there is no socket");
    // its socket is left behind, and nobody listens
    drop(UnixListener::bind(&place.socket).unwrap());
    denied(&judge(&place.backend(AMPLE)), "does the authority run?");
}

#[test]
fn what_is_not_a_socket_is_not_asked() {
    for make in [
        |path: &Path| fs::write(path, "").unwrap(),
        |path: &Path| fs::create_dir(path).unwrap(),
    ] {
        let place = Place::new();
        make(&place.socket);
        denied(&judge(&place.backend(AMPLE)), "is not a socket");
    }
}

#[test]
fn a_link_to_the_socket_is_not_followed() {
    let place = Place::new();
    let connections = place.listen(|mut peer| peer.serve(allow));
    let link = place.folder.path().join("link");
    symlink(&place.socket, &link).unwrap();
    let backend = External::new(&link, ROOT, "skirit80", AMPLE);
    denied(&judge(&backend), "is a symbolic link");
    assert_eq!(connections.load(Ordering::SeqCst), 0);
}

#[test]
fn the_socket_is_roots_or_the_accounts() {
    let place = Place::new();
    place.listen(|mut peer| peer.serve(allow));
    let backend = place.backend(AMPLE);
    assert_eq!(judge(&backend), allowed());
    chown(&place.socket, Some(12345), None).unwrap();
    denied(&judge(&backend), "belongs to uid 12345");
    let its_own = External::new(&place.socket, 12345, "skirit80", AMPLE);
    assert_eq!(judge(&its_own), allowed());
}

/// The file is root's again when it is looked at, but who listens is somebody else.
#[test]
fn whoever_listens_is_root_or_the_account_whatever_the_file_says() {
    let place = Place::new();
    fs::set_permissions(place.folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let listen = "import socket, sys, time\n\
        s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen()\n\
        print('listening', file=sys.stderr, flush=True); time.sleep(600)";
    let mut command = Command::new("python3");
    command.args(["-c", listen]).arg(&place.socket);
    let stranger = Authority::start(command.uid(12345).gid(12345));
    stranger.says("listening");
    chown(&place.socket, Some(ROOT), Some(ROOT)).unwrap();
    denied(&judge(&place.backend(AMPLE)), "uid 12345 listens");
}

// --- what the authority says ---

#[test]
fn the_opinion_is_the_authoritys_and_nobody_is_an_administrator() {
    let place = Place::new();
    place.listen(|mut peer| {
        peer.serve(|question| match question["principal"].as_str().unwrap() {
            "alice@EX.ORG" => allow(question),
            "mallory@EX.ORG" => deny(question),
            _ => json!({"xman": 1, "id": id(question), "opinion": "none", "reason": "be alice"}),
        });
    });
    let backend = place.backend(AMPLE);
    let opinion = |who| backend.judge(&ask(&person(who), Verb::Pause, Subject::Host));
    assert_eq!(opinion("alice@EX.ORG"), allowed());
    denied(&opinion("mallory@EX.ORG"), "so I say");
    assert_eq!(opinion("bob@EX.ORG"), Opinion::None);
    let wants = |who| backend.wants(&ask(&person(who), Verb::Pause, Subject::Host));
    assert_eq!(wants("bob@EX.ORG"), ["be alice"]);
    assert_eq!(wants("mallory@EX.ORG"), Vec::<String>::new());
    assert!(backend.waits());
}

#[test]
fn what_is_not_known_is_denied_without_asking() {
    let place = Place::new();
    let connections = place.listen(|mut peer| peer.serve(allow));
    let backend = place.backend(AMPLE);
    let alice = person("alice@EX.ORG");
    let unknown = Person {
        unix_groups: UnixGroups::Unknown("the name service is silent".to_owned()),
        ..alice.clone()
    };
    let crowded = Person {
        unix_groups: UnixGroups::Known(vec!["group".to_owned(); MAX_LINE]),
        ..alice.clone()
    };
    let name: DomainName = "web".parse().unwrap();
    let mut facts = facts(&name, Err("the XML is broken"));
    let on = Subject::Domain(facts);
    denied(
        &backend.judge(&ask(&alice, Verb::Pause, on)),
        "the XML is broken",
    );
    for (who, why) in [
        (&unknown, "the name service is silent"),
        (&crowded, "the longest line"),
    ] {
        denied(&backend.judge(&ask(who, Verb::Pause, Subject::Host)), why);
    }
    assert_eq!(connections.load(Ordering::SeqCst), 0);

    // and those beside them in one list are asked about
    let metadata = Metadata::default();
    facts.metadata = Ok(&metadata);
    let queries = [
        ask(&unknown, Verb::Pause, Subject::Host),
        ask(&alice, Verb::Pause, Subject::Domain(facts)),
        ask(&crowded, Verb::Pause, Subject::Host),
        ask(&alice, Verb::Start, Subject::Domain(facts)),
    ];
    let opinions = backend.judge_all(&queries);
    denied(&opinions[0], "the name service is silent");
    denied(&opinions[2], "the longest line");
    assert_eq!((&opinions[1], &opinions[3]), (&allowed(), &allowed()));
}

fn facts<'a>(name: &'a DomainName, metadata: Result<&'a Metadata, &'a str>) -> DomainFacts<'a> {
    DomainFacts {
        uuid: Uuid::from_u128(7),
        name,
        hypervisor: "qemu:///system",
        state: DomainState::Running,
        metadata,
        lease: None,
        revision: 1,
        stale: false,
    }
}

/// The authority holds back as many as may be in flight, and answers the last first.
#[test]
fn a_thousand_questions_share_a_connection_and_their_answers_come_in_any_order() {
    const COUNT: usize = 1000;
    let place = Place::new();
    let connections = place.listen(|mut peer| {
        let mut left = COUNT;
        while left > 0 {
            let held = peer.questions(left.min(MAX_IN_FLIGHT));
            left -= held.len();
            for question in held.iter().rev() {
                let even = question["principal"].as_str().unwrap().contains("0@");
                peer.answer(&if even {
                    allow(question)
                } else {
                    deny(question)
                });
            }
        }
        assert_eq!(peer.question(), None);
    });
    for (n, opinion) in judge_many(&place.backend(AMPLE), COUNT).iter().enumerate() {
        if n % 10 == 0 {
            assert_eq!(opinion, &allowed(), "{n}");
        } else {
            denied(opinion, "so I say");
        }
    }
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

/// An authority that does not read on need not hold more than that.
#[test]
fn no_more_questions_wait_for_their_answers_than_may_be_in_flight() {
    let place = Place::new();
    let (sender, asked) = mpsc::channel();
    place.listen(move |mut peer| {
        let mut questions = peer.questions(MAX_IN_FLIGHT);
        let timeout = |peer: &Peer, limit| peer.lines.get_ref().set_read_timeout(limit).unwrap();
        timeout(&peer, Some(SHORT));
        // nothing comes any more
        questions.extend(std::iter::from_fn(|| peer.question()));
        timeout(&peer, None);
        sender.send(questions.len()).unwrap();
        for question in &questions {
            peer.answer(&allow(question));
        }
        peer.serve(allow);
    });
    let opinions = judge_many(&place.backend(AMPLE), 1000);
    assert_eq!(asked.recv_timeout(AMPLE).unwrap(), MAX_IN_FLIGHT);
    assert_eq!(opinions, vec![allowed(); 1000]);
}

#[test]
fn connections_are_few_and_used_again() {
    const CALLERS: usize = 2 * MAX_CONNECTIONS;
    let place = Place::new();
    let (all_here, at_once) = (Barrier::new(MAX_CONNECTIONS), AtomicUsize::new(0));
    let connections = place.listen(move |mut peer| {
        while let Some(question) = peer.question() {
            assert!(at_once.fetch_add(1, Ordering::SeqCst) < MAX_CONNECTIONS);
            all_here.wait();
            at_once.fetch_sub(1, Ordering::SeqCst);
            peer.answer(&allow(&question));
        }
    });
    let backend = place.backend(AMPLE);
    thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| assert_eq!(judge(&backend), allowed()));
        }
    });
    assert_eq!(connections.load(Ordering::SeqCst), MAX_CONNECTIONS);
}

// --- peers that do what they should not ---

/// Judges with one question and a short deadline; returns the opinion, which must come in time.
#[track_caller]
fn judge_in_time(backend: &External) -> Opinion {
    let began = Instant::now();
    let opinion = judge(backend);
    assert!(
        began.elapsed() < SHORT + SLACK,
        "it took {:?}",
        began.elapsed()
    );
    opinion
}

#[test]
fn a_silent_authority_denies_at_the_deadline_and_not_before() {
    let place = Place::new();
    place.listen(|peer| peer.hold());
    let backend = place.backend(SHORT);
    let began = Instant::now();
    denied(&judge_in_time(&backend), "did not answer within 300ms");
    assert!(began.elapsed() >= SHORT);
    // nor does it take longer for many
    let opinions = judge_many(&backend, 1000);
    assert!(began.elapsed() < 2 * SHORT + SLACK);
    assert_eq!(opinions.len(), 1000);
    for opinion in opinions {
        denied(&opinion, "did not answer within 300ms");
    }
}

#[test]
fn one_that_does_not_accept_denies_at_the_deadline() {
    let place = Place::new();
    let _listener = UnixListener::bind(&place.socket).unwrap();
    let address = rustix::net::SocketAddrUnix::new(&place.socket).unwrap();
    let mut waiting = Vec::new();
    loop {
        let stream = rustix::net::socket_with(
            rustix::net::AddressFamily::UNIX,
            rustix::net::SocketType::STREAM,
            rustix::net::SocketFlags::NONBLOCK | rustix::net::SocketFlags::CLOEXEC,
            None,
        )
        .unwrap();
        match rustix::net::connect(&stream, &address) {
            Ok(()) => waiting.push(stream),
            Err(errno) => break assert_eq!(errno, rustix::io::Errno::AGAIN, "the queue is full"),
        }
    }
    assert!(!waiting.is_empty());
    denied(
        &judge_in_time(&place.backend(SHORT)),
        "did not answer within 300ms",
    );
}

#[test]
fn a_trickle_does_not_stretch_the_deadline() {
    let place = Place::new();
    place.listen(|mut peer| {
        let question = peer.question().unwrap();
        let answer = format!("{:>1000}\n", allow(&question).to_string());
        for byte in answer.bytes() {
            if peer.lines.get_mut().write_all(&[byte]).is_err() {
                return;
            }
            thread::sleep(SHORT / 100);
        }
    });
    denied(
        &judge_in_time(&place.backend(SHORT)),
        "did not answer within 300ms",
    );
}

/// Half a line, and then nothing or the end: never an answer.
#[test]
fn half_a_line_is_no_answer() {
    let half = |peer: &mut Peer| {
        let question = peer.question().unwrap();
        peer.say(allow(&question).to_string());
    };
    let place = Place::new();
    place.listen(move |mut peer| {
        half(&mut peer);
        peer.hold();
    });
    denied(
        &judge_in_time(&place.backend(SHORT)),
        "did not answer within 300ms",
    );
    let place = Place::new();
    place.listen(move |mut peer| half(&mut peer));
    denied(&judge(&place.backend(AMPLE)), "closed the connection");
}

/// What comes for a question that was given up is nobody's answer, neither on its own connection nor on the next.
#[test]
fn an_answer_after_the_deadline_is_never_taken_for_anothers() {
    let place = Place::new();
    let (given_up, wait) = mpsc::channel::<()>();
    let (late, said) = mpsc::channel();
    let wait = Mutex::new(wait);
    let first = Mutex::new(None);
    let connections = place.listen(move |mut peer| {
        let question = peer.question().unwrap();
        match peer.number {
            0 => {
                wait.lock().unwrap().recv().unwrap();
                peer.answer(&allow(&question));
                *first.lock().unwrap() = Some(question);
                late.send(()).unwrap();
            }
            1 => {
                let first = first.lock().unwrap().take().unwrap();
                assert_ne!(first["id"], question["id"]);
                peer.answer(&allow(&first));
            }
            _ => peer.answer(&deny(&question)),
        }
    });
    let backend = place.backend(LATER);
    denied(&judge_in_time(&backend), "did not answer within 3s");
    given_up.send(()).unwrap();
    said.recv_timeout(AMPLE).unwrap();
    denied(&judge(&backend), "which was not asked");
    denied(&judge(&backend), "so I say");
    assert_eq!(connections.load(Ordering::SeqCst), 3);
}

/// Each of these ends the conversation; the next question goes to a new connection and is answered.
#[test]
fn an_answer_out_of_order_denies_and_the_connection_is_never_used_again() {
    type Line = fn(&Value) -> String;
    let proper = |question: &Value| format!("{}\n", allow(question));
    let cases: [(&str, Line); 12] = [
        ("no answer", |_| "garbage\n".to_owned()),
        ("no answer", |_| "\n".to_owned()),
        ("no answer", |_| "[]\n".to_owned()),
        ("no answer", |question| {
            let mut answer = allow(question);
            answer["administrator"] = true.into();
            format!("{answer}\n")
        }),
        ("no answer", |question| {
            format!("{}\n", allow(question)).replace("allow", "ALLOW")
        }),
        ("no answer", |question| {
            format!("{} {}\n", allow(question), allow(question))
        }),
        ("speaks version 2", |question| {
            format!("{}\n", allow(question)).replace("\"xman\":1", "\"xman\":2")
        }),
        ("which was not asked", |question| {
            format!(
                "{}\n",
                json!({"xman": 1, "id": id(question) + 1, "opinion": "allow", "rule": "r"})
            )
        }),
        ("which was not asked", |question| {
            format!(
                "{}\n",
                json!({"xman": 1, "id": id(question) - 1, "opinion": "allow", "rule": "r"})
            )
        }),
        ("which was not asked", |_| {
            "{\"xman\":1,\"id\":0,\"opinion\":\"allow\",\"rule\":\"r\"}\n".to_owned()
        }),
        ("twice", |question| {
            format!("{}\n{}\n", allow(question), allow(question))
        }),
        ("twice", |question| {
            format!("{}\n{}\n", allow(question), deny(question))
        }),
    ];
    for (why, line) in cases {
        let place = Place::new();
        let connections = place.listen(move |mut peer| {
            while let Some(question) = peer.question() {
                match peer.number {
                    0 => peer.say(line(&question)),
                    _ => peer.say(proper(&question)),
                }
            }
        });
        let backend = place.backend(AMPLE);
        denied(&judge(&backend), why);
        assert_eq!(judge(&backend), allowed(), "{why}");
        assert_eq!(judge(&backend), allowed(), "{why}");
        assert_eq!(connections.load(Ordering::SeqCst), 2, "{why}");
    }
}

#[test]
fn in_a_list_what_was_answered_before_stands_and_the_rest_is_denied() {
    let place = Place::new();
    place.listen(|mut peer| {
        let questions = peer.questions(MAX_IN_FLIGHT);
        for question in &questions[..10] {
            peer.answer(&allow(question));
        }
        peer.answer(&allow(&questions[3]));
        for question in &questions[10..] {
            peer.answer(&allow(question));
        }
    });
    let opinions = judge_many(&place.backend(AMPLE), 1000);
    for (n, opinion) in opinions.iter().enumerate() {
        match n {
            3 => denied(opinion, "twice"),
            0..10 => assert_eq!(opinion, &allowed(), "{n}"),
            _ => denied(opinion, "twice"),
        }
    }
}

/// The numbers of later questions can be guessed; an answer to one that was not asked yet is out of order all the same.
#[test]
fn nothing_can_be_answered_before_it_is_asked() {
    let place = Place::new();
    place.listen(|mut peer| {
        let first = peer.questions(MAX_IN_FLIGHT).remove(0);
        let later = id(&first) + 999;
        peer.answer(&json!({"xman": 1, "id": later, "opinion": "allow", "rule": "r"}));
        peer.hold();
    });
    for opinion in judge_many(&place.backend(AMPLE), 1000) {
        denied(&opinion, "which was not asked");
    }
}

#[test]
fn a_connection_that_closes_in_the_middle_of_a_list_denies_the_rest() {
    let place = Place::new();
    place.listen(|mut peer| {
        for question in peer.questions(10) {
            peer.answer(&allow(&question));
        }
    });
    let opinions = judge_many(&place.backend(AMPLE), 1000);
    for (n, opinion) in opinions.iter().enumerate() {
        if n < 10 {
            assert_eq!(opinion, &allowed(), "{n}");
        } else {
            denied(opinion, "closed the connection");
        }
    }
}

/// What it said before still counts, and the rest waits for nothing but the deadline.
#[test]
fn a_peer_that_reads_no_more_denies_what_it_did_not_read() {
    let place = Place::new();
    place.listen(|mut peer| {
        let questions = peer.questions(10);
        let stream = peer.lines.get_ref();
        stream.shutdown(std::net::Shutdown::Read).unwrap();
        for question in &questions {
            peer.answer(&allow(question));
        }
        peer.hold();
    });
    let began = Instant::now();
    let opinions = judge_many(&place.backend(LATER), 1000);
    assert!(began.elapsed() < LATER + SLACK);
    for (n, opinion) in opinions.iter().enumerate() {
        if n < 10 {
            assert_eq!(opinion, &allowed(), "{n}");
        } else {
            denied(opinion, "did not answer within 3s");
        }
    }
}

#[test]
fn a_line_without_an_end_is_read_no_further_than_the_limit() {
    let place = Place::new();
    let (sender, sent) = mpsc::channel();
    place.listen(move |mut peer| {
        peer.question().unwrap();
        let mut bytes = 0_usize;
        while bytes < 1 << 30 && peer.lines.get_mut().write_all(&[b' '; CHUNK]).is_ok() {
            bytes += CHUNK;
        }
        sender.send(bytes).unwrap();
    });
    const CHUNK: usize = 64 * 1024;
    denied(&judge(&place.backend(AMPLE)), "a line of more than 65536");
    let bytes = sent.recv_timeout(AMPLE).unwrap();
    // the limit and what fits into the kernel's buffers
    assert!(bytes < 4 << 20, "{bytes} bytes were taken");
}

#[test]
fn the_longest_line_is_an_answer_and_one_byte_more_is_not() {
    for (length, is_answer) in [(MAX_LINE, true), (MAX_LINE + 1, false)] {
        let place = Place::new();
        place.listen(move |mut peer| {
            peer.serve_lines(|question| {
                let answer = allow(question).to_string();
                " ".repeat(length - answer.len()) + &answer + "\n"
            });
        });
        let opinion = judge(&place.backend(AMPLE));
        if is_answer {
            assert_eq!(opinion, allowed());
        } else {
            denied(&opinion, "a line of more than");
        }
    }
}

/// Both write and neither reads: whoever wrote all before reading would wait here until the deadline.
#[test]
fn a_peer_that_writes_before_it_reads_does_not_make_both_wait() {
    let place = Place::new();
    place.listen(|mut peer| {
        while let Some(question) = peer.question() {
            // far more than the buffers between us hold, before the next question is read
            let answer = format!("{:>60000}\n", allow(&question).to_string());
            peer.say(answer);
        }
    });
    for opinion in judge_many(&place.backend(AMPLE), 300) {
        assert_eq!(opinion, allowed());
    }
}

// --- connections that were kept ---

#[test]
fn a_connection_that_was_closed_while_it_was_kept_is_replaced() {
    let place = Place::new();
    let connections = place.listen(|mut peer| {
        let question = peer.question().unwrap();
        peer.answer(&allow(&question));
    });
    let backend = place.backend(AMPLE);
    for round in 1..=5 {
        assert_eq!(judge(&backend), allowed());
        assert_eq!(connections.load(Ordering::SeqCst), round);
    }
}

/// It closes only when the question is written: once more, on a new connection, and no further.
#[test]
fn a_question_is_asked_again_once_where_a_kept_connection_closes_without_a_byte() {
    for (bytes, answers, expected) in [("", true, 2), ("", false, 2), ("{", true, 1)] {
        let place = Place::new();
        let connections = place.listen(move |mut peer| {
            if peer.number == 0 {
                let question = peer.question().unwrap();
                peer.answer(&allow(&question));
                peer.question().unwrap();
                peer.say(bytes);
            } else if answers {
                peer.serve(allow);
            } else {
                peer.question();
            }
        });
        let backend = place.backend(AMPLE);
        assert_eq!(judge(&backend), allowed());
        let again = judge(&backend);
        if expected == 2 && answers {
            assert_eq!(again, allowed());
        } else {
            denied(&again, "closed the connection");
        }
        assert_eq!(connections.load(Ordering::SeqCst), expected);
    }
}

#[test]
fn a_new_connection_that_closes_is_not_tried_again() {
    let place = Place::new();
    let connections = place.listen(|mut peer| drop(peer.question()));
    denied(&judge(&place.backend(AMPLE)), "closed the connection");
    assert_eq!(connections.load(Ordering::SeqCst), 1);
}

#[test]
fn a_kept_connection_that_says_something_unasked_is_not_used() {
    let place = Place::new();
    let (judged, kept) = mpsc::channel::<()>();
    let (sender, said) = mpsc::channel();
    let kept = Mutex::new(kept);
    let connections = place.listen(move |mut peer| {
        let question = peer.question().unwrap();
        peer.answer(&allow(&question));
        if peer.number == 0 {
            kept.lock().unwrap().recv().unwrap();
            // the next question's number, as good as one can guess it
            let next = id(&question) + 1;
            peer.answer(&json!({"xman": 1, "id": next, "opinion": "allow", "rule": "r"}));
            sender.send(()).unwrap();
        }
        peer.hold();
    });
    let backend = place.backend(AMPLE);
    assert_eq!(judge(&backend), allowed());
    judged.send(()).unwrap();
    said.recv_timeout(AMPLE).unwrap();
    assert_eq!(judge(&backend), allowed());
    assert_eq!(connections.load(Ordering::SeqCst), 2);
}

// --- what is remembered ---

/// A peer that counts the questions.
fn counting(
    place: &Place,
    judge: impl Fn(&Value) -> Value + Send + Sync + 'static,
) -> Arc<AtomicUsize> {
    let count = Arc::new(AtomicUsize::new(0));
    let questions = Arc::clone(&count);
    place.listen(move |mut peer| {
        peer.serve(|question| {
            questions.fetch_add(1, Ordering::SeqCst);
            judge(question)
        });
    });
    count
}

#[test]
fn an_opinion_with_a_lifetime_is_asked_for_once_and_any_other_each_time() {
    for opinion in ["allow", "deny", "none"] {
        for (ttl, expected) in [(json!(60_000), 1), (json!(0), 3), (Value::Null, 3)] {
            let place = Place::new();
            let count = counting(
                &place,
                move |question| json!({"xman": 1, "id": id(question), "opinion": opinion, "rule": "r", "ttl_ms": ttl}),
            );
            let backend = place.backend(AMPLE);
            let first = judge(&backend);
            assert_eq!([judge(&backend), judge(&backend)], [first.clone(), first]);
            assert_eq!(count.load(Ordering::SeqCst), expected, "{opinion}");
        }
    }
}

#[test]
fn nothing_is_remembered_beyond_its_lifetime() {
    let ttl = Duration::from_millis(200);
    let place = Place::new();
    let count = counting(&place, allow_for(ttl));
    let backend = place.backend(AMPLE);
    judge(&backend);
    let answered = Instant::now();
    eventually("asking again", || {
        let began = Instant::now();
        judge(&backend);
        let asked = count.load(Ordering::SeqCst) > 1;
        assert!(asked || began < answered + ttl);
        asked
    });
}

#[test]
fn failures_are_not_remembered() {
    let place = Place::new();
    place.listen(|mut peer| match peer.number {
        0 => peer.say("garbage\n"),
        _ => peer.serve(allow_for(MAX_TTL)),
    });
    let backend = place.backend(AMPLE);
    denied(&judge(&backend), "no answer");
    assert_eq!(judge(&backend), allowed());
}

/// Every fact makes another question.
#[test]
fn what_is_remembered_is_the_whole_question() {
    let place = Place::new();
    let count = counting(&place, allow_for(MAX_TTL));
    let backend = place.backend(AMPLE);
    let (alice, bob): (Principal, Principal) = (
        "alice@EX.ORG".parse().unwrap(),
        "bob@EX.ORG".parse().unwrap(),
    );
    let people = [
        person("alice@EX.ORG"),
        person("bob@EX.ORG"),
        Person {
            principal: alice.clone(),
            unix_groups: UnixGroups::Known(vec![]),
        },
        Person {
            principal: alice.clone(),
            unix_groups: UnixGroups::Known(vec!["wheel".to_owned()]),
        },
    ];
    let names: [DomainName; 2] = ["web".parse().unwrap(), "db".parse().unwrap()];
    let plain = Metadata::default();
    let owned = Metadata {
        owners: BTreeSet::from([alice.clone()]),
        ..Metadata::default()
    };
    let classed = Metadata {
        class: Some("grid".parse().unwrap()),
        ..Metadata::default()
    };
    let labelled = Metadata {
        labels: [("grid".parse().unwrap(), "yes".parse().unwrap())].into(),
        ..Metadata::default()
    };
    let leases = [
        ("alice", "slurm/1"),
        ("bob", "slurm/1"),
        ("alice", "slurm/2"),
    ]
    .map(|(user, job)| Lease {
        user: format!("{user}@EX.ORG").parse().unwrap(),
        job: job.to_owned(),
    });
    let base = facts(&names[0], Ok(&plain));
    let mut subjects = vec![
        Subject::Host,
        Subject::UnknownDomain,
        Subject::Domain(base),
        Subject::Person(&people[1]),
        Subject::Person(&people[0]),
    ];
    for (name, uuid) in [
        (&names[0], None),
        (&names[1], None),
        (&names[0], Some(Uuid::nil())),
    ] {
        subjects.push(Subject::NewDomain { name, uuid });
    }
    for other in [
        DomainFacts {
            uuid: Uuid::nil(),
            ..base
        },
        DomainFacts {
            name: &names[1],
            ..base
        },
        DomainFacts {
            hypervisor: "xen:///system",
            ..base
        },
        DomainFacts {
            state: DomainState::Off,
            ..base
        },
        DomainFacts {
            metadata: Ok(&owned),
            ..base
        },
        DomainFacts {
            metadata: Ok(&classed),
            ..base
        },
        DomainFacts {
            metadata: Ok(&labelled),
            ..base
        },
        DomainFacts {
            lease: Some(&leases[0]),
            ..base
        },
        DomainFacts {
            lease: Some(&leases[1]),
            ..base
        },
        DomainFacts {
            lease: Some(&leases[2]),
            ..base
        },
    ] {
        subjects.push(Subject::Domain(other));
    }
    let mut queries = Vec::new();
    for one in &people {
        for on in &subjects {
            for action in Action::all() {
                for peer in [Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2)] {
                    for acting in [None, Some(&alice), Some(&bob)] {
                        queries.push(Query {
                            person: one,
                            action,
                            on: *on,
                            peer: peer.into(),
                            acting,
                        });
                    }
                }
            }
        }
    }
    // less than is remembered at once, else what is forgotten would be taken for what is another question
    let (step, mut asked) = (MAX_REMEMBERED / 2, 0);
    assert!(queries.len() > step);
    for queries in queries.chunks(step) {
        place.renew(&backend);
        for _ in 0..2 {
            backend.judge_all(queries);
        }
        asked += queries.len();
        assert_eq!(count.load(Ordering::SeqCst), asked);
    }
}

#[test]
fn an_ipv4_caller_of_an_ipv6_socket_is_an_ipv4_caller() {
    let place = Place::new();
    let count = counting(&place, |question| {
        assert_eq!(question["address"], "10.0.0.1");
        allow_for(MAX_TTL)(question)
    });
    let backend = place.backend(AMPLE);
    let alice = person("alice@EX.ORG");
    for address in ["10.0.0.1", "::ffff:10.0.0.1"] {
        let query = Query {
            peer: address.parse::<IpAddr>().unwrap(),
            ..ask(&alice, Verb::Pause, Subject::Host)
        };
        assert_eq!(backend.judge(&query), allowed());
    }
    assert_eq!(count.load(Ordering::SeqCst), 1);
}

#[test]
fn no_more_is_remembered_than_the_limit() {
    const MORE: usize = 500;
    let place = Place::new();
    let count = counting(&place, allow_for(MAX_TTL));
    let backend = place.backend(3 * AMPLE);
    for _ in 0..2 {
        for opinion in judge_many(&backend, MAX_REMEMBERED + MORE) {
            assert_eq!(opinion, allowed());
        }
    }
    assert_eq!(count.load(Ordering::SeqCst), MAX_REMEMBERED + 2 * MORE);
}

impl Place {
    /// Makes the backend forget: to it, a socket whose inode has changed is another one.
    fn renew(&self, backend: &External) {
        let before = backend.refresh();
        eventually("another change time", || {
            fs::set_permissions(&self.socket, fs::Permissions::from_mode(0o600)).unwrap();
            backend.refresh().is_some()
        });
        drop(before);
    }
}

#[test]
fn what_was_said_is_forgotten_with_its_socket_and_a_change_is_told_once() {
    let place = Place::new();
    let backend = place.backend(AMPLE);
    let trouble = backend.refresh().unwrap();
    assert!(!trouble.usable && trouble.summary.contains("there is no socket"));
    assert_eq!(backend.refresh(), None);

    let _first = place.listen(|mut peer| peer.serve(allow_for(MAX_TTL)));
    assert_eq!(judge(&backend), allowed());
    assert!(backend.refresh().unwrap().usable);
    assert_eq!(backend.refresh(), None);

    // remembered, but the socket is gone
    fs::remove_file(&place.socket).unwrap();
    denied(&judge(&backend), "there is no socket");
    // and at the new one somebody thinks otherwise; the old one still listens
    let second = place.listen(|mut peer| peer.serve(deny));
    denied(&judge(&backend), "so I say");
    assert_eq!(second.load(Ordering::SeqCst), 1);
    assert!(backend.refresh().unwrap().usable);
    assert_eq!(backend.refresh(), None);
}

// --- whatever is said ---

/// What a peer says instead of an answer.
#[derive(Clone, Debug)]
enum Piece {
    /// An answer that may be to another question, or be marred.
    Answer {
        question: usize,
        shift: i64,
        opinion: &'static str,
    },
    Bytes(Vec<u8>),
}

#[derive(Clone, Debug)]
struct Edit {
    at: prop::sample::Index,
    kind: u8,
    byte: u8,
}

const LIST: usize = 4;

fn piece() -> impl Strategy<Value = Piece> {
    let shift = prop_oneof![12 => Just(0_i64), 1 => -2..=2_i64];
    let opinion =
        prop::sample::select(vec!["allow", "allow", "allow", "deny", "none", "Allow", ""]);
    let answer = (0..LIST, shift, opinion).prop_map(|(question, shift, opinion)| Piece::Answer {
        question,
        shift,
        opinion,
    });
    let bytes = prop::collection::vec(
        prop::sample::select(b"{}[]\",:1xnidallow\n \0\xff".to_vec()),
        0..20,
    );
    prop_oneof![20 => answer, 1 => bytes.prop_map(Piece::Bytes)]
}

fn edits() -> impl Strategy<Value = Vec<Edit>> {
    let edit = (any::<prop::sample::Index>(), 0..4_u8, any::<u8>());
    let edit = edit.prop_map(|(at, kind, byte)| Edit { at, kind, byte });
    prop_oneof![
        2 => Just(Vec::new()),
        1 => prop::collection::vec(edit, 1..4)
    ]
}

/// Puts a script into bytes, now that the questions' numbers are known.
fn render(pieces: &[Piece], edits: &[Edit], first: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    for piece in pieces {
        match piece {
            Piece::Answer {
                question,
                shift,
                opinion,
            } => {
                let id = (first + *question as u64).wrapping_add_signed(*shift);
                let answer = json!({"xman": 1, "id": id, "opinion": opinion, "rule": "r"});
                bytes.extend(format!("{answer}\n").bytes());
            }
            Piece::Bytes(more) => bytes.extend(more),
        }
    }
    for edit in edits
        .iter()
        .filter(|_| !bytes.is_empty())
        .collect::<Vec<_>>()
    {
        if bytes.is_empty() {
            break;
        }
        let at = edit.at.index(bytes.len());
        match edit.kind {
            0 => bytes[at] = edit.byte,
            1 => bytes.insert(at, edit.byte),
            2 => drop(bytes.remove(at)),
            _ => bytes.truncate(at),
        }
    }
    bytes
}

/// Returns how often the bytes hold a whole line that answers that question with "allow", as another reader of JSON sees it.
fn allowing_lines(bytes: &[u8], id: u64) -> usize {
    let whole = bytes.iter().rposition(|byte| *byte == b'\n').unwrap_or(0);
    bytes[..whole]
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok())
        .filter(|line| {
            line["xman"] == 1
                && line["id"] == id
                && line["opinion"] == "allow"
                && line["rule"].is_string()
        })
        .count()
}

#[test]
fn whatever_is_said_nothing_is_allowed_but_what_was_allowed() {
    type Script = (Vec<Piece>, Vec<Edit>);
    let place = Place::new();
    let script = Arc::new(Mutex::new(Script::default()));
    let (sender, said) = mpsc::channel();
    let scripts = Arc::clone(&script);
    place.listen(move |mut peer| {
        let first = id(&peer.questions(LIST)[0]);
        let (pieces, edits) = scripts.lock().unwrap().clone();
        let bytes = render(&pieces, &edits, first);
        peer.say(&bytes);
        sender.send((first, bytes)).unwrap();
    });
    let (permitted, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let config = ProptestConfig {
        cases: 2000,
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    proptest!(config, |(pieces in prop::collection::vec(piece(), 0..8), edits in edits())| {
        *script.lock().unwrap() = (pieces, edits);
        // a new backend each time: no connection is kept, so each script is said exactly once
        let opinions = judge_many(&place.backend(AMPLE), LIST);
        let (first, bytes) = said.recv_timeout(AMPLE).unwrap();
        for (id, opinion) in (first..).zip(opinions) {
            match opinion {
                Opinion::Allow { rule, administrator } => {
                    prop_assert!(!administrator && rule.starts_with("external:"));
                    prop_assert!(allowing_lines(&bytes, id) > 0, "{id}: {}", String::from_utf8_lossy(&bytes));
                    permitted.fetch_add(1, Ordering::Relaxed);
                }
                Opinion::Deny { .. } | Opinion::None => { refused.fetch_add(1, Ordering::Relaxed); }
            }
        }
    });
    let (permitted, refused) = (permitted.into_inner(), refused.into_inner());
    assert!(
        permitted > 500 && refused > 500,
        "{permitted} allowed, {refused} not"
    );
}

// --- the authority that we ship ---

/// A process that listens, killed when dropped. What it writes to stderr is kept.
struct Authority {
    child: Child,
    log: Arc<Mutex<String>>,
}

impl Authority {
    fn start(command: &mut Command) -> Self {
        let spawned = command.stderr(Stdio::piped()).spawn();
        let mut child = spawned.expect("Python is needed: apt install python3");
        let log = Arc::new(Mutex::new(String::new()));
        let (lines, kept) = (
            BufReader::new(child.stderr.take().unwrap()),
            Arc::clone(&log),
        );
        thread::spawn(move || {
            for line in lines.lines() {
                *kept.lock().unwrap() += &(line.unwrap() + "\n");
            }
        });
        Self { child, log }
    }

    fn shipped(place: &Place) -> Self {
        let mut command = script();
        let rules = place.folder.path().join("authority.toml");
        command
            .arg("--rules")
            .arg(rules)
            .arg("--socket")
            .arg(&place.socket);
        let authority = Self::start(&mut command);
        authority.says("listening at");
        authority
    }

    #[track_caller]
    fn says(&self, text: &str) {
        eventually(text, || self.log.lock().unwrap().contains(text));
    }

    /// Stops it as systemd does, and returns its exit status.
    fn stop(mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Authority {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn script() -> Command {
    let mut command = Command::new("python3");
    command.arg(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../deploy/xman-authority.py"
    ));
    command
}

impl Place {
    /// Puts new rules there at once.
    fn rules(&self, text: &str) {
        let new = self.folder.path().join("new.toml");
        fs::write(&new, text).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o644)).unwrap();
        fs::rename(&new, self.folder.path().join("authority.toml")).unwrap();
    }
}

const RULES: &str = r#"
[[rule]]
name = "no-pausing-of-db"
opinion = "deny"
actions = ["pause"]
domains = ["db"]
reason = "the database must not stop"

[[rule]]
name = "owners-use"
opinion = "allow"
actions = ["pause", "start"]
principals = ["*@EX.ORG"]
owner = true

[[rule]]
name = "operators-look"
opinion = "allow"
actions = ["list"]
unix-groups = ["operators"]
ttl-ms = 60000

[[rule]]
name = "jobs"
opinion = "allow"
lease = true
classes = ["grid"]

[[rule]]
name = "strangers"
opinion = "none"
reason = "write to operators@example.org"
"#;

#[test]
fn the_authority_that_we_ship_goes_by_its_rules() {
    let place = Place::new();
    place.rules(RULES);
    let _authority = Authority::shipped(&place);
    let mode = fs::symlink_metadata(&place.socket).unwrap().mode();
    assert_eq!(mode & 0o777, 0o600);
    let backend = place.backend(AMPLE);
    let alice = person("alice@EX.ORG");
    let foreign = person("alice@XMAN.TEST");
    let operator = Person {
        unix_groups: UnixGroups::Known(vec!["operators".to_owned()]),
        ..person("bob@EX.ORG")
    };
    let (web, db): (DomainName, DomainName) = ("web".parse().unwrap(), "db".parse().unwrap());
    let hers = Metadata {
        owners: BTreeSet::from([alice.principal.clone(), foreign.principal.clone()]),
        ..Metadata::default()
    };
    let grid = Metadata {
        class: Some("grid".parse().unwrap()),
        ..Metadata::default()
    };
    let lease = Lease {
        user: alice.principal.clone(),
        job: "slurm/4711".to_owned(),
    };
    let leased = DomainFacts {
        lease: Some(&lease),
        ..facts(&web, Ok(&grid))
    };
    let allow = |rule: &str| Opinion::Allow {
        rule: format!("external:{rule}"),
        administrator: false,
    };
    let on = Subject::Domain;
    for (who, verb, subject, expected) in [
        (
            &alice,
            Verb::Pause,
            on(facts(&web, Ok(&hers))),
            allow("owners-use"),
        ),
        (
            &alice,
            Verb::Destroy,
            on(facts(&web, Ok(&hers))),
            Opinion::None,
        ),
        (
            &foreign,
            Verb::Pause,
            on(facts(&web, Ok(&hers))),
            Opinion::None,
        ),
        (
            &alice,
            Verb::Pause,
            on(facts(&db, Ok(&hers))),
            Opinion::Deny {
                reason: "no-pausing-of-db: the database must not stop".to_owned(),
            },
        ),
        (
            &alice,
            Verb::Start,
            on(facts(&db, Ok(&hers))),
            allow("owners-use"),
        ),
        (
            &operator,
            Verb::List,
            Subject::Host,
            allow("operators-look"),
        ),
        (&alice, Verb::List, Subject::Host, Opinion::None),
        (&alice, Verb::Destroy, on(leased), allow("jobs")),
        (&operator, Verb::Destroy, on(leased), Opinion::None),
        (&alice, Verb::Pause, Subject::UnknownDomain, Opinion::None),
    ] {
        let query = ask(who, verb, subject);
        assert_eq!(backend.judge(&query), expected, "{query:?}");
    }
    let wants = backend.wants(&ask(&alice, Verb::List, Subject::Host));
    assert_eq!(wants, ["write to operators@example.org"]);
    let said = backend.check().unwrap();
    assert!(
        said.ends_with("whoami of nobody@XMAN.INVALID: none"),
        "{said}"
    );
}

#[test]
fn its_rules_count_from_the_next_question_on_and_broken_ones_deny() {
    let place = Place::new();
    let rule = |opinion: &str| format!("[[rule]]\nname = \"r\"\nopinion = \"{opinion}\"\n");
    place.rules(&rule("allow"));
    let authority = Authority::shipped(&place);
    let backend = place.backend(AMPLE);
    assert_eq!(judge(&backend), allowed());
    place.rules(&rule("deny"));
    denied(&judge(&backend), "r");
    place.rules(&rule("none"));
    assert_eq!(judge(&backend), Opinion::None);
    for broken in [
        "[[rule]]\n",
        "garbage",
        "[[rule]]\nname = \"r\"\nopinion = \"allow\"\nowners = true\n",
    ] {
        place.rules(broken);
        denied(&judge(&backend), "no rules that it can read");
    }
    place.rules(&rule("allow"));
    assert_eq!(judge(&backend), allowed());
    let file = place.folder.path().join("authority.toml");
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();
    denied(&judge(&backend), "no rules that it can read");
    fs::remove_file(&file).unwrap();
    denied(&judge(&backend), "no rules that it can read");
    authority.says("everything is denied");
}

#[test]
fn its_remembered_opinions_outlive_their_rule_and_no_longer() {
    let place = Place::new();
    place.rules("[[rule]]\nname = \"r\"\nopinion = \"allow\"\nttl-ms = 300\n");
    let _authority = Authority::shipped(&place);
    let backend = place.backend(AMPLE);
    assert_eq!(judge(&backend), allowed());
    let answered = Instant::now();
    place.rules("[[rule]]\nname = \"r\"\nopinion = \"deny\"\n");
    eventually("the new rule counts", || {
        let began = Instant::now();
        let is_denied = judge(&backend) != allowed();
        assert!(is_denied || began < answered + Duration::from_millis(300));
        is_denied
    });
}

#[test]
fn it_cleans_up_after_itself_and_after_one_that_died_and_leaves_the_living_alone() {
    let place = Place::new();
    place.rules(RULES);
    let mut authority = Authority::shipped(&place);
    let backend = place.backend(AMPLE);
    backend.check().unwrap();

    let mut second = script();
    let output = second.arg("--socket").arg(&place.socket).output().unwrap();
    assert!(!output.status.success());
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        said.contains("an authority listens there already"),
        "{said}"
    );
    backend.check().unwrap();

    authority.child.kill().unwrap();
    authority.child.wait().unwrap();
    assert!(place.socket.exists());
    denied(&judge(&backend), "does the authority run?");
    let authority = Authority::shipped(&place);
    backend.check().unwrap();
    assert_eq!(authority.stop(), Some(0));
    assert!(!place.socket.exists());
    denied(&judge(&backend), "there is no socket");

    fs::write(&place.socket, "not a socket").unwrap();
    let output = script()
        .arg("--socket")
        .arg(&place.socket)
        .output()
        .unwrap();
    assert!(!output.status.success());
    assert_eq!(fs::read_to_string(&place.socket).unwrap(), "not a socket");
}

#[test]
fn it_checks_its_rules_and_names_what_is_wrong() {
    let place = Place::new();
    let check = |rules: &str| {
        place.rules(rules);
        let file = place.folder.path().join("authority.toml");
        let output = script().arg("--check").arg(file).output().unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.success(), String::from_utf8(said).unwrap())
    };
    let (good, said) = check(RULES);
    assert!(
        good && said.contains("deny  no-pausing-of-db\nallow owners-use\n"),
        "{said}"
    );
    for (rules, why) in [
        ("[[rule]]\nopinion = \"allow\"", "rule 1: name"),
        ("[[rule]]\nname = \"\"\nopinion = \"allow\"", "rule 1: name"),
        (
            "[[rule]]\nname = \"a\\nb\"\nopinion = \"allow\"",
            "rule 1: name",
        ),
        (
            "[[rule]]\nname = \"r\"\nopinion = \"yes\"",
            "rule 1: opinion",
        ),
        (
            "[[rule]]\nname = \"r\"\nopinion = \"allow\"\nowner = 1",
            "rule 1: owner",
        ),
        (
            "[[rule]]\nname = \"r\"\nopinion = \"allow\"\nhosts = \"a\"",
            "rule 1: hosts",
        ),
        (
            "[[rule]]\nname = \"r\"\nopinion = \"allow\"\nttl-ms = -1",
            "rule 1: ttl-ms",
        ),
        (
            "[[rule]]\nname = \"r\"\nopinion = \"allow\"\nttl = 1",
            "unknown key 'ttl'",
        ),
        ("[rules]\n", "[[rule]] and nothing else"),
        ("[[rule]\n", "Expected"),
    ] {
        let (good, said) = check(rules);
        assert!(!good && said.contains(why), "{rules}: {said}");
    }
}

#[test]
fn what_it_costs() {
    const ROUNDS: u32 = 200;
    let place = Place::new();
    place.rules(RULES);
    let _authority = Authority::shipped(&place);
    let backend = place.backend(AMPLE);
    judge(&backend);
    let began = Instant::now();
    for _ in 0..ROUNDS {
        assert_eq!(judge(&backend), Opinion::None);
    }
    let one = began.elapsed() / ROUNDS;
    let computed = || {
        let time = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::try_from(time).unwrap()
    };
    let (began, before) = (Instant::now(), computed());
    assert_eq!(judge_many(&backend, 1000), vec![Opinion::None; 1000]);
    println!(
        "{one:?} for one question, {:?} for a list of 1000",
        began.elapsed()
    );
    // Many times what it takes. That nobody waits for each answer of a list is held by the test of how many are in flight.
    let took = computed() - before;
    assert!(took < Duration::from_secs(10), "{took:?}");
}

// --- the page on the protocol ---

/// docs/AUTHORITY.md is what others write their authorities from: its conversation is held with the real code, its limits are the code's.
#[test]
fn the_conversation_on_the_page_is_real_and_its_limits_are_the_codes() {
    let page = include_str!("../../docs/AUTHORITY.md");
    let conversation: Vec<(char, Value)> = page
        .split_once("```conversation\n")
        .and_then(|(_, rest)| rest.split_once("```"))
        .unwrap()
        .0
        .lines()
        .map(|line| {
            (
                line.chars().next().unwrap(),
                serde_json::from_str(&line[2..]).unwrap(),
            )
        })
        .collect();
    let side = |mark| {
        let of_that_side = conversation.iter().filter(move |(side, _)| *side == mark);
        of_that_side
            .map(|(_, message)| message.clone())
            .collect::<Vec<Value>>()
    };
    let (questions, answers) = (side('>'), side('<'));
    let first = id(&questions[0]);

    let (sender, asked) = mpsc::channel();
    let place = Place::new();
    let count = questions.len();
    place.listen(move |mut peer| {
        let real = peer.questions(count);
        let shift = id(&real[0]).wrapping_sub(first);
        for answer in &answers {
            let mut answer = answer.clone();
            answer["id"] = id(&answer).wrapping_add(shift).into();
            peer.answer(&answer);
        }
        sender.send((real, shift)).unwrap();
    });

    let alice = Person {
        principal: "alice@EXAMPLE.ORG".parse().unwrap(),
        unix_groups: UnixGroups::Known(vec!["users".to_owned(), "operators".to_owned()]),
    };
    let (bob, portal) = (person("bob@EXAMPLE.ORG"), person("portal/web@EXAMPLE.ORG"));
    let (grid, web): (DomainName, DomainName) = ("grid-7".parse().unwrap(), "web".parse().unwrap());
    let metadata = Metadata {
        owners: BTreeSet::from([alice.principal.clone()]),
        class: Some("grid".parse().unwrap()),
        labels: [("rack".parse().unwrap(), "b 12".parse().unwrap())].into(),
    };
    let lease = Lease {
        user: bob.principal.clone(),
        job: "slurm/4711".to_owned(),
    };
    let uuid = "6f0f6a3e-7b7c-4f0e-9d0b-2f1c5d0c7a11".parse().unwrap();
    let facts = DomainFacts {
        uuid,
        hypervisor: "qemu:///system",
        lease: Some(&lease),
        ..facts(&grid, Ok(&metadata))
    };
    let query = |person, action, on, acting| Query {
        person,
        action,
        on,
        peer: "10.0.0.1".parse().unwrap(),
        acting,
    };
    let new = Subject::NewDomain {
        name: &web,
        uuid: None,
    };
    let queries = [
        query(&alice, Verb::Pause.into(), Subject::Domain(facts), None),
        query(
            &bob,
            Verb::Info.into(),
            Subject::Host,
            Some(&portal.principal),
        ),
        query(&bob, Verb::Start.into(), Subject::UnknownDomain, None),
        query(&alice, Verb::Define.into(), new, None),
        query(&portal, Action::ActFor, Subject::Person(&bob), None),
    ];
    let opinions = place.backend(AMPLE).judge_all(&queries);
    let (real, shift) = asked.recv_timeout(AMPLE).unwrap();
    for (real, mut written) in real.into_iter().zip(questions) {
        written["id"] = id(&written).wrapping_add(shift).into();
        assert_eq!(real, written, "xmand asks otherwise: {real}");
    }
    let allow = |rule: &str| Opinion::Allow {
        rule: rule.to_owned(),
        administrator: false,
    };
    let deny = |reason: &str| Opinion::Deny {
        reason: reason.to_owned(),
    };
    assert_eq!(
        opinions,
        [
            allow("external:owners-use"),
            Opinion::None,
            deny("strangers: ask operators@example.org"),
            deny("no new domains during the move"),
            allow("external:portal-acts"),
        ]
    );

    for row in [
        format!("| longest line, either way | {MAX_LINE} bytes |"),
        format!(
            "| longest lifetime of an answer | {} s |",
            MAX_TTL.as_secs()
        ),
        format!("| answers remembered | {MAX_REMEMBERED} |"),
        format!("| connections | {MAX_CONNECTIONS} |"),
        format!("| questions in flight on each | {MAX_IN_FLIGHT} |"),
        format!("| longest deadline | {} s |", MAX_WAIT.as_secs()),
    ] {
        assert!(page.contains(&row), "{row}");
    }
    for action in Action::all() {
        assert!(page.contains(&format!("`{action}`")), "{action}");
    }
    for state in DomainState::ALL {
        assert!(page.contains(&format!("`{state}`")), "{state}");
    }
}
