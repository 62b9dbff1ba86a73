//! `sluice services`: the Services that the running sluice serves, with their backends' states.

use crate::args::{ClientArgs, Output};
use crate::commands::client;
use crate::output;
use crate::report::ServiceStates;

pub(crate) fn run(args: &ClientArgs, output: Output) -> anyhow::Result<()> {
    let result: ServiceStates = client::ask(&args.admin_address, "/debug/services")?;
    Ok(output::print(&result, output)?)
}
