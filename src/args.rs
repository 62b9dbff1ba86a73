//! The command line as typed. Nothing is derived here: what an argument means, and whether it is
//! right, is decided in `config`, so that a flag and a key of the file fail with the same words.
//!
//! kube-proxy's flags come from one table, each with the key of the configuration file it stands for.

use std::net::SocketAddr;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, ValueParser};
use clap::{
    Arg, ArgAction, ArgGroup, ArgMatches, Args, FromArgMatches, Parser, Subcommand, ValueEnum,
};

/// sluice: a service proxy for one Kubernetes node, with a userspace engine.
#[derive(Debug, Parser)]
#[command(name = "sluice", version, about, propagate_version = true)]
pub(crate) struct CommandLine {
    #[command(subcommand)]
    pub(crate) command: Command,
    /// How results are printed.
    #[arg(short, long, global = true, value_enum, default_value_t = Output::Table)]
    pub(crate) output: Output,
}

/// What a command prints: a table for people, JSON for programs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    Table,
    Json,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve the node's Services until SIGTERM.
    #[command(group = source())]
    Run(Settings),
    /// Print what would be served from a folder of manifests; touches nothing.
    #[command(mut_arg("manifests", |arg| arg.required(true)))]
    Resolve(Settings),
    /// Print what would happen to the first packet of a connection; touches nothing.
    #[command(mut_arg("manifests", |arg| arg.required(true)))]
    Trace(TraceArgs),
    /// Print the state of the running sluice.
    Status(ClientArgs),
    /// Print the Services that the running sluice serves.
    Services(ClientArgs),
    /// Print the flows that the running sluice's engine holds.
    Flows(ClientArgs),
    /// Remove what an ended sluice left on this node.
    Cleanup(CleanupArgs),
    /// Work on configuration files.
    #[command(subcommand)]
    Config(ConfigCommand),
}

#[derive(Debug, Subcommand)]
pub(crate) enum ConfigCommand {
    /// Say every mistake in a configuration file.
    Check {
        /// The file, a KubeProxyConfiguration.
        file: PathBuf,
    },
}

/// Where objects and settings come from.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct Settings {
    /// KubeProxyConfiguration v1alpha1, with our own keys in its block `sluice:`.
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
    /// Folder of Service, EndpointSlice, Endpoints and Node objects (YAML, JSON).
    #[arg(long, value_name = "DIR")]
    pub(crate) manifests: Option<PathBuf>,
    /// Name of this node.
    #[arg(long, value_name = "NAME")]
    pub(crate) node: Option<String>,
    /// Device whose packets the engine takes; may be repeated.
    #[arg(long = "uplink", value_name = "IFACE")]
    pub(crate) uplinks: Vec<String>,
    /// Whether the engine runs: auto, on or off.
    #[arg(long, value_name = "auto|on|off")]
    pub(crate) engine: Option<String>,
    /// The mirror: nftables, iptables, ipvs or none.
    #[arg(long, value_name = "MODE")]
    pub(crate) mode: Option<String>,
    /// Ranges of pod addresses, separated by commas.
    #[arg(long, value_name = "CIDRS")]
    pub(crate) cluster_cidr: Option<String>,
    /// Folder of lock, undo journal and flow slab.
    #[arg(long, value_name = "DIR")]
    pub(crate) state_dir: Option<String>,
    /// Address of metrics, status and page.
    #[arg(long, value_name = "HOST:PORT")]
    pub(crate) admin_address: Option<String>,
    #[command(flatten)]
    pub(crate) kube_proxy: KubeProxyFlags,
}

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    #[command(flatten)]
    pub(crate) settings: Settings,
    /// Source of the packet.
    #[arg(long, value_name = "A:P")]
    pub(crate) src: SocketAddr,
    /// Destination of the packet.
    #[arg(long, value_name = "A:P")]
    pub(crate) dst: SocketAddr,
    /// Transport protocol of the packet.
    #[arg(long, value_enum)]
    pub(crate) proto: Proto,
    /// The side the packet comes from.
    #[arg(long, value_enum, default_value_t = From::Uplink)]
    pub(crate) from: From,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Proto {
    Tcp,
    Udp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum From {
    Uplink,
    Host,
    Pod,
}

#[derive(Debug, Args)]
pub(crate) struct ClientArgs {
    /// Where the running sluice answers.
    #[arg(long, value_name = "HOST:PORT", default_value = DEFAULT_ADMIN_ADDRESS)]
    pub(crate) admin_address: String,
}

#[derive(Debug, Args)]
pub(crate) struct CleanupArgs {
    /// Say what would be removed, remove nothing.
    #[arg(long)]
    pub(crate) dry_run: bool,
    /// Folder of lock, undo journal and flow slab.
    #[arg(long, value_name = "DIR", default_value = DEFAULT_STATE_DIR)]
    pub(crate) state_dir: PathBuf,
}

/// kube-proxy's flags that were given, in the order of the table.
#[derive(Clone, Debug, Default)]
pub(crate) struct KubeProxyFlags(pub(crate) Vec<(&'static KubeProxyFlag, String)>);

/// One flag of kube-proxy.
#[derive(Debug)]
pub(crate) struct KubeProxyFlag {
    pub(crate) name: &'static str,
    /// The key of the configuration file that the flag sets; empty: accepted and ignored.
    pub(crate) key: &'static str,
    pub(crate) shape: Shape,
}

/// How the text of a flag becomes a value of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shape {
    Text,
    Number,
    Switch,
    /// Separated by commas.
    List,
    /// `name=value`, separated by commas.
    Pairs,
}

impl KubeProxyFlag {
    fn arg(&self) -> Arg {
        let arg = Arg::new(self.name)
            .long(self.name)
            .action(ArgAction::Set)
            .overrides_with(self.name)
            .help_heading("kube-proxy's flags");
        let arg = if self.name == "v" {
            arg.short('v')
        } else {
            arg
        };
        let arg = match self.key {
            "" => arg.help("Accepted and ignored"),
            key => arg.help(format!("Sets `{key}`")),
        };
        match self.shape {
            Shape::Switch => arg
                .num_args(0..=1)
                .require_equals(true)
                .default_missing_value("true")
                .value_parser(PossibleValuesParser::new(["true", "false"])),
            _ => arg.value_name("VALUE").value_parser(ValueParser::string()),
        }
    }
}

impl FromArgMatches for KubeProxyFlags {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let given = KUBE_PROXY_FLAGS.iter().filter_map(|flag| {
            let value = matches.get_one::<String>(flag.name)?;
            Some((flag, value.clone()))
        });
        Ok(Self(given.collect()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for KubeProxyFlags {
    fn augment_args(command: clap::Command) -> clap::Command {
        command.args(KUBE_PROXY_FLAGS.iter().map(KubeProxyFlag::arg))
    }

    fn augment_args_for_update(command: clap::Command) -> clap::Command {
        Self::augment_args(command)
    }
}

/// Where the admin server listens and clients look for it, unless told otherwise.
pub(crate) const DEFAULT_ADMIN_ADDRESS: &str = "127.0.0.1:10249";
/// Where lock, journal and flow slab are kept, unless told otherwise.
pub(crate) const DEFAULT_STATE_DIR: &str = "/run/sluice";

/// What tells `run` where objects come from.
fn source() -> ArgGroup {
    let sources = ["config", "manifests", "kubeconfig", "master"];
    ArgGroup::new("source")
        .args(sources)
        .required(true)
        .multiple(true)
}

const fn flag(name: &'static str, key: &'static str, shape: Shape) -> KubeProxyFlag {
    KubeProxyFlag { name, key, shape }
}

/// Every flag of kube-proxy that has a meaning beside `--config`.
pub(crate) const KUBE_PROXY_FLAGS: &[KubeProxyFlag] = &[
    flag("bind-address", "bindAddress", Shape::Text),
    flag(
        "bind-address-hard-fail",
        "bindAddressHardFail",
        Shape::Switch,
    ),
    flag("config-sync-period", "configSyncPeriod", Shape::Text),
    flag(
        "conntrack-max-per-core",
        "conntrack.maxPerCore",
        Shape::Number,
    ),
    flag("conntrack-min", "conntrack.min", Shape::Number),
    flag(
        "conntrack-tcp-be-liberal",
        "conntrack.tcpBeLiberal",
        Shape::Switch,
    ),
    flag(
        "conntrack-tcp-timeout-close-wait",
        "conntrack.tcpCloseWaitTimeout",
        Shape::Text,
    ),
    flag(
        "conntrack-tcp-timeout-established",
        "conntrack.tcpEstablishedTimeout",
        Shape::Text,
    ),
    flag("conntrack-udp-timeout", "conntrack.udpTimeout", Shape::Text),
    flag(
        "conntrack-udp-timeout-stream",
        "conntrack.udpStreamTimeout",
        Shape::Text,
    ),
    flag("detect-local-mode", "detectLocalMode", Shape::Text),
    flag("feature-gates", "featureGates", Shape::Pairs),
    flag("healthz-bind-address", "healthzBindAddress", Shape::Text),
    flag("hostname-override", "hostnameOverride", Shape::Text),
    flag(
        "iptables-localhost-nodeports",
        "iptables.localhostNodePorts",
        Shape::Switch,
    ),
    flag(
        "iptables-masquerade-bit",
        "iptables.masqueradeBit",
        Shape::Number,
    ),
    flag(
        "iptables-min-sync-period",
        "iptables.minSyncPeriod",
        Shape::Text,
    ),
    flag("iptables-sync-period", "iptables.syncPeriod", Shape::Text),
    flag("ipvs-exclude-cidrs", "ipvs.excludeCIDRs", Shape::List),
    flag("ipvs-min-sync-period", "ipvs.minSyncPeriod", Shape::Text),
    flag("ipvs-scheduler", "ipvs.scheduler", Shape::Text),
    flag("ipvs-strict-arp", "ipvs.strictARP", Shape::Switch),
    flag("ipvs-sync-period", "ipvs.syncPeriod", Shape::Text),
    flag("ipvs-tcp-timeout", "ipvs.tcpTimeout", Shape::Text),
    flag("ipvs-tcpfin-timeout", "ipvs.tcpFinTimeout", Shape::Text),
    flag("ipvs-udp-timeout", "ipvs.udpTimeout", Shape::Text),
    flag("kube-api-burst", "clientConnection.burst", Shape::Number),
    flag(
        "kube-api-content-type",
        "clientConnection.contentType",
        Shape::Text,
    ),
    flag("kube-api-qps", "clientConnection.qps", Shape::Number),
    flag("kubeconfig", "clientConnection.kubeconfig", Shape::Text),
    flag("log-flush-frequency", "logging.flushFrequency", Shape::Text),
    flag("logging-format", "logging.format", Shape::Text),
    flag("masquerade-all", "iptables.masqueradeAll", Shape::Switch),
    flag("master", "", Shape::Text),
    flag("metrics-bind-address", "metricsBindAddress", Shape::Text),
    flag("nodeport-addresses", "nodePortAddresses", Shape::List),
    flag("oom-score-adj", "oomScoreAdj", Shape::Number),
    flag(
        "pod-bridge-interface",
        "detectLocal.bridgeInterface",
        Shape::Text,
    ),
    flag(
        "pod-interface-name-prefix",
        "detectLocal.interfaceNamePrefix",
        Shape::Text,
    ),
    flag("profiling", "enableProfiling", Shape::Switch),
    flag("proxy-mode", "mode", Shape::Text),
    flag(
        "show-hidden-metrics-for-version",
        "showHiddenMetricsForVersion",
        Shape::Text,
    ),
    flag("v", "logging.verbosity", Shape::Number),
    flag("vmodule", "", Shape::Text),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(words: &[&str]) -> Settings {
        let line = ["sluice", "run", "--manifests=/x"].iter().chain(words);
        let Command::Run(settings) = CommandLine::try_parse_from(line).unwrap().command else {
            panic!("`run` parses to another command")
        };
        settings
    }

    #[test]
    fn the_definition_of_the_command_line_holds() {
        use clap::CommandFactory;
        CommandLine::command().debug_assert();
    }

    #[test]
    fn flags_of_kube_proxy_are_taken_in_all_their_spellings() {
        let settings = settings(&[
            "--hostname-override=n1",
            "--v=2",
            "--masquerade-all",
            "--ipvs-strict-arp=false",
            "--proxy-mode",
            "ipvs",
        ]);
        let given: Vec<_> = settings
            .kube_proxy
            .0
            .iter()
            .map(|(flag, value)| (flag.key, value.as_str()))
            .collect();
        assert_eq!(
            given,
            [
                ("hostnameOverride", "n1"),
                ("ipvs.strictARP", "false"),
                ("iptables.masqueradeAll", "true"),
                ("mode", "ipvs"),
                ("logging.verbosity", "2"),
            ]
        );
    }

    #[test]
    fn the_last_of_a_repeated_flag_counts() {
        let settings = settings(&["-v", "2", "-v", "4"]);
        assert_eq!(settings.kube_proxy.0[0].1, "4");
    }

    #[test]
    fn a_run_without_a_source_of_objects_is_refused() {
        let error = CommandLine::try_parse_from(["sluice", "run"]).unwrap_err();
        assert!(error.to_string().contains("--manifests"), "{error}");
        CommandLine::try_parse_from(["sluice", "run", "--kubeconfig=/x"]).unwrap();
        CommandLine::try_parse_from(["sluice", "resolve", "--config=/x"]).unwrap_err();
    }

    #[test]
    fn uplinks_add_up() {
        assert_eq!(
            settings(&["--uplink", "a", "--uplink=b"]).uplinks,
            ["a", "b"]
        );
    }

    #[test]
    fn output_goes_before_or_after_the_command() {
        for line in [
            ["sluice", "-o", "json", "status"],
            ["sluice", "status", "-o", "json"],
        ] {
            assert_eq!(
                CommandLine::try_parse_from(line).unwrap().output,
                Output::Json
            );
        }
    }
}
