//! `drain`: a host that takes nothing new, until its jobs have ended; then what runs is moved or shut down.
//!
//! ```text
//! maintenance on --> leases left? --yes--> told, looked at again --.
//!                        |    ^                                    |
//!                        no   '------------------------------------'
//!                        v
//!      what runs: moved (--to), else shut down (--shutdown), else named
//! ```
//! It can be interrupted and begun again at any point: the host stays in maintenance, and what is done is done.

use std::{ops::ControlFlow, time::Duration};

use clap::Args;
use serde_json::json;
use tokio::time::{Instant, sleep};
use xman_client::{Address, Caller, Explanation, Failure, Kind, fleet};
use xman_common::{
    name::{DomainRef, LabelValue},
    protocol::{
        Ask, DomainRow, HypervisorTrouble, LeaseKey, LeaseList, LeaseRow, Reply, Request, Verb,
    },
};

use crate::{
    change::{HOSTS, agree, change, may},
    exit::Tally,
    lease::leases,
    maintenance::put,
    migrate::{move_one, rehearse_arrival},
    output::named,
    setting::{Setting, Stop},
    status::{PENDING, keys, room},
    target::{self, Listed, Target, ailing},
    told::Told,
    units::lifetime,
};

/// What `rxm help drain` says after the options.
pub(crate) const HELP: &str = "\
Puts the hosts into maintenance, and waits until no lease is left on them: as long as it takes, or as --within says. What runs there then is moved to another host with \
    --to, is asked to shut down with --shutdown, and with both is shut down where it cannot be moved. Without either it runs on, and is named. \
    While leases are left, nothing is moved or shut down.

It asks first. It can be interrupted and begun again at any time: the hosts stay in maintenance until 'rxm maintenance off'. \
    A guest has as long to shut down as --timeout says.

Examples:
  rxm -H skirit80 drain --dry-run --to skirit81
  rxm -H skirit80 drain --reason 'a new kernel'
  rxm -H skirit80 drain --to skirit81 --within 12h
  rxm -H @grid drain --shutdown --timeout 5m --yes

JSON: for each host host, drained (whether nothing is left of what was to go), leases (those that are left), running (the domains that run on), verb (maintenance); \
    and for each domain that was moved or shut down the fields of job or list, and verb.";

/// How often a host is asked what is left.
const LOOK: Duration = Duration::from_secs(2);

/// Arguments of `drain`.
#[derive(Debug, Args)]
pub(crate) struct DrainArgs {
    /// Move what runs to this host, HOST or HOST:PORT, as both you and the drained hosts know it
    #[arg(long, value_name = "HOST")]
    pub(crate) to: Option<Address>,
    /// Ask what runs, and could not be moved, to shut down
    #[arg(long)]
    pub(crate) shutdown: bool,
    /// Why, for those whose jobs are refused
    #[arg(long, value_name = "TEXT", default_value = "it is drained")]
    pub(crate) reason: LabelValue,
    /// Give up waiting for jobs after so long, as 12h [default: wait until they have ended]
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    pub(crate) within: Option<Duration>,
}

/// What came of one host.
struct Drained {
    /// Leases that are left.
    leases: Vec<LeaseRow>,
    /// What was done to its domains.
    deeds: Vec<Done>,
    /// Domains that run on.
    running: Vec<String>,
    troubles: Vec<HypervisorTrouble>,
    /// Somebody pressed Ctrl-C while there was more to do.
    interruption: Option<Explanation>,
}

/// What came of one domain.
struct Done {
    verb: Verb,
    past: String,
    target: Target,
    outcome: Result<Reply, Explanation>,
}

/// `rxm drain`
pub(crate) async fn drain(setting: &Setting, args: DrainArgs) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    if let Some(to) = args.to.as_ref().filter(|to| hosts.contains(to)) {
        return Err(Stop::Usage(format!(
            "{to} is to be drained itself; nothing can be moved there"
        )));
    }
    setting.check_ticket().await?;
    if setting.dry_run {
        return rehearse(setting, &args, hosts).await;
    }
    let names: Vec<_> = hosts.iter().map(Address::to_string).collect();
    agree(setting, &about(&names, &args)).await?;
    let args = &args;
    let mut told = Told::new(setting, Verb::Maintenance, hosts.len() > 1);
    fleet::each(
        hosts,
        HOSTS,
        |address| async move {
            let drained = drain_host(setting, args, &address).await;
            (address, drained)
        },
        |(address, drained)| {
            match drained {
                Ok(drained) => tell(&mut told, args, &address, drained),
                Err(error) => told.of(Verb::Maintenance).failed_on(&address, error),
            }
            ControlFlow::Continue(())
        },
    )
    .await;
    told.finish()
}

/// What is about to be done, as it is asked.
fn about(names: &[String], args: &DrainArgs) -> String {
    let then = match (&args.to, args.shutdown) {
        (None, false) => String::new(),
        (None, true) => ", and then to shut down what runs there".to_owned(),
        (Some(to), false) => format!(", and then to move what runs there to {to}"),
        (Some(to), true) => format!(
            ", and then to move what runs there to {to}, or shut it down where that is not possible"
        ),
    };
    format!(
        "about to put {} into maintenance and wait until the jobs there have ended{then}",
        named(names)
    )
}

async fn drain_host(
    setting: &Setting,
    args: &DrainArgs,
    address: &Address,
) -> Result<Drained, Explanation> {
    let mut caller = setting.caller(address);
    put(setting, &mut caller, Some(args.reason.clone())).await?;
    let stays = |error: Explanation| Explanation {
        advice: format!(
            "it stays in maintenance until `rxm -H {address} maintenance off`{}",
            match error.advice.as_str() {
                "" => String::new(),
                advice => format!("; {advice}"),
            }
        ),
        ..error
    };
    let leases = emptied(setting, &mut caller, args.within)
        .await
        .map_err(stays)?;
    let mut drained = Drained {
        leases,
        deeds: Vec::new(),
        running: Vec::new(),
        troubles: Vec::new(),
        interruption: None,
    };
    let may_go = drained.leases.is_empty();
    let Listed { rows, troubles } = listed(setting, &mut caller).await.map_err(stays)?;
    drained.troubles = troubles;
    let is_wanted = may_go && (args.to.is_some() || args.shutdown);
    for row in rows {
        let name = row.name.to_string();
        if is_wanted && drained.interruption.is_none() && setting.patience.interrupt.is_raised() {
            let interrupted = setting.explain(&Failure::Interrupted, address);
            drained.interruption = Some(stays(interrupted));
        }
        let goes = is_wanted && drained.interruption.is_none();
        let gone = goes && take_away(setting, args, &mut caller, row, &mut drained.deeds).await;
        if !gone {
            drained.running.push(name);
        }
    }
    Ok(drained)
}

/// Returns the leases that are left at the end of the time; none where all have ended before.
async fn emptied(
    setting: &Setting,
    caller: &mut Caller,
    within: Option<Duration>,
) -> Result<Vec<LeaseRow>, Explanation> {
    let end = within.map(|within| Instant::now() + within);
    let mut said = None;
    loop {
        caller.rest();
        let left = leases(setting, caller, LeaseList::default()).await?;
        // There may be leases that the caller may not see.
        let cpus = room(setting, caller).await?.used_cpus;
        if left.is_empty() && cpus == 0 {
            return Ok(left);
        }
        let waits = waits_for(&left, cpus);
        if said.as_ref() != Some(&waits) {
            let address = caller.address();
            setting.output.note(&format!("{address}: {waits}"));
            said = Some(waits);
        }
        let over = end.is_some_and(|end| Instant::now() >= end);
        match over {
            true if left.is_empty() => return Err(unseen(cpus)),
            true => return Ok(left),
            false => {}
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            () = setting.patience.interrupt.raised() => {
                return Err(setting.explain(&Failure::Interrupted, caller.address()));
            }
        }
    }
}

fn unseen(cpus: u32) -> Explanation {
    Explanation {
        kind: Kind::Refused,
        code: PENDING,
        what: format!("{cpus} CPUs are still with jobs that you may not see"),
        advice: String::new(),
        is_common: false,
    }
}

/// What a drain waits for, in words.
fn waits_for(left: &[LeaseRow], cpus: u32) -> String {
    let names: Vec<_> = left
        .iter()
        .map(|lease| format!("{} in {}", lease.key, lease.domain))
        .collect();
    match names.as_slice() {
        [] => format!("waits for jobs that you may not see, with {cpus} CPUs"),
        [one] => format!("waits for 1 lease: {one}"),
        _ => format!("waits for {} leases: {}", names.len(), named(&names)),
    }
}

/// Asks a host for the domains that run on it.
async fn listed(setting: &Setting, caller: &mut Caller) -> Result<Listed, Explanation> {
    caller.rest();
    let mut listed = target::rows(setting, caller, &[], &[]).await?;
    listed.rows.retain(|row| row.state.is_active());
    Ok(listed)
}

/// Moves or shuts down one domain, as far as that was asked for; returns whether it is gone.
async fn take_away(
    setting: &Setting,
    args: &DrainArgs,
    caller: &mut Caller,
    row: DomainRow,
    deeds: &mut Vec<Done>,
) -> bool {
    let target = target_of(caller.address(), row);
    target.aim(setting, caller);
    if let Some(to) = &args.to {
        caller.rest();
        setting
            .output
            .note(&format!("{}: moves to {to}", target.label()));
        let moved = move_one(setting, caller, &target, to).await;
        let is_moved = moved.is_ok();
        deeds.push(Done {
            verb: Verb::Migrate,
            past: format!("moved to {to}"),
            target: target.clone(),
            outcome: moved,
        });
        if is_moved {
            return true;
        }
    }
    // Who is interrupted in the middle of a journey wants no guest shut down instead.
    if !args.shutdown || setting.patience.interrupt.is_raised() {
        return false;
    }
    caller.rest();
    setting
        .output
        .note(&format!("{}: is asked to shut down", target.label()));
    let request = Request::Shutdown(Ask {
        domain: target.domain.clone(),
        wait: true,
        force: false,
    });
    let shut = change(setting, caller, &request).await;
    let is_shut = shut.is_ok();
    deeds.push(Done {
        verb: Verb::Shutdown,
        past: "shut down".to_owned(),
        target,
        outcome: shut,
    });
    is_shut
}

fn target_of(address: &Address, row: DomainRow) -> Target {
    Target {
        address: address.clone(),
        domain: DomainRef::Uuid(row.uuid),
        row: Some(row),
        by: None,
    }
}

fn tell(told: &mut Told<'_>, args: &DrainArgs, address: &Address, drained: Drained) {
    let Drained {
        leases,
        deeds,
        running,
        troubles,
        interruption,
    } = drained;
    for done in deeds {
        told.of(done.verb)
            .take(&done.target, &done.past, done.outcome);
    }
    let told = told.of(Verb::Maintenance);
    for trouble in &troubles {
        told.failed_on(address, ailing(trouble));
    }
    let left: Vec<LeaseKey> = leases.into_iter().map(|lease| lease.key).collect();
    let wanted_gone = args.to.is_some() || args.shutdown;
    let value = json!({
        "host": address,
        "drained": left.is_empty() && troubles.is_empty() && (running.is_empty() || !wanted_gone),
        "leases": keys(&left),
        "running": running,
    });
    if let Some(interruption) = interruption {
        told.failed_with(value, address.to_string(), &interruption);
    } else if left.is_empty() {
        let said = format!("{address}: {}", sentence(&running));
        told.done_with(value, &[said], &[address.to_string()]);
    } else {
        told.failed_with(value, address.to_string(), &still_there(&left));
    }
}

fn sentence(running: &[String]) -> String {
    match running {
        [] => "drained; no job and no domain is left".to_owned(),
        [one] => format!("no job is left; 1 domain runs on: {one}"),
        several => format!(
            "no job is left; {} domains run on: {}",
            several.len(),
            named(several)
        ),
    }
}

fn still_there(left: &[LeaseKey]) -> Explanation {
    let leases = if left.len() == 1 {
        "lease is"
    } else {
        "leases are"
    };
    Explanation {
        kind: Kind::Refused,
        code: PENDING,
        what: format!(
            "{} {leases} left after --within: {}",
            left.len(),
            named(&keys(left))
        ),
        advice: "it stays in maintenance, and the same again waits on".to_owned(),
        is_common: false,
    }
}

/// Shows what would be waited for, moved and shut down, and whether one may.
async fn rehearse(setting: &Setting, args: &DrainArgs, hosts: Vec<Address>) -> Result<Tally, Stop> {
    let mut told = Told::new(setting, Verb::Maintenance, hosts.len() > 1);
    let verb = match (&args.to, args.shutdown) {
        (Some(_), _) => Some(Verb::Migrate),
        (None, true) => Some(Verb::Shutdown),
        (None, false) => None,
    };
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let would = look(setting, verb, &mut caller).await;
        (address, would)
    });
    for (address, would) in heard.await {
        let Would {
            maintenance,
            leases,
            domains,
        } = match would {
            Ok(would) => would,
            Err(error) => {
                told.of(Verb::Maintenance).failed_on(&address, error);
                continue;
            }
        };
        told.of(Verb::Maintenance)
            .rehearse_line(&address, &address.to_string(), None, maintenance);
        if !leases.is_empty() {
            let waits = waits_for(&leases, 0);
            setting.output.note(&format!("{address}: it {waits}"));
        }
        for (target, allowed) in domains {
            let verb = verb.unwrap_or(Verb::Maintenance);
            told.of(verb)
                .rehearse_line(&address, &target.label(), target.row.as_ref(), allowed);
        }
    }
    let mut tally = told.finish()?;
    if let Some(to) = &args.to {
        tally.add(rehearse_arrival(setting, to).await);
    }
    Ok(tally)
}

/// What a drain would meet on a host.
struct Would {
    maintenance: bool,
    leases: Vec<LeaseRow>,
    /// What would be moved or shut down, and whether one may.
    domains: Vec<(Target, bool)>,
}

async fn look(
    setting: &Setting,
    verb: Option<Verb>,
    caller: &mut Caller,
) -> Result<Would, Explanation> {
    let maintenance = may(setting, caller, Verb::Maintenance, None).await?;
    let leases = leases(setting, caller, LeaseList::default()).await?;
    let mut domains = Vec::new();
    if let Some(verb) = verb {
        for row in listed(setting, caller).await?.rows {
            let target = target_of(caller.address(), row);
            target.aim(setting, caller);
            caller.rest();
            let allowed = may(setting, caller, verb, Some(&target.domain)).await?;
            domains.push((target, allowed));
        }
    }
    Ok(Would {
        maintenance,
        leases,
        domains,
    })
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use xman_common::protocol::LeaseState;

    use super::*;
    use crate::{
        args::{Cli, Command},
        lease::tests::lease_in,
    };

    fn read(line: &[&str]) -> Option<DrainArgs> {
        let words = [&["rxm", "-H", "a", "drain"], line].concat();
        let Command::Drain(args) = Cli::try_parse_from(words).ok()?.command else {
            panic!("no drain")
        };
        Some(args)
    }

    #[test]
    fn what_is_asked_is_what_will_be_done() {
        let names = ["a".to_owned(), "b".to_owned()];
        let asked = |line: &[&str]| about(&names, &read(line).unwrap());
        let begin = "about to put a, b into maintenance and wait until the jobs there have ended";
        assert_eq!(asked(&[]), begin);
        assert_eq!(
            asked(&["--shutdown"]),
            format!("{begin}, and then to shut down what runs there")
        );
        assert_eq!(
            asked(&["--to", "c:7"]),
            format!("{begin}, and then to move what runs there to c:7")
        );
        assert!(asked(&["--to", "c", "--shutdown"]).contains("or shut it down where"));
    }

    #[test]
    fn the_time_and_the_reason_are_read() {
        let args = read(&["--within", "72h", "--reason", "x"]).unwrap();
        assert_eq!(args.within, Some(Duration::from_secs(72 * 3600)));
        assert_eq!(args.reason.as_str(), "x");
        assert!(!read(&[]).unwrap().reason.as_str().is_empty());
        for bad in [
            &["--within", "0s"][..],
            &["--reason", ""],
            &["--to", ""],
            &["web"],
        ] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_waited_for_is_named() {
        let one = lease_in("web", LeaseState::Active);
        assert_eq!(
            waits_for(std::slice::from_ref(&one), 2),
            "waits for 1 lease: slurm/grid/4711/0 in web"
        );
        assert_eq!(
            waits_for(&[one.clone(), lease_in("db", LeaseState::Preempted)], 2),
            "waits for 2 leases: slurm/grid/4711/0 in web, slurm/grid/4711/0 in db"
        );
        assert!(waits_for(&[], 3).contains("may not see, with 3 CPUs"));
    }

    #[test]
    fn what_is_left_is_told() {
        assert!(sentence(&[]).contains("no domain is left"));
        assert!(sentence(&["web".to_owned()]).ends_with("1 domain runs on: web"));
        let two = ["web".to_owned(), "db".to_owned()];
        assert!(sentence(&two).ends_with("2 domains run on: web, db"));
        let key: LeaseKey = "slurm/grid/4711/0".parse().unwrap();
        assert_eq!(
            still_there(std::slice::from_ref(&key)).to_string(),
            "1 lease is left after --within: slurm/grid/4711/0; it stays in maintenance, and the same again waits on"
        );
        assert!(
            still_there(&[key.clone(), key])
                .what
                .starts_with("2 leases are")
        );
    }
}
