//! The Ethernet header (IEEE 802.3 clause 3): fourteen bytes before the IP header.
//!
//! VLAN tags are not read: a tagged frame is named and left to others.

use zerocopy::big_endian::U16;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::net::MacAddr;

/// Bytes of the header.
pub const LENGTH: usize = 14;

/// The header as it lies on the wire.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct Header {
    /// Who receives.
    pub destination: MacAddr,
    /// Who sends.
    pub source: MacAddr,
    ether_type: U16,
}

const _: () = assert!(size_of::<Header>() == LENGTH);

impl Header {
    /// A header to write.
    #[must_use]
    pub fn new(destination: MacAddr, source: MacAddr, ether_type: EtherType) -> Self {
        Self {
            destination,
            source,
            ether_type: U16::new(ether_type.0),
        }
    }

    /// The frame's header, if the frame is long enough.
    #[must_use]
    pub fn of(frame: &[u8]) -> Option<&Self> {
        Self::ref_from_prefix(frame).ok().map(|(header, _)| header)
    }

    /// The frame's header, to change it.
    #[must_use]
    pub fn of_mut(frame: &mut [u8]) -> Option<&mut Self> {
        Self::mut_from_prefix(frame).ok().map(|(header, _)| header)
    }

    /// What the payload is.
    #[must_use]
    pub const fn ether_type(&self) -> EtherType {
        EtherType(self.ether_type.get())
    }
}

/// Writes both addresses of a frame. A frame without room for a header stays as it is.
pub fn set_addresses(frame: &mut [u8], destination: MacAddr, source: MacAddr) {
    if let Some(header) = Header::of_mut(frame) {
        header.destination = destination;
        header.source = source;
    }
}

/// Whether the address stands for a group of stations (broadcast included).
#[must_use]
pub const fn is_group(address: MacAddr) -> bool {
    let [first, ..] = address.0;
    first & 1 != 0
}

/// What an Ethernet frame carries. Not an enum: the wire can hold any value.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct EtherType(pub u16);

impl EtherType {
    /// Internet Protocol version 4.
    pub const IPV4: Self = Self(0x0800);
    /// Internet Protocol version 6.
    pub const IPV6: Self = Self(0x86dd);
    /// Customer VLAN tag (IEEE 802.1Q).
    pub const VLAN: Self = Self(0x8100);
    /// Service VLAN tag (IEEE 802.1ad).
    pub const SERVICE_VLAN: Self = Self(0x88a8);
}
