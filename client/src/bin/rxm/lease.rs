//! `lease begin|end|list|show`: jobs that begin in domains, and the room that others make for them.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};
use xman_client::{Address, Caller, Explanation, Kind, fleet};
use xman_common::{
    name::{DomainName, DomainRef, Principal, Tag},
    protocol::{
        Item, LeaseAnswer, LeaseBegin, LeaseEnd, LeaseKey, LeaseList, LeaseRow, LeaseState, Reply,
        Request, Then, Verb,
    },
};

use crate::{
    change::{change, may, rehearse},
    exit::{FAILED, Tally},
    heard::conclude,
    options::Format,
    output::{Field, Row, Style, error_value, key_value, named},
    setting::{Setting, Stop, misfit},
    status::{PENDING, keys},
    target::{self, Purpose, Target},
    told::Told,
    units::{lifetime, moment, span},
};

/// What `rxm help lease` says after the options.
pub(crate) const HELP: &str = "\
A lease is one run of one job of a batch system, in one domain (a job that has several domains of a host has a lease in each). Its KEY is SYSTEM/CLUSTER/JOB/RUN, as slurm/grid/4711/0: the batch system as the host's xmand.toml \
    names it, its cluster, cell or server, the job's id there, and how often the job was begun before. \
    The key is all that has to be remembered: the same begin again is the same lease and tells how it stands, and an end may be said twice.

Examples:
  rxm lease begin slurm/grid/4711/0 skirit80/grid-1
  rxm -H skirit80 lease end slurm/grid/4711/0
  rxm -H @grid lease list --system slurm
  rxm -H @grid lease show slurm/grid/4711/0";

const BEGIN_HELP: &str = "\
Domains of a lower rank give way for the job, as deep as their classes say. rxm waits until the domain has its room, at most as long as --timeout; a lease \
    that is still under way then stays, and the same command again waits on. With --hold the room is only kept, for so long, and nobody gives \
    way: the same key without it begins in earnest.

Exit codes: 0 granted, or with --no-wait under way; 1 refused, or still under way after --timeout; the others as always.

Examples:
  rxm lease begin slurm/grid/4711/0 skirit80/grid-1 --user alice@EXAMPLE.ORG --timeout 2m
  rxm lease begin slurm/grid/4711/0 skirit80/grid-1 --hold 30s
  rxm lease begin slurm/grid/4711/0 skirit80/grid-1 --no-wait
  rxm lease begin pbs/main/12.pbs01/0 skirit80/grid-1 --preemptible --ends-in 48h

JSON: the fields of lease list, verb, and answer: granted or pending. A refusal has host, lease, domain, uuid, answer (refused), why, \
    then (later: ask again; elsewhere: ask another host; never: this run has ended or was never right), verb.";

const END_HELP: &str = "\
All hosts that are named are asked. This run of the job ends there, in all its domains or in the one that is named, and any before it; later ones go on. A lease that is not there has ended well. \
    Who gave way for it comes back, unless somebody else holds it.

Examples:
  rxm -H skirit80 lease end slurm/grid/4711/0
  rxm lease end skirit80/slurm/grid/4711/0
  rxm -H skirit80 lease end slurm/grid/4711/0 grid-1
  rxm -H @grid lease end slurm/grid/4711/0 --dry-run

JSON: host, lease, ended (the leases that there were), verb.";

const LIST_HELP: &str = "\
Examples:
  rxm -H @grid lease list
  rxm -H @grid lease list --system slurm -o wide
  rxm -H @grid -o json lease list | jq '.[] | select(.state == \"preempted\")'

JSON: host, lease, system, cluster, job, run, domain, uuid, user (or null), principal (who said so), state (reserved, preparing, active, preempted), preemptible, \
    victims (the domains that give way for it), began_ms, ends_in_ms (or null).";

const SHOW_HELP: &str = "\
Examples:
  rxm -H @grid lease show slurm/grid/4711/0
  rxm lease show skirit80/slurm/grid/4711/0 -o json

JSON is that of lease list.";

/// What to do with leases.
#[derive(Debug, Subcommand)]
pub(crate) enum Lease {
    /// Begin a job in a domain: others give way for it
    #[command(after_help = BEGIN_HELP)]
    Begin(BeginArgs),
    /// End a job: those who gave way come back
    #[command(after_help = END_HELP)]
    End {
        /// SYSTEM/CLUSTER/JOB/RUN, or HOST/SYSTEM/CLUSTER/JOB/RUN
        #[arg(value_name = "KEY")]
        lease: String,
        /// Only in this domain, where the job has several of a host
        #[arg(value_name = "DOMAIN")]
        domain: Option<DomainRef>,
    },
    /// List the leases of hosts
    #[command(after_help = LIST_HELP)]
    List {
        /// Only those of this batch system
        #[arg(long)]
        system: Option<Tag>,
    },
    /// Show how a lease stands
    #[command(after_help = SHOW_HELP)]
    Show {
        /// SYSTEM/CLUSTER/JOB/RUN, or HOST/SYSTEM/CLUSTER/JOB/RUN
        #[arg(value_name = "KEY")]
        lease: String,
    },
}

/// Arguments of `lease begin`.
#[derive(Debug, Args)]
pub(crate) struct BeginArgs {
    /// SYSTEM/CLUSTER/JOB/RUN, as slurm/grid/4711/0
    #[arg(value_name = "KEY")]
    pub(crate) lease: LeaseKey,
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// Whose job it is, a full principal: policies know it while the job lasts
    #[arg(long, value_name = "PRINCIPAL")]
    pub(crate) user: Option<Principal>,
    /// The job may give way to a better one [default: as its domain's class says]
    #[arg(long, conflicts_with = "no_preempt")]
    pub(crate) preemptible: bool,
    /// The job does not give way
    #[arg(long)]
    pub(crate) no_preempt: bool,
    /// Only keep the room for so long, as 30s: nobody gives way yet
    #[arg(long, value_name = "TIME", value_parser = lifetime, conflicts_with = "ends_in")]
    pub(crate) hold: Option<Duration>,
    /// The lease ends by itself after so long, as 48h
    #[arg(long, value_name = "TIME", value_parser = lifetime)]
    pub(crate) ends_in: Option<Duration>,
    /// Return as soon as it is written down: the same command again tells how it stands
    #[arg(long)]
    pub(crate) no_wait: bool,
}

impl BeginArgs {
    fn request(&self, target: &Target) -> LeaseBegin {
        let ms = |time: Duration| u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        LeaseBegin {
            key: self.lease.clone(),
            domain: target.domain.clone(),
            user: self.user.clone(),
            preemptible: (self.preemptible || self.no_preempt).then_some(self.preemptible),
            ends_in_ms: self.hold.or(self.ends_in).map(ms),
            reserve: self.hold.is_some(),
            wait: !self.no_wait,
        }
    }
}

/// `rxm lease`
pub(crate) async fn lease(setting: &Setting, command: Lease) -> Result<Tally, Stop> {
    match command {
        Lease::Begin(args) => begin(setting, args).await,
        Lease::End { lease, domain } => end(setting, &lease, domain).await,
        Lease::List { system } => list(setting, system).await,
        Lease::Show { lease } => show(setting, &lease).await,
    }
}

async fn begin(setting: &Setting, args: BeginArgs) -> Result<Tally, Stop> {
    let (target, mut caller, found) =
        target::find_one(setting, &args.domain, Purpose::Change).await?;
    if setting.dry_run {
        let targets = vec![target];
        return rehearse(setting, (Verb::LeaseBegin, None), targets, &found.silent).await;
    }
    let request = args.request(&target);
    let waits = request.wait;
    let mut told = Told::new(setting, Verb::LeaseBegin, false);
    match change(setting, &mut caller, &Request::LeaseBegin(request)).await {
        Ok(Reply::Lease(answer)) => {
            let value = answer_value(&target, &args.lease, &answer);
            match outcome(&answer, waits) {
                Ok(said) => {
                    let said = format!("{}: {said}", target.label());
                    told.done_with(value, &[said], &[args.lease.to_string()]);
                }
                Err(error) => told.failed_with(value, target.label(), &error),
            }
        }
        Ok(_) => told.take(&target, "", Err(misfit())),
        Err(error) => told.take(&target, "", Err(error)),
    }
    told.finish()
}

/// What is said of an answer, or why it is not what was wanted.
fn outcome(answer: &LeaseAnswer, waits: bool) -> Result<String, Explanation> {
    let refused = |code, what: String, advice: String| Explanation {
        kind: Kind::Refused,
        code,
        what,
        advice,
        is_common: false,
    };
    match answer {
        LeaseAnswer::Granted(row) => Ok(granted(row)),
        LeaseAnswer::Pending(row) if !waits => Ok(format!(
            "{} is under way{}; the same command again tells how it stands",
            row.key,
            gives_way(&row.victims, "gives way", "give way")
        )),
        LeaseAnswer::Pending(row) => Err(refused(
            PENDING,
            format!(
                "{} is still under way after --timeout{}",
                row.key,
                gives_way(&row.victims, "gives way", "give way")
            ),
            format!(
                "it goes on: the same command again waits longer, `rxm lease end {}` gives it up",
                row.key
            ),
        )),
        LeaseAnswer::Refused { why, then } => Err(refused(
            "refused",
            format!("refused: {why}"),
            match then {
                Then::Later => "ask again later",
                Then::Elsewhere => "ask another host",
                Then::Never => "do not ask again",
            }
            .to_owned(),
        )),
    }
}

fn granted(row: &LeaseRow) -> String {
    let key = &row.key;
    match (row.state, row.ends_in_ms) {
        (LeaseState::Reserved, Some(ms)) => format!(
            "room is kept for {key}, for {}",
            span(Duration::from_millis(ms))
        ),
        (LeaseState::Reserved, None) => format!("room is kept for {key}"),
        (LeaseState::Active, _) => format!(
            "{key} has its room{}",
            gives_way(&row.victims, "has given way", "have given way")
        ),
        (state @ (LeaseState::Preparing | LeaseState::Preempted), _) => format!("{key} is {state}"),
    }
}

fn gives_way(victims: &[DomainName], one: &str, several: &str) -> String {
    let names: Vec<_> = victims.iter().map(ToString::to_string).collect();
    match names.as_slice() {
        [] => String::new(),
        [name] => format!(": {name} {one}"),
        _ => format!(": {} {several}", named(&names)),
    }
}

fn answer_value(target: &Target, key: &LeaseKey, answer: &LeaseAnswer) -> Value {
    let of_row = |row: &LeaseRow, answer: &str| {
        let mut value = lease_value(&target.address, row);
        if let Value::Object(fields) = &mut value {
            fields.insert("answer".to_owned(), json!(answer));
        }
        value
    };
    match answer {
        LeaseAnswer::Granted(row) => of_row(row, "granted"),
        LeaseAnswer::Pending(row) => of_row(row, "pending"),
        LeaseAnswer::Refused { why, then } => {
            let row = target.row.as_ref();
            json!({
                "host": target.address,
                "lease": key.to_string(),
                "domain": row.map(|row| &row.name),
                "uuid": row.map(|row| row.uuid),
                "answer": "refused",
                "why": why,
                "then": then.name(),
            })
        }
    }
}

/// Reads `KEY`, which is looked for on all hosts that are named, or `HOST/KEY`.
fn place(setting: &Setting, typed: &str) -> Result<(Vec<Address>, LeaseKey), Stop> {
    let (host, key) = cut(typed);
    let key = key
        .parse()
        .map_err(|error| Stop::Usage(format!("{error}")))?;
    let hosts = match host {
        None => setting.hosts()?,
        Some(host) => match setting.hosts_before_slash(host)? {
            hosts if hosts.is_empty() => {
                return Err(Stop::Usage(format!(
                    "'{typed}' names no host before its lease"
                )));
            }
            hosts => hosts,
        },
    };
    Ok((hosts, key))
}

/// A lease has four parts; what stands before them is a host, or several.
fn cut(typed: &str) -> (Option<&str>, &str) {
    match typed.rmatch_indices('/').nth(3) {
        None => (None, typed),
        Some((at, _)) => (typed.get(..at), typed.get(at + 1..).unwrap_or_default()),
    }
}

async fn end(setting: &Setting, typed: &str, domain: Option<DomainRef>) -> Result<Tally, Stop> {
    let (hosts, key) = place(setting, typed)?;
    setting.check_ticket().await?;
    let several = hosts.len() > 1;
    let mut told = Told::new(setting, Verb::LeaseEnd, several);
    if setting.dry_run {
        let allowed = fleet::all(hosts, fleet::WIDTH, |address| async move {
            let mut caller = setting.caller(&address);
            let allowed = may(setting, &mut caller, Verb::LeaseEnd, None).await;
            (address, allowed)
        });
        let there = domain.as_ref().map(|domain| format!(" in {domain}"));
        let what = format!("{key}{}", there.unwrap_or_default());
        for (address, allowed) in allowed.await {
            match allowed {
                Ok(may) => told.rehearse_line(&address, &format!("{what} on {address}"), None, may),
                Err(error) => told.failed_on(&address, error),
            }
        }
        return told.finish();
    }
    let request = &Request::LeaseEnd(LeaseEnd {
        key: key.clone(),
        domain,
    });
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let ended = match change(setting, &mut caller, request).await {
            Ok(Reply::Ended(keys)) => Ok(keys),
            Ok(_) => Err(misfit()),
            Err(error) => Err(error),
        };
        (address, ended)
    })
    .await;
    let is_nowhere = heard
        .iter()
        .all(|(_, ended)| ended.as_ref().is_ok_and(Vec::is_empty));
    for (address, ended) in heard {
        match ended {
            Ok(ended) => {
                let value =
                    json!({ "host": address, "lease": key.to_string(), "ended": keys(&ended) });
                let (said, names) = ended_lines(&address, &ended, several);
                told.done_with(value, &said, &names);
            }
            Err(error) => told.failed_on(&address, error),
        }
    }
    if is_nowhere && !setting.output.is_structured() {
        setting
            .output
            .note(&format!("{key} was nowhere: it has ended already"));
    }
    told.finish()
}

/// What is said of leases that have ended on a host, and their names.
pub(crate) fn ended_lines(
    address: &Address,
    ended: &[LeaseKey],
    several: bool,
) -> (Vec<String>, Vec<String>) {
    let said = ended
        .iter()
        .map(|key| format!("{address}: {key} has ended"));
    let name = |key: &LeaseKey| match several {
        true => format!("{address}/{key}"),
        false => key.to_string(),
    };
    (said.collect(), ended.iter().map(name).collect())
}

/// A host's leases, or why it did not tell.
type Heard = (Address, Result<Vec<LeaseRow>, Explanation>);

async fn ask_all(setting: &Setting, hosts: Vec<Address>, list: LeaseList) -> Vec<Heard> {
    let list = &list;
    fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let leases = leases(setting, &mut caller, list.clone()).await;
        (address, leases)
    })
    .await
}

/// Asks one host for its leases.
pub(crate) async fn leases(
    setting: &Setting,
    caller: &mut Caller,
    list: LeaseList,
) -> Result<Vec<LeaseRow>, Explanation> {
    let (_, items) = setting.ask(caller, &Request::LeaseList(list)).await?;
    let lease = |item| {
        if let Item::Lease(lease) = item {
            Ok(lease)
        } else {
            Err(misfit())
        }
    };
    items.into_iter().map(lease).collect()
}

async fn list(setting: &Setting, system: Option<Tag>) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let heard = ask_all(setting, hosts, LeaseList { system, key: None }).await;
    match setting.output.format {
        Format::Json | Format::Yaml => print_values(setting, &heard)?,
        Format::Name => print_names(setting, &heard)?,
        Format::Table | Format::Wide => {
            let is_wide = setting.output.format == Format::Wide;
            let rows: Vec<_> = all(&heard)
                .map(|(address, lease)| row(address, lease, is_wide))
                .collect();
            let is_empty = rows.is_empty() && heard.iter().all(|(_, leases)| leases.is_ok());
            setting.output.table(headers(is_wide), rows)?;
            if setting.output.is_terminal && is_empty {
                setting.output.note("no leases");
            }
        }
    }
    Ok(conclude(setting, &heard))
}

async fn show(setting: &Setting, typed: &str) -> Result<Tally, Stop> {
    let (hosts, key) = place(setting, typed)?;
    setting.check_ticket().await?;
    let list = LeaseList {
        system: None,
        key: Some(key.clone()),
    };
    let heard = ask_all(setting, hosts, list).await;
    let is_there = all(&heard).next().is_some();
    match setting.output.format {
        Format::Json | Format::Yaml => print_values(setting, &heard)?,
        Format::Name => print_names(setting, &heard)?,
        Format::Table | Format::Wide => {
            for (number, (address, lease)) in all(&heard).enumerate() {
                if number > 0 {
                    setting.output.raw("\n")?;
                }
                setting.output.table_without_headers(card(address, lease))?;
            }
        }
    }
    let tally = conclude(setting, &heard);
    let nobody_answered = heard.iter().all(|(_, leases)| leases.is_err());
    if is_there || nobody_answered {
        return Ok(tally);
    }
    setting.output.say(&format!(
        "no host that answered shows a lease {key}; `rxm lease list` shows those there are"
    ));
    Err(Stop::Code(FAILED))
}

fn all(heard: &[Heard]) -> impl Iterator<Item = (&Address, &LeaseRow)> {
    heard
        .iter()
        .flat_map(|(address, leases)| leases.iter().flatten().map(move |lease| (address, lease)))
}

fn print_values(setting: &Setting, heard: &[Heard]) -> Result<(), Stop> {
    let values = |(address, leases): &Heard| match leases {
        Ok(leases) => leases.iter().map(|row| lease_value(address, row)).collect(),
        Err(error) => vec![error_value(address, error)],
    };
    let values: Vec<Value> = heard.iter().flat_map(values).collect();
    Ok(setting.output.values(values)?)
}

fn print_names(setting: &Setting, heard: &[Heard]) -> Result<(), Stop> {
    for (address, lease) in all(heard) {
        setting.output.line(&if heard.len() > 1 {
            format!("{address}/{}", lease.key)
        } else {
            lease.key.to_string()
        })?;
    }
    Ok(())
}

fn headers(is_wide: bool) -> &'static [&'static str] {
    match is_wide {
        false => &["HOST", "LEASE", "DOMAIN", "STATE", "USER", "BEGAN"],
        true => &[
            "HOST",
            "LEASE",
            "DOMAIN",
            "STATE",
            "USER",
            "BEGAN",
            "ENDS IN",
            "PREEMPTIBLE",
            "GIVE WAY",
            "BY",
            "UUID",
        ],
    }
}

fn state_style(state: LeaseState) -> Style {
    match state {
        LeaseState::Active => Style::Good,
        LeaseState::Reserved | LeaseState::Preparing | LeaseState::Preempted => Style::Waiting,
    }
}

fn row(address: &Address, lease: &LeaseRow, is_wide: bool) -> Row {
    let mut cells: Vec<Field> = vec![
        address.to_string().into(),
        lease.key.to_string().into(),
        lease.domain.to_string().into(),
        Field {
            text: lease.state.to_string(),
            style: state_style(lease.state),
        },
        user(lease).into(),
        moment(lease.began_ms / 1000).into(),
    ];
    if is_wide {
        cells.extend([
            ends_in(lease).into(),
            yes_no(lease.preemptible).into(),
            victims(lease).into(),
            lease.principal.to_string().into(),
            lease.uuid.to_string().into(),
        ]);
    }
    Row::plain(cells)
}

fn card(address: &Address, lease: &LeaseRow) -> Vec<Row> {
    vec![
        key_value("Lease:", lease.key.to_string()),
        key_value("Host:", address.to_string()),
        key_value("Domain:", format!("{} ({})", lease.domain, lease.uuid)),
        key_value("State:", lease.state.to_string()),
        key_value("User:", user(lease)),
        key_value("Preemptible:", yes_no(lease.preemptible).to_owned()),
        key_value("Give way:", victims(lease)),
        key_value("Began:", moment(lease.began_ms / 1000)),
        key_value("Ends in:", ends_in(lease)),
        key_value("Said by:", lease.principal.to_string()),
    ]
}

fn user(lease: &LeaseRow) -> String {
    let user = lease.user.as_ref().map(ToString::to_string);
    user.unwrap_or_else(|| "-".to_owned())
}

fn ends_in(lease: &LeaseRow) -> String {
    let left = lease.ends_in_ms.map(Duration::from_millis);
    left.map_or_else(|| "-".to_owned(), span)
}

fn victims(lease: &LeaseRow) -> String {
    let names: Vec<_> = lease.victims.iter().map(DomainName::as_str).collect();
    if names.is_empty() {
        "-".to_owned()
    } else {
        names.join(", ")
    }
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// A lease as JSON has it.
pub(crate) fn lease_value(address: &Address, lease: &LeaseRow) -> Value {
    let job = &lease.key.job;
    json!({
        "host": address,
        "lease": lease.key.to_string(),
        "system": job.system,
        "cluster": job.cluster,
        "job": job.id,
        "run": lease.key.run,
        "domain": lease.domain,
        "uuid": lease.uuid,
        "user": lease.user,
        "principal": lease.principal,
        "state": lease.state.name(),
        "preemptible": lease.preemptible,
        "victims": lease.victims,
        "began_ms": lease.began_ms,
        "ends_in_ms": lease.ends_in_ms,
    })
}

#[cfg(test)]
pub(crate) mod tests {
    use clap::Parser;
    use uuid::Uuid;

    use super::*;
    use crate::{
        args::{Cli, Command},
        status::tests::key,
    };

    pub(crate) fn lease_in(domain: &str, state: LeaseState) -> LeaseRow {
        LeaseRow {
            key: key(),
            domain: domain.parse().unwrap(),
            uuid: Uuid::from_u128(7),
            user: Some("alice@R".parse().unwrap()),
            principal: "slurm/ctl@R".parse().unwrap(),
            state,
            preemptible: true,
            victims: Vec::new(),
            began_ms: 5000,
            ends_in_ms: None,
        }
    }

    fn with_victims(state: LeaseState, victims: &[&str]) -> LeaseRow {
        LeaseRow {
            victims: victims.iter().map(|name| name.parse().unwrap()).collect(),
            ..lease_in("web", state)
        }
    }

    fn target() -> Target {
        Target {
            address: "a:7".parse().unwrap(),
            domain: DomainRef::Uuid(Uuid::from_u128(7)),
            row: None,
            by: None,
        }
    }

    fn begin(line: &[&str]) -> Option<LeaseBegin> {
        let words = [&["rxm", "lease", "begin", "slurm/grid/4711/0", "web"], line].concat();
        let Command::Lease(Lease::Begin(args)) = Cli::try_parse_from(words).ok()?.command else {
            panic!("no lease begin")
        };
        Some(args.request(&target()))
    }

    #[test]
    fn what_is_typed_is_what_is_asked() {
        let plain = begin(&[]).unwrap();
        assert_eq!(
            plain,
            LeaseBegin {
                key: key(),
                domain: target().domain,
                user: None,
                preemptible: None,
                ends_in_ms: None,
                reserve: false,
                wait: true,
            }
        );
        let all = [
            "--user",
            "alice@R",
            "--preemptible",
            "--ends-in",
            "48h",
            "--no-wait",
        ];
        assert_eq!(
            begin(&all),
            Some(LeaseBegin {
                user: "alice@R".parse().ok(),
                preemptible: Some(true),
                ends_in_ms: Some(48 * 3_600_000),
                wait: false,
                ..plain.clone()
            })
        );
        assert_eq!(
            begin(&["--hold", "30s", "--no-preempt"]),
            Some(LeaseBegin {
                preemptible: Some(false),
                ends_in_ms: Some(30_000),
                reserve: true,
                ..plain
            })
        );
        for bad in [
            &["--hold", "30s", "--ends-in", "1h"][..],
            &["--preemptible", "--no-preempt"],
            &["--user", "alice"],
            &["--hold", "0s"],
            &["--hold", "never"],
        ] {
            assert_eq!(begin(bad), None, "{bad:?}");
        }
        for bad in [
            &["lease"][..],
            &["lease", "begin", "slurm/grid/4711/0"],
            &["lease", "begin", "slurm/grid/4711", "web"],
            &["lease", "end"],
            &["lease", "list", "--system", "Slurm"],
        ] {
            assert!(
                Cli::try_parse_from([&["rxm"], bad].concat()).is_err(),
                "{bad:?}"
            );
        }
    }

    #[test]
    fn what_stands_before_a_lease_is_a_host() {
        for (typed, expected) in [
            ("slurm/grid/4711/0", (None, "slurm/grid/4711/0")),
            ("a/slurm/grid/4711/0", (Some("a"), "slurm/grid/4711/0")),
            ("a:7/pbs/main/1[3].p/0", (Some("a:7"), "pbs/main/1[3].p/0")),
            ("r[0-8/2]/s/g/1/0", (Some("r[0-8/2]"), "s/g/1/0")),
            ("4711", (None, "4711")),
            ("", (None, "")),
            ("////", (Some(""), "///")),
        ] {
            assert_eq!(cut(typed), expected, "{typed}");
        }
    }

    #[test]
    fn an_answer_is_told_in_words() {
        let granted = |row| outcome(&LeaseAnswer::Granted(row), true).unwrap();
        let active = |victims: &[&str]| granted(with_victims(LeaseState::Active, victims));
        assert_eq!(active(&[]), "slurm/grid/4711/0 has its room");
        assert_eq!(
            active(&["a"]),
            "slurm/grid/4711/0 has its room: a has given way"
        );
        assert_eq!(
            active(&["a", "b"]),
            "slurm/grid/4711/0 has its room: a, b have given way"
        );
        let reserved = LeaseRow {
            ends_in_ms: Some(30_000),
            ..lease_in("web", LeaseState::Reserved)
        };
        assert_eq!(
            granted(reserved),
            "room is kept for slurm/grid/4711/0, for 30.0s"
        );
    }

    #[test]
    fn under_way_is_a_failure_only_for_who_waited() {
        let pending = LeaseAnswer::Pending(with_victims(LeaseState::Preparing, &["a"]));
        assert_eq!(
            outcome(&pending, false).unwrap(),
            "slurm/grid/4711/0 is under way: a gives way; the same command again tells how it stands"
        );
        let error = outcome(&pending, true).unwrap_err();
        assert_eq!((error.code, error.kind), (PENDING, Kind::Refused));
        assert!(error.advice.contains("rxm lease end slurm/grid/4711/0"));
    }

    #[test]
    fn a_refusal_says_why_and_what_then_and_is_a_failure_either_way() {
        for (then, name, advice) in [
            (Then::Later, "later", "ask again later"),
            (Then::Elsewhere, "elsewhere", "ask another host"),
            (Then::Never, "never", "do not ask again"),
        ] {
            let answer = LeaseAnswer::Refused {
                why: "4 CPUs are needed, 2 are free".to_owned(),
                then,
            };
            for waits in [false, true] {
                let error = outcome(&answer, waits).unwrap_err();
                assert_eq!(
                    error.to_string(),
                    format!("refused: 4 CPUs are needed, 2 are free; {advice}")
                );
                assert_eq!(error.kind, Kind::Refused);
            }
            let value = answer_value(&target(), &key(), &answer);
            assert_eq!(value["then"], name);
            assert_eq!(value["answer"], "refused");
            assert_eq!(value["lease"], "slurm/grid/4711/0");
            assert_eq!(value["host"], "a:7");
        }
    }

    #[test]
    fn json_has_the_key_whole_and_in_its_parts() {
        let row = with_victims(LeaseState::Active, &["a"]);
        let value = answer_value(&target(), &key(), &LeaseAnswer::Granted(row));
        assert_eq!(
            value,
            json!({
                "host": "a:7",
                "lease": "slurm/grid/4711/0",
                "system": "slurm",
                "cluster": "grid",
                "job": "4711",
                "run": 0,
                "domain": "web",
                "uuid": Uuid::from_u128(7),
                "user": "alice@R",
                "principal": "slurm/ctl@R",
                "state": "active",
                "preemptible": true,
                "victims": ["a"],
                "began_ms": 5000,
                "ends_in_ms": null,
                "answer": "granted",
            })
        );
    }

    #[test]
    fn each_row_has_a_cell_for_each_column() {
        let address = "a".parse().unwrap();
        let lease = with_victims(LeaseState::Preempted, &["a", "b"]);
        for is_wide in [false, true] {
            assert_eq!(
                row(&address, &lease, is_wide).cells.len(),
                headers(is_wide).len()
            );
        }
        let wide = row(&address, &lease, true);
        let texts: Vec<_> = wide.cells.iter().map(|cell| cell.text.as_str()).collect();
        assert_eq!(texts[3], "preempted");
        assert_eq!(texts[6..9], ["-", "yes", "a, b"]);
    }

    #[test]
    fn leases_that_have_ended_are_named_with_their_host_where_there_are_several() {
        let address = "a".parse().unwrap();
        let (said, names) = ended_lines(&address, &[key()], true);
        assert_eq!(said, ["a: slurm/grid/4711/0 has ended"]);
        assert_eq!(names, ["a/slurm/grid/4711/0"]);
        let (said, names) = ended_lines(&address, &[key()], false);
        assert_eq!(said.len(), 1);
        assert_eq!(names, ["slurm/grid/4711/0"]);
        assert_eq!(ended_lines(&address, &[], true), (vec![], vec![]));
    }
}
