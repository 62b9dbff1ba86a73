//! Which core a thread runs on.
//!
//! Only cores that this process may use are counted: a container's CPU set is respected.

use std::io;

use rustix::thread::{CpuSet, sched_getaffinity, sched_getcpu, sched_setaffinity};

/// The core for the worker with this number: the cores in turn, and again from the first where there
/// are more workers than cores. The present one where the kernel does not say.
pub(crate) fn core_of(worker: usize) -> usize {
    let cores = allowed();
    let turn = worker % cores.len().max(1);
    cores.get(turn).copied().unwrap_or_else(sched_getcpu)
}

/// Keeps the calling thread on a core.
pub(crate) fn pin(core: usize) -> io::Result<()> {
    if core >= CpuSet::MAX_CPU {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    let mut set = CpuSet::new();
    set.set(core);
    Ok(sched_setaffinity(None, &set)?)
}

fn allowed() -> Vec<usize> {
    let set = sched_getaffinity(None).unwrap_or_default();
    (0..CpuSet::MAX_CPU)
        .filter(|&core| set.is_set(core))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pinned_thread_may_use_one_core() {
        std::thread::spawn(|| {
            let core = core_of(0);
            pin(core).expect("it is one that we may use");
            assert_eq!(allowed(), [core]);
            assert_eq!(core_of(7), core);
        })
        .join()
        .expect("the thread asserts");
    }

    #[test]
    fn workers_take_the_cores_in_turn() {
        let cores = allowed();
        assert_eq!(core_of(0), cores[0]);
        assert_eq!(core_of(cores.len()), cores[0]);
    }

    #[test]
    fn a_core_that_no_machine_has_is_refused() {
        assert!(pin(usize::MAX).is_err());
    }
}
