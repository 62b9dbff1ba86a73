//! Resolved services and the kernel's tables as the engine's `Snapshot`.
//!
//! A projection: nothing is decided here. What it adds are numbers: a Service port and each of its
//! backends keep theirs as long as they exist, draining ones included, since flows and connection
//! counts name them. What did not change is shared with the last snapshot. A NodePort stands there
//! once for each address of this node (but link-local ones), so that one family never meets the
//! other's backends.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use dataplane::net::{Port as PortNumber, Protocol as ProtocolNumber};
use dataplane::snapshot as engine;
use dataplane::snapshot::{BackendId, FrontendKey, MAX_BACKENDS, ServiceId, SnapshotBuilder};

use crate::address::{Cidr, Family, special};
use crate::balance::Scheduler;
use crate::controller::Resolved;
use crate::links::Links;
use crate::policy::{
    Backend, Backends, Frontend, FrontendAddress, FrontendKind, Masquerade, Port, ResolvedService,
    WhenEmpty,
};
use crate::service::{Protocol, ServiceKey};

/// What the engine does with a device; it says so when it is told of one.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct DeviceRole {
    /// Number of the uplink, if it is one.
    pub uplink: Option<u8>,
    /// Whether a pod stands behind it.
    pub is_pod: bool,
    /// Whether a program of ours stands at its ingress (tc).
    pub hooked_ingress: bool,
    /// The same at its egress.
    pub hooked_egress: bool,
}

/// This node in the engine's form.
#[must_use]
pub fn node(
    addresses: &BTreeSet<IpAddr>,
    inside: &BTreeSet<Cidr>,
    snat_addresses: &[IpAddr],
    links: &Links,
    roles: &BTreeMap<u32, DeviceRole>,
) -> engine::Node {
    let device = |link: &crate::links::Link| {
        let role = roles.get(&link.ifindex).copied().unwrap_or_default();
        engine::NodeDevice {
            mac: link.mac.unwrap_or_default(),
            uplink: role.uplink,
            is_pod: role.is_pod,
            hooked_ingress: role.hooked_ingress,
            hooked_egress: role.hooked_egress,
            mtu: link.mtu,
        }
    };
    let outer = addresses.iter().filter(|ip| !ip.is_loopback());
    engine::Node {
        addresses: outer.map(|ip| (*ip).into()).collect(),
        cluster_ranges: inside.iter().filter_map(|range| prefix(*range)).collect(),
        snat_addresses: snat_addresses.iter().map(|ip| (*ip).into()).collect(),
        devices: links
            .values()
            .map(|link| (link.ifindex, device(link)))
            .collect(),
    }
}

/// Makes one snapshot after the other and keeps the numbers.
#[derive(Debug)]
pub struct SnapshotMaker {
    built: BTreeMap<ServiceKey, Built>,
    services: Numbers,
    backends: Numbers,
    /// The addresses that answer NodePorts.
    local: BTreeSet<IpAddr>,
    last: engine::Snapshot,
}

#[derive(Debug)]
struct Built {
    source: Arc<ResolvedService>,
    ports: BTreeMap<(Arc<str>, Protocol), BuiltPort>,
}

#[derive(Debug)]
struct BuiltPort {
    source: Port,
    numbers: BTreeMap<SocketAddr, BackendId>,
    service: Arc<engine::Service>,
    frontends: Vec<(FrontendKey, engine::Frontend)>,
}

impl Default for SnapshotMaker {
    fn default() -> Self {
        Self {
            built: BTreeMap::new(),
            services: Numbers::up_to(u32::MAX),
            backends: Numbers::up_to(MAX_BACKENDS),
            local: BTreeSet::new(),
            last: engine::Snapshot::default(),
        }
    }
}

impl SnapshotMaker {
    /// That has made nothing yet; its first snapshot has epoch 1.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The next snapshot, and what was left out of it.
    pub fn services(
        &mut self,
        resolved: &Resolved,
        node: Arc<engine::Node>,
        fib: Arc<engine::Fib>,
    ) -> (Arc<engine::Snapshot>, Vec<engine::SnapshotError>) {
        let local: BTreeSet<IpAddr> = resolved
            .addresses
            .iter()
            .copied()
            .filter(is_node_port_address)
            .collect();
        let readdressed = self.local != local;
        self.local = local;
        let before = std::mem::take(&mut self.built);
        let mut gone: BTreeMap<ServiceKey, Built> = before;
        for (key, service) in &resolved.services {
            let known = gone.remove(key);
            let built = match known {
                Some(known) if !readdressed && Arc::ptr_eq(&known.source, service) => known,
                known => self.build(service, known, readdressed),
            };
            self.built.insert(key.clone(), built);
        }
        for port in gone
            .into_values()
            .flat_map(|built| built.ports.into_values())
        {
            self.free(port);
        }
        let (snapshot, errors) = self.collect().build(self.last.epoch + 1, node, fib);
        self.last = snapshot;
        (Arc::new(self.last.clone()), errors)
    }

    /// The next snapshot where only this node, its routes or its neighbours changed.
    pub fn surroundings(
        &mut self,
        node: Arc<engine::Node>,
        fib: Arc<engine::Fib>,
    ) -> Arc<engine::Snapshot> {
        self.last = self.last.with_node(self.last.epoch + 1, node, fib);
        Arc::new(self.last.clone())
    }

    /// NodePorts come last: an exact address of somebody else goes before them.
    fn collect(&self) -> SnapshotBuilder {
        let mut builder = SnapshotBuilder::new();
        for of_node_ports in [false, true] {
            for port in self.built.values().flat_map(|built| built.ports.values()) {
                let is_node_port = |key: &FrontendKey| {
                    let listens = port.source.frontends.iter();
                    let mut node_ports = listens.filter(|f| f.kind == FrontendKind::NodePort);
                    node_ports.any(|frontend| frontend.port == key.port.0)
                        && self.local.contains(&key.address.to_ip())
                };
                let frontends = port.frontends.iter();
                let frontends = frontends.filter(|(key, _)| is_node_port(key) == of_node_ports);
                builder.service(&port.service, frontends.cloned());
            }
        }
        builder
    }

    fn build(
        &mut self,
        service: &Arc<ResolvedService>,
        known: Option<Built>,
        readdressed: bool,
    ) -> Built {
        let mut known = known.map(|built| built.ports).unwrap_or_default();
        let mut ports = BTreeMap::new();
        for port in &service.ports {
            let key = (Arc::clone(&port.name), port.protocol);
            let built = match known.remove(&key) {
                Some(built) if !readdressed && built.source == *port => built,
                before => self.build_port(&service.key, port, before),
            };
            ports.insert(key, built);
        }
        known.into_values().for_each(|port| self.free(port));
        Built {
            source: Arc::clone(service),
            ports,
        }
    }

    fn build_port(
        &mut self,
        key: &ServiceKey,
        port: &Port,
        before: Option<BuiltPort>,
    ) -> BuiltPort {
        let (id, mut known) = match before {
            Some(before) => (before.service.id, before.numbers),
            None => (ServiceId(self.services.take()), BTreeMap::new()),
        };
        let mut backends: BTreeMap<(bool, SocketAddr), &Backend> = BTreeMap::new();
        for frontend in &port.frontends {
            for backend in frontend.backends.iter().chain(frontend.for_inside().iter()) {
                backends.insert((false, backend.address), backend);
            }
        }
        for backend in &port.draining {
            if !backends.contains_key(&(false, backend.address)) {
                backends.insert((true, backend.address), backend);
            }
        }
        let mut numbers = BTreeMap::new();
        let mut listed = Vec::with_capacity(backends.len());
        let mut positions = HashMap::new();
        for ((draining, address), backend) in backends {
            let number = known
                .remove(&address)
                .unwrap_or_else(|| BackendId(self.backends.take()));
            numbers.insert(address, number);
            positions.insert(address, u32::try_from(listed.len()).unwrap_or(u32::MAX));
            listed.push(engine::Backend {
                id: number,
                endpoint: address.into(),
                weight: backend.weight,
                local: backend.local,
                draining,
            });
        }
        known
            .into_values()
            .for_each(|number| self.backends.free(number.0));
        let mut choices = Choices {
            positions,
            lists: Vec::new(),
        };
        let wanted = port.frontends.iter();
        let wanted: Vec<_> = wanted
            .map(|f| (f, choices.index(&f.backends), choices.index(f.for_inside())))
            .collect();
        let service = Arc::new(engine::Service {
            id,
            name: name(key, port),
            scheduler: scheduler(key, port),
            affinity: port.affinity,
            backends: listed,
            choices: choices.lists,
        });
        let mut frontends = Vec::new();
        let mut taken = HashSet::new();
        for (frontend, outside, inside) in wanted {
            for key in self.keys(frontend, port.protocol) {
                // One Service may use an address as external IP and for its load balancer: the
                // load balancer's, which checks where clients come from, is listed first.
                if taken.insert(key) {
                    let frontend = engine_frontend(frontend, &service, outside, inside);
                    frontends.push((key, frontend));
                }
            }
        }
        BuiltPort {
            source: port.clone(),
            numbers,
            service,
            frontends,
        }
    }

    fn keys(&self, frontend: &Frontend, protocol: Protocol) -> Vec<FrontendKey> {
        let key = |ip: IpAddr| FrontendKey {
            address: ip.into(),
            port: PortNumber(frontend.port),
            protocol: protocol_number(protocol),
        };
        match frontend.address {
            FrontendAddress::Ip(ip) => vec![key(ip)],
            FrontendAddress::EveryLocal(family) => {
                let local = self.local.iter().copied();
                local
                    .filter(|ip| Family::of(*ip) == family)
                    .map(key)
                    .collect()
            }
        }
    }

    fn free(&mut self, port: BuiltPort) {
        self.services.free(port.service.id.0);
        port.numbers
            .into_values()
            .for_each(|number| self.backends.free(number.0));
    }
}

/// The lists of a Service, each once.
struct Choices {
    positions: HashMap<SocketAddr, u32>,
    lists: Vec<Box<[u32]>>,
}

impl Choices {
    fn index(&mut self, backends: &Backends) -> u32 {
        let position = |backend: &Backend| self.positions.get(&backend.address).copied();
        let list: Box<[u32]> = backends.iter().filter_map(position).collect();
        let known = self.lists.iter().position(|known| *known == list);
        let at = known.unwrap_or_else(|| {
            self.lists.push(list);
            self.lists.len() - 1
        });
        u32::try_from(at).unwrap_or(u32::MAX)
    }
}

/// Numbers that are given again as late as possible.
#[derive(Debug)]
struct Numbers {
    next: u32,
    limit: u32,
    freed: VecDeque<u32>,
}

impl Numbers {
    const fn up_to(limit: u32) -> Self {
        Self {
            next: 0,
            limit,
            freed: VecDeque::new(),
        }
    }

    /// Past the limit where all are taken: the snapshot refuses those.
    fn take(&mut self) -> u32 {
        if self.next >= self.limit
            && let Some(freed) = self.freed.pop_front()
        {
            return freed;
        }
        let number = self.next;
        self.next = self.next.saturating_add(1);
        number
    }

    fn free(&mut self, number: u32) {
        if number < self.limit {
            self.freed.push_back(number);
        }
    }
}

fn engine_frontend(
    frontend: &Frontend,
    service: &Arc<engine::Service>,
    outside: u32,
    inside: u32,
) -> engine::Frontend {
    let masquerade = match frontend.masquerade {
        Masquerade::Always => engine::Masquerade::Always,
        Masquerade::OffCluster => engine::Masquerade::OffCluster,
        Masquerade::Never => engine::Masquerade::Never,
    };
    engine::Frontend {
        service: Arc::clone(service),
        outside,
        inside,
        masquerade,
        inside_masquerade: masquerade,
        source_ranges: frontend
            .source_ranges
            .iter()
            .filter_map(|range| prefix(*range))
            .collect(),
        when_empty: match frontend.when_empty {
            WhenEmpty::Reject => engine::WhenEmpty::Reject,
            WhenEmpty::Drop => engine::WhenEmpty::Drop,
        },
    }
}

fn prefix(range: Cidr) -> Option<engine::Prefix> {
    engine::Prefix::new(range.network().into(), range.prefix())
}

fn name(key: &ServiceKey, port: &Port) -> Arc<str> {
    let colon = if port.name.is_empty() { "" } else { ":" };
    format!("{key}{colon}{}", port.name).into()
}

fn scheduler(key: &ServiceKey, port: &Port) -> engine::SchedulerKind {
    match port.scheduler {
        Scheduler::RoundRobin => engine::SchedulerKind::RoundRobin,
        Scheduler::Random => engine::SchedulerKind::Random,
        other => {
            tracing::warn!(service = %key, scheduler = %other, "this scheduler is not built yet, rr serves");
            engine::SchedulerKind::RoundRobin
        }
    }
}

const fn protocol_number(protocol: Protocol) -> ProtocolNumber {
    match protocol {
        Protocol::Tcp => ProtocolNumber::TCP,
        Protocol::Udp => ProtocolNumber::UDP,
        Protocol::Sctp => ProtocolNumber::SCTP,
    }
}

/// Link-local addresses are as many as devices and mean nothing without one.
fn is_node_port_address(address: &IpAddr) -> bool {
    special(*address).is_none()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::controller::{ControlConfig, Controller, Event};
    use crate::document;

    struct Lab {
        controller: Controller,
        maker: SnapshotMaker,
    }

    impl Lab {
        fn new() -> Self {
            let mut controller = Controller::new(ControlConfig {
                node_name: "n1".into(),
                ..ControlConfig::default()
            });
            let local = ["192.0.2.1", "127.0.0.1", "2001:db8::1", "fe80::1"];
            let local = local
                .iter()
                .map(|ip| ip.parse().expect("a literal address"));
            controller.handle(Event::LocalAddresses(local.collect()));
            Self {
                controller,
                maker: SnapshotMaker::new(),
            }
        }

        fn apply(&mut self, text: &str) -> Arc<engine::Snapshot> {
            for entry in document::read(text).expect("objects that parse") {
                let object = entry.content.expect("a good object");
                self.controller.handle(Event::Applied(object, None));
            }
            let resolved = self.controller.resolve();
            let node = node(
                &resolved.addresses,
                &resolved.inside,
                &[],
                &Links::new(),
                &BTreeMap::new(),
            );
            let (snapshot, errors) = self
                .maker
                .services(&resolved, Arc::new(node), Arc::default());
            assert_eq!(errors, []);
            snapshot
        }
    }

    fn service(name: &str, ip: &str, rest: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{type: NodePort, clusterIP: {ip}, ports: [{{port: 80{rest}}}]}}\n---\n"
        )
    }

    fn slice(service: &str, endpoints: &str) -> String {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {service}, labels: {{kubernetes.io/service-name: {service}}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{endpoints}]\n---\n"
        )
    }

    fn backends(snapshot: &engine::Snapshot, name: &str) -> Vec<(String, u32, bool)> {
        let service = snapshot.services().find(|service| *service.name == *name);
        let backends = &service.expect("the Service").backends;
        let describe = |b: &engine::Backend| (b.endpoint.to_string(), b.id.0, b.draining);
        backends.iter().map(describe).collect()
    }

    fn look<'a>(snapshot: &'a engine::Snapshot, to: &str) -> Option<&'a engine::Frontend> {
        let to: SocketAddr = to.parse().expect("a literal address");
        snapshot.frontend(&to.into(), ProtocolNumber::TCP)
    }

    #[test]
    fn backends_keep_their_numbers_while_they_drain_and_lose_them_when_gone() {
        let mut lab = Lab::new();
        let ready = |ip| format!("{{addresses: [{ip}]}}, ");
        let both = ready("10.244.1.1") + &ready("10.244.1.2");
        let first = lab.apply(&(service("web", "10.96.0.1", "") + &slice("web", &both)));
        let of = |ip: &str, id, draining| (format!("{ip}:8080"), id, draining);
        let at = "default/web";
        assert_eq!(
            backends(&first, at),
            [of("10.244.1.1", 0, false), of("10.244.1.2", 1, false)]
        );
        let draining =
            ready("10.244.1.2") + "{addresses: [10.244.1.1], conditions: {ready: false}}";
        let second = lab.apply(&slice("web", &draining));
        assert_eq!(
            backends(&second, at),
            [of("10.244.1.2", 1, false), of("10.244.1.1", 0, true)]
        );
        lab.apply(&slice("web", &ready("10.244.1.2")));
        let fourth = lab.apply(&slice("web", &both));
        assert_eq!(
            backends(&fourth, at),
            [of("10.244.1.1", 2, false), of("10.244.1.2", 1, false)]
        );
        assert_eq!(fourth.epoch, 4);
    }

    #[test]
    fn unchanged_services_are_shared_with_the_last_snapshot() {
        let mut lab = Lab::new();
        let one = service("one", "10.96.0.1", "") + &slice("one", "{addresses: [10.244.1.1]}");
        let first = lab.apply(&(one + &service("two", "10.96.0.2", "")));
        let second = lab.apply(&slice("two", "{addresses: [10.244.1.2]}"));
        let of =
            |snapshot: &engine::Snapshot, to| look(snapshot, to).map(|f| Arc::clone(&f.service));
        let shared = |to| {
            of(&first, to)
                .zip(of(&second, to))
                .is_some_and(|(a, b)| Arc::ptr_eq(&a, &b))
        };
        assert!(shared("10.96.0.1:80"));
        assert!(!shared("10.96.0.2:80"));
    }

    #[test]
    fn node_ports_answer_on_the_nodes_addresses_of_the_served_family() {
        let mut lab = Lab::new();
        let text = service("web", "10.96.0.1", ", nodePort: 30080");
        let snapshot = lab.apply(&(text + &slice("web", "{addresses: [10.244.1.1]}")));
        assert!(look(&snapshot, "192.0.2.1:30080").is_some());
        assert!(look(&snapshot, "127.0.0.1:30080").is_none());
        assert!(look(&snapshot, "[2001:db8::1]:30080").is_none());
        assert!(look(&snapshot, "10.96.0.1:30080").is_none());
    }

    #[test]
    fn clients_inside_and_outside_choose_from_their_lists() {
        let mut lab = Lab::new();
        let text = service("web", "10.96.0.1", ", nodePort: 30080").replace(
            "type: NodePort,",
            "type: NodePort, externalTrafficPolicy: Local,",
        );
        let endpoints =
            "{addresses: [10.244.1.1], nodeName: n1}, {addresses: [10.244.2.1], nodeName: n2}";
        let snapshot = lab.apply(&(text + &slice("web", endpoints)));
        let frontend = look(&snapshot, "192.0.2.1:30080").expect("the NodePort");
        let list = |choice: u32| {
            let choice = usize::try_from(choice).expect("a small number");
            let list = frontend.service.choices[choice].iter();
            let backend = |index: &u32| {
                &frontend.service.backends[usize::try_from(*index).expect("a small number")]
            };
            list.map(|index| backend(index).endpoint.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(list(frontend.outside), ["10.244.1.1:8080"]);
        assert_eq!(
            list(frontend.inside),
            ["10.244.1.1:8080", "10.244.2.1:8080"]
        );
        assert_eq!(frontend.when_empty, engine::WhenEmpty::Drop);
        assert_eq!(frontend.masquerade, engine::Masquerade::Never);
    }
}
