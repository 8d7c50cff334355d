//! What was asked by whom and what was decided, as the audit shows it.

use std::sync::Arc;

use tokio::time::Instant;
use uuid::Uuid;
use xman_common::protocol::{
    Attached, CallHeader, Code, Device, Fault, Link, OnImage, Reply, Request, SaveTo, Settlement,
    Way,
};
use xman_policy::Grant;

use crate::{
    Host,
    audit::{Kind, Record, quoted},
    caller::{Caller, Outcome},
    config::AuditNeed,
    hypervisor::Facts,
    store::CallKey,
};

/// A call on its way through the audit.
#[derive(Clone)]
pub(crate) struct Asked {
    caller: Caller,
    on_behalf_of: String,
    act_for_rule: String,
    id: Uuid,
    began: Instant,
    hypervisor: String,
    verb: String,
    domain: String,
    uuid: String,
    arguments: String,
    verdict: &'static str,
    rule: String,
}

impl Asked {
    pub(crate) fn new(caller: &Caller, header: &CallHeader, began: Instant) -> Self {
        Self {
            caller: caller.clone(),
            on_behalf_of: header
                .on_behalf_of
                .as_ref()
                .map(ToString::to_string)
                .unwrap_or_default(),
            act_for_rule: String::new(),
            id: header.id,
            began,
            hypervisor: header.hypervisor.clone().unwrap_or_default(),
            verb: format!("#{}", header.verb),
            domain: String::new(),
            uuid: String::new(),
            arguments: String::new(),
            verdict: "none",
            rule: String::new(),
        }
    }

    pub(crate) fn about(self, request: &Request, facts: Option<&Facts>) -> Self {
        let named = || {
            request
                .domain()
                .map(ToString::to_string)
                .unwrap_or_default()
        };
        Self {
            verb: request.verb().name().to_owned(),
            domain: facts.map_or_else(named, |facts| facts.name.to_string()),
            uuid: facts
                .map(|facts| facts.uuid.to_string())
                .unwrap_or_default(),
            hypervisor: facts.map_or(self.hypervisor, |facts| facts.uri.to_string()),
            arguments: arguments(request),
            ..self
        }
    }

    /// From here on the caller acts for somebody else, by this rule.
    pub(crate) fn acting(self, caller: Caller, act_for_rule: String) -> Self {
        Self {
            caller,
            act_for_rule,
            ..self
        }
    }

    pub(crate) fn allowed(self, grant: &Grant) -> Self {
        Self {
            verdict: "allow",
            rule: grant.rule().to_owned(),
            ..self
        }
    }

    pub(crate) fn denied(self, reason: String) -> Self {
        Self {
            verdict: "deny",
            rule: reason,
            ..self
        }
    }

    pub(crate) fn turned_down(self, host: &Host, fault: Fault) -> Outcome {
        let outcome = Err(fault);
        host.audit.note(self.ended(Kind::Call, &outcome));
        outcome
    }

    pub(crate) fn repeated(self, host: &Host, outcome: Outcome) -> Outcome {
        host.audit
            .note(self.ended(Kind::Call, &outcome).with("repeated", "yes"));
        outcome
    }

    /// Writes down that it begins, before it does.
    ///
    /// # Errors
    /// `Unavailable` where that cannot be written down and nothing may go on unrecorded; the end is recorded already.
    pub(crate) async fn begins(&self, host: &Host) -> Result<(), Fault> {
        let Err(unrecorded) = host.audit.write(self.record(Kind::Begin, "begins")).await else {
            return Ok(());
        };
        if host.config.audit == AuditNeed::BestEffort {
            tracing::error!(error = %unrecorded, "a call goes on unrecorded, as configured");
            return Ok(());
        }
        let fault = Fault::new(
            Code::Unavailable,
            format!("nothing was begun: {unrecorded}; tell the host's administrator"),
        );
        host.audit.note(self.ended(Kind::End, &Err(fault.clone())));
        Err(fault)
    }

    pub(crate) fn key(&self) -> CallKey {
        CallKey {
            principal: self.caller.proven.principal.to_string(),
            on_behalf_of: self.on_behalf_of.clone(),
            id: self.id,
        }
    }

    pub(crate) fn record(&self, kind: Kind, what: &str) -> Record {
        let on = if self.domain.is_empty() {
            String::new()
        } else {
            format!(" {}", quoted(&self.domain))
        };
        let rule = match (self.verdict, self.rule.as_str()) {
            (_, "") => String::new(),
            ("deny", reason) => format!(" ({reason})"),
            (_, rule) => format!(" by {rule}"),
        };
        let Self {
            caller,
            verb,
            verdict,
            ..
        } = self;
        let behalf = match self.on_behalf_of.as_str() {
            "" => String::new(),
            other => format!(" for {}", quoted(other)),
        };
        let sentence = format!(
            "{}{behalf} {verb}{on} from {}: {verdict}{rule}; {what}",
            quoted(caller.proven.principal.as_str()),
            caller.address
        );
        caller
            .record(kind, sentence)
            .with("call", self.id.to_string())
            .with("verb", verb)
            .with("domain", &self.domain)
            .with("uuid", &self.uuid)
            .with("hypervisor", &self.hypervisor)
            .with("args", &self.arguments)
            .with("verdict", verdict)
            .with("rule", &self.rule)
            .with("on-behalf-of", &self.on_behalf_of)
            .with("act-for-rule", &self.act_for_rule)
    }

    pub(crate) fn ended(&self, kind: Kind, outcome: &Outcome) -> Record {
        let ms = self.began.elapsed().as_millis();
        let (word, error) = match outcome {
            Ok(_) => ("ok", ""),
            Err(fault) => (fault.code.name(), fault.message.as_str()),
        };
        let what = format!("{word} in {ms} ms");
        let record = match outcome {
            // What came with its XML has its name only now.
            Ok(Reply::Domain(row)) if self.domain.is_empty() => Self {
                domain: row.name.to_string(),
                uuid: row.uuid.to_string(),
                ..self.clone()
            }
            .record(kind, &what),
            _ => self.record(kind, &what),
        };
        record
            .with("outcome", word)
            .with("ms", ms.to_string())
            .with("error", error)
    }
}

/// Records the end of what has begun, also where its session goes away with it.
pub(crate) struct Ending {
    asked: Option<Asked>,
    kind: Kind,
    host: Arc<Host>,
}

impl Ending {
    /// Of what has one record, or of what has had one when it began.
    pub(crate) fn new(asked: Asked, kind: Kind, host: Arc<Host>) -> Self {
        Self {
            asked: Some(asked),
            kind,
            host,
        }
    }

    pub(crate) fn record(mut self, outcome: &Outcome) {
        if let Some(asked) = self.asked.take() {
            self.host.audit.note(asked.ended(self.kind, outcome));
        }
    }
}

impl Drop for Ending {
    fn drop(&mut self) {
        if let Some(asked) = self.asked.take() {
            let left = Err(Fault::new(Code::Busy, "the caller left"));
            self.host.audit.note(asked.ended(self.kind, &left));
        }
    }
}

/// Returns the arguments that matter, as the audit shows them. XML is named by its size: it can hold secrets.
fn arguments(request: &Request) -> String {
    let flag = |name: &'static str, on: bool| if on { name } else { "" };
    let words = match request {
        Request::Whoami(_)
        | Request::Info(_)
        | Request::JobList(_)
        | Request::Destroy(_)
        | Request::Pause(_)
        | Request::Save(_)
        | Request::DiscardSaved(_)
        | Request::Images(_)
        | Request::Reset(_)
        // Who holds a permit may use it: its record is that of `migrate-in`.
        | Request::Carry(_)
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
        Request::Unpause(unpause) => vec![flag("force", unpause.force).to_owned()],
        Request::Start(start) | Request::Restore(start) => {
            vec![flag("paused", start.paused).to_owned()]
        }
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
            flag("direct", migrate.way == Way::Direct).to_owned(),
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
        Request::SaveTo(SaveTo { image, .. })
        | Request::DiscardImage(OnImage { image }) => vec![format!("image={image}")],
        Request::RestoreFrom(restore) => vec![
            format!("image={}", restore.image),
            flag("paused", restore.paused).to_owned(),
        ],
        Request::Autostart(autostart) => {
            vec![if autostart.on { "on" } else { "off" }.to_owned()]
        }
        Request::Rename(rename) => vec![format!("to={}", rename.name)],
        Request::Attach(attach) => vec![
            match &attach.device {
                Device::Disk(disk) => format!("disk={}", disk.source),
                Device::Interface(interface) => match &interface.link {
                    Link::Network(name) => format!("interface=network:{name}"),
                    Link::Bridge(name) => format!("interface=bridge:{name}"),
                },
            },
            flag("config", attach.config).to_owned(),
        ],
        Request::Detach(detach) => vec![
            match &detach.device {
                Attached::Disk(target) => format!("disk={target}"),
                Attached::Interface(mac) => format!("interface={mac}"),
            },
            flag("config", detach.config).to_owned(),
        ],
        Request::Console(console) => vec![flag("force", console.force).to_owned()],
        Request::Events(events) => vec![
            events.patterns.join(" "),
            events
                .since
                .map(|since| format!("since={since}"))
                .unwrap_or_default(),
            flag("follow", events.follow).to_owned(),
        ],
        Request::MigrateIn(migrate) => vec![
            migrate.name.to_string(),
            migrate.uuid.to_string(),
            format!("from={}", migrate.source),
        ],
        Request::Settle(settle) => vec![
            match settle.settlement {
                Settlement::Run => "run",
                Settlement::Keep => "keep",
                Settlement::Drop => "drop",
            }
            .to_owned(),
        ],
        Request::LeaseBegin(begin) => vec![
            begin.key.to_string(),
            begin
                .user
                .as_ref()
                .map(|user| format!("user={user}"))
                .unwrap_or_default(),
            flag("reserve", begin.reserve).to_owned(),
        ],
        Request::LeaseEnd(end) => vec![end.key.to_string()],
        Request::LeaseList(list) => vec![
            list.system.as_ref().map(ToString::to_string).unwrap_or_default(),
            list.key.as_ref().map(ToString::to_string).unwrap_or_default(),
        ],
        Request::Preempt(preempt) | Request::Freeze(preempt) => vec![
            preempt.depth.map(|depth| depth.to_string()).unwrap_or_default(),
            preempt.lease.as_ref().map(|key| format!("lease={key}")).unwrap_or_default(),
            preempt.reason.as_ref().map(|why| format!("reason={why}")).unwrap_or_default(),
        ],
        Request::Resume(resume) | Request::Thaw(resume) => vec![
            resume.lease.as_ref().map(|key| format!("lease={key}")).unwrap_or_default(),
            flag("force", resume.force).to_owned(),
        ],
        Request::Status(status) => vec![status.patterns.join(" ")],
        Request::Reconcile(reconcile) => vec![
            format!("{}/{}", reconcile.system, reconcile.cluster),
            format!("jobs={}", reconcile.running.len()),
        ],
        Request::Maintenance(set) => vec![
            set.reason
                .as_ref()
                .map_or("off".to_owned(), |why| format!("reason={why}")),
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
