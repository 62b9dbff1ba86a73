//! The packet path as a table: a packet in, a verdict and a packet out, in both families.
//!
//! Packets are built and read by an independent library; the engine's own parser judges nothing here.

mod bed;

use bed::{Bed, FAMILIES, Family, Sent};
use dataplane::command::{Action, Hook};
use dataplane::counters::DropReason;
use dataplane::net::Direction;
use dataplane::pipeline::{FlowEvent, Out, Verdict};

fn each_family(test: impl Fn(&Family)) {
    FAMILIES.iter().for_each(test);
}

fn host_command(verdict: Verdict) -> dataplane::command::Command {
    match verdict {
        Verdict::Transmit(Out::Host(command)) => command,
        other => panic!("expected a command to the host port, got {other:?}"),
    }
}

#[test]
fn a_client_outside_reaches_a_local_pod_through_the_uplink_with_its_own_address() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL);
        let (verdict, out) = bed.by_uplink(packet);
        let command = host_command(verdict);
        assert_eq!(
            (command.action, command.ifindex, command.mark),
            (Action::Reenter, 2, false)
        );
        assert_eq!(out.ends(), (family.client, 40_000, family.pod_a, 8080));
        assert_eq!(
            out.hop_limit(),
            bed::HOP_LIMIT,
            "the kernel routes it, so it counts the hop"
        );
        out.assert_checksums();
    });
}

#[test]
fn the_reply_of_a_local_pod_leaves_by_the_uplink_from_the_address_the_client_asked() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        bed.by_uplink(bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL));
        let reply = bed.syn_ack(family.pod_a, 8080, family.client, 40_000);
        let (verdict, out) = bed.steered(2, Hook::Egress, Direction::Reply, reply);
        assert!(
            matches!(verdict, Verdict::Transmit(Out::Uplink { uplink: 0, .. })),
            "{verdict:?}"
        );
        assert_eq!(
            out.ends(),
            (family.node, bed::NODE_PORT_LOCAL, family.client, 40_000)
        );
        assert_eq!(out.stations(), (bed::FAR, bed::UPLINK_MAC));
        out.assert_checksums();
    });
}

#[test]
fn a_remote_pod_is_reached_masqueraded_and_its_reply_comes_back_by_the_same_worker() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_REMOTE);
        let (verdict, out) = bed.by_uplink(packet);
        assert!(
            matches!(verdict, Verdict::Transmit(Out::Uplink { uplink: 0, .. })),
            "{verdict:?}"
        );
        let (source, port, destination, to) = out.ends();
        assert_eq!(
            (source, destination, to),
            (family.node, family.remote, 8080)
        );
        assert!((1024..30_000).contains(&port), "{port}");
        assert_eq!(out.hop_limit(), bed::HOP_LIMIT - 1);
        assert_eq!(out.stations(), (bed::NODE2_MAC, bed::UPLINK_MAC));
        out.assert_checksums();

        let reply = bed.syn_ack(family.remote, 8080, family.node, port);
        let (verdict, out) = bed.by_uplink(reply);
        assert!(
            matches!(verdict, Verdict::Transmit(Out::Uplink { uplink: 0, .. })),
            "{verdict:?}"
        );
        assert_eq!(
            out.ends(),
            (family.node, bed::NODE_PORT_REMOTE, family.client, 40_000)
        );
        assert_eq!(out.stations(), (bed::CLIENT_MAC, bed::UPLINK_MAC));
        out.assert_checksums();
    });
}

#[test]
fn an_unresolved_neighbour_sends_the_packet_through_the_kernel() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        bed.forget_neighbors();
        let packet = bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_REMOTE);
        let (verdict, out) = bed.by_uplink(packet);
        let command = host_command(verdict);
        assert_eq!(
            (command.action, command.ifindex, command.mark),
            (Action::Neigh, 2, true)
        );
        assert_eq!(out.ends().2, family.remote);
        out.assert_checksums();
    });
}

#[test]
fn a_pod_reaches_another_by_cluster_ip_and_enters_again_by_its_own_veth() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.pod_b, 40_000, family.vip, 80);
        let (verdict, out) = bed.steered(11, Hook::Ingress, Direction::Original, packet);
        let command = host_command(verdict);
        assert_eq!(
            (command.action, command.ifindex, command.mark),
            (Action::Reenter, 11, true)
        );
        assert_eq!(
            command.far,
            bed::FAR,
            "a bridge must learn the pod's own MAC"
        );
        assert_eq!(out.ends(), (family.pod_b, 40_000, family.pod_a, 8080));

        let reply = bed.syn_ack(family.pod_a, 8080, family.pod_b, 40_000);
        let (verdict, out) = bed.steered(11, Hook::Egress, Direction::Reply, reply);
        let command = host_command(verdict);
        assert_eq!((command.action, command.ifindex), (Action::Peer, 11));
        assert_eq!(out.ends(), (family.vip, 80, family.pod_b, 40_000));
        out.assert_checksums();
    });
}

#[test]
fn a_pod_that_reaches_itself_is_masqueraded_both_ways() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.pod_a, 40_000, family.vip, 80);
        let (verdict, out) = bed.steered(10, Hook::Ingress, Direction::Original, packet);
        let command = host_command(verdict);
        assert_eq!((command.action, command.ifindex), (Action::Peer, 10));
        let (source, port, destination, _) = out.ends();
        assert_eq!((source, destination), (family.node, family.pod_a));

        let reply = bed.syn_ack(family.pod_a, 8080, family.node, port);
        let (verdict, out) = bed.steered(10, Hook::Ingress, Direction::Reply, reply);
        let command = host_command(verdict);
        assert_eq!((command.action, command.ifindex), (Action::Peer, 10));
        assert_eq!(out.ends(), (family.vip, 80, family.pod_a, 40_000));
        out.assert_checksums();
    });
}

#[test]
fn a_host_process_reaches_a_local_pod_and_hears_the_cluster_ip() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let (verdict, out) = bed.by_host(bed.syn(family.node, 40_000, family.vip, 80));
        let command = host_command(verdict);
        assert_eq!((command.action, command.ifindex), (Action::Peer, 10));
        assert_eq!(out.ends(), (family.node, 40_000, family.pod_a, 8080));
        assert_eq!(out.hop_limit(), bed::HOP_LIMIT, "the node itself sent it");

        let reply = bed.syn_ack(family.pod_a, 8080, family.node, 40_000);
        let (verdict, out) = bed.steered(10, Hook::Ingress, Direction::Reply, reply);
        assert_eq!(host_command(verdict).action, Action::Up);
        assert_eq!(out.ends(), (family.vip, 80, family.node, 40_000));
        out.assert_checksums();
    });
}

#[test]
fn round_robin_takes_turns_and_a_flow_keeps_its_backend() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let to = |bed: &mut Bed, port| {
            let packet = bed.syn(family.pod_b, port, family.both, 80);
            bed.steered(11, Hook::Ingress, Direction::Original, packet)
                .1
                .ends()
                .2
        };
        let first = to(&mut bed, 40_000);
        let second = to(&mut bed, 40_001);
        assert_ne!(first, second);
        assert_eq!(to(&mut bed, 40_000), first);
        assert_eq!(to(&mut bed, 40_002), first);
    });
}

#[test]
fn a_partial_checksum_stays_partial_and_is_completed_only_for_the_wire() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.partial(bed.syn(family.pod_b, 40_000, family.vip, 80));
        let (_, out) = bed.steered_partial(11, Hook::Ingress, Direction::Original, packet);
        out.assert_partial();

        bed.by_uplink(bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL));
        let reply = bed.partial(bed.syn_ack(family.pod_a, 8080, family.client, 40_000));
        let (verdict, out) = bed.steered_partial(2, Hook::Egress, Direction::Reply, reply);
        assert!(matches!(verdict, Verdict::Transmit(Out::Uplink { .. })));
        out.assert_checksums();
    });
}

#[test]
fn a_partial_checksum_from_a_virtual_uplink_is_completed() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.partial(bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL));
        let (_, out) = bed.by_uplink(packet);
        out.assert_checksums();
    });
}

#[test]
fn a_super_packet_leaves_through_the_kernel_not_by_the_ring() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        bed.by_uplink(bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL));
        let reply = bed.syn_ack(family.pod_a, 8080, family.client, 40_000);
        let (verdict, _) = bed.steered_super(2, Hook::Egress, Direction::Reply, reply);
        let command = host_command(verdict);
        assert_eq!(
            (command.action, command.ifindex, command.mark),
            (Action::Out, 2, true)
        );
        assert_eq!(command.far, bed::FAR);
    });
}

#[test]
fn an_expired_hop_limit_is_answered_with_time_exceeded() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_REMOTE);
        let packet = bed.with_hop_limit(packet, 1);
        let (verdict, _) = bed.by_uplink(packet);
        assert_eq!(verdict, Verdict::Reject);
        let answer = bed.answer();
        assert!(answer.is_time_exceeded(), "{answer:?}");
        assert_eq!(answer.addresses(), (family.node, family.client));
    });
}

#[test]
fn a_service_without_backends_resets_tcp_and_refuses_udp() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let (verdict, _) = bed.steered(
            11,
            Hook::Ingress,
            Direction::Original,
            bed.syn(family.pod_b, 40_000, family.empty, 80),
        );
        assert_eq!(verdict, Verdict::Reject);
        assert!(bed.answer().is_reset());
        let (verdict, _) = bed.steered(
            11,
            Hook::Ingress,
            Direction::Original,
            bed.udp(family.pod_b, 40_000, family.empty, 80),
        );
        assert_eq!(verdict, Verdict::Reject);
        assert!(bed.answer().is_port_unreachable());
        assert_eq!(bed.flows(), 0);
    });
}

#[test]
fn a_mid_stream_packet_of_an_unknown_flow_is_reset() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn_ack(family.pod_b, 40_000, family.vip, 80);
        let (verdict, _) = bed.steered(11, Hook::Ingress, Direction::Original, packet);
        assert_eq!(verdict, Verdict::Reject);
        assert!(bed.answer().is_reset());
    });
}

#[test]
fn a_flow_of_a_backend_that_has_gone_is_reset_and_a_draining_one_goes_on() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = |bed: &Bed| bed.syn(family.pod_b, 40_000, family.vip, 80);
        bed.steered(11, Hook::Ingress, Direction::Original, packet(&bed));
        bed.drain_pod_a();
        let again = bed.ack(family.pod_b, 40_000, family.vip, 80);
        let (verdict, _) = bed.steered(11, Hook::Ingress, Direction::Original, again.clone());
        assert!(matches!(verdict, Verdict::Transmit(_)), "{verdict:?}");
        bed.remove_pod_a();
        let (verdict, _) = bed.steered(11, Hook::Ingress, Direction::Original, again);
        assert_eq!(verdict, Verdict::Reject);
        assert_eq!(bed.flows(), 0);
    });
}

#[test]
fn a_udp_flow_of_a_backend_that_has_gone_is_scheduled_again() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = |bed: &Bed| bed.udp(family.pod_b, 40_000, family.both, 80);
        let first = bed
            .steered(11, Hook::Ingress, Direction::Original, packet(&bed))
            .1
            .ends()
            .2;
        bed.remove_backend(first);
        let second = bed
            .steered(11, Hook::Ingress, Direction::Original, packet(&bed))
            .1
            .ends()
            .2;
        assert_ne!(first, second);
        assert_eq!(bed.flows(), 1);
    });
}

#[test]
fn two_frontends_on_one_backend_from_one_client_port_keep_apart() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let one = bed.syn(family.pod_b, 40_000, family.vip, 80);
        let two = bed.syn(family.pod_b, 40_000, family.vip, 81);
        let one = bed
            .steered(11, Hook::Ingress, Direction::Original, one)
            .1
            .ends();
        let two = bed
            .steered(11, Hook::Ingress, Direction::Original, two)
            .1
            .ends();
        assert_eq!(
            (one.0, one.2, one.3),
            (two.0, two.2, two.3),
            "same client, same backend"
        );
        assert_ne!(one.1, two.1, "another source port");
        let reply = bed.syn_ack(family.pod_a, 8080, family.pod_b, two.1);
        let (_, out) = bed.steered(11, Hook::Egress, Direction::Reply, reply);
        assert_eq!(out.ends(), (family.vip, 81, family.pod_b, 40_000));
    });
}

#[test]
fn a_direct_connection_on_the_port_of_a_flow_gets_another_port_and_its_replies_find_it() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let door =
            |bed: &mut Bed, hook, direction, packet| bed.steered(11, hook, direction, packet);
        let by_vip = bed.udp(family.pod_b, 40_000, family.vip, 80);
        door(&mut bed, Hook::Ingress, Direction::Original, by_vip);
        let direct = bed.udp(family.pod_b, 40_000, family.pod_a, 8080);
        let (verdict, out) = door(&mut bed, Hook::Ingress, Direction::Original, direct);
        assert_eq!(host_command(verdict).action, Action::Reenter);
        let (source, port, destination, to) = out.ends();
        assert_eq!(
            (source, destination, to),
            (family.pod_b, family.pod_a, 8080)
        );
        assert_ne!(port, 40_000);

        let reply = bed.udp(family.pod_a, 8080, family.pod_b, port);
        let (_, out) = door(&mut bed, Hook::Egress, Direction::Reply, reply);
        assert_eq!(out.ends(), (family.pod_a, 8080, family.pod_b, 40_000));
        let reply = bed.udp(family.pod_a, 8080, family.pod_b, 40_000);
        let (_, out) = door(&mut bed, Hook::Egress, Direction::Reply, reply);
        assert_eq!(out.ends(), (family.vip, 80, family.pod_b, 40_000));
    });
}

#[test]
fn a_direct_connection_on_the_port_of_a_flow_that_is_over_goes_its_own_way() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let by_vip = bed.syn(family.pod_b, 40_000, family.vip, 80);
        bed.steered(11, Hook::Ingress, Direction::Original, by_vip);
        let reset = bed.reset(family.pod_a, 8080, family.pod_b, 40_000);
        bed.steered(11, Hook::Egress, Direction::Reply, reset);
        let direct = bed.syn(family.pod_b, 40_000, family.pod_a, 8080);
        let (verdict, out) = bed.steered(11, Hook::Ingress, Direction::Original, direct.clone());
        assert_eq!((verdict, out), (Verdict::Punt, Sent(direct)));
        assert_eq!(bed.flows(), 0);
    });
}

#[test]
fn bound_and_gone_flows_are_told_once_each() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        bed.steered(
            11,
            Hook::Ingress,
            Direction::Original,
            bed.syn(family.pod_b, 40_000, family.vip, 80),
        );
        let events = bed.events();
        assert!(matches!(events[..], [FlowEvent::Bound(_, _)]), "{events:?}");
        bed.wait_and_expire();
        let events = bed.events();
        assert!(matches!(events[..], [FlowEvent::Gone(_)]), "{events:?}");
        assert_eq!(bed.flows(), 0);
    });
}

#[test]
fn a_packet_of_another_worker_is_handed_over_once() {
    each_family(|family| {
        let mut bed = Bed::with_workers(family, 4);
        let mut handed = 0;
        for port in 40_000..40_064 {
            let packet = bed.syn(family.client, port, family.node, bed::NODE_PORT_REMOTE);
            let (verdict, _) = bed.by_uplink(packet);
            match verdict {
                Verdict::HandOver(worker) => {
                    assert_ne!(worker.0, 0);
                    handed += 1;
                }
                Verdict::Transmit(_) => {}
                other => panic!("{other:?}"),
            }
        }
        assert!(
            (32..64).contains(&handed),
            "{handed} of 64 belong to three of four workers"
        );
    });
}

#[test]
fn garbage_from_the_uplink_goes_back_and_from_the_host_port_is_dropped() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let whole = bed.syn(family.client, 40_000, family.node, bed::NODE_PORT_LOCAL);
        for length in 0..whole.len() {
            let cut = whole[..length].to_vec();
            assert_eq!(
                bed.by_uplink(cut.clone()).0,
                Verdict::Punt,
                "cut at {length}"
            );
            let (verdict, _) = bed.steered(11, Hook::Ingress, Direction::Original, cut);
            assert_eq!(
                verdict,
                Verdict::Drop(DropReason::Malformed),
                "cut at {length}"
            );
        }
    });
}

#[test]
fn what_is_no_frontends_and_no_flows_goes_back_untouched() {
    each_family(|family| {
        let mut bed = Bed::new(family);
        let packet = bed.syn(family.client, 40_000, family.node, 22);
        let (verdict, out) = bed.by_uplink(packet.clone());
        assert_eq!(verdict, Verdict::Punt);
        assert_eq!(out, Sent(packet));
    });
}
