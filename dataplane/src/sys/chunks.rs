//! Memory cut into equal chunks that are shared with the kernel one by one.
//!
//! The contract: a chunk is in exactly one place: the free list, one owner in this process
//! (`Held`), or the kernel. Its bytes can be borrowed only while it is held, so that no reference
//! exists while the kernel reads or writes it. A chunk that is not where the caller believes is
//! left alone: the calls below then do nothing and say so.

use std::io;
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

/// A mapping and the place of each of its chunks.
#[derive(Debug)]
pub(crate) struct Chunks {
    base: NonNull<u8>,
    length: usize,
    stride: usize,
    places: Vec<Place>,
    free: Vec<u32>,
    stays_mapped: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    Free,
    Held,
    Kernel,
}

// SAFETY: the mapping belongs to this value alone and is not tied to the thread that made it.
unsafe impl Send for Chunks {}

impl Chunks {
    /// `count` chunks of `stride` bytes, zeroed.
    pub(crate) fn new(count: u32, stride: usize) -> io::Result<Self> {
        let length = (count as usize * stride).next_multiple_of(PAGE);
        // SAFETY: a null hint and no MAP_FIXED: no existing mapping is touched.
        let address = unsafe {
            rustix::mm::mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        let base = NonNull::new(address.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self {
            base,
            length,
            stride,
            places: vec![Place::Free; count as usize],
            free: (0..count).rev().collect(),
            stays_mapped: false,
        })
    }

    /// Takes a chunk out of the free list; it is held then.
    pub(crate) fn acquire(&mut self) -> Option<u32> {
        let chunk = self.free.pop()?;
        self.places[chunk as usize] = Place::Held;
        Some(chunk)
    }

    /// Puts a held chunk into the free list.
    pub(crate) fn release(&mut self, chunk: u32) {
        if self.move_from(chunk, Place::Held, Place::Free) {
            self.free.push(chunk);
        }
    }

    /// Gives a held chunk to the kernel and returns its address.
    pub(crate) fn lend(&mut self, chunk: u32) -> Option<*mut u8> {
        self.move_from(chunk, Place::Held, Place::Kernel)
            .then(|| self.address(chunk, 0))
    }

    /// Takes a chunk back that the kernel has finished with; whether it was there.
    pub(crate) fn reclaim(&mut self, chunk: u32) -> bool {
        self.move_from(chunk, Place::Kernel, Place::Held)
    }

    /// A part of a held chunk; empty if it is not held or the part does not lie within it.
    pub(crate) fn bytes(&mut self, chunk: u32, start: usize, length: usize) -> &mut [u8] {
        let held = self.places.get(chunk as usize) == Some(&Place::Held);
        let within = start
            .checked_add(length)
            .is_some_and(|end| end <= self.stride);
        if !held || !within {
            return &mut [];
        }
        let address = self.address(chunk, start);
        // SAFETY: the part lies within the mapping (`chunk` has a place, the part fits the stride),
        // which is initialised and lives as long as `self`; the chunk is held, so the kernel does
        // not use it, and `self` is borrowed exclusively, so no other reference to it exists.
        unsafe { std::slice::from_raw_parts_mut(address, length) }
    }

    /// Address and length of the whole mapping, for registering it with the kernel.
    pub(crate) const fn region(&self) -> (*mut u8, usize) {
        (self.base.as_ptr(), self.length)
    }

    /// Does not unmap on drop: the kernel may still write to it.
    pub(crate) const fn leave_mapped(&mut self) {
        self.stays_mapped = true;
    }

    /// Bytes of a chunk.
    pub(crate) const fn stride(&self) -> usize {
        self.stride
    }

    /// How many there are.
    pub(crate) const fn count(&self) -> usize {
        self.places.len()
    }

    /// How many are held by this process.
    pub(crate) fn held(&self) -> usize {
        self.places.iter().filter(|&&p| p == Place::Held).count()
    }

    fn move_from(&mut self, chunk: u32, from: Place, to: Place) -> bool {
        match self.places.get_mut(chunk as usize) {
            Some(place) if *place == from => {
                *place = to;
                true
            }
            _ => false,
        }
    }

    /// `chunk` must have a place and `start` be at most the stride.
    const fn address(&self, chunk: u32, start: usize) -> *mut u8 {
        let offset = chunk as usize * self.stride + start;
        self.base.as_ptr().wrapping_add(offset)
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        if self.stays_mapped {
            return;
        }
        // SAFETY: the mapping was made by `new` with this length, and no reference into it outlives
        // `self`. Who lends chunks to the kernel sees to it that it is done with them (`uring`).
        let unmapped = unsafe { rustix::mm::munmap(self.base.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "the mapping of `new` can be unmapped");
    }
}

const PAGE: usize = 4096;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_reachable_only_while_held() {
        let mut chunks = Chunks::new(2, 64).expect("128 bytes");
        let chunk = chunks.acquire().expect("two are free");
        chunks.bytes(chunk, 60, 4).copy_from_slice(b"abcd");
        assert!(chunks.lend(chunk).is_some());
        assert!(chunks.bytes(chunk, 60, 4).is_empty());
        assert!(chunks.reclaim(chunk));
        assert_eq!(chunks.bytes(chunk, 60, 4), b"abcd");
        chunks.release(chunk);
        assert!(chunks.bytes(chunk, 60, 4).is_empty());
    }

    #[test]
    fn a_part_beyond_the_chunk_is_empty() {
        let mut chunks = Chunks::new(2, 64).expect("128 bytes");
        let chunk = chunks.acquire().expect("two are free");
        assert!(chunks.bytes(chunk, 61, 4).is_empty());
        assert!(chunks.bytes(chunk, 1, usize::MAX).is_empty());
        assert!(chunks.bytes(7, 0, 1).is_empty());
    }

    #[test]
    fn a_chunk_in_the_wrong_place_is_left_alone() {
        let mut chunks = Chunks::new(1, 64).expect("64 bytes");
        assert!(!chunks.reclaim(0));
        assert!(chunks.lend(0).is_none());
        chunks.release(0);
        assert_eq!(chunks.free.len(), 1);
        let chunk = chunks.acquire().expect("one is free");
        assert_eq!(chunks.acquire(), None);
        chunks.release(chunk);
        chunks.release(chunk);
        assert_eq!((chunks.free.len(), chunks.held()), (1, 0));
    }
}
