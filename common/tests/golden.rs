//! The bytes of every message of protocol version 1, compared with golden.txt.
//!
//! Who changes a message sees here what changes on the wire. `XMAN_GOLDEN=write cargo test -p xman-common --test golden` writes the file anew;
//! the review of its diff is the review of the change. From the first release on the lines that stand in it may not change any more.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    clippy::wildcard_enum_match_arm,
    reason = "a test ends where something is not as it should be"
)]

use std::{collections::BTreeSet, env, fmt::Debug, fs, path::PathBuf};

use serde::{Serialize, de::DeserializeOwned};
use uuid::Uuid;
use xman_common::{
    codec::{self, CodecError},
    name::{DomainName, DomainRef, HostName, JobId, Principal, Tag},
    protocol::{
        About, Ask, Attach, Attached, Autostart, Call, CallHeader, Carry, Code, Console,
        ConsoleNews, Create, Cursor, Define, Depth, Describe, Detach, Device, Disk, DiskFormat,
        Dmesg, DomainRow, DomainState, Effect, EventRow, Events, Explain, ExplainOther,
        ExplainStep, Explanation, Fault, FromCaller, FromHost, Gap, Happening, Hello, HoldRow,
        Holder, HostInfo, HypervisorInfo, HypervisorTrouble, Identity, ImageRow, Images, Info,
        Interface, Item, JobKey, JobList, JobRow, JobState, LeaseAnswer, LeaseBegin, LeaseEnd,
        LeaseKey, LeaseList, LeaseRow, LeaseState, Link, List, MAX_PATTERN, MAX_PATTERNS,
        MAX_RUNNING, MAX_XML, Maintenance, MemSet, Metadata, Migrate, MigrateIn, OnDomain, OnImage,
        OnJob, Permit, Preempt, Progress, Reconcile, Rename, Reply, Request, RestoreFrom, Resume,
        Room, SaveTo, SetClass, SetLabels, SetMaintenance, SetOwners, Settle, Settlement, Standing,
        Start, Status, StatusRow, Then, Undefine, Unpause, VcpuSet, Verb, Way, Welcome, Whoami,
    },
    wire::MAX_SEALED,
};

/// One message of one kind, and how bytes are read as that kind.
struct Sample {
    name: String,
    message: Message,
    reread: fn(&[u8]) -> Result<Message, CodecError>,
}

/// A message in words and in bytes.
#[derive(Debug, PartialEq)]
struct Message {
    value: String,
    bytes: Vec<u8>,
}

impl Message {
    fn new<T: Serialize + Debug>(value: &T) -> Self {
        Self {
            value: format!("{value:?}"),
            bytes: codec::encode(value).unwrap(),
        }
    }
}

fn message<T: Serialize + DeserializeOwned + Debug>(name: impl Into<String>, value: &T) -> Sample {
    Sample {
        name: name.into(),
        message: Message::new(value),
        reread: |bytes| codec::decode::<T>(bytes).map(|value| Message::new(&value)),
    }
}

/// A verb's arguments, as they stand in a call's body.
fn arguments(request: &Request) -> Sample {
    fn typed<T: Serialize + DeserializeOwned + Debug>(request: &Request, arguments: &T) -> Sample {
        let verb = request.verb();
        let sample = message(format!("verb {} {verb}", verb.code()), arguments);
        assert_eq!(sample.message.bytes, request.body().unwrap(), "{verb}");
        sample
    }
    match request {
        Request::Whoami(arguments) => typed(request, arguments),
        Request::List(arguments) => typed(request, arguments),
        Request::Info(arguments) => typed(request, arguments),
        Request::Dmesg(arguments) => typed(request, arguments),
        Request::Describe(arguments) | Request::DescribeSecrets(arguments) => {
            typed(request, arguments)
        }
        Request::Create(arguments) => typed(request, arguments),
        Request::Define(arguments) => typed(request, arguments),
        Request::Undefine(arguments) => typed(request, arguments),
        Request::Start(arguments) | Request::Restore(arguments) => typed(request, arguments),
        Request::SaveTo(arguments) => typed(request, arguments),
        Request::Images(arguments) => typed(request, arguments),
        Request::RestoreFrom(arguments) => typed(request, arguments),
        Request::DiscardImage(arguments) => typed(request, arguments),
        Request::Autostart(arguments) => typed(request, arguments),
        Request::Rename(arguments) => typed(request, arguments),
        Request::Attach(arguments) => typed(request, arguments),
        Request::Detach(arguments) => typed(request, arguments),
        Request::Console(arguments) => typed(request, arguments),
        Request::Events(arguments) => typed(request, arguments),
        Request::MigrateIn(arguments) => typed(request, arguments),
        Request::Carry(arguments) => typed(request, arguments),
        Request::Unpause(arguments) => typed(request, arguments),
        Request::Settle(arguments) => typed(request, arguments),
        Request::Destroy(arguments)
        | Request::Pause(arguments)
        | Request::Save(arguments)
        | Request::DiscardSaved(arguments)
        | Request::Reset(arguments)
        | Request::MigrateAbort(arguments) => typed(request, arguments),
        Request::Reboot(arguments) | Request::Shutdown(arguments) => typed(request, arguments),
        Request::MemSet(arguments) => typed(request, arguments),
        Request::VcpuSet(arguments) => typed(request, arguments),
        Request::Migrate(arguments) => typed(request, arguments),
        Request::JobList(arguments) => typed(request, arguments),
        Request::JobWait(arguments) | Request::JobCancel(arguments) => typed(request, arguments),
        Request::Owner(arguments) => typed(request, arguments),
        Request::Label(arguments) => typed(request, arguments),
        Request::Class(arguments) => typed(request, arguments),
        Request::Explain(arguments) => typed(request, arguments),
        Request::ExplainOther(arguments) => typed(request, arguments),
        Request::LeaseBegin(arguments) => typed(request, arguments),
        Request::LeaseEnd(arguments) => typed(request, arguments),
        Request::LeaseList(arguments) => typed(request, arguments),
        Request::Preempt(arguments) | Request::Freeze(arguments) => typed(request, arguments),
        Request::Resume(arguments) | Request::Thaw(arguments) => typed(request, arguments),
        Request::Status(arguments) => typed(request, arguments),
        Request::Reconcile(arguments) => typed(request, arguments),
        Request::Maintenance(arguments) => typed(request, arguments),
    }
}

fn call() -> Uuid {
    Uuid::from_u128(0x0001_0203_0405_0607_0809_0a0b_0c0d_0e0f)
}

fn uuid() -> Uuid {
    Uuid::from_u128(0xa0a1_a2a3_a4a5_a6a7_a8a9_aaab_acad_aeaf)
}

fn web() -> DomainName {
    "web".parse().unwrap()
}

fn by_uuid() -> DomainRef {
    DomainRef::Uuid(uuid())
}

fn by_name() -> DomainRef {
    DomainRef::Name(web())
}

fn alice() -> Principal {
    "alice@EX.ORG".parse().unwrap()
}

fn permit() -> Permit {
    Permit(std::array::from_fn(|at| u8::try_from(at).unwrap()))
}

fn nightly() -> Tag {
    "nightly".parse().unwrap()
}

fn cursor() -> Cursor {
    Cursor {
        book: call(),
        number: 17,
    }
}

fn slurm() -> Tag {
    "slurm".parse().unwrap()
}

fn key() -> LeaseKey {
    LeaseKey {
        job: JobKey {
            system: slurm(),
            cluster: "grid".parse().unwrap(),
            id: "4711".parse().unwrap(),
        },
        run: 2,
    }
}

fn job_id(id: &str) -> JobId {
    id.parse().unwrap()
}

/// Requests for every verb: who adds one is made to add it here.
fn requests() -> Vec<Request> {
    let of = |verb: &Verb| match verb {
        Verb::Whoami => vec![Request::Whoami(Whoami {})],
        Verb::List => vec![
            Request::List(List::default()),
            Request::List(List {
                patterns: vec!["grid-*".to_owned(), "web".to_owned()],
                states: vec![DomainState::Running, DomainState::Paused],
            }),
        ],
        Verb::Info => vec![Request::Info(Info {})],
        Verb::Dmesg => vec![
            Request::Dmesg(Dmesg {
                domain: None,
                follow: false,
            }),
            Request::Dmesg(Dmesg {
                domain: Some(by_name()),
                follow: true,
            }),
        ],
        Verb::Describe => vec![Request::Describe(Describe {
            domain: by_name(),
            inactive: false,
        })],
        Verb::DescribeSecrets => vec![Request::DescribeSecrets(Describe {
            domain: by_uuid(),
            inactive: true,
        })],
        Verb::Create => {
            vec![Request::Create(Create {
                xml: "<domain type='kvm'/>".to_owned(),
                define: true,
                paused: false,
            })]
        }
        Verb::Define => vec![
            Request::Define(Define {
                xml: "<domain type='kvm'/>".to_owned(),
                replaces: None,
            }),
            Request::Define(Define {
                xml: "<domain type='kvm'/>".to_owned(),
                replaces: Some("<domain type='qemu'/>".to_owned()),
            }),
        ],
        Verb::Undefine => {
            vec![Request::Undefine(Undefine {
                domain: by_uuid(),
                discard_saved: true,
                discard_nvram: false,
            })]
        }
        Verb::Start => vec![Request::Start(Start {
            domain: by_uuid(),
            paused: true,
        })],
        Verb::Destroy => vec![Request::Destroy(OnDomain { domain: by_uuid() })],
        Verb::Reboot => vec![Request::Reboot(Ask {
            domain: by_uuid(),
            wait: false,
            force: true,
        })],
        Verb::Shutdown => vec![Request::Shutdown(Ask {
            domain: by_uuid(),
            wait: true,
            force: false,
        })],
        Verb::Pause => {
            vec![
                Request::Pause(OnDomain { domain: by_uuid() }),
                Request::Pause(OnDomain { domain: by_name() }),
            ]
        }
        Verb::Unpause => vec![Request::Unpause(Unpause {
            domain: by_uuid(),
            force: true,
        })],
        Verb::MemSet => {
            vec![Request::MemSet(MemSet {
                domain: by_uuid(),
                kib: 2_097_152,
                config: true,
                maximum: false,
            })]
        }
        Verb::VcpuSet => vec![Request::VcpuSet(VcpuSet {
            domain: by_uuid(),
            count: 4,
            config: false,
            maximum: true,
        })],
        Verb::Migrate => vec![
            Request::Migrate(Migrate {
                domain: by_uuid(),
                destination: "skirit81".parse::<HostName>().unwrap(),
                bandwidth: None,
                downtime_ms: None,
                way: Way::Direct,
            }),
            Request::Migrate(Migrate {
                domain: by_uuid(),
                destination: "skirit81".parse::<HostName>().unwrap(),
                bandwidth: Some(100),
                downtime_ms: Some(300),
                way: Way::Channel {
                    port: 9626,
                    permit: permit(),
                },
            }),
        ],
        Verb::MigrateAbort => vec![Request::MigrateAbort(OnDomain { domain: by_uuid() })],
        Verb::JobList => vec![Request::JobList(JobList {})],
        Verb::JobWait => vec![Request::JobWait(OnJob { job: call() })],
        Verb::JobCancel => vec![Request::JobCancel(OnJob { job: call() })],
        Verb::Owner => vec![Request::Owner(SetOwners {
            domain: by_uuid(),
            add: [alice()].into(),
            remove: ["bob@EX.ORG".parse().unwrap()].into(),
        })],
        Verb::Label => vec![Request::Label(SetLabels {
            domain: by_uuid(),
            set: [("tier".parse().unwrap(), "prod".parse().unwrap())].into(),
            remove: ["old".parse().unwrap()].into(),
        })],
        Verb::Class => [Some("grid".parse().unwrap()), None]
            .map(|class| {
                Request::Class(SetClass {
                    domain: by_uuid(),
                    class,
                })
            })
            .into(),
        Verb::Explain => vec![Request::Explain(Explain {
            action: "pause".to_owned(),
            about: About::Domain(by_name()),
        })],
        Verb::ExplainOther => [About::Host, About::Person(alice())]
            .map(|about| {
                Request::ExplainOther(ExplainOther {
                    principal: alice(),
                    action: "act-for".to_owned(),
                    about,
                })
            })
            .into(),
        Verb::Save => vec![Request::Save(OnDomain { domain: by_uuid() })],
        Verb::Restore => vec![Request::Restore(Start {
            domain: by_uuid(),
            paused: false,
        })],
        Verb::DiscardSaved => vec![Request::DiscardSaved(OnDomain { domain: by_uuid() })],
        Verb::SaveTo => vec![Request::SaveTo(SaveTo {
            domain: by_uuid(),
            image: nightly(),
        })],
        Verb::Images => vec![Request::Images(Images {})],
        Verb::RestoreFrom => vec![Request::RestoreFrom(RestoreFrom {
            image: nightly(),
            paused: true,
        })],
        Verb::DiscardImage => vec![Request::DiscardImage(OnImage { image: nightly() })],
        Verb::Autostart => vec![Request::Autostart(Autostart {
            domain: by_uuid(),
            on: true,
        })],
        Verb::Reset => vec![Request::Reset(OnDomain { domain: by_uuid() })],
        Verb::Rename => vec![Request::Rename(Rename {
            domain: by_uuid(),
            name: "web2".parse().unwrap(),
        })],
        Verb::Attach => [
            Device::Disk(Disk {
                source: "/srv/images/data.qcow2".to_owned(),
                target: Some("vdb".parse().unwrap()),
                format: DiskFormat::Qcow2,
                read_only: true,
                shareable: false,
                cdrom: false,
            }),
            Device::Interface(Interface {
                link: Link::Bridge("br0".parse().unwrap()),
                mac: Some("52:54:00:12:34:56".parse().unwrap()),
                model: None,
            }),
        ]
        .map(|device| {
            Request::Attach(Attach {
                domain: by_uuid(),
                device,
                config: true,
            })
        })
        .into(),
        Verb::Detach => [
            Attached::Disk("vdb".parse().unwrap()),
            Attached::Interface("52:54:00:12:34:56".parse().unwrap()),
        ]
        .map(|device| {
            Request::Detach(Detach {
                domain: by_uuid(),
                device,
                config: false,
            })
        })
        .into(),
        Verb::Console => vec![Request::Console(Console {
            domain: by_uuid(),
            force: true,
        })],
        Verb::Events => vec![
            Request::Events(Events::default()),
            Request::Events(Events {
                patterns: vec!["grid-*".to_owned()],
                since: Some(cursor()),
                follow: true,
            }),
        ],
        Verb::MigrateIn => vec![Request::MigrateIn(MigrateIn {
            uuid: uuid(),
            name: web(),
            source: "skirit80".parse().unwrap(),
            memory_kib: 2_097_152,
        })],
        Verb::Carry => vec![Request::Carry(Carry {
            permit: permit(),
            uuid: uuid(),
            name: web(),
        })],
        Verb::Settle => [Settlement::Run, Settlement::Keep, Settlement::Drop]
            .map(|settlement| {
                Request::Settle(Settle {
                    permit: permit(),
                    settlement,
                })
            })
            .into(),
        Verb::LeaseBegin => vec![
            Request::LeaseBegin(LeaseBegin {
                key: key(),
                domain: by_uuid(),
                user: Some(alice()),
                preemptible: Some(true),
                ends_in_ms: None,
                reserve: false,
                wait: true,
            }),
            Request::LeaseBegin(LeaseBegin {
                key: key(),
                domain: by_name(),
                user: None,
                preemptible: None,
                ends_in_ms: Some(30_000),
                reserve: true,
                wait: false,
            }),
        ],
        Verb::LeaseEnd => vec![
            Request::LeaseEnd(LeaseEnd {
                key: key(),
                domain: None,
            }),
            Request::LeaseEnd(LeaseEnd {
                key: key(),
                domain: Some(DomainRef::Uuid(uuid())),
            }),
        ],
        Verb::LeaseList => vec![
            Request::LeaseList(LeaseList::default()),
            Request::LeaseList(LeaseList {
                system: Some(slurm()),
                key: Some(key()),
            }),
        ],
        Verb::Preempt => Depth::ALL
            .iter()
            .map(|depth| {
                Request::Preempt(Preempt {
                    domain: by_uuid(),
                    depth: Some(*depth),
                    lease: Some(key()),
                    reason: Some("a better job".parse().unwrap()),
                    wait: true,
                })
            })
            .collect(),
        Verb::Resume => vec![Request::Resume(Resume {
            domain: by_uuid(),
            lease: Some(key()),
            force: false,
            wait: true,
        })],
        Verb::Freeze => vec![Request::Freeze(Preempt {
            domain: by_uuid(),
            depth: None,
            lease: None,
            reason: None,
            wait: false,
        })],
        Verb::Thaw => vec![Request::Thaw(Resume {
            domain: by_uuid(),
            lease: None,
            force: true,
            wait: false,
        })],
        Verb::Status => vec![
            Request::Status(Status::default()),
            Request::Status(Status {
                patterns: vec!["grid-*".to_owned()],
            }),
        ],
        Verb::Reconcile => vec![Request::Reconcile(Reconcile {
            system: slurm(),
            cluster: "grid".parse().unwrap(),
            running: [(job_id("12[3].pbs01"), 2)].into(),
            age_ms: 1500,
        })],
        Verb::Maintenance => [Some("a new kernel".parse().unwrap()), None]
            .map(|reason| Request::Maintenance(SetMaintenance { reason }))
            .into(),
    };
    Verb::ALL
        .iter()
        .flat_map(|verb| {
            let requests = of(verb);
            assert!(
                !requests.is_empty() && requests.iter().all(|request| request.verb() == *verb),
                "{verb}"
            );
            requests
        })
        .collect()
}

fn from_caller() -> Vec<FromCaller> {
    let pause = Request::Pause(OnDomain { domain: by_uuid() });
    let header = CallHeader {
        id: call(),
        deadline_ms: None,
        verb: pause.verb().code(),
        hypervisor: None,
        on_behalf_of: None,
    };
    vec![
        FromCaller::Hello(Hello {
            preface: b"XMAN\x00\x01\x00\x01".to_vec(),
            answer: b"XMAN\x00\x01\x00\x00\x01\x8b\xcf\xe5\x68\x00".to_vec(),
            software: "rxm 0.1.0".to_owned(),
            until: 1_700_036_000,
        }),
        FromCaller::Call(Call {
            header: header.clone(),
            body: pause.body().unwrap(),
        }),
        FromCaller::Call(Call {
            header: CallHeader {
                deadline_ms: Some(30_000),
                hypervisor: Some("qemu:///system".to_owned()),
                on_behalf_of: Some(alice()),
                ..header
            },
            body: pause.body().unwrap(),
        }),
        FromCaller::Input {
            call: call(),
            bytes: vec![1, 2, 3],
        },
        FromCaller::Cancel { call: call() },
        FromCaller::Renew {
            token: vec![0x60, 0x01, 0x02],
            until: 1_700_072_000,
        },
    ]
}

fn from_host() -> Vec<FromHost> {
    vec![
        FromHost::Welcome(Welcome {
            preface: b"XMAN\x00\x01\x00\x01".to_vec(),
            answer: b"XMAN\x00\x01\x00\x00\x01\x8b\xcf\xe5\x68\x00".to_vec(),
            software: "xmand 0.1.0".to_owned(),
            principal: alice(),
            until: 1_700_036_000,
            session: "5f3a".to_owned(),
        }),
        FromHost::Items {
            call: call(),
            items: vec![Item::Text("line\n".to_owned())],
        },
        FromHost::Progress {
            call: call(),
            progress: progress(Some(1500)),
        },
        FromHost::Done {
            call: call(),
            outcome: Ok(Reply::Done),
        },
        FromHost::Done {
            call: call(),
            outcome: Err(Fault::new(Code::Denied, "you may not do that here")),
        },
        FromHost::Alive,
        FromHost::Expiring { seconds: 300 },
        FromHost::Renewed {
            token: vec![0x60, 0x03],
            until: 1_700_072_000,
        },
        FromHost::Closing(Fault::new(Code::Expired, "the ticket has ended")),
        FromHost::Room {
            call: call(),
            bytes: 65_536,
        },
    ]
}

fn replies() -> Vec<Reply> {
    vec![
        Reply::Done,
        Reply::Whoami(Identity {
            principal: alice(),
            until: 1_700_036_000,
            verbs: vec!["whoami".to_owned(), "list".to_owned()],
            rule: "k5login:1".to_owned(),
            groups: vec!["staff".to_owned()],
            acting: Some("portal/web@EX.ORG".parse().unwrap()),
            session: "5f3a".to_owned(),
        }),
        Reply::Info(HostInfo {
            hostname: "skirit80".to_owned(),
            xmand: "0.1.0".to_owned(),
            hypervisors: vec![HypervisorInfo {
                uri: "qemu:///system".to_owned(),
                driver: "QEMU".to_owned(),
                version: "10.0.2".to_owned(),
                libvirt: "11.3.0".to_owned(),
                trouble: String::new(),
                age_ms: 250,
            }],
            cpu_model: "EPYC".to_owned(),
            cpus: 64,
            mhz: 2450,
            memory_kib: 263_192_576,
            free_memory_kib: 131_072,
            load: [0.5, 1.0, 2.25],
            active: 3,
            domains: 5,
            used_vcpus: 12,
            used_memory_kib: 25_165_824,
            stuck_lanes: 0,
        }),
        Reply::Domain(row(Some(7))),
        Reply::Gone {
            name: web(),
            uuid: uuid(),
        },
        Reply::Memory {
            domain: row(Some(7)),
            asked_kib: 2_097_152,
        },
        Reply::Job(job(Some(1_700_000_009_000), None)),
        Reply::Explained(Explanation {
            principal: alice(),
            action: "pause".to_owned(),
            domain: "web".to_owned(),
            allowed: false,
            rule: "no rule allows it".to_owned(),
            steps: vec![ExplainStep {
                backend: "k5login".to_owned(),
                opinion: "none".to_owned(),
                because: String::new(),
                wants: vec!["alice@EX.ORG stands in a line of /root/.k5login".to_owned()],
            }],
        }),
        Reply::Permitted(permit()),
        Reply::Attached {
            domain: row(Some(7)),
            device: Attached::Disk("vdb".parse().unwrap()),
        },
        Reply::Lease(LeaseAnswer::Granted(lease(LeaseState::Active))),
        Reply::Lease(LeaseAnswer::Pending(lease(LeaseState::Preparing))),
        Reply::Lease(LeaseAnswer::Refused {
            why: "web needs 4 CPUs and 2 are free".to_owned(),
            then: Then::Later,
        }),
        Reply::Ended(vec![key()]),
        Reply::Standing(status(Standing::Frozen)),
        Reply::Room(Room {
            cpus: 64,
            used_cpus: 12,
            memory_kib: 260_046_848,
            used_memory_kib: 25_165_824,
            maintenance: Some(Maintenance {
                reason: "a new kernel".parse().unwrap(),
                principal: alice(),
                since_ms: 1_700_000_000_000,
            }),
        }),
    ]
}

fn lease(state: LeaseState) -> LeaseRow {
    LeaseRow {
        key: key(),
        domain: web(),
        uuid: uuid(),
        user: Some(alice()),
        principal: "slurm/ctl@EX.ORG".parse().unwrap(),
        state,
        preemptible: true,
        victims: vec!["idle".parse().unwrap()],
        began_ms: 1_700_000_000_000,
        ends_in_ms: (state == LeaseState::Reserved).then_some(30_000),
    }
}

fn status(standing: Standing) -> StatusRow {
    let hold = |holder, depth, reason: &str| HoldRow {
        holder,
        depth,
        reason: reason.to_owned(),
        since_ms: 1_700_000_000_000,
    };
    StatusRow {
        name: web(),
        uuid: uuid(),
        hypervisor: "qemu:///system".to_owned(),
        standing,
        since_ms: Some(1_700_000_000_000),
        class: Some("grid".parse().unwrap()),
        used_cpus: 2,
        available_cpus: 1,
        preempted_ms: 2_385_999,
        depth: Some(Depth::Freeze),
        doing: "its memory is written".to_owned(),
        holds: vec![
            hold(Holder::Room(Some(key())), Depth::Starve, ""),
            hold(Holder::Room(None), Depth::Starve, ""),
            hold(Holder::Job(key()), Depth::Pause, "suspended"),
            hold(Holder::Person(alice()), Depth::Freeze, "tonight"),
        ],
        leases: vec![key()],
    }
}

fn items() -> Vec<Item> {
    vec![
        Item::Domain(row(None)),
        Item::Text("řádek\n".to_owned()),
        Item::Job(job(None, Some(progress(None)))),
        Item::Trouble(HypervisorTrouble {
            hypervisor: "lxc:///system".to_owned(),
            why: "libvirt does not answer".to_owned(),
        }),
        Item::Image(ImageRow {
            image: nightly(),
            domain: web(),
            uuid: uuid(),
            hypervisor: "qemu:///system".to_owned(),
            bytes: 268_435_456,
            saved_ms: 1_700_000_000_000,
        }),
        Item::Bytes(b"login: ".to_vec()),
        Item::Console(ConsoleNews::Attached {
            keyboard: alice(),
            is_mine: true,
            others: vec!["bob@EX.ORG".parse().unwrap()],
        }),
        Item::Console(ConsoleNews::Joined(alice())),
        Item::Console(ConsoleNews::Left(alice())),
        Item::Console(ConsoleNews::Keyboard {
            principal: alice(),
            is_mine: false,
        }),
        Item::Console(ConsoleNews::Lost(4096)),
        Item::Event(EventRow {
            cursor: cursor(),
            at_ms: 1_700_000_000_000,
            hypervisor: "qemu:///system".to_owned(),
            name: web(),
            uuid: uuid(),
            what: Happening::Started,
            detail: "booted".to_owned(),
            state: DomainState::Running,
        }),
        Item::Cursor(cursor()),
        Item::Gap(Gap {
            cursor: cursor(),
            at_ms: 1_700_000_000_000,
            hypervisor: String::new(),
            why: "xmand was started anew".to_owned(),
        }),
        Item::Lease(lease(LeaseState::Reserved)),
        Item::Status(status(Standing::RunningPreemptible)),
    ]
}

fn row(id: Option<u32>) -> DomainRow {
    DomainRow {
        name: web(),
        uuid: uuid(),
        hypervisor: "qemu:///system".to_owned(),
        id,
        state: if id.is_some() {
            DomainState::Running
        } else {
            DomainState::Off
        },
        reason: "booted".to_owned(),
        memory_kib: 1_048_576,
        max_memory_kib: 2_097_152,
        vcpus: 2,
        max_vcpus: 4,
        cpu_time_ns: 123_456_789_000,
        autostart: false,
        persistent: true,
        saved: id.is_none(),
        since_ms: id.map(|_| 1_700_000_000_000),
        standing: id.map(|_| Standing::Running),
        preempted_ms: 61_500,
        metadata: Metadata {
            owners: [alice()].into(),
            class: Some("grid".parse().unwrap()),
            labels: [("tier".parse().unwrap(), "prod".parse().unwrap())].into(),
        },
        metadata_trouble: String::new(),
        age_ms: 17,
        stale: false,
    }
}

fn job(ended_ms: Option<u64>, progress: Option<Progress>) -> JobRow {
    JobRow {
        id: call(),
        principal: alice(),
        verb: "migrate".to_owned(),
        domain: web(),
        uuid: uuid(),
        detail: "to skirit81".to_owned(),
        state: if ended_ms.is_some() {
            JobState::Done
        } else {
            JobState::Running
        },
        result: if ended_ms.is_some() {
            "moved".to_owned()
        } else {
            String::new()
        },
        began_ms: 1_700_000_000_000,
        ended_ms,
        progress,
    }
}

fn progress(eta_ms: Option<u64>) -> Progress {
    Progress {
        phase: "copying memory".to_owned(),
        percent: 40,
        done_bytes: 400,
        remaining_bytes: 600,
        total_bytes: 1000,
        rate: 100,
        elapsed_ms: 4000,
        eta_ms,
    }
}

const CODES: [Code; 12] = [
    Code::BadRequest,
    Code::Denied,
    Code::NotFound,
    Code::Conflict,
    Code::Busy,
    Code::Unknown,
    Code::Unavailable,
    Code::Refused,
    Code::Unsupported,
    Code::Expired,
    Code::TooLarge,
    Code::Internal,
];
const THENS: [Then; 3] = [Then::Later, Then::Elsewhere, Then::Never];
const JOB_STATES: [JobState; 4] = [
    JobState::Running,
    JobState::Done,
    JobState::Failed,
    JobState::Unknown,
];

fn samples() -> Vec<Sample> {
    let mut samples = Vec::new();
    samples.extend(from_caller().iter().map(|m| message("from the caller", m)));
    samples.extend(from_host().iter().map(|m| message("from the host", m)));
    samples.extend(requests().iter().map(arguments));
    samples.extend(replies().iter().map(|m| message("reply", m)));
    samples.extend(items().iter().map(|m| message("item", m)));
    samples.extend(
        CODES
            .iter()
            .map(|code| message(format!("fault code {code}"), code)),
    );
    samples.extend(
        CODES
            .iter()
            .map(|code| message("fault", &Fault::new(*code, "why"))),
    );
    samples.extend(
        DomainState::ALL
            .iter()
            .map(|state| message(format!("domain state {state}"), state)),
    );
    samples.extend(
        JOB_STATES
            .iter()
            .map(|state| message(format!("job state {state}"), state)),
    );
    samples.extend(
        Standing::ALL
            .iter()
            .map(|standing| message(format!("standing {standing}"), standing)),
    );
    samples.extend(
        LeaseState::ALL
            .iter()
            .map(|state| message(format!("lease state {state}"), state)),
    );
    samples.extend(
        Depth::ALL
            .iter()
            .map(|depth| message(format!("depth {depth}"), depth)),
    );
    samples.extend(
        THENS
            .iter()
            .map(|then| message(format!("then {}", then.name()), then)),
    );
    samples.extend([
        message("domain by uuid", &by_uuid()),
        message("domain by name", &by_name()),
    ]);
    samples
}

fn golden_file() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden.txt"))
}

const HEADING: &str = "\
# The bytes of every message of protocol version 1: what it is, its value, its bytes in hexadecimal, 32 a line.
# tests/golden.rs compares them with what the program writes, and says how to write this file anew.
";

fn written(samples: &[Sample]) -> String {
    let mut text = HEADING.to_owned();
    for sample in samples {
        text.push_str(&format!("\n{}\n  {}\n", sample.name, sample.message.value));
        for line in sample.message.bytes.chunks(32) {
            text.push_str("    ");
            text.push_str(&hexadecimal(line));
            text.push('\n');
        }
    }
    text
}

/// The paragraphs of a golden file without its heading.
fn paragraphs(text: &str) -> Vec<&str> {
    text.trim_end().split("\n\n").skip(1).collect()
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn digits(paragraph: &str) -> String {
    paragraph
        .lines()
        .filter_map(|line| line.strip_prefix("    "))
        .collect()
}

#[test]
fn every_message_has_the_bytes_of_the_golden_file() {
    let ours = written(&samples());
    let path = golden_file();
    if env::var_os("XMAN_GOLDEN").is_some_and(|wish| wish == "write") {
        fs::write(&path, &ours).unwrap();
        return;
    }
    let golden =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let (theirs, ours) = (paragraphs(&golden), paragraphs(&ours));
    for (at, (theirs, ours)) in theirs.iter().zip(&ours).enumerate() {
        if theirs == ours {
            continue;
        }
        let (was, is) = (digits(theirs), digits(ours));
        let same = was
            .bytes()
            .zip(is.bytes())
            .take_while(|(was, is)| was == is)
            .count()
            / 2;
        panic!(
            "message {at} has changed on the wire, from byte {same} on.\n\n{}: \n{theirs}\n\nnow:\n{ours}\n\nIf it is meant: XMAN_GOLDEN=write cargo test -p xman-common --test golden",
            path.file_name().unwrap().display(),
        );
    }
    assert_eq!(
        theirs.len(),
        ours.len(),
        "messages came or went; if it is meant: XMAN_GOLDEN=write cargo test -p xman-common --test golden"
    );
}

/// docs/PROTOCOL.md is what others write their callers from.
#[test]
fn the_page_on_the_protocol_knows_every_verb_code_and_state_and_its_examples_are_real() {
    let page = include_str!("../../docs/PROTOCOL.md");
    for verb in Verb::ALL {
        let effect = match verb.effect() {
            Effect::Read => "read",
            Effect::Stream => "stream",
            Effect::Change => "change",
        };
        let row = format!("| {} | `{verb}` | {effect}", verb.code());
        assert!(page.contains(&row), "{row}");
    }
    for code in CODES {
        let row = format!("| {} | `{code}` |", code as u32);
        assert!(page.contains(&row), "{row}");
    }
    for what in Happening::ALL {
        let named = format!("{} {what}", *what as u32);
        assert!(page.contains(&named), "{named}");
    }
    for state in DomainState::ALL {
        let named = format!("{} {state}", *state as u32);
        assert!(page.contains(&named), "{named}");
    }
    let counted = |names: Vec<&str>| {
        let numbered = names.iter().enumerate();
        let words: Vec<_> = numbered.map(|(at, name)| format!("{at} {name}")).collect();
        words.join(", ")
    };
    for (what, names) in [
        ("Standing", Standing::ALL.iter().map(|s| s.name()).collect()),
        (
            "LeaseState",
            LeaseState::ALL.iter().map(|s| s.name()).collect(),
        ),
        ("Depth", Depth::ALL.iter().map(|s| s.name()).collect()),
        ("Then", THENS.iter().map(|s| s.name()).collect()),
    ] {
        let line = format!("`{what}`, an enumeration: {}", counted(names));
        assert!(page.contains(&line), "{line}");
    }
    let real: BTreeSet<String> = samples()
        .iter()
        .map(|sample| hexadecimal(&sample.message.bytes))
        .collect();
    let examples: Vec<String> = page
        .split("```hex\n")
        .skip(1)
        .filter_map(|rest| rest.split_once("```"))
        .map(|(example, _)| example.split_whitespace().collect())
        .collect();
    assert!(examples.len() >= 4);
    for example in examples {
        assert!(
            real.contains(&example),
            "no message has the bytes {example}"
        );
    }
}

#[test]
fn every_message_is_read_back_as_it_was_written() {
    for sample in samples() {
        let again = (sample.reread)(&sample.message.bytes)
            .unwrap_or_else(|error| panic!("{}: {error}", sample.name));
        assert_eq!(again, sample.message, "{}", sample.name);
    }
}

#[test]
fn every_request_is_parsed_back_from_its_body() {
    for request in requests() {
        let body = request.body().unwrap();
        assert_eq!(
            Request::parse(request.verb().code(), &body).unwrap(),
            request
        );
    }
}

/// A variant that the samples lack would be one that nobody compares.
#[test]
fn the_samples_hold_every_variant_of_every_message() {
    #[track_caller]
    fn check<T: Serialize + DeserializeOwned + Debug>(samples: &[T]) {
        let seen: BTreeSet<u32> = samples
            .iter()
            .map(|sample| {
                u32::from_be_bytes(codec::encode(sample).unwrap()[..4].try_into().unwrap())
            })
            .collect();
        let variants = u32::try_from(seen.len()).unwrap();
        assert!(seen.iter().copied().eq(0..variants), "{seen:?}");
        let mut next = variants.to_be_bytes().to_vec();
        next.resize(4096, 0);
        let error = codec::decode::<T>(&next).unwrap_err().to_string();
        assert!(
            error.contains(&variants.to_string()) && error.contains("variant"),
            "{}: {error}",
            variants
        );
    }
    check(&from_caller());
    check(&from_host());
    check(&replies());
    check(&items());
    check(&CODES);
    check(&JOB_STATES);
    check(&THENS);
    check(DomainState::ALL);
    check(Happening::ALL);
    check(Standing::ALL);
    check(LeaseState::ALL);
    check(Depth::ALL);
    check(&[by_uuid(), by_name()]);
}

#[test]
fn verbs_have_codes_and_names_of_their_own() {
    let codes: BTreeSet<u16> = Verb::ALL.iter().map(|verb| verb.code()).collect();
    let names: BTreeSet<&str> = Verb::ALL.iter().map(|verb| verb.name()).collect();
    assert_eq!(codes.len(), Verb::ALL.len());
    assert_eq!(names.len(), Verb::ALL.len());
    assert!(!codes.contains(&0), "0 is left for what is no verb");
}

#[test]
fn a_message_that_is_cut_anywhere_is_refused() {
    for sample in samples() {
        for length in 0..sample.message.bytes.len() {
            let cut = (sample.reread)(&sample.message.bytes[..length]);
            assert!(
                cut.is_err(),
                "{} cut to {length} bytes is {cut:?}",
                sample.name
            );
        }
    }
}

#[test]
fn bytes_after_a_message_are_refused() {
    for sample in samples() {
        for more in [&[0][..], &[0xff], &[0; 100]] {
            let long = [&sample.message.bytes, more].concat();
            match (sample.reread)(&long) {
                Err(CodecError::Trailing(left)) => assert_eq!(left, more.len(), "{}", sample.name),
                other => panic!("{} with {} bytes more: {other:?}", sample.name, more.len()),
            }
        }
    }
}

/// What is read at all has one way to be written, so that a digest of the bytes stands for the request.
#[test]
fn a_changed_byte_is_refused_or_makes_another_message_with_exactly_those_bytes() {
    for sample in samples() {
        let mut bytes = sample.message.bytes.clone();
        for at in 0..bytes.len() {
            let was = bytes[at];
            for byte in [
                0,
                1,
                2,
                3,
                0x0a,
                0x2f,
                0x40,
                0x7f,
                0x80,
                0xff,
                was ^ 1,
                was.wrapping_add(1),
            ] {
                bytes[at] = byte;
                if let Ok(other) = (sample.reread)(&bytes) {
                    assert_eq!(
                        other.bytes, bytes,
                        "{}, byte {at} set to {byte:#04x}: {}",
                        sample.name, other.value
                    );
                }
            }
            bytes[at] = was;
        }
    }
}

#[test]
fn a_length_over_the_limit_is_refused_before_memory_is_claimed() {
    let before = address_space_peak();
    for sample in samples() {
        for at in 0..sample.message.bytes.len().saturating_sub(7) {
            for length in [
                u64::MAX,
                u64::MAX / 2,
                1 << 40,
                1 << 32,
                MAX_SEALED as u64 + 1,
            ] {
                let mut bytes = sample.message.bytes.clone();
                bytes[at..at + 8].copy_from_slice(&length.to_be_bytes());
                if let Ok(other) = (sample.reread)(&bytes) {
                    assert_eq!(other.bytes, bytes, "{}: {}", sample.name, other.value);
                }
            }
        }
    }
    for (what, refused) in [
        (
            "a string",
            codec::decode::<String>(&(1_u64 << 40).to_be_bytes()).is_err(),
        ),
        (
            "bytes",
            codec::decode::<Vec<u8>>(&(1_u64 << 40).to_be_bytes()).is_err(),
        ),
        (
            "rows",
            codec::decode::<Vec<DomainRow>>(&(1_u64 << 40).to_be_bytes()).is_err(),
        ),
    ] {
        assert!(refused, "{what}");
    }
    let grown = address_space_peak() - before;
    // threads of the other tests and the allocator's arenas take some address space meanwhile; the smallest claim above is 4 GiB
    assert!(grown < 1024 * 1024, "the address space grew by {grown} KiB");
}

/// The most address space that the process has had, in KiB.
fn address_space_peak() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let peak = status
        .lines()
        .find_map(|line| line.strip_prefix("VmPeak:"))
        .expect("the kernel tells VmPeak");
    peak.trim().trim_end_matches(" kB").parse().unwrap()
}

#[test]
fn names_are_parsed_when_they_are_read() {
    #[track_caller]
    fn refused<T: DeserializeOwned + Debug>(text: &str) {
        let bytes = codec::encode(&text).unwrap();
        assert!(codec::decode::<T>(&bytes).is_err(), "{text:?}");
    }
    for bad in [
        "",
        "a\0b",
        "a\nb",
        "../x",
        &"x".repeat(10_000),
        "a0a1a2a3-a4a5-a6a7-a8a9-aaabacadaeaf",
    ] {
        refused::<DomainName>(bad);
    }
    for bad in ["", "alice", "alice@EX\n", "a\0@EX"] {
        refused::<Principal>(bad);
    }
    for bad in ["", "-H", "a/b", "a b"] {
        refused::<HostName>(bad);
    }
    for bad in ["", "47 11", "4711\n", "a/b", "ř", &"1".repeat(129)] {
        refused::<JobId>(bad);
    }
}

#[test]
fn an_unknown_verb_is_unsupported_whatever_its_body() {
    let known: BTreeSet<u16> = Verb::ALL.iter().map(|verb| verb.code()).collect();
    for verb in (0..=u16::MAX).filter(|verb| !known.contains(verb)) {
        assert_eq!(
            Request::parse(verb, b"anything").unwrap_err().code,
            Code::Unsupported,
            "{verb}"
        );
    }
}

#[test]
fn a_body_that_a_verb_does_not_know_is_unsupported() {
    for request in requests() {
        let verb = request.verb();
        let body = request.body().unwrap();
        let longer = [&body[..], &[0]].concat();
        assert_eq!(
            Request::parse(verb.code(), &longer).unwrap_err().code,
            Code::Unsupported,
            "{verb}"
        );
        if let Some((_, shorter)) = body.split_last() {
            assert_eq!(
                Request::parse(verb.code(), shorter).unwrap_err().code,
                Code::Unsupported,
                "{verb}"
            );
        }
    }
}

#[test]
fn arguments_that_are_known_and_wrong_are_told_apart() {
    let list = |patterns: Vec<String>| {
        Request::List(List {
            patterns,
            states: vec![],
        })
    };
    let set_memory = |kib| {
        Request::MemSet(MemSet {
            domain: by_uuid(),
            kib,
            config: false,
            maximum: false,
        })
    };
    let set_vcpus = |count| {
        Request::VcpuSet(VcpuSet {
            domain: by_uuid(),
            count,
            config: false,
            maximum: false,
        })
    };
    let create = |xml| {
        Request::Create(Create {
            xml,
            define: false,
            paused: false,
        })
    };
    let define = |xml| {
        Request::Define(Define {
            xml,
            replaces: None,
        })
    };
    let status = |patterns| Request::Status(Status { patterns });
    let begin = |reserve, ends_in_ms| {
        Request::LeaseBegin(LeaseBegin {
            key: key(),
            domain: by_uuid(),
            user: None,
            preemptible: None,
            ends_in_ms,
            reserve,
            wait: false,
        })
    };
    let freeze = |depth| {
        Request::Freeze(Preempt {
            domain: by_uuid(),
            depth,
            lease: None,
            reason: None,
            wait: false,
        })
    };
    let reconcile = |jobs: usize| {
        Request::Reconcile(Reconcile {
            system: slurm(),
            cluster: slurm(),
            running: (0..jobs).map(|n| (job_id(&n.to_string()), 0)).collect(),
            age_ms: 0,
        })
    };
    for (request, expected) in [
        (status(vec!["*".to_owned(); MAX_PATTERNS]), None),
        (
            status(vec!["*".to_owned(); MAX_PATTERNS + 1]),
            Some(Code::TooLarge),
        ),
        (
            status(vec!["x".repeat(MAX_PATTERN + 1)]),
            Some(Code::TooLarge),
        ),
        (begin(false, None), None),
        (begin(false, Some(1)), None),
        (begin(true, Some(1)), None),
        (begin(true, None), Some(Code::BadRequest)),
        (freeze(None), None),
        (freeze(Some(Depth::Freeze)), None),
        (freeze(Some(Depth::Pause)), Some(Code::BadRequest)),
        (reconcile(0), None),
        (reconcile(MAX_RUNNING), None),
        (reconcile(MAX_RUNNING + 1), Some(Code::TooLarge)),
        (list(vec!["*".to_owned(); MAX_PATTERNS]), None),
        (
            list(vec!["*".to_owned(); MAX_PATTERNS + 1]),
            Some(Code::TooLarge),
        ),
        (list(vec!["x".repeat(MAX_PATTERN)]), None),
        (
            list(vec!["x".repeat(MAX_PATTERN + 1)]),
            Some(Code::TooLarge),
        ),
        (set_memory(1), None),
        (set_memory(0), Some(Code::BadRequest)),
        (set_vcpus(1), None),
        (set_vcpus(0), Some(Code::BadRequest)),
        (create("x".repeat(MAX_XML)), None),
        (create("x".repeat(MAX_XML + 1)), Some(Code::TooLarge)),
        (define("x".repeat(MAX_XML)), None),
        (define("x".repeat(MAX_XML + 1)), Some(Code::TooLarge)),
    ] {
        let answer = Request::parse(request.verb().code(), &request.body().unwrap());
        assert_eq!(
            answer.err().map(|fault| fault.code),
            expected,
            "{}",
            request.verb()
        );
    }
}

/// The longest XML still fits a frame beside everything else that a call says.
#[test]
fn the_longest_xml_fits_a_frame() {
    let request = Request::Create(Create {
        xml: "x".repeat(MAX_XML),
        define: true,
        paused: true,
    });
    let call = FromCaller::Call(Call {
        header: CallHeader {
            id: call(),
            deadline_ms: Some(1),
            verb: request.verb().code(),
            hypervisor: Some("x".repeat(256)),
            on_behalf_of: Some(format!("{}@EX", "x".repeat(1000)).parse().unwrap()),
        },
        body: request.body().unwrap(),
    });
    assert!(codec::encode(&call).unwrap().len() + xman_common::gss::OVERHEAD <= MAX_SEALED);
}
