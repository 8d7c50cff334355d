//! The verbs on libvirt's own test driver, a world of its own for each test.

use std::{
    io::Write,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
};

use proptest::{
    collection,
    prelude::*,
    sample,
    test_runner::{Config, TestRunner},
};
use tempfile::NamedTempFile;
use tokio::{sync::oneshot, time::Instant};
use virt::{connect::Connect, domain::Domain, error::Error};
use virt_sys as sys;
use xman_common::protocol::{DomainState, MAX_METADATA, MemSet, VcpuSet};

use super::{connections::Class, lanes::Key, verbs::Visit, *};

mod depth;

const WEB: &str = "6695eb01-f6a4-8304-79aa-97f2502e1930";
const DB: &str = "6695eb01-f6a4-8304-79aa-97f2502e1931";

fn domain(name: &str, uuid: &str) -> String {
    format!(
        "<domain type='test'><name>{name}</name>{uuid}<memory>65536</memory><currentMemory>32768</currentMemory>\
         <vcpu current='1'>2</vcpu><os><type>hvm</type></os></domain>"
    )
}

fn with_uuid(name: &str, uuid: &str) -> String {
    domain(name, &format!("<uuid>{uuid}</uuid>"))
}

/// A fake hypervisor with a running domain `web` and a running domain `db`.
struct World {
    hypervisors: Hypervisors,
    _file: NamedTempFile,
}

impl World {
    async fn new() -> Self {
        let mut file = NamedTempFile::new().unwrap();
        write!(
            file,
            "<node>{}{}</node>",
            with_uuid("web", WEB),
            with_uuid("db", DB)
        )
        .unwrap();
        let hypervisors = Hypervisors::start(vec![format!("test://{}", file.path().display())]);
        let world = Self {
            hypervisors,
            _file: file,
        };
        world
            .until(|world| world.hypervisors.rows().len() == 2)
            .await;
        world
    }

    async fn until(&self, wished: impl Fn(&Self) -> bool) {
        let limit = soon();
        while !wished(self) {
            assert!(
                Instant::now() < limit,
                "{:?} {:?}",
                self.hypervisors.ailing(None),
                self.hypervisors.rows()
            );
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn facts(&self, name: &str) -> Facts {
        self.hypervisors.find(&name.parse().unwrap(), None).unwrap()
    }

    fn target(&self, name: &str) -> Target {
        Target {
            facts: self.facts(name),
            judge: Arc::new(|_| Ok(())),
        }
    }

    fn state(&self, name: &str) -> Option<DomainState> {
        self.hypervisors
            .rows()
            .into_iter()
            .find(|(_, row)| row.name.as_str() == name)
            .map(|(_, row)| row.state)
    }

    /// Does something to a domain behind the back of the verbs.
    async fn behind(
        &self,
        name: &str,
        what: impl FnOnce(&Domain) -> Result<(), virt::error::Error> + Send + 'static,
    ) {
        let uuid = self.facts(name).uuid;
        let work = move |call: &connections::Call| {
            what(&call.connection.lookup_domain_by_uuid(uuid).unwrap()).unwrap();
            Ok(())
        };
        self.hypervisors
            .by_index(0)
            .unwrap()
            .run(Class::Change, Vec::new(), Some(soon()), work)
            .await
            .unwrap();
    }
}

/// A deadline that is never reached where all goes well.
fn soon() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

fn anyone() -> XmlJudge {
    Arc::new(|_, _| Ok(None))
}

fn denied<T>() -> Result<T, Fault> {
    Err(Fault::denied())
}

#[track_caller]
fn code<T: std::fmt::Debug>(result: Result<T, Fault>) -> Code {
    result.unwrap_err().code
}

#[tokio::test]
async fn the_inventory_has_every_column() {
    let world = World::new().await;
    let (facts, row) = world
        .hypervisors
        .rows()
        .into_iter()
        .find(|(_, row)| row.name.as_str() == "web")
        .unwrap();
    assert_eq!(
        (row.state, row.persistent, row.autostart, row.stale),
        (DomainState::Running, true, false, false)
    );
    assert_eq!(
        (row.memory_kib, row.max_memory_kib, row.vcpus, row.max_vcpus),
        (32_768, 65_536, 1, 2)
    );
    assert!(row.id.is_some() && row.age_ms < 10_000);
    assert_eq!((facts.uuid.to_string().as_str(), facts.stale), (WEB, false));
    assert_eq!(world.facts(WEB), facts);
    world.until(|world| world.hypervisors.info().cpus > 0).await;
    let info = world.hypervisors.info();
    assert_eq!(
        (
            info.active,
            info.domains,
            info.used_vcpus,
            info.used_memory_kib,
            info.stuck_lanes
        ),
        (2, 2, 2, 65_536, 0)
    );
    assert_eq!(
        info.hypervisors
            .first()
            .unwrap()
            .driver
            .to_ascii_uppercase(),
        "TEST"
    );
    assert_eq!(
        world.hypervisors.named(&row.hypervisor).ok(),
        Some(row.hypervisor.as_str())
    );
    assert!(world.hypervisors.named("qemu:///system").is_err());
    assert_eq!(
        world
            .hypervisors
            .find(&"web".parse().unwrap(), Some("qemu:///system")),
        None
    );
}

#[tokio::test]
async fn what_a_verb_changed_the_next_list_shows() {
    let world = World::new().await;
    let host = &world.hypervisors;
    assert_eq!(
        host.pause(world.target("web"), soon()).await.unwrap().state,
        DomainState::Paused
    );
    assert_eq!(world.state("web"), Some(DomainState::Paused));
    assert_eq!(
        code(host.pause(world.target("web"), soon()).await),
        Code::Conflict
    );
    assert_eq!(
        code(
            host.shutdown(world.target("web"), false, false, soon())
                .await
        ),
        Code::Conflict
    );
    host.unpause(world.target("web"), soon()).await.unwrap();
    assert_eq!(world.state("web"), Some(DomainState::Running));
    let row = host
        .shutdown(world.target("web"), true, false, soon())
        .await
        .unwrap();
    assert_eq!((row.state, row.id), (DomainState::Off, None));
    assert_eq!(
        code(host.destroy(world.target("web"), soon()).await),
        Code::Conflict
    );
    let row = host
        .start_domain(world.target("web"), false, soon())
        .await
        .unwrap();
    assert!(row.state == DomainState::Running && row.id.is_some());
    assert_eq!(
        code(host.start_domain(world.target("web"), false, soon()).await),
        Code::Conflict
    );
    assert_eq!(
        code(
            host.undefine(world.target("web"), false, false, soon())
                .await
        ),
        Code::Conflict
    );
    assert_eq!(
        host.destroy(world.target("web"), soon())
            .await
            .unwrap()
            .state,
        DomainState::Off
    );
    host.undefine(world.target("web"), false, false, soon())
        .await
        .unwrap();
    assert_eq!(world.state("web"), None);
}

/// What has happened in a world, each as `NAME WHAT DETAIL STATE`.
fn happened(world: &World, since: u64) -> Vec<String> {
    let page = world.hypervisors.book().page(since, usize::MAX);
    let line = |(after, entry, _): &(u64, Arc<Entry>, Option<Facts>)| match entry.as_ref() {
        Entry::Hole(hole) => hole.gap(world.hypervisors.book().cursor(*after)).why,
        Entry::Event(event) => {
            let row = event.row(world.hypervisors.book().cursor(*after));
            format!("{} {} {} {}", row.name, row.what, row.detail, row.state)
        }
    };
    page.lines.iter().map(line).collect()
}

#[tokio::test]
async fn what_happens_stands_in_the_book_in_order_with_what_is_known_of_its_domain() {
    let world = World::new().await;
    let (web, uuid) = (world.target("web"), world.facts("web").uuid);
    world.hypervisors.pause(web, soon()).await.unwrap();
    world.until(|world| happened(world, 0).len() == 1).await;
    world.behind("web", Domain::resume).await;
    world.until(|world| happened(world, 0).len() == 2).await;
    let gone = world.target("web");
    world.hypervisors.destroy(gone, soon()).await.unwrap();
    world.until(|world| happened(world, 0).len() == 3).await;
    assert_eq!(
        happened(&world, 0),
        [
            "web paused paused paused",
            "web resumed unpaused running",
            "web stopped destroyed off",
        ]
    );
    let page = world.hypervisors.book().page(0, 10);
    for (_, _, facts) in page.lines {
        let facts = facts.unwrap();
        assert!(facts.uuid == uuid && facts.metadata.is_ok());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ten_thousand_events_at_once_are_all_in_the_book_and_the_inventory_stays_true() {
    let world = World::new().await;
    for name in ["web", "db"] {
        let blink = |domain: &Domain| {
            for _ in 0..2500 {
                domain.suspend()?;
                domain.resume()?;
            }
            Ok(())
        };
        world.behind(name, blink).await;
    }
    world
        .until(|world| *world.hypervisors.book().end().borrow() >= 10_000)
        .await;
    let told = happened(&world, 0);
    assert_eq!(told.len(), 10_000);
    for (at, line) in told.iter().enumerate() {
        let name = if at < 5000 { "web" } else { "db" };
        let what = if at % 2 == 0 { "paused" } else { "resumed" };
        assert!(line.starts_with(&format!("{name} {what} ")), "{at}: {line}");
    }
    assert_eq!(world.state("web"), Some(DomainState::Running));
    world.behind("db", Domain::suspend).await;
    world
        .until(|world| world.state("db") == Some(DomainState::Paused))
        .await;
}

#[tokio::test]
async fn what_others_change_is_seen_by_events() {
    let world = World::new().await;
    world.behind("web", Domain::suspend).await;
    world
        .until(|world| world.state("web") == Some(DomainState::Paused))
        .await;
    world.behind("web", Domain::destroy).await;
    world
        .until(|world| world.state("web") == Some(DomainState::Off))
        .await;
    world.behind("web", Domain::undefine).await;
    world.until(|world| world.state("web").is_none()).await;
}

#[tokio::test]
async fn sizes_are_set_live_and_in_the_definition() {
    let world = World::new().await;
    let host = &world.hypervisors;
    let memory = |kib, config, maximum| MemSet {
        domain: "web".parse().unwrap(),
        kib,
        config,
        maximum,
    };
    let vcpus = |count, config, maximum| VcpuSet {
        domain: "web".parse().unwrap(),
        count,
        config,
        maximum,
    };
    let row = host
        .mem_set(world.target("web"), &memory(49_152, false, false), soon())
        .await
        .unwrap();
    assert_eq!(row.memory_kib, 49_152);
    let fault = host
        .mem_set(world.target("web"), &memory(99_999, false, false), soon())
        .await
        .unwrap_err();
    assert!(
        fault.code == Code::Conflict && fault.message.contains("at most 64 MiB"),
        "{fault}"
    );
    assert_eq!(
        host.vcpu_set(world.target("web"), &vcpus(2, false, false), soon())
            .await
            .unwrap()
            .vcpus,
        2
    );
    assert_eq!(
        code(
            host.vcpu_set(world.target("web"), &vcpus(3, false, false), soon())
                .await
        ),
        Code::Conflict
    );
    host.destroy(world.target("web"), soon()).await.unwrap();
    assert_eq!(
        code(
            host.mem_set(world.target("web"), &memory(49_152, false, false), soon())
                .await
        ),
        Code::Conflict
    );
    let row = host
        .mem_set(world.target("web"), &memory(131_072, false, true), soon())
        .await
        .unwrap();
    assert_eq!(row.max_memory_kib, 131_072);
    let row = host
        .mem_set(world.target("web"), &memory(99_999, true, false), soon())
        .await
        .unwrap();
    assert_eq!(row.memory_kib, 99_999);
}

#[tokio::test]
async fn a_domain_that_vanished_between_look_up_and_action_is_not_found() {
    let world = World::new().await;
    let target = world.target("web");
    world.behind("web", Domain::destroy).await;
    world.behind("web", Domain::undefine).await;
    assert_eq!(
        code(world.hypervisors.pause(target.clone(), soon()).await),
        Code::NotFound
    );
    assert_eq!(
        code(
            world
                .hypervisors
                .describe(target, false, false, soon())
                .await
        ),
        Code::NotFound
    );
    assert_eq!(world.state("web"), None);
}

#[tokio::test]
async fn changed_facts_are_judged_again_and_unchanged_ones_are_not() {
    let world = World::new().await;
    let asked = Arc::new(AtomicUsize::new(0));
    let judge: Judge = {
        let asked = Arc::clone(&asked);
        Arc::new(move |facts| {
            asked.fetch_add(1, Ordering::SeqCst);
            if facts.name.as_str() == "web" {
                Ok(())
            } else {
                denied()
            }
        })
    };
    let target = Target {
        facts: world.facts("web"),
        judge,
    };
    world
        .hypervisors
        .pause(target.clone(), soon())
        .await
        .unwrap();
    assert_eq!(asked.load(Ordering::SeqCst), 0);
    world.behind("web", Domain::destroy).await;
    world
        .behind("web", |domain| domain.rename("other", 0))
        .await;
    assert_eq!(
        code(world.hypervisors.start_domain(target, false, soon()).await),
        Code::Denied
    );
    assert_eq!(asked.load(Ordering::SeqCst), 1);
    assert_eq!(world.state("other"), Some(DomainState::Off));
    assert_eq!(world.state("web"), None);
}

#[tokio::test]
async fn define_makes_changes_and_refuses_what_belongs_to_another() {
    let world = World::new().await;
    let host = &world.hypervisors;
    let define = |xml: String, replaces| host.define(None, xml, replaces, anyone(), soon());
    let row = define(domain("new", ""), None).await.unwrap();
    assert_eq!((row.state, row.persistent), (DomainState::Off, true));
    assert_eq!(world.state("new"), Some(DomainState::Off));
    assert_eq!(code(define(domain("new", ""), None).await), Code::Conflict);
    assert_eq!(
        code(define(with_uuid("web", DB), None).await),
        Code::Conflict
    );
    assert_eq!(
        code(define(with_uuid("third", DB), None).await),
        Code::Conflict
    );
    assert_eq!(
        code(define("<domain><name>web</nam></domain>".to_owned(), None).await),
        Code::BadRequest
    );

    let before = host
        .describe(world.target("web"), true, true, soon())
        .await
        .unwrap();
    let after = before.replace("65536", "70000");
    define(after.clone(), Some(before.clone())).await.unwrap();
    let fault = define(before.clone(), Some(before.clone()))
        .await
        .unwrap_err();
    assert!(
        fault.code == Code::Conflict && fault.message.contains("in the meantime"),
        "{fault}"
    );
    define(
        before,
        Some(
            host.describe(world.target("web"), true, true, soon())
                .await
                .unwrap(),
        ),
    )
    .await
    .unwrap();
    assert_eq!(
        code(define(domain("gone", ""), Some(after)).await),
        Code::Conflict
    );
    let elsewhere = host
        .define(Some("xen:///"), domain("x", ""), None, anyone(), soon())
        .await;
    assert_eq!(code(elsewhere), Code::NotFound);
}

#[tokio::test]
async fn xml_is_judged_for_the_new_domain_and_each_existing_one_before_anything_is_said() {
    let world = World::new().await;
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let judge: XmlJudge = {
        let seen = Arc::clone(&seen);
        Arc::new(move |new, facts| {
            seen.lock().unwrap().push((
                new.name.to_string(),
                facts.map(|facts| facts.name.to_string()),
            ));
            if facts.is_some_and(|facts| facts.name.as_str() == "db") {
                denied()
            } else {
                Ok(None)
            }
        })
    };
    let xml = with_uuid("web", DB);
    assert_eq!(
        code(
            world
                .hypervisors
                .define(None, xml, None, Arc::clone(&judge), soon())
                .await
        ),
        Code::Denied
    );
    let made = world
        .hypervisors
        .create(None, domain("new", ""), false, false, judge, soon())
        .await
        .unwrap();
    assert_eq!((made.state, made.persistent), (DomainState::Running, false));
    let seen: Vec<_> = seen.lock().unwrap().clone();
    assert_eq!(
        seen,
        [
            ("web".to_owned(), Some("db".to_owned())),
            ("new".to_owned(), None)
        ]
    );
}

#[tokio::test]
async fn a_transient_domain_is_gone_when_it_is_destroyed() {
    let world = World::new().await;
    let host = &world.hypervisors;
    let made = host
        .create(None, domain("new", ""), false, false, anyone(), soon())
        .await
        .unwrap();
    assert_eq!((made.state, made.persistent), (DomainState::Running, false));
    assert_eq!(
        code(
            host.create(None, domain("new", ""), false, false, anyone(), soon())
                .await
        ),
        Code::Conflict
    );
    let memory = MemSet {
        domain: "new".parse().unwrap(),
        kib: 40_000,
        config: true,
        maximum: false,
    };
    assert_eq!(
        code(host.mem_set(world.target("new"), &memory, soon()).await),
        Code::Conflict
    );
    let last = host.destroy(world.target("new"), soon()).await.unwrap();
    assert_eq!((last.name.as_str(), last.state), ("new", DomainState::Off));
    assert_eq!(world.state("new"), None);
    let made = host
        .create(None, domain("new", ""), true, false, anyone(), soon())
        .await
        .unwrap();
    assert!(made.persistent);
}

#[tokio::test]
async fn what_does_not_return_keeps_its_lane_and_destroy_goes_past_it_and_what_came_of_it_is_told()
{
    let world = World::new().await;
    let host = world.hypervisors.by_index(0).unwrap();
    let key = Key::Domain(world.facts("web").uuid);
    let (release, hung) = std::sync::mpsc::channel::<()>();
    let (begin, begun) = oneshot::channel();
    let deadline = Instant::now() + Duration::from_secs(2);
    let lane = host.lanes.take(key, deadline).await.unwrap();
    let work = move |call: &connections::Call| {
        call.begin()?;
        begin.send(()).unwrap();
        hung.recv().unwrap();
        Ok(())
    };
    let hanging = tokio::spawn({
        let host = Arc::clone(&host);
        async move {
            host.run(Class::Change, vec![lane], Some(deadline), work)
                .await
        }
    });
    begun.await.unwrap();
    tokio::time::sleep_until(deadline + Duration::from_millis(10)).await;
    assert!(!hanging.is_finished());
    let stuck = async {
        while world.hypervisors.info().stuck_lanes != 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout_at(soon(), stuck).await.unwrap();
    let brief = Instant::now() + Duration::from_millis(50);
    assert_eq!(
        code(world.hypervisors.pause(world.target("web"), brief).await),
        Code::Busy
    );
    assert_eq!(
        world
            .hypervisors
            .pause(world.target("db"), soon())
            .await
            .unwrap()
            .state,
        DomainState::Paused
    );
    assert_eq!(
        world
            .hypervisors
            .destroy(world.target("web"), soon())
            .await
            .unwrap()
            .state,
        DomainState::Off
    );
    release.send(()).unwrap();
    hanging.await.unwrap().unwrap();
    world
        .hypervisors
        .start_domain(world.target("web"), false, soon())
        .await
        .unwrap();
    assert_eq!(world.hypervisors.info().stuck_lanes, 0);
}

#[tokio::test]
async fn what_has_not_begun_by_the_deadline_never_begins() {
    let world = World::new().await;
    let host = world.hypervisors.by_index(0).unwrap();
    let (release, slow) = std::sync::mpsc::channel::<()>();
    let (tell, told) = std::sync::mpsc::channel();
    let work = move |call: &connections::Call| {
        slow.recv().unwrap();
        tell.send(call.begin().is_ok()).unwrap();
        Ok(())
    };
    let deadline = Instant::now() + Duration::from_millis(50);
    assert_eq!(
        code(
            host.run(Class::Change, Vec::new(), Some(deadline), work)
                .await
        ),
        Code::Unavailable
    );
    release.send(()).unwrap();
    assert!(!told.recv().unwrap());
}

#[tokio::test]
async fn a_caller_who_goes_away_does_not_stop_what_it_began() {
    let world = World::new().await;
    let host = world.hypervisors.by_index(0).unwrap();
    let key = Key::Domain(world.facts("web").uuid);
    let lane = host.lanes.take(key, soon()).await.unwrap();
    let (tell, told) = std::sync::mpsc::channel();
    let (begin, begun) = std::sync::mpsc::channel();
    let caller = tokio::spawn(async move {
        let work = move |call: &connections::Call| {
            call.begin()?;
            begin.send(()).unwrap();
            thread::sleep(Duration::from_millis(50));
            tell.send(()).unwrap();
            Ok(())
        };
        host.run(Class::Change, vec![lane], Some(soon()), work)
            .await
    });
    tokio::task::spawn_blocking(move || begun.recv().unwrap())
        .await
        .unwrap();
    caller.abort();
    assert_eq!(
        world
            .hypervisors
            .pause(world.target("web"), soon())
            .await
            .unwrap()
            .state,
        DomainState::Paused
    );
    told.try_recv()
        .expect("the lane was free only after the work");
}

#[tokio::test]
async fn a_wait_that_ends_at_the_deadline_says_what_to_do() {
    let world = World::new().await;
    let deadline = Instant::now() + Duration::from_secs(3);
    let fault = world
        .hypervisors
        .reboot(world.target("web"), true, false, deadline)
        .await
        .err();
    if let Some(fault) = fault {
        assert!(
            fault.code == Code::Refused && fault.retry && fault.message.contains("--force"),
            "{fault}"
        );
    }
    assert!(Instant::now() < deadline + Duration::from_secs(5));
}

#[tokio::test]
async fn what_a_driver_lacks_is_unsupported_and_what_is_not_there_unavailable() {
    let world = World::new().await;
    let paused = world
        .hypervisors
        .create(None, domain("x", ""), false, true, anyone(), soon())
        .await;
    assert_eq!(code(paused), Code::Unsupported);
    let abort = world.hypervisors.give_up(world.target("web"), soon()).await;
    assert!(matches!(code(abort), Code::Unsupported | Code::Conflict));
    let absent = Hypervisors::start(vec![
        "qemu+unix:///system?socket=/nonexistent/socket".to_owned(),
    ]);
    let made = absent
        .create(None, domain("x", ""), false, false, anyone(), soon())
        .await;
    let fault = made.unwrap_err();
    assert!(
        fault.code == Code::Unavailable && fault.message.contains("is libvirtd"),
        "{fault}"
    );
    let ailing = absent.ailing(None);
    assert!(absent.rows().is_empty() && ailing.len() == 1 && ailing[0].unread);
    let why = Hypervisors::check("qemu+unix:///system?socket=/nonexistent/socket")
        .await
        .unwrap_err();
    assert!(why.contains("is libvirtd"), "{why}");
    assert!(
        Hypervisors::check("test:///default")
            .await
            .unwrap()
            .contains("libvirt")
    );
}

const ALICE: &str = "alice@EXAMPLE.ORG";
const BOB: &str = "bob@EXAMPLE.ORG";
const LIVE: u32 = sys::VIR_DOMAIN_AFFECT_LIVE;
const CONFIG: u32 = sys::VIR_DOMAIN_AFFECT_CONFIG;
/// An element that mallory wrote.
const MALLORY: &str =
    "<m:domain xmlns:m='urn:xman:domain:1'><m:owner>mallory@EXAMPLE.ORG</m:owner></m:domain>";

fn principal(name: &str) -> Principal {
    name.parse().unwrap()
}

fn owned_by(owner: &str) -> Metadata {
    Metadata {
        owners: [principal(owner)].into(),
        ..Metadata::default()
    }
}

fn owner(add: &str, remove: &str) -> Change {
    let set = |names: &str| names.split_whitespace().map(principal).collect();
    Change::Owners {
        add: set(add),
        remove: set(remove),
    }
}

fn by_alice() -> XmlJudge {
    Arc::new(|_, existing| Ok(existing.is_none().then(|| principal(ALICE))))
}

fn with_metadata(xml: &str, root: &str, metadata: &str) -> String {
    xml.replace(
        "<domain type='test'>",
        &format!("<domain type='test'{root}>{metadata}"),
    )
}

fn put(domain: &Domain, element: Option<&str>, impact: u32) -> Result<(), Error> {
    domain.set_metadata(2, element, Some("hand"), Some(metadata::NAMESPACE), impact)
}

impl World {
    /// What libvirt itself shows, of what runs or of what is defined.
    async fn element(&self, name: &str, of: u32) -> Option<String> {
        let (tell, told) = std::sync::mpsc::channel();
        self.behind(name, move |domain| {
            tell.send(readings::element(domain, of)?).unwrap();
            Ok(())
        })
        .await;
        told.recv().unwrap()
    }

    /// As [`World::element`], understood; `None` where there is no element.
    async fn owned(&self, name: &str, of: u32) -> Option<Metadata> {
        let element = self.element(name, of).await?;
        Some(metadata::read(&element).unwrap())
    }

    async fn put_by_hand(&self, name: &str, element: &'static str, impact: u32) {
        self.behind(name, move |domain| put(domain, Some(element), impact))
            .await;
    }

    fn metadata(&self, name: &str) -> Result<Metadata, String> {
        self.facts(name).metadata.as_ref().clone()
    }

    async fn set(&self, name: &str, change: Change) -> Result<DomainRow, Fault> {
        self.hypervisors
            .set_metadata(self.target(name), change, soon())
            .await
    }
}

#[tokio::test]
async fn a_new_domain_is_its_makers_whatever_its_xml_says() {
    let world = World::new().await;
    let host = &world.hypervisors;
    let tricks = [
        ("", String::new()),
        ("", "<metadata/>".to_owned()),
        ("", format!("<metadata>{MALLORY}</metadata>")),
        ("", format!("<metadata><!-- --><a:b xmlns:a='urn:a'>{MALLORY}</a:b>{MALLORY}</metadata>")),
        ("", "<metadata><domain xmlns='urn:xman&#58;domain&#x3a;1'><owner>mallory@EXAMPLE.ORG</owner></domain></metadata>".to_owned()),
        (" xmlns:q='urn:xman:domain:1'", "<metadata><q:domain><q:owner>mallory@EXAMPLE.ORG</q:owner></q:domain></metadata>".to_owned()),
        (" xmlns:q='urn:a'", "<metadata xmlns:q='urn:xman:domain:1'><q:other/><?p i?></metadata>".to_owned()),
        ("", "<metadata><![CDATA[<xman:domain>]]><xman:domain xmlns:xman='urn:other'/></metadata>".to_owned()),
    ];
    for (root, metadata) in tricks {
        let xml = with_metadata(&domain("new", ""), root, &metadata);
        let row = host
            .define(None, xml.clone(), None, by_alice(), soon())
            .await
            .unwrap();
        assert_eq!(row.metadata, owned_by(ALICE), "{xml}");
        assert_eq!(world.owned("new", CONFIG).await, Some(owned_by(ALICE)));
        assert_eq!(world.metadata("new"), Ok(owned_by(ALICE)));
        host.undefine(world.target("new"), false, false, soon())
            .await
            .unwrap();
        for define in [false, true] {
            let row = host
                .create(None, xml.clone(), define, false, by_alice(), soon())
                .await
                .unwrap();
            assert_eq!(
                (row.metadata, row.persistent),
                (owned_by(ALICE), define),
                "{xml}"
            );
            host.destroy(world.target("new"), soon()).await.unwrap();
            if define {
                host.undefine(world.target("new"), false, false, soon())
                    .await
                    .unwrap();
            }
        }
        let nobodys = host
            .define(None, xml, None, anyone(), soon())
            .await
            .unwrap();
        assert_eq!(nobodys.metadata, Metadata::default());
        assert_eq!(world.element("new", CONFIG).await, None);
        host.undefine(world.target("new"), false, false, soon())
            .await
            .unwrap();
    }
    for refused in [
        format!("<metadata/><metadata>{MALLORY}</metadata>"),
        format!("<x:metadata xmlns:x='y'>{MALLORY}</x:metadata>"),
        "<metadata><q:domain xmlns:q=''/></metadata>".to_owned(),
    ] {
        let xml = with_metadata(&domain("new", ""), "", &refused);
        assert_eq!(
            code(host.define(None, xml, None, by_alice(), soon()).await),
            Code::BadRequest
        );
        assert_eq!(world.state("new"), None);
    }
}

/// Elements as an attacker may nest and name them, so that two readers might disagree on whose they are.
fn tricky() -> impl Strategy<Value = String> {
    const NAMES: [&str; 8] = [
        "domain",
        "x:domain",
        "y:domain",
        "x:a",
        "metadata",
        ":domain",
        "x:y:domain",
        "xmlns:domain",
    ];
    const ATTRIBUTES: [&str; 14] = [
        "xmlns='urn:xman:domain:1'",
        "xmlns:x='urn:xman:domain:1'",
        "xmlns:y=\"urn:xman:domain:1\"",
        "xmlns:x='urn:xman&#58;domain:1'",
        "xmlns:x='urn:other'",
        "xmlns='urn:other'",
        "xmlns=''",
        "xmlns:x=''",
        ":xmlns='urn:other'",
        "y:xmlns='urn:other'",
        "xmlns:x=' urn:xman:domain:1'",
        "xmlns:xmlns='urn:xman:domain:1'",
        "x:a='b'",
        "xmlns:x='urn:xman:domain:1&#10;'",
    ];
    let start = || {
        (
            sample::select(&NAMES[..]),
            collection::vec(sample::select(&ATTRIBUTES[..]), 0..3),
        )
    };
    let leaf = prop_oneof![
        sample::select(
            &[
                "",
                "text",
                "<!-- c -->",
                "<![CDATA[<x:domain/>]]>",
                "<owner>m@EX</owner>",
                "&#60;"
            ][..]
        )
        .prop_map(str::to_owned),
        start().prop_map(|(name, attributes)| format!("<{name} {}/>", attributes.join(" "))),
    ];
    leaf.prop_recursive(3, 12, 3, move |inner| {
        (start(), collection::vec(inner, 0..3)).prop_map(|((name, attributes), children)| {
            format!(
                "<{name} {}>{}</{name}>",
                attributes.join(" "),
                children.concat()
            )
        })
    })
}

#[test]
fn libvirt_never_sees_an_element_of_ours_that_we_have_not_put_there() {
    reader::start_events();
    let connection = Connect::open(Some("test:///default")).unwrap();
    let (uuid, taken) = (Uuid::from_u128(77), AtomicUsize::new(0));
    let mut runner = TestRunner::new(Config {
        cases: 3000,
        failure_persistence: None,
        ..Config::default()
    });
    let roots = sample::select(
        &[
            "",
            " xmlns:x='urn:xman:domain:1'",
            " xmlns:y='urn:other' xmlns:x='urn:xman:domain:1'",
        ][..],
    );
    let places = sample::select(
        &[
            "<metadata>",
            "<metadata xmlns:y='urn:xman:domain:1'>",
            "<metadata xmlns=''>",
        ][..],
    );
    let input = (
        roots,
        places,
        collection::vec(tricky(), 1..4),
        any::<bool>(),
    );
    let outcome = runner.run(&input, |(root, place, children, ours)| {
        let metadata = format!("{place}{}</metadata>", children.concat());
        let xml = with_metadata(&with_uuid("fuzz", &uuid.to_string()), root, &metadata);
        let element = ours.then(|| metadata::write(&owned_by(ALICE)));
        let Ok(written) = xml::with_element(&xml, element.as_deref()) else {
            return Ok(());
        };
        let Ok(domain) = connection.define_domain_xml(&written) else {
            return Ok(());
        };
        taken.fetch_add(1, Ordering::SeqCst);
        let expected = if ours {
            owned_by(ALICE)
        } else {
            Metadata::default()
        };
        prop_assert_eq!(
            readings::owned(&domain, true).unwrap(),
            Ok(expected),
            "{}",
            written
        );
        Ok(())
    });
    outcome.unwrap();
    assert!(
        taken.into_inner() > 100,
        "too few documents that both readers take"
    );
}

#[tokio::test]
async fn owners_survive_a_new_definition() {
    let world = World::new().await;
    let host = &world.hypervisors;
    world.set("web", owner(ALICE, "")).await.unwrap();
    world
        .set("web", Change::Class(Some("grid".parse().unwrap())))
        .await
        .unwrap();
    let kept = world.metadata("web").unwrap();
    for _ in 0..2 {
        let before = host
            .describe(world.target("web"), true, true, soon())
            .await
            .unwrap();
        assert!(
            before.contains("<xman:owner>alice@EXAMPLE.ORG</xman:owner>"),
            "{before}"
        );
        let after = before
            .replace("65536", "70000")
            .replace("alice@", "mallory@");
        let row = host
            .define(None, after, Some(before), anyone(), soon())
            .await
            .unwrap();
        assert_eq!(row.metadata, kept);
        assert_eq!(world.owned("web", CONFIG).await, Some(kept.clone()));
        let row = host
            .define(None, with_uuid("web", WEB), None, anyone(), soon())
            .await
            .unwrap();
        assert_eq!(row.metadata, kept);
        if world.state("web") == Some(DomainState::Running) {
            assert_eq!(world.owned("web", LIVE).await, Some(kept.clone()));
            host.destroy(world.target("web"), soon()).await.unwrap();
        }
    }
    let row = host
        .start_domain(world.target("web"), false, soon())
        .await
        .unwrap();
    assert_eq!(row.metadata, kept);
}

#[tokio::test]
async fn owners_and_state_are_read_again_in_the_lane_and_judged_again() {
    let world = World::new().await;
    world.set("web", owner(ALICE, "")).await.unwrap();
    let host = world.hypervisors.by_index(0).unwrap();
    type Act = fn(&Domain) -> Result<(), Error>;
    type Seen = fn(&Facts) -> bool;
    let acts: [(Act, Seen); 4] = [
        (
            |domain| {
                put(
                    domain,
                    Some("<domain><owner>bob@EXAMPLE.ORG</owner></domain>"),
                    LIVE | CONFIG,
                )
            },
            |facts| *facts.metadata == Ok(owned_by(BOB)),
        ),
        (
            |domain| put(domain, Some("<domain><group/></domain>"), LIVE),
            |facts| facts.metadata.is_err(),
        ),
        (
            |domain| put(domain, None, LIVE),
            |facts| *facts.metadata == Ok(Metadata::default()),
        ),
        (Domain::suspend, |facts| facts.state == DomainState::Paused),
    ];
    for (act, is_seen) in acts {
        let judged = world.facts("web");
        let asked = Arc::new(AtomicUsize::new(0));
        let judge: Judge = {
            let asked = Arc::clone(&asked);
            Arc::new(move |facts| {
                asked.fetch_add(1, Ordering::SeqCst);
                assert!(is_seen(facts), "{facts:?}");
                denied()
            })
        };
        let target = Target {
            facts: judged.clone(),
            judge,
        };
        let inner = Arc::clone(&host);
        let work = move |call: &connections::Call| {
            // Between verdict and action, sooner than any event can be read.
            act(&call.connection.lookup_domain_by_uuid(judged.uuid).unwrap()).unwrap();
            let visit = Visit::new(call, &inner, &target);
            assert_eq!(visit.err().unwrap().code, Code::Denied);
            Ok(())
        };
        host.run(Class::Change, Vec::new(), Some(soon()), work)
            .await
            .unwrap();
        assert_eq!(asked.load(Ordering::SeqCst), 1);
    }
    let judged = world.target("web");
    world
        .put_by_hand(
            "web",
            "<domain><owner>bob@EXAMPLE.ORG</owner></domain>",
            LIVE | CONFIG,
        )
        .await;
    let seen = Arc::new(std::sync::Mutex::new(None));
    let target = Target {
        judge: {
            let seen = Arc::clone(&seen);
            Arc::new(move |facts| {
                *seen.lock().unwrap() = Some(facts.metadata.as_ref().clone());
                denied()
            })
        },
        ..judged
    };
    assert_eq!(
        code(
            world
                .hypervisors
                .describe(target, false, false, soon())
                .await
        ),
        Code::Denied
    );
    assert_eq!(*seen.lock().unwrap(), Some(Ok(owned_by(BOB))));
}

#[tokio::test]
async fn who_stands_only_in_what_runs_or_only_in_what_is_defined_owns_nothing() {
    let world = World::new().await;
    let both = "<domain><owner>alice@EXAMPLE.ORG</owner><owner>bob@EXAMPLE.ORG</owner><class>old</class></domain>";
    let new = "<domain><owner>bob@EXAMPLE.ORG</owner><owner>carol@EXAMPLE.ORG</owner><class>new</class></domain>";
    world.put_by_hand("web", both, LIVE).await;
    world.put_by_hand("web", new, CONFIG).await;
    let in_force = Metadata {
        class: Some("new".parse().unwrap()),
        ..owned_by(BOB)
    };
    world
        .until(|world| world.metadata("web") == Ok(in_force.clone()))
        .await;
    // What is set next stands in both.
    world.set("web", owner(ALICE, "")).await.unwrap();
    let wanted = metadata::change(&in_force, &owner(ALICE, ""));
    assert_eq!(world.owned("web", LIVE).await, Some(wanted.clone()));
    assert_eq!(world.owned("web", CONFIG).await, Some(wanted));
    world
        .put_by_hand("web", "<domain><group/></domain>", CONFIG)
        .await;
    world.until(|world| world.metadata("web").is_err()).await;
}

#[tokio::test]
async fn metadata_changed_by_hand_are_seen_by_events() {
    let world = World::new().await;
    let first = world.facts("web").revision;
    world.put_by_hand("web", "<domain><owner>alice@EXAMPLE.ORG</owner><label name='lease-user'>bob@EXAMPLE.ORG</label></domain>", LIVE | CONFIG).await;
    world
        .until(|world| world.facts("web").revision != first)
        .await;
    let facts = world.facts("web");
    assert_eq!(facts.lease.as_ref().unwrap().user, principal(BOB));
    let (_, row) = world
        .hypervisors
        .rows()
        .into_iter()
        .find(|(_, row)| row.name.as_str() == "web")
        .unwrap();
    assert_eq!(row.metadata.owners, owned_by(ALICE).owners);
    assert_eq!(row.metadata_trouble, "");
}

#[tokio::test]
async fn broken_metadata_are_told_of_and_kept_until_somebody_takes_them_away() {
    const BROKEN: &str = "<domain><owner>alice</owner><x:y xmlns:x=\"z\"/></domain>";
    let world = World::new().await;
    let host = &world.hypervisors;
    world.put_by_hand("web", BROKEN, LIVE | CONFIG).await;
    world.until(|world| world.metadata("web").is_err()).await;
    let (_, row) = host
        .rows()
        .into_iter()
        .find(|(_, row)| row.name.as_str() == "web")
        .unwrap();
    assert_eq!(row.metadata, Metadata::default());
    assert!(
        row.metadata_trouble.contains("names no realm"),
        "{}",
        row.metadata_trouble
    );
    let fault = world.set("web", owner(BOB, "")).await.unwrap_err();
    assert!(
        fault.code == Code::Conflict && fault.message.contains("--remove"),
        "{fault}"
    );
    let raw = world.element("web", CONFIG).await.unwrap();
    assert_eq!(
        world.element("web", LIVE).await.as_deref(),
        Some(raw.as_str())
    );
    let xml = with_metadata(
        &with_uuid("web", WEB),
        "",
        &format!("<metadata>{MALLORY}</metadata>"),
    );
    let row = host
        .define(None, xml, None, by_alice(), soon())
        .await
        .unwrap();
    assert!(!row.metadata_trouble.is_empty());
    assert_eq!(
        readings::understood(world.element("web", CONFIG).await.as_deref()),
        world.metadata("web")
    );
    host.destroy(world.target("web"), soon()).await.unwrap();
    host.start_domain(world.target("web"), false, soon())
        .await
        .unwrap();
    assert!(world.metadata("web").is_err());
    world
        .behind("web", |domain| put(domain, None, LIVE | CONFIG))
        .await;
    world
        .until(|world| world.metadata("web") == Ok(Metadata::default()))
        .await;
    assert_eq!(
        world.set("web", owner(BOB, "")).await.unwrap().metadata,
        owned_by(BOB)
    );
}

#[tokio::test]
async fn metadata_are_set_in_all_that_there_is_of_a_domain() {
    let world = World::new().await;
    let host = &world.hypervisors;
    let alice = Some(owned_by(ALICE));
    assert_eq!(
        world.set("web", owner(ALICE, "")).await.unwrap().metadata,
        owned_by(ALICE)
    );
    assert_eq!(
        (
            world.owned("web", LIVE).await,
            world.owned("web", CONFIG).await
        ),
        (alice.clone(), alice.clone())
    );
    // Both become what comes of that in force, also where that itself needs no change.
    world
        .put_by_hand(
            "web",
            "<domain><owner>mallory@EXAMPLE.ORG</owner></domain>",
            CONFIG,
        )
        .await;
    world
        .set("web", owner(ALICE, "mallory@EXAMPLE.ORG"))
        .await
        .unwrap();
    assert_eq!(
        (
            world.owned("web", LIVE).await,
            world.owned("web", CONFIG).await
        ),
        (alice.clone(), alice)
    );
    host.destroy(world.target("web"), soon()).await.unwrap();
    let labels = Change::Labels {
        set: [("tier".parse().unwrap(), "a <b> & \"c\"".parse().unwrap())].into(),
        remove: BTreeSet::new(),
    };
    let row = world.set("web", labels).await.unwrap();
    assert_eq!(
        row.metadata.labels.values().next().unwrap().as_str(),
        "a <b> & \"c\""
    );
    let row = world.set("web", owner("", ALICE)).await.unwrap();
    assert!(row.metadata.owners.is_empty() && !row.metadata.labels.is_empty());
    let remove = Change::Labels {
        set: BTreeMap::new(),
        remove: ["tier".parse().unwrap()].into(),
    };
    assert_eq!(
        world.set("web", remove).await.unwrap().metadata,
        Metadata::default()
    );
    assert_eq!(world.owned("web", CONFIG).await, None);

    host.create(None, domain("brief", ""), false, false, anyone(), soon())
        .await
        .unwrap();
    let row = world.set("brief", owner(ALICE, "")).await.unwrap();
    assert_eq!((row.metadata, row.persistent), (owned_by(ALICE), false));
}

#[tokio::test]
async fn nothing_to_change_is_no_write_and_too_much_is_refused() {
    let by_hand =
        "<domain> <label name='tier'>prod</label><owner>alice@EXAMPLE.ORG</owner></domain>";
    let world = World::new().await;
    world.put_by_hand("web", by_hand, LIVE | CONFIG).await;
    let raw = world.element("web", LIVE).await.unwrap();
    assert_ne!(raw, metadata::write_bare(&metadata::read(&raw).unwrap()));
    for change in [
        owner(ALICE, ""),
        owner("", BOB),
        Change::Class(None),
        Change::Labels {
            set: [("tier".parse().unwrap(), "prod".parse().unwrap())].into(),
            remove: ["x".parse().unwrap()].into(),
        },
    ] {
        world.set("web", change).await.unwrap();
        assert_eq!(
            world.element("web", LIVE).await.as_deref(),
            Some(raw.as_str())
        );
    }
    let crowd = (0..MAX_METADATA / 10)
        .map(|number| principal(&format!("u{number:04}@EX.ORG")))
        .collect();
    let fault = world
        .set(
            "web",
            Change::Owners {
                add: crowd,
                remove: BTreeSet::new(),
            },
        )
        .await
        .unwrap_err();
    assert!(
        fault.code == Code::TooLarge && fault.message.contains("4096"),
        "{fault}"
    );
    assert_eq!(
        world.element("web", LIVE).await.as_deref(),
        Some(raw.as_str())
    );
}
