//! Requests to the kernel's routing netlink (RFC 3549) and their answers.
//!
//! One request, one answer, on a socket of its own: this is for setting devices up, not for
//! following them. Numbers are in the host's byte order, attributes aligned to four bytes.

use std::io;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

/// A message under construction.
#[derive(Debug)]
pub(crate) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    /// A message about the link with this index (0: named by an attribute), which sets those of
    /// `set` (`IFF_*`) that are in `change`.
    pub(crate) fn link(kind: u16, ifindex: u32, set: i32, change: i32) -> Self {
        let mut request = Self { bytes: Vec::new() };
        request.push(&[0; 4]);
        request.push(&kind.to_ne_bytes());
        let flags = if kind == libc::RTM_GETLINK {
            REQUEST
        } else {
            REQUEST | ACKNOWLEDGE
        };
        request.push(&flags.to_ne_bytes());
        request.push(&[0; 8]);
        request.push(&[0; 4]);
        request.push(&ifindex.to_ne_bytes());
        request.push(&set.to_ne_bytes());
        request.push(&change.to_ne_bytes());
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
        let length = u32::try_from(self.bytes.len()).unwrap_or(u32::MAX);
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        let socket = rustix::net::socket_with(
            AddressFamily::NETLINK,
            SocketType::RAW,
            SocketFlags::CLOEXEC,
            None,
        )?;
        rustix::net::send(&socket, &self.bytes, SendFlags::empty())?;
        let mut answer = vec![0; ANSWER_SIZE];
        let (received, _) = rustix::net::recv(&socket, &mut answer, RecvFlags::empty())?;
        answer.truncate(received);
        parse(&answer)
    }

    fn push(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }
}

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

const ANSWER_SIZE: usize = 32 * 1024;
/// `NLM_F_REQUEST`.
const REQUEST: u16 = 1;
/// `NLM_F_ACK`.
const ACKNOWLEDGE: u16 = 4;
/// `NLMSG_ERROR`.
const ERROR: u16 = 2;
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
