//! A flow: one connection through a frontend, with both of its tuples.
//!
//! `Flow` is plain data of a fixed layout, so that a slab of flows can live in shared memory and be
//! taken over by a later process. A slot whose state is `State::FREE` holds no flow; all zero bytes
//! are such a slot. `table` finds flows, `tcp` moves their state, `expiry` lets them go.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod expiry;
pub mod store;
pub mod table;
pub mod tcp;

use std::fmt;
use std::mem::offset_of;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub use expiry::Timeouts;
pub use table::{FlowId, FlowTable, InsertError, NewFlow, Slab};

use crate::net::{Address, Direction, Endpoint, Port, Protocol, Tuple};
use crate::packet::TcpFlags;
use crate::time::{Duration, Instant};

/// One connection, in two cache lines: the first holds all addresses. The two tuples lie one after
/// the other, first the addresses of both, then the ports of both.
#[derive(
    Clone, Copy, PartialEq, Eq, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(C, align(128))]
pub struct Flow {
    /// Who asked.
    pub client_address: Address,
    /// What was asked for.
    pub frontend_address: Address,
    /// Who answers.
    pub backend_address: Address,
    /// Who the backend believes asked: the client, or an SNAT address.
    pub source_address: Address,
    /// Port of the client.
    pub client_port: u16,
    /// Port of the frontend.
    pub frontend_port: u16,
    /// Port of the backend.
    pub backend_port: u16,
    /// Port that the backend answers to.
    pub source_port: u16,
    /// Packets by `Direction`.
    pub packets: [u64; 2],
    /// Bytes of IP packets by `Direction`.
    pub bytes: [u64; 2],
    /// Milliseconds of the monotonic clock at the last packet, modulo 2^32.
    pub last_seen: u32,
    /// Seconds of the monotonic clock at the first packet.
    pub created: u32,
    /// `ServiceId` of the snapshot.
    pub service: u32,
    /// `BackendId` of the snapshot.
    pub backend: u32,
    /// The epoch under which the binding was last checked.
    pub epoch: u32,
    /// IP protocol.
    pub protocol: Protocol,
    /// Where the connection stands; `State::FREE` in a slot that holds none.
    pub state: State,
    /// What was seen so far.
    pub flags: FlowFlags,
    /// Zero.
    pub spare: u8,
}

const _: () = assert!(size_of::<Flow>() <= 128);
const _: () = assert!(offset_of!(Flow, backend_address) == REPLY_ADDRESSES);
const _: () = assert!(offset_of!(Flow, client_port) == PORTS);
const _: () = assert!(offset_of!(Flow, backend_port) == PORTS + REPLY_PORTS);

/// Offset of the reply tuple's addresses.
const REPLY_ADDRESSES: usize = 32;
/// Offset of the original tuple's ports.
const PORTS: usize = 64;
/// Offset of the reply tuple's ports from those.
const REPLY_PORTS: usize = 4;

impl Flow {
    /// The tuple of a packet from the client.
    #[must_use]
    #[inline]
    pub const fn original(&self) -> Tuple {
        Tuple {
            protocol: self.protocol,
            source: self.client(),
            destination: self.frontend(),
        }
    }

    /// The tuple of a packet from the backend.
    #[must_use]
    #[inline]
    pub const fn reply(&self) -> Tuple {
        Tuple {
            protocol: self.protocol,
            source: self.backend_endpoint(),
            destination: self.source(),
        }
    }

    /// Whether the tuple of this direction is `tuple`. Packets of both directions come in any order,
    /// so the direction selects an address in memory and not a branch, which would be guessed wrong
    /// half the time.
    #[inline]
    fn has(&self, direction: Direction, tuple: &Tuple) -> bool {
        let way = usize::from(direction as u8);
        let bytes = self.as_bytes();
        let addresses = bytes
            .get(way * REPLY_ADDRESSES..)
            .and_then(|rest| rest.first_chunk::<32>());
        let ports = bytes
            .get(PORTS + way * REPLY_PORTS..)
            .and_then(|rest| rest.first_chunk::<4>());
        let (Some(addresses), Some(ports)) = (addresses, ports) else {
            return false;
        };
        let [source, destination]: [[u8; 16]; 2] = zerocopy::transmute!(*addresses);
        let [from, to]: [u16; 2] = zerocopy::transmute!(*ports);
        let difference = (u128::from_ne_bytes(source)
            ^ u128::from_ne_bytes(*tuple.source.address.bytes()))
            | (u128::from_ne_bytes(destination)
                ^ u128::from_ne_bytes(*tuple.destination.address.bytes()))
            | u128::from(from ^ tuple.source.port.0)
            | u128::from(to ^ tuple.destination.port.0)
            | u128::from(self.protocol.0 ^ tuple.protocol.0);
        difference == 0
    }

    /// Who asked.
    #[must_use]
    pub const fn client(&self) -> Endpoint {
        Endpoint::new(self.client_address, Port(self.client_port))
    }

    /// What was asked for.
    #[must_use]
    pub const fn frontend(&self) -> Endpoint {
        Endpoint::new(self.frontend_address, Port(self.frontend_port))
    }

    /// Who answers.
    #[must_use]
    pub const fn backend_endpoint(&self) -> Endpoint {
        Endpoint::new(self.backend_address, Port(self.backend_port))
    }

    /// Who the backend believes asked.
    #[must_use]
    pub const fn source(&self) -> Endpoint {
        Endpoint::new(self.source_address, Port(self.source_port))
    }

    /// Whether the source is translated too.
    #[must_use]
    pub fn is_masqueraded(&self) -> bool {
        self.client() != self.source()
    }

    /// Whether this packet begins a new connection on the tuple of an old one that is over: the flow
    /// is to be forgotten and the packet scheduled anew.
    #[must_use]
    #[inline]
    pub fn is_restarted_by(&self, direction: Direction, tcp: TcpFlags) -> bool {
        direction == Direction::Original && tcp.opens() && self.is_over()
    }

    /// Whether the connection is over and only waits for stray packets. Its tuple may be given to a
    /// new connection when there is no other.
    #[must_use]
    pub fn is_over(&self) -> bool {
        matches!(self.state, State::TIME_WAIT | State::CLOSED)
    }

    /// Time since the last packet.
    #[must_use]
    pub fn idle(&self, now: Instant) -> Duration {
        Duration::from_millis(u64::from(stamp(now).wrapping_sub(self.last_seen)))
    }

    /// Time since the first packet, in whole seconds.
    #[must_use]
    pub fn age(&self, now: Instant) -> Duration {
        Duration::from_secs(u64::from(seconds(now).wrapping_sub(self.created)))
    }
}

/// Where a flow stands. A number and not an enum, since shared memory can hold any value.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Default, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(transparent)]
pub struct State(pub u8);

impl State {
    /// The slot holds no flow.
    pub const FREE: Self = Self(0);
    /// TCP: SYN from the client.
    pub const SYN_SENT: Self = Self(1);
    /// TCP: SYN from the backend.
    pub const SYN_RECEIVED: Self = Self(2);
    /// TCP: the handshake is done.
    pub const ESTABLISHED: Self = Self(3);
    /// TCP: one side has sent FIN.
    pub const FIN_WAIT: Self = Self(4);
    /// TCP: the other side has acknowledged it and may go on sending.
    pub const CLOSE_WAIT: Self = Self(5);
    /// TCP: both sides have sent FIN.
    pub const LAST_ACK: Self = Self(6);
    /// TCP: both FINs are acknowledged.
    pub const TIME_WAIT: Self = Self(7);
    /// TCP: reset.
    pub const CLOSED: Self = Self(8);
    /// Other protocols: no reply so far.
    pub const UNREPLIED: Self = Self(9);
    /// Other protocols: packets went both ways.
    pub const REPLIED: Self = Self(10);

    /// The state's name, in conntrack's words.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::FREE => "FREE",
            Self::SYN_SENT => "SYN_SENT",
            Self::SYN_RECEIVED => "SYN_RECV",
            Self::ESTABLISHED => "ESTABLISHED",
            Self::FIN_WAIT => "FIN_WAIT",
            Self::CLOSE_WAIT => "CLOSE_WAIT",
            Self::LAST_ACK => "LAST_ACK",
            Self::TIME_WAIT => "TIME_WAIT",
            Self::CLOSED => "CLOSE",
            Self::UNREPLIED => "UNREPLIED",
            Self::REPLIED => "REPLIED",
            Self(_) => "UNKNOWN",
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Debug for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What was seen of a flow.
#[derive(
    Clone, Copy, PartialEq, Eq, Hash, Debug, Default, FromBytes, IntoBytes, KnownLayout, Immutable,
)]
#[repr(transparent)]
pub struct FlowFlags(pub u8);

impl FlowFlags {
    /// FIN from the client.
    pub const FIN_ORIGINAL: Self = Self(0x01);
    /// FIN from the backend.
    pub const FIN_REPLY: Self = Self(0x02);

    /// Whether all bits of `others` are set.
    #[must_use]
    pub const fn contains(self, others: Self) -> bool {
        self.0 & others.0 == others.0
    }
}

/// Milliseconds for `Flow::last_seen`.
#[inline]
const fn stamp(now: Instant) -> u32 {
    (now.as_millis() & 0xffff_ffff) as u32
}

/// Seconds for `Flow::created`.
#[inline]
const fn seconds(now: Instant) -> u32 {
    ((now.as_millis() / 1000) & 0xffff_ffff) as u32
}
