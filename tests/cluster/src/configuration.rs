//! The configuration's keys as the built kube-proxy itself lists them: none may be unknown to sluice.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use crate::control_plane::ControlPlane;
use crate::report::Report;

/// Lets kube-proxy write its defaults and sluice check them.
pub fn run(plane: &ControlPlane, sluice: &Path, report: &mut Report) {
    let outcome = check(plane, sluice);
    report.check("every key that kube-proxy writes is known", outcome);
}

fn check(plane: &ControlPlane, sluice: &Path) -> Result<()> {
    let file = plane.dir().join("defaults.yaml");
    let mut write = Command::new(&plane.programs().kube_proxy);
    write.arg(format!("--write-config-to={}", file.display()));
    lab::namespace::text(write)?;
    let mut check = Command::new(sluice);
    check.args(["config", "check", "-o", "json"]).arg(&file);
    let said: Value = serde_json::from_str(&lab::namespace::text(check)?)?;
    ensure!(said["valid"] == true, "mistakes: {}", said["mistakes"]);
    let warnings = said["warnings"].as_array().context("warnings")?;
    let others: Vec<_> = warnings
        .iter()
        .filter(|warning| warning["key"] != "mode")
        .collect();
    ensure!(others.is_empty(), "warnings: {others:?}");
    Ok(())
}
