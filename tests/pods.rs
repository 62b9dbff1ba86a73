//! Pods that come and go while the engine runs.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use anyhow::ensure;
use lab::client::{Asking, ask};
use lab::manifests::{service_file, write_service_with};
use lab::plan::{self, Attachment, Pod, Protocol, Service};
use lab::trial::{Trial, ensure_all_right, eventually, settings};
use lab::{Family, Namespace, Options, Site, proof};

const LATE: Pod = Pod {
    name: "late",
    node: Site::N1,
    attachment: Attachment::Routed,
    host_end: "cali1x",
    v4: Ipv4Addr::new(10, 244, 1, 20),
    v6: Ipv6Addr::new(0xfd00, 0x10, 0x244, 1, 0, 0, 0, 0x20),
};

fn late_service() -> Service {
    Service {
        name: "late".to_owned(),
        number: 40,
        backends: Vec::new(),
        balanced: false,
    }
}

fn ask_a_few(from: &Namespace, target: SocketAddr) -> anyhow::Result<()> {
    for protocol in Protocol::ALL {
        let patience = Duration::from_millis(500);
        let asking = Asking {
            protocol,
            target,
            patience,
            longest: 1000,
        };
        ensure_all_right(&from.run(|| ask(&asking, 5)))?;
    }
    Ok(())
}

#[test]
fn a_pod_made_after_the_start_is_served_within_a_second_and_leaves_nothing_when_deleted() {
    let Some(trial) = Trial::start(
        &Options::default(),
        settings(env!("CARGO_BIN_EXE_sluice"), 2),
    ) else {
        return;
    };
    let lab = trial.lab();
    let before = proof::devices(lab, Site::N1).unwrap();
    let late = lab.add_pod(&LATE).unwrap();
    let backends = [IpAddr::V4(LATE.v4), IpAddr::V6(LATE.v6)].map(|ip| ("late", "n1", ip));
    write_service_with(&trial.manifests(), &late_service(), &backends).unwrap();
    let routed = &plan::services()[1];
    for family in Family::ALL {
        eventually(Duration::from_secs(1), || {
            // As a backend for clients outside, as a client, and as its own backend.
            ask_a_few(
                lab.at(Site::Client),
                late_service().at_node(Site::N1, family),
            )?;
            ask_a_few(late.namespace(), routed.at_cluster_ip(family))?;
            ask_a_few(late.namespace(), late_service().at_cluster_ip(family))
        });
    }
    assert_eq!(
        proof::devices(lab, Site::N1).unwrap().len(),
        before.len() + 1
    );
    late.remove().unwrap();
    std::fs::remove_file(service_file(&trial.manifests(), &late_service())).unwrap();
    eventually(Duration::from_secs(20), || {
        let flows = trial.ask(Site::N1, "flows");
        let flows = flows["flows"].as_array().expect("flows lists flows");
        let left = flows
            .iter()
            .filter(|flow| flow.to_string().contains("default/late"));
        ensure!(left.count() == 0, "flows of the deleted pod are left");
        Ok(())
    });
    assert_eq!(proof::devices(lab, Site::N1).unwrap(), before);
    trial.finish();
}
