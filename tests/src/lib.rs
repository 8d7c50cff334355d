//! The lab: everything around xmand that is real, and nothing that pretends.
//!
//! A test reads like the situation it describes:
//!
//! ```no_run
//! use xman_tests::{Host, Realm, Records};
//!
//! let realm = Realm::shared();
//! let alice = realm.user("alice");
//! let mallory = realm.user("mallory");
//! let host = Host::builder().k5login(["alice"]).uri("test:///default").start(realm);
//!
//! alice.rxm(&host, ["pause", "test"]).success();
//! mallory.rxm(&host, ["unpause", "test"]).denied();
//! host.audit().contains(&["mallory@XMAN.TEST", "unpause", "deny"]);
//! ```
//!
//! # People and their tickets
//! [`Realm::shared`] is one throwaway MIT realm, `XMAN.TEST`, for all tests of a binary; [`Realm::new`] is a private
//! one, for tests that stop the KDC; [`Realm::named`] is one of strangers. `realm.user("alice")` is a person with a
//! fresh ticket, a home and a credential cache; others have a short ticket ([`Realm::user_with_lifetime`]), an ended one
//! ([`Realm::user_with_expired_ticket`]) or none ([`Realm::user_without_ticket`]); [`User::kinit`] and
//! [`User::kdestroy`] change that. [`Realm::stop_kdc`] and [`Realm::restart_kdc`] take the KDC away and bring it back.
//!
//! # Hosts
//! [`Host::builder`] begins an xmand with its own configuration, state, keytab, `.k5login` and audit log;
//! [`HostBuilder::start`] starts it on a free port and waits for its word that it listens. [`Host::restart`],
//! [`Host::stop`], [`Host::kill9`] do what they say and keep port and state. [`HostBuilder::prepare`] and
//! [`Host::check`] leave time to spoil files first; [`Host::try_start`] is for hosts that must refuse to start.
//!
//! # Calling
//! `alice.rxm(&host, ["list"])` runs `rxm -H HOST list` in an environment of nothing but home, krb5.conf and credential
//! cache, and gives an [`Outcome`]: [`Outcome::success`], [`Outcome::denied`], [`Outcome::code`], [`Outcome::json`].
//! [`User::rxm_call`] prepares a call that can be given input, environment, a time limit, a terminal
//! ([`Call::in_terminal`]) or a life in the background ([`Call::spawn`]). Several hosts are `&[&a, &b]`, hosts that do not
//! exist a plain string.
//!
//! # Audit
//! [`Host::audit`] is a [`Syslog`] that the test reads, stops, takes away and brings back; [`Rsyslog`] is the real
//! daemon. Both are [`Records`].
//!
//! # Hypervisors and guests
//! `test:///default` lives in xmand itself. [`Embed`] is a folder for `qemu:///embed`. [`Libvirtd::new`] is a private
//! libvirtd: `Host::builder().beside(&libvirtd)` puts an xmand next to it, [`Libvirtd::virsh`] looks at the truth from
//! outside of xmand, [`Libvirtd::freeze`], [`Libvirtd::kill9`], [`Libvirtd::start`] make its life hard. [`Hosts::pair`] is
//! two of them on one wire, between which guests can migrate. [`Guest::tiny`] costs nothing; [`Guest::booted`] runs
//! Linux, counts on its serial line ([`Guest::keeps_counting`]), balloons, takes vcpus and obeys the power button;
//! [`Guest::with_login`] has a login and a shell there.
//! [`Libvirtd::with_cpu_groups`] bounds its guests' CPU time. [`Libvirtd::with_containers`] runs a [`Container`] on [`LXC`] beside them, and `beside(&libvirtd).uris(&[QEMU, LXC])` gives a
//! host both.
//!
//! # Batch systems
//! [`Site::new`] is a machine with libvirt, whose guests are on one wire with it, and a desk: `Host::builder().beside(&site.alpha)` puts
//! an xmand there. [`Slurm::builder`] and [`GridEngine::builder`] run the controller at the desk and the daemon for jobs in
//! each [`Node`], a guest with a small Debian, which takes files and programs of the test's choice and runs commands ([`Node::sh`]).
//! Jobs count where [`Guest::keeps_counting`] looks:
//!
//! ```no_run
//! use xman_tests::{Node, PATIENCE, Realm, Site, Slurm};
//!
//! let site = Site::new(Realm::shared());
//! let slurm = Slurm::builder()
//!     .slurmd_timeout(10)
//!     .node(Node::new("grid1"))
//!     .node(Node::new("grid2"))
//!     .hook_at_desk("PrologSlurmctld", "#!/bin/sh\nexit 0\n")
//!     .start(&site);
//! let job = slurm.count_on("grid1", "low", 100);
//! slurm.wait_job(job, "COMPLETED", PATIENCE);
//! slurm.node("grid1").guest().missed_no_number();
//! ```
//!
//! # Order
//! Everything runs as child processes with an environment of their own, ends when its value is dropped, and also when the
//! test binary is killed. Everything lies in one folder per binary that a janitor removes in any case. Nothing sleeps
//! blindly: [`eventually`] and the `wait_` verbs wait for the thing itself, with a deadline. What is not installed makes a
//! test fail with the package's name.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "the lab fails the running test by panicking"
)]

mod capabilities;
mod cell;
mod child;
mod container;
mod embed;
mod gridengine;
mod guest;
mod host;
mod image;
mod libvirtd;
mod node;
mod realm;
mod scratch;
mod site;
mod slurm;
mod syslog;
mod terminal;
mod user;

pub use cell::Cell;
pub use child::{
    Outcome, PATIENCE, Process, Transcript, bare_command, built, command, eventually, program, run,
    signal_pid,
};
pub use container::Container;
pub use embed::Embed;
pub use gridengine::{GridEngine, GridEngineBuilder};
pub use guest::Guest;
pub use host::{Host, HostBuilder, shell};
pub use libvirtd::{Hosts, LXC, Libvirtd, QEMU};
pub use node::Node;
pub use realm::Realm;
pub use rustix::process::Signal;
pub use scratch::Scratch;
pub use site::Site;
pub use slurm::{Slurm, SlurmBuilder};
pub use syslog::{Records, Rsyslog, Syslog, took};
pub use terminal::Terminal;
pub use user::{Call, Reach, User};
