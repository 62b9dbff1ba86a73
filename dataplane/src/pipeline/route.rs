//! The way out of a translated packet.
//!
//! - The door it came by, where its source is still the client's (REENTER): the kernel then routes a
//!   plain client-to-backend packet.
//! - Never REENTER or UP for a source that is an address of this node, which the kernel drops as
//!   martian: PEER or NEIGH to a pod here, the uplink, OUT or NEIGH to a remote backend.
//! - A reply that was caught as it left for its client (egress) goes on to just that station.
//! - An uplink's ring takes what is one packet; a super-packet goes OUT, where the NIC segments it.

use super::{Door, Out, Step, is_egress};
use crate::command::{Action, Command, Hook, Origin};
use crate::counters::DropReason;
use crate::flow::Flow;
use crate::net::{Address, Direction, MacAddr};
use crate::packet::ethernet;
use crate::snapshot::{Hop, NodeDevice};

/// What the routes say.
pub(super) enum Routed {
    /// The way, and whether the engine is a hop on it.
    Way(Out, bool),
    /// The hop limit ends here.
    TimeExceeded,
    /// Larger than this, the MTU of the way.
    TooBig(u32),
    /// There is no way.
    Nowhere(DropReason),
}

/// The way of a packet of `flow` after its translation. Writes the Ethernet header where the way
/// is an uplink.
pub(super) fn route(step: &mut Step<'_, '_>, flow: &Flow, direction: Direction) -> Routed {
    match direction {
        Direction::Original => forward(step, flow),
        Direction::Reply => back_to_client(step, flow),
    }
}

fn forward(step: &mut Step<'_, '_>, flow: &Flow) -> Routed {
    let backend = flow.backend_address;
    let source = flow.source_address;
    let source_is_ours = step.snapshot.node.addresses.contains(&source);
    if source_is_ours {
        if step.snapshot.node.addresses.contains(&backend) {
            return Routed::Nowhere(DropReason::HostToSelf);
        }
        return onwards(step, backend);
    }
    match step.packet.meta.door {
        Door::Uplink { ifindex, .. } if !is_remote(step, backend) => {
            Routed::Way(Out::Host(reenter(step, ifindex)), false)
        }
        Door::Host(Origin::Steered { ifindex, .. }) => {
            Routed::Way(Out::Host(reenter(step, ifindex)), false)
        }
        Door::Uplink { .. } | Door::Host(Origin::Host) => onwards(step, backend),
    }
}

/// Whether the way to this address leaves the node by an uplink.
fn is_remote(step: &Step<'_, '_>, address: Address) -> bool {
    step.snapshot
        .fib
        .hop(address)
        .is_some_and(|hop| device(step, hop.ifindex).is_some_and(|device| device.uplink.is_some()))
}

fn back_to_client(step: &mut Step<'_, '_>, flow: &Flow) -> Routed {
    let client = flow.client_address;
    if step.snapshot.node.addresses.contains(&client) {
        return Routed::Way(Out::Host(up()), false);
    }
    let Door::Host(Origin::Steered {
        ifindex,
        hook: Hook::Egress,
        far,
        ..
    }) = step.packet.meta.door
    else {
        return onwards(step, client);
    };
    let Some(device) = device(step, ifindex) else {
        return Routed::Nowhere(DropReason::NoRoute);
    };
    match device.uplink {
        Some(_) => Routed::Way(to_station(step, &device, ifindex, far), false),
        None if device.hooked_ingress && device.is_pod => {
            Routed::Way(Out::Host(peer(ifindex, far)), false)
        }
        None => {
            let out = Command {
                action: Action::Out,
                ifindex,
                far,
                mark: device.hooked_egress,
            };
            Routed::Way(Out::Host(out), false)
        }
    }
}

/// By the node's routes, the engine being a hop unless a host process sent it.
fn onwards(step: &mut Step<'_, '_>, destination: Address) -> Routed {
    let Some(hop) = step.snapshot.fib.hop(destination) else {
        return Routed::Nowhere(DropReason::NoRoute);
    };
    let routed = !matches!(step.packet.meta.door, Door::Host(Origin::Host));
    if routed && step.headers.hop_limit <= 1 {
        return Routed::TimeExceeded;
    }
    let device = device(step, hop.ifindex).unwrap_or_default();
    if !step.packet.meta.super_packet && device.mtu != 0 && device.mtu < step.headers.length {
        return Routed::TooBig(device.mtu);
    }
    let out = match hop.mac {
        Some(far) if device.uplink.is_some() => to_station(step, &device, hop.ifindex, far),
        Some(far) if device.is_pod => Out::Host(peer(hop.ifindex, far)),
        _ => Out::Host(neighbor(&hop, &device)),
    };
    Routed::Way(out, routed)
}

/// To a station behind an uplink.
fn to_station(step: &mut Step<'_, '_>, device: &NodeDevice, ifindex: u32, far: MacAddr) -> Out {
    let out = Command {
        action: Action::Out,
        ifindex,
        far,
        mark: device.hooked_egress,
    };
    match device.uplink {
        Some(uplink) if !step.packet.meta.super_packet => {
            ethernet::set_addresses(step.packet.bytes, far, device.mac);
            Out::Uplink {
                uplink,
                otherwise: out,
            }
        }
        _ => Out::Host(out),
    }
}

fn neighbor(hop: &Hop, device: &NodeDevice) -> Command {
    Command {
        action: Action::Neigh,
        ifindex: hop.ifindex,
        far: MacAddr::default(),
        mark: device.hooked_egress,
    }
}

/// Back in by the device it came by. The sender's MAC stays the sender's: a bridge learns from it.
fn reenter(step: &Step<'_, '_>, ifindex: u32) -> Command {
    let far = match step.packet.meta.door {
        Door::Host(Origin::Steered { far, .. }) => far,
        _ => sender(step.packet.bytes),
    };
    let mark = device(step, ifindex).is_some_and(|device| device.hooked_ingress);
    Command {
        action: Action::Reenter,
        ifindex,
        far,
        mark,
    }
}

const fn peer(ifindex: u32, far: MacAddr) -> Command {
    Command {
        action: Action::Peer,
        ifindex,
        far,
        mark: false,
    }
}

const fn up() -> Command {
    Command {
        action: Action::Up,
        ifindex: 0,
        far: MacAddr([0; 6]),
        mark: false,
    }
}

/// The station that sent the frame.
fn sender(frame: &[u8]) -> MacAddr {
    ethernet::Header::of(frame)
        .map(|header| header.source)
        .unwrap_or_default()
}

fn device(step: &Step<'_, '_>, ifindex: u32) -> Option<NodeDevice> {
    step.snapshot.node.devices.get(&ifindex).copied()
}

/// The way back for an unchanged packet: through the door it came by.
pub fn punt(door: &Door, bytes: &[u8], snapshot: &crate::snapshot::Snapshot) -> Option<Command> {
    let hooks = |ifindex| {
        snapshot
            .node
            .devices
            .get(&ifindex)
            .copied()
            .unwrap_or_default()
    };
    match *door {
        Door::Uplink { ifindex, .. } => Some(Command {
            action: Action::Reenter,
            ifindex,
            far: sender(bytes),
            mark: hooks(ifindex).hooked_ingress,
        }),
        Door::Host(Origin::Steered {
            ifindex, hook, far, ..
        }) => Some(match hook {
            Hook::Ingress => Command {
                action: Action::Reenter,
                ifindex,
                far,
                mark: hooks(ifindex).hooked_ingress,
            },
            Hook::Egress => Command {
                action: Action::Out,
                ifindex,
                far,
                mark: hooks(ifindex).hooked_egress,
            },
        }),
        Door::Host(Origin::Host) => None,
    }
}

/// Where an answer to this packet goes: back to its sender.
pub(super) fn back(step: &Step<'_, '_>) -> Option<Out> {
    if is_egress(&step.packet.meta.door) {
        return None;
    }
    match step.packet.meta.door {
        Door::Uplink { uplink, ifindex } => {
            let far = sender(step.packet.bytes);
            let mark = device(step, ifindex).is_some_and(|device| device.hooked_egress);
            let otherwise = Command {
                action: Action::Out,
                ifindex,
                far,
                mark,
            };
            Some(Out::Uplink { uplink, otherwise })
        }
        Door::Host(Origin::Steered { ifindex, far, .. }) => {
            let device = device(step, ifindex)?;
            Some(Out::Host(if device.is_pod {
                peer(ifindex, far)
            } else {
                Command {
                    action: Action::Out,
                    ifindex,
                    far,
                    mark: device.hooked_egress,
                }
            }))
        }
        Door::Host(Origin::Host) => Some(Out::Host(up())),
    }
}

/// The address with which this node speaks to the packet's sender.
pub(super) fn own_address(step: &Step<'_, '_>) -> Option<Address> {
    let sender = step.tuple().source.address;
    let by_route = step.snapshot.fib.hop(sender).and_then(|hop| hop.source);
    by_route.or_else(|| {
        let ours = &step.snapshot.node.addresses;
        ours.iter()
            .copied()
            .find(|address| address.is_v4() == sender.is_v4())
    })
}
