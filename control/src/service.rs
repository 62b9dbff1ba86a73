//! A Service as the proxy needs it: its ports, its addresses and how it wants to be balanced.
//!
//! Turns the API's object into a checked `Service`, with the API's defaults for what is missing.
//! What the API server would refuse is refused here with a reason, since files pass no API server.
//! It does not know endpoints and chooses nothing: that is `policy`. Services that kube-proxy's
//! watch or proxier leaves out (`Selection::NotOurs`) are no error.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use k8s_openapi::api::core::v1 as api;

use crate::address::{Cidr, Family, is_mapped, parse_ip, special};
use crate::balance::Balance;

/// Namespace and name of a Service.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ServiceKey {
    /// Its namespace.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl ServiceKey {
    /// From its two parts.
    #[must_use]
    pub fn new(namespace: &str, name: &str) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
        }
    }
}

impl fmt::Display for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

impl fmt::Debug for ServiceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The transport protocols a Service can have.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Protocol {
    /// SCTP.
    Sctp,
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// Reads the API's word; missing means TCP.
    #[must_use]
    pub fn from_api(text: Option<&str>) -> Option<Self> {
        match text {
            None | Some("" | "TCP") => Some(Self::Tcp),
            Some("UDP") => Some(Self::Udp),
            Some("SCTP") => Some(Self::Sctp),
            Some(_) => None,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "TCP",
            Self::Udp => "UDP",
            Self::Sctp => "SCTP",
        })
    }
}

/// Which endpoints traffic may go to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum TrafficPolicy {
    /// All of the cluster's.
    Cluster,
    /// Those on the node where the traffic enters.
    Local,
}

/// One port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Its name, empty where it has none.
    pub name: Arc<str>,
    /// Its protocol.
    pub protocol: Protocol,
    /// The port of its cluster, load balancer and external addresses.
    pub port: u16,
    /// The port on every node, if it has one.
    pub node_port: Option<u16>,
}

/// A Service, checked and with defaults filled in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// Its name.
    pub key: ServiceKey,
    /// When it was made, in seconds since 1970; files need not say.
    pub created: Option<i64>,
    /// One cluster address per family that it is served in.
    pub cluster_ips: Vec<IpAddr>,
    /// `spec.externalIPs`.
    pub external_ips: Vec<IpAddr>,
    /// Addresses of the load balancer that packets carry when they arrive here (ipMode VIP).
    pub load_balancer_ips: Vec<IpAddr>,
    /// Who may come to the load balancer's addresses; empty is everybody.
    pub source_ranges: Vec<Cidr>,
    /// Its ports.
    pub ports: Vec<ServicePort>,
    /// How long a client stays with its backend, if it does.
    pub affinity: Option<Duration>,
    /// Policy for its cluster addresses.
    pub internal_policy: TrafficPolicy,
    /// Policy for all its other addresses.
    pub external_policy: TrafficPolicy,
    /// Where load balancers ask for local endpoints.
    pub health_check_port: Option<u16>,
    /// Its own wishes for scheduler and weights.
    pub balance: Balance,
    /// What could not be understood and was replaced by a default.
    pub remarks: Vec<String>,
}

impl Service {
    /// The cluster address of one family. A family without one is not served at all.
    #[must_use]
    pub fn cluster_ip(&self, family: Family) -> Option<IpAddr> {
        self.cluster_ips
            .iter()
            .copied()
            .find(|ip| Family::of(*ip) == family)
    }

    /// Whether a port can be reached in this family by more than its cluster address.
    #[must_use]
    pub fn is_external(&self, port: &ServicePort, family: Family) -> bool {
        let of_family = |ip: &IpAddr| Family::of(*ip) == family;
        port.node_port.is_some()
            || self.load_balancer_ips.iter().any(of_family)
            || self.external_ips.iter().any(of_family)
    }
}

/// What became of a Service object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Selection {
    /// It is served.
    Ours(Box<Service>),
    /// Not for this kind of proxy: headless, an alias, or somebody else's.
    NotOurs,
}

/// Why a Service cannot be served.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ServiceError {
    /// No address was allocated.
    #[error("spec.clusterIP is empty: nobody allocates one here, write it into the object")]
    NoClusterIp,
    /// A field holds no IP address.
    #[error("{field}: {value:?} is no IP address")]
    BadAddress {
        /// Where it stands.
        field: &'static str,
        /// What stands there.
        value: String,
    },
    /// A field holds an address that nobody else can reach.
    #[error("{field}: {value} is a {why} address")]
    SpecialAddress {
        /// Where it stands.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What makes it special.
        why: &'static str,
    },
    /// Two cluster addresses of one family, or `clusterIP` differs from `clusterIPs[0]`.
    #[error("spec.clusterIPs: {0}")]
    ClusterIps(&'static str),
    /// A source range is no CIDR.
    #[error("spec.loadBalancerSourceRanges: {0:?} is no CIDR")]
    BadSourceRange(String),
    /// A field holds a word that the API does not have.
    #[error("{field}: {value:?} is not one of {allowed}")]
    UnknownWord {
        /// Where it stands.
        field: &'static str,
        /// What stands there.
        value: String,
        /// What may stand there.
        allowed: &'static str,
    },
    /// A number is outside its range.
    #[error("{field}: {value} is not in {low}-{high}")]
    OutOfRange {
        /// Where it stands.
        field: &'static str,
        /// What stands there.
        value: i32,
        /// The lowest allowed.
        low: i32,
        /// The highest allowed.
        high: i32,
    },
    /// No ports, or ports that cannot be told apart.
    #[error("spec.ports: {0}")]
    Ports(String),
}

/// Checks a Service object and fills in the API's defaults.
///
/// # Errors
/// What the API server would refuse, with the field that is wrong.
pub fn from_api(object: &api::Service) -> Result<Selection, ServiceError> {
    if is_left_out(&object.metadata) {
        return Ok(Selection::NotOurs);
    }
    let spec = object.spec.clone().unwrap_or_default();
    let type_ = word(
        "spec.type",
        spec.type_.as_deref(),
        &["ClusterIP", "NodePort", "LoadBalancer", "ExternalName"],
        "ClusterIP, NodePort, LoadBalancer, ExternalName",
    )?;
    if type_ == "ExternalName" || spec.cluster_ip.as_deref() == Some("None") {
        return Ok(Selection::NotOurs);
    }
    let external_ips = external_ips(&spec)?;
    let reachable = type_ != "ClusterIP" || !external_ips.is_empty();
    let external_policy = match policy(
        "spec.externalTrafficPolicy",
        spec.external_traffic_policy.as_deref(),
    )? {
        TrafficPolicy::Local if reachable => TrafficPolicy::Local,
        _ => TrafficPolicy::Cluster,
    };
    let asks_health = type_ == "LoadBalancer" && external_policy == TrafficPolicy::Local;
    let health_check_port = match spec.health_check_node_port.unwrap_or(0) {
        0 => None,
        port => Some(in_range("spec.healthCheckNodePort", port, 1, 65535)?),
    };
    let mut remarks = Vec::new();
    let balance = Balance::from_annotations(object.metadata.annotations.as_ref(), &mut remarks);
    let created = object.metadata.creation_timestamp.as_ref();
    Ok(Selection::Ours(Box::new(Service {
        key: ServiceKey::new(
            object.metadata.namespace.as_deref().unwrap_or_default(),
            object.metadata.name.as_deref().unwrap_or_default(),
        ),
        created: created.map(|time| time.0.as_second()),
        cluster_ips: cluster_ips(&spec)?,
        external_ips,
        load_balancer_ips: load_balancer_ips(object.status.as_ref())?,
        source_ranges: source_ranges(&spec)?,
        ports: ports(&spec)?,
        affinity: affinity(&spec)?,
        internal_policy: policy(
            "spec.internalTrafficPolicy",
            spec.internal_traffic_policy.as_deref(),
        )?,
        external_policy,
        health_check_port: health_check_port.filter(|_| asks_health),
        balance,
        remarks,
    })))
}

/// Whether kube-proxy's watches leave an object with these labels out.
#[must_use]
pub fn is_left_out(metadata: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> bool {
    metadata.labels.as_ref().is_some_and(|labels| {
        labels.contains_key("service.kubernetes.io/service-proxy-name")
            || labels.contains_key("service.kubernetes.io/headless")
    })
}

fn cluster_ips(spec: &api::ServiceSpec) -> Result<Vec<IpAddr>, ServiceError> {
    const FIELD: &str = "spec.clusterIPs";
    let first = spec.cluster_ip.as_deref().filter(|ip| !ip.is_empty());
    let mut texts: Vec<&str> = spec
        .cluster_ips
        .iter()
        .flatten()
        .map(String::as_str)
        .collect();
    if texts.is_empty() {
        texts.extend(first);
    }
    if texts.is_empty() {
        return Err(ServiceError::NoClusterIp);
    }
    let mut found: Vec<IpAddr> = Vec::with_capacity(texts.len());
    for text in texts {
        let ip = address(FIELD, text)?;
        if found
            .iter()
            .any(|other| Family::of(*other) == Family::of(ip))
        {
            return Err(ServiceError::ClusterIps("two addresses of one family"));
        }
        found.push(ip);
    }
    if let Some(first) = first
        && parse_ip(first) != found.first().copied()
    {
        return Err(ServiceError::ClusterIps(
            "the first one is not spec.clusterIP",
        ));
    }
    Ok(found)
}

fn external_ips(spec: &api::ServiceSpec) -> Result<Vec<IpAddr>, ServiceError> {
    const FIELD: &str = "spec.externalIPs";
    let mut found = BTreeSet::new();
    for text in spec.external_ips.iter().flatten() {
        let ip = address(FIELD, text)?;
        if let Some(why) = special(ip) {
            let value = text.clone();
            return Err(ServiceError::SpecialAddress {
                field: FIELD,
                value,
                why,
            });
        }
        found.insert(ip);
    }
    Ok(found.into_iter().collect())
}

fn load_balancer_ips(status: Option<&api::ServiceStatus>) -> Result<Vec<IpAddr>, ServiceError> {
    let entries = status
        .and_then(|status| status.load_balancer.as_ref())
        .and_then(|balancer| balancer.ingress.as_ref());
    let mut found = BTreeSet::new();
    for entry in entries.into_iter().flatten() {
        let Some(text) = entry.ip.as_deref().filter(|ip| !ip.is_empty()) else {
            continue; // a host name: whoever resolves it finds addresses that are not ours
        };
        let mode = word(
            "status.loadBalancer.ingress.ipMode",
            entry.ip_mode.as_deref(),
            &["VIP", "Proxy"],
            "VIP, Proxy",
        )?;
        let ip = address("status.loadBalancer.ingress.ip", text)?;
        if mode == "VIP" {
            found.insert(ip);
        }
    }
    Ok(found.into_iter().collect())
}

fn source_ranges(spec: &api::ServiceSpec) -> Result<Vec<Cidr>, ServiceError> {
    let mut found = BTreeSet::new();
    for text in spec.load_balancer_source_ranges.iter().flatten() {
        let range = Cidr::parse(text).ok_or_else(|| ServiceError::BadSourceRange(text.clone()))?;
        found.insert(range);
    }
    Ok(found.into_iter().collect())
}

fn ports(spec: &api::ServiceSpec) -> Result<Vec<ServicePort>, ServiceError> {
    let written = spec.ports.as_deref().unwrap_or_default();
    if written.is_empty() {
        return Err(ServiceError::Ports("a Service needs at least one".into()));
    }
    let mut found: Vec<ServicePort> = Vec::with_capacity(written.len());
    for port in written {
        let name = port.name.as_deref().unwrap_or_default();
        if written.len() > 1 && name.is_empty() {
            return Err(ServiceError::Ports(
                "several ports, and one has no name".into(),
            ));
        }
        let number = in_range("spec.ports.port", port.port, 1, 65535)?;
        let node_port = match port.node_port.unwrap_or(0) {
            0 => None,
            node_port => Some(in_range("spec.ports.nodePort", node_port, 1, 65535)?),
        };
        let protocol = protocol("spec.ports.protocol", port.protocol.as_deref())?;
        let twice = |other: &ServicePort| {
            *other.name == *name || (other.port == number && other.protocol == protocol)
        };
        if found.iter().any(twice) {
            return Err(ServiceError::Ports(format!(
                "{name:?} ({number}/{protocol}) is there twice"
            )));
        }
        found.push(ServicePort {
            name: name.into(),
            protocol,
            port: number,
            node_port,
        });
    }
    Ok(found)
}

fn affinity(spec: &api::ServiceSpec) -> Result<Option<Duration>, ServiceError> {
    const DEFAULT_SECONDS: i32 = 10_800;
    let kind = word(
        "spec.sessionAffinity",
        spec.session_affinity.as_deref().or(Some("None")),
        &["None", "ClientIP"],
        "None, ClientIP",
    )?;
    if kind == "None" {
        return Ok(None);
    }
    let seconds = spec
        .session_affinity_config
        .as_ref()
        .and_then(|config| config.client_ip.as_ref())
        .and_then(|client| client.timeout_seconds)
        .unwrap_or(DEFAULT_SECONDS);
    if !(1..=86_400).contains(&seconds) {
        return Err(ServiceError::OutOfRange {
            field: "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
            value: seconds,
            low: 1,
            high: 86_400,
        });
    }
    Ok(Some(Duration::from_secs(u64::from(seconds.unsigned_abs()))))
}

fn policy(field: &'static str, value: Option<&str>) -> Result<TrafficPolicy, ServiceError> {
    Ok(
        match word(field, value, &["Cluster", "Local"], "Cluster, Local")? {
            "Local" => TrafficPolicy::Local,
            _ => TrafficPolicy::Cluster,
        },
    )
}

fn protocol(field: &'static str, value: Option<&str>) -> Result<Protocol, ServiceError> {
    Protocol::from_api(value).ok_or_else(|| ServiceError::UnknownWord {
        field,
        value: value.unwrap_or_default().into(),
        allowed: "TCP, UDP, SCTP",
    })
}

fn address(field: &'static str, text: &str) -> Result<IpAddr, ServiceError> {
    let bad = || ServiceError::BadAddress {
        field,
        value: text.into(),
    };
    if is_mapped(text) {
        return Err(ServiceError::SpecialAddress {
            field,
            value: text.into(),
            why: "IPv4-mapped",
        });
    }
    parse_ip(text).ok_or_else(bad)
}

/// A word out of a fixed set; missing or empty means the first of the set.
fn word(
    field: &'static str,
    value: Option<&str>,
    set: &[&'static str],
    allowed: &'static str,
) -> Result<&'static str, ServiceError> {
    let Some(value) = value.filter(|value| !value.is_empty()) else {
        return Ok(set.first().copied().unwrap_or_default());
    };
    let known = set.iter().copied().find(|word| *word == value);
    known.ok_or_else(|| ServiceError::UnknownWord {
        field,
        value: value.into(),
        allowed,
    })
}

fn in_range(field: &'static str, value: i32, low: i32, high: i32) -> Result<u16, ServiceError> {
    u16::try_from(value)
        .ok()
        .filter(|_| (low..=high).contains(&value))
        .ok_or(ServiceError::OutOfRange {
            field,
            value,
            low,
            high,
        })
}
