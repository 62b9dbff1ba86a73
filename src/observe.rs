//! The running engine as `report` shows it. Reads only; it may wait for workers, so the admin
//! server calls it on threads that may.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use control::resolution::ServiceEntry;
use dataplane::counters::{DropReason, WorkerCounters};
use dataplane::engine::{EngineView, WorkerReport};
use dataplane::flow::Flow;
use dataplane::net::Tuple;
use dataplane::snapshot::{Service, ServiceId, Snapshot};
use dataplane::time::{Clock, Instant, MonotonicClock};
use serde_json::{Value, json};

use crate::report;

/// Fills what `status` says of the engine.
pub(crate) fn engine(view: &EngineView, grace: Duration, status: &mut report::Status) {
    let reports = view.workers();
    let age = heartbeat_age(view);
    let host_port = view.host_port();
    status.engine.locked_bytes = host_port.locked_bytes;
    status.engine.state = report::EngineState::On;
    if age > grace {
        status.engine.state = report::EngineState::Stale;
        status.problems.push(format!(
            "the engine's heartbeat is {} ms old",
            age.as_millis()
        ));
    }
    if !host_port.fallback.is_empty() {
        status.problems.push(format!(
            "the host port reads and writes packet by packet, io_uring is refused: {}",
            host_port.fallback
        ));
    }
    status.epoch = view.acknowledged();
    status.uplinks = uplinks(view, &reports);
    status.host_port = report::HostPort {
        name: host_port.name.clone(),
        io: host_port.io.to_owned(),
        queues: u32::try_from(reports.len()).unwrap_or(u32::MAX),
        received: reports.iter().map(|worker| worker.host_port.received).sum(),
        transmitted: reports
            .iter()
            .map(|worker| worker.host_port.transmitted)
            .sum(),
        completions: reports
            .iter()
            .map(|worker| worker.host_port.completions)
            .sum(),
    };
    status.workers = (0..)
        .zip(&reports)
        .map(|(id, report)| worker(id, report))
        .collect();
}

/// Whether the programs take the engine for dead.
pub(crate) fn is_stale(view: &EngineView, grace: Duration) -> bool {
    heartbeat_age(view) > grace
}

fn heartbeat_age(view: &EngineView) -> Duration {
    MonotonicClock.now().since(view.heartbeat())
}

/// Every flow of every worker.
pub(crate) fn flows(view: &EngineView) -> report::FlowList {
    let snapshot = view.snapshot();
    let flows = view.flows();
    let shown = flows
        .iter()
        .map(|(worker, flow, now)| shown_flow(*worker, flow, *now, &snapshot));
    report::FlowList {
        flows: shown.collect(),
        ..report::FlowList::default()
    }
}

/// The resolved Services with what the engine knows of their backends.
pub(crate) fn services(entries: &[ServiceEntry], view: &EngineView) -> report::ServiceStates {
    let snapshot = view.snapshot();
    let known: HashMap<&str, &Arc<Service>> = snapshot
        .services()
        .map(|service| (&*service.name, service))
        .collect();
    let with_states = |entry: &ServiceEntry| {
        let name = format!("{}/{}:{}", entry.namespace, entry.name, entry.port);
        let service = known
            .get(&*name)
            .or_else(|| known.get(name.trim_end_matches(':')));
        let states = service
            .map(|service| backend_states(service, view))
            .unwrap_or_default();
        with_key(json!(entry), "backendStates", states.into())
    };
    report::ServiceStates {
        services: entries.iter().map(with_states).collect(),
        ..report::ServiceStates::default()
    }
}

/// The resolved Services where no engine runs: nobody knows their backends' connections.
pub(crate) fn services_without_engine(entries: &[ServiceEntry]) -> report::ServiceStates {
    let without = |entry| with_key(json!(entry), "backendStates", Value::Array(Vec::new()));
    report::ServiceStates {
        services: entries.iter().map(without).collect(),
        ..report::ServiceStates::default()
    }
}

fn backend_states(service: &Service, view: &EngineView) -> Vec<Value> {
    let state = |backend: &dataplane::snapshot::Backend| {
        let connections = view.connections(backend.id);
        json!({
            "address": backend.endpoint.to_string(),
            "weight": backend.weight,
            "active": connections.active,
            "inactive": connections.inactive,
            "draining": backend.draining,
            "connections": connections.connections,
        })
    };
    service.backends.iter().map(state).collect()
}

fn with_key(mut object: Value, key: &str, value: Value) -> Value {
    object[key] = value;
    object
}

fn uplinks(view: &EngineView, reports: &[WorkerReport]) -> Vec<report::Uplink> {
    let shown = view.uplinks().iter().enumerate().map(|(number, uplink)| {
        let parts = || {
            reports
                .iter()
                .filter_map(move |worker| worker.uplinks.get(number))
        };
        report::Uplink {
            name: uplink.name.clone(),
            xdp: uplink.xdp.to_owned(),
            queues: uplink.queues,
            rx: parts().map(|part| part.received).sum(),
            tx: parts().map(|part| part.transmitted).sum(),
            rx_dropped: parts().map(|part| part.dropped).sum(),
        }
    });
    shown.collect()
}

fn worker(id: u16, report: &WorkerReport) -> report::Worker {
    let WorkerCounters {
        received,
        handed_in,
        handed_out,
        transmitted,
        punted,
        rejected,
        held,
        generated,
        flows,
        ..
    } = report.counters;
    report::Worker {
        id,
        core: u32::try_from(report.core).unwrap_or(u32::MAX),
        received,
        handed_in,
        handed_out,
        transmitted,
        punted,
        rejected,
        dropped: DropReason::ALL
            .iter()
            .zip(report.counters.dropped)
            .filter(|(_, count)| *count > 0)
            .map(|(reason, count)| (reason.name().to_owned(), count))
            .collect(),
        held,
        generated,
        flows,
    }
}

fn shown_flow(worker: u16, flow: &Flow, now: Instant, snapshot: &Snapshot) -> report::Flow {
    let service = snapshot.service(ServiceId(flow.service));
    report::Flow {
        worker,
        protocol: flow.protocol.to_string(),
        state: flow.state.name().to_owned(),
        original: shown_tuple(&flow.original()),
        reply: shown_tuple(&flow.reply()),
        service: service
            .map(|service| service.name.to_string())
            .unwrap_or_default(),
        backend: flow.backend_endpoint().to_string(),
        packets: flow.packets,
        bytes: flow.bytes,
        age_seconds: flow.age(now).as_secs_f64(),
        idle_seconds: flow.idle(now).as_secs_f64(),
    }
}

fn shown_tuple(tuple: &Tuple) -> report::Tuple {
    report::Tuple {
        src: tuple.source.to_string(),
        dst: tuple.destination.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_shows_the_reasons_that_occurred() {
        let mut counters = WorkerCounters {
            received: 3,
            transmitted: 2,
            ..Default::default()
        };
        counters.drop(DropReason::NoFlow);
        let report = WorkerReport {
            core: 2,
            counters,
            host_port: dataplane::device::DeviceReport::default(),
            uplinks: Vec::new(),
        };
        let shown = worker(1, &report);
        assert_eq!((shown.id, shown.core, shown.received), (1, 2, 3));
        assert_eq!(shown.dropped, [("no_flow".to_owned(), 1)].into());
    }

    #[test]
    fn a_flow_of_a_service_that_has_gone_has_no_name() {
        let flow = Flow {
            protocol: dataplane::net::Protocol::UDP,
            client_address: std::net::Ipv4Addr::new(192, 0, 2, 1).into(),
            client_port: 4000,
            ..Flow::default()
        };
        let shown = shown_flow(0, &flow, Instant::from_secs(1), &Snapshot::default());
        assert_eq!(shown.service, "");
        assert_eq!(
            (shown.protocol.as_str(), shown.original.src.as_str()),
            ("UDP", "192.0.2.1:4000")
        );
    }
}
