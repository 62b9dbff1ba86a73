//! A traffic generator and its sink, over `AF_PACKET`, each in a network namespace or on a host of its own.
//!
//! The generator sends UDP packets of one size over a number of flows. Each packet carries what the sink must see: flow,
//! sequence number, the source the packet is to arrive with and the port it is to arrive at. So the sink counts loss,
//! order, misdelivery and wrong checksums without having been told anything.
//!
//! ```text
//!   payload, big-endian:  magic u16 | source port u16 | flow u32 | sequence u32 | source address, folded, u32 | port u16
//! ```
//!
//! A folded address of 0 stands for any source: for paths that masquerade.
//!
//! Link addresses are nobody's argument: the generator lets the kernel send one datagram to the target and takes the frame's
//! header from it.
//!
//! It does not answer, resolve or retransmit anything. RFC 768, RFC 791 and RFC 8200 give the headers.

#![forbid(unsafe_code)]

use std::collections::HashMap;
use std::io::{IoSlice, Write as _, stdout};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args, Parser, Subcommand};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, MMsgHdr, Protocol, RecvFlags, SendAncillaryBuffer, SendFlags, SocketAddrAny,
    SocketFlags, SocketType, recv, recvfrom, sendmmsg, socket_with, sockopt,
};
use serde_json::json;

#[derive(Debug, Parser)]
#[command(about = "UDP packets that know where they must arrive, and their sink")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Send packets; prints what was sent as JSON
    Send(Sending),
    /// Count packets until none came for a while; prints a line when it listens, and what was seen as JSON
    Sink(Sinking),
}

#[derive(Debug, Args)]
struct Sending {
    /// Where to send, as ADDRESS:PORT
    #[arg(long)]
    target: SocketAddr,
    /// The port at which packets must arrive
    #[arg(long)]
    arrive_at: u16,
    /// Packets arrive with another source than they are sent with
    #[arg(long)]
    masqueraded: bool,
    /// Flows, each with a source port of its own
    #[arg(long, default_value_t = 256)]
    flows: u16,
    /// Bytes of a whole frame, without its checksum
    #[arg(long, default_value_t = 60)]
    size: usize,
    /// Packets a second; 0: as fast as it goes
    #[arg(long, default_value_t = 0)]
    rate: u64,
    /// How long
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
}

#[derive(Debug, Args)]
struct Sinking {
    /// The port at which packets arrive
    #[arg(long)]
    port: u16,
    /// Ends when nothing came for so long, once something came
    #[arg(long, default_value_t = 0.5)]
    idle_seconds: f64,
    /// Ends when nothing came at all
    #[arg(long, default_value_t = 10.0)]
    first_seconds: f64,
}

fn main() -> Result<()> {
    let report = match Arguments::parse().command {
        Command::Send(sending) => send(&sending)?,
        Command::Sink(sinking) => sink(&sinking)?,
    };
    writeln!(stdout(), "{report}")?;
    Ok(())
}

// Generator.

fn send(sending: &Sending) -> Result<serde_json::Value> {
    let route = Route::probe(sending.target)?;
    let socket = packet_socket(0)?;
    let mut frames = (0..sending.flows)
        .map(|flow| frame(sending, &route, flow))
        .collect::<Result<Vec<_>>>()?;
    let payload = frames[0].len() - sending.payload_length()?;
    let (start, mut sent, mut sequence) = (Instant::now(), 0_u64, 0_u32);
    let length = Duration::from_secs_f64(sending.seconds);
    while start.elapsed() < length {
        for batch in frames.chunks_mut(BATCH) {
            for frame in batch.iter_mut() {
                set_sequence(frame, payload, sequence);
            }
            send_batch(&socket, batch, &route.address)?;
            sent += batch.len() as u64;
            pace(start, sent, sending.rate);
        }
        sequence += 1;
    }
    let seconds = start.elapsed().as_secs_f64();
    Ok(json!({
        "sent": sent,
        "flows": sending.flows,
        "perFlow": sequence,
        "seconds": seconds,
        "packetsPerSecond": (as_float(sent) / seconds).round(),
    }))
}

/// How frames to a target leave: device and link addresses, as the kernel would have it.
struct Route {
    address: SocketAddrAny,
    ethernet: [u8; ETHERNET],
    source: IpAddr,
}

impl Route {
    /// Lets the kernel send a datagram and reads its frame. The first may still wait for the neighbour, so a few are sent.
    fn probe(target: SocketAddr) -> Result<Self> {
        let any = if target.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let probe = UdpSocket::bind(any)?;
        probe
            .connect(target)
            .with_context(|| format!("no route to {target}"))?;
        let own = probe.local_addr()?;
        let socket = packet_socket(ETH_P_ALL)?;
        sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(PROBE_PATIENCE))?;
        for _ in 0..PROBES {
            probe
                .send(PROBE)
                .with_context(|| format!("send to {target}"))?;
            let start = Instant::now();
            while start.elapsed() < PROBE_PATIENCE {
                let mut frame = [0; 256];
                let (_, count, from) = match recvfrom(&socket, &mut frame[..], RecvFlags::empty()) {
                    Err(Errno::AGAIN) => break,
                    received => received?,
                };
                let (Some(address), Some(ethernet)) = (from, frame.first_chunk::<ETHERNET>())
                else {
                    continue;
                };
                if frame[..count].ends_with(PROBE) {
                    return Ok(Self {
                        address,
                        ethernet: *ethernet,
                        source: own.ip(),
                    });
                }
            }
        }
        bail!("no datagram to {target} left this host: is its next hop there?")
    }
}

impl Sending {
    fn headers(&self) -> usize {
        ETHERNET + if self.target.is_ipv4() { IPV4 } else { IPV6 } + UDP
    }

    fn payload_length(&self) -> Result<usize> {
        let least = self.headers() + PAYLOAD;
        // A minimal IPv4 frame holds the payload exactly; an IPv6 one is longer by itself.
        let size = self.size.max(if self.target.is_ipv4() { 0 } else { least });
        ensure!(
            size >= least && size <= 1514,
            "a frame of {size} bytes: at least {least}, at most 1514"
        );
        Ok(size - self.headers())
    }
}

/// A whole frame of a flow; the sequence number is filled in later, and the checksum with it.
fn frame(sending: &Sending, route: &Route, flow: u16) -> Result<Vec<u8>> {
    let length = sending.payload_length()?;
    let source_port = FIRST_PORT + flow;
    let mut payload = vec![0; length];
    payload[..2].copy_from_slice(&MAGIC.to_be_bytes());
    payload[2..4].copy_from_slice(&source_port.to_be_bytes());
    payload[4..8].copy_from_slice(&u32::from(flow).to_be_bytes());
    let seen = if sending.masqueraded {
        0
    } else {
        fold(route.source)
    };
    payload[12..16].copy_from_slice(&seen.to_be_bytes());
    payload[16..18].copy_from_slice(&sending.arrive_at.to_be_bytes());
    let mut datagram = Vec::new();
    datagram.extend(source_port.to_be_bytes());
    datagram.extend(sending.target.port().to_be_bytes());
    datagram.extend(u16::try_from(UDP + length)?.to_be_bytes());
    datagram.extend([0, 0]);
    datagram.extend(payload);
    let header = ip_header(route.source, sending.target.ip(), datagram.len())?;
    let addresses = &header[if sending.target.is_ipv4() { 12 } else { 8 }..];
    let sum = checksum(&[addresses, &pseudo_tail(datagram.len()), &datagram]);
    datagram[6..8].copy_from_slice(&sum.to_be_bytes());
    let mut frame = route.ethernet.to_vec();
    frame.extend(ip_header(
        route.source,
        sending.target.ip(),
        datagram.len(),
    )?);
    frame.extend(datagram);
    Ok(frame)
}

/// Changes the sequence number and, incrementally, the UDP checksum (RFC 1624).
fn set_sequence(frame: &mut [u8], payload: usize, sequence: u32) {
    let at = payload + 8;
    let old = [frame[at], frame[at + 1], frame[at + 2], frame[at + 3]];
    let new = sequence.to_be_bytes();
    frame[at..at + 4].copy_from_slice(&new);
    let field = payload - 2;
    let sum = !u16::from_be_bytes([frame[field], frame[field + 1]]);
    let mut total = u32::from(sum);
    for (old, new) in old.chunks(2).zip(new.chunks(2)) {
        total += u32::from(!u16::from_be_bytes([old[0], old[1]]));
        total += u32::from(u16::from_be_bytes([new[0], new[1]]));
    }
    let sum = finish(total);
    frame[field..field + 2].copy_from_slice(&sum.to_be_bytes());
}

fn send_batch(socket: &OwnedFd, frames: &[Vec<u8>], address: &SocketAddrAny) -> Result<()> {
    let slices: Vec<[IoSlice<'_>; 1]> = frames.iter().map(|frame| [IoSlice::new(frame)]).collect();
    let mut controls: Vec<SendAncillaryBuffer<'_, '_, '_>> = frames
        .iter()
        .map(|_| SendAncillaryBuffer::default())
        .collect();
    let mut messages: Vec<MMsgHdr<'_>> = slices
        .iter()
        .zip(&mut controls)
        .map(|(slice, control)| MMsgHdr::new_with_addr(address, slice, control))
        .collect();
    let mut done = 0;
    while done < messages.len() {
        match sendmmsg(socket, &mut messages[done..], SendFlags::empty()) {
            Ok(count) => done += count,
            Err(Errno::NOBUFS | Errno::AGAIN | Errno::INTR) => {}
            Err(error) => bail!("send: {error}"),
        }
    }
    Ok(())
}

/// Spins until it is time for packet number `sent`.
fn pace(start: Instant, sent: u64, rate: u64) {
    if rate > 0 {
        let due = Duration::from_secs_f64(as_float(sent) / as_float(rate));
        while start.elapsed() < due {
            std::hint::spin_loop();
        }
    }
}

// Sink.

/// What the sink has seen of one flow.
#[derive(Debug, Default)]
struct Seen {
    received: u64,
    next: u32,
    disordered: u64,
}

#[derive(Debug, Default)]
struct Counts {
    received: u64,
    bytes: u64,
    misdelivered: u64,
    wrong_checksum: u64,
    flows: HashMap<u32, Seen>,
}

fn sink(sinking: &Sinking) -> Result<serde_json::Value> {
    let socket = packet_socket(ETH_P_ALL)?;
    sockopt::set_socket_recv_buffer_size_force(&socket, 64 << 20).context("receive buffer")?;
    // A closed port would answer every packet by ICMP; this one swallows them.
    let _held = [
        UdpSocket::bind(("0.0.0.0", sinking.port)),
        UdpSocket::bind(("::", sinking.port)),
    ];
    let first = Duration::from_secs_f64(sinking.first_seconds);
    let idle = Duration::from_secs_f64(sinking.idle_seconds);
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(first))?;
    // Who starts a generator waits for this line.
    writeln!(stdout(), "ready")?;
    let mut counts = Counts::default();
    let mut span: Option<(Instant, Instant)> = None;
    let mut buffer = vec![0; 2048];
    loop {
        let count = match recv(&socket, buffer.as_mut_slice(), RecvFlags::empty()) {
            Ok((_, count)) => count,
            Err(Errno::AGAIN) => break,
            Err(Errno::INTR) => continue,
            Err(error) => bail!("receive: {error}"),
        };
        if !counts.take(&buffer[..count.min(buffer.len())]) {
            continue;
        }
        let now = Instant::now();
        if let Some((_, last)) = &mut span {
            *last = now;
        } else {
            span = Some((now, now));
            sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(idle))?;
        }
    }
    let seconds = span.map_or(0.0, |(first, last)| (last - first).as_secs_f64());
    Ok(counts.report(seconds))
}

impl Counts {
    /// Counts a frame; whether it was one of ours.
    fn take(&mut self, frame: &[u8]) -> bool {
        let Some(packet) = Packet::parse(frame) else {
            return false;
        };
        self.received += 1;
        self.bytes += frame.len() as u64;
        self.misdelivered += u64::from(!packet.arrived);
        self.wrong_checksum += u64::from(!packet.sum_is_right);
        let seen = self.flows.entry(packet.flow).or_default();
        seen.received += 1;
        seen.disordered += u64::from(packet.sequence < seen.next);
        seen.next = seen.next.max(packet.sequence + 1);
        true
    }

    fn report(&self, seconds: f64) -> serde_json::Value {
        let expected: u64 = self.flows.values().map(|seen| u64::from(seen.next)).sum();
        let disordered: u64 = self.flows.values().map(|seen| seen.disordered).sum();
        let rate = if seconds > 0.0 {
            (as_float(self.received) / seconds).round()
        } else {
            0.0
        };
        json!({
            "received": self.received,
            "bytes": self.bytes,
            "lost": expected.saturating_sub(self.received),
            "disordered": disordered,
            "misdelivered": self.misdelivered,
            "wrongChecksum": self.wrong_checksum,
            "flows": self.flows.len(),
            "seconds": seconds,
            "packetsPerSecond": rate,
        })
    }
}

/// What a frame of ours says, and whether the headers agree with it.
#[derive(Debug)]
struct Packet {
    flow: u32,
    sequence: u32,
    arrived: bool,
    sum_is_right: bool,
}

impl Packet {
    fn parse(frame: &[u8]) -> Option<Self> {
        let packet = frame.get(ETHERNET..)?;
        let (source, addresses, datagram) = match frame.get(12..14)? {
            [0x08, 0x00] if packet.get(9) == Some(&UDP_NUMBER) && packet[0] == 0x45 => {
                let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
                let source: [u8; 4] = packet.get(12..16)?.try_into().ok()?;
                (
                    IpAddr::from(source),
                    packet.get(12..20)?,
                    packet.get(IPV4..total)?,
                )
            }
            [0x86, 0xdd] if packet.get(6) == Some(&UDP_NUMBER) => {
                let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
                let source: [u8; 16] = packet.get(8..24)?.try_into().ok()?;
                (
                    IpAddr::from(source),
                    packet.get(8..40)?,
                    packet.get(IPV6..IPV6 + length)?,
                )
            }
            _ => return None,
        };
        let payload = datagram
            .get(UDP..)
            .filter(|payload| payload.len() >= PAYLOAD)?;
        let word = |at: usize| u16::from_be_bytes([payload[at], payload[at + 1]]);
        let double = |at: usize| u32::from(word(at)) << 16 | u32::from(word(at + 2));
        if word(0) != MAGIC {
            return None;
        }
        let port = |at: usize| u16::from_be_bytes([datagram[at], datagram[at + 1]]);
        let any = double(12) == 0;
        let source_is_right = any || double(12) == fold(source) && word(2) == port(0);
        let tail = pseudo_tail(datagram.len());
        Some(Self {
            flow: double(4),
            sequence: double(8),
            arrived: source_is_right && word(16) == port(2),
            // A sum over a right datagram and its checksum is all ones. A checksum left to hardware that is not there
            // holds the sum of the pseudo-header alone (a veth passes such packets on).
            sum_is_right: checksum(&[addresses, &tail, datagram]) == 0
                || port(6) == !checksum(&[addresses, &tail]),
        })
    }
}

// Headers.

fn ip_header(source: IpAddr, target: IpAddr, length: usize) -> Result<Vec<u8>> {
    let mut header = Vec::new();
    match (source, target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => {
            header.extend([0x45, 0]);
            header.extend(u16::try_from(IPV4 + length)?.to_be_bytes());
            // No identification, don't fragment, 64 hops.
            header.extend([0, 0, 0x40, 0, 64, UDP_NUMBER, 0, 0]);
            header.extend(source.octets());
            header.extend(target.octets());
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
        }
        (IpAddr::V6(source), IpAddr::V6(target)) => {
            header.extend([0x60, 0, 0, 0]);
            header.extend(u16::try_from(length)?.to_be_bytes());
            header.extend([UDP_NUMBER, 64]);
            header.extend(source.octets());
            header.extend(target.octets());
        }
        _ => bail!("{source} and {target} are of two families"),
    }
    Ok(header)
}

/// What the UDP checksum covers beside addresses and datagram.
fn pseudo_tail(length: usize) -> [u8; 8] {
    let mut tail = [0, 0, 0, 0, 0, 0, 0, UDP_NUMBER];
    tail[..4].copy_from_slice(&u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    tail
}

/// RFC 1071 over parts of which all but the last have an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut total = 0_u32;
    for part in parts {
        let (words, rest) = part.as_chunks::<2>();
        total += words
            .iter()
            .map(|word| u32::from(u16::from_be_bytes(*word)))
            .sum::<u32>();
        total += rest.first().map_or(0, |byte| u32::from(*byte) << 8);
    }
    finish(total)
}

fn finish(mut total: u32) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    !u16::try_from(total).unwrap_or(u16::MAX)
}

/// An address in four bytes, never 0.
fn fold(address: IpAddr) -> u32 {
    let folded = match address {
        IpAddr::V4(address) => u32::from(address),
        IpAddr::V6(address) => {
            let words = address.octets();
            let (words, _) = words.as_chunks::<4>();
            words.iter().fold(0_u32, |all, word| {
                all.rotate_left(7) ^ u32::from_be_bytes(*word)
            })
        }
    };
    if folded == 0 {
        u32::from(Ipv4Addr::BROADCAST)
    } else {
        folded
    }
}

fn packet_socket(protocol: u16) -> Result<OwnedFd> {
    let protocol = std::num::NonZeroU32::new(u32::from(protocol.to_be())).map(Protocol::from_raw);
    socket_with(
        AddressFamily::PACKET,
        SocketType::RAW,
        SocketFlags::CLOEXEC,
        protocol,
    )
    .context("a packet socket needs CAP_NET_RAW")
}

#[expect(
    clippy::cast_precision_loss,
    reason = "rates of a load run, far below 2^53"
)]
fn as_float(count: u64) -> f64 {
    count as f64
}

const ETHERNET: usize = 14;
const IPV4: usize = 20;
const IPV6: usize = 40;
const UDP: usize = 8;
const PAYLOAD: usize = 18;
const UDP_NUMBER: u8 = 17;
const ETH_P_ALL: u16 = 3;
const MAGIC: u16 = 0x51c3;
const FIRST_PORT: u16 = 2048;
const BATCH: usize = 64;
const PROBE: &[u8] = b"pktgen asks the way";
const PROBES: usize = 5;
const PROBE_PATIENCE: Duration = Duration::from_millis(300);

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(target: &str, source: &str, masqueraded: bool, size: usize) -> Vec<u8> {
        let target: SocketAddr = target.parse().unwrap();
        let sending = Sending {
            target,
            arrive_at: target.port(),
            masqueraded,
            flows: 1,
            size,
            rate: 0,
            seconds: 0.0,
        };
        let ethernet_type: [u8; 2] = if target.is_ipv4() {
            [8, 0]
        } else {
            [0x86, 0xdd]
        };
        let mut ethernet = [2; ETHERNET];
        ethernet[12..].copy_from_slice(&ethernet_type);
        let route = Route {
            address: SocketAddrAny::from(target),
            ethernet,
            source: source.parse().unwrap(),
        };
        let mut frame = frame(&sending, &route, 7).unwrap();
        let payload = frame.len() - sending.payload_length().unwrap();
        set_sequence(&mut frame, payload, 123_456_789);
        frame
    }

    #[test]
    fn the_sink_reads_what_the_generator_wrote() {
        for (target, source) in [
            ("203.0.113.1:80", "192.0.2.1"),
            ("[2001:db8::1]:80", "[2001:db8::2]"),
        ] {
            for size in [60, 61, 1514] {
                let packet =
                    Packet::parse(&sent(target, source.trim_matches(['[', ']']), false, size))
                        .unwrap();
                assert_eq!((packet.flow, packet.sequence), (7, 123_456_789));
                assert!(packet.arrived && packet.sum_is_right, "{target} {size}");
            }
        }
    }

    #[test]
    fn another_source_port_or_address_is_a_misdelivery_unless_masqueraded() {
        for (masqueraded, arrived) in [(false, false), (true, true)] {
            let mut frame = sent("203.0.113.1:80", "192.0.2.1", masqueraded, 60);
            frame[ETHERNET + 15] ^= 1;
            let packet = Packet::parse(&frame).unwrap();
            assert_eq!(packet.arrived, arrived);
            assert!(!packet.sum_is_right);
        }
    }

    #[test]
    fn a_hole_in_the_sequence_is_a_loss() {
        let mut counts = Counts::default();
        let frame = sent("203.0.113.1:80", "192.0.2.1", false, 60);
        assert!(counts.take(&frame));
        assert_eq!(counts.report(1.0)["lost"], 123_456_789);
    }
}
