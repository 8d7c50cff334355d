//! Which domain is meant, where several hypervisors of this host have one of that name or UUID.
//!
//! ```text
//! candidates (memory) --> those that the caller may see --> none | one | several: a conflict that names them
//!       '--> only one: that one, seen or not, and the verdict on it decides
//! ```
//! Nothing that the caller may not see takes part: for whoever sees one of two, there is one.

use xman_common::{
    name::DomainRef,
    protocol::{Code, Fault},
};

use crate::{Host, caller::Caller, hypervisor::Facts};

/// What a name or a UUID means to a caller.
pub(crate) enum Meant {
    /// No domain, or several of which the caller may see none.
    Nothing,
    /// One; whether the caller may see it is not said.
    One(Facts),
    /// Several that the caller may all see, on as many hypervisors.
    Several(Vec<Facts>),
}

impl Meant {
    /// Decides among the domains of one name or UUID.
    fn among(mut candidates: Vec<Facts>, sees: impl Fn(&Facts) -> bool) -> Self {
        if candidates.len() > 1 {
            candidates.retain(sees);
        }
        match (candidates.pop(), candidates.is_empty()) {
            (None, _) => Self::Nothing,
            (Some(one), true) => Self::One(one),
            (Some(last), false) => {
                candidates.push(last);
                Self::Several(candidates)
            }
        }
    }
}

impl Host {
    /// Returns which of the domains of one name or UUID a caller means.
    pub(crate) fn meant(&self, caller: &Caller, candidates: Vec<Facts>) -> Meant {
        Meant::among(candidates, |facts| self.sees(caller, facts))
    }
}

/// The fault for a name or UUID that means several domains, all of which the caller may see.
pub(crate) fn ambiguous(domain: &DomainRef, several: &[Facts]) -> Fault {
    let uris: Vec<&str> = several.iter().map(|facts| &*facts.uri).collect();
    let choice = match domain {
        DomainRef::Name(_) => "`--hypervisor` chooses one of them, or say its UUID",
        DomainRef::Uuid(_) => "`--hypervisor` chooses one of them",
    };
    Fault::new(
        Code::Conflict,
        format!(
            "{} hypervisors of this host have a domain '{domain}': {}; {choice}",
            uris.len(),
            uris.join(", ")
        ),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use uuid::Uuid;
    use xman_common::protocol::{DomainState, Metadata};

    use super::*;

    fn facts(hypervisor: usize) -> Facts {
        Facts {
            uuid: Uuid::from_u128(1 + hypervisor as u128),
            name: "web".parse().unwrap(),
            hypervisor,
            uri: format!("driver{hypervisor}:///").into(),
            state: DomainState::Running,
            metadata: Arc::new(Ok(Metadata::default())),
            lease: None,
            revision: 1,
            stale: false,
        }
    }

    #[track_caller]
    fn check(there: &[usize], seen: &[usize], expected: &[usize]) {
        let candidates = there.iter().map(|hypervisor| facts(*hypervisor)).collect();
        let meant = match Meant::among(candidates, |facts| seen.contains(&facts.hypervisor)) {
            Meant::Nothing => vec![],
            Meant::One(one) => vec![one.hypervisor],
            Meant::Several(several) => several.iter().map(|facts| facts.hypervisor).collect(),
        };
        assert_eq!(meant, expected, "{there:?}, of which {seen:?} are seen");
    }

    #[test]
    fn only_what_is_seen_can_make_a_name_mean_several() {
        check(&[], &[], &[]);
        check(&[0], &[0], &[0]);
        check(&[1], &[], &[1]);
        check(&[0, 1], &[0, 1], &[0, 1]);
        check(&[0, 1], &[0], &[0]);
        check(&[0, 1], &[1], &[1]);
        check(&[0, 1], &[], &[]);
        check(&[0, 1, 2], &[0, 2], &[0, 2]);
        check(&[0, 1, 2], &[1], &[1]);
    }

    #[test]
    fn who_means_several_is_told_which_and_how_to_choose() {
        let name = ambiguous(
            &DomainRef::Name("web".parse().unwrap()),
            &[facts(0), facts(1)],
        );
        assert_eq!(name.code, Code::Conflict);
        for piece in [
            "'web'",
            "driver0:///",
            "driver1:///",
            "--hypervisor",
            "UUID",
        ] {
            assert!(name.message.contains(piece), "{name}");
        }
    }
}
