//! Kerberos 5 through GSSAPI: the only file that names libgssapi, and no input or output.
//!
//! ```text
//! Initiator --token--> Acceptor        step() takes the half-made context, so a dead handshake cannot be used again
//! Initiator <--token-- Acceptor        flags are verified when it is Done, on both sides: requested is not granted
//!   Context <=sealed=> Context         wrap/unwrap exist only here
//! ```

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use libgssapi::{
    context::{ClientCtx, CtxFlags, CtxInfo, SecurityContext, ServerCtx},
    credential::{Cred, CredUsage},
    error::Error,
    name::Name,
    oid::{GSS_MECH_KRB5, GSS_NT_HOSTBASED_SERVICE, GSS_NT_KRB5_PRINCIPAL, OidSet},
};

use crate::{
    name::{BadName, HostName, Principal},
    protocol::SERVICE,
};

/// Mutual authentication, secrecy, integrity, and no token lost, repeated or swapped.
const REQUIRED: CtxFlags = CtxFlags::GSS_C_MUTUAL_FLAG
    .union(CtxFlags::GSS_C_CONF_FLAG)
    .union(CtxFlags::GSS_C_INTEG_FLAG)
    .union(CtxFlags::GSS_C_REPLAY_FLAG)
    .union(CtxFlags::GSS_C_SEQUENCE_FLAG);

/// The most bytes that gss_wrap adds to a message, with room to spare (RFC 4121: 2 headers, confounder and checksum).
pub const OVERHEAD: usize = 128;

/// What kind of trouble Kerberos has: one cause, one next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// There is no ticket.
    NoTicket,
    /// The ticket has expired.
    Expired,
    /// The clocks are too far apart.
    ClockSkew,
    /// The KDC does not know the service principal.
    UnknownService,
    /// No KDC of the realm answers.
    KdcUnreachable,
    /// No way to the realm.
    UnknownRealm,
    /// The keytab has no key that fits, or cannot be read.
    NoKey,
    /// A token seen before.
    Replay,
    /// The peer did not grant what was required.
    WeakContext,
    /// A token that is forged, damaged, repeated or out of order.
    BadToken,
    /// Anything else; the text says what the library said.
    Other,
}

/// Why GSSAPI said no.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{text}")]
pub struct GssError {
    /// The kind.
    pub trouble: Trouble,
    /// The library's words.
    pub text: String,
}

impl GssError {
    fn new(trouble: Trouble, text: impl Into<String>) -> Self {
        Self {
            trouble,
            text: text.into(),
        }
    }
}

impl From<Error> for GssError {
    fn from(error: Error) -> Self {
        Self {
            trouble: trouble(error.major.bits(), error.minor),
            text: error.to_string(),
        }
    }
}

/// The numbers of krb5_err.et and k5e1_err.et (MIT) count from this base, and those of k5e1 from `K5E1`; RFC 2744 gives the major ones.
const KRB5: i32 = -1_765_328_384;
const ROUTINE_ERROR: u32 = 0x00ff_0000;
const NO_CRED: u32 = 7 << 16;
const CREDENTIALS_EXPIRED: u32 = 11 << 16;
const DEFECTIVE_TOKEN: u32 = 9 << 16;
const BAD_SIG: u32 = 6 << 16;

fn trouble(major: u32, minor: u32) -> Trouble {
    match minor.cast_signed().wrapping_sub(KRB5) {
        7 => return Trouble::UnknownService,
        32 => return Trouble::Expired,
        34 => return Trouble::Replay,
        37 => return Trouble::ClockSkew,
        156 => return Trouble::KdcUnreachable,
        // KRB5_REALM_UNKNOWN, KRB5_REALM_CANT_RESOLVE
        154 | 220 => return Trouble::UnknownRealm,
        // KRB5KRB_AP_ERR_NOT_US, _BADKEYVER, _NOKEY, KRB5_KT_NOTFOUND, KRB5_KT_IOERR
        35 | 44 | 45 | 181 | 184 => return Trouble::NoKey,
        // KRB5_CC_NOTFOUND, KRB5_FCC_NOFILE, KRB5_CC_FORMAT
        141 | 195 | 199 => return Trouble::NoTicket,
        _ => {}
    }
    match major & ROUTINE_ERROR {
        NO_CRED => Trouble::NoTicket,
        CREDENTIALS_EXPIRED => Trouble::Expired,
        DEFECTIVE_TOKEN | BAD_SIG => Trouble::BadToken,
        _ => Trouble::Other,
    }
}

/// KRB5_LNAME_NOTRANS and KRB5_NO_LOCALNAME: no rule of `auth_to_local` maps the principal.
const NO_LOCAL_NAME: [i32; 2] = [176, 157];

/// What a step of a handshake leads to.
#[derive(Debug)]
pub enum Step<P> {
    /// Send the token, wait for another.
    Continue(P, Vec<u8>),
    /// The context stands; send the token where there is one.
    Done(Context, Option<Vec<u8>>),
}

/// The caller's half of a handshake.
#[derive(Debug)]
pub struct Initiator(ClientCtx);

impl Initiator {
    /// Begins towards `xman@host`, the host exactly as it was typed. Tickets come from the environment's credential cache.
    pub fn new(host: &HostName) -> Result<Self, GssError> {
        let target = Name::new(
            format!("{SERVICE}@{host}").as_bytes(),
            Some(GSS_NT_HOSTBASED_SERVICE),
        )?;
        Ok(Self(ClientCtx::new(
            None,
            target,
            REQUIRED,
            Some(GSS_MECH_KRB5),
        )))
    }

    /// Takes the host's token (none at first). May ask a KDC, so it blocks.
    pub fn step(mut self, token: Option<&[u8]>) -> Result<Step<Self>, GssError> {
        let out = self.0.step(token, None)?.map(|token| token.to_vec());
        if self.0.is_complete() {
            let info = verified(self.0.info()?)?;
            let peer = service(&info.target_name)?;
            return Ok(Step::Done(
                Context {
                    half: Half::Initiator(self.0),
                    peer,
                    own: principal(&info.source_name)?,
                    until: end(info.lifetime),
                },
                out,
            ));
        }
        match out {
            Some(token) => Ok(Step::Continue(self, token)),
            None => Err(GssError::new(
                Trouble::BadToken,
                "the handshake neither ends nor goes on",
            )),
        }
    }
}

/// The host's keys for the service `xman`, whatever host name they carry (a host can have several).
#[derive(Clone, Debug)]
pub struct Keys(Cred);

impl Keys {
    /// Opens the keytab that the environment names (`KRB5_KTNAME`).
    pub fn open() -> Result<Self, GssError> {
        let service = Name::new(SERVICE.as_bytes(), Some(GSS_NT_HOSTBASED_SERVICE))?;
        let mut krb5 = OidSet::new();
        krb5.add(GSS_MECH_KRB5)?;
        Ok(Self(Cred::acquire(
            Some(&service),
            None,
            CredUsage::Accept,
            Some(&krb5),
        )?))
    }
}

/// The host's half of a handshake.
#[derive(Debug)]
pub struct Acceptor(ServerCtx);

impl Acceptor {
    /// Waits for a caller's first token.
    pub fn new(keys: &Keys) -> Self {
        Self(ServerCtx::new(Some(keys.0.clone())))
    }

    /// Takes the caller's token. Reads the keytab and the replay cache, so it blocks.
    pub fn step(mut self, token: &[u8]) -> Result<Step<Self>, GssError> {
        let out = self.0.step(token, None)?.map(|token| token.to_vec());
        if self.0.is_complete() {
            let info = verified(self.0.info()?)?;
            let ours = principal(&info.target_name)?;
            if !ours.as_str().starts_with(concat!("xman", "/")) {
                return Err(GssError::new(
                    Trouble::NoKey,
                    format!("the ticket is for {ours}, not for {SERVICE}"),
                ));
            }
            let peer = principal(&info.source_name)?;
            return Ok(Step::Done(
                Context {
                    half: Half::Acceptor(self.0),
                    peer,
                    own: ours,
                    until: end(info.lifetime),
                },
                out,
            ));
        }
        match out {
            Some(token) => Ok(Step::Continue(self, token)),
            None => Err(GssError::new(
                Trouble::BadToken,
                "the handshake neither ends nor goes on",
            )),
        }
    }
}

fn verified(info: CtxInfo) -> Result<CtxInfo, GssError> {
    let missing = REQUIRED.difference(info.flags);
    if !missing.is_empty() || info.flags.contains(CtxFlags::GSS_C_ANON_FLAG) {
        return Err(GssError::new(
            Trouble::WeakContext,
            format!("the security context lacks {missing:?}"),
        ));
    }
    Ok(info)
}

fn principal(name: &Name) -> Result<Principal, GssError> {
    named(name, str::parse)
}

/// MIT finds a host's realm in `[domain_realm]`; for other hosts the KDC does, and the name keeps an empty realm.
fn service(name: &Name) -> Result<Principal, GssError> {
    named(name, |text| {
        if text.ends_with('@') {
            Principal::service_of_open_realm(text)
        } else {
            text.parse()
        }
    })
}

fn named(
    name: &Name,
    parse: impl FnOnce(&str) -> Result<Principal, BadName>,
) -> Result<Principal, GssError> {
    let text = name.display_name()?;
    std::str::from_utf8(&text)
        .map_err(|error| error.to_string())
        .and_then(|text| parse(text).map_err(|error| error.to_string()))
        .map_err(|error| {
            GssError::new(
                Trouble::Other,
                format!("a principal that cannot be used: {error}"),
            )
        })
}

fn end(lifetime: Duration) -> SystemTime {
    SystemTime::now() + lifetime
}

#[derive(Debug)]
enum Half {
    Initiator(ClientCtx),
    Acceptor(ServerCtx),
}

/// An established security context with all of mutual, confidentiality, integrity, replay and sequence verified.
#[derive(Debug)]
pub struct Context {
    half: Half,
    peer: Principal,
    own: Principal,
    until: SystemTime,
}

impl Context {
    /// Returns who we are to the other end: of a host the name that it was called by.
    pub fn own(&self) -> &Principal {
        &self.own
    }

    /// Returns who is at the other end.
    pub fn peer(&self) -> &Principal {
        &self.peer
    }

    /// Returns when the context ends by the library's account; MIT's acceptor adds its allowed clock skew.
    pub fn until(&self) -> SystemTime {
        self.until
    }

    /// Seals a message.
    pub fn wrap(&mut self, message: &[u8]) -> Result<Bytes, GssError> {
        let token = match &mut self.half {
            Half::Initiator(context) => context.wrap(true, message),
            Half::Acceptor(context) => context.wrap(true, message),
        }?;
        Ok(Bytes::copy_from_slice(&token))
    }

    /// Opens a sealed message; one that is repeated, skipped, out of order, reflected or only signed is refused.
    pub fn unwrap(&mut self, token: &[u8]) -> Result<impl AsRef<[u8]> + use<>, GssError> {
        if !is_sealed(token) {
            return Err(GssError::new(
                Trouble::BadToken,
                "a token without confidentiality",
            ));
        }
        let opened = match &mut self.half {
            Half::Initiator(context) => context.unwrap(token),
            Half::Acceptor(context) => context.unwrap(token),
        }?;
        Ok(Opened(opened))
    }
}

struct Opened(libgssapi::util::Buf);

impl AsRef<[u8]> for Opened {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

/// gss_unwrap tells whether a token was encrypted only through an argument that the binding does not pass on, so the header is read:
/// RFC 4121 4.2.6.2, TOK_ID 05 04, then flags whose bit 1 is Sealed.
fn is_sealed(token: &[u8]) -> bool {
    matches!(token, [0x05, 0x04, flags, ..] if flags & 0x02 != 0)
}

/// Returns the principal and remaining life of the ticket in the environment's credential cache.
pub fn own_ticket() -> Result<(Principal, Duration), GssError> {
    let mut krb5 = OidSet::new();
    krb5.add(GSS_MECH_KRB5)?;
    let ticket = Cred::acquire(None, None, CredUsage::Initiate, Some(&krb5))?;
    Ok((principal(&ticket.name()?)?, ticket.lifetime()?))
}

/// Returns the local account that a principal stands for by `auth_to_local` of krb5.conf; nothing where no rule maps it. Reads files.
///
/// # Errors
/// The library's, where it cannot tell.
pub fn local_account(principal: &Principal) -> Result<Option<String>, GssError> {
    let name = Name::new(principal.as_str().as_bytes(), Some(GSS_NT_KRB5_PRINCIPAL))?;
    match name.local_name(Some(GSS_MECH_KRB5)) {
        Ok(account) => match std::str::from_utf8(&account) {
            Ok(account) => Ok(Some(account.trim_end_matches('\0').to_owned())),
            Err(error) => Err(GssError::new(Trouble::Other, error.to_string())),
        },
        Err(error) if NO_LOCAL_NAME.contains(&error.minor.cast_signed().wrapping_sub(KRB5)) => {
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
