//! Changes of an image's fields and properties, in both forms of JSON patch that clients send.

use super::{body, find_own, validate};
use crate::api::context::{Body, Caller};
use crate::api::fault::{Answer, Fault};
use crate::app::Shared;
use crate::error::Error;
use crate::fleet::image::Image;
use crate::ledger::now;
use axum::Json;
use axum::extract::{Path, State};
use axum::http::header::CONTENT_TYPE;
use axum::http::{HeaderMap, StatusCode};
use serde_json::{Map, Value};

const NEW_FORM: &str = "application/openstack-images-v2.1-json-patch";
const OLD_FORM: &str = "application/openstack-images-v2.0-json-patch";

/// One change.
#[derive(Debug, PartialEq)]
enum Change {
    Add(String, Value),
    Replace(String, Value),
    Remove(String),
}

/// PATCH /v2/images/{id}.
pub(super) async fn patch(
    State(app): State<Shared>,
    caller: Caller,
    Path(id): Path<String>,
    headers: HeaderMap,
    Body(body): Body<Vec<Map<String, Value>>>,
) -> Answer<Json<Value>> {
    caller.require_member()?;
    let kind = headers.get(CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let read = match kind.split(';').next().unwrap_or_default().trim() {
        NEW_FORM => new_form,
        OLD_FORM => old_form,
        _ => {
            let message = format!("The content type must be {NEW_FORM} or {OLD_FORM}, not {kind:?}.");
            return Err(Fault::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, message));
        }
    };
    let changes = body.into_iter().map(read).collect::<Answer<Vec<_>>>()?;
    let image = app
        .ledger
        .change(|fleet| {
            let mut image = find_own(fleet, &caller, &id)?.clone();
            for change in changes {
                apply(&mut image, &caller, change)?;
            }
            validate(&caller, &image)?;
            image.updated_at = now();
            Ok::<_, Error>((vec![image.clone().into()], image))
        })
        .await?;
    Ok(Json(body::show(&image)))
}

fn apply(image: &mut Image, caller: &Caller, change: Change) -> Result<(), Error> {
    let missing = |key: &str| Error::Conflict(format!("Property {key} does not exist."));
    match change {
        Change::Add(key, value) => body::set(image, caller, &key, value, false),
        Change::Replace(key, value) => {
            if !body::is_field(&key) && !image.properties.contains_key(&key) {
                return Err(missing(&key));
            }
            body::set(image, caller, &key, value, false)
        }
        Change::Remove(key) if body::is_field(&key) => {
            Err(Error::Forbidden(format!("Property '{key}' may not be removed.")))
        }
        Change::Remove(key) => image.properties.remove(&key).map(drop).ok_or_else(|| missing(&key)),
    }
}

/// `{"op": "replace", "path": "/name", "value": …}`.
fn new_form(mut change: Map<String, Value>) -> Answer<Change> {
    let wrong = |what: &str| Fault::bad_request(format!("A change of an image needs {what}."));
    let path = change.get("path").and_then(Value::as_str).ok_or_else(|| wrong("a path"))?;
    let key = key_of(path)?;
    let op = change.get("op").and_then(Value::as_str).unwrap_or_default().to_owned();
    build(&op, key, change.remove("value"))
}

/// `{"replace": "/name", "value": …}`.
fn old_form(mut change: Map<String, Value>) -> Answer<Change> {
    let value = change.remove("value");
    let mut ops = change.into_iter();
    match (ops.next(), ops.next()) {
        (Some((op, Value::String(path))), None) => build(&op, key_of(&path)?, value),
        _ => Err(Fault::bad_request("A change of an image is one of add, replace, remove with its path.")),
    }
}

fn build(op: &str, key: String, value: Option<Value>) -> Answer<Change> {
    let needed = || Fault::bad_request(format!("The change {op} of {key} needs a value."));
    match op {
        "add" => Ok(Change::Add(key.clone(), value.ok_or_else(needed)?)),
        "replace" => Ok(Change::Replace(key.clone(), value.ok_or_else(needed)?)),
        "remove" => Ok(Change::Remove(key)),
        _ => Err(Fault::bad_request(format!("{op:?} is no change of an image: add, replace, remove."))),
    }
}

/// The key that a JSON pointer of one step names.
fn key_of(pointer: &str) -> Answer<String> {
    let wrong = || Fault::bad_request(format!("{pointer:?} is no path to an attribute of an image."));
    let key = pointer.strip_prefix('/').ok_or_else(wrong)?;
    if key.is_empty() || key.contains('/') {
        return Err(wrong());
    }
    Ok(key.replace("~1", "/").replace("~0", "~"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn both_forms_say_the_same() {
        let read = |form: fn(Map<String, Value>) -> Answer<Change>, body: Value| {
            form(body.as_object().unwrap().clone()).map_err(|fault| fault.status().as_u16())
        };
        let expected = || Ok(Change::Replace("a/b".into(), json!("x")));
        assert_eq!(read(new_form, json!({ "op": "replace", "path": "/a~1b", "value": "x" })), expected());
        assert_eq!(read(old_form, json!({ "replace": "/a~1b", "value": "x" })), expected());
        assert_eq!(read(old_form, json!({ "remove": "/c" })), Ok(Change::Remove("c".into())));
        for body in [
            json!({ "op": "add", "path": "/a" }),
            json!({ "op": "add", "path": "a", "value": 1 }),
            json!({ "op": "add", "path": "/tags/-", "value": "x" }),
            json!({ "op": "move", "path": "/a", "value": 1 }),
            json!({}),
        ] {
            assert_eq!(read(new_form, body), Err(400));
        }
        assert_eq!(read(old_form, json!({ "add": "/a", "remove": "/b", "value": 1 })), Err(400));
    }
}
