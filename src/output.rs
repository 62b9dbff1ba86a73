//! The one place that writes to standard output. A reader that has gone (`sluice flows | head`)
//! ends the writing without a complaint.

use std::io::{self, Write};

use comfy_table::{Cell, CellAlignment, Table, presets};
use serde::Serialize;

use crate::args::Output;

/// Something a command prints.
pub(crate) trait Tabular: Serialize {
    /// The tables, each under its title where it has one.
    fn tables(&self) -> String;
}

/// Prints `result` as asked.
pub(crate) fn print(result: &impl Tabular, output: Output) -> io::Result<()> {
    match output {
        Output::Table => write(&result.tables()),
        Output::Json => print_json(result),
    }
}

/// Prints `value` as JSON, indented.
pub(crate) fn print_json(value: &impl Serialize) -> io::Result<()> {
    write(&serde_json::to_string_pretty(value)?)
}

/// Writes `text` and ends it with a line break.
pub(crate) fn write(text: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let written = out
        .write_all(text.as_bytes())
        .and_then(|()| out.write_all(end.as_bytes()));
    match written.and_then(|()| out.flush()) {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// A table with this header; columns whose title starts with `#` are numbers, set to the right.
pub(crate) fn table<'a>(
    header: &[&str],
    rows: impl IntoIterator<Item = Vec<std::borrow::Cow<'a, str>>>,
) -> String {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table.set_header(header.iter().map(|title| title.trim_start_matches('#')));
    for row in rows {
        let cells = row.into_iter().zip(header).map(|(text, title)| {
            let cell = Cell::new(text);
            if title.starts_with('#') {
                cell.set_alignment(CellAlignment::Right)
            } else {
                cell
            }
        });
        table.add_row(cells);
    }
    let lines: Vec<_> = table
        .lines()
        .map(|line| line.trim_end().to_owned())
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_at_the_right_of_their_column() {
        let rows = [
            vec!["a".into(), "5".into()],
            vec!["b".into(), "1234".into()],
        ];
        let text = table(&["NAME", "#COUNT"], rows);
        assert_eq!(text, " NAME  COUNT\n a         5\n b      1234");
    }
}
