//! What clients and servers say to each other: one line, then bytes that both can compute.
//!
//! ```text
//!   client  echo 512 77\n<512 bytes>      server  n1a 192.0.2.100:40000 10.244.1.10:8080 1f00.. 512\n<512 bytes>
//!           put 1048576 77\n<bytes>               n1a ... hash of what came ... 0\n
//!           get 1048576 77\n                      n1a ... 0 1048576\n<bytes>
//! ```
//!
//! The bytes follow from the seed, so each end checks all of them without having been told. The same text goes over TCP,
//! where `put` and `get` may be long, and in one datagram each way over UDP, where only `echo` is answered.
//!
//! Rule to keep: the server reports the source it saw, never what it was told.

use std::io::{self, BufRead, Read, Write};
use std::net::SocketAddr;

use anyhow::{Context as _, Result, bail, ensure};

/// What a client asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verb {
    /// The bytes follow and come back.
    Echo,
    /// The bytes follow; their hash comes back.
    Put,
    /// The bytes come back.
    Get,
}

/// The line a client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is asked for.
    pub verb: Verb,
    /// How many bytes.
    pub length: u64,
    /// Which bytes.
    pub seed: u64,
}

/// The line a server sends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// Who answered.
    pub server: String,
    /// The source address it saw.
    pub seen: SocketAddr,
    /// The address it was reached at.
    pub reached: SocketAddr,
    /// Hash of the bytes it received.
    pub hash: u64,
    /// How many bytes follow.
    pub length: u64,
}

impl Request {
    /// The line, with its end.
    #[must_use]
    pub fn line(&self) -> String {
        let verb = match self.verb {
            Verb::Echo => "echo",
            Verb::Put => "put",
            Verb::Get => "get",
        };
        format!("{verb} {} {}\n", self.length, self.seed)
    }

    /// Reads a line.
    pub fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [verb, length, seed] = words[..] else {
            bail!("not a request: {line:?}")
        };
        let verb = match verb {
            "echo" => Verb::Echo,
            "put" => Verb::Put,
            "get" => Verb::Get,
            other => bail!("unknown verb {other:?}"),
        };
        Ok(Self {
            verb,
            length: length.parse()?,
            seed: seed.parse()?,
        })
    }
}

impl Reply {
    /// The line, with its end.
    #[must_use]
    pub fn line(&self) -> String {
        let Self {
            server,
            seen,
            reached,
            hash,
            length,
        } = self;
        format!("{server} {seen} {reached} {hash:x} {length}\n")
    }

    /// Reads a line.
    pub fn parse(line: &str) -> Result<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [server, seen, reached, hash, length] = words[..] else {
            bail!("not a reply: {line:?}")
        };
        Ok(Self {
            server: server.to_owned(),
            seen: seen.parse().with_context(|| format!("source {seen:?}"))?,
            reached: reached
                .parse()
                .with_context(|| format!("destination {reached:?}"))?,
            hash: u64::from_str_radix(hash, 16)?,
            length: length.parse()?,
        })
    }
}

/// The bytes of one seed, in order.
#[derive(Clone, Debug)]
pub struct Payload {
    seed: u64,
    at: u64,
}

impl Payload {
    /// From the first byte.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self { seed, at: 0 }
    }

    /// The first `length` bytes.
    #[must_use]
    pub fn bytes(seed: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        Self::new(seed).fill(&mut bytes);
        bytes
    }

    /// The next bytes, as many as fit.
    pub fn fill(&mut self, buffer: &mut [u8]) {
        let mut rest = buffer;
        while !rest.is_empty() {
            let word = self.word().to_le_bytes();
            let from = usize::try_from(self.at % 8).expect("a remainder of eight fits");
            let take = rest.len().min(8 - from);
            let (now, later) = rest.split_at_mut(take);
            now.copy_from_slice(&word[from..from + take]);
            self.at += take as u64;
            rest = later;
        }
    }

    /// Whether these are the next bytes.
    pub fn matches(&mut self, bytes: &[u8]) -> bool {
        let mut expected = [0; 4096];
        bytes.chunks(expected.len()).all(|chunk| {
            let expected = &mut expected[..chunk.len()];
            self.fill(expected);
            expected == chunk
        })
    }

    /// splitmix64 over the word's number: position-dependent, so that a hole or a doubled piece shows.
    const fn word(&self) -> u64 {
        let mut z = self
            .seed
            .wrapping_add((self.at / 8).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
}

/// A hash over a stream, whatever pieces it comes in.
#[derive(Clone, Debug, Default)]
pub struct Hasher {
    state: u64,
    word: u64,
    length: u64,
}

impl Hasher {
    /// Takes the next bytes.
    pub fn write(&mut self, mut bytes: &[u8]) {
        while let Some((first, rest)) = bytes.split_first() {
            if self.length.is_multiple_of(8) && bytes.len() >= 8 {
                let (words, tail) = bytes.as_chunks::<8>();
                for word in words {
                    self.mix(u64::from_le_bytes(*word));
                }
                self.length += words.len() as u64 * 8;
                bytes = tail;
                continue;
            }
            self.word = self.word >> 8 | u64::from(*first) << 56;
            self.length += 1;
            if self.length.is_multiple_of(8) {
                self.mix(self.word);
                self.word = 0;
            }
            bytes = rest;
        }
    }

    /// The hash of all bytes so far.
    #[must_use]
    pub fn finish(&self) -> u64 {
        let mut last = self.clone();
        last.mix(last.word ^ last.length);
        last.state
    }

    const fn mix(&mut self, word: u64) {
        let mixed = (self.state ^ word).wrapping_mul(0xff51_afd7_ed55_8ccd);
        self.state = mixed ^ mixed.rotate_left(29);
    }
}

/// Hash of the first `length` bytes of a seed.
#[must_use]
pub fn hash_of(seed: u64, length: u64) -> u64 {
    let mut hasher = Hasher::default();
    let written = send_payload(&mut HashWriter(&mut hasher), seed, length);
    written.expect("a hasher takes everything");
    hasher.finish()
}

/// Writes the first `length` bytes of a seed.
pub fn send_payload(to: &mut impl Write, seed: u64, length: u64) -> io::Result<()> {
    let mut payload = Payload::new(seed);
    let mut buffer = vec![0; CHUNK];
    let mut left = length;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        payload.fill(&mut buffer[..now]);
        to.write_all(&buffer[..now])?;
        left -= now as u64;
    }
    Ok(())
}

/// Reads `length` bytes and hands them on in pieces.
pub fn receive_payload(
    from: &mut impl Read,
    length: u64,
    mut piece: impl FnMut(&[u8]),
) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK];
    let mut left = length;
    while left > 0 {
        let now = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        let count = from.read(&mut buffer[..now])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        piece(&buffer[..count]);
        left -= count as u64;
    }
    Ok(())
}

/// Reads one line; `None` at the end of the stream.
pub fn receive_line(from: &mut impl BufRead) -> Result<Option<String>> {
    let mut line = String::new();
    from.take(LINE_LIMIT).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    ensure!(line.ends_with('\n'), "a line without an end: {line:?}");
    Ok(Some(line))
}

/// Splits a datagram into its line and the bytes behind it.
pub fn split_datagram(datagram: &[u8]) -> Result<(&str, &[u8])> {
    let end = datagram
        .iter()
        .position(|byte| *byte == b'\n')
        .context("a datagram without a line")?;
    let (line, rest) = datagram.split_at(end + 1);
    Ok((std::str::from_utf8(line)?, rest))
}

struct HashWriter<'a>(&'a mut Hasher);

impl Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

const CHUNK: usize = 64 * 1024;
const LINE_LIMIT: u64 = 256;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_payload_is_the_same_whatever_pieces_it_is_made_in() {
        let whole = Payload::bytes(7, 1000);
        let mut pieces = vec![0; 1000];
        let mut payload = Payload::new(7);
        for piece in pieces.chunks_mut(13) {
            payload.fill(piece);
        }
        assert_eq!(whole, pieces);
        assert!(Payload::new(7).matches(&whole));
        assert!(!Payload::new(8).matches(&whole));
    }

    #[test]
    fn a_hash_is_the_same_whatever_pieces_it_is_made_of() {
        let bytes = Payload::bytes(3, 777);
        for size in [1, 5, 8, 100, 777] {
            let mut hasher = Hasher::default();
            bytes.chunks(size).for_each(|piece| hasher.write(piece));
            assert_eq!(hasher.finish(), hash_of(3, 777), "pieces of {size}");
        }
    }

    #[test]
    fn a_hash_tells_a_moved_byte() {
        let mut bytes = Payload::bytes(3, 777);
        bytes.swap(700, 701);
        let mut hasher = Hasher::default();
        hasher.write(&bytes);
        assert_ne!(hasher.finish(), hash_of(3, 777));
    }

    #[test]
    fn lines_read_back_as_written() {
        let request = Request {
            verb: Verb::Put,
            length: 9,
            seed: 1,
        };
        assert_eq!(Request::parse(&request.line()).unwrap(), request);
        let reply = Reply {
            server: "n1a".to_owned(),
            seen: "[2001:db8::100]:4000".parse().unwrap(),
            reached: "[fd00::1]:8080".parse().unwrap(),
            hash: 0xfe,
            length: 3,
        };
        assert_eq!(Reply::parse(&reply.line()).unwrap(), reply);
    }
}
