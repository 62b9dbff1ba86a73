//! How a Service wants its connections spread: our annotations, read into types.
//!
//! `sluice.dev/scheduler`, `sluice.dev/weights` and `sluice.dev/hash`. An annotation that cannot
//! be read never stops a Service: it is served with the default, and a remark says so.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use crate::address::parse_ip;

/// The schedulers, by IPVS's names.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum Scheduler {
    /// One after the other.
    #[default]
    RoundRobin,
    /// One after the other, by weight.
    WeightedRoundRobin,
    /// Fewest connections.
    LeastConnections,
    /// Fewest connections for its weight.
    WeightedLeastConnections,
    /// By hash of the client.
    SourceHash,
    /// By hash of the destination.
    DestinationHash,
    /// Shortest expected delay.
    ShortestExpectedDelay,
    /// An idle one, else shortest expected delay.
    NeverQueue,
    /// By Maglev's lookup table.
    Maglev,
    /// By chance.
    Random,
}

impl Scheduler {
    /// Every scheduler, in the order in which they are listed to people.
    pub const ALL: [Self; 10] = [
        Self::RoundRobin,
        Self::WeightedRoundRobin,
        Self::LeastConnections,
        Self::WeightedLeastConnections,
        Self::SourceHash,
        Self::DestinationHash,
        Self::ShortestExpectedDelay,
        Self::NeverQueue,
        Self::Maglev,
        Self::Random,
    ];

    /// Reads a name; `mh`, the kernel's, is another word for maglev.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        if name == "mh" {
            return Some(Self::Maglev);
        }
        Self::ALL
            .into_iter()
            .find(|scheduler| scheduler.name() == name)
    }

    /// Its short name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::RoundRobin => "rr",
            Self::WeightedRoundRobin => "wrr",
            Self::LeastConnections => "lc",
            Self::WeightedLeastConnections => "wlc",
            Self::SourceHash => "sh",
            Self::DestinationHash => "dh",
            Self::ShortestExpectedDelay => "sed",
            Self::NeverQueue => "nq",
            Self::Maglev => "maglev",
            Self::Random => "random",
        }
    }
}

impl fmt::Display for Scheduler {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a hashing scheduler takes of the client.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub enum HashOver {
    /// Its address.
    #[default]
    Client,
    /// Its address and port.
    ClientPort,
}

/// Whom a weight is for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum WeightTarget {
    /// One endpoint.
    Address(IpAddr),
    /// All endpoints of a zone.
    Zone(String),
}

/// A Service's own wishes; what it leaves out is the configuration's choice.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Balance {
    /// The scheduler it asks for.
    pub scheduler: Option<Scheduler>,
    /// What hashing schedulers hash.
    pub hash: HashOver,
    /// Weights that were written down.
    pub weights: Vec<(WeightTarget, u16)>,
}

impl Balance {
    /// Reads our annotations; each one that makes no sense adds a remark and is as if absent.
    #[must_use]
    pub fn from_annotations(
        annotations: Option<&BTreeMap<String, String>>,
        remarks: &mut Vec<String>,
    ) -> Self {
        let mut balance = Self::default();
        let Some(annotations) = annotations else {
            return balance;
        };
        if let Some(name) = annotations.get(SCHEDULER) {
            balance.scheduler = Scheduler::from_name(name.trim());
            if balance.scheduler.is_none() {
                remarks.push(format!(
                    "annotation {SCHEDULER}: {name:?} is no scheduler, the default one is used"
                ));
            }
        }
        match annotations.get(HASH).map(|text| text.trim()) {
            None | Some("client") => {}
            Some("client-port") => balance.hash = HashOver::ClientPort,
            Some(other) => remarks.push(format!(
                "annotation {HASH}: {other:?} is neither client nor client-port, client is used"
            )),
        }
        for entry in annotations
            .get(WEIGHTS)
            .into_iter()
            .flat_map(|text| text.split(','))
        {
            match weight(entry.trim()) {
                Some(parsed) => balance.weights.push(parsed),
                None if entry.trim().is_empty() => {}
                None => remarks.push(format!(
                    "annotation {WEIGHTS}: {:?} is not ADDRESS=0-65535 or zone:NAME=0-65535, weight 1 is used",
                    entry.trim()
                )),
            }
        }
        balance
    }

    /// The weight of an endpoint: its own, else its zone's, else 1. The last one written counts.
    #[must_use]
    pub fn weight(&self, address: IpAddr, zone: Option<&str>) -> u16 {
        let find = |wanted: &dyn Fn(&WeightTarget) -> bool| {
            let mut entries = self.weights.iter().rev();
            entries
                .find(|(target, _)| wanted(target))
                .map(|(_, weight)| *weight)
        };
        find(&|target| *target == WeightTarget::Address(address))
            .or_else(|| find(&|target| matches!(target, WeightTarget::Zone(name) if Some(name.as_str()) == zone)))
            .unwrap_or(1)
    }
}

fn weight(entry: &str) -> Option<(WeightTarget, u16)> {
    let (target, weight) = entry.rsplit_once('=')?;
    let target = target.trim();
    let target = match target.strip_prefix("zone:") {
        Some(zone) if !zone.is_empty() => WeightTarget::Zone(zone.into()),
        Some(_) => return None,
        None => {
            let bare = target
                .strip_prefix('[')
                .and_then(|rest| rest.strip_suffix(']'));
            WeightTarget::Address(parse_ip(bare.unwrap_or(target))?)
        }
    };
    Some((target, weight.trim().parse().ok()?))
}

const SCHEDULER: &str = "sluice.dev/scheduler";
const WEIGHTS: &str = "sluice.dev/weights";
const HASH: &str = "sluice.dev/hash";

#[cfg(test)]
mod tests {
    use super::*;

    fn read(pairs: &[(&str, &str)]) -> (Balance, Vec<String>) {
        let annotations = pairs
            .iter()
            .map(|(k, v)| ((*k).into(), (*v).into()))
            .collect();
        let mut remarks = Vec::new();
        let balance = Balance::from_annotations(Some(&annotations), &mut remarks);
        (balance, remarks)
    }

    #[test]
    fn every_name_is_read_back_and_mh_is_maglev() {
        for scheduler in Scheduler::ALL {
            assert_eq!(Scheduler::from_name(scheduler.name()), Some(scheduler));
        }
        assert_eq!(Scheduler::from_name("mh"), Some(Scheduler::Maglev));
        assert_eq!(Scheduler::from_name("fastest"), None);
    }

    #[test]
    fn an_address_counts_before_its_zone() {
        let (balance, remarks) =
            read(&[(WEIGHTS, "10.244.1.10=3, zone:a=2,fd00::1=0,[fd00::2]=7")]);
        assert_eq!(remarks, Vec::<String>::new());
        let weight = |ip: &str, zone| balance.weight(ip.parse().expect("a literal address"), zone);
        assert_eq!(weight("10.244.1.10", Some("a")), 3);
        assert_eq!(weight("10.244.1.11", Some("a")), 2);
        assert_eq!(weight("10.244.1.11", Some("b")), 1);
        assert_eq!(weight("10.244.1.11", None), 1);
        assert_eq!(weight("fd00::1", None), 0);
        assert_eq!(weight("fd00::2", None), 7);
    }

    #[test]
    fn what_cannot_be_read_is_remarked_and_left_at_the_default() {
        let (balance, remarks) = read(&[
            (SCHEDULER, "fastest"),
            (HASH, "cookie"),
            (WEIGHTS, "10.0.0.1=x,10.0.0.2=4,zone:=3"),
        ]);
        assert_eq!(balance.scheduler, None);
        assert_eq!(balance.hash, HashOver::Client);
        assert_eq!(balance.weights.len(), 1);
        assert_eq!(remarks.len(), 4);
    }
}
