//! The pool on a real folder, without workers.

use super::*;
use std::fs;
use std::os::unix::fs::symlink;

fn pool() -> (tempfile::TempDir, Pool) {
    let folder = tempfile::tempdir().unwrap();
    let pool = Pool::new(folder.path().to_owned(), PoolPolicy::default(), &Registry::new()).unwrap();
    (folder, pool)
}

#[test]
fn a_console_is_read_from_its_end() {
    let (_folder, pool) = pool();
    let instance = InstanceId::random();
    assert_eq!(pool.console(instance, None).unwrap(), "");
    let paths = pool.instance(instance);
    fs::create_dir_all(&paths.folder).unwrap();
    fs::write(&paths.console, b"one\ntwo\n\xff\n").unwrap();
    assert_eq!(pool.console(instance, Some(2)).unwrap(), "two\n\u{fffd}\n");
    assert_eq!(pool.console(instance, Some(0)).unwrap(), "");
    assert_eq!(pool.console(instance, Some(9)).unwrap(), "one\ntwo\n\u{fffd}\n");
    fs::write(&paths.console, vec![b'x'; 3 << 20]).unwrap();
    assert_eq!(pool.console(instance, None).unwrap().len(), 1 << 20);
}

#[test]
fn deleting_removes_what_is_ours_and_repeats() {
    let (_folder, pool) = pool();
    let instance = InstanceId::random();
    let paths = pool.instance(instance);
    fs::create_dir_all(&paths.folder).unwrap();
    for path in paths.all() {
        fs::write(path, b"x").unwrap();
    }
    fs::write(paths.folder.join("console.log.0"), b"x").unwrap();
    pool.delete_disk(instance).unwrap();
    assert!(!paths.folder.exists());
    pool.delete_disk(instance).unwrap();
}

#[test]
fn deleting_follows_no_link_and_leaves_foreign_files() {
    let (folder, pool) = pool();
    let outside = folder.path().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("disk"), b"precious").unwrap();
    let linked = InstanceId::random();
    fs::create_dir(folder.path().join("instances")).unwrap();
    symlink(&outside, pool.instance(linked).folder).unwrap();
    assert!(matches!(pool.delete_disk(linked), Err(StorageError::Unexpected { .. })));

    let instance = InstanceId::random();
    let paths = pool.instance(instance);
    fs::create_dir(&paths.folder).unwrap();
    symlink(outside.join("disk"), &paths.disk).unwrap();
    fs::write(paths.folder.join("notes"), b"mine").unwrap();
    assert!(matches!(pool.delete_disk(instance), Err(StorageError::Unexpected { .. })));
    assert!(paths.folder.join("notes").exists());
    assert_eq!(fs::read(outside.join("disk")).unwrap(), b"precious");
}

#[test]
fn a_pool_that_is_not_there_is_reported_unreachable() {
    let pool_of_nothing = Pool::new("/nonexistent/pool".into(), PoolPolicy::default(), &Registry::new());
    let report = pool_of_nothing.unwrap().report(Duration::from_secs(5));
    assert!(!report.reachable);
    assert_eq!(report.total_bytes, 0);
    let (_folder, pool) = pool();
    assert!(pool.report(Duration::from_secs(5)).reachable);
}

#[test]
fn a_partial_name_keeps_the_ending_it_grows_into() {
    assert_eq!(partial(Path::new("/a/disk")), Path::new("/a/disk.partial"));
    assert_eq!(partial(Path::new("/a/config.iso")), Path::new("/a/config.iso.partial"));
}
