//! The kernel's addresses, routes and neighbours, and the next hops that follow from them.
//!
//! Plain tables, read from rtnetlink's messages: this node's addresses, the main routing table of
//! both families, and who answers at the link layer. `fib` turns them into what the engine looks
//! up. Limits: policy rules and other tables are not followed, and of several next hops of one
//! route the first is taken. What has no next hop here goes through the kernel, which knows better.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHopFlags,
    RouteType, RouteVia,
};

use dataplane::net::MacAddr;
use dataplane::snapshot as engine;

use crate::address::{Cidr, Family};

/// An address of a device of this node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InterfaceAddress {
    /// The device.
    pub ifindex: u32,
    /// The address.
    pub address: IpAddr,
    /// The range that is on the link with it.
    pub subnet: Cidr,
    /// Whether the kernel would take it as source of a packet that leaves the node.
    pub is_source: bool,
}

/// A route of the main table.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Route {
    /// Where it leads to.
    pub destination: Cidr,
    /// The lower, the better.
    pub metric: u32,
    /// Out of which device.
    pub ifindex: u32,
    /// By which router.
    pub gateway: Option<IpAddr>,
    /// The source address that it names.
    pub source: Option<IpAddr>,
    /// Who made it (`rtm_protocol`).
    pub protocol: u8,
}

/// Who answers for an address on a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Neighbor {
    /// Its MAC.
    pub mac: MacAddr,
    /// Whether the kernel has not heard of it for a while.
    pub is_stale: bool,
}

/// What the kernel knows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tables {
    /// In the kernel's order, which decides among several.
    pub addresses: Vec<InterfaceAddress>,
    /// Sorted: by destination, then the best first.
    pub routes: Vec<Route>,
    /// By device and address; only those with a usable MAC.
    pub neighbors: BTreeMap<(u32, IpAddr), Neighbor>,
}

impl Tables {
    /// Every address of this node, loopback ones included.
    #[must_use]
    pub fn local_addresses(&self) -> BTreeSet<IpAddr> {
        self.addresses.iter().map(|entry| entry.address).collect()
    }

    /// The address of this node that others know: the first of `known` that a device carries,
    /// else the source of the default route, else any that can leave the node.
    #[must_use]
    pub fn node_address(&self, family: Family, known: &[IpAddr]) -> Option<IpAddr> {
        let carried = |ip: &&IpAddr| self.addresses.iter().any(|entry| entry.address == **ip);
        let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
        let by_name = known.iter().filter(of_family).find(carried).copied();
        let by_route = || {
            let is_default = |route: &&Route| {
                route.destination.prefix() == 0 && route.destination.family() == family
            };
            self.source(self.routes.iter().find(is_default)?)
        };
        let any = || {
            let mut usable = self.addresses.iter().filter(|entry| entry.is_source);
            usable
                .find(|entry| Family::of(entry.address) == family)
                .map(|entry| entry.address)
        };
        by_name.or_else(by_route).or_else(any)
    }

    /// What the engine looks up. Routes that `hidden` (a protocol number) made are left out.
    #[must_use]
    pub fn fib(&self, hidden: u8) -> engine::Fib {
        let routes = self.routes.iter().filter(|route| route.protocol != hidden);
        let routes = routes.filter_map(|route| {
            let prefix = route.destination;
            let prefix = engine::Prefix::new(prefix.network().into(), prefix.prefix())?;
            let hop = engine::Route {
                ifindex: route.ifindex,
                gateway: route.gateway.map(Into::into),
                source: self.source(route).map(Into::into),
            };
            Some((prefix, hop))
        });
        let neighbors = self.neighbors.iter();
        engine::Fib::new(
            routes,
            neighbors.map(|((ifindex, ip), neighbor)| ((*ifindex, (*ip).into()), neighbor.mac)),
        )
    }

    /// The stations that packets to these backends go to next: routers, and backends on a link.
    /// Sorted, at most `most`.
    #[must_use]
    pub fn stations(
        &self,
        backends: impl Iterator<Item = IpAddr>,
        hidden: u8,
        most: usize,
    ) -> BTreeSet<(u32, IpAddr)> {
        let routes = || self.routes.iter().filter(|route| route.protocol != hidden);
        let routers = routes().filter_map(|route| Some((route.ifindex, route.gateway?)));
        let host = |range: &Cidr| *range == Cidr::host(range.network());
        let on_link: Vec<&Route> = routes()
            .filter(|route| route.gateway.is_none() && !host(&route.destination))
            .collect();
        let neighbours = backends.filter_map(|ip| {
            let link = on_link
                .iter()
                .find(|route| route.destination.contains(ip))?;
            Some((link.ifindex, ip))
        });
        routers.chain(neighbours).take(most).collect()
    }

    /// Whether the kernel must be asked to find a station, or to check that it is still there: it
    /// does so by itself only for packets that it sends.
    #[must_use]
    pub fn is_in_doubt(&self, station: &(u32, IpAddr)) -> bool {
        self.neighbors
            .get(station)
            .is_none_or(|neighbor| neighbor.is_stale)
    }

    /// Takes a neighbour message in. Tells whether a usable MAC changed.
    pub(crate) fn apply_neighbor(&mut self, message: &NeighbourMessage, is_gone: bool) -> bool {
        let Some((key, neighbor)) = neighbor_from_message(message) else {
            return false;
        };
        let before = match neighbor.filter(|_| !is_gone) {
            Some(neighbor) => self.neighbors.insert(key, neighbor),
            None => self.neighbors.remove(&key),
        };
        let now = self.neighbors.get(&key);
        before.map(|neighbor| neighbor.mac) != now.map(|neighbor| neighbor.mac)
    }

    /// The source address of packets that take this route: the named one, else the address of the
    /// device that shares a range with the router or destination, else its first, else any.
    fn source(&self, route: &Route) -> Option<IpAddr> {
        if route.source.is_some() {
            return route.source;
        }
        let family = route.destination.family();
        let next = route.gateway.unwrap_or_else(|| route.destination.network());
        let of_family =
            |entry: &&InterfaceAddress| entry.is_source && Family::of(entry.address) == family;
        let candidates = || self.addresses.iter().filter(of_family);
        let on_device = || candidates().filter(|entry| entry.ifindex == route.ifindex);
        on_device()
            .find(|entry| entry.subnet.contains(next))
            .or_else(|| on_device().next())
            .or_else(|| candidates().next())
            .map(|entry| entry.address)
    }
}

/// Reads an address message.
pub(crate) fn address_from_message(message: &AddressMessage) -> Option<InterfaceAddress> {
    let mut local = None;
    let mut address = None;
    let mut flags = AddressFlags::from_bits_retain(u32::from(message.header.flags.bits()));
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let unusable = AddressFlags::Tentative | AddressFlags::Dadfailed | AddressFlags::Deprecated;
    let global = matches!(
        message.header.scope,
        AddressScope::Universe | AddressScope::Site
    );
    Some(InterfaceAddress {
        ifindex: message.header.index,
        address: local.or(address)?,
        // With a point-to-point address the range is the other end's.
        subnet: Cidr::new(address.or(local)?, message.header.prefix_len)?,
        is_source: global && !flags.intersects(unusable),
    })
}

/// Reads a route message; `None` for what is not a usable route of the main table.
pub(crate) fn route_from_message(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.flags.contains(RouteFlags::Dead) {
        return None;
    }
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => std::net::Ipv4Addr::UNSPECIFIED.into(),
        AddressFamily::Inet6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
        _ => return None,
    };
    let mut table = u32::from(header.table);
    let mut destination = any;
    let mut metric = 0;
    let mut source = None;
    let mut hop = Hop::default();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::Priority(priority) => metric = *priority,
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::MultiPath(hops) => {
                let alive = |flags: RouteNextHopFlags| !flags.contains(RouteNextHopFlags::Dead);
                let first = hops.iter().find(|hop| alive(hop.flags))?;
                hop.ifindex = Some(first.interface_index);
                first.attributes.iter().for_each(|part| hop.read(part));
            }
            other => hop.read(other),
        }
    }
    if table != u32::from(RouteHeader::RT_TABLE_MAIN) {
        return None;
    }
    Some(Route {
        destination: Cidr::new(destination, header.destination_prefix_length)?,
        metric,
        ifindex: hop.ifindex?,
        gateway: hop.gateway,
        source,
        protocol: header.protocol.into(),
    })
}

#[derive(Default)]
struct Hop {
    ifindex: Option<u32>,
    gateway: Option<IpAddr>,
}

impl Hop {
    fn read(&mut self, attribute: &RouteAttribute) {
        match attribute {
            RouteAttribute::Oif(ifindex) => self.ifindex = Some(*ifindex),
            RouteAttribute::Gateway(address) => self.gateway = ip(address),
            RouteAttribute::Via(RouteVia::Inet(address)) => self.gateway = Some((*address).into()),
            RouteAttribute::Via(RouteVia::Inet6(address)) => self.gateway = Some((*address).into()),
            _ => {}
        }
    }
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

/// Which entry a message is about, and its MAC if it is usable.
pub(crate) fn neighbor_from_message(
    message: &NeighbourMessage,
) -> Option<((u32, IpAddr), Option<Neighbor>)> {
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some((*v4).into())
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some((*v6).into())
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddr);
            }
            _ => {}
        }
    }
    let address: IpAddr = address?;
    if address.is_multicast() {
        return None;
    }
    let is_stale = match message.header.state {
        NeighbourState::Stale => Some(true),
        NeighbourState::Reachable
        | NeighbourState::Delay
        | NeighbourState::Probe
        | NeighbourState::Permanent
        | NeighbourState::Noarp => Some(false),
        _ => None,
    };
    let neighbor = mac
        .zip(is_stale)
        .map(|(mac, is_stale)| Neighbor { mac, is_stale });
    Some(((message.header.ifindex, address), neighbor))
}
