//! `list`, `info` and `whoami`: every host is asked, and one that cannot be is a row of its own.

use std::{collections::HashSet, time::Duration};

use jiff::{Timestamp, tz::TimeZone};
use serde_json::{Value, json};
use xman_client::{Address, Caller, Explanation, fleet};
use xman_common::{
    name::Principal,
    protocol::{
        Code, DomainRow, DomainState, HostInfo, HypervisorTrouble, Identity, Info, JobRow,
        Metadata, Progress, Reply, Request, Standing, Whoami,
    },
};

use crate::{
    args::{Format, ListArgs, Owner},
    exit::Tally,
    output::{Complaints, Field, Row, Style, error_value},
    setting::{Setting, Stop, misfit},
    status::{seconds, standing_field},
    tags::{class_of, labels, owners, shown, warn},
    target::{self, Wanted, ailing, driver},
    units::{size, span},
};

/// The longest reason that a row gives, in characters: the other rows share its column.
const LONGEST_CLAUSE: usize = 64;

/// What one host said, or why it said nothing.
type Heard<T> = (Address, Result<T, Explanation>);

/// `rxm list`
pub(crate) async fn list(setting: &Setting, args: ListArgs) -> Result<Tally, Stop> {
    let questions = list_questions(setting, &args.patterns)?;
    setting.check_ticket().await?;
    let args = &args;
    let heard = fleet::all(questions, fleet::WIDTH, |(address, patterns)| async move {
        let mut caller = setting.caller(&address);
        let listed = target::rows(setting, &mut caller, &patterns, &args.state).await;
        let me = match (&setting.on_behalf_of, caller.met()) {
            (Some(other), _) => Some(other.clone()),
            (None, met) => met.map(|met| met.welcome.principal.clone()),
        };
        (address, listed.map(|listed| (listed, me)))
    })
    .await;
    let mut troubles = Vec::new();
    let heard: Vec<_> = heard
        .into_iter()
        .map(|(address, heard)| {
            let rows = heard.map(|(listed, me)| {
                let of_host = listed.troubles.into_iter();
                troubles.extend(of_host.map(|trouble| (address.clone(), trouble)));
                narrowed(args, listed.rows, me.as_ref())
            });
            (address, rows)
        })
        .collect();
    let is_empty = heard
        .iter()
        .all(|(_, rows)| rows.as_ref().is_ok_and(Vec::is_empty))
        && troubles.is_empty();
    match setting.output.format {
        Format::Json | Format::Yaml => setting.output.values(list_values(&heard, &troubles))?,
        Format::Name => names(setting, &heard)?,
        Format::Table | Format::Wide => {
            let is_wide = setting.output.format == Format::Wide;
            let columns = Columns::of(&heard, is_wide);
            setting
                .output
                .table(&columns.headers(), list_rows(&heard, columns))?;
            if is_empty && setting.output.is_terminal {
                setting.output.note("no domain matches");
            }
        }
    }
    let rows = heard
        .iter()
        .flat_map(|(address, rows)| rows.iter().flatten().map(move |row| (address, row)));
    warn(setting, rows);
    let mut tally = conclude(setting, &heard);
    let mut complaints = Complaints::default();
    for (address, trouble) in &troubles {
        let ailing = ailing(trouble);
        tally.failed(ailing.kind);
        complaints.add(address.to_string(), &ailing);
    }
    complaints.say(&setting.output);
    Ok(tally)
}

/// Keeps the domains that are wanted; `me` is whom the host takes the caller for.
fn narrowed(args: &ListArgs, rows: Vec<DomainRow>, me: Option<&Principal>) -> Vec<DomainRow> {
    let owner = match &args.owner {
        None => None,
        Some(Owner::Me) => Some(me),
        Some(Owner::One(owner)) => Some(Some(owner)),
    };
    let is_wanted = |row: &DomainRow| {
        let Metadata {
            owners,
            class,
            labels,
        } = &row.metadata;
        owner.is_none_or(|owner| owner.is_some_and(|owner| owners.contains(owner)))
            && (args.class.is_none() || args.class == *class)
            && args.label.iter().all(|(key, value)| {
                labels
                    .get(key)
                    .is_some_and(|known| value.as_ref().is_none_or(|value| value == known.as_str()))
            })
    };
    rows.into_iter().filter(is_wanted).collect()
}

/// Which host is asked for which patterns, in the order in which the hosts were named.
pub(crate) fn list_questions(
    setting: &Setting,
    patterns: &[String],
) -> Result<Vec<(Address, Vec<String>)>, Stop> {
    if patterns.is_empty() {
        return Ok(setting
            .hosts()?
            .into_iter()
            .map(|host| (host, Vec::new()))
            .collect());
    }
    let mut questions: Vec<(Address, Vec<String>)> = Vec::new();
    for wanted in Wanted::parse_all(patterns, setting)? {
        let (_, pattern) = target::split(&wanted.typed);
        for host in wanted.places(setting)? {
            match questions.iter_mut().find(|(known, _)| *known == host) {
                Some((_, patterns)) => patterns.push(pattern.to_owned()),
                None => questions.push((host, vec![pattern.to_owned()])),
            }
        }
    }
    Ok(questions)
}

fn list_values(
    heard: &[Heard<Vec<DomainRow>>],
    troubles: &[(Address, HypervisorTrouble)],
) -> Vec<Value> {
    let values = |(address, rows): &Heard<Vec<DomainRow>>| {
        let mut values: Vec<Value> = match rows {
            Ok(rows) => rows.iter().map(|row| domain_value(address, row)).collect(),
            Err(error) => vec![error_value(address, error)],
        };
        let of_host = troubles.iter().filter(|(host, _)| host == address);
        values.extend(of_host.map(|(_, trouble)| trouble_value(address, trouble)));
        values
    };
    heard.iter().flat_map(values).collect()
}

/// A hypervisor that is not well, as JSON has it.
fn trouble_value(address: &Address, trouble: &HypervisorTrouble) -> Value {
    let ailing = ailing(trouble);
    json!({
        "host": address,
        "hypervisor": trouble.hypervisor,
        "error": { "code": ailing.code, "message": format!("{}; {}", trouble.why, ailing.advice).trim_end_matches("; ") },
    })
}

/// A domain as JSON has it.
pub(crate) fn domain_value(address: &Address, row: &DomainRow) -> Value {
    json!({
        "host": address,
        "name": row.name,
        "uuid": row.uuid,
        "hypervisor": row.hypervisor,
        "id": row.id,
        "state": row.state.name(),
        "reason": row.reason,
        "memory_kib": row.memory_kib,
        "max_memory_kib": row.max_memory_kib,
        "vcpus": row.vcpus,
        "max_vcpus": row.max_vcpus,
        "cpu_time_ns": row.cpu_time_ns,
        "autostart": row.autostart,
        "persistent": row.persistent,
        "saved": row.saved,
        "since_ms": row.since_ms,
        "standing": row.standing.map(Standing::name),
        "preempted_ms": row.preempted_ms,
        "owners": row.metadata.owners,
        "class": row.metadata.class,
        "labels": row.metadata.labels,
        "metadata_trouble": row.metadata_trouble,
        "age_ms": row.age_ms,
        "stale": row.stale,
    })
}

fn names(setting: &Setting, heard: &[Heard<Vec<DomainRow>>]) -> Result<(), Stop> {
    let mut lines = String::new();
    for (address, rows) in heard {
        for row in rows.iter().flatten() {
            if heard.len() > 1 {
                lines.push_str(&format!("{address}/{}\n", row.name));
            } else {
                lines.push_str(&format!("{}\n", row.name));
            }
        }
    }
    Ok(setting.output.raw(&lines)?)
}

/// Which columns a list has.
#[derive(Clone, Copy)]
struct Columns {
    with_host: bool,
    /// The drivers, where there are several; wide has the URIs in any case.
    with_driver: bool,
    is_wide: bool,
    with_labels: bool,
}

impl Columns {
    fn of(heard: &[Heard<Vec<DomainRow>>], is_wide: bool) -> Self {
        let mut rows = heard.iter().flat_map(|(_, rows)| rows.iter().flatten());
        let uris = |rows: &[DomainRow]| -> HashSet<String> {
            rows.iter().map(|row| row.hypervisor.clone()).collect()
        };
        let of_hosts: Vec<_> = heard
            .iter()
            .filter_map(|(_, rows)| rows.as_ref().ok())
            .map(|rows| uris(rows))
            .collect();
        let drivers: HashSet<_> = of_hosts.iter().flatten().map(|uri| driver(uri)).collect();
        Self {
            with_driver: !is_wide
                && (drivers.len() > 1 || of_hosts.iter().any(|uris| uris.len() > 1)),
            with_host: heard.len() > 1 || heard.iter().any(|(_, rows)| rows.is_err()),
            is_wide,
            with_labels: rows.any(|row| !row.metadata.labels.is_empty()),
        }
    }

    fn headers(self) -> Vec<&'static str> {
        let mut headers = Vec::new();
        headers.extend(self.with_host.then_some("HOST"));
        headers.extend(["NAME", "ID", "STATE", "VCPUS", "MEMORY", "CPU TIME"]);
        headers.extend(self.with_driver.then_some("HYPERVISOR"));
        if self.is_wide {
            headers.extend([
                "UUID",
                "AUTOSTART",
                "PERSISTENT",
                "SAVED",
                "SINCE",
                "STANDING",
                "PREEMPTED",
                "MAX VCPUS",
                "MAX MEMORY",
                "REASON",
                "AGE",
                "HYPERVISOR",
                "OWNERS",
                "CLASS",
            ]);
            headers.extend(self.with_labels.then_some("LABELS"));
        }
        headers
    }
}

/// A host on which the caller may not list has no row: whoever owns a domain on one of a hundred hosts wants to see that one.
fn list_rows(heard: &[Heard<Vec<DomainRow>>], columns: Columns) -> Vec<Row> {
    let width = columns.headers().len();
    let mut rows = Vec::new();
    for (address, domains) in heard {
        let host = columns.with_host.then(|| Field::from(address.to_string()));
        match domains {
            Ok(domains) => rows.extend(domains.iter().map(|domain| {
                let mut cells: Vec<Field> = host.clone().into_iter().collect();
                cells.extend(domain_cells(domain, columns));
                Row {
                    cells,
                    style: if domain.stale {
                        Style::Dim
                    } else {
                        Style::Plain
                    },
                }
            })),
            Err(error) if error.code == Code::Denied.name() => {}
            Err(error) => rows.push(error_row(address, error, width, 2)),
        }
    }
    rows
}

fn domain_cells(row: &DomainRow, columns: Columns) -> Vec<Field> {
    let age = Duration::from_millis(row.age_ms);
    let mut state = row.state.to_string();
    if row.stale {
        state.push_str(&format!(" (stale {})", age_in_words(age)));
    }
    if !row.metadata_trouble.is_empty() {
        state.push_str(" (owners unreadable)");
    }
    let id = row.id.map_or_else(|| "-".to_owned(), |id| id.to_string());
    let cpu_time = if row.state.is_active() {
        span(Duration::from_nanos(row.cpu_time_ns))
    } else {
        "-".to_owned()
    };
    let mut cells: Vec<Field> = vec![
        row.name.to_string().into(),
        id.into(),
        Field {
            text: state,
            style: if row.metadata_trouble.is_empty() {
                state_style(row.state)
            } else {
                Style::Bad
            },
        },
        row.vcpus.to_string().into(),
        size(row.memory_kib).into(),
        cpu_time.into(),
    ];
    if columns.with_driver {
        cells.push(driver(&row.hypervisor).into());
    }
    if columns.is_wide {
        let yes_no = |yes: bool| if yes { "yes" } else { "no" };
        cells.extend([
            row.uuid.to_string().into(),
            yes_no(row.autostart).into(),
            yes_no(row.persistent).into(),
            yes_no(row.saved).into(),
            since_in_words(row.since_ms).into(),
            row.standing
                .map_or_else(|| Field::from("-"), standing_field),
            match row.standing {
                None => "-".into(),
                Some(_) => seconds(row.preempted_ms).into(),
            },
            row.max_vcpus.to_string().into(),
            size(row.max_memory_kib).into(),
            row.reason.clone().into(),
            age_in_words(age).into(),
            row.hypervisor.clone().into(),
            shown(row, owners(row)),
            shown(row, class_of(row)),
        ]);
        cells.extend(columns.with_labels.then(|| shown(row, labels(row))));
    }
    cells
}

/// How long a domain has been in its state; `-` where it was so before its xmand came to look.
pub(crate) fn since_in_words(since_ms: Option<u64>) -> String {
    let now = u64::try_from(Timestamp::now().as_millisecond()).unwrap_or_default();
    since_ms.map_or_else(
        || "-".to_owned(),
        |since| age_in_words(Duration::from_millis(now.saturating_sub(since))),
    )
}

/// Nobody needs an age to the tenth of a second.
fn age_in_words(age: Duration) -> String {
    if age.as_secs() < 60 {
        format!("{}s", age.as_secs())
    } else {
        span(age)
    }
}

fn state_style(state: DomainState) -> Style {
    match state {
        DomainState::Running | DomainState::Blocked => Style::Good,
        DomainState::Paused | DomainState::ShuttingDown | DomainState::Sleeping => Style::Waiting,
        DomainState::Crashed => Style::Bad,
        DomainState::Off => Style::Dim,
        DomainState::Unknown => Style::Plain,
    }
}

/// The row of a host that could not be asked: host, dashes, and in the column `says_at` (counted after the host's) why.
pub(crate) fn error_row(
    address: &Address,
    error: &Explanation,
    width: usize,
    says_at: usize,
) -> Row {
    // The row keeps the name of what is said once for all hosts, and the first clause of what stderr tells whole.
    let clause = error.what.split(';').next().unwrap_or_default();
    let text = match clause.char_indices().nth(LONGEST_CLAUSE) {
        _ if error.is_common => error.code.to_owned(),
        Some((end, _)) => format!("{}...", clause.get(..end).unwrap_or_default()),
        None => clause.to_owned(),
    };
    let mut cells: Vec<Field> = vec![address.to_string().into()];
    cells.extend((0..says_at).map(|_| Field::from("-")));
    cells.push(Field {
        text,
        style: Style::Bad,
    });
    cells.resize_with(width.max(says_at + 2), || Field::from(""));
    cells.truncate(width.max(1));
    Row {
        cells,
        style: Style::Plain,
    }
}

/// `rxm info`
pub(crate) async fn info(setting: &Setting) -> Result<Tally, Stop> {
    let heard = ask_all(setting, Request::Info(Info::default()), |reply| {
        if let Reply::Info(info) = reply {
            Some(info)
        } else {
            None
        }
    })
    .await?;
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let value = |(address, info): &Heard<HostInfo>| match info {
                Ok(info) => info_value(address, info),
                Err(error) => error_value(address, error),
            };
            setting.output.values(heard.iter().map(value).collect())?;
        }
        Format::Name => hosts_that_answered(setting, &heard)?,
        Format::Table | Format::Wide => match heard.as_slice() {
            [(_, Ok(info))] => setting.output.table_without_headers(info_lines(info))?,
            [(_, Err(_))] => {}
            _ => {
                let row = |(address, info): &Heard<HostInfo>| match info {
                    Ok(info) => info_row(address, info),
                    Err(error) => error_row(address, error, INFO_HEADERS.len(), 0),
                };
                setting
                    .output
                    .table(&INFO_HEADERS, heard.iter().map(row).collect())?;
            }
        },
    }
    Ok(conclude(setting, &heard))
}

const INFO_HEADERS: [&str; 9] = [
    "HOST",
    "HYPERVISOR",
    "CPUS",
    "LOAD",
    "VCPUS USED",
    "MEMORY",
    "FREE",
    "MEMORY USED",
    "DOMAINS",
];

fn info_row(address: &Address, info: &HostInfo) -> Row {
    let drivers: Vec<_> = info
        .hypervisors
        .iter()
        .map(|h| format!("{} {}", h.driver, h.version))
        .collect();
    let is_well = info.stuck_lanes == 0 && info.hypervisors.iter().all(|h| h.trouble.is_empty());
    let [load, _, _] = info.load;
    Row {
        cells: vec![
            address.to_string().into(),
            Field {
                text: if is_well {
                    drivers.join(", ")
                } else {
                    format!("{} (trouble)", drivers.join(", "))
                },
                style: if is_well { Style::Plain } else { Style::Bad },
            },
            info.cpus.to_string().into(),
            format!("{load:.2}").into(),
            info.used_vcpus.to_string().into(),
            size(info.memory_kib).into(),
            size(info.free_memory_kib).into(),
            size(info.used_memory_kib).into(),
            format!("{}/{}", info.active, info.domains).into(),
        ],
        style: Style::Plain,
    }
}

fn info_lines(info: &HostInfo) -> Vec<Row> {
    let mhz = if info.mhz == 0 {
        String::new()
    } else {
        format!(", {} MHz", info.mhz)
    };
    let [one, five, fifteen] = info.load;
    let mut lines = vec![
        key_value("Host:", info.hostname.clone()),
        key_value("xmand:", info.xmand.clone()),
        key_value(
            "Processors:",
            format!("{} ({}{mhz})", info.cpus, info.cpu_model),
        ),
        key_value("Load:", format!("{one:.2} {five:.2} {fifteen:.2}")),
        key_value(
            "Memory:",
            format!(
                "{}, {} free",
                size(info.memory_kib),
                size(info.free_memory_kib)
            ),
        ),
        key_value(
            "Domains:",
            format!("{}, {} active", info.domains, info.active),
        ),
        key_value(
            "In use:",
            format!(
                "{} vcpus, {} of memory",
                info.used_vcpus,
                size(info.used_memory_kib)
            ),
        ),
    ];
    for hypervisor in &info.hypervisors {
        let age = span(Duration::from_millis(hypervisor.age_ms));
        let text = format!(
            "{} {}, libvirt {} ({}), read {age} ago",
            hypervisor.driver, hypervisor.version, hypervisor.libvirt, hypervisor.uri
        );
        lines.push(key_value("Hypervisor:", text));
        if !hypervisor.trouble.is_empty() {
            lines.push(bad_key_value("  Trouble:", hypervisor.trouble.clone()));
        }
    }
    if info.stuck_lanes > 0 {
        let text = format!(
            "libvirt has not come back from work on {} domains",
            info.stuck_lanes
        );
        lines.push(bad_key_value("Stuck:", text));
    }
    lines
}

pub(crate) fn key_value(key: &str, value: String) -> Row {
    Row::plain(vec![key.into(), value.into()])
}

fn bad_key_value(key: &str, value: String) -> Row {
    Row {
        style: Style::Bad,
        ..key_value(key, value)
    }
}

fn info_value(address: &Address, info: &HostInfo) -> Value {
    let hypervisors: Vec<_> = info
        .hypervisors
        .iter()
        .map(|h| {
            json!({
                "uri": h.uri,
                "driver": h.driver,
                "version": h.version,
                "libvirt": h.libvirt,
                "trouble": h.trouble,
                "age_ms": h.age_ms,
            })
        })
        .collect();
    json!({
        "host": address,
        "hostname": info.hostname,
        "xmand": info.xmand,
        "hypervisors": hypervisors,
        "cpu_model": info.cpu_model,
        "cpus": info.cpus,
        "mhz": info.mhz,
        "memory_kib": info.memory_kib,
        "free_memory_kib": info.free_memory_kib,
        "load": info.load,
        "active": info.active,
        "domains": info.domains,
        "used_vcpus": info.used_vcpus,
        "used_memory_kib": info.used_memory_kib,
        "stuck_lanes": info.stuck_lanes,
    })
}

/// What a host says of the caller, and who it proved to be itself.
struct Known {
    identity: Identity,
    service: String,
    software: String,
}

/// `rxm whoami`
pub(crate) async fn whoami(setting: &Setting) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let known = identify(setting, &mut caller).await;
        (address, known)
    })
    .await;
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let value = |(address, known): &Heard<Known>| match known {
                Ok(known) => whoami_value(address, known),
                Err(error) => error_value(address, error),
            };
            setting.output.values(heard.iter().map(value).collect())?;
        }
        Format::Name => hosts_that_answered(setting, &heard)?,
        Format::Table | Format::Wide => match heard.as_slice() {
            [(_, Ok(known))] => setting.output.table_without_headers(whoami_lines(known))?,
            [(_, Err(_))] => {}
            _ => {
                let row = |(address, known): &Heard<Known>| match known {
                    Ok(known) => whoami_row(address, known),
                    Err(error) => error_row(address, error, WHOAMI_HEADERS.len(), 0),
                };
                setting
                    .output
                    .table(&WHOAMI_HEADERS, heard.iter().map(row).collect())?;
            }
        },
    }
    Ok(conclude(setting, &heard))
}

/// Whom a host takes the caller for; a host that lets the caller do nothing, not even ask that, has told it in its welcome.
async fn identify(setting: &Setting, caller: &mut Caller) -> Result<Known, Explanation> {
    let reply = setting
        .ask(caller, &Request::Whoami(Whoami::default()))
        .await;
    let service = caller
        .met()
        .map(|met| met.service.to_string())
        .unwrap_or_default();
    match (reply, caller.met()) {
        (Ok((Reply::Whoami(identity), _)), met) => {
            let software = met
                .map(|met| met.welcome.software.clone())
                .unwrap_or_default();
            Ok(Known {
                identity,
                service,
                software,
            })
        }
        (Ok(_), _) => Err(misfit()),
        (Err(error), Some(met))
            if error.code == Code::Denied.name() && setting.on_behalf_of.is_none() =>
        {
            Err(Explanation {
                what: format!(
                    "the host ({service}) knows you as {}, and you may do nothing here",
                    met.welcome.principal
                ),
                advice: "its administrators can give you a right".to_owned(),
                ..error
            })
        }
        (Err(error), _) => Err(error),
    }
}

const WHOAMI_HEADERS: [&str; 5] = ["HOST", "PRINCIPAL", "UNTIL", "RULE", "MAY"];

fn whoami_row(address: &Address, known: &Known) -> Row {
    let identity = &known.identity;
    Row::plain(vec![
        address.to_string().into(),
        person(identity).into(),
        moment(identity.until).into(),
        rule(identity).into(),
        may(identity).into(),
    ])
}

fn whoami_lines(known: &Known) -> Vec<Row> {
    let identity = &known.identity;
    let mut lines = vec![key_value("Principal:", identity.principal.to_string())];
    if let Some(acting) = &identity.acting {
        lines.push(key_value(
            "Acting:",
            format!("{acting}, for {}", identity.principal),
        ));
    }
    if !identity.groups.is_empty() {
        lines.push(key_value("Groups:", identity.groups.join(" ")));
    }
    lines.extend([
        key_value("Until:", moment(identity.until)),
        key_value("Host proved:", known.service.clone()),
        key_value("Let in by:", rule(identity)),
        key_value("May:", may(identity)),
        key_value("Session:", identity.session.clone()),
    ]);
    lines
}

fn person(identity: &Identity) -> String {
    match &identity.acting {
        None => identity.principal.to_string(),
        Some(acting) => format!("{} (for whom {acting} acts)", identity.principal),
    }
}

fn rule(identity: &Identity) -> String {
    if identity.rule.is_empty() {
        "no rule".to_owned()
    } else {
        identity.rule.clone()
    }
}

fn may(identity: &Identity) -> String {
    if identity.verbs.is_empty() {
        "nothing here".to_owned()
    } else {
        identity.verbs.join(" ")
    }
}

fn whoami_value(address: &Address, known: &Known) -> Value {
    let identity = &known.identity;
    json!({
        "host": address,
        "principal": identity.principal,
        "service": known.service,
        "until_s": identity.until,
        "rule": identity.rule,
        "verbs": identity.verbs,
        "groups": identity.groups,
        "acting": identity.acting,
        "session": identity.session,
        "xmand": known.software,
    })
}

/// Writes a time in seconds since 1970 in the person's own time zone.
pub(crate) fn moment(seconds: u64) -> String {
    let written = i64::try_from(seconds)
        .ok()
        .and_then(|seconds| Timestamp::from_second(seconds).ok());
    match written {
        Some(time) => time
            .to_zoned(TimeZone::system())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        None => "-".to_owned(),
    }
}

/// A job as JSON has it.
pub(crate) fn job_value(address: &Address, job: &JobRow) -> Value {
    json!({
        "host": address,
        "id": job.id,
        "principal": job.principal,
        "verb": job.verb,
        "domain": job.domain,
        "uuid": job.uuid,
        "detail": job.detail,
        "state": job.state.to_string(),
        "result": job.result,
        "began_ms": job.began_ms,
        "ended_ms": job.ended_ms,
        "progress": job.progress.as_ref().map(progress_value),
    })
}

fn progress_value(progress: &Progress) -> Value {
    json!({
        "phase": progress.phase,
        "percent": progress.percent.min(100),
        "done_bytes": progress.done_bytes,
        "remaining_bytes": progress.remaining_bytes,
        "total_bytes": progress.total_bytes,
        "rate_bytes_per_s": progress.rate,
        "elapsed_ms": progress.elapsed_ms,
        "eta_ms": progress.eta_ms,
    })
}

/// Asks every host the same.
async fn ask_all<T>(
    setting: &Setting,
    request: Request,
    read: impl Fn(Reply) -> Option<T>,
) -> Result<Vec<Heard<T>>, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let (request, read) = (&request, &read);
    Ok(fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let heard = match setting.ask(&mut caller, request).await {
            Ok((reply, _)) => read(reply).ok_or_else(misfit),
            Err(error) => Err(error),
        };
        (address, heard)
    })
    .await)
}

fn hosts_that_answered<T>(setting: &Setting, heard: &[Heard<T>]) -> Result<(), Stop> {
    for (address, _) in heard.iter().filter(|(_, heard)| heard.is_ok()) {
        setting.output.line(&address.to_string())?;
    }
    Ok(())
}

/// Says what went wrong where, and counts.
pub(crate) fn conclude<T>(setting: &Setting, heard: &[Heard<T>]) -> Tally {
    let mut tally = Tally::default();
    let mut complaints = Complaints::default();
    for (address, heard) in heard {
        match heard {
            Ok(_) => tally.done(),
            Err(error) => {
                tally.failed(error.kind);
                complaints.add(address.to_string(), error);
            }
        }
    }
    complaints.say(&setting.output);
    tally
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use xman_client::Kind;

    use super::*;

    fn row() -> DomainRow {
        DomainRow {
            name: "web".parse().unwrap(),
            uuid: Uuid::from_u128(7),
            hypervisor: "qemu:///system".to_owned(),
            id: Some(3),
            state: DomainState::Running,
            reason: "booted".to_owned(),
            memory_kib: 2 << 20,
            max_memory_kib: 4 << 20,
            vcpus: 2,
            max_vcpus: 4,
            cpu_time_ns: 12_345_000_000,
            autostart: true,
            persistent: true,
            saved: false,
            since_ms: None,
            standing: None,
            preempted_ms: 0,
            metadata: xman_common::protocol::Metadata::default(),
            metadata_trouble: String::new(),
            age_ms: 42_900,
            stale: false,
        }
    }

    fn owned() -> DomainRow {
        DomainRow {
            metadata: Metadata {
                owners: ["bob@R", "alice@R"]
                    .map(|name| name.parse().unwrap())
                    .into(),
                class: "grid".parse().ok(),
                labels: [("tier".parse().unwrap(), "front".parse().unwrap())].into(),
            },
            ..row()
        }
    }

    fn silent() -> Explanation {
        Explanation {
            kind: Kind::Unreachable,
            code: "unreachable",
            what: "unreachable: connection refused".to_owned(),
            advice: "is xmand running there?".to_owned(),
            is_common: false,
        }
    }

    fn heard(rows: Vec<DomainRow>) -> Vec<Heard<Vec<DomainRow>>> {
        vec![
            ("skirit80".parse().unwrap(), Ok(rows)),
            ("skurut68".parse().unwrap(), Err(silent())),
        ]
    }

    fn texts(row: &Row) -> Vec<&str> {
        row.cells.iter().map(|field| field.text.as_str()).collect()
    }

    #[test]
    fn a_list_has_a_row_for_every_domain_and_one_for_a_host_that_is_silent() {
        let all = heard(vec![row()]);
        let rows = list_rows(&all, Columns::of(&all, false));
        assert_eq!(
            texts(&rows[0]),
            ["skirit80", "web", "3", "running", "2", "2 GiB", "12.3s"]
        );
        assert_eq!(
            texts(&rows[1]),
            [
                "skurut68",
                "-",
                "-",
                "unreachable: connection refused",
                "",
                "",
                ""
            ]
        );
        for (is_wide, one) in [(false, false), (false, true), (true, false), (true, true)] {
            for row in [row(), owned()] {
                let all = &heard(vec![row])[..if one { 1 } else { 2 }];
                let columns = Columns::of(all, is_wide);
                let rows = list_rows(all, columns);
                assert_eq!(rows[0].cells.len(), columns.headers().len());
            }
        }
    }

    #[test]
    fn a_column_names_drivers_where_there_are_several_and_trouble_is_an_object() {
        let cell = DomainRow {
            name: "cell".parse().unwrap(),
            hypervisor: "lxc:///system".to_owned(),
            ..row()
        };
        let all = &heard(vec![row(), cell])[..1];
        let columns = Columns::of(all, false);
        assert_eq!(columns.headers().last(), Some(&"HYPERVISOR"));
        let rows = list_rows(all, columns);
        let drivers: Vec<_> = rows.iter().map(|row| *texts(row).last().unwrap()).collect();
        assert_eq!(drivers, ["qemu", "lxc"]);
        let wide = Columns::of(all, true).headers();
        assert_eq!(wide.iter().filter(|h| **h == "HYPERVISOR").count(), 1);
        let host: Address = "skirit80".parse().unwrap();
        let trouble = |why: &str| HypervisorTrouble {
            hypervisor: "lxc:///system".to_owned(),
            why: why.to_owned(),
        };
        let troubles = [(host, trouble("gone; start it"))];
        let values = list_values(&heard(vec![row()]), &troubles);
        assert_eq!(values.len(), 3);
        assert_eq!(
            values[1],
            json!({
                "host": "skirit80", "hypervisor": "lxc:///system",
                "error": { "code": "unavailable", "message": "gone; start it" }
            })
        );
        assert!(ailing(&trouble("it is silent")).to_string().contains("; "));
    }

    #[test]
    fn what_is_stale_is_marked_without_colour_too() {
        let stale = DomainRow {
            stale: true,
            ..row()
        };
        let all = &heard(vec![stale])[..1];
        let rows = list_rows(all, Columns::of(all, false));
        assert_eq!(rows[0].cells[2].text, "running (stale 42s)");
        assert_eq!(rows[0].style, Style::Dim);
    }

    #[test]
    fn a_host_on_which_one_may_not_list_has_no_row_and_stays_an_object() {
        let mut all = heard(vec![row()]);
        all[1].1 = Err(Explanation {
            code: Code::Denied.name(),
            ..silent()
        });
        assert_eq!(list_rows(&all, Columns::of(&all, false)).len(), 1);
        assert_eq!(list_values(&all, &[])[1]["error"]["code"], "denied");
    }

    #[test]
    fn wide_shows_how_domains_stand_towards_jobs_and_for_how_many_seconds_they_were_preempted() {
        let grid = DomainRow {
            standing: Some(Standing::OccupiedWouldPreempt),
            preempted_ms: 61_999,
            ..row()
        };
        let all = &heard(vec![grid.clone(), row()])[..1];
        let columns = Columns::of(all, true);
        let headers = columns.headers();
        let at = headers.iter().position(|h| *h == "STANDING").unwrap();
        assert_eq!(headers[at + 1], "PREEMPTED");
        let rows = list_rows(all, columns);
        assert_eq!(
            texts(&rows[0])[at..at + 2],
            ["occupied-would-preempt", "61s"]
        );
        assert_eq!(texts(&rows[1])[at..at + 2], ["-", "-"]);
        let value = domain_value(&"a".parse().unwrap(), &grid);
        assert_eq!(value["standing"], "occupied-would-preempt");
        assert_eq!(value["preempted_ms"], 61_999);
    }

    #[test]
    fn wide_shows_owners_class_and_labels_where_there_are_any() {
        let all = &heard(vec![owned(), row()])[..1];
        let columns = Columns::of(all, true);
        assert!(columns.headers().ends_with(&["OWNERS", "CLASS", "LABELS"]));
        let rows = list_rows(all, columns);
        assert!(texts(&rows[0]).ends_with(&["alice@R, bob@R", "grid", "tier=front"]));
        assert!(texts(&rows[1]).ends_with(&["-", "-", "-"]));
        let value = domain_value(&"a".parse().unwrap(), &owned());
        assert_eq!(value["owners"], json!(["alice@R", "bob@R"]));
        assert_eq!(value["class"], "grid");
        assert_eq!(value["labels"], json!({ "tier": "front" }));
    }

    #[test]
    fn a_domain_whose_owners_cannot_be_read_is_marked() {
        let broken = DomainRow {
            metadata_trouble: "no XML".to_owned(),
            ..row()
        };
        let all = &heard(vec![broken])[..1];
        let rows = list_rows(all, Columns::of(all, true));
        assert_eq!(rows[0].cells[2].text, "running (owners unreadable)");
        assert_eq!(rows[0].cells[2].style, Style::Bad);
        assert!(texts(&rows[0]).ends_with(&["unreadable", "unreadable"]));
    }

    #[test]
    fn a_list_is_narrowed_to_what_belongs_to_somebody() {
        let (me, other) = ("bob@R".parse().unwrap(), "carol@R".parse().unwrap());
        let check = |change: &dyn Fn(&mut ListArgs), me: Option<&Principal>, found: usize| {
            let mut args = ListArgs {
                patterns: Vec::new(),
                state: Vec::new(),
                owner: None,
                class: None,
                label: Vec::new(),
            };
            change(&mut args);
            let rows = narrowed(&args, vec![owned(), row()], me);
            assert_eq!(rows.len(), found, "{args:?}");
        };
        check(&|_| {}, None, 2);
        check(&|args| args.owner = Some(Owner::Me), Some(&me), 1);
        check(&|args| args.owner = Some(Owner::Me), Some(&other), 0);
        check(&|args| args.owner = Some(Owner::Me), None, 0);
        let alice: Principal = "alice@R".parse().unwrap();
        check(
            &|args| args.owner = Some(Owner::One(alice.clone())),
            None,
            1,
        );
        check(&|args| args.class = "grid".parse().ok(), None, 1);
        check(&|args| args.class = "web".parse().ok(), None, 0);
        let label =
            |key: &str, value: Option<&str>| (key.parse().unwrap(), value.map(str::to_owned));
        check(&|args| args.label = vec![label("tier", None)], None, 1);
        check(
            &|args| args.label = vec![label("tier", Some("front"))],
            None,
            1,
        );
        check(
            &|args| args.label = vec![label("tier", Some("back"))],
            None,
            0,
        );
        check(
            &|args| args.label = vec![label("tier", None), label("x", None)],
            None,
            0,
        );
    }

    #[test]
    fn the_fields_of_a_domain_in_json_are_stable() {
        let text = serde_json::to_string(&list_values(&heard(vec![row()]), &[])).unwrap();
        assert_eq!(
            text,
            concat!(
                r#"[{"host":"skirit80","name":"web","uuid":"00000000-0000-0000-0000-000000000007","hypervisor":"qemu:///system","id":3,"#,
                r#""state":"running","reason":"booted","memory_kib":2097152,"max_memory_kib":4194304,"vcpus":2,"max_vcpus":4,"#,
                r#""cpu_time_ns":12345000000,"autostart":true,"persistent":true,"saved":false,"since_ms":null,"standing":null,"preempted_ms":0,"owners":[],"class":null,"labels":{},"#,
                r#""metadata_trouble":"","age_ms":42900,"stale":false},"#,
                r#"{"host":"skurut68","error":{"code":"unreachable","message":"unreachable: connection refused; is xmand running there?"}}]"#,
            )
        );
    }

    #[test]
    fn yaml_says_the_same_as_json() {
        let text = serde_saphyr::to_string(&list_values(&heard(vec![row()]), &[])).unwrap();
        assert!(
            text.starts_with("- host: skirit80\n  name: web\n"),
            "{text}"
        );
        assert!(text.contains("\n  memory_kib: 2097152\n"), "{text}");
        assert!(
            text.contains("\n- host: skurut68\n  error:\n    code: unreachable\n"),
            "{text}"
        );
    }

    #[test]
    fn moments_out_of_reach_are_no_panic() {
        assert_eq!(moment(u64::MAX), "-");
        assert!(moment(0).contains("19"));
    }
}
