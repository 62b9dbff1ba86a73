//! The programs, run by the kernel on frames that it is handed (`BPF_PROG_TEST_RUN`): no device and
//! no traffic, but the privilege to load programs.
//!
//! Every row is run in both families. `C` is the client, `V` a frontend's address, `N` an address
//! of this node, `B` a backend, `S` some other station.

use std::os::fd::AsFd;

use aya::programs::{ProgramError, TestRun, TestRunOptions};

use super::*;
use crate::command::{Action, Command, Hook, Origin};
use crate::net::{Direction, Endpoint, Port, Protocol, Tuple};
use crate::steer;
use crate::time::{Clock, MonotonicClock};

const MARK: u32 = 0x40_0000;
const PASS: u32 = u32::MAX;
const SHOT: u32 = 2;
const REDIRECT: u32 = 7;
const XDP_DROP: u32 = 1;
const XDP_PASS: u32 = 2;
const XDP_REDIRECT: u32 = 4;
const LOOPBACK: u32 = 1;
const FAR: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
const NEAR: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const SYN: u8 = 2;
const ACK: u8 = 16;

/// What a program did with a frame.
struct Outcome {
    verdict: u32,
    frame: Vec<u8>,
    mark: u32,
}

/// The engine's state as the programs see it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Engine {
    Alive,
    /// Past the grace, within the hold.
    Dead,
    /// Past the hold.
    LongDead,
}

/// Loaded programs with one frontend, one NodePort and a node address in each family.
struct Bench {
    steering: Steering,
}

impl Bench {
    fn new(mirrored: bool) -> Option<Self> {
        let config = SteeringConfig {
            mirrored,
            ..config()
        };
        let mut steering = load_or_skip(&config)?;
        let mut keys = Vec::new();
        let mut node = Vec::new();
        for v6 in [false, true] {
            for protocol in [Protocol::TCP, Protocol::UDP, Protocol::SCTP] {
                keys.push(FrontendKey::new(address(v6, 'V'), Port(80), protocol));
            }
            keys.push(FrontendKey::address_only(address(v6, 'V')));
            node.push(address(v6, 'N'));
        }
        keys.push(FrontendKey::new(Address::ANY, Port(30080), Protocol::TCP));
        steering.set_frontends(&keys).expect("room for frontends");
        steering.set_node_addresses(&node).expect("room");
        Some(Self { steering })
    }

    fn engine(&self, state: Engine) {
        let age = match state {
            Engine::Alive => Duration::ZERO,
            Engine::Dead => config().grace * 2,
            Engine::LongDead => config().hold * 2,
        };
        let beat = MonotonicClock.now().as_nanos() - nanos(age);
        self.steering.heartbeat.words()[0].store(beat, std::sync::atomic::Ordering::Release);
    }

    /// Makes a flow's packet known; returns its owner and fingerprint.
    fn know(&self, tuple: &Tuple, direction: Direction) -> (TupleMap, u64) {
        let config = &self.steering.config;
        let client = steer::client_side(tuple, direction);
        let mut tuples = self.steering.tuples(steer::owner(&client, config.workers));
        let fingerprint = steer::fingerprint(tuple, direction, &config.key);
        tuples.store(fingerprint).expect("room");
        (tuples, fingerprint)
    }

    fn run(&self, program: &str, frame: &[u8], mark: u32) -> Outcome {
        let mut out = vec![0; 2048];
        let mut skb = [0; SKB_SIZE];
        skb[SKB_MARK].copy_from_slice(&mark.to_ne_bytes());
        let mut skb_out = [0; SKB_SIZE];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ctx_in: Some(&skb),
            ctx_out: Some(&mut skb_out),
            ..TestRunOptions::default()
        };
        let result = test_run(&self.steering, program, options).expect("the frame is accepted");
        out.truncate(result.data_size_out as usize);
        let mark = u32::from_ne_bytes(skb_out[SKB_MARK].try_into().expect("four bytes"));
        Outcome {
            verdict: result.return_value,
            frame: out,
            mark,
        }
    }

    fn run_xdp(&self, frame: &[u8]) -> u32 {
        let mut out = vec![0; 2048];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::default()
        };
        let result = test_run(&self.steering, XDP_STEER, options).expect("the frame is accepted");
        result.return_value
    }

    fn counter(&self, wanted: &str) -> u64 {
        let counters = self.steering.counters().expect("counters can be read");
        let found = counters.iter().find(|(name, _)| *name == wanted);
        found.expect("a counter of this name").1
    }
}

fn config() -> SteeringConfig {
    SteeringConfig {
        workers: 3,
        buckets_per_worker: 64,
        grace: Duration::from_secs(30),
        hold: Duration::from_secs(120),
        mark: MARK,
        host_port_ifindex: LOOPBACK,
        mirrored: true,
        key: FingerprintKey {
            key0: 0x0123_4567_89ab_cdef,
            key1: 0xfedc_ba98_7654_3210,
        },
    }
}

/// Loads, or says that the test is skipped; with `REQUIRE_PRIVILEGED=1` a skip is a failure.
pub(super) fn load_or_skip(config: &SteeringConfig) -> Option<Steering> {
    match Steering::load(config) {
        Ok(steering) => Some(steering),
        Err(SteeringError::NotPermitted) => {
            assert!(
                std::env::var_os("REQUIRE_PRIVILEGED").is_none_or(|v| v != "1"),
                "this test needs the privilege to load programs"
            );
            eprintln!("SKIPPED: no privilege to load programs");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn test_run(
    steering: &Steering,
    name: &str,
    options: TestRunOptions<'_>,
) -> Result<aya::programs::TestRunResult, ProgramError> {
    let program = steering.programs.program(name).expect("a program of ours");
    match name {
        XDP_STEER => TryInto::<&Xdp>::try_into(program)?.test_run(options),
        HOST_QUEUE => TryInto::<&SocketFilter>::try_into(program)?.test_run(options),
        _ => TryInto::<&SchedClassifier>::try_into(program)?.test_run(options),
    }
}

fn address(v6: bool, who: char) -> Address {
    let last = match who {
        'C' => 1,
        'V' => 2,
        'N' => 3,
        'B' => 4,
        'S' => 5,
        other => panic!("nobody is called {other}"),
    };
    if v6 {
        let [a, b, c, d] = [0x2001, 0x0db8, 0, last];
        Address::from(std::net::Ipv6Addr::new(a, b, c, 0, 0, 0, 0, d))
    } else {
        Address::from_v4([192, 0, 2, u8::try_from(last).expect("small")])
    }
}

/// `TCP C:40000 -> V:80`, in one family.
fn tuple(v6: bool, text: &str) -> Tuple {
    let end = |text: &str| {
        let (who, port) = text.split_once(':').expect("station:port");
        let who = who.chars().next().expect("a station");
        let port = port.parse().expect("a port");
        Endpoint::new(address(v6, who), Port(port))
    };
    let [protocol, source, _, destination] = text
        .split(' ')
        .collect::<Vec<_>>()
        .try_into()
        .expect("four words");
    Tuple {
        protocol: match protocol {
            "TCP" => Protocol::TCP,
            "UDP" => Protocol::UDP,
            "SCTP" => Protocol::SCTP,
            other => panic!("no protocol {other}"),
        },
        source: end(source),
        destination: end(destination),
    }
}

fn ports(tuple: &Tuple, flags: u8) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend_from_slice(&tuple.source.port.0.to_be_bytes());
    bytes.extend_from_slice(&tuple.destination.port.0.to_be_bytes());
    bytes.resize(24, 0);
    if tuple.protocol == Protocol::TCP {
        bytes[12] = 5 << 4;
        bytes[13] = flags;
    }
    bytes
}

/// A frame from FAR to NEAR; `before` are extension headers or options, the first of kind `first`.
fn frame_with(tuple: &Tuple, flags: u8, first: Option<u8>, before: &[u8]) -> Vec<u8> {
    let body = [before, &ports(tuple, flags)].concat();
    ip_frame(
        tuple,
        first.unwrap_or(tuple.protocol.0),
        before.len(),
        &body,
    )
}

fn frame(tuple: &Tuple, flags: u8) -> Vec<u8> {
    frame_with(tuple, flags, None, &[])
}

fn ip_frame(tuple: &Tuple, next: u8, options: usize, body: &[u8]) -> Vec<u8> {
    let mut bytes = [NEAR.0, FAR.0].concat();
    let length = u16::try_from(body.len()).expect("short");
    if tuple.source.address.is_v4() {
        let words = u8::try_from(options / 4).expect("short");
        bytes.extend_from_slice(&[8, 0, 0x45 + words, 0]);
        bytes.extend_from_slice(&(20 + length).to_be_bytes());
        bytes.extend_from_slice(&[0, 1, 0, 0, 64, tuple.protocol.0, 0, 0]);
        bytes.extend_from_slice(&tuple.source.address.v4_bytes());
        bytes.extend_from_slice(&tuple.destination.address.v4_bytes());
    } else {
        bytes.extend_from_slice(&[0x86, 0xdd, 0x60, 0, 0, 0]);
        bytes.extend_from_slice(&length.to_be_bytes());
        bytes.extend_from_slice(&[next, 64]);
        bytes.extend_from_slice(tuple.source.address.bytes());
        bytes.extend_from_slice(tuple.destination.address.bytes());
    }
    bytes.extend_from_slice(body);
    bytes
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Expected {
    Passed,
    Dropped,
    Steered(Direction),
}

/// One packet at one hook.
struct Row {
    description: &'static str,
    hook: Hook,
    packet: &'static str,
    flags: u8,
    known: &'static [(&'static str, Direction)],
    engine: Engine,
    mirrored: bool,
    expected: Expected,
    counter: &'static str,
}

const ROW: Row = Row {
    description: "",
    hook: Hook::Ingress,
    packet: "",
    flags: ACK,
    known: &[],
    engine: Engine::Alive,
    mirrored: true,
    expected: Expected::Passed,
    counter: "",
};

const ORIGINAL: (&str, Direction) = ("TCP C:40000 -> V:80", Direction::Original);
const REPLY: (&str, Direction) = ("TCP B:8080 -> C:40000", Direction::Reply);
const SNAT_REPLY: (&str, Direction) = ("TCP B:8080 -> N:2000", Direction::Reply);

#[rustfmt::skip]
const ROWS: &[Row] = &[
    Row { description: "a packet to a frontend", packet: "TCP C:40000 -> V:80", flags: SYN,
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "UDP to a frontend", packet: "UDP C:40000 -> V:80",
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "SCTP to a frontend", packet: "SCTP C:40000 -> V:80",
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "another port of a frontend's address", packet: "TCP C:40000 -> V:81", ..ROW },
    Row { description: "a NodePort at a node address", packet: "TCP C:40000 -> N:30080",
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "a NodePort of the wrong protocol", packet: "UDP C:40000 -> N:30080", ..ROW },
    Row { description: "a NodePort's number at a foreign address", packet: "TCP C:40000 -> S:30080", ..ROW },
    Row { description: "a flow whose frontend has gone", packet: "TCP C:40000 -> V:81",
          known: &[("TCP C:40000 -> V:81", Direction::Original)],
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "a reply to this node enters", packet: SNAT_REPLY.0, known: &[SNAT_REPLY],
          expected: Expected::Steered(Direction::Reply), counter: "steered_ingress", ..ROW },
    Row { description: "a reply to a client enters", packet: REPLY.0, known: &[REPLY], ..ROW },
    Row { description: "a reply to a client leaves", hook: Hook::Egress, packet: REPLY.0, known: &[REPLY],
          expected: Expected::Steered(Direction::Reply), counter: "steered_egress", ..ROW },
    Row { description: "a reply to this node leaves", hook: Hook::Egress, packet: SNAT_REPLY.0, known: &[SNAT_REPLY], ..ROW },
    Row { description: "a direct SYN on the port of a flow", packet: "TCP C:40000 -> B:8080", flags: SYN, known: &[REPLY],
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "a direct datagram on the port of a flow", packet: "UDP C:40000 -> B:53",
          known: &[("UDP B:53 -> C:40000", Direction::Reply)],
          expected: Expected::Steered(Direction::Original), counter: "steered_ingress", ..ROW },
    Row { description: "a direct segment on the port of a flow", packet: "TCP C:40000 -> B:8080", known: &[REPLY], ..ROW },
    Row { description: "a direct SYN on another port", packet: "TCP C:40001 -> B:8080", flags: SYN, known: &[REPLY], ..ROW },
    Row { description: "a direct SYN on the port of a flow, dead engine", packet: "TCP C:40000 -> B:8080", flags: SYN,
          known: &[REPLY], engine: Engine::Dead, ..ROW },
    Row { description: "a packet to a frontend leaves", hook: Hook::Egress, packet: "TCP C:40000 -> V:80", ..ROW },
    Row { description: "a known original leaves", hook: Hook::Egress, packet: ORIGINAL.0, known: &[ORIGINAL], ..ROW },
    Row { description: "an unknown packet leaves", hook: Hook::Egress, packet: "TCP B:8080 -> S:40000", known: &[REPLY], ..ROW },

    Row { description: "dead, mirror: an unknown packet to a frontend", packet: "TCP C:40000 -> V:80",
          engine: Engine::Dead, ..ROW },
    Row { description: "dead, mirror: a known TCP packet is held", packet: ORIGINAL.0, known: &[ORIGINAL],
          engine: Engine::Dead, expected: Expected::Dropped, counter: "held_tuple", ..ROW },
    Row { description: "dead, mirror: a known SYN passes and is forgotten", packet: ORIGINAL.0, flags: SYN, known: &[ORIGINAL],
          engine: Engine::Dead, counter: "cleared_tuple", ..ROW },
    Row { description: "dead, mirror: a SYN-ACK is held", hook: Hook::Egress, packet: REPLY.0, flags: SYN | ACK, known: &[REPLY],
          engine: Engine::Dead, expected: Expected::Dropped, counter: "held_tuple", ..ROW },
    Row { description: "dead, mirror: known UDP forward passes", packet: "UDP C:40000 -> V:80",
          known: &[("UDP C:40000 -> V:80", Direction::Original)], engine: Engine::Dead, ..ROW },
    Row { description: "dead, mirror: an untranslated UDP reply is dropped", hook: Hook::Egress, packet: "UDP B:53 -> C:40000",
          known: &[("UDP B:53 -> C:40000", Direction::Reply)], engine: Engine::Dead,
          expected: Expected::Dropped, counter: "held_tuple", ..ROW },
    Row { description: "dead, mirror: a reply to this node is held", packet: SNAT_REPLY.0, known: &[SNAT_REPLY],
          engine: Engine::Dead, expected: Expected::Dropped, counter: "held_tuple", ..ROW },
    Row { description: "long dead, mirror: a known packet passes", packet: ORIGINAL.0, known: &[ORIGINAL],
          engine: Engine::LongDead, ..ROW },
    Row { description: "long dead, mirror: a known reply passes", hook: Hook::Egress, packet: REPLY.0, known: &[REPLY],
          engine: Engine::LongDead, ..ROW },

    Row { description: "dead, no mirror: a packet to a frontend", packet: "TCP C:40000 -> V:80", flags: SYN,
          mirrored: false, engine: Engine::Dead, expected: Expected::Dropped, counter: "held_frontend", ..ROW },
    Row { description: "long dead, no mirror: a packet to a NodePort", packet: "TCP C:40000 -> N:30080",
          mirrored: false, engine: Engine::LongDead, expected: Expected::Dropped, counter: "held_frontend", ..ROW },
    Row { description: "dead, no mirror: a reply is held", hook: Hook::Egress, packet: REPLY.0, known: &[REPLY],
          mirrored: false, engine: Engine::Dead, expected: Expected::Dropped, counter: "held_tuple", ..ROW },
    Row { description: "dead, no mirror: other traffic", packet: "TCP C:40000 -> N:22",
          mirrored: false, engine: Engine::Dead, ..ROW },
];

impl Row {
    fn check(&self, bench: &Bench, v6: bool) {
        let known: Vec<_> = self
            .known
            .iter()
            .map(|(text, direction)| bench.know(&tuple(v6, text), *direction))
            .collect();
        bench.engine(self.engine);
        let before = bench.steering.counters().expect("counters can be read");
        let sent = frame(&tuple(v6, self.packet), self.flags);
        let program = match self.hook {
            Hook::Ingress => TC_INGRESS,
            Hook::Egress => TC_EGRESS,
        };
        let outcome = bench.run(program, &sent, 0);
        let name = format!("{} (v6: {v6})", self.description);
        match self.expected {
            Expected::Passed => {
                assert_eq!((outcome.verdict, &outcome.frame), (PASS, &sent), "{name}")
            }
            Expected::Dropped => assert_eq!(outcome.verdict, SHOT, "{name}"),
            Expected::Steered(direction) => {
                assert_eq!(outcome.verdict, REDIRECT, "{name}");
                let far = if self.hook == Hook::Egress { NEAR } else { FAR };
                let word = Origin::encode(LOOPBACK, self.hook, direction);
                assert_eq!(outcome.frame[..12], [far.0, word.0].concat(), "{name}");
                assert_eq!(outcome.frame[12..], sent[12..], "{name}");
            }
        }
        if self.hook == Hook::Ingress {
            self.check_xdp(bench, &sent, &name);
        }
        bench.check_counters(&before, self.counter, &name);
        for (mut tuples, fingerprint) in known {
            tuples.clear(fingerprint);
        }
    }

    /// The XDP program decides alike; without a socket it drops what it would steer. A SYN's tuple
    /// has been cleared by the first run.
    fn check_xdp(&self, bench: &Bench, sent: &[u8], name: &str) {
        let before = bench.counter("no_socket");
        let expected = match self.expected {
            Expected::Passed => XDP_PASS,
            Expected::Dropped | Expected::Steered(_) => XDP_DROP,
        };
        assert_eq!(bench.run_xdp(sent), expected, "XDP: {name}");
        let without_target = u64::from(matches!(self.expected, Expected::Steered(_)));
        assert_eq!(
            bench.counter("no_socket") - before,
            without_target,
            "XDP: {name}"
        );
    }
}

impl Bench {
    /// Since `before` nothing else was counted (`no_socket` is XDP's and checked there).
    fn check_counters(&self, before: &[(&str, u64)], expected: &str, name: &str) {
        let after = self.steering.counters().expect("counters can be read");
        for ((counter, value), (_, old)) in after.into_iter().zip(before) {
            if counter != "no_socket" {
                assert_eq!(value > *old, counter == expected, "{name}: {counter}");
            }
        }
    }
}

#[test]
fn every_row_of_the_steering_table_holds_in_both_families() {
    for mirrored in [true, false] {
        let Some(bench) = Bench::new(mirrored) else {
            return;
        };
        for row in ROWS.iter().filter(|row| row.mirrored == mirrored) {
            row.check(&bench, false);
            row.check(&bench, true);
        }
    }
}

#[test]
fn a_syn_of_a_known_tuple_clears_it_once_the_engine_is_stale() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    for v6 in [false, true] {
        let (tuples, fingerprint) = bench.know(&tuple(v6, ORIGINAL.0), Direction::Original);
        bench.engine(Engine::Alive);
        bench.run(TC_INGRESS, &frame(&tuple(v6, ORIGINAL.0), SYN), 0);
        assert!(tuples.contains(fingerprint));
        bench.engine(Engine::Dead);
        bench.run(TC_INGRESS, &frame(&tuple(v6, ORIGINAL.0), SYN), 0);
        assert!(!tuples.contains(fingerprint));
    }
}

#[test]
fn a_socket_in_the_table_gets_the_uplinks_packets() {
    let Some(mut bench) = Bench::new(true) else {
        return;
    };
    bench.engine(Engine::Alive);
    let sent = frame(&tuple(false, "TCP C:40000 -> V:80"), SYN);
    let entry = DeviceEntry {
        mac: NEAR,
        kind: DeviceKind::Uplink as u8,
        hooks: HOOK_EGRESS,
        first_socket: 128,
    };
    bench.steering.set_device(LOOPBACK, &entry).expect("room");
    assert_eq!(bench.run_xdp(&sent), XDP_DROP);
    let family = rustix::net::AddressFamily::from_raw(44);
    let socket = rustix::net::socket(family, rustix::net::SocketType::RAW, None);
    let socket = socket.expect("an AF_XDP socket");
    bench
        .steering
        .set_socket(128, socket.as_fd())
        .expect("a slot");
    assert_eq!(bench.run_xdp(&sent), XDP_REDIRECT);
    assert_eq!(bench.counter("steered_xdp"), 1);
    assert_eq!(bench.counter("no_socket"), 1);
}

#[test]
fn what_the_engine_gave_back_passes_without_its_mark() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    bench.engine(Engine::Alive);
    for program in [TC_INGRESS, TC_EGRESS] {
        let sent = frame(&tuple(false, "TCP C:40000 -> V:80"), SYN);
        let outcome = bench.run(program, &sent, MARK | 5);
        assert_eq!((outcome.verdict, outcome.mark), (PASS, 5));
        assert_eq!(outcome.frame, sent);
    }
}

#[test]
fn headers_in_between_are_skipped() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    bench.engine(Engine::Alive);
    let v4 = tuple(false, "TCP C:40000 -> V:80");
    let options = frame_with(&v4, ACK, None, &[1; 40]);
    assert_eq!(bench.run(TC_INGRESS, &options, 0).verdict, REDIRECT);
    assert_eq!(bench.run_xdp(&options), XDP_DROP);

    let v6 = tuple(true, "TCP C:40000 -> V:80");
    // Hop-by-hop of 8 bytes, destination options of 24, routing of 8, destination options of 8.
    let mut chain = vec![0; 48];
    (chain[0], chain[8], chain[9]) = (60, 43, 2);
    (chain[32], chain[40]) = (60, 6);
    let extended = frame_with(&v6, ACK, Some(0), &chain);
    assert_eq!(bench.run(TC_INGRESS, &extended, 0).verdict, REDIRECT);
    assert_eq!(bench.run_xdp(&extended), XDP_DROP);
    assert_eq!(bench.counter("passed_unparsable"), 0);

    (chain[40], chain[32]) = (60, 60);
    chain.extend_from_slice(&[6, 0, 0, 0, 0, 0, 0, 0]);
    let too_many = frame_with(&v6, ACK, Some(0), &chain);
    assert_eq!(bench.run(TC_INGRESS, &too_many, 0).verdict, PASS);
    assert_eq!(bench.run_xdp(&too_many), XDP_PASS);
    assert_eq!(bench.counter("passed_unparsable"), 2);
}

#[test]
fn fragments_to_a_frontend_pass_and_are_counted() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    bench.engine(Engine::Alive);
    let mut v4 = frame(&tuple(false, "UDP C:40000 -> V:80"), 0);
    for fragment in [[0x20, 0], [0, 100]] {
        v4[20..22].copy_from_slice(&fragment);
        assert_eq!(bench.run(TC_INGRESS, &v4, 0).verdict, PASS);
        assert_eq!(bench.run_xdp(&v4), XDP_PASS);
    }
    assert_eq!(bench.counter("passed_fragment"), 4);
    let header = [17, 0, 0, 1, 0, 0, 0, 1];
    let v6 = frame_with(&tuple(true, "UDP C:40000 -> V:80"), 0, Some(44), &header);
    assert_eq!(bench.run(TC_INGRESS, &v6, 0).verdict, PASS);
    assert_eq!(bench.run_xdp(&v6), XDP_PASS);
    assert_eq!(bench.counter("passed_fragment"), 6);
    let elsewhere = frame_with(&tuple(true, "UDP C:40000 -> S:80"), 0, Some(44), &header);
    assert_eq!(bench.run(TC_INGRESS, &elsewhere, 0).verdict, PASS);
    assert_eq!(bench.counter("passed_fragment"), 6);
}

#[test]
fn whatever_is_cut_or_garbled_passes() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    bench.engine(Engine::Alive);
    for v6 in [false, true] {
        let whole = frame(&tuple(v6, "TCP C:40000 -> V:80"), ACK);
        // The test run refuses a shorter frame for tc.
        let shortest = 14 + if v6 { 40 } else { 20 };
        for length in 14..whole.len() {
            let cut = &whole[..length];
            // 16 bytes of a TCP header are what the programs read.
            let complete = length >= whole.len() - 24 + 16;
            let expected = if complete { REDIRECT } else { PASS };
            if length >= shortest {
                assert_eq!(bench.run(TC_INGRESS, cut, 0).verdict, expected, "{length}");
            }
            let expected = if complete { XDP_DROP } else { XDP_PASS };
            assert_eq!(bench.run_xdp(cut), expected, "{length}");
        }
        let mut garbled = whole.clone();
        for (index, value) in [(14, 0x15), (14, 0x41), (14, 0x00), (13, 0x06), (12, 0x81)] {
            garbled.copy_from_slice(&whole);
            garbled[index] = value;
            assert_eq!(bench.run(TC_INGRESS, &garbled, 0).verdict, PASS);
            assert_eq!(bench.run_xdp(&garbled), XDP_PASS);
        }
    }
    assert!(bench.counter("passed_unparsable") > 0);
}

#[test]
fn the_host_port_obeys_the_command_word() {
    let Some(mut bench) = Bench::new(true) else {
        return;
    };
    let entry = DeviceEntry {
        mac: NEAR,
        kind: DeviceKind::Pod as u8,
        hooks: HOOK_INGRESS | HOOK_EGRESS,
        first_socket: 0,
    };
    bench.steering.set_device(LOOPBACK, &entry).expect("room");
    let rows = [
        (
            Action::Reenter,
            REDIRECT,
            Some((NEAR, FAR)),
            MARK,
            "reenter",
        ),
        (Action::Peer, REDIRECT, Some((FAR, NEAR)), 0, "peer"),
        (Action::Out, REDIRECT, Some((FAR, NEAR)), MARK, "out"),
        (Action::Neigh, REDIRECT, None, MARK, "neigh"),
        (Action::Up, PASS, None, 0, "up"),
    ];
    for (action, verdict, macs, mark, counter) in rows {
        for asked in [false, true] {
            let (destination, source) = Command {
                action,
                ifindex: LOOPBACK,
                far: FAR,
                mark: asked,
            }
            .encode();
            let mut sent = frame(&tuple(false, "TCP C:40000 -> B:8080"), ACK);
            sent[..12].copy_from_slice(&[destination.0, source.0].concat());
            let outcome = bench.run(HOST_PORT, &sent, 0);
            assert_eq!(outcome.verdict, verdict, "{action:?}");
            assert_eq!(outcome.mark, if asked { mark } else { 0 }, "{action:?}");
            let (first, second) = macs.unwrap_or((destination, source));
            assert_eq!(
                outcome.frame[..12],
                [first.0, second.0].concat(),
                "{action:?}"
            );
            assert_eq!(outcome.frame[12..], sent[12..], "{action:?}");
        }
        assert_eq!(bench.counter(counter), 2, "{action:?}");
    }
    assert_eq!(bench.counter("bad_command"), 0);
}

#[test]
fn a_frame_without_a_command_or_towards_an_unknown_device_is_dropped() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    let mut sent = frame(&tuple(false, "TCP C:40000 -> B:8080"), ACK);
    let words: [[u8; 6]; 4] = [
        NEAR.0,
        [6, 9, 0, 0, 0, 1],
        [6, Action::Reenter as u8, 0, 0, 0, 77],
        [6, Action::Peer as u8, 0, 0, 0, 77],
    ];
    for (count, word) in (1..).zip(words) {
        sent[..6].copy_from_slice(&word);
        assert_eq!(bench.run(HOST_PORT, &sent, 0).verdict, SHOT);
        assert_eq!(bench.counter("bad_command"), count);
    }
}

#[test]
fn the_host_ports_queue_is_the_owner() {
    let Some(bench) = Bench::new(true) else {
        return;
    };
    let mut seen = HashSet::new();
    for v6 in [false, true] {
        for port in 40_000..40_050 {
            for direction in [Direction::Original, Direction::Reply] {
                let mut packet = tuple(v6, "TCP C:40000 -> V:80");
                packet.source.port = Port(port);
                packet.destination.port = Port(port + 7);
                let client = steer::client_side(&packet, direction);
                let owner = steer::owner(&client, config().workers);
                let word = Origin::encode(LOOPBACK, Hook::Egress, direction);
                let mut sent = frame(&packet, ACK);
                sent[6..12].copy_from_slice(&word.0);
                // The test run strips an Ethernet header before a socket program sees the frame.
                sent.splice(0..0, [0; 14]);
                let options = TestRunOptions {
                    data_in: Some(&sent),
                    ..TestRunOptions::default()
                };
                let result = test_run(&bench.steering, HOST_QUEUE, options).expect("accepted");
                assert_eq!(result.return_value, u32::from(owner.0));
                seen.insert(owner);
            }
        }
    }
    assert_eq!(seen.len(), 3, "every worker owns some");
}

/// `struct __sk_buff` (include/uapi/linux/bpf.h) and where its mark stands.
const SKB_SIZE: usize = 192;
const SKB_MARK: std::ops::Range<usize> = 8..12;
