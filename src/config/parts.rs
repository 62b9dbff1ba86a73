//! What each part needs of the configuration, in the part's own words.

use std::ops::RangeInclusive;
use std::path::Path;

use control::address;
use control::balance::Scheduler;
use control::node;
use control::policy::ExternalIps;
use control::{ControlConfig, DetectLocalMode};
use dataplane::device::host::IoPreference;
use dataplane::device::uplink::XdpPreference;
use dataplane::engine::{EngineConfig, UplinkSpec};
use dataplane::flow::expiry;

use super::{Cidr, Config, DetectLocal, MirrorMode, NodePortAddresses, XdpMode};

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

    /// What the engine is to be, over these uplinks. `reserved` ports are never masqueraded with;
    /// `seed` is fresh at each start.
    pub(crate) fn engine(
        &self,
        uplinks: Vec<UplinkSpec>,
        reserved: Vec<RangeInclusive<u16>>,
        state_folder: &Path,
        seed: [u64; 4],
    ) -> EngineConfig {
        let ours = &self.engine;
        EngineConfig {
            workers: ours.workers,
            xdp: match ours.xdp {
                XdpMode::Auto => XdpPreference::Auto,
                XdpMode::Zerocopy => XdpPreference::ZeroCopy,
                XdpMode::Copy => XdpPreference::Copy,
                XdpMode::Generic => XdpPreference::Generic,
            },
            io: IoPreference::Uring,
            // Host processes size their segments by it; what they send may leave by any uplink.
            mtu: uplinks
                .iter()
                .map(|uplink| uplink.mtu)
                .min()
                .unwrap_or(ETHERNET_MTU),
            grace: ours.grace,
            hold: ours.hold,
            mark: 1 << ours.mark_bit,
            mirrored: self.served_mirror() != MirrorMode::None,
            snat_ports: ours.snat_ports.first..=ours.snat_ports.last,
            reserved_ports: reserved,
            flows: ours.flows,
            timeouts: self.flow_timeouts(),
            state_folder: state_folder.to_owned(),
            spin: ours.spin,
            seed,
            uplinks,
        }
    }

    /// How long the engine keeps flows.
    fn flow_timeouts(&self) -> expiry::Timeouts {
        let ours = &self.engine.timeouts;
        expiry::Timeouts {
            tcp_syn: ours.tcp_syn,
            tcp_syn_received: ours.tcp_syn_received,
            tcp_established: ours.tcp_established,
            tcp_fin: ours.tcp_fin,
            tcp_close_wait: ours.tcp_close_wait,
            tcp_last_ack: ours.tcp_last_ack,
            tcp_time_wait: ours.tcp_time_wait,
            tcp_close: ours.tcp_close,
            udp_unreplied: ours.udp,
            udp_replied: ours.udp_stream,
            other: ours.other,
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

const ETHERNET_MTU: u32 = 1_500;
