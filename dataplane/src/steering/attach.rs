//! Programs on devices: attach without links, find again by asking the kernel, detach exactly ours.
//!
//! XDP goes by netlink; tc programs as tcx, or on a clsact discipline where the kernel is older than
//! 6.6. Nothing here holds on to an attachment: programs stay on their devices until they are
//! detached or the device goes. Rule to keep: another's program is never replaced or detached.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use crate::net::MacAddr;
use crate::sys::bpf::{self, TcxHook};
use crate::sys::netlink::{self, LINK_HEADER, Request, TRAFFIC_HEADER, TrafficIds};

/// Where on a device a program sits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Place {
    XdpNative,
    XdpGeneric,
    Ingress,
    Egress,
}

impl Place {
    pub(super) const fn describe(self) -> &'static str {
        match self {
            Self::XdpNative => "XDP (native)",
            Self::XdpGeneric => "XDP (generic)",
            Self::Ingress => "tc ingress",
            Self::Egress => "tc egress",
        }
    }
}

/// How the kernel at hand runs tc programs without a link.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum TcFlavour {
    Tcx,
    Clsact,
}

impl TcFlavour {
    /// tcx where the kernel has it (6.6 and newer).
    pub(super) fn of_this_kernel() -> Self {
        match bpf::query_tcx(LOOPBACK, TcxHook::Ingress) {
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Self::Clsact,
            _ => Self::Tcx,
        }
    }
}

/// A device as the kernel describes it.
#[derive(Clone, Debug)]
pub(super) struct Link {
    pub(super) ifindex: u32,
    pub(super) name: String,
    pub(super) mac: Option<MacAddr>,
    pub(super) mtu: u32,
    /// Programs that sit at its XDP hooks, by number.
    pub(super) xdp: Vec<(Place, u32)>,
}

impl Link {
    pub(super) fn by_index(ifindex: u32) -> io::Result<Self> {
        let body = Request::link(libc::RTM_GETLINK, ifindex, 0, 0).send()?;
        Self::parse(&body).ok_or_else(|| io::ErrorKind::InvalidData.into())
    }

    pub(super) fn all() -> io::Result<Vec<Self>> {
        let bodies = Request::link(libc::RTM_GETLINK, 0, 0, 0).list()?;
        Ok(bodies.iter().filter_map(|body| Self::parse(body)).collect())
    }

    fn parse(body: &[u8]) -> Option<Self> {
        let kind = u16::from_ne_bytes(*body.get(2..)?.first_chunk()?);
        let ifindex = u32::from_ne_bytes(*body.get(4..)?.first_chunk()?);
        let attributes = body.get(LINK_HEADER..)?;
        let name = netlink::attribute(attributes, libc::IFLA_IFNAME)?;
        let mac = netlink::attribute(attributes, libc::IFLA_ADDRESS)
            .and_then(|value| <[u8; 6]>::try_from(value).ok())
            .filter(|_| kind == libc::ARPHRD_ETHER);
        Some(Self {
            ifindex,
            name: String::from_utf8_lossy(name.strip_suffix(&[0]).unwrap_or(name)).into_owned(),
            mac: mac.map(MacAddr),
            mtu: number(attributes, libc::IFLA_MTU).unwrap_or(0),
            xdp: netlink::attribute(attributes, IFLA_XDP)
                .map(xdp_programs)
                .unwrap_or_default(),
        })
    }
}

fn xdp_programs(nested: &[u8]) -> Vec<(Place, u32)> {
    [
        (Place::XdpNative, IFLA_XDP_NATIVE_ID),
        (Place::XdpGeneric, IFLA_XDP_GENERIC_ID),
    ]
    .into_iter()
    .filter_map(|(place, kind)| Some((place, number(nested, kind)?)))
    .filter(|&(_, id)| id != 0)
    .collect()
}

fn number(attributes: &[u8], kind: u16) -> Option<u32> {
    let value = netlink::attribute(attributes, kind)?;
    Some(u32::from_ne_bytes(*value.first_chunk()?))
}

/// Puts a program at a place; fails where another one sits at the same XDP hook.
pub(super) fn attach(
    ifindex: u32,
    place: Place,
    flavour: TcFlavour,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    match (tc_hook(place), flavour) {
        (None, _) => set_xdp(ifindex, place, program.as_raw_fd(), XDP_IF_FREE, None),
        (Some(hook), TcFlavour::Tcx) => bpf::attach_tcx(ifindex, hook, program),
        (Some(_), TcFlavour::Clsact) => {
            make_clsact(ifindex)?;
            add_filter(ifindex, place, program)
        }
    }
}

/// Takes this program, and no other, away from a place.
pub(super) fn detach(
    ifindex: u32,
    place: Place,
    flavour: TcFlavour,
    program: BorrowedFd<'_>,
) -> io::Result<()> {
    match (tc_hook(place), flavour) {
        (None, _) => {
            let expected = Some(program.as_raw_fd());
            set_xdp(ifindex, place, NO_PROGRAM, XDP_REPLACE, expected)
        }
        (Some(hook), TcFlavour::Tcx) => bpf::detach_tcx(ifindex, hook, program),
        (Some(_), TcFlavour::Clsact) => {
            let id = bpf::program_info(program)?.id;
            remove_filter(ifindex, place, id)?;
            remove_empty_clsact(ifindex)
        }
    }
}

/// A program of ours that sits on a device.
#[derive(Debug)]
pub(super) struct Leftover {
    ifindex: u32,
    device: String,
    place: Place,
    flavour: TcFlavour,
    name: String,
    id: u32,
}

impl Leftover {
    /// Every program of ours on every device of this network namespace, whoever attached it.
    pub(super) fn all() -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        for link in Link::all()? {
            let mut add = |place, flavour, id| -> io::Result<()> {
                if let Some(name) = our_name(id)? {
                    found.push(Self {
                        ifindex: link.ifindex,
                        device: link.name.clone(),
                        place,
                        flavour,
                        name,
                        id,
                    });
                }
                Ok(())
            };
            for &(place, id) in &link.xdp {
                add(place, TcFlavour::Tcx, id)?;
            }
            for place in [Place::Ingress, Place::Egress] {
                for id in tcx_programs(link.ifindex, place)? {
                    add(place, TcFlavour::Tcx, id)?;
                }
                for filter in filters(link.ifindex, place)? {
                    add(place, TcFlavour::Clsact, filter.program)?;
                }
            }
        }
        Ok(found)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        let program = bpf::program_by_id(self.id)?;
        detach(self.ifindex, self.place, self.flavour, program.as_fd())
    }

    pub(super) fn describe(&self) -> String {
        format!(
            "program {} ({}) at {} of {}",
            self.name,
            self.id,
            self.place.describe(),
            self.device
        )
    }
}

/// The name of a program, for messages.
pub(super) fn program_name(id: u32) -> String {
    bpf::program_by_id(id)
        .and_then(|program| bpf::program_info(program.as_fd()))
        .map_or_else(|_| String::from("unknown"), |info| info.name)
}

/// The name of a program if it is ours: named as one of ours and counting in a map of our name.
/// A program or map that goes meanwhile is nobody's.
fn our_name(id: u32) -> io::Result<Option<String>> {
    let Some(program) = gone_is_none(bpf::program_by_id(id))? else {
        return Ok(None);
    };
    let info = bpf::program_info(program.as_fd())?;
    if !super::PROGRAMS.contains(&info.name.as_str()) {
        return Ok(None);
    }
    for map in info.map_ids {
        if gone_is_none(bpf::map_name(map))?.as_deref() == Some(super::COUNTERS_MAP) {
            return Ok(Some(info.name));
        }
    }
    Ok(None)
}

fn gone_is_none<T>(result: io::Result<T>) -> io::Result<Option<T>> {
    match result {
        Ok(found) => Ok(Some(found)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

const fn tc_hook(place: Place) -> Option<TcxHook> {
    match place {
        Place::Ingress => Some(TcxHook::Ingress),
        Place::Egress => Some(TcxHook::Egress),
        Place::XdpNative | Place::XdpGeneric => None,
    }
}

/// The tcx programs there; none where the kernel has no tcx or the device has gone.
fn tcx_programs(ifindex: u32, place: Place) -> io::Result<Vec<u32>> {
    let Some(hook) = tc_hook(place) else {
        return Ok(Vec::new());
    };
    match bpf::query_tcx(ifindex, hook) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {
            Ok(Vec::new())
        }
        other => other,
    }
}

fn set_xdp(
    ifindex: u32,
    place: Place,
    program: i32,
    condition: u32,
    expected: Option<i32>,
) -> io::Result<()> {
    let mode = if place == Place::XdpGeneric {
        XDP_GENERIC
    } else {
        XDP_NATIVE
    };
    let mut request = Request::link(libc::RTM_SETLINK, ifindex, 0, 0);
    request.nested(IFLA_XDP | NESTED, |xdp| {
        xdp.attribute(IFLA_XDP_FD, &program.to_ne_bytes());
        xdp.attribute(IFLA_XDP_FLAGS, &(mode | condition).to_ne_bytes());
        if let Some(expected) = expected {
            xdp.attribute(IFLA_XDP_EXPECTED_FD, &expected.to_ne_bytes());
        }
    });
    request.send().map(drop)
}

fn make_clsact(ifindex: u32) -> io::Result<()> {
    let made = Request::traffic(
        libc::RTM_NEWQDISC,
        netlink::ACK | netlink::CREATE | netlink::EXCLUSIVE,
        ifindex,
        CLSACT,
    )
    .attribute(libc::TCA_KIND, b"clsact\0")
    .send();
    match made {
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => expect_clsact(ifindex),
        other => other.map(drop),
    }
}

/// The older `ingress` discipline stands at the same place and has no egress: a filter meant for
/// egress would land at ingress.
fn expect_clsact(ifindex: u32) -> io::Result<()> {
    let disciplines =
        Request::traffic(libc::RTM_GETQDISC, 0, ifindex, TrafficIds::default()).list()?;
    let is_clsact = disciplines.iter().any(|body| {
        body.get(4..8) == Some(&ifindex.to_ne_bytes())
            && body
                .get(TRAFFIC_HEADER..)
                .and_then(|attributes| netlink::attribute(attributes, libc::TCA_KIND))
                == Some(b"clsact\0")
    });
    if is_clsact {
        return Ok(());
    }
    Err(io::Error::other(
        "a queueing discipline of kind ingress is in the way: replace it by clsact",
    ))
}

/// A clsact without filters does nothing, so the last one who leaves takes it away.
fn remove_empty_clsact(ifindex: u32) -> io::Result<()> {
    for place in [Place::Ingress, Place::Egress] {
        if !all_filters(ifindex, place)?.is_empty() {
            return Ok(());
        }
    }
    Request::traffic(libc::RTM_DELQDISC, netlink::ACK, ifindex, CLSACT)
        .attribute(libc::TCA_KIND, b"clsact\0")
        .send()
        .map(drop)
}

fn add_filter(ifindex: u32, place: Place, program: BorrowedFd<'_>) -> io::Result<()> {
    let ids = TrafficIds {
        handle: FILTER_HANDLE,
        ..filter_ids(place)
    };
    Request::traffic(
        libc::RTM_NEWTFILTER,
        netlink::ACK | netlink::CREATE | netlink::EXCLUSIVE,
        ifindex,
        ids,
    )
    .attribute(libc::TCA_KIND, b"bpf\0")
    .nested(libc::TCA_OPTIONS | NESTED, |options| {
        options.attribute(TCA_BPF_FD, &program.as_raw_fd().to_ne_bytes());
        options.attribute(TCA_BPF_NAME, b"sluice\0");
        options.attribute(TCA_BPF_FLAGS, &TCA_BPF_DIRECT_ACTION.to_ne_bytes());
    })
    .send()
    .map(drop)
}

fn remove_filter(ifindex: u32, place: Place, program: u32) -> io::Result<()> {
    let filter = filters(ifindex, place)?
        .into_iter()
        .find(|filter| filter.program == program)
        .ok_or_else(|| io::Error::from_raw_os_error(libc::ENOENT))?;
    Request::traffic(libc::RTM_DELTFILTER, netlink::ACK, ifindex, filter.ids)
        .attribute(libc::TCA_KIND, b"bpf\0")
        .send()
        .map(drop)
}

/// A bpf filter of a clsact discipline.
struct Filter {
    ids: TrafficIds,
    program: u32,
}

fn filters(ifindex: u32, place: Place) -> io::Result<Vec<Filter>> {
    let bodies = all_filters(ifindex, place)?;
    Ok(bodies
        .iter()
        .filter_map(|body| parse_filter(body))
        .collect())
}

/// Every filter there; none where there is no clsact or the device has gone.
fn all_filters(ifindex: u32, place: Place) -> io::Result<Vec<Vec<u8>>> {
    let ids = TrafficIds {
        parent: filter_ids(place).parent,
        ..TrafficIds::default()
    };
    match Request::traffic(libc::RTM_GETTFILTER, 0, ifindex, ids).list() {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENODEV)) => {
            Ok(Vec::new())
        }
        Ok(bodies) => Ok(bodies
            .into_iter()
            .filter(|body| body.get(4..8) == Some(&ifindex.to_ne_bytes()))
            .collect()),
        Err(error) => Err(error),
    }
}

fn parse_filter(body: &[u8]) -> Option<Filter> {
    let attributes = body.get(TRAFFIC_HEADER..)?;
    if netlink::attribute(attributes, libc::TCA_KIND)? != b"bpf\0" {
        return None;
    }
    let options = netlink::attribute(attributes, libc::TCA_OPTIONS)?;
    let word = |at: usize| Some(u32::from_ne_bytes(*body.get(at..)?.first_chunk()?));
    Some(Filter {
        ids: TrafficIds {
            handle: word(8)?,
            parent: word(12)?,
            priority_and_protocol: word(16)?,
        },
        program: number(options, TCA_BPF_ID)?,
    })
}

/// First at ingress, last at egress, for frames of any protocol.
const fn filter_ids(place: Place) -> TrafficIds {
    let (parent, priority) = match place {
        Place::Egress => (0xffff_fff3, 0xffff_u32),
        _ => (0xffff_fff2, 1),
    };
    TrafficIds {
        handle: 0,
        parent,
        priority_and_protocol: priority << 16 | ALL_PROTOCOLS.to_be() as u32,
    }
}

const LOOPBACK: u32 = 1;
const CLSACT: TrafficIds = TrafficIds {
    handle: 0xffff_0000,
    parent: 0xffff_fff1,
    priority_and_protocol: 0,
};
/// `ETH_P_ALL`.
const ALL_PROTOCOLS: u16 = 3;
const FILTER_HANDLE: u32 = 0x516c;
const NO_PROGRAM: i32 = -1;
/// `NLA_F_NESTED`.
const NESTED: u16 = 0x8000;

// include/uapi/linux/if_link.h
const IFLA_XDP: u16 = libc::IFLA_XDP;
const IFLA_XDP_FD: u16 = 1;
const IFLA_XDP_FLAGS: u16 = 3;
const IFLA_XDP_NATIVE_ID: u16 = 5;
const IFLA_XDP_GENERIC_ID: u16 = 6;
const IFLA_XDP_EXPECTED_FD: u16 = 8;
const XDP_IF_FREE: u32 = 1;
const XDP_GENERIC: u32 = 1 << 1;
const XDP_NATIVE: u32 = 1 << 2;
const XDP_REPLACE: u32 = 1 << 4;

// include/uapi/linux/pkt_cls.h
const TCA_BPF_FD: u16 = 6;
const TCA_BPF_NAME: u16 = 7;
const TCA_BPF_FLAGS: u16 = 8;
const TCA_BPF_ID: u16 = 11;
const TCA_BPF_DIRECT_ACTION: u32 = 1;
