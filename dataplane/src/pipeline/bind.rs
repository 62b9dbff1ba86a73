//! Binding a new flow: which backend, which source address and port, and the two tuples that follow.
//!
//! Masquerade follows kube-proxy's rules as the snapshot carries them, except that a backend on this
//! node needs none where the reply leaves through a device that we watch.

use super::{Door, FlowEvent, NO_SERVICE, Pipeline, Step, epoch_of, fingerprints};
use crate::command::Origin;
use crate::counters::DropReason;
use crate::flow::Flow;
use crate::flow::table::{FlowId, FlowTable, InsertError, NewFlow};
use crate::net::{Address, Endpoint, Tuple};
use crate::schedule::{self, Choice};
use crate::snapshot::{Backend, Frontend, Masquerade, Service, Snapshot, WhenEmpty};

/// Why no flow was bound.
pub(super) enum Refused {
    /// Tell the client.
    Reject,
    /// Say nothing.
    Drop(DropReason),
}

impl Pipeline {
    /// Chooses a backend for the packet's client and enters the flow.
    pub(super) fn bind(
        &mut self,
        step: &Step<'_, '_>,
        frontend: &Frontend,
    ) -> Result<FlowId, Refused> {
        let client = step.tuple().source;
        let ranges = &frontend.source_ranges;
        if !ranges.is_empty() && !ranges.iter().any(|range| range.contains(client.address)) {
            return Err(Refused::Drop(DropReason::SourceRange));
        }
        let inside = is_inside(step);
        let service = &*frontend.service;
        let choice = if inside {
            frontend.inside
        } else {
            frontend.outside
        };
        let Some(backend) = self.schedule(service, choice) else {
            return Err(match frontend.when_empty {
                WhenEmpty::Drop if !inside => Refused::Drop(DropReason::NoBackend),
                WhenEmpty::Drop | WhenEmpty::Reject => Refused::Reject,
            });
        };
        let target = Target {
            service: service.id.0,
            backend: backend.id.0,
            endpoint: backend.endpoint,
        };
        let id = if needs_snat(step, frontend, backend, inside) {
            self.bind_with_snat(step, &target)?
        } else {
            self.bind_plain(step, &target)?
        };
        self.counts.opened(backend.id);
        self.tell_bound(id);
        Ok(id)
    }

    /// Somebody speaks to a backend directly, from a port by which the backend knows a flow of ours:
    /// its replies would be taken for that flow's. Like conntrack the engine gives the newcomer
    /// another source port; where the old flow is over it is forgotten instead (`None`).
    pub(super) fn bind_direct(&mut self, step: &Step<'_, '_>) -> Option<Result<FlowId, Refused>> {
        let (holder, _) = self.flows.find(&step.tuple().reversed())?;
        if self.flows.flow(holder).is_some_and(Flow::is_over) {
            self.forget(holder);
            return None;
        }
        let target = Target {
            service: NO_SERVICE,
            backend: NO_SERVICE,
            endpoint: step.tuple().destination,
        };
        let bound = self.bind_with_port(step, &target, step.tuple().source.address);
        Some(bound.inspect(|&id| self.tell_bound(id)))
    }

    fn tell_bound(&mut self, id: FlowId) {
        if let Some(flow) = self.flows.flow(id) {
            let fingerprints = fingerprints(flow, &self.key);
            self.events.push(FlowEvent::Bound(id, fingerprints));
        }
    }

    fn schedule<'a>(&mut self, service: &'a Service, choice: u32) -> Option<&'a Backend> {
        let random = self.next_random();
        let slot = (service.id.0 as usize * 2 + choice as usize) % self.cursors.len().max(1);
        let cursor = self.cursors.get_mut(slot)?;
        let mut choice = Choice::new(service, choice, *cursor, random);
        let backend = schedule::choose(service.scheduler, &mut choice);
        *cursor = choice.cursor;
        backend
    }

    /// The client keeps its address, and its port unless the backend knows one like it already.
    fn bind_plain(&mut self, step: &Step<'_, '_>, target: &Target) -> Result<FlowId, Refused> {
        let client = step.tuple().source;
        match self.enter(step, target, client) {
            Err(Taken::Over(id)) => {
                self.forget(id);
                self.enter(step, target, client).map_err(Refused::from)
            }
            Err(Taken::Alive) => self.bind_with_port(step, target, client.address),
            other => other.map_err(Refused::from),
        }
    }

    fn bind_with_snat(&mut self, step: &Step<'_, '_>, target: &Target) -> Result<FlowId, Refused> {
        let Some(address) = snat_address(step.snapshot, target.endpoint.address) else {
            return Err(Refused::Drop(DropReason::NoSnatAddress));
        };
        self.bind_with_port(step, target, address)
    }

    /// From `address`, with a port that this worker owns and the backend does not know. Where none
    /// is left, one whose connection is over is used again.
    fn bind_with_port(
        &mut self,
        step: &Step<'_, '_>,
        target: &Target,
        address: Address,
    ) -> Result<FlowId, Refused> {
        let mut over = None;
        let protocol = step.tuple().protocol;
        for port in self.ports.candidates(address, &target.endpoint, protocol) {
            let source = Endpoint::new(address, port);
            match enter(&mut self.flows, step, target, source) {
                Err(Taken::Over(id)) => over = over.or(Some((id, source))),
                Err(Taken::Alive) => {}
                other => return other.map_err(Refused::from),
            }
        }
        let Some((id, source)) = over else {
            return Err(Taken::Alive.into());
        };
        self.forget(id);
        self.enter(step, target, source).map_err(Refused::from)
    }

    fn enter(
        &mut self,
        step: &Step<'_, '_>,
        target: &Target,
        source: Endpoint,
    ) -> Result<FlowId, Taken> {
        enter(&mut self.flows, step, target, source)
    }
}

/// Where a flow shall lead.
struct Target {
    service: u32,
    backend: u32,
    endpoint: Endpoint,
}

/// Why a source cannot be had.
enum Taken {
    /// The backend knows it by a flow that is alive.
    Alive,
    /// The backend knows it by this flow, which is over.
    Over(FlowId),
    /// No flow can be entered at all.
    Full,
}

impl From<Taken> for Refused {
    fn from(taken: Taken) -> Self {
        Self::Drop(match taken {
            Taken::Alive | Taken::Over(_) => DropReason::SnatPortsExhausted,
            Taken::Full => DropReason::FlowTableFull,
        })
    }
}

fn enter(
    flows: &mut FlowTable,
    step: &Step<'_, '_>,
    target: &Target,
    source: Endpoint,
) -> Result<FlowId, Taken> {
    let flow = NewFlow {
        original: *step.tuple(),
        reply: Tuple {
            protocol: step.tuple().protocol,
            source: target.endpoint,
            destination: source,
        },
        service: target.service,
        backend: target.backend,
        epoch: epoch_of(step.snapshot),
        tcp: step.headers.tcp,
    };
    flows.insert(&flow, step.now).map_err(|error| match error {
        InsertError::Full => Taken::Full,
        InsertError::TupleInUse => match flows.find(&flow.reply) {
            Some((id, _)) if flows.flow(id).is_some_and(Flow::is_over) => Taken::Over(id),
            _ => Taken::Alive,
        },
    })
}

/// Whether the client is a pod or a host process: by its range, or by the device it came by.
fn is_inside(step: &Step<'_, '_>) -> bool {
    let from_pod = matches!(
        step.packet.meta.door,
        Door::Host(Origin::Host | Origin::Steered { .. })
    );
    from_pod || in_cluster(step.snapshot, step.tuple().source.address)
}

fn in_cluster(snapshot: &Snapshot, address: Address) -> bool {
    snapshot
        .node
        .cluster_ranges
        .iter()
        .any(|range| range.contains(address))
}

fn needs_snat(step: &Step<'_, '_>, frontend: &Frontend, backend: &Backend, inside: bool) -> bool {
    let client = step.tuple().source.address;
    if backend.endpoint.address == client {
        return true;
    }
    let rule = if inside {
        frontend.inside_masquerade
    } else {
        frontend.masquerade
    };
    let wanted = match rule {
        Masquerade::Always => true,
        Masquerade::Never => false,
        Masquerade::OffCluster => is_off_cluster(step),
    };
    wanted && !(backend.local && reply_is_seen(step))
}

/// Whether kube-proxy would call the client "not from the pod range".
fn is_off_cluster(step: &Step<'_, '_>) -> bool {
    let node = &step.snapshot.node;
    match step.packet.meta.door {
        Door::Host(Origin::Host) => true,
        Door::Host(Origin::Steered { .. }) if node.cluster_ranges.is_empty() => false,
        _ => !in_cluster(step.snapshot, step.tuple().source.address),
    }
}

/// Whether the reply of a backend on this node leaves through a device that we watch.
fn reply_is_seen(step: &Step<'_, '_>) -> bool {
    let snapshot = step.snapshot;
    let device = match step.packet.meta.door {
        // A host process: its replies are caught where the backend's packets enter.
        Door::Host(Origin::Host) => return true,
        Door::Host(Origin::Steered { ifindex, .. }) => Some(ifindex),
        Door::Uplink { .. } => snapshot
            .fib
            .hop(step.tuple().source.address)
            .map(|hop| hop.ifindex),
    };
    device
        .and_then(|ifindex| snapshot.node.devices.get(&ifindex))
        .is_some_and(|device| device.hooked_egress)
}

/// The address that the kernel's route to the backend would use, unless one is configured.
fn snat_address(snapshot: &Snapshot, backend: Address) -> Option<Address> {
    let configured = snapshot
        .node
        .snat_addresses
        .iter()
        .find(|address| address.is_v4() == backend.is_v4());
    configured
        .copied()
        .or_else(|| snapshot.fib.hop(backend)?.source)
}
