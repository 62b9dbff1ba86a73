//! What was written, in a file and on the command line, becomes one checked [`Config`]. Every
//! mistake is named with key, value and reason, not only the first. Flags win over the file.
//!
//! `read` knows what the keys mean, `document` how one is taken, `value` what values look like.
//! Nothing here touches the machine but to read the file and, where no name is given, the host's.

mod document;
mod parts;
mod read;
mod value;

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};
use thiserror::Error;

use crate::args::{Settings, Shape};

pub(crate) use document::Finding;
pub(crate) use value::{Cidr, PortRange};

/// Everything that was set, checked. `/configz` shows it as it stands.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Config {
    /// Where Services and endpoints come from.
    pub(crate) source: Source,
    /// This node's name.
    pub(crate) node: String,
    /// The mirror that was asked for.
    pub(crate) mirror: MirrorMode,
    pub(crate) engine: Engine,
    pub(crate) cluster_cidrs: Vec<Cidr>,
    /// What tells clients inside the cluster from those outside.
    pub(crate) detect_local: DetectLocal,
    pub(crate) node_port_addresses: NodePortAddresses,
    pub(crate) masquerade_all: bool,
    /// Bit of the packet mark by which the mirror marks packets to masquerade.
    pub(crate) masquerade_bit: u8,
    /// Scheduler of Services that name none.
    pub(crate) scheduler: String,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) sync_period: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) min_sync_period: Duration,
    pub(crate) admin_address: SocketAddr,
    /// Where `/healthz` and `/livez` answer besides; in file mode only if configured.
    pub(crate) healthz_address: Option<SocketAddr>,
    pub(crate) state_dir: PathBuf,
    pub(crate) logging: Logging,
    /// What is served otherwise than asked for, or has no effect.
    pub(crate) warnings: Vec<Finding>,
}

/// Where objects come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum Source {
    /// A folder of manifests.
    Manifests(PathBuf),
    /// The API server that a kubeconfig names, or the cluster we run in.
    Cluster { kubeconfig: Option<PathBuf> },
}

/// The kernel's copy of the Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum MirrorMode {
    Nftables,
    Iptables,
    Ipvs,
    None,
}

/// The engine's settings.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Engine {
    pub(crate) enabled: Switch,
    /// Devices whose packets the engine takes; empty: the one that holds the node's address.
    pub(crate) uplinks: Vec<String>,
    pub(crate) workers: u16,
    pub(crate) xdp: XdpMode,
    pub(crate) scope: Scope,
    /// How old the heartbeat may be before the programs let packets pass.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) grace: Duration,
    /// How long packets of known flows are held back from the mirror after that.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) hold: Duration,
    /// Bit of the packet mark that carries a packet past our own hooks.
    pub(crate) mark_bit: u8,
    pub(crate) snat_ports: PortRange,
    /// Source addresses for masqueraded flows; empty: as the kernel's routes say.
    pub(crate) snat_addresses: Vec<IpAddr>,
    /// Names of devices with a pod behind them; `*` at the end stands for the rest.
    pub(crate) pod_interfaces: Vec<String>,
    /// Whether an echo request to a frontend's address is answered.
    pub(crate) ping_vip: bool,
    /// How long an idle worker polls before it blocks.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) spin: Duration,
    /// Flows over all workers.
    pub(crate) flows: u32,
    pub(crate) timeouts: Timeouts,
}

/// A switch that may decide by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Switch {
    Auto,
    On,
    Off,
}

/// How AF_XDP is bound.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum XdpMode {
    /// Zero copy, then copy.
    Auto,
    Zerocopy,
    Copy,
    Generic,
}

/// Whose packets the engine takes on the host's side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Scope {
    /// `Pods` where a mirror serves host processes, else `Host`.
    Auto,
    Pods,
    Host,
}

/// How long a flow without packets lives, by state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Timeouts {
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_syn: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_syn_received: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_established: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_fin: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_close_wait: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_last_ack: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_time_wait: Duration,
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) tcp_close: Duration,
    /// UDP that has seen packets one way only.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) udp: Duration,
    /// UDP that was answered.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) udp_stream: Duration,
    /// Any other protocol.
    #[serde(serialize_with = "value::as_seconds")]
    pub(crate) other: Duration,
}

/// kube-proxy's `detectLocalMode` with what it needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum DetectLocal {
    ClusterCidr,
    NodeCidr,
    BridgeInterface(String),
    InterfaceNamePrefix(String),
}

/// On which of the node's addresses node ports answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum NodePortAddresses {
    All,
    /// The addresses of the Node object.
    Primary,
    Within(Vec<Cidr>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Logging {
    pub(crate) format: LogFormat,
    pub(crate) verbosity: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Why there is no [`Config`].
#[derive(Debug, Error)]
pub(crate) enum ConfigError {
    #[error("cannot read the configuration file {}: {error}", path.display())]
    Unreadable {
        path: PathBuf,
        error: std::io::Error,
    },
    #[error("the configuration file {} is not right: {reason}", path.display())]
    Syntax { path: PathBuf, reason: String },
    #[error("{}", listed(mistakes))]
    Mistakes {
        mistakes: Vec<Finding>,
        warnings: Vec<Finding>,
    },
}

impl Config {
    /// Reads the file, lays the flags over it and checks the whole.
    pub(crate) fn load(settings: &Settings) -> Result<Self, ConfigError> {
        let mut entries = match &settings.config {
            Some(path) => read_file(path)?,
            None => Map::new(),
        };
        let flags = overlay(settings, &mut entries);
        Self::from_entries(entries, flags, settings)
    }

    /// The mirror that serves: one that is not built is served as none.
    pub(crate) fn served_mirror(&self) -> MirrorMode {
        MirrorMode::None
    }

    /// Whose packets the engine takes on the host's side, decided.
    pub(crate) fn scope(&self) -> Scope {
        match (self.engine.scope, self.served_mirror()) {
            (Scope::Auto, MirrorMode::None) => Scope::Host,
            (Scope::Auto, _) => Scope::Pods,
            (scope, _) => scope,
        }
    }

    fn from_entries(
        entries: Map<String, Value>,
        flags: BTreeMap<String, String>,
        settings: &Settings,
    ) -> Result<Self, ConfigError> {
        let document = document::Document::new(flags);
        let config = read::config(&document, entries, settings.manifests.as_deref());
        let document::Findings { mistakes, warnings } = document.into_findings();
        if mistakes.is_empty() {
            return Ok(Self { warnings, ..config });
        }
        Err(ConfigError::Mistakes { mistakes, warnings })
    }
}

impl MirrorMode {
    /// The word of the configuration.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
            Self::Ipvs => "ipvs",
            Self::None => "none",
        }
    }
}

/// The mapping that a configuration file holds.
fn read_file(path: &Path) -> Result<Map<String, Value>, ConfigError> {
    let text = std::fs::read_to_string(path).map_err(|error| ConfigError::Unreadable {
        path: path.to_owned(),
        error,
    })?;
    let syntax = |reason: String| ConfigError::Syntax {
        path: path.to_owned(),
        reason,
    };
    match serde_saphyr::from_str(&text).map_err(|error| syntax(error.to_string()))? {
        Value::Object(entries) => Ok(entries),
        Value::Null => Ok(Map::new()),
        _ => Err(syntax(
            "it must hold one mapping, a KubeProxyConfiguration".to_owned(),
        )),
    }
}

/// Writes the flags into the document and says which key came from which flag.
fn overlay(settings: &Settings, entries: &mut Map<String, Value>) -> BTreeMap<String, String> {
    let mut flags = BTreeMap::new();
    let mut set = |key: &str, flag: String, value: Value| {
        put(entries, key, value);
        flags.insert(key.to_owned(), flag);
    };
    for (flag, text) in &settings.kube_proxy.0 {
        if !flag.key.is_empty() {
            set(
                flag.key,
                format!("--{}", flag.name),
                flag_value(flag.shape, text),
            );
        }
    }
    let ours = [
        ("hostnameOverride", "node", &settings.node),
        ("mode", "mode", &settings.mode),
        ("clusterCIDR", "cluster-cidr", &settings.cluster_cidr),
        (
            "metricsBindAddress",
            "admin-address",
            &settings.admin_address,
        ),
        ("sluice.engine.enabled", "engine", &settings.engine),
        ("sluice.stateDir", "state-dir", &settings.state_dir),
    ];
    for (key, flag, value) in ours {
        if let Some(text) = value {
            set(key, format!("--{flag}"), Value::String(text.clone()));
        }
    }
    if !settings.uplinks.is_empty() {
        set(
            "sluice.engine.uplinks",
            "--uplink".to_owned(),
            settings.uplinks.clone().into(),
        );
    }
    flags
}

/// Sets a dotted key, making the mappings on its way.
fn put(entries: &mut Map<String, Value>, key: &str, value: Value) {
    let Some((head, rest)) = key.split_once('.') else {
        entries.insert(key.to_owned(), value);
        return;
    };
    let inner = entries.entry(head).or_insert(Value::Null);
    if inner.is_null() {
        *inner = Value::Object(Map::new());
    }
    // A section that is no mapping stays as it is: reading it names the mistake.
    if let Value::Object(inner) = inner {
        put(inner, rest, value);
    }
}

/// A flag's text as the file would hold it; what does not fit stays text, and is refused later.
fn flag_value(shape: Shape, text: &str) -> Value {
    let as_text = || Value::String(text.to_owned());
    let parts = || {
        text.split(',')
            .map(str::trim)
            .filter(|part| !part.is_empty())
    };
    match shape {
        Shape::Text => as_text(),
        Shape::Number => text.parse::<i64>().map_or_else(|_| as_text(), Value::from),
        Shape::Switch => text.parse::<bool>().map_or_else(|_| as_text(), Value::from),
        Shape::List => parts().map(Value::from).collect(),
        Shape::Pairs => {
            let pair = |part: &str| {
                let (name, value) = part.split_once('=')?;
                Some((name.to_owned(), flag_value(Shape::Switch, value)))
            };
            parts()
                .map(pair)
                .collect::<Option<Map<_, _>>>()
                .map_or_else(as_text, Value::Object)
        }
    }
}

fn listed(mistakes: &[Finding]) -> String {
    let lines: Vec<_> = mistakes
        .iter()
        .map(|mistake| format!("\n  {mistake}"))
        .collect();
    format!("the configuration is not right:{}", lines.concat())
}

#[cfg(test)]
mod tests;
