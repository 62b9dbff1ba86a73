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

#[cfg(test)]
mod tests {
    use super::*;

    const SYN: TcpFlags = TcpFlags::SYN;
    const ACK: TcpFlags = TcpFlags::ACK;
    const SYN_ACK: TcpFlags = TcpFlags(0x12);
    const FIN_ACK: TcpFlags = TcpFlags(0x11);
    const RST: TcpFlags = TcpFlags::RST;

    use Direction::{Original, Reply};

    /// States after the first segment and after each that follows.
    fn states(segments: &[(Direction, TcpFlags)]) -> Vec<State> {
        let (_, opening) = segments[0];
        let mut seen = FlowFlags::default();
        let mut state = first(Protocol::TCP, opening);
        let mut states = vec![state];
        for (direction, flags) in &segments[1..] {
            (state, seen) = next(state, seen, *direction, *flags);
            states.push(state);
        }
        states
    }

    #[test]
    fn a_connection_opens_and_closes() {
        let segments = [
            (Original, SYN),
            (Reply, SYN_ACK),
            (Original, ACK),
            (Reply, ACK),
            (Original, FIN_ACK),
            (Reply, ACK),
            (Reply, ACK),
            (Reply, FIN_ACK),
            (Original, ACK),
        ];
        let expected = [
            State::SYN_SENT,
            State::SYN_RECEIVED,
            State::ESTABLISHED,
            State::ESTABLISHED,
            State::FIN_WAIT,
            State::CLOSE_WAIT,
            State::CLOSE_WAIT,
            State::LAST_ACK,
            State::TIME_WAIT,
        ];
        assert_eq!(states(&segments), expected);
    }

    #[test]
    fn the_backend_may_close_first_and_both_at_once() {
        let opened = [(Original, SYN), (Reply, SYN_ACK), (Original, ACK)];
        let backend_first = [(Reply, FIN_ACK), (Original, FIN_ACK), (Reply, ACK)];
        let at_once = [(Reply, FIN_ACK), (Original, FIN_ACK), (Original, ACK)];
        for closing in [backend_first, at_once] {
            let segments: Vec<_> = opened.iter().chain(&closing).copied().collect();
            assert_eq!(
                states(&segments)[3..],
                [State::FIN_WAIT, State::LAST_ACK, State::TIME_WAIT]
            );
        }
    }

    #[test]
    fn retransmissions_change_nothing() {
        let segments = [
            (Original, SYN),
            (Original, SYN),
            (Reply, SYN_ACK),
            (Reply, SYN_ACK),
            (Original, SYN),
            (Original, FIN_ACK),
            (Original, FIN_ACK),
            (Original, ACK),
        ];
        let expected = [
            State::SYN_SENT,
            State::SYN_SENT,
            State::SYN_RECEIVED,
            State::SYN_RECEIVED,
            State::SYN_RECEIVED,
            State::FIN_WAIT,
            State::FIN_WAIT,
            State::FIN_WAIT,
        ];
        assert_eq!(states(&segments), expected);
    }

    #[test]
    fn a_client_alone_does_not_establish_a_connection() {
        let segments = [(Original, SYN), (Original, ACK), (Original, FIN_ACK)];
        assert_eq!(states(&segments), [State::SYN_SENT; 3]);
    }

    #[test]
    fn a_reset_closes_from_any_state() {
        for before in [
            vec![(Original, SYN)],
            vec![(Original, SYN), (Reply, SYN_ACK)],
            vec![(Original, ACK)],
            vec![(Original, ACK), (Reply, FIN_ACK)],
        ] {
            let mut segments = before;
            segments.push((Reply, RST));
            segments.push((Original, ACK));
            let states = states(&segments);
            assert_eq!(states[states.len() - 2..], [State::CLOSED, State::CLOSED]);
        }
    }

    #[test]
    fn a_flow_picked_up_in_the_middle_counts_as_established() {
        assert_eq!(first(Protocol::TCP, ACK), State::ESTABLISHED);
        assert_eq!(first(Protocol::TCP, RST), State::CLOSED);
        assert_eq!(first(Protocol::UDP, TcpFlags::NONE), State::UNREPLIED);
    }
}
