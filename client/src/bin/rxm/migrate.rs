//! `migrate`: a job that is followed, let go of, or given up.

use std::ops::ControlFlow;

use clap::Args;
use serde_json::json;
use uuid::Uuid;
use xman_client::{Address, Caller, Event, Explanation, Kind, caller::may_have_happened};
use xman_common::{
    name::{HostName, Principal},
    protocol::{
        Code, JobState, Migrate, MigrateIn, OnDomain, Permit, Reply, Request, SERVICE, Verb, Way,
    },
};

use crate::{
    change::{Deed, carry_out, may, rehearse},
    exit::Tally,
    heard::conclude,
    job::{Meter, follow, listed, tell},
    output::Complaints,
    setting::{Setting, Stop, misfit},
    target::{self, Purpose, Target},
    told::goes_on,
    units::{bandwidth, milliseconds},
    values::job_value,
};

/// What `rxm help migrate` says after the options.
pub(crate) const HELP: &str = "\
The domain runs on while it moves; on any failure it stays where it was. Its memory travels through the Kerberos channel between the two hosts: you need \
    the right to 'migrate' on the one and to 'migrate-in' on the other, and the hosts must be peers of each other. The migration is a job: it goes on \
    when you interrupt rxm, and 'rxm job' finds it again.

Examples:
  rxm migrate skirit80/web skirit81
  rxm migrate skirit80/web skirit81 --bandwidth 100MiB --downtime 300ms
  rxm migrate skirit80/web skirit81 --detach
  rxm migrate skirit80/web skirit81 --direct
  rxm migrate skirit80/web --abort";

/// Arguments of `migrate`.
#[derive(Debug, Args)]
pub(crate) struct MigrateArgs {
    /// NAME, UUID or HOST/NAME
    pub(crate) domain: String,
    /// The host to move it to, HOST or HOST:PORT, as both you and the source host know it
    #[arg(value_name = "DEST", required_unless_present = "abort")]
    pub(crate) destination: Option<Address>,
    /// Let the two libvirts talk directly, over the network that the source host's configuration trusts
    #[arg(long, conflicts_with = "abort")]
    pub(crate) direct: bool,
    /// At most so much a second, as 100MiB
    #[arg(long, value_name = "SIZE", value_parser = bandwidth, conflicts_with = "abort")]
    pub(crate) bandwidth: Option<u64>,
    /// At most so long a silence when it changes over, as 300ms
    #[arg(long, value_name = "TIME", value_parser = milliseconds, conflicts_with = "abort")]
    pub(crate) downtime: Option<u64>,
    /// Return as soon as it is under way, and print the job's id
    #[arg(long, conflicts_with = "abort")]
    pub(crate) detach: bool,
    /// Give up the migration that is under way
    #[arg(long, conflicts_with = "destination")]
    pub(crate) abort: bool,
}

/// `rxm migrate`
pub(crate) async fn migrate(setting: &Setting, args: MigrateArgs) -> Result<Tally, Stop> {
    let MigrateArgs {
        domain,
        destination,
        bandwidth,
        downtime,
        detach,
        direct,
        abort,
    } = args;
    let Some(destination) = destination.filter(|_| !abort) else {
        return abort_migration(setting, domain).await;
    };
    let (target, mut caller, found) = target::find_one(setting, &domain, Purpose::Change).await?;
    if setting.dry_run {
        let mut tally =
            rehearse(setting, (Verb::Migrate, None), vec![target], &found.silent).await?;
        if !direct {
            tally.add(rehearse_arrival(setting, &destination).await);
        }
        return Ok(tally);
    }
    let way = if direct {
        Way::Direct
    } else {
        match permit(setting, &caller, &target, &destination).await {
            Ok(permit) => Way::Channel {
                port: destination.port,
                permit,
            },
            Err(explanation) => return Ok(refused(setting, &destination, &explanation)),
        }
    };
    let id = Uuid::new_v4();
    let label = target.label();
    let shown = format!("{label} to {destination}");
    let request = Request::Migrate(Migrate {
        domain: target.domain.clone(),
        destination: destination.host,
        bandwidth,
        downtime_ms: downtime,
        way,
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

/// Moves one of several domains to another host, and waits for it.
pub(crate) async fn move_one(
    setting: &Setting,
    caller: &mut Caller,
    target: &Target,
    destination: &Address,
) -> Result<Reply, Explanation> {
    let permit = permit(setting, caller, target, destination)
        .await
        .map_err(|error| Explanation {
            what: format!("{destination}: {}", error.what),
            ..error
        })?;
    let request = Request::Migrate(Migrate {
        domain: target.domain.clone(),
        destination: destination.host.clone(),
        bandwidth: None,
        downtime_ms: None,
        way: Way::Channel {
            port: destination.port,
            permit,
        },
    });
    let id = Uuid::new_v4();
    let mut meter = Meter::silent();
    let moved = follow(setting, caller, &request, id, &mut meter, |_| {
        ControlFlow::Continue(())
    });
    match moved.await {
        Ok(Reply::Job(job)) if job.state == JobState::Done => Ok(Reply::Job(job)),
        Ok(Reply::Job(job)) => Err(Explanation {
            kind: Kind::Refused,
            code: Code::Refused.name(),
            what: format!("it was not moved: {}: {}", job.state, job.result),
            advice: String::new(),
            is_common: false,
        }),
        Ok(_) => Err(misfit()),
        Err(failure) => {
            let mut explanation = setting.explain_change(&failure, &target.address);
            if may_have_happened(&failure) {
                explanation.advice = goes_on(&target.address, id);
            }
            Err(setting.of_denial(explanation, &request))
        }
    }
}

/// Asks the destination, as the person who calls, to let the domain come.
async fn permit(
    setting: &Setting,
    source: &Caller,
    target: &Target,
    destination: &Address,
) -> Result<Permit, Explanation> {
    // Both are known of a domain that was found on its host.
    let (Some(row), Some(met)) = (&target.row, source.met()) else {
        return Err(misfit());
    };
    let request = Request::MigrateIn(MigrateIn {
        uuid: row.uuid,
        name: row.name.clone(),
        source: host_of(&met.service).ok_or_else(misfit)?,
        memory_kib: row.max_memory_kib,
    });
    match setting
        .ask(&mut setting.caller(destination), &request)
        .await?
    {
        (Reply::Permitted(permit), _) => Ok(permit),
        _ => Err(misfit()),
    }
}

/// Returns the host in a host's principal, `skirit80` of `xman/skirit80@EXAMPLE.ORG`.
fn host_of(service: &Principal) -> Option<HostName> {
    let (name, _) = service
        .as_str()
        .split_once('@')
        .unwrap_or((service.as_str(), ""));
    name.strip_prefix(SERVICE)?.strip_prefix('/')?.parse().ok()
}

/// Tells whether the destination would let a domain come.
pub(crate) async fn rehearse_arrival(setting: &Setting, destination: &Address) -> Tally {
    let mut caller = setting.caller(destination);
    match may(setting, &mut caller, Verb::MigrateIn, None).await {
        Ok(true) => {
            setting
                .output
                .note(&format!("{destination}: you may bring domains there"));
            Tally::default()
        }
        Ok(false) => refused(setting, destination, &denied(destination)),
        Err(explanation) if explanation.code == Code::Denied.name() => {
            refused(setting, destination, &denied(destination))
        }
        Err(explanation) => refused(setting, destination, &explanation),
    }
}

fn denied(destination: &Address) -> Explanation {
    Explanation {
        kind: Kind::Refused,
        code: Code::Denied.name(),
        what: "denied: you may not bring domains there".to_owned(),
        advice: format!("`rxm -H {destination} explain migrate-in` says why"),
        is_common: false,
    }
}

fn refused(setting: &Setting, destination: &Address, explanation: &Explanation) -> Tally {
    let mut tally = Tally::default();
    tally.failed(explanation.kind);
    let mut complaints = Complaints::default();
    complaints.add(destination.to_string(), explanation);
    complaints.say(&setting.output);
    tally
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
    let job = listed(setting, caller, id).await;
    let value = job.map_or_else(
        || json!({ "host": address, "id": id }),
        |job| job_value(address, &job),
    );
    setting.output.values(vec![value])?;
    Ok(tally)
}

/// `rxm migrate --abort`
pub(crate) async fn abort_migration(setting: &Setting, domain: String) -> Result<Tally, Stop> {
    let request = &|domain| Request::MigrateAbort(OnDomain { domain });
    let past = "its migration is given up; it stays where it was";
    carry_out(
        setting,
        &[domain],
        Deed::new(Verb::MigrateAbort, past, request),
    )
    .await
}
