//! Bytes to headers, and a translation written into bytes: both families, small and large packets.
//!
//! What was rewritten is checked afterwards by full sums.

use std::hint::black_box;
use std::time::Duration;

use bench::packets;
use bench::workload::{self, Family};
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use dataplane::nat::rewrite::{self, Change, Checksum};
use dataplane::net::Protocol;
use dataplane::packet::{checksum, parse};

const PROTOCOLS: [Protocol; 2] = [Protocol::TCP, Protocol::UDP];

fn parse_frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("parse");
    group.throughput(Throughput::Elements(1));
    for family in Family::ALL {
        for protocol in PROTOCOLS {
            let frame = packets::frame(&workload::flow(family, protocol, 1).original, 18);
            group.bench_function(format!("{}/{protocol}", family.name()), |bencher| {
                bencher.iter(|| parse(black_box(&frame)).is_ok());
            });
        }
    }
    group.finish();
}

/// To and fro, so that the bytes stay valid: one iteration is two rewrites.
fn rewrite_frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rewrite");
    group.throughput(Throughput::Elements(2));
    for family in Family::ALL {
        for protocol in PROTOCOLS {
            let flow = workload::flow(family, protocol, 1);
            let mut frame = packets::frame(&flow.original, 1400);
            let before = parse(&frame).expect("a good frame");
            let change = |tuple: dataplane::net::Tuple| Change {
                source: tuple.source,
                destination: tuple.destination,
                checksum: Checksum::Complete,
                decrement_hop_limit: false,
            };
            let there = change(flow.reply.reversed());
            let back = change(flow.original);
            let mut translated = frame.clone();
            rewrite::apply(&mut translated, &before, &there);
            let after = parse(&translated).expect("a rewritten frame");
            assert!(checksum::is_correct(&translated, &after));

            group.bench_function(format!("{}/{protocol}", family.name()), |bencher| {
                bencher.iter(|| {
                    rewrite::apply(black_box(&mut frame), &before, &there);
                    rewrite::apply(black_box(&mut frame), &after, &back);
                });
            });
            assert_eq!(parse(&frame), Ok(before));
            assert!(checksum::is_correct(&frame, &before));
        }
    }
    group.finish();
}

/// What a partial checksum costs when it must be completed in software.
fn complete_frames(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("complete");
    for size in [64_u16, 1400] {
        let flow = workload::flow(Family::V4, Protocol::TCP, 1);
        let mut frame = packets::frame(&flow.original, usize::from(size));
        let headers = parse(&frame).expect("a good frame");
        group.throughput(Throughput::Bytes(u64::from(size)));
        group.bench_function(format!("{size}"), |bencher| {
            bencher.iter(|| checksum::complete(black_box(&mut frame), &headers));
        });
    }
    group.finish();
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = short(); targets = parse_frames, rewrite_frames, complete_frames }
criterion_main!(benches);
