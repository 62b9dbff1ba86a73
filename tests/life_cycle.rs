//! What a node looks like while the engine is stopped, and after it has ended, however it ended.

use std::time::Duration;

use anyhow::ensure;
use lab::client::{Asking, ask};
use lab::plan::{self, Protocol};
use lab::trial::{Load, Trial, ensure_all_right, eventually, settings};
use lab::{Family, Options, Site, rows};
use rustix::process::Signal;

fn start() -> Option<Trial> {
    Trial::start(
        &Options::default(),
        settings(env!("CARGO_BIN_EXE_sluice"), 2),
    )
}

/// Rows that ask no Service are to be right at any time.
fn assert_untouched_paths_work(trial: &Trial) {
    for row in rows::all().iter().filter(|row| !row.needs_service()) {
        let outcome = row.run(trial.lab());
        assert!(outcome.is_right(), "{}: {:?}", outcome.name, outcome.faults);
    }
}

fn node_port(name: &str, family: Family) -> std::net::SocketAddr {
    let service = plan::services()
        .into_iter()
        .find(|service| service.name == name);
    service
        .expect("the plan has the Service")
        .at_node(Site::N1, family)
}

/// Asks a few times through a node port, in both families.
fn serves(trial: &Trial) -> anyhow::Result<()> {
    for family in Family::ALL {
        for protocol in Protocol::ALL {
            let target = node_port("n2a", family);
            let patience = Duration::from_secs(1);
            let asking = Asking {
                protocol,
                target,
                patience,
                longest: 1000,
            };
            ensure_all_right(&trial.lab().at(Site::Client).run(|| ask(&asking, 5)))?;
        }
    }
    Ok(())
}

#[test]
fn a_stopped_engine_leaves_direct_traffic_alone_and_goes_on_where_it_was() {
    let Some(trial) = start() else { return };
    let kept = Load::kept(trial.lab(), Site::Client, node_port("n2a", Family::V4), 4).unwrap();
    trial.signal(Site::N1, Signal::STOP);
    assert_untouched_paths_work(&trial);
    trial.signal(Site::N1, Signal::CONT);
    eventually(Duration::from_secs(5), || serves(&trial));
    ensure_all_right(&kept.finish()).unwrap();
    trial.finish();
}

#[test]
fn sigterm_under_load_leaves_nothing_behind() {
    let Some(mut trial) = start() else { return };
    let load = Load::kept(trial.lab(), Site::Client, node_port("n1a", Family::V6), 4).unwrap();
    trial.signal(Site::N1, Signal::TERM);
    assert!(trial.await_end(Site::N1));
    trial.assert_nothing_left(Site::N1);
    drop(load);
    assert_untouched_paths_work(&trial);
    trial.finish();
}

#[test]
fn kill_and_cleanup_leave_nothing_behind() {
    let Some(mut trial) = start() else { return };
    serves(&trial).unwrap();
    trial.signal(Site::N1, Signal::KILL);
    assert!(!trial.await_end(Site::N1));
    assert_untouched_paths_work(&trial);
    trial.cleanup(Site::N1);
    trial.assert_nothing_left(Site::N1);
    assert_untouched_paths_work(&trial);
    trial.finish();
}

#[test]
fn the_next_start_after_a_kill_serves_and_its_stop_leaves_nothing_behind() {
    let Some(mut trial) = start() else { return };
    serves(&trial).unwrap();
    trial.signal(Site::N1, Signal::KILL);
    assert!(!trial.await_end(Site::N1));
    trial.start_node(Site::N1);
    trial.await_ready(Site::N1);
    serves(&trial).unwrap();
    trial.finish();
}

#[test]
fn one_node_ends_and_the_other_on_the_same_machine_serves_on() {
    let Some(mut trial) = start() else { return };
    trial.signal(Site::N2, Signal::TERM);
    assert!(trial.await_end(Site::N2));
    serves(&trial).unwrap();
    let status = trial.ask(Site::N1, "status");
    assert_eq!(status["engine"]["state"], "on");
    eventually(Duration::from_secs(1), || {
        ensure!(
            trial.ask(Site::N1, "flows")["flows"].is_array(),
            "no list of flows"
        );
        Ok(())
    });
    trial.finish();
}
