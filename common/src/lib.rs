//! What both ends of the xman protocol must agree on, and nothing else.
//!
//! A connection begins with a preface in clear and a Kerberos handshake ([`channel`], [`gss`]). From there every frame
//! ([`wire`]) holds one sealed message ([`codec`]): the caller says [`Hello`](protocol::Hello), then sends calls; the host answers each
//! with items and progress and then exactly one outcome ([`protocol`]). Names are parsed at the door ([`name`]).

pub mod channel;
pub mod codec;
pub mod gss;
pub mod name;
pub mod protocol;
pub mod wire;
