//! IP addresses and CIDRs as Kubernetes writes them.
//!
//! Kubernetes reads addresses with a parser older than today's rules: leading zeros of an IPv4
//! octet are dropped and read as decimal, and an IPv4-mapped IPv6 address is the IPv4 address.
//! Everything in this crate reads addresses here, so that two spellings are one address. Nothing
//! here knows what an address is for, except `special`, which says why one cannot be a backend.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// The two address families.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in the order in which everything lists them.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// The family of an address.
    #[must_use]
    pub const fn of(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// Reads an address; `None` where Kubernetes would not read it either.
///
/// An IPv4-mapped IPv6 address comes back as IPv4; who must tell them apart asks `is_mapped` first.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse::<IpAddr>() {
        return Some(ip.to_canonical());
    }
    if text.contains(':') {
        // The dotted tail of an IPv6 address may carry leading zeros too.
        let (head, tail) = text.rsplit_once(':')?;
        let tail = parse_padded_v4(tail)?;
        let ip: Ipv6Addr = format!("{head}:{tail}").parse().ok()?;
        return Some(IpAddr::V6(ip).to_canonical());
    }
    parse_padded_v4(text).map(IpAddr::V4)
}

/// Whether the text is an IPv4 address written as IPv6 (`::ffff:a.b.c.d`).
#[must_use]
pub fn is_mapped(text: &str) -> bool {
    text.contains(':') && matches!(parse_ip(text), Some(IpAddr::V4(_)))
}

/// Why this address can be neither a backend nor an external address; `None` if it can.
#[must_use]
pub fn special(address: IpAddr) -> Option<&'static str> {
    if address.is_unspecified() {
        return Some("unspecified");
    }
    if address.is_loopback() {
        return Some("loopback");
    }
    if address.is_multicast() {
        return Some("multicast");
    }
    let link_local = match address {
        IpAddr::V4(v4) => v4.is_link_local(),
        IpAddr::V6(v6) => v6.is_unicast_link_local(),
    };
    link_local.then_some("link-local")
}

/// An address range, stored with its host bits cleared.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cidr {
    network: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// Clears the host bits of `address`; `None` if the prefix is longer than the address.
    #[must_use]
    pub fn new(address: IpAddr, prefix: u8) -> Option<Self> {
        let network = match address {
            IpAddr::V4(v4) if prefix <= 32 => {
                let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V4(Ipv4Addr::from(u32::from(v4) & mask))
            }
            IpAddr::V6(v6) if prefix <= 128 => {
                let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
                IpAddr::V6(Ipv6Addr::from(u128::from(v6) & mask))
            }
            _ => return None,
        };
        Some(Self { network, prefix })
    }

    /// The range that holds this address alone.
    #[must_use]
    pub const fn host(address: IpAddr) -> Self {
        let prefix = match address {
            IpAddr::V4(_) => 32,
            IpAddr::V6(_) => 128,
        };
        Self {
            network: address,
            prefix,
        }
    }

    /// Reads `address/prefix`; spaces around it are allowed, as in the API.
    #[must_use]
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = text.trim().split_once('/')?;
        let digits = !prefix.is_empty() && prefix.bytes().all(|b| b.is_ascii_digit());
        if !digits {
            return None;
        }
        let prefix: u8 = prefix.parse().ok()?;
        if is_mapped(address) {
            return Self::new(parse_ip(address)?, prefix.checked_sub(96)?);
        }
        Self::new(parse_ip(address)?, prefix)
    }

    /// The first address of the range.
    #[must_use]
    pub const fn network(&self) -> IpAddr {
        self.network
    }

    /// The number of leading bits that are fixed.
    #[must_use]
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// The family of its addresses.
    #[must_use]
    pub const fn family(&self) -> Family {
        Family::of(self.network)
    }

    /// Whether the address lies in the range; never for the other family.
    #[must_use]
    pub fn contains(&self, address: IpAddr) -> bool {
        Self::new(address, self.prefix).is_some_and(|other| other.network == self.network)
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.prefix)
    }
}

impl fmt::Debug for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

fn parse_padded_v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        let part = parts.next()?;
        if part.is_empty() || !part.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        let digits = part.trim_start_matches('0');
        *octet = if digits.is_empty() {
            0
        } else {
            digits.parse().ok()?
        };
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("a literal address")
    }

    #[test]
    fn leading_zeros_are_read_as_decimal() {
        assert_eq!(parse_ip("010.001.000.008"), Some(ip("10.1.0.8")));
        assert_eq!(parse_ip("10.0.0.256"), None);
        assert_eq!(parse_ip("10.0.0"), None);
        assert_eq!(parse_ip("10.0.0.1.2"), None);
        assert_eq!(parse_ip(""), None);
    }

    #[test]
    fn mapped_addresses_are_ipv4_and_known_as_such() {
        assert_eq!(parse_ip("::ffff:192.0.2.1"), Some(ip("192.0.2.1")));
        assert_eq!(parse_ip("::ffff:192.0.2.001"), Some(ip("192.0.2.1")));
        assert!(is_mapped("::ffff:192.0.2.1"));
        assert!(!is_mapped("192.0.2.1"));
        assert!(!is_mapped("2001:db8::1"));
    }

    #[test]
    fn special_addresses_are_named() {
        for (text, why) in [
            ("127.0.0.1", "loopback"),
            ("::1", "loopback"),
            ("169.254.1.1", "link-local"),
            ("fe80::1", "link-local"),
            ("224.0.0.1", "multicast"),
            ("ff02::1", "multicast"),
            ("0.0.0.0", "unspecified"),
            ("::", "unspecified"),
        ] {
            assert_eq!(special(ip(text)), Some(why), "{text}");
        }
        assert_eq!(special(ip("10.244.1.1")), None);
        assert_eq!(special(ip("fd00::1")), None);
    }

    #[test]
    fn cidrs_are_masked_and_contain_their_own_family() {
        let range = Cidr::parse(" 10.244.3.7/16 ").expect("a literal range");
        assert_eq!(range.to_string(), "10.244.0.0/16");
        assert!(range.contains(ip("10.244.255.1")));
        assert!(!range.contains(ip("10.245.0.1")));
        assert!(!range.contains(ip("2001:db8::1")));
        let all = Cidr::parse("::/0").expect("a literal range");
        assert!(all.contains(ip("2001:db8::1")));
        assert!(!all.contains(ip("10.0.0.1")));
        assert_eq!(Cidr::parse("10.0.0.0/33"), None);
        assert_eq!(Cidr::parse("10.0.0.0"), None);
        assert_eq!(Cidr::parse("10.0.0.0/+8"), None);
    }
}
