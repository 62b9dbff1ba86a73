//! Watches against an API server that is cut, forgets, falls silent and goes away: what is resolved
//! must always be what the server holds.

mod support;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use control::watch::{MARGIN, WatchError, Watches};
use control::{ClusterConfig, ControlConfig, Controller};
use support::apiserver::{ApiServer, NODES, SERVICES, SLICES};

const PATIENCE: Duration = Duration::from_secs(20);

/// A controller that is fed by watches.
struct Fed {
    watches: Watches,
    controller: Controller,
    _folder: tempfile::TempDir,
}

fn config(server: &ApiServer, folder: &tempfile::TempDir) -> ClusterConfig {
    let path = folder.path().join("kubeconfig");
    std::fs::write(&path, server.kubeconfig()).expect("a kubeconfig");
    ClusterConfig::new(Some(path), "n1")
}

impl Fed {
    async fn start(server: &ApiServer) -> Self {
        Self::with_watch_time(server, Duration::from_secs(30)).await
    }

    async fn with_watch_time(server: &ApiServer, watch_time: Duration) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let config = ClusterConfig {
            watch_time,
            ..config(server, &folder)
        };
        let mut watches = Watches::new(&config).await.expect("a client");
        let mut controller = Controller::new(ControlConfig {
            node_name: "n1".into(),
            ..ControlConfig::default()
        });
        let first = watches.first().await.expect("the first lists");
        first.into_iter().for_each(|event| controller.handle(event));
        Self {
            watches,
            controller,
            _folder: folder,
        }
    }

    /// All backends of all Services, by address and port.
    fn backends(&mut self) -> BTreeSet<String> {
        let resolution = self.controller.resolve().to_resolution();
        let ports = resolution.services.iter();
        let frontends = ports.flat_map(|port| &port.frontends);
        let backends = frontends.flat_map(|frontend| &frontend.backends);
        backends.map(ToString::to_string).collect()
    }

    /// Takes events in until these are the backends.
    async fn until(&mut self, wanted: &[&str]) -> Duration {
        let wanted: BTreeSet<_> = wanted.iter().map(ToString::to_string).collect();
        let started = Instant::now();
        while self.backends() != wanted {
            let left = PATIENCE.saturating_sub(started.elapsed());
            let events = tokio::time::timeout(left, self.watches.next()).await;
            let Ok(events) = events else {
                panic!("{wanted:?} were wanted, there are {:?}", self.backends());
            };
            for event in events {
                self.controller.handle(event);
            }
        }
        started.elapsed()
    }
}

fn service(name: &str, ip: &str) -> String {
    format!(
        "metadata: {{namespace: default, name: {name}}}\n\
         spec: {{clusterIP: {ip}, clusterIPs: [{ip}], ports: [{{port: 80}}]}}\n"
    )
}

fn slice(name: &str, address: &str) -> String {
    format!(
        "metadata: {{namespace: default, name: {name}-1, labels: {{kubernetes.io/service-name: {name}}}}}\n\
         addressType: IPv4\nports: [{{port: 8080, protocol: TCP, name: \"\"}}]\n\
         endpoints: [{{addresses: [{address}], conditions: {{ready: true}}}}]\n"
    )
}

async fn server(streams_lists: bool) -> ApiServer {
    let server = ApiServer::start(streams_lists).await;
    server.put(
        NODES,
        "metadata: {name: n1}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.10}]}\n",
    );
    server.put(SERVICES, &service("web", "10.96.0.10"));
    server.put(SERVICES, &service("db", "10.96.0.11"));
    server.put(SLICES, &slice("web", "10.244.1.10"));
    server.put(SLICES, &slice("db", "10.244.1.11"));
    server
}

#[tokio::test]
async fn what_is_created_changed_and_deleted_is_followed() {
    for streams_lists in [true, false] {
        let server = server(streams_lists).await;
        let mut fed = Fed::start(&server).await;
        fed.until(&["10.244.1.10:8080", "10.244.1.11:8080"]).await;
        server.put(SLICES, &slice("web", "10.244.1.20"));
        fed.until(&["10.244.1.20:8080", "10.244.1.11:8080"]).await;
        server.delete(SERVICES, "default/db");
        fed.until(&["10.244.1.20:8080"]).await;
    }
}

#[tokio::test]
async fn the_requests_select_as_kube_proxy_does_and_the_node_by_name() {
    let server = server(true).await;
    let _fed = Fed::start(&server).await;
    let requests = server.requests();
    let labels = "labelSelector=%21service.kubernetes.io%2Fservice-proxy-name%2C%21service.kubernetes.io%2Fheadless";
    for path in [SERVICES, SLICES] {
        let mut own = requests.iter().filter(|request| request.starts_with(path));
        assert!(own.all(|request| request.contains(labels)), "{requests:?}");
    }
    let mut nodes = requests.iter().filter(|request| request.starts_with(NODES));
    assert!(nodes.all(|request| request.contains("fieldSelector=metadata.name%3Dn1")));
    assert!(
        requests
            .iter()
            .all(|request| request.contains("sendInitialEvents=true"))
    );
}

#[tokio::test]
async fn after_a_cut_the_watch_goes_on_without_a_list() {
    let server = server(true).await;
    let mut fed = Fed::start(&server).await;
    let lists = |server: &ApiServer| {
        let requests = server.requests();
        let mut lists = requests.into_iter();
        lists
            .by_ref()
            .filter(|request| request.contains("sendInitialEvents"))
            .count()
    };
    let before = lists(&server);
    server.cut();
    server.put(SLICES, &slice("web", "10.244.1.20"));
    server.delete(SLICES, "default/db-1");
    fed.until(&["10.244.1.20:8080"]).await;
    assert_eq!(lists(&server), before);
}

#[tokio::test]
async fn what_was_deleted_while_the_server_forgot_is_gone_after_the_list() {
    for streams_lists in [true, false] {
        let server = server(streams_lists).await;
        let mut fed = Fed::start(&server).await;
        fed.until(&["10.244.1.10:8080", "10.244.1.11:8080"]).await;
        server.cut();
        server.delete(SERVICES, "default/db");
        server.delete(SLICES, "default/web-1");
        server.put(SLICES, &slice("web", "10.244.1.30"));
        server.forget();
        fed.until(&["10.244.1.30:8080"]).await;
    }
}

#[tokio::test]
async fn a_server_that_is_away_changes_nothing_until_it_is_back() {
    let server = server(true).await;
    let mut fed = Fed::start(&server).await;
    server.go_away();
    let silence = tokio::time::timeout(Duration::from_secs(3), fed.watches.next()).await;
    assert!(silence.is_err(), "{silence:?}");
    assert_eq!(fed.backends().len(), 2);
    server.put(SLICES, &slice("web", "10.244.1.20"));
    server.come_back().await;
    fed.until(&["10.244.1.20:8080", "10.244.1.11:8080"]).await;
}

#[tokio::test]
async fn a_connection_over_which_nothing_comes_any_more_is_replaced() {
    let server = server(true).await;
    let mut fed = Fed::with_watch_time(&server, Duration::from_secs(1)).await;
    server.fall_silent(true);
    server.put(SLICES, &slice("web", "10.244.1.20"));
    server.fall_silent(false);
    let needed = fed.until(&["10.244.1.20:8080", "10.244.1.11:8080"]).await;
    assert!(needed < Duration::from_secs(1) + MARGIN, "{needed:?}");
}

#[tokio::test]
async fn a_list_that_changes_nothing_resolves_to_the_same() {
    let server = server(true).await;
    let mut fed = Fed::start(&server).await;
    let before = fed.controller.resolve();
    server.forget();
    server.put(SERVICES, &service("other", "10.96.0.12"));
    server.delete(SERVICES, "default/other");
    server.cut();
    server.forget();
    server.put(SLICES, &slice("unowned", "10.244.1.40"));
    let mut lists = 0;
    while lists < 1 {
        for event in fed.watches.next().await {
            lists += usize::from(matches!(event, control::Event::Listed(..)));
            fed.controller.handle(event);
        }
    }
    assert_eq!(fed.controller.resolve().services, before.services);
}

/// Any history with cuts, forgotten versions and outages ends where a fresh list begins.
#[tokio::test]
async fn after_any_history_there_is_what_a_fresh_list_says() {
    let server = server(true).await;
    let mut fed = Fed::start(&server).await;
    let mut chance = Chance(7);
    let mut alive = BTreeSet::new();
    for step in 0..400 {
        let path = [SERVICES, SLICES][chance.below(2)];
        let number = chance.below(12);
        let key = (path, number);
        match chance.below(40) {
            0 => server.cut(),
            1 if step % 4 == 0 => {
                server.cut();
                server.forget();
            }
            2 if step % 8 == 0 => {
                server.go_away();
                server.come_back().await;
            }
            3..20 if alive.contains(&key) => {
                let suffix = if path == SLICES { "-1" } else { "" };
                server.delete(path, &format!("default/s{number}{suffix}"));
                alive.remove(&key);
            }
            _ => {
                let name = format!("s{number}");
                let text = if path == SLICES {
                    slice(&name, &format!("10.244.2.{}", 1 + chance.below(200)))
                } else {
                    service(&name, &format!("10.96.1.{number}"))
                };
                server.put(path, &text);
                alive.insert(key);
            }
        }
        let taken = tokio::time::timeout(Duration::from_millis(1), fed.watches.next()).await;
        for event in taken.into_iter().flatten() {
            fed.controller.handle(event);
        }
    }
    let wanted = Fed::start(&server).await.controller.resolve();
    assert!(wanted.services.len() > 2);
    let started = Instant::now();
    while fed.controller.resolve().services != wanted.services {
        let left = PATIENCE.saturating_sub(started.elapsed());
        let events = tokio::time::timeout(left, fed.watches.next()).await;
        for event in events.expect("the tables become the same") {
            fed.controller.handle(event);
        }
    }
}

/// Numbers that look random and are the same in each run.
struct Chance(u64);

impl Chance {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).expect("31 bits") % limit
    }
}

#[tokio::test]
async fn an_api_server_behind_a_service_of_its_own_is_refused() {
    let server = server(true).await;
    server.put(SERVICES, &service("kubernetes", "127.0.0.1"));
    let folder = tempfile::tempdir().expect("a temporary folder");
    let mut watches = Watches::new(&config(&server, &folder))
        .await
        .expect("a client");
    let refused = watches.first().await;
    assert!(
        matches!(refused, Err(WatchError::ServiceAddress(_))),
        "{refused:?}"
    );
}

#[tokio::test]
async fn the_node_tells_its_addresses() {
    let server = server(true).await;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let config = config(&server, &folder);
    let asked = tokio::task::spawn_blocking(move || config.node_addresses()).await;
    let addresses = asked.expect("no panic").expect("a Node");
    let own: std::net::IpAddr = "192.0.2.10".parse().expect("an address");
    assert_eq!(addresses, [own]);
}
