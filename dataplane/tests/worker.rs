//! The worker loop over in-memory devices: hand-over, the maps, and what returns to zero.

mod bed;
mod crew;

use bed::{Bed, FAMILIES};
use crew::Crew;
use dataplane::counters::DropReason;

#[test]
fn flows_from_any_queue_are_served_by_their_owner_and_replies_find_it() {
    for family in &FAMILIES {
        let bed = Bed::new(family);
        let mut crew = Crew::new(2, bed.snapshot());
        for port in 40_000..40_064 {
            let syn = bed.syn(family.client, port, family.node, bed::NODE_PORT_REMOTE);
            crew.by_wire(usize::from(port % 2), &syn);
        }
        crew.settle();
        let sent = crew.sent_by_wire();
        assert_eq!(sent.len(), 64);
        for (packet, queue) in sent.iter().zip([0, 1].into_iter().cycle()) {
            packet.assert_checksums();
            let (_, port, backend, to) = packet.ends();
            crew.by_wire(queue, &bed.syn_ack(backend, to, family.node, port));
        }
        crew.settle();
        let replies = crew.sent_by_wire();
        let mut clients: Vec<_> = replies.iter().map(|packet| packet.ends().3).collect();
        clients.sort_unstable();
        assert_eq!(clients, (40_000..40_064).collect::<Vec<_>>());
        let shares: Vec<_> = crew
            .workers
            .iter()
            .map(|worker| worker.pipeline().flows().len())
            .collect();
        assert!(shares.iter().all(|&share| share > 16), "{shares:?}");
        let handed: u64 = crew
            .workers
            .iter()
            .map(|worker| worker.counters().handed_in)
            .sum();
        assert!(handed > 0);
        crew.assert_whole();
    }
}

#[test]
fn flows_and_tuples_return_to_zero() {
    for family in &FAMILIES {
        let bed = Bed::new(family);
        let mut crew = Crew::new(2, bed.snapshot());
        for port in 40_000..40_100 {
            let packet = bed.udp(family.client, port, family.node, bed::NODE_PORT_LOCAL);
            crew.by_wire(0, &packet);
        }
        crew.settle();
        assert_eq!((crew.flows(), crew.tuples()), (100, 200));
        crew.discard(&mut Vec::new());
        crew.wait(600);
        assert_eq!((crew.flows(), crew.tuples()), (0, 0));
        crew.assert_whole();
    }
}

#[test]
fn a_full_flow_table_refuses_new_flows_and_keeps_the_old_ones() {
    let family = &FAMILIES[0];
    let bed = Bed::new(family);
    let mut crew = Crew::new(1, bed.snapshot());
    let mut scratch = Vec::new();
    for port in 10_000..11_100 {
        crew.by_wire(
            0,
            &bed.udp(family.client, port, family.node, bed::NODE_PORT_LOCAL),
        );
        crew.settle();
        crew.discard(&mut scratch);
    }
    assert_eq!(crew.flows(), 1_024);
    let counters = crew.workers[0].counters().clone();
    assert_eq!(counters.dropped[DropReason::FlowTableFull as usize], 76);
    crew.by_wire(
        0,
        &bed.udp(family.client, 10_000, family.node, bed::NODE_PORT_LOCAL),
    );
    crew.settle();
    assert_eq!(
        crew.workers[0].counters().transmitted,
        counters.transmitted + 1
    );
    crew.discard(&mut scratch);
    crew.assert_whole();
}

#[test]
fn a_packet_that_finds_no_room_at_the_device_is_counted_and_its_chunk_comes_back() {
    let family = &FAMILIES[1];
    let bed = Bed::new(family);
    let mut crew = Crew::new(1, bed.snapshot());
    crew.workers[0].ports().host.limit_transmit(0);
    crew.by_wire(
        0,
        &bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL),
    );
    crew.settle();
    assert_eq!(
        crew.workers[0].counters().dropped[DropReason::DeviceFull as usize],
        1
    );
    crew.assert_whole();
}
