//! `sluice`: parses the command line, runs the command, turns an error into an exit code.
//! 0 is right, 1 failed, 2 is a mistake in the command line.

#![forbid(unsafe_code)]

mod admin;
mod app;
mod args;
mod commands;
mod config;
mod devices;
mod journal;
mod observe;
mod output;
mod ports;
mod report;
mod state;
mod telemetry;
mod undo;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use args::{Command, CommandLine, ConfigCommand};
use config::Config;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let line = CommandLine::parse();
    if let Err(error) = run(line) {
        // Nothing is left to say where standard error is gone.
        let _written = writeln!(std::io::stderr().lock(), "sluice: {}", sentence(&error));
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

/// The error and its causes; a cause that the text names already is not repeated.
fn sentence(error: &anyhow::Error) -> String {
    error
        .chain()
        .map(ToString::to_string)
        .fold(String::new(), |text, cause| {
            if text.is_empty() {
                return cause;
            }
            if text.contains(&cause) {
                text
            } else {
                format!("{text}: {cause}")
            }
        })
}

fn run(line: CommandLine) -> anyhow::Result<()> {
    let output = line.output;
    match line.command {
        Command::Run(settings) => app::run(Config::load(&settings)?),
        Command::Resolve(settings) => commands::resolve::run(&settings, output),
        Command::Trace(args) => commands::trace::run(&args, output),
        Command::Status(args) => commands::status::run(&args, output),
        Command::Services(args) => commands::services::run(&args, output),
        Command::Flows(args) => commands::flows::run(&args, output),
        Command::Cleanup(args) => commands::cleanup::run(&args, output),
        Command::Config(ConfigCommand::Check { file }) => commands::config::check(&file, output),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn causes_are_said_once() {
        let cause = anyhow::anyhow!("it is busy");
        assert_eq!(
            sentence(&cause.context("cannot bind")),
            "cannot bind: it is busy"
        );
        let named = anyhow::anyhow!("it is busy").context("cannot bind: it is busy");
        assert_eq!(sentence(&named), "cannot bind: it is busy");
    }
}
