//! Events in, resolved services out: pure and synchronous.
//!
//! Holds the store, this node and what was resolved last, and resolves again only what an event
//! touched. Who feeds it (files, watches, tests) and who takes the result is not its business. Two
//! Services that claim one address and port are settled here, since no Service alone can see it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use crate::address::Cidr;
use crate::balance::Scheduler;
use crate::claims::Claims;
use crate::node::{NodePortAddresses, Topology};
use crate::policy::{self, ExternalIps, PolicyConfig, Port, ResolvedService};
use crate::service::ServiceKey;
use crate::store::{Kind, Object, ObjectKey, Store, Touched};

/// What this crate needs of the configuration.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ControlConfig {
    /// The name of this node's Node object.
    pub node_name: String,
    /// Ranges that are "inside the cluster", besides the Nodes' pod ranges.
    pub cluster_cidrs: Vec<Cidr>,
    /// Which addresses answer NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// Scheduler of Services that ask for none.
    pub default_scheduler: Scheduler,
    /// Replace the source of everything that goes to a cluster IP.
    pub masquerade_all: bool,
    /// How "inside the cluster" is told.
    pub detect_local_mode: DetectLocalMode,
    /// Whose external IPs are served.
    pub external_ips: ExternalIps,
}

/// How a client inside the cluster is told from one outside.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum DetectLocalMode {
    /// By `cluster_cidrs`, the Nodes' pod ranges, and arrival by a pod device.
    #[default]
    Ranges,
    /// By this node's own pod ranges.
    NodeCidr,
    /// By arrival over this bridge.
    BridgeInterface(String),
    /// By arrival over a device whose name begins so.
    InterfaceNamePrefix(String),
}

/// Something happened.
#[derive(Clone, PartialEq, Debug)]
pub enum Event {
    /// An object is new or has changed; and where it stands, if its source can tell.
    Applied(Arc<Object>, Option<Arc<str>>),
    /// An object has gone.
    Deleted(ObjectKey),
    /// All objects of one kind: what is not among them has gone.
    Listed(Kind, Vec<Object>),
    /// What the source cannot read at the moment, all of it.
    Unreadable(Vec<Rejected>),
    /// The addresses that this node's devices carry.
    LocalAddresses(BTreeSet<IpAddr>),
}

/// Something that is not served, and why.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, serde::Serialize)]
pub struct Rejected {
    /// Its kind; `File` for a file that cannot be read.
    pub kind: String,
    /// Its namespace, empty where it has none.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Why.
    pub reason: String,
}

/// What is served on this node.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Resolved {
    /// This node's name.
    pub node: String,
    /// Its zone, empty if unknown.
    pub zone: String,
    /// Its addresses but loopback ones.
    pub addresses: BTreeSet<IpAddr>,
    /// The addresses that its Node object lists, internal ones first.
    pub node_addresses: Vec<IpAddr>,
    /// Ranges that are inside the cluster.
    pub inside: BTreeSet<Cidr>,
    /// The Services; those that did not change are shared with the last result.
    pub services: BTreeMap<ServiceKey, Arc<ResolvedService>>,
    /// What is not served, and why; sorted.
    pub rejected: Vec<Rejected>,
}

/// The pure heart of control.
#[derive(Debug)]
pub struct Controller {
    config: ControlConfig,
    policy: PolicyConfig,
    store: Store,
    topology: Topology,
    unreadable: Vec<Rejected>,
    places: BTreeMap<ObjectKey, Arc<str>>,
    dirty: BTreeSet<ServiceKey>,
    /// As `policy` decided, before claims of others were looked at.
    wanted: BTreeMap<ServiceKey, Arc<ResolvedService>>,
    claims: Claims,
    last: Arc<Resolved>,
}

impl Controller {
    /// Of a node about which nothing is known yet.
    #[must_use]
    pub fn new(config: ControlConfig) -> Self {
        Self {
            policy: PolicyConfig {
                default_scheduler: config.default_scheduler,
                masquerade_all: config.masquerade_all,
                knows_inside: true,
                node_port_addresses: config.node_port_addresses.clone(),
                external_ips: config.external_ips.clone(),
            },
            store: Store::default(),
            topology: Topology::new(&config.node_name),
            unreadable: Vec::new(),
            places: BTreeMap::new(),
            dirty: BTreeSet::new(),
            wanted: BTreeMap::new(),
            claims: Claims::default(),
            last: Arc::new(Resolved::default()),
            config,
        }
    }

    /// Takes an event in.
    pub fn handle(&mut self, event: Event) {
        match event {
            Event::Applied(object, place) => {
                match place {
                    Some(place) => _ = self.places.insert(object.key(), place),
                    None => _ = self.places.remove(&object.key()),
                }
                let touched = self.store.apply(&object);
                self.touch(touched);
            }
            Event::Deleted(key) => {
                self.places.remove(&key);
                let touched = self.store.delete(&key);
                self.touch(touched);
            }
            Event::Listed(kind, objects) => {
                let mut gone = self.store.keys(kind);
                for object in objects {
                    gone.remove(&object.key());
                    self.handle(Event::Applied(Arc::new(object), None));
                }
                for key in gone {
                    self.handle(Event::Deleted(key));
                }
            }
            Event::Unreadable(files) => self.unreadable = files,
            Event::LocalAddresses(addresses) => {
                if self.topology.set_local_addresses(addresses) {
                    self.touch_all();
                }
            }
        }
    }

    /// What is served now. The same `Arc` as last time if nothing changed.
    pub fn resolve(&mut self) -> Arc<Resolved> {
        let addresses = self.topology.addresses();
        let mut services = self.last.services.clone();
        for key in self.resolve_dirty(&addresses) {
            let Some(wanted) = self.wanted.get(&key) else {
                services.remove(&key);
                continue;
            };
            let settled = self.claims.settle(wanted, &addresses);
            if services.get(&key).is_none_or(|last| **last != *settled) {
                services.insert(key, settled);
            }
        }
        let resolved = Resolved {
            node: self.config.node_name.clone(),
            zone: self.topology.zone().to_owned(),
            addresses,
            node_addresses: self.topology.own_addresses().to_vec(),
            inside: self.inside(),
            rejected: self.rejected(&services),
            services,
        };
        if *self.last != resolved {
            self.last = Arc::new(resolved);
        }
        Arc::clone(&self.last)
    }

    /// Resolves each Service that was touched. Returns all whose claims must be settled again.
    fn resolve_dirty(&mut self, addresses: &BTreeSet<IpAddr>) -> BTreeSet<ServiceKey> {
        let mut unsettled = BTreeSet::new();
        for key in std::mem::take(&mut self.dirty) {
            let resolved = self.store.service(&key).map(|service| {
                let slices = self.store.slices(&key);
                policy::resolve(service, &slices, &self.topology, &self.policy)
            });
            unsettled.extend(self.claims.replace(&key, resolved.as_ref()));
            unsettled.insert(key.clone());
            match resolved {
                Some(resolved) => _ = self.wanted.insert(key, Arc::new(resolved)),
                None => _ = self.wanted.remove(&key),
            }
        }
        let changed = self.claims.take_changed();
        if !changed.is_empty() {
            let is_hit = |port: &Port| {
                let mut backends = port.backends();
                backends.any(|backend| changed.hold(backend.address, port.protocol, addresses))
            };
            let hit = self.wanted.iter();
            let hit = hit.filter(|(_, service)| service.ports.iter().any(is_hit));
            unsettled.extend(hit.map(|(key, _)| key.clone()));
        }
        unsettled
    }

    fn inside(&self) -> BTreeSet<Cidr> {
        match self.config.detect_local_mode {
            DetectLocalMode::Ranges => {
                let configured = self.config.cluster_cidrs.iter().copied();
                self.topology
                    .pod_cidrs()
                    .into_iter()
                    .chain(configured)
                    .collect()
            }
            DetectLocalMode::NodeCidr => self.topology.own_pod_cidrs(),
            // The device that a packet comes by decides.
            DetectLocalMode::BridgeInterface(_) | DetectLocalMode::InterfaceNamePrefix(_) => {
                BTreeSet::new()
            }
        }
    }

    fn rejected(&self, services: &BTreeMap<ServiceKey, Arc<ResolvedService>>) -> Vec<Rejected> {
        let mut rejected = self.unreadable.clone();
        let parts = self
            .store
            .rejected()
            .map(|(key, reason)| self.reject(&key, reason));
        rejected.extend(parts);
        for service in services.values() {
            let key = ObjectKey {
                kind: Kind::Service,
                namespace: Arc::clone(&service.key.namespace),
                name: Arc::clone(&service.key.name),
            };
            rejected.extend(
                service
                    .remarks
                    .iter()
                    .map(|remark| self.reject(&key, remark)),
            );
        }
        rejected.sort();
        rejected.dedup();
        rejected
    }

    fn reject(&self, key: &ObjectKey, reason: &str) -> Rejected {
        let place = self.places.get(key);
        Rejected {
            kind: key.kind.name().into(),
            namespace: (*key.namespace).into(),
            name: (*key.name).into(),
            reason: place.map_or_else(|| reason.into(), |place| format!("{place}: {reason}")),
        }
    }

    fn touch(&mut self, touched: Touched) {
        match touched {
            Touched::Nothing => {}
            Touched::Services(keys) => self.dirty.extend(keys),
            Touched::Node(name) => {
                let node = self.store.node(&name).cloned();
                let changed = self.topology.set_node(&name, node);
                // Other Nodes only add pod ranges, which no Service depends on.
                if changed && *name == *self.topology.name() {
                    self.touch_all();
                }
            }
        }
    }

    fn touch_all(&mut self) {
        self.dirty.extend(self.store.service_keys().cloned());
    }
}
