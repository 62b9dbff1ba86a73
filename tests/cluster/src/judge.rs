//! kube-proxy judges the rules: what `sluice resolve` says about a cluster's objects against what kube-proxy programs.
//!
//! The objects are created through the API and read back from it; both see the same ones. For each frontend a packet of
//! every kind of client is walked through kube-proxy's rules; the set of its ends must be what the resolution says. The
//! clients: one outside, one in a source range, a pod, a process of the node, each backend itself. A difference is a
//! failure, or it is [`Purpose`]: then docs/differences.md must name it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::process::Command;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};

use crate::api::{Api, Identity};
use crate::control_plane::ControlPlane;
use crate::generate::{self, Cluster, FEATURES, LABEL};
use crate::iptables::{End, Packet, Place, Rules, within};
use crate::kube_proxy::{KubeProxy, SENTINEL_PORT, local_endpoints};
use crate::report::Report;

/// What is judged.
#[derive(Clone, Debug)]
pub struct Trial<'a> {
    /// The binary.
    pub sluice: &'a Path,
    /// The repository.
    pub root: &'a Path,
    /// How many clusters.
    pub clusters: u64,
    /// Where chance starts.
    pub seed: u64,
}

/// Differences that are ours on purpose, by the name that docs/differences.md gives them.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Purpose {
    /// Without a cluster range kube-proxy cannot tell pods; sluice takes the Nodes' ranges.
    PodRanges,
    /// A process of the node keeps its source, which is the node's already.
    HostKeepsAddress,
    /// Clients outside of the source ranges get no answer, also where no endpoint exists.
    RangesFirst,
    /// kube-proxy refuses what its node's own processes send to external addresses only where they are local.
    HostToExternal,
    /// Up to 1.36 kube-proxy leaves slices of another proxy out, 1.37 takes them.
    ForeignSlices,
    /// One entry stands for a NodePort in both families: it says `drop` if one of them drops.
    OneEntryForBothFamilies,
}

impl Purpose {
    const fn name(self) -> &'static str {
        match self {
            Self::PodRanges => "pod-ranges",
            Self::HostKeepsAddress => "host-keeps-address",
            Self::RangesFirst => "ranges-first",
            Self::HostToExternal => "host-to-external",
            Self::ForeignSlices => "foreign-slices",
            Self::OneEntryForBothFamilies => "one-entry-for-both-families",
        }
    }
}

/// A configuration under which a part of the clusters is judged.
struct Setting {
    features: &'static [&'static str],
    configuration: &'static str,
    zone: &'static str,
    /// The device that a pod's packets come by.
    pod_device: &'static str,
    /// Whether kube-proxy can tell pods from others, by family.
    tells_pods: [bool; 2],
    masquerade_all: bool,
}

/// Runs all clusters and counts each as one check.
pub fn run(plane: &ControlPlane, trial: &Trial<'_>, report: &mut Report) -> Result<()> {
    let mut api = plane.client(Identity::Administrator)?;
    create_namespace(&mut api, "team-a")?;
    let known = fs::read_to_string(trial.root.join("docs/differences.md"))
        .context("read docs/differences.md")?;
    let mut seen: BTreeMap<&str, u64> = BTreeMap::new();
    let mut purposes: BTreeMap<Purpose, u64> = BTreeMap::new();
    let start = Instant::now();
    let settings = u64::try_from(SETTINGS.len())?;
    for (at, setting) in (0..).zip(&SETTINGS) {
        set_node(&mut api, setting.zone)?;
        let mut proxy = KubeProxy::start(plane, setting.configuration)?;
        for number in (at..trial.clusters).step_by(usize::try_from(settings)?) {
            let cluster = generate::cluster(trial.seed, number);
            for feature in cluster.features.iter().chain(setting.features) {
                *seen.entry(feature).or_default() += 1;
            }
            let outcome = judge_one(
                plane, &mut api, &mut proxy, trial, setting, number, &cluster,
            );
            let outcome = outcome.map(|found| {
                for purpose in found {
                    *purposes.entry(purpose).or_default() += 1;
                }
            });
            report.check_quietly(
                &format!("cluster {number} ({})", setting.features.join(", ")),
                outcome,
            );
        }
    }
    println!(
        "{} clusters in {:.0} s",
        trial.clusters,
        start.elapsed().as_secs_f32()
    );
    clear(&mut api)?;
    let features = enough(&seen, trial.clusters);
    if trial.clusters >= ENOUGH {
        report.check("every feature in a tenth of the clusters", features);
    }
    for (purpose, count) in purposes {
        let named = known.contains(&format!("`{}`", purpose.name()));
        let outcome = named
            .then_some(())
            .context("docs/differences.md does not name it");
        report.check(
            &format!(
                "difference on purpose: {} in {count} clusters",
                purpose.name()
            ),
            outcome,
        );
    }
    Ok(())
}

fn enough(seen: &BTreeMap<&str, u64>, clusters: u64) -> Result<()> {
    let settings = SETTINGS.iter().flat_map(|setting| setting.features);
    let all: BTreeSet<&str> = FEATURES.iter().chain(settings).copied().collect();
    let mut rare = String::new();
    for feature in all {
        let count = seen.get(feature).copied().unwrap_or(0);
        println!("{count:5} of {clusters}  {feature}");
        if count * 10 < clusters {
            write!(rare, "{feature}: {count}; ")?;
        }
    }
    ensure!(rare.is_empty(), "too rare: {rare}");
    Ok(())
}

fn judge_one(
    plane: &ControlPlane,
    api: &mut Api,
    proxy: &mut KubeProxy,
    trial: &Trial<'_>,
    setting: &Setting,
    number: u64,
    cluster: &Cluster,
) -> Result<BTreeSet<Purpose>> {
    let last = apply(api, cluster, number)?;
    let rules = proxy.wait_for(plane, last)?;
    let folder = plane.dir().join("objects");
    let services = read_back(api, &folder)?;
    let resolution = resolve(plane, trial.sluice, &folder)?;
    let foreign = generate::foreign(cluster);
    let mut comparison = Comparison {
        setting,
        services: &services,
        foreign: &foreign,
        rules: &rules,
        local: NODE_ADDRESSES.iter().map(|ip| parse(ip)).collect(),
        wrong: BTreeSet::new(),
        purposes: BTreeSet::new(),
    };
    comparison.all(&resolution)?;
    health_checks(
        plane,
        &services,
        &foreign,
        &rules,
        &resolution,
        &mut comparison.wrong,
    )?;
    let refusals = resolution["rejected"].as_array().map_or(0, Vec::len);
    if refusals > 0 {
        comparison
            .wrong
            .insert(format!("rejected: {}", resolution["rejected"]));
    }
    if !comparison.wrong.is_empty() {
        let kept = std::env::temp_dir().join(format!("sluice-cluster-{number}"));
        keep(plane, &folder, &resolution, &kept)?;
        let lines: Vec<String> = comparison.wrong.into_iter().collect();
        bail!(
            "{} differences, kept in {}\n        {}",
            lines.len(),
            kept.display(),
            lines.join("\n        ")
        );
    }
    let purposes = std::mem::take(&mut comparison.purposes);
    for (mistake, wrong) in plant(&resolution, &foreign) {
        comparison.all(&wrong)?;
        let found = std::mem::take(&mut comparison.wrong);
        ensure!(
            !found.is_empty(),
            "a planted mistake was not found: {mistake}"
        );
    }
    Ok(purposes)
}

/// The resolution with one mistake, for several kinds of it: the comparison must find each.
fn plant(resolution: &Value, foreign: &BTreeSet<(String, String)>) -> Vec<(&'static str, Value)> {
    type Wrong = fn(&mut Value, usize) -> bool;
    let kinds: [(&str, Wrong); 6] = [
        ("a backend is missing", |entry, at| {
            let frontend = &mut entry["frontends"][at];
            let inside = frontend["insideBackends"].clone();
            let Some(list) = frontend["backends"]
                .as_array_mut()
                .filter(|list| list.len() > 1)
            else {
                return false;
            };
            list.pop();
            inside.is_null()
        }),
        ("another port", |entry, at| {
            let frontend = &mut entry["frontends"][at];
            let port = frontend["port"].as_u64().unwrap_or(0);
            frontend["port"] = json!(port + 7);
            true
        }),
        ("never masqueraded", |entry, at| {
            let frontend = &mut entry["frontends"][at];
            let is_always =
                frontend["masquerade"] == "always" && frontend["sourceRanges"] == json!([]);
            frontend["masquerade"] = json!("never");
            is_always && frontend["backends"] != json!([])
        }),
        ("another answer without backends", |entry, at| {
            let frontend = &mut entry["frontends"][at];
            let rejects = frontend["whenEmpty"] == "reject" && frontend["address"] != "*";
            frontend["whenEmpty"] = json!("drop");
            rejects && frontend["backends"] == json!([]) && frontend["insideBackends"].is_null()
        }),
        ("a source range too few", |entry, at| {
            let frontend = &mut entry["frontends"][at];
            let ranges = frontend["sourceRanges"].as_array().into_iter().flatten();
            // One of everybody's makes the others needless.
            let narrow = ranges.clone().count() > 0
                && ranges.clone().all(|range| !text(range).ends_with("/0"));
            let has_ranges = narrow && frontend["backends"] != json!([]);
            frontend["sourceRanges"] = json!([]);
            has_ranges
        }),
        ("affinity of another time", |entry, at| {
            let seconds = entry["affinitySeconds"].as_u64();
            entry["affinitySeconds"] = json!(seconds.map(|seconds| seconds + 1));
            seconds.is_some() && entry["frontends"][at]["backends"] != json!([])
        }),
    ];
    let entries = resolution["services"].as_array().map_or(0, Vec::len);
    let mut planted = Vec::new();
    for (name, wrong) in kinds {
        let places = (0..entries).flat_map(|entry| (0..8).map(move |at| (entry, at)));
        let mut tries = places.filter_map(|(entry, at)| {
            let found = &resolution["services"][entry];
            found["frontends"].get(at)?;
            if foreign.contains(&key(found, "namespace", "name")) {
                return None;
            }
            let mut copy = resolution.clone();
            wrong(&mut copy["services"][entry], at).then_some((name, copy))
        });
        planted.extend(tries.next());
    }
    planted
}

/// Replaces the last cluster's objects by this one's. Returns the addresses of the endpoint that comes last.
fn apply(api: &mut Api, cluster: &Cluster, number: u64) -> Result<[IpAddr; 2]> {
    clear(api)?;
    let (service, slices, addresses) = generate::sentinel(number, SENTINEL_PORT);
    for object in cluster.services.iter().chain([&service]) {
        let path = path_of(KINDS[0], object);
        let mut created = api.create(&path, object)?;
        if !object["status"].is_null() {
            created["status"] = object["status"].clone();
            let name = object["metadata"]["name"]
                .as_str()
                .context("a Service has a name")?;
            api.call("PUT", &format!("{path}/{name}/status"), Some(&created))?;
        }
    }
    for object in &cluster.refused {
        let answer = api.send("POST", &path_of(KINDS[1], object), Some(object))?;
        ensure!(
            answer.status == 422,
            "the API took {object}: {}",
            answer.status
        );
    }
    for object in cluster.slices.iter().chain(&slices) {
        api.create(&path_of(KINDS[1], object), object)?;
    }
    Ok([parse(&addresses[0]), parse(&addresses[1])])
}

/// Removes what clusters have left in the API.
fn clear(api: &mut Api) -> Result<()> {
    for (group, kind) in KINDS {
        for namespace in ["default", "team-a"] {
            let path = format!("{group}/namespaces/{namespace}/{kind}?labelSelector={LABEL}%3Dyes");
            api.call("DELETE", &path, None)?;
        }
    }
    Ok(())
}

/// Writes what the API holds as files and returns the Services by namespace and name.
fn read_back(api: &mut Api, folder: &Path) -> Result<BTreeMap<(String, String), Value>> {
    fs::create_dir_all(folder)?;
    let mut services = BTreeMap::new();
    for (group, kind, version, name) in [
        ("/api/v1", "services", "v1", "Service"),
        (
            "/apis/discovery.k8s.io/v1",
            "endpointslices",
            "discovery.k8s.io/v1",
            "EndpointSlice",
        ),
        ("/api/v1", "nodes", "v1", "Node"),
    ] {
        let mut list = api.read(&format!("{group}/{kind}"))?;
        let items = list["items"].as_array_mut().context("a list has items")?;
        for item in items.iter_mut() {
            item["apiVersion"] = json!(version);
            item["kind"] = json!(name);
            if name == "Service" {
                services.insert(key(&item["metadata"], "namespace", "name"), item.clone());
            }
        }
        let list = json!({"apiVersion": "v1", "kind": "List", "items": items});
        fs::write(folder.join(format!("{kind}.json")), list.to_string())?;
    }
    Ok(services)
}

fn resolve(plane: &ControlPlane, sluice: &Path, folder: &Path) -> Result<Value> {
    let mut command = Command::new(sluice);
    command
        .arg("resolve")
        .arg("--manifests")
        .arg(folder)
        .args(["--node", "n1", "-o", "json"]);
    command
        .arg("--config")
        .arg(plane.dir().join("kube-proxy.yaml"));
    let output = lab::namespace::text(command)?;
    serde_json::from_str(&output).context("sluice resolve printed no JSON")
}

fn keep(plane: &ControlPlane, folder: &Path, resolution: &Value, kept: &Path) -> Result<()> {
    fs::create_dir_all(kept)?;
    for (_, kind) in KINDS {
        let name = format!("{kind}.json");
        fs::copy(folder.join(&name), kept.join(&name))?;
    }
    fs::copy(plane.dir().join("kube-proxy.yaml"), kept.join("config"))?;
    fs::write(kept.join("resolution"), resolution.to_string())?;
    fs::write(
        kept.join("rules4"),
        plane.node().output("iptables-save", &[])?,
    )?;
    fs::write(
        kept.join("rules6"),
        plane.node().output("ip6tables-save", &[])?,
    )?;
    Ok(())
}

/// A kind of client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Class {
    Outside,
    Pod,
    Host,
}

struct Comparison<'a> {
    setting: &'a Setting,
    services: &'a BTreeMap<(String, String), Value>,
    /// Services whose slices are another proxy's.
    foreign: &'a BTreeSet<(String, String)>,
    rules: &'a [Rules; 2],
    local: BTreeSet<IpAddr>,
    wrong: BTreeSet<String>,
    purposes: BTreeSet<Purpose>,
}

/// One frontend of the resolution in one family.
struct Claim<'a> {
    name: String,
    protocol: String,
    target: SocketAddr,
    outside: BTreeSet<SocketAddr>,
    inside: BTreeSet<SocketAddr>,
    ranges: Vec<(IpAddr, u8)>,
    masquerade: &'a str,
    policy: &'a str,
    /// Whether its slices are another proxy's.
    foreign: bool,
    drops: bool,
    /// Whether `drops` may stand for the other family.
    shared: bool,
}

impl Comparison<'_> {
    fn all(&mut self, resolution: &Value) -> Result<()> {
        let entries = resolution["services"].as_array().context("services")?;
        let affinities: Vec<_> = self.rules.iter().map(Rules::affinities).collect();
        for (at, family) in ["IPv4", "IPv6"].into_iter().enumerate() {
            let mut ours = BTreeSet::new();
            for entry in entries {
                let service = &self.services[&key(entry, "namespace", "name")];
                if !has(&service["spec"]["ipFamilies"], family) {
                    continue;
                }
                for frontend in entry["frontends"].as_array().context("frontends")? {
                    let address = text(&frontend["address"]);
                    if address != "*" && is_v6(address) != (family == "IPv6") {
                        continue;
                    }
                    let protocol = text(&entry["protocol"]).to_lowercase();
                    let port = u16::try_from(frontend["port"].as_u64().context("port")?)?;
                    let place = (address != "*").then(|| parse(address));
                    ours.insert(Place {
                        address: place,
                        port,
                        protocol,
                    });
                    for claim in claims(entry, frontend, family, service, self.foreign)? {
                        self.compare(at, &claim)?;
                    }
                }
                self.affinity(entry, family, &affinities[at]);
                self.scheduler(entry, service);
            }
            // Every local address as one place, or each of them as sluice names them.
            let own = NODE_ADDRESSES.iter().map(|ip| parse(ip));
            let own: Vec<IpAddr> = own.filter(|ip| ip.is_ipv6() == (at == 1)).collect();
            let theirs: BTreeSet<Place> = self.rules[at]
                .places()
                .into_iter()
                .flat_map(|place| match place.address {
                    None if !ours.contains(&place) => own
                        .iter()
                        .map(|ip| Place {
                            address: Some(*ip),
                            ..place.clone()
                        })
                        .collect(),
                    _ => vec![place],
                })
                .collect();
            for place in ours.difference(&theirs) {
                self.wrong
                    .insert(format!("{family}: only sluice answers on {place:?}"));
            }
            for place in theirs.difference(&ours) {
                self.wrong
                    .insert(format!("{family}: only kube-proxy answers on {place:?}"));
            }
        }
        Ok(())
    }

    fn compare(&mut self, at: usize, claim: &Claim<'_>) -> Result<()> {
        let clients = CLIENTS[at];
        let mut tries = vec![
            (parse(clients[0]), Class::Outside, "up0"),
            (parse(clients[1]), Class::Outside, "up0"),
            (parse(clients[2]), Class::Pod, self.setting.pod_device),
            (parse(clients[3]), Class::Host, ""),
        ];
        let pods = claim.inside.union(&claim.outside).map(SocketAddr::ip);
        let here = pods.filter(|ip| within(*ip, parse(OWN_PODS[at].0), OWN_PODS[at].1));
        tries.extend(here.map(|ip| (ip, Class::Pod, self.setting.pod_device)));
        for (source, class, device) in tries {
            let packet = Packet {
                source,
                destination: claim.target,
                protocol: &claim.protocol,
                device: (!device.is_empty()).then_some(device),
                local: &self.local,
            };
            let theirs = self.rules[at].walk(&packet)?;
            let ours = claim.ends(source, class, true);
            if ours == theirs {
                continue;
            }
            match self.purpose(at, claim, source, class, &ours, &theirs) {
                Some(purpose) => _ = self.purposes.insert(purpose),
                None => {
                    self.wrong.insert(format!(
                        "{} {} for {class:?} {source}: sluice {ours:?}, kube-proxy {theirs:?}",
                        claim.name, claim.target
                    ));
                }
            }
        }
        Ok(())
    }

    fn purpose(
        &self,
        at: usize,
        claim: &Claim<'_>,
        source: IpAddr,
        class: Class,
        ours: &BTreeSet<End>,
        theirs: &BTreeSet<End>,
    ) -> Option<Purpose> {
        let nobody = claim.outside.is_empty() && claim.inside.is_empty();
        let is = |end: End| *theirs == BTreeSet::from([end]);
        if nobody && !claim.drops && !claim.allows(source) && is(End::Rejected) {
            return Some(Purpose::RangesFirst);
        }
        if nobody && claim.shared && claim.drops && is(End::Rejected) {
            return Some(Purpose::OneEntryForBothFamilies);
        }
        if class == Class::Host && nobody && is(End::Untouched) && claim.policy == "external" {
            return Some(Purpose::HostToExternal);
        }
        if nobody && claim.foreign {
            return Some(Purpose::ForeignSlices);
        }
        if class == Class::Host && targets(ours) == targets(theirs) && claim.masquerade == "never" {
            return Some(Purpose::HostKeepsAddress);
        }
        if !self.setting.tells_pods[at] && !self.setting.masquerade_all {
            let blind = claim.ends(source, class, false);
            if blind == *theirs || (class == Class::Host && targets(&blind) == targets(theirs)) {
                return Some(Purpose::PodRanges);
            }
        }
        None
    }

    fn affinity(
        &mut self,
        entry: &Value,
        family: &str,
        affinities: &BTreeMap<SocketAddr, BTreeSet<u64>>,
    ) {
        let expected: BTreeSet<u64> = entry["affinitySeconds"].as_u64().into_iter().collect();
        let lists = entry["frontends"].as_array().into_iter().flatten();
        for backend in lists.flat_map(|frontend| backends(&frontend["backends"], family)) {
            let theirs = affinities.get(&backend).cloned().unwrap_or_default();
            if theirs != expected {
                self.wrong.insert(format!(
                    "{}: affinity to {backend}: sluice {expected:?}, kube-proxy {theirs:?}",
                    name(entry)
                ));
            }
        }
    }

    fn scheduler(&mut self, entry: &Value, service: &Value) {
        let asked = service["metadata"]["annotations"]["sluice.dev/scheduler"].as_str();
        if entry["scheduler"] != asked.unwrap_or("rr") {
            self.wrong
                .insert(format!("{}: scheduler {}", name(entry), entry["scheduler"]));
        }
    }
}

impl Claim<'_> {
    /// Every end that the resolution allows for a client. `tells_pods` false: as one that cannot tell pods would do it.
    fn ends(&self, source: IpAddr, class: Class, tells_pods: bool) -> BTreeSet<End> {
        if !self.allows(source) {
            return BTreeSet::from([End::Dropped]);
        }
        let is_inside = class == Class::Host || (class == Class::Pod && tells_pods);
        let list = if is_inside {
            &self.inside
        } else {
            &self.outside
        };
        if list.is_empty() {
            return BTreeSet::from([if self.drops {
                End::Dropped
            } else {
                End::Rejected
            }]);
        }
        let end = |to: &SocketAddr| End::Backend {
            to: *to,
            masquerade: to.ip() == source
                || match self.masquerade {
                    "always" => true,
                    "offCluster" => tells_pods && class != Class::Pod,
                    _ => false,
                },
        };
        list.iter().map(end).collect()
    }

    fn allows(&self, source: IpAddr) -> bool {
        let mut ranges = self.ranges.iter();
        self.ranges.is_empty() || ranges.any(|(network, length)| within(source, *network, *length))
    }
}

fn claims<'a>(
    entry: &Value,
    frontend: &'a Value,
    family: &str,
    service: &Value,
    foreign: &BTreeSet<(String, String)>,
) -> Result<Vec<Claim<'a>>> {
    let address = text(&frontend["address"]);
    let both =
        has(&service["spec"]["ipFamilies"], "IPv4") && has(&service["spec"]["ipFamilies"], "IPv6");
    let targets: Vec<IpAddr> = match address {
        "*" => {
            let own = NODE_ADDRESSES.iter().map(|ip| parse(ip));
            own.filter(|ip| ip.is_ipv6() == (family == "IPv6"))
                .collect()
        }
        address => vec![parse(address)],
    };
    let port = u16::try_from(frontend["port"].as_u64().context("port")?)?;
    let outside = backends(&frontend["backends"], family);
    let inside = match &frontend["insideBackends"] {
        Value::Null => outside.clone(),
        list => backends(list, family),
    };
    let mut ranges = Vec::new();
    for range in frontend["sourceRanges"].as_array().into_iter().flatten() {
        let (ip, length) = text(range)
            .split_once('/')
            .context("a range has a length")?;
        ranges.push((ip.parse()?, length.parse()?));
    }
    let claim = |ip| Claim {
        name: name(entry),
        protocol: text(&entry["protocol"]).to_lowercase(),
        target: SocketAddr::new(ip, port),
        outside: outside.clone(),
        inside: inside.clone(),
        ranges: ranges.clone(),
        masquerade: text(&frontend["masquerade"]),
        policy: text(&frontend["policy"]),
        foreign: foreign.contains(&key(entry, "namespace", "name")),
        drops: frontend["whenEmpty"] == "drop",
        shared: both && address == "*",
    };
    Ok(targets.into_iter().map(claim).collect())
}

fn health_checks(
    plane: &ControlPlane,
    services: &BTreeMap<(String, String), Value>,
    foreign: &BTreeSet<(String, String)>,
    rules: &[Rules; 2],
    resolution: &Value,
    wrong: &mut BTreeSet<String>,
) -> Result<()> {
    let mut ports = BTreeSet::new();
    for check in resolution["healthChecks"]
        .as_array()
        .context("healthChecks")?
    {
        let port = u16::try_from(check["port"].as_u64().context("port")?)?;
        ports.insert(port);
        if foreign.contains(&key(check, "namespace", "name")) {
            continue;
        }
        let families = &services[&key(check, "namespace", "name")]["spec"]["ipFamilies"];
        // It answers where node ports do, with the count of that address' family.
        let ask = || -> Option<u64> {
            let own = NODE_ADDRESSES.iter().map(|ip| parse(ip));
            let asked = own.filter(|ip| has(families, if ip.is_ipv4() { "IPv4" } else { "IPv6" }));
            asked
                .filter_map(|ip| local_endpoints(plane, ip, port).ok())
                .max()
        };
        // The answer follows the rules by a moment.
        let start = Instant::now();
        let theirs = loop {
            let theirs = ask();
            if theirs == check["localEndpoints"].as_u64()
                || start.elapsed() > Duration::from_secs(3)
            {
                break theirs;
            }
            sleep(Duration::from_millis(20));
        };
        if theirs != check["localEndpoints"].as_u64() {
            wrong.insert(format!("health check {check}: kube-proxy says {theirs:?}"));
        }
    }
    let theirs: BTreeSet<u16> = rules.iter().flat_map(Rules::health_check_ports).collect();
    if theirs != ports {
        wrong.insert(format!(
            "health check ports: sluice {ports:?}, kube-proxy {theirs:?}"
        ));
    }
    Ok(())
}

fn create_namespace(api: &mut Api, name: &str) -> Result<()> {
    let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
    let answer = api.send("POST", "/api/v1/namespaces", Some(&object))?;
    ensure!(
        [201, 409].contains(&answer.status),
        "namespace {name}: {}",
        answer.body
    );
    Ok(())
}

/// Makes the Nodes anew; n1 in this zone.
fn set_node(api: &mut Api, zone: &str) -> Result<()> {
    for (name, number, zone) in [("n1", 1, zone), ("n2", 2, "b")] {
        api.send("DELETE", &format!("/api/v1/nodes/{name}"), None)?;
        let mut labels = json!({});
        if !zone.is_empty() {
            labels["topology.kubernetes.io/zone"] = json!(zone);
        }
        let ranges = [
            format!("10.244.{number}.0/24"),
            format!("fd00:10:244:{number}::/64"),
        ];
        let mut node = api.create(
            "/api/v1/nodes",
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": labels},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            }),
        )?;
        let host = number * 10;
        node["status"] = json!({"addresses": [
            {"type": "InternalIP", "address": format!("192.168.77.{host}")},
            {"type": "InternalIP", "address": format!("fd77::{host}")},
        ]});
        if name == "n1" {
            let more = NODE_ADDRESSES.iter().skip(1).step_by(2);
            let more = more.map(|ip| json!({"type": "ExternalIP", "address": ip}));
            node["status"]["addresses"]
                .as_array_mut()
                .context("a list")?
                .extend(more);
        }
        api.call("PUT", &format!("/api/v1/nodes/{name}/status"), Some(&node))?;
    }
    Ok(())
}

fn path_of((group, kind): (&str, &str), object: &Value) -> String {
    format!(
        "{group}/namespaces/{}/{kind}",
        text(&object["metadata"]["namespace"])
    )
}

fn targets(ends: &BTreeSet<End>) -> BTreeSet<End> {
    let plain = |end: &End| match end {
        End::Backend { to, .. } => End::Backend {
            to: *to,
            masquerade: false,
        },
        other => other.clone(),
    };
    ends.iter().map(plain).collect()
}

fn backends(list: &Value, family: &str) -> BTreeSet<SocketAddr> {
    let all = list.as_array().into_iter().flatten();
    let all = all.map(|backend| {
        text(backend)
            .parse()
            .expect("sluice prints addresses as ip:port")
    });
    all.filter(|backend: &SocketAddr| backend.is_ipv6() == (family == "IPv6"))
        .collect()
}

fn key(object: &Value, namespace: &str, name: &str) -> (String, String) {
    (
        text(&object[namespace]).to_owned(),
        text(&object[name]).to_owned(),
    )
}

fn name(entry: &Value) -> String {
    format!(
        "{}/{}:{}",
        text(&entry["namespace"]),
        text(&entry["name"]),
        text(&entry["port"])
    )
}

fn has(list: &Value, word: &str) -> bool {
    list.as_array()
        .is_some_and(|list| list.iter().any(|item| item == word))
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn is_v6(address: &str) -> bool {
    parse(address).is_ipv6()
}

fn parse(address: &str) -> IpAddr {
    address
        .parse()
        .expect("an address that was checked or is a literal")
}

/// With fewer clusters a feature may be rare by chance.
const ENOUGH: u64 = 100;
const KINDS: [(&str, &str); 2] = [
    ("/api/v1", "services"),
    ("/apis/discovery.k8s.io/v1", "endpointslices"),
];
/// Of node n1, in the order of its families, the primary one first.
const NODE_ADDRESSES: [&str; 4] = [
    "192.168.77.10",
    "198.51.100.10",
    "fd77::10",
    "2001:db8:51::10",
];
/// By family: outside, outside in most of the source ranges, a pod of this node, a process of this node.
const CLIENTS: [[&str; 4]; 2] = [
    [
        "203.0.114.9",
        "203.0.113.99",
        "10.244.1.254",
        "192.168.77.10",
    ],
    [
        "2001:db8:8::9",
        "2001:db8:9::99",
        "fd00:10:244:1::fffe",
        "fd77::10",
    ],
];
const OWN_PODS: [(&str, u8); 2] = [("10.244.1.0", 24), ("fd00:10:244:1::", 64)];

const SETTINGS: [Setting; 10] = [
    Setting {
        features: &[
            "detectLocalMode ClusterCIDR",
            "clusterCIDR of both families",
        ],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "a",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &["detectLocalMode ClusterCIDR", "masqueradeAll"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "clusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n",
            "iptables: {minSyncPeriod: 1ms, masqueradeAll: true}\n"
        ),
        zone: "b",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: true,
    },
    Setting {
        features: &["detectLocalMode NodeCIDR", "nodePortAddresses primary"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: NodeCIDR\nnodePortAddresses: [primary]\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "a",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &[
            "detectLocalMode BridgeInterface",
            "nodePortAddresses as ranges",
        ],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}\n",
            "nodePortAddresses: [192.168.77.0/24, 2001:db8:51::/48]\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "a",
        pod_device: "cbr0",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &[
            "detectLocalMode InterfaceNamePrefix",
            "nodePortAddresses of one family",
        ],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}\n",
            "nodePortAddresses: [198.51.100.0/24]\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "b",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &["detectLocalMode ClusterCIDR", "no clusterCIDR"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "a",
        pod_device: "veth9",
        tells_pods: [false, false],
        masquerade_all: false,
    },
    Setting {
        features: &["detectLocalMode NodeCIDR", "Node without zone"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: NodeCIDR\nclusterCIDR: 10.244.0.0/16,fd00:10:244::/56\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &[
            "detectLocalMode BridgeInterface",
            "nodePortAddresses primary",
        ],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}\n",
            "nodePortAddresses: [primary]\n",
            "iptables: {minSyncPeriod: 1ms, localhostNodePorts: false}\n"
        ),
        zone: "c",
        pod_device: "cbr0",
        tells_pods: [true, true],
        masquerade_all: false,
    },
    Setting {
        features: &["detectLocalMode InterfaceNamePrefix", "masqueradeAll"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}\n",
            "iptables: {minSyncPeriod: 1ms, masqueradeAll: true}\n"
        ),
        zone: "a",
        pod_device: "veth9",
        tells_pods: [true, true],
        masquerade_all: true,
    },
    Setting {
        features: &["detectLocalMode ClusterCIDR", "clusterCIDR of one family"],
        configuration: concat!(
            "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n",
            "clusterCIDR: 10.244.0.0/16\n",
            "iptables: {minSyncPeriod: 1ms}\n"
        ),
        zone: "a",
        pod_device: "veth9",
        tells_pods: [true, false],
        masquerade_all: false,
    },
];
