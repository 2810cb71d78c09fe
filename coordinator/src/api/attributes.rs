//! A JSON object whose attributes are taken out one by one, so that what nobody took can be refused by name.

use crate::api::fault::{Answer, Fault};
use serde_json::{Map, Value};
use std::str::FromStr;

/// What is left of an object.
#[derive(Clone, Debug)]
pub(super) struct Attributes(Map<String, Value>);

/// The refusal of a value, in the words of all services.
fn wrong(key: &str, value: &Value, must: &str) -> Fault {
    Fault::bad_request(format!("Invalid input for field/attribute {key}. Value: {value}. It must be {must}."))
}

impl Attributes {
    /// An object; `what` names it in the refusal of anything else.
    pub(super) fn of(value: Value, what: &str) -> Answer<Self> {
        match value {
            Value::Object(map) => Ok(Self(map)),
            other => Err(wrong(what, &other, "an object")),
        }
    }

    /// The object under the one key of `body`.
    pub(super) fn inside(body: Value, key: &str) -> Answer<Self> {
        let mut outer = Self::of(body, "the request's body")?;
        let inner =
            outer.take(key).ok_or_else(|| Fault::bad_request(format!("'{key}' is a required property.")))?;
        outer.finish()?;
        Self::of(inner, key)
    }

    /// A value, when it is there and not null.
    pub(super) fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key).filter(|value| !value.is_null())
    }

    /// Whether it is there, null included.
    pub(super) fn has(&self, key: &str) -> bool {
        self.0.contains_key(key)
    }

    /// A text.
    pub(super) fn text(&mut self, key: &str) -> Answer<Option<String>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(key, &other, "a string")),
        }
    }

    /// A text that must be there.
    pub(super) fn required_text(&mut self, key: &str) -> Answer<String> {
        self.text(key)?.ok_or_else(|| Fault::bad_request(format!("'{key}' is a required property.")))
    }

    /// Something that is written as a text: an id, an address. `must` says what it must be.
    pub(super) fn parsed<T: FromStr>(&mut self, key: &str, must: &str) -> Answer<Option<T>> {
        let Some(text) = self.text(key)? else { return Ok(None) };
        text.parse().map(Some).map_err(|_| wrong(key, &Value::String(text), must))
    }

    /// A truth value, also as the texts that old clients send.
    pub(super) fn flag(&mut self, key: &str) -> Answer<Option<bool>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        match read_flag(&value) {
            Some(flag) => Ok(Some(flag)),
            None => Err(wrong(key, &value, "a boolean")),
        }
    }

    /// A whole number, also as a text.
    pub(super) fn number(&mut self, key: &str) -> Answer<Option<u64>> {
        let Some(value) = self.take(key) else { return Ok(None) };
        let number = match &value {
            Value::Number(number) => number.as_u64(),
            Value::String(text) => text.trim().parse().ok(),
            _ => None,
        };
        number.map(Some).ok_or_else(|| wrong(key, &value, "a whole number, not below 0"))
    }

    /// A list.
    pub(super) fn list(&mut self, key: &str) -> Answer<Option<Vec<Value>>> {
        match self.take(key) {
            None => Ok(None),
            Some(Value::Array(items)) => Ok(Some(items)),
            Some(other) => Err(wrong(key, &other, "a list")),
        }
    }

    /// A list of things that are written as texts.
    pub(super) fn parsed_list<T: FromStr>(&mut self, key: &str, must: &str) -> Answer<Option<Vec<T>>> {
        let Some(items) = self.list(key)? else { return Ok(None) };
        let read = |item: &Value| item.as_str().and_then(|text| text.parse().ok());
        let read = items.iter().map(|item| read(item).ok_or_else(|| wrong(key, item, must)));
        read.collect::<Answer<_>>().map(Some)
    }

    /// An attribute of something that is not built: it may only have a value that asks for nothing.
    pub(super) fn inert(&mut self, key: &str, harmless: &[Value]) -> Answer<()> {
        match self.take(key) {
            Some(value) if !harmless.contains(&value) => {
                Err(Fault::bad_request(format!("{key} = {value} is not supported here; leave it out.")))
            }
            _ => Ok(()),
        }
    }

    /// That nothing is left.
    pub(super) fn finish(self) -> Answer<()> {
        if self.0.is_empty() {
            return Ok(());
        }
        let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
        Err(Fault::bad_request(format!("Unrecognized attribute(s) '{}'.", names.join("', '"))))
    }

    /// All that is left.
    pub(super) fn into_map(self) -> Map<String, Value> {
        self.0
    }
}

/// A truth value in the spellings that clients use in bodies.
pub(super) fn read_flag(value: &Value) -> Option<bool> {
    match value {
        Value::Bool(flag) => Some(*flag),
        Value::Number(number) => match number.as_u64() {
            Some(0) => Some(false),
            Some(1) => Some(true),
            _ => None,
        },
        Value::String(text) => match text.to_ascii_lowercase().as_str() {
            "true" | "1" | "on" | "yes" => Some(true),
            "false" | "0" | "off" | "no" => Some(false),
            _ => None,
        },
        _ => None,
    }
}

/// A time as the services print it, without a fraction: `2026-01-31T12:00:00Z`.
pub(super) fn time_text(time: crate::fleet::Time) -> String {
    let (date, clock) = (time.date(), time.time());
    format!("{date}T{:02}:{:02}:{:02}Z", clock.hour(), clock.minute(), clock.second())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn what_nobody_took_is_refused_by_name() {
        let mut attributes =
            Attributes::inside(json!({ "port": { "name": "a", "colour": 1 } }), "port").unwrap();
        assert_eq!(attributes.text("name").unwrap().as_deref(), Some("a"));
        assert!(attributes.finish().unwrap_err().message().contains("'colour'"));
        assert!(Attributes::inside(json!({ "port": {}, "more": 1 }), "port").is_err());
        assert!(Attributes::inside(json!([]), "port").is_err());
    }

    #[test]
    fn numbers_and_flags_may_be_texts_and_nothing_else_may() {
        let mut a =
            Attributes::of(json!({ "n": "6", "f": "0", "bad": "six", "null": null, "x": -1 }), "x").unwrap();
        assert_eq!(a.number("n").unwrap(), Some(6));
        assert_eq!(a.flag("f").unwrap(), Some(false));
        assert_eq!(a.number("null").unwrap(), None);
        assert!(a.number("x").is_err());
        assert!(a.number("bad").unwrap_err().message().contains("bad"));
    }

    #[test]
    fn what_is_not_built_may_be_named_only_where_it_asks_for_nothing() {
        let mut a = Attributes::of(json!({ "pairs": [], "groups": ["default"], "none": null }), "x").unwrap();
        assert!(a.inert("pairs", &[json!([])]).is_ok());
        assert!(a.inert("none", &[]).is_ok());
        assert!(a.inert("groups", &[json!([])]).unwrap_err().message().contains("not supported"));
    }

    #[test]
    fn times_are_printed_without_a_fraction() {
        let time = crate::fleet::Time::from_unix_timestamp(1_700_000_000).unwrap();
        assert_eq!(time_text(time + time::Duration::microseconds(7)), "2023-11-14T22:13:20Z");
    }
}
