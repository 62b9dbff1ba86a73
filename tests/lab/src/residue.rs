//! What a node consists of, so that two moments can be compared: what a proxy left behind is what came after it and is still
//! there.
//!
//! Devices with their flags, offloads and XDP programs, tcx and clsact programs, routes and rules of every table, sysctls,
//! packet filter. Neighbours, counters and caches come and go by themselves and are left out.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};
use aya::programs::{SchedClassifier, TcAttachType};
use serde_json::Value;

use crate::plan::Site;
use crate::topology::Lab;

/// A node at one moment, a line for each thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NodeState(BTreeSet<String>);

impl NodeState {
    /// Looks at a node.
    pub fn capture(lab: &Lab, node: Site) -> Result<Self> {
        let mut lines = BTreeSet::new();
        let namespace = lab.at(node);
        let links = namespace.output("ip", &["-d", "-j", "link", "show"])?;
        let links: Vec<Value> = serde_json::from_str(&links)?;
        for link in &links {
            let name = link["ifname"].as_str().context("a link without a name")?;
            for key in [
                "flags",
                "mtu",
                "qdisc",
                "address",
                "master",
                "promiscuity",
                "xdp",
            ] {
                lines.insert(format!("link {name} {key} {}", link[key]));
            }
            for hook in ["ingress", "egress"] {
                let filters = namespace.output("tc", &["filter", "show", "dev", name, hook])?;
                lines.extend(
                    filters
                        .lines()
                        .map(|line| format!("tc {name} {hook} {line}")),
                );
            }
            let features = namespace.output("ethtool", &["-k", name])?;
            lines.extend(
                features
                    .lines()
                    .map(|line| format!("feature {name} {line}")),
            );
        }
        lines.extend(namespace.run(|| programs(&links))?);
        for family in ["-4", "-6"] {
            let routes = namespace.output("ip", &[family, "route", "show", "table", "all"])?;
            lines.extend(
                routes
                    .lines()
                    .map(|line| format!("route {family} {}", lasting(line))),
            );
            let rules = namespace.output("ip", &[family, "rule", "show"])?;
            lines.extend(rules.lines().map(|line| format!("rule {family} {line}")));
        }
        let filter = namespace.output("nft", &["list", "ruleset"])?;
        lines.extend(filter.lines().map(|line| format!("nft {line}")));
        namespace.run(|| sysctls(Path::new("/proc/sys/net"), &mut lines));
        Ok(Self(lines))
    }

    /// Fails with every line that is not as it was in `before`.
    pub fn ensure_as(&self, before: &Self) -> Result<()> {
        let lost = before
            .0
            .difference(&self.0)
            .map(|line| format!("- {line}\n"));
        let left = self
            .0
            .difference(&before.0)
            .map(|line| format!("+ {line}\n"));
        let difference: String = lost.chain(left).collect();
        ensure!(
            difference.is_empty(),
            "the node is not as it was:\n{difference}"
        );
        Ok(())
    }
}

/// Programs at the tcx hooks; `ip` and `tc` do not show them.
fn programs(links: &[Value]) -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for link in links {
        let name = link["ifname"].as_str().context("a link without a name")?;
        for hook in [TcAttachType::Ingress, TcAttachType::Egress] {
            let (_, programs) = SchedClassifier::query_tcx(name, hook)?;
            lines.extend(programs.iter().map(|program| {
                format!(
                    "tcx {name} {hook:?} {}",
                    program.name_as_str().unwrap_or_default()
                )
            }));
        }
    }
    Ok(lines)
}

/// A route without what the kernel counts in it.
fn lasting(route: &str) -> String {
    let mut words: Vec<&str> = route.split_whitespace().collect();
    while let Some(at) = words.iter().position(|word| *word == "expires") {
        words.drain(at..(at + 2).min(words.len()));
    }
    words.join(" ")
}

fn sysctls(dir: &Path, lines: &mut BTreeSet<String>) {
    let Ok(entries) = fs::read_dir(dir) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            sysctls(&path, lines);
        } else if let Ok(value) = fs::read_to_string(&path)
            && !path.ends_with("nf_conntrack_count")
        {
            lines.insert(format!("{} = {}", path.display(), value.trim()));
        }
    }
}
