//! Who did the work: the demo's rows that ask the kernel and the engine, not the clients.
//!
//! Every number is compared with one that somebody else counted: conntrack, nftables, the veth driver and the TAP device
//! are the kernel's word, `sluice status` is the engine's.
//!
//! Rule to keep: a check that could not be made is wrong, never right.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use aya::maps::{Array, HashMap, Map, MapData, MapInfo};

use serde_json::Value;

use crate::plan::{Family, Site, load_balancer, node_addresses, services};
use crate::sluice::ask_json;
use crate::topology::Lab;

/// A check that was made on both nodes.
#[derive(Clone, Debug)]
pub struct Proof {
    /// Its name in `rows.txt`.
    pub name: &'static str,
    /// What was found, or what is wrong.
    pub verdict: std::result::Result<String, String>,
}

/// The names of all checks, in their order.
pub const NAMES: [&str; 9] = [
    "proof/no-nat-rule",
    "proof/no-conntrack-entry-of-a-vip",
    "proof/no-fallback",
    "proof/af-xdp",
    "proof/io-uring",
    "proof/hand-over",
    "proof/sums",
    "proof/identity",
    "proof/flows-end",
];

/// Makes all checks. The last one waits until the flows have timed out.
#[must_use]
pub fn all(lab: &Lab, binary: &Path) -> Vec<Proof> {
    let checks: [&dyn Fn(Site) -> Result<String>; NAMES.len()] = [
        &|node| no_nat_rule(lab, node),
        &|node| no_conntrack_entry(lab, node),
        &|node| no_fallback(&status(lab, node, binary)?),
        &|node| af_xdp(&status(lab, node, binary)?),
        &|node| io_uring(&status(lab, node, binary)?),
        &|node| hand_over(&status(lab, node, binary)?),
        &|node| sums(lab, node, binary),
        &|node| identity(&status(lab, node, binary)?),
        &|node| flows_end(lab, node, binary),
    ];
    let proofs = NAMES.iter().zip(checks);
    proofs
        .map(|(name, check)| Proof {
            name,
            verdict: on_both(check),
        })
        .collect()
}

/// `status -o json` of a node.
pub fn status(lab: &Lab, node: Site, binary: &Path) -> Result<Value> {
    ask_json(lab, node, binary, &["status"])
}

/// No table of the node translates addresses.
pub fn no_nat_rule(lab: &Lab, node: Site) -> Result<String> {
    let rules = lab.at(node).output("nft", &["list", "ruleset"])?;
    let words = ["type nat", "dnat", "snat", "masquerade", "redirect"];
    for line in rules.lines() {
        ensure!(
            !words.iter().any(|word| line.contains(word)),
            "nft has {:?}",
            line.trim()
        );
    }
    for program in ["iptables-save", "ip6tables-save"] {
        let rules = match lab.at(node).command(program).args(["-t", "nat"]).output() {
            Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
            Err(error) => bail!("{program}: {error}"),
        };
        let rule = rules.lines().find(|line| line.starts_with("-A"));
        ensure!(rule.is_none(), "{program} has {rule:?}");
    }
    Ok("none".to_owned())
}

/// Conntrack saw plain flows only, those of host processes left aside.
pub fn no_conntrack_entry(lab: &Lab, node: Site) -> Result<String> {
    let mut plain = 0;
    for family in ["ipv4", "ipv6"] {
        let table = lab.at(node).output("conntrack", &["-L", "-f", family])?;
        for line in table.lines() {
            let Some(entry) = Entry::parse(line) else {
                continue;
            };
            let of_host = node_addresses(node).contains(&entry.src) || entry.src.is_loopback();
            ensure!(
                of_host || !entry.to_frontend(node),
                "conntrack has {line:?}"
            );
            plain += 1;
        }
    }
    // An empty table would prove nothing: the plain flows must be there.
    ensure!(plain > 0, "conntrack has no entry at all");
    Ok(format!("{plain} plain entries"))
}

/// Native XDP and `io_uring`, nothing less.
pub fn no_fallback(status: &Value) -> Result<String> {
    let mut modes = Vec::new();
    for uplink in list(status, "/uplinks")? {
        let mode = uplink["xdp"].as_str().context("uplinks[].xdp")?;
        ensure!(
            matches!(mode, "zerocopy" | "copy"),
            "{} runs {mode} XDP",
            uplink["name"]
        );
        modes.push(mode);
    }
    ensure!(!modes.is_empty(), "no uplink");
    let io = status["hostPort"]["io"].as_str().context("hostPort.io")?;
    ensure!(io == "io_uring", "the host port runs {io}");
    Ok(format!("xdp {}, host port {io}", modes.join(" ")))
}

/// The uplinks' sockets moved packets both ways.
pub fn af_xdp(status: &Value) -> Result<String> {
    let (rx, tx) = (
        sum(status, "/uplinks", "rx")?,
        sum(status, "/uplinks", "tx")?,
    );
    ensure!(rx > 0 && tx > 0, "rx {rx}, tx {tx}");
    Ok(format!("rx {rx}, tx {tx}"))
}

/// The host port's rings completed something.
pub fn io_uring(status: &Value) -> Result<String> {
    let completions = number(&status["hostPort"], "completions")?;
    ensure!(completions > 0, "no completion");
    Ok(format!("{completions} completions"))
}

/// Packets changed workers, and none on the way got lost.
pub fn hand_over(status: &Value) -> Result<String> {
    let out = sum(status, "/workers", "handedOut")?;
    let taken = sum(status, "/workers", "handedIn")?;
    ensure!(out == taken, "handed out {out}, taken {taken}");
    let workers = list(status, "/workers")?.len();
    ensure!(out > 0 || workers == 1, "{workers} workers, no hand-over");
    Ok(format!("{out} packets"))
}

/// Each worker accounts for every packet.
pub fn identity(status: &Value) -> Result<String> {
    let mut packets = 0;
    for worker in list(status, "/workers")? {
        let given = number(worker, "received")? + number(worker, "handedIn")?;
        let mut taken = 0;
        for key in ["transmitted", "punted", "rejected", "held", "handedOut"] {
            taken += number(worker, key)?;
        }
        let dropped = worker["dropped"].as_object().context("workers[].dropped")?;
        taken += dropped.values().filter_map(Value::as_u64).sum::<u64>();
        ensure!(
            given == taken,
            "worker {}: {given} came, {taken} accounted for",
            worker["id"]
        );
        packets += given;
    }
    Ok(format!("{packets} packets"))
}

/// The engine's sums are those of the devices.
pub fn sums(lab: &Lab, node: Site, binary: &Path) -> Result<String> {
    let start = Instant::now();
    loop {
        // Packets in flight between two readings make a difference that goes away; a lost one stays.
        let found = compare_sums(lab, node, &status(lab, node, binary)?);
        if found.is_ok() || start.elapsed() > SETTLE {
            return found;
        }
        sleep(POLL);
    }
}

/// When the time-outs have passed there is no flow left, no backend with connections, and no tuple in the map that the
/// steering programs read.
pub fn flows_end(lab: &Lab, node: Site, binary: &Path) -> Result<String> {
    let start = Instant::now();
    loop {
        let flows = sum(&status(lab, node, binary)?, "/workers", "flows")?;
        let connections = connections(&ask_json(lab, node, binary, &["services"])?)?;
        let tuples = tuples(lab, node)?;
        if (flows, connections, tuples) == (0, 0, 0) {
            return Ok(format!("after {:.0} s", start.elapsed().as_secs_f32()));
        }
        ensure!(
            start.elapsed() < FLOWS_END,
            "after {FLOWS_END:?}: {flows} flows, {connections} connections, {tuples} tuples"
        );
        sleep(POLL);
    }
}

/// Connections that `services` counts at backends.
fn connections(services: &Value) -> Result<u64> {
    let mut count = 0;
    for service in list(services, "/services")? {
        for state in list(service, "/backendStates")? {
            count += number(state, "active")? + number(state, "inactive")?;
        }
    }
    Ok(count)
}

/// Fingerprints in the map that the steering programs read.
pub fn tuples(lab: &Lab, node: Site) -> Result<u64> {
    let buckets = Array::<_, [u64; 8]>::try_from(Map::Array(steering_map(lab, node, "tuples")?))?;
    let mut count = 0;
    for bucket in buckets.iter() {
        count += bucket?
            .iter()
            .filter(|fingerprint| **fingerprint != 0)
            .count() as u64;
    }
    Ok(count)
}

/// Numbers of the devices that the steering programs know.
pub fn devices(lab: &Lab, node: Site) -> Result<BTreeSet<u32>> {
    let map = Map::HashMap(steering_map(lab, node, "devices")?);
    let devices = HashMap::<_, u32, [u8; 12]>::try_from(map)?;
    devices.keys().map(|key| Ok(key?)).collect()
}

/// A map of the program that the uplink runs.
fn steering_map(lab: &Lab, node: Site, name: &str) -> Result<MapData> {
    let text = lab
        .at(node)
        .output("ip", &["-d", "-j", "link", "show", "dev", UPLINK])?;
    let links: Value = serde_json::from_str(&text)?;
    let id = links[0].pointer("/xdp/prog/id").and_then(Value::as_u64);
    let id = id.with_context(|| format!("{UPLINK} runs no XDP program"))?;
    let mut programs = aya::programs::loaded_programs().filter_map(Result::ok);
    let program = programs.find(|program| u64::from(program.id()) == id);
    let program = program.context("the uplink's program is not loaded")?;
    for map in program.map_ids()?.context("a program without maps")? {
        if MapInfo::from_id(map)?.name_as_str() == Some(name) {
            return Ok(MapData::from_id(map)?);
        }
    }
    bail!("the uplink's program has no map {name:?}")
}

fn on_both(check: &dyn Fn(Site) -> Result<String>) -> std::result::Result<String, String> {
    let mut found = Vec::new();
    for node in [Site::N1, Site::N2] {
        match check(node) {
            Ok(text) => found.push(format!("{}: {text}", node.name())),
            Err(error) => return Err(format!("{}: {error:#}", node.name())),
        }
    }
    Ok(found.join("; "))
}

/// What the devices counted before an engine was started: they live longer than it does.
#[derive(Clone, Copy, Debug, Default)]
pub struct Counted {
    redirected: u64,
    /// Of the host port: which device it was, received by and transmitted by the kernel.
    tap: (u64, u64, u64),
}

impl Counted {
    /// Reads the counters of the usual devices as they stand.
    #[must_use]
    pub fn now(lab: &Lab, node: Site) -> Self {
        // A device that is not there has counted nothing.
        let redirected = xdp_redirects(lab, node, UPLINK).unwrap_or_default();
        Self {
            redirected,
            tap: device_packets(lab, node, HOST_PORT).unwrap_or_default(),
        }
    }
}

fn compare_sums(lab: &Lab, node: Site, status: &Value) -> Result<String> {
    let before = lab.counted(node);
    let rx = sum(status, "/uplinks", "rx")?;
    let lost = sum(status, "/uplinks", "rxDropped")?;
    let mut redirected = 0;
    for uplink in list(status, "/uplinks")? {
        let device = uplink["name"].as_str().context("uplinks[].name")?;
        redirected += xdp_redirects(lab, node, device)?;
    }
    redirected -= before.redirected;
    ensure!(
        rx + lost == redirected,
        "AF_XDP rx {rx} + {lost} dropped, driver redirected {redirected}"
    );
    let host = &status["hostPort"];
    let (from_host, to_host) = (number(host, "received")?, number(host, "transmitted")?);
    let device = host["name"].as_str().context("hostPort.name")?;
    let (tap, mut tap_rx, mut tap_tx) = device_packets(lab, node, device)?;
    if tap == before.tap.0 {
        (tap_rx, tap_tx) = (tap_rx - before.tap.1, tap_tx - before.tap.2);
    }
    ensure!(
        from_host == tap_tx,
        "host port received {from_host}, TAP sent {tap_tx}"
    );
    ensure!(
        to_host == tap_rx,
        "host port transmitted {to_host}, TAP received {tap_rx}"
    );
    let received = sum(status, "/workers", "received")?;
    ensure!(
        received == rx + from_host,
        "workers received {received}, devices gave {rx} + {from_host}"
    );
    let tx = sum(status, "/uplinks", "tx")?;
    let mut sent = 0;
    for key in ["transmitted", "punted", "generated"] {
        sent += sum(status, "/workers", key)?;
    }
    ensure!(
        sent == tx + to_host,
        "workers sent {sent}, devices took {tx} + {to_host}"
    );
    Ok(format!("{received} in, {sent} out"))
}

/// Packets that the veth driver's XDP program redirected.
fn xdp_redirects(lab: &Lab, node: Site, device: &str) -> Result<u64> {
    let statistics = lab.at(node).output("ethtool", &["-S", device])?;
    let counts = statistics
        .lines()
        .filter_map(|line| line.trim().split_once(": "));
    let of_redirects =
        counts.filter(|(key, _)| key.starts_with("rx_queue_") && key.ends_with("_xdp_redirect"));
    of_redirects
        .map(|(_, count)| Ok(count.parse::<u64>()?))
        .sum()
}

/// Number, receive and transmit packets of a device, as the kernel sees them.
fn device_packets(lab: &Lab, node: Site, device: &str) -> Result<(u64, u64, u64)> {
    let text = lab
        .at(node)
        .output("ip", &["-s", "-j", "link", "show", "dev", device])?;
    let links: Value = serde_json::from_str(&text)?;
    let stats = &links[0]["stats64"];
    let (received, transmitted) = (&stats["rx"], &stats["tx"]);
    let index = number(&links[0], "ifindex")?;
    Ok((
        index,
        number(received, "packets")?,
        number(transmitted, "packets")?,
    ))
}

fn list<'a>(value: &'a Value, pointer: &str) -> Result<&'a Vec<Value>> {
    value
        .pointer(pointer)
        .and_then(Value::as_array)
        .with_context(|| format!("status has no {pointer}"))
}

fn number(value: &Value, key: &str) -> Result<u64> {
    value[key]
        .as_u64()
        .with_context(|| format!("no number {key}"))
}

fn sum(status: &Value, pointer: &str, key: &str) -> Result<u64> {
    list(status, pointer)?
        .iter()
        .map(|element| number(element, key))
        .sum()
}

/// The original direction of a conntrack entry.
#[derive(Debug)]
struct Entry {
    src: IpAddr,
    dst: IpAddr,
    dport: Option<u16>,
}

impl Entry {
    /// Reads a line of `conntrack -L`; the original direction comes first in it.
    fn parse(line: &str) -> Option<Self> {
        let first = |key: &str| {
            line.split_whitespace()
                .find_map(|word| word.strip_prefix(key))
        };
        Some(Self {
            src: first("src=")?.parse().ok()?,
            dst: first("dst=")?.parse().ok()?,
            dport: first("dport=").and_then(|port| port.parse().ok()),
        })
    }

    fn to_frontend(&self, node: Site) -> bool {
        let address = services().iter().any(|service| {
            let own_address = Family::ALL
                .iter()
                .any(|f| service.cluster_ip(*f) == self.dst);
            let own_port = Some(service.node_port()) == self.dport;
            own_address || own_port && node_addresses(node).contains(&self.dst)
        });
        address
            || Family::ALL
                .iter()
                .any(|family| load_balancer(*family) == self.dst)
    }
}

const UPLINK: &str = "eth0";
const HOST_PORT: &str = "sluice0";
const POLL: Duration = Duration::from_millis(100);
const SETTLE: Duration = Duration::from_secs(3);
const FLOWS_END: Duration = Duration::from_secs(90);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_conntrack_entry_to_a_node_port_is_told_from_a_plain_one() {
        let line = "tcp 6 59 TIME_WAIT src=192.0.2.100 dst=192.0.2.11 sport=4000 dport=30011 \
                    src=10.244.1.10 dst=192.0.2.100 sport=8080 dport=4000 [ASSURED]";
        assert!(Entry::parse(line).unwrap().to_frontend(Site::N1));
        let plain = line
            .replace("dst=192.0.2.11", "dst=10.244.1.10")
            .replace("30011", "8080");
        assert!(!Entry::parse(&plain).unwrap().to_frontend(Site::N1));
    }

    #[test]
    fn a_worker_that_lost_a_packet_breaks_the_identity() {
        let mut status = serde_json::json!({ "workers": [{
            "id": 0, "received": 5, "handedIn": 1, "handedOut": 1, "transmitted": 2, "punted": 1,
            "rejected": 0, "dropped": { "no_flow": 1 }, "held": 1,
        }]});
        assert!(identity(&status).is_ok());
        status["workers"][0]["received"] = 6.into();
        assert!(identity(&status).is_err());
    }
}
