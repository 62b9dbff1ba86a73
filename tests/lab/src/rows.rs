//! The rows of the table: every path that must work, in both families and both protocols, with what is expected of it.
//!
//! A row is right when every request was answered, no payload was wrong, every expected backend and no other answered, and
//! each saw the source address that the path demands. There is no tolerance in any of these.
//!
//! Rule to keep: a row is never weakened to become right; its expectation is the issue's.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};

use crate::client::{Answer, Asking, Connection, Tally, ask, ping};
use crate::plan::{
    Family, NODE_PORT_OF_ITS_OWN, POD_PORT, PODS, Protocol, SERVICE_PORT, Service, Site, address,
    load_balancer, node_addresses, pod, services,
};
use crate::topology::Lab;

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// `path/protocol+family`, as in `rows.txt`.
    pub name: String,
    /// In words.
    pub title: &'static str,
    from: Site,
    work: Work,
    expect: Expect,
}

/// A row that was run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which row.
    pub name: String,
    /// In words.
    pub title: &'static str,
    /// What was counted.
    pub tally: Tally,
    /// Empty when right, else each thing that is wrong.
    pub faults: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// So many requests, from so many threads, each from a port of its own.
    Ask {
        asking: Asking,
        requests: u64,
        threads: u64,
    },
    /// A long stream there and a long one back.
    Stream { target: SocketAddr, length: u64 },
    /// So many ICMP echoes.
    Ping { target: IpAddr, count: u16 },
    /// Forget the neighbour, speak to it, find it again with the right address.
    Resolve { target: Site, family: Family },
}

#[derive(Clone, Debug)]
struct Expect {
    backends: Vec<String>,
    source: Source,
}

/// Which source address a server must see.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// The client's own.
    Kept,
    /// One of the node's.
    Node(Site),
    /// One of the node's, where the client is a process of it.
    Own(Site),
    /// The client's own at backends on the node, one of the node's at others.
    KeptOn(Site),
    /// Nobody looks: there is no server.
    Unseen,
}

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

/// The lines of `rows.txt`.
pub fn listed() -> impl Iterator<Item = &'static str> {
    let lines = include_str!("../rows.txt").lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

impl Row {
    /// Sends the row's traffic and judges it.
    #[must_use]
    pub fn run(&self, lab: &Lab) -> Outcome {
        let tally = match self.work {
            Work::Resolve { target, family } => one(resolve(lab, self.from, target, family)),
            _ => lab.at(self.from).run(|| self.work.send(lab)),
        };
        let faults = self.expect.faults(&tally);
        Outcome {
            name: self.name.clone(),
            title: self.title,
            tally,
            faults,
        }
    }

    /// Whether a Service is asked.
    #[must_use]
    pub fn needs_service(&self) -> bool {
        !self.name.starts_with("direct-") && !self.name.starts_with("node-")
    }

    /// The outcome where nobody serves: wrong, without the wait.
    #[must_use]
    pub fn not_served(&self) -> Outcome {
        let faults = vec!["not sent: nobody serves".to_owned()];
        Outcome {
            name: self.name.clone(),
            title: self.title,
            tally: Tally::default(),
            faults,
        }
    }
}

impl Outcome {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.faults.is_empty()
    }
}

impl Work {
    fn send(&self, lab: &Lab) -> Tally {
        match *self {
            Self::Ask {
                asking,
                requests,
                threads: 1,
            } => ask(&asking, requests),
            Self::Ask {
                asking,
                requests,
                threads,
            } => thread::scope(|scope| {
                let share = requests / threads;
                let threads: Vec<_> = (0..threads)
                    .map(|_| scope.spawn(move || ask(&asking, share)))
                    .collect();
                let mut tally = Tally::default();
                for thread in threads {
                    tally.merge(thread.join().expect("a client does not panic"));
                }
                tally
            }),
            Self::Stream { target, length } => stream(target, length),
            Self::Ping { target, count } => {
                let mut tally = Tally::default();
                for number in 0..count {
                    tally.add(
                        ping(target, number, UDP_PATIENCE).map(|took| echo_reply(target, took)),
                    );
                }
                tally
            }
            Self::Resolve { target, family } => one(resolve(lab, Site::Client, target, family)),
        }
    }
}

impl Expect {
    fn faults(&self, tally: &Tally) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |wrong: bool, text: String| faults.extend(wrong.then_some(text));
        let missing = tally.requests - tally.answered;
        let reason = tally.failure.as_deref().unwrap_or_default();
        fault(missing > 0, format!("{missing} unanswered: {reason}"));
        fault(tally.wrong > 0, format!("{} wrong payloads", tally.wrong));
        let expected: BTreeSet<&str> = self.backends.iter().map(String::as_str).collect();
        let answered: BTreeSet<&str> = tally.shares.keys().map(String::as_str).collect();
        for stranger in answered.difference(&expected) {
            fault(true, format!("{stranger} answered"));
        }
        let fair = tally.requests / (expected.len() as u64 * 2);
        for backend in &expected {
            let share = tally.shares.get(*backend).copied().unwrap_or_default();
            fault(
                tally.answered > 0 && share < fair.max(1),
                format!("{backend} answered {share} times"),
            );
        }
        for (server, sources) in &tally.sources {
            let strange = sources
                .iter()
                .find(|source| !self.source.allows(server, **source));
            if let Some(source) = strange {
                let seen = source.map_or("the client's own".to_owned(), |ip| ip.to_string());
                fault(true, format!("{server} saw source {seen}"));
            }
        }
        faults
    }
}

impl Source {
    /// Whether `server` may have seen `source`; `None` stands for the client's own address.
    fn allows(self, server: &str, source: Option<IpAddr>) -> bool {
        let of_node = |node| source.is_some_and(|ip| node_addresses(node).contains(&ip));
        match self {
            Self::Kept => source.is_none(),
            Self::Node(node) => of_node(node),
            Self::Own(node) => source.is_none() || of_node(node),
            Self::KeptOn(node) => {
                let local = PODS
                    .iter()
                    .any(|pod| pod.name == server && pod.node == node);
                if local {
                    source.is_none()
                } else {
                    of_node(node)
                }
            }
            Self::Unseen => true,
        }
    }
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

fn stream(target: SocketAddr, length: u64) -> Tally {
    let mut tally = Tally::default();
    match Connection::open(target, TCP_PATIENCE) {
        Ok(mut connection) => {
            tally.add(connection.put(length, 1));
            tally.add(connection.get(length, 2));
        }
        Err(error) => tally.add(Err(error)),
    }
    tally
}

/// Both sides forget each other; one asks, then both must know the other's address again.
fn resolve(lab: &Lab, from: Site, to: Site, family: Family) -> Result<Answer> {
    for site in [from, to] {
        lab.at(site)
            .output("ip", &["neigh", "flush", "dev", "eth0"])?;
    }
    let (target, own) = (address(to, family), address(from, family));
    let took = lab.at(from).run(|| ping(target, 1, UDP_PATIENCE))?;
    for (site, other, ip) in [(from, to, target), (to, from, own)] {
        let expected = lab
            .at(other)
            .output("cat", &["/sys/class/net/eth0/address"])?;
        let entry = lab
            .at(site)
            .output("ip", &["neigh", "show", &ip.to_string(), "dev", "eth0"])?;
        ensure!(
            entry.contains(expected.trim()),
            "{}: {entry:?}",
            site.name()
        );
    }
    Ok(Answer {
        server: to.name().to_owned(),
        ..echo_reply(target, took)
    })
}

fn echo_reply(target: IpAddr, took: Duration) -> Answer {
    let unseen = SocketAddr::new(target, 0);
    Answer {
        server: target.to_string(),
        own: unseen,
        seen: unseen,
        bytes: 128,
        right: true,
        took,
    }
}

fn one(outcome: Result<Answer>) -> Tally {
    let mut tally = Tally::default();
    tally.add(outcome);
    tally
}

fn service(name: &str) -> Service {
    let found = services().into_iter().find(|service| service.name == name);
    found.expect("rows name Services of the plan")
}

fn site(name: &str) -> Site {
    pod(name)
        .with_context(|| format!("pod {name}"))
        .expect("rows name pods of the plan")
}

const WEB: [&str; 4] = ["n1a", "n1b", "n2a", "n2b"];
const REQUESTS: u64 = 100;
const STREAM: u64 = 100_000_000;
const TCP_PATIENCE: Duration = Duration::from_secs(3);
const UDP_PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_row_exists_and_no_name_is_given_twice() {
        let mut names: Vec<String> = all().into_iter().map(|row| row.name).collect();
        names.extend(crate::proof::NAMES.map(str::to_owned));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        for listed in listed() {
            assert!(
                names.iter().any(|name| name == listed),
                "{listed} is not a row"
            );
        }
    }

    #[test]
    fn a_missing_answer_a_wrong_payload_and_a_stranger_are_faults() {
        let expect = Expect {
            backends: vec!["n1a".to_owned()],
            source: Source::Kept,
        };
        let own: SocketAddr = "192.0.2.100:1000".parse().unwrap();
        let right = |server: &str, right| Answer {
            server: server.to_owned(),
            own,
            seen: own,
            bytes: 1,
            right,
            took: Duration::ZERO,
        };
        let faults = |outcome| expect.faults(&one(outcome));
        assert!(faults(Ok(right("n1a", true))).is_empty());
        assert!(!faults(Ok(right("n1a", false))).is_empty());
        assert!(!faults(Ok(right("n1b", true))).is_empty());
        assert!(!faults(Err(anyhow::anyhow!("timed out"))).is_empty());
        let seen = "192.0.2.11:1000".parse().unwrap();
        assert!(
            !faults(Ok(Answer {
                seen,
                ..right("n1a", true)
            }))
            .is_empty()
        );
    }
}
