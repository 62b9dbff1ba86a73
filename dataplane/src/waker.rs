//! How a sleeping worker is woken: one eventfd each, written only when its owner sleeps.
//!
//! The sleeper says that it is about to sleep, then looks once more for work, then blocks; who brings
//! work first publishes it, then looks whether the owner sleeps. Both use sequentially consistent
//! order, so one of the two always sees the other.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

/// One worker's bell.
#[derive(Debug)]
pub struct Waker {
    eventfd: OwnedFd,
    sleeping: AtomicBool,
    asked: AtomicBool,
}

impl Waker {
    /// A new bell.
    ///
    /// # Errors
    /// The kernel's, when it has no descriptor left.
    pub fn new() -> std::io::Result<Self> {
        let eventfd = eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
        let (sleeping, asked) = (AtomicBool::new(false), AtomicBool::new(false));
        Ok(Self {
            eventfd,
            sleeping,
            asked,
        })
    }

    /// Work was brought; `wake_if_asked` rings once for all of a batch.
    pub fn ask(&self) {
        self.asked.store(true, Ordering::SeqCst);
    }

    /// Rings if work was brought and the owner sleeps.
    pub fn wake_if_asked(&self) {
        if self.asked.swap(false, Ordering::SeqCst) {
            self.wake();
        }
    }

    /// Rings if the owner sleeps.
    pub fn wake(&self) {
        if self.sleeping.load(Ordering::SeqCst) {
            // Full only if it rings already.
            let _rings = rustix::io::write(&self.eventfd, &1_u64.to_ne_bytes());
        }
    }

    /// The owner will look for work once more and then block.
    pub fn about_to_sleep(&self) {
        self.sleeping.store(true, Ordering::SeqCst);
    }

    /// The owner is up.
    pub fn awake(&self) {
        self.sleeping.store(false, Ordering::SeqCst);
        let mut rings = [0; 8];
        // Empty if the time or a port woke it.
        let _was_rung = rustix::io::read(&self.eventfd, &mut rings);
    }

    /// Readable when it was rung.
    #[must_use]
    pub fn descriptor(&self) -> BorrowedFd<'_> {
        self.eventfd.as_fd()
    }
}

/// Blocks until one of the descriptors is readable or the time is over.
pub fn wait(descriptors: &[Option<BorrowedFd<'_>>], longest: Duration) {
    const MOST: usize = 16;
    let Some(first) = descriptors.iter().flatten().next() else {
        return;
    };
    let mut polled: [PollFd<'_>; MOST] =
        std::array::from_fn(|_| PollFd::from_borrowed_fd(*first, PollFlags::empty()));
    for (slot, descriptor) in polled.iter_mut().zip(descriptors.iter().flatten()) {
        *slot = PollFd::from_borrowed_fd(*descriptor, PollFlags::IN);
    }
    let timeout = Timespec {
        tv_sec: i64::try_from(longest.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(longest.subsec_nanos()),
    };
    // Interrupted or not: the caller looks at its ports again.
    let _ready = poll(&mut polled, Some(&timeout));
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn a_ring_while_asleep_ends_the_wait() {
        let waker = Arc::new(Waker::new().expect("an eventfd"));
        waker.about_to_sleep();
        let other = Arc::clone(&waker);
        let ringer = std::thread::spawn(move || other.wake());
        wait(&[Some(waker.descriptor())], Duration::from_secs(10));
        ringer.join().expect("the ringer does not panic");
        waker.awake();
    }

    #[test]
    fn nobody_rings_for_one_who_is_awake() {
        let waker = Waker::new().expect("an eventfd");
        waker.ask();
        waker.wake_if_asked();
        let mut rings = [0; 8];
        assert!(rustix::io::read(waker.descriptor(), &mut rings).is_err());
    }
}
