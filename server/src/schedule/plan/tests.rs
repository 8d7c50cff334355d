use proptest::prelude::*;

use super::*;
use crate::schedule::ledger::{Class, Job};

const GIB: u64 = 1 << 20;

fn domain(number: u128, rank: i32, cpus: u64) -> Domain {
    Domain {
        uuid: Uuid::from_u128(number),
        class: Some(Class {
            rank,
            depth: Some(Depth::Starve),
            floor_kib: GIB / 4,
        }),
        full: Amount { cpus, kib: GIB },
        is_on: true,
        held: None,
        is_shrunk: false,
        job: None,
        balks: false,
        preempted_ms: 0,
    }
}

fn busy(number: u128, rank: i32, cpus: u64) -> Domain {
    Domain {
        job: Some(Job {
            is_firm: false,
            is_fresh: false,
            is_reserved: false,
        }),
        ..domain(number, rank, cpus)
    }
}

fn deep(depth: Depth, domain: Domain) -> Domain {
    let class = domain.class.map(|class| Class {
        depth: Some(depth),
        ..class
    });
    Domain { class, ..domain }
}

fn ledger(cpus: u64, gib: u64, domains: &[Domain]) -> Ledger {
    let mut domains = domains.to_vec();
    domains.sort_by_key(|domain| domain.uuid);
    Ledger {
        capacity: Amount {
            cpus,
            kib: gib * GIB,
        },
        had_kib: 0,
        domains,
    }
}

fn asks(number: u128) -> Asks {
    Asks {
        uuid: Uuid::from_u128(number),
        is_firm: false,
        comes_back: false,
    }
}

#[track_caller]
fn go(ledger: &Ledger, asks: Asks, expected: &[u128]) {
    match plan(ledger, asks) {
        Plan::Go(victims) => {
            let mut found: Vec<u128> = victims.iter().map(|it| it.uuid.as_u128()).collect();
            found.sort_unstable();
            assert_eq!(found, expected);
        }
        Plan::No(why) => panic!("{why:?}"),
    }
}

#[track_caller]
fn no(ledger: &Ledger, asks: Asks) -> Why {
    match plan(ledger, asks) {
        Plan::Go(victims) => panic!("{victims:?}"),
        Plan::No(why) => why,
    }
}

#[test]
fn nobody_gives_way_where_there_is_room() {
    go(
        &ledger(4, 8, &[domain(1, 0, 2), busy(2, 0, 2)]),
        asks(1),
        &[],
    );
}

#[test]
fn those_without_a_job_give_way_to_any_and_before_any_that_has_one() {
    let host = ledger(4, 8, &[domain(1, 10, 2), busy(2, 0, 2), domain(3, 20, 2)]);
    go(&host, asks(1), &[3]);
}

#[test]
fn only_a_lower_rank_gives_way() {
    let host = ledger(2, 8, &[domain(1, 10, 2), busy(2, 0, 2)]);
    go(&host, asks(1), &[2]);
    let equal = ledger(2, 8, &[domain(1, 10, 2), busy(2, 10, 2)]);
    let why = no(&equal, asks(1));
    assert!(matches!(why, Why::Taken { by: Some(by), .. } if by.as_u128() == 2));
}

#[test]
fn firm_fresh_and_reserved_jobs_give_way_to_nobody() {
    for (is_firm, is_fresh, is_reserved) in [
        (true, false, false),
        (false, true, false),
        (false, false, true),
    ] {
        let job = Some(Job {
            is_firm,
            is_fresh,
            is_reserved,
        });
        let host = ledger(
            2,
            8,
            &[
                domain(1, 10, 2),
                Domain {
                    job,
                    ..busy(2, 0, 2)
                },
            ],
        );
        assert!(matches!(no(&host, asks(1)), Why::Taken { .. }));
    }
    let never = Domain {
        class: Some(Class {
            rank: 0,
            depth: None,
            floor_kib: 0,
        }),
        ..busy(2, 0, 2)
    };
    let host = ledger(2, 8, &[domain(1, 10, 2), never.clone()]);
    assert!(matches!(no(&host, asks(1)), Why::Taken { .. }));
    let idle = Domain { job: None, ..never };
    go(&ledger(2, 8, &[domain(1, 10, 2), idle]), asks(1), &[2]);
}

#[test]
fn the_smallest_that_is_enough_gives_way_and_among_equals_the_least_preempted() {
    let host = ledger(
        8,
        64,
        &[
            domain(1, 10, 2),
            busy(2, 0, 1),
            busy(3, 0, 3),
            busy(4, 0, 4),
        ],
    );
    go(&host, asks(1), &[3]);
    let host = ledger(
        8,
        64,
        &[
            domain(1, 10, 2),
            busy(2, 0, 1),
            busy(3, 0, 4),
            busy(4, 0, 3),
        ],
    );
    go(&host, asks(1), &[4]);
    let tired = Domain {
        preempted_ms: 5000,
        ..busy(2, 0, 2)
    };
    let host = ledger(4, 64, &[domain(1, 10, 2), tired, busy(3, 0, 2)]);
    go(&host, asks(1), &[3]);
}

#[test]
fn where_one_is_not_enough_the_largest_give_way_first() {
    let host = ledger(
        8,
        64,
        &[
            domain(1, 10, 6),
            busy(2, 0, 2),
            busy(3, 0, 4),
            busy(4, 0, 2),
        ],
    );
    go(&host, asks(1), &[2, 3]);
}

#[test]
fn memory_is_got_by_depths_that_give_it() {
    let frozen = Domain {
        held: Some(Depth::Freeze),
        ..deep(Depth::Freeze, domain(1, 10, 1))
    };
    let starving = ledger(8, 1, &[frozen.clone(), busy(2, 0, 1)]);
    assert!(matches!(no(&starving, asks(1)), Why::Taken { .. }));
    let freezing = ledger(8, 1, &[frozen.clone(), deep(Depth::Freeze, busy(2, 0, 1))]);
    go(&freezing, asks(1), &[2]);
    let shrinking = ledger(8, 1, &[frozen, deep(Depth::Shrink, busy(2, 0, 1))]);
    assert!(matches!(no(&shrinking, asks(1)), Why::Taken { .. }));
}

#[test]
fn what_one_needs_to_come_back_is_kept_from_equals_and_not_from_betters_or_those_it_could_preempt()
{
    // 2 has given way to 3, of which 1 CPU is left over.
    let host = |rank| {
        ledger(
            3,
            64,
            &[
                domain(1, rank, 1),
                Domain {
                    held: Some(Depth::Starve),
                    ..busy(2, 10, 3)
                },
                busy(3, 20, 2),
            ],
        )
    };
    let why = no(&host(10), asks(1));
    assert!(matches!(why, Why::Kept { for_whom } if for_whom.as_u128() == 2));
    go(&host(15), asks(1), &[]);
    go(&host(5), asks(1), &[]);
    let firm = Asks {
        is_firm: true,
        ..asks(1)
    };
    assert!(matches!(no(&host(5), firm), Why::Kept { .. }));
}

#[test]
fn what_is_larger_than_the_host_goes_elsewhere() {
    assert!(matches!(
        no(&ledger(2, 8, &[domain(1, 10, 4)]), asks(1)),
        Why::Never { .. }
    ));
    assert_eq!(no(&ledger(2, 8, &[]), asks(1)), Why::NoPart);
    let off = Domain {
        is_on: false,
        ..domain(1, 0, 1)
    };
    assert_eq!(no(&ledger(2, 8, &[off]), asks(1)), Why::Off);
}

#[test]
fn they_come_back_by_rank_and_then_by_size() {
    let held = |it: Domain| Domain {
        held: Some(Depth::Starve),
        ..it
    };
    let host = ledger(
        4,
        64,
        &[
            held(busy(1, 5, 2)),
            held(busy(2, 5, 3)),
            held(busy(3, 1, 1)),
            held(domain(4, 9, 1)),
        ],
    );
    let waiting: Vec<Uuid> = (1..=4).map(Uuid::from_u128).collect();
    let back = returns(&host, &waiting, |_| None);
    let order: Vec<u128> = back.iter().map(|(uuid, _)| uuid.as_u128()).collect();
    assert_eq!(order, [2, 3]);
}

#[test]
fn a_host_smaller_than_its_promises_still_lets_them_run_when_nobody_has_a_job() {
    let held = |number| Domain {
        held: Some(Depth::Starve),
        ..domain(number, 0, 2)
    };
    let host = ledger(1, 1, &[held(1), held(2), held(3)]);
    let waiting: Vec<Uuid> = (1..=3).map(Uuid::from_u128).collect();
    assert_eq!(returns(&host, &waiting, |_| None).len(), 3);
    let alone = Domain {
        held: Some(Depth::Starve),
        ..busy(1, 0, 2)
    };
    let host = ledger(1, 1, &[alone]);
    assert_eq!(returns(&host, &[Uuid::from_u128(1)], |_| None).len(), 1);
}

#[test]
fn a_thousand_domains_are_planned_for_in_a_moment() {
    let mut domains: Vec<Domain> = (2..1000)
        .map(|number| busy(number, i32::try_from(number % 7).unwrap(), 1))
        .collect();
    domains.push(domain(1, 10, 900));
    let host = ledger(998, 10_000, &domains);
    let Plan::Go(victims) = plan(&host, asks(1)) else {
        panic!("no room")
    };
    assert_eq!(victims.len(), 900);
}

fn any_depth() -> impl Strategy<Value = Option<Depth>> {
    prop_oneof![
        Just(None),
        Just(Some(Depth::Starve)),
        Just(Some(Depth::Shrink)),
        Just(Some(Depth::Pause)),
        Just(Some(Depth::Freeze)),
    ]
}

prop_compose! {
    fn any_domain(number: u128)(
        rank in 0..4_i32,
        depth in any_depth(),
        cpus in 1..6_u64,
        gib in 1..4_u64,
        is_on in prop::bool::weighted(0.9),
        held in prop_oneof![3 => Just(false), 1 => Just(true)],
        job in prop::option::of((prop::bool::weighted(0.2), prop::bool::weighted(0.2))),
        preempted_ms in 0..3_u64,
    ) -> Domain {
        let class = Class { rank, depth, floor_kib: GIB / 2 };
        Domain {
            uuid: Uuid::from_u128(number),
            class: Some(class),
            full: Amount { cpus, kib: gib * GIB },
            is_on,
            held: held.then_some(depth).flatten(),
            is_shrunk: false,
            job: job.map(|(is_firm, is_fresh)| Job { is_firm, is_fresh, is_reserved: false }),
            balks: false,
            preempted_ms,
        }
    }
}

prop_compose! {
    fn any_ledger()(
        cpus in 1..16_u64,
        gib in 1..16_u64,
        domains in (any_domain(1), any_domain(2), any_domain(3), any_domain(4), any_domain(5)),
    ) -> Ledger {
        let (a, b, c, d, e) = domains;
        ledger(cpus, gib, &[a, b, c, d, e])
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn a_plan_gives_the_room_that_was_asked_for_and_spares_whom_it_can(
        host in any_ledger(),
        is_firm in any::<bool>(),
    ) {
        let winner = host.find(Uuid::from_u128(1)).unwrap().clone();
        let Plan::Go(victims) = plan(&host, Asks { uuid: winner.uuid, is_firm, comes_back: false }) else {
            return Ok(());
        };
        let fits = |spare: Option<Uuid>| {
            let mut after = host.clone();
            for victim in victims.iter().filter(|it| Some(it.uuid) != spare) {
                after.find_mut(victim.uuid).unwrap().held = Some(victim.depth);
            }
            let asked = after.find_mut(winner.uuid).unwrap();
            asked.held = None;
            asked.job = Some(Job { is_firm, is_fresh: true, is_reserved: false });
            let idle: u64 = after.domains.iter().map(Domain::idle).sum();
            let used = after.used();
            used.cpus + idle <= after.capacity.cpus
                && (winner.needs().kib == 0 || used.kib <= after.capacity.kib)
        };
        prop_assert!(fits(None));
        for victim in &victims {
            let it = host.find(victim.uuid).unwrap();
            prop_assert!(it.uuid != winner.uuid && it.is_on && it.held.is_none());
            prop_assert_eq!(it.depth(), Some(victim.depth));
            if let Some(job) = it.job {
                prop_assert!(it.rank() < winner.rank() && !job.is_firm && !job.is_fresh);
            }
            prop_assert!(!fits(Some(victim.uuid)), "{} was not needed", victim.uuid);
        }
    }

    #[test]
    fn nobody_is_left_behind_once_nobody_has_a_job(host in any_ledger()) {
        let mut host = host;
        for domain in &mut host.domains {
            domain.job = None;
            if domain.held.is_some_and(|depth| depth != Depth::Starve && depth != Depth::Pause) {
                domain.held = Some(Depth::Pause);
            }
        }
        let waiting: Vec<Uuid> = host.domains.iter().filter(|it| it.held.is_some()).map(|it| it.uuid).collect();
        prop_assert_eq!(returns(&host, &waiting, |_| None).len(), waiting.len());
    }

    #[test]
    fn the_best_that_waits_comes_back_once_its_betters_are_gone(host in any_ledger()) {
        let waiting: Vec<Uuid> = host
            .domains
            .iter()
            .filter(|it| it.is_on && it.held.is_some() && it.job.is_some())
            .map(|it| it.uuid)
            .collect();
        let mut host = host;
        for domain in &mut host.domains {
            if domain.held.is_none() {
                domain.job = None;
            }
        }
        let fit = waiting.iter().filter_map(|uuid| host.find(*uuid)).any(|it| {
            it.full.cpus <= host.capacity.cpus && it.needs().kib == 0
        });
        prop_assert!(!fit || !returns(&host, &waiting, |_| None).is_empty());
    }
}
