//! Why something was not done.

use std::fmt;

use serde::{Deserialize, Serialize};

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
