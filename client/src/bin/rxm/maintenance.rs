//! `maintenance on|off|show`: hosts that take nothing new.

use clap::Subcommand;
use serde_json::Value;
use xman_client::{Address, Explanation, fleet};
use xman_common::{
    name::LabelValue,
    protocol::{Reply, Request, Room, SetMaintenance, Verb},
};

use crate::{
    change::{agree, change, may},
    exit::Tally,
    heard::{conclude, error_row},
    options::Format,
    output::{error_value, named},
    setting::{Setting, Stop, misfit},
    status::{ROOM_HEADERS, room, room_fields, room_row},
    told::Told,
};

/// What `rxm help maintenance` says after the options.
pub(crate) const HELP: &str = "\
A host in maintenance takes no new leases and starts nothing; what runs there goes on. 'rxm drain' waits until its jobs have ended as well.

Examples:
  rxm -H skirit80 maintenance on --reason 'a new kernel'
  rxm -H @grid maintenance on --reason 'the cooling' --yes
  rxm -H @grid maintenance show
  rxm -H skirit80 maintenance off

JSON: host, cpus and used_cpus (for jobs), memory_kib and used_memory_kib (for domains), maintenance (reason, principal, since_ms; or null), and verb where it was \
    changed.";

/// What to do about maintenance.
#[derive(Debug, Subcommand)]
pub(crate) enum Maintenance {
    /// Take no new leases and start nothing from now on
    On {
        /// Why, for those whose jobs are refused
        #[arg(long, value_name = "TEXT")]
        reason: LabelValue,
    },
    /// Take leases and start domains again
    Off,
    /// Show which hosts are in maintenance, and what room each has
    Show,
}

/// `rxm maintenance`
pub(crate) async fn maintenance(setting: &Setting, command: Maintenance) -> Result<Tally, Stop> {
    match command {
        Maintenance::On { reason } => set(setting, Some(reason)).await,
        Maintenance::Off => set(setting, None).await,
        Maintenance::Show => show(setting).await,
    }
}

async fn set(setting: &Setting, reason: Option<LabelValue>) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let several = hosts.len() > 1;
    let mut told = Told::new(setting, Verb::Maintenance, several);
    let on = reason.is_some();
    if setting.dry_run {
        let allowed = fleet::all(hosts, fleet::WIDTH, |address| async move {
            let mut caller = setting.caller(&address);
            let allowed = may(setting, &mut caller, Verb::Maintenance, None).await;
            (address, allowed)
        });
        for (address, allowed) in allowed.await {
            match allowed {
                Ok(may) => told.rehearse_line(&address, &address.to_string(), None, may),
                Err(error) => told.failed_on(&address, error),
            }
        }
        return told.finish();
    }
    if several {
        let names: Vec<_> = hosts.iter().map(Address::to_string).collect();
        let what = if on { "put" } else { "take" };
        let into = if on { "into" } else { "out of" };
        let about = format!(
            "about to {what} {} hosts {into} maintenance: {}",
            names.len(),
            named(&names)
        );
        agree(setting, &about).await?;
    }
    let reason = &reason;
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let changed = put(setting, &mut setting.caller(&address), reason.clone()).await;
        (address, changed)
    });
    for (address, changed) in heard.await {
        match changed {
            Ok(room) => {
                let said = format!("{address}: {}", sentence(&room));
                let value = room_value(&address, &room);
                told.done_with(value, &[said], &[address.to_string()]);
            }
            Err(error) => told.failed_on(&address, error),
        }
    }
    told.finish()
}

/// Puts one host into maintenance, or takes it out.
pub(crate) async fn put(
    setting: &Setting,
    caller: &mut xman_client::Caller,
    reason: Option<LabelValue>,
) -> Result<Room, Explanation> {
    let request = Request::Maintenance(SetMaintenance { reason });
    let Reply::Room(room) = change(setting, caller, &request).await? else {
        return Err(misfit());
    };
    Ok(room)
}

fn sentence(room: &Room) -> String {
    match &room.maintenance {
        Some(closed) => format!(
            "in maintenance, takes no new leases and starts nothing: {}",
            closed.reason
        ),
        None => "takes leases and starts domains again".to_owned(),
    }
}

fn room_value(address: &Address, room: &Room) -> Value {
    let mut value = serde_json::Map::new();
    value.insert("host".to_owned(), Value::String(address.to_string()));
    if let Value::Object(fields) = room_fields(room) {
        value.extend(fields);
    }
    Value::Object(value)
}

async fn show(setting: &Setting) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let heard = fleet::all(hosts, fleet::WIDTH, |address| async move {
        let room = room(setting, &mut setting.caller(&address)).await;
        (address, room)
    })
    .await;
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let value = |(address, room): &(Address, Result<Room, Explanation>)| match room {
                Ok(room) => room_value(address, room),
                Err(error) => error_value(address, error),
            };
            setting.output.values(heard.iter().map(value).collect())?;
        }
        // The hosts that are in maintenance are what a script wants of it.
        Format::Name => {
            for (address, room) in &heard {
                if room.as_ref().is_ok_and(|room| room.maintenance.is_some()) {
                    setting.output.line(&address.to_string())?;
                }
            }
        }
        Format::Table | Format::Wide => {
            let row = |(address, room): &(Address, Result<Room, Explanation>)| match room {
                Ok(room) => room_row(address, room),
                Err(error) => error_row(address, error, ROOM_HEADERS.len(), 0),
            };
            setting
                .output
                .table(&ROOM_HEADERS, heard.iter().map(row).collect())?;
        }
    }
    Ok(conclude(setting, &heard))
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use serde_json::json;

    use super::*;
    use crate::args::{Cli, Command};

    #[test]
    fn maintenance_begins_with_a_reason_and_ends_without() {
        let read = |line: &[&str]| {
            let words = [&["rxm", "maintenance"], line].concat();
            let Command::Maintenance(command) = Cli::try_parse_from(words).ok()?.command else {
                panic!("no maintenance")
            };
            Some(command)
        };
        assert!(matches!(
            read(&["on", "--reason", "a new kernel"]),
            Some(Maintenance::On { reason }) if reason.as_str() == "a new kernel"
        ));
        assert!(matches!(read(&["off"]), Some(Maintenance::Off)));
        assert!(matches!(read(&["show"]), Some(Maintenance::Show)));
        for bad in [
            &[][..],
            &["on"],
            &["on", "--reason", ""],
            &["on", "--reason", "a\nb"],
            &["off", "--reason", "x"],
        ] {
            assert!(read(bad).is_none(), "{bad:?}");
        }
    }

    #[test]
    fn the_room_is_told_with_its_host() {
        let room = Room {
            cpus: 4,
            used_cpus: 1,
            memory_kib: 3,
            used_memory_kib: 2,
            maintenance: None,
        };
        assert_eq!(
            room_value(&"a:7".parse().unwrap(), &room),
            json!({ "host": "a:7", "cpus": 4, "used_cpus": 1, "memory_kib": 3, "used_memory_kib": 2, "maintenance": null })
        );
        assert_eq!(sentence(&room), "takes leases and starts domains again");
    }
}
