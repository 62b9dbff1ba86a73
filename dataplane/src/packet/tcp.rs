//! The TCP header (RFC 9293 section 3.1).
//!
//! Options are skipped, never read.

use std::fmt;
use std::ops::BitOr;

use zerocopy::big_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::ParseError;

/// Bytes of the header without options.
pub const LENGTH: usize = 20;

/// Offset of the checksum within the header.
pub const CHECKSUM: usize = 16;

/// The header as it lies on the wire, without options.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Sender's port.
    pub source: U16,
    /// Receiver's port.
    pub destination: U16,
    /// Number of the first payload byte.
    pub sequence: U32,
    /// Next byte that the sender expects, if ACK is set.
    pub acknowledgment: U32,
    /// Length of the header in 32-bit words, in the upper half.
    pub data_offset: u8,
    /// Control bits.
    pub flags: TcpFlags,
    /// How much the sender will take.
    pub window: U16,
    /// Checksum of pseudo-header, header and payload.
    pub checksum: U16,
    /// Offset of urgent data.
    pub urgent: U16,
}

const _: () = assert!(size_of::<Header>() == LENGTH);

impl Header {
    /// Length of the header in bytes, options included.
    #[must_use]
    pub const fn length(&self) -> usize {
        (self.data_offset >> 4) as usize * 4
    }
}

/// Reads the header at the start of `segment` and checks that its options fit.
#[inline]
pub(super) fn read(segment: &[u8]) -> Result<&Header, ParseError> {
    let (header, _) = Header::ref_from_prefix(segment).map_err(|_| ParseError::BadLength)?;
    if header.length() < LENGTH {
        return Err(ParseError::BadHeader);
    }
    if header.length() > segment.len() {
        return Err(ParseError::BadLength);
    }
    Ok(header)
}

/// TCP's control bits.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(transparent)]
pub struct TcpFlags(pub u8);

impl TcpFlags {
    /// No bit at all.
    pub const NONE: Self = Self(0);
    /// No more data from the sender.
    pub const FIN: Self = Self(0x01);
    /// Synchronise sequence numbers.
    pub const SYN: Self = Self(0x02);
    /// Reset the connection.
    pub const RST: Self = Self(0x04);
    /// Push.
    pub const PSH: Self = Self(0x08);
    /// The acknowledgment number counts.
    pub const ACK: Self = Self(0x10);
    /// The urgent offset counts.
    pub const URG: Self = Self(0x20);

    /// Whether all bits of `others` are set.
    #[must_use]
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }

    /// Whether it asks for a new connection: SYN without ACK, RST or FIN.
    #[must_use]
    pub const fn opens(self) -> bool {
        self.0 & (Self::SYN.0 | Self::ACK.0 | Self::RST.0 | Self::FIN.0) == Self::SYN.0
    }
}

impl BitOr for TcpFlags {
    type Output = Self;

    fn bitor(self, other: Self) -> Self {
        Self(self.0 | other.0)
    }
}

impl fmt::Debug for TcpFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = [
            (Self::SYN, 'S'),
            (Self::FIN, 'F'),
            (Self::RST, 'R'),
            (Self::PSH, 'P'),
            (Self::ACK, 'A'),
            (Self::URG, 'U'),
        ];
        let set: String = names
            .iter()
            .filter(|(flag, _)| self.contains(*flag))
            .map(|(_, name)| *name)
            .collect();
        write!(f, "[{set}]")
    }
}
