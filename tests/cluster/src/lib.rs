//! Real Kubernetes parts beside sluice: what `make test-cluster` runs.
//!
//! [`programs`] builds etcd, the API server and kube-proxy from their modules and keeps them. [`control_plane`] starts etcd
//! and the API server in a network namespace, with TLS ([`authority`]) and RBAC; [`api`] speaks to it. [`generate`]
//! makes clusters, [`kube_proxy`] lets kube-proxy program them, [`iptables`] reads and walks its rules, [`judge`] compares
//! them with `sluice resolve`. [`deploy`] applies `deploy/manifests.yaml` and holds its permissions to what is asked for;
//! [`traffic`] runs sluice in the lab with just these. [`configuration`] asks kube-proxy for its keys.
//!
//! Rule to keep: nothing of sluice is linked here. It is judged by its command line and its JSON, its judge by the
//! kernel's own listing.

#![forbid(unsafe_code)]
#![expect(
    clippy::print_stdout,
    reason = "what was checked is what this program prints"
)]

pub mod api;
pub mod authority;
pub mod configuration;
pub mod control_plane;
pub mod deploy;
pub mod generate;
pub mod iptables;
pub mod judge;
pub mod kube_proxy;
pub mod programs;
pub mod report;
pub mod traffic;
