//! `sluice resolve`: what would be served from a folder of manifests on this node. Touches nothing;
//! rejected objects are named and are no failure.

use serde_json::json;

use crate::args::{Output, Settings};
use crate::config::{Config, Source};
use crate::output::{self, Tabular, table};
use crate::report::service_tables;

pub(crate) fn run(settings: &Settings, output: Output) -> anyhow::Result<()> {
    let config = Config::load(settings)?;
    let Source::Manifests(folder) = &config.source else {
        anyhow::bail!("there is no folder to read; name one with --manifests");
    };
    let resolved = control::resolve_folder(folder, &config.control())?;
    Ok(output::print(&resolved.to_resolution(), output)?)
}

impl Tabular for control::Resolution {
    fn tables(&self) -> String {
        let services: Vec<_> = self.services.iter().map(|service| json!(service)).collect();
        let mut parts = vec![service_tables(&services)];
        if !self.health_checks.is_empty() {
            let rows = self.health_checks.iter().map(|check| {
                vec![
                    format!("{}/{}", check.namespace, check.name).into(),
                    check.port.to_string().into(),
                    check.local_endpoints.to_string().into(),
                ]
            });
            parts.push(table(&["HEALTH CHECK", "#PORT", "#LOCAL ENDPOINTS"], rows));
        }
        if !self.rejected.is_empty() {
            let rows = self.rejected.iter().map(|rejected| {
                let name = match rejected.namespace.as_str() {
                    "" => rejected.name.clone(),
                    namespace => format!("{namespace}/{}", rejected.name),
                };
                vec![
                    (&rejected.kind).into(),
                    name.into(),
                    (&rejected.reason).into(),
                ]
            });
            parts.push(table(&["REJECTED", "NAME", "REASON"], rows));
        }
        parts.join("\n\n")
    }
}
