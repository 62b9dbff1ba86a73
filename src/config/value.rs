//! The values a configuration is made of, each read from a document value or refused with a
//! reason. Durations are Go's (`1h30m`), as kube-proxy's file has them.

use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::{Serialize, Serializer};
use serde_json::Value;

/// A range of addresses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cidr {
    pub(crate) address: IpAddr,
    pub(crate) prefix: u8,
}

impl fmt::Display for Cidr {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{}/{}", self.address, self.prefix)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Ports from `first` to `last`, both included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct PortRange {
    pub(crate) first: u16,
    pub(crate) last: u16,
}

pub(crate) fn boolean(value: &Value) -> Result<bool, String> {
    value
        .as_bool()
        .ok_or_else(|| "must be true or false".to_owned())
}

pub(crate) fn text(value: &Value) -> Result<String, String> {
    value
        .as_str()
        .map(str::to_owned)
        .ok_or_else(|| "must be a text".to_owned())
}

/// A whole number within `range`.
pub(crate) fn integer<T>(range: RangeInclusive<T>) -> impl Fn(&Value) -> Result<T, String>
where
    T: TryFrom<i64> + PartialOrd + fmt::Display,
{
    move |value| {
        let number = value.as_i64().and_then(|number| T::try_from(number).ok());
        number
            .filter(|number| range.contains(number))
            .ok_or_else(|| {
                format!(
                    "must be a whole number from {} to {}",
                    range.start(),
                    range.end()
                )
            })
    }
}

/// One of a few words.
pub(crate) fn word<T: Copy>(
    words: &'static [(&'static str, T)],
) -> impl Fn(&Value) -> Result<T, String> {
    move |value| {
        let found = value
            .as_str()
            .and_then(|text| words.iter().find(|(word, _)| *word == text));
        found.map(|(_, meaning)| *meaning).ok_or_else(|| {
            let words: Vec<_> = words.iter().map(|(word, _)| *word).collect();
            format!("must be one of {}", words.join(", "))
        })
    }
}

pub(crate) fn list<T>(
    element: impl Fn(&Value) -> Result<T, String>,
) -> impl Fn(&Value) -> Result<Vec<T>, String> {
    move |value| {
        let elements = value
            .as_array()
            .ok_or_else(|| "must be a list".to_owned())?;
        elements.iter().map(&element).collect()
    }
}

/// A duration in Go's spelling: `0`, `90s`, `1h30m`, `1.5s`, `200ms`; not negative.
pub(crate) fn duration(value: &Value) -> Result<Duration, String> {
    let reason = || "must be a duration such as 30s, 5m or 1h30m".to_owned();
    let text = value.as_str().ok_or_else(reason)?;
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest.is_empty() {
        return Err(reason());
    }
    let mut seconds = 0.0;
    while !rest.is_empty() {
        let number_end = rest
            .find(|c: char| c != '.' && !c.is_ascii_digit())
            .ok_or_else(reason)?;
        let (number, tail) = rest.split_at(number_end);
        let unit_end = tail
            .find(|c: char| c == '.' || c.is_ascii_digit())
            .unwrap_or(tail.len());
        let (unit, tail) = tail.split_at(unit_end);
        let scale = DURATION_UNITS
            .iter()
            .find(|(name, _)| *name == unit)
            .ok_or_else(reason)?
            .1;
        seconds += number.parse::<f64>().map_err(|_| reason())? * scale;
        rest = tail;
    }
    Duration::try_from_secs_f64(seconds).map_err(|_| reason())
}

/// Writes a duration as the file spells it, in seconds: `0.2s`.
pub(super) fn as_seconds<S: Serializer>(
    duration: &Duration,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    serializer.collect_str(&format_args!("{}s", duration.as_secs_f64()))
}

/// A number of milliseconds within `range`.
pub(crate) fn milliseconds(
    range: RangeInclusive<u32>,
) -> impl Fn(&Value) -> Result<Duration, String> {
    let number = integer(range);
    move |value| Ok(Duration::from_millis(u64::from(number(value)?)))
}

pub(crate) fn ip_address(value: &Value) -> Result<IpAddr, String> {
    let parsed = value.as_str().and_then(|text| text.parse().ok());
    parsed.ok_or_else(|| "must be an IP address".to_owned())
}

pub(crate) fn cidr(value: &Value) -> Result<Cidr, String> {
    value
        .as_str()
        .and_then(parse_cidr)
        .ok_or_else(|| cidr_reason("an address range"))
}

/// Address ranges in one text, separated by commas, as `clusterCIDR` holds them; may be empty.
pub(crate) fn cidrs(value: &Value) -> Result<Vec<Cidr>, String> {
    let text = text(value)?;
    let parts = text
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    parts
        .map(|part| parse_cidr(part).ok_or_else(|| cidr_reason("address ranges")))
        .collect()
}

/// An address to listen on; a bare IP address gets `default_port`, as kube-proxy does.
pub(crate) fn listen_address(default_port: u16) -> impl Fn(&Value) -> Result<SocketAddr, String> {
    move |value| {
        let text = text(value)?;
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(SocketAddr::new(address, default_port));
        }
        // `:10249` is every address, as Go's listeners take it.
        let whole = if text.starts_with(':') {
            format!("[::]{text}")
        } else {
            text
        };
        let found = whole
            .to_socket_addrs()
            .ok()
            .and_then(|mut found| found.next());
        found.ok_or_else(|| "must be an address and a port, such as 127.0.0.1:10249".to_owned())
    }
}

/// `first-last`.
pub(crate) fn port_range(value: &Value) -> Result<PortRange, String> {
    let parsed = value.as_str().and_then(|text| {
        let (first, last) = text.split_once('-')?;
        Some(PortRange {
            first: first.trim().parse().ok()?,
            last: last.trim().parse().ok()?,
        })
    });
    parsed
        .filter(|range| range.first >= 1 && range.first <= range.last)
        .ok_or_else(|| "must be two ports, the lower first, such as 1024-29999".to_owned())
}

/// The name of a network device.
pub(crate) fn interface(value: &Value) -> Result<String, String> {
    let name = value.as_str().unwrap_or_default();
    if interface_name_holds(name) {
        return Ok(name.to_owned());
    }
    Err(format!(
        "must be the name of a network device (1 to {INTERFACE_NAME_MAX} characters)"
    ))
}

/// The name of a network device, or its beginning and `*`.
pub(crate) fn interface_pattern(value: &Value) -> Result<String, String> {
    let pattern = value.as_str().unwrap_or_default();
    let stem = pattern.strip_suffix('*').unwrap_or(pattern);
    if interface_name_holds(stem) && !stem.contains('*') {
        return Ok(pattern.to_owned());
    }
    Err("must be the name of a network device, or its beginning followed by *".to_owned())
}

/// A path that names a folder from the root on.
pub(crate) fn absolute_path(value: &Value) -> Result<std::path::PathBuf, String> {
    let path = std::path::PathBuf::from(value.as_str().unwrap_or_default());
    if path.as_os_str().is_empty() {
        return Err("must be a folder".to_owned());
    }
    Ok(path)
}

fn parse_cidr(text: &str) -> Option<Cidr> {
    let (address, prefix) = text.split_once('/')?;
    let address: IpAddr = address.parse().ok()?;
    let prefix: u8 = prefix.parse().ok()?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    (prefix <= longest).then_some(Cidr { address, prefix })
}

fn cidr_reason(what: &str) -> String {
    format!("must be {what} such as 10.244.0.0/16")
}

fn interface_name_holds(name: &str) -> bool {
    let length = name.len();
    (1..=INTERFACE_NAME_MAX).contains(&length)
        && name != "."
        && name != ".."
        && !name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace())
}

/// IFNAMSIZ without the closing zero.
const INTERFACE_NAME_MAX: usize = 15;

const DURATION_UNITS: [(&str, f64); 8] = [
    ("ns", 1e-9),
    ("us", 1e-6),
    ("µs", 1e-6),
    ("μs", 1e-6),
    ("ms", 1e-3),
    ("s", 1.0),
    ("m", 60.0),
    ("h", 3600.0),
];

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn durations_are_read_as_go_reads_them() {
        for (text, milliseconds) in [
            ("0", 0),
            ("0s", 0),
            ("30s", 30_000),
            ("1h30m", 5_400_000),
            ("15m0s", 900_000),
            ("1.5s", 1_500),
            ("200ms", 200),
            ("24h0m0s", 86_400_000),
        ] {
            let expected = Duration::from_millis(milliseconds);
            assert_eq!(duration(&json!(text)), Ok(expected), "{text}");
        }
        for wrong in [
            json!(""),
            json!("5"),
            json!("-1s"),
            json!("s"),
            json!("1d"),
            json!(5),
        ] {
            assert!(duration(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn listen_addresses_are_read_as_kube_proxy_reads_them() {
        for (text, expected) in [
            ("127.0.0.1:10249", "127.0.0.1:10249"),
            ("0.0.0.0", "0.0.0.0:10249"),
            ("::", "[::]:10249"),
            ("[::1]:1", "[::1]:1"),
            (":10256", "[::]:10256"),
        ] {
            let read = listen_address(10249)(&json!(text)).unwrap();
            assert_eq!(read.to_string(), expected, "{text}");
        }
        for wrong in [json!("127.0.0.1:99999"), json!("no colon"), json!(10249)] {
            assert!(listen_address(10249)(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn ranges_of_addresses_name_what_is_wrong() {
        let read = cidrs(&json!("10.244.0.0/16, fd00::/64")).unwrap();
        let shown: Vec<_> = read.iter().map(ToString::to_string).collect();
        assert_eq!(shown, ["10.244.0.0/16", "fd00::/64"]);
        assert_eq!(cidrs(&json!("")), Ok(Vec::new()));
        for wrong in ["10.244.0.0", "10.244.0.0/33", "x/1", "10.0.0.0/8,y"] {
            assert!(cidrs(&json!(wrong)).is_err(), "{wrong}");
        }
    }

    #[test]
    fn port_ranges_rise() {
        assert_eq!(
            port_range(&json!("1024-29999")),
            Ok(PortRange {
                first: 1024,
                last: 29999
            })
        );
        assert_eq!(
            port_range(&json!("5-5")),
            Ok(PortRange { first: 5, last: 5 })
        );
        for wrong in [
            json!("2-1"),
            json!("0-5"),
            json!("1024"),
            json!("1-70000"),
            json!(1),
        ] {
            assert!(port_range(&wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn names_of_devices_are_short_and_plain() {
        assert_eq!(interface(&json!("eth0")), Ok("eth0".to_owned()));
        for wrong in [
            json!(""),
            json!("a/b"),
            json!("a b"),
            json!("sixteen-letters-"),
            json!(1),
        ] {
            assert!(interface(&wrong).is_err(), "{wrong}");
        }
        assert_eq!(interface_pattern(&json!("veth*")), Ok("veth*".to_owned()));
        for wrong in [json!("*"), json!("v*th"), json!("")] {
            assert!(interface_pattern(&wrong).is_err(), "{wrong}");
        }
    }
}
