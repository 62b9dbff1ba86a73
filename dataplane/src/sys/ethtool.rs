//! How many receive queues a network device has (`ETHTOOL_GCHANNELS`).

use std::io;
use std::os::fd::AsRawFd;

use rustix::net::{AddressFamily, SocketFlags, SocketType};

/// Receive queues in use, including combined ones; 1 where the driver does not say.
pub(crate) fn receive_queues(device: &str) -> io::Result<u32> {
    let socket = rustix::net::socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?;
    let mut channels = Channels {
        command: ETHTOOL_GCHANNELS,
        ..Channels::default()
    };
    let mut request = InterfaceRequest {
        name: [0; libc::IFNAMSIZ],
        data: &raw mut channels,
        reserved: [0; 16],
    };
    if device.len() >= libc::IFNAMSIZ {
        return Err(io::Error::from_raw_os_error(libc::ENODEV));
    }
    request.name[..device.len()].copy_from_slice(device.as_bytes());
    // SAFETY: SIOCETHTOOL reads a `struct ifreq`, of which `request` has size and layout; its data
    // points to a `struct ethtool_channels`, as the command asks. Both outlive the call.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL, &raw mut request) };
    if result == 0 {
        return Ok((channels.receive + channels.combined).max(1));
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EOPNOTSUPP) => Ok(1),
        _ => Err(error),
    }
}

/// `struct ethtool_channels`.
#[repr(C)]
#[derive(Default)]
struct Channels {
    command: u32,
    maximum: [u32; 4],
    receive: u32,
    transmit: u32,
    other: u32,
    combined: u32,
}

/// `struct ifreq` with the pointer in its union.
#[repr(C)]
struct InterfaceRequest {
    name: [u8; libc::IFNAMSIZ],
    data: *mut Channels,
    reserved: [u8; 16],
}

const _: () = assert!(size_of::<InterfaceRequest>() == size_of::<libc::ifreq>());

const SIOCETHTOOL: libc::c_ulong = 0x8946;
const ETHTOOL_GCHANNELS: u32 = 0x3c;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testbed::{in_namespace, ip};

    #[test]
    fn a_veth_tells_its_receive_queues() {
        in_namespace(|| {
            ip("link add v0 numrxqueues 3 numtxqueues 3 type veth peer name v1");
            assert_eq!(receive_queues("v0").expect("it exists"), 3);
        });
    }

    #[test]
    fn a_missing_device_is_an_error() {
        in_namespace(|| assert!(receive_queues("nosuch").is_err()));
    }
}
