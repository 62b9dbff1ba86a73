//! The flow table against a naive model: random operations, both families, time included.

use std::collections::BTreeMap;
use std::net::SocketAddr;

use dataplane::flow::{Flow, FlowId, FlowTable, InsertError, NewFlow, Slab, State, Timeouts};
use dataplane::net::{Direction, Endpoint, Protocol, Tuple};
use dataplane::packet::TcpFlags;
use dataplane::time::{Duration, Instant};
use proptest::prelude::*;

const START: Instant = Instant::from_secs(1000);

#[test]
fn a_flow_is_found_by_both_tuples() {
    for family in [4, 6] {
        let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
        let new = flow(family, 1, 2, Protocol::UDP);
        let id = table.insert(&new, START).expect("room");
        assert_eq!(table.find(&new.original), Some((id, Direction::Original)));
        assert_eq!(table.find(&new.reply), Some((id, Direction::Reply)));
        assert_eq!(table.find(&new.original.reversed()), None);
        let stored = table.flow(id).expect("a flow");
        assert_eq!(stored.original(), new.original);
        assert_eq!(stored.reply(), new.reply);
        assert_eq!((stored.service, stored.backend, stored.epoch), (7, 8, 9));
        assert_eq!(stored.age(START + Duration::from_secs(5)).as_secs(), 5);
        assert!(stored.is_masqueraded());
    }
}

#[test]
fn a_tuple_belongs_to_one_flow() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let new = flow(4, 1, 2, Protocol::UDP);
    table.insert(&new, START).expect("room");
    assert_eq!(table.insert(&new, START), Err(InsertError::TupleInUse));
    // Another client, but the reply would look the same.
    let other = NewFlow {
        original: flow(4, 3, 2, Protocol::UDP).original,
        ..new
    };
    assert_eq!(table.insert(&other, START), Err(InsertError::TupleInUse));
    let loop_back = NewFlow {
        reply: flow(4, 5, 2, Protocol::UDP).original,
        ..flow(4, 5, 2, Protocol::UDP)
    };
    assert_eq!(
        table.insert(&loop_back, START),
        Err(InsertError::TupleInUse)
    );
    assert_eq!(table.len(), 1);
    // The same numbers in another protocol are another flow.
    assert!(table.insert(&flow(4, 1, 2, Protocol::TCP), START).is_ok());
}

#[test]
fn a_full_table_says_so_and_takes_flows_again() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(2), 1);
    let first = table
        .insert(&flow(4, 1, 1, Protocol::UDP), START)
        .expect("room");
    table
        .insert(&flow(6, 2, 1, Protocol::UDP), START)
        .expect("room");
    let third = flow(4, 3, 1, Protocol::UDP);
    assert_eq!(table.insert(&third, START), Err(InsertError::Full));
    assert!(table.remove(first).is_some());
    assert_eq!(table.remove(first), None);
    assert_eq!(table.insert(&third, START), Ok(first));
}

#[test]
fn packets_and_bytes_are_counted_by_direction() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(1), 1);
    let id = table
        .insert(&flow(6, 1, 1, Protocol::UDP), START)
        .expect("room");
    table.record(id, Direction::Original, 100, START);
    table.record(id, Direction::Original, 50, START);
    assert_eq!(table.flow(id).expect("a flow").state, State::UNREPLIED);
    table.record(id, Direction::Reply, 65_535, START + Duration::from_secs(2));
    let stored = table.flow(id).expect("a flow");
    assert_eq!(stored.packets, [2, 1]);
    assert_eq!(stored.bytes, [150, 65_535]);
    assert_eq!(stored.state, State::REPLIED);
    assert_eq!(stored.idle(START + Duration::from_secs(5)).as_secs(), 3);
}

#[test]
fn a_flow_without_packets_is_forgotten_in_time() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let new = flow(4, 1, 1, Protocol::UDP);
    let id = table.insert(&new, START).expect("room");
    assert_eq!(expire(&mut table, START + Duration::from_secs(29)), []);
    assert_eq!(
        expire(&mut table, START + Duration::from_millis(30_100)),
        [id]
    );
    assert_eq!(table.find(&new.original), None);
    assert_eq!(table.find(&new.reply), None);
    assert!(table.is_empty());
}

#[test]
fn a_packet_keeps_a_flow() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let id = table
        .insert(&flow(6, 1, 1, Protocol::UDP), START)
        .expect("room");
    let mut now = START;
    for _ in 0..100 {
        now = now + Duration::from_secs(29);
        table.record(id, Direction::Original, 1, now);
        assert_eq!(expire(&mut table, now), []);
    }
    assert_eq!(
        expire(&mut table, now + Duration::from_millis(30_100)),
        [id]
    );
}

#[test]
fn an_idle_connection_lives_as_long_as_conntrack_says() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let id = connected(&mut table, START);
    let days = |n: u64| START + Duration::from_secs(n * 24 * 3600);
    let mut now = START;
    while now < days(5) {
        assert_eq!(expire(&mut table, now), [], "{:?}", now - START);
        now = now + Duration::from_secs(60);
    }
    assert_eq!(
        expire(&mut table, days(5) + Duration::from_millis(100)),
        [id]
    );
}

#[test]
fn a_closed_connection_does_not_wait_for_its_old_timeout() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let id = connected(&mut table, START);
    segment(&mut table, id, Direction::Reply, TcpFlags::RST, START);
    assert_eq!(table.flow(id).expect("a flow").state, State::CLOSED);
    assert_eq!(expire(&mut table, START + Duration::from_secs(9)), []);
    assert_eq!(
        expire(&mut table, START + Duration::from_millis(10_100)),
        [id]
    );
}

#[test]
fn a_syn_restarts_only_what_is_over() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let id = connected(&mut table, START);
    let restarted = |table: &FlowTable, direction, flags| {
        let flow = table.flow(id).expect("a flow");
        flow.is_restarted_by(direction, flags)
    };
    assert!(!restarted(&table, Direction::Original, TcpFlags::SYN));
    let fin = TcpFlags::FIN | TcpFlags::ACK;
    segment(&mut table, id, Direction::Original, fin, START);
    segment(&mut table, id, Direction::Reply, fin, START);
    segment(&mut table, id, Direction::Original, TcpFlags::ACK, START);
    assert_eq!(table.flow(id).expect("a flow").state, State::TIME_WAIT);
    assert!(restarted(&table, Direction::Original, TcpFlags::SYN));
    assert!(!restarted(&table, Direction::Original, TcpFlags::ACK));
    assert!(!restarted(&table, Direction::Reply, TcpFlags::SYN));
}

#[test]
fn expiry_does_no_more_than_its_budget() {
    let mut table = FlowTable::with_slab(Slab::with_capacity(1000), 1);
    for client in 0..1000 {
        table
            .insert(&flow(4, client, 100, Protocol::UDP), START)
            .expect("room");
    }
    let late = START + Duration::from_secs(3600);
    let mut calls = 0;
    while !table.is_empty() {
        let before = table.len();
        let expired = table.expire(late, 64, &mut |_, _| {});
        assert!(expired <= 64);
        assert_eq!(table.len(), before - expired);
        calls += 1;
        assert!(calls < 200, "it never ends");
    }
}

#[test]
fn a_slab_is_taken_over_with_its_flows() {
    let mut stored = vec![Flow::default(); 4].into_boxed_slice();
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let kept = flow(6, 1, 1, Protocol::UDP);
    let id = table.insert(&kept, START).expect("room");
    stored[3] = *table.flow(id).expect("a flow");
    // A second copy of the same tuples is refused.
    stored[1] = stored[3];

    let mut table = FlowTable::with_slab(stored.into(), 2);
    assert_eq!(table.len(), 1);
    assert_eq!(table.find(&kept.reply), Some((FlowId(3), Direction::Reply)));
    assert_eq!(expire(&mut table, START + Duration::from_secs(20)), []);
    assert_eq!(
        expire(&mut table, START + Duration::from_millis(30_100)),
        [FlowId(3)]
    );
}

#[test]
fn the_clock_may_wrap() {
    // Milliseconds modulo 2^32 wrap here.
    let wrap = Instant::from_millis(1 << 32);
    let start = Instant::from_millis((1 << 32) - 5000);
    let mut table = FlowTable::with_slab(Slab::with_capacity(4), 1);
    let id = table
        .insert(&flow(4, 1, 1, Protocol::UDP), start)
        .expect("room");
    assert_eq!(expire(&mut table, wrap + Duration::from_secs(24)), []);
    assert_eq!(
        expire(&mut table, wrap + Duration::from_millis(25_100)),
        [id]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_table_does_what_the_model_does(
        operations in proptest::collection::vec(any_operation(), 1..200),
        capacity in 1_u32..24,
        seed: u64,
    ) {
        let mut pair = Pair::new(capacity, seed);
        for operation in operations {
            pair.perform(operation);
            pair.compare();
        }
        pair.finish();
    }
}

#[derive(Clone, Debug)]
enum Operation {
    Insert {
        family: u8,
        client: u16,
        frontend: u16,
        tcp: bool,
    },
    Packet {
        nth: usize,
        reply: bool,
        flags: u8,
    },
    Remove {
        nth: usize,
    },
    Wait {
        milliseconds: u64,
    },
    Expire {
        budget: u32,
    },
}

fn any_operation() -> impl Strategy<Value = Operation> {
    let flags = [0x02, 0x12, 0x10, 0x11, 0x04, 0x14, 0x18];
    prop_oneof![
        4 => (prop::sample::select(vec![4_u8, 6]), 0_u16..12, 0_u16..3, any::<bool>()).prop_map(
            |(family, client, frontend, tcp)| Operation::Insert { family, client, frontend, tcp }
        ),
        6 => (any::<usize>(), any::<bool>(), prop::sample::select(flags.to_vec()))
            .prop_map(|(nth, reply, flags)| Operation::Packet { nth, reply, flags }),
        1 => any::<usize>().prop_map(|nth| Operation::Remove { nth }),
        3 => (0_u64..40_000).prop_map(|milliseconds| Operation::Wait { milliseconds }),
        1 => (0_u64..900_000).prop_map(|milliseconds| Operation::Wait { milliseconds }),
        3 => (0_u32..20).prop_map(|budget| Operation::Expire { budget }),
        2 => Just(Operation::Expire { budget: u32::MAX }),
    ]
}

/// The table and its oracle.
struct Pair {
    table: FlowTable,
    model: BTreeMap<FlowId, Known>,
    capacity: usize,
    now: Instant,
}

struct Known {
    new: NewFlow,
    seen: Instant,
    packets: [u64; 2],
}

impl Pair {
    fn new(capacity: u32, seed: u64) -> Self {
        Self {
            table: FlowTable::with_slab(Slab::with_capacity(capacity), seed),
            model: BTreeMap::new(),
            capacity: usize::try_from(capacity).expect("small"),
            now: START,
        }
    }

    fn perform(&mut self, operation: Operation) {
        match operation {
            Operation::Insert {
                family,
                client,
                frontend,
                tcp,
            } => {
                let protocol = if tcp { Protocol::TCP } else { Protocol::UDP };
                self.insert(&flow(family, client, frontend, protocol));
            }
            Operation::Packet { nth, reply, flags } => {
                let direction = if reply {
                    Direction::Reply
                } else {
                    Direction::Original
                };
                let Some(id) = self.nth(nth) else { return };
                segment(&mut self.table, id, direction, TcpFlags(flags), self.now);
                let known = self.model.get_mut(&id).expect("chosen from it");
                known.seen = self.now;
                known.packets[direction as usize] += 1;
            }
            Operation::Remove { nth } => {
                let Some(id) = self.nth(nth) else { return };
                let known = self.model.remove(&id).expect("chosen from it");
                let flow = self.table.remove(id).expect("the model has it");
                assert_eq!(flow.original(), known.new.original);
            }
            Operation::Wait { milliseconds } => {
                self.now = self.now + Duration::from_millis(milliseconds);
            }
            Operation::Expire { budget } => self.expire(budget),
        }
    }

    fn insert(&mut self, new: &NewFlow) {
        let taken = self.model.values().any(|known| {
            let tuples = [known.new.original, known.new.reply];
            tuples.contains(&new.original) || tuples.contains(&new.reply)
        });
        match self.table.insert(new, self.now) {
            Ok(id) => {
                assert!(!taken && self.model.len() < self.capacity);
                let known = Known {
                    new: *new,
                    seen: self.now,
                    packets: [0; 2],
                };
                assert!(
                    self.model.insert(id, known).is_none(),
                    "a slot is given twice"
                );
            }
            Err(InsertError::TupleInUse) => assert!(taken),
            Err(InsertError::Full) => assert!(!taken && self.model.len() == self.capacity),
        }
    }

    fn expire(&mut self, budget: u32) {
        let timeouts = Timeouts::default();
        let (model, now) = (&mut self.model, self.now);
        self.table.expire(now, budget, &mut |id, flow| {
            let known = model.remove(&id).expect("only known flows go");
            assert_eq!(flow.original(), known.new.original);
            assert_eq!(flow.packets, known.packets);
            let idle = now.since(known.seen);
            assert!(
                idle >= timeouts.of(flow.protocol, flow.state),
                "too early: {idle:?}"
            );
        });
        if budget < u32::MAX {
            return;
        }
        for (id, known) in &self.model {
            let flow = self.table.flow(*id).expect("the model has it");
            let timeout = timeouts.of(flow.protocol, flow.state);
            let idle = now.since(known.seen);
            assert!(
                idle < timeout + Duration::from_millis(100),
                "too late: {idle:?}"
            );
        }
    }

    fn compare(&self) {
        assert_eq!(self.table.len(), self.model.len());
        let listed: Vec<FlowId> = self.table.iter().map(|(id, _)| id).collect();
        let known: Vec<FlowId> = self.model.keys().copied().collect();
        assert_eq!(listed, known);
        for (id, known) in &self.model {
            let (original, reply) = (&known.new.original, &known.new.reply);
            assert_eq!(self.table.find(original), Some((*id, Direction::Original)));
            assert_eq!(self.table.find(reply), Some((*id, Direction::Reply)));
            assert_eq!(self.table.flow(*id).expect("known").packets, known.packets);
        }
    }

    /// In the end every flow is gone and every tuple free.
    fn finish(mut self) {
        self.now = self.now + Duration::from_secs(6 * 24 * 3600);
        self.expire(u32::MAX);
        self.compare();
        assert!(self.model.is_empty());
        for client in 0..u16::try_from(self.capacity).expect("small") {
            self.insert(&flow(6, client, 100, Protocol::UDP));
        }
        self.compare();
    }

    fn nth(&self, nth: usize) -> Option<FlowId> {
        let count = self.model.len();
        (count > 0).then(|| *self.model.keys().nth(nth % count).expect("below the count"))
    }
}

/// A masqueraded flow. Low clients and frontends may want each other's reply tuples; a frontend above
/// three has one for every client.
fn flow(family: u8, client: u16, frontend: u16, protocol: Protocol) -> NewFlow {
    let end = |v4: &str, v6: &str, port: u16| -> Endpoint {
        let text = if family == 4 { v4 } else { v6 };
        SocketAddr::new(text.parse().expect("a literal address"), port).into()
    };
    NewFlow {
        original: Tuple {
            protocol,
            source: end("192.0.2.1", "2001:db8:1::1", 40_000 + client),
            destination: end("198.51.100.10", "2001:db8:2::10", 80 + frontend),
        },
        reply: Tuple {
            protocol,
            source: end("203.0.113.20", "2001:db8:3::20", 8080),
            destination: end(
                "192.0.2.254",
                "2001:db8:1::254",
                reply_port(client, frontend),
            ),
        },
        service: 7,
        backend: 8,
        epoch: 9,
        tcp: TcpFlags::SYN,
    }
}

fn reply_port(client: u16, frontend: u16) -> u16 {
    if frontend < 3 && client < 12 {
        1024 + client % 8 + frontend
    } else {
        2000 + client
    }
}

fn connected(table: &mut FlowTable, now: Instant) -> FlowId {
    let id = table
        .insert(&flow(4, 1, 1, Protocol::TCP), now)
        .expect("room");
    let both = TcpFlags::SYN | TcpFlags::ACK;
    segment(table, id, Direction::Reply, both, now);
    segment(table, id, Direction::Original, TcpFlags::ACK, now);
    assert_eq!(table.flow(id).expect("a flow").state, State::ESTABLISHED);
    id
}

fn segment(table: &mut FlowTable, id: FlowId, direction: Direction, flags: TcpFlags, now: Instant) {
    table.record(id, direction, 40, now);
    table.advance(id, direction, flags, now);
}

fn expire(table: &mut FlowTable, now: Instant) -> Vec<FlowId> {
    let mut gone = Vec::new();
    table.expire(now, u32::MAX, &mut |id, _| gone.push(id));
    gone
}
