//! `job list|wait|cancel`, and the following of jobs with a bar or plain lines.

use std::{
    ops::ControlFlow,
    time::{Duration, Instant},
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::Value;
use uuid::Uuid;
use xman_client::{Address, Caller, Event, Explanation, Failure, Kind, Wait, fleet};
use xman_common::protocol::{
    Item, JobList, JobRow, JobState, OnJob, Progress, Reply, Request, Verb,
};

use crate::{
    change::{change, may},
    clean,
    exit::Tally,
    heard::conclude,
    options::Format,
    output::{Field, Output, Row, Style, error_value},
    setting::{Setting, Stop, misfit},
    target::split,
    told::goes_on,
    units::{bytes, moment, span},
    values::job_value,
};

/// What `rxm help job` says after the options.
pub(crate) const HELP: &str = "\
Examples:
  rxm -H @grid job list
  rxm -H @grid job wait 2c8c1f0e-4a56-4f0c-9d0b-0f4f6f0f3c11
  rxm job cancel skirit80/2c8c1f0e-4a56-4f0c-9d0b-0f4f6f0f3c11";

/// What to do with jobs.
#[derive(Debug, Subcommand)]
pub(crate) enum Job {
    /// List the jobs that hosts remember
    #[command(after_help = "\
JSON: host, id, principal, verb, domain, uuid, detail, state, result, began_ms, ended_ms, progress (phase, percent, done_bytes, remaining_bytes, \
    total_bytes, rate_bytes_per_s, elapsed_ms, eta_ms) or null.")]
    List,
    /// Wait for a job and show how far it is
    Wait {
        /// ID or HOST/ID
        #[arg(value_name = "ID")]
        job: String,
    },
    /// Give up a job
    Cancel {
        /// ID or HOST/ID
        #[arg(value_name = "ID")]
        job: String,
    },
}

/// Reads the id of a job.
pub(crate) fn job_id(text: &str) -> Result<Uuid, String> {
    Uuid::try_parse(text).map_err(|_| format!("'{text}' is no job id; `rxm job list` shows them"))
}

/// How often a line is written where no bar can be drawn.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// `rxm job list`
pub(crate) async fn list(setting: &Setting) -> Result<Tally, Stop> {
    let hosts = setting.hosts()?;
    setting.check_ticket().await?;
    let heard = lists(setting, hosts).await;
    match setting.output.format {
        Format::Json | Format::Yaml => {
            let values = |(address, jobs): &(Address, Result<Vec<JobRow>, Explanation>)| match jobs
            {
                Ok(jobs) => jobs.iter().map(|job| job_value(address, job)).collect(),
                Err(error) => vec![error_value(address, error)],
            };
            let values: Vec<Value> = heard.iter().flat_map(values).collect();
            setting.output.values(values)?;
        }
        Format::Name => {
            for (address, job) in heard
                .iter()
                .flat_map(|(address, jobs)| jobs.iter().flatten().map(move |job| (address, job)))
            {
                setting.output.line(&if heard.len() > 1 {
                    format!("{address}/{}", job.id)
                } else {
                    job.id.to_string()
                })?;
            }
        }
        Format::Table | Format::Wide => {
            let is_wide = setting.output.format == Format::Wide;
            let rows = heard.iter().flat_map(|(address, jobs)| {
                jobs.iter()
                    .flatten()
                    .map(move |job| row(address, job, is_wide))
            });
            setting.output.table(headers(is_wide), rows.collect())?;
            if setting.output.is_terminal
                && heard
                    .iter()
                    .all(|(_, jobs)| jobs.as_ref().is_ok_and(Vec::is_empty))
            {
                setting.output.note("no jobs");
            }
        }
    }
    Ok(conclude(setting, &heard))
}

async fn lists(
    setting: &Setting,
    hosts: Vec<Address>,
) -> Vec<(Address, Result<Vec<JobRow>, Explanation>)> {
    fleet::all(hosts, fleet::WIDTH, |address| async move {
        let mut caller = setting.caller(&address);
        let jobs = jobs(setting, &mut caller).await;
        (address, jobs)
    })
    .await
}

async fn jobs(setting: &Setting, caller: &mut Caller) -> Result<Vec<JobRow>, Explanation> {
    let (_, items) = setting
        .ask(caller, &Request::JobList(JobList::default()))
        .await?;
    let job = |item| {
        if let Item::Job(job) = item {
            Ok(job)
        } else {
            Err(misfit())
        }
    };
    items.into_iter().map(job).collect()
}

/// Returns one of the host's jobs as it lists it; nothing where it does not.
pub(crate) async fn listed(setting: &Setting, caller: &mut Caller, id: Uuid) -> Option<JobRow> {
    let jobs = jobs(setting, caller).await.ok()?;
    jobs.into_iter().find(|job| job.id == id)
}

fn headers(is_wide: bool) -> &'static [&'static str] {
    match is_wide {
        false => &["HOST", "ID", "WHAT", "STATE", "PROGRESS", "BEGAN"],
        true => &[
            "HOST", "ID", "WHAT", "STATE", "PROGRESS", "BEGAN", "ENDED", "BY", "RESULT",
        ],
    }
}

fn row(address: &Address, job: &JobRow, is_wide: bool) -> Row {
    let progress = job
        .progress
        .as_ref()
        .map_or_else(|| "-".to_owned(), |p| format!("{}%", p.percent.min(100)));
    let style = match job.state {
        JobState::Running => Style::Waiting,
        JobState::Done => Style::Good,
        JobState::Failed | JobState::Unknown => Style::Bad,
    };
    let mut cells: Vec<Field> = vec![
        address.to_string().into(),
        job.id.to_string().into(),
        what(job).into(),
        Field {
            text: job.state.to_string(),
            style,
        },
        progress.into(),
        moment(job.began_ms / 1000).into(),
    ];
    if is_wide {
        cells.extend([
            job.ended_ms
                .map_or_else(|| "-".to_owned(), |ended| moment(ended / 1000))
                .into(),
            job.principal.to_string().into(),
            job.result.clone().into(),
        ]);
    }
    Row::plain(cells)
}

fn what(job: &JobRow) -> String {
    format!("{} {} {}", job.verb, job.domain, job.detail)
        .trim_end()
        .to_owned()
}

/// `rxm job wait`
pub(crate) async fn wait(setting: &Setting, typed: &str) -> Result<Tally, Stop> {
    let (address, id) = find(setting, typed).await?;
    let mut caller = setting.caller(&address);
    let request = Request::JobWait(OnJob { job: id });
    let mut meter = Meter::new(&setting.output, format!("{address}/{id}"));
    let outcome = follow(
        setting,
        &mut caller,
        &request,
        Uuid::new_v4(),
        &mut meter,
        |_| ControlFlow::Continue(()),
    )
    .await;
    meter.finish();
    match outcome {
        Ok(Reply::Job(job)) => tell(setting, &address, &job),
        Ok(_) => Ok(conclude(setting, &[(address, Err::<(), _>(misfit()))])),
        Err(failure) => {
            if setting.patience.interrupt.is_raised() {
                setting.output.note(&goes_on(&address, id));
            }
            Ok(conclude(
                setting,
                &[(
                    address.clone(),
                    Err::<(), _>(setting.explain(&failure, &address)),
                )],
            ))
        }
    }
}

/// Prints how a job ended.
pub(crate) fn tell(setting: &Setting, address: &Address, job: &JobRow) -> Result<Tally, Stop> {
    let mut tally = Tally::default();
    let is_well = matches!(job.state, JobState::Done | JobState::Running);
    if is_well {
        tally.done()
    } else {
        tally.failed(Kind::Refused)
    }
    match setting.output.format {
        Format::Json | Format::Yaml => setting.output.values(vec![job_value(address, job)])?,
        Format::Name => setting.output.line(&job.id.to_string())?,
        Format::Table | Format::Wide if is_well => {
            let took = job
                .ended_ms
                .map(|ended| Duration::from_millis(ended.saturating_sub(job.began_ms)));
            let took = took
                .map(|took| format!(" in {}", span(took)))
                .unwrap_or_default();
            setting.output.success(&format!(
                "{address}/{}: {} {}: {}{took}",
                job.domain, job.verb, job.detail, job.state
            ))?;
        }
        Format::Table | Format::Wide => {}
    }
    if !is_well {
        setting.output.say(&format!(
            "{address}/{}: {} {}: {}: {}",
            job.domain, job.verb, job.detail, job.state, job.result
        ));
    }
    Ok(tally)
}

/// `rxm job cancel`
pub(crate) async fn cancel(setting: &Setting, typed: &str) -> Result<Tally, Stop> {
    let (address, id) = find(setting, typed).await?;
    if setting.dry_run {
        let mut caller = setting.caller(&address);
        let allowed = may(setting, &mut caller, Verb::JobCancel, None).await;
        let heard = match allowed {
            Ok(allowed) => {
                let permission = setting.permission(allowed);
                setting
                    .output
                    .line(&format!("would cancel job {id} on {address}: {permission}"))?;
                if !allowed {
                    return Err(Stop::Code(crate::exit::FAILED));
                }
                Ok(())
            }
            Err(error) => Err(error),
        };
        return Ok(conclude(setting, &[(address, heard)]));
    }
    let mut caller = setting.caller(&address);
    let outcome = change(setting, &mut caller, &Request::JobCancel(OnJob { job: id })).await;
    if let Ok(reply) = &outcome {
        match (setting.output.format, reply) {
            (Format::Json | Format::Yaml, Reply::Job(job)) => {
                setting.output.values(vec![job_value(&address, job)])?
            }
            (Format::Json | Format::Yaml, _) => setting
                .output
                .values(vec![serde_json::json!({ "host": address, "id": id })])?,
            (Format::Name, _) => setting.output.line(&id.to_string())?,
            (Format::Table | Format::Wide, _) => setting
                .output
                .success(&format!("{address}: job {id} is given up"))?,
        }
    }
    Ok(conclude(setting, &[(address, outcome)]))
}

/// Finds the host that has a job: the one before the slash, the only one there is, or the one that lists it.
async fn find(setting: &Setting, typed: &str) -> Result<(Address, Uuid), Stop> {
    let (host, id) = split(typed);
    let id = job_id(id).map_err(Stop::Usage)?;
    let hosts = match host {
        Some(host) => setting.hosts_before_slash(host)?,
        None => setting.hosts()?,
    };
    setting.check_ticket().await?;
    if let [host] = hosts.as_slice() {
        return Ok((host.clone(), id));
    }
    let heard = lists(setting, hosts).await;
    let has_it = |(_, jobs): &&(Address, Result<Vec<JobRow>, Explanation>)| {
        jobs.as_ref()
            .is_ok_and(|jobs| jobs.iter().any(|job| job.id == id))
    };
    if let Some((address, _)) = heard.iter().find(has_it) {
        return Ok((address.clone(), id));
    }
    let tally = conclude(setting, &heard);
    setting.output.say(&format!(
        "no host that answered has a job {id}; `rxm job list` shows those there are"
    ));
    Err(Stop::Code(if tally.code() == 0 {
        crate::exit::FAILED
    } else {
        tally.code()
    }))
}

/// Makes a call that follows a job and shows how far it is.
pub(crate) async fn follow(
    setting: &Setting,
    caller: &mut Caller,
    request: &Request,
    id: Uuid,
    meter: &mut Meter,
    mut also: impl FnMut(&Event) -> ControlFlow<()>,
) -> Result<Reply, Failure> {
    caller
        .call(request, id, Wait::Follow, |event| {
            match &event {
                Event::Progress(progress) => meter.show(progress),
                Event::Expiring(seconds) => meter.aside(|| setting.warn_of_expiry(*seconds)),
                Event::Again => {
                    meter.aside(|| setting.output.note("the connection was lost; asking again"))
                }
                Event::Items(_) | Event::Alive => {}
            }
            also(&event)
        })
        .await
}

/// Shows how far something is: a bar on a terminal, a line now and then elsewhere, nothing for who wants nothing.
pub(crate) struct Meter {
    label: String,
    how: How,
}

enum How {
    Bar(ProgressBar),
    Lines { last: Option<Instant> },
    Silent,
}

impl Meter {
    pub(crate) fn new(output: &Output, label: String) -> Self {
        let how = match (output.can_draw, output.wants_notes()) {
            (true, _) => How::Bar(bar(&label)),
            (false, true) => How::Lines { last: None },
            (false, false) => How::Silent,
        };
        Self { label, how }
    }

    /// Returns a meter that shows nothing.
    pub(crate) fn silent() -> Self {
        Self {
            label: String::new(),
            how: How::Silent,
        }
    }

    fn show(&mut self, progress: &Progress) {
        match &mut self.how {
            How::Bar(bar) => {
                bar.set_position(progress.percent.min(100).into());
                bar.set_message(in_words(progress));
            }
            How::Lines { last } if last.is_none_or(|last| last.elapsed() >= LINE_EVERY) => {
                *last = Some(Instant::now());
                eprintln!(
                    "rxm: {}: {}% {}",
                    self.label,
                    progress.percent.min(100),
                    in_words(progress)
                );
            }
            How::Lines { .. } | How::Silent => {}
        }
    }

    /// Says something without spoiling the bar.
    fn aside(&self, say: impl FnOnce()) {
        match &self.how {
            How::Bar(bar) => bar.suspend(say),
            How::Lines { .. } | How::Silent => say(),
        }
    }

    /// Takes the bar away.
    pub(crate) fn finish(&self) {
        if let How::Bar(bar) = &self.how {
            bar.finish_and_clear();
        }
    }
}

fn bar(label: &str) -> ProgressBar {
    let bar = ProgressBar::new(100);
    let style = ProgressStyle::with_template("{prefix} [{bar:20}] {percent}% {wide_msg}");
    bar.set_style(
        style
            .unwrap_or_else(|_| ProgressStyle::default_bar())
            .progress_chars("=> "),
    );
    bar.set_prefix(clean::line(label).into_owned());
    bar
}

/// How far something is, after its percentage; what matters most comes first, since a line has an end.
fn in_words(progress: &Progress) -> String {
    let mut parts = Vec::new();
    if let Some(eta) = progress.eta_ms {
        parts.push(format!("{} to go", span(Duration::from_millis(eta))));
    }
    if progress.rate > 0 {
        parts.push(format!("{}/s", bytes(progress.rate)));
    }
    if progress.total_bytes > 0 {
        parts.push(format!("{} left", bytes(progress.remaining_bytes)));
        parts.push(format!(
            "{} of {}",
            bytes(progress.done_bytes),
            bytes(progress.total_bytes)
        ));
    }
    parts.push(clean::line(&progress.phase).into_owned());
    parts.retain(|part| !part.is_empty());
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_told_in_words() {
        let mut progress = Progress {
            phase: "copying memory\x1b[2J".to_owned(),
            percent: 250,
            done_bytes: 1 << 30,
            remaining_bytes: 1 << 29,
            total_bytes: 3 << 29,
            rate: 100 << 20,
            elapsed_ms: 10,
            eta_ms: Some(5120),
        };
        assert_eq!(
            in_words(&progress),
            "5.1s to go, 100 MiB/s, 512 MiB left, 1 GiB of 1.5 GiB, copying memory\\u{1b}[2J"
        );
        progress = Progress {
            phase: "preparing".to_owned(),
            total_bytes: 0,
            rate: 0,
            eta_ms: None,
            ..progress
        };
        assert_eq!(in_words(&progress), "preparing");
    }
}
