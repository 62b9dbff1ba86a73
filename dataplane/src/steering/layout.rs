//! The structs that the programs read, as `bpf/maps.h` has them, and the names of their counters.
//!
//! A test compiles the C headers and compares sizes, offsets and hash values: change both or
//! neither.

use zerocopy::{Immutable, IntoBytes};

use crate::net::{Address, MacAddr, Port, Protocol};

/// What the programs look a packet's destination up by.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub struct FrontendKey {
    address: Address,
    port: [u8; 2],
    protocol: Protocol,
    reserved: u8,
}

impl FrontendKey {
    /// A frontend; `Address::ANY` stands for every address of this node.
    #[must_use]
    pub const fn new(address: Address, port: Port, protocol: Protocol) -> Self {
        Self {
            address,
            port: port.0.to_be_bytes(),
            protocol,
            reserved: 0,
        }
    }

    /// The address of a frontend alone: what a later fragment still shows.
    #[must_use]
    pub const fn address_only(address: Address) -> Self {
        Self::new(address, Port(0), Protocol(0))
    }
}

/// What kind of device the steering sits on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum DeviceKind {
    /// A NIC under AF_XDP.
    Uplink = 1,
    /// The host's end of a pod's device.
    Pod = 2,
    /// A tunnel to other nodes.
    Overlay = 3,
}

/// Value of `devices`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct DeviceEntry {
    pub(super) mac: MacAddr,
    pub(super) kind: u8,
    pub(super) hooks: u8,
    pub(super) first_socket: u32,
}

/// `struct steering_config`.
#[derive(Clone, Copy, Debug, IntoBytes, Immutable)]
#[repr(C)]
pub(super) struct ProgramConfig {
    pub(super) key0: u64,
    pub(super) key1: u64,
    pub(super) grace_ns: u64,
    pub(super) hold_ns: u64,
    pub(super) workers: u32,
    pub(super) buckets_per_worker: u32,
    pub(super) mark: u32,
    pub(super) host_port: u32,
    pub(super) mirrored: u32,
    pub(super) reserved: u32,
}

pub(super) const HOOK_INGRESS: u8 = 1;
pub(super) const HOOK_EGRESS: u8 = 2;
pub(super) const TUPLES_PER_BUCKET: usize = 8;
pub(super) const MAX_WORKERS: u16 = 64;
/// Sockets that each uplink has room for in the programs' table.
pub const QUEUES_PER_UPLINK: u32 = 64;
/// How many uplinks one engine can have.
pub const MAX_UPLINKS: u32 = 16;

/// `enum counter`, in its order.
pub(super) const COUNTERS: [&str; 15] = [
    "steered_xdp",
    "steered_ingress",
    "steered_egress",
    "passed_fragment",
    "passed_unparsable",
    "held_frontend",
    "held_tuple",
    "cleared_tuple",
    "no_socket",
    "reenter",
    "peer",
    "out",
    "up",
    "neigh",
    "bad_command",
];

#[cfg(test)]
mod tests {
    use std::fmt::Write;
    use std::mem::offset_of;
    use std::process::Command;

    use super::*;
    use crate::net::{Direction, Endpoint, Tuple};
    use crate::steer::{FingerprintKey, buckets_of, fingerprint, owner};

    /// Compiles a program over the programs' headers, runs it, and returns what it prints.
    fn answers_of_c(body: &str) -> Vec<u64> {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let source = folder.path().join("layout.c");
        let program = folder.path().join("layout");
        let text = format!(
            "#include <stddef.h>\n#include <stdio.h>\n#include <string.h>\n#include \"maps.h\"\n\
             static void say(unsigned long long n) {{ printf(\"%llu\\n\", n); }}\n\
             int main(void) {{\n{body}\nreturn 0;\n}}\n"
        );
        std::fs::write(&source, text).expect("the folder is writable");
        let compiled = Command::new("clang")
            .args(["-O1", "-I", concat!(env!("CARGO_MANIFEST_DIR"), "/bpf")])
            .args([source.as_os_str(), "-o".as_ref(), program.as_os_str()])
            .status()
            .expect("clang is installed: the build needs it");
        assert!(compiled.success());
        let output = Command::new(program).output().expect("it can be run");
        String::from_utf8(output.stdout)
            .expect("numbers")
            .lines()
            .map(|line| line.parse().expect("a number"))
            .collect()
    }

    #[test]
    fn structs_have_the_same_layout_in_both_languages() {
        let rows = [
            ("sizeof(struct steering_config)", size_of::<ProgramConfig>()),
            (
                "offsetof(struct steering_config, key1)",
                offset_of!(ProgramConfig, key1),
            ),
            (
                "offsetof(struct steering_config, grace_ns)",
                offset_of!(ProgramConfig, grace_ns),
            ),
            (
                "offsetof(struct steering_config, hold_ns)",
                offset_of!(ProgramConfig, hold_ns),
            ),
            (
                "offsetof(struct steering_config, workers)",
                offset_of!(ProgramConfig, workers),
            ),
            (
                "offsetof(struct steering_config, buckets_per_worker)",
                offset_of!(ProgramConfig, buckets_per_worker),
            ),
            (
                "offsetof(struct steering_config, mark)",
                offset_of!(ProgramConfig, mark),
            ),
            (
                "offsetof(struct steering_config, host_port)",
                offset_of!(ProgramConfig, host_port),
            ),
            (
                "offsetof(struct steering_config, mirrored)",
                offset_of!(ProgramConfig, mirrored),
            ),
            ("sizeof(struct frontend_key)", size_of::<FrontendKey>()),
            (
                "offsetof(struct frontend_key, port)",
                offset_of!(FrontendKey, port),
            ),
            (
                "offsetof(struct frontend_key, protocol)",
                offset_of!(FrontendKey, protocol),
            ),
            ("sizeof(struct device)", size_of::<DeviceEntry>()),
            (
                "offsetof(struct device, kind)",
                offset_of!(DeviceEntry, kind),
            ),
            (
                "offsetof(struct device, hooks)",
                offset_of!(DeviceEntry, hooks),
            ),
            (
                "offsetof(struct device, first_socket)",
                offset_of!(DeviceEntry, first_socket),
            ),
            ("DEVICE_UPLINK", DeviceKind::Uplink as usize),
            ("DEVICE_POD", DeviceKind::Pod as usize),
            ("DEVICE_OVERLAY", DeviceKind::Overlay as usize),
            ("HOOK_INGRESS", HOOK_INGRESS.into()),
            ("HOOK_EGRESS", HOOK_EGRESS.into()),
            (
                "sizeof(struct bucket)",
                TUPLES_PER_BUCKET * size_of::<u64>(),
            ),
            ("sizeof(struct tuple)", 40),
            ("MAX_WORKERS", MAX_WORKERS.into()),
            ("QUEUES_PER_UPLINK", QUEUES_PER_UPLINK as usize),
            ("MAX_UPLINKS", MAX_UPLINKS as usize),
            ("COUNTERS", COUNTERS.len()),
        ];
        let body: String = rows.iter().fold(String::new(), |mut body, (name, _)| {
            writeln!(body, "say({name});").expect("a string grows");
            body
        });
        for ((name, rust), c) in rows.iter().zip(answers_of_c(&body)) {
            assert_eq!(*rust as u64, c, "{name}");
        }
    }

    #[test]
    fn counters_have_the_same_names_in_the_same_order() {
        let body: String = COUNTERS.iter().fold(String::new(), |mut body, name| {
            writeln!(body, "say(COUNTER_{});", name.to_uppercase()).expect("a string grows");
            body
        });
        let order: Vec<u64> = (0..).take(COUNTERS.len()).collect();
        assert_eq!(answers_of_c(&body), order);
    }

    #[test]
    fn hashes_are_the_same_numbers_in_both_languages() {
        let key = FingerprintKey {
            key0: 0x0123_4567_89ab_cdef,
            key1: 0xfedc_ba98_7654_3210,
        };
        let (mut body, mut expected) = (String::new(), Vec::new());
        for seed in 0..50_u8 {
            let tuple = tuple_of(seed);
            let direction = if seed % 2 == 0 {
                Direction::Original
            } else {
                Direction::Reply
            };
            writeln!(
                body,
                "{{ struct tuple t = {{ {{{}}}, {{{}}}, {}, {}, {}, {}, {{0, 0}} }};\n\
                 __u64 w[5]; memcpy(w, &t, 40);\n\
                 say(owner_hash(w[0], w[1], t.source_port, 7));\n\
                 __u64 f = fingerprint(w, {}ULL, {}ULL);\n\
                 say(f); say(FIRST_BUCKET(f, 1024)); say(SECOND_BUCKET(f, 1024)); }}",
                list(tuple.source.address.bytes()),
                list(tuple.destination.address.bytes()),
                tuple.source.port.0.to_be(),
                tuple.destination.port.0.to_be(),
                tuple.protocol.0,
                direction as u8,
                key.key0,
                key.key1,
            )
            .expect("a string grows");
            let print = fingerprint(&tuple, direction, &key);
            let [first, second] = buckets_of(print, 1024);
            let owner = owner(&tuple.source, 7).0;
            expected.extend([owner.into(), print, first.into(), second.into()]);
        }
        assert_eq!(answers_of_c(&body), expected);
    }

    fn tuple_of(seed: u8) -> Tuple {
        let address = |salt: u8| {
            let mut bytes = [0; 16];
            for (index, byte) in (0..).zip(&mut bytes) {
                *byte = seed.wrapping_mul(37).wrapping_add(salt.wrapping_mul(index));
            }
            match seed % 3 {
                0 => Address::from_v4([bytes[0], bytes[1], bytes[2], salt]),
                _ => Address::from_bytes(bytes),
            }
        };
        Tuple {
            protocol: Protocol(seed),
            source: Endpoint::new(address(11), Port(u16::from(seed) * 977)),
            destination: Endpoint::new(address(29), Port(80 + u16::from(seed))),
        }
    }

    fn list(bytes: &[u8]) -> String {
        bytes.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte},").expect("a string grows");
            text
        })
    }
}
