//! What each part needs of the configuration, in the part's own words.

use control::address;
use control::balance::Scheduler;
use control::node;
use control::policy::ExternalIps;
use control::{ControlConfig, DetectLocalMode};

use super::{Cidr, Config, DetectLocal, NodePortAddresses};

impl Config {
    /// What decides which Services are served here, and by which backends.
    pub(crate) fn control(&self) -> ControlConfig {
        ControlConfig {
            node_name: self.node.clone(),
            cluster_cidrs: ranges(&self.cluster_cidrs),
            node_port_addresses: match &self.node_port_addresses {
                NodePortAddresses::All => node::NodePortAddresses::All,
                NodePortAddresses::Primary => node::NodePortAddresses::Primary,
                NodePortAddresses::Within(within) => {
                    node::NodePortAddresses::Within(ranges(within))
                }
            },
            default_scheduler: Scheduler::from_name(&self.scheduler).unwrap_or_default(),
            masquerade_all: self.masquerade_all,
            detect_local_mode: match &self.detect_local {
                DetectLocal::ClusterCidr => DetectLocalMode::Ranges,
                DetectLocal::NodeCidr => DetectLocalMode::NodeCidr,
                DetectLocal::BridgeInterface(name) => {
                    DetectLocalMode::BridgeInterface(name.clone())
                }
                DetectLocal::InterfaceNamePrefix(prefix) => {
                    DetectLocalMode::InterfaceNamePrefix(prefix.clone())
                }
            },
            external_ips: ExternalIps::Allow,
        }
    }
}

/// The prefixes were checked when they were read, so none is left out.
fn ranges(cidrs: &[Cidr]) -> Vec<address::Cidr> {
    cidrs
        .iter()
        .filter_map(|cidr| address::Cidr::new(cidr.address, cidr.prefix))
        .collect()
}
