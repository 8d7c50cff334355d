//! Less CPU for a domain, so little that its guest lives and its batch daemon answers, and all that it had back.
//!
//! ```text
//! scheduler of the driver    what bounds a domain                          what takes precedence
//! posix   QEMU               cpu_shares, global_period and global_quota    vcpu_, emulator_, iothread_: bounds inside of the whole
//! posix   containers         cpu_shares, vcpu_period and vcpu_quota        -
//! credit, credit2   Xen      weight, cap                                   -
//! others                     nothing that could be verified
//! ```
//! With the kernel's first control groups a bound inside may not be wider than that of the whole, so on the way the whole has none.

use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use virt::{
    domain::{SchedBandwidth, SchedulerInfo},
    error::Error,
};
use virt_sys as sys;
use xman_common::protocol::{Code, Fault};

use super::{Seen, is_active};
use crate::hypervisor::{Hypervisors, Target, faults, verbs::Visit};

/// A starved domain keeps a twentieth: of its weight, so that it gets something while others want all, and of each of its virtual CPUs, so that it
/// takes no more when nobody does. That is what the original gave. Its guest is twenty times as slow, and answers: what a batch daemon
/// does for a heartbeat takes some milliseconds of CPU in a minute. It is by virtual CPU since the job in the guest goes on using all of them: by
/// a fixed sum the daemon's would get nearly nothing in a wide guest.
const TRICKLE: u64 = 20;
/// The kernel's own choice: the guest's CPUs stand still for less than that at a time.
const PERIOD_US: u64 = 100_000;
/// The least weight that libvirt takes with either kind of control groups.
const MIN_SHARES: u64 = 2;
/// From here on libvirt means that there is no bound, with the second kind of control groups.
const UNBOUNDED_US: i64 = 17_592_186_044_415;
/// How libvirt is told so with both.
const NO_BOUND: i64 = -1;

/// What a domain has of the host's CPUs, as its driver bounds it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) enum CpuShare {
    /// By the kernel's control groups.
    Groups(Groups),
    /// By Xen's own scheduler.
    #[serde(rename_all = "kebab-case")]
    Credit {
        /// Its weight against others.
        weight: u32,
        /// The most that it gets, in hundredths of one CPU; 0 is all.
        cap: u32,
    },
}

/// Bounds of a domain and inside of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Groups {
    /// Whether `whole` is told to libvirt as that of virtual CPUs, which all are in one group.
    container: bool,
    /// The weight against other groups.
    shares: u64,
    /// The bound of all together, where there is one; of others likewise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    whole: Option<Band>,
    /// That of each virtual CPU.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vcpu: Option<Band>,
    /// That of the emulator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    emulator: Option<Band>,
    /// That of the threads for input and output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    iothread: Option<Band>,
}

/// So much in each period, both in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub(crate) struct Band {
    quota: u64,
    period: u64,
}

impl Hypervisors {
    /// Whether a running domain can be starved, and what it has now.
    ///
    /// # Errors
    /// `Unsupported` with what to choose instead, `Conflict` where it is off.
    pub(crate) async fn can_starve(
        &self,
        target: Target,
        deadline: Instant,
    ) -> Result<CpuShare, Fault> {
        self.in_lane(target, deadline, |visit| {
            is_active(visit)?;
            share(visit)
        })
        .await
    }

    /// Leaves a domain a trickle of what it had.
    ///
    /// # Errors
    /// As [`Hypervisors::can_starve`], libvirt's, and `Refused` where libvirt shows another share afterwards.
    pub(crate) async fn starve(
        &self,
        target: Target,
        had: &CpuShare,
        deadline: Instant,
    ) -> Result<Seen, Fault> {
        let had = had.clone();
        self.share_out(target, deadline, move |vcpus| had.trickle(vcpus))
            .await
    }

    /// Gives a domain what it had.
    ///
    /// # Errors
    /// As [`Hypervisors::starve`].
    pub(crate) async fn feed(
        &self,
        target: Target,
        had: &CpuShare,
        deadline: Instant,
    ) -> Result<Seen, Fault> {
        let had = had.clone();
        self.share_out(target, deadline, move |_| had).await
    }

    async fn share_out(
        &self,
        target: Target,
        deadline: Instant,
        wanted: impl FnOnce(u32) -> CpuShare + Send + 'static,
    ) -> Result<Seen, Fault> {
        let seen = self
            .step(target, deadline, move |visit| {
                is_active(visit)?;
                let vcpus = visit.ok(visit.domain.info())?.nr_virt_cpu;
                give(visit, &wanted(vcpus))
            })
            .await?;
        Ok(seen.1)
    }
}

impl CpuShare {
    /// What is left of it to a starved domain with so many virtual CPUs; never more than it is.
    pub(crate) fn trickle(&self, vcpus: u32) -> Self {
        let vcpus = vcpus.max(1);
        match self {
            Self::Groups(had) => Self::Groups(had.trickle(vcpus)),
            Self::Credit { weight, cap } => {
                let trickle = vcpus.saturating_mul(5);
                Self::Credit {
                    weight: (weight / 20).max(1),
                    cap: if *cap == 0 {
                        trickle
                    } else {
                        trickle.min(*cap)
                    },
                }
            }
        }
    }

    /// How much of the host's CPUs it is at the most, in hundredths of one; absent where it is not bounded.
    #[cfg(test)]
    fn percent(&self) -> Option<u64> {
        match self {
            Self::Groups(groups) => groups
                .whole
                .map(|band| band.quota.saturating_mul(100) / band.period.max(1)),
            Self::Credit { cap, .. } => (*cap > 0).then_some(u64::from(*cap)),
        }
    }

    /// Makes sense of what a driver says of its scheduler; what it lacks otherwise.
    fn read(info: &SchedulerInfo) -> Result<Self, &'static str> {
        match info.scheduler_type.as_str() {
            "posix" => Groups::read(info)
                .map(Self::Groups)
                .ok_or("its control groups have no CPU controller"),
            "credit" | "credit2" => match (info.weight, info.cap) {
                (Some(weight), Some(cap)) => Ok(Self::Credit { weight, cap }),
                _ => Err("its scheduler has no weight and no cap"),
            },
            _ => Err("it has no scheduler that bounds a domain"),
        }
    }

    /// The calls, one after another, that lead from one share to another. Nothing where they are the same, or not of one kind.
    fn way(now: &Self, wanted: &Self) -> Vec<SchedulerInfo> {
        match (now, wanted) {
            (Self::Groups(now), Self::Groups(wanted)) => Groups::way(now, wanted),
            (Self::Credit { .. }, Self::Credit { weight, cap }) if now != wanted => {
                vec![SchedulerInfo {
                    weight: Some(*weight),
                    cap: Some(*cap),
                    ..SchedulerInfo::default()
                }]
            }
            (Self::Credit { .. } | Self::Groups(_), _) => Vec::new(),
        }
    }
}

impl Groups {
    fn read(info: &SchedulerInfo) -> Option<Self> {
        let shares = info.cpu_shares?;
        if info.global_bw.quota.is_none() {
            info.vcpu_bw.quota?;
            return Some(Self {
                container: true,
                shares,
                whole: Band::read(&info.vcpu_bw),
                vcpu: None,
                emulator: None,
                iothread: None,
            });
        }
        let whole = Band::read(&info.global_bw);
        // libvirt shows the bound of the whole for threads that are not there.
        let inside =
            |band: &SchedBandwidth| Band::read(band).filter(|inside| whole != Some(*inside));
        Some(Self {
            container: false,
            shares,
            whole,
            vcpu: inside(&info.vcpu_bw),
            emulator: inside(&info.emulator_bw),
            iothread: inside(&info.iothread_bw),
        })
    }

    fn trickle(&self, vcpus: u32) -> Self {
        let trickle = Band {
            quota: u64::from(vcpus).saturating_mul(PERIOD_US / TRICKLE),
            period: PERIOD_US,
        };
        let whole = self
            .whole
            .filter(|had| had.is_within(trickle))
            .unwrap_or(trickle);
        let inside = |band: Option<Band>| band.filter(|band| band.is_within(whole));
        Self {
            container: self.container,
            shares: (self.shares / TRICKLE).max(MIN_SHARES).min(self.shares),
            whole: Some(whole),
            vcpu: inside(self.vcpu),
            emulator: inside(self.emulator),
            iothread: inside(self.iothread),
        }
    }

    fn way(now: &Self, wanted: &Self) -> Vec<SchedulerInfo> {
        let mut way = Vec::new();
        let mut whole = now.whole;
        let insides_differ = now.inside() != wanted.inside();
        // A period and its quota are set one after the other, and what is in between has to be allowed too.
        let periods_differ = match (now.whole, wanted.whole) {
            (Some(now), Some(wanted)) => now.period != wanted.period,
            (None, _) | (_, None) => false,
        };
        if whole.is_some() && (insides_differ || periods_differ) {
            whole = None;
            way.push(wanted.told(Band::told(None), None));
        }
        if insides_differ {
            let differs = |now: Option<Band>, wanted: Option<Band>| {
                if now == wanted {
                    SchedBandwidth::default()
                } else {
                    Band::told(wanted)
                }
            };
            way.push(SchedulerInfo {
                vcpu_bw: differs(now.vcpu, wanted.vcpu),
                emulator_bw: differs(now.emulator, wanted.emulator),
                iothread_bw: differs(now.iothread, wanted.iothread),
                ..SchedulerInfo::default()
            });
        }
        let shares = (now.shares != wanted.shares).then_some(wanted.shares);
        if whole != wanted.whole {
            way.push(wanted.told(Band::told(wanted.whole), shares));
        } else if shares.is_some() {
            way.push(wanted.told(SchedBandwidth::default(), shares));
        }
        way
    }

    fn inside(&self) -> [Option<Band>; 3] {
        [self.vcpu, self.emulator, self.iothread]
    }

    fn told(&self, whole: SchedBandwidth, cpu_shares: Option<u64>) -> SchedulerInfo {
        let mut info = SchedulerInfo {
            cpu_shares,
            ..SchedulerInfo::default()
        };
        if self.container {
            info.vcpu_bw = whole;
        } else {
            info.global_bw = whole;
        }
        info
    }
}

impl Band {
    fn read(said: &SchedBandwidth) -> Option<Self> {
        let quota = said.quota.filter(|quota| *quota < UNBOUNDED_US)?;
        let (quota, period) = (u64::try_from(quota).ok()?, said.period?);
        (quota > 0 && period > 0).then_some(Self { quota, period })
    }

    fn told(band: Option<Self>) -> SchedBandwidth {
        match band {
            None => SchedBandwidth {
                period: None,
                quota: Some(NO_BOUND),
            },
            Some(Self { quota, period }) => SchedBandwidth {
                period: Some(period),
                quota: Some(i64::try_from(quota).unwrap_or(NO_BOUND)),
            },
        }
    }

    fn is_within(self, other: Self) -> bool {
        u128::from(self.quota) * u128::from(other.period)
            <= u128::from(other.quota) * u128::from(self.period)
    }
}

/// What an active domain has now.
pub(super) fn share(visit: &Visit<'_>) -> Result<CpuShare, Fault> {
    let live = sys::VIR_DOMAIN_AFFECT_LIVE;
    let said = visit.domain.scheduler_type().and_then(|(kind, _)| {
        if bounds(&kind) {
            visit.domain.scheduler_parameters_flags(live)
        } else {
            Ok(SchedulerInfo {
                scheduler_type: kind,
                ..SchedulerInfo::default()
            })
        }
    });
    match said {
        Ok(info) => CpuShare::read(&info).map_err(|lack| cannot(visit, lack)),
        Err(error) if is_lack(&error) => Err(cannot(visit, &faults::tidy(error.message()))),
        Err(error) => Err(visit.call.fault(&error)),
    }
}

/// Whether a scheduler's figures bound a domain. Others are not even asked for them: libvirt's test driver has a weight, and does nothing by it.
fn bounds(scheduler: &str) -> bool {
    matches!(scheduler, "posix" | "credit" | "credit2")
}

/// libvirt's words for it differ: no such call, none in a session, and that its host's control groups lack the controller.
fn is_lack(error: &Error) -> bool {
    matches!(
        error.code().to_raw(),
        sys::VIR_ERR_NO_SUPPORT
            | sys::VIR_ERR_OPERATION_UNSUPPORTED
            | sys::VIR_ERR_CONFIG_UNSUPPORTED
            | sys::VIR_ERR_ARGUMENT_UNSUPPORTED
    ) || error.message().contains("controller")
        || error.message().contains("cgroup")
        || error.message().contains("nparams")
}

fn cannot(visit: &Visit<'_>, lack: &str) -> Fault {
    Fault::new(
        Code::Unsupported,
        format!(
            "'{}' cannot be starved: {} does not bound the CPU time of its domains ({lack}); choose `preempt = \"pause\"` or \"freeze\" for its class, \
             or give libvirt the CPU controller (`cgroup_controllers` in qemu.conf)",
            visit.facts.name, visit.host.uri
        ),
    )
}

/// Leads a domain to a share, and believes it when libvirt shows it.
fn give(visit: &Visit<'_>, wanted: &CpuShare) -> Result<(), Fault> {
    let now = share(visit)?;
    if now == *wanted {
        return Ok(());
    }
    visit.call.begin()?;
    for told in CpuShare::way(&now, wanted) {
        let live = sys::VIR_DOMAIN_AFFECT_LIVE;
        visit.ok(visit.domain.set_scheduler_parameters_flags(&told, live))?;
    }
    let seen = share(visit)?;
    if seen == *wanted {
        return Ok(());
    }
    Err(Fault {
        retry: true,
        ..Fault::new(
            Code::Refused,
            format!(
                "libvirt took another share of the CPUs for '{}' and shows {seen:?} instead of {wanted:?}",
                visit.facts.name
            ),
        )
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The kernel's first control groups, and the word of libvirt on them: each figure is set as it is told, in libvirt's order.
    #[derive(Clone, Debug)]
    struct Kernel {
        shares: u64,
        whole: (u64, i64),
        inside: [(u64, i64); 3],
    }

    impl Kernel {
        fn ratio((period, quota): (u64, i64)) -> f64 {
            if quota < 0 {
                f64::INFINITY
            } else {
                quota as f64 / period as f64
            }
        }

        fn is_valid(&self) -> bool {
            self.inside
                .iter()
                .all(|inside| inside.1 < 0 || Self::ratio(*inside) <= Self::ratio(self.whole))
        }

        /// # Errors
        /// What the kernel does not take.
        fn tell(&mut self, told: &SchedulerInfo) -> Result<(), String> {
            self.shares = told.cpu_shares.unwrap_or(self.shares);
            let bands = [
                &told.vcpu_bw,
                &told.emulator_bw,
                &told.global_bw,
                &told.iothread_bw,
            ];
            for (at, band) in bands.into_iter().enumerate() {
                for (period, quota) in [(band.period, None), (None, band.quota)] {
                    let mut next = self.clone();
                    let place = match at {
                        2 => &mut next.whole,
                        3 => &mut next.inside[2],
                        inside => &mut next.inside[inside],
                    };
                    place.0 = period.unwrap_or(place.0);
                    place.1 = quota.unwrap_or(place.1);
                    let is_odd =
                        !(1_000..=1_000_000).contains(&place.0) || (0..1_000).contains(&place.1);
                    if is_odd || !next.is_valid() || next.shares < 2 {
                        return Err(format!("{self:?} then {told:?}"));
                    }
                    *self = next;
                }
            }
            Ok(())
        }

        fn says(&self) -> SchedulerInfo {
            let band = |(period, quota): (u64, i64)| SchedBandwidth {
                period: Some(period),
                quota: Some(quota),
            };
            SchedulerInfo {
                scheduler_type: "posix".to_owned(),
                cpu_shares: Some(self.shares),
                vcpu_bw: band(self.inside[0]),
                emulator_bw: band(self.inside[1]),
                iothread_bw: band(self.inside[2]),
                global_bw: band(self.whole),
                ..SchedulerInfo::default()
            }
        }

        fn share(&self) -> CpuShare {
            CpuShare::read(&self.says()).unwrap()
        }

        fn lead(&mut self, wanted: &CpuShare) {
            for told in CpuShare::way(&self.share(), wanted) {
                self.tell(&told).unwrap();
            }
        }
    }

    fn band() -> impl Strategy<Value = (u64, i64)> {
        (
            1_000..=1_000_000_u64,
            prop_oneof![Just(-1_i64), 1_000..=4_000_000_i64],
        )
    }

    fn kernel() -> impl Strategy<Value = Kernel> {
        (2..=262_144_u64, band(), [band(), band(), band()])
            .prop_map(|(shares, whole, inside)| Kernel {
                shares,
                whole,
                inside,
            })
            .prop_filter("a state that the kernel took", Kernel::is_valid)
    }

    proptest! {
        #[test]
        fn a_starved_domain_gets_back_exactly_what_it_had_and_the_kernel_takes_each_step(
            mut kernel in kernel(),
            vcpus in 1..=64_u32,
        ) {
            let had = kernel.share();
            let trickle = had.trickle(vcpus);
            kernel.lead(&trickle);
            prop_assert_eq!(kernel.share(), trickle.clone());
            prop_assert!(CpuShare::way(&kernel.share(), &trickle).is_empty(), "starving again is nothing");
            let most = u64::from(vcpus) * 100 / TRICKLE;
            prop_assert!(trickle.percent().unwrap() <= most);
            prop_assert!(had.percent().is_none_or(|had| trickle.percent().unwrap() <= had));
            kernel.lead(&had);
            prop_assert_eq!(kernel.share(), had);
        }

        #[test]
        fn from_anywhere_on_the_way_both_ends_are_reached(
            mut kernel in kernel(),
            vcpus in 1..=64_u32,
            steps in 0..3_usize,
            back in any::<bool>(),
        ) {
            let had = kernel.share();
            let trickle = had.trickle(vcpus);
            if back {
                kernel.lead(&trickle);
            }
            let way = CpuShare::way(&kernel.share(), if back { &had } else { &trickle });
            for told in way.iter().take(steps) {
                kernel.tell(told).unwrap();
            }
            let mut other = kernel.clone();
            kernel.lead(&had);
            prop_assert_eq!(kernel.share(), had);
            other.lead(&trickle);
            prop_assert_eq!(other.share(), trickle);
        }
    }

    fn credit(weight: u32, cap: u32) -> CpuShare {
        CpuShare::Credit { weight, cap }
    }

    #[test]
    fn a_trickle_is_a_twentieth_and_never_more_than_there_was() {
        assert_eq!(credit(256, 0).trickle(1), credit(12, 5));
        assert_eq!(credit(256, 0).trickle(4), credit(12, 20));
        assert_eq!(credit(1, 3).trickle(4), credit(1, 3));
        let had = Kernel {
            shares: 1024,
            whole: (100_000, -1),
            inside: [(100_000, -1); 3],
        };
        let CpuShare::Groups(had) = had.share() else {
            panic!("control groups");
        };
        assert_eq!(had.whole, None);
        let trickle = had.trickle(2);
        assert_eq!(trickle.shares, 51);
        assert_eq!(
            trickle.whole,
            Some(Band {
                quota: 10_000,
                period: 100_000
            })
        );
        assert_eq!(trickle.inside(), [None; 3]);
        assert_eq!(CpuShare::Groups(trickle).percent(), Some(10));
    }

    #[test]
    fn what_a_scheduler_says_is_understood_or_not_believed() {
        let info = |scheduler_type: &str| SchedulerInfo {
            scheduler_type: scheduler_type.to_owned(),
            weight: Some(256),
            cap: Some(0),
            ..SchedulerInfo::default()
        };
        assert_eq!(CpuShare::read(&info("credit")), Ok(credit(256, 0)));
        assert_eq!(CpuShare::read(&info("credit2")), Ok(credit(256, 0)));
        for other in ["posix", "fair", "sedf", "allocation", ""] {
            assert!(CpuShare::read(&info(other)).is_err(), "{other}");
        }
        let container = SchedulerInfo {
            scheduler_type: "posix".to_owned(),
            cpu_shares: Some(1024),
            vcpu_bw: SchedBandwidth {
                period: Some(100_000),
                quota: Some(50_000),
            },
            ..SchedulerInfo::default()
        };
        let had = CpuShare::read(&container).unwrap();
        assert_eq!(had.percent(), Some(50));
        let way = CpuShare::way(&had, &had.trickle(1));
        assert_eq!(way.len(), 1);
        let told = &way[0];
        assert_eq!(
            (told.vcpu_bw.quota, told.vcpu_bw.period),
            (Some(5_000), Some(100_000))
        );
        assert_eq!((told.global_bw.quota, told.cpu_shares), (None, Some(51)));
        let bound = |quota| {
            Band::read(&SchedBandwidth {
                period: Some(100_000),
                quota: Some(quota),
            })
        };
        assert_eq!(
            (bound(-1), bound(0), bound(UNBOUNDED_US)),
            (None, None, None)
        );
        assert!(bound(1_000).is_some());
    }
}
