//! `sluice trace`: what would happen to the first packet of a connection, decided by the engine's
//! own pipeline over the Services of a folder. Touches nothing, not even this machine's routes: the
//! node is a model of one uplink, by which all that is not a pod of this node is reached.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use control::Resolved;
use control::snapshot::SnapshotMaker;
use dataplane::command::{Hook, Origin};
use dataplane::counters::BackendCounts;
use dataplane::flow::{FlowTable, Slab};
use dataplane::nat::ports::PortAllocator;
use dataplane::net::{Address, Direction, MacAddr, Protocol, Tuple};
use dataplane::pipeline::{
    ChecksumState, Door, Meta, Out, Packet, Pipeline, PipelineParts, Verdict,
};
use dataplane::snapshot::{Fib, Node, NodeDevice, Prefix, Route, SchedulerKind, Snapshot};
use dataplane::steer::{FingerprintKey, WorkerId};
use dataplane::time::Instant;
use serde::Serialize;

use crate::args::{From, Output, Proto, TraceArgs};
use crate::config::{Config, Engine, Source};
use crate::output::{self, Tabular, table};

pub(crate) fn run(args: &TraceArgs, output: Output) -> anyhow::Result<()> {
    if args.src.is_ipv4() != args.dst.is_ipv4() {
        anyhow::bail!("--src and --dst are of different families");
    }
    let config = Config::load(&args.settings)?;
    let Source::Manifests(folder) = &config.source else {
        anyhow::bail!("there is no folder to read; name one with --manifests");
    };
    let resolved = control::resolve_folder(folder, &config.control())?;
    let snapshot = snapshot(&resolved, &config.engine);
    let trace = trace(&snapshot, &probe(args), args.from, &config.engine);
    Ok(output::print(&trace, output)?)
}

/// What becomes of the packet.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Trace {
    /// `forward`, `punt`, `reject` or `drop`.
    verdict: &'static str,
    reason: String,
    /// `namespace/name:port`; empty where the destination is no frontend.
    service: String,
    /// Where it goes; empty where it goes nowhere.
    backend: String,
    /// The addresses it leaves with; null where it does not leave.
    translated: Option<Translated>,
    scheduler: &'static str,
    /// `uplink` or `host`; empty where it does not leave.
    out: &'static str,
}

#[derive(Debug, PartialEq, Eq, Serialize)]
struct Translated {
    src: String,
    dst: String,
}

/// Runs the first packet of a connection through a fresh pipeline.
fn trace(snapshot: &Snapshot, tuple: &Tuple, from: From, engine: &Engine) -> Trace {
    let mut pipeline = pipeline(snapshot, engine);
    let mut bytes = frame(tuple);
    let mut packet = Packet {
        bytes: &mut bytes,
        meta: Meta {
            door: door(from),
            checksum: ChecksumState::Partial,
            super_packet: false,
            handovers: 0,
        },
    };
    let verdict = pipeline.process(&mut packet, Instant::from_secs(1), snapshot);
    let served = snapshot
        .frontend(&tuple.destination, tuple.protocol)
        .map(|frontend| {
            let service = &frontend.service;
            (service.name.to_string(), scheduler_name(service.scheduler))
        });
    let (service, scheduler) = served.unwrap_or_default();
    let nowhere = |verdict, reason: String| Trace {
        verdict,
        reason,
        service: service.clone(),
        backend: String::new(),
        translated: None,
        scheduler,
        out: "",
    };
    match verdict {
        Verdict::Transmit(out) => forwarded(&pipeline, tuple, out, nowhere),
        Verdict::Punt | Verdict::HandOver(_) => nowhere(
            "punt",
            format!(
                "{}/{} is no frontend; the kernel takes it",
                tuple.destination, tuple.protocol
            ),
        ),
        Verdict::Reject => nowhere("reject", format!("{service} has no endpoint to send it to")),
        Verdict::Drop(reason) => nowhere("drop", reason.name().replace('_', " ")),
    }
}

fn forwarded(
    pipeline: &Pipeline,
    tuple: &Tuple,
    out: Out,
    nowhere: impl Fn(&'static str, String) -> Trace,
) -> Trace {
    let found = pipeline.flows().find(tuple);
    let Some(flow) = found.and_then(|(id, _)| pipeline.flows().flow(id)) else {
        return nowhere("punt", "it belongs to no flow".to_owned());
    };
    let source = if flow.is_masqueraded() {
        "is replaced"
    } else {
        "stays"
    };
    let trace = nowhere("forward", format!("a new connection; its source {source}"));
    Trace {
        backend: flow.backend_endpoint().to_string(),
        translated: Some(Translated {
            src: flow.source().to_string(),
            dst: flow.backend_endpoint().to_string(),
        }),
        out: match out {
            Out::Uplink { .. } => "uplink",
            Out::Host(_) => "host",
        },
        ..trace
    }
}

fn probe(args: &TraceArgs) -> Tuple {
    Tuple {
        protocol: match args.proto {
            Proto::Tcp => Protocol::TCP,
            Proto::Udp => Protocol::UDP,
        },
        source: args.src.into(),
        destination: args.dst.into(),
    }
}

fn door(from: From) -> Door {
    match from {
        From::Uplink => Door::Uplink {
            uplink: 0,
            ifindex: UPLINK,
        },
        From::Host => Door::Host(Origin::Host),
        From::Pod => Door::Host(Origin::Steered {
            ifindex: POD_DEVICE,
            hook: Hook::Ingress,
            direction: Direction::Original,
            far: STATION,
        }),
    }
}

/// A pipeline that is alone: every flow is its own.
fn pipeline(snapshot: &Snapshot, engine: &Engine) -> Pipeline {
    let (worker, workers) = (WorkerId(0), 1);
    let range = engine.snat_ports.first..=engine.snat_ports.last;
    let mut ports = PortAllocator::new(worker, workers, range, &[]);
    ports.set_addresses(snapshot.masquerade_addresses());
    Pipeline::new(PipelineParts {
        worker,
        workers,
        flows: FlowTable::with_slab(Slab::with_capacity(FLOWS), 0),
        ports,
        key: FingerprintKey::default(),
        counts: Arc::new(BackendCounts::default()),
        seed: 0,
    })
}

/// The Services on a model of the node. What cannot be served is left out, as the engine does it.
fn snapshot(resolved: &Resolved, engine: &Engine) -> Arc<Snapshot> {
    let known = control::snapshot::node(
        &resolved.addresses,
        &resolved.inside,
        &engine.snat_addresses,
        &BTreeMap::new(),
        &BTreeMap::new(),
    );
    let node = Node {
        devices: devices().into_iter().collect(),
        ..known
    };
    let addresses: Vec<_> = resolved
        .addresses
        .iter()
        .map(|ip| Address::from(*ip))
        .collect();
    // Which backends run here is known once the Services are in tables, the routes come after.
    let mut maker = SnapshotMaker::new();
    let node = Arc::new(node);
    let (bare, _) = maker.services(resolved, Arc::clone(&node), Arc::default());
    let backends = bare.services().flat_map(|service| &service.backends);
    let pods: Vec<_> = backends
        .filter(|backend| backend.local)
        .map(|backend| backend.endpoint.address)
        .collect();
    maker.surroundings(node, Arc::new(routes(&addresses, &pods)))
}

/// One uplink, and one device for all pods of the node.
fn devices() -> [(u32, NodeDevice); 2] {
    let uplink = NodeDevice {
        uplink: Some(0),
        hooked_egress: true,
        ..NodeDevice::default()
    };
    let pods = NodeDevice {
        is_pod: true,
        hooked_ingress: true,
        hooked_egress: true,
        ..NodeDevice::default()
    };
    [(UPLINK, uplink), (POD_DEVICE, pods)]
}

/// To the node's pods by their device, to everyone else by the uplink's router.
fn routes(addresses: &[Address], pods: &[Address]) -> Fib {
    let router = Address::from(Ipv4Addr::LOCALHOST);
    let source = |v4: bool| {
        addresses
            .iter()
            .copied()
            .find(|address| address.is_v4() == v4)
    };
    let route = |to: Address, length, ifindex, gateway| {
        let route = Route {
            ifindex,
            gateway,
            source: source(to.is_v4()),
        };
        Prefix::new(to, length).map(|prefix| (prefix, route))
    };
    let to_pods = pods
        .iter()
        .filter_map(|&pod| route(pod, if pod.is_v4() { 32 } else { 128 }, POD_DEVICE, None));
    let everyone = [
        IpAddr::from(Ipv4Addr::UNSPECIFIED),
        Ipv6Addr::UNSPECIFIED.into(),
    ];
    let to_others = everyone
        .into_iter()
        .filter_map(|any| route(any.into(), 0, UPLINK, Some(router)));
    let stations = pods.iter().map(|&pod| ((POD_DEVICE, pod), STATION));
    Fib::new(
        to_pods.chain(to_others),
        stations.chain([((UPLINK, router), STATION)]),
    )
}

/// An Ethernet frame with the first packet of a connection: a SYN, or a datagram without payload.
fn frame(tuple: &Tuple) -> Vec<u8> {
    let transport = if tuple.protocol == Protocol::TCP {
        TCP_HEADER
    } else {
        UDP_HEADER
    };
    let length = u16::try_from(transport).unwrap_or(0);
    let mut frame = vec![0; ETHERNET_HEADER];
    let (source, destination) = (tuple.source.address, tuple.destination.address);
    if source.is_v4() {
        frame[12..].copy_from_slice(&[0x08, 0x00]);
        let total = (IPV4_HEADER + length).to_be_bytes();
        frame.extend([
            0x45,
            0,
            total[0],
            total[1],
            0,
            0,
            0,
            0,
            64,
            tuple.protocol.0,
            0,
            0,
        ]);
        frame.extend(source.v4_bytes());
        frame.extend(destination.v4_bytes());
    } else {
        frame[12..].copy_from_slice(&[0x86, 0xdd]);
        let payload = length.to_be_bytes();
        frame.extend([0x60, 0, 0, 0, payload[0], payload[1], tuple.protocol.0, 64]);
        frame.extend(source.bytes());
        frame.extend(destination.bytes());
    }
    frame.extend(tuple.source.port.0.to_be_bytes());
    frame.extend(tuple.destination.port.0.to_be_bytes());
    if tuple.protocol == Protocol::TCP {
        frame.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, SYN, 0xff, 0xff, 0, 0, 0, 0]);
    } else {
        frame.extend([length.to_be_bytes(), [0, 0]].concat());
    }
    frame
}

fn scheduler_name(kind: SchedulerKind) -> &'static str {
    match kind {
        SchedulerKind::RoundRobin => "rr",
        SchedulerKind::Random => "random",
    }
}

impl Tabular for Trace {
    fn tables(&self) -> String {
        let (src, dst) = match &self.translated {
            Some(translated) => (translated.src.as_str(), translated.dst.as_str()),
            None => ("", ""),
        };
        let rows = [
            ("verdict", self.verdict),
            ("reason", self.reason.as_str()),
            ("service", self.service.as_str()),
            ("scheduler", self.scheduler),
            ("backend", self.backend.as_str()),
            ("source", src),
            ("destination", dst),
            ("out", self.out),
        ];
        let rows = rows.into_iter().filter(|(_, value)| !value.is_empty());
        table(
            &["TRACE", ""],
            rows.map(|(name, value)| vec![name.into(), value.into()]),
        )
    }
}

const UPLINK: u32 = 1;
const POD_DEVICE: u32 = 2;
const STATION: MacAddr = MacAddr([0x02, 0, 0, 0, 0, 0x01]);
const FLOWS: u32 = 16;

const ETHERNET_HEADER: usize = 14;
const IPV4_HEADER: u16 = 20;
const TCP_HEADER: usize = 20;
const UDP_HEADER: usize = 8;
const SYN: u8 = 0x02;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Command, CommandLine};
    use clap::Parser;

    const OBJECTS: &str = r#"
apiVersion: v1
kind: Node
metadata: {name: n1}
spec: {podCIDRs: [10.244.1.0/24, "fd00:244:1::/64"]}
status: {addresses: [{type: InternalIP, address: 192.0.2.11}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {type: NodePort, clusterIP: 10.96.0.10, ports: [{name: http, port: 80, nodePort: 30080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.2.10], nodeName: n2}]
ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: near}
spec: {clusterIPs: ["fd00:96::20"], clusterIP: "fd00:96::20", ports: [{port: 53, protocol: UDP}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: near-1, labels: {kubernetes.io/service-name: near}}
addressType: IPv6
endpoints: [{addresses: ["fd00:244:1::20"], nodeName: n1}]
ports: [{port: 5353, protocol: UDP}]
---
apiVersion: v1
kind: Service
metadata: {name: empty}
spec: {clusterIP: 10.96.0.30, ports: [{port: 80}]}
"#;

    fn traced(src: &str, dst: &str, proto: &str, from: &str) -> Trace {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("objects.yaml"), OBJECTS).unwrap();
        let path = folder.path().to_str().unwrap();
        let given = [
            "--manifests",
            path,
            "--src",
            src,
            "--dst",
            dst,
            "--proto",
            proto,
            "--from",
            from,
        ];
        let line = ["sluice", "trace", "--node=n1"].iter().chain(&given);
        let Command::Trace(args) = CommandLine::try_parse_from(line).unwrap().command else {
            panic!("`trace` parses to another command")
        };
        let config = Config::load(&args.settings).unwrap();
        let resolved = control::resolve_folder(folder.path(), &config.control()).unwrap();
        assert_eq!(resolved.rejected, []);
        let snapshot = snapshot(&resolved, &config.engine);
        trace(&snapshot, &probe(&args), args.from, &config.engine)
    }

    #[test]
    fn a_node_port_of_a_remote_pod_is_masqueraded_and_leaves_by_the_uplink() {
        let trace = traced("198.51.100.7:40000", "192.0.2.11:30080", "tcp", "uplink");
        assert_eq!(
            (trace.verdict, trace.out),
            ("forward", "uplink"),
            "{trace:?}"
        );
        assert_eq!(
            (trace.service.as_str(), trace.scheduler),
            ("default/web:http", "rr")
        );
        assert_eq!(trace.backend, "10.244.2.10:8080");
        let translated = trace.translated.unwrap();
        assert_eq!(translated.dst, "10.244.2.10:8080");
        let (address, port) = translated.src.split_once(':').unwrap();
        assert_eq!(address, "192.0.2.11");
        assert!((1024..30_000).contains(&port.parse::<u16>().unwrap()));
    }

    #[test]
    fn a_pod_keeps_its_address_towards_a_pod_of_its_own_node() {
        let trace = traced("[fd00:244:1::9]:4000", "[fd00:96::20]:53", "udp", "pod");
        assert_eq!((trace.verdict, trace.out), ("forward", "host"), "{trace:?}");
        let translated = trace.translated.unwrap();
        assert_eq!(translated.src, "[fd00:244:1::9]:4000");
        assert_eq!(translated.dst, "[fd00:244:1::20]:5353");
    }

    #[test]
    fn a_pod_that_reaches_itself_is_masqueraded() {
        let trace = traced("[fd00:244:1::20]:4000", "[fd00:96::20]:53", "udp", "pod");
        // The node of this test has no IPv6 address to masquerade with.
        assert_eq!(
            (trace.verdict, trace.reason.as_str()),
            ("drop", "no snat address")
        );
    }

    #[test]
    fn what_is_no_frontend_is_left_to_the_kernel() {
        let trace = traced("198.51.100.7:40000", "192.0.2.11:22", "tcp", "uplink");
        assert_eq!((trace.verdict, trace.service.as_str()), ("punt", ""));
        assert!(
            trace.reason.contains("192.0.2.11:22/TCP is no frontend"),
            "{}",
            trace.reason
        );
    }

    #[test]
    fn a_service_without_endpoints_is_rejected() {
        let trace = traced("10.244.1.9:4000", "10.96.0.30:80", "tcp", "pod");
        assert_eq!(
            (trace.verdict, trace.service.as_str()),
            ("reject", "default/empty")
        );
        assert_eq!((trace.backend.as_str(), trace.out), ("", ""));
    }

    #[test]
    fn a_host_process_reaches_a_remote_pod() {
        let trace = traced("192.0.2.11:4000", "10.96.0.10:80", "tcp", "host");
        assert_eq!(
            (trace.verdict, trace.out),
            ("forward", "uplink"),
            "{trace:?}"
        );
    }
}
