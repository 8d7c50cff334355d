//! Who gives way for whom. Pure: from a ledger to victims, or to why not.
//!
//! It prefers that nobody gives way; then those without a job; then the fewest and smallest of the lowest rank, and among equals who has been
//! preempted for the shortest time so far.

use std::cmp::Reverse;

use uuid::Uuid;
use xman_common::protocol::Depth;

use super::ledger::{Amount, Domain, Ledger};

/// Who asks for room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asks {
    /// The domain.
    pub(crate) uuid: Uuid,
    /// Whether it would keep what it gets: a job that is not to be preempted.
    pub(crate) is_firm: bool,
    /// Whether it comes back to what was its own before.
    pub(crate) comes_back: bool,
}

/// How it gets it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Plan {
    /// These give way first; nobody has to where there are none.
    Go(Vec<Victim>),
    /// It does not.
    No(Why),
}

/// A domain that gives way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Victim {
    pub(crate) uuid: Uuid,
    pub(crate) depth: Depth,
    /// Whether its job is preempted by that.
    pub(crate) has_job: bool,
}

/// Why there is no room.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Why {
    /// The ledger does not have the domain, or its class takes no part.
    NoPart,
    /// It is switched off.
    Off,
    /// There is not that much here at all.
    Never { needs: Amount, capacity: Amount },
    /// Others have it who do not give way to this one; one of them.
    Taken { missing: Amount, by: Option<Uuid> },
    /// It is kept for one that has given way, and must be able to come back.
    Kept { for_whom: Uuid },
}

/// Finds room for a domain.
pub(crate) fn plan(ledger: &Ledger, asks: Asks) -> Plan {
    let Some(winner) = ledger.find(asks.uuid).filter(|it| it.class.is_some()) else {
        return Plan::No(Why::NoPart);
    };
    if !winner.is_on {
        return Plan::No(Why::Off);
    }
    let needs = winner.needs();
    let may_exceed = asks.comes_back && is_alone(ledger, winner);
    if !ledger.capacity.covers(needs) && !may_exceed {
        return Plan::No(Why::Never {
            needs,
            capacity: ledger.capacity,
        });
    }
    let missing = missing(ledger, winner, needs, asks.comes_back);
    let victims = match victims(ledger, winner, missing) {
        Ok(victims) => victims,
        Err(_) if may_exceed => Vec::new(),
        Err(why) => return Plan::No(why),
    };
    match kept(ledger, winner, asks) {
        Some(for_whom) => Plan::No(Why::Kept { for_whom }),
        None => Plan::Go(victims),
    }
}

/// The domains that come back now, in their order, each with those that give way for it in turn.
///
/// One with a job comes back as if it asked anew. One without takes nothing from a job, and nothing from others without, but from the one for
/// which it gave way (`for_whom` says which), once that one's job has gone.
pub(crate) fn returns(
    ledger: &Ledger,
    waiting: &[Uuid],
    for_whom: impl Fn(Uuid) -> Option<Uuid>,
) -> Vec<(Uuid, Vec<Victim>)> {
    let mut ledger = ledger.clone();
    let mut order: Vec<Uuid> = waiting.to_vec();
    order.sort_by_key(|uuid| {
        ledger.find(*uuid).map(|it| {
            let size = it.needs();
            Reverse((it.job.is_some(), it.rank(), size.cpus, size.kib))
        })
    });
    let mut back = Vec::new();
    for uuid in order {
        let Some(domain) = ledger.find(uuid) else {
            continue;
        };
        let victims = match domain.job {
            Some(_) if !domain.is_on => Vec::new(),
            Some(job) => {
                let asks = Asks {
                    uuid,
                    is_firm: job.is_firm,
                    comes_back: true,
                };
                match plan(&ledger, asks) {
                    Plan::Go(victims) => victims,
                    Plan::No(_) => continue,
                }
            }
            None => match without_job(&ledger, domain, for_whom(uuid)) {
                Some(victims) => victims,
                None => continue,
            },
        };
        for victim in &victims {
            if let Some(domain) = ledger.find_mut(victim.uuid) {
                domain.held = Some(victim.depth);
            }
        }
        if let Some(domain) = ledger.find_mut(uuid) {
            domain.held = None;
            domain.is_shrunk = false;
        }
        back.push((uuid, victims));
    }
    back
}

/// Those without a job that have no room beside those with one: they give way, but for who boots.
pub(crate) fn crowd(ledger: &Ledger, boots: impl Fn(Uuid) -> bool) -> Vec<Victim> {
    let claimed = ledger.used().cpus;
    if claimed == 0 {
        return Vec::new();
    }
    let mut idle: Vec<&Domain> = ledger
        .domains
        .iter()
        .filter(|it| it.idle() > 0 && !boots(it.uuid))
        .collect();
    idle.sort_by_key(|it| Reverse((it.rank(), it.preempted_ms)));
    let mut left = ledger.capacity.cpus.saturating_sub(claimed);
    let mut crowd = Vec::new();
    for it in idle {
        match left.checked_sub(it.idle()) {
            Some(rest) => left = rest,
            None => crowd.extend(it.depth().map(|depth| Victim {
                uuid: it.uuid,
                depth,
                has_job: false,
            })),
        }
    }
    crowd
}

/// Whether a domain that is switched on or grows without a job finds room: what jobs have, and what is kept for those that come back, is not taken.
pub(crate) fn admits(ledger: &Ledger, uuid: Uuid, needs: Amount) -> Result<(), Why> {
    let used = ledger.used();
    let free = ledger.capacity.without(used);
    if !free.covers(needs) {
        return Err(Why::Taken {
            missing: needs.without(free),
            by: biggest(ledger, uuid),
        });
    }
    let coming: u64 = waiting(ledger, uuid).map(|it| it.needs().kib).sum();
    if needs.kib > 0 && free.kib.saturating_sub(coming) < needs.kib {
        let for_whom = waiting(ledger, uuid).max_by_key(|it| it.needs().kib);
        return Err(for_whom.map_or(Why::NoPart, |it| Why::Kept { for_whom: it.uuid }));
    }
    Ok(())
}

/// The domains that have given way and must be able to come back.
fn waiting(ledger: &Ledger, but: Uuid) -> impl Iterator<Item = &Domain> {
    ledger.domains.iter().filter(move |it| {
        let must = it.job.is_some() || it.needs().kib > 0;
        it.uuid != but && it.is_on && it.held.is_some() && must
    })
}

fn is_alone(ledger: &Ledger, winner: &Domain) -> bool {
    let mut others = ledger.domains.iter();
    !others.any(|it| it.uuid != winner.uuid && it.claim() > 0)
}

/// The domain that has the most, to name somebody.
fn biggest(ledger: &Ledger, but: Uuid) -> Option<Uuid> {
    let others = ledger.domains.iter().filter(|it| it.uuid != but);
    let biggest = others
        .filter(|it| it.claim() > 0)
        .max_by_key(|it| it.claim());
    biggest.map(|it| it.uuid)
}

fn missing(ledger: &Ledger, winner: &Domain, needs: Amount, comes_back: bool) -> Amount {
    let others = || ledger.domains.iter().filter(|it| it.uuid != winner.uuid);
    let taken = Amount {
        cpus: others().map(|it| it.claim() + it.idle()).sum(),
        kib: ledger.domains.iter().map(Domain::memory).sum(),
    };
    let room = Amount {
        cpus: needs.cpus,
        // Who needs no more memory does not pay for a host that has promised too much of it.
        kib: if needs.kib == 0 {
            0
        } else {
            needs.kib.saturating_add(taken.kib)
        },
    };
    Amount {
        cpus: room
            .cpus
            .saturating_add(taken.cpus)
            .saturating_sub(ledger.capacity.cpus),
        kib: room.kib.saturating_sub(if comes_back {
            ledger.capacity.kib.max(ledger.had_kib)
        } else {
            ledger.capacity.kib
        }),
    }
}

/// Finds who gives what is missing.
fn victims(ledger: &Ledger, winner: &Domain, missing: Amount) -> Result<Vec<Victim>, Why> {
    let mut tiers: Vec<(Option<i32>, &Domain)> = ledger
        .domains
        .iter()
        .filter(|it| it.uuid != winner.uuid && gives_way(it, winner.rank()))
        .map(|it| (it.job.map(|_| it.rank()), it))
        .collect();
    tiers.sort_by_key(|(tier, it)| {
        let gives = it.could_give();
        (*tier, gives.cpus, gives.kib, it.preempted_ms)
    });
    let mut left = missing;
    let mut chosen: Vec<&Domain> = Vec::new();
    for tier in tiers.chunk_by(|(one, _), (other, _)| one == other) {
        let mut pool: Vec<&Domain> = tier.iter().map(|(_, it)| *it).collect();
        while !left.is_nothing() {
            // They stand in the order of their size: the first that is enough is the smallest.
            let enough = pool.iter().position(|it| it.could_give().covers(left));
            let most = || {
                let shares = pool.iter().enumerate().map(|(at, it)| {
                    let share = it.could_give().share_of(left);
                    (share, Reverse(it.preempted_ms), at)
                });
                let most = shares.filter(|(share, ..)| *share > 0).max();
                most.map(|(.., at)| at)
            };
            let Some(at) = enough.or_else(most) else {
                break;
            };
            let next = pool.remove(at);
            left = left.without(next.could_give());
            chosen.push(next);
        }
    }
    if !left.is_nothing() {
        return Err(Why::Taken {
            missing: left,
            by: biggest(ledger, winner.uuid),
        });
    }
    Ok(spared(chosen, missing)
        .into_iter()
        .filter_map(|it| {
            Some(Victim {
                uuid: it.uuid,
                depth: it.depth()?,
                has_job: it.job.is_some(),
            })
        })
        .collect())
}

/// Lets go of those whom it takes no more: the highest first.
fn spared(mut chosen: Vec<&Domain>, missing: Amount) -> Vec<&Domain> {
    let mut sum = chosen
        .iter()
        .fold(Amount::default(), |sum, it| sum.and(it.could_give()));
    let mut at = chosen.len();
    while let Some(one) = at.checked_sub(1) {
        at = one;
        let Some(without) = chosen.get(one).map(|it| sum.without(it.could_give())) else {
            break;
        };
        if without.covers(missing) {
            sum = without;
            chosen.remove(one);
        }
    }
    chosen
}

/// Whether a domain gives way to one of a rank.
fn gives_way(domain: &Domain, rank: i32) -> bool {
    if !domain.is_on || domain.held.is_some() || domain.balks || domain.depth().is_none() {
        return false;
    }
    domain
        .job
        .is_none_or(|job| !job.is_firm && !job.is_fresh && !job.is_reserved && domain.rank() < rank)
}

/// Whether a domain could be made to give way by one of a rank, be it not at once.
fn could_give_way(domain: &Domain, rank: i32) -> bool {
    let is_firm = domain.job.is_some_and(|job| job.is_firm);
    !is_firm && domain.depth().is_some() && domain.rank() < rank
}

/// Finds one that has given way and could not come back if a new one had its room.
fn kept(ledger: &Ledger, winner: &Domain, asks: Asks) -> Option<Uuid> {
    if asks.comes_back {
        return None;
    }
    let yields = winner.class.is_some_and(|class| class.depth.is_some()) && !asks.is_firm;
    let concerned: Vec<&Domain> = waiting(ledger, winner.uuid)
        .filter(|it| winner.rank() <= it.rank() && !(yields && winner.rank() < it.rank()))
        .collect();
    let cpus = |it: &Domain| it.job.map_or(0, |_| it.full.cpus);
    let coming = concerned.iter().fold(Amount::default(), |sum, it| {
        sum.and(Amount {
            cpus: cpus(it),
            kib: it.needs().kib,
        })
    });
    let kept = concerned.iter().find(|it| {
        let stays = ledger.domains.iter().filter(|other| {
            other.uuid != winner.uuid
                && other.rank() <= it.rank()
                && !could_give_way(other, it.rank())
        });
        let stay: u64 = stays.map(Domain::claim).sum();
        let all = stay
            .saturating_add(coming.cpus)
            .saturating_add(winner.full.cpus);
        cpus(it) > 0 && all > ledger.capacity.cpus
    });
    let memory = ledger.capacity.kib.saturating_sub(ledger.used().kib);
    let wanted = winner.needs().kib;
    let by_memory = (wanted > 0 && wanted.saturating_add(coming.kib) > memory)
        .then(|| concerned.iter().find(|it| it.needs().kib > 0))
        .flatten();
    kept.or(by_memory).map(|it| it.uuid)
}

/// What it takes that a domain without a job comes back; nothing where it cannot yet.
fn without_job(ledger: &Ledger, domain: &Domain, for_whom: Option<Uuid>) -> Option<Vec<Victim>> {
    if !domain.is_on {
        return Some(Vec::new());
    }
    let used = ledger.used();
    let claimed = used.cpus > 0;
    // The CPUs of domains of no class are in the reserve.
    let claimed = claimed && domain.class.is_some();
    // Beside jobs there is so much for those without, and others of them run already.
    let idle: u64 = ledger.domains.iter().map(Domain::idle).sum();
    let taken = used.cpus.saturating_add(idle);
    if claimed && ledger.capacity.cpus.saturating_sub(taken) < domain.full.cpus {
        return None;
    }
    let needs = domain.needs().kib;
    let capacity = ledger.capacity.kib.max(ledger.had_kib);
    let missing = needs.saturating_sub(capacity.saturating_sub(used.kib));
    if missing == 0 || needs == 0 {
        return Some(Vec::new());
    }
    let other = for_whom
        .and_then(|uuid| ledger.find(uuid))
        .filter(|it| it.uuid != domain.uuid && it.job.is_none() && gives_way(it, i32::MIN));
    match other {
        Some(other) if other.could_give().kib >= missing => Some(vec![Victim {
            uuid: other.uuid,
            depth: other.depth()?,
            has_job: false,
        }]),
        Some(_) | None => None,
    }
}

#[cfg(test)]
mod tests;
