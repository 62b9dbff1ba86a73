//! Sequences of packets through the whole pipeline: it does not panic, and what it sends parses.
//!
//! The input is a list of steps of eight bytes: a kind of packet, a door, and up to two bytes of the
//! packet to overwrite. So most packets get far, and later ones meet the flows of earlier ones.

#![no_main]

#[path = "../tests/bed/mod.rs"]
#[expect(dead_code, reason = "the table test uses the rest")]
mod bed;

use bed::{Bed, FAMILIES, Family};
use dataplane::command::Hook;
use dataplane::net::Direction;
use dataplane::packet::parse;
use dataplane::pipeline::Verdict;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((&choice, steps)) = data.split_first() else {
        return;
    };
    let family = &FAMILIES[usize::from(choice & 1)];
    let mut bed = Bed::with_workers(family, 1 + u16::from(choice >> 7));
    for step in steps.as_chunks::<8>().0.iter().take(64) {
        perform(&mut bed, family, step);
    }
});

fn perform(bed: &mut Bed, family: &Family, step: &[u8; 8]) {
    let [kind, door, port, from, at, value, at_too, value_too] = *step;
    let mut bytes = packet(bed, family, kind, port, from);
    let last = bytes.len() - 1;
    if at != 0 {
        bytes[usize::from(at).min(last)] = value;
    }
    if at_too != 0 {
        bytes[usize::from(at_too).min(last)] = value_too;
    }
    if door & 0x40 != 0 {
        bytes.truncate(usize::from(value));
    }
    let ifindex = [2, 10, 11, 12][usize::from(door >> 4 & 3)];
    let hook = if door & 4 == 0 {
        Hook::Ingress
    } else {
        Hook::Egress
    };
    let direction = if door & 8 == 0 {
        Direction::Original
    } else {
        Direction::Reply
    };
    let (verdict, sent) = match door & 3 {
        0 => bed.by_uplink(bytes),
        1 => bed.by_host(bytes),
        2 if door & 0x80 == 0 => bed.steered(ifindex, hook, direction, bytes),
        2 => bed.steered_super(ifindex, hook, direction, bytes),
        _ => bed.steered_partial(ifindex, hook, direction, bytes),
    };
    match verdict {
        Verdict::Transmit(_) => assert!(parse(&sent.0).is_ok()),
        Verdict::Reject => assert!(parse(&bed.answer().0).is_ok()),
        Verdict::Punt | Verdict::Drop(_) | Verdict::HandOver(_) => {}
    }
    bed.events();
    match kind >> 5 {
        5 => bed.forget_neighbors(),
        6 => bed.drain_pod_a(),
        7 => bed.remove_pod_a(),
        _ => {}
    }
}

fn packet(bed: &Bed, family: &Family, kind: u8, port: u8, from: u8) -> Vec<u8> {
    let port = 40_000 + u16::from(port & 3);
    let source = [family.client, family.pod_a, family.pod_b, family.node][usize::from(from & 3)];
    let (to, to_port) = [
        (family.vip, 80),
        (family.both, 80),
        (family.empty, 80),
        (family.node, bed::NODE_PORT_LOCAL),
        (family.node, bed::NODE_PORT_REMOTE),
        (family.node, 1024 + u16::from(from)),
        (family.pod_a, 8080),
        (family.vip, 9),
    ][usize::from(kind & 7)];
    match kind >> 3 & 3 {
        0 => bed.syn(source, port, to, to_port),
        1 => bed.ack(source, port, to, to_port),
        2 => bed.udp(source, port, to, to_port),
        _ => bed.syn_ack(family.pod_a, 8080, source, port),
    }
}
