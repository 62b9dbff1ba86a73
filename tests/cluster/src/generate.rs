//! Clusters by chance: the same seed gives the same objects.
//!
//! A cluster is what an API server accepts; objects that it must refuse are kept apart. Every feature that a cluster shows
//! is noted by name, so that a run can say how often each was there. Endpoint addresses are unique within a cluster.

use std::collections::BTreeSet;

use serde_json::{Value, json};

/// Objects of one cluster.
#[derive(Clone, Debug, Default)]
pub struct Cluster {
    /// Services, to be created in this order.
    pub services: Vec<Value>,
    /// EndpointSlices.
    pub slices: Vec<Value>,
    /// EndpointSlices that the API server refuses.
    pub refused: Vec<Value>,
    /// What this cluster shows.
    pub features: BTreeSet<&'static str>,
}

/// Makes the cluster with this number of a series.
#[must_use]
pub fn cluster(seed: u64, number: u64) -> Cluster {
    let mut maker = Maker {
        chance: Chance(seed ^ number.wrapping_mul(0x9e37_79b9_7f4a_7c15)),
        cluster: Cluster::default(),
        node_port: 30000,
        address: 0,
    };
    let services = 6 + maker.chance.below(7);
    for at in 0..services {
        maker.service(at);
    }
    if maker.chance.percent(30) {
        maker.refused();
    }
    maker.cluster
}

/// Every feature that a run must have seen, as it is noted.
pub const FEATURES: [&str; 46] = [
    "headless",
    "ExternalName",
    "foreign service-proxy-name",
    "slices of a foreign proxy",
    "slices with the headless label",
    "Service without selector",
    "IPv4",
    "IPv6",
    "dual stack",
    "dual stack, IPv6 first",
    "slices of a family that the Service lacks",
    "several ports",
    "named target port",
    "TCP",
    "UDP",
    "SCTP",
    "one port number, two protocols",
    "NodePort",
    "LoadBalancer ipMode VIP",
    "LoadBalancer ipMode Proxy",
    "externalIPs",
    "source ranges",
    "source range of everybody",
    "healthCheckNodePort",
    "endpoint that is not ready",
    "serving and terminating as the last resort",
    "serving and terminating beside ready ones",
    "one address in two slices",
    "one address in two slices, old and new",
    "several slices",
    "internalTrafficPolicy Local",
    "externalTrafficPolicy Local",
    "zone hints on all",
    "zone hints on some",
    "zone hints for others",
    "node hints on all",
    "node and zone hints",
    "topology annotation",
    "no endpoint anywhere",
    "no endpoint here, policy Local",
    "affinity, default time",
    "affinity, own time",
    "scheduler by annotation",
    "endpoint that is a pod of this node",
    "endpoint outside of the cluster",
    "addresses that the API refuses",
];

/// The label that all of these objects carry.
pub const LABEL: &str = "sluice-test";

/// Chance from a seed (splitmix64).
#[derive(Clone, Debug)]
struct Chance(u64);

impl Chance {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn percent(&mut self, share: u64) -> bool {
        self.below(100) < share
    }

    fn pick<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        let at = self.below(of.len() as u64);
        of[usize::try_from(at).expect("an index below a length")]
    }
}

struct Maker {
    chance: Chance,
    cluster: Cluster,
    node_port: u64,
    address: u64,
}

/// How the endpoints of a Service stand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Mood {
    Mixed,
    RemoteOnly,
    NoSlice,
    Empty,
    NoneReady,
    Terminating,
}

impl Maker {
    fn saw(&mut self, feature: &'static str) {
        self.cluster.features.insert(feature);
    }

    fn service(&mut self, at: u64) {
        let name = format!("s{at}");
        let namespace = self.chance.pick(&["default", "team-a"]).to_owned();
        let kind = self.chance.below(100);
        let families: &[&str] = match self.chance.below(100) {
            0..35 => &["IPv4"],
            35..55 => &["IPv6"],
            55..80 => &["IPv4", "IPv6"],
            _ => &["IPv6", "IPv4"],
        };
        self.saw(match families {
            ["IPv4"] => "IPv4",
            ["IPv6"] => "IPv6",
            ["IPv4", _] => "dual stack",
            _ => "dual stack, IPv6 first",
        });
        let mut service = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": name, "namespace": namespace, "labels": {LABEL: "yes"}, "annotations": {}},
            "spec": {
                "ipFamilies": families,
                "ipFamilyPolicy": if families.len() == 2 { "RequireDualStack" } else { "SingleStack" },
            },
        });
        if self.chance.percent(60) {
            service["spec"]["selector"] = json!({"app": name});
        } else {
            self.saw("Service without selector");
        }
        let (mut external, mut balanced) = (false, false);
        match kind {
            0..5 => {
                self.saw("ExternalName");
                service["spec"] = json!({"type": "ExternalName", "externalName": "example.test"});
                self.cluster.services.push(service);
                return;
            }
            5..10 => {
                self.saw("headless");
                service["spec"]["clusterIP"] = json!("None");
            }
            10..15 => {
                self.saw("foreign service-proxy-name");
                service["metadata"]["labels"][PROXY_NAME] = json!("another");
            }
            15..45 => {}
            45..65 => {
                external = true;
                service["spec"]["type"] = json!("NodePort");
                self.saw("NodePort");
            }
            _ => {
                (external, balanced) = (true, true);
                service["spec"]["type"] = json!("LoadBalancer");
            }
        }
        let headless = service["spec"]["clusterIP"] == "None";
        let ports = self.ports(external);
        service["spec"]["ports"] = json!(ports);
        let internal_local = !headless && self.chance.percent(25);
        if internal_local {
            service["spec"]["internalTrafficPolicy"] = json!("Local");
            self.saw("internalTrafficPolicy Local");
        }
        let external_local = external && self.chance.percent(45);
        if external_local {
            service["spec"]["externalTrafficPolicy"] = json!("Local");
            self.saw("externalTrafficPolicy Local");
            if balanced {
                service["spec"]["healthCheckNodePort"] = json!(self.take_node_port());
                self.saw("healthCheckNodePort");
            }
        }
        self.extras(&mut service, at, families, headless);
        if balanced {
            self.balancer(&mut service, at, families);
        }
        let local = internal_local || external_local;
        self.endpoints(&name, &namespace, families, &ports, local);
        self.cluster.services.push(service);
    }

    fn ports(&mut self, external: bool) -> Vec<Value> {
        let count = match self.chance.below(100) {
            0..60 => 1,
            60..85 => 2,
            _ => 3,
        };
        if count > 1 {
            self.saw("several ports");
        }
        let mut ports: Vec<Value> = Vec::new();
        let mut taken = BTreeSet::new();
        for at in 0..count {
            let mut protocol = self
                .chance
                .pick(&["TCP", "TCP", "TCP", "UDP", "UDP", "SCTP"]);
            let mut number = 80 + at;
            if at == 1 && self.chance.percent(40) {
                protocol = if ports[0]["protocol"] == "TCP" {
                    "UDP"
                } else {
                    "TCP"
                };
                number = 80;
                self.saw("one port number, two protocols");
            }
            if !taken.insert((protocol, number)) {
                number += 1000;
            }
            self.saw(match protocol {
                "TCP" => "TCP",
                "UDP" => "UDP",
                _ => "SCTP",
            });
            let name = if count == 1 && self.chance.percent(50) {
                String::new()
            } else {
                format!("p{at}")
            };
            let target = if self.chance.percent(30) {
                self.saw("named target port");
                json!("web")
            } else {
                json!(8080 + at)
            };
            let mut port =
                json!({"name": name, "protocol": protocol, "port": number, "targetPort": target});
            if external {
                port["nodePort"] = json!(self.take_node_port());
            }
            ports.push(port);
        }
        ports
    }

    fn take_node_port(&mut self) -> u64 {
        self.node_port += 1;
        self.node_port
    }

    fn extras(&mut self, service: &mut Value, at: u64, families: &[&str], headless: bool) {
        if self.chance.percent(25) && !headless {
            service["spec"]["sessionAffinity"] = json!("ClientIP");
            if self.chance.percent(50) {
                let seconds = 1 + self.chance.below(86400);
                service["spec"]["sessionAffinityConfig"] =
                    json!({"clientIP": {"timeoutSeconds": seconds}});
                self.saw("affinity, own time");
            } else {
                self.saw("affinity, default time");
            }
        }
        if self.chance.percent(25) && !headless {
            let of = |family: &&str| match *family {
                "IPv4" => format!("192.0.2.{}", 10 + at),
                _ => format!("2001:db8:ee::{:x}", 0x10 + at),
            };
            let addresses: Vec<String> = families.iter().map(of).collect();
            service["spec"]["externalIPs"] = json!(addresses);
            self.saw("externalIPs");
        }
        if self.chance.percent(15) {
            let scheduler = self.chance.pick(&["lc", "sh", "maglev", "random", "nq"]);
            service["metadata"]["annotations"][SCHEDULER] = json!(scheduler);
            self.saw("scheduler by annotation");
        }
        if self.chance.percent(15) {
            let annotation = self.chance.pick(&[
                "service.kubernetes.io/topology-mode",
                "service.kubernetes.io/topology-aware-hints",
            ]);
            service["metadata"]["annotations"][annotation] = json!("Auto");
            self.saw("topology annotation");
        }
    }

    fn balancer(&mut self, service: &mut Value, at: u64, families: &[&str]) {
        let mut ingress = Vec::new();
        for family in families {
            for more in 0..=self.chance.below(2) {
                let ip = match *family {
                    "IPv4" => format!("198.18.{more}.{}", 10 + at),
                    _ => format!("2001:db8:1b:{more}::{:x}", 0x10 + at),
                };
                let mode = self.chance.pick(&["", "VIP", "VIP", "Proxy"]);
                match mode {
                    "" => ingress.push(json!({"ip": ip})),
                    mode => ingress.push(json!({"ip": ip, "ipMode": mode})),
                }
                self.saw(if mode == "Proxy" {
                    "LoadBalancer ipMode Proxy"
                } else {
                    "LoadBalancer ipMode VIP"
                });
            }
        }
        service["status"] = json!({"loadBalancer": {"ingress": ingress}});
        if self.chance.percent(45) {
            let ranges: &[&str] = match self.chance.below(6) {
                0 => &["203.0.113.0/24"],
                1 => &["192.168.77.0/24", "203.0.113.0/25", "2001:db8:9::/48"],
                2 => &["2001:db8:9::/48", "fd77::/64"],
                3 => &["10.244.0.0/16", "203.0.113.64/26"],
                4 => {
                    self.saw("source range of everybody");
                    &["203.0.113.0/28", "0.0.0.0/0", "2001:db8:a::/48"]
                }
                _ => &["192.0.2.0/24", "2001:db8:f::/48"],
            };
            service["spec"]["loadBalancerSourceRanges"] = json!(ranges);
            self.saw("source ranges");
        }
    }

    fn endpoints(
        &mut self,
        service: &str,
        namespace: &str,
        families: &[&str],
        ports: &[Value],
        local: bool,
    ) {
        let mood = match self.chance.below(100) {
            0..8 => Mood::NoSlice,
            8..12 => Mood::Empty,
            12..30 => Mood::RemoteOnly,
            30..36 => Mood::NoneReady,
            36..46 => Mood::Terminating,
            _ => Mood::Mixed,
        };
        match mood {
            Mood::NoSlice | Mood::Empty | Mood::NoneReady => self.saw("no endpoint anywhere"),
            Mood::RemoteOnly if local => self.saw("no endpoint here, policy Local"),
            Mood::Terminating => self.saw("serving and terminating as the last resort"),
            Mood::RemoteOnly | Mood::Mixed => {}
        }
        if mood == Mood::NoSlice {
            return;
        }
        let hints = self.chance.below(100);
        let mark = match self.chance.below(100) {
            0..5 => Some((PROXY_NAME, "slices of a foreign proxy")),
            5..9 => Some((HEADLESS, "slices with the headless label")),
            _ => None,
        };
        if let Some((_, feature)) = mark {
            self.saw(feature);
        }
        let mut families: Vec<&str> = families.to_vec();
        if families.len() == 1 && self.chance.percent(15) {
            families.push(if families[0] == "IPv4" {
                "IPv6"
            } else {
                "IPv4"
            });
            self.saw("slices of a family that the Service lacks");
        }
        for family in families {
            let count = if mood == Mood::Empty {
                0
            } else {
                1 + self.chance.below(5)
            };
            let all: Vec<Value> = (0..count)
                .map(|at| self.endpoint(family, mood, hints, at))
                .collect();
            let mut parts = vec![all.clone()];
            if all.len() > 1 && self.chance.percent(30) {
                let (first, rest) = all.split_at(all.len() / 2);
                parts = vec![first.to_vec(), rest.to_vec()];
                self.saw("several slices");
            }
            if !all.is_empty() && self.chance.percent(20) {
                parts.push(self.again(&all[0]));
            }
            for (at, endpoints) in parts.iter().enumerate() {
                let mut labels = json!({LABEL: "yes", "kubernetes.io/service-name": service});
                if let Some((label, _)) = mark {
                    labels[label] = json!("another");
                }
                let ports: Vec<Value> = ports.iter().map(slice_port).collect();
                self.cluster.slices.push(json!({
                    "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                    "metadata": {
                        "name": format!("{service}-{}-{at}", family.to_lowercase()),
                        "namespace": namespace, "labels": labels,
                    },
                    "addressType": family, "ports": ports, "endpoints": endpoints,
                }));
            }
        }
    }

    fn endpoint(&mut self, family: &str, mood: Mood, hints: u64, at: u64) -> Value {
        self.address += 1;
        let (number, place) = (self.address, self.chance.below(100));
        let (node, network) = match place {
            0..45 if mood != Mood::RemoteOnly => (Some("n1"), 1),
            0..90 => (Some("n2"), 2),
            _ => (None, 0),
        };
        let address = match (family, network) {
            ("IPv4", 0) => format!("203.0.113.{number}"),
            ("IPv4", network) => format!("10.244.{network}.{number}"),
            (_, 0) => format!("2001:db8:99::{number:x}"),
            (_, network) => format!("fd00:10:244:{network}::{number:x}"),
        };
        let zone = self.chance.pick(&["a", "b"]);
        let mut endpoint = json!({"addresses": [address], "zone": zone});
        match node {
            Some(node) => endpoint["nodeName"] = json!(node),
            None => self.saw("endpoint outside of the cluster"),
        }
        if node == Some("n1") {
            self.saw("endpoint that is a pod of this node");
        }
        endpoint["conditions"] = match (mood, self.chance.below(100)) {
            (Mood::NoneReady, _) => conditions(false, false, false),
            (Mood::Terminating, 0..80) => conditions(false, true, true),
            (Mood::Terminating, _) => conditions(false, false, true),
            (_, 0..12) => {
                self.saw("endpoint that is not ready");
                conditions(false, false, false)
            }
            (_, 12..22) => {
                self.saw("serving and terminating beside ready ones");
                conditions(false, true, true)
            }
            (_, 22..40) => json!({}),
            _ => conditions(true, true, false),
        };
        self.hint(&mut endpoint, node, zone, hints, at);
        endpoint
    }

    fn hint(&mut self, endpoint: &mut Value, node: Option<&str>, zone: &str, hints: u64, at: u64) {
        let zones = |name: &str| json!([{"name": name}]);
        match hints {
            50..64 => {
                endpoint["hints"] = json!({"forZones": zones(zone)});
                self.saw("zone hints on all");
            }
            64..74 if at.is_multiple_of(2) => {
                endpoint["hints"] = json!({"forZones": zones(zone)});
                self.saw("zone hints on some");
            }
            74..80 => {
                endpoint["hints"] = json!({"forZones": zones("elsewhere")});
                self.saw("zone hints for others");
            }
            80..90 => {
                endpoint["hints"] = json!({"forNodes": zones(node.unwrap_or("n2"))});
                self.saw("node hints on all");
            }
            90..98 => {
                let hinted = node.unwrap_or("n3");
                endpoint["hints"] = json!({"forNodes": zones(hinted), "forZones": zones(zone)});
                self.saw("node and zone hints");
            }
            _ => {}
        }
    }

    /// The endpoint once more, for a second slice: as it is, or as an older pod that had its address.
    fn again(&mut self, endpoint: &Value) -> Vec<Value> {
        let mut again = endpoint.clone();
        if self.chance.percent(50) && endpoint["conditions"]["terminating"] != true {
            let serving = self.chance.percent(70);
            again["conditions"] = conditions(false, serving, true);
            self.saw("one address in two slices, old and new");
        } else {
            self.saw("one address in two slices");
        }
        vec![again]
    }

    fn refused(&mut self) {
        let (family, address) = *self.chance.pick(&[
            &("IPv4", "127.0.0.1"),
            &("IPv4", "169.254.1.1"),
            &("IPv4", "224.0.0.1"),
            &("IPv4", "0.0.0.0"),
            &("IPv4", "010.244.001.009"),
            &("IPv6", "::1"),
            &("IPv6", "::"),
            &("IPv6", "fe80::1"),
            &("IPv6", "ff02::1"),
            &("IPv6", "::ffff:10.244.1.9"),
        ]);
        self.cluster.refused.push(json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": "refused", "namespace": "default",
                "labels": {LABEL: "yes", "kubernetes.io/service-name": "s0"},
            },
            "addressType": family, "ports": [{"name": "", "protocol": "TCP", "port": 80}],
            "endpoints": [{"addresses": [address]}],
        }));
        self.saw("addresses that the API refuses");
    }
}

/// Services of which a slice is marked as another proxy's.
#[must_use]
pub fn foreign(cluster: &Cluster) -> BTreeSet<(String, String)> {
    let marked = cluster
        .slices
        .iter()
        .filter(|slice| !slice["metadata"]["labels"][PROXY_NAME].is_null());
    let word = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let owner = |slice: &Value| {
        let metadata = &slice["metadata"];
        (
            word(&metadata["namespace"]),
            word(&metadata["labels"]["kubernetes.io/service-name"]),
        )
    };
    marked.map(owner).collect()
}

/// The last Service and slices of a cluster: when a proxy serves them, it has seen all the others. `addresses` are those
/// of its only endpoint, one for each family.
#[must_use]
pub fn sentinel(number: u64, port: u16) -> (Value, Vec<Value>, [String; 2]) {
    let name = format!("last-{number}");
    let addresses = [
        format!("10.250.{}.{}", number / 200, 1 + number % 200),
        format!("fd00:10:250::{:x}", number + 1),
    ];
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "labels": {LABEL: "yes"}},
        "spec": {
            "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": [{"name": "", "protocol": "TCP", "port": port}],
        },
    });
    let slices = ["IPv4", "IPv6"]
        .iter()
        .zip(&addresses)
        .map(|(family, address)| {
            json!({
                "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
                "metadata": {
                    "name": format!("{name}-{}", family.to_lowercase()), "namespace": "default",
                    "labels": {LABEL: "yes", "kubernetes.io/service-name": name},
                },
                "addressType": family, "ports": [{"name": "", "protocol": "TCP", "port": port}],
                "endpoints": [{"addresses": [address], "conditions": {"ready": true}}],
            })
        });
    let slices = slices.collect();
    (service, slices, addresses)
}

fn slice_port(port: &Value) -> Value {
    let number = port["targetPort"]
        .as_u64()
        .unwrap_or_else(|| 9000 + port["port"].as_u64().unwrap_or(0) % 100);
    json!({"name": port["name"], "protocol": port["protocol"], "port": number})
}

fn conditions(ready: bool, serving: bool, terminating: bool) -> Value {
    json!({"ready": ready, "serving": serving, "terminating": terminating})
}

const HEADLESS: &str = "service.kubernetes.io/headless";
const PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
const SCHEDULER: &str = "sluice.dev/scheduler";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_seed_gives_one_cluster_and_every_feature_in_a_tenth_of_two_hundred() {
        assert_eq!(cluster(7, 3).services, cluster(7, 3).services);
        let all: Vec<Cluster> = (0..200).map(|number| cluster(1, number)).collect();
        for feature in FEATURES {
            let seen = all
                .iter()
                .filter(|cluster| cluster.features.contains(feature))
                .count();
            assert!(seen >= 20, "{feature}: {seen} of 200");
        }
    }
}
