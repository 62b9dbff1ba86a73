//! What each key means: kube-proxy's, KubeProxyConfiguration v1alpha1 with its defaults, and ours,
//! the block `sluice:`. Keys of kube-proxy's that do nothing here are taken in silence; unknown
//! ones are warnings, in our own block mistakes.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::thread::available_parallelism;
use std::time::Duration;

use serde_json::{Map, Value};

use super::document::{Document, Section, Unknown};
use super::value::{
    PortRange, absolute_path, boolean, cidr, cidrs, duration, integer, interface,
    interface_pattern, ip_address, list, listen_address, milliseconds, port_range, text, word,
};
use super::{
    Config, DetectLocal, Engine, LogFormat, Logging, MirrorMode, NodePortAddresses, Scope, Source,
    Switch, Timeouts, XdpMode,
};
use crate::args::DEFAULT_STATE_DIR;

/// Reads the whole document. What it returns counts only if no mistake was noted.
pub(super) fn config(
    document: &Document,
    entries: Map<String, Value>,
    manifests: Option<&Path>,
) -> Config {
    let mut root = document.root(entries);
    identity(&mut root);
    let mirror = mirror(&mut root);
    let tables = tables(&mut root);
    let conntrack = conntrack(&mut root);
    let ipvs = ipvs(&mut root);
    let (engine, state_dir) = sluice(&mut root, &tables, &conntrack, &ipvs, mirror);
    let cluster_cidrs = root.take("clusterCIDR", cidrs).unwrap_or_default();
    let default_healthz = if manifests.is_none() {
        Some(DEFAULT_HEALTHZ)
    } else {
        None
    };
    let config = Config {
        source: source(&mut root, manifests),
        node: node(&mut root),
        mirror,
        engine,
        cluster_cidrs,
        detect_local: detect_local(&mut root),
        node_port_addresses: node_port_addresses(&mut root),
        masquerade_all: tables.masquerade_all,
        masquerade_bit: tables.masquerade_bit,
        scheduler: ipvs.scheduler,
        sync_period: tables.sync_period,
        min_sync_period: tables.min_sync_period,
        admin_address: address(&mut root, "metricsBindAddress", ADMIN_PORT)
            .unwrap_or(DEFAULT_ADMIN),
        healthz_address: address(&mut root, "healthzBindAddress", HEALTHZ_PORT).or(default_healthz),
        state_dir,
        logging: logging(&mut root),
        warnings: Vec::new(),
    };
    without_effect(&mut root);
    root.finish();
    config
}

fn identity(root: &mut Section<'_>) {
    for (key, expected) in [("apiVersion", API_VERSION), ("kind", KIND)] {
        root.take(key, |value| {
            if value.as_str() == Some(expected) {
                return Ok(());
            }
            Err(format!("must be {expected}"))
        });
    }
}

fn mirror(root: &mut Section<'_>) -> MirrorMode {
    let given = root.has("mode");
    let mode = root.take("mode", |value| {
        let mode = text(value)?;
        match mode.as_str() {
            "" | "nftables" => Ok(MirrorMode::Nftables),
            "iptables" => Ok(MirrorMode::Iptables),
            "ipvs" => Ok(MirrorMode::Ipvs),
            "none" => Ok(MirrorMode::None),
            "userspace" => Err(format!(
                "kube-proxy dropped this mode and there is none like it here; {MODE_ALTERNATIVES}"
            )),
            "kernelspace" => Err(format!(
                "this mode exists on Windows only; {MODE_ALTERNATIVES}"
            )),
            _ => Err(format!("there is no such mode; {MODE_ALTERNATIVES}")),
        }
    });
    // A wrong mode is a mistake already.
    let wrong = given && mode.is_none();
    let mode = mode.unwrap_or(MirrorMode::Nftables);
    if mode != MirrorMode::None && !wrong {
        root.warning(
            "mode",
            mode.name(),
            "this mirror is not built yet, it is served as none",
        );
    }
    mode
}

fn source(root: &mut Section<'_>, manifests: Option<&Path>) -> Source {
    let mut connection = root.section("clientConnection", Unknown::Warning);
    let kubeconfig = connection
        .take("kubeconfig", text)
        .filter(|path| !path.is_empty());
    for key in ["acceptContentTypes", "contentType", "qps", "burst"] {
        connection.ignore(key);
    }
    connection.finish();
    match manifests {
        Some(folder) => Source::Manifests(folder.to_owned()),
        None => Source::Cluster {
            kubeconfig: kubeconfig.map(PathBuf::from),
        },
    }
}

/// The node's name: as given, else the host's in lower case, as kube-proxy has it.
fn node(root: &mut Section<'_>) -> String {
    let given = root
        .take("hostnameOverride", text)
        .map(|name| name.trim().to_lowercase());
    if let Some(name) = given.filter(|name| !name.is_empty()) {
        return name;
    }
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim().to_lowercase();
    if name.is_empty() {
        root.mistake(
            "hostnameOverride",
            "",
            "must be given, the host has no name",
        );
    }
    name
}

/// What the blocks `iptables` and `nftables` say.
struct Tables {
    masquerade_all: bool,
    masquerade_bit: u8,
    sync_period: Duration,
    min_sync_period: Duration,
}

/// Both blocks hold the same keys; where both say something, `nftables` counts.
fn tables(root: &mut Section<'_>) -> Tables {
    let mut read = |block: &str| {
        let mut section = root.section(block, Unknown::Warning);
        let taken = (
            section.take("masqueradeAll", boolean),
            section.take("masqueradeBit", integer(0..=31)),
            section
                .take("syncPeriod", duration)
                .filter(|period| !period.is_zero()),
            section.take("minSyncPeriod", duration),
        );
        if block == "iptables" {
            section.ignore("localhostNodePorts");
        }
        section.finish();
        taken
    };
    let (iptables, nftables) = (read("iptables"), read("nftables"));
    Tables {
        masquerade_all: nftables.0.or(iptables.0).unwrap_or(false),
        masquerade_bit: nftables.1.or(iptables.1).unwrap_or(DEFAULT_MASQUERADE_BIT),
        sync_period: nftables.2.or(iptables.2).unwrap_or(Duration::from_secs(30)),
        min_sync_period: nftables.3.or(iptables.3).unwrap_or(Duration::from_secs(1)),
    }
}

/// What the block `conntrack` says; zero durations are kube-proxy's "leave it".
struct Conntrack {
    flows: u32,
    tcp_established: Option<Duration>,
    tcp_close_wait: Option<Duration>,
    udp: Option<Duration>,
    udp_stream: Option<Duration>,
}

fn conntrack(root: &mut Section<'_>) -> Conntrack {
    let mut section = root.section("conntrack", Unknown::Warning);
    let conntrack = Conntrack {
        flows: flows(&mut section),
        tcp_established: nonzero(&mut section, "tcpEstablishedTimeout"),
        tcp_close_wait: nonzero(&mut section, "tcpCloseWaitTimeout"),
        udp: nonzero(&mut section, "udpTimeout"),
        udp_stream: nonzero(&mut section, "udpStreamTimeout"),
    };
    section.ignore("tcpBeLiberal");
    section.finish();
    conntrack
}

/// kube-proxy's size of the conntrack table is ours of the flow table.
fn flows(section: &mut Section<'_>) -> u32 {
    let mut count = |key: &str, default: u32| {
        section
            .take(key, integer(0..=i32::MAX.unsigned_abs()))
            .unwrap_or(default)
    };
    let (per_core, min) = (count("maxPerCore", 32_768), count("min", 131_072));
    let flows = per_core
        .saturating_mul(u32::try_from(cores()).unwrap_or(u32::MAX))
        .max(min);
    if flows > MAX_FLOWS {
        let reason = format!("the engine holds at most {MAX_FLOWS} flows");
        section.warning("maxPerCore", &flows.to_string(), reason);
    }
    // Two zeros leave the kernel's table as it is; ours needs a size.
    if flows == 0 {
        DEFAULT_FLOWS
    } else {
        flows.clamp(MIN_FLOWS, MAX_FLOWS)
    }
}

/// What the block `ipvs` says.
struct Ipvs {
    scheduler: String,
    tcp: Option<Duration>,
    tcp_fin: Option<Duration>,
    udp: Option<Duration>,
}

fn ipvs(root: &mut Section<'_>) -> Ipvs {
    let mut section = root.section("ipvs", Unknown::Warning);
    let scheduler = section
        .take("scheduler", word(SCHEDULERS))
        .unwrap_or_default();
    let ipvs = Ipvs {
        scheduler: if scheduler.is_empty() {
            "rr"
        } else {
            scheduler
        }
        .to_owned(),
        tcp: nonzero(&mut section, "tcpTimeout"),
        tcp_fin: nonzero(&mut section, "tcpFinTimeout"),
        udp: nonzero(&mut section, "udpTimeout"),
    };
    section.take("excludeCIDRs", list(cidr));
    section.take("strictARP", boolean);
    section.take("syncPeriod", duration);
    section.take("minSyncPeriod", duration);
    section.finish();
    ipvs
}

fn sluice(
    root: &mut Section<'_>,
    tables: &Tables,
    conntrack: &Conntrack,
    ipvs: &Ipvs,
    mirror: MirrorMode,
) -> (Engine, PathBuf) {
    let mut block = root.section("sluice", Unknown::Mistake);
    let state_dir = block.take("stateDir", absolute_path);
    let mut section = block.section("engine", Unknown::Mistake);
    let engine = engine(&mut section, conntrack, ipvs, mirror);
    if engine.mark_bit == tables.masquerade_bit {
        let bit = engine.mark_bit.to_string();
        section.mistake(
            "markBit",
            &bit,
            "is the mirror's masqueradeBit; set another bit",
        );
    }
    if engine.scope == Scope::Host && mirror == MirrorMode::Ipvs {
        section.mistake(
            "scope",
            "host",
            "does not go with mode ipvs; set pods or auto",
        );
    }
    if engine.enabled == Switch::Off && mirror == MirrorMode::None {
        section.warning(
            "enabled",
            "off",
            "with mode none nothing serves the Services",
        );
    }
    section.finish();
    block.finish();
    (
        engine,
        state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
    )
}

fn engine(
    section: &mut Section<'_>,
    conntrack: &Conntrack,
    ipvs: &Ipvs,
    mirror: MirrorMode,
) -> Engine {
    let grace = section.take("graceMs", milliseconds(20..=10_000));
    let hold = section.take("holdMs", milliseconds(0..=3_600_000));
    let workers = section.take("workers", integer(1..=MAX_WORKERS));
    let default_workers = u16::try_from(cores().min(DEFAULT_WORKERS)).unwrap_or(1);
    let spin = section.take("spinMicros", integer(0..=10_000_u32));
    Engine {
        enabled: section.take("enabled", switch).unwrap_or(Switch::Auto),
        uplinks: uplinks(section),
        workers: workers.unwrap_or(default_workers),
        xdp: section
            .take("xdp", word(XDP_MODES))
            .unwrap_or(XdpMode::Auto),
        scope: section.take("scope", word(SCOPES)).unwrap_or(Scope::Auto),
        grace: grace.unwrap_or(Duration::from_millis(200)),
        hold: hold.unwrap_or(Duration::from_secs(30)),
        mark_bit: section
            .take("markBit", integer(0..=31))
            .unwrap_or(DEFAULT_MARK_BIT),
        snat_ports: section
            .take("snatPorts", port_range)
            .unwrap_or(DEFAULT_SNAT_PORTS),
        snat_addresses: snat_addresses(section),
        pod_interfaces: section
            .take("podInterfaces", list(interface_pattern))
            .unwrap_or_else(|| {
                DEFAULT_POD_INTERFACES
                    .iter()
                    .map(ToString::to_string)
                    .collect()
            }),
        ping_vip: section.take("pingVip", boolean).unwrap_or(true),
        spin: Duration::from_micros(spin.unwrap_or(DEFAULT_SPIN_MICROS).into()),
        flows: conntrack.flows,
        timeouts: timeouts(section, conntrack, ipvs, mirror),
    }
}

fn uplinks(section: &mut Section<'_>) -> Vec<String> {
    let uplinks = section.take("uplinks", list(interface)).unwrap_or_default();
    for (position, name) in uplinks.iter().enumerate() {
        if uplinks[..position].contains(name) {
            section.mistake("uplinks", name, "is named twice");
        }
    }
    uplinks
}

fn snat_addresses(section: &mut Section<'_>) -> Vec<IpAddr> {
    let addresses = section
        .take("snatAddress", list(ip_address))
        .unwrap_or_default();
    for family in [true, false] {
        if addresses
            .iter()
            .filter(|address| address.is_ipv4() == family)
            .count()
            > 1
        {
            section.mistake("snatAddress", "", "holds more than one address of a family");
        }
    }
    addresses
}

/// The kernel's defaults, over them kube-proxy's `conntrack`, in mode ipvs its `ipvs`, then ours.
fn timeouts(
    section: &mut Section<'_>,
    conntrack: &Conntrack,
    ipvs: &Ipvs,
    mirror: MirrorMode,
) -> Timeouts {
    let in_ipvs = |timeout: Option<Duration>| timeout.filter(|_| mirror == MirrorMode::Ipvs);
    let mut block = section.section("timeouts", Unknown::Mistake);
    let mut timeout = |key: &str, configured: Option<Duration>, default: u64| {
        nonzero(&mut block, key)
            .or(configured)
            .unwrap_or_else(|| Duration::from_secs(default))
    };
    let timeouts = Timeouts {
        tcp_syn: timeout("tcpSyn", None, 120),
        tcp_syn_received: timeout("tcpSynReceived", None, 60),
        tcp_established: timeout(
            "tcpEstablished",
            in_ipvs(ipvs.tcp).or(conntrack.tcp_established),
            86_400,
        ),
        tcp_fin: timeout("tcpFin", in_ipvs(ipvs.tcp_fin), 120),
        tcp_close_wait: timeout("tcpCloseWait", conntrack.tcp_close_wait, 3_600),
        tcp_last_ack: timeout("tcpLastAck", None, 30),
        tcp_time_wait: timeout("tcpTimeWait", None, 120),
        tcp_close: timeout("tcpClose", None, 10),
        udp: timeout("udp", in_ipvs(ipvs.udp).or(conntrack.udp), 30),
        udp_stream: timeout("udpStream", in_ipvs(ipvs.udp).or(conntrack.udp_stream), 120),
        other: timeout("other", None, 600),
    };
    block.finish();
    timeouts
}

fn detect_local(root: &mut Section<'_>) -> DetectLocal {
    let mut section = root.section("detectLocal", Unknown::Warning);
    let bridge = section.take("bridgeInterface", text).unwrap_or_default();
    let prefix = section
        .take("interfaceNamePrefix", text)
        .unwrap_or_default();
    section.finish();
    let mode = root.take("detectLocalMode", text).unwrap_or_default();
    let needs = |key: &str, value: &str| {
        if value.is_empty() {
            root.mistake("detectLocalMode", &mode, format!("needs detectLocal.{key}"));
        }
    };
    match mode.as_str() {
        "" | "ClusterCIDR" => DetectLocal::ClusterCidr,
        "NodeCIDR" => DetectLocal::NodeCidr,
        "BridgeInterface" => {
            needs("bridgeInterface", &bridge);
            DetectLocal::BridgeInterface(bridge)
        }
        "InterfaceNamePrefix" => {
            needs("interfaceNamePrefix", &prefix);
            DetectLocal::InterfaceNamePrefix(prefix)
        }
        _ => {
            let reason =
                "must be one of ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix";
            root.mistake("detectLocalMode", &mode, reason);
            DetectLocal::ClusterCidr
        }
    }
}

fn node_port_addresses(root: &mut Section<'_>) -> NodePortAddresses {
    let read = |value: &Value| {
        if value
            .as_array()
            .is_some_and(|list| matches!(&list[..], [only] if only == "primary"))
        {
            return Ok(NodePortAddresses::Primary);
        }
        let ranges = list(cidr)(value).map_err(|reason| format!("{reason}, or only primary"))?;
        if ranges.is_empty() {
            return Ok(NodePortAddresses::All);
        }
        Ok(NodePortAddresses::Within(ranges))
    };
    root.take("nodePortAddresses", read)
        .unwrap_or(NodePortAddresses::All)
}

fn logging(root: &mut Section<'_>) -> Logging {
    let mut section = root.section("logging", Unknown::Warning);
    let logging = Logging {
        format: section
            .take("format", word(LOG_FORMATS))
            .unwrap_or(LogFormat::Text),
        verbosity: section.take("verbosity", integer(0..=255)).unwrap_or(0),
    };
    for key in ["flushFrequency", "vmodule", "options"] {
        section.ignore(key);
    }
    section.finish();
    logging
}

/// kube-proxy's keys that mean nothing here: defaults of clients, Windows, dropped features.
fn without_effect(root: &mut Section<'_>) {
    for key in WITHOUT_EFFECT {
        root.ignore(key);
    }
}

/// An address to listen on; kube-proxy reads an empty text as its default.
fn address(root: &mut Section<'_>, key: &str, port: u16) -> Option<SocketAddr> {
    let read = |value: &Value| match value.as_str() {
        Some("") => Ok(None),
        _ => listen_address(port)(value).map(Some),
    };
    root.take(key, read).flatten()
}

/// A duration; zero means "as if absent", as it does to kube-proxy.
fn nonzero(section: &mut Section<'_>, key: &str) -> Option<Duration> {
    section
        .take(key, duration)
        .filter(|duration| !duration.is_zero())
}

fn cores() -> usize {
    available_parallelism().map_or(1, usize::from)
}

/// `auto`, `on` or `off`; the last two may have become booleans on the way through YAML.
fn switch(value: &Value) -> Result<Switch, String> {
    match value {
        Value::Bool(true) => Ok(Switch::On),
        Value::Bool(false) => Ok(Switch::Off),
        other => word(SWITCHES)(other),
    }
}

const API_VERSION: &str = "kubeproxy.config.k8s.io/v1alpha1";
const KIND: &str = "KubeProxyConfiguration";
const ADMIN_PORT: u16 = 10249;
const HEALTHZ_PORT: u16 = 10256;
const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), ADMIN_PORT);
const DEFAULT_HEALTHZ: SocketAddr =
    SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), HEALTHZ_PORT);
const MODE_ALTERNATIVES: &str = "set nftables, iptables, ipvs or none (the engine, which serves in \
    userspace, has its own switch: sluice.engine.enabled)";

const SWITCHES: &[(&str, Switch)] = &[
    ("auto", Switch::Auto),
    ("on", Switch::On),
    ("off", Switch::Off),
];
const XDP_MODES: &[(&str, XdpMode)] = &[
    ("auto", XdpMode::Auto),
    ("zerocopy", XdpMode::Zerocopy),
    ("copy", XdpMode::Copy),
    ("generic", XdpMode::Generic),
];
const SCOPES: &[(&str, Scope)] = &[
    ("auto", Scope::Auto),
    ("pods", Scope::Pods),
    ("host", Scope::Host),
];
/// The empty word is kube-proxy's default.
const LOG_FORMATS: &[(&str, LogFormat)] = &[
    ("", LogFormat::Text),
    ("text", LogFormat::Text),
    ("json", LogFormat::Json),
];
const SCHEDULERS: &[(&str, &str)] = &[
    ("", ""),
    ("rr", "rr"),
    ("wrr", "wrr"),
    ("lc", "lc"),
    ("wlc", "wlc"),
    ("sh", "sh"),
    ("dh", "dh"),
    ("sed", "sed"),
    ("nq", "nq"),
    ("maglev", "maglev"),
    ("mh", "maglev"),
    ("random", "random"),
];
const WITHOUT_EFFECT: &[&str] = &[
    "featureGates",
    "bindAddress",
    "bindAddressHardFail",
    "configSyncPeriod",
    "enableProfiling",
    "oomScoreAdj",
    "portRange",
    "showHiddenMetricsForVersion",
    "windowsRunAsService",
    "winkernel",
];

const DEFAULT_MASQUERADE_BIT: u8 = 14;
/// Free of kube-proxy's bits (14, 15) and of the upper half, which CNIs use.
const DEFAULT_MARK_BIT: u8 = 13;
const DEFAULT_SNAT_PORTS: PortRange = PortRange {
    first: 1024,
    last: 29_999,
};
const DEFAULT_POD_INTERFACES: [&str; 4] = ["veth*", "cali*", "lxc*", "eni*"];
const DEFAULT_SPIN_MICROS: u32 = 50;
const DEFAULT_WORKERS: usize = 4;
const MAX_WORKERS: u16 = 64;
const DEFAULT_FLOWS: u32 = 131_072;
const MIN_FLOWS: u32 = 1_024;
const MAX_FLOWS: u32 = 1 << 24;
