//! Memory that others see too: files, and maps of the kernel's programs.
//!
//! Contract: a `Mapping` is plain memory with one owner; whoever maps a file promises that no other
//! process writes to it meanwhile (the flow slab holds a lock for that). Memory that others do
//! write (the kernel's programs, sibling workers) is only ever seen as atomic words, through
//! `SharedWords`.

use std::io;
use std::os::fd::BorrowedFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use rustix::mm::{MapFlags, ProtFlags, mmap, mmap_anonymous, munmap};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A region of memory that is unmapped on drop; zeroed when new.
#[derive(Debug)]
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the region belongs to this value alone, as the bytes of a `Box<[u8]>` do.
unsafe impl Send for Mapping {}
// SAFETY: a shared reference gives no access to the bytes.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Memory of this process only.
    ///
    /// # Errors
    /// The kernel's, if `length` is zero or there is no memory.
    pub(crate) fn anonymous(length: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address, so no other memory is touched.
        let start = unsafe {
            mmap_anonymous(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::PRIVATE,
            )
        }?;
        Self::new(start.cast(), length)
    }

    /// The first `length` bytes of a file, which must be that long, or of a map of the kernel.
    ///
    /// # Errors
    /// The kernel's, if the descriptor cannot be mapped or is too short for a map.
    pub(crate) fn shared(descriptor: BorrowedFd<'_>, length: usize) -> io::Result<Self> {
        // SAFETY: the kernel chooses the address, so no other memory is touched.
        let start = unsafe {
            mmap(
                std::ptr::null_mut(),
                length,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED,
                descriptor,
                0,
            )
        }?;
        Self::new(start.cast(), length)
    }

    fn new(start: *mut u8, length: usize) -> io::Result<Self> {
        let start = NonNull::new(start).ok_or(io::ErrorKind::AddrNotAvailable)?;
        Ok(Self { start, length })
    }

    /// All bytes, to write.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: `start` is valid for `length` bytes until drop, page-aligned, initialised by the
        // kernel, and `&mut self` makes this the only view.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.length) }
    }

    /// `count` values from byte `offset` on; `None` if they do not fit or are not aligned there.
    pub(crate) fn slice_mut<T>(&mut self, offset: usize, count: usize) -> Option<&mut [T]>
    where
        T: FromBytes + IntoBytes + KnownLayout + Immutable,
    {
        let size = count.checked_mul(size_of::<T>())?;
        let bytes = self
            .bytes_mut()
            .get_mut(offset..offset.checked_add(size)?)?;
        <[T]>::mut_from_bytes_with_elems(bytes, count).ok()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the region was mapped with this start and length, and no view outlives `self`.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast(), self.length) };
        debug_assert!(unmapped.is_ok(), "a mapped region can be unmapped");
    }
}

/// Values in a mapped region, as a slice.
#[derive(Debug)]
pub(crate) struct MappedSlice<T> {
    start: NonNull<T>,
    count: usize,
    /// Keeps the region mapped.
    _mapping: Mapping,
}

// SAFETY: the region belongs to this value alone, as the values of a `Box<[T]>` do.
unsafe impl<T: Send> Send for MappedSlice<T> {}
// SAFETY: a shared reference gives only shared access to the values.
unsafe impl<T: Sync> Sync for MappedSlice<T> {}

impl<T: FromBytes + IntoBytes + KnownLayout + Immutable> MappedSlice<T> {
    /// `count` values from byte `offset` of a region on; `None` if they do not fit or are not
    /// aligned there.
    pub(crate) fn new(mut mapping: Mapping, offset: usize, count: usize) -> Option<Self> {
        let values = mapping.slice_mut::<T>(offset, count)?;
        let start = NonNull::new(values.as_mut_ptr())?;
        Some(Self {
            start,
            count,
            _mapping: mapping,
        })
    }
}

impl<T> std::ops::Deref for MappedSlice<T> {
    type Target = [T];

    #[inline]
    fn deref(&self) -> &[T] {
        // SAFETY: `new` checked bounds, alignment and that any bytes are a value; the mapping lives
        // as long as `self`, and `&self` excludes a mutable view.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.count) }
    }
}

impl<T> std::ops::DerefMut for MappedSlice<T> {
    #[inline]
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`; `&mut self` makes this the only view.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr(), self.count) }
    }
}

/// A region seen as atomic words by several threads, and by the kernel's programs.
#[derive(Clone, Debug)]
pub(crate) struct SharedWords(Arc<Mapping>);

impl SharedWords {
    /// `count` words of this process only.
    ///
    /// # Errors
    /// The kernel's, as `Mapping::anonymous`.
    pub(crate) fn anonymous(count: usize) -> io::Result<Self> {
        Ok(Self(Arc::new(Mapping::anonymous(words_size(count)?)?)))
    }

    /// The first `count` words of a file or map of the kernel.
    ///
    /// # Errors
    /// The kernel's, as `Mapping::shared`.
    pub(crate) fn shared(descriptor: BorrowedFd<'_>, count: usize) -> io::Result<Self> {
        let mapping = Mapping::shared(descriptor, words_size(count)?)?;
        Ok(Self(Arc::new(mapping)))
    }

    /// All words.
    #[must_use]
    #[inline]
    pub(crate) fn words(&self) -> &[AtomicU64] {
        let start = self.0.start.as_ptr().cast::<AtomicU64>();
        // SAFETY: the region is page-aligned, holds this many initialised words until the last
        // clone is dropped, and is accessed through atomics only: `self.0` is private, and no byte
        // view of it is ever made.
        unsafe { std::slice::from_raw_parts(start, self.0.length / size_of::<AtomicU64>()) }
    }
}

fn words_size(count: usize) -> io::Result<usize> {
    count
        .checked_mul(size_of::<u64>())
        .ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::atomic::Ordering;

    use super::*;

    #[test]
    fn a_file_keeps_what_a_mapping_wrote() {
        let file = tempfile::tempfile().expect("a temporary file");
        file.set_len(8192).expect("room for two pages");
        let mut first = Mapping::shared(file.as_fd(), 8192).expect("a mapping");
        first.slice_mut::<u32>(4096, 2).expect("aligned")[1] = 7;
        drop(first);
        let mut second = Mapping::shared(file.as_fd(), 8192).expect("a mapping");
        assert_eq!(second.slice_mut::<u32>(4096, 2), Some(&mut [0, 7][..]));
    }

    #[test]
    fn views_outside_the_region_or_misaligned_are_refused() {
        let mut mapping = Mapping::anonymous(4096).expect("a page");
        assert!(mapping.slice_mut::<u64>(4089, 1).is_none());
        assert!(mapping.slice_mut::<u64>(4, 1).is_none());
        assert!(mapping.slice_mut::<u64>(8, usize::MAX).is_none());
        assert!(mapping.slice_mut::<u64>(4088, 1).is_some());
    }

    #[test]
    fn a_slice_keeps_its_region_and_refuses_what_does_not_fit() {
        let mut slice = MappedSlice::<u64>::new(Mapping::anonymous(4096).expect("a page"), 8, 511)
            .expect("it fits");
        slice[510] = 7;
        assert_eq!(slice.last(), Some(&7));
        assert!(
            MappedSlice::<u64>::new(Mapping::anonymous(4096).expect("a page"), 8, 512).is_none()
        );
    }

    #[test]
    fn clones_of_shared_words_see_the_same_memory() {
        let one = SharedWords::anonymous(4).expect("a page");
        let other = one.clone();
        one.words()[3].store(9, Ordering::Release);
        assert_eq!(other.words()[3].load(Ordering::Acquire), 9);
    }
}
