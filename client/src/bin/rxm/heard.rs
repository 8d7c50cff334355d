//! What every host said to the same question, or why it said nothing.

use xman_client::{Address, Explanation, fleet};
use xman_common::protocol::{Reply, Request};

use crate::{
    exit::Tally,
    output::{Complaints, Field, Row, Style},
    setting::{Setting, Stop, misfit},
};

/// The longest reason that a row gives, in characters: the other rows share its column.
const LONGEST_CLAUSE: usize = 64;

/// What one host said, or why it said nothing.
pub(crate) type Heard<T> = (Address, Result<T, Explanation>);

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

/// Asks every host the same.
pub(crate) async fn ask_all<T>(
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

pub(crate) fn hosts_that_answered<T>(setting: &Setting, heard: &[Heard<T>]) -> Result<(), Stop> {
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
