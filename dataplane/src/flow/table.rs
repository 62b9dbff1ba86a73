//! One worker's flows: bounded, found by either tuple, forgotten in time.
//!
//! Flows lie in a slab. An index of `slot * 2 + direction` finds them by original and by reply tuple;
//! both stand in one hash table, so that a packet costs one look-up whichever way it goes. The index
//! has room for twice the entries it can ever hold: hashbrown then never grows, and at this load
//! leaves next to no tombstones.
//!
//! The table knows nothing of schedulers or snapshots. All memory is taken at the start. The rule:
//! a slot is either on the free list, or holds a flow that stands in the index twice and on the wheel
//! once.

use std::ops::{Deref, DerefMut};

use hashbrown::HashTable;

use super::expiry::{Timeouts, Wheel};
use super::store::FlowFile;
use super::{Flow, State, seconds, stamp, tcp};
use crate::net::{Direction, Endpoint, Protocol, Tuple};
use crate::packet::TcpFlags;
use crate::time::{Duration, Instant};

/// One worker's flows.
#[derive(Debug)]
pub struct FlowTable {
    slab: Slab,
    index: HashTable<u32>,
    free: Vec<u32>,
    wheel: Wheel,
    timeouts: Timeouts,
    keys: HashKeys,
}

/// A flow's slot. It is reused once the flow is removed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FlowId(pub u32);

/// What a flow begins with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NewFlow {
    /// Client to frontend.
    pub original: Tuple,
    /// Backend to translated source.
    pub reply: Tuple,
    /// `ServiceId` of the snapshot.
    pub service: u32,
    /// `BackendId` of the snapshot.
    pub backend: u32,
    /// The snapshot's epoch.
    pub epoch: u32,
    /// Flags of the first packet, if it is TCP.
    pub tcp: TcpFlags,
}

/// Why a flow was not added.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum InsertError {
    /// Every slot is taken.
    #[error("the flow table is full")]
    Full,
    /// One of the tuples belongs to another flow, or both are the same.
    #[error("a tuple of the flow is in use")]
    TupleInUse,
}

impl FlowTable {
    /// Takes over a slab. Flows that stand in it are kept, but for those whose tuple appears twice;
    /// a fresh slab is all zero. `seed` keeps strangers from choosing tuples that collide.
    #[must_use]
    pub fn with_slab(slab: Slab, seed: u64) -> Self {
        let capacity = slab.capacity();
        let mut table = Self {
            slab,
            index: HashTable::with_capacity(capacity as usize * 4 + 4),
            free: Vec::with_capacity(capacity as usize),
            wheel: Wheel::new(capacity),
            timeouts: Timeouts::default(),
            keys: HashKeys::from_seed(seed),
        };
        for slot in (0..capacity).rev() {
            table.adopt(slot);
        }
        table
    }

    /// Replaces the timeouts; flows that are queued already may be looked at late once.
    pub fn set_timeouts(&mut self, timeouts: Timeouts) {
        self.timeouts = timeouts;
    }

    /// Adds a flow that begins now.
    ///
    /// # Errors
    /// When no slot is free, or a tuple is taken.
    pub fn insert(&mut self, new: &NewFlow, now: Instant) -> Result<FlowId, InsertError> {
        let original = self.hash(&new.original);
        let reply = self.hash(&new.reply);
        if new.original == new.reply
            || self.find_hashed(original, &new.original).is_some()
            || self.find_hashed(reply, &new.reply).is_some()
        {
            return Err(InsertError::TupleInUse);
        }
        let slot = self.free.pop().ok_or(InsertError::Full)?;
        let Some(flow) = self.slab.get_mut(slot as usize) else {
            return Err(InsertError::Full);
        };
        *flow = new.begin(now);
        let deadline = now + self.timeouts.of(flow.protocol, flow.state);
        self.link(slot, Direction::Original, original);
        self.link(slot, Direction::Reply, reply);
        self.wheel.schedule(slot, deadline);
        Ok(FlowId(slot))
    }

    /// Removes a flow; returns what it was.
    pub fn remove(&mut self, id: FlowId) -> Option<Flow> {
        let flow = *self.flow(id)?;
        self.wheel.cancel(id.0);
        self.forget(id, &flow);
        Some(flow)
    }

    /// Counts a packet of `bytes` and notes that the flow is alive. A reply makes a flow of a
    /// protocol without states `REPLIED`.
    #[inline]
    pub fn record(&mut self, id: FlowId, direction: Direction, bytes: u32, now: Instant) {
        let Some(flow) = self.slab.get_mut(id.0 as usize) else {
            return;
        };
        let way = usize::from(direction as u8);
        if let (Some(packets), Some(total)) = (flow.packets.get_mut(way), flow.bytes.get_mut(way)) {
            *packets += 1;
            *total += u64::from(bytes);
        }
        flow.last_seen = stamp(now);
        // The state first: it is foreseeable, the direction is not.
        if flow.state == State::UNREPLIED && direction == Direction::Reply {
            flow.state = State::REPLIED;
        }
    }

    /// Moves a TCP flow's state by the flags of a segment. To be called after `record`.
    #[inline]
    pub fn advance(&mut self, id: FlowId, direction: Direction, flags: TcpFlags, now: Instant) {
        let Some(flow) = self.slab.get_mut(id.0 as usize) else {
            return;
        };
        if flow.protocol != Protocol::TCP || flow.state == State::FREE {
            return;
        }
        let (state, seen) = tcp::next(flow.state, flow.flags, direction, flags);
        flow.flags = seen;
        if state == flow.state {
            return;
        }
        let old = self.timeouts.of(Protocol::TCP, flow.state);
        let new = self.timeouts.of(Protocol::TCP, state);
        flow.state = state;
        if new < old {
            self.wheel.cancel(id.0);
            self.wheel.schedule(id.0, now + new);
        }
    }

    /// Forgets flows whose time has come and hands each to `gone`, then returns how many. Looks at
    /// no more than `budget` flows and wheel slots; what is left waits for the next call.
    pub fn expire(
        &mut self,
        now: Instant,
        budget: u32,
        gone: &mut impl FnMut(FlowId, &Flow),
    ) -> usize {
        let mut budget = budget;
        let mut expired = 0;
        while let Some(slot) = self.wheel.pop(now, &mut budget) {
            let id = FlowId(slot);
            let Some(flow) = self.flow(id).copied() else {
                continue;
            };
            let timeout = self.timeouts.of(flow.protocol, flow.state);
            let idle = idle(&flow, now);
            if idle < timeout {
                self.wheel.schedule(slot, now + (timeout - idle));
                continue;
            }
            self.forget(id, &flow);
            gone(id, &flow);
            expired += 1;
        }
        expired
    }

    /// The flow to which a packet with this tuple belongs, and the packet's direction.
    #[must_use]
    #[inline]
    pub fn find(&self, tuple: &Tuple) -> Option<(FlowId, Direction)> {
        self.find_hashed(self.hash(tuple), tuple)
    }

    /// First half of `find`: a batch can be hashed before its first look-up.
    #[must_use]
    #[inline]
    pub fn hash(&self, tuple: &Tuple) -> u64 {
        self.keys.hash(tuple)
    }

    /// Second half of `find`.
    #[must_use]
    #[inline]
    pub fn find_hashed(&self, hash: u64, tuple: &Tuple) -> Option<(FlowId, Direction)> {
        self.index
            .find(hash, |entry| self.slab.holds(*entry, tuple))
            .map(|entry| (FlowId(entry >> 1), direction_of(*entry)))
    }

    /// Brings what the look-ups of a batch will touch into the cache, all at once instead of one
    /// after the other: at a million flows in random order a hit that is counted costs 97 ns instead
    /// of 225. Changes nothing.
    #[inline]
    pub fn warm(&self, hashes: &[u64]) {
        for few in hashes.chunks(WARM) {
            let mut slots = [0; WARM];
            for (slot, hash) in slots.iter_mut().zip(few) {
                // The first entry with the right seven bits of hash is nearly always the one.
                *slot = self
                    .index
                    .find(*hash, |_| true)
                    .map_or(0, |entry| entry >> 1);
            }
            // One word of each of the two cache lines.
            let touched = slots.iter().fold(0, |sum, slot| {
                let flow = self.slab.get(*slot as usize);
                sum ^ flow.map_or(0, |flow| {
                    flow.client_address.words().1 ^ u64::from(flow.last_seen)
                })
            });
            std::hint::black_box(touched);
        }
    }

    /// A flow.
    #[must_use]
    #[inline]
    pub fn flow(&self, id: FlowId) -> Option<&Flow> {
        self.slab
            .get(id.0 as usize)
            .filter(|flow| flow.state != State::FREE)
    }

    /// A flow, to change what is not part of its tuples.
    #[must_use]
    #[inline]
    pub fn flow_mut(&mut self, id: FlowId) -> Option<&mut Flow> {
        self.slab
            .get_mut(id.0 as usize)
            .filter(|flow| flow.state != State::FREE)
    }

    /// All flows, in the order of their slots.
    pub fn iter(&self) -> impl Iterator<Item = (FlowId, &Flow)> {
        (0..)
            .map(FlowId)
            .zip(self.slab.iter())
            .filter(|(_, flow)| flow.state != State::FREE)
    }

    /// Copies of the flows in up to `limit` slots from slot `from` on, and the slot to go on with.
    #[must_use]
    pub fn page(&self, from: usize, limit: usize) -> (Vec<Flow>, Option<usize>) {
        let end = from.saturating_add(limit).min(self.capacity());
        let slots = self.slab.get(from..end).unwrap_or_default();
        let flows = slots
            .iter()
            .filter(|flow| flow.state != State::FREE)
            .copied()
            .collect();
        (flows, (end < self.capacity()).then_some(end))
    }

    /// How many flows there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.capacity() - self.free.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// How many flows there can be.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.slab.capacity() as usize
    }

    /// Puts a slot of a slab that was taken over where it belongs.
    fn adopt(&mut self, slot: u32) {
        let Some(flow) = self.slab.get(slot as usize).copied() else {
            return;
        };
        let (original, reply) = (flow.original(), flow.reply());
        if flow.state == State::FREE
            || original == reply
            || self.find(&original).is_some()
            || self.find(&reply).is_some()
        {
            self.release(slot);
            return;
        }
        self.link(slot, Direction::Original, self.hash(&original));
        self.link(slot, Direction::Reply, self.hash(&reply));
        // The time is not known yet: the wheel's first round finds the right slot.
        self.wheel.schedule(slot, Instant::default());
    }

    /// Takes a flow that is off the wheel out of the index and frees its slot.
    fn forget(&mut self, id: FlowId, flow: &Flow) {
        self.unlink(id.0, Direction::Original, &flow.original());
        self.unlink(id.0, Direction::Reply, &flow.reply());
        self.release(id.0);
    }

    fn release(&mut self, slot: u32) {
        if let Some(flow) = self.slab.get_mut(slot as usize) {
            *flow = Flow::default();
            self.free.push(slot);
        }
    }

    fn link(&mut self, slot: u32, direction: Direction, hash: u64) {
        let Self {
            index, slab, keys, ..
        } = self;
        index.insert_unique(hash, entry_of(slot, direction), |entry| {
            slab.tuple(*entry).map_or(0, |tuple| keys.hash(&tuple))
        });
    }

    fn unlink(&mut self, slot: u32, direction: Direction, tuple: &Tuple) {
        let wanted = entry_of(slot, direction);
        let hash = self.hash(tuple);
        if let Ok(found) = self.index.find_entry(hash, |entry| *entry == wanted) {
            found.remove();
        }
    }
}

impl NewFlow {
    fn begin(&self, now: Instant) -> Flow {
        Flow {
            client_address: self.original.source.address,
            frontend_address: self.original.destination.address,
            backend_address: self.reply.source.address,
            source_address: self.reply.destination.address,
            client_port: self.original.source.port.0,
            frontend_port: self.original.destination.port.0,
            backend_port: self.reply.source.port.0,
            source_port: self.reply.destination.port.0,
            last_seen: stamp(now),
            created: seconds(now),
            service: self.service,
            backend: self.backend,
            epoch: self.epoch,
            protocol: self.original.protocol,
            state: tcp::first(self.original.protocol, self.tcp),
            ..Flow::default()
        }
    }
}

/// The memory of a table's flows.
#[derive(Debug)]
pub struct Slab(Memory);

#[derive(Debug)]
enum Memory {
    Own(Box<[Flow]>),
    File(FlowFile),
}

impl Slab {
    /// Memory of this process, for `capacity` flows.
    #[must_use]
    pub fn with_capacity(capacity: u32) -> Self {
        vec![Flow::default(); capacity.min(LARGEST) as usize]
            .into_boxed_slice()
            .into()
    }

    /// How many flows it can hold.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        u32::try_from(self.len()).unwrap_or(u32::MAX).min(LARGEST)
    }

    #[inline]
    fn holds(&self, entry: u32, tuple: &Tuple) -> bool {
        self.get((entry >> 1) as usize)
            .is_some_and(|flow| flow.has(direction_of(entry), tuple))
    }

    #[inline]
    fn tuple(&self, entry: u32) -> Option<Tuple> {
        let flow = self.get((entry >> 1) as usize)?;
        Some(match direction_of(entry) {
            Direction::Original => flow.original(),
            Direction::Reply => flow.reply(),
        })
    }
}

impl From<Box<[Flow]>> for Slab {
    fn from(flows: Box<[Flow]>) -> Self {
        Self(Memory::Own(flows))
    }
}

impl From<FlowFile> for Slab {
    fn from(flows: FlowFile) -> Self {
        Self(Memory::File(flows))
    }
}

impl Deref for Slab {
    type Target = [Flow];

    #[inline]
    fn deref(&self) -> &[Flow] {
        match &self.0 {
            Memory::Own(flows) => flows,
            Memory::File(flows) => flows,
        }
    }
}

impl DerefMut for Slab {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Flow] {
        match &mut self.0 {
            Memory::Own(flows) => flows,
            Memory::File(flows) => flows,
        }
    }
}

/// How many look-ups are begun together; more gain nothing.
const WARM: usize = 16;

/// An entry of the index has one bit for the direction, and the wheel needs some numbers beside the
/// slots.
const LARGEST: u32 = 1 << 30;

const fn entry_of(slot: u32, direction: Direction) -> u32 {
    slot << 1 | direction as u32
}

const fn direction_of(entry: u32) -> Direction {
    if entry & 1 == 0 {
        Direction::Original
    } else {
        Direction::Reply
    }
}

/// Idle time of a flow that may have been seen a moment after `now` was read.
fn idle(flow: &Flow, now: Instant) -> Duration {
    let idle = flow.idle(now);
    if idle > Duration::from_millis(1 << 31) {
        Duration::ZERO
    } else {
        idle
    }
}

/// Secrets of the tuple hash: folded multiplications, each of 16 bytes, with a key for every word.
#[derive(Clone, Copy, Debug)]
struct HashKeys([u64; 6]);

impl HashKeys {
    fn from_seed(seed: u64) -> Self {
        let mut state = seed;
        Self([(); 6].map(|()| {
            // SplitMix64.
            state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
            let mut z = state;
            z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
            z ^ (z >> 31)
        }))
    }

    #[inline]
    fn hash(&self, tuple: &Tuple) -> u64 {
        let [k0, k1, k2, k3, k4, k5] = self.0;
        let (a, b) = tuple.source.address.words();
        let (c, d) = tuple.destination.address.words();
        let last = ports(&tuple.source, &tuple.destination) | u64::from(tuple.protocol.0) << 32;
        let source = fold(a ^ k0, b ^ k1);
        let destination = fold(c ^ k2, d ^ k3);
        fold(source ^ last ^ k4, destination ^ k5)
    }
}

#[inline]
fn ports(source: &Endpoint, destination: &Endpoint) -> u64 {
    u64::from(source.port.0) | u64::from(destination.port.0) << 16
}

/// Both halves of the product.
#[inline]
fn fold(a: u64, b: u64) -> u64 {
    let (low, high) = a.carrying_mul(b, 0);
    low ^ high
}
