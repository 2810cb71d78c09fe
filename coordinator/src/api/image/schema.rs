//! The image's JSON schema. Image clients build their options from it and check every answer against it, so it is
//! whole and true.

use axum::Json;
use serde_json::{Value, json};

const ID_PATTERN: &str =
    "^([0-9a-fA-F]){8}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){4}-([0-9a-fA-F]){12}$";

/// GET /v2/schemas/image.
pub(super) async fn image() -> Json<Value> {
    Json(image_schema())
}

/// GET /v2/schemas/images.
pub(super) async fn images() -> Json<Value> {
    Json(json!({
        "name": "images",
        "properties": {
            "images": { "type": "array", "items": image_schema() },
            "first": { "type": "string" },
            "next": { "type": "string" },
            "schema": { "type": "string" },
        },
        "links": [
            { "rel": "first", "href": "{first}" },
            { "rel": "next", "href": "{next}" },
            { "rel": "describedby", "href": "{schema}" },
        ],
    }))
}

fn image_schema() -> Value {
    json!({
        "name": "image",
        "properties": properties(),
        "additionalProperties": { "type": "string" },
        "links": [
            { "rel": "self", "href": "{self}" },
            { "rel": "enclosure", "href": "{file}" },
            { "rel": "describedby", "href": "{schema}" },
        ],
    })
}

fn properties() -> Value {
    let mut properties = fields();
    let known = known_properties();
    if let (Some(all), Value::Object(known)) = (properties.as_object_mut(), known) {
        all.extend(known);
    }
    properties
}

/// The fields that every image has.
fn fields() -> Value {
    json!({
        "id": {
            "type": "string",
            "pattern": ID_PATTERN,
            "description": "An identifier for the image",
        },
        "name": {
            "type": ["null", "string"],
            "maxLength": 255,
            "description": "Descriptive name for the image",
        },
        "status": {
            "type": "string",
            "readOnly": true,
            "enum": ["queued", "saving", "active", "killed", "deleted", "uploading", "importing",
                     "pending_delete", "deactivated"],
            "description": "Status of the image",
        },
        "visibility": {
            "type": "string",
            "enum": ["community", "public", "private", "shared"],
            "description": "Scope of image accessibility",
        },
        "protected": { "type": "boolean", "description": "If true, image will not be deletable." },
        "os_hidden": { "type": "boolean", "description": "If true, image will not appear in default image list response." },
        "checksum": {
            "type": ["null", "string"],
            "readOnly": true,
            "maxLength": 32,
            "description": "md5 hash of image contents.",
        },
        "os_hash_algo": {
            "type": ["null", "string"],
            "readOnly": true,
            "maxLength": 64,
            "description": "Algorithm to calculate the os_hash_value",
        },
        "os_hash_value": {
            "type": ["null", "string"],
            "readOnly": true,
            "maxLength": 128,
            "description": "Hexdigest of the image contents using the algorithm specified by the os_hash_algo",
        },
        "owner": { "type": ["null", "string"], "maxLength": 255, "description": "Owner of the image" },
        "size": {
            "type": ["null", "integer"],
            "readOnly": true,
            "description": "Size of image file in bytes",
        },
        "virtual_size": {
            "type": ["null", "integer"],
            "readOnly": true,
            "description": "Virtual size of image in bytes",
        },
        "container_format": {
            "type": ["null", "string"],
            "enum": [null, "bare"],
            "description": "Format of the container",
        },
        "disk_format": {
            "type": ["null", "string"],
            "enum": [null, "raw", "qcow2"],
            "description": "Format of the disk",
        },
        "min_disk": { "type": "integer", "description": "Amount of disk space (in GB) required to boot image." },
        "min_ram": { "type": "integer", "description": "Amount of ram (in MB) required to boot image." },
        "tags": {
            "type": "array",
            "items": { "type": "string", "maxLength": 255 },
            "description": "List of strings related to the image",
        },
        "created_at": {
            "type": "string",
            "readOnly": true,
            "description": "Date and time of image registration",
        },
        "updated_at": {
            "type": "string",
            "readOnly": true,
            "description": "Date and time of the last image modification",
        },
        "self": { "type": "string", "readOnly": true, "description": "An image self url" },
        "file": { "type": "string", "readOnly": true, "description": "An image file url" },
        "schema": { "type": "string", "readOnly": true, "description": "An image schema url" },
    })
}

/// Properties that many tools know by name; clients make an option of each.
fn known_properties() -> Value {
    let text = |description: &str| json!({ "type": "string", "is_base": false, "description": description });
    let id = |description: &str| json!({ "type": ["null", "string"], "is_base": false, "pattern": ID_PATTERN, "description": description });
    json!({
        "architecture": text("Operating system architecture"),
        "os_distro": text("Common name of operating system distribution"),
        "os_version": text("Operating system version as specified by the distributor."),
        "instance_uuid": text("ID of the instance that this image was made from"),
        "kernel_id": id("ID of an image to boot the kernel from"),
        "ramdisk_id": id("ID of an image to boot the ramdisk from"),
    })
}
