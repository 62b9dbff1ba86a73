//! The ports to masquerade with and the host's own: ports on which the host listens are left out,
//! and where the range meets the host's ephemeral ports the overlap is reserved by sysctl.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use anyhow::Context;

use crate::config::PortRange;
use crate::journal::{Journal, set_sysctl};
use crate::undo::SYSCTLS;

const EPHEMERAL: &str = "net/ipv4/ip_local_port_range";
const RESERVED: &str = "net/ipv4/ip_local_reserved_ports";

/// Keeps the host off the range, as far as it is ephemeral, and returns the ports that the host
/// holds.
pub(crate) fn prepare(
    range: &PortRange,
    journal: &mut Journal,
) -> anyhow::Result<Vec<RangeInclusive<u16>>> {
    let range = range.first..=range.last;
    let root = Path::new(SYSCTLS);
    let read = |name: &str| {
        fs::read_to_string(root.join(name))
            .with_context(|| format!("cannot read the sysctl {name}"))
    };
    if let Some(overlap) = overlap(&range, &read(EPHEMERAL)?) {
        let reserved = with_reserved(&read(RESERVED)?, &overlap);
        set_sysctl(journal, root, RESERVED, &reserved)
            .with_context(|| format!("cannot reserve the ports {overlap:?} from the host"))?;
    }
    let mut listening = Vec::new();
    for table in ["tcp", "tcp6", "udp", "udp6"] {
        // A kernel without IPv6 has no such table.
        let text = fs::read_to_string(Path::new("/proc/thread-self/net").join(table));
        listening.extend(listening_ports(
            &text.unwrap_or_default(),
            table.starts_with("tcp"),
        ));
    }
    listening.retain(|port| range.contains(port));
    listening.sort_unstable();
    listening.dedup();
    Ok(listening.into_iter().map(|port| port..=port).collect())
}

/// Where the range and the host's ephemeral ports (two numbers) meet.
fn overlap(range: &RangeInclusive<u16>, ephemeral: &str) -> Option<RangeInclusive<u16>> {
    let mut bounds = ephemeral
        .split_whitespace()
        .map_while(|bound| bound.parse().ok());
    let (first, last): (u16, u16) = (bounds.next()?, bounds.next()?);
    let both = first.max(*range.start())..=last.min(*range.end());
    (!both.is_empty()).then_some(both)
}

/// The sysctl's list with one more range.
fn with_reserved(before: &str, range: &RangeInclusive<u16>) -> String {
    let ours = format!("{}-{}", range.start(), range.end());
    match before.trim() {
        "" => ours,
        before if before.split(',').any(|part| part == ours) => before.to_owned(),
        before => format!("{before},{ours}"),
    }
}

/// Local ports of `/proc/net/tcp` and its like that take what nobody asked for: listening TCP
/// sockets (state 0A), unconnected UDP ones (07).
fn listening_ports(table: &str, is_tcp: bool) -> impl Iterator<Item = u16> {
    let state = if is_tcp { "0A" } else { "07" };
    table.lines().skip(1).filter_map(move |line| {
        let mut fields = line.split_whitespace().skip(1);
        let (local, _, found) = (fields.next()?, fields.next()?, fields.next()?);
        let (_, port) = local.rsplit_once(':')?;
        (found == state).then(|| u16::from_str_radix(port, 16).ok())?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_range_leaves_the_usual_ephemeral_ports_alone() {
        assert_eq!(overlap(&(1_024..=29_999), "32768\t60999\n"), None);
        assert_eq!(
            overlap(&(1_024..=29_999), "10000\t65535\n"),
            Some(10_000..=29_999)
        );
        assert_eq!(overlap(&(1_024..=29_999), "nonsense"), None);
    }

    #[test]
    fn what_others_reserved_stays_reserved() {
        assert_eq!(with_reserved("\n", &(10_000..=29_999)), "10000-29999");
        assert_eq!(
            with_reserved("8080,9000-9100\n", &(1..=2)),
            "8080,9000-9100,1-2"
        );
        assert_eq!(with_reserved("8080,1-2\n", &(1..=2)), "8080,1-2");
    }

    #[test]
    fn listening_sockets_are_found_and_connected_ones_are_not() {
        let table = "  sl  local_address rem_address   st\n   \
             0: 00000000:1F90 00000000:0000 0A\n   \
             1: 0100007F:C001 0100007F:1F90 01\n";
        assert_eq!(listening_ports(table, true).collect::<Vec<_>>(), [8080]);
    }
}
