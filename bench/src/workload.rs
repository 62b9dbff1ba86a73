//! Flows for the benches: the same ones in each run, in an order that no cache foresees.

use dataplane::flow::NewFlow;
use dataplane::net::{Address, Endpoint, Port, Protocol, Tuple};
use dataplane::packet::TcpFlags;

/// The address family of a workload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Family {
    /// Version 4.
    V4,
    /// Version 6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// As it stands in a bench's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        }
    }

    /// The address with this number in net 10.`net`.0.0/16 or fd00:`net`::/32.
    #[must_use]
    pub const fn address(self, net: u8, number: u16) -> Address {
        let [high, low] = number.to_be_bytes();
        match self {
            Self::V4 => Address::from_v4([10, net, high, low]),
            Self::V6 => {
                Address::from_bytes([0xfd, 0, 0, net, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, high, low])
            }
        }
    }
}

/// Flow number `n` of a family: a client, one of 256 Services, a backend, the client's own source.
#[must_use]
pub fn flow(family: Family, protocol: Protocol, n: u32) -> NewFlow {
    let [_, high, low, service] = n.to_be_bytes();
    let client = Endpoint::new(
        family.address(1, u16::from_be_bytes([high, low])),
        Port(32_768 + u16::from(service)),
    );
    let frontend = Endpoint::new(family.address(96, u16::from(service)), Port(80));
    let backend = Endpoint::new(family.address(244, u16::from(service)), Port(8080));
    let tuple = |source, destination| Tuple {
        protocol,
        source,
        destination,
    };
    NewFlow {
        original: tuple(client, frontend),
        reply: tuple(backend, client),
        service: u32::from(service),
        backend: u32::from(service),
        epoch: 1,
        tcp: TcpFlags::SYN,
    }
}

/// Shuffles with a generator of a fixed seed (xorshift64*).
pub fn shuffle<T>(list: &mut [T]) {
    let mut state = 0x2545_F491_4F6C_DD1D_u64;
    for last in (1..list.len()).rev() {
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        let bound = u64::try_from(last + 1).unwrap_or(1);
        let other = usize::try_from(state.wrapping_mul(0x2545_F491_4F6C_DD1D) % bound).unwrap_or(0);
        list.swap(last, other);
    }
}
