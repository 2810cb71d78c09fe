//! `godwit placement`: where a server would fit, and why not elsewhere.

use crate::App;
use crate::error::Result;
use crate::output::{Column, Format, cell};
use crate::resource::{FLAVOR, IMAGE};
use crate::session::Service;
use clap::Subcommand;
use serde_json::{Value, json};

/// What can be asked of placement.
#[derive(Subcommand)]
pub(crate) enum Command {
    /// Say for each host whether a server would fit, by which rule not, and need against have
    Explain {
        /// The flavor, by id or name
        #[arg(long)]
        flavor: String,
        /// The image, by id or name; its properties count too
        #[arg(long)]
        image: Option<String>,
    },
}

const COLUMNS: &[Column] = &[
    ("host", |host| cell(&host["host"])),
    ("fits", |host| match host["fits"].as_bool() {
        Some(true) => "yes".into(),
        _ => "no".into(),
    }),
    ("rule", |host| cell(&host["rule"])),
    ("need", |host| cell(&host["need"])),
    ("have", |host| cell(&host["have"])),
    ("message", |host| cell(&host["message"])),
];

impl Command {
    /// Does it.
    pub(crate) fn run(self, app: &App) -> Result<()> {
        let Command::Explain { flavor, image } = self;
        let mut body = json!({"flavor": FLAVOR.find_id(&app.session, &flavor)?});
        if let Some(image) = image {
            body["image"] = json!(IMAGE.find_id(&app.session, &image)?);
        }
        let answer = app.session.post(Service::Operator, "/placement/explain", &body)?;
        let hosts = answer["hosts"].as_array().map(Vec::as_slice).unwrap_or_default();
        match app.output.format() {
            Format::Json => app.output.json(&answer),
            Format::Ids => {
                let fitting: Vec<Value> = hosts.iter().filter(|host| host["fits"] == true).cloned().collect();
                app.output.list(&fitting, COLUMNS, "host")
            }
            Format::Table => app.output.table(hosts, COLUMNS),
        }
    }
}
