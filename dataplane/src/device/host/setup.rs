//! The TAP device of the host port: made or taken over at start, removed at the end.
//!
//! It moves no packet: `take_ports` hands its queues to the workers. The device is persistent, so
//! that it outlives a killed owner and the next one finds it by name. Rule to keep: a device that is
//! not ours is refused by name, never changed.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::HostPort;
use crate::net::MacAddr;
use crate::sys::tun;
use crate::time::{Clock, Duration, MonotonicClock};

/// What the host port is to be.
#[derive(Clone, Debug)]
pub struct HostPortConfig {
    /// Name of the device.
    pub name: String,
    /// How many queues, one for each worker.
    pub queues: u16,
    /// MTU of the device: what host processes may send into it.
    pub mtu: u32,
    /// Buffers of 64 KiB for each queue.
    pub buffers: u32,
    /// How packets are read and written.
    pub io: IoPreference,
}

impl Default for HostPortConfig {
    fn default() -> Self {
        Self {
            name: "sluice0".to_owned(),
            queues: 1,
            mtu: 1500,
            buffers: 256,
            io: IoPreference::Uring,
        }
    }
}

/// How packets are to be read and written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum IoPreference {
    /// io_uring, and plain calls where the kernel refuses it.
    Uring,
    /// Plain `read` and `write`.
    ReadWrite,
}

/// Why there is no host port.
#[derive(Debug, thiserror::Error)]
pub enum HostPortError {
    /// The file is missing or closed to us.
    #[error(
        "/dev/net/tun cannot be opened: {0}; load the module `tun`, or give the container the device"
    )]
    NoTun(#[source] io::Error),
    /// The kernel asks for a privilege.
    #[error("the device {name} cannot be set up without CAP_NET_ADMIN: {source}")]
    NotPermitted {
        /// The device.
        name: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A foreign device has the name.
    #[error("a device named {name} exists and is not a multi-queue TAP; remove or rename it")]
    NameTaken {
        /// The device.
        name: String,
    },
    /// Another process has it open.
    #[error("the device {name} is in use: another process holds {queues} of its queues")]
    InUse {
        /// The device.
        name: String,
        /// How many of its queues.
        queues: u32,
    },
    /// Any other refusal.
    #[error("the device {name} cannot be set up: {what}: {source}")]
    Setup {
        /// The device.
        name: String,
        /// Which step.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// The TAP device as the kernel has it. Dropping it removes nothing.
#[derive(Debug)]
pub struct HostPortDevice {
    config: HostPortConfig,
    ifindex: u32,
    offload: tun::Offload,
    queues: Vec<OwnedFd>,
    control: OwnedFd,
}

impl HostPortDevice {
    /// Makes the device, or takes over the one that an earlier process left, with all its queues,
    /// and brings it up.
    ///
    /// # Errors
    /// The privilege or `/dev/net/tun` is missing, the name is taken, another process uses it.
    pub fn create(config: HostPortConfig) -> Result<Self, HostPortError> {
        wait_until_unused(&config.name)?;
        let mut queues = Vec::new();
        for _ in 0..config.queues.max(1) {
            let queue = tun::open().map_err(HostPortError::NoTun)?;
            tun::attach(&queue, &config.name).map_err(|e| attach_error(&config.name, e))?;
            queues.push(queue);
        }
        let step = |what| {
            let name = config.name.clone();
            move |source| HostPortError::Setup { name, what, source }
        };
        let first = &queues[0];
        tun::set_persistent(first).map_err(step("making it persistent"))?;
        let offload = tun::set_offload(first).map_err(step("switching offloads on"))?;
        let control = tun::duplicate(first).map_err(step("duplicating a queue"))?;
        let link = tun::link(&config.name).map_err(step("looking it up"))?;
        let ifindex = link
            .ok_or_else(|| io::ErrorKind::NotFound.into())
            .map_err(step("looking it up"))?
            .ifindex;
        let settings = tun::Settings {
            mac: MAC.0,
            mtu: config.mtu,
            queue_length: QUEUE_LENGTH,
        };
        tun::configure(ifindex, &settings).map_err(step("setting it up"))?;
        Ok(Self {
            ifindex,
            offload,
            queues,
            control,
            config,
        })
    }

    /// Removes the device of this name if it is one of ours; whether there was one.
    ///
    /// # Errors
    /// The name belongs to a foreign device, or the kernel refuses.
    pub fn remove(name: &str) -> Result<bool, HostPortError> {
        let failed = |source| HostPortError::Setup {
            name: name.to_owned(),
            what: "removing it",
            source,
        };
        match tun::link(name).map_err(failed)? {
            None => Ok(false),
            Some(link) if !link.is_multi_queue_tap => Err(HostPortError::NameTaken {
                name: name.to_owned(),
            }),
            Some(link) => tun::delete(link.ifindex)
                .map(|()| true)
                .map_err(|e| not_permitted_or(name, e, failed)),
        }
    }

    /// The ports, one for each queue in the order of the workers. The second call returns none.
    ///
    /// # Errors
    /// There is no memory for the buffers.
    pub fn take_ports(&mut self) -> Result<Vec<HostPort>, HostPortError> {
        let name = &self.config.name;
        self.queues
            .drain(..)
            .map(|queue| {
                HostPort::new(queue, &self.config).map_err(|source| HostPortError::Setup {
                    name: name.clone(),
                    what: "allocating buffers",
                    source,
                })
            })
            .collect()
    }

    /// Lets a program choose the queue of each packet.
    ///
    /// # Errors
    /// The program is no socket filter, or the kernel refuses it.
    pub fn set_steering(&self, program: BorrowedFd<'_>) -> io::Result<()> {
        tun::set_steering(&self.control, Some(program))
    }

    /// Its index.
    #[must_use]
    pub const fn ifindex(&self) -> u32 {
        self.ifindex
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.config.name
    }

    /// Its Ethernet address.
    #[must_use]
    pub const fn mac(&self) -> MacAddr {
        MAC
    }

    /// Whether UDP super-packets cross whole too (kernel 6.2 and newer).
    #[must_use]
    pub fn takes_udp_segmentation(&self) -> bool {
        self.offload == tun::Offload::TcpAndUdp
    }
}

/// A dead owner's queues stay for some milliseconds, until its io_uring is torn down.
fn wait_until_unused(name: &str) -> Result<(), HostPortError> {
    let clock = MonotonicClock;
    let deadline = clock.now() + TAKE_OVER;
    loop {
        let link = tun::link(name).map_err(|source| HostPortError::Setup {
            name: name.to_owned(),
            what: "looking it up",
            source,
        })?;
        match link {
            None => return Ok(()),
            Some(link) if !link.is_multi_queue_tap => {
                return Err(HostPortError::NameTaken {
                    name: name.to_owned(),
                });
            }
            Some(link) if link.queues == 0 => return Ok(()),
            Some(link) if clock.now() > deadline => {
                return Err(HostPortError::InUse {
                    name: name.to_owned(),
                    queues: link.queues,
                });
            }
            Some(_) => crate::device::pause(Duration::from_millis(5)),
        }
    }
}

fn attach_error(name: &str, error: io::Error) -> HostPortError {
    if error.raw_os_error() == Some(libc::EINVAL) {
        return HostPortError::NameTaken {
            name: name.to_owned(),
        };
    }
    not_permitted_or(name, error, |source| HostPortError::Setup {
        name: name.to_owned(),
        what: "making it",
        source,
    })
}

fn not_permitted_or(
    name: &str,
    source: io::Error,
    otherwise: impl FnOnce(io::Error) -> HostPortError,
) -> HostPortError {
    if source.kind() == io::ErrorKind::PermissionDenied {
        return HostPortError::NotPermitted {
            name: name.to_owned(),
            source,
        };
    }
    otherwise(source)
}

/// Its prefix tells frames of host processes from steered ones (`command`).
const MAC: MacAddr = MacAddr([0x02, b's', b'l', b'u', b'c', b'e']);
const QUEUE_LENGTH: u32 = 1000;
const TAKE_OVER: Duration = Duration::from_secs(2);

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::testbed::{in_namespace, ip};

    fn create(io: IoPreference) -> (HostPortDevice, HostPort) {
        let config = HostPortConfig {
            io,
            ..HostPortConfig::default()
        };
        let mut device = HostPortDevice::create(config).expect("root and /dev/net/tun");
        let port = device.take_ports().expect("memory for buffers").remove(0);
        (device, port)
    }

    fn both(test: impl Fn(IoPreference) + Copy + Send + 'static) {
        in_namespace(move || test(IoPreference::ReadWrite));
        in_namespace(move || test(IoPreference::Uring));
    }

    #[test]
    fn the_device_is_silent_and_outlives_its_owner() {
        both(|io| {
            let (device, port) = create(io);
            let ifindex = device.ifindex();
            drop((device, port));
            let (device, _port) = create(io);
            assert_eq!(device.ifindex(), ifindex);
            let shown = std::process::Command::new("ip")
                .args(["-d", "link", "show", "sluice0"])
                .output()
                .expect("iproute2 is installed");
            let shown = String::from_utf8_lossy(&shown.stdout).into_owned();
            for word in ["NOARP", "LOWER_UP", "addrgenmode none", "02:73:6c:75:63:65"] {
                assert!(shown.contains(word), "{word} in {shown}");
            }
            let addresses = std::process::Command::new("ip")
                .args(["-6", "address", "show", "sluice0"])
                .output()
                .expect("iproute2 is installed");
            assert!(addresses.stdout.is_empty(), "an address of its own making");
        });
    }

    #[test]
    fn removal_takes_our_device_and_no_other() {
        in_namespace(|| {
            drop(create(IoPreference::ReadWrite));
            assert!(HostPortDevice::remove("sluice0").expect("root"));
            assert!(!HostPortDevice::remove("sluice0").expect("root"));
            ip("link add sluice0 type veth peer name other");
            let refused = HostPortDevice::remove("sluice0");
            assert!(matches!(refused, Err(HostPortError::NameTaken { .. })));
            let refused = HostPortDevice::create(HostPortConfig::default());
            assert!(matches!(refused, Err(HostPortError::NameTaken { .. })));
        });
    }

    #[test]
    fn a_device_in_use_is_refused_with_the_number_of_its_queues() {
        in_namespace(|| {
            let config = HostPortConfig {
                queues: 2,
                ..HostPortConfig::default()
            };
            let _owner = HostPortDevice::create(config).expect("root");
            let refused = HostPortDevice::create(HostPortConfig::default());
            assert!(matches!(
                refused,
                Err(HostPortError::InUse { queues: 2, .. })
            ));
        });
    }
}
