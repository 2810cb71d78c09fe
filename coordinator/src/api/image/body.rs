//! An image as clients see it: one flat object, with the user's own properties beside the fields.

use crate::api::attributes::{read_flag, time_text};
use crate::api::context::Caller;
use crate::error::Error;
use crate::fleet::Time;
use crate::fleet::image::{Image, ImageStatus, Visibility};
use godwit_protocol::id::{ImageId, ProjectId};
use godwit_protocol::image::DiskFormat;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// Most properties of one image.
pub(super) const MAX_PROPERTIES: usize = 128;
/// Longest name, label and property name, in characters.
const MAX_NAME: usize = 255;
/// Longest property value, in bytes.
const MAX_VALUE_BYTES: usize = 65_535;
/// Most labels of one image.
const MAX_TAGS: usize = 128;

/// Fields that only the server sets.
const READ_ONLY: [&str; 15] = [
    "status",
    "checksum",
    "os_hash_algo",
    "os_hash_value",
    "size",
    "virtual_size",
    "created_at",
    "updated_at",
    "self",
    "file",
    "schema",
    "locations",
    "direct_url",
    "deleted",
    "deleted_at",
];

/// A new image before anything is said of it.
pub(super) fn empty(project: ProjectId, at: Time) -> Image {
    Image {
        id: ImageId::random(),
        name: None,
        project,
        status: ImageStatus::Queued,
        visibility: Visibility::Shared,
        protected: false,
        hidden: false,
        disk_format: None,
        container_format: None,
        size_bytes: None,
        virtual_size_bytes: None,
        md5: None,
        sha512: None,
        min_disk_gib: 0,
        min_memory_mib: 0,
        tags: Vec::new(),
        properties: BTreeMap::new(),
        created_at: at,
        updated_at: at,
    }
}

pub(super) fn status_name(status: ImageStatus) -> &'static str {
    match status {
        ImageStatus::Queued => "queued",
        ImageStatus::Saving => "saving",
        ImageStatus::Active => "active",
    }
}

pub(super) fn visibility_name(visibility: Visibility) -> &'static str {
    match visibility {
        Visibility::Public => "public",
        Visibility::Community => "community",
        Visibility::Shared => "shared",
        Visibility::Private => "private",
    }
}

/// The whole object.
pub(super) fn show(image: &Image) -> Value {
    let path = format!("/v2/images/{}", image.id);
    let mut body = json!({
        "id": image.id,
        "name": image.name,
        "status": status_name(image.status),
        "visibility": visibility_name(image.visibility),
        "protected": image.protected,
        "checksum": image.md5,
        "os_hash_algo": image.sha512.as_ref().map(|_| "sha512"),
        "os_hash_value": image.sha512,
        "os_hidden": image.hidden,
        "size": image.size_bytes,
        "virtual_size": image.virtual_size_bytes,
        "disk_format": image.disk_format.map(DiskFormat::as_str),
        "container_format": image.container_format,
        "min_disk": image.min_disk_gib,
        "min_ram": image.min_memory_mib,
        "owner": image.project,
        "tags": image.tags,
        "created_at": time_text(image.created_at),
        "updated_at": time_text(image.updated_at),
        "self": path,
        "file": format!("{path}/file"),
        "schema": "/v2/schemas/image",
    });
    for (key, value) in &image.properties {
        body[key] = json!(value);
    }
    body
}

/// Whether a key is a field, and not one of the user's properties.
pub(super) fn is_field(key: &str) -> bool {
    const WRITABLE: [&str; 11] = [
        "id",
        "name",
        "visibility",
        "protected",
        "os_hidden",
        "disk_format",
        "container_format",
        "min_disk",
        "min_ram",
        "owner",
        "tags",
    ];
    WRITABLE.contains(&key) || READ_ONLY.contains(&key)
}

/// Sets a field or property. `new`: the image is being created, so that its id may still be chosen.
///
/// # Errors
/// [`Error::Forbidden`] for what only the server or an administrator sets, [`Error::Invalid`] for wrong values.
pub(super) fn set(
    image: &mut Image,
    caller: &Caller,
    key: &str,
    value: Value,
    new: bool,
) -> Result<(), Error> {
    if READ_ONLY.contains(&key) || (key == "id" && !new) {
        return Err(Error::Forbidden(format!("Attribute '{key}' is read-only.")));
    }
    let wrong = |must: &str| Error::Invalid(format!("Invalid value for image attribute '{key}': {must}."));
    let flag = |value: &Value| read_flag(value).ok_or_else(|| wrong("true or false"));
    match key {
        "id" => {
            let id = value.as_str().and_then(|id| id.parse().ok());
            image.id = id.ok_or_else(|| wrong("a UUID"))?;
        }
        "name" => image.name = nullable_name(&value).map_err(|()| wrong("up to 255 characters"))?,
        "visibility" => image.visibility = visibility(&value).ok_or_else(|| wrong(VISIBILITIES))?,
        "protected" => image.protected = flag(&value)?,
        "os_hidden" => image.hidden = flag(&value)?,
        "disk_format" | "container_format" if image.status != ImageStatus::Queued => {
            return Err(Error::Forbidden(format!(
                "Attribute {key} can be only replaced for a queued image."
            )));
        }
        "disk_format" => image.disk_format = disk_format(&value)?,
        "container_format" => {
            image.container_format = match value.as_str() {
                Some("bare") => Some("bare".into()),
                None if value.is_null() => None,
                _ => return Err(wrong("bare is the container format that is supported")),
            };
        }
        "min_disk" => image.min_disk_gib = whole(&value).ok_or_else(|| wrong("a whole number of GiB"))?,
        "min_ram" => image.min_memory_mib = whole(&value).ok_or_else(|| wrong("a whole number of MiB"))?,
        "owner" => {
            let owner: Option<ProjectId> = value.as_str().and_then(|id| id.parse().ok());
            let owner = owner.ok_or_else(|| wrong("the id of a project"))?;
            if owner != image.project && !caller.is_admin() {
                return Err(Error::Forbidden(
                    "Only an administrator may give an image to another project.".into(),
                ));
            }
            image.project = owner;
        }
        "tags" => image.tags = tags(&value)?,
        _ => {
            let text = value.as_str().ok_or_else(|| wrong("properties are texts"))?;
            if key.is_empty() || key.chars().count() > MAX_NAME || text.len() > MAX_VALUE_BYTES {
                return Err(wrong("a name of up to 255 characters and a value of up to 65535 bytes"));
            }
            image.properties.insert(key.to_owned(), text.to_owned());
        }
    }
    Ok(())
}

const VISIBILITIES: &str = "one of public, community, shared, private";

pub(super) fn visibility(value: &Value) -> Option<Visibility> {
    serde_json::from_value(value.clone()).ok()
}

fn disk_format(value: &Value) -> Result<Option<DiskFormat>, Error> {
    match value.as_str() {
        None if value.is_null() => Ok(None),
        Some("raw") => Ok(Some(DiskFormat::Raw)),
        Some("qcow2") => Ok(Some(DiskFormat::Qcow2)),
        _ => Err(Error::Invalid(format!(
            "Invalid value for image attribute 'disk_format': {value} is not supported; use raw or qcow2. Others are \
             converted with `qemu-img convert -O qcow2`."
        ))),
    }
}

fn nullable_name(value: &Value) -> Result<Option<String>, ()> {
    match value {
        Value::Null => Ok(None),
        Value::String(name) if name.chars().count() <= MAX_NAME => Ok(Some(name.clone())),
        _ => Err(()),
    }
}

fn whole(value: &Value) -> Option<u64> {
    value.as_u64().filter(|number| *number <= i32::MAX as u64)
}

fn tags(value: &Value) -> Result<Vec<String>, Error> {
    let wrong = || Error::Invalid("Invalid value for image attribute 'tags': a list of texts.".into());
    let mut tags: Vec<String> = Vec::new();
    for tag in value.as_array().ok_or_else(wrong)? {
        let tag = tag.as_str().ok_or_else(wrong)?;
        check_tag(tag)?;
        if !tags.iter().any(|t| t == tag) {
            tags.push(tag.to_owned());
        }
    }
    if tags.len() > MAX_TAGS {
        Err(Error::Invalid(format!("An image may have {MAX_TAGS} tags.")))
    } else {
        Ok(tags)
    }
}

/// That a label is one.
///
/// # Errors
/// [`Error::Invalid`].
pub(super) fn check_tag(tag: &str) -> Result<(), Error> {
    if tag.is_empty() || tag.chars().count() > MAX_NAME {
        return Err(Error::Invalid("A tag has 1 to 255 characters.".into()));
    }
    Ok(())
}
