//! What a running sluice says about itself: the JSON of `status` and `flows`, and the tables made
//! of it. The same types are written by the admin server and read by the client commands.
//!
//! The field names are a contract (README, "Commands"); nothing here measures or decides.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::output::{Tabular, table};

/// The version of these objects.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ApiVersion {
    #[default]
    #[serde(rename = "sluice/v1")]
    V1,
}

/// `status`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Status {
    #[serde(default)]
    pub(crate) api_version: ApiVersion,
    #[serde(default)]
    pub(crate) kind: StatusKind,
    pub(crate) version: String,
    pub(crate) ready: bool,
    pub(crate) mirror: Mirror,
    pub(crate) engine: Engine,
    pub(crate) epoch: u64,
    pub(crate) uplinks: Vec<Uplink>,
    pub(crate) host_port: HostPort,
    pub(crate) workers: Vec<Worker>,
    /// What is not as it should be, a sentence each.
    pub(crate) problems: Vec<String>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StatusKind {
    #[default]
    Status,
}

/// The kernel's copy of the Services.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Mirror {
    pub(crate) mode: String,
    pub(crate) in_sync: bool,
    pub(crate) reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Engine {
    pub(crate) state: EngineState,
    pub(crate) reason: String,
    pub(crate) locked_bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum EngineState {
    On,
    Off,
    /// Its heartbeat is too old: the programs let packets pass.
    Stale,
}

/// A NIC under AF_XDP, with its sockets' sums.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Uplink {
    pub(crate) name: String,
    /// `zerocopy`, `copy` or `generic`.
    pub(crate) xdp: String,
    pub(crate) queues: u32,
    /// Packets received.
    pub(crate) rx: u64,
    /// Packets transmitted.
    pub(crate) tx: u64,
    /// Packets the kernel dropped before a socket, for want of room.
    pub(crate) rx_dropped: u64,
}

/// The TAP device towards pods and host processes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct HostPort {
    pub(crate) name: String,
    /// `io_uring` or `read_write`.
    pub(crate) io: String,
    pub(crate) queues: u32,
    pub(crate) received: u64,
    pub(crate) transmitted: u64,
    /// Completions taken from the io_uring rings.
    pub(crate) completions: u64,
}

/// A worker's counters. `received + handed_in = transmitted + punted + rejected + dropped + held +
/// handed_out`; packets that the engine makes itself are `generated`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Worker {
    pub(crate) id: u16,
    pub(crate) core: u32,
    pub(crate) received: u64,
    pub(crate) handed_in: u64,
    pub(crate) handed_out: u64,
    pub(crate) transmitted: u64,
    pub(crate) punted: u64,
    pub(crate) rejected: u64,
    /// By reason.
    pub(crate) dropped: BTreeMap<String, u64>,
    pub(crate) held: u64,
    pub(crate) generated: u64,
    pub(crate) flows: u64,
}

/// `flows`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct FlowList {
    #[serde(default)]
    pub(crate) api_version: ApiVersion,
    #[serde(default)]
    pub(crate) kind: FlowListKind,
    pub(crate) flows: Vec<Flow>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum FlowListKind {
    #[default]
    FlowList,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Flow {
    pub(crate) worker: u16,
    pub(crate) protocol: String,
    pub(crate) state: String,
    pub(crate) original: Tuple,
    pub(crate) reply: Tuple,
    /// `namespace/name:port`.
    pub(crate) service: String,
    pub(crate) backend: String,
    /// By direction: original, reply.
    pub(crate) packets: [u64; 2],
    pub(crate) bytes: [u64; 2],
    pub(crate) age_seconds: f64,
    pub(crate) idle_seconds: f64,
}

/// Source and destination, as `ip:port`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tuple {
    pub(crate) src: String,
    pub(crate) dst: String,
}

/// `services`: as control has them, with their backends' states.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct ServiceStates {
    #[serde(default)]
    pub(crate) api_version: ApiVersion,
    #[serde(default)]
    pub(crate) kind: ServiceListKind,
    pub(crate) services: Vec<Value>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ServiceListKind {
    #[default]
    ServiceList,
}

impl Tabular for Status {
    fn tables(&self) -> String {
        let mut parts = vec![self.summary()];
        if !self.uplinks.is_empty() {
            parts.push(self.uplink_table());
        }
        if !self.workers.is_empty() {
            parts.push(self.worker_table());
        }
        let dropped = self.drop_table();
        parts.extend(dropped);
        parts.join("\n\n")
    }
}

impl Status {
    fn summary(&self) -> String {
        let or_dash = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text.to_owned()
            }
        };
        let state = match self.engine.state {
            EngineState::On => "on",
            EngineState::Off => "off",
            EngineState::Stale => "stale",
        };
        let port = &self.host_port;
        let mut lines = vec![
            format!(
                "sluice {}, {}",
                self.version,
                if self.ready { "ready" } else { "not ready" }
            ),
            format!("engine     {state}{}", in_brackets(&self.engine.reason)),
            format!(
                "mirror     {}, {}{}",
                or_dash(&self.mirror.mode),
                if self.mirror.in_sync {
                    "in sync"
                } else {
                    "not in sync"
                },
                in_brackets(&self.mirror.reason)
            ),
            format!("epoch      {}", self.epoch),
            format!("locked     {} KiB", self.engine.locked_bytes / 1024),
        ];
        if !port.name.is_empty() {
            lines.push(format!(
                "host port  {}, {} queues, {}: {} received, {} transmitted, {} completions",
                port.name, port.queues, port.io, port.received, port.transmitted, port.completions
            ));
        }
        lines.extend(
            self.problems
                .iter()
                .map(|problem| format!("problem    {problem}")),
        );
        lines.join("\n")
    }

    fn uplink_table(&self) -> String {
        let rows = self.uplinks.iter().map(|uplink| {
            vec![
                Cow::from(&uplink.name),
                Cow::from(&uplink.xdp),
                number(uplink.queues.into()),
                number(uplink.rx),
                number(uplink.tx),
                number(uplink.rx_dropped),
            ]
        });
        table(
            &["UPLINK", "XDP", "#QUEUES", "#RX", "#TX", "#RX DROPPED"],
            rows,
        )
    }

    fn worker_table(&self) -> String {
        let rows = self.workers.iter().map(|worker| {
            vec![
                number(worker.id.into()),
                number(worker.core.into()),
                number(worker.received),
                number(worker.handed_in),
                number(worker.transmitted),
                number(worker.punted),
                number(worker.rejected),
                number(worker.dropped.values().sum()),
                number(worker.held),
                number(worker.handed_out),
                number(worker.generated),
                number(worker.flows),
            ]
        });
        let header = [
            "#WORKER",
            "#CORE",
            "#RECEIVED",
            "#HANDED IN",
            "#TRANSMITTED",
            "#PUNTED",
            "#REJECTED",
            "#DROPPED",
            "#HELD",
            "#HANDED OUT",
            "#GENERATED",
            "#FLOWS",
        ];
        table(&header, rows)
    }

    /// What was dropped, over all workers, by reason; nothing where nothing was.
    fn drop_table(&self) -> Option<String> {
        let mut dropped = BTreeMap::<&str, u64>::new();
        for (reason, count) in self.workers.iter().flat_map(|worker| &worker.dropped) {
            *dropped.entry(reason).or_default() += count;
        }
        dropped.retain(|_, count| *count > 0);
        if dropped.is_empty() {
            return None;
        }
        let rows = dropped
            .into_iter()
            .map(|(reason, count)| vec![reason.into(), number(count)]);
        Some(table(&["DROPPED", "#PACKETS"], rows))
    }
}

impl Tabular for FlowList {
    fn tables(&self) -> String {
        let rows = self.flows.iter().map(|flow| {
            vec![
                number(flow.worker.into()),
                Cow::from(&flow.protocol),
                Cow::from(&flow.state),
                format!("{} -> {}", flow.original.src, flow.original.dst).into(),
                format!("{} -> {}", flow.reply.src, flow.reply.dst).into(),
                Cow::from(&flow.service),
                format!("{}/{}", flow.packets[0], flow.packets[1]).into(),
                format!("{}/{}", flow.bytes[0], flow.bytes[1]).into(),
                format!("{:.1}s", flow.age_seconds).into(),
                format!("{:.1}s", flow.idle_seconds).into(),
            ]
        });
        let header = [
            "#WORKER", "PROTOCOL", "STATE", "ORIGINAL", "REPLY", "SERVICE", "#PACKETS", "#BYTES",
            "#AGE", "#IDLE",
        ];
        table(&header, rows)
    }
}

impl Tabular for ServiceStates {
    fn tables(&self) -> String {
        service_tables(&self.services)
    }
}

/// The Services of `services` and of `resolve`: a line a frontend, then a line a backend where
/// the backends' states are known.
pub(crate) fn service_tables(services: &[Value]) -> String {
    let frontends = services.iter().flat_map(frontend_rows);
    let header = [
        "SERVICE",
        "PROTOCOL",
        "SCHEDULER",
        "TYPE",
        "ADDRESS",
        "BACKENDS",
        "MASQUERADE",
    ];
    let states: Vec<_> = services.iter().flat_map(backend_rows).collect();
    let mut text = table(&header, frontends);
    if !states.is_empty() {
        let header = [
            "SERVICE",
            "BACKEND",
            "#WEIGHT",
            "#ACTIVE",
            "#INACTIVE",
            "#CONNECTIONS",
            "DRAINING",
        ];
        text = format!("{text}\n\n{}", table(&header, states));
    }
    text
}

fn frontend_rows(service: &Value) -> Vec<Vec<Cow<'_, str>>> {
    let rows = elements(&service["frontends"]).iter().map(|frontend| {
        let address = match (word(&frontend["address"]), &frontend["port"]) {
            (address, port) if address.contains(':') => format!("[{address}]:{port}"),
            (address, port) => format!("{address}:{port}"),
        };
        let backends: Vec<_> = elements(&frontend["backends"]).iter().map(word).collect();
        vec![
            service_name(service).into(),
            word(&service["protocol"]).into(),
            word(&service["scheduler"]).into(),
            word(&frontend["type"]).into(),
            address.into(),
            if backends.is_empty() {
                Cow::from(word(&frontend["whenEmpty"]))
            } else {
                backends.join(", ").into()
            },
            word(&frontend["masquerade"]).into(),
        ]
    });
    rows.collect()
}

fn backend_rows(service: &Value) -> Vec<Vec<Cow<'_, str>>> {
    let rows = elements(&service["backendStates"]).iter().map(|backend| {
        vec![
            service_name(service).into(),
            word(&backend["address"]).into(),
            backend["weight"].to_string().into(),
            backend["active"].to_string().into(),
            backend["inactive"].to_string().into(),
            backend["connections"].to_string().into(),
            backend["draining"].to_string().into(),
        ]
    });
    rows.collect()
}

/// `namespace/name:port`, without the colon where the port has no name.
fn service_name(service: &Value) -> String {
    let [namespace, name, port] = ["namespace", "name", "port"].map(|key| word(&service[key]));
    let colon = if port.is_empty() { "" } else { ":" };
    format!("{namespace}/{name}{colon}{port}")
}

fn word(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn elements(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn number<'a>(number: u64) -> Cow<'a, str> {
    number.to_string().into()
}

fn in_brackets(text: &str) -> String {
    if text.is_empty() {
        String::new()
    } else {
        format!(" ({text})")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn status() -> Status {
        Status {
            api_version: ApiVersion::V1,
            kind: StatusKind::Status,
            version: "0.1.0".to_owned(),
            ready: true,
            mirror: Mirror {
                mode: "none".to_owned(),
                in_sync: true,
                reason: String::new(),
            },
            engine: Engine {
                state: EngineState::On,
                reason: "eth0 can".to_owned(),
                locked_bytes: 4096,
            },
            epoch: 7,
            uplinks: vec![Uplink {
                name: "eth0".to_owned(),
                xdp: "copy".to_owned(),
                queues: 4,
                rx: 10,
                tx: 9,
                rx_dropped: 1,
            }],
            host_port: HostPort {
                name: "sluice0".to_owned(),
                io: "io_uring".to_owned(),
                queues: 2,
                ..HostPort::default()
            },
            workers: vec![Worker {
                id: 0,
                core: 2,
                received: 10,
                transmitted: 8,
                dropped: BTreeMap::from([("no_flow".to_owned(), 2)]),
                ..Worker::default()
            }],
            problems: Vec::new(),
        }
    }

    #[test]
    fn status_has_the_contracts_shape() {
        let expected = json!({
            "apiVersion": "sluice/v1", "kind": "Status", "version": "0.1.0", "ready": true,
            "mirror": {"mode": "none", "inSync": true, "reason": ""},
            "engine": {"state": "on", "reason": "eth0 can", "lockedBytes": 4096},
            "epoch": 7,
            "uplinks": [{"name": "eth0", "xdp": "copy", "queues": 4,
                         "rx": 10, "tx": 9, "rxDropped": 1}],
            "hostPort": {"name": "sluice0", "io": "io_uring", "queues": 2,
                         "received": 0, "transmitted": 0, "completions": 0},
            "workers": [{"id": 0, "core": 2, "received": 10, "handedIn": 0, "handedOut": 0,
                         "transmitted": 8, "punted": 0, "rejected": 0,
                         "dropped": {"no_flow": 2}, "held": 0, "generated": 0, "flows": 0}],
            "problems": [],
        });
        let written = serde_json::to_value(status()).unwrap();
        assert_eq!(written, expected);
        assert_eq!(serde_json::from_value::<Status>(written).unwrap(), status());
    }

    #[test]
    fn flows_have_the_contracts_shape() {
        let tuple = |src: &str, dst: &str| Tuple {
            src: src.to_owned(),
            dst: dst.to_owned(),
        };
        let flows = FlowList {
            flows: vec![Flow {
                worker: 0,
                protocol: "TCP".to_owned(),
                state: "ESTABLISHED".to_owned(),
                original: tuple("192.0.2.1:40000", "10.96.0.10:80"),
                reply: tuple("10.244.1.10:8080", "192.0.2.1:40000"),
                service: "default/web:http".to_owned(),
                backend: "10.244.1.10:8080".to_owned(),
                packets: [12, 10],
                bytes: [900, 4000],
                age_seconds: 3.1,
                idle_seconds: 0.2,
            }],
            ..FlowList::default()
        };
        let expected = json!({
            "apiVersion": "sluice/v1", "kind": "FlowList",
            "flows": [{
                "worker": 0, "protocol": "TCP", "state": "ESTABLISHED",
                "original": {"src": "192.0.2.1:40000", "dst": "10.96.0.10:80"},
                "reply": {"src": "10.244.1.10:8080", "dst": "192.0.2.1:40000"},
                "service": "default/web:http", "backend": "10.244.1.10:8080",
                "packets": [12, 10], "bytes": [900, 4000],
                "ageSeconds": 3.1, "idleSeconds": 0.2,
            }],
        });
        assert_eq!(serde_json::to_value(&flows).unwrap(), expected);
        assert!(flows.tables().contains("192.0.2.1:40000 -> 10.96.0.10:80"));
    }

    #[test]
    fn tables_of_status_name_what_was_dropped_and_why() {
        let text = status().tables();
        assert!(text.contains("engine     on (eth0 can)"), "{text}");
        assert!(text.contains(" no_flow        2"), "{text}");
    }

    #[test]
    fn a_service_without_backends_shows_what_its_clients_get() {
        let services = [json!({
            "namespace": "default", "name": "web", "port": "", "protocol": "TCP",
            "scheduler": "rr",
            "frontends": [{"type": "ClusterIP", "address": "fd00::1", "port": 80, "backends": [],
                           "masquerade": "offCluster", "whenEmpty": "reject"}],
        })];
        let text = service_tables(&services);
        assert!(text.contains("default/web  "), "{text}");
        assert!(text.contains("[fd00::1]:80"), "{text}");
        assert!(text.contains("reject"), "{text}");
    }
}
