//! `/metrics`: the status as Prometheus metrics, written at the moment it is asked for, so that
//! nothing counts twice and no worker ever touches the recorder. Metrics that others keep (syncs,
//! requests) stand beside them in the same recorder.

use std::sync::Arc;

use axum::extract::State;
use axum::http::{HeaderName, StatusCode, header};
use metrics::{counter, describe_counter, describe_gauge, gauge};

use super::Sources;
use crate::report::{EngineState, HostPort, Status, Uplink, Worker};

type Answer = Result<([(HeaderName, &'static str); 1], String), (StatusCode, &'static str)>;

pub(super) async fn metrics(State(sources): State<Arc<Sources>>) -> Answer {
    let render = move || {
        publish(&(sources.status)());
        sources.metrics.render()
    };
    let text = tokio::task::spawn_blocking(render).await;
    text.map(|text| ([(header::CONTENT_TYPE, CONTENT_TYPE)], text))
        .map_err(|_| {
            (
                StatusCode::INTERNAL_SERVER_ERROR,
                "the state cannot be read\n",
            )
        })
}

/// Says once what each metric means.
pub(super) fn describe() {
    describe_gauge!("sluice_build_info", "1, with the version as a label");
    describe_gauge!("sluice_ready", "Whether the Services are served");
    describe_gauge!("sluice_epoch", "Number of the state that the engine serves");
    describe_gauge!("sluice_engine_on", "Whether the engine takes packets");
    describe_gauge!(
        "sluice_engine_stale",
        "Whether the engine's heartbeat is too old"
    );
    describe_gauge!(
        "sluice_engine_locked_bytes",
        "Memory that the engine keeps locked"
    );
    describe_gauge!(
        "sluice_mirror_in_sync",
        "Whether the kernel's rules are as they should be"
    );
    describe_gauge!("sluice_flows", "Flows that a worker holds");
    describe_counter!(
        "sluice_worker_received_packets_total",
        "Packets a worker got from devices"
    );
    describe_counter!(
        "sluice_worker_handed_in_packets_total",
        "Packets from other workers"
    );
    describe_counter!(
        "sluice_worker_packets_total",
        "Packets by what became of them"
    );
    describe_counter!(
        "sluice_worker_dropped_packets_total",
        "Dropped packets by reason"
    );
    describe_counter!(
        "sluice_worker_generated_packets_total",
        "Packets the engine made itself"
    );
    describe_counter!(
        "sluice_uplink_received_packets_total",
        "Packets from an uplink's sockets"
    );
    describe_counter!(
        "sluice_uplink_transmitted_packets_total",
        "Packets to an uplink's sockets"
    );
    describe_counter!(
        "sluice_uplink_dropped_packets_total",
        "Packets a socket had no room for"
    );
    describe_counter!(
        "sluice_host_port_received_packets_total",
        "Packets from the host port"
    );
    describe_counter!(
        "sluice_host_port_transmitted_packets_total",
        "Packets to the host port"
    );
    describe_counter!(
        "sluice_host_port_completions_total",
        "io_uring completions taken"
    );
}

/// Writes the status into the recorder.
fn publish(status: &Status) {
    gauge!("sluice_build_info", "version" => status.version.clone()).set(1.0);
    gauge!("sluice_ready").set(flag(status.ready));
    gauge!("sluice_epoch").set(measure(status.epoch));
    gauge!("sluice_engine_on").set(flag(status.engine.state == EngineState::On));
    gauge!("sluice_engine_stale").set(flag(status.engine.state == EngineState::Stale));
    gauge!("sluice_engine_locked_bytes").set(measure(status.engine.locked_bytes));
    let mode = status.mirror.mode.clone();
    gauge!("sluice_mirror_in_sync", "mode" => mode).set(flag(status.mirror.in_sync));
    status.workers.iter().for_each(worker);
    status.uplinks.iter().for_each(uplink);
    host_port(&status.host_port);
}

fn worker(worker: &Worker) {
    let id = worker.id.to_string();
    gauge!("sluice_flows", "worker" => id.clone()).set(measure(worker.flows));
    for (name, count) in [
        ("sluice_worker_received_packets_total", worker.received),
        ("sluice_worker_handed_in_packets_total", worker.handed_in),
        ("sluice_worker_generated_packets_total", worker.generated),
    ] {
        counter!(name, "worker" => id.clone()).absolute(count);
    }
    for (verdict, count) in [
        ("transmitted", worker.transmitted),
        ("punted", worker.punted),
        ("rejected", worker.rejected),
        ("dropped", worker.dropped.values().sum()),
        ("held", worker.held),
        ("handed_out", worker.handed_out),
    ] {
        let labels = [("worker", id.clone()), ("verdict", verdict.to_owned())];
        counter!("sluice_worker_packets_total", &labels).absolute(count);
    }
    for (reason, count) in &worker.dropped {
        let labels = [("worker", id.clone()), ("reason", reason.clone())];
        counter!("sluice_worker_dropped_packets_total", &labels).absolute(*count);
    }
}

fn uplink(uplink: &Uplink) {
    for (name, count) in [
        ("sluice_uplink_received_packets_total", uplink.rx),
        ("sluice_uplink_transmitted_packets_total", uplink.tx),
        ("sluice_uplink_dropped_packets_total", uplink.rx_dropped),
    ] {
        counter!(name, "device" => uplink.name.clone()).absolute(count);
    }
}

fn host_port(port: &HostPort) {
    for (name, count) in [
        ("sluice_host_port_received_packets_total", port.received),
        (
            "sluice_host_port_transmitted_packets_total",
            port.transmitted,
        ),
        ("sluice_host_port_completions_total", port.completions),
    ] {
        counter!(name).absolute(count);
    }
}

fn flag(holds: bool) -> f64 {
    if holds { 1.0 } else { 0.0 }
}

/// A count as a gauge holds it; beyond 2^53 it loses its last digits.
#[expect(
    clippy::cast_precision_loss,
    reason = "gauges are floating-point numbers"
)]
fn measure(count: u64) -> f64 {
    count as f64
}

const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use metrics_exporter_prometheus::PrometheusBuilder;

    use super::*;
    use crate::admin::tests::status;

    #[test]
    fn every_count_of_the_status_is_a_metric() {
        let mut status = status(true);
        status.uplinks = vec![Uplink {
            name: "eth0".to_owned(),
            rx: 10,
            ..Uplink::default()
        }];
        status.workers = vec![Worker {
            id: 1,
            transmitted: 8,
            dropped: BTreeMap::from([("no_flow".to_owned(), 2)]),
            flows: 3,
            ..Worker::default()
        }];
        let recorder = PrometheusBuilder::new().build_recorder();
        metrics::with_local_recorder(&recorder, || {
            describe();
            publish(&status);
            publish(&status);
        });
        let text = recorder.handle().render();
        for line in [
            "sluice_ready 1",
            "sluice_epoch 7",
            "sluice_flows{worker=\"1\"} 3",
            "sluice_worker_packets_total{worker=\"1\",verdict=\"transmitted\"} 8",
            "sluice_worker_packets_total{worker=\"1\",verdict=\"dropped\"} 2",
            "sluice_worker_dropped_packets_total{worker=\"1\",reason=\"no_flow\"} 2",
            "sluice_uplink_received_packets_total{device=\"eth0\"} 10",
            "# HELP sluice_host_port_completions_total io_uring completions taken",
        ] {
            assert!(
                text.lines().any(|found| found == line),
                "{line} is missing in\n{text}"
            );
        }
    }
}
