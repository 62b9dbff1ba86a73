//! The head of an ICMP message (RFC 792, RFC 4443): enough to tell echo from error.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ParseError;

/// Bytes before an error's quoted packet.
pub const LENGTH: usize = 8;

/// Offset of the checksum within the message.
pub const CHECKSUM: usize = 2;

/// The first eight bytes of a message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// What it is.
    pub kind: u8,
    /// Which of its kind.
    pub code: u8,
    /// Checksum of the message; in ICMPv6 of a pseudo-header too.
    pub checksum: U16,
    /// Depends on the kind.
    pub rest: U32,
}

const _: () = assert!(size_of::<Header>() == LENGTH);

/// What an ICMP message is to the engine.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Icmp {
    /// Asks for an answer.
    EchoRequest,
    /// Is the answer.
    EchoReply,
    /// Tells a sender that its packet got lost.
    Error {
        /// Offset of the quoted IP header, for `parse_inner`.
        inner: u16,
    },
    /// Neighbour discovery, router messages and the rest.
    Other,
}

/// Destination unreachable, ICMP for IPv4.
pub const V4_UNREACHABLE: u8 = 3;
/// Time exceeded, ICMP for IPv4.
pub const V4_TIME_EXCEEDED: u8 = 11;
/// Destination unreachable, ICMP for IPv6.
pub const V6_UNREACHABLE: u8 = 1;
/// Packet too big (RFC 4443 section 3.2).
pub const V6_TOO_BIG: u8 = 2;
/// Time exceeded, ICMP for IPv6.
pub const V6_TIME_EXCEEDED: u8 = 3;

/// Source quench (4), redirect (5) and parameter problem (12) are errors too (RFC 1122, 3.2.2).
#[inline]
pub(super) fn kind_v4(message: &[u8], transport: u16) -> Result<Icmp, ParseError> {
    Ok(match read(message)?.kind {
        8 => Icmp::EchoRequest,
        0 => Icmp::EchoReply,
        V4_UNREACHABLE | 4 | 5 | V4_TIME_EXCEEDED | 12 => error(transport)?,
        _ => Icmp::Other,
    })
}

/// Types below 128 are errors (RFC 4443 section 2.1).
#[inline]
pub(super) fn kind_v6(message: &[u8], transport: u16) -> Result<Icmp, ParseError> {
    Ok(match read(message)?.kind {
        128 => Icmp::EchoRequest,
        129 => Icmp::EchoReply,
        ..128 => error(transport)?,
        _ => Icmp::Other,
    })
}

fn error(transport: u16) -> Result<Icmp, ParseError> {
    // LENGTH is 8; u16 arithmetic keeps the offset in range.
    let inner = transport.checked_add(8).ok_or(ParseError::BadLength)?;
    Ok(Icmp::Error { inner })
}

fn read(message: &[u8]) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(message).map_err(|_| ParseError::BadLength)?;
    Ok(header)
}
