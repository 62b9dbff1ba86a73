//! Whatever the history of events, the result is that of a fresh start with what is left.
//!
//! Random histories over few names and addresses, so that Services collide, slices change owner and
//! Nodes move zones; after each the resolved services and the snapshot are compared with those of a
//! controller that only saw the final objects.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use control::links::Links;
use control::snapshot::{SnapshotMaker, node};
use control::store::{Object, ObjectKey};
use control::{ControlConfig, Controller, Event, Resolved};
use dataplane::snapshot::Snapshot;
use k8s_openapi::api::core::v1::{
    EndpointAddress, EndpointPort as CorePort, EndpointSubset, Endpoints, LoadBalancerIngress,
    LoadBalancerStatus, Node, Service, ServicePort, ServiceSpec, ServiceStatus,
};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, EndpointSlice, ForZone,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::collection::vec;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Step {
    Apply(Box<Object>),
    Delete(ObjectKey),
    Resolve,
}

fn metadata(name: String, labels: &[(&str, &str)]) -> ObjectMeta {
    let labels = labels
        .iter()
        .map(|(key, value)| ((*key).into(), (*value).into()));
    ObjectMeta {
        name: Some(name),
        namespace: Some("default".into()),
        labels: Some(labels.collect()),
        ..ObjectMeta::default()
    }
}

fn service() -> impl Strategy<Value = Object> {
    let flags = (any::<bool>(), any::<bool>(), any::<bool>());
    (0..4u8, 0..5u8, 0..4i32, 0..4u8, flags).prop_map(|(name, ip, node_port, external, flags)| {
        let (internal_local, external_local, headless) = flags;
        let local = |yes| Some(if yes { "Local" } else { "Cluster" }.to_owned());
        let ingress = LoadBalancerIngress {
            ip: Some(format!("198.51.100.{external}")),
            ..LoadBalancerIngress::default()
        };
        Object::Service(Box::new(Service {
            metadata: metadata(
                format!("s{name}"),
                if headless && ip == 0 {
                    &[("service.kubernetes.io/headless", "")]
                } else {
                    &[]
                },
            ),
            spec: Some(ServiceSpec {
                type_: Some("LoadBalancer".into()),
                // Number 4 is no address: the Service is bad.
                cluster_ip: Some(if ip == 4 {
                    "x".into()
                } else {
                    format!("10.96.0.{ip}")
                }),
                external_ips: (external == 1)
                    .then(|| vec![format!("10.96.0.{ip}"), "198.51.100.2".into()]),
                internal_traffic_policy: local(internal_local),
                external_traffic_policy: local(external_local),
                ports: Some(vec![ServicePort {
                    port: 80,
                    node_port: Some(node_port)
                        .filter(|port| *port != 0)
                        .map(|port| 30_000 + port),
                    ..ServicePort::default()
                }]),
                ..ServiceSpec::default()
            }),
            status: Some(ServiceStatus {
                load_balancer: Some(LoadBalancerStatus {
                    ingress: Some(vec![ingress]),
                }),
                ..ServiceStatus::default()
            }),
        }))
    })
}

fn endpoint() -> impl Strategy<Value = Endpoint> {
    (0..6u8, 0..2u8, 0..4u8, 0..3u8).prop_map(|(ip, node, state, hint)| Endpoint {
        addresses: vec![match ip {
            3 => "127.0.0.1".into(),
            4 => "10.96.0.1".into(),
            5 => "192.0.2.1".into(),
            _ => format!("10.244.{node}.{ip}"),
        }],
        node_name: Some(format!("n{node}")),
        conditions: Some(EndpointConditions {
            ready: Some(state > 1),
            serving: Some(state > 0),
            terminating: Some(state == 1),
        }),
        hints: (hint > 0).then(|| EndpointHints {
            for_zones: Some(vec![ForZone {
                name: format!("z{hint}"),
            }]),
            ..EndpointHints::default()
        }),
        ..Endpoint::default()
    })
}

fn slice() -> impl Strategy<Value = Object> {
    (0..5u8, 0..5u8, 0..3i32, vec(endpoint(), 0..4)).prop_map(|(name, owner, port, endpoints)| {
        let owner = format!("s{owner}");
        Object::EndpointSlice(Box::new(EndpointSlice {
            address_type: if owner == "s4" {
                "IPX".into()
            } else {
                "IPv4".into()
            },
            endpoints: Some(endpoints),
            metadata: metadata(
                format!("e{name}"),
                &[("kubernetes.io/service-name", &owner)],
            ),
            ports: Some(vec![EndpointPort {
                // A frontend's port, a NodePort's, and one that is none.
                port: Some([80, 30_001, 8080][usize::try_from(port).expect("a small number")]),
                ..EndpointPort::default()
            }]),
        }))
    })
}

fn endpoints() -> impl Strategy<Value = Object> {
    (0..4u8, 0..4u8).prop_map(|(name, ip)| {
        Object::Endpoints(Box::new(Endpoints {
            metadata: metadata(format!("s{name}"), &[]),
            subsets: Some(vec![EndpointSubset {
                addresses: Some(vec![EndpointAddress {
                    ip: format!("203.0.113.{ip}"),
                    ..EndpointAddress::default()
                }]),
                ports: Some(vec![CorePort {
                    port: 9090,
                    ..CorePort::default()
                }]),
                ..EndpointSubset::default()
            }]),
        }))
    })
}

fn a_node() -> impl Strategy<Value = Object> {
    (0..2u8, 0..3u8).prop_map(|(name, zone)| {
        let zone = format!("z{zone}");
        let mut metadata = metadata(
            format!("n{name}"),
            &[("topology.kubernetes.io/zone", &zone)],
        );
        metadata.namespace = None;
        Object::Node(Box::new(Node {
            metadata,
            ..Node::default()
        }))
    })
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let object = || prop_oneof![4 => service(), 6 => slice(), 1 => endpoints(), 1 => a_node()];
    let step = prop_oneof![
        8 => object().prop_map(|object| Step::Apply(Box::new(object))),
        3 => object().prop_map(|object| Step::Delete(object.key())),
        3 => Just(Step::Resolve),
    ];
    vec(step, 1..60)
}

struct Side {
    controller: Controller,
    maker: SnapshotMaker,
}

impl Side {
    fn new() -> Self {
        let mut controller = Controller::new(ControlConfig {
            node_name: "n1".into(),
            ..ControlConfig::default()
        });
        let local = BTreeSet::from(["192.0.2.1".parse().expect("a literal address")]);
        controller.handle(Event::LocalAddresses(local));
        Self {
            controller,
            maker: SnapshotMaker::new(),
        }
    }

    fn result(&mut self) -> (Arc<Resolved>, Arc<Snapshot>) {
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
        (resolved, snapshot)
    }
}

/// Everything but numbers.
fn described(snapshot: &Snapshot) -> BTreeSet<String> {
    let frontends = snapshot.frontends().map(|(key, frontend)| {
        let service = &frontend.service;
        let list = |choice: u32| {
            let choice = usize::try_from(choice).expect("a small number");
            let indices = service.choices[choice].iter();
            let backend =
                |index: &u32| &service.backends[usize::try_from(*index).expect("a small number")];
            indices
                .map(|index| backend(index).endpoint)
                .collect::<Vec<_>>()
        };
        let backends = service
            .backends
            .iter()
            .map(|b| (b.endpoint, b.local, b.draining));
        let backends = backends.collect::<Vec<_>>();
        let (outside, inside) = (list(frontend.outside), list(frontend.inside));
        let how = (frontend.masquerade, frontend.when_empty);
        format!(
            "{key:?} {} {outside:?} {inside:?} {backends:?} {how:?}",
            service.name
        )
    });
    frontends.collect()
}

fn numbers_are_unique(snapshot: &Snapshot) -> bool {
    let backends = snapshot.services().flat_map(|service| &service.backends);
    let numbers: Vec<u32> = backends.map(|backend| backend.id.0).collect();
    numbers.iter().collect::<BTreeSet<_>>().len() == numbers.len()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn any_history_leads_to_the_tables_of_a_fresh_start(steps in steps()) {
        let mut lived = Side::new();
        let mut objects: BTreeMap<ObjectKey, Object> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Apply(object) => {
                    objects.insert(object.key(), (*object).clone());
                    lived.controller.handle(Event::Applied(Arc::new(*object), None));
                }
                Step::Delete(key) => {
                    objects.remove(&key);
                    lived.controller.handle(Event::Deleted(key));
                }
                Step::Resolve => {
                    let (_, snapshot) = lived.result();
                    prop_assert!(numbers_are_unique(&snapshot));
                }
            }
        }
        let mut fresh = Side::new();
        for object in objects.into_values() {
            fresh.controller.handle(Event::Applied(Arc::new(object), None));
        }
        let (resolved, snapshot) = lived.result();
        let (fresh_resolved, fresh_snapshot) = fresh.result();
        prop_assert_eq!(resolved, fresh_resolved);
        prop_assert_eq!(described(&snapshot), described(&fresh_snapshot));
        prop_assert!(numbers_are_unique(&snapshot));
    }
}
