//! A small client of the API server: HTTP/1.1 over TLS, one connection, one request at a time, JSON both ways.
//!
//! It knows no kinds; callers name paths. A connection that the server has closed is opened again, and a request that got
//! no answer at all is sent once more.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use lab::Namespace;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;

use crate::authority::Authority;

/// Who speaks.
#[derive(Clone, Debug)]
pub enum Identity {
    /// The administrator, by certificate.
    Administrator,
    /// Whoever the token belongs to.
    Token(String),
}

/// A client.
#[derive(Debug)]
pub struct Api {
    namespace: Arc<Namespace>,
    server: SocketAddr,
    tls: Arc<ClientConfig>,
    token: Option<String>,
    stream: Option<Stream>,
}

type Stream = BufReader<StreamOwned<ClientConnection, TcpStream>>;

/// What the server answered.
#[derive(Clone, PartialEq, Debug)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body; null where it was no JSON.
    pub body: Value,
}

impl Api {
    /// A client that connects from a namespace.
    pub fn new(
        namespace: Arc<Namespace>,
        server: SocketAddr,
        authority: &Authority,
        identity: Identity,
    ) -> Result<Self> {
        let mut roots = RootCertStore::empty();
        roots.add(CertificateDer::from_pem_file(&authority.certificate)?)?;
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            .with_root_certificates(roots);
        let (tls, token) = match identity {
            Identity::Administrator => (with_certificate(builder, authority)?, None),
            Identity::Token(token) => (builder.with_no_client_auth(), Some(token)),
        };
        Ok(Self {
            namespace,
            server,
            tls: Arc::new(tls),
            token,
            stream: None,
        })
    }

    /// Sends a request and gives back whatever was answered.
    pub fn send(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Answer> {
        let kind = match method {
            "PATCH" => "application/merge-patch+json",
            _ => "application/json",
        };
        let text = body.map(Value::to_string).unwrap_or_default();
        let token = self
            .token
            .iter()
            .map(|token| format!("Authorization: Bearer {token}\r\n"));
        let request = format!(
            "{method} {path} HTTP/1.1\r\nHost: {}\r\nAccept: application/json\r\n{}Content-Type: {kind}\r\n\
             Content-Length: {}\r\n\r\n{text}",
            self.server,
            token.collect::<String>(),
            text.len()
        );
        let reused = self.stream.is_some();
        match self.exchange(&request) {
            Err(_) if reused => {
                self.stream = None;
                self.exchange(&request)
            }
            other => other,
        }
        .inspect_err(|_| self.stream = None)
        .with_context(|| format!("{method} {path}"))
    }

    /// Sends a request that must succeed.
    pub fn call(&mut self, method: &str, path: &str, body: Option<&Value>) -> Result<Value> {
        let answer = self.send(method, path, body)?;
        ensure!(
            (200..300).contains(&answer.status),
            "{method} {path}: {} {}\n{}",
            answer.status,
            answer.body["message"].as_str().unwrap_or_default(),
            body.map(Value::to_string).unwrap_or_default()
        );
        Ok(answer.body)
    }

    /// Reads one path.
    pub fn read(&mut self, path: &str) -> Result<Value> {
        self.call("GET", path, None)
    }

    /// Creates an object.
    pub fn create(&mut self, path: &str, object: &Value) -> Result<Value> {
        self.call("POST", path, Some(object))
    }

    fn exchange(&mut self, request: &str) -> Result<Answer> {
        if self.stream.is_none() {
            self.stream = Some(self.connect()?);
        }
        let stream = self.stream.as_mut().context("a stream was just made")?;
        stream.get_mut().write_all(request.as_bytes())?;
        stream.get_mut().flush()?;
        let (answer, closes) = read_answer(stream)?;
        if closes {
            self.stream = None;
        }
        Ok(answer)
    }

    fn connect(&self) -> Result<Stream> {
        let socket = self
            .namespace
            .run(|| TcpStream::connect_timeout(&self.server, Duration::from_secs(2)))?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(PATIENCE))?;
        let name = ServerName::IpAddress(self.server.ip().into());
        let session = ClientConnection::new(Arc::clone(&self.tls), name)?;
        Ok(BufReader::new(StreamOwned::new(session, socket)))
    }
}

fn with_certificate(
    builder: rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>,
    authority: &Authority,
) -> Result<ClientConfig> {
    let read = |path: &Path| CertificateDer::from_pem_file(path);
    let key = PrivateKeyDer::from_pem_file(&authority.client_key)?;
    Ok(builder.with_client_auth_cert(vec![read(&authority.client_certificate)?], key)?)
}

fn read_answer(stream: &mut Stream) -> Result<(Answer, bool)> {
    let first = read_line(stream)?;
    let status = first.split(' ').nth(1).context("no status line")?.parse()?;
    let (mut length, mut chunked, mut closes) = (0, false, false);
    loop {
        let line = read_line(stream)?.to_ascii_lowercase();
        match line.split_once(": ") {
            None => break,
            Some(("content-length", value)) => length = value.parse()?,
            Some(("transfer-encoding", value)) => chunked = value == "chunked",
            Some(("connection", value)) => closes = value == "close",
            Some(_) => {}
        }
    }
    let mut body = Vec::new();
    if chunked {
        loop {
            let size = usize::from_str_radix(&read_line(stream)?, 16)?;
            take(stream, size, &mut body)?;
            read_line(stream)?;
            if size == 0 {
                break;
            }
        }
    } else {
        take(stream, length, &mut body)?;
    }
    let body = serde_json::from_slice(&body).unwrap_or(Value::Null);
    Ok((Answer { status, body }, closes))
}

fn read_line(stream: &mut Stream) -> Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line)? == 0 {
        bail!("the server closed the connection");
    }
    Ok(line.trim_end().to_owned())
}

fn take(stream: &mut Stream, size: usize, body: &mut Vec<u8>) -> Result<()> {
    let start = body.len();
    body.resize(start + size, 0);
    Ok(stream.read_exact(&mut body[start..])?)
}

const PATIENCE: Duration = Duration::from_secs(20);
