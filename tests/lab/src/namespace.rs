//! A named network namespace: enter it with a thread, run a command in it, set its sysctls.
//!
//! Names live under `/run/netns`, as `ip netns` makes them, so that a person can enter one too. Making and removing
//! them is not done here: [`crate::topology`] makes, [`crate::reaper`] removes.
//!
//! Rule to keep: only threads that were started here change their namespace; the caller's never does.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context as _, Result, bail};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// An existing network namespace.
#[derive(Debug)]
pub struct Namespace {
    name: String,
    file: File,
}

impl Namespace {
    /// Opens the namespace that `ip netns` knows as `name`.
    pub fn open(name: &str) -> Result<Self> {
        let path = format!("/run/netns/{name}");
        let file = File::open(&path).with_context(|| format!("open namespace {path}"))?;
        Ok(Self {
            name: name.to_owned(),
            file,
        })
    }

    /// The name under `/run/netns`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Runs `work` on a thread inside the namespace and returns what it returned; a panic inside goes on outside.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()
                    .expect("a namespace that was opened can be entered by root");
                work()
            });
            thread
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Starts a thread inside the namespace.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: &str,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<thread::JoinHandle<T>> {
        let file = self
            .file
            .try_clone()
            .context("duplicate a namespace descriptor")?;
        let inside = Self {
            name: self.name.clone(),
            file,
        };
        let thread = thread::Builder::new()
            .name(name.to_owned())
            .stack_size(256 * 1024)
            .spawn(move || {
                inside
                    .enter()
                    .expect("a namespace that was opened can be entered by root");
                work()
            });
        thread.context("start a thread")
    }

    /// A command that will run inside, with its own `/sys`, as `ip netns exec` does it. Its process id is that of
    /// `program` itself.
    #[must_use]
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// Runs a command line inside and returns its standard output.
    pub fn output(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let mut command = self.command(program);
        command.args(arguments);
        text(command)
    }

    /// Feeds `script` to `ip -batch` inside.
    pub fn ip(&self, script: &str) -> Result<()> {
        ip_batch(Some(&self.name), script)
    }

    /// Writes sysctls, given as `net.ipv4.ip_forward=1` with `/` for a dot inside a name.
    pub fn sysctls(&self, settings: &[&str]) -> Result<()> {
        self.run(|| {
            settings
                .iter()
                .try_for_each(|setting| write_sysctl(setting))
        })
    }

    fn enter(&self) -> std::io::Result<()> {
        move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
            .map_err(std::io::Error::from)
    }
}

/// Feeds `script` to `ip -batch`, in the namespace named or in the caller's.
pub fn ip_batch(namespace: Option<&str>, script: &str) -> Result<()> {
    let mut command = Command::new("ip");
    if let Some(name) = namespace {
        command.args(["-n", name]);
    }
    command.args(["-batch", "-"]);
    feed(command, script).map(drop)
}

/// Runs a command with `input` on its standard input and returns its standard output.
pub fn feed(mut command: Command, input: &str) -> Result<String> {
    command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("start {command:?}"))?;
    let mut stdin = child.stdin.take().expect("standard input was asked for");
    // A child that fails early closes the pipe; its own message is the better one.
    let written = stdin.write_all(input.as_bytes());
    drop(stdin);
    let output = child
        .wait_with_output()
        .with_context(|| format!("wait for {command:?}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!(
            "{command:?}: {}: {}\n{}",
            output.status,
            message.trim(),
            numbered(input)
        );
    }
    written.with_context(|| format!("write to {command:?}"))?;
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command and returns its standard output; a failure carries its standard error.
pub fn text(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("start {command:?}"))?;
    if !output.status.success() {
        let message = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?}: {}: {}", output.status, message.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn write_sysctl(setting: &str) -> Result<()> {
    let (key, value) = setting
        .split_once('=')
        .with_context(|| format!("sysctl {setting}"))?;
    let path = format!("/proc/sys/{}", key.replace('.', "/"));
    std::fs::write(&path, value).with_context(|| format!("write {value} to {path}"))
}

fn numbered(script: &str) -> String {
    let lines = script.lines().enumerate();
    lines
        .map(|(at, line)| format!("{:4} {line}\n", at + 1))
        .collect()
}
