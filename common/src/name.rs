//! Names, parsed at the door: whoever holds one of these types holds a name that is safe to hand to C, to a log line
//! and to a terminal.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// The longest principal accepted, in bytes.
pub const MAX_PRINCIPAL: usize = 1024;
/// The longest domain name accepted, in bytes; libvirt makes file names of it.
pub const MAX_DOMAIN_NAME: usize = 240;
/// The longest host name accepted, in bytes (RFC 1035).
pub const MAX_HOST_NAME: usize = 253;
/// The longest tag accepted, in bytes.
pub const MAX_TAG: usize = 63;
/// The longest id of a batch system's job accepted, in bytes.
pub const MAX_JOB_ID: usize = 128;
/// The longest value of a label accepted, in bytes.
pub const MAX_LABEL_VALUE: usize = 255;

/// Why a string is not the name it was meant to be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadName {
    /// Nothing there.
    #[error("an empty {0}")]
    Empty(&'static str),
    /// Over the limit, which is given in bytes.
    #[error("a {what} of {length} bytes; the longest allowed has {limit}")]
    TooLong {
        /// Which kind of name.
        what: &'static str,
        /// Its length in bytes.
        length: usize,
        /// The limit in bytes.
        limit: usize,
    },
    /// A character that has no place in this kind of name, escaped.
    #[error("a {what} cannot hold '{found}'")]
    Character {
        /// Which kind of name.
        what: &'static str,
        /// The character, escaped so that it can be printed.
        found: String,
    },
    /// A principal without its realm.
    #[error("'{0}' names no realm; a full principal looks like alice@EXAMPLE.ORG")]
    NoRealm(String),
    /// A backslash at the end, or an escape Kerberos does not know.
    #[error("'{0}' ends in, or holds, an escape that Kerberos does not know")]
    Escape(String),
    /// A domain name that could be taken for another domain's UUID.
    #[error(
        "'{0}' looks like a UUID; a domain's name must not, since it could be taken for another domain's"
    )]
    LooksLikeUuid(String),
    /// No hardware address of one interface.
    #[error("'{0}' is not the address of a network interface; one looks like 52:54:00:12:34:56")]
    Mac(String),
    /// A name that means a directory.
    #[error("'{0}' is not a name")]
    Dots(String),
}

fn bounded(text: &str, what: &'static str, limit: usize) -> Result<(), BadName> {
    if text.is_empty() {
        return Err(BadName::Empty(what));
    }
    if text.len() > limit {
        return Err(BadName::TooLong {
            what,
            length: text.len(),
            limit,
        });
    }
    Ok(())
}

fn refuse(text: &str, what: &'static str, bad: impl Fn(char) -> bool) -> Result<(), BadName> {
    match text.chars().find(|c| bad(*c)) {
        Some(c) => Err(BadName::Character {
            what,
            found: c.escape_default().to_string(),
        }),
        None => Ok(()),
    }
}

/// A full Kerberos principal, `primary/instance@REALM`, in the form in which the libraries print it.
///
/// `/`, `@` and `\` inside a component are written with a backslash, and so are tab (`\t`), newline (`\n`), backspace (`\b`) and NUL
/// (`\0`), as krb5_unparse_name does; the type holds only the escaped form, so it is one line without NUL.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Principal {
    text: String,
    realm_at: usize,
}

impl Principal {
    /// Takes the name of a service whose realm the library leaves open (`xman/host@`): its ticket came from the KDC
    /// without a `[domain_realm]` line for the host. Never a caller, whose rights depend on the realm.
    pub(crate) fn service_of_open_realm(text: &str) -> Result<Self, BadName> {
        let name = text.strip_suffix('@').unwrap_or(text);
        let Self { realm_at, .. } = format!("{name}@-").parse()?;
        Ok(Self {
            text: name.to_owned(),
            realm_at,
        })
    }

    /// Returns the realm; empty where it is not known, which no caller's is.
    pub fn realm(&self) -> &str {
        self.text.get(self.realm_at..).unwrap_or_default()
    }

    /// Returns the whole, escaped as Kerberos prints it.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Principal {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "principal", MAX_PRINCIPAL)?;
        refuse(text, "principal", char::is_control)?;
        let mut realm_at = None;
        let mut characters = text.char_indices();
        while let Some((at, c)) = characters.next() {
            match c {
                '\\' => match characters.next() {
                    Some((_, '/' | '@' | '\\' | 't' | 'n' | 'b' | '0')) => {}
                    _ => return Err(BadName::Escape(text.to_owned())),
                },
                '@' if realm_at.is_some() => {
                    return Err(BadName::Character {
                        what: "realm",
                        found: "@".to_owned(),
                    });
                }
                '@' => realm_at = Some(at + 1),
                _ => {}
            }
        }
        match realm_at {
            Some(1) => Err(BadName::Empty("principal")),
            Some(at) if at < text.len() => Ok(Self {
                text: text.to_owned(),
                realm_at: at,
            }),
            _ => Err(BadName::NoRealm(text.to_owned())),
        }
    }
}

/// A domain's name: no control characters, no `/`, not `.` or `..`, not a UUID, at most [`MAX_DOMAIN_NAME`] bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DomainName(String);

impl DomainName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DomainName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "domain name", MAX_DOMAIN_NAME)?;
        refuse(text, "domain name", |c| {
            c.is_control() || c == '/' || is_deceptive(c)
        })?;
        if text == "." || text == ".." {
            return Err(BadName::Dots(text.to_owned()));
        }
        if Uuid::try_parse(text).is_ok() {
            return Err(BadName::LooksLikeUuid(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }
}

/// Returns whether this is a line or paragraph separator or a mark that turns the direction of text: they let one line look like another.
pub fn is_deceptive(c: char) -> bool {
    matches!(c, '\u{2028}' | '\u{2029}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A host's name or address as typed: letters, digits, `.`, `-`, `_`, and `:` for IPv6 addresses.
///
/// It never begins with `-`, so it cannot be taken for an option, and holds nothing that means something in a URI's host part.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HostName(String);

impl HostName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for HostName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "host name", MAX_HOST_NAME)?;
        refuse(text, "host name", |c| {
            !(c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_' | ':'))
        })?;
        if text.starts_with(['-', '.']) {
            return Err(BadName::Character {
                what: "host name's beginning",
                found: text.chars().take(1).collect(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}

macro_rules! as_text {
    ($name:ident, $field:tt) => {
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.$field)
            }
        }

        impl TryFrom<String> for $name {
            type Error = BadName;

            fn try_from(text: String) -> Result<Self, BadName> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.$field
            }
        }
    };
}

as_text!(Principal, text);
as_text!(DomainName, 0);
as_text!(HostName, 0);
as_text!(Tag, 0);
as_text!(JobId, 0);
as_text!(LabelValue, 0);
as_text!(LinkName, 0);
as_text!(Mac, 0);

/// A word that rules are written with: a domain's class, the name of a label. Small letters, digits, `.`, `-` and `_`, with a letter or digit in front.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Tag(String);

impl Tag {
    /// Returns the word.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Tag {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "tag", MAX_TAG)?;
        refuse(text, "tag", |c| {
            !(c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-' | '_'))
        })?;
        if text.starts_with(['.', '-', '_']) {
            return Err(BadName::Character {
                what: "tag's beginning",
                found: text.chars().take(1).collect(),
            });
        }
        Ok(Self(text.to_owned()))
    }
}

/// A batch system's own name for a job, as `4711` or `12[3].pbs01`: printable ASCII without blanks and slashes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JobId(String);

impl JobId {
    /// Returns the id.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for JobId {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "job's id", MAX_JOB_ID)?;
        refuse(text, "job's id", |c| !c.is_ascii_graphic() || c == '/')?;
        Ok(Self(text.to_owned()))
    }
}

/// A label's value: one line of text that XML can hold.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LabelValue(String);

impl LabelValue {
    /// Returns the text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LabelValue {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "label value", MAX_LABEL_VALUE)?;
        refuse(text, "label value", |c| {
            c.is_control() || is_deceptive(c) || matches!(c, '\u{fffe}' | '\u{ffff}')
        })?;
        Ok(Self(text.to_owned()))
    }
}

/// The name of one of libvirt's networks or of a bridge: one line without `/`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LinkName(String);

impl LinkName {
    /// Returns the name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LinkName {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        bounded(text, "network's name", MAX_TAG)?;
        refuse(text, "network's name", |c| {
            c.is_control() || c == '/' || is_deceptive(c) || matches!(c, '\u{fffe}' | '\u{ffff}')
        })?;
        Ok(Self(text.to_owned()))
    }
}

/// The hardware address of one network interface, `52:54:00:12:34:56` in small letters; not one of many interfaces, which is odd in its first byte.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(String);

impl Mac {
    /// Returns the address.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for Mac {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        let bytes: Vec<u8> = text
            .split([':', '-'])
            .filter(|pair| pair.len() == 2 && pair.bytes().all(|b| b.is_ascii_hexdigit()))
            .filter_map(|pair| u8::from_str_radix(pair, 16).ok())
            .collect();
        match bytes.first() {
            Some(first) if bytes.len() == 6 && text.len() == 17 && first % 2 == 0 => {
                Ok(Self(text.to_ascii_lowercase().replace('-', ":")))
            }
            _ => Err(BadName::Mac(text.escape_default().to_string())),
        }
    }
}

/// What a caller calls a domain by. Calls that change something carry the UUID once a name is resolved.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum DomainRef {
    /// By identity.
    Uuid(Uuid),
    /// By name, resolved on the host.
    Name(DomainName),
}

impl FromStr for DomainRef {
    type Err = BadName;

    fn from_str(text: &str) -> Result<Self, BadName> {
        match Uuid::try_parse(text) {
            Ok(uuid) => Ok(Self::Uuid(uuid)),
            Err(_) => text.parse().map(Self::Name),
        }
    }
}

impl fmt::Display for DomainRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Uuid(uuid) => uuid.fmt(f),
            Self::Name(name) => name.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_service_can_leave_its_realm_open() {
        let service = Principal::service_of_open_realm("xman/10.0.0.7@").unwrap();
        assert_eq!((service.as_str(), service.realm()), ("xman/10.0.0.7", ""));
        assert!("xman/10.0.0.7@".parse::<Principal>().is_err());
        for bad in ["@", "", "a@B@", "a\\@", "a\n@"] {
            assert!(Principal::service_of_open_realm(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn principals_are_full_and_escaped() {
        for good in [
            "alice@EX.ORG",
            "xman/host.ex.org@EX.ORG",
            r"a\/b@EX",
            r"a\@b/c@EX",
            r"tab\tbed@EX",
        ] {
            assert_eq!(good.parse::<Principal>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            "alice",
            "alice@",
            "@EX",
            "a@b@c",
            "a\nb@EX",
            "a\0@EX",
            r"a\x@EX",
            r"a@EX\",
            "alice@EX\r",
        ] {
            assert!(bad.parse::<Principal>().is_err(), "{bad:?}");
        }
        assert!(
            format!("{}@EX", "a".repeat(2000))
                .parse::<Principal>()
                .is_err()
        );
        assert_eq!(r"a\@b@EX".parse::<Principal>().unwrap().realm(), "EX");
    }

    #[test]
    fn domain_names_are_safe_for_c_logs_files_and_eyes() {
        for good in ["grid-1", "Bücher", "a b", "skirit80-1.ics.muni.cz", "..."] {
            assert!(good.parse::<DomainName>().is_ok(), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "../x",
            "a\nb",
            "a\0b",
            "a\u{202e}b",
            "123e4567-e89b-12d3-a456-426614174000",
        ] {
            assert!(bad.parse::<DomainName>().is_err(), "{bad:?}");
        }
        assert!("x".repeat(10_000).parse::<DomainName>().is_err());
    }

    #[test]
    fn a_host_name_is_never_an_option_or_a_piece_of_a_uri() {
        for good in ["skirit80", "skurut68.cesnet.cz", "10.77.0.2", "::1"] {
            assert!(good.parse::<HostName>().is_ok(), "{good:?}");
        }
        for bad in ["", "-H", "a/b", "a?x=y", "a@b", "a b", "a%00", "ü"] {
            assert!(bad.parse::<HostName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_looks_like_a_uuid_is_one() {
        let uuid = "123e4567-e89b-12d3-a456-426614174000";
        assert!(matches!(uuid.parse(), Ok(DomainRef::Uuid(_))));
        assert!(matches!("web".parse(), Ok(DomainRef::Name(_))));
    }
}
