//! Parsing and rewriting against an independent parser, for both families.
//!
//! Every packet is built and judged by etherparse: what our parser says must agree with it, and after
//! a rewrite the addresses, ports and all checksums must be what it computes from nothing.

use std::net::{IpAddr, SocketAddr};

use dataplane::nat::rewrite::{self, Change, Checksum, InnerChange};
use dataplane::net::{Address, Endpoint, Protocol};
use dataplane::packet::checksum::{self, Sum};
use dataplane::packet::{
    self, Fragment, Headers, Icmp, ParseError, TcpFlags, Version, parse, parse_inner,
};
use etherparse::{
    IcmpEchoHeader, Icmpv4Type, Icmpv6Type, NetSlice, PacketBuilder, SlicedPacket, TransportSlice,
};
use proptest::prelude::*;

const NEAR: [u8; 6] = [2, 0, 0, 0, 0, 1];
const FAR: [u8; 6] = [2, 0, 0, 0, 0, 2];

#[test]
fn headers_say_what_the_packet_says() {
    for family in &FAMILIES {
        let bytes = tcp(family.client, family.frontend, b"hello");
        let headers = parse(&bytes).expect("a good packet");
        assert_eq!(headers.version, family.version);
        assert_eq!(headers.network, 14);
        assert_eq!(headers.transport, 14 + family.header);
        assert_eq!(headers.tuple.protocol, Protocol::TCP);
        assert_eq!(headers.tuple.source, end(family.client));
        assert_eq!(headers.tuple.destination, end(family.frontend));
        assert_eq!(headers.hop_limit, 64);
        assert_eq!(headers.tcp, TcpFlags::SYN);
        assert_eq!(headers.fragment, Fragment::None);
        assert_eq!(headers.icmp, None);
        assert_eq!(headers.end(), bytes.len());
        assert!(checksum::is_correct(&bytes, &headers));
    }
}

#[test]
fn a_frame_may_be_longer_than_its_packet() {
    for family in &FAMILIES {
        let mut bytes = udp(family.client, family.frontend, b"");
        let length = bytes.len();
        bytes.extend_from_slice(&[0xee; 18]);
        let headers = parse(&bytes).expect("a padded frame");
        assert_eq!(headers.end(), length);
        assert!(checksum::is_correct(&bytes, &headers));
    }
}

#[test]
fn a_packet_cut_anywhere_is_refused() {
    for family in &FAMILIES {
        for bytes in [
            tcp(family.client, family.frontend, b"hello"),
            udp(family.client, family.frontend, b"hello"),
            echo(family.client, family.frontend),
        ] {
            for length in 0..bytes.len() {
                assert_eq!(parse(&bytes[..length]), Err(ParseError::Truncated));
            }
        }
    }
}

#[test]
fn frames_that_are_not_plain_ip_are_named() {
    let mut bytes = tcp(FAMILIES[0].client, FAMILIES[0].frontend, b"");
    bytes[12..14].copy_from_slice(&[0x81, 0x00]);
    assert_eq!(parse(&bytes), Err(ParseError::Tagged));
    bytes[12..14].copy_from_slice(&[0x08, 0x06]);
    assert_eq!(parse(&bytes), Err(ParseError::NotIp));
    // Version and EtherType disagree.
    bytes[12..14].copy_from_slice(&[0x86, 0xdd]);
    assert_eq!(parse(&bytes), Err(ParseError::BadHeader));
}

#[test]
fn lengths_that_contradict_each_other_are_refused() {
    for family in &FAMILIES {
        let transport = 14 + usize::from(family.header);

        let mut bytes = udp(family.client, family.frontend, b"hello");
        bytes[transport + 5] += 1;
        assert_eq!(parse(&bytes), Err(ParseError::BadLength), "UDP too long");
        bytes[transport + 5] = 7;
        assert_eq!(parse(&bytes), Err(ParseError::BadLength), "UDP too short");

        let mut bytes = tcp(family.client, family.frontend, b"");
        bytes[transport + 12] = 0x60;
        assert_eq!(parse(&bytes), Err(ParseError::BadLength), "TCP options");
        bytes[transport + 12] = 0x40;
        assert_eq!(parse(&bytes), Err(ParseError::BadHeader), "TCP offset");
    }

    let mut bytes = tcp(FAMILIES[0].client, FAMILIES[0].frontend, b"");
    bytes[16..18].copy_from_slice(&19_u16.to_be_bytes());
    assert_eq!(parse(&bytes), Err(ParseError::BadLength), "IPv4 length");
    bytes[14] = 0x44;
    assert_eq!(
        parse(&bytes),
        Err(ParseError::BadHeader),
        "IPv4 header length"
    );
    // The packet ends inside the TCP header.
    let mut bytes = tcp(FAMILIES[1].client, FAMILIES[1].frontend, b"");
    bytes[18..20].copy_from_slice(&8_u16.to_be_bytes());
    assert_eq!(parse(&bytes), Err(ParseError::BadLength), "IPv6 length");
}

#[test]
fn options_of_ipv4_are_skipped() {
    let mut bytes = udp(FAMILIES[0].client, FAMILIES[0].frontend, b"hello");
    bytes[14] = 0x46;
    bytes[16..18].copy_from_slice(&37_u16.to_be_bytes());
    bytes.splice(34..34, [1, 1, 1, 0]);
    let headers = parse(&bytes).expect("options");
    assert_eq!(headers.transport, 38);
    assert_eq!(headers.tuple.destination, end(FAMILIES[0].frontend));
}

#[test]
fn extension_headers_are_walked_to_a_bound() {
    let family = &FAMILIES[1];
    let plain = udp(family.client, family.frontend, b"hello");

    let chain = [
        (0, option(60)),
        (60, option(43)),
        (43, option(60)),
        (60, option(17)),
    ];
    let headers = parse(&extended(&plain, &chain)).expect("four extension headers");
    assert_eq!(headers.tuple.protocol, Protocol::UDP);
    assert_eq!(headers.transport, 54 + 32);
    assert_eq!(headers.tuple.source, end(family.client));

    let mut longest: Vec<_> = vec![(60, option(60)); 8];
    longest[7] = (60, option(17));
    assert!(parse(&extended(&plain, &longest)).is_ok());
    longest.insert(0, (60, option(60)));
    assert_eq!(
        parse(&extended(&plain, &longest)),
        Err(ParseError::TooManyExtensions)
    );

    let late = [(60, option(0)), (0, option(17))];
    assert_eq!(parse(&extended(&plain, &late)), Err(ParseError::BadHeader));

    let routed = [(43, [17, 0, 0, 1, 0, 0, 0, 0])];
    assert_eq!(
        parse(&extended(&plain, &routed)),
        Err(ParseError::SourceRouted)
    );

    let long = [(60, [17, 255, 0, 0, 0, 0, 0, 0])];
    assert_eq!(parse(&extended(&plain, &long)), Err(ParseError::Truncated));
}

#[test]
fn fragments_are_told_apart() {
    for family in &FAMILIES {
        let plain = udp(family.client, family.frontend, b"hello");
        let first = parse(&fragment(&plain, family, 0, true)).expect("a first fragment");
        assert_eq!(first.fragment, Fragment::First);
        assert_eq!(first.identification, 0x1234);
        assert_eq!(first.tuple.source, end(family.client));

        let later = parse(&fragment(&plain, family, 3, false)).expect("a later fragment");
        assert_eq!(later.fragment, Fragment::Later);
        assert_eq!(later.identification, 0x1234);
        assert_eq!(later.tuple.source.address, end(family.client).address);
        assert_eq!(later.tuple.source.port.0, 0);
        assert_eq!(later.tuple.destination.port.0, 0);
        assert_eq!(later.checksum_offset(), None);
    }
    let atomic = fragment(
        &udp(FAMILIES[1].client, FAMILIES[1].frontend, b""),
        &FAMILIES[1],
        0,
        false,
    );
    let headers = parse(&atomic).expect("an atomic fragment");
    assert_eq!(headers.fragment, Fragment::None);
    assert_eq!(headers.tuple.source, end(FAMILIES[1].client));
}

#[test]
fn mapped_addresses_in_ipv6_are_refused() {
    let family = &FAMILIES[1];
    let bytes = tcp("[::ffff:192.0.2.1]:40000", family.frontend, b"");
    assert_eq!(parse(&bytes), Err(ParseError::BadHeader));
    let bytes = tcp(family.client, "[::ffff:192.0.2.1]:80", b"");
    assert_eq!(parse(&bytes), Err(ParseError::BadHeader));
}

#[test]
fn icmp_messages_are_told_apart() {
    for family in &FAMILIES {
        let request = parse(&echo(family.client, family.frontend)).expect("an echo request");
        assert_eq!(request.icmp, Some(Icmp::EchoRequest));
        let lost = tcp(family.frontend, family.client, b"hello");
        let bytes = error(family, family.client, family.frontend, &lost[14..]);
        let headers = parse(&bytes).expect("an ICMP error");
        let inner = headers.transport + 8;
        assert_eq!(headers.icmp, Some(Icmp::Error { inner }));
        let quoted = parse_inner(&bytes, inner).expect("a quoted packet");
        assert_eq!(quoted.tuple.source, end(family.frontend));
        assert_eq!(quoted.tuple.destination, end(family.client));
        // Eight bytes of the transport header suffice.
        let short = &lost[14..14 + usize::from(family.header) + 8];
        let bytes = error(family, family.client, family.frontend, short);
        let quoted = parse_inner(&bytes, inner).expect("a short quotation");
        assert_eq!(quoted.tuple.source, end(family.frontend));
        let bytes = error(
            family,
            family.client,
            family.frontend,
            &short[..short.len() - 1],
        );
        assert_eq!(parse_inner(&bytes, inner), Err(ParseError::Truncated));
    }
}

#[test]
fn protocols_without_ports_have_zeros() {
    for family in &FAMILIES {
        let mut bytes = tcp(family.client, family.frontend, b"");
        let at = if family.version == Version::V4 {
            23
        } else {
            20
        };
        bytes[at] = 47;
        let headers = parse(&bytes).expect("a GRE packet");
        assert_eq!(headers.tuple.protocol, Protocol(47));
        assert_eq!(headers.tuple.source.port.0, 0);
    }
}

#[test]
fn a_missing_udp_checksum_stays_missing() {
    let family = &FAMILIES[0];
    let mut bytes = udp(family.client, family.frontend, b"hello");
    bytes[40..42].copy_from_slice(&[0, 0]);
    let headers = parse(&bytes).expect("UDP without checksum");
    rewrite::apply(&mut bytes, &headers, &forward(family, Checksum::Complete));
    assert_eq!(&bytes[40..42], &[0, 0]);
    let headers = parse(&bytes).expect("the rewritten packet");
    assert_eq!(headers.tuple.destination, end(family.backend));
}

/// The payload makes the true sum zero after the rewrite, which UDP writes as 0xffff.
#[test]
fn a_udp_checksum_of_zero_is_written_as_ones() {
    for family in &FAMILIES {
        let find = |sum: u16| {
            let mut payload = *b"....";
            payload[2..].copy_from_slice(&sum.to_be_bytes());
            let wanted = udp(family.client, family.backend, &payload);
            let at = 14 + usize::from(family.header) + 6;
            (wanted[at..at + 2] == [0xff, 0xff]).then_some(payload)
        };
        let payload = (0..=u16::MAX).find_map(find).expect("some payload does");
        let mut bytes = udp(family.client, family.frontend, &payload);
        let headers = parse(&bytes).expect("a datagram");
        let change = Change {
            source: end(family.client),
            destination: end(family.backend),
            checksum: Checksum::Complete,
            decrement_hop_limit: false,
        };
        rewrite::apply(&mut bytes, &headers, &change);
        assert_eq!(bytes, udp(family.client, family.backend, &payload));
    }
}

#[test]
fn later_fragments_change_addresses_only() {
    for family in &FAMILIES {
        let plain = udp(family.client, family.frontend, b"hello, hello");
        let before = fragment(&plain, family, 3, false);
        let headers = parse(&before).expect("a later fragment");
        let mut bytes = before.clone();
        rewrite::apply(&mut bytes, &headers, &forward(family, Checksum::Complete));
        let transport = usize::from(headers.transport);
        assert_eq!(bytes[transport..], before[transport..]);
        let after = parse(&bytes).expect("the rewritten fragment");
        assert_eq!(after.tuple.source.address, end(family.masquerade).address);
        assert_eq!(after.tuple.destination.address, end(family.backend).address);
        if family.version == Version::V4 {
            assert_eq!(Sum::of(&bytes[14..34]).checksum(), 0);
        }
    }
}

#[test]
fn an_address_of_the_other_family_changes_nothing() {
    let [v4, v6] = &FAMILIES;
    for (family, other) in [(v4, v6), (v6, v4)] {
        let before = tcp(family.client, family.frontend, b"");
        let headers = parse(&before).expect("a good packet");
        let mut bytes = before.clone();
        rewrite::apply(&mut bytes, &headers, &forward(other, Checksum::Complete));
        assert_eq!(bytes, before);
    }
}

#[test]
fn icmp_errors_reach_the_client_with_its_own_packet_inside() {
    for family in &FAMILIES {
        // The client's packet went out masqueraded; the backend says it has no such port.
        let lost = udp(family.masquerade, family.backend, b"hello");
        let mut bytes = error(family, family.backend, family.masquerade, &lost[14..]);
        let headers = parse(&bytes).expect("an ICMP error");
        let change = InnerChange {
            source: end(family.frontend).address,
            destination: end(family.client).address,
            inner_source: end(family.client),
            inner_destination: end(family.frontend),
            decrement_hop_limit: false,
        };
        rewrite::inner(&mut bytes, &headers, &change);
        let sent = udp(family.client, family.frontend, b"hello");
        assert_eq!(
            bytes,
            error(family, family.frontend, family.client, &sent[14..])
        );
    }
}

#[test]
fn resets_answer_the_segment() {
    for family in &FAMILIES {
        let mut out = [0; 128];
        let syn = tcp(family.client, family.frontend, b"");
        let headers = parse(&syn).expect("a SYN");
        let length = packet::reply::tcp_reset(&syn, &headers, &mut out).expect("an answer");
        let (bytes, answer) = judged(&out[..length]);
        assert_eq!(answer.tuple, headers.tuple.reversed());
        assert_eq!(answer.tcp, TcpFlags::RST | TcpFlags::ACK);
        let at = usize::from(answer.transport);
        assert_eq!(
            bytes[at + 4..at + 12],
            [0, 0, 0, 0, 0, 0, 3, 0xe9],
            "1000 + 1"
        );
        assert_eq!(bytes[..6], NEAR);
        assert_eq!(bytes[6..12], FAR);

        let mut data = Vec::new();
        builder(family.client, family.frontend)
            .tcp(40_000, 80, 1000, 512)
            .ack(77)
            .write(&mut data, b"hello")
            .expect("a packet");
        let headers = parse(&data).expect("a data segment");
        let length = packet::reply::tcp_reset(&data, &headers, &mut out).expect("an answer");
        let (bytes, answer) = judged(&out[..length]);
        assert_eq!(answer.tcp, TcpFlags::RST);
        let at = usize::from(answer.transport);
        assert_eq!(bytes[at + 4..at + 12], [0, 0, 0, 77, 0, 0, 0, 0]);

        let reset = out[..length].to_vec();
        let headers = parse(&reset).expect("a reset");
        assert_eq!(packet::reply::tcp_reset(&reset, &headers, &mut out), None);
    }
}

#[test]
fn unreachable_quotes_the_packet() {
    for family in &FAMILIES {
        let mut out = [0; 2048];
        let payload = vec![7; 1400];
        let lost = udp(family.client, family.frontend, &payload);
        let headers = parse(&lost).expect("a datagram");
        let length = packet::reply::icmp_unreachable(&lost, &headers, &mut out).expect("an answer");
        let (bytes, answer) = judged(&out[..length]);
        assert_eq!(answer.tuple.source.address, end(family.frontend).address);
        assert_eq!(answer.tuple.destination.address, end(family.client).address);
        let at = usize::from(answer.transport);
        let (code, longest) = match family.version {
            Version::V4 => ([3, 3], 576),
            Version::V6 => ([1, 4], 1280),
        };
        assert_eq!(bytes[at..at + 2], code);
        assert_eq!(bytes.len(), 14 + longest);
        assert_eq!(bytes[at + 8..], lost[14..14 + bytes.len() - at - 8]);

        let headers = parse(&bytes).expect("an ICMP error");
        assert_eq!(
            packet::reply::icmp_unreachable(&bytes, &headers, &mut out),
            None,
            "no error is answered with an error"
        );
    }
}

#[test]
fn time_exceeded_comes_from_the_given_address() {
    for family in &FAMILIES {
        let mut out = [0; 256];
        let lost = tcp(family.client, family.frontend, b"hello");
        let headers = parse(&lost).expect("a segment");
        let source = end(family.masquerade).address;
        let length = packet::reply::icmp_time_exceeded(source, &lost, &headers, &mut out)
            .expect("an answer");
        let (bytes, answer) = judged(&out[..length]);
        assert_eq!(answer.tuple.source.address, source);
        let at = usize::from(answer.transport);
        let kind = match family.version {
            Version::V4 => [11, 0],
            Version::V6 => [3, 0],
        };
        assert_eq!(bytes[at..at + 2], kind);
        assert_eq!(bytes[at + 8..], lost[14..]);
    }
}

#[test]
fn too_big_tells_the_mtu() {
    for family in &FAMILIES {
        let mut out = [0; 2048];
        let lost = udp(family.client, family.frontend, &[7; 1400]);
        let headers = parse(&lost).expect("a datagram");
        let source = end(family.masquerade).address;
        let length = packet::reply::icmp_too_big(source, 1280, &lost, &headers, &mut out)
            .expect("an answer");
        let (bytes, answer) = judged(&out[..length]);
        let at = usize::from(answer.transport);
        let code = match family.version {
            Version::V4 => [3, 4],
            Version::V6 => [2, 0],
        };
        assert_eq!(bytes[at..at + 2], code);
        assert_eq!(bytes[at + 4..at + 8], [0, 0, 5, 0], "1280");
    }
}

#[test]
fn packets_without_a_sender_to_tell_are_not_answered() {
    let cases = [
        ("224.0.0.1:40000", "192.0.2.10:80"),
        ("0.0.0.0:40000", "192.0.2.10:80"),
        ("127.0.0.1:40000", "192.0.2.10:80"),
        ("255.255.255.255:40000", "192.0.2.10:80"),
        ("192.0.2.1:40000", "224.0.0.1:80"),
        ("192.0.2.1:40000", "255.255.255.255:80"),
        ("[ff02::1]:40000", "[2001:db8::10]:80"),
        ("[::]:40000", "[2001:db8::10]:80"),
        ("[::1]:40000", "[2001:db8::10]:80"),
        ("[2001:db8::1]:40000", "[ff02::1]:80"),
    ];
    let mut out = [0; 256];
    for (source, destination) in cases {
        let bytes = udp(source, destination, b"");
        let headers = parse(&bytes).expect("a datagram");
        let answer = packet::reply::icmp_unreachable(&bytes, &headers, &mut out);
        assert_eq!(answer, None, "{source} -> {destination}");
    }
    for family in &FAMILIES {
        let plain = udp(family.client, family.frontend, b"hello");
        let mut group = plain.clone();
        group[0] |= 1;
        let later = fragment(&plain, family, 3, false);
        for bytes in [group, later] {
            let headers = parse(&bytes).expect("a datagram");
            let answer = packet::reply::icmp_unreachable(&bytes, &headers, &mut out);
            assert_eq!(answer, None);
        }
        let headers = parse(&plain).expect("a datagram");
        for room in 0..14 + usize::from(family.header) + 8 {
            let answer = packet::reply::icmp_unreachable(&plain, &headers, &mut out[..room]);
            assert_eq!(answer, None, "no room");
        }
    }
}

#[test]
fn partial_checksums_are_seen_and_completed() {
    for family in &FAMILIES {
        for good in [
            tcp(family.client, family.frontend, b"hello"),
            udp(family.client, family.frontend, b"hello"),
        ] {
            let headers = parse(&good).expect("a good packet");
            assert!(!checksum::is_partial(&good, &headers));
            let mut bytes = good.clone();
            make_partial(&mut bytes, &headers);
            assert!(checksum::is_partial(&bytes, &headers));
            // Padding of a short frame is not part of the sum.
            bytes.extend_from_slice(&[0xee; 7]);
            checksum::complete(&mut bytes, &headers);
            assert_eq!(bytes[..good.len()], good);
        }
    }
}

proptest! {
    /// What etherparse builds, both parsers read alike.
    #[test]
    fn parsers_agree(built in any_packet()) {
        let headers = parse(&built).expect("a good packet");
        let seen = judge(&built);
        prop_assert_eq!(seen.source, socket(headers.tuple.source));
        prop_assert_eq!(seen.destination, socket(headers.tuple.destination));
        prop_assert_eq!(seen.hop_limit, headers.hop_limit);
        prop_assert!(checksum::is_correct(&built, &headers));
    }

    /// The rewritten packet is the packet that would have been built with the new ends.
    #[test]
    fn incremental_checksums_equal_full_ones(
        (built, change) in any_packet_and_change(Checksum::Complete),
    ) {
        let headers = parse(&built).expect("a good packet");
        let mut bytes = built;
        rewrite::apply(&mut bytes, &headers, &change);
        let seen = judge(&bytes);
        prop_assert_eq!(seen.source, socket(change.source));
        prop_assert_eq!(seen.destination, socket(change.destination));
        prop_assert!(seen.exact, "checksums are not what a full sum gives");
        let hop = u8::from(change.decrement_hop_limit);
        prop_assert_eq!(seen.hop_limit, headers.hop_limit.saturating_sub(hop));
    }

    #[test]
    fn rewrite_and_reverse_give_the_same_bytes(
        (built, mut change) in any_packet_and_change(Checksum::Complete),
        partial: bool,
    ) {
        change.decrement_hop_limit = false;
        let before = parse(&built).expect("a good packet");
        let mut bytes = built.clone();
        if partial {
            make_partial(&mut bytes, &before);
            change.checksum = Checksum::Partial;
        }
        let start = bytes.clone();
        rewrite::apply(&mut bytes, &before, &change);
        let after = parse(&bytes).expect("the rewritten packet");
        let back = Change {
            source: before.tuple.source,
            destination: before.tuple.destination,
            ..change
        };
        rewrite::apply(&mut bytes, &after, &back);
        prop_assert_eq!(bytes, start);
    }

    /// The device that completes the checksum after the rewrite gets it right.
    #[test]
    fn partial_checksums_stay_partial(
        (built, change) in any_packet_and_change(Checksum::Partial),
    ) {
        let before = parse(&built).expect("a good packet");
        let mut bytes = built;
        make_partial(&mut bytes, &before);
        rewrite::apply(&mut bytes, &before, &change);
        let after = parse(&bytes).expect("the rewritten packet");
        prop_assert!(checksum::is_partial(&bytes, &after));
        checksum::complete(&mut bytes, &after);
        let seen = judge(&bytes);
        prop_assert_eq!(seen.source, socket(change.source));
        prop_assert!(seen.exact);
    }

    /// Quotations of any length; the outer checksum stays right, and back is back.
    #[test]
    fn inner_rewrite_and_reverse_give_the_same_bytes(
        built in any_packet(),
        cut in 0_usize..600,
        ends in [any::<u128>(), any::<u128>(), any::<u128>(), any::<u128>()],
        ports: [u16; 2],
    ) {
        let lost = parse(&built).expect("a good packet");
        let family = &FAMILIES[usize::from(lost.version == Version::V6)];
        let least = usize::from(lost.transport) - 14 + 8;
        let quote = &built[14..built.len().min(14 + least.max(cut))];
        let start = error(family, family.backend, family.masquerade, quote);
        let headers = parse(&start).expect("an ICMP error");
        let [a, b, c, d] = ends.map(|bits| address(lost.version, bits));
        let change = InnerChange {
            source: a,
            destination: b,
            inner_source: Endpoint::new(c, dataplane::net::Port(ports[0])),
            inner_destination: Endpoint::new(d, dataplane::net::Port(ports[1])),
            decrement_hop_limit: false,
        };
        let mut bytes = start.clone();
        rewrite::inner(&mut bytes, &headers, &change);
        let seen = judge(&bytes);
        prop_assert_eq!(seen.source.ip(), a.to_ip());
        prop_assert_eq!(seen.destination.ip(), b.to_ip());
        prop_assert!(seen.exact);
        let after = parse(&bytes).expect("the rewritten error");
        let inner = parse_inner(&bytes, after.transport + 8).expect("the rewritten quotation");
        prop_assert_eq!(inner.tuple.source.address, c);
        if inner.icmp.is_none() {
            prop_assert_eq!(inner.tuple.destination, change.inner_destination);
        }
        let back = InnerChange {
            source: headers.tuple.source.address,
            destination: headers.tuple.destination.address,
            inner_source: lost.tuple.source,
            inner_destination: lost.tuple.destination,
            decrement_hop_limit: false,
        };
        rewrite::inner(&mut bytes, &after, &back);
        prop_assert_eq!(bytes, start);
    }

    /// Whatever parses can be rewritten, answered and completed; nothing panics.
    #[test]
    fn damaged_packets_do_no_harm(
        built in any_packet(),
        damage in proptest::collection::vec((0_usize..80, any::<u8>()), 1..4),
        length in 0_usize..200,
    ) {
        let mut bytes = built;
        for (at, value) in damage {
            if let Some(byte) = bytes.get_mut(at) {
                *byte = value;
            }
        }
        bytes.truncate(length.max(14));
        exercise(&mut bytes);
    }

    #[test]
    fn random_bytes_do_no_harm(
        mut bytes in proptest::collection::vec(any::<u8>(), 0..200),
        ether_type in prop::sample::select(vec![0x0800_u16, 0x86dd]),
    ) {
        if let Some(field) = bytes.get_mut(12..14) {
            field.copy_from_slice(&ether_type.to_be_bytes());
        }
        if let Some(first) = bytes.get_mut(14) {
            *first = if ether_type == 0x0800 { 0x45 } else { 0x60 };
        }
        exercise(&mut bytes);
    }

    /// One's complement sums are the sum of all words, whatever the length.
    #[test]
    fn sums_agree_with_the_plain_definition(bytes in proptest::collection::vec(any::<u8>(), 0..70)) {
        let mut plain = 0_u32;
        for word in bytes.chunks(2) {
            plain += u32::from(word[0]) << 8 | u32::from(*word.get(1).unwrap_or(&0));
        }
        while plain > 0xffff {
            plain = (plain & 0xffff) + (plain >> 16);
        }
        prop_assert_eq!(u32::from(Sum::of(&bytes).fold()), plain);
    }

    #[test]
    fn address_sums_are_sums_of_their_bytes(v4: bool, bits: u128) {
        let version = if v4 { Version::V4 } else { Version::V6 };
        let address = address(version, bits);
        let plain = match address.to_ip() {
            IpAddr::V4(ip) => Sum::of(&ip.octets()),
            IpAddr::V6(ip) => Sum::of(&ip.octets()),
        };
        prop_assert_eq!(Sum::address(&address), plain);
    }
}

struct Family {
    version: Version,
    header: u16,
    client: &'static str,
    frontend: &'static str,
    backend: &'static str,
    masquerade: &'static str,
}

static FAMILIES: [Family; 2] = [
    Family {
        version: Version::V4,
        header: 20,
        client: "192.0.2.1:40000",
        frontend: "198.51.100.10:80",
        backend: "203.0.113.20:8080",
        masquerade: "192.0.2.254:1024",
    },
    Family {
        version: Version::V6,
        header: 40,
        client: "[2001:db8:1::1]:40000",
        frontend: "[2001:db8:2::10]:80",
        backend: "[2001:db8:3::20]:8080",
        masquerade: "[2001:db8:1::254]:1024",
    },
];

fn forward(family: &Family, checksum: Checksum) -> Change {
    Change {
        source: end(family.masquerade),
        destination: end(family.backend),
        checksum,
        decrement_hop_limit: true,
    }
}

fn parsed(text: &str) -> SocketAddr {
    text.parse().expect("a literal address")
}

fn end(text: &str) -> Endpoint {
    // Not through IpAddr: an IPv4-mapped literal must stay IPv6.
    parsed(text).into()
}

fn socket(end: Endpoint) -> SocketAddr {
    SocketAddr::new(end.address.to_ip(), end.port.0)
}

fn address(version: Version, bits: u128) -> Address {
    let bytes = bits.to_be_bytes();
    match version {
        Version::V4 => Address::from_v4(*bytes.first_chunk().expect("sixteen bytes")),
        Version::V6 => {
            let mut bytes = bytes;
            bytes[0] = 0x20;
            Address::from_bytes(bytes)
        }
    }
}

fn builder(
    source: &str,
    destination: &str,
) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    ip(parsed(source).ip(), parsed(destination).ip(), 64)
}

fn ip(
    source: IpAddr,
    destination: IpAddr,
    hop_limit: u8,
) -> etherparse::PacketBuilderStep<etherparse::IpHeaders> {
    let frame = PacketBuilder::ethernet2(NEAR, FAR);
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            frame.ipv4(source.octets(), destination.octets(), hop_limit)
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            frame.ipv6(source.octets(), destination.octets(), hop_limit)
        }
        _ => panic!("two families"),
    }
}

/// A SYN.
fn tcp(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    builder(source, destination)
        .tcp(parsed(source).port(), parsed(destination).port(), 1000, 512)
        .syn()
        .write(&mut bytes, payload)
        .expect("a packet");
    bytes
}

fn udp(source: &str, destination: &str, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    builder(source, destination)
        .udp(parsed(source).port(), parsed(destination).port())
        .write(&mut bytes, payload)
        .expect("a packet");
    bytes
}

fn echo(source: &str, destination: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = builder(source, destination);
    let step_is_v4 = parsed(source).is_ipv4();
    if step_is_v4 {
        step.icmpv4_echo_request(1, 2).write(&mut bytes, b"hello")
    } else {
        step.icmpv6_echo_request(1, 2).write(&mut bytes, b"hello")
    }
    .expect("a packet");
    bytes
}

/// "Port unreachable" that quotes a packet.
fn error(family: &Family, source: &str, destination: &str, quote: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = builder(source, destination);
    match family.version {
        Version::V4 => step
            .icmpv4_raw(3, 3, [0; 4])
            .write(&mut bytes, quote)
            .expect("a packet"),
        Version::V6 => step
            .icmpv6_raw(1, 4, [0; 4])
            .write(&mut bytes, quote)
            .expect("a packet"),
    }
    bytes
}

/// An extension header of eight bytes with nothing in it but padding.
fn option(next_header: u8) -> [u8; 8] {
    [next_header, 0, 1, 0, 0, 0, 0, 0]
}

/// Puts extension headers, each with its own number, behind the IPv6 header.
fn extended(plain: &[u8], chain: &[(u8, [u8; 8])]) -> Vec<u8> {
    let mut bytes = plain.to_vec();
    bytes[20] = chain[0].0;
    let all: Vec<u8> = chain.iter().flat_map(|(_, header)| *header).collect();
    let length =
        u16::from_be_bytes([bytes[18], bytes[19]]) + u16::try_from(all.len()).expect("short");
    bytes[18..20].copy_from_slice(&length.to_be_bytes());
    bytes.splice(54..54, all);
    bytes
}

/// Marks a packet as a fragment at `offset` units of eight bytes.
fn fragment(plain: &[u8], family: &Family, offset: u8, more: bool) -> Vec<u8> {
    if family.version == Version::V6 {
        let header = [17, 0, 0, offset << 3 | u8::from(more), 0, 0, 0x12, 0x34];
        return extended(plain, &[(44, header)]);
    }
    let mut bytes = plain.to_vec();
    bytes[18..20].copy_from_slice(&[0x12, 0x34]);
    bytes[20..22].copy_from_slice(&[u8::from(more) << 5, offset]);
    bytes[24..26].copy_from_slice(&[0, 0]);
    let checksum = Sum::of(&bytes[14..34]).checksum();
    bytes[24..26].copy_from_slice(&checksum.to_be_bytes());
    bytes
}

/// Replaces the transport checksum by the folded pseudo-header sum, as Linux leaves it.
fn make_partial(bytes: &mut [u8], headers: &Headers) {
    let Some(at) = headers.checksum_offset() else {
        return;
    };
    let sum = Sum::pseudo_header(&headers.tuple, headers.transport_length()).fold();
    bytes[at..at + 2].copy_from_slice(&sum.to_be_bytes());
}

/// What etherparse sees.
struct Seen {
    source: SocketAddr,
    destination: SocketAddr,
    hop_limit: u8,
    /// Every checksum has the very value that a full computation gives.
    exact: bool,
}

fn judge(bytes: &[u8]) -> Seen {
    let sliced = SlicedPacket::from_ethernet(bytes).expect("etherparse reads it");
    let (source, destination, hop_limit, header): (IpAddr, IpAddr, u8, bool) = match &sliced.net {
        Some(NetSlice::Ipv4(net)) => {
            let header = net.header().to_header();
            (
                net.header().source_addr().into(),
                net.header().destination_addr().into(),
                header.time_to_live,
                header.header_checksum == header.calc_header_checksum(),
            )
        }
        Some(NetSlice::Ipv6(net)) => (
            net.header().source_addr().into(),
            net.header().destination_addr().into(),
            net.header().hop_limit(),
            true,
        ),
        _ => panic!("not IP"),
    };
    let (ports, transport) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => {
            let full = match (source, destination) {
                (IpAddr::V4(s), IpAddr::V4(d)) => tcp.calc_checksum_ipv4(s.octets(), d.octets()),
                (IpAddr::V6(s), IpAddr::V6(d)) => tcp.calc_checksum_ipv6(s.octets(), d.octets()),
                _ => panic!("two families"),
            };
            let ports = (tcp.source_port(), tcp.destination_port());
            (ports, full.expect("short enough") == tcp.checksum())
        }
        Some(TransportSlice::Udp(udp)) => {
            let header = udp.to_header();
            let full = match (source, destination) {
                (IpAddr::V4(s), IpAddr::V4(d)) => {
                    header.calc_checksum_ipv4_raw(s.octets(), d.octets(), udp.payload())
                }
                (IpAddr::V6(s), IpAddr::V6(d)) => {
                    header.calc_checksum_ipv6_raw(s.octets(), d.octets(), udp.payload())
                }
                _ => panic!("two families"),
            };
            let ports = (udp.source_port(), udp.destination_port());
            (ports, full.expect("short enough") == udp.checksum())
        }
        Some(TransportSlice::Icmpv4(icmp)) => {
            let full = icmp.icmp_type().calc_checksum(icmp.payload());
            ((0, 0), full == icmp.checksum())
        }
        Some(TransportSlice::Icmpv6(icmp)) => {
            let (IpAddr::V6(s), IpAddr::V6(d)) = (source, destination) else {
                panic!("two families");
            };
            let full = icmp
                .icmp_type()
                .calc_checksum(s.octets(), d.octets(), icmp.payload());
            ((0, 0), full.expect("short enough") == icmp.checksum())
        }
        _ => panic!("no transport"),
    };
    Seen {
        source: SocketAddr::new(source, ports.0),
        destination: SocketAddr::new(destination, ports.1),
        hop_limit,
        exact: header && transport,
    }
}

/// Parses an answer of ours, having had it judged.
fn judged(bytes: &[u8]) -> (Vec<u8>, Headers) {
    assert!(judge(bytes).exact);
    (bytes.to_vec(), parse(bytes).expect("our own packet"))
}

fn any_ends() -> impl Strategy<Value = (Version, [Address; 4])> {
    (any::<bool>(), any::<[u128; 4]>()).prop_map(|(v4, bits)| {
        let version = if v4 { Version::V4 } else { Version::V6 };
        (version, bits.map(|bits| address(version, bits)))
    })
}

fn any_payload() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        proptest::collection::vec(any::<u8>(), 0..64),
        proptest::collection::vec(any::<u8>(), 1400..1500),
        // What folds to zero and ones.
        proptest::collection::vec(prop::sample::select(vec![0_u8, 0xff]), 0..32),
    ]
}

fn build(
    kind: u8,
    source: &Address,
    destination: &Address,
    ports: [u16; 2],
    hop_limit: u8,
    payload: &[u8],
) -> Vec<u8> {
    let mut bytes = Vec::new();
    let step = ip(source.to_ip(), destination.to_ip(), hop_limit);
    let [from, to] = ports;
    let echo = IcmpEchoHeader { id: from, seq: to };
    match kind {
        0 => step
            .tcp(from, to, 1, 2)
            .ack(9)
            .write(&mut bytes, payload)
            .expect("a packet"),
        1 => step
            .tcp(from, to, 1, 2)
            .syn()
            .options_raw(&[2, 4, 5, 0xb4])
            .expect("good options")
            .write(&mut bytes, payload)
            .expect("a packet"),
        2 => step
            .udp(from, to)
            .write(&mut bytes, payload)
            .expect("a packet"),
        _ if source.is_v4() => step
            .icmpv4(Icmpv4Type::EchoReply(echo))
            .write(&mut bytes, payload)
            .expect("a packet"),
        _ => step
            .icmpv6(Icmpv6Type::EchoReply(echo))
            .write(&mut bytes, payload)
            .expect("a packet"),
    }
    bytes
}

fn any_packet() -> impl Strategy<Value = Vec<u8>> {
    (
        0_u8..4,
        any_ends(),
        any::<[u16; 2]>(),
        any::<u8>(),
        any_payload(),
    )
        .prop_map(|(kind, (_, ends), ports, hop_limit, payload)| {
            build(kind, &ends[0], &ends[1], ports, hop_limit, &payload)
        })
}

/// TCP and UDP only: an echo's "ports" would be its number.
fn any_packet_and_change(checksum: Checksum) -> impl Strategy<Value = (Vec<u8>, Change)> {
    (
        0_u8..3,
        any_ends(),
        any::<[u16; 4]>(),
        any::<u8>(),
        any_payload(),
        any::<bool>(),
    )
        .prop_map(move |(kind, (_, ends), ports, hop_limit, payload, hop)| {
            let [a, b, c, d] = ends;
            let [e, f, g, h] = ports;
            let change = Change {
                source: Endpoint::new(c, dataplane::net::Port(g)),
                destination: Endpoint::new(d, dataplane::net::Port(h)),
                checksum,
                decrement_hop_limit: hop,
            };
            (build(kind, &a, &b, [e, f], hop_limit, &payload), change)
        })
}

/// Everything that the engine may do with a packet that parses.
fn exercise(bytes: &mut [u8]) {
    let Ok(headers) = parse(bytes) else {
        return;
    };
    let family = &FAMILIES[usize::from(headers.version == Version::V6)];
    let mut out = [0; 1500];
    let _ = packet::reply::tcp_reset(bytes, &headers, &mut out);
    let _ = packet::reply::icmp_unreachable(bytes, &headers, &mut out);
    let _ = checksum::is_partial(bytes, &headers);
    let _ = checksum::is_correct(bytes, &headers);
    let change = InnerChange {
        source: end(family.frontend).address,
        destination: end(family.client).address,
        inner_source: end(family.client),
        inner_destination: end(family.frontend),
        decrement_hop_limit: true,
    };
    rewrite::inner(bytes, &headers, &change);
    rewrite::apply(bytes, &headers, &forward(family, Checksum::Complete));
    rewrite::apply(bytes, &headers, &forward(family, Checksum::Partial));
    checksum::complete(bytes, &headers);
}
