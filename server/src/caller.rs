//! Who calls, and what a call gives back: what session, call and perform share.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use xman_common::{
    name::Principal,
    protocol::{Fault, Item, Progress, Reply},
};
use xman_policy::{Action, Person, Query, Subject};

use crate::audit::{Kind, Record};

/// What a call comes to.
pub(crate) type Outcome = Result<Reply, Fault>;

/// What a running call sends before its outcome.
#[derive(Debug)]
pub(crate) enum Piece {
    /// A part of the answer.
    Items(Vec<Item>),
    /// How far it is.
    Progress(Progress),
}

/// Who is at the other end, as every verdict and record needs it.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    /// Who it is, as Kerberos proved it.
    pub(crate) proven: Arc<Person>,
    /// Whose rights count: the caller's own, or those of whom the caller acts for.
    pub(crate) person: Arc<Person>,
    pub(crate) address: IpAddr,
    /// As whom the caller called this host: `xman/HOST@REALM`.
    pub(crate) called: Principal,
    pub(crate) session: String,
    pub(crate) until: SystemTime,
}

impl Caller {
    /// Returns the question whether the caller may do this to that.
    pub(crate) fn query<'a>(&'a self, action: impl Into<Action>, on: Subject<'a>) -> Query<'a> {
        Query {
            person: &self.person,
            action: action.into(),
            on,
            peer: self.address,
            acting: self.acting(),
        }
    }

    /// Returns the proven principal where it acts for somebody else.
    pub(crate) fn acting(&self) -> Option<&Principal> {
        let proven = &self.proven.principal;
        (*proven != self.person.principal).then_some(proven)
    }

    /// Begins an audit record about this caller.
    pub(crate) fn record(&self, kind: Kind, sentence: impl AsRef<str>) -> Record {
        Record::new(kind, sentence)
            .with("session", &self.session)
            .with("principal", self.proven.principal.as_str())
            .with("address", self.address.to_string())
    }
}
