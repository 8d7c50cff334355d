//! Every message of protocol version 1, and every verb exactly once. No input or output happens here.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
};

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use uuid::Uuid;

use crate::{
    codec,
    name::{DomainName, DomainRef, HostName, LabelValue, Principal, Tag},
};

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
/// Calls sent ahead on one connection that the host keeps; more are answered `Busy`.
pub const MAX_CALLS_AHEAD: usize = 32;

/// From the caller, each sealed in one frame.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum FromCaller {
    /// First, once.
    Hello(Hello),
    /// A call. Calls run in the order in which they arrive.
    Call(Call),
    /// More bytes for a call that takes input; no verb of version 1 does yet.
    Input {
        /// The call that it belongs to.
        call: Uuid,
        /// The bytes.
        bytes: Vec<u8>,
    },
    /// Ends a call that follows or waits, takes a waiting call out of its queue, and lets go of a job.
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
    15 "unpause" Unpause(OnDomain) Change;
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
            Request::Destroy(on)
            | Request::Pause(on)
            | Request::Unpause(on)
            | Request::MigrateAbort(on) => Some(&on.domain),
            Request::Reboot(ask) | Request::Shutdown(ask) => Some(&ask.domain),
            Request::MemSet(set) => Some(&set.domain),
            Request::VcpuSet(set) => Some(&set.domain),
            Request::Migrate(migrate) => Some(&migrate.domain),
            Request::Owner(set) => Some(&set.domain),
            Request::Label(set) => Some(&set.domain),
            Request::Class(set) => Some(&set.domain),
            // What they ask about is looked at through the eyes of the one they ask about.
            Request::Explain(_) | Request::ExplainOther(_) => None,
            Request::Whoami(_)
            | Request::List(_)
            | Request::Info(_)
            | Request::Create(_)
            | Request::Define(_)
            | Request::JobList(_)
            | Request::JobWait(_)
            | Request::JobCancel(_) => None,
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
            Request::List(List { patterns, .. }) if patterns.len() > MAX_PATTERNS => refuse(
                Code::TooLarge,
                format!(
                    "{} patterns; one list takes at most {MAX_PATTERNS}",
                    patterns.len()
                ),
            ),
            Request::List(List { patterns, .. })
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
            | Request::JobCancel(_) => Ok(()),
        }
    }
}

/// Arguments of `whoami`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Whoami {}

/// Arguments of `list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Shell patterns or UUIDs, any of which must match; all domains where empty.
    pub patterns: Vec<String>,
    /// States, any of which must be the domain's; all where empty.
    pub states: Vec<DomainState>,
}

/// Arguments of `info`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {}

/// Arguments of `dmesg`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dmesg {
    /// The domain whose hypervisor log is meant; the hypervisor's own buffer where absent.
    pub domain: Option<DomainRef>,
    /// Whether to go on with what comes.
    pub follow: bool,
}

/// Arguments of `describe` and `describe-secrets`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Describe {
    /// The domain.
    pub domain: DomainRef,
    /// The definition rather than what runs.
    pub inactive: bool,
}

/// Arguments of `create`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Create {
    /// libvirt's domain XML.
    pub xml: String,
    /// Keep the definition when the domain ends.
    pub define: bool,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// Arguments of `define`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Define {
    /// libvirt's domain XML.
    pub xml: String,
    /// The definition (as `describe-secrets --inactive` gave it) that this one replaces; another one there now is a `Conflict`.
    pub replaces: Option<String>,
}

/// Arguments of `undefine`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undefine {
    /// The domain.
    pub domain: DomainRef,
    /// Also throw away its saved image, without which a saved domain is not undefined.
    pub discard_saved: bool,
    /// Also throw away its firmware variables.
    pub discard_nvram: bool,
}

/// Arguments of `start`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Start {
    /// The domain.
    pub domain: DomainRef,
    /// Leave the virtual CPUs stopped.
    pub paused: bool,
}

/// Arguments of the verbs that need nothing but a domain.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnDomain {
    /// The domain.
    pub domain: DomainRef,
}

/// Arguments of `shutdown` and `reboot`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ask {
    /// The domain.
    pub domain: DomainRef,
    /// Answer only when the guest has done it; at most until the call's deadline.
    pub wait: bool,
    /// Shutdown: pull the plug if the guest has not gone by the deadline (implies waiting). Reboot: reset at once without asking the guest.
    pub force: bool,
}

/// Arguments of `mem-set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemSet {
    /// The domain.
    pub domain: DomainRef,
    /// The memory it shall have, in KiB.
    pub kib: u64,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
    /// Set the definition's maximum rather than the current memory.
    pub maximum: bool,
}

/// Arguments of `vcpu-set`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuSet {
    /// The domain.
    pub domain: DomainRef,
    /// How many.
    pub count: u32,
    /// Also, or for a domain that is off only, in the definition.
    pub config: bool,
    /// Set the definition's maximum rather than the current number.
    pub maximum: bool,
}

/// Arguments of `migrate`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migrate {
    /// The domain.
    pub domain: DomainRef,
    /// Where to; one of the host's configured peers.
    pub destination: HostName,
    /// At most so many MiB/s.
    pub bandwidth: Option<u64>,
    /// At most so many milliseconds of silence when it changes over.
    pub downtime_ms: Option<u64>,
}

/// Arguments of `job-list`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobList {}

/// Arguments of `job-wait` and `job-cancel`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OnJob {
    /// The job: the id of the call that began it.
    pub job: Uuid,
}

/// Arguments of `owner`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetOwners {
    /// The domain.
    pub domain: DomainRef,
    /// Who owns it from now on, beside who does already.
    pub add: BTreeSet<Principal>,
    /// Who does not any more.
    pub remove: BTreeSet<Principal>,
}

/// Arguments of `label`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetLabels {
    /// The domain.
    pub domain: DomainRef,
    /// Labels with their new values.
    pub set: BTreeMap<Tag, LabelValue>,
    /// Labels that go.
    pub remove: BTreeSet<Tag>,
}

/// Arguments of `class`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SetClass {
    /// The domain.
    pub domain: DomainRef,
    /// Its class; none where absent.
    pub class: Option<Tag>,
}

/// Arguments of `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explain {
    /// A verb, or what else policies decide about (`own`, `act-for`).
    pub action: String,
    /// To what.
    pub about: About,
}

/// What a question is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum About {
    /// The host.
    Host,
    /// A domain.
    Domain(DomainRef),
    /// Somebody to act for.
    Person(Principal),
}

impl fmt::Display for About {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host => Ok(()),
            Self::Domain(domain) => domain.fmt(f),
            Self::Person(person) => person.fmt(f),
        }
    }
}

/// Arguments of `explain-other`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainOther {
    /// Whose right is asked about.
    pub principal: Principal,
    /// A verb, or what else policies decide about (`own`, `act-for`).
    pub action: String,
    /// To what.
    pub about: About,
}

/// A call's answer when it succeeded.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Reply {
    /// All was said in the items, or there is nothing to say.
    Done,
    /// To `whoami`.
    Whoami(Identity),
    /// To `info`.
    Info(HostInfo),
    /// To what changed a domain: how it is now.
    Domain(DomainRow),
    /// To what removed one.
    Gone {
        /// Its name.
        name: DomainName,
        /// Its identity.
        uuid: Uuid,
    },
    /// To `mem-set`: what was asked of the guest and what it has done so far.
    Memory {
        /// How the domain is now.
        domain: DomainRow,
        /// What was asked, in KiB.
        asked_kib: u64,
    },
    /// To what began or followed a job.
    Job(JobRow),
    /// To `explain` and `explain-other`.
    Explained(Explanation),
}

/// A part of an answer that can be long.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Item {
    /// Of `list`.
    Domain(DomainRow),
    /// Of `dmesg` and `describe`: a piece of text, not cut at lines.
    Text(String),
    /// Of `job-list`.
    Job(JobRow),
}

/// libvirt's states of a domain.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DomainState {
    /// Nothing known.
    Unknown,
    /// Running.
    Running,
    /// Waiting for a resource (Xen).
    Blocked,
    /// Its virtual CPUs are stopped.
    Paused,
    /// Going down.
    ShuttingDown,
    /// Off.
    Off,
    /// Crashed.
    Crashed,
    /// Sleeping by its own power management.
    Sleeping,
}

impl DomainState {
    /// All of them.
    pub const ALL: &'static [DomainState] = &[
        Self::Unknown,
        Self::Running,
        Self::Blocked,
        Self::Paused,
        Self::ShuttingDown,
        Self::Off,
        Self::Crashed,
        Self::Sleeping,
    ];

    /// Returns the state as it is shown and typed.
    pub fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::Running => "running",
            Self::Blocked => "blocked",
            Self::Paused => "paused",
            Self::ShuttingDown => "shutting-down",
            Self::Off => "off",
            Self::Crashed => "crashed",
            Self::Sleeping => "sleeping",
        }
    }

    /// Returns whether a hypervisor holds the domain now.
    pub fn is_active(self) -> bool {
        match self {
            Self::Running | Self::Blocked | Self::Paused | Self::ShuttingDown | Self::Sleeping => {
                true
            }
            Self::Unknown | Self::Off | Self::Crashed => false,
        }
    }
}

impl fmt::Display for DomainState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// What belongs to a domain and libvirt has no word for. It is kept in libvirt's own metadata of the domain, so it moves with it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Metadata {
    /// Whose it is.
    pub owners: BTreeSet<Principal>,
    /// What kind of work it is for.
    pub class: Option<Tag>,
    /// What else rules and people go by.
    pub labels: BTreeMap<Tag, LabelValue>,
}

impl Metadata {
    /// Returns the bytes of all its text, of which [`MAX_METADATA`] are allowed.
    pub fn size(&self) -> usize {
        let owners = self.owners.iter().map(|owner| owner.as_str().len());
        let class = self.class.iter().map(|class| class.as_str().len());
        let labels = self
            .labels
            .iter()
            .map(|(name, value)| name.as_str().len() + value.as_str().len());
        owners.chain(class).chain(labels).sum()
    }
}

/// What the inventory knows of a domain.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct DomainRow {
    /// Its name.
    pub name: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// The hypervisor that has it, as libvirt URI.
    pub hypervisor: String,
    /// The number of its running incarnation.
    pub id: Option<u32>,
    /// Its state.
    pub state: DomainState,
    /// Why it is in that state, in libvirt's words; empty where libvirt says nothing.
    pub reason: String,
    /// Memory it has now, in KiB.
    pub memory_kib: u64,
    /// Memory it can have, in KiB.
    pub max_memory_kib: u64,
    /// Virtual CPUs it has now.
    pub vcpus: u32,
    /// Virtual CPUs it can have.
    pub max_vcpus: u32,
    /// CPU time used since it was started, in nanoseconds.
    pub cpu_time_ns: u64,
    /// Whether it starts with the host.
    pub autostart: bool,
    /// Whether it has a definition that outlives it.
    pub persistent: bool,
    /// Its owners, class and labels; nothing where `metadata_trouble` is set.
    pub metadata: Metadata,
    /// Why they cannot be read: then nobody but administrators may do anything with it.
    pub metadata_trouble: String,
    /// How old this knowledge is, in milliseconds.
    pub age_ms: u64,
    /// Whether libvirt has been silent for so long that it may be wrong.
    pub stale: bool,
}

/// The answer to `info`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct HostInfo {
    /// The host's own name for itself.
    pub hostname: String,
    /// xmand's version.
    pub xmand: String,
    /// One for each configured libvirt URI.
    pub hypervisors: Vec<HypervisorInfo>,
    /// The processors' model as libvirt calls it.
    pub cpu_model: String,
    /// Logical processors.
    pub cpus: u32,
    /// Their clock, in MHz; 0 where unknown.
    pub mhz: u32,
    /// Memory, in KiB.
    pub memory_kib: u64,
    /// Memory free, in KiB.
    pub free_memory_kib: u64,
    /// Load averages over 1, 5 and 15 minutes.
    pub load: [f64; 3],
    /// Active domains.
    pub active: u32,
    /// All domains.
    pub domains: u32,
    /// Virtual CPUs that active domains hold.
    pub used_vcpus: u32,
    /// Memory that active domains hold, in KiB.
    pub used_memory_kib: u64,
    /// Lanes whose work libvirt has not returned in time.
    pub stuck_lanes: u32,
}

/// One libvirt connection as `info` shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HypervisorInfo {
    /// The libvirt URI.
    pub uri: String,
    /// The driver, as libvirt calls it (`QEMU`, `Xen`, `LXC`, `TEST`).
    pub driver: String,
    /// The hypervisor's version, `10.0.2`; empty where unknown.
    pub version: String,
    /// libvirt's version.
    pub libvirt: String,
    /// What is wrong with it now; empty where nothing is.
    pub trouble: String,
    /// How old the inventory's last full reading is, in milliseconds.
    pub age_ms: u64,
}

/// The answer to `whoami`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Who the host takes the caller for.
    pub principal: Principal,
    /// When the session ends, in seconds since 1970.
    pub until: u64,
    /// The verbs that the caller may use on the host, or on any domain.
    pub verbs: Vec<String>,
    /// The rule that lets the caller in; empty where none does.
    pub rule: String,
    /// The Unix groups of the caller's local account, where policies may go by them.
    pub groups: Vec<String>,
    /// Who acts for the principal, where somebody does.
    pub acting: Option<Principal>,
    /// The session's name in the audit.
    pub session: String,
}

/// The answer to `explain`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Explanation {
    /// Whose right it is about.
    pub principal: Principal,
    /// To do what.
    pub action: String,
    /// To which domain or for whom, as it was asked about; empty where to the host.
    pub domain: String,
    /// Whether the principal may.
    pub allowed: bool,
    /// The rule that allows it, or the reason why not, as the audit would show it.
    pub rule: String,
    /// What each backend says, in the order in which they are asked.
    pub steps: Vec<ExplainStep>,
}

/// What one backend says to a question.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExplainStep {
    /// The backend, as the configuration has it.
    pub backend: String,
    /// `allow`, `deny`, `none`, or `not-asked` where an earlier one has decided.
    pub opinion: String,
    /// The rule or the reason.
    pub because: String,
    /// What would have to be true for it to allow this, one way a line.
    pub wants: Vec<String>,
}

/// How a job stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum JobState {
    /// Under way.
    Running,
    /// It did what it should.
    Done,
    /// It did not, and what was before still is.
    Failed,
    /// xmand or libvirt ended in the middle: look at the domain.
    Unknown,
}

impl fmt::Display for JobState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Running => "running",
            Self::Done => "done",
            Self::Failed => "failed",
            Self::Unknown => "unknown",
        })
    }
}

/// A piece of work that outlives its caller.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct JobRow {
    /// The id of the call that began it.
    pub id: Uuid,
    /// Who began it.
    pub principal: Principal,
    /// What it does.
    pub verb: String,
    /// To which domain.
    pub domain: DomainName,
    /// Its identity.
    pub uuid: Uuid,
    /// What else matters, as `to skirit81`.
    pub detail: String,
    /// How it stands.
    pub state: JobState,
    /// What came of it, in words; empty while it runs.
    pub result: String,
    /// When it began, in milliseconds since 1970.
    pub began_ms: u64,
    /// When it ended, in milliseconds since 1970.
    pub ended_ms: Option<u64>,
    /// How far it is, while it runs.
    pub progress: Option<Progress>,
}

/// How far something is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Progress {
    /// What is being done, as `copying memory`.
    pub phase: String,
    /// Of a hundred.
    pub percent: u8,
    /// Bytes done.
    pub done_bytes: u64,
    /// Bytes to do, as far as known: a busy guest makes more.
    pub remaining_bytes: u64,
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes a second; 0 where unknown.
    pub rate: u64,
    /// Milliseconds since it began.
    pub elapsed_ms: u64,
    /// Milliseconds it may still take, where that can be told.
    pub eta_ms: Option<u64>,
}

/// Why a call was not done: programs branch on the code, people read the message.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Fault {
    /// What kind.
    pub code: Code,
    /// What happened, and what to do.
    pub message: String,
    /// Whether the same call may succeed later.
    pub retry: bool,
}

impl Fault {
    /// Makes a fault; whether it is worth a retry follows from its code.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        let retry = matches!(code, Code::Busy | Code::Unavailable | Code::Unknown);
        Self {
            code,
            message: message.into(),
            retry,
        }
    }

    /// The one thing a caller without the right learns.
    pub fn denied() -> Self {
        Self::new(
            Code::Denied,
            "denied: you may not do that here, or there is no such domain; `rxm list` shows what you may see, `rxm explain VERB DOMAIN` why not",
        )
    }
}

/// The closed list of faults.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Code {
    /// The request makes no sense.
    BadRequest,
    /// The caller may not; whether the domain exists is not said.
    Denied,
    /// There is no such domain or job.
    NotFound,
    /// The domain is not in a state that allows it, or something else stands against it.
    Conflict,
    /// Nothing has begun: ask again later.
    Busy,
    /// It began and its outcome is not known: ask again with the same id, never with a new one.
    Unknown,
    /// Something that the host needs is down; nothing has begun.
    Unavailable,
    /// libvirt or the hypervisor refused.
    Refused,
    /// This host does not know how.
    Unsupported,
    /// The ticket has ended.
    Expired,
    /// Over a limit.
    TooLarge,
    /// A defect of xmand.
    Internal,
}

impl Code {
    /// Returns the code as programs see it in JSON and in the audit.
    pub fn name(self) -> &'static str {
        match self {
            Self::BadRequest => "bad-request",
            Self::Denied => "denied",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Busy => "busy",
            Self::Unknown => "unknown",
            Self::Unavailable => "unavailable",
            Self::Refused => "refused",
            Self::Unsupported => "unsupported",
            Self::Expired => "expired",
            Self::TooLarge => "too-large",
            Self::Internal => "internal",
        }
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
