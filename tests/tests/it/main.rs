//! Every test that crosses a process, by topic.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::indexing_slicing,
    reason = "these are tests"
)]

mod access;
mod attack;
mod audit;
mod authorization;
mod batch;
mod batch_lab;
mod completion;
mod console;
mod devices;
mod drivers;
mod events;
mod faults;
mod hook;
mod hook_sge;
mod hook_slurm;
mod hostile;
mod install;
mod lab;
mod migration;
mod operations;
mod python;
mod rights_attacked;
mod rxm;
mod saved;
mod schedule;
mod schedule_faults;
mod stopping;
