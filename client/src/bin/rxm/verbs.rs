//! The verbs that need a domain and a word or two.

use clap::{Args, ValueEnum};
use xman_common::{
    name::DomainName,
    protocol::{
        Ask, Autostart, MemSet, OnDomain, Rename, Request, Start, Undefine, Unpause, VcpuSet, Verb,
    },
};

use crate::{
    change::{Deed, carry_out},
    exit::Tally,
    options::DomainsArgs,
    setting::{Setting, Stop},
    units::{memory_kib, size},
};

/// What `rxm help start` says after the options.
pub(crate) const START_HELP: &str = "\
Examples:
  rxm start skirit80/web
  rxm -H skirit80 start web db
  rxm -H @grid start 'grid-*' --dry-run";

/// What `rxm help undefine` says after the options.
pub(crate) const UNDEFINE_HELP: &str = "\
A running domain goes on until it ends. Disks are never touched.

Examples:
  rxm undefine skirit80/web
  rxm undefine --discard-saved --discard-nvram skirit80/web";

/// What `rxm help destroy` says after the options.
pub(crate) const DESTROY_HELP: &str = "\
The guest is not asked and may lose data; 'rxm shutdown' asks it.

Examples:
  rxm destroy skirit80/web
  rxm -H @grid destroy 'grid-*' --yes";

/// What `rxm help reboot` says after the options.
pub(crate) const REBOOT_HELP: &str = "\
Examples:
  rxm reboot skirit80/web
  rxm reboot --wait --timeout 2m skirit80/web
  rxm reboot --force skirit80/web        reset at once, without asking the guest";

/// What `rxm help shutdown` says after the options.
pub(crate) const SHUTDOWN_HELP: &str = "\
Examples:
  rxm shutdown skirit80/web
  rxm shutdown --wait --timeout 5m skirit80/web
  rxm shutdown --force --timeout 1m skirit80/web        pull the plug if it has not gone after a minute";

/// What `rxm help pause` says after the options.
pub(crate) const PAUSE_HELP: &str = "\
Examples:
  rxm pause skirit80/web
  rxm -H skirit80 pause 'grid-*' --yes";

/// What `rxm help unpause` says after the options.
pub(crate) const UNPAUSE_HELP: &str = "\
Examples:
  rxm unpause skirit80/web
  rxm unpause --force skirit81/web        it came from a host that is lost before it could say that web was gone there";

/// What `rxm help autostart` says after the options.
pub(crate) const AUTOSTART_HELP: &str = "\
Examples:
  rxm autostart on skirit80/web
  rxm -H @grid autostart off 'grid-*' --yes";

/// What `rxm help reset` says after the options.
pub(crate) const RESET_HELP: &str = "\
The guest is not asked and may lose data; 'rxm reboot' asks it. This takes the right to destroy as well.

Examples:
  rxm reset skirit80/web";

/// What `rxm help rename` says after the options.
pub(crate) const RENAME_HELP: &str = "\
One must be allowed to rename the domain as it is called, and as it would be called.

Examples:
  rxm rename skirit80/web web-old";

/// What `rxm help mem-set` says after the options.
pub(crate) const MEM_SET_HELP: &str = "\
Sizes: K, M, G and T are powers of 1024 as for xm (2G = 2GiB = 2048M); a bare number means MiB. \
    The guest gives memory back by and by, and only if it has a balloon driver.

Examples:
  rxm mem-set skirit80/web 2G
  rxm mem-set skirit80/web 512MiB --config        in the definition too
  rxm mem-set skirit80/web 8G --max               the most it can have, from its next start on";

/// What `rxm help vcpu-set` says after the options.
pub(crate) const VCPU_SET_HELP: &str = "\
Examples:
  rxm vcpu-set skirit80/web 4
  rxm vcpu-set skirit80/web 4 --config
  rxm vcpu-set skirit80/web 8 --max        the most it can have, from its next start on";

/// Arguments of `start`.
#[derive(Debug, Args)]
pub(crate) struct StartArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Leave the virtual CPUs stopped
    #[arg(long)]
    pub(crate) paused: bool,
}

/// Arguments of `undefine`.
#[derive(Debug, Args)]
pub(crate) struct UndefineArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Also throw away the saved image of a saved domain
    #[arg(long)]
    pub(crate) discard_saved: bool,
    /// Also throw away the firmware's variables
    #[arg(long)]
    pub(crate) discard_nvram: bool,
}

/// Arguments of `unpause`.
#[derive(Debug, Args)]
pub(crate) struct UnpauseArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Also where the other host of its last journey has not said where it runs: only for a host that is lost, with the right to destroy
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `autostart`.
#[derive(Debug, Args)]
pub(crate) struct AutostartArgs {
    /// Whether they start with their host from now on
    #[arg(value_enum)]
    pub(crate) switch: Switch,
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// They do
    On,
    /// They do not
    Off,
}

/// Arguments of `rename`.
#[derive(Debug, Args)]
pub(crate) struct RenameArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// Its new name
    #[arg(value_name = "NEWNAME")]
    pub(crate) name: DomainName,
}

/// Arguments of `shutdown` and `reboot`.
#[derive(Debug, Args)]
pub(crate) struct AskArgs {
    #[command(flatten)]
    pub(crate) domains: DomainsArgs,
    /// Wait until the guest has done it, as long as --timeout allows
    #[arg(long)]
    pub(crate) wait: bool,
    /// shutdown: pull the plug if the guest has not gone by --timeout; reboot: reset at once without asking the guest. Takes the right to destroy
    #[arg(long)]
    pub(crate) force: bool,
}

/// Arguments of `mem-set`.
#[derive(Debug, Args)]
pub(crate) struct MemSetArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// As 2G or 512MiB; a bare number means MiB
    #[arg(value_name = "SIZE", value_parser = memory_kib)]
    pub(crate) kib: u64,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
    /// The most it can have, in the definition, rather than what it has now
    #[arg(long)]
    pub(crate) max: bool,
}

/// Arguments of `vcpu-set`.
#[derive(Debug, Args)]
pub(crate) struct VcpuSetArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// How many
    #[arg(value_name = "N", value_parser = clap::value_parser!(u32).range(1..=65_536))]
    pub(crate) count: u32,
    /// In the definition too (for a domain that is off: there only)
    #[arg(long)]
    pub(crate) config: bool,
    /// The most it can have, in the definition, rather than what it has now
    #[arg(long)]
    pub(crate) max: bool,
}

/// `rxm start`
pub(crate) async fn start(setting: &Setting, args: StartArgs) -> Result<Tally, Stop> {
    let paused = args.paused;
    let past = if paused { "started, paused" } else { "started" };
    let request = &|domain| Request::Start(Start { domain, paused });
    carry_out(
        setting,
        &args.domains.domains,
        Deed::new(Verb::Start, past, request),
    )
    .await
}

/// `rxm undefine`
pub(crate) async fn undefine(setting: &Setting, args: UndefineArgs) -> Result<Tally, Stop> {
    let UndefineArgs {
        domains,
        discard_saved,
        discard_nvram,
    } = args;
    let request = &|domain| {
        Request::Undefine(Undefine {
            domain,
            discard_saved,
            discard_nvram,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed::new(Verb::Undefine, "undefined", request),
    )
    .await
}

/// `rxm destroy`
pub(crate) async fn destroy(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Destroy(OnDomain { domain });
    carry_out(
        setting,
        &args.domains,
        Deed::new(Verb::Destroy, "destroyed", request),
    )
    .await
}

/// `rxm pause`
pub(crate) async fn pause(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Pause(OnDomain { domain });
    carry_out(
        setting,
        &args.domains,
        Deed::new(Verb::Pause, "paused", request),
    )
    .await
}

/// `rxm unpause`
pub(crate) async fn unpause(setting: &Setting, args: UnpauseArgs) -> Result<Tally, Stop> {
    let UnpauseArgs { domains, force } = args;
    let warning = force.then(|| {
        "where the other host of its last journey has not said that it does not run there, it runs here all the same: make sure that it does not run there"
            .to_owned()
    });
    let request = &|domain| Request::Unpause(Unpause { domain, force });
    carry_out(
        setting,
        &domains.domains,
        Deed::new(Verb::Unpause, "runs on", request)
            .with(force.then_some(Verb::Destroy))
            .warning(warning),
    )
    .await
}

/// `rxm shutdown`
pub(crate) async fn shutdown(setting: &Setting, args: AskArgs) -> Result<Tally, Stop> {
    let AskArgs {
        domains,
        wait,
        force,
    } = args;
    let seconds = setting.patience.timeout.as_secs_f32();
    let warning = force.then(|| format!("each guest is asked to shut down; if it has not gone within {seconds} s its plug is pulled"));
    let past = if wait || force {
        "shut down"
    } else {
        "asked to shut down"
    };
    let request = &|domain| {
        Request::Shutdown(Ask {
            domain,
            wait,
            force,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed::new(Verb::Shutdown, past, request)
            .with(force.then_some(Verb::Destroy))
            .warning(warning),
    )
    .await
}

/// `rxm reboot`
pub(crate) async fn reboot(setting: &Setting, args: AskArgs) -> Result<Tally, Stop> {
    let AskArgs {
        domains,
        wait,
        force,
    } = args;
    let warning = force
        .then(|| "no guest is asked: it is reset at once, as if by its reset button".to_owned());
    let past = match (wait, force) {
        (_, true) => "reset",
        (true, false) => "rebooted",
        (false, false) => "asked to reboot",
    };
    let request = &|domain| {
        Request::Reboot(Ask {
            domain,
            wait,
            force,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed::new(Verb::Reboot, past, request)
            .with(force.then_some(Verb::Destroy))
            .warning(warning),
    )
    .await
}

/// `rxm reset`
pub(crate) async fn reset(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Reset(OnDomain { domain });
    let deed = Deed::new(Verb::Reset, "reset", request).with(Verb::Destroy);
    carry_out(setting, &args.domains, deed).await
}

/// `rxm autostart`
pub(crate) async fn autostart(setting: &Setting, args: AutostartArgs) -> Result<Tally, Stop> {
    let on = args.switch == Switch::On;
    let past = if on {
        "starts with its host"
    } else {
        "does not start with its host"
    };
    let request = &|domain| Request::Autostart(Autostart { domain, on });
    carry_out(
        setting,
        &args.domains.domains,
        Deed::new(Verb::Autostart, past, request),
    )
    .await
}

/// `rxm rename`
pub(crate) async fn rename(setting: &Setting, args: RenameArgs) -> Result<Tally, Stop> {
    let RenameArgs { domain, name } = args;
    let past = format!("that is what {domain} is called now");
    let request = &|domain| {
        Request::Rename(Rename {
            domain,
            name: name.clone(),
        })
    };
    carry_out(
        setting,
        std::slice::from_ref(&domain),
        Deed::new(Verb::Rename, &past, request),
    )
    .await
}

/// `rxm mem-set`
pub(crate) async fn mem_set(setting: &Setting, args: MemSetArgs) -> Result<Tally, Stop> {
    let MemSetArgs {
        domain,
        kib,
        config,
        max,
    } = args;
    let past = if max {
        format!("can have {} of memory from its next start on", size(kib))
    } else {
        format!("has {}", size(kib))
    };
    let request = &|domain| {
        Request::MemSet(MemSet {
            domain,
            kib,
            config,
            maximum: max,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::MemSet, &past, request)).await
}

/// `rxm vcpu-set`
pub(crate) async fn vcpu_set(setting: &Setting, args: VcpuSetArgs) -> Result<Tally, Stop> {
    let VcpuSetArgs {
        domain,
        count,
        config,
        max,
    } = args;
    let cpus = if count == 1 {
        "1 virtual CPU".to_owned()
    } else {
        format!("{count} virtual CPUs")
    };
    let past = if max {
        format!("can have {cpus} from its next start on")
    } else {
        format!("has {cpus}")
    };
    let request = &|domain| {
        Request::VcpuSet(VcpuSet {
            domain,
            count,
            config,
            maximum: max,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::VcpuSet, &past, request)).await
}
