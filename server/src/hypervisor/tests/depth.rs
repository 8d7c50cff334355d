//! What the schedule does to a domain, on libvirt's own test driver.

use tokio::sync::watch;

use super::*;

fn unseen() -> watch::Sender<Option<xman_common::protocol::Progress>> {
    watch::Sender::new(None)
}

#[tokio::test]
async fn a_domain_is_halted_and_runs_on_and_to_do_so_again_is_nothing() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    let before = host.seen(web(), soon()).await.unwrap();
    assert_eq!(before.state, DomainState::Running);
    for _ in 0..2 {
        let seen = host.halt(web(), soon()).await.unwrap();
        assert_eq!((seen.state, seen.reason), (DomainState::Paused, "user"));
        assert_eq!(seen.life, before.life);
    }
    for _ in 0..2 {
        let seen = host.run_on(web(), soon()).await.unwrap();
        assert_eq!((seen.state, seen.life), (DomainState::Running, before.life));
    }
    host.destroy(web(), soon()).await.unwrap();
    assert_eq!(code(host.halt(web(), soon()).await), Code::Conflict);
    assert_eq!(code(host.run_on(web(), soon()).await), Code::Conflict);
    let off = host.seen(web(), soon()).await.unwrap();
    assert_eq!(
        (off.state, off.life, off.cpu),
        (DomainState::Off, None, None)
    );
    host.start_domain(web(), false, soon()).await.unwrap();
    let again = host.seen(web(), soon()).await.unwrap();
    assert!(again.life.is_some() && again.life != before.life);
}

#[tokio::test]
async fn where_nothing_bounds_a_domain_it_is_said_before_anything_is_begun_what_to_choose() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    assert_eq!(host.seen(web(), soon()).await.unwrap().cpu, None);
    let some = CpuShare::Credit {
        weight: 256,
        cap: 0,
    };
    for refused in [
        host.can_starve(web(), soon()).await.map(drop),
        host.starve(web(), &some, soon()).await.map(drop),
        host.feed(web(), &some, soon()).await.map(drop),
    ] {
        let fault = refused.unwrap_err();
        assert_eq!(fault.code, Code::Unsupported, "{fault}");
        assert!(fault.message.contains("preempt = \"pause\""), "{fault}");
    }
    host.destroy(web(), soon()).await.unwrap();
    assert_eq!(code(host.can_starve(web(), soon()).await), Code::Conflict);
}

#[tokio::test]
async fn memory_is_given_and_taken_back_and_its_way_is_told() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    let before = host.can_shrink(web(), soon()).await.unwrap();
    assert_eq!((before.memory_kib, before.max_memory_kib), (32_768, 65_536));
    for _ in 0..2 {
        let seen = host.shrink(web(), 16_384, soon()).await.unwrap();
        assert_eq!(seen.memory_kib, 16_384);
    }
    let larger = host.shrink(web(), 20_000, soon()).await.unwrap();
    assert_eq!(larger.memory_kib, 16_384, "shrinking gives nothing");
    let reached = host.balloon(&web(), 16_384, soon()).await;
    assert_eq!(reached, Ok(Balloon::Reached(16_384)));
    let smaller = host.grow(web(), 8_192, soon()).await.unwrap();
    assert_eq!(smaller.memory_kib, 16_384, "growing takes nothing");
    let seen = host.grow(web(), u64::MAX, soon()).await.unwrap();
    assert_eq!(seen.memory_kib, 65_536, "as much as it can have");
    let shortly = Instant::now() + Duration::from_millis(300);
    let moving = host.balloon(&web(), 16_384, shortly).await;
    assert_eq!(moving, Ok(Balloon::Moving(65_536)));
    host.halt(web(), soon()).await.unwrap();
    let still = host.balloon(&web(), 16_384, soon()).await;
    assert_eq!(still, Ok(Balloon::Still(65_536)), "at once: it is paused");
    assert_eq!(code(host.shrink(web(), 64, soon()).await), Code::BadRequest);
    let watched = world.target("web");
    world.behind("web", Domain::destroy).await;
    world
        .until(|world| world.state("web") == Some(DomainState::Off))
        .await;
    assert_eq!(
        code(host.balloon(&watched, 16_384, soon()).await),
        Code::Conflict
    );
    assert_eq!(
        code(host.shrink(web(), 16_384, soon()).await),
        Code::Conflict
    );
}

#[tokio::test]
async fn a_domain_is_frozen_and_thawed_halted_and_to_do_so_again_is_nothing() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    let needed = host.can_freeze(web(), soon()).await.unwrap();
    assert!(needed > 32_768 * 1024, "its memory and more: {needed}");
    for _ in 0..2 {
        let seen = host.freeze(web(), unseen()).await.unwrap();
        assert!(seen.is_frozen() && seen.life.is_none(), "{seen:?}");
    }
    assert_eq!(host.can_freeze(web(), soon()).await, Ok(0));
    assert_eq!(code(host.run_on(web(), soon()).await), Code::Conflict);
    for _ in 0..2 {
        let seen = host.thaw(web(), soon()).await.unwrap();
        assert_eq!((seen.state, seen.saved), (DomainState::Paused, false));
    }
    let seen = host.run_on(web(), soon()).await.unwrap();
    assert_eq!(seen.state, DomainState::Running);
    host.halt(web(), soon()).await.unwrap();
    assert!(host.freeze(web(), unseen()).await.unwrap().is_frozen());
    host.discard_saved(web(), soon()).await.unwrap();
    assert_eq!(code(host.thaw(web(), soon()).await), Code::Conflict);
    assert_eq!(code(host.can_freeze(web(), soon()).await), Code::Conflict);
    assert_eq!(code(host.freeze(web(), unseen()).await), Code::Conflict);
}

#[tokio::test]
async fn what_has_no_definition_or_is_held_by_a_judge_is_not_frozen() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    world.behind("web", Domain::undefine).await;
    let fault = host.can_freeze(web(), soon()).await.unwrap_err();
    assert!(
        fault.code == Code::Conflict && fault.message.contains("no definition"),
        "{fault}"
    );
    assert_eq!(code(host.freeze(web(), unseen()).await), Code::Conflict);
    assert_eq!(world.state("web"), Some(DomainState::Running));
    let stranger = Target {
        judge: Arc::new(|_| denied()),
        ..world.target("db")
    };
    world.behind("db", Domain::suspend).await;
    for refused in [
        host.seen(stranger.clone(), soon()).await,
        host.halt(stranger.clone(), soon()).await,
        host.run_on(stranger.clone(), soon()).await,
        host.shrink(stranger.clone(), 16_384, soon()).await,
        host.freeze(stranger.clone(), unseen()).await,
        host.thaw(stranger.clone(), soon()).await,
    ] {
        assert_eq!(code(refused), Code::Denied);
    }
}

#[tokio::test]
async fn a_guest_without_an_agent_keeps_its_clock_and_that_is_no_failure() {
    let world = World::new().await;
    let (host, web) = (&world.hypervisors, || world.target("web"));
    assert_eq!(host.set_clock(web()).await, Clock::NoAgent);
    host.destroy(web(), soon()).await.unwrap();
    assert_eq!(host.set_clock(web()).await, Clock::NoAgent);
}
