//! `sluice cleanup`: takes back what an ended sluice left on this node: what its undo journal says,
//! then what stands there without being written down. A running one that uses the same state folder
//! is never touched: its lock is held, and the command says whose.

use std::path::Path;

use anyhow::{Context, bail};
use serde::Serialize;

use crate::args::{CleanupArgs, Output};
use crate::journal::{Change, Journal};
use crate::output::{self, Tabular, table};
use crate::report::ApiVersion;
use crate::state::StateFolder;
use crate::undo;

pub(crate) fn run(args: &CleanupArgs, output: Output) -> anyhow::Result<()> {
    let folder = StateFolder::open_existing(&args.state_dir)?;
    let mut left = match &folder {
        Some(folder) => from_journal(folder.path(), args.dry_run)?,
        None => Vec::new(),
    };
    for found in without_journal(args.dry_run) {
        if left.iter().all(|known| known.what != found.what) {
            left.push(found);
        }
    }
    let failed = left
        .iter()
        .filter(|left| left.outcome == Outcome::Failed)
        .count();
    let result = Cleanup {
        api_version: ApiVersion::V1,
        kind: "Cleanup",
        dry_run: args.dry_run,
        changes: left,
    };
    output::print(&result, output)?;
    match folder {
        Some(folder) if failed == 0 && !args.dry_run => folder.remove()?,
        _ => {}
    }
    if failed > 0 {
        bail!("{failed} of the changes could not be undone; run it again as root");
    }
    Ok(())
}

fn from_journal(folder: &Path, dry_run: bool) -> anyhow::Result<Vec<Left>> {
    let mut journal = Journal::open(folder)
        .with_context(|| format!("cannot read the journal in {}", folder.display()))?;
    if dry_run {
        let would = |change: &Change| Left::new(change, Outcome::WouldUndo);
        return Ok(journal.changes().iter().rev().map(would).collect());
    }
    let mut left: Vec<_> = journal
        .changes()
        .iter()
        .rev()
        .map(|change| Left::new(change, Outcome::Undone))
        .collect();
    for failure in journal.undo(undo::change)? {
        let what = failure.change.to_string();
        if let Some(entry) = left.iter_mut().find(|entry| entry.what == what) {
            (entry.outcome, entry.reason) = (Outcome::Failed, failure.reason);
        }
    }
    Ok(left)
}

fn without_journal(dry_run: bool) -> Vec<Left> {
    let outcome = if dry_run {
        Outcome::WouldUndo
    } else {
        Outcome::Undone
    };
    match undo::leftovers(dry_run) {
        Ok(found) => {
            let left = |what| Left {
                what,
                outcome,
                reason: String::new(),
            };
            found.into_iter().map(left).collect()
        }
        Err(reason) => {
            let what = "programs and host port".to_owned();
            vec![Left {
                what,
                outcome: Outcome::Failed,
                reason,
            }]
        }
    }
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Cleanup {
    api_version: ApiVersion,
    kind: &'static str,
    dry_run: bool,
    changes: Vec<Left>,
}

#[derive(Serialize)]
struct Left {
    what: String,
    outcome: Outcome,
    reason: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
enum Outcome {
    Undone,
    WouldUndo,
    Failed,
}

impl Left {
    fn new(change: &Change, outcome: Outcome) -> Self {
        Self {
            what: change.to_string(),
            outcome,
            reason: String::new(),
        }
    }
}

impl Tabular for Cleanup {
    fn tables(&self) -> String {
        if self.changes.is_empty() {
            return "nothing was left".to_owned();
        }
        let rows = self.changes.iter().map(|left| {
            let outcome = match left.outcome {
                Outcome::Undone => "undone",
                Outcome::WouldUndo => "would be undone",
                Outcome::Failed => "failed",
            };
            vec![(&left.what).into(), outcome.into(), (&left.reason).into()]
        });
        table(&["CHANGE", "OUTCOME", "REASON"], rows)
    }
}
