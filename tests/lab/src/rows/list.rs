//! The list itself: each path of the issue with client, target and what is to be expected, in both families and both
//! protocols. How a row is run and judged is not told here.

use std::net::SocketAddr;

use super::{Expect, Row, Source, TCP_PATIENCE, UDP_PATIENCE, Work};
use crate::client::Asking;
use crate::plan::{
    Family, NODE_PORT_OF_ITS_OWN, POD_PORT, Protocol, SERVICE_PORT, Service, Site, address,
    load_balancer, pod, services,
};

/// Every row, in the order of the table.
#[must_use]
pub fn all() -> Vec<Row> {
    let mut rows = Vec::new();
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            let mut list = List {
                rows: &mut rows,
                family,
                protocol,
            };
            // First, because of a known limit: where a pod asks another one both directly and through a Service from the
            // same port, the engine takes the direct reply for the Service's as long as it remembers the flow.
            list.untouched_paths();
            list.client_paths();
            list.pod_paths();
            list.host_paths();
        }
        streams(&mut rows, family);
        unserved(&mut rows, family);
    }
    rows
}

/// Collects the rows of one family and protocol.
struct List<'a> {
    rows: &'a mut Vec<Row>,
    family: Family,
    protocol: Protocol,
}

impl List<'_> {
    fn client_paths(&mut self) {
        let node_port = |name| service(name).at_node(Site::N1, self.family);
        let (local, remote, overlay) = (node_port("n1a"), node_port("n2a"), node_port("n2v"));
        let bridged = node_port("n1c");
        let second = service("n1a").at_node(Site::N2, self.family);
        let balancer = SocketAddr::new(load_balancer(self.family), SERVICE_PORT);
        self.add(
            "client-nodeport-local",
            "client -> NodePort n1 -> pod on n1",
            (Site::Client, local),
            (&["n1a"], Source::Kept),
        );
        self.add(
            "client-nodeport-bridged",
            "client -> NodePort n1 -> bridged pod on n1",
            (Site::Client, bridged),
            (&["n1c"], Source::Kept),
        );
        self.add(
            "client-nodeport-remote",
            "client -> NodePort n1 -> pod on n2",
            (Site::Client, remote),
            (&["n2a"], Source::Node(Site::N1)),
        );
        self.add(
            "client-nodeport-second-node",
            "client -> NodePort n2 -> pod on n1",
            (Site::Client, second),
            (&["n1a"], Source::Node(Site::N2)),
        );
        self.add(
            "client-nodeport-overlay",
            "client -> NodePort n1 -> pod behind VXLAN",
            (Site::Client, overlay),
            (&["n2v"], Source::Node(Site::N1)),
        );
        self.add(
            "client-loadbalancer",
            "client -> LoadBalancer IP -> four pods",
            (Site::Client, balancer),
            (&WEB, Source::KeptOn(Site::N1)),
        );
        if self.protocol == Protocol::Tcp {
            self.add(
                "client-nodeport-20000",
                "20,000 short connections -> NodePort n1 -> one pod on n2",
                (Site::Client, remote),
                (&["n2a"], Source::Node(Site::N1)),
            );
            let row = self.rows.last_mut().expect("a row was just added");
            if let Work::Ask {
                requests,
                threads,
                asking,
            } = &mut row.work
            {
                (*requests, *threads, asking.longest) = (20_000, 4, 64);
            }
        }
    }

    fn pod_paths(&mut self) {
        let family = self.family;
        let cluster_ip = |name| service(name).at_cluster_ip(family);
        let own_node = |name| service(name).at_node(Site::N1, family);
        let paths = [
            (
                "pod-clusterip-routed",
                "routed pod -> ClusterIP -> routed pod, same node",
                "n1a",
                "n1b",
            ),
            (
                "pod-clusterip-bridged",
                "bridged pod -> ClusterIP -> pod on the same bridge",
                "n1c",
                "n1d",
            ),
            (
                "pod-clusterip-routed-bridged",
                "routed pod -> ClusterIP -> bridged pod",
                "n1a",
                "n1d",
            ),
            (
                "pod-clusterip-bridged-routed",
                "bridged pod -> ClusterIP -> routed pod",
                "n1c",
                "n1b",
            ),
            (
                "pod-clusterip-remote",
                "routed pod -> ClusterIP -> pod on n2",
                "n1a",
                "n2a",
            ),
            (
                "pod-clusterip-bridged-remote",
                "bridged pod -> ClusterIP -> pod on n2",
                "n1c",
                "n2a",
            ),
            (
                "pod-clusterip-overlay",
                "routed pod -> ClusterIP -> pod behind VXLAN",
                "n1a",
                "n2v",
            ),
            (
                "pod-clusterip-second-node",
                "pod on n2 -> ClusterIP -> pod on n1",
                "n2a",
                "n1a",
            ),
        ];
        for (path, title, from, to) in paths {
            let target = cluster_ip(to);
            self.add(path, title, (site(from), target), (&[to], Source::Kept));
        }
        let (itself, bridged, local, remote, web) = (
            cluster_ip("n1a"),
            cluster_ip("n1c"),
            own_node("n1b"),
            own_node("n2a"),
            cluster_ip("web"),
        );
        self.add(
            "pod-clusterip-itself",
            "routed pod -> ClusterIP -> itself",
            (site("n1a"), itself),
            (&["n1a"], Source::Node(Site::N1)),
        );
        self.add(
            "pod-clusterip-bridged-itself",
            "bridged pod -> ClusterIP -> itself",
            (site("n1c"), bridged),
            (&["n1c"], Source::Node(Site::N1)),
        );
        self.add(
            "pod-clusterip-web",
            "bridged pod -> ClusterIP -> four pods",
            (site("n1c"), web),
            (&WEB, Source::Kept),
        );
        self.add(
            "pod-nodeport-local",
            "pod -> NodePort of its own node -> pod on n1",
            (site("n1a"), local),
            (&["n1b"], Source::Kept),
        );
        self.add(
            "pod-nodeport-remote",
            "pod -> NodePort of its own node -> pod on n2",
            (site("n1a"), remote),
            (&["n2a"], Source::Node(Site::N1)),
        );
    }

    fn host_paths(&mut self) {
        let paths = [
            (
                "host-clusterip-local",
                "host process -> ClusterIP -> pod on n1",
                "n1a",
            ),
            (
                "host-clusterip-bridged",
                "host process -> ClusterIP -> bridged pod on n1",
                "n1c",
            ),
            (
                "host-clusterip-remote",
                "host process -> ClusterIP -> pod on n2",
                "n2a",
            ),
        ];
        for (path, title, to) in paths {
            let target = service(to).at_cluster_ip(self.family);
            self.add(
                path,
                title,
                (Site::N1, target),
                (&[to], Source::Own(Site::N1)),
            );
        }
    }

    fn untouched_paths(&mut self) {
        let paths = [
            (
                "direct-routed",
                "pod -> pod, routed, no Service",
                "n1a",
                "n1b",
            ),
            (
                "direct-bridged",
                "pod -> pod, same bridge, no Service",
                "n1c",
                "n1d",
            ),
            (
                "direct-remote",
                "pod -> pod on n2, no Service",
                "n1a",
                "n2a",
            ),
            (
                "direct-overlay",
                "pod -> pod behind VXLAN, no Service",
                "n1a",
                "n2v",
            ),
        ];
        for (path, title, from, to) in paths {
            let target = SocketAddr::new(address(site(to), self.family), POD_PORT);
            self.add(path, title, (site(from), target), (&[to], Source::Kept));
        }
        let ssh = SocketAddr::new(address(Site::N1, self.family), NODE_PORT_OF_ITS_OWN);
        self.add(
            "node-own-port",
            "client -> the node's own port (as SSH)",
            (Site::Client, ssh),
            (&["n1"], Source::Kept),
        );
    }

    fn add(
        &mut self,
        path: &str,
        title: &'static str,
        (from, target): (Site, SocketAddr),
        (backends, source): (&[&str], Source),
    ) {
        let (patience, longest) = match self.protocol {
            Protocol::Tcp => (TCP_PATIENCE, 9000),
            Protocol::Udp => (UDP_PATIENCE, 1200),
        };
        // More backends need more requests for their shares to say something.
        let shares = (backends.len() as u64).div_ceil(2);
        let asking = Asking {
            protocol: self.protocol,
            target,
            patience,
            longest,
        };
        self.rows.push(Row {
            name: format!("{path}/{}{}", self.protocol.name(), self.family.digit()),
            title,
            from,
            work: Work::Ask {
                asking,
                requests: REQUESTS * shares,
                threads: 1,
            },
            expect: Expect {
                backends: backends.iter().map(|&b| b.to_owned()).collect(),
                source,
            },
        });
    }
}

/// 100 MB each way, hashed at both ends.
fn streams(rows: &mut Vec<Row>, family: Family) {
    let paths = [
        (
            "stream-clusterip-local",
            "100 MB each way: pod -> ClusterIP -> pod on n1",
            (site("n1a"), service("n1b").at_cluster_ip(family)),
            ("n1b", Source::Kept),
        ),
        (
            "stream-clusterip-remote",
            "100 MB each way: pod -> ClusterIP -> pod on n2",
            (site("n1a"), service("n2a").at_cluster_ip(family)),
            ("n2a", Source::Kept),
        ),
        (
            "stream-nodeport-local",
            "100 MB each way: client -> NodePort n1 -> pod on n1",
            (Site::Client, service("n1a").at_node(Site::N1, family)),
            ("n1a", Source::Kept),
        ),
        (
            "stream-nodeport-remote",
            "100 MB each way: client -> NodePort n1 -> pod on n2",
            (Site::Client, service("n2a").at_node(Site::N1, family)),
            ("n2a", Source::Node(Site::N1)),
        ),
    ];
    for (path, title, (from, target), (backend, source)) in paths {
        rows.push(Row {
            name: format!("{path}/tcp{}", family.digit()),
            title,
            from,
            work: Work::Stream {
                target,
                length: STREAM,
            },
            expect: Expect {
                backends: vec![backend.to_owned()],
                source,
            },
        });
    }
}

/// What is neither TCP nor UDP.
fn unserved(rows: &mut Vec<Row>, family: Family) {
    let (icmp, resolution) = match family {
        Family::V4 => ("icmp", "arp"),
        Family::V6 => ("icmpv6", "nd"),
    };
    let target = address(Site::N1, family);
    rows.push(Row {
        name: format!("node-ping/{icmp}"),
        title: "client -> ping to the node",
        from: Site::Client,
        work: Work::Ping { target, count: 20 },
        expect: Expect {
            backends: vec![target.to_string()],
            source: Source::Unseen,
        },
    });
    rows.push(Row {
        name: format!("node-neighbour/{resolution}"),
        title: "client and node find each other's link address anew",
        from: Site::Client,
        work: Work::Resolve {
            target: Site::N1,
            family,
        },
        expect: Expect {
            backends: vec![Site::N1.name().to_owned()],
            source: Source::Unseen,
        },
    });
}

fn service(name: &str) -> Service {
    let found = services().into_iter().find(|service| service.name == name);
    found.expect("rows name Services of the plan")
}

fn site(name: &str) -> Site {
    pod(name).expect("rows name pods of the plan")
}

const WEB: [&str; 4] = ["n1a", "n1b", "n2a", "n2b"];
const REQUESTS: u64 = 100;
const STREAM: u64 = 100_000_000;
