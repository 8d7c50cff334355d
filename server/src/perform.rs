//! The seam between "may" and "do": one match, one arm a verb. A grant comes in and is used up.

use std::sync::Arc;

use xman_common::protocol::{Ask, Code, Fault, Item, Reply, Request, Resume, Unpause, Verb, Way};
use xman_policy::{Action, Grant};

use crate::{
    answers::{self, ROWS_A_FRAME},
    caller::{Outcome, Piece},
    console, events,
    hypervisor::{Change, Route, Target},
    images, jobs, moving, schedule,
    work::Work,
};

/// Carries out what was granted.
pub(crate) async fn perform(grant: Grant, request: Request, work: Work) -> Outcome {
    if grant.action() != Action::Verb(request.verb())
        || grant.domain().map(|(uuid, _)| uuid) != work.facts.as_ref().map(|facts| facts.uuid)
    {
        return Err(Fault::new(
            Code::Internal,
            "the grant is for something else",
        ));
    }
    let host = Arc::clone(&work.host);
    let hypervisors = &host.hypervisors;
    let deadline = work.deadline;
    let hypervisor = work.hypervisor.as_deref();
    // Until the call has returned, what it takes counts as taken.
    let _admitted = schedule::admit(&host, &request, work.facts.as_ref())?;
    match request {
        Request::Whoami(_) => Ok(Reply::Whoami(answers::whoami(&grant, &work))),
        Request::List(list) => answers::send_rows(&list, &work).await,
        Request::Info(_) => Ok(Reply::Info(answers::info(&grant, &work))),
        Request::Dmesg(dmesg) => answers::messages(&dmesg, &work).await,
        Request::Describe(describe) => {
            let xml = hypervisors
                .describe(
                    work.target(Verb::Describe)?,
                    describe.inactive,
                    false,
                    deadline,
                )
                .await?;
            work.send_text(&xml).await
        }
        Request::DescribeSecrets(describe) => {
            let xml = hypervisors
                .describe(
                    work.target(Verb::DescribeSecrets)?,
                    describe.inactive,
                    true,
                    deadline,
                )
                .await?;
            work.send_text(&xml).await
        }
        Request::Create(create) => {
            let judge = work.xml_judge(Verb::Create);
            hypervisors
                .create(
                    hypervisor,
                    create.xml,
                    create.define,
                    create.paused,
                    judge,
                    deadline,
                )
                .await
                .map(Reply::Domain)
        }
        Request::Define(define) => {
            let judge = work.xml_judge(Verb::Define);
            hypervisors
                .define(hypervisor, define.xml, define.replaces, judge, deadline)
                .await
                .map(Reply::Domain)
        }
        Request::Undefine(undefine) => {
            let target = work.target(Verb::Undefine)?;
            let (name, uuid) = (target.facts.name.clone(), target.facts.uuid);
            hypervisors
                .undefine(
                    target,
                    undefine.discard_saved,
                    undefine.discard_nvram,
                    deadline,
                )
                .await?;
            Ok(Reply::Gone { name, uuid })
        }
        Request::Start(start) => hypervisors
            .start_domain(work.target(Verb::Start)?, start.paused, deadline)
            .await
            .map(Reply::Domain),
        Request::Destroy(_) => hypervisors
            .destroy(work.target(Verb::Destroy)?, deadline)
            .await
            .map(Reply::Domain),
        Request::Reboot(Ask { wait, force, .. }) => hypervisors
            .reboot(work.target_by(Verb::Reboot, force)?, wait, force, deadline)
            .await
            .map(Reply::Domain),
        Request::Shutdown(Ask { wait, force, .. }) => hypervisors
            .shutdown(
                work.target_by(Verb::Shutdown, force)?,
                wait,
                force,
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Pause(_) => hypervisors
            .pause(work.target(Verb::Pause)?, deadline)
            .await
            .map(Reply::Domain),
        Request::Unpause(Unpause { force, .. }) => {
            if force && let Some(facts) = &work.facts {
                moving::claim(&host, facts.uuid).await?;
            }
            hypervisors
                .unpause(work.target_by(Verb::Unpause, force)?, deadline)
                .await
                .map(Reply::Domain)
        }
        Request::MemSet(set) => {
            let domain = hypervisors
                .mem_set(work.target(Verb::MemSet)?, &set, deadline)
                .await?;
            Ok(Reply::Memory {
                domain,
                asked_kib: set.kib,
            })
        }
        Request::VcpuSet(set) => hypervisors
            .vcpu_set(work.target(Verb::VcpuSet)?, &set, deadline)
            .await
            .map(Reply::Domain),
        Request::Migrate(migrate) => match migrate.way.clone() {
            Way::Channel { port, permit } => moving::leave(&work, &migrate, port, permit)
                .await
                .map(Reply::Job),
            Way::Direct => {
                let there = &migrate.destination;
                let uri = host.config.migration_uri(there);
                let uri = uri.ok_or_else(|| moving::no_peer(there))?;
                let detail = format!("to {there}, direct");
                let (bandwidth, downtime) = (migrate.bandwidth, migrate.downtime_ms);
                let moving = |target, progress| async move {
                    let departing = hypervisors.depart(target).await?;
                    let route = Route::Direct(uri);
                    hypervisors
                        .migrate(departing, route, bandwidth, downtime, progress)
                        .await
                };
                jobs::begin(&work, Verb::Migrate, detail, moving)
                    .await
                    .map(Reply::Job)
            }
        },
        Request::MigrateAbort(_) => hypervisors
            .give_up(work.target(Verb::MigrateAbort)?, deadline)
            .await
            .map(|()| Reply::Done),
        Request::JobList(_) => {
            let jobs = host
                .jobs
                .all(&host.store)
                .await
                .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
            let jobs: Vec<Item> = jobs
                .into_iter()
                .filter(|job| jobs::may_see(&grant, &work, Verb::JobList, job))
                .map(Item::Job)
                .collect();
            for piece in jobs.chunks(ROWS_A_FRAME) {
                work.send(Piece::Items(piece.to_vec())).await?;
            }
            Ok(Reply::Done)
        }
        Request::JobWait(on) => jobs::follow(&grant, on.job, &work).await.map(Reply::Job),
        Request::JobCancel(on) => match host.jobs.find(on.job) {
            Some(job) if jobs::may_see(&grant, &work, Verb::JobCancel, &job.row) => {
                job.has_begun()?;
                let target = Target {
                    // A job is its beginner's, whatever has become of the domain since.
                    judge: if jobs::is_beginner(&work, &job.row) {
                        Arc::new(|_| Ok(()))
                    } else {
                        work.judge(Verb::JobCancel)
                    },
                    facts: job.facts,
                };
                hypervisors
                    .give_up(target, deadline)
                    .await
                    .map(|()| Reply::Done)
            }
            Some(_) | None => Err(jobs::no_such_job(on.job)),
        },
        Request::Owner(set) => hypervisors
            .set_metadata(
                work.target(Verb::Owner)?,
                Change::Owners {
                    add: set.add,
                    remove: set.remove,
                },
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Label(set) => hypervisors
            .set_metadata(
                work.target(Verb::Label)?,
                Change::Labels {
                    set: set.set,
                    remove: set.remove,
                },
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Class(set) => hypervisors
            .set_metadata(
                work.target(Verb::Class)?,
                Change::Class(set.class),
                deadline,
            )
            .await
            .map(Reply::Domain),
        Request::Explain(explain) => {
            let person = Arc::clone(&work.caller.person);
            answers::explained(&explain.action, &explain.about, person, &work).await
        }
        Request::ExplainOther(explain) => {
            let person = Arc::new(host.people.find(&explain.principal).await);
            answers::explained(&explain.action, &explain.about, person, &work).await
        }
        Request::Save(_) => {
            let saving = |target, progress| hypervisors.save(target, progress);
            jobs::begin(&work, Verb::Save, String::new(), saving)
                .await
                .map(Reply::Job)
        }
        Request::Restore(start) => hypervisors
            .restore(work.target(Verb::Restore)?, start.paused, deadline)
            .await
            .map(Reply::Domain),
        Request::DiscardSaved(_) => hypervisors
            .discard_saved(work.target(Verb::DiscardSaved)?, deadline)
            .await
            .map(Reply::Domain),
        Request::SaveTo(save) => {
            let detail = format!("to {}", save.image);
            let saving =
                |target, progress| hypervisors.save_to(target, &host.images, &save.image, progress);
            jobs::begin(&work, Verb::SaveTo, detail, saving)
                .await
                .map(Reply::Job)
        }
        Request::Images(_) => images::send_rows(&grant, &work).await,
        Request::RestoreFrom(restore) => {
            let image = host.images.take(&restore.image)?;
            let judge = work.xml_judge(Verb::RestoreFrom);
            hypervisors
                .restore_from(image, hypervisor, restore.paused, judge, deadline)
                .await
                .map(Reply::Domain)
        }
        Request::DiscardImage(on) => images::discard(on.image, &work).await,
        Request::Autostart(autostart) => hypervisors
            .autostart(work.target(Verb::Autostart)?, autostart.on, deadline)
            .await
            .map(Reply::Domain),
        Request::Reset(_) => hypervisors
            .reset(work.target_by(Verb::Reset, true)?, deadline)
            .await
            .map(Reply::Domain),
        Request::Rename(rename) => {
            let target = work.target_called(Verb::Rename, &rename.name)?;
            hypervisors
                .rename(target, rename.name, work.judge(Verb::List), deadline)
                .await
                .map(Reply::Domain)
        }
        Request::Attach(attach) => {
            let target = work.target_with_host(Verb::Attach)?;
            let allowed = host.config.devices.clone();
            hypervisors
                .attach(target, attach, allowed, work.eyes(), deadline)
                .await
                .map(|(domain, device)| Reply::Attached { domain, device })
        }
        Request::Detach(detach) => hypervisors
            .detach(work.target(Verb::Detach)?, detach, deadline)
            .await
            .map(Reply::Domain),
        Request::Console(asked) => console::attend(&asked, work).await,
        Request::Events(asked) => events::follow(&asked, &work).await,
        Request::MigrateIn(coming) => moving::permit(&grant, &work, coming).await,
        Request::Carry(carry) => moving::carry(work, carry).await,
        Request::Settle(settle) => moving::settle(&work, settle).await,
        Request::LeaseBegin(begin) => schedule::begin(&work, begin).await,
        Request::LeaseEnd(end) => schedule::end(&work, end).await,
        Request::LeaseList(list) => schedule::leases(&grant, &work, list).await,
        Request::Preempt(preempt) => schedule::hold(&work, Verb::Preempt, preempt).await,
        Request::Resume(resume) => schedule::let_go(&work, Verb::Resume, resume).await,
        Request::Freeze(preempt) => schedule::hold(&work, Verb::Freeze, preempt).await,
        Request::Thaw(resume) => schedule::let_go(&work, Verb::Thaw, resume).await,
        Request::Status(status) => schedule::status(&grant, &work, status).await,
        Request::Reconcile(reconcile) => schedule::reconcile(&work, reconcile).await,
        Request::Maintenance(set) => schedule::maintain(&work, set).await,
    }
}

/// Whether a request pulls the plug, resets, or takes a domain from a host that is lost, which takes the right to `destroy` beside that to its verb.
pub(crate) fn is_forced(request: &Request) -> bool {
    matches!(
        request,
        Request::Reboot(Ask { force: true, .. })
            | Request::Shutdown(Ask { force: true, .. })
            | Request::Reset(_)
            | Request::Unpause(Unpause { force: true, .. })
            | Request::Resume(Resume { force: true, .. })
            | Request::Thaw(Resume { force: true, .. })
    )
}

/// Whether a request brings something of the host's to a domain, which takes the right to its verb on the host beside that on the domain.
pub(crate) fn is_of_host(request: &Request) -> bool {
    matches!(request, Request::Attach(_))
}
