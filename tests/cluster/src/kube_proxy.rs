//! kube-proxy in iptables mode on node n1, under a configuration of the test's choice.
//!
//! Its rules are complete for a cluster once they hold that cluster's last Service and slice: watches deliver in order,
//! one family's rules are written at once.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::process::Child;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::Value;

use crate::control_plane::{ControlPlane, KUBE_PROXY_TOKEN, log_to, tail};
use crate::iptables::Rules;

/// A running kube-proxy. Dropping it kills it; its rules stay in the namespace.
#[derive(Debug)]
pub struct KubeProxy {
    child: Child,
    log: PathBuf,
}

impl KubeProxy {
    /// Starts it with the keys of `configuration` beside those that the test needs.
    pub fn start(plane: &ControlPlane, configuration: &str) -> Result<Self> {
        for (tool, family) in [("iptables-restore", "v4"), ("ip6tables-restore", "v6")] {
            let mut clear = plane.node().command(tool);
            clear.arg("-w");
            lab::namespace::feed(clear, "*filter\nCOMMIT\n*nat\nCOMMIT\n*mangle\nCOMMIT\n")
                .with_context(|| format!("clear the rules of {family}"))?;
        }
        let kubeconfig = plane.dir().join("kube-proxy.kubeconfig");
        fs::write(&kubeconfig, plane.kubeconfig(KUBE_PROXY_TOKEN))?;
        let config = plane.dir().join("kube-proxy.yaml");
        let text = format!(
            "{configuration}clientConnection:\n  kubeconfig: {}\nmode: iptables\nhostnameOverride: n1\n\
             conntrack:\n  maxPerCore: 0\n  min: 0\n  tcpEstablishedTimeout: 0s\n  tcpCloseWaitTimeout: 0s\n",
            kubeconfig.display()
        );
        fs::write(&config, text)?;
        let log = plane.dir().join("kube-proxy.log");
        let mut command = plane.node().command(&plane.programs().kube_proxy);
        command
            .arg(format!("--config={}", config.display()))
            .arg("-v=2");
        log_to(&mut command, &log)?;
        let child = command.spawn().context("start kube-proxy")?;
        Ok(Self { child, log })
    }

    /// Waits until the rules of both families mention both addresses and returns them.
    pub fn wait_for(&mut self, plane: &ControlPlane, last: [IpAddr; 2]) -> Result<[Rules; 2]> {
        let start = Instant::now();
        loop {
            let texts = [
                plane.node().output("iptables-save", &[])?,
                plane.node().output("ip6tables-save", &[])?,
            ];
            let there = |(text, ip): (&String, IpAddr)| {
                text.contains(&format!(
                    "--to-destination {}",
                    SocketAddr::new(ip, SENTINEL_PORT)
                ))
            };
            if texts.iter().zip(last).all(there) {
                return Ok([Rules::parse(&texts[0])?, Rules::parse(&texts[1])?]);
            }
            if let Some(status) = self.child.try_wait()? {
                bail!("kube-proxy ended: {status}\n{}", tail(&self.log));
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "kube-proxy has not programmed {last:?}\n{}",
                tail(&self.log)
            );
            sleep(POLL);
        }
    }
}

impl Drop for KubeProxy {
    fn drop(&mut self) {
        // One that ended by itself needs no end.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// What a Service's health check port on the node says about local endpoints.
pub fn local_endpoints(plane: &ControlPlane, address: IpAddr, port: u16) -> Result<u64> {
    let answer = plane.node().run(|| -> Result<String> {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, port), POLL * 50)?;
        stream.set_read_timeout(Some(POLL * 100))?;
        write!(
            stream,
            "GET / HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n"
        )?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })?;
    let (_, body) = answer.split_once("\r\n\r\n").context("no body")?;
    let body: Value =
        serde_json::from_str(body).with_context(|| format!("health check said {body:?}"))?;
    body["localEndpoints"].as_u64().context("no localEndpoints")
}

/// The port of the endpoint that ends each cluster.
pub const SENTINEL_PORT: u16 = 65000;
const PATIENCE: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);
