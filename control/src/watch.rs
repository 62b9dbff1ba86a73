//! Kubernetes watches to events.
//!
//! Services, EndpointSlices and this node's own Node, selected as kube-proxy selects them. Lists are
//! streamed where the server can do that. After a cut a watch goes on where it ended; where the
//! server has forgotten that place, everything is listed again, and `Event::Listed` makes what has
//! gone in between go here too. An API server that is away changes nothing: there is no event then.
//!
//! The API server is reached by the address that was configured. One that is itself a Service's
//! would depend on what we serve, and is refused. Nothing is decided here about Services.

use std::fmt::Debug;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::{self, BoxStream, ReadyChunks, SelectAll};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use kube::config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError};
use kube::runtime::utils::Backoff;
use kube::runtime::watcher::{self, DefaultBackoff, InitialListStrategy, watcher};
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tokio::time::{Instant, sleep, timeout_at};

use crate::address::parse_ip;
use crate::controller::Event;
use crate::node::Node;
use crate::store::{Kind, Object};

/// How the API server is reached, and as which node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ClusterConfig {
    /// The kubeconfig file; without one, the service account of the pod that we run in.
    pub kubeconfig: Option<PathBuf>,
    /// The name of this node's Node object.
    pub node_name: String,
    /// How long a watch lasts before it is asked for again. A connection over which nothing comes
    /// any more is noticed `MARGIN` after that at the latest.
    pub watch_time: Duration,
}

/// Why the API server cannot be watched at all.
#[derive(Debug, thiserror::Error)]
pub enum WatchError {
    /// The kubeconfig file is not there or not right.
    #[error("clientConnection.kubeconfig: {0}")]
    Kubeconfig(#[from] KubeconfigError),
    /// There is neither a kubeconfig file nor a service account.
    #[error(
        "no API server is known: {0}; set clientConnection.kubeconfig, or run in a pod with a service account"
    )]
    ServiceAccount(#[from] InClusterError),
    /// The certificates, the key or the address cannot be used.
    #[error("no client for the API server can be made: {0}")]
    Client(#[from] kube::Error),
    /// The address is one that only a service proxy makes reachable.
    #[error(
        "the API server's address {0} is a Service's, which nothing serves before sluice has reached the API server; \
         set `server` in the kubeconfig (in a pod without one: KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT) \
         to an address of the API server itself or of a load balancer before it"
    )]
    ServiceAddress(String),
    /// The Node cannot be had.
    #[error(
        "the Node {name} cannot be read: {reason}; set hostnameOverride if this node has another name, \
         or name the device towards the wire with --uplink"
    )]
    Node {
        /// Its name.
        name: String,
        /// What the API server said last.
        reason: String,
    },
    /// No runtime.
    #[error("the API server's client: {0}")]
    Runtime(#[from] std::io::Error),
}

impl ClusterConfig {
    /// With the usual times.
    #[must_use]
    pub fn new(kubeconfig: Option<PathBuf>, node_name: &str) -> Self {
        Self {
            kubeconfig,
            node_name: node_name.into(),
            watch_time: WATCH_TIME,
        }
    }

    /// Checks all that can be checked without the API server's help.
    ///
    /// # Errors
    /// What must be set otherwise.
    pub fn check(&self) -> Result<(), WatchError> {
        block_on(async { self.client().await.map(drop) })
    }

    /// The addresses that our Node object lists, internal ones first. Waits for API server and Node,
    /// but not for ever.
    ///
    /// # Errors
    /// There is no such Node, or nobody to ask.
    pub fn node_addresses(&self) -> Result<Vec<IpAddr>, WatchError> {
        block_on(async {
            let (client, _) = self.client().await?;
            let nodes: Api<core::Node> = Api::all(client);
            let mut delays = DefaultBackoff::default();
            let end = Instant::now() + NODE_PATIENCE;
            loop {
                let reason = match timeout_at(end, nodes.get(&self.node_name)).await {
                    Ok(Ok(node)) => match Node::from_api(&node) {
                        Ok(node) if !node.addresses.is_empty() => return Ok(node.addresses),
                        Ok(_) => "it lists no address".to_owned(),
                        Err(error) => error.to_string(),
                    },
                    Ok(Err(error)) => error.to_string(),
                    Err(_) => "no answer".to_owned(),
                };
                let delay = delays.next().unwrap_or(LONGEST);
                if Instant::now() + delay >= end {
                    return Err(WatchError::Node {
                        name: self.node_name.clone(),
                        reason,
                    });
                }
                tracing::warn!(node = self.node_name, "the Node cannot be read: {reason}");
                sleep(delay).await;
            }
        })
    }

    /// A client, and the host that it talks to.
    async fn client(&self) -> Result<(Client, String), WatchError> {
        let mut access = match &self.kubeconfig {
            Some(path) => {
                let file = Kubeconfig::read_from(path)?;
                kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?
            }
            None => kube::Config::incluster()?,
        };
        let host = access.cluster_url.host().unwrap_or_default();
        let host = host.trim_matches(['[', ']']).to_owned();
        // The kubelet tells each pod the address of the Service `kubernetes` by this variable too,
        // and nobody has a reason to change this one.
        let own = std::env::var("KUBERNETES_PORT_443_TCP_ADDR").ok();
        if is_service_name(&host) || own.is_some_and(|own| own == host) {
            return Err(WatchError::ServiceAddress(host));
        }
        access.connect_timeout = Some(CONNECT);
        access.read_timeout = Some(self.watch_time + MARGIN);
        access.reset_reader_on_write = true;
        Ok((Client::try_from(access)?, host))
    }
}

/// The watches of one node.
pub struct Watches {
    events: ReadyChunks<SelectAll<BoxStream<'static, Event>>>,
    host: String,
    client: Client,
}

impl Watches {
    /// Makes the client. Must run inside a tokio runtime, whose tasks hold the connections.
    ///
    /// # Errors
    /// See `ClusterConfig::check`.
    pub async fn new(config: &ClusterConfig) -> Result<Self, WatchError> {
        let (client, host) = config.client().await?;
        let seconds = u32::try_from(config.watch_time.as_secs()).unwrap_or(u32::MAX);
        let all = watcher::Config::default()
            .streaming_lists()
            .timeout(seconds);
        let ours = all.clone().labels(OURS);
        let own = all.fields(&format!("metadata.name={}", config.node_name));
        let services = |object: core::Service| Object::Service(Box::new(object));
        let slices = |object: discovery::EndpointSlice| Object::EndpointSlice(Box::new(object));
        let nodes = |object: core::Node| Object::Node(Box::new(object));
        let events = stream::select_all([
            follow(&client, own, Kind::Node, nodes),
            follow(&client, ours.clone(), Kind::Service, services),
            follow(&client, ours, Kind::EndpointSlice, slices),
        ]);
        Ok(Self {
            events: events.ready_chunks(BATCH),
            host,
            client,
        })
    }

    /// The client, for what is written.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// What happened since the last call; waits until something has. Nothing is lost if the future
    /// is dropped before it is ready.
    pub async fn next(&mut self) -> Vec<Event> {
        // The streams never end.
        self.events.next().await.unwrap_or_default()
    }

    /// Waits until every kind was listed.
    ///
    /// # Errors
    /// The API server's address turns out to be a Service's.
    pub async fn first(&mut self) -> Result<Vec<Event>, WatchError> {
        let mut missing = vec![Kind::Node, Kind::Service, Kind::EndpointSlice];
        let mut first = Vec::new();
        while !missing.is_empty() {
            for event in self.next().await {
                if let Event::Listed(kind, objects) = &event {
                    missing.retain(|wanted| wanted != kind);
                    self.check_address(objects)?;
                }
                first.push(event);
            }
        }
        Ok(first)
    }

    fn check_address(&self, objects: &[Object]) -> Result<(), WatchError> {
        let Some(address) = parse_ip(&self.host) else {
            return Ok(());
        };
        let is_it = |object: &Object| match object {
            Object::Service(service) => {
                let spec = service.spec.as_ref();
                let ips = spec.and_then(|spec| spec.cluster_ips.as_ref());
                let mut ips = ips.into_iter().flatten();
                ips.any(|ip| parse_ip(ip) == Some(address))
            }
            _ => false,
        };
        if objects.iter().any(is_it) {
            return Err(WatchError::ServiceAddress(self.host.clone()));
        }
        Ok(())
    }
}

/// One kind, as a stream that never ends.
fn follow<K: Watched>(
    client: &Client,
    config: watcher::Config,
    kind: Kind,
    wrap: fn(K) -> Object,
) -> BoxStream<'static, Event> {
    let api = Api::all(client.clone());
    let watch = Watch {
        stream: watcher(api.clone(), config.clone()).boxed(),
        api,
        config,
        kind,
        wrap,
        listed: Vec::new(),
        delays: DefaultBackoff::default(),
        complaint: None,
    };
    stream::unfold(watch, |mut watch| async {
        let event = watch.next().await;
        Some((event, watch))
    })
    .boxed()
}

/// What can be watched.
trait Watched: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static {}

impl<K> Watched for K where
    K: Resource<DynamicType = ()> + Clone + Debug + DeserializeOwned + Send + 'static
{
}

struct Watch<K: Watched> {
    api: Api<K>,
    config: watcher::Config,
    kind: Kind,
    wrap: fn(K) -> Object,
    stream: BoxStream<'static, watcher::Result<watcher::Event<K>>>,
    /// What a list holds that has not ended yet.
    listed: Vec<Object>,
    delays: DefaultBackoff,
    /// What was written into the log last, while it lasts.
    complaint: Option<String>,
}

impl<K: Watched> Watch<K> {
    async fn next(&mut self) -> Event {
        loop {
            match self.stream.next().await {
                Some(Ok(event)) => {
                    if let Some(event) = self.take(event) {
                        self.content();
                        return event;
                    }
                }
                Some(Err(error)) => {
                    if let Some(delay) = self.fail(&error) {
                        sleep(delay).await;
                    }
                }
                None => self.start_again(),
            }
        }
    }

    fn take(&mut self, event: watcher::Event<K>) -> Option<Event> {
        match event {
            watcher::Event::Init => self.listed.clear(),
            watcher::Event::InitApply(object) => self.listed.push((self.wrap)(object)),
            watcher::Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                return Some(Event::Listed(self.kind, listed));
            }
            watcher::Event::Apply(object) => {
                return Some(Event::Applied(Arc::new((self.wrap)(object)), None));
            }
            watcher::Event::Delete(object) => {
                return Some(Event::Deleted((self.wrap)(object).key()));
            }
        }
        None
    }

    /// Decides how it goes on, and after which delay.
    fn fail(&mut self, error: &watcher::Error) -> Option<Duration> {
        let code = status(error).unwrap_or_default();
        let is_streaming = self.config.initial_list_strategy == InitialListStrategy::StreamingList;
        if is_streaming && REFUSED.contains(&code) {
            tracing::info!(kind = %self.kind, "the API server streams no lists: {error}");
            self.config.initial_list_strategy = InitialListStrategy::ListWatch;
            self.start_again();
            return None;
        }
        if code == GONE {
            self.start_again();
        } else {
            self.complain(error.to_string());
        }
        Some(self.delays.next().unwrap_or(LONGEST))
    }

    fn start_again(&mut self) {
        self.stream = watcher(self.api.clone(), self.config.clone()).boxed();
    }

    /// An outage of hours is one line of the log, not one for each attempt.
    fn complain(&mut self, reason: String) {
        if self.complaint.as_ref() == Some(&reason) {
            tracing::debug!(kind = %self.kind, "not watched: {reason}");
        } else {
            tracing::warn!(kind = %self.kind, "not watched, what is served stays: {reason}");
            self.complaint = Some(reason);
        }
    }

    fn content(&mut self) {
        self.delays.reset();
        if self.complaint.take().is_some() {
            tracing::info!(kind = %self.kind, "watched again");
        }
    }
}

/// The HTTP status that an error carries.
fn status(error: &watcher::Error) -> Option<u16> {
    let status = match error {
        watcher::Error::WatchError(status) => status,
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status))
        | watcher::Error::WatchFailed(kube::Error::Api(status)) => status,
        _ => return None,
    };
    Some(status.code)
}

/// Whether a host is named as Services are in the cluster's DNS.
fn is_service_name(host: &str) -> bool {
    let host = host.trim_end_matches('.').to_ascii_lowercase();
    let mut labels = host.split('.');
    host == "kubernetes" || host == "kubernetes.default" || labels.nth(2) == Some("svc")
}

fn block_on<T>(future: impl Future<Output = Result<T, WatchError>>) -> Result<T, WatchError> {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?
        .block_on(future)
}

/// What kube-proxy's watches leave out: Services of other proxies, and headless ones.
const OURS: &str = "!service.kubernetes.io/service-proxy-name,!service.kubernetes.io/headless";
/// The server does not know where the watch was to go on.
const GONE: u16 = 410;
/// How servers without streaming lists answer a request for one.
const REFUSED: [u16; 2] = [400, 422];
/// How many events are taken in at once.
const BATCH: usize = 1024;
const WATCH_TIME: Duration = Duration::from_secs(30);
/// What a server may be late with the end of a watch.
pub const MARGIN: Duration = Duration::from_secs(10);
const CONNECT: Duration = Duration::from_secs(10);
const NODE_PATIENCE: Duration = Duration::from_secs(60);
const LONGEST: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    fn refusal(server: &str) -> Option<String> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let path = folder.path().join("kubeconfig");
        let text = format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"{server}\"}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\ncurrent-context: c\n\
             users: [{{name: u, user: {{}}}}]\n"
        );
        std::fs::write(&path, text).expect("a kubeconfig");
        let checked = ClusterConfig::new(Some(path), "n1").check();
        checked.err().map(|error| error.to_string())
    }

    #[test]
    fn a_name_of_a_service_is_refused_with_what_to_set() {
        for name in [
            "https://kubernetes.default.svc",
            "https://kubernetes.default.svc.cluster.local:443",
            "https://kubernetes",
        ] {
            let reason = refusal(name).expect("a refusal");
            assert!(
                reason.contains("set `server` in the kubeconfig"),
                "{reason}"
            );
        }
    }

    #[test]
    fn an_address_of_the_api_server_itself_is_taken() {
        for server in [
            "http://192.0.2.1:8080",
            "http://[2001:db8::1]:6443",
            "http://svc.example.com",
        ] {
            assert_eq!(refusal(server), None, "{server}");
        }
    }
}
