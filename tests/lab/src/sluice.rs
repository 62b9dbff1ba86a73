//! Runs the binary on a node of the lab and asks it what it does.
//!
//! Only its contract is used: command line, admin port, JSON. Its log goes to the lab's folder and is shown when something
//! fails.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::namespace::text;
use crate::plan::Site;
use crate::topology::Lab;

/// How to run it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The binary.
    pub binary: PathBuf,
    /// `sluice.engine.workers`; the binary's own default without.
    pub workers: Option<u32>,
    /// Lines for the block `sluice.engine`, as `key: value`.
    pub engine: Vec<String>,
    /// Flags beside the usual ones.
    pub flags: Vec<String>,
}

/// A running `sluice run`. Dropping it kills it.
#[derive(Debug)]
pub struct Sluice {
    child: Option<Child>,
    node: Site,
    log: PathBuf,
}

impl Settings {
    /// The usual settings for a binary.
    #[must_use]
    pub fn new(binary: PathBuf) -> Self {
        Self {
            binary,
            workers: None,
            engine: Vec::new(),
            flags: Vec::new(),
        }
    }

    fn config(&self) -> String {
        let mut text = String::from(CONFIG);
        for line in &self.engine {
            text.push_str(&format!("    {line}\n"));
        }
        if let Some(workers) = self.workers {
            text.push_str(&format!("    workers: {workers}\n"));
        }
        text
    }
}

impl Sluice {
    /// Starts it on a node; the manifests are those in the lab's folder. It may not be ready yet.
    pub fn start(lab: &Lab, node: Site, settings: &Settings) -> Result<Self> {
        let config = lab.dir().join(format!("{}.config.yaml", node.name()));
        std::fs::write(&config, settings.config())?;
        let log = lab.dir().join(format!("{}.log", node.name()));
        let output = File::options().create(true).append(true).open(&log)?;
        let mut command = lab.at(node).command(&settings.binary);
        command
            .arg("run")
            .arg("--manifests")
            .arg(manifests(lab))
            .args(["--node", node.name()]);
        command.args(["--mode", "none", "--engine", "on", "--admin-address", ADMIN]);
        command
            .arg("--state-dir")
            .arg(state_dir(lab))
            .arg("--config")
            .arg(&config);
        command.args(&settings.flags);
        command
            .stdin(std::process::Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output);
        // A second start on a node must not move what the first is measured from.
        if !ready(lab, node) {
            lab.count(node);
        }
        let child = command
            .spawn()
            .with_context(|| format!("start {command:?}"))?;
        Ok(Self {
            child: Some(child),
            node,
            log,
        })
    }

    /// Waits until `/readyz` answers 200.
    pub fn wait_ready(&mut self, lab: &Lab, patience: Duration) -> Result<Duration> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child_mut().try_wait()? {
                bail!(
                    "sluice on {} ended: {status}\n{}",
                    self.node.name(),
                    self.log_tail()
                );
            }
            if ready(lab, self.node) {
                return Ok(start.elapsed());
            }
            if start.elapsed() > patience {
                let after = patience.as_secs_f32();
                bail!(
                    "sluice on {} is not ready after {after} s\n{}",
                    self.node.name(),
                    self.log_tail()
                );
            }
            sleep(POLL);
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let child = self
            .child
            .as_ref()
            .context("sluice was left or has ended")?;
        let pid = Pid::from_child(child);
        kill_process(pid, signal).with_context(|| format!("signal {pid:?}"))
    }

    /// Waits for its end.
    pub fn wait_end(&mut self, patience: Duration) -> Result<ExitStatus> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child_mut().try_wait()? {
                self.child = None;
                return Ok(status);
            }
            ensure!(
                start.elapsed() < patience,
                "sluice did not end\n{}",
                self.log_tail()
            );
            sleep(POLL);
        }
    }

    /// Ends it with SIGTERM; it has five seconds.
    pub fn stop(mut self) -> Result<()> {
        self.signal(Signal::TERM)?;
        let status = self.wait_end(Duration::from_secs(5))?;
        ensure!(
            status.success(),
            "sluice ended with {status}\n{}",
            self.log_tail()
        );
        Ok(())
    }

    /// Leaves it running.
    pub fn leave(mut self) {
        self.child = None;
    }

    /// The last lines of its log.
    #[must_use]
    pub fn log_tail(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    fn child_mut(&mut self) -> &mut Child {
        self.child
            .as_mut()
            .expect("a child that ended is not asked again")
    }
}

impl Drop for Sluice {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // It may have ended by itself; then there is nothing to kill.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Where a lab's manifests are.
#[must_use]
pub fn manifests(lab: &Lab) -> PathBuf {
    lab.dir().join("manifests")
}

/// Where both nodes keep their state; the binary separates them by network namespace.
#[must_use]
pub fn state_dir(lab: &Lab) -> PathBuf {
    lab.dir().join("state")
}

/// Runs a client command on a node and returns its standard output.
pub fn ask(lab: &Lab, node: Site, binary: &Path, arguments: &[&str]) -> Result<String> {
    text(client(lab, node, binary, arguments))
}

/// Runs a client command with `-o json` on a node.
pub fn ask_json(lab: &Lab, node: Site, binary: &Path, arguments: &[&str]) -> Result<Value> {
    let output = ask(lab, node, binary, &[arguments, &["-o", "json"]].concat())?;
    serde_json::from_str(&output).with_context(|| format!("{arguments:?} printed {output:?}"))
}

/// `sluice cleanup` on a node.
pub fn cleanup(lab: &Lab, node: Site, binary: &Path) -> Result<String> {
    let mut command = lab.at(node).command(binary);
    command
        .arg("cleanup")
        .arg("--state-dir")
        .arg(state_dir(lab));
    text(command)
}

/// Whether `/readyz` says 200.
#[must_use]
pub fn ready(lab: &Lab, node: Site) -> bool {
    lab.at(node)
        .run(|| http_status("/readyz"))
        .is_ok_and(|status| status == 200)
}

fn client(lab: &Lab, node: Site, binary: &Path, arguments: &[&str]) -> Command {
    let mut command = lab.at(node).command(binary);
    command.args(arguments).args(["--admin-address", ADMIN]);
    command
}

fn http_status(path: &str) -> Result<u16> {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN_PORT));
    let mut stream = TcpStream::connect_timeout(&address, POLL * 10)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {ADMIN}\r\nConnection: close\r\n\r\n"
    )?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let status = answer
        .split_whitespace()
        .nth(1)
        .context("an empty answer")?;
    Ok(status.parse()?)
}

const ADMIN: &str = "127.0.0.1:10249";
const ADMIN_PORT: u16 = 10249;
const POLL: Duration = Duration::from_millis(20);

/// Short time-outs: the lab waits until nothing is left.
const CONFIG: &str = "\
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
sluice:
  engine:
    enabled: \"on\"
    timeouts:
      tcpSyn: 5s
      tcpEstablished: 30s
      tcpFin: 5s
      tcpCloseWait: 5s
      tcpTimeWait: 5s
      tcpClose: 2s
      udp: 3s
      udpStream: 5s
";
