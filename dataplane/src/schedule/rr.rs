//! Round robin (`ip_vs_rr`): each candidate in turn, those of weight 0 skipped.

use super::Choice;
use crate::snapshot::Backend;

pub(super) fn choose<'a>(choice: &mut Choice<'a>) -> Option<&'a Backend> {
    let candidates = choice.len();
    for _ in 0..candidates {
        let at = choice.cursor % candidates;
        choice.cursor = at + 1;
        if let Some(backend) = choice.candidate(at) {
            return Some(backend);
        }
    }
    None
}
