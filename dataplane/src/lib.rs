//! The packet engine.
//!
//! A packet is handled on one core, start to end, by one loop (`worker`):
//!
//! ```text
//! port.receive -> packet::parse -> classify -> flow lookup -> (miss: schedule, bind NAT)
//!              -> rewrite -> Verdict -> port.transmit | punt | reject | drop | hand over
//! ```
//!
//! This crate knows no Kubernetes, no async runtime and no files but the flow slab. Which module may
//! use which is written down in `tests/layering.rs`.

#![warn(missing_docs)]

pub mod classify;
pub mod command;
pub mod counters;
pub mod device;
pub mod engine;
pub mod flow;
pub mod handover;
pub mod nat;
pub mod net;
pub mod packet;
pub mod pipeline;
pub mod schedule;
pub mod snapshot;
pub mod steer;
pub mod steering;
mod sys;
pub mod time;
pub mod waker;
pub mod worker;
