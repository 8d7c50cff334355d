//! `migrate`: a job that is followed, let go of, or given up.

use std::ops::ControlFlow;

use serde_json::json;
use uuid::Uuid;
use xman_client::{Address, Caller, Event, caller::may_have_happened};
use xman_common::protocol::{Item, JobList, Migrate, Reply, Request, Verb, Way};

use crate::{
    args::MigrateArgs,
    change::{abort_migration, rehearse},
    exit::Tally,
    job::{Meter, follow, goes_on, tell},
    output::Complaints,
    setting::{Setting, Stop, misfit},
    show::{conclude, job_value},
    target::{self, Purpose},
};

/// `rxm migrate`
pub(crate) async fn migrate(setting: &Setting, args: MigrateArgs) -> Result<Tally, Stop> {
    let MigrateArgs {
        domain,
        destination,
        bandwidth,
        downtime,
        detach,
        abort,
    } = args;
    let Some(destination) = destination.filter(|_| !abort) else {
        return abort_migration(setting, domain).await;
    };
    let (target, mut caller, found) = target::find_one(setting, &domain, Purpose::Change).await?;
    if setting.dry_run {
        return rehearse(setting, (Verb::Migrate, None), vec![target], &found.silent).await;
    }
    let id = Uuid::new_v4();
    let label = target.label();
    let shown = format!("{label} to {destination}");
    let request = Request::Migrate(Migrate {
        domain: target.domain.clone(),
        destination,
        bandwidth,
        downtime_ms: downtime,
        way: Way::Direct,
    });
    let mut meter = if detach {
        Meter::silent()
    } else {
        Meter::new(&setting.output, shown)
    };
    let mut detached = false;
    let outcome = follow(setting, &mut caller, &request, id, &mut meter, |event| {
        // What shows that it is under way shows that it can be let go.
        detached |= detach && matches!(event, Event::Progress(_) | Event::Alive);
        if detached {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        }
    })
    .await;
    meter.finish();
    let address = target.address;
    match outcome {
        Ok(Reply::Job(job)) if detach => {
            setting.output.line(&job.id.to_string())?;
            tell(setting, &address, &job)
        }
        Ok(Reply::Job(job)) => tell(setting, &address, &job),
        Ok(_) => Ok(conclude(setting, &[(address, Err::<(), _>(misfit()))])),
        Err(failure) if detached && may_have_happened(&failure) => {
            let_go(setting, &mut caller, &address, id).await
        }
        Err(failure) => {
            let mut explanation = setting.explain_change(&failure, &address);
            if may_have_happened(&failure) {
                explanation.advice = goes_on(&address, id);
            }
            let mut tally = Tally::default();
            tally.failed(explanation.kind);
            let mut complaints = Complaints::default();
            complaints.add(label, &explanation);
            complaints.say(&setting.output);
            Ok(tally)
        }
    }
}

/// Prints the job that goes on alone.
async fn let_go(
    setting: &Setting,
    caller: &mut Caller,
    address: &Address,
    id: Uuid,
) -> Result<Tally, Stop> {
    let mut tally = Tally::default();
    tally.done();
    if !setting.output.is_structured() {
        setting.output.line(&id.to_string())?;
        setting.output.note(&goes_on(address, id));
        return Ok(tally);
    }
    let listed = setting
        .ask(caller, &Request::JobList(JobList::default()))
        .await;
    let job = listed.ok().and_then(|(_, items)| {
        items.into_iter().find_map(|item| {
            let Item::Job(job) = item else { return None };
            (job.id == id).then_some(job)
        })
    });
    let value = job.map_or_else(
        || json!({ "host": address, "id": id }),
        |job| job_value(address, &job),
    );
    setting.output.values(vec![value])?;
    Ok(tally)
}
