//! What tests of the devices need from the kernel: a network namespace of their own, raw sockets,
//! and a program that redirects to AF_XDP. Compiled for tests only.
//!
//! Without the privilege a test is skipped with a visible line; with `REQUIRE_PRIVILEGED=1` that
//! is a failure. A namespace has no name and goes when its last thread and descriptor are gone.

#![expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "small numbers of C headers"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::Duration;

/// Runs a test body in a fresh network namespace, loopback up.
pub(crate) fn in_namespace(body: impl FnOnce() + Send + 'static) {
    let outcome = std::thread::spawn(move || {
        // SAFETY: unshare takes flags by value; CLONE_NEWNET concerns this thread alone.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        if result < 0 {
            let error = io::Error::last_os_error();
            let required = std::env::var_os("REQUIRE_PRIVILEGED").is_some_and(|v| v == "1");
            assert!(!required, "no network namespace: {error}");
            let name = std::thread::current();
            eprintln!("SKIPPED {:?}: no network namespace: {error}", name.name());
            return;
        }
        ip("link set lo up");
        body();
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

/// Runs `ip` with these words.
pub(crate) fn ip(words: &str) {
    let status = Command::new("ip")
        .args(words.split_whitespace())
        .status()
        .expect("iproute2 is installed");
    assert!(status.success(), "ip {words}: {status}");
}

/// Polls until `condition` gives a value; panics after two seconds.
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let now = || {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Duration::new(now.tv_sec.unsigned_abs(), now.tv_nsec as u32)
    };
    let deadline = now() + Duration::from_secs(2);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
}

/// Lets io_uring fail with EPERM for this thread, as a container's seccomp profile does.
pub(crate) fn refuse_io_uring() {
    let number = libc::SYS_io_uring_setup as u32;
    // The number of the call is the first word of what the filter sees.
    let mut filter = [
        (0x20, 0, 0, 0),
        (0x15, 0, 1, number),
        (0x06, 0, 0, libc::SECCOMP_RET_ERRNO | libc::EPERM as u32),
        (0x06, 0, 0, libc::SECCOMP_RET_ALLOW),
    ]
    .map(|(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k });
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: this prctl takes its arguments by value.
    let result = unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) };
    assert_eq!(result, 0, "no new privileges");
    // SAFETY: `program` and the filter it points to outlive the call.
    let result = unsafe { libc::prctl(libc::PR_SET_SECCOMP, 2, &raw const program) };
    assert_eq!(result, 0, "seccomp: {}", io::Error::last_os_error());
}

/// A packet socket on one device that sends and receives whole frames, each behind a vnet header
/// of ten bytes.
#[derive(Debug)]
pub(crate) struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Opens it on the device.
    pub(crate) fn open(device: &str) -> Self {
        // SAFETY: socket takes its arguments by value.
        let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK, 0) };
        assert!(fd >= 0, "packet socket: {}", io::Error::last_os_error());
        // SAFETY: `fd` was just returned to us and is owned by nobody else.
        let socket = Self(unsafe { OwnedFd::from_raw_fd(fd) });
        socket.option(libc::SOL_PACKET, PACKET_VNET_HDR, 1);
        // SAFETY: all-zero is a valid `sockaddr_ll`, a plain C struct.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = ifindex(device) as i32;
        // SAFETY: `address` is a `sockaddr_ll` of the length given, borrowed for the call.
        let result = unsafe {
            libc::bind(
                socket.0.as_raw_fd(),
                (&raw const address).cast(),
                size_of_val(&address) as u32,
            )
        };
        assert!(result == 0, "bind: {}", io::Error::last_os_error());
        socket
    }

    /// Sends a frame out of the device, `vnet` in front of it.
    pub(crate) fn send(&self, vnet: &[u8; 10], frame: &[u8]) {
        let mut bytes = vnet.to_vec();
        bytes.extend_from_slice(frame);
        rustix::io::write(&self.0, &bytes).expect("the device takes the frame");
    }

    /// The next frame that passed the device in either direction, with its vnet header.
    pub(crate) fn receive(&self) -> Option<([u8; 10], Vec<u8>)> {
        let mut bytes = vec![0; 128 * 1024];
        let length = rustix::io::read(&self.0, &mut bytes).ok()?;
        let frame = bytes[10..length].to_vec();
        Some((*bytes.first_chunk().expect("128 KiB"), frame))
    }

    fn option(&self, level: i32, name: i32, value: i32) {
        // SAFETY: the option is an int, which outlives the call.
        let result = unsafe {
            libc::setsockopt(
                self.0.as_raw_fd(),
                level,
                name,
                (&raw const value).cast(),
                size_of_val(&value) as u32,
            )
        };
        assert!(result == 0, "option: {}", io::Error::last_os_error());
    }
}

/// An XDP program that redirects every packet to the socket of its queue, attached until dropped.
#[derive(Debug)]
pub(crate) struct RedirectProgram {
    _map: OwnedFd,
    _link: OwnedFd,
}

impl RedirectProgram {
    /// Attaches it to the device's driver, with these sockets.
    pub(crate) fn attach<'a>(
        device: &str,
        sockets: impl Iterator<Item = (u32, BorrowedFd<'a>)>,
    ) -> Self {
        // Type XSKMAP, key and value of four bytes, 64 entries.
        let map = bpf(0, &Attributes::of_words(&[17, 4, 4, 64])).expect("a map");
        let map = owned(map);
        for (queue, socket) in sockets {
            let value = socket.as_raw_fd();
            let mut update = Attributes::of_words(&[descriptor_word(&map), 0]);
            update.set_pointer(8, &raw const queue);
            update.set_pointer(16, &raw const value);
            bpf(2, &update).expect("the socket goes into the map");
        }
        let program = Self::load(&map);
        // Attached to the device as XDP, in driver mode.
        let link = [descriptor_word(&program), ifindex(device), 37, 4];
        let link = bpf(28, &Attributes::of_words(&link)).expect("the program can be attached");
        Self {
            _map: map,
            _link: owned(link),
        }
    }

    fn load(map: &OwnedFd) -> OwnedFd {
        let instructions: [u64; 6] = [
            0x0000_0000_0010_1261, // r2 = rx_queue_index
            0x0000_0000_0000_1118 | u64::from(descriptor_word(map)) << 32, // r1 = map
            0,
            0x0000_0002_0000_03b7, // r3 = XDP_PASS
            0x0000_0033_0000_0085, // call bpf_redirect_map
            0x0000_0000_0000_0095, // exit
        ];
        load_program(6, &instructions)
    }
}

/// A socket filter that gives the same number for every packet.
pub(crate) fn constant_filter(number: u32) -> OwnedFd {
    load_program(1, &[u64::from(number) << 32 | 0xb7, 0x95])
}

fn load_program(kind: u32, instructions: &[u64]) -> OwnedFd {
    let mut load = Attributes::of_words(&[kind, instructions.len() as u32]);
    load.set_pointer(8, instructions.as_ptr());
    load.set_pointer(16, c"GPL".as_ptr());
    owned(bpf(5, &load).expect("the program loads"))
}

/// `union bpf_attr`, by offsets.
#[repr(C, align(8))]
struct Attributes([u8; 144]);

impl Attributes {
    fn of_words(words: &[u32]) -> Self {
        let mut attributes = Self([0; 144]);
        for (bytes, word) in attributes.0.chunks_exact_mut(4).zip(words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        attributes
    }

    fn set_pointer<T>(&mut self, offset: usize, pointer: *const T) {
        self.0[offset..offset + 8].copy_from_slice(&(pointer.addr() as u64).to_ne_bytes());
    }
}

fn bpf(command: i32, attributes: &Attributes) -> io::Result<i32> {
    // SAFETY: the attributes are as large as said, zero where the command knows no field, and what
    // they point to is borrowed by the caller until the call returns.
    let result = unsafe {
        libc::syscall(
            libc::SYS_bpf,
            command,
            attributes.0.as_ptr(),
            attributes.0.len(),
        )
    };
    i32::try_from(result)
        .ok()
        .filter(|&result| result >= 0)
        .ok_or_else(io::Error::last_os_error)
}

fn owned(descriptor: i32) -> OwnedFd {
    // SAFETY: the kernel has just returned it to us, and nobody else knows it.
    unsafe { OwnedFd::from_raw_fd(descriptor) }
}

fn descriptor_word(descriptor: &OwnedFd) -> u32 {
    descriptor.as_raw_fd().unsigned_abs()
}

/// The index of a device of this namespace.
pub(crate) fn ifindex(device: &str) -> u32 {
    super::tun::link(device)
        .expect("netlink answers")
        .unwrap_or_else(|| panic!("no device {device}"))
        .ifindex
}

const PACKET_VNET_HDR: i32 = 15;
