//! Hosts as people type them: `skirit[80-84],skurut68:9999`, `@group`, `@all!skirit82`.
//!
//! A set is a list of elements between commas or blanks. `!` takes the element after it away from what stands before it. An element is a
//! host, a host with ranges in brackets (`r[1-3]n[01-16]`, steps as `[0-9/3]`), or `@group`; each may end in `:port`. Addresses
//! of IPv6 with a port stand in brackets: `[2001:db8::7]:9626`. Order is kept as typed and duplicates are dropped.

use std::{collections::HashSet, fmt, net::Ipv6Addr, str::FromStr};

use serde::{Serialize, Serializer};
use xman_common::{
    name::{BadName, HostName},
    protocol::PORT,
};

/// The most hosts that one set can name: more is a slip of the hand, not a fleet.
pub const MAX_HOSTS: usize = 10_000;
/// Groups can name groups; deeper than this they name themselves.
const MAX_DEPTH: usize = 16;
/// The most digits a number in brackets can have.
const MAX_DIGITS: usize = 9;

/// Why a text names no hosts.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadHosts {
    /// A name that no host can have.
    #[error("'{text}' is no host: {reason}")]
    Name {
        /// What was typed.
        text: String,
        /// Why not.
        reason: BadName,
    },
    /// After the colon stands no port.
    #[error("'{0}' has no port after its colon; ports are numbers from 1 to 65535")]
    Port(String),
    /// Colons, but no IPv6 address.
    #[error("'{0}' is no IPv6 address; with a port it is written [ADDRESS]:PORT")]
    Ipv6(String),
    /// A bracket without its other half.
    #[error("'{0}' has a bracket without its other half")]
    Bracket(String),
    /// What stands in brackets is no list of numbers and ranges.
    #[error("'[{0}]' is no list of numbers and ranges such as [1-3,7] or [0-20/5]")]
    Range(String),
    /// What nodes of a batch system are not written with.
    #[error("nodes are written like cloud[1-3,7],x[01-10], without '{0}'")]
    Node(char),
    /// The set is bigger than any fleet.
    #[error("that is more than {MAX_HOSTS} hosts")]
    TooMany,
    /// Not in any configuration file.
    #[error("there is no group '@{0}' in rxm.toml")]
    UnknownGroup(String),
    /// A group that leads back to itself.
    #[error("the group '@{0}' names itself")]
    Cycle(String),
    /// A `!` with nothing before or after it.
    #[error("'!' takes away what stands after it from what stands before it, as in @all!skirit82")]
    Exclusion,
}

/// A host and the port of its xmand.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    /// The host as typed; its principal is made of it.
    pub host: HostName,
    /// The TCP port.
    pub port: u16,
}

impl FromStr for Address {
    type Err = BadHosts;

    fn from_str(text: &str) -> Result<Self, BadHosts> {
        let (host, port) = if let Some(rest) = text.strip_prefix('[') {
            let (address, port) = rest
                .split_once(']')
                .ok_or_else(|| BadHosts::Bracket(text.to_owned()))?;
            ipv6(address)?;
            match port.strip_prefix(':') {
                None if port.is_empty() => (address, None),
                Some(port) => (address, Some(port)),
                None => return Err(BadHosts::Port(text.to_owned())),
            }
        } else {
            match text.split_once(':') {
                None => (text, None),
                Some((host, port)) if !port.contains(':') => (host, Some(port)),
                Some(_) => {
                    ipv6(text)?;
                    (text, None)
                }
            }
        };
        let port = match port {
            None => PORT,
            Some(digits) => match digits.parse() {
                Ok(port) if port != 0 && digits.bytes().all(|b| b.is_ascii_digit()) => port,
                Ok(_) | Err(_) => return Err(BadHosts::Port(text.to_owned())),
            },
        };
        let host = host.parse().map_err(|reason| BadHosts::Name {
            text: text.to_owned(),
            reason,
        })?;
        Ok(Self { host, port })
    }
}

fn ipv6(text: &str) -> Result<(), BadHosts> {
    match text.parse::<Ipv6Addr>() {
        Ok(_) => Ok(()),
        Err(_) => Err(BadHosts::Ipv6(text.to_owned())),
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let host = self.host.as_str();
        match (host.contains(':'), self.port) {
            (_, PORT) => f.pad(host),
            (true, port) => f.pad(&format!("[{host}]:{port}")),
            (false, port) => f.pad(&format!("{host}:{port}")),
        }
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Hosts in the order in which they were named, each once.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostSet {
    addresses: Vec<Address>,
}

impl HostSet {
    /// Reads a set; `group` gives the text that a group stands for.
    pub fn parse(text: &str, group: &dyn Fn(&str) -> Option<String>) -> Result<Self, BadHosts> {
        let mut set = Self::default();
        set.take(text, group, 0)?;
        Ok(set)
    }

    /// Returns the hosts.
    pub fn into_addresses(self) -> Vec<Address> {
        self.addresses
    }

    /// Reads the nodes of a batch system as it writes them (`cloud[1-3,7],x[01-10]`): names alone, without groups, ports and exceptions.
    pub fn nodes(text: &str) -> Result<Vec<HostName>, BadHosts> {
        if let Some(foreign) = text.chars().find(|c| matches!(c, '@' | '!' | ':')) {
            return Err(BadHosts::Node(foreign));
        }
        let set = Self::parse(text, &|_| None)?;
        Ok(set
            .addresses
            .into_iter()
            .map(|address| address.host)
            .collect())
    }

    fn take(
        &mut self,
        text: &str,
        group: &dyn Fn(&str) -> Option<String>,
        depth: usize,
    ) -> Result<(), BadHosts> {
        for (sign, element) in elements(text)? {
            let mut named = Self::default();
            match element.strip_prefix('@') {
                Some(name) if depth >= MAX_DEPTH => return Err(BadHosts::Cycle(name.to_owned())),
                Some(name) => {
                    let (name, port) = name
                        .split_once(':')
                        .map_or((name, None), |(name, port)| (name, Some(port)));
                    let text =
                        group(name).ok_or_else(|| BadHosts::UnknownGroup(name.to_owned()))?;
                    named.take(&text, group, depth + 1)?;
                    if let Some(port) = port {
                        let Address { port, .. } = format!("h:{port}")
                            .parse()
                            .map_err(|_| BadHosts::Port(element.clone()))?;
                        named
                            .addresses
                            .iter_mut()
                            .for_each(|address| address.port = port);
                    }
                }
                None => named.addresses = expand(&element)?,
            }
            match sign {
                Sign::With => self.add(named)?,
                Sign::Without => {
                    let gone: HashSet<_> = named.addresses.iter().map(key).collect();
                    self.addresses
                        .retain(|address| !gone.contains(&key(address)));
                }
            }
        }
        Ok(())
    }

    fn add(&mut self, other: Self) -> Result<(), BadHosts> {
        let mut known: HashSet<_> = self.addresses.iter().map(key).collect();
        self.addresses.extend(
            other
                .addresses
                .into_iter()
                .filter(|address| known.insert(key(address))),
        );
        if self.addresses.len() > MAX_HOSTS {
            Err(BadHosts::TooMany)
        } else {
            Ok(())
        }
    }
}

/// DNS does not tell capitals from small letters.
fn key(address: &Address) -> (String, u16) {
    (address.host.as_str().to_ascii_lowercase(), address.port)
}

#[derive(Clone, Copy)]
enum Sign {
    With,
    Without,
}

/// Cuts a set at the commas, blanks and `!` that stand outside brackets.
fn elements(text: &str) -> Result<Vec<(Sign, String)>, BadHosts> {
    let mut found: Vec<(Sign, String)> = Vec::new();
    let mut element = String::new();
    let mut sign = Sign::With;
    let mut inside = false;
    // A comma after the last element ends it like any other.
    for c in text.chars().chain([',']) {
        match c {
            '[' if inside => return Err(BadHosts::Bracket(text.to_owned())),
            ']' if !inside => return Err(BadHosts::Bracket(text.to_owned())),
            '[' => inside = true,
            ']' => inside = false,
            _ => {}
        }
        if inside || !(matches!(c, ',' | '!') || c.is_whitespace()) {
            element.push(c);
            continue;
        }
        if !element.is_empty() {
            found.push((sign, std::mem::take(&mut element)));
            sign = Sign::With;
        }
        if c == '!' {
            if found.is_empty() || matches!(sign, Sign::Without) {
                return Err(BadHosts::Exclusion);
            }
            sign = Sign::Without;
        }
    }
    match (inside, sign) {
        (true, _) => Err(BadHosts::Bracket(text.to_owned())),
        (false, Sign::Without) => Err(BadHosts::Exclusion),
        (false, Sign::With) => Ok(found),
    }
}

/// Expands one element that is no group.
fn expand(element: &str) -> Result<Vec<Address>, BadHosts> {
    if element.starts_with('[') && element.contains(':') {
        return Ok(vec![element.parse()?]);
    }
    let mut texts = vec![String::new()];
    let mut rest = element;
    while let Some((literal, after)) = rest.split_once('[') {
        let (list, after) = after
            .split_once(']')
            .ok_or_else(|| BadHosts::Bracket(element.to_owned()))?;
        let numbers = numbers(list)?;
        if texts.len().saturating_mul(numbers.len()) > MAX_HOSTS {
            return Err(BadHosts::TooMany);
        }
        texts = texts
            .iter()
            .flat_map(|text| {
                numbers
                    .iter()
                    .map(move |number| format!("{text}{literal}{number}"))
            })
            .collect();
        rest = after;
    }
    texts
        .iter()
        .map(|text| format!("{text}{rest}").parse())
        .collect()
}

/// Reads what stands in brackets: `80-84`, `01-16`, `1,3,5-9/2`. Zeros in front are kept as typed.
fn numbers(list: &str) -> Result<Vec<String>, BadHosts> {
    let bad = || BadHosts::Range(list.to_owned());
    let number = |digits: &str| match digits.len() {
        1..=MAX_DIGITS if digits.bytes().all(|b| b.is_ascii_digit()) => {
            digits.parse::<usize>().map_err(|_| bad())
        }
        _ => Err(bad()),
    };
    let mut found = Vec::new();
    for part in list.split(',') {
        let (range, step) = part
            .split_once('/')
            .map_or((part, "1"), |(range, step)| (range, step));
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (from, to, step) = (number(first)?, number(last)?, number(step)?);
        if from > to || step == 0 {
            return Err(bad());
        }
        if (to - from) / step >= MAX_HOSTS || found.len() > MAX_HOSTS {
            return Err(BadHosts::TooMany);
        }
        let width = first.len();
        found.extend(
            (from..=to)
                .step_by(step)
                .map(|number| format!("{number:0width$}")),
        );
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn group(name: &str) -> Option<String> {
        match name {
            "grid" => Some("skirit[80-82], @old".to_owned()),
            "old" => Some("skurut68:7000".to_owned()),
            "loop" => Some("@loop".to_owned()),
            "empty" => Some(String::new()),
            _ => None,
        }
    }

    #[track_caller]
    fn check(text: &str, expected: &[&str]) {
        let set = HostSet::parse(text, &group).unwrap();
        let found: Vec<_> = set.addresses.iter().map(ToString::to_string).collect();
        assert_eq!(found, expected, "{text}");
    }

    #[test]
    fn sets_are_what_grid_people_write() {
        check(
            "skirit[80-84],skurut68",
            &[
                "skirit80", "skirit81", "skirit82", "skirit83", "skirit84", "skurut68",
            ],
        );
        check("b, a b\ta", &["b", "a"]);
        check(
            "r[1-2]n[01-03].ex.org",
            &[
                "r1n01.ex.org",
                "r1n02.ex.org",
                "r1n03.ex.org",
                "r2n01.ex.org",
                "r2n02.ex.org",
                "r2n03.ex.org",
            ],
        );
        check("a[9-11]", &["a9", "a10", "a11"]);
        check("a[08-10]b", &["a08b", "a09b", "a10b"]);
        check("a[0-9/4,7]", &["a0", "a4", "a8", "a7"]);
        check("", &[]);
        check(" , ,", &[]);
    }

    #[test]
    fn ports_belong_to_elements() {
        check("a[1-2]:7000,a1:9626,a1", &["a1:7000", "a2:7000", "a1"]);
        check("10.77.0.2:1", &["10.77.0.2:1"]);
        check(
            "[::1]:9999,[::1],2001:db8::7",
            &["[::1]:9999", "::1", "2001:db8::7"],
        );
        check(
            "@grid:5",
            &["skirit80:5", "skirit81:5", "skirit82:5", "skurut68:5"],
        );
    }

    #[test]
    fn groups_are_expanded_and_elements_taken_away() {
        check(
            "@grid,skirit81",
            &["skirit80", "skirit81", "skirit82", "skurut68:7000"],
        );
        check("@grid!skirit81", &["skirit80", "skirit82", "skurut68:7000"]);
        check("@grid ! skirit[80-81] ! @old", &["skirit82"]);
        check("Skirit80,sKIRIT80", &["Skirit80"]);
        check("@empty", &[]);
    }

    #[test]
    fn nodes_are_names_alone() {
        let nodes = |text: &str| {
            HostSet::nodes(text)
                .map(|nodes| nodes.iter().map(ToString::to_string).collect::<Vec<_>>())
        };
        assert_eq!(
            nodes("cloud[1-3,7],x[09-10]").unwrap(),
            ["cloud1", "cloud2", "cloud3", "cloud7", "x09", "x10"]
        );
        assert_eq!(nodes("").unwrap(), Vec::<String>::new());
        for (text, found) in [("@grid", '@'), ("a!b", '!'), ("a:1", ':'), ("::1", ':')] {
            assert_eq!(nodes(text).unwrap_err(), BadHosts::Node(found), "{text}");
        }
    }

    #[test]
    fn what_is_no_set_is_refused_with_its_reason() {
        let refused = |text: &str| HostSet::parse(text, &group).unwrap_err();
        assert_eq!(refused("@none"), BadHosts::UnknownGroup("none".to_owned()));
        assert_eq!(refused("@loop"), BadHosts::Cycle("loop".to_owned()));
        assert_eq!(refused("a[1-900000000]"), BadHosts::TooMany);
        assert_eq!(refused("a[1-999][1-999][1-999]"), BadHosts::TooMany);
        assert_eq!(refused("a[1-9999],b[1-9999]"), BadHosts::TooMany);
        for range in [
            "a[1-3/0]",
            "a[3-1]",
            "a[]",
            "a[x]",
            "a[1-]",
            "a[-1]",
            "a[1,,2]",
            "a[1-2-3]",
            "a[99999999999999]",
            "a[+1]",
            "a[1/1/1]",
        ] {
            assert!(matches!(refused(range), BadHosts::Range(_)), "{range}");
        }
        for bracket in ["a[1", "a]", "a[[1]]", "[::1", "a[1]]"] {
            assert!(
                matches!(refused(bracket), BadHosts::Bracket(_)),
                "{bracket}"
            );
        }
        for port in [
            "a:",
            "a:0",
            "a:65536",
            "a:x",
            "a:+1",
            "[::1]9626",
            "[::1]:",
            "@grid:x",
        ] {
            assert!(matches!(refused(port), BadHosts::Port(_)), "{port}");
        }
        for name in ["-x", "a/b", "ü", "a@b", "a;b"] {
            assert!(matches!(refused(name), BadHosts::Name { .. }), "{name}");
        }
        for exclusion in ["!a", "a!", "a!!b", "!"] {
            assert_eq!(refused(exclusion), BadHosts::Exclusion, "{exclusion}");
        }
        assert!(matches!(refused("[::zz]"), BadHosts::Ipv6(_)));
        assert!(matches!(refused("a:b:c"), BadHosts::Ipv6(_)));
    }
}
