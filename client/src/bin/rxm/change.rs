//! The verbs that change domains: found, asked about where many are meant, carried out on all hosts at once, told in order.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};

use uuid::Uuid;
use xman_client::{Address, Caller, Event, Explanation, Wait, fleet};
use xman_common::{
    name::DomainRef,
    protocol::{About, Code, Explain, Reply, Request, Verb, Whoami},
};

use crate::{
    ask,
    exit::Tally,
    output::named,
    setting::{Setting, Stop, misfit},
    target::{self, Found, Purpose, Target, Wanted},
    told::Told,
    told::infinitive,
};

/// Hosts that are worked on at once, each with up to [`SESSIONS`] sessions.
pub(crate) const HOSTS: usize = 64;
/// Sessions with one host: a guest that takes its time delays no other.
const SESSIONS: usize = 4;

/// What is done to domains.
pub(crate) struct Deed<'a> {
    verb: Verb,
    /// What one must be allowed to do as well.
    also: Option<Verb>,
    /// What is said of a domain to which it was done.
    past: &'a str,
    /// What is said before it is done, where that is more than the verb says.
    warning: Option<String>,
    request: &'a (dyn Fn(DomainRef) -> Request + Sync),
    /// Whether what was answered is what was wanted.
    judge: fn(Reply) -> Result<Reply, Explanation>,
}

impl<'a> Deed<'a> {
    pub(crate) fn new(
        verb: Verb,
        past: &'a str,
        request: &'a (dyn Fn(DomainRef) -> Request + Sync),
    ) -> Self {
        Self {
            verb,
            also: None,
            past,
            warning: None,
            request,
            judge: Ok,
        }
    }

    /// With a second right that it takes.
    pub(crate) fn with(self, also: impl Into<Option<Verb>>) -> Self {
        Self {
            also: also.into(),
            ..self
        }
    }

    /// With what is said before it is done.
    pub(crate) fn warning(self, warning: Option<String>) -> Self {
        Self { warning, ..self }
    }

    /// With an answer that can be a failure all the same.
    pub(crate) fn judged(self, judge: fn(Reply) -> Result<Reply, Explanation>) -> Self {
        Self { judge, ..self }
    }
}

/// Does it to all domains that are meant.
pub(crate) async fn carry_out(
    setting: &Setting,
    domains: &[String],
    deed: Deed<'_>,
) -> Result<Tally, Stop> {
    let wanted = Wanted::parse_all(domains, setting)?;
    let Found {
        targets,
        callers,
        silent,
    } = target::find(setting, &wanted, Purpose::Change).await?;
    if setting.dry_run {
        return rehearse(setting, (deed.verb, deed.also), targets, &silent).await;
    }
    let is_asked = wanted.iter().any(|wanted| wanted.name.is_pattern()) && targets.len() > 1;
    if is_asked {
        confirm(setting, deed.verb, &targets, &silent).await?;
    }
    if let Some(warning) = &deed.warning {
        let labels: Vec<_> = targets.iter().map(Target::label).collect();
        setting
            .output
            .note(&format!("{}: {warning}", named(&labels)));
    }
    let mut told = Told::new(
        setting,
        deed.verb,
        hosts_of(&targets) > 1 || !silent.is_empty(),
    );
    silent
        .iter()
        .for_each(|(host, error)| told.silent(host, error));
    let deed = &deed;
    fleet::each(
        by_host(targets, callers),
        HOSTS,
        |work| do_on_host(setting, deed, work, is_asked),
        |outcomes| {
            for (target, outcome) in outcomes {
                told.take(&target, deed.past, outcome);
            }
            ControlFlow::Continue(())
        },
    )
    .await;
    told.finish()
}

/// The number of hosts that have the targets.
pub(crate) fn hosts_of(targets: &[Target]) -> usize {
    let mut hosts: Vec<_> = targets.iter().map(|target| &target.address).collect();
    hosts.sort_by_key(|host| host.to_string());
    hosts.dedup();
    hosts.len()
}

/// The targets of a host, and a session with it where there is one.
pub(crate) type HostWork = (Vec<Target>, Option<Caller>);

/// Puts the targets of a host together, hosts in the order of their first target.
pub(crate) fn by_host(
    targets: Vec<Target>,
    mut callers: HashMap<Address, Caller>,
) -> Vec<HostWork> {
    let mut work: Vec<HostWork> = Vec::new();
    let mut places: HashMap<Address, usize> = HashMap::new();
    for target in targets {
        let address = target.address.clone();
        let at = *places.entry(address.clone()).or_insert_with(|| {
            work.push((Vec::new(), callers.remove(&address)));
            work.len() - 1
        });
        if let Some((targets, _)) = work.get_mut(at) {
            targets.push(target);
        }
    }
    work
}

async fn do_on_host(
    setting: &Setting,
    deed: &Deed<'_>,
    (targets, caller): HostWork,
    was_asked: bool,
) -> Vec<(Target, Result<Reply, Explanation>)> {
    let open = &Mutex::new(caller);
    fleet::all(targets, SESSIONS, |target| async move {
        let taken = open.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut caller = taken.unwrap_or_else(|| setting.caller(&target.address));
        if was_asked {
            caller.rest();
        }
        target.aim(setting, &mut caller);
        let outcome = change(setting, &mut caller, &(deed.request)(target.domain.clone()))
            .await
            .and_then(deed.judge);
        // The next domain of this host goes on with the session.
        *open.lock().unwrap_or_else(PoisonError::into_inner) = Some(rested(caller));
        (target, outcome)
    })
    .await
}

/// A session for the next domain of its host.
pub(crate) fn rested(mut caller: Caller) -> Caller {
    caller.rest();
    caller
}

/// Makes a call that changes something, under a fresh id.
pub(crate) async fn change(
    setting: &Setting,
    caller: &mut Caller,
    request: &Request,
) -> Result<Reply, Explanation> {
    let reply = caller
        .call(request, Uuid::new_v4(), Wait::Deadline, |event| {
            if let Event::Expiring(seconds) = event {
                setting.warn_of_expiry(seconds);
            }
            ControlFlow::Continue(())
        })
        .await;
    reply.map_err(|failure| {
        let explanation = setting.explain_change(&failure, caller.address());
        setting.of_denial(explanation, request)
    })
}

/// Asks before a pattern changes several domains.
pub(crate) async fn confirm(
    setting: &Setting,
    verb: Verb,
    targets: &[Target],
    silent: &[(Address, Explanation)],
) -> Result<(), Stop> {
    let labels: Vec<_> = targets.iter().map(Target::label).collect();
    let domains = labels.len();
    let hosts = match hosts_of(targets) {
        1 => "1 host".to_owned(),
        hosts => format!("{hosts} hosts"),
    };
    let left_out = match silent.len() {
        0 => String::new(),
        hosts => format!(" ({hosts} more did not answer and are left out)"),
    };
    let about = format!(
        "about to {} {domains} domains on {hosts}{left_out}: {}",
        infinitive(verb),
        named(&labels)
    );
    agree(setting, &about).await
}

/// Asks before something is done that is more than what was typed lets expect.
pub(crate) async fn agree(setting: &Setting, about: &str) -> Result<(), Stop> {
    if setting.yes {
        return Ok(());
    }
    if !ask::is_possible() {
        return Err(Stop::Usage(format!(
            "{about}; nobody can be asked here: say --yes to do it, or --dry-run to see it"
        )));
    }
    match ask::ask(setting, &format!("{about}; go on? [y/N]"))
        .await?
        .as_str()
    {
        "y" | "yes" => Ok(()),
        _ => Err(Stop::Failed(
            xman_client::Kind::Refused,
            "nothing was done".to_owned(),
        )),
    }
}

/// Shows what would be done to what, and whether one may, by the word of each host.
pub(crate) async fn rehearse(
    setting: &Setting,
    (verb, also): (Verb, Option<Verb>),
    targets: Vec<Target>,
    silent: &[(Address, Explanation)],
) -> Result<Tally, Stop> {
    let mut told = Told::new(setting, verb, hosts_of(&targets) > 1);
    silent
        .iter()
        .for_each(|(host, error)| told.silent(host, error));
    let work = by_host(targets, HashMap::new());
    let rights = fleet::all(work, fleet::WIDTH, |(targets, _)| async move {
        let mut caller = None;
        let mut rights = Vec::new();
        for target in targets {
            let caller = caller.get_or_insert_with(|| setting.caller(&target.address));
            caller.rest();
            target.aim(setting, caller);
            let mut allowed = may(setting, caller, verb, Some(&target.domain)).await;
            if let (Ok(true), Some(also)) = (&allowed, also) {
                allowed = may(setting, caller, also, Some(&target.domain)).await;
            }
            // It brings something of the host's, and is judged on the host too.
            if let (Ok(true), Verb::Attach) = (&allowed, verb) {
                allowed = may(setting, caller, verb, None).await;
            }
            rights.push((target, allowed));
        }
        rights
    });
    for (target, allowed) in rights.await.into_iter().flatten() {
        match allowed {
            Ok(allowed) => told.rehearsed(&target, allowed),
            Err(error) => told.take(&target, "", Err(error)),
        }
    }
    told.finish()
}

/// Returns whether the caller may do something to a domain, or to a host. Where the host explains nothing, its whoami tells what one may do to
/// some domain at least.
pub(crate) async fn may(
    setting: &Setting,
    caller: &mut Caller,
    verb: Verb,
    domain: Option<&DomainRef>,
) -> Result<bool, Explanation> {
    let explain = Request::Explain(Explain {
        action: verb.name().to_owned(),
        about: domain.cloned().map_or(About::Host, About::Domain),
    });
    match setting.ask(caller, &explain).await {
        Ok((Reply::Explained(explained), _)) => return Ok(explained.allowed),
        Ok(_) => return Err(misfit()),
        Err(error) if error.code == Code::Denied.name() => {}
        Err(error) => return Err(error),
    }
    let whoami = Request::Whoami(Whoami::default());
    match setting.ask(caller, &whoami).await? {
        (Reply::Whoami(identity), _) => Ok(identity.verbs.iter().any(|may| may == verb.name())),
        _ => Err(misfit()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(host: &str, number: u128) -> Target {
        Target {
            address: host.parse().unwrap(),
            domain: DomainRef::Uuid(Uuid::from_u128(number)),
            row: None,
            by: None,
        }
    }

    #[test]
    fn the_work_of_a_host_stays_together_and_in_order() {
        let targets = vec![target("b", 1), target("a", 2), target("b", 3)];
        assert_eq!(hosts_of(&targets), 2);
        let work = by_host(targets, HashMap::new());
        let shape: Vec<Vec<_>> = work
            .iter()
            .map(|(t, _)| t.iter().map(Target::label).collect())
            .collect();
        let label = |n: u128| Uuid::from_u128(n).to_string();
        assert_eq!(
            shape,
            [
                vec![format!("b/{}", label(1)), format!("b/{}", label(3))],
                vec![format!("a/{}", label(2))],
            ]
        );
    }
}
