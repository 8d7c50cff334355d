//! Messages to bytes and back: the only module that names bincode.
//!
//! Integers have a fixed width and are big-endian, lengths are u64, an enum's variant is a u32, an `Option` begins with a byte 0 or 1;
//! docs/PROTOCOL.md spells it out. Decoding claims no more memory than the frame limit and refuses bytes left over.

use bincode::config::{BigEndian, Configuration, Fixint, Limit};
use serde::{Serialize, de::DeserializeOwned};

use crate::wire::MAX_SEALED;

/// Why bytes are no message.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// Not this message, or cut.
    #[error("not a message of this version: {0}")]
    Malformed(#[from] bincode::error::DecodeError),
    /// More bytes than the message has.
    #[error("{0} bytes left over after a message")]
    Trailing(usize),
    /// Ours cannot be written down.
    #[error("a message that cannot be encoded: {0}")]
    Unencodable(#[from] bincode::error::EncodeError),
}

const CONFIGURATION: Configuration<BigEndian, Fixint, Limit<MAX_SEALED>> =
    bincode::config::standard()
        .with_big_endian()
        .with_fixed_int_encoding()
        .with_limit::<MAX_SEALED>();

/// Returns a message's bytes.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    Ok(bincode::serde::encode_to_vec(message, CONFIGURATION)?)
}

/// Reads one message that fills `bytes`.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (message, used) = bincode::serde::decode_from_slice(bytes, CONFIGURATION)?;
    match bytes.len() - used {
        0 => Ok(message),
        left => Err(CodecError::Trailing(left)),
    }
}
