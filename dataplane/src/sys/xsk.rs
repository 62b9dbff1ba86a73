//! AF_XDP sockets over memory that several of them share (`xsk-rs`, libxdp's own program left out).
//!
//! The contract: a chunk is in exactly one place: the free list, one owner in this process (`Held`),
//! or one of the kernel's rings. Every unsafe call of `xsk-rs` asks for just that; `Memory` keeps
//! the place of each chunk and refuses a move from the wrong one, so the calls below are safe in any
//! order. What the kernel hands back that it was never given is counted and left alone.
//!
//! ```text
//!   free --refill--> fill ring --(packet)--> rx ring --receive--> held --release--> free
//!                                                                 held --send--> tx ring
//!   free --acquire--> held                          completion ring --reap--> free
//! ```

use std::io;
use std::num::NonZeroU32;
use std::os::fd::{AsRawFd, BorrowedFd};

use xsk_rs::config::{
    BindFlags, FrameSize, Interface, LibxdpFlags, QueueSize, SocketConfig, UmemConfig,
};
use xsk_rs::umem::frame::FrameDesc;
use xsk_rs::{CompQueue, FillQueue, RxQueue, TxQueue, Umem};

/// Bytes of one chunk: a page, as every driver with zero copy wants it.
pub(crate) const CHUNK_SIZE: u32 = 4096;
/// Bytes of a chunk that a packet to be sent can fill; the kernel reserves the rest in front.
pub(crate) const CHUNK_ROOM: usize = CHUNK_SIZE as usize - 256;

/// Whether the NIC reads and writes the chunks itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum CopyMode {
    /// It does.
    ZeroCopy,
    /// The kernel copies.
    Copy,
}

/// The memory of one or several sockets.
#[derive(Debug)]
pub(crate) struct Memory {
    umem: Umem,
    ring_size: u32,
    chunks: Vec<Chunk>,
    free: Vec<u32>,
    strays: u64,
}

#[derive(Debug)]
struct Chunk {
    descriptor: FrameDesc,
    place: Place,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Free,
    Held,
    Kernel,
}

impl Memory {
    /// `count` chunks; each of a socket's four rings will have `ring_size` entries (a power of two).
    pub(crate) fn new(count: NonZeroU32, ring_size: u32) -> io::Result<Self> {
        let size = QueueSize::new(ring_size).map_err(invalid)?;
        let config = UmemConfig::builder()
            .frame_size(FrameSize::new(CHUNK_SIZE).map_err(invalid)?)
            .fill_queue_size(size)
            .comp_queue_size(size)
            .build()
            .map_err(invalid)?;
        let (umem, descriptors) = Umem::new(config, count, false).map_err(kernel_error)?;
        let chunks = descriptors
            .into_iter()
            .map(|descriptor| Chunk {
                descriptor,
                place: Place::Free,
            })
            .collect();
        Ok(Self {
            umem,
            ring_size,
            chunks,
            free: (0..count.get()).rev().collect(),
            strays: 0,
        })
    }

    /// Takes a chunk out of the free list; it is held then.
    pub(crate) fn acquire(&mut self) -> Option<u32> {
        let chunk = self.free.pop()?;
        self.moved(chunk, Place::Free, Place::Held)?;
        Some(chunk)
    }

    /// Puts a held chunk into the free list.
    pub(crate) fn release(&mut self, chunk: u32) {
        if self.moved(chunk, Place::Held, Place::Free).is_some() {
            self.free.push(chunk);
        }
    }

    /// Fills a held chunk; false if it is not held or the bytes do not fit.
    pub(crate) fn fill(&mut self, chunk: u32, bytes: &[u8]) -> bool {
        let Some(entry) = self.chunks.get_mut(chunk as usize) else {
            return false;
        };
        if entry.place != Place::Held || bytes.len() > CHUNK_ROOM {
            return false;
        }
        // SAFETY: the descriptor is one that this UMEM gave out or received into, and the chunk is
        // held: neither the kernel nor another reference uses its memory.
        let mut data = unsafe { self.umem.data_mut(&mut entry.descriptor) };
        let mut cursor = data.cursor();
        cursor.set_pos(0);
        io::Write::write_all(&mut cursor, bytes).is_ok()
    }

    /// The packet in a held chunk; empty if it is not held.
    pub(crate) fn bytes(&mut self, chunk: u32) -> &mut [u8] {
        let Some(entry) = self.chunks.get_mut(chunk as usize) else {
            return &mut [];
        };
        if entry.place != Place::Held {
            return &mut [];
        }
        // SAFETY: as in `fill`.
        let mut data = unsafe { self.umem.data_mut(&mut entry.descriptor) };
        let contents = data.contents_mut();
        let (address, length) = (contents.as_mut_ptr(), contents.len());
        // SAFETY: these are the bytes that `contents` borrows, for which `data` names the borrow of
        // `self` as lifetime; `data` itself is gone after this line, so the reference is the only one.
        unsafe { std::slice::from_raw_parts_mut(address, length) }
    }

    /// How many there are.
    pub(crate) const fn count(&self) -> usize {
        self.chunks.len()
    }

    /// How many are held by this process.
    pub(crate) fn held(&self) -> usize {
        let held = |chunk: &&Chunk| chunk.place == Place::Held;
        self.chunks.iter().filter(held).count()
    }

    /// Chunks that the kernel returned without having been given them; zero unless it is broken.
    pub(crate) const fn strays(&self) -> u64 {
        self.strays
    }

    fn moved(&mut self, chunk: u32, from: Place, to: Place) -> Option<FrameDesc> {
        let entry = self.chunks.get_mut(chunk as usize)?;
        if entry.place != from {
            return None;
        }
        entry.place = to;
        Some(entry.descriptor)
    }

    /// The chunk behind a descriptor that came out of a ring.
    fn returned(&mut self, descriptor: &FrameDesc, to: Place) -> Option<u32> {
        let chunk = u32::try_from(descriptor.addr() / CHUNK_SIZE as usize).ok();
        let chunk = chunk.filter(|&chunk| self.moved(chunk, Place::Kernel, to).is_some());
        self.strays += u64::from(chunk.is_none());
        chunk
    }
}

/// One AF_XDP socket: one queue of one device.
#[derive(Debug)]
pub(crate) struct Socket {
    rx: RxQueue,
    tx: TxQueue,
    fill: FillQueue,
    completion: CompQueue,
    mode: CopyMode,
    batch: [FrameDesc; BATCH],
}

impl Socket {
    /// Binds to a queue. For the first socket of a memory `mode` is asked for; the others share the
    /// first one's.
    pub(crate) fn bind(
        memory: &Memory,
        device: &str,
        queue: u32,
        mode: CopyMode,
    ) -> io::Result<Self> {
        let ring_size = QueueSize::new(memory.ring_size).map_err(invalid)?;
        let wanted = match mode {
            CopyMode::ZeroCopy => BindFlags::XDP_ZEROCOPY,
            CopyMode::Copy => BindFlags::XDP_COPY,
        };
        let config = SocketConfig::builder()
            .rx_queue_size(ring_size)
            .tx_queue_size(ring_size)
            .libxdp_flags(LibxdpFlags::XSK_LIBXDP_FLAGS_INHIBIT_PROG_LOAD)
            .bind_flags(wanted | BindFlags::XDP_USE_NEED_WAKEUP)
            .build();
        let interface: Interface = device.parse().map_err(invalid)?;
        // SAFETY: asks that no program be loaded where the queue is bound already by this UMEM: none
        // ever is, the flag above says so.
        let bound = unsafe { xsk_rs::Socket::new(config, &memory.umem, &interface, queue) };
        let (tx, rx, rings) = bound.map_err(kernel_error)?;
        let (fill, completion) = rings.ok_or_else(|| io::Error::from(io::ErrorKind::AddrInUse))?;
        let descriptor = rx.fd().as_raw_fd();
        // Since 6.17 the kernel sends more than 32 packets a call if asked to. Older ones refuse,
        // and `flush` calls again.
        let _ = set_option(descriptor, XDP_MAX_TX_SKB_BUDGET, memory.ring_size.min(256));
        let options = option(descriptor, XDP_OPTIONS)?;
        let mode = if options & XDP_OPTIONS_ZEROCOPY == 0 {
            CopyMode::Copy
        } else {
            CopyMode::ZeroCopy
        };
        Ok(Self {
            rx,
            tx,
            fill,
            completion,
            mode,
            batch: [FrameDesc::default(); BATCH],
        })
    }

    /// Takes up to `limit` received packets: chunk and length of each go to `take`, and the chunks
    /// are held.
    pub(crate) fn receive(
        &mut self,
        memory: &mut Memory,
        limit: usize,
        mut take: impl FnMut(u32, u32),
    ) {
        let batch = &mut self.batch[..limit.min(BATCH)];
        // SAFETY: asks that the descriptors belong to the UMEM of this queue: they are overwritten
        // with such ones before they are used.
        let count = unsafe { self.rx.consume(batch) };
        for descriptor in &batch[..count] {
            let length = u32::try_from(descriptor.lengths().data()).unwrap_or(0);
            if let Some(chunk) = memory.returned(descriptor, Place::Held) {
                memory.chunks[chunk as usize].descriptor = *descriptor;
                take(chunk, length);
            }
        }
    }

    /// Gives free chunks to the kernel to receive into, until the ring is full or only `keep` are
    /// left.
    pub(crate) fn refill(&mut self, memory: &mut Memory, keep: usize) {
        loop {
            let room = self.fill.nb_free(64) as usize;
            let spare = memory.free.len().saturating_sub(keep);
            let count = room.min(spare).min(BATCH);
            if count == 0 {
                break;
            }
            for entry in &mut self.batch[..count] {
                let chunk = memory.free.pop();
                let given = chunk.and_then(|c| memory.moved(c, Place::Free, Place::Kernel));
                *entry = given.unwrap_or_default();
            }
            // SAFETY: the frames are of this UMEM, and nobody else uses them: they were in the free
            // list a moment ago and are marked as the kernel's. There is room for all of them.
            unsafe { self.fill.produce(&self.batch[..count]) };
        }
        if self.fill.needs_wakeup() {
            // A poll makes the driver look at the ring. Its failure shows again at the next call.
            let _ = self.fill.wakeup(self.rx.fd_mut(), 0);
        }
    }

    /// Queues a held chunk for sending. False if there is no room; it is still held then.
    pub(crate) fn send(&mut self, memory: &mut Memory, chunk: u32) -> bool {
        let Some(descriptor) = memory.moved(chunk, Place::Held, Place::Kernel) else {
            return false;
        };
        // SAFETY: the frame is of this UMEM, and nobody else uses it: it was held by the caller and
        // is marked as the kernel's now.
        let queued = unsafe { self.tx.produce_one(&descriptor) };
        if queued == 0 {
            memory.moved(chunk, Place::Kernel, Place::Held);
        }
        queued > 0
    }

    /// Makes the kernel send what is queued; whether something is left that it must be asked for
    /// again.
    pub(crate) fn flush(&mut self, memory: &Memory) -> bool {
        if !self.tx.needs_wakeup() {
            return false;
        }
        let mut queued = memory.ring_size - self.tx.nb_free_exact();
        while queued > 0 {
            // In copy mode the call sends at most 32 packets on kernels before 6.17. Errors are the
            // device's (down, busy): what was not sent stays queued.
            let _ = self.tx.wakeup();
            let left = memory.ring_size - self.tx.nb_free_exact();
            if self.mode == CopyMode::ZeroCopy || left >= queued {
                return left > 0;
            }
            queued = left;
        }
        false
    }

    /// Takes back the chunks that the kernel has sent.
    pub(crate) fn reap(&mut self, memory: &mut Memory) {
        loop {
            // SAFETY: as in `receive`.
            let count = unsafe { self.completion.consume(&mut self.batch) };
            for descriptor in &self.batch[..count] {
                if let Some(chunk) = memory.returned(descriptor, Place::Free) {
                    memory.free.push(chunk);
                }
            }
            if count < BATCH {
                break;
            }
        }
    }

    /// Whether a packet waits.
    pub(crate) fn is_readable(&mut self) -> bool {
        self.rx.nb_avail(1) > 0
    }

    /// Whether the NIC reads and writes the chunks itself.
    pub(crate) const fn mode(&self) -> CopyMode {
        self.mode
    }

    /// What the kernel counted: dropped, invalid, ring full, fill ring empty.
    pub(crate) fn statistics(&self) -> io::Result<Statistics> {
        let kernel = self.rx.fd().xdp_statistics()?;
        Ok(Statistics {
            dropped: kernel.rx_dropped(),
            invalid: kernel.rx_invalid_descs() + kernel.tx_invalid_descs(),
            ring_full: kernel.rx_ring_full(),
            fill_empty: kernel.rx_fill_ring_empty_descs(),
        })
    }

    /// The socket, for the map that redirects to it and for waiting.
    pub(crate) fn descriptor(&self) -> BorrowedFd<'_> {
        let descriptor = self.rx.fd().as_raw_fd();
        // SAFETY: the queues keep the socket open, and `self` is borrowed as long as the result.
        unsafe { BorrowedFd::borrow_raw(descriptor) }
    }
}

/// `XDP_STATISTICS` of a socket.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub(crate) struct Statistics {
    /// Packets dropped for other reasons than the next ones.
    pub(crate) dropped: u64,
    /// Descriptors that the kernel refused, of either direction.
    pub(crate) invalid: u64,
    /// Packets dropped because we were slow to receive.
    pub(crate) ring_full: u64,
    /// Packets dropped because no chunk was given to receive into.
    pub(crate) fill_empty: u64,
}

fn option(descriptor: i32, name: i32) -> io::Result<u32> {
    let mut value = 0_u32;
    let mut length = WORD;
    // SAFETY: `value` and `length` outlive the call, and `length` is the size of `value`.
    let result = unsafe {
        libc::getsockopt(
            descriptor,
            libc::SOL_XDP,
            name,
            (&raw mut value).cast(),
            &raw mut length,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

fn set_option(descriptor: i32, name: i32, value: u32) -> io::Result<()> {
    // SAFETY: `value` outlives the call, and the length is its size.
    let result = unsafe {
        libc::setsockopt(
            descriptor,
            libc::SOL_XDP,
            name,
            (&raw const value).cast(),
            WORD,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

fn invalid(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, error)
}

/// The kernel's error number inside an error of `xsk-rs`.
fn kernel_error(error: impl std::error::Error + Send + Sync + 'static) -> io::Error {
    let number = error
        .source()
        .and_then(|source| source.downcast_ref::<io::Error>())
        .and_then(io::Error::raw_os_error);
    number.map_or_else(|| io::Error::other(error), io::Error::from_raw_os_error)
}

/// Entries moved between a ring and us at once.
const BATCH: usize = 64;
/// Length of an option that is one word.
const WORD: libc::socklen_t = 4;
const XDP_OPTIONS: i32 = 8;
const XDP_MAX_TX_SKB_BUDGET: i32 = 9;
const XDP_OPTIONS_ZEROCOPY: u32 = 1;
