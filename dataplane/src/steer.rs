//! Which worker owns a flow, and a flow's fingerprint in the tuple map.
//!
//! The same arithmetic stands in `bpf/tuple.h`, where it steers packets before the engine sees them:
//! change both or neither. The owner is a hash of the client's side of the packet and of nothing
//! else: the source of an original packet, the destination of a reply. A worker's SNAT ports are
//! those whose hash is itself, so the rule holds for translated replies too.

use crate::net::{Address, Direction, Endpoint, Tuple};

const MULTIPLIER_A: u64 = 0x9E37_79B9_7F4A_7C15;
const MULTIPLIER_B: u64 = 0xBF58_476D_1CE4_E5B9;

/// A worker's number, from 0.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct WorkerId(pub u16);

/// The worker that owns flows of this client, out of `workers`.
#[must_use]
#[inline]
pub fn owner(client: &Endpoint, workers: u16) -> WorkerId {
    let (low, high) = client.address.words();
    let mut x = low.wrapping_mul(MULTIPLIER_A);
    x ^= x >> 32;
    x = (x ^ high).wrapping_mul(MULTIPLIER_A);
    x ^= x >> 29;
    x = (x ^ u64::from(client.port.0.swap_bytes())).wrapping_mul(MULTIPLIER_B);
    x ^= x >> 32;
    let scaled = ((x & 0xffff_ffff) * u64::from(workers)) >> 32;
    WorkerId(u16::try_from(scaled).unwrap_or(0))
}

/// The client's side of a packet that goes in `direction`.
#[must_use]
#[inline]
pub const fn client_side(tuple: &Tuple, direction: Direction) -> Endpoint {
    match direction {
        Direction::Original => tuple.source,
        Direction::Reply => tuple.destination,
    }
}

/// The secret of the tuple map's fingerprints.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FingerprintKey {
    /// First half.
    pub key0: u64,
    /// Second half.
    pub key1: u64,
}

/// SipHash-1-3 of a tuple and its direction; never zero, which means an empty slot.
#[must_use]
#[inline]
pub fn fingerprint(tuple: &Tuple, direction: Direction, key: &FingerprintKey) -> u64 {
    let (a, b) = tuple.source.address.words();
    let (c, d) = tuple.destination.address.words();
    let last = u64::from(tuple.source.port.0.swap_bytes())
        | u64::from(tuple.destination.port.0.swap_bytes()) << 16
        | u64::from(tuple.protocol.0) << 32
        | u64::from(direction as u8) << 40;
    let mut state = SipState::new(key);
    for word in [a, b, c, d, last, 40 << 56] {
        state.absorb(word);
    }
    state.finish().max(1)
}

/// The two buckets in which a fingerprint may stand; `buckets` is a power of two.
#[must_use]
#[inline]
pub const fn buckets_of(fingerprint: u64, buckets: u32) -> [u32; 2] {
    let first = (fingerprint >> 32) as u32;
    let second = (fingerprint.wrapping_mul(MULTIPLIER_A) >> 32) as u32;
    [first & (buckets - 1), second & (buckets - 1)]
}

struct SipState {
    v0: u64,
    v1: u64,
    v2: u64,
    v3: u64,
}

impl SipState {
    const fn new(key: &FingerprintKey) -> Self {
        Self {
            v0: key.key0 ^ 0x736f_6d65_7073_6575,
            v1: key.key1 ^ 0x646f_7261_6e64_6f6d,
            v2: key.key0 ^ 0x6c79_6765_6e65_7261,
            v3: key.key1 ^ 0x7465_6462_7974_6573,
        }
    }

    #[inline]
    const fn absorb(&mut self, word: u64) {
        self.v3 ^= word;
        self.round();
        self.v0 ^= word;
    }

    #[inline]
    const fn round(&mut self) {
        self.v0 = self.v0.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(13) ^ self.v0;
        self.v0 = self.v0.rotate_left(32);
        self.v2 = self.v2.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(16) ^ self.v2;
        self.v0 = self.v0.wrapping_add(self.v3);
        self.v3 = self.v3.rotate_left(21) ^ self.v0;
        self.v2 = self.v2.wrapping_add(self.v1);
        self.v1 = self.v1.rotate_left(17) ^ self.v2;
        self.v2 = self.v2.rotate_left(32);
    }

    #[inline]
    const fn finish(mut self) -> u64 {
        self.v2 ^= 0xff;
        self.round();
        self.round();
        self.round();
        self.v0 ^ self.v1 ^ self.v2 ^ self.v3
    }
}

/// Every port of `address` that `worker` owns within the inclusive range, in ascending order.
pub fn owned_ports(
    address: Address,
    worker: WorkerId,
    workers: u16,
    range: std::ops::RangeInclusive<u16>,
) -> impl Iterator<Item = u16> {
    range.filter(move |&port| {
        owner(&Endpoint::new(address, crate::net::Port(port)), workers) == worker
    })
}

#[cfg(test)]
mod tests {
    use std::hash::Hasher;
    use std::net::SocketAddr;

    use super::*;
    use crate::net::Protocol;

    fn endpoint(text: &str) -> Endpoint {
        text.parse::<SocketAddr>()
            .expect("a literal address")
            .into()
    }

    #[test]
    fn clients_spread_evenly_over_the_workers() {
        for base in ["192.0.2.1:0", "[2001:db8::1]:0"] {
            let mut share = [0_u32; 4];
            for port in 1024..=65_535 {
                let client = Endpoint {
                    port: crate::net::Port(port),
                    ..endpoint(base)
                };
                share[usize::from(owner(&client, 4).0)] += 1;
            }
            assert!(
                share.iter().all(|&n| (15_000..17_300).contains(&n)),
                "{base}: {share:?}"
            );
        }
    }

    #[test]
    fn the_fingerprint_is_siphash_1_3() {
        let tuple = Tuple {
            protocol: Protocol::TCP,
            source: endpoint("192.0.2.1:40000"),
            destination: endpoint("[2001:db8::1]:80"),
        };
        let mut bytes = Vec::from(*tuple.source.address.bytes());
        bytes.extend_from_slice(tuple.destination.address.bytes());
        bytes.extend_from_slice(&40000_u16.to_be_bytes());
        bytes.extend_from_slice(&80_u16.to_be_bytes());
        bytes.extend_from_slice(&[6, 1, 0, 0]);
        // The standard library's default hasher is SipHash-1-3 with a key of zeros.
        let mut judge = std::hash::DefaultHasher::new();
        judge.write(&bytes);
        let key = FingerprintKey::default();
        assert_eq!(fingerprint(&tuple, Direction::Reply, &key), judge.finish());
    }

    #[test]
    fn fingerprints_depend_on_direction_and_key() {
        let tuple = Tuple {
            protocol: Protocol::UDP,
            source: endpoint("192.0.2.1:40000"),
            destination: endpoint("192.0.2.2:80"),
        };
        let key = FingerprintKey { key0: 7, key1: 9 };
        let other = FingerprintKey { key0: 7, key1: 10 };
        let one = fingerprint(&tuple, Direction::Reply, &key);
        assert_ne!(one, fingerprint(&tuple, Direction::Original, &key));
        assert_ne!(one, fingerprint(&tuple, Direction::Reply, &other));
    }
}
