//! The state folder: `DIR/<inode of the network namespace>`, so that two nodes on one machine do
//! not meet. It holds the lock, the undo journal and the flow slab; one process owns it at a time.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use thiserror::Error;

/// This namespace's folder, locked for this process until it is dropped.
#[derive(Debug)]
pub(crate) struct StateFolder {
    path: PathBuf,
    /// Holds the lock.
    _lock: File,
}

/// Why the folder cannot be had.
#[derive(Debug, Error)]
pub(crate) enum StateError {
    #[error("the state folder {path} is in use by the process {pid}; stop it first")]
    InUse { path: String, pid: String },
    #[error("cannot use the state folder {path}: {error}; name another with --state-dir")]
    Unusable { path: String, error: io::Error },
}

impl StateFolder {
    /// Makes and locks the folder of this network namespace below `base`.
    pub(crate) fn open(base: &Path) -> Result<Self, StateError> {
        Self::open_at(base.join(namespace_name(base)?))
    }

    /// As [`Self::open`], but `None` where no sluice ever ran in this namespace.
    pub(crate) fn open_existing(base: &Path) -> Result<Option<Self>, StateError> {
        let path = base.join(namespace_name(base)?);
        if path.is_dir() {
            Self::open_at(path).map(Some)
        } else {
            Ok(None)
        }
    }

    /// Where journal and flow slab are kept.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Removes the folder with all it holds.
    pub(crate) fn remove(self) -> Result<(), StateError> {
        fs::remove_dir_all(&self.path).map_err(|error| unusable(&self.path, error))
    }

    /// Takes the lock; once more where the folder was removed between opening and locking it.
    fn open_at(path: PathBuf) -> Result<Self, StateError> {
        loop {
            let lock = lock(&path)?;
            if is_the_file_at(&lock, &path.join(LOCK)) {
                return Ok(Self { path, _lock: lock });
            }
        }
    }
}

fn lock(folder: &Path) -> Result<File, StateError> {
    let unusable = |error| unusable(folder, error);
    fs::create_dir_all(folder).map_err(unusable)?;
    let path = folder.join(LOCK);
    let mut options = OpenOptions::new();
    let options = options.create(true).read(true).write(true).truncate(false);
    let mut lock = options.open(path).map_err(unusable)?;
    match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => return Err(in_use(folder, &mut lock)),
        Err(error) => return Err(unusable(error.into())),
    }
    let written = lock
        .set_len(0)
        .and_then(|()| writeln!(lock, "{}", std::process::id()));
    written.map_err(unusable)?;
    Ok(lock)
}

fn is_the_file_at(file: &File, path: &Path) -> bool {
    let inode = |metadata: io::Result<fs::Metadata>| metadata.map(|m| (m.dev(), m.ino())).ok();
    inode(file.metadata()) == inode(fs::metadata(path))
}

fn unusable(path: &Path, error: io::Error) -> StateError {
    StateError::Unusable {
        path: path.display().to_string(),
        error,
    }
}

fn in_use(path: &Path, lock: &mut File) -> StateError {
    let mut pid = String::new();
    // The owner may be about to write its number.
    let read = lock.read_to_string(&mut pid).is_ok() && !pid.trim().is_empty();
    let pid = if read {
        pid.trim().to_owned()
    } else {
        "that locks it".to_owned()
    };
    StateError::InUse {
        path: path.display().to_string(),
        pid,
    }
}

/// The network namespace's inode, which names the folder.
fn namespace_name(base: &Path) -> Result<String, StateError> {
    let namespace = fs::metadata("/proc/thread-self/ns/net");
    let inode = namespace.map(|namespace| namespace.ino().to_string());
    inode.map_err(|error| unusable(base, error))
}

const LOCK: &str = "lock";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_owner_is_told_the_first_ones_number() {
        let base = tempfile::tempdir().unwrap();
        let first = StateFolder::open(base.path()).unwrap();
        let error = StateFolder::open(base.path()).unwrap_err().to_string();
        assert!(
            error.contains(&format!("the process {};", std::process::id())),
            "{error}"
        );
        drop(first);
        StateFolder::open(base.path()).unwrap();
    }

    #[test]
    fn the_folder_is_named_by_the_network_namespace() {
        let base = tempfile::tempdir().unwrap();
        assert!(StateFolder::open_existing(base.path()).unwrap().is_none());
        let folder = StateFolder::open(base.path()).unwrap();
        let inode = fs::metadata("/proc/self/ns/net").unwrap().ino();
        assert_eq!(folder.path(), base.path().join(inode.to_string()));
        drop(folder);
        assert!(StateFolder::open_existing(base.path()).unwrap().is_some());
    }

    #[test]
    fn a_removed_folder_is_gone_and_can_be_made_again() {
        let base = tempfile::tempdir().unwrap();
        let folder = StateFolder::open(base.path()).unwrap();
        let path = folder.path().to_owned();
        fs::write(path.join("flows-0"), "").unwrap();
        folder.remove().unwrap();
        assert!(!path.exists());
        StateFolder::open(base.path()).unwrap();
    }

    #[test]
    fn a_folder_that_cannot_be_made_is_named() {
        let base = tempfile::tempdir().unwrap();
        let file = base.path().join("file");
        fs::write(&file, "").unwrap();
        let error = StateFolder::open(&file).unwrap_err().to_string();
        assert!(error.contains("--state-dir"), "{error}");
    }
}
