//! One command a file. Each prints its result through `output` and returns what went wrong as a
//! sentence that says what to do.

pub(crate) mod cleanup;
pub(crate) mod client;
pub(crate) mod config;
pub(crate) mod flows;
pub(crate) mod resolve;
pub(crate) mod services;
pub(crate) mod status;
pub(crate) mod trace;
