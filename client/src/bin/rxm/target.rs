//! From what people call domains to the domains themselves.

use std::collections::{HashMap, HashSet};

use glob::Pattern;
use uuid::Uuid;
use xman_client::{Address, Caller, Explanation, Kind, fleet};
use xman_common::{
    name::{DomainName, DomainRef},
    protocol::{Code, DomainRow, Item, List, MAX_PATTERN, MAX_PATTERNS, Request},
};

use crate::{
    output::{Complaints, named},
    setting::{Setting, Stop, misfit},
};

/// Sessions that are kept for the call that follows: more would take the descriptors that it needs.
const KEPT_SESSIONS: usize = 64;

/// What somebody calls a domain, or several.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Wanted {
    /// As typed.
    pub(crate) typed: String,
    /// The hosts before the slash; all hosts where there is none.
    pub(crate) hosts: Option<Vec<Address>>,
    pub(crate) name: Called,
}

/// What stands after the slash.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Called {
    Uuid(Uuid),
    Exactly(DomainName),
    Like(Pattern),
}

impl Called {
    fn parse(text: &str) -> Result<Self, String> {
        if let Ok(uuid) = Uuid::try_parse(text) {
            return Ok(Self::Uuid(uuid));
        }
        if text.contains(['*', '?', '[']) {
            if text.len() > MAX_PATTERN {
                return Err(format!(
                    "a pattern of {} bytes; the longest allowed has {MAX_PATTERN}",
                    text.len()
                ));
            }
            return Pattern::new(text)
                .map(Self::Like)
                .map_err(|error| format!("'{text}' is no pattern: {error}"));
        }
        text.parse()
            .map(Self::Exactly)
            .map_err(|error| error.to_string())
    }

    /// Returns the pattern that finds it.
    fn pattern(&self) -> String {
        match self {
            Self::Uuid(uuid) => uuid.to_string(),
            Self::Exactly(name) => name.to_string(),
            Self::Like(pattern) => pattern.as_str().to_owned(),
        }
    }

    fn is(&self, row: &DomainRow) -> bool {
        match self {
            Self::Uuid(uuid) => row.uuid == *uuid,
            Self::Exactly(name) => row.name == *name,
            Self::Like(pattern) => pattern.matches(row.name.as_str()),
        }
    }

    /// Returns whether it may mean several domains.
    pub(crate) fn is_pattern(&self) -> bool {
        matches!(self, Self::Like(_))
    }
}

impl Wanted {
    /// Reads `NAME`, `UUID`, a pattern, or one of them after `HOST/`.
    pub(crate) fn parse(typed: &str, setting: &Setting) -> Result<Self, Stop> {
        let (hosts, name) = split(typed);
        let hosts = match hosts {
            None => None,
            Some(text) => match setting.hosts_before_slash(text)? {
                hosts if hosts.is_empty() => {
                    return Err(Stop::Usage(format!(
                        "'{typed}' names no host before its slash"
                    )));
                }
                hosts => Some(hosts),
            },
        };
        let name =
            Called::parse(name).map_err(|error| Stop::Usage(format!("'{typed}': {error}")))?;
        Ok(Self {
            typed: typed.to_owned(),
            hosts,
            name,
        })
    }

    /// Reads several.
    pub(crate) fn parse_all(typed: &[String], setting: &Setting) -> Result<Vec<Self>, Stop> {
        typed
            .iter()
            .map(|typed| Self::parse(typed, setting))
            .collect()
    }

    /// Returns the hosts on which it is looked for.
    pub(crate) fn places(&self, setting: &Setting) -> Result<Vec<Address>, Stop> {
        match &self.hosts {
            Some(hosts) => Ok(hosts.clone()),
            None => setting.hosts(),
        }
    }
}

/// Cuts at the first slash outside brackets: `r[0-8/2]/web` is `web` on five hosts.
pub(crate) fn split(typed: &str) -> (Option<&str>, &str) {
    let mut inside = false;
    for (at, c) in typed.char_indices() {
        match c {
            '[' => inside = true,
            ']' => inside = false,
            '/' if !inside => {
                let (host, rest) = typed.split_at(at);
                return (Some(host), rest.get(1..).unwrap_or_default());
            }
            _ => {}
        }
    }
    (None, typed)
}

/// A domain on its host.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Target {
    pub(crate) address: Address,
    pub(crate) domain: DomainRef,
    /// As the host listed it, where it was asked.
    pub(crate) row: Option<DomainRow>,
}

impl Target {
    /// Returns `HOST/NAME`, or `HOST/UUID` where the name is not known.
    pub(crate) fn label(&self) -> String {
        match &self.row {
            Some(row) => format!("{}/{}", self.address, row.name),
            None => format!("{}/{}", self.address, self.domain),
        }
    }
}

/// What is to be done with the targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Only look: what is found counts.
    Read,
    /// Look at what the host lists of it.
    Show,
    /// Ask about it, even about what one may not see.
    Explain,
    /// Change: nothing is guessed.
    Change,
}

/// Domains found, and sessions with their hosts.
pub(crate) struct Found {
    pub(crate) targets: Vec<Target>,
    pub(crate) callers: HashMap<Address, Caller>,
    /// Hosts that patterns could not be looked up on.
    pub(crate) silent: Vec<(Address, Explanation)>,
}

/// A host's domains, or why it did not tell.
type Answer = Result<Vec<DomainRow>, Explanation>;

/// Finds the domains that are meant.
pub(crate) async fn find(
    setting: &Setting,
    wanted: &[Wanted],
    purpose: Purpose,
) -> Result<Found, Stop> {
    let mut searches = Vec::new();
    for wanted in wanted {
        searches.push((wanted.clone(), wanted.places(setting)?));
    }
    setting.check_ticket().await?;
    let rehearses = setting.dry_run && purpose == Purpose::Change;
    if let Some(targets) = known(&searches, purpose).filter(|_| !rehearses) {
        return Ok(Found {
            targets,
            callers: HashMap::new(),
            silent: Vec::new(),
        });
    }
    let (answers, callers) = look(setting, &searches).await;
    match choose(&searches, &answers, purpose) {
        Ok((targets, silent)) => Ok(Found {
            targets,
            callers,
            silent,
        }),
        Err(doubts) => {
            let refused = refuse(setting, doubts, purpose);
            if purpose == Purpose::Change && searches.len() > 1 {
                setting.output.note("nothing was changed");
            }
            Err(refused)
        }
    }
}

/// Finds the one domain that is meant, with a session with its host where there is one.
pub(crate) async fn find_one(
    setting: &Setting,
    typed: &str,
    purpose: Purpose,
) -> Result<(Target, Caller, Found), Stop> {
    let wanted = Wanted::parse(typed, setting)?;
    let mut found = find(setting, &[wanted], purpose).await?;
    let labels: Vec<_> = found.targets.iter().map(Target::label).collect();
    match found.targets.pop() {
        Some(target) if found.targets.is_empty() => {
            let caller = found
                .callers
                .remove(&target.address)
                .unwrap_or_else(|| setting.caller(&target.address));
            Ok((target, caller, found))
        }
        _ => Err(Stop::Usage(format!(
            "'{typed}' means {} domains and only one can be taken here: {}",
            labels.len(),
            named(&labels)
        ))),
    }
}

/// A UUID on one host needs no look-up, nor does a name that is only looked at.
fn known(searches: &[(Wanted, Vec<Address>)], purpose: Purpose) -> Option<Vec<Target>> {
    let target = |(wanted, places): &(Wanted, Vec<Address>)| {
        let [address] = places.as_slice() else {
            return None;
        };
        let domain = match (&wanted.name, purpose) {
            (Called::Like(_), _) | (_, Purpose::Show) => return None,
            (Called::Uuid(uuid), _) => DomainRef::Uuid(*uuid),
            (Called::Exactly(name), Purpose::Read | Purpose::Explain) => {
                DomainRef::Name(name.clone())
            }
            (Called::Exactly(_), Purpose::Change) => return None,
        };
        Some(Target {
            address: address.clone(),
            domain,
            row: None,
        })
    };
    searches.iter().map(target).collect()
}

async fn look(
    setting: &Setting,
    searches: &[(Wanted, Vec<Address>)],
) -> (Vec<(Address, Answer)>, HashMap<Address, Caller>) {
    let mut questions: Vec<(Address, Vec<String>)> = Vec::new();
    let mut places = HashMap::new();
    for (wanted, hosts) in searches {
        for host in hosts {
            let at = *places.entry(host.clone()).or_insert_with(|| {
                questions.push((host.clone(), Vec::new()));
                questions.len() - 1
            });
            if let Some((_, patterns)) = questions.get_mut(at) {
                patterns.push(wanted.name.pattern());
            }
        }
    }
    let keep = questions.len() <= KEPT_SESSIONS;
    let results = fleet::all(questions, fleet::WIDTH, |(address, patterns)| async move {
        let mut caller = setting.caller(&address);
        let answer = rows(setting, &mut caller, &patterns, &[]).await;
        let is_useful = answer.as_ref().is_ok_and(|rows| !rows.is_empty());
        (address, answer, (keep && is_useful).then_some(caller))
    })
    .await;
    let mut callers = HashMap::new();
    let mut answers = Vec::new();
    for (address, answer, caller) in results {
        callers.extend(caller.map(|caller| (address.clone(), caller)));
        answers.push((address, answer));
    }
    (answers, callers)
}

/// Asks one host for the domains that match any of the patterns; for all without any.
pub(crate) async fn rows(
    setting: &Setting,
    caller: &mut Caller,
    patterns: &[String],
    states: &[xman_common::protocol::DomainState],
) -> Answer {
    let mut chunks: Vec<&[String]> = patterns.chunks(MAX_PATTERNS).collect();
    if chunks.is_empty() {
        chunks.push(&[]);
    }
    let mut found = Vec::new();
    let mut known = HashSet::new();
    for chunk in chunks {
        let list = List {
            patterns: chunk.to_vec(),
            states: states.to_vec(),
        };
        let (_, items) = setting.ask(caller, &Request::List(list)).await?;
        for item in items {
            let Item::Domain(row) = item else {
                return Err(misfit());
            };
            if known.insert((row.uuid, row.hypervisor.clone())) {
                found.push(row);
            }
        }
    }
    Ok(found)
}

/// Why it is not clear which domains are meant.
#[derive(Debug, PartialEq)]
enum Doubt {
    /// Nowhere, and everybody answered.
    Nowhere { typed: String, hosts: Vec<Address> },
    /// In several places, each as HOST/NAME.
    Ambiguous {
        typed: String,
        candidates: Vec<String>,
    },
    /// Hosts that did not answer could have it.
    Silent {
        typed: String,
        host: Address,
        error: Explanation,
        others: usize,
        candidate: Option<String>,
    },
}

/// The domains that are meant, and the hosts that patterns could not be looked up on.
type Chosen = (Vec<Target>, Vec<(Address, Explanation)>);

/// Decides which domains are meant. A host on which the caller has no right has none of the caller's domains.
fn choose(
    searches: &[(Wanted, Vec<Address>)],
    answers: &[(Address, Answer)],
    purpose: Purpose,
) -> Result<Chosen, Vec<Doubt>> {
    let answer: HashMap<&Address, &Answer> = answers
        .iter()
        .map(|(address, answer)| (address, answer))
        .collect();
    let mut targets: Vec<Target> = Vec::new();
    let mut chosen = HashSet::new();
    let mut silent: Vec<(Address, Explanation)> = Vec::new();
    let mut doubts = Vec::new();
    for (wanted, places) in searches {
        let mut matches = Vec::new();
        let mut mute = Vec::new();
        for place in places {
            match answer.get(place) {
                Some(Ok(rows)) => {
                    matches.extend(rows.iter().filter(|row| wanted.name.is(row)).map(|row| {
                        Target {
                            address: place.clone(),
                            domain: DomainRef::Uuid(row.uuid),
                            row: Some(row.clone()),
                        }
                    }))
                }
                Some(Err(error)) if error.code == Code::Denied.name() && places.len() > 1 => {}
                Some(Err(error)) => mute.push((place.clone(), error.clone())),
                None => {}
            }
        }
        match doubt(wanted, places, &matches, &mute, purpose) {
            Some(doubt) => doubts.push(doubt),
            None => {
                targets.extend(
                    matches
                        .into_iter()
                        .filter(|t| chosen.insert((t.address.clone(), t.domain.clone()))),
                );
                for (host, error) in mute {
                    if !silent.iter().any(|(known, _)| *known == host) {
                        silent.push((host, error));
                    }
                }
            }
        }
    }
    if doubts.is_empty() {
        Ok((targets, silent))
    } else {
        Err(doubts)
    }
}

fn doubt(
    wanted: &Wanted,
    places: &[Address],
    matches: &[Target],
    mute: &[(Address, Explanation)],
    purpose: Purpose,
) -> Option<Doubt> {
    let typed = wanted.typed.clone();
    let silence = |candidate: Option<&Target>| {
        mute.first().map(|(host, error)| Doubt::Silent {
            typed: typed.clone(),
            host: host.clone(),
            error: error.clone(),
            others: mute.len() - 1,
            candidate: candidate.map(Target::label),
        })
    };
    match (&wanted.name, matches) {
        (_, []) => silence(None).or(Some(Doubt::Nowhere {
            typed: typed.clone(),
            hosts: places.to_vec(),
        })),
        (Called::Like(_), _) | (Called::Uuid(_), [_]) => None,
        (Called::Exactly(_), [one]) => match purpose {
            Purpose::Change => silence(Some(one)),
            Purpose::Read | Purpose::Show | Purpose::Explain => None,
        },
        (Called::Exactly(_) | Called::Uuid(_), several) => Some(Doubt::Ambiguous {
            typed: typed.clone(),
            candidates: candidates(several),
        }),
    }
}

/// As HOST/NAME; where one host has several of the name, they are told apart by their UUIDs.
fn candidates(several: &[Target]) -> Vec<String> {
    let mut labels: Vec<_> = several.iter().map(Target::label).collect();
    labels.dedup();
    if labels.len() == several.len() {
        return labels;
    }
    several
        .iter()
        .map(
            |Target {
                 address, domain, ..
             }| format!("{address}/{domain}"),
        )
        .collect()
}

fn refuse(setting: &Setting, doubts: Vec<Doubt>, purpose: Purpose) -> Stop {
    let mut complaints = Complaints::default();
    let mut kinds = HashSet::new();
    let who = match &setting.on_behalf_of {
        None => "you".to_owned(),
        Some(other) => other.to_string(),
    };
    for doubt in doubts {
        kinds.insert(complain(&mut complaints, doubt, purpose, &who));
    }
    complaints.say(&setting.output);
    let mut tally = crate::exit::Tally::default();
    kinds.into_iter().for_each(|kind| tally.failed(kind));
    Stop::Code(tally.code())
}

fn complain(complaints: &mut Complaints, doubt: Doubt, purpose: Purpose, who: &str) -> Kind {
    let refused = |code, what: String, advice: &str| Explanation {
        kind: Kind::Refused,
        code,
        what,
        advice: advice.to_owned(),
        is_common: false,
    };
    match doubt {
        Doubt::Nowhere { typed, hosts } => {
            let asked: Vec<_> = hosts.iter().map(Address::to_string).collect();
            let what = format!(
                "no such domain, or {who} may not see it (asked {})",
                named(&asked)
            );
            let advice = match purpose {
                Purpose::Explain => "HOST/NAME asks one host about the name, seen or not",
                Purpose::Read | Purpose::Show | Purpose::Change => {
                    "`rxm list` shows those that may be seen"
                }
            };
            complaints.add(typed, &refused("not-found", what, advice));
            Kind::Refused
        }
        Doubt::Ambiguous { typed, candidates } => {
            let what = format!(
                "{} domains have that name: {}",
                candidates.len(),
                named(&candidates)
            );
            complaints.add(
                typed,
                &refused("ambiguous", what, "say which, as HOST/NAME or HOST/UUID"),
            );
            Kind::Refused
        }
        Doubt::Silent { error, .. } if error.is_common => {
            complaints.add("", &error);
            error.kind
        }
        Doubt::Silent {
            host,
            error,
            candidate: None,
            others: 0,
            ..
        } => {
            complaints.add(host.to_string(), &error);
            error.kind
        }
        Doubt::Silent {
            typed,
            host,
            error,
            others,
            candidate,
        } => {
            let more = if others == 0 {
                String::new()
            } else {
                format!(" and {others} more hosts are silent too")
            };
            let advice = match candidate {
                Some(candidate) => format!(
                    "nothing was changed, since it could have that name as well; {candidate} names the one that was found"
                ),
                None => "nothing was found on the others; HOST/NAME asks one host only".to_owned(),
            };
            let what = format!(
                "{host} does not tell whether it has such a domain ({}){more}",
                error.what
            );
            let kind = error.kind;
            complaints.add(
                typed,
                &Explanation {
                    what,
                    advice,
                    ..error
                },
            );
            kind
        }
    }
}

#[cfg(test)]
mod tests {
    use xman_common::protocol::DomainState;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse().unwrap()
    }

    fn row(name: &str, number: u128) -> DomainRow {
        DomainRow {
            name: name.parse().unwrap(),
            uuid: Uuid::from_u128(number),
            hypervisor: "test:///default".to_owned(),
            id: Some(1),
            state: DomainState::Running,
            reason: String::new(),
            memory_kib: 1024,
            max_memory_kib: 1024,
            vcpus: 1,
            max_vcpus: 1,
            cpu_time_ns: 0,
            autostart: false,
            persistent: true,
            saved: false,
            since_ms: None,
            metadata: xman_common::protocol::Metadata::default(),
            metadata_trouble: String::new(),
            age_ms: 0,
            stale: false,
        }
    }

    fn wanted(text: &str) -> Wanted {
        let (hosts, name) = split(text);
        Wanted {
            typed: text.to_owned(),
            hosts: hosts.map(|host| vec![address(host)]),
            name: Called::parse(name).unwrap(),
        }
    }

    fn error(kind: Kind, code: &'static str) -> Explanation {
        Explanation {
            kind,
            code,
            what: "unreachable".to_owned(),
            advice: String::new(),
            is_common: false,
        }
    }

    fn fleet() -> Vec<(Address, Answer)> {
        vec![
            (address("a"), Ok(vec![row("web", 1), row("db", 2)])),
            (
                address("b"),
                Ok(vec![row("web", 3), row("grid-1", 4), row("grid-2", 5)]),
            ),
        ]
    }

    fn with_silent() -> Vec<(Address, Answer)> {
        let mut answers = fleet();
        answers.push((address("c"), Err(error(Kind::Unreachable, "unreachable"))));
        answers
    }

    fn pick(
        text: &str,
        answers: &[(Address, Answer)],
        purpose: Purpose,
    ) -> Result<Vec<String>, Vec<Doubt>> {
        let wanted = wanted(text);
        let all: Vec<_> = answers.iter().map(|(address, _)| address.clone()).collect();
        let places = wanted.hosts.clone().unwrap_or(all);
        choose(&[(wanted, places)], answers, purpose)
            .map(|(targets, _)| targets.iter().map(Target::label).collect())
    }

    #[test]
    fn arguments_are_cut_at_the_slash_outside_brackets() {
        assert_eq!(split("web"), (None, "web"));
        assert_eq!(split("a/web"), (Some("a"), "web"));
        assert_eq!(split("[::1]:7/web"), (Some("[::1]:7"), "web"));
        assert_eq!(split("r[0-8/2]/web"), (Some("r[0-8/2]"), "web"));
        assert_eq!(split("/web"), (Some(""), "web"));
    }

    #[test]
    fn names_uuids_and_patterns_are_told_apart() {
        assert!(matches!(Called::parse("web"), Ok(Called::Exactly(_))));
        assert!(matches!(
            Called::parse("123e4567-e89b-12d3-a456-426614174000"),
            Ok(Called::Uuid(_))
        ));
        assert!(matches!(Called::parse("grid-*"), Ok(Called::Like(_))));
        for bad in ["", "..", "a\nb", "[", "a***b", &"x*".repeat(200)] {
            assert!(Called::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_unique_name_is_found_and_an_ambiguous_one_shows_its_candidates() {
        assert_eq!(pick("db", &fleet(), Purpose::Change).unwrap(), ["a/db"]);
        assert_eq!(pick("b/web", &fleet(), Purpose::Change).unwrap(), ["b/web"]);
        let doubts = pick("web", &fleet(), Purpose::Change).unwrap_err();
        let [Doubt::Ambiguous { candidates, .. }] = doubts.as_slice() else {
            panic!("{doubts:?}")
        };
        assert_eq!(candidates.as_slice(), ["a/web", "b/web"]);
        assert_eq!(
            pick("none", &fleet(), Purpose::Read).unwrap_err(),
            [Doubt::Nowhere {
                typed: "none".to_owned(),
                hosts: vec![address("a"), address("b")],
            }]
        );
    }

    #[test]
    fn with_a_host_silent_nothing_is_changed_by_a_bare_name() {
        let doubts = pick("db", &with_silent(), Purpose::Change).unwrap_err();
        assert!(
            matches!(doubts.as_slice(), [Doubt::Silent { candidate: Some(c), .. }] if c == "a/db"),
            "{doubts:?}"
        );
        assert_eq!(
            pick("a/db", &with_silent(), Purpose::Change).unwrap(),
            ["a/db"]
        );
        assert_eq!(pick("db", &with_silent(), Purpose::Read).unwrap(), ["a/db"]);
        let uuid = Uuid::from_u128(2).to_string();
        assert_eq!(
            pick(&uuid, &with_silent(), Purpose::Change).unwrap(),
            ["a/db"]
        );
        assert_eq!(
            pick("grid-*", &with_silent(), Purpose::Change).unwrap(),
            ["b/grid-1", "b/grid-2"]
        );
        let doubts = pick("none", &with_silent(), Purpose::Read).unwrap_err();
        assert!(
            matches!(
                doubts.as_slice(),
                [Doubt::Silent {
                    candidate: None,
                    ..
                }]
            ),
            "{doubts:?}"
        );
    }

    #[test]
    fn a_host_on_which_one_may_do_nothing_has_nothing_of_ones_own() {
        let mut answers = fleet();
        answers.push((address("c"), Err(error(Kind::Refused, "denied"))));
        assert_eq!(pick("db", &answers, Purpose::Change).unwrap(), ["a/db"]);
        let doubts = pick("c/db", &answers, Purpose::Change).unwrap_err();
        assert!(
            matches!(doubts.as_slice(), [Doubt::Silent { .. }]),
            "{doubts:?}"
        );
    }

    #[test]
    fn a_domain_that_is_named_twice_is_one_target() {
        let all = vec![address("a"), address("b")];
        let searches = [(wanted("grid-1"), all.clone()), (wanted("grid-*"), all)];
        let (targets, _) = choose(&searches, &fleet(), Purpose::Change).unwrap();
        let labels: Vec<_> = targets.iter().map(Target::label).collect();
        assert_eq!(labels, ["b/grid-1", "b/grid-2"]);
    }
}
