//! `lab bench`: the wire path and the pod path, once with sluice and once with kernel nftables NAT, in the same run.
//!
//! All parties share the machine's cores: generator, nodes, pods. Absolute numbers say little about real hardware, the
//! ratio of two measured side by side says something. Rounds alternate, and the median of each side counts.
//!
//! Rule to keep: a packet that arrives wrong makes the run fail, whatever its speed.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use comfy_table::{Table, presets};
use serde_json::Value;
use socket2::SockRef;

use crate::client::Connection;
use crate::demo::start_both;
use crate::namespace::{Namespace, text};
use crate::plan::{Family, POD_PORT, Service, Site, address, pod, services};
use crate::server::Servers;
use crate::sluice::Settings;
use crate::topology::{Lab, Options};
use crate::{kernel, manifests, sluice};

/// How to measure.
#[derive(Clone, Debug)]
pub struct Bench {
    /// How to lay the lab out.
    pub options: Options,
    /// How to run the binary.
    pub settings: Settings,
    /// How often each side is measured.
    pub rounds: u32,
    /// How long each measurement takes.
    pub seconds: f64,
}

/// One number.
#[derive(Clone, Debug)]
struct Measured {
    name: &'static str,
    unit: &'static str,
    /// Whether less is better.
    is_time: bool,
    value: f64,
    note: String,
}

/// Measures both sides and prints the ratios.
pub fn run(bench: &Bench, out: &mut dyn std::io::Write) -> Result<()> {
    let mut lab = Lab::new(&bench.options)?;
    lab.stop_servers();
    manifests::write_all(&sluice::manifests(&lab))?;
    let (mut of_kernel, mut of_sluice) = (Vec::new(), Vec::new());
    for _ in 0..bench.rounds {
        forget_connections(&lab)?;
        kernel::serve(&lab)?;
        of_kernel.push(measure(&lab, bench).context("with nftables")?);
        kernel::remove(&lab)?;
        forget_connections(&lab)?;
        let nodes = start_both(&lab, &bench.settings)?;
        let measured = measure(&lab, bench).context("with sluice");
        if measured.is_err() {
            nodes
                .iter()
                .for_each(|node| eprintln!("{}", node.log_tail()));
        }
        of_sluice.push(measured?);
        for node in nodes {
            node.stop()?;
        }
    }
    writeln!(out, "{}", table(&of_kernel, &of_sluice))?;
    let Bench {
        rounds, seconds, ..
    } = bench;
    let Options { queues, tx_off } = bench.options;
    writeln!(
        out,
        "median of {rounds} rounds of {seconds} s, {queues} queues, checksum offload {}",
        if tx_off { "off" } else { "on" }
    )?;
    Ok(())
}

/// Each side starts without the other's entries in conntrack: a plain one and a translated one of the same ports are in
/// each other's way.
fn forget_connections(lab: &Lab) -> Result<()> {
    for node in [Site::N1, Site::N2] {
        lab.at(node).output("conntrack", &["-F"])?;
    }
    Ok(())
}

fn measure(lab: &Lab, bench: &Bench) -> Result<Vec<Measured>> {
    let family = Family::V4;
    let node_port = |name| service(name).at_node(Site::N1, family);
    let cluster_ip = service("n1b").at_cluster_ip(family);
    let (client, n1a, n1b, n2a) = (Site::Client, site("n1a"), site("n1b"), site("n2a"));
    let packets = |name, from, target, to, masqueraded| {
        packets(lab, bench, name, (from, target), (to, masqueraded))
    };
    Ok(vec![
        packets(
            "wire: 60 B UDP, NodePort -> pod here",
            client,
            node_port("n1a"),
            n1a,
            false,
        )?,
        packets(
            "wire: 60 B UDP, NodePort -> pod on n2",
            client,
            node_port("n2a"),
            n2a,
            true,
        )?,
        packets(
            "pod: 60 B UDP, ClusterIP -> pod here",
            n1a,
            cluster_ip,
            n1b,
            false,
        )?,
        streams(lab, bench, "pod: TCP, 1 stream", cluster_ip, 1)?,
        streams(lab, bench, "pod: TCP, 4 streams", cluster_ip, 4)?,
        ping_pong(lab, bench, "pod: TCP ping-pong, p50", cluster_ip)?,
    ])
}

/// Small packets as fast as the generator goes; what arrives counts.
fn packets(
    lab: &Lab,
    bench: &Bench,
    name: &'static str,
    (from, target): (Site, SocketAddr),
    (to, masqueraded): (Site, bool),
) -> Result<Measured> {
    let port = POD_PORT.to_string();
    let mut sink = lab.at(to).command(pktgen());
    sink.args(["sink", "--port", &port]).stdout(Stdio::piped());
    let mut sink = sink.spawn().context("start the sink")?;
    let mut lines = BufReader::new(sink.stdout.take().context("the sink's output")?).lines();
    lines.next().context("the sink ended")??;
    let mut generator = lab.at(from).command(pktgen());
    generator.args([
        "send",
        "--target",
        &target.to_string(),
        "--arrive-at",
        &port,
    ]);
    generator.args(["--seconds", &bench.seconds.to_string()]);
    if masqueraded {
        generator.arg("--masqueraded");
    }
    let sent: Value = serde_json::from_str(&text(generator)?)?;
    let seen: Value = serde_json::from_str(&lines.next().context("the sink says nothing")??)?;
    ensure!(sink.wait()?.success(), "the sink failed");
    let count = |key: &str| {
        seen[key]
            .as_u64()
            .with_context(|| format!("the sink's {key}"))
    };
    ensure!(count("received")? > 0, "{name}: nothing arrived of {sent}");
    let wrong = count("misdelivered")? + count("wrongChecksum")?;
    ensure!(wrong == 0, "{name}: {wrong} packets arrived wrong: {seen}");
    let value = seen["packetsPerSecond"]
        .as_f64()
        .context("the sink's rate")?
        / 1000.0;
    let note = format!("{} of {} arrived", seen["received"], sent["sent"]);
    Ok(Measured {
        name,
        unit: "kpps",
        is_time: false,
        value,
        note,
    })
}

/// Bytes that a pod takes over so many connections.
fn streams(
    lab: &Lab,
    bench: &Bench,
    name: &'static str,
    target: SocketAddr,
    count: usize,
) -> Result<Measured> {
    let drain = Drain::start(lab.at(site("n1b")), address(site("n1b"), Family::V4))?;
    let stop = Arc::<AtomicBool>::default();
    let mut threads: Vec<JoinHandle<Result<()>>> = Vec::new();
    for _ in 0..count {
        let stop = Arc::clone(&stop);
        threads.push(
            lab.at(site("n1a"))
                .spawn("pour", move || pour(target, &stop))?,
        );
    }
    let (start, before) = (Instant::now(), drain.taken.load(Ordering::Relaxed));
    sleep(Duration::from_secs_f64(bench.seconds));
    let (taken, took) = (
        drain.taken.load(Ordering::Relaxed) - before,
        start.elapsed(),
    );
    stop.store(true, Ordering::Relaxed);
    for thread in threads {
        thread
            .join()
            .expect("a client does not panic")
            .context(name)?;
    }
    let value = as_float(taken) * 8.0 / took.as_secs_f64() / 1e9;
    Ok(Measured {
        name,
        unit: "Gb/s",
        is_time: false,
        value,
        note: String::new(),
    })
}

/// One byte there and back, again and again.
fn ping_pong(lab: &Lab, bench: &Bench, name: &'static str, target: SocketAddr) -> Result<Measured> {
    let pod = site("n1b");
    let mut servers = Servers::default();
    servers.add(
        lab.at(pod),
        pod.name(),
        SocketAddr::new(address(pod, Family::V4), POD_PORT),
    )?;
    let length = Duration::from_secs_f64(bench.seconds);
    let mut times = lab.at(site("n1a")).run(|| {
        let mut connection = Connection::open(target, Duration::from_secs(3))?;
        let (start, mut times) = (Instant::now(), Vec::new());
        while start.elapsed() < length {
            times.push(connection.echo(1, 1)?.took);
        }
        anyhow::Ok(times)
    })?;
    times.sort();
    let value = times[times.len() / 2].as_secs_f64() * 1e6;
    let note = format!("p99 {} us", times[times.len() * 99 / 100].as_micros());
    Ok(Measured {
        name,
        unit: "us",
        is_time: true,
        value,
        note,
    })
}

fn pour(target: SocketAddr, stop: &AtomicBool) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(3))?;
    let bytes = vec![0x5a; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        stream.write_all(&bytes)?;
    }
    Ok(())
}

/// A server that takes everything and says nothing.
struct Drain {
    taken: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drain {
    fn start(namespace: &Namespace, ip: std::net::IpAddr) -> Result<Self> {
        let listener = namespace.run(|| TcpListener::bind((ip, POD_PORT)))?;
        SockRef::from(&listener).set_read_timeout(Some(PATIENCE))?;
        let (taken, stop) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (counted, stopped) = (Arc::clone(&taken), Arc::clone(&stop));
        let thread = namespace.spawn("drain", move || {
            let mut readers = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let Ok((mut stream, _)) = listener.accept() else {
                    continue;
                };
                // It has the listener's, which is there to look at `stop` now and then.
                if stream.set_read_timeout(None).is_err() {
                    continue;
                }
                let counted = Arc::clone(&counted);
                readers.push(std::thread::spawn(move || {
                    let mut bytes = vec![0; CHUNK];
                    while let Ok(count @ 1..) = stream.read(&mut bytes) {
                        counted.fetch_add(count as u64, Ordering::Relaxed);
                    }
                }));
            }
            for reader in readers {
                drop(reader.join());
            }
        })?;
        Ok(Self {
            taken,
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Drain {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // A panic was printed by the thread itself.
            drop(thread.join());
        }
    }
}

fn table(of_kernel: &[Vec<Measured>], of_sluice: &[Vec<Measured>]) -> Table {
    let mut table = Table::new();
    table.load_style(presets::UTF8_BORDERS_ONLY);
    table.set_header([
        "path",
        "unit",
        "nft",
        "sluice",
        "ratio",
        "nft, last round",
        "sluice, last round",
    ]);
    for (at, first) in of_kernel.first().into_iter().flatten().enumerate() {
        let (nft, ours) = (median(of_kernel, at), median(of_sluice, at));
        // More than one is better for us, whatever is measured.
        let ratio = if first.is_time {
            nft / ours
        } else {
            ours / nft
        };
        let note = |side: &[Vec<Measured>]| {
            side.last()
                .map_or_else(String::new, |all| all[at].note.clone())
        };
        table.add_row([
            first.name.to_owned(),
            first.unit.to_owned(),
            format!("{nft:.1}"),
            format!("{ours:.1}"),
            format!("{ratio:.2}x"),
            note(of_kernel),
            note(of_sluice),
        ]);
    }
    table
}

fn median(rounds: &[Vec<Measured>], at: usize) -> f64 {
    let mut values: Vec<f64> = rounds.iter().map(|round| round[at].value).collect();
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn pktgen() -> PathBuf {
    std::env::current_exe()
        .unwrap_or_default()
        .with_file_name("pktgen")
}

fn service(name: &str) -> Service {
    let found = services().into_iter().find(|service| service.name == name);
    found.expect("the bench names Services of the plan")
}

fn site(name: &str) -> Site {
    pod(name).expect("the bench names pods of the plan")
}

#[expect(
    clippy::cast_precision_loss,
    reason = "bytes of a short run, far below 2^53"
)]
fn as_float(count: u64) -> f64 {
    count as f64
}

const CHUNK: usize = 256 * 1024;
const PATIENCE: Duration = Duration::from_millis(100);
