//! A ping every 10 ms, and what it heard.

use super::DemoError;
use godwit_tests::lab::{Probe, Running};

/// Ctrl-C's signal, on which ping prints its count.
const INTERRUPT: i32 = 2;

/// Pings under way.
pub(super) struct Pings(Running);

/// What came of them.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Heard {
    /// Requests sent.
    pub sent: u64,
    /// Requests without an answer.
    pub lost: u64,
    /// Longest time between two answers that followed each other, in milliseconds.
    pub gap_ms: u64,
}

/// Starts pinging from a probe.
pub(super) fn start(probe: &Probe, address: &str) -> Result<Pings, DemoError> {
    println!("h3$ ping -D -n -i 0.01 {address} &");
    Ok(Pings(probe.spawn(&["ping", "-D", "-n", "-i", "0.01", address])?))
}

impl Pings {
    /// Stops, and counts.
    pub(super) fn finish(self) -> Result<Heard, DemoError> {
        self.0.signal(INTERRUPT)?;
        let output = self.0.finish()?;
        let text = String::from_utf8_lossy(&output.stdout);
        parse(&text).ok_or_else(|| DemoError::Unexpected(format!("ping said nothing that counts:\n{text}")))
    }
}

/// Reads the output of iputils' `ping -D`.
fn parse(text: &str) -> Option<Heard> {
    let times: Vec<f64> = text
        .lines()
        .filter(|line| line.contains(" bytes from "))
        .filter_map(|line| line.strip_prefix('[')?.split_once(']')?.0.parse().ok())
        .collect();
    let gap = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
    let summary = text.lines().find(|line| line.contains(" packets transmitted"))?;
    let number =
        |word: &str| summary.split(", ").find(|part| part.contains(word))?.split(' ').next()?.parse().ok();
    let (sent, received): (u64, u64) = (number("transmitted")?, number("received")?);
    Some(Heard { sent, lost: sent.saturating_sub(received), gap_ms: (gap * 1000.0).round() as u64 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_gap_is_the_longest_time_without_an_answer() {
        let text = "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n\
                    [1700000000.000000] 64 bytes from 10.0.0.2: icmp_seq=1 ttl=64 time=0.5 ms\n\
                    [1700000000.010000] 64 bytes from 10.0.0.2: icmp_seq=2 ttl=64 time=0.5 ms\n\
                    [1700000000.110000] 64 bytes from 10.0.0.2: icmp_seq=12 ttl=64 time=0.5 ms\n\
                    \n--- 10.0.0.2 ping statistics ---\n\
                    12 packets transmitted, 3 received, 75% packet loss, time 110ms\n";
        assert_eq!(parse(text), Some(Heard { sent: 12, lost: 9, gap_ms: 100 }));
        assert_eq!(parse("nothing"), None);
    }
}
