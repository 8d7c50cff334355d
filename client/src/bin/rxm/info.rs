//! `info`: what hosts are.

use std::time::Duration;

use serde_json::{Value, json};
use xman_client::Address;
use xman_common::protocol::{HostInfo, Info, Reply, Request};

use crate::{
    exit::Tally,
    heard::{Heard, ask_all, hosts_that_answered},
    heard::{conclude, error_row},
    options::Format,
    output::{Field, Row, Style, error_value, key_value},
    setting::{Setting, Stop},
    units::{size, span},
};

/// What `rxm help info` says after the options.
pub(crate) const HELP: &str = "\
Examples:
  rxm -H skirit80 info
  rxm -H @grid info

JSON: host, hostname, xmand, hypervisors (uri, driver, version, libvirt, trouble, age_ms), cpu_model, cpus, mhz, memory_kib, \
    free_memory_kib, load (three numbers), active, domains, used_vcpus, used_memory_kib, stuck_lanes.";

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
