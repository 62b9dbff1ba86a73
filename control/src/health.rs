//! What load balancers ask a node on a Service's `healthCheckNodePort`: has it endpoints of its own?
//!
//! Kube-proxy's codes, headers and body. Listens where node ports answer, and only for Services of
//! policy Local that ask for it. Decides nothing: `policy` counted the endpoints.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use axum::response::IntoResponse;
use tokio::sync::oneshot;

use crate::controller::Resolved;
use crate::node::NodePortAddresses;
use crate::service::ServiceKey;

/// The health checks of all Services.
pub struct HealthChecks {
    addresses: NodePortAddresses,
    healthy: Arc<Healthy>,
    open: BTreeMap<(ServiceKey, SocketAddr), Open>,
    /// What could not be listened on, so that it is said once.
    refused: BTreeSet<SocketAddr>,
}

type Healthy = dyn Fn() -> bool + Send + Sync;

/// A socket; it closes with the value.
struct Open {
    check: Arc<Check>,
    _stop: oneshot::Sender<()>,
}

struct Check {
    service: ServiceKey,
    endpoints: AtomicUsize,
    healthy: Arc<Healthy>,
}

impl fmt::Debug for HealthChecks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.open.keys()).finish()
    }
}

impl HealthChecks {
    /// `healthy` tells whether what is resolved is served, too.
    #[must_use]
    pub fn new(
        addresses: NodePortAddresses,
        healthy: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        Self {
            addresses,
            healthy: Arc::new(healthy),
            open: BTreeMap::new(),
            refused: BTreeSet::new(),
        }
    }

    /// Opens and closes what must be. Must run inside a tokio runtime, whose tasks answer. A port
    /// that cannot be opened is tried again with the next change.
    pub fn follow(&mut self, resolved: &Resolved) {
        let own = &resolved.node_addresses;
        let addresses = self.addresses.select(own, &resolved.addresses);
        let addresses: Vec<IpAddr> = addresses.map_or_else(
            || vec![Ipv6Addr::UNSPECIFIED.into()],
            |addresses| addresses.into_iter().collect(),
        );
        let mut wanted = BTreeMap::new();
        for service in resolved.services.values() {
            let Some(check) = service.health_check else {
                continue;
            };
            for &address in &addresses {
                let key = (service.key.clone(), SocketAddr::new(address, check.port));
                wanted.insert(key, check.local_endpoints);
            }
        }
        self.open.retain(|key, _| wanted.contains_key(key));
        for (key, endpoints) in wanted {
            match self.open.get(&key) {
                Some(open) => open.check.endpoints.store(endpoints, Ordering::Relaxed),
                None => self.add(key, endpoints),
            }
        }
    }

    fn add(&mut self, key: (ServiceKey, SocketAddr), endpoints: usize) {
        let (service, address) = &key;
        let check = Arc::new(Check {
            service: service.clone(),
            endpoints: AtomicUsize::new(endpoints),
            healthy: Arc::clone(&self.healthy),
        });
        match listen(*address, Arc::clone(&check)) {
            Ok(stop) => {
                self.refused.remove(address);
                self.open.insert(key, Open { check, _stop: stop });
            }
            Err(error) => {
                if self.refused.insert(*address) {
                    let (namespace, name) = (&service.namespace, &service.name);
                    tracing::warn!(%namespace, %name, %address, %error, "no health check");
                }
            }
        }
    }
}

/// Answers until the sender is dropped.
fn listen(address: SocketAddr, check: Arc<Check>) -> std::io::Result<oneshot::Sender<()>> {
    let listener = TcpListener::bind(address).or_else(|error| {
        // `::` stands for both families; it is not there where IPv6 is off.
        let v4 = SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), address.port());
        if address.ip() == Ipv6Addr::UNSPECIFIED {
            TcpListener::bind(v4)
        } else {
            Err(error)
        }
    })?;
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let router = Router::new().fallback(answer).with_state(check);
    let (stop, stopped) = oneshot::channel::<()>();
    tokio::spawn(async move {
        let stopped = async {
            // Dropping the sender is the signal.
            _ = stopped.await;
        };
        let served = axum::serve(listener, router).with_graceful_shutdown(stopped);
        if let Err(error) = served.await {
            tracing::warn!(%address, %error, "a health check has ended");
        }
    });
    Ok(stop)
}

async fn answer(State(check): State<Arc<Check>>) -> impl IntoResponse {
    let endpoints = check.endpoints.load(Ordering::Relaxed);
    let healthy = (check.healthy)();
    let code = if endpoints > 0 && healthy {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = [
        (header::CONTENT_TYPE, "application/json".to_owned()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (WEIGHT, endpoints.to_string()),
    ];
    let ServiceKey { namespace, name } = &check.service;
    let body = format!(
        "{{\n\t\"service\": {{\n\t\t\"namespace\": \"{namespace}\",\n\t\t\"name\": \"{name}\"\n\t}},\n\
         \t\"localEndpoints\": {endpoints},\n\t\"serviceProxyHealthy\": {healthy}\n}}"
    );
    (code, headers, body)
}

/// By it some load balancers share out what they send.
const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");
