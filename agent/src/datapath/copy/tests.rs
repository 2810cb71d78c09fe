//! Copies on the machine's own file systems.

use super::*;
use std::os::unix::fs::symlink;
use tempfile::TempDir;

/// A folder on the machine's disk and one on tmpfs.
fn folders() -> [TempDir; 2] {
    let disk =
        tempfile::Builder::new().tempdir_in(env!("CARGO_MANIFEST_DIR").to_owned() + "/../target").unwrap();
    [disk, tempfile::Builder::new().tempdir_in("/dev/shm").unwrap()]
}

fn order(folder: &TempDir) -> CopyOrder {
    CopyOrder {
        source: folder.path().join("source"),
        destination: folder.path().join("destination"),
        format: DiskFormat::Raw,
        size_bytes: None,
    }
}

fn names(folder: &TempDir) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Bytes that tell where they belong.
fn pattern(length: usize) -> Vec<u8> {
    (0..length as u64).map(|n| (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 56) as u8).collect()
}

fn run(order: &CopyOrder) -> Result<CopyReport, CopyError> {
    copy(order, &mut |done, total| assert!(done <= total, "{done} of {total}"))
}

#[test]
fn every_odd_size_arrives_as_it_was() {
    for folder in folders() {
        let order = order(&folder);
        for size in [0, 1, 511, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (5 << 20) + 12_345] {
            let bytes = pattern(size);
            fs::write(&order.source, &bytes).unwrap();
            let report = run(&order).unwrap();
            assert_eq!(report.size_bytes, size as u64);
            assert!(fs::read(&order.destination).unwrap() == bytes, "{size} bytes in {folder:?}");
            fs::remove_file(&order.destination).unwrap();
        }
        assert_eq!(names(&folder), ["source"]);
    }
}

#[test]
fn holes_stay_holes_and_data_between_them_arrives() {
    for folder in folders() {
        let order = order(&folder);
        let source = File::create(&order.source).unwrap();
        source.set_len(200 << 20).unwrap();
        let bytes = pattern(300_000);
        let offsets = [0, 50 << 20, (120 << 20) + 777, (200 << 20) - 300_000];
        for offset in offsets {
            std::os::unix::fs::FileExt::write_all_at(&source, &bytes, offset).unwrap();
        }
        source.sync_all().unwrap();
        let report = run(&order).unwrap();
        assert!(report.data_bytes < 3 << 20, "{report:?}");
        let copied = File::open(&order.destination).unwrap();
        assert!(copied.metadata().unwrap().blocks() * 512 < 3 << 20);
        assert_eq!(copied.metadata().unwrap().len(), 200 << 20);
        assert!(fs::read(&order.source).unwrap() == fs::read(&order.destination).unwrap());
    }
}

#[test]
fn a_raw_disk_grows_with_zeros() {
    for folder in folders() {
        let order = CopyOrder { size_bytes: Some(10 << 20), ..order(&folder) };
        fs::write(&order.source, pattern(5000)).unwrap();
        run(&order).unwrap();
        let copied = fs::read(&order.destination).unwrap();
        assert_eq!(copied.len(), 10 << 20);
        assert!(copied[..5000] == pattern(5000) && copied[5000..].iter().all(|&byte| byte == 0));
    }
}

#[test]
fn a_qcow2_disk_grows_for_the_guest() {
    let [folder, _] = folders();
    let order = CopyOrder { format: DiskFormat::Qcow2, size_bytes: Some(64 << 20), ..order(&folder) };
    let created =
        Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&order.source).arg("8M").status();
    assert!(created.unwrap().success());
    run(&order).unwrap();
    let head = fs::read(&order.destination).unwrap();
    assert_eq!(Header::parse(&head).unwrap().virtual_size_bytes, 64 << 20);
}

#[test]
fn a_disk_smaller_than_its_image_is_refused() {
    let [folder, _] = folders();
    let order = CopyOrder { size_bytes: Some(4999), ..order(&folder) };
    fs::write(&order.source, pattern(5000)).unwrap();
    assert!(matches!(run(&order), Err(CopyError::TooSmall { wanted_bytes: 4999, have_bytes: 5000 })));
    assert_eq!(names(&folder), ["source"]);
}

#[test]
fn an_image_with_a_backing_file_is_refused() {
    let [folder, _] = folders();
    let order = CopyOrder { format: DiskFormat::Qcow2, size_bytes: Some(1 << 30), ..order(&folder) };
    let mut head = crate::storage::qcow2::tests::header(1 << 20);
    head[15] = 200;
    fs::write(&order.source, head).unwrap();
    let error = run(&order).unwrap_err();
    assert!(matches!(error, CopyError::Header { source: HeaderError::BackingFile, .. }), "{error}");
    assert_eq!(RequestError::from(error).kind, ErrorKind::Invalid);
    assert_eq!(names(&folder), ["source"]);
}

#[test]
fn what_is_no_regular_file_is_refused() {
    let [folder, _] = folders();
    let order = order(&folder);
    assert!(matches!(run(&order), Err(CopyError::NoSource(_))));
    symlink("/etc/hostname", &order.source).unwrap();
    assert!(matches!(run(&order), Err(CopyError::NotRegular(_))));
    fs::remove_file(&order.source).unwrap();
    nix::unistd::mkfifo(&order.source, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(matches!(run(&order), Err(CopyError::NotRegular(_))));
    fs::remove_file(&order.source).unwrap();
    fs::create_dir(&order.source).unwrap();
    assert!(matches!(run(&order), Err(CopyError::NotRegular(_))));
    assert_eq!(names(&folder), ["source"]);
}

#[test]
fn a_destination_that_is_there_is_never_touched() {
    let [folder, _] = folders();
    let order = order(&folder);
    fs::write(&order.source, b"new").unwrap();
    fs::write(&order.destination, b"old").unwrap();
    assert!(matches!(run(&order), Err(CopyError::DestinationExists(_))));
    assert_eq!(fs::read(&order.destination).unwrap(), b"old");
    fs::remove_file(&order.destination).unwrap();
    symlink("elsewhere", &order.destination).unwrap();
    assert!(matches!(run(&order), Err(CopyError::DestinationExists(_))));
    assert_eq!(names(&folder), ["destination", "source"]);
}

#[test]
fn a_source_cut_short_under_the_copy_is_an_error_and_leaves_nothing() {
    for folder in folders() {
        let order = order(&folder);
        fs::write(&order.source, pattern(96 << 20)).unwrap();
        let cut = OpenOptions::new().write(true).open(&order.source).unwrap();
        let outcome = copy(&order, &mut |_, _| cut.set_len(1 << 20).unwrap());
        assert!(matches!(outcome, Err(CopyError::SourceChanged(_))), "{outcome:?}");
        assert_eq!(names(&folder), ["source"]);
    }
}

#[test]
fn what_an_earlier_attempt_left_is_replaced() {
    let [folder, _] = folders();
    let order = order(&folder);
    fs::write(&order.source, b"whole").unwrap();
    fs::write(partial(&order.destination), b"leftover").unwrap();
    run(&order).unwrap();
    assert_eq!(fs::read(&order.destination).unwrap(), b"whole");
    assert_eq!(names(&folder), ["destination", "source"]);
}
