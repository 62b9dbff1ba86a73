//! `sluice config check FILE`: every mistake of a configuration file, and what is served otherwise
//! than asked for. Touches nothing; exit 1 if there is a mistake.

use std::path::Path;

use anyhow::bail;
use serde::Serialize;

use crate::args::{Output, Settings};
use crate::config::{Config, ConfigError, Finding};
use crate::output::{self, Tabular, table};
use crate::report::ApiVersion;

pub(crate) fn check(file: &Path, output: Output) -> anyhow::Result<()> {
    let settings = Settings {
        config: Some(file.to_owned()),
        ..Settings::default()
    };
    let (mistakes, warnings) = match Config::load(&settings) {
        Ok(config) => (Vec::new(), config.warnings),
        Err(ConfigError::Mistakes { mistakes, warnings }) => (mistakes, warnings),
        Err(error) => return Err(error.into()),
    };
    let count = mistakes.len();
    let result = ConfigCheck {
        api_version: ApiVersion::V1,
        kind: "ConfigCheck",
        valid: mistakes.is_empty(),
        mistakes,
        warnings,
    };
    output::print(&result, output)?;
    if count > 0 {
        bail!(
            "{} has {count} mistake{}",
            file.display(),
            if count == 1 { "" } else { "s" }
        );
    }
    Ok(())
}

#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct ConfigCheck {
    api_version: ApiVersion,
    kind: &'static str,
    valid: bool,
    mistakes: Vec<Finding>,
    warnings: Vec<Finding>,
}

impl Tabular for ConfigCheck {
    fn tables(&self) -> String {
        let mistakes = self.mistakes.iter().map(|finding| ("mistake", finding));
        let warnings = self.warnings.iter().map(|finding| ("warning", finding));
        let rows: Vec<_> = mistakes
            .chain(warnings)
            .map(|(what, finding)| {
                vec![
                    what.into(),
                    (&finding.key).into(),
                    (&finding.value).into(),
                    (&finding.reason).into(),
                ]
            })
            .collect();
        if rows.is_empty() {
            return "no mistakes".to_owned();
        }
        table(&["FOUND", "KEY", "VALUE", "REASON"], rows)
    }
}
