//! The conversation with rtnetlink: what is there, and what changes.
//!
//! One socket asks (dumps, changes), another only listens, so that an overrun of the one never
//! breaks the other. Notifications of neighbours are taken in as they come; those of devices,
//! addresses and routes only say that the table must be read again, since replaced and appended
//! routes cannot be told apart reliably. A missed notification is made good by the next full read.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{StreamExt, TryStreamExt};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::neighbour::{NeighbourFlags, NeighbourState};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::sys::{AsyncSocket, SocketAddr};
use rtnetlink::{Handle, MulticastGroup, RouteMessageBuilder};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::links::{self, Links};
use crate::neighbor::{Tables, address_from_message, neighbor_from_message, route_from_message};

/// Netlink does not work.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// No socket.
    #[error("rtnetlink: {0}")]
    Socket(#[from] io::Error),
    /// The kernel refused a request.
    #[error("rtnetlink: {what}: {source}")]
    Request {
        /// What was asked for.
        what: &'static str,
        /// What it said.
        source: rtnetlink::Error,
    },
    /// The kernel did not answer.
    #[error("rtnetlink: {0}: no answer within 5 s")]
    NoAnswer(&'static str),
}

/// What the kernel knows about the network, kept up to date.
#[derive(Debug)]
pub struct Kernel {
    handle: Handle,
    events: Events,
    tasks: [JoinHandle<()>; 2],
    dirty: Dirty,
    /// Whether the listening socket failed; the next `refresh` opens new ones.
    lost: bool,
    /// Devices by number.
    pub links: Links,
    /// Addresses, routes and neighbours.
    pub tables: Tables,
}

type Events = UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Dirty {
    links: bool,
    addresses: bool,
    routes: bool,
    neighbors: bool,
}

impl Dirty {
    const ALL: Self = Self {
        links: true,
        addresses: true,
        routes: true,
        neighbors: true,
    };
    const NOTHING: Self = Self {
        links: false,
        addresses: false,
        routes: false,
        neighbors: false,
    };
}

impl Kernel {
    /// Opens the sockets; reads nothing yet. Must run inside a tokio runtime.
    ///
    /// # Errors
    /// The kernel gives no netlink socket.
    pub fn connect() -> Result<Self, KernelError> {
        let (handle, events, tasks) = Self::open()?;
        Ok(Self {
            handle,
            events,
            tasks,
            dirty: Dirty::ALL,
            lost: false,
            links: Links::new(),
            tables: Tables::default(),
        })
    }

    fn open() -> io::Result<(Handle, Events, [JoinHandle<()>; 2])> {
        let (asking, handle, _) = rtnetlink::new_connection()?;
        let (mut listening, _, events) = rtnetlink::new_multicast_connection(&GROUPS)?;
        // A burst of devices must not overrun at once; if it does, everything is read again.
        if let Err(error) = listening
            .socket_mut()
            .socket_mut()
            .set_rx_buf_sz(EVENT_BUFFER)
        {
            tracing::debug!(%error, "the receive buffer of netlink stays small");
        }
        let tasks = [tokio::spawn(asking), tokio::spawn(listening)];
        Ok((handle, events, tasks))
    }

    /// Waits until something changes. Nothing is lost if the future is dropped before it is ready.
    pub async fn changed(&mut self) {
        loop {
            match self.events.next().await {
                Some((message, _)) => {
                    if self.note(&message) {
                        return;
                    }
                }
                // The caller's periodic refresh tries again where new sockets cannot be had.
                None if self.lost => return std::future::pending().await,
                None => {
                    self.lost = true;
                    return;
                }
            }
        }
    }

    /// Takes in what has been told but not been waited for.
    pub fn drain(&mut self) {
        while let Ok((message, _)) = self.events.try_recv() {
            self.note(&message);
        }
    }

    /// Makes the next `refresh` read everything.
    pub fn distrust(&mut self) {
        self.dirty = Dirty::ALL;
    }

    /// Reads again what may be out of date.
    ///
    /// # Errors
    /// The kernel refused or did not answer; what was known stays.
    pub async fn refresh(&mut self) -> Result<(), KernelError> {
        if self.lost {
            let (handle, events, tasks) = Self::open()?;
            self.tasks.iter().for_each(JoinHandle::abort);
            (self.handle, self.events, self.tasks) = (handle, events, tasks);
            self.lost = false;
            self.dirty = Dirty::ALL;
            tracing::warn!("netlink was lost and is open again");
        }
        let dirty = std::mem::replace(&mut self.dirty, Dirty::NOTHING);
        let result = self.read(dirty).await;
        if result.is_err() {
            self.dirty = Dirty::ALL;
        }
        result
    }

    /// Asks the kernel to find a station on a link, or to check that it is still there.
    ///
    /// # Errors
    /// The kernel refused or did not answer.
    pub async fn ask_for(&self, ifindex: u32, address: IpAddr) -> Result<(), KernelError> {
        // Without a state and with the "use" flag the kernel does what it does for a packet.
        let request = self.handle.neighbours().add(ifindex, address);
        let request = request
            .state(NeighbourState::None)
            .flags(NeighbourFlags::Use)
            .replace();
        answered("asking for a neighbour", request.execute()).await
    }

    /// The handle for requests of others.
    #[must_use]
    pub(crate) fn handle(&self) -> Handle {
        self.handle.clone()
    }

    async fn read(&mut self, dirty: Dirty) -> Result<(), KernelError> {
        if dirty.links {
            let messages = self.handle.link().get().execute().try_collect::<Vec<_>>();
            let messages = answered("list of devices", messages).await?;
            let links = messages.iter().map(links::from_message);
            self.links = links.map(|link| (link.ifindex, link)).collect();
        }
        if dirty.addresses {
            let messages = self
                .handle
                .address()
                .get()
                .execute()
                .try_collect::<Vec<_>>();
            let messages = answered("list of addresses", messages).await?;
            self.tables.addresses = messages.iter().filter_map(address_from_message).collect();
        }
        if dirty.routes {
            let messages = routes(&self.handle).await?;
            let mut routes: Vec<_> = messages.iter().filter_map(route_from_message).collect();
            routes.sort_unstable();
            self.tables.routes = routes;
        }
        if dirty.neighbors {
            let messages = self
                .handle
                .neighbours()
                .get()
                .execute()
                .try_collect::<Vec<_>>();
            let messages = answered("list of neighbours", messages).await?;
            let entries = messages.iter().filter_map(neighbor_from_message);
            self.tables.neighbors = entries
                .filter_map(|(key, neighbor)| Some((key, neighbor?)))
                .collect();
        }
        Ok(())
    }

    /// Tells whether the message means a change.
    fn note(&mut self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        let before = self.dirty;
        match &message.payload {
            NetlinkPayload::Overrun(_) => self.dirty = Dirty::ALL,
            NetlinkPayload::InnerMessage(message) => match message {
                RouteNetlinkMessage::NewLink(_) | RouteNetlinkMessage::DelLink(_) => {
                    self.dirty.links = true;
                    // A device that goes down takes routes with it, without a word for IPv4.
                    self.dirty.routes = true;
                }
                RouteNetlinkMessage::NewAddress(_) | RouteNetlinkMessage::DelAddress(_) => {
                    self.dirty.addresses = true;
                    self.dirty.routes = true;
                }
                RouteNetlinkMessage::NewRoute(_) | RouteNetlinkMessage::DelRoute(_) => {
                    self.dirty.routes = true;
                }
                RouteNetlinkMessage::NewNeighbour(neighbor) => {
                    return self.tables.apply_neighbor(neighbor, false);
                }
                RouteNetlinkMessage::DelNeighbour(neighbor) => {
                    return self.tables.apply_neighbor(neighbor, true);
                }
                _ => {}
            },
            _ => {}
        }
        self.dirty != before
    }
}

impl Drop for Kernel {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

/// All routes of both families and all tables.
pub(crate) async fn routes(handle: &Handle) -> Result<Vec<RouteMessage>, KernelError> {
    let v4 = RouteMessageBuilder::<std::net::Ipv4Addr>::new().build();
    let v6 = RouteMessageBuilder::<std::net::Ipv6Addr>::new().build();
    let mut all = Vec::new();
    for family in [v4, v6] {
        let messages = handle.route().get(family).execute().try_collect::<Vec<_>>();
        all.extend(answered("list of routes", messages).await?);
    }
    Ok(all)
}

pub(crate) async fn answered<T>(
    what: &'static str,
    request: impl Future<Output = Result<T, rtnetlink::Error>>,
) -> Result<T, KernelError> {
    match timeout(PATIENCE, request).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(source)) => Err(KernelError::Request { what, source }),
        Err(_) => Err(KernelError::NoAnswer(what)),
    }
}

const GROUPS: [MulticastGroup; 6] = [
    MulticastGroup::Link,
    MulticastGroup::Neigh,
    MulticastGroup::Ipv4Ifaddr,
    MulticastGroup::Ipv6Ifaddr,
    MulticastGroup::Ipv4Route,
    MulticastGroup::Ipv6Route,
];
const EVENT_BUFFER: i32 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(5);
