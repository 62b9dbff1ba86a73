//! Is this tuple ours: to a frontend, a reply, or an orphan of a frontend that has gone.
//!
//! The steering has matched it already; what it wrote down of the direction is believed. An uplink's
//! frame carries no such word, so there the tables answer: a frontend first, then an address of this
//! node, which only a reply to a masqueraded flow has.

use crate::command::Origin;
use crate::net::{Direction, Tuple};
use crate::pipeline::Door;
use crate::snapshot::{Frontend, Snapshot};

/// What a packet is to us, before any flow is looked up.
#[derive(Clone, Copy, Debug)]
pub enum Class<'a> {
    /// Its destination is a frontend.
    Frontend(&'a Frontend),
    /// It answers a flow.
    Reply,
    /// It goes towards a frontend that we serve no more.
    Orphan,
}

impl Class<'_> {
    /// Which side of the packet is the client's.
    #[must_use]
    pub const fn direction(&self) -> Direction {
        match self {
            Self::Frontend(_) | Self::Orphan => Direction::Original,
            Self::Reply => Direction::Reply,
        }
    }
}

/// What the packet is to us.
#[must_use]
pub fn classify<'a>(door: &Door, tuple: &Tuple, snapshot: &'a Snapshot) -> Class<'a> {
    let known = match door {
        Door::Host(Origin::Steered { direction, .. }) => Some(*direction),
        Door::Host(Origin::Host) => Some(Direction::Original),
        Door::Uplink { .. } => None,
    };
    if known == Some(Direction::Reply) {
        return Class::Reply;
    }
    match snapshot.frontend(&tuple.destination, tuple.protocol) {
        Some(frontend) => Class::Frontend(frontend),
        None if known.is_none() && snapshot.node.addresses.contains(&tuple.destination.address) => {
            Class::Reply
        }
        None => Class::Orphan,
    }
}
