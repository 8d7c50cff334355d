//! The seam between "may" and "do": one match, one arm a verb. A grant comes in and is used up.

use std::{iter::Peekable, path::PathBuf, sync::Arc};

use glob::Pattern;
use tokio::{
    sync::{mpsc, watch},
    time::Instant,
};
use uuid::Uuid;
use xman_common::{
    codec,
    name::DomainRef,
    protocol::{
        About, Ask, Code, Dmesg, DomainRow, Fault, HostInfo, Identity, Item, JobRow, JobState,
        List, Migrate, Progress, Reply, Request, Verb,
    },
};
use xman_policy::{Action, Grant, Person, Subject, UnixGroups, UnknownAction, Verdict};

use crate::{
    Host,
    caller::{Caller, Outcome, Piece},
    clock::{now_ms, seconds},
    dmesg,
    hypervisor::{Change, Facts, Judge, NewDomain, Target, XmlJudge},
};

/// Rows in one frame: with the longest names they still fit it.
const ROWS_A_FRAME: usize = 100;
/// Bytes of domains' rows in one frame, which their owners and labels could make longer than it can be.
const ROW_BYTES_A_FRAME: usize = 64 * 1024;
/// Bytes of text in one frame.
const TEXT_A_FRAME: usize = 32 * 1024;
/// Domains that `whoami` looks at to tell what may be done to some of them.
const LOOKED_AT: usize = 50;
/// Pieces of a log that wait for the connection.
const LOG_AHEAD: usize = 16;

/// What a call has to work with.
pub(crate) struct Work {
    pub(crate) caller: Caller,
    /// What the verdict rested on, where the request is about a domain.
    pub(crate) facts: Option<Facts>,
    pub(crate) deadline: Instant,
    pub(crate) id: Uuid,
    pub(crate) hypervisor: Option<String>,
    pub(crate) outbox: mpsc::Sender<Piece>,
    pub(crate) host: Arc<Host>,
}

/// Carries out what was granted.
pub(crate) async fn perform(grant: Grant, request: Request, work: Work) -> Outcome {
    if grant.action() != Action::Verb(request.verb())
        || grant.domain().map(|(uuid, _)| uuid) != work.facts.as_ref().map(|facts| facts.uuid)
    {
        return Err(Fault::new(
            Code::Internal,
            "the grant is for something else",
        ));
    }
    let host = Arc::clone(&work.host);
    let hypervisors = &host.hypervisors;
    let deadline = work.deadline;
    let hypervisor = work.hypervisor.as_deref();
    match request {
        Request::Whoami(_) => Ok(Reply::Whoami(whoami(&grant, &work))),
        Request::List(list) => send_rows(&list, &work).await,
        Request::Info(_) => Ok(Reply::Info(info(&grant, &work))),
        Request::Dmesg(dmesg) => messages(&dmesg, &work).await,
        Request::Describe(describe) => {
            let xml = hypervisors
                .describe(
                    work.target(Verb::Describe)?,
                    describe.inactive,
                    false,
                    deadline,
                )
                .await?;
            work.send_text(&xml).await
        }
        Request::DescribeSecrets(describe) => {
            let xml = hypervisors
                .describe(
                    work.target(Verb::DescribeSecrets)?,
                    describe.inactive,
                    true,
                    deadline,
                )
                .await?;
            work.send_text(&xml).await
        }
        Request::Create(create) => {
            let judge = work.xml_judge(Verb::Create);
            hypervisors
                .create(
                    hypervisor,
                    create.xml,
                    create.define,
                    create.paused,
                    judge,
                    deadline,
                )
                .await
                .map(Reply::Domain)
        }
        Request::Define(define) => {
            let judge = work.xml_judge(Verb::Define);
            hypervisors
                .define(hypervisor, define.xml, define.replaces, judge, deadline)
                .await
                .map(Reply::Domain)
        }
        Request::Undefine(undefine) => {
            let target = work.target(Verb::Undefine)?;
            let (name, uuid) = (target.facts.name.clone(), target.facts.uuid);
            hypervisors
                .undefine(
                    target,
                    undefine.discard_saved,
                    undefine.discard_nvram,
                    deadline,
                )
                .await?;
            Ok(Reply::Gone { name, uuid })
        }
        Request::Start(start) => hypervisors
            .start_domain(work.target(Verb::Start)?, start.paused, deadline)
            .await
            .map(Reply::Domain),
        Request::Destroy(_) => hypervisors
            .destroy(work.target(Verb::Destroy)?, deadline)
            .await
            .map(Reply::Domain),
        Request::Reboot(Ask { wait, force, .. }) => hypervisors
            .reboot(work.target_by(Verb::Reboot, force)?, wait, force, deadline)
            .await
            .map(Reply::Domain),
        Request::Shutdown(Ask { wait, force, .. }) => hypervisors
            .shutdown(
                work.target_by(Verb::Shutdown, force)?,
                wait,
                force,
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Pause(_) => hypervisors
            .pause(work.target(Verb::Pause)?, deadline)
            .await
            .map(Reply::Domain),
        Request::Unpause(_) => hypervisors
            .unpause(work.target(Verb::Unpause)?, deadline)
            .await
            .map(Reply::Domain),
        Request::MemSet(set) => {
            let domain = hypervisors
                .mem_set(work.target(Verb::MemSet)?, &set, deadline)
                .await?;
            Ok(Reply::Memory {
                domain,
                asked_kib: set.kib,
            })
        }
        Request::VcpuSet(set) => hypervisors
            .vcpu_set(work.target(Verb::VcpuSet)?, &set, deadline)
            .await
            .map(Reply::Domain),
        Request::Migrate(migrate) => move_away(migrate, &work).await.map(Reply::Job),
        Request::MigrateAbort(_) => hypervisors
            .migrate_abort(work.target(Verb::MigrateAbort)?, deadline)
            .await
            .map(|()| Reply::Done),
        Request::JobList(_) => {
            let jobs = host
                .jobs
                .all(&host.store)
                .await
                .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
            let jobs: Vec<Item> = jobs
                .into_iter()
                .filter(|job| may_see(&grant, &work, Verb::JobList, job))
                .map(Item::Job)
                .collect();
            for piece in jobs.chunks(ROWS_A_FRAME) {
                work.send(Piece::Items(piece.to_vec())).await?;
            }
            Ok(Reply::Done)
        }
        Request::JobWait(on) => follow_job(&grant, on.job, &work).await.map(Reply::Job),
        Request::JobCancel(on) => match host.jobs.find(on.job) {
            Some(job) if may_see(&grant, &work, Verb::JobCancel, &job.row) => {
                let target = Target {
                    // A job is its beginner's, whatever has become of the domain since.
                    judge: if is_beginner(&work, &job.row) {
                        Arc::new(|_| Ok(()))
                    } else {
                        work.judge(Verb::JobCancel)
                    },
                    facts: job.facts,
                };
                hypervisors
                    .migrate_abort(target, deadline)
                    .await
                    .map(|()| Reply::Done)
            }
            Some(_) | None => Err(no_such_job(on.job)),
        },
        Request::Owner(set) => hypervisors
            .set_metadata(
                work.target(Verb::Owner)?,
                Change::Owners {
                    add: set.add,
                    remove: set.remove,
                },
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Label(set) => hypervisors
            .set_metadata(
                work.target(Verb::Label)?,
                Change::Labels {
                    set: set.set,
                    remove: set.remove,
                },
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Class(set) => hypervisors
            .set_metadata(
                work.target(Verb::Class)?,
                Change::Class(set.class),
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Explain(explain) => {
            let person = Arc::clone(&work.caller.person);
            explained(&explain.action, &explain.about, person, &work).await
        }
        Request::ExplainOther(explain) => {
            let person = Arc::new(host.people.find(&explain.principal).await);
            explained(&explain.action, &explain.about, person, &work).await
        }
    }
}

/// Whether a request pulls the plug or resets, which takes the right to `destroy` beside that to its verb.
pub(crate) fn is_forced(request: &Request) -> bool {
    matches!(
        request,
        Request::Reboot(Ask { force: true, .. }) | Request::Shutdown(Ask { force: true, .. })
    )
}

/// Returns the arguments that matter, as the audit shows them. XML is named by its size: it can hold secrets.
pub(crate) fn arguments(request: &Request) -> String {
    let flag = |name: &'static str, on: bool| if on { name } else { "" };
    let words = match request {
        Request::Whoami(_)
        | Request::Info(_)
        | Request::JobList(_)
        | Request::Destroy(_)
        | Request::Pause(_)
        | Request::Unpause(_)
        | Request::MigrateAbort(_) => vec![],
        Request::List(list) => {
            let states: Vec<_> = list.states.iter().map(|state| state.name()).collect();
            vec![list.patterns.join(" "), states.join(",")]
        }
        Request::Dmesg(dmesg) => vec![flag("follow", dmesg.follow).to_owned()],
        Request::Describe(describe) | Request::DescribeSecrets(describe) => {
            vec![flag("inactive", describe.inactive).to_owned()]
        }
        Request::Create(create) => {
            vec![
                format!("xml={}B", create.xml.len()),
                flag("define", create.define).to_owned(),
                flag("paused", create.paused).to_owned(),
            ]
        }
        Request::Define(define) => {
            vec![
                format!("xml={}B", define.xml.len()),
                flag("replaces", define.replaces.is_some()).to_owned(),
            ]
        }
        Request::Undefine(undefine) => vec![
            flag("discard-saved", undefine.discard_saved).to_owned(),
            flag("discard-nvram", undefine.discard_nvram).to_owned(),
        ],
        Request::Start(start) => vec![flag("paused", start.paused).to_owned()],
        Request::Reboot(ask) | Request::Shutdown(ask) => vec![
            flag("wait", ask.wait).to_owned(),
            flag("force", ask.force).to_owned(),
        ],
        Request::MemSet(set) => {
            vec![
                format!("{}KiB", set.kib),
                flag("config", set.config).to_owned(),
                flag("max", set.maximum).to_owned(),
            ]
        }
        Request::VcpuSet(set) => {
            vec![
                set.count.to_string(),
                flag("config", set.config).to_owned(),
                flag("max", set.maximum).to_owned(),
            ]
        }
        Request::Migrate(migrate) => vec![
            format!("to={}", migrate.destination),
            migrate
                .bandwidth
                .map(|mib| format!("bandwidth={mib}MiB/s"))
                .unwrap_or_default(),
            migrate
                .downtime_ms
                .map(|ms| format!("downtime={ms}ms"))
                .unwrap_or_default(),
        ],
        Request::JobWait(on) | Request::JobCancel(on) => vec![format!("job={}", on.job)],
        Request::Owner(set) => {
            let added = set.add.iter().map(|owner| format!("+{owner}"));
            let removed = set.remove.iter().map(|owner| format!("-{owner}"));
            added.chain(removed).collect()
        }
        Request::Label(set) => {
            let set_to = set
                .set
                .iter()
                .map(|(name, value)| format!("{name}={value}"));
            let removed = set.remove.iter().map(|name| format!("{name}-"));
            set_to.chain(removed).collect()
        }
        Request::Class(set) => vec![
            set.class
                .as_ref()
                .map_or("none".to_owned(), |class| format!("class={class}")),
        ],
        Request::Explain(explain) => vec![explain.action.clone(), explain.about.to_string()],
        Request::ExplainOther(explain) => vec![
            explain.principal.to_string(),
            explain.action.clone(),
            explain.about.to_string(),
        ],
    };
    words
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ")
}

impl Work {
    /// The domain that was judged, with the question to ask again in its lane if it is no longer what it was.
    fn target(&self, verb: Verb) -> Result<Target, Fault> {
        match &self.facts {
            Some(facts) => Ok(Target {
                facts: facts.clone(),
                judge: self.judge(verb),
            }),
            None => Err(Fault::new(
                Code::Internal,
                "a verb on a domain came without one",
            )),
        }
    }

    /// As [`Work::target`], for a verb that with force also does what `destroy` does.
    fn target_by(&self, verb: Verb, force: bool) -> Result<Target, Fault> {
        let target = self.target(verb)?;
        if !force {
            return Ok(target);
        }
        let (asked, plug) = (target.judge, self.judge(Verb::Destroy));
        Ok(Target {
            judge: Arc::new(move |facts| asked(facts).and_then(|()| plug(facts))),
            ..target
        })
    }

    fn judge(&self, verb: Verb) -> Judge {
        let (host, caller) = (Arc::clone(&self.host), self.caller.clone());
        Arc::new(move |facts| ask_again(&host, &caller, verb, Subject::Domain(facts.into())))
    }

    fn xml_judge(&self, verb: Verb) -> XmlJudge {
        let (host, caller) = (Arc::clone(&self.host), self.caller.clone());
        Arc::new(move |new: &NewDomain, existing: Option<&Facts>| {
            let made = Subject::NewDomain {
                name: &new.name,
                uuid: new.uuid,
            };
            ask_again(&host, &caller, verb, made)?;
            if let Some(facts) = existing {
                ask_again(&host, &caller, verb, Subject::Domain(facts.into()))?;
                return Ok(None);
            }
            let owns = matches!(host.may(&caller, Action::Own, made), Verdict::Allow(_));
            Ok(owns.then(|| caller.person.principal.clone()))
        })
    }

    async fn send(&self, piece: Piece) -> Result<(), Fault> {
        self.outbox
            .send(piece)
            .await
            .map_err(|_| Fault::new(Code::Unavailable, "the caller is gone"))
    }

    async fn send_text(&self, text: &str) -> Outcome {
        let mut rest = text;
        while !rest.is_empty() {
            let mut end = rest.len().min(TEXT_A_FRAME);
            while !rest.is_char_boundary(end) {
                end -= 1;
            }
            let (piece, tail) = rest.split_at(end);
            self.send(Piece::Items(vec![Item::Text(piece.to_owned())]))
                .await?;
            rest = tail;
        }
        Ok(Reply::Done)
    }
}

fn ask_again(
    host: &Host,
    caller: &Caller,
    action: impl Into<Action>,
    on: Subject<'_>,
) -> Result<(), Fault> {
    host.reread_policy();
    match host.may(caller, action, on) {
        Verdict::Allow(_) => Ok(()),
        Verdict::Deny(_) => Err(Fault::denied()),
    }
}

/// Tells what the caller may do on the host, on any domain that it does not own, or on one of those it sees.
fn whoami(grant: &Grant, work: &Work) -> Identity {
    let (host, caller) = (&work.host, &work.caller);
    let mut verbs = host.may_some(caller, Verb::ALL, &[Subject::Host, Subject::UnknownDomain]);
    let others: Vec<Verb> = Verb::ALL
        .iter()
        .copied()
        .filter(|verb| !verbs.contains(verb))
        .collect();
    if !others.is_empty() {
        let seen = host.visible(caller);
        let some: Vec<_> = seen
            .iter()
            .take(LOOKED_AT)
            .map(|(facts, _)| Subject::Domain(facts.into()))
            .collect();
        verbs.extend(host.may_some(caller, &others, &some));
        verbs.sort();
    }
    Identity {
        principal: caller.person.principal.clone(),
        until: seconds(caller.until),
        verbs: verbs.iter().map(ToString::to_string).collect(),
        rule: grant.rule().to_owned(),
        groups: match &caller.person.unix_groups {
            UnixGroups::Known(groups) => groups.clone(),
            UnixGroups::Unasked | UnixGroups::Unknown(_) => Vec::new(),
        },
        acting: caller.acting().cloned(),
        session: caller.session.clone(),
    }
}

/// Explains what somebody may do, as far as who asks may see the domain.
async fn explained(action: &str, about: &About, person: Arc<Person>, work: &Work) -> Outcome {
    let action: Action = action
        .parse()
        .map_err(|error: UnknownAction| Fault::new(Code::BadRequest, error.to_string()))?;
    let host = &work.host;
    let (mut facts, mut other) = (None, None);
    match about {
        About::Host => {}
        About::Domain(domain) => {
            let found = host.hypervisors.find(domain, work.hypervisor.as_deref());
            facts = found.filter(|facts| {
                let seen = host.may(&work.caller, Verb::List, Subject::Domain(facts.into()));
                matches!(seen, Verdict::Allow(_))
            });
        }
        About::Person(principal) => other = Some(host.people.find(principal).await),
    }
    let on = match (&facts, &other) {
        (Some(facts), _) => Subject::Domain(facts.into()),
        (None, Some(other)) => Subject::Person(other),
        (None, None) if *about == About::Host && is_about_the_host(action) => Subject::Host,
        (None, None) => Subject::UnknownDomain,
    };
    if (action == Action::ActFor) != other.is_some() {
        return Err(Fault::new(
            Code::BadRequest,
            "act-for is about a person, and everything else about a domain or the host",
        ));
    }
    let explanation = host.explain(&person, action, on, &about.to_string(), &work.caller);
    Ok(Reply::Explained(explanation))
}

/// Whether an action that names no domain is about the host; the others are then about a domain that is nobody's.
fn is_about_the_host(action: Action) -> bool {
    match action {
        Action::Verb(
            Verb::Whoami
            | Verb::List
            | Verb::Info
            | Verb::Dmesg
            | Verb::Create
            | Verb::Define
            | Verb::JobList
            | Verb::JobWait
            | Verb::JobCancel
            | Verb::Explain
            | Verb::ExplainOther,
        ) => true,
        Action::Verb(
            Verb::Describe
            | Verb::DescribeSecrets
            | Verb::Undefine
            | Verb::Start
            | Verb::Destroy
            | Verb::Reboot
            | Verb::Shutdown
            | Verb::Pause
            | Verb::Unpause
            | Verb::MemSet
            | Verb::VcpuSet
            | Verb::Migrate
            | Verb::MigrateAbort
            | Verb::Owner
            | Verb::Label
            | Verb::Class,
        )
        | Action::Own
        | Action::ActFor => false,
    }
}

/// What is said of the host; of its domains only those count that the caller may see.
fn info(grant: &Grant, work: &Work) -> HostInfo {
    let info = work.host.hypervisors.info();
    if grant.administrator() {
        return info;
    }
    let seen = work.host.visible(&work.caller);
    let active = || {
        seen.iter()
            .map(|(_, row)| row)
            .filter(|row| row.state.is_active())
    };
    HostInfo {
        domains: count(seen.len()),
        active: count(active().count()),
        used_vcpus: active().fold(0, |sum, row| sum.saturating_add(row.vcpus)),
        used_memory_kib: active().fold(0, |sum, row| sum.saturating_add(row.memory_kib)),
        ..info
    }
}

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

async fn send_rows(list: &List, work: &Work) -> Outcome {
    let wanted = Wanted::new(list)?;
    // An empty answer would be taken for a host without domains.
    if let Some(why) = work.host.hypervisors.unread(work.hypervisor.as_deref()) {
        return Err(Fault::new(
            Code::Unavailable,
            format!("nothing is known of the domains yet: {why}"),
        ));
    }
    let mut rows = work
        .host
        .visible(&work.caller)
        .into_iter()
        .map(|(_, row)| row)
        .filter(|row| {
            work.hypervisor
                .as_ref()
                .is_none_or(|uri| *uri == row.hypervisor)
                && wanted.takes(row)
        })
        .peekable();
    while rows.peek().is_some() {
        let frame = next_frame(&mut rows).into_iter().map(Item::Domain);
        work.send(Piece::Items(frame.collect())).await?;
    }
    Ok(Reply::Done)
}

/// Takes as many rows as one frame holds, and at least one.
fn next_frame(rows: &mut Peekable<impl Iterator<Item = DomainRow>>) -> Vec<DomainRow> {
    let mut frame = Vec::new();
    let mut bytes = 0;
    while let Some(row) = rows.next_if(|row| {
        bytes += codec::encode(row).map_or(0, |encoded| encoded.len());
        frame.is_empty() || (frame.len() < ROWS_A_FRAME && bytes <= ROW_BYTES_A_FRAME)
    }) {
        frame.push(row);
    }
    frame
}

/// The filter of a list.
struct Wanted<'a> {
    patterns: Vec<Pattern>,
    uuids: Vec<Uuid>,
    list: &'a List,
}

impl<'a> Wanted<'a> {
    fn new(list: &'a List) -> Result<Self, Fault> {
        let mut patterns = Vec::new();
        let mut uuids = Vec::new();
        for text in &list.patterns {
            match Uuid::try_parse(text) {
                Ok(uuid) => uuids.push(uuid),
                Err(_) => patterns.push(Pattern::new(text).map_err(|error| {
                    Fault::new(Code::BadRequest, format!("'{text}' is no pattern: {error}"))
                })?),
            }
        }
        Ok(Self {
            patterns,
            uuids,
            list,
        })
    }

    fn takes(&self, row: &DomainRow) -> bool {
        let by_name = self.list.patterns.is_empty()
            || self.uuids.contains(&row.uuid)
            || self
                .patterns
                .iter()
                .any(|pattern| pattern.matches(row.name.as_str()));
        by_name && (self.list.states.is_empty() || self.list.states.contains(&row.state))
    }
}

async fn messages(asked: &Dmesg, work: &Work) -> Outcome {
    let follow = asked.follow;
    let (pieces, mut incoming) = mpsc::channel::<Result<String, Fault>>(LOG_AHEAD);
    // Owns the receiver: when the caller is gone the reader has nobody to read for, and ends.
    let sending = async move {
        while let Some(piece) = incoming.recv().await {
            let piece = piece?;
            work.send_text(&piece).await?;
        }
        Ok(Reply::Done)
    };
    let hypervisor = work
        .hypervisor
        .as_ref()
        .or(work.host.config.hypervisors.first());
    let ((), sent) = match &work.facts {
        Some(facts) => tokio::join!(dmesg::file(log_file(facts, work)?, pieces, follow), sending),
        None if hypervisor.is_some_and(|uri| uri.starts_with("xen")) => {
            tokio::join!(dmesg::xen(pieces, follow), sending)
        }
        None => tokio::join!(dmesg::kernel(pieces, follow), sending),
    };
    sent
}

fn log_file(facts: &Facts, work: &Work) -> Result<PathBuf, Fault> {
    work.host.hypervisors.log_file(facts).ok_or_else(|| {
        Fault::new(
            Code::Unsupported,
            format!(
                "the hypervisor of '{}' keeps no log of its own for it",
                facts.name
            ),
        )
    })
}

async fn move_away(migrate: Migrate, work: &Work) -> Result<JobRow, Fault> {
    let host = &work.host;
    let target = work.target(Verb::Migrate)?;
    let uri = host.config.migration_uri(&migrate.destination).ok_or_else(|| {
        let there = &migrate.destination;
        Fault::new(Code::Refused, format!("{there} is no migration peer of this host; its administrator lists peers in [migration] of xmand.toml"))
    })?;
    let facts = target.facts.clone();
    let row = JobRow {
        id: work.id,
        principal: work.caller.person.principal.clone(),
        verb: Verb::Migrate.to_string(),
        domain: facts.name.clone(),
        uuid: facts.uuid,
        detail: format!("to {}", migrate.destination),
        state: JobState::Running,
        result: String::new(),
        began_ms: now_ms(),
        ended_ms: None,
        progress: None,
    };
    let moved = host.jobs.run(&host.store, row, facts, |progress| async {
        let watched = progress.subscribe();
        let moving = host.hypervisors.migrate(
            target,
            uri,
            migrate.bandwidth,
            migrate.downtime_ms,
            progress,
        );
        tokio::pin!(moving);
        tokio::select! {
            moved = &mut moving => moved,
            () = pass_on(watched, work) => moving.await,
        }
    });
    moved.await
}

/// Sends progress as long as somebody listens; a caller that hung up is not waited for.
async fn pass_on(mut progress: watch::Receiver<Option<Progress>>, work: &Work) {
    while progress.changed().await.is_ok() {
        let now = progress.borrow_and_update().clone();
        if let Some(now) = now
            && let Err(mpsc::error::TrySendError::Closed(_)) =
                work.outbox.try_send(Piece::Progress(now))
        {
            return;
        }
    }
}

async fn follow_job(grant: &Grant, id: Uuid, work: &Work) -> Result<JobRow, Fault> {
    let host = &work.host;
    let may_see = |job: &JobRow| may_see(grant, work, Verb::JobWait, job);
    if let Some(mut job) = host.jobs.find(id).filter(|job| may_see(&job.row)) {
        let is_own = is_beginner(work, &job.row);
        let right_ends = async {
            if is_own || grant.administrator() {
                std::future::pending::<()>().await;
            }
            host.right_ends(&work.caller, Verb::JobWait, Some(&job.facts))
                .await
        };
        let ended = tokio::select! {
            ended = job.ended.wait_for(Option::is_some) => ended.ok().and_then(|row| row.clone()),
            () = async { pass_on(job.progress, work).await; std::future::pending().await } => None,
            why = right_ends => return Err(why),
        };
        if let Some(row) = ended {
            return Ok(row);
        }
    }
    let jobs = host
        .jobs
        .all(&host.store)
        .await
        .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
    jobs.into_iter()
        .find(|job| job.id == id && may_see(job))
        .ok_or_else(|| no_such_job(id))
}

/// A job is its beginner's, the administrators', and theirs who may do the verb to its domain.
fn may_see(grant: &Grant, work: &Work, verb: Verb, job: &JobRow) -> bool {
    let may = || {
        let facts = work
            .host
            .hypervisors
            .find(&DomainRef::Uuid(job.uuid), None)?;
        let verdict = work
            .host
            .may(&work.caller, verb, Subject::Domain((&facts).into()));
        matches!(verdict, Verdict::Allow(_)).then_some(())
    };
    grant.administrator() || is_beginner(work, job) || may().is_some()
}

fn is_beginner(work: &Work, job: &JobRow) -> bool {
    job.principal == work.caller.person.principal
}

fn no_such_job(id: Uuid) -> Fault {
    Fault::new(
        Code::NotFound,
        format!("there is no job {id} here that is yours; `rxm job list` shows those there are"),
    )
}

#[cfg(test)]
mod tests {
    use xman_common::{
        protocol::{DomainState, MAX_METADATA, Metadata},
        wire::MAX_SEALED,
    };

    use super::*;

    #[test]
    fn rows_fit_their_frames_whatever_labels_they_have() {
        let heavy = Metadata {
            labels: (0..MAX_METADATA / 4)
                .map(|n| (format!("{n:03x}").parse().unwrap(), "x".parse().unwrap()))
                .collect(),
            ..Metadata::default()
        };
        assert_eq!(heavy.size(), MAX_METADATA);
        let row = |n: u128| DomainRow {
            name: format!("grid-{n}").parse().unwrap(),
            uuid: Uuid::from_u128(n),
            hypervisor: "qemu:///system".to_owned(),
            id: None,
            state: DomainState::Off,
            reason: String::new(),
            memory_kib: 0,
            max_memory_kib: 0,
            vcpus: 1,
            max_vcpus: 1,
            cpu_time_ns: 0,
            autostart: false,
            persistent: true,
            metadata: if n.is_multiple_of(2) {
                heavy.clone()
            } else {
                Metadata::default()
            },
            metadata_trouble: String::new(),
            age_ms: 0,
            stale: false,
        };
        let mut rows = (0..500).map(row).peekable();
        let mut seen = 0;
        while rows.peek().is_some() {
            let frame = next_frame(&mut rows);
            seen += frame.len();
            assert!((1..=ROWS_A_FRAME).contains(&frame.len()));
            let items = frame.into_iter().map(Item::Domain).collect::<Vec<_>>();
            assert!(codec::encode(&items).unwrap().len() < MAX_SEALED / 2 + 1024);
        }
        assert_eq!(seen, 500);
        let mut light = (0..250).map(|n| row(2 * n + 1)).peekable();
        assert_eq!(next_frame(&mut light).len(), ROWS_A_FRAME);
    }
}
