//! Flows for the benches: the same ones in each run, in an order that no cache foresees, and the node
//! that serves them.
//!
//! The node has one uplink. Clients come by it to a Service's address, the backend runs on another
//! node: each packet is translated at both ends (SNAT too) and leaves by the uplink it came by.

use std::sync::Arc;

use dataplane::counters::BackendCounts;
use dataplane::flow::{FlowTable, NewFlow, Slab};
use dataplane::nat::ports::PortAllocator;
use dataplane::net::{Address, Endpoint, MacAddr, Port, Protocol, Tuple};
use dataplane::packet::{TcpFlags, checksum, parse};
use dataplane::pipeline::{ChecksumState, Door, Meta, Packet, Pipeline, PipelineParts, Verdict};
use dataplane::snapshot::{
    Backend, BackendId, Fib, Frontend, FrontendKey, Masquerade, Node, NodeDevice, Prefix, Route,
    SchedulerKind, Service, ServiceId, Snapshot, SnapshotBuilder, WhenEmpty,
};
use dataplane::steer::{FingerprintKey, WorkerId};
use dataplane::time::Instant;

use crate::packets;

/// When everything happens.
pub const NOW: Instant = Instant::from_secs(1000);
/// The uplink's device.
pub const UPLINK: u32 = 2;
/// How a packet comes from the wire of a real network card.
pub const BY_WIRE: Meta = Meta {
    door: Door::Uplink {
        uplink: 0,
        ifindex: UPLINK,
    },
    checksum: ChecksumState::Complete,
    super_packet: false,
    handovers: 0,
};
/// Payload of the load's packets: the smallest that needs no padding on the wire (IPv4, TCP).
const PAYLOAD: usize = 6;
/// How many Services `flow` spreads its flows over.
const SERVICES: u16 = 256;
/// Flows that may begin besides those the table holds.
const SPARE: u32 = 1024;

/// The address family of a workload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Version 4.
    V4,
    /// Version 6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As it stands in a bench's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// The address with this number in net 10.`net`.0.0/16 or fd00:`net`::/32.
    #[must_use]
    pub const fn address(self, net: u8, number: u16) -> Address {
        let [high, low] = number.to_be_bytes();
        match self {
            Self::V4 => Address::from_v4([10, net, high, low]),
            Self::V6 => {
                Address::from_bytes([0xfd, 0, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low])
            }
        }
    }
}

/// Flow number `n` of a family: a client, one of 256 Services, a backend, the client's own source.
#[must_use]
pub fn flow(family: Family, protocol: Protocol, n: u32) -> NewFlow {
    let [_, high, low, service] = n.to_be_bytes();
    let client = Endpoint::new(
        family.address(1, u16::from_be_bytes([high, low])),
        Port(32_768 + u16::from(service)),
    );
    let frontend = Endpoint::new(family.address(96, u16::from(service)), Port(80));
    let backend = Endpoint::new(family.address(244, u16::from(service)), Port(8080));
    let tuple = |source, destination| Tuple {
        protocol,
        source,
        destination,
    };
    NewFlow {
        original: tuple(client, frontend),
        reply: tuple(backend, client),
        service: u32::from(service),
        backend: u32::from(service),
        epoch: 1,
        tcp: TcpFlags::SYN,
    }
}

/// Shuffles with a generator of a fixed seed (xorshift64*).
pub fn shuffle<T>(list: &mut [T]) {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    for last in (1..list.len()).rev() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bound = u64::try_from(last + 1).unwrap_or(1);
        let other = usize::try_from(state.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound).unwrap_or(0);
        list.swap(last, other);
    }
}

/// A Service port with `count` backends of weight 1 on other nodes.
#[must_use]
pub fn service(family: Family, number: u16, count: u16, scheduler: SchedulerKind) -> Arc<Service> {
    let backend = |at: u16| Backend {
        id: BackendId(u32::from(number) * u32::from(count) + u32::from(at)),
        endpoint: Endpoint::new(family.address(244, number.wrapping_add(at)), Port(8080)),
        weight: 1,
        local: false,
        draining: false,
    };
    Arc::new(Service {
        id: ServiceId(u32::from(number)),
        name: format!("default/s{number}:http").into(),
        scheduler,
        affinity: None,
        backends: (0..count).map(backend).collect(),
        choices: vec![(0..u32::from(count)).collect()],
    })
}

/// The tables of a node with these Services, each at `address(96, its number)`:80, and one without
/// backends (`nobody`).
///
/// # Panics
/// If the tables contradict each other.
#[must_use]
pub fn snapshot(family: Family, services: &[Arc<Service>]) -> Snapshot {
    let mut builder = SnapshotBuilder::new();
    for service in services {
        let number = u16::try_from(service.id.0).unwrap_or(u16::MAX);
        builder.service(service, [frontend(family.address(96, number), service)]);
    }
    let empty = service(family, u16::MAX, 0, SchedulerKind::RoundRobin);
    builder.service(&empty, [frontend(nobody(family), &empty)]);
    let (snapshot, errors) = builder.build(1, Arc::new(node(family)), Arc::new(fib(family)));
    assert!(errors.is_empty(), "{errors:?}");
    snapshot
}

/// The address at which no backend serves.
#[must_use]
pub const fn nobody(family: Family) -> Address {
    family.address(97, 0)
}

fn frontend(address: Address, service: &Arc<Service>) -> (FrontendKey, Frontend) {
    let key = FrontendKey {
        address,
        port: Port(80),
        protocol: Protocol::TCP,
    };
    let frontend = Frontend {
        service: Arc::clone(service),
        outside: 0,
        inside: 0,
        masquerade: Masquerade::Always,
        inside_masquerade: Masquerade::OffCluster,
        source_ranges: Box::new([]),
        when_empty: WhenEmpty::Reject,
    };
    (key, frontend)
}

fn prefix(family: Family, net: u8) -> Prefix {
    let length = match family {
        Family::V4 => 16,
        Family::V6 => 32,
    };
    Prefix::new(family.address(net, 0), length).expect("a length that the family has")
}

fn node(family: Family) -> Node {
    let uplink = NodeDevice {
        mac: MacAddr([2, 0, 0, 0, 0, 2]),
        uplink: Some(0),
        hooked_egress: true,
        mtu: 1500,
        ..NodeDevice::default()
    };
    Node {
        addresses: [family.address(9, 1)].into_iter().collect(),
        cluster_ranges: vec![prefix(family, 244)],
        snat_addresses: Vec::new(),
        devices: [(UPLINK, uplink)].into_iter().collect(),
    }
}

/// Clients behind one router, backends behind another.
fn fib(family: Family) -> Fib {
    let routers = [(1, family.address(9, 2)), (244, family.address(9, 3))];
    let route = |(net, router)| {
        let route = Route {
            ifindex: UPLINK,
            gateway: Some(router),
            source: Some(family.address(9, 1)),
        };
        (prefix(family, net), route)
    };
    let station = |(net, router)| ((UPLINK, router), MacAddr([2, 0, 0, 0, 1, net]));
    Fib::new(routers.map(route), routers.map(station))
}

/// A worker's packet path with established flows, and their packets' tuples.
#[derive(Debug)]
pub struct Load {
    /// The path.
    pub pipeline: Pipeline,
    /// Its tables.
    pub snapshot: Snapshot,
    /// Client to Service, in random order.
    pub originals: Vec<Tuple>,
    /// Backend to node, in random order.
    pub replies: Vec<Tuple>,
}

impl Load {
    /// Opens `size` connections by their first three packets.
    ///
    /// # Panics
    /// If one of them is not sent on.
    #[must_use]
    pub fn new(family: Family, size: u32) -> Self {
        let services: Vec<_> = (0..SERVICES)
            .map(|number| service(family, number, 1, SchedulerKind::RoundRobin))
            .collect();
        let snapshot = snapshot(family, &services);
        let mut pipeline = Pipeline::new(PipelineParts {
            worker: WorkerId(0),
            workers: 1,
            flows: FlowTable::with_slab(Slab::with_capacity(size + SPARE), 7),
            ports: PortAllocator::new(WorkerId(0), 1, 1024..=29_999, &[]),
            key: FingerprintKey { key0: 1, key1: 2 },
            counts: Arc::new(BackendCounts::default()),
            seed: 42,
        });
        pipeline.set_snat_addresses(snapshot.masquerade_addresses());
        let mut load = Self {
            pipeline,
            snapshot,
            originals: (0..size)
                .map(|n| flow(family, Protocol::TCP, n).original)
                .collect(),
            replies: Vec::new(),
        };
        load.open();
        shuffle(&mut load.originals);
        shuffle(&mut load.replies);
        load
    }

    fn open(&mut self) {
        for at in 0..self.originals.len() {
            let original = self.originals[at];
            let mut first = packets::opening(&original, 0);
            self.send(&mut first);
            while self.pipeline.pop_event().is_some() {}
            let reply = parse(&first)
                .expect("a frame that was sent")
                .tuple
                .reversed();
            self.send(&mut packets::frame(&reply, 0));
            self.send(&mut packets::frame(&original, 0));
            self.replies.push(reply);
        }
    }

    /// Tuples of both directions, mixed.
    #[must_use]
    pub fn both(&self) -> Vec<Tuple> {
        let mut tuples = [self.originals.as_slice(), &self.replies].concat();
        shuffle(&mut tuples);
        tuples
    }

    /// What becomes of one frame.
    #[inline]
    pub fn process(&mut self, bytes: &mut [u8]) -> Verdict {
        let mut packet = Packet {
            bytes,
            meta: BY_WIRE,
        };
        self.pipeline.process(&mut packet, NOW, &self.snapshot)
    }

    /// Sends a frame and checks what came out by full sums.
    ///
    /// # Panics
    /// If it is not sent, or leaves with a wrong checksum.
    pub fn send(&mut self, bytes: &mut [u8]) {
        let verdict = self.process(bytes);
        assert!(matches!(verdict, Verdict::Transmit(_)), "{verdict:?}");
        assert_correct(bytes);
    }
}

/// Checks a frame by full sums.
///
/// # Panics
/// If a checksum is wrong.
pub fn assert_correct(bytes: &[u8]) {
    let headers = parse(bytes).expect("a frame that was sent");
    assert!(checksum::is_correct(bytes, &headers), "{headers:?}");
}

/// Frames of one length, side by side in the order in which they are to come.
#[derive(Debug)]
pub struct Frames {
    bytes: Vec<u8>,
    length: usize,
}

impl Frames {
    /// One of mid-stream for each tuple.
    #[must_use]
    pub fn of(tuples: &[Tuple]) -> Self {
        Self::written(tuples, |tuple| packets::frame(tuple, PAYLOAD))
    }

    /// The first of a connection for each tuple.
    #[must_use]
    pub fn opening(tuples: &[Tuple]) -> Self {
        Self::written(tuples, |tuple| packets::opening(tuple, PAYLOAD))
    }

    fn written(tuples: &[Tuple], write: impl Fn(&Tuple) -> Vec<u8>) -> Self {
        let length = tuples.first().map_or(1, |tuple| write(tuple).len());
        let mut bytes = Vec::with_capacity(tuples.len() * length);
        for tuple in tuples {
            bytes.extend(write(tuple));
        }
        Self { bytes, length }
    }

    /// The length of each.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    /// Whole batches of `count` frames, over and over.
    pub fn batches(&self, count: usize) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(count * self.length).cycle()
    }

    /// One frame after the other.
    pub fn iter(&self) -> impl Iterator<Item = &[u8]> {
        self.bytes.chunks_exact(self.length)
    }
}
