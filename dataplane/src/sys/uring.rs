//! Packets of a TAP queue through io_uring: multishot reads into a ring of buffers, fixed writes.
//!
//! The contract is that of `chunks`: a chunk is in the kernel's hands from the moment it stands in
//! the buffer ring or in a write until its completion was seen. The memory outlives every request:
//! dropping cancels them first, and leaves the memory mapped if that fails.
//!
//! The ring is made by one thread and belongs to the one that uses it first (`SINGLE_ISSUER`, made
//! disabled). With `DEFER_TASKRUN` the kernel completes a read only inside a call of that thread; a
//! flag in the submission ring says when there is reason for one. Needs kernel 6.7.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::Ordering;

use io_uring::types::{CancelBuilder, Fixed};
use io_uring::{IoUring, Probe, cqueue, opcode, squeue};

use super::chunks::Chunks;
use super::mmap::SharedWords;

/// One TAP queue with its buffers.
pub(crate) struct Uring {
    ring: IoUring,
    supply: Supply,
    chunks: Chunks,
    /// Where in a chunk the kernel writes what it reads.
    start: usize,
    room: u32,
    arrived: VecDeque<(u32, usize)>,
    is_started: bool,
    is_armed: bool,
    failure: Option<i32>,
    counts: Counts,
}

/// What the completions said.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Counts {
    /// All completions.
    pub(crate) completions: u64,
    /// Writes done.
    pub(crate) written: u64,
    /// Writes that the kernel refused.
    pub(crate) refused: u64,
    /// Reads that ended because no buffer was left.
    pub(crate) starved: u64,
}

impl Uring {
    /// A ring for this queue. Packets are read into the chunks from byte `start` on. Three quarters
    /// of the chunks are offered for reading, the others are left for packets of other memories.
    pub(crate) fn new(queue: &OwnedFd, chunks: Chunks, start: usize) -> io::Result<Self> {
        let room = chunks.stride().checked_sub(start).map(u32::try_from);
        let Some(Ok(room)) = room else {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        };
        let ring: IoUring = IoUring::builder()
            .setup_r_disabled()
            .setup_single_issuer()
            .setup_defer_taskrun()
            .setup_taskrun_flag()
            .setup_submit_all()
            .setup_cqsize(COMPLETIONS)
            .build(SUBMISSIONS)?;
        let submitter = ring.submitter();
        let mut probe = Probe::new();
        submitter.register_probe(&mut probe)?;
        if !probe.is_supported(opcode::ReadMulti::CODE) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        submitter.register_files(&[queue.as_raw_fd()])?;
        let supply = Supply::new(chunks.count())?;
        let (base, length) = chunks.region();
        let region = libc::iovec {
            iov_base: base.cast(),
            iov_len: length,
        };
        // SAFETY: the region is mapped, and stays so until the ring is gone: `chunks` moves into the
        // same value, whose drop takes care of the order.
        unsafe { submitter.register_buffers(&[region]) }?;
        let (address, entries) = (supply.address(), supply.entries());
        // SAFETY: the entries lie at this page-aligned address and outlive the ring in the same way.
        unsafe { submitter.register_buf_ring_with_flags(address, entries, GROUP, 0) }?;
        Ok(Self {
            arrived: VecDeque::with_capacity(chunks.count()),
            ring,
            supply,
            chunks,
            start,
            room,
            is_started: false,
            is_armed: false,
            failure: None,
            counts: Counts::default(),
        })
    }

    /// Hands over up to `limit` packets that were read: chunk and length. The chunks are held.
    pub(crate) fn receive(&mut self, limit: usize, mut take: impl FnMut(&mut Chunks, u32, usize)) {
        if self.arrived.len() < limit {
            self.drain();
        }
        if self.arrived.is_empty() && (!self.is_armed || self.has_work()) {
            self.flush();
        }
        let count = self.arrived.len().min(limit);
        for (chunk, length) in self.arrived.drain(..count) {
            take(&mut self.chunks, chunk, length);
        }
    }

    /// Queues the write of a part of a held chunk. False if there is no room; it is still held then.
    pub(crate) fn send(&mut self, chunk: u32, start: usize, length: usize) -> bool {
        let Ok(length) = u32::try_from(length) else {
            return false;
        };
        if self.ring.submission().is_full() {
            self.submit();
        }
        if self.ring.submission().is_full() {
            return false;
        }
        let Some(address) = self.chunks.lend(chunk) else {
            return false;
        };
        let write = opcode::WriteFixed::new(QUEUE, address.wrapping_add(start), length, REGION)
            .build()
            .user_data(u64::from(chunk));
        self.push(&write)
    }

    /// Submits what is queued, offers free chunks for reading, and sees what was completed.
    pub(crate) fn flush(&mut self) {
        self.offer();
        if !self.is_armed && self.failure.is_none() && self.supply.offered > 0 {
            // A length of zero: as long as the buffer is.
            let read = opcode::ReadMulti::new(QUEUE, 0, GROUP)
                .build()
                .user_data(READ);
            self.is_armed = self.push(&read);
        }
        if !self.ring.submission().is_empty() || self.has_work() {
            self.submit();
        }
        self.drain();
    }

    /// Whether a packet waits. Afterwards the queue's own descriptor tells of the next one.
    pub(crate) fn is_readable(&mut self) -> bool {
        self.flush();
        !self.arrived.is_empty()
    }

    /// The memory.
    pub(crate) const fn chunks(&self) -> &Chunks {
        &self.chunks
    }

    /// The memory.
    pub(crate) const fn chunks_mut(&mut self) -> &mut Chunks {
        &mut self.chunks
    }

    /// The error that ended reading for good: the device is gone.
    pub(crate) const fn failure(&self) -> Option<i32> {
        self.failure
    }

    /// What the completions said.
    pub(crate) const fn counts(&self) -> Counts {
        self.counts
    }

    fn offer(&mut self) {
        let mut is_new = false;
        while self.supply.offered < self.chunks.count() * 3 / 4 {
            let Some(chunk) = self.chunks.acquire() else {
                break;
            };
            // Its number fits: there are at most `MOST_ENTRIES`.
            let number = u16::try_from(chunk).unwrap_or(u16::MAX);
            let Some(address) = self.chunks.lend(chunk) else {
                break;
            };
            let address = address.wrapping_add(self.start).addr();
            self.supply.put(address, self.room, number);
            is_new = true;
        }
        if is_new {
            self.supply.publish();
        }
    }

    fn drain(&mut self) {
        for completion in self.ring.completion() {
            self.counts.completions += 1;
            if completion.user_data() == READ {
                self.is_armed &= cqueue::more(completion.flags());
                match -completion.result() {
                    libc::ENOBUFS => self.counts.starved += 1,
                    libc::EAGAIN | libc::EINTR | libc::ECANCELED => {}
                    error if error > 0 => self.failure = Some(error),
                    _ => {}
                }
                let Some(id) = cqueue::buffer_select(completion.flags()) else {
                    continue;
                };
                let chunk = u32::from(id);
                self.supply.offered -= usize::from(self.chunks.reclaim(chunk));
                match usize::try_from(completion.result()) {
                    Ok(length) => self.arrived.push_back((chunk, length)),
                    Err(_) => self.chunks.release(chunk),
                }
            } else {
                let is_done = completion.result() >= 0;
                self.counts.written += u64::from(is_done);
                self.counts.refused += u64::from(!is_done);
                let chunk = u32::try_from(completion.user_data()).unwrap_or(u32::MAX);
                self.chunks.reclaim(chunk);
                self.chunks.release(chunk);
            }
        }
    }

    /// Whether the kernel has something to complete that needs a call.
    fn has_work(&mut self) -> bool {
        let submission = self.ring.submission();
        submission.taskrun() || submission.cq_overflow()
    }

    fn submit(&mut self) {
        if !self.is_started {
            self.is_started = self.ring.submitter().register_enable_rings().is_ok();
        }
        // What an interrupted or refused call leaves in the ring goes with the next one.
        let _ = self.ring.submit();
    }

    fn push(&mut self, entry: &squeue::Entry) -> bool {
        // SAFETY: what the entry points to is registered with the ring, lies in chunks that are the
        // kernel's from now on, and outlives the request (see the drop below).
        unsafe { self.ring.submission().push(entry) }.is_ok()
    }
}

impl std::fmt::Debug for Uring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Uring")
            .field("supply", &self.supply)
            .field("chunks", &self.chunks)
            .field("counts", &self.counts)
            .finish_non_exhaustive()
    }
}

impl Drop for Uring {
    fn drop(&mut self) {
        let cancelled = if self.is_started {
            self.ring
                .submitter()
                .register_sync_cancel(None, CancelBuilder::any())
        } else {
            Ok(())
        };
        let nothing_left = match cancelled {
            Ok(()) => true,
            Err(error) => error.raw_os_error() == Some(libc::ENOENT),
        };
        if !nothing_left {
            self.chunks.leave_mapped();
            std::mem::forget(self.supply.words.clone());
        }
    }
}

/// The ring of buffers that the kernel reads into (`struct io_uring_buf_ring`).
///
/// An entry is two words: the address; length, number and, in the first entry only, the ring's
/// tail.
#[derive(Debug)]
struct Supply {
    words: SharedWords,
    entries: u16,
    tail: u16,
    offered: usize,
}

impl Supply {
    fn new(chunks: usize) -> io::Result<Self> {
        let entries = u16::try_from(chunks.next_power_of_two())
            .ok()
            .filter(|&entries| entries <= MOST_ENTRIES)
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EINVAL))?;
        Ok(Self {
            words: SharedWords::anonymous(2 * usize::from(entries))?,
            entries,
            tail: 0,
            offered: 0,
        })
    }

    /// Writes an entry, which the kernel sees after `publish`.
    fn put(&mut self, address: usize, length: u32, number: u16) {
        let index = 2 * usize::from(self.tail & (self.entries - 1));
        let words = self.words.words();
        if let (Some(first), Some(second)) = (words.get(index), words.get(index + 1)) {
            let tail = tail_of(second.load(Ordering::Relaxed));
            first.store(address as u64, Ordering::Relaxed);
            second.store(word(length, number, tail), Ordering::Relaxed);
        }
        self.tail = self.tail.wrapping_add(1);
        self.offered += 1;
    }

    fn publish(&self) {
        if let Some(second) = self.words.words().get(1) {
            let [a, b, c, d, e, f, _, _] = second.load(Ordering::Relaxed).to_ne_bytes();
            let (length, number) = ([a, b, c, d], [e, f]);
            let (length, number) = (u32::from_ne_bytes(length), u16::from_ne_bytes(number));
            // Release: the kernel, which loads the tail with acquire, sees the entries below it.
            second.store(word(length, number, self.tail), Ordering::Release);
        }
    }

    fn address(&self) -> u64 {
        self.words.words().as_ptr().addr() as u64
    }

    const fn entries(&self) -> u16 {
        self.entries
    }
}

fn word(length: u32, number: u16, tail: u16) -> u64 {
    let [a, b, c, d] = length.to_ne_bytes();
    let [e, f] = number.to_ne_bytes();
    let [g, h] = tail.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, e, f, g, h])
}

const fn tail_of(word: u64) -> u16 {
    let [.., g, h] = word.to_ne_bytes();
    u16::from_ne_bytes([g, h])
}

/// The TAP queue among the registered files.
const QUEUE: Fixed = Fixed(0);
/// The chunks among the registered buffers.
const REGION: u16 = 0;
/// The buffer ring's number.
const GROUP: u16 = 0;
/// `user_data` of the read; a write has the number of its chunk.
const READ: u64 = u64::MAX;
const SUBMISSIONS: u32 = 256;
/// More than there are chunks: a completion for each, and those that say that a read ended.
const COMPLETIONS: u32 = 1024;
const MOST_ENTRIES: u16 = 512;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_has_the_kernels_layout_and_keeps_the_tail() {
        let mut supply = Supply::new(2).expect("a page");
        supply.put(0x1000, 100, 7);
        supply.put(0x2000, 200, 8);
        supply.publish();
        supply.put(0x3000, 300, 9);
        let entries: Vec<u64> = supply.words.words()[..4]
            .iter()
            .map(|word| word.load(Ordering::Relaxed))
            .collect();
        assert_eq!(entries, [0x3000, word(300, 9, 2), 0x2000, word(200, 8, 0)]);
        assert_eq!(
            word(0x0403_0201, 0x0605, 0x0807).to_ne_bytes(),
            [1, 2, 3, 4, 5, 6, 7, 8]
        );
        assert_eq!(size_of::<io_uring::types::BufRingEntry>(), 16);
    }

    #[test]
    fn more_chunks_than_completions_are_refused() {
        assert!(Supply::new(513).is_err());
    }
}
