//! etcd and the API server in a network namespace of their own, a node's namespace beside it, both removed with the value.
//!
//! ```text
//! <name>-api  192.168.77.1, fd77::1  ---- veth ----  192.168.77.10, fd77::10  <name>-n1
//! ```
//!
//! The node's namespace has the addresses that the Node object lists and two more, and no rule of any packet filter.

use std::fs::{self, File};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use lab::Namespace;
use lab::namespace::ip_batch;
use lab::reaper::Reaper;
use rustix::process::{Pid, Signal, kill_process};

use crate::api::{Api, Identity};
use crate::authority::Authority;
use crate::programs::Programs;

/// A running control plane. Dropping it ends its processes and removes its namespaces and files.
#[derive(Debug)]
pub struct ControlPlane {
    server: Option<Child>,
    store: Child,
    programs: Programs,
    authority: Authority,
    api: Arc<Namespace>,
    node: Arc<Namespace>,
    dir: PathBuf,
    _reaper: Reaper,
}

impl ControlPlane {
    /// Starts it; the API server is ready when this returns.
    pub fn start(programs: &Programs) -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the cluster needs root"
        );
        let name = format!("slc{}", std::process::id());
        let dir = std::env::temp_dir().join(&name);
        let reaper = Reaper::start(&name, &dir)?;
        fs::create_dir_all(&dir).with_context(|| format!("make {}", dir.display()))?;
        lay_out(&name)?;
        let api = Arc::new(Namespace::open(&format!("{name}-api"))?);
        let node = Arc::new(Namespace::open(&format!("{name}-n1"))?);
        let authority = Authority::new(&dir, &[SERVER.ip(), IpAddr::V4(Ipv4Addr::LOCALHOST)])?;
        fs::write(dir.join("tokens.csv"), TOKENS)?;
        let store = start_store(&programs.etcd, &api, &dir)?;
        let mut plane = Self {
            server: None,
            store,
            programs: programs.clone(),
            authority,
            api,
            node,
            dir,
            _reaper: reaper,
        };
        plane.start_server()?;
        Ok(plane)
    }

    /// Starts the API server and waits until it is ready.
    pub fn start_server(&mut self) -> Result<Duration> {
        let start = Instant::now();
        self.server = Some(self.spawn_server()?);
        let mut client = self.client(Identity::Administrator)?;
        loop {
            if client
                .send("GET", "/readyz", None)
                .is_ok_and(|answer| answer.status == 200)
            {
                return Ok(start.elapsed());
            }
            let server = self
                .server
                .as_mut()
                .context("the server was just started")?;
            if let Some(status) = server.try_wait()? {
                bail!(
                    "kube-apiserver ended: {status}\n{}",
                    tail(&self.dir.join("apiserver.log"))
                );
            }
            ensure!(
                start.elapsed() < PATIENCE,
                "kube-apiserver is not ready\n{}",
                tail(&self.dir.join("apiserver.log"))
            );
            sleep(POLL);
        }
    }

    /// Ends the API server as a crash would.
    pub fn kill_server(&mut self) -> Result<()> {
        if let Some(mut server) = self.server.take() {
            kill_process(Pid::from_child(&server), Signal::KILL)?;
            server.wait()?;
        }
        Ok(())
    }

    /// A client in the API server's namespace.
    pub fn client(&self, identity: Identity) -> Result<Api> {
        Api::new(Arc::clone(&self.api), SERVER, &self.authority, identity)
    }

    /// Gives another namespace a link to the API server.
    pub fn join(&self, other: &str) -> Result<()> {
        let own = self.api.name();
        ip_batch(
            None,
            &format!("link add lab0 netns {own} type veth peer name api0 netns {other}\n"),
        )?;
        self.api
            .ip("link set lab0 up\naddr add 192.168.78.1/24 dev lab0\n")?;
        ip_batch(
            Some(other),
            &format!(
                "link set api0 up\naddr add 192.168.78.2/24 dev api0\nroute add {}/32 via 192.168.78.1\n",
                SERVER.ip()
            ),
        )
    }

    /// The authority's certificate, for clients.
    #[must_use]
    pub fn certificate(&self) -> &Path {
        &self.authority.certificate
    }

    /// The namespace of node n1.
    #[must_use]
    pub fn node(&self) -> &Namespace {
        &self.node
    }

    /// A folder for files of the test.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The programs that it runs.
    #[must_use]
    pub fn programs(&self) -> &Programs {
        &self.programs
    }

    /// A kubeconfig for the bearer of a token.
    #[must_use]
    pub fn kubeconfig(&self, token: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\nclusters:\n- name: test\n  cluster:\n    server: https://{SERVER}\n    \
             certificate-authority: {}\ncontexts:\n- name: test\n  context: {{cluster: test, user: test}}\n\
             current-context: test\nusers:\n- name: test\n  user: {{token: \"{token}\"}}\n",
            self.authority.certificate.display()
        )
    }

    fn spawn_server(&self) -> Result<Child> {
        let file = |path: &Path| path.display().to_string();
        let authority = &self.authority;
        let mut command = self.api.command(&self.programs.kube_apiserver);
        command
            .arg(format!("--etcd-servers=http://{STORE}"))
            .arg(format!("--bind-address={}", SERVER.ip()))
            .arg(format!("--advertise-address={}", SERVER.ip()))
            .arg(format!("--secure-port={}", SERVER.port()))
            .arg("--service-cluster-ip-range=10.96.0.0/12,fd00:96::/108")
            .arg(format!(
                "--tls-cert-file={}",
                file(&authority.server_certificate)
            ))
            .arg(format!(
                "--tls-private-key-file={}",
                file(&authority.server_key)
            ))
            .arg(format!("--client-ca-file={}", file(&authority.certificate)))
            .arg(format!("--cert-dir={}", file(&self.dir)))
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!(
                "--service-account-key-file={}",
                file(&authority.account_public_key)
            ))
            .arg(format!(
                "--service-account-signing-key-file={}",
                file(&authority.account_key)
            ))
            .arg(format!(
                "--token-auth-file={}",
                file(&self.dir.join("tokens.csv"))
            ))
            .args([
                "--authorization-mode=RBAC",
                "--disable-admission-plugins=ServiceAccount",
            ])
            .args([
                "--anonymous-auth=false",
                "--profiling=false",
                "--enable-priority-and-fairness=false",
            ]);
        log_to(&mut command, &self.dir.join("apiserver.log"))?;
        command.spawn().context("start kube-apiserver")
    }
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        for child in self.server.iter_mut().chain([&mut self.store]) {
            // One that ended by itself needs no end.
            drop(child.kill());
            drop(child.wait());
        }
    }
}

/// Sends a command's output to a file and closes its input.
pub fn log_to(command: &mut Command, path: &Path) -> Result<()> {
    let log = File::options().create(true).append(true).open(path)?;
    command
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log);
    Ok(())
}

/// The last lines of a file.
#[must_use]
pub fn tail(path: &Path) -> String {
    let text = fs::read_to_string(path).unwrap_or_default();
    let lines: Vec<String> = text
        .lines()
        .map(|line| line.chars().take(300).collect())
        .collect();
    lines[lines.len().saturating_sub(20)..].join("\n")
}

fn start_store(etcd: &Path, space: &Namespace, dir: &Path) -> Result<Child> {
    let mut command = space.command(etcd);
    command
        .arg(format!("--data-dir={}", dir.join("etcd").display()))
        .arg(format!("--listen-client-urls=http://{STORE}"))
        .arg(format!("--advertise-client-urls=http://{STORE}"))
        .args([
            "--listen-peer-urls=http://127.0.0.1:2380",
            "--initial-advertise-peer-urls=http://127.0.0.1:2380",
        ])
        .args([
            "--initial-cluster=default=http://127.0.0.1:2380",
            "--unsafe-no-fsync",
            "--log-level=error",
        ]);
    log_to(&mut command, &dir.join("etcd.log"))?;
    command.spawn().context("start etcd")
}

fn lay_out(name: &str) -> Result<()> {
    let (api, node) = (format!("{name}-api"), format!("{name}-n1"));
    ip_batch(None, &format!("netns add {api}\nnetns add {node}\n"))?;
    ip_batch(
        None,
        &format!("link add up0 netns {api} type veth peer name up0 netns {node}\n"),
    )?;
    ip_batch(
        Some(&api),
        "link set lo up\nlink set up0 up\naddr add 192.168.77.1/24 dev up0\naddr add fd77::1/64 dev up0 nodad\n",
    )?;
    ip_batch(
        Some(&node),
        "link set lo up\nlink set up0 up\naddr add 192.168.77.10/24 dev up0\naddr add 198.51.100.10/24 dev up0\n\
         addr add fd77::10/64 dev up0 nodad\naddr add 2001:db8:51::10/64 dev up0 nodad\n\
         route add default via 192.168.77.1\nroute add default via fd77::1\n",
    )
}

/// Bearer tokens: token, user, user id, groups.
const TOKENS: &str = "kube-proxy-token,system:kube-proxy,2\n";
/// The token of the user that RBAC's own bindings know as kube-proxy.
pub const KUBE_PROXY_TOKEN: &str = "kube-proxy-token";
/// Where the API server answers.
pub const SERVER: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::new(192, 168, 77, 1)), 6443);
const STORE: &str = "127.0.0.1:2379";
const PATIENCE: Duration = Duration::from_secs(120);
const POLL: Duration = Duration::from_millis(50);
