//! How domains stand towards jobs, for people and schedulers. The names are Magrathea's.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use uuid::Uuid;
use xman_common::{
    name::{DomainRef, Tag},
    protocol::{DomainRow, DomainState, Holder, LeaseKey, Standing},
};

use super::{
    Live,
    ledger::{Amount, Domain, Ledger},
    millis,
    plan::{Asks, Plan, plan},
    record::{Known, Record, World},
};
use crate::{Host, clock::now_ms};

/// How each domain stood when it was last looked at, and since when.
#[derive(Debug, Default)]
pub(super) struct Shown(HashMap<Uuid, (Standing, Option<u64>)>);

impl Shown {
    pub(super) fn since(&self, uuid: Uuid, standing: Standing) -> Option<u64> {
        match self.0.get(&uuid) {
            Some((shown, since)) if *shown == standing => *since,
            Some(_) => Some(now_ms()),
            None => None,
        }
    }
}

/// How one domain stands.
#[derive(Clone, Debug)]
pub(super) struct Seen {
    pub(super) standing: Standing,
    pub(super) class: Option<Tag>,
    pub(super) used_cpus: u32,
    pub(super) available_cpus: u32,
}

/// All domains at one moment.
pub(super) struct Standings {
    pub(super) record: Arc<Record>,
    pub(super) ledger: Ledger,
    world: World,
    /// What came of asking for room, by all that it depends on: hosts have many domains that are alike.
    asked: BTreeMap<(i32, u64, u64), Plan>,
}

impl Standings {
    pub(super) fn new(host: &Host) -> Self {
        let scheduler = &host.schedule;
        let (record, world) = (scheduler.record(), scheduler.world(host));
        let ledger = record.ledger(&world);
        let mut asked = BTreeMap::new();
        for domain in &ledger.domains {
            // Also of those that wait for room: a better job could come to them.
            if domain.is_on && domain.class.is_some() && domain.job.is_none() {
                asked.entry(likeness(domain)).or_insert_with(|| {
                    let asks = Asks {
                        uuid: domain.uuid,
                        is_firm: false,
                        comes_back: false,
                    };
                    plan(&ledger, asks)
                });
            }
        }
        Self {
            record,
            ledger,
            world,
            asked,
        }
    }

    pub(super) fn of(&self, uuid: Uuid) -> Option<Seen> {
        let known = self.world.domains.get(&uuid)?;
        let domain = self.ledger.find(uuid)?;
        let standing = self.standing(known, domain);
        Some(Seen {
            standing,
            class: known.class.as_ref().map(|(tag, _)| tag.clone()),
            used_cpus: count(domain.claim()),
            available_cpus: match standing {
                Standing::Free | Standing::OccupiedWouldPreempt => count(domain.full.cpus),
                Standing::Down
                | Standing::Booting
                | Standing::Occupied
                | Standing::RunningPreemptible
                | Standing::Running
                | Standing::Preempted
                | Standing::Frozen => 0,
            },
        })
    }

    fn standing(&self, known: &Known, domain: &Domain) -> Standing {
        let kept = self.record.domains.get(&domain.uuid);
        // What is just being given back is not there yet.
        let is_short = kept.is_some_and(|kept| !kept.holds.is_empty() || !kept.taken.is_nothing());
        let by_others = kept.is_some_and(|kept| kept.holds.iter().any(|hold| !hold.is_room()));
        if !known.state.is_active() {
            return if known.saved {
                Standing::Frozen
            } else {
                Standing::Down
            };
        }
        let is_paused = known.state == DomainState::Paused;
        let is_closed = self.record.maintenance.is_some();
        match domain.job {
            Some(_) if is_short => Standing::Preempted,
            None if by_others => Standing::Preempted,
            Some(job) if job.is_firm => Standing::Running,
            Some(_) => Standing::RunningPreemptible,
            None if known.boots => Standing::Booting,
            // Somebody has stopped it, or the host takes nothing.
            None if is_paused || is_closed => Standing::Occupied,
            None => match self.asked.get(&likeness(domain)) {
                Some(Plan::Go(victims)) if victims.iter().any(|victim| victim.has_job) => {
                    Standing::OccupiedWouldPreempt
                }
                Some(Plan::Go(_)) if is_short => Standing::Occupied,
                Some(Plan::Go(_)) => Standing::Free,
                Some(Plan::No(_)) => Standing::Occupied,
                // Of no class: it takes no part, and is there.
                None => Standing::Free,
            },
        }
    }

    /// The job that has the room of a domain which gives way.
    fn room_is_with(&self, uuid: Uuid) -> Option<&LeaseKey> {
        let kept = self.record.domains.get(&uuid)?;
        kept.holds.iter().find_map(|hold| match &hold.holder {
            Holder::Room(key) => key.as_ref(),
            Holder::Job(_) | Holder::Person(_) => None,
        })
    }

    /// Milliseconds spent preempted, with what is not written down yet.
    pub(super) fn preempted_ms(&self, live: &Live, uuid: Uuid) -> u64 {
        let kept = self.record.domains.get(&uuid);
        let now = live.spells.get(&uuid).map(|since| millis(since.elapsed()));
        kept.map_or(0, |kept| kept.preempted_ms) + now.unwrap_or(0)
    }
}

fn likeness(domain: &Domain) -> (i32, u64, u64) {
    let Amount { cpus, kib } = domain.needs();
    (domain.rank(), cpus, kib)
}

/// Notes how domains stand, and tells of those that stand otherwise than before.
pub(super) fn tell(host: &Arc<Host>) {
    let scheduler = &host.schedule;
    if !scheduler.rules.is_on() {
        return;
    }
    let standings = Standings::new(host);
    let mut news = Vec::new();
    let mut live = scheduler.live();
    let before = std::mem::take(&mut live.shown.0);
    for (uuid, known) in &standings.world.domains {
        let Some(seen) = standings.of(*uuid).filter(|seen| seen.class.is_some()) else {
            continue;
        };
        let old = before.get(uuid);
        let since = match old {
            Some((standing, since)) if *standing == seen.standing => *since,
            Some(_) => Some(now_ms()),
            None => None,
        };
        if let Some((standing, _)) = old.filter(|(standing, _)| *standing != seen.standing) {
            let domain = DomainRef::Uuid(*uuid);
            if let Some(facts) = host.hypervisors.find(&domain, Some(&known.hypervisor)) {
                let for_whom = standings.room_is_with(*uuid);
                let for_whom = for_whom.map_or_else(String::new, |key| format!(" for {key}"));
                news.push((
                    facts,
                    format!("{}{for_whom}, was {standing}", seen.standing),
                ));
            }
        }
        live.shown.0.insert(*uuid, (seen.standing, since));
    }
    drop(live);
    for (facts, detail) in news {
        host.hypervisors.tell_standing(&facts, detail);
    }
}

/// Says of each row how its domain stands.
pub(crate) fn mark<'a>(host: &Host, rows: impl Iterator<Item = &'a mut DomainRow>) {
    if !host.schedule.rules.is_on() {
        return;
    }
    let standings = Standings::new(host);
    let live = host.schedule.live();
    for row in rows {
        if let Some(seen) = standings.of(row.uuid).filter(|seen| seen.class.is_some()) {
            row.standing = Some(seen.standing);
            row.preempted_ms = standings.preempted_ms(&live, row.uuid);
        }
    }
}

pub(super) fn count(number: u64) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}
