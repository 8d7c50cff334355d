//! What people call a hypervisor: its libvirt URI, or its driver where only one has that.

use xman_common::protocol::{Code, Fault};

/// Returns which of the configured URIs a name means.
///
/// # Errors
/// `NotFound` where it means none, `Conflict` where it is the driver of several.
pub(super) fn named<'a>(
    uris: impl Iterator<Item = &'a str> + Clone,
    name: &str,
) -> Result<usize, Fault> {
    if let Some(index) = uris.clone().position(|uri| uri == name) {
        return Ok(index);
    }
    let mut driven = uris
        .clone()
        .enumerate()
        .filter(|(_, uri)| driver(uri) == name);
    match (driven.next(), driven.next()) {
        (Some((index, _)), None) => Ok(index),
        (Some((_, one)), Some((_, other))) => Err(Fault::new(
            Code::Conflict,
            format!(
                "several hypervisors of this host are '{name}', as {one} and {other}; choose one by its URI"
            ),
        )),
        (None, _) => Err(Fault::new(
            Code::NotFound,
            format!(
                "this host has no hypervisor '{name}'; it has {}, and a driver's name (as {}) does where it is the only one",
                uris.clone().collect::<Vec<_>>().join(", "),
                uris.clone().next().map_or("qemu", driver),
            ),
        )),
    }
}

/// Returns the driver of a libvirt URI: what stands before its transport.
pub(super) fn driver(uri: &str) -> &str {
    let scheme = uri.split_once(':').map_or(uri, |(scheme, _)| scheme);
    scheme.split_once('+').map_or(scheme, |(driver, _)| driver)
}

#[cfg(test)]
mod tests {
    use super::*;

    const URIS: [&str; 4] = [
        "qemu:///system",
        "lxc+unix:///system?socket=/x",
        "qemu+tls://other/system",
        "xen:///system",
    ];

    #[track_caller]
    fn check(name: &str, expected: Result<usize, Code>) {
        let found = named(URIS.into_iter(), name);
        assert_eq!(found.map_err(|fault| fault.code), expected, "{name}");
    }

    #[test]
    fn a_uri_means_itself_and_a_driver_the_only_one_it_has() {
        for (index, uri) in URIS.into_iter().enumerate() {
            check(uri, Ok(index));
        }
        check("lxc", Ok(1));
        check("xen", Ok(3));
        check("qemu", Err(Code::Conflict));
        for unknown in [
            "",
            "test",
            "LXC",
            "lxc+unix",
            "lxc:///system",
            "qem",
            "system",
        ] {
            check(unknown, Err(Code::NotFound));
        }
    }

    #[test]
    fn whoever_names_none_is_told_those_there_are() {
        let fault = named(URIS.into_iter(), "vz").unwrap_err();
        for uri in URIS {
            assert!(fault.message.contains(uri), "{fault}");
        }
        let fault = named(std::iter::empty(), "qemu").unwrap_err();
        assert_eq!(fault.code, Code::NotFound);
    }
}
