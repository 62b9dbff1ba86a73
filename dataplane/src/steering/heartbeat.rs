//! `Heartbeat`: how the programs know that the engine lives.
//!
//! Each worker writes its own time; the one that the programs read advances only while every
//! worker's own is younger than the grace. So one stuck worker makes the whole engine stale, and a
//! program reads one number. No system call: it is beaten on the packet path.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::MAX_WORKERS;
use crate::steer::WorkerId;
use crate::sys::mmap::SharedWords;
use crate::time::{Duration, Instant};

/// One worker's view of the engine's heartbeat.
#[derive(Clone, Debug)]
pub struct Heartbeat {
    words: SharedWords,
    workers: u16,
    grace: Duration,
    last: Instant,
}

impl Heartbeat {
    /// A heartbeat that no program reads, for tests.
    ///
    /// # Errors
    /// The kernel's, if there is no memory.
    pub fn in_memory(workers: u16, grace: Duration) -> io::Result<Self> {
        Ok(Self::new(SharedWords::anonymous(SLOTS)?, workers, grace))
    }

    pub(super) const fn new(words: SharedWords, workers: u16, grace: Duration) -> Self {
        Self {
            words,
            workers,
            grace,
            last: Instant::from_nanos(0),
        }
    }

    /// `worker` is alive at `now`. Cheap enough for every batch: most calls do nothing.
    pub fn beat(&mut self, worker: WorkerId, now: Instant) {
        if now.since(self.last) < self.grace / BEATS_PER_GRACE {
            return;
        }
        self.last = now;
        self.write(1 + usize::from(worker.0), now);
        if (0..self.workers).all(|other| self.is_fresh(WorkerId(other), now)) {
            self.write(ENGINE, now);
        }
    }

    /// When the engine as a whole was last alive; zero if it never was.
    #[must_use]
    pub fn engine(&self) -> Instant {
        self.read(ENGINE)
    }

    fn is_fresh(&self, worker: WorkerId, now: Instant) -> bool {
        now.since(self.read(1 + usize::from(worker.0))) <= self.grace
    }

    fn read(&self, slot: usize) -> Instant {
        let nanos = self.slot(slot).map_or(0, |s| s.load(Ordering::Acquire));
        Instant::from_nanos(nanos)
    }

    fn write(&self, slot: usize, now: Instant) {
        if let Some(slot) = self.slot(slot) {
            slot.fetch_max(now.as_nanos(), Ordering::AcqRel);
        }
    }

    fn slot(&self, slot: usize) -> Option<&AtomicU64> {
        self.words.words().get(slot)
    }
}

/// The slot that the programs read.
const ENGINE: usize = 0;
pub(super) const SLOTS: usize = 1 + MAX_WORKERS as usize;
/// How much finer than the grace the heartbeat is.
const BEATS_PER_GRACE: u32 = 64;

#[cfg(test)]
mod tests {
    use super::*;

    const GRACE: Duration = Duration::from_millis(200);

    #[test]
    fn the_engine_is_alive_once_every_worker_was() {
        let mut one = Heartbeat::in_memory(2, GRACE).expect("memory");
        let mut other = one.clone();
        one.beat(WorkerId(0), Instant::from_secs(60));
        assert_eq!(one.engine(), Instant::from_nanos(0));
        other.beat(WorkerId(1), Instant::from_millis(60_100));
        assert_eq!(one.engine(), Instant::from_millis(60_100));
    }

    #[test]
    fn a_stuck_worker_stops_the_engines_heartbeat_until_it_moves_again() {
        let mut one = Heartbeat::in_memory(2, GRACE).expect("memory");
        let mut other = one.clone();
        other.beat(WorkerId(1), Instant::from_secs(60));
        one.beat(WorkerId(0), Instant::from_millis(60_200));
        one.beat(WorkerId(0), Instant::from_millis(60_204));
        assert_eq!(one.engine(), Instant::from_millis(60_200));
        other.beat(WorkerId(1), Instant::from_millis(61_000));
        assert_eq!(one.engine(), Instant::from_millis(60_200));
        one.beat(WorkerId(0), Instant::from_millis(61_001));
        assert_eq!(one.engine(), Instant::from_millis(61_001));
    }
}
