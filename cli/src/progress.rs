//! Bars and spinners on standard error, shown only on a terminal.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::time::Duration;

/// Makes bars and spinners, or hidden ones.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Progress {
    /// Whether anything may be shown.
    pub(crate) shown: bool,
}

impl Progress {
    /// Turns while `what` is waited for.
    pub(crate) fn spinner(self, what: &str) -> ProgressBar {
        let bar = self.bar(None, "{spinner} {prefix} {elapsed}  {msg}");
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(100));
        bar
    }

    /// Fills up while `total_bytes` are moved.
    pub(crate) fn bytes(self, what: &str, total_bytes: Option<u64>) -> ProgressBar {
        let template = match total_bytes {
            Some(_) => "{prefix} [{bar:30}] {binary_bytes}/{binary_total_bytes} {binary_bytes_per_sec} {msg}",
            None => "{spinner} {prefix} {binary_bytes} {binary_bytes_per_sec} {msg}",
        };
        let bar = self.bar(total_bytes, template);
        bar.set_prefix(what.to_owned());
        bar
    }

    fn bar(self, length: Option<u64>, template: &str) -> ProgressBar {
        let target = if self.shown { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
        let style = ProgressStyle::with_template(template).expect("the templates of this file are right");
        ProgressBar::with_draw_target(length, target).with_style(style.progress_chars("=> "))
    }
}
