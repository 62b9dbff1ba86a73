//! The SCTP common header (RFC 9260 section 3.1).
//!
//! Only the ports are of interest. Its CRC covers neither addresses nor a pseudo-header.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ParseError;

/// The header as it lies on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Sender's port.
    pub source: U16,
    /// Receiver's port.
    pub destination: U16,
    /// Names the association.
    pub verification_tag: U32,
    /// CRC-32C of the packet.
    pub checksum: U32,
}

/// Reads the header at the start of `segment`.
#[inline]
pub(super) fn read(segment: &[u8]) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(segment).map_err(|_| ParseError::BadLength)?;
    Ok(header)
}
