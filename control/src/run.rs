//! The loop: objects and kernel in, snapshots out.
//!
//! One async task on one thread. It waits until an object, a device, an address, a route or a
//! neighbour changed, folds what came together, and publishes one snapshot. Changes of services are
//! published no more often than the minimum interval; devices, routes and neighbours do not wait.
//! It does not wait for workers, and it decides nothing. Failures after the start are logged and
//! tried again: what was served last stays served.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use dataplane::snapshot as engine;
use tokio::sync::oneshot;
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, sleep_until};

use crate::address::Family;
use crate::controller::{ControlConfig, Controller, Event, Rejected, Resolved};
use crate::host_routes::{self, HostRoutes};
use crate::kernel::{Kernel, KernelError};
use crate::links::{LinkEvent, Links, differences};
use crate::neighbor::Route;
use crate::notices::Notices;
use crate::policy::Frontend;
use crate::snapshot::{self, DeviceRole, SnapshotMaker};
use crate::source::{Input, Source, SourceError};

/// What the loop needs to know.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RunConfig {
    /// How services are resolved.
    pub control: ControlConfig,
    /// Where objects come from.
    pub source: Source,
    /// Least time between two changes of services.
    pub min_interval: Duration,
    /// Configured SNAT addresses, one per family at most.
    pub snat_addresses: Vec<IpAddr>,
    /// The host port's name, if host processes reach Services through it.
    pub host_scope: Option<String>,
}

/// A publication.
#[derive(Clone, Debug)]
pub struct Update {
    /// What is served.
    pub resolved: Arc<Resolved>,
    /// The same for the engine, with routes, neighbours and devices.
    pub snapshot: Arc<engine::Snapshot>,
}

/// Why the loop did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// The source cannot be read at all.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The kernel's tables cannot be read at all.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// No thread or runtime.
    #[error("control thread: {0}")]
    Thread(#[from] std::io::Error),
    /// A callback of the caller panicked.
    #[error("control thread: it panicked")]
    Panicked,
}

/// The loop on a thread of its own.
#[derive(Debug)]
pub struct Running {
    stop: oneshot::Sender<()>,
    thread: JoinHandle<Result<(), RunError>>,
}

impl Running {
    /// Whether it has ended by itself.
    #[must_use]
    pub fn is_finished(&self) -> bool {
        self.thread.is_finished()
    }

    /// Ends it; routes into the host port are removed before it returns.
    ///
    /// # Errors
    /// Why it did not start or ended before.
    pub fn stop(self) -> Result<(), RunError> {
        // An error means that it has ended already; then `join` tells why.
        _ = self.stop.send(());
        self.thread.join().unwrap_or(Err(RunError::Panicked))
    }
}

/// Starts the loop on a thread of its own; see `run` for the callbacks.
///
/// # Errors
/// No thread can be started.
pub fn spawn(
    config: RunConfig,
    link: impl FnMut(&LinkEvent) -> DeviceRole + Send + 'static,
    publish: impl FnMut(Update) + Send + 'static,
) -> Result<Running, RunError> {
    let (stop, stopped) = oneshot::channel();
    let body = move || {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        let stopped = async {
            // A dropped handle stops the loop too.
            _ = stopped.await;
        };
        runtime.block_on(run(config, link, publish, stopped))
    };
    let thread = std::thread::Builder::new()
        .name("control".into())
        .spawn(body)?;
    Ok(Running { stop, thread })
}

/// Runs until `stop`. `link` is called for each device that comes, changes or goes, before the
/// snapshot that knows it, and answers what the engine does with it; `publish` for each snapshot.
///
/// # Errors
/// Source or kernel cannot be read at the start.
pub async fn run(
    config: RunConfig,
    mut link: impl FnMut(&LinkEvent) -> DeviceRole,
    mut publish: impl FnMut(Update),
    stop: impl Future<Output = ()>,
) -> Result<(), RunError> {
    let mut stop = std::pin::pin!(stop);
    let mut source = Input::open(&config.source).await?;
    let notices = source.notices(&config.control.node_name);
    let mut control = Control::start(config, notices).await?;
    let first = tokio::select! {
        () = &mut stop => None,
        first = source.first() => Some(first),
    };
    let Some(Ok(first)) = first else {
        control.stop().await;
        return first.map_or(Ok(()), |first| first.map(drop).map_err(RunError::from));
    };
    control.take(first);
    let mut resync = interval_at(Instant::now() + RESYNC, RESYNC);
    resync.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut doubt = interval_at(Instant::now() + DOUBT, DOUBT);
    doubt.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        control.turn(&mut link, &mut publish).await;
        let due = control.due();
        tokio::select! {
            () = &mut stop => break,
            events = source.next() => control.take(events),
            () = control.kernel.changed() => sleep(FOLD).await,
            _ = resync.tick() => control.kernel.distrust(),
            _ = doubt.tick() => control.doubt(),
            () = sleep_until(due), if control.held => {}
        }
    }
    control.stop().await;
    Ok(())
}

struct Control {
    config: RunConfig,
    kernel: Kernel,
    controller: Controller,
    maker: SnapshotMaker,
    host_routes: HostRoutes,
    links: Links,
    roles: BTreeMap<u32, DeviceRole>,
    named: BTreeSet<Rejected>,
    notices: Option<Notices>,
    last: Option<Published>,
    /// Stations that the kernel was asked for lately.
    asked: BTreeSet<(u32, IpAddr)>,
    /// When other services were published last.
    published: Option<Instant>,
    /// Whether a change of services waits for the minimum interval.
    held: bool,
    /// Whether to look for stations to ask for: routes or devices changed, or time has passed.
    in_doubt: bool,
}

struct Published {
    resolved: Arc<Resolved>,
    node: Arc<engine::Node>,
    fib: Arc<engine::Fib>,
}

impl Control {
    async fn start(config: RunConfig, notices: Option<Notices>) -> Result<Self, RunError> {
        let mut kernel = Kernel::connect()?;
        kernel.refresh().await?;
        let is_ours = |route: &Route| route.protocol == host_routes::PROTOCOL;
        if config.host_scope.is_none() && kernel.tables.routes.iter().any(is_ours) {
            // Of a process that was killed: host processes would send into nowhere.
            warn("an old route stays", host_routes::remove_all().await);
        }
        Ok(Self {
            controller: Controller::new(config.control.clone()),
            config,
            kernel,
            maker: SnapshotMaker::new(),
            host_routes: HostRoutes::default(),
            links: Links::new(),
            roles: BTreeMap::new(),
            named: BTreeSet::new(),
            notices,
            last: None,
            asked: BTreeSet::new(),
            published: None,
            held: false,
            in_doubt: true,
        })
    }

    /// Brings everything up to date once.
    async fn turn(
        &mut self,
        link: &mut impl FnMut(&LinkEvent) -> DeviceRole,
        publish: &mut impl FnMut(Update),
    ) {
        self.kernel.drain();
        if let Err(error) = self.kernel.refresh().await {
            tracing::warn!(%error, "the kernel's tables cannot be read, the last ones stay");
        }
        self.tell_links(link);
        let addresses = self.kernel.tables.local_addresses();
        self.controller.handle(Event::LocalAddresses(addresses));
        let resolved = self.resolve();
        self.name_rejected(&resolved);
        let routes = self.wanted_routes(&resolved);
        if let Some((device, wanted)) = &routes {
            let done = self
                .host_routes
                .remove_old(&self.kernel, *device, wanted)
                .await;
            warn("an old route stays", done);
        }
        if let Some(update) = self.update(&resolved) {
            publish(update);
        }
        if let Some((device, wanted)) = &routes {
            let done = self
                .host_routes
                .add_new(&self.kernel, *device, wanted)
                .await;
            warn("a route is missing", done);
        }
        if std::mem::take(&mut self.in_doubt) {
            self.ask_for_stations(&resolved).await;
        }
    }

    fn doubt(&mut self) {
        self.asked.clear();
        self.in_doubt = true;
    }

    /// The engine sends past the kernel, so the kernel does not notice that a station is needed, or
    /// that it has moved.
    async fn ask_for_stations(&mut self, resolved: &Resolved) {
        let ports = resolved
            .services
            .values()
            .flat_map(|service| &service.ports);
        let lists = ports
            .flat_map(|port| &port.frontends)
            .map(Frontend::for_inside);
        let remote = lists.flat_map(|list| list.iter().filter(|backend| !backend.local));
        let addresses = remote.map(|backend| backend.address.ip());
        let tables = &self.kernel.tables;
        let stations = tables.stations(addresses, host_routes::PROTOCOL, STATIONS);
        for station in stations {
            let link = self.links.get(&station.0);
            let has_stations = link.is_some_and(|link| link.up && link.mac.is_some());
            if has_stations && tables.is_in_doubt(&station) && self.asked.insert(station) {
                let done = self.kernel.ask_for(station.0, station.1).await;
                if let Err(error) = done {
                    tracing::debug!(address = %station.1, %error, "the kernel is not asked");
                }
            }
        }
    }

    /// What is served now; what was served last while the minimum interval lasts.
    fn resolve(&mut self) -> Arc<Resolved> {
        let now = Instant::now();
        self.held = now < self.due();
        match &self.last {
            Some(last) if self.held => Arc::clone(&last.resolved),
            _ => self.controller.resolve(),
        }
    }

    /// When other services may be published.
    fn due(&self) -> Instant {
        self.published
            .map_or_else(Instant::now, |last| last + self.config.min_interval)
    }

    fn tell_links(&mut self, link: &mut impl FnMut(&LinkEvent) -> DeviceRole) {
        for event in differences(&self.links, &self.kernel.links) {
            let role = link(&event);
            let ifindex = event.link().ifindex;
            match event {
                LinkEvent::Gone(_) => _ = self.roles.remove(&ifindex),
                LinkEvent::Appeared(_) | LinkEvent::Changed(_) => {
                    self.roles.insert(ifindex, role);
                }
            }
        }
        self.links.clone_from(&self.kernel.links);
    }

    /// The next publication, if anything is different.
    fn update(&mut self, resolved: &Arc<Resolved>) -> Option<Update> {
        let node = snapshot::node(
            &resolved.addresses,
            &resolved.inside,
            &self.config.snat_addresses,
            &self.links,
            &self.roles,
        );
        let fib = self.kernel.tables.fib(host_routes::PROTOCOL);
        let last = self.last.as_ref();
        let same_services = last.is_some_and(|last| Arc::ptr_eq(&last.resolved, resolved));
        let node = keep(last.map(|last| &last.node), node);
        let fib = keep(last.map(|last| &last.fib), fib);
        let same_surroundings =
            last.is_some_and(|last| Arc::ptr_eq(&last.node, &node) && Arc::ptr_eq(&last.fib, &fib));
        if same_services && same_surroundings {
            return None;
        }
        self.in_doubt |= !same_surroundings;
        self.last = Some(Published {
            resolved: Arc::clone(resolved),
            node: Arc::clone(&node),
            fib: Arc::clone(&fib),
        });
        let snapshot = if same_services {
            self.maker.surroundings(node, fib)
        } else {
            self.published = Some(Instant::now());
            let (snapshot, errors) = self.maker.services(resolved, node, fib);
            errors.iter().for_each(|error| tracing::warn!("{error}"));
            snapshot
        };
        Some(Update {
            resolved: Arc::clone(resolved),
            snapshot,
        })
    }

    fn wanted_routes(&self, resolved: &Resolved) -> Option<(u32, BTreeMap<IpAddr, IpAddr>)> {
        let name = self.config.host_scope.as_ref()?;
        let device = self
            .links
            .values()
            .find(|link| link.name == *name && link.up)?;
        let source = |family| {
            let address = self
                .kernel
                .tables
                .node_address(family, &resolved.node_addresses)?;
            Some((family, address))
        };
        let sources = Family::BOTH.into_iter().filter_map(source).collect();
        Some((device.ifindex, host_routes::wanted(resolved, &sources)))
    }

    fn take(&mut self, events: Vec<Event>) {
        events
            .into_iter()
            .for_each(|event| self.controller.handle(event));
    }

    /// Each thing that is not served is named once in the log, and once more when it is mended.
    fn name_rejected(&mut self, resolved: &Resolved) {
        let now: BTreeSet<Rejected> = resolved.rejected.iter().cloned().collect();
        for rejected in now.difference(&self.named) {
            if let Some(notices) = &self.notices {
                notices.tell(rejected);
            }
            let Rejected {
                kind,
                namespace,
                name,
                reason,
            } = rejected;
            tracing::warn!(kind, namespace, name, "not served: {reason}");
        }
        self.named = now;
    }

    async fn stop(&mut self) {
        if self.config.host_scope.is_some() {
            warn("a route stays", host_routes::remove_all().await);
        }
    }
}

/// The last one, if it is the same: what is shared need not be published again.
fn keep<T: PartialEq>(last: Option<&Arc<T>>, now: T) -> Arc<T> {
    match last {
        Some(last) if **last == now => Arc::clone(last),
        _ => Arc::new(now),
    }
}

fn warn<T>(what: &str, result: Result<T, KernelError>) {
    if let Err(error) = result {
        tracing::warn!(%error, "{what}");
    }
}

/// How long to wait for more of what comes in bursts.
const FOLD: Duration = Duration::from_millis(2);
/// How often everything is read again, told or not.
const RESYNC: Duration = Duration::from_secs(30);
/// How often the kernel is asked for a station that is in doubt.
const DOUBT: Duration = Duration::from_secs(10);
/// How many stations are looked after.
const STATIONS: usize = 1024;
