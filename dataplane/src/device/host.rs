//! The host port: a persistent multi-queue TAP device, one queue for each worker.
//!
//! `setup` makes the device in the kernel; `HostPort` is one queue of it and moves packets. Each
//! packet has a vnet header in front: super-packets and partial checksums cross whole. What the
//! Ethernet header means is `command`'s matter, not ours. A buffer:
//!
//! ```text
//! 0          HEADROOM   FRAME_OFFSET
//! | headroom | vnet 10  | Ethernet frame, up to 64 KiB |
//! ```
//!
//! A frame that goes back out is written from where it lies, its vnet header in front. Rule to
//! keep: a buffer is in exactly one place (`sys::chunks`), and every path returns it.

mod setup;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use zerocopy::{FromBytes, IntoBytes};

use super::{BATCH, Batch, Device, DeviceReport, Frame, Full, VnetHeader};
use crate::sys::chunks::Chunks;
use crate::sys::tun;
use crate::sys::uring::Uring;

pub use setup::{HostPortConfig, HostPortDevice, HostPortError, IoPreference};

/// How packets are read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoKind {
    /// Multishot reads into a buffer ring, batched fixed writes.
    Uring,
    /// A system call for each packet.
    ReadWrite,
}

impl IoKind {
    /// The word that `status` and metrics show.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Uring => "io_uring",
            Self::ReadWrite => "read_write",
        }
    }
}

/// What went through a host port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct HostPortCounts {
    /// Packets read.
    pub received: u64,
    /// Packets written.
    pub transmitted: u64,
    /// io_uring completions seen, of either kind.
    pub completions: u64,
    /// Writes that the kernel refused, and packets that found no room.
    pub refused: u64,
    /// How often the kernel found no buffer to read into; the packets wait in the device then.
    pub starved: u64,
}

/// One queue of the host port. Only its worker calls it.
#[derive(Debug)]
pub struct HostPort {
    queue: OwnedFd,
    io: Io,
    fallback: Option<io::Error>,
    received: u64,
    full: u64,
}

#[derive(Debug)]
#[expect(
    clippy::large_enum_variant,
    reason = "there is one a worker, used for every packet"
)]
enum Io {
    Uring(Uring),
    ReadWrite(ReadWrite),
}

impl HostPort {
    fn new(queue: OwnedFd, config: &HostPortConfig) -> io::Result<Self> {
        let chunks = || Chunks::new(config.buffers, STRIDE);
        let uring = match config.io {
            IoPreference::Uring => Some(Uring::new(&queue, chunks()?, HEADROOM)),
            IoPreference::ReadWrite => None,
        };
        let (io, fallback) = match uring {
            Some(Ok(uring)) => (Io::Uring(uring), None),
            refused => {
                let plain = ReadWrite {
                    chunks: chunks()?,
                    counts: HostPortCounts::default(),
                    failure: None,
                };
                (Io::ReadWrite(plain), refused.and_then(Result::err))
            }
        };
        Ok(Self {
            queue,
            io,
            fallback,
            received: 0,
            full: 0,
        })
    }

    /// How it reads and writes.
    #[must_use]
    pub const fn io(&self) -> IoKind {
        match self.io {
            Io::Uring(_) => IoKind::Uring,
            Io::ReadWrite(_) => IoKind::ReadWrite,
        }
    }

    /// Why io_uring is not used although it was asked for.
    #[must_use]
    pub const fn fallback(&self) -> Option<&io::Error> {
        self.fallback.as_ref()
    }

    /// The error that ended reading for good, if one did: somebody removed the device.
    #[must_use]
    pub fn failure(&self) -> Option<io::Error> {
        let number = match &self.io {
            Io::Uring(uring) => uring.failure(),
            Io::ReadWrite(plain) => plain.failure,
        };
        number.map(io::Error::from_raw_os_error)
    }

    /// What went through.
    #[must_use]
    pub const fn counts(&self) -> HostPortCounts {
        let mut counts = match &self.io {
            Io::Uring(uring) => {
                let seen = uring.counts();
                HostPortCounts {
                    received: 0,
                    transmitted: seen.written,
                    completions: seen.completions,
                    refused: seen.refused,
                    starved: seen.starved,
                }
            }
            Io::ReadWrite(plain) => plain.counts,
        };
        counts.received = self.received;
        counts.refused += self.full;
        counts
    }

    /// How many buffers are out as `Frame`s.
    #[must_use]
    pub fn held(&self) -> usize {
        match &self.io {
            Io::Uring(uring) => uring.chunks().held(),
            Io::ReadWrite(plain) => plain.chunks.held(),
        }
    }

    /// Bytes of packet memory that are locked.
    #[must_use]
    pub const fn locked_bytes(&self) -> usize {
        match &self.io {
            Io::Uring(uring) => uring.chunks().region().1,
            Io::ReadWrite(_) => 0,
        }
    }

    const fn chunks(&mut self) -> &mut Chunks {
        match &mut self.io {
            Io::Uring(uring) => uring.chunks_mut(),
            Io::ReadWrite(plain) => &mut plain.chunks,
        }
    }

    fn refuse(&mut self, chunk: u32) -> Result<(), Full> {
        self.chunks().release(chunk);
        self.full += 1;
        Err(Full)
    }
}

impl Device for HostPort {
    fn receive(&mut self, batch: &mut Batch) -> usize {
        let before = batch.len();
        let take = |chunks: &mut Chunks, chunk, length| match frame_of(chunks, chunk, length) {
            Some(packet) => batch.push(packet),
            None => chunks.release(chunk),
        };
        match &mut self.io {
            Io::Uring(uring) => uring.receive(BATCH, take),
            Io::ReadWrite(plain) => plain.receive(&self.queue, BATCH, take),
        }
        let count = batch.len() - before;
        self.received += count as u64;
        count
    }

    fn bytes<'a>(&'a mut self, frame: &'a Frame) -> &'a mut [u8] {
        let (start, length) = (frame.offset as usize, frame.length as usize);
        self.chunks().bytes(frame.chunk, start, length)
    }

    fn transmit(&mut self, frame: Frame, vnet: &VnetHeader) -> Result<(), Full> {
        let start = (frame.offset as usize).saturating_sub(VNET_LENGTH);
        let length = frame.length as usize + VNET_LENGTH;
        let header = self.chunks().bytes(frame.chunk, start, VNET_LENGTH);
        if vnet.write_to(header).is_err() {
            return self.refuse(frame.chunk);
        }
        match &mut self.io {
            Io::Uring(uring) => {
                if !uring.send(frame.chunk, start, length) {
                    return self.refuse(frame.chunk);
                }
            }
            Io::ReadWrite(plain) => plain.write(&self.queue, frame.chunk, start, length),
        }
        Ok(())
    }

    fn transmit_copy(&mut self, bytes: &[u8], vnet: &VnetHeader) -> Result<(), Full> {
        let Some(chunk) = self.chunks().acquire() else {
            self.full += 1;
            return Err(Full);
        };
        let start = FRAME_OFFSET as usize;
        let room = self.chunks().bytes(chunk, start, bytes.len());
        if room.len() != bytes.len() {
            return self.refuse(chunk);
        }
        room.copy_from_slice(bytes);
        match frame_in(chunk, bytes.len()) {
            Some(frame) => self.transmit(frame, vnet),
            None => self.refuse(chunk),
        }
    }

    fn free(&mut self, frame: Frame) {
        self.chunks().release(frame.chunk);
    }

    fn flush(&mut self) {
        match &mut self.io {
            Io::Uring(uring) => uring.flush(),
            Io::ReadWrite(_) => {}
        }
    }

    fn report(&self) -> DeviceReport {
        let counts = self.counts();
        DeviceReport {
            received: counts.received,
            transmitted: counts.transmitted,
            completions: counts.completions,
            dropped: 0,
            refused: counts.refused,
        }
    }

    fn is_readable(&mut self) -> bool {
        match &mut self.io {
            Io::Uring(uring) => uring.is_readable(),
            Io::ReadWrite(plain) => plain.failure.is_none() && tun::is_readable(&self.queue),
        }
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        // The queue, not the ring: with deferred task work nothing wakes who polls the ring, and a packet
        // stays in the queue until this thread enters the kernel to read it. The queue of a device that
        // is gone is always readable.
        let is_failed = match &self.io {
            Io::Uring(uring) => uring.failure().is_some(),
            Io::ReadWrite(plain) => plain.failure.is_some(),
        };
        (!is_failed).then(|| self.queue.as_fd())
    }
}

/// A system call for each packet: what is left where io_uring is refused.
#[derive(Debug)]
struct ReadWrite {
    chunks: Chunks,
    counts: HostPortCounts,
    failure: Option<i32>,
}

impl ReadWrite {
    fn receive(
        &mut self,
        queue: &OwnedFd,
        limit: usize,
        mut take: impl FnMut(&mut Chunks, u32, usize),
    ) {
        for _ in 0..limit {
            let Some(chunk) = self.chunks.acquire() else {
                self.counts.starved += 1;
                break;
            };
            let room = self.chunks.bytes(chunk, HEADROOM, STRIDE - HEADROOM);
            match rustix::io::read(queue, room) {
                Ok(length) => take(&mut self.chunks, chunk, length),
                Err(error) => {
                    if !matches!(error, Errno::AGAIN | Errno::INTR) {
                        self.failure = Some(error.raw_os_error());
                    }
                    self.chunks.release(chunk);
                    break;
                }
            }
        }
    }

    fn write(&mut self, queue: &OwnedFd, chunk: u32, start: usize, length: usize) {
        let bytes = self.chunks.bytes(chunk, start, length);
        match rustix::io::write(queue, bytes) {
            Ok(_) => self.counts.transmitted += 1,
            Err(_) => self.counts.refused += 1,
        }
        self.chunks.release(chunk);
    }
}

/// The packet in a buffer into which the kernel wrote `received` bytes after the headroom.
fn frame_of(chunks: &mut Chunks, chunk: u32, received: usize) -> Option<(Frame, VnetHeader)> {
    let length = received.checked_sub(VNET_LENGTH)?;
    let header = chunks.bytes(chunk, HEADROOM, VNET_LENGTH);
    let vnet = VnetHeader::read_from_bytes(header).ok()?;
    Some((frame_in(chunk, length)?, vnet))
}

fn frame_in(chunk: u32, length: usize) -> Option<Frame> {
    let length = u32::try_from(length).ok()?;
    Some(Frame {
        chunk,
        offset: FRAME_OFFSET,
        length,
    })
}

const VNET_LENGTH: usize = size_of::<VnetHeader>();
const HEADROOM: usize = 64;
const FRAME_OFFSET: u32 = 74;
const _: () = assert!(FRAME_OFFSET as usize == HEADROOM + VNET_LENGTH);
/// 64 KiB and the headers. Not a multiple of 4096, so that the packets' first lines do not all fall
/// into the same cache sets.
const STRIDE: usize = 65_536 + 192;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testbed::{
        PacketSocket, constant_filter, in_namespace, refuse_io_uring, wait_for,
    };

    fn create(io: IoPreference) -> (HostPortDevice, HostPort) {
        let config = HostPortConfig {
            io,
            ..HostPortConfig::default()
        };
        let mut device = HostPortDevice::create(config).expect("root and /dev/net/tun");
        let port = device.take_ports().expect("memory for buffers").remove(0);
        let wanted = match io {
            IoPreference::Uring => IoKind::Uring,
            IoPreference::ReadWrite => IoKind::ReadWrite,
        };
        assert_eq!(port.io(), wanted, "{:?}", port.fallback());
        (device, port)
    }

    fn both(test: impl Fn(IoPreference) + Copy + Send + 'static) {
        in_namespace(move || test(IoPreference::ReadWrite));
        in_namespace(move || test(IoPreference::Uring));
    }

    /// Ethernet, IPv4 and TCP headers with a partial checksum in front of `payload` bytes.
    fn segment(payload: usize) -> Vec<u8> {
        let total = u16::try_from(payload + 40).expect("fits an IPv4 packet");
        let mut frame = vec![6, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
        frame.extend_from_slice(&total.to_be_bytes());
        frame.extend_from_slice(&[0, 1, 0x40, 0, 64, 6, 0, 0]);
        frame.extend_from_slice(&[192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend_from_slice(&[0x9c, 0x40, 0, 80, 0, 0, 0, 1, 0, 0, 0, 1, 0x50, 0x10]);
        frame.extend_from_slice(&[1, 0, 0, 0, 0, 0]);
        frame.resize(frame.len() + payload, 0xab);
        frame
    }

    const SUPER: VnetHeader = VnetHeader {
        flags: VnetHeader::NEEDS_CSUM,
        gso_type: 1,
        header_length: 54,
        gso_size: 1448,
        checksum_start: 34,
        checksum_offset: 16,
    };

    /// The next `count` packets of IPv4; the kernel may send others by itself.
    fn receive_all(port: &mut HostPort, count: usize) -> Batch {
        let (mut batch, mut wanted) = (Batch::new(), Batch::new());
        wait_for("packets at the host port", || {
            port.receive(&mut batch);
            for (frame, vnet) in batch.drain(..) {
                if port.bytes(&frame).get(12..14) == Some(&[8, 0]) {
                    wanted.push((frame, vnet));
                } else {
                    port.free(frame);
                }
            }
            port.flush();
            (wanted.len() >= count).then_some(())
        });
        wanted
    }

    fn receive(port: &mut HostPort) -> (Frame, VnetHeader) {
        receive_all(port, 1).remove(0)
    }

    fn watch(socket: &PacketSocket, wanted: &[u8]) -> VnetHeader {
        wait_for("the frame at the device", || {
            let (vnet, frame) = socket.receive()?;
            (frame == wanted).then_some(VnetHeader::read_from_bytes(&vnet).ok()?)
        })
    }

    #[test]
    fn a_super_packet_arrives_whole_with_its_vnet_header() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            let frame = segment(40_000);
            socket.send(&zerocopy::transmute!(SUPER), &frame);

            let (received, vnet) = receive(&mut port);
            assert_eq!(port.bytes(&received), &frame[..]);
            assert_eq!(vnet.gso_type & 0x7f, 1);
            assert_eq!({ vnet.gso_size }, 1448);
            assert!(vnet.is_partial() && vnet.is_super_packet());
            port.free(received);
            assert_eq!(port.held(), 0);
        });
    }

    #[test]
    fn a_received_super_packet_goes_back_out_from_its_own_buffer() {
        both(|io| {
            let (device, mut port) = create(io);
            PacketSocket::open(device.name()).send(&zerocopy::transmute!(SUPER), &segment(40_000));
            let (received, vnet) = receive(&mut port);
            port.bytes(&received)[33] = 77;
            let expected = port.bytes(&received).to_vec();

            let socket = PacketSocket::open(device.name());
            port.transmit(received, &vnet).expect("there is room");
            port.flush();

            assert_eq!({ watch(&socket, &expected).gso_size }, 1448);
            assert_eq!(port.counts().transmitted, 1);
            assert_eq!((port.counts().refused, port.held()), (0, 0));
        });
    }

    #[test]
    fn a_packet_of_another_memory_is_copied_out() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            let frame = segment(100);
            port.transmit_copy(&frame, &VnetHeader::default())
                .expect("there is room");
            port.flush();
            watch(&socket, &frame);
        });
    }

    #[test]
    fn more_packets_than_buffers_pass_without_a_leak() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            for _ in 0..10 {
                for _ in 0..100 {
                    socket.send(&[0; 10], &segment(10));
                }
                for (frame, vnet) in receive_all(&mut port, 100) {
                    port.transmit(frame, &vnet).expect("there is room");
                }
                port.flush();
            }
            assert_eq!(port.held(), 0);
            assert_eq!(port.counts().transmitted, 1000);
        });
    }

    #[test]
    fn the_descriptor_tells_when_there_is_something_to_receive() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            socket.send(&[0; 10], &segment(10));
            wait_for("the descriptor", || port.is_readable().then_some(()));
            let (frame, _) = receive(&mut port);
            port.free(frame);
        });
    }

    #[test]
    fn plain_calls_serve_where_io_uring_is_refused() {
        in_namespace(|| {
            refuse_io_uring();
            let mut device = HostPortDevice::create(HostPortConfig::default()).expect("root");
            let mut port = device.take_ports().expect("memory for buffers").remove(0);
            assert_eq!(port.io(), IoKind::ReadWrite);
            let reason = port.fallback().and_then(io::Error::raw_os_error);
            assert_eq!(reason, Some(libc::EPERM));
            PacketSocket::open(device.name()).send(&[0; 10], &segment(10));
            let (frame, _) = receive(&mut port);
            port.free(frame);
        });
    }

    #[test]
    fn packets_wait_in_the_device_while_all_buffers_are_held() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            let mut held = Vec::new();
            for round in 0..30 {
                for _ in 0..10 {
                    socket.send(&[0; 10], &segment(10));
                }
                if round < 10 {
                    held.extend(receive_all(&mut port, 10));
                }
            }
            let mut batch = Batch::new();
            while port.receive(&mut batch) > 0 {
                port.flush();
            }
            assert!(held.len() + batch.len() < 300);
            for (frame, _) in held.drain(..).chain(batch.drain(..)) {
                port.free(frame);
            }
            port.flush();
            receive_all(&mut port, 10)
                .drain(..)
                .for_each(|(frame, _)| port.free(frame));
            assert_eq!(port.held(), 0);
            assert!(port.counts().starved > 0);
        });
    }

    #[test]
    fn a_port_works_on_another_thread_than_the_one_that_made_it() {
        both(|io| {
            let (device, mut port) = create(io);
            let socket = PacketSocket::open(device.name());
            std::thread::spawn(move || {
                assert!(!port.is_readable());
                socket.send(&[0; 10], &segment(10));
                let descriptor = port.descriptor().expect("it has one");
                let mut polled = [rustix::event::PollFd::new(
                    &descriptor,
                    rustix::event::PollFlags::IN,
                )];
                let longest = rustix::time::Timespec {
                    tv_sec: 2,
                    tv_nsec: 0,
                };
                let ready = rustix::event::poll(&mut polled, Some(&longest)).expect("poll");
                assert_eq!(ready, 1, "the descriptor tells");
                let (frame, _) = receive(&mut port);
                port.free(frame);
            })
            .join()
            .expect("the thread asserts");
        });
    }

    #[test]
    fn udp_super_packets_cross_whole_too() {
        both(|io| {
            let (device, mut port) = create(io);
            if !device.takes_udp_segmentation() {
                return;
            }
            let socket = PacketSocket::open(device.name());
            let mut frame = segment(4_000);
            frame[23] = 17;
            frame[38..40].copy_from_slice(&4_020_u16.to_be_bytes());
            let vnet = VnetHeader {
                gso_type: 5,
                gso_size: 500,
                header_length: 42,
                checksum_offset: 6,
                ..SUPER
            };
            socket.send(&zerocopy::transmute!(vnet), &frame);
            let (received, vnet) = receive(&mut port);
            assert_eq!(port.bytes(&received).len(), frame.len());
            assert_eq!((vnet.gso_type, { vnet.gso_size }), (5, 500));
            port.bytes(&received)[33] = 77;
            let expected = port.bytes(&received).to_vec();
            let socket = PacketSocket::open(device.name());
            port.transmit(received, &vnet).expect("there is room");
            port.flush();
            assert_eq!({ watch(&socket, &expected).gso_size }, 500);
        });
    }

    #[test]
    fn a_program_chooses_the_queue() {
        both(|io| {
            let mut device = HostPortDevice::create(HostPortConfig {
                queues: 3,
                io,
                ..HostPortConfig::default()
            })
            .expect("root and /dev/net/tun");
            let mut ports = device.take_ports().expect("memory for buffers");
            for queue in [2, 0, 1] {
                let program = constant_filter(queue);
                device.set_steering(program.as_fd()).expect("a filter");
                let socket = PacketSocket::open(device.name());
                for payload in 0..10 {
                    socket.send(&[0; 10], &segment(payload));
                }
                let port = &mut ports[queue as usize];
                for (frame, _) in receive_all(port, 10) {
                    port.free(frame);
                }
            }
        });
    }

    #[test]
    fn a_device_that_somebody_removes_is_a_failure_and_no_endless_loop() {
        both(|io| {
            let (device, mut port) = create(io);
            assert!(!port.is_readable());
            assert!(HostPortDevice::remove(device.name()).expect("root"));
            let mut batch = Batch::new();
            wait_for("the failure", || {
                port.receive(&mut batch);
                port.flush();
                port.failure().map(drop)
            });
            assert!(!port.is_readable());
            assert_eq!(port.receive(&mut batch), 0);
            port.transmit_copy(&segment(10), &VnetHeader::default())
                .expect("it is refused later");
            wait_for("the refusal", || {
                port.flush();
                (port.counts().refused == 1).then_some(())
            });
            assert_eq!(port.held(), 0);
        });
    }
}
