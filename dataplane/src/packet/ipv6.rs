//! The IPv6 header and the chain of extension headers behind it (RFC 8200 sections 3 and 4).
//!
//! The chain is walked to the transport header and no further than `EXTENSIONS` steps, so that a
//! packet cannot buy an unbounded walk. Encryption and authentication headers end it: what stands
//! behind them is not ours. Jumbograms (RFC 2675) are not read.

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Fragment, ParseError};
use crate::net::Protocol;

/// Bytes of the header without extensions.
pub const LENGTH: usize = 40;

/// How many extension headers a packet may carry.
pub const EXTENSIONS: usize = 8;

/// The header as it lies on the wire, without extensions.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Version, traffic class and flow label.
    pub version_and_flow: U32,
    /// Length of what follows this header.
    pub payload_length: U16,
    /// What follows.
    pub next_header: Protocol,
    /// How many routers may still forward it.
    pub hop_limit: u8,
    /// Who sends.
    pub source: [u8; 16],
    /// Who receives.
    pub destination: [u8; 16],
}

const _: () = assert!(size_of::<Header>() == LENGTH);

impl Header {
    /// The version that the header claims.
    #[must_use]
    pub const fn version(&self) -> u8 {
        (self.version_and_flow.get() >> 28) as u8
    }
}

/// Where the chain of extension headers ends.
pub(super) struct Chain {
    /// Offset of the transport header from the start of the packet.
    pub(super) transport: usize,
    /// What stands there.
    pub(super) protocol: Protocol,
    pub(super) fragment: Fragment,
    pub(super) identification: u32,
}

/// Walks the extension headers of `packet`, which begins with its IPv6 header.
#[inline]
pub(super) fn walk(packet: &[u8], first: Protocol) -> Result<Chain, ParseError> {
    let mut chain = Chain {
        transport: LENGTH,
        protocol: first,
        fragment: Fragment::None,
        identification: 0,
    };
    for step in 0..=EXTENSIONS {
        let rest = packet.get(chain.transport..).ok_or(ParseError::BadLength)?;
        match chain.protocol {
            HOP_BY_HOP if step != 0 => return Err(ParseError::BadHeader),
            HOP_BY_HOP | DESTINATION | ROUTING => {
                let extension = Extension::read(rest)?;
                if chain.protocol == ROUTING && extension.segments_left != 0 {
                    return Err(ParseError::SourceRouted);
                }
                chain.transport += extension.length();
                chain.protocol = extension.next_header;
            }
            FRAGMENT => {
                let fragment = FragmentHeader::read(rest)?;
                chain.transport += size_of::<FragmentHeader>();
                chain.protocol = fragment.next_header;
                // A header that says "offset 0, none to come" is a whole packet (RFC 6946).
                if fragment.state() != Fragment::None {
                    chain.fragment = fragment.state();
                    chain.identification = fragment.identification.get();
                }
                if chain.fragment == Fragment::Later {
                    return Ok(chain);
                }
            }
            _ => return Ok(chain),
        }
    }
    Err(ParseError::TooManyExtensions)
}

const HOP_BY_HOP: Protocol = Protocol(0);
const ROUTING: Protocol = Protocol(43);
const FRAGMENT: Protocol = Protocol(44);
const DESTINATION: Protocol = Protocol(60);

/// The part that hop-by-hop, destination and routing headers share.
#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Extension {
    next_header: Protocol,
    /// In units of eight bytes, the first eight not counted.
    units: u8,
    /// Only in a routing header.
    kind: u8,
    /// Only in a routing header.
    segments_left: u8,
    first_options: [u8; 4],
}

impl Extension {
    fn read(bytes: &[u8]) -> Result<Self, ParseError> {
        let (extension, _) = Self::read_from_prefix(bytes).map_err(|_| ParseError::Truncated)?;
        if bytes.len() < extension.length() {
            return Err(ParseError::Truncated);
        }
        Ok(extension)
    }

    const fn length(self) -> usize {
        (self.units as usize + 1) * 8
    }
}

#[derive(Clone, Copy, FromBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct FragmentHeader {
    next_header: Protocol,
    reserved: u8,
    offset_and_more: U16,
    identification: U32,
}

impl FragmentHeader {
    fn read(bytes: &[u8]) -> Result<Self, ParseError> {
        let (header, _) = Self::read_from_prefix(bytes).map_err(|_| ParseError::Truncated)?;
        Ok(header)
    }

    const fn state(self) -> Fragment {
        let word = self.offset_and_more.get();
        if word & !0x7 != 0 {
            Fragment::Later
        } else if word & 1 != 0 {
            Fragment::First
        } else {
            Fragment::None
        }
    }
}
