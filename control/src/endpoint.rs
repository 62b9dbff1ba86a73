//! Endpoints of a Service: slices checked, core/v1 Endpoints turned into slices, slices merged.
//!
//! Reads API objects into `Slice`s with the API's defaults and merges the slices of one Service
//! port into one list without duplicates. Which endpoints get traffic is not decided here but in
//! `policy`. An endpoint with an address that cannot be a backend is left out and named in
//! `Slice::refused`; the rest of its slice stays.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;

use crate::address::{Family, is_mapped, parse_ip, special};
use crate::service::{Protocol, ServiceKey, is_left_out};

/// One endpoint of a slice; its ports are the slice's.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceEndpoint {
    /// Its address.
    pub address: IpAddr,
    /// The node it runs on.
    pub node: Option<Arc<str>>,
    /// The zone it runs in.
    pub zone: Option<Arc<str>>,
    /// Whether it takes new connections.
    pub state: Readiness,
    /// Whether its pod is being deleted.
    pub terminating: bool,
    /// Which nodes it is meant for.
    pub node_hints: Vec<Arc<str>>,
    /// Which zones it is meant for.
    pub zone_hints: Vec<Arc<str>>,
}

/// The conditions of an endpoint, as far as they matter for traffic.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Readiness {
    /// Takes no traffic.
    NotReady,
    /// Shuts down but still answers: the last resort.
    ServingTerminating,
    /// Takes traffic.
    Ready,
}

/// One port of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// The name of the Service port it belongs to.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port on the endpoint.
    pub port: u16,
}

/// An EndpointSlice, checked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Slice {
    /// The Service it belongs to.
    pub service: ServiceKey,
    /// Its own name.
    pub name: Arc<str>,
    /// Its ports.
    pub ports: Vec<SlicePort>,
    /// Its endpoints.
    pub endpoints: Vec<SliceEndpoint>,
    /// Endpoints and ports that were left out, each with the reason.
    pub refused: Vec<String>,
}

/// What became of a slice or Endpoints object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selection<T> {
    /// It is used.
    Ours(T),
    /// kube-proxy's watch leaves it out, or the API makes no slice of it.
    NotOurs,
}

/// Why a slice cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SliceError {
    /// It belongs to no Service.
    #[error("label {SERVICE_NAME} is missing, so it belongs to no Service")]
    NoService,
    /// Its addresses are of no known kind.
    #[error("addressType: {0:?} is not one of IPv4, IPv6, FQDN")]
    AddressType(String),
    /// A protocol that the API does not have.
    #[error("ports.protocol: {0:?} is not one of TCP, UDP, SCTP")]
    Protocol(String),
    /// A port number outside its range.
    #[error("ports.port: {0} is not in 1-65535")]
    Port(i32),
}

/// Checks an EndpointSlice and fills in the API's defaults.
///
/// # Errors
/// What the API server would refuse, and a slice without a Service.
pub fn from_slice(object: &discovery::EndpointSlice) -> Result<Selection<Slice>, SliceError> {
    if is_left_out(&object.metadata) {
        return Ok(Selection::NotOurs);
    }
    let family = match object.address_type.as_str() {
        "IPv4" => Family::V4,
        "IPv6" => Family::V6,
        "FQDN" => return Ok(Selection::NotOurs),
        other => return Err(SliceError::AddressType(other.into())),
    };
    let labels = object.metadata.labels.as_ref();
    let service = labels
        .and_then(|labels| labels.get(SERVICE_NAME))
        .filter(|name| !name.is_empty())
        .ok_or(SliceError::NoService)?;
    let mut slice = Slice {
        service: ServiceKey::new(
            object.metadata.namespace.as_deref().unwrap_or_default(),
            service,
        ),
        name: object.metadata.name.as_deref().unwrap_or_default().into(),
        ports: Vec::new(),
        endpoints: Vec::new(),
        refused: Vec::new(),
    };
    for port in object.ports.iter().flatten() {
        let Some(number) = port.port.filter(|number| *number != 0) else {
            slice.refused.push(
                "a port without a number stands for all ports, which no proxy can serve".into(),
            );
            continue;
        };
        let protocol = protocol(port.protocol.as_deref())?;
        slice
            .ports
            .push(slice_port(port.name.as_deref(), protocol, number)?);
    }
    let mut names = Names::default();
    for endpoint in object.endpoints.iter().flatten() {
        match usable_address(endpoint.addresses.first().map(String::as_str), family) {
            Ok(address) => slice
                .endpoints
                .push(slice_endpoint(endpoint, address, &mut names)),
            Err(reason) => slice.refused.push(reason),
        }
    }
    Ok(Selection::Ours(slice))
}

/// Makes of a core/v1 Endpoints object the slices that the API's mirroring controller makes: one
/// per subset and family.
///
/// # Errors
/// What the API server would refuse.
pub fn mirrored(object: &core::Endpoints) -> Result<Selection<Vec<Slice>>, SliceError> {
    let labels = object.metadata.labels.as_ref();
    let skips =
        labels.is_some_and(|labels| labels.get(SKIP_MIRROR).is_some_and(|value| value == "true"));
    let annotations = object.metadata.annotations.as_ref();
    let is_lease = annotations.is_some_and(|annotations| annotations.contains_key(LEADER));
    if is_left_out(&object.metadata) || skips || is_lease {
        return Ok(Selection::NotOurs);
    }
    let name = object.metadata.name.as_deref().unwrap_or_default();
    let service = ServiceKey::new(
        object.metadata.namespace.as_deref().unwrap_or_default(),
        name,
    );
    let mut slices = Vec::new();
    for subset in object.subsets.iter().flatten() {
        let mut ports = Vec::new();
        for port in subset.ports.iter().flatten() {
            let protocol = protocol(port.protocol.as_deref())?;
            ports.push(slice_port(port.name.as_deref(), protocol, port.port)?);
        }
        slices.push(mirror_subset(&service, subset, ports));
    }
    Ok(Selection::Ours(slices))
}

fn mirror_subset(
    service: &ServiceKey,
    subset: &core::EndpointSubset,
    ports: Vec<SlicePort>,
) -> Slice {
    let mut slice = Slice {
        service: service.clone(),
        name: Arc::clone(&service.name),
        ports,
        endpoints: Vec::new(),
        refused: Vec::new(),
    };
    let ready = subset
        .addresses
        .iter()
        .flatten()
        .map(|a| (a, Readiness::Ready));
    let not_ready = subset
        .not_ready_addresses
        .iter()
        .flatten()
        .map(|a| (a, Readiness::NotReady));
    let mut names = Names::default();
    for (address, state) in ready.chain(not_ready) {
        if slice.endpoints.len() >= MIRRORED_PER_SUBSET {
            slice.refused.push(format!(
                "a subset has more than {MIRRORED_PER_SUBSET} addresses, the rest is left out"
            ));
            break;
        }
        let family = match parse_ip(&address.ip) {
            Some(ip) if !is_mapped(&address.ip) => Family::of(ip),
            _ => Family::V4, // refused below, with the reason
        };
        match usable_address(Some(&address.ip), family) {
            Ok(ip) => slice.endpoints.push(SliceEndpoint {
                address: ip,
                node: names.share(address.node_name.as_deref()),
                zone: None,
                state,
                terminating: false,
                node_hints: Vec::new(),
                zone_hints: Vec::new(),
            }),
            Err(reason) => slice.refused.push(reason),
        }
    }
    slice
}

/// An endpoint of one Service port.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// Where it listens.
    pub address: SocketAddr,
    /// Whether it runs on this node.
    pub local: bool,
    /// The zone it runs in.
    pub zone: Option<Arc<str>>,
    /// Whether it takes new connections.
    pub state: Readiness,
    /// Whether its pod is being deleted.
    pub terminating: bool,
    /// Which nodes it is meant for.
    pub node_hints: Vec<Arc<str>>,
    /// Which zones it is meant for.
    pub zone_hints: Vec<Arc<str>>,
}

/// All endpoints of one Service port over its slices, sorted by address.
///
/// An address that several slices hold is taken once: a pod that stays wins over one that is being
/// deleted and had the address before, also while it is not ready; then a local mention over a
/// remote one, then the one that takes more traffic, so that the order of the slices does not
/// matter.
#[must_use]
pub fn merge<'a>(
    slices: impl IntoIterator<Item = &'a Slice>,
    name: &str,
    protocol: Protocol,
    node: &str,
) -> Vec<Endpoint> {
    let mut found: BTreeMap<SocketAddr, Endpoint> = BTreeMap::new();
    for slice in slices {
        let ports = slice.ports.iter();
        for port in ports.filter(|port| *port.name == *name && port.protocol == protocol) {
            for endpoint in &slice.endpoints {
                let candidate = Endpoint {
                    address: SocketAddr::new(endpoint.address, port.port),
                    local: !node.is_empty() && endpoint.node.as_deref() == Some(node),
                    zone: endpoint.zone.clone(),
                    state: endpoint.state,
                    terminating: endpoint.terminating,
                    node_hints: endpoint.node_hints.clone(),
                    zone_hints: endpoint.zone_hints.clone(),
                };
                let rank =
                    |endpoint: &Endpoint| (!endpoint.terminating, endpoint.local, endpoint.state);
                match found.get_mut(&candidate.address) {
                    None => _ = found.insert(candidate.address, candidate),
                    Some(known) if rank(known) < rank(&candidate) => *known = candidate,
                    Some(_) => {}
                }
            }
        }
    }
    found.into_values().collect()
}

fn slice_endpoint(
    endpoint: &discovery::Endpoint,
    address: IpAddr,
    names: &mut Names,
) -> SliceEndpoint {
    let conditions = endpoint.conditions.clone().unwrap_or_default();
    let serving = conditions.serving.unwrap_or(true);
    let terminating = conditions.terminating.unwrap_or(false);
    let state = if conditions.ready.unwrap_or(true) {
        Readiness::Ready
    } else if serving && terminating {
        Readiness::ServingTerminating
    } else {
        Readiness::NotReady
    };
    let hints = endpoint.hints.clone().unwrap_or_default();
    let node_hints = hints.for_nodes.unwrap_or_default();
    let zone_hints = hints.for_zones.unwrap_or_default();
    SliceEndpoint {
        address,
        node: names.share(endpoint.node_name.as_deref()),
        zone: names.share(endpoint.zone.as_deref()),
        state,
        terminating,
        node_hints: node_hints
            .iter()
            .filter_map(|hint| names.share(Some(&hint.name)))
            .collect(),
        zone_hints: zone_hints
            .iter()
            .filter_map(|hint| names.share(Some(&hint.name)))
            .collect(),
    }
}

fn slice_port(
    name: Option<&str>,
    protocol: Protocol,
    number: i32,
) -> Result<SlicePort, SliceError> {
    let port = u16::try_from(number).ok().filter(|port| *port != 0);
    Ok(SlicePort {
        name: name.unwrap_or_default().into(),
        protocol,
        port: port.ok_or(SliceError::Port(number))?,
    })
}

fn protocol(text: Option<&str>) -> Result<Protocol, SliceError> {
    let unknown = || SliceError::Protocol(text.unwrap_or_default().into());
    Protocol::from_api(text).ok_or_else(unknown)
}

/// The first address counts, the others stand for the same endpoint.
fn usable_address(text: Option<&str>, family: Family) -> Result<IpAddr, String> {
    let text = text.ok_or("an endpoint has no address")?;
    if is_mapped(text) {
        return Err(format!(
            "endpoint {text}: IPv4-mapped addresses cannot be backends"
        ));
    }
    let ip = parse_ip(text).ok_or_else(|| format!("endpoint {text:?} is no IP address"))?;
    if let Some(why) = special(ip) {
        return Err(format!(
            "endpoint {text}: {why} addresses cannot be backends"
        ));
    }
    if Family::of(ip) != family {
        return Err(format!(
            "endpoint {text}: the slice's addressType is {family}"
        ));
    }
    Ok(ip)
}

/// Node and zone names repeat in every endpoint: one copy each per object.
#[derive(Default)]
struct Names(Vec<Arc<str>>);

impl Names {
    fn share(&mut self, name: Option<&str>) -> Option<Arc<str>> {
        let name = name?;
        if let Some(known) = self.0.iter().find(|known| ***known == *name) {
            return Some(Arc::clone(known));
        }
        let shared: Arc<str> = name.into();
        self.0.push(Arc::clone(&shared));
        Some(shared)
    }
}

const SERVICE_NAME: &str = "kubernetes.io/service-name";
const SKIP_MIRROR: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
const MIRRORED_PER_SUBSET: usize = 1000;

#[cfg(test)]
mod tests {
    use super::*;

    fn slice(name: &str, node: &str, state: Readiness) -> Slice {
        Slice {
            service: ServiceKey::new("default", "web"),
            name: name.into(),
            ports: vec![SlicePort {
                name: "http".into(),
                protocol: Protocol::Tcp,
                port: 8080,
            }],
            endpoints: vec![SliceEndpoint {
                address: "10.244.1.10".parse().expect("a literal address"),
                node: Some(node.into()),
                zone: None,
                state,
                terminating: false,
                node_hints: Vec::new(),
                zone_hints: Vec::new(),
            }],
            refused: Vec::new(),
        }
    }

    #[test]
    fn an_address_in_two_slices_is_one_endpoint_whatever_their_order() {
        let moved_from = slice("a", "n1", Readiness::NotReady);
        let moved_to = slice("b", "n1", Readiness::Ready);
        let forth = merge([&moved_from, &moved_to], "http", Protocol::Tcp, "n1");
        let back = merge([&moved_to, &moved_from], "http", Protocol::Tcp, "n1");
        assert_eq!(forth, back);
        assert_eq!(forth.len(), 1);
        assert!(forth.iter().all(|e| e.local && e.state == Readiness::Ready));
    }

    #[test]
    fn a_new_pod_that_is_not_ready_wins_over_the_old_one_that_had_its_address() {
        let mut old = slice("a", "n1", Readiness::ServingTerminating);
        old.endpoints[0].terminating = true;
        let new = slice("b", "n1", Readiness::NotReady);
        for slices in [[&old, &new], [&new, &old]] {
            let merged = merge(slices, "http", Protocol::Tcp, "n1");
            assert_eq!(merged.len(), 1);
            assert_eq!(merged[0].state, Readiness::NotReady);
        }
    }

    #[test]
    fn only_the_port_of_that_name_and_protocol_counts() {
        let slice = slice("a", "n1", Readiness::Ready);
        assert_eq!(merge([&slice], "", Protocol::Tcp, "n1"), []);
        assert_eq!(merge([&slice], "http", Protocol::Udp, "n1"), []);
    }
}
