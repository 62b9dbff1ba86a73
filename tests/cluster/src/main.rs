//! `make test-cluster`: starts the real control plane and runs the checks against it. The last line is the sum.

#![expect(
    clippy::print_stdout,
    reason = "what was checked is what this program prints"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use cluster::configuration;
use cluster::control_plane::ControlPlane;
use cluster::deploy;
use cluster::judge::{self, Trial};
use cluster::programs;
use cluster::report::Report;
use cluster::traffic;

/// Real Kubernetes parts beside sluice.
#[derive(Debug, Parser)]
struct Arguments {
    /// The binary that is judged.
    #[arg(long, default_value = "target/release/sluice")]
    sluice: PathBuf,
    /// The repository.
    #[arg(long, default_value = ".")]
    root: PathBuf,
    /// How many clusters kube-proxy judges.
    #[arg(long, default_value_t = 200)]
    clusters: u64,
    /// Where chance starts.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    let mut report = Report::default();
    if let Err(error) = run(&Arguments::parse(), &mut report) {
        report.check("the run itself", Err(error));
    }
    println!("{}", report.sum());
    if report.is_good() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    }
}

fn run(arguments: &Arguments, report: &mut Report) -> Result<()> {
    let programs = programs::build(&arguments.root)?;
    let mut plane = ControlPlane::start(&programs)?;
    println!("the API server is ready");
    configuration::run(&plane, &arguments.sluice, report);
    deploy::run(&plane, &arguments.root, report)?;
    let trial = Trial {
        sluice: &arguments.sluice,
        root: &arguments.root,
        clusters: arguments.clusters,
        seed: arguments.seed,
    };
    judge::run(&plane, &trial, report)?;
    traffic::run(&mut plane, &arguments.root, &arguments.sluice, report)
}
