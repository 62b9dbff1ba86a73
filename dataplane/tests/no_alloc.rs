//! Once warm, the worker loop allocates nothing: new flows, hits, expiry, hand-over, an epoch swap.

mod bed;
mod crew;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicU64, Ordering};

use bed::{Bed, FAMILIES};
use crew::Crew;
use dataplane::command::Hook;
use dataplane::net::Direction;

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

/// Everything a round needs, built before the counting starts.
struct Round {
    wire: Vec<(usize, Vec<u8>)>,
    pods: Vec<Vec<u8>>,
}

fn round(bed: &Bed, family: &bed::Family, first_port: u16) -> Round {
    let ports = first_port..first_port + 64;
    let wire = ports.clone().map(|port| {
        let packet = bed.udp(family.client, port, family.node, bed::NODE_PORT_REMOTE);
        (usize::from(port % 2), packet)
    });
    let pods = ports.map(|port| bed.syn(family.pod_b, port, family.both, 80));
    Round {
        wire: wire.collect(),
        pods: pods.collect(),
    }
}

fn play(crew: &mut Crew, round: &mut Round, scratch: &mut Vec<u8>) {
    let door = (11, Hook::Ingress, Direction::Original);
    for (worker, packet) in &round.wire {
        crew.by_wire(*worker, packet);
    }
    for (number, packet) in round.pods.iter_mut().enumerate() {
        crew.steered(number % 2, door, packet);
    }
    crew.settle();
    crew.discard(scratch);
}

#[test]
fn nothing_is_allocated_once_warm() {
    for family in &FAMILIES {
        let mut bed = Bed::new(family);
        let mut crew = Crew::new(2, bed.snapshot());
        let mut scratch = Vec::with_capacity(4_096);
        // What is published is kept alive here, so that no worker frees it.
        let first = bed.snapshot().clone();
        bed.drain_pod_a();
        let second = bed.snapshot().clone();
        let mut rounds: Vec<_> = (0..4_u16)
            .map(|n| round(&bed, family, 20_000 + n * 100))
            .collect();
        play(&mut crew, &mut rounds[0], &mut scratch);
        crew.wait(300);

        let before = ALLOCATIONS.load(Ordering::Relaxed);
        play(&mut crew, &mut rounds[1], &mut scratch);
        play(&mut crew, &mut rounds[1], &mut scratch);
        crew.wait(300);
        play(&mut crew, &mut rounds[2], &mut scratch);
        let after = ALLOCATIONS.load(Ordering::Relaxed);
        assert_eq!(after - before, 0, "allocations of the packet path");

        crew.publish(&second);
        crew.publish(&first);
        crew.publish(&second);
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        play(&mut crew, &mut rounds[3], &mut scratch);
        let after = ALLOCATIONS.load(Ordering::Relaxed);
        assert_eq!(after - before, 0, "allocations after an epoch swap");
        let handed: u64 = crew
            .workers
            .iter()
            .map(|worker| worker.counters().handed_in)
            .sum();
        assert!(handed > 0, "the rounds hand packets over");
        assert!(crew.flows() > 0);
        crew.assert_whole();
    }
}
