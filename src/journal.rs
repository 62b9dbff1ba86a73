//! The undo journal: every change to the node is written down before it is made, so that the next
//! stop, start or `sluice cleanup` can take it back, also after kill -9.
//!
//! One JSON object a line in `journal` of the state folder, each synced before the change. Undoing
//! walks backwards; every undo must be idempotent, since a crash may have come before the change,
//! and again before its undo was noted. It knows how to write down, not how to undo: the caller
//! brings that, except for sysctls, which are plain files. Routes into the host port are not written
//! down: they go with the device.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// A change to the node, with what its undoing needs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "change", rename_all = "camelCase")]
pub(crate) enum Change {
    /// A sysctl was set from `before` to `ours`; its name is the path below `/proc/sys`.
    Sysctl {
        name: String,
        before: String,
        ours: String,
    },
    /// A network device was made.
    Device { name: String },
    /// Programs were attached to a device.
    Programs { device: String },
}

/// The open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    path: PathBuf,
    file: File,
    changes: Vec<Change>,
}

/// A change that could not be undone; it stays in the journal.
#[derive(Debug)]
pub(crate) struct Failure {
    pub(crate) change: Change,
    pub(crate) reason: String,
}

impl Journal {
    /// Opens the journal of a state folder, with what earlier processes left in it.
    pub(crate) fn open(folder: &Path) -> io::Result<Self> {
        let path = folder.join("journal");
        let text = match fs::read_to_string(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            text => text?,
        };
        let changes = parse(&text)?;
        let file = OpenOptions::new().create(true).append(true).open(&path)?;
        let mut journal = Self {
            path,
            file,
            changes,
        };
        // A line that a crash cut short would swallow the next one.
        if !text.is_empty() && !text.ends_with('\n') {
            journal.rewrite()?;
        }
        Ok(journal)
    }

    /// Writes a change down, to be called before it is made. A change that is written down already
    /// stays as it is: the first one holds the state before us.
    pub(crate) fn record(&mut self, change: Change) -> io::Result<()> {
        if self.changes.iter().any(|known| known.same_target(&change)) {
            return Ok(());
        }
        self.file.write_all(line(&change)?.as_bytes())?;
        self.file.sync_data()?;
        self.changes.push(change);
        Ok(())
    }

    /// Takes every change back, the last one first, with `undo`. What fails stays written down and
    /// is returned.
    pub(crate) fn undo(
        &mut self,
        mut undo: impl FnMut(&Change) -> Result<(), String>,
    ) -> io::Result<Vec<Failure>> {
        let mut failures = Vec::new();
        for change in self.changes.iter().rev() {
            if let Err(reason) = undo(change) {
                failures.push(Failure {
                    change: change.clone(),
                    reason,
                });
            }
        }
        self.changes = failures
            .iter()
            .rev()
            .map(|failure| failure.change.clone())
            .collect();
        self.rewrite()?;
        Ok(failures)
    }

    /// What is written down, oldest first.
    pub(crate) fn changes(&self) -> &[Change] {
        &self.changes
    }

    /// Replaces the file by what is still to be undone; without any, removes it.
    fn rewrite(&mut self) -> io::Result<()> {
        let fresh = self.path.with_extension("new");
        let mut file = File::create(&fresh)?;
        for change in &self.changes {
            file.write_all(line(change)?.as_bytes())?;
        }
        file.sync_all()?;
        fs::rename(&fresh, &self.path)?;
        self.file = OpenOptions::new().append(true).open(&self.path)?;
        Ok(())
    }
}

impl Change {
    /// Whether undoing either undoes the other.
    fn same_target(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Sysctl { name, .. }, Self::Sysctl { name: other, .. }) => name == other,
            _ => self == other,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sysctl { name, before, .. } => write!(out, "sysctl {name}: back to {before:?}"),
            Self::Device { name } => write!(out, "device {name}"),
            Self::Programs { device } => write!(out, "programs at {device}"),
        }
    }
}

/// Sets a sysctl, written down before. `root` is `/proc/sys`.
pub(crate) fn set_sysctl(
    journal: &mut Journal,
    root: &Path,
    name: &str,
    ours: &str,
) -> io::Result<()> {
    let path = root.join(name);
    let before = fs::read_to_string(&path)?.trim_end().to_owned();
    if before == ours {
        return Ok(());
    }
    journal.record(Change::Sysctl {
        name: name.to_owned(),
        before,
        ours: ours.to_owned(),
    })?;
    fs::write(path, ours)
}

/// Sets a sysctl back, unless someone else has set it since. `root` is `/proc/sys`.
pub(crate) fn restore_sysctl(root: &Path, name: &str, before: &str, ours: &str) -> io::Result<()> {
    let path = root.join(name);
    let present = match fs::read_to_string(&path) {
        // The sysctl of a device that has gone went with it.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        present => present?,
    };
    // An empty list is written as a line break: writing nothing at all changes nothing.
    let before = if before.is_empty() { "\n" } else { before };
    if present.trim_end() == ours {
        fs::write(path, before)
    } else {
        Ok(())
    }
}

fn line(change: &Change) -> io::Result<String> {
    Ok(serde_json::to_string(change)? + "\n")
}

/// The changes of a journal's text. A last line without its end was cut short by a crash, before
/// its change was made, and counts for nothing.
fn parse(text: &str) -> io::Result<Vec<Change>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().filter(|line| !line.is_empty());
    lines.map(|line| Ok(serde_json::from_str(line)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(name: &str) -> Change {
        Change::Device {
            name: name.to_owned(),
        }
    }

    fn programs(device: &str) -> Change {
        Change::Programs {
            device: device.to_owned(),
        }
    }

    #[test]
    fn changes_survive_the_process_and_are_undone_backwards() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        journal.record(device("a")).unwrap();
        journal.record(programs("eth0")).unwrap();
        drop(journal);

        let mut journal = Journal::open(folder.path()).unwrap();
        let mut undone = Vec::new();
        let failures = journal.undo(|change| {
            undone.push(change.clone());
            Ok(())
        });
        assert!(failures.unwrap().is_empty());
        assert_eq!(undone, [programs("eth0"), device("a")]);
        assert!(Journal::open(folder.path()).unwrap().changes().is_empty());
    }

    #[test]
    fn what_cannot_be_undone_stays_written_down_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        for name in ["a", "b", "c"] {
            journal.record(device(name)).unwrap();
        }
        let busy = |change: &Change| {
            if *change == device("b") {
                Ok(())
            } else {
                Err("busy".to_owned())
            }
        };
        assert_eq!(journal.undo(busy).unwrap().len(), 2);
        journal.record(device("d")).unwrap();
        let journal = Journal::open(folder.path()).unwrap();
        assert_eq!(journal.changes(), [device("a"), device("c"), device("d")]);
    }

    #[test]
    fn the_first_value_of_a_sysctl_is_the_one_to_restore() {
        let folder = tempfile::tempdir().unwrap();
        let sysctls = tempfile::tempdir().unwrap();
        fs::write(sysctls.path().join("x"), "1\n").unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        set_sysctl(&mut journal, sysctls.path(), "x", "2").unwrap();
        set_sysctl(&mut journal, sysctls.path(), "x", "2").unwrap();
        let [Change::Sysctl { name, before, ours }] = journal.changes() else {
            panic!("not one sysctl: {:?}", journal.changes())
        };
        restore_sysctl(sysctls.path(), name, before, ours).unwrap();
        assert_eq!(fs::read_to_string(sysctls.path().join("x")).unwrap(), "1");
    }

    #[test]
    fn a_sysctl_that_someone_else_set_since_is_left_alone() {
        let sysctls = tempfile::tempdir().unwrap();
        fs::write(sysctls.path().join("x"), "3\n").unwrap();
        restore_sysctl(sysctls.path(), "x", "1", "2").unwrap();
        assert_eq!(fs::read_to_string(sysctls.path().join("x")).unwrap(), "3\n");
        restore_sysctl(sysctls.path(), "gone", "1", "2").unwrap();
    }

    #[test]
    fn a_line_cut_short_by_a_crash_counts_for_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal");
        fs::write(
            &path,
            format!("{}{{\"change\":\"dev", line(&device("a")).unwrap()),
        )
        .unwrap();
        let mut journal = Journal::open(folder.path()).unwrap();
        assert_eq!(journal.changes(), [device("a")]);
        journal.record(device("b")).unwrap();
        assert_eq!(
            Journal::open(folder.path()).unwrap().changes(),
            [device("a"), device("b")]
        );
    }
}
