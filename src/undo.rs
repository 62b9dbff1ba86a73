//! How each change of the journal is taken back. Idempotent: what is gone already is undone.

use std::path::Path;

use crate::journal::{Change, restore_sysctl};

/// Where sysctls are files.
pub(crate) const SYSCTLS: &str = "/proc/sys";

/// Takes one change back.
pub(crate) fn change(change: &Change) -> Result<(), String> {
    match change {
        Change::Sysctl { name, before, ours } => {
            restore_sysctl(Path::new(SYSCTLS), name, before, ours)
                .map_err(|error| error.to_string())
        }
        Change::Device { .. } | Change::Routes { .. } | Change::Programs { .. } => {
            Err("not undone yet".to_owned())
        }
    }
}
