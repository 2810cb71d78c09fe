//! Copies on the machine's own file systems.

use super::*;
use crate::datapath::ordered::Checksum;
use crate::storage::qcow2::{Header, HeaderError};
use godwit_protocol::error::{ErrorKind, RequestError};
use std::os::unix::fs::{FileExt, symlink};
use std::process::Command;
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
        options: Options::default(),
    }
}

fn with(order: &CopyOrder, set: impl FnOnce(&mut Options)) -> CopyOrder {
    let mut order = order.clone();
    set(&mut order.options);
    order
}

/// Every way that bytes take through this process.
const LOOPS: [Method; 2] = [Method::IoUring, Method::Threads];

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
fn every_odd_size_arrives_as_it_was_by_every_way() {
    for folder in folders() {
        for method in LOOPS {
            let order = with(&order(&folder), |options| options.method = Some(method));
            let sizes =
                [0, 1, 511, 4095, 4096, 4097, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, (17 << 20) + 12_345];
            for size in sizes {
                let bytes = pattern(size);
                fs::write(&order.source, &bytes).unwrap();
                let report = run(&order).unwrap();
                assert_eq!((report.size_bytes, report.method), (size as u64, method));
                assert!(fs::read(&order.destination).unwrap() == bytes, "{size} bytes in {folder:?}");
                fs::remove_file(&order.destination).unwrap();
            }
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
            source.write_all_at(&bytes, offset).unwrap();
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

/// A journal that says of all chunks that they are done, whatever the grid.
fn write_journal(order: &CopyOrder, grid: usize) {
    let source = File::open(&order.source).unwrap();
    let target = fs::metadata(partial(&order.destination)).unwrap().ino();
    let size_bytes = source.metadata().unwrap().len();
    let plan = Plan::new(order, &source, size_bytes).unwrap();
    let subject = Subject::new(Stamp::of(&source).unwrap(), target, plan.conversion(), grid, None);
    let journal = Journal::create(&journal(&order.destination), &subject).unwrap();
    for offset in (0..size_bytes).step_by(grid) {
        journal.record(offset, crate::datapath::journal::Done::Copied, None).unwrap();
    }
}

#[test]
fn a_journal_is_believed_only_beside_the_bytes_that_it_is_about() {
    let bytes = pattern(17 << 20);
    for folder in folders() {
        let order = order(&folder);
        fs::write(&order.source, &bytes).unwrap();
        let mut believed = 0;
        for grid in [512 << 10, 1 << 20, 2 << 20] {
            // Somebody removed the growing file, and the next one has its inode.
            fs::write(partial(&order.destination), b"").unwrap();
            write_journal(&order, grid);
            let report = run(&order).unwrap();
            assert_eq!(report.resumed_bytes, 0, "{grid}");
            assert!(fs::read(&order.destination).unwrap() == bytes, "{grid}");
            // It is believed where the bytes may be there: this is the grid in use.
            fs::write(partial(&order.destination), &bytes).unwrap();
            write_journal(&order, grid);
            let overwrite = with(&order, |options| options.overwrite = true);
            believed += u32::from(run(&overwrite).unwrap().resumed_bytes == bytes.len() as u64);
            assert!(fs::read(&order.destination).unwrap() == bytes, "{grid}");
            fs::remove_file(&order.destination).unwrap();
        }
        assert_eq!(believed, 1, "one grid is the right one: {folder:?}");
    }
}

#[test]
fn a_copy_that_begins_anew_leaves_no_older_journal_beside_its_bytes() {
    for folder in folders() {
        let order = with(&order(&folder), |options| options.no_resume = true);
        let bytes = pattern(17 << 20);
        fs::write(&order.source, &bytes).unwrap();
        fs::write(partial(&order.destination), &bytes).unwrap();
        write_journal(&order, 2 << 20);
        let beside = journal(&order.destination);
        copy(&order, &mut |_, _| {
            assert!(!beside.exists(), "a kill here, and the next copy would believe it")
        })
        .unwrap();
        assert!(fs::read(&order.destination).unwrap() == bytes);
    }
}

#[test]
fn zeros_within_data_become_holes_by_every_way() {
    for folder in folders() {
        for method in LOOPS {
            let order = with(&order(&folder), |options| options.method = Some(method));
            let mut bytes = pattern(40 << 20);
            bytes[(4 << 20) + 5000..(30 << 20) + 100].fill(0);
            fs::write(&order.source, &bytes).unwrap();
            let report = run(&order).unwrap();
            assert_eq!(report.data_bytes, 40 << 20);
            assert!(report.written_bytes < (14 << 20) + 20_000, "{report:?}");
            let copied = fs::metadata(&order.destination).unwrap();
            assert!(copied.blocks() * 512 < (14 << 20) + 300_000, "{}", copied.blocks());
            assert!(fs::read(&order.destination).unwrap() == bytes);
            fs::remove_file(&order.destination).unwrap();
        }
    }
}

#[test]
fn the_file_that_had_the_name_is_replaced_only_when_asked_and_only_by_the_whole_copy() {
    let [folder, _] = folders();
    let order = with(&order(&folder), |options| options.overwrite = true);
    fs::write(&order.source, pattern(20 << 20)).unwrap();
    fs::write(&order.destination, b"old").unwrap();
    let destination = order.destination.clone();
    copy(&order, &mut |_, _| assert_eq!(fs::read(&destination).unwrap(), b"old")).unwrap();
    assert!(fs::read(&order.destination).unwrap() == pattern(20 << 20));
    assert_eq!(names(&folder), ["destination", "source"]);
}

#[test]
fn what_cannot_be_replaced_is_refused_with_what_it_is() {
    let [folder, _] = folders();
    let order = with(&order(&folder), |options| options.overwrite = true);
    fs::write(&order.source, b"x").unwrap();
    let to = |destination: &Path| run(&CopyOrder { destination: destination.to_owned(), ..order.clone() });
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("folder")).unwrap();
    symlink("source", path("link")).unwrap();
    fs::hard_link(path("source"), path("same")).unwrap();
    for (destination, word) in [(path("folder"), "a folder"), (path("link"), "a symbolic link")] {
        let error = to(&destination).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
    let device = to(Path::new("/dev/null")).unwrap_err().to_string();
    assert!(device.contains("a device"), "{device}");
    for same in [path("same"), path("source")] {
        assert!(matches!(to(&same), Err(CopyError::SameFile(_))));
    }
    for nameless in ["new/", ".."] {
        let outcome = to(&path(nameless));
        let refused = matches!(outcome, Err(CopyError::NoName(_) | CopyError::DestinationKind { .. }));
        assert!(refused, "{nameless}: {outcome:?}");
    }
    let odd = path("two\nlines \u{1b}[2J");
    to(&odd).unwrap();
    assert_eq!(fs::read(&odd).unwrap(), b"x");
    let error = run(&CopyOrder { destination: path("no/such"), ..order.clone() }).unwrap_err();
    assert!(matches!(error, CopyError::Io { action: "create", .. }), "{error}");
    assert_eq!(names(&folder), ["folder", "link", "same", "source", "two\nlines \u{1b}[2J"]);
}

#[test]
fn a_second_copy_to_the_same_name_is_refused_while_the_first_goes_on() {
    let [folder, _] = folders();
    let order = order(&folder);
    fs::write(&order.source, pattern(3 << 20)).unwrap();
    let mut second = Some(order.clone());
    let mut refused = 0;
    copy(&order, &mut |_, _| {
        let Some(second) = second.take() else { return };
        refused += u32::from(matches!(run(&second), Err(CopyError::Busy(_))));
    })
    .unwrap();
    assert_eq!(refused, 1);
    assert!(fs::read(&order.destination).unwrap() == pattern(3 << 20));
    assert_eq!(names(&folder), ["destination", "source"]);
}

#[test]
fn a_flipped_bit_in_a_source_with_known_digests_is_an_error_and_no_disk() {
    for folder in folders() {
        let first = with(&order(&folder), |options| options.digests = true);
        fs::write(&first.source, pattern((20 << 20) + 77)).unwrap();
        let report = run(&first).unwrap();
        assert!(report.digests_root.is_some() && !report.checked);
        let copied = first.destination.clone();
        let again =
            CopyOrder { source: copied.clone(), destination: folder.path().join("again"), ..order(&folder) };
        assert!(run(&again).unwrap().checked);
        fs::remove_file(&again.destination).unwrap();
        // The disk lies, and keeps the time of change.
        let file = OpenOptions::new().read(true).write(true).open(&copied).unwrap();
        let modified = file.metadata().unwrap().modified().unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, (7 << 20) + 123).unwrap();
        file.write_all_at(&[byte[0] ^ 4], (7 << 20) + 123).unwrap();
        file.set_modified(modified).unwrap();
        for method in LOOPS {
            let again = with(&again, |options| options.method = Some(method));
            let outcome = run(&again);
            assert!(
                matches!(outcome, Err(CopyError::Damaged { offset, .. }) if offset == 7 << 20),
                "{outcome:?}"
            );
        }
        // Said by hand it is the same.
        let named = with(&again, |options| options.expect = Some(digests::beside(&copied)));
        assert!(matches!(run(&named), Err(CopyError::Damaged { .. })));
        assert_eq!(names(&folder), ["destination", "destination.blake3", "source"]);
    }
}

#[test]
fn digests_beside_a_copy_are_those_of_its_chunks_holes_included() {
    let [folder, _] = folders();
    let order =
        CopyOrder { size_bytes: Some(30 << 20), ..with(&order(&folder), |options| options.digests = true) };
    let source = File::create(&order.source).unwrap();
    source.set_len((25 << 20) + 5).unwrap();
    source.write_all_at(&pattern(3_000_000), 10 << 20).unwrap();
    run(&order).unwrap();
    let copied = fs::read(&order.destination).unwrap();
    let list = Digests::open(&digests::beside(&order.destination)).unwrap();
    for (index, chunk) in copied.chunks(digests::DIGEST_CHUNK_BYTES).enumerate() {
        let offset = (index * digests::DIGEST_CHUNK_BYTES) as u64;
        assert_eq!(list.at(offset).unwrap(), digests::digest(chunk), "at {offset}");
    }
}

#[test]
fn digests_of_the_whole_are_made_while_the_bytes_pass() {
    use sha2::Digest as _;
    for folder in folders() {
        let order =
            with(&order(&folder), |options| options.checksums = vec![Checksum::Sha512, Checksum::Md5]);
        let source = File::create(&order.source).unwrap();
        source.set_len((40 << 20) + 1).unwrap();
        source.write_all_at(&pattern(9_000_000), 7 << 20).unwrap();
        let report = run(&order).unwrap();
        let bytes = fs::read(&order.source).unwrap();
        assert_eq!(report.sha512, Some(hex::encode(sha2::Sha512::digest(&bytes))));
        assert_eq!(report.md5, Some(hex::encode(md5::Md5::digest(&bytes))));
        assert!(fs::read(&order.destination).unwrap() == bytes);
    }
}

/// The copy is spoiled between its transfer and its verification, as a bad disk would.
#[test]
fn a_copy_that_reads_otherwise_than_it_was_written_is_no_copy() {
    for folder in folders() {
        let order = with(&order(&folder), |options| options.verify = true);
        let source = File::create(&order.source).unwrap();
        source.write_all_at(&pattern(14 << 20), 0).unwrap();
        source.write_all_at(&pattern((2 << 20) + 5), 18 << 20).unwrap();
        assert!(run(&order).unwrap().verified);
        let growing = partial(&order.destination);
        // Data, a hole, and a last chunk of less than a block; the chunks of all grids begin at the first two.
        for (at, chunk) in [(12 << 20, 12 << 20), (16 << 20, 16 << 20), ((20 << 20) + 4, 20 << 20)] {
            fs::remove_file(&order.destination).unwrap();
            let mut rounds = 0;
            let outcome = copy(&order, &mut |done, total| {
                // Verification counts anew.
                rounds += u32::from(done == total);
                if rounds == 1 && done == 0 {
                    let file = OpenOptions::new().write(true).open(&growing).unwrap();
                    file.write_all_at(b"!", at).unwrap();
                    file.sync_all().unwrap();
                }
            });
            let found = matches!(outcome, Err(CopyError::Verify { offset, .. }) if offset == chunk);
            assert!(found, "{at}: {outcome:?}");
            assert_eq!(names(&folder), ["source"]);
            fs::write(&order.destination, b"").unwrap();
        }
    }
}

fn qemu_img(arguments: &[&str], paths: &[&Path]) -> String {
    let output = Command::new("qemu-img").args(arguments).args(paths).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A raw disk of 64 MiB with data here and there.
fn write_disk(path: &Path) {
    let disk = File::create(path).unwrap();
    disk.set_len(64 << 20).unwrap();
    for (offset, length) in
        [(0, 100_000), (3 << 20, 5_000_000), ((40 << 20) + 4096, 70_000), ((64 << 20) - 512, 512)]
    {
        disk.write_all_at(&pattern(length), offset).unwrap();
    }
}

#[test]
fn a_disk_becomes_qcow2_and_raw_again() {
    for folder in folders() {
        for method in LOOPS {
            let to_qcow2 = with(&order(&folder), |options| {
                (options.to, options.method, options.verify) = (Some(DiskFormat::Qcow2), Some(method), true);
            });
            write_disk(&to_qcow2.source);
            assert!(run(&to_qcow2).unwrap().verified);
            let image = &to_qcow2.destination;
            qemu_img(&["check", "-q", "-f", "qcow2"], &[image]);
            qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[&to_qcow2.source, image]);
            assert!(fs::metadata(image).unwrap().blocks() * 512 < 7 << 20);
            let raw = folder.path().join("raw");
            let to_raw = CopyOrder {
                source: image.clone(),
                destination: raw.clone(),
                format: DiskFormat::Qcow2,
                ..order(&folder)
            };
            let to_raw = with(&to_raw, |options| {
                (options.to, options.method, options.digests) = (Some(DiskFormat::Raw), Some(method), true)
            });
            run(&to_raw).unwrap();
            assert!(fs::read(&to_qcow2.source).unwrap() == fs::read(&raw).unwrap());
            assert!(fs::metadata(&raw).unwrap().blocks() * 512 < 6 << 20);
            for path in [image.clone(), raw.clone(), digests::beside(&raw)] {
                fs::remove_file(path).unwrap();
            }
        }
    }
}

#[test]
fn zeros_within_data_are_no_data_in_a_new_image() {
    let [folder, _] = folders();
    let order = with(&order(&folder), |options| options.to = Some(DiskFormat::Qcow2));
    let mut bytes = pattern(24 << 20);
    bytes[4 << 20..20 << 20].fill(0);
    fs::write(&order.source, &bytes).unwrap();
    run(&order).unwrap();
    qemu_img(&["check", "-q", "-f", "qcow2"], &[&order.destination]);
    qemu_img(&["compare", "-q", "-f", "raw", "-F", "qcow2"], &[&order.source, &order.destination]);
    let map = qemu_img(&["map", "--output=json", "-f", "qcow2"], &[&order.destination]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let data = map.as_array().unwrap().iter().filter(|run| run["data"] == true);
    assert_eq!(data.map(|run| run["length"].as_u64().unwrap()).sum::<u64>(), 8 << 20, "{map}");
}

#[test]
fn compressed_images_and_small_clusters_become_raw() {
    let [folder, _] = folders();
    let disk = folder.path().join("disk");
    write_disk(&disk);
    for options in
        [&["-c"][..], &["-o", "cluster_size=512"], &["-o", "cluster_size=2M"], &["-o", "compat=0.10"]]
    {
        let order = CopyOrder { format: DiskFormat::Qcow2, ..order(&folder) };
        let arguments = [&["convert", "-f", "raw", "-O", "qcow2"][..], options].concat();
        qemu_img(&arguments, &[&disk, &order.source]);
        let order = with(&order, |options| options.to = Some(DiskFormat::Raw));
        run(&order).unwrap();
        assert!(fs::read(&disk).unwrap() == fs::read(&order.destination).unwrap(), "{options:?}");
        fs::remove_file(&order.destination).unwrap();
    }
}

#[test]
fn an_image_that_leads_elsewhere_or_cannot_be_is_refused_before_anything_is_made() {
    let [folder, _] = folders();
    let order = CopyOrder { format: DiskFormat::Qcow2, ..order(&folder) };
    let order = with(&order, |options| options.to = Some(DiskFormat::Raw));
    qemu_img(&["create", "-q", "-f", "qcow2"], &[&order.source, Path::new("8M")]);
    let good = fs::read(&order.source).unwrap();
    let refuse = |at: usize, bytes: &[u8]| {
        let mut image = good.clone();
        image[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(&order.source, image).unwrap();
        match run(&order) {
            Err(CopyError::Header { source, .. }) => source,
            other => panic!("byte {at}: {other:?}"),
        }
    };
    assert_eq!(refuse(8, &200_u64.to_be_bytes()), HeaderError::BackingFile);
    assert_eq!(refuse(79, &[4]), HeaderError::DataFile);
    assert_eq!(refuse(79, &[2]), HeaderError::Corrupt);
    assert_eq!(refuse(78, &[1]), HeaderError::Feature("a feature that is not known"));
    assert_eq!(refuse(56, &u32::MAX.to_be_bytes()), HeaderError::Table("table of reference counts"));
    assert_eq!(refuse(36, &u32::MAX.to_be_bytes()), HeaderError::Table("first-level table"));
    assert_eq!(refuse(0, b"QFI\0"), HeaderError::NotQcow2);
    assert_eq!(names(&folder), ["source"]);
}

/// Tables that point outside of the file, at each other and at the header: an error or zeros, never a panic.
#[test]
fn no_bytes_in_an_images_tables_bring_the_copy_down() {
    let [folder, _] = folders();
    let order = CopyOrder { format: DiskFormat::Qcow2, ..order(&folder) };
    let order = with(&order, |options| (options.to, options.overwrite) = (Some(DiskFormat::Raw), true));
    let disk = folder.path().join("disk");
    fs::write(&disk, pattern(300_000)).unwrap();
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2"], &[&disk, &order.source]);
    let good = fs::read(&order.source).unwrap();
    let mut state = 0x1234_5678_9abc_def1_u64;
    for _ in 0..200 {
        let mut image = good.clone();
        for _ in 0..8 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let at = 20 + (state >> 33) as usize % (image.len() - 20);
            image[at] = (state >> 24) as u8;
        }
        // The tables are where most changes matter.
        let table = 4 * 65_536 + (state >> 40) as usize % 64;
        if table < image.len() {
            image[table] ^= 1 << (state % 8);
        }
        fs::write(&order.source, image).unwrap();
        let _ = run(&order);
    }
    assert!(!partial(&order.destination).exists());
}

#[test]
fn a_way_that_does_not_lead_there_is_refused_when_it_is_demanded() {
    let [folder, _] = folders();
    let order = order(&folder);
    fs::write(&order.source, b"x").unwrap();
    for method in [Method::Reflink, Method::ServerSide] {
        let outcome = run(&with(&order, |options| options.method = Some(method)));
        assert!(matches!(outcome, Err(CopyError::Method { .. })), "{outcome:?}");
    }
    assert_eq!(names(&folder), ["source"]);
}
