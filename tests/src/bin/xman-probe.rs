//! A caller that speaks the protocol by hand, so that tests can say what no honest program says.
//!
//! `xman-probe ADDRESS ACT`, with a ticket in the environment. Prints one line for each thing that the host answers, and ends when the
//! host closes the connection (`closed`) or the act is over.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a probe that cannot go on fails its test"
)]

use std::{
    env,
    io::{ErrorKind, Read, Write},
    net::TcpStream,
    thread,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use uuid::Uuid;
use xman_common::{
    channel::{HOST_PREFACE, MAGIC},
    codec,
    gss::{Context, Initiator, Step},
    name::{DomainRef, HostName},
    protocol::{
        Call, CallHeader, Cursor, Describe, Events, FromCaller, FromHost, Hello, List, OnDomain,
        Request, Undefine, Unpause, VERSION, Verb, Whoami,
    },
};

fn main() {
    let mut arguments = env::args().skip(1);
    let (address, act) = (arguments.next().unwrap(), arguments.next().unwrap());
    let mut peer = Peer::connect(&address);
    match act.as_str() {
        // Before authentication.
        "silent" => peer.wait_for_close(),
        "trickle" => peer.trickle(),
        "not-xman" => peer.say_raw(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"),
        "other-version" => {
            peer.preface(7, 9);
            peer.wait_for_close();
        }
        "giant-handshake" => {
            peer.preface(VERSION, VERSION);
            peer.say_raw(&u32::MAX.to_be_bytes());
        }
        "half-frame" => {
            peer.preface(VERSION, VERSION);
            peer.stream.write_all(&[0, 0, 1, 0, 0, 1, 2, 3]).unwrap();
            println!("closed");
        }
        "garbage-token" => {
            peer.preface(VERSION, VERSION);
            let mut frame = vec![0u8];
            frame.extend((0..999u32).map(|i| (i * 37 % 251) as u8));
            peer.write_frame(&frame);
            peer.print_frame();
            peer.wait_for_close();
        }
        "replayed-handshake" => {
            let token = peer.authenticate();
            let mut again = Peer::connect(&address);
            again.preface(VERSION, VERSION);
            let mut frame = vec![0u8];
            frame.extend(&token);
            again.write_frame(&frame);
            again.print_frame();
            again.wait_for_close();
        }
        // After it.
        "tampered-hello" => {
            peer.authenticate();
            let mut preface = peer.caller_preface.clone();
            preface[7] = 9;
            let hello = FromCaller::Hello(Hello {
                preface,
                ..peer.hello()
            });
            peer.send(&hello);
            peer.wait_for_close();
        }
        "call-before-hello" => {
            peer.authenticate();
            peer.call(&Request::Whoami(Whoami {}));
            peer.wait_for_close();
        }
        "garbage-after-ticket" => {
            peer.greet();
            peer.write_frame(&[0xA5; 300]);
            peer.wait_for_close();
        }
        "giant-frame" => {
            peer.greet();
            peer.say_raw(&u32::MAX.to_be_bytes());
        }
        "sealed-garbage" => {
            peer.greet();
            let sealed = peer.context().wrap(&[0xFF; 200]).unwrap();
            peer.write_frame(&sealed);
            peer.wait_for_close();
        }
        "replayed-frame" => {
            peer.greet();
            let frame = peer.sealed_call(&Request::Whoami(Whoami {}));
            peer.write_frame(&frame);
            peer.print_until_done();
            peer.write_frame(&frame);
            peer.wait_for_close();
        }
        "swapped-frames" => {
            peer.greet();
            let first = peer.sealed_call(&Request::Whoami(Whoami {}));
            let second = peer.sealed_call(&Request::Whoami(Whoami {}));
            peer.write_frame(&second);
            peer.write_frame(&first);
            peer.wait_for_close();
        }
        "reflected-frame" => {
            peer.greet();
            peer.call(&Request::Whoami(Whoami {}));
            let frame = peer.read_frame().unwrap();
            peer.write_frame(&frame);
            peer.wait_for_close();
        }
        "unknown-verb" => {
            peer.greet();
            peer.send(&FromCaller::Call(call(
                Uuid::new_v4(),
                999,
                b"whatever".to_vec(),
            )));
            peer.print_until_done();
            peer.send(&FromCaller::Call(call(
                Uuid::new_v4(),
                Verb::Pause.code(),
                vec![1, 2, 3],
            )));
            peer.print_until_done();
            peer.call(&Request::Whoami(Whoami {}));
            peer.print_until_done();
        }
        // Names that no honest program can even write down.
        "odd-names" => {
            peer.greet();
            for name in [
                "a\nb",
                "a\0b",
                "../etc/passwd",
                "",
                "..",
                &"x".repeat(10_000),
                "a\u{202e}b",
            ] {
                let body = codec::encode(&(1_u32, name)).unwrap();
                let describe = [body.as_slice(), &[0]].concat();
                peer.send(&FromCaller::Call(call(
                    Uuid::new_v4(),
                    Verb::Describe.code(),
                    describe,
                )));
                peer.print_until_done();
                peer.send(&FromCaller::Call(call(
                    Uuid::new_v4(),
                    Verb::Destroy.code(),
                    body,
                )));
                peer.print_until_done();
            }
            peer.call(&Request::Whoami(Whoami {}));
            peer.print_until_done();
        }
        "on-behalf-of" => {
            peer.greet();
            let request = Request::Whoami(Whoami {});
            let mut call = call(
                Uuid::new_v4(),
                request.verb().code(),
                request.body().unwrap(),
            );
            call.header.on_behalf_of = Some("root@XMAN.TEST".parse().unwrap());
            peer.send(&FromCaller::Call(call));
            peer.print_until_done();
        }
        "never-reads" => {
            peer.greet();
            // Answers pile up in the sockets until the host cannot write, stops reading, and our writes stop too.
            for _ in 0..1_000_000 {
                let frame = peer.sealed_call(&Request::List(List::default()));
                if peer.try_write_frame(&frame).is_err() {
                    break;
                }
            }
            peer.write_until_closed();
        }
        "flood" => {
            peer.greet();
            let calls = 500;
            for _ in 0..calls {
                peer.call(&Request::Whoami(Whoami {}));
            }
            for _ in 0..calls {
                peer.print_until_done();
            }
        }
        // One call after another: `many COUNT`.
        "many" => {
            let count: usize = arguments.next().unwrap().parse().unwrap();
            peer.greet();
            for _ in 0..count {
                peer.call(&Request::Whoami(Whoami {}));
                peer.print_until_done();
            }
        }
        "idle" => {
            peer.greet();
            println!("ready");
            peer.print_until_closed();
        }
        "follow-kernel" => {
            peer.greet();
            let follow = Request::Dmesg(xman_common::protocol::Dmesg {
                domain: None,
                follow: true,
            });
            peer.call(&follow);
            println!("ready");
            peer.print_until_closed();
        }
        // Follows all events and reads nothing more until somebody says so.
        "deaf-events" => {
            peer.greet();
            // The kernel would take in megabytes for it.
            rustix::net::sockopt::set_socket_recv_buffer_size(&peer.stream, 64 * 1024).unwrap();
            let oldest = Cursor {
                book: Uuid::nil(),
                number: 0,
            };
            peer.call(&Request::Events(Events {
                patterns: Vec::new(),
                since: Some(oldest),
                follow: true,
            }));
            assert!(matches!(peer.receive(), Some(FromHost::Items { .. })));
            println!("ready");
            std::io::stdin().read_line(&mut String::new()).unwrap();
            peer.print_until_done();
        }
        // Pauses and unpauses in turn: `toggle COUNT NAME`.
        "toggle" => {
            let count: usize = arguments.next().unwrap().parse().unwrap();
            let domain: DomainRef = arguments.next().unwrap().parse().unwrap();
            peer.greet();
            for at in 0..count {
                let on = OnDomain {
                    domain: domain.clone(),
                };
                peer.call(&match at % 2 {
                    0 => Request::Pause(on),
                    _ => Request::Unpause(Unpause {
                        domain: on.domain,
                        force: false,
                    }),
                });
                let mut done = peer.receive();
                while matches!(done, Some(FromHost::Alive)) {
                    done = peer.receive();
                }
                assert!(
                    matches!(done, Some(FromHost::Done { outcome: Ok(_), .. })),
                    "{done:?}"
                );
            }
            println!("toggled {count}");
        }
        // One id, twice: `twice VERB NAME [VERB NAME]`.
        "twice" => {
            let first = on_domain(&mut arguments);
            let second = if arguments.len() > 0 {
                on_domain(&mut arguments)
            } else {
                first.clone()
            };
            peer.greet();
            let id = Uuid::new_v4();
            for request in [first, second] {
                peer.send(&FromCaller::Call(call(
                    id,
                    request.verb().code(),
                    request.body().unwrap(),
                )));
                peer.print_until_done();
            }
        }
        // A given id once: `with-id ID VERB NAME`.
        "with-id" => {
            let id = arguments.next().unwrap().parse().unwrap();
            let request = on_domain(&mut arguments);
            peer.greet();
            peer.send(&FromCaller::Call(call(
                id,
                request.verb().code(),
                request.body().unwrap(),
            )));
            peer.print_until_done();
        }
        // Hangs up as soon as the call is sent: `hang-up ID VERB NAME`.
        "hang-up" => {
            let id = arguments.next().unwrap().parse().unwrap();
            let request = on_domain(&mut arguments);
            peer.greet();
            peer.send(&FromCaller::Call(call(
                id,
                request.verb().code(),
                request.body().unwrap(),
            )));
        }
        // Sends changes and lets go of each at once: `let-go COUNT same|new VERB NAME`.
        "let-go" => {
            let count: usize = arguments.next().unwrap().parse().unwrap();
            let is_same = arguments.next().unwrap() == "same";
            let request = on_domain(&mut arguments);
            peer.greet();
            let same = Uuid::new_v4();
            for _ in 0..count {
                let id = if is_same { same } else { Uuid::new_v4() };
                peer.send(&FromCaller::Call(call(
                    id,
                    request.verb().code(),
                    request.body().unwrap(),
                )));
                // Its outcome or the answer to this, whichever comes first.
                thread::sleep(Duration::from_millis(5));
                peer.send(&FromCaller::Cancel { call: id });
                peer.print_until_done();
            }
        }
        // `cancel-waiting VERB NAME`: a second call is cancelled while the first follows.
        "cancel" => {
            peer.greet();
            let follow = Request::Dmesg(xman_common::protocol::Dmesg {
                domain: None,
                follow: true,
            });
            let (first, second) = (Uuid::new_v4(), Uuid::new_v4());
            peer.send(&FromCaller::Call(call(
                first,
                follow.verb().code(),
                follow.body().unwrap(),
            )));
            let list = Request::List(List::default());
            peer.send(&FromCaller::Call(call(
                second,
                list.verb().code(),
                list.body().unwrap(),
            )));
            peer.send(&FromCaller::Cancel { call: second });
            peer.print_until_done();
            peer.send(&FromCaller::Cancel { call: first });
            peer.print_until_done();
            peer.call(&Request::Whoami(Whoami {}));
            peer.print_until_done();
        }
        // Sends without a pause, beyond the end of a ticket that it says is short: `outlive SECONDS`.
        "outlive" => {
            let life = Duration::from_secs(arguments.next().unwrap().parse().unwrap());
            peer.outlive(life);
        }
        "renew" => {
            peer.greet();
            peer.renew();
            peer.call(&Request::Whoami(Whoami {}));
            peer.print_until_done();
        }
        "list" => {
            let patterns = vec![arguments.next().unwrap()];
            peer.greet();
            peer.call(&Request::List(List {
                patterns,
                states: Vec::new(),
            }));
            peer.print_until_done();
        }
        "describe" => {
            let domain = DomainRef::Name(arguments.next().unwrap().parse().unwrap());
            peer.greet();
            peer.call(&Request::Describe(Describe {
                domain,
                inactive: false,
            }));
            peer.print_until_done();
        }
        other => panic!("no such act: {other}"),
    }
}

fn on_domain(arguments: &mut impl Iterator<Item = String>) -> Request {
    let verb = arguments.next().unwrap();
    let domain = arguments.next().unwrap().parse().unwrap();
    match verb.as_str() {
        "pause" => Request::Pause(OnDomain { domain }),
        "unpause" => Request::Unpause(Unpause {
            domain,
            force: false,
        }),
        "destroy" => Request::Destroy(OnDomain { domain }),
        "undefine" => Request::Undefine(Undefine {
            domain,
            discard_saved: false,
            discard_nvram: false,
        }),
        other => panic!("no such verb here: {other}"),
    }
}

fn call(id: Uuid, verb: u16, body: Vec<u8>) -> Call {
    let header = CallHeader {
        id,
        deadline_ms: Some(20_000),
        verb,
        hypervisor: None,
        on_behalf_of: None,
    };
    Call { header, body }
}

struct Peer {
    stream: TcpStream,
    caller_preface: Vec<u8>,
    host_preface: Vec<u8>,
    context: Option<Context>,
}

impl Peer {
    fn connect(address: &str) -> Self {
        let stream = TcpStream::connect(address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
            .set_write_timeout(Some(Duration::from_secs(5)))
            .unwrap();
        Self {
            stream,
            caller_preface: Vec::new(),
            host_preface: Vec::new(),
            context: None,
        }
    }

    fn context(&mut self) -> &mut Context {
        self.context.as_mut().unwrap()
    }

    fn preface(&mut self, lowest: u16, highest: u16) {
        self.caller_preface = [
            MAGIC.as_slice(),
            &lowest.to_be_bytes(),
            &highest.to_be_bytes(),
        ]
        .concat();
        self.stream.write_all(&self.caller_preface).unwrap();
        let mut answer = [0; HOST_PREFACE];
        match self.stream.read_exact(&mut answer) {
            Ok(()) => println!("version {}", u16::from_be_bytes([answer[4], answer[5]])),
            Err(_) => println!("closed"),
        }
        self.host_preface = answer.to_vec();
    }

    /// Does the whole handshake and returns the first token.
    fn authenticate(&mut self) -> Vec<u8> {
        self.preface(VERSION, VERSION);
        let host: HostName = "localhost".parse().unwrap();
        let Step::Continue(pending, token) = Initiator::new(&host).unwrap().step(None).unwrap()
        else {
            panic!("krb5 takes two tokens");
        };
        self.write_frame(&[&[0], token.as_slice()].concat());
        let answer = self.read_frame().expect("an answer to the token");
        assert_eq!(answer[0], 0, "the host refused: {answer:?}");
        let Step::Done(context, None) = pending.step(Some(&answer[1..])).unwrap() else {
            panic!("krb5 takes two tokens");
        };
        self.context = Some(context);
        token
    }

    fn hello(&mut self) -> Hello {
        let until = self
            .context()
            .until()
            .duration_since(UNIX_EPOCH)
            .unwrap()
            .as_secs();
        Hello {
            preface: self.caller_preface.clone(),
            answer: self.host_preface.clone(),
            software: "xman-probe".to_owned(),
            until,
        }
    }

    fn greet(&mut self) {
        self.authenticate();
        let hello = FromCaller::Hello(self.hello());
        self.send(&hello);
        assert!(matches!(self.receive(), Some(FromHost::Welcome(_))));
    }

    fn outlive(&mut self, life: Duration) {
        self.authenticate();
        let end = SystemTime::now() + life;
        let until = end.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let hello = Hello {
            until,
            ..self.hello()
        };
        self.send(&FromCaller::Hello(hello));
        assert!(matches!(self.receive(), Some(FromHost::Welcome(_))));
        // Sealed ahead, so that the host always finds a message more.
        let mut flood = Vec::new();
        let nothing = codec::encode(&FromCaller::Cancel {
            call: Uuid::new_v4(),
        })
        .unwrap();
        while SystemTime::now() < end - life / 2 {
            let sealed = self.context().wrap(&nothing).unwrap();
            flood.extend(u32::try_from(sealed.len()).unwrap().to_be_bytes());
            flood.extend(&sealed[..]);
        }
        // The host may take its time to read that; it is cut off when a write fails, and not when one takes long.
        let patience = Some(Duration::from_secs(60));
        self.stream.set_write_timeout(patience).unwrap();
        let mut sent = self.stream.write_all(&flood);
        while sent.is_ok() && SystemTime::now() < end + Duration::from_secs(30) {
            let sealed = self.context().wrap(&nothing).unwrap();
            sent = self.try_write_frame(&sealed);
        }
        let cut_off = sent.is_err_and(|error| error.kind() != ErrorKind::WouldBlock);
        let late = SystemTime::now().duration_since(end).unwrap_or_default();
        println!("cut off: {cut_off}, {} s late", late.as_secs());
    }

    fn send(&mut self, message: &FromCaller) {
        let sealed = self
            .context()
            .wrap(&codec::encode(message).unwrap())
            .unwrap();
        self.write_frame(&sealed);
    }

    fn sealed_call(&mut self, request: &Request) -> Vec<u8> {
        let call = call(
            Uuid::new_v4(),
            request.verb().code(),
            request.body().unwrap(),
        );
        let bytes = codec::encode(&FromCaller::Call(call)).unwrap();
        self.context().wrap(&bytes).unwrap().to_vec()
    }

    fn call(&mut self, request: &Request) {
        let frame = self.sealed_call(request);
        self.write_frame(&frame);
    }

    fn receive(&mut self) -> Option<FromHost> {
        let frame = self.read_frame()?;
        let opened = self.context().unwrap(&frame).unwrap();
        Some(codec::decode(opened.as_ref()).unwrap())
    }

    fn print_until_done(&mut self) {
        loop {
            match self.receive() {
                None => return println!("closed"),
                Some(FromHost::Done { outcome: Ok(_), .. }) => return println!("done ok"),
                Some(FromHost::Done {
                    outcome: Err(fault),
                    ..
                }) => {
                    return println!("done {}: {}", fault.code, fault.message);
                }
                Some(FromHost::Items { items, .. }) => println!("items {}", items.len()),
                Some(other) => println!("{}", kind(&other)),
            }
        }
    }

    fn print_until_closed(&mut self) {
        while let Some(message) = self.receive() {
            match message {
                FromHost::Items { .. } => {}
                FromHost::Done {
                    outcome: Err(fault),
                    ..
                } => println!("done {}: {}", fault.code, fault.message),
                FromHost::Closing(fault) => println!("closing {}: {}", fault.code, fault.message),
                other => println!("{}", kind(&other)),
            }
        }
        println!("closed");
    }

    fn renew(&mut self) {
        let host: HostName = "localhost".parse().unwrap();
        let Step::Continue(pending, token) = Initiator::new(&host).unwrap().step(None).unwrap()
        else {
            panic!("krb5 takes two tokens");
        };
        self.send(&FromCaller::Renew {
            token,
            until: u64::from(u32::MAX),
        });
        match self.receive() {
            Some(FromHost::Renewed { token, .. }) => {
                assert!(matches!(
                    pending.step(Some(&token)).unwrap(),
                    Step::Done(..)
                ));
                println!("renewed");
            }
            other => println!("not renewed: {other:?}"),
        }
    }

    fn write_frame(&mut self, frame: &[u8]) {
        self.try_write_frame(frame).unwrap();
    }

    fn try_write_frame(&mut self, frame: &[u8]) -> std::io::Result<()> {
        let length = u32::try_from(frame.len()).unwrap().to_be_bytes();
        self.stream.write_all(&[&length, frame].concat())
    }

    fn read_frame(&mut self) -> Option<Vec<u8>> {
        let mut length = [0; 4];
        self.stream.read_exact(&mut length).ok()?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        self.stream.read_exact(&mut frame).ok()?;
        Some(frame)
    }

    fn print_frame(&mut self) {
        match self.read_frame() {
            Some(frame) if frame.first() == Some(&1) => println!("refused {}", frame[1]),
            Some(frame) => println!("frame of {} bytes", frame.len()),
            None => println!("closed"),
        }
    }

    fn say_raw(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).unwrap();
        self.wait_for_close();
    }

    /// A byte at a time, as slowly as an attacker who wants to hold a place.
    fn trickle(&mut self) {
        for byte in MAGIC.iter().cycle() {
            if self.stream.write_all(&[*byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(300));
        }
        println!("closed");
    }

    fn write_until_closed(&mut self) {
        loop {
            match self.stream.write(&[0]) {
                Err(error) if error.kind() != ErrorKind::WouldBlock => return println!("closed"),
                Ok(_) | Err(_) => {}
            }
        }
    }

    fn wait_for_close(&mut self) {
        let mut rest = [0; 65_536];
        loop {
            match self.stream.read(&mut rest) {
                Ok(0) => return println!("closed"),
                Ok(_) => {}
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return println!("closed");
                }
                Err(error) => return println!("not closed: {error}"),
            }
        }
    }
}

fn kind(message: &FromHost) -> &'static str {
    match message {
        FromHost::Welcome(_) => "welcome",
        FromHost::Items { .. } => "items",
        FromHost::Progress { .. } => "progress",
        FromHost::Done { .. } => "done",
        FromHost::Alive => "alive",
        FromHost::Expiring { .. } => "expiring",
        FromHost::Renewed { .. } => "renewed",
        FromHost::Closing(_) => "closing",
        FromHost::Room { .. } => "room",
    }
}
