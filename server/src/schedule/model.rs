//! Random histories, with crashes between any two steps, against a model of libvirt and the rows that are in the store. After each of them: whoever
//! gave way runs again once nobody holds it, nothing runs that somebody holds, nothing is promised twice, and what was taken is given back.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use uuid::Uuid;
use xman_common::{
    name::Tag,
    protocol::{Depth, DomainState, Holder, JobKey, LeaseKey, Reconcile},
};

use super::{
    drive::{SLACK_KIB, Step, next},
    ledger::{Amount, Class, Domain},
    plan::admits,
    record::{Given, Hold, Known, Lease, Record, Stage, World},
    rows,
};
use crate::hypervisor::{CpuShare, Life, Seen};

const DOMAINS: usize = 5;
const JOBS: u32 = 4;
const MIB: u64 = 1024;
const FULL: u64 = 512 * MIB;
const FLOOR: u64 = 128 * MIB;
/// More steps than any domain needs to get anywhere.
const ENOUGH: usize = 400;

/// A domain as a hypervisor has it.
#[derive(Clone, Debug)]
struct Guest {
    class: Option<Class>,
    vcpus: u32,
    state: DomainState,
    cpu: CpuShare,
    memory_kib: u64,
    saved: bool,
    life: u32,
    /// Whether somebody has paused it by hand.
    by_hand: bool,
    /// Whether somebody has switched it on or let it run since it was last looked at.
    meddled: bool,
    balks: bool,
}

impl Guest {
    fn had() -> CpuShare {
        CpuShare::Credit {
            weight: 256,
            cap: 0,
        }
    }

    fn seen(&self) -> Seen {
        let is_on = self.state.is_active();
        Seen {
            state: self.state,
            reason: "",
            life: is_on.then(|| Life::of_test(self.life)),
            cpu: is_on.then(|| self.cpu.clone()),
            vcpus: self.vcpus,
            memory_kib: self.memory_kib,
            max_memory_kib: FULL,
            saved: self.saved,
        }
    }

    fn start(&mut self, state: DomainState) {
        self.state = state;
        self.life += 1;
        self.cpu = Self::had();
        self.memory_kib = FULL;
        self.saved = false;
    }

    fn act(&mut self, step: &Step) {
        match step {
            Step::Done | Step::Note(_) | Step::CannotStarve => {}
            Step::Halt => self.state = DomainState::Paused,
            Step::RunOn => self.state = DomainState::Running,
            Step::Starve(had) => self.cpu = had.trickle(self.vcpus),
            Step::Feed(had) => self.cpu = had.clone(),
            Step::Shrink(kib) => self.memory_kib = *kib,
            Step::Grow(kib) => self.memory_kib = *kib,
            Step::Freeze => {
                self.state = DomainState::Off;
                self.saved = true;
            }
            Step::Thaw => {
                // The image has what the guest had when it was saved.
                let memory_kib = self.memory_kib;
                self.start(DomainState::Paused);
                self.memory_kib = memory_kib;
            }
        }
    }
}

/// How a step of a driver ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Well,
    /// libvirt refuses for good.
    Refused,
    /// xmand is killed before the step, or after it and before it knows.
    KilledBefore,
    KilledAfter,
}

#[derive(Clone, Debug)]
enum Op {
    Begin {
        job: u32,
        run: u32,
        domain: usize,
        firm: bool,
        reserve: bool,
    },
    End {
        job: u32,
        run: u32,
    },
    Hold {
        domain: usize,
        who: u8,
        depth: Depth,
    },
    LetGo {
        domain: usize,
        who: u8,
    },
    Suspend {
        domain: usize,
    },
    Resume {
        domain: usize,
    },
    Reconcile {
        has: u8,
    },
    Drive {
        domain: usize,
        end: End,
    },
    Destroy {
        domain: usize,
    },
    Start {
        domain: usize,
    },
    PauseByHand {
        domain: usize,
    },
    ResumeByHand {
        domain: usize,
    },
    Expire,
}

/// A host with its xmand.
struct Model {
    guests: Vec<Guest>,
    capacity: Amount,
    record: Record,
    /// What is in the store.
    stored: BTreeMap<String, String>,
    given: BTreeMap<Uuid, Given>,
}

fn uuid(domain: usize) -> Uuid {
    Uuid::from_u128(domain as u128 + 1)
}

fn key(job: u32, run: u32) -> LeaseKey {
    LeaseKey {
        job: JobKey {
            system: "slurm".parse().unwrap(),
            cluster: "lab".parse().unwrap(),
            id: job.to_string().parse().unwrap(),
        },
        run,
    }
}

impl Model {
    fn new(guests: Vec<Guest>, capacity: Amount) -> Self {
        Self {
            guests,
            capacity,
            record: Record::default(),
            stored: BTreeMap::new(),
            given: BTreeMap::new(),
        }
    }

    fn world(&self) -> World {
        let domains = self.guests.iter().enumerate().map(|(at, guest)| {
            let tag: Tag = "c".parse().unwrap();
            let known = Known {
                name: format!("d{at}").parse().unwrap(),
                hypervisor: "test:///default".to_owned(),
                class: guest.class.map(|class| (tag, class)),
                state: guest.state,
                saved: guest.saved,
                memory_kib: guest.memory_kib,
                vcpus: guest.vcpus,
                is_fresh: false,
                balks: guest.balks,
                boots: false,
            };
            (uuid(at), known)
        });
        World {
            capacity: self.capacity,
            domains: domains.collect(),
        }
    }

    /// As the scheduler decides: the store first.
    fn decide<T>(&mut self, change: impl FnOnce(&mut Record, &World) -> T) -> T {
        let world = self.world();
        let mut after = self.record.clone();
        after.watch(&world);
        let answer = change(&mut after, &world);
        for (place, row) in rows::changes(&self.record, &after) {
            match row {
                Some(row) => drop(self.stored.insert(place, row)),
                None => drop(self.stored.remove(&place)),
            }
        }
        self.record = after;
        answer
    }

    /// xmand is killed, and started again from what is in the store.
    fn restart(&mut self) {
        let stored = self.stored.clone().into_iter().collect();
        let read = rows::read(stored).unwrap();
        assert_eq!(
            read, self.record,
            "what is in the store is what was decided"
        );
        self.record = read;
        self.given.clear();
    }

    fn goal(&self, domain: usize) -> Option<Depth> {
        self.record.goal(uuid(domain))
    }

    fn is_over(&self, domain: usize) -> bool {
        let kept = self.record.domains.get(&uuid(domain));
        kept.is_none_or(|kept| kept.holds.is_empty() && kept.taken.is_nothing())
    }

    /// One turn of a domain's driver. Returns whether there was anything to do.
    fn turn(&mut self, domain: usize, end: End) -> bool {
        let uuid = uuid(domain);
        if self.is_over(domain) {
            self.given.remove(&uuid);
            return self.advance();
        }
        let (goal, wants) = (self.goal(domain), self.record.wants(uuid));
        self.guests[domain].meddled = false;
        let seen = self.guests[domain].seen();
        let taken = self.record.domains[&uuid].taken.clone();
        let halted = !matches!(seen.state, DomainState::Running);
        let given = match goal {
            Some(Depth::Pause | Depth::Freeze) if halted => Given::Cpus,
            _ => Given::Nothing,
        };
        self.given.insert(uuid, given);
        let floor = self.guests[domain]
            .class
            .map_or(FLOOR, |class| class.floor_kib);
        let step = next(wants, floor, &taken, &seen);
        match (&step, end) {
            (Step::Done, _) => {
                self.given.insert(uuid, Given::All);
                return self.advance();
            }
            (_, End::KilledBefore) => self.restart(),
            (Step::Note(taken), _) => {
                let taken = taken.clone();
                self.decide(|record, _| record.note(uuid, taken));
                if end == End::KilledAfter {
                    self.restart();
                }
            }
            (_, End::Refused) => {
                let kept = &self.record.domains[&uuid];
                if kept.holds.iter().any(|hold| !hold.is_proven) {
                    self.guests[domain].balks = kept
                        .holds
                        .iter()
                        .any(|hold| matches!(hold.holder, Holder::Room(_)));
                    self.decide(|record, world| record.give_up(world, uuid));
                }
            }
            (_, End::Well | End::KilledAfter) => {
                self.guests[domain].act(&step);
                if end == End::KilledAfter {
                    self.restart();
                } else if let Step::Grow(_) = step {
                    self.decide(|record, _| {
                        record.domains.get_mut(&uuid).unwrap().taken.memory_kib = None;
                    });
                }
            }
        }
        true
    }

    /// No job begins before all were seen to have given who give for it.
    fn check_begun(&self, before: &Record) {
        for (id, lease) in &self.record.leases {
            let was = before.leases.get(id).map(|lease| lease.stage);
            if was == Some(Stage::Active) || lease.stage == Stage::Reserved {
                continue;
            }
            for (uuid, kept) in &self.record.domains {
                let gives = |hold: &Hold| {
                    let by_room = matches!(hold.holder, Holder::Room(_));
                    by_room && hold.for_whom == Some(id.uuid) && hold.after.is_empty()
                };
                // One that gave way for somebody before may be said to do so for this one now.
                let known = before.domains.get(uuid);
                let gave_way = known.is_some_and(|kept| {
                    let mut holds = kept.holds.iter();
                    holds.any(|hold| matches!(hold.holder, Holder::Room(_)))
                });
                let is_new = !gave_way && kept.holds.iter().any(gives);
                let what = || format!("{} for {}: {:#?}", kept.name, lease.key, self.record);
                if was.is_none() && is_new {
                    assert!(lease.after.contains(uuid), "nobody waits for {}", what());
                }
                if lease.stage == Stage::Active && lease.after.contains(uuid) {
                    let guest = &self.guests[usize::try_from(uuid.as_u128()).unwrap() - 1];
                    let gave = kept.holds.is_empty()
                        || guest.meddled
                        || guest.state != DomainState::Running
                        || guest.cpu != Guest::had();
                    assert!(gave, "not seen to have given: {}", what());
                }
            }
        }
    }

    fn advance(&mut self) -> bool {
        let given = self.given.clone();
        let look = |uuid: Uuid| given.get(&uuid).copied().unwrap_or_default();
        self.decide(|record, world| record.advance(world, look))
    }

    /// Lets the drivers work until there is nothing left to do.
    fn rest(&mut self) {
        for _ in 0..ENOUGH {
            let before = (self.record.clone(), format!("{:?}", self.guests));
            for domain in 0..self.guests.len() {
                self.turn(domain, End::Well);
            }
            self.decide(|record, world| record.expire(world, &[]));
            if before == (self.record.clone(), format!("{:?}", self.guests)) {
                return;
            }
        }
        panic!("the drivers never come to rest: {:?}", self.record);
    }

    fn apply(&mut self, op: &Op) {
        match op.clone() {
            Op::Begin {
                job,
                run,
                domain,
                firm,
                reserve,
            } => {
                let lease = Lease {
                    key: key(job, run),
                    uuid: uuid(domain),
                    name: format!("d{domain}").parse().unwrap(),
                    hypervisor: "test:///default".to_owned(),
                    user: None,
                    principal: "slurm/ctl@EX.ORG".parse().unwrap(),
                    preemptible: !firm
                        && self.guests[domain]
                            .class
                            .is_some_and(|class| class.depth.is_some()),
                    stage: if reserve {
                        Stage::Reserved
                    } else {
                        Stage::Preparing
                    },
                    needs_memory: false,
                    after: BTreeSet::new(),
                    began_ms: 1,
                    ends_in_ms: None,
                };
                self.decide(|record, world| {
                    let mut after = record.clone();
                    if after.begin(world, lease, true).is_ok() {
                        *record = after;
                    }
                });
            }
            Op::End { job, run } => {
                self.decide(|record, world| record.end(world, &key(job, run), None, 2));
            }
            Op::Hold { domain, who, depth } => {
                let hold = hold(
                    Holder::Person(format!("p{who}@EX.ORG").parse().unwrap()),
                    depth,
                );
                self.decide(|record, world| record.hold(world, uuid(domain), hold));
            }
            Op::LetGo { domain, who } => {
                let holder = Holder::Person(format!("p{who}@EX.ORG").parse().unwrap());
                self.decide(|record, world| {
                    record.let_go(world, uuid(domain), |hold| hold.holder == holder);
                });
            }
            Op::Suspend { domain } => {
                let lease = self.record.leases_of(uuid(domain)).next();
                let depth = self.guests[domain].class.and_then(|class| class.depth);
                if let (Some(lease), Some(depth)) = (lease, depth) {
                    let hold = hold(Holder::Job(lease.key.clone()), depth);
                    self.decide(|record, world| record.hold(world, uuid(domain), hold));
                }
            }
            Op::Resume { domain } => {
                self.decide(|record, world| {
                    record.let_go(world, uuid(domain), |hold| {
                        matches!(hold.holder, Holder::Job(_))
                    });
                });
            }
            Op::Reconcile { has } => {
                let running = (0..JOBS)
                    .filter(|job| has & (1 << job) != 0)
                    .map(|job| (job.to_string().parse().unwrap(), 0));
                let list = Reconcile {
                    system: "slurm".parse().unwrap(),
                    cluster: "lab".parse().unwrap(),
                    running: running.collect(),
                    age_ms: 0,
                };
                self.decide(|record, world| record.reconcile(world, &list, |_| true));
            }
            Op::Drive { domain, end } => drop(self.turn(domain, end)),
            Op::Destroy { domain } => {
                let guest = &mut self.guests[domain];
                if guest.state.is_active() {
                    guest.state = DomainState::Off;
                    guest.by_hand = false;
                }
            }
            Op::Start { domain } => {
                // By xmand's own verb, which asks whether there is room; who starts more past it has promised what is not there.
                let guest = &self.guests[domain];
                let needs = Amount {
                    cpus: u64::from(guest.vcpus),
                    kib: FULL,
                };
                let ledger = self.record.ledger(&self.world());
                if !guest.state.is_active() && admits(&ledger, uuid(domain), needs).is_ok() {
                    self.guests[domain].start(DomainState::Running);
                    self.guests[domain].meddled = true;
                }
            }
            Op::PauseByHand { domain } => {
                let guest = &mut self.guests[domain];
                if guest.state == DomainState::Running {
                    guest.state = DomainState::Paused;
                    // One that xmand is about to pause or has paused is its own: libvirt has no word for who did.
                    let taken = self.record.domains.get(&uuid(domain));
                    let life = Some(Life::of_test(guest.life));
                    guest.by_hand =
                        taken.is_none_or(|kept| !kept.taken.paused || kept.taken.life != life);
                }
            }
            Op::ResumeByHand { domain } => {
                let guest = &mut self.guests[domain];
                if guest.state == DomainState::Paused {
                    guest.state = DomainState::Running;
                    guest.by_hand = false;
                    guest.meddled = true;
                }
            }
            Op::Expire => {
                for guest in &mut self.guests {
                    guest.balks = false;
                }
                self.decide(|record, world| record.expire(world, &[]));
            }
        }
    }

    /// Nothing runs that somebody holds, nothing is promised twice, and what nobody holds has all that is its own.
    fn check(&self) {
        for (at, guest) in self.guests.iter().enumerate() {
            let is_on = guest.state.is_active();
            let what = || format!("d{at}: {guest:?}\n{:#?}", self.record);
            match self.goal(at) {
                None => {
                    assert!(self.is_over(at), "something is owed to {}", what());
                    if is_on {
                        assert_eq!(guest.cpu, Guest::had(), "{}", what());
                        assert_eq!(guest.memory_kib, FULL, "{}", what());
                        let paused = guest.state == DomainState::Paused;
                        assert!(!paused || guest.by_hand, "nobody paused {}", what());
                    }
                }
                Some(_) if !is_on => {}
                Some(Depth::Starve) => assert_ne!(guest.cpu, Guest::had(), "{}", what()),
                Some(Depth::Shrink) => {
                    assert_ne!(guest.cpu, Guest::had(), "{}", what());
                    assert!(guest.memory_kib <= FLOOR + SLACK_KIB, "{}", what());
                }
                Some(Depth::Pause) => assert_eq!(guest.state, DomainState::Paused, "{}", what()),
                Some(Depth::Freeze) => panic!("it is not frozen: {}", what()),
            }
        }
        let ledger = self.record.ledger(&self.world());
        // Room that is only kept is still with those who will give it.
        let begun = ledger
            .domains
            .iter()
            .filter(|domain| domain.job.is_some_and(|job| !job.is_reserved));
        let used: u64 = begun.map(Domain::claim).sum();
        assert!(
            used <= ledger.capacity.cpus || self.leased() < 2,
            "{used} of {:?}: {:#?}",
            ledger.capacity,
            self.record
        );
        for lease in self.record.leases.values() {
            let runs = self
                .goal(usize::try_from(lease.uuid.as_u128()).unwrap() - 1)
                .is_none();
            assert!(
                lease.stage != Stage::Preparing || !runs,
                "{} never begins: {:#?}",
                lease.key,
                self.record
            );
        }
    }

    fn leased(&self) -> usize {
        let leases = self.record.leases.values();
        leases
            .map(|lease| lease.uuid)
            .collect::<BTreeSet<_>>()
            .len()
    }

    /// Once every job has ended and everybody has let go, all come back.
    fn end_all(&mut self) {
        self.apply(&Op::Expire);
        for job in 0..JOBS {
            self.apply(&Op::End { job, run: 9 });
        }
        for domain in 0..self.guests.len() {
            for who in 0..2 {
                self.apply(&Op::LetGo { domain, who });
            }
            self.apply(&Op::Resume { domain });
        }
        self.rest();
        assert!(self.record.leases.is_empty());
        for domain in 0..self.guests.len() {
            assert_eq!(
                self.goal(domain),
                None,
                "d{domain} is left behind: {:#?}",
                self.record
            );
        }
        self.check();
    }
}

fn hold(holder: Holder, depth: Depth) -> Hold {
    Hold {
        holder,
        depth,
        reason: String::new(),
        since_ms: 1,
        for_whom: None,
        after: BTreeSet::new(),
        is_proven: false,
    }
}

fn any_depth() -> impl Strategy<Value = Depth> {
    prop::sample::select(Depth::ALL)
}

prop_compose! {
    fn any_guest()(
        rank in 0..3_i32,
        depth in prop::option::weighted(0.8, any_depth()),
        takes_part in prop::bool::weighted(0.9),
        vcpus in 1..4_u32,
        is_on in prop::bool::weighted(0.9),
    ) -> Guest {
        Guest {
            class: takes_part.then_some(Class { rank, depth, floor_kib: FLOOR }),
            vcpus,
            state: if is_on { DomainState::Running } else { DomainState::Off },
            cpu: Guest::had(),
            memory_kib: FULL,
            saved: false,
            life: 1,
            by_hand: false,
            meddled: false,
            balks: false,
        }
    }
}

fn any_end() -> impl Strategy<Value = End> {
    prop_oneof![
        6 => Just(End::Well),
        1 => Just(End::Refused),
        1 => Just(End::KilledBefore),
        1 => Just(End::KilledAfter),
    ]
}

fn any_op() -> impl Strategy<Value = Op> {
    let domain = || 0..DOMAINS;
    prop_oneof![
        4 => (0..JOBS, 0..3_u32, domain(), prop::bool::weighted(0.2), prop::bool::weighted(0.1))
            .prop_map(|(job, run, domain, firm, reserve)| Op::Begin { job, run, domain, firm, reserve }),
        2 => (0..JOBS, 0..3_u32).prop_map(|(job, run)| Op::End { job, run }),
        1 => (domain(), 0..2_u8, any_depth()).prop_map(|(domain, who, depth)| Op::Hold { domain, who, depth }),
        1 => (domain(), 0..2_u8).prop_map(|(domain, who)| Op::LetGo { domain, who }),
        1 => domain().prop_map(|domain| Op::Suspend { domain }),
        1 => domain().prop_map(|domain| Op::Resume { domain }),
        1 => any::<u8>().prop_map(|has| Op::Reconcile { has }),
        12 => (domain(), any_end()).prop_map(|(domain, end)| Op::Drive { domain, end }),
        1 => domain().prop_map(|domain| Op::Destroy { domain }),
        1 => domain().prop_map(|domain| Op::Start { domain }),
        1 => domain().prop_map(|domain| Op::PauseByHand { domain }),
        1 => domain().prop_map(|domain| Op::ResumeByHand { domain }),
        1 => Just(Op::Expire),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(3000))]

    #[test]
    fn whatever_happens_everybody_comes_back_and_nobody_runs_who_is_held(
        guests in prop::collection::vec(any_guest(), DOMAINS),
        cpus in 1..8_u64,
        mib in prop::sample::select(vec![600_u64, 1200, 4000]),
        history in prop::collection::vec(any_op(), 1..60),
    ) {
        let mut model = Model::new(guests, Amount { cpus, kib: mib * MIB });
        for op in &history {
            let before = model.record.clone();
            model.apply(op);
            model.check_begun(&before);
        }
        model.apply(&Op::Expire);
        model.rest();
        model.check();
        model.restart();
        model.rest();
        model.check();
        model.end_all();
    }
}
