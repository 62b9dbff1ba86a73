//! What tests of the devices need from the kernel: a network namespace of their own, raw sockets,
//! and a program that redirects to AF_XDP. Compiled for tests only.
//!
//! Without the privilege a test is skipped with a visible line; with `REQUIRE_PRIVILEGED=1` that
//! is a failure. A namespace has no name and goes when its last thread and descriptor are gone.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::Command;
use std::time::{Duration, Instant};

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
#[expect(clippy::disallowed_methods, reason = "the deadline of a test")]
pub(crate) fn wait_for<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(2);
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        std::thread::yield_now();
    }
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

/// The index of a device of this namespace.
pub(crate) fn ifindex(device: &str) -> u32 {
    super::tun::link(device)
        .expect("netlink answers")
        .unwrap_or_else(|| panic!("no device {device}"))
        .ifindex
}

const PACKET_VNET_HDR: i32 = 15;
