//! `TupleMap`: the fingerprints of a worker's flows, in memory that the programs read.
//!
//! Only the owner stores; a program clears a slot by compare-and-swap, so a slot once found empty
//! stays empty for the owner. Each change is one aligned 8-byte store. No lock, no allocation: it is
//! called on the packet path. Which two buckets a fingerprint may stand in says `steer::buckets_of`.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};

use super::layout::TUPLES_PER_BUCKET;
use crate::steer::{WorkerId, buckets_of};
use crate::sys::mmap::SharedWords;

/// Both buckets of the fingerprint are full.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// One worker's region of `tuples`.
#[derive(Debug)]
pub struct TupleMap {
    words: SharedWords,
    first_bucket: usize,
    buckets: u32,
}

impl TupleMap {
    /// A region in plain memory that no program reads, for tests; `buckets` is a power of two.
    ///
    /// # Errors
    /// The kernel's, if there is no memory.
    pub fn in_memory(buckets: u32) -> io::Result<Self> {
        let words = SharedWords::anonymous(buckets as usize * TUPLES_PER_BUCKET)?;
        Ok(Self::new(words, WorkerId(0), buckets))
    }

    pub(super) fn new(words: SharedWords, worker: WorkerId, buckets: u32) -> Self {
        Self {
            words,
            first_bucket: usize::from(worker.0) * buckets as usize,
            buckets,
        }
    }

    /// Makes a fingerprint known to the programs; storing it twice is storing it once.
    ///
    /// # Errors
    /// `Full` if there is no room for it.
    pub fn store(&mut self, fingerprint: u64) -> Result<(), Full> {
        if self.contains(fingerprint) {
            return Ok(());
        }
        let slot = self.find(fingerprint, 0).ok_or(Full)?;
        slot.store(fingerprint, Ordering::Release);
        Ok(())
    }

    /// Forgets a fingerprint, if it is there.
    pub fn clear(&mut self, fingerprint: u64) {
        if let Some(slot) = self.find(fingerprint, fingerprint) {
            slot.store(0, Ordering::Release);
        }
    }

    /// Whether the programs know it. They forget one whose client began anew while the engine was
    /// away.
    #[must_use]
    pub fn contains(&self, fingerprint: u64) -> bool {
        self.find(fingerprint, fingerprint).is_some()
    }

    /// How many fingerprints are stored: for tests and tools, it walks the whole region.
    #[must_use]
    pub fn count(&self) -> usize {
        let first = self.first_bucket * TUPLES_PER_BUCKET;
        let length = self.buckets as usize * TUPLES_PER_BUCKET;
        self.words
            .words()
            .iter()
            .skip(first)
            .take(length)
            .filter(|slot| slot.load(Ordering::Acquire) != 0)
            .count()
    }

    /// The first slot with `content` in either bucket of `fingerprint`.
    fn find(&self, fingerprint: u64, content: u64) -> Option<&AtomicU64> {
        buckets_of(fingerprint, self.buckets)
            .into_iter()
            .flat_map(|bucket| self.bucket(bucket))
            .find(|slot| slot.load(Ordering::Acquire) == content)
    }

    fn bucket(&self, index: u32) -> &[AtomicU64] {
        let start = (self.first_bucket + index as usize) * TUPLES_PER_BUCKET;
        self.words
            .words()
            .get(start..start + TUPLES_PER_BUCKET)
            .unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_full_pair_of_buckets_refuses_and_a_cleared_slot_is_used_again() {
        let mut tuples = TupleMap::in_memory(1).expect("memory");
        for fingerprint in 1..=8 {
            assert_eq!(tuples.store(fingerprint), Ok(()));
        }
        assert_eq!(tuples.store(9), Err(Full));
        tuples.clear(3);
        assert_eq!(tuples.store(9), Ok(()));
        assert!(!tuples.contains(3) && tuples.contains(9));
    }

    #[test]
    fn regions_of_two_workers_do_not_meet() {
        let words = SharedWords::anonymous(2 * 4 * TUPLES_PER_BUCKET).expect("memory");
        let mut first = TupleMap::new(words.clone(), WorkerId(0), 4);
        let mut second = TupleMap::new(words, WorkerId(1), 4);
        first.store(77).expect("room");
        assert!(!second.contains(77));
        second.store(77).expect("room");
        first.clear(77);
        assert_eq!((first.count(), second.count()), (0, 1));
    }

    proptest! {
        #[test]
        fn it_holds_what_a_set_holds(operations in prop::collection::vec((any::<bool>(), 1_u64..40), 0..200)) {
            let mut tuples = TupleMap::in_memory(16).expect("memory");
            let mut oracle = BTreeSet::new();
            for (store, number) in operations {
                let fingerprint = number.wrapping_mul(0x9E37_79B9_7F4A_7C15);
                if store {
                    prop_assert_eq!(tuples.store(fingerprint), Ok(()));
                    oracle.insert(fingerprint);
                } else {
                    tuples.clear(fingerprint);
                    oracle.remove(&fingerprint);
                }
                prop_assert_eq!(tuples.contains(fingerprint), store);
                prop_assert_eq!(tuples.count(), oracle.len());
            }
        }
    }
}
