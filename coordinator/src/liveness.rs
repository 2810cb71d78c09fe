//! Is a host there? Pure: from when it was last heard of.

use crate::fleet::Time;
use std::time::Duration;

/// What a silence means. It never means that the guests are dead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Liveness {
    /// Heard of within three heartbeats.
    Up,
    /// Silent for longer: nothing new is placed there.
    Late,
    /// Silent for more than fifteen heartbeats. It keeps its reservations and nothing is restarted elsewhere.
    Lost,
}

impl Liveness {
    /// Its name in the API, metrics and refusals.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Up => "up",
            Self::Late => "late",
            Self::Lost => "lost",
        }
    }
}

/// Heartbeats after which a silent host is late.
const LATE_AFTER: u32 = 3;

/// Heartbeats after which a silent host is lost.
pub const LOST_AFTER: u32 = 15;

/// Judges a host by its newest sign of life; none: it has not been heard of in this process's life.
pub fn judge(now: Time, seen_at: Option<Time>, heartbeat: Duration) -> Liveness {
    let Some(seen_at) = seen_at else { return Liveness::Lost };
    let silence = now - seen_at;
    if silence <= heartbeat * LATE_AFTER {
        Liveness::Up
    } else if silence <= heartbeat * LOST_AFTER {
        Liveness::Late
    } else {
        Liveness::Lost
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_silent_host_is_first_late_and_then_lost() {
        let start = Time::UNIX_EPOCH;
        let second = Duration::from_secs(1);
        for (silence, expected) in [
            (0, Liveness::Up),
            (3, Liveness::Up),
            (4, Liveness::Late),
            (15, Liveness::Late),
            (16, Liveness::Lost),
        ] {
            assert_eq!(judge(start + second * silence, Some(start), second), expected, "{silence} s");
        }
        assert_eq!(judge(start, None, second), Liveness::Lost);
    }

    #[test]
    fn a_clock_that_steps_back_loses_no_host() {
        let now = Time::UNIX_EPOCH;
        assert_eq!(judge(now, Some(now + Duration::from_secs(60)), Duration::from_secs(1)), Liveness::Up);
    }
}
