//! TAP devices: `/dev/net/tun`, its ioctls, and what netlink sets and says about such a device.
//!
//! It makes, opens, sets up and removes; it moves no packet. The numbers are those of
//! `include/uapi/linux/if_tun.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};

use super::netlink::{self, Request};

/// Which segmentation the engine takes off the kernel: super-packets arrive whole.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Offload {
    /// Checksum, TCP and UDP segmentation.
    TcpAndUdp,
    /// Checksum and TCP segmentation: the kernel is older than 6.2.
    Tcp,
}

/// What the kernel says about an existing device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Link {
    /// Its index.
    pub(crate) ifindex: u32,
    /// Whether it is a TAP with several queues.
    pub(crate) is_multi_queue_tap: bool,
    /// How many queues some process has open.
    pub(crate) queues: u32,
}

/// What a TAP device is set to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Settings {
    /// Its Ethernet address.
    pub(crate) mac: [u8; 6],
    /// Its MTU.
    pub(crate) mtu: u32,
    /// How many packets may wait on a queue for the engine.
    pub(crate) queue_length: u32,
}

/// Opens `/dev/net/tun`, for reading and writing without blocking.
pub(crate) fn open() -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
    Ok(rustix::fs::open("/dev/net/tun", flags, Mode::empty())?)
}

/// Makes the descriptor a queue of the multi-queue TAP device of this name, which is made if it
/// does not exist. Each packet has a vnet header of ten bytes in front.
pub(crate) fn attach(file: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = InterfaceRequest::new(name)?;
    // SAFETY: TUNSETIFF reads and writes a `struct ifreq`, of which `request` has size and layout;
    // it is borrowed for the call only.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) };
    check(result)?;
    let size: libc::c_int = 10;
    // SAFETY: TUNSETVNETHDRSZ reads an int, which outlives the call.
    let result = unsafe { libc::ioctl(file.as_raw_fd(), TUNSETVNETHDRSZ, &raw const size) };
    check(result)
}

/// Takes super-packets and partial checksums; older kernels know no UDP segmentation.
pub(crate) fn set_offload(queue: &OwnedFd) -> io::Result<Offload> {
    match offload(queue, TUN_F_TCP | TUN_F_UDP) {
        Ok(()) => Ok(Offload::TcpAndUdp),
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            offload(queue, TUN_F_TCP)?;
            Ok(Offload::Tcp)
        }
        Err(error) => Err(error),
    }
}

/// Makes the device outlive its queues.
pub(crate) fn set_persistent(queue: &OwnedFd) -> io::Result<()> {
    // SAFETY: TUNSETPERSIST takes its argument by value.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETPERSIST, 1) };
    check(result)
}

/// Lets a program (socket filter type) choose the queue of a packet, or the kernel again.
pub(crate) fn set_steering(queue: &OwnedFd, program: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let program: libc::c_int = program.map_or(-1, |program| program.as_raw_fd());
    // SAFETY: TUNSETSTEERINGEBPF reads an int, which outlives the call; the kernel takes its own
    // reference to the program.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETSTEERINGEBPF, &raw const program) };
    check(result)
}

/// Sets a device up and brings it up: no ARP, and no IPv6 address of its own making.
pub(crate) fn configure(ifindex: u32, settings: &Settings) -> io::Result<()> {
    // Two messages: in one, the kernel would raise the device before it reads the last attribute,
    // and the device would have made itself a link-local address.
    Request::link(libc::RTM_NEWLINK, ifindex, 0, 0)
        .attribute(libc::IFLA_ADDRESS, &settings.mac)
        .attribute(libc::IFLA_MTU, &settings.mtu.to_ne_bytes())
        .attribute(libc::IFLA_TXQLEN, &settings.queue_length.to_ne_bytes())
        .nested(libc::IFLA_AF_SPEC, |families| {
            families.nested(AF_INET6, |inet6| {
                inet6.attribute(IFLA_INET6_ADDR_GEN_MODE, &[IN6_ADDR_GEN_MODE_NONE]);
            });
        })
        .send()?;
    let flags = libc::IFF_UP | libc::IFF_NOARP;
    Request::link(libc::RTM_NEWLINK, ifindex, flags, flags).send()?;
    Ok(())
}

/// Looks a device up by name.
pub(crate) fn link(name: &str) -> io::Result<Option<Link>> {
    let mut c_name = name.as_bytes().to_vec();
    c_name.push(0);
    let answer = Request::link(libc::RTM_GETLINK, 0, 0, 0)
        .attribute(libc::IFLA_IFNAME, &c_name)
        .send();
    match answer {
        Ok(body) => Ok(parse_link(&body)),
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a device.
pub(crate) fn delete(ifindex: u32) -> io::Result<()> {
    Request::link(libc::RTM_DELLINK, ifindex, 0, 0)
        .send()
        .map(|_| ())
}

/// Whether a read would find a packet.
pub(crate) fn is_readable(queue: &OwnedFd) -> bool {
    let mut descriptors = [rustix::event::PollFd::new(
        queue,
        rustix::event::PollFlags::IN,
    )];
    rustix::event::poll(&mut descriptors, Some(&rustix::time::Timespec::default()))
        .is_ok_and(|ready| ready > 0)
}

/// A second descriptor of the same queue.
pub(crate) fn duplicate(queue: &OwnedFd) -> io::Result<OwnedFd> {
    queue.as_fd().try_clone_to_owned()
}

/// `struct ifreq` with the flags in its union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    flags: u16,
    reserved: [u8; 22],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

impl InterfaceRequest {
    fn new(name: &str) -> io::Result<Self> {
        let mut bytes = [0; libc::IFNAMSIZ];
        if name.is_empty() || name.len() >= bytes.len() || name.contains('\0') {
            return Err(io::Error::from_raw_os_error(libc::EINVAL));
        }
        bytes[..name.len()].copy_from_slice(name.as_bytes());
        Ok(Self {
            name: bytes,
            flags: IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE,
            reserved: [0; 22],
        })
    }
}

fn offload(queue: &OwnedFd, flags: libc::c_ulong) -> io::Result<()> {
    // SAFETY: TUNSETOFFLOAD takes its argument by value.
    let result = unsafe { libc::ioctl(queue.as_raw_fd(), TUNSETOFFLOAD, flags) };
    check(result)
}

fn parse_link(body: &[u8]) -> Option<Link> {
    let number = |value: &[u8]| value.first_chunk().map(|&bytes| u32::from_ne_bytes(bytes));
    let ifindex = number(body.get(4..)?)?;
    let attributes = body.get(netlink::LINK_HEADER..)?;
    let details = netlink::attribute(attributes, libc::IFLA_LINKINFO).unwrap_or_default();
    let kind = netlink::attribute(details, libc::IFLA_INFO_KIND);
    let tun = netlink::attribute(details, libc::IFLA_INFO_DATA).unwrap_or_default();
    let is_set = |kind, value: u8| netlink::attribute(tun, kind) == Some(&[value][..]);
    Some(Link {
        ifindex,
        is_multi_queue_tap: kind == Some(b"tun\0")
            && is_set(IFLA_TUN_TYPE, 2)
            && is_set(IFLA_TUN_MULTI_QUEUE, 1),
        queues: netlink::attribute(tun, IFLA_TUN_NUM_QUEUES)
            .and_then(number)
            .unwrap_or(0),
    })
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

const TUNSETIFF: libc::c_ulong = 0x4004_54ca;
const TUNSETPERSIST: libc::c_ulong = 0x4004_54cb;
const TUNSETOFFLOAD: libc::c_ulong = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::c_ulong = 0x4004_54d8;
const TUNSETSTEERINGEBPF: libc::c_ulong = 0x8004_54e0;

const IFF_TAP: u16 = 0x0002;
const IFF_MULTI_QUEUE: u16 = 0x0100;
const IFF_NO_PI: u16 = 0x1000;
const IFF_VNET_HDR: u16 = 0x4000;

/// `TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN`.
const TUN_F_TCP: libc::c_ulong = 0x0f;
/// `TUN_F_USO4 | TUN_F_USO6`.
const TUN_F_UDP: libc::c_ulong = 0x60;

const IFLA_TUN_TYPE: u16 = 3;
const IFLA_TUN_MULTI_QUEUE: u16 = 7;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const AF_INET6: u16 = 10;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IN6_ADDR_GEN_MODE_NONE: u8 = 1;
