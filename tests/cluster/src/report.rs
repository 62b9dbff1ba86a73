//! Counts what was checked and prints each failure as it happens; the last line is the sum.

use anyhow::Error;

/// What passed and what failed so far.
#[derive(Debug, Default)]
pub struct Report {
    passed: usize,
    failed: usize,
}

impl Report {
    /// Counts one check; a failure is printed with its reason.
    pub fn check(&mut self, name: &str, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => {
                self.passed += 1;
                println!("passed  {name}");
            }
            Err(reason) => self.fail(name, &reason),
        }
    }

    /// Counts one check that is too many to be named when it passes.
    pub fn check_quietly(&mut self, name: &str, outcome: Result<(), Error>) {
        match outcome {
            Ok(()) => self.passed += 1,
            Err(reason) => self.fail(name, &reason),
        }
    }

    /// Whether nothing failed and something was checked.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.failed == 0 && self.passed > 0
    }

    /// The closing line.
    #[must_use]
    pub fn sum(&self) -> String {
        format!("{} passed, {} failed", self.passed, self.failed)
    }

    fn fail(&mut self, name: &str, reason: &Error) {
        self.failed += 1;
        println!("FAILED  {name}: {reason:#}");
    }
}
