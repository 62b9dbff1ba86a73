//! `lab demo` and `lab check`: lay out, serve, send the traffic of every row, print the table, count what is right.

use std::io::Write as _;
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use comfy_table::{Table, presets};

use crate::namespace::Namespace;
use crate::plan::{Family, POD_PORT, PODS, Site};
use crate::proof::{self, Proof};
use crate::rows::{self, Outcome};
use crate::sluice::{self, Settings, Sluice};
use crate::topology::{Lab, Options};
use crate::{kernel, manifests};

/// Who serves the Services.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dataplane {
    /// The binary under test.
    Sluice,
    /// nftables rules of the lab's own.
    Nft,
    /// Nobody.
    None,
}

/// How to run the table.
#[derive(Clone, Debug)]
pub struct Run {
    /// How to lay the lab out.
    pub options: Options,
    /// Who serves.
    pub dataplane: Dataplane,
    /// How to run the binary.
    pub settings: Settings,
    /// Only rows whose name contains this.
    pub only: Option<String>,
    /// Leave the lab up.
    pub keep: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// The rows that were run.
    pub outcomes: Vec<Outcome>,
    /// The checks that were made.
    pub proofs: Vec<Proof>,
    /// Why the service proxy did not serve, if it did not.
    pub failure: Option<String>,
}

/// Runs the table and prints it to `out`, all but the last line.
pub fn run(run: &Run, out: &mut dyn std::io::Write) -> Result<Report> {
    let start = Instant::now();
    let lab = Lab::new(&run.options)?;
    manifests::write_all(&sluice::manifests(&lab))?;
    let up = start.elapsed().as_secs_f32();
    progress(&format!("lab {} is up after {up:.1} s", lab.name()));
    let mut report = Report::default();
    let nodes = match serve(&lab, run) {
        Ok(nodes) => nodes,
        Err(error) => {
            report.failure = Some(format!("{error:#}"));
            Vec::new()
        }
    };
    for row in rows::all() {
        if !run.only.as_ref().is_none_or(|part| row.name.contains(part)) {
            continue;
        }
        let start = Instant::now();
        let outcome = match &report.failure {
            Some(_) if row.needs_service() => row.not_served(),
            _ => row.run(&lab),
        };
        let mark = if outcome.is_right() { "right" } else { "WRONG" };
        progress(&format!(
            "{mark} {:6.2} s  {}",
            start.elapsed().as_secs_f32(),
            row.name
        ));
        report.outcomes.push(outcome);
    }
    writeln!(out, "{}", table(&report.outcomes))?;
    if run.dataplane == Dataplane::Sluice {
        print_views(&lab, &run.settings.binary, out)?;
        if run.only.is_none() {
            report.proofs = proof::all(&lab, &run.settings.binary);
            writeln!(out, "{}", proof_table(&report.proofs))?;
        }
    }
    for node in nodes {
        if run.keep {
            node.leave()
        } else if let Err(error) = node.stop() {
            report.failure.get_or_insert_with(|| format!("{error:#}"));
        }
    }
    if let Some(failure) = &report.failure {
        writeln!(out, "sluice did not serve: {failure}")?;
    }
    if run.keep {
        keep(lab, out)?;
    }
    Ok(report)
}

impl Report {
    /// Every row and check by name, and whether it is right.
    pub fn verdicts(&self) -> impl Iterator<Item = (&str, bool)> {
        let rows = self
            .outcomes
            .iter()
            .map(|row| (row.name.as_str(), row.is_right()));
        rows.chain(
            self.proofs
                .iter()
                .map(|proof| (proof.name, proof.verdict.is_ok())),
        )
    }

    /// How many are right, and of how many.
    #[must_use]
    pub fn score(&self) -> (usize, usize) {
        (
            self.verdicts().filter(|(_, right)| *right).count(),
            self.verdicts().count(),
        )
    }
}

/// The release binary beside the lab's own, or what `SLUICE_BIN` names.
#[must_use]
pub fn default_binary() -> PathBuf {
    if let Some(path) = std::env::var_os("SLUICE_BIN") {
        return path.into();
    }
    let own = std::env::current_exe().unwrap_or_default();
    own.with_file_name("sluice")
}

fn serve(lab: &Lab, run: &Run) -> Result<Vec<Sluice>> {
    match run.dataplane {
        Dataplane::None => Ok(Vec::new()),
        Dataplane::Nft => kernel::serve(lab).map(|()| Vec::new()),
        Dataplane::Sluice => start_both(lab, &run.settings),
    }
}

/// Starts the binary on both nodes and waits until they are ready.
pub fn start_both(lab: &Lab, settings: &Settings) -> Result<Vec<Sluice>> {
    let mut nodes = Vec::new();
    for node in [Site::N1, Site::N2] {
        nodes.push(Sluice::start(lab, node, settings)?);
    }
    for node in &mut nodes {
        node.wait_ready(lab, READY)?;
    }
    Ok(nodes)
}

fn print_views(lab: &Lab, binary: &Path, out: &mut dyn std::io::Write) -> Result<()> {
    for view in ["status", "services", "flows"] {
        let text = sluice::ask(lab, Site::N1, binary, &[view])
            .unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = text.lines().collect();
        writeln!(out, "n1: sluice {view}")?;
        for line in lines.iter().take(VIEW_LINES) {
            writeln!(out, "{line}")?;
        }
        if let Some(more) = lines.len().checked_sub(VIEW_LINES).filter(|more| *more > 0) {
            writeln!(out, "... and {more} lines more")?;
        }
        writeln!(out)?;
    }
    Ok(())
}

fn keep(lab: Lab, out: &mut dyn std::io::Write) -> Result<()> {
    let (name, dir) = (lab.name().to_owned(), lab.dir().to_owned());
    lab.keep()?;
    let own = std::env::current_exe()?;
    // The servers of this process end with it; another one takes their place.
    use std::os::unix::process::CommandExt as _;
    // Its own thread is inside too, so that who takes the lab down finds it there.
    Command::new("ip")
        .args(["netns", "exec", &format!("{name}-{}", Site::Wire.name())])
        .arg(&own)
        .args(["serve", &name])
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start the servers again")?;
    await_last_server(&name)?;
    writeln!(out, "the lab is up; its files are in {}", dir.display())?;
    for site in Site::all() {
        writeln!(out, "  ip netns exec {name}-{} bash", site.name())?;
    }
    writeln!(out, "take it down: {} down {name}", own.display())?;
    Ok(())
}

/// Servers start in the order of the plan: when the last one answers, all do.
fn await_last_server(name: &str) -> Result<()> {
    let last = PODS[PODS.len() - 1];
    let inside = Namespace::open(&format!("{name}-{}", last.name))?;
    let address = SocketAddr::new(last.address(Family::V6), POD_PORT);
    let start = Instant::now();
    while let Err(error) = inside.run(|| TcpStream::connect_timeout(&address, READY)) {
        if start.elapsed() > READY {
            return Err(error).context("the servers do not answer");
        }
        sleep(Duration::from_millis(20));
    }
    Ok(())
}

fn table(outcomes: &[Outcome]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "row",
        "path",
        "requests",
        "answered",
        "share per backend",
        "bytes",
        "wrong",
        "p50",
        "verdict",
    ]);
    for Outcome {
        name,
        title,
        tally,
        faults,
    } in outcomes
    {
        let shares: Vec<String> = tally
            .shares
            .iter()
            .map(|(server, count)| format!("{server} {count}"))
            .collect();
        let verdict = if faults.is_empty() {
            "right".to_owned()
        } else {
            faults.join("; ")
        };
        let micros = tally.percentile(50).as_micros();
        table.add_row([
            name.clone(),
            (*title).to_owned(),
            tally.requests.to_string(),
            tally.answered.to_string(),
            shares.join(" "),
            tally.bytes.to_string(),
            tally.wrong.to_string(),
            format!("{micros} us"),
            verdict,
        ]);
    }
    table
}

fn proof_table(proofs: &[Proof]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header(["proof", "found", "verdict"]);
    for Proof { name, verdict } in proofs {
        let (found, right) = match verdict {
            Ok(found) => (found, "right"),
            Err(wrong) => (wrong, "wrong"),
        };
        table.add_row([*name, found, right]);
    }
    table
}

/// A line on standard error: what takes long is seen to go on.
fn progress(line: &str) {
    let mut stderr = std::io::stderr().lock();
    // Nobody reads it: nothing is lost.
    drop(writeln!(stderr, "{line}"));
}

const READY: Duration = Duration::from_secs(5);
const VIEW_LINES: usize = 40;
