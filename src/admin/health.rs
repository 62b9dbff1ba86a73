//! Ready, alive, healthy: what probes ask. `/readyz` says whether the Services are served;
//! `/healthz` and `/livez` on kube-proxy's health port answer with kube-proxy's body.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde_json::{Value, json};

use super::Sources;

/// Whether the Services are served, and since when their state stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Readiness {
    pub(crate) ready: bool,
    /// What is missing; empty when ready.
    pub(crate) reason: String,
    /// When the state was last found right or made so.
    pub(crate) updated: SystemTime,
}

/// What answers on kube-proxy's health port.
pub(super) fn router(sources: Arc<Sources>) -> Router {
    Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(healthz))
        .route("/readyz", get(readyz))
        .with_state(sources)
}

pub(super) async fn readyz(State(sources): State<Arc<Sources>>) -> (StatusCode, String) {
    let readiness = (sources.ready)();
    match readiness.ready {
        true => (StatusCode::OK, "ok".to_owned()),
        false => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {}", readiness.reason),
        ),
    }
}

async fn healthz(State(sources): State<Arc<Sources>>) -> (StatusCode, Json<Value>) {
    let readiness = (sources.ready)();
    let code = if readiness.ready {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let body = json!({
        "lastUpdated": rfc3339(readiness.updated),
        "currentTime": rfc3339(SystemTime::now()),
        "nodeEligible": true,
    });
    (code, Json(body))
}

/// A time as RFC 3339 writes it, in UTC, to the millisecond. Times before 1970 count as 1970.
fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let (seconds, milliseconds) = (since.as_secs(), since.subsec_millis());
    let (year, month, day) = civil(seconds / DAY);
    let (hour, minute, second) = (seconds % DAY / 3600, seconds % 3600 / 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{milliseconds:03}Z")
}

/// Year, month and day of a day counted from 1970-01-01, in the Gregorian calendar. Years are
/// counted from March, so that the leap day is the last of its year.
fn civil(day: u64) -> (u64, u64, u64) {
    let day = day + DAYS_TO_1970;
    let (era, day_of_era) = (day / DAYS_PER_ERA, day % DAYS_PER_ERA);
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 {
        month_from_march + 3
    } else {
        month_from_march - 9
    };
    (
        era * 400 + year_of_era + u64::from(month <= 2),
        month,
        day_of_month,
    )
}

const DAY: u64 = 86_400;
/// Four centuries.
const DAYS_PER_ERA: u64 = 146_097;
/// From 0000-03-01 to 1970-01-01.
const DAYS_TO_1970: u64 = 719_468;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_written_in_rfc_3339() {
        for (seconds, expected) in [
            (0, "1970-01-01T00:00:00.000Z"),
            (951_782_399, "2000-02-28T23:59:59.000Z"),
            (951_782_400, "2000-02-29T00:00:00.000Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000Z"),
            (1_767_225_599, "2025-12-31T23:59:59.000Z"),
        ] {
            let time = UNIX_EPOCH + Duration::from_secs(seconds);
            assert_eq!(rfc3339(time), expected);
        }
    }
}
