//! The whole packet path: hits in either direction, new flows, rejects; and one worker's loop over
//! the in-memory device, at a thousand and a million flows in random order.
//!
//! Only the path is timed: frames are laid into the batch before and taken out after, as a network
//! card does it. For each bench a line says the median batch as packets per second of one core, which
//! other load on the machine moves less than criterion's mean, and allocations, which must be none.
//! Afterwards each frame's way is gone once more and checked by full sums.

use std::alloc::{GlobalAlloc, Layout, System};
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use bench::workload::{self, Family, Frames, Load, NOW, UPLINK};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dataplane::counters::SharedCounters;
use dataplane::device::memory::MemoryDevice;
use dataplane::device::{BATCH, VnetHeader};
use dataplane::net::{Protocol, Tuple};
use dataplane::pipeline::{FlowEvent, Verdict};
use dataplane::steer::WorkerId;
use dataplane::steering::{Heartbeat, TupleMap};
use dataplane::time::TestClock;
use dataplane::waker::Waker;
use dataplane::worker::{Ports, UplinkPort, Worker, WorkerParts};

const SIZES: [u32; 2] = [1_000, 1_000_000];
/// Flows from this number on are not among those of a load.
const STRANGERS: u32 = 8_000_000;
/// Of a worker's device: two batches.
const CHUNKS: u32 = 128;

struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call goes on to the system's allocator with what it was given.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: the caller's layout, unchanged.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the caller's pointer and layout, unchanged; all memory came from `System`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What the timed batches of one bench came to.
#[derive(Default)]
struct Meter {
    batches: Vec<Duration>,
    allocations: u64,
}

impl Meter {
    /// Times the way of one batch.
    fn batch(&mut self, work: impl FnOnce()) -> Duration {
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        let start = Instant::now();
        work();
        let elapsed = start.elapsed();
        self.allocations += ALLOCATIONS.load(Ordering::Relaxed) - before;
        self.batches.push(elapsed);
        elapsed
    }

    fn is_idle(&self) -> bool {
        self.batches.is_empty()
    }

    #[expect(clippy::cast_precision_loss, reason = "numbers to be read")]
    fn report(&mut self, name: &str) {
        if self.is_idle() {
            return;
        }
        self.batches.sort_unstable();
        let median = self.batches[self.batches.len() / 2].as_secs_f64() / BATCH as f64;
        let packets = self.batches.len() * BATCH;
        eprintln!(
            "{name}: median {:.2} Mpps per core, {:.1} ns and {} allocations per packet",
            1e-6 / median,
            median * 1e9,
            self.allocations as f64 / packets as f64,
        );
        assert_eq!(self.allocations, 0, "the packet path allocates");
    }
}

fn hit(criterion: &mut Criterion) {
    for family in Family::ALL {
        for size in SIZES {
            let mut load = Load::new(family, size);
            let both = load.both();
            let ways = [
                ("original", load.originals.clone()),
                ("reply", load.replies.clone()),
                ("both", both),
            ];
            for (way, tuples) in ways {
                let frames = Frames::of(&tuples);
                let id = format!("{}/{way}/{size}", family.name());
                hit_by(criterion, &id, &mut load, &frames);
            }
        }
    }
}

fn hit_by(criterion: &mut Criterion, id: &str, load: &mut Load, frames: &Frames) {
    let mut meter = Meter::default();
    let mut order = frames.batches(BATCH);
    let mut batch = vec![0; BATCH * frames.length()];
    let mut group = criterion.benchmark_group("pipeline/hit");
    group.throughput(Throughput::Elements(BATCH as u64));
    group.bench_function(id, |bencher| {
        bencher.iter_custom(|times| {
            let one = |_| {
                batch.copy_from_slice(order.next().unwrap_or_default());
                meter.batch(|| {
                    for bytes in batch.chunks_exact_mut(frames.length()) {
                        black_box(load.process(bytes));
                    }
                })
            };
            (0..times).map(one).sum()
        });
    });
    group.finish();
    meter.report(&format!("pipeline/hit/{id}"));
    if !meter.is_idle() {
        let mut bytes = vec![0; frames.length()];
        for frame in frames.iter() {
            bytes.copy_from_slice(frame);
            load.send(&mut bytes);
        }
    }
}

/// New flows; each is forgotten again after its batch, so that the table stays as full as it was.
fn miss(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pipeline/miss");
    group.throughput(Throughput::Elements(BATCH as u64));
    for size in SIZES {
        let mut load = Load::new(Family::V4, size);
        let mut strangers: Vec<Tuple> = (STRANGERS..STRANGERS + 100_000)
            .map(|n| workload::flow(Family::V4, Protocol::TCP, n).original)
            .collect();
        workload::shuffle(&mut strangers);
        let frames = Frames::opening(&strangers);
        let mut order = frames.batches(BATCH);
        let mut batch = vec![0; BATCH * frames.length()];
        let mut meter = Meter::default();
        let before = load.pipeline.flows().len();
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter_custom(|times| {
                let one = |_| {
                    batch.copy_from_slice(order.next().unwrap_or_default());
                    let elapsed = meter.batch(|| {
                        for bytes in batch.chunks_exact_mut(frames.length()) {
                            black_box(load.process(bytes));
                        }
                    });
                    batch
                        .chunks_exact(frames.length())
                        .for_each(workload::assert_correct);
                    assert_eq!(load.pipeline.flows().len(), before + BATCH);
                    forget_new(&mut load);
                    elapsed
                };
                (0..times).map(one).sum()
            });
        });
        meter.report(&format!("pipeline/miss/{size}"));
    }
    group.finish();
}

fn forget_new(load: &mut Load) {
    while let Some(event) = load.pipeline.pop_event() {
        if let FlowEvent::Bound(id, _) = event {
            load.pipeline.forget(id);
        }
    }
}

fn reject(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pipeline/reject");
    group.throughput(Throughput::Elements(BATCH as u64));
    for family in Family::ALL {
        let mut load = Load::new(family, 1);
        let tuples: Vec<Tuple> = (0..10_000)
            .map(|n| {
                let mut tuple = workload::flow(family, Protocol::TCP, n).original;
                tuple.destination.address = workload::nobody(family);
                tuple
            })
            .collect();
        let frames = Frames::opening(&tuples);
        let mut order = frames.batches(BATCH);
        let mut batch = vec![0; BATCH * frames.length()];
        let mut meter = Meter::default();
        group.bench_function(family.name(), |bencher| {
            bencher.iter_custom(|times| {
                let one = |_| {
                    batch.copy_from_slice(order.next().unwrap_or_default());
                    meter.batch(|| {
                        for bytes in batch.chunks_exact_mut(frames.length()) {
                            black_box(load.process(bytes));
                        }
                    })
                };
                (0..times).map(one).sum()
            });
        });
        meter.report(&format!("pipeline/reject/{}", family.name()));
        let mut bytes = frames.iter().next().unwrap_or_default().to_vec();
        assert_eq!(load.process(&mut bytes), Verdict::Reject);
        workload::assert_correct(load.pipeline.answer().0);
    }
    group.finish();
}

/// From the uplink's receive ring to its transmit ring.
fn worker(criterion: &mut Criterion) {
    for family in Family::ALL {
        for size in SIZES {
            let load = Load::new(family, size);
            let frames = Frames::of(&load.both());
            let mut worker = alone(load);
            let mut order = frames.batches(BATCH);
            let mut meter = Meter::default();
            let mut sent = Vec::with_capacity(2_048);
            let mut group = criterion.benchmark_group("worker/hit");
            group.throughput(Throughput::Elements(BATCH as u64));
            let id = BenchmarkId::new(family.name(), size);
            group.bench_function(id, |bencher| {
                bencher.iter_custom(|times| {
                    let one = |_| {
                        let batch = order.next().unwrap_or_default();
                        arrive(&mut worker, batch.chunks_exact(frames.length()));
                        let elapsed = meter.batch(|| {
                            black_box(worker.turn(NOW));
                        });
                        assert_eq!(leave(&mut worker, &mut sent, |_| {}), BATCH);
                        elapsed
                    };
                    (0..times).map(one).sum()
                });
            });
            group.finish();
            meter.report(&format!("worker/hit/{}/{size}", family.name()));
            if !meter.is_idle() {
                for frame in frames.iter() {
                    arrive(&mut worker, [frame]);
                    worker.turn(NOW);
                    assert_eq!(leave(&mut worker, &mut sent, workload::assert_correct), 1);
                }
            }
            assert!(worker.counters().is_balanced());
        }
    }
}

type Alone = Worker<MemoryDevice, MemoryDevice, TestClock>;

/// A worker with one queue of one uplink, turned by hand.
fn alone(load: Load) -> Alone {
    let device = || MemoryDevice::new(CHUNKS, 2_048);
    let (_, requests) = crossbeam::channel::bounded(1);
    Worker::new(WorkerParts {
        id: WorkerId(0),
        pipeline: load.pipeline,
        ports: Ports {
            uplinks: vec![UplinkPort {
                ifindex: UPLINK,
                suspect_checksums: false,
                device: Some(device()),
            }],
            host: device(),
            inboxes: Vec::new(),
            outboxes: vec![None],
        },
        tuples: TupleMap::in_memory(512).expect("memory"),
        heartbeat: Heartbeat::in_memory(1, Duration::from_millis(200)).expect("memory"),
        published: Arc::new(ArcSwap::from_pointee(load.snapshot)),
        shared: Arc::new(SharedCounters::default()),
        requests,
        waker: Arc::new(Waker::new().expect("an eventfd")),
        clock: TestClock::at(NOW),
        spin: Duration::ZERO,
        longest_wait: Duration::from_millis(50),
    })
}

fn arrive<'a>(worker: &mut Alone, frames: impl IntoIterator<Item = &'a [u8]>) {
    let device = worker.ports().uplinks[0].device.as_mut();
    let device = device.expect("the worker has a queue");
    for frame in frames {
        let pushed = device.push(frame, &VnetHeader::default());
        pushed.expect("a free chunk");
    }
}

fn leave(worker: &mut Alone, bytes: &mut Vec<u8>, check: impl Fn(&[u8])) -> usize {
    let device = worker.ports().uplinks[0].device.as_mut();
    let device = device.expect("the worker has a queue");
    let mut count = 0;
    while device.take_sent(bytes).is_some() {
        check(bytes);
        count += 1;
    }
    count
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = short(); targets = hit, miss, reject, worker }
criterion_main!(benches);
