//! Kubernetes Events on objects that are not served: for people who look at the object, not at our
//! log.
//!
//! Sent one after the other beside everything else. What cannot be sent, or is too much at once, is
//! dropped: the log and `resolve` name it too, and no update waits for an Event.

use std::time::Duration;

use k8s_openapi::api::core::v1::ObjectReference;
use kube::Client;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::mpsc::{Receiver, Sender, channel};
use tokio::time::sleep;

use crate::controller::Rejected;
use crate::store::Kind;

/// Where Events go.
pub(crate) struct Notices {
    send: Sender<Rejected>,
}

impl Notices {
    /// Must run inside a tokio runtime.
    pub(crate) fn start(client: Client, node: &str) -> Self {
        let (send, receive) = channel(QUEUE);
        let reporter = Reporter {
            controller: "sluice".into(),
            instance: Some(node.into()),
        };
        tokio::spawn(send_all(client, reporter, receive));
        Self { send }
    }

    pub(crate) fn tell(&self, rejected: &Rejected) {
        if self.send.try_send(rejected.clone()).is_err() {
            tracing::debug!(name = rejected.name, "too many Events, one is dropped");
        }
    }
}

async fn send_all(client: Client, reporter: Reporter, mut receive: Receiver<Rejected>) {
    while let Some(rejected) = receive.recv().await {
        let event = Event {
            type_: EventType::Warning,
            reason: "NotServed".into(),
            note: Some(rejected.reason.chars().take(LONGEST_NOTE).collect()),
            action: "Resolve".into(),
            secondary: None,
        };
        // A recorder would fold two reasons about one object into the first, so each has its own.
        let recorder = Recorder::new(client.clone(), reporter.clone());
        if let Err(error) = recorder.publish(&event, &reference(&rejected)).await {
            tracing::debug!(name = rejected.name, %error, "an Event is not sent");
        }
        sleep(PAUSE).await;
    }
}

/// As kube-proxy refers to a Service: by name, without its uid.
fn reference(rejected: &Rejected) -> ObjectReference {
    let is_slice = rejected.kind == Kind::EndpointSlice.name();
    let version = if is_slice {
        "discovery.k8s.io/v1"
    } else {
        "v1"
    };
    ObjectReference {
        api_version: Some(version.into()),
        kind: Some(rejected.kind.clone()),
        namespace: Some(rejected.namespace.clone()).filter(|namespace| !namespace.is_empty()),
        name: Some(rejected.name.clone()),
        ..ObjectReference::default()
    }
}

const QUEUE: usize = 64;
/// Between two Events: a bad controller must not make us flood the API server.
const PAUSE: Duration = Duration::from_millis(50);
/// The API takes a kilobyte; a character has four bytes at most.
const LONGEST_NOTE: usize = 250;
