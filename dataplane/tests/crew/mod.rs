//! Workers over in-memory devices, turned by hand: the loop, the rings and the maps without a kernel.
#![allow(dead_code, reason = "each test program uses a part of the crew")]

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use crossbeam::channel;
use dataplane::command::{Hook, Origin};
use dataplane::counters::SharedCounters;
use dataplane::device::VnetHeader;
use dataplane::device::memory::MemoryDevice;
use dataplane::handover;
use dataplane::net::Direction;
use dataplane::snapshot::Snapshot;
use dataplane::steer::WorkerId;
use dataplane::steering::{Heartbeat, TupleMap};
use dataplane::time::{Instant, TestClock};
use dataplane::waker::Waker;
use dataplane::worker::{Ports, UplinkPort, Worker, WorkerParts};

use crate::bed;

const CHUNKS: u32 = 256;

pub(crate) type TestWorker = Worker<MemoryDevice, MemoryDevice, TestClock>;

/// Some workers that share an uplink of one queue each.
pub(crate) struct Crew {
    pub(crate) workers: Vec<TestWorker>,
    published: Arc<ArcSwap<Snapshot>>,
    pub(crate) now: Instant,
}

impl Crew {
    pub(crate) fn new(count: u16, snapshot: &Snapshot) -> Self {
        let published = Arc::new(ArcSwap::from_pointee(snapshot.clone()));
        let wakers: Vec<_> = (0..count)
            .map(|_| Arc::new(Waker::new().expect("an eventfd")))
            .collect();
        let mut ports: Vec<_> = (0..count)
            .map(|_| Ports {
                uplinks: vec![UplinkPort {
                    ifindex: 2,
                    suspect_checksums: true,
                    device: Some(MemoryDevice::new(CHUNKS, 2_048)),
                }],
                host: MemoryDevice::new(CHUNKS, 2_048),
                inboxes: Vec::new(),
                outboxes: Vec::new(),
            })
            .collect();
        for from in 0..ports.len() {
            for to in 0..ports.len() {
                if from == to {
                    ports[from].outboxes.push(None);
                    continue;
                }
                let (outbox, inbox) = handover::ring();
                ports[from]
                    .outboxes
                    .push(Some((outbox, Arc::clone(&wakers[to]))));
                ports[to].inboxes.push(inbox);
            }
        }
        let grace = Duration::from_millis(200);
        let heartbeat = Heartbeat::in_memory(count, grace).expect("memory");
        let worker = |((id, ports), waker): ((u16, _), &Arc<Waker>)| {
            let (_, requests) = channel::bounded(1);
            TestWorker::new(WorkerParts {
                id: WorkerId(id),
                pipeline: bed::pipeline(WorkerId(id), count),
                ports,
                tuples: TupleMap::in_memory(512).expect("memory"),
                heartbeat: heartbeat.clone(),
                published: Arc::clone(&published),
                shared: Arc::new(SharedCounters::default()),
                requests,
                waker: Arc::clone(waker),
                clock: TestClock::at(Instant::from_secs(1_000)),
                spin: Duration::ZERO,
                longest_wait: Duration::from_millis(50),
            })
        };
        let workers = (0..count).zip(ports).zip(&wakers).map(worker).collect();
        Self {
            workers,
            published,
            now: Instant::from_secs(1_000),
        }
    }

    pub(crate) fn publish(&self, snapshot: &Snapshot) {
        self.published.store(Arc::new(snapshot.clone()));
    }

    /// A frame arrives at a worker's queue of the uplink.
    pub(crate) fn by_wire(&mut self, worker: usize, frame: &[u8]) {
        let device = self.workers[worker].ports().uplinks[0].device.as_mut();
        let device = device.expect("every worker of the crew has a queue");
        device
            .push(frame, &VnetHeader::default())
            .expect("a free chunk");
    }

    /// The steering redirects a frame to a worker's queue of the host port.
    pub(crate) fn steered(
        &mut self,
        worker: usize,
        (ifindex, hook, direction): (u32, Hook, Direction),
        frame: &mut [u8],
    ) {
        frame[..6].copy_from_slice(&bed::FAR.0);
        frame[6..12].copy_from_slice(&Origin::encode(ifindex, hook, direction).0);
        let device = &mut self.workers[worker].ports().host;
        device
            .push(frame, &VnetHeader::default())
            .expect("a free chunk");
    }

    /// Turns every worker until none has work.
    pub(crate) fn settle(&mut self) {
        while self
            .workers
            .iter_mut()
            .map(|worker| worker.turn(self.now))
            .sum::<usize>()
            > 0
        {}
    }

    /// Time passes, in steps that the timer wheel can follow.
    pub(crate) fn wait(&mut self, seconds: u64) {
        for _ in 0..seconds {
            self.now = self.now + Duration::from_secs(1);
            self.settle();
        }
    }

    /// All frames that left by the wire, of all workers.
    pub(crate) fn sent_by_wire(&mut self) -> Vec<bed::Sent> {
        let devices = self.workers.iter_mut().flat_map(|worker| {
            worker.ports().uplinks[0]
                .device
                .as_mut()
                .map(MemoryDevice::drain_sent)
        });
        devices
            .flatten()
            .map(|(bytes, _)| bed::Sent(bytes))
            .collect()
    }

    /// Forgets what was sent, without a copy.
    pub(crate) fn discard(&mut self, scratch: &mut Vec<u8>) {
        for worker in &mut self.workers {
            let ports = worker.ports();
            while ports.host.take_sent(scratch).is_some() {}
            if let Some(device) = &mut ports.uplinks[0].device {
                while device.take_sent(scratch).is_some() {}
            }
        }
    }

    /// Every packet in one verdict, every chunk back in its free list.
    pub(crate) fn assert_whole(&mut self) {
        for worker in &mut self.workers {
            assert!(worker.counters().is_balanced(), "{:?}", worker.counters());
            let ports = worker.ports();
            assert_eq!(ports.host.held(), 0);
            assert_eq!(
                ports.uplinks[0].device.as_ref().map(MemoryDevice::held),
                Some(0)
            );
        }
    }

    pub(crate) fn flows(&self) -> usize {
        self.workers
            .iter()
            .map(|worker| worker.pipeline().flows().len())
            .sum()
    }

    pub(crate) fn tuples(&self) -> usize {
        self.workers
            .iter()
            .map(|worker| worker.tuples().count())
            .sum()
    }
}
