//! Clients of the lab: one request a socket, counted; a kept connection; a long transfer; a ping.
//!
//! A client judges nothing. It says who answered, which source the server saw, what came back and how long it took; UDP is
//! asked once and never again. [`crate::rows`] knows what was to be expected.
//!
//! Rule to keep: every function here runs on the calling thread, which is inside the client's namespace.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{BufReader, Write as _};
use std::net::{IpAddr, SocketAddr, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use socket2::{Domain, Socket, Type};

use crate::exchange::{
    Hasher, Payload, Reply, Request, Verb, hash_of, receive_line, receive_payload, send_payload,
    split_datagram,
};
use crate::plan::Protocol;

/// An answered request.
#[derive(Clone, Debug)]
pub struct Answer {
    /// Who answered.
    pub server: String,
    /// The client's own address.
    pub own: SocketAddr,
    /// The source that the server saw.
    pub seen: SocketAddr,
    /// Payload bytes, both ways.
    pub bytes: u64,
    /// Whether every byte was right, at both ends.
    pub right: bool,
    /// From the first packet to the last byte.
    pub took: Duration,
}

/// What came of a number of requests.
#[derive(Clone, Debug, Default)]
pub struct Tally {
    /// Sent.
    pub requests: u64,
    /// Answered, rightly or not.
    pub answered: u64,
    /// Answered with wrong bytes.
    pub wrong: u64,
    /// Payload bytes, both ways.
    pub bytes: u64,
    /// Answers of each server.
    pub shares: BTreeMap<String, u64>,
    /// The sources each server saw; `None` stands for the client's own address.
    pub sources: BTreeMap<String, BTreeSet<Option<IpAddr>>>,
    /// Each answer's time, in the order of the answers.
    pub times: Vec<Duration>,
    /// Why the first one that failed did.
    pub failure: Option<String>,
}

/// How to ask.
#[derive(Clone, Copy, Debug)]
pub struct Asking {
    /// Which protocol.
    pub protocol: Protocol,
    /// Whom.
    pub target: SocketAddr,
    /// How long to wait for one answer.
    pub patience: Duration,
    /// The longest payload; requests use lengths up to it.
    pub longest: usize,
}

impl Tally {
    /// Takes the outcome of one request.
    pub fn add(&mut self, outcome: Result<Answer>) {
        self.requests += 1;
        let answer = match outcome {
            Ok(answer) => answer,
            Err(error) => {
                self.failure.get_or_insert_with(|| format!("{error:#}"));
                return;
            }
        };
        self.answered += 1;
        self.wrong += u64::from(!answer.right);
        self.bytes += answer.bytes;
        self.times.push(answer.took);
        *self.shares.entry(answer.server.clone()).or_default() += 1;
        let kept = answer.seen.ip() == answer.own.ip();
        let source = (!kept).then(|| answer.seen.ip());
        self.sources
            .entry(answer.server)
            .or_default()
            .insert(source);
    }

    /// Adds the outcome of other requests.
    pub fn merge(&mut self, other: Self) {
        self.requests += other.requests;
        self.answered += other.answered;
        self.wrong += other.wrong;
        self.bytes += other.bytes;
        self.times.extend(other.times);
        for (server, count) in other.shares {
            *self.shares.entry(server).or_default() += count;
        }
        for (server, sources) in other.sources {
            self.sources.entry(server).or_default().extend(sources);
        }
        self.failure = self.failure.take().or(other.failure);
    }

    /// The time that a share of the answers stayed under; zero without answers.
    #[must_use]
    pub fn percentile(&self, percent: usize) -> Duration {
        let mut times = self.times.clone();
        times.sort();
        let at = (times.len() * percent / 100).min(times.len().saturating_sub(1));
        times.get(at).copied().unwrap_or_default()
    }
}

/// Asks `count` times, one after the other, each from a port of its own. Gives up on a target that answers none of the
/// first requests: their time-outs would only add up.
#[must_use]
pub fn ask(asking: &Asking, count: u64) -> Tally {
    let mut tally = Tally::default();
    for number in 0..count {
        tally.add(ask_once(asking, number));
        if tally.requests - tally.answered >= GIVE_UP + tally.answered {
            break;
        }
    }
    tally
}

/// Asks once. `number` chooses the payload.
pub fn ask_once(asking: &Asking, number: u64) -> Result<Answer> {
    // Lengths run over the whole range, odd ones included: a checksum pads the last byte.
    let length = number.wrapping_mul(997) % (asking.longest as u64 + 1);
    match asking.protocol {
        Protocol::Tcp => Connection::open(asking.target, asking.patience)?.echo(length, number),
        Protocol::Udp => Datagrams::open(asking.target, asking.patience)?.echo(length, number),
    }
}

/// A TCP connection that may ask several times.
#[derive(Debug)]
pub struct Connection {
    input: BufReader<TcpStream>,
    output: TcpStream,
    opened: Option<Instant>,
}

impl Connection {
    /// Connects.
    pub fn open(target: SocketAddr, patience: Duration) -> Result<Self> {
        let opened = Some(Instant::now());
        let output = TcpStream::connect_timeout(&target, patience)
            .with_context(|| format!("connect to {target}"))?;
        output.set_nodelay(true)?;
        output.set_read_timeout(Some(patience))?;
        output.set_write_timeout(Some(patience))?;
        let input = BufReader::with_capacity(64 * 1024, output.try_clone()?);
        Ok(Self {
            input,
            output,
            opened,
        })
    }

    /// The client's end.
    pub fn own_address(&self) -> Result<SocketAddr> {
        Ok(self.output.local_addr()?)
    }

    /// Sends bytes and awaits them back. The time of the first answer includes that of connecting.
    pub fn echo(&mut self, length: u64, seed: u64) -> Result<Answer> {
        let start = self.opened.take().unwrap_or_else(Instant::now);
        let mut message = Request {
            verb: Verb::Echo,
            length,
            seed,
        }
        .line()
        .into_bytes();
        message.extend(Payload::bytes(seed, usize::try_from(length)?));
        self.output.write_all(&message).context("send a request")?;
        let reply = self.reply()?;
        let mut expected = Payload::new(seed);
        let mut right = reply.hash == hash_of(seed, length) && reply.length == length;
        receive_payload(&mut self.input, reply.length, |piece| {
            right &= expected.matches(piece)
        })
        .context("receive an answer")?;
        self.answer(reply, 2 * length, right, start)
    }

    /// Sends a long stream and compares the hash that comes back.
    pub fn put(&mut self, length: u64, seed: u64) -> Result<Answer> {
        let start = Instant::now();
        let request = Request {
            verb: Verb::Put,
            length,
            seed,
        };
        self.output.write_all(request.line().as_bytes())?;
        send_payload(&mut self.output, seed, length).context("send a stream")?;
        let reply = self.reply()?;
        let right = reply.hash == hash_of(seed, length);
        self.answer(reply, length, right, start)
    }

    /// Fetches a long stream and compares its hash.
    pub fn get(&mut self, length: u64, seed: u64) -> Result<Answer> {
        let start = Instant::now();
        let request = Request {
            verb: Verb::Get,
            length,
            seed,
        };
        self.output.write_all(request.line().as_bytes())?;
        let reply = self.reply()?;
        let mut hasher = Hasher::default();
        receive_payload(&mut self.input, reply.length, |piece| hasher.write(piece))
            .context("receive a stream")?;
        let right = hasher.finish() == hash_of(seed, length);
        self.answer(reply, length, right, start)
    }

    fn reply(&mut self) -> Result<Reply> {
        let line = receive_line(&mut self.input).context("await an answer")?;
        Reply::parse(&line.context("closed without an answer")?)
    }

    fn answer(&self, reply: Reply, bytes: u64, right: bool, start: Instant) -> Result<Answer> {
        let Reply { server, seen, .. } = reply;
        Ok(Answer {
            server,
            own: self.own_address()?,
            seen,
            bytes,
            right,
            took: start.elapsed(),
        })
    }
}

/// A UDP socket with one peer.
#[derive(Debug)]
pub struct Datagrams {
    socket: UdpSocket,
}

impl Datagrams {
    /// Connects, so that an answer from any other address is none.
    pub fn open(target: SocketAddr, patience: Duration) -> Result<Self> {
        let any = if target.is_ipv4() {
            "0.0.0.0:0"
        } else {
            "[::]:0"
        };
        let socket = UdpSocket::bind(any)?;
        socket
            .connect(target)
            .with_context(|| format!("connect to {target}"))?;
        socket.set_read_timeout(Some(patience))?;
        Ok(Self { socket })
    }

    /// Sends one datagram and awaits one.
    pub fn echo(&self, length: u64, seed: u64) -> Result<Answer> {
        let start = Instant::now();
        let mut message = Request {
            verb: Verb::Echo,
            length,
            seed,
        }
        .line()
        .into_bytes();
        message.extend(Payload::bytes(seed, usize::try_from(length)?));
        self.socket.send(&message).context("send a datagram")?;
        let mut buffer = vec![0; 64 * 1024];
        let count = self.socket.recv(&mut buffer).context("await a datagram")?;
        let (line, bytes) = split_datagram(&buffer[..count])?;
        let reply = Reply::parse(line)?;
        let right = reply.hash == hash_of(seed, length)
            && bytes.len() as u64 == length
            && Payload::new(seed).matches(bytes);
        Ok(Answer {
            server: reply.server,
            own: self.socket.local_addr()?,
            seen: reply.seen,
            bytes: 2 * length,
            right,
            took: start.elapsed(),
        })
    }
}

/// One ICMP echo; the time until its reply.
pub fn ping(target: IpAddr, number: u16, patience: Duration) -> Result<Duration> {
    // RFC 792 and RFC 4443 section 4: type, code, checksum, identifier, sequence number. The kernel's ping sockets
    // write identifier and checksum.
    let (domain, protocol, request, reply) = match target {
        IpAddr::V4(_) => (Domain::IPV4, socket2::Protocol::ICMPV4, 8, 0),
        IpAddr::V6(_) => (Domain::IPV6, socket2::Protocol::ICMPV6, 128, 129),
    };
    let socket = Socket::new(domain, Type::DGRAM, Some(protocol)).context("ping socket")?;
    socket.connect(&SocketAddr::new(target, 0).into())?;
    let socket = UdpSocket::from(socket);
    socket.set_read_timeout(Some(patience))?;
    let mut message = vec![request, 0, 0, 0, 0, 0];
    message.extend(number.to_be_bytes());
    message.extend(Payload::bytes(u64::from(number), 56));
    let start = Instant::now();
    socket.send(&message).context("send an echo request")?;
    let mut buffer = [0; 128];
    let count = socket.recv(&mut buffer).context("await an echo reply")?;
    ensure!(
        count == message.len() && buffer[0] == reply,
        "not an echo reply"
    );
    ensure!(
        buffer[6..count] == message[6..],
        "an echo reply with other bytes"
    );
    Ok(start.elapsed())
}

const GIVE_UP: u64 = 3;
