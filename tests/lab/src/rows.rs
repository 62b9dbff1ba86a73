//! The rows of the table: how the traffic of a path is sent and how what came of it is judged.
//!
//! A row is right when every request was answered, no payload was wrong, every expected backend and no other answered, and
//! each saw the source address that the path demands. There is no tolerance in any of these.
//!
//! The rows themselves are in `list`.
//!
//! Rule to keep: a row is never weakened to become right; its expectation is the issue's.

mod list;

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::thread;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::client::{Answer, Asking, Connection, Tally, ask, ping};
use crate::plan::{Family, PODS, Site, address, node_addresses};
use crate::topology::Lab;

pub use list::all;

/// One row.
#[derive(Clone, Debug)]
pub struct Row {
    /// `path/protocol+family`, as in `rows.txt`.
    pub name: String,
    /// In words.
    pub title: &'static str,
    from: Site,
    work: Work,
    expect: Expect,
}

/// A row that was run.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Which row.
    pub name: String,
    /// In words.
    pub title: &'static str,
    /// What was counted.
    pub tally: Tally,
    /// Empty when right, else each thing that is wrong.
    pub faults: Vec<String>,
}

#[derive(Clone, Copy, Debug)]
enum Work {
    /// So many requests, from so many threads, each from a port of its own.
    Ask {
        asking: Asking,
        requests: u64,
        threads: u64,
    },
    /// A long stream there and a long one back.
    Stream { target: SocketAddr, length: u64 },
    /// So many ICMP echoes.
    Ping { target: IpAddr, count: u16 },
    /// Forget the neighbour, speak to it, find it again with the right address.
    Resolve { target: Site, family: Family },
}

#[derive(Clone, Debug)]
struct Expect {
    backends: Vec<String>,
    source: Source,
}

/// Which source address a server must see.
#[derive(Clone, Copy, Debug)]
enum Source {
    /// The client's own.
    Kept,
    /// One of the node's.
    Node(Site),
    /// One of the node's, where the client is a process of it.
    Own(Site),
    /// The client's own at backends on the node, one of the node's at others.
    KeptOn(Site),
    /// Nobody looks: there is no server.
    Unseen,
}

/// The lines of `rows.txt`.
pub fn listed() -> impl Iterator<Item = &'static str> {
    let lines = include_str!("../rows.txt").lines().map(str::trim);
    lines.filter(|line| !line.is_empty() && !line.starts_with('#'))
}

impl Row {
    /// Sends the row's traffic and judges it.
    #[must_use]
    pub fn run(&self, lab: &Lab) -> Outcome {
        let tally = match self.work {
            Work::Resolve { target, family } => one(resolve(lab, self.from, target, family)),
            _ => lab.at(self.from).run(|| self.work.send(lab)),
        };
        let faults = self.expect.faults(&tally);
        Outcome {
            name: self.name.clone(),
            title: self.title,
            tally,
            faults,
        }
    }

    /// Whether a Service is asked.
    #[must_use]
    pub fn needs_service(&self) -> bool {
        !self.name.starts_with("direct-") && !self.name.starts_with("node-")
    }

    /// The outcome where nobody serves: wrong, without the wait.
    #[must_use]
    pub fn not_served(&self) -> Outcome {
        let faults = vec!["not sent: nobody serves".to_owned()];
        Outcome {
            name: self.name.clone(),
            title: self.title,
            tally: Tally::default(),
            faults,
        }
    }
}

impl Outcome {
    /// Whether nothing is wrong.
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.faults.is_empty()
    }
}

impl Work {
    fn send(&self, lab: &Lab) -> Tally {
        match *self {
            Self::Ask {
                asking,
                requests,
                threads: 1,
            } => ask(&asking, requests),
            Self::Ask {
                asking,
                requests,
                threads,
            } => thread::scope(|scope| {
                let share = requests / threads;
                let threads: Vec<_> = (0..threads)
                    .map(|_| scope.spawn(move || ask(&asking, share)))
                    .collect();
                let mut tally = Tally::default();
                for thread in threads {
                    tally.merge(thread.join().expect("a client does not panic"));
                }
                tally
            }),
            Self::Stream { target, length } => stream(target, length),
            Self::Ping { target, count } => {
                let mut tally = Tally::default();
                for number in 0..count {
                    tally.add(
                        ping(target, number, UDP_PATIENCE).map(|took| echo_reply(target, took)),
                    );
                }
                tally
            }
            Self::Resolve { target, family } => one(resolve(lab, Site::Client, target, family)),
        }
    }
}

impl Expect {
    fn faults(&self, tally: &Tally) -> Vec<String> {
        let mut faults = Vec::new();
        let mut fault = |wrong: bool, text: String| faults.extend(wrong.then_some(text));
        let missing = tally.requests - tally.answered;
        let reason = tally.failure.as_deref().unwrap_or_default();
        fault(missing > 0, format!("{missing} unanswered: {reason}"));
        fault(tally.wrong > 0, format!("{} wrong payloads", tally.wrong));
        let expected: BTreeSet<&str> = self.backends.iter().map(String::as_str).collect();
        let answered: BTreeSet<&str> = tally.shares.keys().map(String::as_str).collect();
        for stranger in answered.difference(&expected) {
            fault(true, format!("{stranger} answered"));
        }
        let fair = tally.requests / (expected.len() as u64 * 2);
        for backend in &expected {
            let share = tally.shares.get(*backend).copied().unwrap_or_default();
            fault(
                tally.answered > 0 && share < fair.max(1),
                format!("{backend} answered {share} times"),
            );
        }
        for (server, sources) in &tally.sources {
            let strange = sources
                .iter()
                .find(|source| !self.source.allows(server, **source));
            if let Some(source) = strange {
                let seen = source.map_or("the client's own".to_owned(), |ip| ip.to_string());
                fault(true, format!("{server} saw source {seen}"));
            }
        }
        faults
    }
}

impl Source {
    /// Whether `server` may have seen `source`; `None` stands for the client's own address.
    fn allows(self, server: &str, source: Option<IpAddr>) -> bool {
        let of_node = |node| source.is_some_and(|ip| node_addresses(node).contains(&ip));
        match self {
            Self::Kept => source.is_none(),
            Self::Node(node) => of_node(node),
            Self::Own(node) => source.is_none() || of_node(node),
            Self::KeptOn(node) => {
                let local = PODS
                    .iter()
                    .any(|pod| pod.name == server && pod.node == node);
                if local {
                    source.is_none()
                } else {
                    of_node(node)
                }
            }
            Self::Unseen => true,
        }
    }
}

fn stream(target: SocketAddr, length: u64) -> Tally {
    let mut tally = Tally::default();
    match Connection::open(target, TCP_PATIENCE) {
        Ok(mut connection) => {
            tally.add(connection.put(length, 1));
            tally.add(connection.get(length, 2));
        }
        Err(error) => tally.add(Err(error)),
    }
    tally
}

/// Both sides forget each other; one asks, then both must know the other's address again.
fn resolve(lab: &Lab, from: Site, to: Site, family: Family) -> Result<Answer> {
    for site in [from, to] {
        lab.at(site)
            .output("ip", &["neigh", "flush", "dev", "eth0"])?;
    }
    let (target, own) = (address(to, family), address(from, family));
    let took = lab.at(from).run(|| ping(target, 1, UDP_PATIENCE))?;
    for (site, other, ip) in [(from, to, target), (to, from, own)] {
        let expected = lab
            .at(other)
            .output("cat", &["/sys/class/net/eth0/address"])?;
        let entry = lab
            .at(site)
            .output("ip", &["neigh", "show", &ip.to_string(), "dev", "eth0"])?;
        ensure!(
            entry.contains(expected.trim()),
            "{}: {entry:?}",
            site.name()
        );
    }
    Ok(Answer {
        server: to.name().to_owned(),
        ..echo_reply(target, took)
    })
}

fn echo_reply(target: IpAddr, took: Duration) -> Answer {
    let unseen = SocketAddr::new(target, 0);
    Answer {
        server: target.to_string(),
        own: unseen,
        seen: unseen,
        bytes: 128,
        right: true,
        took,
    }
}

fn one(outcome: Result<Answer>) -> Tally {
    let mut tally = Tally::default();
    tally.add(outcome);
    tally
}

const TCP_PATIENCE: Duration = Duration::from_secs(3);
const UDP_PATIENCE: Duration = Duration::from_secs(1);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_listed_row_exists_and_no_name_is_given_twice() {
        let mut names: Vec<String> = all().into_iter().map(|row| row.name).collect();
        names.extend(crate::proof::NAMES.map(str::to_owned));
        let count = names.len();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), count);
        for listed in listed() {
            assert!(
                names.iter().any(|name| name == listed),
                "{listed} is not a row"
            );
        }
    }

    #[test]
    fn a_missing_answer_a_wrong_payload_and_a_stranger_are_faults() {
        let expect = Expect {
            backends: vec!["n1a".to_owned()],
            source: Source::Kept,
        };
        let own: SocketAddr = "192.0.2.100:1000".parse().unwrap();
        let right = |server: &str, right| Answer {
            server: server.to_owned(),
            own,
            seen: own,
            bytes: 1,
            right,
            took: Duration::ZERO,
        };
        let faults = |outcome| expect.faults(&one(outcome));
        assert!(faults(Ok(right("n1a", true))).is_empty());
        assert!(!faults(Ok(right("n1a", false))).is_empty());
        assert!(!faults(Ok(right("n1b", true))).is_empty());
        assert!(!faults(Err(anyhow::anyhow!("timed out"))).is_empty());
        let seen = "192.0.2.11:1000".parse().unwrap();
        assert!(
            !faults(Ok(Answer {
                seen,
                ..right("n1a", true)
            }))
            .is_empty()
        );
    }
}
