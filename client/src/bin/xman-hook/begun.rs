//! Which run of a job began here, for Slurm's epilogs.
//!
//! Slurm counts a job's runs, and a requeue counts before the epilogs of the run that ended are called: both see the number of the run that comes next (tried with
//! 22.05.8). An end by that number would end the next run before it began. So the prologs write the number down, and the epilogs take it from there.

use std::time::Duration;

use crate::{
    config::Config,
    folder::Folder,
    hook::{Hook, Kind},
    intent::{Intent, Spot},
    told::Told,
    verdict::Class,
};

/// The most jobs that run at once: Slurm's own MaxJobCount is 10,000.
const MAX_BEGUN: usize = 20_000;
/// What is older was left by an epilog that never ran.
const FORGOTTEN: Duration = Duration::from_secs(60 * 24 * 3600);

/// Returns the run that an epilog ends: the one that was written down, or else the last that cannot be one which comes next. Where that is too low
/// the lease ends with the other epilog, or when `slurm watch` reconciles.
fn ended(written: Option<u32>, counted: u32) -> u32 {
    match written {
        Some(run) if run <= counted => run,
        Some(_) | None => counted.saturating_sub(1),
    }
}

/// The runs that began by the controller's prologs, for who looks at all jobs.
pub(crate) struct Written {
    folder: Folder,
}

impl Written {
    pub(crate) fn open(config: &Config) -> Result<Self, String> {
        let folder = Folder::open(&config.queue_dir.join("begun"), MAX_BEGUN)
            .map_err(|error| format!("queue-dir: {error}"))?;
        Ok(Self { folder })
    }

    /// Returns the run of a job that is about to begin or to end, which Slurm may have counted on already.
    pub(crate) fn run(&self, job: u32, counted: u32) -> u32 {
        let text = self.folder.read(&format!("{job}@")).ok().flatten();
        text.and_then(|text| text.parse().ok())
            .filter(|run| *run <= counted)
            .unwrap_or(counted)
    }
}

/// What is written of a job.
pub(crate) struct Begun {
    folder: Folder,
    name: String,
}

impl Begun {
    fn open(config: &Config, hook: Hook, spots: &[Spot]) -> Option<Result<Self, String>> {
        let spot = spots.first()?;
        let id = spot.key.job.id.as_str();
        let name = if matches!(hook, Hook::SlurmProlog | Hook::SlurmEpilog) {
            // One machine can be several nodes.
            format!("{id}@{}", spot.place.domain)
        } else {
            // All of its nodes begin and end together.
            format!("{id}@")
        };
        let folder = Folder::open(&config.queue_dir.join("begun"), MAX_BEGUN);
        Some(match folder {
            Ok(folder) => Ok(Self { folder, name }),
            Err(error) => Err(error.to_string()),
        })
    }

    /// Writes down which run begins.
    pub(crate) fn note(config: &Config, told: &Told, hook: Hook, intent: &Intent) -> Option<Self> {
        let Intent::Begin { spots, .. } = intent else {
            return None;
        };
        let run = spots.first()?.key.run.to_string();
        let written = Self::open(config, hook, spots)?.and_then(|begun| {
            let again = |_| {
                begun.folder.prune(FORGOTTEN)?;
                begun.folder.write(&begun.name, &run)
            };
            let written = begun.folder.write(&begun.name, &run).or_else(again);
            written.map(|()| begun).map_err(|error| error.to_string())
        });
        written
            .map_err(|error| told.warning(format!("the run cannot be written down: {error}")))
            .ok()
    }

    /// Has an end name the run that began.
    pub(crate) fn recall(
        config: &Config,
        told: &Told,
        hook: Hook,
        intent: &mut Intent,
    ) -> Option<Self> {
        let Intent::End { spots } = intent else {
            return None;
        };
        let found = Self::open(config, hook, spots)?.and_then(|begun| {
            let text = begun.folder.read(&begun.name);
            text.map(|text| (text.and_then(|text| text.parse().ok()), begun))
                .map_err(|error| error.to_string())
        });
        let (written, begun) = match found {
            Ok((written, begun)) => (written, Some(begun)),
            Err(error) => {
                told.warning(format!(
                    "what was written of the run cannot be read: {error}"
                ));
                (None, None)
            }
        };
        for spot in spots {
            spot.key.run = ended(written, spot.key.run);
        }
        begun
    }

    /// What has ended, or whose end is kept, needs no more to be known.
    pub(crate) fn settle(self, hook: Hook, class: Class) {
        if hook.kind() == Kind::End && matches!(class, Class::Done | Class::Kept) {
            let _ = self.folder.remove(&self.name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{config::tests::config, intent, intent::Job};

    #[test]
    fn an_end_never_names_a_run_that_comes_next() {
        // Counted on while the epilog runs: the job was requeued.
        assert_eq!(ended(Some(0), 1), 0);
        // Not: it ended.
        assert_eq!(ended(Some(1), 1), 1);
        assert_eq!(ended(Some(0), 0), 0);
        // No prolog ran here.
        assert_eq!(ended(None, 0), 0);
        assert_eq!(ended(None, 3), 2);
        // What is written is of another time.
        assert_eq!(ended(Some(7), 3), 2);
    }

    #[test]
    fn a_requeued_jobs_epilogs_end_the_run_that_began() {
        let dir = tempfile::tempdir().unwrap();
        let queue = dir.path().join("q");
        let config = config(&format!(
            "cluster = \"grid\"\nqueue-dir = \"{}\"\n[[map]]\nnodes = \"cloud[1-2]\"\nhost = \"h\"\ndomain = \"{{node}}\"\n",
            queue.display()
        ))
        .unwrap();
        let told = Told::new("/nonexistent".as_ref(), "x");
        let job = |run, nodes: &str| Job {
            id: "7".to_owned(),
            run,
            nodes: nodes.to_owned(),
            user: None,
            cluster: None,
        };
        for (prolog, epilog, nodes) in [
            (
                Hook::SlurmPrologController,
                Hook::SlurmEpilogController,
                "cloud[1-2]",
            ),
            (Hook::SlurmProlog, Hook::SlurmEpilog, "cloud1"),
        ] {
            for (began, counted, ends) in [(0, 1, 0), (1, 1, 1), (1, 2, 1)] {
                let begin = intent::intent(prolog, &job(began, nodes), &config).unwrap();
                Begun::note(&config, &told, prolog, &begin).unwrap();
                let mut end = intent::intent(epilog, &job(counted, nodes), &config).unwrap();
                let begun = Begun::recall(&config, &told, epilog, &mut end).unwrap();
                let Intent::End { spots } = &end else {
                    panic!("{end:?}");
                };
                assert!(
                    spots.iter().all(|spot| spot.key.run == ends),
                    "{began} {counted}"
                );
                begun.settle(epilog, Class::Kept);
                assert!(
                    Folder::open(&queue.join("begun"), 9)
                        .unwrap()
                        .names()
                        .unwrap()
                        .is_empty()
                );
            }
        }
    }
}
