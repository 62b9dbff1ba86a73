//! The loop of one worker: the only reader of the clock, the only place where frames move.
//!
//! ```text
//! now = clock.now()                     // once per batch
//! if epoch moved: snapshot = load       // one atomic read per batch
//! for port in ports:                    // uplink queues, the host queue, hand-over rings
//!     port.receive(&mut batch)
//!     look_ahead(&batch)                // many flows: theirs are brought into the cache
//!     for frame: verdict = pipeline.process(packet, now, &snapshot)
//!                apply(pipeline.events) // the maps the programs read, before the packet leaves
//!                send, punt, answer, hand over or free
//!     port.flush()
//! pipeline.expire(now)                  // bounded work
//! if idle: wait(ports, eventfd, timeout)
//! ```
//!
//! A frame ends in exactly one of: its device's ring, its device's free list. It never leaves this
//! worker; a packet for another worker is copied into a parcel.

use std::os::fd::BorrowedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::channel::{Receiver, Sender};

use crate::command::{Command, Origin};
use crate::counters::{DropReason, SharedCounters, WorkerCounters};
use crate::device::{BATCH, Batch, Device, DeviceReport, Frame, VnetHeader};
use crate::flow::Flow;
use crate::handover::{Inbox, Outbox, Parcel};
use crate::packet::ethernet;
use crate::pipeline::{ChecksumState, Door, FlowEvent, Meta, Out, Packet, Pipeline, Verdict, punt};
use crate::snapshot::Snapshot;
use crate::steer::WorkerId;
use crate::steering::{Heartbeat, TupleMap};
use crate::time::{Clock, Instant};
use crate::waker::Waker;

/// A question to a worker, answered between two batches.
#[derive(Debug)]
pub enum Request {
    /// Up to `limit` flows from slot `from` on.
    Flows {
        /// The first slot to look at.
        from: usize,
        /// How many slots to look at.
        limit: usize,
        /// Where the answer goes.
        reply: Sender<FlowPage>,
    },
    /// What went through the devices.
    Ports {
        /// Where the answer goes.
        reply: Sender<PortsReport>,
    },
}

/// What went through a worker's devices.
#[derive(Debug, Default)]
pub struct PortsReport {
    /// Its queue of the host port.
    pub host_port: DeviceReport,
    /// Its queues of each uplink, by the uplink's number.
    pub uplinks: Vec<DeviceReport>,
}

/// A part of a worker's flow table.
#[derive(Debug)]
pub struct FlowPage {
    /// Copies of the flows.
    pub flows: Vec<Flow>,
    /// The slot to ask for next; `None` at the end.
    pub next: Option<usize>,
    /// When they were copied.
    pub now: Instant,
}

/// This worker's part of one uplink.
#[derive(Debug)]
pub struct UplinkPort<U> {
    /// The uplink's device.
    pub ifindex: u32,
    /// Whether a local sender's checksum may be partial there (veth).
    pub suspect_checksums: bool,
    /// Its queues, if this worker has any.
    pub device: Option<U>,
}

/// The ports of one worker.
#[derive(Debug)]
pub struct Ports<U, H> {
    /// By the uplink's number.
    pub uplinks: Vec<UplinkPort<U>>,
    /// This worker's queue of the host port.
    pub host: H,
    /// From the other workers.
    pub inboxes: Vec<Inbox>,
    /// To the other workers, by their number; none to itself.
    pub outboxes: Vec<Option<(Outbox, Arc<Waker>)>>,
}

/// What a worker is made of.
#[derive(Debug)]
pub struct WorkerParts<U, H, C> {
    /// Its number.
    pub id: WorkerId,
    /// Its packet path.
    pub pipeline: Pipeline,
    /// Its ports.
    pub ports: Ports<U, H>,
    /// Its part of the map that the programs read.
    pub tuples: TupleMap,
    /// The sign of life that the programs read.
    pub heartbeat: Heartbeat,
    /// Where snapshots are published.
    pub published: Arc<ArcSwap<Snapshot>>,
    /// Where its counters are published.
    pub shared: Arc<SharedCounters>,
    /// Questions.
    pub requests: Receiver<Request>,
    /// What wakes it.
    pub waker: Arc<Waker>,
    /// Its clock.
    pub clock: C,
    /// How long it looks for work before it blocks.
    pub spin: Duration,
    /// How long it blocks at most.
    pub longest_wait: Duration,
}

/// One pinned thread's work.
#[derive(Debug)]
pub struct Worker<U, H, C> {
    id: WorkerId,
    pipeline: Pipeline,
    ports: Ports<U, H>,
    tuples: TupleMap,
    heartbeat: Heartbeat,
    published: arc_swap::Cache<Arc<ArcSwap<Snapshot>>, Arc<Snapshot>>,
    counters: WorkerCounters,
    shared: Arc<SharedCounters>,
    requests: Receiver<Request>,
    waker: Arc<Waker>,
    clock: C,
    spin: Duration,
    longest_wait: Duration,
    batch: Batch,
}

/// Where the packet at hand lies.
enum Source {
    Uplink(usize, Frame),
    Host(Frame),
    Parcel(Parcel),
}

impl<U: Device, H: Device, C: Clock> Worker<U, H, C> {
    /// Allocates everything it will ever need.
    #[must_use]
    pub fn new(parts: WorkerParts<U, H, C>) -> Self {
        Self {
            id: parts.id,
            pipeline: parts.pipeline,
            ports: parts.ports,
            tuples: parts.tuples,
            heartbeat: parts.heartbeat,
            published: arc_swap::Cache::new(parts.published),
            counters: WorkerCounters::default(),
            shared: parts.shared,
            requests: parts.requests,
            waker: parts.waker,
            clock: parts.clock,
            spin: parts.spin,
            longest_wait: parts.longest_wait,
            batch: Batch::with_capacity(BATCH),
        }
    }

    /// Works until told to stop.
    pub fn run(&mut self, stop: &AtomicBool) {
        let mut last_work = self.clock.now();
        while !stop.load(Ordering::Relaxed) {
            let now = self.clock.now();
            if self.turn(now) > 0 {
                last_work = now;
            } else if now.since(last_work) >= self.spin {
                self.block();
            } else {
                std::hint::spin_loop();
            }
        }
    }

    /// One round over all ports; returns how many packets there were.
    pub fn turn(&mut self, now: Instant) -> usize {
        self.heartbeat.beat(self.id, now);
        let snapshot = Arc::clone(self.published.load());
        self.adopt(&snapshot);
        let mut packets = 0;
        for number in 0..self.ports.uplinks.len() {
            packets += self.take_uplink(number, now, &snapshot);
        }
        packets += self.take_host(now, &snapshot);
        packets += self.take_parcels(now, &snapshot);
        self.pipeline.expire(now);
        self.apply_events(&mut Verdict::Punt);
        self.flush();
        self.answer_requests(now);
        self.counters.flows = self.pipeline.flows().len() as u64;
        self.shared.publish(&mut self.counters);
        packets
    }

    /// This worker's counters.
    #[must_use]
    pub const fn counters(&self) -> &WorkerCounters {
        &self.counters
    }

    /// Its ports, for tests.
    pub const fn ports(&mut self) -> &mut Ports<U, H> {
        &mut self.ports
    }

    /// Its packet path, for tests.
    #[must_use]
    pub const fn pipeline(&self) -> &Pipeline {
        &self.pipeline
    }

    /// Its part of the tuple map, for tests.
    #[must_use]
    pub const fn tuples(&self) -> &TupleMap {
        &self.tuples
    }

    fn adopt(&mut self, snapshot: &Snapshot) {
        if self.counters.epoch == snapshot.epoch {
            return;
        }
        self.counters.epoch = snapshot.epoch;
        self.pipeline
            .set_snat_addresses(snapshot.masquerade_addresses());
    }

    fn take_uplink(&mut self, number: usize, now: Instant, snapshot: &Snapshot) -> usize {
        let Some(port) = self.ports.uplinks.get_mut(number) else {
            return 0;
        };
        let mut batch = std::mem::take(&mut self.batch);
        let checksum = if port.suspect_checksums {
            ChecksumState::Suspect
        } else {
            ChecksumState::Complete
        };
        let uplink = u8::try_from(number).unwrap_or(u8::MAX);
        let door = Door::Uplink {
            uplink,
            ifindex: port.ifindex,
        };
        let count = port.device.as_mut().map_or(0, |device| {
            let count = device.receive(&mut batch);
            look_ahead(&self.pipeline, device, &batch);
            count
        });
        for (frame, vnet) in batch.drain(..) {
            let meta = Meta {
                door,
                checksum,
                super_packet: false,
                handovers: 0,
            };
            self.counters.received += 1;
            self.handle(Source::Uplink(number, frame), meta, vnet, now, snapshot);
        }
        self.batch = batch;
        count
    }

    fn take_host(&mut self, now: Instant, snapshot: &Snapshot) -> usize {
        let mut batch = std::mem::take(&mut self.batch);
        let count = self.ports.host.receive(&mut batch);
        look_ahead(&self.pipeline, &mut self.ports.host, &batch);
        for (frame, vnet) in batch.drain(..) {
            self.counters.received += 1;
            let bytes = self.ports.host.bytes(&frame);
            let origin = ethernet::Header::of(bytes)
                .and_then(|header| Origin::decode(header.destination, header.source));
            let Some(origin) = origin else {
                self.counters.drop(DropReason::UnknownOrigin);
                self.ports.host.free(frame);
                continue;
            };
            let checksum = if vnet.is_partial() {
                ChecksumState::Partial
            } else {
                ChecksumState::Complete
            };
            let door = Door::Host(origin);
            let meta = Meta {
                door,
                checksum,
                super_packet: vnet.is_super_packet(),
                handovers: 0,
            };
            self.handle(Source::Host(frame), meta, vnet, now, snapshot);
        }
        self.batch = batch;
        count
    }

    fn take_parcels(&mut self, now: Instant, snapshot: &Snapshot) -> usize {
        let mut count = 0;
        for number in 0..self.ports.inboxes.len() {
            for _ in 0..BATCH {
                let inbox = self.ports.inboxes.get_mut(number);
                let Some(parcel) = inbox.and_then(Inbox::receive) else {
                    break;
                };
                count += 1;
                self.counters.handed_in += 1;
                let (meta, vnet) = (parcel.meta, parcel.vnet);
                let parcel = self.handle(Source::Parcel(parcel), meta, vnet, now, snapshot);
                if let (Some(parcel), Some(inbox)) = (parcel, self.ports.inboxes.get_mut(number)) {
                    inbox.give_back(parcel);
                }
            }
        }
        count
    }

    /// Decides and carries out; an emptied parcel comes back.
    fn handle(
        &mut self,
        mut source: Source,
        meta: Meta,
        vnet: VnetHeader,
        now: Instant,
        snapshot: &Snapshot,
    ) -> Option<Parcel> {
        let Self {
            pipeline, ports, ..
        } = self;
        let mut packet = Packet {
            bytes: ports.bytes(&mut source),
            meta,
        };
        let mut verdict = pipeline.process(&mut packet, now, snapshot);
        let meta = packet.meta;
        // A checksum that was completed in software is partial no more.
        let vnet = if meta.checksum == ChecksumState::Partial || meta.super_packet {
            vnet
        } else {
            VnetHeader::default()
        };
        self.apply_events(&mut verdict);
        self.carry_out(source, verdict, &meta, &vnet, snapshot)
    }

    fn carry_out(
        &mut self,
        mut source: Source,
        verdict: Verdict,
        meta: &Meta,
        vnet: &VnetHeader,
        snapshot: &Snapshot,
    ) -> Option<Parcel> {
        let Self {
            ports,
            pipeline,
            counters,
            ..
        } = self;
        match verdict {
            Verdict::Transmit(out) => {
                let (sent, parcel) = ports.send(source, out, vnet);
                if sent {
                    counters.transmitted += 1;
                } else {
                    counters.drop(DropReason::DeviceFull);
                }
                return parcel;
            }
            Verdict::Punt => {
                let command = punt(&meta.door, ports.bytes(&mut source), snapshot);
                if let Some(command) = command {
                    let (sent, parcel) = ports.send(source, Out::Host(command), vnet);
                    if sent {
                        counters.punted += 1;
                    } else {
                        counters.drop(DropReason::DeviceFull);
                    }
                    return parcel;
                }
                counters.drop(DropReason::NoFlow);
            }
            Verdict::Reject => {
                counters.rejected += 1;
                let (answer, out) = pipeline.answer();
                if ports.send_bytes(answer, out, &VnetHeader::default()) {
                    counters.generated += 1;
                }
            }
            Verdict::Drop(reason) => counters.drop(reason),
            Verdict::HandOver(worker) => {
                if ports.hand_over(&mut source, worker, meta, vnet) {
                    counters.handed_out += 1;
                } else {
                    counters.drop(DropReason::HandoverFull);
                }
            }
        }
        ports.free(source)
    }

    /// Writes what the programs must know. A flow that finds no room there is not served: without
    /// its tuples its replies would pass us by.
    fn apply_events(&mut self, verdict: &mut Verdict) {
        while let Some(event) = self.pipeline.pop_event() {
            match event {
                FlowEvent::Bound(id, fingerprints) => {
                    let tuples = &mut self.tuples;
                    let stored = tuples
                        .store(fingerprints.original)
                        .and_then(|()| tuples.store(fingerprints.reply));
                    if stored.is_err() {
                        self.pipeline.forget(id);
                        *verdict = Verdict::Drop(DropReason::TupleMapFull);
                    }
                }
                FlowEvent::Gone(fingerprints) => {
                    self.tuples.clear(fingerprints.original);
                    self.tuples.clear(fingerprints.reply);
                }
            }
        }
    }

    fn flush(&mut self) {
        for port in &mut self.ports.uplinks {
            port.device.iter_mut().for_each(Device::flush);
        }
        self.ports.host.flush();
        for (_, waker) in self.ports.outboxes.iter().flatten() {
            waker.wake_if_asked();
        }
    }

    fn answer_requests(&mut self, now: Instant) {
        if self.requests.is_empty() {
            return;
        }
        // Whoever asked may have left: then nobody hears the answer.
        match self.requests.try_recv() {
            Ok(Request::Flows { from, limit, reply }) => {
                let (flows, next) = self.pipeline.flows().page(from, limit);
                drop(reply.send(FlowPage { flows, next, now }));
            }
            Ok(Request::Ports { reply }) => {
                let uplinks = self.ports.uplinks.iter();
                let report = |port: &UplinkPort<U>| port.device.as_ref().map(Device::report);
                drop(
                    reply.send(PortsReport {
                        host_port: self.ports.host.report(),
                        uplinks: uplinks
                            .map(|port| report(port).unwrap_or_default())
                            .collect(),
                    }),
                );
            }
            Err(_) => {}
        }
    }

    /// Sleeps until a port, another worker or the time asks for it.
    fn block(&mut self) {
        self.waker.about_to_sleep();
        let ready = self.ports.is_readable() || !self.requests.is_empty();
        if !ready {
            const MOST: usize = 16;
            let mut descriptors: [Option<BorrowedFd<'_>>; MOST] = [None; MOST];
            let uplinks = self.ports.uplinks.iter().flat_map(|port| &port.device);
            let all = uplinks
                .filter_map(Device::descriptor)
                .chain(self.ports.host.descriptor())
                .chain([self.waker.descriptor()]);
            for (slot, descriptor) in descriptors.iter_mut().zip(all) {
                *slot = Some(descriptor);
            }
            crate::waker::wait(&descriptors, self.longest_wait);
        }
        self.waker.awake();
    }
}

/// A batch's waits for memory overlap instead of adding up.
fn look_ahead(pipeline: &Pipeline, device: &mut impl Device, batch: &Batch) {
    if batch.len() < 2 || !pipeline.outgrows_cache() {
        return;
    }
    let mut hashes = [0; BATCH];
    let mut count = 0;
    for (slot, (frame, _)) in hashes.iter_mut().zip(batch) {
        *slot = pipeline.flow_hash(device.bytes(frame)).unwrap_or(0);
        count += 1;
    }
    pipeline.warm(hashes.get(..count).unwrap_or_default());
}

impl<U: Device, H: Device> Ports<U, H> {
    fn bytes<'a>(&'a mut self, source: &'a mut Source) -> &'a mut [u8] {
        match source {
            Source::Uplink(number, frame) => {
                let port = self
                    .uplinks
                    .get_mut(*number)
                    .and_then(|port| port.device.as_mut());
                port.map(|device| device.bytes(frame)).unwrap_or_default()
            }
            Source::Host(frame) => self.host.bytes(frame),
            Source::Parcel(parcel) => parcel.bytes(),
        }
    }

    fn free(&mut self, source: Source) -> Option<Parcel> {
        match source {
            Source::Uplink(number, frame) => {
                if let Some(device) = self
                    .uplinks
                    .get_mut(number)
                    .and_then(|port| port.device.as_mut())
                {
                    device.free(frame);
                }
                None
            }
            Source::Host(frame) => {
                self.host.free(frame);
                None
            }
            Source::Parcel(parcel) => Some(parcel),
        }
    }

    /// Sends the packet and returns whether there was room. Copies only where the memory differs.
    fn send(&mut self, mut source: Source, out: Out, vnet: &VnetHeader) -> (bool, Option<Parcel>) {
        let out = self.possible(out);
        match (out, source) {
            (Out::Uplink { uplink, .. }, Source::Uplink(number, frame))
                if usize::from(uplink) == number =>
            {
                let port = self
                    .uplinks
                    .get_mut(number)
                    .and_then(|port| port.device.as_mut());
                (
                    port.is_some_and(|device| device.transmit(frame, vnet).is_ok()),
                    None,
                )
            }
            (Out::Host(command), Source::Host(frame)) => {
                write_command(self.host.bytes(&frame), &command);
                (self.host.transmit(frame, vnet).is_ok(), None)
            }
            (Out::Host(command), Source::Uplink(number, frame)) => {
                let Self { uplinks, host, .. } = self;
                let port = uplinks
                    .get_mut(number)
                    .and_then(|port| port.device.as_mut());
                let sent = port.is_some_and(|device| {
                    let bytes = device.bytes(&frame);
                    write_command(bytes, &command);
                    let sent = host.transmit_copy(bytes, vnet).is_ok();
                    device.free(frame);
                    sent
                });
                (sent, None)
            }
            (Out::Uplink { uplink, .. }, Source::Host(frame)) => {
                let Self { uplinks, host, .. } = self;
                let port = uplinks
                    .get_mut(usize::from(uplink))
                    .and_then(|p| p.device.as_mut());
                let bytes = host.bytes(&frame);
                let sent = port.is_some_and(|device| device.transmit_copy(bytes, vnet).is_ok());
                host.free(frame);
                (sent, None)
            }
            (Out::Uplink { uplink, .. }, Source::Uplink(number, frame)) => {
                let sent = self.between_uplinks(number, usize::from(uplink), &frame, vnet);
                (sent, self.free(Source::Uplink(number, frame)))
            }
            (out, Source::Parcel(mut parcel)) => {
                let sent = self.send_bytes(parcel.bytes(), out, vnet);
                source = Source::Parcel(parcel);
                (sent, self.free(source))
            }
        }
    }

    fn between_uplinks(
        &mut self,
        from: usize,
        to: usize,
        frame: &Frame,
        vnet: &VnetHeader,
    ) -> bool {
        let Ok([from, to]) = self.uplinks.get_disjoint_mut([from, to]) else {
            return false;
        };
        let (Some(from), Some(to)) = (&mut from.device, &mut to.device) else {
            return false;
        };
        to.transmit_copy(from.bytes(frame), vnet).is_ok()
    }

    /// Sends bytes that lie in no device.
    fn send_bytes(&mut self, bytes: &mut [u8], out: Out, vnet: &VnetHeader) -> bool {
        match self.possible(out) {
            Out::Uplink { uplink, .. } => {
                let port = self.uplinks.get_mut(usize::from(uplink));
                let device = port.and_then(|port| port.device.as_mut());
                device.is_some_and(|device| device.transmit_copy(bytes, vnet).is_ok())
            }
            Out::Host(command) => {
                write_command(bytes, &command);
                self.host.transmit_copy(bytes, vnet).is_ok()
            }
        }
    }

    /// A worker without a queue on the uplink sends by the host port.
    fn possible(&self, out: Out) -> Out {
        match out {
            Out::Uplink { uplink, otherwise } => {
                let port = self.uplinks.get(usize::from(uplink));
                if port.is_some_and(|port| port.device.is_some()) {
                    out
                } else {
                    Out::Host(otherwise)
                }
            }
            Out::Host(_) => out,
        }
    }

    fn hand_over(
        &mut self,
        source: &mut Source,
        worker: WorkerId,
        meta: &Meta,
        vnet: &VnetHeader,
    ) -> bool {
        let Some(Some((mut outbox, waker))) = self
            .outboxes
            .get_mut(usize::from(worker.0))
            .map(Option::take)
        else {
            return false;
        };
        let sent = outbox.send(self.bytes(source), meta, vnet).is_ok();
        if sent {
            waker.ask();
        }
        if let Some(slot) = self.outboxes.get_mut(usize::from(worker.0)) {
            *slot = Some((outbox, waker));
        }
        sent
    }

    fn is_readable(&mut self) -> bool {
        self.inboxes.iter().any(|inbox| !inbox.is_empty())
            || self.host.is_readable()
            || self
                .uplinks
                .iter_mut()
                .flat_map(|port| &mut port.device)
                .any(Device::is_readable)
    }
}

fn write_command(bytes: &mut [u8], command: &Command) {
    let (to, from) = command.encode();
    ethernet::set_addresses(bytes, to, from);
}
