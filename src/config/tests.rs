use super::*;
use crate::args::{Command, CommandLine};
use clap::Parser;

/// `run` in file mode with this configuration text and these further arguments.
fn load(text: &str, words: &[&str]) -> Result<Config, ConfigError> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap();
    let line = [
        "sluice",
        "run",
        "--manifests=/m",
        "--node=n1",
        "--config",
        path,
    ];
    let line = CommandLine::try_parse_from(line.iter().chain(words)).unwrap();
    let Command::Run(settings) = line.command else {
        panic!("`run` parses to another command")
    };
    Config::load(&settings)
}

fn mistakes(text: &str) -> Vec<String> {
    match load(text, &[]) {
        Err(ConfigError::Mistakes { mistakes, .. }) => {
            mistakes.iter().map(ToString::to_string).collect()
        }
        Err(error) => panic!("another error: {error}"),
        Ok(_) => Vec::new(),
    }
}

fn warnings(text: &str) -> Vec<String> {
    let config = load(text, &["--mode=none"]).unwrap();
    config.warnings.iter().map(ToString::to_string).collect()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

#[test]
fn without_a_word_the_defaults_hold() {
    let config = load("", &[]).unwrap();
    assert_eq!(config.source, Source::Manifests("/m".into()));
    assert_eq!(config.node, "n1");
    assert_eq!(config.mirror, MirrorMode::Nftables);
    assert_eq!(config.engine.enabled, Switch::Auto);
    assert_eq!(config.engine.xdp, XdpMode::Auto);
    assert_eq!(config.engine.grace, Duration::from_millis(200));
    assert_eq!(config.engine.hold, seconds(30));
    assert_eq!(
        config.engine.snat_ports,
        PortRange {
            first: 1024,
            last: 29_999
        }
    );
    assert_eq!(
        config.engine.pod_interfaces,
        ["veth*", "cali*", "lxc*", "eni*"]
    );
    assert!((1..=4).contains(&config.engine.workers));
    assert!(config.engine.flows >= 131_072);
    assert!(config.engine.ping_vip);
    assert_eq!(config.admin_address.to_string(), "127.0.0.1:10249");
    assert_eq!(config.healthz_address, None);
    assert_eq!(config.state_dir, PathBuf::from("/run/sluice"));
    assert_eq!(config.scheduler, "rr");
    assert_eq!(config.min_sync_period, seconds(1));
    assert_eq!(config.detect_local, DetectLocal::ClusterCidr);
    assert_eq!(config.node_port_addresses, NodePortAddresses::All);
    assert_eq!(config.engine.timeouts.tcp_established, seconds(86_400));
}

#[test]
fn without_a_mirror_the_engine_serves_host_processes_too() {
    assert_eq!(load("", &[]).unwrap().scope(), Scope::Host);
    let pods = "sluice: {engine: {scope: pods}}";
    assert_eq!(load(pods, &[]).unwrap().scope(), Scope::Pods);
}

#[test]
fn a_file_as_kubeadm_writes_it_is_taken_without_a_complaint() {
    let text = r#"
apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;
    assert_eq!(mistakes(text), [""; 0]);
    assert_eq!(warnings(text), [""; 0]);
    let config = load(text, &[]).unwrap();
    assert_eq!(config.cluster_cidrs.len(), 2);
    assert_eq!(config.engine.timeouts.udp, seconds(30));
}

#[test]
fn every_key_has_its_effect() {
    let text = "
mode: none
healthzBindAddress: 0.0.0.0:10256
metricsBindAddress: 127.0.0.2
hostnameOverride: other
clusterCIDR: 10.244.0.0/16
detectLocalMode: InterfaceNamePrefix
detectLocal: {interfaceNamePrefix: cali}
nodePortAddresses: [192.0.2.0/24]
iptables: {masqueradeAll: true, masqueradeBit: 20, syncPeriod: 40s, minSyncPeriod: 2s}
conntrack: {maxPerCore: 0, min: 5000, tcpEstablishedTimeout: 1h, tcpCloseWaitTimeout: 5m,
            udpTimeout: 10s, udpStreamTimeout: 40s}
ipvs: {scheduler: mh}
logging: {format: json, verbosity: 4}
sluice:
  stateDir: /tmp/s
  engine:
    enabled: off
    uplinks: [eth0, eth1]
    workers: 3
    xdp: copy
    scope: pods
    graceMs: 100
    holdMs: 1000
    markBit: 21
    snatPorts: 2000-2999
    snatAddress: [192.0.2.7, 'fd00::7']
    podInterfaces: [pod*]
    pingVip: false
    spinMicros: 0
    timeouts: {tcpFin: 2s, udp: 3s}
";
    let mut config = load(text, &[]).unwrap();
    assert_eq!(config.node, "n1", "the flag wins");
    assert_eq!(config.mirror, MirrorMode::None);
    assert_eq!(config.healthz_address.unwrap().to_string(), "0.0.0.0:10256");
    assert_eq!(config.admin_address.to_string(), "127.0.0.2:10249");
    assert_eq!(
        config.detect_local,
        DetectLocal::InterfaceNamePrefix("cali".to_owned())
    );
    assert!(
        matches!(config.node_port_addresses, NodePortAddresses::Within(ref within) if within.len() == 1)
    );
    assert!(config.masquerade_all);
    assert_eq!(
        (config.masquerade_bit, config.scheduler.as_str()),
        (20, "maglev")
    );
    assert_eq!(
        (config.sync_period, config.min_sync_period),
        (seconds(40), seconds(2))
    );
    assert_eq!(
        config.logging,
        Logging {
            format: LogFormat::Json,
            verbosity: 4
        }
    );
    assert_eq!(config.state_dir, PathBuf::from("/tmp/s"));
    config.warnings.clear();
    let expected = Engine {
        enabled: Switch::Off,
        uplinks: vec!["eth0".to_owned(), "eth1".to_owned()],
        workers: 3,
        xdp: XdpMode::Copy,
        scope: Scope::Pods,
        grace: Duration::from_millis(100),
        hold: seconds(1),
        mark_bit: 21,
        snat_ports: PortRange {
            first: 2000,
            last: 2999,
        },
        snat_addresses: vec!["192.0.2.7".parse().unwrap(), "fd00::7".parse().unwrap()],
        pod_interfaces: vec!["pod*".to_owned()],
        ping_vip: false,
        spin: Duration::ZERO,
        flows: 5000,
        timeouts: Timeouts {
            tcp_syn: seconds(120),
            tcp_syn_received: seconds(60),
            tcp_established: seconds(3600),
            tcp_fin: seconds(2),
            tcp_close_wait: seconds(300),
            tcp_last_ack: seconds(30),
            tcp_time_wait: seconds(120),
            tcp_close: seconds(10),
            udp: seconds(3),
            udp_stream: seconds(40),
            other: seconds(600),
        },
    };
    assert_eq!(config.engine, expected);
}

#[test]
fn every_mistake_is_named_not_only_the_first() {
    let text = "
apiVersion: v1
kind: Pod
mode: userspace
clusterCIDR: 10.244.0.0
detectLocalMode: BridgeInterface
nodePortAddresses: [primary, 10.0.0.0/8]
healthzBindAddress: 10256
conntrack: {min: -1}
ipvs: {scheduler: fastest}
iptables: {masqueradeBit: 32, syncPeriod: 30}
logging: {format: xml}
sluice:
  colour: blue
  engine:
    enabled: maybe
    uplinks: [eth0, eth0]
    workers: 0
    xdp: fast
    scope: all
    graceMs: 1
    markBit: 14
    snatPorts: 9-1
    snatAddress: [192.0.2.7, 192.0.2.8]
    podInterfaces: ['*']
    pingVip: perhaps
    spinMicros: x
    speed: 9
    timeouts: {udp: 30, sctp: 1s}
";
    let found = mistakes(text);
    let keys: Vec<_> = found
        .iter()
        .map(|mistake| mistake.split(": ").next().unwrap())
        .collect();
    let expected = [
        "apiVersion",
        "kind",
        "mode",
        "clusterCIDR",
        "detectLocalMode",
        "nodePortAddresses",
        "healthzBindAddress",
        "conntrack.min",
        "ipvs.scheduler",
        "iptables.masqueradeBit",
        "iptables.syncPeriod",
        "logging.format",
        "sluice.colour",
        "sluice.engine.enabled",
        "sluice.engine.uplinks",
        "sluice.engine.workers",
        "sluice.engine.xdp",
        "sluice.engine.scope",
        "sluice.engine.graceMs",
        "sluice.engine.markBit",
        "sluice.engine.snatPorts",
        "sluice.engine.snatAddress",
        "sluice.engine.podInterfaces",
        "sluice.engine.pingVip",
        "sluice.engine.spinMicros",
        "sluice.engine.speed",
        "sluice.engine.timeouts.udp",
        "sluice.engine.timeouts.sctp",
    ];
    for key in expected {
        assert_eq!(
            keys.iter().filter(|found| **found == key).count(),
            1,
            "{key}: {found:#?}"
        );
    }
    assert_eq!(found.len(), expected.len(), "{found:#?}");
}

#[test]
fn modes_that_exist_elsewhere_name_what_exists_here() {
    for mode in ["userspace", "kernelspace", "fast"] {
        let found = mistakes(&format!("mode: {mode}"));
        assert_eq!(found.len(), 1, "{found:?}");
        for word in [
            "mode: ",
            mode,
            "nftables, iptables, ipvs or none",
            "sluice.engine.enabled",
        ] {
            assert!(found[0].contains(word), "{word} in {}", found[0]);
        }
    }
}

#[test]
fn a_mirror_that_is_not_built_is_served_as_none_and_said() {
    for mode in ["''", "nftables", "iptables", "ipvs"] {
        let config = load(&format!("mode: {mode}"), &[]).unwrap();
        assert_eq!(config.served_mirror(), MirrorMode::None);
        assert!(
            config.warnings[0].reason.contains("served as none"),
            "{:?}",
            config.warnings
        );
    }
    assert_eq!(warnings("mode: none"), [""; 0]);
}

#[test]
fn unknown_keys_of_kube_proxy_are_warnings_that_name_them() {
    let found = warnings("newKey: 1\nconntrack: {newer: true}");
    let expected = [
        "conntrack.newer: true: unknown key, it has no effect",
        "newKey: 1: unknown key, it has no effect",
    ];
    assert_eq!(found, expected);
}

#[test]
fn flags_win_over_the_file_and_are_named_in_mistakes() {
    let text = "mode: ipvs\nmetricsBindAddress: 0.0.0.0:1\nsluice: {engine: {uplinks: [eth9]}}";
    let words = [
        "--mode=none",
        "--admin-address=127.0.0.1:7",
        "--uplink=eth0",
        "--uplink=eth1",
        "--engine=on",
        "--cluster-cidr=10.0.0.0/8",
        "--state-dir=/s",
        "--v=5",
        "--nodeport-addresses=primary",
        "--masquerade-all",
        "--conntrack-min=4000",
        "--feature-gates=A=true,B=false",
        "--healthz-bind-address=127.0.0.1",
    ];
    let config = load(text, &words).unwrap();
    assert_eq!(config.mirror, MirrorMode::None);
    assert_eq!(config.admin_address.to_string(), "127.0.0.1:7");
    assert_eq!(config.engine.uplinks, ["eth0", "eth1"]);
    assert_eq!(config.engine.enabled, Switch::On);
    assert_eq!(config.cluster_cidrs[0].to_string(), "10.0.0.0/8");
    assert_eq!(config.state_dir, PathBuf::from("/s"));
    assert_eq!(config.logging.verbosity, 5);
    assert_eq!(config.node_port_addresses, NodePortAddresses::Primary);
    assert!(config.masquerade_all);
    assert_eq!(
        config.healthz_address.unwrap().to_string(),
        "127.0.0.1:10256"
    );

    let error = load(text, &["--proxy-mode=userspace", "--v=x"])
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("\n  --proxy-mode: \"userspace\": "),
        "{error}"
    );
    assert!(
        error.contains("\n  --v: \"x\": must be a whole number"),
        "{error}"
    );
}

#[test]
fn the_ipvs_time_outs_count_in_mode_ipvs_only() {
    let text = "ipvs: {tcpTimeout: 15m, tcpFinTimeout: 50s, udpTimeout: 5m}";
    let elsewhere = load(text, &[]).unwrap().engine.timeouts;
    assert_eq!(elsewhere.tcp_established, seconds(86_400));
    let ipvs = load(text, &["--mode=ipvs"]).unwrap().engine.timeouts;
    assert_eq!(ipvs.tcp_established, seconds(900));
    assert_eq!((ipvs.tcp_fin, ipvs.udp), (seconds(50), seconds(300)));
}

#[test]
fn settings_that_do_not_go_together_are_refused() {
    let found = mistakes("mode: ipvs\nsluice: {engine: {scope: host}}");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("sluice.engine.scope: host: "),
        "{found:?}"
    );
}

#[test]
fn files_that_are_no_mapping_are_named_with_the_line() {
    let error = load("mode: [", &[]).unwrap_err().to_string();
    assert!(error.contains("line"), "{error}");
    let error = load("- a", &[]).unwrap_err().to_string();
    assert!(error.contains("one mapping"), "{error}");
    let missing = Settings {
        config: Some("/nowhere/x".into()),
        ..Settings::default()
    };
    let error = Config::load(&missing).unwrap_err().to_string();
    assert!(error.contains("/nowhere/x"), "{error}");
}

#[test]
fn in_the_cluster_health_answers_where_kube_proxys_does() {
    let settings = Settings {
        node: Some("N1".to_owned()),
        ..Settings::default()
    };
    let config = Config::load(&settings).unwrap();
    assert_eq!(config.source, Source::Cluster { kubeconfig: None });
    assert_eq!(config.healthz_address.unwrap().to_string(), "0.0.0.0:10256");
    assert_eq!(config.node, "n1");
}

#[test]
fn every_key_is_documented() {
    let document = document::Document::new(BTreeMap::new());
    read::config(&document, Map::new(), Some(Path::new("/m")));
    let known = document.known_keys();
    let page = include_str!("../../docs/configuration.md");
    let documented: Vec<_> = page
        .lines()
        .filter_map(|line| line.strip_prefix("| `"))
        .collect();
    let mut documented: Vec<_> = documented
        .iter()
        .filter_map(|line| line.split_once('`'))
        .map(|(key, _)| key)
        .collect();
    documented.sort_unstable();
    assert_eq!(documented, known);
}

#[test]
fn configz_shows_durations_as_the_file_spells_them() {
    let shown = serde_json::to_value(load("", &[]).unwrap()).unwrap();
    assert_eq!(shown["engine"]["grace"], "0.2s");
    assert_eq!(shown["engine"]["timeouts"]["tcpEstablished"], "86400s");
    assert_eq!(shown["minSyncPeriod"], "1s");
    let again = value::duration(&shown["engine"]["spin"]);
    assert_eq!(again, Ok(Duration::from_micros(50)));
}
