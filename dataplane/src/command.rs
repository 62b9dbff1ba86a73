//! The command word: what engine and kernel tell each other in the Ethernet header of a frame on
//! the host port.
//!
//! The layout is that of `bpf/maps.h` ("The command word"); a change is made in both.

use crate::net::{Direction, MacAddr};

/// At which side of a device the steering took the packet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Hook {
    /// It came from the device's far end.
    Ingress,
    /// It was about to leave towards the device's far end.
    Egress,
}

/// Where a frame that the engine reads from the host port came from.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Origin {
    /// `tc_steer` took it at a device.
    Steered {
        /// The device.
        ifindex: u32,
        /// Which side of it.
        hook: Hook,
        /// What the steering matched it as.
        direction: Direction,
        /// The far station: sender at ingress, receiver at egress.
        far: MacAddr,
    },
    /// A host process sent it through a route into the host port.
    Host,
}

/// What the kernel shall do with a frame that the engine writes to the host port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// What to do.
    pub action: Action,
    /// With which device (for `Up`: ignored).
    pub ifindex: u32,
    /// The far station's MAC (for `Up` and `Neigh`: ignored).
    pub far: MacAddr,
    /// Whether the target has our hook, which must let this packet pass.
    pub mark: bool,
}

/// The five ways back into the kernel.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Action {
    /// As if received on the device.
    Reenter = 1,
    /// Straight into the pod behind the device.
    Peer = 2,
    /// Out of the device, to the far station.
    Out = 3,
    /// To the host's own sockets.
    Up = 4,
    /// Out of the device; the kernel finds route and neighbour.
    Neigh = 5,
}

const COMMAND_PREFIX: u8 = 0x06;
const HOST_PREFIX: u8 = 0x02;
const HOW_EGRESS: u8 = 0x02;
const ACTION_MARK: u8 = 0x80;

impl Origin {
    /// Reads the destination and source MAC of a frame from the host port; `None` if neither the
    /// steering nor a host process wrote it.
    #[must_use]
    pub fn decode(destination: MacAddr, source: MacAddr) -> Option<Self> {
        let [prefix, how, a, b, c, d] = source.0;
        match prefix {
            COMMAND_PREFIX => Some(Self::Steered {
                ifindex: u32::from_be_bytes([a, b, c, d]),
                hook: if how & HOW_EGRESS == 0 {
                    Hook::Ingress
                } else {
                    Hook::Egress
                },
                direction: if how & 1 == 0 {
                    Direction::Original
                } else {
                    Direction::Reply
                },
                far: destination,
            }),
            HOST_PREFIX => Some(Self::Host),
            _ => None,
        }
    }

    /// What the steering writes; tests build frames with it.
    #[must_use]
    pub fn encode(ifindex: u32, hook: Hook, direction: Direction) -> MacAddr {
        let how = direction as u8 | if hook == Hook::Egress { HOW_EGRESS } else { 0 };
        let [a, b, c, d] = ifindex.to_be_bytes();
        MacAddr([COMMAND_PREFIX, how, a, b, c, d])
    }
}

impl Command {
    /// Destination and source MAC to write in front of the packet.
    #[must_use]
    pub fn encode(&self) -> (MacAddr, MacAddr) {
        let action = self.action as u8 | if self.mark { ACTION_MARK } else { 0 };
        let [a, b, c, d] = self.ifindex.to_be_bytes();
        (MacAddr([COMMAND_PREFIX, action, a, b, c, d]), self.far)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_steering_writes_is_read_back() {
        let far = MacAddr([2, 0, 0, 0, 0, 9]);
        let source = Origin::encode(0x0102_0304, Hook::Egress, Direction::Reply);
        assert_eq!(source.0, [6, 3, 1, 2, 3, 4]);
        assert_eq!(
            Origin::decode(far, source),
            Some(Origin::Steered {
                ifindex: 0x0102_0304,
                hook: Hook::Egress,
                direction: Direction::Reply,
                far
            })
        );
    }

    #[test]
    fn a_command_carries_action_mark_and_device() {
        let far = MacAddr([2, 0, 0, 0, 0, 9]);
        let command = Command {
            action: Action::Neigh,
            ifindex: 7,
            far,
            mark: true,
        };
        assert_eq!(command.encode(), (MacAddr([6, 0x85, 0, 0, 0, 7]), far));
    }
}
