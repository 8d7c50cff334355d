//! From what people call domains to the domains themselves.

use std::collections::{HashMap, HashSet};

use glob::Pattern;
use uuid::Uuid;
use xman_client::{Address, Caller, Explanation, Kind, fleet};
use xman_common::{
    name::{DomainName, DomainRef},
    protocol::{
        Code, DomainRow, HypervisorTrouble, Item, List, MAX_PATTERN, MAX_PATTERNS, Request,
    },
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
    /// The hypervisor that tells it from another of its name on the same host, where there is one.
    pub(crate) by: Option<String>,
}

impl Target {
    /// Returns `HOST/NAME`, or `HOST/UUID` where the name is not known; with its hypervisor where the host has another of that name.
    pub(crate) fn label(&self) -> String {
        let by = self
            .by
            .as_ref()
            .map(|by| format!(" ({by})"))
            .unwrap_or_default();
        match &self.row {
            Some(row) => format!("{}/{}{by}", self.address, row.name),
            None => format!("{}/{}", self.address, self.domain),
        }
    }

    /// Makes a caller's next calls go to the hypervisor that has it: the host may have another domain of its name or UUID.
    pub(crate) fn aim(&self, setting: &Setting, caller: &mut Caller) {
        let own = self.row.as_ref().map(|row| row.hypervisor.clone());
        caller.aim(own.or_else(|| setting.hypervisor.clone()));
    }
}

/// Gives those of one name on one host, which several hypervisors have, what tells them apart: the driver, or the URI where that is the same.
fn tell_apart(targets: &mut [Target]) {
    let mut places: HashMap<String, Vec<usize>> = HashMap::new();
    for (at, target) in targets.iter().enumerate() {
        places.entry(target.label()).or_default().push(at);
    }
    for same in places.into_values().filter(|same| same.len() > 1) {
        let uri_of = |at: &usize| targets.get(*at)?.row.as_ref().map(|row| &*row.hypervisor);
        let uris: Vec<String> = same
            .iter()
            .map(|at| uri_of(at).unwrap_or_default().to_owned())
            .collect();
        let drivers: HashSet<&str> = uris.iter().map(|uri| driver(uri)).collect();
        let are_enough = drivers.len() == uris.len();
        for (at, uri) in same.into_iter().zip(&uris) {
            if let Some(target) = targets.get_mut(at) {
                target.by = Some(if are_enough { driver(uri) } else { uri }.to_owned());
            }
        }
    }
}

/// Returns the driver of a libvirt URI, as `lxc` of `lxc+unix:///system`.
pub(crate) fn driver(uri: &str) -> &str {
    uri.split([':', '+']).next().unwrap_or(uri)
}

/// Says of a hypervisor that it is not well.
pub(crate) fn ailing(trouble: &HypervisorTrouble) -> Explanation {
    let HypervisorTrouble { hypervisor, why } = trouble;
    // Where libvirt cannot be reached, the host says what to do.
    let advice = if why.contains(';') {
        ""
    } else {
        "what is shown of its domains may be old; look at libvirt on that host"
    };
    Explanation {
        kind: Kind::Unreachable,
        code: Code::Unavailable.name(),
        what: format!("{hypervisor}: {why}"),
        advice: advice.to_owned(),
        is_common: false,
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

/// What a host told of its domains.
#[derive(Debug, Default)]
pub(crate) struct Listed {
    pub(crate) rows: Vec<DomainRow>,
    /// Hypervisors whose domains are not known, or not any more.
    pub(crate) troubles: Vec<HypervisorTrouble>,
}

/// A host's domains, or why it did not tell.
type Answer = Result<Listed, Explanation>;

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
            let mut caller = found
                .callers
                .remove(&target.address)
                .unwrap_or_else(|| setting.caller(&target.address));
            target.aim(setting, &mut caller);
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
            by: None,
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
        let is_useful = answer.as_ref().is_ok_and(|listed| !listed.rows.is_empty());
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
    let mut found = Listed::default();
    let mut known = HashSet::new();
    for chunk in chunks {
        let list = List {
            patterns: chunk.to_vec(),
            states: states.to_vec(),
        };
        let (_, items) = setting.ask(caller, &Request::List(list)).await?;
        for item in items {
            if let Item::Trouble(trouble) = item {
                let is_of = |other: &HypervisorTrouble| other.hypervisor == trouble.hypervisor;
                if !found.troubles.iter().any(is_of) {
                    found.troubles.push(trouble);
                }
                continue;
            }
            let Item::Domain(row) = item else {
                return Err(misfit());
            };
            if known.insert((row.uuid, row.hypervisor.clone())) {
                found.rows.push(row);
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
        advice: String,
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
                Some(Ok(listed)) => {
                    let rows = listed.rows.iter().filter(|row| wanted.name.is(row));
                    let found = rows.map(|row| Target {
                        address: place.clone(),
                        domain: DomainRef::Uuid(row.uuid),
                        row: Some(row.clone()),
                        by: None,
                    });
                    let before = matches.len();
                    matches.extend(found);
                    // One broken hypervisor does not keep from its work who names a domain that another has.
                    if wanted.name.is_pattern() || matches.len() == before {
                        let troubles = listed.troubles.iter();
                        mute.extend(troubles.map(|trouble| (place.clone(), ailing(trouble))));
                    }
                }
                Some(Err(error)) if error.code == Code::Denied.name() && places.len() > 1 => {}
                Some(Err(error)) => mute.push((place.clone(), error.clone())),
                None => {}
            }
        }
        match doubt(wanted, places, &matches, &mute, purpose) {
            Some(doubt) => doubts.push(doubt),
            None => {
                targets.extend(matches.into_iter().filter(|target| {
                    let on = target.row.as_ref().map(|row| row.hypervisor.clone());
                    chosen.insert((target.address.clone(), target.domain.clone(), on))
                }));
                for known in mute {
                    if !silent.contains(&known) {
                        silent.push(known);
                    }
                }
            }
        }
    }
    if doubts.is_empty() {
        tell_apart(&mut targets);
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
        (Called::Exactly(_) | Called::Uuid(_), several) => {
            let mut several = several.to_vec();
            tell_apart(&mut several);
            Some(Doubt::Ambiguous {
                typed: typed.clone(),
                advice: how_to_choose(&wanted.name, &several),
                candidates: candidates(&several),
            })
        }
    }
}

/// Hypervisors tell domains of one name apart, hosts do, and UUIDs unless those are the same too.
fn how_to_choose(called: &Called, several: &[Target]) -> String {
    let by: Vec<&str> = several.iter().filter_map(|t| t.by.as_deref()).collect();
    let is_uuid = matches!(called, Called::Uuid(_));
    match by.first() {
        None if is_uuid => "say which, as HOST/UUID".to_owned(),
        None => "say which, as HOST/NAME or HOST/UUID".to_owned(),
        Some(first) => {
            let which = if is_uuid {
                "say the host"
            } else {
                "say which, as HOST/UUID"
            };
            let others = by.len() < several.len();
            if is_uuid && !others {
                format!("choose one with --hypervisor, as in --hypervisor {first}")
            } else {
                format!("choose one with --hypervisor, as in --hypervisor {first}, or {which}")
            }
        }
    }
}

/// As HOST/NAME; where nothing else tells them apart, by their UUIDs.
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
        Doubt::Ambiguous {
            typed,
            candidates,
            advice,
        } => {
            let what = format!(
                "{} domains are called that: {}",
                candidates.len(),
                named(&candidates)
            );
            complaints.add(typed, &refused("ambiguous", what, &advice));
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

/// Which host is asked for which patterns, in the order in which the hosts were named.
pub(crate) fn list_questions(
    setting: &Setting,
    patterns: &[String],
) -> Result<Vec<(Address, Vec<String>)>, Stop> {
    if patterns.is_empty() {
        return Ok(setting
            .hosts()?
            .into_iter()
            .map(|host| (host, Vec::new()))
            .collect());
    }
    let mut questions: Vec<(Address, Vec<String>)> = Vec::new();
    for wanted in Wanted::parse_all(patterns, setting)? {
        let (_, pattern) = split(&wanted.typed);
        for host in wanted.places(setting)? {
            match questions.iter_mut().find(|(known, _)| *known == host) {
                Some((_, patterns)) => patterns.push(pattern.to_owned()),
                None => questions.push((host, vec![pattern.to_owned()])),
            }
        }
    }
    Ok(questions)
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
            standing: None,
            preempted_ms: 0,
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

    fn listed(rows: Vec<DomainRow>) -> Answer {
        Ok(Listed {
            rows,
            troubles: Vec::new(),
        })
    }

    fn on(hypervisor: &str, row: DomainRow) -> DomainRow {
        DomainRow {
            hypervisor: hypervisor.to_owned(),
            ..row
        }
    }

    fn both() -> Vec<DomainRow> {
        vec![
            on("qemu:///system", row("web", 1)),
            on("lxc+unix:///system?socket=/x", row("web", 2)),
            on("qemu:///system", row("db", 3)),
            on("lxc+unix:///system?socket=/x", row("cell", 3)),
        ]
    }

    fn broken() -> HypervisorTrouble {
        HypervisorTrouble {
            hypervisor: "lxc:///system".to_owned(),
            why: "libvirt has not answered for 7 s".to_owned(),
        }
    }

    fn fleet() -> Vec<(Address, Answer)> {
        vec![
            (address("a"), listed(vec![row("web", 1), row("db", 2)])),
            (
                address("b"),
                listed(vec![row("web", 3), row("grid-1", 4), row("grid-2", 5)]),
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
    fn a_name_on_two_hypervisors_of_a_host_is_ambiguous_and_says_how_to_choose() {
        let answers = vec![(address("a"), listed(both()))];
        let uuid = Uuid::from_u128(3).to_string();
        for (typed, shown, hints) in [
            (
                "web",
                ["a/web (qemu)", "a/web (lxc)"],
                ["--hypervisor qemu", "HOST/UUID"],
            ),
            (
                uuid.as_str(),
                ["a/db", "a/cell"],
                ["HOST/UUID", "HOST/UUID"],
            ),
        ] {
            let doubts = pick(typed, &answers, Purpose::Change).unwrap_err();
            let [
                Doubt::Ambiguous {
                    candidates, advice, ..
                },
            ] = doubts.as_slice()
            else {
                panic!("{doubts:?}")
            };
            assert_eq!(candidates.as_slice(), shown);
            if typed == "web" {
                assert!(hints.iter().all(|hint| advice.contains(hint)), "{advice}");
            }
        }
        let several = [
            on("qemu:///system", row("web", 1)),
            on("qemu:///session", row("web", 2)),
        ];
        let answers = vec![(address("a"), listed(several.into()))];
        assert_eq!(
            pick("w*", &answers, Purpose::Change).unwrap(),
            ["a/web (qemu:///system)", "a/web (qemu:///session)"]
        );
    }

    #[test]
    fn a_pattern_takes_domains_of_one_uuid_on_two_hypervisors_for_two() {
        let answers = vec![(address("a"), listed(both()))];
        assert_eq!(
            pick("*", &answers, Purpose::Change).unwrap(),
            ["a/web (qemu)", "a/web (lxc)", "a/db", "a/cell"]
        );
    }

    #[test]
    fn a_broken_hypervisor_stands_in_the_way_of_what_the_others_do_not_have() {
        let ill = Listed {
            rows: vec![on("qemu:///system", row("db", 3))],
            troubles: vec![broken()],
        };
        let answers = vec![(address("a"), Ok(ill))];
        assert_eq!(pick("db", &answers, Purpose::Change).unwrap(), ["a/db"]);
        let doubts = pick("web", &answers, Purpose::Change).unwrap_err();
        let [Doubt::Silent { error, .. }] = doubts.as_slice() else {
            panic!("{doubts:?}")
        };
        assert!(error.what.starts_with("lxc:///system: libvirt has not"));
        let searches = [(wanted("d*"), vec![address("a")])];
        let (targets, silent) = choose(&searches, &answers, Purpose::Change).unwrap();
        assert!(targets.len() == 1 && silent.len() == 1, "{silent:?}");
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
