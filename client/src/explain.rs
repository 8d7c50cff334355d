//! What went wrong and what to do about it, in words: one cause, one next step.

use std::{fmt, io};

use xman_common::{
    channel::{ChannelError, Refusal, skew_in_words},
    gss::{GssError, Trouble},
    name::Principal,
    protocol::{Code, Fault},
};

use crate::{
    caller::{Failure, is_expired, may_have_happened},
    hosts::Address,
    session::{CallError, ConnectError, Loss, Stage},
};

/// What kind of failure it is; exit codes are made of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// The host answered no, or something failed.
    Refused,
    /// There is no way to the host.
    Unreachable,
    /// Kerberos does not prove who the caller is.
    Unauthenticated,
    /// The caller was interrupted.
    Interrupted,
}

/// A failure in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    /// What kind.
    pub kind: Kind,
    /// The code for programs: a fault's own, or one of this module's.
    pub code: &'static str,
    /// What happened.
    pub what: String,
    /// What to do; empty where the first part says it.
    pub advice: String,
    /// Whether it is the same for every host, so that it is said once.
    pub is_common: bool,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)?;
        if self.advice.is_empty() {
            Ok(())
        } else {
            write!(f, "; {}", self.advice)
        }
    }
}

impl Explanation {
    fn new(
        kind: Kind,
        code: &'static str,
        what: impl Into<String>,
        advice: impl Into<String>,
    ) -> Self {
        Self {
            kind,
            code,
            what: what.into(),
            advice: advice.into(),
            is_common: false,
        }
    }

    fn common(self) -> Self {
        Self {
            is_common: true,
            ..self
        }
    }
}

/// Explains why a host gave no reply. `own` is the principal of the ticket at hand, where known.
pub fn failure(failure: &Failure, address: &Address, own: Option<&Principal>) -> Explanation {
    match failure {
        Failure::Connect(error) => connect(error, address, own),
        Failure::Call(error) => call(error),
        Failure::Interrupted => {
            Explanation::new(Kind::Interrupted, "interrupted", "interrupted", "")
        }
    }
}

fn connect(error: &ConnectError, address: &Address, own: Option<&Principal>) -> Explanation {
    let unreachable =
        |code, what: String, advice: &str| Explanation::new(Kind::Unreachable, code, what, advice);
    match error {
        ConnectError::Lookup(error) => {
            let advice = format!("{}: check its spelling, and DNS", in_words(error));
            unreachable(
                "unreachable",
                "unreachable: its name cannot be resolved".to_owned(),
                &advice,
            )
        }
        ConnectError::Unreachable { error, .. } => {
            let advice = if error.kind() == io::ErrorKind::ConnectionRefused {
                "is xmand running there, and is that its port?"
            } else if error.kind() == io::ErrorKind::TimedOut {
                "is the host up, and does a firewall drop what comes to that port?"
            } else {
                "check the network"
            };
            unreachable(
                "unreachable",
                format!("unreachable: {}", in_words(error)),
                advice,
            )
        }
        ConnectError::Timeout { stage, after } => {
            let seconds = after.as_secs_f32();
            let (silent, advice) = match stage {
                Stage::Lookup => (
                    "DNS gave no answer",
                    "check DNS, or use an address that is in /etc/hosts",
                ),
                Stage::Dial => (
                    "no connection",
                    "is the host up, and does a firewall drop what comes to that port?",
                ),
                Stage::Handshake => (
                    "no answer to the handshake",
                    "the host, or Kerberos's KDC, is silent; `--timeout` gives them longer",
                ),
            };
            unreachable(
                "timeout",
                format!("unreachable: {silent} within {seconds:.1} s"),
                advice,
            )
        }
        ConnectError::Channel(error) => channel(error, address, own),
        ConnectError::Closing(fault) => of_fault(fault),
    }
}

fn channel(error: &ChannelError, address: &Address, own: Option<&Principal>) -> Explanation {
    let broken =
        |advice: &str| Explanation::new(Kind::Unreachable, "protocol", error.to_string(), advice);
    match error {
        ChannelError::Gss(error) => gss(error, address, own),
        ChannelError::Refused { reason, skew } => refused(*reason, *skew, address),
        ChannelError::Wire(error) => Explanation::new(
            Kind::Unreachable,
            "unreachable",
            format!("unreachable: {error}"),
            "check the network",
        ),
        ChannelError::Closed => Explanation::new(
            Kind::Unreachable,
            "unreachable",
            "unreachable: the host closed the connection during the handshake",
            "its log says why; it may be overloaded or stopping",
        ),
        ChannelError::NoRoom => Explanation::new(
            Kind::Refused,
            "busy",
            "the host has no room for one more connection",
            "try again later",
        ),
        ChannelError::NotXman => broken("something else than xmand listens on that port"),
        ChannelError::Version => broken("update the older side"),
        ChannelError::Tampered => broken("find out who, before you go on"),
        ChannelError::Broken(_) | ChannelError::Codec(_) => {
            broken("this program and the host's xmand do not fit together")
        }
    }
}

fn refused(reason: Refusal, skew: i64, address: &Address) -> Explanation {
    let service = service(address);
    let (code, what, advice) = match reason {
        Refusal::ClockSkew => (
            "clock-skew",
            format!(
                "the clock of the host is {} this machine's, and Kerberos allows five minutes",
                skew_in_words(skew)
            ),
            "set both clocks (NTP)".to_owned(),
        ),
        Refusal::NoKey => (
            "no-key",
            format!("the host has no key for the ticket '{service}'"),
            format!(
                "its keytab lacks {service} or has an older key, or the name is another host's; `xmand --check` there says which"
            ),
        ),
        Refusal::Expired => (
            "ticket-expired",
            "the host says that the ticket has expired".to_owned(),
            "run kinit; then check both clocks".to_owned(),
        ),
        Refusal::Replay => (
            "refused",
            "the host has seen this handshake before".to_owned(),
            "try again; if it stays, somebody repeats what you send".to_owned(),
        ),
        Refusal::Other => (
            "refused",
            format!("the host refused the ticket for '{service}'"),
            "its log says why".to_owned(),
        ),
    };
    Explanation::new(Kind::Unauthenticated, code, what, advice)
}

fn service(address: &Address) -> String {
    format!("xman/{}", address.host)
}

/// Explains what Kerberos on this side says.
pub fn gss(error: &GssError, address: &Address, own: Option<&Principal>) -> Explanation {
    let not_authenticated = |code, what: String, advice: String| {
        Explanation::new(Kind::Unauthenticated, code, what, advice)
    };
    match error.trouble {
        Trouble::NoTicket | Trouble::Expired => ticket(error, own),
        Trouble::ClockSkew => not_authenticated(
            "clock-skew",
            "the clocks of this machine and of Kerberos's KDC or the host differ by more than Kerberos allows".to_owned(),
            "set this machine's clock (NTP)".to_owned(),
        ),
        Trouble::UnknownService => unknown_service(&error.text, address, own),
        Trouble::KdcUnreachable => not_authenticated(
            "kdc-unreachable",
            format!("no Kerberos KDC can be reached ({})", library_words(&error.text)),
            "check the network, and the realm's kdc lines in krb5.conf".to_owned(),
        )
        .common(),
        Trouble::UnknownRealm => not_authenticated(
            "unknown-realm",
            format!("no way to the realm of '{}' ({})", address.host, library_words(&error.text)),
            "krb5.conf names a host's realm in [domain_realm] and its KDCs in [realms]".to_owned(),
        ),
        Trouble::Replay | Trouble::BadToken => not_authenticated(
            "forged",
            format!("what the host sent is forged, damaged or repeated ({})", library_words(&error.text)),
            "try again; if it stays, somebody is in between".to_owned(),
        ),
        Trouble::WeakContext => not_authenticated(
            "weak-context",
            error.text.clone(),
            "the host or its Kerberos library does not grant what xman requires".to_owned(),
        ),
        Trouble::NoKey | Trouble::Other => not_authenticated(
            "not-authenticated",
            format!("Kerberos fails for '{}': {}", service(address), library_words(&error.text)),
            "`klist` shows your tickets; KRB5_TRACE=/dev/stderr shows what happens".to_owned(),
        ),
    }
}

/// Explains trouble with the ticket at hand, which is the same for every host.
pub fn ticket(error: &GssError, own: Option<&Principal>) -> Explanation {
    let whose = own.map(|own| format!(" of {own}")).unwrap_or_default();
    let (code, what) = match error.trouble {
        Trouble::Expired => (
            "ticket-expired",
            format!("the Kerberos ticket{whose} has expired"),
        ),
        Trouble::NoTicket
        | Trouble::ClockSkew
        | Trouble::UnknownService
        | Trouble::KdcUnreachable
        | Trouble::UnknownRealm
        | Trouble::NoKey
        | Trouble::Replay
        | Trouble::WeakContext
        | Trouble::BadToken
        | Trouble::Other => ("no-ticket", "there is no Kerberos ticket".to_owned()),
    };
    Explanation::new(Kind::Unauthenticated, code, what, "run kinit").common()
}

/// MIT names the principal that its KDC does not know; one of a realm, `krbtgt/THEIRS@OURS`, means that no trust leads there.
fn unknown_service(text: &str, address: &Address, own: Option<&Principal>) -> Explanation {
    let named = text
        .split([' ', '(', ')', ',', '\''])
        .find(|word| word.contains('/') && word.contains('@'));
    if let Some((theirs, ours)) = named
        .and_then(|name| name.strip_prefix("krbtgt/"))
        .and_then(|rest| rest.split_once('@'))
    {
        let whose = own.map_or_else(
            || format!("your ticket is of the realm {ours}"),
            |own| format!("your ticket is {own}'s"),
        );
        return Explanation::new(
            Kind::Unauthenticated,
            "wrong-realm",
            format!(
                "{whose}, and no trust leads from there to {theirs}, the realm of '{}'",
                address.host
            ),
            format!("get a ticket of that realm: kinit NAME@{theirs}"),
        );
    }
    let realm = own
        .map(|own| format!("@{}", own.realm()))
        .unwrap_or_default();
    let named = named.map_or_else(|| format!("{}{realm}", service(address)), str::to_owned);
    Explanation::new(
        Kind::Unauthenticated,
        "unknown-service",
        format!("the KDC knows no principal '{named}'"),
        "check the host's name (full, as its key has it), or let the realm's administrator make that key",
    )
}

/// The library's text begins with a sentence that says nothing; what it means stands in its last pair of parentheses.
fn library_words(text: &str) -> &str {
    let said = match (text.find(" ("), text.strip_suffix(')')) {
        (Some(open), Some(text)) => text.get(open + 2..).unwrap_or(text),
        (Some(_) | None, _) => text,
    };
    said.trim_end_matches('.')
}

fn call(error: &CallError) -> Explanation {
    match error {
        CallError::Fault(fault) => of_fault(fault),
        CallError::TooLarge { .. } => Explanation::new(
            Kind::Refused,
            Code::TooLarge.name(),
            error.to_string(),
            "nothing was sent",
        ),
        CallError::Unsent(_) => Explanation::new(
            Kind::Unreachable,
            "unreachable",
            error.to_string(),
            "nothing was done; try again",
        ),
        CallError::Lost(loss) if is_expired(loss) => Explanation::new(
            Kind::Unauthenticated,
            "ticket-expired",
            "the ticket ended, and the session with it, before the answer came",
            "run kinit, then look at what is there",
        ),
        CallError::Lost(loss) => {
            let code = if matches!(loss, Loss::Late) {
                "timeout"
            } else {
                "lost"
            };
            Explanation::new(Kind::Unreachable, code, loss.to_string(), "")
        }
        CallError::Cancelled(_) => {
            Explanation::new(Kind::Interrupted, "interrupted", "interrupted", "")
        }
    }
}

/// Explains a host's refusal; its message already says what to do.
pub fn of_fault(fault: &Fault) -> Explanation {
    let kind = if fault.code == Code::Expired {
        Kind::Unauthenticated
    } else {
        Kind::Refused
    };
    Explanation::new(kind, fault.code.name(), fault.message.clone(), "")
}

/// Explains a failed call, and of one that changes something also whether it may have happened.
pub fn change(error: &Failure, address: &Address, own: Option<&Principal>) -> Explanation {
    let explanation = failure(error, address, own);
    if !may_have_happened(error) || explanation.code == Code::Unknown.name() {
        return explanation;
    }
    Explanation {
        what: format!("{}: it may have been done or not", explanation.what),
        advice: "look with `rxm list` before you do it again".to_owned(),
        ..explanation
    }
}

/// What the system says, without its number.
fn in_words(error: &io::Error) -> String {
    const WORDS: [(io::ErrorKind, &str); 5] = [
        (io::ErrorKind::ConnectionRefused, "connection refused"),
        (io::ErrorKind::TimedOut, "no answer"),
        (io::ErrorKind::HostUnreachable, "no route to the host"),
        (io::ErrorKind::NetworkUnreachable, "no route to its network"),
        (io::ErrorKind::ConnectionReset, "connection reset"),
    ];
    if let Some((_, words)) = WORDS.iter().find(|(kind, _)| *kind == error.kind()) {
        return (*words).to_owned();
    }
    let text = error.to_string();
    let text = text
        .strip_prefix("failed to lookup address information: ")
        .unwrap_or(&text);
    text.split(" (os error")
        .next()
        .unwrap_or_default()
        .to_owned()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn here() -> Address {
        "skirit80:7000".parse().unwrap()
    }

    fn alice() -> Principal {
        "alice@EX.ORG".parse().unwrap()
    }

    #[track_caller]
    fn check(error: ConnectError, kind: Kind, code: &str, words: &[&str]) {
        let explained = failure(&error.into(), &here(), Some(&alice()));
        let text = explained.to_string();
        assert_eq!((explained.kind, explained.code), (kind, code), "{text}");
        for word in words {
            assert!(text.contains(word), "'{word}' is missing in: {text}");
        }
        assert!(!explained.advice.is_empty(), "no advice: {text}");
    }

    fn kerberos(trouble: Trouble, text: &str) -> ConnectError {
        ConnectError::Channel(
            GssError {
                trouble,
                text: text.to_owned(),
            }
            .into(),
        )
    }

    #[test]
    fn kerberos_trouble_is_told_in_words() {
        use Kind::Unauthenticated as U;
        check(
            kerberos(Trouble::NoTicket, "x"),
            U,
            "no-ticket",
            &["no Kerberos ticket", "kinit"],
        );
        check(
            kerberos(Trouble::Expired, "x"),
            U,
            "ticket-expired",
            &["alice@EX.ORG", "expired", "kinit"],
        );
        check(
            kerberos(Trouble::ClockSkew, "x"),
            U,
            "clock-skew",
            &["clock", "NTP"],
        );
        let mit = "Unspecified GSS failure.  Minor code may provide more information (Server xman/skirit80@EX.ORG not found in Kerberos database)";
        check(
            kerberos(Trouble::UnknownService, mit),
            U,
            "unknown-service",
            &["'xman/skirit80@EX.ORG'"],
        );
        check(
            kerberos(Trouble::UnknownService, "?"),
            U,
            "unknown-service",
            &["'xman/skirit80@EX.ORG'"],
        );
        let trust = "Unspecified GSS failure.  Minor code may provide more information (Server krbtgt/OTHER@EX.ORG not found in Kerberos database)";
        check(
            kerberos(Trouble::UnknownService, trust),
            U,
            "wrong-realm",
            &["alice@EX.ORG", "OTHER", "kinit NAME@OTHER"],
        );
        let kdc = "Unspecified GSS failure.  Minor code may provide more information (Cannot contact any KDC for realm 'EX.ORG')";
        check(
            kerberos(Trouble::KdcUnreachable, kdc),
            U,
            "kdc-unreachable",
            &["(Cannot contact any KDC for realm 'EX.ORG')"],
        );
        check(
            kerberos(Trouble::UnknownRealm, "x"),
            U,
            "unknown-realm",
            &["domain_realm"],
        );
        check(
            kerberos(Trouble::Other, "x"),
            U,
            "not-authenticated",
            &["xman/skirit80", "klist"],
        );
        check(
            kerberos(Trouble::WeakContext, "lacks X"),
            U,
            "weak-context",
            &["lacks X"],
        );
    }

    #[test]
    fn what_is_the_same_for_every_host_is_marked() {
        for (trouble, common) in [
            (Trouble::NoTicket, true),
            (Trouble::Expired, true),
            (Trouble::KdcUnreachable, true),
            (Trouble::UnknownService, false),
        ] {
            let explained = failure(&kerberos(trouble, "").into(), &here(), None);
            assert_eq!(explained.is_common, common, "{trouble:?}");
        }
    }

    #[test]
    fn a_refusal_is_told_in_words() {
        use Kind::Unauthenticated as U;
        let refused = |reason, skew| ConnectError::Channel(ChannelError::Refused { reason, skew });
        check(
            refused(Refusal::ClockSkew, 412),
            U,
            "clock-skew",
            &["host is 412 s ahead of this machine"],
        );
        check(
            refused(Refusal::ClockSkew, -412),
            U,
            "clock-skew",
            &["host is 412 s behind this machine"],
        );
        check(
            refused(Refusal::NoKey, 0),
            U,
            "no-key",
            &["xman/skirit80", "xmand --check"],
        );
        check(
            refused(Refusal::Expired, 0),
            U,
            "ticket-expired",
            &["kinit"],
        );
        check(refused(Refusal::Other, 0), U, "refused", &["log"]);
    }

    #[test]
    fn a_way_that_leads_nowhere_is_told_in_words() {
        use Kind::Unreachable as U;
        let unreachable = |kind: io::ErrorKind| ConnectError::Unreachable {
            address: ([127, 0, 0, 1], 1).into(),
            error: kind.into(),
        };
        check(
            unreachable(io::ErrorKind::ConnectionRefused),
            U,
            "unreachable",
            &["unreachable: connection refused; is xmand"],
        );
        check(
            unreachable(io::ErrorKind::TimedOut),
            U,
            "unreachable",
            &["no answer"],
        );
        let late = |stage| ConnectError::Timeout {
            stage,
            after: Duration::from_millis(1500),
        };
        check(late(Stage::Dial), U, "timeout", &["1.5 s"]);
        check(late(Stage::Handshake), U, "timeout", &["KDC"]);
        check(
            ConnectError::Channel(ChannelError::NotXman),
            U,
            "protocol",
            &["something else"],
        );
        check(
            ConnectError::Channel(ChannelError::Tampered),
            U,
            "protocol",
            &["in between"],
        );
        check(
            ConnectError::Lookup(io::Error::other(
                "failed to lookup address information: Name or service not known",
            )),
            U,
            "unreachable",
            &["its name cannot be resolved; Name or service not known: check"],
        );
        check(
            ConnectError::Channel(ChannelError::NoRoom),
            Kind::Refused,
            "busy",
            &["later"],
        );
    }

    #[test]
    fn a_change_whose_outcome_is_open_says_so() {
        let lost = CallError::Lost(Loss::Silent).into();
        let text = change(&lost, &here(), None).to_string();
        assert!(text.contains("may have been done or not; look"), "{text}");
        let denied = CallError::Fault(Fault::denied()).into();
        assert_eq!(
            change(&denied, &here(), None).to_string(),
            Fault::denied().message
        );
    }
}
