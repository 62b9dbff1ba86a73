//! A pipeline with a node around it, for the table tests: a client, pods, a remote node, Services.
#![allow(dead_code, reason = "each test program uses a part of the bed")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use dataplane::command::{Hook, Origin};
use dataplane::counters::BackendCounts;
use dataplane::flow::table::{FlowTable, Slab};
use dataplane::nat::ports::PortAllocator;
use dataplane::net::{Address, Direction, MacAddr, Port, Protocol};
use dataplane::pipeline::{
    ChecksumState, Door, FlowEvent, Meta, Packet, Pipeline, PipelineParts, Verdict,
};
use dataplane::snapshot::{
    Backend, BackendId, Fib, Frontend, FrontendKey, Masquerade, Node, NodeDevice, Prefix, Route,
    SchedulerKind, Service, ServiceId, Snapshot, SnapshotBuilder, WhenEmpty,
};
use dataplane::steer::{FingerprintKey, WorkerId};
use dataplane::time::Instant;
use etherparse::{NetSlice, PacketBuilder, SlicedPacket, TransportSlice};

/// Served by a pod of this node.
pub(crate) const NODE_PORT_LOCAL: u16 = 30_080;
/// Served by a pod of another node.
pub(crate) const NODE_PORT_REMOTE: u16 = 30_081;
pub(crate) const HOP_LIMIT: u8 = 64;
pub(crate) const UPLINK_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 2]);
pub(crate) const CLIENT_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xc1]);
pub(crate) const NODE2_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0x22]);
/// The far station of a steered packet.
pub(crate) const FAR: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xfa]);
const POD_A_MAC: MacAddr = MacAddr([2, 0, 0, 0, 0, 0xa]);

/// The addresses of one family.
pub(crate) struct Family {
    pub(crate) client: &'static str,
    pub(crate) node: &'static str,
    pub(crate) node2: &'static str,
    pub(crate) pod_a: &'static str,
    pub(crate) pod_b: &'static str,
    pub(crate) remote: &'static str,
    pub(crate) vip: &'static str,
    pub(crate) both: &'static str,
    pub(crate) empty: &'static str,
    pub(crate) pods: (&'static str, u8),
    pub(crate) remote_pods: (&'static str, u8),
    pub(crate) wire: (&'static str, u8),
}

pub(crate) const FAMILIES: [Family; 2] = [
    Family {
        client: "192.0.2.1",
        node: "192.0.2.10",
        node2: "192.0.2.11",
        pod_a: "10.244.1.10",
        pod_b: "10.244.1.11",
        remote: "10.244.2.10",
        vip: "10.96.0.10",
        both: "10.96.0.11",
        empty: "10.96.0.12",
        pods: ("10.244.0.0", 16),
        remote_pods: ("10.244.2.0", 24),
        wire: ("192.0.2.0", 24),
    },
    Family {
        client: "2001:db8::1",
        node: "2001:db8::10",
        node2: "2001:db8::11",
        pod_a: "fd00:10:244:1::10",
        pod_b: "fd00:10:244:1::11",
        remote: "fd00:10:244:2::10",
        vip: "fd00:10:96::10",
        both: "fd00:10:96::11",
        empty: "fd00:10:96::12",
        pods: ("fd00:10:244::", 48),
        remote_pods: ("fd00:10:244:2::", 64),
        wire: ("2001:db8::", 64),
    },
];

/// Address, port, address, port of a packet.
pub(crate) type Ends = (&'static str, u16, &'static str, u16);

pub(crate) fn address(text: &str) -> Address {
    text.parse::<IpAddr>().expect("a literal address").into()
}

fn prefix((base, length): (&str, u8)) -> Prefix {
    Prefix::new(address(base), length).expect("a literal prefix")
}

/// A frame that the pipeline let go.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Sent(pub Vec<u8>);

impl Sent {
    fn sliced(&self) -> SlicedPacket<'_> {
        SlicedPacket::from_ethernet(&self.0).expect("a packet that an independent parser reads")
    }

    fn ips(&self) -> (IpAddr, IpAddr) {
        match self.sliced().net {
            Some(NetSlice::Ipv4(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            Some(NetSlice::Ipv6(ip)) => (
                ip.header().source_addr().into(),
                ip.header().destination_addr().into(),
            ),
            other => panic!("not IP: {other:?}"),
        }
    }

    /// Both addresses, as the families name them.
    pub(crate) fn addresses(&self) -> (&'static str, &'static str) {
        let (source, destination) = self.ips();
        (name_of(source), name_of(destination))
    }

    pub(crate) fn ends(&self) -> Ends {
        let (source, destination) = self.addresses();
        let (from, to) = match self.sliced().transport {
            Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
            Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
            other => panic!("neither TCP nor UDP: {other:?}"),
        };
        (source, from, destination, to)
    }

    pub(crate) fn hop_limit(&self) -> u8 {
        match self.sliced().net {
            Some(NetSlice::Ipv4(ip)) => ip.header().ttl(),
            Some(NetSlice::Ipv6(ip)) => ip.header().hop_limit(),
            other => panic!("not IP: {other:?}"),
        }
    }

    /// Destination and source MAC.
    pub(crate) fn stations(&self) -> (MacAddr, MacAddr) {
        let mac = |at: usize| MacAddr(self.0[at..at + 6].try_into().expect("six bytes"));
        (mac(0), mac(6))
    }

    fn sums(&self) -> (u16, u16) {
        let sliced = self.sliced();
        let net = sliced.net.as_ref().expect("IP");
        match (net, sliced.transport.as_ref().expect("a transport")) {
            (NetSlice::Ipv4(ip), TransportSlice::Tcp(tcp)) => (
                tcp.checksum(),
                tcp.calc_checksum_ipv4(
                    ip.header().source_addr().octets(),
                    ip.header().destination_addr().octets(),
                )
                .expect("a short packet"),
            ),
            (NetSlice::Ipv6(ip), TransportSlice::Tcp(tcp)) => (
                tcp.checksum(),
                tcp.calc_checksum_ipv6(
                    ip.header().source_addr().octets(),
                    ip.header().destination_addr().octets(),
                )
                .expect("a short packet"),
            ),
            other => panic!("not TCP: {other:?}"),
        }
    }

    /// Every checksum as a full computation has it.
    pub(crate) fn assert_checksums(&self) {
        let (found, expected) = self.sums();
        assert_eq!(found, expected, "transport checksum");
        if let Some(NetSlice::Ipv4(ip)) = self.sliced().net {
            let header = ip.header().to_header();
            assert_eq!(
                header.header_checksum,
                header.calc_header_checksum(),
                "header checksum"
            );
        }
    }

    /// The transport checksum is the folded, uncomplemented pseudo-header sum.
    pub(crate) fn assert_partial(&self) {
        let (found, _) = self.sums();
        assert_eq!(found, pseudo_sum(&self.0), "partial checksum");
    }

    pub(crate) fn is_reset(&self) -> bool {
        matches!(self.sliced().transport, Some(TransportSlice::Tcp(tcp)) if tcp.rst())
    }

    pub(crate) fn is_time_exceeded(&self) -> bool {
        self.icmp_type() == Some((11, 3))
    }

    pub(crate) fn is_port_unreachable(&self) -> bool {
        self.icmp_type() == Some((3, 1))
            && match self.sliced().transport {
                Some(TransportSlice::Icmpv4(icmp)) => icmp.code_u8() == 3,
                Some(TransportSlice::Icmpv6(icmp)) => icmp.code_u8() == 4,
                _ => false,
            }
    }

    /// The ICMP type as the pair (of version 4, of version 6) that it belongs to.
    fn icmp_type(&self) -> Option<(u8, u8)> {
        match self.sliced().transport {
            Some(TransportSlice::Icmpv4(icmp)) => match icmp.type_u8() {
                11 => Some((11, 3)),
                3 => Some((3, 1)),
                _ => None,
            },
            Some(TransportSlice::Icmpv6(icmp)) => match icmp.type_u8() {
                3 => Some((11, 3)),
                1 => Some((3, 1)),
                _ => None,
            },
            _ => None,
        }
    }
}

fn name_of(ip: IpAddr) -> &'static str {
    let names = FAMILIES.iter().flat_map(|f| {
        [
            f.client, f.node, f.node2, f.pod_a, f.pod_b, f.remote, f.vip, f.both, f.empty,
        ]
    });
    names
        .into_iter()
        .find(|name| name.parse::<IpAddr>().is_ok_and(|named| named == ip))
        .unwrap_or_else(|| panic!("{ip} is none of the bed's addresses"))
}

/// The folded sum of the pseudo-header of a TCP packet without options or extensions.
fn pseudo_sum(frame: &[u8]) -> u16 {
    let (addresses, length) = if frame[14] >> 4 == 4 {
        (&frame[26..34], frame.len() - 34)
    } else {
        (&frame[22..54], frame.len() - 54)
    };
    let words = addresses
        .chunks(2)
        .map(|word| u32::from(u16::from_be_bytes([word[0], word[1]])));
    let mut sum = words.sum::<u32>() + u32::try_from(length).expect("a short packet") + 6;
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    u16::try_from(sum).expect("folded")
}

/// A pipeline and the node it serves.
pub(crate) struct Bed {
    family: &'static str,
    node: Arc<Node>,
    fib: Arc<Fib>,
    backends: [Backend; 2],
    removed: Vec<BackendId>,
    snapshot: Snapshot,
    pub(crate) pipeline: Pipeline,
    now: Instant,
}

impl Bed {
    pub(crate) fn new(family: &Family) -> Self {
        Self::with_workers(family, 1)
    }

    pub(crate) fn with_workers(family: &Family, workers: u16) -> Self {
        let device = NodeDevice {
            mtu: 1500,
            ..NodeDevice::default()
        };
        let pod = NodeDevice {
            is_pod: true,
            hooked_ingress: true,
            hooked_egress: true,
            ..device
        };
        let uplink = NodeDevice {
            mac: UPLINK_MAC,
            uplink: Some(0),
            hooked_egress: true,
            ..device
        };
        let node = Node {
            addresses: [address(family.node)].into_iter().collect(),
            cluster_ranges: vec![prefix(family.pods)],
            snat_addresses: Vec::new(),
            devices: [(2, uplink), (10, pod), (11, pod)].into_iter().collect(),
        };
        let backends =
            [(0, family.pod_a, true), (1, family.remote, false)].map(|(id, backend, local)| {
                Backend {
                    id: BackendId(id),
                    endpoint: dataplane::net::Endpoint::new(address(backend), Port(8080)),
                    weight: 1,
                    local,
                    draining: false,
                }
            });
        let pipeline = pipeline(WorkerId(0), workers);
        let mut bed = Self {
            family: family.client,
            node: Arc::new(node),
            fib: Arc::new(fib(family, true)),
            backends,
            removed: Vec::new(),
            snapshot: Snapshot::default(),
            pipeline,
            now: Instant::from_secs(1_000),
        };
        bed.publish();
        bed
    }

    fn family(&self) -> &'static Family {
        FAMILIES
            .iter()
            .find(|family| family.client == self.family)
            .expect("one of the two")
    }

    fn publish(&mut self) {
        let family = self.family();
        let lists: [(&str, u16, &[u32]); 6] = [
            (family.vip, 80, &[0]),
            (family.vip, 81, &[0]),
            (family.both, 80, &[0, 1]),
            (family.empty, 80, &[]),
            ("", NODE_PORT_LOCAL, &[0]),
            ("", NODE_PORT_REMOTE, &[1]),
        ];
        let mut builder = SnapshotBuilder::new();
        for (id, (at, port, list)) in (1..).zip(lists) {
            let kept = |index: &u32| !self.removed.contains(&self.backends[*index as usize].id);
            let backends: Vec<_> = list
                .iter()
                .filter(|index| kept(index))
                .map(|&index| self.backends[index as usize].clone())
                .collect();
            let chosen = (0..)
                .zip(&backends)
                .filter(|(_, backend)| !backend.draining);
            let service = Arc::new(Service {
                id: ServiceId(id),
                name: format!("default/s{id}:http").into(),
                scheduler: SchedulerKind::RoundRobin,
                affinity: None,
                choices: vec![chosen.map(|(index, _)| index).collect()],
                backends: backends.clone(),
            });
            let external = at.is_empty();
            let masquerade = if external {
                Masquerade::Always
            } else {
                Masquerade::OffCluster
            };
            let frontends = [Protocol::TCP, Protocol::UDP].map(|protocol| {
                let at = if external { Address::ANY } else { address(at) };
                let key = FrontendKey {
                    address: at,
                    port: Port(port),
                    protocol,
                };
                let frontend = Frontend {
                    service: Arc::clone(&service),
                    outside: 0,
                    inside: 0,
                    masquerade,
                    inside_masquerade: Masquerade::OffCluster,
                    source_ranges: Box::new([]),
                    when_empty: WhenEmpty::Reject,
                };
                (key, frontend)
            });
            builder.service(&service, frontends);
        }
        let epoch = self.snapshot.epoch + 1;
        let (snapshot, errors) =
            builder.build(epoch, Arc::clone(&self.node), Arc::clone(&self.fib));
        assert!(errors.is_empty(), "{errors:?}");
        self.pipeline
            .set_snat_addresses(snapshot.masquerade_addresses());
        self.snapshot = snapshot;
    }

    /// The tables that are served.
    pub(crate) fn snapshot(&self) -> &Snapshot {
        &self.snapshot
    }

    pub(crate) fn forget_neighbors(&mut self) {
        self.fib = Arc::new(fib(self.family(), false));
        self.publish();
    }

    pub(crate) fn drain_pod_a(&mut self) {
        self.backends[0].draining = true;
        self.publish();
    }

    pub(crate) fn remove_pod_a(&mut self) {
        self.removed.push(BackendId(0));
        self.publish();
    }

    pub(crate) fn remove_backend(&mut self, name: &str) {
        let found = self
            .backends
            .iter()
            .find(|b| b.endpoint.address == address(name));
        let id = found.expect("a backend of the bed").id;
        self.removed.push(id);
        self.publish();
    }

    pub(crate) fn wait_and_expire(&mut self) {
        for _ in 0..20_000 {
            self.now = self.now + Duration::from_secs(1);
            self.pipeline.expire(self.now);
        }
    }

    pub(crate) fn events(&mut self) -> Vec<FlowEvent> {
        std::iter::from_fn(|| self.pipeline.pop_event()).collect()
    }

    pub(crate) fn flows(&self) -> usize {
        self.pipeline.flows().len()
    }

    pub(crate) fn answer(&mut self) -> Sent {
        Sent(self.pipeline.answer().0.to_vec())
    }

    fn run(&mut self, mut bytes: Vec<u8>, meta: Meta) -> (Verdict, Sent) {
        let mut packet = Packet {
            bytes: &mut bytes,
            meta,
        };
        let verdict = self.pipeline.process(&mut packet, self.now, &self.snapshot);
        (verdict, Sent(bytes))
    }

    pub(crate) fn by_uplink(&mut self, bytes: Vec<u8>) -> (Verdict, Sent) {
        let door = Door::Uplink {
            uplink: 0,
            ifindex: 2,
        };
        self.run(
            bytes,
            Meta {
                checksum: ChecksumState::Suspect,
                ..meta(door)
            },
        )
    }

    pub(crate) fn by_host(&mut self, bytes: Vec<u8>) -> (Verdict, Sent) {
        self.run(bytes, meta(Door::Host(Origin::Host)))
    }

    pub(crate) fn steered(
        &mut self,
        ifindex: u32,
        hook: Hook,
        direction: Direction,
        bytes: Vec<u8>,
    ) -> (Verdict, Sent) {
        self.run(bytes, meta(door(ifindex, hook, direction)))
    }

    pub(crate) fn steered_partial(
        &mut self,
        ifindex: u32,
        hook: Hook,
        direction: Direction,
        bytes: Vec<u8>,
    ) -> (Verdict, Sent) {
        let meta = meta(door(ifindex, hook, direction));
        self.run(
            bytes,
            Meta {
                checksum: ChecksumState::Partial,
                ..meta
            },
        )
    }

    pub(crate) fn steered_super(
        &mut self,
        ifindex: u32,
        hook: Hook,
        direction: Direction,
        bytes: Vec<u8>,
    ) -> (Verdict, Sent) {
        let meta = meta(door(ifindex, hook, direction));
        self.run(
            bytes,
            Meta {
                checksum: ChecksumState::Partial,
                super_packet: true,
                ..meta
            },
        )
    }

    pub(crate) fn syn(&self, from: &str, port: u16, to: &str, to_port: u16) -> Vec<u8> {
        tcp(from, port, to, to_port, &[])
    }

    pub(crate) fn syn_ack(&self, from: &str, port: u16, to: &str, to_port: u16) -> Vec<u8> {
        with_flags(tcp(from, port, to, to_port, &[]), 0x12)
    }

    pub(crate) fn reset(&self, from: &str, port: u16, to: &str, to_port: u16) -> Vec<u8> {
        with_flags(tcp(from, port, to, to_port, &[]), 0x14)
    }

    pub(crate) fn ack(&self, from: &str, port: u16, to: &str, to_port: u16) -> Vec<u8> {
        with_flags(tcp(from, port, to, to_port, b"payload"), 0x10)
    }

    pub(crate) fn udp(&self, from: &str, port: u16, to: &str, to_port: u16) -> Vec<u8> {
        let mut frame = Vec::new();
        let builder = PacketBuilder::ethernet2(CLIENT_MAC.0, UPLINK_MAC.0);
        match (ip(from), ip(to)) {
            (IpAddr::V4(from), IpAddr::V4(to)) => builder
                .ipv4(from.octets(), to.octets(), HOP_LIMIT)
                .udp(port, to_port)
                .write(&mut frame, b"payload"),
            (IpAddr::V6(from), IpAddr::V6(to)) => builder
                .ipv6(from.octets(), to.octets(), HOP_LIMIT)
                .udp(port, to_port)
                .write(&mut frame, b"payload"),
            _ => panic!("one family a packet"),
        }
        .expect("writing to memory");
        frame
    }

    /// The same packet as a local sender with checksum offload leaves it.
    pub(crate) fn partial(&self, mut frame: Vec<u8>) -> Vec<u8> {
        let sum = pseudo_sum(&frame).to_be_bytes();
        let at = if frame[14] >> 4 == 4 {
            34 + 16
        } else {
            54 + 16
        };
        frame[at..at + 2].copy_from_slice(&sum);
        frame
    }

    pub(crate) fn with_hop_limit(&self, mut frame: Vec<u8>, limit: u8) -> Vec<u8> {
        if frame[14] >> 4 == 4 {
            frame[22] = limit;
            let header = etherparse::Ipv4Header::from_slice(&frame[14..])
                .expect("IPv4")
                .0;
            frame[24..26].copy_from_slice(&header.calc_header_checksum().to_be_bytes());
        } else {
            frame[21] = limit;
        }
        frame
    }
}

/// A worker's packet path with room for 1,024 flows.
pub(crate) fn pipeline(worker: WorkerId, workers: u16) -> Pipeline {
    Pipeline::new(PipelineParts {
        worker,
        workers,
        flows: FlowTable::with_slab(Slab::with_capacity(1024), 7),
        ports: PortAllocator::new(worker, workers, 1024..=29_999, &[]),
        key: FingerprintKey { key0: 1, key1: 2 },
        counts: Arc::new(BackendCounts::default()),
        seed: 42,
    })
}

fn ip(text: &str) -> IpAddr {
    text.parse().expect("a literal address")
}

const fn meta(door: Door) -> Meta {
    Meta {
        door,
        checksum: ChecksumState::Complete,
        super_packet: false,
        handovers: 0,
    }
}

const fn door(ifindex: u32, hook: Hook, direction: Direction) -> Door {
    Door::Host(Origin::Steered {
        ifindex,
        hook,
        direction,
        far: FAR,
    })
}

fn tcp(from: &str, port: u16, to: &str, to_port: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = Vec::new();
    let builder = PacketBuilder::ethernet2(CLIENT_MAC.0, UPLINK_MAC.0);
    match (ip(from), ip(to)) {
        (IpAddr::V4(from), IpAddr::V4(to)) => builder
            .ipv4(from.octets(), to.octets(), HOP_LIMIT)
            .tcp(port, to_port, 1_000, 64_000)
            .syn()
            .write(&mut frame, payload),
        (IpAddr::V6(from), IpAddr::V6(to)) => builder
            .ipv6(from.octets(), to.octets(), HOP_LIMIT)
            .tcp(port, to_port, 1_000, 64_000)
            .syn()
            .write(&mut frame, payload),
        _ => panic!("one family a packet"),
    }
    .expect("writing to memory");
    frame
}

/// Replaces the TCP flags and mends the checksum by a full computation.
fn with_flags(mut frame: Vec<u8>, flags: u8) -> Vec<u8> {
    let start = if frame[14] >> 4 == 4 { 34 } else { 54 };
    frame[start + 13] = flags;
    let (_, sum) = Sent(frame.clone()).sums();
    frame[start + 16..start + 18].copy_from_slice(&sum.to_be_bytes());
    frame
}

/// Routes of the node; the neighbours on the wire are resolved or not.
fn fib(family: &Family, resolved: bool) -> Fib {
    let source = Some(address(family.node));
    let on_link = |ifindex| Route {
        ifindex,
        gateway: None,
        source,
    };
    let host = if family.pods.1 == 16 { 32 } else { 128 };
    let routes = [
        (prefix(family.wire), on_link(2)),
        (prefix((family.pod_a, host)), on_link(10)),
        (prefix((family.pod_b, host)), on_link(11)),
        (
            prefix(family.remote_pods),
            Route {
                ifindex: 2,
                gateway: Some(address(family.node2)),
                source,
            },
        ),
    ];
    let pods = [((10, address(family.pod_a)), POD_A_MAC)];
    let wire = [
        ((2, address(family.client)), CLIENT_MAC),
        ((2, address(family.node2)), NODE2_MAC),
    ];
    let wire = wire.into_iter().filter(move |_| resolved);
    Fib::new(routes, pods.into_iter().chain(wire))
}
