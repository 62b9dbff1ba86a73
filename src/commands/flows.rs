//! `sluice flows`: the flows that the running sluice's engine holds, with both tuples.

use crate::args::{ClientArgs, Output};
use crate::commands::client;
use crate::output;
use crate::report::FlowList;

pub(crate) fn run(args: &ClientArgs, output: Output) -> anyhow::Result<()> {
    let result: FlowList = client::ask(&args.admin_address, "/debug/flows")?;
    Ok(output::print(&result, output)?)
}
