//! Another program decides: the site's own authority, asked over a Unix socket. docs/AUTHORITY.md is the protocol.
//!
//! ```text
//! Query --> wire::Question         what is not known is not asked about: deny
//!       --> Memory                 said before and still good: the same again
//!       --> connection::Pool       one conversation for all the rest, within one deadline
//!       --> wire::Answer           to exactly that question, in time: the authority's opinion
//!           Trouble                anything else: deny, and the connection is closed
//! ```
//!
//! Laws: a question's number is never given twice in a process; a connection on which anything was out of order is never used again; no failure is
//! ever remembered; nothing that was said is good for longer than the socket stands at which it was said.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sha2::{Digest, Sha256};
use xman_common::protocol::Verb;

use crate::{Action, Authorizer, Opinion, Query, Reload};

mod connection;
mod wire;

use connection::{Deadline, Identity, Pool};
use wire::{About, Answer, Question};

/// The longest deadline: an authority that hangs holds the threads that wait for it.
pub const MAX_WAIT: Duration = Duration::from_secs(60);
/// The most connections at once: callers who ask for much wait for each other, and the authority sees no flood.
pub const MAX_CONNECTIONS: usize = 8;
/// The most questions of one conversation that wait for their answers: what the authority must be able to hold for one that does not read its answers.
pub const MAX_IN_FLIGHT: usize = 64;
/// The longest line either way, in bytes without its end: an authority that never ends its line fills no memory.
pub const MAX_LINE: usize = 64 * 1024;
/// The most answers that are remembered: callers who ask about ever new names fill no memory.
pub const MAX_REMEMBERED: usize = 4096;
/// The longest that an answer is remembered, whatever the authority says: so long may a right outlive its withdrawal.
pub const MAX_TTL: Duration = Duration::from_secs(60);

/// Nobody, whom [`External::check`] asks about: `.invalid` is no realm of anybody (RFC 2606).
const NOBODY: &str = "nobody@XMAN.INVALID";

/// Why the authority's opinion is not to be had. Every one means deny.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// It is not there.
    #[error("there is no socket {}: start the authority", .0.display())]
    Missing(PathBuf),
    /// A symbolic link.
    #[error("{} is a symbolic link: configure where the link leads", .0.display())]
    Link(PathBuf),
    /// Something else of that name.
    #[error("{} is not a socket", .0.display())]
    NoSocket(PathBuf),
    /// Somebody else's.
    #[error("{} belongs to uid {owner}, neither to root nor to xmand's account (uid {account}): let one of them make it", path.display())]
    Owner {
        /// The socket.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
        /// Whose it may be beside root's.
        account: u32,
    },
    /// Somebody else listens there.
    #[error("uid {peer} listens at {}, neither root nor xmand's account (uid {account}): start the authority as one of them, or let systemd listen for it", path.display())]
    Peer {
        /// The socket.
        path: PathBuf,
        /// Who listens.
        peer: u32,
        /// Who may listen beside root.
        account: u32,
    },
    /// Another socket than a moment ago.
    #[error("{} was replaced while xmand connected to it", .0.display())]
    Replaced(PathBuf),
    /// The system does not let us.
    #[error("{}: {text}; does the authority run?", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// The system's words.
        text: String,
    },
    /// All connections are in use.
    #[error(
        "no connection to the authority became free within {0:?}: it is too slow for what it is asked"
    )]
    Busy(Duration),
    /// No answer in time.
    #[error("the authority did not answer within {0:?}")]
    Late(Duration),
    /// No answer at all.
    #[error("the authority closed the connection without an answer")]
    Closed,
    /// The connection failed otherwise.
    #[error("the connection to the authority failed: {0}")]
    Broken(String),
    /// A line without an end.
    #[error("the authority sent a line of more than {MAX_LINE} bytes")]
    LongLine,
    /// No answer as it is documented.
    #[error("the authority sent what is no answer: {0}")]
    Garbage(String),
    /// Another protocol.
    #[error("the authority speaks version {0} of the protocol, xmand speaks version {version}", version = wire::VERSION)]
    Version(u32),
    /// An answer to nothing.
    #[error("the authority answered question {0}, which was not asked")]
    Unasked(u64),
    /// Two answers to one question.
    #[error("the authority answered question {0} twice")]
    Twice(u64),
    /// A question that cannot be asked.
    #[error(
        "the question would have {0} bytes, and the longest line has {MAX_LINE}: fewer groups, owners or labels"
    )]
    LongQuestion(usize),
    /// A question that JSON cannot hold.
    #[error("the question cannot be written: {0}")]
    Unspeakable(String),
    /// Nobody knows the person's groups.
    #[error("the Unix groups are not known: {0}")]
    Groups(String),
    /// Nobody knows the domain's owners.
    #[error("the domain's owners, class and labels cannot be read: {0}")]
    Metadata(String),
}

/// The backend: what the authority says, and deny whenever it does not say anything properly and in time. It makes nobody an administrator.
#[derive(Debug)]
pub struct External {
    host: String,
    limit: Duration,
    pool: Pool,
    memory: Mutex<Memory>,
}

impl External {
    /// Makes a backend that asks at the socket at `path`, which must be root's or the account's with the given uid, on behalf of the host of that
    /// name. Questions that are asked together are answered within `limit`, at most [`MAX_WAIT`], or denied.
    pub fn new(
        path: impl Into<PathBuf>,
        account: u32,
        host: impl Into<String>,
        limit: Duration,
    ) -> Self {
        Self {
            host: host.into(),
            limit: limit.min(MAX_WAIT),
            pool: Pool::new(path.into(), account),
            memory: Mutex::default(),
        }
    }

    /// Asks whether nobody may say `whoami`, and returns in words what came. Grants and remembers nothing.
    ///
    /// # Errors
    /// What would make the backend deny.
    pub fn check(&self) -> Result<String, Trouble> {
        let body = Question {
            principal: NOBODY,
            unix_groups: None,
            acting: None,
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            action: Action::Verb(Verb::Whoami).name(),
            host: &self.host,
            subject: About::Host,
        }
        .body()?;
        let identity = self.pool.look()?;
        let began = Instant::now();
        let deadline = Deadline::after(self.limit);
        let mut answers = self.pool.ask(identity, &[&body], deadline);
        let answer = answers.pop().unwrap_or(Err(Trouble::Closed))?;
        let said = match answer.opinion {
            Opinion::Allow { rule, .. } => format!("allow by {rule}"),
            Opinion::Deny { reason } => format!("deny: {reason}"),
            Opinion::None => "none".to_owned(),
        };
        Ok(format!(
            "the authority at {} answers in {} ms: whoami of {NOBODY}: {said}",
            self.pool.path().display(),
            began.elapsed().as_millis()
        ))
    }

    fn answers(&self, queries: &[Query<'_>]) -> Vec<Result<Answer, Trouble>> {
        let looked = self.pool.look();
        self.memory().meet(&looked);
        let identity = match looked {
            Ok(identity) => identity,
            Err(trouble) => return queries.iter().map(|_| Err(trouble.clone())).collect(),
        };
        let asked_at = Instant::now();
        let bodies: Vec<Result<(Key, String), Trouble>> = queries
            .iter()
            .map(|query| {
                let body = Question::new(query, &self.host)?.body()?;
                Ok((Sha256::digest(&body).into(), body))
            })
            .collect();
        let remembered: Vec<Option<Answer>> = {
            let memory = self.memory();
            let recall = |(key, _): &(Key, String)| memory.recall(key, asked_at);
            bodies
                .iter()
                .map(|body| body.as_ref().ok().and_then(recall))
                .collect()
        };
        let (keys, open): (Vec<Key>, Vec<&str>) = bodies
            .iter()
            .zip(&remembered)
            .filter(|(_, known)| known.is_none())
            .filter_map(|(body, _)| body.as_ref().ok())
            .map(|(key, body)| (*key, body.as_str()))
            .unzip();
        let mut news = Vec::new();
        if !open.is_empty() {
            news = self.pool.ask(identity, &open, Deadline::after(self.limit));
            let said = keys.into_iter().zip(&news);
            let said = said.filter_map(|(key, answer)| Some((key, answer.as_ref().ok()?)));
            self.memory().keep(identity, asked_at, said);
        }
        let mut news = news.into_iter();
        bodies
            .into_iter()
            .zip(remembered)
            .map(|(body, known)| match (body, known) {
                (Err(trouble), _) => Err(trouble),
                (Ok(_), Some(answer)) => Ok(answer),
                (Ok(_), None) => news.next().unwrap_or(Err(Trouble::Closed)),
            })
            .collect()
    }

    fn memory(&self) -> MutexGuard<'_, Memory> {
        // whatever a panic left undone, what is remembered was said
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Authorizer for External {
    fn name(&self) -> &'static str {
        "external"
    }

    fn judge(&self, query: &Query<'_>) -> Opinion {
        let mut answers = self.answers(std::slice::from_ref(query));
        opinion(answers.pop().unwrap_or(Err(Trouble::Closed)))
    }

    fn judge_all(&self, queries: &[Query<'_>]) -> Vec<Opinion> {
        self.answers(queries).into_iter().map(opinion).collect()
    }

    fn waits(&self) -> bool {
        true
    }

    fn wants(&self, query: &Query<'_>) -> Vec<String> {
        let answers = self.answers(std::slice::from_ref(query));
        let said = answers.into_iter().flatten();
        said.filter_map(|answer| answer.wants).collect()
    }

    fn refresh(&self) -> Option<Reload> {
        let looked = self.pool.look();
        let mut memory = self.memory();
        memory.meet(&looked);
        if std::mem::replace(&mut memory.told, true) {
            return None;
        }
        Some(match looked {
            Ok(_) => Reload {
                summary: format!("the authority at {} is asked", self.pool.path().display()),
                usable: true,
                warnings: Vec::new(),
            },
            Err(trouble) => Reload {
                summary: trouble.to_string(),
                usable: false,
                warnings: Vec::new(),
            },
        })
    }
}

fn opinion(answer: Result<Answer, Trouble>) -> Opinion {
    match answer {
        Ok(answer) => answer.opinion,
        Err(trouble) => Opinion::Deny {
            reason: trouble.to_string(),
        },
    }
}

/// A question's digest: all it holds counts, and however long it is, it takes as much room as any other.
type Key = [u8; 32];

/// What the authority said and may be said again.
#[derive(Debug, Default)]
struct Memory {
    /// At which socket it was said.
    socket: Option<Result<Identity, Trouble>>,
    /// Whether that was told to those who run the host.
    told: bool,
    answers: HashMap<Key, Kept>,
}

#[derive(Debug)]
struct Kept {
    answer: Answer,
    until: Instant,
}

impl Memory {
    /// Forgets everything if the socket is not the one it was.
    fn meet(&mut self, socket: &Result<Identity, Trouble>) {
        if self.socket.as_ref() != Some(socket) {
            self.socket = Some(socket.clone());
            self.told = false;
            self.answers.clear();
        }
    }

    fn recall(&self, key: &Key, now: Instant) -> Option<Answer> {
        let kept = self.answers.get(key)?;
        (now < kept.until).then(|| kept.answer.clone())
    }

    /// Remembers what was said at that socket. A lifetime counts from before the question was asked, so it is over for us no later than for the
    /// authority. Where there is no room left, nothing is remembered until something is forgotten.
    fn keep<'a>(
        &mut self,
        identity: Identity,
        asked_at: Instant,
        said: impl Iterator<Item = (Key, &'a Answer)>,
    ) {
        if self.socket != Some(Ok(identity)) {
            return;
        }
        let now = Instant::now();
        let mut swept = false;
        for (key, answer) in said {
            let until = asked_at + answer.ttl.min(MAX_TTL);
            if until <= now {
                continue;
            }
            if self.answers.len() >= MAX_REMEMBERED && !swept {
                self.answers.retain(|_, kept| now < kept.until);
                swept = true;
            }
            if self.answers.len() < MAX_REMEMBERED || self.answers.contains_key(&key) {
                let answer = answer.clone();
                self.answers.insert(key, Kept { answer, until });
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    fn answer(ttl: Duration) -> Answer {
        Answer {
            opinion: Opinion::None,
            ttl,
            wants: None,
        }
    }

    /// A memory of a socket that is really there.
    fn memory() -> (Memory, Identity, tempfile::TempDir) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let owner = std::os::unix::fs::MetadataExt::uid(&path.metadata().unwrap());
        let identity = connection::look(&path, owner).unwrap();
        let mut memory = Memory::default();
        memory.meet(&Ok(identity));
        (memory, identity, folder)
    }

    #[test]
    fn a_lifetime_counts_from_the_question_and_ends_at_the_limit() {
        let (mut memory, identity, _folder) = memory();
        let now = Instant::now();
        let said = [([1; 32], &answer(HOUR)), ([2; 32], &answer(MAX_TTL / 2))];
        memory.keep(identity, now, said.into_iter());
        for (key, lifetime) in [([1; 32], MAX_TTL), ([2; 32], MAX_TTL / 2)] {
            let nearly = now + lifetime - Duration::from_nanos(1);
            assert!(memory.recall(&key, nearly).is_some());
            assert!(memory.recall(&key, now + lifetime).is_none());
        }
        let long_ago = now.checked_sub(MAX_TTL).unwrap();
        memory.keep(identity, long_ago, [([3; 32], &answer(HOUR))].into_iter());
        memory.keep(
            identity,
            now,
            [([4; 32], &answer(Duration::ZERO))].into_iter(),
        );
        assert_eq!(
            memory.answers.len(),
            said.len(),
            "what is over takes no room"
        );
    }

    #[test]
    fn what_was_said_at_another_socket_is_not_remembered() {
        let (mut memory, old, _folder) = memory();
        let (_, new, _folder) = self::memory();
        memory.meet(&Ok(new));
        let said = [([1; 32], &answer(HOUR))];
        memory.keep(old, Instant::now(), said.into_iter());
        assert!(memory.answers.is_empty());
    }

    #[test]
    fn a_full_memory_has_room_again_when_something_is_over() {
        let (mut memory, identity, _folder) = memory();
        let mut keys = (0_u64..).map(|n| {
            let mut key = [0; 32];
            key[..8].copy_from_slice(&n.to_le_bytes());
            key
        });
        let full: Vec<Key> = keys.by_ref().take(MAX_REMEMBERED).collect();
        let now = Instant::now();
        let kept = answer(HOUR);
        memory.keep(identity, now, full.iter().map(|key| (*key, &kept)));
        let one_more = keys.next().unwrap();
        memory.keep(identity, now, [(one_more, &kept)].into_iter());
        assert!(memory.recall(&one_more, now).is_none());
        memory.answers.get_mut(&full[7]).unwrap().until = now;
        memory.keep(identity, now, [(one_more, &kept)].into_iter());
        assert!(memory.recall(&one_more, now).is_some());
        assert_eq!(memory.answers.len(), MAX_REMEMBERED);
    }
}
