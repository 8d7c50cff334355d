//! What a hook is to bring about: read from what the batch system says of a job, and from the map. No input or output happens here.
//!
//! A job that has several nodes has a lease for each of them, of one key and each in its own domain; each node's epilog ends that node's alone.

use xman_client::{
    BadHosts, HostSet,
    name::{BadName, JobId, LabelValue, Principal, Tag},
    protocol::{Depth, JobKey, LeaseKey},
};

use crate::{
    config::{Config, InsideDepth, Unmapped},
    hook::{Hook, Kind},
    nodes::{NoPlace, Place},
};

/// The longest name of a user, in bytes.
const MAX_USER: usize = 256;

/// What a batch system says of a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Job {
    pub(crate) id: String,
    pub(crate) run: u32,
    /// As a node set.
    pub(crate) nodes: String,
    pub(crate) user: Option<String>,
    pub(crate) cluster: Option<String>,
}

/// A job's part on one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Spot {
    pub(crate) key: LeaseKey,
    pub(crate) place: Place,
}

/// What is to be brought about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Intent {
    /// Room for a job on all of its nodes, or on none.
    Begin {
        spots: Vec<Spot>,
        user: Option<Principal>,
        preemptible: Option<bool>,
        ends_in_ms: Option<u64>,
    },
    /// No room any more.
    End { spots: Vec<Spot> },
    /// The job of these domains is suspended.
    Preempt {
        spots: Vec<Spot>,
        depth: Option<Depth>,
        reason: Option<LabelValue>,
    },
    /// It goes on.
    Resume { spots: Vec<Spot> },
    /// None of the nodes is xman's.
    Nothing,
}

/// What the batch system said makes no sense.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadCall {
    #[error("{0} is not set; is this {1}?")]
    Missing(&'static str, &'static str),
    #[error("{what} '{text}' is no number")]
    Number { what: &'static str, text: String },
    #[error("the job's nodes: {0}")]
    Nodes(#[from] BadHosts),
    #[error("the job has no nodes")]
    NoNodes,
    #[error(transparent)]
    JobId(BadName),
    #[error("the cluster's name: {0}; `cluster` in hook.toml gives it another")]
    Cluster(BadName),
    #[error("no cluster is named, neither by the batch system nor by `cluster` in hook.toml")]
    NoCluster,
    #[error("'{0}' is the name of no user")]
    User(String),
    #[error("{0}; see [[map]], map-file and unmapped in hook.toml")]
    NoPlace(#[from] NoPlace),
    #[error("{0}")]
    Other(String),
}

/// Reads a number of the batch system's, where there is one.
pub(crate) fn number(what: &'static str, text: &str) -> Result<u32, BadCall> {
    match text.parse() {
        Ok(number) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(number),
        Ok(_) | Err(_) => Err(BadCall::Number {
            what,
            text: text.to_owned(),
        }),
    }
}

/// Returns what a hook is to bring about for a job.
pub(crate) fn intent(hook: Hook, job: &Job, config: &Config) -> Result<Intent, BadCall> {
    let spots = spots(job, config)?;
    if spots.is_empty() {
        return Ok(Intent::Nothing);
    }
    Ok(match hook.kind() {
        Kind::Begin => Intent::Begin {
            spots,
            user: user(job.user.as_deref(), config)?,
            preemptible: None,
            ends_in_ms: None,
        },
        Kind::End => Intent::End { spots },
        Kind::Suspend => Intent::Preempt {
            spots,
            depth: hook.is_inside().then_some(match config.inside {
                InsideDepth::Starve => Depth::Starve,
                InsideDepth::Shrink => Depth::Shrink,
            }),
            reason: format!("{} suspended the job", config.system).parse().ok(),
        },
        Kind::Resume => Intent::Resume { spots },
        Kind::PowerUp | Kind::PowerDown => Intent::Nothing,
    })
}

/// Returns a job's nodes that are xman's.
pub(crate) fn spots(job: &Job, config: &Config) -> Result<Vec<Spot>, BadCall> {
    let nodes = HostSet::nodes(&job.nodes)?;
    if nodes.is_empty() {
        return Err(BadCall::NoNodes);
    }
    let cluster = cluster(job, config)?;
    let id = lease_id(&job.id)?;
    let mut spots = Vec::new();
    for node in &nodes {
        let place = match config.nodes.place(node.as_str()) {
            Ok(place) => place,
            Err(NoPlace::Unknown(_)) if config.unmapped == Unmapped::Ignore => continue,
            Err(error) => return Err(error.into()),
        };
        spots.push(Spot {
            key: LeaseKey {
                job: JobKey {
                    system: config.system.clone(),
                    cluster: cluster.clone(),
                    id: id.clone(),
                },
                run: job.run,
            },
            place,
        });
    }
    Ok(spots)
}

/// Returns what leases call a job.
pub(crate) fn lease_id(job: &str) -> Result<JobId, BadCall> {
    job.parse().map_err(BadCall::JobId)
}

/// hook.toml goes before what the batch system says.
fn cluster(job: &Job, config: &Config) -> Result<Tag, BadCall> {
    if let Some(cluster) = &config.cluster {
        return Ok(cluster.clone());
    }
    let told = job.cluster.as_deref().ok_or(BadCall::NoCluster)?;
    told.to_ascii_lowercase().parse().map_err(BadCall::Cluster)
}

/// Returns the principal of a user's name: nothing that could be taken for another's instance or realm.
pub(crate) fn user(name: Option<&str>, config: &Config) -> Result<Option<Principal>, BadCall> {
    let (Some(name), Some(realm)) = (name, &config.user_realm) else {
        return Ok(None);
    };
    let is_plain = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '+' | '$');
    let bad = || BadCall::User(name.to_owned());
    if name.is_empty() || name.len() > MAX_USER || !name.chars().all(is_plain) {
        return Err(bad());
    }
    format!("{name}@{realm}")
        .parse()
        .map(Some)
        .map_err(|_| bad())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::config::tests::config;
    use proptest::prelude::*;

    pub(crate) fn grid(more: &str) -> Config {
        config(&format!(
            "cluster = \"grid\"\nuser-realm = \"EX.ORG\"\n{more}\n[[map]]\nnodes = \"cloud[1-4]\"\nhost = \"skirit{{n}}\"\ndomain = \"{{node}}\"\n"
        ))
        .unwrap()
    }

    fn job(nodes: &str) -> Job {
        Job {
            id: "4711".to_owned(),
            run: 2,
            nodes: nodes.to_owned(),
            user: Some("alice".to_owned()),
            cluster: None,
        }
    }

    #[test]
    fn each_node_of_a_job_has_its_own_lease() {
        let found = intent(Hook::SlurmPrologController, &job("cloud[1-2]"), &grid("")).unwrap();
        let Intent::Begin { spots, user, .. } = found else {
            panic!("{found:?}");
        };
        let shown: Vec<_> = spots
            .iter()
            .map(|spot| format!("{} {} {}", spot.key, spot.place.host, spot.place.domain))
            .collect();
        assert_eq!(
            shown,
            [
                "slurm/grid/4711/2 skirit1 cloud1",
                "slurm/grid/4711/2 skirit2 cloud2"
            ]
        );
        assert_eq!(user.unwrap().as_str(), "alice@EX.ORG");
    }

    #[test]
    fn a_node_without_a_domain_is_a_mistake_unless_it_is_said_not_to_be() {
        let strange = job("cloud1,web7");
        assert!(matches!(
            intent(Hook::SlurmProlog, &strange, &grid("")),
            Err(BadCall::NoPlace(_))
        ));
        let lenient = grid("unmapped = \"ignore\"");
        assert_eq!(spots(&strange, &lenient).unwrap().len(), 1);
        let found = intent(Hook::SlurmProlog, &job("web7"), &lenient).unwrap();
        assert_eq!(found, Intent::Nothing);
    }

    #[test]
    fn what_is_inside_never_goes_so_deep_that_it_cannot_come_back() {
        for hook in [Hook::SgeSuspend, Hook::PbsSuspend] {
            let Intent::Preempt { depth, .. } = intent(hook, &job("cloud1"), &grid("")).unwrap()
            else {
                panic!("{hook:?}");
            };
            assert_eq!(depth, Some(Depth::Starve));
        }
        let outside = intent(Hook::GenericPreempt, &job("cloud1"), &grid("")).unwrap();
        assert!(matches!(outside, Intent::Preempt { depth: None, .. }));
    }

    #[test]
    fn no_users_name_becomes_anothers_principal() {
        let grid = grid("");
        for name in [
            "alice/admin",
            "alice@OTHER",
            "a\\b",
            "a b",
            "",
            "a\nb",
            "a\0",
        ] {
            assert!(user(Some(name), &grid).is_err(), "{name:?}");
        }
        assert_eq!(user(None, &grid).unwrap(), None);
        let without = config("").unwrap();
        assert_eq!(user(Some("alice"), &without).unwrap(), None);
    }

    #[test]
    fn numbers_are_digits() {
        assert_eq!(number("x", "17"), Ok(17));
        for bad in ["", "+1", "-1", "1x", "4294967296", " 1"] {
            assert!(number("x", bad).is_err(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn whatever_a_batch_system_says_there_is_an_answer(
            id in ".{0,200}", nodes in ".{0,80}", name in ".{0,40}", cluster in ".{0,80}", run in any::<u32>()
        ) {
            let told = Job { id, run, nodes, user: Some(name), cluster: Some(cluster) };
            let config = config("user-realm = \"EX.ORG\"\n[[map]]\npattern = \"*\"\nhost = \"h\"\ndomain = \"{node}\"").unwrap();
            for hook in Hook::ALL {
                if let Ok(Intent::Begin { spots, .. }) = intent(*hook, &told, &config) {
                    for spot in spots {
                        // A key survives being shown and typed.
                        prop_assert_eq!(spot.key.to_string().parse::<LeaseKey>().unwrap(), spot.key);
                    }
                }
            }
        }
    }
}
