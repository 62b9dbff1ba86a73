//! The choice of a backend, among few and many candidates.

use std::hint::black_box;
use std::time::Duration;

use bench::workload::{self, Family};
use criterion::{BenchmarkId, Criterion, criterion_group, criterion_main};
use dataplane::schedule::{self, Choice};
use dataplane::snapshot::SchedulerKind;

fn choose(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("schedule");
    let kinds = [
        ("rr", SchedulerKind::RoundRobin),
        ("random", SchedulerKind::Random),
    ];
    for (name, kind) in kinds {
        for count in [2, 100] {
            let service = workload::service(Family::V4, 1, count, kind);
            let (mut cursor, mut random) = (0, 1_u64);
            group.bench_function(BenchmarkId::new(name, count), |bencher| {
                bencher.iter(|| {
                    random = random.wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(31);
                    let mut choice = Choice::new(black_box(&service), 0, cursor, random);
                    let found = schedule::choose(kind, &mut choice).map(|backend| backend.id);
                    cursor = choice.cursor;
                    found
                });
            });
        }
    }
    group.finish();
}

fn short() -> Criterion {
    Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1))
}

criterion_group! { name = benches; config = short(); targets = choose }
criterion_main!(benches);
