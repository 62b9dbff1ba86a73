//! Wraps any device and writes what passes to a capture file (pcap, nanosecond timestamps).
//!
//! Received frames are written as they arrive, sent ones as they leave; the direction is not kept,
//! nor is the vnet header. It is a tool for looking, not for the packet path: every frame costs a
//! write. A writer that fails is not asked again, and packets go on.

use std::io::{self, Write};
use std::os::fd::BorrowedFd;

use super::{Batch, Device, DeviceReport, Frame, Full, VnetHeader};
use crate::time::{Clock, Instant};

/// A device whose packets are captured.
#[derive(Debug)]
pub struct Pcap<D, W, C> {
    device: D,
    writer: W,
    clock: C,
    failed: Option<io::Error>,
}

impl<D: Device, W: Write, C: Clock> Pcap<D, W, C> {
    /// Writes the file's header. Timestamps are the clock's, not the day's.
    ///
    /// # Errors
    /// The writer's.
    pub fn new(device: D, mut writer: W, clock: C) -> io::Result<Self> {
        writer.write_all(&file_header())?;
        Ok(Self {
            device,
            writer,
            clock,
            failed: None,
        })
    }

    /// The device within.
    pub const fn device(&mut self) -> &mut D {
        &mut self.device
    }

    /// Why nothing is captured any more.
    pub const fn failed(&self) -> Option<&io::Error> {
        self.failed.as_ref()
    }

    /// The device and the writer, flushed.
    ///
    /// # Errors
    /// The writer's, now or earlier.
    pub fn into_parts(mut self) -> io::Result<(D, W)> {
        match self.failed {
            Some(error) => Err(error),
            None => self.writer.flush().map(|()| (self.device, self.writer)),
        }
    }

    fn capture(&mut self, frame: &Frame) {
        let now = self.clock.now();
        let bytes = self.device.bytes(frame);
        note(&mut self.writer, &mut self.failed, now, bytes);
    }
}

impl<D: Device, W: Write, C: Clock> Device for Pcap<D, W, C> {
    fn receive(&mut self, batch: &mut Batch) -> usize {
        let before = batch.len();
        let count = self.device.receive(batch);
        for (frame, _) in batch.iter().skip(before) {
            self.capture(frame);
        }
        count
    }

    fn bytes<'a>(&'a mut self, frame: &'a Frame) -> &'a mut [u8] {
        self.device.bytes(frame)
    }

    fn transmit(&mut self, frame: Frame, vnet: &VnetHeader) -> Result<(), Full> {
        self.capture(&frame);
        self.device.transmit(frame, vnet)
    }

    fn transmit_copy(&mut self, bytes: &[u8], vnet: &VnetHeader) -> Result<(), Full> {
        note(&mut self.writer, &mut self.failed, self.clock.now(), bytes);
        self.device.transmit_copy(bytes, vnet)
    }

    fn free(&mut self, frame: Frame) {
        self.device.free(frame);
    }

    fn flush(&mut self) {
        self.device.flush();
    }

    fn is_readable(&mut self) -> bool {
        self.device.is_readable()
    }

    fn report(&self) -> DeviceReport {
        self.device.report()
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        self.device.descriptor()
    }
}

fn file_header() -> Vec<u8> {
    let mut header = Vec::with_capacity(24);
    header.extend_from_slice(&NANOSECOND_MAGIC.to_ne_bytes());
    header.extend_from_slice(&2_u16.to_ne_bytes());
    header.extend_from_slice(&4_u16.to_ne_bytes());
    header.extend_from_slice(&[0; 8]);
    header.extend_from_slice(&LONGEST.to_ne_bytes());
    header.extend_from_slice(&ETHERNET.to_ne_bytes());
    header
}

/// Writes one record, unless the writer failed before.
fn note(writer: &mut impl Write, failed: &mut Option<io::Error>, now: Instant, bytes: &[u8]) {
    if failed.is_some() {
        return;
    }
    let seconds = u32::try_from(now.as_nanos() / 1_000_000_000).unwrap_or(u32::MAX);
    let nanos = u32::try_from(now.as_nanos() % 1_000_000_000).unwrap_or(0);
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let header = [seconds, nanos, length, length].map(u32::to_ne_bytes);
    let written = writer
        .write_all(header.as_flattened())
        .and_then(|()| writer.write_all(bytes));
    *failed = written.err();
}

const NANOSECOND_MAGIC: u32 = 0xa1b2_3c4d;
const LONGEST: u32 = 256 * 1024;
const ETHERNET: u32 = 1;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::memory::MemoryDevice;
    use crate::time::TestClock;

    #[test]
    fn what_comes_and_what_goes_is_written() {
        let clock = TestClock::at(Instant::from_millis(1500));
        let mut device =
            Pcap::new(MemoryDevice::new(4, 64), Vec::new(), clock).expect("a Vec takes all");
        let vnet = VnetHeader::default();
        device.device().push(b"abc", &vnet).expect("room");
        let mut batch = Batch::new();
        device.receive(&mut batch);
        let (frame, vnet) = batch.pop().expect("it was pushed");
        device.bytes(&frame)[0] = b'x';
        device.transmit(frame, &vnet).expect("room");
        device.transmit_copy(b"de", &vnet).expect("room");

        let (mut memory, file) = device.into_parts().expect("a Vec takes all");
        assert_eq!(memory.drain_sent().len(), 2);
        let mut expected = file_header();
        for bytes in [&b"abc"[..], b"xbc", b"de"] {
            let length = u32::try_from(bytes.len()).expect("short");
            for word in [1, 500_000_000, length, length] {
                expected.extend_from_slice(&u32::to_ne_bytes(word));
            }
            expected.extend_from_slice(bytes);
        }
        assert_eq!(file, expected);
    }

    #[test]
    fn a_writer_that_fails_stops_no_packet() {
        let mut room = [0_u8; 30];
        let writer = io::Cursor::new(&mut room[..]);
        let clock = TestClock::default();
        let mut device = Pcap::new(MemoryDevice::new(4, 64), writer, clock).expect("a header fits");
        for _ in 0..2 {
            let vnet = VnetHeader::default();
            device.transmit_copy(b"abc", &vnet).expect("room");
        }
        assert!(device.failed().is_some());
        assert_eq!(device.device().drain_sent().len(), 2);
        assert!(device.into_parts().is_err());
    }
}
