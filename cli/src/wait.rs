//! Waiting for what the service does after it has answered.

use crate::error::{Error, Result};
use indicatif::ProgressBar;
use std::thread::sleep;
use std::time::{Duration, Instant};

/// Between two looks, at first.
const SHORT: Duration = Duration::from_millis(200);
/// Between two looks, when it takes long.
const LONG: Duration = Duration::from_secs(1);
/// After this it takes long.
const PATIENCE: Duration = Duration::from_secs(15);
/// A coordinator that restarts is back within this.
const ABSENCE: Duration = Duration::from_secs(30);

/// What a look saw.
pub(crate) enum Look<T> {
    /// It has happened.
    Done(T),
    /// Not yet; how it is now, in a word.
    Not(String),
}

/// What is waited for, in words for the messages.
pub(crate) struct Wait<'a> {
    /// `server s1 becomes ACTIVE`.
    pub(crate) what: &'a str,
    /// The command that shows how it goes on.
    pub(crate) look: String,
    /// At most this long.
    pub(crate) timeout: Duration,
}

impl Wait<'_> {
    /// Looks again and again until it is done. Short absences of the service are sat out.
    ///
    /// # Errors
    /// [`Error::TimedOut`], and whatever `look` meets.
    pub(crate) fn run<T>(&self, bar: &ProgressBar, mut look: impl FnMut() -> Result<Look<T>>) -> Result<T> {
        let start = Instant::now();
        let mut state = String::new();
        let mut absent_since: Option<Instant> = None;
        loop {
            match look() {
                Ok(Look::Done(value)) => {
                    bar.finish_and_clear();
                    return Ok(value);
                }
                Ok(Look::Not(now)) => {
                    absent_since = None;
                    state = now;
                    bar.set_message(state.clone());
                }
                Err(error) if error.is_transient() => {
                    let since = *absent_since.get_or_insert_with(Instant::now);
                    if since.elapsed() >= ABSENCE {
                        return Err(error);
                    }
                    bar.set_message("no answer, trying again");
                }
                Err(error) => return Err(error),
            }
            let elapsed = start.elapsed();
            if elapsed >= self.timeout {
                return Err(Error::TimedOut {
                    what: self.what.to_owned(),
                    after: self.timeout,
                    state,
                    look: self.look.clone(),
                });
            }
            let pause = if elapsed < PATIENCE { SHORT } else { LONG };
            sleep(pause.min(self.timeout - elapsed));
        }
    }
}
