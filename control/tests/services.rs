//! Cluster objects in, resolved services out.
//!
//! Each file in `fixtures/` is one cluster: its objects, and in the comment at its head what it
//! shows and which node and configuration it is resolved for (`# node:`, `# config:`). The
//! resolution is compared with a reviewed snapshot in `snapshots/`.

use std::fs;
use std::path::{Path, PathBuf};

use control::address::Cidr;
use control::balance::Scheduler;
use control::node::NodePortAddresses;
use control::policy::ExternalIps;
use control::{ControlConfig, resolve_folder};

#[test]
fn every_fixture_resolves_to_its_reviewed_snapshot() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let mut files: Vec<PathBuf> = fs::read_dir(fixtures)
        .expect("the fixtures")
        .map(|entry| entry.expect("a fixture").path())
        .collect();
    files.sort();
    assert!(!files.is_empty());
    for file in files {
        let text = fs::read_to_string(&file).expect("a fixture's text");
        let folder = tempfile::tempdir().expect("a temporary folder");
        let name = file
            .file_stem()
            .and_then(|stem| stem.to_str())
            .expect("a file name");
        fs::write(folder.path().join(format!("{name}.yaml")), &text).expect("a copy of it");
        let resolved =
            resolve_folder(folder.path(), &config(&text)).expect("a folder that can be listed");
        insta::with_settings!({ description => head(&text), omit_expression => true }, {
            insta::assert_json_snapshot!(name, resolved.to_resolution());
        });
    }
}

fn head(text: &str) -> String {
    let comments = text.lines().take_while(|line| line.starts_with('#'));
    let words = comments.map(|line| line.trim_start_matches('#').trim());
    words.collect::<Vec<_>>().join(" ")
}

fn config(text: &str) -> ControlConfig {
    let mut config = ControlConfig {
        node_name: "n1".into(),
        ..ControlConfig::default()
    };
    for line in text.lines().take_while(|line| line.starts_with('#')) {
        if let Some(name) = line.strip_prefix("# node:") {
            config.node_name = name.trim().into();
        }
        let Some(setting) = line.strip_prefix("# config:") else {
            continue;
        };
        let setting = setting.trim();
        let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
        let ranges = || {
            value
                .split(',')
                .map(|text| Cidr::parse(text).expect("a range"))
                .collect()
        };
        match key {
            "masqueradeAll" => config.masquerade_all = true,
            "scheduler" => {
                config.default_scheduler = Scheduler::from_name(value).expect("a scheduler")
            }
            "nodePortAddresses" if value == "primary" => {
                config.node_port_addresses = NodePortAddresses::Primary;
            }
            "nodePortAddresses" => config.node_port_addresses = NodePortAddresses::Within(ranges()),
            "externalIPs" if value == "deny" => config.external_ips = ExternalIps::Deny,
            "externalIPs" => config.external_ips = ExternalIps::Within(ranges()),
            other => panic!("{other} is no setting"),
        }
    }
    config
}
