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

    /// Writes one object whose fields we do not all know: simple ones as rows, the rest as JSON.
    pub(crate) fn any_object(&self, item: &Value, id_field: &str) -> Result<()> {
        match (self.format, item) {
            (Format::Table, Value::Object(fields)) => {
                self.rows(fields.iter().map(|(name, value)| (name.replace('_', " "), cell(value))))
            }
            _ => self.object(item, &[], id_field),
        }
    }

    /// Writes a table of objects whose fields we do not all know, a column a field.
    pub(crate) fn any_table(&self, items: &[Value]) -> Result<()> {
        let fields: BTreeSet<&String> =
            items.iter().filter_map(Value::as_object).flat_map(|object| object.keys()).collect();
        let mut table = Table::new();
        table.load_preset(presets::NOTHING);
        table.set_header(fields.iter().map(|field| field.replace('_', " ").to_uppercase()));
        for item in items {
            table.add_row(fields.iter().map(|field| cell(&item[field.as_str()])));
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

/// A value in a cell: text as it is, nothing for null, the rest as JSON.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        Value::String(text) => clean(text),
        Value::Array(items) if items.iter().all(Value::is_string) => {
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
        assert_eq!(cell(&json!(1.5)), "1.5");
        assert_eq!(cell(&json!({"a": 1})), r#"{"a":1}"#);
    }
}
