//! Who serves an address and port that several Services claim.
//!
//! The kind of frontend decides first (nobody takes a cluster IP by writing it into `externalIPs`),
//! then who is older, then the name. The loser's frontend is left out and named; it comes back as soon
//! as the winner is gone. Within one Service port two kinds may share an address.
//!
//! An endpoint that is itself a frontend is left out too: what goes there would be translated twice,
//! or for ever.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use crate::address::Family;
use crate::policy::{
    Backend, Backends, Frontend, FrontendAddress, FrontendKind, Port, ResolvedService,
};
use crate::service::{Protocol, ServiceKey};

type Place = (FrontendAddress, u16, Protocol);

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Claim {
    kind: FrontendKind,
    /// Made at; without a time it counts as the youngest.
    created: i64,
    service: ServiceKey,
    port: Arc<str>,
}

/// All claims to all addresses and ports.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    claimants: HashMap<Place, BTreeSet<Claim>>,
    places: HashMap<ServiceKey, Vec<(Place, Claim)>>,
    /// Places that became frontends, or are none any more, since they were looked at.
    changed: HashSet<Place>,
}

impl Claims {
    /// Replaces what one Service claims. Returns the other Services whose claims that may change.
    pub(crate) fn replace(
        &mut self,
        key: &ServiceKey,
        service: Option<&ResolvedService>,
    ) -> BTreeSet<ServiceKey> {
        let mut contested = BTreeSet::new();
        for (place, claim) in self.places.remove(key).unwrap_or_default() {
            if let Some(claims) = self.claimants.get_mut(&place) {
                claims.remove(&claim);
                contested.extend(claims.iter().map(|other| other.service.clone()));
                if claims.is_empty() {
                    self.claimants.remove(&place);
                    self.changed.insert(place);
                }
            }
        }
        let Some(service) = service else {
            return contested;
        };
        let mut places = Vec::new();
        for port in &service.ports {
            for frontend in &port.frontends {
                let place = place(port, frontend);
                let claim = Claim {
                    kind: frontend.kind,
                    created: service.created.unwrap_or(i64::MAX),
                    service: key.clone(),
                    port: Arc::clone(&port.name),
                };
                let claims = self.claimants.entry(place).or_default();
                if claims.is_empty() && !self.changed.remove(&place) {
                    self.changed.insert(place);
                }
                contested.extend(claims.iter().map(|other| other.service.clone()));
                claims.insert(claim.clone());
                places.push((place, claim));
            }
        }
        self.places.insert(key.clone(), places);
        contested
    }

    /// What became a frontend, or is none any more, since the last call.
    pub(crate) fn take_changed(&mut self) -> Places<'static> {
        Places::Changed(std::mem::take(&mut self.changed))
    }

    /// The Service with those frontends only that it wins, and without endpoints that are frontends
    /// on a node with these addresses.
    pub(crate) fn settle(
        &self,
        service: &Arc<ResolvedService>,
        local: &BTreeSet<IpAddr>,
    ) -> Arc<ResolvedService> {
        self.without_loops(&self.without_lost(service), local)
    }

    fn without_loops(
        &self,
        service: &Arc<ResolvedService>,
        local: &BTreeSet<IpAddr>,
    ) -> Arc<ResolvedService> {
        let all = Places::All(self);
        let loops = |port: &Port| {
            let backends = port.backends().map(|backend| backend.address);
            backends
                .filter(|at| all.hold(*at, port.protocol, local))
                .collect::<BTreeSet<_>>()
        };
        if service.ports.iter().all(|port| loops(port).is_empty()) {
            return Arc::clone(service);
        }
        let mut settled = (**service).clone();
        for port in &mut settled.ports {
            let loops = loops(port);
            let protocol = port.protocol;
            settled.remarks.extend(loops.iter().map(|at| {
                format!("endpoint {at}/{protocol} is itself an address of a Service, it cannot be a backend")
            }));
            let is_backend = |backend: &Backend| !loops.contains(&backend.address);
            let filtered =
                |list: &Backends| list.iter().filter(|b| is_backend(b)).cloned().collect();
            for frontend in &mut port.frontends {
                frontend.backends = filtered(&frontend.backends);
                let inside = frontend.inside_backends.as_ref().map(filtered);
                frontend.inside_backends = inside.filter(|list| *list != frontend.backends);
            }
            port.draining.retain(is_backend);
        }
        Arc::new(settled)
    }

    fn without_lost(&self, service: &Arc<ResolvedService>) -> Arc<ResolvedService> {
        let mut lost = Vec::new();
        for (index, port) in service.ports.iter().enumerate() {
            for (at, frontend) in port.frontends.iter().enumerate() {
                if let Some(winner) = self.winner_over(service, port, frontend) {
                    lost.push((index, at, remark(port, frontend, winner)));
                }
            }
        }
        if lost.is_empty() {
            return Arc::clone(service);
        }
        let mut settled = (**service).clone();
        for (index, at, remark) in lost.into_iter().rev() {
            if let Some(port) = settled.ports.get_mut(index) {
                port.frontends.remove(at);
            }
            settled.remarks.push(remark);
        }
        Arc::new(settled)
    }

    fn winner_over(
        &self,
        service: &ResolvedService,
        port: &Port,
        frontend: &Frontend,
    ) -> Option<&Claim> {
        let first = self.claimants.get(&place(port, frontend))?.first()?;
        (first.service != service.key || first.port != port.name).then_some(first)
    }
}

/// Some frontends.
pub(crate) enum Places<'a> {
    All(&'a Claims),
    Changed(HashSet<Place>),
}

impl Places<'_> {
    pub(crate) fn is_empty(&self) -> bool {
        match self {
            Self::All(claims) => claims.claimants.is_empty(),
            Self::Changed(places) => places.is_empty(),
        }
    }

    /// Whether an address is one of them on a node with these addresses.
    pub(crate) fn hold(
        &self,
        at: SocketAddr,
        protocol: Protocol,
        local: &BTreeSet<IpAddr>,
    ) -> bool {
        let holds = |address| {
            let place = (address, at.port(), protocol);
            match self {
                Self::All(claims) => claims.claimants.contains_key(&place),
                Self::Changed(places) => places.contains(&place),
            }
        };
        holds(FrontendAddress::Ip(at.ip()))
            || local.contains(&at.ip()) && holds(FrontendAddress::EveryLocal(Family::of(at.ip())))
    }
}

fn place(port: &Port, frontend: &Frontend) -> Place {
    (frontend.address, frontend.port, port.protocol)
}

fn remark(port: &Port, frontend: &Frontend, winner: &Claim) -> String {
    let place = match frontend.address {
        FrontendAddress::EveryLocal(family) => format!("{family} node port {}", frontend.port),
        FrontendAddress::Ip(ip) => std::net::SocketAddr::new(ip, frontend.port).to_string(),
    };
    let colon = if winner.port.is_empty() { "" } else { ":" };
    let kind = match winner.kind {
        FrontendKind::ClusterIp => "cluster IP",
        FrontendKind::LoadBalancer => "load balancer address",
        FrontendKind::ExternalIp => "external IP",
        FrontendKind::NodePort => "node port",
    };
    let (protocol, service, name) = (port.protocol, &winner.service, &winner.port);
    format!("{place}/{protocol} belongs to {service}{colon}{name} as its {kind}")
}
