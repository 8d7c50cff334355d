//! Every message of protocol version 1, and every verb exactly once. No input or output happens here.

use std::fmt;

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

pub use answers::*;
pub use arguments::*;
pub use fault::*;
pub use schedule::*;

use crate::{
    codec,
    name::{DomainRef, Principal},
};

mod answers;
mod arguments;
mod fault;
mod schedule;

/// The one version spoken today.
pub const VERSION: u16 = 1;
/// The TCP port, XMAN on a telephone.
pub const PORT: u16 = 9626;
/// The GSSAPI service: a host's key is `xman/HOST@REALM`.
pub const SERVICE: &str = "xman";
/// The longest domain XML that a call can carry, in bytes: what fits a sealed frame beside its header.
pub const MAX_XML: usize = 120 * 1024;
/// The most name patterns one `list` can carry.
pub const MAX_PATTERNS: usize = 64;
/// The longest pattern, in bytes.
pub const MAX_PATTERN: usize = 256;
/// The most that a domain's owners, class and labels may come to, in bytes of their text: a list of many domains still goes fast.
pub const MAX_METADATA: usize = 4096;
/// The longest name of an action that `explain` is asked about, in bytes.
pub const MAX_ACTION: usize = 64;
/// The most bytes of input that a call has on its way before the host makes [`Room`](FromHost::Room) for more: enough for a fast network, and
/// all that a caller can make the host hold.
pub const INPUT_WINDOW: u32 = 1024 * 1024;
/// The most bytes in one [`Input`](FromCaller::Input) or [`Bytes`](Item::Bytes).
pub const MAX_INPUT: usize = 64 * 1024;
/// The longest path of a disk's image, in bytes.
pub const MAX_PATH: usize = 4096;
/// Calls sent ahead on one connection that the host keeps; more are answered `Busy`.
pub const MAX_CALLS_AHEAD: usize = 32;

/// From the caller, each sealed in one frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromCaller {
    /// First, once.
    Hello(Hello),
    /// A call. Calls run in the order in which they arrive.
    Call(Call),
    /// More bytes for the stream that runs. A caller sends at most [`INPUT_WINDOW`] bytes, and then as many more as it is told there is room for.
    Input {
        /// The call that it belongs to.
        call: Uuid,
        /// At most [`MAX_INPUT`] bytes; none is the end of the input.
        bytes: Vec<u8>,
    },
    /// Ends a call that follows or waits, ends a stream, takes a waiting call out of its queue, and lets go of a job.
    Cancel {
        /// The call.
        call: Uuid,
    },
    /// A token of a fresh security context, so that the session outlives its first ticket.
    Renew {
        /// The token of gss_init_sec_context.
        token: Vec<u8>,
        /// When the new ticket ends by the caller's account, in seconds since 1970.
        until: u64,
    },
}

/// The caller's first sealed message: what both said in clear, so that nobody in between changed it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    /// The caller's preface as it was sent.
    pub preface: Vec<u8>,
    /// The host's preface as it was received.
    pub answer: Vec<u8>,
    /// The caller's program and version, for the log.
    pub software: String,
    /// When the caller's ticket ends by its own account, in seconds since 1970. It can only shorten the session: an acceptor's library adds
    /// the clock skew that it allows.
    pub until: u64,
}

/// A call: its header, and apart from it the request's body, whose meaning the verb gives.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The header.
    pub header: CallHeader,
    /// The encoded arguments of the verb.
    pub body: Vec<u8>,
}

/// What every call says, whatever its verb.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CallHeader {
    /// Names the call. The same id with the same request gets the recorded outcome and is not carried out again.
    pub id: Uuid,
    /// How long the caller waits from now on, in milliseconds; the host's own limit where absent.
    pub deadline_ms: Option<u32>,
    /// The verb's code ([`Verb::code`]).
    pub verb: u16,
    /// Which of the host's hypervisors is meant, by libvirt URI; the first where absent.
    pub hypervisor: Option<String>,
    /// The person for whom the caller acts: the rights are then that person's.
    pub on_behalf_of: Option<Principal>,
}

/// From the host, each sealed in one frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromHost {
    /// The answer to `Hello`.
    Welcome(Welcome),
    /// A part of a call's answer.
    Items {
        /// The call.
        call: Uuid,
        /// At least one.
        items: Vec<Item>,
    },
    /// How far a call has come.
    Progress {
        /// The call.
        call: Uuid,
        /// How far.
        progress: Progress,
    },
    /// Exactly one for each call, after its items.
    Done {
        /// The call.
        call: Uuid,
        /// What came of it.
        outcome: Result<Reply, Fault>,
    },
    /// A sign of life while a call takes long.
    Alive,
    /// The ticket ends soon: renew, or the session ends with it.
    Expiring {
        /// Seconds left.
        seconds: u32,
    },
    /// The answer to `Renew`.
    Renewed {
        /// The token for the caller's context, empty where there is none.
        token: Vec<u8>,
        /// When the new ticket ends, in seconds since 1970.
        until: u64,
    },
    /// The last message: why the host ends the session.
    Closing(Fault),
    /// So much of a call's input has been taken, and as much more may be sent.
    Room {
        /// The call.
        call: Uuid,
        /// Bytes.
        bytes: u32,
    },
}

/// The host's first sealed message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Welcome {
    /// The caller's preface as it was received.
    pub preface: Vec<u8>,
    /// The host's preface as it was sent.
    pub answer: Vec<u8>,
    /// The host's program and version.
    pub software: String,
    /// Who the host takes the caller for.
    pub principal: Principal,
    /// When the session ends unless it is renewed, in seconds since 1970.
    pub until: u64,
    /// The session's name in the audit.
    pub session: String,
}

/// What a verb does to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effect {
    /// Changes nothing.
    Read,
    /// Goes both ways for as long as its session lives: recorded when it begins and when it ends.
    Stream,
    /// Changes something: recorded before and after, and remembered by its id.
    Change,
}

macro_rules! verbs {
    ($($(#[$doc:meta])* $code:literal $name:literal $verb:ident($arguments:ty) $effect:ident;)*) => {
        /// Every verb of the protocol.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub enum Verb {
            $($(#[$doc])* $verb,)*
        }

        impl Verb {
            /// All of them, in the order of their codes.
            pub const ALL: &'static [Verb] = &[$(Verb::$verb,)*];

            /// Returns the number that stands for the verb on the wire.
            pub fn code(self) -> u16 {
                match self { $(Verb::$verb => $code,)* }
            }

            /// Returns the verb as people and policies write it.
            pub fn name(self) -> &'static str {
                match self { $(Verb::$verb => $name,)* }
            }

            /// Returns whether the verb changes anything.
            pub fn effect(self) -> Effect {
                match self { $(Verb::$verb => Effect::$effect,)* }
            }
        }

        /// A verb with its arguments.
        #[derive(Clone, Debug, PartialEq)]
        pub enum Request {
            $($(#[$doc])* $verb($arguments),)*
        }

        impl Request {
            /// Returns the verb.
            pub fn verb(&self) -> Verb {
                match self { $(Request::$verb(_) => Verb::$verb,)* }
            }

            /// Returns the arguments as they stand in a call's body.
            pub fn body(&self) -> Result<Vec<u8>, codec::CodecError> {
                match self { $(Request::$verb(arguments) => codec::encode(arguments),)* }
            }

            /// Reads a call's body.
            ///
            /// # Errors
            /// `Unsupported` for a verb or body that this version does not know, `BadRequest` for arguments that are known and wrong.
            pub fn parse(verb: u16, body: &[u8]) -> Result<Self, Fault> {
                let request = match verb {
                    $($code => arguments(Verb::$verb, body).map(Request::$verb)?,)*
                    unknown => return Err(Fault::new(
                        Code::Unsupported,
                        format!("this host does not know verb number {unknown}; it runs an older xmand"),
                    )),
                };
                request.check()?;
                Ok(request)
            }
        }
    };
}

verbs! {
    /// Who am I here, until when, and what may I do?
    1 "whoami" Whoami(Whoami) Read;
    /// The domains.
    2 "list" List(List) Read;
    /// The host.
    3 "info" Info(Info) Read;
    /// The hypervisor's messages, or one domain's hypervisor log.
    4 "dmesg" Dmesg(Dmesg) Read;
    /// A domain's XML without its secrets.
    5 "describe" Describe(Describe) Read;
    /// A domain's XML with its secrets.
    6 "describe-secrets" DescribeSecrets(Describe) Read;
    /// Makes a domain from XML and starts it.
    7 "create" Create(Create) Change;
    /// Stores a domain's definition.
    8 "define" Define(Define) Change;
    /// Removes a domain's definition.
    9 "undefine" Undefine(Undefine) Change;
    /// Starts a defined domain.
    10 "start" Start(Start) Change;
    /// Pulls the plug.
    11 "destroy" Destroy(OnDomain) Change;
    /// Asks the guest to reboot.
    12 "reboot" Reboot(Ask) Change;
    /// Asks the guest to shut down.
    13 "shutdown" Shutdown(Ask) Change;
    /// Stops a domain's virtual CPUs.
    14 "pause" Pause(OnDomain) Change;
    /// Lets a paused domain run on.
    15 "unpause" Unpause(Unpause) Change;
    /// Sets a domain's memory.
    16 "mem-set" MemSet(MemSet) Change;
    /// Sets the number of a domain's virtual CPUs.
    17 "vcpu-set" VcpuSet(VcpuSet) Change;
    /// Moves a running domain to another host.
    18 "migrate" Migrate(Migrate) Change;
    /// Gives up a migration under way.
    19 "migrate-abort" MigrateAbort(OnDomain) Change;
    /// The jobs that this host remembers.
    20 "job-list" JobList(JobList) Read;
    /// Waits for a job and follows its progress.
    21 "job-wait" JobWait(OnJob) Read;
    /// Gives up a job.
    22 "job-cancel" JobCancel(OnJob) Change;
    /// Adds owners to a domain and takes others away.
    23 "owner" Owner(SetOwners) Change;
    /// Sets labels of a domain and takes others away.
    24 "label" Label(SetLabels) Change;
    /// Puts a domain into a class.
    25 "class" Class(SetClass) Change;
    /// Why may I, or may I not, do this?
    26 "explain" Explain(Explain) Read;
    /// Why may somebody else, or may not?
    27 "explain-other" ExplainOther(ExplainOther) Read;
    /// Writes a domain's memory to the image that libvirt keeps for it, and stops it.
    28 "save" Save(OnDomain) Change;
    /// Starts a domain from that image, and from nothing else.
    29 "restore" Restore(Start) Change;
    /// Throws that image away.
    30 "discard-saved" DiscardSaved(OnDomain) Change;
    /// Writes a domain's memory to a named image in the host's state directory, and stops it.
    31 "save-to" SaveTo(SaveTo) Change;
    /// The named images.
    32 "images" Images(Images) Read;
    /// Starts a domain from a named image, which is used up by that.
    33 "restore-from" RestoreFrom(RestoreFrom) Change;
    /// Throws a named image away.
    34 "discard-image" DiscardImage(OnImage) Change;
    /// Lets a domain start with its host, or not.
    35 "autostart" Autostart(Autostart) Change;
    /// Resets a guest as its button would.
    36 "reset" Reset(OnDomain) Change;
    /// Gives a domain that is off another name.
    37 "rename" Rename(Rename) Change;
    /// Gives a domain one more disk or network interface.
    38 "attach" Attach(Attach) Change;
    /// Takes one away.
    39 "detach" Detach(Detach) Change;
    /// A domain's serial console.
    40 "console" Console(Console) Stream;
    /// What happens to domains.
    41 "events" Events(Events) Read;
    /// Asks for a permit to bring a domain here from another host.
    42 "migrate-in" MigrateIn(MigrateIn) Read;
    /// libvirt's connection from the host that a domain comes from, by a permit.
    43 "carry" Carry(Carry) Stream;
    /// That host's word on where the domain is, by the same permit.
    44 "settle" Settle(Settle) Change;
    /// A job begins in a domain, and others give way for it.
    45 "lease-begin" LeaseBegin(LeaseBegin) Change;
    /// It has ended, and they come back.
    46 "lease-end" LeaseEnd(LeaseEnd) Change;
    /// The leases.
    47 "lease-list" LeaseList(LeaseList) Read;
    /// Holds a domain back, as deep as its class goes or as is said.
    48 "preempt" Preempt(Preempt) Change;
    /// Lets go of it again; it runs once nobody holds it.
    49 "resume" Resume(Resume) Change;
    /// Writes a domain's memory to its image and gives it back; what it needs to return is kept for it.
    50 "freeze" Freeze(Preempt) Change;
    /// Brings it back.
    51 "thaw" Thaw(Resume) Change;
    /// How the domains stand towards jobs.
    52 "status" Status(Status) Read;
    /// Ends the leases of jobs that a batch system has no more.
    53 "reconcile" Reconcile(Reconcile) Change;
    /// Lets the host take no new leases and start nothing, or all again.
    54 "maintenance" Maintenance(SetMaintenance) Change;
}

impl Verb {
    /// Returns whether the verb is another host's, which shows a [`Permit`] for it: no rule can allow it.
    pub fn goes_by_permit(self) -> bool {
        matches!(self, Verb::Carry | Verb::Settle)
    }
}

impl fmt::Display for Verb {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

fn arguments<T: DeserializeOwned>(verb: Verb, body: &[u8]) -> Result<T, Fault> {
    codec::decode(body).map_err(|error| {
        Fault::new(
            Code::Unsupported,
            format!("this host cannot read the arguments of '{verb}': {error}"),
        )
    })
}

impl Request {
    /// Returns the domain that the request is about, where it is about one that exists already.
    pub fn domain(&self) -> Option<&DomainRef> {
        match self {
            Request::Describe(describe) | Request::DescribeSecrets(describe) => {
                Some(&describe.domain)
            }
            Request::Dmesg(dmesg) => dmesg.domain.as_ref(),
            Request::Undefine(undefine) => Some(&undefine.domain),
            Request::Start(start) => Some(&start.domain),
            Request::Restore(restore) => Some(&restore.domain),
            Request::Destroy(on)
            | Request::Pause(on)
            | Request::Save(on)
            | Request::DiscardSaved(on)
            | Request::Reset(on)
            | Request::MigrateAbort(on) => Some(&on.domain),
            Request::Unpause(unpause) => Some(&unpause.domain),
            Request::SaveTo(save) => Some(&save.domain),
            Request::Autostart(autostart) => Some(&autostart.domain),
            Request::Rename(rename) => Some(&rename.domain),
            Request::Attach(attach) => Some(&attach.domain),
            Request::Detach(detach) => Some(&detach.domain),
            Request::Console(console) => Some(&console.domain),
            Request::Reboot(ask) | Request::Shutdown(ask) => Some(&ask.domain),
            Request::MemSet(set) => Some(&set.domain),
            Request::VcpuSet(set) => Some(&set.domain),
            Request::Migrate(migrate) => Some(&migrate.domain),
            Request::Owner(set) => Some(&set.domain),
            Request::Label(set) => Some(&set.domain),
            Request::Class(set) => Some(&set.domain),
            Request::LeaseBegin(begin) => Some(&begin.domain),
            Request::Preempt(preempt) | Request::Freeze(preempt) => Some(&preempt.domain),
            Request::Resume(resume) | Request::Thaw(resume) => Some(&resume.domain),
            // What they ask about is looked at through the eyes of the one they ask about.
            Request::Explain(_) | Request::ExplainOther(_) => None,
            Request::Whoami(_)
            | Request::List(_)
            | Request::Info(_)
            | Request::Create(_)
            | Request::Define(_)
            | Request::JobList(_)
            | Request::JobWait(_)
            | Request::JobCancel(_)
            | Request::Images(_)
            | Request::RestoreFrom(_)
            | Request::DiscardImage(_)
            | Request::Events(_)
            | Request::MigrateIn(_)
            | Request::Carry(_)
            | Request::Settle(_)
            | Request::LeaseEnd(_)
            | Request::LeaseList(_)
            | Request::Status(_)
            | Request::Reconcile(_)
            | Request::Maintenance(_) => None,
        }
    }

    /// Refuses what a well-formed body can still hold and no host should look at.
    fn check(&self) -> Result<(), Fault> {
        let xml = |xml: &str| match xml.len() {
            length if length > MAX_XML => Err(Fault::new(
                Code::TooLarge,
                format!("the XML has {length} bytes; a call carries at most {MAX_XML}"),
            )),
            _ => Ok(()),
        };
        let refuse = |code, what: String| Err(Fault::new(code, what));
        match self {
            Request::Create(create) => xml(&create.xml),
            Request::Define(define) => xml(&define.xml),
            Request::List(List { patterns, .. })
            | Request::Events(Events { patterns, .. })
            | Request::Status(Status { patterns })
                if patterns.len() > MAX_PATTERNS =>
            {
                refuse(
                    Code::TooLarge,
                    format!(
                        "{} patterns; one call takes at most {MAX_PATTERNS}",
                        patterns.len()
                    ),
                )
            }
            Request::List(List { patterns, .. })
            | Request::Events(Events { patterns, .. })
            | Request::Status(Status { patterns })
                if patterns.iter().any(|p| p.len() > MAX_PATTERN) =>
            {
                refuse(
                    Code::TooLarge,
                    format!("a pattern has more than {MAX_PATTERN} bytes"),
                )
            }
            Request::MemSet(MemSet { kib: 0, .. }) => refuse(
                Code::BadRequest,
                "a domain cannot have no memory".to_owned(),
            ),
            Request::VcpuSet(VcpuSet { count: 0, .. }) => refuse(
                Code::BadRequest,
                "a domain cannot have no virtual CPU".to_owned(),
            ),
            Request::Owner(SetOwners { add, remove, .. })
                if add.is_empty() && remove.is_empty() =>
            {
                refuse(Code::BadRequest, "no owner to add or take away".to_owned())
            }
            Request::Owner(SetOwners { add, remove, .. }) => {
                match add.intersection(remove).next() {
                    Some(both) => refuse(
                        Code::BadRequest,
                        format!("{both} is to be added and to be taken away"),
                    ),
                    None => Ok(()),
                }
            }
            Request::Label(SetLabels { set, remove, .. })
                if set.is_empty() && remove.is_empty() =>
            {
                refuse(Code::BadRequest, "no label to set or take away".to_owned())
            }
            Request::Label(SetLabels { set, remove, .. }) => {
                match remove.iter().find(|name| set.contains_key(name)) {
                    Some(both) => refuse(
                        Code::BadRequest,
                        format!("the label '{both}' is to be set and to be taken away"),
                    ),
                    None => Ok(()),
                }
            }
            Request::Explain(Explain { action, .. })
            | Request::ExplainOther(ExplainOther { action, .. })
                if action.len() > MAX_ACTION =>
            {
                refuse(
                    Code::TooLarge,
                    format!("an action's name has at most {MAX_ACTION} bytes"),
                )
            }
            Request::Attach(Attach {
                device: Device::Disk(Disk { source, .. }),
                ..
            }) if source.len() > MAX_PATH => refuse(
                Code::TooLarge,
                format!("a path has at most {MAX_PATH} bytes"),
            ),
            Request::LeaseBegin(LeaseBegin {
                reserve: true,
                ends_in_ms: None,
                ..
            }) => refuse(
                Code::BadRequest,
                "room is kept for a time, and none was said".to_owned(),
            ),
            Request::Freeze(Preempt {
                depth: Some(depth), ..
            }) if *depth != Depth::Freeze => refuse(
                Code::BadRequest,
                format!("to freeze is not to {depth}; `preempt` takes a depth"),
            ),
            Request::Reconcile(Reconcile { running, .. }) if running.len() > MAX_RUNNING => refuse(
                Code::TooLarge,
                format!("a list names at most {MAX_RUNNING} jobs"),
            ),
            Request::List(_)
            | Request::Class(_)
            | Request::Explain(_)
            | Request::ExplainOther(_)
            | Request::MemSet(_)
            | Request::VcpuSet(_)
            | Request::Whoami(_)
            | Request::Info(_)
            | Request::Dmesg(_)
            | Request::Describe(_)
            | Request::DescribeSecrets(_)
            | Request::Undefine(_)
            | Request::Start(_)
            | Request::Destroy(_)
            | Request::Reboot(_)
            | Request::Shutdown(_)
            | Request::Pause(_)
            | Request::Unpause(_)
            | Request::Migrate(_)
            | Request::MigrateAbort(_)
            | Request::JobList(_)
            | Request::JobWait(_)
            | Request::JobCancel(_)
            | Request::Save(_)
            | Request::Restore(_)
            | Request::DiscardSaved(_)
            | Request::SaveTo(_)
            | Request::Images(_)
            | Request::RestoreFrom(_)
            | Request::DiscardImage(_)
            | Request::Autostart(_)
            | Request::Reset(_)
            | Request::Rename(_)
            | Request::Attach(_)
            | Request::Detach(_)
            | Request::Console(_)
            | Request::Events(_)
            | Request::MigrateIn(_)
            | Request::Carry(_)
            | Request::Settle(_)
            | Request::LeaseBegin(_)
            | Request::LeaseEnd(_)
            | Request::LeaseList(_)
            | Request::Preempt(_)
            | Request::Resume(_)
            | Request::Freeze(_)
            | Request::Thaw(_)
            | Request::Status(_)
            | Request::Reconcile(_)
            | Request::Maintenance(_) => Ok(()),
        }
    }
}
