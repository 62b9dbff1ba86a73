//! The plan of the lab: who sits where, under which address, and which Services there are. Nothing is made here.
//!
//! ```text
//!   client 192.0.2.100 ---.                     .--- cali1a  n1a 10.244.1.10    routed
//!                          |                    |--- cali1b  n1b 10.244.1.11    routed
//!   wire (bridge) ---------+--- eth0  n1  ------+
//!   192.0.2.1              |    192.0.2.11      |          .- vethc n1c 10.244.1.130
//!                          |      |             '--- br0 --+                    one bridge
//!                          |   vxlan0                      '- vethd n1d 10.244.1.131
//!                          |      :
//!                          |   vxlan0           .--- cali2a  n2a 10.244.2.10    routed
//!                          '--- eth0  n2  ------+--- cali2b  n2b 10.244.2.11    routed
//!                               192.0.2.12      '--- cali2v  n2v 10.244.3.10    reached by n1 through vxlan0 only
//! ```
//!
//! Rule to keep: addresses come from the documentation ranges and from the ranges that clusters use by default;
//! nothing of this machine's own networks is touched.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// IPv4 or IPv6.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

/// What the lab's clients speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A namespace of the lab.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Site {
    /// The bridge that joins client and nodes, and the gateway of all three.
    Wire,
    /// Outside of the cluster.
    Client,
    /// The first node.
    N1,
    /// The second node.
    N2,
    /// A pod, by its place in [`PODS`].
    Pod(usize),
}

/// How a pod is joined to its node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attachment {
    /// As Calico does it: host routes to a veth without addresses, gateways 169.254.1.1 and fe80::1.
    Routed,
    /// A port of the node's bridge, in hairpin mode.
    Bridged,
    /// Routed at its own node, but other nodes reach it through the VXLAN device only.
    Overlay,
}

/// A pod of the lab.
#[derive(Clone, Copy, Debug)]
pub struct Pod {
    /// Its name; also the name of the Service that has only this backend.
    pub name: &'static str,
    /// The node it runs on.
    pub node: Site,
    /// How it is joined.
    pub attachment: Attachment,
    /// The node's end of its veth.
    pub host_end: &'static str,
    /// Its IPv4 address.
    pub v4: Ipv4Addr,
    /// Its IPv6 address.
    pub v6: Ipv6Addr,
}

/// A Service of the lab, with a TCP and a UDP port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Service {
    /// Its name.
    pub name: String,
    /// Distinguishes its cluster IPs and node port.
    pub number: u8,
    /// Pods by name.
    pub backends: Vec<String>,
    /// Whether it has the load-balancer address.
    pub balanced: bool,
}

const fn pod6(node: u16, subnet: u16, host: u16) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, node, subnet, 0, 0, host)
}

/// All pods.
pub const PODS: [Pod; 7] = [
    Pod {
        name: "n1a",
        node: Site::N1,
        attachment: Attachment::Routed,
        host_end: "cali1a",
        v4: Ipv4Addr::new(10, 244, 1, 10),
        v6: pod6(1, 0, 0x10),
    },
    Pod {
        name: "n1b",
        node: Site::N1,
        attachment: Attachment::Routed,
        host_end: "cali1b",
        v4: Ipv4Addr::new(10, 244, 1, 11),
        v6: pod6(1, 0, 0x11),
    },
    Pod {
        name: "n1c",
        node: Site::N1,
        attachment: Attachment::Bridged,
        host_end: "vethc",
        v4: Ipv4Addr::new(10, 244, 1, 130),
        v6: pod6(1, 0xb, 0x10),
    },
    Pod {
        name: "n1d",
        node: Site::N1,
        attachment: Attachment::Bridged,
        host_end: "vethd",
        v4: Ipv4Addr::new(10, 244, 1, 131),
        v6: pod6(1, 0xb, 0x11),
    },
    Pod {
        name: "n2a",
        node: Site::N2,
        attachment: Attachment::Routed,
        host_end: "cali2a",
        v4: Ipv4Addr::new(10, 244, 2, 10),
        v6: pod6(2, 0, 0x10),
    },
    Pod {
        name: "n2b",
        node: Site::N2,
        attachment: Attachment::Routed,
        host_end: "cali2b",
        v4: Ipv4Addr::new(10, 244, 2, 11),
        v6: pod6(2, 0, 0x11),
    },
    Pod {
        name: "n2v",
        node: Site::N2,
        attachment: Attachment::Overlay,
        host_end: "cali2v",
        v4: Ipv4Addr::new(10, 244, 3, 10),
        v6: pod6(3, 0, 0x10),
    },
];

/// The port every pod serves, TCP and UDP.
pub const POD_PORT: u16 = 8080;
/// The port every Service serves at its cluster and load-balancer addresses.
pub const SERVICE_PORT: u16 = 80;
/// A port on the nodes themselves, as SSH would have it.
pub const NODE_PORT_OF_ITS_OWN: u16 = 22;

/// Gateway of node bridge, IPv4.
pub const BRIDGE_V4: Ipv4Addr = Ipv4Addr::new(10, 244, 1, 129);
/// Gateway of node bridge, IPv6.
pub const BRIDGE_V6: Ipv6Addr = pod6(1, 0xb, 1);

/// The load-balancer address of a family; the client's route to it leads to the first node.
#[must_use]
pub const fn load_balancer(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(203, 0, 113, 10)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, 0x10)),
    }
}

/// The address on the wire of client and nodes, and a pod's only one.
#[must_use]
pub fn address(site: Site, family: Family) -> IpAddr {
    let host: u8 = match site {
        Site::Wire => 1,
        Site::N1 => 11,
        Site::N2 => 12,
        Site::Client => 100,
        Site::Pod(at) => return PODS[at].address(family),
    };
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(192, 0, 2, host)),
        // The same digits in both families read better than the same numbers.
        Family::V6 => IpAddr::V6(Ipv6Addr::new(
            0x2001,
            0xdb8,
            0,
            0,
            0,
            0,
            0,
            same_digits(host),
        )),
    }
}

/// The number whose hexadecimal digits are `number`'s decimal ones.
const fn same_digits(number: u8) -> u16 {
    let number = number as u16;
    number / 100 * 0x100 + number / 10 % 10 * 0x10 + number % 10
}

/// The address of a node's VXLAN device.
#[must_use]
pub const fn overlay_address(node: Site, family: Family) -> IpAddr {
    let host = if matches!(node, Site::N1) { 1 } else { 2 };
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(198, 51, 100, host)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0xfe, 0, 0, 0, 0, host as u16)),
    }
}

/// Every address that belongs to a node itself: what a masqueraded packet may carry as source.
#[must_use]
pub fn node_addresses(node: Site) -> Vec<IpAddr> {
    let mut all = Vec::new();
    for family in [Family::V4, Family::V6] {
        all.push(address(node, family));
        all.push(overlay_address(node, family));
    }
    if node == Site::N1 {
        all.extend([IpAddr::V4(BRIDGE_V4), IpAddr::V6(BRIDGE_V6)]);
    }
    all
}

/// Looks a pod up by its name.
#[must_use]
pub fn pod(name: &str) -> Option<Site> {
    PODS.iter().position(|pod| pod.name == name).map(Site::Pod)
}

/// The Services of the lab: `web` with backends on both nodes, and one for each pod, named as the pod is.
#[must_use]
pub fn services() -> Vec<Service> {
    let web = ["n1a", "n1b", "n2a", "n2b"].map(str::to_owned).to_vec();
    let mut all = vec![Service {
        name: "web".to_owned(),
        number: 10,
        backends: web,
        balanced: true,
    }];
    for (number, pod) in (11..).zip(PODS) {
        let name = pod.name.to_owned();
        all.push(Service {
            backends: vec![name.clone()],
            name,
            number,
            balanced: false,
        });
    }
    all
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// `4` or `6`.
    #[must_use]
    pub const fn digit(self) -> char {
        match self {
            Self::V4 => '4',
            Self::V6 => '6',
        }
    }

    /// `IPv4` or `IPv6`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        }
    }
}

impl Protocol {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Tcp, Self::Udp];

    /// `tcp` or `udp`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        }
    }
}

impl Site {
    /// Every namespace of the lab.
    pub fn all() -> impl Iterator<Item = Self> {
        let pods = (0..PODS.len()).map(Self::Pod);
        [Self::Wire, Self::Client, Self::N1, Self::N2]
            .into_iter()
            .chain(pods)
    }

    /// What the namespace is called behind the lab's prefix.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Wire => "wire",
            Self::Client => "client",
            Self::N1 => "n1",
            Self::N2 => "n2",
            Self::Pod(at) => PODS[at].name,
        }
    }
}

impl Pod {
    /// Its address of a family.
    #[must_use]
    pub const fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }
}

impl Service {
    /// Its cluster IP of a family.
    #[must_use]
    pub const fn cluster_ip(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(Ipv4Addr::new(10, 96, 0, self.number)),
            Family::V6 => {
                let digits = same_digits(self.number);
                IpAddr::V6(Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, digits))
            }
        }
    }

    /// Its node port, the same for TCP and UDP.
    #[must_use]
    pub const fn node_port(&self) -> u16 {
        30_000 + self.number as u16
    }

    /// `cluster IP:port`.
    #[must_use]
    pub fn at_cluster_ip(&self, family: Family) -> SocketAddr {
        SocketAddr::new(self.cluster_ip(family), SERVICE_PORT)
    }

    /// `node address:node port`.
    #[must_use]
    pub fn at_node(&self, node: Site, family: Family) -> SocketAddr {
        SocketAddr::new(address(node, family), self.node_port())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_two_families_carry_the_same_digits() {
        assert_eq!(address(Site::N2, Family::V4).to_string(), "192.0.2.12");
        assert_eq!(address(Site::N2, Family::V6).to_string(), "2001:db8::12");
        let web = &services()[0];
        assert_eq!(web.cluster_ip(Family::V4).to_string(), "10.96.0.10");
        assert_eq!(web.cluster_ip(Family::V6).to_string(), "fd00:10:96::10");
    }

    #[test]
    fn no_address_is_given_twice() {
        for family in Family::ALL {
            let mut all: Vec<_> = Site::all().map(|site| address(site, family)).collect();
            all.sort();
            all.dedup();
            assert_eq!(all.len(), Site::all().count());
        }
    }
}
