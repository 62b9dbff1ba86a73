//! All workers, the host port and the steering: start, publish, follow devices, stop.
//!
//! `Engine` belongs to the control thread, which alone changes things. `EngineView` is for whoever
//! only looks: counters, flows, connections. Nothing here touches a packet, and control never waits
//! for a worker; a view may.

use std::io;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use arc_swap::ArcSwap;
use crossbeam::channel;

use crate::counters::{BackendCounts, Connections, SharedCounters, WorkerCounters};
use crate::device::DeviceReport;
use crate::device::host::{HostPort, HostPortConfig, HostPortDevice, HostPortError, IoPreference};
use crate::device::uplink::{Uplink, UplinkConfig, UplinkError, XdpPreference, ring_size_for};
use crate::flow::Flow;
use crate::flow::expiry::Timeouts;
use crate::flow::store::{FlowFile, Layout, StoreError};
use crate::flow::table::FlowTable;
use crate::handover;
use crate::nat::ports::PortAllocator;
use crate::net::MacAddr;
use crate::pipeline::{Pipeline, PipelineParts};
use crate::snapshot::{BackendId, FrontendKey, Snapshot};
use crate::steer::{FingerprintKey, WorkerId};
use crate::steering::{self, DeviceKind, Steering, SteeringConfig, SteeringError, XdpMode};
use crate::sys::affinity;
use crate::time::{Duration, Instant, MonotonicClock};
use crate::waker::Waker;
use crate::worker::{FlowPage, Ports, Request, UplinkPort, Worker, WorkerParts};

/// What the engine is to be.
#[derive(Clone, Debug)]
pub struct EngineConfig {
    /// How many workers, each pinned to a core.
    pub workers: u16,
    /// Devices towards the wire.
    pub uplinks: Vec<UplinkSpec>,
    /// How AF_XDP is bound.
    pub xdp: XdpPreference,
    /// How packets of the host port are read and written.
    pub io: IoPreference,
    /// MTU of the host port.
    pub mtu: u32,
    /// How old the heartbeat may be before the programs let packets pass.
    pub grace: Duration,
    /// How long packets of known flows are held back after that.
    pub hold: Duration,
    /// The mark on packets that the engine gives back: one bit.
    pub mark: u32,
    /// Whether the kernel serves the same frontends.
    pub mirrored: bool,
    /// Ports to masquerade with.
    pub snat_ports: RangeInclusive<u16>,
    /// Those of them that are left out: the host listens there.
    pub reserved_ports: Vec<RangeInclusive<u16>>,
    /// Flows in all.
    pub flows: u32,
    /// Time-outs of flows.
    pub timeouts: Timeouts,
    /// Where the flow slabs lie.
    pub state_folder: PathBuf,
    /// How long an idle worker looks for work before it blocks.
    pub spin: Duration,
    /// Secrets of hashes and seeds of choices: random, and different at each start.
    pub seed: [u64; 4],
}

/// A device towards the wire.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UplinkSpec {
    /// Its name.
    pub name: String,
    /// Its index.
    pub ifindex: u32,
    /// Its address.
    pub mac: MacAddr,
    /// How many receive queues it has.
    pub queues: u32,
    /// Its MTU.
    pub mtu: u32,
    /// Whether a local sender's checksum may be partial on it: a veth.
    pub is_virtual: bool,
}

/// Why the engine does not run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The host port cannot be made.
    #[error(transparent)]
    HostPort(#[from] HostPortError),
    /// An uplink cannot be opened.
    #[error(transparent)]
    Uplink(#[from] UplinkError),
    /// The programs cannot be loaded or attached.
    #[error(transparent)]
    Steering(#[from] SteeringError),
    /// The flow slab cannot be made.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A thread or its bell cannot be made.
    #[error("worker {worker} cannot be started: {source}")]
    Worker {
        /// Which one.
        worker: u16,
        /// What the kernel said.
        source: io::Error,
    },
    /// The programs for the host port's queue were refused.
    #[error("the host port's queue cannot be chosen by a program: {0}; Linux 4.16 is needed")]
    QueueProgram(io::Error),
}

/// The running engine.
pub struct Engine {
    steering: Steering,
    host_port: HostPortDevice,
    view: EngineView,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// What may be read of the running engine, by any thread.
#[derive(Clone, Debug)]
pub struct EngineView {
    published: Arc<ArcSwap<Snapshot>>,
    workers: Arc<[WorkerView]>,
    uplinks: Arc<[UplinkView]>,
    host_port: Arc<HostPortView>,
    heartbeat: steering::Heartbeat,
}

/// An uplink as it was opened.
#[derive(Clone, Debug)]
pub struct UplinkView {
    /// Its name.
    pub name: String,
    /// `zerocopy`, `copy` or `generic`.
    pub xdp: &'static str,
    /// How many queues are bound.
    pub queues: u32,
}

/// The host port as it was made.
#[derive(Clone, Debug)]
pub struct HostPortView {
    /// Its name.
    pub name: String,
    /// `io_uring` or `read_write`.
    pub io: &'static str,
    /// Its index.
    pub ifindex: u32,
    /// Bytes of packet memory that are locked, all workers and devices.
    pub locked_bytes: u64,
    /// Why io_uring was asked for and is not used; empty where nothing is amiss.
    pub fallback: String,
}

#[derive(Debug)]
struct WorkerView {
    core: usize,
    shared: Arc<SharedCounters>,
    counts: Arc<BackendCounts>,
    requests: channel::Sender<Request>,
    waker: Arc<Waker>,
}

/// One worker's counters and devices.
#[derive(Clone, Debug)]
pub struct WorkerReport {
    /// The core it is pinned to.
    pub core: usize,
    /// Its counters.
    pub counters: WorkerCounters,
    /// Its queue of the host port.
    pub host_port: DeviceReport,
    /// Its queues of each uplink, by the uplink's number.
    pub uplinks: Vec<DeviceReport>,
}

type EngineWorker = Worker<Uplink, HostPort, MonotonicClock>;

impl Engine {
    /// Makes the host port, loads and attaches the programs, binds the queues and starts the workers.
    /// Leftovers of an earlier process are removed first.
    ///
    /// # Errors
    /// One sentence for the operator; what was made up to there is taken back.
    pub fn start(config: &EngineConfig) -> Result<Self, EngineError> {
        steering::remove_leftovers(false)?;
        let host_port = HostPortDevice::create(HostPortConfig {
            queues: config.workers,
            mtu: config.mtu,
            io: config.io,
            ..HostPortConfig::default()
        })?;
        let name = host_port.name().to_owned();
        Self::start_on(config, host_port).inspect_err(|_| {
            // The reason of the failure is what counts; the rest is found by the next start.
            let _removed = steering::remove_leftovers(false);
            let _gone = HostPortDevice::remove(&name);
        })
    }

    fn start_on(config: &EngineConfig, mut host_port: HostPortDevice) -> Result<Self, EngineError> {
        let mut steering = Steering::load(&steering_config(config, host_port.ifindex()))?;
        let queue_program = steering.host_queue_program()?;
        host_port
            .set_steering(std::os::fd::AsFd::as_fd(queue_program))
            .map_err(EngineError::QueueProgram)?;
        steering.attach_host_port()?;
        let mut ports = open_ports(config, &mut host_port)?;
        let uplinks = attach_uplinks(config, &mut steering, &ports)?;
        let host_port_view = HostPortView {
            name: host_port.name().to_owned(),
            io: ports
                .first()
                .map_or("read_write", |ports| ports.host.io().as_str()),
            ifindex: host_port.ifindex(),
            locked_bytes: ports.iter().map(locked_bytes).sum(),
            fallback: ports
                .iter()
                .find_map(|ports| ports.host.fallback())
                .map(ToString::to_string)
                .unwrap_or_default(),
        };
        let published = Arc::new(ArcSwap::from_pointee(Snapshot::default()));
        let wakers = wakers(config.workers)?;
        connect(&mut ports, &wakers);
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        let mut workers = Vec::new();
        for ((id, ports), waker) in (0..config.workers).map(WorkerId).zip(ports).zip(wakers) {
            let (requests, asked) = channel::bounded(4);
            let counts = Arc::new(BackendCounts::default());
            let shared = Arc::new(SharedCounters::default());
            let core = affinity::core_of(usize::from(id.0));
            let worker = EngineWorker::new(WorkerParts {
                id,
                pipeline: pipeline(config, id, Arc::clone(&counts))?,
                ports,
                tuples: steering.tuples(id),
                heartbeat: steering.heartbeat(),
                published: Arc::clone(&published),
                shared: Arc::clone(&shared),
                requests: asked,
                waker: Arc::clone(&waker),
                clock: MonotonicClock,
                spin: config.spin,
                longest_wait: config.grace / 4,
            });
            threads.push(spawn(id, core, worker, Arc::clone(&stop))?);
            workers.push(WorkerView {
                core,
                shared,
                counts,
                requests,
                waker,
            });
        }
        let view = EngineView {
            published,
            workers: workers.into(),
            uplinks: uplinks.into(),
            host_port: Arc::new(host_port_view),
            heartbeat: steering.heartbeat(),
        };
        Ok(Self {
            steering,
            host_port,
            view,
            stop,
            threads,
        })
    }

    /// Makes these tables the ones that all workers serve: first theirs, then the programs', so
    /// that nothing is steered which nobody knows. Returns the epoch.
    ///
    /// # Errors
    /// A table of the programs is full; the workers serve the new tables all the same.
    pub fn publish(&mut self, snapshot: &Snapshot) -> Result<u64, EngineError> {
        let epoch = self.view.published.load().epoch + 1;
        let snapshot =
            snapshot.with_node(epoch, Arc::clone(&snapshot.node), Arc::clone(&snapshot.fib));
        let frontends: Vec<_> = snapshot.frontends().map(|(key, _)| key_of(key)).collect();
        let addresses: Vec<_> = snapshot.node.addresses.iter().copied().collect();
        self.view.published.store(Arc::new(snapshot));
        self.view.wake_all();
        self.steering.set_node_addresses(&addresses)?;
        self.steering.set_frontends(&frontends)?;
        Ok(epoch)
    }

    /// A device with a pod or an overlay behind it has come or changed.
    ///
    /// # Errors
    /// It cannot be steered; it stays as it is.
    pub fn steer(
        &mut self,
        ifindex: u32,
        kind: DeviceKind,
        mac: MacAddr,
    ) -> Result<(), EngineError> {
        Ok(self.steering.attach_device(ifindex, kind, mac)?)
    }

    /// A device has gone, or is none of ours any longer.
    ///
    /// # Errors
    /// The kernel's refusal to forget it.
    pub fn leave(&mut self, ifindex: u32) -> Result<(), EngineError> {
        Ok(self.steering.detach(ifindex)?)
    }

    /// The devices that are steered.
    #[must_use]
    pub fn steered(&self) -> Vec<u32> {
        self.steering.devices()
    }

    /// What the programs counted, by name.
    ///
    /// # Errors
    /// The kernel's.
    pub fn steering_counters(&self) -> Result<Vec<(&'static str, u64)>, EngineError> {
        Ok(self.steering.counters()?)
    }

    /// For those who only look.
    #[must_use]
    pub fn view(&self) -> EngineView {
        self.view.clone()
    }

    /// Leaves the devices, ends the workers and removes the host port.
    ///
    /// # Errors
    /// Something could not be removed; all else is.
    pub fn stop(mut self) -> Result<(), EngineError> {
        let detached = self.steering.detach_all();
        self.end_workers();
        let name = self.host_port.name().to_owned();
        drop(self.host_port);
        let removed = HostPortDevice::remove(&name);
        detached?;
        removed?;
        Ok(())
    }

    fn end_workers(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        self.view.wake_all();
        for thread in self.threads.drain(..) {
            // A worker that panicked has said so; there is nothing to add here.
            drop(thread.join());
        }
    }
}

impl EngineView {
    /// The tables that are served.
    #[must_use]
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.published.load_full()
    }

    /// The epoch that every worker has seen.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.workers
            .iter()
            .map(|worker| worker.shared.read().epoch)
            .min()
            .unwrap_or(0)
    }

    /// When the engine as a whole was last alive.
    #[must_use]
    pub fn heartbeat(&self) -> Instant {
        self.heartbeat.engine()
    }

    /// The uplinks.
    #[must_use]
    pub fn uplinks(&self) -> &[UplinkView] {
        &self.uplinks
    }

    /// The host port.
    #[must_use]
    pub fn host_port(&self) -> &HostPortView {
        &self.host_port
    }

    /// A backend's connections over all workers.
    #[must_use]
    pub fn connections(&self, backend: BackendId) -> Connections {
        let parts = self
            .workers
            .iter()
            .map(|worker| worker.counts.read(backend));
        parts.fold(Connections::default(), |sum, part| Connections {
            active: sum.active.saturating_add(part.active),
            inactive: sum.inactive.saturating_add(part.inactive),
            connections: sum.connections.saturating_add(part.connections),
        })
    }

    /// Counters and devices of every worker. Waits for the workers, a second at most each.
    #[must_use]
    pub fn workers(&self) -> Vec<WorkerReport> {
        let report = |worker: &WorkerView| {
            let (reply, answer) = channel::bounded(1);
            let report = worker
                .ask(Request::Ports { reply }, &answer)
                .unwrap_or_default();
            WorkerReport {
                core: worker.core,
                counters: worker.shared.read(),
                host_port: report.host_port,
                uplinks: report.uplinks,
            }
        };
        self.workers.iter().map(report).collect()
    }

    /// Every flow with its worker, and when it was copied. Waits for the workers.
    #[must_use]
    pub fn flows(&self) -> Vec<(u16, Flow, Instant)> {
        let mut all = Vec::new();
        for (id, worker) in (0..).zip(self.workers.iter()) {
            let mut next = Some(0);
            while let Some(from) = next {
                let Some(page) = worker.flows(from) else {
                    break;
                };
                all.extend(page.flows.iter().map(|flow| (id, *flow, page.now)));
                next = page.next;
            }
        }
        all
    }

    fn wake_all(&self) {
        self.workers.iter().for_each(|worker| worker.waker.wake());
    }
}

impl WorkerView {
    fn flows(&self, from: usize) -> Option<FlowPage> {
        let (reply, answer) = channel::bounded(1);
        self.ask(
            Request::Flows {
                from,
                limit: FLOWS_A_PAGE,
                reply,
            },
            &answer,
        )
    }

    fn ask<T>(&self, request: Request, answer: &channel::Receiver<T>) -> Option<T> {
        self.requests.send_timeout(request, PATIENCE).ok()?;
        self.waker.wake();
        answer.recv_timeout(PATIENCE).ok()
    }
}

/// How many slots of the flow table a worker looks at between two batches.
const FLOWS_A_PAGE: usize = 4_096;
/// How long someone who looks waits for a worker.
const PATIENCE: Duration = Duration::from_secs(1);

fn steering_config(config: &EngineConfig, host_port_ifindex: u32) -> SteeringConfig {
    SteeringConfig {
        workers: config.workers,
        buckets_per_worker: buckets(flows_per_worker(config)),
        grace: config.grace,
        hold: config.hold,
        mark: config.mark,
        host_port_ifindex,
        mirrored: config.mirrored,
        key: fingerprint_key(config),
    }
}

const fn fingerprint_key(config: &EngineConfig) -> FingerprintKey {
    let [key0, key1, ..] = config.seed;
    FingerprintKey { key0, key1 }
}

fn flows_per_worker(config: &EngineConfig) -> u32 {
    config
        .flows
        .div_ceil(u32::from(config.workers.max(1)))
        .max(1_024)
}

/// Two fingerprints a flow, and half of the eight slots free.
const fn buckets(flows: u32) -> u32 {
    (flows / 2).next_power_of_two()
}

fn pipeline(
    config: &EngineConfig,
    id: WorkerId,
    counts: Arc<BackendCounts>,
) -> Result<Pipeline, EngineError> {
    let [.., table_seed, choice_seed] = config.seed;
    let layout = Layout {
        worker: id.0,
        workers: config.workers,
        snat_ports: config.snat_ports.clone(),
        capacity: flows_per_worker(config),
    };
    let slab = FlowFile::create(&config.state_folder, &layout)?;
    let mut flows = FlowTable::with_slab(slab.into(), table_seed);
    flows.set_timeouts(config.timeouts);
    Ok(Pipeline::new(PipelineParts {
        worker: id,
        workers: config.workers,
        flows,
        ports: PortAllocator::new(
            id,
            config.workers,
            config.snat_ports.clone(),
            &config.reserved_ports,
        ),
        key: fingerprint_key(config),
        counts,
        seed: choice_seed ^ u64::from(id.0),
    }))
}

fn open_ports(
    config: &EngineConfig,
    host_port: &mut HostPortDevice,
) -> Result<Vec<Ports<Uplink, HostPort>>, EngineError> {
    let mut all = Vec::new();
    for (id, host) in (0..).zip(host_port.take_ports()?) {
        let mut uplinks = Vec::new();
        for spec in &config.uplinks {
            uplinks.push(UplinkPort {
                ifindex: spec.ifindex,
                suspect_checksums: spec.is_virtual,
                device: open_uplink(config, spec, id)?,
            });
        }
        all.push(Ports {
            uplinks,
            host,
            inboxes: Vec::new(),
            outboxes: Vec::new(),
        });
    }
    Ok(all)
}

/// The queues of an uplink are dealt to the workers in turn; one who gets none sends by the host
/// port.
fn open_uplink(
    config: &EngineConfig,
    spec: &UplinkSpec,
    worker: u32,
) -> Result<Option<Uplink>, EngineError> {
    let workers = u32::from(config.workers);
    let queues: Vec<u32> = (0..spec.queues)
        .filter(|queue| queue % workers == worker)
        .collect();
    if queues.is_empty() {
        return Ok(None);
    }
    let uplink = UplinkConfig {
        device: spec.name.clone(),
        queues,
        xdp: config.xdp,
        ring_size: ring_size_for(config.uplinks.iter().map(|uplink| uplink.queues).sum()),
    };
    Ok(Some(Uplink::open(&uplink)?))
}

fn attach_uplinks(
    config: &EngineConfig,
    steering: &mut Steering,
    ports: &[Ports<Uplink, HostPort>],
) -> Result<Vec<UplinkView>, EngineError> {
    let mode = match config.xdp {
        XdpPreference::Generic => XdpMode::Generic,
        XdpPreference::Auto | XdpPreference::ZeroCopy | XdpPreference::Copy => XdpMode::Native,
    };
    let mut views = Vec::new();
    for (number, spec) in config.uplinks.iter().enumerate() {
        let first = steering.attach_uplink(spec.ifindex, mode)?;
        let opened = ports
            .iter()
            .filter_map(|ports| ports.uplinks.get(number)?.device.as_ref());
        let mut xdp = "copy";
        for uplink in opened {
            xdp = uplink.mode().as_str();
            for (queue, socket) in uplink.sockets() {
                steering.set_socket(first + queue, socket)?;
            }
        }
        views.push(UplinkView {
            name: spec.name.clone(),
            xdp,
            queues: spec.queues,
        });
    }
    Ok(views)
}

fn locked_bytes(ports: &Ports<Uplink, HostPort>) -> u64 {
    let uplinks = ports.uplinks.iter().filter_map(|port| port.device.as_ref());
    let uplinks: usize = uplinks.map(Uplink::locked_bytes).sum();
    (uplinks + ports.host.locked_bytes()) as u64
}

fn wakers(workers: u16) -> Result<Vec<Arc<Waker>>, EngineError> {
    let waker = |worker| {
        Waker::new()
            .map(Arc::new)
            .map_err(|source| EngineError::Worker { worker, source })
    };
    (0..workers).map(waker).collect()
}

/// A ring between every two workers.
fn connect(ports: &mut [Ports<Uplink, HostPort>], wakers: &[Arc<Waker>]) {
    for from in 0..ports.len() {
        for to in 0..ports.len() {
            if from == to {
                ports[from].outboxes.push(None);
                continue;
            }
            let (outbox, inbox) = handover::ring();
            ports[from]
                .outboxes
                .push(Some((outbox, Arc::clone(&wakers[to]))));
            ports[to].inboxes.push(inbox);
        }
    }
}

fn spawn(
    id: WorkerId,
    core: usize,
    mut worker: EngineWorker,
    stop: Arc<AtomicBool>,
) -> Result<JoinHandle<()>, EngineError> {
    std::thread::Builder::new()
        .name(format!("worker-{}", id.0))
        .spawn(move || {
            // Unpinned it serves as well, only less evenly.
            let _pinned = affinity::pin(core);
            worker.run(&stop);
        })
        .map_err(|source| EngineError::Worker {
            worker: id.0,
            source,
        })
}

const fn key_of(key: &FrontendKey) -> steering::FrontendKey {
    steering::FrontendKey::new(key.address, key.port, key.protocol)
}
