//! Which source ports a worker tries for a masqueraded flow, and in which order.
//!
//! A worker may use a port P of an address only if it owns (address, P) itself, so that the reply
//! comes to it (`steer`). Ports are shared between destinations: whether a candidate is free is
//! asked of the flow table, whose reply tuple it would become. Each destination has a cursor that
//! walks round the circle of ports, so a port that was just freed comes last; destinations whose
//! hashes meet share a cursor, which only makes the rest longer. No time is kept, and nothing is
//! allocated once the addresses are known.

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
