//! The flow slab in a shared-memory file of the state folder, one file a worker.
//!
//! ```text
//! 0           64                         4096
//! | header    | zeros                    | flows, 128 bytes each |
//! ```
//!
//! The header says by which layout, worker count and SNAT ports the flows were written, so that a
//! process that would read them otherwise refuses the file by name. Each start begins with an empty
//! slab: `create` replaces what an earlier process left. Rule to keep: whoever changes `Flow` or the
//! owner hash changes `VERSION`.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::ops::{Deref, DerefMut, RangeInclusive};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use super::Flow;
use crate::sys::mmap::{MappedSlice, Mapping};

/// Flows in a mapped file.
#[derive(Debug)]
pub struct FlowFile(MappedSlice<Flow>);

/// What the flows in a file depend on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Layout {
    /// Whose flows they are.
    pub worker: u16,
    /// How many workers share the node's flows.
    pub workers: u16,
    /// Ports to masquerade with.
    pub snat_ports: RangeInclusive<u16>,
    /// Room for how many flows.
    pub capacity: u32,
}

/// The first bytes of a file, in the host's byte order: it never leaves the machine.
#[derive(FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: u32,
    flow_size: u32,
    worker: u16,
    workers: u16,
    first_port: u16,
    last_port: u16,
    capacity: u32,
    reserved: u32,
}

/// Why there is no file.
#[derive(Debug, thiserror::Error)]
#[error(
    "the flow slab {path} cannot be made: {source}; is the state folder on a file system with room?"
)]
pub struct StoreError {
    path: PathBuf,
    source: io::Error,
}

impl FlowFile {
    /// An empty slab in the file `flows-<worker>` of `folder`, which replaces an earlier one.
    ///
    /// # Errors
    /// The folder cannot be written, or there is no room.
    pub fn create(folder: &Path, layout: &Layout) -> Result<Self, StoreError> {
        let path = folder.join(format!("flows-{}", layout.worker));
        Self::create_at(&path, layout).map_err(|source| StoreError { path, source })
    }

    fn create_at(path: &Path, layout: &Layout) -> io::Result<Self> {
        let mut file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(path)?;
        let count = layout.capacity as usize;
        let length = count
            .checked_mul(size_of::<Flow>())
            .and_then(|size| size.checked_add(FLOWS_AT))
            .ok_or(io::ErrorKind::InvalidInput)?;
        file.set_len(length as u64)?;
        file.write_all(Header::of(layout).as_bytes())?;
        let mapping = Mapping::shared(file.as_fd(), length)?;
        let flows = MappedSlice::new(mapping, FLOWS_AT, count).ok_or(io::ErrorKind::InvalidData)?;
        Ok(Self(flows))
    }
}

impl Header {
    const fn of(layout: &Layout) -> Self {
        Self {
            magic: *b"sluiceFS",
            version: VERSION,
            flow_size: FLOW_SIZE,
            worker: layout.worker,
            workers: layout.workers,
            first_port: *layout.snat_ports.start(),
            last_port: *layout.snat_ports.end(),
            capacity: layout.capacity,
            reserved: 0,
        }
    }
}

impl Deref for FlowFile {
    type Target = [Flow];

    #[inline]
    fn deref(&self) -> &[Flow] {
        &self.0
    }
}

impl DerefMut for FlowFile {
    #[inline]
    fn deref_mut(&mut self) -> &mut [Flow] {
        &mut self.0
    }
}

const VERSION: u32 = 1;
const FLOW_SIZE: u32 = 128;
const _: () = assert!(size_of::<Flow>() == FLOW_SIZE as usize);
/// Flows begin on a page of their own.
const FLOWS_AT: usize = 4_096;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flow::State;

    const LAYOUT: Layout = Layout {
        worker: 1,
        workers: 2,
        snat_ports: 1_024..=29_999,
        capacity: 100,
    };

    #[test]
    fn flows_are_written_through_to_the_file_behind_a_header_that_names_the_layout() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut flows = FlowFile::create(folder.path(), &LAYOUT).expect("a file");
        assert_eq!(flows.len(), 100);
        flows[99].state = State::ESTABLISHED;
        let bytes = std::fs::read(folder.path().join("flows-1")).expect("the file");
        let (header, _) = Header::read_from_prefix(&bytes).expect("a header");
        assert_eq!(&header.magic, b"sluiceFS");
        assert_eq!(
            (header.worker, header.workers, header.first_port),
            (1, 2, 1_024)
        );
        let last = &bytes[FLOWS_AT + 99 * size_of::<Flow>()..];
        let last = Flow::read_from_bytes(last).expect("one flow");
        assert_eq!(last.state, State::ESTABLISHED);
    }

    #[test]
    fn a_new_slab_is_empty_whatever_stood_there() {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut flows = FlowFile::create(folder.path(), &LAYOUT).expect("a file");
        flows[0].state = State::ESTABLISHED;
        drop(flows);
        let flows = FlowFile::create(folder.path(), &LAYOUT).expect("a file");
        assert!(flows.iter().all(|flow| flow.state == State::FREE));
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = FlowFile::create(Path::new("/nonexistent"), &LAYOUT).expect_err("no folder");
        assert!(
            error.to_string().contains("/nonexistent/flows-1"),
            "{error}"
        );
    }
}
