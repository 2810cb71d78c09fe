//! `godwit image`: upload, list, show, save, delete.

use crate::error::{Error, Result};
use crate::output::{Column, Format, cell};
use crate::resource::{IMAGE, id};
use crate::session::Service;
use crate::wait::{Look, Wait};
use crate::{App, find_all, units};
use clap::{Subcommand, ValueEnum};
use indicatif::ProgressBar;
use serde_json::{Value, json};
use sha2::{Digest, Sha512};
use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What can be done with images.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Upload a file as an image and check that it arrived whole
    Create {
        /// The image's name
        name: String,
        /// The file to upload
        #[arg(long)]
        file: PathBuf,
        /// The file's format
        #[arg(long)]
        disk_format: DiskFormat,
        /// What the disk is packed in
        #[arg(long, default_value = "bare")]
        container_format: String,
        /// Let every project use it
        #[arg(long)]
        public: bool,
        /// A property, such as hw_disk_bus=virtio; may be repeated
        #[arg(long, value_name = "KEY=VALUE", value_parser = units::property)]
        property: Vec<(String, String)>,
    },
    /// List images
    List,
    /// Show one image
    Show {
        /// Id or name
        image: String,
    },
    /// Download an image and check it
    Save {
        /// Id or name
        image: String,
        /// Where to; - is standard output
        #[arg(long)]
        file: PathBuf,
    },
    /// Delete images
    Delete {
        /// Ids or names
        #[arg(required = true)]
        images: Vec<String>,
    },
}

/// Formats that servers can start from.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum DiskFormat {
    /// QEMU's copy-on-write format
    Qcow2,
    /// Bytes as they lie on a disk
    Raw,
}

const COLUMNS: &[Column] = &[
    ("id", |image| cell(&image["id"])),
    ("name", |image| cell(&image["name"])),
    ("status", |image| cell(&image["status"])),
    ("format", |image| cell(&image["disk_format"])),
    ("size", |image| size(&image["size"])),
    ("visibility", |image| cell(&image["visibility"])),
];

const ROWS: &[Column] = &[
    ("id", |image| cell(&image["id"])),
    ("name", |image| cell(&image["name"])),
    ("status", |image| cell(&image["status"])),
    ("disk format", |image| cell(&image["disk_format"])),
    ("container format", |image| cell(&image["container_format"])),
    ("size", |image| size(&image["size"])),
    ("virtual size", |image| size(&image["virtual_size"])),
    ("visibility", |image| cell(&image["visibility"])),
    ("protected", |image| cell(&image["protected"])),
    ("hash", |image| match image["os_hash_value"].as_str() {
        Some(hash) => format!("{} {hash}", cell(&image["os_hash_algo"])),
        None => String::new(),
    }),
    ("properties", properties),
    ("created", |image| cell(&image["created_at"])),
    ("updated", |image| cell(&image["updated_at"])),
];

/// How long an uploaded image may take to become active after the upload was answered.
const ACTIVATION: Duration = Duration::from_secs(300);

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        match self {
            Command::Create { name, file, disk_format, container_format, public, property } => {
                let disk_format = match disk_format {
                    DiskFormat::Qcow2 => "qcow2",
                    DiskFormat::Raw => "raw",
                };
                let mut metadata = json!({
                    "name": name, "disk_format": disk_format, "container_format": container_format,
                    "visibility": if public { "public" } else { "private" },
                });
                for (key, value) in property {
                    metadata[key] = Value::String(value);
                }
                create(app, &file, &metadata)
            }
            Command::List => app.output.list(&IMAGE.list(&app.session, "")?, COLUMNS, "id"),
            Command::Show { image } => app.output.object(&IMAGE.find(&app.session, &image)?, ROWS, "id"),
            Command::Save { image, file } => save(app, &image, &file),
            Command::Delete { images } => {
                let images = find_all(app, &IMAGE, &images)?;
                for image in &images {
                    app.session.delete(Service::Image, &format!("/images/{}", id(image)?))?;
                }
                app.output.done("deleted image", &images)
            }
        }
    }
}

fn create(app: &App, path: &Path, metadata: &Value) -> Result<()> {
    let mut file = File::open(path).map_err(Error::file(path))?;
    let attributes = file.metadata().map_err(Error::file(path))?;
    if !attributes.is_file() {
        return Err(Error::Usage(format!("{} is not a regular file", path.display())));
    }
    let size = attributes.len();
    let image = app.session.post(Service::Image, "/images", metadata)?;
    let id = id(&image)?;
    let bar = app.progress.bytes("uploading", Some(size));
    let result = upload(app, &id, &mut file, size, &bar);
    bar.finish_and_clear();
    // An image without its bytes is of no use to anybody.
    let image = result.inspect_err(|_| {
        if let Err(error) = app.session.delete(Service::Image, &format!("/images/{id}")) {
            eprintln!("godwit: image {id} is left behind: {error}");
        }
    })?;
    app.output.object(&image, ROWS, "id")
}

fn upload(app: &App, id: &str, file: &mut File, size: u64, bar: &ProgressBar) -> Result<Value> {
    let mut source = Metered::new(file.take(size), bar).exactly(size);
    let answer = app.session.upload(Service::Image, &format!("/images/{id}/file"), size, &mut source);
    answer.map_err(|error| match error {
        Error::Unreachable { reason, .. } if source.count > 0 => {
            Error::Failed(format!("the upload broke off after {} of {size} bytes: {reason}", source.count))
        }
        other => other,
    })?;
    let sent = source.digest();
    let waiting = app.progress.spinner("the service checks the image");
    let wait = Wait {
        what: "the image becomes active",
        look: format!("godwit image show {id}"),
        timeout: ACTIVATION,
    };
    let image = wait.run(&waiting, || {
        let image = IMAGE.get(&app.session, id)?;
        Ok(match image["status"].as_str() {
            Some(status @ ("saving" | "importing")) => Look::Not(status.to_owned()),
            _ => Look::Done(image),
        })
    })?;
    if image["status"] != "active" {
        return Err(Error::Failed(format!("image {id} became {} instead of active", cell(&image["status"]))));
    }
    if image["size"] != size {
        return Err(Error::Failed(format!(
            "{size} bytes were sent, the service has {}",
            cell(&image["size"])
        )));
    }
    verify(&image, &sent, "what was sent")?;
    Ok(image)
}

/// Compares the service's hash with ours.
fn verify(image: &Value, ours: &str, what: &str) -> Result<()> {
    match (image["os_hash_algo"].as_str(), image["os_hash_value"].as_str()) {
        (Some("sha512"), Some(theirs)) if theirs != ours => Err(Error::Failed(format!(
            "{what} differs from what the service has: sha512 {ours}, the service says {theirs}"
        ))),
        _ => Ok(()),
    }
}

fn save(app: &App, wanted: &str, path: &Path) -> Result<()> {
    let image = IMAGE.find(&app.session, wanted)?;
    let id = id(&image)?;
    let (body, length) = app.session.download(Service::Image, &format!("/images/{id}/file"))?;
    let length = length.or(image["size"].as_u64());
    let bar = app.progress.bytes("downloading", length);
    let mut source = Metered::new(body, &bar);
    let to_stdout = path == Path::new("-");
    if to_stdout {
        if io::stdout().is_terminal() {
            return Err(Error::Usage(
                "an image is not for a terminal: give a file or redirect the output".into(),
            ));
        }
        io::copy(&mut source, &mut io::stdout().lock()).map_err(|error| match error.kind() {
            io::ErrorKind::BrokenPipe => Error::Output(error),
            _ => Error::Failed(format!("the download broke off after {} bytes: {error}", source.count)),
        })?;
    } else {
        save_file(&mut source, path)?;
    }
    bar.finish_and_clear();
    let digest = source.digest();
    if let Err(error) = verify(&image, &digest, "what came") {
        if !to_stdout {
            std::fs::remove_file(path).map_err(Error::file(path))?;
        }
        return Err(error);
    }
    if to_stdout || app.output.format() == Format::Ids {
        return Ok(());
    }
    match app.output.format() {
        Format::Json => app.output.json(&json!({"id": id, "file": path, "sha512": digest})),
        _ => app.output.text(&format!("saved {} as {}\n", cell(&image["name"]), path.display())),
    }
}

/// Writes beside `path` and renames, so that a file of that name is always whole.
fn save_file(source: &mut impl Read, path: &Path) -> Result<()> {
    let mut partial = path.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let mut file = File::create(&partial).map_err(Error::file(&partial))?;
    let written = io::copy(source, &mut file).and_then(|_| file.flush()).and_then(|()| file.sync_all());
    written.and_then(|()| std::fs::rename(&partial, path)).map_err(|error| {
        // The first error tells more than a failed clean-up would.
        let _ = std::fs::remove_file(&partial);
        Error::Failed(format!("cannot save {}: {error}", path.display()))
    })
}

fn size(value: &Value) -> String {
    value.as_u64().map(units::bytes).unwrap_or_default()
}

/// What users set: the string fields that the image service does not define.
fn properties(image: &Value) -> String {
    const OWN: [&str; 21] = [
        "id",
        "name",
        "status",
        "visibility",
        "checksum",
        "os_hash_algo",
        "os_hash_value",
        "disk_format",
        "container_format",
        "owner",
        "created_at",
        "updated_at",
        "self",
        "file",
        "schema",
        "tags",
        "size",
        "virtual_size",
        "min_disk",
        "min_ram",
        "direct_url",
    ];
    let fields = image.as_object().into_iter().flatten();
    let set = fields.filter(|(key, value)| value.is_string() && !OWN.contains(&key.as_str()));
    set.map(|(key, value)| format!("{key}={}", cell(value))).collect::<Vec<_>>().join("\n")
}

/// Reads through, counting and hashing.
struct Metered<'a, R> {
    source: R,
    hash: Sha512,
    count: u64,
    /// An end before this many bytes is an error.
    least: u64,
    bar: &'a ProgressBar,
}

impl<'a, R> Metered<'a, R> {
    fn new(source: R, bar: &'a ProgressBar) -> Self {
        Metered { source, hash: Sha512::new(), count: 0, least: 0, bar }
    }

    fn exactly(mut self, size: u64) -> Self {
        self.least = size;
        self
    }

    fn digest(self) -> String {
        hex::encode(self.hash.finalize())
    }
}

impl<R: Read> Read for Metered<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.source.read(buffer)?;
        if count == 0 && self.count < self.least && !buffer.is_empty() {
            return Err(io::Error::other("the file became shorter meanwhile"));
        }
        self.hash.update(&buffer[..count]);
        self.count += count as u64;
        self.bar.inc(count as u64);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_shrinks_under_the_upload_is_an_error() {
        let bar = ProgressBar::hidden();
        let mut whole = Metered::new(&b"abc"[..], &bar).exactly(3);
        assert_eq!(io::copy(&mut whole, &mut io::sink()).unwrap(), 3);
        assert!(whole.digest().starts_with("ddaf35a193617aba"), "sha512 of abc, FIPS 180-2");
        let mut short = Metered::new(&b"ab"[..], &bar).exactly(3);
        assert!(io::copy(&mut short, &mut io::sink()).is_err());
    }
}
