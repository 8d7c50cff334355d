//! Who a principal is beyond its name: the Unix groups of its local account, where policies may go by them.
//!
//! The name service behind that may hang. So it is asked once when a session begins, on a thread that may block, within a deadline, and
//! by few threads at once; what it does not say in time is unknown, and whoever goes by groups then denies.

use std::{ffi::CString, sync::Arc, time::Duration};

use nix::unistd::{Group, User, getgrouplist};
use tokio::{
    sync::Semaphore,
    task::spawn_blocking,
    time::{Instant, timeout_at},
};
use xman_common::{gss, name::Principal};
use xman_policy::{Person, UnixGroups};

/// How long the name service may take.
const LIMIT: Duration = Duration::from_secs(2);
/// Threads that wait for it at once: one that hangs takes no more than these.
const LOOKUPS: usize = 8;
/// The most groups of one account: each is looked up by its number.
const MAX_GROUPS: usize = 1024;

/// Finds persons.
#[derive(Debug)]
pub(crate) struct People {
    lookups: Option<Arc<Semaphore>>,
}

impl People {
    /// Asks the name service only where somebody wants to know.
    pub(crate) fn new(unix_groups: bool) -> Self {
        Self {
            lookups: unix_groups.then(|| Arc::new(Semaphore::new(LOOKUPS))),
        }
    }

    /// Returns what is known of a principal; waits for the name service, [`LIMIT`] at most.
    pub(crate) async fn find(&self, principal: &Principal) -> Person {
        let unix_groups = match &self.lookups {
            None => UnixGroups::Unasked,
            Some(lookups) => look_up(Arc::clone(lookups), principal.clone())
                .await
                .map_or_else(UnixGroups::Unknown, UnixGroups::Known),
        };
        Person {
            principal: principal.clone(),
            unix_groups,
        }
    }
}

async fn look_up(lookups: Arc<Semaphore>, principal: Principal) -> Result<Vec<String>, String> {
    let deadline = Instant::now() + LIMIT;
    let late = |_| {
        format!(
            "the name service has not answered for {} s",
            LIMIT.as_secs()
        )
    };
    let seat = timeout_at(deadline, lookups.acquire_owned())
        .await
        .map_err(late)?
        .map_err(|error| error.to_string())?;
    let asked = spawn_blocking(move || {
        // Held until the name service returns, however long ago the caller gave up.
        let _seat = seat;
        groups(&principal)
    });
    timeout_at(deadline, asked)
        .await
        .map_err(late)?
        .map_err(|_| "the name service's library failed".to_owned())?
}

fn groups(principal: &Principal) -> Result<Vec<String>, String> {
    let Some(account) = gss::local_account(principal)
        .map_err(|error| format!("krb5.conf does not say whose account it is: {error}"))?
    else {
        return Ok(Vec::new());
    };
    let unsaid = |error| format!("the name service does not say who '{account}' is: {error}");
    let Some(user) = User::from_name(&account).map_err(unsaid)? else {
        return Ok(Vec::new());
    };
    let name = CString::new(account.as_str()).map_err(|error| error.to_string())?;
    let numbers = getgrouplist(&name, user.gid).map_err(unsaid)?;
    if numbers.len() > MAX_GROUPS {
        return Err(format!("'{account}' is in more than {MAX_GROUPS} groups"));
    }
    let named = numbers
        .into_iter()
        .filter_map(|number| Group::from_gid(number).transpose())
        .map(|group| group.map(|group| group.name));
    named.collect::<Result<_, _>>().map_err(unsaid)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nobody_is_asked_where_nobody_wants_to_know() {
        let person = People::new(false)
            .find(&"root@EX.ORG".parse().unwrap())
            .await;
        assert_eq!(person.unix_groups, UnixGroups::Unasked);
    }
}
