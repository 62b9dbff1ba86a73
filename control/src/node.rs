//! This node and what the other Nodes tell about the cluster.
//!
//! Name, zone, addresses and pod ranges; which addresses answer NodePorts. Addresses come from the
//! Node object until the kernel's are known, which count from then on: a Node can list addresses
//! that no device carries.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as api;

use crate::address::{Cidr, Family, parse_ip};

/// A Node object, as far as it matters here.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Node {
    /// Its zone, empty if it has none.
    pub zone: String,
    /// Internal addresses first, then external ones.
    pub addresses: Vec<IpAddr>,
    /// The ranges of its pods.
    pub pod_cidrs: Vec<Cidr>,
}

/// Why a Node cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NodeError {
    /// A pod range is no CIDR.
    #[error("spec.podCIDRs: {0:?} is no CIDR")]
    PodCidr(String),
    /// An address is no IP address.
    #[error("status.addresses: {0:?} is no IP address")]
    Address(String),
}

impl Node {
    /// Checks a Node object.
    ///
    /// # Errors
    /// A range or address that cannot be read.
    pub fn from_api(object: &api::Node) -> Result<Self, NodeError> {
        let labels = object.metadata.labels.as_ref();
        let zone = labels.and_then(|labels| labels.get(ZONE)).cloned();
        let status = object.status.as_ref();
        let listed = status.and_then(|status| status.addresses.as_deref());
        let mut addresses = Vec::new();
        for kind in ["InternalIP", "ExternalIP"] {
            for entry in listed
                .unwrap_or_default()
                .iter()
                .filter(|entry| entry.type_ == kind)
            {
                let bad = || NodeError::Address(entry.address.clone());
                let address = parse_ip(&entry.address).ok_or_else(bad)?;
                if !addresses.contains(&address) {
                    addresses.push(address);
                }
            }
        }
        let spec = object.spec.clone().unwrap_or_default();
        let mut ranges = spec.pod_cidrs.unwrap_or_default();
        if ranges.is_empty() {
            ranges.extend(spec.pod_cidr);
        }
        let ranges = ranges.into_iter().filter(|text| !text.is_empty());
        let pod_cidrs = ranges
            .map(|text| Cidr::parse(&text).ok_or(NodeError::PodCidr(text)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            zone: zone.unwrap_or_default(),
            addresses,
            pod_cidrs,
        })
    }
}

/// Which of the node's addresses answer NodePorts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum NodePortAddresses {
    /// Every local address but loopback ones.
    #[default]
    All,
    /// The node's first address of each family (`primary`).
    Primary,
    /// Those in one of the ranges; a family without a range is not narrowed.
    Within(Vec<Cidr>),
}

impl NodePortAddresses {
    /// Chooses among the addresses that the Node object lists and all local ones; `None` stands for
    /// every one.
    #[must_use]
    pub fn select(&self, listed: &[IpAddr], all: &BTreeSet<IpAddr>) -> Option<BTreeSet<IpAddr>> {
        match self {
            Self::All => None,
            Self::Primary => {
                let first = |family| {
                    let mut listed = listed.iter().copied();
                    listed.find(|ip| Family::of(*ip) == family)
                };
                Some(Family::BOTH.into_iter().filter_map(first).collect())
            }
            Self::Within(ranges) => {
                let within = |ip: &IpAddr| {
                    let family = Family::of(*ip);
                    let mut own = ranges.iter().filter(|range| range.family() == family);
                    own.clone().next().is_none() || own.any(|range| range.contains(*ip))
                };
                Some(all.iter().copied().filter(within).collect())
            }
        }
    }
}

/// This node among the others.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Topology {
    nodes: BTreeMap<Arc<str>, Node>,
    name: Arc<str>,
    local_addresses: Option<BTreeSet<IpAddr>>,
}

impl Topology {
    /// Of the node with this name, of which nothing is known yet.
    #[must_use]
    pub fn new(name: &str) -> Self {
        Self {
            name: name.into(),
            ..Self::default()
        }
    }

    /// Takes a Node in, or forgets it. Tells whether anything that matters changed.
    pub fn set_node(&mut self, name: &str, node: Option<Node>) -> bool {
        let before = match &node {
            Some(node) => self.nodes.insert(name.into(), node.clone()),
            None => self.nodes.remove(name),
        };
        before != node
    }

    /// The addresses that the kernel's devices carry. Tells whether they changed.
    pub fn set_local_addresses(&mut self, addresses: BTreeSet<IpAddr>) -> bool {
        let addresses = Some(addresses);
        let changed = self.local_addresses != addresses;
        self.local_addresses = addresses;
        changed
    }

    /// This node's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// This node's zone, empty if unknown.
    #[must_use]
    pub fn zone(&self) -> &str {
        self.nodes
            .get(&self.name)
            .map_or("", |node| node.zone.as_str())
    }

    /// Names of the Nodes that were taken in.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(|name| &**name)
    }

    /// Every local address but loopback ones.
    #[must_use]
    pub fn addresses(&self) -> BTreeSet<IpAddr> {
        match &self.local_addresses {
            Some(addresses) => addresses
                .iter()
                .copied()
                .filter(|ip| !ip.is_loopback())
                .collect(),
            None => self.own_addresses().iter().copied().collect(),
        }
    }

    /// The pod ranges of all Nodes, sorted.
    #[must_use]
    pub fn pod_cidrs(&self) -> BTreeSet<Cidr> {
        self.nodes
            .values()
            .flat_map(|node| node.pod_cidrs.iter().copied())
            .collect()
    }

    /// The addresses that answer NodePorts; `None` stands for every one.
    #[must_use]
    pub fn node_port_addresses(&self, wanted: &NodePortAddresses) -> Option<BTreeSet<IpAddr>> {
        wanted.select(self.own_addresses(), &self.addresses())
    }

    /// The pod ranges of this node.
    #[must_use]
    pub fn own_pod_cidrs(&self) -> BTreeSet<Cidr> {
        let own = self.nodes.get(&self.name);
        own.map(|node| node.pod_cidrs.iter().copied().collect())
            .unwrap_or_default()
    }

    /// The addresses that its Node object lists, internal ones first.
    #[must_use]
    pub fn own_addresses(&self) -> &[IpAddr] {
        self.nodes
            .get(&self.name)
            .map_or(&[], |node| node.addresses.as_slice())
    }
}

const ZONE: &str = "topology.kubernetes.io/zone";
