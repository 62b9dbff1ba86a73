//! An API server for tests: lists and watches over objects in memory, on a loopback port.
//!
//! It answers as far as the watches need: lists, watches from a version, bookmarks, streaming lists
//! where it is told to have them, 410 where a version is too old. It can cut its connections, fall
//! silent and be away. It selects nothing: requests are noted, tests look at their queries.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::channel::mpsc::{UnboundedSender, unbounded};
use futures::{StreamExt, stream};
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::watch;

/// A running API server; a clone is the same one.
#[derive(Clone)]
pub(crate) struct ApiServer {
    shared: Arc<Mutex<Shared>>,
    stop: watch::Sender<()>,
    pub(crate) address: SocketAddr,
}

struct Shared {
    version: u64,
    /// By path of the collection, then by namespace and name.
    objects: BTreeMap<&'static str, BTreeMap<String, Value>>,
    /// All that happened, by version.
    history: Vec<(u64, &'static str, &'static str, Value)>,
    /// Versions before this one are forgotten.
    oldest: u64,
    watches: Vec<(&'static str, UnboundedSender<String>)>,
    streams_lists: bool,
    silent: bool,
    away: bool,
    requests: Vec<String>,
}

pub(crate) const SERVICES: &str = "/api/v1/services";
pub(crate) const NODES: &str = "/api/v1/nodes";
pub(crate) const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";

impl ApiServer {
    pub(crate) async fn start(streams_lists: bool) -> Self {
        let shared = Shared {
            version: 1,
            objects: [SERVICES, NODES, SLICES]
                .map(|path| (path, BTreeMap::new()))
                .into(),
            history: Vec::new(),
            oldest: 0,
            watches: Vec::new(),
            streams_lists,
            silent: false,
            away: false,
            requests: Vec::new(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let (stop, _) = watch::channel(());
        let server = Self {
            shared: Arc::new(Mutex::new(shared)),
            stop,
            address: listener.local_addr().expect("an address"),
        };
        server.serve(listener);
        server
    }

    fn serve(&self, listener: TcpListener) {
        let router = axum::Router::new()
            .fallback(answer)
            .with_state(Arc::clone(&self.shared));
        let mut stopped = self.stop.subscribe();
        tokio::spawn(async move {
            tokio::select! {
                served = axum::serve(listener, router) => served.expect("a server"),
                // An error means that the test is over.
                _ = stopped.changed() => {}
            }
        });
    }

    /// Creates or changes an object; it may be YAML or JSON text.
    pub(crate) fn put(&self, path: &'static str, text: &str) {
        let mut shared = self.shared.lock().expect("no panic");
        let mut object: Value = serde_saphyr::from_str(text).expect("an object");
        shared.version += 1;
        object["metadata"]["resourceVersion"] = shared.version.to_string().into();
        let name = name(&object);
        let objects = shared.objects.get_mut(path).expect("a known path");
        let before = objects.insert(name, object.clone());
        let word = if before.is_some() {
            "MODIFIED"
        } else {
            "ADDED"
        };
        shared.tell(path, word, object);
    }

    pub(crate) fn delete(&self, path: &'static str, name: &str) {
        let mut shared = self.shared.lock().expect("no panic");
        let objects = shared.objects.get_mut(path).expect("a known path");
        let mut object = objects.remove(name).expect("an object of this name");
        shared.version += 1;
        object["metadata"]["resourceVersion"] = shared.version.to_string().into();
        shared.tell(path, "DELETED", object);
    }

    /// Ends all watches, as a restart of a server does.
    pub(crate) fn cut(&self) {
        self.shared.lock().expect("no panic").watches.clear();
    }

    /// From now on every older version is too old.
    pub(crate) fn forget(&self) {
        let mut shared = self.shared.lock().expect("no panic");
        shared.oldest = shared.version;
        shared.history.clear();
    }

    /// Keeps connections, and says nothing more over them.
    pub(crate) fn fall_silent(&self, silent: bool) {
        self.shared.lock().expect("no panic").silent = silent;
    }

    /// Goes away: nothing listens any more, what was open is cut.
    pub(crate) fn go_away(&self) {
        self.cut();
        self.shared.lock().expect("no panic").away = true;
        // An error means that it is away already.
        _ = self.stop.send(());
    }

    /// Comes back at the same address.
    pub(crate) async fn come_back(&self) {
        self.shared.lock().expect("no panic").away = false;
        let socket = tokio::net::TcpSocket::new_v4().expect("a socket");
        socket.set_reuseaddr(true).expect("an option");
        socket.bind(self.address).expect("the same port");
        self.serve(socket.listen(64).expect("a listener"));
    }

    /// Path and query of every request.
    pub(crate) fn requests(&self) -> Vec<String> {
        self.shared.lock().expect("no panic").requests.clone()
    }

    /// A kubeconfig that leads here.
    pub(crate) fn kubeconfig(&self) -> String {
        let address = self.address;
        format!(
            "apiVersion: v1\nkind: Config\nclusters: [{{name: c, cluster: {{server: \"http://{address}\"}}}}]\n\
             contexts: [{{name: c, context: {{cluster: c, user: u}}}}]\ncurrent-context: c\n\
             users: [{{name: u, user: {{}}}}]\n"
        )
    }
}

impl Shared {
    fn tell(&mut self, path: &'static str, word: &'static str, object: Value) {
        let line = event(word, &object);
        self.history.push((self.version, path, word, object));
        if !self.silent {
            self.watches.retain(|(watched, watch)| {
                *watched != path || watch.unbounded_send(line.clone()).is_ok()
            });
        }
    }

    fn list(&self, path: &'static str) -> Value {
        let items: Vec<_> = self.objects[path].values().collect();
        json!({
            "kind": "List", "apiVersion": "v1",
            "metadata": { "resourceVersion": self.version.to_string() }, "items": items,
        })
    }

    /// Opens a watch; the lines that it begins with are sent already.
    fn watch(&mut self, path: &'static str, query: &str) -> Response {
        let (send, receive) = unbounded();
        let say = |line| send.unbounded_send(line).expect("the other end");
        let from = parameter(query, "resourceVersion").and_then(|text| text.parse().ok());
        let from: u64 = from.unwrap_or_default();
        if parameter(query, "sendInitialEvents") == Some("true") {
            if !self.streams_lists {
                return status(422, "sendInitialEvents is forbidden");
            }
            self.objects[path]
                .values()
                .for_each(|object| say(event("ADDED", object)));
            let end = json!({
                "kind": "Bookmark", "apiVersion": "v1", "metadata": {
                    "resourceVersion": self.version.to_string(),
                    "annotations": { "k8s.io/initial-events-end": "true" },
                },
            });
            say(event("BOOKMARK", &end));
        } else if from < self.oldest {
            return status(410, "too old resource version");
        } else {
            let missed = self.history.iter();
            missed
                .filter(|(version, watched, ..)| *version > from && *watched == path)
                .for_each(|(_, _, word, object)| say(event(word, object)));
        }
        self.watches.push((path, send));
        Body::from_stream(receive.map(Ok::<_, Infallible>)).into_response()
    }
}

async fn answer(State(shared): State<Arc<Mutex<Shared>>>, request: Request) -> Response {
    let uri = request.uri().clone();
    let mut shared = shared.lock().expect("no panic");
    shared.requests.push(uri.to_string());
    if shared.away {
        // Over a connection that was open before: it breaks.
        let broken = stream::once(async { Err::<String, _>(std::io::Error::other("away")) });
        return Body::from_stream(broken).into_response();
    }
    if shared.silent {
        return Body::from_stream(stream::pending::<Result<String, Infallible>>()).into_response();
    }
    let query = uri.query().unwrap_or_default().to_owned();
    let known = shared.objects.keys().copied();
    let collection = known.into_iter().find(|path| *path == uri.path());
    match collection {
        Some(path) if parameter(&query, "watch") == Some("true") => shared.watch(path, &query),
        Some(path) => axum::Json(shared.list(path)).into_response(),
        None => {
            let (path, name) = uri.path().rsplit_once('/').unwrap_or_default();
            let object = shared
                .objects
                .get(path)
                .and_then(|objects| objects.get(name));
            match object {
                Some(object) => axum::Json(object).into_response(),
                None => status(404, "not found"),
            }
        }
    }
}

fn status(code: u16, message: &str) -> Response {
    let body = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "message": message, "code": code,
    });
    let code = StatusCode::from_u16(code).expect("a status");
    (code, axum::Json(body)).into_response()
}

fn event(word: &str, object: &Value) -> String {
    format!("{}\n", json!({ "type": word, "object": object }))
}

fn name(object: &Value) -> String {
    let metadata = &object["metadata"];
    let name = metadata["name"].as_str().expect("a name");
    match metadata["namespace"].as_str() {
        Some(namespace) => format!("{namespace}/{name}"),
        None => name.to_owned(),
    }
}

fn parameter<'a>(query: &'a str, name: &str) -> Option<&'a str> {
    let pairs = query.split('&').filter_map(|pair| pair.split_once('='));
    pairs
        .into_iter()
        .find(|(key, _)| *key == name)
        .map(|(_, value)| value)
}
