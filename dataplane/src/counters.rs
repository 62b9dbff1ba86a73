//! What each worker counts, and why packets are dropped.
//!
//! Counters are plain integers owned by their worker. Once a batch it copies them into
//! `SharedCounters`, which anyone may read. Every packet ends in exactly one of them:
//! received + handed in = transmitted + punted + rejected + dropped + held + handed out.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

use zerocopy::FromZeros;

use crate::snapshot::{BackendId, MAX_BACKENDS};

macro_rules! drop_reasons {
    ($($(#[$doc:meta])* $variant:ident = $name:literal,)*) => {
        /// Why a packet was dropped.
        #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
        #[repr(u8)]
        pub enum DropReason {
            $($(#[$doc])* $variant,)*
        }

        impl DropReason {
            /// All of them, in the order of their numbers.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// The name in metrics and JSON.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self {
                    $(Self::$variant => $name,)*
                }
            }
        }
    };
}

drop_reasons! {
    /// The headers do not parse.
    Malformed = "malformed",
    /// A fragment without its ports.
    Fragment = "fragment",
    /// A frame from the host port that neither steering nor a host process wrote.
    UnknownOrigin = "unknown_origin",
    /// A reply of a flow that is no longer known.
    NoFlow = "no_flow",
    /// A mid-stream packet of an unknown flow, from where no answer can be given.
    NoAnswer = "no_answer",
    /// The client is outside the frontend's source ranges.
    SourceRange = "source_range",
    /// No backend, and the API says drop.
    NoBackend = "no_backend",
    /// The flow table is full.
    FlowTableFull = "flow_table_full",
    /// The tuple map has no room for the flow.
    TupleMapFull = "tuple_map_full",
    /// No SNAT port is free towards this backend.
    SnatPortsExhausted = "snat_ports_exhausted",
    /// No address to masquerade with.
    NoSnatAddress = "no_snat_address",
    /// The kernel has no route to the destination.
    NoRoute = "no_route",
    /// The hop limit ended and no answer can be given.
    HopLimit = "hop_limit",
    /// Larger than the way out, and no answer can be given.
    TooBig = "too_big",
    /// A host process reached for a backend that is an address of this node.
    HostToSelf = "host_to_self",
    /// The device had no room.
    DeviceFull = "device_full",
    /// The other worker's ring had no room.
    HandoverFull = "handover_full",
}

/// One worker's counters.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkerCounters {
    /// Frames taken from devices.
    pub received: u64,
    /// Packets taken over from other workers.
    pub handed_in: u64,
    /// Packets given to the worker that owns them.
    pub handed_out: u64,
    /// Packets sent, translated.
    pub transmitted: u64,
    /// Packets given back to the kernel unchanged.
    pub punted: u64,
    /// Packets answered by a reset or an ICMP error.
    pub rejected: u64,
    /// Packets dropped, by `DropReason`.
    pub dropped: [u64; DropReason::ALL.len()],
    /// Packets kept for later.
    pub held: u64,
    /// Packets that the engine made itself.
    pub generated: u64,
    /// Flows in the table now.
    pub flows: u64,
    /// The last epoch this worker has seen.
    pub epoch: u64,
}

const CELLS: usize = 10 + DropReason::ALL.len();

impl WorkerCounters {
    /// All drops.
    #[must_use]
    pub fn dropped_total(&self) -> u64 {
        self.dropped.iter().sum()
    }

    /// Whether every packet ended in exactly one verdict.
    #[must_use]
    pub fn is_balanced(&self) -> bool {
        let verdicts = self.transmitted + self.punted + self.rejected + self.held + self.handed_out;
        self.received + self.handed_in == verdicts + self.dropped_total()
    }

    /// Counts one dropped packet.
    pub fn drop(&mut self, reason: DropReason) {
        if let Some(cell) = self.dropped.get_mut(reason as usize) {
            *cell += 1;
        }
    }

    fn scalars(&mut self) -> [&mut u64; 10] {
        [
            &mut self.received,
            &mut self.handed_in,
            &mut self.handed_out,
            &mut self.transmitted,
            &mut self.punted,
            &mut self.rejected,
            &mut self.held,
            &mut self.generated,
            &mut self.flows,
            &mut self.epoch,
        ]
    }
}

/// A worker's counters as others read them, at most one batch old.
#[derive(Debug)]
pub struct SharedCounters([AtomicU64; CELLS]);

impl Default for SharedCounters {
    fn default() -> Self {
        Self([const { AtomicU64::new(0) }; CELLS])
    }
}

impl SharedCounters {
    /// The owner's copy, once a batch.
    pub fn publish(&self, counters: &mut WorkerCounters) {
        let mut cells = self.0.iter();
        for value in counters.scalars() {
            if let Some(cell) = cells.next() {
                cell.store(*value, Ordering::Relaxed);
            }
        }
        for (cell, value) in cells.zip(&counters.dropped) {
            cell.store(*value, Ordering::Relaxed);
        }
    }

    /// The values now. Cells are read one by one: a sum may be a batch ahead of another.
    #[must_use]
    pub fn read(&self) -> WorkerCounters {
        let mut counters = WorkerCounters::default();
        let mut cells = self.0.iter();
        for value in counters.scalars() {
            *value = cells.next().map_or(0, |cell| cell.load(Ordering::Relaxed));
        }
        for (cell, value) in cells.zip(&mut counters.dropped) {
            *value = cell.load(Ordering::Relaxed);
        }
        counters
    }
}

/// Connections per backend as one worker counts them: written by it alone, read by all. Indexed by
/// `BackendId`; pages that no backend touches take no memory.
#[derive(Debug)]
pub struct BackendCounts(Box<[BackendCell]>);

#[derive(Debug, FromZeros)]
#[repr(C)]
struct BackendCell {
    active: AtomicU32,
    inactive: AtomicU32,
    connections: AtomicU64,
}

/// One backend's connections.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Connections {
    /// Established.
    pub active: u32,
    /// Opening or closing.
    pub inactive: u32,
    /// All that were ever bound to it.
    pub connections: u64,
}

impl Default for BackendCounts {
    fn default() -> Self {
        let cells = <[BackendCell]>::new_box_zeroed_with_elems(MAX_BACKENDS as usize);
        Self(cells.unwrap_or_default())
    }
}

impl BackendCounts {
    /// A connection was bound; it is inactive until established.
    pub fn opened(&self, id: BackendId) {
        if let Some(cell) = self.0.get(id.0 as usize) {
            step(&cell.inactive, 1);
            cell.connections.store(
                cell.connections.load(Ordering::Relaxed) + 1,
                Ordering::Relaxed,
            );
        }
    }

    /// A connection became active or inactive.
    pub fn moved(&self, id: BackendId, active: bool) {
        if let Some(cell) = self.0.get(id.0 as usize) {
            step(&cell.active, if active { 1 } else { -1 });
            step(&cell.inactive, if active { -1 } else { 1 });
        }
    }

    /// A connection ended.
    pub fn closed(&self, id: BackendId, active: bool) {
        if let Some(cell) = self.0.get(id.0 as usize) {
            step(if active { &cell.active } else { &cell.inactive }, -1);
        }
    }

    /// This worker's part of a backend's connections.
    #[must_use]
    pub fn read(&self, id: BackendId) -> Connections {
        self.0
            .get(id.0 as usize)
            .map_or_else(Connections::default, |cell| Connections {
                active: cell.active.load(Ordering::Relaxed),
                inactive: cell.inactive.load(Ordering::Relaxed),
                connections: cell.connections.load(Ordering::Relaxed),
            })
    }
}

/// The owner is the only writer, so a load and a store suffice.
fn step(cell: &AtomicU32, by: i32) {
    cell.store(
        cell.load(Ordering::Relaxed).wrapping_add_signed(by),
        Ordering::Relaxed,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_published_is_what_is_read() {
        let mut counters = WorkerCounters {
            received: 3,
            transmitted: 2,
            ..Default::default()
        };
        counters.drop(DropReason::NoRoute);
        assert!(counters.is_balanced());
        let shared = SharedCounters::default();
        shared.publish(&mut counters);
        assert_eq!(shared.read(), counters);
    }

    #[test]
    fn a_connection_moves_from_inactive_to_active_and_away() {
        let counts = BackendCounts::default();
        let id = BackendId(7);
        counts.opened(id);
        counts.moved(id, true);
        assert_eq!(
            counts.read(id),
            Connections {
                active: 1,
                inactive: 0,
                connections: 1
            }
        );
        counts.closed(id, true);
        assert_eq!(
            counts.read(id),
            Connections {
                active: 0,
                inactive: 0,
                connections: 1
            }
        );
    }
}
