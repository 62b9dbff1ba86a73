//! Packets that the engine makes itself, each an answer to one that it will not forward.
//!
//! The answer is built from the packet as it came in: Ethernet and IP addresses change places, the
//! checksums are full. None is made for a packet that must not be answered: an ICMP error, a later
//! fragment, a group address on either layer, a source that is no host (RFC 1122 section 3.2.2,
//! RFC 4443 section 2.4 e). Rate limits are the caller's business.

use zerocopy::IntoBytes;
use zerocopy::big_endian::{U16, U32};

use super::checksum::{self, Sum};
use super::ethernet::{self, EtherType};
use super::icmp::{self, Icmp};
use super::tcp::{self, TcpFlags};
use super::{Fragment, Headers, Version, ipv4, ipv6};
use crate::net::{Address, Protocol};

/// Answers a TCP segment with RST (RFC 9293 section 3.10.7.1). Returns the frame's length, or `None`
/// if the segment must not be answered or `out` has no room.
#[must_use]
pub fn tcp_reset(of: &[u8], headers: &Headers, out: &mut [u8]) -> Option<usize> {
    if headers.tuple.protocol != Protocol::TCP || headers.tcp.contains(TcpFlags::RST) {
        return None;
    }
    let segment = of.get(usize::from(headers.transport)..headers.end())?;
    let received = tcp::read(segment).ok()?;
    let payload = u32::try_from(segment.len().checked_sub(received.length())?).ok()?;
    let occupied = payload
        + u32::from(headers.tcp.contains(TcpFlags::SYN))
        + u32::from(headers.tcp.contains(TcpFlags::FIN));
    let (sequence, acknowledgment, flags) = if headers.tcp.contains(TcpFlags::ACK) {
        (received.acknowledgment.get(), 0, TcpFlags::RST)
    } else {
        let next = received.sequence.get().wrapping_add(occupied);
        (0, next, TcpFlags::RST | TcpFlags::ACK)
    };
    let reset = tcp::Header {
        source: received.destination,
        destination: received.source,
        sequence: U32::new(sequence),
        acknowledgment: U32::new(acknowledgment),
        data_offset: 0x50,
        flags,
        window: U16::ZERO,
        checksum: U16::ZERO,
        urgent: U16::ZERO,
    };
    let source = headers.tuple.destination.address;
    let answer = Answer::to(of, headers, source, Protocol::TCP)?;
    answer.write(&[reset.as_bytes()], tcp::CHECKSUM, out)
}

/// Answers with "port unreachable", as the kernel's reject rule does. The answer's source is the
/// address that the packet was sent to.
#[must_use]
pub fn icmp_unreachable(of: &[u8], headers: &Headers, out: &mut [u8]) -> Option<usize> {
    let source = headers.tuple.destination.address;
    match headers.version {
        Version::V4 => icmp_error(icmp::V4_UNREACHABLE, 3, 0, source, of, headers, out),
        Version::V6 => icmp_error(icmp::V6_UNREACHABLE, 4, 0, source, of, headers, out),
    }
}

/// Answers with "time exceeded in transit". `source` is an address of this node in the packet's
/// family.
#[must_use]
pub fn icmp_time_exceeded(
    source: Address,
    of: &[u8],
    headers: &Headers,
    out: &mut [u8],
) -> Option<usize> {
    match headers.version {
        Version::V4 => icmp_error(icmp::V4_TIME_EXCEEDED, 0, 0, source, of, headers, out),
        Version::V6 => icmp_error(icmp::V6_TIME_EXCEEDED, 0, 0, source, of, headers, out),
    }
}

/// Answers with "fragmentation needed" (RFC 1191) or "packet too big" (RFC 4443 section 3.2).
#[must_use]
pub fn icmp_too_big(
    source: Address,
    mtu: u32,
    of: &[u8],
    headers: &Headers,
    out: &mut [u8],
) -> Option<usize> {
    match headers.version {
        Version::V4 => icmp_error(
            icmp::V4_UNREACHABLE,
            4,
            mtu & 0xffff,
            source,
            of,
            headers,
            out,
        ),
        Version::V6 => icmp_error(icmp::V6_TOO_BIG, 0, mtu, source, of, headers, out),
    }
}

/// Answers are sent with what Linux uses.
const HOP_LIMIT: u8 = 64;

/// RFC 1812 section 4.3.2.3: as much of the packet as fits 576 bytes.
const QUOTE_V4: usize = 576 - ipv4::LENGTH - icmp::LENGTH;
/// RFC 4443 section 3.1: as much as fits the smallest MTU.
const QUOTE_V6: usize = 1280 - ipv6::LENGTH - icmp::LENGTH;

fn icmp_error(
    kind: u8,
    code: u8,
    rest: u32,
    source: Address,
    of: &[u8],
    headers: &Headers,
    out: &mut [u8],
) -> Option<usize> {
    if matches!(headers.icmp, Some(Icmp::Error { .. })) {
        return None;
    }
    let (protocol, room) = match headers.version {
        Version::V4 => (Protocol::ICMP, QUOTE_V4),
        Version::V6 => (Protocol::ICMPV6, QUOTE_V6),
    };
    let packet = of.get(usize::from(headers.network)..headers.end())?;
    let quote = packet.get(..room).unwrap_or(packet);
    let head = icmp::Header {
        kind,
        code,
        checksum: U16::ZERO,
        rest: U32::new(rest),
    };
    let answer = Answer::to(of, headers, source, protocol)?;
    answer.write(&[head.as_bytes(), quote], icmp::CHECKSUM, out)
}

/// A packet on its way back to a sender.
struct Answer {
    version: Version,
    ethernet: ethernet::Header,
    protocol: Protocol,
    source: Address,
    destination: Address,
}

impl Answer {
    /// `None` if the packet must not be answered.
    fn to(of: &[u8], headers: &Headers, source: Address, protocol: Protocol) -> Option<Self> {
        let frame = ethernet::Header::of(of)?;
        let destination = headers.tuple.source.address;
        if headers.fragment == Fragment::Later
            || ethernet::is_group(frame.destination)
            || !is_host(&destination)
            || !is_host(&headers.tuple.destination.address)
            || source.is_v4() != (headers.version == Version::V4)
        {
            return None;
        }
        let ether_type = match headers.version {
            Version::V4 => EtherType::IPV4,
            Version::V6 => EtherType::IPV6,
        };
        Some(Self {
            version: headers.version,
            ethernet: ethernet::Header::new(frame.source, frame.destination, ether_type),
            protocol,
            source,
            destination,
        })
    }

    /// Writes the frame with the transport bytes of `parts`, whose checksum field lies `checksum_at`
    /// bytes within them.
    fn write(&self, parts: &[&[u8]], checksum_at: usize, out: &mut [u8]) -> Option<usize> {
        let length: usize = parts.iter().map(|part| part.len()).sum();
        let at = self.write_network(length, out)?;
        let mut end = at;
        for part in parts {
            let to = out.get_mut(end..end + part.len())?;
            to.copy_from_slice(part);
            end += part.len();
        }
        let transport = out.get_mut(at..end)?;
        let sum = self.pseudo_header(length) + Sum::of(transport);
        checksum::write(transport, checksum_at, sum.checksum());
        Some(end)
    }

    /// Writes both lower headers; returns where the transport begins.
    fn write_network(&self, length: usize, out: &mut [u8]) -> Option<usize> {
        self.ethernet.write_to_prefix(out).ok()?;
        let rest = out.get_mut(ethernet::LENGTH..)?;
        match self.version {
            Version::V4 => {
                let total_length = u16::try_from(ipv4::LENGTH + length).ok()?;
                let mut header = ipv4::Header {
                    version_and_length: 0x45,
                    traffic_class: 0,
                    total_length: U16::new(total_length),
                    identification: U16::ZERO,
                    flags_and_offset: U16::new(ipv4::DONT_FRAGMENT),
                    hop_limit: HOP_LIMIT,
                    protocol: self.protocol,
                    checksum: U16::ZERO,
                    source: self.source.v4_bytes(),
                    destination: self.destination.v4_bytes(),
                };
                header.checksum = U16::new(Sum::of(header.as_bytes()).checksum());
                header.write_to_prefix(rest).ok()?;
                Some(ethernet::LENGTH + ipv4::LENGTH)
            }
            Version::V6 => {
                let header = ipv6::Header {
                    version_and_flow: U32::new(6 << 28),
                    payload_length: U16::new(u16::try_from(length).ok()?),
                    next_header: self.protocol,
                    hop_limit: HOP_LIMIT,
                    source: *self.source.bytes(),
                    destination: *self.destination.bytes(),
                };
                header.write_to_prefix(rest).ok()?;
                Some(ethernet::LENGTH + ipv6::LENGTH)
            }
        }
    }

    /// ICMP for IPv4 has none.
    fn pseudo_header(&self, length: usize) -> Sum {
        if self.protocol == Protocol::ICMP {
            return Sum::default();
        }
        Sum::address(&self.source)
            + Sum::address(&self.destination)
            + Sum::word(u16::try_from(length).unwrap_or(0))
            + Sum::word(u16::from(self.protocol.0))
    }
}

/// Whether an address names one host: not unspecified, loopback, multicast or broadcast.
fn is_host(address: &Address) -> bool {
    if address.is_v4() {
        let [first, ..] = address.v4_bytes();
        return first != 0 && first != 127 && first < 224;
    }
    let [first, ..] = *address.bytes();
    let loopback = (0, 1 << 56);
    first != 0xff && *address != Address::ANY && address.words() != loopback
}
