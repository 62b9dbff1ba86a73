//! One end-to-end test: a lab with engines in it, and the promises that every test ends with.
//!
//! A test that needs root is skipped with a visible line where it has none; with `REQUIRE_PRIVILEGED=1` that is a failure.
//! When a test panics, the trial prints what the nodes say, their logs and how to enter them; with `KEEP=1` the lab stays,
//! with `PCAP=1` a capture of all devices but the uplinks' AF_XDP stays (no socket sees what XDP takes away).
//!
//! Rule to keep: trials take turns. Two cores cannot hold two labs and still say something about time.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::process::Signal;
use serde_json::Value;

use crate::client::{Asking, Connection, Tally, ask_once};
use crate::plan::{Protocol, Site};
use crate::residue::NodeState;
use crate::sluice::{Settings, Sluice};
use crate::topology::{Lab, Options};
use crate::{manifests, proof, sluice};

/// A lab under test.
#[derive(Debug)]
pub struct Trial {
    nodes: BTreeMap<Site, Sluice>,
    before: BTreeMap<Site, NodeState>,
    settings: Settings,
    captures: Vec<(Child, PathBuf)>,
    lab: Option<Lab>,
    _turn: File,
}

/// Traffic that goes on until [`Load::finish`].
#[derive(Debug)]
pub struct Load {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Tally>>,
}

impl Trial {
    /// Lays a lab out and starts sluice on both nodes; `None` where the test must be skipped.
    #[must_use]
    pub fn start(options: &Options, settings: Settings) -> Option<Self> {
        let mut trial = Self::lay_out(options, settings)?;
        for node in [Site::N1, Site::N2] {
            trial.start_node(node);
        }
        for node in [Site::N1, Site::N2] {
            trial.await_ready(node);
        }
        Some(trial)
    }

    /// Lays a lab out with its manifests; nothing runs on the nodes yet.
    #[must_use]
    pub fn lay_out(options: &Options, settings: Settings) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            assert!(
                !is_set("REQUIRE_PRIVILEGED"),
                "REQUIRE_PRIVILEGED=1, but the test does not run as root"
            );
            say("SKIPPED: network namespaces need root");
            return None;
        }
        let turn = take_turn().expect("the lock file of the labs can be made");
        let lab = Lab::new(options).expect("the lab comes up");
        manifests::write_all(&sluice::manifests(&lab)).expect("manifests can be written");
        let capture = |node| {
            (
                node,
                NodeState::capture(&lab, node).expect("a node can be looked at"),
            )
        };
        let before = [Site::N1, Site::N2].map(capture).into();
        Some(Self {
            nodes: BTreeMap::new(),
            before,
            settings,
            captures: Vec::new(),
            lab: Some(lab),
            _turn: turn,
        })
    }

    /// The lab.
    #[must_use]
    pub fn lab(&self) -> &Lab {
        self.lab
            .as_ref()
            .expect("the lab stays until the trial is dropped")
    }

    /// Starts sluice on a node; it may not be ready yet.
    pub fn start_node(&mut self, node: Site) {
        let started = Sluice::start(self.lab(), node, &self.settings);
        self.nodes.insert(node, started.expect("sluice starts"));
        if is_set("PCAP") {
            self.capture(node);
        }
    }

    /// Waits until sluice on a node is ready, at most for the three seconds it may take.
    pub fn await_ready(&mut self, node: Site) {
        let lab = self
            .lab
            .as_ref()
            .expect("the lab stays until the trial is dropped");
        let sluice = self
            .nodes
            .get_mut(&node)
            .expect("sluice was started on the node");
        sluice
            .wait_ready(lab, Duration::from_secs(3))
            .expect("sluice serves within three seconds");
    }

    /// Sends a signal to sluice on a node.
    pub fn signal(&self, node: Site, signal: Signal) {
        self.nodes[&node].signal(signal).expect("sluice runs");
    }

    /// Waits for the end of sluice on a node, at most five seconds; whether it said success.
    pub fn await_end(&mut self, node: Site) -> bool {
        let mut sluice = self.nodes.remove(&node).expect("sluice runs on the node");
        let status = sluice
            .wait_end(Duration::from_secs(5))
            .expect("sluice ends in five seconds");
        status.success()
    }

    /// `sluice cleanup` on a node.
    pub fn cleanup(&self, node: Site) {
        sluice::cleanup(self.lab(), node, &self.settings.binary).expect("cleanup succeeds");
    }

    /// A client command's JSON.
    #[must_use]
    pub fn ask(&self, node: Site, command: &str) -> Value {
        let asked = sluice::ask_json(self.lab(), node, &self.settings.binary, &[command]);
        asked.expect("a client command prints JSON")
    }

    /// The folder of manifests.
    #[must_use]
    pub fn manifests(&self) -> PathBuf {
        sluice::manifests(self.lab())
    }

    /// Fails unless a node is as it was before sluice was started on it.
    pub fn assert_nothing_left(&self, node: Site) {
        eventually(Duration::from_secs(2), || {
            NodeState::capture(self.lab(), node)?.ensure_as(&self.before[&node])
        });
    }

    /// The promises at the end of every test: all packets are accounted for, flows return to zero, and SIGTERM leaves
    /// nothing behind.
    pub fn finish(mut self) {
        let binary = self.settings.binary.clone();
        for node in self.running() {
            proof::flows_end(self.lab(), node, &binary).expect("flows return to zero");
            proof::sums(self.lab(), node, &binary).expect("the sums are those of the devices");
            let status = proof::status(self.lab(), node, &binary).expect("status answers");
            proof::identity(&status).expect("every packet is accounted for");
            proof::no_nat_rule(self.lab(), node).expect("nobody else translates");
            proof::no_conntrack_entry(self.lab(), node).expect("conntrack sees plain flows only");
        }
        for node in self.running() {
            self.signal(node, Signal::TERM);
            assert!(self.await_end(node), "sluice ends with success");
            self.assert_nothing_left(node);
        }
    }

    fn capture(&mut self, node: Site) {
        let name = format!("{}-{}.pcap", self.lab().name(), node.name());
        let path = std::env::temp_dir().join(name);
        let mut tcpdump = self.lab().at(node).command("tcpdump");
        tcpdump
            .args(["-i", "any", "-U", "-Z", "root", "-s", "200", "-w"])
            .arg(&path);
        let tcpdump = tcpdump
            .stderr(Stdio::null())
            .spawn()
            .expect("tcpdump starts");
        self.captures.push((tcpdump, path));
    }

    fn running(&self) -> Vec<Site> {
        self.nodes.keys().copied().collect()
    }

    /// Everything that helps to understand a failure.
    fn describe(&self) -> String {
        let mut text = String::new();
        for (node, sluice) in &self.nodes {
            let name = node.name();
            for view in ["status", "flows"] {
                let said = sluice::ask(self.lab(), *node, &self.settings.binary, &[view]);
                let said = said.unwrap_or_else(|error| format!("{error:#}"));
                let _ = writeln!(text, "{name}: sluice {view}\n{said}");
            }
            let _ = writeln!(text, "{name}: the end of its log\n{}", sluice.log_tail());
            for command in [
                &["ip", "-s", "link"][..],
                &["nft", "list", "ruleset"],
                &["conntrack", "-L"],
            ] {
                let said = self.lab().at(*node).output(command[0], &command[1..]);
                let said = said.unwrap_or_else(|error| format!("{error:#}"));
                let _ = writeln!(text, "{name}: {command:?}\n{said}");
            }
            let _ = writeln!(
                text,
                "enter: ip netns exec {}-{name} bash",
                self.lab().name()
            );
        }
        text
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        for (mut tcpdump, path) in self.captures.drain(..) {
            // It may have ended by itself; then there is nothing to kill.
            drop(tcpdump.kill());
            drop(tcpdump.wait());
            if std::thread::panicking() {
                say(&format!("captured: {}", path.display()));
            } else if let Err(error) = std::fs::remove_file(&path) {
                say(&format!("{}: {error}", path.display()));
            }
        }
        if !std::thread::panicking() {
            return;
        }
        say(&self.describe());
        if is_set("KEEP") {
            for (_, node) in std::mem::take(&mut self.nodes) {
                node.leave();
            }
            let lab = self
                .lab
                .take()
                .expect("the lab stays until the trial is dropped");
            let name = lab.name().to_owned();
            let kept = lab.keep();
            say(&format!(
                "lab {name} is kept, its servers are not: lab serve {name} ({kept:?})"
            ));
        }
    }
}

impl Load {
    /// Kept connections, each asking again and again. They are open when this returns.
    pub fn kept(lab: &Lab, from: Site, target: SocketAddr, connections: u32) -> Result<Self> {
        let mut load = Self {
            stop: Arc::default(),
            threads: Vec::new(),
        };
        for number in 0..connections {
            let mut connection = lab
                .at(from)
                .run(|| Connection::open(target, KEPT_PATIENCE))
                .context("open")?;
            connection
                .echo(100, u64::from(number))
                .context("the first answer")?;
            let stop = Arc::clone(&load.stop);
            load.threads.push(lab.at(from).spawn("kept", move || {
                let mut tally = Tally::default();
                for seed in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    let answer = connection.echo(100, seed);
                    let lost = answer.is_err();
                    tally.add(answer);
                    if lost {
                        break;
                    }
                    sleep(PACE);
                }
                tally
            })?);
        }
        Ok(load)
    }

    /// New connections or datagrams, one after the other.
    pub fn fresh(lab: &Lab, from: Site, target: SocketAddr, protocol: Protocol) -> Result<Self> {
        let stop = Arc::<AtomicBool>::default();
        let asking = Asking {
            protocol,
            target,
            patience: FRESH_PATIENCE,
            longest: 500,
        };
        let stopped = Arc::clone(&stop);
        let thread = lab.at(from).spawn("fresh", move || {
            let mut tally = Tally::default();
            for number in 0.. {
                if stopped.load(Ordering::Relaxed) {
                    break;
                }
                tally.add(ask_once(&asking, number));
                sleep(PACE);
            }
            tally
        })?;
        Ok(Self {
            stop,
            threads: vec![thread],
        })
    }

    /// Stops and counts.
    #[must_use]
    pub fn finish(self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut tally = Tally::default();
        for thread in self.threads {
            tally.merge(thread.join().expect("a client does not panic"));
        }
        tally
    }
}

/// The settings of the tests: the binary under test, with `workers`.
#[must_use]
pub fn settings(binary: &str, workers: u32) -> Settings {
    let binary = std::env::var_os("SLUICE_BIN").map_or_else(|| binary.into(), PathBuf::from);
    Settings {
        workers: Some(workers),
        ..Settings::new(binary)
    }
}

/// Tries until it succeeds; after the deadline it fails with the last reason.
pub fn eventually<T>(deadline: Duration, mut attempt: impl FnMut() -> Result<T>) -> T {
    let start = Instant::now();
    loop {
        match attempt() {
            Ok(value) => return value,
            Err(error) if start.elapsed() > deadline => panic!("after {deadline:?}: {error:#}"),
            Err(_) => sleep(POLL),
        }
    }
}

/// Fails unless all was answered, and rightly.
pub fn ensure_all_right(tally: &Tally) -> Result<()> {
    let Tally {
        requests,
        answered,
        wrong,
        failure,
        ..
    } = tally;
    if *requests == 0 || answered != requests || *wrong > 0 {
        bail!("{answered} of {requests} answered, {wrong} wrong: {failure:?}");
    }
    Ok(())
}

/// Whether an environment variable says `1`.
fn is_set(name: &str) -> bool {
    std::env::var_os(name).is_some_and(|value| value == "1")
}

/// One lab at a time, over all test processes of the machine.
fn take_turn() -> Result<File> {
    let file = File::create(std::env::temp_dir().join("sluice-lab.lock"))?;
    flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

/// Prints a line past the capture of the test harness.
pub fn say(text: &str) {
    // Nobody reads it: nothing is lost.
    drop(writeln!(std::io::stderr().lock(), "{text}"));
}

const POLL: Duration = Duration::from_millis(20);
const PACE: Duration = Duration::from_millis(5);
const FRESH_PATIENCE: Duration = Duration::from_secs(1);
const KEPT_PATIENCE: Duration = Duration::from_secs(15);
