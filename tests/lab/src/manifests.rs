//! The cluster of the lab as files: Nodes, Services and EndpointSlices, dual-stack.
//!
//! One file a Service, so that a test can edit one. Files are renamed into place: a reader never sees half of one.

use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use serde_json::json;

use crate::plan::{
    Family, POD_PORT, PODS, Protocol, SERVICE_PORT, Service, Site, address, load_balancer, services,
};

/// Writes the Nodes and all Services of the plan.
pub fn write_all(dir: &Path) -> Result<()> {
    std::fs::create_dir_all(dir)?;
    replace(&dir.join("nodes.yaml"), &nodes())?;
    services()
        .iter()
        .try_for_each(|service| write_service(dir, service))
}

/// Writes or replaces the file of one Service with its EndpointSlices.
pub fn write_service(dir: &Path, service: &Service) -> Result<()> {
    let backends: Vec<_> = PODS
        .iter()
        .filter(|pod| service.backends.iter().any(|b| b == pod.name))
        .collect();
    let slices = Family::ALL.map(|family| {
        let all: Vec<_> = backends
            .iter()
            .map(|pod| (pod.name, pod.node.name(), pod.address(family)))
            .collect();
        endpoint_slice(service, family, &all)
    });
    replace(&service_file(dir, service), &service_text(service, &slices))
}

/// Writes a Service whose backends are given as (pod, node, address).
pub fn write_service_with(
    dir: &Path,
    service: &Service,
    backends: &[(&str, &str, IpAddr)],
) -> Result<()> {
    let slices = Family::ALL.map(|family| {
        let fits = |ip: &IpAddr| ip.is_ipv4() == (family == Family::V4);
        let all: Vec<_> = backends
            .iter()
            .copied()
            .filter(|(.., ip)| fits(ip))
            .collect();
        endpoint_slice(service, family, &all)
    });
    replace(&service_file(dir, service), &service_text(service, &slices))
}

/// Where a Service is written.
#[must_use]
pub fn service_file(dir: &Path, service: &Service) -> PathBuf {
    dir.join(format!("service-{}.yaml", service.name))
}

fn nodes() -> String {
    let node = |node: Site, v4: &str, v6: &str| {
        let name = node.name();
        let (ip4, ip6) = (address(node, Family::V4), address(node, Family::V6));
        format!(
            "\
apiVersion: v1
kind: Node
metadata:
  name: {name}
  labels:
    kubernetes.io/hostname: {name}
    topology.kubernetes.io/zone: zone-{name}
spec:
  podCIDR: {v4}
  podCIDRs: [\"{v4}\", \"{v6}\"]
status:
  addresses:
  - type: InternalIP
    address: {ip4}
  - type: InternalIP
    address: \"{ip6}\"
  - type: Hostname
    address: {name}
"
        )
    };
    let n1 = node(Site::N1, "10.244.1.0/24", "fd00:10:244:1::/64");
    // Two ranges side by side: the second is behind the overlay.
    let n2 = node(Site::N2, "10.244.2.0/23", "fd00:10:244:2::/63");
    format!("{n1}---\n{n2}")
}

fn service_text(service: &Service, slices: &[String; 2]) -> String {
    let Service { name, balanced, .. } = service;
    let [v4, v6] = Family::ALL.map(|family| service.cluster_ip(family));
    let kind = if *balanced {
        "LoadBalancer"
    } else {
        "NodePort"
    };
    let mut text = format!(
        "\
apiVersion: v1
kind: Service
metadata:
  name: {name}
  namespace: default
spec:
  type: {kind}
  clusterIP: {v4}
  clusterIPs: [\"{v4}\", \"{v6}\"]
  ipFamilies: [IPv4, IPv6]
  ipFamilyPolicy: RequireDualStack
  selector:
    app: {name}
  ports:
"
    );
    for protocol in Protocol::ALL.map(Protocol::name) {
        let (upper, port) = (protocol.to_uppercase(), service.node_port());
        let _ = writeln!(
            text,
            "  - name: {protocol}\n    protocol: {upper}\n    port: {SERVICE_PORT}\n    \
             targetPort: {POD_PORT}\n    nodePort: {port}"
        );
    }
    if *balanced {
        let [v4, v6] = Family::ALL.map(load_balancer);
        let _ = writeln!(
            text,
            "status:\n  loadBalancer:\n    ingress:\n    - ip: {v4}\n    - ip: \"{v6}\""
        );
    }
    format!("{text}---\n{}\n---\n{}\n", slices[0], slices[1])
}

fn endpoint_slice(service: &Service, family: Family, backends: &[(&str, &str, IpAddr)]) -> String {
    let name = format!("{}-ipv{}", service.name, family.digit());
    let endpoints: Vec<_> = backends
        .iter()
        .map(|(pod, node, ip)| {
            json!({
                "addresses": [ip.to_string()],
                "conditions": { "ready": true, "serving": true, "terminating": false },
                "nodeName": node,
                "zone": format!("zone-{node}"),
                "targetRef": { "kind": "Pod", "namespace": "default", "name": pod },
            })
        })
        .collect();
    let ports = Protocol::ALL.map(|protocol| {
        json!({
            "name": protocol.name(),
            "protocol": protocol.name().to_uppercase(),
            "port": POD_PORT,
        })
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": name,
            "namespace": "default",
            "labels": { "kubernetes.io/service-name": service.name },
        },
        "addressType": family.name(),
        "endpoints": endpoints,
        "ports": ports,
    });
    // JSON is YAML too; a document each.
    format!("{slice:#}")
}

fn replace(path: &Path, text: &str) -> Result<()> {
    let written = path.with_extension("new");
    std::fs::write(&written, text).with_context(|| format!("write {}", written.display()))?;
    std::fs::rename(&written, path).with_context(|| format!("rename to {}", path.display()))
}
