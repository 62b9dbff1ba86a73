//! Address translation: what a flow's packets become, and which ports masquerading may use.
//!
//! This module says what to change; `rewrite` changes bytes; `ports` picks ports. Which backend a
//! flow has, and whether its source is translated, is decided by the pipeline and kept in the flow.

#![cfg_attr(
    not(test),
    deny(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::indexing_slicing
    )
)]

pub mod ports;
pub mod rewrite;

use crate::flow::Flow;
use crate::net::{Address, Direction, Tuple};
use rewrite::{Change, Checksum, InnerChange};

/// What a packet of `flow` that goes in `direction` becomes.
#[must_use]
#[inline]
pub fn change(
    flow: &Flow,
    direction: Direction,
    checksum: Checksum,
    decrement_hop_limit: bool,
) -> Change {
    let after = after(flow, direction);
    Change {
        source: after.source,
        destination: after.destination,
        checksum,
        decrement_hop_limit,
    }
}

/// What an ICMP error becomes that travels in `direction` and quotes a packet of `flow`, which went
/// the other way. `sender` is the error's source: the far end of the flow is translated, a router on
/// the way keeps its address.
#[must_use]
pub fn inner_change(
    flow: &Flow,
    direction: Direction,
    sender: Address,
    decrement_hop_limit: bool,
) -> InnerChange {
    let before = match direction {
        Direction::Original => flow.original(),
        Direction::Reply => flow.reply(),
    };
    let after = after(flow, direction);
    let source = if sender == before.source.address {
        after.source.address
    } else {
        sender
    };
    InnerChange {
        source,
        destination: after.destination.address,
        inner_source: after.destination,
        inner_destination: after.source,
        decrement_hop_limit,
    }
}

/// The tuple that a packet carries once it is translated: what the other end answers, reversed.
fn after(flow: &Flow, direction: Direction) -> Tuple {
    match direction {
        Direction::Original => flow.reply().reversed(),
        Direction::Reply => flow.original().reversed(),
    }
}
