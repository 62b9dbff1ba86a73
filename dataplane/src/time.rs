//! Time as an argument: instants, durations and the clock that only the worker reads.
//!
//! An `Instant` is nanoseconds of `CLOCK_MONOTONIC`, the clock that `bpf_ktime_get_ns` reads, so
//! that engine and programs can compare heartbeats.

use std::ops::{Add, Sub};
pub use std::time::Duration;

/// A point on the monotonic clock, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
#[repr(transparent)]
pub struct Instant(u64);

impl Instant {
    /// From nanoseconds of the monotonic clock.
    #[must_use]
    pub const fn from_nanos(nanos: u64) -> Self {
        Self(nanos)
    }

    /// From whole seconds; what tests write.
    #[must_use]
    pub const fn from_secs(seconds: u64) -> Self {
        Self(seconds * 1_000_000_000)
    }

    /// From milliseconds.
    #[must_use]
    pub const fn from_millis(milliseconds: u64) -> Self {
        Self(milliseconds * 1_000_000)
    }

    /// Nanoseconds of the monotonic clock.
    #[must_use]
    pub const fn as_nanos(self) -> u64 {
        self.0
    }

    /// Whole milliseconds of the monotonic clock.
    #[must_use]
    pub const fn as_millis(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Time since `earlier`, zero if that lies ahead.
    #[must_use]
    pub const fn since(self, earlier: Self) -> Duration {
        Duration::from_nanos(self.0.saturating_sub(earlier.0))
    }
}

impl Add<Duration> for Instant {
    type Output = Self;

    fn add(self, duration: Duration) -> Self {
        Self(
            self.0
                .saturating_add(u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        )
    }
}

impl Sub for Instant {
    type Output = Duration;

    fn sub(self, earlier: Self) -> Duration {
        self.since(earlier)
    }
}

/// Where a worker reads the time, once per batch.
pub trait Clock {
    /// The present.
    fn now(&self) -> Instant;
}

/// The kernel's monotonic clock.
#[derive(Clone, Copy, Debug, Default)]
pub struct MonotonicClock;

impl Clock for MonotonicClock {
    fn now(&self) -> Instant {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
        let nanos = u64::try_from(now.tv_nsec).unwrap_or(0);
        Instant(seconds * 1_000_000_000 + nanos)
    }
}

/// A clock that a test moves by hand.
#[derive(Debug, Default)]
pub struct TestClock(std::sync::atomic::AtomicU64);

impl TestClock {
    /// Starts at `now`.
    #[must_use]
    pub const fn at(now: Instant) -> Self {
        Self(std::sync::atomic::AtomicU64::new(now.0))
    }

    /// Moves it forward.
    pub fn advance(&self, duration: Duration) {
        let nanos = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.0
            .fetch_add(nanos, std::sync::atomic::Ordering::Relaxed);
    }
}

impl Clock for TestClock {
    fn now(&self) -> Instant {
        Instant(self.0.load(std::sync::atomic::Ordering::Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_since_a_later_instant_is_zero() {
        assert_eq!(
            Instant::from_secs(1).since(Instant::from_secs(2)),
            Duration::ZERO
        );
    }

    #[test]
    fn the_test_clock_moves_only_by_hand() {
        let clock = TestClock::at(Instant::from_secs(60));
        clock.advance(Duration::from_secs(5));
        assert_eq!(clock.now(), Instant::from_secs(65));
    }
}
