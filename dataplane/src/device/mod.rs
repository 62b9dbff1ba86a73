//! The seam to the wire: what a port of a worker can do, and who owns a piece of packet memory.
//!
//! A `Frame` is an index into its device's memory, never a pointer, and cannot be cloned: a chunk is
//! owned by exactly one of the device's free list, one of its rings, or one `Frame`. Bytes are
//! borrowed through the device. Crossing from one device to another copies once
//! (`Device::transmit_copy`); going out of the device it came from copies nothing
//! (`Device::transmit`). A frame begins with its Ethernet header.

pub mod host;
pub mod memory;
pub mod pcap;
pub mod uplink;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// One owned chunk of a device's memory.
#[derive(Debug, PartialEq, Eq)]
pub struct Frame {
    pub(in crate::device) chunk: u32,
    pub(in crate::device) offset: u32,
    pub(in crate::device) length: u32,
}

/// How many frames a port hands over at once.
pub const BATCH: usize = 64;

/// What one call of `Device::receive` brought. Reused by the worker, never reallocated.
pub type Batch = Vec<(Frame, VnetHeader)>;

/// `struct virtio_net_hdr` in the host's byte order (`include/uapi/linux/virtio_net.h`): what a
/// packet of the host port says about checksum and segmentation. All zero: checksum complete,
/// one packet.
#[derive(
    Clone,
    Copy,
    PartialEq,
    Eq,
    Debug,
    Default,
    FromBytes,
    IntoBytes,
    KnownLayout,
    Immutable,
    Unaligned,
)]
#[repr(C, packed)]
pub struct VnetHeader {
    /// `NEEDS_CSUM` (1): the checksum field holds the pseudo-header's sum only.
    pub flags: u8,
    /// 0 none, 1 TCP over IPv4, 3 UDP fragments, 4 TCP over IPv6, 5 UDP segments; 0x80 ECN.
    pub gso_type: u8,
    /// Length of all headers, a hint.
    pub header_length: u16,
    /// Payload bytes of each segment.
    pub gso_size: u16,
    /// Where the checksummed part begins.
    pub checksum_start: u16,
    /// Where the checksum field lies, from there.
    pub checksum_offset: u16,
}

impl VnetHeader {
    /// Value of `flags` when the checksum is partial.
    pub const NEEDS_CSUM: u8 = 1;

    /// Whether the checksum field holds the pseudo-header's sum only.
    #[must_use]
    pub const fn is_partial(&self) -> bool {
        self.flags & Self::NEEDS_CSUM != 0
    }

    /// Whether it stands for several packets on the wire.
    #[must_use]
    pub const fn is_super_packet(&self) -> bool {
        self.gso_type & 0x7f != 0
    }
}

/// The device had no room: the frame was not sent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Full;

/// What went through a device.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceReport {
    /// Packets received.
    pub received: u64,
    /// Packets given to the kernel for sending.
    pub transmitted: u64,
    /// io_uring completions.
    pub completions: u64,
    /// Packets that the kernel had to drop before we saw them.
    pub dropped: u64,
    /// Packets that we could not send.
    pub refused: u64,
}

/// A port of one worker. Only that worker calls it.
pub trait Device {
    /// Takes up to `BATCH` frames that arrived; returns how many were pushed. Does not block.
    fn receive(&mut self, batch: &mut Batch) -> usize;

    /// The frame's bytes, from the Ethernet header on.
    fn bytes<'a>(&'a mut self, frame: &'a Frame) -> &'a mut [u8];

    /// Sends a frame of this device's own memory. When it is full the frame is freed.
    ///
    /// # Errors
    /// `Full` if the ring has no room; the frame is back in the free list then.
    fn transmit(&mut self, frame: Frame, vnet: &VnetHeader) -> Result<(), Full>;

    /// Copies a packet of another memory and sends it.
    ///
    /// # Errors
    /// `Full` if there is no room, or the packet is larger than a chunk.
    fn transmit_copy(&mut self, bytes: &[u8], vnet: &VnetHeader) -> Result<(), Full>;

    /// Returns a frame that goes nowhere.
    fn free(&mut self, frame: Frame);

    /// Makes the kernel look at what was queued: at most one system call a batch. Also reaps what
    /// the kernel finished.
    fn flush(&mut self);

    /// Whether something is there to receive, without taking it: asked once before blocking.
    fn is_readable(&mut self) -> bool;

    /// What went through so far. May make a system call: not for the packet path.
    fn report(&self) -> DeviceReport;

    /// The descriptor that becomes readable when `receive` has something.
    fn descriptor(&self) -> Option<std::os::fd::BorrowedFd<'_>>;
}

/// Waits while a device is set up: there is no worker yet, and nothing else to wait on.
fn pause(duration: crate::time::Duration) {
    let time = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: i64::from(duration.subsec_nanos()),
    };
    // Cut short by a signal, the caller only tries again sooner.
    let _ = rustix::thread::nanosleep(&time);
}
