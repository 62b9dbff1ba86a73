//! The log: who receives it, in which form and how much. Everything goes to standard error, since
//! standard output belongs to what commands print.

use tracing::level_filters::LevelFilter;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::config::{LogFormat, Logging};

/// The version this binary was built as.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Starts the log; a second call changes nothing.
pub(crate) fn start(logging: Logging) {
    let level = level(logging.verbosity);
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level);
    let filter = filter(level);
    // An error means that a log is running already, which then stays.
    let _running = match logging.format {
        LogFormat::Text => builder.finish().with(filter).try_init(),
        LogFormat::Json => builder.json().finish().with(filter).try_init(),
    };
}

/// The API server's client writes a line for each attempt. Control says what matters of it, once.
fn filter(level: LevelFilter) -> Targets {
    let clients = if level > LevelFilter::INFO {
        level
    } else {
        LevelFilter::OFF
    };
    let all = Targets::new().with_default(level);
    all.with_targets(["kube_client", "kube_runtime"].map(|target| (target, clients)))
}

/// klog's verbosity as a level: from 4 on kube-proxy's log is a debugging aid, from 6 a trace.
fn level(verbosity: u8) -> LevelFilter {
    match verbosity {
        0..4 => LevelFilter::INFO,
        4..6 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_verbosity_never_means_fewer_lines() {
        let levels: Vec<_> = (0..10).map(level).collect();
        assert!(levels.is_sorted());
        assert_eq!(level(2), LevelFilter::INFO);
    }
}
