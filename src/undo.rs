//! How each change of the journal is taken back, and what of ours stands on the node without being
//! written down. Idempotent: what is gone already is undone.

use std::path::Path;

use dataplane::device::host::HostPortDevice;
use dataplane::steering;

use crate::journal::{Change, restore_sysctl};

/// Where sysctls are files.
pub(crate) const SYSCTLS: &str = "/proc/sys";
/// The host port's name.
pub(crate) const HOST_PORT: &str = "sluice0";

/// Takes one change back.
pub(crate) fn change(change: &Change) -> Result<(), String> {
    match change {
        Change::Sysctl { name, before, ours } => {
            restore_sysctl(Path::new(SYSCTLS), name, before, ours).map_err(|e| e.to_string())
        }
        Change::Device { name } => {
            programs(false)?;
            HostPortDevice::remove(name)
                .map(drop)
                .map_err(|e| e.to_string())
        }
        Change::Programs { .. } => programs(false).map(drop),
    }
}

/// Takes away what no journal speaks of, and says what it was; with `dry_run` only says it.
pub(crate) fn leftovers(dry_run: bool) -> Result<Vec<String>, String> {
    let mut found = programs(dry_run)?;
    let host_port = if dry_run {
        has_host_port().map_err(|e| e.to_string())?
    } else {
        HostPortDevice::remove(HOST_PORT).map_err(|e| e.to_string())?
    };
    if host_port {
        found.push(
            Change::Device {
                name: HOST_PORT.to_owned(),
            }
            .to_string(),
        );
    }
    Ok(found)
}

/// Whether this network namespace has a device of the host port's name.
fn has_host_port() -> std::io::Result<bool> {
    let devices = std::fs::read_to_string("/proc/thread-self/net/dev")?;
    let mut names = devices.lines().filter_map(|line| line.split_once(':'));
    Ok(names.any(|(name, _)| name.trim() == HOST_PORT))
}

/// The programs go first: one that redirects to a device that is gone drops packets.
fn programs(dry_run: bool) -> Result<Vec<String>, String> {
    steering::remove_leftovers(dry_run).map_err(|e| e.to_string())
}
