//! Internet checksums: full sums (RFC 1071), incremental updates (RFC 1624), pseudo-headers.
//!
//! Three forms of a transport checksum reach the engine: complete; absent (UDP over IPv4, zero); and
//! partial, where the sender left the work to its device and the field holds the folded sum of the
//! pseudo-header, not complemented. A change of an address changes both the complete and the partial
//! form; a change of a port changes the complete form only, since the device will read the new port.
//!
//! A sum of bytes that are not all zero never folds to zero, so a `Difference` of a correct checksum
//! gives exactly the bytes that a full computation gives.

use std::ops::{Add, Not};

use super::{Fragment, Headers, Version, ipv4};
use crate::net::{Address, Protocol, Tuple};

/// A one's complement sum of 16-bit words in network order, not yet folded.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Sum(u64);

impl Sum {
    /// Sums bytes; an odd last byte is the upper half of a word.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        let (words, rest) = bytes.as_chunks::<4>();
        // The sum does not care for byte order until it is folded (RFC 1071 section 2).
        let mut sum: u64 = words
            .iter()
            .map(|word| u64::from(u32::from_ne_bytes(*word)))
            .sum();
        let mut last = [0; 4];
        for (to, from) in last.iter_mut().zip(rest) {
            *to = *from;
        }
        sum += u64::from(u32::from_ne_bytes(last));
        Self(u64::from(u16::from_be(fold(sum))))
    }

    /// One word.
    #[must_use]
    pub const fn word(word: u16) -> Self {
        Self(word as u64)
    }

    /// The bytes of an address as its IP header carries them: four or sixteen.
    #[must_use]
    #[inline]
    pub const fn address(address: &Address) -> Self {
        let (low, high) = address.words();
        if address.is_v4() {
            return Self(fold(high >> 32).swap_bytes() as u64);
        }
        let sum = (low & 0xffff_ffff) + (low >> 32) + (high & 0xffff_ffff) + (high >> 32);
        Self(fold(sum).swap_bytes() as u64)
    }

    /// The pseudo-header of RFC 9293 section 3.1 and RFC 8200 section 8.1.
    #[must_use]
    #[inline]
    pub fn pseudo_header(tuple: &Tuple, transport_length: u32) -> Self {
        Self::address(&tuple.source.address)
            + Self::address(&tuple.destination.address)
            + Self(u64::from(transport_length) + u64::from(tuple.protocol.0))
    }

    /// The sum as one word.
    #[must_use]
    #[inline]
    pub const fn fold(self) -> u16 {
        fold(self.0)
    }

    /// What a checksum field holds for this sum.
    #[must_use]
    #[inline]
    pub const fn checksum(self) -> u16 {
        !self.fold()
    }
}

impl Add for Sum {
    type Output = Self;

    #[inline]
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl Not for Sum {
    type Output = Self;

    #[inline]
    fn not(self) -> Self {
        Self(u64::from(!self.fold()))
    }
}

/// What a change of some words adds to a sum.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Difference(Sum);

impl Difference {
    /// Words that summed to `old` now sum to `new`.
    #[must_use]
    #[inline]
    pub fn between(old: Sum, new: Sum) -> Self {
        Self(!old + new)
    }

    /// Both changes.
    #[must_use]
    #[inline]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// The new value of a complete checksum (RFC 1624 equation 3).
    #[must_use]
    #[inline]
    pub fn of_complete(self, field: u16) -> u16 {
        (Sum::word(!field) + self.0).checksum()
    }

    /// The new value of a partial checksum, which is not complemented.
    #[must_use]
    #[inline]
    pub fn of_partial(self, field: u16) -> u16 {
        (Sum::word(field) + self.0).fold()
    }
}

/// Whether the transport checksum is partial: a device passed the packet on before it was completed,
/// as a veth does. A complete checksum has the same value once in 65536 packets; completing it again
/// gives the same value, so the mistake does no harm.
#[must_use]
pub fn is_partial(bytes: &[u8], headers: &Headers) -> bool {
    if headers.fragment != Fragment::None {
        return false;
    }
    let pseudo = Sum::pseudo_header(&headers.tuple, headers.transport_length()).fold();
    headers
        .checksum_offset()
        .and_then(|at| read(bytes, at))
        .is_some_and(|field| field == pseudo)
}

/// Completes the partial transport checksum of a packet, in software.
pub fn complete(bytes: &mut [u8], headers: &Headers) {
    let Some(field) = headers.checksum_offset() else {
        return;
    };
    let Some(part) = bytes.get(usize::from(headers.transport)..headers.end()) else {
        return;
    };
    let sum = Sum::of(part).checksum();
    let sum = match headers.tuple.protocol {
        Protocol::UDP => never_zero(sum),
        _ => sum,
    };
    write(bytes, field, sum);
}

/// Completes a partial checksum where a vnet header says: the part from `start` to the end of
/// `packet` is summed, the field lies `offset` bytes behind `start`. `packet` ends where the IP
/// packet ends, without Ethernet padding. The protocol is not known here, so zero is avoided.
pub fn complete_at(packet: &mut [u8], start: usize, offset: usize) {
    if let Some(part) = packet.get_mut(start..) {
        let sum = never_zero(Sum::of(part).checksum());
        write(part, offset, sum);
    }
}

/// In UDP zero says that there is no checksum; all ones mean the same number.
#[must_use]
#[inline]
pub const fn never_zero(checksum: u16) -> u16 {
    if checksum == 0 { 0xffff } else { checksum }
}

/// Whether a whole packet's checksums are right: IPv4's header, and the transport's where there is
/// one. For tests and benches; the engine does not verify.
#[must_use]
pub fn is_correct(bytes: &[u8], headers: &Headers) -> bool {
    is_header_correct(bytes, headers) && is_transport_correct(bytes, headers)
}

fn is_header_correct(bytes: &[u8], headers: &Headers) -> bool {
    let start = usize::from(headers.network);
    let end = start + ipv4_header_length(bytes, start);
    headers.version == Version::V6
        || bytes
            .get(start..end)
            .is_some_and(|header| Sum::of(header).checksum() == 0)
}

fn is_transport_correct(bytes: &[u8], headers: &Headers) -> bool {
    let Some(part) = bytes.get(usize::from(headers.transport)..headers.end()) else {
        return false;
    };
    match headers.tuple.protocol {
        Protocol::ICMP => Sum::of(part).checksum() == 0,
        Protocol::UDP
            if headers.version == Version::V4
                && headers.checksum_offset().and_then(|at| read(bytes, at)) == Some(0) =>
        {
            true
        }
        Protocol::TCP | Protocol::UDP | Protocol::ICMPV6 => {
            let pseudo = Sum::pseudo_header(&headers.tuple, headers.transport_length());
            (pseudo + Sum::of(part)).checksum() == 0
        }
        _ => true,
    }
}

fn ipv4_header_length(bytes: &[u8], start: usize) -> usize {
    bytes
        .get(start)
        .map_or(ipv4::LENGTH, |first| usize::from(first & 0x0f) * 4)
}

/// Reads the word at `at`.
#[inline]
pub(crate) fn read(bytes: &[u8], at: usize) -> Option<u16> {
    let word = bytes.get(at..)?.first_chunk::<2>()?;
    Some(u16::from_be_bytes(*word))
}

/// Writes the word at `at`, if there is room.
#[inline]
pub(crate) fn write(bytes: &mut [u8], at: usize, word: u16) {
    if let Some(field) = bytes.get_mut(at..).and_then(|rest| rest.first_chunk_mut()) {
        *field = word.to_be_bytes();
    }
}

#[inline]
const fn fold(sum: u64) -> u16 {
    let sum = (sum & 0xffff_ffff) + (sum >> 32);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    let sum = (sum & 0xffff) + (sum >> 16);
    (sum & 0xffff) as u16
}
