//! The mark of a pool, by which hosts that have it know it for the same: `mark` in its folder, a symbolic link to a name
//! that was drawn once and is the name of nothing. A link appears whole, under a name that is given once, and is read
//! without an open file. A copy of a whole pool has the mark of the first: the mark is good for what people are told
//! and for what is worth trying, and never proves that a disk is there ([`super::moves`] does).

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::symlink;
use std::path::Path;
use uuid::Uuid;

/// Its name.
const NAME: &str = "mark";

/// The mark of the pool at `pool`, which is given one if it has none; none where there can be none: it is read-only, or
/// somebody has put something else there.
pub(super) fn ensure(pool: &Path) -> Option<Uuid> {
    let path = pool.join(NAME);
    match fs::read_link(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => {
            // Another host may be faster; then its mark is the one.
            let _ = symlink(Uuid::new_v4().to_string(), &path);
            read(&path)
        }
        _ => read(&path),
    }
}

fn read(path: &Path) -> Option<Uuid> {
    fs::read_link(path).ok()?.to_str()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pool_gets_one_mark_however_many_look_for_it_at_once_and_another_pool_another() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let looks = std::thread::scope(|scope| {
            let look = || scope.spawn(|| ensure(one.path()).unwrap());
            let looking: Vec<_> = (0..8).map(|_| look()).collect();
            looking.into_iter().map(|look| look.join().unwrap()).collect::<Vec<_>>()
        });
        assert!(looks.iter().all(|mark| *mark == looks[0]), "{looks:?}");
        assert_ne!(ensure(other.path()), Some(looks[0]));
        assert_eq!(fs::read_dir(one.path()).unwrap().count(), 1);
    }

    #[test]
    fn what_somebody_else_has_put_there_is_no_mark_and_stays() {
        let pool = tempfile::tempdir().unwrap();
        fs::write(pool.path().join(NAME), "mine").unwrap();
        assert_eq!(ensure(pool.path()), None);
        assert_eq!(fs::read(pool.path().join(NAME)).unwrap(), b"mine");
        assert_eq!(ensure(&pool.path().join("away")), None);
    }
}
