//! Random: each candidate of non-zero weight is equally likely, as with kube-proxy's kernel rules.

use super::Choice;
use crate::snapshot::Backend;

pub(super) fn choose<'a>(choice: &mut Choice<'a>) -> Option<&'a Backend> {
    let candidates = choice.len();
    // Scaled, not modulo: no low candidate is favoured.
    let start = (u64::from(candidates) * (choice.random & 0xffff_ffff)) >> 32;
    let start = u32::try_from(start).unwrap_or(0);
    (start..candidates)
        .chain(0..start)
        .find_map(|at| choice.candidate(at))
}
