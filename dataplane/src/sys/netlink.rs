//! Requests to the kernel's routing netlink (RFC 3549) and their answers.
//!
//! One request, one answer (or one list), on a socket of its own: this is for setting devices up,
//! not for following them. Numbers are in the host's byte order, attributes aligned to four bytes.

use std::io;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// A message under construction.
#[derive(Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A message about the link with this index (0: named by an attribute), which sets those of
    /// `flags` (`IFF_*`) that are in `change`.
    pub(crate) fn link(kind: u16, ifindex: u32, flags: i32, change: i32) -> Self {
        let acknowledged = if kind == libc::RTM_GETLINK { 0 } else { ACK };
        let mut request = Self::new(kind, acknowledged);
        request.push(&[0; 4]);
        request.push(&ifindex.to_ne_bytes());
        request.push(&flags.to_ne_bytes());
        request.push(&change.to_ne_bytes());
        request
    }

    /// A message about a queueing discipline or filter (`struct tcmsg`): of a device, with this
    /// handle, under this parent; `tcm_info` is a filter's priority and protocol.
    pub(crate) fn traffic(kind: u16, flags: u16, ifindex: u32, ids: TrafficIds) -> Self {
        let mut request = Self::new(kind, flags);
        request.push(&[0; 4]);
        request.push(&ifindex.to_ne_bytes());
        request.push(&ids.handle.to_ne_bytes());
        request.push(&ids.parent.to_ne_bytes());
        request.push(&ids.priority_and_protocol.to_ne_bytes());
        request
    }

    fn new(kind: u16, flags: u16) -> Self {
        let mut request = Self { bytes: Vec::new() };
        request.push(&[0; 4]);
        request.push(&kind.to_ne_bytes());
        request.push(&(REQUEST | flags).to_ne_bytes());
        request.push(&[0; 8]);
        request
    }

    /// Appends an attribute.
    pub(crate) fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.nested(kind, |request| request.push(value))
    }

    /// Appends an attribute whose value is what `fill` appends.
    pub(crate) fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) -> &mut Self {
        let start = self.bytes.len();
        self.push(&[0; 2]);
        self.push(&kind.to_ne_bytes());
        fill(self);
        let length = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        self
    }

    /// Sends it and returns the body of the answer, empty if it was an acknowledgement.
    pub(crate) fn send(&mut self) -> io::Result<Vec<u8>> {
        let socket = self.ask(0)?;
        let mut answer = vec![0; ANSWER_SIZE];
        let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
        answer.truncate(received);
        parse(&answer)
    }

    /// Sends it as a question for a list and returns the bodies of the answers.
    pub(crate) fn list(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let socket = self.ask(DUMP)?;
        let mut bodies = Vec::new();
        let mut answer = vec![0; ANSWER_SIZE];
        loop {
            let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
            for message in messages(answer.get(..received).unwrap_or_default()) {
                if message.get(4..6) == Some(&DONE.to_ne_bytes()) {
                    return Ok(bodies);
                }
                bodies.push(parse(message)?);
            }
        }
    }

    fn ask(&mut self, flags: u16) -> io::Result<rustix::fd::OwnedFd> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let asked = u16::from_ne_bytes([self.bytes[6], self.bytes[7]]) | flags;
        self.bytes[6..8].copy_from_slice(&asked.to_ne_bytes());
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::send(&socket, &self.bytes, SendFlags::empty())?;
        Ok(socket)
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
}

/// What a message about traffic control names besides the device.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct TrafficIds {
    /// The object's own number.
    pub(crate) handle: u32,
    /// What it is attached to.
    pub(crate) parent: u32,
    /// A filter's priority (high half) and protocol in network order (low half).
    pub(crate) priority_and_protocol: u32,
}

/// Length of `struct tcmsg`, which stands in front of a filter's attributes.
pub(crate) const TRAFFIC_HEADER: usize = 20;

/// Length of `struct ifinfomsg`, which stands in front of a link's attributes.
pub(crate) const LINK_HEADER: usize = 16;

/// The attributes in `bytes`, kind without the nesting bit, and value.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let [a, b, c, d] = *bytes.first_chunk()?;
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let kind = u16::from_ne_bytes([c, d]) & ATTRIBUTE_KIND;
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this kind.
pub(crate) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find_map(|(k, value)| (k == kind).then_some(value))
}

/// The messages of one datagram, each with its header.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = &[u8]> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?);
        let length = usize::try_from(length).ok().filter(|&l| l >= 16)?;
        let message = bytes.get(..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

fn parse(answer: &[u8]) -> io::Result<Vec<u8>> {
    let truncated = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let kind = answer.get(4..6).ok_or_else(truncated)?;
    let body = answer.get(16..).ok_or_else(truncated)?;
    if kind != ERROR.to_ne_bytes() {
        return Ok(body.to_vec());
    }
    match i32::from_ne_bytes(*body.first_chunk().ok_or_else(truncated)?) {
        0 => Ok(Vec::new()),
        code => Err(io::Error::from_raw_os_error(-code)),
    }
}

/// Flags of a message (`NLM_F_*`).
const REQUEST: u16 = 1;
pub(crate) const ACK: u16 = 4;
const DUMP: u16 = 0x300;
pub(crate) const EXCLUSIVE: u16 = 0x200;
pub(crate) const CREATE: u16 = 0x400;
/// Kinds of message (`NLMSG_*`).
const ERROR: u16 = 2;
const DONE: u16 = 3;
const ANSWER_SIZE: usize = 32 * 1024;
const ATTRIBUTE_KIND: u16 = 0x3fff;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let mut request = Request { bytes: Vec::new() };
        request.attribute(3, b"eth0\0").nested(26, |outer| {
            outer.attribute(10, &[1]);
        });
        let read: Vec<_> = attributes(&request.bytes).collect();
        assert_eq!(read[0], (3, &b"eth0\0"[..]));
        assert_eq!(attribute(read[1].1, 10), Some(&[1][..]));
    }

    #[test]
    fn a_truncated_attribute_ends_the_list() {
        assert_eq!(attributes(&[9, 0, 1, 0, 7]).count(), 0);
    }

    #[test]
    fn the_loopback_device_can_be_asked_for() {
        let body = Request::link(libc::RTM_GETLINK, 0, 0, 0)
            .attribute(libc::IFLA_IFNAME, b"lo\0")
            .send()
            .expect("every network namespace has it");
        let name = attribute(&body[LINK_HEADER..], libc::IFLA_IFNAME);
        assert_eq!(name, Some(&b"lo\0"[..]));
    }

    #[test]
    fn a_list_of_links_has_the_loopback_device() {
        let links = Request::link(libc::RTM_GETLINK, 0, 0, 0)
            .list()
            .expect("links can be listed");
        assert!(
            links
                .iter()
                .any(|l| attribute(&l[LINK_HEADER..], libc::IFLA_IFNAME) == Some(b"lo\0"))
        );
    }

    #[test]
    fn a_refusal_is_an_error_of_the_kernel() {
        let refused = Request::link(libc::RTM_GETLINK, 0, 0, 0)
            .attribute(libc::IFLA_IFNAME, b"nosuchdevice\0")
            .send();
        assert_eq!(
            refused.map_err(|e| e.raw_os_error()),
            Err(Some(libc::ENODEV))
        );
    }
}
