//! `owner`, `label` and `class`: what belongs to a domain and hosts' rules go by.

use std::collections::{BTreeMap, BTreeSet};

use clap::Args;
use xman_common::{
    name::{LabelValue, Principal, Tag},
    protocol::{DomainRow, Request, SetClass, SetLabels, SetOwners, Verb},
};

use crate::{
    change::{Deed, carry_out},
    exit::Tally,
    heard::conclude,
    options::Format,
    output::Row,
    setting::{Setting, Stop},
    tags::{class_of, labels, owners, shown, warn},
    target::{self, Found, Purpose, Target, Wanted},
    values::domain_value,
};

/// What `rxm help owner` says after the options.
pub(crate) const OWNER_HELP: &str = "\
What an owner may do is up to each host's rules. An owner's name is a full Kerberos principal, as klist shows it; + adds it and - takes it away. \
    A name that begins with H and could be read as -H stands after --.

Examples:
  rxm owner skirit80/web
  rxm owner skirit80/web +alice@EXAMPLE.ORG -bob@EXAMPLE.ORG
  rxm owner 'grid-*' +alice@EXAMPLE.ORG --dry-run";

/// What `rxm help label` says after the options.
pub(crate) const LABEL_HELP: &str = "\
KEY=VALUE sets a label, KEY- takes it away. Keys are small letters, digits, '.', '-' and '_'.

Examples:
  rxm label skirit80/web
  rxm label skirit80/web project=alpha tier=front
  rxm label skirit80/web tier-
  rxm label 'grid-*' project=alpha --yes";

/// What `rxm help class` says after the options.
pub(crate) const CLASS_HELP: &str = "\
A class says what kind of work a domain is for; hosts have rules for their classes.

Examples:
  rxm class skirit80/web
  rxm class skirit80/web grid
  rxm class skirit80/web --none";

/// Arguments of `owner`.
#[derive(Debug, Args)]
pub(crate) struct OwnerArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// +PRINCIPAL makes an owner, -PRINCIPAL takes one away; without any, shows who owns it
    #[arg(value_name = "+PRINCIPAL|-PRINCIPAL")]
    pub(crate) changes: Vec<String>,
}

/// Arguments of `label`.
#[derive(Debug, Args)]
pub(crate) struct LabelArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// KEY=VALUE sets a label, KEY- takes it away; without any, shows them
    #[arg(value_name = "KEY=VALUE|KEY-")]
    pub(crate) changes: Vec<String>,
}

/// Arguments of `class`.
#[derive(Debug, Args)]
pub(crate) struct ClassArgs {
    /// NAME, UUID, HOST/NAME or shell pattern
    pub(crate) domain: String,
    /// The class it gets; without, shows which it has
    #[arg(conflicts_with = "none")]
    pub(crate) class: Option<Tag>,
    /// Take it out of its class
    #[arg(long)]
    pub(crate) none: bool,
}

/// `rxm owner`
pub(crate) async fn owner(setting: &Setting, args: OwnerArgs) -> Result<Tally, Stop> {
    if args.changes.is_empty() {
        return show(setting, &args.domain, "OWNERS", owners).await;
    }
    let OwnerChange { add, remove } = OwnerChange::read(&args.changes).map_err(Stop::Usage)?;
    let request = &|domain| {
        Request::Owner(SetOwners {
            domain,
            add: add.clone(),
            remove: remove.clone(),
        })
    };
    let deed = Deed::new(Verb::Owner, "owners changed", request);
    carry_out(setting, &[args.domain], deed).await
}

/// `rxm label`
pub(crate) async fn label(setting: &Setting, args: LabelArgs) -> Result<Tally, Stop> {
    if args.changes.is_empty() {
        return show(setting, &args.domain, "LABELS", labels).await;
    }
    let LabelChange { set, remove } = LabelChange::read(&args.changes).map_err(Stop::Usage)?;
    let request = &|domain| {
        Request::Label(SetLabels {
            domain,
            set: set.clone(),
            remove: remove.clone(),
        })
    };
    let deed = Deed::new(Verb::Label, "labels changed", request);
    carry_out(setting, &[args.domain], deed).await
}

/// `rxm class`
pub(crate) async fn class(setting: &Setting, args: ClassArgs) -> Result<Tally, Stop> {
    let ClassArgs {
        domain,
        class,
        none,
    } = args;
    let past = match &class {
        Some(class) => format!("is of the class {class}"),
        None if none => "is of no class".to_owned(),
        None => return show(setting, &domain, "CLASS", class_of).await,
    };
    let request = &|domain| {
        Request::Class(SetClass {
            domain,
            class: class.clone(),
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::Class, &past, request)).await
}

/// What is added to the owners and taken away.
#[derive(Debug, Default, PartialEq)]
struct OwnerChange {
    add: BTreeSet<Principal>,
    remove: BTreeSet<Principal>,
}

impl OwnerChange {
    fn read(words: &[String]) -> Result<Self, String> {
        let mut change = Self::default();
        for word in words {
            let (name, to) = if let Some(name) = word.strip_prefix('+') {
                (name, &mut change.add)
            } else if let Some(name) = word.strip_prefix('-') {
                (name, &mut change.remove)
            } else {
                return Err(format!(
                    "'{word}' neither adds an owner nor takes one away; say +{word} or -{word}"
                ));
            };
            let principal = name
                .parse()
                .map_err(|error| format!("'{word}' is no owner: {error}"))?;
            to.insert(principal);
        }
        match change.add.intersection(&change.remove).next() {
            Some(both) => Err(format!(
                "{both} is to be added and to be taken away; leave one of them out"
            )),
            None => Ok(change),
        }
    }
}

/// Which labels are set and taken away.
#[derive(Debug, Default, PartialEq)]
struct LabelChange {
    set: BTreeMap<Tag, LabelValue>,
    remove: BTreeSet<Tag>,
}

impl LabelChange {
    fn read(words: &[String]) -> Result<Self, String> {
        let mut change = Self::default();
        for word in words {
            let bad = |error: xman_common::name::BadName| format!("'{word}' is no label: {error}");
            let is_new = if let Some((key, value)) = word.split_once('=') {
                let (key, value) = (key.parse().map_err(bad)?, value.parse().map_err(bad)?);
                !change.remove.contains(&key) && change.set.insert(key, value).is_none()
            } else if let Some(key) = word.strip_suffix('-') {
                let key = key.parse().map_err(bad)?;
                !change.set.contains_key(&key) && change.remove.insert(key)
            } else {
                return Err(format!(
                    "'{word}' neither sets a label nor takes one away; say {word}=VALUE or {word}-"
                ));
            };
            if !is_new {
                return Err(format!(
                    "'{word}' is about a label that is named before; say each once"
                ));
            }
        }
        Ok(change)
    }
}

/// Shows one of the three of domains, from what their hosts list.
async fn show(
    setting: &Setting,
    domain: &str,
    header: &str,
    text: fn(&DomainRow) -> String,
) -> Result<Tally, Stop> {
    let wanted = Wanted::parse(domain, setting)?;
    let Found {
        targets, silent, ..
    } = target::find(setting, &[wanted], Purpose::Show).await?;
    let rows: Vec<(&Target, &DomainRow)> = targets
        .iter()
        .filter_map(|target| Some((target, target.row.as_ref()?)))
        .collect();
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let values = rows.iter().map(|(t, row)| domain_value(&t.address, row));
            setting.output.values(values.collect())?;
        }
        Format::Name => {
            for (target, _) in &rows {
                setting.output.line(&target.label())?;
            }
        }
        Format::Table | Format::Wide => {
            let cells = rows.iter().map(|(target, row)| {
                Row::plain(vec![target.label().into(), shown(row, text(row))])
            });
            setting.output.table(&["DOMAIN", header], cells.collect())?;
        }
    }
    warn(setting, rows.iter().map(|(t, row)| (&t.address, *row)));
    let mut heard: Vec<_> = rows
        .iter()
        .map(|(t, _)| (t.address.clone(), Ok(())))
        .collect();
    heard.extend(silent.into_iter().map(|(host, error)| (host, Err(error))));
    Ok(conclude(setting, &heard))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[track_caller]
    fn refused<T: std::fmt::Debug>(read: Result<T, String>, reason: &str) {
        let error = read.unwrap_err();
        assert!(error.contains(reason), "{error}");
    }

    #[test]
    fn owners_are_added_and_taken_away_by_their_sign() {
        let change = OwnerChange::read(&words("+alice@R -bob@R +http/web.ex.org@R")).unwrap();
        let names = |set: &BTreeSet<Principal>| -> Vec<_> {
            set.iter().map(Principal::to_string).collect()
        };
        assert_eq!(names(&change.add), ["alice@R", "http/web.ex.org@R"]);
        assert_eq!(names(&change.remove), ["bob@R"]);
    }

    #[test]
    fn an_owner_without_sign_or_realm_is_refused_and_no_realm_is_guessed() {
        let read = |text| OwnerChange::read(&words(text));
        refused(read("alice@R"), "say +alice@R or -alice@R");
        refused(read("+alice"), "names no realm");
        refused(read("-alice"), "names no realm");
        refused(read("+alice@"), "names no realm");
        refused(read("+"), "empty principal");
        refused(
            read("+alice@R -alice@R"),
            "to be added and to be taken away",
        );
    }

    #[test]
    fn labels_are_set_and_taken_away() {
        let change = LabelChange::read(&words("project=a=b tier-")).unwrap();
        let (key, value) = change.set.first_key_value().unwrap();
        assert_eq!((key.as_str(), value.as_str()), ("project", "a=b"));
        assert_eq!(change.set.len(), 1);
        assert_eq!(change.remove, ["tier".parse().unwrap()].into());
    }

    #[test]
    fn what_is_no_change_of_a_label_is_refused() {
        let read = |text| LabelChange::read(&words(text));
        refused(read("tier"), "say tier=VALUE or tier-");
        refused(read("Tier=x"), "cannot hold");
        refused(read("=x"), "empty tag");
        refused(read("-"), "empty tag");
        refused(read("tier="), "empty label value");
        for twice in ["a=1 a=2", "a=1 a-", "a- a=1", "a- a-"] {
            refused(read(twice), "named before");
        }
    }
}
