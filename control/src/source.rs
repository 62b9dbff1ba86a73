//! Where events come from: a folder of manifests, or the API server.
//!
//! Whoever takes the events does not see the difference. The first ones are complete: nothing is
//! published before them.

use std::path::PathBuf;
use std::time::Duration;

use crate::controller::Event;
use crate::folder_watch::FolderWatch;
use crate::manifests::{Folder, FolderError};
use crate::notices::Notices;
use crate::watch::{ClusterConfig, WatchError, Watches};

/// What is to be watched.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Source {
    /// A folder of manifests.
    Manifests(PathBuf),
    /// The API server.
    Cluster(ClusterConfig),
}

/// Why nothing can be watched.
#[derive(Debug, thiserror::Error)]
pub enum SourceError {
    /// The manifests cannot be read at all.
    #[error(transparent)]
    Folder(#[from] FolderError),
    /// The API server cannot be watched at all.
    #[error(transparent)]
    Watch(#[from] WatchError),
}

/// A source that is followed.
pub(crate) enum Input {
    Folder { folder: Folder, watch: FolderWatch },
    Cluster(Box<Watches>),
}

impl Input {
    /// Starts following. Must run inside a tokio runtime.
    pub(crate) async fn open(source: &Source) -> Result<Self, SourceError> {
        Ok(match source {
            Source::Manifests(path) => Self::Folder {
                // Changes are told from here on; what was there before is read by `first`.
                watch: FolderWatch::new(path),
                folder: Folder::new(path),
            },
            Source::Cluster(config) => Self::Cluster(Box::new(Watches::new(config).await?)),
        })
    }

    /// Who is told about objects that are not served, besides the log.
    pub(crate) fn notices(&self, node: &str) -> Option<Notices> {
        match self {
            Self::Folder { .. } => None,
            Self::Cluster(watches) => Some(Notices::start(watches.client().clone(), node)),
        }
    }

    /// All that there is at the start.
    pub(crate) async fn first(&mut self) -> Result<Vec<Event>, SourceError> {
        Ok(match self {
            Self::Folder { folder, .. } => folder.scan()?,
            Self::Cluster(watches) => watches.first().await?,
        })
    }

    /// What happened since; waits until something has. Nothing is lost if the future is dropped
    /// before it is ready.
    pub(crate) async fn next(&mut self) -> Vec<Event> {
        let (folder, watch) = match self {
            Self::Folder { folder, watch } => (folder, watch),
            Self::Cluster(watches) => return watches.next().await,
        };
        let poll = if folder.has_links() { POLL_LINKS } else { POLL };
        let changes = watch.changed(poll).await;
        folder.scan_after(&changes).unwrap_or_else(|error| {
            tracing::warn!("{error}; what was read last stays");
            Vec::new()
        })
    }
}

/// How often to look at files although nothing was told.
const POLL: Duration = Duration::from_secs(10);
/// The same where links lead somewhere else.
const POLL_LINKS: Duration = Duration::from_millis(500);
