//! `status`: how domains stand towards jobs, for people, for programs, and in Magrathea's one line for schedulers.

use std::collections::HashSet;

use clap::Args;
use serde_json::{Value, json};
use uuid::Uuid;
use xman_client::{Address, Caller, Explanation, fleet};
use xman_common::protocol::{
    Depth, HoldRow, Holder, Item, LeaseKey, MAX_PATTERNS, Reply, Request, Room, Standing, Status,
    StatusRow, Verb,
};

use crate::{
    exit::Tally,
    heard::{conclude, error_row},
    options::Format,
    output::{Field, Row, Style, error_value, named},
    setting::{Setting, Stop, misfit},
    target::list_questions,
    units::{moment, since_in_words, size},
};

/// What `rxm help status` says after the options.
pub(crate) const HELP: &str = "\
How a domain stands:
  free                    could take a job
  occupied-would-preempt  could take a job, and another's job would be preempted by that
  occupied                its room is with another
  running-preemptible     has a job, which gives way to a better one
  running                 has a job, which does not give way
  preempted               its room was taken away; it may have a job
  frozen                  its memory is on the disk
  down, booting           off, or started a short while ago

Without a pattern all domains of classes that take part are shown. -o wide says who holds a domain back and why, and below that the room of each \
    host. A host in maintenance is told of on stderr.

--line prints NAME STANDING[:USED:AVAILABLE];PREEMPTED-SECONDS;changed=SECONDS-SINCE-1970, as Magrathea has it: HOST/NAME where several hosts are asked.

Examples:
  rxm -H skirit80 status
  rxm -H @grid status 'grid-*' -o wide
  rxm -H @grid status --line
  rxm -H @grid -o json status | jq '.[] | select(.standing == \"free\")'

JSON: host, name, uuid, hypervisor, standing, since_ms (or null), class (or null), used_cpus, available_cpus, preempted_ms, depth (starve, shrink, \
    pause, freeze or null), doing (what is being done to it, or what keeps that from being done; empty where it is as it should be), holds (holder: room, job \
    or person; lease or principal, or neither where there is no room for it; depth, reason, since_ms), leases (a list of SYSTEM/CLUSTER/JOB/RUN), line. \
    Each host has one object more, of host and room: cpus, used_cpus, memory_kib, used_memory_kib, maintenance (reason, principal, since_ms; or null).";

/// Arguments of `status`.
#[derive(Debug, Args)]
pub(crate) struct StatusArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains of classes without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// One line for each domain, as Magrathea writes it, for schedulers
    #[arg(long)]
    pub(crate) line: bool,
}

/// What a host said of its domains and its room.
pub(crate) struct Stand {
    pub(crate) rows: Vec<StatusRow>,
    pub(crate) room: Room,
}

/// What one host said, or why it said nothing.
type Heard = (Address, Result<Stand, Explanation>);

/// `rxm status`
pub(crate) async fn status(setting: &Setting, args: StatusArgs) -> Result<Tally, Stop> {
    let StatusArgs { patterns, line } = args;
    if line && setting.output.format != Format::Table {
        return Err(Stop::Usage(
            "--line is a form of its own; leave -o away".to_owned(),
        ));
    }
    let questions = list_questions(setting, &patterns)?;
    setting.check_ticket().await?;
    let heard = fleet::all(questions, fleet::WIDTH, |(address, patterns)| async move {
        let mut caller = setting.caller(&address);
        let stand = stand(setting, &mut caller, &patterns).await;
        (address, stand)
    })
    .await;
    match setting.output.format {
        Format::Json | Format::Yaml => setting
            .output
            .values(heard.iter().flat_map(values).collect())?,
        Format::Name => setting.output.text(&lines(&heard, |_| String::new()))?,
        Format::Table if line => setting
            .output
            .text(&lines(&heard, |row| format!(" {row}")))?,
        Format::Table | Format::Wide => print(setting, &heard)?,
    }
    for (address, stand) in &heard {
        let closed = stand
            .as_ref()
            .ok()
            .and_then(|s| s.room.maintenance.as_ref());
        if let Some(closed) = closed {
            setting
                .output
                .note(&format!("{address}: in maintenance: {}", closed.reason));
        }
    }
    Ok(conclude(setting, &heard))
}

/// Asks one host how its domains stand that match any of the patterns.
pub(crate) async fn stand(
    setting: &Setting,
    caller: &mut Caller,
    patterns: &[String],
) -> Result<Stand, Explanation> {
    let mut rows = Vec::new();
    let mut known = HashSet::new();
    let mut pieces = patterns.chunks(MAX_PATTERNS);
    let mut piece = pieces.next().unwrap_or_default();
    loop {
        let request = Request::Status(Status {
            patterns: piece.to_vec(),
        });
        let (reply, items) = setting.ask(caller, &request).await?;
        let Reply::Room(room) = reply else {
            return Err(misfit());
        };
        for item in items {
            let Item::Status(row) = item else {
                return Err(misfit());
            };
            if known.insert((row.uuid, row.hypervisor.clone())) {
                rows.push(row);
            }
        }
        piece = match pieces.next() {
            Some(next) => next,
            None => return Ok(Stand { rows, room }),
        };
    }
}

/// Asks one host for its room alone: no domain has the UUID of zeros.
pub(crate) async fn room(setting: &Setting, caller: &mut Caller) -> Result<Room, Explanation> {
    let stand = stand(setting, caller, &[Uuid::nil().to_string()]).await?;
    Ok(stand.room)
}

fn values((address, stand): &Heard) -> Vec<Value> {
    match stand {
        Ok(Stand { rows, room }) => {
            let mut values: Vec<_> = rows.iter().map(|row| status_value(address, row)).collect();
            values.push(json!({ "host": address, "room": room_fields(room) }));
            values
        }
        Err(error) => vec![error_value(address, error)],
    }
}

/// How a domain stands, as JSON has it.
pub(crate) fn status_value(address: &Address, row: &StatusRow) -> Value {
    json!({
        "host": address,
        "name": row.name,
        "uuid": row.uuid,
        "hypervisor": row.hypervisor,
        "standing": row.standing.name(),
        "since_ms": row.since_ms,
        "class": row.class,
        "used_cpus": row.used_cpus,
        "available_cpus": row.available_cpus,
        "preempted_ms": row.preempted_ms,
        "depth": row.depth.map(Depth::name),
        "doing": row.doing,
        "holds": row.holds.iter().map(hold_value).collect::<Vec<_>>(),
        "leases": keys(&row.leases),
        "line": row.to_string(),
    })
}

fn hold_value(hold: &HoldRow) -> Value {
    let (holder, lease, principal) = match &hold.holder {
        Holder::Room(key) => ("room", key.as_ref().map(ToString::to_string), None),
        Holder::Job(key) => ("job", Some(key.to_string()), None),
        Holder::Person(principal) => ("person", None, Some(principal)),
    };
    json!({
        "holder": holder,
        "lease": lease,
        "principal": principal,
        "depth": hold.depth.name(),
        "reason": hold.reason,
        "since_ms": hold.since_ms,
    })
}

/// A host's room, as JSON has it.
pub(crate) fn room_fields(room: &Room) -> Value {
    let closed = room.maintenance.as_ref().map(|closed| {
        json!({
            "reason": closed.reason,
            "principal": closed.principal,
            "since_ms": closed.since_ms,
        })
    });
    json!({
        "cpus": room.cpus,
        "used_cpus": room.used_cpus,
        "memory_kib": room.memory_kib,
        "used_memory_kib": room.used_memory_kib,
        "maintenance": closed,
    })
}

/// Leases as people and programs read them.
pub(crate) fn keys(keys: &[LeaseKey]) -> Vec<String> {
    keys.iter().map(ToString::to_string).collect()
}

/// One line for each domain: its name, with its host where there are several, and what else is said of it.
fn lines(heard: &[Heard], also: impl Fn(&StatusRow) -> String) -> String {
    let mut lines = String::new();
    for (address, stand) in heard {
        for row in stand.iter().flat_map(|stand| &stand.rows) {
            if heard.len() > 1 {
                lines.push_str(&format!("{address}/"));
            }
            lines.push_str(&format!("{}{}\n", row.name, also(row)));
        }
    }
    lines
}

fn print(setting: &Setting, heard: &[Heard]) -> Result<(), Stop> {
    let is_wide = setting.output.format == Format::Wide;
    let with_host = heard.len() > 1 || heard.iter().any(|(_, stand)| stand.is_err());
    let headers = headers(with_host, is_wide);
    let mut rows = Vec::new();
    for (address, stand) in heard {
        match stand {
            Ok(stand) => rows.extend(stand.rows.iter().map(|row| {
                let mut cells: Vec<Field> = Vec::new();
                cells.extend(with_host.then(|| address.to_string().into()));
                cells.extend(cells_of(row, is_wide));
                Row::plain(cells)
            })),
            Err(error) => rows.push(error_row(address, error, headers.len(), 1)),
        }
    }
    let is_empty = rows.is_empty();
    setting.output.table(&headers, rows)?;
    if is_empty && setting.output.is_terminal {
        setting.output.note("no domain matches");
    }
    if is_wide {
        let rooms: Vec<_> = heard
            .iter()
            .filter_map(|(address, stand)| Some((address, &stand.as_ref().ok()?.room)))
            .map(|(address, room)| room_row(address, room))
            .collect();
        if !is_empty && !rooms.is_empty() {
            setting.output.raw("\n")?;
        }
        setting.output.table(&ROOM_HEADERS, rooms)?;
    }
    Ok(())
}

fn headers(with_host: bool, is_wide: bool) -> Vec<&'static str> {
    let mut headers = Vec::new();
    headers.extend(with_host.then_some("HOST"));
    headers.extend([
        "NAME",
        "STANDING",
        "SINCE",
        "CPUS USED",
        "FREE",
        "PREEMPTED",
        "JOBS",
        "DOING",
    ]);
    if is_wide {
        headers.extend(["CLASS", "DEPTH", "HELD BY", "UUID", "HYPERVISOR"]);
    }
    headers
}

fn cells_of(row: &StatusRow, is_wide: bool) -> Vec<Field> {
    let mut cells: Vec<Field> = vec![
        row.name.to_string().into(),
        standing_field(row.standing),
        since_in_words(row.since_ms).into(),
        row.used_cpus.to_string().into(),
        row.available_cpus.to_string().into(),
        seconds(row.preempted_ms).into(),
        or_dash(keys(&row.leases).join(", ")),
        Field {
            style: Style::Waiting,
            ..or_dash(row.doing.clone())
        },
    ];
    if is_wide {
        let class = row.class.as_ref().map(ToString::to_string);
        cells.extend([
            or_dash(class.unwrap_or_default()),
            or_dash(row.depth.map(|depth| depth.to_string()).unwrap_or_default()),
            or_dash(holders(&row.holds)),
            row.uuid.to_string().into(),
            row.hypervisor.clone().into(),
        ]);
    }
    cells
}

fn or_dash(text: String) -> Field {
    if text.is_empty() {
        "-".into()
    } else {
        text.into()
    }
}

/// Who holds a domain back, in words.
pub(crate) fn holder(holder: &Holder) -> String {
    match holder {
        Holder::Room(None) => "the lack of room".to_owned(),
        Holder::Room(Some(_)) | Holder::Job(_) | Holder::Person(_) => holder.to_string(),
    }
}

/// Who holds a domain back, how deep and why.
fn holders(holds: &[HoldRow]) -> String {
    let hold = |hold: &HoldRow| {
        let why = match hold.reason.as_str() {
            "" => String::new(),
            reason => format!(": {reason}"),
        };
        format!("{} by {}{why}", hold.depth, holder(&hold.holder))
    };
    holds.iter().map(hold).collect::<Vec<_>>().join("; ")
}

/// Returns the field of a standing.
pub(crate) fn standing_field(standing: Standing) -> Field {
    let style = match standing {
        Standing::Free | Standing::OccupiedWouldPreempt => Style::Good,
        Standing::Booting | Standing::Occupied | Standing::Preempted | Standing::Frozen => {
            Style::Waiting
        }
        Standing::Down => Style::Dim,
        Standing::Running | Standing::RunningPreemptible => Style::Plain,
    };
    Field {
        text: standing.to_string(),
        style,
    }
}

/// Milliseconds as the whole seconds that schedulers count in.
pub(crate) fn seconds(ms: u64) -> String {
    format!("{}s", ms / 1000)
}

/// The columns of [`room_row`].
pub(crate) const ROOM_HEADERS: [&str; 4] = ["HOST", "JOB CPUS", "MEMORY", "MAINTENANCE"];

/// A host's room in a table.
pub(crate) fn room_row(address: &Address, room: &Room) -> Row {
    Row::plain(vec![
        address.to_string().into(),
        format!("{} of {}", room.used_cpus, room.cpus).into(),
        format!(
            "{} of {}",
            size(room.used_memory_kib),
            size(room.memory_kib)
        )
        .into(),
        match &room.maintenance {
            None => "-".into(),
            Some(closed) => Field {
                text: format!(
                    "{} ({}, {})",
                    closed.reason,
                    closed.principal,
                    moment(closed.since_ms / 1000)
                ),
                style: Style::Waiting,
            },
        },
    ])
}

/// What is still to be done when the time is over that it was given.
pub(crate) const PENDING: &str = "pending";

/// What is still to do, where something is. What is done to a domain that others hold is theirs.
pub(crate) fn rest(lets_go: bool, row: &StatusRow) -> Option<&str> {
    let is_held = !row.holds.is_empty();
    let is_unseen = is_held && row.depth.is_none() && row.standing != Standing::Down;
    match row.doing.as_str() {
        _ if lets_go && is_held => None,
        "" if is_unseen => Some("libvirt does not show it yet"),
        "" => None,
        doing => Some(doing),
    }
}

/// What is said of a domain that was held back or let go of.
pub(crate) fn sentence(verb: Verb, row: &StatusRow) -> String {
    let lets_go = matches!(verb, Verb::Resume | Verb::Thaw);
    let holders: Vec<_> = row.holds.iter().map(|it| holder(&it.holder)).collect();
    let waits_for_room = |hold: &HoldRow| hold.holder == Holder::Room(None);
    match (rest(lets_go, row), holders.as_slice()) {
        (Some(rest), _) => format!("under way: {rest}"),
        (None, []) if lets_go && row.standing == Standing::Down => {
            "nobody holds it; it is off".to_owned()
        }
        (None, []) if lets_go => "runs".to_owned(),
        (None, _) if lets_go && row.holds.iter().all(waits_for_room) => {
            "nobody holds it; it comes back when there is room".to_owned()
        }
        (None, _) if lets_go => format!("let go of, and still held by {}", named(&holders)),
        (None, _) => match row.depth {
            None => "held back; there is nothing to take from it".to_owned(),
            Some(Depth::Starve) => "held back: it has a trickle of CPU".to_owned(),
            Some(Depth::Shrink) => "held back: starved, and its memory is shrunk".to_owned(),
            Some(Depth::Pause) => "held back: paused".to_owned(),
            Some(Depth::Freeze) => "held back: frozen, its memory is on the disk".to_owned(),
        },
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use xman_common::protocol::Maintenance;

    use super::*;

    pub(crate) fn key() -> LeaseKey {
        "slurm/grid/4711/0".parse().unwrap()
    }

    pub(crate) fn row(name: &str) -> StatusRow {
        StatusRow {
            name: name.parse().unwrap(),
            uuid: Uuid::from_u128(7),
            hypervisor: "qemu:///system".to_owned(),
            standing: Standing::Preempted,
            since_ms: None,
            class: Some("grid".parse().unwrap()),
            used_cpus: 2,
            available_cpus: 0,
            preempted_ms: 61_999,
            depth: Some(Depth::Starve),
            doing: String::new(),
            holds: vec![
                HoldRow {
                    holder: Holder::Room(Some("slurm/grid/4712/0".parse().unwrap())),
                    depth: Depth::Starve,
                    reason: String::new(),
                    since_ms: 5,
                },
                HoldRow {
                    holder: Holder::Person("bob@R".parse().unwrap()),
                    depth: Depth::Pause,
                    reason: "tonight".to_owned(),
                    since_ms: 6,
                },
            ],
            leases: vec![key()],
        }
    }

    fn room(maintenance: Option<Maintenance>) -> Room {
        Room {
            cpus: 64,
            used_cpus: 12,
            memory_kib: 4 << 20,
            used_memory_kib: 1 << 20,
            maintenance,
        }
    }

    fn closed() -> Maintenance {
        Maintenance {
            reason: "a new kernel".parse().unwrap(),
            principal: "carol@R".parse().unwrap(),
            since_ms: 9,
        }
    }

    fn heard(host: &str, names: &[&str]) -> Heard {
        let stand = Stand {
            rows: names.iter().map(|name| row(name)).collect(),
            room: room(None),
        };
        (host.parse().unwrap(), Ok(stand))
    }

    fn texts(cells: &[Field]) -> Vec<&str> {
        cells.iter().map(|cell| cell.text.as_str()).collect()
    }

    #[test]
    fn a_line_for_schedulers_has_its_host_only_where_there_are_several() {
        let also = |row: &StatusRow| format!(" {row}");
        assert_eq!(
            lines(&[heard("a", &["x", "y"])], also),
            "x preempted:2:0;61\ny preempted:2:0;61\n"
        );
        let two = [heard("a", &["x"]), heard("b:7", &["x"])];
        assert_eq!(
            lines(&two, also),
            "a/x preempted:2:0;61\nb:7/x preempted:2:0;61\n"
        );
        assert_eq!(lines(&two, |_| String::new()), "a/x\nb:7/x\n");
    }

    #[test]
    fn each_row_has_a_cell_for_each_column() {
        for is_wide in [false, true] {
            let cells = cells_of(&row("x"), is_wide);
            assert_eq!(cells.len(), headers(false, is_wide).len());
            assert_eq!(headers(true, is_wide).len(), cells.len() + 1);
        }
        let row_of_room = room_row(&"a".parse().unwrap(), &room(None));
        assert_eq!(row_of_room.cells.len(), ROOM_HEADERS.len());
        assert_eq!(
            texts(&row_of_room.cells),
            ["a", "12 of 64", "1 GiB of 4 GiB", "-"]
        );
        let row_of_room = room_row(&"a".parse().unwrap(), &room(Some(closed())));
        assert!(texts(&row_of_room.cells)[3].starts_with("a new kernel (carol@R, "));
    }

    #[test]
    fn a_row_says_how_long_how_deep_and_for_whom() {
        let cells = cells_of(&row("x"), true);
        assert_eq!(
            texts(&cells),
            [
                "x",
                "preempted",
                "-",
                "2",
                "0",
                "61s",
                "slurm/grid/4711/0",
                "-",
                "grid",
                "starve",
                "starve by slurm/grid/4712/0 (needs its room); pause by bob@R: tonight",
                &Uuid::from_u128(7).to_string(),
                "qemu:///system",
            ]
        );
    }

    #[test]
    fn json_has_everything_and_the_room_of_the_host_after_its_domains() {
        let mut one = heard("a", &["x"]);
        if let Ok(stand) = &mut one.1 {
            stand.room = room(Some(closed()));
        }
        let values = values(&one);
        assert_eq!(values.len(), 2);
        let first = &values[0];
        assert_eq!(first["standing"], "preempted");
        assert_eq!(first["preempted_ms"], 61_999);
        assert_eq!(first["since_ms"], Value::Null);
        assert_eq!(first["depth"], "starve");
        assert_eq!(first["leases"], json!(["slurm/grid/4711/0"]));
        assert_eq!(first["line"], "preempted:2:0;61");
        assert_eq!(first["holds"][0]["holder"], "room");
        assert_eq!(first["holds"][0]["lease"], "slurm/grid/4712/0");
        assert_eq!(first["holds"][0]["principal"], Value::Null);
        assert_eq!(first["holds"][1]["holder"], "person");
        assert_eq!(first["holds"][1]["principal"], "bob@R");
        assert_eq!(
            values[1],
            json!({ "host": "a", "room": {
                "cpus": 64,
                "used_cpus": 12,
                "memory_kib": 4 << 20,
                "used_memory_kib": 1 << 20,
                "maintenance": { "reason": "a new kernel", "principal": "carol@R", "since_ms": 9 },
            } })
        );
    }
}
