//! A device without a kernel: a test pushes frames in at one end, the worker receives, rewrites and
//! sends them, and the test takes them out at the other.
//!
//! Its chunks are bounded like a ring's, and counted: `held` says how many are out as `Frame`s, so
//! that a test can assert that none leaks. It does not lose, reorder or segment anything. Rule to
//! keep: nothing is allocated after `new`, since the no-allocation test drives this device.

use std::collections::VecDeque;
use std::os::fd::BorrowedFd;

use super::{BATCH, Batch, Device, DeviceReport, Frame, Full, VnetHeader};

/// Packet memory with two queues: what arrived and what was sent.
#[derive(Debug)]
pub struct MemoryDevice {
    memory: Vec<u8>,
    chunk_size: usize,
    free: Vec<u32>,
    arrived: VecDeque<(Frame, VnetHeader)>,
    sent: VecDeque<(Frame, VnetHeader)>,
    transmit_room: usize,
    flushes: u64,
}

impl MemoryDevice {
    /// `chunks` pieces of memory of `chunk_size` bytes, all of which may wait to be taken as sent.
    #[must_use]
    pub fn new(chunks: u32, chunk_size: usize) -> Self {
        let count = chunks as usize;
        Self {
            memory: vec![0; count * chunk_size],
            chunk_size,
            free: (0..chunks).rev().collect(),
            arrived: VecDeque::with_capacity(count),
            sent: VecDeque::with_capacity(count),
            transmit_room: count,
            flushes: 0,
        }
    }

    /// How many sent frames may wait until they are taken; the next one finds the device `Full`.
    pub const fn limit_transmit(&mut self, room: usize) {
        self.transmit_room = room;
    }

    /// A frame arrives, as from the wire.
    ///
    /// # Errors
    /// `Full` if no chunk is free or the bytes are more than a chunk holds.
    pub fn push(&mut self, bytes: &[u8], vnet: &VnetHeader) -> Result<(), Full> {
        let frame = self.filled(bytes)?;
        self.arrived.push_back((frame, *vnet));
        Ok(())
    }

    /// Takes the oldest sent frame; its bytes replace those in `bytes`.
    pub fn take_sent(&mut self, bytes: &mut Vec<u8>) -> Option<VnetHeader> {
        let (frame, vnet) = self.sent.pop_front()?;
        bytes.clear();
        bytes.extend_from_slice(self.bytes(&frame));
        self.free(frame);
        Some(vnet)
    }

    /// Takes all sent frames, oldest first.
    pub fn drain_sent(&mut self) -> Vec<(Vec<u8>, VnetHeader)> {
        let mut all = Vec::new();
        let mut bytes = Vec::new();
        while let Some(vnet) = self.take_sent(&mut bytes) {
            all.push((bytes.clone(), vnet));
        }
        all
    }

    /// All chunks, whoever owns them.
    #[must_use]
    pub fn chunks(&self) -> usize {
        self.memory.len() / self.chunk_size.max(1)
    }

    /// Chunks in the free list.
    #[must_use]
    pub fn free_chunks(&self) -> usize {
        self.free.len()
    }

    /// Chunks that are out as `Frame`s: received, and neither sent nor freed.
    #[must_use]
    pub fn held(&self) -> usize {
        self.chunks() - self.free.len() - self.arrived.len() - self.sent.len()
    }

    /// How often the worker flushed.
    #[must_use]
    pub const fn flushes(&self) -> u64 {
        self.flushes
    }

    fn filled(&mut self, bytes: &[u8]) -> Result<Frame, Full> {
        let length = u32::try_from(bytes.len()).map_err(|_| Full)?;
        if bytes.len() > self.chunk_size {
            return Err(Full);
        }
        let chunk = self.free.pop().ok_or(Full)?;
        let frame = Frame {
            chunk,
            offset: 0,
            length,
        };
        self.bytes(&frame).copy_from_slice(bytes);
        Ok(frame)
    }
}

impl Device for MemoryDevice {
    fn receive(&mut self, batch: &mut Batch) -> usize {
        let count = self.arrived.len().min(BATCH);
        batch.extend(self.arrived.drain(..count));
        count
    }

    fn bytes<'a>(&'a mut self, frame: &'a Frame) -> &'a mut [u8] {
        let start = frame.chunk as usize * self.chunk_size + frame.offset as usize;
        &mut self.memory[start..start + frame.length as usize]
    }

    fn transmit(&mut self, frame: Frame, vnet: &VnetHeader) -> Result<(), Full> {
        if self.sent.len() >= self.transmit_room {
            self.free(frame);
            return Err(Full);
        }
        self.sent.push_back((frame, *vnet));
        Ok(())
    }

    fn transmit_copy(&mut self, bytes: &[u8], vnet: &VnetHeader) -> Result<(), Full> {
        if self.sent.len() >= self.transmit_room {
            return Err(Full);
        }
        let frame = self.filled(bytes)?;
        self.sent.push_back((frame, *vnet));
        Ok(())
    }

    fn free(&mut self, frame: Frame) {
        self.free.push(frame.chunk);
    }

    fn flush(&mut self) {
        self.flushes += 1;
    }

    fn is_readable(&mut self) -> bool {
        !self.arrived.is_empty()
    }

    fn report(&self) -> DeviceReport {
        DeviceReport::default()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PLAIN: VnetHeader = VnetHeader {
        flags: 0,
        gso_type: 0,
        header_length: 0,
        gso_size: 0,
        checksum_start: 0,
        checksum_offset: 0,
    };

    #[test]
    fn a_frame_goes_through_with_its_bytes_and_vnet_header() {
        let mut device = MemoryDevice::new(4, 64);
        let partial = VnetHeader {
            flags: VnetHeader::NEEDS_CSUM,
            gso_size: 1448,
            ..PLAIN
        };
        device.push(b"abc", &partial).expect("a chunk is free");

        let mut batch = Batch::new();
        assert!(device.is_readable());
        assert_eq!(device.receive(&mut batch), 1);
        let (frame, vnet) = batch.pop().expect("one was received");
        device.bytes(&frame)[0] = b'x';
        assert_eq!(device.held(), 1);
        device.transmit(frame, &vnet).expect("there is room");

        assert_eq!(device.drain_sent(), [(b"xbc".to_vec(), partial)]);
        assert_eq!((device.held(), device.free_chunks()), (0, 4));
    }

    #[test]
    fn a_dropped_frame_shows_as_held() {
        let mut device = MemoryDevice::new(2, 64);
        device.push(b"abc", &PLAIN).expect("a chunk is free");
        let mut batch = Batch::new();
        device.receive(&mut batch);
        batch.clear();
        assert_eq!(device.held(), 1);
    }

    #[test]
    fn a_full_device_frees_the_frame_it_was_given() {
        let mut device = MemoryDevice::new(2, 64);
        device.limit_transmit(0);
        device.push(b"abc", &PLAIN).expect("a chunk is free");
        let mut batch = Batch::new();
        device.receive(&mut batch);
        let (frame, vnet) = batch.pop().expect("one was received");
        assert_eq!(device.transmit(frame, &vnet), Err(Full));
        assert_eq!(device.transmit_copy(b"abc", &PLAIN), Err(Full));
        assert_eq!(device.free_chunks(), 2);
    }

    #[test]
    fn a_packet_larger_than_a_chunk_is_refused() {
        let mut device = MemoryDevice::new(2, 4);
        assert_eq!(device.push(b"abcde", &PLAIN), Err(Full));
        assert_eq!(device.transmit_copy(b"abcde", &PLAIN), Err(Full));
        assert_eq!(device.free_chunks(), 2);
    }

    proptest! {
        /// Any order of operations keeps the queues in order and every chunk in exactly one place.
        #[test]
        fn it_behaves_like_two_queues_over_bounded_memory(
            operations in prop::collection::vec((0_u8..6, any::<u8>()), 1..200)
        ) {
            const CHUNKS: usize = 8;
            let mut device = MemoryDevice::new(8, 4);
            let (mut arrived, mut sent) = (VecDeque::new(), VecDeque::new());
            let mut held: VecDeque<(Frame, u8)> = VecDeque::new();
            let mut batch = Batch::new();
            let mut bytes = Vec::new();
            for (operation, value) in operations {
                let used = arrived.len() + sent.len() + held.len();
                match operation {
                    0 => {
                        let pushed = device.push(&[value], &PLAIN).is_ok();
                        prop_assert_eq!(pushed, used < CHUNKS);
                        if pushed { arrived.push_back(value); }
                    }
                    1 => {
                        prop_assert_eq!(device.receive(&mut batch), arrived.len());
                        for (frame, _) in batch.drain(..) {
                            let expected = arrived.pop_front().expect("counted above");
                            prop_assert_eq!(device.bytes(&frame), &[expected][..]);
                            held.push_back((frame, expected));
                        }
                    }
                    2 => if let Some((frame, value)) = held.pop_front() {
                        prop_assert!(device.transmit(frame, &PLAIN).is_ok());
                        sent.push_back(value);
                    },
                    3 => {
                        let copied = device.transmit_copy(&[value], &PLAIN).is_ok();
                        prop_assert_eq!(copied, used < CHUNKS);
                        if copied { sent.push_back(value); }
                    }
                    4 => if let Some((frame, _)) = held.pop_back() { device.free(frame); },
                    _ => {
                        let taken = device.take_sent(&mut bytes).map(|_| bytes[0]);
                        prop_assert_eq!(taken, sent.pop_front());
                    }
                }
                prop_assert_eq!(device.held(), held.len());
                let used = arrived.len() + sent.len() + held.len();
                prop_assert_eq!(device.free_chunks(), CHUNKS - used);
            }
        }
    }
}
