//! What makes sense to do to a domain, and how libvirt is to be told: decided here, carried out in verbs.rs.

use virt_sys as sys;
use xman_common::{
    name::DomainName,
    protocol::{Code, DomainState, Fault, MemSet, VcpuSet},
};

/// The least memory a domain may be given, in KiB: with less every guest dies.
const MIN_MEMORY_KIB: u64 = 4 * 1024;

/// What can be done to a domain, as far as its state decides whether it makes sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Act {
    Start,
    Restore,
    Save,
    Rename,
    Destroy,
    Pause,
    Unpause,
    Shutdown,
    Reboot,
    Reset,
    Undefine,
    Migrate,
    Console,
}

/// Refuses what makes no sense in a state. What libvirt may know better is left to it.
pub(super) fn sense(act: Act, name: &DomainName, state: DomainState) -> Result<(), Fault> {
    use DomainState::{Blocked, Crashed, Off, Paused, Running, ShuttingDown, Sleeping, Unknown};
    let message = match (act, state) {
        (_, Unknown) => return Ok(()),
        (Act::Start | Act::Restore, Running | Blocked) => format!("'{name}' is running already"),
        (Act::Start | Act::Restore, Paused) => {
            format!("'{name}' is running already, and paused; `rxm unpause {name}` lets it run on")
        }
        (Act::Start | Act::Restore, ShuttingDown) => {
            format!("'{name}' is still going down; start it when it is off")
        }
        (Act::Start | Act::Restore, Sleeping) => {
            format!("'{name}' is running already; its guest sleeps, and wakes by itself")
        }
        (Act::Start | Act::Restore, Off | Crashed) => return Ok(()),
        (Act::Save, Off | Crashed) => {
            format!("'{name}' is off: it has no memory to save")
        }
        (Act::Save, ShuttingDown) => {
            format!("'{name}' is going down; there is no going on from that")
        }
        (Act::Save, Running | Blocked | Paused | Sleeping) => return Ok(()),
        (Act::Rename, Off | Crashed) => return Ok(()),
        (Act::Rename, _) => format!(
            "'{name}' is running, and only what is off gets another name; `rxm shutdown {name}` first"
        ),
        (Act::Destroy, Off) => format!("'{name}' is off already"),
        (Act::Destroy, _) => return Ok(()),
        (Act::Pause, Paused) => format!("'{name}' is paused already"),
        (Act::Pause, Off | Crashed) => {
            format!("'{name}' is off; `rxm start --paused {name}` starts it paused")
        }
        (Act::Pause, Sleeping) => format!("'{name}' uses no CPU: its guest sleeps"),
        (Act::Pause, Running | Blocked | ShuttingDown) => return Ok(()),
        (Act::Unpause, Paused) => return Ok(()),
        (Act::Unpause, Running | Blocked | ShuttingDown) => format!("'{name}' is not paused"),
        (Act::Unpause, Off | Crashed) => format!("'{name}' is off; `rxm start {name}` starts it"),
        (Act::Unpause, Sleeping) => {
            format!("'{name}' is not paused: its guest sleeps, and wakes by itself")
        }
        (Act::Shutdown, Off | Crashed) => format!("'{name}' is off already"),
        (Act::Shutdown | Act::Reboot, Paused) => format!(
            "'{name}' is paused, and its guest hears nothing; `rxm unpause {name}` first, or use `--force`"
        ),
        (Act::Shutdown | Act::Reboot, Sleeping) => {
            format!(
                "the guest of '{name}' sleeps, and hears nothing; wake it first, or use `--force`"
            )
        }
        (Act::Shutdown, Running | Blocked | ShuttingDown) => return Ok(()),
        (Act::Reboot | Act::Reset, Off | Crashed) => {
            format!("'{name}' is off; `rxm start {name}` starts it")
        }
        (Act::Reboot | Act::Reset, _) => return Ok(()),
        (Act::Undefine, Off | Crashed) => return Ok(()),
        (Act::Undefine, _) => {
            format!("'{name}' is running; `rxm shutdown {name}` or `rxm destroy {name}` first")
        }
        (Act::Console, Off | Crashed) => {
            format!("'{name}' is off, and so has no console; `rxm start {name}` starts it")
        }
        (Act::Console, _) => return Ok(()),
        (Act::Migrate, Running | Blocked | Paused) => return Ok(()),
        (Act::Migrate, _) => {
            format!("'{name}' is {state}; only a running domain can be moved alive")
        }
    };
    Err(conflict(message))
}

/// What decides how sizes are set.
pub(super) struct Sizes<'a> {
    pub(super) name: &'a DomainName,
    pub(super) active: bool,
    pub(super) persistent: bool,
    pub(super) max_memory_kib: u64,
    pub(super) max_vcpus: u32,
}

/// libvirt's flags for what is asked, or why it makes no sense.
pub(super) fn memory_flags(
    set: &MemSet,
    sizes: &Sizes<'_>,
) -> Result<sys::virDomainMemoryModFlags, Fault> {
    let (name, maximum) = (sizes.name, sizes.max_memory_kib);
    if set.kib < MIN_MEMORY_KIB {
        return Err(Fault::new(
            Code::BadRequest,
            format!(
                "no guest lives with {}; give it at least {}",
                in_words(set.kib),
                in_words(MIN_MEMORY_KIB)
            ),
        ));
    }
    let affect = affects(set.config, set.maximum, sizes, "mem-set")?;
    if set.maximum {
        return Ok(affect | sys::VIR_DOMAIN_MEM_MAXIMUM);
    }
    if set.kib > maximum {
        return Err(conflict(format!(
            "'{name}' can have at most {}; `rxm mem-set --max` raises that{}",
            in_words(maximum),
            if sizes.active {
                " for the next start"
            } else {
                ""
            }
        )));
    }
    Ok(affect)
}

/// A size as people write it.
pub(super) fn in_words(kib: u64) -> String {
    if kib.is_multiple_of(1024) {
        format!("{} MiB", kib / 1024)
    } else {
        format!("{kib} KiB")
    }
}

/// libvirt's flags for what is asked, or why it makes no sense.
pub(super) fn vcpu_flags(
    set: &VcpuSet,
    sizes: &Sizes<'_>,
) -> Result<sys::virDomainVcpuFlags, Fault> {
    let (name, maximum) = (sizes.name, sizes.max_vcpus);
    if set.count == 0 {
        return Err(Fault::new(
            Code::BadRequest,
            "a domain cannot have no virtual CPU",
        ));
    }
    let affect = affects(set.config, set.maximum, sizes, "vcpu-set")?;
    if set.maximum {
        return Ok(affect | sys::VIR_DOMAIN_VCPU_MAXIMUM);
    }
    if set.count > maximum {
        return Err(conflict(format!(
            "'{name}' can have at most {maximum} virtual CPUs; `rxm vcpu-set --max` raises that{}",
            if sizes.active {
                " for the next start"
            } else {
                ""
            }
        )));
    }
    Ok(affect)
}

/// Whether a size is set in what runs, in the definition, or in both. A maximum is only ever set in the definition.
fn affects(config: bool, maximum: bool, sizes: &Sizes<'_>, verb: &str) -> Result<u32, Fault> {
    let name = sizes.name;
    if (config || maximum) && !sizes.persistent {
        return Err(conflict(format!(
            "'{name}' has no definition: it ends when it is off; leave out --config and --max"
        )));
    }
    if !sizes.active && !config && !maximum {
        return Err(conflict(format!(
            "'{name}' is off; `rxm {verb} --config` sets it in the definition"
        )));
    }
    let live = if sizes.active && !maximum {
        sys::VIR_DOMAIN_AFFECT_LIVE
    } else {
        0
    };
    Ok(live
        | if config || maximum {
            sys::VIR_DOMAIN_AFFECT_CONFIG
        } else {
            0
        })
}

/// Something stands against it.
pub(super) fn conflict(message: String) -> Fault {
    Fault::new(Code::Conflict, message)
}

#[cfg(test)]
mod tests {
    use xman_common::name::DomainRef;

    use super::*;

    fn name() -> DomainName {
        "web".parse().unwrap()
    }

    #[test]
    fn what_makes_no_sense_is_a_conflict_that_says_what_does() {
        use DomainState::{Crashed, Off, Paused, Running, ShuttingDown, Sleeping, Unknown};
        for (act, allowed, refused) in [
            (
                Act::Start,
                &[Off, Crashed][..],
                &[Running, Paused, ShuttingDown, Sleeping][..],
            ),
            (
                Act::Save,
                &[Running, Paused, Sleeping],
                &[Off, Crashed, ShuttingDown],
            ),
            (
                Act::Restore,
                &[Off, Crashed],
                &[Running, Paused, ShuttingDown, Sleeping],
            ),
            (
                Act::Rename,
                &[Off, Crashed],
                &[Running, Paused, ShuttingDown, Sleeping],
            ),
            (
                Act::Destroy,
                &[Running, Paused, Crashed, ShuttingDown, Sleeping],
                &[Off],
            ),
            (
                Act::Pause,
                &[Running, ShuttingDown],
                &[Paused, Off, Crashed, Sleeping],
            ),
            (Act::Unpause, &[Paused], &[Running, Off, Sleeping]),
            (
                Act::Shutdown,
                &[Running, ShuttingDown],
                &[Off, Crashed, Paused, Sleeping],
            ),
            (Act::Reboot, &[Running], &[Off, Paused, Sleeping]),
            (Act::Reset, &[Running, Paused, Sleeping], &[Off, Crashed]),
            (Act::Undefine, &[Off, Crashed], &[Running, Paused, Sleeping]),
            (
                Act::Console,
                &[Running, Paused, ShuttingDown],
                &[Off, Crashed],
            ),
            (
                Act::Migrate,
                &[Running, Paused],
                &[Off, Crashed, ShuttingDown, Sleeping],
            ),
        ] {
            for state in allowed.iter().chain(&[Unknown]) {
                assert!(sense(act, &name(), *state).is_ok(), "{act:?} {state}");
            }
            for state in refused {
                let fault = sense(act, &name(), *state).unwrap_err();
                assert!(
                    fault.code == Code::Conflict && fault.message.contains("web"),
                    "{act:?} {state}: {fault}"
                );
            }
        }
    }

    fn memory(
        kib: u64,
        config: bool,
        maximum: bool,
        active: bool,
        persistent: bool,
    ) -> Result<u32, Code> {
        let name = name();
        let sizes = Sizes {
            name: &name,
            active,
            persistent,
            max_memory_kib: 65_536,
            max_vcpus: 4,
        };
        let set = MemSet {
            domain: DomainRef::Name(name.clone()),
            kib,
            config,
            maximum,
        };
        memory_flags(&set, &sizes).map_err(|fault| fault.code)
    }

    #[test]
    fn memory_is_set_where_it_was_asked_for_and_within_its_bounds() {
        let (live, config, maximum) = (
            sys::VIR_DOMAIN_AFFECT_LIVE,
            sys::VIR_DOMAIN_AFFECT_CONFIG,
            sys::VIR_DOMAIN_MEM_MAXIMUM,
        );
        for (kib, to_config, to_maximum, active, persistent, expected) in [
            (32_768, false, false, true, true, Ok(live)),
            (32_768, true, false, true, true, Ok(live | config)),
            (32_768, true, false, false, true, Ok(config)),
            (32_768, false, false, false, true, Err(Code::Conflict)),
            (32_768, true, false, true, false, Err(Code::Conflict)),
            (99_999, false, false, true, true, Err(Code::Conflict)),
            (99_999, false, true, true, true, Ok(config | maximum)),
            (99_999, false, true, false, true, Ok(config | maximum)),
            (99_999, false, true, true, false, Err(Code::Conflict)),
            (64, false, false, true, true, Err(Code::BadRequest)),
        ] {
            assert_eq!(
                memory(kib, to_config, to_maximum, active, persistent),
                expected,
                "{kib} {to_config} {to_maximum}"
            );
        }
    }

    #[test]
    fn vcpus_are_set_where_it_was_asked_for_and_within_their_bounds() {
        let name = name();
        let sizes = |active| Sizes {
            name: &name,
            active,
            persistent: true,
            max_memory_kib: 0,
            max_vcpus: 4,
        };
        let set = |count, config, maximum| VcpuSet {
            domain: DomainRef::Name(name.clone()),
            count,
            config,
            maximum,
        };
        let (live, config) = (sys::VIR_DOMAIN_AFFECT_LIVE, sys::VIR_DOMAIN_AFFECT_CONFIG);
        assert_eq!(vcpu_flags(&set(4, false, false), &sizes(true)), Ok(live));
        assert_eq!(
            vcpu_flags(&set(2, true, false), &sizes(true)),
            Ok(live | config)
        );
        assert_eq!(
            vcpu_flags(&set(8, false, true), &sizes(true)),
            Ok(config | sys::VIR_DOMAIN_VCPU_MAXIMUM)
        );
        let fault = vcpu_flags(&set(5, false, false), &sizes(true)).unwrap_err();
        assert!(
            fault.code == Code::Conflict && fault.message.contains("at most 4"),
            "{fault}"
        );
        assert_eq!(
            vcpu_flags(&set(2, false, false), &sizes(false))
                .unwrap_err()
                .code,
            Code::Conflict
        );
        assert_eq!(
            vcpu_flags(&set(0, false, false), &sizes(true))
                .unwrap_err()
                .code,
            Code::BadRequest
        );
    }
}
