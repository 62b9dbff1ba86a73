//! Which endpoints each frontend of a Service gets on this node. Decided once, here.
//!
//! A pure function from a Service, its endpoints and this node to what is served: kube-proxy's
//! rules for traffic policies, topology hints, terminating endpoints and masquerading, family by
//! family. The engine's snapshot and the kernel's rules are projections of the result; neither
//! decides anything.
//!
//! Rules to keep (peers: kube-proxy 1.33 to 1.37):
//!
//! - A family in which a Service has no cluster IP is not served at all.
//! - Ready endpoints count; those that terminate but still serve are taken only where there is
//!   no ready one, for Cluster and Local on their own.
//! - Hints narrow the Cluster policy only: if every ready endpoint has a node hint and one names
//!   this node, else the same with zones, else nobody is left out.
//! - Traffic from inside the cluster to an external address of a Local Service takes the Cluster
//!   policy. Only there the clients inside and outside get different lists.
//! - No endpoint anywhere: reject. Endpoints, but none here with policy Local: drop.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use crate::address::{Cidr, Family};
use crate::balance::{HashOver, Scheduler};
use crate::endpoint::{Endpoint, Readiness, Slice, merge};
use crate::node::{NodePortAddresses, Topology};
use crate::service::{Protocol, Service, ServiceKey, ServicePort, TrafficPolicy};

/// What the configuration says about every Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PolicyConfig {
    /// Scheduler of Services that ask for none.
    pub default_scheduler: Scheduler,
    /// Replace the source of everything that goes to a cluster IP.
    pub masquerade_all: bool,
    /// Whether "inside the cluster" can be told at all; if not, cluster IPs keep the source.
    pub knows_inside: bool,
    /// Which addresses answer NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// Whose external IPs are served.
    pub external_ips: ExternalIps,
}

/// Which `externalIPs` are served. Anyone who may write a Service can claim any address with them.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum ExternalIps {
    /// All of them, as kube-proxy does.
    #[default]
    Allow,
    /// None.
    Deny,
    /// Those in one of the ranges.
    Within(Vec<Cidr>),
}

impl ExternalIps {
    fn allow(&self, address: IpAddr) -> bool {
        match self {
            Self::Allow => true,
            Self::Deny => false,
            Self::Within(ranges) => ranges.iter().any(|range| range.contains(address)),
        }
    }
}

/// What kind of address a frontend has. The order is the order of precedence where two Services
/// claim one address and port.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FrontendKind {
    /// A cluster IP.
    ClusterIp,
    /// An address that a load balancer announces.
    LoadBalancer,
    /// One of `externalIPs`.
    ExternalIp,
    /// A port of this node.
    NodePort,
}

/// Where a frontend listens.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum FrontendAddress {
    /// On every local address of a family but loopback ones.
    EveryLocal(Family),
    /// On this one.
    Ip(IpAddr),
}

impl FrontendAddress {
    /// The family that it answers in.
    #[must_use]
    pub const fn family(&self) -> Family {
        match self {
            Self::EveryLocal(family) => *family,
            Self::Ip(ip) => Family::of(*ip),
        }
    }
}

/// When the source address is replaced by one of this node; a client that meets itself always is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Masquerade {
    /// For every client.
    Always,
    /// For clients outside the cluster's pod ranges.
    OffCluster,
    /// For none.
    Never,
}

/// What a packet gets where there is no backend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WhenEmpty {
    /// An answer that says so.
    Reject,
    /// Nothing.
    Drop,
}

/// An endpoint that may be chosen.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Backend {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its share; 0 gets no new connections.
    pub weight: u16,
    /// Whether it runs on this node.
    pub local: bool,
}

/// The backends of some frontends; sorted, no duplicates. Shared where they are the same.
pub type Backends = Arc<[Backend]>;

/// One address and port that a Service answers on.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frontend {
    /// What kind of address it is.
    pub kind: FrontendKind,
    /// Where it listens.
    pub address: FrontendAddress,
    /// On which port.
    pub port: u16,
    /// Who gets its connections, from clients outside the cluster where the two differ.
    pub backends: Backends,
    /// Who gets those from clients inside, where these are others.
    pub inside_backends: Option<Backends>,
    /// When the source address is replaced, for clients outside.
    pub masquerade: Masquerade,
    /// Who may come; empty is everybody.
    pub source_ranges: Vec<Cidr>,
    /// What happens without a backend.
    pub when_empty: WhenEmpty,
}

impl Frontend {
    /// Who gets connections from clients inside the cluster.
    #[must_use]
    pub fn for_inside(&self) -> &Backends {
        self.inside_backends.as_ref().unwrap_or(&self.backends)
    }
}

/// One port of a Service as it is served on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Port {
    /// Its name, empty where it has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// How a backend is chosen.
    pub scheduler: Scheduler,
    /// What hashing schedulers hash.
    pub hash: HashOver,
    /// How long a client stays with its backend, if it does.
    pub affinity: Option<Duration>,
    /// Its frontends, sorted.
    pub frontends: Vec<Frontend>,
    /// Endpoints that keep their flows but are chosen by no frontend.
    pub draining: Vec<Backend>,
}

impl Port {
    /// Every endpoint of it, some of them several times.
    pub fn backends(&self) -> impl Iterator<Item = &Backend> {
        let lists = self.frontends.iter();
        let lists = lists.flat_map(|frontend| [&frontend.backends, frontend.for_inside()]);
        lists.flat_map(|list| list.iter()).chain(&self.draining)
    }
}

/// How many endpoints of a Service run here, for load balancers that ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HealthCheck {
    /// Where they ask.
    pub port: u16,
    /// How many local, ready endpoints there are.
    pub local_endpoints: usize,
}

/// A Service as it is served on this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ResolvedService {
    /// Its name.
    pub key: ServiceKey,
    /// When it was made, in seconds since 1970: the older one keeps what two claim.
    pub created: Option<i64>,
    /// Its ports, sorted by name and protocol.
    pub ports: Vec<Port>,
    /// Its health check, if load balancers ask for one.
    pub health_check: Option<HealthCheck>,
    /// Frontends that are left out, and annotations that were not understood.
    pub remarks: Vec<String>,
}

/// Decides what is served for one Service on this node.
#[must_use]
pub fn resolve(
    service: &Service,
    slices: &[&Slice],
    node: &Topology,
    config: &PolicyConfig,
) -> ResolvedService {
    let mut remarks = service.remarks.clone();
    for ip in service
        .external_ips
        .iter()
        .filter(|ip| !config.external_ips.allow(**ip))
    {
        remarks.push(format!(
            "externalIP {ip} is not served: sluice.externalIPs forbids it"
        ));
    }
    let mut local_ready: BTreeSet<IpAddr> = BTreeSet::new();
    let mut ports: Vec<Port> = Vec::with_capacity(service.ports.len());
    for port in &service.ports {
        let endpoints = merge(
            slices.iter().copied(),
            &port.name,
            port.protocol,
            node.name(),
        );
        let here = endpoints
            .iter()
            .filter(|e| e.local && e.state == Readiness::Ready);
        local_ready.extend(here.map(|endpoint| endpoint.address.ip()));
        ports.push(resolve_port(service, port, &endpoints, node, config));
    }
    ports.sort_by(|a, b| (&a.name, a.protocol).cmp(&(&b.name, b.protocol)));
    let count = |family| {
        local_ready
            .iter()
            .filter(|ip| Family::of(**ip) == family)
            .count()
    };
    ResolvedService {
        key: service.key.clone(),
        created: service.created,
        ports,
        health_check: service.health_check_port.map(|port| HealthCheck {
            port,
            // A dual-stack endpoint has an address of each family and is still one endpoint.
            local_endpoints: Family::BOTH
                .into_iter()
                .filter(|family| service.cluster_ip(*family).is_some())
                .map(count)
                .max()
                .unwrap_or(0),
        }),
        remarks,
    }
}

fn resolve_port(
    service: &Service,
    port: &ServicePort,
    endpoints: &[Endpoint],
    node: &Topology,
    config: &PolicyConfig,
) -> Port {
    let mut frontends = Vec::new();
    for family in Family::BOTH {
        if let Some(cluster_ip) = service.cluster_ip(family) {
            let chosen = Chosen::of(service, port, endpoints, family, node);
            frontends.push(cluster_frontend(service, port, cluster_ip, &chosen, config));
            frontends.extend(external_frontends(
                service, port, family, &chosen, node, config,
            ));
        }
    }
    frontends.sort_by_key(|frontend| (frontend.kind, frontend.address, frontend.port));
    let mut used: BTreeSet<SocketAddr> = BTreeSet::new();
    for frontend in &frontends {
        let lists = std::iter::once(&frontend.backends).chain(&frontend.inside_backends);
        used.extend(lists.flat_map(|list| list.iter().map(|backend| backend.address)));
    }
    let idle = endpoints
        .iter()
        .filter(|endpoint| !used.contains(&endpoint.address));
    Port {
        name: Arc::clone(&port.name),
        protocol: port.protocol,
        scheduler: service
            .balance
            .scheduler
            .unwrap_or(config.default_scheduler),
        hash: service.balance.hash,
        affinity: service.affinity,
        draining: idle.map(|endpoint| backend(service, endpoint)).collect(),
        frontends,
    }
}

fn cluster_frontend(
    service: &Service,
    port: &ServicePort,
    address: IpAddr,
    chosen: &Chosen,
    config: &PolicyConfig,
) -> Frontend {
    let (backends, when_empty) = chosen.for_policy(service.internal_policy);
    Frontend {
        kind: FrontendKind::ClusterIp,
        address: FrontendAddress::Ip(address),
        port: port.port,
        backends,
        inside_backends: None,
        masquerade: if config.masquerade_all {
            Masquerade::Always
        } else if config.knows_inside {
            Masquerade::OffCluster
        } else {
            Masquerade::Never
        },
        source_ranges: Vec::new(),
        when_empty,
    }
}

fn external_frontends(
    service: &Service,
    port: &ServicePort,
    family: Family,
    chosen: &Chosen,
    node: &Topology,
    config: &PolicyConfig,
) -> Vec<Frontend> {
    let (backends, when_empty) = chosen.for_policy(service.external_policy);
    let (masquerade, inside) = match service.external_policy {
        TrafficPolicy::Cluster => (Masquerade::Always, None),
        TrafficPolicy::Local => (
            Masquerade::Never,
            Some(&chosen.cluster).filter(|list| **list != backends),
        ),
    };
    let frontend = |kind, address, port| Frontend {
        kind,
        address,
        port,
        backends: Arc::clone(&backends),
        inside_backends: inside.cloned(),
        masquerade,
        source_ranges: Vec::new(),
        when_empty,
    };
    let of_family = |ip: &&IpAddr| Family::of(**ip) == family;
    let mut frontends = Vec::new();
    for ip in service.load_balancer_ips.iter().filter(of_family) {
        let ranges = service.source_ranges.iter().copied();
        frontends.push(Frontend {
            source_ranges: ranges.filter(|range| range.family() == family).collect(),
            ..frontend(
                FrontendKind::LoadBalancer,
                FrontendAddress::Ip(*ip),
                port.port,
            )
        });
    }
    for ip in service.external_ips.iter().filter(of_family) {
        if config.external_ips.allow(*ip) {
            frontends.push(frontend(
                FrontendKind::ExternalIp,
                FrontendAddress::Ip(*ip),
                port.port,
            ));
        }
    }
    if let Some(node_port) = port.node_port {
        let listens = |address| frontend(FrontendKind::NodePort, address, node_port);
        match node.node_port_addresses(&config.node_port_addresses) {
            None => frontends.push(listens(FrontendAddress::EveryLocal(family))),
            Some(addresses) => {
                let addresses = addresses.iter().filter(of_family);
                frontends.extend(addresses.map(|ip| listens(FrontendAddress::Ip(*ip))));
            }
        }
    }
    frontends
}

/// The endpoints of one Service port in one family that each policy takes.
struct Chosen {
    cluster: Backends,
    local: Backends,
    /// Whether an endpoint that could take traffic exists anywhere.
    any: bool,
}

impl Chosen {
    fn of(
        service: &Service,
        port: &ServicePort,
        endpoints: &[Endpoint],
        family: Family,
        node: &Topology,
    ) -> Self {
        let all: Vec<&Endpoint> = endpoints
            .iter()
            .filter(|endpoint| Family::of(endpoint.address.ip()) == family)
            .collect();
        let external = service.is_external(port, family);
        // External traffic from inside takes the Cluster policy, whatever the Service says.
        let uses_cluster = service.internal_policy == TrafficPolicy::Cluster || external;
        let uses_local = service.internal_policy == TrafficPolicy::Local
            || (external && service.external_policy == TrafficPolicy::Local);
        let list =
            |picked: Vec<&Endpoint>| picked.into_iter().map(|e| backend(service, e)).collect();
        let cluster: Backends = match uses_cluster {
            true => list(for_cluster(&all, node)),
            false => list(Vec::new()),
        };
        let local: Backends = match uses_local {
            true => list(for_local(&all)),
            false => list(Vec::new()),
        };
        Self {
            any: all
                .iter()
                .any(|endpoint| endpoint.state != Readiness::NotReady),
            cluster,
            local,
        }
    }

    fn for_policy(&self, policy: TrafficPolicy) -> (Backends, WhenEmpty) {
        match policy {
            TrafficPolicy::Cluster => (Arc::clone(&self.cluster), WhenEmpty::Reject),
            TrafficPolicy::Local if self.any => (Arc::clone(&self.local), WhenEmpty::Drop),
            TrafficPolicy::Local => (Arc::clone(&self.local), WhenEmpty::Reject),
        }
    }
}

/// Ready endpoints that the hints leave, else those that terminate but still serve.
fn for_cluster<'a>(all: &[&'a Endpoint], node: &Topology) -> Vec<&'a Endpoint> {
    let ready = in_state(all, Readiness::Ready);
    if ready.is_empty() {
        return in_state(all, Readiness::ServingTerminating);
    }
    let by_node: Hints = |endpoint| &endpoint.node_hints;
    let by_zone: Hints = |endpoint| &endpoint.zone_hints;
    for (hints, ours) in [(by_node, node.name()), (by_zone, node.zone())] {
        let everyone_hints = ready.iter().all(|endpoint| !hints(endpoint).is_empty());
        if everyone_hints {
            let for_us = |endpoint: &&&Endpoint| hints(endpoint).iter().any(|hint| **hint == *ours);
            let hinted: Vec<_> = ready.iter().filter(for_us).copied().collect();
            if !hinted.is_empty() {
                return hinted;
            }
        }
    }
    ready
}

type Hints = fn(&Endpoint) -> &Vec<Arc<str>>;

/// Ready endpoints on this node, else those on it that terminate but still serve.
fn for_local<'a>(all: &[&'a Endpoint]) -> Vec<&'a Endpoint> {
    let here: Vec<&Endpoint> = all
        .iter()
        .filter(|endpoint| endpoint.local)
        .copied()
        .collect();
    let ready = in_state(&here, Readiness::Ready);
    if ready.is_empty() {
        return in_state(&here, Readiness::ServingTerminating);
    }
    ready
}

fn in_state<'a>(endpoints: &[&'a Endpoint], state: Readiness) -> Vec<&'a Endpoint> {
    endpoints
        .iter()
        .filter(|endpoint| endpoint.state == state)
        .copied()
        .collect()
}

fn backend(service: &Service, endpoint: &Endpoint) -> Backend {
    let address = endpoint.address;
    Backend {
        address,
        weight: service
            .balance
            .weight(address.ip(), endpoint.zone.as_deref()),
        local: endpoint.local,
    }
}
