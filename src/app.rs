//! The composition root: takes the state folder, starts engine, control and admin server, waits for
//! SIGTERM and stops them in the reverse order.
//!
//! Control drives: it tells which devices there are and what is to be served; the engine follows on
//! control's thread. What is changed on the node is written into the journal before.

use std::io::Read;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use control::ClusterConfig;
use control::health::HealthChecks;
use control::links::{Link, LinkEvent};
use control::run::{RunConfig, Update};
use control::snapshot::DeviceRole;
use dataplane::engine::{Engine, EngineView};
use dataplane::steering::DeviceKind;
use metrics_exporter_prometheus::PrometheusBuilder;
use parking_lot::{Mutex, RwLock};
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Readiness, Sources};
use crate::config::{Config, Scope, Source, Switch};
use crate::devices::{self, Roles};
use crate::journal::{Change, Journal};
use crate::state::StateFolder;
use crate::{observe, ports, report, telemetry, undo};

/// Runs until SIGTERM.
pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    telemetry::start(config.logging);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    if let control::Source::Cluster(cluster) = source(&config) {
        cluster.check()?;
    }
    let node_addresses = node_addresses(&config)?;
    let folder = StateFolder::open(&config.state_dir)?;
    let mut journal = Journal::open(folder.path())?;
    take_back(&mut journal)?;
    let metrics = PrometheusBuilder::new().install_recorder()?;

    let (engine, roles, reason) =
        start_engine(&config, &node_addresses, folder.path(), &mut journal)?;
    let served = Arc::new(RwLock::new(Served::default()));
    let view = engine.as_ref().map(Engine::view);
    let admin = admin::start(
        config.admin_address,
        config.healthz_address,
        sources(&config, view.clone(), reason, &served, metrics)?,
    );
    let admin = match admin {
        Ok(admin) => admin,
        Err(error) => {
            stop_engine(engine, &mut journal)?;
            return Err(error.into());
        }
    };
    let checks = health_checks(&config, view, &served);
    let engine = Arc::new(Mutex::new(engine));
    let running = control::run::spawn(
        run_config(&config, engine.lock().is_some()),
        follow(Arc::clone(&engine), roles, Arc::clone(&served)),
        publish(Arc::clone(&engine), Arc::clone(&served), checks),
    )?;
    tracing::info!(node = config.node, admin = %admin.address(), healthz = ?admin.healthz_address(), "started");

    let waited = wait_for_stop(|| running.is_finished());
    let controlled = running.stop();
    admin.stop();
    let engine = engine.lock().take();
    stop_engine(engine, &mut journal)?;
    if journal.changes().is_empty() {
        folder.remove()?;
    }
    waited?;
    Ok(controlled?)
}

/// What control published last.
#[derive(Debug)]
struct Served {
    update: Option<Update>,
    epoch: u64,
    updated: SystemTime,
    /// By device: why it is not steered.
    refused: std::collections::BTreeMap<u32, String>,
    /// Why the last publication is not complete.
    incomplete: Option<String>,
}

impl Default for Served {
    fn default() -> Self {
        Self {
            update: None,
            epoch: 0,
            updated: SystemTime::now(),
            refused: std::collections::BTreeMap::new(),
            incomplete: None,
        }
    }
}

impl Served {
    fn problems(&self) -> Vec<String> {
        let rejected = self
            .update
            .iter()
            .flat_map(|update| &update.resolved.rejected);
        let rejected = rejected.map(|object| {
            let place = match object.namespace.as_str() {
                "" => object.name.clone(),
                namespace => format!("{namespace}/{}", object.name),
            };
            format!("{} {place}: {}", object.kind, object.reason)
        });
        self.refused
            .values()
            .cloned()
            .chain(self.incomplete.clone())
            .chain(rejected)
            .collect()
    }
}

/// Where control takes objects from.
fn source(config: &Config) -> control::Source {
    match &config.source {
        Source::Manifests(folder) => control::Source::Manifests(folder.clone()),
        Source::Cluster { kubeconfig } => {
            let cluster = ClusterConfig::new(kubeconfig.clone(), &config.node);
            control::Source::Cluster(cluster)
        }
    }
}

/// What the Node object lists, where the engine needs it to find its uplink.
fn node_addresses(config: &Config) -> anyhow::Result<Vec<IpAddr>> {
    if config.engine.enabled == Switch::Off || !config.engine.uplinks.is_empty() {
        return Ok(Vec::new());
    }
    Ok(match source(config) {
        control::Source::Manifests(folder) => {
            let resolved = control::resolve_folder(&folder, &config.control())?;
            resolved.node_addresses.clone()
        }
        control::Source::Cluster(cluster) => cluster.node_addresses()?,
    })
}

/// Starts the engine where it shall and can run; else says why not.
fn start_engine(
    config: &Config,
    node_addresses: &[IpAddr],
    folder: &Path,
    journal: &mut Journal,
) -> anyhow::Result<(Option<Engine>, Roles, String)> {
    let off = |reason: String| (None, Roles::default(), reason);
    if config.engine.enabled == Switch::Off {
        return Ok(off("switched off by the configuration".to_owned()));
    }
    let started = try_engine(config, node_addresses, folder, journal);
    match started {
        Ok((engine, roles)) => Ok((Some(engine), roles, "uplinks can do native XDP".to_owned())),
        Err(error) => {
            take_back(journal)?;
            if config.engine.enabled == Switch::On {
                return Err(error.context("the engine cannot start"));
            }
            let reason = format!("{error:#}");
            tracing::warn!("the engine stays off: {reason}");
            Ok(off(reason))
        }
    }
}

fn try_engine(
    config: &Config,
    node_addresses: &[IpAddr],
    folder: &Path,
    journal: &mut Journal,
) -> anyhow::Result<(Engine, Roles)> {
    let uplinks = devices::uplinks(config, node_addresses)?;
    let reserved = ports::prepare(&config.engine.snat_ports, journal)?;
    for uplink in &uplinks {
        journal.record(Change::Programs {
            device: uplink.name.clone(),
        })?;
    }
    journal.record(Change::Device {
        name: undo::HOST_PORT.to_owned(),
    })?;
    let roles = Roles::new(&uplinks, &config.engine.pod_interfaces);
    let engine = Engine::start(&config.engine(uplinks, reserved, folder, seed()?))?;
    Ok((engine, roles))
}

/// Ends the engine and takes back what is written in the journal.
fn stop_engine(engine: Option<Engine>, journal: &mut Journal) -> anyhow::Result<()> {
    let stopped = engine.map_or(Ok(()), Engine::stop);
    take_back(journal)?;
    stopped.context("the engine did not leave the node as it was")
}

fn take_back(journal: &mut Journal) -> anyhow::Result<()> {
    for failure in journal.undo(undo::change)? {
        tracing::warn!(
            "{} stays: {}; run `sluice cleanup`",
            failure.change,
            failure.reason
        );
    }
    Ok(())
}

fn run_config(config: &Config, engine_on: bool) -> RunConfig {
    let host_scope = engine_on && config.scope() == Scope::Host;
    RunConfig {
        control: config.control(),
        source: source(config),
        // The interval spares the kernel's rule tools; the engine needs no sparing.
        min_interval: config.min_sync_period.min(BURST),
        snat_addresses: config.engine.snat_addresses.clone(),
        host_scope: host_scope.then(|| undo::HOST_PORT.to_owned()),
    }
}

/// Steers the devices that come and lets go of those that leave.
fn follow(
    engine: Arc<Mutex<Option<Engine>>>,
    roles: Roles,
    served: Arc<RwLock<Served>>,
) -> impl FnMut(&LinkEvent) -> DeviceRole + Send + 'static {
    move |event| {
        let mut engine = engine.lock();
        let Some(engine) = engine.as_mut() else {
            return DeviceRole::default();
        };
        let link = event.link();
        served.write().refused.remove(&link.ifindex);
        let followed = match event {
            LinkEvent::Gone(_) => engine.leave(link.ifindex).map(|()| DeviceRole::default()),
            LinkEvent::Appeared(link) | LinkEvent::Changed(link) => take_up(engine, &roles, link),
        };
        followed.unwrap_or_else(|error| {
            tracing::warn!(device = link.name, "not steered: {error}");
            served
                .write()
                .refused
                .insert(link.ifindex, format!("{}: {error}", link.name));
            DeviceRole::default()
        })
    }
}

fn take_up(
    engine: &mut Engine,
    roles: &Roles,
    link: &Link,
) -> Result<DeviceRole, dataplane::engine::EngineError> {
    let (role, kind) = roles.of(link);
    match kind {
        Some(kind) => engine.steer(link.ifindex, kind, link.mac.unwrap_or_default())?,
        // It is attached since the start: only its MAC may be new.
        None if role.uplink.is_some() => {
            engine.steer(
                link.ifindex,
                DeviceKind::Uplink,
                link.mac.unwrap_or_default(),
            )?;
        }
        None if link.name != undo::HOST_PORT => {
            engine.leave(link.ifindex)?;
        }
        None => {}
    }
    Ok(role)
}

/// Hands what control resolved to the engine.
fn publish(
    engine: Arc<Mutex<Option<Engine>>>,
    served: Arc<RwLock<Served>>,
    mut checks: HealthChecks,
) -> impl FnMut(Update) + Send + 'static {
    move |update| {
        let published = engine
            .lock()
            .as_mut()
            .map(|engine| engine.publish(&update.snapshot));
        let mut served = served.write();
        served.updated = SystemTime::now();
        served.incomplete = None;
        match published {
            Some(Ok(epoch)) => served.epoch = epoch,
            Some(Err(error)) => {
                tracing::error!("the steering does not know all frontends: {error}");
                served.incomplete = Some(error.to_string());
            }
            None => {}
        }
        checks.follow(&update.resolved);
        served.update = Some(update);
    }
}

/// What load balancers ask, on the addresses that node ports answer on.
fn health_checks(
    config: &Config,
    view: Option<EngineView>,
    served: &Arc<RwLock<Served>>,
) -> HealthChecks {
    let (grace, served) = (config.engine.grace, Arc::clone(served));
    HealthChecks::new(config.control().node_port_addresses, move || {
        readiness(view.as_ref(), grace, &served.read()).ready
    })
}

fn sources(
    config: &Config,
    view: Option<EngineView>,
    reason: String,
    served: &Arc<RwLock<Served>>,
    metrics: metrics_exporter_prometheus::PrometheusHandle,
) -> anyhow::Result<Sources> {
    let grace = config.engine.grace;
    let mirror = config.served_mirror().name();
    let mirror_reason = if config.mirror == config.served_mirror() {
        String::new()
    } else {
        format!("{} was asked for and is not built", config.mirror.name())
    };
    let readiness = {
        let (view, served) = (view.clone(), Arc::clone(served));
        move || readiness(view.as_ref(), grace, &served.read())
    };
    let ready = readiness.clone();
    let status = {
        let (view, served) = (view.clone(), Arc::clone(served));
        move || {
            let mut status = report::Status {
                ready: readiness().ready,
                problems: served.read().problems(),
                ..empty_status(mirror, mirror_reason.clone(), reason.clone())
            };
            if let Some(view) = &view {
                observe::engine(view, grace, &mut status);
            }
            status
        }
    };
    let flows = {
        let view = view.clone();
        move || view.as_ref().map(observe::flows).unwrap_or_default()
    };
    let services = {
        let served = Arc::clone(served);
        move || {
            let resolved = served
                .read()
                .update
                .as_ref()
                .map(|update| Arc::clone(&update.resolved));
            let entries = resolved.map(|resolved| resolved.to_resolution().services);
            let entries = entries.unwrap_or_default();
            match &view {
                Some(view) => observe::services(&entries, view),
                None => observe::services_without_engine(&entries),
            }
        }
    };
    Ok(Sources {
        status: Box::new(status),
        services: Box::new(services),
        flows: Box::new(flows),
        ready: Box::new(ready),
        metrics,
        config: serde_json::to_value(config)?,
        proxy_mode: mirror,
    })
}

fn readiness(view: Option<&EngineView>, grace: Duration, served: &Served) -> Readiness {
    let late = served.updated.elapsed().is_ok_and(|age| age > LATE);
    let reason = match view {
        _ if served.update.is_none() => "nothing was published yet",
        Some(view) if observe::is_stale(view, grace) => "a worker of the engine hangs",
        Some(view) if view.acknowledged() < served.epoch && late => {
            "a worker does not take up what was published"
        }
        _ => "",
    };
    Readiness {
        ready: reason.is_empty(),
        reason: reason.to_owned(),
        updated: served.updated,
    }
}

fn empty_status(mirror: &str, mirror_reason: String, reason: String) -> report::Status {
    report::Status {
        api_version: report::ApiVersion::V1,
        kind: report::StatusKind::Status,
        version: telemetry::VERSION.to_owned(),
        ready: false,
        mirror: report::Mirror {
            mode: mirror.to_owned(),
            in_sync: true,
            reason: mirror_reason,
        },
        engine: report::Engine {
            state: report::EngineState::Off,
            reason,
            locked_bytes: 0,
        },
        epoch: 0,
        uplinks: Vec::new(),
        host_port: report::HostPort::default(),
        workers: Vec::new(),
        problems: Vec::new(),
    }
}

/// Secrets and seeds of this start.
fn seed() -> anyhow::Result<[u64; 4]> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .context("cannot read random numbers from /dev/urandom")?;
    let mut words = bytes.chunks_exact(8);
    Ok(std::array::from_fn(|_| {
        let word = words
            .next()
            .and_then(|word| word.try_into().ok())
            .unwrap_or_default();
        u64::from_ne_bytes(word)
    }))
}

/// Waits for SIGTERM or SIGINT, or until control has ended by itself.
fn wait_for_stop(has_ended: impl Fn() -> bool) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        let mut look = tokio::time::interval(Duration::from_millis(500));
        loop {
            tokio::select! {
                _ = terminate.recv() => return Ok(()),
                _ = interrupt.recv() => return Ok(()),
                _ = look.tick() => if has_ended() {
                    return Ok(());
                },
            }
        }
    })
}

/// Changes of Services that come closer together are published together.
const BURST: Duration = Duration::from_millis(100);
/// A worker that has not seen a published state for so long does not see any.
const LATE: Duration = Duration::from_secs(1);
