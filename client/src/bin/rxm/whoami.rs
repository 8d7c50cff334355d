//! `whoami`: who one is to each host, until when, and what one may do there.

use serde_json::{Value, json};
use xman_client::{Address, Caller, Explanation, fleet};
use xman_common::protocol::{Code, Identity, Reply, Request, Whoami};

use crate::{
    exit::Tally,
    heard::{Heard, hosts_that_answered},
    heard::{conclude, error_row},
    options::Format,
    output::{Row, error_value, key_value},
    setting::{Setting, Stop, misfit},
    units::moment,
};

/// What `rxm help whoami` says after the options.
pub(crate) const HELP: &str = "\
Examples:
  rxm -H skirit80 whoami
  rxm -H @grid -o json whoami
  rxm -H skirit80 --on-behalf-of bob@EXAMPLE.ORG whoami

JSON: host, principal, service (the host's principal that was really used), until_s (seconds since 1970), rule, verbs, groups (your \
    Unix groups there, where rules may go by them), acting (who acts for the principal, or null), session, xmand.";

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
