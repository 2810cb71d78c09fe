//! Crash points for tests: in builds with debug assertions the process aborts, once, at a named place, so that
//! every step can be cut before and after its effect. Release builds hold none of it.

/// Aborts when `GODWIT_CRASH_AT` is `<place>:<side>`; the file named by `GODWIT_CRASH_ONCE` then keeps the next
/// life from doing it again.
pub fn point(place: &str, side: &str) {
    if cfg!(debug_assertions) {
        let wanted = std::env::var("GODWIT_CRASH_AT").ok();
        let Some((wanted_place, wanted_side)) = wanted.as_deref().and_then(|w| w.rsplit_once(':')) else {
            return;
        };
        if (wanted_place, wanted_side) != (place, side) {
            return;
        }
        if let Ok(marker) = std::env::var("GODWIT_CRASH_ONCE") {
            if std::path::Path::new(&marker).exists() {
                return;
            }
            let _ = std::fs::write(&marker, format!("{place}:{side}\n"));
        }
        eprintln!("crash point {place}:{side}");
        std::process::abort();
    }
}
