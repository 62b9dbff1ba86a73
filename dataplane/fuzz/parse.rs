//! Any bytes: the parser does not panic, and what it says holds for whoever uses it.
//!
//! Whatever parses may be summed, completed, answered and rewritten; an answer of ours parses and its
//! checksums are right; a translation keeps a right checksum right and a partial one partial.

#![no_main]

use dataplane::nat::rewrite::{self, Change, Checksum};
use dataplane::net::{Address, Endpoint, Port};
use dataplane::packet::{Headers, Version, checksum, parse, reply};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(headers) = parse(data) else {
        return;
    };
    assert!(headers.network <= headers.transport);
    assert!(usize::from(headers.transport) <= headers.end() && headers.end() <= data.len());
    assert!(headers.tuple.source.address.is_v4() == (headers.version == Version::V4));

    let mut out = [0; 1536];
    let answers = [
        reply::tcp_reset(data, &headers, &mut out),
        reply::icmp_unreachable(data, &headers, &mut out),
        reply::icmp_time_exceeded(own(&headers).address, data, &headers, &mut out),
    ];
    if let Some(length) = answers[2] {
        let answer = parse(&out[..length]).expect("our own packet parses");
        assert!(checksum::is_correct(&out[..length], &answer));
    }

    let mut bytes = data.to_vec();
    let form = if checksum::is_partial(data, &headers) {
        Checksum::Partial
    } else {
        Checksum::Complete
    };
    let there = Change {
        source: own(&headers),
        destination: own(&headers),
        checksum: form,
        decrement_hop_limit: false,
    };
    rewrite::apply(&mut bytes, &headers, &there);
    let after = parse(&bytes).expect("a rewritten packet parses");
    // The other way round does not hold: a complete checksum may look partial by chance.
    match form {
        Checksum::Partial => assert!(checksum::is_partial(&bytes, &after)),
        Checksum::Complete => {
            let was_correct = checksum::is_correct(data, &headers);
            assert!(!was_correct || checksum::is_correct(&bytes, &after));
        }
    }
    checksum::complete(&mut bytes, &after);
});

/// An end of this node, in the packet's family.
fn own(headers: &Headers) -> Endpoint {
    let address = match headers.version {
        Version::V4 => Address::from_v4([192, 0, 2, 10]),
        Version::V6 => {
            Address::from_bytes([0x20, 1, 0xd, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1])
        }
    };
    Endpoint::new(address, Port(1024))
}
