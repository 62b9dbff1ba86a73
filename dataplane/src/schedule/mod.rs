//! Choosing a backend for a new flow: one scheduler a file, all of one signature.
//!
//! A scheduler sees the candidates, in a fixed order, and what a choice may depend on; it knows no
//! flow table. Backends of weight 0 are never chosen. It returns an index into the Service's
//! backends, or nothing if no candidate may take a new flow.

mod random;
mod rr;

use crate::snapshot::{Backend, SchedulerKind, Service};

/// What a scheduler chooses from and by.
#[derive(Debug)]
pub struct Choice<'a> {
    backends: &'a [Backend],
    list: &'a [u32],
    /// This worker's position in the Service's round; the caller keeps it for the next choice.
    pub cursor: u32,
    /// A fresh random number.
    pub random: u64,
}

impl<'a> Choice<'a> {
    /// The candidates are the Service's choice number `choice`.
    #[must_use]
    pub fn new(service: &'a Service, choice: u32, cursor: u32, random: u64) -> Self {
        let list = service
            .choices
            .get(choice as usize)
            .map_or(&[][..], |list| list);
        Self {
            backends: &service.backends,
            list,
            cursor,
            random,
        }
    }

    fn len(&self) -> u32 {
        u32::try_from(self.list.len()).unwrap_or(u32::MAX)
    }

    /// Candidate number `at`, unless it takes no new flows.
    fn candidate(&self, at: u32) -> Option<&'a Backend> {
        let index = *self.list.get(at as usize)?;
        self.backends
            .get(index as usize)
            .filter(|backend| backend.weight > 0)
    }
}

/// A backend for a new flow.
#[must_use]
pub fn choose<'a>(kind: SchedulerKind, choice: &mut Choice<'a>) -> Option<&'a Backend> {
    match kind {
        SchedulerKind::RoundRobin => rr::choose(choice),
        SchedulerKind::Random => random::choose(choice),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;
    use std::sync::Arc;

    use super::*;
    use crate::snapshot::{BackendId, ServiceId};

    fn service(weights: &[u16]) -> Service {
        let backends = weights.iter().zip(1_u8..).map(|(&weight, n)| Backend {
            id: BackendId(u32::from(n)),
            endpoint: SocketAddr::from(([192, 0, 2, n], 80)).into(),
            weight,
            local: false,
            draining: false,
        });
        Service {
            id: ServiceId(1),
            name: Arc::from("default/web:http"),
            scheduler: SchedulerKind::RoundRobin,
            affinity: None,
            backends: backends.collect(),
            choices: vec![(0..).take(weights.len()).collect()],
        }
    }

    fn picks(kind: SchedulerKind, weights: &[u16], times: u64) -> Vec<u32> {
        let service = service(weights);
        let mut cursor = 0;
        let mut picks = Vec::new();
        for n in 0..times {
            let random = n.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 7;
            let mut choice = Choice::new(&service, 0, cursor, random);
            picks.extend(choose(kind, &mut choice).map(|backend| backend.id.0));
            cursor = choice.cursor;
        }
        picks
    }

    #[test]
    fn round_robin_takes_turns_and_skips_weight_zero() {
        assert_eq!(
            picks(SchedulerKind::RoundRobin, &[1, 0, 1], 4),
            [1, 3, 1, 3]
        );
    }

    #[test]
    fn random_is_even() {
        let picks = picks(SchedulerKind::Random, &[1, 1, 1, 1], 40_000);
        for id in 1..=4 {
            let share = picks.iter().filter(|&&pick| pick == id).count();
            assert!((9_000..11_000).contains(&share), "{share}");
        }
    }

    #[test]
    fn nothing_is_chosen_where_nothing_may_be() {
        for kind in [SchedulerKind::RoundRobin, SchedulerKind::Random] {
            assert!(picks(kind, &[], 3).is_empty());
            assert!(picks(kind, &[0, 0], 3).is_empty());
        }
    }
}
