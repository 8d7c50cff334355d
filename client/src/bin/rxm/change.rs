//! The verbs that change domains: found, asked about where many are meant, carried out on all hosts at once, told in order.

use std::{
    collections::HashMap,
    ops::ControlFlow,
    sync::{Mutex, PoisonError},
};

use serde_json::{Value, json};
use uuid::Uuid;
use xman_client::{Address, Caller, Event, Explanation, Wait, fleet};
use xman_common::{
    name::DomainRef,
    protocol::{
        About, Ask, Attached, Autostart, Code, DomainRow, Explain, JobRow, MemSet, OnDomain,
        Rename, Reply, Request, Start, Undefine, Unpause, VcpuSet, Verb, Whoami,
    },
};

use crate::{
    args::{
        AskArgs, AutostartArgs, DomainsArgs, Format, MemSetArgs, RenameArgs, StartArgs, Switch,
        UndefineArgs, UnpauseArgs, VcpuSetArgs,
    },
    ask,
    exit::Tally,
    holds,
    job::goes_on,
    output::{Complaints, error_value, named},
    setting::{Setting, Stop, misfit},
    show::{domain_value, job_value},
    status::status_value,
    tags::{labels, owners},
    target::{self, Found, Purpose, Target, Wanted},
    units::size,
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
    pub(crate) fn with(self, also: Verb) -> Self {
        Self {
            also: Some(also),
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

/// `rxm start`
pub(crate) async fn start(setting: &Setting, args: StartArgs) -> Result<Tally, Stop> {
    let paused = args.paused;
    let past = if paused { "started, paused" } else { "started" };
    let request = &|domain| Request::Start(Start { domain, paused });
    carry_out(
        setting,
        &args.domains.domains,
        Deed::new(Verb::Start, past, request),
    )
    .await
}

/// `rxm undefine`
pub(crate) async fn undefine(setting: &Setting, args: UndefineArgs) -> Result<Tally, Stop> {
    let UndefineArgs {
        domains,
        discard_saved,
        discard_nvram,
    } = args;
    let request = &|domain| {
        Request::Undefine(Undefine {
            domain,
            discard_saved,
            discard_nvram,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed::new(Verb::Undefine, "undefined", request),
    )
    .await
}

/// `rxm destroy`
pub(crate) async fn destroy(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Destroy(OnDomain { domain });
    carry_out(
        setting,
        &args.domains,
        Deed::new(Verb::Destroy, "destroyed", request),
    )
    .await
}

/// `rxm pause`
pub(crate) async fn pause(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Pause(OnDomain { domain });
    carry_out(
        setting,
        &args.domains,
        Deed::new(Verb::Pause, "paused", request),
    )
    .await
}

/// `rxm unpause`
pub(crate) async fn unpause(setting: &Setting, args: UnpauseArgs) -> Result<Tally, Stop> {
    let UnpauseArgs { domains, force } = args;
    let warning = force.then(|| {
        "where the other host of its last journey has not said that it does not run there, it runs here all the same: make sure that it does not run there"
            .to_owned()
    });
    let request = &|domain| Request::Unpause(Unpause { domain, force });
    carry_out(
        setting,
        &domains.domains,
        Deed {
            also: force.then_some(Verb::Destroy),
            ..Deed::new(Verb::Unpause, "runs on", request).warning(warning)
        },
    )
    .await
}

/// `rxm shutdown`
pub(crate) async fn shutdown(setting: &Setting, args: AskArgs) -> Result<Tally, Stop> {
    let AskArgs {
        domains,
        wait,
        force,
    } = args;
    let seconds = setting.patience.timeout.as_secs_f32();
    let warning = force.then(|| format!("each guest is asked to shut down; if it has not gone within {seconds} s its plug is pulled"));
    let past = if wait || force {
        "shut down"
    } else {
        "asked to shut down"
    };
    let request = &|domain| {
        Request::Shutdown(Ask {
            domain,
            wait,
            force,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed {
            also: force.then_some(Verb::Destroy),
            ..Deed::new(Verb::Shutdown, past, request).warning(warning)
        },
    )
    .await
}

/// `rxm reboot`
pub(crate) async fn reboot(setting: &Setting, args: AskArgs) -> Result<Tally, Stop> {
    let AskArgs {
        domains,
        wait,
        force,
    } = args;
    let warning = force
        .then(|| "no guest is asked: it is reset at once, as if by its reset button".to_owned());
    let past = match (wait, force) {
        (_, true) => "reset",
        (true, false) => "rebooted",
        (false, false) => "asked to reboot",
    };
    let request = &|domain| {
        Request::Reboot(Ask {
            domain,
            wait,
            force,
        })
    };
    carry_out(
        setting,
        &domains.domains,
        Deed {
            also: force.then_some(Verb::Destroy),
            ..Deed::new(Verb::Reboot, past, request).warning(warning)
        },
    )
    .await
}

/// `rxm reset`
pub(crate) async fn reset(setting: &Setting, args: DomainsArgs) -> Result<Tally, Stop> {
    let request = &|domain| Request::Reset(OnDomain { domain });
    let deed = Deed::new(Verb::Reset, "reset", request).with(Verb::Destroy);
    carry_out(setting, &args.domains, deed).await
}

/// `rxm autostart`
pub(crate) async fn autostart(setting: &Setting, args: AutostartArgs) -> Result<Tally, Stop> {
    let on = args.switch == Switch::On;
    let past = if on {
        "starts with its host"
    } else {
        "does not start with its host"
    };
    let request = &|domain| Request::Autostart(Autostart { domain, on });
    carry_out(
        setting,
        &args.domains.domains,
        Deed::new(Verb::Autostart, past, request),
    )
    .await
}

/// `rxm rename`
pub(crate) async fn rename(setting: &Setting, args: RenameArgs) -> Result<Tally, Stop> {
    let RenameArgs { domain, name } = args;
    let past = format!("that is what {domain} is called now");
    let request = &|domain| {
        Request::Rename(Rename {
            domain,
            name: name.clone(),
        })
    };
    carry_out(
        setting,
        std::slice::from_ref(&domain),
        Deed::new(Verb::Rename, &past, request),
    )
    .await
}

/// `rxm mem-set`
pub(crate) async fn mem_set(setting: &Setting, args: MemSetArgs) -> Result<Tally, Stop> {
    let MemSetArgs {
        domain,
        kib,
        config,
        max,
    } = args;
    let past = if max {
        format!("can have {} of memory from its next start on", size(kib))
    } else {
        format!("has {}", size(kib))
    };
    let request = &|domain| {
        Request::MemSet(MemSet {
            domain,
            kib,
            config,
            maximum: max,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::MemSet, &past, request)).await
}

/// `rxm vcpu-set`
pub(crate) async fn vcpu_set(setting: &Setting, args: VcpuSetArgs) -> Result<Tally, Stop> {
    let VcpuSetArgs {
        domain,
        count,
        config,
        max,
    } = args;
    let cpus = if count == 1 {
        "1 virtual CPU".to_owned()
    } else {
        format!("{count} virtual CPUs")
    };
    let past = if max {
        format!("can have {cpus} from its next start on")
    } else {
        format!("has {cpus}")
    };
    let request = &|domain| {
        Request::VcpuSet(VcpuSet {
            domain,
            count,
            config,
            maximum: max,
        })
    };
    carry_out(setting, &[domain], Deed::new(Verb::VcpuSet, &past, request)).await
}

/// `rxm migrate --abort`
pub(crate) async fn abort_migration(setting: &Setting, domain: String) -> Result<Tally, Stop> {
    let request = &|domain| Request::MigrateAbort(OnDomain { domain });
    let past = "its migration is given up; it stays where it was";
    carry_out(
        setting,
        &[domain],
        Deed::new(Verb::MigrateAbort, past, request),
    )
    .await
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

/// Returns what is done, as it is said before a domain's name.
fn infinitive(verb: Verb) -> &'static str {
    const OTHERWISE: [(Verb, &str); 15] = [
        (Verb::Attach, "attach a device to"),
        (Verb::Detach, "detach a device from"),
        (Verb::Owner, "change the owners of"),
        (Verb::Label, "change the labels of"),
        (Verb::Class, "change the class of"),
        (Verb::Autostart, "change the start with the host of"),
        (Verb::SaveTo, "save"),
        (Verb::RestoreFrom, "restore"),
        (Verb::DiscardSaved, "throw away the saved memory of"),
        (Verb::DiscardImage, "throw away"),
        (Verb::LeaseBegin, "begin a job in"),
        (Verb::LeaseEnd, "end"),
        (Verb::Resume, "let go of"),
        (Verb::Reconcile, "end"),
        (Verb::Maintenance, "change the maintenance of"),
    ];
    OTHERWISE
        .iter()
        .find(|(known, _)| *known == verb)
        .map_or_else(|| verb.name(), |(_, words)| words)
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

/// Tells what came of a change, target after target. What was done is done whether or not it can be printed.
pub(crate) struct Told<'a> {
    setting: &'a Setting,
    verb: Verb,
    with_host: bool,
    tally: Tally,
    complaints: Complaints,
    values: Vec<Value>,
    unprinted: Option<Stop>,
}

impl<'a> Told<'a> {
    pub(crate) fn new(setting: &'a Setting, verb: Verb, with_host: bool) -> Self {
        Self {
            setting,
            verb,
            with_host,
            tally: Tally::default(),
            complaints: Complaints::default(),
            values: Vec::new(),
            unprinted: None,
        }
    }

    /// What is told from now on is about another verb.
    pub(crate) fn of(&mut self, verb: Verb) -> &mut Self {
        self.verb = verb;
        self
    }

    /// A host that could not be asked which domains it has.
    pub(crate) fn silent(&mut self, host: &Address, error: &Explanation) {
        self.tally.failed(error.kind);
        self.complaints.add(host.to_string(), error);
        self.complaints.say(&self.setting.output);
        self.values.push(error_value(host, error));
    }

    /// A host on which nothing could be done, without a domain to name.
    pub(crate) fn failed_on(&mut self, host: &Address, error: Explanation) {
        self.silent(host, &error);
    }

    /// Something was done on a host that is about no domain.
    pub(crate) fn done_on(&mut self, address: &Address, past: &str) {
        self.tally.done();
        self.values
            .push(json!({ "host": address, "verb": self.verb.name() }));
        let printed = match self.setting.output.format {
            Format::Table | Format::Wide => {
                self.setting.output.success(&format!("{address}: {past}"))
            }
            Format::Name | Format::Json | Format::Yaml => Ok(()),
        };
        self.remember(printed.map_err(Stop::from));
    }

    /// Something was done: its value, what is said of it, and the names of what it was done to.
    pub(crate) fn done_with(&mut self, value: Value, said: &[String], names: &[String]) {
        self.tally.done();
        self.value(value);
        let lines = match self.setting.output.format {
            Format::Table | Format::Wide if self.setting.output.wants_notes() => said,
            Format::Name => names,
            Format::Table | Format::Wide | Format::Json | Format::Yaml => &[],
        };
        for line in lines {
            let printed = self.setting.output.line(line);
            self.remember(printed.map_err(Stop::from));
        }
    }

    /// Something was not done, and the host has more to say about it than why.
    pub(crate) fn failed_with(&mut self, value: Value, about: String, error: &Explanation) {
        self.tally.failed(error.kind);
        self.complaints.add(about, error);
        self.complaints.say(&self.setting.output);
        self.value(value);
    }

    fn value(&mut self, mut value: Value) {
        if let Value::Object(fields) = &mut value {
            fields.insert("verb".to_owned(), json!(self.verb.name()));
        }
        self.values.push(value);
    }

    /// A job that goes on alone.
    pub(crate) fn let_go(&mut self, target: &Target, id: Uuid, job: Option<&JobRow>) {
        self.tally.done();
        let address = &target.address;
        self.values.push(job.map_or_else(
            || json!({ "host": address, "id": id }),
            |job| job_value(address, job),
        ));
        if !self.setting.output.is_structured() {
            let printed = self.setting.output.line(&id.to_string());
            self.remember(printed.map_err(Stop::from));
            self.setting.output.note(&goes_on(address, id));
        }
    }

    /// What came of one.
    pub(crate) fn take(
        &mut self,
        target: &Target,
        past: &str,
        outcome: Result<Reply, Explanation>,
    ) {
        match outcome {
            Ok(reply) => self.success(target, past, reply),
            Err(error) => {
                self.tally.failed(error.kind);
                self.complaints.add(target.label(), &error);
                self.complaints.say(&self.setting.output);
                let name = target.row.as_ref().map(|row| row.name.clone());
                let uuid = if let DomainRef::Uuid(uuid) = &target.domain {
                    Some(uuid)
                } else {
                    None
                };
                let mut value = error_value(&target.address, &error);
                if let Value::Object(fields) = &mut value {
                    fields.insert("verb".to_owned(), json!(self.verb.name()));
                    fields.insert("name".to_owned(), json!(name));
                    fields.insert("uuid".to_owned(), json!(uuid));
                }
                self.values.push(value);
            }
        }
    }

    /// What came of a change to a domain that did not exist or had no name before.
    pub(crate) fn success(&mut self, target: &Target, past: &str, reply: Reply) {
        self.tally.done();
        let address = &target.address;
        let mut value = match &reply {
            Reply::Domain(row)
            | Reply::Memory { domain: row, .. }
            | Reply::Attached { domain: row, .. } => domain_value(address, row),
            Reply::Gone { name, uuid } => {
                json!({ "host": address, "name": name, "uuid": uuid, "gone": true })
            }
            Reply::Job(job) => job_value(address, job),
            Reply::Standing(row) => status_value(address, row),
            Reply::Done
            | Reply::Whoami(_)
            | Reply::Info(_)
            | Reply::Explained(_)
            | Reply::Permitted(_)
            | Reply::Lease(_)
            | Reply::Ended(_)
            | Reply::Room(_) => {
                json!({ "host": address })
            }
        };
        if let Value::Object(fields) = &mut value {
            fields.insert("verb".to_owned(), json!(self.verb.name()));
            if let Reply::Attached { device, .. } = &reply {
                fields.insert("device".to_owned(), json!(called(device)));
            }
        }
        self.values.push(value);
        let label = match &reply {
            Reply::Domain(row)
            | Reply::Memory { domain: row, .. }
            | Reply::Attached { domain: row, .. } => {
                format!("{address}/{}", row.name)
            }
            Reply::Gone { name, .. } => format!("{address}/{name}"),
            Reply::Standing(row) => format!("{address}/{}", row.name),
            Reply::Done
            | Reply::Job(_)
            | Reply::Whoami(_)
            | Reply::Info(_)
            | Reply::Explained(_)
            | Reply::Permitted(_)
            | Reply::Lease(_)
            | Reply::Ended(_)
            | Reply::Room(_) => target.label(),
        };
        let printed = match self.setting.output.format {
            Format::Table | Format::Wide => self
                .setting
                .output
                .success(&format!("{label}: {}", sentence(self.verb, past, &reply))),
            Format::Name => {
                let short = label
                    .rsplit_once('/')
                    .map_or(label.as_str(), |(_, name)| name);
                self.setting
                    .output
                    .line(if self.with_host { &label } else { short })
            }
            Format::Json | Format::Yaml => Ok(()),
        };
        self.remember(printed.map_err(Stop::from));
    }

    fn rehearsed(&mut self, target: &Target, allowed: bool) {
        let state = target
            .row
            .as_ref()
            .map(|row| format!(" ({})", row.state))
            .unwrap_or_default();
        self.rehearse_line(
            &target.address,
            &format!("{}{state}", target.label()),
            target.row.as_ref(),
            allowed,
        );
    }

    /// One line of a rehearsal.
    pub(crate) fn rehearse_line(
        &mut self,
        address: &Address,
        what: &str,
        row: Option<&DomainRow>,
        allowed: bool,
    ) {
        if allowed {
            self.tally.done();
        } else {
            self.tally.failed(xman_client::Kind::Refused);
        }
        let verb = self.verb;
        self.values.push(json!({
            "host": address,
            "verb": verb.name(),
            "name": row.map(|row| &row.name),
            "uuid": row.map(|row| row.uuid),
            "state": row.map(|row| row.state.name()),
            "dry_run": true,
            "allowed": allowed,
        }));
        if !self.setting.output.is_structured() {
            let permission = self.setting.permission(allowed);
            let printed = self
                .setting
                .output
                .line(&format!("would {} {what}: {permission}", infinitive(verb)));
            self.remember(printed.map_err(Stop::from));
        }
    }

    fn remember(&mut self, printed: Result<(), Stop>) {
        if let Err(stop) = printed {
            self.unprinted.get_or_insert(stop);
        }
    }

    /// Prints what is printed at the end, and counts.
    pub(crate) fn finish(mut self) -> Result<Tally, Stop> {
        if self.setting.output.is_structured() {
            let values = std::mem::take(&mut self.values);
            let printed = self.setting.output.values(values);
            self.remember(printed.map_err(Stop::from));
        }
        match self.unprinted {
            Some(stop) if self.tally.code() == 0 => Err(stop),
            Some(_) | None => Ok(self.tally),
        }
    }
}

/// What a device is called.
fn called(device: &Attached) -> &str {
    match device {
        Attached::Disk(target) => target.as_str(),
        Attached::Interface(mac) => mac.as_str(),
    }
}

/// What is said of a domain to which something was done.
fn sentence(verb: Verb, past: &str, reply: &Reply) -> String {
    match reply {
        Reply::Domain(row) if verb == Verb::Owner => match owners(row).as_str() {
            "" => "owned by nobody".to_owned(),
            owners => format!("owned by {owners}"),
        },
        Reply::Domain(row) if verb == Verb::Label => match labels(row).as_str() {
            "" => "has no labels".to_owned(),
            labels => format!("labelled {labels}"),
        },
        Reply::Memory { domain, asked_kib }
            if domain.memory_kib != *asked_kib && past.starts_with("has") =>
        {
            format!(
                "asked to go to {}; it has {} so far",
                size(*asked_kib),
                size(domain.memory_kib)
            )
        }
        Reply::Attached { device, .. } => format!("{past} as {}", called(device)),
        Reply::Standing(row) => holds::sentence(verb, row),
        Reply::Memory { .. }
        | Reply::Domain(_)
        | Reply::Gone { .. }
        | Reply::Done
        | Reply::Job(_)
        | Reply::Whoami(_)
        | Reply::Info(_)
        | Reply::Explained(_)
        | Reply::Permitted(_)
        | Reply::Lease(_)
        | Reply::Ended(_)
        | Reply::Room(_) => past.to_owned(),
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
    fn what_is_done_and_was_done_to_owners_and_labels_is_said_in_words() {
        let mut row = DomainRow {
            name: "web".parse().unwrap(),
            uuid: Uuid::nil(),
            hypervisor: String::new(),
            id: None,
            state: xman_common::protocol::DomainState::Off,
            reason: String::new(),
            memory_kib: 0,
            max_memory_kib: 0,
            vcpus: 1,
            max_vcpus: 1,
            cpu_time_ns: 0,
            autostart: false,
            persistent: true,
            saved: false,
            since_ms: None,
            standing: None,
            preempted_ms: 0,
            metadata: xman_common::protocol::Metadata::default(),
            metadata_trouble: String::new(),
            age_ms: 0,
            stale: false,
        };
        let said = |verb, row: &DomainRow| sentence(verb, "paused", &Reply::Domain(row.clone()));
        assert_eq!(said(Verb::Pause, &row), "paused");
        assert_eq!(said(Verb::Owner, &row), "owned by nobody");
        assert_eq!(said(Verb::Label, &row), "has no labels");
        row.metadata.owners = ["bob@R".parse().unwrap()].into();
        row.metadata.labels = [("a".parse().unwrap(), "b".parse().unwrap())].into();
        assert_eq!(said(Verb::Owner, &row), "owned by bob@R");
        assert_eq!(said(Verb::Label, &row), "labelled a=b");
        assert_eq!(infinitive(Verb::Owner), "change the owners of");
        assert_eq!(infinitive(Verb::MemSet), "mem-set");
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
