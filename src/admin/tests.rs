//! The admin server over a real loopback listener.

use std::time::UNIX_EPOCH;

use metrics_exporter_prometheus::PrometheusBuilder;

use super::*;
use crate::commands::client;
use crate::report::{ApiVersion, EngineState, FlowList, ServiceStates, Status, StatusKind};

pub(super) fn status(ready: bool) -> Status {
    Status {
        api_version: ApiVersion::V1,
        kind: StatusKind::Status,
        version: "0.1.0".to_owned(),
        ready,
        mirror: report::Mirror::default(),
        engine: report::Engine {
            state: EngineState::Off,
            reason: String::new(),
            locked_bytes: 0,
        },
        epoch: 7,
        uplinks: Vec::new(),
        host_port: report::HostPort::default(),
        workers: vec![report::Worker::default()],
        problems: Vec::new(),
    }
}

fn sources(ready: bool) -> Sources {
    let readiness = move || Readiness {
        ready,
        reason: if ready {
            String::new()
        } else {
            "no snapshot yet".to_owned()
        },
        updated: UNIX_EPOCH,
    };
    let services = || ServiceStates {
        api_version: ApiVersion::V1,
        kind: report::ServiceListKind::ServiceList,
        services: vec![json!({"name": "<web>"})],
    };
    let recorder = PrometheusBuilder::new().build_recorder();
    let metrics = recorder.handle();
    ::metrics::with_local_recorder(&recorder, || {
        ::metrics::counter!("sluice_test_total").increment(3);
    });
    Sources {
        status: Box::new(move || status(ready)),
        services: Box::new(services),
        flows: Box::new(FlowList::default),
        ready: Box::new(readiness),
        metrics,
        config: json!({"node": "n1"}),
        proxy_mode: "none",
    }
}

fn started(ready: bool) -> AdminHandle {
    let any = SocketAddr::from(([127, 0, 0, 1], 0));
    start(any, Some(any), sources(ready)).expect("a free port of the loopback device")
}

fn get(address: SocketAddr, path: &str) -> (u16, String) {
    let answer = client::get(&address.to_string(), path).expect("the server answers");
    (answer.code, answer.body)
}

#[test]
fn every_path_of_the_contract_answers() {
    let admin = started(true);
    for (path, expected) in [
        ("/metrics", "sluice_test_total 3"),
        ("/healthz", "ok"),
        ("/livez", "ok"),
        ("/readyz", "ok"),
        ("/configz", r#""node":"n1""#),
        ("/proxyMode", "none"),
        ("/debug/state", r#""workers":[{"#),
        ("/debug/status", r#""kind":"Status""#),
        ("/debug/services", r#""kind":"ServiceList""#),
        ("/debug/flows", r#""flows":[]"#),
        ("/", "<h1>sluice"),
    ] {
        let (code, body) = get(admin.address(), path);
        assert_eq!(code, 200, "{path}: {body}");
        assert!(body.contains(expected), "{path}: {body}");
    }
    assert_eq!(get(admin.address(), "/nothing").0, 404);
}

#[test]
fn a_node_that_does_not_serve_yet_is_alive_but_not_ready() {
    let admin = started(false);
    let (code, body) = get(admin.address(), "/readyz");
    assert_eq!((code, body.as_str()), (503, "not ready: no snapshot yet"));
    assert_eq!(get(admin.address(), "/livez").0, 200);
}

#[test]
fn the_health_port_answers_with_kube_proxys_body() {
    let admin = started(true);
    let (code, body) = get(admin.healthz_address().unwrap(), "/healthz");
    assert_eq!(code, 200);
    let body: Value = serde_json::from_str(&body).unwrap();
    assert_eq!(body["lastUpdated"], "1970-01-01T00:00:00.000Z");
    assert_eq!(body["nodeEligible"], true);
    assert!(body["currentTime"].is_string());
}

#[test]
fn stopping_frees_the_port() {
    let admin = started(true);
    let address = admin.address();
    admin.stop();
    TcpListener::bind(address).expect("the port is free again");
}

#[test]
fn an_address_in_use_is_named_with_its_key() {
    let first = started(true);
    let error = start(first.address(), None, sources(true))
        .err()
        .unwrap()
        .to_string();
    assert!(error.contains(&first.address().to_string()), "{error}");
    assert!(error.contains("metricsBindAddress"), "{error}");
}

/// Serves the admin paths to connections that claim to come from `peer`.
fn served_to(peer: SocketAddr) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    listener.set_nonblocking(true).unwrap();
    let address = listener.local_addr().unwrap();
    let router = router(Arc::new(sources(true)));
    let router = router.layer(axum::extract::connect_info::MockConnectInfo(peer));
    // The thread ends with the process of the tests.
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let listener = tokio::net::TcpListener::from_std(listener).unwrap();
            axum::serve(listener, router).await.unwrap();
        });
    });
    address
}

#[test]
fn only_loopback_peers_see_state() {
    for (peer, code) in [
        ("127.0.0.1:4000", 200),
        ("[::1]:4000", 200),
        ("[::ffff:127.0.0.1]:4000", 200),
        ("192.0.2.1:4000", 403),
        ("[2001:db8::1]:4000", 403),
    ] {
        let address = served_to(peer.parse().unwrap());
        for path in ["/", "/debug/state", "/debug/flows"] {
            assert_eq!(get(address, path).0, code, "{peer} {path}");
        }
        assert_eq!(get(address, "/proxyMode").0, 200, "{peer} /proxyMode");
    }
}
