//! The structs that the programs read, as `bpf/maps.h` has them, and the names of their counters.
//!
//! A test compiles the C headers and compares sizes, offsets and hash values: change both or
//! neither.

use zerocopy::{Immutable, IntoBytes};

use crate::net::{Address, MacAddr, Port, Protocol};

/// What the programs look a packet's destination up by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct FrontendKey {
    address: Address,
    port: [u8; 2],
    protocol: Protocol,
    reserved: u8,
}

impl FrontendKey {
    /// A frontend; `Address::ANY` stands for every address of this node.
    #[must_use]
    pub const fn new(address: Address, port: Port, protocol: Protocol) -> Self {
        Self {
            address,
            port: port.0.to_be_bytes(),
            protocol,
            reserved: 0,
        }
    }

    /// The address of a frontend alone: what a later fragment still shows.
    #[must_use]
    pub const fn address_only(address: Address) -> Self {
        Self::new(address, Port(0), Protocol(0))
    }
}

/// What kind of device the steering sits on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DeviceKind {
    /// A NIC under AF_XDP.
    Uplink = 1,
    /// The host's end of a pod's device.
    Pod = 2,
    /// A tunnel to other nodes.
    Overlay = 3,
}

/// Value of `devices`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct DeviceEntry {
    pub(super) mac: MacAddr,
    pub(super) kind: u8,
    pub(super) hooks: u8,
    pub(super) first_socket: u32,
}

/// `struct steering_config`.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ProgramConfig {
    pub(super) key0: u64,
    pub(super) key1: u64,
    pub(super) grace_ns: u64,
    pub(super) hold_ns: u64,
    pub(super) workers: u32,
    pub(super) buckets_per_worker: u32,
    pub(super) mark: u32,
    pub(super) host_port: u32,
    pub(super) mirrored: u32,
    pub(super) reserved: u32,
}

pub(super) const HOOK_INGRESS: u8 = 1;
pub(super) const HOOK_EGRESS: u8 = 2;
pub(super) const TUPLES_PER_BUCKET: usize = 8;
pub(super) const MAX_WORKERS: u16 = 64;
/// Sockets that each uplink has room for in the programs' table.
pub const QUEUES_PER_UPLINK: u32 = 64;
/// How many uplinks one engine can have.
pub const MAX_UPLINKS: u32 = 16;

/// `enum counter`, in its order.
pub(super) const COUNTERS: [&str; 15] = [
    "steered_xdp",
    "steered_ingress",
    "steered_egress",
    "passed_fragment",
    "passed_unparsable",
    "held_frontend",
    "held_tuple",
    "cleared_tuple",
    "no_socket",
    "reenter",
    "peer",
    "out",
    "up",
    "neigh",
    "bad_command",
];
