//! The destination's part: a permit, libvirt's connection, and the source's word.

use std::{fs, sync::Arc, time::Duration};

use tokio::{
    io::AsyncWriteExt,
    net::UnixStream,
    time::{Instant, timeout_at},
};
use uuid::Uuid;
use xman_common::protocol::{
    Carry, Code, Fault, Item, MigrateIn, Permit, Reply, Settle, Settlement,
};
use xman_policy::{
    Grant,
    permit::{Arrival, Stage},
};

use super::{STEP, no_peer};
use crate::{
    Host,
    caller::{Outcome, Piece},
    peer,
    work::Work,
};

/// So long after a connection to libvirt has ended something may still come by it: libvirt does what it has read, and forgets then that whoever
/// asked for it is gone.
const IN_FLIGHT: Duration = Duration::from_secs(5);

/// Gives a permit to bring a domain here.
pub(crate) async fn permit(grant: &Grant, work: &Work, coming: MigrateIn) -> Outcome {
    let (host, caller) = (&work.host, &work.caller);
    let MigrateIn {
        uuid,
        name,
        source,
        memory_kib,
    } = coming;
    if !host.config.migration.peers.contains(&source) {
        return Err(no_peer(&source));
    }
    let hypervisor = host.hypervisors.that_takes(work.hypervisor.as_deref())?;
    settled(host, uuid, work.deadline).await?;
    // What was just removed may still be in memory.
    if let Some(there) = host.hypervisors.in_the_way(uuid, &name) {
        host.hypervisors.look_again(&there, work.deadline).await?;
    }
    if let Some(there) = host.hypervisors.in_the_way(uuid, &name) {
        if !host.sees(caller, &there) {
            return Err(Fault::denied());
        }
        let what = if there.uuid == uuid {
            "this very domain"
        } else {
            "another domain of that name"
        };
        return Err(Fault::new(
            Code::Conflict,
            format!("the destination has {what} already, '{}'", there.name),
        ));
    }
    if let Some(free) = available_kib()
        && memory_kib > free
    {
        return Err(Fault::new(
            Code::Refused,
            format!(
                "'{name}' can have {} MiB of memory, and the destination has {} MiB left",
                memory_kib / 1024,
                free / 1024
            ),
        ));
    }
    let arrival = Arrival {
        uuid,
        name,
        source,
        hypervisor,
        person: caller.person.principal.clone(),
        rule: grant.rule().to_owned(),
    };
    match host.permits.give(arrival, std::time::Instant::now()) {
        Ok(permit) => Ok(Reply::Permitted(permit)),
        Err(many) => Err(Fault::new(Code::Busy, format!("{many}; ask again later"))),
    }
}

/// Waits until nothing of a domain is here of which its source has yet to say what becomes of it: its word must not fall on what arrives later.
async fn settled(host: &Host, uuid: Uuid, deadline: Instant) -> Result<(), Fault> {
    let deadline = deadline.min(Instant::now() + STEP);
    loop {
        let word = host.settled.notified();
        let Some(Arrival { name, source, .. }) = host.permits.arriving(uuid) else {
            return Ok(());
        };
        let heard = timeout_at(deadline, word).await;
        heard.map_err(|_| {
            Fault::new(
                Code::Busy,
                format!("'{name}' was on its way here before, and that is not settled yet: {source} has not said how it ended, \
                 or libvirt here has not removed what had arrived, which xmand's messages here tell; ask again later"),
            )
        })?;
    }
}

/// Carries libvirt's connection for the host that a domain comes from.
pub(crate) async fn carry(work: Work, carry: Carry) -> Outcome {
    let host = Arc::clone(&work.host);
    let Some((arrival, _)) = host.permits.find(&carry.permit) else {
        return Err(Fault::denied());
    };
    let carried = host.carries.begin(&carry.permit);
    let opened = open(&work, &carry.permit, &arrival).await;
    let daemon = opened.inspect_err(|_| {
        // Nothing came of it, and nothing will: the word on this try must not fall on another by the same permit.
        host.carries.forget(&carry.permit);
        host.permits
            .settled(&carry.permit, std::time::Instant::now());
        host.settled.notify_waiters();
    })?;
    // The word that the connection stands.
    work.send(Piece::Items(vec![Item::Bytes(Vec::new())]))
        .await?;
    let (mut from_daemon, mut to_daemon) = daemon.into_split();
    let Work {
        mut input, outbox, ..
    } = work;
    let there = async {
        while let Some(bytes) = input.next().await {
            if to_daemon.write_all(&bytes).await.is_err() {
                return;
            }
        }
        let _ = to_daemon.shutdown().await;
        std::future::pending().await
    };
    let back = async {
        while let Ok(bytes) = peer::read(&mut from_daemon).await {
            let is_over = bytes.is_empty();
            let piece = Piece::Items(vec![Item::Bytes(bytes)]);
            if is_over || outbox.send(piece).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = there => {}
        () = back => {}
        () = carried.given_up.cancelled() => {}
    }
    Ok(Reply::Done)
}

async fn open(work: &Work, permit: &Permit, arrival: &Arrival) -> Result<UnixStream, Fault> {
    let (host, deadline) = (&work.host, work.deadline.min(Instant::now() + STEP));
    let Arrival {
        uuid,
        name,
        hypervisor,
        ..
    } = arrival;
    // Asked of libvirt itself: what is here from now on came by this permit.
    host.hypervisors
        .is_absent(hypervisor, *uuid, name, deadline)
        .await?;
    let daemon = host.hypervisors.daemon(hypervisor).await?;
    let written = host.store.put_arrival(permit, arrival).await;
    written.map_err(|error| error.before())?;
    Ok(daemon)
}

/// Does what the host that a domain came from says of it. Said again, it is done already.
pub(crate) async fn settle(work: &Work, settle: Settle) -> Outcome {
    let host = &work.host;
    let Settle { permit, settlement } = settle;
    let Some((arrival, stage)) = host.permits.find(&permit) else {
        return Err(Fault::denied());
    };
    let (hypervisors, uri, uuid) = (&host.hypervisors, &arrival.hypervisor, arrival.uuid);
    let deadline = work.deadline.min(Instant::now() + STEP);
    let done = match (settlement, stage) {
        (Settlement::Drop, Stage::Carried) => match host.carries.ended(&permit) {
            None => Err(Fault::new(Code::Busy, "it is still being carried")),
            Some(since) => match dropped(host, &arrival, deadline).await {
                Ok(false) if since < IN_FLIGHT => Err(Fault::new(
                    Code::Busy,
                    "what was asked of libvirt last may still be done",
                )),
                dropped => dropped.map(drop),
            },
        },
        // Nothing came by it: whatever has that UUID here is somebody else's.
        (Settlement::Drop, Stage::Given | Stage::Settled) => Ok(()),
        (Settlement::Run, Stage::Carried) => hypervisors.run_arrived(uri, uuid, deadline).await,
        (Settlement::Run, Stage::Given | Stage::Settled) | (Settlement::Keep, _) => {
            hypervisors.is_here(uri, uuid, deadline).await
        }
    };
    match done {
        // It is said again.
        Err(fault) if fault.retry => return Err(fault),
        // libvirt broke in the middle; what was begun can be begun again.
        Err(fault) if fault.code == Code::Unknown => {
            return Err(Fault {
                retry: true,
                ..fault
            });
        }
        Ok(()) | Err(_) => {}
    }
    if stage == Stage::Carried {
        put_to_rest(host, &permit).await?;
    }
    done.map(|()| Reply::Done)
}

/// Removes what has arrived. Where libvirt takes its time to say that it cannot, whoever asked has stopped waiting, so it is said here as well.
async fn dropped(host: &Host, arrival: &Arrival, deadline: Instant) -> Result<bool, Fault> {
    let Arrival {
        hypervisor,
        uuid,
        name,
        source,
        ..
    } = arrival;
    let dropped = host.hypervisors.drop_arrived(hypervisor, *uuid, deadline);
    dropped.await.inspect_err(|fault| {
        tracing::warn!(
            "'{name}' stays at {source}, and what had arrived of it is still here: {fault}"
        );
    })
}

/// Lets go of what has arrived of a domain: whoever does so knows that it runs nowhere else. What is still arriving is not let go of.
pub(super) async fn claim(host: &Host, uuid: Uuid) -> Result<(), Fault> {
    if let Some((permit, Arrival { hypervisor, .. })) = host.permits.carried(uuid) {
        let deadline = Instant::now() + STEP;
        host.hypervisors
            .is_at_rest(&hypervisor, uuid, deadline)
            .await?;
        put_to_rest(host, &permit).await?;
    }
    Ok(())
}

async fn put_to_rest(host: &Host, permit: &Permit) -> Result<(), Fault> {
    host.store
        .settle_arrival(permit)
        .await
        .map_err(|error| Fault::new(Code::Unavailable, error.to_string()))?;
    host.permits.settled(permit, std::time::Instant::now());
    host.carries.forget(permit);
    host.settled.notify_waiters();
    Ok(())
}

/// Memory that new guests can have, in KiB; nothing where the kernel does not say.
fn available_kib() -> Option<u64> {
    available(&fs::read_to_string("/proc/meminfo").ok()?)
}

fn available(meminfo: &str) -> Option<u64> {
    let line = meminfo
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_what_the_kernel_says() {
        let meminfo = "MemTotal:       24032444 kB\nMemFree:          531244 kB\nMemAvailable:   20130816 kB\n";
        assert_eq!(available(meminfo), Some(20_130_816));
        assert_eq!(available("MemTotal: 1 kB\n"), None);
    }
}
