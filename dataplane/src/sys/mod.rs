//! System calls and memory that is shared with the kernel. All `unsafe` of the crate is here.
//!
//! Nothing here knows packets, flows or the other modules: numbers, bytes and descriptors go in and
//! out, and what is offered is safe to call in any order.

pub(crate) mod affinity;
pub(crate) mod bpf;
pub(crate) mod chunks;
pub(crate) mod ethtool;
pub(crate) mod mmap;
pub(crate) mod netlink;
pub(crate) mod tun;
pub(crate) mod uring;
pub(crate) mod xsk;

#[cfg(test)]
pub(crate) mod testbed;
