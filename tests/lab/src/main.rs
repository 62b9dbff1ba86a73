//! The lab's command line: `demo` prints the whole table, `check` compares it with `rows.txt`.

#![forbid(unsafe_code)]

use std::io::{Write as _, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::{Args, Parser, Subcommand, ValueEnum};
use lab::bench::{self, Bench};
use lab::demo::{self, Dataplane, Report, Run};
use lab::sluice::Settings;
use lab::{Lab, Options, reaper, rows, topology};

#[derive(Debug, Parser)]
#[command(
    about = "Namespaces, servers and clients for a service proxy, and the table of paths it must serve"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run every row and print the table; succeeds only if all are right
    Demo(TableArguments),
    /// Run every row; fails when one that rows.txt lists is wrong
    Check(TableArguments),
    /// Measure sluice against kernel nftables NAT and print the ratios
    Bench(BenchArguments),
    /// Serve in the namespaces of a lab that was kept
    #[command(hide = true)]
    Serve { name: String },
    /// Take down a lab that was kept
    Down { name: String },
}

#[derive(Debug, Args)]
struct TableArguments {
    /// Who serves the Services
    #[arg(long, value_enum, default_value_t = Server::Sluice)]
    dataplane: Server,
    /// The binary; default: SLUICE_BIN, or the one beside this program
    #[arg(long)]
    sluice: Option<PathBuf>,
    /// Only rows whose name contains this; no proofs
    #[arg(long, value_name = "PATTERN")]
    only: Option<String>,
    /// Workers of each engine
    #[arg(long)]
    workers: Option<u32>,
    /// Queues of each device on the wire
    #[arg(long, default_value_t = 2)]
    queues: u32,
    /// Let every end that sends compute its checksums itself
    #[arg(long)]
    tx_off: bool,
    /// A line for the block `sluice.engine`, as "graceMs: 100"
    #[arg(long, value_name = "KEY: VALUE")]
    engine: Vec<String>,
    /// Leave the lab up and say how to enter it (also: KEEP=1)
    #[arg(long)]
    keep: bool,
}

#[derive(Debug, Args)]
struct BenchArguments {
    /// The binary; default: SLUICE_BIN, or the one beside this program
    #[arg(long)]
    sluice: Option<PathBuf>,
    /// Workers of each engine
    #[arg(long)]
    workers: Option<u32>,
    /// Queues of each device on the wire
    #[arg(long, default_value_t = 2)]
    queues: u32,
    /// Let every end that sends compute its checksums itself
    #[arg(long)]
    tx_off: bool,
    /// How often each side is measured
    #[arg(long, default_value_t = 3)]
    rounds: u32,
    /// How long each measurement takes
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Server {
    Sluice,
    Nft,
    None,
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("lab: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<bool> {
    match arguments.command {
        Command::Demo(table) => finish(&demo::run(&table.into_run(), &mut stdout())?),
        Command::Check(table) => check(&demo::run(&table.into_run(), &mut stdout())?),
        Command::Bench(bench) => bench::run(&bench.into_bench(), &mut stdout()).map(|()| true),
        Command::Serve { name } => Lab::serve_kept(&name).map(|()| true),
        Command::Down { name } => reaper::remove(&name, &topology::folder(&name)).map(|()| true),
    }
}

fn finish(report: &Report) -> Result<bool> {
    let (right, all) = report.score();
    writeln!(stdout(), "{right} of {all} right")?;
    Ok(right == all && report.failure.is_none())
}

/// Prints what `rows.txt` and the table do not agree about, then the score.
fn check(report: &Report) -> Result<bool> {
    let listed: Vec<&str> = rows::listed().collect();
    let mut turned_wrong = false;
    for (name, right) in report.verdicts() {
        let wanted = listed.contains(&name);
        if wanted && !right {
            turned_wrong = true;
            writeln!(stdout(), "listed in rows.txt, but wrong: {name}")?;
        } else if right && !wanted {
            writeln!(stdout(), "right, but not listed in rows.txt: {name}")?;
        }
    }
    finish(report)?;
    Ok(!turned_wrong)
}

impl BenchArguments {
    fn into_bench(self) -> Bench {
        let mut settings = Settings::new(self.sluice.unwrap_or_else(demo::default_binary));
        settings.workers = self.workers;
        Bench {
            options: Options {
                queues: self.queues,
                tx_off: self.tx_off,
            },
            settings,
            rounds: self.rounds.max(1),
            seconds: self.seconds,
        }
    }
}

impl TableArguments {
    fn into_run(self) -> Run {
        let mut settings = Settings::new(self.sluice.unwrap_or_else(demo::default_binary));
        settings.workers = self.workers;
        settings.engine = self.engine;
        Run {
            options: Options {
                queues: self.queues,
                tx_off: self.tx_off,
            },
            dataplane: match self.dataplane {
                Server::Sluice => Dataplane::Sluice,
                Server::Nft => Dataplane::Nft,
                Server::None => Dataplane::None,
            },
            settings,
            only: self.only,
            keep: self.keep || std::env::var_os("KEEP").is_some_and(|value| value == "1"),
        }
    }
}
