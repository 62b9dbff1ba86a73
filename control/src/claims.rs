//! Who serves an address and port that several Services claim.
//!
//! The kind of frontend decides first (nobody takes a cluster IP by writing it into `externalIPs`),
//! then who is older, then the name. The loser's frontend is left out and named; it comes back as soon
//! as the winner is gone. Within one Service port two kinds may share an address.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use crate::policy::{Frontend, FrontendAddress, FrontendKind, Port, ResolvedService};
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
                contested.extend(claims.iter().map(|other| other.service.clone()));
                claims.insert(claim.clone());
                places.push((place, claim));
            }
        }
        self.places.insert(key.clone(), places);
        contested
    }

    /// The Service with those frontends only that it wins.
    pub(crate) fn settle(&self, service: &Arc<ResolvedService>) -> Arc<ResolvedService> {
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
