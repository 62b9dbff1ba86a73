//! Writes a translation into a packet's bytes, checksums included.
//!
//! Only bytes that change are touched, and checksums by difference only: what was wrong stays wrong,
//! what the sender left to its device stays left. `Headers` describe the packet before the change;
//! a second change needs a second parse. An address of the other family changes nothing.
//!
//! SCTP's CRC covers the ports; it is left to the device or the receiver's mercy until SCTP is taken.
//!
//! Read first: RFC 1624, RFC 3022 section 4, RFC 5508 section 4 (ICMP errors).

use crate::net::{Address, Endpoint, Protocol, Tuple};
use crate::packet::checksum::{self, Difference, Sum};
use crate::packet::{Headers, Icmp, Version, icmp, parse_inner};

/// What a packet becomes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Change {
    /// New source.
    pub source: Endpoint,
    /// New destination.
    pub destination: Endpoint,
    /// Which form the transport checksum has.
    pub checksum: Checksum,
    /// Whether the engine routes this packet and so takes one hop from it.
    pub decrement_hop_limit: bool,
}

/// What an ICMP error and the packet that it quotes become.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InnerChange {
    /// New source of the error.
    pub source: Address,
    /// New destination of the error.
    pub destination: Address,
    /// New source of the quoted packet.
    pub inner_source: Endpoint,
    /// New destination of the quoted packet.
    pub inner_destination: Endpoint,
    /// Whether the engine routes the error and so takes one hop from it.
    pub decrement_hop_limit: bool,
}

/// The two forms of a transport checksum.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Checksum {
    /// It covers everything.
    Complete,
    /// It holds the pseudo-header's sum; a device completes it.
    Partial,
}

/// Writes both ends of a packet.
#[inline]
pub fn apply(bytes: &mut [u8], headers: &Headers, change: &Change) {
    if !is_family(headers, &change.source.address, &change.destination.address) {
        return;
    }
    let after = Tuple {
        protocol: headers.tuple.protocol,
        source: change.source,
        destination: change.destination,
    };
    network(bytes, headers, &after, change.decrement_hop_limit);
    if headers.has_transport() {
        transport(bytes, headers, &after, change.checksum);
    }
}

/// Writes both ends of an ICMP error and of the packet that it quotes. The quoted checksums follow;
/// the message's own is changed by what changed in it.
pub fn inner(bytes: &mut [u8], headers: &Headers, change: &InnerChange) {
    let Some(Icmp::Error { inner: at }) = headers.icmp else {
        return;
    };
    // The quotation must not be read from Ethernet padding.
    let Some(packet) = bytes.get_mut(..headers.end()) else {
        return;
    };
    let Ok(quoted) = parse_inner(packet, at) else {
        return;
    };
    let inner = Tuple {
        protocol: quoted.tuple.protocol,
        source: change.inner_source,
        destination: change.inner_destination,
    };
    if !is_family(headers, &change.source, &change.destination)
        || !is_family(&quoted, &inner.source.address, &inner.destination.address)
    {
        return;
    }
    let before = Sum::of(packet.get(usize::from(at)..).unwrap_or_default());
    network(packet, &quoted, &inner, false);
    if quoted.has_transport() {
        transport(packet, &quoted, &inner, Checksum::Complete);
    }
    let now = Sum::of(packet.get(usize::from(at)..).unwrap_or_default());

    let outer = Tuple {
        protocol: headers.tuple.protocol,
        source: Endpoint::new(change.source, headers.tuple.source.port),
        destination: Endpoint::new(change.destination, headers.tuple.destination.port),
    };
    network(packet, headers, &outer, change.decrement_hop_limit);
    let message = Difference::between(before, now);
    let difference = match headers.version {
        Version::V4 => message,
        Version::V6 => message.and(addresses(&headers.tuple, &outer)),
    };
    let field = usize::from(headers.transport) + icmp::CHECKSUM;
    if let Some(old) = checksum::read(packet, field) {
        checksum::write(packet, field, difference.of_complete(old));
    }
}

fn is_family(headers: &Headers, source: &Address, destination: &Address) -> bool {
    let v4 = headers.version == Version::V4;
    source.is_v4() == v4 && destination.is_v4() == v4
}

/// Addresses, hop limit and IPv4's header checksum.
#[inline]
fn network(bytes: &mut [u8], headers: &Headers, after: &Tuple, decrement: bool) {
    let Some(header) = bytes.get_mut(usize::from(headers.network)..) else {
        return;
    };
    let hop_limit = if decrement {
        headers.hop_limit.saturating_sub(1)
    } else {
        headers.hop_limit
    };
    match headers.version {
        Version::V4 => {
            let Some(header) = view::<crate::packet::ipv4::Header>(header) else {
                return;
            };
            let hops = Difference::between(
                Sum::word(u16::from(headers.hop_limit) << 8),
                Sum::word(u16::from(hop_limit) << 8),
            );
            let difference = addresses(&headers.tuple, after).and(hops);
            header.hop_limit = hop_limit;
            header.source = after.source.address.v4_bytes();
            header.destination = after.destination.address.v4_bytes();
            header.checksum = difference.of_complete(header.checksum.get()).into();
        }
        Version::V6 => {
            let Some(header) = view::<crate::packet::ipv6::Header>(header) else {
                return;
            };
            header.hop_limit = hop_limit;
            header.source = *after.source.address.bytes();
            header.destination = *after.destination.address.bytes();
        }
    }
}

/// Ports and the transport checksum.
#[inline]
fn transport(bytes: &mut [u8], headers: &Headers, after: &Tuple, form: Checksum) {
    let protocol = headers.tuple.protocol;
    let has_ports = matches!(protocol, Protocol::TCP | Protocol::UDP | Protocol::SCTP);
    let start = usize::from(headers.transport);
    if has_ports {
        checksum::write(bytes, start, after.source.port.0);
        checksum::write(bytes, start + 2, after.destination.port.0);
    }
    let Some(field) = headers.checksum_offset() else {
        return;
    };
    // A quotation may end before the field.
    let Some(old) = checksum::read(bytes, field) else {
        return;
    };
    if protocol == Protocol::UDP && old == 0 {
        return;
    }
    let pseudo = addresses(&headers.tuple, after);
    let new = match form {
        Checksum::Partial => pseudo.of_partial(old),
        Checksum::Complete if has_ports => {
            pseudo.and(ports(&headers.tuple, after)).of_complete(old)
        }
        Checksum::Complete => pseudo.of_complete(old),
    };
    let new = match protocol {
        Protocol::UDP => checksum::never_zero(new),
        _ => new,
    };
    checksum::write(bytes, field, new);
}

#[inline]
fn addresses(before: &Tuple, after: &Tuple) -> Difference {
    let sum = |tuple: &Tuple| {
        Sum::address(&tuple.source.address) + Sum::address(&tuple.destination.address)
    };
    Difference::between(sum(before), sum(after))
}

#[inline]
fn ports(before: &Tuple, after: &Tuple) -> Difference {
    let sum = |tuple: &Tuple| Sum::word(tuple.source.port.0) + Sum::word(tuple.destination.port.0);
    Difference::between(sum(before), sum(after))
}

#[inline]
fn view<T>(bytes: &mut [u8]) -> Option<&mut T>
where
    T: zerocopy::FromBytes + zerocopy::IntoBytes + zerocopy::KnownLayout,
{
    T::mut_from_prefix(bytes).ok().map(|(header, _)| header)
}
