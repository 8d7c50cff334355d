//! Who holds which domain back, who gives way, and how they come back. Pure.
//!
//! A domain that gives way gets a hold; it runs again once nobody holds it. What one needs to come back is looked for after every change. Nobody has
//! the room of another before that one was seen to have given it.

use std::collections::BTreeSet;

use uuid::Uuid;
use xman_common::protocol::{Holder, LeaseKey};

use super::{
    drive::Taken,
    ledger::Domain,
    plan::{self, Victim},
    record::{Given, Hold, Kept, Known, Lease, LeaseId, Record, Stage, World},
};
use crate::clock::now_ms;

impl Record {
    /// Holds a domain back.
    pub(crate) fn hold(&mut self, world: &World, uuid: Uuid, hold: Hold) {
        let Some(known) = world.domains.get(&uuid) else {
            return;
        };
        let kept = self.kept(uuid, known);
        match kept
            .holds
            .iter_mut()
            .find(|other| other.holder == hold.holder && other.depth == hold.depth)
        {
            Some(same) => same.reason = hold.reason,
            // What was kept so far is let go of once the new one is seen.
            None => kept.holds.push(hold),
        }
        self.settle(world);
    }

    /// Lets go of a domain, as far as `whose` says; it comes back if nobody else holds it and there is room, and else waits for that.
    pub(crate) fn let_go(&mut self, world: &World, uuid: Uuid, whose: impl Fn(&Hold) -> bool) {
        let Some(kept) = self.domains.get_mut(&uuid) else {
            return;
        };
        let (going, staying): (Vec<Hold>, Vec<Hold>) =
            kept.holds.drain(..).partition(|hold| whose(hold));
        let deepest = going.into_iter().max_by_key(|hold| hold.depth);
        let others = staying.iter().any(|hold| !hold.is_room());
        let waits = staying.iter().any(Hold::is_room);
        kept.holds = staying;
        // Others may have come back meanwhile: who is to give for it now is found out anew.
        for hold in &mut kept.holds {
            hold.after.clear();
        }
        if let Some(hold) = deepest
            && !others
            && !waits
        {
            kept.holds.push(Hold {
                holder: Holder::Room(None),
                after: BTreeSet::new(),
                reason: String::new(),
                ..hold
            });
        }
        self.settle(world);
    }

    /// Notes what is about to be taken from a domain, or was given back.
    pub(crate) fn note(&mut self, uuid: Uuid, taken: Taken) {
        if let Some(kept) = self.domains.get_mut(&uuid) {
            kept.taken = taken;
        }
    }

    /// Takes back what could not be done: holds of which libvirt never showed that they were kept, and the leases that rest on them.
    /// Returns those leases.
    pub(crate) fn give_up(&mut self, world: &World, uuid: Uuid) -> Vec<LeaseId> {
        let deepest = self.goal(uuid);
        let Some(kept) = self.domains.get_mut(&uuid) else {
            return Vec::new();
        };
        let (kept_up, failed): (Vec<Hold>, Vec<Hold>) = kept.holds.drain(..).partition(|hold| {
            // It was the deepest that could not be.
            hold.is_proven || Some(hold.depth) != deepest
        });
        kept.holds = kept_up;
        // Who has no job and cannot give its CPUs does little with them: the job that wanted them begins all the same.
        let is_idle = self.leases_of(uuid).next().is_none();
        let was_room = failed.iter().any(Hold::is_room);
        let is_own = failed.is_empty();
        let lost: Vec<LeaseId> = self
            .leases
            .values()
            .filter(|lease| lease.stage == Stage::Preparing)
            .filter(|lease| {
                let for_it =
                    was_room && lease.after.contains(&uuid) && (lease.needs_memory || !is_idle);
                // Or it is the domain itself that cannot come back to what the job needs.
                for_it || (is_own && lease.uuid == uuid)
            })
            .map(Lease::id)
            .collect();
        self.drop_leases(&lost);
        // Who was to come back once this one had given waits again.
        for kept in self.domains.values_mut() {
            for hold in &mut kept.holds {
                if hold.after.contains(&uuid) {
                    hold.after.clear();
                }
            }
        }
        self.settle(world);
        lost
    }

    /// Goes on with what waited for what drivers have seen now. Returns whether anything did.
    pub(crate) fn advance(&mut self, world: &World, given: impl Fn(Uuid) -> Given) -> bool {
        let before = self.clone();
        // A domain that is switched off while its job is about to begin has no job: what was planned for it holds no more.
        let is_off = |lease: &Lease| {
            let known = world.domains.get(&lease.uuid);
            let kept = self.domains.get(&lease.uuid);
            let is_frozen = kept.is_some_and(|kept| kept.taken.frozen);
            !is_frozen && known.is_none_or(|known| !known.state.is_active())
        };
        let off: Vec<LeaseId> = self
            .leases
            .values()
            .filter(|lease| lease.stage == Stage::Preparing && is_off(lease))
            .map(Lease::id)
            .collect();
        self.drop_leases(&off);
        let settled: BTreeSet<Uuid> = self
            .domains
            .iter()
            .filter(|(uuid, kept)| kept.holds.is_empty() || given(**uuid) == Given::All)
            .map(|(uuid, _)| *uuid)
            .collect();
        for (uuid, kept) in &mut self.domains {
            if given(*uuid) == Given::All {
                for hold in &mut kept.holds {
                    hold.is_proven = true;
                }
                // Somebody's last word counts, where he had said another depth before.
                let said: Vec<Holder> = kept.holds.iter().map(|hold| hold.holder.clone()).collect();
                let mut at = 0;
                kept.holds.retain(|hold| {
                    at += 1;
                    let again = said.get(at..).unwrap_or_default();
                    hold.is_room() || !again.contains(&hold.holder)
                });
            }
        }
        let gave = |record: &Self, uuid: Uuid, all: bool| match record.domains.get(&uuid) {
            None => true,
            Some(kept) if kept.holds.is_empty() => true,
            Some(_) => settled.contains(&uuid) || (!all && given(uuid) >= Given::Cpus),
        };
        let coming: Vec<Uuid> = self
            .domains
            .iter()
            .filter(|(_, kept)| {
                let mut waits = kept.holds.iter().filter(|hold| !hold.after.is_empty());
                waits.any(|hold| hold.after.iter().all(|uuid| gave(self, *uuid, true)))
            })
            .map(|(uuid, _)| *uuid)
            .collect();
        for uuid in coming {
            if let Some(kept) = self.domains.get_mut(&uuid) {
                kept.holds.retain(|hold| hold.after.is_empty());
            }
        }
        let ready: Vec<LeaseId> = self
            .leases
            .values()
            .filter(|lease| lease.stage == Stage::Preparing)
            .filter(|lease| {
                let own = self.domains.get(&lease.uuid);
                own.is_none_or(|kept| kept.holds.is_empty() && kept.taken.is_nothing())
                    && lease
                        .after
                        .iter()
                        .all(|uuid| gave(self, *uuid, lease.needs_memory))
            })
            .map(Lease::id)
            .collect();
        for id in ready {
            if let Some(lease) = self.leases.get_mut(&id) {
                lease.stage = Stage::Active;
            }
        }
        self.settle(world);
        *self != before
    }

    /// Lets come back whom there is room for, and those give way who have none.
    pub(super) fn settle(&mut self, world: &World) {
        // A job that is gone holds nothing.
        let there: BTreeSet<LeaseId> = self.leases.keys().cloned().collect();
        for (uuid, kept) in &mut self.domains {
            kept.holds.retain(|hold| match &hold.holder {
                Holder::Job(key) => there.contains(&LeaseId {
                    key: key.clone(),
                    uuid: *uuid,
                }),
                Holder::Room(_) | Holder::Person(_) => true,
            });
        }
        self.come_back(world);
        let boots = |uuid: Uuid| world.domains.get(&uuid).is_some_and(|known| known.boots);
        let crowd = plan::crowd(&self.ledger(world), boots);
        for victim in crowd {
            self.give_way(world, &[victim], None, victim.uuid, now_ms());
        }
        self.name_holders(world);
    }

    /// Lets come back whom there is room for.
    fn come_back(&mut self, world: &World) {
        let ledger = self.ledger(world);
        let waiting: Vec<Uuid> = self
            .domains
            .iter()
            .filter(|(_, kept)| {
                !kept.holds.is_empty()
                    && kept
                        .holds
                        .iter()
                        .all(|hold| hold.is_room() && hold.after.is_empty())
            })
            .map(|(uuid, _)| *uuid)
            .collect();
        let for_whom = |uuid: Uuid| {
            let kept = self.domains.get(&uuid)?;
            kept.holds.iter().find_map(|hold| hold.for_whom)
        };
        let back = plan::returns(&ledger, &waiting, for_whom);
        for (uuid, victims) in back {
            let job = self.leases_of(uuid).next().map(|lease| lease.key.clone());
            let key = job.or_else(|| {
                let kept = self.domains.get(&uuid)?;
                kept.holds.iter().find_map(|hold| match &hold.holder {
                    Holder::Room(key) => key.clone(),
                    Holder::Job(_) | Holder::Person(_) => None,
                })
            });
            let since_ms = self
                .domains
                .get(&uuid)
                .and_then(|kept| kept.holds.iter().map(|hold| hold.since_ms).max())
                .unwrap_or(0);
            self.give_way(world, &victims, key.as_ref(), uuid, since_ms);
            let after = self.giving(uuid);
            self.let_come(uuid, after);
        }
    }

    /// Says of each domain that waits for room which job has it now.
    fn name_holders(&mut self, world: &World) {
        let ledger = self.ledger(world);
        let first = self
            .leases
            .values()
            .filter(|lease| {
                let domain = ledger.find(lease.uuid);
                domain.is_some_and(|domain| domain.claim() > 0)
            })
            .max_by_key(|lease| ledger.find(lease.uuid).map(Domain::rank))
            .map(|lease| (lease.key.clone(), lease.uuid));
        let there: BTreeSet<LeaseId> = self.leases.keys().cloned().collect();
        for (uuid, kept) in &mut self.domains {
            for hold in kept.holds.iter_mut().filter(|hold| hold.after.is_empty()) {
                let is_there = match (&hold.holder, hold.for_whom) {
                    (Holder::Room(Some(key)), Some(uuid)) => there.contains(&LeaseId {
                        key: key.clone(),
                        uuid,
                    }),
                    (Holder::Room(_), _) => false,
                    (Holder::Job(_) | Holder::Person(_), _) => true,
                };
                if !is_there {
                    let other = first.clone().filter(|(_, other)| other != uuid);
                    hold.for_whom = other.as_ref().map(|(_, uuid)| *uuid).or(hold.for_whom);
                    hold.holder = Holder::Room(other.map(|(key, _)| key));
                }
            }
        }
    }

    /// Those who give way and were not seen to have given yet: nobody has their room before.
    pub(super) fn giving(&self, but: Uuid) -> BTreeSet<Uuid> {
        let giving = self.domains.iter().filter(|(uuid, kept)| {
            let mut holds = kept.holds.iter().filter(|hold| hold.is_room());
            **uuid != but && holds.any(|hold| !hold.is_proven && hold.after.is_empty())
        });
        giving.map(|(uuid, _)| *uuid).collect()
    }

    /// Holds victims back.
    pub(super) fn give_way(
        &mut self,
        world: &World,
        victims: &[Victim],
        key: Option<&LeaseKey>,
        for_whom: Uuid,
        since_ms: u64,
    ) {
        for victim in victims {
            let Some(known) = world.domains.get(&victim.uuid) else {
                continue;
            };
            let hold = Hold {
                holder: Holder::Room(key.cloned()),
                depth: victim.depth,
                reason: String::new(),
                since_ms,
                for_whom: Some(for_whom),
                after: BTreeSet::new(),
                is_proven: false,
            };
            self.kept(victim.uuid, known).holds.push(hold);
        }
    }

    /// Lets a domain come back that waited for room, once others have given it.
    pub(super) fn let_come(&mut self, uuid: Uuid, after: BTreeSet<Uuid>) {
        if let Some(kept) = self.domains.get_mut(&uuid) {
            if after.is_empty() {
                kept.holds.retain(|hold| !hold.is_room());
            } else {
                for hold in kept.holds.iter_mut().filter(|hold| hold.is_room()) {
                    hold.after.clone_from(&after);
                }
            }
        }
    }

    /// What is kept of a domain that is about to be held back.
    fn kept(&mut self, uuid: Uuid, known: &Known) -> &mut Kept {
        self.domains.entry(uuid).or_insert_with(|| Kept {
            name: known.name.clone(),
            hypervisor: known.hypervisor.clone(),
            holds: Vec::new(),
            taken: Taken::default(),
            preempted_ms: 0,
        })
    }
}
