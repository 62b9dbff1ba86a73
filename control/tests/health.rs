//! Health checks as load balancers ask for them: codes, headers and body are kube-proxy's.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use control::health::HealthChecks;
use control::node::NodePortAddresses;
use control::{ControlConfig, Resolved, resolve_folder};

fn resolved(port: u16, endpoints: usize) -> Arc<Resolved> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let endpoint = |number| {
        format!("{{addresses: [10.244.1.{number}], nodeName: n1, conditions: {{ready: true}}}}")
    };
    let endpoints: Vec<_> = (1..=endpoints).map(endpoint).collect();
    let text = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{namespace: default, name: web}}\n\
         spec: {{type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: {port}, clusterIP: 10.96.0.10, ports: [{{port: 80, nodePort: 30080}}]}}\n\
         ---\napiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{namespace: default, name: web-1, labels: {{kubernetes.io/service-name: web}}}}\n\
         addressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{}]\n",
        endpoints.join(", ")
    );
    std::fs::write(folder.path().join("a.yaml"), text).expect("a manifest");
    let config = ControlConfig {
        node_name: "n1".into(),
        ..ControlConfig::default()
    };
    resolve_folder(folder.path(), &config).expect("a folder")
}

async fn ask(port: u16) -> std::io::Result<String> {
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(SocketAddr::from(([127, 0, 0, 1], port)))?;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: n1\r\nConnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    });
    asked.await.expect("no panic")
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("an address").port()
}

#[tokio::test]
async fn a_node_with_endpoints_answers_200_with_their_number() {
    let port = free_port();
    let mut checks = HealthChecks::new(NodePortAddresses::All, || true);
    checks.follow(&resolved(port, 2));
    let answer = ask(port).await.expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
    for line in [
        "content-type: application/json",
        "x-content-type-options: nosniff",
        "x-load-balancing-endpoint-weight: 2",
    ] {
        assert!(head.contains(line), "{head}");
    }
    let wanted = "{\n\t\"service\": {\n\t\t\"namespace\": \"default\",\n\t\t\"name\": \"web\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}";
    assert_eq!(body, wanted);
}

#[tokio::test]
async fn a_node_without_endpoints_or_that_does_not_serve_answers_503() {
    let port = free_port();
    let healthy = Arc::new(AtomicBool::new(true));
    let told = Arc::clone(&healthy);
    let mut checks =
        HealthChecks::new(NodePortAddresses::All, move || told.load(Ordering::Relaxed));
    checks.follow(&resolved(port, 0));
    assert!(
        ask(port)
            .await
            .expect("an answer")
            .starts_with("HTTP/1.1 503 ")
    );
    checks.follow(&resolved(port, 1));
    assert!(
        ask(port)
            .await
            .expect("an answer")
            .starts_with("HTTP/1.1 200 ")
    );
    healthy.store(false, Ordering::Relaxed);
    let answer = ask(port).await.expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503 "));
    assert!(answer.contains("\"serviceProxyHealthy\": false"));
}

#[tokio::test]
async fn a_port_that_is_no_longer_asked_for_is_closed() {
    let (port, other) = (free_port(), free_port());
    let mut checks = HealthChecks::new(NodePortAddresses::All, || true);
    checks.follow(&resolved(port, 1));
    checks.follow(&resolved(other, 1));
    assert!(ask(other).await.is_ok());
    let started = Instant::now();
    while ask(port).await.is_ok() {
        assert!(
            started.elapsed() < Duration::from_secs(5),
            "it is still open"
        );
    }
}
