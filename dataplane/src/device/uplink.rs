//! The uplink: the queues of one NIC that a worker serves, each through an AF_XDP socket.
//!
//! All sockets of an `Uplink` share one memory of 4 kB chunks, so a packet leaves without a copy by
//! the queue it came by. It attaches no program and fills no map: the steering puts the sockets into
//! `xsks`. A packet that the NIC must segment or checksum cannot be sent here: the vnet header is
//! ignored, and whoever sends has completed the checksum. Rule to keep: a chunk is in exactly one
//! place (`sys::xsk`), and every path returns it.

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll;

use super::{BATCH, Batch, Device, DeviceReport, Frame, Full, VnetHeader};
use crate::sys::ethtool;
use crate::sys::xsk::{CHUNK_ROOM, CopyMode, Memory, Socket};
use crate::time::{Clock, Duration, Instant, MonotonicClock};

/// What `sluice.engine.xdp` says.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum XdpPreference {
    /// Zero copy, and the kernel's copy where the driver has none.
    #[default]
    Auto,
    /// Zero copy or nothing.
    ZeroCopy,
    /// The kernel copies.
    Copy,
    /// The kernel copies, and the program runs outside the driver.
    Generic,
}

/// How packets come and go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UplinkMode {
    /// The NIC reads and writes our memory.
    ZeroCopy,
    /// The driver runs the program, the kernel copies.
    Copy,
    /// The program runs outside the driver, the kernel copies.
    Generic,
}

impl UplinkMode {
    /// The word that `status` and metrics show.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::ZeroCopy => "zerocopy",
            Self::Copy => "copy",
            Self::Generic => "generic",
        }
    }
}

/// Which queues of which device a worker serves.
#[derive(Clone, Debug)]
pub struct UplinkConfig {
    /// Name of the device.
    pub device: String,
    /// The queues, at least one.
    pub queues: Vec<u32>,
    /// How to bind.
    pub xdp: XdpPreference,
    /// Entries of each ring, a power of two; twice as many chunks belong to each queue.
    pub ring_size: u32,
}

/// Why an uplink cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum UplinkError {
    /// The kernel asks for a privilege.
    #[error(
        "AF_XDP on {device} needs CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF and CAP_IPC_LOCK: {source}"
    )]
    NotPermitted {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device is not there.
    #[error("there is no network device {device}")]
    NoDevice {
        /// The device.
        device: String,
    },
    /// Another AF_XDP socket has the queue.
    #[error("queue {queue} of {device} is in use by another AF_XDP socket")]
    InUse {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
    },
    /// The driver cannot do what was demanded.
    #[error("{device} cannot do zero copy: {source}; set `engine.xdp` to auto or copy")]
    NoZeroCopy {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Any other refusal.
    #[error("queue {queue} of {device} cannot be bound: {source}")]
    Bind {
        /// The device.
        device: String,
        /// The queue.
        queue: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// There is no memory for the packets.
    #[error("no memory for the packets of {device}: {source}")]
    Memory {
        /// The device.
        device: String,
        /// What the kernel said.
        source: io::Error,
    },
}

/// What went through an uplink's queues of one worker.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkCounts {
    /// Packets received.
    pub received: u64,
    /// Packets queued for sending.
    pub transmitted: u64,
    /// Packets that found no room.
    pub full: u64,
}

/// What the kernel counted on the same sockets (`XDP_STATISTICS`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct UplinkStatistics {
    /// Packets dropped because we were slow to receive.
    pub ring_full: u64,
    /// Packets dropped because no chunk was given to receive into.
    pub fill_empty: u64,
    /// Packets dropped for other reasons.
    pub dropped: u64,
    /// Descriptors that the kernel refused.
    pub invalid: u64,
}

/// A worker's queues of one device.
#[derive(Debug)]
pub struct Uplink {
    queues: Vec<Queue>,
    memory: Memory,
    came_by: Vec<u16>,
    turn: usize,
    mode: UplinkMode,
    readiness: Option<OwnedFd>,
    counts: UplinkCounts,
}

#[derive(Debug)]
struct Queue {
    number: u32,
    socket: Socket,
    unsent: bool,
}

impl Uplink {
    /// Binds a socket to each queue and gives it chunks to receive into.
    ///
    /// A queue whose owner has just died stays busy for up to 0.8 s; it is tried for two.
    ///
    /// # Errors
    /// A missing device or privilege, a queue in use, a driver without zero copy where it is
    /// demanded.
    pub fn open(config: &UplinkConfig) -> Result<Self, UplinkError> {
        let device = &config.device;
        let memory_error = |source| memory_error(device, source);
        let queues = u32::try_from(config.queues.len()).unwrap_or(u32::MAX);
        let count = NonZeroU32::new(config.ring_size.saturating_mul(2).saturating_mul(queues))
            .ok_or_else(|| memory_error(io::Error::from_raw_os_error(libc::EINVAL)))?;
        let memory = Memory::new(count, config.ring_size).map_err(memory_error)?;
        let deadline = MonotonicClock.now() + BUSY;
        let mut queues = Vec::with_capacity(config.queues.len());
        let mut mode = None;
        for &number in &config.queues {
            let socket = match mode {
                None => bind_first(&memory, config, number, deadline)?,
                Some(mode) => bind(&memory, device, number, mode, deadline)
                    .map_err(|e| bind_error(device, number, e))?,
            };
            mode = Some(socket.mode());
            queues.push(Queue {
                number,
                socket,
                unsent: false,
            });
        }
        let mut uplink = Self {
            came_by: vec![0; memory.count()],
            mode: match (config.xdp, mode) {
                (XdpPreference::Generic, _) => UplinkMode::Generic,
                (_, Some(CopyMode::ZeroCopy)) => UplinkMode::ZeroCopy,
                _ => UplinkMode::Copy,
            },
            readiness: readiness(&queues).map_err(memory_error)?,
            queues,
            memory,
            turn: 0,
            counts: UplinkCounts::default(),
        };
        uplink.refill();
        Ok(uplink)
    }

    /// The sockets with their queues' numbers, for the map `xsks`.
    pub fn sockets(&self) -> impl Iterator<Item = (u32, BorrowedFd<'_>)> {
        self.queues
            .iter()
            .map(|queue| (queue.number, queue.socket.descriptor()))
    }

    /// How packets come and go.
    #[must_use]
    pub const fn mode(&self) -> UplinkMode {
        self.mode
    }

    /// What went through.
    #[must_use]
    pub const fn counts(&self) -> UplinkCounts {
        self.counts
    }

    /// What the kernel counted, over all queues.
    #[must_use]
    pub fn statistics(&self) -> UplinkStatistics {
        let mut sum = UplinkStatistics {
            invalid: self.memory.strays(),
            ..UplinkStatistics::default()
        };
        for queue in &self.queues {
            let kernel = queue.socket.statistics().unwrap_or_default();
            sum.ring_full += kernel.ring_full;
            sum.fill_empty += kernel.fill_empty;
            sum.dropped += kernel.dropped;
            sum.invalid += kernel.invalid;
        }
        sum
    }

    /// How many chunks are out as `Frame`s.
    #[must_use]
    pub fn held(&self) -> usize {
        self.memory.held()
    }

    /// Bytes of packet memory, all of them locked.
    #[must_use]
    pub const fn locked_bytes(&self) -> usize {
        self.memory.count() * crate::sys::xsk::CHUNK_SIZE as usize
    }

    fn queue(&mut self, chunk: u32) -> Result<(), Full> {
        let index = usize::from(self.came_by[chunk as usize]);
        let queue = &mut self.queues[index];
        if !queue.socket.send(&mut self.memory, chunk) {
            self.memory.release(chunk);
            self.counts.full += 1;
            return Err(Full);
        }
        queue.unsent = true;
        self.counts.transmitted += 1;
        Ok(())
    }

    /// A part of the chunks is kept from the fill rings: packets of other memories are copied there.
    fn refill(&mut self) {
        let keep = self.memory.count() / 4;
        for queue in &mut self.queues {
            queue.socket.refill(&mut self.memory, keep);
        }
    }
}

impl Device for Uplink {
    fn receive(&mut self, batch: &mut Batch) -> usize {
        let before = batch.len();
        for step in 0..self.queues.len() {
            let index = (self.turn + step) % self.queues.len();
            let room = BATCH - (batch.len() - before);
            let number = u16::try_from(index).unwrap_or(0);
            let came_by = &mut self.came_by;
            let take = |chunk: u32, length| {
                came_by[chunk as usize] = number;
                let frame = Frame {
                    chunk,
                    offset: 0,
                    length,
                };
                batch.push((frame, VnetHeader::default()));
            };
            self.queues[index]
                .socket
                .receive(&mut self.memory, room, take);
        }
        self.turn = self.turn.wrapping_add(1);
        let count = batch.len() - before;
        self.counts.received += count as u64;
        count
    }

    fn bytes<'a>(&'a mut self, frame: &'a Frame) -> &'a mut [u8] {
        self.memory.bytes(frame.chunk)
    }

    fn transmit(&mut self, frame: Frame, _vnet: &VnetHeader) -> Result<(), Full> {
        self.queue(frame.chunk)
    }

    fn transmit_copy(&mut self, bytes: &[u8], _vnet: &VnetHeader) -> Result<(), Full> {
        if bytes.len() > CHUNK_ROOM {
            self.counts.full += 1;
            return Err(Full);
        }
        let Some(chunk) = self.memory.acquire() else {
            self.counts.full += 1;
            return Err(Full);
        };
        self.came_by[chunk as usize] = 0;
        if !self.memory.fill(chunk, bytes) {
            self.memory.release(chunk);
            return Err(Full);
        }
        self.queue(chunk)
    }

    fn free(&mut self, frame: Frame) {
        self.memory.release(frame.chunk);
    }

    fn flush(&mut self) {
        for queue in &mut self.queues {
            if queue.unsent {
                queue.unsent = queue.socket.flush(&self.memory);
            }
            queue.socket.reap(&mut self.memory);
        }
        self.refill();
    }

    fn report(&self) -> DeviceReport {
        let kernel = self.statistics();
        DeviceReport {
            received: self.counts.received,
            transmitted: self.counts.transmitted,
            completions: 0,
            dropped: kernel.ring_full + kernel.fill_empty + kernel.dropped,
            refused: self.counts.full + kernel.invalid,
        }
    }

    fn is_readable(&mut self) -> bool {
        self.queues
            .iter_mut()
            .any(|queue| queue.socket.is_readable())
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        match &self.readiness {
            Some(epoll) => Some(epoll.as_fd()),
            None => self.queues.first().map(|queue| queue.socket.descriptor()),
        }
    }
}

/// How many receive queues a device has; each needs a socket.
///
/// # Errors
/// The device does not exist.
pub fn receive_queues(device: &str) -> io::Result<u32> {
    ethtool::receive_queues(device)
}

/// The largest ring for which all queues of all workers together keep to 128 MiB.
#[must_use]
pub const fn ring_size_for(queues: u32) -> u32 {
    let budget = 128 * 1024 * 1024 / (2 * crate::sys::xsk::CHUNK_SIZE);
    let mut size = 2048;
    while size > 64 && size * queues > budget {
        size /= 2;
    }
    size
}

fn bind_first(
    memory: &Memory,
    config: &UplinkConfig,
    queue: u32,
    deadline: Instant,
) -> Result<Socket, UplinkError> {
    let device = &config.device;
    let bind = |mode| bind(memory, device, queue, mode, deadline);
    match config.xdp {
        XdpPreference::Auto => bind(CopyMode::ZeroCopy).or_else(|_| bind(CopyMode::Copy)),
        XdpPreference::ZeroCopy => bind(CopyMode::ZeroCopy),
        XdpPreference::Copy | XdpPreference::Generic => bind(CopyMode::Copy),
    }
    .map_err(|source| match source.raw_os_error() {
        Some(libc::EOPNOTSUPP | libc::EINVAL) if config.xdp == XdpPreference::ZeroCopy => {
            UplinkError::NoZeroCopy {
                device: device.clone(),
                source,
            }
        }
        _ => bind_error(device, queue, source),
    })
}

fn bind(
    memory: &Memory,
    device: &str,
    queue: u32,
    mode: CopyMode,
    deadline: Instant,
) -> io::Result<Socket> {
    loop {
        match Socket::bind(memory, device, queue, mode) {
            Err(error)
                if error.raw_os_error() == Some(libc::EBUSY) && MonotonicClock.now() < deadline =>
            {
                super::pause(Duration::from_millis(10));
            }
            outcome => return outcome,
        }
    }
}

fn bind_error(device: &str, queue: u32, source: io::Error) -> UplinkError {
    let device = device.to_owned();
    match source.raw_os_error() {
        Some(libc::EBUSY) => UplinkError::InUse { device, queue },
        Some(libc::ENODEV) => UplinkError::NoDevice { device },
        Some(libc::EPERM) => UplinkError::NotPermitted { device, source },
        _ => UplinkError::Bind {
            device,
            queue,
            source,
        },
    }
}

fn memory_error(device: &str, source: io::Error) -> UplinkError {
    let device = device.to_owned();
    match source.raw_os_error() {
        Some(libc::EPERM) => UplinkError::NotPermitted { device, source },
        _ => UplinkError::Memory { device, source },
    }
}

/// One descriptor for several sockets.
fn readiness(queues: &[Queue]) -> io::Result<Option<OwnedFd>> {
    if queues.len() < 2 {
        return Ok(None);
    }
    let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    for queue in queues {
        epoll::add(
            &epoll,
            queue.socket.descriptor(),
            epoll::EventData::new_u64(0),
            epoll::EventFlags::IN,
        )?;
    }
    Ok(Some(epoll))
}

const BUSY: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testbed::{PacketSocket, RedirectProgram, in_namespace, ip, wait_for};

    fn config(queues: &[u32]) -> UplinkConfig {
        UplinkConfig {
            device: "v0".to_owned(),
            queues: queues.to_vec(),
            xdp: XdpPreference::Auto,
            ring_size: 128,
        }
    }

    /// A veth with as many queues at the near end, its program redirecting, and a raw socket at the
    /// far end.
    fn open(queues: &[u32]) -> (Uplink, RedirectProgram, PacketSocket) {
        let count = queues.len();
        ip(&format!(
            "link add v0 numrxqueues {count} numtxqueues {count} type veth peer name v1 numtxqueues {count} numrxqueues {count}"
        ));
        ip("link set v0 up addrgenmode none");
        ip("link set v1 up addrgenmode none");
        let uplink = Uplink::open(&config(queues)).expect("root and a queue");
        let program = RedirectProgram::attach("v0", uplink.sockets());
        (uplink, program, PacketSocket::open("v1"))
    }

    /// A UDP packet of the flow with this number.
    fn frame(flow: u16, payload: usize) -> Vec<u8> {
        let mut frame = vec![2, 0, 0, 0, 0, 9, 2, 0, 0, 0, 0, 1, 8, 0, 0x45, 0];
        let total = u16::try_from(28 + payload).expect("fits an IPv4 packet");
        frame.extend_from_slice(&total.to_be_bytes());
        frame.extend_from_slice(&[0, 1, 0x40, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2]);
        frame.extend_from_slice(&flow.to_be_bytes());
        frame.extend_from_slice(&[0, 80]);
        frame.extend_from_slice(&(total - 20).to_be_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.resize(frame.len() + payload, 0xcd);
        frame
    }

    /// Receives `count` frames that `frame` made; others are freed.
    fn receive(uplink: &mut Uplink, count: usize) -> Vec<Frame> {
        let (mut batch, mut wanted) = (Batch::new(), Vec::new());
        wait_for("frames at the uplink", || {
            uplink.receive(&mut batch);
            for (frame, _) in batch.drain(..) {
                if uplink.bytes(&frame).get(12..14) == Some(&[8, 0]) {
                    wanted.push(frame);
                } else {
                    uplink.free(frame);
                }
            }
            uplink.flush();
            (wanted.len() >= count).then_some(())
        });
        wanted
    }

    fn watch(socket: &PacketSocket, wanted: &[u8]) {
        wait_for("the frame at the far end", || {
            (socket.receive()?.1 == wanted).then_some(())
        });
    }

    #[test]
    fn a_frame_comes_in_and_leaves_again_without_a_copy() {
        in_namespace(|| {
            let (mut uplink, _program, far) = open(&[0]);
            assert_eq!(uplink.mode(), UplinkMode::Copy);
            far.send(&[0; 10], &frame(7, 100));
            let received = receive(&mut uplink, 1).remove(0);
            assert_eq!(uplink.bytes(&received), &frame(7, 100)[..]);
            uplink.bytes(&received)[11] = 0x77;
            let expected = uplink.bytes(&received).to_vec();
            uplink
                .transmit(received, &VnetHeader::default())
                .expect("there is room");
            uplink.flush();
            watch(&far, &expected);
            assert_eq!(uplink.held(), 0);
            assert_eq!(uplink.counts().transmitted, 1);
            assert_eq!(uplink.statistics(), UplinkStatistics::default());
        });
    }

    #[test]
    fn a_packet_of_another_memory_is_copied_out() {
        in_namespace(|| {
            let (mut uplink, _program, far) = open(&[0]);
            let bytes = frame(7, 1400);
            uplink
                .transmit_copy(&bytes, &VnetHeader::default())
                .expect("there is room");
            uplink.flush();
            watch(&far, &bytes);
            let large = vec![0; CHUNK_ROOM + 1];
            assert_eq!(
                uplink.transmit_copy(&large, &VnetHeader::default()),
                Err(Full)
            );
            assert_eq!(uplink.held(), 0);
        });
    }

    #[test]
    fn every_queue_is_received_from_and_no_chunk_leaks() {
        in_namespace(|| {
            let (mut uplink, _program, far) = open(&[0, 1, 2]);
            let mut by_queue = [0; 3];
            for round in 0..20 {
                for flow in 0..50 {
                    far.send(&[0; 10], &frame(round * 50 + flow, 20));
                }
                for frame in receive(&mut uplink, 50) {
                    by_queue[usize::from(uplink.came_by[frame.chunk as usize])] += 1;
                    uplink
                        .transmit(frame, &VnetHeader::default())
                        .expect("there is room");
                }
                uplink.flush();
            }
            assert!(by_queue.iter().all(|&n| n > 0), "{by_queue:?}");
            assert_eq!(by_queue.iter().sum::<u32>(), 1000);
            assert_eq!(uplink.held(), 0);
            assert_eq!(uplink.statistics(), UplinkStatistics::default());
        });
    }

    #[test]
    fn a_batch_larger_than_the_kernel_sends_at_once_leaves_in_one_flush() {
        in_namespace(|| {
            let (mut uplink, _program, far) = open(&[0]);
            for flow in 0..100 {
                uplink
                    .transmit_copy(&frame(flow, 20), &VnetHeader::default())
                    .expect("there is room");
            }
            uplink.flush();
            for flow in 0..100 {
                watch(&far, &frame(flow, 20));
            }
        });
    }

    #[test]
    fn what_a_device_that_is_down_could_not_send_leaves_later() {
        in_namespace(|| {
            let (mut uplink, _program, far) = open(&[0]);
            ip("link set v0 down");
            uplink
                .transmit_copy(&frame(7, 20), &VnetHeader::default())
                .expect("there is room");
            uplink.flush();
            ip("link set v0 up");
            uplink.flush();
            watch(&far, &frame(7, 20));
        });
    }

    #[test]
    fn a_full_ring_frees_the_frame() {
        in_namespace(|| {
            let (mut uplink, _program, _far) = open(&[0]);
            let (mut sent, mut full) = (0, 0);
            for flow in 0..300 {
                match uplink.transmit_copy(&frame(flow, 20), &VnetHeader::default()) {
                    Ok(()) => sent += 1,
                    Err(Full) => full += 1,
                }
            }
            assert_eq!((sent, full), (128, 172));
            assert_eq!(uplink.counts().full, 172);
            assert_eq!(uplink.held(), 0);
        });
    }

    #[test]
    fn the_descriptor_tells_when_there_is_something_to_receive() {
        in_namespace(|| {
            for queues in [&[0][..], &[0, 1][..]] {
                let (mut uplink, program, far) = open(queues);
                let is_ready = |uplink: &Uplink| {
                    let descriptor = uplink.descriptor().expect("it has a socket");
                    let flags = rustix::event::PollFlags::IN;
                    let mut polled = [rustix::event::PollFd::new(&descriptor, flags)];
                    let now = rustix::time::Timespec::default();
                    rustix::event::poll(&mut polled, Some(&now)).expect("poll") > 0
                };
                assert!(!is_ready(&uplink) && !uplink.is_readable());
                far.send(&[0; 10], &frame(7, 20));
                wait_for("the descriptor", || is_ready(&uplink).then_some(()));
                assert!(uplink.is_readable());
                for frame in receive(&mut uplink, 1) {
                    uplink.free(frame);
                }
                assert!(!is_ready(&uplink));
                drop((uplink, program, far));
                ip("link del v0");
            }
        });
    }

    #[test]
    fn refusals_say_what_is_wrong() {
        in_namespace(|| {
            let missing = Uplink::open(&config(&[0]));
            assert!(matches!(missing, Err(UplinkError::NoDevice { .. })));
            let (owner, _program, _far) = open(&[0]);
            let taken = Uplink::open(&config(&[0]));
            assert!(matches!(taken, Err(UplinkError::InUse { queue: 0, .. })));
            let beyond = Uplink::open(&config(&[1]));
            assert!(matches!(beyond, Err(UplinkError::Bind { queue: 1, .. })));
            drop(owner);
            let zero_copy = Uplink::open(&UplinkConfig {
                xdp: XdpPreference::ZeroCopy,
                ..config(&[0])
            });
            assert!(matches!(zero_copy, Err(UplinkError::NoZeroCopy { .. })));
            Uplink::open(&config(&[0])).expect("the queue is free again");
        });
    }

    #[test]
    fn many_queues_get_smaller_rings() {
        assert_eq!(ring_size_for(1), 2048);
        assert_eq!(ring_size_for(8), 2048);
        assert_eq!(ring_size_for(64), 256);
        assert_eq!(ring_size_for(1000), 64);
    }
}
