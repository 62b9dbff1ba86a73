//! An ICMP error that quotes any bytes: its translation does not panic, keeps a right checksum right,
//! and touches nothing but addresses, ports and checksums.

#![no_main]

use dataplane::nat::rewrite::{self, InnerChange};
use dataplane::net::{Address, Endpoint, Port};
use dataplane::packet::{Icmp, Version, checksum, parse, parse_inner};
use etherparse::PacketBuilder;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, quote)) = data.split_first() else {
        return;
    };
    let mut bytes = Vec::new();
    let frame = PacketBuilder::ethernet2([2; 6], [4; 6]);
    if choice & 1 == 0 {
        let step = frame.ipv4([192, 0, 2, 1], [192, 0, 2, 2], 64);
        let step = step.icmpv4_raw([3, 4, 5, 11, 12][usize::from(choice >> 1) % 5], 3, [0; 4]);
        step.write(&mut bytes, quote).expect("short enough");
    } else {
        let step = frame.ipv6([0x20; 16], [0x21; 16], 64);
        let step = step.icmpv6_raw([1, 2, 3, 4][usize::from(choice >> 1) % 4], 4, [0; 4]);
        step.write(&mut bytes, quote).expect("short enough");
    }
    let headers = parse(&bytes).expect("a packet of an independent library");
    assert!(checksum::is_correct(&bytes, &headers));
    let Some(Icmp::Error { inner }) = headers.icmp else {
        panic!("an error is not seen as one");
    };
    let before = parse_inner(&bytes, inner);

    let end = |last: u8| {
        let address = match headers.version {
            Version::V4 => Address::from_v4([203, 0, 113, last]),
            Version::V6 => Address::from_bytes([last; 16]),
        };
        Endpoint::new(address, Port(1000 + u16::from(last)))
    };
    let change = InnerChange {
        source: end(1).address,
        destination: end(2).address,
        inner_source: end(3),
        inner_destination: end(4),
        decrement_hop_limit: choice & 0x80 != 0,
    };
    let length = bytes.len();
    rewrite::inner(&mut bytes, &headers, &change);
    assert_eq!(bytes.len(), length);
    let after = parse(&bytes).expect("a rewritten error parses");
    assert!(checksum::is_correct(&bytes, &after));
    if let Ok(before) = before
        && before.version == headers.version
    {
        let quoted = parse_inner(&bytes, inner).expect("a rewritten quotation parses");
        assert_eq!(quoted.tuple.source.address, change.inner_source.address);
        assert_eq!(quoted.transport, before.transport);
        assert_eq!(after.tuple.source.address, change.source);
    } else {
        assert_eq!(after, headers, "what cannot be read is left alone");
    }
});
