//! Building the tables of a thousand and ten thousand Services of two backends each, from Services
//! that are resolved already; and what a look-up in them costs.

use std::hint::black_box;
use std::time::Duration;

use bench::workload::{self, Family};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use dataplane::net::{Endpoint, Port, Protocol};
use dataplane::snapshot::SchedulerKind;

fn tables(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("snapshot");
    for count in [1_000_u16, 10_000] {
        let services: Vec<_> = (0..count)
            .map(|number| workload::service(Family::V4, number, 2, SchedulerKind::RoundRobin))
            .collect();
        group.throughput(Throughput::Elements(u64::from(count)));
        group.bench_function(BenchmarkId::new("build", count), |bencher| {
            bencher.iter_with_large_drop(|| workload::snapshot(Family::V4, black_box(&services)));
        });

        let snapshot = workload::snapshot(Family::V4, &services);
        let mut addresses: Vec<_> = (0..count)
            .map(|number| Endpoint::new(Family::V4.address(96, number), Port(80)))
            .collect();
        workload::shuffle(&mut addresses);
        let mut order = addresses.iter().cycle();
        group.throughput(Throughput::Elements(1));
        group.bench_function(BenchmarkId::new("frontend", count), |bencher| {
            bencher.iter(|| {
                let destination = order.next().expect("it begins again");
                snapshot.frontend(destination, Protocol::TCP).is_some()
            });
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

criterion_group! { name = benches; config = short(); targets = tables }
criterion_main!(benches);
