//! Pings at a steady pace from a probe, and what became of each of them.

use std::io::Read as _;
use std::thread::JoinHandle;
use std::time::Duration;

use super::error::LabError;
use super::host::Running;
use super::probe::Probe;

/// Ctrl-C's signal, on which ping prints its count.
const INTERRUPT: i32 = 2;

/// How long an answer may be under way when the pings are stopped: a request sent later than this before the end
/// and not answered is not lost, it was not waited for.
const UNDER_WAY: Duration = Duration::from_millis(200);

/// Pings under way.
#[derive(Debug)]
pub struct Pings {
    ping: Running,
    /// Reads along: a full pipe would hold the pings up, and show as a gap.
    reader: JoinHandle<String>,
    interval: Duration,
}

/// What came of them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Heard {
    /// Requests sent, but for those that were still under way at the end.
    pub sent: u64,
    /// Requests of these without an answer.
    pub lost: u64,
    /// Longest time between two answers that followed each other, in milliseconds.
    pub gap_ms: u64,
}

impl Pings {
    /// Starts pinging an address; the interval is at least a millisecond.
    ///
    /// # Errors
    /// [`LabError`] when ping does not start.
    pub fn start(probe: &Probe, address: &str, interval: Duration) -> Result<Pings, LabError> {
        let seconds = format!("{:.3}", interval.as_secs_f64());
        let mut ping = probe.spawn(&["ping", "-D", "-n", "-i", &seconds, address])?;
        let output = ping.child().and_then(|child| child.stdout.take());
        let reader = std::thread::spawn(move || {
            let mut text = String::new();
            // What cannot be read counts as not said, and `finish` misses it.
            let _ = output.map(|mut output| output.read_to_string(&mut text));
            text
        });
        Ok(Pings { ping, reader, interval })
    }

    /// Stops, and counts.
    ///
    /// # Errors
    /// [`LabError`] when ping has ended before, or said nothing that counts.
    pub fn finish(self) -> Result<Heard, LabError> {
        self.ping.signal(INTERRUPT)?;
        let ended = self.ping.finish()?;
        let text = self.reader.join().unwrap_or_default();
        Heard::parse(&text, self.interval).ok_or_else(|| LabError::Answer {
            host: "probe".to_owned(),
            command: "ping".to_owned(),
            output: format!("{text}{}", String::from_utf8_lossy(&ended.stderr)),
        })
    }
}

impl Heard {
    /// Reads the output of iputils' `ping -D`.
    fn parse(text: &str, interval: Duration) -> Option<Heard> {
        let mut times = Vec::new();
        let mut answered = std::collections::BTreeSet::new();
        for line in text.lines().filter(|line| line.contains(" bytes from ")) {
            times.extend(line.strip_prefix('[').and_then(|line| line.split_once(']')?.0.parse::<f64>().ok()));
            let number = line.split_once("icmp_seq=").and_then(|(_, rest)| rest.split(' ').next());
            answered.extend(number.and_then(|number| number.parse::<u64>().ok()));
        }
        let gap = times.windows(2).map(|pair| pair[1] - pair[0]).fold(0.0, f64::max);
        let summary = text.lines().find(|line| line.contains(" packets transmitted"))?;
        let transmitted: u64 = summary.split(' ').next()?.parse().ok()?;
        let last = answered.last().copied().unwrap_or(0);
        let patience = (UNDER_WAY.as_nanos() / interval.as_nanos().max(1)) as u64;
        let sent = if transmitted.saturating_sub(last) <= patience { last } else { transmitted };
        Some(Heard {
            sent,
            lost: sent.saturating_sub(answered.len() as u64),
            gap_ms: (gap * 1000.0).round() as u64,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ping prints when these requests are answered, and so many are sent.
    fn said(answers: &[(f64, u64)], transmitted: u64) -> String {
        let lines = answers.iter().map(|(time, number)| {
            format!("[{time:.6}] 64 bytes from 10.0.0.2: icmp_seq={number} ttl=64 time=0.5 ms\n")
        });
        format!(
            "PING 10.0.0.2 (10.0.0.2) 56(84) bytes of data.\n{}\n--- 10.0.0.2 ping statistics ---\n\
             {transmitted} packets transmitted, {} received, 7% packet loss, time 110ms\n",
            lines.collect::<String>(),
            answers.len()
        )
    }

    fn parse(text: &str) -> Option<Heard> {
        Heard::parse(text, Duration::from_millis(10))
    }

    #[test]
    fn the_gap_is_the_longest_time_without_an_answer() {
        let text = said(&[(1700000000.0, 1), (1700000000.01, 2), (1700000000.11, 12)], 12);
        assert_eq!(parse(&text), Some(Heard { sent: 12, lost: 9, gap_ms: 100 }));
        assert_eq!(parse("nothing"), None);
    }

    #[test]
    fn requests_under_way_at_the_end_are_not_lost() {
        let text = said(&[(1700000000.0, 1), (1700000000.01, 2)], 4);
        assert_eq!(parse(&text), Some(Heard { sent: 2, lost: 0, gap_ms: 10 }));
    }

    #[test]
    fn a_peer_that_no_longer_answers_has_lost_them() {
        let text = said(&[(1700000000.0, 1), (1700000000.01, 2)], 40);
        assert_eq!(parse(&text), Some(Heard { sent: 40, lost: 38, gap_ms: 10 }));
        assert_eq!(parse(&said(&[], 40)), Some(Heard { sent: 40, lost: 40, gap_ms: 0 }));
    }
}
