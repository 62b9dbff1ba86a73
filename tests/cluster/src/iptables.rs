//! Reads what `iptables-save` prints and walks a packet through it, without sending one.
//!
//! A walk follows every branch that chance could take, so its result is the set of all ends that the packet can have.
//! Only matches and targets that kube-proxy writes are known; any other word is an error, so that nothing is overlooked.
//! Rules of affinity (`-m recent --rcheck`) are taken as not matching: a walk is a client's first packet; their times are
//! collected beside.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use anyhow::{Context as _, Result, bail, ensure};

/// All rules of one family.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    chains: BTreeMap<(Table, String), Vec<Rule>>,
}

/// The tables that matter.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Table {
    /// Address translation.
    Nat,
    /// Refusal.
    Filter,
}

/// A packet that opens a connection.
#[derive(Clone, Debug)]
pub struct Packet<'a> {
    /// Its source.
    pub source: IpAddr,
    /// Its destination.
    pub destination: SocketAddr,
    /// In lower case.
    pub protocol: &'a str,
    /// The device that it came by; none for a process of the node itself.
    pub device: Option<&'a str>,
    /// The node's own addresses.
    pub local: &'a BTreeSet<IpAddr>,
}

/// How a packet can end.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum End {
    /// It goes to this backend, with the node's address as its source or with its own.
    Backend {
        /// The backend.
        to: SocketAddr,
        /// Whether its source is replaced.
        masquerade: bool,
    },
    /// An answer says that nobody listens.
    Rejected,
    /// Nothing is answered.
    Dropped,
    /// No rule takes it.
    Untouched,
}

/// One place where packets are taken.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Place {
    /// The address; none stands for every local one.
    pub address: Option<IpAddr>,
    /// The port.
    pub port: u16,
    /// In lower case.
    pub protocol: String,
}

#[derive(Clone, Debug, Default)]
struct Rule {
    matches: Vec<Match>,
    target: Option<Target>,
    affinity: Option<u64>,
}

#[derive(Clone, Debug)]
enum Match {
    Source(bool, IpAddr, u8),
    Destination(bool, IpAddr, u8),
    Device(bool, String),
    Protocol(String),
    Port(u16),
    SourceIsLocal,
    DestinationIsLocal,
    Mark(bool, u32, u32),
    Chance,
    /// Matches packets of other states than a first packet's.
    NotFirst,
}

#[derive(Clone, Debug)]
enum Target {
    Chain(String),
    Accept,
    Drop,
    Reject,
    Return,
    Masquerade,
    /// mark = (mark & !mask) ^ value
    Mark {
        value: u32,
        mask: u32,
    },
    Destination(SocketAddr),
}

#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Step {
    Through,
    Accept,
    Drop,
    Reject,
    Masquerade,
    To(SocketAddr),
}

impl Rules {
    /// Reads a listing.
    pub fn parse(text: &str) -> Result<Self> {
        let mut rules = Self::default();
        let mut table = None;
        for line in text.lines() {
            if let Some(name) = line.strip_prefix('*') {
                table = match name {
                    "nat" => Some(Table::Nat),
                    "filter" => Some(Table::Filter),
                    _ => None,
                };
            }
            let Some(table) = table else { continue };
            if let Some(declared) = line.strip_prefix(':') {
                let name = declared.split(' ').next().unwrap_or_default();
                rules.chains.entry((table, name.to_owned())).or_default();
            } else if let Some(rule) = line.strip_prefix("-A ") {
                let words = words(rule);
                let (chain, words) = words.split_first().context("a rule without a chain")?;
                let rule = Rule::parse(words).with_context(|| format!("rule {line}"))?;
                rules
                    .chains
                    .entry((table, chain.clone()))
                    .or_default()
                    .push(rule);
            }
        }
        Ok(rules)
    }

    /// Every end that the packet can have.
    pub fn walk(&self, packet: &Packet<'_>) -> Result<BTreeSet<End>> {
        let hook = if packet.device.is_some() {
            "PREROUTING"
        } else {
            "OUTPUT"
        };
        let mut ends = BTreeSet::new();
        for (step, mark) in self.chain(Table::Nat, hook, packet, 0, 0)? {
            let mut translated = packet.clone();
            if let Step::To(to) = step {
                translated.destination = to;
            }
            for (verdict, mark) in self.filtered(&translated, mark)? {
                let end = match (verdict, &step) {
                    (Step::Drop, _) => End::Dropped,
                    (Step::Reject, _) => End::Rejected,
                    (_, Step::To(to)) => {
                        let post = self.chain(Table::Nat, "POSTROUTING", &translated, mark, 0)?;
                        let masquerade = post.iter().any(|(step, _)| *step == Step::Masquerade);
                        End::Backend {
                            to: *to,
                            masquerade,
                        }
                    }
                    _ => End::Untouched,
                };
                ends.insert(end);
            }
        }
        Ok(ends)
    }

    /// What the filter makes of a packet: one of the node itself to the node itself goes out and comes in.
    fn filtered(&self, packet: &Packet<'_>, mark: u32) -> Result<BTreeSet<(Step, u32)>> {
        let comes_in = packet.local.contains(&packet.destination.ip());
        match (packet.device, comes_in) {
            (Some(_), true) => self.chain(Table::Filter, "INPUT", packet, mark, 0),
            (Some(_), false) => self.chain(Table::Filter, "FORWARD", packet, mark, 0),
            (None, false) => self.chain(Table::Filter, "OUTPUT", packet, mark, 0),
            (None, true) => {
                let mut ends = BTreeSet::new();
                for (step, mark) in self.chain(Table::Filter, "OUTPUT", packet, mark, 0)? {
                    match step {
                        Step::Drop | Step::Reject => _ = ends.insert((step, mark)),
                        _ => ends.extend(self.chain(Table::Filter, "INPUT", packet, mark, 0)?),
                    }
                }
                Ok(ends)
            }
        }
    }

    /// Every address and port that the rules take packets of, on purpose or to refuse them.
    #[must_use]
    pub fn places(&self) -> BTreeSet<Place> {
        let mut places = BTreeSet::new();
        let mut node_ports = BTreeSet::new();
        for (table, chain) in [
            (Table::Nat, "KUBE-SERVICES"),
            (Table::Filter, "KUBE-SERVICES"),
            (Table::Filter, "KUBE-EXTERNAL-SERVICES"),
            (Table::Filter, "KUBE-PROXY-FIREWALL"),
            (Table::Nat, "KUBE-NODEPORTS"),
        ] {
            for rule in self.rules(table, chain) {
                let Some(place) = rule.place() else { continue };
                if place.address.is_none() {
                    node_ports.insert(place);
                } else if chain != "KUBE-NODEPORTS" {
                    places.insert(place);
                }
            }
        }
        for address in self.node_port_addresses() {
            places.extend(node_ports.iter().map(|port| Place {
                address,
                ..port.clone()
            }));
        }
        places
    }

    /// Times of affinity that rules of a chain carry, over all chains whose rules lead to backends, by backend.
    #[must_use]
    pub fn affinities(&self) -> BTreeMap<SocketAddr, BTreeSet<u64>> {
        let mut found: BTreeMap<SocketAddr, BTreeSet<u64>> = BTreeMap::new();
        for rule in self.chains.values().flatten() {
            let (Some(seconds), Some(Target::Chain(chain))) = (rule.affinity, &rule.target) else {
                continue;
            };
            for end in self.rules(Table::Nat, chain) {
                if let Some(Target::Destination(to)) = &end.target {
                    found.entry(*to).or_default().insert(seconds);
                }
            }
        }
        found
    }

    /// Ports that health checks may reach.
    #[must_use]
    pub fn health_check_ports(&self) -> BTreeSet<u16> {
        let rules = self.rules(Table::Filter, "KUBE-NODEPORTS").iter();
        rules
            .filter_map(|rule| rule.place().map(|place| place.port))
            .collect()
    }

    fn rules(&self, table: Table, chain: &str) -> &[Rule] {
        self.chains
            .get(&(table, chain.to_owned()))
            .map_or(&[], Vec::as_slice)
    }

    fn node_port_addresses(&self) -> BTreeSet<Option<IpAddr>> {
        let jumps = self.rules(Table::Nat, "KUBE-SERVICES").iter().filter(
            |rule| matches!(&rule.target, Some(Target::Chain(chain)) if chain == "KUBE-NODEPORTS"),
        );
        jumps
            .map(|rule| {
                rule.matches.iter().find_map(|found| match found {
                    Match::Destination(true, ip, _) => Some(*ip),
                    _ => None,
                })
            })
            .collect()
    }

    fn chain(
        &self,
        table: Table,
        name: &str,
        packet: &Packet<'_>,
        mark: u32,
        depth: usize,
    ) -> Result<BTreeSet<(Step, u32)>> {
        ensure!(depth < 16, "chain {name} leads back to itself");
        let mut ends = BTreeSet::new();
        let mut open = BTreeSet::from([mark]);
        for rule in self.rules(table, name) {
            let mut still_open = BTreeSet::new();
            for mark in open {
                let (takes, leaves) = rule.meets(packet, mark);
                if leaves {
                    still_open.insert(mark);
                }
                if !takes {
                    continue;
                }
                match &rule.target {
                    None => _ = still_open.insert(mark),
                    Some(Target::Mark { value, mask }) => {
                        still_open.insert((mark & !mask) ^ value);
                    }
                    Some(Target::Return) => _ = ends.insert((Step::Through, mark)),
                    Some(Target::Accept) => _ = ends.insert((Step::Accept, mark)),
                    Some(Target::Drop) => _ = ends.insert((Step::Drop, mark)),
                    Some(Target::Reject) => _ = ends.insert((Step::Reject, mark)),
                    Some(Target::Masquerade) => _ = ends.insert((Step::Masquerade, mark)),
                    Some(Target::Destination(to)) => _ = ends.insert((Step::To(*to), mark)),
                    Some(Target::Chain(next)) => {
                        for (step, mark) in self.chain(table, next, packet, mark, depth + 1)? {
                            match step {
                                Step::Through => _ = still_open.insert(mark),
                                other => _ = ends.insert((other, mark)),
                            }
                        }
                    }
                }
            }
            open = still_open;
        }
        ends.extend(open.into_iter().map(|mark| (Step::Through, mark)));
        Ok(ends)
    }
}

impl Rule {
    fn parse(words: &[String]) -> Result<Self> {
        let mut rule = Self::default();
        let mut words = words.iter().map(String::as_str);
        let mut not = false;
        while let Some(word) = words.next() {
            let mut value = || {
                words
                    .next()
                    .with_context(|| format!("{word} without a value"))
            };
            let positive = !not;
            not = false;
            match word {
                "!" => not = true,
                "-s" | "-d" => {
                    let (ip, length) = network(value()?)?;
                    rule.matches.push(match word {
                        "-s" => Match::Source(positive, ip, length),
                        _ => Match::Destination(positive, ip, length),
                    });
                }
                "-i" => rule
                    .matches
                    .push(Match::Device(positive, value()?.to_owned())),
                "-p" if positive => rule.matches.push(Match::Protocol(value()?.to_owned())),
                "-m" | "--comment" | "--mode" | "--probability" | "--name" | "--mask"
                | "--reject-with" | "--nfacct-name" => {
                    if value()? == "statistic" {
                        rule.matches.push(Match::Chance);
                    }
                }
                "--dport" if positive => rule.matches.push(Match::Port(value()?.parse()?)),
                "--src-type" if positive => match value()? {
                    "LOCAL" => rule.matches.push(Match::SourceIsLocal),
                    other => bail!("source type {other}"),
                },
                "--dst-type" if positive => match value()? {
                    "LOCAL" => rule.matches.push(Match::DestinationIsLocal),
                    other => bail!("destination type {other}"),
                },
                "--mark" => {
                    let (value, mask) = masked(value()?)?;
                    rule.matches.push(Match::Mark(positive, value, mask));
                }
                "--ctstate" => {
                    let lists_new = value()?.split(',').any(|state| state == "NEW");
                    if lists_new != positive {
                        rule.matches.push(Match::NotFirst);
                    }
                }
                "--seconds" => rule.affinity = Some(value()?.parse()?),
                "--rcheck" => rule.matches.push(Match::NotFirst),
                "--set" | "--reap" | "--rsource" | "--random-fully" => {}
                "-j" => {
                    rule.target = Some(match value()? {
                        "ACCEPT" => Target::Accept,
                        "DROP" => Target::Drop,
                        "REJECT" => Target::Reject,
                        "RETURN" => Target::Return,
                        "MASQUERADE" => Target::Masquerade,
                        "MARK" | "DNAT" => continue,
                        chain => Target::Chain(chain.to_owned()),
                    });
                }
                "--set-xmark" => {
                    let (value, mask) = masked(value()?)?;
                    rule.target = Some(Target::Mark { value, mask });
                }
                "--to-destination" => rule.target = Some(Target::Destination(value()?.parse()?)),
                other => bail!("unknown word {other}"),
            }
        }
        Ok(rule)
    }

    /// Whether it can match, and whether it can fail to match.
    fn meets(&self, packet: &Packet<'_>, mark: u32) -> (bool, bool) {
        let mut by_chance = false;
        for found in &self.matches {
            let holds = match found {
                Match::Source(positive, ip, length) => {
                    within(packet.source, *ip, *length) == *positive
                }
                Match::Destination(positive, ip, length) => {
                    within(packet.destination.ip(), *ip, *length) == *positive
                }
                Match::Device(positive, name) => {
                    let is = packet
                        .device
                        .is_some_and(|device| match name.strip_suffix('+') {
                            Some(prefix) => device.starts_with(prefix),
                            None => device == name,
                        });
                    is == *positive
                }
                Match::Protocol(protocol) => protocol == packet.protocol,
                Match::Port(port) => *port == packet.destination.port(),
                Match::SourceIsLocal => packet.local.contains(&packet.source),
                Match::DestinationIsLocal => packet.local.contains(&packet.destination.ip()),
                Match::Mark(positive, value, mask) => (mark & mask == *value) == *positive,
                Match::Chance => {
                    by_chance = true;
                    true
                }
                Match::NotFirst => false,
            };
            if !holds {
                return (false, true);
            }
        }
        (true, by_chance)
    }

    fn place(&self) -> Option<Place> {
        let mut place = Place {
            address: None,
            port: 0,
            protocol: String::new(),
        };
        for found in &self.matches {
            match found {
                Match::Destination(true, ip, _) => place.address = Some(*ip),
                Match::Port(port) => place.port = *port,
                Match::Protocol(protocol) => place.protocol.clone_from(protocol),
                _ => {}
            }
        }
        (place.port != 0).then_some(place)
    }
}

/// Words of a line; quoted ones are one word.
fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quoted = false;
    for character in line.chars() {
        match character {
            '"' => quoted = !quoted,
            ' ' if !quoted => words.push(String::new()),
            other => words
                .last_mut()
                .expect("there is always a last word")
                .push(other),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

fn network(text: &str) -> Result<(IpAddr, u8)> {
    let (ip, length) = text.split_once('/').unwrap_or((text, ""));
    let ip: IpAddr = ip.parse()?;
    let longest = if ip.is_ipv4() { 32 } else { 128 };
    let length = if length.is_empty() {
        longest
    } else {
        length.parse()?
    };
    Ok((ip, length))
}

fn masked(text: &str) -> Result<(u32, u32)> {
    let number = |text: &str| u32::from_str_radix(text.trim_start_matches("0x"), 16);
    let (value, mask) = text.split_once('/').unwrap_or((text, "0xffffffff"));
    Ok((number(value)?, number(mask)?))
}

/// Whether an address lies in a network.
#[must_use]
pub fn within(ip: IpAddr, network: IpAddr, length: u8) -> bool {
    let top = |bits: u128, width: u32| {
        let drop = width.saturating_sub(u32::from(length));
        bits.checked_shr(drop).unwrap_or(0)
    };
    match (ip, network) {
        (IpAddr::V4(ip), IpAddr::V4(network)) => {
            top(u128::from(ip.to_bits()), 32) == top(u128::from(network.to_bits()), 32)
        }
        (IpAddr::V6(ip), IpAddr::V6(network)) => {
            top(ip.to_bits(), 128) == top(network.to_bits(), 128)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "\
*nat
:PREROUTING ACCEPT [0:0]
:KUBE-SERVICES - [0:0]
-A PREROUTING -m comment --comment \"kubernetes service portals\" -j KUBE-SERVICES
-A KUBE-SERVICES -d 10.96.0.10/32 -p tcp -m comment --comment \"default/web cluster IP\" -m tcp --dport 80 -j KUBE-SVC-A
-A KUBE-SVC-A ! -s 10.244.0.0/16 -d 10.96.0.10/32 -p tcp -m tcp --dport 80 -j KUBE-MARK-MASQ
-A KUBE-SVC-A -m statistic --mode random --probability 0.50000000000 -j KUBE-SEP-A
-A KUBE-SVC-A -j KUBE-SEP-B
-A KUBE-SEP-A -s 10.244.1.10/32 -j KUBE-MARK-MASQ
-A KUBE-SEP-A -p tcp -m tcp -j DNAT --to-destination 10.244.1.10:8080
-A KUBE-SEP-B -p tcp -m tcp -j DNAT --to-destination 10.244.2.10:8080
-A KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
COMMIT
*filter
-A FORWARD -d 10.96.0.11/32 -p tcp -m tcp --dport 80 -j REJECT --reject-with icmp-port-unreachable
COMMIT
";

    fn ends(source: &str, destination: &str) -> BTreeSet<End> {
        let packet = Packet {
            source: source.parse().expect("a literal address"),
            destination: destination.parse().expect("a literal address"),
            protocol: "tcp",
            device: Some("up0"),
            local: &BTreeSet::new(),
        };
        let rules = Rules::parse(TEXT).expect("rules as kube-proxy writes them");
        rules.walk(&packet).expect("chains that end")
    }

    fn backend(to: &str, masquerade: bool) -> End {
        End::Backend {
            to: to.parse().expect("a literal address"),
            masquerade,
        }
    }

    #[test]
    fn a_walk_finds_every_backend_and_whether_the_source_is_replaced() {
        let outside = BTreeSet::from([
            backend("10.244.1.10:8080", true),
            backend("10.244.2.10:8080", true),
        ]);
        assert_eq!(ends("203.0.113.9", "10.96.0.10:80"), outside);
        let hairpin = BTreeSet::from([
            backend("10.244.1.10:8080", true),
            backend("10.244.2.10:8080", false),
        ]);
        assert_eq!(ends("10.244.1.10", "10.96.0.10:80"), hairpin);
    }

    #[test]
    fn refused_and_foreign_packets_are_told_apart() {
        assert_eq!(
            ends("203.0.113.9", "10.96.0.11:80"),
            BTreeSet::from([End::Rejected])
        );
        assert_eq!(
            ends("203.0.113.9", "10.96.0.12:80"),
            BTreeSet::from([End::Untouched])
        );
    }

    #[test]
    fn a_word_that_is_not_known_is_an_error() {
        assert!(Rules::parse("*nat\n-A X -m quota --quota 5 -j DROP\nCOMMIT\n").is_err());
    }
}
