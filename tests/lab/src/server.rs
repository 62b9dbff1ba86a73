//! Servers of the lab: TCP and UDP, in every pod and on every node, one socket for each address family.
//!
//! Rule to keep: a server binds an address, not the wildcard, so that a reply leaves from the address that was asked and
//! nothing but the path under test chooses it.

use std::io::{BufReader, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context as _, Result};
use socket2::SockRef;

use crate::exchange::{
    Hasher, Reply, Request, Verb, receive_line, receive_payload, send_payload, split_datagram,
};
use crate::namespace::Namespace;

/// Running servers; dropping them ends their threads, so that their namespaces can go.
#[derive(Debug, Default)]
pub struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Servers {
    /// Serves `name` at `address` over TCP and, where asked, UDP. The sockets listen when this returns.
    pub fn add(&mut self, namespace: &Namespace, name: &str, address: SocketAddr) -> Result<()> {
        let (tcp, udp) = namespace
            .run(|| anyhow::Ok((TcpListener::bind(address)?, UdpSocket::bind(address)?)))
            .with_context(|| format!("bind {address} in {}", namespace.name()))?;
        // Accepting and reading time out, so that a thread looks at `stop` now and then.
        SockRef::from(&tcp).set_read_timeout(Some(PATIENCE))?;
        udp.set_read_timeout(Some(PATIENCE))?;
        let (server, stop) = (name.to_owned(), Arc::clone(&self.stop));
        self.threads
            .push(namespace.spawn(name, move || accept(&tcp, &server, &stop))?);
        let (server, stop) = (name.to_owned(), Arc::clone(&self.stop));
        self.threads
            .push(namespace.spawn(name, move || answer(&udp, &server, &stop))?);
        Ok(())
    }

    /// Waits for ever: the whole work of a process that only serves.
    pub fn wait(mut self) {
        for thread in self.threads.drain(..) {
            drop(thread.join());
        }
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // A panic of a server was printed by the thread itself.
            drop(thread.join());
        }
    }
}

fn accept(listener: &TcpListener, server: &str, stop: &Arc<AtomicBool>) {
    let mut connections: Vec<JoinHandle<()>> = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        connections.retain(|connection| !connection.is_finished());
        let Ok((stream, peer)) = listener.accept() else {
            continue;
        };
        let (server, stop) = (server.to_owned(), Arc::clone(stop));
        let connection = thread::Builder::new()
            .stack_size(256 * 1024)
            .spawn(move || {
                // A client that goes away in the middle is counted at its own end.
                drop(converse(stream, peer, &server, &stop));
            });
        connections.extend(connection);
    }
    for connection in connections {
        drop(connection.join());
    }
}

/// Answers requests until the client closes.
fn converse(stream: TcpStream, seen: SocketAddr, server: &str, stop: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let reached = stream.local_addr()?;
    let mut output = stream.try_clone()?;
    let mut input = BufReader::with_capacity(64 * 1024, Patient { stream, stop });
    while let Some(line) = receive_line(&mut input)? {
        let request = Request::parse(&line)?;
        let mut reply = Reply {
            server: server.to_owned(),
            seen,
            reached,
            hash: 0,
            length: request.length,
        };
        let mut hasher = Hasher::default();
        match request.verb {
            Verb::Echo => {
                let mut bytes = Vec::new();
                receive_payload(&mut input, request.length, |piece| bytes.extend(piece))?;
                hasher.write(&bytes);
                reply.hash = hasher.finish();
                // One write: a line alone would wait for its acknowledgement.
                let mut answer = reply.line().into_bytes();
                answer.extend(bytes);
                output.write_all(&answer)?;
            }
            Verb::Put => {
                receive_payload(&mut input, request.length, |piece| hasher.write(piece))?;
                reply.hash = hasher.finish();
                reply.length = 0;
                output.write_all(reply.line().as_bytes())?;
            }
            Verb::Get => {
                output.write_all(reply.line().as_bytes())?;
                send_payload(&mut output, request.seed, request.length)?;
            }
        }
    }
    Ok(())
}

fn answer(socket: &UdpSocket, server: &str, stop: &AtomicBool) {
    let mut buffer = vec![0; 64 * 1024];
    let Ok(reached) = socket.local_addr() else {
        return;
    };
    while !stop.load(Ordering::Relaxed) {
        let Ok((count, seen)) = socket.recv_from(&mut buffer) else {
            continue;
        };
        let Ok((line, bytes)) = split_datagram(&buffer[..count]) else {
            continue;
        };
        if Request::parse(line).is_err() {
            continue;
        }
        let mut hasher = Hasher::default();
        hasher.write(bytes);
        let reply = Reply {
            server: server.to_owned(),
            seen,
            reached,
            hash: hasher.finish(),
            length: bytes.len() as u64,
        };
        let mut answer = reply.line().into_bytes();
        answer.extend(bytes);
        // What cannot be sent is missed, and counted, by the client.
        drop(socket.send_to(&answer, seen));
    }
}

/// A stream whose reads wait as long as it takes, or until the servers are to stop.
struct Patient<'a> {
    stream: TcpStream,
    stop: &'a AtomicBool,
}

impl std::io::Read for Patient<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        loop {
            match self.stream.read(buffer) {
                Err(error)
                    if error.kind() == std::io::ErrorKind::WouldBlock
                        && !self.stop.load(Ordering::Relaxed) => {}
                other => return other,
            }
        }
    }
}

const PATIENCE: Duration = Duration::from_millis(100);
