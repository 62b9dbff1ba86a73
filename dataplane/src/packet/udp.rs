//! The UDP header (RFC 768).

use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ParseError;

/// Bytes of the header.
pub const LENGTH: usize = 8;

/// Offset of the checksum within the header.
pub const CHECKSUM: usize = 6;

/// The header as it lies on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Sender's port.
    pub source: U16,
    /// Receiver's port.
    pub destination: U16,
    /// Length of header and payload.
    pub length: U16,
    /// Checksum of pseudo-header, header and payload; over IPv4, zero says that there is none.
    pub checksum: U16,
}

const _: () = assert!(size_of::<Header>() == LENGTH);

/// Reads the header at the start of `segment`. A first fragment (`whole` false) claims the length of
/// the whole datagram.
#[inline]
pub(super) fn read(segment: &[u8], whole: bool) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(segment).map_err(|_| ParseError::BadLength)?;
    let claimed = usize::from(header.length.get());
    if claimed < LENGTH || (whole && claimed > segment.len()) {
        return Err(ParseError::BadLength);
    }
    Ok(header)
}

/// The first eight bytes of a quoted transport header; TCP, UDP and SCTP begin with the ports.
#[inline]
pub(super) fn quoted(segment: &[u8]) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(segment).map_err(|_| ParseError::Truncated)?;
    Ok(header)
}
