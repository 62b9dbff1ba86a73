//! Neighbours and routes that change under open connections.

use std::time::Duration;

use lab::plan;
use lab::trial::{Load, Trial, ensure_all_right, settings};
use lab::{Family, Options, Site};

#[test]
fn a_neighbour_flush_and_a_route_change_lose_no_connection() {
    let Some(trial) = Trial::start(
        &Options::default(),
        settings(env!("CARGO_BIN_EXE_sluice"), 2),
    ) else {
        return;
    };
    let lab = trial.lab();
    let services = plan::services();
    let remote = services
        .iter()
        .find(|service| service.name == "n2a")
        .unwrap();
    let pod = plan::pod("n1a").unwrap();
    let mut loads = Vec::new();
    for family in Family::ALL {
        let node_port = remote.at_node(Site::N1, family);
        loads.push(Load::kept(lab, Site::Client, node_port, 4).unwrap());
        loads.push(Load::kept(lab, pod, remote.at_cluster_ip(family), 4).unwrap());
    }
    // The gateway of the wire takes over what went straight to the other node.
    lab.at(Site::Wire)
        .sysctls(&["net.ipv4.conf.all.send_redirects=0"])
        .unwrap();
    lab.at(Site::Wire)
        .ip(
            "route add 10.244.2.0/24 via 192.0.2.12\nroute add 10.244.1.0/24 via 192.0.2.11\n\
             route add fd00:10:244:2::/64 via 2001:db8::12\n\
             route add fd00:10:244:1::/64 via 2001:db8::11\n",
        )
        .unwrap();
    for change in [
        "neigh flush all\n",
        "route replace 10.244.2.0/24 via 192.0.2.1\n\
         route replace fd00:10:244:2::/64 via 2001:db8::1\n",
        "neigh flush all\n",
        "route replace 10.244.2.0/24 via 192.0.2.12\n\
         route replace fd00:10:244:2::/64 via 2001:db8::12\n",
    ] {
        lab.at(Site::N1).ip(change).unwrap();
        // Not a wait for a state: traffic of some duration is what meets the change.
        std::thread::sleep(Duration::from_millis(500));
    }
    for load in loads {
        ensure_all_right(&load.finish()).unwrap();
    }
    trial.finish();
}
