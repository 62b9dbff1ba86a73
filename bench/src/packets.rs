//! Frames for the benches, built by an independent library so that a bench cannot flatter our own.

use std::net::IpAddr;

use dataplane::net::{Protocol, Tuple};
use etherparse::PacketBuilder;

/// A frame of this tuple with `payload` bytes of payload and right checksums. Anything but TCP
/// becomes UDP.
///
/// # Panics
/// If the tuple mixes families or the payload does not fit a packet.
#[must_use]
pub fn frame(tuple: &Tuple, payload: usize) -> Vec<u8> {
    written(tuple, payload, false)
}

/// The same as the first packet of a connection: TCP's SYN flag alone is set.
///
/// # Panics
/// As `frame`.
#[must_use]
pub fn opening(tuple: &Tuple, payload: usize) -> Vec<u8> {
    written(tuple, payload, true)
}

fn written(tuple: &Tuple, payload: usize, opens: bool) -> Vec<u8> {
    let mut bytes = Vec::new();
    let payload = vec![0xa5; payload];
    let ends = (tuple.source.port.0, tuple.destination.port.0);
    let start = PacketBuilder::ethernet2([2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]);
    let ip = match (
        tuple.source.address.to_ip(),
        tuple.destination.address.to_ip(),
    ) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            start.ipv4(source.octets(), destination.octets(), 64)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            start.ipv6(source.octets(), destination.octets(), 64)
        }
        _ => panic!("a tuple of two families"),
    };
    let written = if tuple.protocol == Protocol::TCP {
        let tcp = ip.tcp(ends.0, ends.1, 1000, 512);
        let tcp = if opens { tcp.syn() } else { tcp.ack(1) };
        tcp.write(&mut bytes, &payload)
    } else {
        ip.udp(ends.0, ends.1).write(&mut bytes, &payload)
    };
    written.expect("a payload that fits a packet");
    bytes
}
