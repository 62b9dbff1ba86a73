//! Kubernetes objects to what is served on this node.
//!
//! An update takes one road and is never patched in from the side:
//!
//! ```text
//! watch | files -> store -> service + endpoint -> policy -> Resolved services
//!                                                    |-> snapshot -> workers
//!                                                    '-> ruleset  -> mirror
//! ```
//!
//! `policy` decides once; the snapshot and the mirror are projections of what it decided. This crate
//! knows no rings, frames or cores: of the dataplane it uses `net`, `snapshot` and `counters` only.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod address;
pub mod balance;
mod claims;
pub mod controller;
mod document;
pub mod endpoint;
pub mod folder_watch;
pub mod health;
pub mod host_routes;
pub mod kernel;
pub mod links;
pub mod manifests;
pub mod neighbor;
pub mod node;
mod notices;
pub mod policy;
pub mod resolution;
pub mod run;
pub mod service;
pub mod snapshot;
pub mod source;
pub mod store;
pub mod watch;

use std::path::Path;
use std::sync::Arc;

pub use controller::{ControlConfig, Controller, DetectLocalMode, Event, Rejected, Resolved};
pub use manifests::{Folder, FolderError};
pub use resolution::Resolution;
pub use run::{RunConfig, RunError, Running, Update};
pub use source::Source;
pub use watch::ClusterConfig;

/// Reads a folder of manifests once and resolves it. Touches nothing.
///
/// # Errors
/// The folder cannot be listed. What cannot be read in it is named in `Resolved::rejected`.
pub fn resolve_folder(folder: &Path, config: &ControlConfig) -> Result<Arc<Resolved>, FolderError> {
    let mut controller = Controller::new(config.clone());
    for event in Folder::new(folder).scan()? {
        controller.handle(event);
    }
    Ok(controller.resolve())
}
