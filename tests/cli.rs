//! The built binary as a user meets it: exit codes, and the shape of what it prints. Touches the
//! network by a loopback port of its own choice only.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

fn sluice(words: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sluice"))
        .args(words)
        .output()
        .expect("the binary starts")
}

fn code(output: &Output) -> i32 {
    output.status.code().expect("no signal ended it")
}

fn error(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("standard output holds JSON")
}

/// A file of this text, which lives as long as the folder.
fn file(text: &str) -> (tempfile::TempDir, String) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config");
    std::fs::write(&path, text).unwrap();
    let path = path.to_str().unwrap().to_owned();
    (folder, path)
}

#[test]
fn mistakes_in_the_command_line_exit_with_2() {
    for words in [
        &["dance"][..],
        &[],
        &["run"],
        &["run", "--dance"],
        &["resolve", "--node=n1"],
        &["status", "-o", "xml"],
        &[
            "trace",
            "--manifests=/m",
            "--src=192.0.2.1",
            "--dst=10.96.0.1:80",
            "--proto=tcp",
        ],
    ] {
        assert_eq!(code(&sluice(words)), 2, "{words:?}");
    }
}

#[test]
fn help_and_version_exit_with_0() {
    assert_eq!(code(&sluice(&["--help"])), 0);
    let version = sluice(&["--version"]);
    assert_eq!(code(&version), 0);
    assert!(version.stdout.starts_with(b"sluice "));
}

#[test]
fn a_client_command_without_a_sluice_says_what_to_do() {
    // A port that nothing listens on: it was free a moment ago.
    let free = std::net::TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap();
    for command in ["status", "services", "flows"] {
        let output = sluice(&[command, "--admin-address", &free.to_string(), "-o", "json"]);
        assert_eq!(code(&output), 1);
        let error = error(&output);
        assert!(
            error.contains("no sluice runs here; start it with `sluice run`"),
            "{error}"
        );
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn config_check_names_every_mistake_and_exits_with_1() {
    let (_folder, path) = file("mode: userspace\nsluice: {engine: {workers: 0}, x: 1}\ny: 2");
    let output = sluice(&["config", "check", &path, "-o", "json"]);
    assert_eq!(code(&output), 1);
    let found = json(&output);
    assert_eq!(found["valid"], false);
    let keys: Vec<_> = found["mistakes"]
        .as_array()
        .unwrap()
        .iter()
        .map(|m| &m["key"])
        .collect();
    assert_eq!(keys, ["mode", "sluice.engine.workers", "sluice.x"]);
    assert_eq!(found["warnings"][0]["key"], "y");
    assert!(error(&output).contains("3 mistakes"), "{}", error(&output));
}

#[test]
fn config_check_of_a_right_file_exits_with_0() {
    let (_folder, path) = file("mode: none");
    let output = sluice(&["config", "check", &path]);
    assert_eq!(
        (code(&output), output.stdout.as_slice()),
        (0, &b"no mistakes\n"[..])
    );
    assert_eq!(code(&sluice(&["config", "check", "/nowhere"])), 1);
}

#[test]
fn a_mode_of_other_systems_ends_the_start_with_1_and_the_alternatives() {
    let folder = tempfile::tempdir().unwrap();
    let manifests = folder.path().to_str().unwrap();
    for mode in ["userspace", "kernelspace"] {
        let output = sluice(&["run", "--manifests", manifests, "--node=n1", "--mode", mode]);
        assert_eq!(code(&output), 1);
        let error = error(&output);
        assert!(
            error.contains("--mode") && error.contains("nftables, iptables, ipvs"),
            "{error}"
        );
    }
}

#[test]
fn cleanup_where_nothing_ran_finds_nothing() {
    let base = tempfile::tempdir().unwrap();
    let base = base.path().to_str().unwrap();
    let output = sluice(&["cleanup", "--dry-run", "--state-dir", base, "-o", "json"]);
    assert_eq!(code(&output), 0, "{}", error(&output));
    let result = json(&output);
    assert_eq!(result["kind"], "Cleanup");
    assert_eq!(result["changes"].as_array().map(Vec::len), Some(0));
}

#[test]
fn resolve_and_trace_print_the_contracts_objects_and_name_what_is_rejected() {
    let folder = tempfile::tempdir().unwrap();
    let objects = r#"
apiVersion: v1
kind: Service
metadata: {name: web}
spec: {clusterIP: 10.96.0.10, ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: web-1, labels: {kubernetes.io/service-name: web}}
addressType: IPv4
endpoints: [{addresses: [10.244.1.10]}]
ports: [{name: http, port: 8080}]
---
apiVersion: v1
kind: Service
metadata: {name: bad}
spec: {clusterIP: 10.96.0.11, ports: [{port: 99999}]}
"#;
    std::fs::write(folder.path().join("objects.yaml"), objects).unwrap();
    let manifests = folder.path().to_str().unwrap();
    let output = sluice(&[
        "resolve",
        "--manifests",
        manifests,
        "--node=n1",
        "-o",
        "json",
    ]);
    assert_eq!(code(&output), 0, "{}", error(&output));
    let resolution = json(&output);
    assert_eq!(resolution["apiVersion"], "sluice/v1");
    assert_eq!(resolution["kind"], "Resolution");
    let frontend = &resolution["services"][0]["frontends"][0];
    assert_eq!(frontend["address"], "10.96.0.10");
    assert_eq!(
        frontend["backends"],
        serde_json::json!(["10.244.1.10:8080"])
    );
    assert_eq!(resolution["rejected"][0]["name"], "bad");

    let table = sluice(&["resolve", "--manifests", manifests, "--node=n1"]);
    let table = String::from_utf8(table.stdout).unwrap();
    assert!(
        table.contains("default/web:http") && table.contains("10.96.0.10:80"),
        "{table}"
    );
    assert!(table.contains("99999"), "{table}");

    let words = [
        "--src=10.244.9.9:4000",
        "--dst=10.96.0.10:80",
        "--proto=tcp",
        "--from=pod",
    ];
    let mut line = vec!["trace", "--manifests", manifests, "--node=n1", "-o", "json"];
    line.extend(words);
    let output = sluice(&line);
    assert_eq!(code(&output), 0, "{}", error(&output));
    let expected = serde_json::json!({
        "verdict": "forward",
        "reason": "a new connection; its source stays",
        "service": "default/web:http",
        "backend": "10.244.1.10:8080",
        "translated": {"src": "10.244.9.9:4000", "dst": "10.244.1.10:8080"},
        "scheduler": "rr",
        "out": "host",
    });
    assert_eq!(json(&output), expected);

    let missing = sluice(&["resolve", "--manifests=/nowhere", "--node=n1"]);
    assert_eq!(code(&missing), 1);
    assert!(error(&missing).contains("/nowhere"), "{}", error(&missing));
}

/// A running `sluice run` with the engine off; killed when the test ends.
struct Running {
    child: Child,
    admin: String,
}

impl Running {
    fn start(state: &Path, manifests: &Path) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_sluice"))
            .args(["run", "--node=n1", "--engine=off", "--mode=none"])
            .args(["--admin-address=127.0.0.1:0", "--logging-format=json"])
            .arg("--manifests")
            .arg(manifests)
            .arg("--state-dir")
            .arg(state)
            .stderr(Stdio::piped())
            .spawn()
            .expect("the binary starts");
        let log = BufReader::new(child.stderr.take().expect("standard error is piped"));
        let admin = admin_address(log).expect("the log names the admin address");
        Self { child, admin }
    }

    /// SIGTERM, and the exit code within the five seconds that the contract gives.
    fn terminate(mut self) -> Option<i32> {
        let pid = i32::try_from(self.child.id()).unwrap();
        let pid = rustix::process::Pid::from_raw(pid).unwrap();
        rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
        let deadline = Instant::now() + Duration::from_secs(5);
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status.code();
            }
            assert!(Instant::now() < deadline, "it does not end within 5 s");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It has ended already where the test went well.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

/// The admin address that the log names; the rest of the log is read in the background.
fn admin_address(log: impl BufRead + Send + 'static) -> Option<String> {
    let mut lines = log.lines().map_while(Result::ok);
    let found = lines.find_map(|line| {
        let line: Value = serde_json::from_str(&line).ok()?;
        line["fields"]["admin"].as_str().map(str::to_owned)
    });
    std::thread::spawn(move || lines.for_each(drop));
    found
}

#[test]
fn client_commands_read_a_running_sluice() {
    let (state, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = Running::start(state.path(), manifests.path());
    for (command, kind, list) in [
        ("status", "Status", "workers"),
        ("services", "ServiceList", "services"),
        ("flows", "FlowList", "flows"),
    ] {
        let output = sluice(&[command, "--admin-address", &running.admin, "-o", "json"]);
        assert_eq!(code(&output), 0, "{}", error(&output));
        let object = json(&output);
        assert_eq!(object["apiVersion"], "sluice/v1");
        assert_eq!(object["kind"], kind);
        assert!(object[list].is_array(), "{object}");
        let table = sluice(&[command, "--admin-address", &running.admin]);
        assert_eq!(code(&table), 0, "{}", error(&table));
    }
    assert_eq!(running.terminate(), Some(0));
}

#[test]
fn a_second_sluice_is_told_the_first_ones_number() {
    let (state, manifests) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let running = Running::start(state.path(), manifests.path());
    let state = state.path().to_str().unwrap();
    let manifests = manifests.path().to_str().unwrap();
    for words in [
        &[
            "run",
            "--manifests",
            manifests,
            "--node=n1",
            "--mode=none",
            "--state-dir",
            state,
        ][..],
        &["cleanup", "--dry-run", "--state-dir", state],
    ] {
        let output = sluice(words);
        assert_eq!(code(&output), 1);
        let expected = format!("in use by the process {}", running.child.id());
        assert!(error(&output).contains(&expected), "{}", error(&output));
    }
    assert_eq!(running.terminate(), Some(0));
    assert_eq!(
        code(&sluice(&["cleanup", "--dry-run", "--state-dir", state])),
        0
    );
}
