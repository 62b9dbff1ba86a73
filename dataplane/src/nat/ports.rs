//! Which source ports a worker tries for a masqueraded flow, and in which order.
//!
//! A worker may use a port P of an address only if it owns (address, P) itself, so that the reply
//! comes to it (`steer`). Ports are shared between destinations: whether a candidate is free is
//! asked of the flow table, whose reply tuple it would become. Each destination has a cursor that
//! walks round the circle of ports, so a port is not given twice before every other was tried, and
//! the port of a short connection rests longest. (One that was held for almost a whole round and is
//! freed just before the cursor comes rests only as long as the flow table kept it.) Destinations
//! whose hashes meet share a cursor. No time is kept, and nothing is allocated once the addresses
//! are known.

use std::ops::RangeInclusive;

use crate::net::{Address, Endpoint, Port, Protocol};
use crate::steer::{self, WorkerId};

/// How many ports are tried for one flow before the search is given up.
pub const PROBES: u32 = 128;

/// One worker's share of the SNAT ports.
#[derive(Debug)]
pub struct PortAllocator {
    worker: WorkerId,
    workers: u16,
    range: RangeInclusive<u16>,
    reserved: Vec<RangeInclusive<u16>>,
    owned: Vec<(Address, Box<[u16]>)>,
    cursors: Box<[u32]>,
    seed: u64,
}

impl PortAllocator {
    /// For `worker` of `workers`: ports of `range` but not those of `reserved`.
    #[must_use]
    pub fn new(
        worker: WorkerId,
        workers: u16,
        range: RangeInclusive<u16>,
        reserved: &[RangeInclusive<u16>],
    ) -> Self {
        Self::with_seed(worker, workers, range, reserved, 0)
    }

    /// As `new`; `seed` says where on the circle each destination begins.
    #[must_use]
    pub fn with_seed(
        worker: WorkerId,
        workers: u16,
        range: RangeInclusive<u16>,
        reserved: &[RangeInclusive<u16>],
        seed: u64,
    ) -> Self {
        let mut allocator = Self {
            worker,
            workers,
            range,
            reserved: reserved.to_vec(),
            owned: Vec::new(),
            cursors: vec![0; CURSORS].into_boxed_slice(),
            seed,
        };
        for (cursor, index) in allocator.cursors.iter_mut().zip(0_u64..) {
            *cursor = low_half(mix(seed ^ index.wrapping_mul(MULTIPLIER)));
        }
        allocator
    }

    /// Learns the node's SNAT addresses. Allocates, so it is called when they change and never for
    /// a packet; lists of addresses that stay are kept.
    pub fn set_addresses(&mut self, addresses: &[Address]) {
        let known = |address| self.owned.iter().any(|(known, _)| known == address);
        if addresses.len() == self.owned.len() && addresses.iter().all(known) {
            return;
        }
        let mut old = std::mem::take(&mut self.owned);
        for address in addresses {
            let list = match old.iter().position(|(known, _)| known == address) {
                Some(index) => old.swap_remove(index).1,
                None => steer::owned_ports(*address, self.worker, self.workers, self.range.clone())
                    .filter(|port| !self.is_reserved(*port))
                    .collect(),
            };
            self.owned.push((*address, list));
        }
    }

    /// The ports to try for a flow from `source` to `destination`, best first. `source` is an SNAT
    /// address, or the client's own address where only the port must change; then every candidate's
    /// owner is computed instead of looked up. When the iterator ends, the search has failed.
    pub fn candidates(
        &mut self,
        source: Address,
        destination: &Endpoint,
        protocol: Protocol,
    ) -> Candidates<'_> {
        let slot = self.slot(&source, destination, protocol);
        let list = self
            .owned
            .iter()
            .find(|(address, _)| *address == source)
            .map(|(_, list)| &**list);
        let circle = match list {
            Some(list) => Circle::Owned(list),
            None => Circle::Searched {
                address: source,
                first: *self.range.start(),
                reserved: &self.reserved,
                worker: self.worker,
                workers: self.workers,
            },
        };
        let length = match list {
            Some(list) => u32::try_from(list.len()).unwrap_or(0),
            None => u32::try_from(self.range.len()).unwrap_or(0),
        };
        let probes = match list {
            Some(_) => PROBES,
            None => PROBES.saturating_mul(u32::from(self.workers)),
        };
        Candidates {
            circle,
            length,
            left: probes.min(length),
            cursor: self.cursors.get_mut(slot),
        }
    }

    /// How many ports this worker has for an SNAT address.
    #[must_use]
    pub fn capacity(&self, address: Address) -> usize {
        self.owned
            .iter()
            .find(|(known, _)| *known == address)
            .map_or(0, |(_, list)| list.len())
    }

    fn is_reserved(&self, port: u16) -> bool {
        self.reserved.iter().any(|range| range.contains(&port))
    }

    fn slot(&self, source: &Address, destination: &Endpoint, protocol: Protocol) -> usize {
        let (a, b) = source.words();
        let (c, d) = destination.address.words();
        let last = u64::from(destination.port.0) | u64::from(protocol.0) << 16;
        let hash = [a, b, c, d, last]
            .iter()
            .fold(self.seed, |hash, word| mix(hash ^ word));
        // The mask keeps it below CURSORS.
        low_half(hash) as usize & (CURSORS - 1)
    }
}

/// The ports to try for one flow; each step moves the destination's cursor.
#[derive(Debug)]
pub struct Candidates<'a> {
    circle: Circle<'a>,
    length: u32,
    left: u32,
    cursor: Option<&'a mut u32>,
}

impl Iterator for Candidates<'_> {
    type Item = Port;

    #[inline]
    fn next(&mut self) -> Option<Port> {
        while self.left > 0 {
            self.left -= 1;
            let cursor = self.cursor.as_deref_mut()?;
            // Another source's circle, of another length, may have used this cursor before.
            let index = *cursor % self.length;
            *cursor = index + 1;
            if let Some(port) = self.circle.port(index) {
                return Some(Port(port));
            }
        }
        None
    }
}

/// Where candidates come from.
#[derive(Debug)]
enum Circle<'a> {
    /// A list of what this worker owns.
    Owned(&'a [u16]),
    /// A range, of which this worker owns some.
    Searched {
        address: Address,
        first: u16,
        reserved: &'a [RangeInclusive<u16>],
        worker: WorkerId,
        workers: u16,
    },
}

impl Circle<'_> {
    fn port(&self, index: u32) -> Option<u16> {
        match self {
            Self::Owned(list) => list.get(index as usize).copied(),
            Self::Searched {
                address,
                first,
                reserved,
                worker,
                workers,
            } => {
                let port = u16::try_from(u32::from(*first) + index).ok()?;
                let owner = steer::owner(&Endpoint::new(*address, Port(port)), *workers);
                let usable = owner == *worker && !reserved.iter().any(|r| r.contains(&port));
                usable.then_some(port)
            }
        }
    }
}

/// A power of two.
const CURSORS: usize = 4096;

const MULTIPLIER: u64 = 0x9E37_79B9_7F4A_7C15;

#[inline]
const fn mix(word: u64) -> u64 {
    let x = word.wrapping_mul(MULTIPLIER);
    let x = (x ^ (x >> 32)).wrapping_mul(MULTIPLIER);
    x ^ (x >> 29)
}

#[inline]
const fn low_half(word: u64) -> u32 {
    (word & 0xffff_ffff) as u32
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, VecDeque};
    use std::net::SocketAddr;

    use proptest::prelude::*;

    use super::*;

    const ADDRESSES: [&str; 2] = ["192.0.2.254:0", "[2001:db8::254]:0"];
    const BACKENDS: [&str; 2] = ["203.0.113.20:8080", "[2001:db8::20]:8080"];

    fn end(text: &str) -> Endpoint {
        text.parse::<SocketAddr>()
            .expect("a literal address")
            .into()
    }

    fn allocator(
        worker: u16,
        workers: u16,
        range: RangeInclusive<u16>,
        reserved: &[RangeInclusive<u16>],
    ) -> PortAllocator {
        let mut allocator = PortAllocator::new(WorkerId(worker), workers, range, reserved);
        allocator.set_addresses(&ADDRESSES.map(|text| end(text).address));
        allocator
    }

    /// The first candidate that is not taken.
    fn allocate(
        allocator: &mut PortAllocator,
        source: Address,
        destination: &Endpoint,
        taken: &BTreeSet<u16>,
    ) -> Option<u16> {
        allocator
            .candidates(source, destination, Protocol::TCP)
            .map(|port| port.0)
            .find(|port| !taken.contains(port))
    }

    #[test]
    fn workers_share_all_ports_and_none_twice() {
        let reserved = [2000..=2099, 2500..=2500];
        for (text, backend) in ADDRESSES.iter().zip(BACKENDS) {
            let source = end(text).address;
            let mut seen = BTreeSet::new();
            for worker in 0..4 {
                let mut allocator = allocator(worker, 4, 1024..=2999, &reserved);
                let mut taken = BTreeSet::new();
                while let Some(port) = allocate(&mut allocator, source, &end(backend), &taken) {
                    assert_eq!(
                        steer::owner(&Endpoint::new(source, Port(port)), 4),
                        WorkerId(worker)
                    );
                    assert!(taken.insert(port));
                }
                assert_eq!(taken.len(), allocator.capacity(source));
                assert!(seen.is_disjoint(&taken));
                seen.extend(taken);
            }
            let expected = (1024..=2999).filter(|port| !reserved.iter().any(|r| r.contains(port)));
            assert!(seen.into_iter().eq(expected));
        }
    }

    #[test]
    fn a_client_keeps_its_address_and_its_owner() {
        for (text, backend) in ["192.0.2.1:0", "[2001:db8::1]:0"].iter().zip(BACKENDS) {
            let client = end(text).address;
            let reserved = [1100..=1199];
            let mut allocator = allocator(2, 3, 1024..=1999, &reserved);
            assert_eq!(allocator.capacity(client), 0);
            let ports: Vec<u16> = allocator
                .candidates(client, &end(backend), Protocol::UDP)
                .map(|port| port.0)
                .collect();
            assert!(ports.len() > 64, "{}", ports.len());
            for port in ports {
                assert!(!(1100..=1199).contains(&port));
                assert_eq!(
                    steer::owner(&Endpoint::new(client, Port(port)), 3),
                    WorkerId(2)
                );
            }
        }
    }

    #[test]
    fn the_search_is_bounded() {
        let mut allocator = allocator(0, 1, 1024..=29_999, &[]);
        for text in ADDRESSES {
            let source = end(text).address;
            let tried = allocator
                .candidates(source, &end(BACKENDS[0]), Protocol::TCP)
                .count();
            assert_eq!(tried, 128);
        }
    }

    #[test]
    fn an_unusable_range_gives_no_port() {
        let mut allocator = allocator(0, 1, 1024..=1099, &[1000..=2000]);
        let source = end(ADDRESSES[0]).address;
        let destination = end(BACKENDS[0]);
        assert_eq!(
            allocator
                .candidates(source, &destination, Protocol::TCP)
                .next(),
            None
        );
        let client = end("192.0.2.1:0").address;
        assert_eq!(
            allocator
                .candidates(client, &destination, Protocol::TCP)
                .next(),
            None
        );
    }

    #[test]
    fn addresses_come_and_go() {
        let mut allocator = allocator(0, 2, 1024..=1999, &[]);
        let [v4, v6] = ADDRESSES.map(|text| end(text).address);
        let before = allocator.capacity(v6);
        allocator.set_addresses(&[v6]);
        assert_eq!(allocator.capacity(v4), 0);
        assert_eq!(allocator.capacity(v6), before);
    }

    proptest! {
        /// A destination's ports stand in a queue; each that is tried goes to the back, so a port is
        /// not given twice before every other was tried.
        #[test]
        fn candidates_come_in_the_order_of_a_queue(
            frees in proptest::collection::vec(proptest::option::of(any::<usize>()), 1..300),
            family in 0_usize..2,
        ) {
            let mut allocator = allocator(0, 2, 1024..=1079, &[]);
            let source = end(ADDRESSES[family]).address;
            let destination = end(BACKENDS[family]);
            let mut queue: VecDeque<u16> = allocator
                .candidates(source, &destination, Protocol::TCP)
                .map(|port| port.0)
                .collect();
            prop_assert_eq!(queue.len(), allocator.capacity(source));
            let mut taken = BTreeSet::new();
            for free in frees {
                if let Some(nth) = free {
                    let port = taken.iter().nth(nth % taken.len().max(1)).copied();
                    if let Some(port) = port {
                        taken.remove(&port);
                    }
                    continue;
                }
                let expected = queue.iter().position(|port| !taken.contains(port));
                queue.rotate_left(expected.map_or(0, |at| at + 1));
                let expected = expected.and_then(|_| queue.back().copied());
                let port = allocate(&mut allocator, source, &destination, &taken);
                prop_assert_eq!(port, expected);
                taken.extend(port);
            }
        }
    }
}
