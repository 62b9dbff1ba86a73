//! sluice in the lab, fed by the real API server, with exactly the permissions and the configuration of deploy/.
//!
//! The lab's first node reaches the API server by a link of its own, never through a Service. Services are created through
//! the API, scaled, rolled and deleted while a client opens a new connection every few milliseconds; the API server is
//! killed and started again under the same load.
//!
//! Rule to keep: a check waits for what a client sees, with a deadline, and a load that runs over a change must not lose
//! a single request.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use lab::client::{Asking, Tally, ask, ask_once};
use lab::plan::{POD_PORT, PODS, address};
use lab::trial::{Load, ensure_all_right};
use lab::{Family, Lab, Options, Protocol, Site};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::api::{Api, Identity};
use crate::control_plane::{ControlPlane, SERVER, log_to, tail};
use crate::deploy;
use crate::report::Report;

/// Runs all checks.
pub fn run(
    plane: &mut ControlPlane,
    root: &Path,
    binary: &Path,
    report: &mut Report,
) -> Result<()> {
    let lab = Lab::new(&Options::default())?;
    plane.join(lab.at(Site::N1).name())?;
    let mut api = plane.client(Identity::Administrator)?;
    set_nodes(&mut api)?;
    let token = deploy::bound_token(&mut api, "first")?;
    let sluice = Sluice::start(plane, &lab, root, binary, &token)?;
    report.check(
        "a Service's name is refused as the API server's address",
        refuses_service_names(plane, &lab, root, binary),
    );
    let mut story = Story {
        lab: &lab,
        api,
        plane,
        sluice,
    };
    let steps: [(&str, Step<'_>); 9] = [
        (
            "a Service made through the API is served in the lab",
            Story::create,
        ),
        ("endpoints are added under load: 0 failures", Story::scale),
        ("endpoints are rolled under load: 0 failures", Story::roll),
        (
            "the API server is killed and comes back under load: 0 failures",
            Story::outage,
        ),
        (
            "a connection whose packets vanish is noticed: the next change is served",
            Story::black_hole,
        ),
        (
            "an object that is not served has an Event that says so",
            Story::event,
        ),
        ("a token file that rotates is read again", Story::rotation),
        (
            "a Service deleted through the API is no longer served",
            Story::delete,
        ),
        ("SIGTERM ends it within 5 s", Story::stop),
    ];
    for (name, step) in steps {
        let outcome = step(&mut story);
        let outcome = outcome.map_err(|error| anyhow!("{error:#}\n{}", tail(&story.sluice.log)));
        report.check(name, outcome);
    }
    Ok(())
}

type Step<'a> = fn(&mut Story<'a>) -> Result<()>;

struct Story<'a> {
    lab: &'a Lab,
    api: Api,
    plane: &'a mut ControlPlane,
    sluice: Sluice,
}

impl Story<'_> {
    fn create(&mut self) -> Result<()> {
        self.api.create(SERVICES, &service())?;
        for slice in slices(&[("n1a", Condition::Ready), ("n2a", Condition::Ready)]) {
            self.api.create(SLICES, &slice)?;
        }
        let cluster_ips = self.cluster_ips()?;
        let wanted = ["n1a", "n2a"];
        for protocol in Protocol::ALL {
            for family in Family::ALL {
                self.served_by(Site::Client, node_port(family), protocol, &wanted)?;
            }
            for ip in &cluster_ips {
                let pod = lab::plan::pod("n1b").context("the plan has a pod n1b")?;
                self.served_by(pod, SocketAddr::new(*ip, PORT), protocol, &wanted)?;
            }
        }
        Ok(())
    }

    fn scale(&mut self) -> Result<()> {
        self.under_load(|story| {
            let all = ["n1a", "n1b", "n2a", "n2b"];
            story.set_backends(&all.map(|pod| (pod, Condition::Ready)))?;
            story.served_by(Site::Client, node_port(Family::V4), Protocol::Tcp, &all)
        })
    }

    /// As a rollout does it: the new one is there, the old one terminates, then it is gone.
    fn roll(&mut self) -> Result<()> {
        self.under_load(|story| {
            for (old, new) in [("n1b", "n2b"), ("n2b", "n1b"), ("n1b", "n2b")] {
                let target = node_port(Family::V4);
                story.set_backends(&[
                    ("n1a", Condition::Ready),
                    (old, Condition::Ready),
                    (new, Condition::Ready),
                ])?;
                story.served_by(Site::Client, target, Protocol::Tcp, &["n1a", old, new])?;
                story.set_backends(&[
                    ("n1a", Condition::Ready),
                    (old, Condition::Terminating),
                    (new, Condition::Ready),
                ])?;
                story.served_by(Site::Client, target, Protocol::Tcp, &["n1a", new])?;
                story.set_backends(&[("n1a", Condition::Ready), (new, Condition::Ready)])?;
                story.served_by(Site::Client, target, Protocol::Tcp, &["n1a", new])?;
            }
            Ok(())
        })
    }

    fn outage(&mut self) -> Result<()> {
        self.under_load(|story| {
            story.plane.kill_server()?;
            sleep(OUTAGE);
            story.plane.start_server()?;
            // Added, not exchanged: connections to an endpoint that is gone are reset on purpose.
            let pods = ["n1a", "n1b", "n2b"];
            story.set_backends(&pods.map(|pod| (pod, Condition::Ready)))?;
            story.served_by(Site::Client, node_port(Family::V4), Protocol::Tcp, &pods)
        })
    }

    /// Drops what its open connections to the API server carry, without a word to either end; new ones pass.
    fn black_hole(&mut self) -> Result<()> {
        let node = self.lab.at(Site::N1);
        let server = SERVER.to_string();
        let open = node.output("ss", &["-Htn", "state", "established", "dst", &server])?;
        let ports = open
            .lines()
            .filter_map(|line| line.split_whitespace().nth(2)?.rsplit_once(':'));
        let ports: Vec<&str> = ports.map(|(_, port)| port).collect();
        ensure!(!ports.is_empty(), "no connection to {server}:\n{open}");
        let ports = ports.join(", ");
        let mut nft = node.command("nft");
        nft.args(["-f", "-"]);
        let table = format!(
            "table inet hole {{\n\
             chain leaving {{ type filter hook output priority -300; ip daddr {ip} tcp sport {{ {ports} }} drop; }}\n\
             chain coming {{ type filter hook input priority -300; ip saddr {ip} tcp dport {{ {ports} }} drop; }}\n}}\n",
            ip = SERVER.ip()
        );
        lab::namespace::feed(nft, &table)?;
        let start = Instant::now();
        self.set_backends(&[("n1a", Condition::Ready), ("n2b", Condition::Ready)])?;
        self.served_by(
            Site::Client,
            node_port(Family::V4),
            Protocol::Tcp,
            &["n1a", "n2b"],
        )?;
        println!(
            "        noticed and served after {:.1} s",
            start.elapsed().as_secs_f64()
        );
        self.lab
            .at(Site::N1)
            .output("nft", &["delete", "table", "inet", "hole"])
            .map(drop)
    }

    /// Two Services claim one address; the older one has it, by name where both are of one second. The other one is told.
    fn event(&mut self) -> Result<()> {
        for name in ["claim-1", "claim-2"] {
            let service = json!({
                "apiVersion": "v1", "kind": "Service", "metadata": {"name": name, "namespace": "default"},
                "spec": {"externalIPs": ["203.0.113.77"], "ports": [{"port": 7777}]},
            });
            self.api.create(SERVICES, &service)?;
        }
        let path = "/api/v1/namespaces/default/events?fieldSelector=involvedObject.name%3Dclaim-2";
        let start = Instant::now();
        loop {
            let events = self.api.read(path)?;
            if events["items"]
                .as_array()
                .is_some_and(|items| !items.is_empty())
            {
                break;
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "there is no Event on the other Service"
            );
            sleep(POLL);
        }
        for name in ["claim-1", "claim-2"] {
            self.api
                .call("DELETE", &format!("{SERVICES}/{name}"), None)?;
        }
        Ok(())
    }

    /// The first token dies with the object that it is bound to; the second one is in its file before.
    fn rotation(&mut self) -> Result<()> {
        fs::write(
            &self.sluice.token,
            deploy::bound_token(&mut self.api, "second")?,
        )?;
        deploy::revoke(&mut self.api, "first")?;
        self.plane.kill_server()?;
        self.plane.start_server()?;
        self.set_backends(&[("n1b", Condition::Ready), ("n2b", Condition::Ready)])?;
        self.served_by(
            Site::Client,
            node_port(Family::V4),
            Protocol::Tcp,
            &["n1b", "n2b"],
        )
    }

    fn delete(&mut self) -> Result<()> {
        let path = format!("{SERVICES}/{NAME}");
        self.api.call("DELETE", &path, None)?;
        let target = node_port(Family::V4);
        self.eventually(|story| {
            let asking = asking(target, Protocol::Tcp);
            match story.lab.at(Site::Client).run(|| ask_once(&asking, 0)) {
                Ok(answer) => bail!("{target} is still answered by {}", answer.server),
                Err(_) => Ok(()),
            }
        })
    }

    fn stop(&mut self) -> Result<()> {
        let start = Instant::now();
        kill_process(Pid::from_child(&self.sluice.child), Signal::TERM)?;
        loop {
            if let Some(status) = self.sluice.child.try_wait()? {
                ensure!(status.success(), "it ended with {status}");
                return Ok(());
            }
            ensure!(
                start.elapsed() < Duration::from_secs(5),
                "it is still there"
            );
            sleep(POLL);
        }
    }

    /// Does something while a client opens new connections all the time.
    fn under_load(&mut self, work: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let target = node_port(Family::V4);
        let load = || Load::fresh(self.lab, Site::Client, target, Protocol::Tcp);
        let loads = (0..CLIENTS).map(|_| load()).collect::<Result<Vec<_>>>()?;
        let start = Instant::now();
        let outcome = work(self);
        let seconds = start.elapsed().as_secs_f64();
        let mut tally = Tally::default();
        for load in loads {
            tally.merge(load.finish());
        }
        println!(
            "        {} connections in {seconds:.1} s, {} failed",
            tally.requests,
            tally.requests - tally.answered
        );
        outcome?;
        ensure_all_right(&tally)
    }

    /// Waits until exactly these pods answer, each of them.
    fn served_by(
        &mut self,
        from: Site,
        target: SocketAddr,
        protocol: Protocol,
        pods: &[&str],
    ) -> Result<()> {
        let wanted: BTreeSet<&str> = pods.iter().copied().collect();
        self.eventually(|story| {
            let asking = asking(target, protocol);
            let tally = story.lab.at(from).run(|| ask(&asking, 24));
            let answered: BTreeSet<&str> = tally.shares.keys().map(String::as_str).collect();
            ensure!(
                answered == wanted && tally.answered == tally.requests,
                "{protocol:?} {target} from {}: {answered:?} instead of {wanted:?}, {} of {} answered",
                from.name(),
                tally.answered,
                tally.requests
            );
            Ok(())
        })
    }

    fn eventually(&mut self, mut attempt: impl FnMut(&Self) -> Result<()>) -> Result<()> {
        let start = Instant::now();
        loop {
            match attempt(self) {
                Ok(()) => return Ok(()),
                Err(error) if start.elapsed() > PATIENCE => return Err(error),
                Err(_) => {}
            }
            if let Some(status) = self.sluice.child.try_wait()? {
                bail!("sluice ended: {status}");
            }
            sleep(POLL);
        }
    }

    fn set_backends(&mut self, backends: &[(&str, Condition)]) -> Result<()> {
        for slice in slices(backends) {
            let name = slice["metadata"]["name"].as_str().context("a name")?;
            let patch = json!({"endpoints": slice["endpoints"]});
            self.api
                .call("PATCH", &format!("{SLICES}/{name}"), Some(&patch))?;
        }
        Ok(())
    }

    fn cluster_ips(&mut self) -> Result<Vec<IpAddr>> {
        let service = self.api.read(&format!("{SERVICES}/{NAME}"))?;
        let ips = service["spec"]["clusterIPs"]
            .as_array()
            .context("cluster IPs")?;
        ips.iter()
            .map(|ip| Ok(ip.as_str().context("an address")?.parse()?))
            .collect()
    }
}

/// Such a name leads to the API server only while a proxy serves it.
fn refuses_service_names(
    plane: &ControlPlane,
    lab: &Lab,
    root: &Path,
    binary: &Path,
) -> Result<()> {
    for server in [
        "https://kubernetes.default.svc",
        "https://kubernetes.default.svc.cluster.local:443",
    ] {
        let dir = lab.dir().join("refused");
        fs::create_dir_all(&dir)?;
        fs::write(dir.join("token"), "none")?;
        let config = configuration(plane, root, &dir, server)?;
        let mut command = lab.at(Site::N1).command(binary);
        command
            .args(["run", "--hostname-override=n1"])
            .arg(format!("--config={}", config.display()));
        command.arg(format!("--state-dir={}", dir.join("state").display()));
        let log = dir.join("log");
        log_to(&mut command, &log)?;
        let mut child = command.spawn().context("start sluice")?;
        let start = Instant::now();
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > Duration::from_secs(5) {
                child.kill()?;
                child.wait()?;
                bail!("it runs with {server}");
            }
            sleep(POLL);
        };
        let said = tail(&log);
        ensure!(
            status.code() == Some(1) && said.contains("server"),
            "{server}: {status}\n{said}"
        );
    }
    Ok(())
}

/// Writes the ConfigMap's files into a folder; only places differ from those in a pod.
fn configuration(plane: &ControlPlane, root: &Path, dir: &Path, server: &str) -> Result<PathBuf> {
    let place = |name: &str| dir.join(name).display().to_string();
    let account = "/var/run/secrets/kubernetes.io/serviceaccount";
    let kubeconfig = deploy::config_map(root, "kubeconfig.conf")?
        .replace("https://API-SERVER:6443", server)
        .replace(
            &format!("{account}/ca.crt"),
            &plane.certificate().display().to_string(),
        )
        .replace(&format!("{account}/token"), &place("token"));
    fs::write(place("kubeconfig.conf"), kubeconfig)?;
    let config = deploy::config_map(root, "config.conf")?
        .replace("/var/lib/sluice/kubeconfig.conf", &place("kubeconfig.conf"));
    fs::write(place("config.conf"), config)?;
    Ok(dir.join("config.conf"))
}

/// A running `sluice run --config`. Dropping it kills it.
struct Sluice {
    child: Child,
    log: PathBuf,
    token: PathBuf,
}

impl Sluice {
    /// Starts it with the DaemonSet's capabilities and the ConfigMap's files.
    fn start(
        plane: &ControlPlane,
        lab: &Lab,
        root: &Path,
        binary: &Path,
        token: &str,
    ) -> Result<Self> {
        let dir = lab.dir();
        fs::write(dir.join("token"), token)?;
        let config = configuration(plane, root, dir, &format!("https://{SERVER}"))?;
        let log = dir.join("sluice.log");
        let binary = fs::canonicalize(binary)?;
        let mut command = lab.at(Site::N1).command("setpriv");
        command
            .arg("--no-new-privs")
            .arg(format!("--bounding-set={}", deploy::capabilities(root)?))
            .arg(binary)
            .args(["run", "--hostname-override=n1"])
            .arg(format!("--config={}", config.display()))
            .arg(format!("--state-dir={}", dir.join("state").display()));
        log_to(&mut command, &log)?;
        let child = command.spawn().context("start sluice")?;
        Ok(Self {
            child,
            log,
            token: dir.join("token"),
        })
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        // One that ended by itself needs no end.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Condition {
    Ready,
    Terminating,
}

fn service() -> Value {
    let port = |protocol: Protocol| {
        json!({
            "name": protocol.name(), "protocol": protocol.name().to_uppercase(),
            "port": PORT, "targetPort": POD_PORT, "nodePort": NODE_PORT,
        })
    };
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": NAME, "namespace": "default"},
        "spec": {
            "type": "NodePort", "ipFamilies": ["IPv4", "IPv6"], "ipFamilyPolicy": "RequireDualStack",
            "ports": Protocol::ALL.map(port),
        },
    })
}

fn slices(backends: &[(&str, Condition)]) -> [Value; 2] {
    Family::ALL.map(|family| {
        let endpoints = backends.iter().filter_map(|(name, condition)| {
            let pod = PODS.iter().find(|pod| pod.name == *name)?;
            let ready = *condition == Condition::Ready;
            Some(json!({
                "addresses": [pod.address(family)], "nodeName": pod.node.name(),
                "conditions": {"ready": ready, "serving": true, "terminating": !ready},
            }))
        });
        let ports = Protocol::ALL.map(|protocol| {
            json!({"name": protocol.name(), "protocol": protocol.name().to_uppercase(), "port": POD_PORT})
        });
        json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
            "metadata": {
                "name": format!("{NAME}-{}", family.digit()), "namespace": "default",
                "labels": {"kubernetes.io/service-name": NAME},
            },
            "addressType": family.name(), "ports": ports, "endpoints": endpoints.collect::<Vec<_>>(),
        })
    })
}

/// The lab's Nodes in place of any others.
fn set_nodes(api: &mut Api) -> Result<()> {
    let ranges = [
        (Site::N1, ["10.244.1.0/24", "fd00:10:244:1::/64"]),
        (Site::N2, ["10.244.2.0/23", "fd00:10:244:2::/63"]),
    ];
    for (site, ranges) in ranges {
        let name = site.name();
        api.send("DELETE", &format!("/api/v1/nodes/{name}"), None)?;
        let mut node = api.create(
            "/api/v1/nodes",
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": name},
                "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            }),
        )?;
        let addresses = Family::ALL
            .map(|family| json!({"type": "InternalIP", "address": address(site, family)}));
        node["status"] = json!({"addresses": addresses});
        api.call("PUT", &format!("/api/v1/nodes/{name}/status"), Some(&node))?;
    }
    Ok(())
}

fn node_port(family: Family) -> SocketAddr {
    SocketAddr::new(address(Site::N1, family), NODE_PORT)
}

fn asking(target: SocketAddr, protocol: Protocol) -> Asking {
    Asking {
        protocol,
        target,
        patience: Duration::from_secs(1),
        longest: 500,
    }
}

const SERVICES: &str = "/api/v1/namespaces/default/services";
const SLICES: &str = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices";
const NAME: &str = "story";
const PORT: u16 = 80;
const NODE_PORT: u16 = 30099;
/// Each opens a connection, asks, closes it and rests for 5 ms; together more than a hundred a second.
const CLIENTS: usize = 4;
/// How long the API server stays away.
const OUTAGE: Duration = Duration::from_secs(5);
/// A watch that was cut comes back within 45 s.
const PATIENCE: Duration = Duration::from_secs(45);
const POLL: Duration = Duration::from_millis(50);
