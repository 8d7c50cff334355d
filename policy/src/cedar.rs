//! A site's own policies, in the Cedar language, from a folder of `*.cedar` files and `groups.toml`.
//!
//! Which policies there may be is the schema's to say: `policy/schema.cedarschema`, with `deploy/policy` for examples. They are held against it when
//! they are read, and what does not hold is refused as a whole: at the start xmand ends, later the old rules stay in force and the log says so.
//!
//! ```text
//! a policy that cannot be evaluated --> Deny    Cedar itself would pass over it; a `forbid` that is passed over is a hole
//! a forbid that applies             --> Deny
//! a permit that applies             --> Allow, by cedar:FILE:ID
//! none of them                      --> no opinion
//! ```
//! Cedar's own authorizer decides. It is asked with those policies alone whose heads admit the principal, the action and the kind of thing, since most
//! are done with by that; a test holds the outcome against the whole set.

use std::{
    collections::HashSet,
    fmt, iter,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError, RwLock},
    time::{Duration, Instant},
};

use cedar_policy::{
    AuthorizationError, Decision, Entities, EvalResult, Expression, PolicyId, PolicySet, Request,
    Response, eval_expression,
};

use crate::{Authorizer, Opinion, Query, Reload, Subject, UnixGroups};

mod folder;
mod rules;
mod scene;

pub use folder::{GROUPS, MAX_FILE, MAX_FILE_NAME, MAX_FILES};
pub use rules::{MAX_ID, MAX_NESTING, MAX_POLICIES, MAX_POLICY, MAX_TOLD, SCHEMA, SCHEMA_VERSION};

use folder::{Look, Text};
use rules::{Rule, Rules, one_line};
use scene::{Asker, Kind, Scene};

/// For how long a changed folder is read again at each look: a second change within the granularity of the file system's clock would leave the same
/// time stamps. FAT's clock, the coarsest, steps by 2 s.
const SETTLING: Duration = Duration::from_secs(2);
/// The most policies that one reason names.
const MAX_NAMED: usize = 5;
/// The most ways to be allowed that one explanation shows.
const MAX_WAYS: usize = 20;

/// Why a folder of policies cannot be used: all of it, one line each, with file, line and column where there are any.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the policies in {} cannot be used:\n  {}", folder.display(), defects.join("\n  "))]
pub struct Trouble {
    folder: PathBuf,
    defects: Vec<String>,
}

impl Trouble {
    /// Returns what is wrong, one line each.
    pub fn defects(&self) -> &[String] {
        &self.defects
    }
}

/// What a folder holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Summary {
    /// Policies.
    pub policies: usize,
    /// Files they stand in.
    pub files: usize,
    /// Groups of `groups.toml`.
    pub groups: usize,
    /// Whether policies go by Unix groups, so that `unix-groups` must be asked for in xmand.toml.
    pub unix_groups: bool,
    /// What is allowed and hardly meant.
    pub warnings: Vec<String>,
}

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} policies in {} files, {} groups",
            self.policies, self.files, self.groups
        )
    }
}

/// The backend.
#[derive(Debug)]
pub struct Cedar {
    folder: PathBuf,
    host: String,
    account: u32,
    current: RwLock<Arc<Reading>>,
    /// Held by the one who reads the folder; the others wait for what it finds, since the old rules may allow what the new ones do not.
    reading: Mutex<()>,
}

#[derive(Debug)]
struct Reading {
    rules: Arc<Rules>,
    /// What `rules` or, where that is something else, `trouble` was made of; nothing where not even that could be had.
    texts: Option<Arc<[Text]>>,
    /// Why the folder as it is now cannot be used.
    trouble: Option<Trouble>,
    /// The version that was read, and since when it has been known; none where there is nothing to compare with.
    version: Option<(Look, Instant)>,
    /// Whether the version was read at a time when its stamps could no longer hide a second change.
    settled: bool,
}

impl Cedar {
    /// Reads the policies in a folder that is root's or the account's with the given uid. `host` is what policies call this host.
    ///
    /// # Errors
    /// All that is wrong with the folder, its files, policies and groups.
    pub fn open(
        folder: impl Into<PathBuf>,
        host: impl Into<String>,
        account: u32,
    ) -> Result<Self, Trouble> {
        let (folder, host) = (folder.into(), host.into());
        let now = Instant::now();
        let trouble = |defects| Trouble {
            folder: folder.clone(),
            defects,
        };
        let folder::Reading { look, texts } = folder::read(&folder, account);
        let version = look.map(|look| (look, now));
        let texts = texts.map_err(trouble)?;
        let rules = Rules::new(&texts, &host).map_err(trouble)?;
        let reading = Reading {
            rules: Arc::new(rules),
            texts: Some(texts.into()),
            trouble: None,
            version,
            settled: false,
        };
        Ok(Self {
            folder,
            host,
            account,
            current: RwLock::new(Arc::new(reading)),
            reading: Mutex::new(()),
        })
    }

    /// Returns what is in force.
    pub fn summary(&self) -> Summary {
        let current = self.current();
        let files = current.rules.files;
        Summary {
            policies: current.rules.len(),
            files,
            groups: current.rules.groups.names().count(),
            unix_groups: current.rules.by_unix_groups,
            warnings: current.rules.warnings.clone(),
        }
    }

    fn current(&self) -> Arc<Reading> {
        // a reading is replaced as a whole, so a panic elsewhere leaves a good one
        Arc::clone(&self.current.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn is_fresh(&self) -> bool {
        let current = self.current();
        current.settled
            && current
                .version
                .as_ref()
                .is_some_and(|(look, _)| look.is_current(&self.folder))
    }

    fn read(&self, before: &Reading) -> Reading {
        let now = Instant::now();
        // the stamps are those of what was read, and were taken before the content, so that a change in between is seen at the next look
        let folder::Reading { look, texts } = folder::read(&self.folder, self.account);
        let version = look.map(|look| match &before.version {
            Some((known, since)) if *known == look => (look, *since),
            _ => (look, now),
        });
        let settled = version
            .as_ref()
            .is_some_and(|(_, since)| now.duration_since(*since) >= SETTLING);
        let reading = |rules, texts, defects: Option<Vec<String>>| Reading {
            rules,
            texts,
            trouble: defects.map(|defects| Trouble {
                folder: self.folder.clone(),
                defects,
            }),
            version,
            settled,
        };
        let old = || Arc::clone(&before.rules);
        match texts {
            Err(defects) => reading(old(), None, Some(defects)),
            Ok(texts) if before.texts.as_deref() == Some(&texts) => {
                let trouble = before.trouble.as_ref();
                let defects = trouble.map(|trouble| trouble.defects.clone());
                reading(old(), before.texts.clone(), defects)
            }
            Ok(texts) => match Rules::new(&texts, &self.host) {
                Ok(rules) => reading(Arc::new(rules), Some(texts.into()), None),
                Err(defects) => reading(old(), Some(texts.into()), Some(defects)),
            },
        }
    }
}

/// Reads a folder as a start would, and says what it holds.
///
/// # Errors
/// All that is wrong with it.
pub fn check(folder: &Path, account: u32) -> Result<Summary, Trouble> {
    Cedar::open(folder, "localhost", account).map(|cedar| cedar.summary())
}

impl Authorizer for Cedar {
    fn name(&self) -> &'static str {
        "cedar"
    }

    fn judge(&self, query: &Query<'_>) -> Opinion {
        let opinion = self.judge_all(std::slice::from_ref(query)).pop();
        opinion.unwrap_or_else(|| deny("no answer was found"))
    }

    fn judge_all(&self, queries: &[Query<'_>]) -> Vec<Opinion> {
        let rules = Arc::clone(&self.current().rules);
        let mut opinions = Vec::with_capacity(queries.len());
        let mut rest = queries;
        while let Some(first) = rest.first() {
            let judged = match Asker::new(first, &rules.names, &rules.groups) {
                Ok(asker) => rules.judge_run(&asker, rest),
                Err(error) => vec![deny(one_line(&error))],
            };
            rest = rest.get(judged.len()..).unwrap_or_default();
            opinions.extend(judged);
        }
        opinions
    }

    fn wants(&self, query: &Query<'_>) -> Vec<String> {
        let rules = Arc::clone(&self.current().rules);
        if rules.beforehand(query).is_some() {
            return Vec::new();
        }
        rules.ways(query).unwrap_or_default()
    }

    fn refresh(&self) -> Option<Reload> {
        if self.is_fresh() {
            return None;
        }
        let _one_reader = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.current();
        let after = self.read(&before);
        let changed = !Arc::ptr_eq(&before.rules, &after.rules) || before.trouble != after.trouble;
        let trouble = after.trouble.clone();
        *self.current.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(after);
        changed.then(|| match trouble {
            None => {
                let summary = self.summary();
                Reload {
                    summary: format!("policies in {}: {summary}", self.folder.display()),
                    usable: true,
                    warnings: summary.warnings,
                }
            }
            Some(trouble) => Reload {
                summary: format!(
                    "THE OLD POLICIES STAY IN FORCE: those in {} cannot be used",
                    self.folder.display()
                ),
                usable: false,
                warnings: trouble.defects,
            },
        })
    }
}

impl Rules {
    /// Judges the first of the questions, as many as the asker has in common and one picture can show; at least one.
    fn judge_run(&self, asker: &Asker<'_>, queries: &[Query<'_>]) -> Vec<Opinion> {
        let Some(first) = queries.first() else {
            return Vec::new();
        };
        if let Some(opinion) = self.beforehand(first) {
            return vec![opinion];
        }
        let run = queries
            .iter()
            .take_while(|query| asker.asks(query) && self.beforehand(query).is_none())
            .count();
        let queries = queries.get(..run.max(1)).unwrap_or_default();
        let Some(about) = self.about(first.action, Kind::of(&first.on)) else {
            return queries.iter().map(|_| Opinion::None).collect();
        };
        let admitting: Vec<&Rule> = about
            .filter(|rule| rule.admits(&asker.uid, &asker.groups))
            .collect();
        if admitting.is_empty() {
            return queries.iter().map(|_| Opinion::None).collect();
        }
        let policies = PolicySet::from_policies(admitting.iter().map(|rule| rule.policy.clone()));
        let scene = Scene::new(asker, queries, &self.names, &self.groups);
        let (policies, scene) = match (policies, scene) {
            (Ok(policies), Ok(scene)) => (policies, scene),
            (Err(error), _) => return vec![deny(one_line(&error.to_string()))],
            (_, Err(error)) => return vec![deny(one_line(&error))],
        };
        let cedar = cedar_policy::Authorizer::new();
        let judged = scene.requests().map(|(_, _, request)| {
            let response = cedar.is_authorized(request, &policies, scene.entities());
            opinion(&response, &admitting)
        });
        judged.collect()
    }

    /// What is known without looking at a policy.
    fn beforehand(&self, query: &Query<'_>) -> Option<Opinion> {
        let other = match query.on {
            Subject::Person(other) => Some(other),
            Subject::Domain(facts) => match facts.metadata {
                Ok(_) => None,
                Err(why) => {
                    return Some(deny(format!(
                        "the domain's owners and labels cannot be read: {why}"
                    )));
                }
            },
            Subject::Host | Subject::UnknownDomain | Subject::NewDomain { .. } => None,
        };
        iter::once(query.person).chain(other).find_map(|person| {
            let who = &person.principal;
            match &person.unix_groups {
                UnixGroups::Known(_) => None,
                UnixGroups::Unknown(why) => {
                    Some(deny(format!("the Unix groups of {who} are not known: {why}")))
                }
                UnixGroups::Unasked if self.by_unix_groups => Some(deny(format!(
                    "policies go by Unix groups, and those of {who} were not asked for: set unix-groups = true in xmand.toml"
                ))),
                UnixGroups::Unasked => None,
            }
        })
    }

    /// What would have to be true for a question to be allowed, one way each.
    fn ways(&self, query: &Query<'_>) -> Result<Vec<String>, String> {
        let asker = Asker::new(query, &self.names, &self.groups)?;
        let scene = Scene::new(&asker, &[*query], &self.names, &self.groups)?;
        let (Some((resource, groups, request)), Some(about)) = (
            scene.requests().next(),
            self.about(query.action, Kind::of(&query.on)),
        ) else {
            return Ok(Vec::new());
        };
        let ways = about.filter_map(|rule| {
            let mut missing = Vec::new();
            if !rule.admits(&asker.uid, &asker.groups) {
                missing.push(rule.wanted_principal());
            }
            if !rule.reaches(resource, groups) {
                missing.push(rule.wanted_resource());
            }
            // a condition may rest on those before it, so nothing behind the first that fails is looked at
            let failing = rule
                .parts
                .iter()
                .find(|part| !holds(part.test.as_ref(), request, scene.entities()));
            if rule.forbids {
                let hits = missing.is_empty() && failing.is_none();
                let text: Vec<&str> = rule.parts.iter().map(|part| part.text.as_str()).collect();
                let text = if text.is_empty() {
                    "it has no condition".to_owned()
                } else {
                    one_line(&text.join(" && "))
                };
                return hits.then(|| format!("the forbid of {} does not hold: {text}", rule.name));
            }
            missing.extend(failing.map(|part| part.text.clone()));
            let missing = one_line(&missing.join(", and "));
            (!missing.is_empty()).then(|| format!("{}: {missing}", rule.name))
        });
        Ok(ways.take(MAX_WAYS).collect())
    }
}

/// What Cedar's answer comes to. An error counts before all else: Cedar has passed over a policy that may have been a `forbid`.
fn opinion(response: &Response, asked: &[&Rule]) -> Opinion {
    let diagnostics = response.diagnostics();
    if let Some(AuthorizationError::PolicyEvaluationError(error)) = diagnostics.errors().next() {
        return deny(format!(
            "policy {} cannot be evaluated: {}",
            error.policy_id(),
            one_line(&error.to_string())
        ));
    }
    let reasons: HashSet<&PolicyId> = diagnostics.reason().collect();
    let mut applied = asked
        .iter()
        .filter(|rule| reasons.contains(rule.policy.id()))
        .map(|rule| rule.name.as_str());
    match response.decision() {
        Decision::Allow => match applied.next() {
            Some(name) => Opinion::Allow {
                rule: format!("cedar:{name}"),
                administrator: false,
            },
            None => deny("Cedar allows it by a policy that it was not asked about"),
        },
        Decision::Deny if reasons.is_empty() => Opinion::None,
        Decision::Deny => {
            let named: Vec<&str> = applied.by_ref().take(MAX_NAMED).collect();
            let more = match applied.count() {
                0 => String::new(),
                more => format!(" and {more} more"),
            };
            deny(format!("forbidden by {}{more}", named.join(", ")))
        }
    }
}

/// Whether a condition taken by itself is true; what cannot be evaluated is not.
fn holds(condition: Option<&Expression>, request: &Request, entities: &Entities) -> bool {
    condition.is_some_and(|condition| {
        matches!(
            eval_expression(request, entities, condition),
            Ok(EvalResult::Bool(true))
        )
    })
}

fn deny(reason: impl Into<String>) -> Opinion {
    Opinion::Deny {
        reason: reason.into(),
    }
}

#[cfg(test)]
mod tests;
