//! Rings between workers: a packet that belongs to another worker goes there with what is known of it.
//!
//! A ring is bounded and has one sender and one receiver. Its parcels circulate: the receiver gives an
//! emptied one back by the return ring, so nothing is allocated once warm and no pool drains. The
//! packet is copied into the parcel; the frame it came in goes back to its own device at once.

use std::sync::Arc;

use crossbeam::queue::ArrayQueue;

use crate::device::VnetHeader;
use crate::pipeline::Meta;

/// How many packets of a wire's size wait between two workers at most.
pub const PARCELS: usize = 1_024;
/// How many larger ones besides.
pub const LARGE_PARCELS: usize = 32;

/// A packet of a wire's size.
const PARCEL_SIZE: usize = 2_048;
/// A super-packet of 65,535 bytes and its Ethernet header.
const LARGE_PARCEL_SIZE: usize = 65_536 + 64;

/// A packet on its way to the worker that owns it.
#[derive(Debug)]
pub struct Parcel {
    memory: Box<[u8]>,
    length: usize,
    /// What its bytes cannot say.
    pub meta: Meta,
    /// Checksum and segmentation of the frame it came in.
    pub vnet: VnetHeader,
}

impl Parcel {
    /// The packet from its Ethernet header on.
    pub fn bytes(&mut self) -> &mut [u8] {
        self.memory.get_mut(..self.length).unwrap_or_default()
    }
}

#[derive(Debug)]
struct Ring {
    full: ArrayQueue<Parcel>,
    empty: ArrayQueue<Box<[u8]>>,
    large: ArrayQueue<Box<[u8]>>,
}

impl Ring {
    fn home(&self, length: usize) -> &ArrayQueue<Box<[u8]>> {
        if length > PARCEL_SIZE {
            &self.large
        } else {
            &self.empty
        }
    }

    fn give_back(&self, memory: Box<[u8]>) {
        self.home(memory.len()).force_push(memory);
    }
}

/// The sender's end.
#[derive(Debug)]
pub struct Outbox(Arc<Ring>);

/// The receiver's end.
#[derive(Debug)]
pub struct Inbox(Arc<Ring>);

/// The receiver is behind, or the packet is larger than any packet can be.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Behind;

/// A ring from one worker to another.
#[must_use]
pub fn ring() -> (Outbox, Inbox) {
    let ring = Ring {
        full: ArrayQueue::new(PARCELS + LARGE_PARCELS),
        empty: ArrayQueue::new(PARCELS),
        large: ArrayQueue::new(LARGE_PARCELS),
    };
    // Pages of a parcel that no packet ever reached take no memory.
    let memories = |size| std::iter::repeat_with(move || vec![0; size].into_boxed_slice());
    let small = memories(PARCEL_SIZE).take(PARCELS);
    for memory in small.chain(memories(LARGE_PARCEL_SIZE).take(LARGE_PARCELS)) {
        ring.give_back(memory);
    }
    let ring = Arc::new(ring);
    (Outbox(Arc::clone(&ring)), Inbox(ring))
}

impl Outbox {
    /// Copies a packet to the other worker.
    ///
    /// # Errors
    /// `Behind` if every parcel is on its way.
    pub fn send(&mut self, bytes: &[u8], meta: &Meta, vnet: &VnetHeader) -> Result<(), Behind> {
        let Some(mut memory) = self.0.home(bytes.len()).pop() else {
            return Err(Behind);
        };
        let Some(room) = memory.get_mut(..bytes.len()) else {
            self.0.give_back(memory);
            return Err(Behind);
        };
        room.copy_from_slice(bytes);
        let meta = Meta {
            handovers: meta.handovers.saturating_add(1),
            ..*meta
        };
        let parcel = Parcel {
            memory,
            length: bytes.len(),
            meta,
            vnet: *vnet,
        };
        self.0.full.push(parcel).map_err(|parcel| {
            self.0.give_back(parcel.memory);
            Behind
        })
    }
}

impl Inbox {
    /// The oldest packet that waits.
    pub fn receive(&mut self) -> Option<Parcel> {
        self.0.full.pop()
    }

    /// Whether one waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.full.is_empty()
    }

    /// Sends an emptied parcel home.
    pub fn give_back(&mut self, parcel: Parcel) {
        self.0.give_back(parcel.memory);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::command::Origin;
    use crate::pipeline::{ChecksumState, Door};

    const META: Meta = Meta {
        door: Door::Host(Origin::Host),
        checksum: ChecksumState::Complete,
        super_packet: false,
        handovers: 0,
    };

    #[test]
    fn a_packet_arrives_as_it_was_sent_and_its_parcel_comes_home() {
        let (mut outbox, mut inbox) = ring();
        for round in 0..3 * PARCELS {
            let bytes = [u8::try_from(round % 251).expect("below 251"); 60];
            outbox
                .send(&bytes, &META, &VnetHeader::default())
                .expect("a parcel is free");
            let mut parcel = inbox.receive().expect("it was sent");
            assert_eq!(parcel.bytes(), bytes);
            assert_eq!(parcel.meta.handovers, 1);
            inbox.give_back(parcel);
        }
        assert!(inbox.is_empty());
    }

    #[test]
    fn a_full_ring_refuses_and_loses_no_parcel() {
        let (mut outbox, mut inbox) = ring();
        for _ in 0..PARCELS {
            assert_eq!(outbox.send(&[1; 60], &META, &VnetHeader::default()), Ok(()));
        }
        assert_eq!(
            outbox.send(&[1; 60], &META, &VnetHeader::default()),
            Err(Behind)
        );
        let parcel = inbox.receive().expect("the ring is full");
        inbox.give_back(parcel);
        assert_eq!(outbox.send(&[1; 60], &META, &VnetHeader::default()), Ok(()));
    }

    #[test]
    fn super_packets_have_parcels_of_their_own() {
        let (mut outbox, mut inbox) = ring();
        let large = vec![7; 60_000];
        for _ in 0..LARGE_PARCELS {
            assert_eq!(outbox.send(&large, &META, &VnetHeader::default()), Ok(()));
        }
        assert_eq!(
            outbox.send(&large, &META, &VnetHeader::default()),
            Err(Behind)
        );
        assert_eq!(outbox.send(&[1; 60], &META, &VnetHeader::default()), Ok(()));
        let mut parcel = inbox.receive().expect("the ring is full");
        assert_eq!(parcel.bytes(), large);
        inbox.give_back(parcel);
        assert_eq!(outbox.send(&large, &META, &VnetHeader::default()), Ok(()));
    }

    #[test]
    fn a_packet_larger_than_any_packet_is_refused() {
        let (mut outbox, _inbox) = ring();
        let huge = vec![0; LARGE_PARCEL_SIZE + 1];
        assert_eq!(
            outbox.send(&huge, &META, &VnetHeader::default()),
            Err(Behind)
        );
        assert_eq!(outbox.0.large.len(), LARGE_PARCELS);
    }
}
