//! Which devices are uplinks, pods' or overlays': by configuration, name and kind. Decides only.

use std::net::IpAddr;

use anyhow::{Context, bail};
use control::kernel::Kernel;
use control::links::{Link, LinkKind, Links};
use control::neighbor::Tables;
use control::snapshot::DeviceRole;
use dataplane::engine::UplinkSpec;
use dataplane::steering::DeviceKind;

use crate::config::Config;

/// The part that each device plays.
#[derive(Debug, Default)]
pub(crate) struct Roles {
    uplinks: Vec<u32>,
    pod_interfaces: Vec<String>,
}

impl Roles {
    pub(crate) fn new(uplinks: &[UplinkSpec], pod_interfaces: &[String]) -> Self {
        Self {
            uplinks: uplinks.iter().map(|uplink| uplink.ifindex).collect(),
            pod_interfaces: pod_interfaces.to_vec(),
        }
    }

    /// The role of a device, and as what it is steered at tc.
    pub(crate) fn of(&self, link: &Link) -> (DeviceRole, Option<DeviceKind>) {
        if let Some(number) = self
            .uplinks
            .iter()
            .position(|&ifindex| ifindex == link.ifindex)
        {
            let role = DeviceRole {
                uplink: u8::try_from(number).ok(),
                hooked_egress: true,
                ..DeviceRole::default()
            };
            return (role, None);
        }
        let hooked = DeviceRole {
            hooked_ingress: true,
            hooked_egress: true,
            ..DeviceRole::default()
        };
        if self.is_pod(link) {
            (
                DeviceRole {
                    is_pod: true,
                    ..hooked
                },
                Some(DeviceKind::Pod),
            )
        } else if is_overlay(link) {
            (hooked, Some(DeviceKind::Overlay))
        } else {
            (DeviceRole::default(), None)
        }
    }

    /// The near end of a veth pair whose other end is in a pod's namespace.
    fn is_pod(&self, link: &Link) -> bool {
        link.kind == LinkKind::Veth
            && link.peer_elsewhere
            && self
                .pod_interfaces
                .iter()
                .any(|pattern| matches(pattern, &link.name))
    }
}

fn is_overlay(link: &Link) -> bool {
    match &link.kind {
        LinkKind::Vxlan => true,
        LinkKind::Other(kind) => kind == "geneve",
        _ => false,
    }
}

/// A `*` at the end stands for the rest.
fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(start) => name.starts_with(start),
        None => pattern == name,
    }
}

/// The devices towards the wire: those that are named, else the one that holds the node's address.
pub(crate) fn uplinks(
    config: &Config,
    node_addresses: &[IpAddr],
) -> anyhow::Result<Vec<UplinkSpec>> {
    let (links, tables) = kernel()?;
    if config.engine.uplinks.is_empty() {
        let holds = |ip| tables.addresses.iter().find(|entry| entry.address == ip);
        let holder = node_addresses.iter().find_map(|&ip| holds(ip));
        let Some(holder) = holder else {
            bail!(
                "no device holds an InternalIP of the Node {}; name the device towards the wire with --uplink",
                config.node
            );
        };
        let link = links
            .get(&holder.ifindex)
            .context("the device has just gone; start again")?;
        return Ok(vec![spec(link)?]);
    }
    let named = |name: &String| {
        let link = links.values().find(|link| link.name == *name);
        spec(link.with_context(|| format!("there is no network device {name}"))?)
    };
    config.engine.uplinks.iter().map(named).collect()
}

fn spec(link: &Link) -> anyhow::Result<UplinkSpec> {
    let Some(mac) = link.mac else {
        bail!(
            "{} is no Ethernet device, so it cannot be an uplink",
            link.name
        );
    };
    Ok(UplinkSpec {
        name: link.name.clone(),
        ifindex: link.ifindex,
        mac,
        queues: link.queues.max(1),
        mtu: link.mtu,
        is_virtual: link.kind == LinkKind::Veth,
    })
}

/// Devices, addresses and routes as they are now.
fn kernel() -> anyhow::Result<(Links, Tables)> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut kernel = Kernel::connect()?;
        kernel.refresh().await?;
        Ok((kernel.links.clone(), kernel.tables.clone()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(name: &str, kind: LinkKind, peer_elsewhere: bool) -> Link {
        Link {
            ifindex: 7,
            name: name.to_owned(),
            kind,
            mac: None,
            mtu: 1500,
            queues: 1,
            up: true,
            master: None,
            peer: None,
            peer_elsewhere,
        }
    }

    fn kind(name: &str, kind: LinkKind, peer_elsewhere: bool) -> Option<DeviceKind> {
        let roles = Roles::new(&[], &["cali*".to_owned(), "exact".to_owned()]);
        roles.of(&link(name, kind, peer_elsewhere)).1
    }

    #[test]
    fn a_veth_into_another_namespace_with_a_pods_name_is_a_pods() {
        assert_eq!(
            kind("cali12ab", LinkKind::Veth, true),
            Some(DeviceKind::Pod)
        );
        assert_eq!(kind("exact", LinkKind::Veth, true), Some(DeviceKind::Pod));
        assert_eq!(kind("exactly", LinkKind::Veth, true), None);
        assert_eq!(kind("cali12ab", LinkKind::Veth, false), None);
        assert_eq!(kind("cali12ab", LinkKind::Bridge, true), None);
    }

    #[test]
    fn tunnels_are_overlays_and_bridges_are_left_alone() {
        assert_eq!(
            kind("vxlan.calico", LinkKind::Vxlan, false),
            Some(DeviceKind::Overlay)
        );
        assert_eq!(kind("cni0", LinkKind::Bridge, false), None);
    }

    #[test]
    fn an_uplink_is_hooked_at_egress_and_not_steered_as_a_pod() {
        let uplink = UplinkSpec {
            name: "cali0".to_owned(),
            ifindex: 7,
            mac: dataplane::net::MacAddr::default(),
            queues: 1,
            mtu: 1500,
            is_virtual: true,
        };
        let roles = Roles::new(&[uplink], &["cali*".to_owned()]);
        let (role, kind) = roles.of(&link("cali0", LinkKind::Veth, true));
        assert_eq!(
            (role.uplink, role.hooked_ingress, role.hooked_egress),
            (Some(0), false, true)
        );
        assert_eq!(kind, None);
    }
}
