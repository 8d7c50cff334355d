//! The caller's side of xman.
//!
//! ```text
//! Client   one session with one host: connect, call              (session)
//! Caller   the same with patience: reconnects and asks again     (caller)
//! fleet    many hosts at once, results in the order of the hosts (fleet)
//! ```
//!
//! A [`Client`] is one authenticated session. [`Caller`] wraps it for programs that want an outcome rather than a connection: it tries again where
//! nothing can have happened, and asks again *with the same id* where something may have. [`HostSet`] reads what people type as hosts,
//! [`explain`] says in words what went wrong and what to do.

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
