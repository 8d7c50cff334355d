//! Slurm's power saving: nodes are domains that are started when there is work, and go when there is none. Safe to run twice, and at once.

use std::{collections::BTreeMap, ops::ControlFlow, path::Path, time::Duration};

use tokio::time::{Instant, sleep};
use xman_client::{
    Caller, Event, fleet,
    name::{DomainRef, HostName},
    protocol::{Ask, DomainRow, DomainState, Item, List, Preempt, Reply, Request, Resume, Start},
};

use crate::{
    act::{Actor, failed},
    config::{PowerDown, Unmapped},
    nodes::{NoPlace, Place},
    slurm_command::scontrol,
    verdict::{Class, Outcome},
};

/// Hosts asked at once.
const WIDTH: usize = 64;
/// The pause between two looks at a domain that is on its way.
const LOOK: Duration = Duration::from_secs(1);
/// The longest resume file, in bytes: Slurm's biggest clusters and all their pending jobs.
const MAX_FILE: u64 = 64 * 1024 * 1024;
/// How long Slurm keeps the resume file readable.
const FILE_LIMIT: Duration = Duration::from_secs(10);
/// What is left of the deadline for giving nodes back that did not come.
const GIVE_BACK: Duration = Duration::from_secs(5);

/// Returns what the resume file says; nothing where it is gone, as when slurmctld stops.
pub(crate) async fn resume_file(path: &Path) -> Option<String> {
    use tokio::io::AsyncReadExt as _;
    let read = async {
        let file = tokio::fs::File::open(path).await.ok()?;
        let mut text = String::new();
        file.take(MAX_FILE).read_to_string(&mut text).await.ok()?;
        Some(text)
    };
    tokio::time::timeout(FILE_LIMIT, read).await.ok()?
}

/// What to do about a domain that shall be up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Up {
    /// It is.
    Nothing,
    Start,
    /// Its memory is on the disk: by the schedule, or by libvirt alone.
    Thaw,
    /// It is held back.
    Resume,
    /// It is on its way to somewhere: look again.
    Wait,
}

fn to_be_up(state: DomainState, saved: bool) -> Up {
    match (state, saved) {
        (DomainState::Running | DomainState::Blocked, _) => Up::Nothing,
        (DomainState::Paused, _) => Up::Resume,
        (DomainState::Off | DomainState::Crashed, true) => Up::Thaw,
        (DomainState::Off | DomainState::Crashed, false) => Up::Start,
        (DomainState::ShuttingDown | DomainState::Sleeping | DomainState::Unknown, _) => Up::Wait,
    }
}

/// Starts or thaws the domains of these nodes. Those that do not come in time are handed back to Slurm as powered down: Slurm would otherwise set them DOWN,
/// where they stay until somebody looks.
pub(crate) async fn up(actor: &Actor<'_>, nodes: &[HostName], limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit.saturating_sub(GIVE_BACK);
    let outcomes = each(actor, nodes, |place| one_up(actor, place, deadline)).await;
    let lost: Vec<_> = outcomes
        .iter()
        .filter(|(_, outcome)| outcome.class != Class::Done)
        .map(|(node, _)| node.as_str())
        .collect();
    if !lost.is_empty() {
        hand_back(actor, &lost).await;
    }
    sum(outcomes)
}

async fn hand_back(actor: &Actor<'_>, nodes: &[&str]) {
    let slurm = &actor.config.slurm;
    let names = format!("nodename={}", nodes.join(","));
    let words = [
        "update",
        &names,
        "state=power_down_force",
        "reason=xman-hook: the domain did not start",
    ];
    if let Err(error) = scontrol(slurm, &words).await {
        actor.told.error(format!(
            "{} did not start and cannot be handed back to Slurm, which will set them DOWN: {error}",
            nodes.join(",")
        ));
    }
}

/// Shuts the domains of these nodes down, or freezes them.
pub(crate) async fn down(actor: &Actor<'_>, nodes: &[HostName], limit: Duration) -> Outcome {
    let deadline = Instant::now() + limit;
    sum(each(actor, nodes, |place| one_down(actor, place, deadline)).await)
}

async fn each<'n, W: Future<Output = Outcome>>(
    actor: &Actor<'_>,
    nodes: &'n [HostName],
    work: impl Fn(Place) -> W,
) -> Vec<(&'n HostName, Outcome)> {
    let work = &work;
    fleet::all(nodes, WIDTH, |node| async move {
        let outcome = match actor.config.nodes.place(node.as_str()) {
            Ok(place) => work(place).await,
            Err(NoPlace::Unknown(_)) if actor.config.unmapped == Unmapped::Ignore => {
                Outcome::new(Class::Done, "it is none of xman's")
            }
            Err(error) => Outcome::new(Class::Broken, error.to_string()),
        };
        (node, outcome)
    })
    .await
}

fn sum(outcomes: Vec<(&HostName, Outcome)>) -> Outcome {
    let class = outcomes
        .iter()
        .map(|(_, outcome)| outcome.class)
        .max()
        .unwrap_or(Class::Done);
    let mut by_sentence: BTreeMap<String, Vec<&str>> = BTreeMap::new();
    for (node, outcome) in &outcomes {
        if outcome.class == class {
            by_sentence
                .entry(outcome.sentence.clone())
                .or_default()
                .push(node.as_str());
        }
    }
    let sentences: Vec<_> = by_sentence
        .iter()
        .map(|(sentence, nodes)| format!("{}: {sentence}", nodes.join(",")))
        .collect();
    Outcome::new(class, sentences.join("; "))
}

async fn one_up(actor: &Actor<'_>, place: Place, deadline: Instant) -> Outcome {
    let Place { host, domain } = place;
    let mut caller = actor.caller(&host, left(deadline), u32::MAX);
    let mut last = Outcome::new(Class::Silent, format!("{host}: no time was left"));
    while Instant::now() < deadline {
        let row = match look(&mut caller, &domain).await {
            Ok(row) => row,
            Err(outcome) => return outcome,
        };
        let request = match to_be_up(row.state, row.saved) {
            Up::Nothing => {
                return Outcome::new(
                    Class::Done,
                    format!("{host}: {} is {}", row.name, row.state),
                );
            }
            Up::Wait => None,
            Up::Start => Some(Request::Start(Start {
                domain: DomainRef::Uuid(row.uuid),
                paused: false,
            })),
            Up::Thaw => Some(Request::Thaw(resume(&row))),
            Up::Resume => Some(Request::Resume(resume(&row))),
        };
        last = Outcome::new(
            Class::Later,
            format!("{host}: {} is {}", row.name, row.state),
        );
        if let Some(request) = request
            && let Err(failure) = caller.ask(&request, |_| ControlFlow::Continue(())).await
        {
            let outcome = failed(&failure, &host);
            // It may have changed under our eyes: look again.
            if outcome.class != Class::Later {
                return outcome;
            }
            last = outcome;
        }
        tokio::select! {
            () = sleep(LOOK) => {}
            () = actor.interrupt.raised() => return Outcome::new(Class::Stopped, "stopped"),
        }
    }
    last
}

fn resume(row: &DomainRow) -> Resume {
    Resume {
        domain: DomainRef::Uuid(row.uuid),
        lease: None,
        force: false,
        wait: true,
    }
}

async fn one_down(actor: &Actor<'_>, place: Place, deadline: Instant) -> Outcome {
    let Place { host, domain } = place;
    let mut caller = actor.caller(&host, left(deadline), u32::MAX);
    let row = match look(&mut caller, &domain).await {
        Ok(row) => row,
        Err(outcome) => return outcome,
    };
    if matches!(row.state, DomainState::Off | DomainState::Crashed) {
        return Outcome::new(
            Class::Done,
            format!("{host}: {} is {}", row.name, row.state),
        );
    }
    let domain = DomainRef::Uuid(row.uuid);
    let request = match actor.config.slurm.power_down {
        PowerDown::Shutdown => Request::Shutdown(Ask {
            domain,
            wait: true,
            force: true,
        }),
        PowerDown::Freeze => Request::Freeze(Preempt {
            domain,
            depth: None,
            lease: None,
            reason: "Slurm has no work for it".parse().ok(),
            wait: true,
        }),
    };
    match caller.ask(&request, |_| ControlFlow::Continue(())).await {
        Ok(_) => Outcome::new(Class::Done, format!("{host}: {} is down", row.name)),
        Err(failure) => failed(&failure, &host),
    }
}

/// Returns how a domain is.
async fn look(caller: &mut Caller, domain: &DomainRef) -> Result<DomainRow, Outcome> {
    let list = Request::List(List {
        // A name in which a pattern's characters stand means itself.
        patterns: vec![match domain {
            DomainRef::Name(name) => glob::Pattern::escape(name.as_str()),
            DomainRef::Uuid(uuid) => uuid.to_string(),
        }],
        states: Vec::new(),
    });
    let mut rows = Vec::new();
    let answer = caller
        .ask(&list, |event| {
            match event {
                Event::Again => rows.clear(),
                Event::Items(items) => rows.extend(items.into_iter().filter_map(row)),
                Event::Progress(_) | Event::Alive | Event::Expiring(_) => {}
            }
            ControlFlow::Continue(())
        })
        .await;
    let host = caller.address().clone();
    match (answer, rows.pop()) {
        (Ok(Reply::Done), Some(row)) => Ok(row),
        (Ok(_), _) => Err(Outcome::new(
            Class::Forbidden,
            format!(
                "{host}: there is no domain '{domain}', or the hook's principal may not see it"
            ),
        )),
        (Err(failure), _) => Err(failed(&failure, &host)),
    }
}

fn row(item: Item) -> Option<DomainRow> {
    match item {
        Item::Domain(row) => Some(row),
        Item::Text(_)
        | Item::Job(_)
        | Item::Trouble(_)
        | Item::Image(_)
        | Item::Bytes(_)
        | Item::Console(_)
        | Item::Event(_)
        | Item::Cursor(_)
        | Item::Gap(_)
        | Item::Lease(_)
        | Item::Status(_) => None,
    }
}

fn left(deadline: Instant) -> Duration {
    deadline.saturating_duration_since(Instant::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_up_stays_and_what_is_not_comes_as_it_went() {
        for state in DomainState::ALL {
            for saved in [false, true] {
                let expected = match (state.name(), saved) {
                    ("running" | "blocked", _) => Up::Nothing,
                    ("paused", _) => Up::Resume,
                    ("off" | "crashed", true) => Up::Thaw,
                    ("off" | "crashed", false) => Up::Start,
                    _ => Up::Wait,
                };
                assert_eq!(to_be_up(*state, saved), expected, "{state} {saved}");
            }
        }
    }

    #[tokio::test]
    async fn a_resume_file_that_is_gone_is_none() {
        assert_eq!(resume_file(Path::new("/proc/self/fd/999")).await, None);
    }
}
