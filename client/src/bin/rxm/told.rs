//! What came of changes, told target after target.

use serde_json::{Value, json};
use uuid::Uuid;
use xman_client::{Address, Explanation};
use xman_common::{
    name::DomainRef,
    protocol::{Attached, DomainRow, JobRow, Reply, Verb},
};

use crate::{
    exit::Tally,
    options::Format,
    output::{Complaints, error_value},
    setting::{Setting, Stop},
    status::{self, status_value},
    tags::{labels, owners},
    target::Target,
    units::size,
    values::{domain_value, job_value},
};

/// Returns what is done, as it is said before a domain's name.
pub(crate) fn infinitive(verb: Verb) -> &'static str {
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

    pub(crate) fn rehearsed(&mut self, target: &Target, allowed: bool) {
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
        Reply::Standing(row) => status::sentence(verb, row),
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

/// What is said to somebody who lets go of a job.
pub(crate) fn goes_on(address: &Address, id: Uuid) -> String {
    format!(
        "it is job {id}: `rxm job wait {address}/{id}` finds it again, `rxm job cancel {address}/{id}` gives it up"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

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
}
