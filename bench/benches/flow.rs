//! The flow table: hits in both directions, misses, and flows that come and go, at a thousand and a
//! million flows in random order. One element is one packet, or one flow that came and went.

use std::hint::black_box;
use std::time::Duration;

use bench::workload::{self, Family};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dataplane::flow::{FlowTable, NewFlow, Slab};
use dataplane::net::{Direction, Protocol, Tuple};
use dataplane::time::Instant;

const SIZES: [u32; 2] = [1_000, 1_000_000];
/// Packets of one batch, as a port hands them over.
const BATCH: usize = 64;
const NOW: Instant = Instant::from_secs(1000);

/// A full table and the flows in it, shuffled.
fn filled(family: Family, size: u32) -> (FlowTable, Vec<NewFlow>) {
    let mut table = FlowTable::with_slab(Slab::with_capacity(size), 7);
    let mut flows: Vec<NewFlow> = (0..size)
        .map(|n| workload::flow(family, Protocol::TCP, n))
        .collect();
    for flow in &flows {
        table.insert(flow, NOW).expect("room for every flow");
    }
    workload::shuffle(&mut flows);
    (table, flows)
}

fn hit(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow/hit");
    group.throughput(Throughput::Elements(BATCH as u64));
    for family in Family::ALL {
        for size in SIZES {
            let (mut table, flows) = filled(family, size);
            let mut tuples: Vec<Tuple> = flows
                .iter()
                .flat_map(|flow| [flow.original, flow.reply])
                .collect();
            workload::shuffle(&mut tuples);
            let mut order = tuples.chunks_exact(BATCH).cycle();
            let id = BenchmarkId::new(family.name(), size);
            let mut ran = false;
            group.bench_function(id, |bencher| {
                ran = true;
                bencher.iter(|| {
                    for tuple in order.next().unwrap_or_default() {
                        let (id, direction) = table.find(tuple).expect("a known tuple");
                        table.record(id, direction, 64, NOW);
                    }
                });
            });
            let counted: u64 = table.iter().map(|(_, flow)| flow.packets[0]).sum();
            assert!(
                counted > 0 || !ran,
                "no packet of the original direction was seen"
            );
        }
    }
    group.finish();
}

/// The same packets, looked up as a worker does that has a whole batch before it.
fn hit_in_batches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow/hit_in_batches");
    group.throughput(Throughput::Elements(BATCH as u64));
    for size in SIZES {
        let (mut table, flows) = filled(Family::V4, size);
        let mut tuples: Vec<Tuple> = flows
            .iter()
            .flat_map(|flow| [flow.original, flow.reply])
            .collect();
        workload::shuffle(&mut tuples);
        let mut order = tuples.as_chunks::<BATCH>().0.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                let Some(batch) = order.next() else { return };
                let hashes = batch.map(|tuple| table.hash(&tuple));
                table.warm(&hashes);
                for (hash, tuple) in hashes.iter().zip(batch) {
                    let (id, direction) = table.find_hashed(*hash, tuple).expect("a known tuple");
                    table.record(id, direction, 64, NOW);
                }
            });
        });
    }
    group.finish();
}

fn miss(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow/miss");
    group.throughput(Throughput::Elements(BATCH as u64));
    for size in SIZES {
        let (table, flows) = filled(Family::V4, size);
        // The other protocol: same addresses and ports, never a match.
        let strangers: Vec<Tuple> = flows
            .iter()
            .map(|flow| Tuple {
                protocol: Protocol::UDP,
                ..flow.original
            })
            .collect();
        let mut order = strangers.chunks_exact(BATCH).cycle();
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                for tuple in order.next().unwrap_or_default() {
                    assert!(table.find(black_box(tuple)).is_none());
                }
            });
        });
    }
    group.finish();
}

fn come_and_go(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("flow/come_and_go");
    group.throughput(Throughput::Elements(1));
    for size in SIZES {
        let (mut table, flows) = filled(Family::V4, size);
        let mut order = flows.iter().cycle();
        group.bench_function(BenchmarkId::from_parameter(size), |bencher| {
            bencher.iter(|| {
                let Some(flow) = order.next() else { return };
                let (id, direction) = table.find(&flow.original).expect("a known tuple");
                assert_eq!(direction, Direction::Original);
                table.remove(id);
                table.insert(flow, NOW).expect("the room it had");
            });
        });
        assert_eq!(table.len(), flows.len());
    }
    group.finish();
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = short(); targets = hit, hit_in_batches, miss, come_and_go }
criterion_main!(benches);
