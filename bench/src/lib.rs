//! What all benches share: deterministic packets and flows.

#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod packets;
pub mod workload;
