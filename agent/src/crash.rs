//! Crash points: a test names one, and the process dies there, as by kill -9. Debug builds only.

/// On which side of an effect a crash point lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// Nothing has happened yet.
    Before,
    /// It has happened, and nobody has been told.
    After,
}

/// Aborts the process when `GODWIT_CRASH_AT` is `<name>:before` or `<name>:after` as `side` says, unless the
/// file that `GODWIT_CRASH_ONCE` names is there; it is made first, so that the next start gets past this point.
#[cfg(debug_assertions)]
pub fn point(name: &str, side: Side) {
    let Ok(wanted) = std::env::var("GODWIT_CRASH_AT") else { return };
    let side = match side {
        Side::Before => "before",
        Side::After => "after",
    };
    if wanted.split_once(':') != Some((name, side)) {
        return;
    }
    if let Some(marker) = std::env::var_os("GODWIT_CRASH_ONCE")
        && std::fs::OpenOptions::new().write(true).create_new(true).open(&marker).is_err()
    {
        return;
    }
    eprintln!("crash point {wanted}");
    std::process::abort();
}

/// Nothing, in a release build.
#[cfg(not(debug_assertions))]
pub fn point(_name: &str, _side: Side) {}
