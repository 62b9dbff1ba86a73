//! The log: who receives it, in which form and how much. Everything goes to standard error, since
//! standard output belongs to what commands print.

use tracing::level_filters::LevelFilter;

use crate::config::{LogFormat, Logging};

/// The version this binary was built as.
pub(crate) const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Starts the log; a second call changes nothing.
pub(crate) fn start(logging: Logging) {
    let builder = tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(false)
        .with_target(false)
        .with_max_level(level(logging.verbosity));
    // An error means that a log is running already, which then stays.
    let _running = match logging.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
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
