//! The IPv4 header (RFC 791 section 3.1).
//!
//! Options are skipped, never read.

use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Fragment;
use crate::net::Protocol;

/// Bytes of the header without options.
pub const LENGTH: usize = 20;

/// The header as it lies on the wire, without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Version in the upper half, length in 32-bit words in the lower.
    pub version_and_length: u8,
    /// Differentiated services and congestion notification.
    pub traffic_class: u8,
    /// Length of the packet, header included.
    pub total_length: U16,
    /// The number that fragments of one packet share.
    pub identification: U16,
    /// Three flags and the fragment's offset in units of eight bytes.
    pub flags_and_offset: U16,
    /// How many routers may still forward it.
    pub hop_limit: u8,
    /// What follows.
    pub protocol: Protocol,
    /// Checksum of the header, options included.
    pub checksum: U16,
    /// Who sends.
    pub source: [u8; 4],
    /// Who receives.
    pub destination: [u8; 4],
}

const _: () = assert!(size_of::<Header>() == LENGTH);

/// The flag "more fragments" within `flags_and_offset`.
pub const MORE_FRAGMENTS: u16 = 0x2000;
/// The flag "don't fragment" within `flags_and_offset`.
pub const DONT_FRAGMENT: u16 = 0x4000;

const OFFSET_MASK: u16 = 0x1fff;

impl Header {
    /// The version that the header claims.
    #[must_use]
    pub const fn version(&self) -> u8 {
        self.version_and_length >> 4
    }

    /// Length of the header in bytes, options included.
    #[must_use]
    pub const fn length(&self) -> usize {
        (self.version_and_length & 0x0f) as usize * 4
    }

    /// Whether it is a piece of a larger packet.
    #[must_use]
    pub const fn fragment_state(&self) -> Fragment {
        let word = self.flags_and_offset.get();
        if word & OFFSET_MASK != 0 {
            Fragment::Later
        } else if word & MORE_FRAGMENTS != 0 {
            Fragment::First
        } else {
            Fragment::None
        }
    }
}
