//! When a flow is forgotten: timeouts by state, and the timer wheel that looks at each flow once in
//! a while.
//!
//! The wheel is lazy. A packet does not move its flow on the wheel; when the wheel comes to a flow
//! that was seen since, it is queued again. Only a state with a shorter timeout moves it at once.
//! Links lie beside the slab in arrays that are made at the start, so a later process builds its own.
//! A deadline beyond the horizon is queued at the horizon and looked at more than once.
//!
//! The rule: every flow of the table is on the wheel exactly once.

use super::State;
use crate::net::Protocol;
use crate::time::{Duration, Instant};

/// How long a flow lives without a packet. The defaults are conntrack's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// TCP, SYN seen.
    pub tcp_syn: Duration,
    /// TCP, SYN seen from both sides.
    pub tcp_syn_received: Duration,
    /// TCP, open.
    pub tcp_established: Duration,
    /// TCP, one side has closed.
    pub tcp_fin: Duration,
    /// TCP, one side has closed and the other knows.
    pub tcp_close_wait: Duration,
    /// TCP, both sides have closed.
    pub tcp_last_ack: Duration,
    /// TCP, both sides know that both have closed.
    pub tcp_time_wait: Duration,
    /// TCP, reset.
    pub tcp_close: Duration,
    /// UDP, no reply so far.
    pub udp_unreplied: Duration,
    /// UDP, packets went both ways.
    pub udp_replied: Duration,
    /// Any other protocol.
    pub other: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            tcp_syn: Duration::from_secs(120),
            tcp_syn_received: Duration::from_secs(60),
            tcp_established: Duration::from_secs(432_000),
            tcp_fin: Duration::from_secs(120),
            tcp_close_wait: Duration::from_secs(60),
            tcp_last_ack: Duration::from_secs(30),
            tcp_time_wait: Duration::from_secs(120),
            tcp_close: Duration::from_secs(10),
            udp_unreplied: Duration::from_secs(30),
            udp_replied: Duration::from_secs(120),
            other: Duration::from_secs(600),
        }
    }
}

impl Timeouts {
    /// The timeout of a flow in this state.
    #[must_use]
    #[inline]
    pub fn of(&self, protocol: Protocol, state: State) -> Duration {
        match state {
            State::SYN_SENT => self.tcp_syn,
            State::SYN_RECEIVED => self.tcp_syn_received,
            State::ESTABLISHED => self.tcp_established,
            State::FIN_WAIT => self.tcp_fin,
            State::CLOSE_WAIT => self.tcp_close_wait,
            State::LAST_ACK => self.tcp_last_ack,
            State::TIME_WAIT => self.tcp_time_wait,
            State::CLOSED => self.tcp_close,
            State::UNREPLIED if protocol == Protocol::UDP => self.udp_unreplied,
            State::REPLIED if protocol == Protocol::UDP => self.udp_replied,
            _ => self.other,
        }
        .min(LONGEST)
    }
}

/// `Flow::last_seen` counts milliseconds modulo 2^32; half of that can be told apart.
const LONGEST: Duration = Duration::from_millis(1 << 31);

/// Milliseconds that one slot of the wheel stands for.
const TICK: u64 = 64;

/// Slots of the wheel; with `TICK` its horizon is about four minutes. A power of two.
const SLOTS: u32 = 4096;

const SLOT_MASK: u64 = 4095;

/// Doubly linked rings of slot numbers. Element `capacity + slot` is the head of a wheel slot.
#[derive(Debug)]
pub(super) struct Wheel {
    next: Box<[u32]>,
    previous: Box<[u32]>,
    capacity: u32,
    /// The tick whose slot is being emptied.
    tick: u64,
}

impl Wheel {
    pub(super) fn new(capacity: u32) -> Self {
        let elements: Box<[u32]> = (0..capacity + SLOTS).collect();
        Self {
            next: elements.clone(),
            previous: elements,
            capacity,
            tick: 0,
        }
    }

    /// Queues a flow that is not on the wheel.
    #[inline]
    pub(super) fn schedule(&mut self, index: u32, deadline: Instant) {
        let wanted = deadline.as_millis().div_ceil(TICK);
        let tick = wanted.clamp(self.tick + 1, self.tick + u64::from(SLOTS) - 1);
        self.link(index, self.head(tick));
    }

    /// Takes a flow off the wheel.
    #[inline]
    pub(super) fn cancel(&mut self, index: u32) {
        let (Some(next), Some(previous)) = (get(&self.next, index), get(&self.previous, index))
        else {
            return;
        };
        set(&mut self.next, previous, next);
        set(&mut self.previous, next, previous);
        set(&mut self.next, index, index);
        set(&mut self.previous, index, index);
    }

    /// Takes the next flow off the wheel whose time has come, or `None` when all of them were taken
    /// or `budget` is spent. Each step, a flow or an empty slot, costs one of the budget.
    pub(super) fn pop(&mut self, now: Instant, budget: &mut u32) -> Option<u32> {
        let present = now.as_millis() / TICK;
        // After a longer pause one round sees every slot.
        self.tick = self.tick.max(present.saturating_sub(u64::from(SLOTS)));
        while *budget > 0 {
            let head = self.head(self.tick);
            let first = get(&self.next, head).filter(|first| *first != head);
            if first.is_none() && self.tick >= present {
                return None;
            }
            *budget -= 1;
            if let Some(index) = first {
                self.cancel(index);
                return Some(index);
            }
            self.tick += 1;
        }
        None
    }

    fn link(&mut self, index: u32, head: u32) {
        let Some(last) = get(&self.previous, head) else {
            return;
        };
        set(&mut self.next, last, index);
        set(&mut self.previous, index, last);
        set(&mut self.next, index, head);
        set(&mut self.previous, head, index);
    }

    fn head(&self, tick: u64) -> u32 {
        let slot = (tick & SLOT_MASK) as u32;
        self.capacity + slot
    }
}

#[inline]
fn get(links: &[u32], index: u32) -> Option<u32> {
    links.get(index as usize).copied()
}

#[inline]
fn set(links: &mut [u32], index: u32, value: u32) {
    if let Some(link) = links.get_mut(index as usize) {
        *link = value;
    }
}
