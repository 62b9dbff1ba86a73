//! `resolve -o json`: the resolved services in the form that people and scripts read.
//!
//! A contract: key names, order and presence of keys do not change. Every list is sorted, every
//! key is always there; only `insideBackends` stands for a difference and is absent without one.
//! Nothing is decided here.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::controller::{Rejected, Resolved};
use crate::policy::{
    Backend, Frontend, FrontendAddress, FrontendKind, Masquerade, Port, ResolvedService, WhenEmpty,
};

/// What is served on a node.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Resolution {
    /// `sluice/v1`.
    pub api_version: &'static str,
    /// `Resolution`.
    pub kind: &'static str,
    /// The node's name.
    pub node: String,
    /// Its zone, empty if unknown.
    pub zone: String,
    /// By namespace, name, port and protocol.
    pub services: Vec<ServiceEntry>,
    /// By namespace and name.
    pub health_checks: Vec<HealthCheckEntry>,
    /// What is not served, and why.
    pub rejected: Vec<Rejected>,
}

/// One Service port.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceEntry {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of the port, empty where it has none.
    pub port: String,
    /// TCP, UDP or SCTP.
    pub protocol: String,
    /// The scheduler's short name.
    pub scheduler: &'static str,
    /// How long a client stays with its backend; null where it does not.
    pub affinity_seconds: Option<u64>,
    /// By type, address and port.
    pub frontends: Vec<FrontendEntry>,
}

/// One address and port that a Service port answers on.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendEntry {
    /// ClusterIP, NodePort, LoadBalancer or ExternalIP.
    #[serde(rename = "type")]
    pub type_: &'static str,
    /// The address; `*` for a NodePort on every local address.
    pub address: String,
    /// The port.
    pub port: u16,
    /// `internal` for a ClusterIP, `external` for all others.
    pub policy: &'static str,
    /// Who may be chosen.
    pub backends: Vec<String>,
    /// The same for clients inside the cluster, where it differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub inside_backends: Option<Vec<String>>,
    /// Weights that are not 1.
    pub weights: BTreeMap<String, u16>,
    /// always, offCluster or never.
    pub masquerade: &'static str,
    /// Who may come; empty is everybody.
    pub source_ranges: Vec<String>,
    /// reject or drop.
    pub when_empty: &'static str,
}

/// One Service that load balancers ask about.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct HealthCheckEntry {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Where they ask.
    pub port: u16,
    /// How many of its ready endpoints run here.
    pub local_endpoints: usize,
}

impl Resolved {
    /// The same in the form of `resolve -o json`.
    #[must_use]
    pub fn to_resolution(&self) -> Resolution {
        let services = self.services.values();
        let health_checks = services.clone().filter_map(|service| {
            service.health_check.map(|check| HealthCheckEntry {
                namespace: (*service.key.namespace).into(),
                name: (*service.key.name).into(),
                port: check.port,
                local_endpoints: check.local_endpoints,
            })
        });
        Resolution {
            api_version: "sluice/v1",
            kind: "Resolution",
            node: self.node.clone(),
            zone: self.zone.clone(),
            health_checks: health_checks.collect(),
            services: services.flat_map(|service| entries(service)).collect(),
            rejected: self.rejected.clone(),
        }
    }
}

fn entries(service: &ResolvedService) -> impl Iterator<Item = ServiceEntry> {
    service.ports.iter().map(|port| ServiceEntry {
        namespace: (*service.key.namespace).into(),
        name: (*service.key.name).into(),
        port: (*port.name).into(),
        protocol: port.protocol.to_string(),
        scheduler: port.scheduler.name(),
        affinity_seconds: port.affinity.map(|affinity| affinity.as_secs()),
        frontends: frontends(port),
    })
}

/// A NodePort on every address is one entry for both families.
fn frontends(port: &Port) -> Vec<FrontendEntry> {
    let mut groups: BTreeMap<(&str, String, u16), Vec<&Frontend>> = BTreeMap::new();
    for frontend in &port.frontends {
        let address = match frontend.address {
            FrontendAddress::EveryLocal(_) => "*".into(),
            FrontendAddress::Ip(ip) => ip.to_string(),
        };
        let place = (type_name(frontend.kind), address, frontend.port);
        groups.entry(place).or_default().push(frontend);
    }
    let entry = |((type_, address, port), group): ((&'static str, String, u16), Vec<&Frontend>)| {
        let outside = || group.iter().flat_map(|frontend| frontend.backends.iter());
        let inside = || {
            group
                .iter()
                .flat_map(|frontend| frontend.for_inside().iter())
        };
        let differ = group
            .iter()
            .any(|frontend| frontend.inside_backends.is_some());
        let drops = group
            .iter()
            .any(|frontend| frontend.when_empty == WhenEmpty::Drop);
        let ranges = group.iter().flat_map(|frontend| &frontend.source_ranges);
        let ranges: BTreeSet<String> = ranges.map(ToString::to_string).collect();
        FrontendEntry {
            type_,
            address,
            port,
            policy: if type_ == "ClusterIP" {
                "internal"
            } else {
                "external"
            },
            backends: addresses(outside()),
            inside_backends: differ.then(|| addresses(inside())),
            weights: outside()
                .chain(inside())
                .filter(|backend| backend.weight != 1)
                .map(|backend| (backend.address.to_string(), backend.weight))
                .collect(),
            masquerade: group
                .first()
                .map_or("never", |frontend| masquerade(frontend.masquerade)),
            source_ranges: ranges.into_iter().collect(),
            when_empty: if drops { "drop" } else { "reject" },
        }
    };
    groups.into_iter().map(entry).collect()
}

fn addresses<'a>(backends: impl Iterator<Item = &'a Backend>) -> Vec<String> {
    let sorted: BTreeSet<String> = backends
        .map(|backend| backend.address.to_string())
        .collect();
    sorted.into_iter().collect()
}

const fn type_name(kind: FrontendKind) -> &'static str {
    match kind {
        FrontendKind::ClusterIp => "ClusterIP",
        FrontendKind::LoadBalancer => "LoadBalancer",
        FrontendKind::ExternalIp => "ExternalIP",
        FrontendKind::NodePort => "NodePort",
    }
}

const fn masquerade(masquerade: Masquerade) -> &'static str {
    match masquerade {
        Masquerade::Always => "always",
        Masquerade::OffCluster => "offCluster",
        Masquerade::Never => "never",
    }
}
