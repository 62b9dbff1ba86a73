//! The loop against a real kernel, in a network namespace of its own.
//!
//! Needs root and `ip`; without them it is skipped with a visible line, or fails where
//! `REQUIRE_PRIVILEGED=1`. Every wait polls with a deadline.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use control::links::{LinkEvent, LinkKind};
use control::run::{Running, spawn};
use control::snapshot::DeviceRole;
use control::{ControlConfig, RunConfig, Source, Update, host_routes};
use dataplane::net::Protocol;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// A network namespace, removed when dropped.
struct Namespace(String);

impl Namespace {
    /// Makes one and moves this thread into it; what the thread starts from then on lives there.
    fn enter(name: &str) -> Option<Self> {
        let name = format!("sluice-control-{name}-{}", std::process::id());
        let made = Command::new("ip").args(["netns", "add", &name]).status();
        if !made.is_ok_and(|status| status.success()) {
            assert!(
                std::env::var_os("REQUIRE_PRIVILEGED").is_none(),
                "a network namespace cannot be made"
            );
            eprintln!("SKIPPED: a network namespace cannot be made");
            return None;
        }
        let namespace = Self(name);
        let file = File::open(format!("/run/netns/{}", namespace.0)).expect("the namespace");
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("entering it");
        ip("link set lo up");
        Some(namespace)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("it was: ip netns exec {} sh", self.0);
        }
        _ = Command::new("ip")
            .args(["netns", "delete", &self.0])
            .status();
    }
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip")
        .args(arguments.split(' '))
        .output()
        .expect("ip");
    assert!(
        output.status.success(),
        "ip {arguments}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

struct Lab {
    running: Option<Running>,
    updates: Receiver<Update>,
    links: Arc<Mutex<Vec<LinkEvent>>>,
    last: Option<Update>,
    folder: tempfile::TempDir,
}

impl Lab {
    fn start(files: &[(&str, &str)], host_scope: Option<&str>) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        for (name, text) in files {
            fs::write(folder.path().join(name), text).expect("a manifest");
        }
        let config = RunConfig {
            control: ControlConfig {
                node_name: "n1".into(),
                ..ControlConfig::default()
            },
            source: Source::Manifests(folder.path().to_owned()),
            min_interval: MIN_INTERVAL,
            snat_addresses: Vec::new(),
            host_scope: host_scope.map(Into::into),
        };
        let links = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&links);
        let link = move |event: &LinkEvent| {
            told.lock().expect("no panic").push(event.clone());
            DeviceRole {
                is_pod: event.link().kind == LinkKind::Veth,
                ..DeviceRole::default()
            }
        };
        let (send, updates): (Sender<Update>, _) = channel();
        let publish = move |update| _ = send.send(update);
        let running = spawn(config, link, publish).expect("a thread");
        Self {
            running: Some(running),
            updates,
            links,
            last: None,
            folder,
        }
    }

    fn write(&self, name: &str, text: &str) {
        fs::write(self.folder.path().join(name), text).expect("a manifest");
    }

    /// Takes publications until one fits.
    fn until(&mut self, what: &str, fits: impl Fn(&Update) -> bool) -> Duration {
        let started = Instant::now();
        while !self.last.as_ref().is_some_and(&fits) {
            let left = PATIENCE.saturating_sub(started.elapsed());
            match self.updates.recv_timeout(left) {
                Ok(update) => self.last = Some(update),
                Err(error) => panic!("{what}: {error}; last was {:#?}", self.last),
            }
        }
        started.elapsed()
    }

    fn stop(mut self) {
        let running = self.running.take().expect("it runs");
        running.stop().expect("it ran without an error");
    }
}

fn serves(update: &Update, address: &str) -> bool {
    let address: SocketAddr = address.parse().expect("a literal address");
    update
        .snapshot
        .frontend(&address.into(), Protocol::TCP)
        .is_some()
}

fn hop(update: &Update, to: &str) -> Option<dataplane::snapshot::Hop> {
    let to: std::net::IpAddr = to.parse().expect("a literal address");
    update.snapshot.fib.hop(to.into())
}

#[test]
fn an_edit_is_live_within_a_second_and_a_broken_one_changes_nothing() {
    let Some(_namespace) = Namespace::enter("edit") else {
        return;
    };
    let mut lab = Lab::start(&[("a.yaml", &service("a", "10.96.0.1"))], None);
    lab.until("the first one", |update| serves(update, "10.96.0.1:80"));
    lab.write("b.yaml", &service("b", "10.96.0.2"));
    let took = lab.until("an edit", |update| serves(update, "10.96.0.2:80"));
    assert!(took < Duration::from_secs(1), "{took:?}");
    lab.write("c.yaml", &service("c", "10.96.0.3"));
    let took = lab.until("another edit", |update| serves(update, "10.96.0.3:80"));
    assert!(took > MIN_INTERVAL / 2, "it did not wait: {took:?}");
    assert!(took < Duration::from_secs(1), "{took:?}");
    lab.write("a.yaml", "kind: [");
    lab.until("a broken file is named", |update| {
        let rejected = &update.resolved.rejected;
        rejected
            .iter()
            .any(|r| r.kind == "File" && r.name == "a.yaml")
    });
    assert!(
        lab.last
            .as_ref()
            .is_some_and(|update| serves(update, "10.96.0.1:80"))
    );
    fs::remove_file(lab.folder.path().join("b.yaml")).expect("deleting it");
    lab.until("a deletion", |update| !serves(update, "10.96.0.2:80"));
    lab.stop();
}

#[test]
fn devices_routes_and_neighbours_are_followed() {
    let Some(_namespace) = Namespace::enter("follow") else {
        return;
    };
    let mut lab = Lab::start(&[("a.yaml", &node_port())], None);
    lab.until("the first one", |update| serves(update, "10.96.0.1:80"));
    ip("link add v0 address 02:00:00:00:00:01 numrxqueues 2 type veth peer name v1");
    ip("link set v0 up");
    ip("link set v1 up");
    ip("addr add 192.0.2.1/24 dev v0");
    ip("-6 addr add 2001:db8::1/64 dev v0 nodad");
    ip("route add default via 192.0.2.254 dev v0");
    ip("-6 route add default via 2001:db8::fe dev v0");
    ip("route add blackhole 198.51.100.0/24");
    lab.until("a route without a neighbour", |update| {
        hop(update, "203.0.113.1").is_some_and(|hop| hop.mac.is_none())
            && hop(update, "2001:db8:9::1").is_some()
    });
    lab.until("a NodePort on the new address", |update| {
        serves(update, "192.0.2.1:30080")
    });
    ip("neigh replace 192.0.2.254 lladdr 02:00:00:00:00:fe dev v0 nud reachable");
    lab.until("a neighbour", |update| {
        hop(update, "203.0.113.1").is_some_and(|hop| hop.mac.is_some())
    });
    let update = lab.last.as_ref().expect("an update");
    let v4 = hop(update, "203.0.113.1").expect("a route");
    let source = |hop: dataplane::snapshot::Hop| hop.source.map(|ip| ip.to_string());
    assert_eq!(source(v4).as_deref(), Some("192.0.2.1"));
    let v6 = hop(update, "2001:db8:9::1").expect("a route");
    assert_eq!(source(v6).as_deref(), Some("2001:db8::1"));
    let device = update.snapshot.node.devices[&v4.ifindex];
    assert!(device.is_pod);
    assert_eq!(device.mac.to_string(), "02:00:00:00:00:01");
    ip("neigh flush dev v0");
    lab.until("a forgotten neighbour", |update| {
        hop(update, "203.0.113.1").is_some_and(|hop| hop.mac.is_none())
    });
    ip("route replace default via 192.0.2.253 dev v0 src 192.0.2.1 metric 5");
    ip("route del default via 192.0.2.254 dev v0");
    ip("link del v0");
    lab.until("a device that is gone", |update| {
        hop(update, "203.0.113.1").is_none() && !serves(update, "192.0.2.1:30080")
    });
    let links = lab.links.lock().expect("no panic").clone();
    let appeared =
        |event: &&LinkEvent| matches!(event, LinkEvent::Appeared(link) if link.name == "v0");
    let link = links
        .iter()
        .find(appeared)
        .expect("it appeared")
        .link()
        .clone();
    assert_eq!((link.kind, link.queues), (LinkKind::Veth, 2));
    assert!(
        links
            .iter()
            .any(|event| matches!(event, LinkEvent::Gone(link) if link.name == "v0"))
    );
    lab.stop();
}

#[test]
fn the_kernel_is_asked_for_routers_and_for_backends_on_the_link() {
    let Some(_namespace) = Namespace::enter("ask") else {
        return;
    };
    ip("link add v0 type veth peer name v1");
    ip("link set v0 up");
    ip("link set v1 up");
    ip("addr add 192.0.2.1/24 dev v0");
    ip("route add 198.51.100.0/24 via 192.0.2.254 dev v0");
    let slice = "---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {name: a, labels: {kubernetes.io/service-name: a}}\naddressType: IPv4\nports: [{port: 80}]\nendpoints: [{addresses: [192.0.2.9]}, {addresses: [198.51.100.9]}]\n";
    let lab = Lab::start(&[("a.yaml", &(service("a", "10.96.0.1") + slice))], None);
    // Nobody answers, but the kernel has been asking.
    eventually("they are asked for", || {
        let known = ip("neigh show dev v0");
        known.contains("192.0.2.254") && known.contains("192.0.2.9")
    });
    assert!(!ip("neigh show dev v0").contains("198.51.100.9"));
    lab.stop();
}

#[test]
fn host_routes_follow_the_services_and_leave_nothing() {
    let Some(_namespace) = Namespace::enter("routes") else {
        return;
    };
    ip("link add v0 type veth peer name v1");
    ip("link set v0 up");
    ip("link set v1 up");
    ip("addr add 192.0.2.1/24 dev v0");
    ip("-6 addr add 2001:db8::1/64 dev v0 nodad");
    ip("route add default via 192.0.2.254 dev v0");
    ip("route add 10.96.0.9/32 dev v0");
    let dual = service("a", "10.96.0.1").replace(
        "clusterIP:",
        "clusterIPs: [10.96.0.1, 'fd00:96::1'], clusterIP:",
    );
    let files = [("a.yaml", dual), ("b.yaml", service("b", "10.96.0.9"))];
    let files: Vec<(&str, &str)> = files
        .iter()
        .map(|(name, text)| (*name, text.as_str()))
        .collect();
    let mut lab = Lab::start(&files, Some("sluice0"));
    lab.until("the first one", |update| serves(update, "10.96.0.1:80"));
    assert_eq!(ip("route show proto 115"), "");
    ip("link add sluice0 type veth peer name sluice1");
    ip("link set sluice1 up");
    ip("link set sluice0 up");
    eventually("v4", || {
        ip("route show proto 115") == "10.96.0.1 dev sluice0 scope link src 192.0.2.1 \n"
    });
    eventually("v6", || {
        ip("-6 route show proto 115")
            == "fd00:96::1 dev sluice0 src 2001:db8::1 metric 1 pref medium\n"
    });
    lab.write("c.yaml", &service("c", "10.96.0.3"));
    eventually("a new Service", || {
        ip("route show proto 115").contains("10.96.0.3 dev")
    });
    ip("route del 10.96.0.3/32 dev sluice0");
    eventually("a route that somebody took", || {
        ip("route show proto 115").contains("10.96.0.3 dev")
    });
    fs::remove_file(lab.folder.path().join("c.yaml")).expect("deleting it");
    eventually("a Service that is gone", || {
        !ip("route show proto 115").contains("10.96.0.3")
    });
    lab.stop();
    assert_eq!(
        ip("route show proto 115") + &ip("-6 route show proto 115"),
        ""
    );
    assert!(ip("route show 10.96.0.9").contains("v0"));
    ip("route add 10.96.0.77/32 dev sluice0 proto 115");
    let lab = Lab::start(&[], None);
    eventually("what a killed process left", || {
        ip("route show proto 115").is_empty()
    });
    lab.stop();
    assert_eq!(host_routes::remove_all_blocking().expect("netlink"), 0);
}

fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let started = Instant::now();
    while !holds() {
        assert!(
            started.elapsed() < PATIENCE,
            "{what}: {}",
            ip("route show table all")
        );
        std::thread::yield_now();
    }
}

fn service(name: &str, address: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec: {{clusterIP: {address}, ports: [{{port: 80}}]}}\n"
    )
}

fn node_port() -> String {
    service("a", "10.96.0.1")
        .replace("clusterIP", "type: NodePort, clusterIP")
        .replace("port: 80", "port: 80, nodePort: 30080")
}

const MIN_INTERVAL: Duration = Duration::from_millis(300);
const PATIENCE: Duration = Duration::from_secs(5);
