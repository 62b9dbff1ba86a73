//! Asks the running sluice over its admin address: one GET in HTTP/1.0, the answer read to its end.
//! No TLS, no redirects, no reuse: the peer is our own admin server.

use std::io::{self, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::time::Duration;

use anyhow::{Context, bail};
use serde::de::DeserializeOwned;

/// What the server answered.
pub(crate) struct Answer {
    pub(crate) code: u16,
    pub(crate) body: String,
}

/// The object that the running sluice shows at `path`.
pub(crate) fn ask<T: DeserializeOwned>(address: &str, path: &str) -> anyhow::Result<T> {
    let answer = get(address, path).map_err(|error| explained(address, error))?;
    if answer.code != 200 {
        bail!(
            "sluice at {address} answered {path} with {}: {}",
            answer.code,
            answer.body.trim()
        );
    }
    serde_json::from_str(&answer.body).with_context(|| {
        format!(
            "what answers at {address} is no sluice of this version; name ours with --admin-address"
        )
    })
}

/// One GET.
pub(crate) fn get(address: &str, path: &str) -> io::Result<Answer> {
    let mut stream = connect(address)?;
    stream.set_read_timeout(Some(ANSWER_TIME))?;
    stream.set_write_timeout(Some(ANSWER_TIME))?;
    write!(
        stream,
        "GET {path} HTTP/1.0\r\nHost: {address}\r\nAccept: */*\r\n\r\n"
    )?;
    let mut text = Vec::new();
    stream.read_to_end(&mut text)?;
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "this is no HTTP"))
}

/// Tries each address that the name has.
fn connect(address: &str) -> io::Result<TcpStream> {
    let mut last = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for candidate in address.to_socket_addrs()? {
        match TcpStream::connect_timeout(&candidate, CONNECT_TIME) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn parse(text: &[u8]) -> Option<Answer> {
    let head_end = text.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = std::str::from_utf8(&text[..head_end]).ok()?;
    let code = head
        .strip_prefix("HTTP/1.")?
        .split(' ')
        .nth(1)?
        .parse()
        .ok()?;
    let body = String::from_utf8_lossy(&text[head_end + 4..]).into_owned();
    Some(Answer { code, body })
}

fn explained(address: &str, error: io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            "no sluice runs here; start it with `sluice run`, or name its address with \
             --admin-address"
        }
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => {
            "it does not answer in time; look at its log, or name another address with \
             --admin-address"
        }
        _ => "name the address of the running sluice with --admin-address",
    };
    anyhow::anyhow!("cannot ask sluice at {address}: {error}; {hint}")
}

const CONNECT_TIME: Duration = Duration::from_secs(3);
/// A million flows take a moment to write down.
const ANSWER_TIME: Duration = Duration::from_secs(30);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_split_into_code_and_body() {
        let answer = parse(b"HTTP/1.0 403 Forbidden\r\nA: b\r\n\r\nno\r\n\r\n").unwrap();
        assert_eq!((answer.code, answer.body.as_str()), (403, "no\r\n\r\n"));
        for wrong in [
            &b""[..],
            b"HTTP/1.0 200 OK\r\n",
            b"SSH-2.0\r\n\r\n",
            b"HTTP/1.1 x\r\n\r\n",
        ] {
            assert!(parse(wrong).is_none(), "{wrong:?}");
        }
    }
}
