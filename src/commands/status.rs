//! `sluice status`: the state of the running sluice: engine, mirror, uplinks, workers.

use crate::args::{ClientArgs, Output};
use crate::commands::client;
use crate::output;
use crate::report::Status;

pub(crate) fn run(args: &ClientArgs, output: Output) -> anyhow::Result<()> {
    let result: Status = client::ask(&args.admin_address, "/debug/status")?;
    Ok(output::print(&result, output)?)
}
