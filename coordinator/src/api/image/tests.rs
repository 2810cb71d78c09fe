//! The image API through the router.

use super::schema;
use crate::api::testing::{Answer, Api, As};
use axum::body::Body;
use axum::http::{Method, Request};
use bytes::Bytes;
use futures_util::stream;
use godwit_protocol::digests;
use serde_json::{Value, json};
use std::convert::Infallible;
use std::os::unix::fs::FileExt;

const PATCH: (&str, &str) = ("content-type", "application/openstack-images-v2.1-json-patch");

async fn image(api: &Api, format: &str) -> String {
    let body = json!({ "name": "cirros", "disk_format": format, "container_format": "bare" });
    let answer = api.post("/image/v2/images", body).await;
    assert_eq!(answer.status, 201, "{}", answer.text());
    answer.json()["id"].as_str().unwrap().to_owned()
}

/// An upload in pieces, with these headers beside the type; without a length it is chunked.
async fn put(
    api: &Api,
    id: &str,
    headers: &[(&str, &str)],
    pieces: Vec<Result<Bytes, std::io::Error>>,
) -> Answer {
    let mut request = Request::put(format!("/image/v2/images/{id}/file"))
        .header("content-type", "application/octet-stream")
        .header("x-auth-token", api.token(As::Admin));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    api.send(request.body(Body::from_stream(stream::iter(pieces))).unwrap()).await
}

fn whole(bytes: &[u8]) -> Vec<Result<Bytes, std::io::Error>> {
    bytes.chunks(100_000).map(|piece| Ok(Bytes::copy_from_slice(piece))).collect()
}

async fn show(api: &Api, id: &str) -> Value {
    api.get(&format!("/image/v2/images/{id}")).await.json()
}

/// Names in the pool's folder of images.
fn files(api: &Api) -> Vec<String> {
    let folder = std::fs::read_dir(api.app.config.pool.join("images"));
    let name = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().file_name().into_string().unwrap();
    folder.map(|entries| entries.map(name).collect()).unwrap_or_default()
}

/// A good qcow2 file of one MiB of data, made by QEMU.
fn qcow2(api: &Api) -> Vec<u8> {
    let raw = api.folder.path().join("raw");
    std::fs::write(&raw, vec![0x5a; 1 << 20]).unwrap();
    qemu_img(api, &["convert", "-f", "raw", "-O", "qcow2", "raw", "disk.qcow2"]);
    std::fs::read(api.folder.path().join("disk.qcow2")).unwrap()
}

fn qemu_img(api: &Api, arguments: &[&str]) {
    let output =
        std::process::Command::new("qemu-img").args(arguments).current_dir(api.folder.path()).output();
    let output = output.expect("qemu-img is needed (package qemu-utils)");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[tokio::test]
async fn an_upload_of_either_kind_is_active_with_its_digests_and_comes_down_as_it_went_up() {
    let api = Api::new().await;
    let bytes = qcow2(&api);
    let length = bytes.len().to_string();
    for headers in [&[("content-length", length.as_str())][..], &[("x-openstack-image-size", &length)], &[]] {
        let id = image(&api, "qcow2").await;
        let empty = api.get(&format!("/image/v2/images/{id}/file")).await;
        assert_eq!(empty.status, 204);
        let answer = put(&api, &id, headers, whole(&bytes)).await;
        assert_eq!((answer.status.as_u16(), answer.bytes.len()), (204, 0), "{}", answer.text());
        let shown = show(&api, &id).await;
        assert_eq!(shown["status"], "active");
        assert_eq!((&shown["size"], &shown["virtual_size"]), (&json!(bytes.len()), &json!(1 << 20)));
        assert_eq!(shown["os_hash_algo"], "sha512");
        let down = api.get(&format!("/image/v2/images/{id}/file")).await;
        assert_eq!(down.header("content-length"), length);
        assert_eq!(json!(down.header("content-md5")), shown["checksum"]);
        assert!(down.bytes == bytes);
        let digest = <sha2::Sha512 as sha2::Digest>::digest(&bytes);
        assert_eq!(shown["os_hash_value"], json!(hex::encode(digest)));
        let mut there = files(&api);
        there.sort();
        assert_eq!(there, [id.clone(), format!("{id}.blake3")]);
        let list = std::fs::read(api.app.config.pool.join("images").join(format!("{id}.blake3"))).unwrap();
        let digests: Vec<u8> = bytes.chunks(digests::CHUNK_BYTES).flat_map(digests::digest).collect();
        assert!(list.ends_with(&digests), "the digests of its chunks");
        let again = put(&api, &id, headers, whole(&bytes)).await;
        assert_eq!(again.status, 409);
        assert_eq!(api.delete(&format!("/image/v2/images/{id}")).await.status, 204);
        assert_eq!(api.get(&format!("/image/v2/images/{id}")).await.status, 404);
        assert_eq!(files(&api), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_pool_that_is_not_mounted_takes_no_upload_where_there_are_images() {
    let api = Api::new().await;
    let first = image(&api, "raw").await;
    assert_eq!(put(&api, &first, &[], whole(&[7; 600])).await.status, 204);
    let folder = api.app.config.pool.join("images");
    std::fs::rename(&folder, api.app.config.pool.join("away")).unwrap();
    let second = image(&api, "raw").await;
    let refused = put(&api, &second, &[], whole(&[7; 600])).await;
    assert_eq!(refused.status, 503);
    assert!(refused.text().contains("is it mounted?"), "{}", refused.text());
    assert!(!folder.exists(), "nothing is made up in its place");
    std::fs::rename(api.app.config.pool.join("away"), &folder).unwrap();
    assert_eq!(put(&api, &second, &[], whole(&[7; 600])).await.status, 204);
}

/// A byte of a file becomes another one; the file's time does not tell.
fn flip(path: &std::path::Path, at: u64) {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path).unwrap();
    let modified = file.metadata().unwrap().modified().unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ 1], at).unwrap();
    file.set_modified(modified).unwrap();
}

#[tokio::test]
async fn a_download_of_a_damaged_image_ends_before_the_damage_and_is_told() {
    const MIB: usize = 1 << 20;
    let api = Api::new().await;
    crate::app::start(&api.app);
    let mut bytes: Vec<u8> = (0..3 * MIB + 9).map(|index| (index / 11) as u8).collect();
    bytes[0] = 1;
    let path = |id: &str| api.app.config.pool.join("images").join(id);
    // Where the damage is, whether there is a list, and how much of the image may come.
    for (at, list, come) in [
        (2 * MIB + 5, true, Some(2 * MIB)),
        (3 * MIB + 8, true, Some(3 * MIB)),
        (7, true, None),
        (7, false, Some(3 * MIB)),
    ] {
        let id = image(&api, "raw").await;
        assert_eq!(put(&api, &id, &[], whole(&bytes)).await.status, 204);
        if !list {
            std::fs::remove_file(path(&format!("{id}.blake3"))).unwrap();
        }
        let file = format!("/image/v2/images/{id}/file");
        assert!(api.get(&file).await.bytes == bytes, "it is whole so far");
        assert!(api.app.ledger.read(|fleet| fleet.damages.is_empty()));
        flip(&path(&id), at as u64);
        match (come, api.download(&file).await) {
            (Some(come), (status, came, end)) => {
                assert_eq!((status.as_u16(), came.len()), (200, come));
                assert!(!list || came == bytes[..come], "what comes is right");
                assert!(end.is_err(), "the connection ends before its length");
            }
            (None, (status, said, _)) => {
                assert_eq!(status, 500);
                assert!(String::from_utf8_lossy(&said).contains("damaged"), "nothing was sent yet");
            }
        }
        assert_eq!(show(&api, &id).await["status"], "active", "its disks and its record are what they were");
        let status = api.get("/operator/v1/status").await.json();
        assert!(status["problems"].to_string().contains(&id), "{status}");
        let events = api.get("/operator/v1/events?kind=image_damaged").await.json();
        let event = &events["events"][0];
        assert_eq!(event["host"], "coordinator");
        assert!(event["reason"].to_string().contains(&id), "{events}");
        assert_eq!(api.delete(&format!("/image/v2/images/{id}")).await.status, 204);
        assert!(api.app.ledger.read(|fleet| fleet.damages.is_empty()));
    }
    // A list that does not prove itself proves nothing else.
    let id = image(&api, "raw").await;
    assert_eq!(put(&api, &id, &[], whole(&bytes)).await.status, 204);
    let list = path(&format!("{id}.blake3"));
    flip(&list, list.metadata().unwrap().len() - 1);
    let answer = api.get(&format!("/image/v2/images/{id}/file")).await;
    assert_eq!(answer.status, 500, "{}", answer.text());
    assert!(answer.text().contains("damaged"), "{}", answer.text());
}

#[tokio::test]
async fn an_upload_that_is_cut_shorter_or_longer_leaves_the_image_queued_and_no_file() {
    let api = Api::new().await;
    let id = image(&api, "raw").await;
    let cut = || Err(std::io::Error::from(std::io::ErrorKind::ConnectionReset));
    let cases: [(&[(&str, &str)], _, &str); 4] = [
        (&[("content-length", "4096")], vec![Ok(Bytes::from(vec![1; 512])), cut()], "cut off"),
        (&[("x-openstack-image-size", "1024")], whole(&[1; 512]), "only 512 came"),
        (&[("x-openstack-image-size", "256")], whole(&[1; 512]), "more came"),
        (
            &[("content-length", "512"), ("x-openstack-image-size", "9")],
            whole(&[1; 512]),
            "X-OpenStack-Image-Size 9",
        ),
    ];
    for (headers, pieces, expected) in cases {
        let answer = put(&api, &id, headers, pieces).await;
        assert_eq!(answer.status, 400);
        assert!(answer.text().contains(expected), "{}", answer.text());
        let shown = show(&api, &id).await;
        assert_eq!((&shown["status"], &shown["size"]), (&json!("queued"), &Value::Null));
        assert_eq!(files(&api), Vec::<String>::new());
    }
    assert_eq!(put(&api, &id, &[], whole(&[1; 512])).await.status, 204, "the next upload works");
}

#[tokio::test]
async fn what_is_not_what_it_is_declared_to_be_is_refused_with_the_reason() {
    let api = Api::new().await;
    let good = qcow2(&api);
    qemu_img(
        &api,
        &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/hostname", "-u", "backed.qcow2", "1M"],
    );
    let backed = std::fs::read(api.folder.path().join("backed.qcow2")).unwrap();
    qemu_img(&api, &["create", "-q", "-f", "qcow2", "-o", "data_file=data.raw", "external.qcow2", "1M"]);
    let external = std::fs::read(api.folder.path().join("external.qcow2")).unwrap();
    let mut corrupt = good.clone();
    let table = usize::try_from(u64::from_be_bytes(corrupt[40..48].try_into().unwrap())).unwrap();
    corrupt[table..table + 8].copy_from_slice(&0x8000_0000_0fff_0000_u64.to_be_bytes());
    let cut = good[..good.len() / 2].to_vec();
    for (format, bytes, expected) in [
        ("qcow2", backed, "backing file"),
        ("qcow2", external, "external file"),
        ("qcow2", corrupt, "corrupt"),
        ("qcow2", cut, "corrupt"),
        ("qcow2", vec![1; 512], "does not begin like one"),
        ("raw", good.clone(), "its content is qcow2"),
        ("raw", vec![], "empty"),
    ] {
        let id = image(&api, format).await;
        let answer = put(&api, &id, &[], whole(&bytes)).await;
        assert_eq!(answer.status, 400, "{expected}: {}", answer.text());
        assert!(answer.text().contains(expected), "{}", answer.text());
        assert!(!answer.text().contains("/images/"), "paths are not the user's business: {}", answer.text());
        assert_eq!(show(&api, &id).await["status"], "queued");
        assert_eq!(files(&api), Vec::<String>::new());
    }
}

#[tokio::test]
async fn a_pool_without_room_or_without_its_mount_says_so_before_a_byte_is_read() {
    let api = Api::new().await;
    let id = image(&api, "raw").await;
    let huge = [("x-openstack-image-size", "9000000000000000000")];
    let answer = put(&api, &id, &huge, whole(&[1; 512])).await;
    assert_eq!(answer.status, 413);
    assert!(answer.text().contains("needs 9000000000000000000 bytes"), "{}", answer.text());
    std::fs::remove_dir_all(&api.app.config.pool).unwrap();
    let answer = put(&api, &id, &[], whole(&[1; 512])).await;
    assert_eq!(answer.status, 503);
    assert!(answer.text().contains("is it mounted?"), "{}", answer.text());
    assert!(!api.app.config.pool.exists(), "a pool is never made up");
    assert_eq!(show(&api, &id).await["status"], "queued");
}

#[tokio::test]
async fn an_image_deleted_while_it_is_uploaded_leaves_nothing() {
    let api = Api::new().await;
    let id = image(&api, "raw").await;
    let path = format!("/image/v2/images/{id}");
    let (more, pieces) = tokio::sync::mpsc::channel::<Bytes>(1);
    let body = stream::unfold(pieces, |mut pieces| async move {
        let piece = pieces.recv().await?;
        Some((Ok::<_, Infallible>(piece), pieces))
    });
    let request = Request::put(format!("{path}/file"))
        .header("content-type", "application/octet-stream")
        .header("x-auth-token", api.token(As::Admin))
        .body(Body::from_stream(body))
        .unwrap();
    let delete = async {
        more.send(Bytes::from_static(b"begun")).await.unwrap();
        // The second is taken only when the first has been: the upload runs.
        more.send(Bytes::from_static(b"more")).await.unwrap();
        assert_eq!(show(&api, &id).await["status"], "saving");
        let second = put(&api, &id, &[], whole(&[1; 512])).await;
        assert_eq!(second.status, 409);
        assert_eq!(api.delete(&path).await.status, 204);
        drop(more);
    };
    let (answer, ()) = tokio::join!(api.send(request), delete);
    assert_eq!(answer.status, 409, "{}", answer.text());
    assert_eq!(files(&api), Vec::<String>::new());
}

#[tokio::test]
async fn a_restart_sets_a_cut_upload_back() {
    let api = Api::new().await;
    let id = image(&api, "raw").await;
    let folder = api.app.config.pool.join("images");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join(format!("{id}.partial")), "half").unwrap();
    std::fs::write(folder.join("stranger.partial"), "half").unwrap();
    std::fs::write(folder.join(&id), "renamed, but the record was not written").unwrap();
    api.app
        .ledger
        .change::<_, crate::error::Error>(|fleet| {
            let mut image = fleet.images.values().next().unwrap().clone();
            image.status = crate::fleet::image::ImageStatus::Saving;
            Ok((vec![image.into()], ()))
        })
        .await
        .unwrap();
    api.app.images.recover(&api.app.ledger).await.unwrap();
    assert_eq!(show(&api, &id).await["status"], "queued");
    assert_eq!(files(&api), Vec::<String>::new());
}

#[tokio::test]
async fn properties_are_flat_and_both_forms_of_patch_change_them() {
    let api = Api::new().await;
    let body = json!({ "name": "a", "hw_disk_bus": "virtio", "tags": ["x", "x"], "min_ram": 64 });
    let created = api.post("/image/v2/images", body).await;
    let shown = created.json();
    assert_eq!(created.header("location"), format!("/v2/images/{}", shown["id"].as_str().unwrap()));
    assert_eq!((&shown["hw_disk_bus"], &shown["tags"]), (&json!("virtio"), &json!(["x"])));
    let path = format!("/image/v2/images/{}", shown["id"].as_str().unwrap());
    let patch = |kind, body: Value| {
        let (api, path) = (&api, &path);
        async move { api.ask(As::Admin, Method::PATCH, path, &[("content-type", kind)], body).await }
    };
    let old = "application/openstack-images-v2.0-json-patch";
    let answer =
        patch(old, json!([{ "replace": "/name", "value": "b" }, { "remove": "/hw_disk_bus" }])).await;
    assert_eq!((answer.status.as_u16(), &answer.json()["name"]), (200, &json!("b")));
    assert_eq!(answer.json().get("hw_disk_bus"), None);
    let answer = patch(PATCH.1, json!([{ "op": "add", "path": "/os_distro", "value": "debian" }])).await;
    assert_eq!(answer.json()["os_distro"], "debian");
    for (change, status) in [
        (json!([{ "op": "replace", "path": "/status", "value": "active" }]), 403),
        (json!([{ "op": "replace", "path": "/id", "value": "x" }]), 403),
        (json!([{ "op": "remove", "path": "/name" }]), 403),
        (json!([{ "op": "remove", "path": "/nothing" }]), 409),
        (json!([{ "op": "replace", "path": "/nothing", "value": "x" }]), 409),
        (json!([{ "op": "add", "path": "/a", "value": 1 }]), 400),
        (json!([{ "op": "replace", "path": "/disk_format", "value": "vmdk" }]), 400),
    ] {
        assert_eq!(patch(PATCH.1, change.clone()).await.status, status, "{change}");
    }
    assert_eq!(patch("application/json", json!([])).await.status, 415);
    patch(PATCH.1, json!([{ "op": "replace", "path": "/protected", "value": true }])).await;
    assert_eq!(api.delete(&path).await.status, 403);
}

#[tokio::test]
async fn lists_filter_by_every_key_and_page_without_gaps() {
    let api = Api::new().await;
    for (name, distro) in [("c", "debian"), ("a", "debian"), ("b", "other")] {
        let body = json!({ "name": name, "os_distro": distro, "tags": [name] });
        assert_eq!(api.post("/image/v2/images", body).await.status, 201);
    }
    let names = |body: &Value| -> Vec<String> {
        body["images"].as_array().unwrap().iter().map(|i| i["name"].as_str().unwrap().to_owned()).collect()
    };
    let list = |query: &str| {
        let path = format!("/image/v2/images?{query}");
        let api = &api;
        async move { api.get(&path).await.json() }
    };
    let all = list("").await;
    let id = |index: usize| all["images"][index]["id"].as_str().unwrap().to_owned();
    assert_eq!(names(&all), ["b", "a", "c"], "the newest first");
    assert_eq!(names(&list("name=a").await), ["a"]);
    assert_eq!(names(&list("os_distro=debian&sort_key=name&sort_dir=asc").await), ["a", "c"]);
    assert_eq!(names(&list(&format!("id=in:{},{}&sort=name:asc", id(0), id(2))).await), ["b", "c"]);
    assert_eq!(names(&list("tag=b&visibility=shared").await), ["b"]);
    assert_eq!(names(&list("created_at=gte:2020-01-01T00:00:00Z&name=c").await), ["c"]);
    let first = list("limit=2&sort_key=name&sort_dir=asc").await;
    assert_eq!(names(&first), ["a", "b"]);
    let next = first["next"].as_str().unwrap();
    let second = api.get(&format!("/image{next}")).await.json();
    assert_eq!((names(&second), second.get("next")), (vec!["c".to_owned()], None));
    for query in ["marker=nothing", "sort_key=colour", "sort_dir=up", "limit=x", "visibility=odd"] {
        assert_eq!(api.get(&format!("/image/v2/images?{query}")).await.status, 400, "{query}");
    }
}

#[tokio::test]
async fn an_image_is_seen_and_changed_only_by_those_who_may() {
    let api = Api::new().await;
    let body = |visibility: &str| json!({ "name": visibility, "visibility": visibility });
    let mut ids = Vec::new();
    for visibility in ["private", "public", "community"] {
        ids.push(
            api.post("/image/v2/images", body(visibility)).await.json()["id"].as_str().unwrap().to_owned(),
        );
    }
    let ask = |who, method: Method, path: String, body: Value| {
        let api = &api;
        async move { api.ask(who, method, &path, &[PATCH], body).await }
    };
    let listed = ask(As::Member, Method::GET, "/image/v2/images".into(), Value::Null).await.json();
    assert_eq!(listed["images"].as_array().map(Vec::len), Some(1));
    assert_eq!(listed["images"][0]["name"], "public");
    for (id, seen, deleted) in [(&ids[0], 404, 404), (&ids[1], 200, 403), (&ids[2], 200, 403)] {
        let path = format!("/image/v2/images/{id}");
        assert_eq!(ask(As::Member, Method::GET, path.clone(), Value::Null).await.status, seen);
        assert_eq!(ask(As::Member, Method::DELETE, path, Value::Null).await.status, deleted);
    }
    let images = || "/image/v2/images".to_owned();
    assert_eq!(ask(As::Member, Method::POST, images(), body("public")).await.status, 403);
    assert_eq!(ask(As::Member, Method::POST, images(), body("private")).await.status, 201);
    assert_eq!(ask(As::Reader, Method::POST, images(), body("private")).await.status, 403);
    assert_eq!(ask(As::Nobody, Method::GET, images(), Value::Null).await.status, 401);
}

#[tokio::test]
async fn every_field_of_an_image_is_in_the_schema_that_clients_check_it_against() {
    let api = Api::new().await;
    let schema = schema::image().await.0;
    let shown = show(&api, &image(&api, "raw").await).await;
    for (key, value) in shown.as_object().unwrap() {
        let kinds = &schema["properties"][key]["type"];
        let kind = match value {
            Value::Null => "null",
            Value::Bool(_) => "boolean",
            Value::Number(_) => "integer",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        assert!(
            kinds == kind || kinds.as_array().is_some_and(|k| k.contains(&json!(kind))),
            "{key}: {value}"
        );
    }
}

#[tokio::test]
async fn discovery_lists_the_versions_at_the_root() {
    let api = Api::new().await;
    let answer = api.ask(As::Nobody, Method::GET, "/image/", &[], Value::Null).await;
    assert_eq!(answer.status, 300);
    let versions = answer.json()["versions"].as_array().unwrap().clone();
    assert_eq!(
        (versions.len(), &versions[0]["id"], &versions[0]["status"]),
        (10, &json!("v2.9"), &json!("CURRENT"))
    );
    assert_eq!(api.ask(As::Nobody, Method::GET, "/image/versions", &[], Value::Null).await.status, 200);
}
