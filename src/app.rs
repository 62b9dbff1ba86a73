//! The composition root: takes the state folder, starts the parts, waits for SIGTERM and stops
//! them in the reverse order.

use std::time::SystemTime;

use anyhow::Context;
use metrics_exporter_prometheus::PrometheusBuilder;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Readiness, Sources};
use crate::config::Config;
use crate::journal::Journal;
use crate::report;
use crate::state::StateFolder;
use crate::{telemetry, undo};

pub(crate) fn run(config: Config) -> anyhow::Result<()> {
    telemetry::start(config.logging);
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    let folder = StateFolder::open(&config.state_dir)?;
    let mut journal = Journal::open(folder.path())?;
    for failure in journal.undo(undo::change)? {
        tracing::warn!(
            "{} of an earlier run stays: {}",
            failure.change,
            failure.reason
        );
    }
    let metrics = PrometheusBuilder::new().install_recorder()?;
    let sources = Sources {
        status: Box::new({
            let mode = config.served_mirror().name().to_owned();
            move || status(&mode)
        }),
        services: Box::new(report::ServiceStates::default),
        flows: Box::new(report::FlowList::default),
        ready: Box::new(|| Readiness {
            ready: false,
            reason: "the engine is not started".to_owned(),
            updated: SystemTime::now(),
        }),
        metrics,
        config: serde_json::to_value(&config)?,
        proxy_mode: config.served_mirror().name(),
    };
    let admin = admin::start(config.admin_address, config.healthz_address, sources)?;
    tracing::info!(node = config.node, admin = %admin.address(), healthz = ?admin.healthz_address(), "started");
    wait_for_stop()?;
    admin.stop();
    Ok(())
}

fn status(mode: &str) -> report::Status {
    report::Status {
        api_version: report::ApiVersion::V1,
        kind: report::StatusKind::Status,
        version: telemetry::VERSION.to_owned(),
        ready: false,
        mirror: report::Mirror {
            mode: mode.to_owned(),
            in_sync: true,
            reason: String::new(),
        },
        engine: report::Engine {
            state: report::EngineState::Off,
            reason: String::new(),
            locked_bytes: 0,
        },
        epoch: 0,
        uplinks: Vec::new(),
        host_port: report::HostPort::default(),
        workers: Vec::new(),
        problems: Vec::new(),
    }
}

fn wait_for_stop() -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        Ok(())
    })
}
