//! How many tests ran, from what the runners print at their end.

use std::fmt;
use std::ops::AddAssign;

/// Tests by their outcome.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) passed: u64,
    failed: u64,
}

impl Count {
    /// Adds what a line says, if it is a closing line of nextest ("Summary [   0.025s] 6 tests run: 5 passed (1
    /// slow), 1 failed, 0 skipped") or of cargo's own runner ("test result: ok. 5 passed; 0 failed; …").
    pub(super) fn read(&mut self, line: &str) {
        // Indented, cargo's line is what nextest shows of a test that failed, which its own line counts.
        let results = match line.strip_prefix("test result:") {
            Some(results) => results,
            None if line.trim_start().starts_with("Summary [") => match line.split_once("run:") {
                Some((_, results)) => results,
                None => return,
            },
            None => return,
        };
        let words: Vec<&str> = results.split([' ', ',', ';']).filter(|word| !word.is_empty()).collect();
        for pair in words.windows(2) {
            let Ok(number) = pair[0].trim_start_matches('(').parse::<u64>() else { continue };
            match pair[1] {
                "passed" => self.passed += number,
                // nextest has several ways to fail.
                "failed" | "timed" | "exec" => self.failed += number,
                _ => {}
            }
        }
    }

    /// Tests that ran to an end, whichever.
    pub(super) fn run(self) -> u64 {
        self.passed + self.failed
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Count) {
        self.passed += other.passed;
        self.failed += other.failed;
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} tests run: {} passed, {} failed", self.run(), self.passed, self.failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(lines: &[&str]) -> Count {
        let mut count = Count::default();
        lines.iter().for_each(|line| count.read(line));
        count
    }

    #[test]
    fn both_runners_closing_lines_are_read() {
        assert_eq!(
            read(&["     Summary [   0.025s] 6 tests run: 6 passed, 0 skipped"]),
            Count { passed: 6, failed: 0 }
        );
        assert_eq!(
            read(&[
                "     Summary [  66.772s] 4/8 tests run: 2 passed (1 slow), 1 failed, 1 timed out, 3 skipped"
            ]),
            Count { passed: 2, failed: 2 }
        );
        let cargo = [
            "test result: ok. 5 passed; 0 failed; 0 ignored",
            "test result: FAILED. 1 passed; 2 failed; 0 x",
        ];
        assert_eq!(read(&cargo), Count { passed: 6, failed: 2 });
    }

    #[test]
    fn what_a_test_prints_is_no_result() {
        let lines = ["3 passed", "a Summary [x] run: 9 passed", "test a::b ... ok", "running 5 tests"];
        assert_eq!(read(&lines), Count::default());
    }
}
