//! Manifests that change under load: new connections follow within a second, old ones to remaining backends live on.

use std::net::SocketAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::client::{Asking, Connection, ask};
use lab::manifests::write_service;
use lab::plan::{self, Protocol, Service};
use lab::trial::{Load, Trial, ensure_all_right, settings};
use lab::{Family, Options, Site};

const LIVE: Duration = Duration::from_secs(1);

fn web(backends: &[&str]) -> Service {
    let backends = backends.iter().map(|&name| name.to_owned()).collect();
    Service {
        backends,
        ..plan::services().swap_remove(0)
    }
}

/// Writes the Service with these backends; a second later new connections reach exactly these.
fn edit(trial: &Trial, target: SocketAddr, backends: &[&str]) {
    write_service(&trial.manifests(), &web(backends)).unwrap();
    // The second is the promise, not a guess at when it is done.
    sleep(LIVE);
    let patience = Duration::from_secs(1);
    let asking = Asking {
        protocol: Protocol::Tcp,
        target,
        patience,
        longest: 100,
    };
    let tally = trial.lab().at(Site::Client).run(|| ask(&asking, 16));
    ensure_all_right(&tally).unwrap();
    assert!(
        tally.shares.keys().eq(backends),
        "{:?} answer",
        tally.shares
    );
}

#[test]
fn an_added_backend_is_used_within_a_second_and_no_connection_notices() {
    for family in Family::ALL {
        let Some(trial) = Trial::start(
            &Options::default(),
            settings(env!("CARGO_BIN_EXE_sluice"), 2),
        ) else {
            return;
        };
        let target = web(&[]).at_node(Site::N1, family);
        edit(&trial, target, &["n1a", "n2a"]);
        let kept = Load::kept(trial.lab(), Site::Client, target, 8).unwrap();
        let tcp = Load::fresh(trial.lab(), Site::Client, target, Protocol::Tcp).unwrap();
        let udp = Load::fresh(trial.lab(), Site::Client, target, Protocol::Udp).unwrap();
        edit(&trial, target, &["n1a", "n2a", "n2b"]);
        for load in [kept, tcp, udp] {
            ensure_all_right(&load.finish()).unwrap();
        }
        trial.finish();
    }
}

#[test]
fn a_removed_backend_takes_only_its_own_connections_with_it() {
    let Some(trial) = Trial::start(
        &Options::default(),
        settings(env!("CARGO_BIN_EXE_sluice"), 2),
    ) else {
        return;
    };
    let target = web(&[]).at_node(Site::N1, Family::V4);
    edit(&trial, target, &["n1a", "n2a"]);
    let mut connections: Vec<(String, Connection)> = trial.lab().at(Site::Client).run(|| {
        (0..16)
            .map(|seed| {
                let mut connection = Connection::open(target, Duration::from_secs(3)).unwrap();
                let answer = connection.echo(100, seed).unwrap();
                (answer.server, connection)
            })
            .collect()
    });
    edit(&trial, target, &["n2a", "n2b"]);
    let (mut lived, mut ended) = (0, 0);
    for (server, connection) in &mut connections {
        let start = Instant::now();
        let answer = connection.echo(500, 77);
        if server == "n2a" {
            let answer = answer.expect("a connection to a remaining backend lives on");
            assert!(answer.right && answer.server == "n2a");
            lived += 1;
        } else {
            assert!(
                answer.is_err(),
                "a connection to a backend that is gone goes on"
            );
            assert!(
                start.elapsed() < Duration::from_secs(1),
                "it was not reset, but timed out"
            );
            ended += 1;
        }
    }
    assert!(lived > 0 && ended > 0, "{lived} lived, {ended} ended");
    drop(connections);
    trial.finish();
}
