//! TCP's states as a bystander sees them, for the sake of timeouts only.
//!
//! Sequence numbers are not followed: a reset is believed whoever sent it, and shortens the timeout
//! of a flow without ending it. The words and the timeouts are conntrack's, so an operator finds in
//! our tables what he knows from the kernel's.
//!
//! ```text
//! SYN_SENT --SYN from the backend--> SYN_RECV --ACK from the client--> ESTABLISHED
//! ESTABLISHED --FIN--> FIN_WAIT --ACK of the other side--> CLOSE_WAIT
//! FIN_WAIT, CLOSE_WAIT --FIN of the other side--> LAST_ACK --ACK--> TIME_WAIT
//! any --RST--> CLOSE
//! ```

use super::{FlowFlags, State};
use crate::net::{Direction, Protocol};
use crate::packet::TcpFlags;

/// The state of a flow whose first packet has these flags. A flow that is picked up in the middle
/// counts as established.
#[must_use]
pub fn first(protocol: Protocol, flags: TcpFlags) -> State {
    if protocol != Protocol::TCP {
        State::UNREPLIED
    } else if flags.contains(TcpFlags::RST) {
        State::CLOSED
    } else if flags.opens() {
        State::SYN_SENT
    } else {
        State::ESTABLISHED
    }
}

/// State and flags after one more segment.
#[must_use]
#[inline]
pub fn next(
    state: State,
    seen: FlowFlags,
    direction: Direction,
    flags: TcpFlags,
) -> (State, FlowFlags) {
    if flags.contains(TcpFlags::RST) {
        return (State::CLOSED, seen);
    }
    let seen = if flags.contains(TcpFlags::FIN) {
        FlowFlags(seen.0 | fin_of(direction).0)
    } else {
        seen
    };
    let both = FlowFlags(FlowFlags::FIN_ORIGINAL.0 | FlowFlags::FIN_REPLY.0);
    let fin = flags.contains(TcpFlags::FIN);
    let ack = flags.contains(TcpFlags::ACK);
    let next = match (state, direction) {
        (State::SYN_SENT, Direction::Reply) if flags.contains(TcpFlags::SYN) => State::SYN_RECEIVED,
        (State::SYN_SENT, _) => State::SYN_SENT,
        (State::SYN_RECEIVED, Direction::Original) if ack && fin => State::FIN_WAIT,
        (State::SYN_RECEIVED, Direction::Original) if ack => State::ESTABLISHED,
        (State::SYN_RECEIVED | State::ESTABLISHED, _) if fin => State::FIN_WAIT,
        (State::FIN_WAIT | State::CLOSE_WAIT, _) if seen.contains(both) => State::LAST_ACK,
        (State::FIN_WAIT, _) if ack && !seen.contains(fin_of(direction)) => State::CLOSE_WAIT,
        (State::LAST_ACK, _) if ack && !fin => State::TIME_WAIT,
        _ => state,
    };
    (next, seen)
}

const fn fin_of(direction: Direction) -> FlowFlags {
    match direction {
        Direction::Original => FlowFlags::FIN_ORIGINAL,
        Direction::Reply => FlowFlags::FIN_REPLY,
    }
}
