//! One packet in, one `Verdict` out; the order of the steps.
//!
//! ```text
//! parse -> direction -> owner? -> flow?  -- hit:  still served? -> track -> rewrite -> route
//!                                        '- miss: frontend? -> schedule -> bind -> rewrite -> route
//! ```
//!
//! Pure: it sees bytes, the time and the snapshot, never a device, a lock or the allocator. What others
//! must know of a flow leaves as `FlowEvent`s, which the worker applies before the packet goes. An
//! answer that the engine makes itself (`Verdict::Reject`) stands in `Pipeline::answer`.

mod bind;
mod route;

pub use route::punt;

use std::sync::Arc;

use crate::classify::{self, Class};
use crate::command::{Command, Hook, Origin};
use crate::counters::{BackendCounts, DropReason};
use crate::flow::table::{FlowId, FlowTable};
use crate::flow::{Flow, State};
use crate::nat;
use crate::nat::ports::PortAllocator;
use crate::nat::rewrite::{self, Checksum};
use crate::net::{Direction, Protocol, Tuple};
use crate::packet::{self, Fragment, Headers, checksum, reply};
use crate::snapshot::{BackendId, ServiceId, Snapshot};
use crate::steer::{self, FingerprintKey, WorkerId};
use crate::time::Instant;

/// A packet as the worker hands it in: its bytes from the Ethernet header on, and what they cannot say.
#[derive(Debug)]
pub struct Packet<'a> {
    /// The frame.
    pub bytes: &'a mut [u8],
    /// Where it came from and in what state.
    pub meta: Meta,
}

/// What the bytes of a packet cannot say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Meta {
    /// By which way it came.
    pub door: Door,
    /// What its transport checksum is worth.
    pub checksum: ChecksumState,
    /// Whether it stands for several packets on the wire.
    pub super_packet: bool,
    /// How often workers handed it over.
    pub handovers: u8,
}

/// The way a packet came.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Door {
    /// From an uplink's queue.
    Uplink {
        /// The uplink's number.
        uplink: u8,
        /// Its device.
        ifindex: u32,
    },
    /// From the host port.
    Host(Origin),
}

/// What a transport checksum is worth.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ChecksumState {
    /// It covers the packet.
    Complete,
    /// It is the pseudo-header's sum only; hardware or the receiver completes it.
    Partial,
    /// From a virtual uplink: partial exactly if the field equals the pseudo-header's sum.
    Suspect,
}

/// What becomes of a packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// Send it, as it is now.
    Transmit(Out),
    /// Give it back to the kernel, unchanged, through the door it came by.
    Punt,
    /// Drop it and send the answer.
    Reject,
    /// Drop it.
    Drop(DropReason),
    /// It belongs to another worker.
    HandOver(WorkerId),
}

/// The way out.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Out {
    /// An uplink's transmit ring; the Ethernet header is written.
    Uplink {
        /// The uplink's number.
        uplink: u8,
        /// The same way through the host port, for a worker without a queue there.
        otherwise: Command,
    },
    /// The host port.
    Host(Command),
}

/// What the programs' maps must learn.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FlowEvent {
    /// A flow was bound.
    Bound(FlowId, Fingerprints),
    /// A flow has gone.
    Gone(Fingerprints),
}

/// A flow's two entries in the tuple map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fingerprints {
    /// Of its packets from the client.
    pub original: u64,
    /// Of its packets from the backend.
    pub reply: u64,
}

/// What a pipeline is made of.
#[derive(Debug)]
pub struct PipelineParts {
    /// Its worker.
    pub worker: WorkerId,
    /// How many workers there are.
    pub workers: u16,
    /// The flow table.
    pub flows: FlowTable,
    /// The SNAT ports of this worker.
    pub ports: PortAllocator,
    /// Secret of the tuple map.
    pub key: FingerprintKey,
    /// Connections per backend, written here alone.
    pub counts: Arc<BackendCounts>,
    /// Seed of random choices.
    pub seed: u64,
}

/// A worker's packet path and all its state.
#[derive(Debug)]
pub struct Pipeline {
    worker: WorkerId,
    workers: u16,
    flows: FlowTable,
    ports: PortAllocator,
    key: FingerprintKey,
    counts: Arc<BackendCounts>,
    random: u64,
    cursors: Box<[u32]>,
    events: Vec<FlowEvent>,
    answer: Answer,
}

/// A packet that the engine makes itself.
#[derive(Debug)]
struct Answer {
    bytes: Box<[u8; ANSWER_SIZE]>,
    length: usize,
    out: Out,
}

/// An IPv6 error carries at most 1,280 bytes (RFC 4443 section 2.4), and the Ethernet header.
const ANSWER_SIZE: usize = 1_536;
/// In a flow that leads to where its client wanted to go anyway.
const NO_SERVICE: u32 = u32::MAX;
const CURSORS: usize = 1 << 16;
const EVENTS: usize = 256;
/// At 128 bytes each and their index they fill a second-level cache.
const MANY_FLOWS: usize = 8_192;
/// How many flows one call of `expire` ends at most.
pub const EXPIRY_BUDGET: u32 = 64;

impl Pipeline {
    /// Allocates everything it will ever need.
    #[must_use]
    pub fn new(parts: PipelineParts) -> Self {
        let nowhere = Command {
            action: crate::command::Action::Up,
            ifindex: 0,
            far: crate::net::MacAddr::default(),
            mark: false,
        };
        Self {
            worker: parts.worker,
            workers: parts.workers,
            flows: parts.flows,
            ports: parts.ports,
            key: parts.key,
            counts: parts.counts,
            random: parts.seed | 1,
            cursors: vec![0; CURSORS].into_boxed_slice(),
            events: Vec::with_capacity(EVENTS),
            answer: Answer {
                bytes: Box::new([0; ANSWER_SIZE]),
                length: 0,
                out: Out::Host(nowhere),
            },
        }
    }

    /// Decides what becomes of a packet and rewrites it. Never allocates, never panics.
    pub fn process(
        &mut self,
        packet: &mut Packet<'_>,
        now: Instant,
        snapshot: &Snapshot,
    ) -> Verdict {
        let Ok(headers) = packet::parse(packet.bytes) else {
            return self.refuse(packet, DropReason::Malformed);
        };
        if headers.fragment != Fragment::None {
            return self.refuse(packet, DropReason::Fragment);
        }
        if headers.tuple.protocol == Protocol::SCTP {
            // Its CRC32c covers the ports (RFC 9260 section 6.8), which no incremental update mends.
            return Self::unknown(&packet.meta.door);
        }
        if packet.meta.checksum == ChecksumState::Suspect {
            if checksum::is_partial(packet.bytes, &headers) {
                checksum::complete(packet.bytes, &headers);
            }
            packet.meta.checksum = ChecksumState::Complete;
        }
        let class = classify::classify(&packet.meta.door, &headers.tuple, snapshot);
        let owner = steer::owner(
            &steer::client_side(&headers.tuple, class.direction()),
            self.workers,
        );
        if owner != self.worker && packet.meta.handovers == 0 {
            return Verdict::HandOver(owner);
        }
        let mut step = Step {
            packet,
            headers: &headers,
            now,
            snapshot,
        };
        match self.flows.find(&headers.tuple) {
            Some((id, direction)) => self.existing(&mut step, id, direction, class),
            None => self.missing(&mut step, class),
        }
    }

    /// Whether there are more flows than a core's cache holds, so that `warm` pays.
    #[must_use]
    pub fn outgrows_cache(&self) -> bool {
        self.flows.len() >= MANY_FLOWS
    }

    /// Where the packet's flow would stand, to be given to `warm`.
    #[must_use]
    pub fn flow_hash(&self, bytes: &[u8]) -> Option<u64> {
        let headers = packet::parse(bytes).ok()?;
        Some(self.flows.hash(&headers.tuple))
    }

    /// Brings the flows of the packets that come next into the cache, all at once instead of one
    /// after the other. Changes nothing.
    pub fn warm(&self, hashes: &[u64]) {
        self.flows.warm(hashes);
    }

    /// Gives up flows whose time has come; bounded work.
    pub fn expire(&mut self, now: Instant) {
        let Self {
            flows,
            events,
            key,
            counts,
            ..
        } = self;
        flows.expire(now, EXPIRY_BUDGET, &mut |_, flow: &Flow| {
            count_end(counts, flow);
            events.push(FlowEvent::Gone(fingerprints(flow, key)));
        });
    }

    /// Ends a flow at once: its tuples found no room, or someone asked.
    pub fn forget(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.remove(id) {
            count_end(&self.counts, &flow);
            self.events
                .push(FlowEvent::Gone(fingerprints(&flow, &self.key)));
        }
    }

    /// Takes the oldest event that was not taken yet.
    pub fn pop_event(&mut self) -> Option<FlowEvent> {
        // At most two wait in the common case, so taking the first is cheap.
        (!self.events.is_empty()).then(|| self.events.remove(0))
    }

    /// Addresses that may be masqueraded with; not on the packet path.
    pub fn set_snat_addresses(&mut self, addresses: &[crate::net::Address]) {
        self.ports.set_addresses(addresses);
    }

    /// The answer of the last `Verdict::Reject`, and its way out.
    pub fn answer(&mut self) -> (&mut [u8], Out) {
        let Answer { bytes, length, out } = &mut self.answer;
        (bytes.get_mut(..*length).unwrap_or_default(), *out)
    }

    /// The flow table, to be read.
    #[must_use]
    pub const fn flows(&self) -> &FlowTable {
        &self.flows
    }

    /// What the steering cannot have meant for us goes back; what it did is dropped.
    fn refuse(&self, packet: &Packet<'_>, reason: DropReason) -> Verdict {
        match packet.meta.door {
            Door::Uplink { .. } => Verdict::Punt,
            Door::Host(_) => Verdict::Drop(reason),
        }
    }

    fn existing(
        &mut self,
        step: &mut Step<'_, '_>,
        id: FlowId,
        direction: Direction,
        class: Class<'_>,
    ) -> Verdict {
        let Some(flow) = self.flows.flow(id) else {
            return self.missing(step, class);
        };
        let reopened = flow.is_restarted_by(direction, step.headers.tcp);
        let gone = flow.epoch != epoch_of(step.snapshot) && !is_served(flow, step.snapshot);
        if reopened || (gone && flow.protocol != Protocol::TCP) {
            self.forget(id);
            return match direction {
                Direction::Original => self.missing(step, class),
                Direction::Reply => Verdict::Drop(DropReason::NoFlow),
            };
        }
        if gone {
            self.forget(id);
            return self.reset(step);
        }
        let flow = *flow;
        let (verdict, change) = match route::route(step, &flow, direction) {
            route::Routed::Way(out, decrement) => {
                let checksum = match step.packet.meta.checksum {
                    ChecksumState::Partial => Checksum::Partial,
                    ChecksumState::Complete | ChecksumState::Suspect => Checksum::Complete,
                };
                (
                    Verdict::Transmit(out),
                    nat::change(&flow, direction, checksum, decrement),
                )
            }
            route::Routed::TimeExceeded => return self.time_exceeded(step),
            route::Routed::TooBig(mtu) => return self.too_big(step, mtu),
            route::Routed::Nowhere(reason) => return Verdict::Drop(reason),
        };
        rewrite::apply(step.packet.bytes, step.headers, &change);
        self.track(id, direction, step);
        self.finish(step, verdict)
    }

    fn missing(&mut self, step: &mut Step<'_, '_>, class: Class<'_>) -> Verdict {
        match class {
            Class::Frontend(frontend) => {
                if !may_begin(step.headers) {
                    return self.reset(step);
                }
                match self.bind(step, frontend) {
                    Ok(id) => self.existing(step, id, Direction::Original, class),
                    Err(bind::Refused::Reject) => self.unreachable(step),
                    Err(bind::Refused::Drop(reason)) => Verdict::Drop(reason),
                }
            }
            Class::Orphan if may_begin(step.headers) => match self.bind_direct(step) {
                Some(Ok(id)) => self.existing(step, id, Direction::Original, class),
                Some(Err(_)) | None => Self::unknown(&step.packet.meta.door),
            },
            Class::Reply | Class::Orphan => Self::unknown(&step.packet.meta.door),
        }
    }

    /// None of ours, whatever the steering thought.
    const fn unknown(door: &Door) -> Verdict {
        match door {
            Door::Uplink { .. } | Door::Host(Origin::Steered { .. }) => Verdict::Punt,
            Door::Host(Origin::Host) => Verdict::Drop(DropReason::NoFlow),
        }
    }

    /// Counts the packet and moves the flow's state.
    fn track(&mut self, id: FlowId, direction: Direction, step: &Step<'_, '_>) {
        let was_active = self.flows.flow(id).is_some_and(is_active);
        self.flows
            .record(id, direction, step.headers.length, step.now);
        self.flows
            .advance(id, direction, step.headers.tcp, step.now);
        let Some(flow) = self.flows.flow_mut(id) else {
            return;
        };
        flow.epoch = epoch_of(step.snapshot);
        let is_active = is_active(flow);
        if was_active != is_active {
            self.counts.moved(BackendId(flow.backend), is_active);
        }
    }

    /// The last step of a packet that is sent: what an uplink's ring cannot leave to hardware.
    fn finish(&self, step: &mut Step<'_, '_>, verdict: Verdict) -> Verdict {
        if let Verdict::Transmit(Out::Uplink { .. }) = verdict
            && step.packet.meta.checksum == ChecksumState::Partial
        {
            checksum::complete(step.packet.bytes, step.headers);
            step.packet.meta.checksum = ChecksumState::Complete;
        }
        verdict
    }

    fn reset(&mut self, step: &Step<'_, '_>) -> Verdict {
        let out = self.answer.bytes.as_mut_slice();
        let length = reply::tcp_reset(step.packet.bytes, step.headers, out);
        self.answered(step, length)
    }

    fn unreachable(&mut self, step: &Step<'_, '_>) -> Verdict {
        if step.headers.tuple.protocol == Protocol::TCP {
            return self.reset(step);
        }
        let out = self.answer.bytes.as_mut_slice();
        let length = reply::icmp_unreachable(step.packet.bytes, step.headers, out);
        self.answered(step, length)
    }

    fn time_exceeded(&mut self, step: &Step<'_, '_>) -> Verdict {
        let Some(source) = route::own_address(step) else {
            return Verdict::Drop(DropReason::HopLimit);
        };
        let out = self.answer.bytes.as_mut_slice();
        let length = reply::icmp_time_exceeded(source, step.packet.bytes, step.headers, out);
        match self.answered(step, length) {
            Verdict::Reject => Verdict::Reject,
            _ => Verdict::Drop(DropReason::HopLimit),
        }
    }

    fn too_big(&mut self, step: &Step<'_, '_>, mtu: u32) -> Verdict {
        let Some(source) = route::own_address(step) else {
            return Verdict::Drop(DropReason::TooBig);
        };
        let out = self.answer.bytes.as_mut_slice();
        let length = reply::icmp_too_big(source, mtu, step.packet.bytes, step.headers, out);
        match self.answered(step, length) {
            Verdict::Reject => Verdict::Reject,
            _ => Verdict::Drop(DropReason::TooBig),
        }
    }

    /// The answer goes where its cause came from, if there is a way.
    fn answered(&mut self, step: &Step<'_, '_>, length: Option<usize>) -> Verdict {
        match (length, route::back(step)) {
            (Some(length), Some(out)) => {
                self.answer.length = length;
                self.answer.out = out;
                Verdict::Reject
            }
            _ => Verdict::Drop(DropReason::NoAnswer),
        }
    }

    /// xorshift64*: choices need spread, not secrecy.
    fn next_random(&mut self) -> u64 {
        self.random ^= self.random >> 12;
        self.random ^= self.random << 25;
        self.random ^= self.random >> 27;
        self.random.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 16
    }
}

/// One packet on its way through the steps.
struct Step<'a, 'p> {
    packet: &'a mut Packet<'p>,
    headers: &'a Headers,
    now: Instant,
    snapshot: &'a Snapshot,
}

impl Step<'_, '_> {
    const fn tuple(&self) -> &Tuple {
        &self.headers.tuple
    }
}

/// What the snapshot's epoch is in a flow.
#[expect(
    clippy::cast_possible_truncation,
    reason = "compared for equality only"
)]
const fn epoch_of(snapshot: &Snapshot) -> u32 {
    snapshot.epoch as u32
}

/// Whether a packet can be a connection's first.
fn may_begin(headers: &Headers) -> bool {
    headers.tuple.protocol != Protocol::TCP || headers.tcp.opens()
}

/// Whether the flow's backend is in any slice of its Service. A flow of no Service always is.
fn is_served(flow: &Flow, snapshot: &Snapshot) -> bool {
    flow.service == NO_SERVICE
        || snapshot
            .service(ServiceId(flow.service))
            .is_some_and(|service| service.backend(BackendId(flow.backend)).is_some())
}

fn fingerprints(flow: &Flow, key: &FingerprintKey) -> Fingerprints {
    Fingerprints {
        original: steer::fingerprint(&flow.original(), Direction::Original, key),
        reply: steer::fingerprint(&flow.reply(), Direction::Reply, key),
    }
}

fn count_end(counts: &BackendCounts, flow: &Flow) {
    counts.closed(BackendId(flow.backend), is_active(flow));
}

/// Whether the connection counts as active, as `ip_vs` has it.
fn is_active(flow: &Flow) -> bool {
    matches!(flow.state, State::ESTABLISHED | State::REPLIED)
}

/// Whether a packet that entered here belongs to a client of this node.
const fn is_egress(door: &Door) -> bool {
    matches!(
        door,
        Door::Host(Origin::Steered {
            hook: Hook::Egress,
            ..
        })
    )
}
