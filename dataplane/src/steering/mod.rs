//! Steering: the programs that decide what comes to the engine, and the tables they read.
//!
//! `Steering` loads the programs, puts them on devices and keeps frontends and node addresses as it
//! is told; workers get their `Heartbeat` and `TupleMap`, which are plain memory. The programs and
//! their tables outlive this process on purpose: dropping a `Steering` detaches nothing (a dead
//! engine's flows are held, see the dead-man's switch in `bpf/steer.bpf.c`). `detach_all` takes
//! them away; `leftovers` finds what another process left. It decides no policy and knows no flow.
//!
//! Rules to keep: an entry of `devices` is there before a program runs on that device, and goes
//! after it; an attachment that fails half-way is undone; nothing foreign is replaced or detached.

mod attach;
#[cfg(test)]
mod device_tests;
mod heartbeat;
mod layout;
#[cfg(test)]
mod program_tests;
mod tuples;

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use aya::maps::{HashMap as BpfHashMap, Map, MapData, MapError, PerCpuArray, XskMap};
use aya::programs::{ProgramError, ProgramFd, SchedClassifier, SocketFilter, Xdp};
use aya::{Ebpf, EbpfError, EbpfLoader};
use hashbrown::{HashMap, HashSet};
use zerocopy::IntoBytes;

use attach::{Leftover, Link, Place, TcFlavour};
pub use heartbeat::Heartbeat;
use layout::{
    COUNTERS, DeviceEntry, HOOK_EGRESS, HOOK_INGRESS, MAX_WORKERS, ProgramConfig, TUPLES_PER_BUCKET,
};
pub use layout::{DeviceKind, FrontendKey, MAX_UPLINKS, QUEUES_PER_UPLINK};
pub use tuples::{Full, TupleMap};

use crate::net::{Address, MacAddr};
use crate::steer::{FingerprintKey, WorkerId};
use crate::sys::mmap::SharedWords;
use crate::time::Duration;

/// What the programs must know before they are loaded.
#[derive(Clone, Debug)]
pub struct SteeringConfig {
    /// How many workers share the flows.
    pub workers: u16,
    /// Size of each worker's region of tuples, in buckets of eight: a power of two.
    pub buckets_per_worker: u32,
    /// A heartbeat older than this: the engine is stale.
    pub grace: Duration,
    /// A heartbeat older than this: its flows are not held any longer.
    pub hold: Duration,
    /// The bit on packets that the engine gives back.
    pub mark: u32,
    /// The host port, which exists already.
    pub host_port_ifindex: u32,
    /// Whether the kernel serves the frontends too; else their packets are dropped while stale.
    pub mirrored: bool,
    /// The secret of the fingerprints.
    pub key: FingerprintKey,
}

/// How the XDP program runs on an uplink.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum XdpMode {
    /// In the driver.
    Native,
    /// In the kernel's receive path, after a packet buffer was made; only when forced.
    Generic,
}

/// The loaded programs and their tables.
pub struct Steering {
    config: SteeringConfig,
    programs: Ebpf,
    flavour: TcFlavour,
    frontends: BpfHashMap<MapData, [u8; 20], u32>,
    known_frontends: HashSet<FrontendKey>,
    node_addresses: BpfHashMap<MapData, [u8; 16], u32>,
    known_node_addresses: HashSet<Address>,
    sockets: XskMap<MapData>,
    devices: BpfHashMap<MapData, u32, [u8; DEVICE_SIZE]>,
    counters: PerCpuArray<MapData, u64>,
    heartbeat: SharedWords,
    tuples: SharedWords,
    attached: HashMap<u32, Attachment>,
}

/// What we put on one device.
#[derive(Debug)]
struct Attachment {
    places: Vec<Place>,
    entry: DeviceEntry,
}

impl Steering {
    /// Loads the programs and makes their tables; attaches nothing.
    ///
    /// # Errors
    /// Where the configuration does not fit the tables, or the kernel refuses: too old, or the
    /// process lacks the privilege.
    pub fn load(config: &SteeringConfig) -> Result<Self, SteeringError> {
        check(config)?;
        let mut programs = load_object(config)?;
        for name in PROGRAMS {
            load_program(&mut programs, name).map_err(load_error)?;
        }
        let words = u64::from(config.workers) * u64::from(config.buckets_per_worker);
        let words = usize::try_from(words).unwrap_or(usize::MAX) * TUPLES_PER_BUCKET;
        Ok(Self {
            flavour: TcFlavour::of_this_kernel(),
            frontends: table(&mut programs, "frontends")?,
            known_frontends: HashSet::new(),
            node_addresses: table(&mut programs, "node_addresses")?,
            known_node_addresses: HashSet::new(),
            sockets: table(&mut programs, "xsks")?,
            devices: table(&mut programs, "devices")?,
            counters: table(&mut programs, COUNTERS_MAP)?,
            heartbeat: shared(&programs, "heartbeat", heartbeat::SLOTS)?,
            tuples: shared(&programs, "tuples", words)?,
            attached: HashMap::new(),
            config: config.clone(),
            programs,
        })
    }

    /// Takes an uplink: XDP for what it receives, tc for what leaves it. Returns the slot of its
    /// first queue for `set_socket`; until a queue has its socket there, what is ours is dropped.
    ///
    /// # Errors
    /// One sentence for the operator; nothing is left attached then.
    pub fn attach_uplink(&mut self, ifindex: u32, mode: XdpMode) -> Result<u32, SteeringError> {
        let (link, mac) = self.free_link(ifindex)?;
        if let Some(&(_, id)) = link.xdp.first() {
            return Err(SteeringError::ForeignXdp {
                device: link.name,
                program: attach::program_name(id),
                id,
            });
        }
        if link.mtu > MAX_UPLINK_MTU {
            return Err(SteeringError::MtuTooLarge {
                device: link.name,
                mtu: link.mtu,
            });
        }
        let first_socket = self.free_slots(&link)?;
        let place = match mode {
            XdpMode::Native => Place::XdpNative,
            XdpMode::Generic => Place::XdpGeneric,
        };
        let entry = DeviceEntry {
            mac,
            kind: DeviceKind::Uplink as u8,
            hooks: HOOK_EGRESS,
            first_socket,
        };
        self.attach(&link, entry, &[place, Place::Egress])?;
        Ok(first_socket)
    }

    /// Takes a pod's or an overlay's device at both sides. A device that is taken already only
    /// gets the new `mac`.
    ///
    /// # Errors
    /// One sentence for the operator; nothing is left attached then.
    pub fn attach_device(
        &mut self,
        ifindex: u32,
        kind: DeviceKind,
        mac: MacAddr,
    ) -> Result<(), SteeringError> {
        if let Some(attachment) = self.attached.get_mut(&ifindex) {
            attachment.entry.mac = mac;
            let entry = attachment.entry;
            return self.set_device(ifindex, &entry);
        }
        let (link, _) = self.free_link(ifindex)?;
        let entry = DeviceEntry {
            mac,
            kind: kind as u8,
            hooks: HOOK_INGRESS | HOOK_EGRESS,
            first_socket: 0,
        };
        self.attach(&link, entry, &[Place::Ingress, Place::Egress])
    }

    /// Puts the program that obeys the command word on the host port.
    ///
    /// # Errors
    /// The kernel's refusal.
    pub fn attach_host_port(&mut self) -> Result<(), SteeringError> {
        let ifindex = self.config.host_port_ifindex;
        let link = Link::by_index(ifindex).map_err(|error| no_device(ifindex, error))?;
        self.attach_place(&link, Place::Ingress, HOST_PORT)?;
        let entry = DeviceEntry {
            mac: MacAddr::default(),
            kind: 0,
            hooks: 0,
            first_socket: 0,
        };
        let places = vec![Place::Ingress];
        self.attached.insert(ifindex, Attachment { places, entry });
        Ok(())
    }

    /// Leaves a device; one that we never took, or that has gone, is left already.
    ///
    /// # Errors
    /// The kernel's refusal; the device still counts as taken then.
    pub fn detach(&mut self, ifindex: u32) -> Result<(), SteeringError> {
        let Some(attachment) = self.attached.get(&ifindex) else {
            return Ok(());
        };
        for &place in attachment.places.iter().rev() {
            let program = self.program_at(ifindex, place)?;
            let detached = attach::detach(ifindex, place, self.flavour, program.as_fd());
            unless_gone(detached).map_err(|source| SteeringError::Detach { ifindex, source })?;
        }
        unless_missing(self.devices.remove(&ifindex)).map_err(|e| map_error("devices", &e))?;
        self.attached.remove(&ifindex);
        Ok(())
    }

    /// Leaves every device.
    ///
    /// # Errors
    /// The first refusal; the other devices are left all the same.
    pub fn detach_all(&mut self) -> Result<(), SteeringError> {
        let taken: Vec<u32> = self.attached.keys().copied().collect();
        let mut result = Ok(());
        for ifindex in taken {
            let detached = self.detach(ifindex);
            result = result.and(detached);
        }
        result
    }

    /// Makes these the frontends: what is new is added before what has gone is removed.
    ///
    /// # Errors
    /// Where a table is full; the next call tries again.
    pub fn set_frontends(&mut self, frontends: &[FrontendKey]) -> Result<(), SteeringError> {
        let wanted: HashSet<FrontendKey> = frontends.iter().copied().collect();
        for key in wanted.difference(&self.known_frontends) {
            self.frontends
                .insert(bytes_of(key), 1, 0)
                .map_err(|e| map_error("frontends", &e))?;
        }
        for key in self.known_frontends.difference(&wanted) {
            unless_missing(self.frontends.remove(&bytes_of(key)))
                .map_err(|e| map_error("frontends", &e))?;
        }
        self.known_frontends = wanted;
        Ok(())
    }

    /// Makes these the addresses of this node, loopback left out.
    ///
    /// # Errors
    /// Where a table is full; the next call tries again.
    pub fn set_node_addresses(&mut self, addresses: &[Address]) -> Result<(), SteeringError> {
        let wanted: HashSet<Address> = addresses.iter().copied().collect();
        for address in wanted.difference(&self.known_node_addresses) {
            self.node_addresses
                .insert(address.bytes(), 1, 0)
                .map_err(|e| map_error("node_addresses", &e))?;
        }
        for address in self.known_node_addresses.difference(&wanted) {
            unless_missing(self.node_addresses.remove(address.bytes()))
                .map_err(|e| map_error("node_addresses", &e))?;
        }
        self.known_node_addresses = wanted;
        Ok(())
    }

    /// Gives the packets of a queue (`first slot of its uplink + queue`) to an AF_XDP socket. The
    /// kernel takes the entry away when the socket is closed.
    ///
    /// # Errors
    /// Where the slot lies outside the table or the descriptor is no AF_XDP socket.
    pub fn set_socket(&mut self, slot: u32, socket: BorrowedFd<'_>) -> Result<(), SteeringError> {
        self.sockets
            .set(slot, socket.as_raw_fd(), 0)
            .map_err(|e| map_error("xsks", &e))
    }

    /// A view of the heartbeat; each worker takes one.
    #[must_use]
    pub fn heartbeat(&self) -> Heartbeat {
        Heartbeat::new(
            self.heartbeat.clone(),
            self.config.workers,
            self.config.grace,
        )
    }

    /// The tuples of one worker, which alone may write them.
    #[must_use]
    pub fn tuples(&self, worker: WorkerId) -> TupleMap {
        TupleMap::new(self.tuples.clone(), worker, self.config.buckets_per_worker)
    }

    /// The program that picks the host port's queue, for `TUNSETSTEERINGEBPF`.
    ///
    /// # Errors
    /// None in practice: it is loaded.
    pub fn host_queue_program(&self) -> Result<&ProgramFd, SteeringError> {
        self.descriptor(HOST_QUEUE)
    }

    /// What the programs counted, by name, over all CPUs.
    ///
    /// # Errors
    /// The kernel's.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, SteeringError> {
        (0_u32..)
            .zip(COUNTERS)
            .map(|(index, name)| {
                let values = self.counters.get(&index, 0);
                let values = values.map_err(|e| map_error(COUNTERS_MAP, &e))?;
                Ok((name, values.iter().sum()))
            })
            .collect()
    }

    /// The devices that are taken, in ascending order, without the host port.
    #[must_use]
    pub fn devices(&self) -> Vec<u32> {
        let mut taken: Vec<u32> = self.attached.keys().copied().collect();
        taken.retain(|&ifindex| ifindex != self.config.host_port_ifindex);
        taken.sort_unstable();
        taken
    }

    fn attach(
        &mut self,
        link: &Link,
        entry: DeviceEntry,
        places: &[Place],
    ) -> Result<(), SteeringError> {
        self.set_device(link.ifindex, &entry)?;
        let attachment = Attachment {
            places: Vec::new(),
            entry,
        };
        self.attached.insert(link.ifindex, attachment);
        for &place in places {
            if let Err(error) = self.attach_place(link, place, program_for(place)) {
                self.detach(link.ifindex)?;
                return Err(error);
            }
            if let Some(attachment) = self.attached.get_mut(&link.ifindex) {
                attachment.places.push(place);
            }
        }
        Ok(())
    }

    fn attach_place(
        &self,
        link: &Link,
        place: Place,
        program: &'static str,
    ) -> Result<(), SteeringError> {
        let program = self.descriptor(program)?;
        attach::attach(link.ifindex, place, self.flavour, program.as_fd())
            .map_err(|source| attach_error(link, place, source))
    }

    fn set_device(&mut self, ifindex: u32, entry: &DeviceEntry) -> Result<(), SteeringError> {
        self.devices
            .insert(ifindex, bytes_of(entry), 0)
            .map_err(|e| map_error("devices", &e))
    }

    /// A device that exists, speaks Ethernet and is not taken yet.
    fn free_link(&self, ifindex: u32) -> Result<(Link, MacAddr), SteeringError> {
        let link = Link::by_index(ifindex).map_err(|error| no_device(ifindex, error))?;
        if self.attached.contains_key(&ifindex) {
            return Err(SteeringError::AlreadyTaken { device: link.name });
        }
        match link.mac {
            Some(mac) => Ok((link, mac)),
            None => Err(SteeringError::NotEthernet { device: link.name }),
        }
    }

    /// The first slot of the lowest range of sockets that no uplink uses.
    fn free_slots(&self, link: &Link) -> Result<u32, SteeringError> {
        let used: HashSet<u32> = self
            .attached
            .values()
            .filter(|attachment| attachment.entry.kind == DeviceKind::Uplink as u8)
            .map(|attachment| attachment.entry.first_socket)
            .collect();
        (0..MAX_UPLINKS)
            .map(|uplink| uplink * QUEUES_PER_UPLINK)
            .find(|first| !used.contains(first))
            .ok_or_else(|| SteeringError::TooManyUplinks {
                device: link.name.clone(),
            })
    }

    fn program_at(&self, ifindex: u32, place: Place) -> Result<&ProgramFd, SteeringError> {
        if ifindex == self.config.host_port_ifindex {
            return self.descriptor(HOST_PORT);
        }
        self.descriptor(program_for(place))
    }

    fn descriptor(&self, name: &'static str) -> Result<&ProgramFd, SteeringError> {
        let program = self
            .programs
            .program(name)
            .ok_or(SteeringError::NotInObject { name })?;
        program.fd().map_err(load_error)
    }
}

/// The programs of ours on the devices of this network namespace, whichever process attached them,
/// as sentences.
///
/// # Errors
/// Where the kernel does not let us ask.
pub fn leftovers() -> Result<Vec<String>, SteeringError> {
    remove_leftovers(true)
}

/// Detaches every program of ours from the devices of this network namespace and says which; with
/// `dry_run` only says it.
///
/// # Errors
/// Where the kernel does not let us ask or detach.
pub fn remove_leftovers(dry_run: bool) -> Result<Vec<String>, SteeringError> {
    let found = Leftover::all().map_err(|source| SteeringError::Query { source })?;
    for leftover in found.iter().filter(|_| !dry_run) {
        unless_gone(leftover.remove()).map_err(|source| SteeringError::Query { source })?;
    }
    Ok(found.iter().map(Leftover::describe).collect())
}

/// Why the steering could not be set up or changed.
#[derive(Debug, thiserror::Error)]
pub enum SteeringError {
    /// The configuration does not fit the programs' tables.
    #[error(
        "{workers} workers with {buckets} buckets of tuples each: at most 64 workers, and buckets must be a power of two"
    )]
    Sizes {
        /// As configured.
        workers: u16,
        /// As configured.
        buckets: u32,
    },
    /// The process may not load programs.
    #[error(
        "the kernel does not let this process load the steering programs: run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_SYS_ADMIN"
    )]
    NotPermitted,
    /// The kernel refused the programs.
    #[error("this kernel refuses the steering programs (6.1 or newer is needed): {reason}")]
    Load {
        /// In the kernel's words.
        reason: String,
    },
    /// The embedded object lacks a program or table: a fault of the build.
    #[error("the embedded object has no {name}")]
    NotInObject {
        /// What is missing.
        name: &'static str,
    },
    /// No device has this index.
    #[error("there is no network device with index {ifindex}: {source}")]
    NoDevice {
        /// The index.
        ifindex: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The device has no Ethernet header, where the command word would stand.
    #[error("{device} is no Ethernet device and cannot be steered")]
    NotEthernet {
        /// Its name.
        device: String,
    },
    /// Attached twice.
    #[error("{device} is steered already")]
    AlreadyTaken {
        /// Its name.
        device: String,
    },
    /// Somebody else's XDP program runs there.
    #[error(
        "{device} runs another XDP program, {program} (id {id}): detach it (ip link set dev {device} xdp off) or choose another uplink"
    )]
    ForeignXdp {
        /// The device's name.
        device: String,
        /// The program's name.
        program: String,
        /// The program's number.
        id: u32,
    },
    /// Packets of this size do not fit.
    #[error(
        "{device} has an MTU of {mtu}, XDP works with at most {MAX_UPLINK_MTU}: lower it (ip link set dev {device} mtu {MAX_UPLINK_MTU})"
    )]
    MtuTooLarge {
        /// The device's name.
        device: String,
        /// Its MTU.
        mtu: u32,
    },
    /// The same limit, but of the device at the other end.
    #[error(
        "the far end of {device} has an MTU above {MAX_UPLINK_MTU}, with which XDP does not work: lower it there"
    )]
    PeerMtuTooLarge {
        /// The device's name.
        device: String,
    },
    /// No room for another uplink.
    #[error("{device} is one uplink too many: {MAX_UPLINKS} are the most")]
    TooManyUplinks {
        /// The device's name.
        device: String,
    },
    /// The kernel refused an attachment.
    #[error("{device} does not take the steering program ({what}): {source}")]
    Attach {
        /// The device's name.
        device: String,
        /// Which side, and in which way.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel refused to detach.
    #[error("the steering program cannot be detached from device {ifindex}: {source}")]
    Detach {
        /// The device's index.
        ifindex: u32,
        /// What the kernel said.
        source: io::Error,
    },
    /// A table refused a change.
    #[error("the programs' table {name} refuses a change: {reason}")]
    Table {
        /// Its name.
        name: &'static str,
        /// What the kernel said.
        reason: String,
    },
    /// The attached programs cannot be listed or removed.
    #[error(
        "the programs on this node's devices cannot be listed or detached (it needs CAP_SYS_ADMIN): {source}"
    )]
    Query {
        /// What the kernel said.
        source: io::Error,
    },
}

fn check(config: &SteeringConfig) -> Result<(), SteeringError> {
    let buckets = config.buckets_per_worker;
    let fits = u32::from(config.workers)
        .checked_mul(buckets)
        .is_some_and(|all| all > 0);
    if fits && buckets.is_power_of_two() && config.workers <= MAX_WORKERS {
        return Ok(());
    }
    Err(SteeringError::Sizes {
        workers: config.workers,
        buckets,
    })
}

fn load_object(config: &SteeringConfig) -> Result<Ebpf, SteeringError> {
    let program_config = ProgramConfig {
        key0: config.key.key0,
        key1: config.key.key1,
        grace_ns: nanos(config.grace),
        hold_ns: nanos(config.hold),
        workers: u32::from(config.workers),
        buckets_per_worker: config.buckets_per_worker,
        mark: config.mark,
        host_port: config.host_port_ifindex,
        mirrored: u32::from(config.mirrored),
        reserved: 0,
    };
    let buckets = u32::from(config.workers) * config.buckets_per_worker;
    EbpfLoader::new()
        .override_global("config", program_config.as_bytes(), true)
        .map_max_entries("tuples", buckets)
        .load(OBJECT)
        .map_err(load_error)
}

fn load_program(programs: &mut Ebpf, name: &'static str) -> Result<(), ProgramError> {
    let Some(program) = programs.program_mut(name) else {
        return Err(ProgramError::NotLoaded);
    };
    match name {
        XDP_STEER => TryInto::<&mut Xdp>::try_into(program)?.load(),
        HOST_QUEUE => TryInto::<&mut SocketFilter>::try_into(program)?.load(),
        _ => TryInto::<&mut SchedClassifier>::try_into(program)?.load(),
    }
}

fn table<T: TryFrom<Map, Error = MapError>>(
    programs: &mut Ebpf,
    name: &'static str,
) -> Result<T, SteeringError> {
    let map = programs
        .take_map(name)
        .ok_or(SteeringError::NotInObject { name })?;
    T::try_from(map).map_err(|error| map_error(name, &error))
}

fn shared(programs: &Ebpf, name: &'static str, words: usize) -> Result<SharedWords, SteeringError> {
    let Some(Map::Array(map)) = programs.map(name) else {
        return Err(SteeringError::NotInObject { name });
    };
    SharedWords::shared(map.fd().as_fd(), words).map_err(|error| SteeringError::Table {
        name,
        reason: format!("it cannot be mapped: {error}"),
    })
}

const fn program_for(place: Place) -> &'static str {
    match place {
        Place::XdpNative | Place::XdpGeneric => XDP_STEER,
        Place::Ingress => TC_INGRESS,
        Place::Egress => TC_EGRESS,
    }
}

fn load_error(error: impl Into<EbpfError>) -> SteeringError {
    let error = error.into();
    let mut reason = error.to_string();
    let mut cause: Option<&dyn std::error::Error> = Some(&error);
    while let Some(current) = cause {
        let refusal = current.downcast_ref::<io::Error>().map(io::Error::kind);
        if refusal == Some(io::ErrorKind::PermissionDenied) {
            return SteeringError::NotPermitted;
        }
        reason = format!("{reason}: {current}");
        cause = current.source();
    }
    SteeringError::Load { reason }
}

fn attach_error(link: &Link, place: Place, source: io::Error) -> SteeringError {
    let device = link.name.clone();
    match (place, source.raw_os_error()) {
        (Place::XdpNative | Place::XdpGeneric, Some(libc::ERANGE)) => {
            SteeringError::PeerMtuTooLarge { device }
        }
        (_, Some(libc::EPERM)) => SteeringError::NotPermitted,
        _ => SteeringError::Attach {
            device,
            what: place.describe(),
            source,
        },
    }
}

const fn no_device(ifindex: u32, source: io::Error) -> SteeringError {
    SteeringError::NoDevice { ifindex, source }
}

fn map_error(name: &'static str, error: &MapError) -> SteeringError {
    let reason = match error {
        MapError::SyscallError(call) => call.io_error.to_string(),
        other => other.to_string(),
    };
    SteeringError::Table { name, reason }
}

/// A device that has gone, or a place where another program has taken ours' (`EEXIST`), needs no
/// detaching.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENODEV | libc::ENOENT | libc::EEXIST)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

fn unless_missing(result: Result<(), MapError>) -> Result<(), MapError> {
    match result {
        Err(MapError::KeyNotFound) => Ok(()),
        Err(MapError::SyscallError(call)) if call.io_error.kind() == io::ErrorKind::NotFound => {
            Ok(())
        }
        other => other,
    }
}

fn bytes_of<T: IntoBytes + zerocopy::Immutable, const N: usize>(value: &T) -> [u8; N] {
    const { assert!(size_of::<T>() == N) };
    let mut bytes = [0; N];
    bytes.copy_from_slice(value.as_bytes());
    bytes
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// What clang made of `bpf/`, aligned as an ELF file must be.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/programs.o"));

const XDP_STEER: &str = "xdp_steer";
const TC_INGRESS: &str = "tc_ingress";
const TC_EGRESS: &str = "tc_egress";
const HOST_PORT: &str = "host_port";
const HOST_QUEUE: &str = "host_queue";
const PROGRAMS: [&str; 5] = [XDP_STEER, TC_INGRESS, TC_EGRESS, HOST_PORT, HOST_QUEUE];
const COUNTERS_MAP: &str = "sluice_counters";
const DEVICE_SIZE: usize = size_of::<DeviceEntry>();
/// What fits a page with XDP's headroom and the kernel's own structures behind it.
const MAX_UPLINK_MTU: u32 = 3498;
