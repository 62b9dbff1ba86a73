//! The lab checks itself: with kernel NAT in the engine's place every row must be right, and the proofs must see through it.

use lab::demo::{self, Dataplane, Run};
use lab::residue::NodeState;
use lab::sluice::Settings;
use lab::trial::Trial;
use lab::{Options, Site, kernel, proof};

/// A trial without a binary: laid out, nobody serves.
fn lay_out() -> Option<Trial> {
    Trial::lay_out(&Options::default(), Settings::new("/bin/false".into()))
}

#[test]
fn kernel_nat_makes_every_bridged_row_right() {
    let Some(trial) = lay_out() else { return };
    drop(trial);
    let run = Run {
        options: Options::default(),
        dataplane: Dataplane::Nft,
        settings: Settings::new("/bin/false".into()),
        only: Some("bridged".to_owned()),
        keep: false,
    };
    let mut table = Vec::new();
    let report = demo::run(&run, &mut table).unwrap();
    let (right, all) = report.score();
    assert!(
        right == all && all > 0,
        "{}",
        String::from_utf8_lossy(&table)
    );
}

#[test]
fn the_proofs_see_kernel_nat() {
    let Some(trial) = lay_out() else { return };
    proof::no_nat_rule(trial.lab(), Site::N1).unwrap();
    kernel::serve(trial.lab()).unwrap();
    assert!(proof::no_nat_rule(trial.lab(), Site::N1).is_err());
    let rows = lab::rows::all();
    let served = rows
        .iter()
        .find(|row| row.name == "client-nodeport-remote/udp4")
        .unwrap();
    assert!(served.run(trial.lab()).is_right());
    let found = proof::no_conntrack_entry(trial.lab(), Site::N1).unwrap_err();
    assert!(found.to_string().contains("dport=30015"), "{found}");
}

#[test]
fn traffic_leaves_a_node_as_it_was_and_a_route_does_not() {
    let Some(trial) = lay_out() else { return };
    let before = NodeState::capture(trial.lab(), Site::N1).unwrap();
    for row in lab::rows::all()
        .iter()
        .filter(|row| row.name.starts_with("direct-"))
    {
        assert!(row.run(trial.lab()).is_right(), "{}", row.name);
    }
    NodeState::capture(trial.lab(), Site::N1)
        .unwrap()
        .ensure_as(&before)
        .unwrap();
    trial
        .lab()
        .at(Site::N1)
        .ip("route add 198.18.0.0/24 dev eth0\n")
        .unwrap();
    let after = NodeState::capture(trial.lab(), Site::N1).unwrap();
    assert!(
        after
            .ensure_as(&before)
            .unwrap_err()
            .to_string()
            .contains("+ route -4 198.18.0.0/24")
    );
}
