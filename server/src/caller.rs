//! Who calls, and what a call gives back: what session, call and perform share.

use std::{net::IpAddr, time::SystemTime};

use xman_common::{
    name::Principal,
    protocol::{Fault, Item, Progress, Reply},
};

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
    pub(crate) principal: Principal,
    pub(crate) address: IpAddr,
    pub(crate) session: String,
    pub(crate) until: SystemTime,
}

impl Caller {
    /// Begins an audit record about this caller.
    pub(crate) fn record(&self, kind: Kind, sentence: impl AsRef<str>) -> Record {
        Record::new(kind, sentence)
            .with("session", &self.session)
            .with("principal", self.principal.as_str())
            .with("address", self.address.to_string())
    }
}
