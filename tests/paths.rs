//! Every path of the table, end to end, with several shapes of engine and with checksums left to software.
//!
//! The rows and what is expected of each are the lab's; here they run against the built binary, and each run ends with the
//! promises of [`Trial::finish`].

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::ensure;
use lab::client::Connection;
use lab::trial::{Trial, eventually, say, settings};
use lab::{Family, Options, Site, plan, proof, rows};

#[test]
fn every_path_works_with_one_worker_and_one_queue() {
    every_path(
        1,
        &Options {
            queues: 1,
            tx_off: false,
        },
        |name| !is_long(name),
    );
}

#[test]
fn every_path_works_with_two_workers_and_one_queue() {
    every_path(
        2,
        &Options {
            queues: 1,
            tx_off: false,
        },
        |name| !is_long(name),
    );
}

#[test]
fn every_path_works_with_two_workers_and_two_queues() {
    every_path(
        2,
        &Options {
            queues: 2,
            tx_off: false,
        },
        |name| !is_long(name),
    );
}

#[test]
fn every_path_works_with_two_workers_and_four_queues() {
    every_path(
        2,
        &Options {
            queues: 4,
            tx_off: false,
        },
        |name| !is_long(name),
    );
}

#[test]
fn every_path_and_100_mb_streams_work_with_checksum_offload_off() {
    every_path(
        2,
        &Options {
            queues: 2,
            tx_off: true,
        },
        |name| !name.contains("20000"),
    );
}

/// Rows that the demo runs and that say nothing new about workers and queues.
fn is_long(name: &str) -> bool {
    name.contains("20000") || name.starts_with("stream-")
}

fn every_path(workers: u32, options: &Options, wanted: impl Fn(&str) -> bool) {
    let settings = settings(env!("CARGO_BIN_EXE_sluice"), workers);
    let Some(trial) = Trial::start(options, settings) else {
        return;
    };
    let mut wrong = Vec::new();
    for row in rows::all().iter().filter(|row| wanted(&row.name)) {
        let outcome = row.run(trial.lab());
        if !outcome.is_right() {
            say(&format!("wrong: {}", outcome.name));
            wrong.push(format!("{}: {}", outcome.name, outcome.faults.join("; ")));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} rows are wrong:\n{}",
        wrong.len(),
        wrong.join("\n")
    );
    every_worker_holds_flows(&trial);
    trial.finish();
}

/// Sixty-four connections from as many ports: the owner hash leaves no worker without one.
fn every_worker_holds_flows(trial: &Trial) {
    let services = plan::services();
    let target: SocketAddr = services[0].at_node(Site::N1, Family::V4);
    let connections: Vec<Connection> = trial.lab().at(Site::Client).run(|| {
        (0..64)
            .map(|seed| {
                let mut connection = Connection::open(target, Duration::from_secs(3)).unwrap();
                assert!(connection.echo(100, seed).unwrap().right);
                connection
            })
            .collect()
    });
    eventually(Duration::from_secs(2), || {
        let status = trial.ask(Site::N1, "status");
        for worker in status["workers"]
            .as_array()
            .expect("status lists the workers")
        {
            ensure!(
                worker["flows"].as_u64() > Some(0),
                "worker {} holds no flow",
                worker["id"]
            );
        }
        Ok(())
    });
    let tuples = proof::tuples(trial.lab(), Site::N1).expect("the steering map can be read");
    assert!(
        tuples >= 2 * 64,
        "{tuples} tuples for 64 flows, both directions of each"
    );
    let flows = trial.ask(Site::N1, "flows");
    let flows = flows["flows"].as_array().expect("flows lists flows");
    let own = |flow: &&serde_json::Value| flow["original"]["dst"] == target.to_string();
    let shown = flows
        .iter()
        .filter(own)
        .filter(|flow| flow["reply"]["src"].is_string())
        .count();
    assert!(
        shown >= 64,
        "{shown} of 64 flows are shown with both tuples"
    );
    drop(connections);
}
