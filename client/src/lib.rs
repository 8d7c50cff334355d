//! The caller's side of xman: control the domains of hosts that run `xmand`, with the Kerberos ticket of whoever runs the program.
//!
//! ```text
//! Client   one session with one host: connect, call              (session)
//! Caller   the same with patience: reconnects and asks again     (caller)
//! fleet    many hosts at once, results in the order of the hosts (fleet)
//! ```
//!
//! A [`Client`] is one authenticated session. [`Caller`] wraps it for programs that want an outcome rather than a connection: it tries again where
//! nothing can have happened, and asks again *with the same id* where something may have. [`HostSet`] reads what people type as hosts,
//! [`explain`] says in words what went wrong and what to do. What can be asked and what comes back is in [`protocol`].
//!
//! Everything runs on tokio. Kerberos and the resolver may block, and do so in tokio's blocking threads; who asks many hosts gives the runtime
//! [`fleet::BLOCKING_THREADS`] of those. The ticket is the one that `klist` shows: `KRB5CCNAME`, or `KRB5_CLIENT_KTNAME` for a service with a
//! keytab of its own, set before the program starts.
//!
//! # Connect and list
//!
//! Long answers come in pieces while the call goes on, as [`Event::Items`]; the reply ends it.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use xman_client::{CallOptions, Client, ConnectOptions, Event};
//! use xman_client::protocol::{Item, List, Request};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let host = "skirit80.example.org".parse()?;
//!     let mut client = Client::connect(&host, &ConnectOptions::default()).await?;
//!     println!("{} takes us for {}", client.service(), client.welcome().principal);
//!
//!     let list = Request::List(List { patterns: vec!["grid-*".into()], states: vec![] });
//!     client
//!         .call(&list, &CallOptions::fresh(), |event| {
//!             if let Event::Items(items) = event {
//!                 for item in items {
//!                     if let Item::Domain(row) = item {
//!                         println!("{} {}", row.name, row.state);
//!                     }
//!                 }
//!             }
//!             ControlFlow::Continue(())
//!         })
//!         .await?;
//!     Ok(())
//! }
//! ```
//!
//! # Change something, also over a connection that breaks
//!
//! A change has an id, and the host remembers for a day what came of it: the same id with the same request is carried out once, however often it
//! is sent. A [`Caller`] does that by itself for as long as its [`Patience`] lasts. A program that must know what it did also after a crash of its own writes
//! the id down *before* it calls, and calls again with the same one. A change that may have happened is never repeated under a new id.
//!
//! ```no_run
//! use std::{ops::ControlFlow, sync::Arc, time::Duration};
//!
//! use uuid::Uuid;
//! use xman_client::{Caller, Interrupt, Patience, Wait, caller::may_have_happened, explain};
//! use xman_client::protocol::{OnDomain, Reply, Request};
//!
//! # fn write_down(_: Uuid) -> std::io::Result<()> { Ok(()) }
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let patience = Patience {
//!         timeout: Duration::from_secs(60),
//!         tries: 5,
//!         interrupt: Interrupt::never(),
//!         kdc_is_silent: Arc::default(),
//!         software: "night-shift 1.0".into(),
//!     };
//!     let mut caller = Caller::new("skirit80.example.org".parse()?, patience, None);
//!
//!     let domain = "6695eb01-f6a4-8304-79aa-97f2502e1930".parse()?;
//!     let pause = Request::Pause(OnDomain { domain });
//!     let id = Uuid::new_v4();
//!     write_down(id)?;
//!     match caller.call(&pause, id, Wait::Deadline, |_| ControlFlow::Continue(())).await {
//!         Ok(Reply::Domain(row)) => println!("{} is {}", row.name, row.state),
//!         Ok(other) => println!("done: {other:?}"),
//!         Err(failure) if may_have_happened(&failure) => {
//!             println!("not known yet; ask again later with {id}");
//!         }
//!         Err(failure) => println!("{}", explain::failure(&failure, caller.address(), None)),
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Make room for a job
//!
//! A [`LeaseKey`](protocol::LeaseKey) names one run of one job, and the same key is the same lease whatever the call's id: who has lost the answer, or was told
//! `Pending`, asks again with the key and nothing else. A refusal is an answer and no error, with what to do about it.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use xman_client::Caller;
//! use xman_client::protocol::{LeaseAnswer, LeaseBegin, LeaseEnd, LeaseKey, Reply, Request, Then};
//!
//! /// What a prologue tells its batch system.
//! enum Prologue { Go, Requeue, Fail }
//!
//! async fn begin(caller: &mut Caller, key: &LeaseKey) -> Result<Prologue, Box<dyn std::error::Error>> {
//!     let begin = Request::LeaseBegin(LeaseBegin {
//!         key: key.clone(),
//!         domain: "grid-1".parse()?,
//!         user: Some("alice@EXAMPLE.ORG".parse()?),
//!         preemptible: None, // as the domain's class says
//!         ends_in_ms: None,  // only with its end
//!         reserve: false,
//!         wait: true,
//!     });
//!     loop {
//!         caller.rest();
//!         let Reply::Lease(answer) = caller.ask(&begin, |_| ControlFlow::Continue(())).await? else {
//!             return Err("that was no answer to this question".into());
//!         };
//!         match answer {
//!             LeaseAnswer::Granted(lease) => {
//!                 println!("{} gave way for {}", lease.victims.len(), lease.key);
//!                 return Ok(Prologue::Go);
//!             }
//!             // It was waited for until the deadline, and others still give way.
//!             LeaseAnswer::Pending(_) => {}
//!             LeaseAnswer::Refused { why, then } => {
//!                 eprintln!("{key}: {why}; {}", then.name());
//!                 return Ok(match then {
//!                     Then::Later | Then::Elsewhere => Prologue::Requeue,
//!                     Then::Never => Prologue::Fail,
//!                 });
//!             }
//!         }
//!     }
//! }
//!
//! /// May be said as often as one likes: a lease that is not there has ended well.
//! async fn end(caller: &mut Caller, key: LeaseKey) -> Result<(), Box<dyn std::error::Error>> {
//!     let end = Request::LeaseEnd(LeaseEnd { key, domain: None });
//!     caller.ask(&end, |_| ControlFlow::Continue(())).await?;
//!     Ok(())
//! }
//! ```
//!
//! # See how domains stand towards jobs
//!
//! The rows come as items, and the reply has the room of the whole host. A [`StatusRow`](protocol::StatusRow) writes itself as Magrathea's status of one line.
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use xman_client::{Caller, Event};
//! use xman_client::protocol::{Item, Reply, Request, Status};
//!
//! async fn status(caller: &mut Caller) -> Result<(), Box<dyn std::error::Error>> {
//!     let status = Request::Status(Status { patterns: vec!["grid-*".into()] });
//!     let mut rows = Vec::new();
//!     let reply = caller
//!         .ask(&status, |event| {
//!             match event {
//!                 // The connection broke: what came so far comes again.
//!                 Event::Again => rows.clear(),
//!                 Event::Items(items) => rows.extend(items),
//!                 _ => {}
//!             }
//!             ControlFlow::Continue(())
//!         })
//!         .await?;
//!     for row in &rows {
//!         if let Item::Status(row) = row {
//!             println!("{} {row}", row.name);
//!         }
//!     }
//!     if let Reply::Room(room) = reply {
//!         println!("{} of {} CPUs are with jobs", room.used_cpus, room.cpus);
//!     }
//!     Ok(())
//! }
//! ```
//!
//! # Follow what happens, and go on where one was
//!
//! Each event has a cursor. Who keeps the last one and hands it in as `since` misses nothing; where the host does not know any more what was between,
//! it says so with an [`Item::Gap`](protocol::Item::Gap).
//!
//! ```no_run
//! use std::ops::ControlFlow;
//!
//! use xman_client::{CallOptions, Client, ConnectOptions, Event};
//! use xman_client::protocol::{Cursor, Events, Item, Request};
//!
//! async fn follow(last: &mut Option<Cursor>) -> Result<(), Box<dyn std::error::Error>> {
//!     let host = "skirit80.example.org".parse()?;
//!     let mut client = Client::connect(&host, &ConnectOptions::default()).await?;
//!     let events = Request::Events(Events { patterns: vec![], since: *last, follow: true });
//!     client
//!         .call(&events, &CallOptions::fresh(), |event| {
//!             let Event::Items(items) = event else {
//!                 return ControlFlow::Continue(());
//!             };
//!             for item in items {
//!                 match item {
//!                     Item::Cursor(cursor) => *last = Some(cursor),
//!                     Item::Event(event) => {
//!                         *last = Some(event.cursor);
//!                         println!("{} {} {}", event.name, event.what, event.detail);
//!                     }
//!                     Item::Gap(gap) => {
//!                         *last = Some(gap.cursor);
//!                         println!("something is missing here: {}", gap.why);
//!                     }
//!                     _ => {}
//!                 }
//!             }
//!             ControlFlow::Continue(())
//!         })
//!         .await?;
//!     Ok(())
//! }
//! # let _ = follow(&mut None);
//! ```
//!
//! # Many hosts
//!
//! [`fleet::each`] works on all at once and hands over the results in the order of the hosts, each as soon as those before it are there; one that is silent
//! costs its own timeout and nobody else's.
//!
//! ```no_run
//! use std::{ops::ControlFlow, sync::Arc, time::Duration};
//!
//! use xman_client::{Caller, HostSet, Interrupt, Patience, explain, fleet};
//! use xman_client::protocol::{Info, Reply, Request};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let group = |name: &str| (name == "grid").then(|| "skirit[80-84],skurut68".to_owned());
//!     let hosts = HostSet::parse("@grid!skirit82", &group)?.into_addresses();
//!     let patience = &Patience {
//!         timeout: Duration::from_secs(10),
//!         tries: 2,
//!         interrupt: Interrupt::never(),
//!         // Shared, so that a KDC that does not answer is waited for once and not once a host.
//!         kdc_is_silent: Arc::default(),
//!         software: "inventory 1.0".into(),
//!     };
//!     fleet::each(
//!         hosts,
//!         fleet::WIDTH,
//!         |host| async move {
//!             let mut caller = Caller::new(host.clone(), patience.clone(), None);
//!             let info = Request::Info(Info::default());
//!             (host, caller.ask(&info, |_| ControlFlow::Continue(())).await)
//!         },
//!         |(host, answer)| {
//!             match answer {
//!                 Ok(Reply::Info(info)) => println!("{host}: {} domains run", info.active),
//!                 Ok(_) => println!("{host}: that was no answer to this question"),
//!                 Err(failure) => println!("{host}: {}", explain::failure(&failure, &host, None)),
//!             }
//!             ControlFlow::Continue(())
//!         },
//!     )
//!     .await;
//!     Ok(())
//! }
//! ```
//!
//! # A console
//!
//! A stream goes both ways: [`Client::converse`] sends what comes through a channel as fast as the host takes it, and tells the host that no more will come when the
//! channel is closed. What the guest writes comes as [`Item::Bytes`](protocol::Item::Bytes), which are anybody's bytes: think twice before a terminal gets them.
//!
//! ```no_run
//! use std::{io::Write, ops::ControlFlow};
//!
//! use tokio::sync::mpsc;
//! use xman_client::{CallOptions, Client, ConnectOptions, Event};
//! use xman_client::protocol::{Console, Item, Request};
//!
//! #[tokio::main]
//! async fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let host = "skirit80.example.org".parse()?;
//!     let mut client = Client::connect(&host, &ConnectOptions::default()).await?;
//!     let console = Request::Console(Console { domain: "web".parse()?, force: false });
//!
//!     let (keyboard, input) = mpsc::channel(16);
//!     keyboard.send(b"uname -a\r".to_vec()).await?;
//!     let mut log = std::fs::File::create("web.console")?;
//!     client
//!         .converse(&console, &CallOptions::fresh(), &mut Some(input), |event| {
//!             let Event::Items(items) = event else {
//!                 return ControlFlow::Continue(());
//!             };
//!             for item in items {
//!                 if let Item::Bytes(bytes) = item {
//!                     if log.write_all(&bytes).is_err() {
//!                         return ControlFlow::Break(());
//!                     }
//!                 }
//!             }
//!             ControlFlow::Continue(())
//!         })
//!         .await?;
//!     drop(keyboard);
//!     Ok(())
//! }
//! ```

pub mod caller;
pub mod explain;
pub mod fleet;
pub mod hosts;
pub mod interrupt;
pub mod session;

pub use caller::{Caller, Failure, Patience, Wait};
pub use explain::{Explanation, Kind};
pub use hosts::{Address, BadHosts, HostSet};
pub use interrupt::Interrupt;
pub use session::{CallError, CallOptions, Client, ConnectError, ConnectOptions, Event, Loss};
/// The words of the protocol: who calls this library needs no other crate for them.
#[doc(no_inline)]
pub use xman_common::{name, protocol};
