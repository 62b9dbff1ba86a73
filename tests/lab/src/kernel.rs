//! The same Services by kernel rules: nftables NAT as a careful kube-proxy would write it.
//!
//! It is no mirror and no product: the lab's rows are proven with it before any engine is asked, and the benches compare
//! against it. Where the engine keeps the client's address (a backend on this node), so do these rules.

use std::fmt::Write as _;

use anyhow::{Context as _, Result};

use crate::namespace::feed;
use crate::plan::{
    Family, POD_PORT, PODS, Pod, Protocol, SERVICE_PORT, Service, Site, load_balancer, services,
};
use crate::topology::Lab;

/// Loads the rules on both nodes.
pub fn serve(lab: &Lab) -> Result<()> {
    for node in [Site::N1, Site::N2] {
        let mut nft = lab.at(node).command("nft");
        nft.args(["-f", "-"]);
        feed(nft, &ruleset(node)).context("load NAT rules")?;
    }
    Ok(())
}

/// Removes what [`serve`] loaded.
pub fn remove(lab: &Lab) -> Result<()> {
    for node in [Site::N1, Site::N2] {
        for family in ["ip", "ip6"] {
            lab.at(node)
                .output("nft", &["delete", "table", family, "lab_nat"])?;
        }
    }
    Ok(())
}

fn ruleset(node: Site) -> String {
    Family::ALL.map(|family| table(node, family)).concat()
}

fn table(node: Site, family: Family) -> String {
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    let mut rules = String::new();
    for service in &services() {
        let dnat = to_backends(service, family);
        let (cluster_ip, port) = (service.cluster_ip(family), service.node_port());
        for protocol in Protocol::ALL.map(Protocol::name) {
            let dport = format!("{protocol} dport");
            let _ = writeln!(
                rules,
                "  {ip} daddr {cluster_ip} {dport} {SERVICE_PORT} {dnat}"
            );
            let _ = writeln!(rules, "  fib daddr type local {dport} {port} {dnat}");
            if service.balanced {
                let address = load_balancer(family);
                let _ = writeln!(
                    rules,
                    "  {ip} daddr {address} {dport} {SERVICE_PORT} {dnat}"
                );
            }
        }
    }
    let hairpins: String = PODS
        .iter()
        .map(|pod| pod.address(family))
        .map(|pod| format!("  {ip} saddr {pod} {ip} daddr {pod} ct status dnat masquerade\n"))
        .collect();
    let (services, own) = match family {
        Family::V4 => ("10.96.0.0/12", pods_on(node, family)),
        Family::V6 => ("fd00:10:96::/112", pods_on(node, family)),
    };
    let external = format!("ct status dnat ct original {ip} daddr != {services}");
    format!(
        "table {ip} lab_nat {{
 chain services {{
{rules} }}
 chain prerouting {{
  type nat hook prerouting priority dstnat; policy accept;
  jump services
 }}
 chain output {{
  type nat hook output priority -100; policy accept;
  jump services
 }}
 chain postrouting {{
  type nat hook postrouting priority srcnat; policy accept;
{hairpins}  {external} {ip} daddr != {{ {own} }} masquerade
 }}
}}
"
    )
}

fn to_backends(service: &Service, family: Family) -> String {
    let pods: Vec<&Pod> = PODS
        .iter()
        .filter(|pod| service.backends.iter().any(|name| name == pod.name))
        .collect();
    let elements: Vec<String> = pods
        .iter()
        .enumerate()
        .map(|(at, pod)| format!("{at} : {} . {POD_PORT}", pod.address(family)))
        .collect();
    let ip = if family == Family::V4 { "ip" } else { "ip6" };
    format!(
        "dnat {ip} to numgen random mod {} map {{ {} }}",
        pods.len(),
        elements.join(", ")
    )
}

fn pods_on(node: Site, family: Family) -> String {
    let own = PODS.iter().filter(|pod| pod.node == node);
    own.map(|pod| pod.address(family).to_string())
        .collect::<Vec<_>>()
        .join(", ")
}
