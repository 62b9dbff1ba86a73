//! Instructions per packet of each stage, counted by valgrind: the same number on any load of the
//! machine, for the same binary.
//!
//! The program runs itself under callgrind twice for each stage, with no packet and with some, and
//! divides the difference. It does not measure time; waits for memory do not show.

use std::hint::black_box;
use std::process::{Command, ExitCode};

use bench::workload::{Family, Frames, Load, nobody};
use dataplane::nat::rewrite::{self, Change, Checksum};
use dataplane::net::{Endpoint, Port, Tuple};
use dataplane::packet;

const STAGES: [&str; 5] = ["parse", "rewrite", "hit", "miss", "reject"];
const PACKETS: usize = 1_000;
const FLOWS: u32 = 1_000;
/// Set for the runs under valgrind: stage, family, packets.
const ORDER: &str = "SLUICE_BENCH_INSTRUCTIONS";

fn main() -> ExitCode {
    if let Ok(order) = std::env::var(ORDER) {
        obey(&order);
        return ExitCode::SUCCESS;
    }
    if Command::new("valgrind").arg("--version").output().is_err() {
        eprintln!("instructions: skipped, valgrind is not installed (apt-get install valgrind)");
        return ExitCode::SUCCESS;
    }
    for stage in STAGES {
        for family in Family::ALL {
            let name = family.name();
            let count = |packets| count(&format!("{stage} {name} {packets}"));
            let Some(with) = count(PACKETS) else {
                return failed(stage);
            };
            let Some(without) = count(0) else {
                return failed(stage);
            };
            let each = with.saturating_sub(without) / PACKETS as u64;
            eprintln!("instructions/{stage}/{name}: {each} per packet");
        }
    }
    ExitCode::SUCCESS
}

fn failed(stage: &str) -> ExitCode {
    eprintln!("instructions: valgrind did not count the stage {stage}");
    ExitCode::FAILURE
}

/// Instructions of a whole run.
fn count(order: &str) -> Option<u64> {
    let output = Command::new("valgrind")
        .args(["--tool=callgrind", "--callgrind-out-file=/dev/null"])
        .arg(std::env::current_exe().ok()?)
        .env(ORDER, order)
        .output()
        .ok()?;
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text.lines().find(|line| line.contains("Collected :"))?;
    line.rsplit(' ').next()?.parse().ok()
}

/// One run: what all runs of a stage share comes first, then the packets.
fn obey(order: &str) {
    let mut words = order.split(' ');
    let stage = words.next().unwrap_or_default();
    let family = words.next().unwrap_or_default();
    let packets: usize = words.next().and_then(|word| word.parse().ok()).unwrap_or(0);
    let family = Family::ALL.into_iter().find(|known| known.name() == family);
    let family = family.expect("one of the two");
    let mut load = Load::new(family, FLOWS);
    let frames = match stage {
        "miss" => Frames::opening(&strangers(&load)),
        "reject" => Frames::opening(&rejected(family, &load)),
        _ => Frames::of(&load.originals),
    };
    let mut batch: Vec<Vec<u8>> = frames.iter().take(PACKETS).map(<[u8]>::to_vec).collect();
    for frame in batch.iter_mut().take(packets) {
        match stage {
            "parse" => _ = black_box(packet::parse(black_box(frame))),
            "rewrite" => translate(frame),
            _ => _ = black_box(load.process(frame)),
        }
    }
}

/// Parsed besides, as in the path.
fn translate(frame: &mut [u8]) {
    let Ok(headers) = packet::parse(frame) else {
        return;
    };
    let change = Change {
        source: headers.tuple.destination,
        destination: headers.tuple.source,
        checksum: Checksum::Complete,
        decrement_hop_limit: true,
    };
    rewrite::apply(frame, &headers, &change);
    black_box(frame);
}

/// The load's tuples from ports that have no flow yet.
fn strangers(load: &Load) -> Vec<Tuple> {
    let turned = |tuple: &Tuple| {
        let port = Port(tuple.source.port.0 ^ 0x4000);
        Tuple {
            source: Endpoint {
                port,
                ..tuple.source
            },
            ..*tuple
        }
    };
    load.originals.iter().map(turned).collect()
}

/// Towards the Service without a backend.
fn rejected(family: Family, load: &Load) -> Vec<Tuple> {
    let address = nobody(family);
    let turned = |tuple: &Tuple| {
        let destination = Endpoint {
            address,
            ..tuple.destination
        };
        Tuple {
            destination,
            ..*tuple
        }
    };
    load.originals.iter().map(turned).collect()
}
