//! State as JSON, for the client commands and for curious people on the node. Loopback only.

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Json;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use super::Sources;
use crate::report;

/// Refuses peers that are not this node.
pub(super) async fn loopback_only(
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
    next: Next,
) -> Response {
    if peer.ip().to_canonical().is_loopback() {
        return next.run(request).await;
    }
    let sentence = "this shows the node's Services and clients, so it answers loopback only: ask \
                    for it on the node itself, at 127.0.0.1 or ::1\n";
    (StatusCode::FORBIDDEN, sentence).into_response()
}

pub(super) async fn status(State(sources): State<Arc<Sources>>) -> Answer<report::Status> {
    ask(move || (sources.status)()).await
}

pub(super) async fn services(State(sources): State<Arc<Sources>>) -> Answer<report::ServiceStates> {
    ask(move || (sources.services)()).await
}

pub(super) async fn flows(State(sources): State<Arc<Sources>>) -> Answer<report::FlowList> {
    ask(move || (sources.flows)()).await
}

/// Everything in one object.
pub(super) async fn state(State(sources): State<Arc<Sources>>) -> Answer<Value> {
    ask(move || {
        let status = (sources.status)();
        json!({
            "services": (sources.services)().services,
            "flows": (sources.flows)().flows,
            "workers": status.workers,
            "mirror": status.mirror,
            "engine": status.engine,
            "epoch": status.epoch,
        })
    })
    .await
}

type Answer<T> = Result<Json<T>, (StatusCode, &'static str)>;

/// Calls a source on a thread that may wait, since the server has only one of its own.
async fn ask<T: Send + 'static>(source: impl FnOnce() -> T + Send + 'static) -> Answer<T> {
    let answer = tokio::task::spawn_blocking(source).await;
    answer.map(Json).map_err(|_| {
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            "the state cannot be read\n",
        )
    })
}
