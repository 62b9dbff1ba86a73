//! The lab: two nodes, their pods and a client outside, each in a network namespace of its own, and the table of
//! paths that a service proxy must serve between them. `make demo` runs it, the end-to-end tests use it.
//!
//! A [`Lab`] is laid out by [`topology`] from the addresses in [`plan`]; [`server`]s answer in every pod, and
//! [`client`]s count what came back, by whom it was answered and which source address the pod saw. [`manifests`] writes
//! the cluster as files, [`sluice`] runs the binary on the nodes, [`kernel`] serves the same Services by nftables
//! instead: the lab's own rows are proven with it. [`rows`] is the list of paths, [`proof`] asks the kernel and the
//! engine who did the work. [`trial`] is what the end-to-end tests start with, [`residue`] what they compare a node by.
//!
//! Rule to keep: the lab knows nothing of sluice but its command line, its JSON and its files.

#![forbid(unsafe_code)]

pub mod bench;
pub mod client;
pub mod demo;
pub mod exchange;
pub mod kernel;
pub mod manifests;
pub mod namespace;
pub mod plan;
pub mod proof;
pub mod reaper;
pub mod residue;
pub mod rows;
pub mod server;
pub mod sluice;
pub mod topology;
pub mod trial;

pub use namespace::Namespace;
pub use plan::{Family, Protocol, Site};
pub use topology::{Lab, Options};
