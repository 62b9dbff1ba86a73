//! The page: the tables of `status`, `services` and `flows` in a browser. No scripts, nothing from
//! elsewhere; loopback only.

use std::sync::Arc;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Html;

use super::Sources;
use crate::output::Tabular;
use crate::telemetry::VERSION;

pub(super) async fn page(
    State(sources): State<Arc<Sources>>,
) -> Result<Html<String>, (StatusCode, &'static str)> {
    let made = tokio::task::spawn_blocking(move || render(&sources)).await;
    made.map(Html).map_err(|_| {
        (
            StatusCode::INTERNAL_SERVER_ERROR,
            "the state cannot be read\n",
        )
    })
}

fn render(sources: &Sources) -> String {
    let mut flows = (sources.flows)();
    let count = flows.flows.len();
    flows.flows.truncate(SHOWN_FLOWS);
    let sections = [
        ("Status".to_owned(), (sources.status)().tables()),
        ("Services".to_owned(), (sources.services)().tables()),
        (
            format!("Flows ({} of {count})", flows.flows.len()),
            flows.tables(),
        ),
    ];
    let body: String = sections
        .iter()
        .map(|(title, text)| format!("<h2>{title}</h2>\n<pre>{}</pre>\n", escaped(text)))
        .collect();
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head><meta charset=\"utf-8\">\
         <title>sluice</title></head>\n<body>\n<h1>sluice {VERSION}</h1>\n\
         <p><a href=\"/metrics\">metrics</a> <a href=\"/configz\">configuration</a> \
         <a href=\"/debug/state\">state as JSON</a></p>\n{body}</body>\n</html>\n"
    )
}

/// Text as HTML shows it: names of objects are whatever their authors wrote.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

/// A browser takes no million of lines.
const SHOWN_FLOWS: usize = 1_000;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_become_markup() {
        assert_eq!(escaped("<script>&"), "&lt;script&gt;&amp;");
    }
}
