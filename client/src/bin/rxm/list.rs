//! `list`: the domains of all hosts; one that cannot be asked is a row of its own.

use std::{collections::HashSet, time::Duration};

use clap::Args;
use serde_json::{Value, json};
use xman_client::{Address, fleet};
use xman_common::{
    name::{Principal, Tag},
    protocol::{Code, DomainRow, DomainState, HypervisorTrouble, Metadata},
};

use crate::{
    exit::Tally,
    heard::{Heard, conclude, error_row},
    options::Format,
    output::{Complaints, Field, Row, Style, error_value},
    setting::{Setting, Stop},
    status::{seconds, standing_field},
    tags::{class_of, labels, owners, shown, warn},
    target::{self, ailing, driver, list_questions},
    units::age_in_words,
    units::{since_in_words, size, span},
    values::domain_value,
};

/// What `rxm help list` says after the options.
pub(crate) const HELP: &str = "\
Examples:
  rxm -H skirit80 list
  rxm list 'grid-*' --state running,paused
  rxm list skirit80/web -o wide
  rxm -H @grid -o name list --state off
  rxm -H @grid list --owner me
  rxm -H @grid list --class grid --label project=alpha

A row that is marked stale is what xmand last heard from a libvirt that is silent. One whose owners are marked unreadable is nobody's until an \
    administrator has mended its metadata; a line on stderr says how.

Where the rows come from several hypervisors a column names the driver of each (-o wide: the URI). One that is broken or silent is told of on \
    stderr, with exit code 5, and hides nothing of the others; in JSON it is an object of host, hypervisor and error (code, message).

JSON: host, name, uuid, hypervisor, id (null when off), state, reason, memory_kib, max_memory_kib, vcpus, max_vcpus, cpu_time_ns, \
    autostart, persistent, saved (whether a saved memory waits for its next start), since_ms (when this state began in milliseconds since 1970; null \
    where it was before xmand came to look), standing (towards jobs; null where it takes no part), preempted_ms, owners (a list), class (or null), labels (an object), metadata_trouble (why these three cannot be read; \
    usually empty), age_ms, stale.";

/// Arguments of `list`.
#[derive(Debug, Args)]
pub(crate) struct ListArgs {
    /// NAME, UUID, HOST/NAME or shell pattern; all domains without any
    #[arg(value_name = "PATTERN")]
    pub(crate) patterns: Vec<String>,
    /// Only domains in these states, as running,paused
    #[arg(long, value_name = "STATE", value_delimiter = ',', value_parser = state)]
    pub(crate) state: Vec<DomainState>,
    /// Only domains that this principal owns; 'me' is who you are
    #[arg(long, value_name = "PRINCIPAL", value_parser = owner)]
    pub(crate) owner: Option<Owner>,
    /// Only domains of this class
    #[arg(long)]
    pub(crate) class: Option<Tag>,
    /// Only domains with this label, or with this value of it; all of several
    #[arg(long, value_name = "KEY[=VALUE]", value_parser = label)]
    pub(crate) label: Vec<(Tag, Option<String>)>,
}

/// Whose domains are listed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// The caller's, or whose the caller acts for.
    Me,
    /// Somebody's.
    One(Principal),
}

fn state(text: &str) -> Result<DomainState, String> {
    let found = DomainState::ALL
        .iter()
        .copied()
        .find(|state| state.name() == text);
    found.ok_or_else(|| {
        let names: Vec<_> = DomainState::ALL.iter().map(|state| state.name()).collect();
        format!("states are {}", names.join(", "))
    })
}

fn owner(text: &str) -> Result<Owner, String> {
    match text {
        "me" => Ok(Owner::Me),
        _ => text
            .parse()
            .map(Owner::One)
            .map_err(|error: xman_common::name::BadName| error.to_string()),
    }
}

fn label(text: &str) -> Result<(Tag, Option<String>), String> {
    let (key, value) = text
        .split_once('=')
        .map_or((text, None), |(key, value)| (key, Some(value.to_owned())));
    let key = key
        .parse()
        .map_err(|error: xman_common::name::BadName| error.to_string())?;
    Ok((key, value))
}

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

fn state_style(state: DomainState) -> Style {
    match state {
        DomainState::Running | DomainState::Blocked => Style::Good,
        DomainState::Paused | DomainState::ShuttingDown | DomainState::Sleeping => Style::Waiting,
        DomainState::Crashed => Style::Bad,
        DomainState::Off => Style::Dim,
        DomainState::Unknown => Style::Plain,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;
    use xman_client::{Explanation, Kind};
    use xman_common::protocol::Standing;

    use super::*;
    use crate::heard::Heard;

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
}
