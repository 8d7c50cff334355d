//! Owners, class and labels as tables show them, and what is said where they cannot be read.

use xman_client::{Address, Explanation};
use xman_common::{
    name::{Principal, Tag},
    protocol::DomainRow,
};

use crate::{
    output::{Complaints, Field, Style},
    setting::Setting,
};

/// Returns the owners of a domain as tables show them.
pub(crate) fn owners(row: &DomainRow) -> String {
    let owners: Vec<_> = row.metadata.owners.iter().map(Principal::as_str).collect();
    owners.join(", ")
}

/// Returns the labels of a domain as tables show them.
pub(crate) fn labels(row: &DomainRow) -> String {
    let labels = row.metadata.labels.iter();
    let labels: Vec<_> = labels
        .map(|(key, value)| format!("{key}={value}"))
        .collect();
    labels.join(", ")
}

/// Returns the class of a domain as tables show it.
pub(crate) fn class_of(row: &DomainRow) -> String {
    row.metadata.class.iter().map(Tag::to_string).collect()
}

/// Returns the field of one of the three: `-` for none, and marked where none can be read.
pub(crate) fn shown(row: &DomainRow, text: String) -> Field {
    match (row.metadata_trouble.is_empty(), text.is_empty()) {
        (false, _) => Field {
            text: "unreadable".to_owned(),
            style: Style::Bad,
        },
        (true, true) => "-".into(),
        (true, false) => text.into(),
    }
}

/// Says which domains are nobody's because their metadata cannot be read, and what to do.
pub(crate) fn warn<'a>(
    setting: &Setting,
    rows: impl Iterator<Item = (&'a Address, &'a DomainRow)>,
) {
    let mut complaints = Complaints::default();
    for (address, row) in rows.filter(|(_, row)| !row.metadata_trouble.is_empty()) {
        let what = format!(
            "its owners, class and labels cannot be read ({}), so nobody but administrators may do anything with it",
            row.metadata_trouble
        );
        let warning = Explanation {
            kind: xman_client::Kind::Refused,
            code: "metadata",
            what,
            advice: "somebody changed them by hand: on the host, `virsh metadata DOMAIN urn:xman:domain:1 --remove` clears them, and `rxm owner` sets them anew".to_owned(),
            is_common: false,
        };
        complaints.add(format!("{address}/{}", row.name), &warning);
    }
    complaints.say(&setting.output);
}
