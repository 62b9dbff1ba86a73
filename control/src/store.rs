//! The latest good version of every object, by name.
//!
//! Objects are checked when they come in: a bad one is left out and named in `rejected`, and what
//! it was before is gone too. The store tells which Services an object touches, so that only those
//! are resolved again. It decides nothing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;

use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::endpoint::{self, Slice};
use crate::node::Node;
use crate::service::{self, Service, ServiceKey};

/// The kinds of object that matter here.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Kind {
    /// core/v1 Endpoints, the old form of slices.
    Endpoints,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// core/v1 Node.
    Node,
    /// core/v1 Service.
    Service,
}

impl Kind {
    /// Its name in the API.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Endpoints => "Endpoints",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::Service => "Service",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// An object as it was read.
#[derive(Clone, PartialEq, Debug)]
pub enum Object {
    /// A Service.
    Service(Box<core::Service>),
    /// An EndpointSlice.
    EndpointSlice(Box<discovery::EndpointSlice>),
    /// An Endpoints object.
    Endpoints(Box<core::Endpoints>),
    /// A Node.
    Node(Box<core::Node>),
}

impl Object {
    /// Its kind and name.
    #[must_use]
    pub fn key(&self) -> ObjectKey {
        let (kind, metadata) = match self {
            Self::Service(object) => (Kind::Service, &object.metadata),
            Self::EndpointSlice(object) => (Kind::EndpointSlice, &object.metadata),
            Self::Endpoints(object) => (Kind::Endpoints, &object.metadata),
            Self::Node(object) => (Kind::Node, &object.metadata),
        };
        ObjectKey {
            kind,
            namespace: metadata.namespace.as_deref().unwrap_or_default().into(),
            name: metadata.name.as_deref().unwrap_or_default().into(),
        }
    }

    /// Its metadata, for sources that fill in what was not written.
    pub fn metadata_mut(&mut self) -> &mut ObjectMeta {
        match self {
            Self::Service(object) => &mut object.metadata,
            Self::EndpointSlice(object) => &mut object.metadata,
            Self::Endpoints(object) => &mut object.metadata,
            Self::Node(object) => &mut object.metadata,
        }
    }
}

/// Kind and name of an object.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ObjectKey {
    /// Its kind.
    pub kind: Kind,
    /// Its namespace, empty for a Node.
    pub namespace: Arc<str>,
    /// Its name.
    pub name: Arc<str>,
}

impl fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ", self.kind)?;
        if !self.namespace.is_empty() {
            write!(f, "{}/", self.namespace)?;
        }
        f.write_str(&self.name)
    }
}

/// What a change touches.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Touched {
    /// Nothing that is served.
    Nothing,
    /// These Services.
    Services(Vec<ServiceKey>),
    /// The Node of this name.
    Node(Arc<str>),
}

/// The latest good objects.
#[derive(Debug, Default)]
pub struct Store {
    services: BTreeMap<ServiceKey, Service>,
    slices: BTreeMap<ServiceKey, BTreeMap<Arc<str>, Slice>>,
    /// Which Service a slice belonged to when it was last seen: its label may change.
    slice_owners: BTreeMap<ObjectKey, ServiceKey>,
    mirrored: BTreeMap<ServiceKey, Vec<Slice>>,
    nodes: BTreeMap<Arc<str>, Node>,
    rejected: BTreeMap<ObjectKey, String>,
}

impl Store {
    /// Takes an object in; it replaces the one of the same name.
    pub fn apply(&mut self, object: &Object) -> Touched {
        let key = object.key();
        self.rejected.remove(&key);
        let result = match object {
            Object::Service(object) => self.apply_service(&key, object),
            Object::EndpointSlice(object) => self.apply_slice(&key, object),
            Object::Endpoints(object) => self.apply_endpoints(&key, object),
            Object::Node(object) => self.apply_node(&key, object),
        };
        result.unwrap_or_else(|reason| {
            let touched = self.delete(&key);
            self.rejected.insert(key, reason);
            touched
        })
    }

    /// Forgets an object.
    pub fn delete(&mut self, key: &ObjectKey) -> Touched {
        self.rejected.remove(key);
        let service = ServiceKey {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
        };
        match key.kind {
            Kind::Service => match self.services.remove(&service) {
                Some(_) => Touched::Services(vec![service]),
                None => Touched::Nothing,
            },
            Kind::EndpointSlice => self
                .detach_slice(key)
                .map_or(Touched::Nothing, |owner| Touched::Services(vec![owner])),
            Kind::Endpoints => match self.mirrored.remove(&service) {
                Some(_) => Touched::Services(vec![service]),
                None => Touched::Nothing,
            },
            Kind::Node => match self.nodes.remove(&key.name) {
                Some(_) => Touched::Node(Arc::clone(&key.name)),
                None => Touched::Nothing,
            },
        }
    }

    /// A Service by name.
    #[must_use]
    pub fn service(&self, key: &ServiceKey) -> Option<&Service> {
        self.services.get(key)
    }

    /// A Node by name.
    #[must_use]
    pub fn node(&self, name: &str) -> Option<&Node> {
        self.nodes.get(name)
    }

    /// The names of all Services.
    pub fn service_keys(&self) -> impl Iterator<Item = &ServiceKey> {
        self.services.keys()
    }

    /// The slices of a Service; those made of its Endpoints object only where it has no others.
    #[must_use]
    pub fn slices(&self, service: &ServiceKey) -> Vec<&Slice> {
        match self.slices.get(service) {
            Some(slices) => slices.values().collect(),
            None => self.mirrored.get(service).into_iter().flatten().collect(),
        }
    }

    /// Objects that are left out, with the reason; and the left out parts of good ones.
    pub fn rejected(&self) -> impl Iterator<Item = (ObjectKey, &str)> {
        let whole = self
            .rejected
            .iter()
            .map(|(key, reason)| (key.clone(), reason.as_str()));
        let own = self.slices.values().flat_map(BTreeMap::values);
        let own = own.map(|slice| (Kind::EndpointSlice, slice));
        let unused = |service: &ServiceKey| !self.slices.contains_key(service);
        let made = self
            .mirrored
            .iter()
            .filter(move |(service, _)| unused(service));
        let made = made.flat_map(|(_, slices)| slices.iter().map(|slice| (Kind::Endpoints, slice)));
        let parts = own.chain(made).flat_map(|(kind, slice)| {
            slice.refused.iter().map(move |reason| {
                let key = ObjectKey {
                    kind,
                    namespace: Arc::clone(&slice.service.namespace),
                    name: Arc::clone(&slice.name),
                };
                (key, reason.as_str())
            })
        });
        whole.chain(parts)
    }

    /// The names of all objects of one kind, rejected ones included: what a full list is compared
    /// with to find out what has gone.
    #[must_use]
    pub fn keys(&self, kind: Kind) -> BTreeSet<ObjectKey> {
        let named = |key: &ServiceKey| ObjectKey {
            kind,
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
        };
        let mut keys: BTreeSet<ObjectKey> = match kind {
            Kind::Service => self.services.keys().map(named).collect(),
            Kind::EndpointSlice => self.slice_owners.keys().cloned().collect(),
            Kind::Endpoints => self.mirrored.keys().map(named).collect(),
            Kind::Node => self
                .nodes
                .keys()
                .map(|name| ObjectKey {
                    kind,
                    namespace: "".into(),
                    name: Arc::clone(name),
                })
                .collect(),
        };
        keys.extend(self.rejected.keys().filter(|key| key.kind == kind).cloned());
        keys
    }

    fn apply_service(
        &mut self,
        key: &ObjectKey,
        object: &core::Service,
    ) -> Result<Touched, String> {
        let service = match service::from_api(object).map_err(|error| error.to_string())? {
            service::Selection::Ours(service) => *service,
            service::Selection::NotOurs => return Ok(self.delete(key)),
        };
        let key = service.key.clone();
        if self.services.get(&key) == Some(&service) {
            return Ok(Touched::Nothing);
        }
        self.services.insert(key.clone(), service);
        Ok(Touched::Services(vec![key]))
    }

    fn apply_slice(
        &mut self,
        key: &ObjectKey,
        object: &discovery::EndpointSlice,
    ) -> Result<Touched, String> {
        let slice = match endpoint::from_slice(object).map_err(|error| error.to_string())? {
            endpoint::Selection::Ours(slice) => slice,
            endpoint::Selection::NotOurs => return Ok(self.delete(key)),
        };
        let owner = slice.service.clone();
        let known = self
            .slices
            .get(&owner)
            .and_then(|slices| slices.get(&slice.name));
        if known == Some(&slice) {
            return Ok(Touched::Nothing);
        }
        let mut touched = vec![owner.clone()];
        if let Some(before) = self.detach_slice(key)
            && before != owner
        {
            touched.push(before);
        }
        self.slice_owners.insert(key.clone(), owner.clone());
        self.slices
            .entry(owner)
            .or_default()
            .insert(Arc::clone(&slice.name), slice);
        Ok(Touched::Services(touched))
    }

    fn apply_endpoints(
        &mut self,
        key: &ObjectKey,
        object: &core::Endpoints,
    ) -> Result<Touched, String> {
        let slices = match endpoint::mirrored(object).map_err(|error| error.to_string())? {
            endpoint::Selection::Ours(slices) => slices,
            endpoint::Selection::NotOurs => return Ok(self.delete(key)),
        };
        let service = ServiceKey {
            namespace: Arc::clone(&key.namespace),
            name: Arc::clone(&key.name),
        };
        if self.mirrored.get(&service) == Some(&slices) {
            return Ok(Touched::Nothing);
        }
        self.mirrored.insert(service.clone(), slices);
        Ok(Touched::Services(vec![service]))
    }

    fn apply_node(&mut self, key: &ObjectKey, object: &core::Node) -> Result<Touched, String> {
        let node = Node::from_api(object).map_err(|error| error.to_string())?;
        if self.nodes.get(&key.name) == Some(&node) {
            return Ok(Touched::Nothing);
        }
        self.nodes.insert(Arc::clone(&key.name), node);
        Ok(Touched::Node(Arc::clone(&key.name)))
    }

    fn detach_slice(&mut self, key: &ObjectKey) -> Option<ServiceKey> {
        let owner = self.slice_owners.remove(key)?;
        if let Some(slices) = self.slices.get_mut(&owner) {
            slices.remove(&key.name);
            if slices.is_empty() {
                self.slices.remove(&owner);
            }
        }
        Some(owner)
    }
}
