//! What holds for every command, and what several take.

use std::time::Duration;

use clap::{Args, ValueEnum};
use xman_common::name::Principal;

use crate::units::duration;

/// What holds for every command.
#[derive(Debug, Args)]
#[command(next_help_heading = "Options of all commands")]
pub(crate) struct Options {
    /// The hosts to ask: a list such as 'skirit[80-84],skurut68' or '@group'
    #[arg(
        short = 'H',
        long,
        global = true,
        value_name = "HOSTS",
        env = "XMAN_HOSTS",
        hide_env_values = true
    )]
    pub(crate) hosts: Option<String>,
    /// How the answer is written
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table, value_name = "FORMAT")]
    pub(crate) output: Format,
    /// How long each host may take, as 10s or 2m; a bare number means seconds
    #[arg(long, global = true, value_name = "TIME", default_value = "30s", value_parser = duration)]
    pub(crate) timeout: Duration,
    /// How often at most a host that is busy or unreachable is tried
    #[arg(long, global = true, value_name = "TRIES", default_value_t = 5, value_parser = clap::value_parser!(u32).range(0..=100))]
    pub(crate) retries: u32,
    /// Act for somebody else, with that person's rights alone, where the host lets you
    #[arg(
        long,
        visible_alias = "as",
        global = true,
        value_name = "PRINCIPAL",
        env = "XMAN_ON_BEHALF_OF",
        hide_env_values = true
    )]
    pub(crate) on_behalf_of: Option<Principal>,
    /// The host's hypervisor, where it has several: libvirt URI or driver, as lxc (rxm info lists them)
    #[arg(long, global = true, value_name = "URI|DRIVER")]
    pub(crate) hypervisor: Option<String>,
    /// Do not ask before a pattern changes several domains, or several hosts are changed
    #[arg(short, long, global = true)]
    pub(crate) yes: bool,
    /// Show what would be done to what, and whether one may; change nothing
    #[arg(long, global = true)]
    pub(crate) dry_run: bool,
    /// Say nothing of what went well
    #[arg(short, long, global = true)]
    pub(crate) quiet: bool,
    /// Tables without their first line
    #[arg(long, global = true)]
    pub(crate) no_headers: bool,
    /// Colours; auto means on a terminal, unless NO_COLOR is set
    #[arg(long, global = true, value_enum, default_value_t = When::Auto, value_name = "WHEN")]
    pub(crate) color: When,
}

/// How answers are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// A table for people
    Table,
    /// A table with more columns
    Wide,
    /// One array of objects
    Json,
    /// The same as YAML
    Yaml,
    /// One name a line
    Name,
}

/// When colours are used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum When {
    /// On a terminal
    Auto,
    /// Always
    Always,
    /// Never
    Never,
}

/// One domain or several.
#[derive(Debug, Args)]
pub(crate) struct DomainsArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    #[arg(value_name = "DOMAIN", required = true)]
    pub(crate) domains: Vec<String>,
}
