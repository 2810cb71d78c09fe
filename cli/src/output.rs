//! What goes to standard output: a table for people, JSON for programs, or ids alone.

use crate::error::Result;
use comfy_table::{Table, presets};
use serde_json::Value;
use std::collections::BTreeSet;
use std::io::Write;

/// How results are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// Aligned columns.
    Table,
    /// The API's own objects.
    Json,
    /// Ids, one a line.
    Ids,
}

/// A column of a list, or a row of one object: a title and what to put there.
pub(crate) type Column = (&'static str, fn(&Value) -> String);

/// Writes results.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    format: Format,
}

impl Output {
    /// Writes in `format`.
    pub(crate) fn new(format: Format) -> Self {
        Output { format }
    }

    /// The format.
    pub(crate) fn format(&self) -> Format {
        self.format
    }

    /// Writes a list; with ids only, the field `id_field` of each.
    pub(crate) fn list(&self, items: &[Value], columns: &[Column], id_field: &str) -> Result<()> {
        match self.format {
            Format::Json => self.json(&Value::from(items.to_vec())),
            Format::Ids => {
                items.iter().try_for_each(|item| self.text(&format!("{}\n", cell(&item[id_field]))))
            }
            Format::Table => self.table(items, columns),
        }
    }

    /// Writes one object, a field a line; fields without a value are left out.
    pub(crate) fn object(&self, item: &Value, rows: &[Column], id_field: &str) -> Result<()> {
        match self.format {
            Format::Json => self.json(item),
            Format::Ids => self.text(&format!("{}\n", cell(&item[id_field]))),
            Format::Table => self.rows(rows.iter().map(|(title, value)| (title.to_string(), value(item)))),
        }
    }

    /// Writes one object whose fields we do not all know: for people its simple fields as rows, then each list
    /// of objects as a table under its name.
    pub(crate) fn any_object(&self, item: &Value, id_field: &str) -> Result<()> {
        if self.format != Format::Table {
            return self.object(item, &[], id_field);
        }
        let mut rows = Vec::new();
        let mut lists = Vec::new();
        flatten("", item, &mut rows, &mut lists);
        rows.sort_by_key(|(name, _)| field_order(name));
        self.rows(rows.into_iter())?;
        for (name, items) in lists {
            self.text(&format!("\n{}\n", name.to_uppercase()))?;
            self.any_table(items)?;
        }
        Ok(())
    }

    fn any_table(&self, items: &[Value]) -> Result<()> {
        let fields: BTreeSet<&String> =
            items.iter().filter_map(Value::as_object).flat_map(|object| object.keys()).collect();
        let mut fields: Vec<_> = fields.into_iter().collect();
        fields.sort_by_key(|name| field_order(name));
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(fields.iter().map(|field| field.replace('_', " ").to_uppercase()));
        for item in items {
            table.add_row(fields.iter().map(|field| brief(&item[field.as_str()])));
        }
        self.text(&trimmed(&table))
    }

    /// Writes what was done to `items`: as JSON the items, as ids their ids, for people one line each.
    pub(crate) fn done(&self, verb: &str, items: &[Value]) -> Result<()> {
        match self.format {
            Format::Json => self.json(&Value::from(items.to_vec())),
            Format::Ids => items.iter().try_for_each(|item| self.text(&format!("{}\n", cell(&item["id"])))),
            Format::Table => items.iter().try_for_each(|item| {
                let name = item["name"].as_str().filter(|name| !name.is_empty());
                self.text(&match name {
                    Some(name) => format!("{verb} {} ({})\n", clean(name), cell(&item["id"])),
                    None => format!("{verb} {}\n", cell(&item["id"])),
                })
            }),
        }
    }

    /// Writes a table, or nothing but its head when there are no items.
    pub(crate) fn table(&self, items: &[Value], columns: &[Column]) -> Result<()> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(columns.iter().map(|(title, _)| title.to_uppercase()));
        for item in items {
            table.add_row(columns.iter().map(|(_, value)| value(item)));
        }
        self.text(&trimmed(&table))
    }

    fn rows(&self, rows: impl Iterator<Item = (String, String)>) -> Result<()> {
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        for (title, value) in rows.filter(|(_, value)| !value.is_empty()) {
            table.add_row([title, value]);
        }
        self.text(&trimmed(&table))
    }

    /// Writes JSON and a newline.
    pub(crate) fn json(&self, value: &Value) -> Result<()> {
        let mut text = serde_json::to_string_pretty(value).expect("a JSON value has only string keys");
        text.push('\n');
        self.text(&text)
    }

    /// Writes text as it is.
    pub(crate) fn text(&self, text: &str) -> Result<()> {
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes())?;
        Ok(stdout.flush()?)
    }
}

/// Every line indented by the table's padding and filled up with blanks: take both off.
fn trimmed(table: &Table) -> String {
    let lines =
        table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned() + "\n");
    lines.collect()
}

/// Collects the simple fields of `value` under their paths, and its lists of objects.
fn flatten<'a>(
    path: &str,
    value: &'a Value,
    rows: &mut Vec<(String, String)>,
    lists: &mut Vec<(String, &'a [Value])>,
) {
    match value {
        Value::Object(fields) => {
            for (name, value) in fields {
                let name = name.replace('_', " ");
                let path = if path.is_empty() { name } else { format!("{path} {name}") };
                flatten(&path, value, rows, lists);
            }
        }
        Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_object) => {
            lists.push((path.to_owned(), items));
        }
        simple => rows.push((path.to_owned(), cell(simple))),
    }
}

/// What a thing is called comes first, the rest by the alphabet.
fn field_order(name: &str) -> (usize, String) {
    let first = ["id", "name", "host"];
    (first.iter().position(|field| *field == name).unwrap_or(first.len()), name.to_owned())
}

/// A value in a table's cell: of a list of objects only their ids, or how many they are.
fn brief(value: &Value) -> String {
    match value {
        Value::Array(items) if !items.is_empty() && items.iter().all(Value::is_object) => {
            let ids: Option<Vec<_>> = items.iter().map(|item| item.get("id").map(cell)).collect();
            ids.map_or_else(|| items.len().to_string(), |ids| ids.join(", "))
        }
        other => cell(other),
    }
}

/// A value in a cell: text as it is, nothing for null, the rest as JSON.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => clean(text),
        Value::Array(items) if !items.iter().any(|item| item.is_object() || item.is_array()) => {
            items.iter().map(cell).collect::<Vec<_>>().join(", ")
        }
        other => other.to_string(),
    }
}

/// Names come from other users: no control characters reach the terminal.
fn clean(text: &str) -> String {
    text.chars().map(|c| if c.is_control() && c != '\n' { '\u{fffd}' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_name_cannot_drive_the_terminal() {
        assert_eq!(cell(&json!("a\u{1b}[2Jb\nc")), "a\u{fffd}[2Jb\nc");
    }

    #[test]
    fn cells_read_like_text() {
        assert_eq!(cell(&json!(null)), "");
        assert_eq!(cell(&json!(["a", "b"])), "a, b");
        assert_eq!(cell(&json!([0, 1])), "0, 1");
        assert_eq!(cell(&json!(1.5)), "1.5");
        assert_eq!(cell(&json!({"a": 1})), r#"{"a":1}"#);
    }

    #[test]
    fn an_unknown_object_becomes_rows_and_tables() {
        let host = json!({"name": "h1", "inventory": {"kernel": "6.1", "cells": [{"id": 0, "cpus": [{"id": 0}, {"id": 2}]}]}});
        let (mut rows, mut lists) = (Vec::new(), Vec::new());
        flatten("", &host, &mut rows, &mut lists);
        assert_eq!(rows, [("inventory kernel".into(), "6.1".into()), ("name".into(), "h1".to_owned())]);
        assert_eq!(lists[0].0, "inventory cells");
        assert_eq!(brief(&lists[0].1[0]["cpus"]), "0, 2");
        assert_eq!(brief(&json!([{"size_kib": 4}])), "1");
    }
}
