//! Who is in which group: `groups.toml` beside a site's policies, and patterns of principals.
//!
//! ```toml
//! [groups]
//! helpers = ["dave@EXAMPLE.ORG"]
//! operators = ["carol@EXAMPLE.ORG", "*/admin@EXAMPLE.ORG", "@helpers"]
//! ```
//! A member is a full principal, a pattern, or with `@` another group. Letters count as they are: alice@OTHER.ORG is not alice@EXAMPLE.ORG.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fmt,
    str::FromStr,
};

use serde::Deserialize;
use toml::Spanned;
use xman_common::name::{BadName, Principal};

/// The most groups in one file.
pub const MAX_GROUPS: usize = 1000;
/// The most members in all groups of one file together: a realm's dump put there by mistake does not fit.
pub const MAX_MEMBERS: usize = 100_000;
/// The longest name of a group, in bytes.
pub const MAX_GROUP_NAME: usize = 64;
/// How Unix groups are called in policies; no group of the file may look like one.
pub const UNIX: &str = "unix:";

const ANY: &str = "*";

/// Principals that look alike: `*` in the place of a component, or of the realm, stands for anything there but nothing.
///
/// `*@EXAMPLE.ORG` is everybody of the realm without an instance, `*/admin@EXAMPLE.ORG` everybody with the instance `admin`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct PrincipalPattern(Principal);

impl PrincipalPattern {
    /// Returns whether a principal looks like this.
    pub fn matches(&self, principal: &Principal) -> bool {
        let (wanted, given) = (self.parts(), Parts::of(principal));
        wanted.components.len() == given.components.len()
            && wanted
                .components
                .iter()
                .zip(&given.components)
                .all(|(wanted, given)| fits(wanted, given))
            && fits(wanted.realm, given.realm)
    }

    /// Returns the one principal that it stands for, where it has no `*`.
    pub fn exact(&self) -> Option<&Principal> {
        let parts = self.parts();
        let open = parts.realm == ANY || parts.components.contains(&ANY);
        (!open).then_some(&self.0)
    }

    fn parts(&self) -> Parts<'_> {
        Parts::of(&self.0)
    }
}

impl FromStr for PrincipalPattern {
    type Err = BadPattern;

    fn from_str(text: &str) -> Result<Self, BadPattern> {
        let principal: Principal = text.parse()?;
        let parts = Parts::of(&principal);
        let all = parts.components.iter().chain([&parts.realm]);
        let mixed = all.copied().find(|part| part.contains('*') && *part != ANY);
        if let Some(part) = mixed {
            return Err(BadPattern::PartOfComponent(part.to_owned()));
        }
        Ok(Self(principal))
    }
}

impl fmt::Display for PrincipalPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why a text is no pattern of principals.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadPattern {
    /// Without its `*` it would be no principal either.
    #[error(transparent)]
    Name(#[from] BadName),
    /// `*` beside other letters.
    #[error("'*' stands for a whole component, and '{0}' is more than that; write '*' alone")]
    PartOfComponent(String),
}

/// A principal taken apart at its unescaped `/` and `@`; the parts keep their escapes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Parts<'a> {
    pub(crate) components: Vec<&'a str>,
    /// What stands between the first `/` and the realm.
    pub(crate) instance: &'a str,
    pub(crate) realm: &'a str,
}

impl<'a> Parts<'a> {
    pub(crate) fn of(principal: &'a Principal) -> Self {
        let realm = principal.realm();
        let text = principal.as_str();
        let name = text
            .strip_suffix(realm)
            .and_then(|name| name.strip_suffix('@'))
            .unwrap_or(text);
        let mut components = Vec::new();
        let (mut rest, mut instance) = (name, "");
        while let Some((component, behind)) = split(rest) {
            if components.is_empty() {
                instance = behind;
            }
            components.push(component);
            rest = behind;
        }
        components.push(rest);
        Self {
            components,
            instance,
            realm,
        }
    }

    pub(crate) fn primary(&self) -> &'a str {
        self.components.first().copied().unwrap_or_default()
    }
}

/// Splits at the first unescaped slash.
fn split(text: &str) -> Option<(&str, &str)> {
    let mut escaped = false;
    let at = text.bytes().position(|byte| {
        let found = byte == b'/' && !escaped;
        escaped = byte == b'\\' && !escaped;
        found
    })?;
    Some((text.get(..at)?, text.get(at + 1..)?))
}

fn fits(wanted: &str, given: &str) -> bool {
    if wanted == ANY {
        !given.is_empty()
    } else {
        wanted == given
    }
}

/// Who is in which group.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    names: BTreeSet<String>,
    /// The groups, nested ones included, of each principal that is named in full.
    exact: HashMap<Principal, BTreeSet<String>>,
    patterns: Vec<(PrincipalPattern, BTreeSet<String>)>,
    warnings: Vec<String>,
}

impl Groups {
    /// Reads a file's text.
    ///
    /// # Errors
    /// All that is wrong, each with its line and column.
    pub fn parse(text: &str) -> Result<Self, Vec<Defect>> {
        let file: File = toml::from_str(text).map_err(|error| {
            let at = error.span().map_or(0, |span| span.start);
            vec![Defect::new(text, at, error.message().to_owned())]
        })?;
        let mut reading = Reading {
            text,
            defects: Vec::new(),
        };
        let direct = reading.members(&file);
        reading.no_cycles(&direct);
        if reading.defects.is_empty() {
            Ok(Self::collect(&direct))
        } else {
            Err(reading.defects)
        }
    }

    /// Returns the groups that somebody is in, also through other groups.
    pub fn of<'a>(&'a self, principal: &'a Principal) -> impl Iterator<Item = &'a str> {
        let exact = self.exact.get(principal).into_iter().flatten();
        let patterns = self
            .patterns
            .iter()
            .filter(|(pattern, _)| pattern.matches(principal))
            .flat_map(|(_, groups)| groups);
        let all: BTreeSet<&str> = exact.chain(patterns).map(String::as_str).collect();
        all.into_iter()
    }

    /// Returns all groups by name.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(String::as_str)
    }

    /// Returns whether there is a group of this name.
    pub fn contains(&self, name: &str) -> bool {
        self.names.contains(name)
    }

    /// Returns what is allowed and hardly meant.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    fn collect(direct: &BTreeMap<&str, Vec<Member>>) -> Self {
        let mut above: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
        for (group, members) in direct {
            for member in members {
                if let Member::Group(inner) = member {
                    above.entry(inner).or_default().insert(group);
                }
            }
        }
        let mut groups = Self {
            names: direct.keys().map(|name| (*name).to_owned()).collect(),
            ..Self::default()
        };
        let mut patterns: BTreeMap<String, (PrincipalPattern, BTreeSet<String>)> = BTreeMap::new();
        for (group, members) in direct {
            let all = with_those_above(group, &above);
            if members.is_empty() {
                groups
                    .warnings
                    .push(format!("group '{group}' has no members"));
            }
            for pattern in members.iter().filter_map(Member::pattern) {
                if pattern.parts().realm.chars().any(char::is_lowercase) {
                    groups.warnings.push(format!(
                        "group '{group}': the realm of {pattern} has small letters; realms are compared letter by letter, and nearly all are in capitals"
                    ));
                }
                match pattern.exact() {
                    Some(principal) => groups
                        .exact
                        .entry(principal.clone())
                        .or_default()
                        .extend(all.iter().cloned()),
                    None => patterns
                        .entry(pattern.to_string())
                        .or_insert_with(|| (pattern.clone(), BTreeSet::new()))
                        .1
                        .extend(all.iter().cloned()),
                }
            }
        }
        groups.patterns = patterns.into_values().collect();
        groups
    }
}

/// What is wrong with the file, and where; lines and columns are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{line}:{column}: {what}")]
pub struct Defect {
    /// The line.
    pub line: usize,
    /// The character in the line.
    pub column: usize,
    /// What, and what to do.
    pub what: String,
}

impl Defect {
    pub(crate) fn new(text: &str, at: usize, what: String) -> Self {
        let before = text.get(..at).unwrap_or(text);
        let line_begins = before.rfind('\n').map_or(0, |newline| newline + 1);
        Self {
            line: before.matches('\n').count() + 1,
            column: before
                .get(line_begins..)
                .unwrap_or_default()
                .chars()
                .count()
                + 1,
            what,
        }
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    #[serde(default)]
    groups: BTreeMap<Spanned<String>, Vec<Spanned<String>>>,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Member<'a> {
    Group(&'a str),
    Pattern(PrincipalPattern),
}

impl Member<'_> {
    fn pattern(&self) -> Option<&PrincipalPattern> {
        match self {
            Self::Group(_) => None,
            Self::Pattern(pattern) => Some(pattern),
        }
    }
}

struct Reading<'a> {
    text: &'a str,
    defects: Vec<Defect>,
}

impl Reading<'_> {
    fn wrong(&mut self, at: &Spanned<String>, what: String) {
        self.defects
            .push(Defect::new(self.text, at.span().start, what));
    }

    fn members<'f>(&mut self, file: &'f File) -> BTreeMap<&'f str, Vec<Member<'f>>> {
        let names: BTreeSet<&str> = file
            .groups
            .keys()
            .map(|name| name.get_ref().as_str())
            .collect();
        if let Some(name) = file.groups.keys().nth(MAX_GROUPS) {
            self.wrong(
                name,
                format!(
                    "{} groups; at most {MAX_GROUPS} are read",
                    file.groups.len()
                ),
            );
        }
        let mut left = MAX_MEMBERS;
        let mut direct = BTreeMap::new();
        for (name, texts) in &file.groups {
            if let Some(why) = bad_group_name(name.get_ref()) {
                self.wrong(name, format!("group '{}': {why}", shown(name.get_ref())));
            }
            match left.checked_sub(texts.len()) {
                Some(rest) => left = rest,
                None => {
                    self.wrong(
                        name,
                        format!("at most {MAX_MEMBERS} members are read in all; use a pattern"),
                    );
                    break;
                }
            }
            let mut members = Vec::new();
            let mut seen = BTreeSet::new();
            for text in texts {
                if !seen.insert(text.get_ref()) {
                    self.wrong(
                        text,
                        format!("'{}' stands there twice", shown(text.get_ref())),
                    );
                    continue;
                }
                match member(text.get_ref(), &names) {
                    Ok(member) => members.push(member),
                    Err(why) => self.wrong(text, why),
                }
            }
            direct.insert(name.get_ref().as_str(), members);
        }
        direct
    }

    /// Takes away, again and again, groups whose inner groups are all taken away: what is left stands in a circle or above one.
    fn no_cycles(&mut self, direct: &BTreeMap<&str, Vec<Member<'_>>>) {
        let mut open: BTreeMap<&str, BTreeSet<&str>> = direct
            .iter()
            .map(|(group, members)| {
                let inner = members.iter().filter_map(|member| match member {
                    Member::Group(inner) => Some(*inner),
                    Member::Pattern(_) => None,
                });
                (*group, inner.collect())
            })
            .collect();
        loop {
            let closed: Vec<&str> = open
                .iter()
                .filter(|(_, inner)| inner.iter().all(|inner| !open.contains_key(inner)))
                .map(|(group, _)| *group)
                .collect();
            if closed.is_empty() {
                break;
            }
            for group in closed {
                open.remove(group);
            }
        }
        if let Some(group) = open.keys().next() {
            let names: Vec<&str> = open.keys().copied().take(5).collect();
            let at = self.text.find(group).unwrap_or(0);
            self.defects.push(Defect::new(
                self.text,
                at,
                format!(
                    "groups hold one another in a circle ({}); take one out of another",
                    names.join(", ")
                ),
            ));
        }
    }
}

fn bad_group_name(name: &str) -> Option<String> {
    if name.is_empty() {
        Some("a group needs a name".to_owned())
    } else if name.len() > MAX_GROUP_NAME {
        Some(format!("a name has at most {MAX_GROUP_NAME} bytes"))
    } else if name.starts_with(UNIX) {
        Some(format!(
            "names with '{UNIX}' in front are those of Unix groups; call it otherwise"
        ))
    } else if !name
        .chars()
        .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    {
        Some("a name is made of letters, digits, '.', '-' and '_'".to_owned())
    } else {
        None
    }
}

fn member<'a>(text: &'a str, names: &BTreeSet<&str>) -> Result<Member<'a>, String> {
    match text.strip_prefix('@') {
        Some(group) if names.contains(group) => Ok(Member::Group(group)),
        Some(group) => Err(format!(
            "there is no group '{}'; define it in [groups], or take it out",
            shown(group)
        )),
        None => text
            .parse()
            .map(Member::Pattern)
            .map_err(|bad: BadPattern| bad.to_string()),
    }
}

fn shown(text: &str) -> String {
    text.chars()
        .take(MAX_GROUP_NAME)
        .flat_map(char::escape_debug)
        .collect()
}

fn with_those_above(group: &str, above: &BTreeMap<&str, BTreeSet<&str>>) -> BTreeSet<String> {
    let mut found = BTreeSet::from([group.to_owned()]);
    let mut next = vec![group];
    while let Some(group) = next.pop() {
        for outer in above.get(group).into_iter().flatten() {
            if found.insert((*outer).to_owned()) {
                next.push(outer);
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::{prelude::*, sample::select};

    use super::*;

    fn principal(text: &str) -> Principal {
        text.parse().unwrap()
    }

    fn groups_of(text: &str, who: &str) -> Vec<String> {
        let groups = Groups::parse(text).unwrap();
        groups.of(&principal(who)).map(str::to_owned).collect()
    }

    #[test]
    fn a_principal_comes_apart_at_unescaped_slashes_and_its_realm() {
        for (text, components, instance, realm) in [
            ("alice@EX.ORG", vec!["alice"], "", "EX.ORG"),
            (
                "alice/admin@EX.ORG",
                vec!["alice", "admin"],
                "admin",
                "EX.ORG",
            ),
            ("a/b/c@EX", vec!["a", "b", "c"], "b/c", "EX"),
            (r"a\/b/c@EX", vec![r"a\/b", "c"], "c", "EX"),
            (r"a\@EX/c@EX", vec![r"a\@EX", "c"], "c", "EX"),
            (r"a\\/c@EX", vec![r"a\\", "c"], "c", "EX"),
            ("alice/@EX", vec!["alice", ""], "", "EX"),
            ("EX@EX", vec!["EX"], "", "EX"),
        ] {
            let principal = principal(text);
            let parts = Parts::of(&principal);
            assert_eq!(parts.components, components, "{text}");
            assert_eq!((parts.instance, parts.realm), (instance, realm), "{text}");
            assert_eq!(parts.primary(), components[0], "{text}");
        }
    }

    #[test]
    fn a_star_stands_for_one_whole_component() {
        for (pattern, who, expected) in [
            ("*@EX.ORG", "alice@EX.ORG", true),
            ("*@EX.ORG", "alice/admin@EX.ORG", false),
            ("*@EX.ORG", "alice@OTHER.ORG", false),
            ("*@EX.ORG", "alice@ex.org", false),
            ("*/admin@EX.ORG", "alice/admin@EX.ORG", true),
            ("*/admin@EX.ORG", "alice/root@EX.ORG", false),
            ("*/admin@EX.ORG", "alice@EX.ORG", false),
            ("*/admin@EX.ORG", "/admin@EX.ORG", false),
            ("*/admin@EX.ORG", r"alice\/admin@EX.ORG", false),
            ("*/admin@EX.ORG", "a/b/admin@EX.ORG", false),
            ("host/*@EX.ORG", "host/node1@EX.ORG", true),
            ("host/*@EX.ORG", "host/@EX.ORG", false),
            ("alice@*", "alice@EX.ORG", true),
            ("*/*@*", "a/b@C", true),
            ("alice@EX.ORG", "alice@EX.ORG", true),
            ("alice@EX.ORG", "Alice@EX.ORG", false),
            (r"a\@B@EX.ORG", r"a\@B@EX.ORG", true),
        ] {
            let pattern: PrincipalPattern = pattern.parse().unwrap();
            assert_eq!(
                pattern.matches(&principal(who)),
                expected,
                "{pattern} {who}"
            );
        }
    }

    #[test]
    fn texts_that_are_no_patterns_are_refused() {
        for bad in [
            "",
            "*",
            "alice",
            "al*@EX.ORG",
            "*x/admin@EX.ORG",
            "alice@EX.*",
            "**@EX.ORG",
            "@EX.ORG",
            "alice@",
            "a@b@C",
            "al\nice@EX.ORG",
        ] {
            assert!(bad.parse::<PrincipalPattern>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn groups_hold_principals_patterns_and_groups() {
        let text = r#"
            [groups]
            helpers = ["dave@EX.ORG"]
            operators = ["carol@EX.ORG", "*/admin@EX.ORG", "@helpers"]
            staff = ["@operators", "carol@EX.ORG"]
        "#;
        assert_eq!(
            groups_of(text, "dave@EX.ORG"),
            ["helpers", "operators", "staff"]
        );
        assert_eq!(groups_of(text, "carol@EX.ORG"), ["operators", "staff"]);
        assert_eq!(
            groups_of(text, "alice/admin@EX.ORG"),
            ["operators", "staff"]
        );
        for stranger in [
            "alice@EX.ORG",
            "carol@OTHER.ORG",
            "carol/x@EX.ORG",
            "operators@EX.ORG",
        ] {
            assert!(groups_of(text, stranger).is_empty(), "{stranger}");
        }
        assert!(groups_of("", "carol@EX.ORG").is_empty());
    }

    #[test]
    fn what_is_wrong_with_the_file_is_told_with_its_place_and_all_at_once() {
        for (text, expected) in [
            ("[groups]\na = [\"alice\"]", "2:6: 'alice' names no realm"),
            (
                "[groups]\na = [\"al*@EX.ORG\"]",
                "2:6: '*' stands for a whole component",
            ),
            ("[groups]\na = [\"@b\"]", "2:6: there is no group 'b'"),
            (
                "[groups]\na = [\"x@Y\", \"x@Y\"]",
                "2:13: 'x@Y' stands there twice",
            ),
            (
                "[groups]\n\"unix:a\" = []",
                "2:1: group 'unix:a': names with 'unix:'",
            ),
            ("[groups]\n\"\" = []", "2:1: group '': a group needs a name"),
            (
                "[groups]\n\"a b\" = []",
                "2:1: group 'a b': a name is made of",
            ),
            (
                "[groups]\na = [\"@a\"]",
                "groups hold one another in a circle (a)",
            ),
            (
                "[groups]\na = [\"@b\"]\nb = [\"@a\"]",
                "groups hold one another in a circle (a, b)",
            ),
            ("[groups]\na = []\na = []", "3:1: duplicate key"),
            ("[group]\na = []", "1:2: unknown field `group`"),
            ("x = 1\n[groups]\na = []", "1:1: unknown field `x`"),
            ("[groups]\na = 1", "2:5: invalid type"),
            ("[groups]\na = [1]", "2:6: invalid type"),
            ("[groups\n", "1:8: "),
        ] {
            let defects = Groups::parse(text).unwrap_err();
            let told: Vec<String> = defects.iter().map(ToString::to_string).collect();
            assert!(told[0].contains(expected), "{text:?}: {told:?}");
        }
        let defects =
            Groups::parse("[groups]\na = [\"alice\", \"@b\", \"x@Y\"]\nc = [\"@d\"]").unwrap_err();
        assert_eq!(defects.len(), 3, "{defects:?}");
        let long = format!("[groups]\n{} = []", "a".repeat(MAX_GROUP_NAME + 1));
        assert!(
            Groups::parse(&long).unwrap_err()[0]
                .what
                .contains("at most 64 bytes")
        );
        let many: String = (0..=MAX_GROUPS).map(|n| format!("g{n} = []\n")).collect();
        assert!(
            Groups::parse(&format!("[groups]\n{many}")).unwrap_err()[0]
                .what
                .contains("1001 groups")
        );
        let members: String = (0..=MAX_MEMBERS).map(|n| format!("\"u{n}@EX\",")).collect();
        assert!(
            Groups::parse(&format!("[groups]\na = [{members}]")).unwrap_err()[0]
                .what
                .contains("at most 100000 members")
        );
    }

    #[test]
    fn what_is_hardly_meant_is_warned_about() {
        let groups = Groups::parse("[groups]\na = []\nb = [\"alice@ex.org\"]").unwrap();
        assert!(groups.warnings()[0].contains("'a' has no members"));
        assert!(groups.warnings()[1].contains("small letters"));
    }

    proptest! {
        /// Whatever stands between groups that hold each other only downwards, membership is what following the names by hand gives.
        #[test]
        fn membership_is_transitive_and_nothing_else(
            files in proptest::collection::vec(
                proptest::collection::btree_set(select(vec!["alice@EX", "bob@EX", "*/admin@EX", "*@EX", "@g0", "@g1", "@g2", "@g3"]), 0..5),
                1..5,
            ),
            who in select(vec!["alice@EX", "bob@EX", "alice/admin@EX", "alice@EY", "bob/admin@EY"]),
        ) {
            let inner_only = |group: usize, member: &str| match member.strip_prefix("@g") {
                Some(inner) => inner.parse::<usize>().unwrap() < group,
                None => true,
            };
            let members: Vec<Vec<&str>> = files.iter().enumerate()
                .map(|(group, members)| members.iter().copied().filter(|member| inner_only(group, member)).collect())
                .collect();
            let mut text = "[groups]\n".to_owned();
            for (group, members) in members.iter().enumerate() {
                text += &format!("g{group} = {members:?}\n");
            }
            let principal = principal(who);
            let mut inside: Vec<bool> = Vec::new();
            for members in &members {
                let is_in = members.iter().any(|member| match member.strip_prefix("@g") {
                    Some(inner) => inside[inner.parse::<usize>().unwrap()],
                    None => member.parse::<PrincipalPattern>().unwrap().matches(&principal),
                });
                inside.push(is_in);
            }
            let expected: Vec<String> = inside.iter().enumerate().filter(|(_, is_in)| **is_in).map(|(group, _)| format!("g{group}")).collect();
            let groups = Groups::parse(&text).unwrap();
            prop_assert_eq!(groups.of(&principal).map(str::to_owned).collect::<Vec<_>>(), expected);
        }

        /// No text makes the reader fail in another way than by saying what is wrong.
        #[test]
        fn any_text_is_read_or_refused(text in "\\PC*|(\\[groups\\]\n([a-c] = \\[(\"[@*a-c/]{0,4}@?E?\",?){0,3}\\]\n){0,3})") {
            if let Err(defects) = Groups::parse(&text) {
                prop_assert!(!defects.is_empty());
            }
        }

        #[test]
        fn a_pattern_without_a_star_matches_itself_alone(a in "[a-c]{1,2}(/[a-c]{0,2})?@[A-C]{1,2}", b in "[a-c]{1,2}(/[a-c]{0,2})?@[A-C]{1,2}") {
            let pattern: PrincipalPattern = a.parse().unwrap();
            prop_assert_eq!(pattern.matches(&principal(&b)), a == b);
            prop_assert_eq!(pattern.exact(), Some(&principal(&a)));
        }
    }
}
