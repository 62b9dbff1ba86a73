//! What the engine serves: immutable tables and the epoch that numbers them.
//!
//! The dataplane owns this type and control fills it; nothing here decides policy. Services that did
//! not change are shared (`Arc`) with the epoch before. A frontend names a Service and which of its
//! choices it takes; a Service lists all its backends, those that keep their flows but get no new
//! ones (`draining`) included, so that a flow can be checked again after each change: a backend that
//! is in no list is gone.

use std::sync::Arc;
use std::time::Duration;

use hashbrown::{HashMap, HashSet};

use crate::net::{Address, Endpoint, MacAddr, Port, Protocol};

/// Number of a Service port, stable as long as it exists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct ServiceId(pub u32);

/// Number of a backend of one Service port, stable as long as its address is in any slice of it.
/// Also its index in the connection counts, hence below `MAX_BACKENDS`; a number that was freed is
/// given again as late as possible.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct BackendId(pub u32);

/// How many backends one node can serve at a time.
pub const MAX_BACKENDS: u32 = 1 << 20;

/// Which packets a frontend answers. The address is `Address::ANY` for a NodePort: every address
/// of this node.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct FrontendKey {
    /// Destination address.
    pub address: Address,
    /// Destination port.
    pub port: Port,
    /// IP protocol.
    pub protocol: Protocol,
}

/// A backend as the packet path sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Its number.
    pub id: BackendId,
    /// Where packets go.
    pub endpoint: Endpoint,
    /// Its share; 0 gets no new connections.
    pub weight: u16,
    /// Whether it runs on this node.
    pub local: bool,
    /// Whether it keeps its flows but is not chosen.
    pub draining: bool,
}

/// The IPVS schedulers and maglev.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum SchedulerKind {
    /// Round robin.
    #[default]
    RoundRobin,
    /// A random backend.
    Random,
}

/// One Service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its number.
    pub id: ServiceId,
    /// `namespace/name:port`.
    pub name: Arc<str>,
    /// How a backend is chosen.
    pub scheduler: SchedulerKind,
    /// `ClientIP` affinity.
    pub affinity: Option<Duration>,
    /// All backends, draining ones last.
    pub backends: Vec<Backend>,
    /// Lists of indices into `backends`, each the candidates of some frontends; no duplicates.
    pub choices: Vec<Box<[u32]>>,
}

impl Service {
    /// The backend with this number, if it is in any slice of the Service.
    #[must_use]
    pub fn backend(&self, id: BackendId) -> Option<&Backend> {
        self.backends.iter().find(|backend| backend.id == id)
    }
}

/// When the source address is replaced by an address of this node (hairpin is always besides).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Masquerade {
    /// For every client.
    Always,
    /// For clients outside the cluster's pod ranges.
    OffCluster,
    /// Not for this frontend.
    Never,
}

/// What a packet gets where there is no backend.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum WhenEmpty {
    /// TCP reset or ICMP unreachable.
    Reject,
    /// Nothing.
    Drop,
}

/// An address:port/protocol that we answer for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// Its Service port.
    pub service: Arc<Service>,
    /// Index into `service.choices` for clients outside the cluster.
    pub outside: u32,
    /// Index into `service.choices` for clients inside (pods, host processes).
    pub inside: u32,
    /// Source address replacement for clients outside the cluster.
    pub masquerade: Masquerade,
    /// Source address replacement for clients inside.
    pub inside_masquerade: Masquerade,
    /// Allowed client prefixes; empty: all.
    pub source_ranges: Box<[Prefix]>,
    /// What clients outside get without a backend; those inside are rejected.
    pub when_empty: WhenEmpty,
}

/// An address prefix.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct Prefix {
    address: Address,
    /// Length in the sixteen-byte form: 96 more for IPv4.
    length: u8,
}

impl Prefix {
    /// Masks `address` to `length` bits of its family; `None` if the family has fewer.
    #[must_use]
    pub fn new(address: Address, length: u8) -> Option<Self> {
        let (most, shift) = if address.is_v4() { (32, 96) } else { (128, 0) };
        (length <= most).then(|| Self {
            address: mask(address, length + shift),
            length: length + shift,
        })
    }

    /// Whether the address lies in it. The families never meet.
    #[must_use]
    pub fn contains(&self, address: Address) -> bool {
        mask(address, self.length) == self.address && address.is_v4() == self.address_is_v4()
    }

    fn address_is_v4(&self) -> bool {
        self.length >= 96 && self.address.is_v4()
    }
}

fn mask(address: Address, length: u8) -> Address {
    let value = u128::from_be_bytes(*address.bytes());
    let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
    Address::from_bytes((value & mask).to_be_bytes())
}

/// Where the kernel would send a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Out of which device.
    pub ifindex: u32,
    /// By which router; `None`: the destination itself is on the link.
    pub gateway: Option<Address>,
    /// The source address that the kernel would use.
    pub source: Option<Address>,
}

/// The kernel's main routing table and neighbours.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Fib {
    /// Prefix lengths that occur (sixteen-byte form), longest first, with their routes.
    lengths: Vec<(u8, HashMap<Address, Route>)>,
    neighbors: HashMap<(u32, Address), MacAddr>,
}

/// The way to the next station.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Hop {
    /// Out of which device.
    pub ifindex: u32,
    /// The next station's MAC, if the kernel has resolved it.
    pub mac: Option<MacAddr>,
    /// The source address that the kernel would use.
    pub source: Option<Address>,
}

impl Fib {
    /// From routes and resolved neighbours. Of two routes of one prefix the first counts.
    #[must_use]
    pub fn new(
        routes: impl IntoIterator<Item = (Prefix, Route)>,
        neighbors: impl IntoIterator<Item = ((u32, Address), MacAddr)>,
    ) -> Self {
        let mut fib = Self {
            lengths: Vec::new(),
            neighbors: neighbors.into_iter().collect(),
        };
        for (prefix, route) in routes {
            let at = fib
                .lengths
                .binary_search_by(|(length, _)| prefix.length.cmp(length));
            let at = at.unwrap_or_else(|at| {
                fib.lengths.insert(at, (prefix.length, HashMap::new()));
                at
            });
            if let Some((_, routes)) = fib.lengths.get_mut(at) {
                routes.entry(prefix.address).or_insert(route);
            }
        }
        fib
    }

    /// The longest match. The default routes of the two families are told apart by the family of
    /// their prefix: IPv4's is `::ffff:0:0/96`.
    #[must_use]
    pub fn hop(&self, destination: Address) -> Option<Hop> {
        let v4 = destination.is_v4();
        self.lengths
            .iter()
            .filter(|(length, _)| !v4 || *length >= 96)
            .find_map(|(length, routes)| routes.get(&mask(destination, *length)))
            .map(|route| {
                let next = route.gateway.unwrap_or(destination);
                Hop {
                    ifindex: route.ifindex,
                    mac: self.neighbors.get(&(route.ifindex, next)).copied(),
                    source: route.source,
                }
            })
    }
}

/// What the engine knows of a network device of this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeDevice {
    /// Its own MAC.
    pub mac: MacAddr,
    /// Number of the uplink, if it is one.
    pub uplink: Option<u8>,
    /// Whether a pod stands behind it: the near end of a veth pair.
    pub is_pod: bool,
    /// Whether a program of ours stands at its ingress (tc), which lets marked packets pass.
    pub hooked_ingress: bool,
    /// The same at its egress.
    pub hooked_egress: bool,
    /// Largest IP packet.
    pub mtu: u32,
}

/// This node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Every local address but loopback ones.
    pub addresses: HashSet<Address>,
    /// "Inside the cluster"; empty: only who arrives by a pod device.
    pub cluster_ranges: Vec<Prefix>,
    /// Configured SNAT addresses, one per family at most; they win over the route's source.
    pub snat_addresses: Vec<Address>,
    /// Devices by ifindex.
    pub devices: HashMap<u32, NodeDevice>,
}

/// Everything that a worker reads: one pointer swap publishes it.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Its number; grows with every publication.
    pub epoch: u64,
    frontends: Arc<HashMap<FrontendKey, Frontend>>,
    services: Arc<HashMap<ServiceId, Arc<Service>>>,
    masquerade_addresses: Arc<[Address]>,
    /// This node.
    pub node: Arc<Node>,
    /// Its routes and neighbours.
    pub fib: Arc<Fib>,
}

/// Why tables were refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum SnapshotError {
    /// Two Services claim one frontend.
    #[error("{key:?} is claimed by {first} and by {second}; the first serves it")]
    DuplicateFrontend {
        /// Of which frontend.
        key: FrontendKey,
        /// Who came first.
        first: Arc<str>,
        /// Who came second.
        second: Arc<str>,
    },
    /// A frontend points outside its Service's choices, or a choice outside its backends.
    #[error("{service} has a frontend whose backend list does not exist; this is a bug in control")]
    DanglingChoice {
        /// Of which Service.
        service: Arc<str>,
    },
    /// A backend's number is too large.
    #[error("{service} has backend number {id}, {MAX_BACKENDS} is the limit; it is left out")]
    TooManyBackends {
        /// Of which Service.
        service: Arc<str>,
        /// The number.
        id: u32,
    },
}

/// Collects frontends and checks them; what is wrong is left out and reported.
#[derive(Debug, Default)]
pub struct SnapshotBuilder {
    frontends: HashMap<FrontendKey, Frontend>,
    services: HashMap<ServiceId, Arc<Service>>,
    errors: Vec<SnapshotError>,
}

impl SnapshotBuilder {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a Service port and the frontends that lead to it.
    pub fn service(
        &mut self,
        service: &Arc<Service>,
        frontends: impl IntoIterator<Item = (FrontendKey, Frontend)>,
    ) {
        if let Some(backend) = service.backends.iter().find(|b| b.id.0 >= MAX_BACKENDS) {
            let service = Arc::clone(&service.name);
            return self.errors.push(SnapshotError::TooManyBackends {
                service,
                id: backend.id.0,
            });
        }
        self.services.insert(service.id, Arc::clone(service));
        for (key, frontend) in frontends {
            self.frontend(key, frontend);
        }
    }

    fn frontend(&mut self, key: FrontendKey, frontend: Frontend) {
        let service = &frontend.service;
        let reach = u32::try_from(service.backends.len()).unwrap_or(u32::MAX);
        let sound = [frontend.outside, frontend.inside].iter().all(|&choice| {
            let choice = usize::try_from(choice)
                .ok()
                .and_then(|at| service.choices.get(at));
            choice.is_some_and(|list| list.iter().all(|&index| index < reach))
        });
        if !sound {
            let service = Arc::clone(&service.name);
            return self.errors.push(SnapshotError::DanglingChoice { service });
        }
        if let Some(first) = self.frontends.get(&key) {
            let first = Arc::clone(&first.service.name);
            let second = Arc::clone(&service.name);
            return self
                .errors
                .push(SnapshotError::DuplicateFrontend { key, first, second });
        }
        self.frontends.insert(key, frontend);
    }

    /// The finished tables and what was left out.
    #[must_use]
    pub fn build(
        self,
        epoch: u64,
        node: Arc<Node>,
        fib: Arc<Fib>,
    ) -> (Snapshot, Vec<SnapshotError>) {
        let snapshot = Snapshot {
            epoch,
            frontends: Arc::new(self.frontends),
            services: Arc::new(self.services),
            masquerade_addresses: masquerade_addresses(&node, &fib),
            node,
            fib,
        };
        (snapshot, self.errors)
    }
}

impl Snapshot {
    /// The same Services under other routes, neighbours, addresses or devices.
    #[must_use]
    pub fn with_node(&self, epoch: u64, node: Arc<Node>, fib: Arc<Fib>) -> Self {
        Self {
            epoch,
            masquerade_addresses: masquerade_addresses(&node, &fib),
            node,
            fib,
            ..self.clone()
        }
    }

    /// Who answers for this destination: the exact address, else a NodePort if the address is
    /// one of this node.
    #[must_use]
    #[inline]
    pub fn frontend(&self, destination: &Endpoint, protocol: Protocol) -> Option<&Frontend> {
        let Endpoint { address, port } = *destination;
        let exact = FrontendKey {
            address,
            port,
            protocol,
        };
        self.frontends.get(&exact).or_else(|| {
            let any = FrontendKey {
                address: Address::ANY,
                ..exact
            };
            self.frontends
                .get(&any)
                .filter(|_| self.node.addresses.contains(&address))
        })
    }

    /// All frontends, for the programs' map and for comparisons.
    pub fn frontends(&self) -> impl Iterator<Item = (&FrontendKey, &Frontend)> {
        self.frontends.iter()
    }

    /// Every address that a flow may be masqueraded with.
    #[must_use]
    pub fn masquerade_addresses(&self) -> &[Address] {
        &self.masquerade_addresses
    }

    /// A Service port by number.
    #[must_use]
    #[inline]
    pub fn service(&self, id: ServiceId) -> Option<&Arc<Service>> {
        self.services.get(&id)
    }

    /// All Service ports.
    pub fn services(&self) -> impl Iterator<Item = &Arc<Service>> {
        self.services.values()
    }
}

fn masquerade_addresses(node: &Node, fib: &Fib) -> Arc<[Address]> {
    let routes = fib.lengths.iter().flat_map(|(_, routes)| routes.values());
    let sources: HashSet<Address> = routes
        .filter_map(|route| route.source)
        .chain(node.snat_addresses.iter().copied())
        .collect();
    sources.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use std::net::IpAddr;

    use super::*;

    fn address(text: &str) -> Address {
        text.parse::<IpAddr>().expect("a literal address").into()
    }

    fn prefix(text: &str, length: u8) -> Prefix {
        Prefix::new(address(text), length).expect("a literal prefix")
    }

    fn route(ifindex: u32) -> Route {
        Route {
            ifindex,
            gateway: None,
            source: None,
        }
    }

    #[test]
    fn prefixes_hold_their_family_only() {
        assert!(prefix("10.0.0.0", 8).contains(address("10.1.2.3")));
        assert!(!prefix("10.0.0.0", 8).contains(address("11.1.2.3")));
        assert!(prefix("0.0.0.0", 0).contains(address("203.0.113.1")));
        assert!(!prefix("0.0.0.0", 0).contains(address("2001:db8::1")));
        assert!(!prefix("::", 0).contains(address("203.0.113.1")));
        assert!(prefix("::", 0).contains(address("2001:db8::1")));
        assert!(Prefix::new(address("10.0.0.0"), 33).is_none());
    }

    #[test]
    fn the_longest_route_wins_and_families_keep_apart() {
        let fib = Fib::new(
            [
                (prefix("0.0.0.0", 0), route(1)),
                (prefix("10.244.0.0", 16), route(2)),
                (prefix("10.244.1.10", 32), route(3)),
                (prefix("2001:db8::", 64), route(4)),
                (prefix("::", 0), route(5)),
            ],
            [],
        );
        let out = |text| fib.hop(address(text)).map(|hop| hop.ifindex);
        assert_eq!(out("203.0.113.1"), Some(1));
        assert_eq!(out("10.244.2.1"), Some(2));
        assert_eq!(out("10.244.1.10"), Some(3));
        assert_eq!(out("2001:db8::9"), Some(4));
        assert_eq!(out("2001:db8:1::9"), Some(5));
        let v6_only = Fib::new([(prefix("::", 0), route(5))], []);
        assert_eq!(v6_only.hop(address("203.0.113.1")), None);
    }

    #[test]
    fn a_hop_names_the_gateways_mac() {
        let gateway = address("192.0.2.254");
        let mac = MacAddr([2, 0, 0, 0, 0, 1]);
        let via = Route {
            gateway: Some(gateway),
            ..route(1)
        };
        let fib = Fib::new([(prefix("0.0.0.0", 0), via)], [((1, gateway), mac)]);
        assert_eq!(
            fib.hop(address("203.0.113.1")).and_then(|hop| hop.mac),
            Some(mac)
        );
    }

    #[test]
    fn other_routes_bring_other_masquerade_addresses() {
        let from = |source| Route {
            source: Some(address(source)),
            ..route(1)
        };
        let fib = |source| Arc::new(Fib::new([(prefix("0.0.0.0", 0), from(source))], []));
        let node = Arc::new(Node::default());
        let build = SnapshotBuilder::new().build(1, Arc::clone(&node), fib("192.0.2.1"));
        let moved = build.0.with_node(2, node, fib("192.0.2.2"));
        assert_eq!(moved.masquerade_addresses(), [address("192.0.2.2")]);
    }
}
