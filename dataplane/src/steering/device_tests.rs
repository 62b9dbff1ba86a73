//! The programs on real devices: veth pairs in a network namespace of the test's own.
//!
//! `wire` stands for an uplink, `pod` for the host's end of a pod's device, `host` for the host port;
//! each has its far end in the same namespace (`wire1`, `pod1`, `host1`), but for the tests that
//! give packets to the pod, whose end must be in another (`bpf_redirect_peer` insists).

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::*;
use crate::command::{Action, Command as Word, Hook, Origin};
use crate::net::{Direction, Endpoint, Port, Protocol, Tuple};
use crate::steer;
use crate::sys::testbed::{PacketSocket, ifindex, in_namespace, ip, wait_for};
use crate::time::{Clock, MonotonicClock};

const MARK: u32 = 0x40_0000;
const FAR: MacAddr = MacAddr([2, 0, 0, 0, 0, 9]);
const POD: MacAddr = MacAddr([2, 0, 0, 0, 0, 1]);
const VNET: [u8; 10] = [0; 10];

/// Makes the three pairs of devices.
fn make_devices() {
    for name in ["wire", "pod", "host"] {
        ip(&format!("link add {name} type veth peer name {name}1"));
        ip(&format!("link set {name} up"));
        ip(&format!("link set {name}1 up"));
    }
    ip("link set pod address 02:00:00:00:00:01");
}

/// Runs a test body in a namespace with the devices, `pod1` in one of its own, and a socket on it.
fn with_pod(body: impl FnOnce(PacketSocket) + Send + 'static) {
    in_namespace(|| {
        let pod = own_namespace();
        in_namespace(move || {
            make_devices();
            let path = format!("/proc/{}/fd/{}", std::process::id(), pod.as_raw_fd());
            ip(&format!("link set pod1 netns {path}"));
            let node = own_namespace();
            enter(&pod);
            ip("link set pod1 up");
            let behind = PacketSocket::open("pod1");
            enter(&node);
            body(behind);
        });
    });
}

fn own_namespace() -> File {
    File::open("/proc/thread-self/ns/net").expect("every thread has one")
}

fn enter(namespace: &File) {
    let kind = Some(LinkNameSpaceType::Network);
    move_into_link_name_space(namespace.as_fd(), kind).expect("it is a network namespace");
}

fn load() -> Steering {
    let config = SteeringConfig {
        workers: 2,
        buckets_per_worker: 16,
        grace: Duration::from_secs(30),
        hold: Duration::from_secs(120),
        mark: MARK,
        host_port_ifindex: ifindex("host"),
        mirrored: false,
        key: FingerprintKey { key0: 1, key1: 2 },
    };
    Steering::load(&config).expect("a namespace of our own comes with the privilege")
}

fn attach_everything(steering: &mut Steering) {
    steering.attach_host_port().expect("free");
    steering
        .attach_uplink(ifindex("wire"), XdpMode::Native)
        .expect("free");
    steering
        .attach_device(ifindex("pod"), DeviceKind::Pod, POD)
        .expect("free");
}

fn alive(steering: &Steering) {
    let now = MonotonicClock.now();
    for worker in [0, 1] {
        steering.heartbeat().beat(WorkerId(worker), now);
    }
}

fn endpoint(text: &str) -> Endpoint {
    let address: std::net::SocketAddr = text.parse().expect("a literal address");
    address.into()
}

/// A UDP frame from the pod's end.
fn frame(source: &str, destination: &str) -> Vec<u8> {
    let (source, destination) = (endpoint(source), endpoint(destination));
    let mut bytes = [POD.0, FAR.0].concat();
    bytes.extend_from_slice(&[8, 0, 0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0]);
    bytes.extend_from_slice(&source.address.v4_bytes());
    bytes.extend_from_slice(&destination.address.v4_bytes());
    bytes.extend_from_slice(&source.port.0.to_be_bytes());
    bytes.extend_from_slice(&destination.port.0.to_be_bytes());
    bytes.extend_from_slice(&[0, 12, 0, 0, 1, 2, 3, 4]);
    bytes
}

/// The next UDP frame on a device.
fn next_frame(socket: &PacketSocket, what: &str) -> Vec<u8> {
    wait_for(what, || {
        let (_, frame) = socket.receive()?;
        (frame.get(12..14) == Some(&[8, 0]) && frame.get(23) == Some(&17)).then_some(frame)
    })
}

fn counter(steering: &Steering, wanted: &str) -> u64 {
    let counters = steering.counters().expect("counters can be read");
    let found = counters.into_iter().find(|(name, _)| *name == wanted);
    found.expect("a counter of this name").1
}

#[test]
fn programs_outlive_their_owner_and_are_found_and_removed() {
    in_namespace(|| {
        make_devices();
        let mut steering = load();
        attach_everything(&mut steering);
        drop(steering);
        let found = leftovers().expect("devices can be asked");
        assert_eq!(found.len(), 5, "{found:?}");
        assert!(found[0].starts_with("program xdp_steer"), "{found:?}");
        assert!(found[0].ends_with("at XDP (native) of wire"), "{found:?}");
        assert_eq!(
            remove_leftovers(false).expect("they can be detached"),
            found
        );
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
    });
}

#[test]
fn programs_of_a_killed_process_are_found_and_removed() {
    in_namespace(|| {
        make_devices();
        let mut owner = Owner::start();
        owner.0.kill().expect("it runs");
        owner.0.wait().expect("it was ours");
        let found = remove_leftovers(false).expect("devices can be asked");
        assert_eq!(found.len(), 5, "{found:?}");
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
    });
}

/// Another process that attached everything.
struct Owner(Child);

impl Owner {
    fn start() -> Self {
        let mut child = Command::new(std::env::current_exe().expect("the test's own file"))
            .args(["--exact", "--nocapture", "--include-ignored"])
            .arg("steering::device_tests::the_owner_that_is_killed")
            .env(OWNER, "1")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("it can be started again");
        let output = child.stdout.take().expect("it is piped");
        let attached = BufReader::new(output)
            .lines()
            .map_while(Result::ok)
            .any(|line| line.ends_with(ATTACHED));
        assert!(attached, "the owner attached its programs");
        Self(child)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        let ended = self.0.kill().and_then(|()| self.0.wait());
        assert!(ended.is_ok() || std::thread::panicking(), "it was ours");
    }
}

const OWNER: &str = "SLUICE_TEST_OWNER";
const ATTACHED: &str = "attached";

#[test]
#[ignore = "runs as a process of another test"]
#[expect(clippy::print_stdout, reason = "tells the parent that it is ready")]
fn the_owner_that_is_killed() {
    if std::env::var_os(OWNER).is_none() {
        return;
    }
    let mut steering = load();
    attach_everything(&mut steering);
    println!("{ATTACHED}");
    // Ends with the parent at the latest.
    let ended = std::io::stdin().read(&mut [0]);
    assert!(ended.is_ok());
}

#[test]
fn detaching_leaves_nothing_behind() {
    in_namespace(|| {
        make_devices();
        let mut steering = load();
        attach_everything(&mut steering);
        assert_eq!(steering.devices().len(), 2);
        ip("link del pod");
        steering
            .detach_all()
            .expect("a device that has gone is left");
        assert_eq!(steering.devices(), [0; 0]);
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
        assert_eq!(steering.devices.keys().count(), 0);
    });
}

#[test]
fn another_xdp_program_is_refused_by_name_and_stays() {
    in_namespace(|| {
        make_devices();
        let mut other = load();
        other
            .attach_uplink(ifindex("wire"), XdpMode::Native)
            .expect("free");
        let mut steering = load();
        for mode in [XdpMode::Native, XdpMode::Generic] {
            let refused = steering.attach_uplink(ifindex("wire"), mode);
            let sentence = refused.expect_err("it is taken").to_string();
            assert!(
                sentence.starts_with("wire runs another XDP program, xdp_steer (id "),
                "{sentence}"
            );
        }
        assert_eq!(steering.devices.keys().count(), 0);
        assert_eq!(leftovers().expect("devices can be asked").len(), 2);
    });
}

#[test]
fn devices_that_cannot_be_uplinks_are_refused_in_a_sentence() {
    in_namespace(|| {
        make_devices();
        let mut steering = load();
        let mut refusal = |device: &str| {
            steering
                .attach_uplink(ifindex(device), XdpMode::Native)
                .expect_err("it cannot be an uplink")
                .to_string()
        };
        ip("link set wire mtu 9000");
        assert!(
            refusal("wire").starts_with("wire has an MTU of 9000, XDP works with at most 3498")
        );
        assert!(refusal("wire1").starts_with("the far end of wire1 has an MTU above 3498"));
        ip("tuntap add dev l3 mode tun");
        assert_eq!(
            refusal("l3"),
            "l3 is no Ethernet device and cannot be steered"
        );
        let gone = steering.attach_uplink(4711, XdpMode::Native);
        let sentence = gone.expect_err("there is none").to_string();
        assert!(sentence.starts_with("there is no network device with index 4711"));
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
        assert_eq!(steering.devices.keys().count(), 0);
    });
}

#[test]
fn a_failure_half_way_is_undone() {
    in_namespace(|| {
        make_devices();
        let mut steering = load();
        // A classic qdisc takes the place where clsact would stand.
        let status = Command::new("tc")
            .args("qdisc add dev wire ingress".split(' '))
            .status()
            .expect("iproute2 is installed");
        assert!(status.success());
        steering.flavour = TcFlavour::Clsact;
        let refused = steering.attach_uplink(ifindex("wire"), XdpMode::Native);
        let sentence = refused.expect_err("no clsact").to_string();
        assert!(sentence.ends_with("replace it by clsact"), "{sentence}");
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
        assert_eq!(steering.devices.keys().count(), 0);
        assert_eq!(steering.devices(), [0; 0]);
    });
}

#[test]
fn a_pods_packet_to_a_frontend_crosses_the_host_port_and_comes_back() {
    with_pod(|behind| {
        let mut steering = load();
        check_both_ways(&mut steering, &behind);
        steering.detach_all().expect("attached");
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
    });
}

#[test]
fn kernels_without_tcx_steer_by_clsact() {
    with_pod(|behind| {
        let mut steering = load();
        steering.flavour = TcFlavour::Clsact;
        check_both_ways(&mut steering, &behind);
        let found = leftovers().expect("devices can be asked");
        assert_eq!(found.len(), 5, "{found:?}");
        steering.detach_all().expect("attached");
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
        let output = Command::new("tc").args(["qdisc", "show"]).output();
        let listed = String::from_utf8(output.expect("iproute2").stdout).expect("text");
        assert!(!listed.contains("clsact"), "{listed}");

        attach_everything(&mut steering);
        drop(steering);
        assert_eq!(remove_leftovers(false).expect("allowed").len(), 5);
        assert_eq!(leftovers().expect("devices can be asked"), [""; 0]);
    });
}

/// Original in, REENTER back; reply out, PEER back.
fn check_both_ways(steering: &mut Steering, behind: &PacketSocket) {
    let pod = ifindex("pod");
    attach_everything(steering);
    let frontend = endpoint("192.0.2.10:80");
    let key = FrontendKey::new(frontend.address, frontend.port, Protocol::UDP);
    steering.set_frontends(&[key]).expect("room");
    alive(steering);
    let engine = PacketSocket::open("host1");

    let request = frame("192.0.2.1:40000", "192.0.2.10:80");
    behind.send(&VNET, &request);
    let got = next_frame(&engine, "the request on the host port");
    let word = Origin::encode(pod, Hook::Ingress, Direction::Original);
    assert_eq!(got[..12], [FAR.0, word.0].concat());
    assert_eq!(got[12..], request[12..]);

    // Given back, it is the pod's own packet again, without the mark and not steered twice.
    let at_pod = PacketSocket::open("pod");
    let (to, from) = Word {
        action: Action::Reenter,
        ifindex: pod,
        far: FAR,
        mark: true,
    }
    .encode();
    engine.send(&VNET, &[&to.0, &from.0, &request[12..]].concat());
    let back = next_frame(&at_pod, "the request at the pod's device");
    assert_eq!(back, request);
    assert_eq!(counter(steering, "reenter"), 1);
    assert_eq!(counter(steering, "steered_ingress"), 1);

    // The reply leaves towards the pod as a routed packet would: out of the pod's device.
    let reply = Tuple {
        protocol: Protocol::UDP,
        source: endpoint("192.0.2.20:8080"),
        destination: endpoint("192.0.2.1:40000"),
    };
    let owner = steer::owner(&reply.destination, 2);
    let fingerprint = steer::fingerprint(&reply, Direction::Reply, &steering.config.key);
    steering.tuples(owner).store(fingerprint).expect("room");
    let mut bytes = frame("192.0.2.20:8080", "192.0.2.1:40000");
    bytes[..12].copy_from_slice(&[FAR.0, POD.0].concat());
    at_pod.send(&VNET, &bytes);
    let word = Origin::encode(pod, Hook::Egress, Direction::Reply);
    let got = wait_for("the reply on the host port", || {
        let frame = next_frame(&engine, "a frame on the host port");
        (frame[6..12] == word.0).then_some(frame)
    });
    assert_eq!(got[..6], FAR.0);

    let (to, from) = Word {
        action: Action::Peer,
        ifindex: pod,
        far: FAR,
        mark: false,
    }
    .encode();
    engine.send(&VNET, &[&to.0, &from.0, &bytes[12..]].concat());
    wait_for("the reply in the pod", || {
        let frame = next_frame(behind, "a frame in the pod");
        (frame == bytes).then_some(())
    });
    assert_eq!(counter(steering, "peer"), 1);
}

#[test]
fn frontends_and_addresses_are_changed_by_difference() {
    in_namespace(|| {
        make_devices();
        let mut steering = load();
        let key =
            |port| FrontendKey::new(endpoint("192.0.2.10:1").address, Port(port), Protocol::TCP);
        steering.set_frontends(&[key(1), key(2)]).expect("room");
        steering.set_frontends(&[key(2), key(3)]).expect("room");
        let mut present: Vec<_> = steering.frontends.keys().map_while(Result::ok).collect();
        present.sort_unstable();
        assert_eq!(present, [bytes_of(&key(2)), bytes_of(&key(3))]);
        let addresses = [
            endpoint("192.0.2.1:0").address,
            endpoint("[2001:db8::1]:0").address,
        ];
        steering.set_node_addresses(&addresses).expect("room");
        steering.set_node_addresses(&addresses[1..]).expect("room");
        let present: Vec<_> = steering
            .node_addresses
            .keys()
            .map_while(Result::ok)
            .collect();
        assert_eq!(present, [*addresses[1].bytes()]);
        steering.set_frontends(&[]).expect("room");
        assert_eq!(steering.frontends.keys().count(), 0);
    });
}
