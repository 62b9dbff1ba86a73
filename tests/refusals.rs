//! Starts that cannot work: exit code 1, one sentence that names what is wrong, and a node as it was before.

use lab::sluice::{Settings, Sluice};
use lab::trial::{Trial, settings};
use lab::{Options, Site};
use std::time::Duration;

/// Starts sluice on n1, which must end with a failure that says all of `words`.
fn assert_refused(trial: &Trial, settings: &Settings, words: &[&str]) {
    let mut sluice = Sluice::start(trial.lab(), Site::N1, settings).unwrap();
    let status = sluice.wait_end(Duration::from_secs(5)).unwrap();
    let said = sluice.log_tail();
    assert_eq!(status.code(), Some(1), "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in: {said}");
    }
    assert!(!said.contains("panicked"), "{said}");
    trial.assert_nothing_left(Site::N1);
}

fn usual() -> Settings {
    settings(env!("CARGO_BIN_EXE_sluice"), 2)
}

#[test]
fn an_uplink_that_does_not_exist_is_named() {
    let Some(trial) = Trial::lay_out(&Options::default(), usual()) else {
        return;
    };
    let flags = ["--uplink", "nosuch0"].map(str::to_owned).to_vec();
    assert_refused(&trial, &Settings { flags, ..usual() }, &["nosuch0"]);
}

#[test]
fn an_mtu_beyond_what_native_xdp_takes_is_refused_before_anything_is_attached() {
    let Some(trial) = Trial::lay_out(&Options::default(), usual()) else {
        return;
    };
    trial
        .lab()
        .at(Site::Wire)
        .ip("link set n1 mtu 9000\n")
        .unwrap();
    assert_refused(&trial, &usual(), &["eth0", "MTU"]);
}

#[test]
fn missing_privileges_are_named() {
    let Some(trial) = Trial::lay_out(&Options::default(), usual()) else {
        return;
    };
    let binary = trial.lab().dir().join("unprivileged");
    let own = usual().binary;
    // The capabilities go, the user stays: files can be read and written as before.
    let script = format!(
        "#!/bin/sh\nexec setpriv --bounding-set=-all {} \"$@\"\n",
        own.display()
    );
    std::fs::write(&binary, script).unwrap();
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&binary, executable).unwrap();
    assert_refused(&trial, &Settings { binary, ..usual() }, &["CAP_"]);
}

#[test]
fn a_second_start_on_a_node_is_refused_and_the_first_serves_on() {
    let Some(trial) = Trial::start(&Options::default(), usual()) else {
        return;
    };
    let mut second = Sluice::start(trial.lab(), Site::N1, &usual()).unwrap();
    let status = second.wait_end(Duration::from_secs(5)).unwrap();
    let said = second.log_tail();
    assert!(
        status.code() == Some(1) && said.contains("is in use by the process"),
        "{said}"
    );
    let row = lab::rows::all()
        .into_iter()
        .find(|row| row.name == "client-nodeport-remote/tcp4");
    let outcome = row.expect("the row exists").run(trial.lab());
    assert!(outcome.is_right(), "{:?}", outcome.faults);
    trial.finish();
}
