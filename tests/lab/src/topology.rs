//! Lays the lab out: namespaces, devices, addresses, routes, sysctls and the nodes' packet filter.
//!
//! Everything here is what a node has before a service proxy starts: strict reverse-path checks, a stateful filter that
//! drops what conntrack calls invalid, no NAT rule, no permanent neighbour. No part of it helps the proxy.
//!
//! Rule to keep: what is made lives in a namespace whose name carries the lab's prefix, or in its folder; the reaper
//! removes exactly these.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};

use crate::namespace::{Namespace, feed, ip_batch};
use crate::plan::{
    Attachment, BRIDGE_V4, BRIDGE_V6, Family, NODE_PORT_OF_ITS_OWN, POD_PORT, PODS, Pod, Site,
    address, load_balancer, overlay_address,
};
use crate::proof::Counted;
use crate::reaper::Reaper;
use crate::server::Servers;

/// How to lay the lab out.
#[derive(Clone, Debug)]
pub struct Options {
    /// Receive and transmit queues of each device on the wire.
    pub queues: u32,
    /// Whether every end that sends computes its checksums itself.
    pub tx_off: bool,
}

/// A lab that is up. Dropping it stops its servers and removes all of it.
#[derive(Debug)]
pub struct Lab {
    servers: Servers,
    namespaces: BTreeMap<Site, Namespace>,
    counted: Mutex<BTreeMap<Site, Counted>>,
    name: String,
    dir: PathBuf,
    reaper: Reaper,
}

/// A pod beside those of the plan, with its servers. [`ExtraPod::remove`] deletes it as a container runtime would.
#[derive(Debug)]
pub struct ExtraPod {
    servers: Servers,
    namespace: Namespace,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            queues: 2,
            tx_off: false,
        }
    }
}

impl Lab {
    /// Lays out a lab under a name of its own and starts its servers.
    pub fn new(options: &Options) -> Result<Self> {
        ensure!(rustix::process::geteuid().is_root(), "the lab needs root");
        let name = unique_name()?;
        let dir = folder(&name);
        let reaper = Reaper::start(&name, &dir)?;
        std::fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        let spaces: String = Site::all()
            .map(|site| format!("netns add {name}-{}\n", site.name()))
            .collect();
        ip_batch(None, &spaces)?;
        let namespaces = open(&name)?;
        let mut lab = Self {
            servers: Servers::default(),
            namespaces,
            counted: Mutex::default(),
            name,
            dir,
            reaper,
        };
        lab.set_sysctls()?;
        ip_batch(None, &lab.links(options.queues))?;
        lab.set_addresses()?;
        for node in [Site::N1, Site::N2] {
            let mut nft = lab.at(node).command("nft");
            nft.args(["-f", "-"]);
            feed(nft, FILTER).context("load the node's filter")?;
        }
        if options.tx_off {
            lab.turn_checksum_offload_off()?;
        }
        lab.servers = serve(&lab.namespaces)?;
        Ok(lab)
    }

    /// Starts the servers of a lab that was kept, and serves until killed.
    pub fn serve_kept(name: &str) -> Result<()> {
        serve(&open(name)?)?.wait();
        Ok(())
    }

    /// The lab's prefix.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// A folder for manifests, state and logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// One of the namespaces.
    #[must_use]
    pub fn at(&self, site: Site) -> &Namespace {
        &self.namespaces[&site]
    }

    /// Makes a pod that the plan does not have.
    pub fn add_pod(&self, pod: &Pod) -> Result<ExtraPod> {
        let name = format!("{}-{}", self.name, pod.name);
        ip_batch(
            None,
            &format!("netns add {name}\n{}", pod_link(&self.name, pod)),
        )?;
        let namespace = Namespace::open(&name)?;
        namespace.sysctls(&SYSCTLS)?;
        join_pod(self.at(pod.node), &namespace, pod)?;
        let mut servers = Servers::default();
        for family in Family::ALL {
            let at = SocketAddr::new(pod.address(family), POD_PORT);
            servers.add(&namespace, pod.name, at)?;
        }
        Ok(ExtraPod { servers, namespace })
    }

    /// Stops the servers: who measures brings its own.
    pub fn stop_servers(&mut self) {
        self.servers = Servers::default();
    }

    /// Stops the servers and leaves everything else up.
    pub fn keep(self) -> Result<()> {
        drop(self.servers);
        self.reaper.keep()
    }

    /// Remembers what the devices of a node have counted, before an engine is started on it.
    pub fn count(&self, node: Site) {
        let counted = Counted::now(self, node);
        self.counted
            .lock()
            .expect("nobody panics while counting")
            .insert(node, counted);
    }

    /// What [`Lab::count`] remembered.
    #[must_use]
    pub fn counted(&self, node: Site) -> Counted {
        let counted = self.counted.lock().expect("nobody panics while counting");
        counted.get(&node).copied().unwrap_or_default()
    }

    fn set_sysctls(&self) -> Result<()> {
        for (site, namespace) in &self.namespaces {
            namespace.sysctls(&SYSCTLS)?;
            if matches!(site, Site::Wire | Site::N1 | Site::N2) {
                namespace.sysctls(&["net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1"])?;
            }
        }
        Ok(())
    }

    fn links(&self, queues: u32) -> String {
        let name = &self.name;
        let queues = format!("numtxqueues {queues} numrxqueues {queues}");
        let bridge = "type bridge stp_state 0 forward_delay 0";
        // On the wire nobody asks for groups, so a snooping bridge would learn none.
        let mut script = format!("link add lan netns {name}-wire {bridge} mcast_snooping 0\n");
        for site in [Site::Client, Site::N1, Site::N2].map(Site::name) {
            let _ = writeln!(
                script,
                "link add eth0 netns {name}-{site} {queues} type veth \
                 peer name {site} netns {name}-wire {queues}"
            );
        }
        let _ = writeln!(script, "link add br0 netns {name}-n1 {bridge}");
        for pod in &PODS {
            script.push_str(&pod_link(name, pod));
        }
        script
    }

    fn set_addresses(&self) -> Result<()> {
        self.at(Site::Wire).ip(&wire_script())?;
        self.at(Site::Client).ip(&client_script())?;
        for node in [Site::N1, Site::N2] {
            self.at(node).ip(&node_script(node))?;
        }
        // What comes by the overlay goes back by it, and the reverse-path check agrees. A batch of `ip` takes rules of
        // one family only.
        for (option, family) in [("-4", Family::V4), ("-6", Family::V6)] {
            let from = pods_of(3, family);
            let rule = [
                option, "rule", "add", "from", &from, "lookup", "100", "pref", "100",
            ];
            self.at(Site::N2).output("ip", &rule)?;
        }
        for (at, pod) in PODS.iter().enumerate() {
            join_pod(self.at(pod.node), self.at(Site::Pod(at)), pod)?;
        }
        Ok(())
    }

    fn turn_checksum_offload_off(&self) -> Result<()> {
        for (site, namespace) in &self.namespaces {
            if *site != Site::Wire {
                namespace.output("ethtool", &["-K", "eth0", "tx", "off"])?;
            }
        }
        Ok(())
    }
}

impl ExtraPod {
    /// Where it lives.
    #[must_use]
    pub fn namespace(&self) -> &Namespace {
        &self.namespace
    }

    /// Deletes it: the namespace goes, and with it both ends of the veth.
    pub fn remove(self) -> Result<()> {
        drop(self.servers);
        let name = self.namespace.name().to_owned();
        drop(self.namespace);
        ip_batch(None, &format!("netns del {name}\n"))
    }
}

/// Where a lab keeps its files.
#[must_use]
pub fn folder(name: &str) -> PathBuf {
    std::env::temp_dir().join(name)
}

/// The command of `ip -batch` that makes a pod's veth.
#[must_use]
pub fn pod_link(lab: &str, pod: &Pod) -> String {
    let Pod { name, host_end, .. } = pod;
    let node = pod.node.name();
    format!("link add {host_end} netns {lab}-{node} type veth peer name eth0 netns {lab}-{name}\n")
}

/// Gives both ends of a pod's veth their addresses and routes, as its kind of CNI plug-in does.
pub fn join_pod(node: &Namespace, inside: &Namespace, pod: &Pod) -> Result<()> {
    let Pod {
        host_end, v4, v6, ..
    } = pod;
    if pod.attachment == Attachment::Bridged {
        node.ip(&format!(
            "link set {host_end} master br0 up\n\
             link set {host_end} type bridge_slave hairpin on\n"
        ))?;
        return inside.ip(&format!(
            "link set lo up\nlink set eth0 up\n\
             addr add {v4}/25 dev eth0\naddr add {v6}/80 dev eth0 nodad\n\
             route add default via {BRIDGE_V4}\nroute add default via {BRIDGE_V6}\n"
        ));
    }
    // Calico gives all its host ends one MAC address and answers ARP for the gateway by proxy.
    node.ip(&format!(
        "link set {host_end} address ee:ee:ee:ee:ee:ee\nlink set {host_end} up\n\
         addr add fe80::1/64 dev {host_end} nodad\n\
         route add {v4}/32 dev {host_end} scope link\nroute add {v6}/128 dev {host_end}\n"
    ))?;
    node.sysctls(&[
        &format!("net.ipv4.conf.{host_end}.proxy_arp=1"),
        &format!("net.ipv4.neigh.{host_end}.proxy_delay=0"),
    ])?;
    // A pod behind the overlay has the overlay's MTU, as CNI plug-ins set it.
    let mtu = if pod.attachment == Attachment::Overlay {
        1430
    } else {
        1500
    };
    inside.ip(&format!(
        "link set lo up\nlink set eth0 mtu {mtu} up\n\
         addr add {v4}/32 dev eth0\naddr add {v6}/128 dev eth0 nodad\n\
         route add 169.254.1.1 dev eth0 scope link\nroute add default via 169.254.1.1 dev eth0\n\
         route add default via fe80::1 dev eth0\n"
    ))
}

fn wire_script() -> String {
    let mut script = String::from("link set lo up\nlink set lan up\n");
    for site in [Site::Client, Site::N1, Site::N2].map(Site::name) {
        let _ = writeln!(script, "link set {site} master lan up");
    }
    script + &wire_address(Site::Wire, "lan")
}

fn client_script() -> String {
    let mut script = format!(
        "link set lo up\nlink set eth0 up\n{}",
        wire_address(Site::Client, "eth0")
    );
    script.push_str(&default_routes());
    for family in Family::ALL {
        let (to, via) = (load_balancer(family), address(Site::N1, family));
        let _ = writeln!(script, "route add {to} via {via}");
    }
    script
}

fn node_script(node: Site) -> String {
    let other = if node == Site::N1 { Site::N2 } else { Site::N1 };
    let mut script = format!(
        "link set lo up\nlink set eth0 up\n{}",
        wire_address(node, "eth0")
    );
    script.push_str(&default_routes());
    let peer = address(other, Family::V4);
    let _ = writeln!(
        script,
        "link add vxlan0 type vxlan id 42 dstport 4789 remote {peer} dev eth0\n\
         link set vxlan0 up"
    );
    for (family, bits) in [(Family::V4, 24), (Family::V6, 64)] {
        let own = overlay_address(node, family);
        let nodad = if family == Family::V6 { "nodad" } else { "" };
        let _ = writeln!(script, "addr add {own}/{bits} dev vxlan0 {nodad}");
        let (via, over) = (address(other, family), overlay_address(other, family));
        if node == Site::N1 {
            let _ = writeln!(script, "route add {} via {via}", pods_of(2, family));
            let _ = writeln!(
                script,
                "route add {} via {over} dev vxlan0",
                pods_of(3, family)
            );
        } else {
            let _ = writeln!(script, "route add {} via {via}", pods_of(1, family));
            let to = pods_of(1, family);
            let _ = writeln!(script, "route add {to} via {over} dev vxlan0 table 100");
        }
    }
    if node == Site::N1 {
        let _ = writeln!(
            script,
            "link set br0 up\naddr add {BRIDGE_V4}/25 dev br0\naddr add {BRIDGE_V6}/80 dev br0 nodad"
        );
    }
    script
}

fn wire_address(site: Site, device: &str) -> String {
    let (v4, v6) = (address(site, Family::V4), address(site, Family::V6));
    format!("addr add {v4}/24 dev {device}\naddr add {v6}/64 dev {device} nodad\n")
}

fn default_routes() -> String {
    let gateways = Family::ALL.map(|family| address(Site::Wire, family));
    gateways
        .map(|gateway| format!("route add default via {gateway}\n"))
        .concat()
}

/// A range of pod addresses.
fn pods_of(number: u8, family: Family) -> String {
    match family {
        Family::V4 => format!("10.244.{number}.0/24"),
        Family::V6 => format!("fd00:10:244:{number}::/64"),
    }
}

fn open(name: &str) -> Result<BTreeMap<Site, Namespace>> {
    Site::all()
        .map(|site| Ok((site, Namespace::open(&format!("{name}-{}", site.name()))?)))
        .collect()
}

fn serve(namespaces: &BTreeMap<Site, Namespace>) -> Result<Servers> {
    let mut servers = Servers::default();
    for (site, namespace) in namespaces {
        let port = match site {
            Site::Wire | Site::Client => continue,
            Site::N1 | Site::N2 => NODE_PORT_OF_ITS_OWN,
            Site::Pod(_) => POD_PORT,
        };
        for family in Family::ALL {
            let at = SocketAddr::new(address(*site, family), port);
            servers.add(namespace, site.name(), at)?;
        }
    }
    Ok(servers)
}

/// A prefix that no other run has; `/proc` hands out the randomness.
fn unique_name() -> Result<String> {
    let uuid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
    Ok(format!("sluice-{}", &uuid[..6]))
}

/// What every namespace has before its devices are made.
const SYSCTLS: [&str; 7] = [
    "net.ipv6.conf.all.disable_ipv6=0",
    "net.ipv6.conf.default.disable_ipv6=0",
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.default.accept_ra=0",
    "net.ipv4.conf.all.rp_filter=1",
    "net.ipv4.conf.default.rp_filter=1",
    "net.ipv4.ping_group_range=0 2147483647",
];

/// What a node's own policy looks like to a proxy: stateful, and closed to what conntrack does not know. Neighbour
/// discovery between two ports of the bridge passes the hook too, and is never tracked.
const FILTER: &str = "
table inet node {
    chain input {
        type filter hook input priority filter; policy accept;
        ct state invalid drop
    }
    chain forward {
        type filter hook forward priority filter; policy drop;
        ct state invalid drop
        ct state established,related accept
        ct state new accept
        icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept
    }
}
";
