//! The admin server: metrics, health, state and the page, on a thread of its own, so that neither
//! traffic nor the control thread waits for a reader.
//!
//! It holds nothing: each answer is made from [`Sources`] when it is asked for. `/debug/*` and `/`
//! show Services and clients of the node, so they answer loopback peers only, whatever the address
//! the server is bound to.

mod debug;
mod health;
mod metrics;
mod page;

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Value, json};
use thiserror::Error;
use tokio::sync::watch;

use crate::report;

pub(crate) use health::Readiness;

/// Where the answers come from. The functions may take a moment: they are called on threads that
/// may wait.
pub(crate) struct Sources {
    pub(crate) status: Box<dyn Fn() -> report::Status + Send + Sync>,
    pub(crate) services: Box<dyn Fn() -> report::ServiceStates + Send + Sync>,
    pub(crate) flows: Box<dyn Fn() -> report::FlowList + Send + Sync>,
    pub(crate) ready: Box<dyn Fn() -> Readiness + Send + Sync>,
    pub(crate) metrics: PrometheusHandle,
    /// What `/configz` shows.
    pub(crate) config: Value,
    /// What `/proxyMode` says: the mirror that serves.
    pub(crate) proxy_mode: &'static str,
}

/// The running server; dropping it stops it.
pub(crate) struct AdminHandle {
    address: SocketAddr,
    healthz_address: Option<SocketAddr>,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

/// Why the server does not run.
#[derive(Debug, Error)]
pub(crate) enum AdminError {
    #[error(
        "cannot listen on {address} ({key}): {error}; another kube-proxy or sluice may run on this \
         node, stop it or set another address"
    )]
    Listen {
        address: SocketAddr,
        key: &'static str,
        error: io::Error,
    },
    #[error("cannot start the admin server: {0}")]
    Start(io::Error),
}

/// Listens on the admin address and, if given, on the health address of kube-proxy, then serves
/// both until the handle is stopped.
pub(crate) fn start(
    address: SocketAddr,
    healthz_address: Option<SocketAddr>,
    sources: Sources,
) -> Result<AdminHandle, AdminError> {
    let listener = listen(address, "metricsBindAddress")?;
    let health = healthz_address
        .map(|at| listen(at, "healthzBindAddress"))
        .transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(AdminError::Start)?;
    let (stop, stopped) = watch::channel(false);
    let bound = |listener: &TcpListener| listener.local_addr().map_err(AdminError::Start);
    let (address, healthz_address) = (bound(&listener)?, health.as_ref().map(bound).transpose()?);
    metrics::describe();
    let sources = Arc::new(sources);
    let serve = move || {
        runtime.block_on(serve_all(listener, health, sources, stopped));
        runtime.shutdown_timeout(STOP_TIME);
    };
    let thread = std::thread::Builder::new()
        .name("admin".to_owned())
        .spawn(serve);
    let thread = Some(thread.map_err(AdminError::Start)?);
    Ok(AdminHandle {
        address,
        healthz_address,
        stop,
        thread,
    })
}

impl AdminHandle {
    /// Where it listens; tells the port where port 0 was asked for.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where it listens for kube-proxy's health checks.
    pub(crate) fn healthz_address(&self) -> Option<SocketAddr> {
        self.healthz_address
    }

    /// Finishes the answers under way, at most a second, and ends the thread.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the admin server ended with a panic");
        }
    }
}

impl Drop for AdminHandle {
    fn drop(&mut self) {
        self.end();
    }
}

fn listen(address: SocketAddr, key: &'static str) -> Result<TcpListener, AdminError> {
    let bound = TcpListener::bind(address).and_then(|listener| {
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    bound.map_err(|error| AdminError::Listen {
        address,
        key,
        error,
    })
}

async fn serve_all(
    listener: TcpListener,
    health: Option<TcpListener>,
    sources: Arc<Sources>,
    mut stopped: watch::Receiver<bool>,
) {
    let upkeep = tokio::spawn(upkeep(sources.metrics.clone()));
    let admin = serve(listener, router(Arc::clone(&sources)), stopped.clone());
    let health = health.map(|health| serve(health, health::router(sources), stopped.clone()));
    let both = async {
        match health {
            Some(health) => drop(tokio::join!(admin, health)),
            None => admin.await,
        }
    };
    // The server waits for its connections without an end; a slow reader must not hold up the stop.
    let deadline = async {
        let _sender_gone = stopped.wait_for(|stopped| *stopped).await;
        tokio::time::sleep(STOP_TIME).await;
    };
    tokio::select! {
        () = both => {}
        () = deadline => {}
    }
    upkeep.abort();
}

async fn serve(listener: TcpListener, router: Router, mut stopped: watch::Receiver<bool>) {
    let service = router.into_make_service_with_connect_info::<SocketAddr>();
    let served = match tokio::net::TcpListener::from_std(listener) {
        Ok(listener) => {
            let until_stopped = async move {
                let _sender_gone = stopped.wait_for(|stopped| *stopped).await;
            };
            axum::serve(listener, service)
                .with_graceful_shutdown(until_stopped)
                .await
        }
        Err(error) => Err(error),
    };
    if let Err(error) = served {
        tracing::error!(%error, "the admin server ended");
    }
}

/// The recorder asks to be called now and then, so that histograms do not grow.
async fn upkeep(metrics: PrometheusHandle) {
    let mut period = tokio::time::interval(UPKEEP_PERIOD);
    loop {
        period.tick().await;
        metrics.run_upkeep();
    }
}

fn router(sources: Arc<Sources>) -> Router {
    let local = Router::new()
        .route("/", get(page::page))
        .route("/debug/state", get(debug::state))
        .route("/debug/status", get(debug::status))
        .route("/debug/services", get(debug::services))
        .route("/debug/flows", get(debug::flows))
        .layer(axum::middleware::from_fn(debug::loopback_only));
    Router::new()
        .route("/metrics", get(metrics::metrics))
        .route("/healthz", get(|| async { "ok" }))
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(health::readyz))
        .route("/configz", get(configz))
        .route("/proxyMode", get(proxy_mode))
        .merge(local)
        .with_state(sources)
}

async fn configz(State(sources): State<Arc<Sources>>) -> axum::Json<Value> {
    axum::Json(json!({ "sluice": sources.config }))
}

async fn proxy_mode(State(sources): State<Arc<Sources>>) -> &'static str {
    sources.proxy_mode
}

const STOP_TIME: Duration = Duration::from_secs(1);
const UPKEEP_PERIOD: Duration = Duration::from_secs(5);

#[cfg(test)]
mod tests;
