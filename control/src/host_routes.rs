//! Routes of the Services' addresses into the host port, for host processes (`engine.scope: host`).
//!
//! One host route for each cluster IP, load balancer address and external IP, with an address of
//! this node as source, so that what a host process sends to a Service comes to the engine with a
//! source that pods can answer. Never for NodePorts: these are the node's own addresses. Ours are
//! known by their protocol number and only those are touched; where somebody else has a route for
//! an address, his stays and is named.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use rtnetlink::packet_core::ErrorMessage;
use rtnetlink::packet_route::route::{RouteMessage, RouteProtocol, RouteScope};
use rtnetlink::{Handle, RouteMessageBuilder};
use tokio::runtime;

use crate::address::{Cidr, Family};
use crate::controller::Resolved;
use crate::kernel::{Kernel, KernelError, answered, routes};
use crate::neighbor::Route;
use crate::policy::{FrontendAddress, FrontendKind};

/// Who made a route, as `ip route` shows it (`proto 115`).
pub const PROTOCOL: u8 = 115;

/// The addresses of Services that need a route, and their source per family.
#[must_use]
pub fn wanted(resolved: &Resolved, sources: &BTreeMap<Family, IpAddr>) -> BTreeMap<IpAddr, IpAddr> {
    let ports = resolved
        .services
        .values()
        .flat_map(|service| &service.ports);
    let frontends = ports.flat_map(|port| &port.frontends);
    let addresses = frontends.filter_map(|frontend| match frontend.address {
        FrontendAddress::Ip(ip) if frontend.kind != FrontendKind::NodePort => Some(ip),
        _ => None,
    });
    // An address that a device of ours carries is delivered here whatever a route says.
    let foreign = addresses.filter(|ip| !resolved.addresses.contains(ip));
    foreign
        .filter_map(|ip| Some((ip, *sources.get(&Family::of(ip))?)))
        .collect()
}

/// Keeps the routes of one host port.
#[derive(Debug, Default)]
pub struct HostRoutes {
    /// Addresses for which somebody else has a route; named once.
    foreign: BTreeSet<IpAddr>,
}

impl HostRoutes {
    /// Removes our routes that are not wanted any more. `device` is the host port's number.
    ///
    /// # Errors
    /// The first that the kernel did not do; the others are tried all the same.
    pub async fn remove_old(
        &mut self,
        kernel: &Kernel,
        device: u32,
        wanted: &BTreeMap<IpAddr, IpAddr>,
    ) -> Result<(), KernelError> {
        let ours = kernel
            .tables
            .routes
            .iter()
            .filter(|route| route.protocol == PROTOCOL);
        let old = ours.filter(|route| !is_wanted(route, device, wanted));
        let mut result = Ok(());
        for route in old {
            let message = message(route.destination.network(), route.ifindex, route.source);
            result = result.and(delete(&kernel.handle(), message).await);
        }
        result
    }

    /// Adds those that are missing.
    ///
    /// # Errors
    /// The first that the kernel did not do; the others are tried all the same.
    pub async fn add_new(
        &mut self,
        kernel: &Kernel,
        device: u32,
        wanted: &BTreeMap<IpAddr, IpAddr>,
    ) -> Result<(), KernelError> {
        self.foreign.retain(|ip| wanted.contains_key(ip));
        let ours = kernel
            .tables
            .routes
            .iter()
            .filter(|route| route.protocol == PROTOCOL);
        let present: BTreeSet<IpAddr> = ours
            .filter(|route| is_wanted(route, device, wanted))
            .map(|route| route.destination.network())
            .collect();
        let mut result = Ok(());
        for (address, source) in wanted
            .iter()
            .filter(|(address, _)| !present.contains(address))
        {
            let request = kernel
                .handle()
                .route()
                .add(message(*address, device, Some(*source)));
            match answered("adding a route", request.execute()).await {
                Ok(()) => _ = self.foreign.remove(address),
                Err(error) if is_code(&error, EEXIST) => {
                    if self.foreign.insert(*address) {
                        tracing::warn!(%address, "somebody else has a route for this address, host processes reach it by that one");
                    }
                }
                Err(error) => result = result.and(Err(error)),
            }
        }
        result
    }
}

/// Removes every route that we ever made in this network namespace, by whatever process. Returns
/// how many there were.
///
/// # Errors
/// The kernel refused.
pub async fn remove_all() -> Result<usize, KernelError> {
    let kernel = Kernel::connect()?;
    let handle = kernel.handle();
    let mut count = 0;
    for route in routes(&handle).await? {
        if route.header.protocol == RouteProtocol::Other(PROTOCOL) {
            delete(&handle, route).await?;
            count += 1;
        }
    }
    Ok(count)
}

/// The same for callers without a runtime.
///
/// # Errors
/// The kernel refused.
pub fn remove_all_blocking() -> Result<usize, KernelError> {
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(remove_all())
}

/// How many routes of ours there are in this network namespace.
///
/// # Errors
/// The kernel refused.
pub async fn count() -> Result<usize, KernelError> {
    let kernel = Kernel::connect()?;
    let all = routes(&kernel.handle()).await?;
    let ours = all
        .iter()
        .filter(|route| route.header.protocol == RouteProtocol::Other(PROTOCOL));
    Ok(ours.count())
}

async fn delete(handle: &Handle, message: RouteMessage) -> Result<(), KernelError> {
    match answered("removing a route", handle.route().del(message).execute()).await {
        Err(error) if is_code(&error, ESRCH) => Ok(()), // gone already
        other => other,
    }
}

fn is_wanted(route: &Route, device: u32, wanted: &BTreeMap<IpAddr, IpAddr>) -> bool {
    let address = route.destination.network();
    route.destination == Cidr::host(address)
        && route.ifindex == device
        && route.source.is_some()
        && route.source == wanted.get(&address).copied()
}

fn message(address: IpAddr, device: u32, source: Option<IpAddr>) -> RouteMessage {
    let protocol = RouteProtocol::Other(PROTOCOL);
    match address {
        IpAddr::V4(v4) => {
            let builder = RouteMessageBuilder::<std::net::Ipv4Addr>::new()
                .destination_prefix(v4, 32)
                .output_interface(device)
                .scope(RouteScope::Link)
                .protocol(protocol);
            match source {
                Some(IpAddr::V4(source)) => builder.pref_source(source).build(),
                _ => builder.build(),
            }
        }
        IpAddr::V6(v6) => {
            let builder = RouteMessageBuilder::<std::net::Ipv6Addr>::new()
                .destination_prefix(v6, 128)
                .output_interface(device)
                .priority(V6_METRIC)
                .protocol(protocol);
            match source {
                Some(IpAddr::V6(source)) => builder.pref_source(source).build(),
                _ => builder.build(),
            }
        }
    }
}

fn is_code(error: &KernelError, code: i32) -> bool {
    let KernelError::Request { source, .. } = error else {
        return false;
    };
    let rtnetlink::Error::NetlinkError(ErrorMessage {
        code: Some(found), ..
    }) = source
    else {
        return false;
    };
    found.get() == -code
}

/// The kernel reads 0 as 1024 for IPv6; IPv4 routes take 0, the best.
const V6_METRIC: u32 = 1;
const EEXIST: i32 = 17;
const ESRCH: i32 = 3;
