//! Bytes to `Headers`: what the engine needs to know of a packet, as offsets and small values.
//!
//! `parse` reads Ethernet, IPv4 or IPv6 with a bounded chain of extension headers, and the first
//! bytes of TCP, UDP, SCTP and ICMP. It never looks at payload, never verifies a checksum (an
//! incremental update keeps a wrong one wrong, so the receiver still sees it) and never keeps a
//! reference into the packet. A packet that parses can be rewritten without a further check: every
//! header that `Headers` points to lies within the bytes.
//!
//! Read first: RFC 791 section 3.1, RFC 8200 section 4, RFC 1858 (tiny fragments).

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod checksum;
pub mod ethernet;
pub mod icmp;
pub mod ipv4;
pub mod ipv6;
pub mod reply;
pub mod sctp;
pub mod tcp;
pub mod udp;

use zerocopy::FromBytes;

use crate::net::{Address, Endpoint, Port, Protocol, Tuple};
use ethernet::EtherType;
pub use icmp::Icmp;
pub use tcp::TcpFlags;

/// Where the headers of a packet lie, and what they say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Headers {
    /// IPv4 or IPv6.
    pub version: Version,
    /// Offset of the IP header.
    pub network: u16,
    /// Offset of what follows the IP header and its extensions.
    pub transport: u16,
    /// Length of the IP packet; the frame may be longer (Ethernet padding).
    pub length: u32,
    /// Protocol and both ends. Ports are zero where the protocol has none, and in later fragments.
    pub tuple: Tuple,
    /// IPv4 time to live, IPv6 hop limit.
    pub hop_limit: u8,
    /// TCP's flags; none set where the packet is not TCP or is a later fragment.
    pub tcp: TcpFlags,
    /// Whether it is a piece of a larger packet.
    pub fragment: Fragment,
    /// The number that all fragments of one packet share; zero where it is not a fragment.
    pub identification: u32,
    /// What kind of ICMP message it is, if it is one.
    pub icmp: Option<Icmp>,
}

impl Headers {
    /// Offset of the first byte behind the IP packet.
    #[must_use]
    pub const fn end(&self) -> usize {
        self.network as usize + self.length as usize
    }

    /// Bytes of the IP packet from the transport header on, as a pseudo-header counts them.
    #[must_use]
    pub const fn transport_length(&self) -> u32 {
        self.length
            .saturating_sub(self.transport.saturating_sub(self.network) as u32)
    }

    /// Whether the transport header is in this packet.
    #[must_use]
    pub fn has_transport(&self) -> bool {
        self.fragment != Fragment::Later
    }

    /// Offset of the transport checksum that covers the pseudo-header, if the protocol has one and
    /// this packet carries it.
    #[must_use]
    pub fn checksum_offset(&self) -> Option<usize> {
        if !self.has_transport() {
            return None;
        }
        let within = match self.tuple.protocol {
            Protocol::TCP => tcp::CHECKSUM,
            Protocol::UDP => udp::CHECKSUM,
            Protocol::ICMPV6 => icmp::CHECKSUM,
            _ => return None,
        };
        Some(usize::from(self.transport) + within)
    }
}

/// The IP version of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Version {
    /// RFC 791.
    V4,
    /// RFC 8200.
    V6,
}

/// Whether a packet is a piece of a larger one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Fragment {
    /// A whole packet.
    None,
    /// The first piece: it holds the transport header.
    First,
    /// A later piece: it holds payload only.
    Later,
}

/// Why a packet cannot be read. Each is a reason to drop or to pass it on, none is a fault of ours.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, thiserror::Error)]
pub enum ParseError {
    /// The bytes end before the headers, or before the length that the IP header claims.
    #[error("the packet is cut short")]
    Truncated,
    /// A VLAN tag stands before the IP header.
    #[error("the frame carries a VLAN tag")]
    Tagged,
    /// Neither IPv4 nor IPv6.
    #[error("the frame is not IP")]
    NotIp,
    /// A length field contradicts another.
    #[error("a length field contradicts another")]
    BadLength,
    /// A field holds what no sender may write.
    #[error("a header field is invalid")]
    BadHeader,
    /// An IPv6 routing header with segments left: the destination is not the last one.
    #[error("the packet is source-routed")]
    SourceRouted,
    /// More IPv6 extension headers than `ipv6::EXTENSIONS`.
    #[error("too many extension headers")]
    TooManyExtensions,
}

/// Reads a frame that begins with its Ethernet header.
///
/// # Errors
/// Says why the engine cannot take the packet.
#[inline]
pub fn parse(bytes: &[u8]) -> Result<Headers, ParseError> {
    let (frame, _) = ethernet::Header::ref_from_prefix(bytes).map_err(|_| ParseError::Truncated)?;
    let network = ethernet::LENGTH;
    let whole = Extent::Whole;
    match frame.ether_type() {
        EtherType::IPV4 => network_v4(bytes, network, whole),
        EtherType::IPV6 => network_v6(bytes, network, whole),
        EtherType::VLAN | EtherType::SERVICE_VLAN => Err(ParseError::Tagged),
        _ => Err(ParseError::NotIp),
    }
}

/// Reads the packet that an ICMP error quotes. `offset` is what `Icmp::Error` says. The quotation
/// may end after the first eight bytes of the transport header (RFC 792), so `length` and whatever
/// lies behind those eight bytes must not be trusted.
///
/// # Errors
/// Says why the quoted packet cannot be read.
pub fn parse_inner(bytes: &[u8], offset: u16) -> Result<Headers, ParseError> {
    let start = usize::from(offset);
    let first = bytes.get(start).ok_or(ParseError::Truncated)?;
    match first >> 4 {
        4 => network_v4(bytes, start, Extent::Quoted),
        6 => network_v6(bytes, start, Extent::Quoted),
        _ => Err(ParseError::BadHeader),
    }
}

/// How much of the packet must be there.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extent {
    /// All of it.
    Whole,
    /// Headers and eight bytes.
    Quoted,
}

fn network_v4(bytes: &[u8], network: usize, extent: Extent) -> Result<Headers, ParseError> {
    let rest = bytes.get(network..).ok_or(ParseError::Truncated)?;
    let (header, _) = ipv4::Header::ref_from_prefix(rest).map_err(|_| ParseError::Truncated)?;
    if header.version() != 4 || header.length() < ipv4::LENGTH {
        return Err(ParseError::BadHeader);
    }
    let total = usize::from(header.total_length.get());
    if total < header.length() {
        return Err(ParseError::BadLength);
    }
    if rest.len() < header.length() || (extent == Extent::Whole && rest.len() < total) {
        return Err(ParseError::Truncated);
    }
    let fragment = header.fragment_state();
    let headers = Headers {
        version: Version::V4,
        network: offset(network)?,
        transport: offset(network + header.length())?,
        length: u32::from(header.total_length.get()),
        tuple: addresses(
            header.protocol,
            Address::from_v4(header.source),
            Address::from_v4(header.destination),
        ),
        hop_limit: header.hop_limit,
        tcp: TcpFlags::NONE,
        fragment,
        identification: if fragment == Fragment::None {
            0
        } else {
            u32::from(header.identification.get())
        },
        icmp: None,
    };
    transport(bytes, headers, extent)
}

fn network_v6(bytes: &[u8], network: usize, extent: Extent) -> Result<Headers, ParseError> {
    let rest = bytes.get(network..).ok_or(ParseError::Truncated)?;
    let (header, _) = ipv6::Header::ref_from_prefix(rest).map_err(|_| ParseError::Truncated)?;
    if header.version() != 6 {
        return Err(ParseError::BadHeader);
    }
    let length = ipv6::LENGTH + usize::from(header.payload_length.get());
    if extent == Extent::Whole && rest.len() < length {
        return Err(ParseError::Truncated);
    }
    let source = Address::from_bytes(header.source);
    let destination = Address::from_bytes(header.destination);
    // An IPv4-mapped address on the wire would be taken for IPv4 by every table.
    if source.is_v4() || destination.is_v4() {
        return Err(ParseError::BadHeader);
    }
    let packet = rest.get(..length).unwrap_or(rest);
    let chain = ipv6::walk(packet, header.next_header)?;
    let headers = Headers {
        version: Version::V6,
        network: offset(network)?,
        transport: offset(network + chain.transport)?,
        length: u32::try_from(length).map_err(|_| ParseError::BadLength)?,
        tuple: addresses(chain.protocol, source, destination),
        hop_limit: header.hop_limit,
        tcp: TcpFlags::NONE,
        fragment: chain.fragment,
        identification: chain.identification,
        icmp: None,
    };
    transport(bytes, headers, extent)
}

/// Fills in ports, flags and ICMP kind.
#[inline]
fn transport(bytes: &[u8], mut headers: Headers, extent: Extent) -> Result<Headers, ParseError> {
    if headers.fragment == Fragment::Later {
        return Ok(headers);
    }
    let end = bytes.len().min(headers.end());
    let segment = bytes
        .get(usize::from(headers.transport)..end)
        .ok_or(ParseError::BadLength)?;
    let version = headers.version;
    match headers.tuple.protocol {
        Protocol::TCP if extent == Extent::Whole => {
            let header = tcp::read(segment)?;
            ports(
                &mut headers.tuple,
                header.source.get(),
                header.destination.get(),
            );
            headers.tcp = header.flags;
        }
        Protocol::UDP if extent == Extent::Whole => {
            let header = udp::read(segment, headers.fragment == Fragment::None)?;
            ports(
                &mut headers.tuple,
                header.source.get(),
                header.destination.get(),
            );
        }
        Protocol::SCTP if extent == Extent::Whole => {
            let header = sctp::read(segment)?;
            ports(
                &mut headers.tuple,
                header.source.get(),
                header.destination.get(),
            );
        }
        Protocol::TCP | Protocol::UDP | Protocol::SCTP => {
            let quoted = udp::quoted(segment)?;
            ports(
                &mut headers.tuple,
                quoted.source.get(),
                quoted.destination.get(),
            );
        }
        Protocol::ICMP if version == Version::V4 => {
            headers.icmp = Some(icmp::kind_v4(segment, headers.transport)?);
        }
        Protocol::ICMPV6 if version == Version::V6 => {
            headers.icmp = Some(icmp::kind_v6(segment, headers.transport)?);
        }
        _ => {}
    }
    Ok(headers)
}

fn ports(tuple: &mut Tuple, source: u16, destination: u16) {
    tuple.source.port = Port(source);
    tuple.destination.port = Port(destination);
}

const fn addresses(protocol: Protocol, source: Address, destination: Address) -> Tuple {
    Tuple {
        protocol,
        source: Endpoint::new(source, Port(0)),
        destination: Endpoint::new(destination, Port(0)),
    }
}

fn offset(value: usize) -> Result<u16, ParseError> {
    u16::try_from(value).map_err(|_| ParseError::BadLength)
}
