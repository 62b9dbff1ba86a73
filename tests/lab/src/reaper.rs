//! The one who cleans up: a small process of its own that waits on a pipe and removes what the lab made once the lab is
//! gone, however it went: by drop, panic, Ctrl-C or kill -9.
//!
//! Rule to keep: there is one clean-up, and it runs outside of the process that might die. What the lab makes is named by
//! its prefix, so the reaper needs no list.

use std::io::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context as _, Result};

/// Removes the namespaces and the folder of one lab when dropped, or when this process ends.
#[derive(Debug)]
pub struct Reaper {
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Reaper {
    /// Starts to watch over the lab `name`, whose files are in `dir`. Call it before anything is made.
    pub fn start(name: &str, dir: &Path) -> Result<Self> {
        let mut child = script("read -r word && [ \"$word\" = keep ] && exit 0", name, dir)
            .stdin(Stdio::piped())
            .spawn()
            .context("start the reaper")?;
        let pipe = child.stdin.take();
        Ok(Self { child, pipe })
    }

    /// Leaves everything as it is; `remove` takes it down later.
    pub fn keep(mut self) -> Result<()> {
        let mut pipe = self
            .pipe
            .take()
            .expect("the pipe is open until keep or drop");
        pipe.write_all(b"keep\n").context("tell the reaper")
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.pipe.take());
        if let Err(error) = self.child.wait() {
            eprintln!("lab: the reaper is gone: {error}");
        }
    }
}

/// Removes a lab that was kept.
pub fn remove(name: &str, dir: &Path) -> Result<()> {
    let status = script(":", name, dir).status().context("run the removal")?;
    anyhow::ensure!(status.success(), "removal of lab {name} failed: {status}");
    Ok(())
}

/// `first`, then the removal of all that carries the prefix `name-`. Processes inside go first: a namespace lives as
/// long as one of them does.
fn script(first: &str, name: &str, dir: &Path) -> Command {
    const REMOVE: &str = r#"
        spaces=$(ls /run/netns 2>/dev/null | grep "^$0-")
        for space in $spaces; do
            pids=$(ip netns pids "$space")
            [ -n "$pids" ] && kill -9 $pids
        done
        for space in $spaces; do ip netns del "$space"; done
        rm -rf "$1"
        exit 0"#;
    let mut command = Command::new("sh");
    command
        .arg("-c")
        .arg(format!("{first}\n{REMOVE}"))
        .arg(name)
        .arg(dir);
    // A group of its own: Ctrl-C in the terminal ends the lab, not its reaper.
    command
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    command
}
