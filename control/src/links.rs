//! Network devices of this node that come, change and go.
//!
//! Reads rtnetlink's link messages into `Link`s and compares two looks. What to attach to which
//! device is the engine's business; here only what the kernel says about each one.

use std::collections::BTreeMap;

use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkFlags, LinkInfo, LinkMessage};

use dataplane::net::MacAddr;

/// What kind of device it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkKind {
    /// A physical NIC, or one that looks like it.
    Physical,
    /// The loopback device.
    Loopback,
    /// One end of a veth pair.
    Veth,
    /// A VXLAN tunnel.
    Vxlan,
    /// A bridge.
    Bridge,
    /// A TUN or TAP device.
    Tun,
    /// Another kind, by the kernel's name.
    Other(String),
}

/// A network device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Its number.
    pub ifindex: u32,
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: LinkKind,
    /// Its own MAC, if it has one.
    pub mac: Option<MacAddr>,
    /// Largest IP packet.
    pub mtu: u32,
    /// Number of receive queues.
    pub queues: u32,
    /// Whether it is set up.
    pub up: bool,
    /// The bridge (or bond, or VRF) that it is a port of.
    pub master: Option<u32>,
    /// The other end of a pair, or the device below; in the other end's namespace if `peer_elsewhere`.
    pub peer: Option<u32>,
    /// Whether `peer` counts in another network namespace.
    pub peer_elsewhere: bool,
}

/// What happened to a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum LinkEvent {
    /// It is new.
    Appeared(Link),
    /// Something about it changed.
    Changed(Link),
    /// It is gone; this is what it was.
    Gone(Link),
}

impl LinkEvent {
    /// The device it is about.
    #[must_use]
    pub const fn link(&self) -> &Link {
        match self {
            Self::Appeared(link) | Self::Changed(link) | Self::Gone(link) => link,
        }
    }
}

/// Devices by number.
pub type Links = BTreeMap<u32, Link>;

/// What is different between two looks: what is gone first, since a name may come back.
#[must_use]
pub fn differences(before: &Links, now: &Links) -> Vec<LinkEvent> {
    let gone = before.values().filter(|link| {
        // A number that was given again, to another kind of device.
        now.get(&link.ifindex)
            .is_none_or(|new| new.kind != link.kind)
    });
    let mut events: Vec<LinkEvent> = gone.cloned().map(LinkEvent::Gone).collect();
    for link in now.values() {
        match before.get(&link.ifindex) {
            Some(old) if old == link => {}
            Some(old) if old.kind == link.kind => events.push(LinkEvent::Changed(link.clone())),
            _ => events.push(LinkEvent::Appeared(link.clone())),
        }
    }
    events
}

/// Reads one link message.
#[must_use]
pub(crate) fn from_message(message: &LinkMessage) -> Link {
    let flags = message.header.flags;
    let mut link = Link {
        ifindex: message.header.index,
        name: String::new(),
        kind: if flags.contains(LinkFlags::Loopback) {
            LinkKind::Loopback
        } else {
            LinkKind::Physical
        },
        mac: None,
        mtu: 0,
        queues: 1,
        up: flags.contains(LinkFlags::Up),
        master: None,
        peer: None,
        peer_elsewhere: false,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(bytes) => {
                link.mac = <[u8; 6]>::try_from(bytes.as_slice()).ok().map(MacAddr);
            }
            LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
            LinkAttribute::NumRxQueues(queues) => link.queues = *queues,
            LinkAttribute::Controller(master) => link.master = Some(*master).filter(|at| *at != 0),
            LinkAttribute::Link(peer) => link.peer = Some(*peer).filter(|at| *at != 0),
            LinkAttribute::LinkNetNsId(_) => link.peer_elsewhere = true,
            LinkAttribute::LinkInfo(parts) => {
                for part in parts {
                    if let LinkInfo::Kind(kind) = part {
                        link.kind = from_kind(kind);
                    }
                }
            }
            _ => {}
        }
    }
    link
}

fn from_kind(kind: &InfoKind) -> LinkKind {
    match kind {
        InfoKind::Veth => LinkKind::Veth,
        InfoKind::Vxlan => LinkKind::Vxlan,
        InfoKind::Bridge => LinkKind::Bridge,
        InfoKind::Tun => LinkKind::Tun,
        other => LinkKind::Other(other.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(ifindex: u32, name: &str, up: bool) -> Link {
        Link {
            ifindex,
            name: name.into(),
            kind: LinkKind::Veth,
            mac: None,
            mtu: 1500,
            queues: 1,
            up,
            master: None,
            peer: None,
            peer_elsewhere: false,
        }
    }

    fn links(all: &[Link]) -> Links {
        all.iter()
            .map(|link| (link.ifindex, link.clone()))
            .collect()
    }

    #[test]
    fn two_looks_differ_by_what_came_changed_and_went() {
        let before = links(&[link(1, "a", true), link(2, "b", true), link(3, "c", true)]);
        let now = links(&[link(2, "b", false), link(3, "c", true), link(4, "a", true)]);
        assert_eq!(
            differences(&before, &now),
            [
                LinkEvent::Gone(link(1, "a", true)),
                LinkEvent::Changed(link(2, "b", false)),
                LinkEvent::Appeared(link(4, "a", true)),
            ]
        );
        assert_eq!(differences(&now, &now), []);
    }
}
