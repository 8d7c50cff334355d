//! Which domain of which host a node of the batch system is.
//!
//! A line of the map's file goes before a `[[map]]`, and of those the first that knows the node.

use std::collections::{HashMap, HashSet};

use glob::Pattern;
use serde::Deserialize;
use xman_client::{
    Address, BadHosts, HostSet,
    name::{BadName, DomainRef},
};

/// The most nodes that can be mapped one by one: more is no batch system.
const MAX_NODES: usize = 100_000;

/// `[[map]]`: nodes, by a set or by a pattern, and what their host and domain are called.
#[derive(Clone, Debug, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Map {
    /// `cloud[1-40]`
    nodes: Option<String>,
    /// `cloud*`
    pattern: Option<String>,
    /// `skirit{n}:9626`
    host: String,
    /// `{node}`
    domain: String,
}

/// Where a node's domain is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    pub(crate) host: Address,
    pub(crate) domain: DomainRef,
}

/// Why nodes cannot be mapped.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadMap {
    #[error("a [[map]] has either `nodes` or `pattern`")]
    Either,
    #[error("[[map]] nodes: {0}")]
    Nodes(BadHosts),
    #[error("[[map]] pattern '{0}' is no pattern of the shell")]
    Pattern(String),
    #[error(
        "'{{{0}}}' stands for nothing; there are {{node}}, {{short}} (up to its first dot) and {{n}} (its last number)"
    )]
    Placeholder(String),
    #[error("line {0}: there are three words in a line, NODE HOST DOMAIN")]
    Line(usize),
    #[error("line {line}: {reason}")]
    Word { line: usize, reason: String },
    #[error("line {line}: the node '{node}' stood there before")]
    Twice { line: usize, node: String },
    #[error("that is more than {MAX_NODES} nodes")]
    TooMany,
}

/// Why a node has no domain.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum NoPlace {
    #[error("no map knows the node '{0}'")]
    Unknown(String),
    #[error("the node '{node}' has no number for {{n}} in '{template}'")]
    NoNumber { node: String, template: String },
    #[error("the node '{node}' would be on the host '{text}': {reason}")]
    Host {
        node: String,
        text: String,
        reason: BadHosts,
    },
    #[error("the node '{node}' would be the domain '{text}': {reason}")]
    Domain {
        node: String,
        text: String,
        reason: BadName,
    },
}

#[derive(Debug)]
enum Which {
    Names(HashSet<String>),
    Like(Pattern),
}

/// All maps together.
#[derive(Debug, Default)]
pub(crate) struct Nodes {
    lines: HashMap<String, Place>,
    maps: Vec<(Which, Map)>,
    /// In the order in which they are written, for who wants to see all.
    names: Vec<String>,
}

impl Nodes {
    pub(crate) fn new(maps: Vec<Map>) -> Result<Self, BadMap> {
        let mut nodes = Self::default();
        for map in maps {
            let which = match (&map.nodes, &map.pattern) {
                (Some(set), None) => {
                    let names = HostSet::nodes(set).map_err(BadMap::Nodes)?;
                    nodes.names.extend(names.iter().map(ToString::to_string));
                    Which::Names(names.iter().map(|name| key(name.as_str())).collect())
                }
                (None, Some(pattern)) => Which::Like(
                    Pattern::new(&pattern.to_ascii_lowercase())
                        .map_err(|_| BadMap::Pattern(pattern.clone()))?,
                ),
                (Some(_), Some(_)) | (None, None) => return Err(BadMap::Either),
            };
            for template in [&map.host, &map.domain] {
                fill(template, "node1")?;
            }
            nodes.maps.push((which, map));
            nodes.check_size()?;
        }
        Ok(nodes)
    }

    /// Takes the lines of a map's file: `NODE HOST DOMAIN`, `#` begins a comment.
    pub(crate) fn take_lines(&mut self, text: &str) -> Result<(), BadMap> {
        for (at, line) in text.lines().enumerate() {
            let at = at + 1;
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(node) = words.next() else { continue };
            let (Some(host), Some(domain), None) = (words.next(), words.next(), words.next())
            else {
                return Err(BadMap::Line(at));
            };
            let word = |reason: String| BadMap::Word { line: at, reason };
            let names = HostSet::nodes(node).map_err(|error| word(error.to_string()))?;
            let [name] = names.as_slice() else {
                return Err(word(format!("'{node}' is not one node")));
            };
            let place = Place {
                host: host
                    .parse()
                    .map_err(|error: BadHosts| word(error.to_string()))?,
                domain: domain
                    .parse()
                    .map_err(|error: BadName| word(error.to_string()))?,
            };
            if self.lines.insert(key(name.as_str()), place).is_some() {
                return Err(BadMap::Twice {
                    line: at,
                    node: node.to_owned(),
                });
            }
            self.names.push(name.to_string());
            self.check_size()?;
        }
        Ok(())
    }

    fn check_size(&self) -> Result<(), BadMap> {
        if self.names.len() > MAX_NODES {
            Err(BadMap::TooMany)
        } else {
            Ok(())
        }
    }

    /// Returns every node that is mapped by its name; those of patterns cannot be told.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Returns where a node's domain is; a full name is also looked for by its first part.
    pub(crate) fn place(&self, node: &str) -> Result<Place, NoPlace> {
        let found = self.find(node);
        match (found, node.split_once('.')) {
            (Err(NoPlace::Unknown(_)), Some((short, _))) => {
                self.find(short).map_err(|error| match error {
                    NoPlace::Unknown(_) => NoPlace::Unknown(node.to_owned()),
                    NoPlace::NoNumber { .. } | NoPlace::Host { .. } | NoPlace::Domain { .. } => {
                        error
                    }
                })
            }
            (found, _) => found,
        }
    }

    fn find(&self, node: &str) -> Result<Place, NoPlace> {
        let key = key(node);
        if let Some(place) = self.lines.get(&key) {
            return Ok(place.clone());
        }
        let knows = |which: &Which| match which {
            Which::Names(names) => names.contains(&key),
            Which::Like(pattern) => pattern.matches(&key),
        };
        let (_, map) = self
            .maps
            .iter()
            .find(|(which, _)| knows(which))
            .ok_or_else(|| NoPlace::Unknown(node.to_owned()))?;
        let filled = |template: &String| match fill(template, node) {
            Ok(Some(text)) => Ok(text),
            Ok(None) | Err(_) => Err(NoPlace::NoNumber {
                node: node.to_owned(),
                template: template.clone(),
            }),
        };
        let (host, domain) = (filled(&map.host)?, filled(&map.domain)?);
        Ok(Place {
            host: host.parse().map_err(|reason| NoPlace::Host {
                node: node.to_owned(),
                text: host,
                reason,
            })?,
            domain: domain.parse().map_err(|reason| NoPlace::Domain {
                node: node.to_owned(),
                text: domain,
                reason,
            })?,
        })
    }
}

fn key(node: &str) -> String {
    node.to_ascii_lowercase()
}

/// Fills a template; nothing where it wants a number and the node has none.
fn fill(template: &str, node: &str) -> Result<Option<String>, BadMap> {
    let mut text = String::new();
    let mut rest = template;
    while let Some((before, after)) = rest.split_once('{') {
        text.push_str(before);
        let (name, after) = after
            .split_once('}')
            .ok_or_else(|| BadMap::Placeholder(after.to_owned()))?;
        match name {
            "node" => text.push_str(node),
            "short" => text.push_str(node.split('.').next().unwrap_or(node)),
            "n" => match last_number(node) {
                Some(number) => text.push_str(number),
                None => return Ok(None),
            },
            other => return Err(BadMap::Placeholder(other.to_owned())),
        }
        rest = after;
    }
    text.push_str(rest);
    Ok(Some(text))
}

/// Returns the last number in a node's first part, zeros in front included.
fn last_number(node: &str) -> Option<&str> {
    let short = node.split('.').next()?;
    let end = short.rfind(|c: char| c.is_ascii_digit())? + 1;
    let upto = short.get(..end)?;
    let begin = upto
        .rfind(|c: char| !c.is_ascii_digit())
        .and_then(|at| Some(at + upto.get(at..)?.chars().next()?.len_utf8()))
        .unwrap_or(0);
    upto.get(begin..)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn map(nodes: &str, host: &str, domain: &str) -> Map {
        Map {
            nodes: Some(nodes.to_owned()),
            pattern: None,
            host: host.to_owned(),
            domain: domain.to_owned(),
        }
    }

    fn like(pattern: &str, host: &str, domain: &str) -> Map {
        Map {
            nodes: None,
            pattern: Some(pattern.to_owned()),
            host: host.to_owned(),
            domain: domain.to_owned(),
        }
    }

    #[track_caller]
    fn check(nodes: &Nodes, node: &str, host: &str, domain: &str) {
        let place = nodes.place(node).unwrap();
        let found = (place.host.to_string(), place.domain.to_string());
        assert_eq!(found, (host.to_owned(), domain.to_owned()), "{node}");
    }

    #[test]
    fn nodes_are_found_by_file_by_set_and_by_pattern() {
        let mut nodes = Nodes::new(vec![
            map("cloud[1-40]", "skirit{n}", "{node}"),
            like("cloud*", "old:7000", "was-{short}"),
            map("r2n[01-09]", "h{n}.example.org", "grid-{n}"),
        ])
        .unwrap();
        nodes
            .take_lines("# the odd ones\n cloud7  skirit99:9627\tgrid-a # moved\n\n")
            .unwrap();
        check(&nodes, "cloud8", "skirit8", "cloud8");
        check(&nodes, "Cloud8", "skirit8", "Cloud8");
        check(&nodes, "cloud7", "skirit99:9627", "grid-a");
        check(&nodes, "cloud99", "old:7000", "was-cloud99");
        check(&nodes, "r2n04", "h04.example.org", "grid-04");
        check(&nodes, "r2n04.example.org", "h04.example.org", "grid-04");
        assert_eq!(nodes.place("web"), Err(NoPlace::Unknown("web".to_owned())));
        assert_eq!(nodes.names().count(), 50);
    }

    #[test]
    fn what_is_no_map_is_refused() {
        let new = |map: Map| Nodes::new(vec![map]).map(drop).unwrap_err();
        assert_eq!(
            new(map("a", "{host}", "d")),
            BadMap::Placeholder("host".to_owned())
        );
        assert!(matches!(
            new(map("a", "h", "{node")),
            BadMap::Placeholder(_)
        ));
        assert!(matches!(new(map("a[1", "h", "d")), BadMap::Nodes(_)));
        assert!(matches!(new(like("[", "h", "d")), BadMap::Pattern(_)));
        assert_eq!(
            new(Map {
                nodes: None,
                ..map("a", "h", "d")
            }),
            BadMap::Either
        );
        for bad in [
            "a b",
            "a b c d",
            "a[1-2] h d",
            "a h/x d",
            "a h ../d",
            "a h d\nA h e",
        ] {
            assert!(Nodes::default().take_lines(bad).is_err(), "{bad}");
        }
        let nodes = Nodes::new(vec![like("*", "h{n}", "{node}")]).unwrap();
        assert!(matches!(nodes.place("web"), Err(NoPlace::NoNumber { .. })));
        assert!(matches!(nodes.place("a/1"), Err(NoPlace::Domain { .. })));
    }

    #[test]
    fn the_last_number_of_the_first_part_is_the_nodes() {
        for (node, number) in [
            ("cloud7", Some("7")),
            ("r2n04", Some("04")),
            ("a7-b", Some("7")),
            ("ü9", Some("9")),
            ("9", Some("9")),
            ("web", None),
            ("web.ex1.org", None),
            ("", None),
        ] {
            assert_eq!(last_number(node), number, "{node}");
        }
    }

    proptest! {
        #[test]
        fn no_node_makes_it_panic(node in ".{0,300}", template in ".{0,60}") {
            let _ = fill(&template, &node);
            let nodes = Nodes::new(vec![like("*", "h{n}", "{node}")]).unwrap();
            let _ = nodes.place(&node);
            let _ = Nodes::default().take_lines(&node);
        }
    }
}
